"""Reads the one on-disk format: tar shards in the WebDataset convention plus manifest.json (data_prep/ writes it).

    name-000000.tar     KEY.jpg|png|webp + KEY.json {"captions": [..], "label": 3, ...}      (KEY.txt, KEY.cls are read too)
    manifest.json       source, licence, counts and sha256 of every shard, class names

A source is anything with `sizes` (samples in each shard) and `read(shard, row) -> dict`; Shards and Folder are sources, a
list in memory becomes one in three lines. `Order` turns a position in the endless stream of epochs into (shard, row), as
a pure function of the seed. So a batch is a function of the step: resuming at step s needs no replay, several processes
cut the same global batch into parts, and augmentation seeded by the position is the same for any number of workers.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import sys
import tarfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "MPO")  # and not EPS, which would start a PostScript interpreter
MAX_PIXELS = 89_478_485  # 8,192 x 10,923: refuse decompression bombs
_LOCK = threading.Lock()  # around the little that the decoding threads share: the indices of shards and the order


class BadSample(ValueError):
    """A damaged member: skipped and counted by kind, never fatal by itself."""

    def __init__(self, text: str, kind: str = "damaged"):
        super().__init__(text)
        self.kind = kind


def decode_image(data: bytes, name: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Bytes -> RGB. Grey, palette, CMYK and 16-bit become RGB, transparency lies on white. BadSample if damaged or huge."""
    try:
        img = Image.open(io.BytesIO(data), formats=FORMATS)
        if img.width * img.height > max_pixels:
            raise BadSample(f"{name}: {img.width} x {img.height} pixels exceed the bound of {max_pixels}")
        img.load()
        if img.mode.startswith("I"):  # 16 bit: convert() would clip instead of scale
            img = Image.fromarray((np.asarray(img).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
        if img.mode in ("RGBA", "LA", "PA") or "transparency" in img.info:
            img = img.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", img.size, "white"), img).convert("RGB")
        return img if img.mode == "RGB" else img.convert("RGB")
    except BadSample:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        raise BadSample(f"{name}: not a readable image ({type(error).__name__}: {error})") from error


# Sources ------------------------------------------------------------------------------------------------------------


class Shards:
    """Tar shards of a folder. Members are indexed when a shard is first touched, and only the last `keep` indices are
    held, so memory does not grow with the number of shards. split: "" for all, or the manifest's "train", "val", ..."""

    def __init__(self, folder, split: str = "", keep: int = 16):
        self.folder, self.keep = Path(folder), keep
        if not self.folder.is_dir():
            raise ValueError(f"data folder {folder} does not exist; make one with a script of data_prep/")
        self.manifest = self._read_manifest()
        names = [s["name"] for s in self.manifest.get("shards", [])] or sorted(p.name for p in self.folder.glob("*.tar"))
        names = [n for n in names if not split or n.startswith(f"{split}-")]
        if not names:
            what = f"shards of split {split!r}" if split else "*.tar shards"
            raise ValueError(f"{folder} holds no {what}; write them with a script of data_prep/")
        self.names, self.open = names, {}
        counts = {s["name"]: s["count"] for s in self.manifest.get("shards", [])}
        self.sizes = [counts[n] if n in counts else len(self._index(i)[1]) for i, n in enumerate(names)]
        empty = [n for n, size in zip(names, self.sizes) if not size and n not in counts]
        if empty or not sum(self.sizes):
            raise ValueError(f"{self.folder / (empty or names)[0]} holds no samples; delete it or prepare the data again")

    def _read_manifest(self) -> dict:
        path = self.folder / "manifest.json"
        if not path.exists():
            return {}
        try:
            manifest = json.loads(path.read_text("utf-8"))
            for s in manifest.get("shards", []):
                s["name"] = Path(s["name"]).name  # of this folder
                (self.folder / s["name"]).stat()
                if not 0 <= s["count"] <= 10_000_000:
                    raise ValueError(f"{s['name']} cannot hold {s['count']} samples")
            finished = manifest.get("complete", True)
        except FileNotFoundError as error:
            raise ValueError(f"{path} lists {Path(error.filename).name}, which is not there; prepare the data again") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}); prepare the data again") from error
        if not finished:  # later the order of samples would be another one
            raise ValueError(f"{path} says that the preparation was not finished; start it again, it goes on where it was")
        return manifest

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def classes(self) -> list[str]:
        return self.manifest.get("classes", [])

    def captions(self) -> list[str]:
        """All captions, without decoding a picture: what a tokenizer is trained on."""
        return [c for r in records(self) for c in r.get("captions", [])]

    def _index(self, shard: int):
        """(open file, [(key, {extension: (offset, size)})]) of one shard."""
        with _LOCK:
            if shard not in self.open:
                if len(self.open) >= self.keep:
                    self.open.pop(next(iter(self.open)))  # its file closes when the last thread lets go of it
                self.open[shard] = (open(self.folder / self.names[shard], "rb"), self._members(shard))  # noqa: SIM115
            return self.open[shard]

    def _members(self, shard: int):
        path, samples = self.folder / self.names[shard], {}
        try:
            with tarfile.open(path, "r:") as tar:
                for m in tar:
                    if m.size < 0:
                        raise tarfile.TarError("a member has a negative size")
                    stem, dot, ext = m.name.rpartition("/")[2].partition(".")
                    if m.isfile() and dot:
                        key = m.name[: len(m.name) - len(ext) - 1]
                        samples.setdefault(key, {})[ext.lower()] = (m.offset_data, m.size)
        except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
            if not samples:  # a shard cut short still gives its whole members
                raise ValueError(f"{path} is not a tar file ({error}); prepare the data again") from error
        return sorted(samples.items())

    def _member(self, shard: int, row: int, wanted) -> tuple[str, bytes] | None:
        """(extension, bytes) of the first member whose extension is wanted."""
        file, samples = self._index(shard)
        if row >= len(samples):
            raise BadSample(f"{self.names[shard]}: sample {row} is missing, the shard was cut short")
        key, members = samples[row]
        ext = next((e for e in members if f".{e}" in wanted), None)
        if ext is None:
            return None
        offset, size = members[ext]
        whole = offset + size <= os.fstat(file.fileno()).st_size  # or a header that lies would ask for all memory
        blob = os.pread(file.fileno(), size, offset) if whole else b""  # no file position that threads could move
        if len(blob) != size:
            raise BadSample(f"{self.names[shard]}:{key}.{ext} is cut short")
        return ext, blob

    def record(self, shard: int, row: int) -> dict:
        """The fields of KEY.json, KEY.txt and KEY.cls, and the key; BadSample if damaged."""
        parts = {ext: self._member(shard, row, (ext,)) for ext in (".json", ".txt", ".cls")}
        key = self._index(shard)[1][row][0]
        out = {"key": key}
        try:
            if parts[".json"]:
                fields = json.loads(parts[".json"][1])
                if not isinstance(fields, dict):
                    raise BadSample(f"{self.names[shard]}:{key}.json is not an object")
                out = {**fields, "key": key}
            if parts[".txt"]:
                out["captions"] = [parts[".txt"][1].decode("utf-8").strip()]
            if parts[".cls"]:
                out["label"] = int(parts[".cls"][1])
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            raise BadSample(f"{self.names[shard]}:{key}: unreadable record ({error})") from error
        if "caption" in out and "captions" not in out:
            out["captions"] = [out["caption"]]
        texts, label = out.get("captions", []), out.get("label", 0)
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts) or not isinstance(label, int):
            raise BadSample(f"{self.names[shard]}:{key}: captions must be a list of texts, a label a whole number")
        return out

    def read(self, shard: int, row: int) -> dict:
        """The record with its picture as "image" (RGB); BadSample if damaged."""
        out = self.record(shard, row)
        where = f"{self.names[shard]}:{out['key']}"
        found = self._member(shard, row, IMAGE_TYPES)
        if found is None:
            raise BadSample(f"{where} has no image")
        out["image"] = decode_image(found[1], where)
        return out


class Folder:
    """Images below a folder; class directories give labels. Same interface as Shards."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.files = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in IMAGE_TYPES and p.is_file())
        if not self.files:
            raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_TYPES)})")
        self.classes = sorted({p.parent.relative_to(self.folder).as_posix() for p in self.files} - {"."})
        self.sizes = [len(self.files)]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, shard: int, row: int) -> dict:
        path = self.files[row]
        out = {"key": path.relative_to(self.folder).as_posix(), "image": decode_image(path.read_bytes(), str(path))}
        parent = path.parent.relative_to(self.folder).as_posix()
        return out if parent == "." else {**out, "label": self.classes.index(parent)}


class Table:
    """Rows in memory: fields of equal length (tensors, arrays, lists). Same interface as Shards."""

    def __init__(self, **fields):
        self.fields, self.sizes = fields, [len(next(iter(fields.values())))]

    def read(self, shard: int, row: int) -> dict:
        return {k: v[row] for k, v in self.fields.items()}


class Subset:
    """Some rows of a source, in the source's order, whose number each sample then carries as "row". Shards stay shards, so that
    an Order opens few of them at once."""

    def __init__(self, source, rows):
        ends = np.cumsum(source.sizes)
        self.source, self.rows, self.first = source, np.sort(rows), ends - source.sizes
        self.sizes = np.bincount(np.searchsorted(ends, self.rows, side="right"), minlength=len(ends)).tolist()
        self.starts = np.cumsum(self.sizes) - self.sizes

    def read(self, shard: int, row: int) -> dict:
        row = int(self.rows[self.starts[shard] + row])
        return {**self.source.read(shard, row - int(self.first[shard])), "row": row}


def records(source) -> list[dict]:
    """The record of every sample without its picture, by row; {"key": ""} for a damaged one."""
    out = []
    for shard, size in enumerate(source.sizes):
        for row in range(size):
            try:
                out.append(source.record(shard, row))
            except BadSample:
                out.append({"key": ""})
    return out


def text_id(name: str) -> int:
    """63 bits that stand for a key or a class name beside its precomputed embedding."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


class Latents:
    """Posteriors of an autoencoder, written by data_prep/cache_latents.py: mean, logvar (z, h, w) float32, controls (7,), a
    label and captions of each view. Read by memory map, the last `keep` files held open. vae: the fingerprint of the
    autoencoder in use; ValueError if another one made the cache."""

    def __init__(self, folder, split: str, vae: str, keep: int = 16):
        self.folder, self.keep = Path(folder), keep
        path = self.folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text("utf-8"))
            made_by, self.classes, self.size = manifest["vae"], manifest["classes"], manifest["size"]
            shards = [s for s in manifest["shards"] if s["split"] == split]
            self.sizes, self.names = [int(s["count"]) for s in shards], [Path(s["name"]).name for s in shards]
        except FileNotFoundError as error:
            raise ValueError(f"{path} does not exist; make a latent cache with data_prep/cache_latents.py") from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} is not the manifest of a latent cache; use data_prep/cache_latents.py") from error
        if made_by != vae:
            raise ValueError(f"{folder} was encoded by another autoencoder ({made_by}, this one is {vae}); pass that --vae, or "
                             "encode again with data_prep/cache_latents.py")  # fmt: skip
        if not sum(self.sizes):
            raise ValueError(f"{folder} holds no split {split!r}")
        self.open = {}

    def __len__(self) -> int:
        return sum(self.sizes)

    def _shard(self, shard: int):
        with _LOCK:
            if shard not in self.open:
                path = self.folder / self.names[shard]
                try:
                    f = safe_open(path, "pt")
                    captions = json.loads(f.metadata()["meta"])["captions"]
                except Exception as error:
                    raise ValueError(f"{path} is not a shard of latents ({type(error).__name__}); encode again") from error
                if len(self.open) >= self.keep:
                    self.open.pop(next(iter(self.open)))
                self.open[shard] = f, captions
            return self.open[shard]

    def read(self, shard: int, row: int) -> dict:
        f, captions = self._shard(shard)
        out, label = {k: f.get_slice(k)[row].float() for k in ("mean", "logvar", "controls")}, int(f.get_slice("label")[row])
        if label >= max(1, len(self.classes)):
            raise ValueError(f"{self.folder}, {self.names[shard]}: label {label} is outside {len(self.classes)} "
                             "classes; encode again with data_prep/cache_latents.py")  # fmt: skip
        return {**out, "label": label, "captions": captions[row]}


def read_text(path) -> str:
    """A file of UTF-8, plain or .gz; one sentence for anything else."""
    try:
        raw = Path(path).read_bytes()
        return (gzip.decompress(raw) if str(path).endswith(".gz") else raw).decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"table {path} does not exist") from None
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise ValueError(f"table {path} is not UTF-8 text ({type(error).__name__})") from error


def read_rows(path, needed=()) -> list[dict[str, str]]:
    """Rows of a csv or tsv (or .gz) that has these columns, in each row; one sentence for anything else."""
    text = read_text(path)
    tabs = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if str(path).removesuffix(".gz").endswith(".tsv") else {}
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), **tabs))
    except csv.Error as error:
        raise ValueError(f"{path} is not a table ({error})") from error
    if any(None in r for r in rows):
        raise ValueError(f"{path} has a row with more cells than columns; put cells with commas into quotes")
    missing = [c for c in needed if not rows or any(r.get(c) is None for r in rows)]
    if missing:
        raise ValueError(f"{path} needs the columns {', '.join(needed)}; {missing[0]} is missing, or there are no rows")
    return rows


# Order and batches --------------------------------------------------------------------------------------------------


def whole_batches(total: int, batch: int) -> int:
    """Samples of an epoch."""
    return total // batch * batch or total


class Order:
    """position -> (shard, row). An epoch visits samples once: shards in a random order, rows shuffled within windows of
    `window` shards, so that reading stays local and memory small. It ends with its last whole batch, so that no batch holds a
    sample twice, its own negative, unless there are fewer samples than a batch. A pure function of (seed, position)."""

    def __init__(self, sizes: list[int], seed: int, window: int = 8, batch: int = 1):
        self.sizes, self.seed, self.window = np.asarray(sizes), seed, window
        self.length = whole_batches(int(self.sizes.sum()), batch)
        self.epoch = self.block = None

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, p = divmod(position, self.length)
        if epoch != self.epoch:
            self.shards = np.random.default_rng((self.seed, epoch)).permutation(len(self.sizes))
            self.ends, self.epoch, self.block = np.cumsum(self.sizes[self.shards]), epoch, None
        block = int(np.searchsorted(self.ends, p, side="right")) // self.window
        first = int(self.ends[block * self.window - 1]) if block else 0
        if block != self.block:
            shards = self.shards[block * self.window : (block + 1) * self.window]
            rows = np.concatenate([np.stack([np.full(self.sizes[s], s), np.arange(self.sizes[s])], 1) for s in shards])
            self.rows = np.random.default_rng((self.seed, epoch, block)).permutation(rows)
            self.block = block
        shard, row = self.rows[p - first]
        return int(shard), int(row)


class _Stream(torch.utils.data.Dataset):
    """position -> make(sample, rng), with damaged samples replaced by the next good ones at the same place of later batches.

    Photographs are read by `threads` threads, since Pillow decodes and resizes without the interpreter's lock; for tiny
    pictures the threads would only fight for it."""

    def __init__(self, source, make, seed: int, batch: int, threads: int):
        self.source, self.make, self.seed, self.batch, self.threads, self.pool = source, make, seed, batch, threads, None
        self.order, self.large = Order(source.sizes, seed, batch=batch), False

    def __getitems__(self, positions):
        first, rest = self[positions[0]], positions[1:]
        if self.threads == 1 or not self.large:
            return [first, *map(self.__getitem__, rest)]
        self.pool = self.pool or ThreadPoolExecutor(self.threads)
        return [first, *self.pool.map(self.__getitem__, rest)]

    def __getitem__(self, position: int):
        problems = []
        for p in range(position, position + 100 * self.batch, self.batch):
            try:
                with _LOCK:
                    place = self.order(p)
                sample = self.source.read(*place)
                self.large = "image" in sample and min(sample["image"].size) > 128
                return self.make(sample, np.random.default_rng((self.seed, 1, position))), problems
            except BadSample as error:
                problems.append(str(error))
        raise ValueError(f"100 samples in a row are damaged, the last: {problems[-1]}")


class Batches:
    """Iterator of this process's part of global batches, from step `start` on, endless.

    make(sample, rng) -> anything; collate(list) -> batch. `bad` counts skipped samples; when they exceed the share
    `max_bad` of those seen (of 1,000 at least), ValueError names the first."""

    def __init__(self, source, make, collate, batch_size, env, seed=0, start=0, workers=0, max_bad=0.01):
        local = env.share(batch_size)
        self.local, self.max_bad, self.seen, self.bad, self.first_bad = local, max_bad, 0, 0, ""
        stream = _Stream(source, make, seed, batch_size, threads=1 if workers else min(4, os.cpu_count()))
        first = (step * batch_size + env.rank * local for step in itertools.count(start))
        self.loader = iter(torch.utils.data.DataLoader(
            stream, batch_sampler=(range(p, p + local) for p in first), num_workers=workers,
            collate_fn=lambda items: (collate([made for made, _ in items]), [text for _, texts in items for text in texts]),
            pin_memory=torch.cuda.is_available(), multiprocessing_context="fork" if workers else None,
        ))  # fmt: skip

    def __iter__(self):
        return self

    def __next__(self):
        batch, problems = next(self.loader)
        self.seen += self.local
        self.bad += len(problems)
        self.first_bad = self.first_bad or (problems[0] if problems else "")
        if self.bad > self.max_bad * max(self.seen, 1000):
            raise ValueError(f"{self.bad} of {self.seen} samples are damaged, more than --max_bad {self.max_bad}; "
                             f"the first: {self.first_bad}")  # fmt: skip
        return batch


# Pictures for augmentation on the device: whole ones, squeezed to a square, with their real sides --------------------------


def squeezed(size: int):
    """make(sample, rng) for Batches and in_order: the whole picture as a size x size square with its real sides, its label and
    row. Crops are drawn in shares of the sides and cut on the device (augment.view), where the square is stretched back."""

    def make(sample, rng=None):
        img = sample["image"]
        square = np.asarray(img if img.size == (size, size) else img.resize((size, size), Image.BICUBIC))
        return {"image": square, "side": (img.height, img.width), "label": sample.get("label", -1), "row": sample["row"]}

    return make


def stack(items: list[dict]) -> dict[str, torch.Tensor]:
    """collate for squeezed: images (B, 3, S, S) uint8, side (B, 2), label (B,), row (B,)."""
    if not items:
        return {}
    out = {k: torch.from_numpy(np.stack([np.asarray(x[k]) for x in items])) for k in items[0]}
    return {**out, "image": out["image"].permute(0, 3, 1, 2).contiguous()}


def held_out(folder, prefer=("val", "test")) -> str:
    """The split to evaluate on: the first of `prefer` that was prepared."""
    there = {n.split("-")[0] for n in Shards(folder).names}
    for name in prefer:
        if name in there:
            return name
    raise ValueError(f"{folder} has no split val or test to evaluate on; prepare one")


def open_labelled(folder, count: int, seed: int, tested: bool = True, all_of_them: bool = True):
    """-> training source, test source (split val or test; None if not tested), records and classes of the training samples, and
    the rows of the first `count` samples of every class (0: all). Classes are [] where nothing has a label. ValueError for
    labels outside the classes, missing ones (all_of_them=False: allowed in training), and a class without training sample."""
    train, test = Shards(folder, "train"), Shards(folder, held_out(folder)) if tested else None
    found = records(train)
    labels = [r.get("label", -1) for r in found]
    labelled, C = max(labels) >= 0, len(train.classes)
    classes = train.classes if labelled else []
    some = [r for r in found if all_of_them or r.get("label", -1) != -1]
    for r in (*some, *(records(test) if labelled and tested else ())):
        if labelled and r["key"] and not 0 <= r.get("label", -1) < C:
            raise ValueError(f"{folder}: {r['key']} has the label {r.get('label')}; labels must be 0 to {C - 1}, one for every "
                             "sample: prepare the data again")  # fmt: skip
    if absent := sorted(set(range(len(classes))) - set(labels)):
        raise ValueError(f"{folder}: no training sample has the class {classes[absent[0]]!r}; prepare the data without it")
    return train, test, found, classes, pick(labels, count, seed)


def pick(labels, count: int, seed: int) -> np.ndarray:
    """Rows of `count` samples of every class, the same for every process and machine; all rows for count 0."""
    if not count:
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    labels = np.asarray(labels)[order]
    rows = [order[labels == c][:count] for c in np.unique(labels[labels >= 0])]
    if not rows:
        raise ValueError(f"{count} samples a class are asked for, and the data have no labels")
    if min(map(len, rows)) < count:
        raise ValueError(f"{count} samples a class are asked for, and a class has only {min(map(len, rows))}")
    return np.sort(np.concatenate(rows))


def load(source, rows, size: int, env, gb: float, workers: int = 0, max_bad: float = 0.01):
    """Rows of Shards as tensors on the device, {image, side, label, row}, if they take less than gb; else a Subset."""
    subset = Subset(source, rows)
    if len(rows) * 3 * size * size > gb * 2**30:
        return subset
    held, count = {}, 0
    for part in parts_of(subset, size, workers=workers):
        held = held or {k: v.new_empty(len(rows), *v.shape[1:]) for k, v in part.items()}
        for k, v in part.items():
            held[k][count : count + len(v)] = v
        count += len(part["row"])
    report_damaged(subset, held["row"][:count] if held else (), max_bad, env)
    return {k: v[:count].to(env.device) for k, v in held.items()}


def report_damaged(subset: Subset, read, max_bad: float, env):
    """After a pass over a Subset in which the rows `read` could be read: the others are said, too many a ValueError."""
    lost = np.setdiff1d(subset.rows, read)
    what = f"{subset.source.folder}: {len(lost)} of {len(subset.rows)} pictures are damaged"
    if len(lost) > max_bad * max(len(subset.rows), 1000) or len(lost) == len(subset.rows):
        raise ValueError(f"{what}, more than --max_bad {max_bad}; prepare them again")
    if len(lost) and env.is_main:
        print(f"{what} and left out, sample {lost[0]} first", file=sys.stderr)


def parts_of(pictures, size: int, rank: int = 0, world: int = 1, workers: int = 0):
    """One pass over what load() gave, over one process's share: dicts of tensors, damaged pictures left out."""
    if isinstance(pictures, dict):
        for i in filter(len, torch.arange(len(pictures["label"]))[rank::world].split(256)):
            yield {k: v[i.to(v.device)] for k, v in pictures.items()}
    else:
        yield from filter(None, in_order(pictures, squeezed(size), stack, 256, slice(rank, None, world), workers))


def endless(pictures, size: int, batch_size: int, env, seed=0, start=0, workers=0, max_bad=0.01):
    """Batches of what load() gave, from step `start` on: dicts of this process's part of the global batches."""
    if isinstance(pictures, dict):
        return InMemory(pictures, batch_size, env, seed, start)
    return Batches(pictures, squeezed(size), stack, batch_size, env, seed, start, workers, max_bad)


class InMemory:
    """Batches for a set that fits into the device's memory: fields of equal length (tensors) -> dict of their rows, endless.
    Each epoch is the whole batches of a new permutation, a pure function of (seed, epoch)."""

    def __init__(self, fields: dict[str, torch.Tensor], batch_size, env, seed=0, start=0):
        self.fields, self.seed, self.epoch, self.order, self.bad = fields, seed, None, None, 0
        self.total, self.device = len(next(iter(fields.values()))), next(iter(fields.values())).device
        self.local, self.length = env.share(batch_size), whole_batches(self.total, batch_size)
        self.first, self.stride = start * batch_size + env.rank * self.local, batch_size

    def __iter__(self):
        return self

    def __next__(self):
        parts, place, end = [], self.first, self.first + self.local
        while place < end:  # a set smaller than a batch: several epochs in one
            epoch, at = divmod(place, self.length)
            if epoch != self.epoch:  # the order lies on the device: rows sent there at each step would be waited for
                order = np.random.default_rng((self.seed, epoch)).permutation(self.total)
                self.epoch, self.order = epoch, torch.from_numpy(order).to(self.device)
            parts.append(self.order[at : min(at + end - place, self.length)])
            place += len(parts[-1])
        self.first, rows = self.first + self.stride, torch.cat(parts)
        return {k: v[rows] for k, v in self.fields.items()}


def in_order(source, make, collate, batch_size: int, part: slice = slice(None), workers: int = 0):
    """One pass without shuffling over the rows of `part`, for evaluation; damaged samples are left out."""

    def read(places):
        made = []
        for place in places:
            with contextlib.suppress(BadSample):
                made.append(make(source.read(*place)))
        return collate(made)

    places = [(s, r) for s, size in enumerate(source.sizes) for r in range(size)][part]
    context = "fork" if workers else None
    return torch.utils.data.DataLoader(
        places, batch_size, num_workers=workers, collate_fn=read, multiprocessing_context=context
    )
