import pytest
import torch
from torch import nn

from dpml.models import build
from dpml.models.layers import StandardizedConv2d
from dpml.models.wide_resnet import Residual

GENERATOR = torch.Generator().manual_seed(0)


def filters(layer):
    """The filters that a convolution applies, one row each, as seen from outside: one pixel at a time."""
    fan_in = layer.weight[0].numel()
    pixels = torch.eye(fan_in).view(fan_in, *layer.weight.shape[1:])
    return (layer(pixels) - layer(torch.zeros_like(pixels)))[:, :, 0, 0].T


def test_standardised_filters_have_mean_zero_and_norm_gain():
    layer = StandardizedConv2d(3, 5, 3)
    with torch.no_grad():
        layer.gain.copy_(torch.arange(5.0).view(5, 1, 1, 1))
        seen = filters(layer)
    torch.testing.assert_close(seen.mean(dim=1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(seen.norm(dim=1), torch.arange(5.0))


@pytest.mark.parametrize("change", [lambda w: 3 * w, lambda w: w + 2])
def test_scale_and_shift_of_a_filter_do_not_matter(change):
    layer = StandardizedConv2d(3, 5, 3)
    x = torch.randn(2, 3, 8, 8, generator=GENERATOR)
    with torch.no_grad():
        before = layer(x)
        layer.weight.copy_(change(layer.weight))
        torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)


def test_a_filter_of_equal_weights_is_zero_not_nan():
    layer = StandardizedConv2d(2, 3, 3, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.1)
    out = layer(torch.ones(1, 2, 4, 4))
    out.sum().backward()
    assert out.abs().max() < 1e-4
    assert torch.isfinite(layer.weight.grad).all()


def test_every_convolution_is_standardised_and_follows_relu_and_group_norm():
    model = build("wrn-16-4", (3, 32, 32), 10)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 1 + 3 * (2 * 2 + 1)  # 16 layers with weights but the head, and 3 shortcuts
    assert all(isinstance(m, StandardizedConv2d) for m in convolutions)
    assert [m.out_channels for m in convolutions[1::5]] == [64, 128, 256]
    assert all(m.num_groups == 16 for m in model.modules() if isinstance(m, nn.GroupNorm))


def test_a_block_is_relu_norm_convolution_twice_beside_a_shortcut():
    block = Residual(16, 32, stride=2, project=True)
    x = torch.randn(2, 16, 9, 9, generator=GENERATOR)
    y = block.conv1(block.norm1(x.relu()))
    y = block.conv2(block.norm2(y.relu()))
    _, norm, convolution = block.shortcut
    torch.testing.assert_close(block(x), y + convolution(norm(x.relu())))
    same = Residual(16, 16, stride=1, project=False)
    with torch.no_grad():
        same.conv2.gain.zero_()
        same.conv2.bias.zero_()
    assert torch.equal(same(x), x)


def test_channels_last_gives_the_same_logits():
    model = build("wrn-16-4", (3, 16, 16), 10)
    x = torch.randn(2, 3, 16, 16, generator=GENERATOR)
    with torch.no_grad():
        other = model(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(model(x), other, atol=1e-4, rtol=1e-4)
