"""What all data_prep scripts share: input from folders or zips, and the writer of shards and manifest.json.

`prepare` writes one shard after the other under temporary names and enters each in the manifest when it is whole, so an
interrupted preparation goes on and a finished one changes nothing. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.data import BadSample, decode_image
from common.log import write_json

MAX_BYTES = 256 << 20  # of one input file: refuse zip bombs


class Files:
    """A folder or a zip file as {relative name: bytes}: names, then read(name). Nothing is extracted."""

    def __init__(self, path):
        self.path, path = path, Path(path)
        if path.is_dir():
            self.names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
            self.read = lambda name: (path / name).read_bytes()
        elif not path.exists():
            raise ValueError(f"{path} does not exist; expected a folder or a zip file")
        else:
            try:
                archive = zipfile.ZipFile(path)
            except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
                raise ValueError(f"{path} is neither a folder nor a zip file") from error
            self.names = sorted(n for n in archive.namelist() if not n.endswith("/"))
            self.read = lambda name: self._member(archive, name)

    @staticmethod
    def _member(archive, name):
        if archive.getinfo(name).file_size > MAX_BYTES:
            raise BadSample(f"{name}: larger than {MAX_BYTES >> 20} MiB", "too large")
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, RuntimeError) as error:
            raise BadSample(f"{name}: damaged in the zip file ({error})") from error


def lookup(names):
    """-> find(name): the stored one of `names` that is it, else ends with it, else has its last part. BadSample if there is
    none, or if several fit equally well: a picture must not get the captions of another."""
    by_last: dict[str, list[str]] = {}
    for n in names:
        by_last.setdefault(n.rpartition("/")[2], []).append(n)

    def find(name):
        some = by_last.get(name.rpartition("/")[2], [])
        for fits in (lambda n: n == name, lambda n: n.endswith(f"/{name}")):
            some = [n for n in some if fits(n)] or some
        if len(some) != 1:
            problem = f"fits {some[0]} and {some[1]}" if some else "is not among the images"
            raise BadSample(f"{name} {problem}", "without image")
        return some[0]

    return find


def checked_image(data: bytes, name: str, max_side: int = 0, min_side: int = 1) -> tuple[str, bytes]:
    """(extension, bytes) ready for a shard: JPEG, PNG and WebP in RGB pass unchanged, all else becomes PNG; with max_side
    larger images shrink to a JPEG. BadSample if the image cannot be decoded or its shorter side is below min_side."""
    img = decode_image(data, name)
    if min(img.size) < min_side:
        raise BadSample(f"{name}: {img.width} x {img.height} pixels", "too small")
    try:
        with Image.open(io.BytesIO(data)) as head:
            kind, mode = head.format, head.mode
        if max_side and max(img.size) > max_side:
            img.thumbnail((max_side, max_side), Image.LANCZOS)
            out = io.BytesIO()
            clean(img).save(out, "JPEG", quality=90)
            return "jpg", out.getvalue()
        if kind in ("JPEG", "PNG", "WEBP") and mode == "RGB":
            return {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind], data
        return "png", png(img)
    except (OSError, ValueError, TypeError) as error:
        raise BadSample(f"{name}: cannot be written again ({error})") from error


def clean(img: Image.Image) -> Image.Image:
    """The pixels without comments, profiles and other baggage, some of which Pillow cannot write."""
    img.info = {}
    return img


def png(img: Image.Image) -> bytes:
    out = io.BytesIO()
    clean(img).save(out, "PNG")
    return out.getvalue()


def _member(tar, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # no time, no owner: the same data give the same bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def settings(cfg, free=("out",)) -> str:
    """What shapes the output: all fields but the `free` ones; of paths, and lists of them, the last part: files may move."""

    def moved(v):
        return [Path(part).name for part in v.split(",")] if isinstance(v, str) else v

    return repr([(k, moved(v)) for k, v in asdict(cfg).items() if k not in free])


def prepare(folder, splits: dict[str, list], make, per_shard: int = 1000, mapper=map, identity: str = "", **about) -> dict:
    """Writes shards and manifest.json; returns the manifest. Interrupted, it continues; done, it changes nothing.

    splits: name -> list of items; make(item) -> (key, image extension, image bytes, record), or BadSample (counted by kind);
    mapper: map, or a pool's that keeps the order; identity: the settings and tables that shape the output; about: source,
    licence, classes, ... kept in the manifest. ValueError if the folder holds data of other items, settings or classes."""
    if not str(folder):
        raise ValueError("--out is empty; name the folder to write")
    for name in splits:
        if not re.fullmatch(r"[A-Za-z0-9_]{1,40}", name):
            raise ValueError(f"split {str(name)[:40]!r} is not a plain name of letters, digits and _")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.json"
    identity = repr([identity, sorted(about.items()), per_shard, [(n, [str(i) for i in items]) for n, items in splits.items()]])
    manifest = {**about, "fingerprint": hashlib.sha256(identity.encode()).hexdigest(), "complete": False, "shards": []}
    todo = [(s, first) for s, items in splits.items() for first in range(0, len(items), per_shard)]
    names = [f"{split}-{first // per_shard:06d}.tar" for split, first in todo]
    if path.exists():
        try:
            old = json.loads(path.read_text("utf-8"))
            same = old["fingerprint"] == manifest["fingerprint"]
            there = [s for s in old["shards"] if (folder / s["name"]).exists()]
            finished = old["complete"] and len(there) == len(old["shards"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); choose another --out") from error
        if not same:
            raise ValueError(f"{folder} holds data prepared from other input or settings; choose another --out")
        if finished:
            return old
        manifest["shards"] = there
    elif foreign := [n for n in names if (folder / n).exists()]:
        raise ValueError(f"{folder} holds {foreign[0]} without a manifest.json; choose another --out")
    write_json(path, manifest)  # from here on these shards are ours
    done = {s["name"] for s in manifest["shards"]}
    bar = tqdm(total=sum(map(len, splits.values())), unit="image")
    for name, (split, first) in zip(names, todo):
        items = splits[split][first : first + per_shard]
        if name not in done:
            entry = _write_shard(folder, name, split, items, first, make, mapper, bar)
            enough = len(items) >= 100 or not any(s["count"] for s in manifest["shards"])  # a few dead links are no outage
            if enough and not entry["count"] and entry["bad"].keys() <= {"no connection", "timed out"}:
                (folder / name).unlink()
                raise ValueError(f"nothing of {name} could be fetched, started again it goes on: {entry['first_bad']}")
            manifest["shards"].append(entry)
            write_json(path, manifest)
        else:
            bar.update(len(items))
    bar.close()
    manifest["shards"].sort(key=lambda s: s["name"])
    manifest["counts"] = {n: sum(s["count"] for s in manifest["shards"] if s["split"] == n) for n in splits}
    manifest["bad"] = dict(sum((Counter(s["bad"]) for s in manifest["shards"]), Counter()))
    if not sum(manifest["counts"].values()):
        first_bad = next((s["first_bad"] for s in manifest["shards"]), "there is no item")
        for file in (path, *(folder / n for n in names)):  # once the input is mended, all of it is tried again
            file.unlink(missing_ok=True)
        raise ValueError(f"nothing could be prepared; the first problem: {first_bad}")
    manifest["complete"] = True
    write_json(path, manifest)
    return manifest


def _write_shard(folder, name, split, items, first, make, mapper, bar) -> dict:
    def attempt(item):
        try:
            return make(item)
        except BadSample as error:
            return error

    entry = {"name": name, "split": split, "count": 0, "bad": Counter(), "first_bad": ""}
    tmp = folder / f"{name}.tmp"
    with tarfile.open(tmp, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, made in enumerate(mapper(attempt, items)):
            bar.update()
            if isinstance(made, BadSample):
                entry["bad"][made.kind] += 1
                entry["first_bad"] = entry["first_bad"] or str(made)
                continue
            key, ext, blob, record = made
            key = f"{first + i:08d}_" + "".join(c if c.isascii() and c.isalnum() else "_" for c in key)[-60:]
            _member(tar, f"{key}.{ext}", blob)
            _member(tar, f"{key}.json", json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
            entry["count"] += 1
    raw = tmp.read_bytes()
    entry.update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    with open(tmp, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(tmp, folder / name)
    return entry


def summary(folder, manifest: dict) -> None:
    """What every data_prep script prints at its end."""
    size = sum(s["bytes"] for s in manifest["shards"]) / 2**20
    counts = ", ".join(f"{n} {split}" for split, n in manifest["counts"].items())
    print(f"{folder}: {counts}; {len(manifest['shards'])} shards, {size:.1f} MiB")
    if manifest["bad"]:
        bad = ", ".join(f"{n} {kind}" for kind, n in sorted(manifest["bad"].items()))
        print(f"left out: {bad}; the first: {next(s['first_bad'] for s in manifest['shards'] if s['first_bad'])}")
    print(f"licence: {manifest.get('licence', 'not stated')}")


def shuffled_splits(items: list, sizes: dict[str, int], seed: int = 0) -> dict[str, list]:
    """Fixed-seed split: sizes of all but the first split, which gets the rest. Each split keeps the sorted order."""
    if min([0, *(n for name, n in sizes.items() if name != next(iter(sizes)))]) < 0:
        raise ValueError("a split cannot have a negative number of items")
    order = np.random.default_rng(seed).permutation(len(items)).tolist()
    first, *others = sizes
    out, at = {}, 0
    for name in others:
        out[name] = [items[i] for i in sorted(order[at : at + sizes[name]])]
        at += sizes[name]
    if at >= len(items):
        raise ValueError(f"{len(items)} items cannot give splits of {', '.join(f'{sizes[n]} {n}' for n in others)} and a rest")
    return {first: [items[i] for i in sorted(order[at:])], **out}
