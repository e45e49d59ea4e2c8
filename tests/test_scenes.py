"""common/scenes.py: determinism, speed of light, and that words, questions, boxes and pictures agree."""

import numpy as np
import pytest

from common import scenes as S


def many(n=200, **kw):
    return [S.scene(i, 5, **kw) for i in range(n)]


def test_pure_function_of_index_and_seed():
    assert S.scene(7, 3) == S.scene(7, 3) != S.scene(8, 3)
    assert S.scene(7, 3) != S.scene(7, 4)
    alone = S.render([S.scene(7, 3)])[0]
    assert np.array_equal(S.render(many(20) + [S.scene(7, 3)])[-1], alone)  # the batch does not matter
    assert S.caption(S.scene(7, 3), 9) == S.caption(S.scene(7, 3), 9)


def test_world_is_covered():
    things = [t for s in many(1500) for t in s.things]
    for field, values in (
        ("shape", S.SHAPES),
        ("colour", S.COLOURS),
        ("size", S.SIZES),
        ("texture", S.TEXTURES),
        ("cell", range(9)),
    ):
        counts = np.array([sum(getattr(t, field) == v for t in things) for v in values])
        assert counts.min() > 0.75 * counts.mean(), field
    assert {len(s.things) for s in many()} == {1, 2, 3}
    assert all(len({t.shape for t in s.things}) == len({t.cell for t in s.things}) == len(s.things) for s in many())


def test_held_out_pairs():
    assert sum(S.held_out(s, c) for s in S.SHAPES for c in S.COLOURS) == 9
    assert not any(S.held_out(t.shape, t.colour) for s in many(500, pairs="seen") for t in s.things)
    assert all(S.held_out(t.shape, t.colour) for s in many(pairs="held_out") for t in s.things)


def test_private_shapes_stay_private():
    assert not any(t.shape in S.PRIVATE_SHAPES for s in many() for t in s.things)
    assert all(t.shape in S.PRIVATE_SHAPES for s in many(private=True) for t in s.things)


def test_regions_have_their_own_statistics():
    brightness = {r: S.render(many(60, region=r)).mean((0, 1, 2)) for r in S.REGIONS}
    values = list(brightness.values())
    assert min(np.abs(a - b).max() for i, a in enumerate(values) for b in values[i + 1 :]) > 5
    share = np.mean([s.things[0].shape in S.FAMILIES["symbol"] for s in many(300, region="east")])
    assert share > 0.6


@pytest.mark.parametrize("size,grid", [(32, 3), (64, 3), (32, 1), (48, 2)])
def test_pictures_show_the_description(size, grid):
    for s in many(60, grid=grid):
        img = S.render([s], size)[0].astype(float)
        for node, t in zip([n for n in S.tree(s, size) if n["label"] != "spot"][1:], s.things):
            x0, y0, x1, y1 = node["box"]
            cx, cy = (t.cell % grid + 0.5) * size / grid, (t.cell // grid + 0.5) * size / grid
            assert x0 - 1 <= cx <= x1 + 1 and y0 - 1 <= cy <= y1 + 1
            if t.texture == "solid":
                inside = img[node["mask"]]
                nearest = np.abs(inside[:, None] - np.array(list(S.COLOURS.values()), float)[None]).sum(-1).argmin(1)
                assert np.bincount(nearest, minlength=8).argmax() == list(S.COLOURS).index(t.colour)
            ys, xs = np.nonzero(node["mask"])
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == node["box"]


def test_tree_parents_contain_children():
    for s in many(60):
        nodes = S.tree(s, 64)
        for n in nodes[1:]:
            p = nodes[n["parent"]]
            assert (n["mask"] & ~p["mask"]).sum() == 0
        assert sum(n["label"] == "spot" for n in nodes) == sum(t.texture == "spotted" for t in s.things)


def test_captions_name_attributes_and_vary():
    for s in many(100):
        text = S.caption(s)
        assert all(t.colour in text and t.shape in text and t.size in text for t in s.things)
        assert " a o" not in f" {text} " and " a i" not in " ".join(S.caption(s, v) for v in range(1, 9))
    texts = {S.caption(S.scene(3, 5), v) for v in range(40)}
    assert len(texts) > 15


def test_long_caption_is_long():
    assert min(len(S.long_caption(s).replace(".", " .").replace(",", " ,").split()) for s in many(300)) > 77


def test_questions_answers_and_dependencies():
    for s in many(100):
        qs = S.questions(s)
        assert [q["id"] for q in qs] == list(range(1, len(qs) + 1))
        assert all(S.answer(s, q) for q in qs)
        assert all(p < q["id"] for q in qs for p in q["parents"])
    a, b = S.scene(0, 1, (1, 1)), S.scene(1, 1, (1, 1))
    assert a.things[0].shape != b.things[0].shape
    answers = [S.answer(b, q) for q in S.questions(a) if q["kind"] != "background"]
    assert not any(answers)  # an absent object has no attributes


def test_relations_are_antisymmetric():
    opposite = {"to the left of": "to the right of", "above": "below"}
    opposite |= {v: k for k, v in opposite.items()}
    for s in many(200):
        for a in s.things:
            for b in s.things:
                if a != b:
                    assert S.relation(a, b) == opposite[S.relation(b, a)]


def test_negatives_are_wrong_for_the_scene_and_right_for_their_own():
    kinds = set()
    for s in many(100):
        for n in S.negatives(s, seed=1):
            kinds.add(n["kind"])
            assert n["caption"] == S.caption(n["scene"]) != S.caption(s)
            assert not all(S.answer(s, q) for q in S.questions(n["scene"]))
            if n["kind"] == "swap_obj":  # Winoground's form: the same words
                assert sorted(S.caption(n["scene"], brief=True).split()) == sorted(S.caption(s, brief=True).split())
            assert not np.array_equal(S.render([n["scene"]]), S.render([s]))
    assert kinds == {"replace_obj", "replace_att", "swap_att", "swap_obj", "add_obj"}


def test_unknown_shape():
    with pytest.raises(ValueError, match="unknown shape"):
        S.render([S.Scene((S.Thing("blob", "red", "large", "solid", 0),), "dark", "plain")])
