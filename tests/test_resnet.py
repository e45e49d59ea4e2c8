"""common/resnet.py: the wide ResNet's size and shortcuts."""

import pytest
import torch
import torch.nn.functional as F

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


# By hand ---------------------------------------------------------------------------------------------------------------


def test_a_wide_resnet_by_hand():
    torch.manual_seed(0)
    net, x = WideResNet(16, 1), torch.randn(2, 3, 16, 16)
    sides = [b(y).shape[2:] for b, y in zip(net.blocks, [net.blocks[:i](net.stem(x)) for i in range(6)])]
    assert [s[0] for s in sides] == [16, 16, 8, 8, 4, 4]  # two groups of three halve the side
    for conv in (m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.numel() > 2000):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    y = F.relu(net.norm(net.blocks(net.stem(x)))).mean((2, 3))
    torch.testing.assert_close(net(x), y)
    assert net(x).min() >= 0


def test_a_shortcut_that_changes_the_shape_starts_behind_the_norm():
    torch.manual_seed(0)
    block, x = Residual(4, 6, 2).eval(), torch.randn(2, 4, 8, 8)
    y = F.relu(block.bn1(x))
    torch.testing.assert_close(block(x), block.short(y) + block.conv2(F.relu(block.bn2(block.conv1(y)))))
    small = ResNet(4).eval()
    assert [b.short is None for b in small.blocks] == [False, False, False] and small.blocks(
        small.stem(torch.randn(1, 3, 32, 32))
    ).shape[-1] == 4
    assert small(torch.randn(3, 3, 16, 16)).min() >= 0
