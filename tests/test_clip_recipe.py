"""methods/clip_recipe.py: the equations against slow versions (T1 to T16 of the paper note), then the run as a user sees it."""

import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

from common import augment as A
from common import ddp, optim
from data_prep._write import png, prepare
from methods import clip_recipe as M
from tests.helpers import ROOT, both, in_processes, inside, run, torchrun, user_error

ENV = ddp.Env(0, 1, torch.device("cpu"))
SMOKE = M.Config(**M.PRESETS["smoke"])


def unit(seed, *shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double), dim=-1)


def views(A, B=6, D=5, seed=0):
    return [unit(10 * seed + a, B, D) for a in range(A)]


def slow_clip(a, b, s, e=0.0):
    """Textbook loops: -sum target * log softmax, both directions."""
    K, total = len(a), 0.0
    for x, y in ((a, b), (b, a)):
        for i in range(K):
            logits = [s * float(x[i] @ y[j]) for j in range(K)]
            norm = math.log(sum(math.exp(v) for v in logits))
            total -= sum(((1 - e) * (i == j) + e / K) * (logits[j] - norm) for j in range(K)) / K
    return total / 2


# Section 2: the losses ------------------------------------------------------------------------------------------------


def test_roc_auc_equals_all_pairs():
    torch.manual_seed(0)
    s, y = torch.randint(0, 9, (80,)).float(), torch.rand(80) < 0.3
    pos, neg = s[y], s[~y]
    want = ((pos[:, None] > neg).double() + 0.5 * (pos[:, None] == neg)).mean() * 100
    assert M.roc_auc(s, y.long()) == pytest.approx(want.item())
    with pytest.raises(ValueError, match="both classes"):
        M.roc_auc(s, torch.ones(80))


def test_t1_without_strong_views_it_is_infonce():
    z = unit(0, 6, 5), unit(1, 6, 5)
    loss, parts = M.rocket_loss(z, ([], []), 14.0, 10.0, smoothing=0.3)
    assert loss.item() == pytest.approx(slow_clip(*z, 14.0), abs=1e-5) and parts["weak"] is loss
    label = torch.arange(6)
    one_line = (F.cross_entropy(14 * z[0] @ z[1].T, label) + F.cross_entropy(14 * z[1] @ z[0].T, label)) / 2
    assert loss.item() == pytest.approx(one_line.item(), abs=1e-5)


def test_loss_equals_the_formula():
    z, h = (unit(0, 6, 5), unit(1, 6, 5)), (views(2, seed=1), views(2, seed=2))
    strong = np.mean([slow_clip(a, b, 10.0, 0.1) for a, b in itertools.product(*h)])
    loss, parts = M.rocket_loss(z, h, 14.0, 10.0, 0.1)
    assert parts["strong"].item() == pytest.approx(strong, abs=1e-5)
    assert loss.item() == pytest.approx((slow_clip(*z, 14.0) + 2 * strong) / 3, abs=1e-5)  # weights 1/3 and 2/3


@pytest.mark.parametrize("A", [1, 2])
def test_t2_strong_views_equal_to_the_weak_one_change_nothing(A):
    z = unit(0, 6, 5), unit(1, 6, 5)
    loss, _ = M.rocket_loss(z, ([z[0]] * A, [z[1]] * A), 14.0, 14.0, 0.0)
    assert loss.item() == pytest.approx(M.clip_loss(*z, 14.0).item(), abs=1e-6)


def test_t4_smoothing_and_its_floor():
    a, b = unit(0, 6, 5), unit(1, 6, 5)
    logits = 10 * a.float() @ b.float().T
    logp = logits.log_softmax(1)
    mixed = 0.9 * -logp.diagonal().mean() + 0.1 * -logp.mean()
    to_image = (10 * b.float() @ a.float().T).log_softmax(1)
    other = 0.9 * -to_image.diagonal().mean() + 0.1 * -to_image.mean()
    assert M.clip_loss(a, b, 10.0, 0.1).item() == pytest.approx(((mixed + other) / 2).item(), abs=1e-5)
    target = torch.full((6,), 0.1 / 6, dtype=torch.double)
    target[0] += 0.9
    floor = -(target * target.log()).sum().item()
    perfect = torch.eye(6, dtype=torch.double)
    values = [M.clip_loss(perfect, perfect, s, 0.1).item() for s in np.linspace(1, 30, 60)]
    assert min(values) >= floor - 1e-6 and min(values) == pytest.approx(floor, abs=1e-3)


def test_t5_symmetries():
    z, h = (unit(0, 6, 5), unit(1, 6, 5)), (views(2, seed=1), views(2, seed=2))
    loss = M.rocket_loss(z, h, 14.0, 10.0, 0.1)[0].item()
    assert M.rocket_loss(z[::-1], h[::-1], 14.0, 10.0, 0.1)[0].item() == pytest.approx(loss, abs=1e-6)
    p = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    mixed = M.rocket_loss(tuple(v[p] for v in z), tuple([v[p] for v in m] for m in h), 14.0, 10.0, 0.1)[0]
    assert mixed.item() == pytest.approx(loss, abs=1e-6)
    assert M.rocket_loss(z, (h[0][::-1], h[1]), 14.0, 10.0, 0.1)[0].item() == pytest.approx(loss, abs=1e-6)


def test_t7_siam():
    v = unit(0, 6, 5).requires_grad_()
    p = (3.0 * v.detach()).requires_grad_()
    pairs = M.view_pairs(0)
    assert pairs == [(0, 0)] and M.view_pairs(2) == [(0, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert M.siam_loss([p], [v], [p], [v], pairs).item() == pytest.approx(0, abs=1e-6)
    assert M.siam_loss([-p], [v], [-p], [v], pairs).item() == pytest.approx(4, abs=1e-6)
    M.siam_loss([p + 1], [v], [p], [v], pairs).backward()
    assert v.grad is None and p.grad.abs().sum() > 0  # stop-gradient


def test_t8_barlow_equals_loops_and_vanishes_at_the_identity():
    K, D = 8, 3
    q = torch.linalg.qr(torch.randn(K, D, generator=torch.Generator().manual_seed(0)))[0] * math.sqrt(K)  # q^T q / K = I
    assert M.barlow_loss([q], [q], [(0, 0)]).item() == pytest.approx(0, abs=1e-8)
    a, b = views(3, K, D, 1), views(3, K, D, 2)
    total = 0.0
    for i, j in M.view_pairs(2):
        C = [[sum(float(a[i][k, m] * b[j][k, n]) for k in range(K)) / K for n in range(D)] for m in range(D)]
        total += sum((C[m][n] - 1) ** 2 if m == n else 5e-3 * C[m][n] ** 2 for m in range(D) for n in range(D))
    assert M.barlow_loss(a, b, M.view_pairs(2)).item() == pytest.approx(0.025 * total / 5, abs=1e-6)


def test_t9_sinkhorn():
    S = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    Q = M.sinkhorn(S, 0.5, 3)
    torch.testing.assert_close(Q.sum(1), torch.ones(6))
    torch.testing.assert_close(M.sinkhorn(S, 0.5, 200).sum(0), torch.ones(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(M.sinkhorn(S + 7.0, 0.5, 3), Q)
    torch.testing.assert_close(M.sinkhorn(torch.zeros(4, 8)), torch.full((4, 8), 1 / 8))
    P = (S.double() / 0.5).exp()  # the released code's order, slowly: rows (columns here) first, then samples
    for _ in range(3):
        for c in range(6):
            P[:, c] /= P[:, c].sum() * 6
        for r in range(6):
            P[r] /= P[r].sum() * 6
    torch.testing.assert_close(Q.double(), P * 6, atol=1e-6, rtol=1e-5)
    assert M.sinkhorn(torch.tensor([[1.0, -1.0], [0.0, 0.5]]) + 300).isfinite().all()  # exp(300 / 0.05) would overflow


def test_swap_loss_equals_loops():
    I, T = views(2, seed=1), views(2, seed=2)  # noqa: E741
    total = 0.0
    for a, b in itertools.product(range(2), repeat=2):
        for x, y, u, w in ((I[a], T[b], I[1 - a], T[1 - b]), (T[b], I[a], T[1 - b], I[1 - a])):
            Q = M.sinkhorn(u @ w.T, 0.05, 3).double()
            total -= (Q * (7.0 * x @ y.T).log_softmax(1)).sum(1).mean().item() / 2
    assert M.swap_loss(I, T, 7.0).item() == pytest.approx(0.2 * total / 4, abs=1e-5)


def test_t16_accumulation_is_not_a_larger_batch():
    z, w = unit(0, 8, 5), unit(1, 8, 5)
    halves = (M.clip_loss(z[:4], w[:4], 14.0) + M.clip_loss(z[4:], w[4:], 14.0)) / 2
    assert abs(halves - M.clip_loss(z, w, 14.0)) > 0.05  # fewer negatives


# Model, schedule, one step -----------------------------------------------------------------------------------------------


def setup(recipe="rocket", extra="none", **kw):
    cfg = replace(SMOKE, recipe=recipe, extra=extra, **kw)
    source, tests, tok, synonyms = M.open_data(cfg)
    torch.manual_seed(0)
    model = M.Rocket(cfg, M.RECIPES[recipe], extra, len(tok))
    views_ = M.Views(cfg, M.RECIPES[recipe], tok, synonyms)
    batches = M.data.Batches(source, views_, views_.collate, cfg.batch_size, ENV, 0)
    return cfg, model, M.to_device(next(batches), "cpu"), tok, tests


@pytest.mark.parametrize("recipe", list(M.RECIPES))
@pytest.mark.parametrize("extra", M.EXTRAS)
def test_every_arm_has_a_finite_loss_and_gradients_everywhere(recipe, extra):
    cfg, model, (images, captions), _, _ = setup(recipe, extra)
    assert len(images) == len(captions) == 1 + M.RECIPES[recipe].views
    teacher = model if extra == "byol" else None
    loss, parts = M.method_loss(model, teacher, images, captions, extra, M.RECIPES[recipe], cfg)
    loss.backward()
    assert loss.isfinite() and ("extra" in parts) == (extra != "none")
    # a bias before batch norm has no effect; its gradient is rounding only, so only presence is asked
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_t3_sum_is_twice_the_average():
    cfg, model, (images, captions), _, _ = setup()
    model.eval()
    a = M.method_loss(model, None, images, captions, "none", M.RECIPES["rocket"], cfg)[0]
    b = M.method_loss(model, None, images, captions, "none", M.RECIPES["rocket"], replace(cfg, loss_sum=True))[0]
    assert b.item() == pytest.approx(2 * a.item(), rel=1e-6)


def test_plain_is_really_plain():
    cfg, model, (images, _), tok, _ = setup("plain")
    assert len(images) == 1 and model.h is None and M.RECIPES["plain"] == M.Recipe()
    source = M.scenes.Source(8, 0, 32)
    texts = [M.Views(cfg, M.RECIPES["plain"], tok, {})(source.read(0, i), np.random.default_rng(i))[2][0] for i in range(8)]
    assert all(t in source.read(0, i)["captions"] for i, t in enumerate(texts))  # captions untouched


def test_the_paper_sized_model():
    """Widths of the released code: 2048 -> 256 linear, 4096-4096-256 MLP, both without a bias where it says so."""
    cfg = M.Config(**M.PRESETS["paper"])
    with torch.device("meta"):
        model = M.Rocket(cfg, M.RECIPES["rocket"], "none", 49408)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes["z.img.weight"] == (256, 2048) and shapes["z.txt.weight"] == (256, 512) and "z.img.bias" not in shapes
    assert (
        shapes["h.img.0.weight"] == (4096, 2048)
        and shapes["h.img.3.weight"] == (4096, 4096)
        and shapes["h.txt.6.weight"] == (256, 4096)
    )
    assert sum(p.numel() for n, p in model.visual.named_parameters()) == 23_508_032  # ResNet-50 without its classifier


def test_t10_temperatures_start_and_stay_in_range(tmp_path):
    _, model, _, _, _ = setup()
    s_z, s_h = model.scales()
    assert s_z.item() == pytest.approx(1 / 0.07) and s_h.item() == pytest.approx(10)
    result_dir = tmp_path / "run"
    M.train(replace(SMOKE, recipe="rocket", extra="none", out_dir=str(result_dir), lr=2.0, steps=4, warmup=0))
    lines = [json.loads(x) for x in (result_dir / "log.jsonl").read_text().splitlines()]
    values = [x[k] for x in lines for k in ("s_z", "s_h") if k in x]
    assert values and all(1 <= v <= 100.001 for v in values)


def test_t11_what_decays():
    _, model, _, _, _ = setup("rocket", "siam", backbone="vit", heads=2)
    decay, _ = optim.decay_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in decay["params"]}
    assert {"visual.pos_embed", "visual.cls_token", "text.token_embed.weight", "text.pos_embed", "z.img.weight"} <= decayed
    free = set(names.values()) - decayed
    assert {"log_s_z", "log_s_h", "h.img.1.weight", "text.norm.weight"} <= free
    assert all(n.endswith("bias") or "norm" in n or n.startswith("log_s") or ".1." in n or ".4." in n for n in free), free


def test_t13_text_dropout_is_for_strong_captions_in_training():
    cfg, model, (images, captions), _, _ = setup()
    model.train()
    a, b = model(images, [captions[0]] * 3), model(images, [captions[0]] * 3)
    assert torch.equal(a["z_txt"], b["z_txt"]) and not torch.equal(a["h_txt"][0], b["h_txt"][0])
    model.drop = 0.0
    a, b = model(images, [captions[0]] * 3), model(images, [captions[0]] * 3)
    assert torch.equal(a["h_txt"][0], b["h_txt"][0]) and torch.equal(a["h_txt"][0], a["h_txt"][1])
    model.eval().drop = 0.5
    a, b = model(images, captions), model(images, captions)
    assert torch.equal(a["h_txt"][1], b["h_txt"][1])


def test_t15_schedule_of_the_paper():
    lr = [optim.warmup_cosine(s, 96_900, 3_000, 3e-3, 1e-6, 1e-5) for s in (0, 3_000, 96_899)]
    assert lr == pytest.approx([1e-6, 3e-3, 1e-5])


def test_byol_teacher_follows_parameters_only(tmp_path):
    """T7: after one step the teacher is 0.99 old + 0.01 new; its batch norm statistics are its own."""
    cfg = replace(SMOKE, recipe="rocket", extra="byol", out_dir=str(tmp_path), steps=1, save_every=1)
    _, tests, tok, _ = M.open_data(cfg)
    ddp.reseed(cfg.seed, 0, 0)
    old = M.Rocket(cfg, M.RECIPES["rocket"], "byol", len(tok)).state_dict()
    M.train(cfg)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    for n in ("z.img.weight", "v.txt.0.weight", "log_s_h"):
        torch.testing.assert_close(saved["teacher"][n], 0.99 * old[n] + 0.01 * saved["model"][n])
    assert (
        saved["teacher"]["v.img.1.running_mean"] - saved["model"]["v.img.1.running_mean"]
    ).abs().max() < 1e-6  # same inputs, once


def rocket_gradients(env, extra):
    """In float64, where sums of two halves move nothing across a ReLU's zero."""
    torch.manual_seed(0)
    cfg = replace(SMOKE, recipe="rocket", extra=extra, text_drop=0.0)
    source, _, tok, synonyms = M.open_data(cfg)
    model = M.Rocket(cfg, M.RECIPES["rocket"], extra, len(tok)).double()
    teacher = model if extra == "byol" else None
    v = M.Views(cfg, M.RECIPES["rocket"], tok, synonyms)
    batch = next(M.data.Batches(source, v, v.collate, 16, env, 0))
    wrapped = ddp.wrap(model, env)
    images, ids = M.to_device(batch, "cpu")
    torch.Tensor.float = torch.Tensor.double  # of this process, which ends after it
    loss, _ = M.method_loss(wrapped, teacher, [x.double() for x in images], ids, extra, M.RECIPES["rocket"], cfg)
    loss.backward()
    return ddp.mean({"loss": loss})["loss"], {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("extra", M.EXTRAS)
def test_t6_two_processes_equal_one(extra, tmp_path):
    """Data, augmentation, batch norm, gathers, Sinkhorn and Barlow's correlation: the same loss and gradients."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    [(loss, want)] = in_processes(1, rocket_gradients, extra, path=one)
    for got_loss, got in in_processes(2, rocket_gradients, extra, path=two):
        assert got_loss == pytest.approx(loss, abs=1e-5)  # printed in float32
        for n in want:
            torch.testing.assert_close(got[n], want[n], atol=1e-10, rtol=1e-9, msg=lambda m, n=n: f"{n}: {m}")


# Captions ------------------------------------------------------------------------------------------------------------------


def test_t12_edits():
    rng, words = np.random.default_rng(0), "a large red star on the dark background".split()
    syn = {"red": ("scarlet",), "star": ("asterisk", "pentagram"), "the": ("thy",)}
    for _ in range(200):
        assert Counter(A.swap_edit(words, rng)) == Counter(words)
        kept = A.delete_edit(words, rng, 0.9)
        assert kept and not Counter(kept) - Counter(words)
        changed = {(a, b) for a, b in zip(words, A.synonym_edit(words, rng, syn)) if a != b}
        assert len(changed) == 1 and next(iter(changed))[0] in ("red", "star")  # never a stop-word
    assert A.delete_edit(["one"], rng, 1.0) == ["one"]
    assert A.synonym_edit("red red sky".split(), rng, syn) == ["scarlet", "scarlet", "sky"]
    assert Counter(A.synonym_edit(["green", "moon"], rng, syn)) == Counter(["green", "moon"])  # falls back to a swap
    assert A.edit_caption("", rng, syn) == "" and A.edit_caption("  ", rng, syn) == "  "


def test_t12_stop_words():
    rng = np.random.default_rng(0)
    assert A.drop_stop_words("a dog is on the mat .", rng, 1.0) == "dog mat ."
    assert A.drop_stop_words("it is what it was", rng, 1.0) == "it is what it was"  # nothing would remain
    assert A.drop_stop_words("a dog", rng, 0.0) == "a dog"
    assert A.drop_stop_words("The dog's tail", rng, 1.0) == "dog tail"
    assert 150 < len(A.STOP_WORDS) < 220


def test_t12_frequencies_and_seeds(monkeypatch):
    counts = Counter()
    for name in ("synonym_edit", "swap_edit", "delete_edit"):
        monkeypatch.setattr(A, name, lambda words, rng, *a, name=name: counts.update([name]) or words)
    rng = np.random.default_rng(0)
    for _ in range(5000):
        A.edit_caption("a b", rng, {})
    shares = [counts[n] / 5000 for n in ("synonym_edit", "swap_edit", "delete_edit")]
    assert shares == pytest.approx([0.4, 0.4, 0.2], abs=0.02)
    monkeypatch.undo()
    text = "a large red star on the dark background"
    edits = [A.edit_caption(text, np.random.default_rng(s), M.scenes.SYNONYMS) for s in range(20)]
    assert (
        edits == [A.edit_caption(text, np.random.default_rng(s), M.scenes.SYNONYMS) for s in range(20)] and len(set(edits)) > 8
    )


def test_views_of_a_sample():
    cfg, recipe = replace(SMOKE, image_size=32, strong_size=24, captions="multi"), M.RECIPES["rocket"]
    source, _, tok, synonyms = M.open_data(cfg)
    v = M.Views(cfg, recipe, tok, synonyms)
    crops, rows, texts = v(source.read(0, 0), np.random.default_rng(0))
    assert [c.shape for c in crops] == [(32, 32, 3), (24, 24, 3), (24, 24, 3)] and len(texts) == 3
    assert rows[0][:4].tolist() == [1, 1, 1, 0] and not rows[0][8:].any()  # the weak view has no colour, blur or flip
    with pytest.raises(M.data.BadSample, match="no caption"):
        v({"key": "k", "image": source.read(0, 0)["image"], "captions": []}, np.random.default_rng(0))
    images, _, ids = v.collate([v(source.read(0, i), np.random.default_rng(i)) for i in range(3)])
    assert [tuple(i.shape) for i in images] == [(3, 32, 32, 3), (3, 24, 24, 3), (3, 24, 24, 3)]
    assert all(t.shape[1] % 8 == 0 and (t.max(1).values == tok.end).all() for t in ids)


# Evaluation ----------------------------------------------------------------------------------------------------------------


class Fake(torch.nn.Module):
    """Encoders that know the answer: an image is its label, a prompt's class is its last word."""

    def embed(self, tower, x, w):
        z = F.one_hot(x[:, 0].long(), 6).float() if tower == "txt" else x
        h = z.flip(-1)
        return {"z": z, "h": h, "both": torch.cat([math.sqrt(w) * z, math.sqrt(1 - w) * h], -1)}


def test_views_use_the_recipe_s_crops_colours_and_captions(monkeypatch):
    source = M.pairs_of_scenes(20, 0, 32, "train")
    tok, areas, crop = M.Tokenizer.train(source.captions(), 600), [], M.augment.crop_box
    monkeypatch.setattr(M.augment, "crop_box", lambda w, h, scale, rng: areas.append(scale) or crop(w, h, scale, rng))
    cfg = replace(SMOKE, strong_scale=0.3, jitter="full")
    views = M.Views(cfg, M.RECIPES["rocket"], tok, {})
    views(source.read(0, 0), np.random.default_rng(0))
    assert areas == [(0.5, 1.0), *[(0.3, 1.0)] * M.RECIPES["rocket"].views]
    chances = [getattr(views.strong, f"{k}_p") for k in ("jitter", "grey", "blur", "flip")]
    assert views.strong.jitter == (0.4, 0.4, 0.4, 0.1) and chances == [0.8, 0.2, 0.5, 0.5]
    assert (views.weak.jitter_p, views.weak.grey_p, views.weak.blur_p, views.weak.flip_p) == (0, 0, 0, 0)
    sample = {**source.read(0, 0), "captions": ["One  red", "two blue", "three green"]}
    plain = M.RECIPES["plain"]
    for how, count in (("one", 1), ("multi", 2)):  # of a sample's captions: one for all views, or one for each
        recipe = replace(M.RECIPES["rocket"], text=False)
        made = [M.Views(replace(cfg, captions=how), recipe, tok, {})(sample, np.random.default_rng(i))[2] for i in range(20)]
        assert max(len(set(texts)) for texts in made) >= count and (how == "multi" or all(len(set(t)) == 1 for t in made))
    texts = {M.Views(replace(cfg, clean_text=True), plain, tok, {})(sample, np.random.default_rng(i))[2][0] for i in range(20)}
    assert "one red" in texts and "One  red" not in texts


def test_smoothing_is_the_recipe_s_and_not_swalip_s():
    losses = {}
    for name, extra in (("rocket", "none"), ("plain", "none"), ("rocket", "swal")):
        cfg, model, (images, captions), _, _ = setup(name, extra)
        model.eval()
        losses[name, extra] = [M.method_loss(model, None, images, captions, extra, M.RECIPES[name], replace(cfg, smoothing=s))
                               [0].item() for s in (0.0, 0.3)]  # fmt: skip
    assert losses["rocket", "none"][0] != losses["rocket", "none"][1]
    assert losses["plain", "none"][0] == losses["plain", "none"][1]
    assert losses["rocket", "swal"][0] == losses["rocket", "swal"][1]


@pytest.mark.parametrize(
    "more, classes, words",
    [({"metric": "accuracy"}, ["a", "b"], "metric of top1"), ({"templates": ["a {thing}"]}, ["a", "b"], "templates with one {}"),
     ({}, [3, 4], "no classes by name"), ({}, ["a"], "without a label of one of its 1"),
     ({"metric": "roc_auc"}, ["a", "b", "c"], "roc_auc needs pictures of two classes, and of no more")],
)  # fmt: skip
def test_a_wrong_manifest_is_said_before_training(more, classes, words, tmp_path):
    def make(item):
        return str(item[1]), "png", png(Image.new("RGB", (8, 8))), {"label": item[1]}

    prepare(tmp_path / "e", {"val": [("val", 0), ("val", 1)]}, make, classes=classes, **more)
    with pytest.raises(ValueError, match=re.escape(words)):
        M.open_data(replace(SMOKE, eval_data=str(tmp_path / "e")))


def test_the_best_weights_are_kept_beside_the_last(tmp_path):
    M.train(replace(SMOKE, recipe="plain", extra="none", eval_every=2, out_dir=str(tmp_path)))
    with safe_open(tmp_path / "best.safetensors", "pt") as f:
        meta = json.loads(f.metadata()["meta"])
    scores = [x for x in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if "zero_shot" in x]
    assert meta["score"] == max(x["zero_shot"] for x in scores) and len(scores) > 1


def test_t14_zero_shot_weights():
    cfg = SMOKE

    def tok(texts, length):
        return torch.tensor([[int(t.split()[-1])] for t in texts])

    prompts = [[f"a {c}", f"the {c}"] for c in range(4)]
    w = M.class_weights(Fake(), tok, prompts, cfg, "cpu")
    images = Fake().embed("img", torch.eye(6)[:4], cfg.ensemble)
    for head in ("z", "h", "both"):
        assert ((images[head] @ w[head].T).argmax(1) == torch.arange(4)).all()
    again = M.class_weights(Fake(), tok, [p + p for p in prompts], cfg, "cpu")
    assert all(torch.equal(w[k], again[k]) for k in w)  # a class listed twice changes nothing


def test_the_joined_vector_is_the_score_ensemble():
    _, model, (images, captions), _, _ = setup()
    model.eval()
    for w in (0.3, 1.0):
        i, t = model.embed("img", images[0], w), model.embed("txt", captions[0], w)
        torch.testing.assert_close(i["both"] @ t["both"].T, w * i["z"] @ t["z"].T + (1 - w) * i["h"] @ t["h"].T)
        torch.testing.assert_close(i["both"].norm(dim=-1), torch.ones(len(images[0])))


# The run ---------------------------------------------------------------------------------------------------------------------


def test_thirty_steps_on_one_batch_overfit():
    cfg, model, (images, captions), _, _ = setup("plain", lr=3e-3)
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss, _ = M.method_loss(model, None, images, captions, "none", M.RECIPES["plain"], cfg)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_run_is_deterministic_and_resumes_exactly(tmp_path, capsys):
    cfg = replace(SMOKE, recipe="rocket", extra="byol")
    whole = M.train(replace(cfg, out_dir=str(tmp_path / "a")))
    again = M.train(replace(cfg, out_dir=str(tmp_path / "b"), workers=1))
    assert whole == again and all(math.isfinite(v) for v in whole.values())
    lines = [json.loads(x) for x in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    rates = {x["step"]: x["lr"] for x in lines if "lr" in x}
    want = {s: optim.warmup_cosine(s, cfg.steps, cfg.warmup, cfg.lr, 1e-6, 1e-5) for s in rates}
    assert rates == pytest.approx(want) and len(rates) > 2

    (tmp_path / "c").mkdir()
    original = ddp.interrupted
    try:
        calls = itertools.count()
        ddp.interrupted = lambda due: next(calls) == 5
        with pytest.raises(KeyboardInterrupt):
            M.train(replace(cfg, out_dir=str(tmp_path / "c")))
    finally:
        ddp.interrupted = original
    assert torch.load(tmp_path / "c" / "last.pt", weights_only=True)["step"] == 6
    assert M.train(replace(cfg, out_dir=str(tmp_path / "c"))) == whole
    names = ("model.safetensors", "merges.txt")
    assert all((tmp_path / d / n).read_bytes() == (tmp_path / "a" / n).read_bytes() for d in "bc" for n in names)


@pytest.mark.hard  # five kills of each script are in test_hard.py
def test_kill_minus_nine_and_start_again_gives_the_same_bytes(tmp_path):
    args = [sys.executable, "methods/clip_recipe.py", "--preset", "smoke", "--recipe", "rocket", "--extra", "none", "--steps", "60",
            "--save_every", "5"]  # fmt: skip
    whole = tmp_path / "a"
    subprocess.run([*args, "--out_dir", whole], cwd=ROOT, check=True, capture_output=True)
    killed = tmp_path / "b"
    for wait in (0.0, 0.7):
        p = subprocess.Popen([*args, "--out_dir", killed], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        last = killed / "rocket_none" / "last.pt"
        deadline = time.monotonic() + 120
        while not last.exists() and time.monotonic() < deadline and p.poll() is None:
            time.sleep(0.05)
        time.sleep(wait)
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert not (killed / "metrics.json").exists()
    subprocess.run([*args, "--out_dir", killed], cwd=ROOT, check=True, capture_output=True)
    name = "rocket_none/model.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((killed / "metrics.json").read_text()) == json.loads((whole / "metrics.json").read_text())


@pytest.mark.parametrize("sig,code", [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_ctrl_c_saves_and_leaves(tmp_path, sig, code):
    p = subprocess.Popen([sys.executable, "methods/clip_recipe.py", "--preset", "smoke", "--steps", "5000", "--save_every", "100000",
                          "--out_dir", tmp_path], cwd=ROOT, stderr=subprocess.PIPE, text=True)  # fmt: skip
    log = tmp_path / "plain_none" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.1)
    p.send_signal(sig)
    err = p.communicate(timeout=120)[1]
    assert p.returncode == code and "Traceback" not in err
    assert torch.load(tmp_path / "plain_none" / "last.pt", weights_only=True)["step"] > 2


def test_smoke_in_all_three_ways(tmp_path):
    began = time.monotonic()
    direct = run("methods/clip_recipe.py", "--preset", "smoke", "--out_dir", tmp_path / "a")
    assert direct.returncode == 0, direct.stderr
    assert time.monotonic() - began < 60
    assert "claim" in direct.stdout and "paper" in direct.stdout
    module = run("-m", "methods.clip_recipe", "--preset", "smoke", "--recipe", "plain", "--extra", "none", "--out_dir",
                 tmp_path / "b")  # fmt: skip
    assert module.returncode == 0, module.stderr
    assert (tmp_path / "a/plain_none/metrics.json").read_bytes() == (tmp_path / "b/plain_none/metrics.json").read_bytes()
    small = ["--preset", "smoke", "--text_drop", 0, "--recipe", "rocket"]
    two = torchrun(2, "methods/clip_recipe.py", *small, "--out_dir", tmp_path / "c")
    assert two.returncode == 0, two.stderr
    assert inside(M, *small, "--out_dir", tmp_path / "d").returncode == 0
    for arm in ("rocket_none", "rocket_siam"):
        losses = [
            [json.loads(x)["loss"] for x in (tmp_path / d / arm / "log.jsonl").read_text().splitlines() if '"loss"' in x]
            for d in "cd"
        ]
        assert losses[0][:2] == pytest.approx(losses[1][:2], rel=2e-3)  # one and two processes, the same eight steps
        assert losses[0] == pytest.approx(losses[1], rel=2e-2)  # later, AdamW enlarges the rounding
    arm = tmp_path / "a" / "rocket_none"
    made = {str(p.relative_to(arm)) for p in arm.rglob("*") if p.is_file()}
    assert {"config.json", "log.jsonl", "metrics.json", "curves.png", "last.pt", "model.safetensors", "merges.txt",
            "samples/views.png", "samples/retrieval.png"} <= made  # fmt: skip
    assert (tmp_path / "a" / "curves.png").exists()


def test_help_shows_every_field():
    text = run("methods/clip_recipe.py", "--help").stdout
    assert all(f"--{f}" in text for f in M.Config.__dataclass_fields__)
    assert "the paper" in text and "default" in text


@pytest.mark.parametrize("args,words", [
    (["--recipe", "strange"], ["strange is unknown", "plain", "rocket"]),
    (["--extra", "dino"], ["dino is unknown", "siam"]),
    (["--bogus", "1"], ["--bogus"]),
    (["--data", "/nonexistent/folder"], ["/nonexistent/folder does not exist", "data_prep"]),
    (["--tokenizer", "/nonexistent/merges.txt"], ["/nonexistent/merges.txt"]),
    (["--out_dir", "/proc/nowhere"], ["/proc/nowhere"]),
    (["--backbone", "vgg"], ["vgg is unknown"]),
    (["--dtype", "float8"], ["float8 is unknown"]),
    (["--accum", "3"], ["16", "3"]),
        (["--log_every", "0"], ["--log_every 0 must be at least 1"]),
        (["--text_heads", "3"], ["multiple of 3 heads"]),
    (["--backbone", "vit", "--heads", "5"], ["multiple of 5 heads"]),
])  # fmt: skip
def test_wrong_input_is_one_sentence(args, words, tmp_path):
    base = [] if "--out_dir" in args else ["--out_dir", tmp_path]
    user_error(inside(M, "--preset", "smoke", *base, *args), *words)
    assert not list(tmp_path.rglob("*.pt"))


def test_batch_must_divide(tmp_path):
    r = both(M, "--preset", "smoke", "--batch_size", "15", "--out_dir", tmp_path)
    user_error(r, "batch_size 15 cannot be divided by 2 processes")


def test_changed_settings_do_not_continue_an_old_run(tmp_path):
    base = [M, "--preset", "smoke", "--recipe", "plain", "--extra", "none", "--out_dir", tmp_path]
    assert inside(*base).returncode == 0
    user_error(inside(*base, "--lr", "0.1"), "lr was 0.002 and is now 0.1", "--no-resume")
    assert inside(*base, "--lr", "0.1", "--no-resume").returncode == 0


def test_real_pairs_end_to_end(shared, tmp_path):
    """Flickr8k photographs and Tiny-ImageNet classes through data_prep, a few steps."""
    from data_prep import captions, imagenet

    captions.run(
        captions.Config(str(shared / "flickr8k_1k/captions.csv"), str(shared / "flickr8k_1k/images.zip"), str(tmp_path / "f"))
    )
    imagenet.run(imagenet.Config(str(shared / "tiny_imagenet_20/images.zip"), str(tmp_path / "t"), str(shared / "tiny_imagenet_20/classes.json"),
                                 f"{shared}/clip/class_prompts.json:ImageNet", splits="val"))  # fmt: skip
    args = ["--preset", "flickr8k", "--data", tmp_path / "f", "--eval_data", tmp_path / "t", "--steps", 2, "--width", 48, "--depth", 1,
            "--tokenizer", shared / "clip/bpe_simple_vocab_16e6.txt.gz", "--out_dir", tmp_path / "r", "--recipe", "rocket"]  # fmt: skip
    done = run("methods/clip_recipe.py", *args)
    assert done.returncode == 0, done.stderr
    m = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert 0 <= m["rocket_none_text_to_image_r10_both"] <= 100 and 0 <= m["rocket_none_classes_both"] <= 100
    assert Path(tmp_path / "r" / "rocket_none" / "samples" / "retrieval.png").exists()


def test_splits_to_evaluate_on_and_batches_beyond_the_data(tmp_path):
    user_error(inside(M, "--preset", "smoke", "--batch_size", "128", "--out_dir", tmp_path / "r"), "64 pairs", "negatives")
    from data_prep import scenes as write

    write.run(write.Config(str(tmp_path / "s"), train=30, val=12, test=0, size=16))
    cfg = M.Config(data=str(tmp_path / "s"), eval_data=str(tmp_path / "s"), image_size=16)
    source, tests, _, _ = M.open_data(cfg)
    assert sum(source.sizes) == 30 and [(sum(t.source.sizes), t.retrieval) for t in tests] == [(12, True), (12, False)]
    write.run(write.Config(str(tmp_path / "t"), train=30, val=0, test=0, size=16))  # as CC3M
    _, tests, _, _ = M.open_data(M.replace(cfg, data=str(tmp_path / "t")))
    assert [t.retrieval for t in tests] == [False]
    with pytest.raises(ValueError, match="no split val or test"):
        M.open_data(M.replace(cfg, data=str(tmp_path / "t"), eval_data=""))


# By hand ---------------------------------------------------------------------------------------------------------------


def test_siamlip_compares_each_prediction_with_the_other_modality():
    p_img, v_img, p_txt, v_txt = (views(3, seed=s) for s in (1, 2, 3, 4))
    cos, pairs = F.cosine_similarity, [(0, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    terms = [(2 - 2 * cos(p_img[a], v_txt[b]).mean() + 2 - 2 * cos(p_txt[b], v_img[a]).mean()) / 2 for a, b in pairs]
    assert M.siam_loss(p_img, v_img, p_txt, v_txt, pairs).item() == pytest.approx(float(np.mean(terms)), abs=1e-5)


def test_swalip_of_one_view_swaps_the_modalities():
    x, y = unit(1, 6, 5), unit(2, 6, 5)
    to_txt, to_img = (-(M.sinkhorn(q).double() * (7.0 * s).log_softmax(1)).sum(1).mean() for s, q in
                      ((x @ y.T, y @ x.T), (y @ x.T, x @ y.T)))  # fmt: skip
    assert M.swap_loss([x], [y], 7.0).item() == pytest.approx(0.2 * (to_txt + to_img).item() / 2, abs=1e-5)


def made_up(A, seed):
    """What Rocket gives, without networks."""
    out = {"scales": (torch.tensor(14.0), torch.tensor(9.0))}
    for i, m in enumerate(("img", "txt")):
        out[f"z_{m}"], out[f"h_{m}"] = unit(seed + i, 6, 5), views(A, seed=seed + 2 + i)
        out[f"v_{m}"], out[f"p_{m}"] = views(1 + A, seed=seed + 4 + i), views(1 + A, seed=seed + 6 + i)
    return lambda images, captions: out


@pytest.mark.parametrize("A", [0, 2])
@pytest.mark.parametrize("loss_sum", [False, True])
def test_each_added_loss_has_its_own_inputs_and_the_sum_is_of_the_recipe_alone(A, loss_sum):
    model, teacher, cfg = made_up(A, 10), made_up(A, 60), replace(SMOKE, smoothing=0.1, loss_sum=loss_sum)
    recipe, out, old = M.Recipe(views=A, smooth=True), model(0, 0), teacher(0, 0)
    z, h, images = (out["z_img"], out["z_txt"]), (out["h_img"], out["h_txt"]), [torch.zeros(6, 3, 2, 2)]
    views_ = h if A else ([z[0]], [z[1]])
    pairs = M.view_pairs(A)
    added = {"none": 0.0, "siam": M.siam_loss(out["p_img"], out["v_img"], out["p_txt"], out["v_txt"], pairs),
             "byol": M.siam_loss(out["p_img"], old["v_img"], out["p_txt"], old["v_txt"], pairs),
             "bar": M.barlow_loss(out["v_img"], out["v_txt"], pairs), "swal": M.swap_loss(*views_, 9.0)}  # fmt: skip
    for extra, more in added.items():
        base = M.rocket_loss(z, h, 14.0, 9.0, 0.0 if extra == "swal" else 0.1)[0]
        loss, parts = M.method_loss(model, teacher, images, None, extra, recipe, cfg)
        assert loss.item() == pytest.approx((1 + loss_sum) * float(base) + float(more), abs=1e-6), extra
        assert float(parts.get("extra", 0.0)) == pytest.approx(float(more), abs=1e-6)


def test_the_released_gather_has_no_gradient_over_processes(monkeypatch):
    x, used = torch.randn(2, 3, requires_grad=True), []
    assert M.gather_no_grad(x) is x
    monkeypatch.setattr(M.ddp, "world_size", lambda: 2)
    monkeypatch.setattr(M.ddp, "gather_rows", lambda x: torch.cat([x, x]))
    assert torch.equal(M.gather_no_grad(x), torch.cat([x, x])) and not M.gather_no_grad(x).requires_grad
    monkeypatch.setattr(M, "rocket_loss", lambda *args: used.append(args[-1]) or (torch.tensor(0.0), {}))
    for how in ("grad", "no_grad"):
        M.method_loss(made_up(2, 0), None, [torch.zeros(1)], None, "none", M.RECIPES["rocket"], replace(SMOKE, gather=how))
    assert used == [M.ddp.gather_rows, M.gather_no_grad]


def test_heads_are_the_released_ones(monkeypatch):
    mlp, cfg, asked = M.mlp, replace(SMOKE, width=8, extra_hidden=0, extra_dim=0, text_drop=0.3), []
    kinds = [type(m) for m in mlp(5, 6, 7)]
    assert kinds == [torch.nn.Linear, torch.nn.BatchNorm1d, torch.nn.ReLU, torch.nn.Linear]
    for affine in (True, False):
        first, *_, last = mlp(5, 6, 7, last_bn=affine, bias=affine)
        assert isinstance(last, torch.nn.BatchNorm1d) and last.affine == affine == (first.bias is not None)
    monkeypatch.setattr(M, "mlp", lambda *dims, **kw: asked.append((dims[1:], kw)) or torch.nn.Identity())
    model = M.Rocket(cfg, M.RECIPES["plain"], "siam", 300)
    assert asked == [((2048, 128), dict(last_bn=False, bias=False))] * 2
    first, _, _, last = model.p["img"]
    assert (first.in_features, first.out_features, first.bias) == (128, 2048, None)
    assert last.out_features == 128 and last.bias is not None
    asked.clear()
    M.Rocket(cfg, M.RECIPES["plain"], "bar", 300)
    assert asked == [((3000, 3000, 8192), dict(last_bn=True))] * 2
    for name, drop in (("plain", 0.0), ("smooth", 0.0), ("rocket", 0.3)):
        model = M.Rocket(cfg, M.RECIPES[name], "none", 300)
        assert model.drop == drop
        for head, width in ((model.z["img"], 32), (model.z["txt"], cfg.text_width)):
            assert head.bias is None and head.weight.std().item() == pytest.approx(width**-0.5, rel=0.1)


def test_inference_has_the_heads_of_training():
    torch.manual_seed(0)
    model = M.Rocket(replace(SMOKE, width=8), M.RECIPES["rocket"], "none", 300).eval()
    images, ids = [torch.randn(3, 3, 24, 24) for _ in range(2)], [torch.randint(1, 300, (3, 8)) for _ in range(2)]
    out = model(images, ids)
    for tower, x in (("img", images), ("txt", ids)):
        torch.testing.assert_close(model.embed(tower, x[0], 0.5)["z"], out[f"z_{tower}"])
        torch.testing.assert_close(model.embed(tower, x[1], 0.5)["h"], out[f"h_{tower}"][0])


def test_weak_captions_lose_stop_words_and_strong_ones_are_edited_besides(monkeypatch):
    monkeypatch.setattr(A, "drop_stop_words", lambda text, rng, p: f"{text} {p}")
    monkeypatch.setattr(A, "edit_caption", lambda text, rng, synonyms: f"{text} {synonyms}")
    sample = {"key": "0", "image": Image.new("RGB", (40, 30)), "captions": ["a cat"]}
    for name, want in (("rocket", ["a cat 0.7", "a cat 0.7 S", "a cat 0.7 S"]), ("mlp", ["a cat"] * 3), ("plain", ["a cat"])):
        v = M.Views(replace(SMOKE, p_stop=0.7), M.RECIPES[name], None, "S")
        assert v(sample, np.random.default_rng(0))[2] == want


def test_colours_of_strong_views_and_the_arm_with_either_view(monkeypatch):
    cfg, crop, areas = replace(SMOKE, image_size=32, strong_size=56), A.crop_box, []
    blur = pytest.approx((0.025, 0.5))  # of 56 pixels; the paper's 0.1 to 2 are of 224
    light, full = (M.Views(replace(cfg, jitter=how), M.RECIPES["rocket"], None, {}).strong for how in ("light", "full"))
    assert (light.jitter, light.grey_p, light.blur) == ((0.4, 0.4, 0.4, 0.0), 0.0, blur)
    assert (full.jitter, full.grey_p, full.blur) == ((0.4, 0.4, 0.4, 0.1), 0.2, blur)
    monkeypatch.setattr(A, "crop_box", lambda w, h, scale, rng: areas.append(scale) or crop(w, h, scale, rng))
    sample, v = (
        {"key": "0", "image": Image.new("RGB", (40, 30)), "captions": ["a"]},
        M.Views(cfg, M.RECIPES["either"], None, {}),
    )
    made = [v(sample, np.random.default_rng(i)) for i in range(200)]
    assert all(len(texts) == 1 and crops[0].shape == (32, 32, 3) for crops, _, texts in made)
    strong = [scale == (cfg.strong_scale, 1.0) for scale in areas]
    assert set(areas) == {(0.5, 1.0), (cfg.strong_scale, 1.0)} and 0.35 < np.mean(strong) < 0.65
    plain = [rows[0][:4].tolist() == [1, 1, 1, 0] and not rows[0][8:].any() for _, rows, _ in made]
    assert all(plain[i] for i in range(200) if not strong[i]) and not all(plain)


def test_colours_are_applied_to_a_batch_before_it_is_normalised():
    x = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    rows = torch.tensor([[1.0, 1, 1, 0, 0, 1, 2, 3, 0, 0, 0, 1]] * 2)  # a flip
    (image,), (ids,) = M.to_device(([x], [rows], [torch.ones(2, 3)]), "cpu")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(image, ((x.permute(0, 3, 1, 2) / 255 - mean) / std).flip(-1))
    assert ids.shape == (2, 3)


def test_training_pairs_repeat_a_description_as_late_as_possible():
    source = M.pairs_of_scenes(60, 0, 16, "train")
    assert len({(t.shape, t.colour, t.texture) for s in source.scenes for t in s.things}) == 60 == sum(source.sizes)
    assert np.array_equal(source.images, M.scenes.render(source.scenes, 16))
    for s, texts in zip(source.scenes, source.texts):
        assert len(s.things) == 1 and texts[0] == M.scenes.caption(s, brief=True)


def test_labels_of_generated_tests_fit_the_prompts_of_their_class():
    (test,) = M.scene_tests(8)
    for i in range(300):
        t, labels = test.source.scenes[i].things[0], test.source.record(0, i)["labels"]
        said = {"shape": t.shape, "colour": t.colour, "texture": t.texture, "colour and shape": f"{t.colour} {t.shape}"}
        assert set(said) == set(test.tasks)
        for task, words in said.items():
            prompts = test.tasks[task][labels[task]]
            named = (
                [words in p for p in prompts] if words != "solid" else [not re.search("striped|spotted", p) for p in prompts]
            )
            assert all(named), (task, words, prompts)
    assert [len(v) for v in test.tasks["shape"]] == [3 * 8] * 9 and [len(v) for v in test.tasks["texture"]] == [8 * 9] * 3


def test_classes_are_asked_for_by_all_synonyms_and_templates(tmp_path, monkeypatch):
    def make(item):
        return str(item[1]), "png", png(Image.new("RGB", (8, 8))), {"label": item[1]}

    prepare(tmp_path / "e", {"val": [("val", 0), ("val", 1)]}, make, classes=["king penguin, bird", "cat"], metric="mean_per_class",
            templates=["a {}.", "the {}."])  # fmt: skip
    prepare(tmp_path / "f", {"val": [("val", 0)]}, make, classes=["cat"])
    monkeypatch.setattr(M, "pairs_of_scenes", lambda *args: SimpleNamespace(captions=lambda: ["a"]))
    monkeypatch.setattr(M, "scene_tests", lambda size: [])
    monkeypatch.setattr(M.Tokenizer, "train", lambda texts, size: None)
    _, (test,), _, synonyms = M.open_data(replace(SMOKE, eval_data=str(tmp_path / "e")))
    assert test.tasks == {"classes": [["a king penguin.", "the king penguin.", "a bird.", "the bird."], ["a cat.", "the cat."]]}
    assert test.metric == "mean_per_class" and not test.retrieval and synonyms is M.scenes.SYNONYMS
    _, (test,), _, _ = M.open_data(replace(SMOKE, eval_data=str(tmp_path / "f")))
    assert test.tasks == {"classes": [["a photo of a cat."]]} and test.metric == "top1"


def test_metrics_of_classes_by_hand():
    scores, y = torch.tensor([[2.0, 1.0], [3.0, 1.0], [1.0, 4.0], [5.0, 0.0]]), torch.tensor([0, 0, 0, 1])
    assert M.METRICS["top1"](scores, y) == 50
    assert M.METRICS["mean_per_class"](scores, y) == pytest.approx(100 / 3)  # 2 of 3, 0 of 1
    assert M.METRICS["roc_auc"](torch.tensor([[0.0, 3.0], [5.0, 6.0], [0.0, 2.0]]), torch.tensor([1, 0, 0])) == 100


def test_class_weights_are_unit_means_of_unit_prompts():
    class Two(torch.nn.Module):
        def embed(self, tower, x, w):
            z = F.one_hot(x[:, 0].long(), 3).float()
            return {"z": z, "h": z.flip(-1), "both": torch.cat([math.sqrt(w) * z, math.sqrt(1 - w) * z.flip(-1)], -1)}

    def tok(texts, length):
        return torch.tensor([[int(t)] for t in texts])

    w = M.class_weights(Two(), tok, [["0", "1", "0"], ["2"]], replace(SMOKE, ensemble=0.36), "cpu")
    z = torch.tensor([[0.5**0.5, 0.5**0.5, 0.0], [0.0, 0.0, 1.0]])  # a prompt counts once
    torch.testing.assert_close(w["z"], z)
    torch.testing.assert_close(w["both"], torch.cat([0.6 * z, 0.8 * z.flip(-1)], 1))


def test_the_report_of_an_evaluation_is_of_both_heads_and_both_ways(monkeypatch):
    model, y = torch.nn.Linear(1, 1), [0, 0, 0, 1]
    records = [{"captions": c, "labels": {"a b": label}} for c, label in zip((["p", "q"], ["r"], ["s"], ["t"]), y)]
    eye = torch.eye(4)

    def images(model, *args):
        assert not model.training
        return {"z": eye, "both": eye}, records

    # three captions find their picture, q and t find the first one and the third; of four pictures only the last finds a wrong caption
    texts = torch.stack([eye[0], 0.5 * eye[1], eye[1], eye[2], 2 * eye[2]])
    monkeypatch.setattr(M, "embed_images", images)
    monkeypatch.setattr(M, "embed_texts", lambda *args: {"z": texts[[0, 0, 2, 3, 3]], "both": texts})
    head = torch.zeros(2, 4)
    head[0] = 1.0  # all are of the first class
    monkeypatch.setattr(M, "class_weights", lambda *args: {"z": head, "both": torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 1]])})
    out = M.evaluate(model, [M.Test(None, {"a b": []}, True, "mean_per_class")], None, SMOKE, ENV)
    assert model.training and out["zero_shot"] == out["a_b_both"] == 100 and out["a_b_z"] == 50
    scores, match = texts @ eye.T, torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bool()
    for name, s, m in (("text_to_image", scores, match), ("image_to_text", scores.T, match.T)):
        best = [max(s[i][m[i]]) > max(s[i][~m[i]]) for i in range(len(s))]
        assert out[f"{name}_r1_both"] == pytest.approx(100 * float(np.mean(best)))
    assert out["text_to_image_r1_both"] == pytest.approx(60) and out["image_to_text_r1_both"] == pytest.approx(50)
    assert out["retrieval"] == pytest.approx(55)


def test_test_pictures_are_cropped_in_the_middle_and_come_in_the_order_of_their_keys():
    def picture(level):
        x = np.zeros((10, 30, 3), np.uint8)
        x[:, 10:20] = level  # the central square
        return Image.fromarray(x)

    source = M.data.Table(key=["c", "a", "b"], image=[picture(v) for v in (30, 10, 20)], captions=[["x"], ["y"], []])
    model = SimpleNamespace(embed=lambda tower, x, w: {"z": x[:, :, 2, 2]})
    for retrieval, keys, levels in ((False, ["a", "b", "c"], [10, 20, 30]), (True, ["a", "c"], [10, 30])):
        f, records = M.embed_images(model, M.Test(source, {}, retrieval), replace(SMOKE, image_size=5), ENV)
        assert [r["key"] for r in records] == keys and not any("image" in r for r in records)
        torch.testing.assert_close(f["z"][:, 0], (torch.tensor(levels) / 255 - 0.485) / 0.229)


def test_options_of_the_optimiser_and_of_a_resumed_order_are_used(tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    seen, Batches, AdamW, clip = {}, M.data.Batches, torch.optim.AdamW, torch.nn.utils.clip_grad_norm_
    source = M.pairs_of_scenes(16, 0, 16, "train")
    monkeypatch.setattr(M, "open_data", lambda cfg: (source, [], M.Tokenizer.train(source.captions(), 600), {}))
    monkeypatch.setattr(M.ckpt, "resume", lambda *args, **kw: (3, {}))
    monkeypatch.setattr(M, "method_loss", lambda model, *args: (sum(p.square().sum() for p in model.parameters()), {}))

    def batches(source, make, collate, size, env, seed, start, *more):
        seen["order"] = size, start
        return Batches(source, make, collate, size, env, seed, start, *more)

    def adamw(groups, lr, betas, eps, **kw):
        seen["adamw"] = [g["weight_decay"] for g in groups], lr, betas, eps
        return AdamW(groups, lr, betas, eps, **kw)

    def clipped(parameters, most):
        parameters = list(parameters)
        seen["clip"] = most, clip(parameters, math.inf).item(), 2 * sum(p.square().sum() for p in parameters).sqrt().item()
        raise Enough

    monkeypatch.setattr(M.data, "Batches", batches)
    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    monkeypatch.setattr(M.nn.utils, "clip_grad_norm_", clipped)
    cfg = replace(
        SMOKE, recipe="plain", extra="none", batch_size=8, accum=2, wd=0.3, lr=0.01, image_size=16, out_dir=str(tmp_path)
    )
    for most, want in ((0.7, 0.7), (0.0, math.inf)):
        with pytest.raises(Enough):
            M.train(replace(cfg, grad_clip=most))
        assert seen["order"] == (4, 6) and seen["adamw"] == ([0.3, 0.0], 0.01, (0.9, 0.98), 1e-8)
        assert seen["clip"][0] == want and seen["clip"][1] == pytest.approx(
            seen["clip"][2], rel=1e-4
        )  # a mean over micro-batches


def test_the_table_of_claims_has_the_right_signs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(M, "history", lambda *args: {"weak": ([0], [1.0])})
    monkeypatch.setattr(M.plot, "lines", lambda *args: None)
    monkeypatch.setattr(M.plot, "save", lambda *args: None)
    scores = {("plain", "none"): 50, ("rocket", "none"): 55, ("plain", "siam"): 52, ("rocket", "siam"): 54, ("plain", "bar"): 56,
              ("rocket", "bar"): 50}  # fmt: skip
    M.report(SMOKE, ["plain", "rocket"], ["none", "siam", "bar"], {k: {"zero_shot": float(v)} for k, v in scores.items()})
    rows = {line.split("  ")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    for name, words in (("the recipe lifts plain CLIP", ["50.0", "55.0", "+5.0 (+10 %)"]),
                        ("added losses help the plain recipe", ["50.0", "54.0", "+4.0"]),
                        ("... and no longer help the strong one", ["55.0", "52.0", "-3.0"])):  # fmt: skip
        assert all(w in rows[name] for w in words), rows[name]
