import copy

import pytest
import torch
from torch import nn

from common import optim as O
from common.vit import ViT


def test_schedule_values():
    kw = dict(steps=100, warmup=10, lr=1.0, lr_start=0.1, lr_end=0.01)
    assert O.warmup_cosine(0, **kw) == pytest.approx(0.1)
    assert O.warmup_cosine(5, **kw) == pytest.approx(0.55)
    assert O.warmup_cosine(10, **kw) == pytest.approx(1.0)
    assert O.warmup_cosine(99, **kw) == pytest.approx(0.01)
    values = [O.warmup_cosine(s, **kw) for s in range(10, 100)]
    assert values == sorted(values, reverse=True)
    assert O.warmup_cosine(0, 1, 0, 1.0) == pytest.approx(1.0)


def test_decay_groups_cover_each_parameter_once():
    model = ViT(16, 8, 8, 1, 1)
    decay, none = O.decay_groups(model, 0.3)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in decay["params"]} == {
        "cls_token", "pos_embed", "patch_embed.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"}  # fmt: skip
    assert len(decay["params"]) + len(none["params"]) == len(names) and none["weight_decay"] == 0


def test_ema_formula():
    model = nn.Linear(3, 2)
    old, ema = copy.deepcopy(model), O.Ema(model, 0.9)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(model)
    torch.testing.assert_close(ema.shadow["weight"], 0.9 * old.weight.detach() + 0.1 * model.weight.detach())
    assert not ema.shadow["weight"].requires_grad
