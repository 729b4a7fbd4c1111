"""ε against steps."""

from __future__ import annotations

from collections.abc import Sequence

from accounting import pld
from accounting.accountant import Method
from accounting.events import Event, NeighboringRelation, atoms, check_count, check_number
from accounting.rdp import epsilon_from_rdp, rdp

_LARGE = 100.0  # beyond this a curve is drawn by Rényi bounds alone: quick, and large either way


def epsilon_curve(
    step: Event,
    steps: Sequence[int],
    delta: float,
    *,
    method: Method = "pld",
    neighboring_relation: NeighboringRelation = "zero-out",
) -> list[tuple[float, float]]:
    """Return (lower, upper) bounds on ε after each of several numbers of steps.

    A curve to look at while a plan runs. The guarantee of a run that may be stopped early is the plan's.

    Args:
        step: The event of one step.
        steps: Numbers of steps.
        delta: In (0, 1).
        method: "pld" or "rdp", for the upper bound; the lower one is by PLD.
        neighboring_relation: As for `PrivacyAccountant`.
    """
    delta = check_number(delta, "delta", "epsilon_curve()", low=0, high=1)
    steps = [check_count(count, "steps", "epsilon_curve()") for count in steps]
    counts = atoms(step, neighboring_relation)
    rho = rdp(counts)
    renyi = [epsilon_from_rdp(k * rho, delta) if k and counts else 0.0 for k in steps]
    if max(renyi, default=0.0) > _LARGE:
        return [(0.0, upper) for upper in renyi]
    bounds = pld.epsilon_curve(counts, steps, delta)
    if method == "rdp":
        bounds = [(lower, max(lower, upper)) for (lower, _), upper in zip(bounds, renyi, strict=True)]
    return bounds
