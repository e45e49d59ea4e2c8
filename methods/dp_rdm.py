"""Private retrieval: a diffusion model adapts to private pictures at inference, under a provable, metered privacy budget.

Paper      Lebensold, Sanjabi, Astolfi, Romero-Soriano, Chaudhuri, Rabbat, Guo: DP-RDM: Adapting Diffusion Models to Private
           Domains Without Fine-Tuning. 2024, arXiv 2403.14421
Idea       A retrieval-conditioned diffusion model is trained on public pictures only. For a prompt, the k nearest embeddings
           of a private set are fetched from a random subsample of it, their unit vectors averaged, and Gaussian noise added:
           one record changes the average by 2/k at most, so the noise hides it. What follows is post-processing and free.
           The model must know noisy averages: it is trained with them. The price is paid per query, so queries are metered.
Equations  mean of neighbours + noise -> private_retrieve()     Renyi divergence of the sampled Gaussian -> rdp()
           epsilon by RDP -> epsilon()     ... by the privacy loss distribution -> epsilon_pld()     the meter -> Ledger
Read first section 2, Ledger in section 3, then train() and run()
Symbols    N private records, k neighbours, sigma noise on the MEAN, q a record's chance to be drawn, T queries, z = sigma
           k / 2 the noise multiplier, alpha order, delta <= 1/N, lambda share of the private part
Run        python methods/dp_rdm.py [--preset smoke]                      (CPU, no data; 3.1 min on two quiet cores)
           python methods/dp_rdm.py --plan --records 82800 (or --attack)  (tables of the budget; a planted record's traces)
Data       generated: all private things are spotted; or shards (--public, --private) with --vae and --clip
Expect     laptop: Frechet distance 57 public only, 56 as noisy, 46 at epsilon 10, T = 10,000; colour right 69, 61, 59 %
Differs    from the paper: a small DiT, flow and Euler steps for a UNet, eps and DDIM; a learned null token, a KL autoencoder;
           pictures squeezed to squares, the distance's references, too; "public only" is the same model, told the noiseless
           mean of public neighbours (the paper's was trained with separate ones); epsilon and T set k, for q and sigma are
           fixed; 256 prompts. From released code: too few neighbours are summed and divided by k; a ledger; secure randomness.
           Neighbouring sets: one record more or less, all others known. Not protected: people with several records; prompts;
           test pictures; tuning; float64 noise against attacks on rounding. All models must have seen public pictures alone.
Uses       common/ckpt.py cli.py data.py ddp.py dit.py log.py metrics.py optim.py plot.py resnet.py scenes.py tokenizer.py
           vae.py vit.py zoo.py and weights/   (copy these with this file)
"""

from __future__ import annotations

import copy
import fcntl
import functools
import hashlib
import json
import math
import os
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]  # so that python, torchrun and python -m all find common/

from common import ckpt, cli, data, ddp, metrics, optim, plot, scenes, zoo
from common.dit import DiT
from common.log import RunLog, history, table, write_json
from common.tokenizer import Tokenizer
from common.vae import load_vae
from common.vit import load_clip, trim


# 1. CONFIG (presets stand in section 7) ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    # run: the same names in all ten files
    out_dir: str = "runs/dp_rdm"  # one folder a run
    seed: int = 0  # of weights, scenes and training; of noise and subsamples, too, without --secure, which needs 0
    steps: int = 1_400  # optimiser updates on public pictures
    batch_size: int = 64  # GLOBAL, divided by the number of processes; released: 1,280
    accum: int = 1  # micro-batches an update
    lr: float = 3e-3  # AdamW, constant after the warm-up; released: 1e-4
    wd: float = 0.0  # weight decay
    warmup: int = 50  # updates of linear warm-up; released: 100
    grad_clip: float = 1.0  # largest gradient norm, 0 = off
    ema_decay: float = 0.99  # of the weights that sample
    dtype: str = "float32"  # float32, or bfloat16 autocast of the network
    compile: bool = False  # torch.compile the model
    data: str = ""  # not used: see --public and --private
    workers: int = 0  # loader processes of each rank
    log_every: int = 20  # updates between lines of log.jsonl
    eval_every: int = 0  # not used: the evaluation is that of the trained model
    save_every: int = 200  # updates between checkpoints
    resume: bool = True  # continue from last.pt, exactly; --no-resume starts again
    max_bad: float = 0.01  # share of damaged samples at which the run stops
    memory_gb: float = 64.0  # pictures of --public and --private are held in memory, by EACH process; ImageNet at 256 px: 250
    # the mechanism
    k: int = 4  # neighbours in training, of "public only" and "not private"; those of the others follow from the budget
    sigma: float = 0.1  # std of the noise on each coordinate of the mean; 1 long in 96 dimensions, as 0.05 (paper) is in 512
    q: float = 0.02  # chance of a private record to be in the subsample of a query
    budgets: str = "5,10,20"  # epsilons, one private arm each
    queries: str = "1000,10000"  # T, queries that the budget must last for; one private arm each
    delta: float = 0.0  # 0 = 1 / N, the paper's choice
    lam: float = 1.0  # lambda: share of the private part; 0 = the rest alone, which costs nothing
    other: str = "public"  # the rest: public (k neighbours as k tokens, which training never showed) or text (the prompt)
    secure: bool = False  # noise and subsamples from the operating system; not reproducible, refused together with a seed
    # training and sampling
    max_noise: float = 0.1  # noise of training means: std uniform in (0, this]; released: 0.05
    drop: float = 0.1  # chance of the null condition, for guidance; released: 0
    guidance: float = 2.0  # classifier-free guidance; released: 2, CIFAR-10 1.25
    sample_steps: int = 16  # Euler steps; released: 100 of DDIM
    # data and model
    public: str = ""  # folder of public shards
    private: str = ""  # folder of private shards
    public_bank: str = ""  # their embeddings, if computed before: .npy or .safetensors, one row a picture
    private_bank: str = ""  # the same of the private set
    records: int = 12_000  # generated private records; of --plan: N
    images: int = 9_000  # generated public pictures
    prompts: int = 256  # queries of the evaluation
    inception: str = ""  # FID's Inception, for all distances; "" = --clip, which retrieval uses, too, or the scenes' judge
    clip: str = ""  # CLIP weights that embed pictures and prompts; "" = the stand-in
    tokenizer: str = ""  # CLIP's merges file
    vae: str = ""  # autoencoder; "" = the stand-in
    image_size: int = 32  # pixels
    dim: int = 128  # width
    depth: int = 4  # blocks
    heads: int = 4  # of attention
    plan: bool = False  # print what a budget buys, and end
    attack: bool = False  # tell two sets that differ in one record apart (k 4, sigma 0.5, delta 0.01), compare, and end
    trials: int = 10_000  # of the attack


# 2. THE IDEA (start reading here) ------------------------------------------------------------------------------------
def private_retrieve(query, bank, k, sigma, q=1.0, random=None, norms=None):
    """Noisy mean of the k nearest unit embeddings of a fresh subsample: query (d,), bank (N, d) rows -> (d,), float64.

    S: every row on its own with chance q, drawn anew for THIS query; mean = 1/k sum over the k rows of S with the largest
    cosine. Rows are normalised BEFORE, the constant k divides also when S has fewer rows: then one record more or less changes
    the mean by 2/k at most. random: a Random; draws the subsample and one noise vector. ValueError for k > N, q outside (0, 1],
    a zero or non-finite embedding. NOT re-normalised: the model is trained with noisy means. norms (N,): the rows'
    lengths, if known."""
    N, d = bank.shape
    if not 1 <= k <= N or not 0 < q <= 1 or not sigma >= 0:
        raise ValueError(f"k {k} must be in 1 to N = {N}, q {q} in (0, 1], sigma {sigma} not negative")
    random = random or Random()
    rows = random.subsample(N, q)
    best = nearest(unit(query[None])[0], bank, k, rows, norms)
    mean = unit(bank[best]).sum(0) / k
    return mean + sigma * random.normal(d).to(mean.device) if sigma else mean


def unit(x):
    """Rows (n, d) of length 1 in float64; ValueError for a row without a direction."""
    x = torch.as_tensor(x).double()
    norm = x.norm(dim=1, keepdim=True)
    if not (torch.isfinite(norm) & (norm > 0)).all():
        raise ValueError("an embedding is zero, NaN or infinite and has no direction; leave that record out of the bank")
    return x / norm


def blend(private, other, lam):
    """lambda * private + (1 - lambda) * other, as tokens (n, d): private (d,) is repeated; other (n, d)."""
    return lam * private.expand_as(other) + (1 - lam) * other


ORDERS = (*(1 + i / 10 for i in range(1, 100)), *range(11, 64))  # the released grid


def rdp(q, z, alpha):
    """Renyi divergence of order alpha > 1 of one query: log A / (alpha - 1), A = E_{x ~ N(0, z^2)} [(1 - q + q e^((2x - 1) /
    (2 z^2)))^alpha] (Mironov, Talwar, Zhang 2019). Float or array of orders; sampled Gaussian, one record added or removed.

    Integer orders by the binomial sum, others by the trapezoid rule, which converges exponentially here. Both take 1 and the
    first-order term off under the sum, so that a tiny q loses no digits. Below z = 0.05, where epsilon is in the hundreds and
    the rule would need millions of points, other orders get the chord between whole ones: log A is convex, so it is a bound."""
    orders = np.atleast_1d(np.asarray(alpha, float))
    if not (0 <= q <= 1 and z > 0 and (orders > 1).all()):
        raise ValueError(f"q {q} must be in [0, 1], the noise multiplier {z} above 0, the orders above 1")
    if q in (0, 1):
        out = orders / (2 * z * z) * q
    else:
        whole = orders == np.floor(orders)
        out = np.empty_like(orders)
        out[whole] = _log_moment(_binomial, orders[whole], q, z)
        out[~whole] = _chord(orders[~whole], q, z) if z < 0.05 else _log_moment(_quadrature, orders[~whole], q, z)
        out = out / (orders - 1)
    return float(out[0]) if np.ndim(alpha) == 0 else out


def _log_moment(terms, orders, q, z):
    """log A of each order. terms(orders, q, z) -> logs of the weights and of what they weigh, its first-order part."""
    if not len(orders):
        return orders
    log_w, power, first = terms(orders, q, z)
    safe = power.max(1) + log_w.max(1) < 600
    with np.errstate(over="ignore", invalid="ignore"):
        small = (np.exp(log_w) * (np.expm1(power) - first)).sum(1)  # A - 1, every summand >= 0
        top = (log_w + power).max(1, keepdims=True)
        large = top[:, 0] + np.log(np.exp(log_w + power - top).sum(1))
    return np.where(safe & np.isfinite(small), np.log1p(np.where(safe, small, 0)), large)


def _binomial(orders, q, z):  # A = sum_j C(alpha, j) (1 - q)^(alpha - j) q^j e^((j^2 - j) / (2 z^2))
    a, j = orders[:, None], np.arange(int(orders.max()) + 1)[None]
    gamma = np.array([math.lgamma(i + 1) for i in range(int(orders.max()) + 1)])
    rest, power = np.maximum(a - j, 0).astype(int), (j * j - j) / (2 * z * z)
    log_w = gamma[a.astype(int)] - gamma[j] - gamma[rest] + j * math.log(q) + (a - j) * math.log1p(-q)
    return np.where(j <= a, log_w, -np.inf), np.where(j <= a, power, 0.0), 0.0


def _chord(orders, q, z):
    if not len(orders):
        return orders
    nodes = np.arange(1, math.ceil(orders.max()) + 1).astype(float)
    return np.interp(orders, nodes, np.concatenate([[0.0], _log_moment(_binomial, nodes[1:], q, z)]))  # log A(1) = 0


def _quadrature(orders, q, z):
    h = min(z / 8, z * z / 3)  # the integrand is analytic in a strip of height min(z, pi z^2): the error is below 1e-15
    x = np.arange(-12 * z, orders.max() + 12 * z, h)[None]
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * z * z))
    log_w = -x * x / (2 * z * z) + math.log(h / (z * math.sqrt(2 * math.pi)))
    with np.errstate(over="ignore"):
        linear = orders[:, None] * np.expm1(ratio)
    return np.broadcast_to(log_w, (len(orders), x.shape[1])), orders[:, None] * ratio, linear


def to_epsilon(orders, total, delta, conversion="improved"):
    """RDP (array over orders, already summed over queries) -> (epsilon, order of the minimum)."""
    a = np.asarray(orders, float)
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} must be in (0, 1); 1 / N is usual")
    if conversion == "classic":  # Mironov 2017
        eps = total - math.log(delta) / (a - 1)
    elif conversion == "improved":  # Balle et al. 2020, Theorem 21
        eps = total + np.log1p(-1 / a) - (math.log(delta) + np.log(a)) / (a - 1)
    else:
        raise ValueError(f"conversion {conversion!r} is unknown; choose from improved, classic")
    i = int(np.nanargmin(eps))
    return max(0.0, float(eps[i])), float(a[i])


def epsilon(q, z, steps, delta, conversion="improved"):
    """Epsilon of `steps` queries with rate q and noise multiplier z = sigma k / 2, by Renyi differential privacy; 0 for
    steps or q of 0."""
    if not steps or not q:
        return 0.0
    return to_epsilon(ORDERS, steps * rdp(q, z, ORDERS), delta, conversion)[0]


# 3. MODULES: the tighter accountant, the inverses, randomness, the ledger, the network ---------------------------------------
def epsilon_pld(q, z, steps, delta, h=1e-4):
    """Epsilon by the privacy loss distribution, an upper bound too and the tighter one: the larger of removing and adding. h:
    grid of the losses, coarser where they are large. inf where the expected loss is above 500: no number means anything."""
    if not 0 < delta < 1 or not 0 <= q <= 1 or not z > 0:
        raise ValueError(f"delta {delta} must be in (0, 1), q {q} in [0, 1], the noise multiplier {z} above 0")
    ways = (False, True) if q < 1 else (False,)  # at 1 both are the same, and adding would lose all digits at small z
    return max(_pld(q, z, steps, delta, h, add) for add in ways) if steps and q else 0.0


def _hockey_stick(q, z, loss, add):
    """max over sets of P(S) - e^l Q(S), l = loss >= 0 (array). P, Q: with and without the record, or the reverse for add."""
    edge = -loss if add else loss  # the likelihood ratio is e^edge at x; the set S lies above x, for add below
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.expm1(edge) + q  # e^edge - (1 - q), over q
        x = np.where(inside > 0, z * z * (np.log(np.where(inside > 0, inside, 1)) - math.log(q)) + 0.5, -np.inf)
    side = (-1 if add else 1) / (z * math.sqrt(2))

    def normal(v):  # Phi(v / z), or 1 - Phi for the other side; torch.special.ndtr loses the tail's digits
        return torch.special.erfc(torch.from_numpy(side * v)).numpy() / 2

    far, near = normal(x), normal(x - 1)
    if add:
        return np.maximum(q * np.exp(loss) * (far - near) - np.expm1(loss) * far, 0)
    return np.maximum(q * (near - far) - np.expm1(loss) * far, 0)


def _pld(q, z, steps, delta, h, add):
    """Connect-the-dots discretisation (Doroshenko et al. 2022) on the grid i h, T-fold convolution by FFT."""
    far = min(600.0, (1 + 24 * z) / (2 * z * z))  # a loss without subsampling that one query exceeds with chance 1e-33
    top, low = (far, far) if q == 1 else (math.log1p(q * math.expm1(far)), -math.log1p(-q))
    up, down = (math.ceil(v / h) + 2 for v in ((low, top) if add else (top, low)))  # grid from -down to up
    if up + down > 1 << 22:
        return _pld(q, z, steps, delta, 4 * h, add)
    i = np.arange(-down - 1, up + 2)
    loss = i * h
    # d(l) = (1 - e^l) + e^l d'(-l), d' of the other direction; the first part is linear in e^l and has its mass at 0 only
    d = np.where(i >= 0, _hockey_stick(q, z, np.maximum(loss, 0), add),
                 np.exp(np.minimum(loss, 0)) * _hockey_stick(q, z, np.maximum(-loss, 0), not add))  # fmt: skip
    fall = d[:-1] - d[1:]
    mass = fall[:-1] / -math.expm1(-h) - fall[1:] / math.expm1(h)
    mass[down] += 1
    mass, infinite, loss = np.maximum(mass, 0), max(d[-2], 0.0), loss[1:-1]
    mean, second = (mass * loss).sum(), (mass * loss * loss).sum()
    spread = 24 * math.sqrt(max(steps * (second - mean * mean), 0)) + loss[-1] - loss[0]
    lost = -math.expm1(steps * math.log1p(-infinite))
    if steps * mean > 500 or lost >= delta:
        return math.inf
    if spread / h > 1 << 23:
        return _pld(q, z, steps, delta, 4 * h, add)
    n = 1 << math.ceil(math.log2(max(len(mass), spread / h) + 2))
    total = np.fft.irfft(np.fft.rfft(mass, n) ** steps, n)
    place = np.arange(n) - steps * down  # in steps of h, up to multiples of n: take the one next to the mean
    place = place + n * np.round((steps * mean / h - place) / n)
    order = np.argsort(place)
    L, p = place[order] * h, np.maximum(total[order], 0)
    lost += p[L >= 700].sum()  # whose weights would not be numbers
    L, p = L[(L > 0) & (L < 700)], p[(L > 0) & (L < 700)]
    tail, scaled = (np.cumsum(v[::-1])[::-1] for v in (p, p * np.exp(-L)))
    curve = lost + tail - np.exp(L) * scaled  # delta at epsilon = L
    j = int(np.searchsorted(-curve, -delta))  # the first L with delta(L) <= delta; between two of them the curve is exact
    if lost >= delta or j == len(L):
        return math.inf
    if tail[j] + lost <= delta:
        return float(L[j - 1]) if j else 0.0
    return max(0.0, math.log((tail[j] + lost - delta) / scaled[j]))


def solve(f, target, low, high, tolerance=1e-4):
    """x in [low, high] where the monotone f crosses target, by plain halving, until f is within the tolerance."""
    falling = f(high) < f(low)
    for _ in range(200):
        x = (low + high) / 2
        value = f(x)
        if abs(value - target) < tolerance:
            return x
        low, high = (x, high) if (value > target) == falling else (low, x)
    return (low + high) / 2


def first(fits, most=1 << 50):
    """The smallest whole number from 1 on that fits, by doubling and halving, where all larger ones fit, too; or most."""
    high = 1
    while high < most and not fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def reachable(eps, delta):
    """ValueError for an epsilon that no amount of noise gives: to_epsilon() of nothing at all is above 0."""
    if to_epsilon(ORDERS, np.zeros(len(ORDERS)), delta)[0] >= eps:
        raise ValueError(f"epsilon {eps:g} is below what these orders certify at delta {delta:.2g} with any noise: raise it")


def whole_k(eps, q, sigma, steps, delta):
    """The fewest neighbours whose epsilon is at most eps."""
    reachable(eps, delta)
    return first(lambda k: epsilon(q, sigma * k / 2, steps, delta) <= eps)


def find_k(eps, q, sigma, steps, delta):
    """Real number of neighbours whose epsilon is eps within 1e-4, so perhaps above it: a private arm takes whole_k(), which
    never is. The halving is the released code's. ValueError below the orders' reach."""
    high = whole_k(eps, q, sigma, steps, delta)
    return solve(lambda k: epsilon(q, sigma * k / 2, steps, delta), eps, high / 64, high)


def find_sigma(eps, q, k, steps, delta):
    return find_k(eps, q, 1.0, steps, delta) / k  # epsilon depends on the product sigma k


def find_q(eps, k, sigma, steps, delta):
    reachable(eps, delta)
    return solve(lambda q: epsilon(q, sigma * k / 2, steps, delta), eps, 0.0, 1.0)


def find_queries(eps, q, z, delta):
    """Largest number of queries below 2^50 whose epsilon is at most eps."""
    return first(lambda T: epsilon(q, z, T, delta) > eps) - 1


class Random:
    """Subsamples and noise. seed: reproducible, for experiments: who knows the seed knows the noise. None: bits of the
    operating system, 52 to a number, mapped by the inverse normal distribution."""

    def __init__(self, seed: int | None = None):
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def uniform(self, n: int) -> torch.Tensor:
        """(n,) float64 in (0, 1)."""
        if self.generator is None:
            bits = np.frombuffer(secrets.token_bytes(8 * n), np.uint64) >> 12
            return torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-52)
        return torch.rand(n, dtype=torch.float64, generator=self.generator)

    def normal(self, n: int) -> torch.Tensor:
        if self.generator is None:
            return torch.special.ndtri(self.uniform(n))
        return torch.randn(n, dtype=torch.float64, generator=self.generator)

    def subsample(self, N: int, q: float) -> torch.Tensor:
        """Poisson sampling: sorted rows, each with chance q on its own. Drawn by the gaps between them, which are geometric."""
        if q >= 1:
            return torch.arange(N)
        rows, last = [], -1
        while last < N:
            count = int((N - last) * q + 6 * math.sqrt((N - last) * q) + 8)
            gaps = (torch.log(self.uniform(count).clamp_min(1e-300)) / math.log1p(-q)).floor().clamp_max(N).long() + 1
            rows.append(last + gaps.cumsum(0))
            last = int(rows[-1][-1])
        rows = torch.cat(rows)
        return rows[rows < N]


class BudgetExceeded(ValueError):
    """A charge that the budget does not allow; nothing was charged."""


class Ledger:
    """The meter of a private set: a text file, one line a charge, that outlives the process.

    charge(q, z) before every answer. Under a lock it reads all charges, refuses (BudgetExceeded) if epsilon with the new one
    is above the budget, else appends a line and syncs it to the disk: two processes cannot overspend together, and after
    kill -9 a charge is there or its answer was never given. A torn last line is such a one, and is cut off; one that lacks
    only its end counts. budget, delta and bank (the set's fingerprint) are written once; ValueError if they differ later.
    The file is as private as the set: who has all records but one can test a guess against the fingerprint."""

    def __init__(self, path, budget: float, delta: float, bank: str = ""):
        if not budget > 0 or not 0 < delta < 1:
            raise ValueError(f"budget {budget} must be above 0 and delta {delta} in (0, 1)")
        self.path, self.budget, self.delta = Path(path), float(budget), float(delta)
        self.rdp = functools.cache(lambda q, z: rdp(q, z, ORDERS))
        self.head, self.known = {"budget": self.budget, "delta": self.delta, "bank": bank}, (b"", {})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            pass

    @contextmanager
    def _locked(self):
        """The open file under an exclusive lock, and all its charges {(q, z): queries}."""
        with open(self.path, "a+b") as file:  # closing it unlocks
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            if text.endswith(b"}"):  # a line that lacks only its end: in doubt it counts
                whole = text + b"\n"
            if not whole and not b'{"budget"'.startswith(text[:9]):
                raise ValueError(f"{self.path} is no ledger; choose another name")
            charges = self._read(whole) if whole else {}  # refuses before anything is changed
            file.truncate(min(len(whole), len(text)))  # without a torn line
            if len(whole) > len(text):
                file.write(b"\n")
            if not whole:
                self._append(file, self.head)
                folder = os.open(self.path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
            yield file, charges

    def _read(self, text):
        done, charges = self.known if text.startswith(self.known[0]) else (b"", {})  # what was read before is not read again
        charges, lines = dict(charges), text[len(done) :].decode("utf-8", "replace").splitlines()
        try:
            head = self.head if done else json.loads(lines[0])
            differ = [k for k, v in self.head.items() if head[k] != v]
            for line in lines[0 if done else 1 :]:
                c = json.loads(line)
                key, queries = (float(c["q"]), float(c["z"])), int(c["queries"])
                if not (0 < key[0] <= 1 and 0 < key[1] < math.inf and 0 < queries == c["queries"]):
                    raise ValueError(f"impossible charge {line}")
                charges[key] = charges.get(key, 0) + queries
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); without it the spent budget is unknown: restore it") from error
        if differ:
            what = ", ".join(differ)  # no values: the fingerprint is private
            raise ValueError(f"{self.path} belongs to another budget or bank ({what}); use its own settings or another file")
        self.known = text, charges
        return charges

    def _append(self, file, record):
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())

    def _epsilon(self, charges):
        total = sum((n * self.rdp(q, z) for (q, z), n in charges.items()), np.zeros(len(ORDERS)))
        return to_epsilon(ORDERS, total, self.delta)[0] if charges else 0.0

    def charge(self, q: float, z: float, queries: int = 1) -> None:
        if not 0 < q <= 1 or not 0 < z < math.inf or not 1 <= queries < math.inf or queries != int(queries):
            raise ValueError(f"a charge needs q {q} in (0, 1], a noise multiplier {z} above 0, {queries} a whole number > 0")
        with self._locked() as (file, charges):
            self._refuse(charges, q, z, queries)
            self._append(file, {"q": q, "z": z, "queries": int(queries)})

    def check(self, q: float, z: float, queries: int) -> None:
        """Raises as charge() would, without charging: for callers who need all answers or none."""
        with self._locked() as (_, charges):
            self._refuse(charges, q, z, queries)

    def _refuse(self, charges, q, z, queries):
        new = charges | {(q, z): charges.get((q, z), 0) + queries}
        if queries and (eps := self._epsilon(new)) > self.budget:
            spent = self._epsilon(charges)
            raise BudgetExceeded(f"{self.path}: {queries} more queries would make epsilon {eps:.4f}, the budget is "
                                 f"{self.budget:g} and {spent:.4f} is spent; nothing was charged")  # fmt: skip

    def spent(self) -> float:
        """Epsilon of all charges so far."""
        with self._locked() as (_, charges):
            return self._epsilon(charges)

    def queries(self) -> int:
        with self._locked() as (_, charges):
            return sum(charges.values())


def nearest(query, bank, k, rows=None, norms=None, block=262_144):
    """Indices of the k rows (of `rows`, sorted, or all) with the largest cosine to the unit query; ties: the lowest index.
    Found in float32 by blocks, with all near ties, and ranked in float64 row by row: no score depends on the other rows.
    norms (N,): the rows' lengths, if known."""
    rows = torch.arange(len(bank), device=bank.device) if rows is None else rows.to(bank.device)
    if not len(rows):
        return rows
    best, scores, least = rows[:0], bank.new_zeros(0, dtype=torch.float32), -math.inf
    for part in rows.split(block):
        first, last = int(part[0]), int(part[-1]) + 1
        place = slice(first, last) if last - first == len(part) else part  # a run of rows needs no copy
        chosen = bank[place].float()
        length = chosen.norm(dim=1) if norms is None else norms[place]
        # where a float32 length has over- or underflowed, NaN: such a row stays among the near ones
        score = torch.where((length > 1e-18) & (length < 1e18), products(chosen, query.float()) / length, math.nan)
        near = torch.nonzero(~(score < least - 1e-5))[:, 0]  # NaN too: unit() names it
        best, scores = torch.cat([best, part[near]]), torch.cat([scores, score[near]])
        if len(scores) > k:
            least = scores.nan_to_num(-math.inf).topk(k).values[-1]
            keep = ~(scores < least - 1e-5)
            best, scores = best[keep], scores[keep]
    best = best.sort().values
    exact = (unit(bank[best]) * query.double()).sum(1)
    return best[torch.argsort(exact, descending=True, stable=True)[:k]]


def products(x, query, rows=16_384):
    """x (n, d) @ query (d,). On a CPU row by row in threads, by numpy, which reads memory up to three times as fast as torch's
    matrix-vector product does; and reading memory is all that this takes."""
    if x.device.type != "cpu" or len(x) <= rows:
        return x @ query
    a, b, out = x.numpy(), query.cpu().numpy(), np.empty(len(x), np.float32)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda i: np.vecdot(a[i : i + rows], b, out=out[i : i + rows]), range(0, len(x), rows)))
    return torch.from_numpy(out)


class Generator(nn.Module):
    """A DiT that attends to embeddings (B, n, d); a learned null token stands for no condition. n equal tokens act as one."""

    def __init__(self, embed: int, latent: tuple[int, int], cfg):
        super().__init__()
        channels, side = latent
        self.dit = DiT(side, 2, channels, cfg.dim, cfg.depth, cfg.heads, classes=0, learn_sigma=False, cross=True)
        self.proj, self.null = nn.Linear(embed, cfg.dim), nn.Parameter(torch.zeros(1, 1, cfg.dim))

    def forward(self, z, t, tokens, keep):
        """z (B, C, H, W), t (B,) in [0, 1], tokens (B, n, d), keep (B,) bool: False = the null condition."""
        context = torch.where(keep[:, None, None], self.proj(tokens), self.null)
        return self.dit(z, 999 * t, context=context)


def noisy_mean(neighbours, max_noise, u, noise):
    """Training condition: mean of unit neighbours (B, k, d) plus std * noise (B, d), std = max_noise (1 - u) in (0, max_noise],
    one u for the whole batch -> (B, 1, d)."""
    mean = F.normalize(neighbours, dim=2).mean(1)
    return (mean + max_noise * (1 - u) * noise)[:, None]


@torch.no_grad()
def sample(model, tokens, noise, guidance, steps):
    """tokens (B, n, d), noise (B, C, H, W) -> latents. Euler's method for the flow z_t = (1 - t) z_0 + t noise."""
    z, keep = noise, torch.arange(2 * len(noise), device=noise.device) < len(noise)
    times = torch.linspace(1, 0, steps + 1, device=noise.device)
    for t, after in zip(times[:-1], times[1:]):
        cond, null = model(torch.cat([z, z]), t.expand(2 * len(z)), torch.cat([tokens, tokens]), keep).chunk(2)
        z = z + (after - t) * (null + guidance * (cond - null))
    return z


# 4. DATA: public and private pictures, their embeddings ---------------------------------------------------------------------
@dataclass
class World:
    public: torch.Tensor  # uint8 (N, 3, S, S)
    public_bank: torch.Tensor  # (N, d) float32, rows of length 1
    private_bank: torch.Tensor
    test: torch.Tensor  # private pictures that are in no bank, the reference of all distances
    prompts: list[str]
    queries: torch.Tensor  # (P, d)
    colours: list[str] | None = None  # of generated prompts: what they ask for


def read_bank(path) -> torch.Tensor:
    """Embeddings (N, d): .npy by memory map, or .safetensors with a tensor "embedding"."""
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, "pt") as f:
                bank = f.get_tensor("embedding")
        else:
            bank = torch.from_numpy(np.load(path, mmap_mode="c"))
    except Exception as error:
        raise ValueError(f"{path} holds no embeddings ({type(error).__name__}): expected .npy or .safetensors") from error
    if bank.ndim != 2 or not bank.is_floating_point():
        raise ValueError(f"{path} holds {tuple(bank.shape)} {bank.dtype}, expected rows (N, d) of floats")
    for part in bank.split(65_536):  # before anything is charged, and whether it would be drawn or not
        if not torch.isfinite(part).all() or not part.any(1).all():
            raise ValueError(f"{path} has a row with NaN or infinity, or of zeros, which has no direction")
    return bank


class Embedder:
    """The CLIP whose space retrieval happens in: pictures and texts -> unit rows."""

    def __init__(self, cfg, device):
        self.net = (load_clip(cfg.clip) if cfg.clip else zoo.load_clip()).to(device).eval().requires_grad_(False)
        self.tok = Tokenizer.from_clip(cfg.tokenizer) if cfg.clip else zoo.load_tokenizer()
        self.side = self.net.visual.image_size
        self.device = device

    @torch.no_grad()
    def pictures(self, images, part=256):
        """uint8 (N, 3, S, S) -> (N, d) float32."""
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in metrics.MEAN_STD["clip"])
        out = []
        for x in images.split(part):
            x = x.to(self.device).float() / 255
            if x.shape[-1] != self.side:
                x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
            out.append(F.normalize(self.net.encode_image((x - mean) / std).float(), dim=1).cpu())
        return torch.cat(out)

    @torch.no_grad()
    def texts(self, texts, part=256):
        ids = trim(self.tok(texts, self.net.text.context)).split(part)
        return torch.cat([F.normalize(self.net.encode_text(i.to(self.device)).float(), dim=1).cpu() for i in ids])


def generated(count, seed, private, part="train"):
    """One object a picture; public ones have every texture, private ones are all spotted. part: train or test, which have no
    object in common."""
    world = [scenes.scene(i, seed, (1, 1), grid=2, part=part) for i in range(count)]
    if private:
        world = [replace(s, things=(replace(s.things[0], texture="spotted"),)) for s in world]
    x = scenes.render(world, 32)
    return world, torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def open_world(cfg, embed) -> World:
    """Prompts name a colour alone, which the stand-in CLIP sees and noise can hide; that all things are spotted here is what
    only the private set knows."""
    if bool(cfg.public) != bool(cfg.private):
        raise ValueError("--public and --private belong together: two folders of shards")
    if cfg.public:
        return open_folders(cfg, embed)
    public = generated(cfg.images, cfg.seed * 100 + 1, False)[1]
    private = generated(cfg.records, cfg.seed * 100 + 2, True)[1]
    world, test = generated(2 * cfg.prompts, cfg.seed * 100 + 3, True, "test")
    colours = [s.things[0].colour for s in world[: cfg.prompts]]
    prompts = [scenes.articles(f"a {colour} object") for colour in colours]
    return World(public, embed.pictures(public), embed.pictures(private), test, prompts, embed.texts(prompts), colours)


def open_folders(cfg, embed) -> World:
    def pictures(folder, split):
        source, cpu = data.Shards(folder, split), ddp.Env(0, 1, torch.device("cpu"))
        held = data.load(source, np.arange(len(source)), cfg.image_size, cpu, cfg.memory_gb, cfg.workers, cfg.max_bad)
        if not isinstance(held, dict):
            raise ValueError(f"{folder}, {split}: {len(source):,} pictures do not fit into --memory_gb {cfg.memory_gb:g}")
        return source.classes, held["image"], held["label"]

    held_out = data.held_out(cfg.private, ("test", "val"))
    public = pictures(cfg.public, "train")[1]
    classes, test, labels = pictures(cfg.private, held_out)
    rows = np.random.default_rng(cfg.seed).permutation(len(test))[: cfg.prompts]
    if len(rows) < cfg.prompts:
        print(f"{cfg.private} has {len(rows):,} held-out pictures, fewer than --prompts {cfg.prompts:,}", file=sys.stderr)
    if not (cfg.clip and cfg.vae):
        print("without --clip and --vae the stand-ins are used, which know generated scenes only", file=sys.stderr)
    labelled = classes and int(labels.max()) >= 0  # COCO's classes are those of boxes
    if labelled and not all(0 <= int(labels[r]) < len(classes) for r in rows):
        raise ValueError(f"{cfg.private}: some pictures of the split {held_out} have no label, or one outside the classes; "
                         "prepare them again")  # fmt: skip
    if labelled:
        prompts = [f"a photo of a {classes[int(labels[r])].replace('_', ' ')}" for r in rows]
    else:
        texts = [r["captions"][0] for r in data.records(data.Shards(cfg.private, held_out)) if r.get("captions")]
        if not texts:
            raise ValueError(f"{cfg.private}: the split {held_out} has neither classes nor captions to make prompts of")
        prompts = [texts[i % len(texts)] for i in rows]
    private = cfg.private_bank or pictures(cfg.private, "train")[1]  # the pictures themselves are not needed
    banks = [read_bank(x) if isinstance(x, str) else embed.pictures(x) for x in (cfg.public_bank or public, private)]
    if len(banks[0]) != len(public) or banks[0].shape[1] != banks[1].shape[1]:
        raise ValueError(f"--public_bank {tuple(banks[0].shape)} must have a row for each of {len(public):,} public pictures "
                         f"and as many columns as the private bank {tuple(banks[1].shape)}")  # fmt: skip
    queries = embed.texts(prompts)
    if banks[1].shape[1] != queries.shape[1]:
        raise ValueError(f"the banks have {banks[1].shape[1]} columns, --clip {queries.shape[1]}: embed them with this CLIP")
    banks = [torch.cat([unit(part).float() for part in b.split(65_536)]) for b in banks]  # unit() works in float64
    return World(public, *banks, test, prompts, queries)


# 5. EVALUATE ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Arm:
    """One row of the table. eps: budget, 0 = public pictures only, inf = not private."""

    eps: float
    queries: int = 0
    k: int = 0
    sigma: float = 0.0
    q: float = 1.0

    @property
    def name(self):
        if 0 < self.eps < math.inf:
            return f"epsilon {self.eps:g}, {self.queries:,} queries"
        return "not private" if self.eps else "public only" if not self.sigma else "public, as noisy"


def numbers(text, kind):
    return [kind(v) for v in text.split(",")]


def make_arms(cfg, N, public) -> list[Arm]:
    """The private ones take the fewest neighbours that the budget allows, rounded up. "public, as noisy" is like the arm whose
    epsilon is nearest to 10, on public pictures, with as many candidates in a subsample (or all): what is left between the two
    is what private records bring. --secure answers nothing unmetered."""
    delta, out = cfg.delta or 1 / N, [Arm(0.0, k=cfg.k)] + [Arm(math.inf, k=cfg.k)] * (not cfg.secure)
    for T in numbers(cfg.queries, int):
        for eps in numbers(cfg.budgets, float):
            k = whole_k(eps, cfg.q, cfg.sigma, T, delta)
            if k > N:
                raise ValueError(f"epsilon {eps:g} for {T:,} queries needs {k:,} neighbours, the private set has {N:,}; lower "
                                 "--q or --queries, or raise --sigma")  # fmt: skip
            out.append(Arm(eps, T, k, cfg.sigma, cfg.q))
    claim = min((a for a in out if 0 < a.eps < math.inf), key=lambda a: (abs(a.eps - 10), -a.queries))
    q = min(1.0, cfg.q * N / public)
    return out[:1] + [replace(claim, eps=0.0, q=q)] * (claim.k <= q * public) + out[1:]


class Answers:
    """Private answers (n, d) to an arm's queries in a file, one after the other: what was paid for is kept over a stop, and
    pictures can be drawn from it again with other settings. Noisy means are what the budget is spent on: they may be published,
    the ledger beside them may not."""

    def __init__(self, folder, arm, queries, ledger):
        what = hashlib.blake2b(f"{arm}".encode() + queries.contiguous().numpy().tobytes(), digest_size=6).hexdigest()
        self.path, d = Path(folder, f"answers_{arm.eps:g}_{arm.queries}_{what}.f64"), queries.shape[1]
        rows = np.fromfile(self.path) if self.path.exists() else np.zeros(0)
        self.given = torch.from_numpy(rows[: len(rows) // d * d].reshape(-1, d))
        if len(self.given) > ledger.queries():
            raise ValueError(f"{self.path} holds more answers than {ledger.path} has charges: paid from another ledger")
        ledger.check(arm.q, arm.sigma * arm.k / 2, len(queries) - len(self.given))  # all that are missing, or none

    def add(self, answer):
        with open(self.path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.tell() >= self.given.nbytes + answer.nbytes:
                raise ValueError(f"{self.path}: another process answers the same queries; stop one of the two")
            file.truncate(self.given.nbytes)  # without a torn row
            file.write(answer.numpy().tobytes())
        self.given = torch.cat([self.given, answer[None]])


def conditions(arm, world, cfg, ledger, random, answers=None) -> torch.Tensor:
    """Tokens (P, n, d) for the prompts of the evaluation. Private answers are charged first, each. Public only: the mean of the
    neighbours as in training, without noise. answers: those that were given before."""
    out, norms = [], world.private_bank.norm(dim=1)
    for i, query in enumerate(world.queries):
        bare = arm.eps == 0 and not arm.sigma
        rest = unit(query[None])  # one token acts as many equal ones
        if bare or (cfg.lam < 1 and cfg.other == "public"):
            rest = unit(world.public_bank[nearest(query, world.public_bank, cfg.k)])
        if bare or cfg.lam == 0:
            out.append(rest.mean(0, keepdim=True) if bare else rest)
            continue
        if arm.eps == 0:
            private = private_retrieve(query, world.public_bank, arm.k, arm.sigma, arm.q, random)
        elif math.isinf(arm.eps):
            private = private_retrieve(query, world.private_bank, arm.k, 0.0, norms=norms)
        elif answers and i < len(answers.given):
            private = answers.given[i]
        else:
            ledger.charge(arm.q, arm.sigma * arm.k / 2)
            private = private_retrieve(query, world.private_bank, arm.k, arm.sigma, arm.q, random, norms)
            if answers:
                answers.add(private)
        out.append(blend(private, rest, cfg.lam))
    return torch.stack(out).float()


def feature_model(cfg, embed, device):
    """-> function: uint8 (N, 3, S, S) -> features on the CPU: of FID's Inception; without it, of --clip for photographs and of
    the judge for generated scenes."""
    if cfg.public and not cfg.inception:
        return embed.pictures
    if cfg.inception:
        net = metrics.inception_features(cfg.inception).to(device).eval()
    else:
        judge = zoo.load_judge().to(device)
        net = lambda x: judge.features(x.float() / 127.5 - 1, 2)  # noqa: E731
    return torch.no_grad()(lambda images: torch.cat([net(x.to(device)).float().cpu() for x in images.split(256)]))


def evaluate(model, vae, features, real, embed, world, arm, cfg, env, out) -> tuple[dict[str, float], torch.Tensor]:
    """Distance of the pictures to the private domain (features real), density and coverage; CLIP similarity to the prompts,
    and whether the judge sees the colour they name."""
    ledger = answers = None
    if 0 < arm.eps < math.inf:
        # one for all that this folder answers in earnest: other numbers of queries add up, another budget is refused
        name = "ledger.jsonl" if cfg.secure else f"experiment_ledger_{arm.eps:g}_{arm.queries}.jsonl"
        if not cfg.secure:  # its noise is known to whoever knows the seed: the meter means nothing and starts anew
            (out / name).unlink(missing_ok=True)
        bank = hashlib.blake2b(world.private_bank.contiguous().numpy(), digest_size=12).hexdigest()
        ledger = Ledger(out / name, arm.eps, cfg.delta or 1 / len(world.private_bank), bank)
        answers = Answers(out, arm, world.queries, ledger) if cfg.secure and cfg.lam else None
    own = int.from_bytes(hashlib.blake2b(f"{cfg.seed} {arm}".encode(), digest_size=6).digest())  # each arm has its own noise
    random = Random(None if cfg.secure else own)
    tokens = conditions(arm, world, cfg, ledger, random, answers)
    shape = (vae.z, cfg.image_size // vae.factor, cfg.image_size // vae.factor)
    g = torch.Generator().manual_seed(cfg.seed + 1)
    noise = torch.randn(len(tokens), *shape, generator=g)
    images = []
    for t, n in zip(tokens.split(128), noise.split(128)):
        with torch.autocast(env.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            z = sample(model, t.to(env.device), n.to(env.device), cfg.guidance, cfg.sample_steps)
        images.append(vae.decode(z).cpu())
    images = torch.cat(images)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8)

    fake = features(pixels)
    sets = metrics.prdc(real, fake, 5)
    similarity = (embed.pictures(pixels) * world.queries).sum(1).mean().item()
    result = {"fd": metrics.frechet_distance(real, fake), "density": sets["density"], "coverage": sets["coverage"],
              "clip": 100 * similarity, "k": float(arm.k), "spent": ledger.spent() if ledger else 0.0}  # fmt: skip
    if world.colours:  # what the prompt names, anywhere in the picture
        judge = zoo.load_judge().to(env.device)
        read = [judge.read(x.to(env.device), 2) for x in images.split(256)]
        shape, seen = (torch.cat([r[k].cpu() for r in read]) for k in ("shape", "colour"))
        seen[shape == zoo.ANSWERS["shape"].index("nothing")] = -1  # the judge names a colour for empty cells, too
        asked = torch.tensor([zoo.ANSWERS["colour"].index(c) for c in world.colours])
        result["colour"] = 100 * (seen == asked[:, None]).any(1).float().mean().item()
    return result, pixels


def clopper_pearson(hits, n, confidence=0.99):
    """Exact interval of a binomial share."""

    i = torch.arange(n + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)

    def at_least(p, k):  # P(X >= k)
        return (ways + i * math.log(p) + (n - i) * math.log1p(-p))[k:].exp().sum().item()

    side = (1 - confidence) / 2
    low = solve(lambda p: at_least(p, hits), side, 1e-12, 1 - 1e-12, 1e-9) if hits else 0.0
    high = solve(lambda p: 1 - at_least(p, hits + 1), side, 1e-12, 1 - 1e-12, 1e-9) if hits < n else 1.0
    return low, high


def attack(k, sigma, q, delta, trials, seed=0, secretly=1.0):
    """A planted record: D' = copies of -x and the record x, D without x; the mean moves by 2/k, the worst case. Releases of
    both are told apart by their component along x, the likelihood-ratio test. -> epsilon, rows, whether the bound is broken.

    The guarantee: P[D' in S] <= e^eps P[D in S] + delta and the reverse. Broken: the favourable ends of exact 99 % intervals
    violate it. secretly: the true noise is this times sigma; 0.5 must be caught."""
    eps, x, random = epsilon_pld(q, sigma * k / 2, 1, delta), torch.tensor([1.0, 0.0]), Random(seed)
    without = -x.expand(8 * k, 2)  # so many that k of them are always in the subsample
    released = []
    for bank in (torch.cat([without, x[None]]), without):
        answers = [private_retrieve(x, bank, k, sigma * secretly, q, random)[0] for _ in range(trials)]
        released.append(torch.stack(answers).numpy())
    rows, broken = [], False
    for t in np.quantile(np.concatenate(released), (0.1, 0.5, 0.9, 0.95, 0.98, 0.99, 0.995)):
        hits = [int((r > t).sum()) for r in released]
        # the event that points to x, with and without it; and its complement, without and with it
        for side, a, b in (("above", *hits), ("below", *(trials - h for h in hits[::-1]))):
            caught = clopper_pearson(a, trials)[0] > math.exp(eps) * clopper_pearson(b, trials)[1] + delta
            broken |= caught
            rows.append([float(t), side, a / trials, b / trials, min(1.0, math.exp(eps) * b / trials + delta), caught])
    return eps, rows, broken


# 6. TRAIN ----------------------------------------------------------------------------------------------------------------
def neighbours_of(bank, k, env, block=512):
    """For every public picture its k nearest public embeddings (itself first, as released) -> (N, k) rows. Blocks are shared
    out among the processes."""
    bank = bank.to(env.device)
    mine = range(env.rank * block, len(bank), env.world * block)
    parts = [(i, (bank[i : i + block] @ bank.T).topk(k, dim=1).indices.cpu()) for i in mine]
    return torch.cat([rows for _, rows in sorted(ddp.gather_lists(parts), key=lambda part: part[0])])


def method_loss(model, z0, neighbours, u, noise, noise_cond, cfg):
    """Flow matching with noisy means. z0 (B, C, H, W); neighbours (B, k, d); u (B + 1, 2): time and dropout, last row: the
    scale of the condition's noise; noise like z0; noise_cond (B, d). -> scalar."""
    t = torch.sigmoid(torch.special.ndtri(u[:-1, 0].clamp(1e-6, 1 - 1e-6).double()).float())  # logit-normal times
    tokens = noisy_mean(neighbours, cfg.max_noise, u[-1, 0], noise_cond)
    zt = (1 - t)[:, None, None, None] * z0 + t[:, None, None, None] * noise
    with torch.autocast(z0.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
        out = model(zt, t, tokens, u[:-1, 1] >= cfg.drop)
    return (out.float() - (noise - z0)).square().mean()


def train(cfg, env, vae, world):
    """The public model, with exact resume. -> the EMA weights in a model."""
    out = Path(cfg.out_dir)
    with torch.no_grad():
        means = (vae.encode(x.to(env.device).float() / 127.5 - 1)[0] for x in world.public.split(256))
        z = torch.cat([vae.to_latent(mean).cpu() for mean in means])
    near = neighbours_of(world.public_bank, cfg.k, env)
    ddp.reseed(cfg.seed, 0, 0)
    model = Generator(world.public_bank.shape[1], tuple(z.shape[1:3]), cfg).to(env.device)
    wrapped = ddp.wrap(torch.compile(model) if cfg.compile else model, env)
    ema, shown = optim.Ema(model, cfg.ema_decay), copy.deepcopy(model).eval()
    opt = torch.optim.AdamW(optim.decay_groups(model, cfg.wd), cfg.lr, (0.9, 0.95), fused=True)
    trained = training_part(cfg)
    start, _ = ckpt.resume(out / "last.pt", trained, model=model, ema=ema, opt=opt)
    micro_size = cfg.batch_size // cfg.accum
    b = env.share(cfg.batch_size, accum=cfg.accum)
    rows = data.InMemory({"row": torch.arange(len(z))}, micro_size, env, cfg.seed, start * cfg.accum)
    log = RunLog(cfg, env, "public model", start)
    for step in range(start, cfg.steps):
        optim.set_lr(opt, cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup)))
        mean_loss = 0.0
        for micro in range(step * cfg.accum, (step + 1) * cfg.accum):
            row, g = next(rows)["row"], torch.Generator().manual_seed(cfg.seed * 1_000_003 + micro)
            u, noise = torch.rand(micro_size + 1, 2, generator=g), torch.randn(micro_size, *z.shape[1:], generator=g)
            extra = torch.randn(micro_size, world.public_bank.shape[1], generator=g)  # all for the global batch
            mine = slice(env.rank * b, (env.rank + 1) * b)
            batch = (z[row], world.public_bank[near[row]], torch.cat([u[mine], u[-1:]]), noise[mine], extra[mine])
            loss = method_loss(wrapped, *(v.to(env.device) for v in batch), cfg)
            (loss / cfg.accum).backward()
            mean_loss += loss.detach() / cfg.accum
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        opt.step()
        opt.zero_grad(set_to_none=True)
        ema.update(model)
        done, last = step + 1, step + 1 == cfg.steps
        due = done % cfg.log_every == 0 or last
        leave = ddp.interrupted(due)
        if due or leave or done % cfg.save_every == 0:
            ddp.check_finite({"loss": mean_loss.item(), "grad_norm": norm.item()}, step)
        if due:
            log.write(step, **ddp.mean({"loss": mean_loss}), lr=opt.param_groups[0]["lr"])
        log.tick(step)
        if env.is_main and (done % cfg.save_every == 0 or last or leave):
            ckpt.save(out / "last.pt", done, trained, model=model, ema=ema, opt=opt)
        if leave:
            log.close()
            raise KeyboardInterrupt
    shown.load_state_dict({**model.state_dict(), **ema.shadow})
    if env.is_main:
        ckpt.export(out / "model.safetensors", shown.state_dict())
        plot.save(plot.lines(history(log.dir, "loss"), "public model", y="loss"), out / "curves.png")
    log.close()
    return shown


def training_part(cfg: Config) -> Config:
    """The settings that the public model depends on: another budget, bank or guidance needs no new one."""
    free = ("sigma", "q", "budgets", "queries", "delta", "lam", "other", "secure", "guidance", "sample_steps", "private",
            "private_bank", "inception", "records", "prompts", "memory_gb", "trials")  # fmt: skip
    return replace(cfg, **{k: getattr(Config(), k) for k in free})


def check(cfg: Config) -> None:
    """One sentence for what a user can get wrong."""
    if cfg.data:
        raise ValueError("--data is not used here: give --public and --private")
    if cfg.secure and not (cfg.plan or cfg.attack) and "," in cfg.budgets + cfg.queries:
        raise ValueError("--secure needs one value of --budgets and one of --queries: each arm has a ledger of its own, and "
                         "what several spend adds up")  # fmt: skip
    if cfg.secure and cfg.seed:
        raise ValueError("--secure draws from the operating system and cannot be repeated; leave --seed out")
    if not 0 < cfg.q <= 1 or not 0 < cfg.sigma < math.inf or not 0 <= cfg.delta < 1 or not 0 <= cfg.lam <= 1:
        raise ValueError(f"--q {cfg.q} must be in (0, 1], --sigma {cfg.sigma} above 0, --delta {cfg.delta} in [0, 1), "
                         f"--lam {cfg.lam} in [0, 1]")  # fmt: skip
    cli.within(cfg, "steps k records images prompts trials sample_steps dim depth heads", 1)
    cli.choose(cfg, other=("public", "text"), dtype=("float32", "bfloat16"))
    for name, kind, what in (("budgets", float, "positive"), ("queries", int, "positive whole")):
        try:
            fine = all(0 < v < math.inf for v in numbers(getattr(cfg, name), kind))
        except ValueError:
            fine = False
        if not fine:
            raise ValueError(f"--{name} {getattr(cfg, name)} must be a comma list of {what} numbers")
    if not 0 <= cfg.drop <= 1 or not 0 <= cfg.max_noise < math.inf or not 0 <= cfg.guidance < math.inf:
        raise ValueError("--drop must be in [0, 1], --max_noise and --guidance must not be negative")
    if cfg.prompts < 6 and not (cfg.plan or cfg.attack):
        raise ValueError("--prompts must be at least 6: density and coverage look at five neighbours")
    if cfg.batch_size % cfg.accum:
        raise ValueError(f"--batch_size {cfg.batch_size} must be a multiple of --accum {cfg.accum}")
    if not cfg.public and (cfg.image_size != 32 or cfg.public_bank or cfg.private_bank):
        raise ValueError("generated pictures have 32 pixels and are embedded here; --image_size and banks go with --public")
    if not (cfg.plan or cfg.attack) and cfg.prompts > min(numbers(cfg.queries, int)):
        raise ValueError(f"the evaluation asks --prompts {cfg.prompts} times, more than --queries {cfg.queries} pays for")
    if cfg.clip and not cfg.tokenizer:
        raise ValueError("--clip needs --tokenizer, CLIP's merges file")


def run(cfg: Config) -> dict:
    """Trains the public model, then compares public-only, private and non-private retrieval."""
    check(cfg)
    if cfg.plan:
        return show_plan(cfg)
    if cfg.attack:
        return show_attack(cfg)
    env, out = ddp.start(cfg.seed), Path(cfg.out_dir)
    embed, vae = Embedder(cfg, env.device), (load_vae(cfg.vae) if cfg.vae else zoo.load_vae()).to(env.device)
    world = open_world(cfg, embed)
    N = len(world.private_bank)
    if cfg.k > min(N, len(world.public_bank)):
        raise ValueError(f"--k {cfg.k} is more than the {min(N, len(world.public_bank)):,} records of one of the sets")
    if len(world.test) < 6:
        raise ValueError(f"the private set has {len(world.test)} held-out pictures; density and coverage need 6 at least")
    arms, features = make_arms(cfg, N, len(world.public_bank)), feature_model(cfg, embed, env.device)
    model = train(cfg, env, vae, world)
    ddp.stop()  # rank 0 evaluates alone, for longer than any timeout
    if not env.is_main:
        return {}
    scores, pictures = {}, {}
    real = features(world.test)
    for arm in arms:
        if ddp.asked_to_stop():
            raise KeyboardInterrupt
        scores[arm], pictures[arm] = evaluate(model, vae, features, real, embed, world, arm, cfg, env, out)
        print(f"{arm.name}: Frechet distance {scores[arm]['fd']:.4g}", file=sys.stderr, flush=True)
    result = {f"{a.name} {k}": v for a, s in scores.items() for k, v in s.items()}
    report(cfg, world, scores, pictures, out)
    write_json(out / "metrics.json", result)
    return result


DOUBT = "delta x N is above 1/10 (the paper uses 1): the edge of what is meaningful on real data"


def report(cfg, world, scores, pictures, out) -> None:
    N, first = len(world.private_bank), next(iter(scores.values()))
    rows = [[a.name, f"{a.k:,}", f"{s['fd']:.4g}", f"{s['density']:.3f}", f"{s['coverage']:.3f}", f"{s['clip']:.1f}",
             f"{s['colour']:.1f}" if "colour" in s else "", f"{s['spent']:.3f}"] for a, s in scores.items()]  # fmt: skip
    spent = f"spent by {len(world.prompts)} queries"
    head = ["retrieval", "k", "Frechet distance", "density", "coverage", "CLIP", "colour right, %", spent]
    print(f"\n{N:,} private records, delta {cfg.delta or 1 / N:.2g}, sigma {cfg.sigma:g}, q {cfg.q:g}\n" + table(rows, head))
    if (cfg.delta or 1 / N) * N > 0.1:
        print(DOUBT)
    if few := [a for a in scores if a.eps and a.q < 1 and a.k > a.q * N]:
        print(f"{few[0].name}: {few[0].k:,} neighbours of {few[0].q * N:,.0f} expected rows; all that is drawn is averaged, "
              "whatever the prompt")  # fmt: skip
    if not cfg.secure:
        print("noise follows from --seed: an experiment. Before anything is published, repeat it with --secure")
    else:
        print("the epsilons of all arms and of all runs on these records add up, and samples.png shows private pictures:\n"
              "publish what one arm drew, no more")  # fmt: skip
    if cfg.sigma > cfg.max_noise:
        print(f"--sigma {cfg.sigma:g} is more noise than the model was trained with, --max_noise {cfg.max_noise:g}")
    rows, noisy = [], {(a.k, a.queries): s for a, s in scores.items() if a.name == "public, as noisy"}
    for a, s in scores.items():
        for name, base in (("public only", first), ("public, as noisy", noisy.get((a.k, a.queries)))):
            if 0 < a.eps < math.inf and base:
                paper = "-3.5 FID (COCO)" if a.eps == 10 and a.queries <= 10_000 and base is first else ""
                rows.append([f"{a.name}, improves on {name}", f"{base['fd']:.4g}", f"{s['fd']:.4g}",
                             f"{s['fd'] - base['fd']:+.3g}", paper])  # fmt: skip
    print("\n" + table(rows, ["claim (Frechet distance)", "public", "private", "difference", "paper"]))
    budgets, charts = numbers(cfg.budgets, float), []
    for key, title, y in (("fd", "distance to the private domain", "Frechet distance"),
                          ("colour", "prompt's colour right", "%")):  # fmt: skip
        curves = {}
        for a, s in scores.items():
            flat = not 0 < a.eps < math.inf  # the arms without a budget
            xs, ys = curves.setdefault(a.name if flat else f"{a.queries:,} queries", ([], []))
            xs += [min(budgets), max(budgets)] if flat else [a.eps]
            ys += [s.get(key, math.nan)] * (2 if flat else 1)
        if key in first:
            charts.append(plot.lines(curves, title, x="epsilon", y=y, size=(620, 420)))
    plot.save(plot.row(charts), out / "budget.png")
    cells, texts = list(world.test[:8].permute(0, 2, 3, 1).numpy()), ["private domain", *[""] * 7]
    for a, x in pictures.items():
        cells += list(x[:8].permute(0, 2, 3, 1).numpy())
        texts += [f"{a.name}, k = {a.k}", *[""] * 7]
    plot.save(plot.grid(cells, 8, texts, None, "   ".join(world.prompts[:4]) + " ...", 96, 3), out / "samples.png")
    print(f"\npictures, curves, ledgers and weights: {cfg.out_dir}")


def show_plan(cfg) -> dict:
    """What a privacy engineer asks before anything is trained: how many neighbours for a budget, how many queries for k."""
    N, out, needs, lasts = cfg.records, {}, [], []
    delta = cfg.delta or 1 / N
    budgets = numbers(cfg.budgets, float)
    rates = list(dict.fromkeys((1.0, 0.1, cfg.q, 0.01, 0.001)))
    for q in rates:
        for T in numbers(cfg.queries, int):
            for eps in budgets:
                k = whole_k(eps, q, cfg.sigma, T, delta)
                z = cfg.sigma * k / 2
                rdp_eps, order = to_epsilon(ORDERS, T * rdp(q, z, ORDERS), delta)
                end = " (end of the grid)" * (order >= ORDERS[-1] or order <= ORDERS[0])
                doubt = " > N" if k > N else " > q N" if k > q * N else ""
                needs.append([f"{q:g}", f"{T:,}", f"{eps:g}", f"{k:,}{doubt}", f"{z:.3f}", f"{rdp_eps:.3f}",
                              f"{order:g}{end}", f"{epsilon(q, z, T, delta, 'classic'):.3f}",
                              f"{epsilon_pld(q, z, T, delta):.3f}"])  # fmt: skip
                out[f"k for epsilon {eps:g}, {T} queries, q {q:g}"] = k
    for k in (8, 16, 32, 64, 128, 256):
        counts = [find_queries(eps, cfg.q, cfg.sigma * k / 2, delta) for eps in budgets]
        lasts.append([str(k), f"{cfg.sigma * k / 2:g}", *(f"{c:,}" for c in counts)])
    doubt = f"\n{DOUBT}" if delta * N > 0.1 else ""
    print(f"N = {N:,}, delta = {delta:.3g}, sigma = {cfg.sigma:g} on the mean of k neighbours, z = sigma k / 2{doubt}")
    print("adjacency: one record added or removed; Poisson subsample with rate q, drawn anew for each query\n")
    head = ["q", "queries", "budget", "k", "z", "eps, RDP", "order", "eps, classic RDP", "eps, PLD"]
    print("neighbours that a budget asks for, by RDP\n" + table(needs, head))
    print(f"\nqueries that a budget lasts for, q = {cfg.q:g}\n" + table(lasts, ["k", "z", *(f"eps {e:g}" for e in budgets)]))
    return out


def show_attack(cfg) -> dict:
    """The bound against the best attack, and against the same with half the noise, which must be caught."""
    k, sigma, delta, out = 4, 0.5, 0.01, {}
    for q in (1.0, 0.5):
        for name, secretly in (("as claimed", 1.0), ("noise secretly halved", 0.5)):
            eps, rows, broken = attack(k, sigma, q, delta, cfg.trials, cfg.seed, secretly)
            text = [[f"{t:+.3f} {side}", *(f"{v:.5f}" for v in (a, b, bound)), "BROKEN" if bad else ""]
                    for t, side, a, b, bound, bad in rows]  # fmt: skip
            print(f"\n{name}: k {k}, sigma {sigma}, q {q:g}, one query, epsilon {eps:.3f} (PLD), delta {delta:g}")
            print(table(text, ["release", "likelier set", "other set", "e^eps other + delta", ""]))
            out[f"{name}, q {q:g}: broken"] = float(broken)
    held = not any(v for n, v in out.items() if n.startswith("as claimed"))
    caught = all(v for n, v in out.items() if n.startswith("noise"))
    print(f"\n{cfg.trials:,} trials each: " + ("the bound holds" if held else "THE BOUND IS BROKEN"), end="; ")
    print("halved noise is caught" if caught else "halved noise is NOT caught: more --trials")
    return out


# 7. MAIN -----------------------------------------------------------------------------------------------------------------
PRESETS = {
    "smoke": dict(steps=4, batch_size=8, records=64, images=64, prompts=8, dim=32, depth=1, heads=2, sample_steps=2, q=0.5,
                  sigma=0.5, budgets="10", queries="8", log_every=2, save_every=2, out_dir="runs/dp_rdm_smoke"),
    "laptop": {},
    "gpu": dict(steps=20_000, batch_size=512, queries="5000,50000", records=200_000, images=200_000, prompts=2_000,
                dim=384, depth=12, heads=6, lr=5e-4, ema_decay=0.999, dtype="bfloat16", q=0.01, sample_steps=50,
                save_every=1_000, out_dir="runs/dp_rdm_gpu"),
    # released: blurred ImageNet as public, MS-COCO as private; the number of updates is not known. The paper's figures for COCO
    # mix in public neighbours (--lam 0.5)
    "paper": dict(public="data/imagenet_blurred", private="data/coco", clip="data/metaclip-vit-b-16", vae="data/sd-vae",
                  tokenizer="data/bpe_simple_vocab_16e6.txt.gz", memory_gb=320.0,
                  image_size=256, steps=400_000, batch_size=1_280, lr=1e-4, warmup=100, ema_decay=0.9999, dtype="bfloat16",
                  dim=1152, depth=28, heads=16, q=0.01, sigma=0.05, max_noise=0.05, sample_steps=100, workers=12,
                  save_every=5_000, queries="10000", prompts=10_000, inception="data/pt_inception-2015-12-05-6726825d.pth",
                  out_dir="runs/dp_rdm_coco"),
}  # fmt: skip

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
