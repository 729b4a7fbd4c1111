"""Synthetic images: dead leaves, whose statistics resemble those of photographs and cost no privacy.

Discs of random place, size and colour cover each other. Their edges and occlusions give nearly the power
spectrum and the patch statistics of natural images (Lee, Mumford & Huang, "Occlusion models for natural
images", 2001; as training data: Baradad et al., "Learning to see by looking at noise", 2021).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_DISCS = 150
_CHROMA = 0.1


def dead_leaves(count: int, channels: int, height: int, width: int, *, seed: int = 0) -> Tensor:
    """Make images of discs that hide each other. The same for the same arguments, on every machine.

    Args:
        count: How many.
        channels: Of an image; they share a brightness and differ by a little chroma.
        height: In pixels.
        width: In pixels.
        seed: Public.

    Returns:
        Float32 [count, channels, height, width] in [0, 1].
    """
    rng = np.random.RandomState(seed)  # its stream is frozen for ever (NumPy's NEP 19)
    side = min(height, width)
    rows, columns = np.arange(height)[:, None], np.arange(width)
    images = np.full((count, height, width, channels), 0.5, dtype=np.float32)
    for _ in range(_DISCS):
        # Radii with density r⁻³ between 1/16 and 1/2 of the side, by inversion: scale invariance.
        small, large = (side / 16) ** -2.0, (side / 2) ** -2.0
        radius = (large + (small - large) * rng.uniform(size=(count, 1, 1))) ** -0.5
        y, x = (rng.uniform(-side / 8, size + side / 8, (count, 1, 1)) for size in (height, width))
        colour = rng.uniform(size=(count, 1)) + _CHROMA * rng.normal(size=(count, channels))
        covered, row, column = np.nonzero((rows - y) ** 2 + (columns - x) ** 2 < radius**2)
        images[covered, row, column] = colour[covered]
    return torch.from_numpy(images.clip(0, 1)).permute(0, 3, 1, 2).contiguous()
