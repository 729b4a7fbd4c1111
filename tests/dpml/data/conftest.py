import os
from collections.abc import Callable
from pathlib import Path

import pytest

from accounting.errors import UserError
from dpml.data import official

_BESIDE_CHECKOUT = Path(__file__).resolve().parents[4] / "shared" / "data"
_REAL = Path(os.environ.get("DPML_DATA") or _BESIDE_CHECKOUT)

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no $DPML_DATA, so that no test depends on the machine or changes it."""
    monkeypatch.delenv("DPML_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    folder = tmp_path / "cache"
    monkeypatch.setattr(official, "cache_folder", lambda: folder)
    return folder


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that $DPML_DATA names."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("DPML_DATA", str(folder))
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not _REAL.is_dir():
        pytest.skip(f"the real data sets are neither in $DPML_DATA nor in {_BESIDE_CHECKOUT}")
    return _REAL


@pytest.fixture
def refused() -> Refused:
    """Call a function, which must raise a UserError of one line with all the given words."""

    def check(function: Callable[[], object], *words: str) -> str:
        with pytest.raises(UserError) as raised:
            function()
        message = str(raised.value)
        assert "\n" not in message
        for word in words:
            assert word in message
        return message

    return check
