"""methods/vlm.py: the losses of four families, masks, causality, generation, frozen weights, the benchmarks' definitions, two
processes, resume, wrong input."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import ddp, scenes
from data_prep import captions as prep
from methods import vlm as M
from tests.helpers import ROOT, in_processes, inside, run, torchrun, user_error

CFG = M.Config(**M.PRESETS["smoke"])
ENV = ddp.Env(0, 1, torch.device("cpu"))


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


@pytest.fixture(scope="module")
def world():
    pairs = M.generated(64, 0, CFG)
    return pairs, M.make_tokenizer(pairs, CFG)


def model_of(arm, tok, seed=0, cfg=CFG):
    torch.manual_seed(seed)
    if arm in ("mask", "mask+boxes"):
        model = M.Masked(cfg, tok, arm == "mask+boxes")
        model.codebook.normal_()
    elif arm == "coca":
        model = M.CoCa(cfg, tok)
    elif arm == "frozen":
        model = M.Frozen(cfg, M.Vision(cfg), M.LM(cfg, tok).stack)
    else:
        model = M.Contrastive(cfg, tok, arm)
    return model.eval()


def batch_of(world, arm, count=8, micro=0, cfg=CFG):
    pairs, tok = world
    part = {k: v[:count] for k, v in pairs.pictures.items()}
    return M.make_batch(pairs, part, arm, tok, cfg, micro, 0, "cpu")


# Contrastive ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N, chance, start", [(8, 2.0794, 10.0004), (64, 4.1589, 10.0029), (256, 5.5452, 10.0116)])
def test_losses_of_constant_and_of_orthogonal_embeddings(N, chance, start):
    same = torch.ones(N, 4, dtype=torch.float64) / 2
    assert M.infonce(same, same, 14.0).item() == pytest.approx(chance, abs=1e-4)
    logits = 10 * torch.eye(N, dtype=torch.float64) * 0 - 10  # u.v = 0 for all pairs, the bias alone
    assert M.siglip_loss(logits).item() == pytest.approx(start, abs=1e-4)
    assert M.siglip_loss(torch.zeros(N, N)).item() == pytest.approx(N * math.log(2), rel=1e-5)


def test_contrastive_losses_equal_loops_and_do_not_see_the_order():
    u, v, order = unit(6, 5, seed=1), unit(6, 5, seed=2), torch.randperm(6)
    s = 3 * u @ v.T
    want = -sum((s[i, i] - s[i].logsumexp(0)) + (s[i, i] - s[:, i].logsumexp(0)) for i in range(6)) / 12
    torch.testing.assert_close(M.infonce(u, v, 3.0), want)
    torch.testing.assert_close(M.infonce(u[order], v[order], 3.0), want)
    slow = -sum(F.logsigmoid(s[i, j] if i == j else -s[i, j]) for i in range(6) for j in range(6)) / 6
    torch.testing.assert_close(M.siglip_loss(s), slow)
    torch.testing.assert_close(M.siglip_loss(s[order][:, order]), slow)
    torch.testing.assert_close(M.siglip_loss(s[2:4], 2) + M.siglip_loss(s[:2]) + M.siglip_loss(s[4:], 4), 3 * slow)


def test_hard_negatives_are_columns_for_pictures_only():
    u, v, n = unit(4, 5, seed=1), unit(4, 5, seed=2), unit(4, 5, seed=3).requires_grad_()
    plain, hard = M.infonce(u, v, 3.0), M.infonce(u, v, 3.0, n)
    assert hard > plain
    rows = torch.cat([3 * u @ v.T, 3 * u @ n.T], 1)
    label = torch.arange(4)
    torch.testing.assert_close(hard, (F.cross_entropy(rows, label) + F.cross_entropy(3 * v @ u.T, label)) / 2)
    hard.backward()  # a negative is pushed away from every picture, never drawn to one
    torch.testing.assert_close(n.grad, 3 * rows.softmax(1)[:, 4:].T @ u / 8)


def test_llip_equals_loops_and_one_token_is_siglip():
    t, k, f, q = torch.randn(3, 4, 5), torch.randn(3, 4, 2), unit(6, 5).float(), torch.randn(6, 2)
    got = M.llip_scores(t, k, f, q)
    for i in range(3):
        for j in range(6):
            w = torch.stack([(q[j] * k[i, m]).sum() for m in range(4)]).softmax(0)
            u = sum(w[m] * t[i, m] for m in range(4))
            assert got[i, j].item() == pytest.approx((F.normalize(u, dim=0) * f[j]).sum().item(), abs=1e-5)
    torch.testing.assert_close(M.llip_scores(t[:, :1], k[:, :1], f, q), F.normalize(t[:, 0], dim=1) @ f.T)


# Masking -------------------------------------------------------------------------------------------------------------------


def test_masked_loss_counts_hidden_places_only_and_is_no_nan():
    logits, target = torch.randn(2, 5, 7), torch.full((2, 5), -100)
    assert M.masked_ce(logits, target).item() == 0
    target[0, 1], target[1, 4] = 3, 6
    first = M.masked_ce(logits, target)
    torch.testing.assert_close(
        first, (F.cross_entropy(logits[0, 1], torch.tensor(3)) + F.cross_entropy(logits[1, 4], torch.tensor(6))) / 2
    )
    logits[0, 0], logits[1, 3] = 99.0, -99.0
    torch.testing.assert_close(M.masked_ce(logits, target), first)


def test_words_are_hidden_by_berts_rule():
    g = torch.Generator().manual_seed(0)
    ids, special = torch.randint(0, 500, (4000, 12), generator=g), torch.zeros(4000, 12, dtype=torch.bool)
    special[:, 0] = special[:, 8:] = True
    noisy, target = M.hide_words(ids, torch.rand(4000, 12, 2, generator=g), 500, special)
    hidden = target != -100
    assert not (hidden & special).any() and hidden.any(1).all() and torch.equal(target[hidden], ids[hidden])
    assert torch.equal(noisy[~hidden], ids[~hidden])
    # 15 % of 7 words, and one where none was drawn
    assert hidden.sum(1).float().mean().item() == pytest.approx(7 * 0.15 + 0.85**7, abs=0.03)
    kinds = noisy[hidden]
    assert (kinds == 500).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (kinds == ids[hidden]).float().mean().item() == pytest.approx(0.1, abs=0.02)
    none = M.hide_words(ids[:2], torch.rand(2, 12, 2), 500, torch.ones(2, 12, dtype=torch.bool))
    assert (none[1] == -100).all()  # nothing can be hidden: no loss, no crash


@pytest.mark.parametrize("side, count", [(4, 6), (14, 75), (8, 64), (2, 1)])
def test_patches_are_hidden_in_blocks_of_an_exact_number(side, count):
    for seed in range(20):
        assert M.hide_patches(side, count, np.random.default_rng(seed)).sum() == count
    grid = np.mean([M.hide_patches(14, 75, np.random.default_rng(s)).reshape(14, 14) for s in range(300)], 0)
    if side == 14:  # blocks: a neighbour of a hidden patch is hidden far more often than chance
        h = M.hide_patches(14, 75, np.random.default_rng(1)).reshape(14, 14)
        assert (h[:, 1:] & h[:, :-1]).sum() / h[:, 1:].sum() > 0.6 and grid.min() > 0  # and none is never hidden


def test_flavas_matching_batch_has_no_true_caption_among_the_wrong_ones(world):
    pairs, tok = world
    for micro in range(10):
        b = batch_of(world, "mask", 32, micro)
        for i, (right, ids) in enumerate(zip(b["right"], b["maybe"])):
            assert right == (tok.decode(ids) in [tok.decode(tok(c)[0]) for c in pairs.captions[i]])
    assert 0.3 < np.mean([batch_of(world, "mask", 32, m)["right"].float().mean() for m in range(10)]) < 0.7


def test_the_masked_model_learns_from_masked_inputs_and_compares_unmasked_ones(world):
    model, b = model_of("mask", world[1]), batch_of(world, "mask")
    _, parts = model(b)
    assert set(parts) == {"mim", "mlm", "mmm_img", "mmm_txt", "gc", "itm", "qa"}
    other = {**b, "hidden": b["hidden"].flip(1), "u": b["u"].flip(0)}
    again = model(other)[1]
    assert torch.equal(parts["gc"], again["gc"]) and torch.equal(parts["itm"], again["itm"])  # nothing masked
    assert not torch.equal(parts["mim"], again["mim"]) and not torch.equal(parts["mlm"], again["mlm"])
    swapped = {**b, "maybe": b["maybe"].flip(0), "right": ~b["right"]}
    again = model(swapped)[1]
    assert all(
        torch.equal(parts[k], again[k]) for k in ("mim", "mlm", "mmm_img", "mmm_txt", "gc")
    )  # MMM ignores ITM's negatives
    codes = model.targets(b["image"], b["hidden"])
    assert ((codes == -100) == ~b["hidden"]).all() and codes.max() < CFG.codes


def test_padding_does_not_change_what_the_masked_model_reads(world):
    model, tok = model_of("mask", world[1]), world[1]
    ids = tok(["a red star"], 12)
    seen = model.see(torch.randn(1, 3, 32, 32))
    short = ids[:, : int(ids.argmax(1)) + 1]
    torch.testing.assert_close(model.match(seen, ids), model.match(seen, short), atol=1e-5, rtol=1e-4)


# Generation ----------------------------------------------------------------------------------------------------------------


def test_causality_and_the_shift_of_captions(world):
    tok = world[1]
    for arm in ("coca", "frozen"):
        model = model_of(arm, tok)
        seen = model.see(torch.randn(2, 3, 32, 32))
        ids = torch.randint(1, 400, (2, 9))
        logits = model.logits(seen, ids)
        changed = ids.clone()
        changed[:, 5] = 7
        other = model.logits(seen, changed)
        torch.testing.assert_close(logits[:, :5], other[:, :5], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(logits[:, 5:], other[:, 5:], atol=1e-5)
    counted = torch.tensor([[False, False, True, True]])
    ids, logits = torch.tensor([[1, 2, 3, 4]]), torch.randn(1, 4, 6)
    want = -(logits[0, 1].log_softmax(0)[3] + logits[0, 2].log_softmax(0)[4]) / 2
    torch.testing.assert_close(M.caption_loss(logits, ids, counted), want)
    torch.testing.assert_close(M.log_p(logits, ids, counted)[0], -want)


def test_cocas_lower_half_sees_no_picture_and_its_class_token_no_padding(world):
    tok, model = world[1], model_of("coca", world[1])
    ids = tok(["a red star", "a blue ring above a green heart"], 14)
    f, words = model.caption_embedding(ids)
    longer = torch.cat([ids, torch.zeros(2, 6, dtype=torch.long)], 1)
    torch.testing.assert_close(model.caption_embedding(longer)[0], f, atol=1e-5, rtol=1e-5)
    assert words.shape == (2, 14, CFG.width)
    seen = model.see(torch.randn(2, 3, 32, 32))
    assert not torch.allclose(model.logits(seen, ids), model.logits(seen.flip(0), ids), atol=1e-5)  # the upper half does see it
    loss, parts = model(batch_of(world, "coca"))
    torch.testing.assert_close(loss, parts["contrastive"] + CFG.lam_cap * (parts["caption"] + parts["qa"]))


@pytest.mark.parametrize("arm", ["coca", "frozen"])
def test_generation_with_a_cache_equals_generation_without(world, arm):
    tok, model = world[1], model_of(arm, world[1])
    seen = model.see(torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3)))
    prompt = tok(["what do you see?"] * 5, 12)[:, :5]
    got = M.generate(model, seen, prompt, tok.end, 10)
    ids = prompt
    for _ in range(10):
        ids = torch.cat([ids, model.logits(seen, ids)[:, -1:].argmax(2)], 1)
    for row, slow in zip(got, ids[:, 5:].tolist()):
        slow = slow[: slow.index(tok.end)] if tok.end in slow else slow
        assert row == slow
        again = model.logits(seen[:1] * 0 + seen[got.index(row)], torch.tensor([[*prompt[0].tolist(), *row]]))
        assert again[0, 4:-1].argmax(1).tolist() == row  # teacher forcing gives the same words


def test_generation_stops_at_the_end_token(world):
    class Fixed:
        def caches(self):
            return []

        def logits(self, seen, ids, caches, first):
            nxt = {0: 5, 3: 6, 4: world[1].end}.get(first, 9)
            return F.one_hot(torch.full(ids.shape, nxt), 2000).float()

    assert M.generate(Fixed(), None, torch.zeros(2, 3, dtype=torch.long), world[1].end) == [[5, 6], [5, 6]]


def test_examples_in_front_equal_one_long_sequence(world):
    tok, model = world[1], model_of("frozen", world[1])
    seen = model.see(torch.randn(3, 3, 32, 32))
    a, b, q = [tok.start, 5, 6, tok.end], [tok.start, 7, tok.end], torch.tensor([[tok.start, 8, 9]])
    before = model.examples(seen[:2], [a, b])
    assert before[0].shape[1] == 2 * seen.shape[1] + 7 and before[1] == 7
    got = model.logits(seen[2:], q, before=before)
    words = model.stack.embed(torch.tensor([[*a, *b, *q[0].tolist()]]))
    x = torch.cat([seen[:1], words[:, :4], seen[1:2], words[:, 4:7], seen[2:], words[:, 7:]], 1)
    torch.testing.assert_close(got, model.stack.logits(model.stack(x, causal=True))[:, -3:])


# Frozen backbones ------------------------------------------------------------------------------------------------------------


def test_only_the_projector_learns_through_the_frozen_language_model(world):
    tok = world[1]
    model, b = model_of("frozen", tok).train(), batch_of(world, "frozen")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opt = torch.optim.AdamW(M.optim.decay_groups(model, 0.0), 1e-2)
    held = {id(p) for g in opt.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.projector.parameters()}
    losses = []
    for _ in range(15):
        loss, _ = model(b)
        loss.backward()
        assert model.projector[0].weight.grad.abs().sum() > 0
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k]) != k.startswith("projector"), k


def test_the_loss_of_the_frozen_family_counts_answers_only(world):
    pairs, tok = world
    ids, counted = M.rows_of(tok, ["Is there a star?"], ["yes"], 40)
    assert tok.decode(ids[0][counted[0]]) == "yes" and counted.sum() == 2  # the answer and the end
    assert tok.decode(ids[0][: int(ids.argmax(1)) + 1]).endswith("yes")
    with pytest.raises(ValueError, match="no token"):
        M.rows_of(tok, ["Is there a star?"], [""], 40)
    long, flags = M.rows_of(tok, ["a " * 100], ["red"], 12)
    assert long.shape[1] == 12 and flags.any(), "an answer survives a long prompt"


def test_lora_is_the_same_model_at_first_and_when_merged():
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 10)
    x = torch.randn(3, 6)
    before = linear(x).detach()
    lora = M.LoRA(linear, 4)
    assert torch.equal(lora(x), before)
    trained = [p for p in lora.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 4 * (6 + 10) and not linear.weight.requires_grad
    torch.nn.init.normal_(lora.B)
    after = lora(x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(F.linear(x, linear.weight + lora.scale * lora.B @ lora.A, linear.bias), after)


# Benchmarks ------------------------------------------------------------------------------------------------------------------


def test_a_constant_scorer_gets_nothing():
    same = torch.ones(10)
    assert M.prefers(same, same) == (0.0, 1.0)
    assert M.winoground(torch.ones(10, 2, 2)) == (0.0, 0.0, 0.0)
    assert M.recall_at_1(torch.ones(4, 4), torch.eye(4, dtype=torch.bool)) == 0


def test_random_scores_are_at_chance():
    g = torch.Generator().manual_seed(0)
    text, image, group = M.winoground(torch.rand(40_000, 2, 2, generator=g))
    assert (text, image, group) == (
        pytest.approx(0.25, abs=0.01),
        pytest.approx(0.25, abs=0.01),
        pytest.approx(1 / 6, abs=0.01),
    )
    assert M.prefers(torch.rand(40_000, generator=g), torch.rand(40_000, generator=g))[0] == pytest.approx(0.5, abs=0.01)
    perfect = torch.eye(2).expand(3, 2, 2)
    assert M.winoground(perfect) == (1, 1, 1) and M.winoground(1 - perfect) == (0, 0, 0)


def test_vqa_accuracy_of_ten_people():
    for same, want in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        assert M.vqa_accuracy("Red", ["red"] * same + ["blue"] * (10 - same)) == pytest.approx(want)
    assert (
        M.vqa_accuracy("the two.", ["2"]) == 1 and M.vqa_accuracy("none", ["0"]) == 1 and M.vqa_accuracy("red", ["blue"]) == 0
    )


@pytest.mark.parametrize("text, want", [("yes", "yes"), ("No.", "no"), ("not sure", ""), ("nothing", ""), ("Yes, it is", "yes"), ("", ""),
                                        ("a red star", ""), ("no, there is none", "no"), ("know", ""), ("noyes", "")])  # fmt: skip
def test_yes_or_no(text, want):
    assert M.yes_or_no(text) == want


@torch.no_grad()
@pytest.mark.parametrize("arm", ["coca", "mask", "frozen"])
def test_questions_are_answered_by_the_likelier_candidate(world, arm):
    """Yes or no by their probabilities, one candidate after the other; equal ones are no answer."""
    tok, model = world[1], model_of(arm, world[1])
    score = M.Scorer(model, tok, CFG, torch.device("cpu"))
    seen = model.see(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4)))
    texts, options = (
        ["Is there a star?", "What colour is the moon?", "Is it red?"],
        [("yes", "no"), ("red", "blue", "green"), ("no", "no")],
    )
    best, sure = score.answers(seen, texts, options)
    for i in range(2):
        total = []
        for word in options[i]:
            ids, counted = M.rows_of(tok, [texts[i]], [word], CFG.context)
            if arm == "mask":
                counted &= ids < model.mask_id - 2  # the end is no word
                given = model.cloze(seen[i : i + 1], ids, counted)[0].log_softmax(1)
            else:
                given = model.logits(seen[i : i + 1], ids)[0].log_softmax(1).roll(1, 0)  # of each word, before it
            total.append(sum(given[j, ids[0, j]].item() for j in range(ids.shape[1]) if counted[0, j]))
        p = torch.tensor(total).softmax(0)
        assert best[i] == int(p.argmax()) and sure[i] == pytest.approx(p.max().item(), rel=1e-4)
    assert best[2] == -1 and sure[2] == pytest.approx(0.5)


def test_pope():
    truth = [True, False] * 50
    always = M.pope_score([True] * 100, truth)
    assert always["accuracy"] == 0.5 and always["precision"] == 0.5 and always["recall"] == 1 and always["yes"] == 1
    assert always["F1"] == pytest.approx(2 / 3)
    objects = [["cat", "dog"], ["cat", "dog"], ["cat", "sofa"], ["bird"], []]
    classes = ["bird", "cat", "dog", "sofa", "tree"]
    for setting in ("random", "popular", "adversarial"):
        asked = M.pope_questions(objects, classes, setting, np.random.default_rng(0))
        assert Counter(t for *_, t in asked) == {True: 7, False: 7}
        assert all((name in objects[i]) == there for i, name, there in asked) and len(set(asked)) == len(asked)
    popular = M.pope_questions(objects, classes, "popular", np.random.default_rng(0))
    assert [n for i, n, t in popular if i == 3 and not t] == ["cat"]
    foe = M.pope_questions([["dog"], *objects], classes, "adversarial", np.random.default_rng(0))
    assert [n for i, n, t in foe if i == 0 and not t] == ["cat"]  # most often beside a dog
    full = M.pope_questions([classes], classes, "random", np.random.default_rng(0))
    assert full == []  # nothing is absent
    assert M.existence("orange") == "Is there an orange?" and M.existence("cat") == "Is there a cat?"


def test_selective_prediction():
    sure, right = [0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1]
    assert M.selective(sure, right, risk=0.0) == (0.5, 0.5)
    assert M.selective(sure, right, risk=0.25) == (1.0, 0.5)  # three right, one wrong
    assert M.selective(sure, [0, 0, 0, 0]) == (0.0, 0.0)
    assert M.selective([0.5] * 4, [1, 0, 0, 0]) == (0.0, 0.0)  # no threshold gives an answer to the first alone


def test_cider():
    a, b, c = "a red star above a ring", "the big dog sleeps on grass", "two birds fly over the sea"
    assert M.cider_d([a, b, c], [[a], [b], [c]]) == pytest.approx(10)
    assert M.cider_d([a], [[a]]) == 0  # one picture: every n-gram is in every picture
    assert M.cider_d([a, a, a], [[a], [a], [a]]) == 0
    assert 0 < M.cider_d([f"{a} {a}", b, c], [[a], [b], [c]]) < 10  # clipping and the length penalty


def test_facts_f1_and_chair():
    s = scenes.Scene(
        (scenes.Thing("star", "red", "large", "striped", 0), scenes.Thing("ring", "blue", "small", "solid", 1)),
        "dark",
        "plain",
        grid=2,
    )
    assert M.facts("a banded scarlet star to the left of a blue hoop") == {
        ("striped", "star"),
        ("red", "star"),
        ("blue", "ring"),
        ("star", "left of", "ring"),
    }
    for v in range(12):
        assert M.facts(scenes.caption(s, v, brief=True)) <= M.true_facts(s)
    perfect = M.attribute_f1([scenes.caption(s, brief=True)], [s])
    assert perfect == 1 and M.attribute_f1(["a red ring"], [s]) == 0
    assert M.attribute_f1(["a red star to the right of a blue ring"], [s]) == pytest.approx(2 * (2 / 3) ** 2 / (4 / 3))
    none = [[], []]
    assert M.chair(["a star", ""], [["star"], ["ring"]], scenes.SHAPES, none) == (0.0, 0.0)
    assert M.chair(["a star and a moon", "a hoop"], [["star"], ["ring"]], scenes.SHAPES, none) == (pytest.approx(1 / 3), 0.5)
    # photographs: the longest name first, every mention counts, people have many names, references say what is there, too
    coco = ["dog", "hot dog", "cat", "person", "dining table"]
    assert M.chair(["a hot dog on a plate"], [["hot dog"]], coco, [[]]) == (0.0, 0.0)
    assert M.chair(["a dog and a dog and a cat"], [["cat"]], coco, [[]]) == (pytest.approx(2 / 3), 1.0)
    assert M.chair(["Two women and a cat."], [["cat"]], coco, [[]]) == (0.5, 1.0)
    assert M.chair(["Two women and a cat."], [["cat"]], coco, [["a man with his cat"]]) == (0.0, 0.0)
    assert M.mentioned("a table, a dining table", coco) == ["dining table"] * 2


class Known(M.Scorer):
    """A scorer that knows each picture's scene and gives right(facts of the text, facts of the scene)."""

    scenes, right = {}, None

    def __init__(self, model, tok, cfg, device):
        self.model, self.blank = model, torch.zeros(1, 1, 3 * cfg.image_size**2)

    def see(self, images):
        return images.flatten(1).float()[:, None]

    def pairs(self, seen, texts, every=False):
        there = [self.scenes.get(x.to(torch.uint8).numpy().tobytes()) for x in seen]
        truth = [M.true_facts(s) if s else set() for s in there]
        s = torch.tensor([[type(self).right(M.facts(t), facts) for t in texts] for facts in truth])
        return {"cosine": s if every else s.diagonal()}


class Nothing(M.Contrastive):
    def __init__(self):
        torch.nn.Module.__init__(self)
        self.heads = ("cosine",)


def test_an_oracle_has_everything_and_a_constant_scorer_nothing(world, monkeypatch):
    render = M.scenes.render

    def remember(some, *args):
        images = render(some, *args)
        Known.scenes |= {x.transpose(2, 0, 1).tobytes(): s for x, s in zip(images, some)}
        return images

    monkeypatch.setattr(M.scenes, "render", remember)
    monkeypatch.setattr(M, "Scorer", Known)
    test = M.generated(24, 1_000_003, CFG)
    scores = {}
    for name, right in {
        "oracle": lambda said, true: len(said & true) / len(said) + len(said & true) / max(10, 10 * len(true)),
        "constant": lambda said, true: 0.5,
    }.items():
        Known.right = staticmethod(right)
        scores[name] = M.evaluate(Nothing(), world[1], test, CFG, ENV)
    tests = ("zero-shot", "zero-shot, unseen pairs", "text to image R@1", "image to text R@1", "replace", "swap", "add",
             "pairs, text", "pairs, image", "pairs, group")  # fmt: skip
    assert {k: scores["oracle"][f"cosine: {k}"] for k in tests} == dict.fromkeys(tests, 100)
    assert {k: scores["constant"][f"cosine: {k}"] for k in tests} == dict.fromkeys(tests, 0)
    for kind in ("replace", "swap", "add"):
        assert scores["constant"][f"cosine: {kind}, ties"] == 100 and scores["oracle"][f"cosine: blind {kind}"] == 0


def test_the_blind_likelihood_is_taken_off_and_boxes_are_scored(world):
    pairs, tok = world
    seen_by = M.Scorer(model_of("coca", tok), tok, CFG, torch.device("cpu"))
    with torch.no_grad():
        seen = seen_by.see(pairs.pictures["image"][:6])
        texts = [pairs.captions[i][0] for i in range(6)]
        got, ids = seen_by.pairs(seen, texts), seen_by.ids(texts)
        before = seen_by.likelihood(seen_by.blank, *ids)
        torch.testing.assert_close(got["likelihood"], seen_by.likelihood(seen, *ids))
        torch.testing.assert_close(got["likelihood - blind"], got["likelihood"] - before)
        assert not torch.allclose(before, got["likelihood"])
        boxes = M.Scorer(model_of("mask+boxes", tok), tok, CFG, torch.device("cpu"))
        found = M.grounding(boxes, pairs.scenes[:8], boxes.see(pairs.pictures["image"][:8]), CFG)
    assert 0 <= found <= 100


def test_what_of_the_frozen_family_is_trained(world):
    _, tok = world
    for how, wanted in (("", set()), ("lora", {"A", "B"}), ("all", None)):
        model = M.Frozen(CFG, M.Vision(CFG), M.LM(CFG, tok).stack, how)
        free = {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("projector")}
        assert not any(n.startswith("vision") for n in free)
        if wanted is None:
            assert free == {f"stack.{n}" for n, _ in model.stack.named_parameters()}
        else:
            assert {n.split(".")[-1] for n in free} == wanted
    images = torch.randn(2, 3, CFG.image_size, CFG.image_size)
    inner = model.vision  # patches of the layer before the last, without the final norm
    x, blocks = inner(images, layers=0), list(inner.blocks)
    for block in blocks[:-1]:
        x = block(x)
    torch.testing.assert_close(model.features(images), x[:, 1:])


def test_filtering_keeps_the_pairs_with_the_highest_scores(world, monkeypatch):
    pairs, tok = world
    good = {some[0] for some in pairs.captions[::2]}
    pairs = M.replace(pairs, noisy=np.array([some[0] not in good for some in pairs.captions]))

    class Sees(Known):
        def see(self, images):
            return images

        def pairs(self, seen, texts):
            return {"cosine": torch.tensor([float(t in good) for t in texts])}

    monkeypatch.setattr(M, "Scorer", Sees)
    monkeypatch.setattr(M, "build", lambda *args: None)
    best, right, chance = M.best_pairs(pairs, tok, M.replace(CFG, batch_size=8, keep=0.5), ENV)
    assert right == 100 and 40 < chance < 60 and not pairs.noisy[best].any()


# Data ------------------------------------------------------------------------------------------------------------------------


def test_questions_are_true_and_balanced():
    pairs, answers, kinds = (
        M.generated(400, 5, replace(CFG, kinds=",".join((*M.scenes.YES_NO, *M.scenes.OPEN)))),
        Counter(),
        Counter(),
    )
    rng = np.random.default_rng(0)
    for row in range(400):
        for _ in range(8):
            q, a, kind = pairs.question(row, rng)
            s = pairs.scenes[row]
            kinds[kind] += 1
            if kind in M.scenes.OPEN:
                assert a in M.scenes.OPEN[kind]
                continue
            answers[a] += 1
            found = [f for o in (s, *[n["scene"] for n in scenes.negatives(s)]) for f in scenes.questions(o) if f["text"] == q]
            if found:
                assert scenes.answer(s, found[0]) == (a == "yes"), (s, q, a)
            else:
                assert a == "no"
    assert abs(answers["yes"] / sum(answers.values()) - 0.5) < 0.05
    assert set(kinds) == {*M.scenes.YES_NO, *M.scenes.OPEN}


def test_wrong_captions_are_true_of_their_own_picture():
    for seed in range(40):
        s = scenes.scene(seed, 3, (2, 2), grid=2)
        for n in M.counterparts(s, seed):
            assert n["caption"] != scenes.caption(s, brief=True) and n["caption"] == scenes.caption(n["scene"], brief=True)
            if n["kind"] != "add_obj":  # three things in a caption: facts() reads relations of two
                assert M.facts(n["caption"]) <= M.true_facts(n["scene"])
            assert not M.facts(n["caption"]) <= M.true_facts(s), (n["kind"], n["caption"], scenes.caption(s, brief=True))
            assert not np.array_equal(*scenes.render([s, n["scene"]], 32))


def test_negatives_are_worded_like_true_captions_and_teach_no_unseen_pair(monkeypatch):
    pairs, told, caption = M.generated(60, 5, CFG), [], scenes.caption

    def spy(s, variant=0, brief=False):
        told.append((s, variant))
        return caption(s, variant, brief)

    monkeypatch.setattr(scenes, "caption", spy)
    plain = 0
    for row in range(60):
        for draw in range(5):
            text = pairs.negative(row, pairs.captions[row][0], np.random.default_rng((row, draw)))
            s, variant = told[-1] if told[-1][0] != pairs.scenes[row] else told[-2]
            assert text == caption(s, variant, True) and text not in pairs.captions[row]
            assert caption(pairs.scenes[row], variant, True) != text  # the difference is named
            assert not any(scenes.held_out(t.shape, t.colour) for t in s.things), text
            plain += variant == 0
    assert 0.1 < plain / 300 < 0.3  # true captions: one in five


def test_training_and_test_pictures_are_disjoint_and_noise_is_known():
    cfg = replace(CFG, pairs=200, noise=0.4)
    train, test, _ = M.open_world(cfg, ENV)
    things = {(t.shape, t.colour, t.size) for s in train.scenes for t in s.things}
    assert not things & {(t.shape, t.colour, t.size) for s in test.scenes for t in s.things}
    clean = M.generated(200, 0, cfg, "train")
    moved = [a != b for a, b in zip(train.captions, clean.captions)]
    assert moved == train.noisy.tolist() and 0.3 < np.mean(moved) < 0.5
    assert all(not scenes.held_out(t.shape, t.colour) for s in train.scenes for t in s.things)


def test_the_draws_of_a_batch_do_not_depend_on_how_it_is_split(world):
    pairs, tok = world
    for arm in ("negclip", "flip", "mask", "frozen", "mask+boxes"):
        whole = batch_of(world, arm)
        part = {k: v[4:8] for k, v in pairs.pictures.items()}
        half = M.make_batch(pairs, part, arm, tok, CFG, 0, 4, "cpu")
        for k, v in half.items():
            if v.ndim:
                n = min(v.shape[1], whole[k].shape[1]) if v.ndim > 1 else None
                assert torch.equal(v[:, :n] if n else v, whole[k][4:8, :n] if n else whole[k][4:8]), (arm, k)


def test_boxes():
    s = scenes.Scene((scenes.Thing("square", "red", "large", "solid", 3),), "dark", "plain", grid=2)
    box = M.box_of(s, 0, 64)
    assert (
        box[0] == pytest.approx(0.75, abs=0.03)
        and box[1] == pytest.approx(0.75, abs=0.03)
        and box[2] == pytest.approx(0.4, abs=0.05)
    )
    torch.testing.assert_close(M.corners(torch.tensor([0.5, 0.5, 0.2, 0.4])), torch.tensor([0.4, 0.3, 0.6, 0.7]))
    b = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    assert M.box_loss(b, b).item() == pytest.approx(0, abs=1e-5) and M.box_loss(b, b + 0.2) > 0.5


# Runs ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["infonce", "siglip", "llip", "negclip", "flip", "mask", "mask+boxes", "coca"])
def test_every_family_overfits_one_batch(world, arm):
    kind = {"negclip": "infonce", "flip": "infonce"}.get(arm, arm)
    model, b = model_of(kind, world[1]).train(), batch_of(world, arm)
    opt, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(40):
        loss, _ = model(b)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses[::10]


FAMILIES = ["infonce", "siglip", "llip", "negclip", "mask", "coca", "frozen"]


def _grads(env):
    pairs, out = M.generated(64, 0, CFG), {}
    tok = M.make_tokenizer(pairs, CFG)
    for arm in FAMILIES:
        model = model_of({"negclip": "infonce"}.get(arm, arm), tok).double()
        b = 8 // env.world
        part = {k: v[:8][env.rank * b : (env.rank + 1) * b] for k, v in pairs.pictures.items()}
        batch = M.make_batch(pairs, part, arm, tok, CFG, 0, env.rank * b, "cpu")
        wrapped = ddp.wrap(model, env)  # it must outlive its forward
        loss, _ = wrapped({k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
        loss.backward()
        out[f"{arm} loss"] = torch.tensor(ddp.mean({"loss": loss})["loss"])
        out |= {f"{arm} {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    return out


def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path):
    two, one = in_processes(2, _grads, path=tmp_path), _grads(ENV)
    for rank in two:
        assert set(rank) == set(one) and len({k.split()[0] for k in one}) == len(FAMILIES)
        for k, want in one.items():
            # logits and cross-entropies of the masked and generative losses are float32, as in training
            torch.testing.assert_close(rank[k], want, atol=2e-6, rtol=1e-4, msg=lambda m, k=k: f"{k}: {m}")


SMALL = ["--preset", "smoke"]


def test_smoke_makes_its_files_and_the_table(tmp_path):
    arms = ["--arms", "infonce,siglip,negclip,mask,coca,frozen"]
    done = inside(M, *SMALL, *arms, "--out_dir", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    for arm in ("infonce", "siglip", "negclip", "mask", "coca", "lm", "frozen"):
        for name in ("config.json", "log.jsonl", "metrics.json", "curves.png", "last.pt", "model.safetensors"):
            assert (tmp_path / "r" / arm / name).exists(), (arm, name)
    assert (tmp_path / "r/coca/samples/answers.png").exists()
    assert all(w in done.stdout for w in ("coca, likelihood - blind", "chance", "VQA blind, yes/no", "attribute F1"))
    flat = json.loads((tmp_path / "r/metrics.json").read_text())
    assert all(isinstance(v, float) for v in flat.values()) and "frozen VQA few-shot, open" in flat
    # before a grey picture "is there a star?" has one answer, though half of the questions about it are of pictures with one
    assert abs(flat["coca POPE blind random accuracy"] - 50) < 30 and "POPE blind adversarial accuracy" in done.stdout
    again = inside(M, *SMALL, *arms, "--out_dir", tmp_path / "r")
    assert again.stdout == done.stdout and "step/s" not in again.stderr  # finished arms are kept
    lora = inside(
        M, *SMALL, "--arms", "frozen+lora", "--lora", 2, "--codes", 8, "--out_dir", tmp_path / "r"
    )  # infonce has no rank
    assert lora.returncode == 0 and "infonce" not in lora.stderr, lora.stderr
    ask = ["--out_dir", tmp_path / "r", "--ask", tmp_path / "r/coca/curves.png", "--question", "Is there a star?"]
    for more, arm in (((), "coca: "), (("--arms", "mask,frozen,coca"), "frozen: ")):  # the first that writes
        asked = inside(M, *SMALL, *ask, *more)
        assert asked.returncode == 0 and asked.stdout.startswith(arm), asked.stderr + asked.stdout


@pytest.mark.hard
@pytest.mark.parametrize("arm", ["frozen+lora"])  # the last of three arms that need each other
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, arm):
    args = [*SMALL, "--arms", arm, "--steps", "8", "--save_every", "2"]
    whole = run("methods/vlm.py", *args, "--out_dir", tmp_path / "a", OMP_NUM_THREADS="1")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "methods/vlm.py", *args, "--out_dir", str(tmp_path / "b")]
    p = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while not (tmp_path / "b" / arm / "last.pt").exists() and p.poll() is None:
        time.sleep(0.02)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    assert not (tmp_path / "b" / arm / "metrics.json").exists()
    assert run("methods/vlm.py", *args, "--out_dir", tmp_path / "b", OMP_NUM_THREADS="1").returncode == 0
    for name in (f"{arm}/model.safetensors", "metrics.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.hard
def test_two_processes_train_the_arms_of_one(tmp_path):
    args = [*SMALL, "--arms", "mask"]
    one = run("methods/vlm.py", *args, "--out_dir", tmp_path / "one", OMP_NUM_THREADS="1")
    two = torchrun(2, "methods/vlm.py", *args, "--out_dir", tmp_path / "two")
    assert one.returncode == two.returncode == 0, two.stderr
    for arm in ("mask",):
        logs = [[json.loads(x) for x in (tmp_path / n / arm / "log.jsonl").read_text().splitlines()] for n in ("one", "two")]
        for a, b in zip(*logs):
            if "loss" in a:
                assert a["loss"] == pytest.approx(b["loss"], rel=2e-4), (arm, a, b)


def test_training_on_pictures_in_shards(tmp_path):
    world = M.generated(40, 3, CFG)
    (tmp_path / "p").mkdir()
    lines = ["image,caption"]
    for i, x in enumerate(world.pictures["image"]):
        Image.fromarray(x.permute(1, 2, 0).numpy()).resize((48, 40)).save(tmp_path / f"p/{i}.png")
        lines += [f"{i}.png,{c}" for c in world.captions[i][:2]]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    prep.run(prep.Config(table=str(tmp_path / "t.csv"), images=str(tmp_path / "p"), out=str(tmp_path / "d"), val=4, test=8))
    done = inside(
        M,
        *SMALL,
        "--data",
        tmp_path / "d",
        "--out_dir",
        tmp_path / "r",
        "--arms",
        "infonce,negclip,mask,coca,frozen",
        "--steps",
        "2",
    )
    assert done.returncode == 0, done.stderr
    flat = json.loads((tmp_path / "r/metrics.json").read_text())
    assert "coca CIDEr-D" in flat and "infonce cosine: text to image R@1" in flat and not any("VQA" in k for k in flat)


@pytest.mark.parametrize("args, words", [
    (["--arms", "clip"], ["clip", "infonce"]),
    (["--noise", "2"], ["noise", "0 to 1"]),
    (["--steps", "0"], ["steps", "1"]),
    (["--patch", "7"], ["patch", "power of two"]),
    (["--data", "/none"], ["/none"]),
    (["--sugarcrepe", "/none.csv", "--arms", "infonce"], ["/none.csv"]),
    (["--ask", "/none.png"], ["/none.png"]),
    (["--batch_size", "9", "--accum", "2"], ["accum"]),
    (["--tokenizer", "/none.txt"], ["/none.txt"]),
    (["--heads", "3"], ["heads"]),
    (["--dtype", "half"], ["dtype", "bfloat16"]),
    (["--kinds", "relation"], ["relation", "another kind"]),
    (["--kinds", "smell"], ["smell", "colour"]),
    (["--shots", "-1"], ["shots", "at least 0"]),
    (["--width", "100"], ["width", "channels"]),
])  # fmt: skip
def test_wrong_input(tmp_path, args, words):
    user_error(inside(M, *SMALL, "--out_dir", tmp_path / "r", *args), *words)


def test_ask_without_a_trained_model(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "p.png")
    user_error(inside(M, *SMALL, "--out_dir", tmp_path / "r", "--ask", tmp_path / "p.png"), "no trained arm", "train coca")


def test_sugarcrepe_on_coco(tmp_path, shared):
    from data_prep import coco

    mini = shared / "coco_mini"
    coco.run(
        coco.Config(annotations=str(mini / "annotations.json.gz"), images=str(mini / "images.zip"), out=str(tmp_path / "d"))
    )
    args = ["--data", tmp_path / "d", "--arms", "infonce", "--steps", "1", "--eval_images", "104"]
    done = inside(M, *SMALL, *args, "--sugarcrepe", shared / "sugarcrepe/sugarcrepe.csv.gz", "--out_dir", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    flat = json.loads((tmp_path / "r/metrics.json").read_text())
    assert flat["infonce SugarCrepe rows"] == 134 and 20 < flat["infonce cosine: SugarCrepe"] < 80
    assert 20 < flat["infonce cosine: blind SugarCrepe"] < 80 and "infonce, blind" in done.stdout


# By hand ---------------------------------------------------------------------------------------------------------------


def test_a_random_word_in_place_of_a_hidden_one_is_any_word_and_no_special_token():
    u = torch.stack([torch.zeros(1, 5000), torch.linspace(0.8, 0.8999, 5000)[None]], 2).double()
    noisy, target = M.hide_words(torch.full((1, 5000), 3), u, 10, torch.zeros(1, 5000, dtype=torch.bool))
    assert set(noisy[0].tolist()) == set(range(8)) and (target == 3).all()  # 8 and 9 are start and end, 10 is the mask


def test_a_hidden_patch_leaves_nothing_of_its_pixels():
    torch.manual_seed(0)
    vision, x, hidden = M.Vision(CFG, masks=True).eval(), torch.randn(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    hidden[:, 5] = True  # second row, second column
    y = x.clone()
    y[:, :, 8:16, 8:16] = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(vision(x, hidden=hidden), vision(y, hidden=hidden))  # the convolutions tell nothing, either
    assert not torch.allclose(vision(x), vision(y), atol=1e-3)
    vision.mask_token.data.fill_(3.0)
    torch.testing.assert_close(vision(x, hidden=hidden, layers=0)[:, 6], (3 + vision.pos_embed[:, 6]).expand(2, -1))


def test_kept_patches_have_their_own_places_and_registers_follow_the_class_token():
    torch.manual_seed(0)
    vision, x, keep = M.Vision(CFG, registers=3).eval(), torch.randn(2, 3, 32, 32), torch.tensor([[1, 4, 9], [0, 2, 15]])
    whole, part = vision(x, layers=0), vision(x, keep=keep, layers=0)
    assert whole.shape[1] == 1 + 3 + 16 and part.shape[1] == 1 + 3 + 3
    torch.testing.assert_close(whole[:, 1:4], vision.register_tokens.expand(2, -1, -1))
    torch.testing.assert_close(part[:, :4], whole[:, :4])
    for i in range(2):
        torch.testing.assert_close(part[i, 4:], whole[i, 4 + keep[i]])


def test_llip_mixes_the_class_token_and_the_registers_alone(world):
    model = model_of("llip", world[1])
    seen, f_txt = model.see(torch.randn(2, 3, 32, 32)), unit(3, CFG.embed_dim).float()
    assert model.vision.registers == CFG.mixtures - 1
    patches, register = seen.clone(), seen.clone()
    patches[:, CFG.mixtures :] = 0
    register[:, CFG.mixtures - 1] = 0
    torch.testing.assert_close(model.compare(patches, f_txt), model.compare(seen, f_txt))
    assert not torch.allclose(model.compare(register, f_txt), model.compare(seen, f_txt))


def test_the_contrastive_arms_begin_and_use_their_scale_bias_and_negatives(world):
    for arm, scale, bias in (("infonce", 1 / 0.07, None), ("siglip", 10, -10), ("llip", 10, -10)):
        model, b = model_of(arm, world[1]), batch_of(world, "negclip")
        assert model.log_scale.exp().item() == pytest.approx(scale, rel=1e-5)
        assert model.bias is None if bias is None else model.bias.item() == bias
        f_neg, cos = M.unit(model.text(b["negative"])), model.cosines(model.see(b["image"]), b["ids"])
        if arm == "infonce":
            hard = scale * M.unit(model.img_proj(model.see(b["image"])[:, 0])) @ f_neg.T
            own = torch.arange(len(cos))
            want = (F.cross_entropy(torch.cat([scale * cos, hard], 1), own) + F.cross_entropy(scale * cos.T, own)) / 2
        else:
            sign = 2 * torch.eye(len(cos)) - 1
            want = -F.logsigmoid(sign * (10 * cos - 10)).sum() / len(cos)
        torch.testing.assert_close(model(b)[0], want)


def test_flavas_heads_read_the_places_of_what_they_restore(world, monkeypatch):
    tok, model, b, got, hide = world[1], model_of("mask", world[1]), batch_of(world, "mask"), {}, M.hide_words
    for name in ("vision", "words", "fusion", "mim", "mlm", "mmm_img", "mmm_txt"):  # the first call of each: masked inputs

        def note(module, given, out, name=name):
            got.setdefault(name, (given[0], out))

        getattr(model, name).register_forward_hook(note)
    never = []
    monkeypatch.setattr(
        M, "hide_words", lambda ids, u, m, special, share: never.append(special) or hide(ids, u, m, special, share)
    )
    _, parts = model(b)
    x, fused = got["fusion"]
    seen, words = got["vision"][1], got["words"][1]
    torch.testing.assert_close(x, torch.cat([model.cls.expand(8, -1, -1), model.img_in(seen), model.txt_in(words)], 1))
    assert torch.equal(got["mim"][0], seen[:, 1:]) and torch.equal(got["mlm"][0], words)
    assert torch.equal(got["mmm_img"][0], fused[:, 2:18]) and torch.equal(got["mmm_txt"][0], fused[:, 18:])  # 16 patches
    assert torch.equal(never[0], ~M.lengths(b["ids"]) | (b["ids"] == tok.start) | (b["ids"] == tok.end))
    seen = model.see(b["image"])
    fits = model.match(seen, b["maybe"])
    torch.testing.assert_close(parts["itm"], -F.logsigmoid(torch.where(b["right"], fits, -fits)).mean())
    counted = b["qa_counted"] & (b["qa"] != tok.end)
    logp = model.cloze(seen, b["qa"], counted).log_softmax(2).gather(2, b["qa"][..., None])[..., 0]
    torch.testing.assert_close(parts["qa"], -logp[counted].mean())
    other = b["qa"].masked_fill(counted, 7)  # the hidden answer is not read
    torch.testing.assert_close(model.cloze(seen, other, counted), model.cloze(seen, b["qa"], counted))


def test_codes_are_the_nearest_patches_and_centres_lie_where_patches_are(world):
    model, own = model_of("mask", world[1]), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    images = F.fold(model.codebook[own].T[None], (32, 32), 8, stride=8)
    assert model.targets(images, torch.ones(1, 16, dtype=torch.bool))[0].tolist() == own.tolist()
    image = torch.full((4, 3, 32, 32), 20, dtype=torch.uint8)
    image[2:] = 230
    centres = M.codebook(SimpleNamespace(pictures={"image": image}), replace(CFG, codes=8))
    patches = F.unfold(M.normalised(image), 8, stride=8).transpose(1, 2).flatten(0, 1)
    assert torch.cdist(patches, centres).amin(1).max() < 1e-2


def test_boxes_are_measured_by_hand_and_belong_to_the_named_object(world):
    a, b = torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([[0.6, 0.5, 0.2, 0.2]])
    assert M.box_loss(a, b).item() == pytest.approx(0.1 + 1 - 1 / 3, abs=1e-5)  # they share a third, and their hull is full
    spotted, ring = scenes.Thing("star", "red", "large", "spotted", 0), scenes.Thing("ring", "blue", "small", "solid", 3)
    box = M.box_of(scenes.Scene((spotted, ring), "dark", "plain", grid=2), 1, 64)
    assert box[:2].tolist() == pytest.approx([0.75, 0.75], abs=0.03)
    model, batch = model_of("mask+boxes", world[1]), batch_of(world, "mask+boxes")
    got = model.box(model.pooled(model.see(batch["image"]), batch["phrase"])).sigmoid()
    torch.testing.assert_close(model(batch)[1]["box"], M.box_loss(got, batch["box"]))
    some = world[0].scenes[:6]
    true = torch.stack([M.box_of(s, j, 32) for s in some for j in range(len(s.things))])
    for shift, want in ((0.0, 100), (0.3, 100), (0.35, 0)):  # of the width: an IoU of 1, .54 and .48
        moved = true.clone()
        moved[:, 0] += shift * true[:, 2]
        knows = SimpleNamespace(pooled=lambda seen, ids: None, box=lambda _, moved=moved: moved.logit())
        score = SimpleNamespace(model=knows, ids=lambda texts: (None, None))
        assert M.grounding(score, some, torch.zeros(6, 1, 1), CFG) == want


def test_coca_compares_one_query_writes_from_the_others_and_counts_no_padding(world):
    model, b = model_of("coca", world[1]), batch_of(world, "coca")
    model.queries.data.normal_()  # far from each other, and what is read of them counts
    model.upper.layers[0].cross.out_proj.weight.data.mul_(20)
    seen, ids = model.see(b["image"]), torch.cat([b["ids"], torch.zeros(8, 2, dtype=torch.long)], 1)
    first, rest = seen.clone(), seen.clone()
    first[:, 0], rest[:, 1:] = 0, 0
    torch.testing.assert_close(model.logits(first, ids), model.logits(seen, ids))
    torch.testing.assert_close(model.cosines(rest, ids), model.cosines(seen, ids))
    assert not torch.allclose(model.cosines(first, ids), model.cosines(seen, ids))
    logp = model.logits(seen, ids)[:, :-1].log_softmax(2).gather(2, ids[:, 1:, None])[..., 0]
    words = [logp[i, : int(row.argmax())] for i, row in enumerate(ids)]  # up to the end token
    torch.testing.assert_close(model({**b, "ids": ids})[1]["caption"], -torch.cat(words).mean())


def test_the_frozen_family_is_told_captions_and_answers(world):
    model, b = model_of("frozen", world[1]), batch_of(world, "frozen")
    seen = model.see(b["image"])
    told, qa = (M.caption_loss(model.logits(seen, b[k]), b[k], b[f"{k}_counted"]) for k in ("told", "qa"))
    torch.testing.assert_close(model(b)[0], told + qa)
    torch.testing.assert_close(
        model({"features": model.features(b["image"]), **{k: b[k] for k in b if k != "image"}})[0], told + qa
    )


@pytest.mark.parametrize("rank", [1, 4])
def test_loras_scale_is_two_whatever_its_rank(rank):
    lora, x = M.LoRA(torch.nn.Linear(6, 5), rank), torch.randn(3, 6)
    before = lora(x)
    torch.nn.init.normal_(lora.B)
    torch.testing.assert_close(lora(x) - before, 2 * x @ lora.A.T @ lora.B.T)


def test_photographs_are_asked_for_objects_and_their_negatives_exchange_two_words():
    here, classes = [["horse", "person"], []], ["horse", "person", "zebra"]
    pairs = M.Pairs({}, [["a man rides a brown horse"], ["a dog"]], here, [], classes, ["0", "1"], np.zeros(2, bool))
    asked = {pairs.question(0, np.random.default_rng(i)) for i in range(40)}
    assert asked == {(f"Is there a {n}?", "yes" if n in here[0] else "no", "object") for n in classes}
    assert all(pairs.question(1, np.random.default_rng(i)) is None for i in range(9))  # of which nothing is known
    words = pairs.captions[0][0].split()
    for i in range(20):
        wrong = pairs.negative(0, pairs.captions[0][0], np.random.default_rng(i)).split()
        moved = [w for w, v in zip(words, wrong) if w != v]
        assert Counter(wrong) == Counter(words) and len(moved) == 2 and all(len(w) > 3 for w in moved)
    assert pairs.negative(1, "a dog", np.random.default_rng(0)) == "nothing"


def test_shares_of_wrong_captions_and_of_dropped_patches_are_what_was_asked_for(world):
    right = batch_of(world, "mask", 64, cfg=replace(CFG, wrong=0.1))["right"]
    assert 0.8 < right.float().mean() < 1
    keep = batch_of(world, "flip", cfg=replace(CFG, drop_tokens=0.75))["keep"]
    assert keep.shape == (8, 4) and (keep.diff() > 0).all() and keep.max() < 16


def test_the_language_models_texts_do_not_depend_on_how_a_batch_is_split(world):
    pairs, tok = world
    whole = batch_of(world, "lm")["packed"]
    cut = [{k: v[i:j] for k, v in pairs.pictures.items()} for i, j in ((0, 2), (2, 8))]
    parts = [M.make_batch(pairs, part, "lm", tok, CFG, 0, first, "cpu")["packed"] for part, first in zip(cut, (0, 2))]
    assert len(whole) == 2 and torch.equal(torch.cat(parts), whole)


def test_winograds_text_and_image_scores_are_told_apart():
    s = torch.tensor([[[3.0, 4.0], [2.0, 5.0]]])  # each picture prefers its caption, the first caption the other picture
    assert M.winoground(s) == (1, 0, 0) and M.winoground(s.transpose(1, 2)) == (0, 1, 0)


def test_cider_by_hand():
    """Each n-gram is in one of three pictures, also one in both captions of a picture, so that all weigh log 3."""
    given, references = ["a b", "f f f", "x"], [["a b c", "a d"], ["f g"], ["e"]]
    short = math.exp(-1 / 72)  # one word too few, or too many
    first = ((2 / math.sqrt(6) + 1 / math.sqrt(2)) * short + 1 / 2) / 2  # a b c: words, pairs of words; a d: words
    assert M.cider_d(given, references) == pytest.approx(10 / 4 * (first + short / (3 * math.sqrt(2))) / 3)


def test_pope_asks_for_three_objects_of_a_picture_at_most():
    asked = M.pope_questions([list("abcd")], list("abcdefghij"), "random", np.random.default_rng(0))
    assert Counter(there for *_, there in asked) == {True: 3, False: 3} and len({n for _, n, _ in asked}) == 6


def test_questions_are_scored_against_a_blind_reader_and_the_commonest_answer():
    objects = [["cat"], ["dog"], ["cat", "dog"], ["cat"], ["bird"], ["cat"]]

    class Reader:
        model, blank, tie = None, torch.full((1, 1, 1), -1.0), False

        def answers(self, seen, texts, candidates, **options):
            best = []
            for place, q in zip(seen.expand(len(texts), -1, -1)[:, 0, 0].long().tolist(), texts):
                no = place < 0 or (int(q[1:]) % 3 == 0 if q[0] == "q" else q[len("Is there a ") : -1] not in objects[place])
                best.append(-1 if self.tie else int(no))
            return best, [0.9] * len(texts)

    test = SimpleNamespace(objects=objects, classes=["bird", "cat", "dog", "fox"], scenes=[],
                           question=lambda row, rng: (f"q{row}", "yes" if row % 3 else "no", "object"))  # fmt: skip
    seen = torch.arange(6.0).view(6, 1, 1)
    out = M.questions(Reader(), test, range(6), seen, CFG)
    got = [out[f"VQA{k}, yes/no"] for k in ("", " blind", " majority")]
    assert got == pytest.approx([100, 100 / 3, 200 / 3]) and out["answered at 5 % risk"] == out["reliability"] == 100
    for setting in ("random", "popular", "adversarial"):
        assert out[f"POPE {setting} accuracy"] == 100 and out[f"POPE {setting} yes"] == 50
        assert out[f"POPE blind {setting} accuracy"] == 50 and out[f"POPE blind {setting} recall"] == 0
    Reader.tie = True
    out = M.questions(Reader(), test, range(6), seen, CFG)
    assert out["VQA, yes/no"] == out["POPE random accuracy"] == out["POPE blind random accuracy"] == 0


def test_captions_are_scored_beside_those_of_a_grey_picture_and_where_objects_are_known():
    score = SimpleNamespace(prompt="", blank=torch.zeros(1, 1, 1))
    score.write = lambda seen, prompts: ["a zebra"] if seen is score.blank else ["a dog runs away", "a cat"]
    test = SimpleNamespace(captions=[["a dog runs away"], ["something else is here"]], objects=[["dog"], []], scenes=[],
                           classes=["cat", "dog", "zebra"])  # fmt: skip
    out = M.captions(score, torch.ones(2, 1, 1), test, [0, 1])
    assert out["CHAIR_i"] == out["CHAIR_s"] == 0 and out["words"] == 3 and out["distinct"] == 100  # of the cat nothing is known
    assert out["CIDEr-D"] == pytest.approx(5) and out["blind CIDEr-D"] < 0.5


@torch.no_grad()
@pytest.mark.parametrize("arm", ["infonce", "llip", "mask", "coca", "frozen"])
def test_scores_of_all_pictures_with_all_texts_hold_those_of_the_pairs(world, arm):
    pairs, tok = world
    score = M.Scorer(model_of(arm, tok), tok, CFG, torch.device("cpu"))
    seen, texts = score.see(pairs.pictures["image"][:3]), [pairs.captions[i][0] for i in range(5)]
    every, own = score.pairs(seen, texts, every=True), score.pairs(seen, texts[:3])
    assert set(every) == set(own) == set(score.model.heads)
    for head in own:
        assert every[head].shape == (3, 5)
        torch.testing.assert_close(every[head].diagonal(), own[head], atol=1e-5, rtol=1e-4)


def test_sugarcrepe_is_read_by_name_and_counted_by_kind(tmp_path):
    rows = ["swap_att,000001.jpg,a right one,a wrong one", "swap_att,000002.jpg,a right one,a wrong one",
            "add_obj,000002.jpg,a wrong one,a right one", "add_obj,000009.jpg,a right one,a wrong one"]  # fmt: skip
    (tmp_path / "s.csv").write_text("\n".join(["kind,file,caption,negative_caption", *rows]))
    score = SimpleNamespace(blank=torch.zeros(1, 1, 1))
    score.pairs = lambda seen, texts: {
        "cosine": torch.tensor([float("right" in t) * float(x) for x, t in zip(seen[:, 0, 0], texts)])
    }
    seen = torch.tensor([1.0, 0.0]).view(2, 1, 1)  # the second picture looks grey
    out = M.sugarcrepe(score, seen, ["000001", "000002.png"], SimpleNamespace(sugarcrepe=str(tmp_path / "s.csv")))
    assert out == {"cosine: SugarCrepe": pytest.approx(100 / 3), "cosine: SugarCrepe, ties": pytest.approx(200 / 3),
                   "cosine: blind SugarCrepe": 0, "cosine: SugarCrepe swap_att": 50, "cosine: SugarCrepe add_obj": 0,
                   "SugarCrepe rows": 3}  # fmt: skip


def test_the_scale_is_held_below_a_hundred_in_training(world, tmp_path, monkeypatch):
    build = M.build

    def hot(*args):
        model = build(*args)
        model.log_scale.data.fill_(9.0)
        return model

    monkeypatch.setattr(M, "build", hot)
    monkeypatch.setattr(M, "evaluate", lambda *args: {})
    monkeypatch.setattr(M, "world_of", lambda *args: (world[0], *world))
    M.train(replace(CFG, arms="infonce", steps=1, lr=0.0, out_dir=str(tmp_path)))
    assert M.read_tensors(tmp_path / "model.safetensors")[0]["log_scale"].item() == pytest.approx(math.log(100), abs=1e-5)


@pytest.mark.parametrize(
    "text, want", [("No, not really.", "no"), ("Yes, nothing else", "yes"), ("Not yes", ""), ("well I say no", "")]
)
def test_first_words_decide(text, want):
    assert M.yes_or_no(text) == want


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    user_error(
        inside(M, "--preset", "smoke", "--arms", "infonce", "--pairs", 4, "--out_dir", tmp_path), "is more than the 4 pairs"
    )
