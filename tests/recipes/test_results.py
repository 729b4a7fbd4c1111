"""Figures from finished runs, and the MNIST recipe on the real data at a small size."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from dpml.dpsgd import run_dpsgd
from recipes import digits, mnist, results

_BESIDE_CHECKOUT = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of two short runs."""
    folder = tmp_path_factory.mktemp("runs")
    short = replace(digits.dpsgd(), epsilon=None, noise_multiplier=4.0, epochs=3)
    folders = [folder / f"seed-{seed}" for seed in (0, 1)]
    for seed, path in enumerate(folders):
        run_dpsgd(replace(short, seed=seed), output=path)
    return folders


def test_mean_and_deviation_are_kept_with_the_command(runs: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "new" / "results.json"
    words = [*map(str, runs), "--command", "dpml train …", "--save", str(target)]
    outcome = CliRunner().invoke(results.main, words)
    assert outcome.exit_code == 0, outcome.output
    kept = json.loads(target.read_text())
    accuracies = [json.loads((run / "summary.json").read_text())["test_accuracy"] for run in runs]
    assert kept["test_accuracy_mean"] == pytest.approx(sum(accuracies) / 2)
    assert kept["test_accuracy_stdev"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert [run["seed"] for run in kept["each"]] == [0, 1]
    assert kept["command"] == "dpml train …"


def test_an_unfinished_run_is_refused(runs: list[Path], tmp_path: Path) -> None:
    outcome = CliRunner().invoke(results.main, [str(runs[0]), str(tmp_path)])
    assert outcome.exit_code == 2
    assert "holds no completed run" in outcome.output


def test_a_mnist_recipe_learns_from_the_real_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear model and two epochs: a few seconds, far above guessing, within the budget."""
    data = Path(os.environ.get("DPML_DATA") or _BESIDE_CHECKOUT)
    if not data.is_dir():
        pytest.skip(f"the real data sets are neither in $DPML_DATA nor in {_BESIDE_CHECKOUT}")
    monkeypatch.setenv("DPML_DATA", str(data))
    changed = {"model": "linear", "epochs": 2, "batch_size": 512, "learning_rate": 0.5, "clip_norm": 1.0}
    result = run_dpsgd(replace(mnist.papernot2020(), **changed, micro_batch_size=256, insecure_noise_seed=1))
    assert result.epsilon <= 3
    assert result.summary["steps"] == 234
    assert result.summary["test_accuracy"] > 0.85
