"""Recipes by name, through entry points: `dpml` imports no recipe, and anybody's package can bring some."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from accounting import UserError
from dpml.config import DPSGDRun
from dpml.pate.config import PATERun

GROUP = "dpml.recipes"
Run = DPSGDRun | PATERun
Recipe = Callable[[bool], Run]
_KINDS: dict[str, type[DPSGDRun] | type[PATERun]] = {"dpsgd": DPSGDRun, "pate": PATERun}


def recipe_entries() -> dict[str, EntryPoint]:
    """All registered recipes by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name)}


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


def default_run(method: str, dataset: str, *, private: bool) -> Run | None:
    """The default configuration for a data set that is known by name, or None.

    Raises:
        UserError: if the recipe is broken.
    """
    entry = recipe_entries().get(f"{method}-{dataset}")
    if entry is None:
        return None
    recipe = load_recipe(entry)
    try:
        run = recipe(private)
    except Exception as error:  # as above
        raise _broken(entry, error) from error
    wanted = _KINDS[method]
    if not isinstance(run, wanted):
        raise _broken(entry, TypeError(f"it returned {type(run).__name__}, not a {wanted.__name__}"))
    return run


def _broken(entry: EntryPoint, error: Exception) -> UserError:
    owner = "" if entry.dist is None else f" of the package {entry.dist.name!r}"
    return UserError(
        f"The recipe {entry.name!r}{owner} ({entry.value}) cannot be used: {type(error).__name__}: {error}; "
        "repair or uninstall it."
    )
