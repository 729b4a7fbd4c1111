"""Runs as a table: a row for each run, in columns that charts and notebooks can rely on."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import polars as pl

from accounting import UserError
from dpml.config import DPSGDRun
from dpml.pate.config import PATERun
from recipes.trials import read_summary

TABLE_FILE = "sweep.parquet"
_TYPES: dict[type, pl.DataType] = {
    bool: pl.Boolean(),
    int: pl.Int64(),
    float: pl.Float64(),
    str: pl.String(),
}
_COLUMNS: dict[str, type] = {
    "recipe": str,
    "run": str,
    "status": str,
    "error": str,
    "method": str,
    "dataset": str,
    "private": bool,
    "epsilon": float,
    "epsilon_lower": float,
    "delta": float,
    "noise_multiplier": float,
    "batch_size": int,
    "steps": int,
    "test_accuracy": float,
    "train_seconds": float,
    "examples_per_second": float,
    "seed": int,
}


def _columns() -> dict[str, type]:
    """All columns and their types: those above, and a `config_` column for every field of a run."""
    found = dict(_COLUMNS)
    for config in (DPSGDRun, PATERun):
        hints = get_type_hints(config)
        for field in fields(config):
            kinds = {kind for kind in (hints[field.name], *get_args(hints[field.name])) if kind in _TYPES}
            found.setdefault(f"config_{field.name}", kinds.pop() if kinds else str)
    return found


COLUMNS = _columns()
"""Name and type of every column. A value is null where it does not apply."""


def table_of(rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """Make a table with `COLUMNS` from rows that may lack some of them."""
    kept = [{name: _as(kind, row.get(name)) for name, kind in COLUMNS.items()} for row in rows]
    return pl.DataFrame(kept, schema={name: _TYPES[kind] for name, kind in COLUMNS.items()})


def summary_row(summary: Mapping[str, Any], *, recipe: str | None, run: str) -> dict[str, Any]:
    """The row of a run that has a summary."""
    steps, batch, seconds = (
        _as(float, summary.get(key)) for key in ("steps", "expected_batch_size", "train_seconds")
    )
    row, config = {name: summary.get(name) for name in _COLUMNS}, summary.get("config")
    return {
        **row,
        **config_columns(config if isinstance(config, dict) else {}),
        "recipe": recipe,
        "run": run,
        "error": "the weights were not finite any more" if summary.get("status") == "diverged" else None,
        "private": summary.get("epsilon") is not None,
        "batch_size": batch,
        "examples_per_second": steps * batch / seconds if steps and batch and seconds else None,
    }


def config_columns(config: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a configuration."""
    return {f"config_{name}": value for name, value in config.items()}


def read_runs(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> pl.DataFrame:
    """Read runs as a table with `COLUMNS`.

    Args:
        paths: One or several: the folder of a sweep, a table's parquet file, the folder of a run, or a folder
            that has folders of runs somewhere in it.

    Raises:
        UserError: if one of them holds no run.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise UserError("There are no runs to read; give at least one folder.")
    return pl.concat([_read(Path(path)) for path in given])


def _read(path: Path) -> pl.DataFrame:
    table = path / TABLE_FILE if path.is_dir() else path
    if table.is_file():
        return _read_parquet(table)
    if path.name == TABLE_FILE or not path.is_dir():
        raise UserError(f"There is no run, sweep or table {str(path)!r}.")
    rows = []
    for file in sorted(path.rglob("summary.json")):
        summary = read_summary(file.parent)
        if summary is not None and "abandoned" not in file.relative_to(path).parts:
            name = file.parent.relative_to(path).as_posix()
            rows.append(summary_row(summary, recipe=None, run=path.name if name == "." else name))
    if not rows:
        raise UserError(f"{str(path)!r} holds no finished run: there is no summary.json in it.")
    return table_of(rows)


def _read_parquet(path: Path) -> pl.DataFrame:
    try:
        found = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{str(path)!r} is not a table of runs ({type(error).__name__}).") from error
    if not {"run", "status", "test_accuracy"} <= set(found.columns):
        raise UserError(f"{str(path)!r} is a table of something else: it has no column run or status.")
    return table_of(found.to_dicts())  # a table of an older version may lack columns


def _as(kind: type, value: Any) -> Any:
    """`value` as its column's type, or None if it is none: a summary may be of another version."""
    if value is None or (kind is bool and not isinstance(value, bool)):
        return None
    convert: Callable[[Any], Any] = kind
    try:
        found = convert(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if isinstance(found, float) and not math.isfinite(found) else found
