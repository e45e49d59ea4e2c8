"""CLIP-rocket: plain CLIP, trained with strong views of image and text beside the weak ones, needs no added loss.

Paper      Fini, Astolfi, Romero-Soriano, Verbeek, Drozdzal: Improved baselines for vision-language pre-training.
           TMLR 2023, arXiv 2305.08675
Idea       Many papers add a non-contrastive loss (SimSiam, BYOL, Barlow Twins, SwAV) between image and text to CLIP and
           beat CLIP. The paper asks how much of that is CLIP's poor training recipe. It keeps the contrastive loss and
           adds, per pair, A strongly augmented images and captions. Strong pairs are noisy, and features that match them
           are too invariant, so they get projection heads and a temperature of their own; label smoothing and dropout
           in the text tower act on them alone. Weak and strong are never contrasted with each other. With this recipe
           plain CLIP gains, and the added losses no longer do.
Equations  One contrastive term -> clip_loss(). The recipe, (l + A m) / (1 + A) -> rocket_loss(). The four baselines ->
           siam_loss(), barlow_loss(), sinkhorn() + swap_loss(); BYOLIP is siam_loss() with an EMA teacher.
Read first section 2 of this file, then RECIPES, then train(); the rest is ordinary
Symbols    z weak ("global") and h strong ("local") unit embeddings (B, D); s_z, s_h their scales 1 / temperature;
           A strong views a pair; v projection and p prediction of the added losses; K global batch
Run        python methods/clip_recipe.py --preset smoke                        (CPU, no data, under 30 s)
           python methods/clip_recipe.py                                       (CPU, no data, about 5 min)
           python methods/clip_recipe.py --recipe ladder --extra none          (one recipe step after the other)
           torchrun --nproc_per_node=8 methods/clip_recipe.py --preset cc3m --data /data/cc3m --tokenizer merges.txt.gz
Data       common/scenes.py, generated; or shards by data_prep/captions.py, cc12m.py, coco.py (split "train", retrieval on
           "test"); zero-shot classes by data_prep/imagenet.py or cifar100.py as --eval_data
Expect     EXPECT
Differs    from the paper: blur is an exact Gaussian of the same sigma, scaled with the image size; synonyms come from a
           table (data_prep/wordnet.py), a word without one falls back to a swap; stop-words are our own list.
           from the released code: features are gathered WITH gradient (there: without, so the key side's gradient is
           lost; --gather no_grad repeats it); Barlow's correlation is summed over processes with gradient (there: 1 / W
           of it); the plain baseline is plain (there: stop-word removal stays on); randomness is per sample, not one
           global generator; text dropout is written out (there: an in-place side effect); the second temperature is
           clamped only if it exists; batch norm is synchronised; the last checkpoint is reported, the best one only kept;
           the head ensemble has a fixed weight, 0.5. SwALIP on a recipe without strong views swaps modalities (undefined
           there). Left out: SwALIPV1 with prototypes, drop-path, own extra heads for strong views.
Uses       common/augment.py ckpt.py cli.py data.py ddp.py log.py metrics.py optim.py plot.py scenes.py tokenizer.py
           vision.py vit.py   (copy these with this file)
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]  # so that python, torchrun and python -m all find common/

from common import augment, ckpt, cli, data, ddp, metrics, optim, plot, scenes
from common.log import RunLog, table
from common.tokenizer import Tokenizer
from common.vit import TextTransformer, ViT, trim


# 1. CONFIG ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    # run: the same names in all ten files
    out_dir: str = "runs/clip_recipe"  # one folder a run; each arm gets a sub-folder
    seed: int = 0  # of weights, scenes, data order and augmentation
    steps: int = 400  # optimiser updates of each arm
    batch_size: int = 64  # GLOBAL number of pairs: divided by the number of processes
    accum: int = 1  # micro-batches an update; they do not add negatives to each other
    lr: float = 2e-3  # peak, AdamW; the paper: 3e-3 at batch 4096
    wd: float = 0.5  # weight decay; the paper: 0.1, on CC3M 0.5
    warmup: int = 40  # updates of linear warm-up from 1e-6; the paper: one epoch
    grad_clip: float = 0.0  # largest gradient norm, 0 = off (the paper)
    ema_decay: float = 0.99  # of BYOLIP's teacher
    dtype: str = "float32"  # float32, or bfloat16 autocast (losses stay in float32)
    compile: bool = False  # torch.compile the model
    data: str = ""  # folder of shards with captions; "" = generated scenes
    eval_data: str = ""  # folder of shards with labels for zero-shot; "" = generated scenes, or none with --data
    workers: int = 0  # loader processes on each rank
    log_every: int = 20  # steps between lines of log.jsonl
    eval_every: int = 0  # steps between evaluations (best.safetensors is kept), 0 = at the end only
    save_every: int = 100  # steps between checkpoints
    resume: bool = True  # continue from last.pt, exactly; --no-resume starts again
    max_bad: float = 0.01  # share of damaged samples at which the run stops
    # method
    recipe: str = "plain,rocket"  # comma list of RECIPES, or "ladder" for all; crossed with --extra, one arm each
    extra: str = "none,siam,bar"  # comma list of none, siam, byol, bar, swal, or "all"
    gather: str = "grad"  # grad, or no_grad: the released code's gather, whose gradient is wrong over processes
    p_stop: float = 0.8  # chance that a caption loses its stop-words; YFCC15M ResNet-50: 0.9
    smoothing: float = 0.1  # label smoothing of the strong pairs
    text_drop: float = 0.2  # dropout before every text block, strong captions only; CC3M 0.2, CC12M 0.05, else 0
    loss_sum: bool = False  # sum the two directions instead of averaging them (all data sets but CC3M)
    captions: str = "single"  # one random caption a sample for all views, or "multi": each view draws its own (29M)
    clean_text: bool = False  # lower-case and unescape before the edits (YFCC15M, 29M)
    ensemble: float = 0.5  # weight of the z head in zero-shot and retrieval, fixed in advance
    # data and model
    pairs: int = 1000  # generated training pairs
    image_size: int = 32  # weak view; pixels
    strong_size: int = 0  # strong views; 0 = image_size (29M: 192)
    tokenizer: str = ""  # CLIP's merges file or folder; "" trains one on the training captions
    synonyms: str = ""  # table of data_prep/wordnet.py; "" = the scenes' own
    backbone: str = "vit"  # vit or resnet50
    patch: int = 8  # ViT
    width: int = 96  # ViT
    depth: int = 3  # ViT
    heads: int = 3  # ViT
    text_width: int = 96  # text transformer
    text_depth: int = 2  # CC3M: 6, else 12
    text_heads: int = 3  # text transformer
    context: int = 77  # longest caption in tokens
    embed_dim: int = 64  # shared space; the paper: 256
    mlp_hidden: int = 256  # hidden width of the strong heads; the paper: 4096
    extra_hidden: int = 256  # hidden width of the added losses' heads; SiamLIP 2048, BarLIP 3000
    extra_dim: int = 128  # output of the added losses' heads; SiamLIP 128, BarLIP 8192


_PAPER = dict(steps=96_900, batch_size=4096, lr=3e-3, wd=0.1, warmup=3_000, dtype="bfloat16", workers=12, log_every=50,
              eval_every=3_000, save_every=1_000, recipe="rocket", extra="none", text_drop=0.05, loss_sum=True,
              image_size=224, backbone="resnet50", text_width=512, text_depth=12, text_heads=8, embed_dim=256,
              mlp_hidden=4096, extra_hidden=2048, out_dir="runs/clip_recipe_cc12m")  # fmt: skip
PRESETS = {
    "smoke": dict(steps=8, batch_size=16, warmup=2, pairs=64, width=48, depth=1, text_width=48, text_depth=1,
                  extra="none,siam", log_every=2, save_every=4, out_dir="runs/clip_recipe_smoke"),
    "laptop": {},
    "gpu": dict(steps=6_000, batch_size=1024, lr=1e-3, wd=0.1, warmup=300, pairs=20_000, image_size=64, width=384, depth=12,
                heads=6, text_width=256, text_depth=6, text_heads=4, embed_dim=256, mlp_hidden=1024, extra_hidden=1024,
                extra="all", dtype="bfloat16", workers=14, out_dir="runs/clip_recipe_gpu"),
    # Flickr8k photographs, a small real run: data_prep/captions.py
    "flickr8k": dict(steps=600, batch_size=64, pairs=0, image_size=64, patch=8, width=192, depth=6, heads=3, text_width=128,
                     text_depth=3, text_heads=4, recipe="plain,rocket", extra="none", embed_dim=128, workers=0, warmup=60,
                     context=48, eval_every=200, out_dir="runs/clip_recipe_flickr8k"),
    # the paper's runs (32 epochs at batch 4096), values from the released commands
    "paper": _PAPER,
    "cc3m": {**_PAPER, **dict(steps=25_800, warmup=800, wd=0.5, text_depth=6, text_drop=0.2, loss_sum=False,
                              out_dir="runs/clip_recipe_cc3m")},
    "yfcc15m": {**_PAPER, **dict(steps=115_000, warmup=3_600, p_stop=0.9, text_drop=0.0, clean_text=True,
                                 out_dir="runs/clip_recipe_yfcc15m")},
    "open29m": {**_PAPER, **dict(steps=240_000, warmup=7_500, lr=2e-3, text_drop=0.0, clean_text=True, strong_size=192,
                                 captions="multi", out_dir="runs/clip_recipe_open29m")},
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    views: int = 0  # A, strong views of image and text beside the weak one
    first: str = "weak"  # the first image view is weak, or "either" weak or strong
    heads: str = "shared"  # projection of the strong views: the weak view's, own "linear" ones, or own "mlp" ones
    text: bool = False  # stop-word removal, and one edit of each strong caption
    smooth: bool = False  # label smoothing of the strong pairs
    drop: bool = False  # text dropout on the strong captions


RECIPES = {  # one change a line: the ablation ladder
    "plain": Recipe(),
    "strong": Recipe(first="either"),
    "views": Recipe(2),
    "heads": Recipe(2, heads="linear"),
    "mlp": Recipe(2, heads="mlp"),
    "text": Recipe(2, heads="mlp", text=True),
    "smooth": Recipe(2, heads="mlp", text=True, smooth=True),
    "rocket": Recipe(2, heads="mlp", text=True, smooth=True, drop=True),
}
EXTRAS = ("none", "siam", "byol", "bar", "swal")


# 2. THE IDEA (start reading here) ------------------------------------------------------------------------------------
def clip_loss(f_img, f_txt, scale, smoothing=0.0, gather=ddp.gather_rows):
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

    z: (z_img, z_txt); h: ([A strong images], [A strong captions]), each (B, D). A = 0 is CLIP. -> (loss, parts)"""
    weak = clip_loss(*z, s_z, 0.0, gather)
    A = len(h[0])
    if A == 0:
        return weak, {"weak": weak}
    pairs = itertools.product(*h)  # weak and strong are never contrasted with each other
    strong = sum(clip_loss(a, b, s_h, smoothing, gather) for a, b in pairs) / A**2
    return (weak + A * strong) / (1 + A), {"weak": weak, "strong": strong}


# The four baselines: one added loss between image and text. `pairs` lists the (image view, caption view) indices that are
# compared: weak with weak, and every strong image with every strong caption.
def view_pairs(A):
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

    Alternates column and row normalisation over the rows of all processes; rows end exact, columns nearly (K_rows / K)."""
    top = scores.max().float()
    if ddp.world_size() > 1:
        torch.distributed.all_reduce(top, op=torch.distributed.ReduceOp.MAX)
    Q = torch.exp((scores.float() - top) / eps)  # subtracting the maximum changes nothing but the range
    for _ in range(iters):
        Q = Q / ddp.all_sum(Q.sum(0)).clamp_min(1e-30)
        Q = Q / Q.sum(1, keepdim=True)
    return Q


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
    """The released code's gather (--gather no_grad): the key side gets no gradient from any process, this one included."""
    return ddp.gather_rows(x.detach()) if ddp.world_size() > 1 else x


# 3. MODULES: the heads; backbones come from common ---------------------------------------------------------------------
def mlp(*dims, last_bn=None, bias=True):
    """Linear BN ReLU ... Linear; last_bn None, or whether the closing batch norm has an affine part."""
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(dims)):
        hidden = i < len(dims) - 2
        layers += [nn.Linear(a, b, bias=bias), *([nn.BatchNorm1d(b), nn.ReLU()] if hidden else [])]
    return nn.Sequential(*layers, *([] if last_bn is None else [nn.BatchNorm1d(dims[-1], affine=last_bn)]))


def two(make, model):
    """One head for each tower, of the tower's width."""
    return nn.ModuleDict({"img": make(model.visual.out_dim), "txt": make(model.text.out_dim)})


class Residual(nn.Module):
    """BN ReLU conv (stride 2), BN ReLU conv, and a 1 x 1 shortcut."""

    def __init__(self, a, b):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(a), nn.Conv2d(a, b, 3, 2, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(b), nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(a, b, 1, 2, bias=False)

    def forward(self, x):
        x = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(x)))) + self.short(x)


class SmallResNet(nn.Module):
    """The laptop's backbone: three residual blocks of stride 2, average pool -> (B, 4 * width)."""

    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(Residual(width, width * 2), Residual(width * 2, width * 4), Residual(width * 4, width * 4))
        self.bn = nn.BatchNorm2d(width * 4)
        self.out_dim = width * 4

    def forward(self, x):
        return F.relu(self.bn(self.blocks(self.stem(x)))).mean((2, 3))


class Rocket(nn.Module):
    """Two towers, head pair z (linear) for the weak view, pair h for the strong views, and the added loss's heads."""

    def __init__(self, cfg: Config, recipe: Recipe, extra: str, vocab: int):
        super().__init__()
        self.recipe, self.drop = recipe, cfg.text_drop if recipe.drop else 0.0
        if cfg.backbone == "vit":
            self.visual = ViT(cfg.image_size, cfg.patch, cfg.width, cfg.depth, cfg.heads)
        elif cfg.backbone == "resnet50":
            from common.vision import torchvision

            self.visual = torchvision.models.resnet50()
            self.visual.out_dim, self.visual.fc = self.visual.fc.in_features, nn.Identity()
        elif cfg.backbone == "small":
            self.visual = SmallResNet(cfg.width)
        else:
            raise ValueError(f"--backbone {cfg.backbone} is unknown; choose small, vit or resnet50")
        self.text = TextTransformer(vocab, cfg.context, cfg.text_width, cfg.text_depth, cfg.text_heads)

        def linear(d):
            head = nn.Linear(d, cfg.embed_dim, bias=False)
            nn.init.normal_(head.weight, std=d**-0.5)
            return head

        self.z = two(linear, self)
        self.log_s_z = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if recipe.heads != "shared":
            make = linear if recipe.heads == "linear" else lambda d: mlp(d, cfg.mlp_hidden, cfg.mlp_hidden, cfg.embed_dim)
            self.h = two(make, self)
            self.log_s_h = nn.Parameter(torch.tensor(math.log(1 / 0.1)))
        if extra in ("siam", "byol"):
            hid, dim = cfg.extra_hidden, cfg.extra_dim
            self.v = two(lambda d: mlp(d, hid, dim, last_bn=False, bias=False), self)
            # nn.Linear's bias before a batch norm has no effect, so only the predictor's last layer would need one
            self.p = nn.ModuleDict({m: mlp(dim, hid, dim) for m in ("img", "txt")})
        elif extra == "bar":
            self.v = two(lambda d: mlp(d, cfg.extra_hidden, cfg.extra_hidden, cfg.extra_dim, last_bn=True), self)

    def scales(self):
        s_z = self.log_s_z.exp()
        return s_z, self.log_s_h.exp() if hasattr(self, "h") else s_z

    def forward(self, images, captions):
        """images, captions: lists of 1 + A views, weak first -> dict of lists over views: z, h (unit), v, p; and scales.

        One forward a view: batch norm sees one kind of view at a time, as in the released code."""
        out = {"scales": self.scales()}
        towers = {"img": [self.visual(x) for x in images],
                  "txt": [self.text(t, self.drop if i else 0.0) for i, t in enumerate(captions)]}  # fmt: skip
        for m, features in towers.items():
            strong = self.h[m] if hasattr(self, "h") else self.z[m]
            out[f"z_{m}"] = F.normalize(self.z[m](features[0]).float(), dim=-1)
            out[f"h_{m}"] = [F.normalize(strong(f).float(), dim=-1) for f in features[1:]]
            if hasattr(self, "v"):
                out[f"v_{m}"] = [self.v[m](f) for f in features]
            if hasattr(self, "p"):
                out[f"p_{m}"] = [self.p[m](v) for v in out[f"v_{m}"]]
        return out

    @torch.no_grad()
    def embed(self, tower: str, x, w: float):
        """Inference: {"z", "h", "both"} unit features of images ("img") or captions ("txt").

        both = [sqrt(w) z, sqrt(1 - w) h] is a unit vector whose dot product is w cos_z + (1 - w) cos_h."""
        f = self.visual(x) if tower == "img" else self.text(x)
        z = F.normalize(self.z[tower](f).float(), dim=-1)
        if not hasattr(self, "h"):
            return {"z": z}
        h = F.normalize(self.h[tower](f).float(), dim=-1)
        return {"z": z, "h": h, "both": torch.cat([math.sqrt(w) * z, math.sqrt(1 - w) * h], -1)}


# 4. DATA: (image, captions) -> 1 + A views of each -----------------------------------------------------------------------
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
    """Exactly one edit, drawn with the recipe's weights: synonym 0.4, swap 0.4, deletion 0.2 (EDA's definitions)."""
    words = text.split()
    if not words:
        return text
    u = rng.random()
    words = (synonym_edit(words, rng, synonyms) if u < 0.4 else swap_edit(words, rng) if u < 0.8 else delete_edit(words, rng))
    return " ".join(words) or text


class Views:
    """make(sample, rng) for data.Batches: 1 + A crops, 1 + A captions, and one row of colour parameters a crop."""

    def __init__(self, cfg: Config, recipe: Recipe, tok: Tokenizer, synonyms):
        self.cfg, self.recipe, self.tok, self.synonyms = cfg, recipe, tok, synonyms
        size = self.size = (cfg.image_size, cfg.strong_size or cfg.image_size)
        self.strong = augment.Colour(blur=(0.1 * size[1] / 224, 2.0 * size[1] / 224))  # sigma 0.1 to 2 at 224 px
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
            box = augment.crop_box(*img.size, (0.5, 1.0) if kind == "weak" else (0.08, 1.0), rng)
            crops.append(augment.resize_to(img, box, self.size[min(i, 1)]))
            rows.append(augment.draw_colour(self.weak if kind == "weak" else self.strong, rng))
            text = captions[rng.integers(len(captions))] if self.cfg.captions == "multi" else one
            text = self.tok.clean(text) if self.cfg.clean_text else text
            if self.recipe.text:
                text = drop_stop_words(text, rng, self.cfg.p_stop)
                text = edit_caption(text, rng, self.synonyms) if i else text
            texts.append(text)
        return crops, rows, texts

    def collate(self, items):
        """-> images [(B, S, S, 3) uint8], colour rows [(B, 12)], token ids [(B, L)]; lists over the 1 + A views."""
        crops, rows, texts = zip(*items)
        return ([torch.from_numpy(np.stack(v)) for v in zip(*crops)],
                [torch.from_numpy(np.stack(v)) for v in zip(*rows)],
                [trim(self.tok(list(v), self.cfg.context), 8) for v in zip(*texts)])  # fmt: skip


def to_device(batch, device, colour=True):
    """Colour and normalisation run here, on the device, for the whole batch."""
    images, rows, ids = batch
    images = [augment.to_float(x.to(device, non_blocking=True)) for x in images]
    images = [augment.apply_colour(x, r) for x, r in zip(images, rows)] if colour else images
    return [augment.normalise(x) for x in images], [t.to(device, non_blocking=True) for t in ids]


class Scenes:
    """Generated pairs in memory, with the interface of data.Shards."""

    def __init__(self, count, seed, size, objects=(1, 2), grid=1):
        self.scenes = [scenes.scene(i, seed, objects, grid=grid) for i in range(count)]
        self.sizes = [count]
        self.images = np.concatenate([scenes.render(self.scenes[i : i + 256], size) for i in range(0, count, 256)])

    def read(self, shard, row):
        s = self.scenes[row]
        t = s.things[0]
        labels = {"shape": scenes.SHAPES.index(t.shape), "colour": list(scenes.COLOURS).index(t.colour),
                  "texture": scenes.TEXTURES.index(t.texture)}  # fmt: skip
        labels["colour and shape"] = labels["colour"] * len(scenes.SHAPES) + labels["shape"]
        image = data.Image.fromarray(self.images[row])
        captions = [scenes.caption(s, v) for v in (0, 5 * row + 1, 5 * row + 2, 5 * row + 3, 5 * row + 4)]
        return {"key": str(row), "image": image, "captions": captions, "labels": labels}


def scene_tasks():
    """task -> for each class all its prompts: templates x words for what the class leaves open."""
    colours, shapes, forms = list(scenes.COLOURS), scenes.SHAPES, ("a {}", "a picture of a {}", "there is a {}")
    return {
        "shape": [[f.format(f"{c} {s}") for f in forms for c in colours] for s in shapes],
        "colour": [[f.format(f"{c} {s}") for f in forms for s in shapes] for c in colours],
        "texture": [[f.format(f"{t} {c} {s}") for f in forms for c in colours[::2] for s in shapes[::2]]
                    for t in ("", *scenes.TEXTURES[1:])],
        "colour and shape": [[f.format(f"{c} {s}") for f in forms] for c in colours for s in shapes],
    }  # fmt: skip


@dataclass
class Test:
    """An evaluation set: its images are classified zero-shot (tasks: name -> prompts of each class) or retrieved."""

    source: object
    tasks: dict
    retrieval: bool


def open_data(cfg: Config):
    """-> (training source, [Test], tokenizer, synonyms)"""
    synonyms = scenes.SYNONYMS
    if cfg.synonyms:
        rows = [line.split("\t") for line in Path(cfg.synonyms).read_text("utf-8").splitlines() if "\t" in line]
        synonyms = {w: tuple(s.split(",")) for w, s in rows}
    if cfg.data:
        source, tests = data.Shards(cfg.data, "train"), [Test(data.Shards(cfg.data, "test"), {}, True)]
        if not cfg.tokenizer:
            words = [c for s in range(len(source.sizes)) for r in range(source.sizes[s]) for c in captions_of(source, s, r)]
    else:
        source = Scenes(cfg.pairs, cfg.seed, cfg.image_size)
        tests = [Test(Scenes(1000, 1_000_003, cfg.image_size, (1, 1)), scene_tasks(), True)]
        words = [c for r in range(len(source.scenes)) for c in source.read(0, r)["captions"]]
    if cfg.eval_data:
        labelled = data.Shards(cfg.eval_data)
        names, forms = labelled.classes, labelled.manifest.get("templates") or ["a photo of a {}."]
        if not names:
            raise ValueError(f"--eval_data {cfg.eval_data}: manifest.json lists no classes; prepare it with data_prep/imagenet.py")
        # "king penguin, Aptenodytes patagonica": synonyms of a class are separated by commas, all are averaged
        prompts = [[f.format(n.strip()) for n in name.split(",") for f in forms] for name in names]
        tests.append(Test(labelled, {"classes": prompts}, False))
    tok = Tokenizer.from_clip(cfg.tokenizer) if cfg.tokenizer else Tokenizer.train(words, 4096)
    return source, tests, tok, synonyms


def captions_of(source, shard, row):
    try:
        return source.read(shard, row).get("captions") or []
    except data.BadSample:
        return []


# 5. EVALUATE -----------------------------------------------------------------------------------------------------------
def embed_texts(model, tok, texts, cfg, device):
    out = [model.embed("txt", trim(tok(texts[i : i + 512], cfg.context)).to(device), cfg.ensemble)
           for i in range(0, len(texts), 512)]  # fmt: skip
    return {k: torch.cat([o[k] for o in out]) for k in out[0]}


def class_weights(model, tok, prompts, cfg, device):
    """prompts: for each class a list -> {head: (C, D)}: every prompt normalised, averaged, normalised again."""
    unique = list(dict.fromkeys(p for names in prompts for p in names))
    where = {p: i for i, p in enumerate(unique)}
    f = embed_texts(model, tok, unique, cfg, device)
    mean = {k: torch.stack([v[[where[p] for p in dict.fromkeys(names)]].mean(0) for names in prompts]) for k, v in f.items()}
    out = {k: F.normalize(v, dim=-1) for k, v in mean.items() if k != "both"}
    if "h" in out:  # each head's classifier is normalised on its own, then joined as in embed()
        out["both"] = torch.cat([math.sqrt(cfg.ensemble) * out["z"], math.sqrt(1 - cfg.ensemble) * out["h"]], -1)
    return out


def embed_images(model, source, cfg, env):
    """All images of a source, split over processes -> ({head: (N, D)}, records without images), in the source's order."""

    def make(sample):
        img = sample.pop("image")
        return augment.resize_to(img, augment.centre_box(*img.size), cfg.image_size, data.Image.BILINEAR), sample

    def collate(items):
        return torch.from_numpy(np.stack([i for i, _ in items])) if items else None, [r for _, r in items]

    loader = data.in_order(source, make, collate, 256, slice(env.rank, None, env.world), cfg.workers)
    mine = []
    for x, records in loader:
        if records:
            x = augment.normalise(augment.to_float(x.to(env.device)))
            mine.append(({k: v.cpu() for k, v in model.embed("img", x, cfg.ensemble).items()}, records))
    if env.world > 1:
        parts = [None] * env.world
        torch.distributed.all_gather_object(parts, mine)
        mine = [batch for part in parts for batch in part]
    records = [r for _, batch in mine for r in batch]
    features = {k: torch.cat([f[k] for f, _ in mine]) for k in mine[0][0]}
    order = sorted(range(len(records)), key=lambda i: records[i]["key"])
    return {k: v[order] for k, v in features.items()}, [records[i] for i in order]


def evaluate(model, tests, tok, cfg, env):
    """Flat dict of percentages: zero-shot top-1 of every task, retrieval both ways, for the z and h heads and `both`.

    `zero_shot` and `retrieval` are the headline: means over the tasks and over R@1 both ways, of the fixed ensemble."""
    model.eval()
    out, zero_shot, retrieval = {}, [], []
    for test in tests:
        f, records = embed_images(model, test.source, cfg, env)
        for task, prompts in test.tasks.items():
            w = class_weights(model, tok, prompts, cfg, env.device)
            labels = torch.tensor([r["labels"][task] if "labels" in r else r["label"] for r in records])
            scores = {k: metrics.accuracy(f[k] @ w[k].cpu().T, labels) for k in f}
            out.update({f"{task.replace(' ', '_')}_{k}": v for k, v in scores.items()})
            zero_shot.append(list(scores.values())[-1])
        if test.retrieval:
            texts = [c for r in records for c in r["captions"]]
            owner = torch.tensor([i for i, r in enumerate(records) for _ in r["captions"]])
            # pictures with the same words are equally right: generated captions repeat
            same = {}
            for t, o in zip(texts, owner.tolist()):
                same.setdefault(t, set()).add(o)
            match = torch.zeros(len(texts), len(records), dtype=torch.bool)
            for i, t in enumerate(texts):
                match[i, list(same[t])] = True
            f_txt = {k: v.cpu() for k, v in embed_texts(model, tok, texts, cfg, env.device).items()}
            for k in f:
                to_image = metrics.retrieval_recall(f_txt[k], f[k], match)
                to_text = metrics.retrieval_recall(f[k], f_txt[k], match.T)
                out.update({f"text_to_image_r{n}_{k}": v for n, v in to_image.items()})
                out.update({f"image_to_text_r{n}_{k}": v for n, v in to_text.items()})
            retrieval += [to_image[1], to_text[1]]
    model.train()
    out.update({"zero_shot": float(np.mean(zero_shot))} if zero_shot else {})
    return {**out, **({"retrieval": float(np.mean(retrieval))} if retrieval else {})}


# 6. TRAIN --------------------------------------------------------------------------------------------------------------
def method_loss(model, teacher, images, captions, extra, recipe, cfg):
    """One batch of views -> (loss, parts). Everything the paper compares is in these lines."""
    out = model(images, captions)
    s_z, s_h = out["scales"]
    gather = ddp.gather_rows if cfg.gather == "grad" else gather_no_grad
    h = (out["h_img"], out["h_txt"])
    smoothing = cfg.smoothing if recipe.smooth and extra != "swal" else 0.0  # SwALIP is defined without smoothing
    loss, parts = rocket_loss((out["z_img"], out["z_txt"]), h, s_z, s_h, smoothing, gather)
    loss = 2 * loss if cfg.loss_sum else loss
    pairs = view_pairs(recipe.views)
    if extra in ("siam", "byol"):
        with torch.no_grad():
            target = teacher(images, captions) if extra == "byol" else out
        parts["extra"] = siam_loss(out["p_img"], target["v_img"], out["p_txt"], target["v_txt"], pairs)
    elif extra == "bar":
        parts["extra"] = barlow_loss(out["v_img"], out["v_txt"], pairs)
    elif extra == "swal":
        views = h if recipe.views else ([out["z_img"]], [out["z_txt"]])
        parts["extra"] = swap_loss(*views, s_h, gather)
    return loss + parts.get("extra", 0.0), parts


def train(cfg: Config) -> dict:
    """Trains one arm (a single --recipe and --extra) in cfg.out_dir and returns its metrics."""
    env = ddp.start(cfg.seed)
    recipe, extra, out = RECIPES[cfg.recipe], cfg.extra, Path(cfg.out_dir)
    source, tests, tok, synonyms = open_data(cfg)
    ddp.reseed(cfg.seed, 0, 0)  # the same initial weights on every process
    model = Rocket(cfg, recipe, extra, len(tok)).to(env.device)
    wrapped = ddp.wrap(torch.compile(model) if cfg.compile else model, env)
    teacher = copy.deepcopy(model).requires_grad_(False) if extra == "byol" else None
    ema = optim.Ema(model, cfg.ema_decay) if extra == "byol" else None
    opt = torch.optim.AdamW(optim.decay_groups(model, cfg.wd), cfg.lr, (0.9, 0.98), 1e-8, fused=True)
    parts = {"model": model, "opt": opt, **({"ema": ema, "teacher": teacher} if ema else {})}
    if cfg.resume:
        start, best = ckpt.resume(out / "last.pt", cfg, **parts)
    else:
        start, best = 0, {}
    views = Views(cfg, recipe, tok, synonyms)
    batches = data.Batches(source, views, views.collate, env.share(cfg.batch_size) * env.world // cfg.accum, env, cfg.seed,
                           start * cfg.accum, cfg.workers, cfg.max_bad)  # fmt: skip
    log = RunLog(cfg, env, f"{cfg.recipe} + {extra}" if extra != "none" else cfg.recipe, start)
    amp = torch.autocast(env.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")

    def save(done):
        if env.is_main:
            ckpt.save(out / "last.pt", done, cfg, best, **parts)

    for step in range(start, cfg.steps):
        ddp.reseed(cfg.seed, env.rank, step)
        optim.set_lr(opt, optim.warmup_cosine(step, cfg.steps, cfg.warmup, cfg.lr, 1e-6, 1e-5))
        for _ in range(cfg.accum):
            images, captions = to_device(next(batches), env.device)
            with amp:
                loss, terms = method_loss(wrapped, teacher, images, captions, extra, recipe, cfg)
            (loss / cfg.accum).backward()
        if cfg.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        opt.step()
        opt.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.startswith("log_s"):
                    p.clamp_(0, math.log(100))  # both temperatures, after every update
            if ema:  # only parameters are averaged; the teacher's batch norm statistics are its own
                ema.update(model)
                teacher.load_state_dict(ema.shadow)
        last = step + 1 == cfg.steps
        if (step + 1) % cfg.log_every == 0 or last:
            ddp.check_finite({"loss": float(loss)}, step)
            scales = dict(zip(("s_z", "s_h"), model.scales()))
            log.write(step, **ddp.mean({"loss": loss, **terms, **scales}), lr=opt.param_groups[0]["lr"], bad=batches.bad)
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and not last:
            scores = evaluate(model, tests, tok, cfg, env)
            log.write(step, **scores)
            key = next((k for k in scores if k.endswith("_z")), "")  # the released code's choice: zero-shot of the z head
            if env.is_main and scores[key] > best.get("score", -1.0):
                best = {"score": scores[key], "step": step + 1}
                ckpt.export(out / "best.safetensors", model.state_dict(), **best)
        log.tick(step)
        stop = ((step + 1) % cfg.log_every == 0 or env.world == 1) and ddp.interrupted()
        if (step + 1) % cfg.save_every == 0 or last or stop:
            save(step + 1)
        if stop:
            log.close()
            raise KeyboardInterrupt
    result = evaluate(model, tests, tok, cfg, env)
    log.write(cfg.steps, **result)
    if env.is_main:
        ckpt.export(out / "model.safetensors", model.state_dict(), recipe=cfg.recipe, extra=extra)
        tok.save(out / "merges.txt")
        pictures(model, source, tests[0].source, tok, cfg, env, views)
        plot.save(plot.lines(log.history("loss", "weak", "strong", "extra"), "training", y="loss"), out / "curves.png")
    log.finish(result)
    return result


def pictures(model, source, test, tok, cfg, env, views):
    """samples/views.png: what the recipe does to pairs. samples/retrieval.png: query, top five, the right ones framed."""
    rng = np.random.default_rng(0)
    cells, labels = [], []
    for row in range(4):
        sample = source.read(0, row)
        batch = views.collate([views(sample, rng)])
        images = [augment.apply_colour(augment.to_float(x), r) for x, r in zip(*batch[:2])]
        cells += [sample["image"], *[(x[0].permute(1, 2, 0) * 255).byte().numpy() for x in images]]
        labels += [sample["captions"][0], *[tok.decode(t[0]) for t in batch[2]]]
    names = ["original", "weak", *[f"strong {i + 1}" for i in range(views.recipe.views)]]
    title = "   |   ".join(names)
    plot.save(plot.grid(cells, len(names), labels, title=title, cell=190, rows_of_text=4), Path(cfg.out_dir, "samples/views.png"))
    model.eval()
    f, records = embed_images(model, test, cfg, replace_world(env))
    queries = records[:: max(1, len(records) // 6)][:6]
    f_txt = embed_texts(model, tok, [q["captions"][0] for q in queries], cfg, env.device)
    cells, labels, marks = [], [], []
    head = list(f)[-1]
    by_key = {}
    for i in range(test.sizes[0]):
        try:
            s = test.read(0, i)
        except data.BadSample:
            continue
        by_key[s["key"]] = s["image"]
    for q, t in zip(queries, f_txt[head].cpu()):
        cells, labels, marks = cells + [by_key[q["key"]]], labels + [q["captions"][0]], marks + [None]
        for i in (f[head] @ t).topk(5).indices.tolist():
            right = q["captions"][0] in records[i]["captions"]
            cells, labels = cells + [by_key[records[i]["key"]]], labels + [records[i]["captions"][0]]
            marks.append((46, 160, 67) if right else (200, 200, 200))
    title = "query (its own picture)   |   the five pictures nearest to its caption, the right one in green"
    plot.save(plot.grid(cells, 6, labels, marks, title, cell=150, rows_of_text=4), Path(cfg.out_dir, "samples/retrieval.png"))
    model.train()


def replace_world(env):
    return ddp.Env(0, 1, env.device)


def run(cfg: Config) -> dict:
    """All arms of --recipe x --extra side by side, each in its own folder; finished arms are kept. Prints the claim."""
    recipes = list(RECIPES) if cfg.recipe == "ladder" else cfg.recipe.split(",")
    extras = list(EXTRAS) if cfg.extra == "all" else cfg.extra.split(",")
    for name, known, field in [*((r, RECIPES, "recipe") for r in recipes), *((e, EXTRAS, "extra") for e in extras)]:
        if name not in known:
            raise ValueError(f"--{field} {name} is unknown; choose from {', '.join(known)}")
    for field, known in {"gather": ("grad", "no_grad"), "dtype": ("float32", "bfloat16"), "captions": ("single", "multi")}.items():
        if getattr(cfg, field) not in known:
            raise ValueError(f"--{field} {getattr(cfg, field)} is unknown; choose from {', '.join(known)}")
    out, result, scores = Path(cfg.out_dir), {}, {}
    for extra, recipe in itertools.product(extras, recipes):
        arm = replace(cfg, recipe=recipe, extra=extra, out_dir=str(out / f"{recipe}_{extra}"))
        done = Path(arm.out_dir, "metrics.json")
        saved = Path(arm.out_dir, "config.json")
        if cfg.resume and done.exists() and ckpt.same_config(json.loads(saved.read_text()), arm):
            scores[recipe, extra] = json.loads(done.read_text())
        else:
            scores[recipe, extra] = train(arm)
        result.update({f"{recipe}_{extra}_{k}": v for k, v in scores[recipe, extra].items()})
    report(cfg, recipes, extras, scores, result)
    return result


def report(cfg, recipes, extras, scores, result):
    pass


# 7. MAIN ---------------------------------------------------------------------------------------------------------------
if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
