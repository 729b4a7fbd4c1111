"""Gaussian noise on tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from accounting.events import check_number
from dpml.randomness import Randomness


class GaussianNoise:
    """Independent normal noise of standard deviation noise_multiplier·C.

    Noise is drawn in float64 and afresh at every call, from a stream that never repeats.

    Args:
        noise_multiplier: Standard deviation over the clip norm, above 0.
        randomness: Secret, unless the result is for tests alone.
    """

    def __init__(self, noise_multiplier: float, randomness: Randomness) -> None:
        self.noise_multiplier = check_number(
            noise_multiplier, "noise_multiplier", "GaussianNoise", low=0, high=1e15
        )
        self.randomness = randomness

    def draw(self, shapes: Sequence[Sequence[int]], clip_norm: float) -> list[Tensor]:
        """Draw noise for tensors of these shapes, float64, on the CPU."""
        sizes = [math.prod(shape) for shape in shapes]
        values = torch.from_numpy(self.randomness.normals(sum(sizes)))
        values *= self.noise_multiplier * clip_norm
        return [
            part.view(tuple(shape)) for part, shape in zip(torch.split(values, sizes), shapes, strict=True)
        ]
