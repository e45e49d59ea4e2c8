"""Encodes a prepared data set once: the autoencoder's mean AND log-variance of every view, with the view's controls.

python data_prep/cache_latents.py --data data/cifar100 --out data/cifar100_latents --vae VAE --size 32
torchrun --nproc_per_node=8 data_prep/cache_latents.py --data data/imagenet --out data/imagenet_latents --vae VAE --views 4

Mean and log-variance, because cached samples lose the posterior's noise and over-fit. A view is a random crop (--min_crop
below 1) and flip, recorded as it was drawn (common/augment.py); validation pictures are central squares. One file of
latents for every 1,000 pictures, shared out to the processes; interrupted, it continues. The manifest holds the
autoencoder's fingerprint, and readers refuse latents of another one.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from common import augment, ckpt, cli, data, ddp, zoo
from common.log import write_json
from common.vae import load_vae


@dataclass(frozen=True)
class Config:
    data: str  # shards written by another script of data_prep/, or a folder of pictures
    out: str  # folder to write
    vae: str = ""  # autoencoder, in any layout that common/vae.py reads; "" = the stand-in for generated scenes
    size: int = 256  # pixels of the square that is encoded
    views: int = 1  # of each training picture
    min_crop: float = 1.0  # smallest crop, as a share of the largest square's area; 1 = the central square
    max_crop: float = 1.0  # largest crop; 1 / 4 crops for the low resolution directly, at half the side of the later one
    flip: float = 0.5  # chance of a mirrored view
    seed: int = 0  # of crops and flips
    batch_size: int = 64  # pictures encoded at once
    per_shard: int = 1_000  # pictures of a file
    max_bad: float = 0.01  # share of damaged pictures at which the run stops


@torch.no_grad()
def encode_part(vae, source, rows, cfg, split, part, device) -> tuple[dict, list, list]:
    """(shard, row) pairs -> tensors and captions of the good ones, and what was wrong with the others."""
    views, controls, labels, captions, bad = [], [], [], [], []
    train = split == "train"
    for shard, row in rows:
        try:
            sample = source.read(shard, row)
        except data.BadSample as error:
            bad.append(str(error))
            continue
        for view in range(cfg.views if train else 1):
            rng = np.random.default_rng((cfg.seed, part, shard, row, view))
            crop = (cfg.min_crop, cfg.max_crop) if train else (1.0, 1.0)
            x, c = augment.random_view(sample["image"], cfg.size, rng, crop, cfg.flip if train else 0.0)
            views.append(x)
            controls.append(c)
            labels.append(int(sample.get("label", -1)))
            captions.append(sample.get("captions", []))
    if not views:
        return {}, captions, bad
    out = {"mean": [], "logvar": []}
    for i in range(0, len(views), cfg.batch_size):
        x = torch.from_numpy(np.stack(views[i : i + cfg.batch_size])).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        for name, v in zip(("mean", "logvar"), vae.encode(x)):
            out[name].append(v.half().cpu())
    out = {k: torch.cat(v) for k, v in out.items()}
    return {**out, "controls": torch.tensor(np.stack(controls)), "label": torch.tensor(labels)}, captions, bad


def run(cfg: Config) -> dict:
    if min(cfg.size, cfg.views, cfg.batch_size, cfg.per_shard) < 1 or not 0 < cfg.min_crop <= cfg.max_crop <= 1:
        raise ValueError(
            "--size, --views, --batch_size and --per_shard must be at least 1, and 0 < --min_crop <= --max_crop <= 1"
        )
    env = ddp.start(cfg.seed)
    vae = (load_vae(cfg.vae) if cfg.vae else zoo.load_vae()).to(env.device)
    if cfg.size % vae.factor:
        raise ValueError(f"--size {cfg.size} must be a multiple of the autoencoder's {vae.factor}")
    shards = list(Path(cfg.data).glob("*.tar"))
    splits = sorted({p.name.split("-")[0] for p in shards} & {"train", "val", "test"}) or [""]
    out, path = Path(cfg.out), Path(cfg.out, "manifest.json")
    sources = {split: data.Shards(cfg.data, split) if shards else data.Folder(cfg.data) for split in splits}
    # what was read, for the next run to compare; folders may move
    read = ([(s.manifest.get("fingerprint", ""), s.names, s.sizes) for s in sources.values()] if shards else
            [p.relative_to(cfg.data).as_posix() for p in sources[""].files])  # fmt: skip
    settings = {k: getattr(cfg, k) for k in ("size", "views", "min_crop", "max_crop", "flip", "seed", "per_shard")}
    settings["source"] = hashlib.sha256(repr(read).encode()).hexdigest()[:16]
    manifest = {"kind": "latents", "vae": vae.fingerprint(), "scale": vae.scale, **settings, "complete": False, "shards": []}
    if path.exists():
        try:
            old = dict(json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove the folder, or choose another --out") from error
        if any(old.get(k) != manifest[k] for k in ("vae", *settings)):
            raise ValueError(f"{out} holds latents of another autoencoder, other data or settings; choose another --out")
        if old.get("complete"):
            return old
    for split, source in sources.items():
        out.mkdir(parents=True, exist_ok=True)
        if env.is_main and not path.exists():  # the input is there
            write_json(path, manifest)
        manifest.update(classes=source.classes, licence=getattr(source, "manifest", {}).get("licence", "not stated"))
        rows = [(s, r) for s, n in enumerate(source.sizes) for r in range(n)]
        if not shards:  # files are read in this order or nearly, and a folder is sorted by class
            rows = [rows[i] for i in np.random.default_rng(cfg.seed).permutation(len(rows))]
        held = "val" if split == "test" and "val" not in splits else split  # CIFAR has a test split alone: it validates
        alone = splits in ([""], ["train"])  # a folder, CC12M: every tenth picture validates
        named = {"train": [r for i, r in enumerate(rows) if i % 10], "val": rows[::10]} if alone else {held: rows}
        for name, rows in named.items():
            parts = [rows[i : i + cfg.per_shard] for i in range(0, len(rows), cfg.per_shard)]
            files = [out / f"{name}-{i:06d}.safetensors" for i in range(len(parts))]
            seen, bad, empty = 0, [], []
            for i in tqdm(range(env.rank, len(parts), env.world), desc=name, unit="file", disable=not env.is_main):
                if not files[i].exists():
                    tensors, captions, problems = encode_part(vae, source, parts[i], cfg, name, i, env.device)
                    seen, bad = seen + len(parts[i]), bad + problems
                    if len(bad) > cfg.max_bad * max(seen, 1000):
                        raise ValueError(f"{len(bad)} of {seen} pictures are damaged, more than --max_bad {cfg.max_bad}; the "
                                         f"first: {bad[0]}")  # fmt: skip
                    if tensors:
                        ckpt.export(files[i], tensors, captions=captions, bad=len(problems))
                    else:
                        empty.append(files[i].name)
            empty = set(ddp.gather_lists(empty))  # waits for the other processes
            kept = [f for f in files if f.name not in empty]
            manifest["shards"] += [{"name": f.name, "split": name, "count": count(f)} for f in kept]
            if not any(s["split"] == name for s in manifest["shards"]):
                raise ValueError(f"{cfg.data}: no picture to make the split {name} of can be read")
    manifest["complete"] = True
    manifest["counts"] = {
        s: sum(e["count"] for e in manifest["shards"] if e["split"] == s) for s in {e["split"] for e in manifest["shards"]}
    }
    if env.is_main:
        write_json(path, manifest)
        print(f"{out}: {manifest['counts']} views of {cfg.size} px, autoencoder {manifest['vae']}")
    return manifest


def count(path) -> int:
    with safe_open(path, "pt") as f:
        return f.get_slice("label").get_shape()[0]


if __name__ == "__main__":
    cli.main(run, Config)
