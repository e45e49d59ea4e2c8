"""methods/semisup_cluster.py: Sinkhorn, queue, teacher, objective, phases, processes, resume, bad input."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import data, ddp
from data_prep._write import png, prepare
from methods import semisup_cluster as M
from tests.helpers import ROOT, both, damage, in_processes, inside, user_error

ENV = ddp.Env(0, 1, torch.device("cpu"))


def unit(rows, dim, seed=0):
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


# Sinkhorn --------------------------------------------------------------------------------------------------------------

S = torch.tensor([[0.9, 0.1, 0], [0.8, 0.3, -0.2], [0.7, -0.1, 0.5], [0.6, 0.2, 0.1]])


def test_sinkhorn_reference_matrix():
    want = [
        [0.992480, 0.007447, 0.000073],
        [0.248328, 0.751670, 0.000002],
        [0.011130, 0.000084, 0.988787],
        [0.042397, 0.948266, 0.009336],
    ]
    Q = M.sinkhorn(S, 0.05, 3)
    torch.testing.assert_close(Q, torch.tensor(want), atol=2e-6, rtol=0)
    torch.testing.assert_close(Q.sum(0), torch.tensor([1.294335, 1.707466, 0.998199]), atol=5e-6, rtol=0)
    torch.testing.assert_close(M.sinkhorn(S, 0.05, 200).sum(0), torch.full((3,), 4 / 3), atol=1e-5, rtol=0)


def test_sinkhorn_solves_the_balanced_problem():
    """Eq. 5-6: the solution is diag(u) exp(S / eps) diag(v) with both marginals."""
    scores = unit(64, 8) @ unit(10, 8, 1).T
    Q = M.sinkhorn(scores, 0.05, 300).double()
    torch.testing.assert_close(Q.sum(0), torch.full((10,), 6.4, dtype=torch.float64), atol=1e-3, rtol=0)
    log = Q.log() - scores.double() / 0.05  # = log u_i + log v_k: all double differences vanish
    assert (log - log[:1] - log[:, :1] + log[0, 0]).abs().max() < 1e-2
    gap = [(M.sinkhorn(scores, 0.05, n).sum(0) - 6.4).abs().max() for n in (1, 3, 10, 50)]
    assert gap == sorted(gap, reverse=True) and gap[-1] < 1e-3


def test_sinkhorn_invariances():
    scores = unit(16, 8) @ unit(4, 8, 1).T
    Q = M.sinkhorn(scores)
    torch.testing.assert_close(Q.sum(1), torch.ones(16), atol=1e-6, rtol=0)
    torch.testing.assert_close(M.sinkhorn(scores + torch.tensor([0.3, -0.2, 0, 0.1])), Q, atol=1e-5, rtol=0)
    torch.testing.assert_close(M.sinkhorn(scores + 3.0), Q, atol=1e-4, rtol=0)
    p = torch.randperm(16)
    torch.testing.assert_close(M.sinkhorn(scores[p]), Q[p], atol=1e-6, rtol=0)
    same = M.sinkhorn(torch.full((6, 4), 0.4))
    torch.testing.assert_close(same, torch.full((6, 4), 0.25))
    assert M.unlabelled_loss([torch.zeros(6, 4)] * 2, [same, same], 0.1).item() == pytest.approx(math.log(4))
    for wild in (scores * 50, scores.half()):
        assert torch.isfinite(M.sinkhorn(wild)).all()


def split_sinkhorn(env, scores):
    part = scores.chunk(env.world)[env.rank]
    P, queue = unit(3, 8, 5), M.Queue(2, 8, 8)
    for seed in (1, 2):  # two batches of four fill it
        queue.push(0, unit(4, 8, seed).chunk(env.world)[env.rank])
    z = unit(4, 8, 3).chunk(env.world)[env.rank]
    center = M.dino_center_update(torch.zeros(1, 3), part, 0.9)
    return M.sinkhorn(part), queue.targets(0, z, P, 0.05), queue.z[0], center


def test_two_processes_balance_together(tmp_path):
    one = split_sinkhorn(ENV, S)
    two = in_processes(2, split_sinkhorn, S, path=tmp_path)
    torch.testing.assert_close(torch.cat([t[0] for t in two]), one[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cat([t[1] for t in two]), one[1], atol=1e-5, rtol=0)
    assert all(torch.equal(t[2], one[2]) for t in two)
    assert all(torch.allclose(t[3], one[3], atol=1e-7) for t in two)
    alone = torch.cat([M.sinkhorn(p) for p in S.chunk(2)])
    assert (alone - one[0]).abs().max() > 0.1  # each for itself is something else


def test_queue_is_newest_first_and_used_when_full():
    P, queue, batches = unit(3, 8, 9), M.Queue(1, 6, 8), [unit(4, 8, s) for s in range(3)]
    queue.push(0, batches[0])
    torch.testing.assert_close(queue.targets(0, batches[1], P, 0.05, False), M.sinkhorn(batches[1] @ P.T))  # not full yet
    queue.push(0, batches[1])
    assert torch.equal(queue.z[0], torch.cat([batches[1], batches[0][:2]]))
    got = queue.targets(0, batches[2], P, 0.05)
    want = M.sinkhorn(torch.cat([queue.z[0], batches[2]]) @ P.T)[-4:]
    torch.testing.assert_close(got, want)
    assert got.shape == (4, 3) and not torch.allclose(got, M.sinkhorn(batches[2] @ P.T))


# Teacher ---------------------------------------------------------------------------------------------------------------


def test_schedules_of_dino():
    m = [M.teacher_momentum(t, 10, 0.996) for t in range(10)]
    assert m == pytest.approx([0.996, 0.99609789, 0.99638197, 0.99682443, 0.99738197, 0.998, 0.99861803, 0.99917557, 0.99961803,
                               0.99990211], abs=1e-8)  # fmt: skip
    m = [M.teacher_momentum(t, 10, 0.99) for t in range(10)]
    assert m == pytest.approx([0.99, 0.99024472, 0.99095492, 0.99206107, 0.99345492, 0.995, 0.99654508, 0.99793893, 0.99904508,
                               0.99975528], abs=1e-8)  # fmt: skip
    assert m == sorted(m) and m[-1] < 1
    tau = [M.teacher_temperature(e, 0.07, 10) for e in range(12)]
    assert tau == pytest.approx(
        [0.04, 0.043333, 0.046667, 0.05, 0.053333, 0.056667, 0.06, 0.063333, 0.066667, 0.07, 0.07, 0.07], abs=1e-6
    )
    assert M.teacher_temperature(0, 0.05, 0) == 0.05
    lr = [M.schedule(t, 12, 3, 1.0, 0.0) for t in range(12)]
    assert lr == pytest.approx([0, 0.5, 1, 1, 0.969846, 0.883022, 0.75, 0.586824, 0.413176, 0.25, 0.116978, 0.030154], abs=1e-6)


def test_targets_and_centre():
    o, c = torch.randn(6, 4), torch.randn(1, 4)
    want = np.exp((o - c).double().numpy() / 0.04)
    torch.testing.assert_close(
        M.dino_targets(o, c, 0.04).double(), torch.from_numpy(want / want.sum(1, keepdims=True)), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(M.dino_center_update(torch.zeros(1, 4), o), 0.1 * o.mean(0, keepdim=True))


# Objective -------------------------------------------------------------------------------------------------------------


def test_weights_count_rows():
    assert M.frequency_weights(320, 32, 1, 16) == pytest.approx((320 / 353, 32 / 353, 1 / 353, 16 / 353))  # the released code
    assert M.frequency_weights(320, 32, 32, 16)[:3] == pytest.approx((320 / 384, 32 / 384, 32 / 384))
    assert M.frequency_weights(640, 64, 0, 32)[:2] == pytest.approx((0.9091, 0.0909), abs=1e-4)
    assert M.frequency_weights(64, 0, 0, 0)[:2] == (1, 0) and M.frequency_weights(0, 8, 0, 8)[:2] == (0, 1)


def test_two_views_without_mixing_are_one_mean_over_all_rows():
    o1, o2, o_l = (torch.randn(6, 5) for _ in range(3))
    q1, q2 = (M.sinkhorn(o * 0.1) for o in (o1, o2))
    y = F.one_hot(torch.arange(6) % 5, 5).float()
    w = M.frequency_weights(12, 6, 0, 6)
    total = w[0] * M.unlabelled_loss([o1, o2], [q1, q2], 0.1) + w[1] * M.cross_entropy(o_l, y, 0.1)
    one = M.cross_entropy(torch.cat([o_l, o1, o2]), torch.cat([y, q2, q1]), 0.1)
    torch.testing.assert_close(total, one)


def test_pairs_of_ten_views_and_no_gradient_through_targets():
    seen = []
    scores = [torch.full((1, 2), float(v), requires_grad=True) for v in range(10)]
    targets = [torch.tensor([[0.3, 0.7]], requires_grad=True) for _ in range(2)]
    real = M.cross_entropy
    try:
        M.cross_entropy = lambda o, q, tau: (seen.append((int(o[0, 0]), q)), real(o, q, tau))[1]
        M.unlabelled_loss(scores, targets, 0.1).backward()
    finally:
        M.cross_entropy = real
    assert len(seen) == 18 and [v for v, _ in seen] == [*range(1, 10), 0, *range(2, 10)]
    assert targets[0].grad is None and all(not q.requires_grad for _, q in seen)


def test_mixing():
    x1, x2 = torch.zeros(4, 3, 8, 10), torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 10)
    mixed, lam = M.mix(x1, x2, (0.9, 0.25, 0, 0))
    assert lam == 0.25 and mixed[:, 0, 0, 0].tolist() == [2.25, 1.5, 0.75, 0.0]  # the partner is the flip
    mixed, lam = M.mix(
        x1, torch.ones(4, 3, 8, 10), (0.1, 0.5, 0.0, 0.5)
    )  # CutMix at the upper border: half of the box is outside
    assert lam == pytest.approx(1 - mixed[0, 0].mean().item()) and lam > 0.5
    cut, _ = M.mix(x1, x2, (0.1, 0.5, 0.0, 0.5))
    assert cut[:, 0].amax((1, 2)).tolist() == [3, 2, 1, 0]  # CutMix's partner is the flip, too
    full, lam = M.mix(x1, torch.ones(4, 3, 8, 10), (0.1, 0.75, 0.5, 0.5))
    assert full[0, 0].sum() == round((1 - lam) * 80) and lam == pytest.approx(0.75, abs=0.06)
    y = F.one_hot(torch.tensor([0, 1, 2, 2]), 3).float()
    t = M.smooth(M.mix_targets(y, y, 0.3), 0.1)
    torch.testing.assert_close(t.sum(1), torch.ones(4))
    assert t[0].tolist() == pytest.approx([0.9 * 0.3 + 0.1 / 3, 0.1 / 3, 0.9 * 0.7 + 0.1 / 3])


def test_collapse_is_seen_although_sinkhorn_balances():
    """Equal features: assignments are uniform by construction, the predictions all go to one cluster."""
    scores = torch.tensor([[1.0, 0.0, 0.0]]).repeat(30, 1)
    y = torch.tensor([0, -1]).repeat(15)  # every second picture has no label
    seen = M.watch(M.sinkhorn(scores), scores, y, CFG)
    assert seen["spread"] < 0.01 and seen["largest"] > 0.99 and seen["pseudo"] == 100
    even = torch.eye(3).repeat(10, 1)
    seen = M.watch(M.sinkhorn(even), even, torch.full((30,), -1), CFG)
    assert seen["spread"] > 0.999 and seen["largest"] == pytest.approx(1 / 3) and seen["pseudo"] == 0  # nothing has a label


def test_fixmatch_by_hand():
    weak = torch.tensor([[0.5, 0.0, 0.0], [0.1, 0.09, 0.0]])
    strong = torch.randn(2, 3)
    want = F.cross_entropy(strong[:1] / 0.1, torch.tensor([0])) / 2  # the second row is not confident
    torch.testing.assert_close(M.fixmatch_loss(weak, strong, 0.1), want)


CFG = replace(M.Config(), images=60, batch_size=8, image_size=16, local_size=8, local_crops=2, width=8, hidden=16, embed_dim=8,
              labels="2", eps=0.05)  # fmt: skip


def step(env, method, stage, mix, seed=0, length=0, **kw):
    """One update's loss and gradients on this process; length: of a full queue."""
    cfg = replace(CFG, method=method, stage=stage, mix=mix, **kw)
    world = M.open_world(cfg, env)
    C = len(world.classes)
    torch.manual_seed(seed)
    net = M.Net(cfg, 2 * C if stage == "ssl" else C, 0 if stage == "ssl" else C)
    net.normalise_prototypes()
    wrapped = ddp.wrap(net, env)
    teacher = M.copy.deepcopy(net).requires_grad_(False) if method == "daino" else None
    B_u, B_l = M.batch_sizes(cfg)
    u = next(data.endless(world.train, 16, B_u, env)) if B_u else None
    y = next(data.endless(world.labelled, 16, B_l, env, 1)) if B_l else None
    queue = M.Queue(2, length, cfg.embed_dim)
    queue.z.copy_(F.normalize(torch.randn(2, length, cfg.embed_dim, generator=torch.Generator().manual_seed(1)), dim=2))
    if teacher:
        teacher.register_buffer("center", torch.zeros(1, len(net.prototypes)))
    loss, parts = M.method_loss(wrapped, teacher, queue, u, y, cfg, env, 3, 0.04)
    center = teacher.center if teacher else torch.zeros(1)
    loss.backward()
    grads = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
    return loss.detach(), grads, center, {k: torch.as_tensor(v).detach() for k, v in parts.items()}


@pytest.mark.parametrize(
    "method,stage,length",
    [
        ("suave", "semi", 0),
        ("suave", "semi", 24),
        ("daino", "semi", 0),
        ("suave", "ssl", 0),
        ("fixmatch", "semi", 0),
        ("sup", "semi", 0),
    ],
)
def test_two_processes_equal_one(method, stage, length, tmp_path):
    one = step(ENV, method, stage, True, 0, length)
    two = in_processes(2, step, method, stage, True, 0, length, path=tmp_path)
    assert torch.allclose((two[0][0] + two[1][0]) / 2, one[0], atol=1e-5)
    a, b = (torch.cat([g[k].flatten() for k in one[1]]) for g in (one[1], two[0][1]))
    assert (a - b).norm() < 1e-2 * a.norm()  # rounding at a ReLU's kink: 4e-3 for one seed of four; each mixing alone: 0.09
    torch.testing.assert_close(two[0][2], one[2], atol=1e-5, rtol=0)


def test_probes_do_not_teach_the_network():
    cfg = replace(CFG, method="suave", stage="semi")
    net = M.Net(cfg, 9, 9)
    _, _, probes = net([torch.randn(6, 3, 16, 16)], 4)
    assert [p.shape for p in probes] == [(4, 9)] * 3
    sum(p.square().sum() for p in probes).backward()
    with_grad = {k.split(".")[0] for k, p in net.named_parameters() if p.grad is not None}
    assert with_grad == {"probes"}


def test_no_labels_is_swav_and_no_unlabelled_is_classification():
    loss, _, _, parts = step(ENV, "suave", "ssl", False)
    assert torch.allclose(loss, parts["unlabelled"]) and "labelled" not in parts
    loss, _, center, parts = step(ENV, "daino", "ssl", False)
    assert torch.allclose(loss, parts["unlabelled"]) and "labelled" not in parts and center.abs().sum() > 0
    loss, _, _, parts = step(ENV, "sup", "semi", False)
    assert torch.allclose(loss, parts["labelled"] + parts["probes"]) and "unlabelled" not in parts
    loss, _, _, parts = step(ENV, "suave", "semi", True)
    n = 2 * 8 + 2 * 8 + 8 + 8  # two global and two local views of 8, 4 labelled and their 4 mixed, 8 mixed
    want = (32 * parts["unlabelled"] + 8 * parts["labelled"] + 8 * parts["mixed"] + 4 * parts["probes"]) / n
    assert n == 48 and torch.allclose(loss, want)
    loss, _, _, parts = step(ENV, "suave", "semi", True, mix_views=True)
    want = (32 * parts["unlabelled"] + 8 * parts["labelled"] + 1 * parts["mixed"] + 4 * parts["probes"]) / 41
    assert torch.allclose(loss, want)


def test_prototypes():
    suave, daino = (M.Net(replace(CFG, method=m), 5, 5) for m in ("suave", "daino"))
    suave.prototypes.data *= 3
    suave.normalise_prototypes()
    torch.testing.assert_close(suave.P().norm(dim=1), torch.ones(5))
    daino.prototypes.data *= 3
    daino.length.data[0] = 2
    torch.testing.assert_close(daino.P().norm(dim=1), torch.tensor([2.0, 1, 1, 1, 1]))
    fixed = M.Net(replace(CFG, method="daino", norm_last_layer=True), 5, 5)
    assert not fixed.length.requires_grad and torch.allclose(fixed.P().norm(dim=1), torch.ones(5))
    scores, z, _ = suave([torch.randn(3, 3, 16, 16)])
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(scores, z @ suave.prototypes.T)


def test_every_method_is_given_as_many_pixels():
    cfg = replace(M.Config(), local_crops=4, local_size=12, image_size=24, batch_size=64, pretrain=0.0)
    assert M.budget(cfg) == 128 + 64 + 64 + 64  # globals, locals of a quarter, labelled and mixed, mixed unlabelled
    assert M.budget(replace(cfg, pretrain=0.75)) == 192 + 128 / 4  # phase A has no labelled and no mixed rows
    B_u, B_l = M.batch_sizes(replace(cfg, method="sup"))
    assert B_u == 0 and 2 * B_l == 320
    B_u, B_l = M.batch_sizes(replace(cfg, method="fixmatch"))
    assert B_l == 32 and 2 * B_u + B_l == 320 and B_u % 8 == 0
    assert M.batch_sizes(replace(cfg, method="suave", stage="ssl")) == (64, 0)


def test_no_test_picture_is_trained_on():
    world = M.open_world(M.Config(), ENV)
    known = {x.numpy().tobytes() for x in world.train["image"]}
    assert not known & {x.numpy().tobytes() for x in world.test["image"]}
    assert 300 < len(known) <= 324 and set(world.test["label"].tolist()) == set(range(9))


def test_phases_do_not_repeat_each_other():
    batch = {
        "image": torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8),
        "label": torch.zeros(4),
        "side": torch.full((4, 2), 16),
    }
    ssl, semi = (M.make_rows(batch, None, replace(CFG, method="suave", stage=s, mix=False), ENV, 5)[0] for s in ("ssl", "semi"))
    assert not torch.equal(ssl["view 1"], semi["view 1"])
    plan = M.phases("ssl", "2", M.Config())
    rows = plan[0].steps * 2 * 96
    assert abs(rows - 1000 * M.budget(M.Config())) < 2 * 96  # as many rows as the others


def test_arms_are_what_they_are_called():
    for change, words in (({"pretrain": 1.0}, "no phase B"), ({"pretrain": 0.0, "method": "ssl+ft"}, "needs a phase A"),
                          ({"smoothing": 1.5}, "--smoothing"), ({"method": "daino", "tau_t": 0.2}, "--tau_t")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            M.check(replace(M.Config(), **change))
    assert M.phases("sup", "2", M.Config(init="x"))[0].init == "" and M.phases("suave", "2", M.Config(init="x"))[0].init == "x"


# Runs ------------------------------------------------------------------------------------------------------------------

SMALL = ["--preset", "smoke"]


def test_teacher_freeze_and_alarm(tmp_path, capsys):
    out = tmp_path / "d"
    cfg = replace(M.Config(**M.PRESETS["smoke"]), method="daino", stage="semi", labels="4", steps=1, warmup=0, ema_decay=0.9,
                  freeze=1, save_every=1, out_dir=str(out))  # fmt: skip
    torch.manual_seed(0)
    M.train(cfg)
    saved = torch.load(out / "last.pt", weights_only=True)
    ddp.reseed(0, 0, 0)
    first = M.Net(cfg, 9, 9).state_dict()
    for k in first:
        if k in dict(M.Net(cfg, 9, 9).named_parameters()):
            want = 0.9 * first[k] + 0.1 * saved["net"][k]
            torch.testing.assert_close(saved["teacher"][k], want, atol=1e-6, rtol=1e-5, msg=k)
    assert torch.equal(saved["net"]["prototypes"], first["prototypes"])  # frozen, to the bit
    assert not torch.equal(saved["net"]["out.weight"], first["out.weight"])
    assert sum(len(g["params"]) for g in saved["opt"]["param_groups"]) == len(list(M.Net(cfg, 9, 9).parameters()))
    # a temperature that makes every assignment uniform
    flat = replace(cfg, method="suave", steps=12, warmup=0, freeze=0, eps=1e6, lr=1e-9, lr_end=0.0, mix=False, tau=1e6, tau_t=0.04,
                   log_every=2, out_dir=str(tmp_path / "f"))  # fmt: skip
    M.train(flat)
    assert "sits at ln K = 2.1972" in capsys.readouterr().err


def test_clusters_become_classes(tmp_path, monkeypatch):
    """Statistical: pseudo-labels become right while all prototypes stay in use."""
    names = ("circle", "cross", "square")

    def part(count, seed, size):
        found = (M.scenes.scene(i, seed, (1, 1), grid=1) for i in range(8 * count))
        keep = [s for s in found if s.things[0].shape in names][:count]
        keep = [replace(s, tone="grey", pattern="plain", things=(replace(s.things[0], texture="solid"),)) for s in keep]
        x = torch.from_numpy(M.scenes.render(keep, size)).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor([names.index(s.things[0].shape) for s in keep])
        return {"row": torch.arange(count), "side": torch.full((count, 2), size), "image": x, "label": labels}

    def world(cfg, env):
        train = part(300, 0, 16)
        rows = data.pick(train["label"], 20, 0)
        return M.World(train, part(500, 1, 16), list(names), {k: v[rows] for k, v in train.items()})

    monkeypatch.setattr(M, "open_world", world)
    cfg = M.Config(method="suave", stage="semi", image_size=16, batch_size=48, width=8, hidden=64, embed_dim=32, labels="20",
                   steps=300, mix=False, save_every=1000, warmup=10, pretrain=0.0, out_dir=str(tmp_path))  # fmt: skip
    score = M.train(cfg)
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines() if "pseudo" in x]
    first, last = (np.mean([x["pseudo"] for x in part]) for part in (lines[:2], lines[-3:]))
    assert last > first + 8 and score["prototypes"] > 55, (first, last, score)  # chance: 33; another processor, another run
    spread = [x["spread"] for x in lines]  # each of one batch
    assert np.mean(spread) > 0.9 and min(spread) > 0.75, spread  # ln 2 / ln 3 = 0.63: one prototype of three is never used


@pytest.mark.hard
def test_labels_with_clusters_teach_more_than_labels_alone(tmp_path):
    """Statistical: the claim, by the default run and the probe on the backbone. The prototypes differ too much between seeds for
    three to tell: +3.5, +3.6 and -6.4 points here, +10.7 +- 6.0 over the eight of RESULTS.md."""
    arms = [replace(M.Config(), method="sup,suave", seed=s, out_dir=str(tmp_path / str(s))) for s in range(3)]
    gain = [score["suave_2_backbone"] - score["sup_2_backbone"] for score in map(M.run, arms)]
    assert np.mean(gain) > 4 and min(gain) > 0, gain


def test_smoke_prints_the_table_and_two_processes_run(tmp_path):
    one = inside(M, *SMALL, "--out_dir", tmp_path / "1", "--finetune", "0.25")
    assert one.returncode == 0, one.stderr
    for words in ("supervised only", "SwAV + linear probe", "Suave beats supervised only", "the paper, CIFAR-100"):
        assert words in one.stdout
    assert {"suave_2_prototypes", "ssl_2_backbone", "daino_2_hidden"} <= json.loads(
        (tmp_path / "1/metrics.json").read_text()
    ).keys()
    assert (tmp_path / "1/suave_2_finetune/samples/clusters.png").exists()
    again = inside(M, *SMALL, "--out_dir", tmp_path / "1", "--finetune", "0.25")
    assert again.stdout == one.stdout and "step/s" not in again.stderr  # finished phases are kept
    two = both(M, *SMALL, "--out_dir", tmp_path / "2", "--method", "suave,daino,ssl+ft")
    assert two.returncode == 0, two.stderr


@pytest.mark.hard  # five kills of each script are in test_hard.py
@pytest.mark.parametrize("method", ["suave", "daino"])
def test_killed_and_resumed_equals_uninterrupted(method, tmp_path):
    args = [sys.executable, "methods/semisup_cluster.py", *SMALL, "--steps", "40", "--save_every", "3", "--method", method,
            "--pretrain", "0", "--queue", "32"]  # fmt: skip
    subprocess.run([*args, "--out_dir", tmp_path / "a"], cwd=ROOT, check=True, capture_output=True)
    p = subprocess.Popen([*args, "--out_dir", tmp_path / "b"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last, deadline = tmp_path / f"b/{method}_2_semi/last.pt", time.time() + 120
    while not last.exists() and time.time() < deadline:
        time.sleep(0.02)
    p.kill()
    p.wait()
    assert not (tmp_path / "b/metrics.json").exists()
    subprocess.run([*args, "--out_dir", tmp_path / "b"], cwd=ROOT, check=True, capture_output=True)
    for name in (f"{method}_2_semi/model.safetensors", "metrics.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_labelled_shards_and_starting_weights(tmp_path):
    fields = M.scene_set(60, 0, 20, "")

    def make(item):
        i = item[1]
        img = Image.fromarray(fields["image"][i].permute(1, 2, 0).numpy()).resize((30, 20))
        return str(i), "png", png(img), {"label": i % 3}

    plan = {"train": [("train", i) for i in range(45)], "test": [("test", i) for i in range(45, 60)]}
    prepare(tmp_path / "s", plan, make, per_shard=20, classes=["a", "b", "c"])
    args = [*SMALL, "--data", tmp_path / "s", "--canvas", 24, "--labels", "3", "--method", "suave", "--queue", "32"]
    one = inside(M, *args, "--stage", "ssl", "--out_dir", tmp_path / "a")
    assert one.returncode == 0, one.stderr
    weights = tmp_path / "a/ssl_suave_8/model.safetensors"
    two = inside(M, *args, "--stage", "semi", "--init", weights, "--memory_gb", 0, "--workers", 1,
              "--out_dir", tmp_path / "b")  # fmt: skip
    assert two.returncode == 0, two.stderr
    r = inside(M, *args, "--stage", "semi", "--init", weights, "--width", 16, "--out_dir", tmp_path / "c")
    user_error(r, "--init", "does not fit")
    r = inside(M, *args[:-4], "--labels", "30", "--out_dir", tmp_path / "d")
    user_error(r, "30 samples a class", "only 15")
    assert damage(tmp_path / "s", 0.1) == 4
    r = inside(M, *args[:-4], "--labels", "15", "--out_dir", tmp_path / "e")
    user_error(r, "4 of the 45 labelled pictures are damaged")


def test_pictures_without_a_label_and_damaged_labelled_ones(tmp_path):
    fields = M.scene_set(150, 0, 16, "")

    def make(item):
        i = item[1]
        label = {} if item[0] == "train" and i % 2 else {"label": -1} if i % 10 == 2 else {"label": i // 2 % 3}
        return str(i), "png", png(Image.fromarray(fields["image"][i].permute(1, 2, 0).numpy())), label

    plan = {"train": [("train", i) for i in range(130)], "val": [("val", i) for i in range(131, 150, 2)]}
    prepare(tmp_path / "s", plan, make, classes=["a", "b", "c"])
    cfg = replace(CFG, data=str(tmp_path / "s"), labels="15", method="suave", stage="semi")
    world = M.open_world(cfg, ENV)
    assert len(world.train["label"]) == 130 and (world.train["label"] == -1).sum() == 78
    assert world.labelled["label"].bincount().tolist() == [15] * 3
    assert M.train(replace(cfg, steps=1, warmup=0, out_dir=str(tmp_path / "r")))["prototypes"] >= 0
    assert damage(tmp_path / "s", 0.01) == 1  # of 130 pictures; the phase without labels does not mind, nor does 5 %
    assert not M.open_world(replace(cfg, stage="ssl"), ENV).labelled
    M.open_world(replace(cfg, max_bad=0.05), ENV)


BACKBONES = {  # with the width of what the projector sees
    "wide": (dict(width=1, depth=10), 64),
    "resnet18": ({}, 512),
    "resnet50": ({}, 2048),
    "vit": (dict(width=64, depth=2, heads=1, patch=8, head="dino"), 64),
}


@pytest.mark.parametrize("backbone", [b if b != "resnet50" else pytest.param(b, marks=pytest.mark.hard) for b in BACKBONES])
def test_every_backbone_trains_and_starts_from_published_files(backbone, tmp_path):
    """One update with two resolutions; weights in torchvision's, SwAV's or DINO's layout give the backbone, bit for bit."""
    options, width = BACKBONES[backbone]
    cfg = M.Config(**M.PRESETS["smoke"] | options | {"backbone": backbone, "method": "daino" if backbone == "vit" else "suave"})
    cfg = replace(cfg, stage="semi", labels="2", steps=1, warmup=0, image_size=32, out_dir=str(tmp_path / "r"))
    assert 0 <= M.train(cfg)["prototypes"] <= 100
    net = M.Net(cfg, 6, 6)
    x = torch.rand(2, 3, 32, 32)
    assert net.eval().features([x])[0].shape == (2, width)
    body = net.body.state_dict()
    if backbone == "vit":
        state, names = {k.replace("patch_embed.", "patch_embed.proj."): v for k, v in body.items()}, ["dino.pth"]
    else:
        state, names = {f"module.{k}": v for k, v in body.items()}, ["swav.pth.tar", "plain.pth"]
    for name in names:
        kept = {"state_dict": state} if name == "swav.pth.tar" else {k.removeprefix("module."): v for k, v in state.items()}
        if backbone == "vit":  # a full training file: the student, as Daino's script takes it
            zero = {f"module.backbone.{k}": torch.zeros_like(v) for k, v in kept.items()}
            kept = {"student": {f"module.backbone.{k}": v for k, v in kept.items()}, "teacher": zero}
        torch.save(kept, tmp_path / name)
        other = M.Net(replace(cfg, seed=1), 6, 6).eval()
        assert not torch.equal(other.features([x])[0], net.features([x])[0])
        M.load_init(other, str(tmp_path / name), cfg)
        assert torch.equal(other.features([x])[0], net.features([x])[0])
        assert not torch.equal(other.prototypes, net.prototypes)


def test_a_queue_holds_whole_batches(tmp_path):
    cfg = replace(M.Config(**M.PRESETS["smoke"]), method="suave", stage="semi", steps=1, warmup=0, queue=40)
    M.train(replace(cfg, out_dir=str(tmp_path)))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["queue"]["z"].shape == (2, 32, 16)
    with pytest.raises(ValueError, match="--queue 15 is shorter than the 16 unlabelled pictures"):
        M.train(replace(cfg, queue=15, out_dir=str(tmp_path / "b")))


def test_fine_tuning_keeps_prototypes_unless_told(tmp_path):
    cfg = replace(CFG, method="suave", stage="semi")
    old = M.Net(cfg, 9, 9)
    M.ckpt.export(tmp_path / "w.safetensors", old.state_dict())
    kept, reset, semi = (M.Net(cfg, 9, 9) for _ in range(3))
    M.load_init(kept, str(tmp_path / "w.safetensors"), replace(cfg, stage="finetune"))
    M.load_init(reset, str(tmp_path / "w.safetensors"), replace(cfg, stage="finetune", reset_prototypes=True))
    M.load_init(semi, str(tmp_path / "w.safetensors"), cfg)
    assert torch.equal(kept.prototypes, old.prototypes) and torch.equal(kept.out.weight, old.out.weight)
    assert not torch.equal(reset.prototypes, old.prototypes) and torch.equal(reset.probes[1].weight, old.probes[1].weight)
    assert torch.equal(semi.body.stem.weight, old.body.stem.weight) and not torch.equal(semi.out.weight, old.out.weight)


def test_cifar100_splits_have_the_papers_counts():
    labels = np.repeat(np.arange(100), 500)
    for n, total in ((4, 400), (25, 2500), (100, 10000)):
        rows = data.pick(labels, n, 0)
        assert len(rows) == total and (np.bincount(labels[rows]) == n).all()
        assert np.array_equal(rows, data.pick(labels, n, 0)) and not np.array_equal(rows, data.pick(labels, n, 1))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--method", "paws"], ["--method paws", "suave"]),
        (["--stage", "first"], ["--stage first"]),
        (["--labels", "0"], ["--labels 0"]),
        (["--labels", "900"], ["900 samples a class"]),
        (["--tau_t", "0.2"], ["--tau_t"]),
        (["--accum", "2"], ["--accum"]),
        (["--global_scale", "0"], ["--global_scale"]),
        (["--data", "nowhere"], ["nowhere", "data_prep/"]),
        (["--init", "nowhere.safetensors"], ["--init nowhere.safetensors"]),
        (["--pretrain", "0.8", "--finetune", "0.4"], ["--pretrain"]),
        (["--ssl_prototypes", "40", "--method", "ssl"], ["40 prototypes cannot be balanced over 16 rows", "--queue"]),
    ],
)
def test_wrong_input_ends_in_one_sentence(flags, words, tmp_path):
    user_error(inside(M, *SMALL, "--out_dir", tmp_path / "r", *flags), *words)
