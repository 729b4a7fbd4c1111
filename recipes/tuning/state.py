"""What a tuning run knows and nobody else may: the number of trials, which they are, and the best so far.

It lies in a folder of mode 700 beside the results, and is deleted when the winner is published. It is written
before the first trial and after each, so a run that was killed goes on with the trials that are missing:
the number is not drawn again. A trial that was cut short starts again with fresh noise. Nothing of it
was released, so that costs nothing, as long as what cut it short did not depend on the private records.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from accounting import UserError
from dpml.outputs import RunFolder, write_private
from dpml.paths import read_text
from dpml.randomness import Randomness
from recipes.tuning.plan import TuningPlan

FOLDER, FILE = "unreleased", "state.json"
STATE_VERSION = 2


@dataclass(frozen=True)
class Best:
    """The best trial so far.

    Attributes:
        pick: Its candidate.
        score: Its score; None if it diverged, which is worse than any number.
        weights: The name of its weights' file.
        summary: Its summary, as the trainer made it.
        progress: What it told trackers: [step, figures] in turn.
    """

    pick: int
    score: float | None
    weights: str
    summary: dict[str, Any]
    progress: list[tuple[int, dict[str, float]]]


class TuningState:
    """The secret state of a tuning run in its output folder. Make one by `TuningState.opened`.

    Attributes:
        folder: The output folder.
        picks: The candidate of each trial: K numbers, all drawn before the first trial.
        done: How many trials are finished.
        best: The best of these.
        ledger_run: The id under which a ledger knows the selection; None without a ledger.
    """

    def __init__(self, folder: RunFolder, plan: dict[str, Any], picks: list[int]) -> None:
        self.folder, self._plan, self.picks = folder, plan, picks
        self.done = 0
        self.best: Best | None = None
        self.ledger_run: str | None = None

    @classmethod
    @contextmanager
    def opened(
        cls, output: str | os.PathLike[str], plan: TuningPlan, about: Mapping[str, Any], random: Randomness
    ) -> Iterator[TuningState]:
        """Go on with what is in the folder, or draw K and begin. The folder is locked inside of the block.

        Args:
            output: A new folder, or that of a run of the same plan that was interrupted.
            plan: The plan.
            about: What else a run that goes on must agree on.
            random: Where K and the candidates come from.

        Raises:
            UserError: if the folder holds anything else, cannot be written to, or is in use.
        """
        path = Path(output)
        wanted = json.loads(json.dumps({"plan": plan.to_dict(), **about}))
        if not (path / FOLDER).exists():
            RunFolder(path)  # refuses what is not empty
        with _locked(path):
            state = cls._read(path, wanted)
            if state is None:
                for leftover in path.glob(f"{FOLDER}/.{FILE}.tmp"):
                    leftover.unlink()  # killed before the first trial
                (path / FOLDER).mkdir(mode=0o700, exist_ok=True)
                state = cls(RunFolder.reopen(path), wanted, draw_trials(plan, random))
                state._write()
            yield state

    @classmethod
    def _read(cls, path: Path, wanted: dict[str, Any]) -> TuningState | None:
        try:
            data = json.loads(read_text(path / FOLDER / FILE))
            state = cls(RunFolder.reopen(path), data["about"], data["picks"])
            state.done = data["done"]
            state.best = None if data["best"] is None else Best(**data["best"])
            state.ledger_run = data["ledger_run"]
            version = data["schema_version"]
            state._require_sense(len(wanted["plan"]["candidates"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{str(path / FOLDER / FILE)!r} is damaged; choose a new output folder."
            ) from error
        if version != STATE_VERSION or state._plan != wanted:
            raise UserError(
                f"{str(path)!r} holds an unfinished tuning run with other settings; repeat its own command, "
                "or choose a new output folder."
            )
        return state

    def finished(
        self,
        pick: int,
        model: nn.Module,
        score: float | None,
        summary: dict[str, Any],
        progress: list[tuple[int, dict[str, float]]],
    ) -> None:
        """Note that the next trial is finished, and keep it if it is the best so far.

        Of equal scores the earlier wins. Trials are alike before they are run, so that is a fair choice.
        """
        old = None if self.best is None else self.best.weights
        if self.best is None or _above(score, self.best.score):
            weights = f"{self.done}.safetensors"
            private = RunFolder.reopen(self.folder.path / FOLDER)
            private.write_model(weights, model)
            (private.path / weights).chmod(0o600)
            self.best = Best(pick, score, weights, summary, progress)
        self.done += 1
        self._write()
        if old is not None and old != self.best.weights:
            (self.folder.path / FOLDER / old).unlink(missing_ok=True)

    def _require_sense(self, candidates: int) -> None:
        """Raise ValueError unless these are trials, so many are done, and one of them is the best."""
        best = self.best
        picks = self.picks if best is None else [*self.picks, best.pick]
        good = self.ledger_run is None or isinstance(self.ledger_run, str)
        good &= all(type(pick) is int and 0 <= pick < candidates for pick in picks)
        good &= type(self.done) is int and 0 <= self.done <= len(self.picks)
        if best is not None:
            good &= best.score is None or (type(best.score) in (int, float) and math.isfinite(best.score))
            good &= isinstance(best.weights, str) and isinstance(best.summary, dict)
            good &= isinstance(best.progress, list)
        if not good or (best is None) != (self.done == 0):
            raise ValueError("no state of a tuning run")

    def reserved(self, ledger_run: str) -> None:
        """Note the run in the ledger, before anything is committed to it."""
        self.ledger_run = ledger_run
        self._write()

    def delete(self) -> None:
        """Remove all of it: the winner is published."""
        shutil.rmtree(self.folder.path / FOLDER)

    def _write(self) -> None:
        data = {
            "schema_version": STATE_VERSION,
            "about": self._plan,
            "picks": self.picks,
            "done": self.done,
            "best": None if self.best is None else asdict(self.best),
            "ledger_run": self.ledger_run,
        }
        write_private(self.folder.path / FOLDER / FILE, json.dumps(data).encode())


def draw_trials(plan: TuningPlan, random: Randomness) -> list[int]:
    """Draw K, and a candidate for each trial: a list of K numbers of candidates."""
    generator = np.random.default_rng(random.words(4))
    runs = plan.runs.distribution.draw_runs(generator)
    return [int(pick) for pick in generator.integers(len(plan.candidates), size=runs)]


def _above(score: float | None, other: float | None) -> bool:
    return score is not None and (other is None or score > other)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"Another process is tuning in {str(path)!r}; wait for it, or choose another output folder."
            ) from error
        yield
    finally:
        os.close(folder)
