"""common/cli.py, log.py, ckpt.py, plot.py: the parts that every run leans on."""

import json
import math
import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from common import ckpt, cli, plot
from common import log as common_log
from common.ddp import Env
from common.log import RunLog, history, table, write_json

ENV = Env(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class InitConfig:
    out_dir: str
    init: str


@dataclass(frozen=True)
class Config:
    out_dir: str = "x"  # folder
    steps: int = 5  # updates, 50 % of them useless
    batch_size: int = 2  # items
    lr: float = 0.1  # rate
    fast: bool = False  # a switch
    data: str = ""  # folder
    resume: bool = True  # go on


def test_cli_merges_preset_and_flags(capsys):
    presets = {"laptop": {}, "smoke": {"steps": 1, "lr": 0.5}}
    assert cli.parse(Config, presets, []) == Config()
    assert cli.parse(Config, presets, ["--preset", "smoke", "--lr", "2", "--fast"]) == Config(steps=1, lr=2.0, fast=True)
    assert cli.parse(Config, presets, ["--no-fast"]).fast is False
    for argv, words in (
        (["--bogus", "1"], "--bogus"),
        (["--preset", "huge"], "huge"),
        (["--steps", "x"], "invalid int"),
        (["--step", "1"], "--step"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.parse(Config, presets, argv)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and words in said and said.startswith("error: ") and said.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.parse(Config, presets, ["--help"])
    text = capsys.readouterr().out
    assert "updates, 50 % of them useless (default: 5)" in text and "a switch" in text


def test_cli_turns_user_errors_into_one_sentence(capsys):
    def run(cfg):
        raise ValueError("the thing is wrong; mend it")

    with pytest.raises(SystemExit) as stop:
        cli.main(run, Config, {"laptop": {}}, [])
    assert stop.value.code == 2 and capsys.readouterr().err == "error: the thing is wrong; mend it\n"

    def unwritable(cfg):
        open("/proc/nope/x", "w")

    with pytest.raises(SystemExit) as stop:
        cli.main(unwritable, Config, {"laptop": {}}, [])
    assert stop.value.code == 2 and "/proc/nope/x" in capsys.readouterr().err


def test_required_fields(capsys):
    @dataclass(frozen=True)
    class Needs:
        out: str  # folder
        n: int = 1  # number

    assert cli.parse(Needs, None, ["--out", "a"]) == Needs("a")
    with pytest.raises(SystemExit):
        cli.parse(Needs, None, [])
    assert "--out" in capsys.readouterr().err


def state(seed):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    opt = torch.optim.AdamW(model.parameters(), 0.1)
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    return model, opt


def test_checkpoint_round_trip_is_exact(tmp_path):
    cfg, (model, opt) = Config(), state(0)
    ckpt.save(tmp_path / "last.pt", 3, cfg, {"best": 1.5}, model=model, opt=opt)
    other, opt2 = state(1)
    assert ckpt.resume(tmp_path / "last.pt", cfg, model=other, opt=opt2) == (3, {"best": 1.5})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    for key, moments in opt.state_dict()["state"].items():
        assert all(torch.equal(v, opt2.state_dict()["state"][key][k]) for k, v in moments.items())
    assert ckpt.resume(tmp_path / "none.pt", cfg, model=other) == (0, {})


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    cfg, (model, _) = Config(), state(0)
    ckpt.save(tmp_path / "last.pt", 3, cfg, model=model)
    assert ckpt.resume(tmp_path / "last.pt", replace(cfg, out_dir="elsewhere"), model=model)[0] == 3
    with pytest.raises(ValueError, match="lr was 0.1 and is now 0.2.*--no-resume"):
        ckpt.resume(tmp_path / "last.pt", replace(cfg, lr=0.2), model=model)
    assert not ckpt.differences({**cfg.__dict__, "processes": 1}, cfg)
    assert ckpt.differences({**cfg.__dict__, "lr": 9}, cfg) == ["lr"]
    old = {**cfg.__dict__, "data": "here/photos"}  # data may move, but not become others
    assert not ckpt.differences(old, replace(cfg, data="/mnt/photos")) and ckpt.differences(old, replace(cfg, data=""))
    then = InitConfig(out_dir="runs/a/suave", init="runs/a/ssl/model.safetensors")  # of a phase before: the folder is renamed
    old = dict(then.__dict__)
    assert not ckpt.differences(old, replace(then, out_dir="runs/b/suave", init="runs/b/ssl/model.safetensors"))
    old = {**old, "init": "seed0/attn/model.safetensors"}
    assert not ckpt.differences(old, replace(then, init="/mnt/seed0/attn/model.safetensors"))
    assert ckpt.differences(old, replace(then, init="seed1/attn/model.safetensors"))
    assert ckpt.differences(old, replace(then, init=""))
    # --no-resume: the old checkpoint is gone, or a run that was killed early would go on from it at its next start
    assert ckpt.resume(tmp_path / "last.pt", replace(cfg, resume=False), model=model) == (0, {})
    assert ckpt.resume(tmp_path / "last.pt", cfg, model=model) == (0, {})
    (tmp_path / "bad.pt").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="not a checkpoint"):
        ckpt.resume(tmp_path / "bad.pt", cfg, model=model)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    cfg, (model, _) = Config(), state(0)
    path = tmp_path / "last.pt"
    ckpt.save(path, 1, cfg, model=model)
    before = path.read_bytes()

    class Broken:
        def state_dict(self):
            return {"x": lambda: 0}  # cannot be pickled

    with pytest.raises(Exception, match="pickle"):
        ckpt.save(path, 2, cfg, model=Broken())
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_full_disk_is_one_sentence(tmp_path):
    model = nn.Linear(800, 800)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(OSError, match="disk is full"):
        ckpt._replace(tmp_path / "last.pt", lambda tmp: torch.save(model.state_dict(), "/dev/full"))
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_export_has_metadata(tmp_path):
    from safetensors import safe_open

    ckpt.export(tmp_path / "m.safetensors", nn.Linear(2, 2).state_dict(), step=3)
    with safe_open(tmp_path / "m.safetensors", "pt") as f:
        assert f.metadata() == {"meta": '{"step": 3}'} and set(f.keys()) == {"weight", "bias"}


def test_log_is_one_json_object_a_line_and_resumes(tmp_path):
    cfg = Config(out_dir=str(tmp_path))
    log = RunLog(cfg, ENV)
    for s in range(4):
        log.write(s, loss=torch.tensor(float(s)))
        log.tick(s)
    log.close()
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # killed in the middle of a line
    log = RunLog(cfg, ENV, start=2)
    log.write(2, loss=9.0)
    log.finish({"a": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(x["step"], x["loss"]) for x in lines] == [(0, 0.0), (1, 1.0), (2, 9.0)] and "items_per_s" in lines[0]
    assert history(log.dir, "loss")["loss"] == ([0, 1, 2], [0.0, 1.0, 9.0])
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["lr"] == 0.1 and saved["versions"]["torch"] == torch.__version__
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1.0}


def test_only_rank_zero_writes(tmp_path):
    log = RunLog(Config(out_dir=str(tmp_path / "r1")), Env(1, 2, torch.device("cpu")))
    log.write(0, loss=1.0)
    log.finish({})
    assert not (tmp_path / "r1").exists()


def test_table_aligns():
    assert table([["a", 1.26, None], ["long", "x", 2]], ["name", "v", "w"]).splitlines() == [
        "name  v    w", "----  ---  -", "a     1.3", "long  x    2"]  # fmt: skip


def test_pictures_have_the_right_pixels(tmp_path):
    red, blue = np.full((4, 4, 3), (255, 0, 0), np.uint8), np.full((4, 4, 3), (0, 0, 255), np.uint8)
    img = plot.grid([red, blue, red], 2, ["a " * 60, "b", "c"], [None, (0, 255, 0), None], "title", cell=40)
    a = np.asarray(img)
    assert (a[38 + 20, 10 + 20] == (255, 0, 0)).all() and (a[38 + 20, 10 + 50 + 20] == (0, 0, 255)).all()
    assert (a == (0, 255, 0)).all(-1).sum() > 100  # the frame
    chart = plot.lines(
        {"up": ([0, 1, 2], [0.0, 1.0, 2.0]), "nan": ([0, 1], [float("nan"), 1.0]), "none": ([], [])}, "t", y="loss"
    )
    ink = np.asarray(chart)
    xs = [np.nonzero(np.abs(ink[y].astype(int) - plot.PALETTE[0]).sum(-1) < 60)[0] for y in range(60, 400)]
    xs = [x[x < 600].mean() for x in xs if (x < 600).any()]
    assert len(xs) > 100 and np.corrcoef(xs, -np.arange(len(xs)))[0, 1] > 0.95  # rises from left to right
    plot.save(chart, tmp_path / "c.png")
    assert [p.name for p in tmp_path.iterdir()] == ["c.png"]
    plot.lines({})


# By hand ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluated(Config):
    eval_data: str = ""  # changes what is tested, not what is trained


def test_files_are_synced_before_they_get_their_names(tmp_path, monkeypatch):
    calls, fsync, move = [], os.fsync, os.replace

    def kind(f):
        return "folder" if os.path.isdir(f"/proc/self/fd/{f}") else "file"

    monkeypatch.setattr(os, "fsync", lambda f: calls.append(kind(f)) or fsync(f))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("rename") or move(a, b))
    ckpt.export(tmp_path / "m.safetensors", {"a": torch.zeros(2)})
    assert calls == ["file", "rename", "folder"]
    calls.clear()
    write_json(tmp_path / "a.json", {"a": 1})
    assert calls == ["file", "rename"]
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_exports_are_readable_by_the_group_and_equal_for_equal_settings(tmp_path):
    before = os.umask(0o027)
    try:
        for name, meta in (("a", dict(x=1, y=2)), ("b", dict(y=2, x=1))):
            ckpt.export(tmp_path / name, {"a": torch.zeros(2)}, **meta)
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    finally:
        now = os.umask(before)
    assert now == 0o027 and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_run_that_is_done_is_read_back_and_any_other_begins(tmp_path):
    cfg = Evaluated(out_dir=str(tmp_path))

    def begins(cfg, **changes):
        return ckpt.once(lambda cfg: {"new": 1}, replace(cfg, **changes)) == {"new": 1}

    assert begins(cfg)
    write_json(tmp_path / "metrics.json", {"old": 1})
    write_json(tmp_path / "config.json", {**cfg.__dict__, "processes": 1})
    assert ckpt.once(None, cfg) == {"old": 1} and not begins(cfg)
    assert begins(cfg, lr=0.2) and begins(cfg, eval_data="other") and begins(cfg, resume=False)
    write_json(tmp_path / "config.json", {k: v for k, v in cfg.__dict__.items() if k != "lr"})
    assert begins(cfg)  # a field that the old run did not have yet
    model = nn.Linear(3, 2)
    ckpt.save(tmp_path / "last.pt", 3, cfg, model=model)
    assert ckpt.resume(tmp_path / "last.pt", replace(cfg, eval_data="other"), model=model)[0] == 3  # trained the same


def test_ranges_and_choices():
    cfg = Config(lr=math.nan)
    for value, words in ((math.nan, "nan"), (math.inf, "inf"), (-1.0, "at least 0")):
        with pytest.raises(ValueError, match=words):
            cli.within(replace(cfg, lr=value), "steps lr", 0)
    with pytest.raises(ValueError, match="--lr 3.0 must be 0 to 2"):
        cli.within(Config(lr=3.0), "lr", 0, 2)
    cli.within(Config(lr=2.0), "steps lr", 0, 5)
    for argv, words in ((["--batch_size", "0"], "--batch_size 0 must be at least 1"), (["--lr", "nan"], "--lr nan")):
        with pytest.raises(ValueError, match=words):
            cli.parse(Config, None, argv)
    cli.choose(Config(data="a,b"), "data", data=("a", "b", "c"))
    for data, lists in (("a,x", "data"), ("a,b", "")):
        with pytest.raises(ValueError, match=f"--data {'x' if lists else 'a,b'} is unknown; choose from a, b"):
            cli.choose(Config(data=data), lists, data=("a", "b"))


def test_how_a_run_ends(monkeypatch, capsys):
    def raising(error):
        def run(cfg):
            raise error

        return run

    with pytest.raises(SystemExit) as stop:
        cli.main(raising(KeyboardInterrupt()), Config, None, [])
    assert stop.value.code == 130 and "goes on from what is saved" in capsys.readouterr().err
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit) as stop:
        cli.main(raising(RuntimeError("[gloo] Connection closed by peer")), Config, None, [])
    assert stop.value.code == 1 and "another process of this run has died" in capsys.readouterr().err
    for text in ("NCCL error: out of memory", "shapes do not fit"):
        with pytest.raises(RuntimeError, match=text):
            cli.main(raising(RuntimeError(text)), Config, None, [])


def test_speed_is_that_of_this_start_and_results_of_an_older_one_are_gone(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(common_log.time, "monotonic", lambda: clock[0])
    write_json(tmp_path / "metrics.json", {"a": 1})
    log = RunLog(Config(out_dir=str(tmp_path), steps=20), ENV, start=10)
    assert not (tmp_path / "metrics.json").exists()
    clock[0] = 104.0
    log.write(13, loss=1.0)
    log.write(13, accuracy=2.0)
    log.close()
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert (line["items_per_s"], line["seconds"]) == (2.0, 4.0)  # four steps of two items in four seconds
    assert history(tmp_path, "loss", "accuracy") == {"loss": ([13], [1.0]), "accuracy": ([13], [2.0])}


def test_parts_of_pictures():
    red, blue = np.full((4, 4, 3), (255, 0, 0), np.uint8), np.full((4, 4, 3), (0, 0, 255), np.uint8)
    three = plot.grid([red, blue, blue], 2, cell=40)
    assert (
        three.size == (10 + 2 * 50, 10 + 2 * 50)
        and three.getpixel((30, 80)) == (0, 0, 255)
        and three.getpixel((80, 80)) == plot.PAPER
    )
    assert plot.distinct(torch.tensor([[1], [2], [1], [3]], dtype=torch.uint8), torch.tensor([2, 0, 1, 3]), 2) == [2, 1]
    assert plot.wrap("aa bb", 1, plot.font(13)) == ["aa", "bb"] and plot.wrap("aa bb", 1e3, plot.font(13)) == ["aa bb"]
    small, large = plot.Image.new("RGB", (5, 9), "red"), plot.Image.new("RGB", (7, 4), "blue")
    side = plot.row([small, large, small])
    assert side.size == (17, 9) and side.getpixel((11, 2)) == (0, 0, 255) and side.getpixel((12, 2)) == (255, 0, 0)
    assert plot.below(small, ["a", "b"]).size == (5, 9 + 2 * 19 + 10)
    for low, high, want in (
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3, 7, [-2, 0, 2, 4, 6]),
        (0, 12, [0, 2.5, 5, 7.5, 10]),
        (5, 5, [5]),
    ):
        assert plot._ticks(low, high) == pytest.approx(want)


def test_colours_and_fronts_of_charts():
    names, size = ["one", "two"], (520, 420)
    axes = plot._Axes(np.array([0.0, 4]), np.array([0.0, 4]), "", "", "", size, names, margin=0.12)

    def ink(img, a, b):
        """How far the darkest pixel around a place of the data is from white."""
        x, y = (round(v / 2) for v in axes.at(a, b))
        return (255 - np.asarray(img).astype(int)[y - 1 : y + 2, x - 1 : x + 2].min(2)).max()

    points = {"one": [(0, 4, "", True, (0, 0)), (4, 0, "", True, (0, 0))], "two": [(2, 2, "", True, (1, 0.2))]}
    img = plot.scatter(points, {}, front=[(1, 3), (3, 1)], size=size)
    assert ink(img, 1, 2.5) > 60 and ink(img, 2, 1) > 60  # down from the first, then right to the second
    assert (
        ink(img, 3, 2.5) < 60 and ink(img, 2, 3) < 60 and ink(img, 1.2, 2) > 60 and ink(img, 2, 2.6) < 60
    )  # the cross is as wide as dx
    for i in range(2):
        x, y = round(axes.box[2] / 2) + 20, round(axes.box[1] / 2) + 20 * i
        assert np.abs(np.asarray(img)[y, x].astype(int) - plot.PALETTE[i]).max() < 30
