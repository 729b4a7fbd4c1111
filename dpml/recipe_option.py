"""The option `--recipe`, and how what is typed goes over a recipe."""

from __future__ import annotations

from typing import Any

import click

from accounting import UserError
from dpml.registry import default_run, method_of, recipe_entry, recipe_run

RECIPE = click.option(
    "--recipe",
    help="A recipe by name (see 'dpml recipes') in place of a data set's default. Any flag changes it. Its "
    "own ε and δ hold if no wish for privacy is typed.",
)


def configuration(method: str, name: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """What was typed, over the recipe of that name, or over the data set's default recipe."""
    private, epsilon = not given.get("non_private", False), given.get("epsilon")
    wishes = ("epsilon", "noise_multiplier", "delta", "non_private", "queries")
    if name is not None:
        run = recipe_run(recipe_entry(name), private=private, epsilon=epsilon)
        if method_of(run) != method:
            raise UserError(
                f"The recipe {name!r} is for another method: dpml train {method_of(run)} --recipe {name}."
            )
        base = dict(vars(run))
        if not given.keys() & set(wishes):
            own = {wish: base[wish] for wish in wishes if base.get(wish)}
            words = ", ".join(f"{wish.replace('_', ' ')} {value:g}" for wish, value in own.items())
            click.echo(f"dpml: as the recipe {name} says: {words}.", err=True)
            return {**base, **given}
    elif "dataset" not in given:
        raise click.UsageError("Missing option '--dataset' (or '--recipe').")
    else:
        recipe = default_run(method, given["dataset"], private=private, epsilon=epsilon)
        base = {} if recipe is None else dict(vars(recipe))
        # A recipe knows where its data is: for one of another package, the name typed is the recipe's alone.
        given = given | ({} if recipe is None else {"dataset": recipe.dataset})
    # The wish for privacy is the caller's alone: a recipe's own ε, δ, noise or queries never stand in for it.
    for wish in (*wishes, "ledger"):
        base.pop(wish, None)
    return {**base, **given}
