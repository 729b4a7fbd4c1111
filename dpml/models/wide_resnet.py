"""The wide residual network of De et al. 2022 ("Unlocking high-accuracy DP image classification ...")."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from accounting.errors import UserError
from dpml.models.layers import StandardizedConv2d

GROUPS = 16


class Residual(nn.Module):
    """Two convolutions of 3×3 beside a shortcut; each convolution follows a ReLU and a GroupNorm.

    The order, ReLU before the norm, is that of the authors' code (jax-privacy). If the shape changes, the
    shortcut has a ReLU, a norm and a convolution of 1×1 of its own.
    """

    def __init__(self, before: int, after: int, stride: int, project: bool) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, before)
        self.conv1 = StandardizedConv2d(before, after, 3, stride=stride, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, after)
        self.conv2 = StandardizedConv2d(after, after, 3, padding=1)
        self.shortcut = nn.Sequential()
        if project:
            convolution = StandardizedConv2d(before, after, 1, stride=stride)
            self.shortcut = nn.Sequential(nn.ReLU(), nn.GroupNorm(GROUPS, before), convolution)

    def forward(self, x: Tensor) -> Tensor:
        """From [m, before, height, width] to [m, after, height/stride, width/stride], rounded up."""
        y = self.conv1(self.norm1(functional.relu(x)))
        y = self.conv2(self.norm2(functional.relu(y)))
        out: Tensor = y + self.shortcut(x)
        return out


class WideResNet(nn.Module):
    """WRN-16-4: a convolution, three groups of two blocks of width 64, 128 and 256, and a linear head.

    GroupNorm of 16 groups stands in place of batch normalisation, and each convolution has standardised
    weights, a gain and a bias. 2,753,818 parameters for three channels and ten classes.

    Args:
        channels: Channels of an image.
        classes: Number of classes.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        before = 16
        for after, stride in ((64, 1), (128, 2), (256, 2)):
            blocks += [
                Residual(before, after, stride, project=True),
                Residual(after, after, 1, project=False),
            ]
            before = after
        self.first = StandardizedConv2d(channels, 16, 3, padding=1)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(GROUPS, before)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """From images [m, channels, height, width] to logits [m, classes]."""
        x = self.norm(functional.relu(self.blocks(self.first(x))))
        logits: Tensor = self.head(torch.mean(x, dim=(2, 3)))
        return logits


def wrn_16_4(example_shape: tuple[int, ...], classes: int) -> WideResNet:
    """WRN-16-4 for images of at least 16×16.

    Raises:
        UserError: `example_shape` is not `(channels, height, width)`, or a side is below 16.
    """
    if len(example_shape) != 3 or min(example_shape[1:]) < 16:
        raise UserError(
            f"The model 'wrn-16-4' needs images of shape (channels, height, width), at least 16×16, got "
            f"{example_shape}: choose 'cnn', 'mlp' or 'linear'."
        )
    return WideResNet(example_shape[0], classes)
