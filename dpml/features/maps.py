"""From images to vectors of norm 1, by name: wavelet scattering, random patches, or both."""

from __future__ import annotations

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
    "scattering-patches": ("scattering", "patches", "coarse-patches"),
}
_LEAST_SIDE = 16
_SYNTHETIC, _SEED = 300, 2
_CHUNK = 8  # more would leave the processor's cache


class FeatureMap:
    """Features of images of one shape.

    Each block of maps (`dpml.features.blocks`) is centred and scaled, map by map, by statistics of synthetic
    images, and has an equal share of a vector of norm 1. Features of an image depend on that image alone; in
    another batch they may differ by rounding.

    Args:
        name: "scattering", "patches" or "scattering-patches".
        example_shape: `(channels, height, width)`; 1 or 3 channels, sides of 16 or more.

    Attributes:
        blocks: Functions from images to maps, by name. Computing them takes nearly all of the time.

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
        self._scales = [_centre_and_scale(self.maps(block, images)) for block in self.blocks]

    def __call__(self, images: Tensor) -> Tensor:
        """Features, float32 [n, size], of float32 images [n, *example_shape] in [0, 1]."""
        return self.assemble([self.maps(block, images) for block in self.blocks])

    @torch.no_grad()
    def maps(self, block: str, images: Tensor) -> Tensor:
        """One block, float32 [n, maps, rows, columns], of n ≥ 1 images."""
        if images.shape[1:] != self.example_shape or images.dtype != torch.float32 or len(images) == 0:
            raise UserError(
                f"These features are for float32 images [n, {', '.join(map(str, self.example_shape))}], got "
                f"{images.dtype} {list(images.shape)}."
            )
        return torch.cat([self.blocks[block](part) for part in torch.split(images, _CHUNK)])

    def assemble(self, maps: Sequence[Tensor]) -> Tensor:
        """Features of images, from all their blocks."""
        scaled = [(x.float() - mean) * scale for x, (mean, scale) in zip(maps, self._scales, strict=True)]
        return normalize(torch.cat([normalize(x.flatten(1)) for x in scaled], dim=1))


def _centre_and_scale(block: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each map, and one over its standard deviation, [maps, 1, 1]."""
    mean, deviation = block.mean(dim=(0, 2, 3)), block.std(dim=(0, 2, 3))
    return mean[:, None, None], 1 / deviation.clamp(min=1e-6 * float(deviation.max()))[:, None, None]
