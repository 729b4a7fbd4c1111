"""The command `dpml tune`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from accounting import UserError
from dpml.config import DPSGDRun
from dpml.options import lists_from, options_from, typed
from dpml.table import print_table
from recipes.tuning.plan import GEOMETRIC, TUNABLE

_WISHES = ("epsilon", "delta", "noise_multiplier")
_SETTINGS = (
    *("dataset", "classes", "image_size", "device", "seed", "insecure_noise_seed", "ledger"),
    *("neighboring_relation", "micro_batch_size", "workers"),
)


@click.command("tune")
@click.argument("recipe")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="A new folder for what the winner leaves, or that of a run that was interrupted, to go on with.",
)
@click.option("--mean-trials", type=float, default=10.0, help="Trials on average, above 1; by default 10.")
@click.option(
    "--shape",
    type=float,
    default=GEOMETRIC,
    help="How their number is drawn: 1 geometric (the default), 0 logarithmic (cheaper, and often one trial "
    "only), any other η of the truncated negative binomial distribution, or inf for Poisson.",
)
@click.option(
    "--public-validation",
    type=click.Path(path_type=Path),
    help="An .npz file with x and y: public examples that decide. By default the last tenth of the training "
    "set does: exactly for a public benchmark, by a noisy count otherwise.",
)
@click.option(
    "--exempt-public-benchmark",
    is_flag=True,
    help="Do not charge the selection, because the data set is a public benchmark; the statement says so.",
)
@options_from(DPSGDRun, only=(*_SETTINGS, *_WISHES))
@lists_from(DPSGDRun, only=TUNABLE)
def command(
    recipe: str,
    output: Path,
    mean_trials: float,
    shape: float,
    public_validation: Path | None,
    exempt_public_benchmark: bool,
    **values: Any,
) -> int:
    """Find hyperparameters privately: a random number of trials, of which only the best is released.

    RECIPE supplies all settings that are not given. A setting with several values, as in
    --learning-rate 0.1,0.3,1, is tuned. ε (--epsilon in, or --noise-multiplier in and ε out) covers
    everything: the trials, their comparison and the release. How many trials there are is secret, and so
    there is no progress bar; the time that they take together tells something about it to who watches.
    Called again in the same way, a run that was interrupted goes on.
    """
    from dpml.cli import FAILED, OK, show_run
    from recipes.tuning.trials import complete, tune

    given = typed(values)
    wish = {name: given.pop(name) for name in _WISHES if name in given}
    lists = {name: given.pop(name) for name in TUNABLE if len(given.get(name, ())) > 1}
    fixed = {name: value[0] if name in TUNABLE else value for name, value in given.items()}
    if not lists:
        raise UserError("Give several values of a setting, such as --learning-rate 0.1,0.3,1. Got none.")
    run = replace(complete(recipe, wish.get("epsilon")), **fixed)

    def started() -> None:
        click.echo(
            f"dpml: tuning on {Path(run.dataset).name}: {mean_trials:g} trials on average. How many it will "
            "be is secret, so there is no progress bar.",
            err=True,
        )

    try:
        result = tune(
            run,
            output,
            candidates=lists,
            **wish,
            mean_trials=mean_trials,
            shape=shape,
            public_validation=public_validation,
            exempt_public_benchmark=exempt_public_benchmark,
            started=started,
        )
    except KeyboardInterrupt:
        click.echo("dpml: nothing was released; the same command goes on.", err=True)
        raise
    show_run(result.summary, output)
    _show_choice(result.summary)
    return OK if result.status == "completed" else FAILED


def _show_choice(summary: dict[str, Any]) -> None:
    chosen = summary["selection"]["chosen"]
    one, added = summary["selection"]["epsilon_of_one"], summary["selection_epsilon"]
    rows = {"chosen": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in chosen.items())}
    if summary["selection"]["charged"]:
        rows["price of choosing"] = f"{added:.4f} of ε; one training alone costs {one:.4f}"
    else:
        rows["price of choosing"] = "NOT charged, because the data set is a public benchmark"
    print_table(rows)
