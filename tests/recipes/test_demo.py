"""The demo: what `make demo` runs, at one noise level and one seed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from dpml.config import DPSGDRun
from recipes import cifar10, demo, digits, mnist
from recipes.charts import tradeoff_chart
from recipes.trials import by_noise, run_or_reuse


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the summaries of one small demo."""
    folder = tmp_path_factory.mktemp("demo")
    demo.run_demo(folder, noise_levels=(8.0,), seeds=(0,))
    return folder


def test_privacy_costs_accuracy_and_the_table_says_how_much(output: Path) -> None:
    summaries = demo.run_demo(output, noise_levels=(8.0,), seeds=(0,))
    private, ceiling = summaries
    assert 2.3 < private["epsilon"] < 2.45
    assert ceiling["epsilon"] is None
    assert 0.85 < private["test_accuracy"] < ceiling["test_accuracy"]
    table = demo.results_table(summaries, "title")
    assert [c.header for c in table.columns] == [
        "ε",
        "δ",
        "noise multiplier",
        "test accuracy",
        "seconds a run",
    ]
    assert table.row_count == 2


def test_what_is_finished_is_not_trained_again(output: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.json")}
    demo.run_demo(output, noise_levels=(8.0,), seeds=(0,))
    assert before
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.json")} == before


def test_another_configuration_replaces_an_old_run_of_ours(tmp_path: Path) -> None:
    run = digits.dpsgd(private=False)
    short = type(run)(**{**vars(run), "epochs": 1})
    folder = tmp_path / "run"
    first = run_or_reuse(short, folder, label="first")
    second = run_or_reuse(type(run)(**{**vars(short), "seed": 1}), folder, label="second")
    assert (first["seed"], second["seed"]) == (0, 1)
    assert json.loads((folder / "summary.json").read_text())["seed"] == 1


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "noise-36-seed-0"
    folder.mkdir()
    (folder / "thesis.txt").write_text("do not delete")
    result = CliRunner().invoke(demo.main, ["--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "is not empty" in result.output
    assert (folder / "thesis.txt").read_text() == "do not delete"


def test_the_chart_is_a_picture_with_ink(output: Path, tmp_path: Path) -> None:
    summaries = demo.run_demo(output, noise_levels=(8.0,), seeds=(0,))
    path = tmp_path / "new folder" / "chart.png"
    tradeoff_chart(summaries, path, title="A title")
    with Image.open(path) as picture:
        assert picture.width >= 1000
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 100


def test_groups_have_the_most_noise_first_and_the_ceiling_last() -> None:
    groups = by_noise([{"noise_multiplier": noise} for noise in (1.0, None, 8.0, 1.0)])
    assert list(groups) == [8.0, 1.0, None]
    assert len(groups[1.0]) == 2


_RECIPES = [digits.dpsgd, mnist.dpsgd, mnist.fashion_dpsgd, mnist.papernot2020, mnist.fashion_papernot2020]
_RECIPES += [mnist.tramer2021, cifar10.dpsgd, cifar10.papernot2020, cifar10.tramer2021]


@pytest.mark.parametrize("recipe", _RECIPES)
def test_every_recipe_has_a_non_private_twin(recipe: object) -> None:
    assert callable(recipe)
    private, twin = recipe(), recipe(private=False)
    assert private.dataset == twin.dataset
    assert (private.non_private, twin.non_private) == (False, True)


@pytest.mark.parametrize("recipe", [mnist.dpsgd, mnist.fashion_dpsgd, cifar10.dpsgd])
def test_a_recipe_suits_the_epsilon_asked_for(recipe: Callable[..., DPSGDRun]) -> None:
    low, high = recipe(epsilon=1.0), recipe(epsilon=8.0)
    assert (low.epsilon, high.epsilon, recipe().epsilon) == (1.0, 8.0, 3.0)
    assert low.learning_rate < high.learning_rate
    assert low.features == high.features != "none"
