"""The ledger's file: entries that are only appended, chained by hashes, on the disk before a call returns.

One SQLite database. Every write is one transaction that no other process can interleave, with full
synchronisation. Triggers forbid changes as a guard against mistakes; the chain is the evidence against
intent: each entry's SHA-256 hash covers all its columns and the hash before it, so that whoever knows the
hash of any entry, as each run's statement does, knows whether the entries up to it are still the same.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accounting.errors import UserError
from accounting.ledger.process import host_name

SCHEMA_VERSION = 1
GENESIS = "0" * 64
"""What stands before the first entry."""
_MARK = 0x64706C67  # "dplg", in the file's header
_COLUMNS = ("seq", "time", "user", "host", "name", "run", "kind", "payload", "previous", "hash")
_SCHEMA = (
    f"PRAGMA application_id = {_MARK}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
    "CREATE TABLE entries (seq INTEGER PRIMARY KEY, time TEXT NOT NULL, user TEXT NOT NULL, "
    "host TEXT NOT NULL, name TEXT NOT NULL, run TEXT NOT NULL, kind TEXT NOT NULL, payload TEXT NOT NULL, "
    "previous TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE INDEX by_run ON entries (run, seq)",
    "CREATE TRIGGER no_update BEFORE UPDATE ON entries "
    "BEGIN SELECT RAISE(ABORT, 'entries are never changed'); END",
    "CREATE TRIGGER no_delete BEFORE DELETE ON entries "
    "BEGIN SELECT RAISE(ABORT, 'entries are never deleted'); END",
)


class LedgerBroken(UserError):
    """A ledger whose entries are not what was written, or do not add up.

    Attributes:
        row: The first entry that is wrong; None where it is the file or its end.
    """

    def __init__(self, path: Path, reason: str, row: int | None = None) -> None:
        self.row = row
        where = "" if row is None else f" at row {row}"
        super().__init__(
            f"The ledger {str(path)!r} is broken{where}: {reason}. Restore a copy that verifies."
        )


@dataclass(frozen=True)
class Entry:
    """One entry.

    Attributes:
        seq: Its number, from 1.
        time: When it was written by the machine's clock, in UTC. It orders nothing.
        user: Who wrote it.
        host: On which machine.
        name: The data set's name; empty for the first entry, which names the ledger.
        run: The run's id, or empty.
        kind: ledger, budget, reserve, lease, close, reopen or fingerprint.
        payload: What it says.
        hash: SHA-256 of all columns and the hash before.
    """

    seq: int
    time: str
    user: str
    host: str
    name: str
    run: str
    kind: str
    payload: Mapping[str, Any]
    hash: str


def canonical(value: object) -> str:
    """JSON in one form."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


class Chain:
    """The entries within a transaction. Made by `LedgerFile.transaction`."""

    def __init__(self, path: Path, base: sqlite3.Connection) -> None:
        self._path, self._base = path, base

    def entries(self, known: Sequence[Entry] = ()) -> list[Entry]:
        """All entries, checked against the chain.

        Args:
            known: What an earlier call found: if its last entry is still there, only later ones are read.

        Raises:
            LedgerBroken: naming the first that is wrong.
        """
        found = list(known) if known and self.holds(known[-1].seq, known[-1].hash) else []
        previous = found[-1].hash if found else GENESIS
        columns_of = f"SELECT {', '.join(_COLUMNS)} FROM entries WHERE seq > ? ORDER BY seq"  # noqa: S608
        rows = self._base.execute(columns_of, (len(found) or -(2**62),))
        for number, (*columns, digest) in enumerate(rows, start=len(found) + 1):
            if columns[0] != number:
                raise LedgerBroken(self._path, f"it is missing (next is {columns[0]})", number)
            if columns[-1] != previous or digest != _digest(columns) or len(digest) != len(GENESIS):
                raise LedgerBroken(self._path, "its hash does not fit its content", number)
            seq, time, user, host, name, run, kind, words, _ = columns
            try:
                payload = _payload(words)
            except (ValueError, RecursionError) as error:
                raise LedgerBroken(self._path, "its payload is none that a ledger writes", number) from error
            found.append(Entry(seq, time, user, host, name, run, kind, payload, digest))
            previous = digest
        if not found:
            raise LedgerBroken(self._path, "it is missing", 1)
        return found

    def last(self, run: str | None = None) -> tuple[int, str, str]:
        """Number, hash and kind of the last entry, of all or of a run; (0, `GENESIS`, "") if none."""
        which, values = ("", ()) if run is None else ("WHERE run = ? ", (run,))
        row = self._base.execute(
            f"SELECT seq, hash, kind FROM entries {which}ORDER BY seq DESC LIMIT 1",  # noqa: S608
            values,
        ).fetchone()
        return (0, GENESIS, "") if row is None else row

    def holds(self, seq: int, digest: str) -> bool:
        """Whether the entry of this number has this hash."""
        row = self._base.execute("SELECT hash FROM entries WHERE seq = ?", (seq,)).fetchone()
        return row is not None and row[0] == digest

    def append(self, kind: str, name: str = "", run: str = "", **payload: Any) -> Entry:
        """Append an entry. It is on the disk when the transaction has ended without an error."""
        seq, previous, _ = self.last()
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        user, host = _user(), host_name()
        columns = [seq + 1, now, user, host, name, run, kind, canonical(payload), previous]
        digest = _digest(columns)
        places = ", ".join("?" * len(_COLUMNS))
        self._base.execute(f"INSERT INTO entries VALUES ({places})", (*columns, digest))  # noqa: S608
        return Entry(seq + 1, now, user, host, name, run, kind, payload, digest)


class LedgerFile:
    """The database. It is opened for each transaction, so that threads and forks share nothing.

    Args:
        path: Of the file. It need not exist.
        patience: Seconds to wait for other processes.
    """

    def __init__(self, path: Path, patience: float = 60.0) -> None:
        self.path, self.patience = path, patience

    def create(self, *, group: bool = False) -> None:
        """Make the file, if there is none: its owner's alone, or readable and writable by its group too.

        Raises:
            UserError: if it cannot be made.
        """
        try:
            if not self.path.parent.exists():
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.path.parent.chmod(0o770 if group else 0o700)
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                return
            with os.fdopen(file, "wb"):
                os.fchmod(file, 0o660 if group else 0o600)
        except OSError as error:
            raise UserError(f"The ledger {str(self.path)!r} cannot be made ({error.strerror}).") from error

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[Chain]:
        """All or nothing; a write is on the disk when this ends, and no other process comes in between.

        Raises:
            UserError: if there is no ledger there.
            LedgerBroken: if it is no database.
            OSError: if it cannot be read or written: a full disk, a read-only file, another process that
                does not let go.
        """
        if not self.path.is_file():
            raise UserError(
                f"There is no ledger {str(self.path)!r}; 'dpml ledger init NAME --epsilon … --delta …' "
                "makes one."
            )
        try:
            where = f"{self.path.absolute().as_uri()}?mode=rw"
            connection = sqlite3.connect(where, timeout=self.patience, isolation_level=None, uri=True)
            with closing(connection) as base:
                base.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
                base.execute("PRAGMA synchronous = EXTRA")
                base.execute("PRAGMA fullfsync = ON")
                base.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                try:
                    self._check_schema(base, write)
                    yield Chain(self.path, base)
                    base.execute("COMMIT")
                except BaseException:
                    if base.in_transaction:
                        base.execute("ROLLBACK")
                    raise
        except sqlite3.OperationalError as error:
            raise OSError(f"the ledger {str(self.path)!r} cannot be used: {error}") from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise LedgerBroken(self.path, str(error)) from error

    def _check_schema(self, base: sqlite3.Connection, write: bool) -> None:
        """Make the tables in a new file; refuse a file of another kind or version, or with other triggers."""
        schema = base.execute("SELECT type, sql FROM sqlite_master").fetchall()
        if not schema:
            if not write:
                raise UserError(f"The ledger {str(self.path)!r} is empty; 'dpml ledger init' fills it.")
            for statement in _SCHEMA:
                base.execute(statement)
            Chain(self.path, base).append("ledger", id=os.urandom(16).hex(), schema_version=SCHEMA_VERSION)
            return
        mark, version = (
            base.execute(f"PRAGMA {what}").fetchone()[0] for what in ("application_id", "user_version")
        )
        if mark != _MARK:
            raise UserError(f"{str(self.path)!r} is no ledger; is it the right file?")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"The ledger {str(self.path)!r} has schema version {version}, not {SCHEMA_VERSION}; use the "
                "version of dpml that wrote it."
            )
        if any(kind in ("trigger", "view") and made not in _SCHEMA for kind, made in schema):
            raise LedgerBroken(self.path, "it has triggers or views that no ledger has")


def _payload(words: str) -> Any:
    """What an entry says. Raises ValueError or RecursionError unless it is JSON in the one form."""
    payload = json.loads(words)
    if canonical(payload) != words:
        raise ValueError("it is in another form")
    return payload


def _digest(columns: list[Any]) -> str:
    """SHA-256 of an entry's columns, the hash before it included."""
    try:
        return hashlib.sha256(canonical(columns).encode()).hexdigest()
    except (TypeError, ValueError):  # no text or number that we ever write
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a number without a name, as in containers
        return str(os.getuid())
