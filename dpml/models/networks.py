"""The networks behind `dpml.models.build`, which validates what they are given."""

import math

import torch
from torch import nn

from accounting.errors import UserError


def linear(example_shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Multinomial logistic regression on the flattened example."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(example_shape), classes))


def linear_without_bias(example_shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """The same through the origin, for centred inputs x of norm 1.

    A per-example gradient is e xᵀ, and with a bias [e xᵀ, e], where e is probabilities minus the label. The
    bias thus takes half of the squared norm that is clipped, and centred classes of equal size do without.
    The weights then learn the same from gradients whose noise is larger by √2.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(example_shape), classes, bias=False))


def mlp(example_shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Two hidden layers of 128 tanh units on the flattened example."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(example_shape), 128),
        nn.Tanh(),
        nn.Linear(128, 128),
        nn.Tanh(),
        nn.Linear(128, classes),
    )


def cnn(example_shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Tanh convolutional networks: Papernot et al. 2020's, a smaller one, and one for maps of features.

    ==================  ================================================================
    input               network
    ==================  ================================================================
    5 or more channels  Tramèr & Boneh 2021's for CIFAR-10: scaled to mean 0 and variance
                        1 each, 64 filters of 3×3, pooled, 64 filters, linear
    a side below 20     16 and 32 filters of 3×3, each pooled; 32 units
    one channel         Papernot et al.'s for MNIST (28×28: 26,010 parameters)
    2 to 4 channels     Papernot et al.'s for CIFAR-10 (3×32×32: 550,570 parameters)
    ==================  ================================================================

    A last map larger than 4×4, which is what the papers' networks end in, is averaged down to 4×4. The
    number of parameters, and with it the norm of the noise, thus stops to grow with the image.

    Raises:
        UserError: `example_shape` is not `(channels, height, width)`, or a side is below 4 (of maps, 2).
    """
    are_maps = example_shape[0] > 4
    least = 2 if are_maps else 4
    if len(example_shape) != 3 or min(example_shape[1:]) < least:
        raise UserError(
            f"The model 'cnn' needs images of shape (channels, height, width), at least {least}×{least}, got "
            f"{example_shape}: choose 'mlp' or 'linear'."
        )
    channels, hidden = example_shape[0], 32
    if are_maps:
        body, hidden = _maps(channels), 0
    elif min(example_shape[1:]) < 20:
        body = _small(channels)
    elif channels == 1:
        body = _mnist()
    else:
        body, hidden = _cifar(channels), 128
    with torch.no_grad():  # the shape of the last map, from one blank image
        filters, *sides = nn.Sequential(*body)(torch.zeros(1, *example_shape)).shape[1:]
    if max(sides) > 4:
        sides = [min(side, 4) for side in sides]
        body.append(nn.AdaptiveAvgPool2d((sides[0], sides[1])))
    features = filters * math.prod(sides)
    head: list[nn.Module] = [nn.Linear(features, hidden), nn.Tanh()] if hidden else []
    return nn.Sequential(*body, nn.Flatten(), *head, nn.Linear(hidden or features, classes))


def _maps(channels: int) -> list[nn.Module]:
    """Halve the sides: 243×8×4 features end in 64 maps of 4×2."""
    return [
        nn.GroupNorm(1, channels, affine=False),
        nn.Conv2d(channels, 64, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Tanh(),
    ]


def _small(channels: int) -> list[nn.Module]:
    """Quarter the sides: 8×8 digits end in 32 maps of 2×2."""
    layers: list[nn.Module] = []
    for before, after in ((channels, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)]
    return layers


def _mnist() -> list[nn.Module]:
    """28×28 images end in 32 maps of 4×4."""
    return [
        nn.Conv2d(1, 16, 8, stride=2, padding=3),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
    ]


def _cifar(channels: int) -> list[nn.Module]:
    """Divide the sides by eight: 32×32 images end in 128 maps of 4×4."""
    layers: list[nn.Module] = []
    for before, after in ((channels, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.Tanh()]
        layers += [nn.Conv2d(after, after, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)]
    return layers
