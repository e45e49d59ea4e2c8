"""DiT from scratch: a transformer on latent patches, modulated by its conditions; loaders for the published weights.

    model = DiT(input_size=32, patch=2, dim=1152, depth=28, heads=16)     DiT-XL/2: 675,129,632 parameters
    out = model(x, t, y)                                                  (B, C, H, W), (B,), (B,) -> (B, C or 2 C, H, W)
    model = load_dit("DiT-XL-2-256x256.pt", "DiT-XL/2")

Two further inputs are ordinary arguments: `add` (B, D) is added to the modulating vector beside time and class, and
`context` (B, L, D) is attended to by the blocks of a model made with cross=True. What is put into them is up to the method.
Parameter names are those of facebookresearch/DiT; SiT's weights fit as well (its times are in [0, 1]).
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

SIZES = {  # width, depth, heads
    f"DiT-{name}/{patch}": dict(dim=dim, depth=depth, heads=heads, patch=patch)
    for name, dim, depth, heads in (("XL", 1152, 28, 16), ("L", 1024, 24, 16), ("B", 768, 12, 12), ("S", 384, 12, 6))
    for patch in (2, 4, 8)
}


def sincos_2d(dim: int, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """Fixed position table (1, len(rows) * len(cols), dim), row by row. The first half of the channels encodes the COLUMN,
    the second the row, each as SIN then COS (the time embedding has them the other way round)."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def one(pos):
        angle = pos.double()[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], 1)  # (n, dim / 2)

    by_row, by_col = one(rows), one(cols)
    table = torch.cat([by_col[None].expand(len(rows), -1, -1), by_row[:, None].expand(-1, len(cols), -1)], -1)
    return table.reshape(1, -1, dim).float()


def time_features(t: torch.Tensor, dim: int = 256) -> torch.Tensor:
    """(B,) numbers -> (B, dim) cosines, then sines, of dim / 2 frequencies from 1 down to nearly 1 / 10,000; float32."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * freqs
    return torch.cat([angle.cos(), angle.sin()], 1)


def modulate(x, shift, scale):
    """x (B, N, D), shift and scale (B, D)."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


class Attention(nn.Module):
    """Self-attention, or attention to context tokens with a mask (B, L) of the valid ones."""

    def __init__(self, dim: int, heads: int, cross: bool = False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} cannot be divided by {heads} heads")
        self.heads, self.cross = heads, cross
        if cross:
            self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, context=None, mask=None):
        B, N, D = x.shape

        def heads(z, parts):  # (B, M, parts * D) -> parts x (B, h, M, D / h)
            return z.view(B, -1, parts, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)

        if self.cross:
            (q,), (k, v) = heads(self.q(x), 1), heads(self.kv(context), 2)
        else:
            q, k, v = heads(self.qkv(x), 3)
        mask = None if mask is None else mask[:, None, None]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """adaLN-Zero: six vectors from the condition shift, scale and gate attention and MLP. Between the two, with cross=True,
    plain attention to the context (as in PixArt)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, cross: bool):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.cross = Attention(dim, heads, cross=True) if cross else None
        self.norm_cross = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) if cross else None

    def forward(self, x, c, context=None):
        s1, c1, g1, s2, c2, g2 = self.adaLN_modulation(c).chunk(6, 1)  # shift, scale, gate of attention; of the MLP
        x = x + g1.unsqueeze(1) * self.attn(modulate(self.norm1(x), s1, c1))
        if self.cross is not None:
            x = x + self.cross(self.norm_cross(x), context)
        return x + g2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), s2, c2))


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, D), row by row


class TimeEmbed(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return self.mlp(time_features(t).to(self.mlp[0].weight.dtype))


class LabelEmbed(nn.Module):
    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)  # the last row is the null class

    def forward(self, y):
        return self.embedding_table(y)


class Final(nn.Module):
    def __init__(self, dim: int, out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """input_size: latent side; classes: 0 for a model without labels, else label `classes` is the null class; learn_sigma:
    twice the channels come out, noise and variance (the published weights); cross: blocks attend to `context`; extent: the
    position table's coordinates lie in [0, extent), by default one a patch (smaller where a model was taken to finer grids)."""

    def __init__(self, input_size=32, patch=2, channels=4, dim=1152, depth=28, heads=16, mlp_ratio=4.0, classes=1000,
                 learn_sigma=True, cross=False, extent=0.0):  # fmt: skip
        super().__init__()
        if input_size % patch or dim % 4:
            raise ValueError(f"latent side {input_size} must be a multiple of the patch {patch}, width {dim} one of 4")
        self.patch, self.grid, self.dim, self.classes = patch, input_size // patch, dim, classes
        extent = extent or self.grid
        self.config = dict(input_size=input_size, patch=patch, channels=channels, dim=dim, depth=depth, heads=heads,
                           mlp_ratio=mlp_ratio, classes=classes, learn_sigma=learn_sigma, cross=cross,
                           extent=extent)  # fmt: skip
        self.x_embedder, self.t_embedder = PatchEmbed(channels, dim, patch), TimeEmbed(dim)
        self.y_embedder = LabelEmbed(classes, dim) if classes else None
        places = torch.arange(self.grid, dtype=torch.float64) * (extent / self.grid)
        self.pos_embed = nn.Parameter(sincos_2d(dim, places, places), requires_grad=False)  # stored in published files
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio, cross) for _ in range(depth)])
        self.final_layer = Final(dim, patch * patch * channels * (2 if learn_sigma else 1))
        self.reset()

    def reset(self) -> None:
        """Xavier for matrices, N(0, 0.02) for labels and time; zero for every modulation, every cross-attention's output and
        the last layer, so that each block starts as the identity and the model as zero."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for w in (self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(w, std=0.02)
        if self.y_embedder:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in [b.adaLN_modulation[1] for b in self.blocks] + [self.final_layer.adaLN_modulation[1],
                      self.final_layer.linear] + [b.cross.proj for b in self.blocks if b.cross is not None]:  # fmt: skip
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, y=None, add=None, context=None):
        """x (B, C, H, W), H = W = input_size; t (B,) time steps, 0 to 999; y (B,) labels; add (B, D); context (B, L, D)."""
        B, _, H, W = x.shape
        p = self.patch
        if (H, W) != (self.grid * p, self.grid * p):
            raise ValueError(f"a latent of {H} x {W} does not fit a DiT for {self.grid * p} x {self.grid * p}")
        c = self.t_embedder(t)  # (B, D)
        c = c if y is None else c + self.y_embedder(y)
        c = c if add is None else c + add
        x = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        for block in self.blocks:
            x = block(x, c, context)
        x = self.final_layer(x, c)  # (B, N, p * p * out)
        x = x.view(B, H // p, W // p, p, p, -1).permute(0, 5, 1, 3, 2, 4)  # channels are the fastest within a token
        return x.reshape(B, -1, H, W)


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


_DIFFUSERS = [  # theirs -> ours; the first that fits is taken
    ("proj_out_1", "final_layer.adaLN_modulation.1"), ("proj_out_2", "final_layer.linear"),
    ("pos_embed.proj", "x_embedder.proj"), ("attn1.to_out.0", "attn.proj"), ("ff.net.0.proj", "mlp.fc1"),
    ("ff.net.2", "mlp.fc2"), ("norm1.linear", "adaLN_modulation.1"),
]  # fmt: skip
_EMBED = "transformer_blocks.{}.norm1.emb."  # time and label embedders are repeated in every block there


def to_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names -> those of diffusers' DiTTransformer2DModel. The position table is recomputed there, and left out."""
    out, depth = {}, len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    for key, v in state.items():
        kind = key.rpartition(".")[2]
        if key == "pos_embed":
            continue
        if m := re.match(r"t_embedder\.mlp\.([02])\.", key):
            name = f"timestep_embedder.linear_{1 + int(m[1]) // 2}.{kind}"
            out.update({_EMBED.format(i) + name: v for i in range(depth)})
        elif key.startswith("y_embedder."):
            out.update({_EMBED.format(i) + "class_embedder.embedding_table.weight": v for i in range(depth)})
        elif ".attn.qkv." in key:
            for name, part in zip("qkv", v.chunk(3)):
                block = key.split(".attn.")[0].replace("blocks.", "transformer_blocks.")
                out[f"{block}.attn1.to_{name}.{kind}"] = part
        else:
            theirs, ours = next(pair for pair in _DIFFUSERS if f".{pair[1]}." in f".{key}")
            out[re.sub(r"^blocks\.", "transformer_blocks.", key).replace(f"{ours}.", f"{theirs}.")] = v
    return out


def from_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for key, v in state.items():
        if m := re.match(r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_([12])\.(\w+)$", key):
            out[f"t_embedder.mlp.{2 * (int(m[1]) - 1)}.{m[2]}"] = v
        elif key.startswith(_EMBED.format(0)) and "class_embedder" in key:
            out["y_embedder.embedding_table.weight"] = v
        elif ".norm1.emb." in key or ".attn1.to_k." in key or ".attn1.to_v." in key:
            continue  # repetitions of block 0; k and v are joined to q below
        elif m := re.match(r"transformer_blocks\.(\d+)\.attn1\.to_q\.(\w+)$", key):
            parts = [state[key.replace("to_q", f"to_{name}")] for name in "qkv"]
            out[f"blocks.{m[1]}.attn.qkv.{m[2]}"] = torch.cat(parts)
        else:
            key = re.sub(r"^transformer_blocks\.", "blocks.", key)
            theirs, ours = next((pair for pair in _DIFFUSERS if f".{pair[0]}." in f".{key}"), ("", ""))
            out[key.replace(f"{theirs}.", f"{ours}.") if theirs else key] = v
    return out


def without_sigma(state: dict[str, torch.Tensor], channels: int) -> dict[str, torch.Tensor]:
    """Keeps the first `channels` of 2 * channels outputs: channels are the fastest within a token, so every second block."""
    out = dict(state)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        v = state[key]
        out[key] = v.view(-1, 2, channels, *v.shape[1:])[:, 0].reshape(-1, *v.shape[1:])
    return out


def load_dit(path, size: str = "", input_size: int = 0, learn_sigma: bool = True, resample: bool = False, **more) -> DiT:
    """DiT from facebookresearch's files (bare, or training checkpoints, whose EMA weights are taken), diffusers' or our own
    export; in fp32, evaluation mode. size: one of SIZES, not needed for our own export, which knows its settings.

    input_size: latent side, by default that of the file (diffusers': of config.json beside it, else 32); at another one the
    coordinates of the position table go on, or with resample=True stay in the file's range, in finer steps.
    learn_sigma=False drops the variance half of the last layer. more: heads, ... of a model that is not in SIZES."""
    state, meta = read_tensors(path)
    if any(k.startswith("transformer_blocks.") for k in state):
        state = from_diffusers(state)
    try:
        dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
        depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
        outs = state["final_layer.linear.weight"].shape[0] // patch**2
        table = state.get("pos_embed")
        beside = Path(path).parent / "config.json"
        side = patch * math.isqrt(table.shape[1]) if table is not None else (
            json.loads(beside.read_text()).get("sample_size", 32) if beside.exists() else 32)  # fmt: skip
        found = dict(patch=patch, channels=channels, dim=dim, depth=depth, learn_sigma=outs == 2 * channels, input_size=side,
                     mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / dim, cross="blocks.0.cross.q.weight" in state,
                     extent=side // patch, classes=len(state.get("y_embedder.embedding_table.weight", [0])) - 1)  # fmt: skip
        if size and size not in SIZES:
            raise ValueError(f"size {size!r} is unknown; choose from {', '.join(SIZES)}")
        known = SIZES.get(size, {})
        differ = [f"{k} is {found[k]}, not {v}" for k, v in known.items() if k in found and found[k] != v]
        if differ:
            raise ValueError(f"it is not a {size}: {', '.join(differ)}")
        config = {**found, **known, **meta.get("dit", {}), **more}
        if "heads" not in config:
            raise ValueError(f"the file does not say how many heads it has, and it has no size of {', '.join(SIZES)}")
        if not learn_sigma and config["learn_sigma"]:
            state, config["learn_sigma"] = without_sigma(state, channels), False
        finer = (input_size or config["input_size"]) / config["input_size"]
        config["input_size"] = input_size or config["input_size"]
        config["extent"] *= 1 if resample else finer
        model = DiT(**config)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, ZeroDivisionError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} cannot be loaded as a DiT: {what}") from error
    want = model.state_dict()
    square = table is not None and table.shape == (1, math.isqrt(table.shape[1]) ** 2, dim)  # what is not is refused below
    if table is None or square and table.shape != want["pos_embed"].shape:  # of another side: made anew
        state["pos_embed"] = want["pos_embed"]
    missing, extra = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    wrong = [f"{k} is {tuple(state[k].shape)}, not {tuple(v.shape)}" for k, v in want.items()
             if k in state and state[k].shape != v.shape]  # fmt: skip
    if missing or extra or wrong:
        raise ValueError(f"{path} does not fit this DiT: missing {missing or 'none'}, unexpected {extra or 'none'}, "
                         f"wrong shapes {wrong or 'none'}")  # fmt: skip
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model.eval().requires_grad_(False)
