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


def test_lars_step_by_hand():
    w, b = torch.nn.Parameter(torch.tensor([[3.0, 4.0]])), torch.nn.Parameter(torch.tensor([2.0]))
    opt = O.Lars([w, b], lr=0.5, momentum=0.9, weight_decay=0.1, trust=0.01)
    want_w, m = w.detach().clone(), torch.zeros(1, 2)
    for _ in range(3):
        w.grad, b.grad = torch.tensor([[0.0, 2.0]]), torch.tensor([1.0])
        g = w.grad + 0.1 * want_w
        m = 0.9 * m + g * 0.01 * want_w.norm() / g.norm()
        want_w = want_w - 0.5 * m
        opt.step()
    torch.testing.assert_close(w.detach(), want_w)
    torch.testing.assert_close(b.detach(), torch.tensor([2 - 0.5 * (1 + 1.9 + 2.71)]))  # neither decayed nor scaled


def test_lars_moves_a_single_number_by_a_share_of_it():
    """CLIP's log-temperature: at LARS's rates a plain gradient step would throw it away."""
    t = torch.nn.Parameter(torch.tensor(2.66))
    opt = O.Lars([t], lr=2.4)
    t.grad = torch.tensor(0.3)
    opt.step()
    torch.testing.assert_close(t.detach(), torch.tensor(2.66 - 2.4 * 1e-3 * 2.66))


def test_lars_resumes():
    def make():
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(3, 3))
        return p, O.Lars([p], lr=0.1)

    def step(p, opt):
        p.grad = p.detach() ** 2
        opt.step()

    (p, opt), (q, new) = make(), make()
    for _ in range(4):
        step(p, opt)
    for _ in range(2):
        step(q, new)
    state, (r, last) = new.state_dict(), make()
    r.data.copy_(q.data)
    last.load_state_dict(state)
    for _ in range(2):
        step(r, last)
    assert torch.equal(p, r)


# By hand ---------------------------------------------------------------------------------------------------------------


def test_the_average_is_restored_and_frozen_parameters_do_not_decay():
    model = nn.Linear(3, 2)
    ema, other = O.Ema(model, 0.5), O.Ema(nn.Linear(3, 2), 0.5)
    other.load_state_dict({k: v.clone() for k, v in ema.state_dict().items()})
    assert all(torch.equal(v, other.shadow[k]) for k, v in ema.shadow.items())
    model.weight.requires_grad_(False)
    decay, none = O.decay_groups(model, 0.3)
    assert decay["params"] == [] and none["params"] == [model.bias] and decay["weight_decay"] == 0.3


def test_the_rate_stays_at_its_end():
    assert O.warmup_cosine(150, 100, 0, 1.0, lr_end=0.1) == O.warmup_cosine(99, 100, 0, 1.0, lr_end=0.1) == pytest.approx(0.1)
    assert O.warmup_cosine(50, 101, 0, 1.0) == pytest.approx(0.5)
