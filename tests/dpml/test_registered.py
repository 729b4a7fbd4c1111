"""What packages register: commands beside dpml's own, and recipes that are run by name."""

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import pytest

from dpml import registry
from dpml.config import DPSGDRun
from dpml.pate.config import PATERun


@click.command("greet")
@click.argument("name")
def greet(name: str) -> None:
    """Greet somebody."""
    click.echo(f"hello {name}")


no_command = "a string"


@registry.card(reaches="60 % at ε = 1", cost="a second", source="nobody 2026")
def with_card(private: bool = True, epsilon: float | None = None) -> DPSGDRun:
    """A recipe with a card."""
    wish: dict[str, Any] = {"epsilon": epsilon or 5.0, "delta": 1e-3} if private else {"non_private": True}
    return DPSGDRun(**wish, dataset="nowhere.npz", model="linear", epochs=1, batch_size=10)


def of_pate(private: bool = True) -> PATERun:  # noqa: ARG001
    """A recipe for PATE."""
    return PATERun(dataset="digits", epsilon=1.0, delta=1e-5)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        EntryPoint("greet", f"{__name__}:greet", registry.COMMANDS),
        EntryPoint("broken", f"{__name__}:missing", registry.COMMANDS),
        EntryPoint("odd", f"{__name__}:no_command", registry.COMMANDS),
        EntryPoint("mine", f"{__name__}:with_card", registry.GROUP),
        EntryPoint("theirs", f"{__name__}:of_pate", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: [e for e in entries if e.group == group])


@pytest.mark.usefixtures("registered")
def test_a_registered_command_works_and_a_broken_one_spoils_nothing(call: Any) -> None:
    assert call("greet Ada").out == "hello Ada\n"
    shown = call("--help")
    assert shown.status == 0
    for name in ("greet", "broken", "odd", "train"):
        assert re.search(rf"^  {name} ", shown.out, re.M)
    for name, words in (("broken", "AttributeError"), ("odd", "not a click.Command")):
        outcome = call(f"{name} --any option")
        assert outcome.status == 2
        assert words in outcome.error()
    assert "No such command" in call("nothing").error()


@pytest.mark.usefixtures("registered")
def test_recipes_show_their_cards_and_one_in_full(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    table = call("recipes").out
    for words in ("mine", "A recipe with a card.", "60 % at ε = 1", "a second", "theirs"):
        assert words in table
    assert max(map(len, table.splitlines())) <= 100
    monkeypatch.setenv("COLUMNS", "180")
    assert 140 < max(map(len, call("recipes").out.splitlines())) <= 180
    shown = call("recipes mine").out
    for words in ("reaches  60 %", "nobody 2026", "--epsilon     5.0", "--dataset     nowhere.npz"):
        assert words in shown
    assert shown.endswith("dpml train dpsgd --recipe mine\n")
    assert "did you mean 'mine'" in call("recipes min").error()


@pytest.mark.usefixtures("registered")
def test_a_recipe_by_name_brings_its_own_wish_unless_one_is_typed(
    call: Any, own_data: Path, tmp_path: Path
) -> None:
    words = f"train dpsgd --recipe mine --dataset {own_data} --output"
    outcome = call(words, tmp_path / "a")
    assert outcome.status == 0
    assert "as the recipe mine says: epsilon 5, delta 0.001" in outcome.err
    config = json.loads((tmp_path / "a" / "summary.json").read_text())["config"]
    assert (config["epsilon"], config["delta"], config["model"]) == (5.0, 1e-3, "linear")
    assert "delta" in call(words, tmp_path / "b", "--epsilon", 1).error()
    more = ("--noise-multiplier", 3, "--delta", 1e-2, "--batch-size", 20)
    assert call(words, tmp_path / "b", *more).status == 0
    config = json.loads((tmp_path / "b" / "summary.json").read_text())["config"]
    assert (config["epsilon"], config["noise_multiplier"], config["batch_size"]) == (None, 3.0, 20)


@pytest.mark.usefixtures("registered")
def test_a_recipe_s_mistakes(call: Any) -> None:
    assert "dpml train pate --recipe theirs" in call("train dpsgd --recipe theirs").error()
    assert "There is no recipe 'x'" in call("train dpsgd --recipe x").error()
    outcome = call("train dpsgd --recipe mine")
    assert outcome.status == 2
    assert "'nowhere.npz'" in outcome.err
