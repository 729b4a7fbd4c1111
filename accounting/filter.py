"""The Rényi filter: a budget across plans that are chosen adaptively.

Composing privacy-loss distributions is a guarantee for a plan that was fixed in advance. When a later
event's parameters depend on earlier releases, a filter is needed that decides, event by event, with
thresholds fixed in advance. Feldman & Zrnic 2021, Theorem 3.1: at one order α, admitting events as long as
their Rényi divergences of order α sum to at most B leaves the whole interaction (α, B)-RDP.

`RenyiFilter` runs one such filter for each order of a fixed grid Λ and admits an event while *any* of them
does. Split the outcomes by the first order (in a fixed sequence) whose filter was never exceeded: on each
part the interaction coincides with that filter's, which is (ε, δ/|Λ|)-DP, so the whole is (ε, δ)-DP by a
union over the parts. That is what the grid costs: δ/|Λ| for each order.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from accounting.atoms import Atom
from accounting.budget import PrivacyBudget
from accounting.pairs import FloatArray
from accounting.rdp import log_hockey_stick_factor, rdp

FILTER_ORDERS: FloatArray = np.array([1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 28, 40, 64, 128, 512])
"""Λ, fixed when a budget is made. Denser grids cost more δ for each order than they gain."""


class RenyiFilter:
    """Thresholds at the orders Λ for one budget. It holds no state: callers pass what was spent."""

    def __init__(self, budget: PrivacyBudget) -> None:
        self.budget = budget
        share = np.log(budget.delta) - np.log(len(FILTER_ORDERS))
        conversion = (log_hockey_stick_factor(FILTER_ORDERS) - share) / (FILTER_ORDERS - 1)
        self.thresholds: FloatArray = budget.epsilon - conversion
        self._conversion = conversion

    def admits(self, spent: Mapping[Atom, int]) -> bool:
        """Whether all of `spent`, the candidate included, stays within the threshold of some order."""
        return bool(np.any(rdp(spent, FILTER_ORDERS) <= self.thresholds))

    def epsilon(self, spent: Mapping[Atom, int]) -> float:
        """The least ε of a filter budget (at this δ) that would have admitted all of `spent`."""
        return float(max(0.0, np.min(rdp(spent, FILTER_ORDERS) + self._conversion)))
