"""Fuzz targets: the ledger's Python API, its commands, and its file, damaged or forged."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from fuzzing import REFUSALS, Draw, kept_folder, target
from targets_accounting import valid_epsilon
from targets_command import call, mutated, own_file
from targets_files import write_mutated

from accounting import Gaussian, PoissonSampled, PrivacyBudget, Repeated
from accounting.ledger import Ledger, LedgerAccountant, check_name, default_path
from accounting.ledger.file import GENESIS, canonical
from accounting.ledger.process import this_process

_BUDGET = PrivacyBudget(3.0, 1e-5)
_PLAN = Repeated(PoissonSampled(Gaussian(1.1), 0.01), 100)
_RECORDS = [bytes([number]) for number in range(32)]
_FILE = "ledger.sqlite"
_COLUMNS = ["seq", "time", "user", "host", "name", "run", "kind", "payload", "previous", "hash"]


@functools.cache
def _whole() -> Path:
    """A ledger of two data sets, whose runs are closed, running and dead. Copied before it is changed."""
    folder = kept_folder()
    ledger = Ledger(folder / _FILE)
    for name in ("a", "b"):
        ledger.declare(name, _BUDGET)
        ledger.accountant(name).look_alikes(_RECORDS)
    ledger.declare("free", _BUDGET)
    with ledger.accountant("a").reserve(_PLAN) as reservation:
        reservation.commit(2)
    ledger.accountant("a").reserve(_PLAN).commit(1)  # is never closed: it runs
    gone = {**this_process(), "started": 1}
    with mock.patch("accounting.ledger.accountant.this_process", return_value=gone):
        ledger.accountant("a").reserve(_PLAN).commit(1)
    ledger.accountant("b").record(Gaussian(20.0))
    return folder


@functools.cache
def _entries() -> Any:
    return Ledger(_whole() / _FILE).entries()


@functools.cache
def _run(status: str) -> str:
    runs = Ledger(_whole() / _FILE).data_set("a").runs.values()
    return next(run.run_id for run in runs if run.status == status)


def _copied(draw: Draw) -> Path:
    """A copy, where a case's command looks for the ledger."""
    shutil.copytree(_whole(), draw.folder, dirs_exist_ok=True)
    return draw.folder / _FILE


def _released(ledger: Ledger) -> dict[str, int]:
    """How many parts each run may have released."""
    runs = (run for name in ledger.names() for run in ledger.data_set(name).runs.values())
    return {run.run_id: sum(run.leased if run.committed is None else run.committed) for run in runs}


@contextmanager
def _nothing_forgotten(path: Path) -> Iterator[Ledger]:
    """Whatever is done inside to a whole ledger, it stays whole, and no release leaves it."""
    ledger = Ledger(path)
    before = _released(ledger)
    try:
        yield ledger
    finally:
        assert ledger.verify(_entries()[-1].hash).head_row == len(_entries())
        after = _released(ledger)
        assert all(after[run] >= parts for run, parts in before.items())


# ---------------------------------------------------------------- Python


@target("ledger: Python API", 4)
def _api(draw: Draw) -> None:
    with _nothing_forgotten(_copied(draw)) as ledger:
        name = draw.maybe("a", 0.3)
        calls: list[Callable[[], Any]] = [
            lambda: Ledger(draw.junk()).declare("a", _BUDGET),
            lambda: Ledger(draw.junk()).names(),
            lambda: ledger.declare(
                draw.maybe("new"),
                draw.maybe(_BUDGET, 0.3),
                draw.maybe("zero-out", 0.3),
                group=draw.maybe(False, 0.3),
            ),
            lambda: ledger.change_budget(
                draw.maybe("free", 0.2),
                draw.maybe(4.0),
                draw.maybe(None),
                despite_releases=draw.maybe(False, 0.3),
            ),
            lambda: ledger.change_budget(
                name, draw.maybe(4.0), draw.maybe(None, 0.2), despite_releases=draw.maybe(True, 0.3)
            ),
            lambda: ledger.close_run(draw.maybe(_run(draw.choice(["closed", "running", "dead"])))),
            lambda: [valid_epsilon(spent) for spent in ledger.data_set(name).spent()],
            lambda: ledger.verify(draw.junk()),
            lambda: check_name(draw.junk()),
            lambda: default_path(),
        ]
        if draw.random() < 0.5:
            _use(draw, ledger.accountant(name))
        else:
            draw.choice(calls)()


def _use(draw: Draw, accountant: LedgerAccountant) -> None:
    """What the ledger's accountant does beside any other: plans that last."""
    plan = draw.maybe(_PLAN, 0.3)
    match draw.randrange(4):
        case 0:
            with accountant.reserve(plan) as reservation:
                reservation.commit(draw.maybe(2), draw.maybe(None, 0.3))
            assert reservation.receipt.spent <= _BUDGET.epsilon
            assert sum(accountant.data_set.runs[reservation.run_id].committed or []) == reservation.committed
        case 1:
            run = draw.maybe(_run(draw.choice(["closed", "running", "dead"])), 0.3)
            with accountant.reopen(run, plan) as reservation:
                reservation.commit(draw.maybe(2))
        case 2:
            assert accountant.look_alikes(draw.maybe(_RECORDS, 0.8)) in ([], ["b"])
        case _:
            valid_epsilon(accountant.epsilon(draw.maybe(1e-5)))
            assert accountant.remaining(draw.maybe(_PLAN)) < 10**6


# ---------------------------------------------------------------- commands

_BUDGET_WORDS: dict[str, str | None] = {"--epsilon": "3", "--delta": "1e-5"}
_FLAGS: dict[str, dict[str, str | None]] = {
    "ledger init": _BUDGET_WORDS,
    "ledger budget": {"--epsilon": "4"},
    "ledger close": {},
    "ledger verify": {},
    "ledger export": {},
    "ledger show": {"--json": None},
}


@target("ledger: commands", 4)
def _commands(draw: Draw) -> None:
    with _nothing_forgotten(_copied(draw)):
        name = draw.choice(sorted(_FLAGS))
        words = mutated(draw, name, _FLAGS[name]) if draw.random() < 0.8 else [*name.split()]
        if name not in ("ledger verify", "ledger export"):
            good = _run(draw.choice(["closed", "dead"])) if name == "ledger close" else "a"
            good = "new" if name == "ledger init" else draw.choice([good, "free"])
            words.append(good if draw.random() < 0.7 else draw.text())
        status, out = call(words)
        if status == 0 and out.startswith("[") and "--csv" not in words:
            assert isinstance(json.loads(out, parse_constant=_no_number), list)


def _no_number(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


@target("ledger: a run, paid", 1)
def _paid(draw: Draw) -> None:
    """A run that its data set's budget pays for begins, or is refused; there is no third thing."""
    with _nothing_forgotten(_copied(draw)):
        good = {"--dataset": own_file(), "--ledger": "a", "--delta": "1e-5"}
        good |= {"--noise-multiplier": "9", "--batch-size": "8", "--epochs": "2", "--output": "run"}
        call(mutated(draw, "train dpsgd", good))


# ---------------------------------------------------------------- its file


@contextmanager
def _judged(path: Path) -> Iterator[None]:
    """What was changed is noticed, or is nothing: with its head, a ledger that passes is the whole one.

    Without, it is a beginning of it.
    """
    _passes_whole(path, _entries()[-1].hash)
    _passes_whole(path, None)
    try:
        yield
    finally:
        _passes_whole(path, _entries()[-1].hash)


def _passes_whole(path: Path, head: str | None) -> None:
    ledger = Ledger(path)
    with contextlib.suppress(*REFUSALS, OSError):
        ledger.verify(head)
        found = ledger.entries()
        if head is not None:
            assert len(found) >= len(_entries())
        assert found[: len(_entries())] == _entries()[: len(found)]


def _asked(draw: Draw) -> None:
    """Do something with a ledger."""
    close = ["ledger", "close", _run("dead")]
    train = "train dpsgd --noise-multiplier 9 --batch-size 8 --epochs 2 --delta 1e-5 --output run --dataset"
    lines = [
        *("ledger show", "ledger show --json", "ledger show a", "ledger verify", "ledger export --csv"),
        *("ledger export", "ledger init new --epsilon 1 --delta 1e-5", "ledger budget free --epsilon 2"),
        *("ledger budget a --epsilon 9 --despite-releases", " ".join(close)),
        f"{train} {own_file()} --ledger a",
    ]
    _, out = call(draw.choice(lines).split())
    if out.startswith("["):
        json.loads(out, parse_constant=_no_number)


@target("file: a ledger, bytes", 5)
def _bytes(draw: Draw) -> None:
    path = _copied(draw)
    write_mutated(draw, draw.choice([path, path, path, path.with_name(f"{_FILE}.key")]))
    with _judged(path):
        _asked(draw)


_CHANGES = [
    *("DELETE FROM entries WHERE seq = 4", "DELETE FROM entries WHERE seq > 7", "DELETE FROM entries"),
    *("DROP TABLE entries", "DROP INDEX by_run", "ALTER TABLE entries RENAME COLUMN payload TO words"),
    *("ALTER TABLE entries DROP COLUMN host", "ALTER TABLE entries ADD COLUMN odd", "CREATE TABLE odd (x)"),
    *("PRAGMA user_version = 2", "PRAGMA application_id = 1", "PRAGMA journal_mode = WAL"),
    "UPDATE entries SET seq = seq + 100 WHERE seq > 5",
    "INSERT INTO entries SELECT seq + 100, time, user, host, name, run, kind, payload, previous, hash "
    "FROM entries WHERE seq = 5",
    "ALTER TABLE entries RENAME TO others; CREATE VIEW entries AS SELECT * FROM others",
    "ALTER TABLE entries RENAME TO others; CREATE VIEW entries AS SELECT * FROM others WHERE seq < 8",
    "CREATE TABLE loose AS SELECT * FROM entries; DROP TABLE entries; ALTER TABLE loose RENAME TO entries",
    "CREATE TRIGGER odd BEFORE INSERT ON entries BEGIN SELECT RAISE(IGNORE); END",
    "CREATE TRIGGER odd AFTER INSERT ON entries BEGIN DELETE FROM entries WHERE seq > 8; END",
]


@target("file: a ledger, edited", 4)
def _edited(draw: Draw) -> None:
    """Rows and schema are changed by SQL; the chain is not made good."""
    path = _copied(draw)
    with contextlib.closing(sqlite3.connect(path)) as base:
        base.executescript("DROP TRIGGER no_update; DROP TRIGGER no_delete")
        if draw.random() < 0.5:
            base.executescript(draw.choice(_CHANGES))
        else:
            column, row = draw.choice(_COLUMNS), draw.randrange(1, len(_entries()) + 1)
            with contextlib.suppress(sqlite3.Error, OverflowError, ValueError):
                value = draw.choice([draw.text(), draw.number(), b"\xff", None])
                base.execute(f"UPDATE entries SET {column} = ? WHERE seq = ?", (value, row))  # noqa: S608
        base.commit()
    with _judged(path):
        _asked(draw)


@target("file: a ledger, forged", 5)
def _forged(draw: Draw) -> None:
    """Entries are changed, and all hashes made anew: what adds up is within its budget, the rest refused."""
    path = _copied(draw)
    with contextlib.closing(sqlite3.connect(path)) as base:
        rows = [list(row) for row in base.execute(f"SELECT {', '.join(_COLUMNS)} FROM entries")]  # noqa: S608
        base.executescript("DROP TRIGGER no_update; DROP TRIGGER no_delete; DELETE FROM entries")
        for _ in range(draw.choice([1, 1, 1, 2])):
            _falsify(draw, rows)
        previous = GENESIS
        for number, row in enumerate(rows, start=1):
            row[0], row[-2] = number, previous
            previous = row[-1] = hashlib.sha256(canonical(row[:-1]).encode()).hexdigest()
            base.execute(f"INSERT INTO entries VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608
        base.commit()
    ledger = Ledger(path)
    try:
        ledger.verify()
    except REFUSALS:
        pass
    else:
        for name in ledger.names():
            found = ledger.data_set(name)
            spent, reserved = found.spent()
            assert 0 <= spent <= reserved * (1 + 1e-9)
            largest = max(found.budget.epsilon, found.ceiling or 0)
            assert reserved <= largest * (1 + 1e-5)
    _asked(draw)


def _falsify(draw: Draw, rows: list[list[Any]]) -> None:
    """Change an entry, leave it out, or put it elsewhere."""
    at = draw.randrange(len(rows))
    row = rows[at]
    match draw.randrange(8):
        case 0:
            del rows[at]
        case 1:
            rows.insert(draw.randrange(len(rows)), list(row))
        case 2:
            row[draw.choice([1, 2, 3, 4, 5, 6])] = draw.text().encode("ascii", "ignore").decode()
        case 3:
            row[7] = draw.choice(["{}", "null", "[]", "", "NaN", "[" * 5000, '{"a": NaN}', "1" * 5000])
        case _:
            row[7] = json.dumps(draw.mutated_json(json.loads(row[7])))
