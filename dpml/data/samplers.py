"""Samplers: which records take part in a step. A sampler states the event that it makes of a release."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from accounting.events import Event, PoissonSampled, check_count, check_instance, check_number
from dpml.randomness import Randomness


class PoissonSampler:
    """Puts each record in the sample independently with the same probability.

    Guarantee: exactly that. The probability of inclusion is ⌊q·2⁶⁴⌋/2⁶⁴, which is never above q, so the
    event that the sampler states is an upper bound. Samples differ in size and may be empty; an empty one
    is a step of pure noise, and skipping it would tell that it was empty.

    Args:
        examples: Number of records n, at least 1.
        sampling_probability: q in (0, 1].
        randomness: Where the choice comes from. Secret, unless the result is for tests alone.

    Raises:
        UserError: for a number outside its interval.
    """

    def __init__(self, examples: int, sampling_probability: float, randomness: Randomness) -> None:
        self.examples = check_count(examples, "examples", "PoissonSampler", low=1)
        self.sampling_probability = check_number(
            sampling_probability, "sampling_probability", "PoissonSampler", low=0, high=1, closed="right"
        )
        self.randomness = check_instance(randomness, Randomness, "randomness", "PoissonSampler")
        self._threshold = math.floor(self.sampling_probability * 2**64)

    def sample(self) -> Tensor:
        """Draw a sample: ascending record numbers, int64, shape [size of this sample]."""
        if self._threshold >= 2**64:
            return torch.arange(self.examples)
        drawn = self.randomness.words(self.examples) < np.uint64(self._threshold)
        return torch.from_numpy(np.flatnonzero(drawn))

    def event(self, release: Event) -> Event:
        """The event of making `release` from a fresh sample."""
        return PoissonSampled(release, self.sampling_probability)
