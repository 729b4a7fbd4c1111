"""`dpml tune`: what it costs and leaves, how it survives being killed, and what it says to mistakes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from tuning_checks import (
    FILES,
    Observation,
    check,
    check_folder,
    killed_at_each_write,
    observe,
    oracle_epsilon,
    own_run,
    watch,
)

from accounting import BestOfRuns, Gaussian, OneOf, PrivacyAccountant
from dpml import models
from dpml.config import DPSGDRun
from dpml.planning import SamplingPlan
from dpml.report import TrainingResult
from recipes.tuning import state, trials, tune
from recipes.tuning.plan import candidates_of, make_plan

Call = Callable[..., Any]
DIGITS = (
    "tune dpsgd-digits --epochs 4 --delta 1e-5 --noise-multiplier 6 --learning-rate 0.1,0.3,1 --mean-trials 6"
)
OWN = "tune dpsgd-digits --model linear --epochs 0.5 --batch-size 15 --delta 1e-3 --learning-rate 0.1,1"


def summary_in(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))
    return summary


# ---------------------------------------------------------------- features


def test_trials_on_features_with_a_private_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    images, labels = rng.random((60, 1, 16, 16), np.float32), np.arange(60) % 2
    data = tmp_path / "images.npz"
    np.savez(data, x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])
    run = own_run(data, model="auto", features="scattering", mean_noise=30.0)
    result = tune(
        run, tmp_path / "a", candidates={"learning_rate": [0.1, 1.0]}, noise_multiplier=3, delta=1e-3
    )
    plan = SamplingPlan.of(examples=54, batch_size=15, epochs=0.5)
    training = plan.event(3.0, mean_noise=30.0)
    assert isinstance(result.planned, BestOfRuns)
    assert isinstance(result.planned.event, OneOf)
    assert training in result.planned.event.events
    config = summary_in(tmp_path / "a")["config"]
    assert (config["features"], config["model"]) == ("scattering", "linear")
    assert "the mean of the inputs" in result.statement
    weights = safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")
    assert weights["0.mean"].abs().sum() > 0


# ---------------------------------------------------------------- price


@pytest.mark.parametrize(("mean", "price"), [(5, 3.00), (10, 3.33), (30, 3.77)])
def test_the_price_of_choosing_on_digits(mean: float, price: float) -> None:
    """One run of the recipe with ε = 1.49 by PLD, against dp-accounting."""
    training = SamplingPlan.of(examples=1294, batch_size=512, epochs=60).event(12.71)
    alone = PrivacyAccountant()
    alone.record(training)
    assert alone.epsilon(1e-5) == pytest.approx(1.493, abs=2e-3)
    accountant = PrivacyAccountant("rdp")
    accountant.record(BestOfRuns(training, mean))
    assert accountant.epsilon(1e-5) == pytest.approx(price, abs=0.01)
    assert accountant.epsilon(1e-5) == pytest.approx(oracle_epsilon(training, mean, 1.0, 1e-5), rel=0.02)


def test_a_budget_pays_for_candidates_of_any_length_and_for_the_score(own_data: Path) -> None:
    run = own_run(own_data, noise_multiplier=None, epsilon=4.0)
    lists = {"epochs": [0.5, 2.0], "learning_rate": [0.1, 1.0]}
    plan = make_plan(
        candidates_of(run, lists), examples=90, private_score=True, mean_trials=5, shape=1, charged=True
    )
    noises = [candidate.noise_multiplier for candidate in plan.candidates]
    assert all(noise is not None for noise in noises)
    assert noises[2] > noises[0] * 1.2  # four times the steps
    assert isinstance(plan.trial, OneOf)
    assert Gaussian(plan.score_noise or 0) in plan.trial.events
    accountant = PrivacyAccountant("rdp")
    accountant.record(plan.event)
    assert 3.99 <= accountant.epsilon(1e-3) <= 4
    for training in plan.trainings:  # none of them is charged more than all together
        one = PrivacyAccountant("rdp")
        one.record(BestOfRuns(training, 5))
        assert one.epsilon(1e-3) <= accountant.epsilon(1e-3)


def test_digits_within_a_budget(call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    line = (
        "tune dpsgd-digits --epochs 4 --delta 1e-5 --epsilon 3 --learning-rate 0.1,1 --mean-trials 2 --output"
    )
    outcome = call(line, folder)
    assert outcome.status == 0
    summary = summary_in(folder)
    assert 2.99 <= summary["epsilon"] <= 3 == summary["target_epsilon"]
    assert 0 < summary["selection_epsilon"] < 3
    again = json.loads(call("account --delta 1e-5 --json --events", folder / "privacy_events.json").out)
    assert again["epsilon"] == summary["epsilon"]
    assert summary["selection"]["chosen"]["learning_rate"] in (0.1, 1.0)
    assert summary["config"]["learning_rate"] == summary["selection"]["chosen"]["learning_rate"]
    assert {path.name for path in folder.iterdir() if "tfevents" not in path.name} == FILES
    words = (folder / "statement.md").read_text("utf-8")
    assert "the best of a random number of trials" in words
    assert "learning rate 0.1, 1.0: 2 candidates" in words
    assert "what the choice added to ε" in words
    assert "secret, so there is no progress bar" in outcome.err
    assert "step" not in outcome.err
    assert call(line, folder).status == 2  # it is complete


def test_a_public_benchmark_may_be_exempt(call: Call, tmp_path: Path) -> None:
    outcome = call(f"{DIGITS} --exempt-public-benchmark --output", tmp_path / "a")
    assert outcome.status == 0
    assert "NOT charged" in outcome.out
    summary = summary_in(tmp_path / "a")
    assert summary["selection_epsilon"] == 0
    assert summary["selection"]["charged"] is False
    accountant = PrivacyAccountant()
    accountant.record(SamplingPlan.of(examples=1294, batch_size=512, epochs=4).event(6.0))
    assert summary["epsilon"] == accountant.epsilon(1e-5)
    assert "**The selection is not charged.**" in (tmp_path / "a" / "statement.md").read_text("utf-8")


def test_public_examples_may_decide(own_data: Path, tmp_path: Path) -> None:
    with np.load(own_data) as data:
        np.savez(tmp_path / "public.npz", x=data["x_test"], y=data["y_test"])
    seen = observe(
        own_run(own_data),
        tmp_path / "a",
        candidates={"learning_rate": [0.1, 1.0]},
        delta=1e-3,
        noise_multiplier=3.0,
        public_validation=tmp_path / "public.npz",
    )
    check(seen, private_score=False)
    assert "taken to be public" in seen.result.statement


def test_no_trial_at_all_releases_a_model_that_saw_nothing(
    own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "draw_trials", lambda *_: [])
    seen = observe(
        own_run(own_data),
        tmp_path / "a",
        candidates={"learning_rate": [0.1, 1.0]},
        delta=1e-3,
        noise_multiplier=3.0,
        shape=float("inf"),
    )
    assert not seen.trained
    assert seen.result.summary["epsilon"] > 0
    check_folder(seen)


def test_a_diverged_trial_is_the_worst(
    own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trials.run_dpsgd

    def diverging(configuration: DPSGDRun, **more: Any) -> Any:
        result = run(configuration, **more)
        return replace(result, status="diverged") if configuration.learning_rate == 1 else result

    monkeypatch.setattr(trials, "run_dpsgd", diverging)
    settings = {"candidates": {"learning_rate": [0.1, 1.0]}, "delta": 1e-3, "noise_multiplier": 3.0}
    seen = observe(own_run(own_data), tmp_path / "a", **settings)
    found = [score for score in seen.scores if score is not None]
    assert 0 < len(found) < len(seen.scores)
    assert seen.result.summary["selection"]["validation_accuracy"] == max(found)
    assert seen.result.summary["selection"]["chosen"] == {"learning_rate": 0.1}


# ---------------------------------------------------------------- killed, and started again


def test_killed_at_any_write_it_goes_on_with_the_trials_that_are_missing(
    own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, drawn = tmp_path / "a", []
    seen = Observation(folder)
    watch(seen, monkeypatch)

    def attempt() -> TrainingResult:
        return tune(
            own_run(own_data),
            folder,
            candidates={"learning_rate": [0.1, 1.0]},
            delta=1e-3,
            noise_multiplier=3.0,
            mean_trials=4,
        )

    def look() -> None:
        path = folder / state.FOLDER / state.FILE
        if path.exists():
            data = json.loads(path.read_text("utf-8"))
            drawn.append(data["picks"])
            assert data["done"] <= len(data["picks"])
            assert path.stat().st_mode & 0o777 == 0o600
            assert path.parent.stat().st_mode & 0o777 == 0o700
            for weights in path.parent.glob("*.safetensors"):
                assert weights.stat().st_mode & 0o077 == 0

    seen.result, attempts = killed_at_each_write(monkeypatch, attempt, look)
    assert attempts > 4
    assert all(picks == drawn[0] for picks in drawn)
    assert len(seen.scores) == len(drawn[0])  # each was compared once, whatever was cut short
    check_folder(seen)


@pytest.mark.slow
def test_killed_for_real_on_digits(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rng = tmp_path / "a", random.Random(1)
    file, picks = folder / state.FOLDER / state.FILE, []
    line = [*DIGITS.replace("6 --lea", "6 --insecure-noise-seed 23 --lea").split(), "--output", str(folder)]
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", "from dpml.cli import run; run()", *line], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.1, 0.8))
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        data = json.loads(file.read_text("utf-8"))
        picks.append(data["picks"])
        assert not {"summary.json", "model.safetensors", "statement.md"} & {p.name for p in folder.iterdir()}
    done: list[int] = []
    delete = state.TuningState.delete

    def counted(self: state.TuningState) -> None:
        done.append(self.done)
        assert self.picks == picks[0] == picks[1]
        delete(self)

    monkeypatch.setattr(state.TuningState, "delete", counted)
    outcome = call(" ".join(line))
    assert outcome.status == 0
    assert done == [len(picks[0])]
    assert {path.name for path in folder.iterdir() if "tfevents" not in path.name} == FILES
    safetensors.torch.load_model(models.build("linear", (1, 8, 8), 10), folder / "model.safetensors")


def test_ctrl_c_releases_nothing(
    call: Call, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpml.mechanism import SampledGaussianMechanism

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.tuning.trials._rehearse", lambda *_: None)
    monkeypatch.setattr(SampledGaussianMechanism, "clipped_sum", interrupted)
    line = f"{OWN} --noise-multiplier 3 --dataset {own_data} --output"
    outcome = call(line, tmp_path / "a")
    assert outcome.status == 130
    assert "nothing was released; the same command goes on" in outcome.err
    assert {path.name for path in (tmp_path / "a").iterdir()} == {state.FOLDER, "privacy_events.json"}
    monkeypatch.undo()
    other = call(f"{line.replace('0.1,1', '0.2,1')}", tmp_path / "a")
    assert "holds an unfinished tuning run with other settings" in other.error()
    with state._locked(tmp_path / "a"):
        assert "Another process is tuning" in call(line, tmp_path / "a").error()
    assert call(line, tmp_path / "a").status == 0


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        ("--epsilon 3", 2, "Give several values of a setting"),
        ("--epsilon 3 --learning-rate 0.1,,1", 2, "not a valid float"),
        ("--epsilon 3 --learning-rate 0.1,0.1", 2, "hold a value twice"),
        ("--epsilon 3 --learning-rate 0.1,nan", 2, "'learning_rate' parameter of a run must be in"),
        (
            "--epsilon 3 --learning-rate 0.1,1 --mean-trials 1",
            2,
            "'mean_trials' parameter of tune must be in",
        ),
        ("--epsilon 3 --learning-rate 0.1,1 --shape -1", 2, "'shape' parameter of tune must be in"),
        ("--learning-rate 0.1,1", 2, "Give exactly one of epsilon"),
        ("--epsilon 3 --model linear,resnet1001", 2, "resnet1001"),
        ("--epsilon 3 --batch-size 64,4000", 2, "4000 is larger than the 1294 training examples"),
        ("--noise-multiplier 3 --views 1,2", 2, "2 views of a record without an augmentation"),
        ("--epsilon 3 --clipping flat,soft", 2, "'soft' is not one of"),
        ("--epsilon 1e-8 --learning-rate 0.1,1", 3, "No noise multiplier up to 1e+07 meets"),
        ("--epsilon 3 --learning-rate 0.1,1 --public-validation nowhere.npz", 2, "nowhere.npz"),
    ],
)
def test_a_mistake_gets_one_line(call: Call, tmp_path: Path, more: str, status: int, message: str) -> None:
    outcome = call(f"tune dpsgd-digits --epochs 4 --delta 1e-5 {more} --output", tmp_path / "a")
    assert outcome.status == status
    assert message in outcome.error()
    assert not (tmp_path / "a").exists()


def test_other_mistakes(call: Call, own_data: Path, tmp_path: Path) -> None:
    lists = "--delta 1e-3 --noise-multiplier 3 --learning-rate 0.1,1 --output"
    assert "There is no recipe 'dpsgd-digit'" in call(f"tune dpsgd-digit {lists}", tmp_path / "a").err
    assert "Tuning is for DP-SGD" in call(f"tune pate-digits {lists}", tmp_path / "a").err
    own = f"{OWN} --noise-multiplier 3 --dataset {own_data} --output"
    assert "none: leave it out" in call(f"{own} {tmp_path / 'a'} --exempt-public-benchmark").err
    assert "under zero-out only" in call(f"{own} {tmp_path / 'a'} --sampling-probability 0.1").err
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "is not empty" in call(own, tmp_path / "full").err
    (tmp_path / "damaged" / state.FOLDER).mkdir(parents=True)
    (tmp_path / "damaged" / state.FOLDER / state.FILE).write_text("{}")
    assert "is damaged" in call(own, tmp_path / "damaged").err
