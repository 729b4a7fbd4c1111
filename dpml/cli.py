"""The `dpml` command.

Exit status: 0 for success, 1 if a run diverged or the machine failed, 2 for a wrong call (with one line that
says what to change), 3 where the budget does not allow the run, 130 after Ctrl-C.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from accounting import BudgetExceeded, PrivacyBudget, UnreachableBudget, UserError
from dpml.audit.command import audit
from dpml.config import DPSGDRun
from dpml.ledger_commands import ledger
from dpml.options import options_from, typed
from dpml.pate.config import PATERun
from dpml.questions import account, calibrate
from dpml.recipe_option import RECIPE, configuration
from dpml.registry import command_entries, load_command
from dpml.table import print_table
from dpml.verify.command import verify

if TYPE_CHECKING:
    from dpml.report import TrainingResult

OK, FAILED, WRONG_CALL, NO_BUDGET, INTERRUPTED = 0, 1, 2, 3, 130
_MOST_WORDS = 1000  # characters of a message, which may repeat what was typed
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": False}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status. A user's mistake gets one line, never a traceback."""
    if any("\0" in word for word in arguments or ()):
        return _complain("An argument holds a null byte, which no path or name can.", WRONG_CALL)
    try:
        status = dpml.main(arguments, prog_name="dpml", standalone_mode=False)
        return status if isinstance(status, int) else OK
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return WRONG_CALL
    except click.ClickException as error:
        return _complain(error.format_message(), WRONG_CALL)
    except (BudgetExceeded, UnreachableBudget) as error:
        return _complain(str(error), NO_BUDGET)
    except UserError as error:
        return _complain(str(error), WRONG_CALL)
    except (KeyboardInterrupt, click.Abort):
        return _complain("Interrupted.", INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        return FAILED
    except OSError as error:
        where = "" if error.filename is None else f" ({os.fsdecode(error.filename)})"
        return _complain(f"{error.strerror or error}{where}.", FAILED)
    except (MemoryError, RuntimeError) as error:
        # PyTorch's own class for this is one of the GPU alone; on the CPU only the words tell.
        if not isinstance(error, MemoryError) and not re.search("out of memory|t allocate", str(error)):
            raise
        return _complain(
            "There is not enough memory; choose a smaller micro-batch size, batch size or model.", FAILED
        )


def _complain(message: str, status: int) -> int:
    words = " ".join(message.split())
    click.echo(f"dpml: error: {words if len(words) <= _MOST_WORDS else words[:_MOST_WORDS] + '…'}", err=True)
    return status


class _WithRegistered(click.Group):
    """Commands of this module, and those that packages have registered in the group `dpml.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *command_entries()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None or cmd_name not in (entries := command_entries()):
            return own
        return load_command(entries[cmd_name])


@click.group(cls=_WithRegistered, context_settings=_CONTEXT)
@click.version_option(package_name="dpml", prog_name="dpml")
def dpml() -> None:
    """Train models with differential privacy and never lose count of what that cost."""


# ---------------------------------------------------------------- train

_OUTPUT = click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="A new folder for everything the run leaves; by default runs/DATASET-METHOD-TIME.",
)


@dpml.group()
def train() -> None:
    """Train a model."""


@train.command("dpsgd")
@RECIPE
@options_from(DPSGDRun)
@_OUTPUT
def train_dpsgd(output: Path | None, recipe: str | None, **values: Any) -> int:
    """Train with DP-SGD: a budget in (--epsilon), or noise in (--noise-multiplier) and ε out.

    What is not given comes from the data set's default recipe.
    """
    from dpml.dpsgd import run_dpsgd

    run = DPSGDRun(**configuration("dpsgd", recipe, typed(values)))
    return _trained(run, output, "dpsgd", run_dpsgd)


@train.command("pate")
@RECIPE
@options_from(PATERun)
@_OUTPUT
def train_pate(output: Path | None, recipe: str | None, **values: Any) -> int:
    """Train with PATE: teachers on shards of the private data answer for a student.

    A budget (--epsilon), --noise-multiplier and --queries fix each other. What is not given comes from the
    data set's default recipe.
    """
    from dpml.pate.trainer import run_pate

    run = PATERun(**configuration("pate", recipe, typed(values)))
    return _trained(run, output, "pate", run_pate)


@dpml.command()
@click.argument("folder", type=click.Path(path_type=Path))
def resume(folder: Path) -> int:
    """Go on with a run that was interrupted or killed. What it has released is not paid for twice."""
    from dpml.dpsgd import run_dpsgd
    from dpml.pate.trainer import run_pate
    from dpml.resuming import read_run

    run = read_run(folder)
    if isinstance(run, PATERun):
        return _trained(run, folder, "pate", partial(run_pate, resume=True))
    return _trained(run, folder, "dpsgd", partial(run_dpsgd, resume=True))


def _trained(run: Any, output: Path | None, method: str, train_run: Callable[..., TrainingResult]) -> int:
    """Run with progress, show the summary, and return the exit status."""
    from dpml.tracking import ProgressLine

    if output is None:
        now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        output = Path("runs") / f"{Path(run.dataset).stem}-{method}-{now}"
    progress = ProgressLine(Path(run.dataset).name)
    try:
        result = train_run(run, output=output, trackers=[progress])
    finally:
        progress.finish()  # an error must not leave the terminal without its cursor
    show_run(result.summary, output)
    return {"completed": OK, "stopped": INTERRUPTED}.get(result.status, FAILED)


def show_run(summary: dict[str, Any], output: Path) -> None:
    """Print what a run gave and cost, and on standard error what to mind."""
    rows = {}
    if summary["epsilon"] is None:
        rows["ε"] = "∞ (no privacy)"
    else:
        rows["ε"] = f"{summary['epsilon']:.4f} at δ = {summary['delta']:g} ({_relation(summary)})"
        rows["noise multiplier"] = f"{summary['noise_multiplier']:.4f}" + (
            " votes" if summary["method"] == "pate" else ""
        )
    if summary["test_accuracy"] is not None:
        rows["test accuracy"] = f"{summary['test_accuracy']:.2%}"
    if summary["method"] == "pate":
        asked, answered = summary["queries_asked"], summary["queries_answered"]
        rows["queries"] = f"{asked:,} asked, {answered:,} answered, by {summary['teachers']:,} teachers"
        if summary["sanitised_epsilon"] is not None:
            rows["ε at these votes"] = f"{summary['sanitised_epsilon']:.4f} (data-dependent, sanitised)"
        rows["training"] = f"{summary['train_seconds']:.1f} s"
    else:
        rows["training"] = f"{summary['steps']:,} steps in {summary['train_seconds']:.1f} s"
    if summary["ledger"] is not None:
        rows["ledger"] = f"{summary['ledger']['name']}, run {summary['ledger']['run_id']}"
    rows["output"] = str(output)
    rows["curves"] = f"tensorboard --logdir {shlex.quote(str(output))}"
    print_table(rows)
    if summary["status"] == "stopped":
        _say_stopped(summary, output)
    if summary["status"] == "diverged":
        click.echo("dpml: the weights are not finite any more; lower the learning rate.", err=True)
    if (
        summary["n_is_public"]
        and summary["sampling_probability"] is not None
        and summary["delta"] * summary["expected_batch_size"] >= (summary["sampling_probability"])
    ):
        click.echo(
            f"dpml: δ = {summary['delta']:g} is not below one over the number of records: it would allow to "
            "publish a whole record now and then; choose a smaller one.",
            err=True,
        )
    if summary["noise_is_secret"] is False:
        click.echo("dpml: noise came from a known seed; this run is not for release.", err=True)


def _say_stopped(summary: dict[str, Any], output: Path) -> None:
    done = f"Stopped after {summary['steps']:,} of {summary['planned_steps']:,} steps; the model is kept."
    if summary["epsilon"] is not None:
        done += (
            f" Spent until here: ε = {summary['epsilon_spent']:.4f} (a reading). The guarantee is the whole "
            f"plan's: ε = {summary['epsilon']:.4f}."
        )
    click.echo(f"dpml: {done}", err=True)
    if summary["method"] == "dpsgd":
        click.echo(
            f"dpml: 'dpml resume {shlex.quote(str(output))}' goes on. The folder checkpoint/ there holds the "
            "keys of noise to come: keep it to yourself, and delete it if the run is to end here.",
            err=True,
        )


def _relation(summary: dict[str, Any]) -> str:
    public = ", number of records public" if summary["n_is_public"] else ""
    return f"{summary['neighboring_relation']}{public}"


# ---------------------------------------------------------------- predict


@dpml.command()
@click.argument("ensemble", type=click.Path(path_type=Path))
@click.option(
    "--inputs", type=click.Path(path_type=Path), required=True, help="An .npz file with an array x."
)
@click.option("--epsilon", type=float, help="With the first question: the budget ε for the teachers' data.")
@click.option("--delta", type=float, help="With the first question: δ.")
@click.option(
    "--noise-multiplier", type=float, help="Noise on a count, in votes; by default 0.16 × teachers."
)
@click.option("--confident", is_flag=True, help="Refuse where fewer than 80 % of the teachers seem to agree.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def predict(
    ensemble: Path,
    inputs: Path,
    epsilon: float | None,
    delta: float | None,
    noise_multiplier: float | None,
    confident: bool,
    as_json: bool,
) -> None:
    """Let an ensemble of teachers answer, with noise, under a budget that lasts from call to call.

    ENSEMBLE is a folder such as runs/b/ensemble. The same input asked again costs nothing.
    """
    from dpml.data.arrays import load_inputs
    from dpml.pate.answers import FORFEITED, REFUSED
    from dpml.pate.predict import PrivatePredictor

    if (epsilon is None) != (delta is None):
        raise click.UsageError("Give --epsilon and --delta together.")
    budget = None if epsilon is None or delta is None else PrivacyBudget(epsilon, delta)
    predictor = PrivatePredictor(
        ensemble, budget=budget, noise_multiplier=noise_multiplier, confident=confident
    )
    classes = predictor.predict(load_inputs(inputs, "x")).tolist()
    words = {REFUSED: "refused", FORFEITED: "forfeited"}
    if as_json:
        found = [None if found < 0 else found for found in classes]
        click.echo(json.dumps({"classes": found, "queries_left": predictor.left}))
        return
    for found in classes:
        click.echo(words.get(found, found))
    click.echo(f"dpml: {predictor.left:,} more inputs can be asked about.", err=True)


dpml.add_command(account)
dpml.add_command(calibrate)
dpml.add_command(verify)
dpml.add_command(audit)
dpml.add_command(ledger)


# ---------------------------------------------------------------- recipes


@dpml.command()
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes: complete configurations, which `train` takes a data set's defaults from.

    With NAME, show one in full, and the command that runs it.
    """
    from dpml.listing import print_recipe, print_recipes

    if name is None:
        print_recipes()
    else:
        print_recipe(name)


def run() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # ε and δ must not end a run where there is no Greek
            stream.reconfigure(errors="backslashreplace")
    threading.excepthook = _thread_failed
    sys.exit(main())


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread. It raises a full disk again for `main`: no traceback for that here."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)
