import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from accounting import PrivacyBudget
from accounting.ledger import Ledger

BUDGET = PrivacyBudget(3.0, 1e-5)
MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory: these tests wait for no disk


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    """A ledger with one data set, `patients`."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        made = Ledger(Path(folder) / "ledger.sqlite")
        made.declare("patients", BUDGET)
        yield made
