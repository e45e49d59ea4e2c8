"""A small pre-activation ResNet for 24 to 64 px pictures: the backbone of CPU runs. ResNet-50 comes from torchvision."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    """BN ReLU conv, BN ReLU conv, and a 1 x 1 shortcut where the shape changes."""

    def __init__(self, a: int, b: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(a), nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(b), nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(a, b, 1, stride, bias=False) if stride > 1 or a != b else nn.Identity()

    def forward(self, x):
        x = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(x)))) + self.short(x)


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
