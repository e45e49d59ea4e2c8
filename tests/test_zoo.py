"""common/zoo.py and the scripts that train the stand-ins: what they claim holds, and they resume."""

import importlib
import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from common import ckpt, metrics, scenes, zoo
from common.dit import read_tensors
from common.vit import load_clip
from data_prep import cache_latents, train_clip, train_judge, train_reader, train_rewriter, train_vae, train_vqa
from tests.helpers import both, clip_merges, inside, user_error


def pictures(world, size=32):
    return torch.from_numpy(scenes.render(world, size)).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def judge():
    return zoo.load_judge()


def test_weights_are_small_and_described():
    files = sorted(zoo.WEIGHTS.glob("*"))
    assert sum(f.stat().st_size for f in files) < 12 * 2**20
    text = (zoo.WEIGHTS / "README.md").read_text()
    assert all(f.name in text for f in files if f.suffix == ".safetensors")


@pytest.mark.parametrize("grid", [1, 2])
def test_judge_reads_more_than_98_percent(judge, grid):
    x, truth = train_judge.batch(0, 512, 77, (grid,))
    for k, logits in judge(x).items():
        seen = truth[k] >= 0
        assert (logits.argmax(1) == truth[k])[seen].float().mean() > 0.98, k


@pytest.mark.parametrize("grid, size", [(1, 32), (2, 32), (3, 48), (2, 64)])
def test_cells_are_the_cells(grid, size):
    world = [scenes.scene(i, 5, (1, 3), grid=grid) for i in range(4)]
    x = zoo.cells(pictures(world, size), grid)
    assert x.shape == (4 * grid**2, 3, 32, 32)
    for i, s in enumerate(world):
        full = {t.cell for t in s.things}
        spread = x[i * grid**2 : (i + 1) * grid**2].amax((2, 3)).sub(x[i * grid**2 : (i + 1) * grid**2].amin((2, 3))).amax(1)
        assert all((spread[c] > 0.25) >= (c in full) for c in range(grid**2))


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_verify_accepts_the_truth_and_finds_every_error(judge, objects):
    world = [scenes.scene(i, 9, (objects, objects), grid=2) for i in range(40)]
    right = zoo.verify(judge, pictures(world), world)
    assert sum(right["all"]) >= 39
    keys = {"shape", "count", "colour", "size", "texture", "tone", "pattern", "all"}
    assert right.keys() == keys | {1: {"place"}, 2: {"relation"}, 3: {"place", "relation"}}[objects]

    def wrong(change, key):
        other = [change(s) for s in world]
        seen = zoo.verify(judge, pictures(other), world)
        assert sum(seen[key]) <= 4 and sum(seen["all"]) <= 4, key

    def first(**kw):
        return lambda s: replace(s, things=(replace(s.things[0], **{k: f(s.things[0]) for k, f in kw.items()}), *s.things[1:]))

    def after(options, value):
        return options[(list(options).index(value) + 1) % len(options)]

    colours = tuple(scenes.COLOURS)
    wrong(first(colour=lambda t: after(colours, t.colour)), "colour")
    wrong(first(size=lambda t: after(tuple(scenes.SIZES), t.size)), "size")
    wrong(first(texture=lambda t: after(scenes.TEXTURES, t.texture)), "texture")
    wrong(lambda s: replace(s, tone=after(tuple(scenes.TONES), s.tone)), "tone")
    wrong(lambda s: replace(s, pattern=after(scenes.PATTERNS, s.pattern)), "pattern")
    if objects == 1:
        wrong(lambda s: replace(s, things=(replace(s.things[0], cell=3 - s.things[0].cell),)), "place")
        wrong(lambda s: replace(s, things=(*s.things, replace(s.things[0], cell=3 - s.things[0].cell))), "count")
    else:
        a, b = (lambda s: s.things[0].cell), (lambda s: s.things[1].cell)
        wrong(
            lambda s: replace(s, things=(replace(s.things[0], cell=b(s)), replace(s.things[1], cell=a(s)), *s.things[2:])),
            "relation",
        )


def test_autoencoder_keeps_what_the_judge_reads(judge):
    vae = zoo.load_vae()
    world = [scenes.scene(i, 11, (1, 2), grid=2) for i in range(100)]
    x = pictures(world)
    seen = zoo.verify(judge, vae.decode(vae.to_latent(vae.encode(x)[0])), world)
    assert sum(seen["all"]) >= 94
    assert vae.to_latent(vae.encode(x)[0]).std().item() == pytest.approx(1, abs=0.15)


def test_reader_tells_what_captions_name():
    reader, tok = zoo.load_reader(), zoo.load_tokenizer()
    ids, truth = train_reader.batch(0, 256, 123, tok, full=True)
    out = reader(ids)
    for k in ("shape", "colour", "size", "texture", "tone", "pattern"):
        assert (out[k].argmax(-1) == truth[k])[truth[k] >= 0].float().mean() > 0.97, k
    longer = torch.cat([ids, torch.randint(1, 500, (256, 6))], 1)  # behind the end token: not read
    torch.testing.assert_close(reader.hidden(longer)[:, :4], reader.hidden(ids)[:, :4], atol=1e-5, rtol=1e-5)


def test_painter_draws_what_is_asked_for(judge):
    painter = zoo.load_painter()
    world = [scenes.scene(i, 21, (1, 1), grid=2) for i in range(48)]
    prompts = [scenes.caption(s) for s in world]
    images = painter.draw(prompts, seed=3)
    assert sum(zoo.verify(judge, images, world)["all"]) >= 46  # 97 % of single objects are asked for
    two = [scenes.scene(i, 22, (2, 2), grid=2) for i in range(200)]
    right = zoo.verify(judge, painter.draw([scenes.caption(s) for s in two], seed=3), two)
    named = [all(v) for v in zip(*(v for k, v in right.items() if k not in ("all", "count")))]  # one too many is not named
    assert sum(named) >= 160  # 85 % of two objects are asked for, less three standard errors
    assert torch.equal(painter.draw(prompts[:1], seed=3)[0], painter.draw(prompts[:1], seed=3)[0])
    torch.testing.assert_close(painter.draw(prompts[:2], seed=3), images[:2], atol=1e-3, rtol=1e-3)  # whatever else is drawn
    assert not torch.allclose(painter.draw(prompts[:1], seed=4), images[:1], atol=1e-2)
    with pytest.raises(ValueError, match="guidance -1"):
        painter.draw(prompts[:1], guidance=-1)


def test_same_meaning():
    for i in range(60):
        s = scenes.scene(i, 9, (1, 3), grid=2)
        text = scenes.caption(s)
        assert zoo.meaning(text)[3] == () and zoo.same_meaning(text, text)
        for n in scenes.negatives(s, i):
            assert not zoo.same_meaning(text, n["caption"]), (text, n["caption"])
    a = "a small red star to the left of a large blue ring on a dark background"
    for same in ("on a dim backdrop, a huge blue hoop to the right of a tiny scarlet star",
                 "there is a little red star to the left of a big blue ring on a dark background"):  # fmt: skip
        assert zoo.same_meaning(a, same)
    for other in (a.replace("left", "right"), a.replace("red", "green"), a + " with a cat", a.replace("small ", ""),
                  "a small blue star to the left of a large red ring on a dark background"):  # fmt: skip
        assert not zoo.same_meaning(a, other)


def test_rewriter_masks_the_source_and_overfits_32_pairs():
    tok = zoo.load_tokenizer()
    pairs = [train_rewriter.pair(i, 0, tok) for i in range(32)]
    assert pairs == [train_rewriter.pair(i, 0, tok) for i in range(32)]
    ids, mask = train_rewriter.batch(pairs, 120)
    for row, weight, (c, t) in zip(ids.tolist(), mask.tolist(), pairs):
        assert row[: len(c)] == c and sum(weight) == len(t) and weight.index(1.0) == len(c)
        assert zoo.same_meaning(tok.decode(t), tok.decode(c).split(" ; ")[0])
    torch.manual_seed(0)
    net = zoo.Rewriter(len(tok), 48, 2, 2)
    opt = torch.optim.Adam(net.parameters(), 6e-3)
    losses = []
    for _ in range(150):
        loss = train_rewriter.loss_of(net, ids, mask)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * losses[0], (losses[0], losses[-1])
    draw = [net.write(ids[0, :5].tolist(), 2, tok.end, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draw) and len(draw[0]) == 2


def test_rewriters_kept_keys_and_values_change_nothing():
    net, cache, ids = zoo.load_rewriter(), {}, torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net.after(ids[:, :5], 0, cache), net(ids[:, :5])[:, -1])
    for n in range(5, 12):  # one at a time, as they are written
        torch.testing.assert_close(net.after(ids[:, n : n + 1], n, cache), net(ids[:, : n + 1])[:, -1])


@pytest.mark.parametrize("script", ["train_clip", "train_judge", "train_reader", "train_rewriter", "train_vqa"])
def test_trainers_run_and_write_weights(script, tmp_path, monkeypatch):
    for module, count in ((train_clip, 64), (train_judge, 64), (train_rewriter, 2), (train_vqa, 64)):
        monkeypatch.setattr(module, "evaluate", partial(module.evaluate, count=count))
    done = inside(importlib.import_module(f"data_prep.{script}"), "--preset", "smoke", "--out_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.safetensors").exists() and json.loads((tmp_path / "metrics.json").read_text())


@pytest.mark.parametrize("more", [[], ["--gan", 0.5]])
def test_one_and_two_processes_train_the_same_autoencoder(more, tmp_path, monkeypatch):
    """Noise is drawn for the global batch, and the adversarial term is balanced by the gradients of all."""
    flags = ["--preset", "smoke", "--warmup", 1, "--log_every", 1, "--steps", 3, *more]
    if more:
        flags += ["--gan_start", 0]
    assert inside(train_vae, *flags, "--out_dir", tmp_path / "one").returncode == 0
    assert both(train_vae, *flags, "--out_dir", tmp_path / "two").returncode == 0
    one, two = ([json.loads(x) for x in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two"))
    for a, b in zip(one, two):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3)
    assert len(one) == len(two) >= 3


def test_a_clip_of_your_own_pictures(tmp_path):
    """Classes by templates or captions; the weights are read as published ones are; one process and two agree."""
    write = importlib.import_module("data_prep.scenes")
    write.run(write.Config(str(tmp_path / "s"), train=40, val=12, test=0, size=32))
    clip_merges(tmp_path / "merges.txt")
    small = ["--data", tmp_path / "s", "--tokenizer", tmp_path / "merges.txt", "--batch_size", 8, "--width", 16, "--depth", 2,
             "--warmup", 1, "--steps", 3]  # fmt: skip
    done = inside(train_clip, *small, "--out_dir", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    clip = load_clip(tmp_path / "one/model.safetensors").eval()
    x, want = torch.randn(2, 3, 32, 32), zoo.load_clip(tmp_path / "one/model.safetensors")
    assert torch.equal(clip.encode_image(x), want.encode_image(x)) and clip.visual.blocks[0].attn.heads == 4
    assert both(train_clip, *small, "--out_dir", tmp_path / "two").returncode == 0
    for (name, a), b in zip(clip.state_dict().items(), load_clip(tmp_path / "two/model.safetensors").state_dict().values()):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=name)
    user_error(inside(train_clip, "--data", tmp_path / "s"), "belong together")
    user_error(inside(train_clip, *small, "--batch_size", 64), "40 training pictures")
    user_error(inside(train_clip, *small, "--data", tmp_path / "none"), "none")
    user_error(inside(train_clip, *small, "--tokenizer", tmp_path / "none"), "none")


def test_worlds_of_the_trainers_are_disjoint_from_tests():
    assert train_vae.world(3, 0) == scenes.scene(3, 0, (1, 3), grid=3)
    a, b = train_judge.batch(0, 12, 1)[0], train_judge.batch(0, 12, 1)[0]
    assert torch.equal(a, b) and not torch.equal(a, train_judge.batch(0, 12, 2)[0])


def test_latent_cache(tmp_path):
    """Two views of each picture, resumed after a kill, refused for another autoencoder, read by both methods."""
    from common import data

    write = importlib.import_module("data_prep.scenes")
    write.run(write.Config(str(tmp_path / "s"), train=30, val=10, test=0, size=32))
    base = [cache_latents, "--data", tmp_path / "s", "--size", 32, "--views", 2, "--min_crop", 0.5, "--per_shard", 8]
    assert inside(*base, "--out", tmp_path / "a").returncode == 0
    vae = zoo.load_vae()
    train, val = (data.Latents(tmp_path / "a", split, vae.fingerprint()) for split in ("train", "val"))
    few = data.Latents(tmp_path / "a", "train", vae.fingerprint(), keep=2)
    assert all(torch.equal(few.read(s, 0)["mean"], train.read(s, 0)["mean"]) for s in (0, 1, 2, 3, 0)) and len(few.open) == 2
    assert train.sizes == [16, 16, 16, 12] and val.sizes == [8, 2] and train.classes == list(scenes.SHAPES)
    item = train.read(0, 1)
    assert item["mean"].shape == item["logvar"].shape == (8, 8, 8) and item["controls"].shape == (7,) and item["captions"]
    source = data.Shards(tmp_path / "s", "val")
    x = torch.from_numpy(np.asarray(source.read(0, 0)["image"]).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(val.read(0, 0)["mean"], vae.encode(x)[0][0], atol=5e-3, rtol=5e-3)
    assert val.read(0, 0)["controls"].tolist() == [0, 0, 1, 1, 0, 32, 32]
    user_error(inside(cache_latents, "--data", tmp_path / "none", "--out", tmp_path / "n"), "none")
    assert not (tmp_path / "n").exists()  # nothing to stand in the way of the right path
    # interrupted: half the files are there, the manifest says so
    assert inside(*base, "--out", tmp_path / "b").returncode == 0
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    (tmp_path / "b" / "train-000001.safetensors").unlink()
    (tmp_path / "b" / "manifest.json").write_text(json.dumps({**manifest, "complete": False, "shards": []}))
    assert inside(*base, "--out", tmp_path / "b").returncode == 0
    for f in (tmp_path / "a").glob("*.safetensors"):
        assert f.read_bytes() == (tmp_path / "b" / f.name).read_bytes()
    done = both(*base, "--out", tmp_path / "two")  # every second file by either process
    assert done.returncode == 0, done.stderr
    for f in (tmp_path / "a").glob("*.safetensors"):
        assert f.read_bytes() == (tmp_path / "two" / f.name).read_bytes()
    assert json.loads((tmp_path / "two/manifest.json").read_text()) == manifest
    user_error(inside(*base, "--out", tmp_path / "b", "--flip", "0"), "other data or settings")
    write.run(write.Config(str(tmp_path / "t"), train=20, val=0, test=0, size=32))
    user_error(inside(cache_latents, "--data", tmp_path / "t", *base[3:], "--out", tmp_path / "b"), "other data or settings")
    assert inside(cache_latents, "--data", tmp_path / "t", *base[3:], "--out", tmp_path / "d").returncode == 0
    assert json.loads((tmp_path / "d" / "manifest.json").read_text())["counts"] == {"train": 36, "val": 2}  # a tenth validates
    user_error(inside(*base, "--out", tmp_path / "c", "--size", "30"), "--size 30", "multiple of")
    with pytest.raises(ValueError, match="encoded by another autoencoder"):
        data.Latents(tmp_path / "a", "train", "0" * 16)
    torch.save(metrics.FidInception().state_dict(), tmp_path / "fid.pth")
    more = ["--preset", "smoke", "--data", tmp_path / "a", "--inception", tmp_path / "fid.pth"]
    for method in ("lpl_ldm", "ldm_conditioning"):
        M = importlib.import_module(f"methods.{method}")
        done = inside(M, *more, "--out_dir", tmp_path / method)
        assert done.returncode == 0 and "validation loss" in done.stdout, done.stderr
        assert re.search(r"Frechet distance .*Inception", done.stdout)
        scores = json.loads((tmp_path / method / "metrics.json").read_text())
        assert len([v for k, v in scores.items() if "_fd" in k and v > 0]) == 2  # of either arm
        user_error(inside(M, "--preset", "smoke", "--inception", tmp_path / "fid.pth"), "--inception is for --data")
    cfg = M.Config(**M.PRESETS["smoke"] | {"data": str(tmp_path / "a"), "inception": str(tmp_path / "fid.pth")})
    world = M.open_world(cfg, torch.device("cpu"))[1]  # its real pictures: what the autoencoder gives back
    mean = torch.stack([val.read(s, r)["mean"] for s, n in enumerate(val.sizes) for r in range(n)])
    seen = ((vae.decode(vae.to_latent(mean)).clamp(-1, 1) + 1) * 127.5).round().byte()
    torch.testing.assert_close(world.real, metrics.inception_features(tmp_path / "fid.pth")(seen))
    user_error(inside(importlib.import_module("methods.lpl_ldm"), "--preset", "smoke", "--data", tmp_path / "a", "--image_size", "64", "--out_dir", tmp_path / "x"),
               "holds latents of 32 px")  # fmt: skip


def test_the_vqa_stand_in_reads_pictures_and_questions():
    vqa = zoo.load_vqa()
    score = train_vqa.evaluate(vqa, "cpu", 150)
    assert min(score[k] for k in scenes.YES_NO) > 90 and score["all"] > 95, score
    assert score["blind"] < 60, score  # the questions do not give their answers away
    with pytest.raises(ValueError, match="unicorn"):
        vqa.answer(torch.zeros(1, 3, 32, 32), [["Is there a unicorn?"]])
    world = [scenes.scene(i, 9, (2, 3), grid=2) for i in range(20)]
    asked = [scenes.questions(s) for s in world]
    said = vqa.answer(pictures(world), [[q["text"] for q in some] for some in asked])
    assert [len(row) for row in said] == [len(some) for some in asked] and np.mean([all(row) for row in said]) > 0.9
    other = vqa.answer(pictures(world[::-1]), [[q["text"] for q in some] for some in asked])
    assert np.mean([v for row in other for v in row]) < 0.6


# By hand ---------------------------------------------------------------------------------------------------------------


def test_meanings_by_hand():
    text = "a large red star at the top left and a small blue ring below a moon on a dark lined background"
    things, relations, tones, strange = zoo.meaning(text)
    assert things == {
        ("star", frozenset({"large", "red"}), "topleft"),
        ("ring", frozenset({"small", "blue"}), ""),
        ("moon", frozenset(), ""),
    }
    assert relations == {("moon", "above", "ring")} and tones == {"dark", "lined"} and strange == ()
    for a, b in (("above", "below"), ("to the left of", "to the right of")):
        assert zoo.same_meaning(f"a star {a} a ring", f"a ring {b} a star") and not zoo.same_meaning(
            f"a star {a} a ring", f"a star {b} a ring"
        )
    for other in (text.replace("dark", "pale"), text.replace("top left", "top"), text.replace("lined ", "")):
        assert not zoo.same_meaning(text, other)
    assert zoo.ground_first("a star on a dark background") == "on a dark background, a star"


def test_paraphrases_by_rules_mostly_keep_the_meaning():
    rng = np.random.default_rng(0)
    pairs = [(scenes.caption(scenes.scene(i, 4, (1, 3), grid=2)), i) for i in range(60)]
    for text, i in pairs:
        weak = scenes.questions(scenes.scene(i, 4, (1, 3), grid=2))[i % 5]["text"]
        assert zoo.same_meaning(zoo.reworded(text, weak, rng), text)
        assert zoo.same_meaning(zoo.reworded(zoo.ground_first(text), "", rng), text)
    user = {train_rewriter.text(scenes.scene(1, 4, grid=2), order)[:3] for order in (0, 1)}
    assert len(user) == 2 and "on " in user


class Fixed(zoo.Rewriter):
    """Always the same odds: 0.5, 0.3, 0.2 for the ids 3, 4, 5."""

    def after(self, ids, first, cache):
        return torch.tensor([0, 0, 0, 0.5, 0.3, 0.2]).log().expand(len(ids), -1)


def test_writing_by_known_odds():
    net, g = Fixed(6, 8, 1, 1, context=12), torch.Generator().manual_seed(0)

    def shares(**options):
        ids = net.write([1, 2], 4000, 0, g, longest=1, **options)
        return [(ids == i).float().mean().item() for i in (3, 4, 5)]

    assert shares(top_p=1.0) == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    assert shares(top_p=0.6) == pytest.approx([0.625, 0.375, 0], abs=0.03)  # the one that reaches the share still counts
    assert shares(top_p=0.4) == [1, 0, 0]
    squares = np.array([0.25, 0.09, 0.04])
    assert shares(top_p=1.0, temperature=0.5) == pytest.approx((squares / squares.sum()).tolist(), abs=0.03)
    assert net.write([1, 2], 3, 0, g, longest=4).shape == (3, 4) and net.write([1] * 9, 3, 0, g, longest=8).shape == (3, 3)
    ids = net.write([1, 2], 2, 3, g, longest=10)  # until every row has the stop
    rows = (ids == 3).int().cumsum(1)
    assert rows[:, -1].all() and not rows[:, -2].all()


def test_words_of_questions_stand_at_the_right():
    vqa = zoo.load_vqa()
    a, b = vqa.ids(["Is there a star?", "Is the star red?"]).tolist()
    assert a[:-4] == b[:-4] == [0] * (vqa.longest - 4) and 0 not in a[-4:] + b[-4:] and a[-1] == b[-2] == vqa.number["star"]


def test_starting_points_of_the_painter_differ_and_guidance_of_one_is_none():
    painter = zoo.load_painter()
    two = painter.noise(2, 5)
    assert (
        not torch.equal(two[0], two[1])
        and torch.equal(painter.noise(3, 5)[:2], two)
        and not torch.equal(painter.noise(2, 6), two)
    )
    prompt = ["a large red star at the top left on a dark background"]
    context, z = painter.read(prompt), painter.noise(1, 0)
    with torch.no_grad():
        want = painter.vae.decode(z - painter.dit(z, torch.full((1,), 999.0), context=context))  # one step of Euler's method
        null = painter.vae.decode(z - painter.dit(z, torch.full((1,), 999.0), context=painter.null.expand_as(context)))
    torch.testing.assert_close(painter.draw(prompt, guidance=1, steps=1), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(painter.draw(prompt, guidance=0, steps=1), null, atol=1e-4, rtol=1e-4)


def test_adopted_weights_are_half_as_large(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    tensors = {"a.x": torch.tensor([1.0, 1 / 3]), "b.x": torch.ones(2), "n": torch.tensor([7])}
    zoo.ckpt.export(tmp_path / "run.safetensors", tensors, lm=dict(width=3))
    zoo.adopt(tmp_path / "run.safetensors", "new", ("b.",))
    state, meta = zoo.vae.read_tensors(tmp_path / "new.safetensors")
    assert meta == {"lm": {"width": 3}} and state.keys() == {"a.x", "n"} and state["n"].tolist() == [7]
    assert state["a.x"].float().tolist() == [1, torch.tensor(1 / 3).half().float().item()]


def test_what_the_judge_and_the_reader_are_taught():
    s = scenes.Scene(
        (scenes.Thing("star", "red", "large", "striped", 3), scenes.Thing("ring", "blue", "small", "solid", 0)),
        "pale",
        "lined",
        grid=2,
    )
    truth = train_judge.truth(s)
    A = zoo.ANSWERS
    assert [A["shape"][i] for i in truth["shape"]] == ["ring", "nothing", "nothing", "star"] and truth["colour"][1:3] == [
        -1,
        -1,
    ]
    assert [A["tone"][i] for i in truth["tone"]] == ["pale"] * 4 and A["texture"][truth["texture"][3]] == "striped"
    x = torch.zeros(2, 3, 5, 5)
    x[:, :, 2, 2] = 16
    soft = train_judge.blurred(x, torch.tensor([0.0, 1.0]))
    assert torch.equal(soft[0], x[0]) and soft[1, 0, 1:4, 1:4].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    tok = zoo.load_tokenizer()
    _, truth = train_reader.batch(0, 40, 3, tok)
    for i in range(40):
        things = sorted(scenes.scene(i, 3, (1, 3), grid=2).things, key=lambda t: scenes.SHAPES.index(t.shape))
        for p, (a, b) in enumerate(((0, 1), (0, 2), (1, 2))):
            want = scenes.relation(things[a], things[b], 2) if b < len(things) else "nothing"
            assert zoo.RELATIONS[truth["relation"][i, p]] == want
    some = train_vqa.world(30, 3)
    for row, text, yes, _ in zip(*train_vqa.asked(some, 200, 3)):
        if found := [q for q in scenes.questions(some[row]) if q["text"] == text]:
            assert yes == 1 and scenes.answer(some[row], found[0])
        elif not text.startswith("Is there"):
            assert yes == 0 or text.count("the") > 1


def test_other_files_are_no_stand_ins(tmp_path):
    path = tmp_path / "m.safetensors"
    for state, meta, words in (
        ({"x": torch.zeros(1)}, {}, "does not say its 'visual'"),
        ({"x": torch.zeros(1)}, {"visual": {"width": 4}, "text": {}}, "is no stand-in model of this kind"),
        (
            {"x": torch.zeros(1)},
            read_tensors(zoo.WEIGHTS / "clip.safetensors")[1],
            "is no stand-in model of this kind.*Missing",
        ),
    ):
        ckpt.export(path, state, **meta)
        with pytest.raises(ValueError, match=words):
            zoo.load_clip(path)
