"""Ctrl-C: a run stops cleanly, keeps what it trained and says what that cost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from dpml import models
from dpml.tracking import ProgressLine

Call = Callable[..., Any]
OWN = "train dpsgd --model linear --delta 1e-3 --batch-size 10 --dataset"


def check_stopped(folder: Path, error: str, planned: int) -> None:
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["status"] == "stopped"
    assert 0 < summary["steps"] < summary["planned_steps"] == planned
    assert 0 < summary["epsilon_spent"] < summary["epsilon"]
    assert summary["test_accuracy"] is not None
    steps = f"{summary['steps']:,} of {planned:,} steps"
    text = (folder / "statement.md").read_text("utf-8")
    assert f"The run was stopped after {steps}" in text
    assert "an odometer reading and no guarantee" in text
    assert f"Stopped after {steps}; the model is kept." in error
    assert f"Spent until here: ε = {summary['epsilon_spent']:.4f} (a reading)." in error
    assert f"The guarantee is the whole plan's: ε = {summary['epsilon']:.4f}." in error
    assert "Traceback" not in error
    record = json.loads((folder / "privacy_events.json").read_text("utf-8"))
    assert record["status"] == "stopped"
    assert record["planned"][0]["count"] == planned
    assert record["committed"][0]["count"] == summary["steps"]
    safetensors.torch.load_model(models.build("linear", (4,), 2), folder / "model.safetensors")


def test_a_stop_in_the_middle(
    call: Call, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ProgressLine.scalars

    def scalars(self: ProgressLine, step: int, values: Any) -> None:
        original(self, step, values)
        if step >= 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLine, "scalars", scalars)
    outcome = call(OWN, own_data, "--noise-multiplier", 2, "--epochs", 20, "--output", tmp_path / "a")
    assert outcome.status == 130
    check_stopped(tmp_path / "a", outcome.err, planned=200)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text("utf-8"))
    # The guarantee is that of a run that was not stopped, and anybody can recompute both figures.
    line = "account --delta 1e-3 --json --events"
    report = json.loads(call(line, tmp_path / "a" / "privacy_events.json").out)
    assert report["epsilon"] == summary["epsilon"]
    assert report["committed_epsilon"] == summary["epsilon_spent"]


def test_a_budget_s_guarantee_is_the_ceiling(
    call: Call, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scalars(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLine, "scalars", scalars)
    outcome = call(OWN, own_data, "--epsilon", 1, "--epochs", 2, "--output", tmp_path / "a")
    assert outcome.status == 130
    summary = json.loads((tmp_path / "a" / "summary.json").read_text("utf-8"))
    assert summary["steps"] == 1
    assert 0.995 <= summary["epsilon"] <= 1
    assert summary["epsilon_spent"] < 0.7


def test_a_stop_without_privacy(
    call: Call, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scalars(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLine, "scalars", scalars)
    line = "train dpsgd --non-private --model linear --epochs 2 --batch-size 10 --dataset"
    outcome = call(line, own_data, "--output", tmp_path / "a")
    assert outcome.status == 130
    assert "Stopped after 1 of 20 steps" in outcome.err
    assert "ε" not in outcome.err
    assert json.loads((tmp_path / "a" / "summary.json").read_text("utf-8"))["epsilon"] is None


def test_a_stop_before_the_first_step(
    call: Call, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpml.dpsgd.calibrate_noise_multiplier", interrupted)
    outcome = call(OWN, own_data, "--epsilon", 1, "--epochs", 1, "--output", tmp_path / "a")
    assert outcome.status == 130
    assert "Interrupted." in outcome.err
    assert "Traceback" not in outcome.err
    assert not list(tmp_path.glob("a/*"))


def test_an_error_gives_the_terminal_back(
    call: Call, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[bool] = []
    monkeypatch.setattr(ProgressLine, "finish", lambda _: finished.append(True))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ProgressLine, "scalars", full)
    more = ("--noise-multiplier", 2, "--epochs", 1, "--output", tmp_path / "a")
    assert call(OWN, own_data, *more).status == 1
    assert finished


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_real_signal(own_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from dpml.cli import run; run()", *OWN.split(), str(own_data)]
    command += ["--noise-multiplier", "9", "--epochs", "5000", "--output", str(tmp_path / "a")]
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=stream,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # A shell starts background jobs with Ctrl-C ignored, and a child inherits that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        wait_for(lambda: "step 1/" in log.read_text("utf-8"), process)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()
    check_stopped(tmp_path / "a", log.read_text("utf-8"), planned=50_000)
