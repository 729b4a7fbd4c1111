"""The main job in small: real handwritten digits, DP-SGD and PATE at several ε, and their ceilings.

`python -m recipes.demo` trains, prints a table, and draws charts. What is finished is not trained again.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch

from accounting import UserError
from dpml.registry import Run
from recipes import digits
from recipes.results import print_results, save_results
from recipes.trials import run_or_reuse

NOISE_LEVELS = (36.0, 20.0, 8.0)
EPSILONS = (4.0, 8.0, 16.0)
SEEDS = (0, 1, 2)
_STUDENT_EPOCHS = 40
_PUBLIC = 180  # half of the test images, so that accuracy is measured on as many


def demo_runs(
    noise_levels: Sequence[float] = NOISE_LEVELS,
    epsilons: Sequence[float] = EPSILONS,
    seeds: Sequence[int] = SEEDS,
) -> dict[str, Run]:
    """All runs by the name of their folder: the slow ones first."""
    runs: dict[str, Run] = {}
    for seed in seeds:
        pate, ceiling = (
            replace(digits.pate(private), public_examples=_PUBLIC, student_epochs=_STUDENT_EPOCHS)
            for private in (True, False)
        )
        for epsilon in epsilons:
            runs[f"pate-epsilon-{epsilon:g}-seed-{seed}"] = replace(pate, epsilon=epsilon, seed=seed)
        runs[f"pate-non-private-seed-{seed}"] = replace(ceiling, seed=seed)
    for seed in seeds:
        for noise in noise_levels:
            private = replace(digits.dpsgd(), epsilon=None, noise_multiplier=noise, seed=seed)
            runs[f"dpsgd-noise-{noise:g}-seed-{seed}"] = private
        runs[f"dpsgd-non-private-seed-{seed}"] = replace(digits.dpsgd(private=False), seed=seed)
    return runs


def run_demo(output: Path, runs: Mapping[str, Run], processes: int) -> dict[str, dict[str, Any]]:
    """Run what is not finished, on a thread each, and return all summaries in the order of `runs`.

    After Ctrl-C the runs under way are finished and kept, and no other is begun.

    Raises:
        UserError: if a folder holds something else than such a run.
        KeyboardInterrupt: after Ctrl-C.
    """
    summaries: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for this process alone
        try:
            waiting = {pool.submit(_run, run, output / name): name for name, run in runs.items()}
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            for done in as_completed(waiting):
                name = waiting[done]
                summaries[name] = done.result()
                click.echo(f"[{len(summaries):2}/{len(runs)}] {_said(name, summaries[name])}", err=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: summaries[name] for name in runs}


def _run(run: Run, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return run_or_reuse(run, folder, label=None)


def _said(name: str, summary: Mapping[str, Any]) -> str:
    epsilon = "no privacy" if summary["epsilon"] is None else f"ε = {summary['epsilon']:.3f}"
    return (
        f"{name:<30} {epsilon:<12} test accuracy {summary['test_accuracy']:.1%}, "
        f"{summary['train_seconds']:.1f} s"
    )


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/demo"), help="A folder.")
@click.option("--processes", type=click.IntRange(1), default=min(2, os.cpu_count() or 1), show_default=True)
@click.option("--save", type=click.Path(path_type=Path), help="Also write the figures to this JSON file.")
def main(output: Path, processes: int, save: Path | None) -> None:
    """Train on digits by DP-SGD, by PATE and without privacy; print a table and draw charts."""
    since = time.perf_counter()
    try:
        summaries = run_demo(output, demo_runs(), processes)
        written = _draw(output, summaries)
    except UserError as error:
        click.echo(f"demo: error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("demo: stopped; what is finished will not be trained again.", err=True)
        sys.exit(130)
    if save is not None:
        save_results(list(summaries.values()), "python -m recipes.demo", save)
    print_results(list(summaries.values()), f"digits, mean and standard deviation of {len(SEEDS)} seeds")
    click.echo(f"chart   {written[0]}\npage    {written[-1]}")
    click.echo(f"curves  {_tensorboard()} --logdir {shlex.quote(str(output))}")
    click.echo(f"done in {time.perf_counter() - since:.0f} s", err=True)


def _draw(output: Path, summaries: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    from recipes.charts import draw_all, runs_of, studies

    study, *_ = studies(runs_of(summaries))
    return draw_all([study], [output], output / "charts")


def _tensorboard() -> str:
    """The command that is installed beside this Python."""
    beside = Path(sys.executable).with_name("tensorboard")
    return os.path.relpath(beside) if beside.exists() else "tensorboard"


if __name__ == "__main__":
    main()
