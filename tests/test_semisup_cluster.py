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
from safetensors.torch import load_file

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
    """Statistical: the claim, by the default run and the probe on the backbone. By prototypes three seeds cannot tell: +3.5 +- 6.5
    over the eight of RESULTS.md, where rounding moves a run by five points."""
    arms = [replace(M.Config(), method="sup,suave", seed=s, out_dir=str(tmp_path / str(s))) for s in range(3)]
    gain = [score["suave_2_backbone"] - score["sup_2_backbone"] for score in map(M.run, arms)]
    assert np.mean(gain) > 4, gain


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


# By hand ---------------------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand():
    """Scores over tau: odds e^2 : 1 and 1 : e^4."""
    scores, target = torch.tensor([[0.2, 0.0], [0.1, 0.5]]), torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    a, b = math.log(1 + math.exp(-2)), math.log(1 + math.exp(-4))
    want = (a + 0.25 * (4 + b) + 0.75 * b) / 2
    assert M.cross_entropy(scores, target, 0.1).item() == pytest.approx(want, abs=1e-6)
    assert M.unlabelled_loss([scores, scores], [target, target], 0.1).item() == pytest.approx(want, abs=1e-6)


def test_each_view_has_its_own_queue():
    P, queue, z = unit(3, 8, 9), M.Queue(2, 4, 8), [unit(4, 8, s) for s in range(3)]
    queue.push(0, z[0])
    queue.push(1, z[1])
    assert torch.equal(queue.z, torch.stack(z[:2]))
    for view in (0, 1):
        want = M.sinkhorn(torch.cat([z[view], z[2]]) @ P.T, 0.05)[-4:]
        torch.testing.assert_close(queue.targets(view, z[2], P, 0.05), want)


@pytest.fixture
def few(monkeypatch):
    """Worlds of at most 120 pictures."""
    real = M.scene_set
    monkeypatch.setattr(M, "scene_set", lambda count, *rest: real(min(count, 120), *rest))


def one_batch(cfg):
    """Network in evaluation mode, whose rows do not see each other, and the pictures of an update."""
    world = M.open_world(cfg, ENV)
    C, ssl = len(world.classes), cfg.stage == "ssl"
    torch.manual_seed(0)
    net = M.Net(cfg, 2 * C if ssl else C, 0 if ssl else C).eval()
    B_u, B_l = M.batch_sizes(cfg)
    u = next(data.endless(world.train, 16, B_u, ENV)) if B_u else None
    y = next(data.endless(world.labelled, 16, B_l, ENV, 1)) if B_l else None
    return net, u, y


def ce(scores, target, tau):
    """Of float targets, row by row."""
    rows = [
        -sum(t * math.log(p) for t, p in zip(a, b) if t) for a, b in zip(target.tolist(), (scores / tau).softmax(1).tolist())
    ]
    return sum(rows) / len(rows)


def test_every_term_of_the_loss_by_hand(few):
    """Suave, three views and mixing: each view's rows alone through the network, then the definition."""
    cfg = replace(CFG, method="suave", stage="semi", smoothing=0.1, tau=0.2, local_crops=1)
    net, u, y = one_batch(cfg)
    rows, lam = M.make_rows(u, y, cfg, ENV, 3)
    with torch.no_grad():
        out = {k: net([x], len(x)) for k, x in rows.items()}
        loss, parts = M.method_loss(net, None, M.Queue(2, 0, 8), u, y, cfg, ENV, 3, 0.04)
    o, hot, a = {k: v[0] for k, v in out.items()}, F.one_hot(y["label"], 9).float(), lam["labelled"]
    target = torch.cat([hot, a * hot + (1 - a) * hot.flip(0)]) * 0.9 + 0.1 / 9
    want = {"labelled": ce(torch.cat([o["labelled"], o["labelled mixed"]]), target, 0.2)}
    want["probes"] = sum(ce(p, hot, 1) for p in out["labelled"][2])
    q1, q2 = (M.sinkhorn(o[f"view {i}"], 0.05) for i in (1, 2))
    pairs = ((2, q1), (3, q1), (1, q2), (3, q2))
    want["unlabelled"] = sum(ce(o[f"view {v}"], q, 0.2) for v, q in pairs) / 4
    m = lam["unlabelled"]
    assert 0.05 < m < 0.95 and a != m and list(rows) == ["labelled", "labelled mixed", "view 1", "view 2", "mixed", "view 3"]
    want["mixed"] = ce(o["mixed"], m * q1 + (1 - m) * q2.flip(0), 0.2)
    for k, v in want.items():
        assert float(parts[k]) == pytest.approx(v, abs=1e-4), k
    total = (24 * want["unlabelled"] + 8 * want["labelled"] + 8 * want["mixed"] + 4 * want["probes"]) / 40
    assert loss.item() == pytest.approx(total, abs=1e-4)


class Scores(torch.nn.Module):
    """A network whose scores are a fixed random map of the mean colour."""

    def __init__(self, seed):
        super().__init__()
        self.W = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed)) / 3

    def forward(self, views, clean=0):
        x = torch.cat([v.mean((2, 3)) for v in views])
        return x @ self.W, x, [x[:clean] @ self.W]


def test_daino_learns_from_the_teacher_and_the_old_centre(few, monkeypatch):
    """Targets of the teacher's other view, at its temperature; then the centre moves, by both views."""
    cfg = replace(CFG, method="daino", stage="semi", local_crops=0)
    _, u, y = one_batch(cfg)
    net, teacher, center = Scores(0), Scores(1), torch.linspace(-0.2, 0.2, 9)[None]
    teacher.register_buffer("center", center.clone())
    rows, lam = M.make_rows(u, y, cfg, ENV, 3)
    assert list(rows) == ["labelled", "labelled mixed", "view 1", "view 2"]  # no mixing of unlabelled pictures
    rows["view 2"] = torch.randn(8, 3, 1, 1).expand(8, 3, 16, 16)  # nothing like view 1
    monkeypatch.setattr(M, "make_rows", lambda *a: (rows, lam))
    above, below = ([f([rows[f"view {i}"]])[0] for i in (1, 2)] for f in (teacher, net))
    _, parts = M.method_loss(net, teacher, M.Queue(2, 0, 8), u, y, cfg, ENV, 3, 0.05)
    q = [((o - center) / 0.05).softmax(1) for o in above]
    want = (ce(below[1], q[0], 0.1) + ce(below[0], q[1], 0.1)) / 2
    assert parts["unlabelled"].item() == pytest.approx(want, rel=1e-4) and parts["mixed"] == 0
    torch.testing.assert_close(teacher.center, 0.9 * center + 0.1 * torch.cat(above).mean(0, keepdim=True))


def test_fixmatch_and_supervised_losses_by_hand(few, monkeypatch):
    cfg = replace(CFG, method="fixmatch", stage="semi")
    net, u, y = one_batch(cfg)
    rows, lam = M.make_rows(u, y, cfg, ENV, 3)
    assert list(rows) == ["labelled", "weak", "strong"] and not lam  # no mixing
    seen = []
    monkeypatch.setattr(M, "fixmatch_loss", lambda *a: (seen.append(a), torch.tensor(2.0))[1])
    hot = F.one_hot(y["label"], 9).float() * 0.99 + 0.01 / 9
    with torch.no_grad():
        loss, parts = M.method_loss(net, None, M.Queue(2, 0, 8), u, y, cfg, ENV, 3, 0.04)
        o = {k: net([x])[0] for k, x in rows.items()}
    assert parts["labelled"].item() == pytest.approx(ce(o["labelled"], hot, 0.1), abs=1e-4)
    assert loss.item() == pytest.approx((parts["labelled"] + 2 + parts["probes"]).item(), abs=1e-5)
    torch.testing.assert_close(seen[0][0], o["weak"], atol=1e-4, rtol=0)
    torch.testing.assert_close(seen[0][1], o["strong"], atol=1e-4, rtol=0)
    assert seen[0][2] == 0.1


def test_queue_is_asked_before_it_is_filled_and_only_when_full(few, monkeypatch):
    cfg = replace(CFG, method="suave", stage="semi", mix=False)
    net, u, y = one_batch(cfg)
    calls = []

    class Spy(M.Queue):
        def targets(self, view, z, prototypes, eps, full=True):
            calls.append(("ask", view, full, z.clone(), eps))
            return M.sinkhorn(z @ prototypes.T, eps)

        def push(self, view, z):
            calls.append(("push", view, z.clone()))

    with torch.no_grad():
        rows, _ = M.make_rows(u, y, cfg, ENV, 2)
        z = [net([rows[f"view {i}"]])[1] for i in (1, 2)]
        for step, full in ((2, False), (3, True), (4, True)):  # 24 rows are full after three batches of 8
            calls.clear()
            M.method_loss(net, None, Spy(2, 24, 8), u, y, cfg, ENV, step, 0.04)
            assert [c[:2] for c in calls] == [("ask", 0), ("ask", 1), ("push", 0), ("push", 1)]
            assert [c[2] for c in calls[:2]] == [full] * 2 and calls[0][4] == 0.05
            for i in (0, 1):
                assert torch.equal(calls[i][3], calls[2 + i][2])
                assert step > 2 or torch.allclose(calls[i][3], z[i], atol=1e-5)


def test_rows_of_methods_and_phases(monkeypatch):
    """Sizes, areas and colours of what each method and phase sees, and the numbers of its draws."""
    seen = []

    def views(batch, kinds, cfg, env, number):
        seen.append((number, kinds))
        return [torch.zeros(2, 3, size, size) for size, _, _ in kinds]

    monkeypatch.setattr(M, "make_views", views)

    def rows(method, stage, labelled=True):
        seen.clear()
        cfg = replace(CFG, method=method, stage=stage, global_scale="0.3,1", local_scale="0.1,0.3")
        return list(M.make_rows({"label": 0}, {"label": 0} if labelled else None, cfg, ENV, 4)[0])

    assert rows("suave", "ssl", False) == ["view 1", "view 2", "view 3", "view 4"]  # nothing is mixed in phase A
    (number, kinds), S, near = seen[0], (16, (0.3, 1.0)), (16, (0.8, 1.0))
    assert number == 13 and [k[:2] for k in kinds] == [S, S, (8, (0.1, 0.3)), (8, (0.1, 0.3))]
    strong = kinds[0][2]
    assert kinds[1][2] == kinds[2][2] == strong and strong.jitter == (0.8, 0.8, 0.8, 0.2)
    assert (strong.jitter_p, strong.grey_p, strong.blur_p, strong.solarise_p, strong.flip_p) == (0.8, 0.2, 0.5, 0, 0.5)
    assert rows("suave", "semi") == ["labelled", "labelled mixed", "view 1", "view 2", "mixed", "view 3", "view 4"]
    assert [n for n, _ in seen] == [12, 13] and seen[0][1][0][:2] == S
    plain = seen[0][1][0][2]
    assert plain.jitter == (0.4, 0.4, 0.4, 0.1) and (plain.jitter_p, plain.grey_p, plain.blur_p) == (0.8, 0.2, 0)
    assert rows("suave", "finetune") == ["labelled", "labelled mixed", "view 1", "view 2", "mixed"]
    light, weak = seen[0][1][0][2], seen[1][1][0][2]
    assert light.jitter == (0.1, 0.1, 0.1, 0) and light.jitter_p == 0.8 and light.grey_p == light.blur_p == 0
    assert weak.jitter_p == weak.grey_p == weak.blur_p == 0 and weak.flip_p == 0.5 and seen[1][1][1][2] == weak
    assert rows("daino", "semi") == ["labelled", "labelled mixed", "view 1", "view 2", "view 3", "view 4"]
    of = [(c.jitter, c.jitter_p, c.grey_p, c.blur_p, c.solarise_p) for _, _, c in seen[1][1]]
    want = [((0.4, 0.4, 0.2, 0.1), 0.8, 0.2, p, s) for p, s in ((1, 0), (0.1, 0.2), (0.5, 0), (0.5, 0))]
    assert of == want and seen[0][1][0][2] == plain
    assert rows("fixmatch", "semi") == ["labelled", "weak", "strong"]
    assert [k[:2] for k in (*seen[0][1], *seen[1][1])] == [near, near, S] and seen[0][1][0][2] == seen[1][1][0][2] == weak
    assert seen[1][1][1][2] == strong


def test_evaluation_asks_every_head_in_its_order(monkeypatch):
    """Features by hand: prototypes of any length are taken at length 1; heads that answer 0, 1, 2 and 3."""
    cfg = replace(CFG, method="suave", stage="semi")
    net = M.Net(cfg, 4, 4)
    h, hidden, z = torch.ones(4, 32), torch.ones(4, 16), torch.zeros(4, 8)
    z[:, 0], z[:, 1] = 2.0, 1.0
    with torch.no_grad():
        net.prototypes.zero_()
        net.prototypes[0, 0], net.prototypes[1, 1], net.prototypes[2, 2], net.prototypes[3, 3] = 0.1, 50, 1, 1
        for i, probe in enumerate(net.probes, 1):
            probe.weight.zero_()
            probe.bias.copy_(F.one_hot(torch.tensor(i), 4).float())
    order = torch.tensor([2, 0, 3, 1])  # parts come in another order than rows
    y = torch.tensor([0, 0, 0, 1])
    part = {"image": torch.zeros(4, 3, 16, 16, dtype=torch.uint8), "label": y[order], "row": order}
    monkeypatch.setattr(M.data, "parts_of", lambda *a: [part])
    monkeypatch.setattr(net, "features", lambda views: (h, hidden, z) if not net.training else None)
    score, scores, labels = M.evaluate(net, M.World(None, None, [], None), cfg, ENV)
    assert score == {"prototypes": 75, "backbone": 25, "hidden": 0, "output": 0} and labels.tolist() == y.tolist()
    torch.testing.assert_close(scores[0], torch.tensor([2 / math.sqrt(5), 1 / math.sqrt(5), 0, 0]))
    assert net.training
    alone = M.Net(replace(cfg, stage="ssl"), 4, 0)
    monkeypatch.setattr(alone, "features", lambda views: (h, hidden, z))
    assert M.evaluate(alone, M.World(None, None, [], None), cfg, ENV)[0] == {}  # phase A has no labels


def test_probe_on_phase_a_learns_from_the_labelled_and_is_asked_on_the_test_pictures(monkeypatch):
    f = F.one_hot(torch.arange(12) % 3, 3).float()
    sets = {"labelled": [f, f, 1 - f, f, torch.arange(12) % 3], "test": [f, f.roll(1, 1), 1 - f, f, torch.arange(12) % 3]}
    monkeypatch.setattr(M, "open_world", lambda cfg, env: M.World("train", "test", ["a", "b", "c"], "labelled"))
    monkeypatch.setattr(M, "load_init", lambda *a: None)
    monkeypatch.setattr(M, "embed", lambda net, pictures, cfg, env: sets[pictures])
    assert M.probe_offline(replace(CFG, method="suave", stage="ssl")) == {"backbone": 100, "hidden": 0, "output": 100}


def test_phases_follow_each_other():
    """Shares of the updates, rates, and who starts from whom."""
    cfg = M.Config(steps=100, pretrain=0.5, finetune=0.2, warmup=20, lr=0.4, lr_end=0.1, out_dir="o", labels="2,4")
    a, b, c = M.phases("suave", "4", cfg)
    assert [(p.method, p.stage, p.steps) for p in (a, b, c)] == [("suave", "ssl", 50), ("suave", "semi", 30),
                                                                 ("suave", "finetune", 20)]  # fmt: skip
    assert [p.init for p in (a, b, c)] == ["", "o/ssl_suave_50/model.safetensors", "o/suave_4_semi/model.safetensors"]
    assert [(p.lr, p.lr_end) for p in (a, b, c)] == [(0.4, 0.1), (0.4, 0.1), (pytest.approx(0.04), pytest.approx(0.01))]
    assert [p.warmup for p in (a, b, c)] == [12, 7, 5] and [p.labels for p in (a, b, c)] == ["1", "4", "4"]
    first, then = M.phases("ssl+ft", "4", cfg)
    assert first == replace(a, method="suave") and (then.method, then.stage, then.steps) == ("sup", "semi", 50)
    assert then.init == b.init and then.pretrain == 0 and a.pretrain == 0.5
    for arm in ("sup", "fixmatch"):
        (only,) = M.phases(arm, "2", cfg)
        assert (only.method, only.steps, only.init, only.lr, only.pretrain) == (arm, 100, "", 0.4, 0.5)
    (alone,) = M.phases("suave", "2", replace(cfg, stage="finetune", init="x"))
    assert (alone.steps, alone.init, alone.lr, alone.pretrain) == (100, "x", 0.4, 0)
    assert [p.method for p in M.phases("daino", "2", cfg)] == ["daino"] * 3


def test_projectors_are_those_of_swav_and_dino():
    swav, dino = ([type(m).__name__ for m in M.Net(replace(CFG, head=h), 5, 5).hidden] for h in ("swav", "dino"))
    assert swav == ["Linear", "BatchNorm1d", "ReLU"] and dino == ["Linear", "GELU", "Linear", "GELU"]


@pytest.fixture
def quick(few, monkeypatch):
    """Training alone."""
    monkeypatch.setattr(M, "evaluate", lambda *a: ({"prototypes": 0.0}, None, None))
    monkeypatch.setattr(M, "draw_clusters", lambda *a: None)


SHORT = replace(M.Config(**M.PRESETS["smoke"]), stage="semi", steps=3, warmup=0, log_every=1, save_every=1, image_size=16,
                local_crops=0, batch_size=16)  # fmt: skip


def test_schedules_count_updates_and_epochs(quick, tmp_path, monkeypatch):
    """Rates, decay of matrices alone, the teacher's momentum by phase, its temperature by whole epochs of 120 pictures; prototypes
    and their lengths move after `freeze` updates."""
    seen, saved = {"m": [], "tau": []}, []
    momentum, temperature, save = M.teacher_momentum, M.teacher_temperature, M.ckpt.save
    monkeypatch.setattr(M, "teacher_momentum", lambda *a: (seen["m"].append(a), momentum(*a))[1])
    monkeypatch.setattr(M, "teacher_temperature", lambda *a: (seen["tau"].append(a), temperature(*a))[1])

    def keep(path, done, cfg, **state):
        groups = state["opt"].param_groups
        saved.append((state["net"].prototypes.detach().clone(), state["net"].length.detach().clone(), groups[0]["lr"],
                      [g["weight_decay"] for g in groups]))  # fmt: skip
        save(path, done, cfg, **state)

    monkeypatch.setattr(M.ckpt, "save", keep)
    cfg = replace(SHORT, method="daino", batch_size=64, lr=0.1, lr_end=0.02, wd=0.1, wd_end=0.5, freeze=2, ema_decay=0.8,
                  ema_ssl=0.7, tau_t=0.06, tau_t_epochs=3, out_dir=str(tmp_path / "semi"))  # fmt: skip
    M.train(cfg)
    assert seen["m"] == [(t, 3, 0.8) for t in range(3)] and seen["tau"] == [(e, 0.06, 3) for e in (0, 0, 1)]
    P, g, lr, wd = zip(*saved)
    assert torch.equal(P[0], P[1]) and torch.equal(g[0], torch.ones(9, 1)) and torch.equal(g[0], g[1])
    assert not torch.equal(P[1], P[2]) and not torch.equal(g[1], g[2])
    assert lr == pytest.approx([M.schedule(t, 3, 0, 0.1, 0.02) for t in range(3)]) and lr[0] == 0.1
    assert [w[0] for w in wd] == pytest.approx([0.1, 0.2, 0.4]) and all(w[1] == 0 for w in wd)
    seen["m"].clear()
    M.train(replace(cfg, stage="ssl", steps=1, wd_end=0.0, out_dir=str(tmp_path / "ssl")))
    assert seen["m"] == [(0, 1, 0.7)] and saved[-1][3] == [0.1, 0]


def test_gradients_are_clipped_for_each_parameter(quick, tmp_path, monkeypatch):
    seen, real = [], M.nn.utils.get_total_norm
    monkeypatch.setattr(
        M.nn.utils, "get_total_norm", lambda grads: (seen.extend(g.norm().item() for g in grads), real(grads))[1]
    )
    M.train(replace(SHORT, method="suave", steps=1, grad_clip=0.01, out_dir=str(tmp_path)))
    assert len(seen) > 10 and max(seen) < 0.0101 and sum(n > 0.0099 for n in seen) > 5  # not all of them together


@pytest.mark.parametrize("method", ["suave", "daino"])
def test_run_that_is_stopped_and_goes_on_ends_the_same(method, quick, tmp_path, monkeypatch):
    """Pictures, queue, teacher and centre: the checkpoints and weights are equal bit for bit."""
    real, seen, stop = M.method_loss, [], [99]

    def loss(net, teacher, queue, unlabelled, labelled, cfg, env, step, tau_t):
        if step == stop[0]:
            raise KeyboardInterrupt
        seen.append((step, unlabelled["row"].tolist(), labelled["row"].tolist()))
        return real(net, teacher, queue, unlabelled, labelled, cfg, env, step, tau_t)

    monkeypatch.setattr(M, "method_loss", loss)
    cfg = replace(SHORT, method=method, queue=16, steps=4, mix=False)
    M.train(replace(cfg, out_dir=str(tmp_path / "a")))
    whole, seen[:] = seen[:], []
    stop[0] = 2
    with pytest.raises(KeyboardInterrupt):
        M.train(replace(cfg, out_dir=str(tmp_path / "b")))
    stop[0] = 99
    M.train(replace(cfg, out_dir=str(tmp_path / "b")))
    assert seen == whole and len({tuple(u) for _, u, _ in whole}) == 4
    a, b = (torch.load(tmp_path / k / "last.pt", weights_only=True) for k in "ab")
    parts = ("net", "queue", *(["teacher"] if method == "daino" else []))
    assert all(torch.equal(a[k][name], b[k][name]) for k in parts for name in a[k])
    assert (a["queue"]["z"] if method == "suave" else a["teacher"]["center"]).abs().sum() > 0
    a, b = (load_file(tmp_path / k / "model.safetensors") for k in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_report_says_who_is_ahead(tmp_path, capsys):
    """By the prototypes; of a self-supervised arm, which has none, by the probe on the backbone."""
    cfg = M.Config(out_dir=str(tmp_path), method="sup,ssl,suave", labels="4")
    full = {"backbone": 1.0, "hidden": 2.0, "output": 3.0}
    scores = {"sup": {"prototypes": 40.0, **full}, "ssl": {**full, "backbone": 61.5}, "suave": {"prototypes": 57.2, **full}}
    M.report(cfg, {(a, "4"): s for a, s in scores.items()})
    lines = {x.split("  ")[0]: x.split() for x in capsys.readouterr().out.splitlines()}
    assert lines["Suave beats supervised only"][-4:] == ["40.0", "57.2", "+17.2", "better"]
    assert lines["Suave beats SwAV + linear probe"][-4:] == ["61.5", "57.2", "-4.3", "better"]
    assert lines["Suave"][-4:] == ["57.2", "1.0", "2.0", "3.0"] and "Suave beats FixMatch" not in lines


def test_run_shares_phase_a_and_probes_it_with_each_number_of_labels(tmp_path, monkeypatch):
    trained, probed = [], []

    def train(cfg):
        trained.append((cfg.method, cfg.stage, cfg.labels))
        return {} if cfg.stage == "ssl" else {"prototypes": 1.0}

    monkeypatch.setattr(M, "train", train)
    monkeypatch.setattr(M, "probe_offline", lambda cfg: (probed.append((cfg.stage, cfg.labels)), {"backbone": 2.0})[1])
    monkeypatch.setattr(M, "report", lambda *a: None)
    (tmp_path / "r").mkdir()
    got = M.run(M.Config(method="sup,ssl+ft,suave,ssl", labels="2,4", out_dir=str(tmp_path / "r")))
    ssl, rest = [t for t in trained if t[1] == "ssl"], [t for t in trained if t[1] != "ssl"]
    assert ssl == [("suave", "ssl", "1")] * 2  # of suave and ssl+ft; the longer one of ssl
    assert rest == [(m, "semi", n) for n in "24" for m in ("sup", "sup", "suave")] and probed == [("ssl", "2"), ("ssl", "4")]
    assert got["ssl_4_backbone"] == 2 and got["suave_2_prototypes"] == 1 and len(got) == 8
    assert json.loads((tmp_path / "r/metrics.json").read_text()) == got


def test_share_of_right_pseudo_labels_is_of_all_processes(monkeypatch):
    """One labelled row here, right; four elsewhere, of which one is right. Four rows have no label."""
    q, y = F.one_hot(torch.tensor([0, 1, 2, 0, 1]), 3).float(), torch.tensor([0, -1, -1, -1, -1])
    monkeypatch.setattr(M.ddp, "world_size", lambda: 2)
    monkeypatch.setattr(M.ddp, "all_sum", lambda x: x + torch.tensor([*[1 / 3] * 3, 4, 1]))
    got = M.watch(q, torch.zeros(5, 3), y, replace(CFG, stage="semi"))
    assert got["pseudo"] == 40 and got["spread"].item() == pytest.approx(1) and got["largest"].item() == pytest.approx(1 / 3)


def test_damaged_test_pictures_are_said_by_the_loader_too(tmp_path, capsys, monkeypatch):
    def make(item):
        return str(item[1]), "png", png(Image.new("RGB", (16, 16), (9 * item[1], 0, 0))), {"label": item[1] % 3}

    plan = {"train": [("train", i) for i in range(12)], "test": [("test", i) for i in range(12, 27)]}
    prepare(tmp_path, plan, make, classes=["a", "b", "c"])
    cfg = replace(CFG, data=str(tmp_path), labels="2", stage="semi", memory_gb=0.0)
    net, world, read = M.Net(cfg, 3, 3), M.open_world(cfg, ENV), data.Shards.read
    M.evaluate(net, world, cfg, ENV)
    assert "damaged" not in capsys.readouterr().err

    def some(self, shard, row):
        if row in (4, 7):
            raise data.BadSample("not a picture")
        return read(self, shard, row)

    monkeypatch.setattr(data.Shards, "read", some)
    assert len(M.evaluate(net, world, cfg, ENV)[2]) == 13
    assert "2 of 15 pictures are damaged and left out, sample 4 first" in capsys.readouterr().err
