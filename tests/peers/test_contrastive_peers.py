"""methods/xsample.py against lightly's NT-Xent and pytorch-metric-learning's SupCon and NT-Xent; methods/semisup_cluster.py
against lightly's SwAV and DINO losses."""

import pytest
import torch
import torch.nn.functional as F

from common.vision import torchvision  # noqa: F401  (before lightly imports it)
from methods import semisup_cluster as S
from methods.xsample import xclr_loss

N, D = 10, 16


def views():
    torch.manual_seed(0)
    return F.normalize(torch.randn(2 * N, D), dim=1), torch.randint(0, 4, (N,))


def test_simclr_equals_lightly():
    loss = pytest.importorskip("lightly.loss").NTXentLoss(temperature=0.2)
    z, _ = views()
    torch.testing.assert_close(xclr_loss(z, torch.eye(N), 0.2, 0.0), loss(z[:N], z[N:]), atol=1e-5, rtol=0)


def test_simclr_and_supcon_equal_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z, y = views()
    ids = torch.arange(N).repeat(2)
    torch.testing.assert_close(xclr_loss(z, torch.eye(N), 0.2, 0.0), losses.NTXentLoss(0.2)(z, ids), atol=1e-5, rtol=0)
    want = losses.SupConLoss(0.2)(z, y.repeat(2))
    torch.testing.assert_close(xclr_loss(z, (y[:, None] == y).float(), 0.2, 0.0), want, atol=1e-5, rtol=0)


def rows(count, width=7):
    return [F.normalize(torch.randn(N, width), dim=1) for _ in range(count)]


@pytest.mark.parametrize("length", [0, 40])
def test_swav_equals_lightly(length):
    """Two global and three local views, without and with features of a queue."""
    loss = pytest.importorskip("lightly.loss").SwaVLoss()
    torch.manual_seed(0)
    prototypes, z = F.normalize(torch.randn(5, 7), dim=1), rows(5)
    scores = [(v @ prototypes.T).requires_grad_() for v in z]
    queue = S.Queue(2, length, 7)
    queue.z.copy_(F.normalize(torch.randn(2, length, 7), dim=2))
    past = [q @ prototypes.T for q in queue.z] if length else None
    want = loss(scores[:2], scores[2:], past)
    ours = S.unlabelled_loss(scores, [queue.targets(i, z[i], prototypes, 0.05) for i in (0, 1)], 0.1)
    torch.testing.assert_close(ours, want[0], atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, scores), torch.autograd.grad(want, scores)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_dino_equals_lightly():
    """Loss and centre over three updates; two global and three local views."""
    loss = pytest.importorskip("lightly.loss").DINOLoss(5, student_temp=0.1, center_momentum=0.9)
    torch.manual_seed(0)
    center = torch.zeros(1, 5)
    for _ in range(3):
        student, teacher = [torch.randn(N, 5) for _ in range(5)], [torch.randn(N, 5) for _ in range(2)]
        want = loss(teacher, student, teacher_temp=0.05)
        targets = [S.dino_targets(t, center, 0.05) for t in teacher]
        torch.testing.assert_close(S.unlabelled_loss(student, targets, 0.1), want, atol=1e-5, rtol=1e-5)
        center = S.dino_center_update(center, torch.cat(teacher))
        torch.testing.assert_close(center, loss.center[0], atol=1e-6, rtol=0)
