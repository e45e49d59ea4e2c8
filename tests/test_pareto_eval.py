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

from common import ddp, metrics, scenes, vae
from common.vit import CLIP, TextTransformer, ViT
from methods import pareto_eval as M
from tests.helpers import both, inside, run, user_error

SMALL = ["--preset", "smoke"]
CPU = ddp.Env(0, 1, torch.device("cpu"))


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
    (world / "points.csv").write_text("model,knob,value,folder\na,guidance,nan,a1\n")
    user_error(inside(M, *flags(world)), "'nan'", "not finite")
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


# Between the pure functions and a run: roles, knobs, prompts and settings reach what they name


def test_set_metrics_are_those_of_the_named_prompts():
    """Roles, neighbours and rows: real first, k of the settings, the first `count` pictures of each prompt and real ones of no prompt."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(31, 4, generator=g), 0.5 * torch.randn(30, 4, generator=g)
    real = {"feature": x, "prompt": torch.tensor([0, 1, 2, 3, 4] * 6 + [-1])}
    fake = {"feature": y, "prompt": torch.tensor([4, 3, 2, 1, 0] * 6)}
    got = M.marginal(fake, real, [0, 2, 3], 5, M.Config(k=2))
    a = torch.cat([x[real["prompt"] == p] for p in (0, 2, 3, -1)])
    b = torch.cat([y[fake["prompt"] == p][:5] for p in (0, 2, 3)])
    want = metrics.prdc(a, b, 2) | {"fd": metrics.frechet_distance(a, b), "vendi": metrics.vendi(b),
                                    "kd": metrics.kernel_distance(a, b, 10), "n_real": 19, "n_gen": 15}  # fmt: skip
    assert got == pytest.approx(want, abs=1e-9) and want["precision"] > want["recall"]  # little spread: precise, not diverse


def test_fronts_are_taken_within_a_task_and_upwards():
    points = [M.Point("a", "g", i, given=t) for i, t in enumerate(("text", "text", "text", "picture"))]
    values = [(2.0, 2.0), (1.0, 1.0), (3.0, 0.5), (0.1, 0.1)]
    assert M.fronts(points, values) == [True, False, True, True]


def test_a_knob_turns_what_it_names(monkeypatch):
    seen = []

    class Painter:
        def __init__(self, name):
            self.name = name

        def to(self, device):
            return self

        def draw(self, texts, guidance, steps, seed, part):
            seen.append((self.name, texts, guidance, steps, seed))
            return torch.zeros(0)

    monkeypatch.setattr(M.zoo, "load_painter", Painter)
    cfg = M.Config(**M.PRESETS["smoke"] | dict(prompts="2", regions=0, steps=7, at=3.0, seed=5))
    prompts = M.make_prompts(cfg)
    world = M.StandIns(cfg, CPU, prompts)
    for point in (M.Point("early", "guidance", 8.0), M.Point("middle", "steps", 4), M.Point("late", "guidance", 1.0)):
        world.draw(point)
    texts = [prompts[0].text] * 2 + [prompts[1].text] * 2
    assert seen == [("painter_early", texts, 8.0, 7, 5), ("painter_middle", texts, 3.0, 4, 5), ("painter", texts, 1.0, 7, 5)]


def test_the_codec_compresses_other_real_pictures_than_the_reference():
    cfg = M.Config(**M.PRESETS["smoke"] | dict(prompts="4", regions=0, per_prompt=3, real_per_prompt=3, seed=2))
    prompts = M.make_prompts(cfg)
    world = M.StandIns(cfg, CPU, prompts)
    source = M.pictures_of([s for p in prompts for s in M.real_scenes(p, 3, 5)])
    near = world.draw(M.Point("codec", "levels", 65, given="picture"))
    assert ((near - source).flatten(1).square().mean(1) < (near - source.roll(1, 0)).flatten(1).square().mean(1)).all()
    reference = world.measure(None)
    own = M.pictures_of([s for p in prompts for s in M.real_scenes(p, 3, 4)])
    assert torch.equal(reference["image"], torch.from_numpy(M.to_uint8(own)))
    assert not any((reference["image"] == x).flatten(1).all(1).any() for x in torch.from_numpy(M.to_uint8(source)))


def test_pictures_are_measured_with_their_own_prompt(monkeypatch):
    cfg = M.Config(**M.PRESETS["smoke"] | dict(prompts="8", regions=0, per_prompt=3, batch_size=5))
    prompts = M.make_prompts(cfg)
    world = M.StandIns(cfg, CPU, prompts)
    x = M.pictures_of([s for p in prompts for s in M.real_scenes(p, 3, 1)])
    monkeypatch.setattr(world, "draw", lambda point: x)
    got = world.measure(M.Point("late", "guidance", 3))
    assert got["prompt"].tolist() == [i for i in range(8) for _ in range(3)] and got["consistency"].mean() > 0.95
    texts = [p.text for p in prompts for _ in range(3)]
    net, tok = M.zoo.load_clip().eval(), M.zoo.load_tokenizer()
    pil = [Image.fromarray(i) for i in M.to_uint8(x)]
    with torch.no_grad():
        f_img, f_txt = (
            net.encode_image(metrics.clip_input(pil, net.visual.image_size)),
            net.encode_text(tok(texts, net.text.context)),
        )
        cos = torch.cosine_similarity(f_img, f_txt)
        torch.testing.assert_close(got["feature"], M.zoo.load_judge().eval().features(x, 2), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(got["clip"], 100 * cos.double(), atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(
        world.extract([Image.fromarray(i) for i in M.to_uint8(x)]), got["feature"], atol=1e-2, rtol=1e-2
    )  # as files


def test_quantised_values():
    z = torch.randn(50, 2, 4, 4) * 3 + 1
    mean, std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True)
    grid = mean + std * torch.linspace(-2, 2, 5).view(5, 1, 1, 1, 1)
    nearest = (grid - z).abs().argmin(0, keepdim=True)
    torch.testing.assert_close(M.quantise(z, 5), grid.expand(5, *z.shape).gather(0, nearest)[0], atol=1e-5, rtol=1e-5)


def test_the_knee_is_taken_on_scaled_axes():
    assert M.knee([(0.0, 1.0), (0.9, 0.999), (1.0, 0.9)]) == 1
    assert M.knee([(0.0, 100.0), (0.8, 60.0), (1.0, 0.0)]) == 1  # unscaled, the first would win


def test_an_unreadable_picture_shifts_no_other(world):
    (world / "a1/p1_0.png").write_text("not a picture")
    cfg = M.Config(points=str(world / "points.csv"), prompts=str(world / "prompts.csv"), real=str(world / "real"), max_bad=0.1,
                   batch_size=5)  # fmt: skip
    prompts, point = M.read_prompts(cfg.prompts), M.read_points(cfg.points)[0]
    source = M.Folders(cfg, CPU, prompts)
    got = source.scored(point, source.measure(point))
    names = [(i, j) for i in range(6) for j in range(3) if (i, j) != (1, 0)]
    assert got["prompt"].tolist() == [i for i, _ in names]
    for row, (i, j) in enumerate(names):
        torch.testing.assert_close(
            got["feature"][row], source.extract([Image.open(world / f"a1/p{i}_{j}.png")])[0], atol=1e-4, rtol=1e-4
        )


def test_sets_are_compared_at_the_size_of_the_smallest(world):
    (world / "b1/p4_2.png").unlink()
    assert inside(M, *flags(world, "--k", 2)).returncode == 0
    rows = list(csv.DictReader(open(world / "out/front.csv")))
    assert [r["n_gen"] for r in rows] == ["12"] * 3 and "nan" not in [r["fd"] for r in rows]


def test_settings_that_change_pictures_are_drawn_again(tmp_path):
    cfg = M.Config(**M.PRESETS["smoke"] | dict(prompts="2", regions=0))
    prompts, drawn = M.make_prompts(cfg), []

    class Source:
        def measure(self, point):
            drawn.append(point)
            return {"feature": torch.rand(4, 2)}

    def draws(point, cfg, prompts):
        before = len(drawn)
        M.cached(Source(), point, cfg, prompts, tmp_path)
        return len(drawn) - before

    at = M.Point("late", "guidance", 3.0)
    assert draws(at, cfg, prompts) == 1 and draws(at, cfg, prompts) == 0
    changes = dict(seed=1, steps=3, at=1.0, per_prompt=3, real_per_prompt=3, bank=65, extractor="clip", resize="tf1")
    for name, value in changes.items():
        assert getattr(cfg, name) != value and draws(at, M.replace(cfg, **{name: value}), prompts) == 1, name
    assert draws(M.replace(at, value=2.0), cfg, prompts) == 1 and draws(at, cfg, prompts[:1]) == 1


def three_points():
    """Four prompts in two groups, six real pictures each, and as many of three points with known consistency."""
    g = torch.Generator().manual_seed(0)
    prompts = [M.Prompt(f"p{i}", "", "xxyy"[i]) for i in range(4)]
    real = {"feature": torch.randn(24, 3, generator=g), "prompt": torch.arange(4).repeat_interleave(6)}

    def of(score):
        return {"feature": torch.randn(24, 3, generator=g), "prompt": torch.arange(4).repeat_interleave(6),
                "consistency": torch.tensor(score, dtype=torch.float64).repeat_interleave(6), "clip": torch.rand(24, generator=g).double() * 100}  # fmt: skip

    points = [M.Point("m", "guidance", 1.0), M.Point("m", "guidance", 3.0), M.Point("n", "guidance", 3.0)]
    return prompts, real, dict(zip(points, (of([0.2, 0.4, 0.6, 0.8]), of([0.9, 0.7, 0.3, 0.5]), of([1.0, 1.0, 0.0, 0.0]))))


def test_the_report_against_hand_made_points(tmp_path, capsys):
    prompts, real, sets = three_points()
    cfg = M.Config(points="p.csv", halves=6, k=2, at=3.0)
    got = M.report(cfg, prompts, real, sets, tmp_path)
    rows = {p: [np.mean([M.axes(s, real, 4)[i][a] for i in range(4)]) for a in range(3)] for p, s in sets.items()}
    on = M.pareto_front(list(rows.values())).tolist()
    csvs = list(csv.DictReader(open(tmp_path / "front.csv")))
    assert [r["on_front"] for r in csvs] == [str(int(o)) for o in on]
    again = [
        M.pareto_front(np.array([M.axes(s, real, 4)[h, :3].mean(0) for s in sets.values()]))
        for h in M.halves([0, 1, 2, 3], cfg)
    ]
    assert [float(r["stable"]) for r in csvs] == pytest.approx(torch.stack(again).double().mean(0).tolist(), abs=1e-3)
    for r, s in zip(csvs, sets.values()):
        spread = [M.axes(s, real, 4)[h, 0].mean() for h in M.halves([0, 1, 2, 3], cfg)]
        assert float(r["consistency_se"]) == pytest.approx(np.std(spread))
    own = [v for p, v in rows.items() if p.model == "m"]
    assert got["m_volume"] == pytest.approx(M.hypervolume(own, [0] * 3)) and got["m_on_front"] == sum(on[:2])
    out = capsys.readouterr().out
    exclusive = M.hypervolume(list(rows.values()), [0] * 3) - M.hypervolume([rows[p] for p in rows if p.model == "n"], [0] * 3)
    assert next(line for line in out.splitlines() if line.startswith("m ")).split()[-1] == f"{exclusive:.4f}"
    line = next(line for line in out.splitlines() if line.startswith("m: consistency, guidance 1 to 3"))
    assert "0.500  0.600  +0.100 +- " in line  # from, to, difference
    worst = min(np.mean([0.9, 0.7]), np.mean([0.3, 0.5]))
    assert got["m_consistency_worst"] == pytest.approx(worst) and got["m_consistency_gap"] == pytest.approx(0.4)
    line = next(line for line in out.splitlines() if line.startswith("m, guidance 3") and "consistency" in line)
    assert line.split()[-2] == "y"


def test_missing_answers_make_clip_the_score_of_all_points(tmp_path, capsys):
    prompts, real, sets = three_points()
    last = list(sets)[-1]
    sets[last]["consistency"][3] = math.nan
    got = M.report(M.Config(points="p.csv", answers="a.csv", clip="c", halves=4, k=2), prompts, real, sets, tmp_path)
    for p, s in sets.items():
        assert got[f"{p.model}_guidance_{p.value:g}_consistency"] == pytest.approx(s["clip"].mean().item() / 100)


def test_filtered_sets_stand_beside_the_first_pictures():
    prompts, real, sets = three_points()
    p = M.Point("m", "guidance", 3.0)
    keep = M.top_m(sets[p]["clip"], sets[p]["prompt"], 2)
    best = {k: v[keep] for k, v in sets[p].items()}
    cfg = M.Config(k=2, at=3.0)
    got = M.filtered_sets(cfg, [0, 1, 2, 3], real, sets | {M.replace(p, knob="top_m", value=2.0): best})
    for key, s in (("m_top_m_2", best), ("m_first_2", sets[p])):
        want = M.marginal(s, real, [0, 1, 2, 3], 2, cfg)
        assert {k: got[f"{key}_{k}"] for k in M.SETS} == pytest.approx({k: want[k] for k in M.SETS})
    assert got["m_top_m_2_fd"] != got["m_first_2_fd"]


def test_the_plan_of_the_stand_ins():
    cfg = M.Config(models="late,search,codec", guidance="1,3", sampler_steps="2,16", neighbours="6,24", levels="2")
    assert [(p.model, p.knob, p.value, p.given) for p in M.plan(cfg)] == [
        ("late", "guidance", 1, "text"), ("late", "guidance", 3, "text"), ("late", "steps", 2, "text"),  # 16: those at --at
        ("search", "neighbours", 6, "text"), ("search", "neighbours", 24, "text"), ("codec", "levels", 2, "picture")]  # fmt: skip
