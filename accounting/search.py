"""One-dimensional searches that end on the safe side."""

from __future__ import annotations

import math
from collections.abc import Callable


def largest_whole(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest n in [least, most] that fits, given that `least` does and that fitting only ever stops."""
    low, high = least, 2 * least
    while high < most and fits(high):
        low, high = high, 2 * high
    if high >= most:
        if fits(most):
            return most
        high = most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def approach(
    value: Callable[[float], float],
    bad: float,
    good: float,
    target: float,
    *,
    tolerance: float,
    good_value: float | None = None,
) -> float:
    """The point between `bad` (value above `target`) and `good` (at or below) whose value is closest below.

    False position on log value against log point, which is nearly a line for ε against noise, steps or
    sampling probability. Every third step bisects, so it cannot stall.

    Returns:
        A point with (1 − tolerance)·target ≤ value ≤ target, or where no float lies between, the good one.
    """
    bad_gap = math.log(value(bad) / target)
    best = value(good) if good_value is None else good_value
    for turn in range(200):
        if best >= (1 - tolerance) * target or abs(good / bad - 1) < 1e-13:
            break
        good_gap = math.log(max(best / target, 1e-300))
        aim = math.log(1 - tolerance / 2)  # just below the target, so that the answer is admissible
        share = (bad_gap - aim) / (bad_gap - good_gap) if turn % 3 < 2 and math.isfinite(bad_gap) else 0.5
        middle = bad * (good / bad) ** min(max(share, 0.01), 0.99)
        found = value(middle)
        if found <= target:
            good, best = middle, found
        else:
            bad, bad_gap = middle, math.log(found / target)
    return good
