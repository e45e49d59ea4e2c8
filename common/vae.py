"""The Stable Diffusion autoencoder from scratch, any size, and the loader for its published files.

    mean, logvar = vae.encode(x)              x (B, 3, H, W) in [-1, 1] -> two (B, z, H/f, W/f), f = 2 ** (levels - 1)
    z = vae.to_latent(mean, logvar, noise)    what diffusion models are trained on: (sample - shift) * scale
    img = vae.decode(z)                       un-scales first; `tile` decodes large images in blended pieces
    maps = vae.features(z)                    mid block and every up block of the decoder; the last one, through norm, SiLU
                                              and the last convolution, is decode(z)

One convention for scaling: everything outside holds *scaled* latents, and decode and features un-scale. Parameter names
are those of current diffusers files; `to_layout` and `load_vae` rename to and from the two other published layouts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint as remember_less


class ResBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1 x 1 shortcut where the width changes."""

    def __init__(self, a: int, b: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, a, eps=1e-6), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, b, eps=1e-6), nn.Conv2d(b, b, 3, padding=1)
        if a != b:
            self.conv_shortcut = nn.Conv2d(a, b, 1)

    def forward(self, x):  # in place where nothing else needs the tensor: large maps cost more to allocate than to change
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class AttnBlock(nn.Module):
    """One head over all positions."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = (f(h).unsqueeze(1) for f in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.to_out[0](h).transpose(1, 2).reshape(B, C, H, W)


class MidBlock(nn.Module):
    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(dim, dim, groups), ResBlock(dim, dim, groups)])
        self.attentions = nn.ModuleList([AttnBlock(dim, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Down(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x):  # zeros on the right and at the bottom only: padding=1 loads as well and shifts every latent
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Nearest-neighbour doubling, then a 3 x 3 convolution, without the doubled map: each of the four output phases sees only
    2 x 2 different pixels, so it is a 2 x 2 convolution with summed weights. Same result, 4 / 9 of the work."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        H, W = x.shape[-2:]
        x, phases, rows = F.pad(x, (1, 1, 1, 1)), [], self.conv.weight.unbind(2)
        for a, pair in enumerate(((rows[0], rows[1] + rows[2]), (rows[0] + rows[1], rows[2]))):  # even and odd output rows
            c = torch.stack(pair, 2).unbind(3)
            for b, pair in enumerate(((c[0], c[1] + c[2]), (c[0] + c[1], c[2]))):  # even and odd columns
                phases.append(F.conv2d(x[..., a : a + H + 1, b : b + W + 1], torch.stack(pair, 3), self.conv.bias))
        return F.pixel_shuffle(torch.stack(phases, 2).flatten(1, 2), 2)


class Level(nn.Module):
    """Residual blocks of one resolution, then a change of resolution if `sampler` is given."""

    def __init__(self, a: int, b: int, blocks: int, groups: int, sampler: str = ""):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(a if i == 0 else b, b, groups) for i in range(blocks)])
        if sampler:
            setattr(self, sampler, nn.ModuleList([Down(b) if sampler == "downsamplers" else Up(b)]))
        self.sampler = sampler

    def forward(self, x):
        for block in self.resnets:
            x = block(x)
        return getattr(self, self.sampler)[0](x) if self.sampler else x


class Encoder(nn.Module):
    def __init__(self, ch: int, mult: tuple, blocks: int, z: int, groups: int):
        super().__init__()
        dims = [ch, *(ch * m for m in mult)]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        last = len(mult) - 1
        self.down_blocks = nn.ModuleList([
            Level(dims[i], dims[i + 1], blocks, groups, "downsamplers" if i < last else "") for i in range(len(mult))
        ])  # fmt: skip
        self.mid_block = MidBlock(dims[-1], groups)
        self.conv_norm_out, self.conv_out = nn.GroupNorm(groups, dims[-1], eps=1e-6), nn.Conv2d(dims[-1], 2 * z, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, ch: int, mult: tuple, blocks: int, z: int, groups: int):
        super().__init__()
        dims = [ch * m for m in reversed((*mult, mult[-1]))]  # from the lowest resolution up
        self.conv_in = nn.Conv2d(z, dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0], groups)
        last = len(mult) - 1
        self.up_blocks = nn.ModuleList([
            Level(dims[i], dims[i + 1], blocks + 1, groups, "upsamplers" if i < last else "") for i in range(len(mult))
        ])  # fmt: skip
        self.conv_norm_out, self.conv_out = nn.GroupNorm(groups, dims[-1], eps=1e-6), nn.Conv2d(dims[-1], 3, 3, padding=1)

    def image(self, last_map):
        return self.conv_out(F.silu(self.conv_norm_out(last_map)))


class VAE(nn.Module):
    """ch: width of the first level; mult: width of each level in units of ch; blocks: residual blocks of an encoder level
    (a decoder level has one more); z: latent channels; quant: the 1 x 1 convolutions round the latent (SD3 and Flux have
    none); scale, shift: of diffusion latents. The defaults are Stable Diffusion's 83,653,863 parameters."""

    def __init__(self, ch=128, mult=(1, 2, 4, 4), blocks=2, z=4, groups=32, quant=True, scale=0.18215, shift=0.0):
        super().__init__()
        self.config = dict(ch=ch, mult=list(mult), blocks=blocks, z=z, groups=groups, quant=quant, scale=scale, shift=shift)
        self.encoder, self.decoder = (part(ch, tuple(mult), blocks, z, groups) for part in (Encoder, Decoder))
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if quant else None
        self.post_quant_conv = nn.Conv2d(z, z, 1) if quant else None
        self.scale, self.shift, self.factor, self.z = scale, shift, 2 ** (len(mult) - 1), z

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> posterior mean and log-variance (B, z, H/f, W/f), unscaled."""
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f"image sides {x.shape[-2]} x {x.shape[-1]} are not divisible by the autoencoder's {self.factor}")
        h = self.encoder(x)
        mean, logvar = (self.quant_conv(h) if self.quant_conv else h).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def to_latent(self, mean, logvar=None, noise=None) -> torch.Tensor:
        """Scaled diffusion latent: a posterior sample with standard normal `noise`, the mode without."""
        z = mean if noise is None else mean + (logvar / 2).exp() * noise
        return (z - self.shift) * self.scale

    def _enter(self, z):
        z = z / self.scale + self.shift  # the classic silent bug is to forget this
        return self.decoder.conv_in(self.post_quant_conv(z) if self.post_quant_conv else z)

    def features(self, z: torch.Tensor, checkpoint: bool = False) -> list[torch.Tensor]:
        """Scaled latent (B, z, h, w) -> the decoder's maps: mid block (h), then each up block (2h, 4h, .., fh, fh).

        checkpoint: keep only the block borders for backward and compute each block twice."""
        x, maps = self._enter(z), []
        for block in (self.decoder.mid_block, *self.decoder.up_blocks):
            x = remember_less(block, x, use_reentrant=False) if checkpoint else block(x)
            maps.append(x)
        return maps

    def decode(self, z: torch.Tensor, tile: int = 0) -> torch.Tensor:
        """Scaled latent (B, z, h, w) -> image (B, 3, f h, f w), about [-1, 1].

        tile: side of latent tiles, decoded one by one and blended over a quarter of their side, so that memory does not grow
        with the image. Norms then see a tile at a time: the result is close to the whole decode, not equal."""
        if tile <= 0 or max(z.shape[-2:]) <= tile:
            x = self._enter(z)
            for block in (self.decoder.mid_block, *self.decoder.up_blocks):
                x = block(x)
            return self.decoder.image(x)
        B, _, h, w = z.shape
        f, step = self.factor, tile - tile // 4
        out = torch.zeros(B, 3, f * h, f * w, device=z.device)  # float32 whatever z is
        total = torch.zeros(1, 1, f * h, f * w, device=z.device)

        def starts(n):
            return [*range(0, max(n - tile, 0), step), max(n - tile, 0)]

        for y in starts(h):
            for x in starts(w):
                img = self.decode(z[..., y : y + tile, x : x + tile])
                ramp = [torch.arange(1.0, n + 1, device=z.device) for n in img.shape[-2:]]
                ramp = [torch.minimum(r, r.flip(0)).clamp(max=f * (tile // 4) + 1) for r in ramp]
                weight = ramp[0][:, None] * ramp[1][None]
                spot = (..., slice(f * y, f * y + img.shape[-2]), slice(f * x, f * x + img.shape[-1]))
                out[spot] += img * weight
                total[spot] += weight
        return (out / total).to(z.dtype)

    def fingerprint(self) -> str:
        """Short hash of the encoder's weights and the scaling: latents belong to the autoencoder that made them."""
        digest = hashlib.sha256(json.dumps([self.scale, self.shift]).encode())
        parts = [*sorted(self.encoder.state_dict().items()), *(self.quant_conv.state_dict().items() if self.quant_conv else ())]
        for _, p in parts:
            digest.update(p.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


# Published files ----------------------------------------------------------------------------------------------------


def read_tensors(path) -> tuple[dict[str, torch.Tensor], dict]:  # twin: read_tensors
    """A weight file -> (tensors by name, settings that our own export stored in it). Never runs code from the file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weight file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                meta = json.loads((f.metadata() or {}).get("meta", "{}"))
                state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # DiT's checkpoints hold their arguments
                state, meta = torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # a dozen types, from both readers
        text = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"{path} is not a weight file that can be read safely ({type(error).__name__}: {text})") from error
    for key in ("state_dict", "ema", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    named = [(k, v) for k, v in state.items() if isinstance(k, str)] if isinstance(state, dict) else ()
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in named if isinstance(v, torch.Tensor)}
    if not tensors or not isinstance(meta, dict):
        raise ValueError(f"{path} holds no tensors by name")
    return tensors, meta


_ATTENTION = r"((?:en|de)coder)\.mid_block\.attentions\.0\."
_OLD = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]
_COMPVIS = [("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"), ("group_norm", "norm")]


def to_layout(state: dict[str, torch.Tensor], layout: str, levels: int) -> dict[str, torch.Tensor]:
    """Our names -> those of a published layout: "diffusers" (ours), "diffusers-old" or "compvis". levels: resolutions."""
    if layout == "diffusers":
        return dict(state)
    if layout not in ("diffusers-old", "compvis"):
        raise ValueError(f"layout {layout!r} is unknown; choose from diffusers, diffusers-old, compvis")
    out = {}
    for key, v in state.items():
        for new, old in _OLD if layout == "diffusers-old" else _COMPVIS:
            mine = rf"^{_ATTENTION}{re.escape(new)}\."
            if re.match(mine, key):  # surgery on the mid attention only: "k." is also the end of "block."
                attention = "mid_block.attentions.0" if layout == "diffusers-old" else "mid.attn_1"
                v = v[:, :, None, None] if layout == "compvis" and v.ndim == 2 else v
                key = re.sub(mine, rf"\1.{attention}.{old}.", key)
                break
        if layout == "compvis":
            key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
            key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
            key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
            key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)  # reversed there
            key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
            key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        out[key] = v
    return out


def from_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Any published layout, also inside a whole Stable Diffusion checkpoint -> our names."""
    for prefix in ("first_stage_model.", "vae."):
        if any(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            break
    state = {k: v for k, v in state.items() if not k.startswith(("loss.", "model_ema."))}
    compvis = any(k.startswith("decoder.up.") for k in state)
    levels = len({k.split(".")[2] for k in state if k.startswith(("decoder.up.", "decoder.up_blocks."))})
    out = {}
    for key, v in state.items():
        key = key.replace("mid.attn_1.", "mid_block.attentions.0.") if compvis else key
        for new, old in _COMPVIS if compvis else _OLD:
            theirs = rf"^{_ATTENTION}{re.escape(old)}\."
            if re.match(theirs, key):
                v = v[:, :, 0, 0] if v.ndim == 4 and v.shape[2:] == (1, 1) else v
                key = re.sub(theirs, rf"\1.mid_block.attentions.0.{new}.", key)
                break
        if compvis:
            key = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", key)
            key = re.sub(r"\.down\.(\d+)\.block", r".down_blocks.\1.resnets", key)
            key = re.sub(r"\.down\.(\d+)\.downsample", r".down_blocks.\1.downsamplers.0", key)
            key = re.sub(r"\.up\.(\d+)\.block", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.resnets", key)
            key = re.sub(r"\.up\.(\d+)\.upsample", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.upsamplers.0", key)
            key = key.replace("nin_shortcut", "conv_shortcut").replace(".norm_out", ".conv_norm_out")
        out[key] = v
    return out


def load_vae(path, scale: float = 0.0, shift: float | None = None) -> VAE:
    """A VAE from a file of diffusers (current or old), CompVis, a whole Stable Diffusion checkpoint, or our own export; in
    fp32, evaluation mode. Its size is read off the tensors. A folder holding diffusion_pytorch_model.safetensors will do.

    scale, shift: of diffusion latents. 0 and None: from our export or the config.json beside the file, else 0.18215 and 0,
    which are right for the autoencoders of Stable Diffusion 1 and 2; files that are not theirs (SD3, Flux, checkpoints of
    Stable Diffusion XL) are refused without a scale."""
    path = Path(path)
    if path.is_dir():
        path = path / "diffusion_pytorch_model.safetensors"
    state, meta = read_tensors(path)
    xl = any(k.startswith("conditioner.") for k in state)
    state = {k: v.float() for k, v in from_layout(state).items()}
    config = meta.get("vae", {})
    if not config and (path.parent / "config.json").exists():
        try:
            beside = json.loads((path.parent / "config.json").read_text("utf-8"))
            names = (("scale", "scaling_factor", float), ("shift", "shift_factor", float), ("groups", "norm_num_groups", int))
            config = {ours: kind(beside[theirs]) for ours, theirs, kind in names if beside.get(theirs) is not None}
            if beside.get("latents_mean") or beside.get("latents_std"):
                raise ValueError("its latents have a mean and a deviation for each channel, which are not supported here")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.parent / 'config.json'} is not the settings of an autoencoder ({error})") from error
    try:
        ch, _, _, _ = state["encoder.conv_in.weight"].shape
        levels = len({k.split(".")[2] for k in state if k.startswith("encoder.down_blocks.")})
        widths = [state[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)]
        blocks = len({k.split(".")[4] for k in state if k.startswith("encoder.down_blocks.0.resnets.")})
        found = dict(ch=ch, mult=[w // ch for w in widths], blocks=blocks, z=state["decoder.conv_in.weight"].shape[1],
                     quant="quant_conv.weight" in state)  # fmt: skip
        vae = VAE(**{**found, **config})
    except (KeyError, ValueError, TypeError, ZeroDivisionError, IndexError) as error:
        keys = ", ".join(list(state)[:3])
        raise ValueError(
            f"{path} is not an autoencoder of this kind ({type(error).__name__}: {error}); it has {keys}"
        ) from error
    if not scale and "scale" not in config and (xl or vae.z != 4 or not vae.quant_conv):
        raise ValueError(f"{path} is not an autoencoder of Stable Diffusion 1 or 2 and does not say how latents are scaled; "
                         "put its config.json beside it")  # fmt: skip
    want = vae.state_dict()
    missing, extra = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    wrong = [f"{k} is {tuple(state[k].shape)}, not {tuple(v.shape)}" for k, v in want.items()
             if k in state and state[k].shape != v.shape]  # fmt: skip
    if missing or extra or wrong:
        raise ValueError(f"{path} does not fit this autoencoder: missing {missing or 'none'}, unexpected {extra or 'none'}, "
                         f"wrong shapes {wrong or 'none'}")  # fmt: skip
    vae.load_state_dict(state)
    vae.scale, vae.shift = scale or vae.scale, vae.shift if shift is None else shift
    vae.config.update(scale=vae.scale, shift=vae.shift)
    vae.encoder.to(memory_format=torch.channels_last)  # a tenth faster on a CPU; the decoder gains nothing
    return vae.eval().requires_grad_(False)
