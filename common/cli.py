"""A dataclass is the command line: `main(run, Config, PRESETS)` parses it, runs it and turns user errors into one sentence.

--preset NAME     replaces defaults (without it: the defaults of Config, called "laptop")
--field value     wins over the preset; types come from the defaults; booleans are --field / --no-field
--help            every field with its end-of-line comment and its default
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import re
import sys
from dataclasses import MISSING, fields

from tqdm import tqdm

RANGES = {  # of the fields that all methods share: smallest and largest value
    "seed": (0, 2**31 - 1), "batch_size": (1, math.inf), "accum": (1, math.inf), "lr": (0, math.inf), "wd": (0, math.inf),
    "warmup": (0, math.inf), "grad_clip": (0, math.inf), "ema_decay": (0, 1),
    "workers": (0, math.inf), "log_every": (1, math.inf), "eval_every": (0, math.inf), "save_every": (1, math.inf),
    "max_bad": (0, 1),
}  # fmt: skip


def within(cfg, names: str, low, high=math.inf) -> None:
    """ValueError unless low <= value <= high for each of the fields, "steps accum"; NaN and infinity are outside."""
    for name in names.split():
        value = getattr(cfg, name)
        if not low <= value <= high or value == math.inf:
            raise ValueError(f"--{name} {value} must be " + (f"at least {low}" if high == math.inf else f"{low} to {high}"))


def choose(cfg, lists: str = "", **known) -> None:
    """ValueError unless each of these fields has a known value; of the fields named in `lists` every item of a comma list."""
    for name, values in known.items():
        given = getattr(cfg, name)
        for value in given.split(",") if name in lists.split() else [given]:
            if value not in values:
                raise ValueError(f"--{name} {value} is unknown; choose from {', '.join(str(v) or repr(v) for v in values)}")


def comments(Config) -> dict[str, str]:
    """field -> the comment behind it in the source: written once, read by --help."""
    found = re.findall(r"^    (\w+): [^\n]*?  # (.+)$", inspect.getsource(Config), re.MULTILINE)
    return dict(found)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}; --help lists all options\n")


def parse(Config, presets: dict[str, dict] | None = None, argv=None):
    """Command line -> Config. Exits with status 2 and one sentence on an unknown field or preset; ValueError for a value out of
    its range. A field without a default must be given."""
    doc = inspect.getdoc(inspect.getmodule(Config)) or ""
    parser = _Parser(description=doc.split("\n\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if presets:
        parser.add_argument("--preset", choices=list(presets), help="a set of defaults (without it: laptop)")
    notes = comments(Config)
    for f in fields(Config):
        text = notes.get(f.name, "").replace("%", "%%")
        if f.default is MISSING:
            parser.add_argument(f"--{f.name}", required=True, help=f"{text} (required)")
            continue
        text += f" (default: {f.default!r})".replace("%", "%%")
        if isinstance(f.default, bool):
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(f"--{f.name}", type=type(f.default), help=text, metavar=type(f.default).__name__)
    given = vars(parser.parse_args(argv))
    preset = presets[given.pop("preset", "laptop")] if presets else {}
    cfg = Config(**{**preset, **given})
    for name, (low, high) in RANGES.items():
        if hasattr(cfg, name):
            within(cfg, name, low, high)
    return cfg


def main(run, Config, presets=None, argv=None) -> None:
    """run(parse(...)). What a user can get wrong is raised as ValueError or OSError with a whole sentence; it is printed
    without a traceback, exit status 2. TRACEBACK=1 in the environment shows where it came from."""
    try:
        run(parse(Config, presets, argv))
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        for bar in list(getattr(tqdm, "_instances", ())):  # the sentence comes last, below the bars
            bar.close()
        print(f"error: {text}", file=sys.stderr, flush=True)
        sys.exit(2)
    except RuntimeError as error:  # how gloo and NCCL say that another process is gone
        lost = re.search(r"gloo|nccl|connection (closed|reset)", str(error), re.IGNORECASE)
        if os.environ.get("TRACEBACK") or not lost or "out of memory" in str(error):
            raise
        text = str(error).strip().splitlines()[0][:160]
        print("error: another process of this run has died or cannot be reached; the last checkpoint is whole: start all "
              f"processes again to go on from it ({text})", file=sys.stderr, flush=True)  # fmt: skip
        os._exit(1)  # leaving in order would wait for the dead one
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\nstopped; the same command goes on from what is saved", file=sys.stderr, flush=True)
        sys.exit(130)
