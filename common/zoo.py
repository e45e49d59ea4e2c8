"""The small stand-in models of common/weights/, trained by this project's own scripts on the generated world.

    vae = load_vae()                        autoencoder, 32 px <-> 8 x 8 x 8
    judge = load_judge()                    reads every attribute off a picture; its features serve Frechet distances
    clip = load_clip()                      32 px scenes and short captions, in the place of CLIP
    reader, tok = load_reader(), load_tokenizer()      captions -> tokens, frozen: the text encoder
    painter = load_painter()                text -> 32 px scenes on a grid of 2 x 2 cells
    images = painter.draw(["a large striped red star on a dark background"], seed=1)
    load_vqa().answer(images, [["Is there a star?", "Is the star red?"]])    -> [[True, True]]
    load_rewriter()                         language model that paraphrases captions

They let the methods that need a trained model start without a download. common/weights/README.md says how each was made and
how good it is.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import ckpt, scenes, vae
from common.dit import Attention, DiT, Mlp
from common.resnet import ResNet
from common.tokenizer import Tokenizer
from common.vit import CLIP, Block, TextTransformer, ViT, trim

WEIGHTS = Path(__file__).parent / "weights"
ANSWERS = {  # what the judge tells of one cell of the grid
    "shape": (*scenes.SHAPES, *scenes.PRIVATE_SHAPES, "nothing"),
    "colour": tuple(scenes.COLOURS),
    "size": tuple(scenes.SIZES),
    "texture": scenes.TEXTURES,
    "tone": tuple(scenes.TONES),
    "pattern": scenes.PATTERNS,
}


class Judge(nn.Module):
    """Cells of a scene (B, 3, 32, 32) in [-1, 1] -> logits of every attribute. Whole scenes go through `cells` first."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.body = ResNet(width)
        self.heads = nn.ModuleDict({k: nn.Linear(self.body.out_dim, len(v)) for k, v in ANSWERS.items()})

    def forward(self, x):
        f = self.body(x)
        return {k: head(f) for k, head in self.heads.items()}

    def features(self, x: torch.Tensor, grid: int) -> torch.Tensor:
        """Scenes (B, 3, S, S) -> (B, grid * grid * D): the cells' features side by side."""
        return self.body(cells(x, grid)).view(len(x), -1)

    def read(self, x: torch.Tensor, grid: int) -> dict[str, torch.Tensor]:
        """Scenes (B, 3, S, S) -> attribute -> (B, grid * grid) indices into ANSWERS."""
        return {k: v.argmax(1).view(len(x), -1) for k, v in self(cells(x, grid)).items()}


def cells(x: torch.Tensor, grid: int) -> torch.Tensor:
    """(B, 3, S, S) -> (B * grid * grid, 3, 32, 32), row by row: every cell enlarged to 32 px."""
    x = F.interpolate(x, (32 * grid, 32 * grid), mode="bilinear", antialias=True) if x.shape[-1] != 32 * grid else x
    x = x.unflatten(2, (grid, 32)).unflatten(4, (grid, 32))  # (B, 3, g, 32, g, 32)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 32, 32)


def verify(judge: Judge, images: torch.Tensor, world: list[scenes.Scene]) -> dict[str, list[bool]]:
    """Whether each picture (N, 3, S, S) in [-1, 1] shows what its scene's full caption names: attribute -> one answer for each
    scene that has it. "all" needs every one of them. Objects are found by their shape, wherever they are."""
    out: dict[str, list[bool]] = {}
    for i in range(0, len(world), 256):
        read = judge.read(images[i : i + 256], world[0].grid)
        for j, s in enumerate(world[i : i + 256]):
            seen = {k: [ANSWERS[k][int(v)] for v in read[k][j]] for k in ANSWERS}
            where = {shape: cell for cell, shape in enumerate(seen["shape"]) if shape != "nothing"}
            here = [where.get(t.shape) for t in s.things]
            right = {"shape": None not in here, "count": sum(x != "nothing" for x in seen["shape"]) == len(s.things)}
            for k in ("colour", "size", "texture"):
                right[k] = all(c is not None and seen[k][c] == getattr(t, k) for t, c in zip(s.things, here))
            found = [replace(t, cell=-1 if c is None else c) for t, c in zip(s.things, here)]
            placed = [*zip(found, s.things)][0 if len(found) == 1 else 2 :]  # two objects are related, all others have a place
            if s.grid > 1 and placed:
                right["place"] = all(a.cell == b.cell for a, b in placed)
            if len(found) > 1:
                a, b = found[:2]
                same = scenes.relation(a, b, s.grid) == scenes.relation(*s.things[:2], s.grid)
                right["relation"] = min(a.cell, b.cell) >= 0 and same
            for k in ("tone", "pattern"):  # the cells' majority
                right[k] = max(ANSWERS[k], key=seen[k].count) == getattr(s, k)
            for k, v in {**right, "all": all(right.values())}.items():
                out.setdefault(k, []).append(v)
    return out


PARTS = {"shape": (*scenes.SHAPES, "nothing"), **{k: ANSWERS[k] for k in ("colour", "size", "texture")}, "cell": range(4)}
RELATIONS = ("to the left of", "to the right of", "above", "below", "nothing")


class Reader(nn.Module):
    """Text encoder of scenes, in the place of CLIP's or T5's: trained (data_prep/train_reader.py) to tell which objects a
    caption names, sorted by shape, and their relations. Its first four output tokens sum that up: three objects, the rest."""

    def __init__(self, words: int, width: int = 128, depth: int = 2, heads: int = 4, context: int = 40):
        super().__init__()
        self.config = dict(words=words, width=width, depth=depth, heads=heads, context=context)
        self.width, self.context = width, context
        self.encoder = TextTransformer(words, context, width, depth, heads, act="gelu")
        self.query = nn.Parameter(torch.randn(1, 4, width))
        self.layers = nn.ModuleList()
        for _ in range(2):
            parts = Attention(width, heads, cross=True), Attention(width, heads), Mlp(width, 2 * width)
            self.layers.append(nn.ModuleList(m for part in parts for m in (nn.LayerNorm(width), part)))
        self.norm = nn.LayerNorm(width)
        self.objects = nn.ModuleDict({k: nn.Linear(width, len(v)) for k, v in PARTS.items()})
        self.rest = nn.ModuleDict({k: nn.Linear(width, len(ANSWERS[k])) for k in ("tone", "pattern")})
        self.relation = nn.Linear(width, 3 * len(RELATIONS))

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, L) -> (B, 4 + L, width): the summary, then the text's own tokens."""
        text = self.encoder.hidden(ids)
        valid = torch.arange(ids.shape[1], device=ids.device)[None] <= ids.argmax(1)[:, None]
        x = self.query.expand(len(ids), -1, -1)
        for n1, cross, n2, attn, n3, mlp in self.layers:
            x = x + cross(n1(x), text, valid)
            x = x + attn(n2(x))
            x = x + mlp(n3(x))
        return torch.cat([self.norm(x), text], 1)

    def forward(self, ids):
        """-> logits of every part: (B, 3, n) for objects, (B, n) for tone and pattern, (B, 3, 5) for the pairs' relations."""
        x = self.hidden(ids)[:, :4]
        out = {k: head(x[:, :3]) for k, head in self.objects.items()} | {k: head(x[:, 3]) for k, head in self.rest.items()}
        return out | {"relation": self.relation(x[:, 3]).unflatten(1, (3, -1))}


class Painter(nn.Module):
    """Text-to-image: the model of methods/ldm_conditioning.py --preset standin, which explains every part. The reader's
    tokens enter a DiT by cross-attention; flow; classifier-free guidance."""

    def __init__(self, words: Tokenizer, reader: Reader, autoencoder: vae.VAE, config: dict, size: dict):
        super().__init__()
        self.tok, self.reader, self.vae, self.slots, self.beta = words, reader, autoencoder, config["slots"], config["beta_txt"]
        self.dit, self.proj = DiT(**size), nn.Linear(reader.width, size["dim"])
        self.null = nn.Parameter(torch.zeros(1, 1, size["dim"]))

    def read(self, prompts: list[str]) -> torch.Tensor:
        """-> (B, slots, D). Text behind the reader's context is cut."""
        ids = trim(self.tok(prompts, self.reader.context)).to(self.null.device)
        noise = torch.randn(1, self.slots, self.null.shape[-1], generator=torch.Generator().manual_seed(1)).to(self.null)
        return replicate_padding(self.proj(self.reader.hidden(ids)), ids.argmax(1) + 5, self.slots, self.beta, noise)

    def noise(self, count: int, seed: int) -> torch.Tensor:
        """Starting points (count, z, 8, 8); the same seed gives the same ones, and the first of more."""
        side = self.dit.config["input_size"]
        return torch.stack([torch.randn(self.vae.z, side, side, generator=torch.Generator().manual_seed(seed * 1_000_003 + i))
                            for i in range(count)])  # fmt: skip

    @torch.no_grad()
    def draw(self, prompts: list[str], guidance: float = 3.0, steps: int = 16, seed: int = 0, part: int = 256):
        """-> images (N, 3, 32, 32), about [-1, 1], on the CPU. guidance 1: none. Picture i depends on its prompt, the seed
        and i only."""
        if guidance < 0 or steps < 1:
            raise ValueError(f"guidance {guidance} must not be negative, steps {steps} at least 1")
        noise, out = self.noise(len(prompts), seed), []
        for i in range(0, len(prompts), part):
            z, context = noise[i : i + part].to(self.null), self.read(prompts[i : i + part])
            both = torch.cat([context, self.null.expand_as(context)])
            times = torch.linspace(1, 0, steps + 1, device=z.device)
            for t, t_next in zip(times[:-1], times[1:]):
                cond, null = self.dit(torch.cat([z, z]), 999 * t.expand(2 * len(z)), context=both).chunk(2)
                z = z + (t_next - t) * (null + guidance * (cond - null))  # Euler's method
            out.append(self.vae.decode(z).cpu())
        return torch.cat(out)


class Vqa(nn.Module):
    """Answers yes or no to questions about scenes of four cells. The judge's features of each cell and its number, standardised
    (else the large ones, of colours, hide sizes) and projected, stand as words before the question in a small transformer,
    whose last place answers."""

    def __init__(self, words: list[str], width: int = 96, depth: int = 3, heads: int = 4, longest: int = 12):
        super().__init__()
        self.config = dict(words=words, width=width, depth=depth, heads=heads, longest=longest)
        self.number, self.longest, self.judge = {w: i for i, w in enumerate(words, 1)}, longest, load_judge()
        inputs = self.judge.body.out_dim + 4
        self.register_buffer("centre", torch.zeros(inputs))
        self.register_buffer("spread", torch.ones(inputs))
        self.projector = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))
        self.token_embed = nn.Embedding(len(words) + 1, width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(longest, width))
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 1)

    def ids(self, questions: list[str]) -> torch.Tensor:
        """(B, longest): numbers of the words, at the right; ValueError for a word that no scene is asked with."""
        rows = [re.findall(r"[a-z]+", q.lower()) for q in questions]
        new = [w for row in rows for w in row if w not in self.number]
        if new or max(map(len, rows), default=0) > self.longest:
            raise ValueError(f"the VQA stand-in does not know {new[:3]} in questions of up to {self.longest} words")
        return torch.tensor([[0] * (self.longest - len(row)) + [self.number[w] for w in row] for row in rows])

    @torch.no_grad()
    def see(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, 32, 32) in [-1, 1] -> (B, 4, D), not yet standardised."""
        f = self.judge.features(images, 2).unflatten(1, (4, -1))
        return torch.cat([f, torch.eye(4, device=f.device).expand(len(f), -1, -1)], 2)

    def forward(self, seen, ids):
        x = torch.cat([self.projector((seen - self.centre) / self.spread), self.token_embed(ids) + self.pos_embed], 1)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x[:, -1]))[:, 0]  # log-odds of yes

    @torch.no_grad()
    def answer(self, images: torch.Tensor, questions: list[list[str]]) -> list[list[bool]]:
        """Images (N, 3, 32, 32) in [-1, 1], some questions about each -> whether yes is likelier than no."""
        owner = torch.tensor([i for i, some in enumerate(questions) for _ in some], device=images.device)
        ids = self.ids([q for some in questions for q in some]).to(images.device)
        said = iter((self(self.see(images)[owner], ids) > 0).tolist())
        return [[next(said) for _ in some] for some in questions]


def replicate_padding(tokens, lengths, slots, beta, noise=None):  # twin: replicate_padding
    """Fills the slots behind a short text with copies of its tokens, the m-th copy with noise beta * std * sqrt(m).

    tokens (B, L, D), of which lengths (B,) are real; std: over the text's tokens, of each channel; noise (B or 1, slots, D):
    given, or drawn. Real tokens stay as they are, and all slots are valid afterwards -> (B, slots, D)."""
    n = lengths.clamp(1, slots)[:, None]
    place = torch.arange(slots, device=tokens.device)[None]
    out = tokens.gather(1, (place % n)[..., None].expand(-1, -1, tokens.shape[-1]))
    real = (torch.arange(tokens.shape[1], device=tokens.device)[None] < n)[..., None]
    text = tokens.detach()  # the root of a zero variance, of one token alone, has no gradient
    mean = (text * real).sum(1, keepdim=True) / n[..., None]
    std = (((text - mean) * real).square().sum(1, keepdim=True) / n[..., None]).sqrt()
    copy_number = (place // n)[..., None]  # 0 for the text itself
    return out + beta * std * copy_number.sqrt() * (torch.randn_like(out) if noise is None else noise)


# The rewriter: paraphrases of captions, by rules and by a small language model ------------------------------------------------


WORDS = {w: k for k, options in scenes.SYNONYMS.items() for w in (k, *options)}  # any word -> its plain form
OPPOSITE = {"to the left of": "to the right of", "to the right of": "to the left of", "above": "below", "below": "above"}
ADJECTIVES = frozenset([*scenes.COLOURS, *scenes.SIZES, *scenes.TEXTURES])
GROUNDS = frozenset([*scenes.TONES, *scenes.PATTERNS])


def same_meaning(a, b) -> bool:
    """Whether two captions of the generated world say the same in whatever words and order."""
    return meaning(a) == meaning(b)


def meaning(text):
    """-> objects (shape, adjectives, place), relations (a, "left" or "above", b), words of the ground, words not understood."""
    text = " ".join(WORDS.get(w, w) for w in re.findall(r"[a-z]+", text.lower()))
    text = re.sub(r"^(?:an? picture of|there is|we see) ", "", text)
    text = re.sub(r"\b(?:an?|the) ", "", text)
    ground = re.search(r"\bon ((?:\w+ ){1,2})background\b", text)
    tones = frozenset(ground[1].split() if ground else ())
    text = text.replace(ground[0], " ") if ground else text
    things, relations, strange, adjectives, link = [], set(), list(tones - GROUNDS), set(), None
    words = text.replace("to left of", "to-left").replace("to right of", "to-right").split()
    for w in words:
        if w in ADJECTIVES:
            adjectives.add(w)
        elif w in scenes.SHAPES:
            things.append([w, frozenset(adjectives), ""])
            if link and len(things) > 1:
                pair = (things[-2][0], w) if link in ("to-left", "above") else (w, things[-2][0])
                relations.add((pair[0], "left" if "to-" in link else "above", pair[1]))
            adjectives, link = set(), None
        elif w in ("to-left", "to-right", "above", "below"):
            link = w
        elif w in ("top", "bottom", "left", "right", "centre") and things:
            things[-1][2] += w
        elif w not in ("at", "in", "and", "with"):
            strange.append(w)
    return frozenset(map(tuple, things)), frozenset(relations), tones, tuple(strange)


def ground_first(text: str) -> str:
    """A red star on a dark background -> on a dark background, a red star: a user's order, which no caption has."""
    things, _, ground = text.partition(" on ")
    return f"on {ground}, {things}"


def reworded(text: str, weak: str, rng) -> str:
    """A paraphrase by rules: other words, another order; what the question `weak` asks for tends to the front."""
    shapes = lambda t: {WORDS.get(w, w) for w in re.findall(r"[a-z]+", t.lower())} & set(scenes.SHAPES)  # noqa: E731

    def word(w):
        options = scenes.SYNONYMS.get(w, ())
        return str(rng.choice(options)) if options and rng.random() < 0.3 else w

    m = re.match(r"(on an? .*?), (.*)$", text)  # a ground in front goes back, so that the rules apply again
    text = re.sub(r"^(a picture of|there is|we see)\s+", "", f"{m[2]} {m[1]}" if m else text)
    text, _, ground = text.partition(" on a ")
    pieces = re.split(rf" ({'|'.join(OPPOSITE)}) ", text, maxsplit=1)
    about = shapes(weak) & shapes(pieces[-1])  # the weak question asks for the second object
    if len(pieces) == 3 and " and " not in pieces[2] and rng.random() < (0.8 if about else 0.4):
        pieces = [pieces[2], OPPOSITE[pieces[1]], pieces[0]]
    text = " ".join(pieces)
    front = ground and rng.random() < (0.8 if "background" in weak else 0.25)
    text = " ".join(word(w) for w in text.split())
    backdrop = "on a " + " ".join(word(w) for w in ground.split()) if ground else ""
    text = f"{backdrop}, {text}" if front else f"{text} {backdrop}".strip()
    lead = ("", "a picture of ", "there is ")[rng.choice(3, p=(0.6, 0.2, 0.2))] if not front else ""
    return scenes.articles(lead + text)


class Rewriter(nn.Module):
    """A small language model, trained on paraphrases (data_prep/train_rewriter.py). It reads "prompt ; best one so far ;
    weakest element :" and writes a paraphrase of the prompt."""

    def __init__(self, vocab, width=80, depth=3, heads=4, context=120):
        super().__init__()
        self.config = dict(vocab=vocab, width=width, depth=depth, heads=heads, context=context)
        self.body = TextTransformer(vocab, context, width, depth, heads, act="gelu")

    def forward(self, ids):
        return self.body.hidden(ids) @ self.body.token_embed.weight.T  # (B, L, vocab)

    def after(self, ids, first, cache):
        """Logits (B, vocab) after ids (B, L), which follow `first` others: none, or L is 1. cache: keys and values of each
        layer, of one row or B, added to. The rest is common/vit.py's Block."""
        x = self.body.token_embed(ids) + self.body.pos_embed[first : first + ids.shape[1]]
        for i, block in enumerate(self.body.blocks):
            q, *new = block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
            if i in cache:
                new = [torch.cat([old.expand(len(ids), -1, -1, -1), t], 2) for old, t in zip(cache[i], new)]
            cache[i] = new
            a = F.scaled_dot_product_attention(q, *cache[i], is_causal=first == 0)
            x = x + block.attn.proj(a.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return self.body.norm(x[:, -1]) @ self.body.token_embed.weight.T

    @torch.no_grad()
    def write(self, context, count, stop, generator, temperature=1.0, top_p=0.95, longest=48):
        """context: list of ids, read once for all -> (count, at most longest) continuations, drawn by nucleus sampling, of the
        64 likeliest ids at most. They may run on behind `stop`, where decode() ends."""
        cache, ids = {}, torch.zeros(count, 0, dtype=torch.long)
        logits = self.after(torch.tensor([context]), 0, cache).expand(count, -1)
        for place in range(len(context), min(len(context) + longest, self.config["context"])):
            values, order = (logits / temperature).softmax(1).topk(min(64, logits.shape[1]))
            values[values.cumsum(1) - values > top_p] = 0
            pick = torch.multinomial(values, 1, generator=generator)
            ids = torch.cat([ids, order.gather(1, pick)], 1)
            if (ids == stop).any(1).all():
                break
            logits = self.after(ids[:, -1:], place, cache)
        return ids


def rewriter_ids(tok: Tokenizer, prompt: str, best: str, weak: str) -> list[int]:
    return [tok.start, *tok.encode(f"{prompt} ; {best} ; {weak} :")]


# Loading --------------------------------------------------------------------------------------------------------------------


def _stored(path, make, elsewhere: tuple = ()) -> nn.Module:
    """make(settings of the file) with its weights in float32, frozen. Prefixes `elsewhere`: parts that are not in the file."""
    state, meta = vae.read_tensors(path)
    state = {k.removeprefix("semantic."): v.float() if v.is_floating_point() else v for k, v in state.items()}
    try:
        model = make(meta)
        model.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith(elsewhere)} | state)
    except KeyError as error:
        raise ValueError(f"{path} is no stand-in model: it does not say its {error}") from error
    except (ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is no stand-in model of this kind: {' '.join(str(error).split())[:300]}") from error
    return model.eval().requires_grad_(False)


def load_tokenizer() -> Tokenizer:
    return Tokenizer.load(WEIGHTS / "merges.txt")


def load_vae() -> vae.VAE:
    return vae.load_vae(WEIGHTS / "vae.safetensors")


def load_judge() -> Judge:
    return _stored(WEIGHTS / "judge.safetensors", lambda _: Judge())


def load_reader() -> Reader:
    return _stored(WEIGHTS / "reader.safetensors", lambda meta: Reader(**meta["reader"]))


def load_rewriter() -> Rewriter:
    return _stored(WEIGHTS / "rewriter.safetensors", lambda meta: Rewriter(**meta["lm"]))


def load_clip(path="") -> CLIP:
    """Pictures (B, 3, 32, 32) normalised as CLIP's; texts by load_tokenizer(), at most 77 tokens. path: a model.safetensors of
    methods/dci.py, which fine-tunes it, in place of the stored one."""
    path = path or WEIGHTS / "clip.safetensors"
    return _stored(path, lambda meta: CLIP(ViT(**meta["visual"]), TextTransformer(**meta["text"])))


def load_vqa() -> Vqa:
    return _stored(WEIGHTS / "vqa.safetensors", lambda meta: Vqa(**meta["vqa"]), ("judge.",))


def load_painter(name: str = "painter") -> Painter:
    def make(meta):
        autoencoder = load_vae()
        if meta["vae"] != autoencoder.fingerprint():
            raise ValueError(f"common/weights/{name}.safetensors was trained with another autoencoder than the one beside it")
        return Painter(load_tokenizer(), load_reader(), autoencoder, meta["config"], meta["dit"])

    return _stored(WEIGHTS / f"{name}.safetensors", make, ("reader.", "vae."))


def adopt(path, name: str, without: tuple = ()) -> None:
    """Puts a run's model.safetensors into common/weights/ as fp16, with its settings; `without` parts of these prefixes."""
    state, meta = vae.read_tensors(path)
    state = {k: v for k, v in state.items() if not k.startswith(without)}
    ckpt.export(
        WEIGHTS / f"{name}.safetensors", {k: v.half() if v.is_floating_point() else v for k, v in state.items()}, **meta
    )
