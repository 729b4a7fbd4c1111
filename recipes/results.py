"""Figures from finished runs: mean and spread over seeds, as a table and as a file to commit.

`python -m recipes.results runs/mnist-* --save docs/results/mnist-dpsgd.json`
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from recipes.demo import print_results
from recipes.trials import read_summary

_KEPT = (
    "dataset method epsilon epsilon_lower delta accountant neighboring_relation n_is_public noise_multiplier "
    "clip_norm sampling_probability expected_batch_size steps planned_steps test_accuracy train_seconds seed "
    "noise_is_secret sensitivity_slack config versions"
)


def collect(summaries: Sequence[dict[str, Any]], command: str) -> dict[str, Any]:
    """What a results file holds: the command, the date, mean and deviation, and each run."""
    accuracies = [summary["test_accuracy"] for summary in summaries]
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "runs": len(summaries),
        "test_accuracy_mean": statistics.mean(accuracies),
        "test_accuracy_stdev": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "each": [{key: summary[key] for key in _KEPT.split()} for summary in summaries],
    }


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
        save.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(collect(summaries, command), indent=1, ensure_ascii=False)
        save.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
