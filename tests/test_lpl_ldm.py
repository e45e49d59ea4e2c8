"""methods/lpl_ldm.py: the loss, its mask, gate and normalisation exactly; note lpl_ldm (b)."""

import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common import data, ddp, vae
from common.dit import DiT
from methods import lpl_ldm as M
from tests.helpers import ROOT, both, in_processes, inside, run, user_error

NORMS = ("standardise", "cross")


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return vae.VAE(8, (1, 2, 2), 1, 4, 4, scale=0.5).eval().requires_grad_(False)


def latents(n=3, side=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, side, side, generator=g)


# 1. The equation -----------------------------------------------------------------------------------------------------


def slow_loss(decoder, z0_hat, z0, norm):
    """Loops over samples, depths and channels, in NumPy."""
    with torch.no_grad():
        target, got = decoder.features(z0), decoder.features(z0_hat)
    total = np.zeros(len(z0))
    for f, g in zip(target, got):
        strength = {16: 1, 8: 2}.get(f.shape[-1], 0)
        keep = M.outlier_mask(f, strength).numpy() if strength else np.ones(f.shape)
        f, g = f.double().numpy(), g.double().numpy()
        for b in range(len(z0)):
            channels = []
            length = np.sqrt(((f[b] * keep[b]) ** 2).sum(0)) + 1e-6
            for c in range(f.shape[1]):
                if norm == "standardise":
                    sd = math.sqrt(g[b, c].var(ddof=1) + 1e-6)
                    d = (g[b, c] - g[b, c].mean()) / sd - (f[b, c] - g[b, c].mean()) / sd
                else:
                    d = g[b, c] / length - f[b, c] * keep[b, c] / length
                channels.append((d**2 * keep[b, c]).sum() / max(keep[b, c].sum(), 1))
            total[b] += {4: 1, 8: 1 / 2, 16: 1 / 4}[f.shape[-1]] * np.mean(channels)
    return total / len(target)


@pytest.mark.parametrize("norm", NORMS)
def test_loss_equals_loops(decoder, norm):
    z0 = latents()
    z0_hat = z0 + 0.3 * latents(seed=1)
    got, parts = M.latent_perceptual_loss(decoder, z0_hat, z0, norm)
    np.testing.assert_allclose(got.numpy(), slow_loss(decoder, z0_hat, z0, norm), rtol=1e-4)
    assert got.shape == (3,) and set(parts) == {f"{k}_{i}" for k in ("lpl", "kept") for i in range(4)}


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_zero_with_zero_gradient_at_the_target(decoder, norm, detach):
    z0 = latents()
    z0_hat = z0.clone().requires_grad_()
    loss, _ = M.latent_perceptual_loss(decoder, z0_hat, z0, norm, detach)
    loss.sum().backward()
    assert loss.abs().max() == 0 and z0_hat.grad.abs().max() == 0


@pytest.mark.parametrize("kind", ["flow", "eps", "v", "x0"])
def test_a_perfect_network_gives_the_clean_latent(kind):
    z0, eps, t = latents(), latents(seed=1), torch.tensor([0.1, 0.4, 0.7])
    alpha, sigma = M.alpha_sigma(kind, t)
    got = M.x0_from(kind, M.diffusion_target(kind, z0, eps, t), alpha * z0 + sigma * eps, t)
    torch.testing.assert_close(got, z0, atol=1e-5, rtol=1e-4)


def test_eps_and_v_agree_for_any_prediction():
    zt, eps_hat, t = latents(), latents(seed=1), torch.tensor([0.05, 0.3, 0.6])
    alpha, sigma = M.alpha_sigma("eps", t)
    v_hat = (eps_hat - sigma * zt) / alpha
    torch.testing.assert_close(M.x0_from("eps", eps_hat, zt, t), M.x0_from("v", v_hat, zt, t), atol=1e-4, rtol=1e-4)


def test_schedules():
    abar = M.alpha_bar()
    assert abar[0] == pytest.approx(1 - 1e-4) and len(abar) == 1000
    ratio = ((1 - abar) / abar).sqrt()
    assert [int((ratio <= tau).sum()) - 1 for tau in (1, 3, 5)] == [258, 474, 565]  # last step that a gate lets through
    alpha, sigma = M.alpha_sigma("flow", torch.tensor([0.75]))
    assert (sigma / alpha).item() == pytest.approx(3)
    assert M.time_of("eps", torch.tensor([0.0, 0.9999])).tolist() == [0.0, 1.0]


def test_a_step_has_the_method_s_options_and_tells_the_network_its_level(decoder):
    z0, eps, t, y, seen = latents(), latents(seed=1), torch.tensor([0.1, 0.4, 0.7]), torch.zeros(3), []

    def net(zt, level, y):
        seen.append(level)
        return 0.5 * zt

    for more in (dict(norm="cross"), dict(mask=False), dict(depth_weights="uniform"), {}):
        total, parts, out = M.step_loss(net, decoder, z0, t, eps, y, M.Config(weight=2.5, **more), True)
        a = (1 - t).view(-1, 1, 1, 1)
        z0_hat = (a * z0 + (1 - a) * eps) - (1 - a) * out
        want = M.latent_perceptual_loss(decoder, z0_hat, z0, **more)[0].mean()
        torch.testing.assert_close(parts["lpl"], want)
        torch.testing.assert_close(total, (out - (eps - z0)).square().mean() + 2.5 * want)
        torch.testing.assert_close(parts["share"], 2.5 * want / total)
        torch.testing.assert_close(seen[-1], 999 * t)


# 2. The mask: counts checked by hand on a 48 x 48 uniform map, outliers 30 ---------------------------------------------


def masked(size, b, strength, where=20):
    f = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    f[..., where : where + b, where : where + b] = 30
    return int((M.outlier_mask(f, strength) == 0).sum())


@pytest.mark.parametrize("b, strength, count", [(0, 1, 0), (1, 1, 0), (2, 1, 0), (3, 1, 25), (4, 1, 36), (5, 1, 49), (0, 2, 0), (1, 2, 9),
                                                (2, 2, 16), (3, 2, 25)])  # fmt: skip
def test_outlier_counts(b, strength, count):
    assert masked(48, b, strength) == count


def test_outliers_begin_two_standard_deviations_beyond_the_ranks():
    f = torch.linspace(0, 1, 48 * 48)[torch.randperm(48 * 48, generator=torch.Generator().manual_seed(0))].view(1, 1, 48, 48)
    for far, found in ((1.8, False), (2.3, True), (-1.8, False), (-2.3, True)):
        x = f.clone()
        x[..., 20:25, 20:25] = (0.98 if far > 0 else 0.02) + far * f.std()
        assert (M.outlier_mask(x) == 0).any().item() == found, far


@pytest.mark.parametrize("strength", [1, 2])
def test_outliers_in_a_corner_do_not_erode_the_border(strength):
    assert masked(48, 3, strength, where=0) == 16


def test_more_than_two_percent_are_not_found():
    assert masked(48, 7, 1) == 0 and masked(32, 5, 1, where=8) == 0


def test_constant_and_tiny_maps_are_finite(decoder):
    assert (
        M.outlier_mask(torch.zeros(1, 2, 8, 8)).sum() == 0
    )  # strict bounds leave nothing: the loss divides by one, not by zero
    assert M.outlier_mask(torch.rand(1, 1, 2, 2)).shape == (1, 1, 2, 2)
    f = torch.full((1, 4, 2, 2), 3.0)
    for norm in NORMS:
        assert all(x.isfinite().all() for x in M.normalise(f, f + 1, norm))
    zero = torch.zeros(2, 4, 2, 2)
    assert M.latent_perceptual_loss(decoder, zero + 0.1, zero)[0].isfinite().all()


def test_a_constant_target_leaves_nothing_and_costs_nothing():
    f, g = torch.zeros(1, 2, 16, 16), torch.rand(1, 2, 16, 16)
    assert M.latent_perceptual_loss(Maps(), g, f)[0].tolist() == [0]


def test_options_reach_the_maps(decoder):
    g, f = torch.rand(2, 4, 32, 32), torch.rand(2, 4, 32, 32)
    f[0, 0, 3:7, 3:7] = 40
    kept = [M.latent_perceptual_loss(Maps(), g, f, mask=mask)[1]["kept_0"].item() for mask in (False, True)]
    assert kept[0] == 1 > kept[1]
    grads = []
    for detach in (False, True):
        x = g.clone().requires_grad_(True)
        M.latent_perceptual_loss(Maps(), x, f, detach_stats=detach)[0].sum().backward()
        grads.append(x.grad)
    assert not torch.allclose(*grads)
    z0, eps, y = latents(3), latents(3, seed=1), torch.zeros(3, dtype=torch.long)
    t, net = torch.tensor([0.2, 0.5, 0.7]), DiT(4, 2, 4, 16, 1, 2, classes=3, learn_sigma=False)
    for tau, share in ((3.0, 1.0), (1.1, 2 / 3), (0.1, 0.0)):  # sigma / alpha: 1/4, 1, 7/3
        parts = M.step_loss(net, decoder, z0, t, eps, y, M.Config(tau=tau), True)[1]
        assert parts["gated"].item() == pytest.approx(share)


def test_mask_is_per_sample_and_channel():
    f = torch.rand(2, 2, 48, 48, generator=torch.Generator().manual_seed(0))
    f[1, 0, 10:13, 10:13] = 30
    assert (M.outlier_mask(f) == 0).sum((2, 3)).tolist() == [[0, 0], [25, 0]]


# 3. Normalisation ------------------------------------------------------------------------------------------------------


class Maps:
    """Stands for a decoder: given maps instead of latents."""

    def __init__(self, change=lambda f: f):
        self.change = change

    def features(self, z, checkpoint=False):
        return [self.change(z)]


@pytest.mark.parametrize("mask", [False, True])
def test_standardise_ignores_scale_and_shift_of_channels(mask):
    f, g = torch.rand(2, 4, 32, 32).double(), torch.rand(2, 4, 32, 32).double()
    f[0, 0, 3:7, 3:7] = 40
    a, b = torch.tensor([0.5, 1, 2, 8.0]).view(1, 4, 1, 1) * 100, torch.tensor([3.0, -1, 0, 9]).view(1, 4, 1, 1)
    plain = M.latent_perceptual_loss(Maps(lambda x: 100 * x), g, f, mask=mask)[0]  # large, so that epsilon does not count
    moved = M.latent_perceptual_loss(Maps(lambda x: a * x + b), g, f, mask=mask)[0]
    torch.testing.assert_close(plain, moved, rtol=1e-5, atol=1e-6)


def test_cross_ignores_one_common_scale():
    f, g = torch.rand(2, 4, 32, 32).double() + 1, torch.rand(2, 4, 32, 32).double() + 1
    losses = [M.latent_perceptual_loss(Maps(lambda x, s=s: s * x), g, f, "cross")[0] for s in (1.0, 50.0)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-8)


def test_an_outlier_of_the_target_changes_nothing_outside_its_mask():
    """Statistics are the prediction's, so the error map elsewhere is the same bit for bit."""
    f, g = torch.rand(1, 2, 48, 48), torch.rand(1, 2, 48, 48)
    spoiled = f.clone()
    spoiled[0, 0, 20:24, 20:24] = 1e4
    errors = []
    for target in (f, spoiled):
        a, b = M.normalise(g, target)
        errors.append((a - b).square())
    keep = M.outlier_mask(spoiled)
    assert (keep == 0).sum() == 36 and torch.equal(errors[0] * keep, errors[1] * keep)


def test_detached_statistics_only_change_the_gradient():
    f, g = torch.rand(1, 2, 8, 8), torch.rand(1, 2, 8, 8)
    out = []
    for detach in (False, True):
        h = g.clone().requires_grad_()
        a, b = M.normalise(h, f, "standardise", detach)
        (a - b).square().sum().backward()
        out.append(((a - b).detach(), h.grad))
    assert torch.equal(out[0][0], out[1][0]) and not torch.allclose(out[0][1], out[1][1])


def test_detached_statistics_have_no_gradient():
    h, f = torch.rand(1, 2, 8, 8, requires_grad=True), torch.rand(1, 2, 8, 8)
    assert [M.normalise(h, f, "standardise", d)[1].requires_grad for d in (False, True)] == [True, False]


def test_depth_weights(decoder):
    z0, z0_hat = latents(), latents(seed=1)
    inverse = M.latent_perceptual_loss(decoder, z0_hat, z0)[1]
    uniform = M.latent_perceptual_loss(decoder, z0_hat, z0, depth_weights="uniform")[1]
    for l, omega in enumerate((1, 1 / 2, 1 / 4, 1 / 4)):
        torch.testing.assert_close(inverse[f"lpl_{l}"], omega * uniform[f"lpl_{l}"])
    with torch.device("meta"):  # the published decoder: 1, 1/2, 1/4, 1/8, 1/8
        maps = vae.VAE().features(torch.zeros(1, 4, 32, 32))
    assert [maps[0].shape[-1] / m.shape[-1] for m in maps] == [1, 1 / 2, 1 / 4, 1 / 8, 1 / 8]
    assert [maps[-1].shape[-1] // m.shape[-1] for m in maps] == [8, 4, 2, 1, 1]  # so masks: none, none, half, full, full


def test_value_does_not_grow_with_the_area(decoder):
    """Tiling the latent 2 x 2: a sum over pixels would be four times larger."""
    z0, z0_hat = latents(1, 8), latents(1, 8, seed=1)
    one, four = (M.latent_perceptual_loss(decoder, a, b, mask=False)[0].item()
                 for a, b in ((z0_hat, z0), (z0_hat.repeat(1, 1, 2, 2), z0.repeat(1, 1, 2, 2))))  # fmt: skip
    assert four == pytest.approx(one, rel=0.25)


# 4. Gate and gradient flow ---------------------------------------------------------------------------------------------


def parts_of(kind, t, decoder, seed=0, **options):
    torch.manual_seed(seed)
    net = DiT(4, 2, 4, 16, 1, 2, classes=3, learn_sigma=False)
    for p in net.parameters():
        p.data += 0.02 * torch.randn_like(p)
    z0, eps = latents(len(t)), latents(len(t), seed=1)
    alpha, sigma = M.alpha_sigma(kind, t)
    zt = alpha * z0 + sigma * eps
    out = net(zt, 999 * t, torch.zeros(len(t), dtype=torch.long))
    return (
        net,
        out,
        (out - M.diffusion_target(kind, z0, eps, t)).square().mean(),
        M.lpl_term(decoder, kind, out, zt, z0, t, **options),
    )


@pytest.mark.parametrize("kind", ["flow", "eps", "v", "x0"])
def test_gradient_reaches_the_denoiser_only(decoder, kind):
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    net, _, _, (loss, _) = parts_of(kind, torch.tensor([0.1, 0.3, 0.9]), decoder)
    loss.backward()
    grads = [p.grad for p in net.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)
    assert all(p.grad is None for p in decoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in decoder.state_dict().items())


def test_target_branch_has_no_graph(decoder):
    seen = []

    class Spy:
        def features(self, z, checkpoint=False):
            maps = decoder.features(z, checkpoint)
            seen.append(maps[-1].requires_grad)
            return maps

    M.latent_perceptual_loss(Spy(), latents(seed=1).requires_grad_(), latents().requires_grad_())
    assert seen == [False, True]


def test_a_closed_gate_is_zero_and_leaves_the_gradient(decoder):
    net, _, diffusion, (loss, parts) = parts_of("flow", torch.tensor([0.8, 0.9, 0.99]), decoder)
    assert loss.item() == 0 and loss.requires_grad and parts["gated"] == 0
    assert list(parts) == list(parts_of("flow", torch.tensor([0.1, 0.9, 0.99]), decoder)[3][1])  # ranks log the same names
    plain = torch.autograd.grad(diffusion, net.blocks[0].mlp.fc1.weight, retain_graph=True)[0]
    both = torch.autograd.grad(diffusion + loss, net.blocks[0].mlp.fc1.weight)[0]
    assert torch.equal(plain, both)


def test_a_mixed_batch_equals_its_gated_part(decoder):
    t = torch.tensor([0.2, 0.9, 0.7])
    _, out, _, (loss, parts) = parts_of("flow", t, decoder)
    keep = [0, 2]
    z0, eps = latents(), latents(seed=1)
    alpha, sigma = M.alpha_sigma("flow", t)
    zt = alpha * z0 + sigma * eps
    z0_hat = M.x0_from("flow", out[keep], zt[keep], t[keep])
    assert parts["gated"].item() == pytest.approx(2 / 3)
    torch.testing.assert_close(loss, M.latent_perceptual_loss(decoder, z0_hat, z0[keep])[0].mean())


def test_checkpointing_does_not_change_gradients(decoder):
    grads = []
    for checkpoint in (False, True):
        net, _, _, (loss, _) = parts_of("v", torch.tensor([0.1, 0.3, 0.2]), decoder, checkpoint=checkpoint)
        loss.backward()
        grads.append(net.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


def test_checkpointing_keeps_less():
    torch.manual_seed(0)
    large = vae.VAE(16, (1, 2, 2), 3, 4, 4, scale=0.5).eval().requires_grad_(False)
    kept = [M.kept_mib(torch.nn.Identity(), large, lambda c=c: parts_of("v", torch.tensor([0.1, 0.3]), large, checkpoint=c)[3][0])
            for c in (False, True)]  # fmt: skip
    assert kept[1] < 0.7 * kept[0], kept


def test_the_ratio_of_gradients_by_hand():
    out = torch.tensor([1.0, 2.0, 2.0], requires_grad=True)
    parts = {"lpl": 3 * out.sum(), "diffusion": out.square().sum()}
    assert M.gradient_ratio(parts, out, 0.5).item() == pytest.approx(0.5 * 3 * math.sqrt(3) / 6)


def _two_processes(env, t):
    torch.manual_seed(0)
    decoder = vae.VAE(8, (1, 2, 2), 1, 4, 4, scale=0.5).eval().requires_grad_(False)
    net = DiT(4, 2, 4, 16, 1, 2, classes=3, learn_sigma=False)
    for p in net.parameters():
        p.data += 0.02 * torch.randn_like(p)
    model = ddp.wrap(net, env)
    t = torch.tensor(t)
    rows = slice(env.rank * 4 // env.world, (env.rank + 1) * 4 // env.world)
    cfg = M.Config(weight=0.7, batch_size=4)
    z0, eps, y = latents(4)[rows], latents(4, seed=1)[rows], torch.zeros(4, dtype=torch.long)[rows]
    loss, *_ = M.step_loss(model, decoder, z0, t[rows], eps, y, cfg, True)
    loss.backward()
    return ddp.mean({"loss": loss})["loss"], net.blocks[0].mlp.fc1.weight.grad, net.final_layer.linear.weight.grad


@pytest.mark.parametrize("t", [[0.2, 0.9, 0.7, 0.95], [0.2, 0.3, 0.7, 0.95], [0.2, 0.3, 0.95, 0.9]])
def test_two_processes_equal_one(t, tmp_path):
    """Samples below the gate, sigma / alpha = t / (1 - t) up to 3: one and one, two and one, two and none."""
    assert [sum(v / (1 - v) <= M.Config().tau for v in part) for part in (t[:2], t[2:])] in ([1, 1], [2, 1], [2, 0])
    one = _two_processes(ddp.Env(0, 1, torch.device("cpu")), t)
    two = in_processes(2, _two_processes, t, path=tmp_path)
    for got in two:
        assert got[0] == pytest.approx(one[0], rel=1e-5)
        torch.testing.assert_close(got[1:], one[1:], rtol=1e-4, atol=1e-7)


# 5. Sampling, spectrum, training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flow", "eps", "v", "x0"])
def test_sampler_finds_a_known_latent(kind):
    """A network that knows z0 is led there; guidance 1 uses the conditional branch alone."""
    z0, path = latents(2), []

    def net(zt, t, y):
        t, target = t / 999, z0.repeat(2, 1, 1, 1)
        alpha, sigma = M.alpha_sigma(kind, t)
        eps = (zt - alpha * target) / sigma
        path.append(eps)
        out = M.diffusion_target(kind, target, eps, t)
        return torch.where((y == 5).view(-1, 1, 1, 1), 100.0, out)  # the null branch is wrong

    got = M.sample(net, latents(2, seed=3), torch.zeros(2, dtype=torch.long), kind, 7, 1.0, 5)
    torch.testing.assert_close(got, z0, atol=2e-3, rtol=1e-3)
    for eps in path[1:]:  # deterministic: the noise stays, at every level on the way
        torch.testing.assert_close(eps, path[0], atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("kind", ["flow", "eps", "v", "x0"])
def test_sampler_equals_loops_for_a_network_that_does_not_know(kind):
    def net(x, t, y):
        return 0.3 * x + (t / 999 * torch.where(y == 5, 0.0, 0.5)).view(-1, 1, 1, 1)  # guidance 2: 0 + 2 (0.5 - 0)

    z, abar = latents(2), np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    got = M.sample(net, z, torch.zeros(2, dtype=torch.long), kind, 4, 2.0, 5)
    x, n = z.double().numpy(), [0, 250, 500, 749, 999]
    if kind == "flow":
        t, a, s = np.arange(5) / 4, 1 - np.arange(5) / 4, np.arange(5) / 4
    else:
        t, a, s = np.array(n) / 999, abar[n] ** 0.5, (1 - abar[n]) ** 0.5
    for i in (4, 3, 2, 1):
        out = 0.3 * x + t[i]
        z0 = x - s[i] * out if kind == "flow" else {"eps": (x - s[i] * out) / a[i], "v": a[i] * x - s[i] * out, "x0": out}[kind]
        x = a[i - 1] * z0 + s[i - 1] * (x - a[i] * z0) / s[i] if i > 1 else z0
    np.testing.assert_allclose(got.numpy(), x, rtol=2e-3, atol=2e-3)


def test_guidance_goes_beyond_the_class():
    def net(z, t, y):
        return torch.where((y == 5).view(-1, 1, 1, 1), 1.0, 3.0).expand_as(z)  # the null branch says 1, the class 3

    z = latents(2)
    got = M.sample(net, z, torch.zeros(2, dtype=torch.long), "flow", 1, 2.0, 5)  # one step of length 1
    torch.testing.assert_close(got, z - (1 + 2.0 * (3 - 1)))


def test_spectrum_finds_a_wave():
    x = torch.cos(2 * math.pi * 5 * torch.arange(32) / 32).expand(2, 3, 32, 32)
    power = M.spectrum(x)
    assert power.shape == (16,) and power.argmax() == 5 and power[5] > 1e6 * power[9]
    assert M.spectrum_error(power, power) == (0, 0)
    low, high = M.spectrum_error(torch.ones(16) * math.e, torch.ones(16))
    assert (low, high) == pytest.approx((1, 1))


def test_spectrum_by_loops():
    x = torch.rand(2, 3, 16, 16)
    grey = (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]).double().numpy()
    rings = [[] for _ in range(20)]
    for n in range(2):
        for i in range(16):
            for j in range(16):
                u, v = (k if k < 8 else k - 16 for k in (i, j))
                wave = np.exp(-2j * np.pi * (i * np.arange(16)[:, None] + j * np.arange(16)[None]) / 16)
                rings[round(math.hypot(u, v))].append(abs((grey[n] * wave).sum()) ** 2 / 256)
    np.testing.assert_allclose(M.spectrum(x), [np.mean(r) for r in rings[:8]], rtol=1e-4)
    low, high = M.spectrum_error(torch.arange(32.0).exp(), torch.ones(32))
    assert (low, high) == (pytest.approx(2.0), pytest.approx(23.5))  # bands 1 to 3 and 16 to 31


def test_kept_memory_counts_storages_once_and_no_weights():
    layer, x = torch.nn.Linear(1024, 256, bias=False), torch.ones(64, 1024)
    assert M.kept_mib(layer, torch.nn.Identity(), lambda: layer(x).sum()) == 64 * 1024 * 4 / 2**20  # the input; not the weight


def test_weight_zero_reproduces_the_control_arm(tmp_path):
    cfg = M.Config(**{**M.PRESETS["smoke"], "weight": 0.0, "out_dir": str(tmp_path)})
    M.run(cfg)
    same = [(tmp_path / arm / "model.safetensors").read_bytes() for arm in ("control", "lpl")]
    assert same[0] == same[1]
    # both go on with phase 1's AdamW, and what is exported, and was evaluated, are averaged weights
    one, two = (torch.load(tmp_path / arm / "last.pt", weights_only=True) for arm in ("pretrain", "control"))
    assert {s["step"].item() for s in one["opt"]["state"].values()} == {cfg.pretrain}
    assert {s["step"].item() for s in two["opt"]["state"].values()} == {cfg.pretrain + cfg.steps}
    exported = load_file(tmp_path / "control/model.safetensors")
    for k, v in two["ema"].items():
        assert torch.equal(exported[k], v) and (k == "pos_embed" or not torch.equal(v, two["model"][k])), k
    result = json.loads((tmp_path / "lpl/metrics.json").read_text())
    assert result["share"] == 0 and 0 < result["ms_per_step"] < 60_000 and result["activations_mib"] > 0


def test_the_term_falls_when_it_is_trained_on():
    torch.manual_seed(0)
    decoder = vae.VAE(8, (1, 2, 2), 1, 4, 4, scale=0.5).eval().requires_grad_(False)
    net = DiT(4, 2, 4, 32, 2, 2, classes=3, learn_sigma=False)
    opt = torch.optim.AdamW(net.parameters(), 3e-3)
    z0, eps, t, y = latents(8), latents(8, seed=1), torch.linspace(0.05, 0.6, 8), torch.zeros(8, dtype=torch.long)
    values = []
    for _ in range(40):
        loss, parts, _ = M.step_loss(net, decoder, z0, t, eps, y, M.Config(), True)
        values.append(parts["lpl"].item())
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert values[-1] < 0.6 * values[0]


@pytest.mark.hard  # five kills of each script are in test_hard.py
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    base = ["methods/lpl_ldm.py", "--preset", "smoke", "--save_every", "1"]
    assert run(*base, "--out_dir", tmp_path / "a").returncode == 0
    for stop in ("pretrain", "lpl"):
        process = subprocess.Popen([sys.executable, *base, "--out_dir", str(tmp_path / "b")], cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        while process.poll() is None and not (tmp_path / "b" / stop / "last.pt").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run(*base, "--out_dir", tmp_path / "b").returncode == 0
    for arm in ("control", "lpl"):
        assert (tmp_path / "a" / arm / "model.safetensors").read_bytes() == (
            tmp_path / "b" / arm / "model.safetensors"
        ).read_bytes()


def test_command_line_in_one_and_two_processes(tmp_path):
    one = inside(M, "--preset", "smoke", "--out_dir", tmp_path / "1")
    assert one.returncode == 0 and "equal updates" in one.stdout and "Frechet" in one.stdout, one.stderr
    for name in ("lpl/samples/samples.png", "lpl/curves.png", "spectrum.png", "lpl/config.json", "metrics.json"):
        assert (tmp_path / "1" / name).exists(), name
    line = json.loads((tmp_path / "1" / "lpl" / "log.jsonl").read_text().splitlines()[0])
    assert {"loss", "diffusion", "lpl", "share", "gated", "gradient_ratio", "lpl_0", "kept_3"} <= line.keys()
    other = ["--preset", "smoke", "--after", tmp_path / "1", "--weight", "1", "--out_dir", tmp_path / "w"]
    assert inside(M, *other).returncode == 0 and not (tmp_path / "w/pretrain").exists()  # other arms from the same phase 1
    same = [(tmp_path / d / "control/model.safetensors").read_bytes() for d in "1w"]
    assert same[0] == same[1]
    two = both(M, "--preset", "smoke", "--out_dir", tmp_path / "2")
    assert two.returncode == 0, two.stderr
    a, b = (json.loads((tmp_path / d / "metrics.json").read_text()) for d in "12")
    for key in ("control_val_loss", "lpl_val_loss"):
        assert a[key] == pytest.approx(b[key], rel=1e-4)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--objective", "score"], ["--objective score", "flow, eps, v, x0"]),
        (["--guidance", "-1"], ["--guidance -1.0", "at least 0"]),
        (["--image_size", "30"], ["--image_size 30", "multiple of 8"]),
        (["--vae", "none.safetensors"], ["none.safetensors", "does not exist"]),
        (["--init", "none.pt"], ["--init", "--pretrain 0"]),
        (["--drop", "2"], ["--drop"]),
        (["--lpl_start", "4"], ["--lpl_start"]),
        (["--image_size", "4", "--patch", "1"], ["--image_size", "2 pixels a side"]),
        (["--init", "none.pt", "--pretrain", "0"], ["none.pt", "does not exist"]),
        (["--data", "nowhere"], ["nowhere", "cache_latents.py"]),
        (["--sample_steps", "5,x"], ["--sample_steps 5,x"]),
    ],
)
def test_user_errors(flags, words, tmp_path):
    user_error(inside(M, "--preset", "smoke", "--out_dir", tmp_path, *flags), *words)


def test_init_has_to_predict_what_is_trained(tmp_path):
    """Fine-tuning weights that predict eps as a velocity would run without a word. A lost phase 1 would, too."""
    M.ckpt.export(tmp_path / "w.safetensors", {"x": torch.zeros(1)}, objective="v")
    start = ["--preset", "smoke", "--pretrain", 0, "--init", tmp_path / "w.safetensors", "--out_dir", tmp_path / "r"]
    user_error(inside(M, *start), "predicts v", "--objective v")
    torch.save({"x": torch.zeros(1)}, tmp_path / "w.pt")  # published weights do not say it
    user_error(inside(M, *start[:-3], tmp_path / "w.pt", *start[-2:]), "predicts eps")
    assert inside(M, "--preset", "smoke", "--out_dir", tmp_path / "q").returncode == 0
    weights = tmp_path / "q/lpl/model.safetensors"
    done = inside(M, *start[:-3], weights, "--image_size", 64, "--out_dir", tmp_path / "s")
    assert done.returncode == 0, done.stderr
    cfg, vae_ = M.Config(init=str(weights), image_size=64), M.zoo.load_vae()
    model, kept = M.build(cfg, vae_, 72).state_dict(), load_file(weights)
    assert model["pos_embed"].shape[1] == 4 * kept["pos_embed"].shape[1]  # four times as many tokens
    assert all(torch.equal(model[k], v) for k, v in kept.items() if k != "pos_embed")
    with pytest.raises(ValueError, match="72 classes and 8 channels, the data 5"):
        M.build(cfg, vae_, 5)
    (tmp_path / "q/pretrain/last.pt").unlink()
    for arm in ("control", "lpl"):
        (tmp_path / "q" / arm / "metrics.json").unlink()
        (tmp_path / "q" / arm / "last.pt").unlink()
    user_error(inside(M, "--preset", "smoke", "--out_dir", tmp_path / "q"), "no finished phase 1", "--no-resume")


def test_labels_beyond_the_classes_of_a_cache(tmp_path):
    fields = {"mean": torch.zeros(4, 2, 4, 4), "logvar": torch.zeros(4, 2, 4, 4), "controls": torch.zeros(4, 7),
              "label": torch.tensor([0, 1, 5, 1])}  # fmt: skip
    M.ckpt.export(tmp_path / "train-00000.safetensors", fields, captions=[[]] * 4)
    shard = {"name": "train-00000.safetensors", "split": "train", "count": 4}
    manifest = {"vae": "v", "classes": ["a", "b"], "size": 32, "shards": [shard]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    source = data.Latents(tmp_path, "train", "v")
    assert source.read(0, 1)["label"] == 1
    with pytest.raises(ValueError, match="label 5 is outside 2 classes"):
        source.read(0, 2)


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_classes_are_dropped_as_often_as_told_and_every_update_has_its_own_noise(drop, tmp_path, monkeypatch):
    seen, loss = [], M.step_loss

    def spy(model, vae, z0, t, eps, y, *args):
        seen.append((eps, y == model.classes))
        return loss(model, vae, z0, t, eps, y, *args)

    monkeypatch.setattr(M, "step_loss", spy)
    M.train(M.Config(**{**M.PRESETS["smoke"], "out_dir": str(tmp_path), "drop": drop, "accum": 2}), "pretrain")
    assert len(seen) >= 4 and all(null.all() if drop else not null.any() for _, null in seen)
    assert not any(torch.equal(a, b) for i, (a, _) in enumerate(seen) for b, _ in seen[:i])


def test_the_term_starts_late_and_noise_is_drawn_by_update(tmp_path, monkeypatch):
    seen, posterior, loss, to_latent = [], [], M.step_loss, vae.VAE.to_latent

    def spy_loss(model, decoder, z0, t, eps, y, cfg, lpl):
        seen.append(((y == model.classes).float().mean().item(), eps, lpl))
        return loss(model, decoder, z0, t, eps, y, cfg, lpl)

    def spy_latent(self, mean, logvar=None, noise=None):
        posterior.append(noise)
        return to_latent(self, mean, logvar, noise)

    monkeypatch.setattr(M, "step_loss", spy_loss)
    monkeypatch.setattr(vae.VAE, "to_latent", spy_latent)
    monkeypatch.setattr(M, "evaluate", lambda *a: ({}, torch.ones(16)))
    more = dict(pretrain=0, steps=24, batch_size=24, drop=0.25, lpl_start=20, weight=0.1, out_dir=str(tmp_path))
    M.train(M.Config(**{**M.PRESETS["smoke"], **more}), "lpl")
    assert np.mean([null for null, _, _ in seen[:24]]) == pytest.approx(0.25, abs=0.05)
    assert [lpl for _, _, lpl in seen[:24]] == [False] * 20 + [True] * 4  # the evaluation calls it, too
    for i in range(24):
        _, first, second = M.draw_noise(0, i, 24, (8, 8, 8), "cpu")
        assert torch.equal(posterior[i], first) and torch.equal(seen[i][1], second)
