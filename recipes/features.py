"""What linear models on fixed features reach: the default recipes at several ε, over several seeds.

`python -m recipes.features --dataset cifar10 --epsilon 1 --epsilon 3 --epsilon 8 --output runs/cifar10`
trains what is not there yet; `python -m recipes.results runs/cifar10/* --save FILE` keeps the figures.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from recipes import cifar10, mnist
from recipes.results import print_results
from recipes.trials import run_or_reuse

_RECIPES = {"mnist": mnist.dpsgd, "fashion-mnist": mnist.fashion_dpsgd, "cifar10": cifar10.dpsgd}


@click.command()
@click.option("--dataset", type=click.Choice(list(_RECIPES)), required=True)
@click.option("--epsilon", "epsilons", type=float, multiple=True, default=(3.0,), help="Once for each ε.")
@click.option("--seeds", type=click.IntRange(min=1), default=5, help="Seeds 0 to this, less one.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A folder of runs.")
def main(dataset: str, epsilons: tuple[float, ...], seeds: int, output: Path) -> None:
    """Train the default recipe of a data set at each ε with each seed; noise and sampling are secret."""
    summaries = []
    for seed in range(seeds):
        for epsilon in epsilons:
            run = replace(_RECIPES[dataset](epsilon=epsilon), seed=seed)
            label = f"{dataset} ε = {epsilon:g} seed {seed}"
            summaries.append(run_or_reuse(run, output / f"epsilon-{epsilon:g}-seed-{seed}", label=label))
    print_results(summaries, f"{dataset}, {len(summaries)} runs")


if __name__ == "__main__":
    main()
