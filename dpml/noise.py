"""Gaussian noise on tensors. What is released is exact: see `dpml.exact`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accounting.errors import UserError
from accounting.events import check_instance, check_number
from dpml.exact import noised
from dpml.randomness import Randomness


class GaussianNoise:
    """Independent normal noise of standard deviation noise_multiplier·C.

    Noise is drawn afresh at every call, from a stream that never repeats.

    Args:
        noise_multiplier: Standard deviation over the clip norm, above 0.
        randomness: Secret, unless the result is for tests alone.
    """

    def __init__(self, noise_multiplier: float, randomness: Randomness) -> None:
        self.noise_multiplier = check_number(
            noise_multiplier, "noise_multiplier", "GaussianNoise", low=0, high=1e15
        )
        self.randomness = check_instance(randomness, Randomness, "randomness", "GaussianNoise")

    def add(self, sums: Sequence[Tensor], clip_norm: float) -> list[Tensor]:
        """Sums with noise, on the grid of `grid_of(noise_multiplier·C)`: float64, each on its own device.

        Guarantee: distributed exactly as the sums with real normal noise, rounded to the grid.

        Args:
            sums: Finite, of any shapes.
            clip_norm: C, above 0.

        Raises:
            UserError: for another C, with which there would be no noise, or no number; or for other sums.
        """
        scale = self.noise_multiplier * check_number(clip_norm, "clip_norm", "add", low=0, high=1e15)
        flat = torch.cat(
            [part.detach().to("cpu", torch.float64).flatten() for part in sums] or [torch.empty(0)]
        )
        if not torch.isfinite(flat).all():
            raise UserError("The sums must be finite: noise would not hide what is not.")
        noisy = torch.from_numpy(noised(flat.numpy(), scale, self.randomness))
        parts = torch.split(noisy, [part.numel() for part in sums])
        return [part.view(like.shape).to(like.device) for part, like in zip(parts, sums, strict=True)]
