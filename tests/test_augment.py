"""common/augment.py against torchvision's per-image operations with the same parameters."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from common import augment as A
from common.vision import torchvision  # noqa: F401


def rows(n, colour=None, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([A.draw_colour(colour or A.Colour(), rng) for _ in range(n)]))


def test_equal_to_torchvision_per_image():
    import torchvision.transforms.v2.functional as TF

    torch.manual_seed(0)
    x, r = torch.rand(40, 3, 24, 24), rows(40, A.Colour(solarise_p=0.3))

    def one(img, p):
        ops = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
        for i in p[4:8].argsort().tolist():
            img = ops[i](img, float(p[i]))
        img = TF.rgb_to_grayscale(img, 3) if p[8] else img
        k = 2 * math.ceil(3 * float(p[9])) + 1
        img = TF.gaussian_blur(img, [k, k], [float(p[9])] * 2) if p[9] else img
        img = TF.solarize(img, 0.5) if p[10] else img
        return TF.horizontal_flip(img) if p[11] else img

    torch.testing.assert_close(A.apply_colour(x, r), torch.stack([one(a, p) for a, p in zip(x, r)]), atol=2e-5, rtol=0)


def test_a_row_does_not_depend_on_its_batch():
    x, r = torch.rand(6, 3, 16, 16), rows(6)
    both = A.apply_colour(x, r)
    for i in range(6):
        torch.testing.assert_close(A.apply_colour(x[i : i + 1], r[i : i + 1])[0], both[i], atol=1e-6, rtol=0)


def test_frequencies():
    r = rows(4000)
    assert abs((r[:, 8] > 0).float().mean() - 0.2) < 0.03 and abs((r[:, 9] > 0).float().mean() - 0.5) < 0.03
    assert abs((r[:, 11] > 0).float().mean() - 0.5) < 0.03 and abs((r[:, 3] != 0).float().mean() - 0.8) < 0.03
    assert 0.6 <= r[:, 0].min() and r[:, 0].max() <= 1.4 and r[:, 3].abs().max() <= 0.1


def test_weak_rows_change_nothing():
    x = torch.rand(5, 3, 8, 8)
    assert torch.equal(A.apply_colour(x, rows(5, A.Colour(jitter_p=0, grey_p=0, blur_p=0, flip_p=0))), x)


def test_crop_boxes():
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(500):
        left, top, right, bottom = A.crop_box(80, 60, (0.08, 1.0), rng)
        assert 0 <= left < right <= 80 and 0 <= top < bottom <= 60
        shares.append((right - left) * (bottom - top) / 4800)
    assert 0.06 < min(shares) and max(shares) > 0.85
    assert A.crop_box(1000, 10, (0.9, 1.0), rng) == (493, 0, 506, 10)  # falls back to the central box within the ratios
    assert A.centre_box(80, 60) == (10, 0, 70, 60)


def test_resize_is_pillows_crop_then_resize():
    img = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    box = (10, 5, 50, 45)
    want = np.asarray(img.crop(box).resize((32, 32), Image.BICUBIC)).astype(int)
    assert np.abs(A.resize_to(img, box, 32).astype(int) - want)[3:-3, 3:-3].max() <= 1  # edges may look outside the box


def test_a_cut_is_torchvisions_resized_crop():
    import torchvision.transforms.v2.functional as TF

    for (H, W), size in (((32, 32), 24), ((20, 45), 32), ((60, 40), 12)):
        x = torch.rand(12, 3, H, W)
        boxes = A.draw_boxes(torch.rand(12, 10, 4), torch.tensor([[H, W]] * 12), (0.05, 1.0))
        for img, box, got in zip(x, boxes, A.cut(x, boxes, size)):
            top, left, bottom, right = (round(float(b) * n) for b, n in zip(box, (H, W, H, W)))
            want = TF.resized_crop(img, top, left, bottom - top, right - left, [size, size], antialias=True)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_drawn_boxes_are_random_resized_crops():
    torch.manual_seed(0)
    sides = torch.tensor([[60, 80]]).repeat(4000, 1)
    top, left, bottom, right = (A.draw_boxes(torch.rand(4000, 10, 4), sides, (0.2, 0.6)) * torch.tensor([60, 80, 60, 80])).T
    for edge in (top, left, bottom, right):
        torch.testing.assert_close(edge, edge.round(), atol=1e-4, rtol=0)
    area, aspect = (bottom - top) * (right - left) / 4800, (right - left) / (bottom - top)
    assert 0 <= top.min() and 0 <= left.min() and bottom.max() <= 60.001 and right.max() <= 80.001
    assert 0.17 < area.min() < 0.22 and 0.57 < area.max() < 0.63 and abs(area.mean() - 0.4) < 0.01
    assert 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.42 and abs(aspect.log().mean()) < 0.02
    strip = A.draw_boxes(torch.rand(3, 10, 4), torch.tensor([[10, 300]] * 3), (0.9, 1.0))[0]  # no try can fit: central
    assert strip.tolist() == pytest.approx([0, 143 / 300, 1, 156 / 300], abs=2e-3)


def test_drawn_colours_have_the_loaders_frequencies():
    torch.manual_seed(0)
    c = A.Colour(jitter=(0.4, 0.4, 0.2, 0.1), solarise_p=0.3)
    r, want = A.draw_colours(torch.rand(4000, 14), c), rows(4000, c)
    assert r.shape == want.shape and r.dtype == want.dtype
    torch.testing.assert_close(r.mean(0), want.mean(0), atol=0.06, rtol=0)
    torch.testing.assert_close(r.amin(0), want.amin(0), atol=0.03, rtol=0)
    assert (r[:, 4:8].sort(1).values == torch.arange(4.0)).all()


def test_a_view_undoes_the_squeezing():
    """A picture squeezed to a square, then cut, is the cut picture, but for one resampling more."""
    img = Image.fromarray(np.kron(np.random.default_rng(0).integers(0, 256, (4, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8))
    square = torch.from_numpy(np.asarray(img.resize((96, 96), Image.BICUBIC))).permute(2, 0, 1)[None]
    u, plain = torch.rand(1, A.NUMBERS), A.Colour(jitter_p=0, grey_p=0, blur_p=0, flip_p=0)
    got = A.view(square, torch.tensor([[64, 128]]), u, 32, (0.3, 0.6), plain)
    whole = torch.from_numpy(np.asarray(img)).permute(2, 0, 1)[None]
    want = A.view(whole, torch.tensor([[64, 128]]), u, 32, (0.3, 0.6), plain)
    assert (got - want).abs().mean() < 0.03
    # and does not depend on the batch it is in
    both = A.view(
        square.repeat(3, 1, 1, 1),
        torch.tensor([[64, 128]] * 3),
        torch.rand(3, A.NUMBERS).index_copy(0, torch.tensor([1]), u),
        32,
        (0.3, 0.6),
        plain,
    )
    torch.testing.assert_close(both[1], got[0], atol=1e-5, rtol=0)


# By hand ---------------------------------------------------------------------------------------------------------------


def test_a_box_has_the_ratio_asked_for_and_can_touch_every_edge():
    rng = np.random.default_rng(0)
    left, top, right, bottom = A.crop_box(80, 80, (0.5, 0.5), rng, ratio=(0.5, 0.5))
    assert (right - left, bottom - top) == (40, 80)  # the ratio is width / height
    boxes = [A.crop_box(10, 10, (0.81, 0.81), rng, ratio=(1, 1)) for _ in range(100)]
    assert {b[:2] for b in boxes} == {(0, 0), (0, 1), (1, 0), (1, 1)} and all(b[2] - b[0] == b[3] - b[1] == 9 for b in boxes)
    wide = [A.crop_box(1000, 1000, (0.1, 0.3), rng) for _ in range(3000)]
    logs = [math.log((b[2] - b[0]) / (b[3] - b[1])) for b in wide]
    assert abs(np.mean(logs)) < 0.012  # log-uniform: 0; of a uniform ratio it would be 0.027


@pytest.mark.parametrize("drawn", ["per sample", "per batch"])
def test_colours_are_drawn_independently_and_blur_keeps_its_range(drawn):
    c = A.Colour(jitter_p=0.5, grey_p=0.5, blur=(1.0, 2.0), solarise_p=0.5, flip_p=0.5)
    r = (
        rows(6000, c)
        if drawn == "per sample"
        else A.draw_colours(torch.from_numpy(np.random.default_rng(0).random((6000, 14))), c)
    )
    sigma = r[r[:, 9] > 0, 9]
    assert 1 <= sigma.min() < 1.01 and 1.99 < sigma.max() <= 2 and abs(sigma.mean() - 1.5) < 0.03
    on = r[:, 3] != 0
    kinds = torch.stack([on, *(r[:, i] > 0 for i in (8, 9, 10, 11))]).double()  # jitter, grey, blur, solarise, flip
    signs = torch.stack([r[on, 0] > 1, r[on, 1] > 1, r[on, 2] > 1, r[on, 3] > 0]).double()
    for some in (kinds, signs):  # each of them half of the time, two together a quarter
        together = some @ some.T / some.shape[1]
        torch.testing.assert_close(together, torch.full_like(together, 0.25).fill_diagonal_(0.5), atol=0.03, rtol=0)


def test_a_part_of_a_picture_of_the_right_size_is_still_enlarged():
    img = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
    assert np.array_equal(A.resize_to(img, (0, 0, 8, 8), 8), np.asarray(img))
    want = np.asarray(img.resize((8, 8), Image.BICUBIC, box=(0, 0, 4, 4)))
    assert np.array_equal(A.resize_to(img, (0, 0, 4, 4), 8), want) and not np.array_equal(want, np.asarray(img))


def test_a_view_has_the_scale_asked_for_and_draws_its_colours_apart_from_its_box():
    x, sides = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8), torch.tensor([[8, 8]])
    plain, flips = A.Colour(jitter_p=0, grey_p=0, blur_p=0, flip_p=0), A.Colour(jitter_p=0, grey_p=0, blur_p=0)
    u = torch.full(
        (1, A.NUMBERS), 0.9
    )  # an aspect of 1.26 does not fit the whole square: the central box, which is the picture
    u[0, 0:40:4] = 0.2  # of the area
    torch.testing.assert_close(A.view(x, sides, u, 8, (1, 1), plain), x / 255)
    torch.testing.assert_close(A.view(x, sides, u, 8, (1, 1), flips), x / 255)
    u[0, 40 + 9] = 0.1  # of the flip
    torch.testing.assert_close(A.view(x, sides, u, 8, (1, 1), flips), x.flip(-1) / 255)


def test_pictures_become_standardised_floats():
    x = torch.tensor([[[[0, 51, 255], [102, 0, 0]]]], dtype=torch.uint8)  # one row of two pixels
    torch.testing.assert_close(A.to_float(x), torch.tensor([[[[0, 0.4]], [[0.2, 0]], [[1, 0]]]]))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (A.IMAGENET_MEAN, A.IMAGENET_STD))
    torch.testing.assert_close(A.normalise(mean + std * torch.tensor([-1.0, 2.0])), torch.tensor([-1.0, 2]).expand(1, 3, 1, 2))


def test_word_edits_are_as_frequent_as_told():
    rng, n = np.random.default_rng(0), 4000
    same = sum(A.swap_edit(["a", "b"], rng) == ["a", "b"] for _ in range(n)) / n
    assert abs(same - 1 / 16) < 0.012  # four draws of an equal position
    kept = sum(len(A.delete_edit(list("abcdefghij"), rng)) for _ in range(n)) / n
    assert abs(kept - 9) < 0.1
    dropped = sum(A.drop_stop_words("a dog", rng, 0.3) == "dog" for _ in range(n)) / n
    assert abs(dropped - 0.3) < 0.03
