"""methods/xsample.py against lightly's NT-Xent and pytorch-metric-learning's SupCon and NT-Xent."""

import pytest
import torch
import torch.nn.functional as F

from common.vision import torchvision  # noqa: F401  (before lightly imports it)
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
