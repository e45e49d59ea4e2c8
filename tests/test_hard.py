"""What goes wrong outside a program's control: processes die at any moment, disks fill, files are damaged.

The long ones run with `python -m pytest -m hard`; the others run always."""

import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from common import ckpt, data, dit, scenes, vae, vit
from common.tokenizer import Tokenizer
from data_prep import captions, cc12m, cifar100, coco, imagenet, wordnet
from data_prep import scenes as prep_scenes
from methods import clip_recipe, dci, dp_rdm, opt2i, pareto_eval, vlm, xsample
from tests.helpers import ROOT, clip_merges, damage, free_port, run, user_error

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
    **{f"data_prep/train_{n}.py": ["--preset", "smoke", "--steps", "8", "--save_every", "2"]
       for n in ("clip", "judge", "reader", "rewriter")},
    "data_prep/train_vqa.py": ["--preset", "smoke", "--steps", "300", "--save_every", "10"],  # steps are short
}  # fmt: skip


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

TRAIN = ("methods/vlm.py", "--preset", "smoke", "--arms", "infonce")


def launch(folder, *more, nodes=(), processes=2, train=TRAIN):
    where = nodes or (f"--master_port={free_port()}",)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *where, *train, "--out_dir",
               str(folder), *more]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)  # fmt: skip


def children(pid, script):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in found if script.encode() in Path(f"/proc/{c}/cmdline").read_bytes()]


def wait_for(name, folder, process, seconds=240, lines=0):
    """Until a file of this name with so many lines is anywhere in the folder -> its path."""
    end = time.monotonic() + seconds
    while not (found := [p for p in folder.rglob(name) if not lines or p.read_bytes().count(b"\n") >= lines]):
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()[-3000:]
        time.sleep(0.02)
    return found[0]


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


def a_rank_dies(folder, script, *more):
    p = launch(folder, *more, "--steps", "100000", "--save_every", "2", train=(script, *SCRIPTS[script]))
    path = wait_for("last.pt", folder, p)
    os.kill(children(p.pid, script)[1], signal.SIGKILL)
    _, text = p.communicate(timeout=120)
    assert p.returncode != 0 and "Signal 9" in text
    said = [line for line in text.splitlines() if "[rank0]" in line or "error: " in line]  # by the surviving rank
    assert any("another process of this run has died" in line for line in said), text[-3000:]
    assert "[rank0]" not in text
    saved = torch.load(path, weights_only=True)
    assert saved["step"] >= 2 and saved["step"] % 2 == 0


def test_a_dead_rank_ends_the_run_with_a_sentence_and_the_checkpoint_is_whole(tmp_path):
    a_rank_dies(tmp_path / "r", "methods/vlm.py", "--arms", "infonce", "--log_every", "1")


@hard
@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "methods/vlm.py"])
def test_a_dead_rank_of_any_script(script, tmp_path):
    a_rank_dies(tmp_path / "r", script)


@hard
@pytest.mark.parametrize("script", SCRIPTS)
def test_sigterm_to_torchrun_saves_and_the_run_goes_on(script, tmp_path):
    """Between two checkpoints, of which there would be none: the one that is found was written because of the signal."""
    steps = 300 if "vqa" in script else 30
    more, train = ["--steps", str(steps), "--save_every", "1000", "--log_every", "1"], (script, *SCRIPTS[script])
    p = launch(tmp_path / "r", *more, train=train)
    log = wait_for("log.jsonl", tmp_path / "r", p, lines=3)
    p.terminate()
    _, text = p.communicate(timeout=240)
    saved = torch.load(log.parent / "last.pt", weights_only=True)
    assert 0 < saved["step"] < steps and "is saved" in text, text[-2000:]  # the traceback there is torchrun's own
    for name in ("r", "whole"):
        again = launch(tmp_path / name, *more, train=train)
        assert again.wait(400) == 0, again.stderr.read()[-2000:]
    assert results(tmp_path / "r") == results(tmp_path / "whole")


# Damaged data ----------------------------------------------------------------------------------------------------------------


READ_SHARDS = {  # script: arguments that make it read enough pictures
    "methods/vlm.py": ["--preset", "smoke", "--arms", "infonce"],
    "methods/clip_recipe.py": ["--preset", "smoke", "--extra", "none", "--recipe", "plain", "--steps", "80"],
    "methods/xsample.py": ["--preset", "smoke", "--method", "simclr", "--images_per_class", "0"],
    "methods/semisup_cluster.py": ["--preset", "smoke", "--method", "sup"],
    "data_prep/train_vae.py": ["--steps", "25", "--batch_size", "32"],
    "data_prep/cache_latents.py": ["--size", "32"],
    "methods/dci.py": ["--preset", "smoke", "--arms", "dense"],
    "methods/dp_rdm.py": ["--preset", "smoke", "--public", "DATA", "--private", "DATA"],
    "data_prep/train_clip.py": ["--batch_size", "8", "--width", "16", "--depth", "2", "--steps", "3", "--tokenizer", "MERGES"],
}


def with_damage(script, share, tmp_path):
    prep_scenes.run(prep_scenes.Config(out=str(tmp_path / "d"), train=800, val=1, test=32, size=32))
    assert damage(tmp_path / "d", share) == int(800 * share)
    out, named = "--out" if "cache" in script else "--out_dir", {"DATA": tmp_path / "d", "MERGES": tmp_path / "merges.txt"}
    clip_merges(named["MERGES"])
    more = [] if "DATA" in READ_SHARDS[script] else ["--data", tmp_path / "d"]
    done = run(script, *[named.get(a, a) for a in READ_SHARDS[script]], *more, out, tmp_path / "r")
    if share < 0.01:
        assert done.returncode == 0, done.stderr
    else:
        user_error(done, "damaged")


@pytest.mark.parametrize("share", [0.005, 0.05])
def test_damaged_shards(share, tmp_path):
    with_damage("methods/vlm.py", share, tmp_path)


@hard
@pytest.mark.parametrize("script", [s for s in READ_SHARDS if s != "methods/vlm.py"])
@pytest.mark.parametrize("share", [0.005, 0.05])
def test_damaged_shards_of_any_script(script, share, tmp_path):
    with_damage(script, share, tmp_path)


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
        "clip_merges": (gzip.compress((folder / "merges.txt").read_bytes(), mtime=0), folder / "m.gz", lambda p: Tokenizer.from_clip(p)),
        "captions": (table, folder / "t.csv", lambda p: captions.run(captions.Config(str(p), str(folder / "pictures"), str(folder / "out"), val=0, test=0))),
        "coco": (json.dumps(annotations).encode(), folder / "c.json",
                 lambda p: coco.run(coco.Config(annotations=str(p), images=str(folder / "pictures"), out=str(folder / "out")))),
        "dci": (entry.read_bytes(), entry, lambda p: dci.read_dci(folder / "dci", "train", 8)),
        "prompts": (prompts, folder / "p.tsv", lambda p: opt2i.read_tasks(str(p), 5)),
        "points": (b"model,knob,value,folder\na,guidance,1,pictures\na,guidance,2,pictures\n", folder / "points.csv",
                   lambda p: pareto_eval.read_points(p)),
        **more_seeds(folder),
    }  # fmt: skip


def packed_tar(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, blob in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    return out.getvalue()


def mosaic():
    out = io.BytesIO()
    Image.fromarray(np.zeros((32, 800, 3), np.uint8)).save(out, format="PNG")
    return out.getvalue()


def rated(path):
    Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    return pareto_eval.against_people(path.parent)


def as_bytes(write, name):
    write(name)
    return name.read_bytes()


def more_seeds(folder):
    """Weights, tables and lists that only one script reads."""
    few = dict(ch=8, mult=(1, 2), groups=4)
    vae_file = as_bytes(lambda p: ckpt.export(p, vae.VAE(**few).state_dict()), folder / "vae.safetensors")
    dit_file = as_bytes(lambda p: ckpt.export(p, dit.DiT(4, 2, 4, 16, 1, 2).state_dict()), folder / "dit.safetensors")
    dino_file = as_bytes(lambda p: ckpt.export(p, {
        k.replace("patch_embed.", "patch_embed.proj."): v for k, v in vit.ViT(32, 8, 64, 1, 1).state_dict().items()}), folder / "dino.safetensors")  # fmt: skip
    cfg, layer = xsample.Config(), torch.nn.Linear(3, 3)
    last = as_bytes(lambda p: ckpt.save(p, 4, cfg, model=layer), folder / "last.pt")
    batch = {b"data": np.zeros((5, 3072), np.uint8), b"fine_labels": list(range(5)), b"coarse_labels": [0, 0, 1, 1, 1]}
    names = {b"fine_label_names": [b"a", b"b", b"c", b"d", b"e"], b"coarse_label_names": [b"x", b"y"]}
    archive = packed_tar({f"cifar/{n}": pickle.dumps(v, 2) for n, v in {"train": batch, "test": batch, "meta": names}.items()})
    for split in ("train", "test"):
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as z:
            for name in "ab":
                z.writestr(f"{name}.png", mosaic())
    out = dict(out=str(folder / "out"))
    labels = {"fine": ["a", "b"], "coarse": ["x"], "fine_to_coarse": [0, 0]}
    from_archive = cifar100.Config(archive=str(folder / "c.tar"), **out)
    from_mosaics = cifar100.Config(
        train_zip=str(folder / "train.zip"), test_zip=str(folder / "test.zip"), labels=str(folder / "l.json"), **out
    )
    (folder / "latents").mkdir()
    part = {
        "mean": torch.zeros(2, 4, 4, 4),
        "logvar": torch.zeros(2, 4, 4, 4),
        "controls": torch.zeros(2, 7),
        "label": torch.tensor([0, 1]),
    }
    shard, manifest = folder / "latents/train-000000.safetensors", folder / "latents/manifest.json"
    ckpt.export(shard, part, captions=[["a"], ["b"]])
    entry = {"name": shard.name, "split": "train", "count": 2}
    manifest.write_text(json.dumps({"vae": "v", "classes": ["x", "y"], "size": 32, "shards": [entry], "complete": True}))

    def latents(_):
        source = data.Latents(folder / "latents", "train", "v")
        return [source.read(s, r) for s, n in enumerate(source.sizes) for r in range(n)]

    bank = as_bytes(lambda p: np.save(p, np.ones((3, 4), np.float32)), folder / "b.npy")
    ledger = b'{"budget": 10.0, "delta": 1e-05, "bank": "b"}\n{"q": 0.5, "z": 3.0, "queries": 4}\n'
    (folder / "mappings").mkdir()
    for name, value in (("folder_to_objectnet_label.json", {"chair": "Chair"}), ("objectnet_to_imagenet_1k.json", {"Chair": "seat; stool"}),
                        ("pytorch_to_imagenet_2012_id.json", {"7": 0, "8": 1})):  # fmt: skip
        (folder / "mappings" / name).write_text(json.dumps(value))
    (folder / "mappings/imagenet_to_label_2012_v2").write_text("seat\nstool\n")
    objectnet = folder / "mappings/objectnet_to_imagenet_1k.json"
    for name in ("mplug", "instructblip", "pali17b"):
        with gzip.open(folder / f"vqa_{name}_dsg.csv.gz", "wt") as f:
            f.write("t2i_model,item_id,question_id,dependency_id,answer\nm,a,1,0,yes\nm,a,2,1,no\nm,b,1,0,no\n")
    ratings = b"t2i_model,item_id,answer\nm,a,4\nm,b,2\n"
    crepe = b"kind,file,caption,negative_caption\nswap,1.png,a star,a ring\nswap,2.png,a box,a ring\n"
    return {
        "vae": (vae_file, folder / "v.safetensors", lambda p: vae.load_vae(p)),
        "dit": (dit_file, folder / "d.safetensors", lambda p: dit.load_dit(p, **dict(zip(("dim", "depth", "heads"), (16, 1, 2))))),
        "dino": (dino_file, folder / "o.safetensors", lambda p: vit.load_dino(p)),
        "checkpoint": (last, folder / "l.pt", lambda p: ckpt.resume(p, cfg, model=layer)),
        "cc12m": (b"http://a.b/c.png\ta star\n", folder / "c.tsv", lambda p: cc12m.read_table(p, 0)),
        "cifar_archive": (archive, folder / "c.tar", lambda p: cifar100.run(from_archive)),
        "cifar_labels": (json.dumps(labels).encode(), folder / "l.json", lambda p: cifar100.run(from_mosaics)),
        "class_names": (b'[{"wnid": "n01", "names": "a star"}]', folder / "n.json", lambda p: imagenet.read_names(str(p))),
        "class_prompts": (b'{"K": {"classes": ["a"], "templates": ["a {}", "one {}"]}}', folder / "q.json", lambda p: imagenet.read_prompts(f"{p}:K")),
        "synsets": (b"00001740 03 n 02 entity 0 thing 0 000 | that\n", folder / "data.noun", lambda p: list(wordnet.synsets(p.read_text("utf-8", "replace"), "x"))),
        "synonyms": (b"big\tlarge,huge\n", folder / "s.tsv", lambda p: clip_recipe.read_synonyms(p)),
        "latents": (shard.read_bytes(), shard, latents),
        "latents_manifest": (manifest.read_bytes(), manifest, latents),
        "sugarcrepe": (crepe, folder / "crepe.csv", lambda p: vlm.read_sugarcrepe(p, ["1", "2"])),
        "answers": (b"file,question_id,dependency_id,answer\n1.png,1,0,yes\n1.png,2,1,no\n", folder / "a.csv", lambda p: pareto_eval.read_answers(p)),
        "ratings": (ratings, folder / "tifa160_likert.csv", lambda p: rated(p)),
        "exchanges": (b'{"task": 1, "attempt": 0, "key": "k", "answer": "a"}\n', folder / "e.jsonl", lambda p: opt2i._read_exchanges(p)),
        "ledger": (ledger, folder / "ledger", lambda p: dp_rdm.Ledger(p, 10.0, 1e-5, "b").spent()),
        "bank": (bank, folder / "bank.npy", lambda p: dp_rdm.read_bank(p)),
        "embeddings": (bank, folder / "e.npy", lambda p: np.array(xsample.read_embeddings(p, ["a", "b", "c"]))),
        "tree": (b"animal/dog\nanimal/cat\n", folder / "t.txt", lambda p: xsample.read_tree(p, 2)),
        "real": (b"[[1], [], [2, 3]]", folder / "real.json", lambda p: xsample.read_real(p, 3)),
        "in9": (json.dumps({str(i): i % 9 for i in range(1000)}).encode(), folder / "in_to_in9.json", lambda p: xsample.read_in9(folder)),
        "objectnet": (objectnet.read_bytes(), objectnet, lambda p: xsample.objectnet_classes(folder)),
    }  # fmt: skip


READERS = """png tar manifest safetensors weights clip vae dit dino checkpoint merges clip_merges captions coco cc12m cifar_archive
    cifar_labels class_names class_prompts synsets synonyms latents latents_manifest dci sugarcrepe prompts points answers ratings
    exchanges ledger bank embeddings tree real in9 objectnet""".split()


@pytest.mark.parametrize("reader", READERS)
def test_malformed_files_are_refused_in_one_sentence(reader, tmp_path):
    """500 damaged copies a reader: it reads them or says what is wrong; no other exception, no hang, nothing outside the folder."""
    blob, path, read = seeds(tmp_path)[reader]
    before = {p for p in tmp_path.parent.iterdir()}
    count = 500
    refused, slowest = 0, 0.0
    for bad in mutations(blob, count, seed=len(reader)):
        path.write_bytes(bad)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        began = time.process_time()
        try:
            read(path)
        except (ValueError, OSError) as error:
            refused += 1
            assert str(error), type(error)
        slowest = max(slowest, time.process_time() - began)
    assert refused > count // 20 and slowest < 5
    assert {p for p in tmp_path.parent.iterdir()} == before
