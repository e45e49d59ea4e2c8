"""Running scripts as a user does, and functions in several processes."""

import contextlib
import importlib
import io
import itertools
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp

from common import zoo

ROOT = Path(__file__).resolve().parent.parent
METHODS = sorted(p.stem for p in (ROOT / "methods").glob("[a-z]*.py"))
# Processes of in_processes() are forked from one that has read everything, which takes a process of its own seconds
mp.set_forkserver_preload(["pytest", "tests.helpers", "common.vision", *(f"methods.{name}" for name in METHODS)])


def run(*args, cwd=ROOT, timeout=300, **env):
    """python ARGS -> CompletedProcess with text output."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, timeout=timeout, capture_output=True, text=True, env={**os.environ, **env})


def inside(module, *args):
    """What run() gives for a script's module, without starting a process, which takes seconds."""
    from common import cli

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            work = module.run if hasattr(module, "run") else module.train
            cli.main(work, module.Config, getattr(module, "PRESETS", None), [str(a) for a in args])
        except SystemExit as leave:
            code = leave.code
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def torchrun(n, *args, cwd=ROOT, timeout=300):
    return run("-m", "torch.distributed.run", f"--nproc_per_node={n}", f"--master_port={free_port()}", *args,
               cwd=cwd, timeout=timeout, OMP_NUM_THREADS="1")  # fmt: skip


def user_error(result, *words):
    """The run ended with status 2 and one sentence that has all the words, without a traceback."""
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    assert "error: " in last and all(w in last for w in words), last


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _worker(rank, world, port, function, args, path):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    from common import ddp

    env = ddp.start(0)
    torch.save(function(env, *args), f"{path}/{rank}.pt")
    ddp.stop()


def in_processes(world, function, *args, path):
    """function(env, *args) in `world` gloo processes -> list of results by rank."""
    mp.start_processes(_worker, (world, free_port(), function, args, str(path)), nprocs=world, start_method="forkserver")
    return [torch.load(f"{path}/{rank}.pt", weights_only=True) for rank in range(world)]


def _script(env, name, args):
    done = inside(importlib.import_module(name), *args)
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr}


def both(module, *args):
    """What torchrun(2) gives for a script's module, from two processes that have read torch already: its first process's words."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = in_processes(2, _script, module.__name__, [str(a) for a in args], path=folder)
    return subprocess.CompletedProcess(args, first["code"] or second["code"], first["out"], first["err"] or second["err"])


def clip_merges(path):
    """A file of as many merges as CLIP's, of pairs of bytes."""
    pairs = itertools.islice(itertools.product(zoo.load_tokenizer().symbols[:256], repeat=2), 48_894)
    path.write_text("\n".join(["#version: 0.2", *(" ".join(p) for p in pairs)]) + "\n")


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
