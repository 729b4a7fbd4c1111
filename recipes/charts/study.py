"""From a table of runs to what is drawn: cells, lines and ceilings of one data set.

Every chart, picture or page, is drawn from a `Study`, so that they cannot disagree.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from accounting import UserError

BENCHMARKS = {"digits": "Digits", "mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
METHODS = {"dpsgd": "DP-SGD", "pate": "PATE"}
_NEEDED = ("recipe", "method", "dataset", "status", "private", "epsilon", "delta", "test_accuracy")
_SAME = ("noise_multiplier", "batch_size", "steps")  # beside the guarantee and the configuration
_SEEDS = {"seed", "insecure_noise_seed", "log_not_private"}
_WISHES = ("epsilon", "noise_multiplier", "queries")  # the settings that a line runs along
_FIRST = ("model", "features", "teacher", "aggregator", "student")  # what tells runs apart best
_OF_THE_GUARANTEE = {"delta", "neighboring_relation", "sampling_probability", "places"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Completed runs that differ in nothing but their seed.

    Attributes:
        recipe: Name of the recipe, or None.
        method: "dpsgd", "pate" or another.
        epsilon: Upper bound on ε; None without privacy.
        epsilon_lower: Lower bound on ε, if known.
        delta: δ; None without privacy.
        relation: The neighbouring relation; None without privacy.
        noise_multiplier: σ over the clip norm; for PATE in votes.
        batch_size: Expected batch size.
        steps: Steps, or None.
        settings: The configuration without its seeds.
        runs: Names of the runs.
        seeds: Their seeds.
        accuracies: Their test accuracies, in [0, 1].
        seconds: Their training seconds; shorter than `runs` where unknown.
        speeds: Their examples per second; likewise.
    """

    recipe: str | None
    method: str
    epsilon: float | None
    epsilon_lower: float | None
    delta: float | None
    relation: str | None
    noise_multiplier: float | None
    batch_size: float | None
    steps: int | None
    settings: Mapping[str, Any] = field(hash=False)
    runs: tuple[str, ...]
    seeds: tuple[int | None, ...]
    accuracies: tuple[float, ...]
    seconds: tuple[float, ...]
    speeds: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean test accuracy over the seeds."""
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the test accuracy over the seeds; None for one run."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def mean_seconds(self) -> float | None:
        """Mean training seconds, if known."""
        return statistics.mean(self.seconds) if self.seconds else None

    @property
    def mean_speed(self) -> float | None:
        """Mean examples per second, if known."""
        return statistics.mean(self.speeds) if self.speeds else None

    @property
    def guarantee(self) -> tuple[float | None, str | None]:
        """What ε is at: values at different δ or relations must not be compared."""
        return self.delta, self.relation


@dataclass(frozen=True)
class Line:
    """Private cells that belong together, by ascending ε."""

    label: str
    method: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Study:
    """All that is known of one data set.

    Attributes:
        dataset: Its name.
        cells: The private cells.
        ceilings: The cells without privacy.
        left_out: How many runs are not shown, by reason.
    """

    dataset: str
    cells: tuple[Cell, ...]
    ceilings: tuple[Cell, ...]
    left_out: Mapping[str, int] = field(hash=False)

    @cached_property
    def guarantees(self) -> list[tuple[float | None, str | None]]:
        """The different (δ, relation) of the private cells."""
        return sorted({cell.guarantee for cell in self.cells}, key=str)

    @cached_property
    def lines(self) -> list[Line]:
        """The lines: DP-SGD's first. Cells of different δ or relation are never on one."""
        split = _split_fields(self.cells)
        groups: dict[tuple[Any, ...], list[Cell]] = {}
        for cell in self.cells:
            values = tuple((name, _plain(cell.settings.get(name))) for name in split.get(_family(cell), ()))
            groups.setdefault((*_family(cell), values), []).append(cell)
        recipes = Counter(method for method, _ in {(cell.method, cell.recipe) for cell in self.cells})
        lines = []
        for (method, recipe, delta, relation, values), members in groups.items():
            words = [METHODS.get(method, method)]
            if recipes[method] > 1:
                words.append(recipe or "no recipe")
            words += [f"{name.replace('_', ' ')} {value}".replace('"', "") for name, value in values]
            if len(self.guarantees) > 1:
                words.append(f"δ = {small(delta)}, {relation}")
            ordered = sorted(members, key=lambda cell: (cell.epsilon or 0.0, cell.mean))
            lines.append(Line(", ".join(words), method, tuple(ordered)))
        return sorted(lines, key=lambda line: (line.method not in METHODS, line.method, line.label))

    @property
    def seeds_in_words(self) -> str:
        """How many seeds a point stands for."""
        counts = {len(cell.runs) for cell in (*self.cells, *self.ceilings)}
        if counts == {1}:
            return "one seed a point: no spread is known"
        number = f"{max(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        return f"mean ± standard deviation over {number} seeds; dots: single seeds"

    @property
    def left_out_in_words(self) -> str:
        """How many runs are not shown and why; empty if none."""
        count = sum(self.left_out.values())
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(self.left_out.items()))
        return f"{count} {'run is' if count == 1 else 'runs are'} left out: {reasons}" if count else ""

    @property
    def guarantee_in_words(self) -> str:
        """What ε is at, for an axis."""
        if len(self.guarantees) != 1:
            return "ε (δ and relation differ: see the legend)"
        delta, relation = self.guarantees[0]
        return f"ε at δ = {small(delta)}, {relation}"

    def figures(self) -> list[dict[str, Any]]:
        """What the charts show, as plain figures: they are kept in the pictures too."""
        shown = [(line.label, cell) for line in self.lines for cell in line.cells]
        shown += [(f"{METHODS.get(c.method, c.method)} without privacy", c) for c in self.ceilings]
        return [
            {
                "line": label,
                "epsilon": cell.epsilon,
                "delta": cell.delta,
                "relation": cell.relation,
                "noise_multiplier": cell.noise_multiplier,
                "accuracy_mean": cell.mean,
                "accuracy_deviation": cell.deviation,
                "runs": len(cell.runs),
            }
            for label, cell in shown
        ]


def studies(runs: pl.DataFrame) -> list[Study]:
    """One study for each data set.

    Args:
        runs: A table as `read_runs` returns it: one row a run.

    Raises:
        UserError: if columns are missing, or no run is complete.
    """
    missing = [name for name in _NEEDED if name not in runs.columns]
    if missing:
        raise UserError(f"The table of runs lacks the column {missing[0]!r}; is it a table of `dpml sweep`?")
    found = []
    rows = runs.to_dicts()
    for dataset in sorted({str(row["dataset"]) for row in rows if row["dataset"] is not None}):
        # A run that failed early may not know its data set; it is told with the others of its recipe.
        study = _study(dataset, [row for row in rows if row["dataset"] in (dataset, None)])
        if study.cells or study.ceilings:
            found.append(study)
    if not found:
        states = Counter(str(row["status"]) for row in rows)
        words = ", ".join(f"{count} {status}" for status, count in sorted(states.items())) or "none at all"
        raise UserError(f"There is no completed run with a test accuracy to draw (runs: {words}).")
    return found


def _study(dataset: str, rows: Sequence[Mapping[str, Any]]) -> Study:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    left_out: Counter[str] = Counter()
    for row in rows:
        reason = _unfit(row)
        if reason is not None:
            left_out[reason] += 1
        else:
            groups.setdefault(_identity(row), []).append(row)
    cells = [_cell(members) for members in groups.values()]
    private = tuple(cell for cell in cells if cell.epsilon is not None)
    return Study(dataset, private, tuple(cell for cell in cells if cell.epsilon is None), dict(left_out))


def _unfit(row: Mapping[str, Any]) -> str | None:
    """Why a run cannot be drawn, or None."""
    if row["status"] != "completed":
        return str(row["status"])
    if not _is_number(row["test_accuracy"]):
        return "without a test accuracy"
    wants_privacy = row["private"] or row.get("config_non_private") is False
    if wants_privacy and not (_is_number(row["epsilon"]) and row["epsilon"] > 0):
        return "without a finite ε"
    return None


def _identity(row: Mapping[str, Any]) -> str:
    names = ["recipe", "method", "private", "epsilon", "delta", *_SAME]
    names += [name for name in row if name.startswith("config_") and name[7:] not in _SEEDS]
    return json.dumps([*(row.get(name) for name in names), _relation(row)], default=str)


def _cell(rows: Sequence[Mapping[str, Any]]) -> Cell:
    first = rows[0]
    settings = {
        name[7:]: value
        for name, value in first.items()
        if name.startswith("config_") and name[7:] not in _SEEDS and value is not None
    }
    return Cell(
        recipe=first["recipe"],
        method=str(first["method"]),
        epsilon=first["epsilon"] if first["private"] else None,
        epsilon_lower=first.get("epsilon_lower"),
        delta=first["delta"] if first["private"] else None,
        relation=_relation(first) if first["private"] else None,
        **{name: first.get(name) for name in _SAME},
        settings=settings,
        runs=tuple(str(row.get("run")) for row in rows),
        seeds=tuple(row.get("seed") for row in rows),
        accuracies=tuple(row["test_accuracy"] for row in rows),
        seconds=_positive(row.get("train_seconds") for row in rows),
        speeds=_positive(row.get("examples_per_second") for row in rows),
    )


def _relation(row: Mapping[str, Any]) -> str:
    """The relation as recorded, as configured, or as it follows from the configuration (`dpml.config`)."""
    named = row.get("neighboring_relation") or row.get("config_neighboring_relation")
    fixed = row.get("config_sampling_probability") or row.get("config_places")
    return str(named or ("add-or-remove-one" if fixed else "zero-out"))


def _family(cell: Cell) -> tuple[Any, ...]:
    return cell.method, cell.recipe, cell.delta, cell.relation


def _split_fields(cells: Sequence[Cell]) -> dict[tuple[Any, ...], list[str]]:
    """For each family the settings that differ between cells of the same wish: each value is a line.

    Settings that change with the wish alone, as in a recipe that suits itself to ε, split nothing.
    """
    peers: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        peers.setdefault((*_family(cell), *(cell.settings.get(name) for name in _WISHES)), []).append(cell)
    groups: dict[tuple[Any, ...], list[list[Cell]]] = {}
    for members in peers.values():
        groups.setdefault(_family(members[0]), []).append(members)
    return {family: _telling(members) for family, members in groups.items()}


def _telling(groups: Sequence[Sequence[Cell]]) -> list[str]:
    """A few settings that tell the cells of each group apart, those that a reader knows first."""

    def parts(names: Sequence[str]) -> int:
        told = [
            {tuple(_plain(cell.settings.get(name)) for name in names) for cell in cells} for cells in groups
        ]
        return sum(map(len, told))

    known = {name for cells in groups for cell in cells for name in cell.settings}
    others = sorted(known - {*_WISHES, *_OF_THE_GUARANTEE, *_FIRST})
    names = [*(name for name in _FIRST if name in known), *others]
    chosen: list[str] = []
    for name in names:
        if parts([*chosen, name]) > parts(chosen):
            chosen.append(name)
    return chosen


def pareto(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that no other beats in ε, accuracy and seconds at once, by their means.

    Only cells of the same δ and relation are compared, and only those with known seconds.
    """
    timed = [cell for cell in cells if cell.seconds]
    return [cell for cell in timed if not any(_beats(other, cell) for other in timed)]


def _beats(one: Cell, other: Cell) -> bool:
    def costs(cell: Cell) -> tuple[float, ...]:
        return cell.epsilon or math.inf, -cell.mean, cell.mean_seconds or math.inf

    pairs = list(zip(costs(one), costs(other), strict=True))
    return one.guarantee == other.guarantee and all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def name_of(dataset: str) -> str:
    """What a title calls a data set: a benchmark's usual name, or a path's last part."""
    return BENCHMARKS.get(dataset, Path(dataset).name)


def small(value: float | None) -> str:
    """A small number as people write it: 1e-5, not 1e-05."""
    return "?" if value is None else f"{value:g}".replace("e-0", "e-")


def _plain(value: Any) -> str:
    return json.dumps(value, default=str)


def _positive(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values if _is_number(value) and value > 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
