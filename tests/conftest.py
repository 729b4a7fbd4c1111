from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpml.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a call of the command gave."""

    status: int
    out: str
    err: str

    def error(self) -> str:
        """The one line that a mistake gets."""
        assert self.out == ""
        assert self.err.startswith("dpml: error: ")
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1
        return self.err.removeprefix("dpml: error: ").strip()


Call = Callable[..., Outcome]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Call `dpml` in this process with a line of words, or with a list of arguments."""

    def command(line: str, *more: object) -> Outcome:
        capsys.readouterr()
        status = main([*line.split(), *map(str, more)])
        return Outcome(status, *capsys.readouterr())

    return command


def arrays(train: int = 100, test: int = 20, **changed: Any) -> dict[str, Any]:
    """Two classes of four numbers each, which a linear model can tell apart."""
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for split, n in (("train", train), ("test", test)):
        x = rng.normal(size=(n, 4)).astype(np.float32)
        made |= {f"x_{split}": x, f"y_{split}": (x[:, 0] > 0).astype(np.int64)}
    return {**made, **changed}


@pytest.fixture
def save_npz(tmp_path: Path) -> Callable[..., Path]:
    """Save `arrays` in a file of the test's folder, with some of them changed, or left out if None."""

    def save(name: str = "own.npz", **changed: Any) -> Path:
        kept = {key: value for key, value in arrays(**changed).items() if value is not None}
        np.savez(tmp_path / name, **kept)
        return tmp_path / name

    return save


@pytest.fixture(scope="session")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small .npz file: 100 records, of which a sample of 10 makes ten steps for each epoch."""
    path = tmp_path_factory.mktemp("data") / "own.npz"
    np.savez(path, **arrays())
    return path


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a completed run on digits under a budget of ε = 3, which tests read and leave alone."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    line = "train dpsgd --dataset digits --epsilon 3 --delta 1e-4 --epochs 4 --batch-size 128 --output"
    assert main([*line.split(), str(folder)]) == 0
    return folder
