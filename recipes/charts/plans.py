"""ε after every step of the plans that runs reserved, from their `privacy_events.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accounting import (
    Composed,
    Event,
    NeighboringRelation,
    PoissonSampled,
    PrivacyAccountant,
    Repeated,
    UserError,
)
from accounting.accountant import Method
from accounting.curve import epsilon_curve
from dpml.outputs import read_events
from recipes.charts.reading import read_json
from recipes.charts.study import METHODS

_POINTS = 24
_TOLERANCE = 0.01  # of a curve to look at


@dataclass(frozen=True)
class Plan:
    """One event, repeated, perhaps after another.

    Attributes:
        first: What comes before, such as the mean of features; None for nothing.
        event: What is repeated: a step of DP-SGD, an answer of PATE.
        count: How often.
        delta: δ.
        relation: The neighbouring relation.
        accountant: "pld" or "rdp".
        method: "dpsgd", "pate" or another.
        dataset: The data set of the run.
        noise_multiplier: As in the run's summary.
    """

    first: Event | None
    event: Event
    count: int
    delta: float
    relation: NeighboringRelation
    accountant: Method
    method: str
    dataset: str
    noise_multiplier: float

    @property
    def label(self) -> str:
        """What is repeated, in a few words."""
        words = f"{METHODS.get(self.method, self.method)}, σ = {self.noise_multiplier:.3g}"
        if isinstance(self.event, PoissonSampled):
            words += f", q = {self.event.sampling_probability:.3g}"
        return f"{words}, {self.count:,} {self.unit}"

    @property
    def unit(self) -> str:
        """What is counted."""
        return "answers" if self.method == "pate" else "steps"

    def curve(self) -> tuple[list[int], list[float], list[float]]:
        """Numbers of steps, and the lower and upper bound on ε after each."""
        steps = np.unique(np.geomspace(1, self.count, _POINTS).round().astype(int)).tolist()
        if self.first is None:
            bounds = epsilon_curve(
                self.event, steps, self.delta, method=self.accountant, neighboring_relation=self.relation
            )
        else:
            bounds = [self._bounds(Composed([self.first, Repeated(self.event, k)])) for k in steps]
        return steps, [lower for lower, _ in bounds], [upper for _, upper in bounds]

    def _bounds(self, event: Event) -> tuple[float, float]:
        accountant = PrivacyAccountant(
            self.accountant, neighboring_relation=self.relation, tolerance=_TOLERANCE
        )
        accountant.record(event)
        return accountant.epsilon_bounds(self.delta)


def find_plans(paths: Sequence[Path]) -> dict[Plan, None]:
    """The different plans of completed private runs below some folders, in the order of their folders.

    A table or results file stands for the folder that it lies in. Plans of several different events, such as
    Confident-GNMax's checks and answers, have no single curve and are not among them.
    """
    folders = {path if path.is_dir() else path.parent for path in paths if path.suffix != ".json"}
    files = sorted({file for folder in folders for file in folder.rglob("privacy_events.json")})
    found = [plan for file in files if (plan := _plan(file)) is not None]
    return dict.fromkeys(sorted(found, key=lambda plan: (plan.method, -plan.noise_multiplier)))


def _plan(file: Path) -> Plan | None:
    try:
        summary: dict[str, Any] = read_json(file.with_name("summary.json"))
        planned, _, record = read_events(file)
    except UserError:  # a run that has not ended, or failed: the table of runs counts it
        return None
    delta, noise = summary.get("delta"), summary.get("noise_multiplier")
    if len(planned) != 1 or delta is None or noise is None:
        return None
    [plan] = planned
    first = None
    if isinstance(plan, Composed) and len(plan.events) == 2 and not isinstance(plan.events[0], Repeated):
        first, plan = plan.events
    if not isinstance(plan, Repeated):
        return None
    return Plan(
        first=first,
        event=plan.event,
        count=plan.count,
        delta=delta,
        relation=record["neighboring_relation"],
        accountant=record["accountant"],
        method=str(summary["method"]),
        dataset=str(summary["dataset"]),
        noise_multiplier=noise,
    )
