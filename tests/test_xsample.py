"""methods/xsample.py: the loss against loops and its limits, the graphs, processes, resume, published tests, bad input."""

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
from torch.utils.flop_counter import FlopCounterMode

from common import data, ddp, scenes
from common.tokenizer import Tokenizer
from common.vision import torchvision  # noqa: F401
from common.vit import CLIP, TextTransformer, ViT
from data_prep._write import png, prepare
from methods import xsample as M
from tests.helpers import ROOT, both, in_processes, inside, user_error

N, D = 6, 8


def unit(rows, dim=D, seed=0):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=g, dtype=torch.float64), dim=1)


def text_graph(count=N, seed=1):
    e = unit(count, 5, seed)
    return e @ e.T


def slow(z, graph, tau, tau_s, sample=lambda i, n: i % n):
    """The definition, pair by pair. sample(i, n): which of the n samples row i shows; in two blocks i % n."""
    n, total = len(graph), 0.0
    for i in range(2 * n):
        others = [j for j in range(2 * n) if j != i]
        p = [math.exp(float(z[i] @ z[k]) / tau) for k in others]
        s = [math.exp(float(graph[sample(i, n), sample(k, n)]) / tau_s) for k in others]
        total -= sum(b / sum(s) * math.log(a / sum(p)) for a, b in zip(p, s)) / (2 * n)
    return total


def nt_xent(z, tau):
    """SimCLR."""
    n = len(z) // 2
    logits = (z @ z.T / tau).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n).roll(n))


def supcon_out(z, y, tau):
    """SupCon, the mean over positives outside the logarithm, by loops."""
    y, total = torch.cat([y, y]), 0.0
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        norm = sum(math.exp(float(z[i] @ z[k]) / tau) for k in others)
        positives = [j for j in others if y[j] == y[i]]
        total -= sum(math.log(math.exp(float(z[i] @ z[j]) / tau) / norm) for j in positives) / len(positives) / len(z)
    return total


def test_equals_the_definition():
    z, G = unit(2 * N), text_graph()
    for tau, tau_s in ((0.1, 0.1), (0.5, 0.2)):
        assert M.xclr_loss(z, G, tau, tau_s).item() == pytest.approx(slow(z, G, tau, tau_s), abs=1e-12)


def test_limits_are_simclr_and_supcon():
    z, y = unit(2 * N), torch.tensor([0, 1, 0, 2, 1, 0])
    want = nt_xent(z, 0.1).item()
    for tau_s in (1e-3, 0.0):  # distinct captions
        assert M.xclr_loss(z, text_graph(), 0.1, tau_s).item() == pytest.approx(want, abs=1e-10)
    e = unit(3, 5, 2)[y]  # text of classes
    for graph, tau_s in ((e @ e.T, 1e-2), ((y[:, None] == y).double(), 0.0)):
        assert M.xclr_loss(z, graph, 0.1, tau_s).item() == pytest.approx(supcon_out(z, y, 0.1), abs=1e-10)
    logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
    uniform = -F.log_softmax(logits, 1)[~torch.eye(2 * N, dtype=bool)].mean()
    assert M.xclr_loss(z, text_graph(), 0.1, 1e9).item() == pytest.approx(uniform.item(), abs=1e-8)


def test_identity_graph_is_label_smoothing():
    z, tau_s = unit(2 * N), 0.3
    mass = 1 / (1 + (2 * N - 2) * math.exp(-1 / tau_s))
    rest = (1 - mass) / (2 * N - 2)
    log_p = F.log_softmax((z @ z.T / 0.1).fill_diagonal_(-torch.inf), 1)
    pair = torch.eye(2 * N, dtype=torch.float64).roll(N, 1).bool()
    other = ~pair & ~torch.eye(2 * N, dtype=torch.bool)
    want = -(mass * log_p[pair].sum() + rest * log_p[other].sum()) / (2 * N)
    assert M.xclr_loss(z, torch.eye(N, dtype=torch.float64), 0.1, tau_s).item() == pytest.approx(want.item(), abs=1e-12)


def test_floor_is_the_entropy_and_is_reached():
    G = text_graph()
    entropy = torch.special.entr(M.soft_targets(G, 0.1)).sum(1).mean().item()
    assert M.xclr_loss(unit(2 * N), G, 0.1, 0.1) >= entropy
    e = unit(N, 5, 1)  # the embeddings that made the graph: tau = tau_s, so z z^T = G
    z = torch.cat([e, e])
    assert M.xclr_loss(z, G, 0.1, 0.1).item() == pytest.approx(entropy, abs=1e-10)
    parts = M.diagnostics(M.xclr_loss(z, G, 0.1, 0.1), G, 0.1)
    assert abs(parts["kl"]) < 1e-10 and parts["positives"].item() == pytest.approx(math.exp(entropy)) and parts["others"] == 10
    assert parts["similar"].item() == pytest.approx(G[~torch.eye(N, dtype=torch.bool)].mean().item())
    assert M.diagnostics(torch.tensor(0.0), torch.eye(N), 0.0)["pair"] == 1


def test_gradient_is_p_minus_s():
    z, G = unit(2 * N), text_graph().requires_grad_()
    logits = (z @ z.T / 0.1).requires_grad_()
    own = torch.eye(2 * N, dtype=torch.bool)
    log_p = F.log_softmax(logits.masked_fill(own, -torch.inf), 1).masked_fill(own, 0)
    s = M.soft_targets(G, 0.1)
    (-(s * log_p).sum(1).mean()).backward()
    torch.testing.assert_close(logits.grad, (log_p.exp().masked_fill(own, 0) - s) / (2 * N))
    w = z.clone().requires_grad_()
    M.xclr_loss(w, G, 0.1, 0.1).backward()
    assert G.grad is None and not s.requires_grad
    torch.testing.assert_close(w.grad, ((logits.grad + logits.grad.T) @ z) / 0.1)


def test_order_views_and_scales_do_not_matter():
    z, G = unit(2 * N), text_graph()
    want = M.xclr_loss(z, G, 0.1, 0.2)
    p = torch.randperm(N)
    assert torch.allclose(M.xclr_loss(torch.cat([z[:N][p], z[N:][p]]), G[p][:, p], 0.1, 0.2), want)
    assert torch.allclose(M.xclr_loss(torch.cat([z[N:], z[:N]]), G, 0.1, 0.2), want)
    assert torch.allclose(M.xclr_loss(z, 3 * G, 0.1, 0.6), want)
    assert torch.allclose(M.xclr_loss(z, G + torch.arange(N)[:, None], 0.1, 0.2), want)  # a constant a row
    interleaved = z[torch.arange(2 * N).view(2, N).T.flatten()]  # both views of a sample side by side
    assert slow(interleaved, G, 0.1, 0.2, lambda i, n: i // 2) == pytest.approx(want.item(), abs=1e-12)
    assert not torch.allclose(M.xclr_loss(interleaved, G, 0.1, 0.2), want)  # the loss wants two blocks


def test_rows_sum_to_one_and_the_corners():
    s, log_p = M.soft_targets(text_graph(), 0.1), M.log_student(unit(2 * N), 0.1)
    torch.testing.assert_close(s.sum(1), torch.ones(2 * N, dtype=torch.float64))
    torch.testing.assert_close(log_p.exp().sum(1) - 1, torch.ones(2 * N, dtype=torch.float64))  # the 0 on the diagonal is exp 1
    assert (s.diagonal() == 0).all() and (log_p.diagonal() == 0).all()
    assert M.xclr_loss(unit(2), torch.ones(1, 1), 0.1, 0.1) == 0  # only the view pair remains
    half = unit(2 * N).bfloat16().requires_grad_()
    loss = M.xclr_loss(half, text_graph().bfloat16(), 0.1, 0.1)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(half.grad).all()


# Several processes -----------------------------------------------------------------------------------------------------


def part(env, z, G):
    n = N // env.world
    rows = slice(env.rank * n, (env.rank + 1) * n)
    w = torch.cat([z[:N][rows], z[N:][rows]]).requires_grad_()
    loss = M.xclr_loss(w, G[rows], 0.1, 0.1)
    loss.backward()
    torch.manual_seed(3)
    head = ddp.wrap(torch.nn.Linear(D, 4, dtype=torch.float64), env)  # a projector, whose gradients DDP averages
    M.xclr_loss(F.normalize(head(w.detach()), dim=1), G[rows], 0.1, 0.1).backward()
    of_weights = torch.cat([p.grad.flatten() for p in head.parameters()])
    return loss.detach(), w.grad / env.world, M.diagnostics(loss, G[rows], 0.1), of_weights


def test_two_processes_equal_one(tmp_path):
    z, G = unit(2 * N), text_graph()
    one = part(ddp.Env(0, 1, "cpu"), z, G)
    two = in_processes(2, part, z, G, path=tmp_path)
    assert torch.allclose((two[0][0] + two[1][0]) / 2, one[0], atol=1e-12)
    first, second = (torch.cat([t[1].chunk(2)[v] for t in two]) for v in (0, 1))
    torch.testing.assert_close(torch.cat([first, second]), one[1], atol=1e-10, rtol=0)
    for rank in two:
        torch.testing.assert_close(rank[3], one[3], atol=1e-10, rtol=0)
    assert one[3].abs().max() > 1e-3
    for key in ("kl", "pair", "similar"):
        assert torch.allclose((two[0][2][key] + two[1][2][key]) / 2, one[2][key].double(), atol=1e-6)
    assert two[0][2]["others"] == one[2]["others"] == 10


def batches(pictures, cfg, env, start, seed, size):
    return data.endless(pictures, M.canvas(cfg), size, env, seed, start)


def graphs(env, cfg):
    world = M.open_world(cfg, env)
    batch = next(iter(batches(world.train, cfg, env, 3, 0, 8)))
    u = M.two_views(batch, 3, cfg, env)
    return {k: M.make_graph(cfg_of(cfg, k), world, env.device)(batch, 5) for k in KINDS}, u, batch["row"]


KINDS = ("text", "class", "identity", "tree", "rand_class", "rand_sample")


def cfg_of(cfg, graph):
    return M.replace(cfg, graph=graph, method="xclr")


CFG = M.Config(images_per_class="4", batch_size=8, image_size=16, method="xclr")


def test_graphs_and_views_of_two_processes_are_parts_of_one(tmp_path):
    one, x, row = graphs(ddp.Env(0, 1, torch.device("cpu")), CFG)
    two = in_processes(2, graphs, CFG, path=tmp_path)
    for kind in KINDS:
        assert one[kind].shape == (8, 8) and (one[kind].diagonal() > 0.999).all(), kind
        torch.testing.assert_close(torch.cat([t[0][kind] for t in two]), one[kind], msg=kind)
        assert torch.allclose(one[kind], one[kind].T), kind
    for v in (0, 1):
        torch.testing.assert_close(torch.cat([t[1].chunk(2)[v] for t in two]), x.chunk(2)[v], atol=1e-5, rtol=0)
    assert torch.equal(torch.cat([t[2] for t in two]), row)


def test_what_the_graphs_hold():
    env = ddp.Env(0, 1, torch.device("cpu"))
    world = M.open_world(CFG, env)
    batch = next(iter(batches(world.train, CFG, env, 0, 0, 8)))
    y = batch["label"]
    G = {k: M.make_graph(cfg_of(CFG, k), world, env.device) for k in KINDS}
    assert torch.equal(G["class"](batch, 0), (y[:, None] == y).float())
    family = y // 3
    want = torch.where(y[:, None] == y, 1.0, torch.where(family[:, None] == family, 0.5, 0.0))
    assert torch.equal(G["tree"](batch, 0), want)
    assert torch.equal(G["rand_class"](batch, 0), G["rand_class"](batch, 9))
    assert not torch.equal(G["rand_sample"](batch, 0), G["rand_sample"](batch, 9))
    i, j = 0, 1
    a, b = (set(world.texts[batch["row"][k]].split()) - {"a", "an"} for k in (i, j))
    assert G["text"](batch, 0)[i, j].item() == pytest.approx(len(a & b) / math.sqrt(len(a) * len(b)), abs=1e-6)
    classes = M.make_graph(M.replace(cfg_of(CFG, "text"), text_of="classes"), world, env.device)(batch, 0)
    assert torch.allclose(classes, (y[:, None] == y).float())  # names of one word share none
    twice = {**batch, "row": torch.tensor([0, 1, 1, 2])}  # a sample that a batch holds twice is no negative of itself
    assert G["identity"](twice, 0).tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert M.tree_similarity(["a/b/c", "a/b/d", "e"])[0].tolist() == pytest.approx([1, 0.5, 0])


# Published tests -------------------------------------------------------------------------------------------------------


def test_real_skips_empty_lists_and_in9_counts_minus_one_as_wrong():
    assert M.real_accuracy([1, 2, 3, 4], [[1, 9], [], [2], [4]]) == pytest.approx(100 * 2 / 3)
    assert M.in9_accuracy([0, 1, 2], [5, 5, 6], {0: 5, 1: -1, 2: 6}) == pytest.approx(100 * 2 / 3)


def folder_of(root, names, count=3):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(count):
            Image.new("RGB", (20, 16), (40 * i, 90, 10 * j)).save(root / name / f"{j}.png")


def test_real_finds_pictures_by_their_published_names(tmp_path):
    lists = [[] for _ in range(50_000)]
    lists[2], lists[9] = [7], [8, 9]
    (tmp_path / "real.json").write_text(json.dumps(lists))
    names = {0: "ILSVRC2012_val_00000003", 1: "ILSVRC2012_val_00000010"}

    def make(item):
        return names.get(item[1], "x") if item[0] == "val" else "t", "png", png(Image.new("RGB", (8, 8))), {"label": 0}

    for count in (2, 3):
        plan = {"train": [("train", 0)], "val": [("val", i) for i in range(count)]}
        prepare(tmp_path / str(count), plan, make, classes=["a"])
    cfg = M.replace(CFG, real=str(tmp_path / "real.json"), data=str(tmp_path / "2"))
    assert M.accepted_by_real(cfg) == [[7], [8, 9]]
    with pytest.raises(ValueError, match="under their own file names"):
        M.accepted_by_real(M.replace(cfg, data=str(tmp_path / "3")))


def test_imagenet9_objectnet_and_mit_states_are_read(tmp_path, monkeypatch):
    for variant, names in (("original", ["00_dog", "01_bird"]), ("mixed_same", ["00_dog"]), ("mixed_rand", ["00_dog", "01_a"])):
        folder_of(tmp_path / "in9" / variant / "val", names)
    (tmp_path / "in9/in_to_in9.json").write_text(json.dumps({str(i): 0 if i == 0 else -1 for i in range(1000)}))
    folder_of(tmp_path / "on/images", ["chair_a", "only_here"])
    maps = tmp_path / "on/mappings"
    maps.mkdir()
    (maps / "folder_to_objectnet_label.json").write_text(json.dumps({"chair_a": "Chair", "only_here": "Thing"}))
    (maps / "objectnet_to_imagenet_1k.json").write_text(json.dumps({"Chair": "barber chair; folding chair"}))
    (maps / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps({"0": 2, "1": 0}))
    (maps / "imagenet_to_label_2012_v2").write_text("folding chair\nkit fox\nbarber chair\n")
    assert M.objectnet_classes(tmp_path / "on") == {"chair_a": {0, 1}}
    folder_of(tmp_path / "mit", ["old cat", "new_cat", "old dog", "new dog", "adj dog"], 8)
    cfg = M.replace(CFG, in9=str(tmp_path / "in9"), objectnet=str(tmp_path / "on"), mit_states=str(tmp_path / "mit"))
    env, model = ddp.Env(0, 1, torch.device("cpu")), M.Encoder(CFG).eval()
    out = M.further_tests(model, lambda f: torch.eye(2)[torch.zeros(len(f)).long()], [], [], cfg, env)  # always class 0
    assert out["in9_original"] == 50 and out["objectnet"] == 100 and out["in9_gap"] == 100 - 50
    assert 0 <= out["mit_objects"] <= 100
    monkeypatch.setattr(M, "half_probe", lambda f, y, cfg: y.bincount().tolist())
    out = M.further_tests(model, None, [], [], M.replace(CFG, mit_states=str(tmp_path / "mit")), env)
    assert out == {"mit_attributes": [0, 16, 16], "mit_objects": [16, 24]}  # "adj" is no attribute
    (tmp_path / "in9/in_to_in9.json").write_text('{"0": 0}')
    with pytest.raises(ValueError, match="1,000 classes"):
        M.read_in9(tmp_path / "in9")
    (maps / "folder_to_objectnet_label.json").unlink()
    with pytest.raises(ValueError, match="mappings/folder_to_objectnet_label.json"):
        M.objectnet_classes(tmp_path / "on")


def test_whole_pictures_are_resized_like_torchvision():
    import torchvision.transforms.v2.functional as TF

    x = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    want = M.augment.normalise(TF.resize(x.float() / 255, [24, 24], antialias=True))
    torch.testing.assert_close(M.whole(x, 24), want, atol=1e-4, rtol=0)


def test_no_test_picture_is_trained_on():
    world = M.open_world(M.Config(images_per_class="30"), ddp.Env(0, 1, torch.device("cpu")))
    known = {x.numpy().tobytes() for x in world.train["image"]}
    for name, pictures in world.tests.items():
        assert not known & {x.numpy().tobytes() for x in pictures["image"]}, name
        assert set(pictures["label"].tolist()) == set(range(9)), name


# Runs ------------------------------------------------------------------------------------------------------------------

SMALL = ["--preset", "smoke"]


@pytest.mark.hard
def test_captions_and_classes_teach_what_random_pairs_do_not(tmp_path):
    """Statistical. Untrained features know backgrounds and colours, so the class on misleading backgrounds is what tells. Chance
    is 11; the probe of a network that a random graph has trained is no better than that of one that nothing has."""
    base = M.Config(seed=1, steps=100, batch_size=64, images_per_class="60", width=8, hidden=64, method="xclr", save_every=1000)
    score = {g: M.train(M.replace(base, graph=g, out_dir=str(tmp_path / g))) for g in ("text", "class", "rand_sample")}
    score["untrained"] = M.train(M.replace(base, graph="identity", steps=0, out_dir=str(tmp_path / "untrained")))
    for k in ("mixed_rand", "probe"):
        assert score["rand_sample"][k] < score["untrained"][k] + 3, (k, score)
    assert score["text"]["mixed_rand"] > score["rand_sample"]["mixed_rand"] + 3, score
    assert score["class"]["probe"] > score["rand_sample"]["probe"] + 4, score


def test_one_and_two_processes_and_the_report(tmp_path):
    # without warm-up, or the first update would be of size 0; LARS, since AdamW's steps enlarge the rounding of small gradients
    more = ["--warmup", 0, "--optimiser", "lars", "--lr", 20]
    one = inside(M, *SMALL, "--out_dir", tmp_path / "1", *more)
    assert one.returncode == 0, one.stderr
    for words in ("X-CLR beats CLIP", "other background", "pictures, labels", "it does (ImageNet)"):
        assert words in one.stdout
    a = json.loads((tmp_path / "1/metrics.json").read_text())
    assert {f"{m}_6_probe" for m in ("simclr", "supcon", "clip", "xclr")} <= a.keys()
    assert (tmp_path / "1/xclr_text_6/samples/neighbours.png").exists() and (tmp_path / "1/curves.png").exists()
    two = both(M, *SMALL, "--out_dir", tmp_path / "2", *more)
    assert two.returncode == 0, two.stderr
    for m in ("simclr", "supcon", "clip", "xclr"):
        name = M.arm_of(M.Config(out_dir=""), m, 6).out_dir
        logs = [[json.loads(x) for x in (tmp_path / str(k) / name / "log.jsonl").read_text().splitlines()] for k in (1, 2)]
        for key in logs[0][0].keys() & {"loss", "kl", "pair"}:  # after one update
            assert logs[0][0]["step"] == 1 and logs[0][0][key] == pytest.approx(logs[1][0][key], abs=1e-4), (m, key)


def test_starting_from_a_trained_backbone(tmp_path):
    """--init brings the body, bit for bit, and nothing else; another network's file is refused."""
    old = M.Encoder(CFG)
    M.ckpt.export(tmp_path / "w.safetensors", old.state_dict())
    new = M.Encoder(CFG)
    M.load_backbone(new, tmp_path / "w.safetensors")
    a, b = old.state_dict(), new.state_dict()
    assert all(torch.equal(a[k], b[k]) == k.startswith("body.") for k in a if "weight" in k and a[k].ndim > 1)
    with pytest.raises(ValueError, match="does not hold this backbone"):
        M.load_backbone(M.Encoder(M.replace(CFG, width=CFG.width + 8)), tmp_path / "w.safetensors")


@pytest.mark.hard  # five kills of each script are in test_hard.py
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    args = [sys.executable, "methods/xsample.py", *SMALL, "--steps", "60", "--save_every", "5", "--method", "xclr"]
    subprocess.run([*args, "--out_dir", tmp_path / "a"], cwd=ROOT, check=True, capture_output=True)
    p = subprocess.Popen([*args, "--out_dir", tmp_path / "b"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last, deadline = tmp_path / "b/xclr_text_6/last.pt", time.time() + 120
    while not last.exists() and time.time() < deadline:
        time.sleep(0.02)
    p.kill()
    p.wait()
    assert not (tmp_path / "b/metrics.json").exists()
    subprocess.run([*args, "--out_dir", tmp_path / "b"], cwd=ROOT, check=True, capture_output=True)
    for name in ("xclr_text_6/model.safetensors", "metrics.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Labelled, captioned shards and a tiny CLIP."""
    out = tmp_path_factory.mktemp("d")
    fields, texts, _ = M.scene_set(80, 0, 20, "")

    def make(item):
        split, i = item
        img = Image.fromarray(fields["image"][i].permute(1, 2, 0).numpy()).resize((30, 20))
        return (
            str(i),
            "png",
            png(img),
            {"captions": [texts[i]], "label": int(fields["label"][i]) % 4, "coarse": int(fields["label"][i]) % 2},
        )

    plan = {"train": [("train", i) for i in range(48)], "test": [("test", i) for i in range(48, 80)]}
    names = ["red fox", "tree", "sea", "old car"]
    prepare(out / "s", plan, make, per_shard=20, classes=names, coarse_classes=["one", "two"])
    torch.manual_seed(0)
    tok = Tokenizer.train(texts, 600)
    tok.save(out / "merges.txt")
    clip = CLIP(ViT(16, 8, 64, 1, 1, act="quick_gelu", eps=1e-5, out_dim=16), TextTransformer(len(tok), 77, 64, 1, 1, 16))
    return out, texts, names, tok, clip


def test_real_data_with_precomputed_captions_in_memory_and_from_the_loader(prepared, tmp_path):
    out, texts, names, tok, clip = prepared
    keys = [r["key"] for r in data.records(data.Shards(out / "s", "train"))]
    np.save(tmp_path / "e.npy", M.bag_of_words(texts[:48]).half().numpy())
    np.save(tmp_path / "e.ids.npy", np.array([data.text_id(k) for k in keys]))
    args = [*SMALL, "--data", out / "s", "--images_per_class", "0", "--embeddings", tmp_path / "e.npy", "--canvas", 24]
    one = inside(M, *args, "--method", "simclr,clip,xclr", "--out_dir", tmp_path / "a")
    assert one.returncode == 0, one.stderr
    # above --memory_gb the pictures come from the loader
    two = inside(M, *args, "--method", "xclr", "--memory_gb", "0", "--probe", "sgd", "--probe_steps", 20, "--workers", 1,
              "--out_dir", tmp_path / "b")  # fmt: skip
    assert two.returncode == 0, two.stderr
    got = [json.loads((tmp_path / k / "metrics.json").read_text()) for k in "ab"]
    assert {"xclr_0_probe", "xclr_0_knn"} <= got[0].keys() & got[1].keys()
    for graph in ("tree", "text"):
        r = inside(M, *SMALL, "--data", out / "s", "--images_per_class", "5", "--method", "xclr", "--graph", graph,
                "--text_of", "classes", "--optimiser", "lars", "--out_dir", tmp_path / graph)  # fmt: skip
        if graph == "text":
            user_error(r, "needs --embeddings")
        else:
            assert r.returncode == 0, r.stderr
    (tmp_path / "flat.txt").write_text("a\nb\nc\nd\n")
    r = inside(M, *SMALL, "--data", out / "s", "--method", "xclr", "--graph", "tree", "--tree", tmp_path / "flat.txt",
               "--images_per_class", "5", "--out_dir", tmp_path / "flat")  # fmt: skip
    user_error(r, "no hierarchy")
    other = inside(M, *SMALL, "--method", "simclr", "--images_per_class", "0", "--out_dir", tmp_path / "a")  # the same folder
    user_error(other, "other settings", "data was")


def test_captions_alone_are_probed_on_another_set(prepared, tmp_path):
    """As in the paper, from CC3M to ImageNet: the training set has captions and neither labels nor a test split."""
    out, texts, *_ = prepared
    fields, texts, _ = M.scene_set(40, 9, 20, "")

    def make(i):
        return str(i), "png", png(Image.fromarray(fields["image"][i].permute(1, 2, 0).numpy())), {"captions": [texts[i]]}

    prepare(tmp_path / "cc", {"train": list(range(40))}, make)
    keys = [r["key"] for r in data.records(data.Shards(tmp_path / "cc", "train"))]
    np.save(tmp_path / "e.npy", M.bag_of_words(texts).half().numpy())
    np.save(tmp_path / "e.ids.npy", np.array([data.text_id(k) for k in keys]))
    args = [*SMALL, "--data", tmp_path / "cc", "--images_per_class", "0", "--method", "clip,xclr", "--embeddings",
            tmp_path / "e.npy"]  # fmt: skip
    user_error(inside(M, *args, "--out_dir", tmp_path / "r"), "no split val or test")
    done = inside(M, *args, "--probe_data", out / "s", "--out_dir", tmp_path / "r")
    assert done.returncode == 0 and "X-CLR beats CLIP" in done.stdout, done.stderr
    got = json.loads((tmp_path / "r/metrics.json").read_text())
    assert {"clip_0_probe", "clip_0_knn", "xclr_0_probe", "xclr_0_knn"} == got.keys()
    sgd = inside(M, *args, "--probe_data", out / "s", "--probe", "sgd", "--probe_steps", 5, "--method", "xclr", "--out_dir",
                 tmp_path / "s")  # fmt: skip
    assert sgd.returncode == 0, sgd.stderr
    env, cfg = ddp.start(0), M.Config(data=str(tmp_path / "cc"), probe_data=str(out / "s"), images_per_class="0", image_size=16)
    world = M.open_world(cfg, env)
    assert len(world.train["image"]) == 40 and len(world.taught["image"]) == 48 and world.kinds == 4 and not world.classes
    user_error(inside(M, *SMALL, "--probe_data", out / "s", "--out_dir", tmp_path / "t"), "--probe_data goes with --data")


def test_cache_text_writes_what_the_tower_says(prepared, tmp_path, monkeypatch):
    from data_prep import cache_text as C

    out, texts, names, tok, clip = prepared
    monkeypatch.setattr(C, "load_clip", lambda path, act="": clip)
    monkeypatch.setattr(C.Tokenizer, "from_clip", lambda path: tok)
    cfg = C.Config(str(out / "s"), str(tmp_path / "e.npy"), "clip", "merges", batch_size=7)
    rows = C.run(cfg)
    keys = [r["key"] for r in data.records(data.Shards(out / "s", "train"))]
    with torch.no_grad():
        want = F.normalize(clip.encode_text(tok(texts[:48])), dim=1)
    torch.testing.assert_close(torch.from_numpy(np.array(rows)).float(), want, atol=2e-3, rtol=0)
    assert np.array_equal(M.read_embeddings(str(tmp_path / "e.npy"), keys), rows)
    hole = np.lib.format.open_memmap(tmp_path / "e.npy", "r+")  # interrupted: rows of zeros are encoded again
    hole[10:14] = 0
    hole.flush()
    assert np.array_equal(C.run(cfg), rows) and np.load(tmp_path / "e.npy")[10].any()
    classes = C.Config(str(out / "s"), str(tmp_path / "c.npy"), "clip", "merges", classes=True)
    assert C.run(classes).shape == (4, 16) and len(M.read_embeddings(str(tmp_path / "c.npy"), names)) == 4
    with pytest.raises(ValueError, match="other texts"):
        C.run(M.replace(classes, out=cfg.out))
    with pytest.raises(ValueError, match="another --clip or --template"):
        C.run(M.replace(classes, template="a bad drawing of {}"))


def test_embeddings_that_do_not_fit(tmp_path):
    np.save(tmp_path / "e.npy", np.ones((3, 2), np.float16))
    np.save(tmp_path / "e.ids.npy", np.array([data.text_id(k) for k in "abc"]))
    path = str(tmp_path / "e.npy")
    assert M.read_embeddings(path, list("abc")).shape == (3, 2)
    with pytest.raises(ValueError, match="a row for each"):
        M.read_embeddings(path, list("abcd"))
    with pytest.raises(ValueError, match="other samples"):
        M.read_embeddings(path, list("acb"))
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="cannot be read"):
        M.read_embeddings(str(tmp_path / "bad.npy"), list("abc"))
    from safetensors.numpy import save_file

    save_file({"embedding": np.eye(3, dtype=np.float32)}, tmp_path / "e.safetensors")
    assert M.read_embeddings(str(tmp_path / "e.safetensors"), list("abc")).shape == (3, 3)
    for bad in (np.nan, np.inf, 0):
        with pytest.raises(ValueError, match="NaN, infinity or a row of zeros"):
            M.unit_rows(np.full((2, 2), bad), "captions")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--method", "moco"], ["--method moco", "simclr"]),
        (["--graph", "text,tree"], ["--graph", "unknown"]),
        (["--tau", "0"], ["--tau"]),
        (["--images_per_class", "few"], ["--images_per_class few"]),
        (["--template", "a photo"], ["--template"]),
        (["--data", "nowhere", "--method", "simclr"], ["nowhere", "data_prep/"]),
        (["--method", "xclr", "--embeddings", "nowhere.npy"], ["nowhere.npy", "does not exist"]),
        (["--method", "xclr", "--graph", "tree", "--tree", "nowhere"], ["nowhere"]),
        (["--init", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["--batch_size", "1"], ["--batch_size"]),
        (["--batch_size", "4", "--accum", "4"], ["--batch_size 4", "at least 2 for each of --accum 4 parts"]),
        (["--accum", "3"], ["cannot be cut"]),
        (["--grad_clip", "-1"], ["--grad_clip -1", "at least 0"]),
        (["--probe_l2", "nan"], ["--probe_l2"]),
        (["--text_width", "0"], ["--text_width 0"]),
        (["--in9", "."], ["--in9 .", "bg_challenge"]),
    ],
)
def test_wrong_input_ends_in_one_sentence(flags, words, tmp_path):
    user_error(inside(M, *SMALL, "--out_dir", tmp_path / "r", *flags), *words)


def test_xclr_costs_no_more_than_simclr():
    """A step counts at most 0.5 % more multiplications: the graph's, nothing twice (seconds are in RESULTS.md's speed table)."""
    env = ddp.Env(0, 1, torch.device("cpu"))
    cfg = M.replace(CFG, images_per_class="30", batch_size=64)
    world = M.open_world(cfg, env)
    batch, model = next(iter(batches(world.train, cfg, env, 0, 0, 64))), M.Encoder(cfg)
    x = M.two_views(batch, 0, cfg, env)
    flops = {}
    for method in ("simclr", "xclr"):
        c = M.arm_of(cfg, method, "30")
        graph = M.make_graph(c, world, env.device)
        with FlopCounterMode(display=False) as counter:
            M.method_loss(model, batch, x, graph, None, 0, c)[0].backward()
        flops[method] = counter.get_total_flops()
    print(flops)
    assert flops["simclr"] <= flops["xclr"] < 1.005 * flops["simclr"]


# By hand ---------------------------------------------------------------------------------------------------------------

ENV = ddp.Env(0, 1, torch.device("cpu"))


def test_effective_positives_are_of_all_processes(monkeypatch):
    """Two rows of a graph of four, entropy e; the other process says e + 1: exp of the mean, and the others are 2 * 4 - 2."""
    G = torch.tensor([[1.0, 0.2, 0.5, 0.1], [0.2, 1.0, 0.3, 0.4]])
    entropy = torch.special.entr(M.soft_targets(G, 0.1)).sum(1).mean()
    monkeypatch.setattr(M.ddp, "world_size", lambda: 2)
    monkeypatch.setattr(M.ddp, "all_sum", lambda x: x + entropy + 1)
    parts = M.diagnostics(torch.tensor(3.0), G, 0.1)
    assert parts["positives"].item() == pytest.approx(math.exp(entropy + 0.5), rel=1e-5) and parts["others"] == 6
    assert parts["kl"].item() == pytest.approx(3 - entropy.item(), abs=1e-5)  # of this process's rows
    assert parts["similar"].item() == pytest.approx((0.2 + 0.5 + 0.1 + 0.2 + 0.3 + 0.4) / 6)


class Means(torch.nn.Module):
    """Means of the channels as backbone features, three more as projections; no parameter is trained."""

    def __init__(self):
        super().__init__()
        self.log_scale, self.body = torch.nn.Parameter(torch.tensor(1.5)), self.Body()

    class Body(torch.nn.Module):
        out_dim = 3

        def forward(self, x):
            assert not self.training
            return x.mean((2, 3))

    def forward(self, images, ids=None):
        z = F.normalize(images.mean((2, 3)) + torch.tensor([0.0, 0.3, 0.6]), dim=1)
        return z if ids is None else (z, F.normalize(ids.float(), dim=1))


def test_loss_of_each_method_is_its_own():
    """Both temperatures where they belong, both views of CLIP's pictures with the caption, its scale through exp."""
    model, x, ids = Means(), torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.eye(4)[:, :3] + 0.1
    G = torch.rand(4, 4)
    cfg = replace(CFG, tau=0.3, tau_s=0.05)
    batch = {"row": torch.arange(4)}
    loss, parts = M.method_loss(model, batch, x, lambda b, step: G * step, None, 2, cfg)
    assert loss.item() == pytest.approx(M.xclr_loss(model(x), 2 * G, 0.3, 0.05).item(), abs=1e-6)
    assert parts()["kl"].item() == pytest.approx((loss - torch.special.entr(M.soft_targets(2 * G, 0.05)).sum(1).mean()).item())
    loss, parts = M.method_loss(model, batch, x, None, ids, 0, replace(cfg, method="clip"))
    z, t = model(x), F.normalize(ids, dim=1)
    want = 0
    for view in (z[:4], z[4:]):
        logits = math.exp(1.5) * view @ t.T
        want += (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))).item() / 4
    assert loss.item() == pytest.approx(want, abs=1e-6) and parts()["scale"].item() == pytest.approx(math.exp(1.5))


@pytest.mark.parametrize("kind, dtype", [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_network_runs_in_the_asked_precision_and_the_loss_in_float32(kind, dtype):
    model, seen = M.Encoder(CFG), []
    model.body.register_forward_hook(lambda module, args, out: seen.append(module.stem(args[0]).dtype))
    loss, _ = M.method_loss(model, {}, torch.randn(8, 3, 16, 16), lambda b, s: torch.eye(4), None, 0, replace(CFG, dtype=kind))
    assert seen == [dtype] and loss.dtype == torch.float32


def test_encoder_gives_unit_rows_of_pictures_and_texts():
    x, ids = torch.randn(4, 3, 16, 16), torch.randint(1, 9, (2, 8))
    z, t = M.Encoder(CFG, 9)(x, ids)
    for rows in (M.Encoder(CFG)(x), z, t):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


def test_arms_have_the_graphs_of_their_names():
    """SimCLR and SupCon are limits of X-CLR: their graph, tau_s = 0, no text."""
    cfg = M.Config(graph="tree", tree="t", embeddings="e.npy", text_of="classes", tau_s=0.2, steps=7)
    got = {m: M.arm_of(cfg, m, "30") for m in M.SEES}
    of = {m: (a.graph, a.tau_s, a.steps, a.embeddings, a.tree) for m, a in got.items()}
    assert of["xclr"] == ("tree", 0.2, 7, "e.npy", "t") and got["xclr"].text_of == "classes"
    assert of["supcon"] == ("class", 0, 7, "", "") and of["simclr"] == ("identity", 0, 7, "", "")
    assert of["untrained"] == ("identity", 0, 0, "", "") and of["clip"][2] == 7
    assert all(a.method == m and a.images_per_class == "30" for m, a in got.items())
    assert len({a.out_dir for a in got.values()}) == 5 and got["xclr"].out_dir.endswith("xclr_tree_30")


def test_views_are_random_pairs_of_the_same_picture(monkeypatch):
    """Rows i and i + N show one picture, differently; the step, the view and the seed count."""
    x = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    for i in range(3):
        x[i, i] = torch.arange(100, 228, 8, dtype=torch.uint8)  # red, green and blue ramps
    batch = {"image": x, "side": torch.full((3, 2), 16)}
    v = M.two_views(batch, 5, CFG, ENV)
    assert v.shape == (6, 3, 16, 16) and v.mean((2, 3)).argmax(1).tolist() == [0, 1, 2, 0, 1, 2]
    assert all(not torch.equal(v[i], v[i + 3]) for i in range(3))
    others = [M.two_views(batch, 6, CFG, ENV), M.two_views(batch, 5, replace(CFG, seed=1), ENV)]
    assert torch.equal(v, M.two_views(batch, 5, CFG, ENV)) and not any(torch.equal(v, o) for o in others)
    seen = []
    monkeypatch.setattr(M.augment, "view", lambda x, sides, u, *rest: (seen.append(rest), x.float() / 255)[1])
    for jitter in ("light", "full"):
        M.two_views(batch, 0, replace(CFG, jitter=jitter, image_size=112, crop_scale=0.2), ENV)
    (size, scale, light), (_, _, full) = seen[0], seen[-1]
    assert (size, scale) == (112, (0.2, 1.0)) and seen[0] == seen[1] and len(seen) == 4
    assert light.jitter == (0.4, 0.4, 0.4, 0.0) and light.grey_p == 0  # captions name colours
    assert full.jitter == (0.8, 0.8, 0.8, 0.2) and full.jitter_p == 0.8
    assert full.grey_p == 0.2 and full.blur_p == full.flip_p == 0.5
    assert full.blur == light.blur == pytest.approx((0.05, 1.0))  # SimCLR's 0.1 to 2 at 224 pixels


def test_graph_of_classes_by_their_embeddings_and_by_chance(tmp_path):
    """By label, not by row; rows of any length; a random graph belongs to the seed."""
    e = np.array([[2.0, 0], [0, 3], [5, 5]], np.float32)
    np.save(tmp_path / "e.npy", e)
    world = M.World({}, {}, {}, list("abcdef"), [""] * 6, ["x", "y", "z"], list("xyz"), 3, {})
    batch = {"row": torch.tensor([5, 0, 3]), "label": torch.tensor([2, 0, 1])}
    cfg = replace(CFG, graph="text", text_of="classes", embeddings=str(tmp_path / "e.npy"))
    h = math.sqrt(0.5)
    want = torch.tensor([[1, h, h], [h, 1, 0], [h, 0, 1]])
    torch.testing.assert_close(M.make_graph(cfg, world, ENV.device)(batch, 0), want)
    np.save(tmp_path / "six.npy", np.array([[1.0, 0], [0, 0.1], [1, 1], [0, 7], [1, 0], [3, 3]], np.float32))
    cfg = replace(cfg, text_of="captions", embeddings=str(tmp_path / "six.npy"))  # rows 5, 0 and 3
    torch.testing.assert_close(M.make_graph(cfg, world, ENV.device)(batch, 0), want)
    for kind in ("rand_class", "rand_sample"):
        one, two = (M.make_graph(replace(CFG, graph=kind, seed=s), world, ENV.device)(batch, 4) for s in (0, 1))
        assert not torch.equal(one, two) and 0 <= one.min() and one.max() == 1
    assert M.bag_of_words(["a red red cat", "the cat"]).tolist() == [[1, 2], [1, 0]]  # counts; cat, red


def test_embedding_follows_the_rows_whatever_the_order_of_parts(monkeypatch):
    x = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 16, 16) * 60
    fields = {"image": x, "label": torch.tensor([3, 2, 1, 0]), "row": torch.arange(4)}
    parts = [{k: v[i] for k, v in fields.items()} for i in (torch.tensor([2, 0]), torch.tensor([3, 1]))]
    monkeypatch.setattr(M.data, "parts_of", lambda *a: parts)
    f, y, row = M.embed(Means().eval(), fields, CFG, ENV)
    assert row.tolist() == [0, 1, 2, 3] and y.tolist() == [3, 2, 1, 0]
    assert f[:, 0].tolist() == sorted(f[:, 0].tolist()) and f[0, 0] < f[3, 0]


def coloured(colours, labels):
    """Pictures of one colour each, 0 red, 1 green."""
    x = torch.zeros(len(colours), 3, 16, 16, dtype=torch.uint8)
    x[torch.arange(len(colours)), torch.tensor(colours)] = 255
    return {"image": x, "side": torch.full((len(x), 2), 16), "label": torch.tensor(labels), "row": torch.arange(len(x))}


@pytest.mark.parametrize("kind", ["lbfgs", "sgd"])
def test_probes_learn_from_the_taught_pictures_and_are_asked_on_the_test_pictures(kind, monkeypatch):
    """Taught: red 0, green 1. Test: three of four the other way round; own background right, another one half. k-NN and the
    attribute, whose answers are the colours, likewise; the pictures that the encoder was trained on are labelled wrongly."""
    taught = coloured([0, 1] * 12, [0, 1] * 12)
    tests = {
        "test": coloured([0, 1, 0, 1], [1, 0, 1, 1]),
        "mixed_same": coloured([0, 1], [0, 1]),
        "mixed_rand": coloured([0, 1], [0, 0]),
    }
    known = {"colour": (1 - taught["label"], torch.tensor([1, 0, 0, 0]))}
    wrong = {**taught, "label": 1 - taught["label"]}
    neighbours, real = [], M.metrics.knn_accuracy
    monkeypatch.setattr(M.metrics, "knn_accuracy", lambda *a: (neighbours.append(a[4]), real(*a))[1])
    world, model = M.World(wrong, taught, tests, [], [], ["a", "b"], [], 2, known), Means()
    got = M.evaluate(model, world, replace(CFG, probe=kind, probe_steps=30, crop_scale=1.0), ENV)
    want = {"probe": 25, "knn": 25, "colour": 75, "mixed_same": 100, "mixed_rand": 50, "gap": 50}
    assert got == want and neighbours == [20] and model.training and model.body.training


def test_sgd_probe_forgets_the_length_of_features_and_ends_at_rate_0(monkeypatch):
    rates, real = [], M.optim.set_lr
    monkeypatch.setattr(M.optim, "set_lr", lambda opt, lr: (rates.append(lr), real(opt, lr))[1])
    probe = M.sgd_probe(Means().eval(), coloured([0, 1] * 8, [0, 1] * 8), replace(CFG, probe_steps=5), ENV, 2)
    assert rates == pytest.approx([10 * 0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(5)])
    f = torch.randn(3, 3)
    torch.testing.assert_close(probe(f), probe(50 * f))


def test_half_probe_is_asked_on_the_other_random_half():
    g = torch.Generator().manual_seed(0)
    f, y = torch.randn(60, 80, generator=g), torch.randint(2, (60,), generator=g)
    assert M.half_probe(f, y, CFG) < 80  # noise is learned by heart, on its own half
    y = torch.arange(60) // 30  # sorted by class, as folders are
    assert M.half_probe(F.one_hot(y).float(), y, CFG) == 100


def test_real_is_scored_by_rows_and_objectnet_without_its_border(tmp_path, monkeypatch):
    monkeypatch.setattr(M, "accepted_by_real", lambda cfg: [[0], [1], [], [2]])
    out = M.further_tests(None, None, [0, 2, 9], [0, 3, 2], replace(CFG, real="real.json"), ENV)  # picture 1 is damaged
    assert out == {"real": 100}
    img = Image.new("RGB", (20, 12), (255, 0, 0))
    img.paste((0, 0, 255), (2, 2, 18, 10))
    (tmp_path / "chair").mkdir()
    img.save(tmp_path / "chair" / "0.png")
    cut = M.ObjectNet(tmp_path).read(0, 0)["image"]
    assert cut.size == (16, 8) and (np.asarray(cut) == (0, 0, 255)).all()


def test_backgrounds_go_with_the_class_mostly_always_or_never():
    rng = np.random.default_rng(0)
    for i in (0, 5, 8):
        own = (tuple(scenes.TONES)[i % 3], scenes.PATTERNS[i // 3])
        share = {
            how: np.mean([M.backgrounds(scenes.SHAPES[i], rng, how) == own for _ in range(1000)])
            for how in ("", "same", "rand")
        }
        assert share["same"] == 1 and share["rand"] == 0 and abs(share[""] - 0.8) < 0.05
    assert len({M.backgrounds(s, rng, "same") for s in scenes.SHAPES}) == 9


def test_generated_world_keeps_pictures_captions_and_attributes_together(monkeypatch):
    calls, real = [], M.scene_set

    def few(count, seed, size, part, how=""):
        calls.append((seed, part, how))
        return real(40 if part == "test" else count, seed, size, part, how)

    monkeypatch.setattr(M, "scene_set", few)
    M.open_world.cache_clear()
    world = M.open_world(replace(CFG, seed=2, images_per_class="3"), ENV)
    M.open_world.cache_clear()
    assert calls == [(8, "train", ""), (9, "test", ""), (10, "test", "same"), (11, "test", "rand")]
    assert list(world.tests) == ["test", "mixed_same", "mixed_rand"] and world.taught is world.train
    colours, rows = list(scenes.COLOURS), world.train["row"].tolist()
    assert len(rows) == 27 and world.train["label"].bincount().tolist() == [3] * 9
    for row, label, colour in zip(rows, world.train["label"].tolist(), world.attributes["colour"][0].tolist()):
        assert scenes.SHAPES[label] in world.texts[row] and colours[colour] in world.texts[row]
    fields, texts, values = real(40, 9, 16, "test")
    assert torch.equal(fields["image"], world.tests["test"]["image"])
    assert all(torch.equal(world.attributes[k][1], values[k]) for k in ("colour", "texture", "size"))
    assert all(colours[c] in t for c, t in zip(values["colour"].tolist(), texts))
    assert world.paths[:1] == [f"{next(iter(scenes.FAMILIES))}/{scenes.SHAPES[0]}"]


@pytest.fixture
def quick(monkeypatch):
    """A world with 40 pictures for each test, and training alone."""
    real = M.scene_set
    monkeypatch.setattr(M, "scene_set", lambda n, *rest: real(n if "train" in rest else 40, *rest))
    monkeypatch.setattr(M, "evaluate", lambda *a: {"probe": 0.0})
    monkeypatch.setattr(M, "draw_neighbours", lambda *a: None)
    M.open_world.cache_clear()
    yield
    M.open_world.cache_clear()


SHORT = M.Config(**M.PRESETS["smoke"] | dict(batch_size=8, accum=2, warmup=0, steps=3, log_every=1, save_every=1, image_size=16,
                                             optimiser="lars", lr=0.1, wd=0.0, method="xclr"))  # fmt: skip


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_update_is_the_mean_of_its_micro_batches(clip, quick, tmp_path, monkeypatch):
    """A loss of (number + 1) times the sum of a bias, whose gradients LARS does not scale: means 1.5, 3.5 and 5.5, the rate a
    cosine over updates, 0.1, 0.05 and 0; views and graphs are numbered by micro-batches, of four pictures."""
    views, numbers = [], []

    def loss(model, batch, images, graph, ids, number, cfg):
        numbers.append((number, len(batch["row"])))
        value = (number + 1) * ddp.raw(model).head[1].bias.sum()
        return value + 0 * model(images).sum(), lambda: {"kl": value}

    real = M.two_views
    monkeypatch.setattr(M, "method_loss", loss)
    monkeypatch.setattr(M, "two_views", lambda batch, number, *a: (views.append(number), real(batch, number, *a))[1])
    M.train(replace(SHORT, grad_clip=clip, out_dir=str(tmp_path)))
    assert views == [0, 1, 2, 3, 4, 5] and numbers == [(i, 4) for i in range(6)]
    first, second = (0.5 / math.sqrt(32),) * 2 if clip else (1.5, 3.5)
    want = -0.1 * first - 0.05 * (0.9 * first + second)
    bias = load_file(tmp_path / "model.safetensors")["head.1.bias"]
    torch.testing.assert_close(bias, torch.full((32,), want), rtol=1e-4, atol=1e-6)
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines() if "lr" in x]
    assert [x["lr"] for x in lines] == pytest.approx([0.1, 0.05, 0]) and [x["step"] for x in lines] == [0, 1, 2]
    assert lines[0]["loss"] == 0 and (clip or lines[1]["loss"] == pytest.approx(-0.15 * 32 * 3.5, rel=1e-4))


def test_run_that_is_stopped_and_goes_on_sees_what_it_would_have_seen(quick, tmp_path, monkeypatch):
    """Also with micro-batches; the weights end bit for bit the same."""
    real, seen, stop = M.method_loss, [], [99]

    def loss(model, batch, images, graph, ids, number, cfg):
        if number == stop[0]:
            raise KeyboardInterrupt
        seen.append((number, batch["row"].tolist()))
        return real(model, batch, images, graph, ids, number, cfg)

    monkeypatch.setattr(M, "method_loss", loss)
    M.train(replace(SHORT, out_dir=str(tmp_path / "a")))
    whole, seen[:] = seen[:], []
    stop[0] = 4
    with pytest.raises(KeyboardInterrupt):
        M.train(replace(SHORT, out_dir=str(tmp_path / "b")))
    stop[0] = 99
    M.train(replace(SHORT, out_dir=str(tmp_path / "b")))
    assert seen == whole and len({tuple(rows) for _, rows in whole}) == 6
    a, b = (load_file(tmp_path / k / "model.safetensors") for k in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_clip_reads_the_captions_of_its_own_pictures_and_bounds_its_scale(quick, tmp_path, monkeypatch):
    read, seen, steps = [], [], []

    class Words:
        def __len__(self):
            return 9

        def __call__(self, texts, length):
            read.extend(texts)
            return torch.ones(len(texts), length, dtype=torch.long)

    def loss(model, batch, images, graph, ids, number, cfg):
        seen.extend(batch["row"].tolist())
        steps.append(model.log_scale.item())
        return 0 * model(images, ids)[0].sum() - model.log_scale, dict  # the scale would grow without bound

    monkeypatch.setattr(M.Tokenizer, "train", lambda texts, size: Words())
    monkeypatch.setattr(M, "method_loss", loss)
    cfg = replace(SHORT, method="clip", accum=1, optimiser="adamw", lr=50.0, steps=2, out_dir=str(tmp_path))
    M.train(cfg)
    texts = M.world_of(cfg, ENV).texts
    assert read == [texts[i] for i in seen] and len(set(seen)) > 8
    assert steps == pytest.approx([math.log(1 / 0.07), math.log(100)])


def test_report_says_who_is_ahead(tmp_path, capsys):
    cfg = M.Config(out_dir=str(tmp_path), images_per_class="5", method="clip,supcon,xclr")
    score = {"clip": {"probe": 40.0, "mixed_rand": 30.0}, "supcon": {"probe": 80.0, "mixed_rand": 35.0}}
    M.report(cfg, {(m, "5"): s for m, s in (*score.items(), ("xclr", {"probe": 57.2, "mixed_rand": 29.0}))})
    lines = {x.split("  ")[0]: x.split() for x in capsys.readouterr().out.splitlines()}
    assert lines["X-CLR beats CLIP on the same captions"][-7:-4] == ["40.0", "57.2", "+17.2"]
    assert lines["... also on misleading backgrounds"][-3:] == ["30.0", "29.0", "-1.0"]
    assert "-22.8" in lines["X-CLR beats SupCon, which sees the labels"] and "X-CLR beats SimCLR" not in lines


def test_what_an_arm_lacks_is_said_before_training(monkeypatch):
    bare = M.World({"row": torch.arange(9)}, {}, {}, ["k"] * 9, [""] * 9, [], [], 0, {})
    monkeypatch.setattr(M, "world_of", lambda cfg, env: bare)
    cfg = M.Config(data="d", images_per_class="0", batch_size=4)
    for method, words in (("supcon", "--method supcon needs labels"), ("clip", "--method clip needs captions")):
        with pytest.raises(ValueError, match=words):
            M.check_arms([M.arm_of(cfg, method, "0")], ENV)
    with pytest.raises(ValueError, match="--graph tree needs labels"):
        M.check_arms([M.arm_of(replace(cfg, graph="tree"), "xclr", "0")], ENV)
    with pytest.raises(ValueError, match="--text_of classes needs labels"):
        M.check_arms([M.arm_of(replace(cfg, graph="text", text_of="classes"), "xclr", "0")], ENV)
    with pytest.raises(ValueError, match="--batch_size 10 is more than the 9 training pictures"):
        M.check_arms([M.arm_of(replace(cfg, batch_size=10), "simclr", "0")], ENV)
    M.check_arms([M.arm_of(replace(cfg, batch_size=18, accum=2), "simclr", "0")], ENV)
    bare.kinds = 9
    with pytest.raises(ValueError, match="need ImageNet's 1,000 classes, the probe has 9"):
        M.check_arms([replace(M.arm_of(cfg, "simclr", "0"), in9="folder")], ENV)


def test_damaged_pictures_of_the_tests_are_said_counted_and_refused(tmp_path, capsys):
    folder_of(tmp_path / "val", ["00_dog", "01_bird"], 8)
    Image.new("RGB", (20, 16)).save(tmp_path / "val/stray.png")  # in no class
    source, model, cfg = data.Folder(tmp_path / "val"), Means().eval(), replace(CFG, max_bad=0.002)
    assert M.of_folder(model, source, cfg, ENV)[1].tolist() == [0] * 8 + [1] * 8 and not capsys.readouterr().err
    (tmp_path / "val/00_dog/3.png").write_bytes(b"no picture")
    assert len(M.of_folder(model, source, cfg, ENV)[1]) == 15
    assert "val: 1 of 17 pictures are damaged and left out, sample 3 first" in capsys.readouterr().err
    for name in ("01_bird/0.png", "01_bird/1.png"):
        (tmp_path / "val" / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match="val: 3 of 17 pictures are damaged, more than --max_bad 0.002"):
        M.of_folder(model, source, cfg, ENV)
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="17 of 17 pictures are damaged"):
        M.of_folder(model, source, replace(cfg, max_bad=1.0), ENV)


@pytest.mark.parametrize("coarse, names", [(2, ["one", "two"]), (-1, ["one", "two"]), ("one", ["one", "two"]), (0, [])])
def test_coarse_classes_that_do_not_exist(coarse, names, tmp_path):
    def make(item):
        return str(item[1]), "png", png(Image.new("RGB", (16, 16))), {"label": 0, "coarse": coarse}

    prepare(tmp_path, {"train": [("train", 0)], "test": [("test", 1)]}, make, classes=["a"], coarse_classes=names)
    with pytest.raises(ValueError, match="coarse classes are not numbers of the manifest's list"):
        M.open_world(replace(CFG, data=str(tmp_path), images_per_class="0"), ENV)
