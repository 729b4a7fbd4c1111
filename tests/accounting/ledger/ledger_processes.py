"""Processes that are killed, race, or meet a disk that is full: run by test_ledger_processes.py.

    python ledger_processes.py killed FOLDER      a ledger POINT.sqlite and a file of releases for each point
    python ledger_processes.py race FOLDER ROUNDS race.sqlite and each process's wins

Children are forked, so that one interpreter has to start. What a child releases it writes to a file beside
the ledger, after the commit, as a trainer shows a noisy sum.
"""

import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accounting import (
    BudgetExceeded,
    Gaussian,
    PoissonSampled,
    PrivacyBudget,
    Repeated,
    ReservationError,
    UserError,
)
from accounting.ledger import Ledger, LedgerReservation
from accounting.ledger.file import Chain, LedgerFile

BUDGET = PrivacyBudget(3.0, 1e-5)
STEP = PoissonSampled(Gaussian(1.1), 0.01)
PLAN = Repeated(STEP, 500)
STEPS = 40


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(kind: str, count: int, *, before: bool) -> None:
    """Arrange to be killed around the `count`-th append of a kind: before it, or in its transaction."""
    append, seen = Chain.append, [0]

    def dying(self: Chain, what: str, *args: Any, **payload: Any) -> Any:
        seen[0] += what == kind
        if what == kind and seen[0] == count and before:
            die()
        entry = append(self, what, *args, **payload)
        if what == kind and seen[0] == count:
            die()
        return entry

    Chain.append = dying  # type: ignore[method-assign]


def killed_after(count: int) -> None:
    """Arrange to be killed right after the `count`-th transaction that wrote has ended."""
    transaction, seen = LedgerFile.transaction, [0]

    class Dying:
        def __init__(self, file: LedgerFile, write: bool) -> None:
            self.inner, self.write = transaction(file, write=write), write

        def __enter__(self) -> Chain:
            return self.inner.__enter__()

        def __exit__(self, *error: Any) -> Any:
            done = self.inner.__exit__(*error)
            seen[0] += self.write
            if self.write and seen[0] == count:
                die()
            return done

    LedgerFile.transaction = lambda self, *, write: Dying(self, write)  # type: ignore


def train(ledger: Ledger, released: Path, at_draw: int | None = None) -> None:
    """Forty steps: commit, draw, show."""
    with ledger.accountant("patients").reserve(PLAN) as reservation:
        for step in range(STEPS):
            reservation.commit()
            if step == at_draw:
                die()
            with released.open("a") as file:
                file.write("x")


def small_disk(ledger: Ledger, released: Path) -> None:
    """A disk that is full after some steps: from then on there is no release."""
    limit = ledger.path.stat().st_size + 8192
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with ledger.accountant("patients").reserve(PLAN) as reservation:
        assert isinstance(reservation, LedgerReservation)
        reservation._paces = Slow()  # type: ignore[assignment]
        try:
            for _ in range(STEPS * 5):
                reservation.commit()
                with released.open("a") as file:
                    file.write("x")
        except OSError as error:
            assert "cannot be used" in str(error)  # noqa: PT017
        else:
            raise AssertionError("the disk was not full")
        try:
            reservation.commit(50)
        except (OSError, ReservationError):
            die()


class Slow(dict[Any, Any]):
    """Leases of one part each."""

    def setdefault(self, *_: Any) -> Any:
        return self

    def next(self, _: float) -> int:
        return 1


def read_only(ledger: Ledger, released: Path) -> None:
    ledger.path.chmod(0o444)
    if os.geteuid() == 0:
        os.setuid(65534)
    assert ledger.verify().rows == 2
    try:
        train(ledger, released)
    except OSError as error:
        assert "readonly" in str(error) or "unable to open" in str(error)  # noqa: PT017
        die()


def at(arrange: Callable[[], None] | None, draw: int | None = None) -> Callable[[Ledger, Path], None]:
    def run(ledger: Ledger, released: Path) -> None:
        if arrange is not None:
            arrange()
        train(ledger, released, draw)
        die()  # after the close

    return run


POINTS: dict[str, Callable[[Ledger, Path], None]] = {
    "before reserve": at(lambda: killed_at("reserve", 1, before=True)),
    "in reserve": at(lambda: killed_at("reserve", 1, before=False)),
    "after reserve": at(lambda: killed_after(1)),
    "before first lease": at(lambda: killed_at("lease", 1, before=True)),
    "in first lease": at(lambda: killed_at("lease", 1, before=False)),
    "after first lease": at(lambda: killed_after(2)),
    "in third lease": at(lambda: killed_at("lease", 3, before=False)),
    "after third lease": at(lambda: killed_after(4)),
    "at first draw": at(None, 0),
    "at draw": at(None, 23),
    "before close": at(lambda: killed_at("close", 1, before=True)),
    "in close": at(lambda: killed_at("close", 1, before=False)),
    "after close": at(None),
    "full disk": small_disk,
    "read-only": read_only,
}


def killed(folder: Path) -> None:
    folder.chmod(0o777)
    for name, run in POINTS.items():
        ledger = Ledger(folder / f"{name}.sqlite")
        ledger.declare("patients", BUDGET)
        child = os.fork()
        if not child:
            try:
                run(ledger, folder / f"{name}.released")
            finally:
                os._exit(7)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, (name, status)


def race(folder: Path, rounds: int) -> None:
    ledger = Ledger(folder / "race.sqlite")
    for number in range(rounds):
        ledger.declare(f"last {number}", BUDGET)
    ledger.declare("crumbs", BUDGET)
    plan = Repeated(STEP, 1_500)  # fits once
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)

    def racer(which: int) -> None:
        wins, crumbs, made = [], 0, 0
        for number in range(rounds):
            barrier.wait()
            try:
                Ledger(folder / f"new {number}" / "l").declare("new", BUDGET)
                made += 1
            except UserError as error:
                assert "already" in str(error)  # noqa: PT017
        for number in range(rounds):
            accountant = ledger.accountant(f"last {number}")
            barrier.wait()
            try:
                accountant.record(plan)
            except BudgetExceeded:
                continue
            wins.append(number)
        accountant = ledger.accountant("crumbs")
        barrier.wait()
        try:
            while True:
                accountant.record(Repeated(STEP, 500))
                crumbs += 1
        except BudgetExceeded:
            (folder / f"{which}.json").write_text(json.dumps({"wins": wins, "crumbs": crumbs, "made": made}))

    racers = [context.Process(target=racer, args=(which,)) for which in range(2)]
    for one in racers:
        one.start()
    for one in racers:
        one.join()


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        killed(Path(sys.argv[2]))
    else:
        race(Path(sys.argv[2]), int(sys.argv[3]))
