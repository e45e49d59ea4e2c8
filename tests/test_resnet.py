"""common/resnet.py: the wide ResNet's size and shortcuts."""

import pytest
import torch

from common.resnet import Residual, ResNet, WideResNet


def test_wrn_28_8_has_its_parameters():
    """23.40 million with a classifier of 100 classes, as users of the semi-supervised benchmarks report (23 to 24)."""
    net = WideResNet(28, 8)
    assert sum(p.numel() for p in net.parameters()) + 512 * 100 + 100 == 23_401_012
    assert sum(isinstance(m, torch.nn.Conv2d) for m in net.modules()) == 1 + 24 + 3  # stem, 12 blocks, 3 shortcuts
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 512)
    assert WideResNet(10, 1).stem(torch.randn(1, 3, 32, 32)).shape[-1] == 32
    with pytest.raises(ValueError, match="depth"):
        WideResNet(27, 8)


def test_the_identity_is_the_input_itself():
    block = Residual(8, 8, 1).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 8, 6, 6)
    assert block.short is None and torch.equal(block(x), x)
    assert Residual(8, 16, 2)(x).shape == (2, 16, 3, 3) and ResNet(8)(torch.randn(2, 3, 24, 24)).shape == (2, 32)
