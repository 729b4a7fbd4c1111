"""What `dpml recipes` prints: a table of all recipes, or one of them in full."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import MISSING, Field, fields

import click
from rich.console import Console
from rich.table import Table

from accounting import UserError
from dpml import registry
from dpml.registry import Card, Recipe, Run
from dpml.table import print_table

_LEAST_WIDTH = 100
"""In columns; a wider terminal shows more in a line."""
_UNKNOWN = Card(reaches="", cost="", source="")


def print_recipes() -> None:
    """Print a table of all registered recipes. One that is broken says so and hides no other."""
    table = Table(box=None, pad_edge=False, expand=True)
    table.add_column("recipe", no_wrap=True)
    for column, share in (("what it is", 4), ("reaches", 3), ("costs", 2)):
        table.add_column(column, ratio=share, overflow="fold")
    for name, entry in registry.recipe_entries().items():
        try:
            recipe = registry.load_recipe(entry)
            card, words = registry.recipe_card(recipe) or _UNKNOWN, _first_line(recipe)
        except UserError as error:
            card, words = _UNKNOWN, str(error)
        table.add_row(name, words, card.reaches, card.cost)
    if table.row_count:
        width = max(_LEAST_WIDTH, shutil.get_terminal_size((_LEAST_WIDTH, 24)).columns)
        Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def print_recipe(name: str) -> None:
    """Print one recipe: what it says of itself, its configuration, and the command that runs it.

    Raises:
        UserError: if there is no such recipe, or it is broken.
    """
    entry = registry.recipe_entry(name)
    recipe, run = registry.load_recipe(entry), registry.recipe_run(entry, private=True)
    click.echo(inspect.getdoc(recipe) or _first_line(recipe))
    card = registry.recipe_card(recipe)
    if card is not None:
        click.echo()
        print_table({"reaches": card.reaches, "costs": card.cost, "source": card.source})
    click.echo("\nConfiguration, where it differs from the defaults:")
    print_table(_configuration(run))
    click.echo(f"\ndpml train {registry.method_of(run)} --recipe {name}")


def _configuration(run: Run) -> dict[str, str]:
    return {
        f"  --{field.name.replace('_', '-')}": str(getattr(run, field.name))
        for field in fields(run)
        if _is_set(run, field)
    }


def _is_set(run: Run, field: Field[object]) -> bool:
    return field.default is MISSING or getattr(run, field.name) != field.default


def _first_line(recipe: Recipe) -> str:
    words = (recipe.__doc__ or "").strip()
    return words.splitlines()[0] if words else "(no description)"
