"""COCO: captions and objects. Reads the official json files, or one file that carries captions and instances with each image.

A=annotations; python data_prep/coco.py --annotations $A/captions_train2017.json,$A/instances_train2017.json,\\
$A/captions_val2017.json,$A/instances_val2017.json --images train2017.zip,val2017.zip --out data/coco
python data_prep/coco.py --annotations coco_mini/annotations.json.gz --images coco_mini/images.zip --out data/coco_mini

A record holds the captions and the objects: class name, box (x0, y0, x1, y1) in stored pixels, iscrowd, segmentation
(polygons in stored pixels; run lengths of crowds as given). Annotations are CC BY 4.0 (COCO Consortium); every photograph
has a licence of its own, kept in its record.
"""

import gzip
import hashlib
import json
import math
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from common import cli
from data_prep._write import BadSample, Files, checked_image, decode_image, lookup, prepare, settings, summary


@dataclass(frozen=True)
class Config:
    annotations: str  # json or json.gz, several separated by commas
    images: str  # folder or zip file of images, several separated by commas
    out: str  # folder to write
    split: str = ""  # of official files; "" = train or val, as their names say; a combined file names that of each image
    max_side: int = 0  # larger images shrink to this many pixels, 0 = keep the original bytes


def read_json(path) -> dict:
    try:
        raw = Path(path).read_bytes()
        return json.loads(gzip.decompress(raw) if str(path).endswith(".gz") else raw)
    except FileNotFoundError:
        raise ValueError(f"annotations {path} do not exist") from None
    except (ValueError, OSError, EOFError, RecursionError, zlib.error) as error:
        raise ValueError(f"annotations {path} are not json: {error}") from error


def gather(paths, split) -> tuple[dict[str, dict], list[str]]:
    """-> file name -> {split, width, captions, instances, licence}, class names"""
    images, names = {}, {}
    for path in paths:
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("images"), list):
            raise ValueError(f"{path} is not a COCO file: it has no list 'images'")
        said = re.search("(?<![a-z])(train|val|test)", Path(path).name)
        names.update({c["id"]: c["name"] for c in content.get("categories", [])})
        by_id = {}
        for im in content["images"]:
            own = im.get("split") or split or (said[0] if said else "train")
            name = im.get("file_name") or f"{own}/{im['file']}"
            entry = images.setdefault(name, {"split": own, "width": im["width"], "captions": [], "instances": [],
                                             "licence": im.get("licence", im.get("license"))})  # fmt: skip
            entry["captions"] += im.get("captions") or []
            entry["instances"] += im.get("instances") or []
            by_id[im["id"]] = entry
        for a in content.get("annotations", []):
            entry = by_id.get(a["image_id"], {"captions": [], "instances": []})
            entry["captions"] += [a["caption"].strip()] if "caption" in a else []
            entry["instances"] += [a] if "category_id" in a else []
    if not images:
        raise ValueError(f"{', '.join(paths)}: no image is listed")
    classes = [names[i] for i in sorted(names)]
    for entry in images.values():
        for a in entry["instances"]:
            a["name"] = names.get(a["category_id"], str(a["category_id"]))
    return images, classes


def run(cfg: Config) -> dict:
    try:
        images, classes = gather(cfg.annotations.split(","), cfg.split)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{cfg.annotations} has not COCO's form: {type(error).__name__}: {error}") from error
    where = {n: files for files in map(Files, cfg.images.split(",")) for n in files.names}
    find = lookup(where)

    def make(name):
        entry, stored = images[name], find(name)
        ext, blob = checked_image(where[stored].read(stored), name, cfg.max_side)
        boxes = []
        try:
            scale = decode_image(blob, name).width / entry["width"]
            for a in entry["instances"]:
                x, y, w, h = (v * scale for v in a["bbox"])
                seg = a.get("segmentation")
                seg = [[round(v * scale, 2) for v in polygon] for polygon in seg] if isinstance(seg, list) else seg
                box = [round(v, 2) for v in (x, y, x + w, y + h)]
                if not all(map(math.isfinite, box)):
                    raise ValueError(f"box {box}")
                boxes.append({"label": a["name"], "box": box, "iscrowd": a.get("iscrowd", 0), "segmentation": seg})
        except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
            raise BadSample(f"{name}: annotation is not COCO's ({type(error).__name__}: {error})", "annotation") from error
        record = {"captions": entry["captions"], "boxes": boxes, "licence": entry["licence"], "source": name}
        return Path(name).stem, ext, blob, record

    splits: dict[str, list] = {}
    for name in sorted(images):
        splits.setdefault(images[name]["split"], []).append(name)
    tables = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in cfg.annotations.split(",")]
    manifest = prepare(cfg.out, splits, make, identity=repr([tables, settings(cfg)]), source="COCO 2017", classes=classes,
                       licence="annotations CC BY 4.0, COCO Consortium; photos: see each record")  # fmt: skip
    summary(cfg.out, manifest)
    return manifest


if __name__ == "__main__":
    cli.main(run, Config)
