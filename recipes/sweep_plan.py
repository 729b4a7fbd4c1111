"""The plan of a sweep: all its runs, fixed and written down before the first one starts."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from accounting import UserError
from accounting.events import check_count, shown
from dpml.outputs import RunFolder
from dpml.paths import read_text
from dpml.registry import Recipe, Run, configured, method_of, recipe_entry, recipe_run

PLAN_FILE = "sweep.json"
PLAN_VERSION = 1
NO_AXES = ("seed", "non_private")
"""Fields that a sweep sets itself."""
# Of what is swept, the non-private twin takes what is trained on what. How, its recipe knows best.
_SHARED = ("dataset", "classes", "image_size", "model", "device", "public", "public_examples", "student")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: Its folder's name, which says what is special about it.
        run: Its configuration.
    """

    name: str
    run: Run


def group_of(name: str) -> str:
    """The name of a cell without its seed: cells that differ in nothing else share it."""
    return name.rpartition("seed-")[0].rstrip("_") or "all"


@dataclass(frozen=True)
class Plan:
    """A sweep: which runs of which recipe."""

    recipe: str
    cells: tuple[Cell, ...]

    @classmethod
    def of(
        cls,
        recipe: str | Recipe,
        axes: Mapping[str, Sequence[Any]],
        *,
        seeds: int,
        with_ceiling: bool,
    ) -> Plan:
        """The product of all axes and seeds, and the non-private twin for each seed.

        Raises:
            UserError: for an unknown recipe or field, and for values that are no configuration.
        """
        configure, name = _configure(recipe), recipe if isinstance(recipe, str) else recipe.__name__
        count = check_count(seeds, "seeds", "a sweep", low=1)
        try:
            axes = {field: list(values) for field, values in axes.items()}
        except (TypeError, AttributeError) as error:
            raise UserError(
                f"A sweep's axes are fields with a list of values each. Got {shown(axes)}."
            ) from error
        _check_axes(axes, configure(True, None))
        cells = list(_cells(axes, count, lambda chosen: _private_run(configure, chosen)))
        if with_ceiling:
            shared = {field: values for field, values in axes.items() if field in _SHARED}
            twins = _cells(shared, count, lambda chosen: replace(configure(False, None), **chosen))
            cells += [Cell(f"non-private_{cell.name}", cell.run) for cell in twins]
        names = [cell.name for cell in cells]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"The sweep has the run {twice!r} twice; give each value once.")
        return cls(name, tuple(cells))

    def write_or_check(self, output: Path) -> None:
        """Write the plan to a new folder, or check that the folder is that of this very sweep.

        Raises:
            UserError: if it holds something else.
        """
        try:
            known = json.loads(read_text(output / PLAN_FILE))
        except FileNotFoundError:
            if any(not path.name.startswith(".") for path in output.iterdir()):
                raise UserError(
                    f"The output folder {str(output)!r} is not empty and holds no sweep; choose a new one."
                ) from None
            RunFolder.reopen(output).write_json(PLAN_FILE, self._record())
            return
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{str(output / PLAN_FILE)!r} is damaged; choose a new folder.") from error
        if known != json.loads(json.dumps(self._record())):
            raise UserError(
                f"The output folder {str(output)!r} holds another sweep; choose a new one, or repeat the "
                "call that made it to go on with it."
            )

    def _record(self) -> dict[str, Any]:
        cells = [
            {"name": cell.name, "method": method_of(cell.run), "config": asdict(cell.run)}
            for cell in self.cells
        ]
        return {"schema_version": PLAN_VERSION, "recipe": self.recipe, "cells": cells}


def _configure(recipe: str | Recipe) -> Callable[[bool, float | None], Run]:
    """From (private, ε) to the configuration that the recipe gives."""
    if isinstance(recipe, str):
        entry = recipe_entry(recipe)
        return lambda private, epsilon: recipe_run(entry, private=private, epsilon=epsilon)
    if not callable(recipe):
        raise UserError(f"A sweep needs the name of a recipe or a function. Got {shown(recipe)}.")
    function = recipe
    return lambda private, epsilon: configured(function, private=private, epsilon=epsilon)


def _check_axes(axes: Mapping[str, Sequence[Any]], run: Run) -> None:
    known = [field.name for field in fields(run) if field.name not in NO_AXES]
    for name, values in axes.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; leave it out."
            raise UserError(f"A sweep of a {method_of(run)} recipe has no axis {name!r}{hint}")
        if not values:
            raise UserError(f"The axis {name!r} has no values; give at least one.")
    if {"epsilon", "noise_multiplier"} <= axes.keys():
        raise UserError("Sweep epsilon (budgets) or noise_multiplier (noise), not both.")


def _cells(
    axes: Mapping[str, Sequence[Any]], seeds: int, make: Callable[[dict[str, Any]], Run]
) -> Iterator[Cell]:
    """Seed by seed, so that a sweep that is cut short has some of every cell."""
    for seed in range(seeds):
        for values in product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            run = replace(make(chosen), seed=seed)  # before its values become words: not all have some
            words = [
                f"{name.replace('_', '-')}-{_word(chosen[name])}" for name in axes if len(axes[name]) > 1
            ]
            yield Cell("_".join([*words, f"seed-{seed}"]), run)


def _private_run(configure: Callable[[bool, float | None], Run], chosen: dict[str, Any]) -> Run:
    """The recipe with what was chosen; of ε and noise, one takes the other's place."""
    wish: dict[str, Any] = {"noise_multiplier": None} if "epsilon" in chosen else {}
    wish |= {"epsilon": None} if "noise_multiplier" in chosen else {}
    return replace(configure(True, chosen.get("epsilon")), **wish, **chosen)


def _word(value: Any) -> str:
    """A value as a part of a file's name."""
    short = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return re.sub(r"[^\w.+-]+", "-", short)[-40:]
