"""Figures from finished runs: mean and spread over seeds, as a table and as a file to commit.

`python -m recipes.results runs/mnist-* --save docs/results/mnist-dpsgd.json`
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from recipes.charts.reading import runs_of
from recipes.charts.study import METHODS, small, studies
from recipes.trials import by_noise, read_summary

_KEPT = (
    "status dataset method epsilon epsilon_lower delta accountant neighboring_relation n_is_public "
    "noise_multiplier clip_norm sampling_probability expected_batch_size steps planned_steps test_accuracy "
    "train_seconds seed noise_is_secret sensitivity_slack config versions"
)


def collect(summaries: Sequence[Mapping[str, Any]], command: str) -> dict[str, Any]:
    """What a results file holds: command, date, each run, and their mean if they have the same noise."""
    accuracies = [summary["test_accuracy"] for summary in summaries]
    record = {"command": command, "date": datetime.now(UTC).date().isoformat(), "runs": len(summaries)}
    if len(by_noise(summaries)) == 1:
        record["test_accuracy_mean"] = statistics.mean(accuracies)
        record["test_accuracy_stdev"] = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    return {**record, "each": [{key: summary[key] for key in _KEPT.split()} for summary in summaries]}


def save_results(summaries: Sequence[Mapping[str, Any]], command: str, path: Path) -> None:
    """Write `collect` to a JSON file that `dpml chart` can draw."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(collect(summaries, command), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def results_table(summaries: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One row for each setting: method, ε, δ, noise multiplier, test accuracy, seconds."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("method", "ε", "δ", "noise multiplier", "test accuracy", "seconds a run"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for study in studies(runs_of({f"{n}": summary for n, summary in enumerate(summaries)})):
        cells = [cell for line in study.lines for cell in line.cells]
        for cell in (*cells, *study.ceilings):
            spread = "" if cell.deviation is None else f" ± {cell.deviation:.1%}"
            table.add_row(
                METHODS.get(cell.method, cell.method),
                "∞" if cell.epsilon is None else f"{cell.epsilon:.3f}",
                "" if cell.delta is None else small(cell.delta),
                "none" if cell.noise_multiplier is None else f"{cell.noise_multiplier:.4g}",
                f"{cell.mean:.1%}{spread}",
                "" if cell.mean_seconds is None else f"{cell.mean_seconds:.1f}",
            )
    return table


def print_results(summaries: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print `results_table`."""
    Console(highlight=False, soft_wrap=True).print(results_table(summaries, title))


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--command", default="", help="The command that made the runs, to be kept with them.")
@click.option("--save", type=click.Path(path_type=Path), help="Write the figures to this JSON file.")
def main(folders: tuple[Path, ...], command: str, save: Path | None) -> None:
    """Show test accuracy of finished runs by noise level."""
    summaries = []
    for folder in folders:
        summary = read_summary(folder)
        if summary is None or summary["status"] != "completed":
            click.echo(f"results: error: {str(folder)!r} holds no completed run.", err=True)
            sys.exit(2)
        summaries.append(summary)
    print_results(summaries, f"{summaries[0]['dataset']}, {len(summaries)} runs")
    if save is not None:
        save_results(summaries, command, save)


if __name__ == "__main__":
    main()
