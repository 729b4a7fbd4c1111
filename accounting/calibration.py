"""Find the noise for a budget."""

from __future__ import annotations

import math
from collections.abc import Callable

from accounting.accountant import Method, PrivacyAccountant
from accounting.budget import PrivacyBudget
from accounting.errors import UserError
from accounting.events import Event, NeighboringRelation

LEAST_NOISE, MOST_NOISE = 1e-2, 1e7


class UnreachableBudget(UserError):
    """No noise multiplier within reason meets the budget."""


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

    def epsilon(noise: float, judge: Method) -> float:
        accountant = PrivacyAccountant(judge, neighboring_relation=neighboring_relation)
        accountant.record(make_event(noise))
        return accountant.epsilon(budget.delta)

    # Rényi bounds are quick, and above PLD's: they end the search from above near the answer.
    high = _bisect(lambda noise: epsilon(noise, "rdp") - budget.epsilon, budget, relative=1e-3)
    if method == "rdp" and epsilon(high, "rdp") >= (1 - tolerance) * budget.epsilon:
        return high
    low, factor = high, 0.9
    while epsilon(low, method) <= budget.epsilon:
        high, low, factor = low, low * factor, factor**2
        if low < LEAST_NOISE:
            return high
    # False position on log ε against log σ, which is nearly a line; every second step halves the side that
    # does not move, so it cannot stall.
    log_target = math.log(budget.epsilon)
    low_gap = math.log(epsilon(low, method)) - log_target
    high_epsilon = epsilon(high, method)
    for turn in range(100):
        if high_epsilon >= (1 - tolerance) * budget.epsilon or high - low < 1e-12 * high:
            break
        high_gap = math.log(max(high_epsilon, 1e-300)) - log_target
        aim = math.log(1 - tolerance / 2)  # just below the target, so that the answer is admissible
        share = (low_gap - aim) / (low_gap - high_gap) if turn % 3 < 2 else 0.5
        middle = low * (high / low) ** min(max(share, 0.01), 0.99)
        value = epsilon(middle, method)
        if value <= budget.epsilon:
            high, high_epsilon = middle, value
        else:
            low, low_gap = middle, math.log(value) - log_target
    return high


def _bisect(excess: Callable[[float], float], budget: PrivacyBudget, *, relative: float) -> float:
    """The least noise with excess ≤ 0, from above, to `relative` precision."""
    high = 1.0
    while excess(high) > 0:
        high *= 4
        if high > MOST_NOISE:
            raise UnreachableBudget(
                f"No noise multiplier up to {MOST_NOISE:g} meets {budget}; "
                "ask for a larger ε or δ, fewer steps or a smaller batch."
            )
    low = high
    while low > LEAST_NOISE and excess(low) <= 0:
        high, low = low, low / 4
    while high / low > 1 + relative:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if excess(middle) <= 0 else (middle, high)
    return high
