"""A small generated world: coloured shapes on a 3 x 3 grid, with exact annotations of every kind.

Nothing can be downloaded on a new laptop, so each method brings its data along. `scene(index, seed)` is a pure function:
the same pair gives the same scene on every machine. A `Scene` is only a description; pictures, captions, questions,
negatives, boxes and masks are computed from it, so that they cannot disagree.

    s = scene(7, seed=0)
    render([s], size=32)        (1, 32, 32, 3) uint8
    caption(s), caption(s, 3)   the plain caption and a paraphrase;  long_caption(s) has more than 77 CLIP tokens
    questions(s)                yes/no questions in dependency order;  answer(s, question) reads them off any scene
    negatives(s)                swap / replace / add: a wrong caption and the scene that it would be right for
    tree(s, size=64)            boxes and masks: scene -> objects -> parts

Entropy is low where nothing is taught by it: places lie on the grid, texture phases are fixed, there is no pixel noise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

# Three families of three shapes: the class hierarchy. Synonyms serve paraphrases and text augmentation.
FAMILIES = {
    "round shape": ("circle", "ring", "moon"),
    "polygon": ("square", "triangle", "diamond"),
    "symbol": ("star", "cross", "heart"),
}
SHAPES = tuple(s for family in FAMILIES.values() for s in family)
PRIVATE_SHAPES = ("arrow", "clover")  # drawn with private=True alone; the judge knows them
COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 134, 20),
    "yellow": (250, 214, 50),
    "green": (58, 166, 78),
    "cyan": (60, 200, 215),
    "blue": (48, 84, 214),
    "purple": (136, 56, 180),
    "pink": (250, 130, 190),
}
SIZES = {"small": 0.345, "large": 0.495}  # radius as a share of a grid cell
TEXTURES = ("solid", "striped", "spotted")
TONES = {"dark": (40, 42, 50), "grey": (134, 134, 138), "pale": (232, 228, 218)}
PATTERNS = ("plain", "lined", "checked")
PLACES = {  # by grid and cell
    3: ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"),
    2: ("top left", "top right", "bottom left", "bottom right"),
    1: ("centre",),
}
# A region has its own light, backgrounds and favourite shapes: what per-region evaluation is about.
REGIONS = {  # name: (tint of all pixels, tone, pattern, favourite family)
    "north": ((0.82, 0.92, 1.00), "dark", "plain", "polygon"),
    "south": ((1.00, 0.90, 0.76), "pale", "plain", "round shape"),
    "east": ((1.00, 0.84, 0.94), "grey", "checked", "symbol"),
    "west": ((0.84, 1.00, 0.84), "grey", "lined", "round shape"),
}
SYNONYMS = {
    "circle": ("disc",), "ring": ("hoop",), "moon": ("crescent",), "square": ("box",), "diamond": ("rhombus",),
    "cross": ("plus",), "large": ("big", "huge"), "small": ("little", "tiny"), "striped": ("banded",),
    "spotted": ("dotted",), "solid": ("plain",), "red": ("scarlet",), "purple": ("violet",), "cyan": ("turquoise",),
    "pink": ("rosy",), "dark": ("dim",), "pale": ("light",), "grey": ("gray",), "checked": ("checkered",),
    "lined": ("ruled",), "picture": ("image", "drawing"), "background": ("backdrop",), "top": ("upper",),
    "bottom": ("lower",), "centre": ("middle", "center"), "above": ("over",), "below": ("under",),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str
    texture: str
    cell: int  # place on the grid, row by row


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]  # one to three, all of different shape, so that "the star" is always one thing
    tone: str
    pattern: str
    region: str = ""
    grid: int = 3  # cells a side: 3, 2 (four corners), or 1 (a close-up of one object)


def held_out(shape: str, colour: str) -> bool:
    """Nine of the 72 shape-colour pairs that pairs="seen" never draws: the compositional test."""
    return shape in SHAPES and SHAPES.index(shape) % len(COLOURS) == list(COLOURS).index(colour)


def reserved(shape: str, colour: str, size: str) -> bool:
    """A quarter of all objects, of every shape and every colour, for tests alone: part="train" never draws them, part="test"
    no others. With few objects and places new scenes are mostly old pictures. The other size of the pair may be trained on."""
    place = (SHAPES + PRIVATE_SHAPES).index(shape) + list(COLOURS).index(colour) + 2 * list(SIZES).index(size)
    return place % 4 == 0


def scene(index: int, seed: int = 0, objects=(1, 3), pairs: str = "all", region: str = "", private: bool = False,
          grid: int = 3, part: str = "") -> Scene:  # fmt: skip
    """The scene with this index. objects: (fewest, most); pairs: "all", "seen" or "held_out" shape-colour pairs; region: one
    of REGIONS, "any", or "" for none; private: shapes of PRIVATE_SHAPES only (then at most two objects); grid: cells a side;
    part: "train" or "test", without and with reserved objects alone, or "" for all."""
    rng = np.random.default_rng((seed, index))
    u = iter(rng.random(40))

    def pick(options):
        return options[int(next(u) * len(options))]

    region = pick(tuple(REGIONS)) if region == "any" else region
    shapes = PRIVATE_SHAPES if private else SHAPES
    order = sorted(shapes, key=lambda s: next(u))
    if region and next(u) < 0.6 and not private:  # the favourite family comes first
        order.sort(key=lambda s: s not in FAMILIES[REGIONS[region][3]])
    cells = rng.permutation(grid**2)
    count = min(objects[0] + int(next(u) * (objects[1] - objects[0] + 1)), len(shapes), grid**2)
    things = []
    for shape, cell in zip(order[:count], cells):
        rule = {"all": (False, True), "seen": (False,), "held_out": (True,)}[pairs]
        sizes = {c: [s for s in SIZES if not part or reserved(shape, c, s) == (part == "test")] for c in COLOURS}
        colours = [c for c in COLOURS if held_out(shape, c) in rule and sizes[c]] or [c for c in COLOURS if sizes[c]]
        colour = pick(colours)
        things.append(Thing(shape, colour, pick(sizes[colour]), pick(TEXTURES), int(cell)))
    tone, pattern = pick(tuple(TONES)), pick(PATTERNS)
    if region:
        tone, pattern = REGIONS[region][1:3]
    return Scene(tuple(things), tone, pattern, region, grid)


# Pictures ---------------------------------------------------------------------------------------------------------


def _distance(shape: str, x, y):
    """Signed distance to the outline (negative inside), in units of the radius; y points down."""
    ax, ay, r = np.abs(x), np.abs(y), np.hypot(x, y)
    if shape == "circle":
        return r - 0.92
    if shape == "ring":
        return np.abs(r - 0.72) - 0.24
    if shape == "moon":
        return np.maximum(r - 0.98, 0.82 - np.hypot(x - 0.5, y))
    if shape == "square":
        return np.maximum(ax, ay) - 0.82
    if shape == "triangle":
        return np.maximum(y - 0.78, 0.873 * ax - 0.488 * y - 0.464)
    if shape == "diamond":
        return 0.82 * ax + 0.57 * ay - 0.57
    if shape == "star":  # fold the plane into one tenth; the edge runs from the tip (1.08, 0) to the notch
        a = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        notch = 0.46 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)], dtype=x.dtype)
        ex, ey = notch[0] - 1.08, notch[1]
        return ((r * np.cos(a) - 1.08) * -ey + r * np.sin(a) * ex) * -1 / np.hypot(ex, ey)
    if shape == "cross":
        return np.minimum(np.maximum(ax - 0.3, ay - 0.95), np.maximum(ax - 0.95, ay - 0.3))
    if shape == "heart":
        lobes = np.hypot(ax - 0.46, y + 0.36) - 0.52
        return np.minimum(lobes, np.maximum(0.72 * ax + 0.69 * y - 0.62, -0.36 - y))
    if shape == "arrow":
        head = np.maximum(0.1 - x, 0.66 * x + 0.75 * ay - 0.63)
        return np.minimum(head, np.maximum(ay - 0.25, np.abs(x + 0.4) - 0.55))
    if shape == "clover":
        leaves = [np.hypot(x - 0.5 * np.sin(t), y + 0.5 * np.cos(t)) for t in (0, 2.1, 4.2)]
        return np.minimum(np.minimum(*leaves[:2]), leaves[2]) - 0.46
    raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES + PRIVATE_SHAPES)}")


def _coverage(things, grids, size: int):
    """Body and spot of every thing (on a grid of so many cells) as soft masks in [0, 1], plus its local y: three arrays
    (M, size, size). Exact distances give clean anti-aliased edges without supersampling."""
    cell, side = np.array([t.cell for t in things]), size / np.array(grids)  # cell index; pixels a cell
    cx, cy = (cell % grids + 0.5) * side, (cell // grids + 0.5) * side
    radius = np.array([SIZES[t.size] for t in things]) * side
    radius = radius.astype(np.float32)
    axis = np.arange(size, dtype=np.float32) + 0.5
    x = ((axis[None, None, :] - cx[:, None, None]) / radius[:, None, None]).astype(np.float32)
    y = ((axis[None, :, None] - cy[:, None, None]) / radius[:, None, None]).astype(np.float32)
    x, y = np.broadcast_arrays(x, y)
    body = np.empty((len(things), size, size), np.float32)
    names = np.array([t.shape for t in things])
    for shape in np.unique(names):
        rows = np.flatnonzero(names == shape)
        body[rows] = _distance(shape, x[rows], y[rows])
    body = np.clip(0.5 - body * radius[:, None, None], 0, 1)
    centre = np.array([-0.62 if t.shape == "moon" else 0.0 for t in things], np.float32)[:, None, None]
    spot = np.clip(0.5 - (np.hypot(x - centre, y) - 0.34) * radius[:, None, None], 0, 1)
    spot *= np.array([t.texture == "spotted" for t in things], np.float32)[:, None, None]
    return body, spot, y


def render(scenes, size: int = 32) -> np.ndarray:
    """Scenes -> (N, size, size, 3) uint8 pictures. Several thousand a second on one core at 32 px."""
    return np.concatenate([_render(scenes[i : i + 256], size) for i in range(0, len(scenes), 256)])


def _render(scenes, size):
    axis = (np.arange(size) * 8) // size
    waves = {  # fixed phase, four periods a side
        "plain": np.zeros((size, size)),
        "lined": np.broadcast_to(axis[:, None] % 2 * 2.0 - 1, (size, size)),
        "checked": (axis[:, None] + axis[None, :]) % 2 * 2.0 - 1,
    }
    tiles = {(t, p): np.array(TONES[t]) + 13.0 * waves[p][..., None] for t in TONES for p in PATTERNS}
    img = np.stack([tiles[s.tone, s.pattern] for s in scenes]).astype(np.float32)
    for layer in range(max(len(s.things) for s in scenes)):  # the n-th thing of every scene at once
        rows = [i for i, s in enumerate(scenes) if len(s.things) > layer]
        things = [scenes[i].things[layer] for i in rows]
        body, spot, y = _coverage(things, np.array([scenes[i].grid for i in rows]), size)
        colour = np.array([COLOURS[t.colour] for t in things], np.float32)[:, None, None, :]
        striped = np.array([t.texture == "striped" for t in things], np.float32)[:, None, None]
        bands = 1 - 0.5 * striped * (np.floor(y / 0.45 + 0.5) % 2)
        paint = colour * bands[..., None]
        paint = paint + spot[..., None] * (255 - paint)
        body = np.maximum(body, spot)[..., None]
        img[rows] = img[rows] * (1 - body) + paint * body
    tint = np.array([REGIONS[s.region][0] if s.region else (1, 1, 1) for s in scenes], np.float32)
    return (img * tint[:, None, None, :] + 0.5).clip(0, 255).astype(np.uint8)


def tree(s: Scene, size: int = 64) -> list[dict]:
    """Nodes {id, parent, label, caption, box (x0, y0, x1, y1) in pixels, mask (size, size) bool}; the scene is node 0,
    objects are its children, the spot of a spotted object is a child of the object."""
    whole = np.ones((size, size), bool)
    nodes = [dict(id=0, parent=-1, label="scene", caption=caption(s), box=(0, 0, size, size), mask=whole)]
    body, spot, _ = _coverage(s.things, np.full(len(s.things), s.grid), size)

    def add(parent, label, text, soft):
        mask = soft > 0.5 if soft.max() > 0.5 else soft == soft.max()  # a spot below half a pixel: where most of it is
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1)
        nodes.append(dict(id=len(nodes), parent=parent, label=label, caption=text, box=box, mask=mask))

    for i, t in enumerate(s.things):
        add(0, t.shape, name(t), np.maximum(body[i], spot[i]))
        if t.texture == "spotted":
            add(len(nodes) - 1, "spot", f"the white spot on a {t.colour} {t.shape}", spot[i])
    return nodes


# Words ------------------------------------------------------------------------------------------------------------


def name(t: Thing, size: bool = True, texture: bool = True) -> str:
    """'a large striped red star'; without size and texture 'a red star'."""
    words = ["a", t.size if size else "", t.texture if texture and t.texture != "solid" else "", t.colour, t.shape]
    return articles(" ".join(w for w in words if w))


def articles(text: str) -> str:
    """'a' before a vowel becomes 'an'."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def relation(a: Thing, b: Thing, grid: int = 3) -> str:
    """Where a is, seen from b. Columns decide first, so that every pair has exactly one relation."""
    dx, dy = a.cell % grid - b.cell % grid, a.cell // grid - b.cell // grid
    return ("to the left of" if dx < 0 else "to the right of") if dx else ("above" if dy < 0 else "below")


def backdrop(s: Scene) -> str:
    return f"a {s.tone} background" if s.pattern == "plain" else f"a {s.tone} {s.pattern} background"


def place(t: Thing, grid: int = 3) -> str:
    """'at the top left', 'in the centre'."""
    words = PLACES[grid][t.cell]
    return f"in the {words}" if words == "centre" else f"at the {words}"


def caption(s: Scene, variant: int = 0, brief: bool = False) -> str:
    """Variant 0 names every attribute in a fixed order; other variants reword it and may leave details out. brief: neither
    sizes nor the background, so that a cropped or darker picture still fits its caption."""
    a, rest = s.things[0], s.things[1:]
    if variant == 0:
        first, *others = (name(t, size=not brief) for t in s.things)
        text = f"{first} {relation(a, rest[0], s.grid)} {others[0]}" if rest else first
        text += f" {place(a, s.grid)}" if not rest and s.grid > 1 else ""  # a close-up has no place
        text += "".join(f" and {n} {place(t, s.grid)}" for n, t in zip(others[1:], rest[1:]))
        return text if brief else f"{text} on {backdrop(s)}" + (f" in the {s.region}" if s.region else "")
    rng = np.random.default_rng(variant)
    detail, kind = rng.random(3) < 0.6, rng.integers(4)
    first = name(a, detail[0] and not brief, detail[0])
    others = [name(t, detail[1] and not brief, detail[1]) for t in rest]
    if rest:
        pair = (
            (others[0], relation(rest[0], a, s.grid), first) if kind % 2 else (first, relation(a, rest[0], s.grid), others[0])
        )
        core = " ".join(pair) + "".join(f", with {n} {place(t, s.grid)}" for n, t in zip(others[1:], rest[1:]))
    else:
        core = first if detail[1] or s.grid == 1 else f"{first} {place(a, s.grid)}"
    text = ("a picture of {}", "there is {}", "{}", "we see {}")[kind].format(core)
    text += f" on {backdrop(s)}" if detail[2] and not brief else ""
    words = [(w, *SYNONYMS.get(w, ())) for w in text.split()]
    return articles(" ".join(options[int(rng.random() * len(options))] for options in words))


def long_caption(s: Scene) -> str:
    """A dense description of more than 77 CLIP tokens, in sentences that also stand alone."""
    count = ("one object", "two objects", "three objects")[len(s.things) - 1]
    out = [f"This is a simple flat picture of {count} on {backdrop(s)}."]
    for t in s.things:
        family = next((f for f, members in FAMILIES.items() if t.shape in members), "private sign")
        skin = {
            "solid": "It is filled evenly with one colour, without any bands or spots.",
            "striped": f"Its body is {t.colour} with darker horizontal bands across it.",
            "spotted": f"It is {t.colour} and carries one round white spot.",
        }[t.texture]
        out.append(f"{name(t).capitalize()} is {place(t, s.grid)} of the picture. It is a kind of {family}. {skin}")
        out.append(f"The {t.shape} is {t.size}, so it takes up {'much' if t.size == 'large' else 'little'} of its place.")
    for i, a in enumerate(s.things):
        out += [f"The {a.colour} {a.shape} is {relation(a, b, s.grid)} the {b.colour} {b.shape}." for b in s.things[i + 1 :]]
    ground = "even, with no pattern at all" if s.pattern == "plain" else f"{s.pattern} in two close shades"
    out.append(f"The background is {s.tone} and {ground}. Nothing else can be seen in the picture, and no two objects touch.")
    return " ".join(out)


# Questions and negatives --------------------------------------------------------------------------------------------


def questions(s: Scene) -> list[dict]:
    """Yes/no questions that this scene answers with yes, in the form of the DSG files: {id, text, kind, about, parents}.
    Attributes depend on their object, relations on both objects; ids start at 1 and no parents means []."""
    out = []

    def ask(text, kind, about, parents=()):
        out.append(dict(id=len(out) + 1, text=text, kind=kind, about=about, parents=list(parents)))
        return len(out)

    entity = {t.shape: ask(f"Is there a {t.shape}?", "object", (t.shape,)) for t in s.things}
    for t in s.things:
        for kind in ("colour", "size", "texture"):
            value = getattr(t, kind)
            ask(f"Is the {t.shape} {value}?", kind, (t.shape, value), [entity[t.shape]])
        ask(f"Is the {t.shape} {place(t, s.grid)}?", "place", (t.shape, t.cell), [entity[t.shape]])
    for i, a in enumerate(s.things):
        for b in s.things[i + 1 :]:
            text = f"Is the {a.shape} {relation(a, b, s.grid)} the {b.shape}?"
            ask(text, "relation", (a.shape, relation(a, b, s.grid), b.shape), [entity[a.shape], entity[b.shape]])
    ask(f"Is the background {s.tone}?", "background", (s.tone,))
    return out


def answer(s: Scene, question: dict) -> bool:
    """The true answer to a question of `questions` (also of another scene). An absent object has no attributes."""
    here, about, kind = {t.shape: t for t in s.things}, question["about"], question["kind"]
    if kind == "background":
        return s.tone == about[0]
    if kind == "relation":
        a, b = here.get(about[0]), here.get(about[2])
        return a is not None and b is not None and relation(a, b, s.grid) == about[1]
    thing = here.get(about[0])
    if kind == "object" or thing is None:
        return thing is not None
    return getattr(thing, "cell" if kind == "place" else kind) == about[1]


YES_NO = ("object", "colour", "texture", "size", "place", "relation", "background")
OPEN = {"what colour": tuple(COLOURS), "what shape": SHAPES, "count": ("one", "two", "three")}


def _other(rng, options, taken):
    options = [o for o in options if o not in taken]
    return options[rng.integers(len(options))]


def ask(s: Scene, rng, kinds=(*YES_NO, *OPEN)) -> tuple[str, str, str]:
    """A question about a scene: half of those with yes or no have the answer no, made by changing the one thing asked for."""
    kinds = [k for k in kinds if k != "relation" or len(s.things) > 1]
    kind, i, yes = kinds[rng.integers(len(kinds))], int(rng.integers(len(s.things))), rng.random() < 0.5
    t, others = s.things[i], s.things[:i] + s.things[i + 1 :]

    if kind == "count":
        return "How many objects are there?", OPEN["count"][len(s.things) - 1], kind
    if kind == "what shape" and any(o.colour == t.colour for o in others):
        kind = "what colour"
    if kind == "what colour":
        return f"What colour is the {t.shape}?", t.colour, kind
    if kind == "what shape":
        return f"What shape is {t.colour}?", t.shape, kind
    asked = s
    if kind == "relation":
        a, b = s.things[:2]
        asked = s if yes else replace(s, things=(replace(a, cell=b.cell), replace(b, cell=a.cell), *s.things[2:]))
    elif kind == "background":
        asked = s if yes else replace(s, tone=_other(rng, TONES, [s.tone]))
    elif not yes:
        pool = {"object": (SHAPES, [x.shape for x in s.things]), "colour": (COLOURS, [t.colour]),
                "size": (SIZES, [t.size]), "texture": (TEXTURES, [t.texture]),
                "place": (range(s.grid**2), [t.cell])}[kind]  # fmt: skip
        t = replace(t, **{{"object": "shape", "place": "cell"}.get(kind, kind): _other(rng, *pool)})
        asked = replace(s, things=(*s.things[:i], t, *s.things[i + 1 :]))
    about = {"relation": s.things[0].shape, "background": asked.tone}.get(kind, t.shape)
    found = [q for q in questions(asked) if q["kind"] == kind and q["about"][0] == about]
    return found[0]["text"], "yes" if yes else "no", kind


def negatives(s: Scene, seed: int = 0) -> list[dict]:
    """Hard negatives {kind, caption, scene}: a caption wrong for s, with the scene that it is right for.

    replace_*: one attribute of one object; swap_att / swap_obj: two objects exchange colour / place (two objects at
    least, different in it); add_obj: one object more (two objects at most)."""
    rng = np.random.default_rng(seed)
    out, things = [], list(s.things)

    def emit(kind, new):
        counter = replace(s, things=tuple(new))
        out.append(dict(kind=kind, caption=caption(counter), scene=counter))

    i = int(rng.integers(len(things)))
    t, shapes = things[i], [x.shape for x in things]
    pool = SHAPES if t.shape in SHAPES else PRIVATE_SHAPES
    if len(set(pool) - set(shapes)):
        emit("replace_obj", things[:i] + [replace(t, shape=_other(rng, pool, shapes))] + things[i + 1 :])
    for kind, options in (("colour", tuple(COLOURS)), ("size", tuple(SIZES)), ("texture", TEXTURES)):
        new = replace(t, **{kind: _other(rng, options, [getattr(t, kind), "solid"])})  # "solid" is not named
        emit("replace_att", things[:i] + [new] + things[i + 1 :])
    if len(things) > 1:
        a, b = things[:2]
        if a.colour != b.colour:
            emit("swap_att", [replace(a, colour=b.colour), replace(b, colour=a.colour)] + things[2:])
        emit("swap_obj", [replace(b, cell=a.cell), replace(a, cell=b.cell)] + things[2:])  # the same words, exchanged
    if len(things) < min(3, s.grid**2) and t.shape in SHAPES:
        cell = _other(rng, range(s.grid**2), [x.cell for x in things])
        extra = Thing(_other(rng, SHAPES, shapes), _other(rng, tuple(COLOURS), [t.colour]), t.size, "solid", cell)
        emit("add_obj", things + [extra])
    return out


# A data source --------------------------------------------------------------------------------------------------------


class Source:
    """`count` scenes in memory, with the interface of data.Shards: image, five captions, class labels.

    size: pixels; brief: kind of captions; options: those of scene()."""

    def __init__(self, count: int, seed: int, size: int, brief: bool = False, **options):
        self.scenes = [scene(i, seed, **options) for i in range(count)]
        self.images = render(self.scenes, size)
        self.texts = [[caption(s, 4 * i + v if v else 0, brief) for v in range(5)] for i, s in enumerate(self.scenes)]
        self.sizes = [count]

    def __len__(self) -> int:
        return len(self.scenes)

    def captions(self) -> list[str]:
        return [c for texts in self.texts for c in texts]

    def record(self, shard: int, row: int) -> dict:
        """Labels are those of the first object."""
        t = self.scenes[row].things[0]
        values = {"shape": SHAPES, "colour": tuple(COLOURS), "texture": TEXTURES, "size": tuple(SIZES)}
        labels = {k: v.index(getattr(t, k)) for k, v in values.items()}
        labels["colour and shape"] = labels["colour"] * len(SHAPES) + labels["shape"]
        return {"key": f"{row:08d}", "captions": self.texts[row], "labels": labels}

    def read(self, shard: int, row: int) -> dict:
        return {**self.record(shard, row), "image": Image.fromarray(self.images[row])}
