"""Blocks of features: maps of an image, each a function of that image alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from dpml.features.patches import Patches
from dpml.features.wavelets import Wavelets, mirrored_paths

Block = Callable[[Tensor], Tensor]
"""From images, float32 [n, channels, height, width], to maps, float32 [n, maps, rows, columns]."""
VERSION = 2
"""Raised when a block changes: what was cached before is then computed anew."""

_CELL = 4
_LOG_FLOOR = 1e-3
_DIRECTIONS = 128
# Brightness, and two contrasts of colours.
_OPPONENT = ((1 / 3, 1 / 3, 1 / 3), (1 / 2, -1 / 2, 0.0), (1 / 4, 1 / 4, -1 / 2))


def blocks_of(names: tuple[str, ...], channels: int) -> dict[str, Block]:
    """Blocks by name: scattering, patches, coarse-patches (of images of half the size).

    Images in colour count as photographs: their maps are the mean over the image and its mirror image.
    """
    blocks: dict[str, Block] = {}
    mirror = channels == 3
    if "scattering" in names:
        wavelets = Wavelets()
        blocks["scattering"] = lambda x: _scattering(wavelets, x, mirror)
    if "patches" in names or "coarse-patches" in names:
        patches = Patches(channels, _DIRECTIONS)
        if "patches" in names:
            blocks["patches"] = lambda x: _filtered(patches, x, mirror)
        if "coarse-patches" in names:
            blocks["coarse-patches"] = lambda x: _filtered(patches, avg_pool2d(x, 2), mirror)
    return blocks


def _scattering(wavelets: Wavelets, images: Tensor, mirror: bool) -> Tensor:
    if not mirror:
        return _log(wavelets(images)).flatten(1, 2)
    x = _log(wavelets(torch.einsum("oc,nchw->nohw", torch.tensor(_OPPONENT), images)))
    x = (x + x[:, :, mirrored_paths()].flip(4)) / 2
    # Its right half holds the same numbers as the left.
    return x.flatten(1, 2)[..., : (x.shape[4] + 1) // 2]


def _log(scattering: Tensor) -> Tensor:
    """Logarithms of what has no sign; averages of colour contrasts, which do, stay as they are."""
    x = (scattering.clamp(min=0) + _LOG_FLOOR).log()
    x[:, 1:, 0] = scattering[:, 1:, 0]
    return x


def _filtered(patches: Patches, images: Tensor, mirror: bool) -> Tensor:
    x = patches(images, _CELL)
    return (x + patches(images.flip(3), _CELL)) / 2 if mirror else x
