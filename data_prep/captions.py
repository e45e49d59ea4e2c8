"""Image-caption pairs: a table (csv or tsv) with an image and a caption column, and a folder or zip of images.

python data_prep/captions.py --table flickr8k/captions.csv --images flickr8k/images.zip --out data/flickr8k \\
    --licence "Flickr8k: non-commercial research and education only; photos belong to their authors"

Rows of one image are gathered into its list of captions. Splits are drawn over images, never over rows, with a fixed seed.
Photographs belong to their photographers: check the licence of your source before you train on it or share it.
"""

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from common import cli, data
from data_prep._write import BadSample, Files, checked_image, lookup, prepare, settings, shuffled_splits, summary


@dataclass(frozen=True)
class Config:
    table: str  # csv or tsv file with a header line, also .gz
    images: str  # folder or zip file of images
    out: str  # folder to write
    image_column: str = "image"  # column with the image's file name
    caption_column: str = "caption"  # column with one caption
    val: int = 100  # images of this split
    test: int = 100  # images of this split; the rest is train
    seed: int = 0  # of the split
    max_side: int = 0  # larger images shrink to this many pixels, 0 = keep the original bytes
    licence: str = "not stated: ask the source"  # kept in the manifest


def read_table(path, *columns) -> list[tuple[str, ...]]:
    """The named columns of a csv or tsv with a header line."""
    text = data.read_text(path)
    head = text.split("\n", 1)[0]
    tab = "\t" in head
    # Pasted tsv files have stray quotes; only csv quotes its fields
    quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tab else {"strict": True}
    csv.field_size_limit(1 << 24)
    try:
        rows = list(csv.DictReader(io.StringIO(text), **quoting))
    except csv.Error as error:
        raise ValueError(f"table {path} cannot be read: {error}; a quote may be open") from error
    if long := next((i for i, row in enumerate(rows, 1) if None in row), 0):
        raise ValueError(f"table {path}: row {long} has more cells than columns; put captions with commas into quotes")
    names = [c for c in head.strip().split("\t" if tab else ",")]
    for c in columns:
        if not rows or c not in rows[0]:
            raise ValueError(f"table {path} has no column {c!r}; its columns are {', '.join(names)}")
    return [tuple((row[c] or "").strip() for c in columns) for row in rows]


def run(cfg: Config) -> dict:
    captions: dict[str, list[str]] = {}
    for image, text in read_table(cfg.table, cfg.image_column, cfg.caption_column):
        captions.setdefault(image, []).extend([text] if text else [])
    files = Files(cfg.images)
    find = lookup(files.names)

    def make(image):
        if not captions[image]:
            raise BadSample(f"{image} has no caption", "without caption")
        ext, blob = checked_image(files.read(find(image)), image, cfg.max_side)
        return Path(image).stem, ext, blob, {"captions": captions[image], "source": image}

    splits = shuffled_splits(sorted(captions), {"train": -1, "val": cfg.val, "test": cfg.test}, cfg.seed)
    manifest = prepare(cfg.out, splits, make, identity=repr([captions, settings(cfg)]),
                       source=Path(cfg.table).name, licence=cfg.licence)  # fmt: skip
    summary(cfg.out, manifest)
    return manifest


if __name__ == "__main__":
    cli.main(run, Config)
