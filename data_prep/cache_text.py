"""Encodes captions or class names once, by the text tower of a CLIP read by path: the soft targets of methods/xsample.py.

python data_prep/cache_text.py --data data/cc3m --clip clip/model.safetensors --tokenizer clip/merges.txt.gz --out cc3m.npy
python data_prep/cache_text.py --data data/imagenet --classes --template "a photo of a {}" --clip ... --out classes.npy
torchrun --nproc_per_node=8 data_prep/cache_text.py ...

Writes OUT.npy, float16 unit rows (N, d): the first caption of every training sample in the order of the shards, or one row a
class; and OUT.ids.npy, which lets readers refuse rows of other samples. Any other encoder will do as well: write the same
two files, or the first alone. Interrupted, it continues: a row of zeros is one that is not encoded yet.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import cli, data, ddp
from common.tokenizer import Tokenizer
from common.vit import load_clip, trim


@dataclass(frozen=True)
class Config:
    data: str  # shards written by another script of data_prep/
    out: str  # file to write, ending in .npy
    clip: str  # CLIP weights, in any layout that common/vit.py reads
    tokenizer: str  # CLIP's merges file, or a Hugging Face folder
    act: str = ""  # activation where the file does not tell it: quick_gelu or gelu
    classes: bool = False  # encode the class names of the manifest instead of captions
    template: str = "a photo of a {}"  # of class names
    batch_size: int = 256  # texts encoded at once


def read_texts(cfg: Config) -> tuple[list[str], list[str]]:
    """-> texts and what they belong to: class names or keys of samples."""
    source = data.Shards(cfg.data, "train")
    if cfg.classes:
        if not source.classes:
            raise ValueError(f"{cfg.data}: manifest.json lists no classes; prepare labelled pictures, or leave out --classes")
        if cfg.template.count("{}") != 1 or cfg.template.count("{") != 1 or cfg.template.count("}") != 1:
            raise ValueError(f"--template {cfg.template!r} must hold one {{}}, the place of the class name")
        return [cfg.template.format(c) for c in source.classes], source.classes
    records = data.records(source)
    missing = sum(not r.get("captions") for r in records if r["key"])  # damaged records have no key, and are never drawn
    if missing:
        raise ValueError(f"{missing} of {len(records)} samples of {cfg.data} have no caption; prepare them with captions")
    return [(r.get("captions") or [""])[0] for r in records], [r["key"] for r in records]


@torch.no_grad()
def run(cfg: Config) -> np.ndarray:
    if not cfg.out.endswith(".npy") or cfg.batch_size < 1:
        raise ValueError(f"--out {cfg.out} must end in .npy, --batch_size be at least 1")
    env = ddp.start(0)
    texts, names = read_texts(cfg)
    clip, tok = load_clip(cfg.clip, act=cfg.act).eval().to(env.device), Tokenizer.from_clip(cfg.tokenizer)
    first = F.normalize(clip.encode_text(trim(tok(texts[:1])).to(env.device)).float(), dim=1)[0].cpu().numpy()
    d = len(first)
    ids, beside = np.array([data.text_id(n) for n in names]), Path(f"{cfg.out.removesuffix('.npy')}.ids.npy")
    if env.is_main:
        if Path(cfg.out).exists() and (not beside.exists() or np.load(cfg.out, mmap_mode="r").shape != (len(texts), d)
                                       or not np.array_equal(np.load(beside), ids)):  # fmt: skip
            raise ValueError(f"{cfg.out} holds embeddings of other texts; choose another --out")
        if Path(cfg.out).exists() and (old := np.load(cfg.out, mmap_mode="r")[0]).any() and abs(old - first).max() > 5e-3:
            raise ValueError(f"{cfg.out} holds embeddings by another --clip or --template; choose another --out")
        if not Path(cfg.out).exists():
            Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
            np.save(beside, ids)
            tmp = Path(f"{cfg.out}.tmp")
            offset = np.lib.format.open_memmap(tmp, "w+", np.float16, (len(texts), d)).offset
            with open(tmp, "r+b") as f:  # all of it now: a memory map that finds the disk full dies without a word
                f.seek(offset)
                for left in range(2 * len(texts) * d, 0, -(1 << 24)):
                    f.write(bytes(min(left, 1 << 24)))
            os.replace(tmp, cfg.out)
    ddp.gather_lists([0])  # wait for the file
    rows = np.lib.format.open_memmap(cfg.out, "r+")
    for i in tqdm(range(env.rank * cfg.batch_size, len(texts), env.world * cfg.batch_size), disable=not env.is_main):
        part = slice(i, i + cfg.batch_size)
        if not rows[part].any(1).all():
            f = clip.encode_text(trim(tok(texts[part])).to(env.device))
            rows[part] = F.normalize(f.float(), dim=1).half().cpu().numpy()
            rows.flush()
    ddp.gather_lists([0])
    if env.is_main:
        print(f"{cfg.out}: {len(texts)} {'classes' if cfg.classes else 'captions'}, {d} dimensions")
    return rows


if __name__ == "__main__":
    cli.main(run, Config)
