"""Disentangled conditioning: what to draw enters by attention, how it was recorded by a scheduled modulation.

Paper      Berrada Ifriqi, Astolfi, Hall, Askari-Hemmat, Benchetrit, Havasi, Muckley, Alahari, Romero-Soriano, Verbeek,
           Drozdzal: On Improved Conditioning Mechanisms and Pre-training Strategies for Diffusion Models. NeurIPS 2024,
           arXiv 2411.03177
Idea       A diffusion model is told a class or a text, and control metadata: how the picture was cropped, flipped, how
           large it was. If time, class and controls are summed before adaLN they interfere: asking for another size
           changes what is drawn. So let semantics enter through attention only, leave the modulation to time and
           controls, and fade in the controls of fine detail (size) only when there is detail to act on. Low resolution
           and small data serve as pre-training, if positions are resampled and the noise is rescaled for the move.
Equations  strength of a control over time -> control_schedule()      three conditionings -> Model.forward()
           two guidance strengths -> guide()      text slots -> replicate_padding()
           change of resolution -> resample_pos_embed(), rescale_alpha_bar(), shift_time()
Read first section 2, Model in section 3, then train(); five published conditionings follow in section 3
Symbols    z0 clean latent, zt noisy one, eps noise, t in [0, 1] (1 = pure noise), zt = alpha z0 + sigma eps; s semantic
           tokens (B, L, D), c controls (B, 7) = crop box, flip | size; lambda, beta guidance of s and c; k = s' / s
Run        python methods/ldm_conditioning.py [--preset smoke]                 (CPU, no data; 4.6 min on two quiet cores)
           python methods/ldm_conditioning.py --preset transfer                (then: 64 px, from it and from scratch)
           torchrun --nproc_per_node=8 methods/ldm_conditioning.py --preset paper --data data/imagenet_latents --vae VAE
Data       generated (common/scenes.py), or latents by data_prep/cache_latents.py, which records crop, size and flip
Expect     laptop, adaln-sum and attn+schedule: control-swap distance x 100 8.68 and 0.49 (by construction: sizes act in
           the last steps alone), class right 82 and 82 %, Frechet distance 16.7 and 19.0 (+2.3 +- 2.7); 3 seeds, RESULTS.md
Differs    from the paper: DiT in place of mmDiT, attention to s is a sub-layer of its own, and the baseline's MLPs are wider to
           have as many parameters; class tokens, the formulas of schedule, guidance and noise and the padding's constants are
           recalled or derived, not verified, hence flags; the control-swap distance is L2 in latent space (LPIPS there).
           Left out: aspect ratio and colour as controls, recaptioned CC12M. No code was published.
Uses       common/augment.py ckpt.py cli.py data.py ddp.py dit.py log.py metrics.py optim.py plot.py resnet.py scenes.py
           tokenizer.py vae.py vit.py zoo.py and weights/   (copy these with this file)
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]  # so that python, torchrun and python -m all find common/

from common import augment, ckpt, cli, data, ddp, metrics, optim, plot, scenes, zoo
from common.dit import Attention, DiT, Mlp, modulate, read_tensors, sincos_2d, time_features
from common.log import RunLog, history, table, write_json
from common.tokenizer import Tokenizer
from common.vae import load_vae
from common.vit import load_clip, trim


# 1. CONFIG (presets stand in section 7) ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    # run: the same names in all ten files
    out_dir: str = "runs/ldm_conditioning"  # one folder a run; each arm gets a sub-folder
    seed: int = 0  # of weights, scenes, data order and noise
    steps: int = 850  # optimiser updates of each arm
    batch_size: int = 64  # GLOBAL, divided by the number of processes
    accum: int = 1  # micro-batches an update
    lr: float = 5e-3  # AdamW, large for a small model; usual at scale: 1e-4, constant after the warm-up
    wd: float = 0.0  # weight decay
    warmup: int = 50  # updates of linear warm-up; the paper: not known
    decay: float = 0.5  # share of the updates, the last ones, in which lr falls to 0; 0 = none, as is usual at scale
    grad_clip: float = 1.0  # largest gradient norm, 0 = off
    ema_decay: float = 0.99  # of the weights that are evaluated; long runs: 0.9999
    dtype: str = "float32"  # float32, or bfloat16 autocast (loss, norms and noise stay in float32)
    compile: bool = False  # torch.compile the model
    data: str = ""  # folder of data_prep/cache_latents.py; "" = generated scenes
    workers: int = 0  # loader processes of each rank
    log_every: int = 20  # updates between lines of log.jsonl
    eval_every: int = 0  # updates between evaluations; 0 = at the end only
    save_every: int = 200  # updates between checkpoints
    resume: bool = True  # continue from last.pt, exactly; --no-resume starts again
    max_bad: float = 0.01  # share of damaged samples at which the run stops
    # the method
    conditioning: str = "adaln-sum,attn+schedule"  # of adaln-sum, attn, attn+schedule; "attn" tells attention from schedule
    task: str = "class"  # class or text
    objective: str = "flow"  # flow, eps or v; the paper samples with DDIM, so probably trains diffusion; not verified
    control_power: float = 8.0  # exponent of the schedule, the larger, the later sizes act; the paper's is not verified
    control_init: str = "zero"  # last layer of the control embedders: zero or normal
    drop_semantic: float = 0.1  # chance that class or text becomes the null one
    drop_control: float = 0.1  # chance that the controls are left out, drawn independently
    guidance: float = 2.0  # lambda, of semantics; 1 = none; the branch without both learns from drop_semantic x drop_control
    control_guidance: float = 1.0  # beta, of controls; 1 = ordinary guidance, 0 = controls ignored
    sample_steps: int = 16  # of DDIM / Euler; the paper: 50 for curves, 250 for its table of controls
    class_tokens: int = 4  # learned tokens of each class, which blocks attend to
    padding: str = "noisy"  # of text slots: zero (tokens of zeros, attended to as others), replicate or noisy
    beta_txt: float = 0.02  # noise of replicated tokens, in standard deviations of the prompt's tokens
    slots: int = 48  # text tokens that are attended to, longer texts are cut; CLIP's: 77
    text_encoder: str = ""  # folder of a CLIP in Hugging Face's layout, weights and merges; "" = the stand-in for scenes
    # transfer
    init: str = ""  # model.safetensors to start from; each arm is then trained with and without it
    positions: str = "resample"  # at another resolution: resample, extrapolate or interpolate (bicubic)
    base_size: int = 0  # side whose pictures have the plain noise schedule, larger ones a noisier; 0 = --init's, or image_size
    # data and model
    image_size: int = 32  # pixels
    images: int = 4_096  # generated training pictures
    views: int = 2  # random crops of each picture, encoded once; this and the next five are of generated scenes
    objects: int = 1  # at most so many in a generated scene
    grid: int = 1  # cells a side of generated scenes: 1 close-up, 2, 3
    min_crop: float = 0.8  # smallest crop, as a share of the area; 1 = no crops
    crop: str = "resize"  # resize: crops made as small as needed; direct: cut out at half the side, for a later --init
    flip: float = 0.5  # chance of a mirrored picture
    sizes: str = "12,16,24,32,64"  # sides at which generated pictures are recorded, and that are asked for
    vae: str = ""  # autoencoder; "" = the stand-in of common/weights
    samples: int = 768  # pictures drawn for the Frechet distance
    inception: str = ""  # of --data: FID's Inception, for the distance to reconstructions; "" = not measured
    dim: int = 128  # width
    depth: int = 6  # blocks
    heads: int = 4  # of attention
    patch: int = 2  # latent pixels a side


# 2. THE IDEA (start reading here) ------------------------------------------------------------------------------------
def control_schedule(t, power=8.0):  # Fig. 3: zero while semantics are decided, one where detail is added
    """Strength of low-level controls at noise level t in [0, 1], 1 = pure noise: (1 - cos(pi (1 - t)^power)) / 2."""
    return (1 - torch.cos(torch.pi * (1 - t) ** power)) / 2


def control_vector(high, low, t, power=None):
    """c_emb = E_h(phi_h) + gamma(t) E_l(phi_l). high (crop, flip), low (size): (B, D); t (B,); power None: no schedule.

    Names as in the text; its abstract calls crops and flips low-level, too."""
    return high + (low if power is None else control_schedule(t, power)[:, None] * low)


def guide(e_cs, e_0s, e_00, semantic, control):
    """Outputs with (controls, semantics), (null, semantics), (null, null) -> lambda [beta e_cs + (1 - beta) e_0s] + (1 -
    lambda) e_00. semantic: lambda, control: beta."""
    return semantic * (control * e_cs + (1 - control) * e_0s) + (1 - semantic) * e_00


def replicate_padding(tokens, lengths, slots, beta, noise=None):  # twin: replicate_padding
    """Fills the slots behind a short text with copies of its tokens, the m-th copy with noise beta * std * sqrt(m).

    tokens (B, L, D), of which lengths (B,) are real; std: over the text's tokens, of each channel; noise (B or 1, slots, D):
    given, or drawn. Real tokens stay as they are, and all slots are valid afterwards -> (B, slots, D)."""
    n = lengths.clamp(1, slots)[:, None]
    place = torch.arange(slots, device=tokens.device)[None]
    out = tokens.gather(1, (place % n)[..., None].expand(-1, -1, tokens.shape[-1]))
    real = (torch.arange(tokens.shape[1], device=tokens.device)[None] < n)[..., None]
    text = tokens.detach()  # the root of a zero variance, of one token alone, has no gradient
    mean = (text * real).sum(1, keepdim=True) / n[..., None]
    std = (((text - mean) * real).square().sum(1, keepdim=True) / n[..., None]).sqrt()
    copy_number = (place // n)[..., None]  # 0 for the text itself
    return out + beta * std * copy_number.sqrt() * (torch.randn_like(out) if noise is None else noise)


# Transfer to another resolution: everything at index t should look as uncertain as it did where the model was trained.
def resample_pos_embed(dim, grid, base_grid):  # Fig. 4
    """Table (1, grid * grid, dim) whose places lie between 0 and base_grid in finer steps, where extrapolation goes on in whole
    steps to places that the model has never seen. From 0 on, not centred, as "interpolate" is."""
    places = torch.arange(grid, dtype=torch.float64) * base_grid / grid
    return sincos_2d(dim, places, places)


def rescale_alpha_bar(abar, s, s_new):  # Fig. A1 (direction; the formula is derived): SNR' = SNR (s / s')^2
    """Cumulative noise schedule of side s_new that is as uncertain as `abar` at side s: (s_new / s)^2 pixels show one patch.
    Composes; identity for s = s_new."""
    r = (s / s_new) ** 2
    return r * abar / (1 + (r - 1) * abar)


def shift_time(t, k):
    """The same for a straight path: noise / signal = t / (1 - t) becomes k times larger."""
    return k * t / (1 + (k - 1) * t)


@lru_cache
def alpha_bar(steps=1_000):  # twin: alpha_bar
    """DiT's linear betas."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0)


def alpha_sigma(kind, t, k=1.0):
    """Noise level t (B,) in [0, 1] -> alpha, sigma (B, 1, 1, 1) of zt = alpha z0 + sigma eps; k = s' / s."""
    if kind == "flow":
        sigma = shift_time(t, k)
        alpha = 1 - sigma
    else:
        abar = rescale_alpha_bar(alpha_bar().to(t.device), 1.0, k)[(t * 999).round().long()]
        alpha, sigma = abar.sqrt().float(), (1 - abar).sqrt().float()
    return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)


def target_of(kind, z0, eps, alpha, sigma):
    """What the network predicts."""
    return {"flow": eps - z0, "eps": eps, "v": alpha * eps - sigma * z0}[kind]


def clean_from(kind, out, zt, alpha, sigma):
    """The network's estimate of z0: the inverse of target_of."""
    if kind == "eps":
        return (zt - sigma * out) / alpha
    return zt - sigma * out if kind == "flow" else alpha * zt - sigma * out


def diffusion_loss(model, z0, t, eps, kind, k=1.0, **conditions):
    """Mean squared error of the network's output, float32. z0, eps (B, C, h, w); t (B,), uniform in training, all equal."""
    alpha, sigma = alpha_sigma(kind, t, k)
    out = model(alpha * z0 + sigma * eps, t, **conditions)
    return (out.float() - target_of(kind, z0, eps, alpha, sigma)).square().mean()


def time_of(kind, u):  # twin: time_of
    """Uniform u in [0, 1) -> noise level: continuous for flow, one of 1,000 for diffusion."""
    return u if kind == "flow" else (u * 1000).floor() / 999


@torch.no_grad()
def sample(model, z, semantic, controls, kind, steps, guidance=1.0, control_guidance=1.0, k=1.0):
    """Deterministic sampler from noise z (B, C, h, w): estimate z0 and eps, go to the next level. That is DDIM for eps and v,
    and Euler's method for flow. Evaluates the network once, twice or three times a step, as the guidance needs."""
    B, times = len(z), torch.linspace(1, 0, steps + 1, device=z.device)
    times = times if kind == "flow" else (times * 999).round() / 999  # the steps that training has seen
    # (drop the controls, drop the semantics), as far as the guidance needs them
    branches = [b for b, used in (((False, False), control_guidance != 0), ((True, False), control_guidance != 1),
                                  ((True, True), guidance != 1)) if used]  # fmt: skip
    drop_c, drop_s = (torch.tensor([b[i] for b in branches], device=z.device).repeat_interleave(B) for i in (0, 1))
    many = len(branches)
    semantic = {name: v.repeat(many, *[1] * (v.ndim - 1)) for name, v in semantic.items()}
    for t, t_next in zip(times[:-1], times[1:]):
        out = model(z.repeat(many, 1, 1, 1), t.expand(many * B), controls=controls.repeat(many, 1), drop_s=drop_s,
                    drop_c=drop_c, **semantic).float()  # fmt: skip
        e, zero = dict(zip(branches, out.chunk(many))), torch.zeros_like(z)
        e = guide(e.get((False, False), zero), e.get((True, False), zero), e.get((True, True), zero),
                  guidance, control_guidance)  # fmt: skip
        alpha, sigma = alpha_sigma(kind, t[None], k)
        z0 = clean_from(kind, e, z, alpha, sigma)
        eps = (z - alpha * z0) / sigma
        alpha, sigma = alpha_sigma(kind, t_next[None], k)
        z = alpha * z0 + sigma * eps if t_next > 0 else z0
    return z


# 3. MODULES: the model of the three conditionings; five published layers to compare with --------------------------------
class ControlEmbed(nn.Module):
    """Each number as a sinusoid, then two layers with SiLU: (B, n) -> (B, D). With init zero a model does not change when
    controls are added to it."""

    def __init__(self, count: int, dim: int, init: str):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256 * count, dim), nn.SiLU(), nn.Linear(dim, dim))
        nn.init.zeros_(self.mlp[2].bias)
        nn.init.zeros_(self.mlp[2].weight) if init == "zero" else nn.init.normal_(self.mlp[2].weight, std=0.02)

    def forward(self, x):
        return self.mlp(time_features(x.flatten()).view(len(x), -1))


class ClassTokens(nn.Module):
    """Class -> (B, K, D): K learned tokens a class to be attended to, or, for adaln-sum, DiT's one vector, N(0, 0.02); the last
    class is the null one."""

    def __init__(self, classes: int, tokens: int, dim: int, attended: bool):
        super().__init__()
        self.tokens, self.table = tokens, nn.Embedding(classes + 1, tokens * dim)
        self.norm = nn.LayerNorm(dim) if attended else nn.Identity()
        if not attended:
            nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, y, drop):
        y = torch.where(drop, self.table.num_embeddings - 1, y)
        return self.norm(self.table(y).view(len(y), self.tokens, -1))


class TextTokens(nn.Module):
    """Text ids -> (B, slots, D): tokens of a frozen text encoder, projected, the padding filled; a learned null token if
    dropped. noise (B, slots, D) of the padding is given in training, new each time; without it, it is always the same."""

    def __init__(self, encoder, cfg: Config):
        super().__init__()
        self.encoder = [encoder]  # in a list: neither trained nor saved with the model
        self.proj, self.null = nn.Linear(encoder.width, cfg.dim), nn.Parameter(torch.randn(1, 1, cfg.dim) * 0.02)
        self.padding, self.beta, self.slots = cfg.padding, cfg.beta_txt, cfg.slots

    def forward(self, ids, drop, noise=None):
        with torch.no_grad():
            x = self.encoder[0].hidden(ids)
        # the end token has the largest id; the stand-in reader puts a few tokens of its own in front
        x, lengths = self.proj(x), ids.argmax(1) + 1 + x.shape[1] - ids.shape[1]
        if self.padding == "zero":
            real = torch.arange(x.shape[1], device=x.device)[None] < lengths[:, None]
            x = F.pad(x * real[..., None], (0, 0, 0, max(0, self.slots - x.shape[1])))[:, : self.slots]
        else:
            if noise is None:
                noise = torch.randn(1, self.slots, x.shape[2], generator=torch.Generator().manual_seed(1)).to(x)
            x = replicate_padding(x, lengths, self.slots, self.beta if self.padding == "noisy" else 0.0, noise)
        return torch.where(drop[:, None, None], self.null, x)


class Model(nn.Module):
    """DiT with one of the three conditionings. channels, side: of the latent; kinds: number of classes, or a text encoder."""

    def __init__(self, cfg: Config, channels: int, side: int, kinds):
        super().__init__()
        self.how, self.power = cfg.conditioning, cfg.control_power
        attends = self.how != "adaln-sum"
        # cross-attention has 4 D^2 weights a block; the baseline gets them as wider MLPs
        self.dit = DiT(side, cfg.patch, channels, cfg.dim, cfg.depth, cfg.heads, 4.0 if attends else 6.0, 0, False, attends)
        self.high, self.low = ControlEmbed(5, cfg.dim, cfg.control_init), ControlEmbed(2, cfg.dim, cfg.control_init)
        tokens = cfg.class_tokens if attends else 1
        self.semantic = TextTokens(kinds, cfg) if cfg.task == "text" else ClassTokens(kinds, tokens, cfg.dim, attends)

    def forward(self, zt, t, controls, drop_s, drop_c, **semantic):
        """zt (B, C, h, w); t (B,) in [0, 1]; controls (B, 7); drop_s, drop_c (B,) bool; semantic: y (B,), or ids (B, L) and in
        training the padding's noise."""
        high, low = self.high(controls[:, :5] * 1000), self.low(controls[:, 5:])  # shares of the image; pixels
        c = control_vector(high, low, t, self.power if self.how == "attn+schedule" else None)
        c = c * ~drop_c[:, None]  # null controls: the zero vector
        s = self.semantic(drop=drop_s, **semantic)  # (B, L, D)
        if self.how == "adaln-sum":  # time + class + controls, all in one sum
            return self.dit(zt, 999 * t, add=c + s.mean(1))
        return self.dit(zt, 999 * t, add=c, context=s)  # semantics by attention only


# How five published models let conditions into a layer, reduced to that, to be compared; none of them is trained here. Image
# tokens x (B, N, D), semantic tokens s (B, L, D), time t and controls c (B, D) -> x (mmDiT: x and s).
class UNetLayer(nn.Module):
    """Stable Diffusion, SDXL: time + controls (in SDXL pooled text, too) are ADDED to the residual block's activations;
    cross-attention to text."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, dim), nn.GroupNorm(4, dim)
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1)
        self.time, self.norms = nn.Linear(dim, dim), nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.attn, self.cross, self.mlp = Attention(dim, heads), Attention(dim, heads, cross=True), Mlp(dim, 4 * dim)

    def forward(self, x, s, t, c):
        img = x.transpose(1, 2).unflatten(2, (math.isqrt(x.shape[1]), -1))  # (B, D, h, w)
        h = self.conv1(F.silu(self.norm1(img))) + self.time(F.silu(t + c))[..., None, None]
        x = (img + self.conv2(F.silu(self.norm2(h)))).flatten(2).transpose(1, 2)
        x = x + self.attn(self.norms[0](x))
        x = x + self.cross(self.norms[1](x), s)
        return x + self.mlp(self.norms[2](x))


class DiTLayer(nn.Module):
    """DiT: everything is summed; six vectors from the sum shift, scale and gate attention and MLP (adaLN-Zero)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(dim, 1e-6, False), Attention(dim, heads), Mlp(dim, 4 * dim)
        self.six = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        nn.init.zeros_(self.six[1].weight)
        nn.init.zeros_(self.six[1].bias)

    def forward(self, x, s, t, c):
        return self.blocks(x, *self.six(t + c + s.mean(1)).chunk(6, 1))

    def blocks(self, x, s1, c1, g1, s2, c2, g2):
        x = x + g1[:, None] * self.attn(modulate(self.norm(x), s1, c1))
        return x + g2[:, None] * self.mlp(modulate(self.norm(x), s2, c2))


class MDTLayer(DiTLayer):
    """mDT: DiT's layer on the tokens that a random mask leaves (30 % hidden in training); a side interpolater, here one
    learned token, fills the gaps before the decoder's layers."""

    def __init__(self, dim, heads, hidden=0.3):
        super().__init__(dim, heads)
        self.hidden, self.filler = hidden, nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x, s, t, c, order=None):
        """order (B, N): the tokens in random order; None (sampling): nothing is hidden."""
        if order is None:
            return super().forward(x, s, t, c)
        kept = order[:, : round(x.shape[1] * (1 - self.hidden)), None].expand(-1, -1, x.shape[2])
        return self.filler.expand_as(x).scatter(1, kept, super().forward(x.gather(1, kept), s, t, c))


class PixArtLayer(DiTLayer):
    """PixArt: ONE network gives six vectors for all layers, each adds a table of its own (adaLN-single); cross-attention to
    text, un-modulated, between attention and MLP; controls are added to time."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.six = None  # shared by all layers, and given: shared (B, 6, D)
        self.own, self.cross = nn.Parameter(torch.randn(6, dim) / dim**0.5), Attention(dim, heads, cross=True)
        nn.init.zeros_(self.cross.proj.weight)
        nn.init.zeros_(self.cross.proj.bias)

    def forward(self, x, s, shared):
        s1, c1, g1, s2, c2, g2 = (self.own + shared).unbind(1)
        x = x + g1[:, None] * self.attn(modulate(self.norm(x), s1, c1))
        x = x + self.cross(x, s)
        return x + g2[:, None] * self.mlp(modulate(self.norm(x), s2, c2))


class MMDiTLayer(nn.Module):
    """Stable Diffusion 3: text is a second stream with weights of its own; both attend to both, queries and keys through
    RMSNorm; time and pooled text modulate either stream."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim, 1e-6, False)
        self.six = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim)) for _ in range(2))
        self.qkv, self.proj = (nn.ModuleList(nn.Linear(dim, n * dim) for _ in range(2)) for n in (3, 1))
        self.rms = nn.ModuleList(nn.RMSNorm(dim // heads) for _ in range(4))
        self.mlp = nn.ModuleList(Mlp(dim, 4 * dim) for _ in range(2))
        for six in self.six:
            nn.init.zeros_(six[1].weight)
            nn.init.zeros_(six[1].bias)

    def forward(self, x, s, t, c):
        streams, mods = (x, s), [six(t + c + s.mean(1)).chunk(6, 1) for six in self.six]
        q, k, v = [], [], []
        for i, (z, m) in enumerate(zip(streams, mods)):
            parts = self.qkv[i](modulate(self.norm(z), m[0], m[1])).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            q, k, v = q + [self.rms[2 * i](parts[0])], k + [self.rms[2 * i + 1](parts[1])], v + [parts[2]]
        joint = F.scaled_dot_product_attention(torch.cat(q, 2), torch.cat(k, 2), torch.cat(v, 2))
        out = joint.transpose(1, 2).flatten(2).split([x.shape[1], s.shape[1]], 1)
        streams = [z + m[2][:, None] * self.proj[i](o) for i, (z, m, o) in enumerate(zip(streams, mods, out))]
        return tuple(z + m[5][:, None] * self.mlp[i](modulate(self.norm(z), m[3], m[4]))
                     for i, (z, m) in enumerate(zip(streams, mods)))  # fmt: skip


# 4. DATA: latents with a label, captions and the controls of the view that was encoded -----------------------------------
def full_frame(count, size, device="cpu"):
    """Controls that ask for an uncropped, unflipped picture of `size` pixels: crop's top, left, height, width, flip | size."""
    return torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, size, size], device=device).repeat(count, 1)


def label(s: scenes.Scene) -> int:
    """72 classes: colour and shape of the first object."""
    return list(scenes.COLOURS).index(s.things[0].colour) * len(scenes.SHAPES) + scenes.SHAPES.index(s.things[0].shape)


def make_scenes(cfg: Config, count: int, seed: int):
    return [scenes.scene(i, seed, (1, cfg.objects), grid=cfg.grid) for i in range(count)]


def to_unit(images, device):  # twin: to_unit
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode(vae, images, device, part=256):  # twin: encode
    """(N, H, W, 3) uint8 -> mean, logvar (N, z, h, w) on the CPU."""
    parts = [vae.encode(to_unit(images[i : i + part], device)) for i in range(0, len(images), part)]
    return [torch.cat([p[j] for p in parts]).cpu() for j in (0, 1)]


def scene_latents(cfg: Config, vae, device, count: int, seed: int) -> data.Table:
    """Scenes recorded at one of the sizes, then cropped, flipped, resized and encoded: `views` of each."""
    world, sizes = make_scenes(cfg, count, seed) * cfg.views, [int(s) for s in cfg.sizes.split(",")]
    shrink = 4.0 if cfg.crop == "direct" else 1.0
    views, controls = [], []
    for i, s in enumerate(world):
        rng = np.random.default_rng((seed, 2, i))
        picture = Image.fromarray(scenes.render([s], int(rng.choice(sizes)))[0])
        view, c = augment.random_view(picture, cfg.image_size, rng, (cfg.min_crop / shrink, 1 / shrink), cfg.flip)
        views.append(view)
        controls.append(c)
    mean, logvar = encode(vae, np.stack(views), device)
    return data.Table(mean=mean, logvar=logvar, controls=torch.tensor(np.stack(controls)), label=[label(s) for s in world],
                      scene=world)  # fmt: skip


class Items:
    """make(sample, rng) and collate for data.Batches: posterior, controls, and the label or one caption's ids."""

    def __init__(self, cfg, tok, context):
        self.cfg, self.tok, self.context = cfg, tok, context

    def __call__(self, sample, rng):
        if self.cfg.task == "class":
            what = int(sample["label"])
            if what < 0:
                raise data.BadSample("a picture without a label")
        elif not sample.get("captions", True):
            raise data.BadSample("a picture without a caption")
        elif "scene" in sample:  # the full caption, or one of endless paraphrases that may leave details out
            what = scenes.caption(sample["scene"], int(rng.integers(1 << 30)) if rng.random() < 0.5 else 0)
        else:
            what = sample["captions"][rng.integers(len(sample["captions"]))]
        return sample["mean"], sample["logvar"], sample["controls"], what

    def collate(self, items):
        if not items:
            raise ValueError("a whole batch of latents has no labels or captions; prepare them again")
        mean, logvar, controls, what = zip(*items)
        return torch.stack(mean), torch.stack(logvar), torch.stack(controls), self.semantic(what)

    def name(self, asked):
        """A scene's label or full caption; labels and captions as they are."""
        if not isinstance(asked, scenes.Scene):
            return asked
        return label(asked) if self.cfg.task == "class" else scenes.caption(asked)

    def semantic(self, what):
        """Labels or texts -> what the model takes."""
        return {"y": torch.tensor(what)} if self.cfg.task == "class" else {"ids": trim(self.tok(list(what), self.context))}


@dataclass
class World:
    """All that a run reads: training and validation latents, what to draw for the evaluation, real pictures of it."""

    train: object
    val: object
    kinds: object  # number of classes, or the text encoder
    tok: object  # its tokenizer, or None
    asked: list  # scenes, labels or captions
    eye: object  # for the Frechet distance: the judge of scenes, FID's Inception, or None
    real: torch.Tensor | None  # features of the real pictures
    sizes: list  # sides of originals that are asked for: those of generated scenes, or five that occur


def features(eye, images, device, grid=1):  # twin: features
    """What the Frechet distance compares, of pictures (N, 3, S, S) in [-1, 1]: FID's Inception, or of scenes the judge."""
    if isinstance(eye, metrics.FidInception):
        return torch.cat([eye(((x.to(device).clamp(-1, 1) + 1) * 127.5).round().byte()) for x in images.split(64)])
    return torch.cat([eye.features(x.to(device), grid) for x in images.split(256)])


@lru_cache(maxsize=1)  # the arms of a run share it
@torch.no_grad()
def open_world(cfg: Config, device) -> tuple[nn.Module, World]:
    """The autoencoder, and all that is read."""
    vae = (load_vae(cfg.vae) if cfg.vae else zoo.load_vae()).to(device)
    if cfg.image_size % (vae.factor * cfg.patch):
        raise ValueError(f"--image_size {cfg.image_size} must be a multiple of {vae.factor * cfg.patch}: autoencoder x patch")
    if cfg.samples < 2 * ddp.world_size():
        raise ValueError(f"--samples {cfg.samples} must be two pictures a process at least")
    if not cfg.data:
        train = scene_latents(cfg, vae, device, cfg.images, 3 * cfg.seed)
        val = scene_latents(replace(cfg, views=1), vae, device, min(512, cfg.samples), 3 * cfg.seed + 1)
        asked = make_scenes(cfg, cfg.samples, 3 * cfg.seed + 2)
        eye = zoo.load_judge().to(device)
        real = features(eye, to_unit(scenes.render(asked, cfg.image_size), "cpu"), device, cfg.grid)
        return vae, World(train, val, *semantics(cfg, len(scenes.COLOURS) * len(scenes.SHAPES), device), asked, eye, real,
                          [int(s) for s in cfg.sizes.split(",")])  # fmt: skip
    train, val = (data.Latents(cfg.data, split, vae.fingerprint()) for split in ("train", "val"))
    if train.size != cfg.image_size:
        raise ValueError(f"{cfg.data} holds latents of {train.size} px, --image_size is {cfg.image_size}")
    if cfg.task == "class" and not train.classes:
        raise ValueError(f"{cfg.data} has no classes; prepare labelled pictures, or use --task text")
    if sum(val.sizes) < ddp.world_size():
        raise ValueError(f"{cfg.data}: the split val has {sum(val.sizes)} pictures, fewer than processes")
    rows = [(s, r) for s, n in enumerate(val.sizes) for r in range(n)][: cfg.samples]
    if cfg.task == "class":
        asked = list(range(len(train.classes)))
    else:  # the first caption of each picture that has one
        asked = [c[0] for c in (val.read(*row).get("captions") for row in rows) if c]
        if not asked:
            raise ValueError(f"{cfg.data} has no captions; use --task class")
    asked = (asked * -(-cfg.samples // len(asked)))[: cfg.samples]
    eye, real = metrics.inception_features(cfg.inception).to(device) if cfg.inception else None, None
    if eye:
        mine = rows[ddp.rank() : len(rows) // ddp.world_size() * ddp.world_size() : ddp.world_size()]
        images = decode(vae, vae.to_latent(torch.stack([val.read(*row)["mean"] for row in mine])), device)
        real = ddp.gather_rows(features(eye, images, device))
    sides = sorted(int(min(val.read(*row)["controls"][5:])) for row in rows)  # a size that never occurs means nothing
    sizes = sorted({sides[round(share * (len(sides) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)})
    return vae, World(train, val, *semantics(cfg, len(train.classes), device), asked, eye, real, sizes)


def semantics(cfg, classes, device):
    """-> (number of classes, None) or (frozen text encoder, its tokenizer)."""
    if cfg.task == "class":
        return classes, None
    if not cfg.text_encoder:
        return zoo.load_reader().to(device), zoo.load_tokenizer()
    encoder = load_clip(cfg.text_encoder).text.to(device).eval().requires_grad_(False)
    return encoder, Tokenizer.from_clip(cfg.text_encoder)


# 5. EVALUATE ------------------------------------------------------------------------------------------------------------
def draw_noise(seed, step, count, shape, device):  # twin: draw_noise
    """Everything random of a step for the GLOBAL batch: any number of processes sees the same numbers.
    -> uniform (count, 3), posterior noise and diffusion noise (count, *shape)."""
    g = torch.Generator(device).manual_seed((seed * 1_000_003 + step) * 2 + 1)
    return (torch.rand(count, 3, generator=g, device=device), torch.randn(count, *shape, generator=g, device=device),
            torch.randn(count, *shape, generator=g, device=device))  # fmt: skip


@torch.no_grad()
def pictures(model, vae, items: Items, cfg: Config, device, asked, size=0, seed=1, rows=slice(None)):
    """Draws what is asked for at the full frame of `size` pixels (0: the model's own), of it `rows`, from noise that does not
    depend on rows -> latents, on the CPU."""
    side, zs, part = cfg.image_size // vae.factor, [], max(1, 2**18 // cfg.image_size**2)
    noise = torch.randn(len(asked), vae.z, side, side, generator=torch.Generator().manual_seed(seed))[rows]
    asked = asked[rows]
    for i in range(0, len(asked), part):
        semantic = to_device(items.semantic([items.name(a) for a in asked[i : i + part]]), device)
        z = noise[i : i + part].to(device)
        z = sample(model, z, semantic, full_frame(len(z), size or cfg.image_size, device), cfg.objective, cfg.sample_steps,
                   cfg.guidance, cfg.control_guidance, noise_scale(cfg))  # fmt: skip
        zs.append(z.cpu())
    return torch.cat(zs)


@torch.no_grad()
def decode(vae, z, device):
    """Latents -> images in [-1, 1], on the CPU, in parts."""
    part = max(1, 2**18 // (z.shape[-1] * vae.factor) ** 2)
    return torch.cat([vae.decode(x.to(device)).cpu() for x in z.split(part)])


def noise_scale(cfg):
    """k = s' / s."""
    return cfg.image_size / (cfg.base_size or cfg.image_size)


EVALUATION = 1_000_003  # the seed of its noise, far from training's


@torch.no_grad()
def evaluate(model, vae, world, items, cfg, env) -> dict[str, float]:
    """Validation loss, and how far the picture moves when only the requested size changes. A model that ignores sizes does not
    move at all, so `heeds` says by how many percent the loss at low noise rises when it is told the next of the sizes. Also the
    Frechet distance to real pictures; for scenes, is the right thing drawn? The work is divided over the processes."""
    out, device, total = {}, env.device, torch.zeros(4)
    sizes = torch.tensor(world.sizes, dtype=torch.float32, device=device)
    used = min(sum(world.val.sizes), cfg.samples) // env.world * env.world
    part = slice(env.rank, used, env.world)
    rows = data.in_order(world.val, lambda s: items(s, np.random.default_rng(0)), items.collate, 256, part)
    shape = world.val.read(0, 0)["mean"].shape
    noise = zip(*(x[part].split(256) for x in draw_noise(EVALUATION, 0, used, shape, device)))
    for (mean, logvar, controls, semantic), numbers in zip(rows, noise):
        u, n1, n2 = (x[: len(mean)] for x in numbers)  # without damaged rows
        z0 = vae.to_latent(mean.to(device), logvar.to(device), n1)
        no = torch.zeros(len(z0), dtype=torch.bool, device=device)
        semantic, controls, losses = to_device(semantic, device), controls.to(device), []
        wrong = controls.clone()
        wrong[:, 5:] = sizes[((controls[:, 5:, None] - sizes).abs().argmin(2) + 1) % len(sizes)]
        for c, t in ((controls, u[:, 0]), (controls, 0.2 * u[:, 0]), (wrong, 0.2 * u[:, 0])):
            losses.append(diffusion_loss(model, z0, time_of(cfg.objective, t), n2, cfg.objective, noise_scale(cfg), controls=c,
                                         drop_s=no, drop_c=no, **semantic))  # fmt: skip
        total += len(z0) * torch.tensor([1.0, *losses])
    total = ddp.all_sum(total.to(device))
    out["val_loss"] = (total[1] / total[0]).item()
    mine = slice(env.rank, None, env.world)
    if len(sizes) > 1:  # of one size alone, nothing can be learned about sizes
        out["heeds"] = 100 * (total[3] / total[2] - 1).item()
        # The control-swap distance: same noise, same semantics, only the requested size differs
        few = world.asked[: max(1, min(64, len(world.asked)) // env.world) * env.world]
        zs = torch.stack([pictures(model, vae, items, cfg, device, few, s, 7, mine) for s in sizes.tolist()])
        out.update(ddp.mean({"swap": spread(zs), "swap_hr": spread(zs[-3:])}))  # all sizes, and the three largest
    if not world.eye:
        return out
    asked = world.asked[: len(world.asked) // env.world * env.world]
    images = decode(vae, pictures(model, vae, items, cfg, device, asked, rows=mine), device)
    fake = ddp.gather_rows(features(world.eye, images, device, cfg.grid))
    out["fd"] = metrics.frechet_distance(fake, world.real)
    if cfg.data:
        return out
    told = asked[mine] if cfg.task == "text" else [replace(s, things=s.things[:1]) for s in asked[mine]]  # a class: one thing
    seen = ddp.gather_lists([zoo.verify(world.eye, images.to(device), told)])  # one dict of every process
    right = {k: [x for part in seen for x in part.get(k, [])] for k in seen[0]}
    if cfg.task == "class":  # its colour and shape, nothing else
        right = {k: right[k] for k in ("shape", "colour")} | {"all": [a and b for a, b in zip(right["shape"], right["colour"])]}
    out.update({"right" if k == "all" else k: 100 * float(np.mean(v)) for k, v in right.items()})
    return out


def spread(zs):
    """Mean over pairs of sizes of the root mean square difference: zs (sizes, B, ...) -> float."""
    pairs = [(zs[i] - zs[j]).square().flatten(1).mean(1).sqrt().mean() for i in range(len(zs)) for j in range(i)]
    return torch.stack(pairs).mean().item()


# 6. TRAIN --------------------------------------------------------------------------------------------------------------
def build(cfg: Config, vae, world: World, device) -> Model:
    """The model of one arm, with weights of --init if there is one."""
    side = cfg.image_size // vae.factor
    model = Model(cfg, vae.z, side, world.kinds).to(device)
    model.extent = model.dit.grid  # of the position table's coordinates
    if not cfg.init:
        return model
    state, meta = read_tensors(cfg.init)
    old = meta.get("config", {})
    if "vae" not in meta or not {"extent", "task"} <= old.keys():
        raise ValueError(f"--init {cfg.init} is no model that this script has exported")
    for field in ("conditioning", "objective", "control_power", "base_size"):
        if old.get(field) != getattr(cfg, field):
            raise ValueError(f"--init {cfg.init} has {field} {old.get(field)}, this arm {getattr(cfg, field)}")
    if meta["vae"] != vae.fingerprint():
        raise ValueError(f"--init {cfg.init} was trained on latents of another autoencoder; pass its --vae")
    mine, grid, base = model.state_dict(), model.dit.grid, math.isqrt(state["dit.pos_embed"].shape[1])
    if grid != base:
        if cfg.positions == "resample":
            state["dit.pos_embed"] = resample_pos_embed(cfg.dim, grid, old["extent"])
        elif cfg.positions == "interpolate":
            square = state["dit.pos_embed"].view(1, base, base, -1).permute(0, 3, 1, 2)
            wide = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
            state["dit.pos_embed"] = wide.permute(0, 2, 3, 1).flatten(1, 2)
        else:  # extrapolate: the plain table of the larger grid
            state["dit.pos_embed"] = mine["dit.pos_embed"]
    model.extent = grid if grid != base and cfg.positions == "extrapolate" else old["extent"]
    if old["task"] != cfg.task:  # another semantic interface: keep all image-side weights
        state = {k: v for k, v in state.items() if not k.startswith("semantic.")}
        state.update({k: v for k, v in mine.items() if k.startswith("semantic.")})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"--init {cfg.init} does not fit this model: {str(error).splitlines()[-1].strip()}") from error
    return model


def train(cfg: Config) -> dict:
    """Trains one arm in cfg.out_dir and returns its metrics."""
    env, out = ddp.start(cfg.seed), Path(cfg.out_dir)
    vae, world = open_world(replace(cfg, out_dir="", conditioning="", init=""), env.device)
    items = Items(cfg, world.tok, getattr(world.kinds, "context", 0))
    ddp.reseed(cfg.seed, 0, 0)  # the same initial weights on every process
    model = build(cfg, vae, world, env.device)
    wrapped = ddp.wrap(torch.compile(model) if cfg.compile else model, env)
    ema, shown = optim.Ema(model, cfg.ema_decay), copy.deepcopy(model).eval()
    opt = torch.optim.AdamW(optim.decay_groups(model, cfg.wd), cfg.lr, (0.9, 0.95), 1e-8, fused=True)
    state = {"model": model, "ema": ema, "opt": opt}
    start, _ = ckpt.resume(out / "last.pt", cfg, **state)
    share = env.share(cfg.batch_size, accum=cfg.accum)
    batches = data.Batches(world.train, items, items.collate, cfg.batch_size // cfg.accum, env, cfg.seed, start * cfg.accum,
                           cfg.workers, cfg.max_bad)  # fmt: skip
    amp = torch.autocast(env.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")

    def report(step):
        shown.load_state_dict({**model.state_dict(), **ema.shadow})
        result = evaluate(shown, vae, world, items, cfg, env)
        log.write(step, **result)
        return result

    log = RunLog(cfg, env, out.name, start)
    for step in range(start, cfg.steps):
        rate = min(1.0, (step + 1) / max(1, cfg.warmup), (cfg.steps - step) / max(1.0, cfg.decay * cfg.steps))
        optim.set_lr(opt, cfg.lr * rate)
        mean_loss = 0.0
        for micro in range(cfg.accum):
            mean, logvar, controls, semantic = (to_device(x, env.device) for x in next(batches))
            noise = draw_noise(cfg.seed, step * cfg.accum + micro, share * env.world, mean.shape[1:], env.device)
            u, n1, n2 = (x[env.rank * share : (env.rank + 1) * share] for x in noise)
            z0 = vae.to_latent(mean, logvar, n1)
            if cfg.task == "text":  # of the padding, for the global batch, too
                g = torch.Generator(env.device).manual_seed((cfg.seed * 1_000_003 + step * cfg.accum + micro) * 2)
                extra = torch.randn(share * env.world, cfg.slots, cfg.dim, generator=g, device=env.device)
                semantic["noise"] = extra[env.rank * share : (env.rank + 1) * share]
            conditions = dict(
                controls=controls, drop_s=u[:, 1] < cfg.drop_semantic, drop_c=u[:, 2] < cfg.drop_control, **semantic
            )
            with amp:
                loss = diffusion_loss(
                    wrapped, z0, time_of(cfg.objective, u[:, 0]), n2, cfg.objective, noise_scale(cfg), **conditions
                )
            (loss / cfg.accum).backward()
            mean_loss += loss.detach() / cfg.accum
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        opt.step()
        opt.zero_grad(set_to_none=True)
        ema.update(model)
        done, last = step + 1, step + 1 == cfg.steps
        due = done % cfg.log_every == 0 or last
        leave = ddp.interrupted(due)
        if due or leave or done % cfg.save_every == 0:
            ddp.check_finite({"loss": mean_loss.item(), "grad_norm": norm.item()}, step)
        if due:
            log.write(step, **ddp.mean({"loss": mean_loss, "grad_norm": norm}), lr=opt.param_groups[0]["lr"], bad=batches.bad)
        if cfg.eval_every and done % cfg.eval_every == 0 and not last:
            report(step)
        log.tick(step)
        if env.is_main and (done % cfg.save_every == 0 or last or leave):
            ckpt.save(out / "last.pt", done, cfg, **state)
        if leave:
            log.close()
            raise KeyboardInterrupt
    result = report(cfg.steps - 1)
    if env.is_main:
        kept = {k: getattr(cfg, k) for k in ("conditioning", "task", "objective", "control_power", "slots", "beta_txt")}
        kept |= {"base_size": cfg.base_size or cfg.image_size, "extent": model.extent}
        ckpt.export(out / "model.safetensors", shown.state_dict(), dit=model.dit.config, vae=vae.fingerprint(), config=kept)
        plot.save(plot.lines(history(log.dir, "loss", "val_loss"), out.name, y="loss"), out / "curves.png")
        draw(shown, vae, world, items, cfg, env.device, out / "samples")
    log.finish(result)
    return result


def to_device(x, device):
    return {k: v.to(device) for k, v in x.items()} if isinstance(x, dict) else x.to(device)


def to_uint8(x):  # twin: to_uint8
    """(B, 3, H, W) in [-1, 1] -> list of (H, W, 3) uint8."""
    return list(((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def draw(model, vae, world, items, cfg, device, folder):
    """A sheet of samples, and one that changes only the requested size."""
    asked = world.asked[:16]
    images = decode(vae, pictures(model, vae, items, cfg, device, asked), device)

    def name(a):
        if cfg.task == "text":
            return items.name(a)
        return world.train.classes[a] if cfg.data else f"{a.things[0].colour} {a.things[0].shape}"

    title, lines = f"{cfg.conditioning}, guidance {cfg.guidance:g}", 4 if cfg.task == "text" else 1
    sheet = plot.grid(to_uint8(images), 8, [name(a) for a in asked], title=title, cell=110, rows_of_text=lines)
    plot.save(sheet, folder / "samples.png")
    sizes = world.sizes
    if len(sizes) == 1:
        return
    drawn = [to_uint8(decode(vae, pictures(model, vae, items, cfg, device, asked[:5], s, 7), device)) for s in sizes]
    moved = [(8 * np.abs(b.astype(int) - a)).clip(0, 255).astype(np.uint8) for a, b in zip(drawn[0], drawn[-1])]
    cells = [one[i] for i in range(5) for one in (*drawn, moved)]
    labels = [*(f"size {s}" for s in sizes), "|last - first| x 8"] * 5
    title = f"{cfg.conditioning}: same noise, same semantics, another size"
    sheet = plot.grid(cells, len(sizes) + 1, labels, title=title, cell=110, rows_of_text=1)
    plot.save(sheet, folder / "size_swap.png")


def check(cfg: Config) -> None:
    """One sentence for what a user can get wrong."""
    cli.choose(cfg, "conditioning", task=("class", "text"), objective=("flow", "eps", "v"), control_init=("zero", "normal"),
               padding=("zero", "replicate", "noisy"), positions=("resample", "extrapolate", "interpolate"),
               crop=("resize", "direct"), dtype=("float32", "bfloat16"),
               conditioning=("adaln-sum", "attn", "attn+schedule"))  # fmt: skip
    cli.within(cfg, "steps sample_steps class_tokens slots images views samples dim depth heads patch image_size", 1)
    cli.within(cfg, "guidance control_guidance beta_txt control_power base_size", 0)
    cli.within(cfg, "drop_semantic drop_control flip decay", 0, 1)
    if cfg.guidance != 1 and not (cfg.drop_semantic and cfg.drop_control):
        raise ValueError("--drop_semantic 0 or --drop_control 0 never train the null branch of guidance; add --guidance 1")
    if cfg.control_guidance != 1 and not cfg.drop_control:
        raise ValueError("--drop_control 0 never trains the branch without controls; add --control_guidance 1")
    if not cfg.data and cfg.objects > cfg.grid**2:
        raise ValueError(f"--objects {cfg.objects} do not fit into {cfg.grid**2} cells; raise --grid")
    if not (1 <= cfg.grid <= 3 and 1 <= cfg.objects <= 3 and 0 < cfg.min_crop <= 1 and cfg.samples >= 16):
        raise ValueError("--grid and --objects must be 1 to 3, --min_crop in (0, 1], --samples at least 16")
    if cfg.inception and not cfg.data:
        raise ValueError("--inception is for --data: generated scenes have a judge of their own")
    if cfg.data and cfg.crop == "direct":
        raise ValueError("--crop direct acts on generated scenes; data_prep/cache_latents.py makes those of real ones")
    sizes = [int(s) if s.isdigit() else 0 for s in cfg.sizes.split(",")]
    if sizes != sorted(set(sizes)) or not all(4 <= s <= 1024 for s in sizes):
        raise ValueError(f"--sizes {cfg.sizes} must be a rising comma list of pixels between 4 and 1024")
    if not cfg.data and cfg.image_size > sizes[-1]:
        raise ValueError(f"--image_size {cfg.image_size} is above all --sizes {cfg.sizes}: nothing was recorded so large")


def run(cfg: Config) -> dict:
    """All arms side by side, each in its own folder; finished arms are kept. Prints the claim."""
    check(cfg)
    env = ddp.start(cfg.seed)
    out, scores = Path(cfg.out_dir), {}
    if not cfg.base_size:  # both arms of a transfer have the noise of the first
        first = read_tensors(cfg.init)[1].get("config", {}).get("base_size") if cfg.init else None
        cfg = replace(cfg, base_size=first or cfg.image_size)
    if cfg.init:  # before the first arm has trained for nothing
        vae, world = open_world(replace(cfg, out_dir="", conditioning="", init=""), env.device)
        for how in cfg.conditioning.split(","):
            build(replace(cfg, conditioning=how), vae, world, env.device)
    for how in cfg.conditioning.split(","):
        for init in ["", cfg.init] if cfg.init else [""]:
            name = how + (" transferred" if init else " from scratch" if cfg.init else "")
            arm = replace(cfg, conditioning=how, init=init, out_dir=str(out / name.replace(" ", "_")))
            scores[name] = ckpt.once(train, arm)
    result = {f"{name}_{k}".replace(" ", "_"): v for name, s in scores.items() for k, v in s.items()}
    if ddp.rank() == 0:
        show(cfg, scores)
        write_json(out / "metrics.json", result)
    return result


def show(cfg, scores):
    """One table on the terminal: every arm, the last against the first, the paper's words beside it."""
    names = {"val_loss": "validation loss",
             "fd": f"Frechet distance to {'reconstructions (Inception)' if cfg.data else 'full frames (judge)'}",
             "right": "drawn as named, %", "swap": "control-swap distance x 100", "swap_hr": "... the three largest sizes",
             "heeds": "loss with another size, low noise, + %"}  # fmt: skip
    paper = (
        {"fd": "converges faster"} if cfg.init else {"fd": "7 to 23 % better (FID)", "swap": "content stays (Fig. 2: schedule)"}
    )
    rows, arms = [], list(scores.values())
    for key, text in names.items():
        values = [arm[key] * (100 if key.startswith("swap") else 1) for arm in arms if key in arm]
        if values:
            comparable = len(values) > 1 and (not cfg.init or len(values) == 2)  # several arms, each twice: no
            change = f"{values[-1] - values[0]:+.1f}" if comparable and key == "right" else ""
            if comparable and key != "right" and values[0] >= 0.001:  # a share of next to nothing says nothing
                change = f"{100 * (values[-1] / values[0] - 1):+.1f} %"
            rows.append([text, *[f"{v:.3f}" for v in values], change, paper.get(key, "") if change else ""])
    head = f"{cfg.objective}, equal updates" + (f" at {cfg.image_size} px, pre-training not counted" if cfg.init else "")
    print("\n" + table(rows, [head, *scores, "difference", "paper"]))
    if cfg.eval_every and "fd" in arms[0]:
        curves = {name: history(Path(cfg.out_dir, name.replace(" ", "_")), "fd")["fd"] for name in scores}
        plot.save(plot.lines(curves, "Frechet distance by updates"), Path(cfg.out_dir, "fd.png"))
    print(f"\npictures, curves and weights: {cfg.out_dir}")


# 7. MAIN ---------------------------------------------------------------------------------------------------------------
PRESETS = {
    "smoke": dict(steps=6, batch_size=8, warmup=2, images=24, views=1, samples=16, sample_steps=3, dim=32, depth=2, heads=2,
                  log_every=2, save_every=3, out_dir="runs/ldm_conditioning_smoke"),
    "laptop": {},
    "transfer": dict(image_size=64, steps=150, eval_every=50, batch_size=32, conditioning="attn+schedule", samples=256,
                     init="runs/ldm_conditioning/attn+schedule/model.safetensors", out_dir="runs/ldm_conditioning_transfer"),
    # the stand-in text-to-image model of common/weights
    "standin": dict(task="text", conditioning="attn", steps=4_500, batch_size=128, lr=4e-3, warmup=300, decay=0.3,
                    images=40_000, views=1, grid=2, objects=3, min_crop=1.0, flip=0.0, sizes="32", guidance=3.0,
                    ema_decay=0.998, slots=4, samples=512, drop_control=1.0, out_dir="runs/standin_t2i"),
    "gpu": dict(steps=20_000, decay=0.0, batch_size=512, images=40_000, image_size=64, dim=384, depth=12, heads=6,
                lr=3e-4, ema_decay=0.999, dtype="bfloat16", samples=5_000, sample_steps=50, workers=14, save_every=1_000,
                out_dir="runs/ldm_conditioning_gpu"),
    # ImageNet 256, DiT-XL/2; of the optimiser only the betas are the paper's; batch, EMA and length are usual values
    # (objective, drop rates, class tokens, warm-up and guidance are not known)
    "paper": dict(data="data/imagenet_latents", steps=600_000, batch_size=256, lr=1e-4, warmup=0, decay=0.0, grad_clip=0.0,
                  ema_decay=0.9999, dtype="bfloat16", workers=12, objective="eps", image_size=256, dim=1152, depth=28,
                  heads=16, sample_steps=250, samples=10_000, inception="data/pt_inception-2015-12-05-6726825d.pth",
                  log_every=100, save_every=5_000, out_dir="runs/ldm_conditioning_in1k"),
}  # fmt: skip

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
