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
