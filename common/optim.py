"""Schedules as functions of the step, weight-decay groups, EMA, LARS."""

from __future__ import annotations

import math

import torch


def warmup_cosine(step: int, steps: int, warmup: int, lr: float, lr_start: float = 0.0, lr_end: float = 0.0) -> float:
    """Learning rate of update `step` (0-based): linear from lr_start to lr over `warmup` updates, then half a cosine that
    reaches lr_end at the last update, steps - 1."""
    if step < warmup:
        return lr_start + (lr - lr_start) * step / warmup
    share = (step - warmup) / max(1, steps - 1 - warmup)
    return lr_end + 0.5 * (lr - lr_end) * (1 + math.cos(math.pi * min(1.0, share)))


def set_lr(opt: torch.optim.Optimizer, lr: float) -> None:
    for group in opt.param_groups:
        group["lr"] = lr


def decay_groups(model: torch.nn.Module, wd: float) -> list[dict]:
    """Two AdamW groups: matrices, convolutions and embeddings decay; biases, norms and scalars (ndim < 2) do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        dict(params=[p for p in params if p.ndim >= 2], weight_decay=wd),
        dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0),
    ]


class Ema:
    """Exponential moving average of the parameters: ema = decay * ema + (1 - decay) * model. Buffers are the model's."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.shadow = {k: p.detach().clone() for k, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        params = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.shadow.values()), [params[k].detach() for k in self.shadow], 1 - self.decay)

    def state_dict(self) -> dict:
        return self.shadow

    def load_state_dict(self, state: dict) -> None:
        for k, v in self.shadow.items():
            v.copy_(state[k])


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled for every tensor: trust * |w| / |g + wd w| (You, Gitman, Ginsburg 2017, arXiv
    1708.03888). Norms and biases (ndim 1) are neither decayed nor scaled, as SimCLR does; a single number is scaled,
    or the temperature of a contrastive loss would run away."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=1e-3):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.trust = trust

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                g = p.grad
                if p.ndim != 1:
                    g = g + group["weight_decay"] * p
                    w, u = p.norm(), g.norm()
                    g = g * torch.where((w > 0) & (u > 0), self.trust * w / u, 1.0)
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                m = self.state[p]["momentum"].mul_(group["momentum"]).add_(g)
                p.sub_(m, alpha=group["lr"])
