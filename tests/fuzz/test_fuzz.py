"""Fuzzed input at every entry point: clear refusals alone, nothing wrong accepted. See `fuzzing`.

`DPML_FUZZ` is the number of cases in all, 20000 for the full run; by default it is small.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path

import pytest
from fuzzing import TARGETS, load_targets, run_cases, shares
from targets_command import commands

import accounting
import accounting.ledger
import dpml

load_targets()
CASES = shares(int(os.environ.get("DPML_FUZZ", "600")), list(TARGETS.values()))


_COME_BACK = {"Reservation", "LedgerReservation", "DataSet", "Entry", "Run", "Verified", "TrainingResult"}
"""Classes that nobody makes: calls return them."""


def test_no_entry_point_is_missing() -> None:
    """Each public function and class, and each command, is called by the name that a user gives it."""
    targets = "".join(path.read_text() for path in Path(__file__).parent.glob("targets_*.py"))
    names: dict[int, set[str]] = {}  # a function may have two
    for module in (accounting, accounting.ledger, dpml):
        for name in set(module.__all__) - _COME_BACK:
            entry = getattr(module, name)
            is_error = inspect.isclass(entry) and issubclass(entry, BaseException)
            if (inspect.isclass(entry) or inspect.isfunction(entry)) and not is_error:
                names.setdefault(id(entry), set()).add(name)
    missing = [each for each in names.values() if not any(re.search(rf"\b{n}\b", targets) for n in each)]
    assert not missing
    assert not [name for name in commands() if f'"{name}"' not in targets]


@pytest.mark.parametrize("name", TARGETS)
def test_clear_refusals_alone(name: str, tmp_path: Path) -> None:
    tally = run_cases(TARGETS[name], CASES[name], tmp_path)
    assert tally.cases == CASES[name]
    assert not tally.findings, "\n".join(
        f"{len(examples)} × {kind}\n    {examples[0]}" for kind, examples in tally.findings.items()
    )
