"""Line charts and labelled image grids with Pillow alone; everything returns a PIL image."""

from __future__ import annotations

import math
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, FAINT, PAPER, GREEN = (35, 38, 45), (222, 224, 228), (255, 255, 255), (46, 160, 67)
PALETTE = [(31, 119, 180), (214, 84, 40), (56, 150, 80), (148, 90, 190), (230, 160, 30), (20, 170, 180), (220, 80, 150),
           (120, 120, 120), (140, 90, 60), (90, 100, 220)]  # fmt: skip


def font(size: int):
    return ImageFont.load_default(size)


def save(img: Image.Image, path) -> None:
    img.save(f"{path}.tmp", format="PNG")
    os.replace(f"{path}.tmp", path)


def wrap(text: str, width: float, face) -> list[str]:
    """Words into lines of at most `width` pixels."""
    lines = [""]
    for word in str(text).split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if face.getlength(longer) <= width or not lines[-1] else [lines[-1], word]
    return lines


def distinct(images, order, count: int) -> list[int]:
    """The first `count` places of `order` whose images (a tensor of uint8) differ: generated worlds repeat themselves."""
    known = {}
    for j in order.tolist():
        known.setdefault(images[j].numpy().tobytes(), j)
        if len(known) == count:
            break
    return list(known.values())


def grid(images, cols: int, labels=None, marks=None, title: str = "", cell: int = 96, rows_of_text: int = 2) -> Image.Image:
    """images: (H, W, 3) uint8 arrays or PIL images, shown `cell` px wide (small ones enlarged without smoothing).

    labels: a text under each, in at most rows_of_text lines; marks: a frame colour or None for each; title: above all."""
    face, head = font(13), font(18)
    pad, line = 10, 17
    texts = [wrap(t, cell, face) for t in labels or []]
    depth = line * min(rows_of_text, max(map(len, texts))) + 6 if texts else 0
    rows = math.ceil(len(images) / cols)
    top = 38 if title else pad
    out = Image.new("RGB", (pad + cols * (cell + pad), top + rows * (cell + depth + pad)), PAPER)
    draw = ImageDraw.Draw(out)
    if title:
        draw.text((pad, 10), title, INK, head)
    for i, img in enumerate(images):
        img = img if isinstance(img, Image.Image) else Image.fromarray(np.asarray(img))
        x, y = pad + i % cols * (cell + pad), top + i // cols * (cell + depth + pad)
        scale = cell / max(img.size)
        size = (max(1, round(img.width * scale)), max(1, round(img.height * scale)))
        img = img.resize(size, Image.NEAREST if scale > 1.5 else Image.LANCZOS)
        out.paste(img, (x + (cell - size[0]) // 2, y + (cell - size[1]) // 2))
        if marks is not None and marks[i] is not None:
            draw.rectangle((x - 3, y - 3, x + cell + 2, y + cell + 2), outline=marks[i], width=3)
        if texts:
            lines = texts[i]
            if len(lines) > rows_of_text:
                lines = [*lines[: rows_of_text - 1], lines[rows_of_text - 1] + " ..."]
            for j, text in enumerate(lines):
                draw.text((x, y + cell + 4 + j * line), text, INK, face)
    return out


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    raw = max(high - low, 1e-12) / count
    base = 10 ** math.floor(math.log10(raw))
    step = next(m * base for m in (1, 2, 2.5, 5, 10) if m * base >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class _Axes:
    """A chart drawn at twice its size, then reduced: smooth lines without a plotting package. at(x, y): data -> pixels."""

    def __init__(self, xs, ys, title, x, y, size, legend: list[str], margin: float = 0.05):
        k, self.size = 2, size
        self.image = Image.new("RGB", (size[0] * k, size[1] * k), PAPER)
        self.draw, self.face = ImageDraw.Draw(self.image), font(13 * k)
        wide = max((self.face.getlength(n) for n in legend), default=-40 * k) + 40 * k
        self.box = box = (62 * k, 40 * k, size[0] * k - wide - 10 * k, size[1] * k - 46 * k)
        (x0, x1), (y0, y1) = ((v.min(), v.max()) if len(v) else (0.0, 1.0) for v in (xs, ys))
        across, up = (max(b - a, 1e-6 * max(abs(a), abs(b)), 1e-9) for a, b in ((x0, x1), (y0, y1)))
        self.x0, self.x1 = x0 - margin * across * (margin > 0.05), x0 + across * (1 + margin * (margin > 0.05))
        self.y0, self.y1 = y0 - margin * up, y1 + margin * up
        draw, face = self.draw, self.face
        for v in _ticks(self.y0, self.y1):
            draw.line([self.at(self.x0, v), self.at(self.x1, v)], FAINT, k)
            draw.text((box[0] - 8 * k, self.at(self.x0, v)[1]), f"{v:.4g}", INK, face, anchor="rm")
        for v in _ticks(self.x0, self.x1):
            foot = self.at(v, self.y0)[0]
            draw.line([(foot, box[3]), (foot, box[3] + 5 * k)], INK, k)
            draw.text((foot, box[3] + 8 * k), f"{v:.6g}", INK, face, anchor="mt")
        draw.line([self.at(self.x0, self.y1), self.at(self.x0, self.y0), self.at(self.x1, self.y0)], INK, k)
        draw.text(((box[0] + box[2]) / 2, size[1] * k - 8 * k), x, INK, face, anchor="mb")
        draw.text((10 * k, 10 * k), title + (f"   ({y})" if y else ""), INK, font(16 * k))
        for i, name in enumerate(legend):
            row, colour = box[1] + i * 20 * k, PALETTE[i % len(PALETTE)]
            draw.line([(box[2] + 12 * k, row), (box[2] + 30 * k, row)], colour, 4 * k)
            draw.text((box[2] + 36 * k, row), name, INK, face, anchor="lm")

    def at(self, a, b):
        box = self.box
        return (box[0] + (a - self.x0) / (self.x1 - self.x0) * (box[2] - box[0]),
                box[3] - (b - self.y0) / (self.y1 - self.y0) * (box[3] - box[1]))  # fmt: skip

    def dot(self, a, b, radius, colour):
        x, y = self.at(a, b)
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)

    def done(self) -> Image.Image:
        return self.image.resize(self.size, Image.LANCZOS)


def lines(series: dict[str, tuple[list, list]], title: str = "", x: str = "step", y: str = "", size=(760, 460)) -> Image.Image:
    """series: name -> (xs, ys). One colour a name in the order given, legend on the right."""
    series = {n: (np.asarray(a, float), np.asarray(b, float)) for n, (a, b) in series.items() if len(a)}
    xs = np.concatenate([a for a, _ in series.values()]) if series else np.array([])
    ys = np.concatenate([b[np.isfinite(b)] for _, b in series.values()]) if series else np.array([])
    axes = _Axes(xs, ys, title, x, y, size, list(series))
    for i, (a, b) in enumerate(series.values()):
        colour = PALETTE[i % len(PALETTE)]
        points = [(p, q) for p, q in zip(a, b) if np.isfinite(q)]
        axes.draw.line([axes.at(*p) for p in points], colour, 4, joint="curve")
        if len(points) < 30:
            for p in points:
                axes.dot(*p, 6, colour)
    return axes.done()


def scatter(series: dict[str, list[tuple]], paths: dict[str, list[tuple]], front: list[tuple] = (), title: str = "",
            x: str = "", size=(520, 420), legend: bool = True) -> Image.Image:  # fmt: skip
    """series: name -> points (x, y, label, strong, (dx, dy)): one colour a name; points that are not strong are faint; dx, dy:
    half intervals, drawn as a cross. paths: name -> (x, y) joined by a thin line of that colour. front: (x, y) in order of x,
    joined by steps: below and left of them is dominated. Labels that would cover another are left out."""
    every = [p for points in series.values() for p in points if np.isfinite(p[0]) and np.isfinite(p[1])]
    xs, ys = (np.array([p[i] for p in every], float) for i in (0, 1))
    axes = _Axes(xs, ys, title, x, "", size, list(series) if legend else [], margin=0.12)
    steps = []
    for (a, b), after in zip(front, [*front[1:], None]):
        steps += [(a, b)] if after is None else [(a, b), (a, after[1])]
    if steps:
        ends = [(axes.x0, front[0][1]), *steps, (front[-1][0], axes.y0)]
        axes.draw.line([axes.at(*p) for p in ends], (160, 164, 172), 3)
    for i, name in enumerate(series):
        faint = tuple(round(0.45 * c + 0.55 * 255) for c in PALETTE[i % len(PALETTE)])
        path = [axes.at(*p) for p in paths.get(name, []) if np.isfinite(p).all()]
        axes.draw.line(path, faint, 3, joint="curve")
    taken, face = [], font(22)
    for i, points in enumerate(series.values()):
        full = PALETTE[i % len(PALETTE)]
        for a, b, label, strong, (dx, dy) in sorted(points, key=lambda p: p[3]):
            if not (np.isfinite(a) and np.isfinite(b)):
                continue
            colour = full if strong else tuple(round(0.4 * c + 0.6 * 255) for c in full)
            axes.draw.line([axes.at(a - dx, b), axes.at(a + dx, b)], colour, 2)
            axes.draw.line([axes.at(a, b - dy), axes.at(a, b + dy)], colour, 2)
            axes.dot(a, b, 10 if strong else 7, colour)
            px, py = axes.at(a, b)
            wide = face.getlength(label)
            left = px + 14 if px + 14 + wide < axes.box[2] else px - 14 - wide
            box = (left, py - 28, left + wide, py - 4)
            if strong and label and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                taken.append(box)
                axes.draw.text((box[0], box[1]), label, INK, face)
    return axes.done()


def row(images: list[Image.Image]) -> Image.Image:
    """Side by side."""
    out = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)), PAPER)
    left = 0
    for i in images:
        out.paste(i, (left, 0))
        left += i.width
    return out


def below(image: Image.Image, lines: list[str]) -> Image.Image:
    """The image with lines of text under it."""
    out = Image.new("RGB", (image.width, image.height + 19 * len(lines) + 10), PAPER)
    out.paste(image, (0, 0))
    draw = ImageDraw.Draw(out)
    for i, text in enumerate(lines):
        draw.text((12, image.height + 19 * i), text, INK, font(14))
    return out
