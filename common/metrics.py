"""Evaluation numbers, each checked against a slow or published definition in tests/test_metrics.py.

    sets of pictures      frechet_distance, Moments (streaming), frechet_infinity, kernel_distance, cmmd, prdc, vendi,
                          inception_score; their features: inception_features(path), dino_input, clip_input
    pictures and texts    clip_score, ref_clip_score, retrieval_recall, caption_matches
    classifiers           accuracy, knn_accuracy, linear_probe

Statistics are taken in float64. A number belongs to its extractor, its resizing rule and its sample size: compare within one.
"""

from __future__ import annotations

import hashlib
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn


def frechet_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """|mean_x - mean_y|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)) of features (N, D) and (M, D), in float64.

    The trace of the root is the nuclear norm of Rx Ry^T for any Rx^T Rx = Sx, Ry^T Ry = Sy: no matrix root. R is Cholesky's
    factor of the covariance; where that is singular (few rows, dependent columns), the QR factor of the centred features."""
    _check_features(1, first=x, second=y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features {tuple(x.shape)} and {tuple(y.shape)} must have equal columns")
    means, roots = [], []
    for f in (x, y):
        f = f.to(torch.float64, copy=True)
        means.append(f.mean(0))
        f -= means[-1]
        R, singular = torch.linalg.cholesky_ex(_scatter(f), upper=True)
        R = torch.linalg.qr(f, mode="r").R if singular else R
        roots.append(R / (len(f) - 1) ** 0.5)
    return _frechet(means, roots)


def _scatter(f: torch.Tensor, block: int = 256) -> torch.Tensor:
    """f^T f (D, D): blocks on and right of the diagonal, the others by symmetry, which is half the work."""
    out = f.new_empty(f.shape[1], f.shape[1])
    for i in range(0, f.shape[1], block):
        part = f[:, i : i + block].T @ f[:, i:]
        out[i : i + block, i:], out[i:, i : i + block] = part, part.T
    return out


def _frechet(means, roots) -> float:
    gap, traces = (means[0] - means[1]).square().sum(), sum(R.square().sum() for R in roots)
    return (gap + traces - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()).clamp_min(0).item()


def knn_accuracy(f: torch.Tensor, y: torch.Tensor, f_test: torch.Tensor, y_test: torch.Tensor, k=20, tau=0.07) -> float:
    """Top-1 in percent of a vote of the k training features (N, D) of largest cosine, weighted by exp(cosine / tau)."""
    f, f_test, right = F.normalize(f.float(), dim=1), F.normalize(f_test.float(), dim=1), 0
    classes = int(y.max()) + 1
    for part, labels in zip(f_test.split(1024), y_test.split(1024)):
        cosine, near = (part @ f.T).topk(min(k, len(f)), 1)
        score = torch.zeros(len(part), classes, device=f.device).scatter_add_(1, y[near], ((cosine - 1) / tau).exp())
        right += (score.argmax(1) == labels).sum().item()
    return 100 * right / len(y_test)


def linear_probe(f: torch.Tensor, y: torch.Tensor, l2: float = 1e-3, iters: int = 100):
    """Logistic regression on frozen features (N, D) with labels (N,): L-BFGS on the whole set -> function: features -> logits.

    Features are standardised by the training set's statistics; l2 weighs half the squared weights."""
    mean, std = f.float().mean(0), f.float().std(0).clamp_min(1e-6)
    x, C = (f.float() - mean) / std, int(y.max()) + 1
    W = torch.zeros(C, x.shape[1], device=x.device, requires_grad=True)
    b = torch.zeros(C, device=x.device, requires_grad=True)
    opt = torch.optim.LBFGS([W, b], max_iter=iters, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(x @ W.T + b, y) + l2 / 2 * W.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        opt.step(closure)
    return lambda g: ((g.float() - mean) / std) @ W.detach().T + b.detach()


def retrieval_recall(f_query: torch.Tensor, f_item: torch.Tensor, match: torch.Tensor, ks=(1, 5, 10)) -> dict[int, float]:
    """Share of queries with a right item among the k nearest, in percent.

    f_query (Q, D), f_item (I, D): unit features; match (Q, I) bool: which items are right (several are allowed; none: never
    found). A right item's rank counts every wrong item that does not score less: ties and NaN never help."""
    scores = f_query.float() @ f_item.float().T
    best = scores.masked_fill(~match, -torch.inf).amax(1, keepdim=True)
    rank = (~(scores < best) & ~match).sum(1)
    return {k: 100 * ((rank < k) & match.any(1)).float().mean().item() for k in ks}


def caption_matches(records: list[dict]) -> tuple[list[str], torch.Tensor]:
    """All captions, and (captions, records) bool: a caption fits every record that has it, generated ones repeat."""
    texts = [c for r in records for c in r["captions"]]
    holders: dict[str, list[int]] = {}
    for i, r in enumerate(records):
        for c in r["captions"]:
            holders.setdefault(c, []).append(i)
    match = torch.zeros(len(texts), len(records), dtype=torch.bool)
    for i, t in enumerate(texts):
        match[i, holders[t]] = True
    return texts, match


def accuracy(scores: torch.Tensor, labels: torch.Tensor, per_class: bool = False) -> float:
    """Top-1 in percent of scores (N, C) against labels (N,). per_class: mean over the classes that occur (what Aircraft,
    Pets, Caltech101 and Flowers report)."""
    right = (scores.argmax(1) == labels).float()
    if not per_class:
        return 100 * right.mean().item()
    return 100 * torch.stack([right[labels == c].mean() for c in labels.unique()]).mean().item()


# Sets of pictures: distances between two sets of features ----------------------------------------------------------------


class Moments:
    """Count, mean and scatter of features that arrive in parts (B, D), in float64 and D x D memory: for sets too large to keep.

    Parts are joined by their own means (Chan's update), so nothing cancels. Several processes: each fills its own,
    then `Moments.join(ddp.gather_lists([m]))`."""

    def __init__(self):
        self.n, self.mean, self.scatter = 0, 0.0, 0.0

    def update(self, x: torch.Tensor) -> Moments:
        if not len(x):
            return self
        _check_features(0, features=x)
        x = x.double()
        mean = x.mean(0)
        return self._add(len(x), mean, _scatter(x - mean))

    def _add(self, n, mean, scatter):
        gap, total = mean - self.mean, self.n + n
        self.scatter = self.scatter + scatter + torch.outer(gap, gap) * (self.n * n / total)
        self.mean, self.n = self.mean + gap * (n / total), total
        return self

    @staticmethod
    def join(parts: list[Moments]) -> Moments:
        out = Moments()
        for m in parts:
            if m.n:
                out._add(m.n, m.mean, m.scatter)
        return out

    def frechet(self, other: Moments) -> float:
        """Frechet distance to another set, as in frechet_distance()."""
        if min(self.n, other.n) < 2 or self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of {self.n} and {other.n} rows: two rows at least, and equal columns")
        roots = []
        for m in (self, other):
            R, singular = torch.linalg.cholesky_ex(m.scatter, upper=True)
            if singular:
                values, vectors = torch.linalg.eigh(m.scatter)
                R = values.clamp_min(0).sqrt()[:, None] * vectors.T
            roots.append(R / (m.n - 1) ** 0.5)
        return _frechet((self.mean, other.mean), roots)


def frechet_infinity(real: torch.Tensor, fake: torch.Tensor, points: int = 15, seed: int = 0) -> float:
    """FID-infinity (Chong & Forsyth 2020): the distance falls with the sample size like a + b / M; returns a, by least squares
    over `points` random subsets of the generated features, from min(5000, max(M / 10, 2)) to M rows."""
    M, g = len(fake), torch.Generator().manual_seed(seed)
    if M < 3:
        raise ValueError(f"{M} generated rows are too few for a line through distances of two sizes")
    sizes = torch.linspace(min(5000, max(M // 10, 2)), M, points).long().tolist()
    x = Moments().update(real)
    fd = [x.frechet(Moments().update(fake[torch.randperm(M, generator=g)[:m]])) for m in sizes]
    A = torch.tensor([[1.0, 1 / m] for m in sizes], dtype=torch.float64)
    return torch.linalg.lstsq(A, torch.tensor(fd, dtype=torch.float64)[:, None]).solution[0].item()


def kernel_distance(x, y, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> float:
    """KID of features (N, D), (M, D), mean over random subsets without replacement: unbiased MMD^2 with the kernel
    (a . b / d + 1)^3. May be negative. subset_size is lowered to the smaller set."""
    g, m = torch.Generator().manual_seed(seed), min(subset_size, len(x), len(y))
    if m < 2:
        raise ValueError(f"features {tuple(x.shape)} and {tuple(y.shape)}: the kernel distance needs two rows at least")
    _check_features(1, first=x, second=y)
    x, y, out = x.double(), y.double(), []
    for _ in range(subsets):
        a, b = x[torch.randperm(len(x), generator=g)[:m]], y[torch.randperm(len(y), generator=g)[:m]]
        aa, bb, ab = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        out.append((aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (m * (m - 1)) - 2 * ab.mean())
    return torch.stack(out).mean().item()


def cmmd(x: torch.Tensor, y: torch.Tensor, sigma: float = 10.0, scale: float = 1000.0, block: int = 2048) -> float:
    """CMMD (Jayasumana et al. 2024) of CLIP embeddings, normalised here: biased MMD^2, Gaussian kernel, times 1,000."""
    _check_features(0, first=x, second=y)
    x, y = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)

    def mean(a, b):  # |a - b|^2 = 2 - 2 a . b
        return sum(torch.exp((part @ b.T - 1) / sigma**2).sum() for part in a.split(block)) / (len(a) * len(b))

    return (scale * (mean(x, x) + mean(y, y) - 2 * mean(x, y))).item()


def _check_features(k: int, **sets):
    for name, f in sets.items():
        if f.ndim != 2 or len(f) < k + 1:
            raise ValueError(f"{name} features {tuple(f.shape)}: (N, D) with at least {k + 1} rows are needed")
        if not torch.isfinite(torch.stack(f.aminmax())).all():  # no copy of f
            raise ValueError(f"{name} features hold NaN or infinity")


def _shifted(x, mean):
    """x - mean in float64, kept in float32: differences stay, rounding of large means goes."""
    out = torch.empty(x.shape, device=x.device)
    for part, into in zip(x.split(1024), out.split(1024)):
        into.copy_(part.double() - mean)
    return out


def _squares(x):
    return torch.linalg.vector_norm(x, dim=1).square()  # without a copy of x


def _slack(a, b):
    """More than the error of a squared distance of _near()."""
    return 4e-6 * (_squares(a).max() + _squares(b).max()).item()


def _near(a, b, squares, buffer):
    """Squared distances (N, M) of a few rows a (N, D) to b (M, D), whose squares (M,) are given, float32, in the buffer."""
    d = torch.addmm(squares, a, b.T, alpha=-2, out=buffer[: len(a) * len(b)].view(len(a), len(b)))
    return d.add_(_squares(a)[:, None])


def _exact(a, b):
    return (a.double() - b.double()).square().sum(-1)


def knn_radius(x: torch.Tensor, k: int, block: int = 256, near: torch.Tensor | None = None) -> torch.Tensor:
    """(N, D) -> (N,) squared distance to the k-th neighbour in the own set, without the point itself, in float64. Candidates
    are found in float32 (near: the rows to find them with, shifted to their mean), a few more than k, and measured in float64;
    all points are, where float32 cannot tell the others from the k-th. A pair is looked at once, for both of its points."""
    near = _shifted(x, x.double().mean(0)) if near is None else near
    n, m, squares, buffer = len(x), min(k + 4, len(x) - 1), _squares(near), near.new_empty(min(block, len(x)) * len(x))
    far, found = near.new_full((n, m), torch.inf), torch.zeros(n, m, dtype=torch.long, device=x.device)

    def candidates(first, d, begin):  # rows `first` and on have distances d to the points `begin` and on
        rows = slice(first, first + len(d))
        d, places = d.topk(min(m, d.shape[1]), largest=False)
        far[rows], order = torch.cat([far[rows], d], 1).topk(m, largest=False)
        found[rows] = torch.cat([found[rows], places + begin], 1).gather(1, order)

    for i in range(0, n, block):
        d = _near(near[i : i + block], near[i:], squares[i:], buffer)
        d.diagonal().fill_(torch.inf)  # the points themselves
        candidates(i, d, i)
        candidates(i + len(d), d[:, len(d) :].T, i)
    exact = torch.empty(n, m, dtype=torch.float64, device=x.device)  # results allocated between temporaries scatter the heap
    for i in range(0, n, block):
        for j in range(m):
            exact[i : i + block, j] = _exact(x[i : i + block], x[found[i : i + block, j]])
    radius, slack = exact.kthvalue(k, 1).values, _slack(near, near)
    for row in torch.nonzero(far[:, -1].double() - slack < radius)[:, 0].tolist() if m < n - 1 else ():
        every = torch.cat([_exact(part, x[row]) for part in x.split(1024)])
        every[row] = torch.inf
        radius[row] = every.kthvalue(k).values
    return radius


def prdc(real: torch.Tensor, fake: torch.Tensor, k: int = 5, closed: bool = False, block: int = 256) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) of features (N, D), (M, D).

    A point belongs to a set if it lies in the ball of one of its points, whose radius reaches the k-th neighbour. closed:
    "<=" in place of "<"; they differ for duplicates only, and then completely. Pairs are screened in float32 by row blocks,
    memory O(block x (N + M)); those too near to the border for float32 are measured in float64, so the answer is float64's."""
    _check_features(k, real=real, fake=fake)
    mean = sum(part.double().sum(0) for part in real.split(1024)) / len(real)
    a, b = _shifted(real, mean), _shifted(fake, mean)
    r_real, r_fake, slack = knn_radius(real, k, block, a), knn_radius(fake, k, block, b), _slack(a, b)
    recalled, covered = torch.zeros(2, len(a), dtype=torch.bool, device=a.device)
    held = torch.zeros(len(b), dtype=torch.float64, device=b.device)
    squares, buffer = _squares(b), b.new_empty(block * len(b))
    for i in range(0, len(a), block):
        d, balls = _near(a[i : i + block], b, squares, buffer), []
        for r in (r_real[i : i + block, None], r_fake[None]):  # of the real points, then of the generated ones
            ball, near = d < (r - slack).float(), d <= (r + slack).float()
            rows, cols = torch.nonzero(ball ^ near, as_tuple=True)
            for m, n in zip(rows.split(128), cols.split(128)):
                exact, bound = _exact(real[i + m], fake[n]), r.expand(d.shape)[m, n]
                ball[m, n] = exact <= bound if closed else exact < bound
            balls.append(ball)
        held += d.copy_(balls[0]).sum(0)
        covered[i : i + block], recalled[i : i + block] = balls[0].any(1), balls[1].any(1)
    return {"precision": (held > 0).double().mean().item(), "recall": recalled.double().mean().item(),
            "density": held.mean().item() / k, "coverage": covered.double().mean().item()}  # fmt: skip


def vendi(x: torch.Tensor, kernel: str = "cosine", q: float = 1.0) -> float:
    """Vendi score (Friedman & Dieng 2022): the effective number of distinct rows, in [1, n]; grows with n, so compare equal n.

    x (n, D) with kernel "cosine", or the matrix K (n, n) itself, symmetric with ones on the diagonal, with "given".
    exp of the Renyi entropy of order q of K / n's eigenvalues: those of the smaller of F F^T and F^T F."""
    if kernel not in ("cosine", "given"):
        raise ValueError(f"vendi: kernel {kernel!r} must be 'cosine' or 'given'")
    _check_features(0, vendi=x)
    x, n = x.double(), len(x)
    if kernel == "cosine":
        x = F.normalize(x, dim=1)
        x = x @ x.T if n <= x.shape[1] else x.T @ x
    p = torch.linalg.eigvalsh(x / n)
    p = p[p > 1e-12]
    p = p / p.sum()
    if math.isinf(q):
        return (1 / p.max()).item()
    return (torch.special.entr(p).sum() if q == 1 else p.pow(q).sum().log() / (1 - q)).exp().item()


def inception_score(logits: torch.Tensor, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """exp(mean KL(p(y | x) || p(y))) of logits (N, C), shuffled -> mean and standard deviation over the splits."""
    N, out = len(logits), []
    if N < splits:
        raise ValueError(f"{N} pictures cannot be cut into {splits} splits")
    _check_features(1, logits=logits)
    logp = logits.double().log_softmax(1)[np.random.RandomState(seed).permutation(N)]  # the published packages' order
    for i in range(splits):
        part = logp[i * N // splits : (i + 1) * N // splits]
        out.append((part.exp() * (part - part.exp().mean(0).log())).nansum(1).mean().exp())  # 0 log 0 = 0
    out = torch.stack(out)
    return out.mean().item(), out.std(unbiased=False).item()


# Pictures and their captions ----------------------------------------------------------------------------------------------


def clip_score(f_img: torch.Tensor, f_txt: torch.Tensor) -> torch.Tensor:
    """CLIPScore (Hessel et al. 2021) 2.5 max(cos, 0) of each pair of (N, D) features -> (N,). The authors' captions begin with
    "A photo depicts "; others report 100 cos, without it."""
    return 2.5 * F.cosine_similarity(f_img.double(), f_txt.double()).clamp_min(0)


def ref_clip_score(f_img: torch.Tensor, f_txt: torch.Tensor, f_refs: torch.Tensor) -> torch.Tensor:
    """RefCLIPScore: harmonic mean of CLIPScore and the largest cosine of the caption to its references (N, R, D) -> (N,)."""
    a = clip_score(f_img, f_txt)
    b = F.cosine_similarity(f_txt.double()[:, None], f_refs.double(), dim=2).amax(1).clamp_min(0)
    return 2 * a * b / (a + b).clamp_min(1e-12)


# Features of pictures -----------------------------------------------------------------------------------------------------


def resize_299(images: torch.Tensor, rule: str = "pytorch-fid") -> torch.Tensor:
    """uint8 (B, 3, H, W) -> the FID network's input (B, 3, 299, 299), about [-1, 1]. Three tools, three rules:

    "pytorch-fid": bilinear without antialiasing, then 2 v / 255 - 1. "tf1": bilinear, source = i * in / out without the half
    pixel, then (v - 128) / 128 (torch-fidelity, the original). "clean": Pillow's bicubic with antialiasing on float channels,
    clipped, not rounded, then (v - 128) / 128 (clean-fid). The aspect ratio is lost in all of them."""
    x, size = images.float(), 299
    if rule == "pytorch-fid":
        return 2 * F.interpolate(x / 255, (size, size), mode="bilinear") - 1
    if rule == "tf1":
        for dim in (2, 3):
            n = x.shape[dim]
            at = torch.arange(size, device=x.device, dtype=torch.float32) * (n / size)
            low = at.floor().long()
            shape = [1, 1, 1, 1]
            shape[dim] = size
            a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(n - 1))
            x = a + (b - a) * (at - low).view(shape)
        return (x - 128) / 128
    if rule != "clean":
        raise ValueError(f"resizing rule {rule!r} is unknown; choose from pytorch-fid, tf1, clean")
    channels = [Image.fromarray(c).resize((size, size), Image.BICUBIC) for c in x.flatten(0, 1).cpu().numpy()]
    x = torch.from_numpy(np.stack([np.asarray(c) for c in channels])).view(len(x), 3, size, size).to(images.device)
    return (x.clamp(0, 255) - 128) / 128


class _Conv(nn.Module):
    """Convolution without bias, batch norm with eps 1e-3, ReLU."""

    def __init__(self, cin, cout, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


_WIDE, _TALL = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))


class _Block(nn.Module):
    """branches: name -> (in, out, kernel, stride, padding); paths: the names in order, a tuple runs side by side; pool: of the
    last path, which ends with branch_pool unless the block halves its size."""

    def __init__(self, branches: dict, paths: list, pool: str):
        super().__init__()
        for name, arguments in branches.items():
            setattr(self, name, _Conv(*arguments))
        self.paths, self.pool = paths, pool

    def forward(self, x):
        out = []
        for path in self.paths:
            y = x
            for step in path:
                y = torch.cat([getattr(self, s)(y) for s in step], 1) if isinstance(step, tuple) else getattr(self, step)(y)
            out.append(y)
        if self.pool == "halve":
            return torch.cat([*out, F.max_pool2d(x, 3, 2)], 1)
        # zeros at the border do not count; the last block takes the maximum: a slip of 2015 that is part of the metric
        y = F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*out, self.branch_pool(y)], 1)


def _a(cin, pool):
    return _Block({"branch1x1": (cin, 64, 1), "branch5x5_1": (cin, 48, 1), "branch5x5_2": (48, 64, 5, 1, 2),
                   "branch3x3dbl_1": (cin, 64, 1), "branch3x3dbl_2": (64, 96, 3, 1, 1), "branch3x3dbl_3": (96, 96, 3, 1, 1),
                   "branch_pool": (cin, pool, 1)},
                  [["branch1x1"], ["branch5x5_1", "branch5x5_2"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]],
                  "mean")  # fmt: skip


def _b(cin):
    return _Block({"branch3x3": (cin, 384, 3, 2), "branch3x3dbl_1": (cin, 64, 1), "branch3x3dbl_2": (64, 96, 3, 1, 1),
                   "branch3x3dbl_3": (96, 96, 3, 2)},
                  [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]], "halve")  # fmt: skip


def _c(c):
    d = [f"branch7x7dbl_{i}" for i in range(1, 6)]
    return _Block({"branch1x1": (768, 192, 1), "branch7x7_1": (768, c, 1), "branch7x7_2": (c, c, *_WIDE),
                   "branch7x7_3": (c, 192, *_TALL), d[0]: (768, c, 1), d[1]: (c, c, *_TALL), d[2]: (c, c, *_WIDE),
                   d[3]: (c, c, *_TALL), d[4]: (c, 192, *_WIDE), "branch_pool": (768, 192, 1)},
                  [["branch1x1"], ["branch7x7_1", "branch7x7_2", "branch7x7_3"], d], "mean")  # fmt: skip


def _d(cin):
    s = [f"branch7x7x3_{i}" for i in range(1, 5)]
    return _Block({"branch3x3_1": (cin, 192, 1), "branch3x3_2": (192, 320, 3, 2), s[0]: (cin, 192, 1), s[1]: (192, 192, *_WIDE),
                   s[2]: (192, 192, *_TALL), s[3]: (192, 192, 3, 2)}, [["branch3x3_1", "branch3x3_2"], s], "halve")  # fmt: skip


def _e(cin, pool):
    wide, tall = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
    return _Block({"branch1x1": (cin, 320, 1), "branch3x3_1": (cin, 384, 1), "branch3x3_2a": (384, 384, *wide),
                   "branch3x3_2b": (384, 384, *tall), "branch3x3dbl_1": (cin, 448, 1), "branch3x3dbl_2": (448, 384, 3, 1, 1),
                   "branch3x3dbl_3a": (384, 384, *wide), "branch3x3dbl_3b": (384, 384, *tall), "branch_pool": (cin, 192, 1)},
                  [["branch1x1"], ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
                   ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")]], pool)  # fmt: skip


class FidInception(nn.Module):
    """The network of FID, TensorFlow's inception-2015-12-05: uint8 (B, 3, H, W) -> features (B, 2048); logits(f) for the
    Inception score, without the bias. Keys are those of torchvision's inception_v3, which has other pooling branches, another
    classifier and an auxiliary head; 472 tensors, 23,850,960 parameters."""

    def __init__(self, resize: str = "pytorch-fid"):
        super().__init__()
        self.resize = resize
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = _Conv(3, 32, 3, 2), _Conv(32, 32, 3)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = _Conv(32, 64, 3, 1, 1), _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _c(128), _c(160), _c(160), _c(192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = _d(768), _e(1280, "mean"), _e(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images):
        if images.dtype != torch.uint8:
            raise ValueError(f"the FID network takes uint8 pictures (B, 3, H, W), got {images.dtype}")
        return self.pooled(resize_299(images, self.resize))

    def pooled(self, x):
        """Resized input (B, 3, 299, 299) -> (B, 2048)."""
        for name, part in self.named_children():
            if name != "fc":
                x = part(x)
                if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                    x = F.max_pool2d(x, 3, 2)
        return x.mean((2, 3))

    def logits(self, f):
        return f @ self.fc.weight.T


def inception_features(path, resize: str = "pytorch-fid") -> FidInception:
    """pt_inception-2015-12-05-6726825d.pth (or the same tensors as .safetensors) -> network in eval mode.

    The eight digits in the published name are the start of its SHA-256: checked where a name carries them."""
    name = str(path)
    try:
        if name.endswith(".safetensors"):
            state = load_file(name)
        else:
            state = torch.load(name, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; expected pytorch-fid's pt_inception-2015-12-05-6726825d.pth") from None
    except Exception as error:
        raise ValueError(f"{path} cannot be read as weights ({type(error).__name__})") from error
    digits = re.search(r"-([0-9a-f]{8})\.pth$", name)
    if digits:
        with open(path, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()[:8]
        if found != digits[1]:
            raise ValueError(f"{path} is damaged: its SHA-256 begins with {found}, its name says {digits[1]}")
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no tensors by name")
    net = FidInception(resize)
    want = {k: v.shape for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    wrong = sorted(want.keys() ^ state.keys()) or [k for k in want if want[k] != state[k].shape]
    if wrong:
        raise ValueError(f"{path} is not the FID network (472 tensors): {wrong[0]} is missing, unknown or has another shape; "
                         "torchvision's inception_v3 is a different network")  # fmt: skip
    net.load_state_dict(state, strict=False)
    return net.eval().requires_grad_(False)


MEAN_STD = {"dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))}  # fmt: skip


def _normalised(images, kind):
    x = torch.from_numpy(np.stack([np.asarray(i.convert("RGB"), np.float32) for i in images])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in MEAN_STD[kind])
    return (x - mean) / std


def short_side(img, size, crop):
    """Resize and CenterCrop of torchvision: the long side is rounded down, the crop's place to the nearest even."""
    img = img.resize([size * s // min(img.size) for s in img.size], Image.BICUBIC)
    left, top = (round((s - crop) / 2) for s in img.size)
    return img.crop((left, top, left + crop, top + crop))


def dino_input(images, crop: bool = False, size: int = 224) -> torch.Tensor:
    """PIL images -> (B, 3, size, size) for DINOv2. FD-DINOv2's code squashes to a square; crop: DINOv2's own transform,
    short side to 256 of 224, then the centre. Bicubic with antialiasing. Numbers of the two differ."""
    how = (lambda i: short_side(i, size * 8 // 7, size)) if crop else lambda i: i.resize((size, size), Image.BICUBIC)
    return _normalised([how(i.convert("RGB")) for i in images], "dino")


def clip_input(images, size: int = 224) -> torch.Tensor:
    """PIL images -> (B, 3, size, size) for CLIP: short side to `size`, bicubic, then the centre."""
    return _normalised([short_side(i.convert("RGB"), size, size) for i in images], "clip")
