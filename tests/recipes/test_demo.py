"""The demo: what `make demo` runs, at one noise level and one seed, and what is kept of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from accounting import UserError
from dpml.config import DPSGDRun
from dpml.pate.config import PATERun
from dpml.pate.planning import plan_run
from recipes import cifar10, demo, digits, mnist, results
from recipes.charts import load_runs, studies
from recipes.trials import by_noise, run_or_reuse

SMALL = {
    name: run
    for name, run in demo.demo_runs(noise_levels=(8.0,), epsilons=(), seeds=(0,)).items()
    if name.startswith("dpsgd")
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of one small demo."""
    folder = tmp_path_factory.mktemp("demo")
    demo.run_demo(folder, SMALL, processes=1)
    return folder


def summaries_in(folder: Path) -> list[dict[str, object]]:
    return [json.loads((folder / name / "summary.json").read_text()) for name in SMALL]


def test_privacy_costs_accuracy_and_the_table_says_how_much(output: Path) -> None:
    private, ceiling = summaries = summaries_in(output)
    assert 2.3 < private["epsilon"] < 2.45
    assert ceiling["epsilon"] is None
    assert 0.85 < private["test_accuracy"] < ceiling["test_accuracy"]
    table = results.results_table(summaries, "title")
    headers = ["method", "ε", "δ", "noise multiplier", "test accuracy", "seconds a run"]
    assert [c.header for c in table.columns] == headers
    assert table.row_count == 2


def test_the_demo_has_both_methods_and_their_ceilings_for_every_seed() -> None:
    runs = demo.demo_runs()
    wanted = len(demo.NOISE_LEVELS) + len(demo.EPSILONS) + 2
    assert len(runs) == wanted * len(demo.SEEDS)
    assert sum(run.non_private for run in runs.values()) == 2 * len(demo.SEEDS)
    for run in runs.values():
        if isinstance(run, PATERun) and not run.non_private:
            assert plan_run(run, 180).aggregator.queries > 0


def test_what_is_finished_is_not_trained_again(output: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.json")}
    for name, run in SMALL.items():
        run_or_reuse(run, output / name, label=None)
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
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("do not delete")
    with pytest.raises(UserError, match="is not empty"):
        run_or_reuse(next(iter(SMALL.values())), folder, label=None)
    assert (folder / "thesis.txt").read_text() == "do not delete"


def test_results_are_saved_as_the_chart_command_reads_them(output: Path, tmp_path: Path) -> None:
    results.save_results(summaries_in(output), "a command", tmp_path / "new" / "results.json")
    [study] = studies(load_runs([tmp_path / "new" / "results.json"]))
    assert [len(study.cells), len(study.ceilings)] == [1, 1]
    assert study.cells[0].mean == summaries_in(output)[0]["test_accuracy"]


def test_groups_have_the_most_noise_first_and_the_ceiling_last() -> None:
    groups = by_noise([{"noise_multiplier": noise} for noise in (1.0, None, 8.0, 1.0)])
    assert list(groups) == [8.0, 1.0, None]
    assert len(groups[1.0]) == 2


_RECIPES = [digits.dpsgd, mnist.dpsgd, mnist.fashion_dpsgd, mnist.papernot2020, mnist.fashion_papernot2020]
_RECIPES += [mnist.tramer2021, mnist.tramer2021_cnn, cifar10.dpsgd, cifar10.papernot2020]
_RECIPES += [cifar10.tramer2021, cifar10.tramer2021_cnn]


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
