"""Training, PATE and a sweep on digits that are killed; `kills.py` does the same two hundred times each."""

import importlib
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kill_checks import Answering, Kind, Place
from kills import KINDS, LATE, kill_all
from resume_checks import PrivacyViolation, in_a_child, kill

from accounting.ledger import LedgerReservation
from dpml import checkpoint
from dpml.cli import main
from dpml.mechanism import SampledGaussianMechanism
from dpml.pate import report
from dpml.pate.aggregation import Aggregator
from dpml.pate.answers import AnswerBook
from dpml.randomness import Randomness

Patch = pytest.MonkeyPatch
TRAIN = replace(KINDS["train"], words=KINDS["train"].words.replace("--epochs 100", "--epochs 2"))
PATE = KINDS["pate"]
SWEEP = replace(
    KINDS["sweep"],
    words="sweep dpsgd-digits --noise-multiplier 4,8 --seeds 2 --epochs 1 --processes 2",
)


@pytest.mark.parametrize("kind", [TRAIN, PATE, SWEEP], ids=KINDS)
def test_sigkill_at_random_moments(kind: Kind, tmp_path: Path) -> None:
    """A kill of a run with a known seed, and one of a run with secret noise."""
    seed = 2 * int.from_bytes(os.urandom(4))
    for secret in range(2):
        for outcome in kill_all(kind, tmp_path / f"{secret}", seed=seed + secret, kills=1, forked=True):
            assert not outcome.failure, outcome.seed


@pytest.fixture(scope="module")
def imported() -> None:
    """What children need and would import one by one."""
    for module in LATE:
        importlib.import_module(module)


def carry_out(place: Place, kind: Kind, words: list[str], *arrange: Callable[[Patch], None]) -> int:
    """The exit status of a command in a child, which notes what it releases."""

    def work(patch: Patch) -> None:
        for name, value in place.environment.items():
            patch.setenv(name, value)
        kind.record(patch, place)
        for each in arrange:
            each(patch)
        assert main(words) == 0

    return in_a_child(work)


# Of the second of the blocks of 16 queries.
BOUNDARIES: dict[str, tuple[Any, str, int, bool]] = {
    "reserved": (AnswerBook, "__init__", 1, True),
    "book made": (AnswerBook, "__init__", 1, False),
    "run written": (report, "write_run", 1, False),
    "checks paid": (AnswerBook, "commit_checks", 2, False),
    "checks leased": (LedgerReservation, "commit", 3, False),
    "checks drawn": (Aggregator, "check", 2, False),
    "checks written": (AnswerBook, "persist_checks", 2, False),
    "answers paid": (AnswerBook, "commit_answers", 2, False),
    "answers drawn": (Aggregator, "choose", 2, False),
    "answers written": (AnswerBook, "persist_answers", 2, False),
    "before the summary": (report.PATEReport, "finish", 1, True),
}


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory, imported: None) -> Path:  # noqa: ARG001
    """The folder of a PATE run with a known seed that nobody killed."""
    place = Place(tmp_path_factory.mktemp("answered") / "a", PATE.budget, secret=False, forked=True)
    assert carry_out(place, PATE, PATE.begin(place)) == 0
    return place.run


@pytest.mark.parametrize(
    ("boundary", "secret"),
    [*((name, False) for name in BOUNDARIES), ("checks paid", True), ("answers drawn", True)],
)
def test_sigkill_at_every_boundary_of_pate(
    boundary: str, secret: bool, tmp_path: Path, answered: Path
) -> None:
    """With a known seed nothing is forfeited: it ends as if it had not been killed."""
    place = Place(tmp_path / "a", PATE.budget, secret=secret, forked=True)
    owner, name, call, before = BOUNDARIES[boundary]
    died = carry_out(
        place, PATE, PATE.begin(place), lambda patch: kill(patch, owner, name, call, before=before)
    )
    assert died == -signal.SIGKILL
    PATE.check(place)
    words = PATE.go_on(place)
    assert (words[0] == "train") == (boundary in ("reserved", "book made"))
    assert carry_out(place, PATE, words) == 0
    PATE.check_whole(place, answered)


# ---------------------------------------------------------------- planted faults


def _nothing_leased(patch: Patch) -> None:
    patch.setattr(LedgerReservation, "_secure", lambda *_: None)


def _nothing_paid(patch: Patch) -> None:
    patch.setattr(AnswerBook, "commit_checks", lambda _, keys: keys)


def _forfeited_is_drawn_again(patch: Patch) -> None:
    patch.setattr(Randomness, "secret", lambda: Randomness(os.urandom(32), is_secret=False))


def _damaged_checkpoint(patch: Patch) -> None:
    def written(path: Path, content: bytes) -> None:
        path.write_bytes(content[:-1])
        path.chmod(0o600)

    patch.setattr(checkpoint, "write_private", written)


FAULTS: dict[str, tuple[Callable[[Patch], None], Kind, str]] = {
    "nothing leased": (_nothing_leased, TRAIN, "record: 12 steps were released"),
    "damaged checkpoint": (_damaged_checkpoint, TRAIN, "is damaged"),
    "no answer leased": (_nothing_leased, PATE, "record: 16 checks"),
    "nothing paid": (_nothing_paid, PATE, "record: noise was drawn for .* without payment"),
    "forfeited is drawn again": (_forfeited_is_drawn_again, PATE, "kept: .* had been final"),
}


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, tmp_path: Path) -> None:
    fault, kind, words = FAULTS[name]
    place = Place(tmp_path / "a", kind.budget, secret=True, forked=True)
    where = (
        (Aggregator, "choose", 1)
        if isinstance(kind, Answering)
        else (SampledGaussianMechanism, "release", 12)
    )

    def check_killed_and_completed() -> None:
        assert carry_out(place, kind, kind.begin(place), fault, lambda patch: kill(patch, *where)) == -9
        kind.check(place)
        assert carry_out(place, kind, kind.go_on(place), fault) == 0
        kind.check_whole(place, place.run)

    with pytest.raises((PrivacyViolation, checkpoint.CannotResume), match=words):
        check_killed_and_completed()
