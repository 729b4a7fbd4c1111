"""Scattering features, symmetric under mirroring, by convolutions.

The transform of `dpml.data.scattering` for two octaves with its wavelets sampled in space. Places at which
maps are kept lie symmetrically about the image, so that mirroring an image only changes places and angles,
and the mean over an image and its mirror image costs one transform. It is also ten times as fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

_SIGMA, _XI = 0.8, 3 * math.pi / 4
"""Width in pixels and frequency in radians per pixel of the finest wavelets."""
ANGLES = 8
_CELL = 4
PATHS = 1 + 2 * ANGLES + ANGLES**2
"""Maps of one channel: its average; two octaves of `ANGLES`; then `[angle, coarser's angle]`."""


class Wavelets:
    """Morlet wavelets of two octaves, and Gaussian averages over cells of 4×4 pixels."""

    def __init__(self) -> None:
        self._fine = _morlets(_SIGMA, _XI, 7)
        # Kept at every second place, between pixels: an even number of taps.
        self._coarse = _morlets(2 * _SIGMA, _XI / 2, 12)
        self._average, self._average_coarse = _gaussian(2 * _SIGMA, 12), _gaussian(_SIGMA, 6)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Scattering coefficients, float32 [n, channels, PATHS, ⌈height/4⌉, ⌈width/4⌉].

        Args:
            images: Float32 [n, channels, height, width], sides of 16 or more. Continued by reflection.
        """
        n, channels, height, width = images.shape
        x = images.reshape(n * channels, 1, height, width)
        across, along = -width % _CELL, -height % _CELL
        x = pad(x, (across // 2, across - across // 2, along // 2, along - along // 2), mode="replicate")
        first = _modulus(_mirrored(x, 3), self._fine, 1)
        coarse = _modulus(_mirrored(x, 5), self._coarse, 2)
        both = first.flatten(0, 1)[:, None]
        second = _modulus(_mirrored(both, 5), self._coarse, 2)
        parts = [
            _averaged(x, self._average, 4),
            _averaged(first, self._average, 4),
            _averaged(coarse, self._average_coarse, 2),
            _averaged(second, self._average_coarse, 2).reshape(len(x), ANGLES**2, *_cells(x)),
        ]
        return torch.cat(parts, dim=1).view(n, channels, PATHS, *_cells(x))


def mirrored_paths() -> Tensor:
    """Which path of an image each path of its mirror image is: int64 [PATHS]. Columns are reversed too."""
    angles = -torch.arange(ANGLES) % ANGLES
    pairs = ANGLES * angles[:, None] + angles
    first, second = 1 + angles, 1 + ANGLES + angles
    return torch.cat([torch.zeros(1, dtype=torch.int64), first, second, 1 + 2 * ANGLES + pairs.flatten()])


def _cells(x: Tensor) -> tuple[int, int]:
    return x.shape[-2] // _CELL, x.shape[-1] // _CELL


def _mirrored(x: Tensor, margin: int) -> Tensor:
    return pad(x, (margin, margin, margin, margin), mode="reflect")


def _modulus(x: Tensor, wavelets: Tensor, stride: int) -> Tensor:
    """|x * ψ| for each of the wavelets: [m, 1, …] to [m, ANGLES, …]."""
    squares = conv2d(x, wavelets, stride=stride).square_()
    modulus: Tensor = squares[:, :ANGLES].add_(squares[:, ANGLES:]).sqrt_()
    return modulus


def _averaged(x: Tensor, weights: Tensor, step: int) -> Tensor:
    """Gaussian averages about the centres of cells of `step` pixels."""
    margin = (len(weights) - step) // 2
    flat = _mirrored(x.flatten(0, 1)[:, None], margin)
    rows = conv2d(flat, weights[None, None, :, None], stride=(step, 1))
    cells = conv2d(rows, weights[None, None, None, :], stride=(1, step))
    return cells.view(*x.shape[:2], *cells.shape[2:])


def _morlets(sigma: float, xi: float, taps: int) -> Tensor:
    """Real parts, then imaginary parts: float32 [2·ANGLES, 1, taps, taps]."""
    place = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
    theta = (torch.arange(ANGLES, dtype=torch.float64) * math.pi / ANGLES)[:, None, None]
    along = theta.cos() * place + theta.sin() * place[:, None]
    across = theta.cos() * place[:, None] - theta.sin() * place
    slant = 4.0 / ANGLES
    envelope = torch.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
    envelope = envelope / envelope.sum(dim=(1, 2), keepdim=True)
    real, imaginary = envelope * (xi * along).cos(), envelope * (xi * along).sin()
    real = real - real.sum(dim=(1, 2), keepdim=True) * envelope  # of mean zero
    return torch.cat([real, imaginary]).float()[:, None]


def _gaussian(sigma: float, taps: int) -> Tensor:
    place = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
    weights = torch.exp(-(place**2) / (2 * sigma**2))
    return (weights / weights.sum()).float()
