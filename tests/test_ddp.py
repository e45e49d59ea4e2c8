"""common/ddp.py: two and three processes against one, values AND gradients."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import ckpt, ddp
from tests.helpers import in_processes


def towers():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "a": nn.Linear(5, 4).double(),
            "b": nn.Linear(5, 4).double(),
            "t": nn.ParameterList([torch.tensor(1.3, dtype=torch.double)]),
        }
    )


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = towers()

    def forward(self, x, y):
        return F.normalize(self.m["a"](x), dim=-1), F.normalize(self.m["b"](y), dim=-1), self.m["t"][0].exp()


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(12, 5, generator=g, dtype=torch.double), torch.randn(12, 5, generator=g, dtype=torch.double)


def contrastive(env, gather="grad"):
    x, y = (v.chunk(env.world)[env.rank] for v in batch())
    model = Pair()
    wrapped = ddp.wrap(model, env)  # must live until backward: it owns the hooks
    fx, fy, s = wrapped(x, y)
    g = ddp.gather_rows if gather == "grad" else lambda v: ddp.gather_rows(v.detach())
    label = torch.arange(len(x)) + env.rank * len(x)
    loss = (F.cross_entropy(s * fx @ g(fy).T, label) + F.cross_entropy(s * fy @ g(fx).T, label)) / 2
    loss.backward()
    return ddp.mean({"loss": loss})["loss"], {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("world", [2, 3])
def test_contrastive_gradient_equals_one_process(world, tmp_path):
    loss, want = contrastive(ddp.Env(0, 1, torch.device("cpu")))
    for got_loss, got in in_processes(world, contrastive, path=tmp_path):
        assert got_loss == pytest.approx(loss, abs=1e-6)
        for n in want:
            torch.testing.assert_close(got[n], want[n], rtol=1e-10, atol=1e-12)


def test_a_gather_without_gradient_gives_the_right_loss_and_a_wrong_gradient(tmp_path):
    """The released code's variant: the reason why losses alone prove nothing."""
    loss, want = contrastive(ddp.Env(0, 1, torch.device("cpu")))
    got_loss, got = in_processes(2, contrastive, "none", path=tmp_path)[0]
    assert got_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(got["m.t.0"], want["m.t.0"])  # the temperature's gradient is right
    cosine = F.cosine_similarity(got["m.a.weight"].flatten(), want["m.a.weight"].flatten(), dim=0)
    assert cosine < 0.99 and (got["m.a.weight"] - want["m.a.weight"]).norm() > 0.1 * want["m.a.weight"].norm()


def summed(env):
    x = batch()[0].chunk(env.world)[env.rank]
    model = nn.Linear(5, 4).double()
    with torch.no_grad():
        model.weight.copy_(torch.arange(20).view(4, 5) / 20)
        model.bias.zero_()
    wrapped = ddp.wrap(model, env)
    z = wrapped(x)
    C = ddp.all_sum(z.T @ z) / (len(x) * env.world)
    ((C - torch.eye(4)) ** 2).sum().backward()
    return model.weight.grad


def test_all_sum_has_the_full_gradient(tmp_path):
    want = summed(ddp.Env(0, 1, torch.device("cpu")))
    for got in in_processes(2, summed, path=tmp_path):
        torch.testing.assert_close(got, want)


def normed(env):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3, affine=False)
    ).double()
    x, y = (v.chunk(env.world)[env.rank] for v in batch())
    wrapped = ddp.wrap(model, env)
    for _ in range(2):
        out = wrapped(x)
        ((out - y[:, :3]) ** 2).mean().backward()
    conv = ddp.wrap(
        nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).double().requires_grad_(False), ddp.Env(0, 1, env.device)
    )
    conv[1].__class__ = ddp.SyncBatchNorm
    picture = conv(x.view(len(x), 1, 1, 5))
    return {n: p.grad for n, p in model.named_parameters()}, {n: b for n, b in model.named_buffers()}, picture.std()


def test_synchronised_batch_norm_equals_one_process(tmp_path):
    grads, buffers, _ = normed(ddp.Env(0, 1, torch.device("cpu")))
    for got, stats, _ in in_processes(2, normed, path=tmp_path):
        for n in grads:
            torch.testing.assert_close(got[n], grads[n], rtol=1e-8, atol=1e-10)
        for n in buffers:
            torch.testing.assert_close(stats[n], buffers[n])


@dataclass(frozen=True)
class RunConfig:
    lr: float = 0.1
    resume: bool = True


def resumed(env, folder):
    path = Path(folder, str(env.rank), "last.pt")  # a disk of its own
    if env.rank == 0:
        ckpt.save(path, 3, RunConfig())
    try:
        return ckpt.resume(path, RunConfig())[0]
    except ValueError as error:
        return str(error)


def test_processes_with_disks_of_their_own_are_told(tmp_path):
    """Rank 0 alone would go on from its checkpoint, the others from the start."""
    for told in in_processes(2, resumed, str(tmp_path / "run"), path=tmp_path):
        assert "exists for 1 of 2 processes" in told


def helpers(env):
    ddp.reseed(3, env.rank, 5)
    return ddp.mean({"r": torch.tensor(float(env.rank))})["r"], torch.rand(3), ddp.interrupted(), env.share(10)


def test_means_and_randomness(tmp_path):
    a, b = in_processes(2, helpers, path=tmp_path)
    assert a[0] == b[0] == 0.5 and not torch.equal(a[1], b[1]) and not a[2] and a[3] == 5
    ddp.reseed(3, 1, 5)
    assert torch.equal(torch.rand(3), b[1])


def test_a_signal_between_two_arms_is_not_forgotten():
    """While an arm is evaluated nothing asks for signals: the next arm does not begin."""
    ddp.start(0)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        ddp.start(0)
    ddp.start(0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert ddp.interrupted() and not ddp.interrupted()  # said once
    with pytest.raises(KeyboardInterrupt):  # a second one stops at once
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    ddp.start(0)


def test_one_process_is_the_identity():
    x = torch.ones(2)
    assert ddp.gather_rows(x) is x and ddp.all_sum(x) is x and ddp.world_size() == 1
    env = ddp.start(0)
    model = nn.Linear(1, 1)
    assert ddp.wrap(model, env) is model and ddp.raw(model) is model and env.is_main
    with pytest.raises(ValueError, match="batch_size 7 cannot be divided by 2"):
        ddp.Env(0, 2, "cpu").share(7)
    with pytest.raises(ValueError, match="step 4 on rank 0"):
        ddp.check_finite({"loss": float("nan")}, 4)


# By hand ---------------------------------------------------------------------------------------------------------------


def test_randomness_depends_on_seed_rank_and_step():
    def draw(*key):
        ddp.reseed(*key)
        return tuple(torch.rand(4).tolist())

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
    assert len({draw(*k) for k in keys}) == 5 and draw(0, 0, 1) == draw(0, 0, 1)


def test_parts_of_batches_and_of_micro_batches():
    env = ddp.Env(1, 2, torch.device("cpu"))
    assert env.share(12) == 6 and env.share(12, accum=3) == 2 and not env.is_main
    with pytest.raises(ValueError, match="--accum 4 micro-batches"):
        env.share(12, accum=4)
    with pytest.raises(ValueError, match="pictures 7 cannot be divided by 2"):
        env.share(7, "pictures")


def test_a_compiled_model_is_taken_off_its_wrapper():
    model = nn.Linear(1, 1)
    assert ddp.raw(SimpleNamespace(_orig_mod=model)) is model


def test_lists_are_joined_in_rank_order(monkeypatch):
    monkeypatch.setattr(ddp, "world_size", lambda: 2)
    monkeypatch.setattr(ddp.dist, "all_gather_object", lambda parts, own: parts.__setitem__(slice(None), [own, [8, 9]]))
    assert ddp.gather_lists([1, 2]) == [1, 2, 8, 9]


def test_one_process_looks_for_signals_at_each_step_and_infinity_is_not_finite():
    ddp.start(0)
    assert not ddp.interrupted(False) and not ddp.asked_to_stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert ddp.asked_to_stop() and ddp.interrupted(False)
    ddp.start(0)
    ddp.check_finite({"loss": 1.0, "norm": 1e38}, 0)
    for bad in (float("inf"), -float("inf"), float("nan")):
        with pytest.raises(ValueError, match="^norm is not finite"):
            ddp.check_finite({"loss": 1.0, "norm": bad}, 0)


def _norm(env, x):
    layer = ddp.SyncBatchNorm(x.shape[1])
    return layer(x.chunk(env.world)[env.rank]), layer.running_var


def test_batch_norm_of_numbers_far_from_zero(tmp_path):
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 1e3, -1e4])
    want = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    parts = in_processes(2, _norm, x, path=tmp_path)
    torch.testing.assert_close(torch.cat([y for y, _ in parts]).double(), want, atol=2e-3, rtol=0)
    torch.testing.assert_close(parts[0][1].double(), 0.9 + 0.1 * x.double().var(0), atol=1e-3, rtol=0)
