"""common/data.py: order, resume, processes and workers, damaged members, foreign shards."""

import gc
import gzip
import io
import json
import multiprocessing
import tarfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import data as D
from data_prep._write import prepare


def picture(value, size=(8, 6), mode="RGB", kind="PNG"):
    out = io.BytesIO()
    Image.new(mode, size, value).save(out, kind)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    items = list(range(25))
    prepare(
        tmp_path / "d",
        {"train": items, "test": items[:3]},
        lambda i: (f"k{i}", "png", picture((i, 0, 0)), {"captions": [f"c{i}"], "label": i}),
        per_shard=7,
    )
    return tmp_path / "d"


def env(rank=0, world=1):
    from common.ddp import Env

    return Env(rank, world, "cpu")


def stream(
    source, n, make=lambda s, rng: (s["label"], rng.integers(1 << 30)), start=0, batch=4, rank=0, world=1, workers=0, **kw
):
    it = D.Batches(source, make, list, batch, env(rank, world), seed=3, start=start, workers=workers, **kw)
    return [next(it) for _ in range(n)]


def test_every_epoch_visits_each_sample_once(folder):
    source = D.Shards(folder, "train")
    assert len(source) == 25 and source.sizes == [7, 7, 7, 4]
    seen = [label for b in stream(source, 50, batch=1) for label, _ in b]
    assert sorted(seen[:25]) == sorted(seen[25:]) == list(range(25)) and seen[:25] != seen[25:]
    assert [s["label"] for s in (D.Shards(folder, "test").read(0, r) for r in range(3))] == [0, 1, 2]


def test_order_is_local_and_pure():
    order = D.Order([10] * 20, seed=1, window=4)
    first = [order(p) for p in range(40)]
    assert len({s for s, _ in first}) == 4 and len(set(first)) == 40  # four shards at a time
    cut = D.Order([10] * 20, seed=1, window=4, batch=64)  # three whole batches an epoch
    for start in range(0, 640, 64):
        assert len({cut(i) for i in range(start, start + 64)}) == 64
    again = D.Order([10] * 20, seed=1, window=4)
    assert [again(p) for p in reversed(range(40))] == first[::-1]
    assert D.Order([10] * 20, seed=2, window=4)(0) != order(0) or D.Order([10] * 20, seed=2)(1) != order(1)


def test_resume_is_exact_and_workers_and_processes_agree(folder):
    source = D.Shards(folder, "train")
    whole = stream(source, 20)
    assert stream(source, 8, start=12) == whole[12:]
    assert stream(D.Shards(folder, "train"), 6, workers=2) == whole[:6]
    parts = [stream(source, 20, rank=r, world=2) for r in range(2)]
    assert [a + b for a, b in zip(*parts)] == whole


def test_workers_leave_with_their_batches(folder):
    """Without waiting for the garbage collector: the next arm of a run starts workers of its own, and the exit joins them."""
    gc.disable()
    try:
        batches = D.Batches(D.Shards(folder, "train"), lambda s, rng: s["label"], list, 4, env(), workers=2)
        next(batches)
        assert len(multiprocessing.active_children()) == 2
        del batches
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_damaged_members_are_replaced_counted_and_limited(folder):
    path = folder / "train-000001.tar"
    raw = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        m = tar.getmembers()[4]  # the third picture
    raw[m.offset_data : m.offset_data + 20] = b"\0" * 20
    path.write_bytes(raw)
    source = D.Shards(folder, "train")
    it = D.Batches(source, lambda s, rng: s["label"], list, 5, env(), seed=3, max_bad=0.5)
    labels = [x for _ in range(5) for x in next(it)]
    assert it.bad == 1 and "train-000001.tar" in it.first_bad and 9 not in labels and len(labels) == 25
    with pytest.raises(ValueError, match="damaged.*--max_bad"):
        stream(source, 20, max_bad=0.0)


def test_photographs_are_read_by_threads_with_the_same_result(tmp_path):
    """Damage, several shards and an epoch's end among them; `keep` 1, so that threads close files under each other."""
    items = list(range(40))
    body = {i: picture((i, 0, 0), (150, 140)) if i != 7 else b"damaged" for i in items}
    prepare(tmp_path / "d", {"train": items}, lambda i: (f"k{i}", "png", body[i], {"label": i}), per_shard=4)

    def make(sample, rng):
        seen.add(threading.get_ident())
        assert sample["image"].getpixel((0, 0)) == (sample["label"], 0, 0)
        return sample["label"], rng.integers(1 << 30)

    runs = []
    for threads in (1, 4):
        seen = set()
        stream = D._Stream(D.Shards(tmp_path / "d", "train", keep=1), make, 3, 1, threads)
        runs.append([stream.__getitems__(range(s, s + 10)) for s in range(0, 100, 10)])
        assert (len(seen) > 1) == (threads > 1)
    assert runs[0] == runs[1] and sum(len(problems) for batch in runs[0] for _, problems in batch) >= 2


def test_a_shard_that_was_cut_short_gives_its_whole_members(folder):
    path = folder / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:4000])
    it = D.Batches(D.Shards(folder, "train"), lambda s, rng: s["label"], list, 5, env(), seed=3, max_bad=0.5)
    labels = [x for _ in range(5) for x in next(it)]
    assert it.bad > 0 and len(set(labels)) < 25


def test_nothing_but_damage_ends_with_a_sentence(tmp_path):
    prepare(tmp_path, {"train": [0, 1]}, lambda i: (str(i), "png", b"not an image", {}))
    with pytest.raises(ValueError, match="100 samples in a row"):
        stream(D.Shards(tmp_path), 1)


@pytest.mark.parametrize("content,words", [(b"", "holds no samples|not a tar"), (b"x" * 2000, "not a tar file")])
def test_empty_and_broken_shards(tmp_path, content, words):
    (tmp_path / "a-000000.tar").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        D.Shards(tmp_path)


def test_missing_folder_and_split(tmp_path, folder):
    with pytest.raises(ValueError, match="does not exist.*data_prep"):
        D.Shards(tmp_path / "none")
    with pytest.raises(ValueError, match="no shards of split 'val'"):
        D.Shards(folder, "val")
    with pytest.raises(ValueError, match="no images"):
        D.Folder(folder)


def test_foreign_webdataset_shards_without_manifest(tmp_path):
    with tarfile.open(tmp_path / "x-0.tar", "w") as tar:
        for i in range(3):
            for name, blob in (
                (f"dir/s{i}.jpg", picture((9, 9, 9), kind="JPEG")),
                (f"dir/s{i}.txt", f"word {i}".encode()),
                (f"dir/s{i}.cls", b"2"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(blob)
                tar.addfile(info, io.BytesIO(blob))
    source = D.Shards(tmp_path)
    assert len(source) == 3
    sample = source.read(0, 1)
    assert sample["captions"] == ["word 1"] and sample["label"] == 2 and sample["image"].size == (8, 6)


def test_image_modes():
    for mode, value in (("L", 100), ("P", 3), ("CMYK", (0, 0, 0, 0)), ("1", 1), ("LA", (10, 255))):
        kind = {"CMYK": "TIFF"}.get(mode, "PNG")
        assert D.decode_image(picture(value, mode=mode, kind=kind)).mode == "RGB"
    sixteen = io.BytesIO()
    Image.fromarray(np.full((4, 4), 256 * 77, np.uint16)).save(sixteen, "PNG")
    assert np.asarray(D.decode_image(sixteen.getvalue())).max() == 77  # scaled, not clipped
    assert np.asarray(D.decode_image(picture((200, 0, 0, 0), mode="RGBA"))).min() == 255  # transparency lies on white


def test_refused_images():
    with pytest.raises(D.BadSample, match="exceed the bound"):
        D.decode_image(picture(0, (100, 100)), max_pixels=9999)
    whole = picture((1, 2, 3), (64, 64))
    for blob in (b"", whole[: len(whole) // 2], b"GIF89a" + b"\0" * 10, whole[:30]):
        with pytest.raises(D.BadSample, match="not a readable image"):
            D.decode_image(blob)


def test_bad_records_are_bad_samples(tmp_path):
    with tarfile.open(tmp_path / "x-0.tar", "w") as tar:
        for name, blob in (
            ("a.png", picture(0, mode="L")),
            ("a.json", b"{broken"),
            ("b.json", b"{}"),
            ("c.png", picture(0, mode="L")),
            ("c.json", b"[1]"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    source = D.Shards(tmp_path)
    for row, words in ((0, "unreadable record"), (1, "no image"), (2, "not an object")):
        with pytest.raises(D.BadSample, match=words):
            source.read(0, row)


def test_memory_does_not_grow_with_shards(tmp_path):
    prepare(tmp_path, {"train": list(range(40))}, lambda i: (str(i), "png", picture((i, 0, 0)), {"label": i}), per_shard=1)
    source = D.Shards(tmp_path, keep=3)
    for s in range(40):
        assert source.read(s, 0)["label"] == s
    assert len(source.open) == 3


def test_plain_image_folder(tmp_path):
    for i, name in enumerate(("cat/a.png", "dog/b.png", "cat/c.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture((i, 0, 0)))
    source = D.Folder(tmp_path)
    assert source.classes == ["cat", "dog"] and [source.read(0, r)["label"] for r in range(3)] == [0, 0, 1]
    assert [b[0] for b in stream(source, 1, batch=3)[0]] in ([0, 0, 1], [0, 1, 0], [1, 0, 0])


def test_in_order_leaves_out_damage_and_splits_over_processes(folder):
    source = D.Shards(folder, "train")
    rows = [x for b in D.in_order(source, lambda s: s["label"], list, 4) for x in b]
    assert rows == list(range(25))
    parts = [[x for b in D.in_order(source, lambda s: s["label"], list, 4, slice(r, None, 2)) for x in b] for r in range(2)]
    assert parts == [list(range(0, 25, 2)), list(range(1, 25, 2))]


def test_batch_must_divide_by_processes(folder):
    with pytest.raises(ValueError, match="batch_size 5 cannot be divided by 2"):
        stream(D.Shards(folder, "train"), 1, batch=5, world=2)


def test_manifest_names_what_was_written(folder):
    m = json.loads((folder / "manifest.json").read_text())
    assert m["counts"] == {"train": 25, "test": 3} and m["complete"] and len(m["shards"]) == 5
    assert SimpleNamespace(**m["shards"][0]).sha256


def test_postscript_is_never_interpreted():
    with pytest.raises(D.BadSample, match="not a readable image"):
        D.decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize(
    "record", ['{"captions": 5}', '{"captions": [5]}', '{"captions": "text"}', '{"label": "cat"}', "[" * 5000, "{}x"]
)
def test_records_of_wrong_types_are_bad_samples(tmp_path, record):
    with tarfile.open(tmp_path / "x-0.tar", "w") as tar:
        for name, blob in (("a.png", picture(0, mode="L")), ("a.json", record.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    with pytest.raises(D.BadSample, match="a"):
        D.Shards(tmp_path).read(0, 0)


@pytest.mark.parametrize(
    "manifest",
    ["[]", "{", '{"shards": [{"name": "train-000000.tar"}]}', '{"shards": [{"name": "train-000000.tar", "count": 1e30}]}'],
)
def test_damaged_manifest(folder, manifest):
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="manifest.json is damaged.*prepare the data again"):
        D.Shards(folder)
    (folder / "manifest.json").write_text('{"shards": [{"name": "gone.tar", "count": 1}]}')
    with pytest.raises(ValueError, match="lists gone.tar, which is not there"):
        D.Shards(folder)


def test_in_memory_batches_are_parts_of_one_stream():
    fields = {"x": torch.arange(10) * 2, "row": torch.arange(10)}

    def rows(n, batch=4, rank=0, world=1, start=0):
        it = D.InMemory(fields, batch, env(rank, world), seed=3, start=start)
        return [next(it) for _ in range(n)]

    whole = torch.cat([b["row"] for b in rows(10)])
    for first in range(0, 40, 8):  # an epoch is two whole batches: nothing twice in one
        assert len(set(whole[first : first + 8].tolist())) == 8
    assert (
        set(whole.tolist()) == set(range(10))
        and whole[:8].tolist() != whole[8:16].tolist()
        and torch.equal(torch.cat([b["x"] for b in rows(10)]), whole * 2)
    )
    halves = torch.cat([torch.cat([a["row"], b["row"]]) for a, b in zip(rows(10, rank=0, world=2), rows(10, rank=1, world=2))])
    assert torch.equal(halves, whole) and torch.equal(torch.cat([b["row"] for b in rows(6, start=4)]), whole[16:])
    assert len(rows(1, batch=25)[0]["row"]) == 25  # more than an epoch in one batch


def test_what_is_left_out_of_memory_is_said(tmp_path, capsys):
    body = {i: b"damaged" if i in (3, 8) else picture((i, 0, 0)) for i in range(12)}
    prepare(tmp_path, {"train": list(body)}, lambda i: (str(i), "png", body[i], {"label": i}), per_shard=5)
    rows = [8, 2, 3, 11]
    held = D.load(D.Shards(tmp_path, "train"), rows, 16, env(), gb=1)
    assert held["row"].tolist() == [2, 11] and held["label"].tolist() == [2, 11]
    assert "2 of 4 pictures are damaged and left out, sample 3 first" in capsys.readouterr().err
    D.load(D.Shards(tmp_path, "train"), rows, 16, env(1, 2), gb=1)
    assert not capsys.readouterr().err  # one process says it


def test_pictures_in_memory_and_from_the_loader(folder):
    source = D.Shards(folder, "train")
    part = D.Subset(source, [24, 0, 8])
    assert [part.read(s, i)["label"] for s, n in enumerate(part.sizes) for i in range(n)] == [0, 8, 24]
    held = D.load(source, [24, 0, 8], 16, env(), gb=1)
    assert held["image"].shape == (3, 3, 16, 16) and held["side"].tolist() == [[6, 8]] * 3
    assert held["row"].tolist() == held["label"].tolist() == [0, 8, 24]
    other = D.load(source, [24, 0, 8], 16, env(), gb=0)
    assert isinstance(other, D.Subset)
    for pictures in (held, other):
        mine = [[p["label"].tolist() for p in D.parts_of(pictures, 16, rank, 2)] for rank in (0, 1)]
        assert mine == [[[0, 24]], [[8]]]
        stream = D.endless(pictures, 16, 3, env(), seed=1)
        for _ in range(2):
            assert sorted(next(stream)["label"].tolist()) == [0, 8, 24]
    assert [r["label"] for r in D.records(source)] == list(range(25))


def test_samples_of_each_class():
    labels = [0, 1, 2, 1, 0, 2, 0, -1]
    rows = D.pick(labels, 2, 0)
    assert sorted(labels[r] for r in rows) == [0, 0, 1, 1, 2, 2] and np.array_equal(rows, D.pick(labels, 2, 0))
    assert len(D.pick(labels, 0, 0)) == 8
    for wrong, count, words in ((labels, 3, "only 2"), ([-1, -1], 1, "no labels")):
        with pytest.raises(ValueError, match=words):
            D.pick(wrong, count, 0)


def test_labels_that_do_not_fit_the_classes(tmp_path):
    def make(i):
        return f"k{i}", "png", picture((i % 5, 0, 0)), {"label": i}

    prepare(tmp_path / "a", {"train": range(4), "test": range(4)}, make, classes=["a", "b", "c"])
    with pytest.raises(ValueError, match="labels must be 0 to 2"):
        D.open_labelled(tmp_path / "a", 0, 0)
    for i, (train, test) in enumerate(((range(-1, 3), range(3)), (range(3), range(-1, 3)), (range(3), range(2, 4)))):
        prepare(tmp_path / f"l{i}", {"train": train, "test": test}, make, classes=["a", "b", "c"])
        with pytest.raises(ValueError, match=r"has the label (-1|3); labels must be 0 to 2"):
            D.open_labelled(tmp_path / f"l{i}", 0, 0)
    prepare(tmp_path / "m", {"train": (0, 2), "test": (1, 2)}, make, classes=["a", "b", "c"])
    with pytest.raises(ValueError, match="no training sample has the class 'b'"):
        D.open_labelled(tmp_path / "m", 0, 0)
    prepare(tmp_path / "n", {"train": range(4), "test": range(4)}, make)
    with pytest.raises(ValueError, match="labels must be"):
        D.open_labelled(tmp_path / "n", 0, 0)
    prepare(tmp_path / "b", {"train": range(4)}, make, classes=list("abcd"))
    with pytest.raises(ValueError, match="no split val or test"):
        D.open_labelled(tmp_path / "b", 0, 0)
    prepare(tmp_path / "c", {"train": range(4), "val": range(3)}, make, classes=list("abcd"))
    train, test, found, classes, rows = D.open_labelled(tmp_path / "c", 1, 0)
    assert len(train) == len(found) == len(rows) == len(classes) == 4 and len(test) == 3


def test_a_subset_stays_in_its_shards_and_a_replacement_in_its_place_of_a_later_batch():
    """Sorted rows keep shards together; a damaged sample is replaced by one that is not in the same batch."""
    source = SimpleNamespace(sizes=[40, 30, 50], read=lambda shard, row: {"at": (shard, row)})
    rows = np.array([119, 3, 45, 0, 70, 41, 39])
    subset = D.Subset(source, rows)
    got = [subset.read(s, r) for s, n in enumerate(subset.sizes) for r in range(n)]
    assert [g["row"] for g in got] == sorted(rows.tolist()) and subset.sizes == [3, 2, 2]
    assert [g["at"] for g in got] == [(0, 0), (0, 3), (0, 39), (1, 1), (1, 5), (2, 0), (2, 49)]

    def read(shard, row):
        if row == 5:
            raise D.BadSample("no")
        return {"row": row}

    for seed in range(5):  # but for the last batch of an epoch, whose replacement comes from the next one
        batches = D.Batches(SimpleNamespace(sizes=[64], read=read), lambda s, rng: s["row"], list, 8, env(), seed)
        for _ in range(7):
            rows = next(batches)
            assert len(set(rows)) == 8 and 5 not in rows


def test_a_header_that_lies_about_its_size_is_a_bad_sample(tmp_path):
    record = {"caption": "\ud800 is no text, and costs no preparation"}
    prepare(tmp_path, {"train": [0]}, lambda i: ("a", "png", picture((9, 9, 9), (8, 8)), record))
    shards = D.Shards(tmp_path, "train")
    file, samples = shards._index(0)
    (key, members), *_ = samples
    members["png"] = (members["png"][0], 1 << 45)
    with pytest.raises(D.BadSample, match="cut short"):
        shards.read(0, 0)


# By hand ---------------------------------------------------------------------------------------------------------------


def drawn(source, n=8, seed=3):
    it = D.Batches(source, lambda s, rng: (s["row"], int(rng.integers(1 << 30))), list, 4, env(), seed=seed)
    return [x for _ in range(n) for x in next(it)]


def test_augmentation_depends_on_the_seed_and_the_position_alone():
    """Not on the sample that stands in for a damaged one, or on its place in the order."""

    def source(bad=()):
        def read(shard, row):
            if row in bad:
                raise D.BadSample("no")
            return {"row": row}

        return SimpleNamespace(sizes=[32], read=read)

    whole, damaged, other = drawn(source()), drawn(source((3, 7))), drawn(source(), seed=4)
    assert [d for _, d in whole] == [d for _, d in damaged] and [r for r, _ in whole] != [r for r, _ in damaged]
    assert len({d for _, d in whole}) == 32 and not {d for _, d in whole} & {d for _, d in other}


def test_orders_differ_from_epoch_to_epoch_and_from_window_to_window():
    one = D.Order([50], seed=1)
    assert [one(p)[1] for p in range(50)] != [one(p)[1] for p in range(50, 100)]
    many = D.Order([1] * 30, seed=1, window=1)
    assert [many(p)[0] for p in range(30)] != [many(p)[0] for p in range(30, 60)]
    two = D.Order([40, 40], seed=1, window=1)
    assert [two(p)[1] for p in range(40)] != [two(p)[1] for p in range(40, 80)]

    def first(seed):
        return next(D.InMemory({"x": torch.arange(50)}, 50, env(), seed))["x"].tolist()

    assert first(1) == first(1) != first(2)
    labels = [0] * 40 + [1] * 40
    assert D.pick(labels, 3, 1).tolist() != D.pick(labels, 3, 2).tolist()


def test_memory_and_damage_have_bounds(tmp_path):
    body = {i: b"damaged" if i < 11 else picture((i, 0, 0)) for i in range(30)}
    prepare(tmp_path, {"train": list(body)}, lambda i: (str(i), "png", body[i], {"label": i}))
    source, some = D.Shards(tmp_path, "train"), np.arange(15, 19)
    size = 4 * 3 * 16 * 16  # bytes
    assert isinstance(D.load(source, some, 16, env(), gb=size / 2**30), dict)
    assert isinstance(D.load(source, some, 16, env(), gb=(size - 1) / 2**30), D.Subset)
    with pytest.raises(ValueError, match="11 of 30 pictures are damaged, more than --max_bad 0.01"):
        D.load(source, np.arange(30), 16, env(), gb=1)  # a hundredth of 1,000 at least
    assert len(D.load(source, np.arange(1, 30), 16, env(), gb=1)["row"]) == 19


def test_records_of_other_tools(tmp_path):
    """Captions beside the pictures are stripped; a list of captions beats a single one; members come sorted by key."""
    with tarfile.open(tmp_path / "x-0.tar", "w") as tar:
        for name, blob in (("b.png", picture(0)), ("b.json", b'{"caption": "one", "captions": ["two", "three"]}'),
                           ("a.png", picture(0)), ("a.txt", b" a dog\n"), ("c.png", picture(0)), ("c.json", b'{"caption": "one"}')):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    found = D.records(D.Shards(tmp_path))
    assert [(r["key"], r["captions"]) for r in found] == [("a", ["a dog"]), ("b", ["two", "three"]), ("c", ["one"])]


def test_classes_of_a_folder_are_sorted_as_text(tmp_path):
    for name in ("a b", "a/c"):  # files sort by their parts: a/c/x, a b/x
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.png").write_bytes(picture(0))
    source = D.Folder(tmp_path)
    assert source.classes == ["a b", "a/c"]
    assert {source.read(0, r)["key"]: source.read(0, r)["label"] for r in range(2)} == {"a b/x.png": 0, "a/c/x.png": 1}


def test_pictures_on_the_device_keep_their_rows_and_columns():
    image = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)
    out = D.stack([{"image": image, "side": (5, 7), "label": 1, "row": 0}])
    assert out["image"].shape == (1, 3, 2, 2) and out["image"][0, 0].tolist() == [[0, 3], [6, 9]]


def test_tables(tmp_path):
    (tmp_path / "t.tsv").write_text('\ufeffname\ttext\na\tthe "big box\nb\t"x"\n', "utf-8")  # a byte order mark, stray quotes
    assert D.read_rows(tmp_path / "t.tsv", ("name", "text")) == [
        {"name": "a", "text": 'the "big box'},
        {"name": "b", "text": '"x"'},
    ]
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b'name,text\na,"x, y"\n'))
    assert D.read_rows(tmp_path / "t.csv.gz") == [{"name": "a", "text": "x, y"}]
    for text, words in (
        ("name,text\na,x, y\n", "more cells than columns"),
        ("name\na\n", "text is missing"),
        ("name,text\na\n", "text"),
    ):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(ValueError, match=words):
            D.read_rows(tmp_path / "t.csv", ("name", "text"))


def test_the_validation_split_is_preferred(tmp_path):
    for name in ("a", "b"):
        splits = {"test": [1], "train": [0], **({"val": [2]} if name == "a" else {})}
        prepare(tmp_path / name, splits, lambda i: (str(i), "png", picture(0), {}))
    assert D.held_out(tmp_path / "a") == "val" and D.held_out(tmp_path / "b") == "test"
    assert D.held_out(tmp_path / "a", ("test", "val")) == "test"


def test_a_preparation_that_was_not_finished_is_not_read(tmp_path):
    prepare(tmp_path, {"train": [0, 1]}, lambda i: (str(i), "png", picture((i, 0, 0)), {"label": 0}), classes=["a"])
    assert len(D.Shards(tmp_path)) == 2
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(ValueError, match="manifest.json says that the preparation was not finished"):
        D.Shards(tmp_path)
