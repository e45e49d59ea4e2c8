"""Class folders (ImageNet and everything laid out like it) to labelled shards.

python data_prep/imagenet.py --images /data/imagenet --names LOC_synset_mapping.txt --out data/imagenet
python data_prep/imagenet.py --images tiny_imagenet_20/images.zip --names tiny_imagenet_20/classes.json \\
    --prompts clip/class_prompts.json:ImageNet --out data/tiny20

Expects SPLIT/CLASS/file in a folder or zip. --names gives each class folder its words ("goldfish, Carassius auratus"):
lines "n01443537 goldfish, ..." or a json list of {"wnid", "names"}; --prompts the zero-shot templates.
ImageNet is for non-commercial research and education only (image-net.org, terms of access).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from common import cli
from common.data import IMAGE_TYPES
from data_prep._write import Files, checked_image, prepare, settings, summary


@dataclass(frozen=True)
class Config:
    images: str  # folder or zip file: SPLIT/CLASS/file
    out: str  # folder to write
    names: str = ""  # words of the classes; "" = the folder names
    prompts: str = ""  # file.json:KEY with a list "templates" under KEY
    metric: str = "top1"  # how its zero-shot is scored: top1, mean_per_class or roc_auc
    splits: str = "train,val"  # the splits to take
    max_side: int = 0  # larger images shrink to this many pixels, 0 = keep the original bytes
    licence: str = "ImageNet: non-commercial research and education only"  # kept in the manifest


def read_names(path) -> dict[str, str]:
    try:
        text = Path(path).read_text("utf-8")
        if path.endswith(".json"):
            return {c["wnid"]: c["names"] for c in json.loads(text)}
        return dict(line.split(" ", 1) for line in text.splitlines() if line.strip())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"--names {path} cannot be read: {error}") from error


def read_prompts(spec: str) -> dict:
    """'file.json:KEY' -> {"classes": [...], "templates": [...]}"""
    path, _, key = spec.rpartition(":")
    try:
        entry = json.loads(Path(path).read_text("utf-8"))[key]
        if not all(isinstance(t, str) and t.count("{}") == 1 == t.count("{") for t in entry["templates"]):
            raise ValueError("templates must be a list of texts with one {} each")
        return entry
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"--prompts {spec} must be FILE.json:KEY ({type(error).__name__}: {error})") from error


def run(cfg: Config) -> dict:
    if cfg.metric not in ("top1", "mean_per_class", "roc_auc"):
        raise ValueError(f"--metric {cfg.metric} is unknown; choose top1, mean_per_class or roc_auc")
    files = Files(cfg.images)
    found = [(*n.split("/")[-3:-1], n) for n in files.names if Path(n).suffix.lower() in IMAGE_TYPES and n.count("/") >= 2]
    splits = {s: [(c, n) for split, c, n in found if split == s] for s in cfg.splits.split(",")}
    rng = np.random.default_rng(0)  # classes come one after the other: shuffled, so that every shard is a fair sample
    if absent := [s for s, items in splits.items() if not items]:
        raise ValueError(f"{cfg.images} holds no images as {absent[0]}/CLASS/file; leave it out of --splits {cfg.splits}")
    splits = {s: [items[i] for i in rng.permutation(len(items))] for s, items in splits.items()}
    folders = sorted({c for items in splits.values() for c, _ in items})
    label = {c: i for i, c in enumerate(folders)}
    names = read_names(cfg.names) if cfg.names else {}
    templates = read_prompts(cfg.prompts)["templates"] if cfg.prompts else []

    def make(item):
        folder, name = item
        ext, blob = checked_image(files.read(name), name, cfg.max_side)
        return Path(name).stem, ext, blob, {"label": label[folder], "class": folder}

    manifest = prepare(cfg.out, splits, make, identity=settings(cfg), source=Path(cfg.images).name, licence=cfg.licence,
                       folders=folders, classes=[names.get(c, c) for c in folders], templates=templates,
                       metric=cfg.metric)  # fmt: skip
    summary(cfg.out, manifest)
    return manifest


if __name__ == "__main__":
    cli.main(run, Config)
