"""The small stand-in models of common/weights/, trained by this project's own scripts on the generated world.

    vae = load_vae()                        autoencoder, 32 px <-> 4 x 8 x 8
    judge = load_judge()                    reads every attribute off a picture; its features serve Frechet distances

They let every method start without a download. common/weights/README.md says how each was made and how good it is.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import ckpt, scenes, vae
from common.resnet import ResNet

WEIGHTS = Path(__file__).parent / "weights"
ANSWERS = {  # what the judge tells of one cell of the grid
    "shape": (*scenes.SHAPES, *scenes.PRIVATE_SHAPES, "nothing"),
    "colour": tuple(scenes.COLOURS),
    "size": tuple(scenes.SIZES),
    "texture": scenes.TEXTURES,
    "tone": tuple(scenes.TONES),
    "pattern": scenes.PATTERNS,
}


class Judge(nn.Module):
    """Cells of a scene (B, 3, 32, 32) in [-1, 1] -> logits of every attribute. Whole scenes go through `cells` first."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.body = ResNet(width)
        self.heads = nn.ModuleDict({k: nn.Linear(self.body.out_dim, len(v)) for k, v in ANSWERS.items()})

    def forward(self, x):
        f = self.body(x)
        return {k: head(f) for k, head in self.heads.items()}

    def features(self, x: torch.Tensor, grid: int) -> torch.Tensor:
        """Scenes (B, 3, S, S) -> (B, grid * grid * D): the cells' features side by side."""
        return self.body(cells(x, grid)).view(len(x), -1)

    def read(self, x: torch.Tensor, grid: int) -> dict[str, torch.Tensor]:
        """Scenes (B, 3, S, S) -> attribute -> (B, grid * grid) indices into ANSWERS."""
        return {k: v.argmax(1).view(len(x), -1) for k, v in self(cells(x, grid)).items()}


def cells(x: torch.Tensor, grid: int) -> torch.Tensor:
    """(B, 3, S, S) -> (B * grid * grid, 3, 32, 32), row by row: every cell enlarged to 32 px."""
    x = F.interpolate(x, (32 * grid, 32 * grid), mode="bilinear", antialias=True) if x.shape[-1] != 32 * grid else x
    x = x.unflatten(2, (grid, 32)).unflatten(4, (grid, 32))  # (B, 3, g, 32, g, 32)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 32, 32)


def truth(s: scenes.Scene) -> dict[str, list[int]]:
    """What a perfect judge reads: attribute -> index for every cell, -1 where an empty cell has no such attribute."""
    out = {k: [-1] * s.grid**2 for k in ANSWERS}
    out["shape"] = [ANSWERS["shape"].index("nothing")] * s.grid**2
    for name in ("tone", "pattern"):
        out[name] = [ANSWERS[name].index(getattr(s, name))] * s.grid**2
    for t in s.things:
        for name in ("shape", "colour", "size", "texture"):
            out[name][t.cell] = ANSWERS[name].index(getattr(t, name))
    return out


def verify(judge: Judge, images: torch.Tensor, world: list[scenes.Scene]) -> dict[str, list[bool]]:
    """Whether each picture (N, 3, S, S) in [-1, 1] shows what its scene's full caption names: attribute -> one answer for each
    scene that has it. "all" needs every one of them. Objects are found by their shape, wherever they are."""
    out: dict[str, list[bool]] = {}
    for i in range(0, len(world), 256):
        read = judge.read(images[i : i + 256], world[0].grid)
        for j, s in enumerate(world[i : i + 256]):
            seen = {k: [ANSWERS[k][int(v)] for v in read[k][j]] for k in ANSWERS}
            where = {shape: cell for cell, shape in enumerate(seen["shape"]) if shape != "nothing"}
            here = [where.get(t.shape) for t in s.things]
            right = {"shape": None not in here, "count": sum(x != "nothing" for x in seen["shape"]) == len(s.things)}
            for k in ("colour", "size", "texture"):
                right[k] = all(c is not None and seen[k][c] == getattr(t, k) for t, c in zip(s.things, here))
            found = [replace(t, cell=-1 if c is None else c) for t, c in zip(s.things, here)]
            placed = found[:1] if len(found) == 1 else found[2:]  # two objects are related, all others have a place
            if s.grid > 1 and placed:
                right["place"] = all(
                    a.cell == b.cell for a, b in zip(placed, s.things[:1] if len(found) == 1 else s.things[2:])
                )
            if len(found) > 1:
                a, b = found[:2]
                same = scenes.relation(a, b, s.grid) == scenes.relation(*s.things[:2], s.grid)
                right["relation"] = min(a.cell, b.cell) >= 0 and same
            for k in ("tone", "pattern"):  # the cells' majority
                right[k] = max(ANSWERS[k], key=seen[k].count) == getattr(s, k)
            for k, v in {**right, "all": all(right.values())}.items():
                out.setdefault(k, []).append(v)
    return out


def load_vae() -> vae.VAE:
    return vae.load_vae(WEIGHTS / "vae.safetensors")


def load_judge() -> Judge:
    judge = Judge()
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in _read("judge").items()})
    return judge.eval().requires_grad_(False)


def adopt(path, name: str) -> None:
    """Puts a run's model.safetensors into common/weights/ as fp16, with its settings."""
    state, meta = vae.read_tensors(path)
    ckpt.export(
        WEIGHTS / f"{name}.safetensors", {k: v.half() if v.is_floating_point() else v for k, v in state.items()}, **meta
    )


def _read(name: str) -> dict[str, torch.Tensor]:
    return vae.read_tensors(WEIGHTS / f"{name}.safetensors")[0]
