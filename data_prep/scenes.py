"""Writes the generated world of common/scenes.py to shards, so that the real readers are exercised.

python data_prep/scenes.py --out data/scenes                       (10,000 + 1,000 + 1,000 scenes at 64 px, about 30 s)

A record holds the captions, a long caption, the class (shape of the first object), and boxes as a tree (id, parent).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from common import cli, scenes
from data_prep._write import Image, png, prepare, settings, summary


@dataclass(frozen=True)
class Config:
    out: str  # folder to write
    train: int = 10_000  # scenes of each split
    val: int = 1_000  # scenes
    test: int = 1_000  # scenes
    size: int = 64  # pixels
    objects: int = 3  # at most so many objects a scene
    seed: int = 0  # of the world; each split has its own

    def splits(self):
        return {"train": self.train, "val": self.val, "test": self.test}


def run(cfg: Config) -> dict:
    if not (1 <= cfg.objects <= 3 and cfg.size >= 16 and min(cfg.splits().values()) >= 0):
        raise ValueError("--objects must be 1 to 3, --size at least 16, and no split negative")

    def make(item):
        split, index = item
        s = scenes.scene(index, 3 * cfg.seed + list(cfg.splits()).index(split), (1, cfg.objects))
        tree = scenes.tree(s, cfg.size)
        boxes = [{k: v for k, v in n.items() if k != "mask"} for n in tree if n["parent"] == 0]  # objects: no scene, no spots
        record = {"captions": [scenes.caption(s, 5 * index + v if v else 0) for v in range(5)],
                  "long_caption": scenes.long_caption(s), "boxes": boxes,
                  "label": scenes.SHAPES.index(s.things[0].shape)}  # fmt: skip
        return str(index), "png", png(Image.fromarray(scenes.render([s], cfg.size)[0])), record

    plan = {k: [(k, i) for i in range(n)] for k, n in cfg.splits().items() if n}
    manifest = prepare(cfg.out, plan, make, identity=settings(cfg), source="common/scenes.py", licence="MIT, as this project",
                       classes=list(scenes.SHAPES), templates=["a {}", "a picture of a {}"])  # fmt: skip
    summary(cfg.out, manifest)
    return manifest


if __name__ == "__main__":
    cli.main(run, Config)
