"""common/augment.py against torchvision's per-image operations with the same parameters."""

import math

import numpy as np
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
    k = 2 * math.ceil(3 * float(r[:, 9].max())) + 1

    def one(img, p):
        ops = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
        for i in p[4:8].argsort().tolist():
            img = ops[i](img, float(p[i]))
        img = TF.rgb_to_grayscale(img, 3) if p[8] else img
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
