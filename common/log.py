"""A run owns one directory: config.json, log.jsonl, metrics.json, samples/*.png, curves.png, last.pt, model.safetensors.

log = RunLog(cfg, env, name)         writes config.json, opens log.jsonl and the progress bar
log.write(step, loss=.., lr=..)      one JSON object a line; floats only; the bar shows loss and rate
log.finish(metrics)                  metrics.json, flat; its presence means that the run is done
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


def write_json(path, data) -> None:
    """Atomic: a kill or a full disk leaves the old file whole."""
    tmp = Path(f"{path}.tmp")
    with open(tmp, "w") as f:
        json.dump(data, f, indent=1)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def commit() -> str:
    """The checkout's commit, with '+' if files differ from it; '' outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else ""


def versions() -> dict[str, str]:
    return dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__, commit=commit())


class RunLog:
    """Only rank 0 writes. dir: the run directory; name: what the bar calls the run."""

    def __init__(self, cfg, env, name: str = "", start: int = 0):
        self.dir, self.name, self.main, self.total = Path(cfg.out_dir), name, env.is_main, cfg.steps
        self.began, self.first, self.per_step, self.shown = time.monotonic(), start, cfg.batch_size, ""
        if not self.main:
            return
        (self.dir / "samples").mkdir(parents=True, exist_ok=True)
        (self.dir / "metrics.json").unlink(missing_ok=True)  # not done any more
        write_json(self.dir / "config.json", {**asdict(cfg), "processes": env.world, "versions": versions()})
        path = self.dir / "log.jsonl"
        lines = _lines(path)
        with open(f"{path}.tmp", "w") as f:  # a resumed run goes on after its checkpoint; later lines are written again
            f.writelines(json.dumps(line) + "\n" for line in lines if line["step"] < start)
        os.replace(f"{path}.tmp", path)
        self.file = open(path, "a")  # noqa: SIM115
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # several runs may share a process
        pause = 0.5 if sys.stderr.isatty() else 20  # seconds; a log file wants few lines
        self.bar = tqdm(total=self.total, initial=start, desc=name, unit="step", dynamic_ncols=True, mininterval=pause)

    def tick(self, step: int) -> None:
        """Once a step, after it: moves the bar. What follows the last one, without steps, is the evaluation."""
        if self.main:
            self.bar.update(step + 1 - self.bar.n)
            if step + 1 == self.total:
                self.bar.set_postfix_str(f"{self.shown}, evaluating")

    def write(self, step: int, **values: float) -> None:
        """Training speed (items/s over all processes) and memory are added to a line that has a loss."""
        if not self.main:
            return
        line = {"step": step, **{k: float(v) for k, v in values.items()}}
        if "loss" in line:
            seconds = time.monotonic() - self.began
            line["items_per_s"] = round((step + 1 - self.first) * self.per_step / max(seconds, 1e-9), 2)
            line["seconds"] = round(seconds, 2)
            if torch.cuda.is_available():
                line["mem_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
            self.shown = f"loss {line['loss']:.3f}, {line['items_per_s']:.0f} items/s"
            self.bar.set_postfix_str(self.shown, refresh=False)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def close(self) -> None:
        if self.main:
            self.bar.set_postfix_str(self.shown, refresh=False)
            self.bar.close()
            self.file.close()

    def finish(self, metrics: dict) -> None:
        """All processes call it; afterwards each may read what the run has written."""
        if self.main:
            self.close()
            write_json(self.dir / "metrics.json", metrics)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()


def _lines(path) -> list[dict]:
    out = []
    if os.path.exists(path):
        for line in Path(path).read_text().splitlines():
            try:
                line = json.loads(line)
                out.append({**line, "step": int(line["step"])})
            except (ValueError, TypeError, KeyError):  # the line that a kill cut short
                break
    return out


def history(folder, *keys) -> dict[str, tuple[list, list]]:
    """key -> (steps, values) of a run's log.jsonl, as far as written: for the curves."""
    lines = _lines(Path(folder, "log.jsonl"))
    return {k: ([x["step"] for x in lines if k in x], [x[k] for x in lines if k in x]) for k in keys}


def table(rows: list[list], head: list[str]) -> str:
    """Left-aligned text table for the terminal; floats with one decimal, None as an empty cell."""
    text = [["" if c is None else f"{c:.1f}" if isinstance(c, float) else str(c) for c in r] for r in [head, *rows]]
    widths = [max(len(r[i]) for r in text) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in text]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
