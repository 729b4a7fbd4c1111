"""Recipes and commands by name, through entry points: anybody's package can bring some.

`dpml` imports no recipe, so that the arrows go down only.
A recipe is a function that returns a complete configuration; `private=False` asks for its non-private twin.
One that takes `epsilon` too returns what is best at that ε. `@card(...)` says what it reaches and costs.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

import click

from accounting import UserError
from dpml.config import DPSGDRun
from dpml.pate.config import PATERun

GROUP = "dpml.recipes"
COMMANDS = "dpml.commands"
"""The entry-point group of click commands that `dpml` shows beside its own."""
Run = DPSGDRun | PATERun
Recipe = Callable[..., Run]
_KINDS: dict[str, type[DPSGDRun] | type[PATERun]] = {"dpsgd": DPSGDRun, "pate": PATERun}
_AnyRecipe = TypeVar("_AnyRecipe", bound=Recipe)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What `dpml recipes` shows of a recipe.

    Attributes:
        reaches: Test accuracy at an ε, as published or measured, such as "98.1 % at ε = 2.93 (published)".
        cost: Time of one run and where, such as "20 min on 2 cores".
        source: The paper or results file that says so.
    """

    reaches: str
    cost: str
    source: str


def card(*, reaches: str, cost: str, source: str) -> Callable[[_AnyRecipe], _AnyRecipe]:
    """Decorate a recipe with its `Card`."""

    def decorate(recipe: _AnyRecipe) -> _AnyRecipe:
        recipe.card = Card(reaches=reaches, cost=cost, source=source)  # type: ignore[attr-defined]
        return recipe

    return decorate


def recipe_entries() -> dict[str, EntryPoint]:
    """All registered recipes by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name)}


def recipe_entry(name: str) -> EntryPoint:
    """The recipe of this name.

    Raises:
        UserError: if there is none; the message names a close one.
    """
    entries = recipe_entries()
    if name not in entries:
        close = difflib.get_close_matches(name, entries, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"There is no recipe {name!r:.80}; {hint}'dpml recipes' lists all.")
    return entries[name]


def load_recipe(entry: EntryPoint) -> Recipe:
    """Import a recipe.

    Raises:
        UserError: if the package that registered it is broken; the message names both.
    """
    try:
        recipe: Recipe = entry.load()
    except Exception as error:  # a package of somebody else may raise anything
        raise _broken(entry, error) from error
    return recipe


def recipe_card(recipe: Recipe) -> Card | None:
    """What the recipe says of itself, or None."""
    found = getattr(recipe, "card", None)
    return found if isinstance(found, Card) else None


def recipe_run(entry: EntryPoint, *, private: bool, epsilon: float | None = None) -> Run:
    """The configuration that a recipe returns.

    Args:
        entry: Which one, of `recipe_entries`.
        private: False for the non-private twin.
        epsilon: The ε that its settings should suit, where the recipe can tell; None for its own.

    Raises:
        UserError: if the recipe is broken.
    """
    recipe = load_recipe(entry)
    try:
        return configured(recipe, private=private, epsilon=epsilon)
    except Exception as error:  # as above
        raise _broken(entry, error) from error


def configured(recipe: Recipe, *, private: bool, epsilon: float | None = None) -> Run:
    """As `recipe_run`, for a recipe that is at hand. It may raise anything."""
    suits = epsilon is not None and "epsilon" in inspect.signature(recipe).parameters
    run: object = recipe(private, epsilon=epsilon) if suits else recipe(private)
    if not isinstance(run, Run):
        raise TypeError(f"it returned {type(run).__name__}, not a DPSGDRun or PATERun")
    return run


def method_of(run: Run) -> str:
    """The method of a configuration, as the command calls it: dpsgd or pate."""
    return next(method for method, kind in _KINDS.items() if isinstance(run, kind))


def default_run(method: str, dataset: str, *, private: bool, epsilon: float | None = None) -> Run | None:
    """The default configuration for a data set that is known by name, or None.

    Raises:
        UserError: if the recipe is broken.
    """
    entry = recipe_entries().get(f"{method}-{dataset}")
    if entry is None:
        return None
    run, wanted = recipe_run(entry, private=private, epsilon=epsilon), _KINDS[method]
    if not isinstance(run, wanted):
        raise _broken(entry, TypeError(f"it returned {type(run).__name__}, not a {wanted.__name__}"))
    return run


def command_entries() -> dict[str, EntryPoint]:
    """All registered commands by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=COMMANDS), key=lambda e: e.name)}


def load_command(entry: EntryPoint) -> click.Command:
    """Import a command. One that cannot be used says so when it is called, and hides no other.

    Raises nothing: `dpml --help` shows it with the reason.
    """
    try:
        command = entry.load()
        if not isinstance(command, click.Command):
            raise TypeError(f"it is a {type(command).__name__}, not a click.Command")
    except Exception as error:  # a package of somebody else may raise anything
        reason = _broken(entry, error, "command")

        @click.command(entry.name, help=str(reason), context_settings={"ignore_unknown_options": True})
        @click.argument("arguments", nargs=-1)
        def broken(arguments: tuple[str, ...]) -> None:
            del arguments
            raise reason

        return broken
    return command


def _broken(entry: EntryPoint, error: Exception, kind: str = "recipe") -> UserError:
    owner = "" if entry.dist is None else f" of the package {entry.dist.name!r}"
    return UserError(
        f"The {kind} {entry.name!r}{owner} ({entry.value}) cannot be used: {type(error).__name__}: {error}; "
        "repair or uninstall it."
    )
