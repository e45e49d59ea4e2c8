"""Evaluation numbers, each checked against a slow or published definition in tests/test_metrics.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def frechet_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """|mean_x - mean_y|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)) of features (N, D) and (M, D), in float64.

    The trace of the root is the nuclear norm of Xc Yc^T / sqrt((N - 1)(M - 1)), Xc and Yc centred: no matrix root, and no
    covariance that would square the condition number. With the R factors of Xc and Yc that product is only D x D."""
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features {tuple(x.shape)} and {tuple(y.shape)}: two rows at least, and equal columns")
    x, y = x.double(), y.double()
    gap = (x.mean(0) - y.mean(0)).square().sum()
    x, y = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (x, y))
    rx, ry = (torch.linalg.qr(f, mode="r").R for f in (x, y))
    root = torch.linalg.svdvals(rx @ ry.T).sum()
    return (gap + x.square().sum() + y.square().sum() - 2 * root).clamp_min(0).item()


def knn_accuracy(f: torch.Tensor, y: torch.Tensor, f_test: torch.Tensor, y_test: torch.Tensor, k=20, tau=0.07) -> float:
    """Top-1 in percent of a vote of the k training features (N, D) of largest cosine, weighted by exp(cosine / tau)."""
    f, f_test, right = F.normalize(f.float(), dim=1), F.normalize(f_test.float(), dim=1), 0
    votes = F.one_hot(y).float()
    for part, labels in zip(f_test.split(1024), y_test.split(1024)):
        cosine, near = (part @ f.T).topk(min(k, len(f)), 1)
        score = (votes[near] * ((cosine - 1) / tau).exp()[..., None]).sum(1)
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

    f_query (Q, D), f_item (I, D): unit features; match (Q, I) bool: which items are right (several are allowed).
    A right item's rank counts every wrong item that scores at least as much: ties never help."""
    scores = f_query.float() @ f_item.float().T
    best = scores.masked_fill(~match, -torch.inf).amax(1, keepdim=True)
    rank = ((scores >= best) & ~match).sum(1)
    return {k: 100 * (rank < k).float().mean().item() for k in ks}


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
