"""A clip norm that follows a quantile of the gradient norms, by a noisy count in every step."""

from __future__ import annotations

import math

import numpy as np

from accounting import Gaussian, UserError
from accounting.events import check_count, check_number
from dpml.exact import noised
from dpml.gradients.engine import ClippedSum, ClippingMode
from dpml.planning import count_event
from dpml.randomness import Randomness

_RATE = 0.2
# Far beyond any use, and fixed in advance: a norm that has nothing to follow must not become 0 or ∞.
_LEAST_NORM, _MOST_NORM = 1e-12, 1e12


class AdaptiveClipping:
    """Flat clipping whose norm moves towards a quantile of the norms of the examples' gradients.

    After each step C becomes C·exp(−0.2·(b̃ − quantile)) with b̃ = 1/2 + (Σ(bᵢ − 1/2) + N(0, count_noise²))/B
    over the sample, where bᵢ is 1 for an example that was not clipped and 0 for one that was (Andrew,
    Thakkar, McMahan & Ramaswamy 2021, Algorithm 1). B is the expected batch size; that of a sample is never
    used.

    Guarantee: one record moves the count by exactly 1/2 under zero-out or add-or-remove-one, and `event` is
    what its noise amounts to. It is a release of the very sample that the gradients are of, so both belong
    into one sampled event, as `SampledGaussianMechanism.event` has them. C is public: it depends on noisy
    counts alone. Under add-or-remove-one there is a gap: other records change places in a batch, and a
    gradient norm within rounding of C may then fall on its other side, which moves the count further.

    An example that is not finite contributes zero and was not clipped. An empty sample has the count 0.

    Args:
        norm: C of the first step.
        quantile: The share of examples that shall not be clipped, in (0, 1).
        expected_batch_size: B.
        count_noise: Standard deviation of the noise on the count, above 0; see `planning.count_noise`.

    Attributes:
        norm: C of the next step.
        mode: "flat".
    """

    mode: ClippingMode = "flat"

    def __init__(self, norm: float, quantile: float, expected_batch_size: int, count_noise: float) -> None:
        owner = "AdaptiveClipping"
        self.norm = check_number(norm, "clip_norm", owner, low=0, high=_MOST_NORM)
        self.quantile = check_number(quantile, "clip_quantile", owner, low=0, high=1)
        self.expected_batch_size = check_count(expected_batch_size, "expected_batch_size", owner, low=1)
        self.count_noise = check_number(count_noise, "count_noise", owner, low=0, high=1e15)
        self._latest: ClippedSum | None = None

    @property
    def event(self) -> Gaussian:
        """The event of the count of one step, on that step's sample."""
        return count_event(self.count_noise)

    def watch(self, clipped: ClippedSum) -> None:
        """Remember the sum that was made with the present norm: no other may be released."""
        self._latest = clipped

    def count(self, clipped: ClippedSum) -> float:
        """Σ(bᵢ − 1/2) over the sample, before noise: private, and a multiple of 1/2.

        Raises:
            UserError: if `clipped` was made with another norm than the present one.
            RuntimeError: if the engine's counts are none.
        """
        if clipped is not self._latest:
            raise UserError(
                "A clipped sum must be released before the next one is made: its clip norm adapts."
            )
        examples, cut = (clipped.diagnostics.get(name, math.nan) for name in ("examples", "clipped"))
        if not (0 <= cut <= examples and float(examples).is_integer() and float(cut).is_integer()):
            raise RuntimeError(f"The engine counted {cut} clipped of {examples} examples: no release.")
        return (examples - cut) - examples / 2

    def update(self, count: float, randomness: Randomness) -> None:
        """Add fresh noise to the count of this step, and move the norm. Commit the step before."""
        noisy = float(noised(np.array([count]), self.count_noise, randomness)[0])
        unclipped = 0.5 + noisy / self.expected_batch_size
        moved = math.log(self.norm) - _RATE * (unclipped - self.quantile)
        self.norm = math.exp(min(max(moved, math.log(_LEAST_NORM)), math.log(_MOST_NORM)))
        self._latest = None
