"""Folders that may be read and not written to: training, ledger and answers say so, and nothing is spent.

Root writes everywhere, so each test works in a child that gives up root's rights.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from resume_checks import go_on, in_a_child, kill, refusal, train

from accounting import Gaussian, PrivacyBudget, Repeated, ReservationError, UserError
from accounting.ledger import Ledger
from dpml.checkpoint import CHECKPOINT_FILE
from dpml.mechanism import SampledGaussianMechanism
from dpml.pate.aggregation import aggregator
from dpml.pate.answers import AnswerBook, Desk
from dpml.randomness import Randomness
from dpml.resuming import CHECKPOINT_FOLDER

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that everybody may enter: those of pytest are their user's alone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        folder = Path(name) / "a"
        folder.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        yield folder


def as_nobody(work: Callable[[], None]) -> int:
    """Do something in a child that has not root's rights; its exit status, negative for a signal."""

    def without_rights(_: pytest.MonkeyPatch) -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        work()

    return in_a_child(without_rights)


def test_a_killed_run_in_a_folder_that_is_shut_goes_on_when_it_is_open(folder: Path, tmp_path: Path) -> None:
    train(tmp_path / "whole", insecure_noise_seed=3)  # whoever has no rights can import nothing
    run = folder / "run"

    def killed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            kill(patch, SampledGaussianMechanism, "release", 13)
            train(run, insecure_noise_seed=3)

    def shut() -> None:
        kept = (run / CHECKPOINT_FOLDER / CHECKPOINT_FILE).read_bytes()
        run.chmod(0o500)
        assert "cannot be written to" in refusal(run, insecure_noise_seed=3)
        with pytest.raises(UserError, match="cannot be written to"):
            train(run / "new")
        run.chmod(0o700)
        assert (run / CHECKPOINT_FOLDER / CHECKPOINT_FILE).read_bytes() == kept
        go_on(run, insecure_noise_seed=3)

    assert as_nobody(killed) == -9
    assert as_nobody(shut) == 0
    model = "model.safetensors"
    assert (run / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()


def test_a_checkpoint_s_folder_that_is_shut_stops_the_run_before_its_first_release(folder: Path) -> None:
    (released := folder / "released").touch()
    released.chmod(0o666)

    def shut() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SampledGaussianMechanism, "release", lambda *_: released.write_text("x"))
            (folder / "run").mkdir()
            (folder / "run" / CHECKPOINT_FOLDER).mkdir(mode=0o500)
            with pytest.raises(OSError, match="Permission denied"):
                go_on(folder / "run")

    assert as_nobody(shut) == 0
    assert not released.read_text()


def test_a_ledger_in_a_folder_that_is_shut(folder: Path) -> None:
    plan = Repeated(Gaussian(50.0), 100)

    def shut() -> None:
        ledger = Ledger(folder / "ledger.sqlite")
        ledger.declare("patients", PrivacyBudget(3.0, 1e-5))
        with ledger.accountant("patients").reserve(plan) as reservation:
            reservation.commit(1)
            folder.chmod(0o500)
            with pytest.raises(OSError, match="cannot be used"):
                reservation.commit(50)
            with pytest.raises(ReservationError):
                reservation.commit(1)
            with pytest.raises(OSError, match="cannot be used"):
                ledger.accountant("patients").reserve(plan)
            with pytest.raises(UserError, match=r"cannot be made \(Permission denied\)"):
                Ledger(folder / "new.sqlite").declare("patients", PrivacyBudget(3.0, 1e-5))
        assert "cannot be used" in reservation.unclosed
        [run] = ledger.data_set("patients").runs.values()  # it can be read
        assert run.leased == [1]
        assert run.counted == plan
        folder.chmod(0o700)
        ledger.verify()
        ledger.accountant("patients").record(plan)

    assert as_nobody(shut) == 0


def test_answers_in_a_folder_that_is_shut(folder: Path) -> None:
    by = aggregator("gnmax", noise_multiplier=2.0, queries=40)
    keys, votes = [bytes([n]) for n in range(40)], torch.full((40, 3), 9.0)

    def shut() -> None:
        with closing(AnswerBook(folder / "book", by)) as book:
            first = Desk(by, book, Randomness.secret()).ask(keys[:5], votes[:5])
            folder.chmod(0o500)
            with pytest.MonkeyPatch.context() as patch:
                patch.delattr(type(by), "choose")  # there is nothing to draw
                with pytest.raises(OSError, match="cannot be written"):
                    Desk(by, book, Randomness.secret()).ask(keys, votes)
            assert book.spent() == (5, 5)
        with pytest.raises(UserError, match=r"cannot be opened \(Permission denied\)"):
            AnswerBook(folder / "new", by)
        folder.chmod(0o700)
        with closing(AnswerBook(folder / "book", by)) as book:
            shown = Desk(by, book, Randomness.secret()).ask(keys, votes)
            assert shown[:5].tolist() == first.tolist()
            assert book.spent() == (40, 40)

    assert as_nobody(shut) == 0
