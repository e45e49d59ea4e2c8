"""ViT, text transformer and CLIP from scratch; loaders for CLIP (OpenAI, open_clip, Hugging Face) and DINO / DINOv2 files.

One block serves all: pre-norm attention and MLP, with the switches in which the families differ.

                      CLIP               DINO        DINOv2              timm
    patch bias        no                 yes         yes                 yes
    norm before       yes                no          no                  no
    LayerNorm eps     1e-5               1e-6        1e-6                1e-6
    activation        QuickGELU or GELU  GELU        GELU, SwiGLU (g)    GELU
    layer scale       no                 no          yes                 optional
    registers         no                 no          0 or 4              0
    position resize   size, antialias    scale+0.1   scale+0.1 / size    size, antialias

Internal names are timm's; the loaders rename the other layouts. Positions are added before registers are inserted.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


ACTS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"attention: width {dim} needs a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)  # rows ordered q, k, v in every published layout
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, causal: bool = False):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # 3 x (B, h, N, D/h)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, act: str):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(dim, hidden), nn.Linear(hidden, dim), ACTS[act]

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """DINOv2 giant's MLP."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """x += ls1 * attn(norm1(x));  x += ls2 * mlp(norm2(x))."""

    def __init__(self, dim, heads, hidden, act="gelu", eps=1e-6, layer_scale=False, swiglu=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads)
        self.mlp = SwiGLU(dim, hidden) if swiglu else Mlp(dim, hidden, act)
        self.ls1 = nn.Parameter(torch.ones(dim)) if layer_scale else None
        self.ls2 = nn.Parameter(torch.ones(dim)) if layer_scale else None

    def forward(self, x, causal: bool = False):
        a = self.attn(self.norm1(x), causal)
        x = x + (a if self.ls1 is None else self.ls1 * a)
        m = self.mlp(self.norm2(x))
        return x + (m if self.ls2 is None else self.ls2 * m)


def resize_positions(pos: torch.Tensor, grid: tuple[int, int], rule: str) -> torch.Tensor:
    """(1, 1 + M * M, D) -> (1, 1 + gh * gw, D); the class row is untouched. Bicubic in fp32. Rules:
    "antialias" CLIP, timm, DINOv2 with registers; "offset" DINO and DINOv2 without registers, whose
    scale factor (g + 0.1) / M shifts the sampling points a little, so it must be repeated to get the same features."""
    side = math.isqrt(pos.shape[1] - 1)
    if (side, side) == tuple(grid):
        return pos
    grid_pos = pos[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if rule == "offset":
        scale = [(g + 0.1) / side for g in grid]
        grid_pos = F.interpolate(grid_pos, scale_factor=scale, mode="bicubic")
    else:
        grid_pos = F.interpolate(grid_pos, size=grid, mode="bicubic", antialias=True)
    return torch.cat([pos[:, :1], grid_pos.flatten(2).transpose(1, 2).to(pos.dtype)], 1)


class ViT(nn.Module):
    """Images (B, 3, H, W), already normalised, sides divisible by the patch -> (B, out_dim or width): the class token.

    tokens(x) gives all of them, (B, 1 + registers + N, width) after the final norm; patches start at 1 + registers."""

    def __init__(self, image_size=224, patch=16, width=384, depth=12, heads=6, hidden=0, act="gelu", eps=1e-6, out_dim=0,
                 patch_bias=True, norm_pre=False, layer_scale=False, swiglu=False, registers=0,
                 pos_rule="antialias"):  # fmt: skip
        super().__init__()
        if patch < 1 or image_size < patch or image_size % patch:
            raise ValueError(f"ViT: image {image_size} is not a multiple of the patch {patch}")
        self.image_size, self.patch, self.width, self.registers, self.pos_rule = image_size, patch, width, registers, pos_rule
        self.out_dim = out_dim or width
        self.patch_embed = nn.Conv2d(3, width, patch, patch, bias=patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.norm_pre = nn.LayerNorm(width, eps) if norm_pre else nn.Identity()
        hidden = hidden or 4 * width
        self.blocks = nn.ModuleList(Block(width, heads, hidden, act, eps, layer_scale, swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)
        self.proj = nn.Linear(width, out_dim, bias=False) if out_dim else nn.Identity()
        self.apply(_init)
        for p in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(p, std=0.02)

    def tokens(self, x):
        B, _, H, W = x.shape
        if H % self.patch or W % self.patch:
            raise ValueError(f"ViT: image {H} x {W} is not a multiple of the patch {self.patch}; resize or crop it first")
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, N, D), patches row by row
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], 1)
        x = x + resize_positions(self.pos_embed, (H // self.patch, W // self.patch), self.pos_rule)
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], 1)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x):
        return self.proj(self.tokens(x)[:, 0])


class TextTransformer(nn.Module):
    """Ids (B, L <= context) -> (B, out_dim or width): causal, pooled at the end token, which has the largest id."""

    def __init__(self, vocab=49408, context=77, width=512, depth=12, heads=8, out_dim=0, act="quick_gelu", eps=1e-5):
        super().__init__()
        self.context, self.width, self.out_dim = context, width, out_dim or width
        self.token_embed = nn.Embedding(vocab, width)
        self.pos_embed = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, act, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)
        self.proj = nn.Linear(width, out_dim, bias=False) if out_dim else nn.Identity()
        # OpenAI's initialisation (clip/model.py); only the text blocks follow these rules
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        for b in self.blocks:
            nn.init.normal_(b.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(b.attn.proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(b.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(b.mlp.fc2.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            nn.init.zeros_(b.attn.qkv.bias)
            nn.init.zeros_(b.attn.proj.bias)
        if out_dim:
            nn.init.normal_(self.proj.weight, std=width**-0.5)

    def hidden(self, ids, drop: float = 0.0):
        """(B, L, width) after the final norm. drop: dropout of the residual stream at the entrance of every block."""
        x = self.token_embed(ids) + self.pos_embed[: ids.shape[1]]
        for block in self.blocks:
            x = block(F.dropout(x, drop, self.training) if drop else x, causal=True)
        return self.norm(x)

    def forward(self, ids, drop: float = 0.0):
        x = self.hidden(ids, drop)
        return self.proj(x[torch.arange(len(ids), device=ids.device), ids.argmax(-1)])


def trim(ids: torch.Tensor, multiple: int = 1) -> torch.Tensor:
    """(B, L) -> (B, longest text): columns behind the last end token cannot change a pooled feature, because attention is
    causal; captions of 15 tokens then cost a fifth of 77. A multiple of 8 keeps the number of shapes small."""
    longest = int(ids.argmax(-1).max()) + 1
    return ids[:, : min(ids.shape[1], -(-longest // multiple) * multiple)]


class CLIP(nn.Module):
    """Two towers and a temperature, stored as its logarithm. encode_* return features before normalisation, as upstream."""

    def __init__(self, visual: ViT, text: TextTransformer, logit_bias: bool = False):
        super().__init__()
        self.visual, self.text = visual, text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if logit_bias else None  # SigLIP's

    def encode_image(self, img):
        return self.visual(img)

    def encode_text(self, ids):
        return self.text(ids)

    def forward(self, img, ids):
        """Unit features (B, D) of both and the positive scale: what a contrastive loss needs, through one forward."""
        return F.normalize(self.encode_image(img), dim=-1), F.normalize(self.encode_text(ids), dim=-1), self.logit_scale.exp()


def _init(m):
    if isinstance(m, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(m.weight, std=0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


# Published weights --------------------------------------------------------------------------------------------------


def read_weights(path, trust_torchscript: bool = False, network: str = "teacher") -> tuple[dict[str, torch.Tensor], dict]:
    """A weight file, or a folder that holds one -> (state dict in fp32 on the CPU, the parts of config.json and
    open_clip_config.json beside it that are objects).

    OpenAI's .pt files are TorchScript archives, and loading such a file may run code of its author: they are refused unless
    trust_torchscript says that you know where yours comes from."""
    path = Path(path)
    if path.is_dir():
        names = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
        found = [path / n for n in names if (path / n).exists()]
        if not found:
            raise ValueError(f"{path} holds none of {', '.join(names)}")
        path = found[0]
    if not path.exists():
        raise ValueError(f"weight file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist()):
            if not trust_torchscript:
                raise ValueError(
                    "it is a TorchScript archive, which may hold code; pass trust_torchscript=True if you trust it"
                )
            state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's training files hold their arguments
                state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable weight file: {(str(error).splitlines() or [''])[0]}") from error
    except Exception as error:  # pickle.UnpicklingError and its kin: not tensors only
        raise ValueError(f"{path} holds more than tensors and is refused; convert it to safetensors") from error
    for key in ("state_dict", network, "teacher", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    named = state.items() if isinstance(state, dict) else ()
    tensors = {k: v for k, v in named if isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided}
    if not tensors or any(v.is_quantized or v.is_meta for v in tensors.values()):
        raise ValueError(f"{path} holds no ordinary tensors by name")
    config = {}
    for name in ("config.json", "open_clip_config.json"):
        if (path.parent / name).exists():
            try:
                found = json.loads((path.parent / name).read_text("utf-8"))
                config |= {k: v for k, v in found.items() if isinstance(v, dict)}
            except (ValueError, RecursionError, AttributeError) as error:
                raise ValueError(f"{path.parent / name} is not a JSON object") from error
    return {re.sub(r"^(module\.)?(backbone\.)?", "", k): v.float() for k, v in tensors.items()}, config


def _rename(state, rules) -> dict:
    out = {}
    for key, value in state.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        out[key] = value
    return out


def _fuse_qkv(state) -> dict:
    """...attn.{q,k,v}.{weight,bias} -> ...attn.qkv.*, in this order."""
    out = {k: v for k, v in state.items() if not re.search(r"attn\.[qkv]\.(weight|bias)$", k)}
    for key in [k for k in state if re.search(r"attn\.q\.(weight|bias)$", k)]:
        parts = [re.sub(r"attn\.q\.", f"attn.{c}.", key) for c in "qkv"]
        if all(p in state for p in parts):
            out[key.replace("attn.q.", "attn.qkv.")] = torch.cat([state[p] for p in parts])
    return out


def _load(model: nn.Module, state: dict, path, kind: str):
    """Strict, naming what is missing, unexpected or of another shape."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}" for k, v in own.items()
              if k in state and state[k].shape != v.shape]  # fmt: skip
    if missing or extra or shapes:
        parts = [("missing", missing), ("unexpected", extra), ("wrong shape", shapes)]
        text = "; ".join(f"{n}: {', '.join(v[:6])}{f' and {len(v) - 6} more' * (len(v) > 6)}" for n, v in parts if v)
        raise ValueError(f"{path} does not fit {kind}: {text}")
    model.load_state_dict(state)
    return model.eval()


_BLOCK = [  # OpenAI's block names; applied after the tower prefixes
    (r"transformer\.resblocks\.", "blocks."), (r"\.ln_1\.", ".norm1."), (r"\.ln_2\.", ".norm2."),
    (r"attn\.in_proj_", "attn.qkv."), (r"attn\.out_proj\.", "attn.proj."), (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."), (r"\.ls_([12])\.gamma", r".ls\1"),
]  # fmt: skip
_OPENAI = [
    (r"^(transformer|token_embedding|positional_embedding|ln_final|text_projection)", r"text.\1"),
    (r"^visual\.class_embedding$", "visual.cls_token"), (r"^(visual|text)\.positional_embedding$", r"\1.pos_embed"),
    (r"^visual\.conv1\.", "visual.patch_embed."), (r"^visual\.ln_pre\.", "visual.norm_pre."),
    (r"^visual\.ln_post\.", "visual.norm."), (r"^visual\.proj$", "visual.proj.weight"),
    (r"^text\.token_embedding\.", "text.token_embed."), (r"^text\.ln_final\.", "text.norm."),
    (r"^text\.text_projection$", "text.proj.weight"), *_BLOCK,
]  # fmt: skip
_HF = [
    (r"^vision_model\.", "visual."), (r"^text_model\.", "text."), (r"embeddings\.class_embedding$", "cls_token"),
    (r"embeddings\.patch_embedding\.", "patch_embed."), (r"embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"embeddings\.token_embedding\.", "token_embed."), (r"visual\.pre_layrnorm\.", "visual.norm_pre."),
    (r"visual\.post_layernorm\.", "visual.norm."), (r"text\.final_layer_norm\.", "text.norm."),
    (r"^visual_projection\.", "visual.proj."), (r"^text_projection\.", "text.proj."), (r"encoder\.layers\.", "blocks."),
    (r"self_attn\.([qkv])_proj\.", r"attn.\1."), (r"self_attn\.out_proj\.", "attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
]  # fmt: skip
_HF_DINO = [
    (r"^embeddings\.position_embeddings$", "pos_embed"), (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed."),
    (r"^embeddings\.", ""), (r"^encoder\.layer\.", "blocks."), (r"attention\.attention\.(q|k|v)[a-z]+\.", r"attn.\1."),
    (r"attention\.output\.dense\.", "attn.proj."), (r"\.layer_scale([12])\.lambda1", r".ls\1"),
    (r"\.weights_in\.", ".w12."), (r"\.weights_out\.", ".w3."), (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."), (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
]  # fmt: skip


def load_clip(path, act: str = "", trust_torchscript: bool = False) -> CLIP:
    """CLIP weights of OpenAI (.pt or safetensors), open_clip or Hugging Face; the layout is told by the keys.

    act: "quick_gelu" or "gelu". The weights do not tell, and the wrong one loads and silently lowers accuracy, so it is
    read from config.json beside them, or must be given. OpenAI, laion400m and metaclip weights are quick_gelu; LAION-2B
    and DataComp weights are gelu. Nor do they tell the number of heads: it is read there too, else it is width / 64, which
    is wrong for the ViTs of width 1280, 1408 and 1664 (H, g, bigG), refused without the file."""
    state, config = read_weights(path, trust_torchscript)
    file = Path(path, "model.safetensors") if Path(path).is_dir() else Path(path)
    if "input_resolution" in state and "context_length" in state:  # OpenAI's own files
        act = act or "quick_gelu"
    drop = r"input_resolution$|context_length$|vocab_size$|position_ids$|^attn_mask$|^text\.attn_mask$"
    state = {k: v for k, v in state.items() if not re.search(drop, k)}
    vision_cfg, text_cfg, heads = config.get("vision_config", {}), config.get("text_config", {}), {}
    if any(v.ndim == 0 and not k.startswith("logit_") for k, v in state.items()):
        raise ValueError(f"{path} holds single numbers where CLIP has matrices")
    if "vision_model.embeddings.class_embedding" in state:
        state = _fuse_qkv(_rename(state, _HF))
        act = act or vision_cfg.get("hidden_act", "")
        heads = {"visual": vision_cfg.get("num_attention_heads"), "text": text_cfg.get("num_attention_heads")}
    elif "visual.class_embedding" in state:
        for key in ("visual.proj", "text_projection", "text.text_projection"):  # x @ proj there, Linear here
            if key in state:
                state[key] = state[key].T.contiguous()
        state = _rename(state, _OPENAI)
        if "model_cfg" in config:
            cfg = config["model_cfg"]
            act = act or ("quick_gelu" if cfg.get("quick_gelu") else "gelu")
            width = state["visual.patch_embed.weight"].shape[0] if "visual.patch_embed.weight" in state else 0
            heads = {"visual": width // (cfg.get("vision_cfg") or {}).get("head_width", 64),
                     "text": (cfg.get("text_cfg") or {}).get("heads")}  # fmt: skip
    elif "visual.cls_token" in state and file.suffix == ".safetensors":  # our own export, of a fine-tuned model
        with safe_open(file, "pt") as f:
            meta = json.loads((f.metadata() or {}).get("meta", "{}"))
        act, heads = act or meta.get("act", ""), meta.get("heads", {})
    else:
        raise ValueError(
            f"{path} is not a CLIP ViT: it has neither visual.class_embedding (OpenAI, open_clip) nor "
            f"vision_model.embeddings.class_embedding (Hugging Face), but {', '.join(list(state)[:4])}, ..."
        )
    if act not in ACTS:
        raise ValueError(f'{path} does not say its activation; lay its config.json or open_clip_config.json beside it, or pass '
                         'act="quick_gelu" (OpenAI, laion400m, metaclip) or act="gelu" (LAION-2B, DataComp)')  # fmt: skip
    for key in ("visual.cls_token", "visual.pos_embed"):
        if key in state:
            state[key] = state[key].reshape(1, -1, state[key].shape[-1])
    try:
        width, _, patch, _ = state["visual.patch_embed.weight"].shape
        if width in (1280, 1408, 1664) and not heads.get("visual"):
            raise ValueError(f"{path}, a ViT of width {width}, needs config.json or open_clip_config.json beside it: weights "
                             "do not say how many heads they have")  # fmt: skip
        grid = math.isqrt(state["visual.pos_embed"].shape[1] - 1)
        context, text_width = state["text.pos_embed"].shape
        sizes = {t: len({k.split(".")[2] for k in state if k.startswith(f"{t}.blocks.")}) for t in ("visual", "text")}
        visual = ViT(grid * patch, patch, width, sizes["visual"], heads.get("visual") or width // 64,
                     state["visual.blocks.0.mlp.fc1.weight"].shape[0], act, 1e-5, state["visual.proj.weight"].shape[0],
                     "visual.patch_embed.bias" in state, True, "visual.blocks.0.ls1" in state)  # fmt: skip
        text = TextTransformer(state["text.token_embed.weight"].shape[0], context, text_width, sizes["text"],
                               heads.get("text") or text_width // 64,
                               state["text.proj.weight"].shape[0], act)  # fmt: skip
    except (KeyError, TypeError, ZeroDivisionError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} is an incomplete CLIP: {type(error).__name__}: {error}") from error
    return _load(CLIP(visual, text, "logit_bias" in state), state, path, "CLIP")


def load_dino(path, network: str = "teacher") -> ViT:
    """DINO (backbone, or full training file, of which `network` is taken) and DINOv2 (S, B, L, g, with or without registers),
    official or Hugging Face. Heads are width / 64 in all published sizes."""
    state, _ = read_weights(path, network=network)
    if "head.weight" in state:
        raise ValueError(f"{path} holds a classifier, head.weight: a supervised ViT is not DINO")
    state = {k: v for k, v in state.items() if not re.search(r"mask_token$|^head\.|^(dino|ibot)_head\.|^pooler\.", k)}
    if "embeddings.patch_embeddings.projection.weight" in state:
        state = _fuse_qkv(_rename(state, _HF_DINO))
    state = _rename(state, [(r"^patch_embed\.proj\.", "patch_embed."), (r"\.ls([12])\.gamma$", r".ls\1"),
                            (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.")])  # fmt: skip
    if "patch_embed.weight" not in state or "pos_embed" not in state:
        raise ValueError(f"{path} is not a DINO ViT: patch_embed.proj.weight or pos_embed is missing; it has "
                         f"{', '.join(list(state)[:4])}, ...")  # fmt: skip
    try:
        width, _, patch, _ = state["patch_embed.weight"].shape
        grid, scaled = math.isqrt(state["pos_embed"].shape[1] - 1), "blocks.0.ls1" in state
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        swiglu = "blocks.0.mlp.w12.weight" in state
        hidden = state["blocks.0.mlp.w3.weight"].shape[1] if swiglu else 4 * width
        depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
        model = ViT(grid * patch, patch, width, depth, max(1, width // 64), hidden, layer_scale=scaled, swiglu=swiglu,
                    registers=registers, pos_rule="antialias" if registers else "offset")  # fmt: skip
    except (KeyError, ValueError, ZeroDivisionError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} is an incomplete DINO ViT: {type(error).__name__}: {error}") from error
    return _load(model, state, path, "a DINO ViT")
