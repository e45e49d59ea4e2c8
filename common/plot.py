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


def lines(series: dict[str, tuple[list, list]], title: str = "", x: str = "step", y: str = "", size=(760, 460)) -> Image.Image:
    """series: name -> (xs, ys). One colour a name in the order given, legend on the right."""
    k = 2  # drawn at twice the size, then reduced: smooth lines without a plotting package
    series = {n: (np.asarray(a, float), np.asarray(b, float)) for n, (a, b) in series.items() if len(a)}
    out = Image.new("RGB", (size[0] * k, size[1] * k), PAPER)
    draw, face = ImageDraw.Draw(out), font(13 * k)
    legend = max((face.getlength(n) for n in series), default=0) + 40 * k
    box = (62 * k, 40 * k, size[0] * k - legend - 10 * k, size[1] * k - 46 * k)
    xs = np.concatenate([a for a, _ in series.values()]) if series else np.array([0.0, 1.0])
    ys = np.concatenate([b[np.isfinite(b)] for _, b in series.values()]) if series else np.array([0.0, 1.0])
    x0, x1, y0, y1 = xs.min(), max(xs.max(), xs.min() + 1e-9), ys.min(), ys.max()
    room = 0.05 * max(y1 - y0, 1e-9)
    y0, y1 = y0 - room, y1 + room

    def at(a, b):
        return (box[0] + (a - x0) / (x1 - x0) * (box[2] - box[0]), box[3] - (b - y0) / (y1 - y0) * (box[3] - box[1]))

    for v in _ticks(y0, y1):
        draw.line([at(x0, v), at(x1, v)], FAINT, k)
        draw.text((box[0] - 8 * k, at(x0, v)[1]), f"{v:.4g}", INK, face, anchor="rm")
    for v in _ticks(x0, x1):
        draw.line([at(v, y0), (at(v, y0)[0], box[3] + 5 * k)], INK, k)
        draw.text((at(v, y0)[0], box[3] + 8 * k), f"{v:.6g}", INK, face, anchor="mt")
    draw.line([at(x0, y1), at(x0, y0), at(x1, y0)], INK, k)
    draw.text(((box[0] + box[2]) / 2, size[1] * k - 8 * k), x, INK, face, anchor="mb")
    draw.text((10 * k, 10 * k), title + (f"   ({y})" if y else ""), INK, font(16 * k))
    for i, (name, (a, b)) in enumerate(series.items()):
        colour = PALETTE[i % len(PALETTE)]
        points = [at(p, q) for p, q in zip(a, b) if np.isfinite(q)]
        draw.line(points, colour, 2 * k, joint="curve")
        if len(points) < 30:
            for p, q in points:
                draw.ellipse((p - 3 * k, q - 3 * k, p + 3 * k, q + 3 * k), colour)
        ly = box[1] + i * 20 * k
        draw.line([(box[2] + 12 * k, ly), (box[2] + 30 * k, ly)], colour, 4 * k)
        draw.text((box[2] + 36 * k, ly), name, INK, face, anchor="lm")
    return out.resize(size, Image.LANCZOS)
