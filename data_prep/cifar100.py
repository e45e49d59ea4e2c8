"""CIFAR-100 (or CIFAR-10) to labelled shards: the official python archive, or zips of one image mosaic a class.

python data_prep/cifar100.py --archive cifar-100-python.tar.gz --out data/cifar100
python data_prep/cifar100.py --train_zip cifar100/train.zip --test_zip cifar100/test.zip --labels cifar100/labels.json \\
    --prompts clip/class_prompts.json:CIFAR100 --out data/cifar100
python data_prep/cifar100.py ... --superclasses --members 0,1,2 --out data/public      (and 3,4 as data/private, see dp_rdm)

The archive's batches are pickles: they are read by an unpickler that admits arrays, numbers and strings only. A mosaic
is CLASS.webp (or .png) with 25 tiles of 32 x 32 a row. labels.json: {"fine", "coarse", "fine_to_coarse"} or {"classes"}.
Learning Multiple Layers of Features from Tiny Images, A. Krizhevsky, 2009; no licence stated, the authors ask for a citation.
"""

import codecs
import io
import json
import lzma
import pickle
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy as np

from common import cli
from data_prep._write import Files, Image, decode_image, png, prepare, settings, summary
from data_prep.imagenet import read_prompts


@dataclass(frozen=True)
class Config:
    out: str  # folder to write
    archive: str = ""  # the official cifar-100-python.tar.gz or cifar-10-python.tar.gz
    train_zip: str = ""  # mosaics of the training images
    test_zip: str = ""  # mosaics of the test images
    labels: str = ""  # class names of the mosaics
    prompts: str = ""  # file.json:KEY with a list "templates" under KEY
    superclasses: bool = False  # labels are CIFAR-100's 20 superclasses
    members: str = ""  # of each superclass only these of its five classes, 0,1,2 for the first three; "" = all


def _array(*args):
    """Stands for numpy's _reconstruct: always an empty byte array, which the pickle then fills."""
    return np.ndarray((0,), np.uint8)


def _dtype(kind, *args):
    if kind not in ("u1", "|u1", b"u1"):
        raise pickle.UnpicklingError(f"a CIFAR batch holds bytes, not numpy's {kind}")
    return np.dtype(np.uint8)


class ArraysOnly(pickle.Unpickler):
    """Numbers, texts and byte arrays. Every other global is refused, and numpy's own constructors are replaced: with a
    free choice of dtype and buffer they could be made to follow a forged pointer."""

    ALLOWED = {("numpy.core.multiarray", "_reconstruct"): _array, ("numpy._core.multiarray", "_reconstruct"): _array,
               ("numpy", "ndarray"): object, ("numpy", "dtype"): _dtype, ("_codecs", "encode"): codecs.encode}  # fmt: skip

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a CIFAR batch")
        return self.ALLOWED[module, name]


def unpickle(data: bytes, what: str) -> dict:
    try:
        return ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"{what} is not a CIFAR batch: {type(error).__name__}: {error}") from error


def from_archive(path):
    """-> {split: (images (N, 32, 32, 3), fine, coarse or None)}, fine names, coarse names"""
    files = {}
    try:
        with tarfile.open(path) as tar:
            for m in tar:
                if m.isfile():
                    files[m.name.rpartition("/")[2]] = tar.extractfile(m).read()
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, RecursionError) as error:
        raise ValueError(f"--archive {path} is not a tar archive: {str(error).partition(chr(10))[0]}") from error
    fine = "train" in files
    train = ["train"] if fine else [f"data_batch_{i}" for i in range(1, 6)]
    plan = {"train": train, "test": ["test" if fine else "test_batch"]}
    meta = "meta" if fine else "batches.meta"
    missing = [n for names in plan.values() for n in names if n not in files] + [meta] * (meta not in files)
    if missing:
        raise ValueError(f"--archive {path} lacks {', '.join(missing)}; expected the official python version")
    out = {}
    for split, names in plan.items():
        batches = [unpickle(files[n], f"{path}:{n}") for n in names]
        x = np.concatenate([b[b"data"] for b in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        y = [v for b in batches for v in b[b"fine_labels" if fine else b"labels"]]
        out[split] = (x, y, [v for b in batches for v in b[b"coarse_labels"]] if fine else None)
    names = unpickle(files[meta], f"{path}:{meta}")
    keys = (b"fine_label_names" if fine else b"label_names", b"coarse_label_names")
    return out, *[[w.decode() for w in names.get(k, [])] for k in keys]


def from_mosaics(cfg):
    try:
        labels = json.loads(Path(cfg.labels).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--labels {cfg.labels} cannot be read: {error}") from error
    names, coarse, out = labels.get("fine") or labels.get("classes"), labels.get("coarse", []), {}
    for split, path in (("train", cfg.train_zip), ("test", cfg.test_zip)):
        files, xs, ys = Files(path), [], []
        stems = {Path(n).stem: n for n in files.names}
        for i, name in enumerate(names):
            if name not in stems:
                raise ValueError(f"{path} holds no mosaic of class {name}")
            m = np.asarray(decode_image(files.read(stems[name]), stems[name]))
            if m.shape[0] % 32 or m.shape[1] != 800:
                raise ValueError(f"{path}:{stems[name]} is {m.shape[1]} x {m.shape[0]} pixels, not 25 tiles of 32 a row")
            xs.append(m.reshape(-1, 32, 25, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3))
            ys += [i] * len(xs[-1])
        to_coarse = labels.get("fine_to_coarse")
        out[split] = (np.concatenate(xs), ys, [to_coarse[y] for y in ys] if to_coarse else None)
    return out, names, coarse


def of_superclasses(sets, members: str):
    """Samples of the classes at these places of their superclasses, counted anew -> sets, and the fine labels that are left."""
    try:
        places = {int(m) for m in members.split(",")} if members else None
    except ValueError:
        raise ValueError(f"--members {members} must be a comma list of places, 0 for a superclass's first class") from None
    out, within = {}, {}
    for y, c in sorted(set(zip(sets["train"][1], sets["train"][2]))):
        within.setdefault(c, []).append(y)
    for split, (x, ys, cs) in sets.items():
        rows = [i for i, (y, c) in enumerate(zip(ys, cs)) if places is None or within[c].index(y) in places]
        if not rows:
            raise ValueError(f"--members {members}: no class is there; superclasses have {max(map(len, within.values()))} each")
        out[split] = x[rows], [ys[i] for i in rows], [cs[i] for i in rows]
    left = sorted(set(out["train"][1]))
    return {split: (x, [left.index(y) for y in ys], cs) for split, (x, ys, cs) in out.items()}, left


def run(cfg: Config) -> dict:
    if not cfg.archive and not (cfg.train_zip and cfg.test_zip and cfg.labels):
        raise ValueError("give --archive, or --train_zip, --test_zip and --labels")
    try:
        sets, fine, coarse = from_archive(cfg.archive) if cfg.archive else from_mosaics(cfg)
        for x, y, c in sets.values():
            if x.dtype != np.uint8 or len(x) != len(y) or not all(0 <= v < len(fine) for v in y) or (c and len(c) != len(y)):
                raise ValueError("images and labels do not fit each other")
        if cfg.superclasses or cfg.members:
            if not coarse:
                raise ValueError("--superclasses and --members are of CIFAR-100; these labels have no superclasses")
            sets, left = of_superclasses(sets, cfg.members)
            fine = [fine[i] for i in left]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, ValueError) and str(error)[:1] in "-/.":  # it names its file already
            raise
        raise ValueError(f"{cfg.archive or cfg.labels} has not CIFAR's form ({type(error).__name__}: {error})") from error
    names = coarse if cfg.superclasses else fine

    def make(item):
        split, i = item
        x, y, c = sets[split]
        record = {"label": int((c if cfg.superclasses else y)[i]), **({"coarse": int(c[i])} if c else {})}
        return f"{split}_{i}", "png", png(Image.fromarray(np.ascontiguousarray(x[i]))), record

    # Rows of the mosaics come class by class; a fixed shuffle makes every shard a fair sample
    plan = {s: [(s, int(i)) for i in np.random.default_rng(0).permutation(len(v[0]))] for s, v in sets.items()}
    templates = read_prompts(cfg.prompts)["templates"] if cfg.prompts else []
    manifest = prepare(cfg.out, plan, make, per_shard=5000, identity=settings(cfg), source="CIFAR, A. Krizhevsky 2009",
                       licence="not stated; cite Krizhevsky 2009", classes=[n.replace("_", " ") for n in names],
                       coarse_classes=coarse, templates=templates)  # fmt: skip
    summary(cfg.out, manifest)
    return manifest


if __name__ == "__main__":
    cli.main(run, Config)
