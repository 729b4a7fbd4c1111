"""Random patch features: one convolutional layer that is fitted to synthetic images, not to data.

Each 6×6 patch is centred, whitened, scaled to norm 1 and compared with random directions; what exceeds a
threshold is averaged over overlapping windows of the image. The whitening is for patches of equal contrast,
so that the few with strong edges do not decide about it. A linear classifier on these is close to one with
the arc-cosine kernel on patches (Cho & Saul 2009).

Sources: Coates, Lee & Ng, "An analysis of single-layer networks in unsupervised feature learning", 2011,
with random directions in place of learned ones; Thiry et al., "The unreasonable effectiveness of patches in
deep convolutional kernels methods", 2021, whose whitening comes from the data.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad, unfold

from dpml.features.synthetic import dead_leaves

_SIDE = 6
_THRESHOLD = 0.12
_CONTRAST = 0.03
"""Standard deviation of a patch's pixels, in units of [0, 1], below which it counts as flat."""
_MARGINS = ((_SIDE - 1) // 2, _SIDE // 2) * 2
_RIDGE = 1e-2
_SYNTHETIC = 1000
_SEED = 1


class Patches:
    """Patch features of images with some number of channels.

    Attributes:
        maps: Features of one cell: two for each direction.
    """

    def __init__(self, channels: int, directions: int) -> None:
        self._whitening = _whitening(channels)
        size = _SIDE**2 * channels
        generator = torch.Generator().manual_seed(_SEED)
        rows = torch.randn(directions, size, generator=generator, dtype=torch.float64)
        rows = rows / rows.norm(dim=1, keepdim=True)
        self._directions = rows.float()[:, :, None, None]
        self.maps = 2 * directions

    @torch.no_grad()
    def __call__(self, images: Tensor, cell: int) -> Tensor:
        """Averages about cells of `cell` pixels, float32 [n, maps, ⌈height/cell⌉, ⌈width/cell⌉].

        Args:
            images: Float32 [n, channels, height, width], sides of 6 or more. Continued by reflection.
            cell: Side of a cell in pixels, even.
        """
        height, width = images.shape[2:]
        x = pad(images, (0, -width % cell, 0, -height % cell), mode="replicate")
        white = conv2d(pad(x, _MARGINS, mode="reflect"), self._whitening)
        white /= white.square().sum(dim=1, keepdim=True).add_(_CONTRAST**2 * white.shape[1]).sqrt_()
        similar = conv2d(white, self._directions)
        both = [avg_pool2d((sign * similar).sub_(_THRESHOLD).relu_(), cell // 2) for sign in (1, -1)]
        return _windows(torch.cat(both, dim=1))


def _windows(halves: Tensor) -> Tensor:
    """Averages about cells of 2×2, with weights 1, 2, 2, 1 along both axes: windows that overlap by half."""
    n, maps = halves.shape[:2]
    flat = pad(halves.reshape(n * maps, 1, *halves.shape[2:]), (1, 1, 1, 1), mode="replicate")
    weights = torch.tensor([1.0, 2.0, 2.0, 1.0]) / 6
    cells = conv2d(flat, torch.outer(weights, weights)[None, None], stride=2)
    return cells.view(n, maps, *cells.shape[2:])


@cache
def _whitening(channels: int) -> Tensor:
    """Filters that take the mean from a patch and whiten it: float32 [size, channels, 6, 6]."""
    images = dead_leaves(_SYNTHETIC, channels, 32, 32)
    patches = unfold(images, _SIDE, stride=3).transpose(1, 2).flatten(0, 1).double()
    centred = patches - patches.mean(dim=1, keepdim=True)
    centred /= (centred.square().mean(dim=1, keepdim=True) + _CONTRAST**2).sqrt()
    covariance = centred.T @ centred / len(centred)
    values, vectors = torch.linalg.eigh(covariance)
    scale = (values + _RIDGE * values.mean()).rsqrt()
    whitening = vectors * scale @ vectors.T
    whitening = whitening - whitening.mean(dim=1, keepdim=True)
    # The mean patch keeps its norm.
    whitening = whitening * (centred.square().sum() / (centred @ whitening.T).square().sum()).sqrt()
    filters: Tensor = whitening.float().view(-1, channels, _SIDE, _SIDE)
    return filters
