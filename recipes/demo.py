"""The main job in small: real handwritten digits, DP-SGD at three noise levels, and the ceiling.

`python -m recipes.demo` trains, prints a table and draws a chart. What is finished is not trained again.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from accounting import UserError
from recipes import digits
from recipes.charts import tradeoff_chart
from recipes.trials import by_noise, run_or_reuse

NOISE_LEVELS = (36.0, 20.0, 8.0)
SEEDS = (0, 1, 2)


def run_demo(
    output: Path, noise_levels: Sequence[float] = NOISE_LEVELS, seeds: Sequence[int] = SEEDS
) -> list[dict[str, Any]]:
    """Train on digits at each noise level and without privacy, for each seed; return the summaries."""
    private, ceiling = digits.dpsgd(), digits.dpsgd(private=False)
    summaries = []
    for seed in seeds:
        for noise in noise_levels:
            run = replace(private, epsilon=None, noise_multiplier=noise, seed=seed)
            folder = output / f"noise-{noise:g}-seed-{seed}"
            summaries.append(run_or_reuse(run, folder, label=f"noise {noise:g}, seed {seed}"))
        folder = output / f"non-private-seed-{seed}"
        summaries.append(run_or_reuse(replace(ceiling, seed=seed), folder, label=f"non-private, seed {seed}"))
    return summaries


def results_table(summaries: Sequence[dict[str, Any]], title: str) -> Table:
    """One row for each noise level: ε, δ, noise multiplier, test accuracy, seconds."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("ε", "δ", "noise multiplier", "test accuracy", "seconds a run"):
        table.add_column(column, justify="right")
    for noise, runs in by_noise(summaries).items():
        accuracies = [run["test_accuracy"] for run in runs]
        spread = f" ± {statistics.stdev(accuracies):.1%}" if len(runs) > 1 else ""
        seconds = statistics.mean(run["train_seconds"] for run in runs)
        table.add_row(
            "∞" if noise is None else f"{runs[0]['epsilon']:.3f}",
            "" if noise is None else f"{runs[0]['delta']:g}",
            "none" if noise is None else f"{noise:g}",
            f"{statistics.mean(accuracies):.1%}{spread}",
            f"{seconds:.1f}",
        )
    return table


def print_results(summaries: Sequence[dict[str, Any]], title: str) -> None:
    """Print `results_table`."""
    Console(highlight=False, soft_wrap=True).print(results_table(summaries, title))


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/demo"), help="A folder.")
def main(output: Path) -> None:
    """Train on digits with and without privacy; print a table and draw a chart."""
    torch.set_num_threads(1)  # the model is too small to gain from more
    try:
        summaries = run_demo(output)
    except UserError as error:
        click.echo(f"demo: error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("demo: stopped; what is finished will not be trained again.", err=True)
        sys.exit(130)
    chart = output / "tradeoff.png"
    tradeoff_chart(summaries, chart, title="Privacy and accuracy on handwritten digits (8×8, 1,437 records)")
    print_results(summaries, f"digits, mean and standard deviation of {len(SEEDS)} seeds")
    click.echo(f"chart   {chart}")
    click.echo(f"curves  .venv/bin/tensorboard --logdir {output}")


if __name__ == "__main__":
    main()
