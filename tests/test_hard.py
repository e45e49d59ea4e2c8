"""What goes wrong outside a program's control: processes die at any moment, disks fill, files are damaged.

The long ones run with `python -m pytest -m hard`; the others run always."""

import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from common import ckpt, data, scenes, vae, vit
from common.tokenizer import Tokenizer
from data_prep import captions, coco
from data_prep import scenes as prep_scenes
from methods import dci, opt2i, pareto_eval
from tests.helpers import ROOT, free_port, inside, run, user_error

hard = pytest.mark.hard
SCRIPTS = {  # script: arguments of a run of some seconds
    "methods/clip_recipe.py": ["--preset", "smoke", "--extra", "none", "--save_every", "2"],
    "methods/lpl_ldm.py": ["--preset", "smoke"],
    "methods/ldm_conditioning.py": ["--preset", "smoke"],
    "methods/xsample.py": ["--preset", "smoke"],
    "methods/semisup_cluster.py": ["--preset", "smoke"],
    "methods/dp_rdm.py": ["--preset", "smoke"],
    "methods/dci.py": ["--preset", "smoke"],
    "methods/vlm.py": ["--preset", "smoke"],
    "data_prep/train_vae.py": ["--steps", "8", "--batch_size", "4", "--save_every", "2"],
}


def start(script, folder, *more, limit=None):
    """The script with its arguments in a process of its own. limit: bytes that no file may exceed."""

    def before():
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, script, *SCRIPTS[script], "--out_dir", str(folder), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=before,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def results(folder):
    """All weights as bytes, and the metrics without times and memory."""
    out = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}
    flat = json.loads((folder / "metrics.json").read_text())
    return out, {k: v for k, v in flat.items() if "ms_per" not in k and "mib" not in k and "seconds" not in k}


def checkpoints(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("last.pt")}


def kill_after(p, folder, saves, seconds):
    """Waits for so many checkpoints and seconds, then kill -9 -> whether the process was still there."""
    before, seen, end = checkpoints(folder), 0, time.monotonic() + seconds
    while p.poll() is None and (seen < saves or time.monotonic() < end):
        time.sleep(0.005)
        now = checkpoints(folder)
        seen, before = seen + (now != before), now
    alive = p.poll() is None
    p.kill()
    p.wait()
    return alive


@hard
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_five_times_at_random_moments_and_resumed(script, tmp_path):
    """Before the first checkpoint, between two, while one is written; a resumed run has less to do, so that it may end first."""
    began = time.monotonic()
    p = start(script, tmp_path / "whole")
    assert p.wait(400) == 0, p.stderr.read()
    took, moments, kills = time.monotonic() - began, random.Random(script), []
    for saves in (0, 1, 0, 1, 1):
        p = start(script, tmp_path / "killed")
        seconds = 0.0 if saves else moments.uniform(0.1, 0.6) * took
        kills.append(kill_after(p, tmp_path / "killed", saves, seconds + moments.uniform(0, 0.05)))
    assert sum(kills) >= 3 and checkpoints(tmp_path / "killed")
    p = start(script, tmp_path / "killed")
    assert p.wait(400) == 0, p.stderr.read()
    assert results(tmp_path / "whole") == results(tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob("*.tmp"))


@hard
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_between_the_last_checkpoint_and_the_results(script, tmp_path):
    p = start(script, tmp_path / "whole")
    assert p.wait(400) == 0, p.stderr.read()
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for path in (tmp_path / "killed").rglob("*"):
        if path.name in ("metrics.json", "model.safetensors"):
            path.unlink()
    p = start(script, tmp_path / "killed")
    assert p.wait(400) == 0, p.stderr.read()
    assert results(tmp_path / "whole") == results(tmp_path / "killed")


@hard
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(script, tmp_path):
    assert kill_after(start(script, tmp_path / "r"), tmp_path / "r", 1, 0), "ended before it was killed"
    before = {p: p.read_bytes() for p in checkpoints(tmp_path / "r")}
    assert before
    p = start(script, tmp_path / "r", limit=min(20_000, *(len(v) // 2 for v in before.values())))
    _, text = p.communicate(timeout=400)
    assert p.returncode == 2 and "Traceback" not in text and "error: " in text, text[-2000:]
    assert not list((tmp_path / "r").rglob("*.tmp"))
    for path, blob in before.items():
        assert path.read_bytes() == blob
        torch.load(path, weights_only=True)


# Several processes -----------------------------------------------------------------------------------------------------------

TRAIN = ["methods/vlm.py", "--preset", "smoke", "--arms", "infonce"]


def launch(folder, *more, nodes=(), processes=2):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    where = nodes or (f"--master_port={free_port()}",)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        *where,
        *TRAIN,
        "--out_dir",
        str(folder),
        *more,
    ]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )


def children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in found if b"vlm.py" in Path(f"/proc/{c}/cmdline").read_bytes()]


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()[-3000:]
        time.sleep(0.05)


def losses(folder):
    lines = [json.loads(x) for x in (folder / "infonce/log.jsonl").read_text().splitlines()]
    return [x["loss"] for x in lines if "loss" in x]


def test_two_nodes_train_as_one_process(tmp_path):
    """Two torchruns that meet at one address, as on two machines."""
    meet = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=t")
    nodes = [launch(tmp_path / "two", nodes=meet, processes=1) for _ in range(2)]
    texts = [p.communicate(timeout=300)[1] for p in nodes]
    assert [p.returncode for p in nodes] == [0, 0], texts[0][-2000:] + texts[1][-2000:]
    one = run(*TRAIN, "--out_dir", tmp_path / "one", OMP_NUM_THREADS="1")
    assert one.returncode == 0, one.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_dead_rank_ends_the_run_with_a_sentence_and_the_checkpoint_is_whole(tmp_path):
    more = ["--steps", "100000", "--save_every", "2", "--log_every", "1"]
    p = launch(tmp_path / "r", *more)
    wait_for(tmp_path / "r/infonce/last.pt", p)
    os.kill(children(p.pid)[1], signal.SIGKILL)
    _, text = p.communicate(timeout=120)
    assert p.returncode != 0 and "Signal 9" in text
    said = [line for line in text.splitlines() if "[rank0]" in line or "error: " in line]  # by the surviving rank
    assert any("another process of this run has died" in line for line in said), text[-3000:]
    assert "[rank0]" not in text
    saved = torch.load(tmp_path / "r/infonce/last.pt", weights_only=True)
    assert saved["step"] >= 2 and saved["step"] % 2 == 0


@hard
def test_sigterm_to_torchrun_saves_and_the_run_goes_on(tmp_path):
    more = ["--steps", "60", "--save_every", "1000", "--log_every", "1"]
    p = launch(tmp_path / "r", *more)
    wait_for(tmp_path / "r/infonce/log.jsonl", p)
    while len((tmp_path / "r/infonce/log.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.02)
    p.terminate()
    _, text = p.communicate(timeout=120)
    assert (tmp_path / "r/infonce/last.pt").exists(), text[-2000:]
    assert 0 < torch.load(tmp_path / "r/infonce/last.pt", weights_only=True)["step"] < 60
    for name in ("r", "whole"):
        again = launch(tmp_path / name, *more)
        assert again.wait(300) == 0, again.stderr.read()[-2000:]
    parts = [(tmp_path / n / "infonce/model.safetensors").read_bytes() for n in ("r", "whole")]
    assert parts[0] == parts[1]


# Damaged data ----------------------------------------------------------------------------------------------------------------


def damage(folder, share):
    """Cuts the picture of every n-th sample of the training shards."""
    seen = broken = 0
    for path in sorted(folder.glob("train-*.tar")):
        members = []
        with tarfile.open(path) as tar:
            for m in tar.getmembers():
                blob = tar.extractfile(m).read()
                if not m.name.endswith(".json"):
                    seen += 1
                    if int(seen * share) > broken:
                        broken += 1
                        blob = blob[: len(blob) // 2]
                members.append((m.name, blob))
        with tarfile.open(path, "w") as tar:
            for name, blob in members:
                info = tarfile.TarInfo(name)
                info.size = len(blob)
                tar.addfile(info, io.BytesIO(blob))
    return broken


@pytest.mark.parametrize("share", [0.005, 0.05])
def test_damaged_shards(share, tmp_path):
    prep_scenes.run(prep_scenes.Config(out=str(tmp_path / "d"), train=800, val=1, test=32, size=32))
    count = damage(tmp_path / "d", share)
    assert count == int(800 * share)
    done = inside(vlm_module(), "--preset", "smoke", "--arms", "infonce", "--data", tmp_path / "d", "--out_dir", tmp_path / "r")
    if share < 0.01:
        assert done.returncode == 0, done.stderr
    else:
        user_error(done, "damaged", "max_bad")


def vlm_module():
    from methods import vlm

    return vlm


def mutations(blob: bytes, count: int, seed: int):
    """Damaged copies: bytes changed, cut off, left out, repeated, swapped for special ones."""
    rng = random.Random(seed)
    special = [
        b"\0",
        b"\xff\xff\xff\xff",
        b"{",
        b'"',
        b"[" * 50,
        b"-1",
        b"NaN",
        b"1e999",
        b"null",
        b"../../",
        b"\n",
        b",",
        b"\t",
        b"\x80",
    ]
    for _ in range(count):
        out = bytearray(blob)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(max(1, len(out)))
            kind = rng.randrange(5)
            if kind == 0 and out:
                out[at] = rng.randrange(256)
            elif kind == 1:
                del out[at:]
            elif kind == 2:
                del out[at : at + rng.randrange(1, 40)]
            elif kind == 3:
                out[at:at] = out[at : at + rng.randrange(1, 60)]
            else:
                out[at : at + rng.randrange(0, 6)] = rng.choice(special)
        yield bytes(out)


def seeds(folder):
    """reader: (a good file's bytes, where the damaged one goes, what reads it)"""
    png = io.BytesIO()
    Image.fromarray(scenes.render([scenes.scene(1)], 32)[0]).save(png, format="PNG")
    prep_scenes.run(prep_scenes.Config(out=str(folder / "shards"), train=6, val=1, test=2, size=32))
    tar, manifest = next((folder / "shards").glob("train-*.tar")), folder / "shards/manifest.json"
    save_file({"a.weight": torch.zeros(3, 4), "b": torch.ones(2)}, folder / "w.safetensors", {"meta": json.dumps({"x": 1})})
    torch.save({"model": {"a": torch.zeros(3)}}, folder / "w.pt")
    Tokenizer.train(["a red star above a ring"] * 3, 540).save(folder / "merges.txt")
    annotations = {"images": [{"id": 1, "file_name": "1.png", "width": 32, "height": 32}], "categories": [{"id": 3, "name": "star"}],
                   "annotations": [{"image_id": 1, "caption": "a star"}, {"image_id": 1, "category_id": 3, "bbox": [1, 2, 9, 9], "iscrowd": 0}]}  # fmt: skip
    (folder / "pictures").mkdir()
    (folder / "pictures/1.png").write_bytes(png.getvalue())
    dci.write_toy(folder / "dci", 1, 1, 0)
    entry = next((folder / "dci/complete").glob("000000*.json"))
    ckpt.export(
        folder / "clip.safetensors",
        vit.CLIP(vit.ViT(32, 8, 16, 1, 2, out_dim=8), vit.TextTransformer(600, 12, 16, 1, 2, 8)).state_dict(),
    )

    def all_of(source):
        return [source.read(s, r) for s, n in enumerate(source.sizes) for r in range(n)]

    table = b'image,caption\n1.png,a star\n1.png,"a, ring"\n'
    prompts = b"Prompt\tCategory\tChallenge\tNote\na red star\tA\tB\tC\na ring above a star\tA\tB\tC\n"
    return {
        "png": (png.getvalue(), folder / "x.png", lambda p: data.decode_image(p.read_bytes(), "x.png")),
        "tar": (tar.read_bytes(), tar, lambda p: all_of(data.Shards(folder / "shards", "train"))),
        "manifest": (manifest.read_bytes(), manifest, lambda p: all_of(data.Shards(folder / "shards", "train"))),
        "safetensors": ((folder / "w.safetensors").read_bytes(), folder / "x.safetensors", lambda p: vae.read_tensors(p)),
        "weights": ((folder / "w.pt").read_bytes(), folder / "x.pt", lambda p: vit.read_weights(p)),
        "clip": ((folder / "clip.safetensors").read_bytes()[:6000], folder / "y.safetensors", lambda p: vit.load_clip(p)),
        "merges": ((folder / "merges.txt").read_bytes(), folder / "m.txt", lambda p: Tokenizer.load(p)),
        "clip merges": (gzip.compress((folder / "merges.txt").read_bytes(), mtime=0), folder / "m.gz", lambda p: Tokenizer.from_clip(p)),
        "captions": (table, folder / "t.csv", lambda p: captions.run(captions.Config(str(p), str(folder / "pictures"), str(folder / "out"), val=0, test=0))),
        "coco": (json.dumps(annotations).encode(), folder / "c.json",
                 lambda p: coco.run(coco.Config(annotations=str(p), images=str(folder / "pictures"), out=str(folder / "out")))),
        "dci": (entry.read_bytes(), entry, lambda p: dci.read_dci(folder / "dci", "train", 8)),
        "prompts": (prompts, folder / "p.tsv", lambda p: opt2i.read_tasks(str(p), 5)),
        "points": (b"model,knob,value,folder\na,guidance,1,pictures\na,guidance,2,pictures\n", folder / "points.csv",
                   lambda p: pareto_eval.read_points(p)),
    }  # fmt: skip


READERS = (
    "png",
    "tar",
    "manifest",
    "safetensors",
    "weights",
    "clip",
    "merges",
    "clip merges",
    "captions",
    "coco",
    "dci",
    "prompts",
    "points",
)


@pytest.mark.parametrize("reader", READERS)
def test_malformed_files_are_refused_in_one_sentence(reader, tmp_path):
    """500 damaged copies a reader: it reads them or says what is wrong; no other exception, no hang, nothing outside the folder."""
    blob, path, read = seeds(tmp_path)[reader]
    before = {p for p in tmp_path.parent.iterdir()}
    count = 500 if reader not in ("captions", "coco", "tar", "manifest") else 150
    refused, slowest = 0, 0.0
    for bad in mutations(blob, count, seed=len(reader)):
        path.write_bytes(bad)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        began = time.monotonic()
        try:
            read(path)
        except (ValueError, OSError) as error:
            refused += 1
            assert str(error), type(error)
        slowest = max(slowest, time.monotonic() - began)
    assert refused > count // 20 and slowest < 5
    assert {p for p in tmp_path.parent.iterdir()} == before
