"""What a sweep says of privacy: all its runs together, since charting them releases them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from accounting import (
    Event,
    Method,
    NeighboringRelation,
    PrivacyAccountant,
    UnsupportedEvent,
)
from dpml.outputs import RunFolder, read_events
from recipes.sweep_plan import Plan
from recipes.sweep_workers import ABANDONED, EVENTS_FILE, RUNS

STATEMENT_FILE = "statement.md"


@dataclass(frozen=True)
class Together:
    """What the private runs on one data set, under one relation, cost together.

    Attributes:
        dataset: What they were trained on.
        relation: The neighbouring relation.
        runs: How many plans are counted.
        abandoned: How many of them were cut short and begun anew.
        delta: δ: the smallest of the runs.
        accountant: "pld", or "rdp" if one of the plans has Rényi divergences only.
        epsilon: An upper bound on ε of all plans composed.
        epsilon_lower: A lower bound on the same, for the dominating pair.
    """

    dataset: str
    relation: NeighboringRelation
    runs: int
    abandoned: int
    delta: float
    accountant: Method
    epsilon: float
    epsilon_lower: float


def compose(plan: Plan, output: Path) -> list[Together]:
    """Compose the plans of all runs of a sweep that may have released something, a group for each data set.

    A run counts with its whole plan as soon as that was written down, which is before its first release.
    """
    cells = {cell.name: cell.run for cell in plan.cells}
    groups: dict[tuple[str, NeighboringRelation], list[tuple[Event, bool, float]]] = {}
    for folder in (RUNS, ABANDONED):
        for file in sorted((output / folder).glob(f"*/{EVENTS_FILE}")):
            run = cells.get(file.parent.name.partition("~")[0])
            if run is None or run.non_private or run.delta is None:
                continue
            planned, _, record = read_events(file)
            group = groups.setdefault((run.dataset, record["neighboring_relation"]), [])
            group += [(event, folder == ABANDONED, run.delta) for event in planned]
    return [_together(*key, counted) for key, counted in groups.items()]


def _together(
    dataset: str, relation: NeighboringRelation, counted: Sequence[tuple[Event, bool, float]]
) -> Together:
    delta = min(delta for _, _, delta in counted)
    for method in get_args(Method):
        accountant = PrivacyAccountant(method, neighboring_relation=relation)
        try:
            for event, _, _ in counted:
                accountant.record(event)
            lower, upper = accountant.epsilon_bounds(delta)
        except UnsupportedEvent:  # a sanitised release has Rényi divergences only
            continue
        break
    else:
        raise AssertionError("Rényi divergences are known of every plan that ran")
    return Together(
        dataset=dataset,
        relation=relation,
        runs=len(counted),
        abandoned=sum(abandoned for _, abandoned, _ in counted),
        delta=delta,
        accountant=method,
        epsilon=upper,
        epsilon_lower=lower,
    )


def write_statement(plan: Plan, output: Path) -> list[str]:
    """Write `statement.md` and return its main lines, one for each group of runs."""
    from dpml.data import NAMES

    groups = compose(plan, output)
    lines = [_line(group) for group in groups]
    words = [
        "# Privacy statement of a sweep",
        f"The sweep of `{plan.recipe}` is one plan of {len(plan.cells):,} runs. It was fixed, and written down "
        "in `sweep.json`, before the first of them started, so all their plans compose as one.",
        *lines,
        "Charting all runs has released them all, and this is what that costs. Whatever is made of them is covered "
        "by it: picking the best one too. To release the winner only, at a smaller price, use `dpml tune`: it runs "
        "a *random* number of runs and shows none but the best.",
        *_remarks(plan, groups, set(NAMES)),
        "Each run's own statement is in its folder. The events are in `runs/*/privacy_events.json` and "
        "`abandoned/*/privacy_events.json`.",
    ]
    RunFolder.reopen(output).write_text(STATEMENT_FILE, "\n\n".join(words) + "\n")
    return lines


def _line(group: Together) -> str:
    begun = f", {group.abandoned} of them abandoned" if group.abandoned else ""
    return (
        f"All {group.runs:,} private runs on `{group.dataset}`{begun} together: **ε = {_up(group.epsilon)} at δ = "
        f"{group.delta:g}** ({group.relation}, {group.accountant}; at least {_down(group.epsilon_lower)} for the "
        "dominating pair)."
    )


def _remarks(plan: Plan, groups: Sequence[Together], benchmarks: set[str]) -> list[str]:
    found = []
    datasets = [group.dataset for group in groups]
    if not groups:
        found.append("No private run has started: there is nothing to compose.")
    for name in sorted({name for name in datasets if datasets.count(name) > 1}):
        found.append(
            f"The runs on `{name}` have **different neighbouring relations** (a sampling probability was given to "
            "some and not to others). They cannot be composed into one figure: each ε above leaves the other runs "
            "out."
        )
    if any(group.abandoned for group in groups):
        found.append(
            "A run that was killed is counted with its whole plan, and so is the run that took its place. This "
            "holds if it was not stopped because of what it had shown."
        )
    public = sorted(set(datasets) & benchmarks)
    if public:
        found.append(
            f"{', '.join(public)}: a public benchmark, training and test set alike. There is nothing to protect, "
            "and the composition is shown for information: it is what the same sweep would cost on private data. "
            "Means over seeds and the choice of settings by test accuracy are for such data alone."
        )
    if any(cell.run.non_private for cell in plan.cells):
        found.append(
            "The non-private runs protect no record. Of private data, neither they nor their accuracy may be shown."
        )
    if any(cell.run.insecure_noise_seed is not None for cell in plan.cells):
        found.append("**Not for release**: noise came from a known seed in some runs.")
    return found


def _up(value: float) -> str:
    """Four decimals, rounded up: never less than the bound."""
    return f"{math.ceil(value * 1e4) / 1e4:.4f}" if math.isfinite(value) else "∞"


def _down(value: float) -> str:
    return f"{math.floor(value * 1e4) / 1e4:.4f}" if math.isfinite(value) else "∞"
