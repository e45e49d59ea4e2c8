"""methods/pareto_eval.py: fronts and volumes against brute force, knobs, groups, folders of other generators, wrong input."""

import csv
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common import ddp, scenes, vae
from common.vit import CLIP, TextTransformer, ViT
from methods import pareto_eval as M
from tests.helpers import both, inside, run, user_error

SMALL = ["--preset", "smoke"]


def test_front_and_volume_constants():
    P = [(1, 3), (2, 2), (3, 1), (1, 1)]
    assert M.pareto_front(P).tolist() == [True, True, True, False]
    assert M.hypervolume(P, (0, 0)) == 6
    assert M.hypervolume([(2, 1, 1), (1, 2, 1), (1, 1, 2)], (0, 0, 0)) == 4
    assert M.pareto_front([(1, 1), (1, 1), (0, 1)]).tolist() == [True, True, False]  # equal points stay
    assert M.pareto_front([(1, math.nan), (0, 0)]).tolist() == [False, True]
    assert M.hypervolume([(1, 0), (0, 5), (math.nan, 2)], (0, 0)) == 0 and M.hypervolume([], (0, 0)) == 0


def test_front_equals_brute_force_and_ignores_the_scale():
    P = torch.randint(0, 8, (200, 3), generator=torch.Generator().manual_seed(0)).double()
    P[::17, 1] = math.nan
    rows = P.tolist()

    def beaten(a):
        return any(all(x >= y for x, y in zip(b, a)) and any(x > y for x, y in zip(b, a)) for b in rows if not math.isnan(b[1]))

    want = [not math.isnan(a[1]) and not beaten(a) for a in rows]
    assert M.pareto_front(P).tolist() == want
    assert M.pareto_front(torch.stack([P[:, 0].exp(), P[:, 1] * 3 - 7, P[:, 2] ** 3], 1)).tolist() == want


def test_volume_equals_counting_cells():
    rng = np.random.default_rng(0)
    for d in (2, 3, 4):
        P = rng.integers(0, 5, (12, d))
        cells = np.stack(np.meshgrid(*[np.arange(5)] * d, indexing="ij"), -1).reshape(-1, d)
        want = sum(any((p > c).all() for p in P) for c in cells)
        assert M.hypervolume(P, [0] * d) == want
        inner = P[M.pareto_front(P)].min(0) * 0
        assert M.hypervolume(np.concatenate([P, inner[None]]), [0] * d) == want  # a dominated point changes nothing
        assert M.hypervolume(np.concatenate([P, [[5] * d]]), [0] * d) == 5**d


def test_diversity_and_realism_equal_pairs():
    f, r = torch.randn(5, 7), torch.randn(4, 7)
    cos = torch.nn.functional.cosine_similarity
    want = np.mean([1 - cos(f[i], f[j], 0).item() for i in range(5) for j in range(i)])
    assert M.diversity(f) == pytest.approx(want, abs=1e-6)
    assert M.diversity(f * 9) == pytest.approx(M.diversity(f)) and math.isnan(M.diversity(f[:1]))
    unit = torch.nn.functional.normalize(f, dim=1)  # Adjoint Matching's mean squared distance is twice that
    assert (unit[:, None] - unit[None]).square().sum(2).sum().item() / 20 == pytest.approx(2 * want, rel=1e-4)
    want = np.mean([max(cos(a, b, 0).item() for b in r) for a in f])
    assert M.realism(f, r) == pytest.approx(want, abs=1e-6) and math.isnan(M.realism(f, r[:0]))


def test_dsg_score():
    chain, yes = {1: False, 2: True, 3: True}, {1: True, 2: True, 3: True}
    parents = {1: [], 2: [1], 3: [2]}
    assert M.dsg_score(chain, parents) == 0 and M.dsg_score(chain, parents, transitive=False) == pytest.approx(1 / 3)
    assert M.dsg_score(chain, {}) == pytest.approx(2 / 3) and M.dsg_score(yes, parents) == 1
    assert M.dsg_score(chain, {3: [2], 2: [1]}) == 0  # children may come before their parents
    assert M.dsg_score({1: True, 2: True}, {1: [2], 2: [1]}) == 1  # a cycle of answered questions
    ring = {1: [3], 2: [1], 3: [2]}  # one of three failed: all of them, or the next one only
    assert M.dsg_score(chain, ring) == 0 and M.dsg_score(chain, ring, transitive=False) == pytest.approx(1 / 3)
    assert M.dsg_score({1: False, 2: True}, {1: [1], 2: [2, 9]}) == 0.5  # its own parent; an unknown one
    assert math.isnan(M.dsg_score({}, {}))
    assert M.parse_parents("1,2, 4") == ["1", "2", "4"] == M.parse_parents("1;2;4.0") and M.parse_parents("0") == []
    assert M.dsg_score({"1": False, "2": True}, {"2": M.parse_parents("right, 1")}) == 0  # "right" is no question


def test_dsg_agrees_with_people_as_published(shared):
    got = M.against_people(shared / "prompts", transitive=False)
    want = {"mplug": (0.457, 0.375), "instructblip": (0.435, 0.358), "pali17b": (0.566, 0.455)}
    for vqa, (rho, tau) in want.items():
        assert got[f"{vqa}_spearman"] == pytest.approx(rho, abs=5e-4) and got[f"{vqa}_kendall"] == pytest.approx(tau, abs=5e-4)
    assert got["pictures"] == 795


def test_rank_correlations():
    a, b = [1, 2, 2, 4, 5], [3, 1, 2, 5, 5]
    assert M.spearman(a, a) == pytest.approx(1) == M.kendall(a, a)
    assert M.spearman(a, [-x for x in a]) == pytest.approx(-1)
    ranks = [1, 2.5, 2.5, 4, 5], [3, 1, 2, 4.5, 4.5]
    assert M.spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    signs = [np.sign((a[i] - a[j]) * (b[i] - b[j])) for i in range(5) for j in range(i)]
    ties = [sum(v[i] != v[j] for i in range(5) for j in range(i)) for v in (a, b)]
    assert M.kendall(a, b) == pytest.approx(sum(signs) / math.sqrt(ties[0] * ties[1]))


def test_top_m():
    prompt, score = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0.1, 0.9, 0.5, 0.3, 0.2, 0.3])
    assert M.top_m(score, prompt, 3).tolist() == list(range(6))  # m = n: nothing happens
    assert M.top_m(score, prompt, 2).tolist() == [1, 2, 3, 5] and M.top_m(score, prompt, 1).tolist() == [1, 3]
    assert all(score[M.top_m(score, prompt, m)].mean() >= score.mean() for m in (1, 2))


def test_halves_measure_the_standard_error():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    means = [np.mean([values[i] for i in half]) for half in M.halves(list(range(400)), M.Config(halves=400))]
    assert np.std(means) == pytest.approx(np.std(values) / 20, rel=0.15)


def test_knee_is_on_the_front():
    P = [(0, 1), (0.8, 0.8), (1, 0), (0.5, 0.5), (0.9, 0.3)]
    assert M.knee(P) == 1 and M.knee([(math.nan, 1)]) is None


def test_real_pictures_are_what_the_prompt_says():
    cfg = M.Config(prompts="30", regions=5)
    prompts = M.make_prompts(cfg)
    assert len({p.id for p in prompts}) == 50 and [p.group for p in prompts].count("north") == 5
    for p in prompts:
        real = M.real_scenes(p, 6, 0)
        assert real == M.real_scenes(p, 6, 0) and len(set(real)) > 1
        for s in real:
            assert all(
                M.scenes.answer(s, q) for q in M.scenes.questions(p.scene) if q["kind"] in ("object", "colour", "relation")
            )
            assert s.region == p.group and (not p.group or s.tone == p.scene.tone)
    some, stand_ins = prompts[:30], M.StandIns(M.Config(), M.ddp.Env(0, 1, torch.device("cpu")), prompts)
    own = M.pictures_of([M.real_scenes(p, 1, 0)[0] for p in some])
    assert np.mean(stand_ins.consistency(own, some)) > 0.98 and np.mean(stand_ins.consistency(own.flip(0), some)) < 0.5


def test_quantised_latents():
    z = torch.randn(6, 8, 4, 4)
    assert all(len(M.quantise(z, n)[:, c].unique()) <= n for n in (2, 5) for c in range(8))
    errors = [(M.quantise(z, n) - z).square().mean().item() for n in (2, 3, 5, 9, 17)]
    assert errors == sorted(errors, reverse=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("pareto") / "run"
    done = run("methods/pareto_eval.py", *SMALL, "--out_dir", out, OMP_NUM_THREADS="1")  # as torchrun's processes
    assert done.returncode == 0, done.stderr
    return out, done


def test_search_draws_from_the_nearest_that_are_left():
    """By a slow way: score every picture of the bank with the prompt, drop those drawn before, take the k best."""
    cfg = M.Config(**M.PRESETS["smoke"] | dict(prompts="5", regions=0, per_prompt=3, bank=40))
    prompts = M.make_prompts(cfg)
    world = M.StandIns(cfg, ddp.start(0), prompts)
    bank = M.pictures_of([scenes.scene(i, cfg.seed * 1000 + 700, (1, 2), grid=2) for i in range(40)])
    for k in (3, 8):
        got, used = world.found(k), set()
        assert torch.equal(got, world.found(k)) and len(got) == 15
        for i, p in enumerate(prompts):
            score = world.clip(bank, [p.text] * 40)
            best = [j for j in score.argsort(descending=True).tolist() if j not in used][:k]
            drawn = [int((bank == x).flatten(1).all(1).nonzero()[0, 0]) for x in got[3 * i : 3 * i + 3]]
            assert len(set(drawn)) == 3 and set(drawn) <= set(best)
            used |= set(drawn)


def test_smoke_writes_everything_and_a_second_run_draws_nothing(smoke):
    out, done = smoke
    for words in ("on the front", "guidance 1 to 3", "per region", "knee"):
        assert words in done.stdout
    rows = list(csv.DictReader(open(out / "front.csv")))
    assert {(r["model"], r["knob"], r["value"]) for r in rows} == {
        (m, k, v) for m in ("early", "late") for k, v in (("guidance", "1.0"), ("guidance", "3.0"), ("top_m", "1.0"))
    } | {("search", "neighbours", "2.0"), ("search", "neighbours", "8.0")}
    assert {(r["n_gen"], r["fd"] == "nan") for r in rows} == {("16", False), ("8", True)}  # filtered sets are not compared
    assert all(r["diversity"] == "nan" and r["on_front"] == "0" for r in rows if r["knob"] == "top_m")  # one picture: undefined
    for name in ("fronts.png", "fronts_sets.png", "regions.png", "samples.png"):
        assert Image.open(out / name).width > 300
    before = {p: p.stat().st_mtime_ns for p in (out / "cache").iterdir()}
    again = inside(M, *SMALL, "--out_dir", out)
    assert again.returncode == 0 and {p: p.stat().st_mtime_ns for p in (out / "cache").iterdir()} == before
    damaged = next(iter(before))
    damaged.write_bytes(b"no")
    assert "is damaged and will be made again" in inside(M, *SMALL, "--out_dir", out).stderr


def test_two_processes_measure_the_same(smoke, tmp_path):
    done = both(M, *SMALL, "--out_dir", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r/metrics.json").read_text()) == pytest.approx(
        json.loads((smoke[0] / "metrics.json").read_text()), nan_ok=True, abs=1e-5
    )


def test_guidance_one_is_the_conditional_model():
    painter = M.zoo.load_painter("painter_early")
    noise = painter.noise(2, 0)
    got = painter.draw(["a red star", "a blue ring"], guidance=1.0, steps=2, seed=0)
    z = noise.clone()
    context = painter.read(["a red star", "a blue ring"])
    with torch.no_grad():
        for t, after in ((1.0, 0.5), (0.5, 0.0)):
            z = z + (after - t) * painter.dit(z, torch.full((2,), 999 * t), context=context)
        torch.testing.assert_close(got, painter.vae.decode(z), atol=1e-4, rtol=1e-3)


def test_groups_average_to_the_whole():
    g = torch.Generator().manual_seed(0)
    fake = {"feature": torch.randn(40, 5, generator=g), "prompt": torch.arange(10).repeat_interleave(4),
            "consistency": torch.rand(40, generator=g).double(), "clip": torch.rand(40, generator=g).double()}  # fmt: skip
    cfg = M.Config()
    table = M.axes(fake, fake, 10)
    whole, parts = M.mean(table), [M.mean(table[ids]) for ids in ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9])]
    for p in range(10):  # against a loop
        mine = fake["feature"][fake["prompt"] == p]
        assert table[p, 1] == M.diversity(mine) and table[p, 2] == M.realism(mine, mine)
        assert table[p, 0] == fake["consistency"][fake["prompt"] == p].mean()
    assert M.marginal(fake, fake, list(range(10)), 4, cfg)["recall"] == 1
    few = M.marginal(fake, fake, list(range(10)), 5, cfg)  # no prompt has five
    assert math.isnan(few["fd"]) and few["n_gen"] == 40
    table[3] = math.nan
    assert M.mean(table)["clip"] == pytest.approx(np.nanmean(table[:, 3])) and math.isnan(M.mean(table[3:4])["realism"])
    for k in ("consistency", "diversity", "realism", "clip"):
        assert whole[k] == pytest.approx(0.4 * parts[0][k] + 0.6 * parts[1][k])


# Other generators: folders


@pytest.fixture
def world(tmp_path):
    """Two models' folders, prompts with groups, real pictures, answers of a VQA model."""
    rng = np.random.default_rng(0)

    def pictures(folder, names):
        (tmp_path / folder).mkdir()
        for n in names:
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(tmp_path / folder / f"{n}.png")

    ids = [f"p{i}" for i in range(6)]
    for folder in ("a1", "a2", "b1"):
        pictures(folder, [f"{i}_{j}" for i in ids for j in range(3)])
    pictures("real", [f"{i}_{j}" for i in ids for j in range(2)] + ["other"])
    (tmp_path / "prompts.csv").write_text(
        "id,prompt,group\n" + "".join(f'{i},"a thing, {i}",{"xy"[n % 2]}\n' for n, i in enumerate(ids))
    )
    (tmp_path / "points.csv").write_text("model,knob,value,folder\na,guidance,1,a1\na,guidance,7.5,a2\nb,guidance,1,b1\n")
    lines = [f"{f}/{i}_{j}.png,{q},{'yes' if q < 2 or j else 'no'},{q - 1}" for f in ("a1", "a2", "b1") for i in ids for j in range(3)
             for q in (1, 2)]  # fmt: skip
    (tmp_path / "answers.csv").write_text("file,question_id,answer,dependency_id\n" + "\n".join(lines) + "\n")
    return tmp_path


def flags(world, *more):
    return ["--points", world / "points.csv", "--prompts", world / "prompts.csv", "--real", world / "real", "--answers",
            world / "answers.csv", "--halves", 3, "--out_dir", world / "out", *more]  # fmt: skip


def test_folders_of_any_generator(world):
    done = inside(M, *flags(world))
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(open(world / "out/front.csv")))
    assert [r["model"] for r in rows] == ["a", "a", "b"] and rows[0]["n_real"] == "13" and rows[0]["n_gen"] == "18"
    assert float(rows[0]["consistency"]) == pytest.approx((1 + 1 + 0.5) / 3)
    assert json.loads((world / "out/metrics.json").read_text())["a_realism_gap"] >= 0
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(world / "a1/p0_0.png")  # a changed picture is read again
    first = float(rows[0]["diversity"])
    assert inside(M, *flags(world)).returncode == 0
    assert float(list(csv.DictReader(open(world / "out/front.csv")))[0]["diversity"]) != first


def test_folders_with_inception_features(world, tmp_path):
    torch.manual_seed(0)
    torch.save(M.metrics.FidInception().state_dict(), tmp_path / "w.pth")
    for folder in ("a2", "b1"):
        shutil.rmtree(world / folder)
    (world / "points.csv").write_text("model,knob,value,folder\na,guidance,1,a1\n")
    done = inside(M, *flags(world, "--extractor", "inception", "--weights", tmp_path / "w.pth"))
    assert done.returncode == 0, done.stderr
    assert list(csv.DictReader(open(world / "out/front.csv")))[0]["extractor"] == "inception, pytorch-fid resizing"


def test_answers_of_one_folder_do_not_serve_another(world):
    text = (world / "answers.csv").read_text()
    (world / "answers.csv").write_text(text.replace("b1/p0_0.png,1,yes", "b1/p0_0.png,1,no"))
    assert inside(M, *flags(world)).returncode == 0
    rows = [float(r["consistency"]) for r in csv.DictReader(open(world / "out/front.csv"))]
    assert rows[0] == rows[1] == pytest.approx(rows[2] + 0.5 / 18)
    assert list(M.beginnings("a_b_3")) == ["a_b_3", "a_b", "a"]


def test_wrong_folders(world):
    (world / "a1/stray.png").write_bytes((world / "a1/p0_0.png").read_bytes())
    user_error(inside(M, *flags(world)), "stray.png", "belong to no prompt")
    (world / "a1/stray.png").unlink()
    for j in range(3):
        (world / f"a2/p3_{j}.png").unlink()
    user_error(inside(M, *flags(world)), "a2 has no picture for prompt 'p3'")
    shutil.rmtree(world / "a2")
    user_error(inside(M, *flags(world)), "a2", "holds no images")
    (world / "points.csv").write_text("model,knob,value,folder\nb,guidance,1,b1\n")
    (world / "b1/p0_0.png").write_text("not a picture")
    user_error(inside(M, *flags(world)), "b1/p0_0.png", "--max_bad")
    assert inside(M, *flags(world, "--max_bad", 0.2)).returncode == 0
    (world / "points.csv").write_text("model,knob,value,folder\nb,guidance,high,b1\n")
    user_error(inside(M, *flags(world)), "'high'", "not a number")
    (world / "points.csv").write_text("model,knob\nb,guidance\n")
    user_error(inside(M, *flags(world)), "points.csv", "value is missing")
    (world / "prompts.csv").write_text("id,prompt\np0,a\np0,b\n")
    (world / "points.csv").write_text("model,knob,value,folder\nb,guidance,1,b1\n")
    user_error(inside(M, *flags(world)), "prompts.csv", "twice")


def test_what_points_must_say(world):
    (world / "c").mkdir()
    shutil.copytree(world / "b1", world / "c/b1")
    head = "model,knob,value,folder,given\n"
    (world / "points.csv").write_text(head + "b,guidance,1,b1,text\nc,guidance,1,c/b1,text\n")
    user_error(inside(M, *flags(world)), "lacks 18 pictures of c", "--clip")  # another folder of the same name
    with open(world / "answers.csv", "a") as f:
        f.writelines("c/" + line for line in open(world / "answers.csv").readlines() if line.startswith("b1/"))
    assert inside(M, *flags(world)).returncode == 0
    (world / "points.csv").write_text(head + "b,guidance,1,b1,text\nb,guidance,1,a1,text\n")
    user_error(inside(M, *flags(world)), "two folders for b, guidance 1")
    (world / "points.csv").write_text(head + "b,guidance,1,b1,sound\n")
    user_error(inside(M, *flags(world)), "'sound'", "text or picture")
    (world / "points.csv").write_text(head + "a,guidance,1,a1,text\nb,rate,1,b1,picture\n")
    done = inside(M, *flags(world))
    assert done.returncode == 0 and "picture" in done.stdout
    rows = list(csv.DictReader(open(world / "out/front.csv")))
    assert [r["on_front"] for r in rows] == ["1", "1"]  # each alone with its task
    text = (world / "answers.csv").read_text().replace("b1/p2_0.png", "b1/other.png")
    (world / "answers.csv").write_text(text)
    user_error(inside(M, *flags(world)), "lacks 1 pictures of b, rate 1", "--clip")


def test_one_picture_and_too_few_for_the_neighbours(world):
    (world / "points.csv").write_text("model,knob,value,folder\nb,guidance,1,one\n")
    (world / "prompts.csv").write_text("id,prompt\np0,a\n")
    (world / "one").mkdir()
    with open(world / "answers.csv", "a") as f:
        f.writelines(f"one/p0_{j}.png,1,yes,0\n" for j in range(2))
    shutil.copy(world / "b1/p0_0.png", world / "one")
    user_error(inside(M, *flags(world)), "one picture only")
    shutil.copy(world / "b1/p0_1.png", world / "one")
    done = inside(M, *flags(world))
    assert done.returncode == 0 and next(csv.DictReader(open(world / "out/front.csv")))["recall"] == "nan"


def test_real_pictures_of_no_prompt_leave_two_axes(world):
    for i, path in enumerate(sorted((world / "real").iterdir())):
        path.rename(world / f"real/photo{i}.png")
    done = inside(M, *flags(world))
    assert done.returncode == 0 and "the fronts are without realism" in done.stdout, done.stderr
    rows = list(csv.DictReader(open(world / "out/front.csv")))
    assert any(r["on_front"] == "1" for r in rows) and rows[0]["n_real"] == "13" and rows[0]["realism"] == "nan"


def test_real_pictures_of_groups(world):
    """By prompt, by folder, or all for all, which is said; a group without a picture is named; nobody's label counts twice."""
    done = inside(M, *flags(world, "--k", 2))
    assert "per region, 3 prompts each" in done.stdout and "the same real pictures" not in done.stdout, done.stderr
    for i, path in enumerate(sorted((world / "real").iterdir())):
        path.rename(world / f"real/photo{i}.png")
    done = inside(M, *flags(world, "--k", 2))
    assert "groups are compared with the same real pictures" in done.stdout and "per region" in done.stdout
    for g in "xy":
        (world / "real" / g).mkdir()
    for i in range(13):
        (world / f"real/photo{i}.png").rename(world / "real" / ("x" if i < 5 else "y") / f"photo{i}.png")
    done = inside(M, *flags(world, "--k", 2))
    assert "per region" in done.stdout and "the same real pictures" not in done.stdout
    for g in "xy":
        (world / "real" / g).rename(world / "gone")
        done = inside(M, *flags(world, "--k", 2))
        assert f"no table of groups: {g!r} or one of its prompts has no real picture" in done.stdout, done.stdout
        (world / "gone").rename(world / "real" / g)
    real = {"prompt": torch.full((6,), -1), "group": torch.tensor([0, 1, 1, 0, 1, -1]), "feature": torch.arange(6.0)[:, None]}
    got, poorest = M.real_of_groups(["x", "y"], {"x": [0], "y": [1]}, 1, real)
    assert [got[g]["feature"].flatten().tolist() for g in "xy"] == [[0, 3], [1, 2]] and poorest == "x"
    real["prompt"] = torch.tensor([1, 0, 1, 1, 0, -1])
    got, poorest = M.real_of_groups(["x", "y"], {"x": [0], "y": [1]}, 1, real)
    assert [got[g]["feature"].flatten().tolist() for g in "xy"] == [[1, 4], [0, 2]] and poorest == "x"
    real["prompt"] = torch.tensor([0, 0, 1, 0, 0, -1])
    assert M.real_of_groups(["x", "y"], {"x": [0], "y": [1]}, 1, real)[1] == "y"


def test_group_labels_in_another_order_change_nothing(world):
    values = []
    for x, y in (("x", "y"), ("y", "x")):
        (world / "prompts.csv").write_text(
            "id,prompt,group\n" + "".join(f'p{i},"a thing, p{i}",{x if i % 2 else y}\n' for i in range(6))
        )
        assert inside(M, *flags(world, "--k", 2)).returncode == 0
        found = json.loads((world / "out/metrics.json").read_text())
        values.append({k: v for k, v in found.items() if k.endswith(("_gap", "_worst"))})
    assert values[0] and values[0] == pytest.approx(values[1])


@pytest.mark.parametrize("extractor", ["dinov2", "clip"])
def test_folders_with_other_extractors(extractor, world, tmp_path):
    torch.manual_seed(0)
    (world / "points.csv").write_text("model,knob,value,folder\na,guidance,1,a1\n")
    if extractor == "dinov2":
        state = ViT(28, 14, 64, 1, 1, layer_scale=True).state_dict()
        torch.save({k.replace("patch_embed.", "patch_embed.proj."): v for k, v in state.items()}, tmp_path / "w.pth")
        path, more = tmp_path / "w.pth", []
    else:
        path = M.zoo.WEIGHTS / "clip.safetensors"
        state, meta = vae.read_tensors(path)
        state = {k: v.float() for k, v in state.items()}
        path = tmp_path / "clip.safetensors"
        M.ckpt.export(path, state, act="gelu", heads=dict(visual=4, text=4), **meta)
        more = []
    done = inside(M, *flags(world, "--extractor", extractor, "--weights", path, *more))
    assert done.returncode == 0, done.stderr
    row = next(csv.DictReader(open(world / "out/front.csv")))
    assert row["extractor"].startswith(extractor) and 0 < float(row["realism"]) <= 1


def test_folders_are_filtered_by_clip(world, tmp_path):
    """The best two of three pictures of the point at --at, for a model that has one; their sets against the first two."""
    torch.manual_seed(0)
    sizes = dict(width=16, depth=1, heads=2, out_dim=8)
    net = CLIP(ViT(32, 8, norm_pre=True, patch_bias=False, eps=1e-5, **sizes), TextTransformer(49408, act="gelu", **sizes))
    M.ckpt.export(tmp_path / "clip.safetensors", net.state_dict(), act="gelu", heads=dict(visual=2, text=2))
    pairs = itertools.islice(itertools.product(M.zoo.load_tokenizer().symbols[:256], repeat=2), 48_894)
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(p) for p in pairs)]) + "\n")
    more = ["--clip", tmp_path / "clip.safetensors", "--tokenizer", tmp_path / "merges.txt", "--at", 7.5, "--k", 2]
    done = inside(M, *flags(world, *more))
    assert done.returncode == 0 and "of as many that CLIP likes best" in done.stdout, done.stderr
    rows = {(r["model"], r["knob"], r["value"]): r for r in csv.DictReader(open(world / "out/front.csv"))}
    assert [k for k in rows if k[1] == "top_m"] == [("a", "top_m", "2.0")]
    best, whole = rows["a", "top_m", "2.0"], rows["a", "guidance", "7.5"]
    assert float(best["clip"]) >= float(whole["clip"]) and best["n_gen"] == "12" and whole["n_gen"] == "18"
    found = json.loads((world / "out/metrics.json").read_text())
    assert 0 <= found["a_top_m_2_precision"] <= 1 and 0 <= found["a_first_2_precision"] <= 1
    done = inside(M, *flags(world, "--at", 7.5))  # no CLIP, no score to filter by
    assert done.returncode == 0 and "likes best" not in done.stdout


def test_constant_real_pictures_and_few_prompts(world):
    grey = Image.fromarray(np.full((40, 48, 3), 128, np.uint8))
    for path in (world / "real").iterdir():
        grey.save(path)
    user_error(inside(M, *flags(world)), "all real pictures have the same features")
    assert M.halves([0, 1, 2], M.Config()) == [] and len(M.halves([0, 1, 2, 3], M.Config())) == M.Config().halves


def test_new_answers_do_not_read_pictures_again(world):
    assert inside(M, *flags(world)).returncode == 0
    before = {p: p.stat().st_mtime_ns for p in (world / "out/cache").iterdir()}
    text = (world / "answers.csv").read_text()
    (world / "answers.csv").write_text(text.replace("a1/p0_0.png,1,yes", "a1/p0_0.png,1,no"))
    first = next(csv.DictReader(open(world / "out/front.csv")))["consistency"]
    assert inside(M, *flags(world)).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in (world / "out/cache").iterdir()} == before
    assert float(next(csv.DictReader(open(world / "out/front.csv")))["consistency"]) < float(first)


def test_a_model_without_a_sweep_is_drawn_without_one(tmp_path):
    done = inside(
        M, *SMALL, "--models", "late", "--guidance", "", "--top_m", "", "--sampler_steps", "2", "--out_dir", tmp_path / "r"
    )
    assert done.returncode == 0 and (tmp_path / "r/fronts.png").exists(), done.stderr


def test_a_comma_without_quotes(world):
    (world / "prompts.csv").write_text("id,prompt\np0,a red dog, on a mat\n")
    user_error(inside(M, *flags(world)), "more cells than columns", "quotes")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--models", "newest"], ["--models newest", "early"]),
        (["--neighbours", "1"], ["--neighbours 1", "--per_prompt 2"]),
        (["--neighbours", "2.5"], ["--neighbours 2.5", "whole"]),
        (["--bank", "30"], ["--bank 30", "48 pictures"]),
        (["--prompts", "0"], ["--prompts 0"]),
        (["--guidance", "1,x"], ["--guidance 1,x"]),
        (["--levels", "1"], ["--levels 1", "at least 2"]),
        (["--extractor", "vgg"], ["--extractor vgg", "inception"]),
        (["--extractor", "inception"], ["--weights"]),
        (["--prompts", "file.csv"], ["--prompts file.csv", "--points"]),
        (["--points", "file.csv"], ["--points needs --prompts"]),
        (["--clip", "weights"], ["--tokenizer"]),
        (["--at", "4"], ["--at 4", "--guidance 1,3"]),
        (["--points", "p.csv", "--prompts", "p.csv", "--real", "r"], ["--answers", "--clip"]),
        (["--people", "nowhere"], ["nowhere"]),
        (["--k", "0"], ["--k 0"]),
        (["--models", "late", "--guidance", "", "--sampler_steps", "", "--top_m", ""], ["no point is left"]),
    ],
)
def test_wrong_input_ends_in_one_sentence(flags, words, tmp_path):
    user_error(inside(M, *SMALL, "--out_dir", tmp_path / "r", *flags), *words)
