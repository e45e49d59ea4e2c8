"""CLIP-rocket: plain CLIP, trained with strong views of image and text beside the weak ones, needs no added loss.

Paper      Fini, Astolfi, Romero-Soriano, Verbeek, Drozdzal: Improved baselines for vision-language pre-training.
           TMLR 2023, arXiv 2305.08675
Idea       Prior work adds self-supervised losses to CLIP; four such baselines (SimSiam, BYOL, Barlow Twins or SwAV between
           image and text) do beat CLIP. How much of that is its poor training recipe? Keep its loss and add, per pair, A
           strongly augmented images and captions. Strong pairs are noisy, and features that match them are too
           invariant, so they get projection heads and a temperature of their own; label smoothing and text dropout act
           on them alone. Weak and strong are never contrasted with each other. So trained, plain CLIP gains, and the
           added losses no longer do.
Equations  one contrastive term -> clip_loss()     the recipe, (l + A m) / (1 + A) -> rocket_loss()
           SiamLIP, BYOLIP -> siam_loss()     BarLIP -> barlow_loss()     SwALIP -> sinkhorn(), swap_loss()
Read first section 2, then RECIPES in section 3, then method_loss() and train(); the rest is ordinary
Symbols    z weak ("global") and h strong ("local") unit embeddings (B, D); s_z, s_h their scales 1 / temperature;
           A strong views a pair; v projection and p prediction of the added losses; K global batch
Run        python methods/clip_recipe.py --preset smoke                        (CPU, no data, under 30 s)
           python methods/clip_recipe.py                                       (CPU, no data; 4.3 min on two quiet cores)
           python methods/clip_recipe.py --recipe ladder --extra none          (one step of the recipe after the other)
           torchrun --nproc_per_node=8 methods/clip_recipe.py --preset cc3m --data data/cc3m --eval_data data/imagenet
           --tokenizer MERGES --synonyms data/synonyms.tsv
Data       generated, or shards by data_prep/captions.py, coco.py, cc12m.py; zero-shot classes by imagenet.py, cifar100.py
Expect     laptop: zero-shot 71.3 plain, 73.6 rocket (+2.3 +- 1.9); with Barlow plain -1.9 +- 3.7, rocket -1.3 +- 3.9; 6 seeds
Differs    from the paper: an exact Gaussian blur, its sigma scaled with the picture; synonyms from a table
           (data_prep/wordnet.py), a caption without such a word gets a swap; our own stop-words. The laptop run has a small
           ResNet, milder crops and no hue or grey in strong views: with the paper's, on captions that name colours, rocket
           lost (85.8 to 89.2, one seed): an augmentation must keep its caption true. Arms have equal updates, as the
           paper has equal epochs: rocket's cost two or three times plain's. Reported: z of plain, z and h of rocket.
           from the released code: features are gathered WITH gradient (--gather no_grad repeats it); Barlow's correlation is
           summed over processes with gradient; plain is plain (there stop-word removal stays on); randomness belongs to the
           sample; text dropout is no side effect; the second temperature is clamped where it exists; batch norm is
           synchronised; the last checkpoint is reported; the ensemble weight is fixed; SwALIP without strong views swaps
           modalities. Left out: SwALIPV1, drop-path, own extra heads for strong views, readers of single data sets.
Uses       common/augment.py ckpt.py cli.py data.py ddp.py log.py metrics.py optim.py plot.py resnet.py scenes.py
           tokenizer.py vision.py vit.py   (copy these with this file)
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]  # so that python, torchrun and python -m all find common/

from common import augment, ckpt, cli, data, ddp, metrics, optim, plot, scenes
from common.log import RunLog, history, table, write_json
from common.resnet import ResNet
from common.tokenizer import Tokenizer
from common.vit import TextTransformer, ViT, trim


# 1. CONFIG (presets stand in section 7) ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    # run: the same names in all ten files
    out_dir: str = "runs/clip_recipe"  # one folder a run; each arm gets a sub-folder
    seed: int = 0  # of weights, scenes, data order and augmentation
    steps: int = 500  # optimiser updates of each arm
    batch_size: int = 64  # GLOBAL number of pairs, divided by the number of processes
    accum: int = 1  # micro-batches an update; no negatives of each other; logged parts of the loss are of the last one
    lr: float = 2e-3  # peak, AdamW; the paper: 3e-3 at batch 4096
    wd: float = 0.5  # weight decay; the paper: 0.1, on CC3M 0.5
    warmup: int = 40  # updates of linear warm-up from 1e-6; the paper: one epoch
    grad_clip: float = 0.0  # largest gradient norm, 0 = off (the paper)
    ema_decay: float = 0.99  # of BYOLIP's teacher
    dtype: str = "float32"  # float32, or bfloat16 autocast (losses stay in float32)
    compile: bool = False  # torch.compile the model
    data: str = ""  # folder of shards with captions; "" = generated scenes
    eval_data: str = ""  # folder of shards with labels, for zero-shot classification
    workers: int = 0  # loader processes of each rank
    log_every: int = 20  # updates between lines of log.jsonl
    eval_every: int = 0  # updates between evaluations, best.safetensors is kept; 0 = at the end only
    save_every: int = 100  # updates between checkpoints
    resume: bool = True  # continue from last.pt, exactly; --no-resume starts again
    max_bad: float = 0.01  # share of damaged samples at which the run stops
    # the method
    recipe: str = "plain,rocket"  # comma list of RECIPES, or "ladder" for all; crossed with --extra, one arm each
    extra: str = "none,siam,bar"  # comma list of none, siam, byol, bar, swal, or "all"
    gather: str = "grad"  # grad, or no_grad: the released code's gather, whose gradient is wrong over processes
    p_stop: float = 0.8  # chance that a caption loses its stop-words; YFCC15M with ResNet-50: 0.9
    smoothing: float = 0.1  # label smoothing of the strong pairs
    text_drop: float = 0.2  # dropout before every text block, strong captions only; CC3M 0.2, CC12M 0.05, else 0
    loss_sum: bool = False  # sum the two directions instead of averaging them (all data sets but CC3M)
    strong_scale: float = 0.35  # smallest area of a strong crop; the paper: 0.08, too little of a tiny picture
    jitter: str = "light"  # of strong views: "full", the paper's, or "light", no hue and grey, where captions name colours
    captions: str = "single"  # one random caption for all views of a pair, or "multi": each view draws its own (29M)
    clean_text: bool = False  # unescape and lower-case before the edits (YFCC15M, 29M)
    ensemble: float = 0.5  # weight of the z head in zero-shot and retrieval, fixed in advance
    # data and model
    pairs: int = 150  # generated training pairs
    image_size: int = 24  # pixels of the weak view and of evaluation
    strong_size: int = 0  # pixels of the strong views, 0 = image_size; 29M: 192
    tokenizer: str = ""  # CLIP's merges file or folder; "" trains one on the training captions
    synonyms: str = ""  # table of data_prep/wordnet.py; "" = a few dozen for scenes, none for --data: swaps in their place
    backbone: str = "small"  # small (common/resnet.py), resnet50 (torchvision) or vit
    patch: int = 8  # vit: pixels
    width: int = 16  # small, vit
    depth: int = 3  # vit
    heads: int = 4  # vit
    text_width: int = 64  # text transformer
    text_depth: int = 2  # CC3M: 6, else 12
    text_heads: int = 2  # text transformer
    context: int = 77  # longest caption in tokens
    embed_dim: int = 64  # shared space; the paper: 256
    mlp_hidden: int = 256  # hidden width of the strong heads; the paper: 4096
    extra_hidden: int = 256  # hidden width of the added losses' heads; 0 = as released: SiamLIP 2048, BarLIP 3000
    extra_dim: int = 128  # output of the added losses' heads; 0 = as released: SiamLIP 128, BarLIP 8192


# 2. THE IDEA (start reading here) ------------------------------------------------------------------------------------
def clip_loss(f_img, f_txt, scale, smoothing=0.0, gather=ddp.gather_rows):  # twin: clip_loss
    """CLIP's symmetric cross-entropy. f_img, f_txt: (B, D) unit rows of this process; scale: 1 / temperature -> scalar.

    Each process takes its own rows against everybody's columns; with a gather that has a gradient, value and gradient
    equal those of one process with the whole batch K."""
    label = torch.arange(len(f_img), device=f_img.device) + ddp.rank() * len(f_img)
    to_txt = scale * f_img.float() @ gather(f_txt).float().T  # (B, K)
    to_img = scale * f_txt.float() @ gather(f_img).float().T
    # PyTorch's smoothing: (1 - e) on the pair + e / K on all K candidates, the pair among them
    return (F.cross_entropy(to_txt, label, label_smoothing=smoothing)
            + F.cross_entropy(to_img, label, label_smoothing=smoothing)) / 2  # fmt: skip


def rocket_loss(z, h, s_z, s_h, smoothing=0.0, gather=ddp.gather_rows):
    """The recipe: L = (l + A m) / (1 + A), l the weak pair's loss, m the mean over all A x A strong pairs.

    z: (z_img, z_txt); h: ([A strong images], [A strong captions]), each (B, D). A = 0 is CLIP; with the paper's A = 2 the weak
    pair weighs 1/3. -> (loss, parts)"""
    weak = clip_loss(*z, s_z, 0.0, gather)
    A = len(h[0])
    if A == 0:
        return weak, {"weak": weak}
    pairs = itertools.product(*h)  # weak and strong are never contrasted with each other
    strong = sum(clip_loss(a, b, s_h, smoothing, gather) for a, b in pairs) / A**2
    return (weak + A * strong) / (1 + A), {"weak": weak, "strong": strong}


# The four baselines: one added loss between image and text; constants of the released code.
def view_pairs(A):
    """(image view, caption view) that are compared: weak with weak, and every strong image with every strong caption."""
    return [(0, 0), *itertools.product(range(1, A + 1), repeat=2)]


def siam_loss(p_img, v_img, p_txt, v_txt, pairs):
    """SiamLIP: D(p, v) = 2 - 2 cos(p, stop-gradient(v)), both directions; range [0, 4]. BYOLIP: v from an EMA teacher."""

    def distance(p, v):
        return (2 - 2 * F.cosine_similarity(p.float(), v.detach().float(), dim=-1)).mean()

    terms = [distance(p_img[a], v_txt[b]) + distance(p_txt[b], v_img[a]) for a, b in pairs]
    return sum(terms) / (2 * len(terms))


def barlow_loss(v_img, v_txt, pairs, lam=5e-3, weight=0.025):
    """BarLIP: the cross-correlation C (D, D) of image and caption projections becomes the identity."""
    terms = []
    for a, b in pairs:
        K = len(v_img[a]) * ddp.world_size()
        C = ddp.all_sum(v_img[a].float().T @ v_txt[b].float()) / K  # summed over processes WITH gradient
        on = (C.diagonal() - 1).square().sum()
        off = C.square().sum() - C.diagonal().square().sum()
        terms.append(weight * (on + lam * off))
    return sum(terms) / len(terms)


@torch.no_grad()
def sinkhorn(scores, eps=0.05, iters=3):  # twin: sinkhorn
    """Balanced soft assignment of rows to columns: scores (B, K) of this process's rows -> Q (B, K), rows sum to 1.

    Alternates column and row normalisation over the rows of all processes: rows end exact, columns nearly equal, the
    more so the more iterations and the larger eps."""
    Q = scores.float() / eps  # in logarithms: nothing overflows, and no row is lost
    for _ in range(iters):
        top = Q.amax(0)
        if ddp.world_size() > 1:
            torch.distributed.all_reduce(top, op=torch.distributed.ReduceOp.MAX)
        Q -= top
        Q -= ddp.all_sum(Q.exp().sum(0)).log()
        Q -= Q.logsumexp(1, keepdim=True)
    return Q.exp()


def swap_loss(f_img, f_txt, scale, gather=ddp.gather_rows, eps=0.05, iters=3, weight=0.2):
    """SwALIP: the other modality's embeddings play the prototypes, and each pair of views predicts the assignment of the
    opposite pair. f_img, f_txt: the two strong views, lists of (B, D); one view each: the modalities swap targets."""
    all_img, all_txt = [gather(f) for f in f_img], [gather(f) for f in f_txt]
    views = list(itertools.product(range(len(f_img)), repeat=2))
    S = {(a, b): (f_img[a].float() @ all_txt[b].float().T, f_txt[b].float() @ all_img[a].float().T) for a, b in views}
    Q = {ab: [sinkhorn(s, eps, iters) for s in both] for ab, both in S.items()}  # [image to text, text to image]
    loss = 0.0
    for a, b in views:
        target = Q[1 - a, 1 - b] if len(f_img) == 2 else Q[a, b][::-1]
        loss += sum(F.cross_entropy(scale * s, q) for s, q in zip(S[a, b], target)) / 2
    return weight * loss / len(views)


def gather_no_grad(x):
    """The released code's gather (--gather no_grad): over processes the key side gets no gradient, its own rows included."""
    return ddp.gather_rows(x.detach()) if ddp.world_size() > 1 else x


# 3. MODULES: what a recipe switches, and the heads; backbones come from common ------------------------------------------
@dataclass(frozen=True)
class Recipe:
    views: int = 0  # A, strong views of image and text beside the weak one
    first: str = "weak"  # the first image view: weak, or "either" weak or strong
    proj: str = "shared"  # projection heads of the strong views: the weak view's, own "linear" ones, or own "mlp" ones
    text: bool = False  # stop-word removal, and one edit of each strong caption
    smooth: bool = False  # label smoothing of the strong pairs
    drop: bool = False  # text dropout on the strong captions


RECIPES = {  # the ablation ladder: each line adds one thing (text: two) to the line above, but "either", a side branch
    "plain": Recipe(),
    "either": Recipe(first="either"),
    "views": Recipe(2),  # to plain
    "heads": Recipe(2, proj="linear"),
    "mlp": Recipe(2, proj="mlp"),
    "text": Recipe(2, proj="mlp", text=True),
    "smooth": Recipe(2, proj="mlp", text=True, smooth=True),
    "rocket": Recipe(2, proj="mlp", text=True, smooth=True, drop=True),
}
EXTRAS = ("none", "siam", "byol", "bar", "swal")  # SwALIP is defined without label smoothing, also in the arm rocket


def mlp(*dims, last_bn=None, bias=True):
    """Linear BN ReLU ... Linear; last_bn: None, or whether a closing batch norm has an affine part."""
    layers = []
    for a, b in itertools.pairwise(dims):
        layers += [nn.Linear(a, b, bias=bias), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*layers[:-2], *([] if last_bn is None else [nn.BatchNorm1d(dims[-1], affine=last_bn)]))


class Rocket(nn.Module):
    """Two towers, head pair z for the weak view, head pair h for the strong views, and the added loss's heads v and p."""

    def __init__(self, cfg: Config, recipe: Recipe, extra: str, vocab: int):
        super().__init__()
        self.drop = cfg.text_drop if recipe.drop else 0.0
        if cfg.backbone == "small":
            self.visual = ResNet(cfg.width)
        elif cfg.backbone == "vit":
            self.visual = ViT(cfg.image_size, cfg.patch, cfg.width, cfg.depth, cfg.heads)
        else:
            from common.vision import torchvision

            self.visual = torchvision.models.resnet50()
            self.visual.out_dim, self.visual.fc = self.visual.fc.in_features, nn.Identity()
        self.text = TextTransformer(vocab, cfg.context, cfg.text_width, cfg.text_depth, cfg.text_heads)
        widths = {"img": self.visual.out_dim, "txt": self.text.out_dim}

        def pair(make):  # one head for each tower
            return nn.ModuleDict({tower: make(width) for tower, width in widths.items()})

        def linear(width):
            head = nn.Linear(width, cfg.embed_dim, bias=False)
            nn.init.normal_(head.weight, std=width**-0.5)
            return head

        self.z, self.log_s_z = pair(linear), nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.h = None
        if recipe.proj != "shared":
            own = linear if recipe.proj == "linear" else lambda w: mlp(w, cfg.mlp_hidden, cfg.mlp_hidden, cfg.embed_dim)
            self.h, self.log_s_h = pair(own), nn.Parameter(torch.tensor(math.log(1 / 0.1)))
        released = (3000, 8192) if extra == "bar" else (2048, 128)
        hidden, dim = cfg.extra_hidden or released[0], cfg.extra_dim or released[1]
        self.v = self.p = None
        if extra in ("siam", "byol"):
            self.v = pair(lambda w: mlp(w, hidden, dim, last_bn=False, bias=False))
            self.p = pair(lambda w: nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
                                                  nn.Linear(hidden, dim)))  # fmt: skip
        elif extra == "bar":
            self.v = pair(lambda w: mlp(w, hidden, hidden, dim, last_bn=True))

    def scales(self):
        return self.log_s_z.exp(), (self.log_s_z if self.h is None else self.log_s_h).exp()

    def forward(self, images, captions):
        """Lists of 1 + A views, weak first: images (B, 3, S, S), token ids (B, L) -> dict of z, and lists h, v, p of both.

        One forward a view, so that batch norm sees one kind of view at a time, as in the released code."""
        out = {"scales": self.scales()}
        towers = {"img": [self.visual(x) for x in images],
                  "txt": [self.text(t, self.drop if i else 0.0) for i, t in enumerate(captions)]}  # fmt: skip
        for m, features in towers.items():
            strong = (self.h or self.z)[m]
            out[f"z_{m}"] = F.normalize(self.z[m](features[0]).float(), dim=-1)
            out[f"h_{m}"] = [F.normalize(strong(f).float(), dim=-1) for f in features[1:]]
            out[f"v_{m}"] = [self.v[m](f) for f in features] if self.v else []
            out[f"p_{m}"] = [self.p[m](v) for v in out[f"v_{m}"]] if self.p else []
        return out

    @torch.no_grad()
    def embed(self, tower: str, x, w: float):
        """Inference on images ("img") or token ids ("txt"): unit features {"z"} or {"z", "h", "both"}.

        both = [sqrt(w) z, sqrt(1 - w) h] is a unit vector whose dot product is w cos_z + (1 - w) cos_h."""
        f = self.visual(x) if tower == "img" else self.text(x)
        z = F.normalize(self.z[tower](f).float(), dim=-1)
        if self.h is None:
            return {"z": z}
        h = F.normalize(self.h[tower](f).float(), dim=-1)
        return {"z": z, "h": h, "both": torch.cat([math.sqrt(w) * z, math.sqrt(1 - w) * h], -1)}


# 4. DATA: (image, captions) -> 1 + A views of each -----------------------------------------------------------------------
class Views:
    """make(sample, rng) for data.Batches: 1 + A crops, 1 + A captions, and one row of colour parameters a crop.

    weak    image: crop of area 0.5 to 1, nothing else. caption: without stop-words with probability p_stop
    strong  image: smaller crop, jitter (0.4, 0.4, 0.4, 0.1) with p 0.8, grey 0.2, blur 0.5, flip 0.5, which are the
            defaults of augment.Colour. caption: the same, then one edit: synonym 0.4, swap 0.4, deletion 0.2"""

    def __init__(self, cfg: Config, recipe: Recipe, tok: Tokenizer, synonyms):
        self.cfg, self.recipe, self.tok, self.synonyms = cfg, recipe, tok, synonyms
        size = self.size = (cfg.image_size, cfg.strong_size or cfg.image_size)
        blur = (0.1 * size[1] / 224, 2.0 * size[1] / 224)  # the paper's sigma is 0.1 to 2 at 224 pixels
        light = dict(jitter=(0.4, 0.4, 0.4, 0.0), grey_p=0.0) if cfg.jitter == "light" else {}
        self.strong = augment.Colour(blur=blur, **light)
        self.weak = augment.Colour(jitter_p=0, grey_p=0, blur_p=0, flip_p=0)

    def __call__(self, sample, rng):
        captions, img = sample.get("captions") or [], sample["image"]
        if not captions:
            raise data.BadSample(f"{sample['key']} has no caption")
        kinds = ["weak"] + ["strong"] * self.recipe.views
        if self.recipe.first == "either":
            kinds[0] = ("weak", "strong")[rng.integers(2)]
        one, crops, rows, texts = captions[rng.integers(len(captions))], [], [], []
        for i, kind in enumerate(kinds):
            box = augment.crop_box(*img.size, (0.5 if kind == "weak" else self.cfg.strong_scale, 1.0), rng)
            crops.append(augment.resize_to(img, box, self.size[min(i, 1)]))
            rows.append(augment.draw_colour(self.weak if kind == "weak" else self.strong, rng))
            text = captions[rng.integers(len(captions))] if self.cfg.captions == "multi" else one
            text = self.tok.clean(text) if self.cfg.clean_text else text
            if self.recipe.text:
                text = augment.drop_stop_words(text, rng, self.cfg.p_stop)
                text = augment.edit_caption(text, rng, self.synonyms) if i else text
            texts.append(text)
        return crops, rows, texts

    def collate(self, items):
        """-> images [(B, S, S, 3) uint8], colour rows [(B, 12)], token ids [(B, L)]; lists over the 1 + A views."""
        crops, rows, texts = zip(*items)
        return ([torch.from_numpy(np.stack(v)) for v in zip(*crops)],
                [torch.from_numpy(np.stack(v)) for v in zip(*rows)],
                [trim(self.tok(list(v), self.cfg.context), 8) for v in zip(*texts)])  # fmt: skip


def to_device(batch, device):
    """Colour, blur, flip and normalisation run here, on the device, for the whole batch."""
    images, rows, ids = batch
    images = [augment.apply_colour(augment.to_float(x.to(device, non_blocking=True)), r) for x, r in zip(images, rows)]
    images = [augment.normalise(x).contiguous(memory_format=torch.channels_last) for x in images]
    return images, [t.to(device, non_blocking=True) for t in ids]


@dataclass
class Test:
    """An evaluation set. tasks: name -> all prompts of each class; metric: of METRICS; retrieval: are captions searched?"""

    source: object
    tasks: dict
    retrieval: bool
    metric: str = "top1"


def pairs_of_scenes(count, seed, size, part):
    """Single objects, close up; captions name shape, colour and mostly texture: nothing that a crop or light jitter
    changes. part: train or test, which have no object in common. As few training pairs as possible have the
    same description: equal captions would be negatives of each other in a batch."""
    source = scenes.Source(6 * count if part == "train" else count, seed, size, brief=True, objects=(1, 1), grid=1, part=part)
    if part == "train":
        seen, repeats = Counter(), []  # how often each scene's description has come before it
        for t in (s.things[0] for s in source.scenes):
            repeats.append(seen[t.shape, t.colour, t.texture])
            seen[t.shape, t.colour, t.texture] += 1
        rows = np.sort(np.argsort(repeats, kind="stable")[:count])
        source.images, source.sizes = source.images[rows], [count]
        source.scenes, source.texts = [source.scenes[i] for i in rows], [source.texts[i] for i in rows]
    return source


def scene_tests(size):
    """Scenes of new objects, classified by prompts that average over what the class leaves open."""
    colours, shapes, forms = tuple(scenes.COLOURS), scenes.SHAPES, ("a {}", "a picture of a {}", "there is a {}")
    textures = ("", *scenes.TEXTURES[1:])  # a solid object is just called by its colour

    def prompts(*names, forms=forms):  # "an orange circle"
        return [scenes.articles(f.format(n.strip())) for f in forms for n in names]

    tasks = {
        "shape": [prompts(*(f"{c} {s}" for c in colours)) for s in shapes],
        "colour": [prompts(*(f"{c} {s}" for s in shapes)) for c in colours],
        "texture": [prompts(*(f"{t} {c} {s}" for c in colours for s in shapes), forms=forms[:1]) for t in textures],
        "colour and shape": [prompts(f"{c} {s}") for c in colours for s in shapes],
    }
    return [Test(pairs_of_scenes(1000, 1_000_003, size, "test"), tasks, True)]


def read_synonyms(path) -> dict[str, tuple[str, ...]]:
    """Lines of a word, a tab and its synonyms, separated by commas."""
    rows = [line.split("\t", 1) for line in data.read_text(path).splitlines() if "\t" in line]
    if not rows:
        raise ValueError(f"--synonyms {path} holds no line of a word, a tab and its synonyms; see data_prep/wordnet.py")
    return {word: tuple(others.split(",")) for word, others in rows}


def open_data(cfg: Config):
    """-> training source, [Test], tokenizer, synonyms"""
    # without any, every edit is a swap or a deletion
    synonyms = read_synonyms(cfg.synonyms) if cfg.synonyms else {} if cfg.data else scenes.SYNONYMS
    if cfg.data:
        source = data.Shards(cfg.data, "train")
        alone = cfg.eval_data and all(n.startswith("train-") for n in data.Shards(cfg.data).names)  # CC3M has no test
        tests = [] if alone else [Test(data.Shards(cfg.data, data.held_out(cfg.data, ("test", "val"))), {}, True)]
    else:
        source = pairs_of_scenes(cfg.pairs, cfg.seed, cfg.image_size, "train")
        tests = scene_tests(cfg.image_size)
    if cfg.eval_data:
        labelled = data.Shards(cfg.eval_data, data.held_out(cfg.eval_data))
        forms, metric = labelled.manifest.get("templates") or ["a photo of a {}."], labelled.manifest.get("metric", "top1")
        if not labelled.classes or not all(isinstance(names, str) for names in labelled.classes):
            raise ValueError(f"--eval_data {cfg.eval_data}: manifest.json lists no classes by name; use data_prep/imagenet.py")
        if metric not in METRICS or not all(isinstance(f, str) and re.findall("{.*?}", f) == ["{}"] for f in forms):
            raise ValueError(f"--eval_data {cfg.eval_data}: manifest.json needs a metric of {', '.join(METRICS)} and templates "
                             "with one {}")  # fmt: skip
        if not all(0 <= r.get("label", -1) < len(labelled.classes) for r in data.records(labelled) if r["key"]):
            raise ValueError(f"--eval_data {cfg.eval_data} has pictures without a label of one of its {len(labelled.classes)} "
                             "classes; prepare it with data_prep/imagenet.py")  # fmt: skip
        seen = {r.get("label") for r in data.records(labelled) if r["key"]}
        if metric == "roc_auc" and (len(labelled.classes) != 2 or seen != {0, 1}):
            raise ValueError(f"--eval_data {cfg.eval_data}: the metric roc_auc needs pictures of two classes, and of no more")
        # "king penguin, Aptenodytes patagonica": a class's synonyms are separated by commas; all of them are averaged
        prompts = [[f.format(word.strip()) for word in names.split(",") for f in forms] for names in labelled.classes]
        tests.append(Test(labelled, {"classes": prompts}, False, metric))
    if cfg.tokenizer:
        return source, tests, Tokenizer.from_clip(cfg.tokenizer), synonyms
    return source, tests, Tokenizer.train(source.captions(), 4096), synonyms


# 5. EVALUATE -----------------------------------------------------------------------------------------------------------
def roc_auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Area under the ROC curve in percent: the chance that a positive scores above a negative, ties count half.

    scores (N,), labels (N,) of 0 and 1. By ranks (Mann-Whitney U), O(N log N)."""
    values, inverse, counts = scores.double().unique(return_inverse=True, return_counts=True)
    mean_rank = counts.cumsum(0) - (counts - 1) / 2  # 1-based, averaged over ties
    positive = labels.bool()
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if not n1 or not n0:
        raise ValueError("roc_auc needs both classes among the labels")
    u = mean_rank[inverse][positive].sum() - n1 * (n1 + 1) / 2
    return 100 * (u / (n1 * n0)).item()


METRICS = {  # scores (N, C), labels (N,) -> percent; a prepared data set names its own in manifest.json
    "top1": metrics.accuracy,
    "mean_per_class": lambda scores, y: metrics.accuracy(scores, y, per_class=True),  # Aircraft, Pets, Caltech101, Flowers
    "roc_auc": lambda scores, y: roc_auc(scores[:, 1] - scores[:, 0], y),  # Hateful Memes
}


def embed_texts(model, tok, texts, cfg, device):
    out = [model.embed("txt", trim(tok(texts[i : i + 512], cfg.context)).to(device), cfg.ensemble)
           for i in range(0, len(texts), 512)]  # fmt: skip
    return {k: torch.cat([o[k].cpu() for o in out]) for k in out[0]}


def class_weights(model, tok, prompts, cfg, device):
    """prompts: a list for each of C classes -> {head: (C, D)}: every prompt normalised, averaged, normalised again."""
    unique = list(dict.fromkeys(p for names in prompts for p in names))
    row = {p: i for i, p in enumerate(unique)}
    f = embed_texts(model, tok, unique, cfg, device)
    out = {k: torch.stack([v[[row[p] for p in dict.fromkeys(names)]].mean(0) for names in prompts]) for k, v in f.items()}
    out = {k: F.normalize(v, dim=-1) for k, v in out.items()}
    if "h" in out:  # each head's classifier is normalised on its own, then joined as in embed()
        out["both"] = torch.cat([math.sqrt(cfg.ensemble) * out["z"], math.sqrt(1 - cfg.ensemble) * out["h"]], -1)
    return out


def embed_images(model, test, cfg, env):
    """All pictures of a test set, split over processes -> {head: (N, D)}, records; in the order of their keys. Damaged ones
    are left out, for retrieval those without a caption, too."""

    def make(sample):
        img = sample.pop("image")
        if test.retrieval and not sample.get("captions"):
            raise data.BadSample(f"{sample['key']} has no caption")
        return augment.resize_to(img, augment.centre_box(*img.size), cfg.image_size, data.Image.BILINEAR), sample

    items = []
    for batch in data.in_order(test.source, make, list, 256, slice(env.rank, None, env.world), cfg.workers):
        if batch:
            x = torch.from_numpy(np.stack([img for img, _ in batch])).to(env.device)
            f = {k: v.cpu() for k, v in model.embed("img", augment.normalise(augment.to_float(x)), cfg.ensemble).items()}
            # copies: a view would be sent with all of its batch
            items += [(r, {k: v[i].clone() for k, v in f.items()}) for i, (_, r) in enumerate(batch)]
    items = ddp.gather_lists(items) if env.world > 1 else items  # rank 0 alone draws pictures
    items = sorted(items, key=lambda item: item[0]["key"])
    if not items:
        raise ValueError(f"no picture of {cfg.eval_data or cfg.data} can be used for the tests")
    return {k: torch.stack([f[k] for _, f in items]) for k in items[0][1]}, [r for r, _ in items]


def evaluate(model, tests, tok, cfg, env):
    """Flat dict of percentages for the heads z, h and both: zero-shot score of every task, retrieval R@1, 5, 10 both ways.

    zero_shot (mean over the tasks) and retrieval (mean R@1 both ways) are the headlines, of both heads where there are."""
    model.eval()
    out, headline = {}, {"zero_shot": [], "retrieval": []}
    for test in tests:
        f, records = embed_images(model, test, cfg, env)
        top = list(f)[-1]  # both heads, where there are two
        for task, prompts in test.tasks.items():
            w, name = class_weights(model, tok, prompts, cfg, env.device), task.replace(" ", "_")
            labels = torch.tensor([r["labels"][task] if "labels" in r else r["label"] for r in records])
            for head in f:
                out[f"{name}_{head}"] = METRICS[test.metric](f[head] @ w[head].T, labels)
            headline["zero_shot"].append(out[f"{name}_{top}"])
        if test.retrieval:
            texts, match = metrics.caption_matches(records)
            f_txt = embed_texts(model, tok, texts, cfg, env.device)
            for head in f:
                for name, recall in (("text_to_image", metrics.retrieval_recall(f_txt[head], f[head], match)),
                                     ("image_to_text", metrics.retrieval_recall(f[head], f_txt[head], match.T))):  # fmt: skip
                    out.update({f"{name}_r{k}_{head}": v for k, v in recall.items()})
            headline["retrieval"] += [out[f"{name}_r1_{top}"] for name in ("text_to_image", "image_to_text")]
    model.train()
    return {**{k: float(np.mean(v)) for k, v in headline.items() if v}, **out}


# 6. TRAIN --------------------------------------------------------------------------------------------------------------
def method_loss(model, teacher, images, captions, extra, recipe, cfg):
    """One batch of 1 + A views of images and captions -> (loss, parts): the recipe's loss plus one added loss."""
    amp = torch.autocast(images[0].device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    with amp:  # the networks only: losses and logits stay in float32
        out = model(images, captions)
    s_z, s_h = out["scales"]
    gather = ddp.gather_rows if cfg.gather == "grad" else gather_no_grad
    h = (out["h_img"], out["h_txt"])
    smoothing = cfg.smoothing if recipe.smooth and extra != "swal" else 0.0  # SwALIP is defined without smoothing
    loss, parts = rocket_loss((out["z_img"], out["z_txt"]), h, s_z, s_h, smoothing, gather)
    loss = 2 * loss if cfg.loss_sum else loss
    pairs = view_pairs(recipe.views)
    if extra in ("siam", "byol"):
        with torch.no_grad(), amp:
            target = teacher(images, captions) if extra == "byol" else out
        parts["extra"] = siam_loss(out["p_img"], target["v_img"], out["p_txt"], target["v_txt"], pairs)
    elif extra == "bar":
        parts["extra"] = barlow_loss(out["v_img"], out["v_txt"], pairs)
    elif extra == "swal":
        views = h if recipe.views else ([out["z_img"]], [out["z_txt"]])
        parts["extra"] = swap_loss(*views, s_h, gather)
    return loss + parts.get("extra", 0.0), parts


def train(cfg: Config) -> dict:
    """Trains one arm (a single recipe and extra) in cfg.out_dir and returns its metrics."""
    env = ddp.start(cfg.seed)
    recipe, extra, out = RECIPES[cfg.recipe], cfg.extra, Path(cfg.out_dir)
    source, tests, tok, synonyms = open_data(cfg)
    bad = [sum(not r.get("captions") for r in data.records(t.source)) for t in tests if t.retrieval]
    if sum(bad) and env.is_main:
        print(f"{sum(bad)} test pictures are damaged or lack a caption and are left out", file=sys.stderr)
    if sum(source.sizes) < cfg.batch_size:
        raise ValueError(f"--batch_size {cfg.batch_size} is more than the {sum(source.sizes)} pairs: they would be their own "
                         "negatives")  # fmt: skip
    views = Views(cfg, recipe, tok, synonyms)
    ddp.reseed(cfg.seed, 0, 0)  # the same initial weights on every process
    model = Rocket(cfg, recipe, extra, len(tok)).to(env.device, memory_format=torch.channels_last)
    wrapped = ddp.wrap(torch.compile(model) if cfg.compile else model, env)
    teacher = copy.deepcopy(model).requires_grad_(False) if extra == "byol" else None  # behind wrap(): it exchanges norms
    opt = torch.optim.AdamW(optim.decay_groups(model, cfg.wd), cfg.lr, (0.9, 0.98), 1e-8, fused=True)
    state = {"model": model, "opt": opt, **({"teacher": teacher} if teacher else {})}
    start, best = ckpt.resume(out / "last.pt", cfg, **state)
    env.share(cfg.batch_size, accum=cfg.accum)  # refuses what cannot be cut
    batches = data.Batches(source, views, views.collate, cfg.batch_size // cfg.accum, env, cfg.seed, start * cfg.accum,
                           cfg.workers, cfg.max_bad)  # fmt: skip
    log = RunLog(cfg, env, cfg.recipe if extra == "none" else f"{cfg.recipe} + {extra}", start)
    for step in range(start, cfg.steps):
        ddp.reseed(cfg.seed, env.rank, step)  # dropout; data and augmentation are functions of the sample's position
        optim.set_lr(opt, optim.warmup_cosine(step, cfg.steps, cfg.warmup, cfg.lr, 1e-6, 1e-5))
        mean_loss = 0.0
        for _ in range(cfg.accum):
            images, captions = to_device(next(batches), env.device)
            loss, parts = method_loss(wrapped, teacher, images, captions, extra, recipe, cfg)
            (loss / cfg.accum).backward()
            mean_loss += loss.detach() / cfg.accum
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        opt.step()
        opt.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.startswith("log_s"):
                    p.clamp_(0, math.log(100))  # both temperatures, after every update
            if teacher:  # parameters only: the teacher's batch norm statistics are its own
                for old, new in zip(teacher.parameters(), model.parameters()):
                    old.lerp_(new, 1 - cfg.ema_decay)
        done, last = step + 1, step + 1 == cfg.steps
        due = done % cfg.log_every == 0 or last
        leave = ddp.interrupted(due)
        if due or leave or done % cfg.save_every == 0:
            ddp.check_finite({"loss": mean_loss.item(), "grad_norm": norm.item()}, step)
        if due:
            scales = dict(zip(("s_z", "s_h"), model.scales()))
            log.write(step, **ddp.mean({"loss": mean_loss, **parts, **scales}), lr=opt.param_groups[0]["lr"], bad=batches.bad)
        if last or (cfg.eval_every and done % cfg.eval_every == 0):
            result = evaluate(model, tests, tok, cfg, env)
            log.write(step, **result)
            score = result.get("zero_shot", result.get("retrieval"))
            if env.is_main and cfg.eval_every and score > best.get("score", -1.0):  # chosen on the test set: kept, not reported
                best = {"score": score, "step": done}
                ckpt.export(out / "best.safetensors", model.state_dict(), **best)
        log.tick(step)
        if env.is_main and (done % cfg.save_every == 0 or last or leave):
            ckpt.save(out / "last.pt", done, cfg, best, **state)
        if leave:
            log.close()
            raise KeyboardInterrupt
    if start == cfg.steps:  # killed between the last update and the report
        result = evaluate(model, tests, tok, cfg, env)
    if env.is_main:
        ckpt.export(out / "model.safetensors", model.state_dict(), recipe=cfg.recipe, extra=extra)
        tok.save(out / "merges.txt")
        plot.save(plot.lines(history(log.dir, "loss", "weak", "strong", "extra"), log.name, y="loss"), out / "curves.png")
        draw_views(source, views, out / "samples" / "views.png")
        if tests[0].retrieval:
            draw_retrieval(model, tests[0], tok, cfg, env.device, out / "samples" / "retrieval.png")
    log.finish(result)
    return result


def draw_views(source, views, path):
    """What the recipe makes of four pairs, the first that are whole."""
    cells, labels = [], []
    first = data.Subset(source, range(min(64, sum(source.sizes))))
    made = data.in_order(first, lambda s: (s, views(s, np.random.default_rng(s["row"]))), list, 1)
    for sample, one in itertools.islice(itertools.chain.from_iterable(made), 4):
        images, rows, ids = views.collate([one])
        images = [augment.apply_colour(augment.to_float(x), r)[0] for x, r in zip(images, rows)]
        cells += [sample["image"], *[(x.permute(1, 2, 0) * 255).byte().numpy() for x in images]]
        labels += [sample["captions"][0], *[views.tok.decode(t[0]) for t in ids]]
    title = "original  |  weak view" + "  |  strong view" * views.recipe.views
    plot.save(plot.grid(cells, 2 + views.recipe.views, labels, title=title, cell=170, rows_of_text=4), path)


def draw_retrieval(model, test, tok, cfg, device, path):
    """For six captions the five nearest pictures, right ones framed in green."""
    model.eval()
    f, records = embed_images(model, test, cfg, ddp.Env(0, 1, device))  # rank 0 alone
    head, pick = list(f)[-1], [i * len(records) // 6 for i in range(6)]
    f_txt = embed_texts(model, tok, [records[i]["captions"][0] for i in pick], cfg, device)[head]
    source, near = test.source, min(5, len(records))
    place = [(s, r) for s, size in enumerate(source.sizes) for r in range(size)]
    place = {r["key"]: p for r, p in zip(data.records(source), place)}
    cells, labels, marks = [], [], []
    for i, t in zip(pick, f_txt):
        text = records[i]["captions"][0]
        for j in [i, *(f[head] @ t).topk(near).indices.tolist()]:
            cells.append(source.read(*place[records[j]["key"]])["image"])
            right = text in records[j]["captions"]
            labels.append(text if right else records[j]["captions"][0])
            marks.append(None if len(cells) % (near + 1) == 1 else plot.GREEN if right else plot.FAINT)
    title = "caption with its picture  |  the five pictures nearest to the caption; right ones in green"
    plot.save(plot.grid(cells, near + 1, labels, marks, title, cell=140, rows_of_text=4), path)
    model.train()


def run(cfg: Config) -> dict:
    """All arms of --recipe x --extra side by side, each in its own folder; finished arms are kept. Prints the claim."""
    recipes = list(RECIPES) if cfg.recipe == "ladder" else cfg.recipe.split(",")
    extras = list(EXTRAS) if cfg.extra == "all" else cfg.extra.split(",")
    cli.within(cfg, "steps pairs image_size patch width depth heads text_width text_depth text_heads context embed_dim", 1)
    cli.within(cfg, "mlp_hidden", 1)
    if cfg.backbone == "small":
        cli.within(cfg, "width", 8)  # torch's channels-last convolutions of fewer channels damage memory on a CPU
    cli.within(cfg, "strong_size extra_hidden extra_dim", 0)
    cli.within(cfg, "smoothing ensemble p_stop text_drop strong_scale", 0, 1)
    if cfg.batch_size // cfg.accum < 2 or cfg.context < 3:
        raise ValueError("--batch_size must leave two pairs a micro-batch, --context three tokens")
    cli.choose(replace(cfg, recipe=",".join(recipes), extra=",".join(extras)), "recipe extra", recipe=RECIPES, extra=EXTRAS,
               gather=("grad", "no_grad"), dtype=("float32", "bfloat16"), captions=("single", "multi"),
               jitter=("light", "full"), backbone=("small", "resnet50", "vit"))  # fmt: skip
    ddp.start(cfg.seed)
    out, scores = Path(cfg.out_dir), {}
    for extra, recipe in itertools.product(extras, recipes):
        arm = replace(cfg, recipe=recipe, extra=extra, out_dir=str(out / f"{recipe}_{extra}"))
        scores[recipe, extra] = ckpt.once(train, arm)
    result = {f"{r}_{e}_{k}": v for (r, e), s in scores.items() for k, v in s.items()}
    if ddp.rank() == 0:
        write_json(out / "metrics.json", result)
        report(cfg, recipes, extras, scores)
    return result


def report(cfg, recipes, extras, scores):
    """Tables on the terminal, one curve an arm."""
    for name in ("zero_shot", "retrieval"):
        if name in next(iter(scores.values())):
            print(f"\n{name.replace('_', '-')} in percent, added loss by recipe")
            print(table([[e, *[scores[r, e][name] for r in recipes]] for e in extras], ["", *recipes]))
    key = "zero_shot" if "zero_shot" in next(iter(scores.values())) else "retrieval"
    rows, added = [], [e for e in extras if e != "none"]
    if "none" in extras and {"plain", "rocket"} <= set(recipes):
        base, best = scores["plain", "none"][key], scores["rocket", "none"][key]
        relative = f" ({100 * (best / base - 1):+.0f} %)" if base else ""
        rows.append(["the recipe lifts plain CLIP", base, best, f"{best - base:+.1f}{relative}", "up to 25 % relative"])
        claims = (("plain", "added losses help the plain recipe", "they do"),
                  ("rocket", "... and no longer help the strong one", "the advantage disappears"))  # fmt: skip
        for recipe, words, paper in claims:
            if added:
                one, mean = scores[recipe, "none"][key], float(np.mean([scores[recipe, e][key] for e in added]))
                rows.append([words, one, mean, f"{mean - one:+.1f}", paper])
    if rows:
        print("\n" + table(rows, [f"claim ({key.replace('_', '-')})", "baseline", "method", "difference", "paper"]))
    curves = {f"{r} + {e}" if e != "none" else r: history(f"{cfg.out_dir}/{r}_{e}", "weak")["weak"] for r, e in scores}
    plot.save(plot.lines(curves, "contrastive loss of the weak pairs (training)"), Path(cfg.out_dir, "curves.png"))
    print(f"\npictures, curves and weights: {cfg.out_dir}")


# 7. MAIN ---------------------------------------------------------------------------------------------------------------
# The paper's runs: 32 epochs at batch 4096, values of the released commands. bfloat16 takes the place of float16. With --extra,
# CC12M wants --text_drop 0.1. YFCC15M also with --backbone vit --width 384 --depth 12 --heads 12 --patch 16 --p_stop 0.8
# (ViT-S/16). All of them want CLIP's merges as --tokenizer and WordNet's synonyms.
_PAPER = dict(steps=96_900, batch_size=4096, lr=3e-3, wd=0.1, warmup=3_000, dtype="bfloat16", workers=12, log_every=50,
              eval_every=3_000, save_every=1_000, recipe="rocket", extra="none", text_drop=0.05, loss_sum=True,
              strong_scale=0.08, jitter="full", image_size=224, backbone="resnet50", text_width=512, text_depth=12,
              text_heads=8, embed_dim=256, mlp_hidden=4096, extra_hidden=0, extra_dim=0,
              data="data/cc12m", out_dir="runs/clip_recipe_cc12m")  # fmt: skip
PRESETS = {
    "smoke": dict(steps=8, batch_size=16, warmup=2, pairs=64, text_depth=1, extra="none,siam", log_every=2, save_every=4,
                  out_dir="runs/clip_recipe_smoke"),
    "laptop": {},
    "gpu": dict(steps=3_000, batch_size=512, warmup=150, pairs=2_000, image_size=64, width=64, text_width=256, text_depth=6,
                text_heads=4, embed_dim=256, mlp_hidden=1024, extra_hidden=1024, extra="all", dtype="bfloat16", workers=14,
                out_dir="runs/clip_recipe_gpu"),
    # 800 Flickr8k photographs on a laptop, data by data_prep/captions.py; crops and colours are the paper's
    "flickr8k": dict(data="data/flickr8k", steps=600, image_size=64, text_width=128, text_depth=3, text_heads=4, embed_dim=128,
                     extra="none", strong_scale=0.08, jitter="full", eval_every=200, out_dir="runs/clip_recipe_flickr8k"),
    "paper": _PAPER,
    "cc3m": {**_PAPER, **dict(steps=25_800, warmup=800, wd=0.5, text_depth=6, text_drop=0.2, loss_sum=False,
                              data="data/cc3m", out_dir="runs/clip_recipe_cc3m")},
    "yfcc15m": {**_PAPER, **dict(steps=115_000, warmup=3_600, p_stop=0.9, text_drop=0.0, clean_text=True,
                                 data="data/yfcc15m", out_dir="runs/clip_recipe_yfcc15m")},
    "open29m": {**_PAPER, **dict(steps=240_000, warmup=7_500, lr=2e-3, text_drop=0.0, clean_text=True, strong_size=192,
                                 captions="multi", data="data/open29m", out_dir="runs/clip_recipe_open29m")},
}  # fmt: skip

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
