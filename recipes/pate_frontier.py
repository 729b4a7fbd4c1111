"""PATE on a public benchmark: the published settings, and accuracy over ε and the number of queries.

`python -m recipes.pate_frontier` runs every case with every seed, in several processes, and keeps what is
done: run again, it goes on. `--save` writes the figures to be committed, `--chart` draws them.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from dpml.pate.config import PATERun
from recipes import cifar10, mnist
from recipes.charts import frontier_chart
from recipes.trials import run_or_reuse

_KEPT = (
    "dataset epsilon epsilon_lower delta accountant neighboring_relation noise_multiplier aggregator "
    "teachers "
    "threshold threshold_noise queries_asked queries_answered test_accuracy train_seconds seed "
    "noise_is_secret "
    "versions"
)


def cases(dataset: str) -> dict[str, PATERun]:
    """The cases by name: published settings first, then budgets and numbers of queries."""
    if dataset == "cifar10":
        base = replace(cifar10.pate(), log_not_private=True)
        grid: dict[float, tuple[int | None, ...]] = {1.0: (None,), 3.0: (None,), 8.0: (None,)}
        found: dict[str, PATERun] = {}
    else:
        base = replace(mnist.pate(), log_not_private=True)
        bare = replace(base, epsilon=None, queries=100, noise_multiplier=20.0)
        found = {
            "LNMax, 2017": replace(bare, aggregator="lnmax"),
            "Confident-GNMax, 2018": replace(
                bare,
                aggregator="confident-gnmax",
                queries=1000,
                noise_multiplier=40.0,
                threshold=200.0,
                threshold_noise=150.0,
            ),
        }
        grid = {2.0: (None, 280), 1.0: (None, 130), 0.5: (None, 33)}
    for epsilon, numbers in grid.items():
        for queries in numbers:
            chosen = "default" if queries is None else queries
            found[f"ε = {epsilon:g}, {chosen} queries"] = replace(base, epsilon=epsilon, queries=queries)
    return found


def run_case(name: str, run: PATERun, folder: Path) -> dict[str, Any]:
    """Run one case on one thread, or take it from its folder; return the figures that are kept."""
    torch.set_num_threads(1)
    summary = run_or_reuse(run, folder, label=f"{name}, seed {run.seed}")
    private = json.loads((folder / "not_private" / "pate.json").read_text(encoding="utf-8"))
    figures = ("data_dependent_epsilon", "ensemble_test_accuracy", "mean_largest_share_of_votes")
    return {
        "case": name,
        **{key: summary[key] for key in _KEPT.split()},
        # Of a public benchmark these may be shown.
        **{key: private[key] for key in figures},
    }


def results_table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line for each case: ε, noise, queries, accuracy over seeds."""
    table = Table(title="PATE, mean and standard deviation over seeds", title_justify="left")
    for column in ("case", "ε", "noise", "queries", "answered", "test accuracy", "seeds", "ε at the votes"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, runs in by_case(rows).items():
        accuracy = [run["test_accuracy"] for run in runs]
        spread = f" ± {statistics.stdev(accuracy):.2%}" if len(runs) > 1 else ""
        table.add_row(
            name,
            f"{runs[0]['epsilon']:.3f}",
            f"{runs[0]['noise_multiplier']:.4g}",
            f"{runs[0]['queries_asked']}",
            f"{statistics.mean(run['queries_answered'] for run in runs):.0f}",
            f"{statistics.mean(accuracy):.2%}{spread}",
            f"{len(runs)}",
            f"{max(run['data_dependent_epsilon'] for run in runs):.2f} at most",
        )
    return table


def by_case(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows grouped by case, in their order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["case"], []).append(row)
    return groups


@click.command()
@click.option("--dataset", type=click.Choice(["mnist", "cifar10"]), default="mnist")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/pate"), help="A folder.")
@click.option("--seeds", type=int, default=5, help="Seeds 0 to this number, exclusively.")
@click.option("--grid-seeds", type=int, default=2, help="Seeds of the budgets with other numbers of queries.")
@click.option("--only", multiple=True, help="Cases whose name starts so; all by default.")
@click.option("--processes", type=int, default=os.cpu_count() or 1, help="Runs at once, on a thread each.")
@click.option("--save", type=click.Path(path_type=Path), help="Write the figures to this JSON file.")
@click.option("--chart", type=click.Path(path_type=Path), help="Draw them to this PNG file.")
def main(
    dataset: str,
    output: Path,
    seeds: int,
    grid_seeds: int,
    only: tuple[str, ...],
    processes: int,
    save: Path | None,
    chart: Path | None,
) -> None:
    """Run PATE's published settings and its frontier; print a table."""
    wanted = {name: run for name, run in cases(dataset).items() if not only or name.startswith(only)}
    # Case by case: the runs of the first case leave each seed's votes in the cache.
    jobs = []
    for name, run in wanted.items():
        on_grid = name.startswith("ε") and run.queries is not None
        jobs += [(name, replace(run, seed=seed)) for seed in range(grid_seeds if on_grid else seeds)]
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = {
            pool.submit(run_case, name, run, output / f"{dataset}-{name}-{run.seed}".replace(" ", "")): (
                name,
                run,
            )
            for name, run in jobs
        }
        for done in as_completed(waiting):
            name, run = waiting[done]
            rows[name, run.seed] = done.result()
    ordered = [rows[name, run.seed] for name, run in jobs]
    Console(highlight=False, width=150).print(results_table(ordered))
    if save is not None:
        record = {
            "command": f"python -m recipes.pate_frontier --dataset {dataset} --seeds {seeds} "
            f"--grid-seeds {grid_seeds}",
            "date": datetime.now(UTC).date().isoformat(),
            "each": ordered,
        }
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if chart is not None:
        frontier_chart(ordered, chart)


if __name__ == "__main__":
    main()
