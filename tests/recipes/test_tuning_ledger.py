"""`dpml tune` on data whose budget a ledger keeps: the selection is one entry, paid for once."""

from __future__ import annotations

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
from tuning_checks import killed_at_each_write, own_run

from accounting import BestOfRuns, BudgetExceeded, PrivacyBudget
from accounting.ledger import Ledger
from recipes.tuning import state, tune

Call = Callable[..., Any]
SETTINGS: dict[str, Any] = {
    "candidates": {"learning_rate": [0.1, 1.0]},
    "delta": 1e-3,
    "noise_multiplier": 3.0,
    "mean_trials": 4,
}


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """The default ledger, with one data set."""
    monkeypatch.setenv("DPML_LEDGER", str(tmp_path / "ledger" / "ledger.sqlite"))
    made = Ledger()
    made.declare("patients", PrivacyBudget(20.0, 1e-3))
    return made


def test_a_selection_is_recorded_and_says_so(
    ledger: Ledger, own_data: Path, tmp_path: Path, call: Call
) -> None:
    result = tune(own_run(own_data, ledger="patients"), tmp_path / "a", **SETTINGS)
    [run] = ledger.data_set("patients").runs.values()
    assert isinstance(run.plan, BestOfRuns)
    assert run.plan == result.planned
    assert run.committed == [1]
    last, receipt = ledger.entries()[-1], result.summary["ledger"]
    assert (receipt["run_id"], receipt["head"], receipt["rows"]) == (run.run_id, last.hash, last.seq)
    assert receipt["spent"] == pytest.approx(ledger.data_set("patients").spent()[1])
    assert receipt["spent"] >= result.epsilon * (1 - 1e-9)  # the trials themselves are no entries
    assert result.summary["config"]["ledger"] == "patients"
    assert "a ledger was on" in result.statement
    verified = call("verify", tmp_path / "a")
    assert "ledger" in verified.out
    assert "FAILED" not in verified.out


def test_the_command_takes_a_ledger(ledger: Ledger, own_data: Path, tmp_path: Path, call: Call) -> None:
    line = (
        f"tune dpsgd-digits --dataset {own_data} --model linear --epochs 0.5 --batch-size 15 --delta 1e-3 "
        "--learning-rate 0.1,1 --noise-multiplier 3 --ledger patients --output"
    )
    assert call(line, tmp_path / "a").status == 0
    assert len(ledger.data_set("patients").runs) == 1
    refused = call(f"{line} {tmp_path / 'b'} --exempt-public-benchmark")
    assert "leave out ledger or exempt_public_benchmark" in refused.error()
    unknown = call(line.replace("patients", "nobody"), tmp_path / "b")
    assert "has no data set 'nobody'" in unknown.error()
    assert not (tmp_path / "b").exists()


def test_what_the_budget_does_not_pay_for_is_refused(ledger: Ledger, own_data: Path, tmp_path: Path) -> None:
    ledger.declare("few", PrivacyBudget(0.1, 1e-3))
    with pytest.raises(BudgetExceeded, match="'few'"):
        tune(own_run(own_data, ledger="few"), tmp_path / "a", **SETTINGS)
    assert ledger.data_set("few").runs == {}
    assert list((tmp_path / "a").iterdir()) == []  # so that other settings can be tried there
    assert tune(own_run(own_data, ledger="patients"), tmp_path / "a", **SETTINGS).status == "completed"


def test_killed_at_any_write_it_is_paid_for_once(
    ledger: Ledger, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before the first trial: the ledger has the whole plan as soon as one has begun."""
    begun = 0

    def paid() -> None:
        nonlocal begun
        [run] = [run for run in ledger.data_set("patients").runs.values() if any(run.leased)]
        assert run.counted == run.plan
        begun += 1

    result, attempts = killed_at_each_write(
        monkeypatch,
        lambda: tune(own_run(own_data, ledger="patients"), tmp_path / "a", started=paid, **SETTINGS),
    )
    assert attempts > 5
    assert begun > 2
    charged = [run for run in ledger.data_set("patients").runs.values() if run.counted == run.plan]
    assert [run.run_id for run in charged] == [result.summary["ledger"]["run_id"]]
    assert ledger.verify(result.summary["ledger"]["head"]).rows == len(ledger.entries())


@pytest.mark.slow
def test_killed_for_real_it_goes_on_with_its_entry(
    ledger: Ledger, own_data: Path, tmp_path: Path, call: Call
) -> None:
    line = (
        f"tune dpsgd-digits --dataset {own_data} --model linear --epochs 400 --batch-size 15 --delta 1e-3 "
        "--learning-rate 0.1,1 --noise-multiplier 30 --insecure-noise-seed 7 --ledger patients "
        f"--output {tmp_path / 'a'}"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", "from dpml.cli import run; run()", *line.split()], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "a" / "privacy_events.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = json.loads((tmp_path / "a" / state.FOLDER / state.FILE).read_text("utf-8"))
    [run] = ledger.data_set("patients").runs.values()
    assert run.run_id == kept["ledger_run"]
    assert run.leased == [1]
    assert call(line).status == 0
    [run] = ledger.data_set("patients").runs.values()
    assert run.committed == [1]
