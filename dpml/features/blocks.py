"""Blocks of features: maps of an image, each a function of that image alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dpml.features.patches import Patches
from dpml.features.wavelets import Wavelets, mirrored_paths

Block = Callable[[Tensor], Tensor]
"""From images, float32 [n, channels, height, width], to maps, float32 [n, maps, rows, columns]."""
VERSION = 4
"""Raised when a block changes: what was cached before is then computed anew."""

_LOG_FLOOR = 1e-3
_FILTERED_FLOOR = 1e-2
_DIRECTIONS = 512
# Brightness, and two contrasts of colours.
_OPPONENT = ((1 / 3, 1 / 3, 1 / 3), (1 / 2, -1 / 2, 0.0), (1 / 4, 1 / 4, -1 / 2))


def blocks_of(names: tuple[str, ...], channels: int) -> dict[str, Block]:
    """Blocks by name: scattering, patches, and of images of half the size coarse-scattering, coarse-patches.

    Images in colour count as photographs: their maps are the mean over the image and its mirror image.
    """
    return {name: _block(name, channels) for name in names}


def _block(name: str, channels: int) -> Block:
    mirror, coarse = channels == 3, name.startswith("coarse-")
    block: Block
    if name.endswith("scattering"):
        block = partial(_scattering, Wavelets(), mirror=mirror)
    else:
        block = partial(_filtered, Patches(channels, _DIRECTIONS), cell=4 if coarse else 8, mirror=mirror)
    return (lambda images: block(_halved(images))) if coarse else block


def _scattering(wavelets: Wavelets, images: Tensor, mirror: bool) -> Tensor:
    if not mirror:
        return _log(wavelets(images)).flatten(1, 2)
    images = torch.einsum("oc,nchw->nohw", torch.tensor(_OPPONENT), images)
    x = _log(wavelets(images))
    if images.shape[3] % 2:  # its mirror image has other cells
        return ((x + _log(wavelets(images.flip(3)))) / 2).flatten(1, 2)
    x = (x + x[:, :, mirrored_paths()].flip(4)) / 2
    # Its right half holds the same numbers as the left.
    return x.flatten(1, 2)[..., : (x.shape[4] + 1) // 2]


def _log(scattering: Tensor) -> Tensor:
    """Logarithms of what has no sign; averages of colour contrasts, which do, stay as they are."""
    x = (scattering.clamp(min=0) + _LOG_FLOOR).log()
    x[:, 1:, 0] = scattering[:, 1:, 0]
    return x


def _filtered(patches: Patches, images: Tensor, cell: int, mirror: bool) -> Tensor:
    x = patches(images, cell)
    if mirror:
        x = (x + patches(images.flip(3), cell)) / 2
    return (x + _FILTERED_FLOOR).log()


def _halved(images: Tensor) -> Tensor:
    """Means over 2×2 pixels; those in the middle of odd sides overlap, so that mirroring changes nothing."""
    height, width = images.shape[2:]
    return adaptive_avg_pool2d(images, ((height + 1) // 2, (width + 1) // 2))
