"""Checkpoints: atomic, tensors and plain data only, refused when they belong to another configuration.

    save(path, step, cfg, model=.., opt=.., extra={..})     rank 0 calls it
    step, extra = resume(path, cfg, model=.., opt=..)       (0, {}) when there is none, or cfg.resume is False
    export(path, state_dict, **meta)                        weights alone, as safetensors

Resume is exact because nothing else has a state: data order, augmentation and dropout are functions of
(seed, rank, step), schedules are functions of the step.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

# Fields that may change between a run and its continuation without changing the result; those that change what a trained
# model is tested on; and paths, of which so many last parts are compared: folders may move.
FREE = {"out_dir", "workers", "log_every", "save_every", "resume", "max_bad", "ask", "question"}
TESTED_ON = {"eval_data", "sugarcrepe", "photos", "references", "probe_data", "probe", "probe_l2", "probe_steps", "real",
             "in9", "objectnet", "mit_states", "eval_images", "shots", "inception"}  # fmt: skip
PATHS = {**dict.fromkeys((*TESTED_ON, "data", "after"), 1), **dict.fromkeys(("embeddings", "tree", "tokenizer", "synonyms"), 2),
         **dict.fromkeys(("init", "vae", "text_encoder"), 3)}  # fmt: skip


def _replace(path, write) -> None:
    """write(temporary name), sync, rename: readers see the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    try:
        write(str(tmp))
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(tmp, 0o666 & ~mask)  # safetensors lets nobody but the owner read
        os.replace(tmp, path)
    except BaseException as error:
        tmp.unlink(missing_ok=True)
        # how torch.save and safetensors say that the disk is full
        if isinstance(error, SafetensorError) or re.search("PytorchStreamWriter|unexpected pos", str(error)):
            raise OSError(f"cannot write {path}: the disk is full or not writable; the file before it is whole "
                          f"({str(error)[:200]})") from error  # fmt: skip
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def save(path, step: int, cfg, extra: dict | None = None, **objects) -> None:
    """step: updates done so far. objects: anything with state_dict()."""
    state = {k: o.state_dict() for k, o in objects.items()}
    data = dict(step=step, config=asdict(cfg), extra=extra or {}, **state)
    _replace(path, lambda tmp: torch.save(data, tmp))


def _on_all(path) -> bool:
    """Whether the file exists. Rank 0 writes, all ranks read: nodes with disks of their own would start at different steps."""
    found = [os.path.exists(path)] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(found) > 1:
        dist.all_gather_object(found, found[0])
    if len(set(found)) > 1:
        raise ValueError(f"{path} exists for {sum(found)} of {len(found)} processes: --out_dir must be on a disk that all see")
    return found[0]


def resume(path, cfg, **objects) -> tuple[int, dict]:
    """Loads into the objects and returns (updates done, extra). ValueError if the checkpoint's settings differ. A run that
    shall not go on from it throws it away: killed early, the run would else go on from the old one at its next start."""
    if not cfg.resume:
        Path(path).unlink(missing_ok=True)
        return 0, {}
    if not _on_all(path):
        return 0, {}
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        old = dict(data["config"])
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of this project ({type(error).__name__}); move it away") from error
    new, differ = asdict(cfg), differences(old, cfg, FREE | TESTED_ON)
    if differ:
        what = ", ".join(f"{k} was {old.get(k)!r} and is now {new.get(k)!r}" for k in differ[:3])
        raise ValueError(f"{path} holds a run with other settings ({what}); choose another --out_dir or --no-resume")
    try:
        for key, obj in objects.items():
            obj.load_state_dict(data[key])
        return data["step"], data["extra"]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {str(error)[:200]}); move it away") from error


def differences(old: dict, cfg, free: set = FREE) -> list[str]:
    """Settings of a saved config.json that cfg changes; those in `free` do not count."""

    def same(k, a, b):
        if k not in PATHS or not isinstance(a, str) or not isinstance(b, str):
            return a == b
        if k == "init":  # of a phase before, in the same folder, which may have another name now
            runs = [(Path(v), Path(out).parent) for v, out in ((a, old.get("out_dir", "")), (b, cfg.out_dir))]
            a, b = (v.relative_to(run) if v.is_relative_to(run) else v for v, run in runs)
        a, b = (Path(v).parts[-PATHS[k] :] for v in (a, b))
        n = min(len(a), len(b))
        return a == b or n > 0 and a[-n:] == b[-n:]

    return [k for k, v in asdict(cfg).items() if k not in free and not same(k, old.get(k), v)]


def once(train, cfg) -> dict:
    """train(cfg), or metrics.json of the run in cfg.out_dir, if it ended with these settings and cfg.resume is set."""
    done, config = (Path(cfg.out_dir, name) for name in ("metrics.json", "config.json"))
    if cfg.resume and _on_all(done) and not differences(json.loads(config.read_text()), cfg):
        return json.loads(done.read_text())
    return train(cfg)


def export(path, state_dict: dict[str, torch.Tensor], **meta) -> None:
    """Weights only, contiguous on the CPU, with meta as JSON in the file's metadata."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state_dict.items()}
    # One entry: safetensors writes several in random order, and equal runs should give equal bytes
    _replace(path, lambda tmp: save_file(tensors, tmp, metadata={"meta": json.dumps(meta, sort_keys=True)}))
