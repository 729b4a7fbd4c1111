"""What is killed, and what must hold of it: training, PATE and a sweep on digits, each with a ledger.

After each kill `check` looks at what is left: the ledger and the checkpoint or the book of answers open, and
each release that is there, or that a forked process has noted, has its record. Of a run that is completed,
`check_whole` compares everything with an uninterrupted one if its seed is known; if its noise is secret, each
release was made once, with the same numbers. `kills.py` kills.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from resume_checks import (
    PrivacyViolation,
    check_nothing_left,
    check_private,
    check_released,
    check_same,
    record_releases,
    released,
    told,
)

from accounting import PrivacyBudget
from accounting.accountant import kinds
from accounting.ledger import Ledger, Run
from dpml import checkpoint
from dpml.checkpoint import CHECKPOINT_FILE
from dpml.outputs import read_events
from dpml.pate.aggregation import Aggregator
from dpml.pate.answers import AnswerBook, Desk
from dpml.resuming import CHECKPOINT_FOLDER, CONFIG_FILE, EVENTS_FILE, recorded_run
from recipes import sweep_workers
from recipes.sweep_plan import PLAN_FILE
from recipes.table import read_runs

NAME = "digits"
NOISE_SEED = 3
BOOK = "answers.sqlite"
QUERIES = 300
States = dict[bytes, tuple[str, int | None]]
"""By query: checking, refused, passed, answering or answered, and the class."""
_TIMES = ("train_seconds", "examples_per_second")


@dataclass
class Place:
    """Where one run, its ledger and its processes' notes are.

    Attributes:
        path: The folder of all of it.
        budget: Of the ledger's only data set.
        secret: Whether nobody knows the seed of the noise.
        forked: Whether the processes note what they release.
        kept: What an earlier look has found and no later one may miss.
    """

    path: Path
    budget: PrivacyBudget
    secret: bool
    forked: bool
    kept: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path.mkdir()
        self.run, self.notes = self.path / "run", self.path / "notes"
        self.ledger = Ledger(self.path / "ledger.sqlite")
        self.ledger.declare(NAME, self.budget)

    @property
    def environment(self) -> dict[str, str]:
        """Of the command: its own ledger, its own cache, one core."""
        return {
            "DPML_LEDGER": str(self.ledger.path),
            "XDG_CACHE_HOME": str(self.path / "cache"),
            "OMP_NUM_THREADS": "1",
        }

    def ledger_runs(self) -> dict[str, Run]:
        """The runs of the ledger, which is verified. Never overspent."""
        self.ledger.verify()
        data_set = self.ledger.data_set(NAME)
        if data_set.spent()[1] > self.budget.epsilon:
            raise PrivacyViolation(f"ledger: ε = {data_set.spent()[1]} of {self.budget.epsilon} is spent")
        return data_set.runs

    def keep(self, now: dict[Any, Any]) -> None:
        """Remember what is final. Raise PrivacyViolation if something of it is gone or has changed."""
        if lost := [key for key, value in self.kept.items() if now.get(key) != value]:
            raise PrivacyViolation(f"kept: {lost[:3]} had been final, and changed")
        self.kept = now


@dataclass(frozen=True)
class Kind(ABC):
    """A command that is killed.

    Attributes:
        words: Of the command, but for the output, the ledger and the seed of its noise.
        budget: The ledger's: not enough for a second run, where there is one alone.
    """

    words: str
    budget: PrivacyBudget

    def begin(self, place: Place) -> list[str]:
        """The command of a new run."""
        seed = [] if place.secret else ["--insecure-noise-seed", str(NOISE_SEED)]
        return [*self.words.split(), *seed, "--ledger", NAME, "--output", str(place.run)]

    def go_on(self, place: Place) -> list[str]:
        """The command that goes on after a kill: of a run that had not begun, its own in a clean folder."""
        if (place.run / CONFIG_FILE).exists():
            return ["resume", str(place.run)]
        shutil.rmtree(place.run, ignore_errors=True)
        for run_id, run in place.ledger_runs().items():
            if any(run.leased):
                raise PrivacyViolation(f"record: the run {run_id} has released something, and cannot go on")
            if run.committed is None:  # what was reserved and not begun is given back
                place.ledger.close_run(run_id)
        return self.begin(place)

    @abstractmethod
    def record(self, patch: pytest.MonkeyPatch, place: Place) -> None:
        """Have a forked process write down what it releases."""

    @abstractmethod
    def check(self, place: Place) -> str:
        """Raise PrivacyViolation, or another error, unless what a kill has left is sound; say what it met."""

    @abstractmethod
    def check_whole(self, place: Place, other: Path) -> None:
        """Raise unless a run that was killed and completed is as good as the uninterrupted one in `other`."""


# ---------------------------------------------------------------- training


class Training(Kind):
    """DP-SGD with a checkpoint after each epoch."""

    def record(self, patch: pytest.MonkeyPatch, place: Place) -> None:
        record_releases(patch, place.notes)

    def check(self, place: Place) -> str:
        steps = check_training(place.run, place.notes, place.ledger_runs())
        if (place.run / "summary.json").exists():
            return "results written"
        if not (place.run / EVENTS_FILE).exists():
            return "before the first step"
        if steps == (planned := _planned(place.run)):
            return "after the last step"
        return f"checkpoint in quarter {1 + 4 * steps // planned} of the steps"

    def check_whole(self, place: Place, other: Path) -> None:
        assert self.check(place) == "results written"
        check_nothing_left(place.run)
        [run] = [run for run in place.ledger_runs().values() if any(run.leased)]
        if run.committed != run.planned:
            raise PrivacyViolation(f"ledger: {run.committed} were committed of {run.planned}")
        if place.forked:
            check_released(place.notes, _planned(place.run))
        if not place.secret:
            check_same(place.run, other)


def _planned(folder: Path) -> int:
    [plan], _, _ = read_events(folder / EVENTS_FILE)
    [count] = kinds(plan).values()
    return count


def check_training(folder: Path, notes: Path, runs: dict[str, Run]) -> int:
    """Raise unless a killed DP-SGD run can go on and has paid; return the steps of its checkpoint."""
    made = max((step for step, _, _ in released(notes)), default=0)
    path, steps = folder / CHECKPOINT_FOLDER / CHECKPOINT_FILE, 0
    if path.exists():
        check_private(folder)
        steps = checkpoint.read(path)["state"]["step"]
    elif (folder / EVENTS_FILE).exists():
        if not (folder / "summary.json").exists():
            raise PrivacyViolation("checkpoint: it is gone, and the results are not there")
        steps = _planned(folder)
    if made or steps or (folder / "model.safetensors").exists():
        done = max(made, steps)
        run = _ledger_run(folder, runs)
        if done > _planned(folder) or done > sum(_leased(run)):
            raise PrivacyViolation(f"record: {done} steps were released, {_leased(run)} were leased")
        if done < _planned(folder) and (folder / "model.safetensors").exists():
            raise PrivacyViolation("record: the weights are there before the last step")
    return steps


def _ledger_run(folder: Path, runs: dict[str, Run]) -> Run:
    run_id = recorded_run(folder)
    if run_id not in runs:
        raise PrivacyViolation(f"record: the ledger has no run {run_id}")
    return runs[run_id]


def _leased(run: Run) -> list[int]:
    """What a ledger says may have been released: parts of each kind."""
    return run.leased if run.committed is None else run.committed


# ---------------------------------------------------------------- PATE


class Answering(Kind):
    """PATE: teachers, `QUERIES` queries with a check each, a student."""

    def record(self, patch: pytest.MonkeyPatch, place: Place) -> None:
        """Append what is drawn, for which query and with which outcome."""
        find, due = Desk._draws, list[bytes]()

        def finding(self: Desk, *args: Any) -> Any:
            due[:], random = find(self, *args)
            return list(due), random

        patch.setattr(Desk, "_draws", finding)
        for what in ("check", "choose"):
            patch.setattr(Aggregator, what, _noting(getattr(Aggregator, what), what, due, place.notes))

    def check(self, place: Place) -> str:
        path, begun = place.run / BOOK, (place.run / CONFIG_FILE).exists()
        if begun and not path.exists():
            raise PrivacyViolation("book: the run is there, but not its answers")
        states, drawn = book_states(path) if path.exists() else {}, draws(place.notes)
        pending = {key: state for key, state in states.items() if state[0] in ("checking", "answering")}
        forfeited = pending if place.secret else {}  # with a known seed it will be drawn again
        interrupted = pending.keys() - place.kept.keys()
        final = {key: state for key, state in states.items() if state[0] in ("refused", "answered")}
        place.keep(final | forfeited)
        check_drawn(drawn, states, secret=place.secret)
        runs = place.ledger_runs()
        if states or drawn:
            _check_leased(_ledger_run(place.run, runs), states)
        if (place.run / "summary.json").exists():
            return "results written"
        if not states:
            return "teachers" if begun else "before the first file"
        if interrupted:
            return "within a block of answers"
        return "student" if len(states) == QUERIES else "between two blocks of answers"

    def check_whole(self, place: Place, other: Path) -> None:
        assert self.check(place) == "results written"
        [run] = [run for run in place.ledger_runs().values() if any(run.leased)]
        states = book_states(place.run / BOOK)
        if run.committed is None or run.committed[0] < len(states) or len(states) < QUERIES:
            raise PrivacyViolation(f"ledger: {run.committed} were committed for {len(states)} queries")
        if not place.secret:
            assert states == book_states(other / BOOK)
            assert told(place.run) == told(other)


def _check_leased(run: Run, states: States) -> None:
    """Raise PrivacyViolation if more outcomes are there than the ledger has leased, of checks or answers."""
    checks = sum(state != "checking" for state, _ in states.values())
    answers = sum(state == "answered" for state, _ in states.values())
    leased = run.leased if run.committed is None else run.committed
    if checks > leased[0] or answers > leased[1]:
        raise PrivacyViolation(
            f"record: {checks} checks and {answers} answers are there, {leased} were leased"
        )


def _noting(draw: Callable[..., Any], what: str, due: list[bytes], notes: Path) -> Callable[..., Any]:
    def noting(*args: Any) -> Any:
        outcome = draw(*args)
        with notes.open("a") as file:
            for key, found in zip(due, outcome.tolist(), strict=True):
                file.write(f"\n{what} {key.hex()} {int(found)} .\n")
        return outcome

    return noting


def draws(notes: Path) -> list[tuple[str, bytes, int]]:
    """What `Answering.record` has written, but for lines that a kill has torn."""
    lines = notes.read_text().splitlines() if notes.exists() else []
    words = [line.split() for line in lines if line.endswith(" .")]
    return [(what, bytes.fromhex(key), int(found)) for what, key, found, _ in words]


def book_states(path: Path) -> States:
    """Each query's state and class, in a book that opens and is whole, as the program opens it."""
    with closing(sqlite3.connect(path)) as base:
        [[verdict]] = base.execute("PRAGMA integrity_check").fetchall()
        if verdict != "ok":
            raise PrivacyViolation(f"book: {verdict}")
        if not base.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
            return {}  # it was killed before the first table, and will have them when it is opened again
        found = base.execute("SELECT key, state, class FROM queries").fetchall()
    title = AnswerBook.read_title(path)
    with closing(AnswerBook(path, Aggregator.from_dict(title["aggregator"]), title["about"])) as book:
        paid = book.spent()
        if paid[0] > book.aggregator.queries or paid[1] > book.aggregator.answers:
            raise PrivacyViolation(f"book: {paid} were paid, more than planned")
    return {key: (state, chosen) for key, state, chosen in found}


def check_drawn(drawn: Iterable[tuple[str, bytes, int]], states: States, *, secret: bool) -> None:
    """Raise PrivacyViolation unless all processes together drew for what was paid for, and once.

    With a known seed a draw may be repeated, as long as it is the same.
    """
    outcomes: dict[tuple[str, bytes], int] = {}
    for what, key, found in drawn:
        if key not in states or (what == "choose" and states[key][0] not in ("answering", "answered")):
            raise PrivacyViolation(f"record: noise was drawn for {key.hex()} without payment")
        if (what, key) in outcomes and (secret or outcomes[what, key] != found):
            raise PrivacyViolation(f"draws: {what} of {key.hex()} was drawn twice")
        outcomes[what, key] = found
        if what == "choose" and states[key] not in (("answering", None), ("answered", found)):
            raise PrivacyViolation(f"draws: the answer to {key.hex()} is not the one that was drawn")


# ---------------------------------------------------------------- a sweep


class Sweeping(Kind):
    """Many small runs of DP-SGD, in two processes."""

    def go_on(self, place: Place) -> list[str]:
        return self.begin(place)

    def record(self, patch: pytest.MonkeyPatch, place: Place) -> None:
        """Fork the workers too, and append the releases of each cell to a file of its own."""
        place.notes.mkdir(exist_ok=True)
        run, context = sweep_workers._run, sweep_workers.multiprocessing.get_context
        patch.setattr(sweep_workers.multiprocessing, "get_context", lambda _: context("fork"))

        def recorded(cell: Any, output: Path) -> str | None:
            with pytest.MonkeyPatch.context() as within:
                record_releases(within, place.notes / cell.name)
                return run(cell, output)

        patch.setattr(sweep_workers, "_run", recorded)

    def check(self, place: Place) -> str:
        runs = place.ledger_runs()
        cells = sorted(place.run.glob("runs/*"))
        if not (place.run / PLAN_FILE).exists():
            if cells:
                raise PrivacyViolation("plan: runs have begun before it was written")
            return "before the plan"
        for cell in cells:
            check_training(cell, place.notes / cell.name, runs)
        finished = {path: path.stat().st_mtime_ns for path in place.run.glob("runs/*/summary.json")}
        place.keep(finished)
        if (place.run / "sweep.parquet").exists():
            table = read_runs(place.run)
            assert set(table["status"]) <= {"completed"}, table["error"].to_list()
        all_of_them = len(json.loads((place.run / PLAN_FILE).read_text())["cells"])
        if len(finished) == all_of_them:
            return "all runs finished"
        return f"in quarter {1 + 4 * len(finished) // all_of_them} of the runs"

    def check_whole(self, place: Place, other: Path) -> None:
        assert self.check(place) == "all runs finished"
        ours, theirs = read_runs(place.run), read_runs(other)
        assert ours["run"].to_list() == theirs["run"].to_list()
        assert not list(place.run.glob("abandoned/*")), "a run was begun anew"
        spent = [run for run in place.ledger_runs().values() if any(run.leased)]
        if len(spent) != len(ours) or any(run.committed != run.planned for run in spent):
            raise PrivacyViolation(f"ledger: {len(spent)} runs have released something, of {len(ours)}")
        for cell in place.run.glob("runs/*"):
            check_nothing_left(cell)
            if place.forked:
                check_released(place.notes / cell.name, _planned(cell))
            if not place.secret:
                check_same(cell, other / "runs" / cell.name)
        if not place.secret:
            assert ours.drop(_TIMES).equals(theirs.drop(_TIMES))
            text = "statement.md"
            assert (place.run / text).read_text("utf-8") == (other / text).read_text("utf-8")
