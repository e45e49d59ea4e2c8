"""Consistency, diversity, realism: sweep a generator's knobs, measure each setting three ways, compare by Pareto fronts.

Paper      Astolfi, Careil, Hall, Manas, Muckley, Verbeek, Romero-Soriano, Drozdzal: Consistency-diversity-realism Pareto fronts
           of conditional image generative models. 2024, arXiv 2406.10429
Idea       A generator that is to stand in for the world must do what the prompt says (consistency), look like the world
           (realism) and show all of it (diversity). One number hides that these pull against each other, and a model is not
           one point: guidance, filtering, neighbours, steps or bit rate move it at inference time. So sweep each model's knobs,
           plot every setting, and keep what no other setting beats in all three: the front over all models. The same per
           region of the world shows for whom a model works.
Equations  front -> pareto_front()     volume under it -> hypervolume()     diversity, realism of a prompt -> diversity(),
           realism()     consistency -> dsg_score()     filtering -> top_m()
Read first section 2, then axes() and marginal() in section 5 and run(); the generators of section 4 can be replaced by folders
Symbols    n pictures of a prompt, real ones of the same prompt, f feature; a point is (model, knob, value). DSG: Davidsonian
           scene graph, yes-or-no questions about a prompt's parts, answered by a VQA model; judge: a classifier of scenes
Run        python methods/pareto_eval.py --preset smoke                      (CPU, no files, under 30 s)
           python methods/pareto_eval.py                                     (CPU, no files; 5.5 min on two quiet cores)
           python methods/pareto_eval.py --points points.csv --prompts prompts.csv --real real --answers answers.csv \
                                          --extractor inception --weights pt_inception-2015-12-05-6726825d.pth
           python methods/pareto_eval.py --people DIR                        (the DSG score against human ratings)
Data       generated (common/scenes.py) with the stand-in text-to-image models of common/weights; or any generator's pictures:
           points.csv (model, knob, value, folder beside it[, given: text or picture]), prompts.csv (id, prompt[, group]),
           folders with files named ID_anything.png (the longest id that fits); real ones of no prompt: GROUP/anything.png
Expect     laptop: guidance 1 to 8 lifts consistency by 0.01 to 0.12 and costs 0.07 to 0.16 of diversity; 3 seeds, fbf1095
Differs    from the paper: no code was published and only its abstract is known to us. Grids, sample counts and the conditional
           realism are ours; its DreamSim and Inception features are here those of a classifier of scenes (or --extractor).
           Retrieval-augmented models enter as folders, "search" is retrieval alone; fronts are taken within a task. "+-":
           standard error, from random halves of the prompts, of means over prompts; metrics of whole sets have none: half a set
           is another set, and repeated samples break nearest neighbours. From EvalGIM: the front is taken after rows without a
           value are dropped, not before; conditional diversity is measured; features are not half-precision; sets are compared
           at equal sizes, also between groups and for filtered ones; DSG also per group; equal points stay.
Uses       common/ckpt.py cli.py data.py ddp.py dit.py log.py metrics.py plot.py resnet.py scenes.py tokenizer.py vae.py vit.py
           zoo.py and weights/   (copy these with this file)
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import os
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]  # so that python, torchrun and python -m all find common/

from common import ckpt, cli, data, ddp, metrics, plot, scenes, zoo
from common.log import table, versions, write_json
from common.tokenizer import Tokenizer
from common.vit import load_clip, load_dino, trim


# 1. CONFIG (presets stand in section 7) ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    # run: the same names in all ten files; nothing is trained here, so those that say so have no effect
    out_dir: str = "runs/pareto_eval"  # one folder a run, features are kept in cache/
    seed: int = 0  # of prompts, noise and resampling; the noise is the same for every model and knob
    steps: int = 16  # of the sampler, unless the knob is steps
    batch_size: int = 128  # pictures at once
    accum: int = 1  # nothing is trained here
    lr: float = 0.0  # nothing is trained here
    wd: float = 0.0  # nothing is trained here
    warmup: int = 0  # nothing is trained here
    grad_clip: float = 0.0  # nothing is trained here
    ema_decay: float = 0.0  # nothing is trained here
    dtype: str = "float32"  # of the models; features and statistics are never half precision
    compile: bool = False  # nothing is trained here
    data: str = ""  # not used: pictures come by --points and --real
    workers: int = 0  # not used: pictures are read in the main process
    log_every: int = 1  # not used: there is one bar over the points
    eval_every: int = 0  # not used
    save_every: int = 1  # not used: each point is saved as soon as it is measured
    resume: bool = True  # use the features in cache/; --no-resume draws and reads all again
    max_bad: float = 0.01  # share of unreadable pictures of a point at which the run stops
    # knobs of the stand-in models
    models: str = "early,middle,late,search,codec"  # three ages of a text-to-image model; search finds real pictures
    guidance: str = "1,1.5,2,3,5,8"  # knob: guidance scales
    sampler_steps: str = "2,4"  # knob: further numbers of sampling steps, at --at
    top_m: str = "4,2"  # knob: the m best of a prompt by CLIPScore, at --at; folders: with --clip; their sets are a table apart
    neighbours: str = "6,24,96"  # knob of search: draws from so many real pictures that CLIP finds nearest to the prompt
    bank: int = 4_096  # pictures among which search looks
    levels: str = "2,3,5,9"  # knob of the codec, which compresses real pictures: values a latent number may take
    at: float = 3.0  # guidance while another knob is turned
    prompts: str = "96"  # number of generated prompts, or a csv or tsv with the columns id, prompt[, group]
    regions: int = 8  # generated prompts of each region of the world, 0 = no regions
    per_prompt: int = 6  # pictures of each prompt
    real_per_prompt: int = 6  # real pictures of each generated prompt
    # pictures of another generator
    points: str = ""  # csv: model, knob, value, folder; quote cells with commas
    real: str = ""  # folder of real pictures; only those that are named like the others serve the realism of a prompt
    answers: str = ""  # csv of a VQA model: file (FOLDER/NAME, seen from --points), question_id, answer[, dependency_id]: DSG
    extractor: str = "judge"  # features: judge (of scenes), inception, dinov2, clip
    weights: str = ""  # file with the extractor's weights
    clip: str = ""  # CLIP weights for the CLIPScore of other generators' pictures
    tokenizer: str = ""  # CLIP's merges file
    resize: str = "pytorch-fid"  # rule of the inception extractor: pytorch-fid, tf1 or clean
    # metrics
    k: int = 3  # neighbours of precision, recall, density and coverage
    halves: int = 40  # random halves of the prompts, for intervals and for the stability of the front
    people: str = ""  # folder of the DSG files: prints rank correlations with human ratings, nothing else


# 2. THE IDEA (start reading here) ------------------------------------------------------------------------------------
def pareto_front(points):
    """points (n, d), all axes "larger is better" -> (n,) bool: what no other point beats.

    a beats b if it is at least as good everywhere and better somewhere; so equal points do not beat each other and all stay.
    A point with a NaN is out and beats nobody. Any strictly increasing change of an axis leaves the front as it is."""
    if not len(points):
        return torch.zeros(0, dtype=torch.bool)
    P = torch.as_tensor(points, dtype=torch.float64)
    known = ~P.isnan().any(1)
    Q = P[known]
    beats = (Q[:, None] >= Q[None]).all(2) & (Q[:, None] > Q[None]).any(2)
    known[known.clone()] = ~beats.any(0)
    return known


def hypervolume(points, ref):
    """Volume between the reference point and the front of points (n, d): what at least one point is better than.

    Cuts along the last axis: between two neighbouring values, the volume of the rest of the axes of the points above. Points
    that are not better than ref in every axis have none. Axes need fixed, comparable scales; publish ref with the number."""
    ref = torch.as_tensor(ref, dtype=torch.float64)
    P = torch.as_tensor(points, dtype=torch.float64).reshape(-1, len(ref))
    P = P[(P > ref).all(1)]  # drops NaN too
    P = P[pareto_front(P)] - ref

    def volume(Q):
        if not len(Q):
            return 0.0
        if Q.shape[1] == 1:
            return Q.max().item()
        Q, total = Q[Q[:, -1].argsort(descending=True)], 0.0
        for i, (high, low) in enumerate(zip(Q[:, -1].tolist(), [*Q[1:, -1].tolist(), 0.0])):
            if high > low:
                total += (high - low) * volume(Q[: i + 1, :-1])
        return total

    return volume(P)


def diversity(f):
    """Features (n, D) of one prompt -> 1 - mean cosine of its n (n - 1) / 2 pairs; NaN for one picture: undefined, not 0."""
    f, n = F.normalize(f.double(), dim=1), len(f)
    return 1 - ((f.sum(0).square().sum() - n) / (n * (n - 1))).item() if n > 1 else math.nan


def realism(f, real):
    """Features (n, D) and real ones (m, D) of the same prompt -> mean over pictures of the cosine to the nearest real one."""
    if not len(real):
        return math.nan
    return (F.normalize(f.double(), dim=1) @ F.normalize(real.double(), dim=1).T).amax(1).mean().item()


def dsg_score(answers, parents, transitive=True):  # twin: dsg_score
    """Share of questions with "yes", where a question counts as failed if one that it depends on failed.

    answers {id: bool}; parents {id: ids}, unknown ids and an id itself are ignored. transitive: a failure reaches all
    descendants, in any order of the file, cycles included; False: the official scorer, which looks at the parents' own
    answers only, so that a grandchild of a failed question may count."""
    if not answers:
        return float("nan")
    failed = {q for q, yes in answers.items() if not yes}
    while True:
        hit = {q for q in answers if q not in failed and any(p in failed and p != q for p in parents.get(q, ()))}
        failed |= hit
        if not (hit and transitive):
            return 1 - len(failed) / len(answers)


def top_m(score, prompt, m):
    """Post-hoc filtering: rows of the m best-scored pictures (N,) of each prompt (N,), in their old order."""
    rank = torch.argsort(score, descending=True, stable=True)
    keep = [rank[rows[:m]] for rows in rows_of(prompt[rank], int(prompt.max()) + 1)]
    return torch.cat(keep).sort().values


# 3. MODULES: extractors, pictures -> features ----------------------------------------------------------------------------
class Extractor:
    """images (N, 3, S, S) in [-1, 1] or PIL -> features (N, D)."""

    def __init__(self, cfg, device):
        self.device, self.cfg = device, cfg
        if cfg.extractor != "judge" and not cfg.weights:
            raise ValueError(f"--extractor {cfg.extractor} needs --weights, the file with its published weights")
        if cfg.extractor == "judge":
            net = zoo.load_judge()
        elif cfg.extractor == "inception":
            net = metrics.inception_features(cfg.weights, cfg.resize)
        else:
            net = load_dino(cfg.weights) if cfg.extractor == "dinov2" else load_clip(cfg.weights)
        self.net = net.to(device).eval()

    @torch.no_grad()
    def __call__(self, images):
        if self.cfg.extractor == "judge":
            if not isinstance(images, torch.Tensor):
                small = [np.asarray(i.resize((32, 32), Image.BICUBIC), np.float32) for i in images]
                images = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 127.5 - 1
            return self.net.features(images.to(self.device), 2).cpu()
        if isinstance(images, torch.Tensor):
            images = [Image.fromarray(i) for i in to_uint8(images)]
        if self.cfg.extractor == "dinov2":
            return self.net(metrics.dino_input(images).to(self.device)).float().cpu()
        if self.cfg.extractor == "clip":
            return self.net.encode_image(metrics.clip_input(images, self.net.visual.image_size).to(self.device)).float().cpu()
        rows = [torch.from_numpy(np.array(i)).permute(2, 0, 1)[None].to(self.device) for i in images]  # sizes may differ
        return self.net.pooled(torch.cat([metrics.resize_299(r, self.cfg.resize) for r in rows])).cpu()


def to_uint8(x):
    """(N, 3, S, S) in [-1, 1] -> (N, S, S, 3) array."""
    return ((x.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()


class ClipScorer:
    """100 cos of pictures and prompts, without a prefix, by the stand-in CLIP of scenes or by published weights."""

    def __init__(self, cfg, device):
        own = not cfg.clip
        self.net = (zoo.load_clip() if own else load_clip(cfg.clip)).to(device).eval()
        self.tok = zoo.load_tokenizer() if own else Tokenizer.from_clip(cfg.tokenizer)
        self.device, self.seen = device, {}

    @torch.no_grad()
    def embed_texts(self, texts):
        """-> unit embeddings (N, D); each text is encoded once."""
        new = sorted(set(texts) - self.seen.keys())
        if new:
            ids = trim(self.tok(new, self.net.text.context)).to(self.device)
            self.seen.update(zip(new, F.normalize(self.net.encode_text(ids), dim=1).cpu()))
        return torch.stack([self.seen[t] for t in texts])

    @torch.no_grad()
    def embed_images(self, images):
        """-> unit embeddings (N, D)."""
        if isinstance(images, torch.Tensor):
            images = [Image.fromarray(i) for i in to_uint8(images)]
        x = metrics.clip_input(images, self.net.visual.image_size).to(self.device)
        return F.normalize(self.net.encode_image(x), dim=1).cpu()

    def __call__(self, images, texts):
        return 100 * (self.embed_images(images) * self.embed_texts(texts)).sum(1)


# 4. DATA: prompts, generators, and folders of other generators -------------------------------------------------------------
@dataclass(frozen=True)
class Point:
    """One setting of one model. knob "top_m" is taken from the pictures of knob "guidance" at --at."""

    model: str
    knob: str
    value: float
    folder: str = ""
    given: str = "text"  # or picture, as to a codec: fronts are taken within one task

    @property
    def label(self):
        return f"{self.knob} {self.value:g}"


@dataclass
class Prompt:
    id: str
    text: str
    group: str = ""
    scene: scenes.Scene | None = None  # of generated prompts: what they ask for


def make_prompts(cfg) -> list[Prompt]:
    """One or two objects with shape, colour and relation; size, texture, place and ground stay open: room for diversity. Then
    the same in four regions, whose real pictures have their own light, grounds and favourite shapes."""
    count = int(cfg.prompts)
    what = [("", i) for i in range(count)] + [(r, i) for r in scenes.REGIONS for i in range(cfg.regions)]
    out = []
    for region, i in what:
        s = scenes.scene(i, cfg.seed * 1000 + 500, (1, 2), region=region, grid=2)
        names = [scenes.name(t, size=False, texture=False) for t in s.things]
        text = names[0] if len(names) == 1 else f"{names[0]} {scenes.relation(*s.things, 2)} {names[1]}"
        out.append(Prompt(f"{region or 'home'}{i:04d}", text, region, s))
    return out


def real_scenes(p: Prompt, count: int, seed: int) -> list[scenes.Scene]:
    """Scenes that the prompt is true of, all else drawn anew; a region keeps its ground."""
    rng = np.random.default_rng((seed, int.from_bytes(hashlib.blake2b(p.id.encode(), digest_size=4).digest())))
    out, want = [], p.scene

    def one(options):
        return str(rng.choice(list(options)))

    while len(out) < count:
        things = [replace(t, cell=int(c), size=one(scenes.SIZES), texture=one(scenes.TEXTURES))
                  for t, c in zip(want.things, rng.permutation(4))]  # fmt: skip
        if len(things) == 2 and scenes.relation(*things, 2) != scenes.relation(*want.things, 2):
            continue
        ground = {} if want.region else dict(tone=one(scenes.TONES), pattern=one(scenes.PATTERNS))
        out.append(replace(want, things=tuple(things), **ground))
    return out


def pictures_of(world) -> torch.Tensor:
    x = scenes.render(world, 32)
    return torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1


class StandIns:
    """The generated world's models and its VQA model, in one place."""

    def __init__(self, cfg, env, prompts):
        self.cfg, self.prompts, self.env = cfg, prompts, env
        self.vqa, self.vae = zoo.load_vqa().to(env.device), zoo.load_vae().to(env.device)
        self.extract, self.clip = Extractor(cfg, env.device), ClipScorer(cfg, env.device)
        self.painters, self.bank = {}, None

    def draw(self, point: Point):
        """-> (N, 3, 32, 32), n of each prompt in order. Picture j of prompt i begins with the same noise at all points."""
        cfg, n = self.cfg, self.cfg.per_prompt
        if point.model == "codec":  # a real picture through a latent of few values: more bits, nearer to the source
            world = [s for p in self.prompts for s in real_scenes(p, n, cfg.seed * 2 + 1)]
            parts = pictures_of(world).split(256)
            z = torch.cat([self.vae.to_latent(self.vae.encode(x.to(self.env.device))[0]) for x in parts])
            return torch.cat([self.vae.decode(part).cpu() for part in quantise(z, int(point.value)).split(256)])
        if point.model == "search":
            return self.found(int(point.value))
        name = {"early": "painter_early", "middle": "painter_middle", "late": "painter"}[point.model]
        if name not in self.painters:
            self.painters[name] = zoo.load_painter(name).to(self.env.device)
        guidance, steps = (point.value, cfg.steps) if point.knob == "guidance" else (cfg.at, int(point.value))
        texts = [p.text for p in self.prompts for _ in range(n)]
        return self.painters[name].draw(texts, guidance, steps, cfg.seed, part=cfg.batch_size)

    def found(self, k: int):
        """Retrieval as a generator: for each prompt n of the k pictures of a bank that CLIP finds nearest. Many neighbours:
        more diverse, less to the point. No picture is drawn twice, or sets would hold copies. The bank knows no regions.

        A retrieval-augmented model is conditioned on what is found; here it is the answer, nothing is generated."""
        cfg = self.cfg
        if self.bank is None:
            self.bank = pictures_of([scenes.scene(i, cfg.seed * 1000 + 700, (1, 2), grid=2) for i in range(cfg.bank)])
            self.f_bank = torch.cat([self.clip.embed_images(part) for part in self.bank.split(cfg.batch_size)])
        rows, rng, taken = [], np.random.default_rng((cfg.seed, 700)), torch.zeros(cfg.bank, dtype=torch.bool)
        for sims in self.clip.embed_texts([p.text for p in self.prompts]) @ self.f_bank.T:
            nearest = sims.masked_fill(taken, -2.0).argsort(descending=True, stable=True)[:k]
            rows.append(nearest[torch.from_numpy(rng.permutation(k)[: cfg.per_prompt])])
            taken[rows[-1]] = True
        return self.bank[torch.cat(rows)]

    @torch.no_grad()
    def measure(self, point: Point | None) -> dict[str, torch.Tensor]:
        """Features, prompt index, consistency and CLIPScore of every picture; point None: the real ones, without scores."""
        cfg = self.cfg
        if point is None:
            n = cfg.real_per_prompt
            images = pictures_of([s for p in self.prompts for s in real_scenes(p, n, cfg.seed * 2)])
        else:
            n, images = cfg.per_prompt, self.draw(point)
        prompt = torch.arange(len(self.prompts)).repeat_interleave(n)
        parts = torch.arange(len(images)).split(cfg.batch_size)
        out = {"feature": torch.cat([self.extract(images[rows]) for rows in parts]), "prompt": prompt,
               "image": torch.from_numpy(to_uint8(images))}  # fmt: skip
        if point is None:
            return out
        asked = [[self.prompts[p] for p in prompt[rows]] for rows in parts]
        scores = [s for rows, some in zip(parts, asked) for s in self.consistency(images[rows].to(self.env.device), some)]
        clip = [self.clip(images[rows], [p.text for p in some]) for rows, some in zip(parts, asked)]
        return {**out, "consistency": torch.tensor(scores, dtype=torch.float64), "clip": torch.cat(clip).double()}

    def consistency(self, images, prompts) -> list[float]:
        """DSG score of each picture for its prompt."""
        asked = [[q for q in scenes.questions(p.scene) if q["kind"] in ("object", "colour", "relation")] for p in prompts]
        said = self.vqa.answer(images, [[q["text"] for q in some] for some in asked])
        return [dsg_score({q["id"]: yes for q, yes in zip(some, row)}, {q["id"]: q["parents"] for q in some})
                for some, row in zip(asked, said)]  # fmt: skip


def quantise(z, levels):
    """Latents to `levels` values a number, equally spaced over the mean of their channel +- 2 standard deviations."""
    mean, std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True)
    u = (((z - mean) / std).clamp(-2, 2) + 2) / 4 * (levels - 1)
    return (u.round() / (levels - 1) * 4 - 2) * std + mean


class Folders:
    """Pictures of any generator: FOLDER/ID_anything.png, with ID from the prompts file. Marginal metrics use all of them."""

    def __init__(self, cfg, env, prompts):
        self.cfg, self.prompts, self.extract = cfg, prompts, Extractor(cfg, env.device)
        self.clip = ClipScorer(cfg, env.device) if cfg.clip else None
        self.answers = read_answers(cfg.answers) if cfg.answers else {}
        self.single = len({p.folder for p in read_points(cfg.points)}) == 1
        self.index = {p.id: i for i, p in enumerate(prompts)}

    def dsg(self, path):
        """Score by the answers to FOLDER/NAME; to NAME alone only where there is one folder."""
        name = Path(os.path.relpath(path, Path(self.cfg.points).parent)).as_posix()
        return dsg_score(*(self.answers.get((name,)) or (self.single and self.answers.get((path.name,))) or ({}, {})))

    def files(self, point):
        """-> paths and prompt indices; -1 for a real picture that belongs to no prompt."""
        folder = point.folder if point else self.cfg.real
        files = data.Folder(folder).files
        prompt = [next((self.index[name] for name in beginnings(p.stem) if name in self.index), -1) for p in files]
        strays = [p.name for p, i in zip(files, prompt) if i < 0]
        if point and strays:
            raise ValueError(f"{folder}/{strays[0]} and {len(strays) - 1} more belong to no prompt of {self.cfg.prompts}; "
                             "expected names ID_anything.png with an id of that file")  # fmt: skip
        missing = set(range(len(self.prompts))) - set(prompt)
        if point and missing:
            raise ValueError(
                f"{folder} has no picture for prompt {self.prompts[min(missing)].id!r} and {len(missing) - 1} more"
            )
        if len(files) < 2:
            raise ValueError(f"{folder} holds one picture only; a set needs two at least")
        return files, torch.tensor(prompt)

    def measure(self, point):
        """Features and CLIPScore of every readable picture, and its place in files()."""
        paths, prompt = self.files(point)
        out, bad, keep = {"feature": [], "clip": []}, [], []
        for rows in torch.arange(len(paths)).split(self.cfg.batch_size):
            images, rows_ok = [], []
            for i in rows.tolist():
                try:
                    images.append(data.decode_image(paths[i].read_bytes(), str(paths[i])))
                    rows_ok.append(i)
                except data.BadSample as error:
                    bad.append(str(error))
            if len(bad) > self.cfg.max_bad * len(paths) or len(bad) == len(paths):
                raise ValueError(
                    f"{bad[0]}, and {len(bad) - 1} more: above --max_bad {self.cfg.max_bad:g} of {len(paths)} pictures"
                )
            keep += rows_ok
            if images:
                out["feature"].append(self.extract(images).float())
                texts = [self.prompts[p].text for p in prompt[rows_ok].tolist()]
                out["clip"].append(self.clip(images, texts) if self.clip and point else torch.full((len(images),), math.nan))
        for text in bad[:5]:
            print(f"left out: {text}", file=sys.stderr)
        return {"feature": torch.cat(out["feature"]), "clip": torch.cat(out["clip"]).double(), "file": torch.tensor(keep)}

    def scored(self, point, found):
        """What needs no features and may change without them: prompts and answers."""
        (paths, prompt), kept = self.files(point), found["file"]
        said = [self.dsg(paths[i]) for i in kept.tolist()] if point else []
        found = {**found, "prompt": prompt[kept], "consistency": torch.tensor(said, dtype=torch.float64)}
        if not point:  # real pictures of a group that are no prompt's lie in a folder of its name
            groups = sorted({p.group for p in self.prompts if p.group})
            places = [groups.index(paths[i].parent.name) if paths[i].parent.name in groups else -1 for i in kept.tolist()]
            found["group"] = torch.tensor(places)
        return found


def beginnings(stem):
    """ "a_b_3" -> "a_b_3", "a_b", "a": ids may hold underscores."""
    while stem:
        yield stem
        stem = stem.rpartition("_")[0]


def read_prompts(path) -> list[Prompt]:
    out = [Prompt(r["id"], r["prompt"], r.get("group") or "") for r in data.read_rows(path, ("id", "prompt"))]
    if len({p.id for p in out}) < len(out):
        raise ValueError(f"{path} holds an id twice; ids must differ")
    return out


def read_points(path) -> list[Point]:
    out = []
    for r in data.read_rows(path, ("model", "knob", "value", "folder")):
        try:
            given, folder = r.get("given") or "text", str(Path(path).parent / r["folder"])
            out.append(Point(r["model"], r["knob"], float(r["value"]), folder, given))
        except ValueError:
            raise ValueError(f"{path}: the value {r['value']!r} of {r['model']} is not a number") from None
        if not math.isfinite(out[-1].value):
            raise ValueError(f"{path}: the value {r['value']!r} of {r['model']} is not finite")
        if r["knob"] == "top_m":
            raise ValueError(f"{path}: the knob top_m is made here, by --top_m and --clip; give {r['model']}'s another name")
        if any(p.model == r["model"] and p.given != given for p in out):
            raise ValueError(f"{path}: {r['model']} is given text and pictures; two tasks need two names")
        if given not in ("text", "picture"):
            raise ValueError(f"{path}: {r['model']} is given {given!r}; expected text or picture")
        if (out[-1].model, out[-1].label) in [(p.model, p.label) for p in out[:-1]]:
            raise ValueError(f"{path} has two folders for {r['model']}, {out[-1].label}; give the second another model's name")
    return out


def read_answers(path, key=("file",)) -> dict[tuple, tuple[dict, dict]]:
    """Values of the columns `key` -> (answers, parents)."""
    out: dict = {}
    for r in data.read_rows(path, (*key, "question_id", "answer")):
        answers, parents = out.setdefault(tuple(r[k] for k in key), ({}, {}))
        answers[r["question_id"]] = r["answer"].strip().lower().rstrip(".").strip() == "yes"
        parents[r["question_id"]] = parse_parents(r.get("dependency_id"))
    lost = sum(p not in answers for answers, parents in out.values() for some in parents.values() for p in some)
    if lost:
        print(f"{path}: {lost:,} dependencies name no question of their picture and have no effect", file=sys.stderr)
    return out


def parse_parents(cell) -> list[str]:
    """'1, 2' -> ['1', '2'], '1.0' -> ['1'], '0' -> []: ids of questions."""
    parts = [re.sub(r"^(\d+)\.0$", r"\1", p) for p in re.split(r"[,;\s]+", cell or "")]
    return [p for p in parts if p not in ("", "0")]


# 5. EVALUATE ---------------------------------------------------------------------------------------------------------------
AXES = ("consistency", "diversity", "realism")  # conditional: of each prompt, then averaged
# marginal, of whole sets: realism as precision and density, diversity as recall, coverage and Vendi score; Frechet and kernel
# distance hold both
SETS = ("precision", "recall", "density", "coverage", "fd", "kd", "vendi")


def rows_of(prompt, many):
    """Rows of each of the prompts 0 to many - 1, in their order: prompt (N,), -1 for none."""
    order = torch.argsort(prompt, stable=True)
    return [order[a:b] for a, b in itertools.pairwise(torch.searchsorted(prompt[order], torch.arange(many + 1)).tolist())]


def axes(fake, real, many) -> np.ndarray:
    """(prompts, 4): consistency, diversity, realism and CLIPScore of each of the prompts, the first three for the fronts."""
    rows, real_rows = rows_of(fake["prompt"], many), rows_of(real["prompt"], many)
    return np.array([[fake["consistency"][i].mean().item(), diversity(fake["feature"][i]),
                      realism(fake["feature"][i], real["feature"][j]), fake["clip"][i].mean().item()]
                     for i, j in zip(rows, real_rows)])  # fmt: skip


def mean(table) -> dict[str, float]:
    """Means over the prompts, rows, that have a value."""
    known = ~np.isnan(table)
    return dict(zip((*AXES, "clip"), np.where(known, table, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)))


def marginal(fake, real, prompts, count, cfg) -> dict[str, float]:
    """Metrics of the whole set of these prompts. count: pictures of each, so that all points compare sets of one size, on which
    they depend; a point with fewer, and too few pictures for --k neighbours, give NaN."""
    many = max(prompts) + 1
    rows, real_rows = rows_of(fake["prompt"], many), rows_of(real["prompt"], many)
    every = (real["prompt"] < 0).nonzero()[:, 0]  # those that belong to no prompt serve all
    x = real["feature"][torch.cat([*(real_rows[p] for p in prompts), every])]
    y = fake["feature"][torch.cat([rows[p][:count] for p in prompts])]
    out = dict.fromkeys(SETS, math.nan)
    if len(y) == count * len(prompts) and min(len(x), len(y)) > cfg.k:
        out = metrics.prdc(x, y, cfg.k) | {"fd": metrics.frechet_distance(x, y), "kd": metrics.kernel_distance(x, y, 10),
                                           "vendi": metrics.vendi(y)}  # fmt: skip
    return out | {"n_real": len(x), "n_gen": len(y)}


def halves(prompts, cfg):
    """Random halves of the N prompts. The deviation of a mean over halves equals the standard error of the mean over all:
    sigma^2 (1 / (N / 2) - 1 / N) = sigma^2 / N. [] for fewer than four prompts."""
    g, size = torch.Generator().manual_seed(cfg.seed), len(prompts) // 2
    many = cfg.halves if size > 1 else 0
    return [[prompts[i] for i in torch.randperm(len(prompts), generator=g)[:size]] for _ in range(many)]


def knee(points):
    """Index of the front's point that is nearest to the best value of each axis, axes scaled to the front's extent."""
    P = torch.as_tensor(points, dtype=torch.float64)
    front = torch.nonzero(pareto_front(P))[:, 0]
    if not len(front):
        return None
    Q = P[front]
    span = (Q.amax(0) - Q.amin(0)).clamp_min(1e-12)
    return front[((Q.amax(0) - Q) / span).square().sum(1).argmin()].item()


def spearman(a, b):
    """Rank correlation, ties at their mean rank."""
    ranks = []
    for v in (a, b):
        _, inverse, counts = np.unique(v, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    return float(np.corrcoef(*ranks)[0, 1])


def kendall(a, b):
    """Kendall's tau-b by all pairs."""
    x, y = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(a, float), np.asarray(b, float)))
    return float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))


def against_people(folder, transitive=True) -> dict[str, float]:
    """DSG scores of three VQA models' answers against the mean human rating of the same picture (TIFA160)."""
    ratings: dict[tuple, list] = {}
    for r in data.read_rows(Path(folder, "tifa160_likert.csv.gz"), ("t2i_model", "item_id", "answer")):
        try:
            ratings.setdefault((r["t2i_model"], r["item_id"]), []).append(float(r["answer"]))
        except ValueError:
            raise ValueError(f"{folder}/tifa160_likert.csv.gz: the rating {r['answer']!r} is not a number") from None
    out = {}
    for vqa in ("mplug", "instructblip", "pali17b"):
        pictures = read_answers(Path(folder, f"vqa_{vqa}_dsg.csv.gz"), ("t2i_model", "item_id"))
        both = sorted(ratings.keys() & pictures.keys())
        if len(both) < 2:
            raise ValueError(f"{folder}: fewer than two pictures are both rated by people and answered by {vqa}")
        x, y = [dsg_score(*pictures[k], transitive) for k in both], [np.mean(ratings[k]) for k in both]
        out |= {f"{vqa}_spearman": spearman(x, y), f"{vqa}_kendall": kendall(x, y), "pictures": len(both)}
    return out


# 6. TRAIN: nothing is trained; run() goes over the points, then draws the fronts -------------------------------------------
def plan(cfg) -> list[Point]:
    """The points whose pictures have to be made or read; top-m points are cut from them afterwards."""
    if cfg.points:
        return read_points(cfg.points)
    out = []
    own = {"codec": {"levels": "levels"}, "search": {"neighbours": "neighbours"}}
    painter = {"guidance": "guidance", "steps": "sampler_steps"}
    for model in cfg.models.split(","):
        for knob, field in own.get(model, painter).items():
            swept = knob == "steps" and cfg.at in numbers(cfg, "guidance")  # which draws these pictures at --steps
            values = [v for v in numbers(cfg, field) if not (swept and v == cfg.steps)]
            out += [Point(model, knob, v, given="picture" if model == "codec" else "text") for v in values]
    return out


def numbers(cfg, field) -> list[float]:
    try:
        values = [float(v) for v in getattr(cfg, field).split(",") if v]
        if all(map(math.isfinite, values)):
            return values
    except ValueError:
        pass
    raise ValueError(f"--{field} {getattr(cfg, field)} must be a comma list of numbers")


def cached(source, point, cfg, prompts, folder) -> dict[str, torch.Tensor]:
    """measure() of the point, or what an earlier run kept of it."""
    where = point.folder if point else cfg.real
    said = [bool(point), asdict(point) if point and not where else where, cfg.extractor, cfg.resize, cfg.clip, cfg.max_bad]
    said.append([hashlib.blake2b(p.read_bytes(), digest_size=8).hexdigest() for p in sorted(zoo.WEIGHTS.glob("*.safetensors"))])
    given = [Path(f) for f in (cfg.weights, cfg.clip, cfg.tokenizer) if f]
    files = [f for g in given for f in (sorted(g.iterdir()) if g.is_dir() else [g]) if f.is_file()]
    files += data.Folder(where).files if where else []  # pictures that were changed are read again
    said.append([(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    if cfg.clip or not where:
        said.append([(p.id, p.text) for p in prompts])
    if not where:
        said.append([cfg.seed, cfg.steps, cfg.at, cfg.per_prompt, cfg.real_per_prompt, cfg.bank])
    path = folder / f"{hashlib.blake2b(json.dumps(said).encode(), digest_size=10).hexdigest()}.safetensors"
    out = None
    if cfg.resume and path.exists():
        try:
            out = load_file(path)
        except (SafetensorError, OSError):
            print(f"{path} is damaged and will be made again", file=sys.stderr)
    if out is None:
        out = source.measure(point)
        if not torch.isfinite(out["feature"]).all():
            raise ValueError(f"the features of {where or point or 'the real pictures'} hold NaN or infinity")
        if not point and (out["feature"] == out["feature"][0]).all():
            raise ValueError(f"all real pictures have the same features under --extractor {cfg.extractor}: nothing to compare")
        ckpt.export(path, out)
    return source.scored(point, out) if where else out


def check(cfg: Config) -> None:
    """One sentence for what a user can get wrong."""
    if cfg.data:
        raise ValueError("--data is not used here: pictures come by --points and --real")
    cli.choose(cfg, "models", extractor=("judge", "inception", "dinov2", "clip"), resize=("pytorch-fid", "tf1", "clean"),
               dtype=("float32",), models=("early", "middle", "late", "search", "codec"))  # fmt: skip
    cli.within(cfg, "per_prompt real_per_prompt k steps", 1)
    cli.within(cfg, "regions", 0)
    for field, low in (("guidance", 0), ("sampler_steps", 1), ("levels", 2), ("top_m", 1), ("neighbours", 1)):
        if any(v < low or v != int(v) and field != "guidance" for v in numbers(cfg, field)):
            whole = "" if field == "guidance" else "a whole number, "
            raise ValueError(f"--{field} {getattr(cfg, field)}: each value must be {whole}at least {low}")
    if cfg.prompts == "0" or cfg.halves < 1:
        raise ValueError(f"--prompts {cfg.prompts} and --halves {cfg.halves} must be at least 1")
    if not cfg.points and "search" in cfg.models.split(","):
        drawn = (int(cfg.prompts) + len(scenes.REGIONS) * cfg.regions) * cfg.per_prompt if cfg.prompts.isdigit() else 0
        for k in numbers(cfg, "neighbours"):
            if k < cfg.per_prompt or drawn + k > cfg.bank:
                raise ValueError(f"--neighbours {k:g} must be --per_prompt {cfg.per_prompt} at least, and --bank {cfg.bank} "
                                 f"must hold them beside the {drawn} pictures that are drawn, none of them twice")  # fmt: skip
    if cfg.points and (cfg.prompts.isdigit() or not cfg.real):
        raise ValueError(
            "--points needs --prompts, a csv with the columns id and prompt, and --real, a folder of real pictures"
        )
    if not cfg.points and not cfg.prompts.isdigit():
        raise ValueError(
            f"--prompts {cfg.prompts} names a file; with the stand-in models it must be a number, or pass --points"
        )
    if not cfg.points and (cfg.real or cfg.answers):
        raise ValueError(f"--{'real' if cfg.real else 'answers'} belongs to pictures of your own: pass --points, too")
    if cfg.points and not cfg.clip and not cfg.answers:
        raise ValueError("--points needs --answers (of a VQA model) or --clip (weights), or nothing measures the consistency")
    painters = not cfg.points and {"early", "middle", "late"} & {*cfg.models.split(",")}
    if painters and cfg.top_m and cfg.at not in numbers(cfg, "guidance"):
        raise ValueError(f"--at {cfg.at:g} must be one of --guidance {cfg.guidance}: --top_m is taken from those pictures")
    if cfg.clip and not cfg.tokenizer:
        raise ValueError("--clip needs --tokenizer, CLIP's merges file")
    if not cfg.points and not plan(cfg):
        raise ValueError("no point is left to be measured: all values of the models' knobs are empty")


def run(cfg: Config) -> dict:
    """Measures every point, writes front.csv, fronts.png and regions.png, prints the summary. Processes share the points."""
    if cfg.people:
        return show_people(cfg)
    check(cfg)
    env, out = ddp.start(cfg.seed, timeout_s=7 * 86_400), Path(cfg.out_dir)  # processes wait for the slowest at the end
    if cfg.points and cfg.extractor == "judge" and env.is_main:
        print("features are those of a classifier of scenes; for photographs pass --extractor inception --weights FILE",
              file=sys.stderr)  # fmt: skip
    prompts = read_prompts(cfg.prompts) if cfg.points else make_prompts(cfg)
    points = plan(cfg)
    source = (Folders if cfg.points else StandIns)(cfg, env, prompts)
    cache = out / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    if env.is_main:
        (out / "metrics.json").unlink(missing_ok=True)
        write_json(out / "config.json", {**asdict(cfg), "processes": env.world, "versions": versions()})
    jobs = [None, *points]
    mine = jobs[env.rank :: env.world]
    for job in tqdm(mine, desc="points", unit="point", disable=not env.is_main, dynamic_ncols=True):
        cached(source, job, cfg, prompts, cache)
        if ddp.asked_to_stop():
            raise KeyboardInterrupt
    if env.world > 1:
        dist.barrier()
    if not env.is_main:
        return {}
    kept = replace(cfg, resume=True)  # what was just measured
    real, sets = cached(source, None, kept, prompts, cache), {}
    for p in points:
        sets[p] = cached(source, p, kept, prompts, cache)
        if p.knob == "guidance" and p.value == cfg.at and not sets[p]["clip"].isnan().any():
            drawn = min(map(len, rows_of(sets[p]["prompt"], len(prompts))))  # pictures of a prompt
            for m in [m for m in numbers(cfg, "top_m") if m < drawn]:
                keep = top_m(sets[p]["clip"], sets[p]["prompt"], int(m))
                sets[replace(p, knob="top_m", value=m)] = {k: v[keep] for k, v in sets[p].items()}
    result = report(cfg, prompts, real, sets, out)
    write_json(out / "metrics.json", result)
    return result


def report(cfg, prompts, real, sets, out) -> dict:
    """Tables, pictures and files from the measured sets {point: tensors}."""
    points, home = list(sets), [i for i, p in enumerate(prompts) if cfg.points or not p.group]
    drawn = np.array([[len(rows) for rows in rows_of(sets[p]["prompt"], len(prompts))] for p in points if p.knob != "top_m"])
    if bare := [i for i in home if not drawn[:, i].all()]:  # its only picture was damaged
        home = [i for i in home if drawn[:, i].all()]
        print(f"left out: {len(bare)} prompts, of which a model has no picture that can be read, first {prompts[bare[0]].id}")
    if not home:
        raise ValueError("every prompt lacks pictures of some model; no two points could be compared")
    count = int(drawn[:, home].min())
    names = list(dict.fromkeys(p.model for p in points))
    missing = {p: int(s["consistency"].isnan().sum()) for p, s in sets.items()}
    if any(missing.values()):  # one score for all points
        worst = max(missing, key=missing.get)
        if not cfg.clip:
            raise ValueError(f"--answers {cfg.answers} lacks {missing[worst]} pictures of {worst.model}, {worst.label}; "
                             "add them, or pass --clip for CLIPScore in place of DSG")  # fmt: skip
        lack = f": --answers lacks {missing[worst]} pictures of {worst.model}, {worst.label}" if cfg.answers else ""
        print("consistency is CLIPScore / 100" + lack)
        sets = {p: {**s, "consistency": s["clip"] / 100} for p, s in sets.items()}
    tables, rows = {p: axes(s, real, len(prompts)) for p, s in sets.items()}, {}
    for p in tqdm(points, desc="set metrics", unit="point", dynamic_ncols=True):
        rows[p] = mean(tables[p][home]) | marginal(sets[p], real, home, count, cfg)
        if ddp.asked_to_stop():
            raise KeyboardInterrupt
    used = [a for a in AXES if not all(math.isnan(rows[p][a]) for p in points)]
    needs = {"diversity": "two pictures of a prompt", "realism": "real pictures that are named like a prompt's"}
    for a in [a for a in AXES if a not in used]:
        print(f"the fronts are without {a}, which needs {needs[a]}")
    parts = halves(home, cfg)
    spread, stable = {p: [] for p in points}, dict.fromkeys(points, 0.0 if parts else math.nan)
    for half in parts:
        again = {p: mean(tables[p][half]) for p in points}
        for p, on in zip(points, fronts(points, [[again[p][a] for a in used] for p in points])):
            spread[p].append(again[p])
            stable[p] += on / cfg.halves
    error = {p: {k: float(np.std([s[k] for s in spread[p]] or [math.nan])) for k in (*AXES, "clip")} for p in points}
    P = [[rows[p][a] for a in used] for p in points]
    front = fronts(points, P)
    write_front(out / "front.csv", cfg, points, rows, error, front, stable)
    pairs = [q for q in (("diversity", "consistency"), ("diversity", "realism"), ("realism", "consistency")) if {*q} <= {*used}]
    draw_fronts(out / "fronts.png", points, rows, error, pairs, names)
    whole = [p for p in points if not math.isnan(rows[p]["recall"])]
    draw_fronts(out / "fronts_sets.png", whole, rows, error, (("recall", "precision"), ("precision", "consistency"),
                                                              ("recall", "consistency")), names)  # fmt: skip
    result = {f"{p.model}_{p.knob}_{p.value:g}_{k}": v for p in points for k, v in rows[p].items()}

    ref = [0.0] * len(used)
    summary = []
    for name in names:
        own = [p for p in points if p.model == name]
        kind = own[0].given
        mine = [x for x, p in zip(P, points) if p.model == name]
        rest = [x for x, p in zip(P, points) if p.model != name and p.given == kind]
        share = sum(f for f, p in zip(front, points) if p.model == name)
        held = sum(f and stable[p] >= 0.9 for f, p in zip(front, points) if p.model == name)
        best = [np.nanmax([rows[p][a] for p in own] + [-np.inf]) for a in used]
        volume, exclusive = hypervolume(mine, ref), hypervolume(mine + rest, ref) - hypervolume(rest, ref)
        summary.append([name, kind, *(f"{b:.3f}" for b in best), f"{share} of {len(own)}", held, f"{volume:.4f}",
                        f"{exclusive:.4f}"])  # fmt: skip
        result |= {f"{name}_volume": volume, f"{name}_on_front": float(share)}
    of = rows_of(real["prompt"], len(prompts))
    spans = [diversity(real["feature"][of[p]]) for p in home if len(of[p]) > 1]
    print(f"\n{len(home)} prompts, {count} pictures of each in set metrics, features: {cfg.extractor}, k = {cfg.k}")
    head = ["model", "given a", *(f"best {a}" for a in used), "on the front", "in 90 % of halves", "volume", "exclusive"]
    print(table(summary, head))
    print("volume: of all that a model's settings beat, from 0 in each axis on; more settings, more volume. exclusive: what no "
          f"other model of the task beats. Real pictures: diversity {np.mean(spans or [math.nan]):.3f}")  # fmt: skip
    given = [i for i, p in enumerate(points) if p.given == "text"]
    if given and (i := knee([P[j] for j in given])) is not None:
        print(f"knee of the front, nearest to the best of each axis: {points[given[i]].model}, {points[given[i]].label}")
    if found := claims(cfg, rows, spread, names):
        print("\n" + table(found, ["claim", "from", "to", "difference", "reported"]))
    smallest = min(r["n_gen"] for p, r in rows.items() if p in whole) if whole else 0
    if 0 < smallest <= (dims := real["feature"].shape[1]):
        print(f"fd is dominated by its bias: {smallest} pictures, {dims} features; see kd, the kernel distance, which has none")
    result |= filtered_sets(cfg, home, real, sets)
    result |= by_group(cfg, prompts, real, sets, count, out, bare)
    if any("image" in s for s in sets.values()):
        draw_samples(out / "samples.png", prompts, real, sets)
    print(f"\npictures and front.csv: {cfg.out_dir}")
    return result


def claims(cfg, rows, spread, names) -> list[list]:
    """What the paper, summaries of it and follow-ups report, beside what was measured at the two ends; +-: standard error of
    the difference, over the same halves of the prompts."""
    out = []

    def add(text, a, b, key, paper):
        d = f"{rows[b][key] - rows[a][key]:+.3f}"
        if key in AXES:
            d += f" +- {np.std([y[key] - x[key] for x, y in zip(spread[a], spread[b])] or [math.nan]):.3f}"
        out.append([text, f"{rows[a][key]:.3f}", f"{rows[b][key]:.3f}", d, paper])

    for name in names:
        swept = sorted((p for p in rows if p.model == name and p.knob == "guidance"), key=lambda p: p.value)
        if len(swept) > 1:
            for key, paper in (("consistency", "up"), ("realism", "up, then down"), ("diversity", "down"), ("recall", "down")):
                add(f"{name}: {key}, guidance {swept[0].value:g} to {swept[-1].value:g}", swept[0], swept[-1], key, paper)
    ages = [m for m in ("early", "middle", "late") if m in names] if not cfg.points else names
    at = [p for m in ages for p in rows if p.model == m and p.knob == "guidance" and p.value == cfg.at]
    if len(at) > 1:
        for key, verb in zip(AXES, ("gain", "lose", "gain")):
            paper = "" if cfg.points else f"later models {verb}"
            add(f"{at[0].model} to {at[-1].model} model: {key}, guidance {cfg.at:g}", at[0], at[-1], key, paper)
    return out


def write_front(path, cfg, points, rows, error, front, stable) -> None:
    name = cfg.extractor + (f", {cfg.resize} resizing" if cfg.extractor == "inception" else "")
    with open(f"{path}.tmp", "w", newline="") as f:
        w = csv.writer(f)
        keys, seed = list(next(iter(rows.values()))), "" if cfg.points else cfg.seed
        w.writerow(["model", "knob", "value", "seed", *keys, *(f"{k}_se" for k in error[points[0]]), "on_front", "stable",
                    "extractor", "k"])  # fmt: skip
        for p, on in zip(points, front):
            w.writerow([p.model, p.knob, p.value, seed, *rows[p].values(), *error[p].values(), int(on), round(stable[p], 3),
                        name, cfg.k])  # fmt: skip
    Path(f"{path}.tmp").replace(path)


def fronts(points, values) -> list[bool]:
    """Whether each point is on the front of its task. values: rows of equal length, all "larger is better"."""
    out = [False] * len(points)
    for kind in {p.given for p in points}:
        rows = [i for i, p in enumerate(points) if p.given == kind]
        for i, on in zip(rows, pareto_front([values[i] for i in rows]).tolist()):
            out[i] = on
    return out


def draw_fronts(path, points, rows, error, pairs, names) -> None:
    """A panel for each pair of axes: a point has its model's colour and is filled where no other of its task beats it on both
    axes. Thin lines follow a model's first knob, the stair is the front of models given a text; bars: two standard errors."""
    panels, names = [], [n for n in names if any(p.model == n for p in points)]
    for i, (x, y) in enumerate(pairs if names else ()):
        flat = [[rows[p][x], rows[p][y]] for p in points]
        on = fronts(points, flat)
        series = {n: [(*flat[j], p.label, on[j], (2 * error[p].get(x, 0), 2 * error[p].get(y, 0)) if on[j] else (0, 0))
                      for j, p in enumerate(points) if p.model == n] for n in names}  # fmt: skip
        knob = {n: [p.knob for p in points if p.model == n][0] for n in names}  # the first knob, in order of its values
        order = sorted(range(len(points)), key=lambda j: points[j].value)
        paths = {n: [flat[j] for j in order if (points[j].model, points[j].knob) == (n, knob[n])] for n in names}
        edge = sorted(q for q, o, p in zip(flat, on, points) if o and p.given == "text")
        last = i == len(pairs) - 1
        panels.append(plot.scatter(series, paths, edge, f"{y} against {x}", x, (620 if last else 520, 440), legend=last))
    if panels:
        plot.save(plot.row(panels), path)


def filtered_sets(cfg, home, real, sets) -> dict:
    """Set metrics of the m best pictures of each prompt against the first m of the same: other points have more pictures, and
    set metrics depend on their number."""
    lines, result = [], {}
    for p in [p for p in sets if p.knob == "top_m"]:
        best, all_of = sets[p], sets[replace(p, knob="guidance", value=cfg.at)]
        a, b = (marginal(s, real, home, int(p.value), cfg) for s in (all_of, best))
        lines.append([f"{p.model}, {p.label}", *(f"{a[k]:.3f} -> {b[k]:.3f}" for k in SETS[:4])])
        result |= {f"{p.model}_top_m_{p.value:g}_{k}": b[k] for k in SETS}
        result |= {f"{p.model}_first_{p.value:g}_{k}": a[k] for k in SETS}
    if lines:
        print("\nsets of the first pictures of each prompt -> of as many that CLIP likes best\n"
              + table(lines, ["", *SETS[:4]]))  # fmt: skip
    return result


def real_of_groups(groups, ids, size, real) -> tuple[dict[str, dict], str]:
    """-> group: its real pictures, as many as the others have: those named after its first `size` prompts, equally many each;
    else those in a folder of its name; else all of them, and a line says so. And the group that has the fewest."""
    if (own := real["prompt"] >= 0).any():
        of = rows_of(real["prompt"], 1 + max(i for some in ids.values() for i in some))
        count = {g: min(len(of[i]) for i in ids[g][:size]) for g in groups}  # of its poorest prompt
        rows = {g: torch.cat([of[i][: min(count.values())] for i in ids[g][:size]]) for g in groups}
    elif "group" in real and (real["group"] >= 0).any():
        rows = {g: (real["group"] == n).nonzero()[:, 0] for n, g in enumerate(groups)}
        count = {g: len(r) for g, r in rows.items()}
        rows = {g: r[: min(count.values())] for g, r in rows.items()}
    else:
        print("\ngroups are compared with the same real pictures, which are in no folder with a group's name")
        count, rows = dict.fromkeys(groups, len(own)), dict.fromkeys(groups, torch.arange(len(own)))
    return {g: {k: v[r] for k, v in real.items() if len(v) == len(own)} for g, r in rows.items()}, min(count, key=count.get)


def by_group(cfg, prompts, real, sets, count, out, bare) -> dict:
    """Axes and set metrics of each group alone, with equally many prompts and real pictures. Prints worst group and gap of each
    model, at --at or its last knob; a gap is never negative, so that chance alone makes one. `search` never draws a
    picture twice and serves the groups' prompts last, so part of its gaps comes from that order."""
    groups = sorted({p.group for p in prompts if p.group})
    if not groups:
        return {}
    ids = {g: [i for i, p in enumerate(prompts) if p.group == g and i not in bare] for g in groups}
    size = min(map(len, ids.values()))
    if not size:
        print(f"\nno table of groups: each prompt of {min(ids, key=lambda g: len(ids[g]))!r} lacks a picture of some model")
        return {}
    kept, why, (reals, poorest) = [p for p in sets if p.knob != "top_m"], "", real_of_groups(groups, ids, size, real)
    if not len(reals[poorest]["prompt"]):
        why = f"{poorest!r} or one of its prompts has no real picture, and each of them should have as many"
    elif min(size * count, *(len(reals[g]["prompt"]) for g in groups)) <= cfg.k:
        why = f"the smallest has {size} prompts, too few pictures for --k {cfg.k} neighbours"
    if why:
        print(f"\nno table of groups: {why}")
        return {}
    rows = {(p, g): mean(axes(sets[p], reals[g], len(prompts))[ids[g][:size]])
            | marginal(sets[p], reals[g], ids[g][:size], count, cfg) for p in kept for g in groups}  # fmt: skip
    at = {p.model: p for p in kept} | {p.model: p for p in kept if p.knob == "guidance" and p.value == cfg.at}
    lines, result = [], {}
    for model, p in at.items():
        for key in ("consistency", "realism", "diversity", "precision", "coverage"):
            values = {g: rows[p, g][key] for g in groups}
            if any(map(math.isnan, values.values())):
                continue
            worst, gap = min(values, key=values.get), max(values.values()) - min(values.values())
            lines.append([f"{model}, {p.label}", key, *(f"{values[g]:.3f}" for g in groups), worst, f"{gap:.3f}"])
            result |= {f"{model}_{key}_gap": gap, f"{model}_{key}_worst": min(values.values())}
    print(f"\nper region, {size} prompts each\n" + table(lines, ["point", "metric", *groups, "worst", "gap"]))
    panels, text = [], [p for p in kept if p.given == "text"]
    for i, (x, y) in enumerate((("diversity", "consistency"), ("diversity", "realism")) if text else ()):
        series, paths, last = {}, {}, i == 1
        for g in groups:
            flat = [[rows[p, g][x], rows[p, g][y]] for p in text]
            on = pareto_front(flat).tolist()
            series[g] = [(*q, "", o, (0, 0)) for q, o in zip(flat, on)]
            paths[g] = sorted(q for q, o in zip(flat, on) if o)
        title = f"{y} against {x}, a front for each region"
        panels.append(plot.scatter(series, paths, (), title, x, (640 if last else 540, 440), legend=last))
    if panels:
        plot.save(plot.row(panels), out / "regions.png")
    return result


def draw_samples(path, prompts, real, sets) -> None:
    """Four pictures of two prompts for each model's first and last setting of its first knob, and real ones."""
    chosen = {"real": real}
    for model in dict.fromkeys(p.model for p in sets):
        swept = [p for p in sets if p.model == model and p.knob in ("guidance", "neighbours", "levels")]
        chosen |= {f"{p.model}, {p.label}": sets[p] for p in (*swept[:1], *swept[-1:])}
    pair = [i for i, p in sorted(enumerate(prompts), key=lambda q: -len(q[1].scene.things))][:2]  # two objects, if there are
    cells, texts, many = [], [], min([4, *(int((s["prompt"] == p).sum()) for s in chosen.values() for p in pair)])
    for key, s in chosen.items():
        for p in pair:
            rows = torch.nonzero(s["prompt"] == p)[:many, 0]
            cells += list(s["image"][rows].numpy())
            texts += [key, *[""] * (len(rows) - 1)]
    title = "   |   ".join(prompts[p].text for p in pair)
    plot.save(plot.grid(cells, many * len(pair), texts, None, title, 84, 2), path)


def show_people(cfg) -> dict:
    """--people: the table of DSG against human ratings."""
    result, official = (against_people(cfg.people, transitive) for transitive in (True, False))
    rows = [[v, f"{result[f'{v}_spearman']:.3f}", f"{result[f'{v}_kendall']:.3f}", f"{official[f'{v}_spearman']:.3f}"]
            for v in ("mplug", "instructblip", "pali17b")]  # fmt: skip
    print(f"DSG score against the mean human rating, {result['pictures']} pictures\n"
          + table(rows, ["VQA model", "Spearman", "Kendall", "Spearman, parents' own answers only"]))  # fmt: skip
    return result


# 7. MAIN -----------------------------------------------------------------------------------------------------------------
PRESETS = {
    "smoke": dict(prompts="8", regions=4, per_prompt=2, real_per_prompt=2, models="early,late,search", guidance="1,3",
                  top_m="1", sampler_steps="", neighbours="2,8", bank=64, steps=2, halves=4, out_dir="runs/pareto_eval_smoke"),
    "laptop": {},
    "gpu": dict(prompts="2000", regions=500, per_prompt=10, real_per_prompt=10, guidance="1,1.5,2,3,5,7.5,10", top_m="5,3,1",
                sampler_steps="2,4,8,32", neighbours="10,40,160", bank=50_000, steps=32, batch_size=2048, halves=200,
                out_dir="runs/pareto_eval_gpu"),
    # MSCOCO val 2014 as EvalGIM has it: 40,504 first captions; the pictures come by --points, from generators of your
    # own, two at least and better ten of each prompt, or diversity is not defined
    "paper": dict(prompts="data/coco_val2014/prompts.csv", points="data/coco_val2014/points.csv",
                  real="data/coco_val2014/images", extractor="inception",
                  weights="data/pt_inception-2015-12-05-6726825d.pth", clip="data/clip-vit-large-patch14",
                  tokenizer="data/bpe_simple_vocab_16e6.txt.gz", halves=20, out_dir="runs/pareto_eval_coco"),
}  # fmt: skip

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
