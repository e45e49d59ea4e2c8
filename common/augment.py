"""Augmentation of images as batched tensors on the device; and of captions: stop-words and EDA's word edits.

Two ways to the same operations, each of which equals torchvision's per-image one (tests/test_augment.py):

per sample   `crop_box`, `resize_to` and `draw_colour` in the loader, on the PIL image, from a generator seeded by the sample's
             position; the colours travel with the batch as a row of floats
per batch    `view` on the device, from uniform numbers that the method draws for the GLOBAL batch, seeded by the step: many
             views of small or of already resized pictures, nothing left for the loader to do

Either way a sample looks the same with any number of processes and workers and after a resume.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def crop_box(width: int, height: int, scale, rng, ratio=(3 / 4, 4 / 3)) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box (left, top, right, bottom): area share from `scale`, log-uniform aspect ratio, ten tries,
    then the largest central box within the ratio bounds."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_box(width: int, height: int) -> tuple[int, int, int, int]:
    """The central square: with resize_to, the usual 'shorter side to S, centre crop S'."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def resize_to(img: Image.Image, box, size: int, how=Image.BICUBIC) -> np.ndarray:
    """The box of a PIL image as (size, size, 3) uint8; crop and resize are one operation."""
    if size == img.width == img.height and box == (0, 0, size, size):
        return np.asarray(img)
    return np.asarray(img.resize((size, size), how, box=box))


CONTROLS = ("top", "left", "height", "width", "flip", "size_h", "size_w")


def random_view(img: Image.Image, size: int, rng, scale=(1.0, 1.0), flip_p: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A square crop, its area a share from `scale` of the largest square's (1: the central one), resized, flipped with
    probability flip_p -> ((size, size, 3) uint8, its CONTROLS (7,) float32): the box that was actually drawn as shares of the
    image, the flip, the image's own size in pixels. What a diffusion model is told about a picture, so that no picture has to
    be thrown away."""
    square = min(img.size) / max(img.size)  # of the picture
    box = crop_box(*img.size, [square * s for s in scale], rng, ratio=(1, 1))
    box = centre_box(*img.size) if min(scale) == 1 else box
    flip = rng.random() < flip_p
    view = resize_to(img, box, size)
    left, top, right, bottom = box
    w, h = img.size
    controls = np.array([top / h, left / w, (bottom - top) / h, (right - left) / w, flip, h, w], np.float32)
    return (np.ascontiguousarray(view[:, ::-1]) if flip else view), controls


@dataclass(frozen=True)
class Colour:
    """What draw_colour draws. Defaults: the strong view of CLIP-rocket and of most contrastive methods."""

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    grey_p: float = 0.2
    blur: tuple[float, float] = (0.1, 2.0)  # Gaussian sigma in pixels
    blur_p: float = 0.5
    solarise_p: float = 0.0
    flip_p: float = 0.5


def draw_colour(c: Colour, rng) -> np.ndarray:
    """(12,) float32: brightness, contrast, saturation, hue; the place of each of the four in their random order; grey,
    blur sigma (0: none), solarise, flip."""
    b, con, s, h = c.jitter
    u = rng.random(8)
    row = np.zeros(12, np.float32)
    row[:3] = [1 - b + 2 * b * u[0], 1 - con + 2 * con * u[1], 1 - s + 2 * s * u[2]]
    row[3] = h * (2 * u[3] - 1)
    if rng.random() >= c.jitter_p:
        row[:4] = 1, 1, 1, 0
    row[4:8] = rng.permutation(4)
    row[8] = u[4] < c.grey_p
    row[9] = rng.uniform(*c.blur) if u[5] < c.blur_p else 0
    row[10] = u[6] < c.solarise_p
    row[11] = u[7] < c.flip_p
    return row


def draw_colours(u: torch.Tensor, c: Colour) -> torch.Tensor:
    """u (N, 14) uniform in [0, 1) -> (N, 12) rows like those of draw_colour, on u's device."""
    row = torch.stack([1 - j + 2 * j * u[:, i] for i, j in enumerate(c.jitter)], 1)
    row[:, 3] -= 1  # hue: a shift around 0, the others: factors around 1
    none = (torch.arange(4, device=u.device) < 3).float()  # 1, 1, 1, 0: numbers sent to a GPU would be waited for
    row = torch.where(u[:, 4:5] < c.jitter_p, row, none)
    blur = torch.where(u[:, 5] < c.blur_p, c.blur[0] + (c.blur[1] - c.blur[0]) * u[:, 6], 0.0)
    grey, solarise, flip = ((u[:, i] < p).float() for i, p in ((7, c.grey_p), (8, c.solarise_p), (9, c.flip_p)))
    return torch.cat([row, u[:, 10:].argsort(1).float(), torch.stack([grey, blur, solarise, flip], 1)], 1)


def draw_boxes(u: torch.Tensor, sides: torch.Tensor, scale, ratio=(3 / 4, 4 / 3)) -> torch.Tensor:
    """crop_box for many pictures at once. u (N, 10, 4) uniform in [0, 1), for ten tries; sides (N, 2): height and width in
    pixels -> boxes (N, 4): top, left, bottom, right as shares of the sides."""
    H, W = sides.to(u)[:, None].unbind(-1)  # (N, 1)
    area = H * W * (scale[0] + (scale[1] - scale[0]) * u[..., 0])
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[..., 1])
    h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    good = (h > 0) & (h <= H) & (w > 0) & (w <= W)
    h, w, a, b = (x.gather(1, good.float().argmax(1, keepdim=True)) for x in (h, w, u[..., 2], u[..., 3]))  # first good try
    none = ~good.any(1, keepdim=True)  # then the largest central box within the ratio bounds
    h, w = h.where(~none, (W / ratio[0]).round().minimum(H)), w.where(~none, (H * ratio[1]).round().minimum(W))
    a, b = a.masked_fill(none, 0.4999), b.masked_fill(none, 0.4999)  # floor() below then halves as // does
    top, left = (a * (H - h + 1)).floor(), (b * (W - w + 1)).floor()
    return torch.cat([top / H, left / W, (top + h) / H, (left + w) / W], 1)


def cut(x: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Crop and resize of a whole batch: x (B, C, H, W), boxes (B, 4) of draw_boxes -> (B, C, size, size) float32 in x's range.

    Bilinear with antialiasing, as torchvision's resized_crop and Pillow do it: every output row is a weighted sum of input
    rows, every output column of input columns, so a crop is two small matrix products."""

    def weights(start, end, n):  # (B, size, n): triangles as wide as an output pixel, no narrower than an input pixel
        step = ((end - start) * n / size)[:, None, None]
        centre = (start * n)[:, None, None] + step * (torch.arange(size, device=x.device) + 0.5)[:, None]
        pixel = torch.arange(n, device=x.device)
        w = (1 - (pixel + 0.5 - centre).abs() / step.clamp_min(1)).clamp_min(0)
        inside = (pixel >= (start * n + 1e-3).floor()[:, None]) & (pixel < (end * n - 1e-3).ceil()[:, None])
        w = w * inside[:, None]  # pixels beyond the box are not seen
        return w / w.sum(-1, keepdim=True)

    boxes = boxes.to(x.device)
    rows, cols = weights(boxes[:, 0], boxes[:, 2], x.shape[2]), weights(boxes[:, 1], boxes[:, 3], x.shape[3])
    return rows[:, None] @ x.float() @ cols[:, None].transpose(2, 3)


def _grey(x):
    """(B, 3, H, W) -> (B, 1, H, W), ITU-R 601 weights."""
    return (0.2989 * x[:, :1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def _shift_hue(x, shift):
    """Adds shift (B, 1, 1, 1) in turns to the hue of x in [0, 1], saturation and value kept: HSV in closed form."""
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    r, g, b = ((value - x) / chroma.clamp_min(1e-12)).split(1, 1)  # distance of each channel from the maximum
    hue = torch.where(x[:, :1] == value, b - g, torch.where(x[:, 1:2] == value, 2 + r - b, 4 + g - r)) / 6 + shift
    k = (hue * 6 + torch.arange(5, 0, -2, device=x.device).view(1, 3, 1, 1)) % 6
    return value - chroma * (2 - k.sub_(2).abs_()).clamp_(0, 1)


def apply_colour(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x (B, 3, H, W) in [0, 1], rows (B, 12) of draw_colour -> the same shape: jitter in each row's own order, grey, blur,
    solarise, flip. Every row goes the same way, or a GPU would be waited for at each branch: brightness, contrast and
    saturation are blends, offered at three places before the hue and at three after it; a row without one there has f = 1."""
    jitter = rows.is_cuda or bool((rows[:, :3] != 1).any() or rows[:, 3].any())  # a CPU may look
    blur = rows.is_cuda or bool(rows[:, 9].any())
    rows = rows.to(x.device, non_blocking=True)
    place, hue_place = rows[:, 4:7], rows[:, 7:8]
    each = rows[..., None, None, None]  # (B, 12, 1, 1, 1)

    def blend(x, here):  # here (B, 3): the rows' operation, if any
        grey, f = _grey(x), torch.where(here, rows[:, :3], 1.0).prod(1).view(-1, 1, 1, 1)
        contrast, saturation = here[:, 1:].float()[..., None, None, None].unbind(1)
        other = contrast * grey.mean((1, 2, 3), keepdim=True) + saturation * grey  # of brightness: black
        return torch.lerp(other, x, f).clamp_(0, 1)

    if jitter:
        for i in range(3):
            x = blend(x, (place == i) & (hue_place > i))
        x = torch.where(each[:, 3] != 0, _shift_hue(x, each[:, 3]).clamp(0, 1), x)
        for i in range(1, 4):
            x = blend(x, (place == i) & (hue_place < i))
    x = torch.where(each[:, 8] > 0, _grey(x), x)
    x = _blur(x, rows[:, 9]) if blur else x
    x = torch.where((each[:, 10] > 0) & (x >= 0.5), 1 - x, x)
    return torch.where(each[:, 11] > 0, x.flip(-1), x)


def _blur(x, sigma):
    """Gaussian, cut off at three sigmas, its own sigma (B,) for every picture (0: none), edges reflected: like a crop two small
    matrix products."""
    sigma = sigma.view(-1, 1, 1, 1)

    def weights(n):  # (B, n, n): of input pixel j in output pixel i, directly and by way of the two mirrors
        j = torch.arange(n, device=x.device)
        i = j[:, None]
        offset = torch.stack([j - i, -j - i, 2 * (n - 1) - j - i])
        once = torch.stack([j >= 0, j > 0, j < n - 1])[:, None]  # a pixel on the edge is not mirrored
        near = once & (offset.abs() <= (3 * sigma).ceil())
        w = torch.where(near, -0.5 * (offset / sigma.clamp_min(1e-3)) ** 2, -math.inf).exp().sum(1)
        return w / w.sum(-1, keepdim=True)

    rows = weights(x.shape[2])
    cols = rows if x.shape[2] == x.shape[3] else weights(x.shape[3])
    return rows[:, None] @ x @ cols[:, None].transpose(2, 3)


NUMBERS = 54  # uniform numbers that a view takes


def view(x: torch.Tensor, sides: torch.Tensor, u: torch.Tensor, size: int, scale, c: Colour) -> torch.Tensor:
    """A random view of every picture: x (B, 3, H, W) uint8, squeezed from pictures of `sides` (B, 2), u (B, NUMBERS) uniform
    -> (B, 3, size, size) in [0, 1]. Crop and resize undo the squeezing; then draw_colours and apply_colour."""
    boxes = draw_boxes(u[:, :40].unflatten(1, (10, 4)), sides, scale)
    return apply_colour((cut(x, boxes, size) / 255).clamp(0, 1), draw_colours(u[:, 40:], c))


def to_float(x: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [0, 1]."""
    return x.permute(0, 3, 1, 2).float() / 255


def normalise(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([(x[:, i] - IMAGENET_MEAN[i]) / IMAGENET_STD[i] for i in range(3)], 1)


# Captions ---------------------------------------------------------------------------------------------------------------

STOP_WORDS = frozenset(
    """a about above after again against all also am an and any are as at be became because been before being below
    between both but by can cannot could did do does doing done down during each either else ever every few for from
    further get had has have having he her here hers herself him himself his how i if in into is it its itself just like
    may me might more most much must my myself near neither no nor not now of off on once one only onto or other our ours
    ourselves out over own per quite rather s same shall she should so some such t than that the their theirs them
    themselves then there these they this those through thus to too toward towards under until up upon us very was we were
    what when where whether which while who whom whose why will with within without would yet you your yours yourself
    yourselves 's 't 're 've 'm 'll 'd n't""".split()
)


def drop_stop_words(text, rng, p):
    """With probability p the caption without stop-words; the caption itself if nothing would remain."""
    if rng.random() >= p:
        return text
    words = re.findall(r"'\w+|\w+|[^\w\s]", text)  # punctuation and clitics stand alone
    return " ".join(w for w in words if w.lower() not in STOP_WORDS) or text


def synonym_edit(words, rng, synonyms):
    """One word that has a synonym, replaced wherever it stands; a caption without such a word is left to swap_edit."""
    known = sorted({w for w in words if w.lower() in synonyms and w.lower() not in STOP_WORDS})
    if not known:
        return swap_edit(words, rng)
    old = known[rng.integers(len(known))]
    options = synonyms[old.lower()]
    return [options[rng.integers(len(options))] if w == old else w for w in words]


def swap_edit(words, rng):
    """Two random positions change places; gives up after three draws of equal positions."""
    i = rng.integers(len(words))
    j = next((j for j in rng.integers(len(words), size=4) if j != i), i)
    words = list(words)
    words[i], words[j] = words[j], words[i]
    return words


def delete_edit(words, rng, p=0.1):
    """Each word goes with probability p; at least one stays."""
    kept = [w for w in words if rng.random() >= p]
    return kept or [words[rng.integers(len(words))]]


def edit_caption(text, rng, synonyms):
    """Exactly one edit: a synonym (0.4), a swap (0.4) or deletions (0.2); by EDA, Wei and Zou, 2019, arXiv 1901.11196."""
    words = text.split()
    if not words:
        return text
    u = rng.random()
    words = synonym_edit(words, rng, synonyms) if u < 0.4 else swap_edit(words, rng) if u < 0.8 else delete_edit(words, rng)
    return " ".join(words) or text
