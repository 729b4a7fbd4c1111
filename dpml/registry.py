"""Recipes by name, through entry points: `dpml` imports no recipe, and anybody's package can bring some."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from dpml.config import DPSGDRun

GROUP = "dpml.recipes"
Recipe = Callable[[bool], DPSGDRun]


def recipe_entries() -> dict[str, EntryPoint]:
    """All registered recipes by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name)}


def default_run(method: str, dataset: str, *, private: bool) -> DPSGDRun | None:
    """The default configuration for a data set that is known by name, or None."""
    entry = recipe_entries().get(f"{method}-{dataset}")
    if entry is None:
        return None
    recipe: Recipe = entry.load()
    return recipe(private)
