"""common/metrics.py against slow definitions."""

import pytest
import torch

from common import metrics as M


def test_roc_auc_equals_all_pairs():
    torch.manual_seed(0)
    s, y = torch.randint(0, 9, (80,)).float(), torch.rand(80) < 0.3
    pos, neg = s[y], s[~y]
    want = ((pos[:, None] > neg).double() + 0.5 * (pos[:, None] == neg)).mean() * 100
    assert M.roc_auc(s, y.long()) == pytest.approx(want.item())
    with pytest.raises(ValueError, match="both classes"):
        M.roc_auc(s, torch.ones(80))


def test_accuracy_and_mean_per_class():
    scores, y = torch.eye(3)[[0, 0, 0, 1, 0]], torch.tensor([0, 0, 0, 1, 1])
    assert M.accuracy(scores, y) == pytest.approx(80) and M.accuracy(scores, y, per_class=True) == pytest.approx(75)


def test_a_caption_fits_every_record_that_has_it():
    texts, match = M.caption_matches([{"captions": ["a", "b"]}, {"captions": ["b"]}, {"captions": ["c", "c"]}])
    assert texts == ["a", "b", "b", "c", "c"]
    assert match.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]]


def test_retrieval_equals_loops_and_ties_do_not_help():
    torch.manual_seed(0)
    q, x = torch.randn(20, 6), torch.randn(30, 6)
    match = torch.rand(20, 30) < 0.1
    match[torch.arange(20), torch.arange(20)] = True
    got = M.retrieval_recall(q, x, match, (1, 3))
    for k in (1, 3):
        hits = [match[i][(x @ q[i]).argsort(descending=True)[:k]].any() for i in range(20)]
        assert got[k] == pytest.approx(100 * sum(map(float, hits)) / 20)
    constant = M.retrieval_recall(torch.ones(4, 2), torch.ones(5, 2), torch.eye(4, 5).bool())
    assert constant[1] == 0.0  # a collapsed encoder scores nothing


def test_frechet_distance_against_the_matrix_root():
    """The definition, by eigenvalues of Sx Sy."""
    g = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(300, 12, generator=g).double(),
        (torch.randn(200, 12, generator=g) @ torch.randn(12, 12, generator=g)).double() + 1,
    )
    sx, sy = torch.cov(x.T), torch.cov(y.T)
    root = torch.linalg.eigvals(sx @ sy).real.clamp_min(0).sqrt().sum()
    want = (x.mean(0) - y.mean(0)).square().sum() + sx.trace() + sy.trace() - 2 * root
    assert M.frechet_distance(x, y) == pytest.approx(want.item(), rel=1e-9)
    assert M.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert M.frechet_distance(x, x + 2) == pytest.approx(48, rel=1e-9)  # a shift of 2 in 12 dimensions
    few = x[:5]  # fewer rows than columns: a singular covariance
    assert 0 < M.frechet_distance(few, y) < float("inf")
    with pytest.raises(ValueError, match="equal columns"):
        M.frechet_distance(x, y[:, :5])


def test_knn_equals_loops():
    torch.manual_seed(0)
    f, y, g, z = torch.randn(40, 5), torch.randint(0, 3, (40,)), torch.randn(15, 5), torch.randint(0, 3, (15,))
    right = 0
    for v, label in zip(g, z):
        cosine = torch.cosine_similarity(f, v[None], dim=1)
        votes = torch.zeros(3)
        for i in cosine.argsort(descending=True)[:7]:
            votes[y[i]] += torch.exp(cosine[i] / 0.07)
        right += int(votes.argmax() == label)
    assert M.knn_accuracy(f, y, g, z, 7) == pytest.approx(100 * right / 15)
    assert M.knn_accuracy(f, y, f, y, 1) == 100


def test_linear_probe_reaches_the_minimum_and_separates():
    torch.manual_seed(0)
    y = torch.randint(0, 3, (90,))
    f = torch.eye(3)[y] * 4 + torch.randn(90, 3) + 100
    probe = M.linear_probe(f, y, 1e-3)
    assert M.accuracy(probe(f), y) > 95
    # the gradient vanishes: softmax minus labels, with the penalty, on standardised features
    x = (f - f.mean(0)) / f.std(0)
    W = torch.linalg.lstsq(torch.cat([x, torch.ones(90, 1)], 1), probe(f)).solution
    grad = x.T @ (probe(f).softmax(1) - torch.eye(3)[y]) / 90 + 1e-3 * W[:3]
    assert grad.abs().max() < 2e-3
