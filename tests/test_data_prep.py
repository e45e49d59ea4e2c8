"""data_prep/: each script on small input, twice, interrupted, damaged; downloads against a server that misbehaves."""

import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import socket
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from common import data
from data_prep import _write, captions, cc12m, cifar100, coco, imagenet, scenes, wordnet
from tests.helpers import inside, run, user_error
from tests.test_data import picture


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture
def pairs(tmp_path):
    """Five images of all kinds, one damaged, one missing, one without a caption."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as z:
        z.writestr("in/a.jpg", picture((200, 0, 0), (40, 20), kind="JPEG"))
        z.writestr("in/b.png", picture(90, mode="L"))
        z.writestr("in/c.jpg", b"")
        z.writestr("in/e.webp", picture((0, 9, 0), kind="WEBP"))
    rows = [("a.jpg", "a red box"), ("a.jpg", "one, box"), ("b.png", "grey"), ("c.jpg", "x"), ("d.jpg", "gone"), ("e.webp", "")]
    with open(tmp_path / "t.csv", "w", newline="") as f:
        csv.writer(f).writerows([("image", "caption"), *rows])
    return tmp_path


def test_captions(pairs):
    cfg = captions.Config(str(pairs / "t.csv"), str(pairs / "images.zip"), str(pairs / "out"), val=0, test=1)
    m = captions.run(cfg)
    assert sum(m["counts"].values()) == 2 and m["bad"] == {"damaged": 1, "without image": 1, "without caption": 1}
    splits = {s["split"] for s in m["shards"]}
    assert splits == {"train", "test"}
    records = [data.Shards(pairs / "out").read(s, r) for s in range(len(m["shards"])) for r in range(m["shards"][s]["count"])]
    by_key = {r["source"]: r for r in records}
    assert by_key["a.jpg"]["captions"] == ["a red box", "one, box"] and by_key["b.png"]["image"].mode == "RGB"
    before = digest(pairs / "out")
    captions.run(cfg)
    assert digest(pairs / "out") == before  # twice changes nothing
    with pytest.raises(ValueError, match="other input or settings.*--out"):
        captions.run(captions.Config(cfg.table, cfg.images, cfg.out, val=1, test=1))


def test_tsv_with_stray_quotes_and_other_columns(pairs):
    (pairs / "t.tsv").write_text('file\ttext\na.jpg\tthe "big box\nb.png\tgrey\n')
    rows = captions.read_table(pairs / "t.tsv", "file", "text")
    assert rows == [("a.jpg", 'the "big box'), ("b.png", "grey")]
    with pytest.raises(ValueError, match="no column 'caption'; its columns are file, text"):
        captions.read_table(pairs / "t.tsv", "file", "caption")
    (pairs / "bin.csv").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        captions.read_table(pairs / "bin.csv", "image")


def test_captions_command_line(pairs):
    base = ["--images", pairs / "images.zip", "--out", pairs / "o", "--val", 0, "--test", 1]
    done = run("data_prep/captions.py", *base, "--table", pairs / "t.csv")
    assert done.returncode == 0 and "licence:" in done.stdout and "left out: 1 damaged" in done.stdout
    user_error(inside(captions, *base, "--table", pairs / "none.csv"), "none.csv does not exist")
    user_error(
        inside(captions, *base, "--table", pairs / "t.csv", "--caption_column", "words"), "no column 'words'", "image, caption"
    )
    user_error(
        inside(captions, "--table", pairs / "t.csv", "--images", pairs / "nope", "--out", pairs / "o2"),
        "nope does not exist",
    )
    user_error(
        inside(captions, "--table", pairs / "t.csv", "--images", pairs / "t.csv", "--out", pairs / "o2"),
        "neither a folder nor a zip",
    )
    user_error(inside(captions, *base, "--table", pairs / "t.csv", "--test", 50), "cannot give splits")


def test_interrupted_preparation_continues_to_the_same_bytes(tmp_path):
    calls = []

    def make(i):
        calls.append(i)
        if i == 12 and len(calls) == 13:
            raise KeyboardInterrupt
        return f"k{i}", "png", picture((i, 0, 0)), {"label": i}

    plan = {"train": list(range(20))}
    with pytest.raises(KeyboardInterrupt):
        _write.prepare(tmp_path / "a", plan, make, per_shard=5)
    assert not json.loads((tmp_path / "a" / "manifest.json").read_text())["complete"]
    _write.prepare(tmp_path / "a", plan, make, per_shard=5)
    assert calls[13:] == list(range(10, 20))  # two whole shards were kept
    _write.prepare(tmp_path / "b", plan, make, per_shard=5)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    m = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert all(digest(tmp_path / "a")[s["name"]] == s["sha256"] for s in m["shards"])


def test_nothing_usable_is_an_error(tmp_path):
    def make(i):
        raise data.BadSample("broken", "damaged")

    with pytest.raises(ValueError, match="nothing could be prepared.*broken"):
        _write.prepare(tmp_path, {"train": [1, 2]}, make)


def test_checked_image():
    jpeg = picture((9, 9, 9), (50, 30), kind="JPEG")
    assert _write.checked_image(jpeg, "x") == ("jpg", jpeg)  # original bytes pass
    ext, blob = _write.checked_image(jpeg, "x", max_side=25)
    assert ext == "jpg" and Image.open(io.BytesIO(blob)).size == (25, 15)
    assert _write.checked_image(picture(0, mode="P"), "x")[0] == "png"
    with pytest.raises(data.BadSample, match="8 x 6"):
        _write.checked_image(picture(0, mode="L"), "x", min_side=16)


def test_scenes(tmp_path):
    m = scenes.run(scenes.Config(str(tmp_path), train=30, val=4, test=0, size=32))
    source = data.Shards(tmp_path, "train")
    sample = source.read(0, 3)
    assert m["counts"] == {"train": 30, "val": 4} and sample["image"].size == (32, 32)
    assert {b["label"] for b in sample["boxes"]} <= set(source.classes)  # objects: no spots, no scene
    assert len(sample["captions"]) == 5 and source.classes[sample["label"]]
    assert sample["captions"] != data.Shards(tmp_path, "val").read(0, 3)["captions"]


def test_coco_official_and_combined(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "1.jpg").write_bytes(picture((1, 2, 3), (50, 40), kind="JPEG"))
    image = {"id": 1, "file_name": "1.jpg", "width": 100, "height": 80, "license": 4}
    box = {
        "image_id": 1,
        "id": 5,
        "category_id": 7,
        "bbox": [10, 20, 30, 40],
        "area": 1200,
        "iscrowd": 0,
        "segmentation": [[10, 20, 40, 20, 40, 60]],
    }
    (tmp_path / "c.json").write_text(
        json.dumps({"images": [image], "annotations": [{"image_id": 1, "id": 1, "caption": " a cat\n"}]})
    )
    (tmp_path / "i.json").write_text(
        json.dumps({"images": [image], "annotations": [box], "categories": [{"id": 7, "name": "cat"}]})
    )
    coco.run(coco.Config(f"{tmp_path}/i.json", str(tmp_path / "img"), str(tmp_path / "alone")))
    with pytest.raises(ValueError, match="other input or settings"):  # not done because a folder is there
        coco.run(coco.Config(f"{tmp_path}/c.json,{tmp_path}/i.json", str(tmp_path / "img"), str(tmp_path / "alone")))
    m = coco.run(coco.Config(f"{tmp_path}/c.json,{tmp_path}/i.json", str(tmp_path / "img"), str(tmp_path / "o")))
    sample = data.Shards(tmp_path / "o").read(0, 0)
    assert m["classes"] == ["cat"] and sample["captions"] == ["a cat"]
    assert sample["boxes"][0]["box"] == [5, 10, 20, 30] and sample["boxes"][0]["segmentation"] == [[5, 10, 20, 10, 20, 30]]
    combined = {"images": [{"id": 1, "split": "val", "file": "1.jpg", "width": 100, "captions": ["a dog"], "instances": None}]}
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(json.dumps(combined).encode()))
    assert coco.run(coco.Config(f"{tmp_path}/x.json.gz", str(tmp_path / "img"), str(tmp_path / "o2")))["counts"] == {"val": 1}
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="not a COCO file"):
        coco.run(coco.Config(f"{tmp_path}/bad.json", str(tmp_path / "img"), str(tmp_path / "o3")))


def test_coco_mini(shared, tmp_path):
    m = coco.run(
        coco.Config(str(shared / "coco_mini/annotations.json.gz"), str(shared / "coco_mini/images.zip"), str(tmp_path))
    )
    assert m["counts"] == {"train": 50, "val": 104} and not m["bad"] and len(m["classes"]) == 80
    source = data.Shards(tmp_path)
    for s, size in enumerate(source.sizes):
        for r in range(size):
            sample = source.read(s, r)
            w, h = sample["image"].size
            assert len(sample["captions"]) == 5
            assert all(-1 <= b["box"][0] < b["box"][2] <= w + 1 and b["box"][3] <= h + 1 for b in sample["boxes"])


def test_imagenet_folders_names_and_prompts(tmp_path):
    for split, folder, n in (("train", "n02", 2), ("train", "n01", 1), ("val", "n01", 1)):
        for i in range(n):
            path = tmp_path / "in" / split / folder / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture((i, 0, 0)))
    (tmp_path / "names.txt").write_text("n01 goldfish, Carassius auratus\nn02 tench\n")
    (tmp_path / "p.json").write_text(json.dumps({"ImageNet": {"templates": ["a bad photo of a {}."]}}))
    m = imagenet.run(
        imagenet.Config(
            str(tmp_path / "in"),
            str(tmp_path / "o"),
            str(tmp_path / "names.txt"),
            f"{tmp_path}/p.json:ImageNet",
            "mean_per_class",
        )
    )
    assert m["classes"] == ["goldfish, Carassius auratus", "tench"] and m["counts"] == {"train": 3, "val": 1}
    assert (
        m["templates"] == ["a bad photo of a {}."]
        and m["metric"] == "mean_per_class"
        and data.Shards(tmp_path / "o", "train").read(0, 2)["label"] == 1
    )
    for spec, words in (("x.json", "FILE.json:KEY"), (f"{tmp_path}/p.json:Cars", "KeyError")):
        with pytest.raises(ValueError, match=words):
            imagenet.run(imagenet.Config(str(tmp_path / "in"), str(tmp_path / "o2"), "", spec))


def batch(n, seed, fine):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
    y = rng.integers(0, 3, n).tolist()
    return {b"data": x, **({b"fine_labels": y, b"coarse_labels": [0] * n} if fine else {b"labels": y})}


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            blob = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(f"cifar/{name}")
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))


def test_cifar_archive(tmp_path):
    names = {b"fine_label_names": [b"aquarium_fish", b"bear", b"cup"], b"coarse_label_names": [b"all"]}
    archive(tmp_path / "c.tar.gz", {"train": batch(6, 0, True), "test": batch(3, 1, True), "meta": names})
    m = cifar100.run(cifar100.Config(str(tmp_path / "o"), archive=str(tmp_path / "c.tar.gz")))
    assert m["counts"] == {"train": 6, "test": 3} and m["classes"][0] == "aquarium fish"
    want = batch(6, 0, True)
    order = np.random.default_rng(0).permutation(6)
    sample = data.Shards(tmp_path / "o", "train").read(0, 2)
    assert np.array_equal(np.asarray(sample["image"]), want[b"data"][order[2]].reshape(3, 32, 32).transpose(1, 2, 0))
    assert sample["label"] == want[b"fine_labels"][order[2]] and sample["coarse"] == 0
    # superclasses: fine 0 and 2 in the first, 1 in the second; the second member of a superclass is there once
    both = {b"fine_labels": [0, 1, 2, 2, 0, 1], b"coarse_labels": [0, 1, 0, 0, 0, 1]}
    two = {"fine_label_names": [b"bear", b"cup", b"wolf"], "coarse_label_names": [b"large_animals", b"things"]}
    names = {k.encode(): v for k, v in two.items()}
    archive(tmp_path / "t.tar.gz", {"train": batch(6, 0, True) | both, "test": batch(6, 1, True) | both, "meta": names})
    wanted = {"0": ([0, 0, 1, 1], [0, 0, 1, 1]), "1": ([0, 0], [0, 0]), "": ([0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1])}
    for members, both in wanted.items():
        for by, want in zip((False, True), both):
            out, tar = f"{tmp_path}/m{members}{by}", str(tmp_path / "t.tar.gz")
            cifar100.run(cifar100.Config(out, tar, members=members, superclasses=by))
            source = data.Shards(out, "test")
            assert sorted(r["label"] for r in data.records(source)) == want
            names = {"0": ["bear", "cup"], "1": ["wolf"], "": ["bear", "cup", "wolf"]}[members]
            assert source.classes == (["large animals", "things"] if by else names)
    with pytest.raises(ValueError, match="--members 2: no class is there"):
        cifar100.run(cifar100.Config(f"{tmp_path}/no", str(tmp_path / "t.tar.gz"), members="2"))
    with pytest.raises(ValueError, match="comma list of places"):
        cifar100.run(cifar100.Config(f"{tmp_path}/no", str(tmp_path / "t.tar.gz"), members="a"))
    ten = {f"data_batch_{i}": batch(2, i, False) for i in range(1, 6)} | {
        "test_batch": batch(2, 9, False),
        "batches.meta": {b"label_names": [b"a", b"b", b"c"]},
    }
    archive(tmp_path / "ten.tar.gz", ten)
    assert cifar100.run(cifar100.Config(str(tmp_path / "o10"), archive=str(tmp_path / "ten.tar.gz")))["counts"] == {
        "train": 10,
        "test": 2,
    }
    with pytest.raises(ValueError, match="have no superclasses"):
        cifar100.run(cifar100.Config(str(tmp_path / "no"), archive=str(tmp_path / "ten.tar.gz"), superclasses=True))


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("echo hacked > /tmp/should_not_exist",)


def test_cifar_refuses_code_and_damage(tmp_path):
    archive(tmp_path / "e.tar.gz", {"train": Evil(), "test": batch(1, 0, True), "meta": {}})
    with pytest.raises(ValueError, match="not allowed in a CIFAR batch"):
        cifar100.run(cifar100.Config(str(tmp_path / "o"), archive=str(tmp_path / "e.tar.gz")))
    archive(tmp_path / "d.tar.gz", {"train": b"\x80\x02garbage", "test": b"", "meta": {}})
    with pytest.raises(ValueError, match="not a CIFAR batch"):
        cifar100.run(cifar100.Config(str(tmp_path / "o"), archive=str(tmp_path / "d.tar.gz")))
    archive(tmp_path / "m.tar.gz", {"train": batch(1, 0, True)})
    with pytest.raises(ValueError, match="lacks test, meta"):
        cifar100.run(cifar100.Config(str(tmp_path / "o"), archive=str(tmp_path / "m.tar.gz")))
    with pytest.raises(ValueError, match="give --archive"):
        cifar100.run(cifar100.Config(str(tmp_path / "o")))


def test_cifar_refuses_forged_arrays(tmp_path):
    """An object dtype with bytes for pointers crashed the interpreter before numpy's constructors were replaced."""
    forged = batch(1, 0, True) | {b"data": np.array([1, "x"], dtype=object)}
    archive(tmp_path / "f.tar.gz", {"train": forged, "test": batch(1, 0, True), "meta": {}})
    with pytest.raises(ValueError, match="holds bytes, not numpy's O8"):
        cifar100.run(cifar100.Config(str(tmp_path / "o"), archive=str(tmp_path / "f.tar.gz")))


def test_nothing_is_written_outside_the_folder(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "1.jpg").write_bytes(picture((1, 2, 3), kind="JPEG"))
    image = {"id": 1, "file_name": "1.jpg", "width": 8, "split": "../../evil"}
    (tmp_path / "c.json").write_text(json.dumps({"images": [image], "annotations": []}))
    with pytest.raises(ValueError, match="not a plain name"):
        coco.run(coco.Config(f"{tmp_path}/c.json", str(tmp_path / "img"), str(tmp_path / "o")))
    with pytest.raises(ValueError, match="--out is empty"):
        _write.prepare("", {"train": [1]}, None)
    with pytest.raises(ValueError, match="negative"):
        _write.shuffled_splits([1, 2], {"train": -1, "val": -3})


@pytest.mark.parametrize(
    "change", [{"bbox": [1, 2]}, {"bbox": None}, {"bbox": [0, 0, float("nan"), 1]}, {"segmentation": [["x"]]}]
)
def test_broken_coco_annotations_are_counted(tmp_path, change):
    (tmp_path / "img").mkdir()
    for i in (1, 2):
        (tmp_path / "img" / f"{i}.jpg").write_bytes(picture((1, 2, 3), kind="JPEG"))
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 8} for i in (1, 2)]
    box = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 4, 4], "segmentation": []} | change
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": [box], "categories": []}))
    m = coco.run(coco.Config(f"{tmp_path}/c.json", str(tmp_path / "img"), str(tmp_path / "o")))
    assert m["bad"] == {"annotation": 1} and m["counts"] == {"train": 1}
    (tmp_path / "d.json").write_text(json.dumps({"images": [5]}))
    with pytest.raises(ValueError, match="has not COCO's form"):
        coco.run(coco.Config(f"{tmp_path}/d.json", str(tmp_path / "img"), str(tmp_path / "o2")))


def test_cifar_mosaics(shared, tmp_path):
    root = shared / "cifar10_small"
    m = cifar100.run(cifar100.Config(str(tmp_path), train_zip=str(root / "train.zip"), test_zip=str(root / "test.zip"),
                                     labels=str(root / "labels.json"), prompts=f"{shared}/clip/class_prompts.json:CIFAR10"))  # fmt: skip
    assert m["counts"] == {"train": 1500, "test": 500} and len(m["templates"]) == 18
    labels = [data.Shards(tmp_path, "test").read(0, r)["label"] for r in range(500)]
    assert np.bincount(labels).tolist() == [50] * 10


def test_wordnet(tmp_path):
    licence = "  1 This software and database is being provided ...\n"
    (tmp_path / "data.noun").write_text(licence + "00001740 03 n 03 big_cat 0 tom-cat 0 Cat 1 001 @ 0001 n 0000 | a | cat\n")
    (tmp_path / "data.verb").write_text("00001740 29 v 02 run 0 jog 0 000 | move\n")
    (tmp_path / "data.adj").write_text("00001740 00 a 02 galore(ip) 0 abounding 0 000 | x\n")
    (tmp_path / "data.adv").write_text("00001740 02 r 01 fast 0 000 | x\n")
    wordnet.run(wordnet.Config(str(tmp_path), str(tmp_path / "o" / "s.tsv")))
    table = dict(line.split("\t") for line in (tmp_path / "o" / "s.tsv").read_text().splitlines())
    assert table == {"abounding": "galore", "cat": "big cat,tom cat", "galore": "abounding", "jog": "run", "run": "jog"}
    (tmp_path / "data.adv").write_text("00001740 02 r zz fast\n")
    with pytest.raises(ValueError, match="line 1 is not a synset"):
        wordnet.run(wordnet.Config(str(tmp_path), str(tmp_path / "t.tsv")))
    user_error(inside(wordnet, "--dict", tmp_path / "no", "--out", tmp_path / "t.tsv"), "data.noun does not exist")


# A server that answers like the web ---------------------------------------------------------------------------------

GOOD = picture((10, 200, 30), (40, 30), kind="JPEG")


class Web(http.server.BaseHTTPRequestHandler):
    seen: dict = {}

    def do_GET(self):
        n = Web.seen[self.path] = Web.seen.get(self.path, 0) + 1
        kind = self.path.strip("/").split("_")[0]
        if kind == "slow":
            self.connection.recv(1)  # until the client has gone
        if kind == "flaky" and n == 1:
            return self.send_error(503)
        if kind in ("404", "500", "429"):
            return self.send_error(int(kind))
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            return self.end_headers()
        if kind == "hang":
            return self.connection.close()
        if kind == "dawdle":  # the head, a byte at a time
            for b in b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100:
                self.wfile.write(bytes([b]))
                self.wfile.flush()
                time.sleep(0.1)
            return
        body = {"page": b"<html>not here</html>", "empty": b"", "huge": GOOD + b"\0" * 300_000, "half": GOOD[: len(GOOD) // 2],
                "tiny": picture((1, 1, 1), (1, 1))}.get(kind, GOOD)  # fmt: skip
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + (500 if kind == "cut" else 0)))
        self.end_headers()
        if kind == "drip":  # one byte at a time: every packet is in time, the whole is not
            for b in body[:100]:
                self.wfile.write(bytes([b]))
                self.wfile.flush()
                time.sleep(0.1)
            return
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def web(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Web.seen = {}
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_cc12m_counts_every_kind_of_failure(web, tmp_path):
    kinds = "good flaky 404 500 slow cut half page empty huge tiny redirect hang drip dawdle".split()
    lines = [f"{web}/{k}_{i}\tcaption {k}\n" for i, k in enumerate(kinds)] + [
        "no address here\n",
        f"caption first\t{web}/good_x\n",
    ]
    (tmp_path / "t.tsv").write_text("".join(lines))
    cfg = cc12m.Config(str(tmp_path / "t.tsv"), str(tmp_path / "o"), workers=6, retries=1, timeout=4.0, max_mb=0.2)
    began = time.monotonic()
    m = cc12m.run(cfg)
    assert time.monotonic() - began < 60
    assert m["counts"] == {"train": 3}
    assert m["bad"] == {"HTTP 404": 1, "HTTP 500": 1, "timed out": 3, "cut short": 1, "damaged": 3, "too large": 1,
                        "too small": 1, "HTTP 302": 1, "no connection": 1}  # fmt: skip
    assert Web.seen["/404_2"] == 1 and Web.seen["/500_3"] == 2 and Web.seen["/flaky_1"] == 2  # gone is gone; errors are retried
    source = data.Shards(tmp_path / "o")
    assert [source.read(0, r)["captions"] for r in range(3)] == [["caption good"], ["caption flaky"], ["caption first"]]
    seen = dict(Web.seen)
    cc12m.run(cfg)
    assert Web.seen == seen  # done is done


def test_an_outage_is_tried_again(web, tmp_path, monkeypatch):
    (tmp_path / "t.tsv").write_text(f"{web}/good_0\tsomebody there\n")
    cfg = cc12m.Config(str(tmp_path / "t.tsv"), str(tmp_path / "o"), retries=0, timeout=30.0)

    def refuse(*args, **options):
        raise OSError("no route")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "create_connection", refuse)
        with pytest.raises(ValueError, match="nothing of train-000000.tar could be fetched"):
            cc12m.run(cfg)
    assert not list((tmp_path / "o").glob("*.tar"))
    assert cc12m.run(cfg)["counts"] == {"train": 1}


def test_a_few_dead_links_are_no_outage(tmp_path):
    def make(item):
        if item == "dead":
            raise data.BadSample("dead: no route", "no connection")
        return item, "png", picture((1, 2, 3)), {}

    m = _write.prepare(tmp_path, {"train": ["a", "b", "dead"]}, make, per_shard=2)
    assert m["complete"] and m["counts"] == {"train": 2} and m["bad"] == {"no connection": 1}


def test_cc12m_table_errors(tmp_path):
    (tmp_path / "t.tsv").write_text("just words\n")
    with pytest.raises(ValueError, match="no line with an http address"):
        cc12m.run(cc12m.Config(str(tmp_path / "t.tsv"), str(tmp_path / "o")))
    with pytest.raises(ValueError, match="does not exist"):
        cc12m.run(cc12m.Config(str(tmp_path / "none.tsv"), str(tmp_path / "o")))


def test_a_moved_folder_goes_on_and_other_settings_do_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--train", 3, "--val", 1, "--test", 1, "--size", 16]
    assert inside(scenes, *small, "--out", "a").returncode == 0
    assert inside(scenes, *small, "--out", tmp_path / "a").returncode == 0  # the same folder by another name
    (tmp_path / "a").rename(tmp_path / "b")
    assert inside(scenes, *small, "--out", "b").returncode == 0
    assert inside(scenes, *small, "--out", "b", "--seed", 1).returncode == 2


# By hand ---------------------------------------------------------------------------------------------------------------


def red(i):
    return f"k{i}", "png", picture((i, 0, 0)), {"label": i}


def test_keys_count_on_over_shards_and_are_plain(tmp_path):
    def make(i):
        return f"{'x' * 80}/\u00e9 {i}", "png", picture((i, 0, 0)), {"label": i}

    m = _write.prepare(tmp_path, {"train": [0, 1, 2]}, make, per_shard=2)
    keys = [r["key"] for r in data.records(data.Shards(tmp_path))]
    assert keys == [f"{i:08d}_{'x' * 56}___{i}" for i in range(3)]
    assert [s["bytes"] for s in m["shards"]] == [(tmp_path / s["name"]).stat().st_size for s in m["shards"]]


def test_what_makes_prepared_data_other_data(tmp_path):
    """Items, the number in a shard, classes: each is noticed. A shard that is gone is written again."""
    base, plan = dict(per_shard=2, classes=["a"]), {"train": [0, 1, 2], "val": [3]}
    _write.prepare(tmp_path / "o", plan, red, **base)
    before = digest(tmp_path / "o")
    for items, more in (({**plan, "val": [4]}, base), (plan, {**base, "per_shard": 3}), (plan, {**base, "classes": ["b"]})):
        with pytest.raises(ValueError, match="other input or settings"):
            _write.prepare(tmp_path / "o", items, red, **more)
    (tmp_path / "o/train-000001.tar").unlink()
    made = []
    m = _write.prepare(tmp_path / "o", plan, lambda i: made.append(i) or red(i), **base)
    assert made == [2] and digest(tmp_path / "o") == before and m["counts"] == {"train": 3, "val": 1}


def test_a_shard_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    calls, fsync, move = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: calls.append("sync") or fsync(f))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(str(b).rpartition("/")[2]) or move(a, b))

    def make(i):
        calls.append(sorted(p.suffix for p in tmp_path.iterdir()))
        return red(i)

    _write.prepare(tmp_path, {"train": [0]}, make)
    manifest = ["sync", "manifest.json"]  # before anything, after each shard, and in the end
    assert calls == [*manifest, [".json", ".tmp"], "sync", "train-000000.tar", *manifest, *manifest]


def test_splits_are_disjoint_sorted_and_drawn_by_the_seed():
    items = list(range(30))
    a, b = (_write.shuffled_splits(items, {"train": -1, "val": 8, "test": 7}, seed) for seed in (0, 1))
    assert sorted(a["train"] + a["val"] + a["test"]) == items and [len(v) for v in a.values()] == [15, 8, 7]
    assert all(v == sorted(v) for v in a.values()) and a != b and list(a) == ["train", "val", "test"]


def test_which_pictures_are_written_again(tmp_path, monkeypatch):
    clear = picture((9, 9, 9, 0), mode="RGBA")
    ext, blob = _write.checked_image(clear, "x")
    assert (
        ext == "png"
        and Image.open(io.BytesIO(blob)).mode == "RGB"
        and data.decode_image(blob).getpixel((0, 0)) == (255, 255, 255)
    )
    wide = picture((9, 9, 9), (60, 20), kind="JPEG")
    assert Image.open(io.BytesIO(_write.checked_image(wide, "x", 30)[1])).size == (30, 10)  # the longer side counts
    assert _write.checked_image(wide, "x", 60) == ("jpg", wide)
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("bomb", b"\0" * 5000)
    monkeypatch.setattr(_write, "MAX_BYTES", 4999)
    with pytest.raises(data.BadSample, match="larger than"):
        _write.Files(tmp_path / "z.zip").read("bomb")


def test_a_full_path_beats_a_bare_name_and_the_seed_draws_the_splits(tmp_path):
    for name, value in (("a/1.png", 10), ("b/1.png", 20), ("1.png", 30)):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(picture((value, 0, 0)))
    (tmp_path / "t.csv").write_text("image,caption\na/1.png,ten\n1.png,thirty\n")
    captions.run(captions.Config(str(tmp_path / "t.csv"), str(tmp_path / "in"), str(tmp_path / "o"), val=0, test=0))
    source = data.Shards(tmp_path / "o")
    assert {source.read(0, r)["captions"][0]: source.read(0, r)["image"].getpixel((0, 0))[0] for r in (0, 1)} == {
        "ten": 10,
        "thirty": 30,
    }
    (tmp_path / "many.csv").write_text("image,caption\n" + "".join(f"{i}.png,x\n" for i in range(20)))
    for i in range(20):
        (tmp_path / f"in/{i}.png").write_bytes(picture((i, 0, 0)))
    drawn = []
    for seed in (0, 1):
        cfg = captions.Config(str(tmp_path / "many.csv"), str(tmp_path / "in"), f"{tmp_path}/{seed}", val=5, test=5, seed=seed)
        captions.run(cfg)
        drawn.append([r["source"] for r in data.records(data.Shards(cfg.out, "val"))])
    assert drawn[0] != drawn[1]


def test_shards_of_class_folders_are_fair_samples_and_labels_count_all_splits(tmp_path):
    for split, folder, n in (("train", "b", 12), ("train", "c", 12), ("val", "a", 1), ("val", "c", 1)):
        for i in range(n):
            path = tmp_path / "in" / split / folder / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture((i, 0, 0)))
    m = imagenet.run(imagenet.Config(str(tmp_path / "in"), str(tmp_path / "o")))
    assert m["classes"] == m["folders"] == ["a", "b", "c"]
    labels = [r["label"] for r in data.records(data.Shards(tmp_path / "o", "train"))]
    assert set(labels) == {1, 2} and labels[:12].count(1) < 12 and labels != sorted(labels)


def test_coco_splits_crowds_and_classes(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img/1.jpg").write_bytes(picture((1, 2, 3), (50, 40), kind="JPEG"))
    box = {
        "image_id": 1,
        "category_id": 9,
        "bbox": [0, 0, 5, 5],
        "iscrowd": 1,
        "segmentation": {"counts": [1], "size": [40, 50]},
    }
    content = {"images": [{"id": 1, "file_name": "1.jpg", "width": 50}], "annotations": [box],
               "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}]}  # fmt: skip
    for name, split, want in (
        ("instances_val2017", "", "val"),
        ("objects", "", "train"),
        ("x_train", "mine", "mine"),
        ("latest", "", "train"),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        m = coco.run(coco.Config(f"{tmp_path}/{name}.json", str(tmp_path / "img"), f"{tmp_path}/{name}", split))
        assert m["counts"] == {want: 1} and m["classes"] == ["cat", "dog"]  # by their numbers
        crowd = data.Shards(tmp_path / name).read(0, 0)["boxes"][0]
        assert crowd["iscrowd"] == 1 and crowd["label"] == "dog" and crowd["segmentation"] == box["segmentation"]


def test_worlds_on_disk(tmp_path):
    """Splits and seeds have scenes of their own; the label is the first object's shape; paraphrases differ between samples."""
    for seed in (0, 1):
        scenes.run(scenes.Config(str(tmp_path / str(seed)), train=6, val=6, test=6, size=16, seed=seed))
    shards = {(seed, s): data.Shards(tmp_path / str(seed), s) for seed in (0, 1) for s in ("train", "val", "test")}
    found = {k: [r["captions"][0] for r in data.records(source)] for k, source in shards.items()}
    assert len({tuple(v) for v in found.values()}) == 6
    for r in data.records(shards[0, "train"]):
        assert scenes.scenes.SHAPES[r["label"]] == r["boxes"][0]["label"]
    world = [scenes.scenes.scene(i, 0, (1, 3)) for i in range(2)]
    assert data.records(shards[0, "train"])[1]["captions"] == [scenes.scenes.caption(world[1], v) for v in (0, 6, 7, 8, 9)]


def test_tiles_of_a_mosaic_come_row_by_row(tmp_path):
    image = np.zeros((64, 800, 3), np.uint8)
    for i in range(50):
        image[i // 25 * 32 : i // 25 * 32 + 32, i % 25 * 32 : i % 25 * 32 + 32] = i
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    for split in ("train", "test"):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as z:
            z.writestr("a.png", out.getvalue())
    (tmp_path / "l.json").write_text('{"classes": ["a"]}')
    sets, names, coarse = cifar100.from_mosaics(
        cifar100.Config(
            "", train_zip=str(tmp_path / "train.zip"), test_zip=str(tmp_path / "test.zip"), labels=str(tmp_path / "l.json")
        )
    )
    assert (
        names == ["a"]
        and coarse == []
        and [x.min() for x in sets["train"][0]] == [x.max() for x in sets["test"][0]] == list(range(50))
    )


def test_pictures_of_one_name_are_told_apart_or_left_out():
    find = _write.lookup(["mini/train/1.png", "mini/val/1.png", "a/2.png", "3.png"])
    assert [find(n) for n in ("train/1.png", "val/1.png", "2.png", "b/2.png", "3.png")] == [
        "mini/train/1.png", "mini/val/1.png", "a/2.png", "a/2.png", "3.png"]  # fmt: skip
    for name, words in (("1.png", "fits mini/train/1.png and mini/val/1.png"), ("4.png", "4.png is not among the images")):
        with pytest.raises(_write.BadSample, match=words):
            find(name)


@pytest.mark.parametrize(
    "text, words",
    [
        ("image,caption\na.jpg,A dog, running\n", "row 1 has more cells than columns"),
        ('image,caption\na.jpg,"A dog\nb.jpg,B\n', "a quote may be open"),
        ("image\tcaption\na.jpg\tA\nb.jpg\tB\tC\n", "row 2 has more cells"),
    ],
)
def test_tables_whose_captions_would_be_cut_or_joined(text, words, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        captions.read_table(tmp_path / "t.csv", "image", "caption")


def test_what_was_missing_is_tried_again_when_it_is_there(tmp_path):
    there = []

    def make(item):
        if not there:
            raise _write.BadSample(f"{item} is not there", "without image")
        return red(item)

    with pytest.raises(ValueError, match="nothing could be prepared.*0 is not there"):
        _write.prepare(tmp_path, {"train": [0, 1]}, make)
    there.append(True)
    assert _write.prepare(tmp_path, {"train": [0, 1]}, make)["counts"] == {"train": 2}


def test_folders_of_others_and_damaged_manifests_are_left_alone(tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds train-000000.tar without a manifest.json"):
        _write.prepare(tmp_path, {"train": [0]}, red)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"mine"
    for text in ("[]", "{", '{"fingerprint": "x", "complete": true, "shards": [1]}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="manifest.json is damaged"):
            _write.prepare(tmp_path, {"train": [0]}, red)


def test_an_address_that_no_socket_takes_is_one_bad_sample():
    cfg = cc12m.Config("t", "o", retries=0, timeout=1.0)
    with pytest.raises(_write.BadSample, match="http://127.0.0.1:9{20}/a"):
        cc12m.download(f"http://127.0.0.1:{'9' * 20}/a", cfg)


@pytest.mark.parametrize("flag, value", [("--timeout", "0"), ("--timeout", "nan"), ("--limit", "-1")])
def test_numbers_of_cc12m(flag, value, tmp_path):
    (tmp_path / "t.tsv").write_text("http://127.0.0.1:9/a\tA\n")
    user_error(inside(cc12m, "--table", tmp_path / "t.tsv", "--out", tmp_path / "o", flag, value), flag)


def test_a_split_that_is_not_there_is_named(tmp_path):
    (tmp_path / "in/train/a").mkdir(parents=True)
    (tmp_path / "in/train/a/1.png").write_bytes(picture((9, 9, 9)))
    with pytest.raises(ValueError, match="no images as tset/CLASS/file; leave it out of --splits train,tset"):
        imagenet.run(imagenet.Config(str(tmp_path / "in"), str(tmp_path / "o"), splits="train,tset"))
