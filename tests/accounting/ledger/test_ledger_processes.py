"""Several processes, and processes that die: nothing is overspent, and no release is without its record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ledger_processes import POINTS, STEPS

from accounting import PoissonSampled, PrivacyAccountant, PrivacyBudget, Repeated
from accounting.ledger import Ledger
from accounting.mechanisms import Gaussian

SCRIPT = Path(__file__).with_name("ledger_processes.py")
STEP = PoissonSampled(Gaussian(1.1), 0.01)
ROUNDS = int(os.environ.get("DPML_RACES", "5"))


def call(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def killed(memory: Path) -> Path:
    memory.chmod(0o711)  # one of them gives up root's rights
    (memory / "killed").mkdir()
    call("killed", memory / "killed")
    return memory / "killed"


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_process_loses_no_release(killed: Path, point: str) -> None:
    ledger = Ledger(killed / f"{point}.sqlite")
    file = killed / f"{point}.released"
    released = len(file.read_text()) if file.exists() else 0
    ledger.path.chmod(0o600)
    ledger.verify()
    runs = ledger.data_set("patients").runs
    if point in ("before reserve", "in reserve", "read-only"):
        assert not runs
        assert released == 0
        return
    [(run_id, run)] = runs.items()
    assert run.status == ("closed" if point == "after close" else "dead")
    assert released <= sum(run.leased) <= 500
    if point.endswith("close"):
        assert released == STEPS
    if run.status == "dead":
        assert run.counted == run.plan  # until somebody says that it is over
        ledger.close_run(run_id)
    [run] = ledger.data_set("patients").runs.values()
    spent = ledger.accountant("patients").epsilon(1e-5)
    truth = PrivacyAccountant()
    truth.record(Repeated(STEP, released))
    assert spent >= truth.epsilon(1e-5)
    assert sum(run.committed or []) >= released
    assert ledger.accountant("patients").fits(Repeated(STEP, 500))
    ledger.verify()


def test_two_processes_never_both_take_the_last_of_a_budget(memory: Path) -> None:
    call("race", memory, ROUNDS)
    found = [json.loads((memory / f"{which}.json").read_text()) for which in range(2)]
    assert sorted(found[0]["wins"] + found[1]["wins"]) == list(range(ROUNDS))
    assert found[0]["made"] + found[1]["made"] == ROUNDS  # of two that declare one name in a new ledger
    assert Ledger(memory / "new 0" / "l").verify().rows == 2
    ledger = Ledger(memory / "race.sqlite")
    ledger.verify()
    for name in ledger.names():
        data_set = ledger.data_set(name)
        assert data_set.spent()[1] <= data_set.budget.epsilon
        assert len(data_set.runs) == (found[0]["crumbs"] + found[1]["crumbs"] if name == "crumbs" else 1)
    alone = PrivacyAccountant(budget=PrivacyBudget(3.0, 1e-5))
    while alone.fits(Repeated(STEP, 500)):
        alone.record(Repeated(STEP, 500))
    assert found[0]["crumbs"] + found[1]["crumbs"] == len(alone.events)
