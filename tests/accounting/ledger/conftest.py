import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from accounting import PrivacyBudget
from accounting.ledger import Ledger

BUDGET = PrivacyBudget(3.0, 1e-5)
MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """A folder that waits for no disk, if the system has one."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def ledger(memory: Path) -> Ledger:
    """A ledger with one data set, `patients`."""
    made = Ledger(Path(tempfile.mkdtemp(dir=memory)) / "ledger.sqlite")
    made.declare("patients", BUDGET)
    return made
