"""LPL: train a latent diffusion model also on what its frozen decoder makes of the latents, layer by layer.

Paper      Berrada Ifriqi, Astolfi, Hall, Havasi, Benchetrit, Romero-Soriano, Alahari, Drozdzal, Verbeek: Boosting Latent
           Diffusion with Perceptual Objectives. ICLR 2025, arXiv 2411.04873
Idea       A latent diffusion model is trained by a squared error of latents, but its pictures are seen through the decoder,
           which treats directions of the latent very unequally. So push the one-step estimate of the clean latent and
           the clean latent itself through the frozen decoder, and compare its feature maps too: normalised with shared
           statistics, without the few abnormal activations that decoders have (the stand-in hardly any: `kept` is above 0.99),
           several depths weighted by resolution. This term is left out where noise leaves nothing to estimate (above t = 0.75
           of flow, from level 475 of 1,000 on) and before a second phase. No other network is needed, sampling is the same.
Equations  clean latent from eps, v, x0 or flow -> x0_from()      outlier mask -> outlier_mask()
           Eq. 3, the loss -> latent_perceptual_loss()      the gate -> lpl_term()
Read first section 2, then step_loss() and train() in section 6; the rest is ordinary
Symbols    z0 clean latent, zt noisy one, eps noise, t in [0, 1] (1 = pure noise), zt = alpha z0 + sigma eps; f decoder
           features of z0, f_hat of its estimate; keep-mask of f, omega depth weight, tau gate on sigma / alpha
Run        python methods/lpl_ldm.py --preset smoke                            (CPU, no data, under 30 s)
           python methods/lpl_ldm.py                                           (CPU, no data; 3.3 min on two quiet cores)
           python methods/lpl_ldm.py --objective eps                           (or v, x0; choose --weight anew)
           python methods/lpl_ldm.py --after runs/lpl_ldm --weight 1 --out_dir runs/w1   (the same phase 1, other arms)
           torchrun --nproc_per_node=8 methods/lpl_ldm.py --preset paper --data data/imagenet_latents --vae VAE
Data       generated (common/scenes.py), or latents by data_prep/cache_latents.py
Expect     laptop, control and LPL, 16 steps, 3 seeds: class right 92.6 and 94.5 % (+2.0 +- 1.2), log spectrum error of the high
           band -0.45 and -0.41 (0 is right), but a Frechet distance of 14.0 and 14.8 (+0.8 +- 0.9; with v and eps it rises).
           A larger model, longer, on a GPU: distance 10.7 and 9.8 (-7.9 +- 10.5 %), equal spectra; 3 seeds (RESULTS.md)
Differs    from the paper: a class-conditional DiT in place of mmDiT, no text; pixels and depths are averaged where Eq. 3 sums
           them, so that the value does not depend on resolution and decoder; the weight, the gate's tau and whose statistics
           are taken are not verified, hence flags; Frechet distances use a classifier of scenes, which sees them at 32 px.
           from the released code: latents pass post_quant_conv (skipped there). The gate is on sigma / alpha (there, in a
           script for SDXL, "timestep < 200", far tighter). Statistics are the prediction's, of each channel over all its
           pixels (there, --norm cross: the target's norm over channels); outliers count in them, not in the error. Constant
           and tiny maps give no NaN. With several processes the mean is over all gated samples.
           Left out: L1 distance, separate statistics, CLIPScore on real data.
Uses       common/ckpt.py cli.py data.py ddp.py dit.py log.py metrics.py optim.py plot.py resnet.py scenes.py tokenizer.py
           vae.py vit.py zoo.py and weights/   (copy these with this file)
"""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]  # so that python, torchrun and python -m all find common/

from common import ckpt, cli, data, ddp, metrics, optim, plot, scenes, zoo
from common.dit import DiT, load_dit
from common.log import RunLog, history, table, write_json
from common.vae import load_vae, read_tensors


# 1. CONFIG (presets stand in section 7) ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    # run: the same names in all ten files
    out_dir: str = "runs/lpl_ldm"  # one folder a run, with sub-folders pretrain, control and lpl
    seed: int = 0  # of weights, scenes, data order and noise
    steps: int = 200  # optimiser updates of phase 2, each arm; the paper, by summaries of it: 120,000 or 200,000
    batch_size: int = 64  # GLOBAL, divided by the number of processes
    accum: int = 1  # micro-batches an update; LPL is a mean over the gated samples of each; the log has the last one's
    lr: float = 5e-3  # AdamW, constant after the warm-up; large for a small model; usual at scale: 1e-4
    wd: float = 0.0  # weight decay
    warmup: int = 50  # updates of linear warm-up in phase 1; phase 2 goes on with its optimiser's state
    grad_clip: float = 1.0  # largest gradient norm, 0 = off
    ema_decay: float = 0.99  # of the weights that are evaluated, carried from phase 1 to 2; long runs: 0.9999
    dtype: str = "float32"  # float32, or bfloat16 autocast of the denoiser; the decoder stays in float32
    compile: bool = False  # torch.compile the denoiser
    data: str = ""  # folder of data_prep/cache_latents.py; "" = generated scenes
    workers: int = 0  # loader processes of each rank
    log_every: int = 20  # updates between lines of log.jsonl
    eval_every: int = 0  # updates between evaluations; 0 = at the end of phase 2 only
    save_every: int = 200  # updates between checkpoints
    resume: bool = True  # continue from last.pt, exactly; --no-resume starts again
    max_bad: float = 0.01  # share of damaged samples at which the run stops
    # the method
    objective: str = "flow"  # flow, eps, v or x0: what the denoiser predicts
    pretrain: int = 600  # updates of phase 1, shared by both arms; 3 to 5 times phase 2 in the paper, by its reviews
    after: str = ""  # folder of another run whose phase 1 both arms start from; "" = their own
    init: str = ""  # DiT weights, with their sizes, to start phase 2 from instead; the published XL/2 predicts eps
    weight: float = 4.0  # of the perceptual term; 40 % of the loss for flow on scenes, see `share`; photographs: 1 or less
    lpl_start: int = 0  # updates of phase 2 before the term sets in
    tau: float = 3.0  # the term acts where sigma / alpha <= tau
    norm: str = "standardise"  # the prediction's statistics over pixels, or "cross": the target's over channels
    detach_stats: bool = False  # no gradient through the statistics, which also rewards a larger variance
    mask: bool = True  # leave outlying activations out
    depth_weights: str = "inverse"  # 1 / upscaling of the map, or "uniform"
    recompute: bool = True  # checkpoint the decoder's blocks (the loss keeps its maps): less memory, more time
    drop: float = 0.1  # chance that a class becomes the null one
    guidance: float = 2.0  # classifier-free, in sampling (paper)
    sample_steps: str = "4,16"  # evaluated numbers of steps, the last is the headline
    # data and model
    image_size: int = 32  # pixels
    images: int = 4_096  # generated training pictures
    vae: str = ""  # autoencoder; "" = the stand-in of common/weights
    samples: int = 768  # pictures drawn for the evaluation
    inception: str = ""  # of --data: FID's Inception, for the Frechet distance to reconstructions; "" = not measured
    dim: int = 128  # width
    depth: int = 6  # blocks
    heads: int = 4  # of attention
    patch: int = 2  # latent pixels a side


# 2. THE IDEA (start reading here) ------------------------------------------------------------------------------------
@lru_cache
def alpha_bar(steps=1_000):  # twin: alpha_bar
    """DiT's linear betas."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0)


def alpha_sigma(kind, t):
    """Noise level t (B,) in [0, 1] -> alpha, sigma (B, 1, 1, 1) of zt = alpha z0 + sigma eps, float32. Diffusion has 1,000
    levels, t = index / 999, and the network is told 999 t, also for flow."""
    if kind == "flow":
        alpha, sigma = 1 - t, t
    else:
        abar = alpha_bar().to(t.device)[(t * 999).round().long()]
        alpha, sigma = abar.sqrt().float(), (1 - abar).sqrt().float()
    return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)


def x0_from(kind, out, zt, t):
    """The one-step estimate of z0 from the network's output, with the schedule that made zt. All (B, C, h, w), t (B,)."""
    alpha, sigma = alpha_sigma(kind, t)
    if kind == "x0":
        return out
    if kind == "eps":
        return (zt - sigma * out) / alpha
    if kind == "v":  # v = alpha eps - sigma z0
        return alpha * zt - sigma * out
    return zt - sigma * out  # flow: v = eps - z0


@torch.no_grad()
def outlier_mask(f, strength=1):
    """1 where an activation is ordinary: f (B, C, H, W) -> the same shape. strength: the released down_f, 1 at full resolution,
    2 at half, where nothing is forgiven.

    Every map has its own bounds: the 2 % and 98 % ranks, two standard deviations further out. Then outliers up to two
    pixels wide are forgiven (the kept area grows by one pixel), and what is left of the others grows by one (the kept area
    shrinks by two). Outliers that cover more than 2 % of a map on one side move the rank itself and are not found."""
    flat, n = f.flatten(2), f[0, 0].numel()
    low = flat.kthvalue(max(1, int(0.02 * n)), dim=2).values[..., None, None]  # ranks count from 1, tiny maps from 0.02 n < 1
    high = flat.kthvalue(max(1, int(0.98 * n)), dim=2).values[..., None, None]
    margin = 2 * flat.std(2)[..., None, None]
    keep = ((low - margin < f) & (f < high + margin)).float()
    close, grow = (3, 5) if strength == 1 else (1, 3)
    keep = F.max_pool2d(keep, close, 1, close // 2)
    return -F.max_pool2d(-keep, grow, 1, grow // 2)  # padding counts as kept: the border is not eroded


def normalise(f_hat, f, norm="standardise", detach_stats=False):
    """Both maps with ONE set of statistics; with separate ones a wrong mean or scale of a channel would cost nothing."""
    if norm == "cross":  # the released code: the target's length over channels, at every pixel
        length = f.square().sum(1, keepdim=True).sqrt() + 1e-6
        return f_hat / length, f / length
    source = f_hat.detach() if detach_stats else f_hat
    var, mean = torch.var_mean(source, (2, 3), keepdim=True)  # of the prediction, each channel over its pixels
    return (f_hat - mean) * (var + 1e-6).rsqrt(), (f - mean) * (var + 1e-6).rsqrt()


def latent_perceptual_loss(vae, z0_hat, z0, norm="standardise", detach_stats=False, mask=True, depth_weights="inverse",
                           checkpoint=False):  # fmt: skip
    """Eq. 3 with pixels and depths averaged: mean over depths of omega_l / C_l sum_c mean_kept (f_hat - f)^2 -> ((B,), parts).

    z0_hat, z0 (B, C, h, w): scaled latents, float32. parts: the term and the kept share of every depth. Gradient reaches
    z0_hat only; the decoder's weights must be frozen."""
    with torch.no_grad():
        target = vae.features(z0)
    predicted = vae.features(z0_hat, checkpoint)
    total, parts, full = 0.0, {}, target[-1].shape[-1]
    for l, (f_hat, f) in enumerate(zip(predicted, target)):
        omega = 1.0 if depth_weights == "uniform" else target[0].shape[-1] / f.shape[-1]  # 1, 1/2, ... to full resolution
        strength = full // f.shape[-1]  # maps below half the resolution are not masked
        keep = outlier_mask(f, strength) if mask and strength <= 2 else torch.ones_like(f)
        f = f * keep if norm == "cross" else f  # the released code zeroes outliers before it takes lengths
        f_hat, f = normalise(f_hat, f, norm, detach_stats)
        error = ((f_hat - f).square() * keep).sum((2, 3)) / keep.sum((2, 3)).clamp_min(1)  # (B, C)
        term = omega * error.mean(1)
        total = total + term / len(target)
        parts |= {f"lpl_{l}": term.mean(), f"kept_{l}": keep.mean()}
    return total, parts


def lpl_term(vae, kind, out, zt, z0, t, tau=3.0, **options):
    """Mean of the loss over the samples of this (micro-)batch with sigma / alpha <= tau, of all processes. Gated BEFORE
    decoding, which is what saves time. A process without such a sample returns a zero attached to the output, so that backward
    runs alike everywhere; averages over processes in the log count it as 0 (`lpl_*`, `kept_*`, too)."""
    alpha, sigma = alpha_sigma(kind, t)
    gate = (sigma <= tau * alpha).flatten()
    count = ddp.all_sum(gate.sum()) / ddp.world_size()  # of an average process, since DDP averages gradients
    parts = {"gated": gate.float().mean()}
    if not gate.any():
        depths = range(len(vae.decoder.up_blocks) + 1)
        return 0.0 * out.float().sum(), parts | {f"{k}_{l}": 0.0 for l in depths for k in ("lpl", "kept")}
    z0_hat = x0_from(kind, out[gate].float(), zt[gate], t[gate])
    loss, more = latent_perceptual_loss(vae, z0_hat, z0[gate], **options)
    return loss.sum() / count, parts | more


def diffusion_target(kind, z0, eps, t):
    """What the network predicts."""
    alpha, sigma = alpha_sigma(kind, t)
    return {"flow": eps - z0, "eps": eps, "x0": z0, "v": alpha * eps - sigma * z0}[kind]


@torch.no_grad()
def sample(model, z, y, kind, steps, guidance, null):
    """Deterministic sampler from noise z (B, C, h, w) for classes y (B,): estimate z0 and eps, go to the next level. That is
    DDIM for eps, v and x0, and Euler's method for flow."""
    times = torch.linspace(1, 0, steps + 1, device=z.device)
    times = times if kind == "flow" else (times * 999).round() / 999  # the steps that training has seen
    both = torch.cat([y, torch.full_like(y, null)])
    for t, t_next in zip(times[:-1], times[1:]):
        cond, uncond = model(torch.cat([z, z]), 999 * t.expand(2 * len(z)), both).float().chunk(2)
        out = uncond + guidance * (cond - uncond)
        alpha, sigma = alpha_sigma(kind, t[None])
        z0 = x0_from(kind, out, z, t[None])
        eps = (z - alpha * z0) / sigma
        alpha, sigma = alpha_sigma(kind, t_next[None])
        z = alpha * z0 + sigma * eps if t_next > 0 else z0
    return z


# 3. MODULES: none of its own; denoiser and decoder come from common ------------------------------------------------------
# 4. DATA: latents (mean and log-variance, so that the posterior is sampled anew at every step) with a class ----------------
def label(s: scenes.Scene) -> int:
    """72 classes: colour and shape. Size, texture and background are the model's choice."""
    return list(scenes.COLOURS).index(s.things[0].colour) * len(scenes.SHAPES) + scenes.SHAPES.index(s.things[0].shape)


def to_unit(images, device):  # twin: to_unit
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):  # twin: to_uint8
    """(B, 3, H, W) in [-1, 1] -> list of (H, W, 3) uint8."""
    return list(((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())


@torch.no_grad()
def encode(vae, images, device, part=256):  # twin: encode
    """(N, H, W, 3) uint8 -> mean, logvar (N, z, h, w) on the CPU."""
    parts = [vae.encode(to_unit(images[i : i + part], device)) for i in range(0, len(images), part)]
    return [torch.cat([p[j] for p in parts]).cpu() for j in (0, 1)]


def item(sample, rng):
    if sample["label"] < 0:
        raise data.BadSample("a picture without a label")
    return sample["mean"], sample["logvar"], int(sample["label"])


def collate(items):
    if not items:
        raise ValueError("a whole batch of latents has no labels; prepare them again")
    mean, logvar, y = zip(*items)
    return torch.stack(mean), torch.stack(logvar), torch.tensor(y)


@dataclass
class World:
    """All that a run reads."""

    vae: object
    train: object  # latents
    val: object
    classes: list  # names
    power: torch.Tensor  # spectrum of real pictures; with --data of their reconstructions
    eye: object  # for the Frechet distance: the judge of scenes, FID's Inception, or None
    real: torch.Tensor | None  # features of the real pictures
    asked: list | None = None  # generated scenes: those whose classes are drawn for the evaluation


def features(eye, images, device, grid=1):  # twin: features
    """What the Frechet distance compares, of pictures (N, 3, S, S) in [-1, 1]: FID's Inception, or of scenes the judge."""
    if isinstance(eye, metrics.FidInception):
        return torch.cat([eye(((x.to(device).clamp(-1, 1) + 1) * 127.5).round().byte()) for x in images.split(64)])
    return torch.cat([eye.features(x.to(device), grid) for x in images.split(256)])


@lru_cache(maxsize=1)  # the phases of a run share it
@torch.no_grad()
def open_world(cfg: Config, device) -> World:
    vae = (load_vae(cfg.vae) if cfg.vae else zoo.load_vae()).to(device)
    if cfg.image_size % (vae.factor * cfg.patch):
        raise ValueError(f"--image_size {cfg.image_size} must be a multiple of {vae.factor * cfg.patch}: autoencoder x patch")
    if cfg.image_size < 2 * vae.factor or cfg.samples < 2 * ddp.world_size():
        raise ValueError("--image_size must give latents of 2 pixels a side, --samples two pictures a process")
    if not cfg.data:
        counts = (cfg.images, min(512, cfg.samples), cfg.samples)  # to train on, to validate with, to compare with
        worlds = [[scenes.scene(j, 3 * cfg.seed + i, (1, 1), grid=1) for j in range(n)] for i, n in enumerate(counts)]
        images = [scenes.render(world, cfg.image_size) for world in worlds]
        latents = [encode(vae, x, device) for x in images[:2]]
        train, val = (data.Table(mean=m, logvar=v, label=[label(s) for s in w]) for (m, v), w in zip(latents, worlds))
        classes = [f"{c} {s}" for c in scenes.COLOURS for s in scenes.SHAPES]
        real, eye = to_unit(images[2], "cpu"), zoo.load_judge().to(device)
        return World(vae, train, val, classes, spectrum(real), eye, features(eye, real, device), worlds[2])
    train, val = (data.Latents(cfg.data, split, vae.fingerprint()) for split in ("train", "val"))
    if train.size != cfg.image_size:
        raise ValueError(f"{cfg.data} holds latents of {train.size} px, --image_size is {cfg.image_size}")
    if not train.classes:
        raise ValueError(f"{cfg.data} has no classes; prepare labelled pictures with data_prep/")
    if len(val) < ddp.world_size():
        raise ValueError(f"{cfg.data} has {len(val)} pictures to validate with, fewer than processes")
    # The cache holds no pictures: those drawn are compared with reconstructions
    count = min(cfg.samples, len(val)) // ddp.world_size() * ddp.world_size()
    rows = [(s, r) for s, n in enumerate(val.sizes) for r in range(n)][ddp.rank() : count : ddp.world_size()]
    power, real, eye = 0, [], metrics.inception_features(cfg.inception).to(device) if cfg.inception else None
    for i in range(0, len(rows), 64):
        mean = torch.stack([val.read(*row)["mean"] for row in rows[i : i + 64]])
        images = vae.decode(vae.to_latent(mean.to(device))).cpu()
        power = power + len(images) * spectrum(images)
        real += [features(eye, images, device)] if eye else []
    power = ddp.all_sum(power.to(device)).cpu() / count
    return World(vae, train, val, train.classes, power, eye, ddp.gather_rows(torch.cat(real)) if eye else None)


# 5. EVALUATE ------------------------------------------------------------------------------------------------------------
def spectrum(images):
    """Power of the luminance by radial frequency: (N, 3, S, S) -> (S // 2,), the frequencies 0 to S / 2 - 1, in float64."""
    grey = torch.einsum("nchw,c->nhw", images, torch.tensor([0.299, 0.587, 0.114]))
    N, S, _ = grey.shape
    power = sum(torch.fft.fft2(part.double()).abs().square().sum(0) for part in grey.split(256)) / (N * S**2)
    f = torch.fft.fftfreq(S, 1 / S, dtype=torch.float64)
    radius = (f[:, None] ** 2 + f[None] ** 2).sqrt().round().long().flatten()
    return (radius.bincount(power.flatten()) / radius.bincount())[: S // 2]


def spectrum_error(fake, real):
    """Mean log ratio of two spectra below 1/8 and above 1/2 of the Nyquist frequency: 0 is right, negative is too little."""
    ratio, n = (fake / real).log(), len(real)
    return ratio[1 : max(2, n // 8)].mean().item(), ratio[n // 2 :].mean().item()


@torch.no_grad()
def generate(model, vae, y, cfg, steps, device, seed, rows=slice(None)):
    """Pictures of classes y (N,), in [-1, 1], on the CPU; of them `rows`, from noise that does not depend on rows."""
    side, out, part = cfg.image_size // vae.factor, [], max(1, 2**18 // cfg.image_size**2)
    noise = torch.randn(len(y), vae.z, side, side, generator=torch.Generator().manual_seed(seed))[rows]
    for z, labels in zip(noise.split(part), y[rows].split(part)):
        z = sample(model, z.to(device), labels.to(device), cfg.objective, steps, cfg.guidance, model.classes)
        out.append(vae.decode(z).float().cpu())
    return torch.cat(out)


EVALUATION = 1_000_003  # the seed of its noise, far from training's


@torch.no_grad()
def evaluate(model, vae, world, cfg, env):
    """-> (metrics, spectrum of the generated pictures). The work is divided over the processes."""
    out, total, used = {}, torch.zeros(2), min(sum(world.val.sizes), cfg.samples) // env.world * env.world
    part = slice(env.rank, used, env.world)
    rows = data.in_order(world.val, lambda s: item(s, None), collate, 256, part)
    shape = world.val.read(0, 0)["mean"].shape
    noise = zip(*(x[part].split(256) for x in draw_noise(EVALUATION, 0, used, shape, env.device)))
    for (mean, logvar, y), numbers in zip(rows, noise):
        u, n1, n2 = (x[: len(mean)] for x in numbers)  # without bad records
        z0, t = vae.to_latent(mean.to(env.device), logvar.to(env.device), n1), time_of(cfg.objective, u[:, 0])
        alpha, sigma = alpha_sigma(cfg.objective, t)
        got = model(alpha * z0 + sigma * n2, 999 * t, y.to(env.device))
        loss = (got - diffusion_target(cfg.objective, z0, n2, t)).square().mean()
        total += torch.tensor([loss.item() * len(y), len(y)])
    total = ddp.all_sum(total.to(env.device))
    out["val_loss"] = (total[0] / total[1]).item()
    count = cfg.samples // env.world * env.world
    y = torch.tensor([label(s) for s in world.asked[:count]] if world.asked else [i % len(world.classes) for i in range(count)])
    mine = slice(env.rank, None, env.world)
    for steps in map(int, cfg.sample_steps.split(",")):
        images = generate(model, vae, y, cfg, steps, env.device, EVALUATION + 1, mine)
        fake = ddp.all_sum(spectrum(images).to(env.device)).cpu() / env.world
        out[f"low_{steps}"], out[f"high_{steps}"] = spectrum_error(fake, world.power)
        if world.eye:
            fake_f = ddp.gather_rows(features(world.eye, images, env.device))
            out[f"fd_{steps}"] = metrics.frechet_distance(fake_f, world.real)
        if world.asked:
            seen = zoo.verify(world.eye, images.to(env.device), world.asked[:count][mine])
            right = [a and b for a, b in zip(seen["shape"], seen["colour"])]
            out[f"right_{steps}"] = ddp.mean({"right": 100 * float(np.mean(right))})["right"]
    return out, fake


def draw_noise(seed, step, count, shape, device):  # twin: draw_noise
    """Everything random of a step for the GLOBAL batch: any number of processes sees the same numbers.
    -> uniform (count, 3), posterior noise and diffusion noise (count, *shape)."""
    g = torch.Generator(device).manual_seed((seed * 1_000_003 + step) * 2 + 1)
    return (torch.rand(count, 3, generator=g, device=device), torch.randn(count, *shape, generator=g, device=device),
            torch.randn(count, *shape, generator=g, device=device))  # fmt: skip


def time_of(kind, u):  # twin: time_of
    """Uniform u in [0, 1) -> noise level: continuous for flow, one of 1,000 for diffusion."""
    return u if kind == "flow" else (u * 1000).floor() / 999


# 6. TRAIN --------------------------------------------------------------------------------------------------------------
def step_loss(model, vae, z0, t, eps, y, cfg, lpl):
    """L = L_diff + w L_LPL of one batch -> (loss, parts, output). lpl: whether the perceptual term is on."""
    alpha, sigma = alpha_sigma(cfg.objective, t)
    zt = alpha * z0 + sigma * eps
    with torch.autocast(z0.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
        out = model(zt, 999 * t, y)
    out = out.float()
    loss = (out - diffusion_target(cfg.objective, z0, eps, t)).square().mean()
    if not lpl:
        return loss, {"diffusion": loss}, out
    options = {k: getattr(cfg, k) for k in ("norm", "detach_stats", "mask", "depth_weights")}
    term, parts = lpl_term(vae, cfg.objective, out, zt, z0, t, cfg.tau, checkpoint=cfg.recompute, **options)
    total = loss + cfg.weight * term
    return total, {"diffusion": loss, "lpl": term, "share": cfg.weight * term / total, **parts}, out


def gradient_ratio(parts, out, weight):
    """|gradient of w L_LPL| / |gradient of L_diff| at the network's output."""
    g = [torch.autograd.grad(parts[k], out, retain_graph=True)[0].norm() for k in ("lpl", "diffusion")]
    return weight * g[0] / g[1]


def kept_mib(model, vae, closure):
    """What one forward pass of this process keeps for its backward pass beside the weights: distinct storages, any device."""
    weights = {p.untyped_storage().data_ptr() for m in (model, vae) for p in m.parameters()}
    seen = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        closure()
    return sum(seen.values()) / 2**20


def train(cfg: Config, arm: str) -> dict:
    """One phase: "pretrain", or one of the arms "control" and "lpl", which start from its checkpoint (weights, EMA and AdamW's
    state) and see the same data in the same order with the same noise."""
    env, out, here = ddp.start(cfg.seed), Path(cfg.out_dir, arm), settings(cfg, arm)
    world = open_world(cfg, env.device)
    vae = world.vae
    ddp.reseed(cfg.seed, 0, 0)  # the same initial weights on every process
    model = build(cfg, vae, len(world.classes)).to(env.device)
    wrapped = ddp.wrap(torch.compile(model) if cfg.compile else model, env)
    ema, shown = optim.Ema(model, cfg.ema_decay), copy.deepcopy(model).eval()
    opt = torch.optim.AdamW(optim.decay_groups(model, cfg.wd), cfg.lr, (0.9, 0.95), 1e-8, fused=True)
    state = {"model": model, "ema": ema, "opt": opt}
    first = 0 if arm == "pretrain" else cfg.pretrain  # updates before this phase
    start, extra = ckpt.resume(out / "last.pt", here, **state)
    if not start:
        start, extra = first, {"seconds": 0.0, "timed": 0}
        source = Path(cfg.after or cfg.out_dir, "pretrain")
        if first and ckpt.resume(source / "last.pt", replace(phase_one(cfg), resume=True), **state)[0] != first:
            raise ValueError(f"{source} holds no finished phase 1; --no-resume trains it again")
    local = env.share(cfg.batch_size, accum=cfg.accum)  # samples of this process in a micro-batch
    batches = data.Batches(world.train, item, collate, cfg.batch_size // cfg.accum, env, cfg.seed, start * cfg.accum,
                           cfg.workers, cfg.max_bad)  # fmt: skip

    def report(step):
        shown.load_state_dict({**model.state_dict(), **ema.shadow})
        result, curve = evaluate(shown, vae, world, cfg, env)
        log.write(step, **result)
        return result, curve

    def micro_loss(step, micro):
        mean, logvar, y = (x.to(env.device) for x in next(batches))
        noise = draw_noise(cfg.seed, step * cfg.accum + micro, local * env.world, mean.shape[1:], env.device)
        u, n1, n2 = (x[env.rank * local : (env.rank + 1) * local] for x in noise)
        y = torch.where(u[:, 1] < cfg.drop, model.classes, y)
        lpl = arm == "lpl" and step >= first + cfg.lpl_start
        return step_loss(wrapped, vae, vae.to_latent(mean, logvar, n1), time_of(cfg.objective, u[:, 0]), n2, y, cfg, lpl)

    log = RunLog(here, env, arm, start)
    for step in range(start, here.steps):
        began = time.monotonic()
        optim.set_lr(opt, cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup)))
        due = (step + 1) % cfg.log_every == 0 or step + 1 == here.steps
        mean_loss = 0.0
        for micro in range(cfg.accum):
            loss, parts, output = micro_loss(step, micro)
            if due and "lpl" in parts and micro == cfg.accum - 1:
                loss.item()  # a GPU has finished what belongs to the step
                before = time.monotonic()
                parts["gradient_ratio"] = gradient_ratio(parts, output, cfg.weight).item()
                began += time.monotonic() - before  # a diagnostic, no part of a step
            (loss / cfg.accum).backward()
            mean_loss += loss.detach() / cfg.accum
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        opt.step()
        opt.zero_grad(set_to_none=True)
        ema.update(model)
        done, last = step + 1, step + 1 == here.steps
        leave = ddp.interrupted(due)
        if due or leave or done % cfg.save_every == 0:
            ddp.check_finite({"loss": mean_loss.item(), "grad_norm": norm.item()}, step)
        if step >= start + 2:  # the first updates of a process compile and warm up
            extra["seconds"] += time.monotonic() - began
            extra["timed"] += 1
        if due:
            log.write(step, **ddp.mean({"loss": mean_loss, "grad_norm": norm, **parts}), lr=opt.param_groups[0]["lr"])
        if cfg.eval_every and done % cfg.eval_every == 0 and not last:
            report(step)
        log.tick(step)
        if env.is_main and (done % cfg.save_every == 0 or last or leave):
            ckpt.save(out / "last.pt", done, here, extra, **state)
        if leave:
            log.close()
            raise KeyboardInterrupt
    result = {}
    if arm != "pretrain":
        peak = torch.cuda.max_memory_allocated() if env.device.type == "cuda" else None  # of training
        memory = kept_mib(model, vae, lambda: micro_loss(here.steps, 0)[0])
        result, curve = report(here.steps - 1)
        result.update(ms_per_step=1000 * extra["seconds"] / max(1, extra["timed"]), activations_mib=memory,
                      spectrum=curve.tolist(), power=world.power.tolist())  # fmt: skip
        result |= {"peak_gib": peak / 2**30} if peak else {}
        result |= {"share": history(log.dir, "share")["share"][1][-1]} if arm == "lpl" and env.is_main else {}
    if env.is_main and arm != "pretrain":
        ckpt.export(out / "model.safetensors", shown.state_dict(), dit=model.config, vae=vae.fingerprint(),
                    objective=cfg.objective)  # fmt: skip
        y = torch.arange(24) * 31 % len(world.classes)
        images = generate(shown, vae, y, cfg, int(cfg.sample_steps.split(",")[-1]), env.device, 3)
        labels = [world.classes[i] for i in y.tolist()]
        plot.save(plot.grid(to_uint8(images), 8, labels, title=f"{arm}, {cfg.objective}, guidance {cfg.guidance:g}", cell=110,
                            rows_of_text=1), out / "samples" / "samples.png")  # fmt: skip
    if env.is_main:
        keys = ("loss", "diffusion", "lpl") if arm == "lpl" else ("loss",)
        plot.save(plot.lines(history(log.dir, *keys), arm, y="loss"), out / "curves.png")
    log.finish(result)
    return result


def phase_one(cfg: Config) -> Config:
    """The settings that phase 1 depends on, so that runs with other arms may start from it (--after)."""
    method = ("after", "weight", "lpl_start", "tau", "norm", "detach_stats", "mask", "depth_weights", "recompute", "guidance",
              "sample_steps", "samples", "inception", "eval_every")  # fmt: skip
    plain = {k: getattr(Config, k) for k in method}
    return replace(cfg, out_dir=str(Path(cfg.out_dir, "pretrain")), steps=cfg.pretrain, **plain)


def settings(cfg: Config, arm) -> Config:
    """Of one phase, as its folder and checkpoint hold them; steps are those of all phases so far."""
    if arm == "pretrain":
        return phase_one(cfg)
    return replace(cfg, out_dir=str(Path(cfg.out_dir, arm)), steps=cfg.pretrain + cfg.steps)


def build(cfg: Config, vae, classes: int) -> DiT:
    side = cfg.image_size // vae.factor
    if not cfg.init:
        return DiT(side, cfg.patch, vae.z, cfg.dim, cfg.depth, cfg.heads, classes=classes, learn_sigma=False)
    meta = read_tensors(cfg.init)[1]
    if "config" in meta:
        raise ValueError(f"--init {cfg.init} is a model of ldm_conditioning.py, whose network is another one")
    trained = meta.get("objective", "eps")  # our own export says it, the published weights predict eps
    if trained != cfg.objective:
        raise ValueError(f"--init {cfg.init} predicts {trained}; add --objective {trained}")
    if meta.get("vae", vae.fingerprint()) != vae.fingerprint():
        raise ValueError(f"--init {cfg.init} was trained on latents of another autoencoder; pass its --vae")
    published = "" if "dit" in meta else "DiT-XL/2"
    model = load_dit(cfg.init, published, side, learn_sigma=False, resample=True).train()
    for name, p in model.named_parameters():
        p.requires_grad_(name != "pos_embed")
    if model.classes != classes or model.config["channels"] != vae.z:
        raise ValueError(f"--init {cfg.init} has {model.classes} classes and {model.config['channels']} channels, the data "
                         f"{classes} and {vae.z}")  # fmt: skip
    return model


def check(cfg: Config) -> None:
    """One sentence for what a user can get wrong."""
    cli.choose(cfg, objective=("flow", "eps", "v", "x0"), norm=("standardise", "cross"), dtype=("float32", "bfloat16"),
               depth_weights=("inverse", "uniform"))  # fmt: skip
    cli.within(cfg, "steps images samples dim depth heads patch image_size", 1)
    cli.within(cfg, "guidance weight pretrain lpl_start", 0)
    cli.within(cfg, "drop", 0, 1)
    if not cfg.tau >= 0 or cfg.lpl_start >= cfg.steps:  # tau may be infinite: no gate
        raise ValueError(f"--tau {cfg.tau} must not be negative, --lpl_start {cfg.lpl_start} below --steps {cfg.steps}")
    if cfg.inception and not cfg.data:
        raise ValueError("--inception is for --data: generated scenes have a judge of their own")
    if not all(s.isdecimal() and int(s) for s in cfg.sample_steps.split(",")):
        raise ValueError(f"--sample_steps {cfg.sample_steps} must be a comma list of numbers of steps")
    if not cfg.drop and cfg.guidance != 1 and not cfg.init:
        raise ValueError("--drop 0 never trains the null class that --guidance needs; add --guidance 1")
    if cfg.init and (cfg.pretrain or cfg.after):
        raise ValueError("--init replaces phase 1; add --pretrain 0, without --after")
    if cfg.after and not (cfg.pretrain and Path(cfg.after, "pretrain", "last.pt").exists()):
        raise ValueError(f"--after {cfg.after} holds no phase 1 of --pretrain {cfg.pretrain} updates")


def run(cfg: Config) -> dict:
    """Phase 1, then both arms side by side; finished parts are kept. Prints the claim."""
    check(cfg)
    ddp.start(cfg.seed)
    scores = {}
    for arm in ("pretrain", "control", "lpl") if cfg.pretrain and not cfg.after else ("control", "lpl"):
        scores[arm] = ckpt.once(lambda _, arm=arm: train(cfg, arm), settings(cfg, arm))
    scores.pop("pretrain", None)
    result = {f"{arm}_{k}": v for arm, s in scores.items() for k, v in s.items() if k not in ("spectrum", "power")}
    if ddp.rank() == 0:
        show(cfg, scores)
        write_json(Path(cfg.out_dir, "metrics.json"), result)
    return result


def show(cfg, scores):
    """Table on the terminal, spectra as a chart."""
    a, b = scores["control"], scores["lpl"]
    rows, last = [], int(cfg.sample_steps.split(",")[-1])
    for steps in map(int, cfg.sample_steps.split(",")):
        distance = "Frechet distance (Inception, to reconstructions)" if cfg.data else "Frechet distance (judge)"
        for key, text, paper in (("fd", distance, "6 to 20 % better (FID)"), ("right", "class right, %", ""),
                                 ("low", "log spectrum error, low band", "a little worse"),
                                 ("high", "log spectrum error, high band", "better")):  # fmt: skip
            if f"{key}_{steps}" in a:
                x, y = a[f"{key}_{steps}"], b[f"{key}_{steps}"]
                signed = f"size {abs(y) - abs(x):+.2f}"  # of an error that may have either sign
                gain = {"fd": f"{100 * (y / max(x, 1e-9) - 1):+.1f} %", "right": f"{y - x:+.2f}"}.get(key, signed)
                rows.append([f"{text}, {steps} steps", f"{x:.2f}", f"{y:.2f}", gain, paper if steps == last else ""])
    rows.append(["validation loss", f"{a['val_loss']:.4f}", f"{b['val_loss']:.4f}", "", ""])
    rows.append(["milliseconds a step", f"{a['ms_per_step']:.0f}", f"{b['ms_per_step']:.0f}",
                 f"x {b['ms_per_step'] / max(a['ms_per_step'], 1e-9):.2f}", ""])  # fmt: skip
    rows.append(["kept for backward, MiB", f"{a['activations_mib']:.0f}", f"{b['activations_mib']:.0f}",
                 f"x {b['activations_mib'] / a['activations_mib']:.2f}", ""])  # fmt: skip
    if "peak_gib" in a:
        rows.append(["peak memory, GiB", f"{a['peak_gib']:.2f}", f"{b['peak_gib']:.2f}", "", ""])
    rows.append(["the term's share of the loss", "", f"{b['share']:.2f}", "", ""])
    print("\n" + table(rows, [f"{cfg.objective}, equal updates", "control", "LPL", "difference", "paper"]))
    print(f"\npictures, curves and weights: {cfg.out_dir}")
    real = "reconstructed" if cfg.data else "real"
    curves = {real: b["power"], "control": a["spectrum"], "LPL": b["spectrum"]}
    curves = {k: (range(1, len(v)), np.log10(v[1:])) for k, v in curves.items()}
    away = {k: (x, y - curves[real][1]) for k, (x, y) in curves.items()}  # 0 is right
    titles = {"radial power of the luminance": curves, f"the same, minus that of {real} pictures": away}
    charts = [plot.lines(c, t, x="cycles a picture", y="log10", size=(640, 420)) for t, c in titles.items()]
    plot.save(plot.row(charts), Path(cfg.out_dir, "spectrum.png"))


# 7. MAIN ---------------------------------------------------------------------------------------------------------------
PRESETS = {
    "smoke": dict(steps=4, pretrain=4, batch_size=8, warmup=2, images=24, samples=16, sample_steps="2", dim=32, depth=2,
                  heads=2, log_every=2, save_every=2, out_dir="runs/lpl_ldm_smoke"),
    "laptop": {},
    "gpu": dict(pretrain=20_000, steps=5_000, batch_size=512, images=40_000, image_size=64, dim=384, depth=12, heads=6, lr=3e-4,
                ema_decay=0.999, dtype="bfloat16", samples=5_000, sample_steps="5,50", workers=14, save_every=1_000,
                out_dir="runs/lpl_ldm_gpu"),
    # ImageNet 256, DiT-XL/2. Guidance, data and the two phases are the paper's or its reviews'; all else recalled, from other
    # people's code, or ours (set the weight by the logged share, 0.3 to 0.5)
    "paper": dict(data="data/imagenet_latents", pretrain=600_000, steps=200_000, batch_size=256, lr=1e-4, warmup=0, weight=1.0,
                  grad_clip=0.0, ema_decay=0.9999, dtype="bfloat16", workers=12, image_size=256, dim=1152, depth=28, heads=16,
                  sample_steps="5,50", samples=10_000, inception="data/pt_inception-2015-12-05-6726825d.pth", log_every=100,
                  save_every=5_000, out_dir="runs/lpl_ldm_in1k"),
}  # fmt: skip

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
