"""Inputs centred at their mean, which is released once, with noise, before the first step.

Vectors that share a large mean leave a linear model little to tell them apart by; without it, more of each
clipped gradient is about its own record. The mean is a statistic of private records, so it is an event.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from accounting import Event, Reservation, UserError
from dpml.noise import GaussianNoise
from dpml.planning import ENGINE_SLACK, gaussian_event

_LEAST_NORM = 1e-100


class Centred(nn.Module):
    """From inputs [m, …] to u(u(x) − mean), float32 of the same shape; u scales each row to norm 1.

    It has no weights. `mean` is a buffer [size], zero until it is released, and part of the saved model.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(size))

    def forward(self, inputs: Tensor) -> Tensor:
        """Centre each row by itself."""
        normalize = nn.functional.normalize
        rows = normalize(normalize(inputs.flatten(1).to(self.mean.dtype)) - self.mean)
        return rows.view(inputs.shape)


@dataclass(frozen=True, eq=False)
class NoisyMean:
    """The mean of the records' inputs, each scaled to norm 1, with Gaussian noise (or, non-private, without).

    Guarantee: `release` returns the sum plus N(0, noise_multiplier²) in every coordinate, over `divisor`,
    after committing to the reservation. One record moves the sum by at most 1 + `ENGINE_SLACK` under
    zero-out and add-or-remove-one, whatever it holds: an input that is zero or not finite counts as zero.

    Attributes:
        noise: The noise and its randomness; None to release the mean itself.
        divisor: What the sum is divided by; public, so not counted where the number of records is protected.
    """

    noise: GaussianNoise | None
    divisor: float

    @property
    def event(self) -> Event:
        """The event of the release, slack included."""
        if self.noise is None:
            raise UserError("A mean without noise is no private event; give mean_noise.")
        return gaussian_event(self.noise.noise_multiplier, ENGINE_SLACK)

    def total(self, inputs: Iterable[Tensor]) -> Tensor:
        """The sum before noise, float64 [size]. It is private.

        Args:
            inputs: Of all records, in parts [m, …].
        """
        return torch.stack([contributions(part).sum(dim=0).cpu() for part in inputs]).sum(dim=0)

    def release(self, total: Tensor, reservation: Reservation | None) -> Tensor:
        """Commit, then draw the noise, then return the noisy mean, float64 [size].

        Raises:
            ReservationError: if the reservation does not hold this release; no noise is drawn then.
        """
        if self.noise is None:
            return total / self.divisor
        if reservation is None:
            raise UserError("A mean with noise needs a reservation of its event.")
        reservation.commit(1, self.event)
        [noisy] = self.noise.add([total], 1.0)
        return noisy / self.divisor


def contributions(inputs: Tensor) -> Tensor:
    """Each row scaled to norm 1, float64 [m, size]; zero where its norm is zero or not finite."""
    rows = inputs.flatten(1).double()
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit = rows / norms.clamp(min=_LEAST_NORM)  # squares of what is smaller are not exact
    return torch.where(torch.isfinite(norms), unit, 0.0)
