"""Find the noise, the steps, the batch size or the sampling probability for a budget.

All of them end at or below the target, as judged by an accountant of the same method with its default
tolerance, and within 0.1 % of it where the quantity is continuous.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from accounting.accountant import Method, PrivacyAccountant
from accounting.budget import PrivacyBudget
from accounting.errors import UserError
from accounting.events import Event, NeighboringRelation, check_count, check_number, shown
from accounting.search import approach, largest_whole

LEAST_NOISE, MOST_NOISE = 1e-2, 1e7
_MOST_STEPS = 10**9
_LEAST_PROBABILITY = 1e-12


class UnreachableBudget(UserError):
    """No value of the quantity within reason meets the budget."""


def calibrate_noise_multiplier(
    make_event: Callable[[float], Event],
    budget: PrivacyBudget,
    *,
    method: Method = "pld",
    neighboring_relation: NeighboringRelation = "zero-out",
    tolerance: float = 1e-3,
) -> float:
    """Return a noise multiplier with which `make_event` stays within `budget`, and hardly below it.

    Args:
        make_event: From a noise multiplier to the event (the whole plan); ε must fall as it grows.
        budget: The target.
        method: The accountant's method.
        neighboring_relation: As for `PrivacyAccountant`.
        tolerance: The event's ε ends in [(1 − tolerance)·ε, ε].

    Returns:
        A noise multiplier σ; an accountant of the same method says ε(make_event(σ)) ≤ budget.epsilon.

    Raises:
        UnreachableBudget: if even a noise multiplier of 1e7 does not reach the budget.
    """
    tolerance = check_number(tolerance, "tolerance", "calibrate_noise_multiplier", low=0, high=1)
    judge = _Judge(make_event, budget, neighboring_relation)
    # Rényi bounds are quick, and above PLD's: they end the search from above near the answer.
    high = judge.least_noise(relative=1e-3)
    epsilon = judge.by(method)
    best = epsilon(high)
    if best >= (1 - tolerance) * budget.epsilon:
        return high
    low, factor = high, 0.9
    while (found := epsilon(low * factor)) <= budget.epsilon:
        high, best, low, factor = low * factor, found, low * factor, factor**2
        if low < LEAST_NOISE:
            return high
    return approach(epsilon, low * factor, high, budget.epsilon, tolerance=tolerance, good_value=best)


def calibrate_steps(
    make_event: Callable[[int], Event],
    budget: PrivacyBudget,
    *,
    method: Method = "pld",
    neighboring_relation: NeighboringRelation = "zero-out",
    most: int = _MOST_STEPS,
) -> int:
    """Return the largest whole number, at most `most`, with which `make_event` stays within `budget`.

    For steps, epochs, batch sizes or questions: anything whole that makes ε grow.

    Raises:
        UnreachableBudget: if even 1 exceeds the budget.
    """
    most = check_count(most, "most", "calibrate_steps", low=1)
    judge = _Judge(make_event, budget, neighboring_relation)
    epsilon = judge.by(method)
    if epsilon(1) > budget.epsilon:
        raise UnreachableBudget(f"Even one exceeds {budget}: it costs {epsilon(1):.6g}; use more noise.")
    quick = judge.by("rdp")
    least = largest_whole(lambda n: quick(n) <= budget.epsilon, 1, most) if quick(1) <= budget.epsilon else 1
    return largest_whole(lambda n: epsilon(n) <= budget.epsilon, least, most)


calibrate_batch_size = calibrate_steps


def calibrate_sampling_probability(
    make_event: Callable[[float], Event],
    budget: PrivacyBudget,
    *,
    method: Method = "pld",
    neighboring_relation: NeighboringRelation = "zero-out",
    tolerance: float = 1e-3,
) -> float:
    """Return the largest sampling probability with which `make_event` stays within `budget`, to 0.1 % of ε.

    Raises:
        UnreachableBudget: if even a probability of 1e-12 exceeds the budget.
    """
    tolerance = check_number(tolerance, "tolerance", "calibrate_sampling_probability", low=0, high=1)
    epsilon = _Judge(make_event, budget, neighboring_relation).by(method)
    if epsilon(1.0) <= budget.epsilon:
        return 1.0
    bad, good = 1.0, 0.1
    while (found := epsilon(good)) > budget.epsilon:
        bad, good = good, good / 10
        if good < _LEAST_PROBABILITY:
            raise UnreachableBudget(
                f"Even a sampling probability of {_LEAST_PROBABILITY:g} exceeds {budget}; use more noise."
            )
    return approach(epsilon, bad, good, budget.epsilon, tolerance=tolerance, good_value=found)


class _Judge:
    """ε of an event made from a number, at a budget's δ."""

    def __init__(
        self, make_event: Callable[[Any], Event], budget: PrivacyBudget, relation: NeighboringRelation
    ) -> None:
        if not callable(make_event):
            raise UserError(
                f"'make_event' must be a function from a number to an event. Got {shown(make_event)}."
            )
        if not isinstance(budget, PrivacyBudget):
            raise UserError(f"The budget must be a PrivacyBudget(epsilon, delta). Got {shown(budget)}.")
        self._make_event, self._budget, self._relation = make_event, budget, relation

    def by(self, method: Method) -> Callable[[float], float]:
        """ε as a function of the number, by one method."""

        def epsilon(quantity: float) -> float:
            accountant = PrivacyAccountant(method, neighboring_relation=self._relation)
            accountant.record(self._make_event(quantity))
            return accountant.epsilon(self._budget.delta)

        return epsilon

    def least_noise(self, *, relative: float) -> float:
        """The least noise that Rényi bounds admit, to `relative` precision."""
        epsilon = self.by("rdp")
        high = 1.0
        while epsilon(high) > self._budget.epsilon:
            high *= 4
            if high > MOST_NOISE:
                raise UnreachableBudget(
                    f"No noise multiplier up to {MOST_NOISE:g} meets {self._budget}; "
                    "ask for a larger ε or δ, fewer steps or a smaller batch."
                )
        low = high
        while low > LEAST_NOISE and epsilon(low) <= self._budget.epsilon:
            high, low = low, low / 4
        while high / low > 1 + relative:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if epsilon(middle) <= self._budget.epsilon else (middle, high)
        return high
