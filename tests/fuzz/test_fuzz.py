"""Fuzzed input at every entry point: clear refusals alone, nothing wrong accepted. See `fuzzing`.

`DPML_FUZZ` is the number of cases in all, 20000 for the full run; by default it is small.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fuzzing import TARGETS, load_targets, run_cases, shares

load_targets()
CASES = shares(int(os.environ.get("DPML_FUZZ", "600")), list(TARGETS.values()))


@pytest.mark.parametrize("name", TARGETS)
def test_clear_refusals_alone(name: str, tmp_path: Path) -> None:
    tally = run_cases(TARGETS[name], CASES[name], tmp_path)
    assert tally.cases == CASES[name]
    assert not tally.findings, "\n".join(
        f"{len(examples)} × {kind}\n    {examples[0]}" for kind, examples in tally.findings.items()
    )
