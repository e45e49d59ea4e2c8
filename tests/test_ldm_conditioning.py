"""methods/ldm_conditioning.py: conditioning, guidance, padding, transfer exactly; note ldm_conditioning (b)."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from common import augment, ckpt, ddp, scenes
from common.dit import read_tensors, sincos_2d
from common.vae import VAE
from methods import ldm_conditioning as M
from tests.helpers import ROOT, both, in_processes, inside, run, user_error

HOWS = ("adaln-sum", "attn", "attn+schedule")


def make(how="attn+schedule", seed=0, shake=0.05, side=8, **more):
    cfg = M.Config(**{**M.PRESETS["smoke"], "conditioning": how, **more})
    torch.manual_seed(seed)
    model = M.Model(cfg, 4, side, 6 if cfg.task == "class" else M.zoo.Reader(600, 32, 1, 2).eval())
    for name, p in model.named_parameters():
        if shake and "pos_embed" not in name:
            p.data += shake * torch.randn_like(p)
    return model.eval()


def inputs(n=3, side=8, t=None):
    g = torch.Generator().manual_seed(1)
    no = torch.zeros(n, dtype=torch.bool)
    return dict(zt=torch.randn(n, 4, side, side, generator=g), t=torch.full((n,), 0.4) if t is None else torch.tensor(t),
                controls=M.full_frame(n, 32), drop_s=no, drop_c=no, y=torch.arange(n))  # fmt: skip


# 1. Controls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power, values", [
    (1, (1, .976, .905, .794, .655, .500, .345, .095, 0)), (2, (1, .914, .713, .484, .287, .146, .062, .004, 0)),
    (4, (1, .736, .360, .136, .041, .010, .002, .000, 0)), (8, (1, .392, .068, .008, .001, .000, .000, .000, 0)),
])  # fmt: skip
def test_schedule_table(power, values):
    t = torch.tensor([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1])
    got = M.control_schedule(t, power)
    torch.testing.assert_close(got, torch.tensor(values, dtype=torch.float32), atol=6e-4, rtol=0)
    assert got[0] == 1 and got[-1] == 0
    fine = M.control_schedule(torch.linspace(0, 1, 1001), power)
    assert (fine.diff() <= 0).all() and fine.min() >= 0 and fine.max() <= 1


@pytest.mark.parametrize("how", HOWS)
def test_zero_initialised_controls_change_nothing(how):
    model = make(how, shake=0)
    for p in model.dit.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x = inputs()
    with_controls = model(**x)
    x["controls"] = torch.rand(3, 7) * 100
    assert torch.equal(model(**x), with_controls)
    x["drop_c"] = torch.ones(3, dtype=torch.bool)
    assert torch.equal(model(**x), with_controls)
    assert make(how, shake=0, control_init="normal").high.mlp[2].weight.abs().max() > 0


def test_at_pure_noise_only_unscheduled_controls_count():
    model, x = make("attn+schedule"), inputs(t=[1.0, 1.0, 1.0])
    base = model(**x)
    other = {**x, "controls": x["controls"].clone()}
    other["controls"][:, 5:] = 128  # size: scheduled
    assert torch.equal(model(**other), base)
    other["controls"][:, 4] = 1  # flip: not scheduled
    assert not torch.equal(model(**other), base)
    late = inputs(t=[0.0, 0.0, 0.0])
    assert not torch.equal(model(**{**late, "controls": other["controls"]}), model(**late))
    summed = make("attn")
    swapped = {**x, "controls": x["controls"] + torch.tensor([0, 0, 0, 0, 0, 90.0, 90.0])}
    assert not torch.equal(summed(**swapped), summed(**x))  # without a schedule the size counts from the start


@pytest.mark.parametrize("how", HOWS)
def test_whether_modulation_sees_the_class(how):
    model, x, seen = make(how), inputs(1), []
    model.dit.blocks[0].adaLN_modulation.register_forward_hook(lambda m, i, o: seen.append(o))
    a = model(**{**x, "y": torch.tensor([1])})
    b = model(**{**x, "y": torch.tensor([2])})
    assert torch.equal(*seen) == (how != "adaln-sum") and not torch.equal(a, b)


@pytest.mark.parametrize("how", HOWS)
def test_what_the_transformer_is_told(how):
    """Controls as features of 1000 times their value, null ones as zero, classes as the conditioning says, t from 0 to 999."""
    model, x, seen = make(how, control_power=3.0), inputs(t=[0.1, 0.4, 0.9]), []
    x["controls"] = torch.tensor([[0.1, 0.2, 0.7, 0.8, 1, 48, 64]]).repeat(3, 1)
    x["drop_c"] = torch.tensor([False, False, True])
    model.dit.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
    model(**x)
    (_, t), told = seen[0]
    torch.testing.assert_close(t, torch.tensor([99.9, 399.6, 899.1]))
    high = model.high.mlp(torch.cat([M.time_features(torch.tensor([v])) for v in (100.0, 200, 700, 800, 1000)], 1))
    low = model.low.mlp(torch.cat([M.time_features(torch.tensor([v])) for v in (48.0, 64)], 1))
    gamma = torch.tensor([0.8289, 0.1107]) if how == "attn+schedule" else torch.ones(2)
    want = torch.cat([high + gamma[0] * low, high + gamma[1] * low, torch.zeros_like(high)])
    semantic = model.semantic(x["y"], x["drop_s"])
    torch.testing.assert_close(told["add"], want + (semantic[:, 0] if how == "adaln-sum" else 0), atol=1e-3, rtol=1e-3)
    assert torch.equal(told["context"], semantic) if how != "adaln-sum" else "context" not in told


def test_arms_have_about_equal_parameters():
    cfg = M.Config()
    count = {how: sum(p.numel() for p in M.Model(replace(cfg, conditioning=how), 8, 8, 72).parameters()) for how in HOWS}
    assert count["attn"] == count["attn+schedule"] and abs(count["adaln-sum"] / count["attn"] - 1) < 0.02


@pytest.mark.parametrize("how", HOWS)
def test_dropping(how):
    model, x = make(how), inputs()
    yes = torch.ones(3, dtype=torch.bool)
    null = model(**{**x, "y": torch.full((3,), 6)})
    assert torch.equal(model(**{**x, "drop_s": yes}), null) and not torch.equal(model(**x), null)
    rates = torch.stack([M.draw_noise(0, s, 64, (1,), "cpu")[0] for s in range(200)]).flatten(0, 1)
    for p in (0.0, 0.1, 1.0):
        drop = rates[:, 1:] < p
        assert drop.float().mean(0).tolist() == pytest.approx([p, p], abs=0.012)
    both = (rates[:, 1] < 0.1) & (rates[:, 2] < 0.1)
    assert both.float().mean().item() == pytest.approx(0.01, abs=0.005)  # independent


def test_training_drops_both_independently_and_scales_the_noise(tmp_path, monkeypatch):
    seen, loss = [], M.diffusion_loss

    def remember(model, z0, t, eps, kind, k, **conditions):
        seen.append((conditions["drop_s"], conditions["drop_c"], k))
        return loss(model, z0, t, eps, kind, k, **conditions)

    monkeypatch.setattr(M, "diffusion_loss", remember)
    monkeypatch.setattr(M, "evaluate", lambda *args: {"val_loss": 0.0})
    cfg = M.Config(**M.PRESETS["smoke"] | dict(steps=30, batch_size=64, dim=16, depth=1, drop_semantic=0.2, drop_control=0.5,
                                               base_size=16, conditioning="attn", out_dir=str(tmp_path)))  # fmt: skip
    M.train(cfg)
    s, c = (torch.cat([x[i] for x in seen]).float() for i in (0, 1))
    assert s.mean().item() == pytest.approx(0.2, abs=0.03) and c.mean().item() == pytest.approx(0.5, abs=0.04)
    assert (s * c).mean().item() == pytest.approx(0.1, abs=0.025) and {x[2] for x in seen} == {2.0}  # k = 32 / 16
    # what is exported and drawn from are the averaged weights
    saved, exported = torch.load(tmp_path / "last.pt", weights_only=True), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(exported[k], v) for k, v in saved["ema"].items())
    assert not torch.equal(saved["ema"]["dit.x_embedder.proj.weight"], saved["model"]["dit.x_embedder.proj.weight"])
    lines = [json.loads(x)["lr"] for x in (tmp_path / "log.jsonl").read_text().splitlines() if "lr" in x]
    assert lines[-1] < 0.1 * max(lines)  # the last half falls to 0


def test_spread_is_the_mean_over_pairs():
    assert M.spread(torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1).expand(3, 4, 5)) == pytest.approx(2)


# 2. Guidance and sampling ----------------------------------------------------------------------------------------------


def test_guidance_identities():
    cs, ns, nn_ = (torch.randn(2, 3) for _ in range(3))
    assert torch.equal(M.guide(cs, ns, nn_, 1, 1), cs) and torch.equal(M.guide(cs, ns, nn_, 1, 0), ns)
    assert torch.equal(M.guide(cs, ns, nn_, 0, 1), nn_)
    torch.testing.assert_close(M.guide(cs, ns, nn_, 3, 1), nn_ + 3 * (cs - nn_))
    for f in (lambda x: M.guide(cs, ns, nn_, x, 0.7), lambda x: M.guide(cs, ns, nn_, 2.0, x)):  # affine in both
        torch.testing.assert_close(f(0.25), 0.75 * f(0.0) + 0.25 * f(1.0))


@pytest.mark.parametrize(
    "guidance, control, calls", [(1.0, 1.0, 1), (2.0, 1.0, 2), (1.0, 0.0, 1), (2.0, 0.0, 2), (2.0, 0.5, 3)]
)
def test_batched_guidance_equals_separate_calls(guidance, control, calls):
    model, x = make(), inputs()
    z, t, seen = x["zt"], torch.ones(3), []
    model.dit.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    got = M.sample(model, z, {"y": x["y"]}, x["controls"], "flow", 1, guidance, control)
    assert seen == [3 * calls]
    yes, no = torch.ones(3, dtype=torch.bool), x["drop_s"]

    def out(c, s):
        return model(z, t, x["controls"], s, c, y=x["y"])

    v = M.guide(out(no, no), out(yes, no), out(yes, yes), guidance, control)
    torch.testing.assert_close(got, z - v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["flow", "eps", "v"])
def test_sampler_finds_a_known_latent(kind, k):
    z0, path = torch.randn(2, 4, 4, 4), []

    def net(zt, t, **_):
        alpha, sigma = M.alpha_sigma(kind, t, k)
        eps = (zt - alpha * z0) / sigma
        path.append(eps)
        return {"flow": eps - z0, "eps": eps, "v": alpha * eps - sigma * z0}[kind]

    got = M.sample(net, torch.randn(2, 4, 4, 4), {}, torch.zeros(2, 7), kind, 6, 1.0, 1.0, k)
    torch.testing.assert_close(got, z0, atol=5e-3, rtol=1e-3)
    for eps in path[1:]:  # deterministic: the noise stays, at every level on the way
        torch.testing.assert_close(eps, path[0], atol=1e-2, rtol=1e-3)


def test_updates_have_their_own_noise_and_latents_are_sampled(tmp_path, monkeypatch):
    seen, loss, to_latent = [], M.diffusion_loss, VAE.to_latent

    def trained(*args):
        raise StopIteration

    def spy_latent(self, mean, logvar=None, noise=None):
        seen.append(noise)
        return to_latent(self, mean, logvar, noise)

    def spy_loss(model, z0, t, eps, *args, **more):
        seen.append(eps)
        return loss(model, z0, t, eps, *args, **more)

    monkeypatch.setattr(M, "diffusion_loss", spy_loss)
    monkeypatch.setattr(VAE, "to_latent", spy_latent)
    monkeypatch.setattr(M, "evaluate", trained)
    cfg = M.Config(**{**M.PRESETS["smoke"], "out_dir": str(tmp_path), "steps": 2, "accum": 2, "conditioning": "attn"})
    with pytest.raises(StopIteration):
        M.train(cfg)
    assert len(seen) == 8 and not any(x is None or torch.equal(x, y) for i, x in enumerate(seen) for y in seen[:i])


@pytest.mark.parametrize("k", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["flow", "eps", "v"])
def test_sampler_equals_loops_for_a_network_that_does_not_know(kind, k):
    z, abar = torch.randn(2, 4, 4, 4), np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    got = M.sample(lambda zt, t, **_: 0.3 * zt + t.view(-1, 1, 1, 1), z, {}, torch.zeros(2, 7), kind, 4, 1.0, 1.0, k)

    def level(i):  # t in quarters -> what the network is told, alpha, sigma
        if kind == "flow":
            s = k * i / (4 + (k - 1) * i)
            return i / 4, 1 - s, s
        n = [0, 250, 500, 749, 999][i]
        snr = abar[n] / (1 - abar[n]) / k**2
        return n / 999, (snr / (1 + snr)) ** 0.5, (1 / (1 + snr)) ** 0.5

    x = z.double().numpy()
    for i in (4, 3, 2, 1):
        (t, a, s), (_, a_next, s_next) = level(i), level(i - 1)
        out = 0.3 * x + t
        z0 = a * x - s * out if kind == "v" else (x - s * out) / (a if kind == "eps" else 1)
        x = a_next * z0 + s_next * (x - a * z0) / s if i > 1 else z0
    np.testing.assert_allclose(got.numpy(), x, rtol=2e-3, atol=2e-3)


def test_text_training_has_its_own_padding_noise_of_each_micro_batch(tmp_path, monkeypatch):
    seen, loss = [], M.diffusion_loss

    def spy(model, z0, t, eps, *args, **more):
        seen.append((eps, more["noise"]))
        return loss(model, z0, t, eps, *args, **more)

    monkeypatch.setattr(M, "diffusion_loss", spy)
    monkeypatch.setattr(M, "evaluate", lambda *a: {"val_loss": 0.0})
    M.train(
        M.Config(
            **{**M.PRESETS["smoke"], "steps": 2, "accum": 2, "task": "text", "conditioning": "attn", "out_dir": str(tmp_path)}
        )
    )
    assert len({pad.sum().item() for _, pad in seen}) == 4
    for i, (eps, _) in enumerate(seen):
        assert torch.equal(eps, M.draw_noise(0, i, 4, (8, 8, 8), "cpu")[2])


def test_low_controls_are_scheduled_by_the_given_power():
    high, low, t = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0.1, 0.4, 0.9])
    for power in (2.0, 8.0):
        gamma = [(1 - math.cos(math.pi * (1 - v) ** power)) / 2 for v in t.tolist()]
        torch.testing.assert_close(M.control_vector(high, low, t, power), high + torch.tensor(gamma)[:, None] * low)


@pytest.mark.parametrize("kind", ["flow", "eps", "v"])
def test_loss_of_a_perfect_network_is_zero(kind):
    z0, eps, t = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.8])
    alpha, sigma = M.alpha_sigma(kind, t, 2.0)
    target = {"flow": eps - z0, "eps": eps, "v": alpha * eps - sigma * z0}[kind]

    def net(zt, t):
        torch.testing.assert_close(zt, alpha * z0 + sigma * eps)
        return target

    assert M.diffusion_loss(net, z0, t, eps, kind, 2.0) == 0


# 3. Text slots -----------------------------------------------------------------------------------------------------------


def test_padding_of_full_texts_and_of_originals():
    tokens, n = torch.randn(2, 6, 5), torch.tensor([6, 3])
    assert torch.equal(M.replicate_padding(tokens, torch.tensor([6, 6]), 6, 0.5), tokens)
    for beta in (0.0, 0.02, 3.0):
        out = M.replicate_padding(tokens, n, 10, beta)
        assert out.shape == (2, 10, 5) and torch.equal(out[0, :6], tokens[0]) and torch.equal(out[1, :3], tokens[1, :3])
    out = M.replicate_padding(tokens, n, 10, 0.0)
    assert all(torch.equal(out[b, j], tokens[b, j % int(n[b])]) for b in range(2) for j in range(10))


def test_padding_noise_grows_with_the_root_of_the_copy():
    tokens = torch.randn(1, 3, 4) * torch.tensor([1.0, 2, 4, 8])
    big = tokens.expand(20_000, -1, -1)
    noise = M.replicate_padding(big, torch.full((20_000,), 3), 12, 0.1) - M.replicate_padding(
        big, torch.full((20_000,), 3), 12, 0.0
    )
    std = noise.std(0)  # (12, 4)
    sigma = tokens[0].std(0, unbiased=False)
    for j in range(12):
        torch.testing.assert_close(std[j], 0.1 * sigma * (j // 3) ** 0.5, rtol=0.03, atol=1e-6)


def test_text_slots_by_hand():
    class Encoder:
        width = 1

        def hidden(self, ids):  # two tokens of its own in front
            return torch.cat([torch.full((len(ids), 2), 0.5), ids.float()], 1)[..., None]

    def slots(padding, n=8, drop=False):
        m = M.TextTokens(Encoder(), M.Config(dim=1, slots=n, padding=padding))
        m.proj.weight.data.fill_(1), m.proj.bias.data.zero_(), m.null.data.fill_(-3)
        return m(ids, torch.tensor([drop, False]))[..., 0].tolist()

    ids = torch.tensor([[98, 5, 99, 7, 0], [98, 5, 6, 7, 99]])  # 99 ends a text
    assert slots("zero") == [[0.5, 0.5, 98, 5, 99, 0, 0, 0], [0.5, 0.5, 98, 5, 6, 7, 99, 0]]
    assert slots("replicate") == [[0.5, 0.5, 98, 5, 99, 0.5, 0.5, 98], [0.5, 0.5, 98, 5, 6, 7, 99, 0.5]]
    assert slots("replicate", 4)[0] == slots("zero", 4)[0] == [0.5, 0.5, 98, 5]
    assert slots("zero", drop=True)[0] == [-3] * 8


def test_padding_noise_of_a_text_shorter_than_the_batch():
    tokens = torch.cat([torch.tensor([[[1.0], [5.0]]]), torch.full((1, 3, 1), 50.0)], 1)  # two real tokens: deviation 2
    out = M.replicate_padding(tokens, torch.tensor([2]), 6, 0.5, torch.ones(1, 6, 1))[0, :, 0]
    torch.testing.assert_close(out, torch.tensor([1.0, 5, 2, 6, 1 + 2**0.5, 5 + 2**0.5]))


def test_padding_has_a_gradient_for_one_token():
    tokens = torch.randn(1, 1, 4, requires_grad=True)
    M.replicate_padding(tokens, torch.tensor([1]), 3, 0.5).sum().backward()
    assert tokens.grad.tolist() == [[[3.0] * 4]]


def test_padding_of_one_token_and_of_none():
    one = M.replicate_padding(torch.randn(1, 1, 4), torch.tensor([1]), 5, 0.5)
    assert one.isfinite().all() and all(torch.equal(one[0, j], one[0, 0]) for j in range(5))  # no spread, no noise
    assert M.replicate_padding(torch.randn(1, 2, 4), torch.tensor([0]), 4, 0.5).isfinite().all()


def test_text_model_padding_modes_and_fixed_noise():
    x = inputs(2)
    x.pop("y")
    ids = torch.zeros(2, 16, dtype=torch.long)
    ids[0, :4], ids[1, :7] = torch.tensor([598, 5, 6, 599]), torch.tensor([598, 5, 6, 7, 8, 9, 599])
    for padding in ("zero", "replicate", "noisy"):
        model = make("attn", task="text", padding=padding, slots=16, beta_txt=0.5)
        a, b = (model(**x, ids=ids) for _ in range(2))
        assert torch.equal(a, b) and a.isfinite().all()  # in evaluation the noise is fixed
        alone = model(**{k: v[1:] for k, v in x.items()}, ids=ids[1:])
        torch.testing.assert_close(alone, a[1:], atol=1e-5, rtol=1e-5)  # whatever else is in the batch
        given = model(**x, ids=ids, noise=torch.randn(2, 16, 32))  # as in training
        assert torch.equal(given, a) == (padding != "noisy")
    longer = ids.clone()
    longer[0, 5] = 7  # behind the end token: not read
    assert torch.equal(model(**x, ids=longer), a)


def test_a_baseline_is_told_its_class_as_in_dit():
    """Class vectors begin as small as DiT's; tokens that are attended to have unit scale."""
    summed, attended = M.ClassTokens(9, 1, 32, False), M.ClassTokens(9, 4, 32, True)
    y, no = torch.arange(9), torch.zeros(9, dtype=torch.bool)
    assert 0.015 < summed(y, no).std() < 0.025 and 0.9 < attended(y, no).std() < 1.1


# 4. Transfer ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [1, 2, 4])
def test_positions_are_sampled_more_finely(s):
    old, new = sincos_2d(32, torch.arange(4), torch.arange(4)), M.resample_pos_embed(32, 4 * s, 4)
    assert new.shape == (1, 16 * s * s, 32)
    assert torch.equal(new.view(4 * s, 4 * s, 32)[::s, ::s].reshape(1, 16, 32), old)


def test_rescaled_noise_schedule():
    abar = M.alpha_bar()
    assert torch.equal(M.rescale_alpha_bar(abar, 3.0, 3.0), abar)

    def snr(a):
        return a / (1 - a)

    for s, new in ((1, 2), (32, 64), (256, 1024)):
        torch.testing.assert_close(snr(M.rescale_alpha_bar(abar, s, new)) / snr(abar), torch.full_like(abar, (s / new) ** 2))
    two = M.rescale_alpha_bar(M.rescale_alpha_bar(abar, 256, 512), 512, 1024)
    torch.testing.assert_close(two, M.rescale_alpha_bar(abar, 256, 1024))
    assert (two.diff() < 0).all() and 0 < two.min() and two.max() < 1
    sd = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    out = M.rescale_alpha_bar(sd, 256, 512)
    assert [round(x.item(), 5) for x in (sd[500], out[500], sd[-1], out[-1])] == pytest.approx(
        [0.27633, 0.08714, 0.00466, 0.00117], abs=2e-4
    )


def test_shifted_time():
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    torch.testing.assert_close(M.shift_time(t, 2), torch.tensor([0.0, 0.4, 2 / 3, 6 / 7, 1.0]))
    assert torch.equal(M.shift_time(t, 1), t)
    torch.testing.assert_close(M.shift_time(M.shift_time(t, 2), 3), M.shift_time(t, 6))
    for kind in ("flow", "v"):  # both make noise / signal k times larger
        (a, s), (b, r) = M.alpha_sigma(kind, torch.tensor([0.4]), 1.0), M.alpha_sigma(kind, torch.tensor([0.4]), 3.0)
        assert (r / b).item() == pytest.approx(3 * (s / a).item(), rel=1e-5)


def test_low_resolution_checkpoint_into_a_larger_model_and_class_into_text(tmp_path):
    small = {**M.PRESETS["smoke"], "out_dir": str(tmp_path / "low"), "conditioning": "attn+schedule", "steps": 2}
    M.run(M.Config(**small))
    path = str(tmp_path / "low" / "attn+schedule" / "model.safetensors")
    low = M.read_tensors(path)[0]
    vae = M.zoo.load_vae()
    for positions, table in (("resample", M.resample_pos_embed(32, 8, 4)), ("extrapolate", sincos_2d(32, torch.arange(8), torch.arange(8))),
                             ("interpolate", None)):  # fmt: skip
        cfg = M.Config(**{**small, "image_size": 64, "base_size": 32, "init": path, "positions": positions})
        world = M.World(None, None, 72, None, [], None, None, [])
        model = M.build(cfg, vae, world, "cpu")
        state = model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in low.items() if k != "dit.pos_embed")
        assert state["dit.pos_embed"].shape == (1, 64, 32) and (table is None or torch.equal(state["dit.pos_embed"], table))
    cfg = M.Config(**{**small, "base_size": 32, "init": path, "task": "text"})
    model = M.build(cfg, vae, M.World(None, None, M.zoo.Reader(600, 32, 1, 2), None, [], None, None, []), "cpu")
    assert torch.equal(model.state_dict()["dit.blocks.0.attn.qkv.weight"], low["dit.blocks.0.attn.qkv.weight"])
    with pytest.raises(ValueError, match="has conditioning attn\\+schedule, this arm attn"):
        M.build(
            replace(cfg, conditioning="attn"),
            vae,
            M.World(None, None, M.zoo.Reader(600, 32, 1, 2), None, [], None, None, []),
            "cpu",
        )
    with pytest.raises(ValueError, match="does not fit"):
        M.build(replace(cfg, task="class", dim=64), vae, M.World(None, None, 72, None, [], None, None, []), "cpu")


def test_transfer_positions_and_refusals(tmp_path):
    vae, cfg = M.zoo.load_vae(), M.Config(**{**M.PRESETS["smoke"], "conditioning": "attn", "base_size": 32})
    world = M.World(None, None, 72, None, [], None, None, [])
    old = M.build(cfg, vae, world, "cpu")
    names = ("conditioning", "task", "objective", "control_power", "slots", "beta_txt", "base_size")
    kept = {k: getattr(cfg, k) for k in names} | {"extent": 4}
    ckpt.export(tmp_path / "m.safetensors", old.state_dict(), dit=old.dit.config, vae=vae.fingerprint(), config=kept)
    cfg = replace(cfg, image_size=64, init=str(tmp_path / "m.safetensors"))
    model = {p: M.build(replace(cfg, positions=p), vae, world, "cpu") for p in ("resample", "extrapolate", "interpolate")}
    assert {p: m.extent for p, m in model.items()} == {"resample": 4, "extrapolate": 8, "interpolate": 4}
    table, wide = old.dit.pos_embed.view(4, 4, 32), model["interpolate"].dit.pos_embed.view(8, 8, 32)
    for c in range(32):
        torch.testing.assert_close(wide[..., c], F.interpolate(table[None, None, :, :, c], (8, 8), mode="bicubic")[0, 0])
    for change in (dict(objective="v"), dict(control_power=4.0), dict(base_size=64)):
        with pytest.raises(ValueError, match="has " + next(iter(change))):
            M.build(replace(cfg, **change), vae, world, "cpu")


# 5. Data -----------------------------------------------------------------------------------------------------------------


def test_recorded_controls_are_what_was_done():
    picture = Image.fromarray(scenes.render([scenes.scene(3)], 48)[0]).resize((60, 48))
    flips = 0
    for seed in range(20):
        view, c = augment.random_view(picture, 24, np.random.default_rng(seed), (0.3, 0.8), 0.5)
        top, left, height, width, flip, h, w = c
        assert (h, w) == (48, 60) and len(augment.CONTROLS) == 7
        box = (round(left * 60), round(top * 48), round((left + width) * 60), round((top + height) * 48))
        again = augment.resize_to(picture, box, 24)
        again = again[:, ::-1] if flip else again
        flips += int(flip)
        assert np.array_equal(view, again)
        assert 0.25 < height * width < 0.85
    assert 4 < flips < 16
    boxes = {tuple(augment.random_view(picture, 24, np.random.default_rng(i), (0.8, 0.99))[1][:2]) for i in range(20)}
    assert len(boxes) > 10  # a share of the largest square: a photograph's crops vary, too
    assert augment.random_view(picture, 24, np.random.default_rng(0))[1].tolist() == pytest.approx([0, 0.1, 1, 0.8, 0, 48, 60])


def test_cropping_directly_sees_less():
    cfg = M.Config(**{**M.PRESETS["smoke"], "images": 30})
    vae = M.zoo.load_vae()
    area = []
    for crop in ("resize", "direct"):
        c = M.scene_latents(replace(cfg, crop=crop), vae, "cpu", 30, 0).fields["controls"]
        area.append((c[:, 2] * c[:, 3]).mean().item())
    assert area[1] == pytest.approx(area[0] / 4, rel=0.15)


def test_generated_latents_are_of_what_is_recorded():
    cfg, vae = M.Config(**{**M.PRESETS["smoke"], "images": 8, "views": 2}), M.zoo.load_vae()
    t, seen = M.scene_latents(cfg, vae, "cpu", 8, 0), []
    for i in range(16):
        s = scenes.scene(i % 8, 0, (1, 1), grid=1)
        top, left, h, w, flip, H, _ = t.fields["controls"][i].tolist()
        seen.append((round(top, 3), round(left, 3), flip, H))
        picture = Image.fromarray(scenes.render([s], int(H))[0])
        view = augment.resize_to(picture, [round(v * H) for v in (left, top, left + w, top + h)], 32)
        view = view[:, ::-1] if flip else view
        mean, _ = vae.encode(M.to_unit(np.array(view)[None], "cpu"))
        torch.testing.assert_close(t.fields["mean"][i], mean[0], atol=1e-4, rtol=1e-4)
        assert t.fields["label"][i] == M.label(s)
    assert len({x[3] for x in seen}) > 2 and {x[2] for x in seen} == {0, 1} and len(set(seen)) > 12
    picture = Image.fromarray(scenes.render([scenes.scene(3)], 48)[0])  # what is asked for: the whole of a square
    assert M.full_frame(1, 48)[0].tolist() == augment.random_view(picture, 24, np.random.default_rng(0))[1].tolist()


def test_classes_are_colour_times_shape_and_the_three_sets_are_disjoint():
    world = [scenes.scene(i, 1, (1, 1), grid=1) for i in range(3000)]
    names = {M.label(s): (s.things[0].colour, s.things[0].shape) for s in world}
    assert sorted(names) == list(range(72)) and len(set(names.values())) == 72
    cfg = M.Config(**{**M.PRESETS["smoke"], "images": 32, "samples": 32, "out_dir": "", "conditioning": ""})
    _, world = M.open_world(cfg, torch.device("cpu"))
    sets = [set(map(str, part)) for part in (world.train.fields["scene"], world.val.fields["scene"], world.asked)]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_evaluation_by_hand(monkeypatch):
    """Heed = how much worse the loss is with the size of another picture; swap = distance of pictures that differ in it."""
    cfg = M.Config(**M.PRESETS["smoke"])
    vae, world = M.open_world(replace(cfg, out_dir="", conditioning=""), torch.device("cpu"))
    seen, drawn, losses = [], [], iter([1.0, 2.0, 3.0])

    def loss(model, z0, t, *args, controls, drop_s, drop_c, **more):
        seen.append((t, controls, bool(drop_s.any() or drop_c.any())))
        return next(losses)

    def draw(model, vae, items, cfg, device, asked, size=0, seed=1, rows=slice(None)):
        drawn.append((size, seed))
        return torch.full((len(asked), 8, 8, 8), float(size))

    monkeypatch.setattr(M, "diffusion_loss", loss)
    monkeypatch.setattr(M, "pictures", draw)
    verdicts = {"shape": [1, 1, 0, 0], "colour": [1, 0, 1, 0], "all": [0] * 4}
    monkeypatch.setattr(M.zoo, "verify", lambda eye, images, told: verdicts)
    env, items = ddp.Env(0, 1, torch.device("cpu")), M.Items(cfg, None, 0)
    got = M.evaluate(None, vae, replace(world, sizes=[12, 16, 32, 64]), items, cfg, env)
    assert (got["val_loss"], got["heeds"], got["right"]) == (1.0, pytest.approx(50), 25)
    assert got["swap"] == pytest.approx((4 + 20 + 52 + 16 + 48 + 32) / 6) and got["swap_hr"] == pytest.approx(
        (16 + 48 + 32) / 3
    )
    assert drawn == [(12, 7), (16, 7), (32, 7), (64, 7), (0, 1)]  # the same noise at each size
    (t, controls, dropped), (low, same, _), (again, wrong, _) = seen
    torch.testing.assert_close(low, 0.2 * t)
    assert (
        torch.equal(low, again) and torch.equal(controls, same) and torch.equal(controls[:, :5], wrong[:, :5]) and not dropped
    )
    after = {12.0: [16.0], 16.0: [32.0], 24.0: [32.0, 64.0], 32.0: [64.0], 64.0: [12.0]}
    assert all(new in after[old] for old, new in zip(controls[:, 5].tolist(), wrong[:, 5].tolist()))


# 6. Layers of five published models -----------------------------------------------------------------------------------------


def tokens():
    g = torch.Generator().manual_seed(0)
    x, s, t, c = (torch.randn(*shape, generator=g) for shape in ((2, 16, 32), (2, 5, 32), (2, 32), (2, 32)))
    return x, s, t, c


@pytest.mark.parametrize("kind", ["UNetLayer", "DiTLayer", "MDTLayer", "PixArtLayer", "MMDiTLayer"])
def test_layers_start_as_published_and_use_every_condition(kind):
    torch.manual_seed(0)
    layer = getattr(M, kind)(32, 4)
    x, s, t, c = tokens()
    shared = torch.nn.Linear(32, 6 * 32)

    def call(x, s, t, c):
        if kind == "PixArtLayer":
            return layer(x, s, shared(t + c).unflatten(1, (6, 32)))
        out = layer(x, s, t, c)
        return out[0] if kind == "MMDiTLayer" else out

    if kind in ("DiTLayer", "MDTLayer", "MMDiTLayer"):  # adaLN-Zero: the identity at first
        assert torch.equal(call(x, s, t, c), x)
    for p in layer.parameters():
        p.data += 0.05 * torch.randn_like(p)
    base = call(x, s, t, c)
    assert base.shape == x.shape
    for i, name in enumerate("xstc"):
        args = [x, s, t, c]
        args[i] = args[i] + torch.randn_like(args[i])
        assert not torch.allclose(call(*args), base), f"{kind} does not read {name}"


def test_mdt_hides_thirty_percent():
    torch.manual_seed(0)
    layer = M.MDTLayer(32, 4)
    for p in layer.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x, s, t, c = (v.repeat(1, 20, 1)[:, :20] if v.ndim == 3 else v for v in tokens())
    order = torch.stack([torch.randperm(20) for _ in range(2)])
    out = layer(x, s, t, c, order)
    for b in range(2):
        gone = order[b, 14:]
        assert torch.equal(out[b, gone], layer.filler[0].expand(6, -1))
        kept = M.DiTLayer.forward(layer, x[b : b + 1, order[b, :14]], s[b : b + 1], t[b : b + 1], c[b : b + 1])
        torch.testing.assert_close(out[b, order[b, :14]], kept[0])


def test_mmdit_attends_jointly():
    """Text changes with the picture, and the picture with the text, through one softmax over both streams."""
    torch.manual_seed(0)
    layer = M.MMDiTLayer(32, 4)
    for p in layer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, s, t, c = tokens()
    a, b = layer(x, s, t, c), layer(x + 1, s, t, c)
    assert a[1].shape == s.shape and not torch.allclose(a[1], b[1])


# 7. Processes, resume, command line -----------------------------------------------------------------------------------------


def _two_processes(env):
    model = make("attn+schedule").train()
    wrapped = ddp.wrap(model, env)
    rows = slice(env.rank * 4 // env.world, (env.rank + 1) * 4 // env.world)
    u, _, eps = M.draw_noise(0, 5, 4, (4, 8, 8), "cpu")
    z0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    loss = M.diffusion_loss(wrapped, z0[rows], u[rows, 0], eps[rows], "flow", controls=M.full_frame(4, 32)[rows], y=torch.arange(4)[rows],
                            drop_s=u[rows, 1] < 0.5, drop_c=u[rows, 2] < 0.5)  # fmt: skip
    loss.backward()
    return ddp.mean({"loss": loss})["loss"], model.dit.blocks[0].mlp.fc1.weight.grad, model.high.mlp[0].weight.grad


def test_two_processes_equal_one(tmp_path):
    one = _two_processes(ddp.Env(0, 1, torch.device("cpu")))
    for got in in_processes(2, _two_processes, path=tmp_path):
        assert got[0] == pytest.approx(one[0], rel=1e-5)
        torch.testing.assert_close(got[1:], one[1:], rtol=1e-4, atol=1e-8)


def test_overfits_one_batch():
    torch.manual_seed(0)
    model, losses = make(shake=0).train(), []
    opt = torch.optim.AdamW(model.parameters(), 5e-3)
    x = inputs(4)
    z0, eps = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    for _ in range(60):
        loss = M.diffusion_loss(model, z0, torch.linspace(0.1, 0.9, 4), eps, "flow", controls=x["controls"], drop_s=x["drop_s"],
                                drop_c=x["drop_c"], y=x["y"])  # fmt: skip
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.hard  # five kills of each script are in test_hard.py
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    base = ["methods/ldm_conditioning.py", "--preset", "smoke", "--save_every", "1", "--conditioning", "attn", "--task", "text"]
    assert run(*base, "--out_dir", tmp_path / "a").returncode == 0
    process = subprocess.Popen([sys.executable, *base, "--out_dir", str(tmp_path / "b")], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    while process.poll() is None and not (tmp_path / "b" / "attn" / "last.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run(*base, "--out_dir", tmp_path / "b").returncode == 0
    assert (tmp_path / "a/attn/model.safetensors").read_bytes() == (tmp_path / "b/attn/model.safetensors").read_bytes()


def test_command_line_in_one_and_two_processes(tmp_path):
    one = inside(M, "--preset", "smoke", "--out_dir", tmp_path / "1")
    assert one.returncode == 0 and "paper" in one.stdout and "control-swap" in one.stdout, one.stderr
    for name in (
        "attn+schedule/samples/samples.png",
        "attn+schedule/samples/size_swap.png",
        "adaln-sum/curves.png",
        "metrics.json",
    ):
        assert (tmp_path / "1" / name).exists(), name
    two = both(M, "--preset", "smoke", "--out_dir", tmp_path / "2")
    assert two.returncode == 0, two.stderr
    a, b = (json.loads((tmp_path / d / "metrics.json").read_text()) for d in "12")
    for key in ("adaln-sum_val_loss", "attn+schedule_val_loss"):
        assert a[key] == pytest.approx(b[key], rel=1e-3)
    low = tmp_path / "1" / "attn+schedule" / "model.safetensors"
    transfer = inside(M, "--preset", "smoke", "--conditioning", "attn+schedule", "--image_size", "64", "--init", low,
                   "--out_dir", tmp_path / "3")  # fmt: skip
    assert transfer.returncode == 0 and "transferred" in transfer.stdout, transfer.stderr
    state, meta = read_tensors(low)
    foreign = tmp_path / "foreign.safetensors"
    ckpt.export(foreign, state, **{**meta, "vae": "0" * 16})
    refused = inside(M, "--preset", "smoke", "--conditioning", "attn+schedule", "--image_size", "64", "--init", foreign,
                   "--out_dir", tmp_path / "4")  # fmt: skip
    user_error(refused, "another autoencoder")
    assert not (tmp_path / "4" / "attn+schedule_from_scratch").exists()  # before an arm has trained


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--conditioning", "sum"], ["--conditioning sum", "adaln-sum, attn, attn+schedule"]),
        (["--guidance", "-1"], ["--guidance -1.0", "at least 0"]),
        (["--image_size", "30"], ["--image_size 30", "multiple of 8"]),
        (["--init", "none.safetensors"], ["none.safetensors", "does not exist"]),
        (["--data", "nowhere"], ["nowhere", "cache_latents.py"]),
        (["--sizes", "8,big"], ["--sizes 8,big"]),
        (["--heads", "3"], ["heads"]),
    ],
)
def test_user_errors(flags, words, tmp_path):
    user_error(inside(M, "--preset", "smoke", "--out_dir", tmp_path, *flags), *words)
