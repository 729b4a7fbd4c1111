"""Sweeps: a recipe over several settings and seeds, in parallel, resumable, with one table for all runs.

>>> from recipes.sweep import sweep
>>> runs = sweep("dpsgd-digits", "runs/sweep", {"epsilon": [1, 3, 8]}, seeds=5)      # doctest: +SKIP

`dpml sweep` is the same as a command. The folder holds `sweep.json` (the plan), `runs/` (run folders),
`sweep.parquet` (a row for each run), `statement.md` (what all runs cost together) and `workers.log`.
"""

from __future__ import annotations

import os
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeRemaining
from rich.table import Table

from accounting import UserError
from accounting.events import check_count
from dpml.config import DPSGDRun
from dpml.options import lists_from, typed
from dpml.pate.config import PATERun
from dpml.paths import check_path
from dpml.registry import Recipe, method_of
from recipes.sweep_plan import NO_AXES, Cell, Plan, group_of

if TYPE_CHECKING:
    import polars as pl

_WIDTH = 140
_A_YEAR = 365 * 24 * 3600.0


def sweep(
    recipe: str | Recipe,
    output: str | os.PathLike[str],
    axes: Mapping[str, Sequence[Any]] | None = None,
    *,
    seeds: int = 1,
    with_ceiling: bool = False,
    processes: int | None = None,
) -> pl.DataFrame:
    """Run a recipe with every combination of settings and every seed, or go on where a call was cut short.

    Args:
        recipe: A recipe's name, or a function that is one.
        output: A folder: a new one, or that of the same sweep, whose finished runs are not repeated.
        axes: From fields of the configuration to the values that they take. The product of all is run.
        seeds: How many seeds: 0 and up.
        with_ceiling: Run the non-private twin with each seed too.
        processes: How many runs at once; by default as many as there are cores. The cores are shared out.

    Returns:
        A row for each run, with `recipes.table.COLUMNS`; a run that failed has its reason in `error`.

    Raises:
        UserError: for a mistake in the arguments, or a folder with something else. Nothing is run then.
    """
    plan = Plan.of(recipe, {} if axes is None else axes, seeds=seeds, with_ceiling=with_ceiling)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes is None:
        processes = min(cores, len(plan.cells))
    processes = check_count(processes, "processes", "a sweep", low=1)
    return _execute(plan, _folder(output), processes, max(1, cores // processes))


def _folder(output: str | os.PathLike[str]) -> Path:
    path = check_path(output, "output folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"The output folder {str(path)!r} cannot be made ({reason}); choose another."
        ) from error
    return path


def _execute(plan: Plan, output: Path, processes: int, threads: int) -> pl.DataFrame:
    from dpml.resuming import forget_checkpoint
    from recipes.sweep_statement import write_statement
    from recipes.sweep_workers import (
        ABANDONED,
        RUNS,
        finished_summary,
        keep_events_alone,
        run_cells,
        sole_owner,
    )
    from recipes.table import TABLE_FILE, summary_row, table_of

    with sole_owner(output):
        plan.write_or_check(output)
        for folder in (output / ABANDONED).glob("*"):  # a kill may have come while one was emptied
            keep_events_alone(folder)
        rows: dict[str, dict[str, Any]] = {}

        def note(cell: Cell, error: str | None) -> None:
            """Keep the row of a cell that is over, and write the table anew."""
            summary = finished_summary(output, cell)
            if summary is None:
                rows[cell.name] = _failed_row(plan, cell, error or "it left no summary")
            else:
                rows[cell.name] = summary_row(summary, recipe=plan.recipe, run=cell.name)
            ordered = table_of(rows[each.name] for each in plan.cells if each.name in rows)
            temporary = output / f".{TABLE_FILE}.tmp"
            with temporary.open("wb") as file:
                ordered.write_parquet(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(output / TABLE_FILE)

        waiting = []
        for cell in plan.cells:
            if finished_summary(output, cell) is None:
                waiting.append(cell)
            else:
                forget_checkpoint(output / RUNS / cell.name)
                note(cell, None)
        with _Progress(len(plan.cells), len(plan.cells) - len(waiting)) as progress:

            def finished(cell: Cell, error: str | None) -> None:
                note(cell, error)
                progress.show(rows[cell.name])

            run_cells(waiting, output, finished, processes=processes, threads=threads)
        write_statement(plan, output)
        return table_of(rows[cell.name] for cell in plan.cells)


def _failed_row(plan: Plan, cell: Cell, error: str) -> dict[str, Any]:
    """The row of a run that has no summary."""
    from recipes.table import config_columns

    run = cell.run
    return {
        "recipe": plan.recipe,
        "run": cell.name,
        "status": "failed",
        "error": error,
        "method": method_of(run),
        "dataset": run.dataset,
        "private": not run.non_private,
        "delta": run.delta,
        "seed": run.seed,
        **config_columns(asdict(run)),
    }


# ---------------------------------------------------------------- what is shown


class _Progress:
    """One bar for the whole sweep on a terminal, a line for each run elsewhere."""

    def __init__(self, total: int, done: int) -> None:
        console = Console(file=sys.stderr, markup=False, emoji=False, highlight=False)
        self._live = console.is_terminal
        self._bar = Progress(
            TextColumn("sweep"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("runs · {task.fields[failed]}"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemaining(),
            console=console,
            transient=True,
            disable=not self._live,
            speed_estimate_period=_A_YEAR,
        )
        self._console, self._total, self._done, self._failed = console, total, done, 0
        self._task = self._bar.add_task("sweep", total=total, completed=done, failed="0 failed")
        if done:
            self._print(f"sweep: {done} of {total} runs were finished before.")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, row: Mapping[str, Any]) -> None:
        """Tell of a run that is over."""
        self._done += 1
        self._failed += row["status"] != "completed"
        self._bar.update(self._task, completed=self._done, failed=f"{self._failed} failed")
        if row["status"] != "completed":
            self._print(f"{row['run']}: {row['status']}: {row['error']}")
        elif not self._live:
            accuracy = row.get("test_accuracy")
            reached = "" if accuracy is None else f", test accuracy {accuracy:.2%}"
            epsilon = "∞" if row["epsilon"] is None else f"{row['epsilon']:.3f}"
            self._print(f"{self._done}/{self._total} {row['run']}: ε {epsilon}{reached}")

    def _print(self, line: str) -> None:
        (self._bar.console if self._live else self._console).print(line, soft_wrap=True)


def results_table(runs: pl.DataFrame) -> Table:
    """A line for each cell: ε, accuracy and speed, mean ± standard deviation over seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in runs.to_dicts():
        groups.setdefault(group_of(row["run"]), []).append(row)
    table = Table(box=None, pad_edge=False)
    table.add_column("runs with")
    for column in ("ε", "δ", "noise", "test accuracy", "examples/s", "seconds", "seeds"):
        table.add_column(column, justify="right")
    for name, rows in groups.items():
        done = [row for row in rows if row["status"] == "completed"]
        failed = f" ({len(rows) - len(done)} failed)" if len(done) < len(rows) else ""
        private = rows[0]["private"]
        table.add_row(
            name.replace("_", ", "),
            _mean(done, "epsilon", "{:.3f}") if private else "∞",
            f"{rows[0]['delta']:g}" if private else "",
            _mean(done, "noise_multiplier", "{:.4g}"),
            _mean(done, "test_accuracy", "{:.2%}", spread=True),
            _mean(done, "examples_per_second", "{:,.0f}", spread=True),
            _mean(done, "train_seconds", "{:,.1f}"),
            f"{len(done)}{failed}",
        )
    return table


def _mean(rows: Sequence[Mapping[str, Any]], key: str, form: str, *, spread: bool = False) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return ""
    around = f" ± {form.format(statistics.stdev(values))}" if spread and len(values) > 1 else ""
    return form.format(statistics.mean(values)) + around


# ---------------------------------------------------------------- the command


@click.command("sweep")
@click.argument("recipe")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="A new folder, or that of the same sweep, which then goes on.",
)
@click.option("--seeds", type=int, default=1, help="How many seeds for each cell: 0 and up; 1 by default.")
@click.option(
    "--with-ceiling",
    is_flag=True,
    help="Run the recipe's non-private twin with each seed too, with its own epochs, rates and batch size.",
)
@click.option("--processes", type=int, help="Runs at once; by default as many as there are cores.")
@lists_from(DPSGDRun, PATERun, without=NO_AXES)
def command(
    recipe: str, output: Path, seeds: int, with_ceiling: bool, processes: int | None, **axes: Any
) -> int:
    """Run a recipe over several settings and seeds, in parallel; call again to go on.

    Every field of the configuration takes one value or several between commas, such as --epsilon 1,3,8
    --clip-norm 0.1,0.3. The runs are their product, with each seed.
    """
    runs = sweep(recipe, output, typed(axes), seeds=seeds, with_ceiling=with_ceiling, processes=processes)
    Console(width=_WIDTH, highlight=False, markup=False, emoji=False).print(results_table(runs))
    statement = (output / "statement.md").read_text(encoding="utf-8")
    for line in statement.splitlines():
        if line.startswith("All "):
            click.echo("\n" + line.replace("*", "").replace("`", ""))
    click.echo(f"That covers picking the best; see {output / 'statement.md'}.\n")
    click.echo(f"table   {output / 'sweep.parquet'}")
    click.echo(f"curves  tensorboard --logdir {shlex.quote(str(output))}")
    failed = runs.filter(runs["status"] != "completed")
    for row in failed.to_dicts():
        click.echo(f"dpml: {row['run']}: {row['status']}: {row['error']}", err=True)
    return 1 if len(failed) else 0
