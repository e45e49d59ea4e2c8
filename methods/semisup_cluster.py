"""Suave and Daino: semi-supervised learning in which cluster prototypes are class prototypes, and one loss serves both.

Paper      Fini, Astolfi, Alahari, Alameda-Pineda, Mairal, Nabi, Ricci: Semi-supervised learning made simple with
           self-supervised clustering. CVPR 2023, arXiv 2306.07483
Idea       SwAV and DINO train by cross-entropy between a softmax over prototypes and the assignment of another view of the
           picture. A classifier is trained by cross-entropy between a softmax over class weights and the label. So let the
           prototypes BE the class weights, as many as there are classes. A batch holds labelled and unlabelled pictures: a
           labelled row is told its label, an unlabelled one the assignment of another view; same loss, same head, same
           temperature, no confidence threshold, and no weight between two losses: a term counts as many rows as it has.
           Suave is this on SwAV (Sinkhorn assignments), Daino on DINO (a teacher, centred and sharpened).
Equations  Eq. 2 -> cross_entropy()     Eq. 5-6 -> sinkhorn()     Eq. 7 -> teacher_momentum()     Eq. 8 -> dino_targets()
           Eq. 9 -> dino_center_update()     swapped prediction -> unlabelled_loss()     weights -> frequency_weights()
Read first section 2, then method_loss() and train()
Symbols    B_u, B_l unlabelled and labelled pictures of a batch; V views, 2 of them global; C classes; z (B, D) unit embeddings,
           o = z P^T scores of the K prototypes P (K, D); q assignments; tau temperature, of all rows. Phases: A no labels,
           K = 4 C; B semi-supervised, a new head, K = C; C the same with weak augmentation (off by default)
Run        python methods/semisup_cluster.py [--preset smoke]                       (CPU, no data; 4.0 min on two quiet cores)
           torchrun --nproc_per_node=8 methods/semisup_cluster.py --preset paper --data data/imagenet --init SWAV.pth.tar
Data       generated, or shards by data_prep/cifar100.py, imagenet.py; --labels of each class keep their label
Expect     laptop, 8 seeds: 54.8 supervised only, 58.3 Suave (+3.5 +- 6.5), by the backbone probe 50.8, 61.1 (+10.4 +- 6.7).
           CIFAR-100, 25 labels a class, WRN-28-2, one seed: 39.1 supervised only, 44.8 Suave before its last tenth
Differs    from the paper: settings for CIFAR-100 are ours. Crops are cut on the device from a square; tests see whole pictures
           squeezed to a square. FixMatch has our views, network, budget, 2 to 3 unlabelled rows a labelled (there 7), no EMA.
           from the released code: a mixed view counts its rows (there 1, --mix_views); fine-tuning keeps the prototypes (there
           random ones, --reset_prototypes); the queue is whole on every process; all networks are in training mode at every
           step; LARS scales no biases; DINO's head has torch's initial weights; labelled crops have the area of unlabelled
           ones (there 0.08 to 1); all arms have Suave's compute. Left out: drop path, label lists, soft votes, PAWS.
Uses       common/augment.py ckpt.py cli.py data.py ddp.py log.py metrics.py optim.py plot.py resnet.py scenes.py
           vision.py vit.py   (copy these with this file)
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]  # so that python, torchrun and python -m all find common/

from common import augment, ckpt, cli, data, ddp, metrics, optim, plot, scenes
from common.log import RunLog, history, table, write_json
from common.resnet import ResNet, WideResNet
from common.vit import ViT, load_dino


# 1. CONFIG (presets stand in section 7) ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    # run: the same names in all ten files
    out_dir: str = "runs/semisup_cluster"  # one folder a run; each arm and phase gets a sub-folder
    seed: int = 0  # of weights, scenes, labelled subset, data order and augmentation
    steps: int = 1_000  # optimiser updates of each arm, over all its phases; ssl alone has more, for as many rows
    batch_size: int = 96  # GLOBAL number of unlabelled pictures B_u, divided by the number of processes
    accum: int = 1  # not possible here: micro-batches would shrink the batch that Sinkhorn balances
    lr: float = 4e-3  # peak
    lr_end: float = 1e-5  # in the end, by a cosine
    wd: float = 1e-4  # weight decay
    wd_end: float = 0.0  # weight decay in the end, by a cosine; 0 = constant; DINO: 0.4
    warmup: int = 30  # updates of linear warm-up, of every phase, at most a quarter of it
    grad_clip: float = 0.0  # largest gradient norm OF EACH PARAMETER, 0 = off; DINO: 3
    ema_decay: float = 0.9  # of Daino's teacher at the start, rising to 1; Daino: 0.99, for many more updates
    dtype: str = "float32"  # float32, or bfloat16 autocast (assignments and losses stay in float32)
    compile: bool = False  # torch.compile the model
    data: str = ""  # folder of labelled shards; "" = generated scenes
    workers: int = 0  # loader processes of each rank
    log_every: int = 10  # updates between lines of log.jsonl
    eval_every: int = 0  # updates between evaluations; 0 = at the end only
    save_every: int = 100  # updates between checkpoints
    resume: bool = True  # continue from last.pt, exactly; --no-resume starts again
    max_bad: float = 0.01  # share of damaged samples at which the run stops
    # the method
    method: str = "sup,ssl+ft,suave"  # comma list of ARMS (also ssl, fixmatch, daino), each with every number of labels
    labels: str = "2"  # comma list: labelled pictures of each class
    pretrain: float = 0.7  # share of the updates in phase A, self-supervised; 0 with --init of a whole pre-training
    finetune: float = 0.0  # share of the updates in phase C: the same loss, weak augmentation, a tenth of --lr
    stage: str = "all"  # all phases of an arm, or one of them: ssl, semi, finetune
    init: str = ""  # backbone to start from: model.safetensors, or SwAV's, DINO's or torchvision's file
    ratio: int = 2  # B_u : B_l
    tau: float = 0.1  # student temperature, of labelled and unlabelled rows
    eps: float = 0.02  # Sinkhorn's entropy; the paper: 0.05, for many more updates. Equal columns assume balanced classes!
    queue: int = 0  # features of past batches that Sinkhorn also balances: the paper's cure for B_u < 4 C; ImageNet: 3840
    tau_t: float = 0.04  # Daino: teacher temperature in the end; ImageNet: 0.07
    tau_t_epochs: int = 0  # Daino: epochs of its linear warm-up from 0.04; ImageNet: 10
    ema_ssl: float = 0.98  # Daino: ema_decay of phase A, slower; DINO: 0.996
    freeze: int = 0  # updates at the start in which the prototypes are held fixed
    norm_last_layer: bool = False  # Daino: prototypes of fixed length 1
    ssl_prototypes: int = 0  # of phase A; 0 = four a class
    reset_prototypes: bool = False  # phase C starts with new prototypes (the released code does)
    smoothing: float = 0.01  # label smoothing
    mix: bool = True  # MixUp and CutMix, of labelled rows and (Suave) of the two global views; not in phase A
    mix_views: bool = False  # a mixed view counts as one row of each process (the released code), not as B_u
    optimiser: str = "adamw"  # adamw or lars
    # data and model
    images: int = 1_800  # generated training pictures
    image_size: int = 24  # pixels of a global view
    local_size: int = 16  # pixels of a local view
    local_crops: int = 0  # ImageNet: 8; a short run learns more from more pictures
    global_scale: str = "0.5,1"  # area of a global view; Suave 0.14,1, Daino 0.25,1: too little of a tiny picture
    local_scale: str = "0.2,0.5"  # area of a local view; Suave 0.05,0.14
    canvas: int = 0  # pixels of the squares that views are cut from; 0 = image_size; ImageNet: 320
    memory_gb: float = 8.0  # a data set below this size is kept on the device
    backbone: str = "small"  # small or wide (common/resnet.py), resnet18 or resnet50 (torchvision), or vit
    width: int = 16  # small, vit; of wide the factor: 8 for WRN-28-8
    depth: int = 6  # vit; wide: 28
    heads: int = 6  # vit
    patch: int = 8  # vit: pixels
    head: str = "swav"  # projector: swav, two layers with batch norm, or dino, three with GELU and without
    hidden: int = 128  # of the projector; ImageNet: 2048
    embed_dim: int = 64  # of the projector; Suave 128, Daino 256


# 2. THE IDEA (start reading here) ------------------------------------------------------------------------------------
def cross_entropy(scores, target, tau):
    """Eq. 2: l(s, y) = -sum_k y_k log s_k, s = softmax(o / tau); the same for labels and assignments. scores, target (B, C)."""
    return -(target * F.log_softmax(scores.float() / tau, 1)).sum(1).mean()


def unlabelled_loss(scores, targets, tau):
    """Swapped prediction: every view predicts the assignments of the other global views, never of itself.

    scores: V tensors (B, C), global views first; targets: the assignments (B, C) of the global views."""
    pairs = [(i, v) for i in range(len(targets)) for v in range(len(scores)) if v != i]
    return sum(cross_entropy(scores[v], targets[i].detach(), tau) for i, v in pairs) / len(pairs)


def smooth(target, amount):
    """Label smoothing of hard or mixed targets (B, C)."""
    return (1 - amount) * target + amount / target.shape[1]


def frequency_weights(unlabelled, labelled, mixed, clean):
    """No lambda: a term weighs the share of the step's rows that it has. -> weights of L_u, L_l, L_mix and of the probes."""
    total = unlabelled + labelled + mixed
    return unlabelled / total, labelled / total, mixed / total, clean / total


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


class Queue(nn.Module):
    """Unit features of past batches, newest first, one row of the buffer a global view: with many classes a batch is too small
    to be balanced alone. Every process keeps all of it and takes its part into Sinkhorn."""

    def __init__(self, views, length, dim):
        super().__init__()
        self.register_buffer("z", torch.zeros(views, length, dim))

    def targets(self, view, z, prototypes, eps, full=True):
        """Assignments (B, K) of z (B, D), balanced together with the queue, if full, scored by the prototypes of today."""
        scores = z @ prototypes.T
        if full and self.z.shape[1]:
            mine = self.z[view].chunk(ddp.world_size())[ddp.rank()]
            scores = torch.cat([mine @ prototypes.T, scores])
        return sinkhorn(scores, eps)[-len(z) :]

    @torch.no_grad()
    def push(self, view, z):
        if length := self.z.shape[1]:
            self.z[view] = torch.cat([ddp.gather_rows(z.detach()), self.z[view]])[:length]


@torch.no_grad()
def dino_targets(teacher_scores, center, tau_t):
    """Eq. 8: softmax((o - c) / tau_t). The centre keeps one prototype from winning all rows, the low temperature keeps the
    targets from becoming uniform."""
    return F.softmax((teacher_scores.float() - center) / tau_t, 1)


@torch.no_grad()
def dino_center_update(center, teacher_scores, momentum=0.9):
    """Eq. 9: c <- mu c + (1 - mu) mean of the teacher's rows of both global views and of all processes. center (1, C)."""
    mean = ddp.all_sum(teacher_scores.float().sum(0, keepdim=True)) / (len(teacher_scores) * ddp.world_size())
    return momentum * center + (1 - momentum) * mean


def teacher_momentum(step, steps, start):
    """m of Eq. 7, phi <- m phi + (1 - m) theta: a cosine from start towards 1, never quite there."""
    return 1 + 0.5 * (start - 1) * (1 + math.cos(math.pi * step / steps))


def teacher_temperature(epoch, end, epochs, start=0.04):
    """Linear over `epochs` values from start to end, by whole epochs; then constant."""
    return end if epoch >= epochs else start + (end - start) * epoch / max(1, epochs - 1)


def schedule(step, steps, warmup, peak, end):
    """SwAV's and DINO's: linear from 0 over `warmup` updates, the last of which has the peak, then a cosine from the peak."""
    if step < warmup:
        return peak * step / max(1, warmup - 1)
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def partners(x):
    """Row i of the global batch meets row B - 1 - i: whole batches are turned, so that any number of processes mixes alike."""
    return ddp.gather_rows(x).flip(0).chunk(ddp.world_size())[ddp.rank()]


def mix(x1, x2, u):
    """MixUp or CutMix, one draw a batch: u, four uniform numbers -> (mixed (B, 3, H, W), lam). Row i of x1 meets
    partners(x2)[i]; lam ~ Beta(1, 1) is the share of x1, in CutMix recomputed from the box after clipping at the border."""
    kind, lam, cy, cx = (float(v) for v in u)
    partner, (H, W) = partners(x2), x1.shape[2:]
    if kind >= 0.5:
        return lam * x1 + (1 - lam) * partner, lam
    half = math.sqrt(1 - lam) / 2
    top, bottom = (int(min(max((cy + s * half) * H, 0), H)) for s in (-1, 1))
    left, right = (int(min(max((cx + s * half) * W, 0), W)) for s in (-1, 1))
    mixed = x1.clone()
    mixed[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (H * W)


def mix_targets(q1, q2, lam):
    return lam * q1 + (1 - lam) * partners(q2)


def fixmatch_loss(weak, strong, tau, threshold=0.95):
    """The baseline's unlabelled term: the guess on a weak view, where it is confident, is the label of the strong view."""
    p, guess = F.softmax(weak.detach().float() / tau, 1).max(1)
    return (F.cross_entropy(strong.float() / tau, guess, reduction="none") * (p >= threshold)).mean()


# 3. MODULES: projector, prototypes and probes; backbones come from common -------------------------------------------------
def make_body(cfg: Config) -> nn.Module:
    if cfg.backbone == "small":
        return ResNet(cfg.width)
    if cfg.backbone == "wide":
        return WideResNet(cfg.depth, cfg.width)
    if cfg.backbone == "vit":
        body = ViT(cfg.image_size, cfg.patch, cfg.width, cfg.depth, cfg.heads)
        body.pos_rule = "offset"  # DINO's resizing of positions, for local views
        return body
    from common.vision import torchvision

    body = getattr(torchvision.models, cfg.backbone)()
    body.out_dim, body.fc = body.fc.in_features, nn.Identity()
    return body


class Net(nn.Module):
    """Backbone, projector, prototypes = class weights; and linear probes on detached features at three depths."""

    def __init__(self, cfg: Config, prototypes: int, classes: int):
        super().__init__()
        self.body = make_body(cfg)
        dims = [self.body.out_dim, cfg.hidden, cfg.embed_dim]
        if cfg.head == "swav":
            self.hidden = nn.Sequential(nn.Linear(dims[0], cfg.hidden), nn.BatchNorm1d(cfg.hidden), nn.ReLU())
        else:
            self.hidden = nn.Sequential(nn.Linear(dims[0], cfg.hidden), nn.GELU(), nn.Linear(cfg.hidden, cfg.hidden), nn.GELU())
        self.out = nn.Linear(cfg.hidden, cfg.embed_dim)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, cfg.embed_dim), dim=1))
        self.length = None  # Suave: unit rows. Daino: weight norm, the length g of a prototype is trained, unless frozen at 1
        if cfg.method == "daino":
            self.length = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not cfg.norm_last_layer)
        self.probes = nn.ModuleList(nn.Linear(d, classes) for d in dims) if classes else None

    def P(self):
        return self.prototypes if self.length is None else self.length * F.normalize(self.prototypes, dim=1)

    @torch.no_grad()
    def normalise_prototypes(self):
        """Suave: in place, before every forward."""
        if self.length is None:
            self.prototypes.copy_(F.normalize(self.prototypes, dim=1))

    def features(self, views):
        """views: tensors (B_i, 3, S_i, S_i), one for each resolution: a forward of the backbone for each, one of the head for
        all -> backbone, hidden and output features of all rows."""
        h = torch.cat([self.body(x) for x in views])
        hidden = self.hidden(h)
        return h, hidden, self.out(hidden)

    def forward(self, views, clean=0):
        """-> scores (B, K), z (B, D), and the probes' logits (clean, C) of the first `clean` rows; in float32."""
        f = [x.float() for x in self.features(views)]
        with torch.autocast(f[0].device.type, enabled=False):
            z = F.normalize(f[2], dim=1)
            return z @ self.P().T, z, [probe(x[:clean].detach()) for probe, x in zip(self.probes or (), f)]


def load_init(net, path, cfg):
    """Weights to start from. A file of this script brings the backbone, in phase C also projector, prototypes and probes; those
    of SwAV, DINO and torchvision bring the backbone."""
    try:
        state = load_file(path) if path.endswith(".safetensors") else {}
        ours = any(k.startswith("body.") for k in state)
        if not ours and cfg.backbone == "vit":
            dino = load_dino(path, "student")
            state = {f"body.{k}": v for k, v in dino.state_dict().items()}
            if dino.blocks[0].attn.heads != cfg.heads or state.keys() - net.state_dict().keys():
                raise ValueError(f"it has {dino.blocks[0].attn.heads} heads, or parts that this ViT lacks")
        elif not ours:
            state = state or torch.load(path, map_location="cpu", weights_only=True)
            state = {f"body.{k.removeprefix('module.')}": v for k, v in state.get("state_dict", state).items()}
        keep = ("body.",) if cfg.stage != "finetune" else ("body.", "hidden.", "out.", "probes.", "prototypes", "length")
        wanted = {k for k in net.state_dict() if k.startswith(keep) and not k.endswith("num_batches_tracked")}
        if cfg.reset_prototypes:
            wanted -= {"prototypes", "length"}
        missing = sorted(wanted - state.keys())
        if missing:
            raise ValueError(f"it lacks {', '.join(missing[:3])}")
        net.load_state_dict({**net.state_dict(), **{k: state[k] for k in wanted}})
    except Exception as error:
        raise ValueError(f"--init {path} does not fit this network ({' '.join(str(error).split())[:300]})") from error


# 4. DATA -----------------------------------------------------------------------------------------------------------------
@dataclass
class World:
    """Pictures as data.load() gives them."""

    train: object  # all training pictures: the unlabelled set
    test: object
    classes: list
    labelled: object  # --labels pictures of each class; None in phase A


def scene_set(count, seed, size, part):
    """One plain object; its shape is the class. Colour, size and the background's tone vary independently of it. part: train or
    test, which share no object; of the train part there are 324 different pictures."""
    world = [scenes.scene(i, seed, (1, 1), grid=1, part=part) for i in range(count)]
    world = [replace(s, pattern="plain", things=(replace(s.things[0], texture="solid"),)) for s in world]
    images = scenes.render(world, size)
    return {"row": torch.arange(count), "side": torch.full((count, 2), size),
            "image": torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            "label": torch.tensor([scenes.SHAPES.index(s.things[0].shape) for s in world])}  # fmt: skip


def canvas(cfg):
    """Pixels of the squares that views are cut from."""
    return cfg.canvas or cfg.image_size


def open_world(cfg: Config, env) -> World:
    n = int(cfg.labels)
    if not cfg.data:
        train, test = (scene_set(count, 2 * cfg.seed + i, canvas(cfg), part)
                       for i, (count, part) in enumerate(((cfg.images, "train"), (2_000, "test"))))  # fmt: skip
        train, test = ({k: v.to(env.device) for k, v in part.items()} for part in (train, test))
        if len(train["label"].unique()) < len(scenes.SHAPES):
            raise ValueError(f"--images {cfg.images} are too few to show all {len(scenes.SHAPES)} classes")
        rows = data.pick(train["label"].cpu(), n, cfg.seed)
        return World(train, test, list(scenes.SHAPES), {k: v[rows] for k, v in train.items()})
    source, other, records, classes, _ = data.open_labelled(cfg.data, 0, cfg.seed, all_of_them=False)
    if not classes:
        raise ValueError(f"{cfg.data} has no labels; prepare labelled pictures with data_prep/")
    options = dict(size=canvas(cfg), env=env, gb=cfg.memory_gb, workers=cfg.workers, max_bad=cfg.max_bad)
    labels = [r.get("label", -1) for r in records]
    few = None if cfg.stage == "ssl" else data.load(source, data.pick(labels, n, cfg.seed), **options)
    if isinstance(few, dict) and len(few["label"]) < (1 - cfg.max_bad) * n * len(classes):  # would be another experiment
        raise ValueError(f"{cfg.data}: {n * len(classes) - len(few['label'])} of the {n * len(classes)} labelled pictures are "
                         f"damaged, more than --max_bad {cfg.max_bad}; prepare them again")  # fmt: skip
    train = data.load(source, np.arange(len(source)), **options)
    return World(train, data.load(other, np.arange(len(other)), **options), classes, few)


def colours(cfg: Config):
    """Colour of the views: unlabelled global 1, global 2 and local ones, labelled ones, and FixMatch's weak ones."""
    weak, scale = augment.Colour(jitter_p=0, grey_p=0, blur_p=0), cfg.image_size / 224
    if cfg.stage == "finetune":
        light = augment.Colour(jitter=(0.1, 0.1, 0.1, 0.0), grey_p=0, blur_p=0)
        return weak, weak, weak, light, weak
    labelled, blur = augment.Colour(blur_p=0), (0.1 * scale, 2.0 * scale)  # SwAV's sigma is 0.1 to 2 at 224 pixels
    if cfg.method == "daino":
        one, two, local = (augment.Colour((0.4, 0.4, 0.2, 0.1), blur=blur, blur_p=p, solarise_p=s)
                           for p, s in ((1.0, 0.0), (0.1, 0.2), (0.5, 0.0)))  # fmt: skip
        return one, two, local, labelled, weak
    strong = augment.Colour((0.8, 0.8, 0.8, 0.2), blur=blur)
    return strong, strong, strong, labelled, weak


def bounds(text):
    low, high = (float(v) for v in text.split(","))
    return low, high


def phase_seed(cfg):
    """Each phase has its own order of pictures and its own views, or phase B would see phase A's once more."""
    return 3 * cfg.seed + ("ssl", "semi", "finetune").index(cfg.stage)


def make_views(batch, kinds, cfg, env, number):
    """Views of a batch of this process; kinds: (pixels, area, colour) each; number: of the draw. All random numbers are drawn
    for the global batch -> list of normalised (B, 3, S, S)."""
    n, x, sides = len(batch["label"]), batch["image"].to(env.device), batch["side"].to(env.device)
    g = torch.Generator(env.device).manual_seed(phase_seed(cfg) * 1_000_003 + number)
    u = torch.rand(len(kinds), n * env.world, augment.NUMBERS, generator=g, device=env.device)[:, env.rank * n :][:, :n]
    return [augment.normalise(augment.view(x, sides, v, size, area, c)) for v, (size, area, c) in zip(u, kinds)]


def budget(cfg: Config) -> float:
    """Rows of the full size that an average update of Suave sees, over phases A and B; baselines are given as many."""
    B, labelled = cfg.batch_size, cfg.batch_size // cfg.ratio
    views = 2 * B + cfg.local_crops * B * (cfg.local_size / cfg.image_size) ** 2
    return views + (1 - cfg.pretrain) * (2 * labelled + B if cfg.mix else labelled)


def batch_sizes(cfg: Config) -> tuple[int, int]:
    """Unlabelled and labelled pictures of an update (global), such that every method sees about as many pixels."""
    labelled, unit = cfg.batch_size // cfg.ratio, 8  # the same for any number of processes
    if cfg.method == "sup":
        return 0, max(unit, int(budget(cfg) / (2 if cfg.mix else 1)) // unit * unit)
    if cfg.method == "fixmatch":
        return max(unit, int((budget(cfg) - labelled) / 2) // unit * unit), labelled
    return cfg.batch_size, 0 if cfg.stage == "ssl" else labelled


# 5. EVALUATE -------------------------------------------------------------------------------------------------------------
HEADS = ("prototypes", "backbone", "hidden", "output")


@torch.no_grad()
def embed(net, pictures, cfg, env):
    """-> backbone, hidden and output features, scores, labels of whole pictures, on the CPU; divided over the processes."""
    out, box = [], torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=env.device)
    for p in data.parts_of(pictures, canvas(cfg), env.rank, env.world, cfg.workers):
        x = augment.cut(p["image"].to(env.device), box.expand(len(p["row"]), 4), cfg.image_size) / 255
        f = [v.float() for v in net.features([augment.normalise(x)])]
        out.append([v.cpu() for v in (*f, F.normalize(f[2], dim=1) @ net.P().T, p["label"], p["row"])])
    out = ddp.gather_lists(out)
    if isinstance(pictures, data.Subset):
        data.report_damaged(pictures, [r for *_, rows in out for r in rows.tolist()], cfg.max_bad, env)
    parts = [torch.cat(v) for v in zip(*out)]
    order = parts[-1].argsort()
    return [v[order] for v in parts[:-1]]


@torch.no_grad()
def evaluate(net, world, cfg, env) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """Top-1 of every head on the test set, prototypes and the online probes on backbone, hidden layer and output (phase A has
    neither labels nor probes) -> (flat dict, scores of the prototypes, labels)."""
    net.eval()
    net.normalise_prototypes()
    *f, scores, y = embed(net, world.test, cfg, env)
    net.train()
    logits = [scores, *[probe(x.to(env.device)).cpu() for probe, x in zip(net.probes or (), f)]]
    return {name: metrics.accuracy(v, y) for name, v in zip(HEADS, logits) if net.probes}, scores, y


def probe_offline(cfg: Config) -> dict[str, float]:
    """Of a finished phase A: logistic regression on frozen features of the labelled pictures, whole and clean; the other arms'
    probes learn online, on augmented views."""
    env = ddp.start(cfg.seed)
    world = open_world(replace(cfg, stage="semi"), env)  # with labels
    net = Net(cfg, cfg.ssl_prototypes or 4 * len(world.classes), 0).to(env.device)
    load_init(net, str(Path(cfg.out_dir, "model.safetensors")), replace(cfg, stage="finetune"))
    net.eval()
    train, test = ([v.to(env.device) for v in embed(net, p, cfg, env)] for p in (world.labelled, world.test))
    return {name: metrics.accuracy(metrics.linear_probe(train[i], train[-1], 1e-2)(test[i]), test[-1])
            for i, name in enumerate(HEADS[1:])}  # fmt: skip


# 6. TRAIN ----------------------------------------------------------------------------------------------------------------
def make_rows(unlabelled, labelled, cfg, env, step):
    """What the network sees in an update -> {name: (B, 3, S, S)}, rows of the full size first; {name: share of the first
    partner} where rows were mixed."""
    one, two, local, lab, weak = colours(cfg)
    S, area, near, fixmatch = cfg.image_size, bounds(cfg.global_scale), (0.8, 1.0), cfg.method == "fixmatch"
    u = torch.rand(2, 4, generator=torch.Generator().manual_seed(phase_seed(cfg) * 1_000_003 + 3 * step + 2)).tolist()
    rows, lam = {}, {}
    if labelled:
        kind = (S, near, weak) if fixmatch else (S, area, lab)
        (x,) = make_views(labelled, [kind], cfg, env, 3 * step)
        rows["labelled"] = x
        if cfg.mix and not fixmatch:  # mixed rows are added to the clean ones
            rows["labelled mixed"], lam["labelled"] = mix(x, x, u[0])
    if unlabelled and fixmatch:
        rows["weak"], rows["strong"] = make_views(unlabelled, [(S, near, weak), (S, area, one)], cfg, env, 3 * step + 1)
    elif unlabelled:
        kinds = [(S, area, one), (S, area, two)]
        if cfg.stage != "finetune":
            kinds += [(cfg.local_size, bounds(cfg.local_scale), local)] * cfg.local_crops
        x1, x2, *small = make_views(unlabelled, kinds, cfg, env, 3 * step + 1)
        rows |= {"view 1": x1, "view 2": x2}
        if cfg.mix and cfg.method == "suave" and cfg.stage != "ssl":  # one more view; it gets no assignment of its own
            rows["mixed"], lam["unlabelled"] = mix(x1, x2, u[1])
        rows |= {f"view {i}": x for i, x in enumerate(small, 3)}
    return rows, lam


def method_loss(net, teacher, queue, unlabelled, labelled, cfg, env, step, tau_t):
    """One update's loss -> (loss, parts); queue and the teacher's centre move on. With L_l over labelled rows, clean and mixed,
    L_u over V views, L_m over mixed unlabelled rows (Suave, phase B; target: q mixed alike), L_p of the detached probes:

        L = (V B_u L_u + 2 B_l L_l + B_u L_m + B_l L_p) / (V B_u + 2 B_l + B_u)

    One forward of the backbone for each resolution, one of the head."""
    rows, lam = make_rows(unlabelled, labelled, cfg, env, step)
    clean, amp = len(rows.get("labelled", ())), torch.autocast(env.device.type, torch.bfloat16, cfg.dtype == "bfloat16")
    sizes = sorted({x.shape[-1] for x in rows.values()}, reverse=True)
    groups = [torch.cat([x for x in rows.values() if x.shape[-1] == size]) for size in sizes]
    with amp:
        scores, z, probes = net([x.contiguous(memory_format=torch.channels_last) for x in groups], clean)
    o, z = (dict(zip(rows, v.split([len(x) for x in rows.values()]))) for v in (scores, z))
    parts, loss_l, labelled_rows = {}, 0.0, 0
    if clean:
        y = labelled["label"].to(env.device)
        target, scores_l = F.one_hot(y, scores.shape[1]).float(), o["labelled"]
        if "labelled" in lam:
            target = torch.cat([target, mix_targets(target, target, lam["labelled"])])
            scores_l = torch.cat([scores_l, o["labelled mixed"]])
        loss_l, labelled_rows = cross_entropy(scores_l, smooth(target, cfg.smoothing), cfg.tau), len(target)
        parts = {"labelled": loss_l, "probes": sum(F.cross_entropy(p, y) for p in probes)}
    if cfg.method == "sup":
        return loss_l + parts["probes"], parts
    if cfg.method == "fixmatch":
        loss_u = fixmatch_loss(o["weak"], o["strong"], cfg.tau)
        parts |= {"unlabelled": loss_u, **watch(o["weak"], o["weak"], unlabelled["label"], cfg)}
        return loss_l + loss_u + parts["probes"], parts

    if cfg.method == "suave":
        P, first = ddp.raw(net).P().detach(), [z["view 1"].detach(), z["view 2"].detach()]
        full = step * len(first[0]) * env.world >= queue.z.shape[1]
        q = [queue.targets(i, f, P, cfg.eps, full) for i, f in enumerate(first)]
        for i, f in enumerate(first):
            queue.push(i, f)
    else:
        with torch.no_grad(), amp:
            above = teacher([torch.cat([rows["view 1"], rows["view 2"]])])[0]
        q = list(dino_targets(above, teacher.center, tau_t).chunk(2))  # with the OLD centre
        teacher.center.copy_(dino_center_update(teacher.center, above))
    views = [v for name, v in o.items() if name.startswith("view")]
    loss_u, loss_m, mixed = unlabelled_loss(views, q, cfg.tau), 0.0, 0
    if "mixed" in rows:
        loss_m = cross_entropy(o["mixed"], mix_targets(*q, lam["unlabelled"]), cfg.tau)
        mixed = 1 if cfg.mix_views else len(q[0])
    w_u, w_l, w_m, w_p = frequency_weights(sum(map(len, views)), labelled_rows, mixed, clean)
    loss = w_u * loss_u + w_l * loss_l + w_m * loss_m + w_p * parts.get("probes", 0.0)
    return loss, {**parts, "unlabelled": loss_u, "mixed": loss_m, **watch(q[0], o["view 1"], unlabelled["label"], cfg)}


@torch.no_grad()
def watch(q, scores, y, cfg):
    """Is it clustering? Of the network's own predictions softmax(scores / tau), since Sinkhorn balances assignments q (B, K)
    even of features that have collapsed: spread, entropy of the mean over ln K, 1 = all prototypes are used; doubt, mean
    entropy over ln K; largest, share of the largest cluster. pseudo: right pseudo-labels in percent, where there are labels."""
    p, ln_K, y = F.softmax(scores.float() / cfg.tau, 1), math.log(q.shape[1]), y.to(q.device)
    known, right = y >= 0, q.argmax(1) == y
    *sums, known, right = ddp.all_sum(torch.cat([p.mean(0), known.sum()[None], (known & right).sum()[None]]))
    mean, doubt = torch.stack(sums) / ddp.world_size(), torch.special.entr(p).sum(1).mean() / ln_K
    out = {"spread": torch.special.entr(mean).sum() / ln_K, "doubt": doubt, "largest": mean.max()}
    return out if cfg.stage == "ssl" else {**out, "pseudo": 100 * right / known.clamp(min=1)}


def train(cfg: Config) -> dict:
    """One phase of one arm in cfg.out_dir; method sup, fixmatch, suave or daino; stage ssl, semi or finetune."""
    env, out = ddp.start(cfg.seed), Path(cfg.out_dir)
    world = open_world(cfg, env)
    C, ssl = len(world.classes), cfg.stage == "ssl"
    B_u, B_l = batch_sizes(cfg)
    env.share(B_u, "the unlabelled rows of an update,")
    env.share(B_l, f"the labelled rows of an update of {cfg.method},")
    K = (cfg.ssl_prototypes or 4 * C) if ssl else C
    ddp.reseed(cfg.seed, 0, 0)  # the same initial weights on every process
    net = Net(cfg, K, 0 if ssl else C)
    if cfg.init:
        load_init(net, cfg.init, cfg)
    net = net.to(env.device, memory_format=torch.channels_last)
    wrapped = ddp.wrap(torch.compile(net) if cfg.compile else net, env)
    teacher = None
    if cfg.method == "daino":  # a copy with the wrapped model's batch norm
        teacher = copy.deepcopy(net).requires_grad_(False)
        teacher.register_buffer("center", torch.zeros(1, K, device=env.device))
    length = cfg.queue // max(1, B_u) * B_u  # whole batches
    if cfg.method == "suave" and cfg.queue and not length:
        raise ValueError(f"--queue {cfg.queue} is shorter than the {B_u} unlabelled pictures of a batch; 0 = none")
    if cfg.method == "suave" and B_u + length < K:
        raise ValueError(f"{K} prototypes cannot be balanced over {B_u + length} rows: raise --batch_size or --queue, or lower "
                         "--ssl_prototypes in phase A")  # fmt: skip
    queue = Queue(2, length, cfg.embed_dim).to(env.device)
    groups = optim.decay_groups(net, cfg.wd)  # biases and norms do not decay
    opt = optim.Lars(groups, cfg.lr) if cfg.optimiser == "lars" else torch.optim.AdamW(groups, cfg.lr, fused=True)
    state = {"net": net, "opt": opt, "queue": queue, **({"teacher": teacher} if teacher else {})}
    start, _ = ckpt.resume(out / "last.pt", cfg, **state)
    options = dict(size=canvas(cfg), env=env, start=start, workers=cfg.workers, max_bad=cfg.max_bad)
    seed = 2 * phase_seed(cfg)
    all_of = data.endless(world.train, batch_size=B_u, seed=seed, **options) if B_u else None
    few = data.endless(world.labelled, batch_size=B_l, seed=seed + 1, **options) if B_l else None
    total = len(world.train["label"]) if isinstance(world.train, dict) else sum(world.train.sizes)
    log = RunLog(cfg, env, f"{cfg.method} {cfg.stage}" + ("" if ssl else f", {cfg.labels} labels"), start)
    log.per_step, warned = B_u + B_l, False  # pictures an update, which differ by arm
    for step in range(start, cfg.steps):
        optim.set_lr(opt, schedule(step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr_end))
        if cfg.wd_end:
            opt.param_groups[0]["weight_decay"] = schedule(step, cfg.steps, 0, cfg.wd, cfg.wd_end)
        net.normalise_prototypes()
        epoch = step * B_u // total
        unlabelled, labelled = next(all_of) if B_u else None, next(few) if B_l else None
        tau_t = teacher_temperature(epoch, cfg.tau_t, cfg.tau_t_epochs)
        loss, parts = method_loss(wrapped, teacher, queue, unlabelled, labelled, cfg, env, step, tau_t)
        loss.backward()
        if cfg.grad_clip:
            for p in net.parameters():
                nn.utils.clip_grad_norm_(p, cfg.grad_clip)
        norm = nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
        if step < cfg.freeze:
            for p in (net.prototypes, net.length):
                if p is not None:
                    p.grad = None
        opt.step()
        opt.zero_grad(set_to_none=True)
        # Eq. 7: no gradient trains the teacher, and it makes targets only; the student is evaluated, exported and handed on
        if teacher:  # parameters only, batch norm statistics are the teacher's own
            m = teacher_momentum(step, cfg.steps, cfg.ema_ssl if ssl else cfg.ema_decay)
            with torch.no_grad():
                torch._foreach_lerp_(list(teacher.parameters()), list(net.parameters()), 1 - m)
        done, last = step + 1, step + 1 == cfg.steps
        due = done % cfg.log_every == 0 or last
        leave = ddp.interrupted(due)
        if due or leave or done % cfg.save_every == 0:
            ddp.check_finite({"loss": loss.item(), "grad_norm": norm.item()}, step)
        if due:
            line = ddp.mean({"loss": loss, **parts})
            log.write(step, **line, lr=opt.param_groups[0]["lr"], bad=sum(s.bad for s in (all_of, few) if s))
            flat = abs(line.get("unlabelled", 0.0) - math.log(K)) < 1e-3 and cfg.method in ("suave", "daino")
            if flat and not warned and step > cfg.warmup and env.is_main:
                warned = True
                print(f"\nwarning: the unlabelled loss sits at ln K = {math.log(K):.4f}, assignments or predictions are "
                      "uniform: lower --eps or --tau_t, freeze the prototypes longer (--freeze), take larger crops or fewer "
                      "local ones, or a smaller --lr", file=sys.stderr)  # fmt: skip
        if cfg.eval_every and done % cfg.eval_every == 0 and not last and not ssl:
            log.write(step, **evaluate(net, world, cfg, env)[0])
        log.tick(step)
        if env.is_main and (done % cfg.save_every == 0 or last or leave):
            ckpt.save(out / "last.pt", done, cfg, **state)
        if leave:
            log.close()
            raise KeyboardInterrupt
    result, scores, y = evaluate(net, world, cfg, env)
    log.write(cfg.steps - 1, **result)
    if env.is_main:
        ckpt.export(out / "model.safetensors", net.state_dict(), method=cfg.method, stage=cfg.stage, classes=world.classes)
        plot.save(plot.lines(history(log.dir, "loss", "labelled", "unlabelled"), log.name, y="loss"), out / "curves.png")
        if isinstance(world.test, dict):
            draw_clusters(scores, y, world, cfg, out / "samples" / "clusters.png")
    log.finish(result)
    return result


def draw_clusters(scores, y, world, cfg, path):
    """Test pictures nearest to each of nine prototypes; rows are prototypes."""
    rows = [k * scores.shape[1] // min(9, scores.shape[1]) for k in range(min(9, scores.shape[1]))]
    images = world.test["image"].cpu()
    best = [plot.distinct(images, order, 8) for order in scores[:, rows].T.argsort(1, descending=True)]
    width = min(map(len, best))
    flat, marks = [j for row in best for j in row[:width]], None
    if cfg.stage != "ssl":  # prototypes are classes
        marks = [plot.GREEN if y[j] == rows[i // width] else plot.FAINT for i, j in enumerate(flat)]
    title = "nearest to a prototype, one a row" + ("" if cfg.stage == "ssl" else "; its class in green")
    plot.save(plot.grid(list(images[flat].permute(0, 2, 3, 1).numpy()), width, None, marks, title, cell=80), path)


ARMS = {  # phases of each arm: (method, stage)
    "sup": [("sup", "semi")],
    "ssl": [("suave", "ssl")],
    "ssl+ft": [("suave", "ssl"), ("sup", "semi")],
    "fixmatch": [("fixmatch", "semi")],
    "suave": [("suave", "ssl"), ("suave", "semi"), ("suave", "finetune")],
    "daino": [("daino", "ssl"), ("daino", "semi"), ("daino", "finetune")],
}


def phases(arm: str, labels: str, cfg: Config) -> list[Config]:
    """The runs of an arm, each starting from the one before it. Phase A is shared by all numbers of labels."""
    chosen = [p for p in ARMS[arm] if cfg.stage in ("all", p[1])]
    share = {"ssl": cfg.pretrain, "finetune": cfg.finetune, "semi": 1 - cfg.pretrain - cfg.finetune}
    if len(chosen) == 1:
        share[chosen[0][1]] = 1.0
    elif arm == "ssl+ft":
        share["semi"] = 1 - cfg.pretrain
    if arm == "ssl" and cfg.stage == "all":  # phase A alone: as many rows in all, in more updates
        share["ssl"] = budget(cfg) / budget(replace(cfg, pretrain=1.0))
    out, init = [], "" if arm == "sup" and cfg.stage == "all" else cfg.init  # supervised ONLY
    for method, stage in chosen:
        steps = round(cfg.steps * share[stage])
        if not steps:
            continue
        name = f"ssl_{method}_{steps}" if stage == "ssl" else f"{arm.replace('+', '_')}_{labels}_{stage}"
        weak = 10 if stage == "finetune" and cfg.stage == "all" else 1  # phase C: a tenth of the learning rate
        # budget() reads `pretrain`: the fine-tuned arm gets phase B's rows an update, the others the average over A and B
        pretrain = 0.0 if cfg.stage != "all" or (arm, stage) == ("ssl+ft", "semi") else cfg.pretrain
        here = replace(cfg, method=method, stage=stage, labels="1" if stage == "ssl" else labels, steps=steps, init=init,
                       lr=cfg.lr / weak, lr_end=cfg.lr_end / weak, pretrain=pretrain, warmup=min(cfg.warmup, steps // 4),
                       out_dir=str(Path(cfg.out_dir, name)))  # fmt: skip
        out.append(here)
        init = str(Path(here.out_dir, "model.safetensors"))
    return out


def check(cfg: Config) -> None:
    """One sentence for what a user can get wrong."""
    cli.choose(cfg, "method", method=ARMS, stage=("all", "ssl", "semi", "finetune"), optimiser=("adamw", "lars"),
               dtype=("float32", "bfloat16"), backbone=("small", "wide", "resnet18", "resnet50", "vit"),
               head=("swav", "dino"))  # fmt: skip
    cli.within(cfg, "steps ratio images image_size local_size width hidden embed_dim", 1)
    cli.within(cfg, "freeze queue local_crops ssl_prototypes canvas wd_end lr_end", 0)
    cli.within(cfg, "pretrain finetune smoothing ema_ssl", 0, 1)
    if cfg.backbone == "small":
        cli.within(cfg, "width", 8)  # torch's channels-last convolutions of fewer channels damage memory on a CPU
    if cfg.accum != 1:
        raise ValueError("--accum must be 1: micro-batches would shrink the batch that Sinkhorn balances")
    if not all(v.isdecimal() and int(v) for v in cfg.labels.split(",")):
        raise ValueError(f"--labels {cfg.labels} must be a comma list of numbers of labelled pictures a class")
    if not cfg.tau > 0 or not cfg.eps > 0:
        raise ValueError(f"--tau {cfg.tau} and --eps {cfg.eps} must be above 0")
    if "daino" in cfg.method.split(",") and not 0 < cfg.tau_t < cfg.tau:
        raise ValueError(f"--tau_t {cfg.tau_t} must lie between 0 and --tau {cfg.tau}")
    if cfg.ssl_prototypes == 1:
        raise ValueError("--ssl_prototypes 1 is one cluster for everything; 0 = four a class")
    if cfg.local_crops and cfg.local_size > cfg.image_size:
        raise ValueError(f"--local_size {cfg.local_size} must not be above --image_size {cfg.image_size}")
    if cfg.batch_size < cfg.ratio:
        raise ValueError(f"--ratio {cfg.ratio} leaves a batch of {cfg.batch_size} no labelled picture")
    after = [arm for arm in cfg.method.split(",") if ARMS[arm][0][1] == "ssl"]  # arms that begin with phase A
    if not cfg.init and (cfg.stage == "finetune" or (cfg.stage == "semi" and after)):
        raise ValueError(f"--stage {cfg.stage} starts from an earlier phase: give its weights by --init")
    if cfg.pretrain + cfg.finetune > 1:
        raise ValueError("--pretrain and --finetune are shares of the updates: together 1 at most")
    for arm in cfg.method.split(","):
        plan = [p.stage for p in phases(arm, cfg.labels.split(",")[0], cfg)]
        if cfg.stage == "all" and arm != "ssl" and "semi" not in plan:
            raise ValueError(f"--pretrain {cfg.pretrain} and --finetune {cfg.finetune} of --steps {cfg.steps} leave no phase B "
                             f"to --method {arm}")  # fmt: skip
        if cfg.stage == "all" and arm == "ssl+ft" and "ssl" not in plan and not cfg.init:
            raise ValueError("--method ssl+ft needs a phase A (--pretrain) or the weights of one (--init)")
        if not plan:
            raise ValueError(
                f"--stage {cfg.stage} is no phase of --method {arm}; its phases: {', '.join(p for _, p in ARMS[arm])}"
            )
    for field in ("global_scale", "local_scale"):
        try:
            low, high = bounds(getattr(cfg, field))
        except ValueError:
            low, high = 0.0, 0.0
        if not 0 < low <= high <= 1:
            raise ValueError(f"--{field} {getattr(cfg, field)} must be two areas like 0.2,1")


def run(cfg: Config) -> dict:
    """All arms with every number of labels; finished phases are kept. Prints the claim."""
    check(cfg)
    ddp.start(cfg.seed)
    out, scores, trained = Path(cfg.out_dir), {}, {}
    for labels in cfg.labels.split(","):
        for arm in cfg.method.split(","):
            plan = phases(arm, labels, cfg)
            for here in plan:
                if here.out_dir not in trained:  # phase A is shared
                    trained[here.out_dir] = ckpt.once(train, here)
                result = trained[here.out_dir]
            if plan[-1].stage == "ssl":
                result = probe_offline(replace(plan[-1], labels=labels))
            scores[arm, labels] = result
    flat = {f"{a}_{n}_{k}": v for (a, n), s in scores.items() for k, v in s.items()}
    if ddp.rank() == 0:
        report(cfg, scores)
        write_json(out / "metrics.json", flat)
    return flat


def report(cfg, scores):
    """A table for each number of labels, with every head. The headline, fixed in advance: the prototypes, which are the
    classifier; for self-supervised features the probe on the backbone."""
    started = bool(cfg.init)  # of one stage every arm starts from the file, of all the supervised one from scratch
    names = {"sup": "fine-tuning" if started and cfg.stage != "all" else "supervised only", "ssl": "SwAV + linear probe",
             "ssl+ft": "SwAV + fine-tuning", "fixmatch": "FixMatch-style", "suave": "Suave", "daino": "Daino"}  # fmt: skip
    claims = (("sup", "suave", "Suave beats supervised only", "better"),
              ("sup", "daino", "Daino beats supervised only", "better"),
              ("ssl", "suave", "Suave beats SwAV + linear probe", "better"),
              ("ssl+ft", "suave", "Suave beats SwAV, then fine-tuning", "better"),
              ("fixmatch", "suave", "Suave beats FixMatch", "+14.5, +5.6, +4.8"))  # fmt: skip
    for n in cfg.labels.split(","):
        some = {a: s for (a, labels), s in scores.items() if labels == n}
        rows = [[names[a], *[s.get(h) for h in HEADS]] for a, s in some.items()]
        equal = "--init not counted" if started else "equal compute"
        print(f"\n{n} labels a class, {equal}: top-1 in percent\n" + table(rows, ["", *HEADS]))
        head = {a: s.get("prototypes", s.get("backbone")) for a, s in some.items()}
        rows = [[text, head[a], head[b], f"{head[b] - head[a]:+.1f}", paper] for a, b, text, paper in claims
                if {a, b} <= head.keys()]  # fmt: skip
        if rows and cfg.stage == "all":
            print("\n" + table(rows, ["claim", "baseline", "method", "difference", "the paper"]))
    print("\nthe paper, CIFAR-100 with 4 / 25 / 100 labels a class: FixMatch 50.1 / 71.4 / 76.8, Daino 61.1 / 75.2 / 79.2, "
          "Suave 64.6 / 77.0 / 81.6; ImageNet, Suave, 10 / 1 %: 75.0 / 66.2 by the probe on the hidden layer after phase C, "
          "73.4 / 64.1 after phase B")  # fmt: skip
    print(f"\npictures, curves and weights: {cfg.out_dir}")


# 7. MAIN -----------------------------------------------------------------------------------------------------------------
PRESETS = {
    "smoke": dict(steps=8, batch_size=16, warmup=2, images=120, width=8, hidden=32, embed_dim=16, log_every=2, save_every=2,
                  method="sup,ssl,fixmatch,suave,daino", local_crops=2, pretrain=0.5, ssl_prototypes=12,
                  out_dir="runs/semisup_cluster_smoke"),
    "laptop": {},
    # CIFAR-100 on a CPU: the small ResNet and few updates, for comparison at equal compute only: 8 minutes on two cores
    "cifar100_cpu": dict(steps=800, batch_size=64, lr=2e-3, warmup=40, labels="25", image_size=32, hidden=256,
                         ssl_prototypes=100, queue=192, global_scale="0.2,1", embed_dim=128, method="sup,suave", pretrain=0.5,
                         out_dir="runs/semisup_cluster_cifar100_cpu"),
    # CIFAR-100 with the network of the paper's Table 1, WRN-28-8, and its K = 100; lengths, rates and crops are ours; with
    # --compile a row would take 50 minutes of an H100 (80 ms an update in phase A, 125 in B; run in part only, RESULTS.md).
    # LARS, the paper's, was behind AdamW in a short phase A
    "gpu": dict(steps=30_000, batch_size=256, lr=2e-3, wd=1e-4, warmup=1_000, dtype="bfloat16", labels="4,25,100",
                method="sup,suave", pretrain=0.5, image_size=32, local_size=18, local_crops=2, ema_decay=0.99, ema_ssl=0.996,
                ssl_prototypes=100, global_scale="0.2,1", local_scale="0.08,0.5", backbone="wide", width=8, depth=28,
                hidden=2048, embed_dim=128, log_every=50, save_every=1_000, out_dir="runs/semisup_cluster_gpu"),
    # ImageNet, ResNet-50, values of the released scripts: phase B of Suave from an 800-epoch SwAV, 10 % of the labels
    "paper": dict(steps=500_000, batch_size=256, lr=0.4, lr_end=1e-3, wd=1e-6, warmup=25_000, dtype="bfloat16", workers=12,
                  log_every=100, save_every=5_000, method="suave", stage="semi", pretrain=0.0, labels="128", queue=3840,
                  ema_decay=0.99, ema_ssl=0.996, eps=0.05, image_size=224, local_size=96, local_crops=8, canvas=320,
                  global_scale="0.14,1", local_scale="0.05,0.14", backbone="resnet50", hidden=2048, embed_dim=128,
                  optimiser="lars", out_dir="runs/semisup_cluster_in1k"),
    # ImageNet, ViT-S/16, Daino's script: 60 epochs of 1,024 + 512 from DINO's student
    "paper_daino": dict(steps=75_000, batch_size=1_024, lr=9.6e-4, lr_end=1e-5, wd=0.04, wd_end=0.4, warmup=5_000,
                        workers=12, log_every=100, save_every=5_000, method="daino", stage="semi", pretrain=0.0, labels="128",
                        tau_t=0.07, tau_t_epochs=10, ema_decay=0.99, image_size=224, local_size=96, local_crops=8, canvas=320,
                        global_scale="0.25,1", local_scale="0.05,0.25", backbone="vit", width=384, depth=12, heads=6, patch=16,
                        head="dino", hidden=2048, embed_dim=256, out_dir="runs/semisup_cluster_in1k_daino"),
}  # fmt: skip

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
