"""From images to features of norm 1, by name: wavelet scattering, random patches, or both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from accounting import UserError
from dpml.config import FEATURE_MAPS
from dpml.features.blocks import blocks_of
from dpml.features.synthetic import dead_leaves

_BLOCKS = {
    "scattering": ("scattering",),
    "patches": ("patches", "coarse-patches"),
    "scattering-patches": ("scattering", "coarse-scattering", "patches"),
}
_LEAST_SIDE = 16
_SYNTHETIC, _SEED = 600, 2
_WHITENING = {1: 0.8, 3: 0.5}
"""By channels: 0 would leave maps as they are, 1 make them white."""
_SHARES = {"scattering": 1.0, "coarse-scattering": 0.5, "patches": 1.0, "coarse-patches": 0.5}
"""Of a block in the squared norm, relative to each other."""
_RIDGE = 1e-2
"""Relative to the mean variance."""
_CHUNK = 8  # more would leave the processor's cache


class FeatureMap:
    """Features of images of one shape.

    The maps of each block (`dpml.features.blocks`) are centred and partly whitened, by their mean and
    covariance on synthetic images: what varies most in all images then drowns less of what tells them apart,
    and less of a clipped gradient is spent on it. Together they are scaled to norm 1; a coarse block has half
    the share of another.
    Features of an image depend on that image alone; in another batch they may differ by rounding.

    Args:
        name: "scattering", "patches" or "scattering-patches".
        example_shape: `(channels, height, width)`; 1 or 3 channels, sides of 16 or more.

    Attributes:
        blocks: Functions from images to maps, by name.
        shape: Of an image's features: `(maps, rows, columns)` of a single block, `(size,)` of several, whose
            maps have different sides.

    Raises:
        UserError: for another name or shape.
    """

    def __init__(self, name: str, example_shape: tuple[int, ...]) -> None:
        if name not in _BLOCKS:
            raise UserError(f"The features must be one of {', '.join(FEATURE_MAPS[1:])}. Got {name!r}.")
        if len(example_shape) != 3 or example_shape[0] not in (1, 3) or min(example_shape[1:]) < _LEAST_SIDE:
            raise UserError(
                f"Features are for images of shape (1 or 3, height, width) of at least {_LEAST_SIDE}×"
                f"{_LEAST_SIDE} pixels, got {tuple(example_shape)}: choose the features 'none'."
            )
        self.example_shape = tuple(example_shape)
        self.blocks = blocks_of(_BLOCKS[name], example_shape[0])
        images = dead_leaves(_SYNTHETIC, *example_shape, seed=_SEED)
        power = _WHITENING[example_shape[0]]
        maps = {name: self._maps(name, images) for name in self.blocks}
        self._whitenings = {name: _whitening(block, power) for name, block in maps.items()}
        shapes = [tuple(block.shape[1:]) for block in maps.values()]
        self.shape = shapes[0] if len(shapes) == 1 else (sum(math.prod(shape) for shape in shapes),)

    def __call__(self, images: Tensor) -> Tensor:
        """Features, float32 [n, *shape], of float32 images [n, *example_shape] in [0, 1]."""
        return self.joined([self.block(name, images) for name in self.blocks]).view(-1, *self.shape)

    @torch.no_grad()
    def block(self, name: str, images: Tensor) -> Tensor:
        """One block of the features, scaled to norm 1, float32 [n, size], of n ≥ 1 images."""
        if images.shape[1:] != self.example_shape or images.dtype != torch.float32 or len(images) == 0:
            raise UserError(
                f"These features are for float32 images [n, {', '.join(map(str, self.example_shape))}], got "
                f"{images.dtype} {list(images.shape)}."
            )
        mean, whitening = self._whitenings[name]
        centred = self._maps(name, images) - mean
        return normalize(torch.einsum("oc,nchw->nohw", whitening, centred).flatten(1))

    def joined(self, blocks: Sequence[Tensor]) -> Tensor:
        """Features of images, float32 [n, size], from all their blocks."""
        weights = [_SHARES[name] ** 0.5 for name in self.blocks]
        weighted = [weight * block.float() for weight, block in zip(weights, blocks, strict=True)]
        return normalize(torch.cat(weighted, dim=1))

    @torch.no_grad()
    def _maps(self, name: str, images: Tensor) -> Tensor:
        return torch.cat([self.blocks[name](part) for part in torch.split(images, _CHUNK)])


def _whitening(maps: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """The mean of each map, [maps, 1, 1], and a power of their covariance over all places, [maps, maps]."""
    mean = maps.mean(dim=(0, 2, 3))[:, None, None]
    values, vectors = torch.linalg.eigh(torch.cov((maps - mean).double().transpose(0, 1).flatten(1)))
    scales = (values.clamp(min=0) + _RIDGE * values.mean()) ** (-power / 2)
    return mean, (vectors * scales @ vectors.T).float()
