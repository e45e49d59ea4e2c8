"""Pre-activation ResNets for 24 to 64 px pictures: a small one for CPU runs, and the wide ones of semi-supervised CIFAR
(Zagoruyko and Komodakis 2016; WRN-28-8: 23.4 million parameters with a classifier of 100). ResNet-50 comes from torchvision."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    """BN ReLU conv, BN ReLU conv; the input itself as shortcut, or where the shape changes a 1 x 1 convolution of BN ReLU."""

    def __init__(self, a: int, b: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(a), nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(b), nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(a, b, 1, stride, bias=False) if stride > 1 or a != b else None

    def forward(self, x):
        y = F.relu(self.bn1(x))
        x = x if self.short is None else self.short(y)
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))


class ResNet(nn.Module):
    """Images (B, 3, H, W) -> (B, 4 * width), average-pooled: three blocks, each halving the side."""

    def __init__(self, width: int):
        super().__init__()
        w, self.out_dim = width, 4 * width
        self.stem = nn.Conv2d(3, w, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(Residual(w, 2 * w, 2), Residual(2 * w, 4 * w, 2), Residual(4 * w, 4 * w, 2))
        self.norm = nn.BatchNorm2d(4 * w)

    def forward(self, x):
        return F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3))


class WideResNet(nn.Module):
    """WRN-depth-widen: images (B, 3, H, W) -> (B, 64 * widen). Three groups of (depth - 4) / 6 blocks at 1, 1/2 and 1/4 of the
    side; He initialisation."""

    def __init__(self, depth: int = 28, widen: int = 8):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"a wide ResNet of depth {depth} does not exist; depth is 4 + 6 n: 10, 16, 22, 28, ...")
        widths, self.out_dim = [16, 16 * widen, 32 * widen, 64 * widen], 64 * widen
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(*[
            Residual(widths[g] if i == 0 else widths[g + 1], widths[g + 1], 2 if g and i == 0 else 1)
            for g in range(3) for i in range((depth - 4) // 6)
        ])  # fmt: skip
        self.norm = nn.BatchNorm2d(self.out_dim)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3))
