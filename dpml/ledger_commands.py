"""The commands about the ledger: `dpml ledger init`, `show`, `budget`, `close`, `verify` and `export`."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict
from typing import Any

import click

from accounting import RELATIONS, Event, PrivacyBudget, UserError
from accounting.events import shown
from accounting.ledger import DataSet, Ledger, Run
from dpml.table import print_table

_NAME = click.argument("name")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def ledger() -> None:
    """What each data set of this machine has spent, over all runs, users and sweeps.

    The ledger is the file $DPML_LEDGER, or dpml/ledger.sqlite in your data folder. `dpml train … --ledger
    NAME` lets the budget of NAME pay.
    """


@ledger.command()
@_NAME
@click.option("--epsilon", type=float, required=True, help="The budget ε, for all runs together.")
@click.option("--delta", type=float, required=True, help="The budget δ, for all runs together.")
@click.option(
    "--relation",
    type=click.Choice(RELATIONS),
    default="zero-out",
    help="The neighbouring relation of all runs; by default zero-out.",
)
@click.option(
    "--group", is_flag=True, help="Let the file's group use a ledger that is made now, not you alone."
)
def init(name: str, epsilon: float, delta: float, relation: Any, group: bool) -> None:
    """Declare the data set NAME and its budget; make the ledger if there is none."""
    book = Ledger()
    book.declare(name, PrivacyBudget(epsilon, delta), relation, group=group)
    click.echo(f"{name!r} has a budget of {book.data_set(name).budget} in {str(book.path)!r}.")


@ledger.command()
@_NAME
@click.option("--epsilon", type=float, required=True, help="The new ε.")
@click.option("--delta", type=float, help="The new δ, while nothing was released; by default the old one.")
@click.option("--despite-releases", is_flag=True, help="Change ε after a release, and lose the guarantee.")
def budget(name: str, epsilon: float, delta: float | None, despite_releases: bool) -> None:
    """Change the budget of NAME: freely while nothing is spent, at a price after that."""
    changed = Ledger().change_budget(name, epsilon, delta, despite_releases=despite_releases)
    click.echo(f"{name!r} has a budget of {changed.budget}.")
    if changed.caveat:
        click.echo(f"dpml: {changed.caveat}", err=True)


@ledger.command("close")
@click.argument("run")
def close_run(run: str) -> None:
    """End RUN, whose process is gone: what it may have released is spent, the rest is given back."""
    name = Ledger().close_run(run)
    click.echo(f"The run {run} of {name!r} is closed.")


@ledger.command()
@click.option("--head", help="A hash from a statement or summary.json that must be on the chain.")
def verify(head: str | None) -> None:
    """Check each entry's hash, that they add up, and that each plan was within its budget."""
    found = Ledger().verify(head)
    where = "" if found.head_row is None else f"; the given head is entry {found.head_row:,}"
    click.echo(f"{found.rows:,} entries, all in order{where}. Head: {found.head}")


@ledger.command()
@click.option("--json/--csv", "as_json", default=True, help="The format; JSON by default.")
def export(as_json: bool) -> None:
    """Print all entries. Fingerprints stay sealed."""
    entries = [asdict(entry) for entry in Ledger().entries()]
    if as_json:
        click.echo(json.dumps(entries, indent=2, ensure_ascii=False))
        return
    table = csv.DictWriter(sys.stdout, list(entries[0]), lineterminator="\n")
    table.writeheader()
    for entry in entries:
        table.writerow({**entry, "payload": json.dumps(entry["payload"], ensure_ascii=False)})


@ledger.command()
@click.argument("name", required=False)
@_JSON
def show(name: str | None, as_json: bool) -> None:
    """What each data set has spent, and by whom; of NAME alone if it is given."""
    book = Ledger()
    names = book.names() if name is None else [book.data_set(name).name]
    alike = book.look_alikes()
    found = []
    for one in names:
        try:
            found.append({**_described(book.data_set(one)), "looks_like": alike.get(one, [])})
        except UserError as error:  # an event of a package that is not here must not hide the others
            found.append({"name": one, "error": str(error)})
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for number, described in enumerate(found):
        if number:
            click.echo()
        _print(described)


def _described(data_set: DataSet) -> dict[str, Any]:
    """A data set as JSON."""
    spent, reserved = data_set.spent()
    return {
        "name": data_set.name,
        "epsilon": data_set.budget.epsilon,
        "delta": data_set.budget.delta,
        "neighboring_relation": data_set.relation,
        "rule": data_set.rule,
        "spent": spent,
        "spent_or_reserved": reserved,
        "if_fixed_in_advance": data_set.epsilon_fixed_in_advance(),
        "caveat": data_set.caveat,
        "runs": [_run(run) for run in data_set.runs.values()],
    }


def _run(run: Run) -> dict[str, Any]:
    released = run.leased if run.committed is None else run.committed
    return {
        "run_id": run.run_id,
        "status": run.status,
        "user": run.entry.user,
        "host": run.entry.host,
        "time": run.entry.time,
        "rule": run.rule,
        "parts": sum(run.planned),
        "released": sum(released),
        "plan": run.plan.to_dict(),
    }


def _print(found: dict[str, Any]) -> None:
    if "error" in found:
        print_table({"data set": found["name"], "error": found["error"]})
        return
    rows = {
        "data set": f"{found['name']} ({found['neighboring_relation']})",
        "budget": f"ε = {found['epsilon']:g} at δ = {found['delta']:g}",
        "rule": found["rule"],
        "spent": f"ε = {found['spent']:.4f}",
        "and reserved": f"ε = {found['spent_or_reserved']:.4f}",
        "if all was fixed in advance": f"ε = {found['if_fixed_in_advance']:.4f}, by PLD",
    }
    if found["caveat"]:
        rows["caveat"] = found["caveat"]
    if found["looks_like"]:
        rows["looks like"] = f"{', '.join(found['looks_like'])}: the same records under another name?"
    print_table(rows)
    for run in found["runs"]:
        plan = shown(Event.from_dict(run["plan"]))
        click.echo(
            f"  {run['run_id']}  {run['status']:<7}  {run['time'][:16].replace('T', ' ')}  {run['user']}  "
            f"{run['released']:,} of {run['parts']:,}  {plan}"
        )
