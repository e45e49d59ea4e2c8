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
