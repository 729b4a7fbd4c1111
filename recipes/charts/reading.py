"""Runs to draw, from folders, tables and results files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from accounting import UserError
from dpml.paths import read_text
from recipes.table import read_runs, summary_row, table_of

_NAMES = ("run", "recipe")


def load_runs(paths: Sequence[Path]) -> pl.DataFrame:
    """A table of runs, one row each, as `recipes.table` has it. A run that is found twice is there once.

    Args:
        paths: What `recipes.table.read_runs` reads, and results files (.json), as
            `python -m recipes.results --save` and `python -m recipes.pate_frontier --save` write them.

    Raises:
        UserError: if a path cannot be read or holds no run; the message names it.
    """
    if not paths:
        raise UserError("Name at least one folder or file with runs.")
    runs = pl.concat([_results(path) if path.suffix == ".json" else read_runs(path) for path in paths])
    if runs.is_empty():
        raise UserError(f"{str(paths[0])!r} is a table without a run.")
    # To the nanosecond, no two runs take the same time.
    figures = pl.struct(pl.exclude(_NAMES))
    return runs.filter(pl.col("train_seconds").is_null() | figures.is_first_distinct())


def runs_of(summaries: Mapping[str, Mapping[str, Any]]) -> pl.DataFrame:
    """A table of runs from the contents of their `summary.json`, by name."""
    return table_of(summary_row(summary, recipe=None, run=name) for name, summary in summaries.items())


def _results(path: Path) -> pl.DataFrame:
    runs = read_json(path).get("each")
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise UserError(f"{str(path)!r} is no results file: it has no list 'each' of runs.")
    # These files hold completed runs alone. Those of the PATE frontier name a case, but no method.
    named = {
        f"{run.get('case', path.stem)}, seed {run.get('seed')} ({n})": {
            "status": "completed",
            "method": "pate" if "teachers" in run else "dpsgd",
            **run,
        }
        for n, run in enumerate(runs)
    }
    return runs_of(named)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: if there is none.
    """
    try:
        data: object = json.loads(read_text(path))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not valid JSON; is it the right file?") from error
    if not isinstance(data, dict):
        raise UserError(f"{str(path)!r} holds no JSON object; is it the right file?")
    return data
