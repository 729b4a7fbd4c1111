"""Answers, in an order that a crash cannot turn into a leak: commit, draw, persist, show.

A book is a small database beside the run. Before noise is drawn for a query, the book says, durably, that it
is about to be: from then on the query is paid for. After that the outcome is drawn, written down, and only
then shown. So whatever was shown is in the book and is replayed for ever, never drawn again; and what was
committed but not written down when a process died is forfeited: paid for, never drawn again, never shown.
Only a run with a known seed draws it again, with the same noise: it ends as if it had not died.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from accounting import Composed, Event, Repeated, Reservation, UserError
from dpml.pate.aggregation import Aggregator
from dpml.randomness import Randomness

REFUSED = -1
"""In place of a class: the teachers did not agree enough."""
FORFEITED = -2
"""In place of a class: a crash came between payment and answer."""
NOT_ASKED = -3
"""In place of a class: the plan's queries or answers were used up before."""

_CHECKING, _REFUSED, _PASSED, _ANSWERING, _ANSWERED = "checking", "refused", "passed", "answering", "answered"
_VERSION = 1
_BLOCK = 16
_MARK = 0x64706D6C  # "dpml", in the file's header


def query_keys(inputs: Tensor) -> list[bytes]:
    """What identifies each input: 16 bytes that follow from its numbers alone."""
    rows = np.ascontiguousarray(inputs.detach().cpu().numpy().reshape(len(inputs), -1)) + 0.0
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


class AnswerBook:
    """The durable record of which queries were paid for and how they were answered.

    Safe with several processes at once: payments are counted against the plan in the same transaction.

    Args:
        path: The database; made, readable by its owner alone, if it does not exist.
        aggregator: Whose answers these are.
        about: What else must be the same for answers to be replayed, such as the teachers' settings; as JSON.

    Raises:
        UserError: if the file holds something else, or answers of another aggregator.
    """

    def __init__(self, path: Path | str, aggregator: Aggregator, about: dict[str, Any] | None = None) -> None:
        self.path, self.aggregator = Path(path), aggregator
        title = json.dumps(
            {"schema_version": _VERSION, "aggregator": aggregator.to_dict(), "about": about or {}},
            sort_keys=True,
        )
        try:
            if str(path) != ":memory:":
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            self._base = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._base.execute("PRAGMA synchronous = EXTRA")
            with self._transaction():
                if self._is_foreign():
                    raise UserError(f"{str(path)!r} holds no answers; is it the right file?")
                self._base.execute(f"PRAGMA application_id = {_MARK}")
                self._base.execute("CREATE TABLE IF NOT EXISTS title (text TEXT NOT NULL)")
                self._base.execute(
                    "CREATE TABLE IF NOT EXISTS queries "
                    "(key BLOB PRIMARY KEY, state TEXT NOT NULL, class INTEGER) WITHOUT ROWID"
                )
                self._base.execute("CREATE TABLE IF NOT EXISTS releases (name TEXT PRIMARY KEY, value TEXT)")
                self._base.execute("SELECT key, state, class FROM queries LIMIT 1")  # are these our tables?
                self._base.execute("SELECT name, value FROM releases LIMIT 1")
                found = self._base.execute("SELECT text FROM title").fetchone()
                if found is None:
                    self._base.execute("INSERT INTO title VALUES (?)", (title,))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"The answers {str(path)!r} cannot be opened ({reason}).") from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise UserError(f"{str(path)!r} holds no answers ({error}); is it the right file?") from error
        if found is not None and found[0] != title:
            raise UserError(
                f"The answers in {str(path)!r} were given by another aggregator or other teachers: go on "
                "with the same settings, or start in a new folder."
            )

    # ------------------------------------------------------------ reading

    @staticmethod
    def read_title(path: Path | str) -> dict[str, Any]:
        """What a book says of itself: its aggregator's description and what else it is about.

        Raises:
            UserError: if the file is missing or no book.
        """
        if not Path(path).is_file():
            raise UserError(f"There are no answers {str(path)!r}.")
        try:
            base = sqlite3.connect(path, timeout=60)
            text = base.execute("SELECT text FROM title").fetchone()[0]
            base.close()
            title = json.loads(text)
            return {"aggregator": title["aggregator"], "about": title["about"]}
        except (sqlite3.DatabaseError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"{str(path)!r} holds no answers ({error}); is it the right file?") from error

    def states(self, keys: Sequence[bytes]) -> list[tuple[str, int | None] | None]:
        """For each key its state and class, or None if it was never asked."""
        find = "SELECT state, class FROM queries WHERE key = ?"
        return [self._base.execute(find, (key,)).fetchone() for key in keys]

    def outcomes(self, keys: Sequence[bytes]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """For each key whether it was asked, and whether it was answered: bool [m] both."""
        states = [None if state is None else state[0] for state in self.states(keys)]
        return np.array([s is not None for s in states]), np.array([s == _ANSWERED for s in states])

    def spent(self) -> tuple[int, int]:
        """How many queries and how many answers were paid for."""
        count = "SELECT COUNT(*), COUNT(CASE WHEN state IN (?, ?) THEN 1 END) FROM queries"
        queries, answers = self._base.execute(count, (_ANSWERING, _ANSWERED)).fetchone()
        return int(queries), int(answers)

    @property
    def committed_event(self) -> Event:
        """The event of what was paid for."""
        queries, answers = self.spent()
        by, check = self.aggregator, self.aggregator.check_event
        if by.answer_event is None or (queries, answers) == (by.queries, by.answers):
            return by.plan
        paid = Repeated(by.answer_event, answers)
        return paid if check is None else Composed([Repeated(check, queries), paid])

    # ------------------------------------------------------------ writing

    def commit_checks(self, keys: Sequence[bytes]) -> list[bytes]:
        """Pay for checks of those of `keys` that were never asked, as far as the plan goes; return those.

        Once no answer is left in the plan, no check is paid for either.
        """
        return self._commit(keys, None, _CHECKING)

    def persist_checks(self, keys: Sequence[bytes], passed: npt.NDArray[np.bool_]) -> None:
        """Write down how checks ended."""
        self._update(
            [(_PASSED if good else _REFUSED, None, key) for key, good in zip(keys, passed, strict=True)]
        )

    def commit_answers(self, keys: Sequence[bytes]) -> list[bytes]:
        """Pay for answers to those of `keys` that are due one, as far as the plan goes; return those."""
        return self._commit(keys, None if self.aggregator.check_event is None else _PASSED, _ANSWERING)

    def persist_answers(self, keys: Sequence[bytes], classes: npt.NDArray[np.int64]) -> None:
        """Write down answers."""
        self._update([(_ANSWERED, int(found), key) for key, found in zip(keys, classes, strict=True)])

    def release(self, name: str, draw: Callable[[], str], *, is_secret: bool = True) -> str | None:
        """Release one more thing, in the same order: commit, draw, persist. None if it is forfeited.

        What was released before under this name is returned again. What is not secret is never forfeited.
        """
        with self._transaction():
            found = self._base.execute("SELECT value FROM releases WHERE name = ?", (name,)).fetchone()
            if found is None:
                self._base.execute("INSERT INTO releases VALUES (?, NULL)", (name,))
        if found is not None and (is_secret or found[0] is not None):
            return None if found[0] is None else str(found[0])
        value = draw()
        with self._transaction():
            self._base.execute("UPDATE releases SET value = ? WHERE name = ?", (value, name))
        return value

    def has_paid(self, name: str) -> bool:
        """Whether the release of this name was committed, seen or not."""
        return self._base.execute("SELECT 1 FROM releases WHERE name = ?", (name,)).fetchone() is not None

    def close(self) -> None:
        """Close the database."""
        self._base.close()

    def _commit(self, keys: Sequence[bytes], before: str | None, after: str) -> list[bytes]:
        """Move those of `keys` whose state is `before` on to `after`, as many as the plan allows."""
        with self._transaction():
            queries, answers = self.spent()
            room = self.aggregator.answers - answers
            if after == _CHECKING:
                room = self.aggregator.queries - queries if room else 0
            distinct = list(dict.fromkeys(keys))
            states = zip(distinct, self.states(distinct), strict=True)
            admitted = [key for key, state in states if (state and state[0]) == before][: max(0, room)]
            self._base.executemany(
                "INSERT OR REPLACE INTO queries VALUES (?, ?, NULL)", [(key, after) for key in admitted]
            )
        return admitted

    def _update(self, rows: list[tuple[str, int | None, bytes]]) -> None:
        with self._transaction():
            self._base.executemany("UPDATE queries SET state = ?, class = ? WHERE key = ?", rows)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, on the disk when it ends, and no other process in between."""
        try:
            self._base.execute("BEGIN IMMEDIATE")
            yield
            self._base.execute("COMMIT")
        except sqlite3.OperationalError as error:  # a full disk, a locked file
            self._rollback()
            raise OSError(f"the answers {str(self.path)!r} cannot be written: {error}") from error
        except BaseException:
            self._rollback()
            raise

    def _is_foreign(self) -> bool:
        """Whether this is a database with content, but not ours."""
        mark = self._base.execute("PRAGMA application_id").fetchone()[0]
        content = self._base.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        return bool(content) and mark != _MARK

    def _rollback(self) -> None:
        if self._base.in_transaction:
            self._base.execute("ROLLBACK")


@dataclass(frozen=True, eq=False)
class Desk:
    """Takes queries and gives answers: the one way from votes to what anybody sees.

    Attributes:
        aggregator: The mechanism.
        book: Where payments and answers are kept.
        randomness: Where noise comes from.
        reservation: Of the aggregator's plan; None if another accountant has admitted the plan.
        block: Queries that are committed, drawn and persisted together. A crash forfeits one block at most.
        progress: Called after each block.
    """

    aggregator: Aggregator
    book: AnswerBook
    randomness: Randomness
    reservation: Reservation | None = None
    block: int = _BLOCK
    progress: Callable[[], None] | None = None

    def ask(
        self, keys: Sequence[bytes], votes: Tensor, predictions: Tensor | None = None
    ) -> npt.NDArray[np.int64]:
        """Answer queries: a class, or REFUSED, FORFEITED or NOT_ASKED, for each: int64 [m].

        What was answered before is replayed and costs nothing. Equal keys have one answer.

        Args:
            keys: What identifies each query: `query_keys`.
            votes: Counts [m, classes]. Private.
            predictions: Votes that a student predicts, [m, classes], for the interactive aggregator: its
                check is on the difference.
        """
        counts = votes.numpy().astype(np.float64)
        if len(counts) != len(keys) or (predictions is not None and predictions.shape != votes.shape):
            shape = None if predictions is None else tuple(predictions.shape)
            raise UserError(
                f"{len(keys)} queries need as many rows of votes, and as many predictions if there are some. "
                f"Got votes of shape {counts.shape} and predictions of shape {shape}."
            )
        checked = counts if predictions is None else counts - predictions.numpy().astype(np.float64)
        place: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            place.setdefault(key, row)  # the first of equal ones
        distinct = list(place)
        for start in range(0, len(distinct), self.block):
            block = distinct[start : start + self.block]
            if self.aggregator.check_event is not None:
                asked = self.book.commit_checks(block)
                self._commit(asked, self.aggregator.check_event)
                asked, random = self._draws(block, asked, _CHECKING)
                passed = self.aggregator.check(checked[[place[key] for key in asked]], random)
                self.book.persist_checks(asked, passed)
            due = self.book.commit_answers(block)
            self._commit(due, self.aggregator.answer_event)
            due, random = self._draws(block, due, _ANSWERING)
            classes = self.aggregator.choose(counts[[place[key] for key in due]], random)
            self.book.persist_answers(due, classes)
            if self.progress is not None:
                self.progress()
        return np.array([self._shown(state) for state in self.book.states(keys)], dtype=np.int64)

    def _draws(self, block: list[bytes], paid: list[bytes], state: str) -> tuple[list[bytes], Randomness]:
        """For which of a block noise is drawn, and where it comes from: for those just `paid` for.

        With a known seed it is the same noise for this block in every process, and so for those too that a
        process before this one had paid for and not written down.
        """
        if self.randomness.is_secret:
            return paid, self.randomness
        found = zip(block, self.book.states(block), strict=True)
        pending = [key for key, known in found if known is not None and known[0] == state]
        return pending, self.randomness.branch(state.encode() + block[0])

    def _commit(self, keys: list[bytes], event: Event | None) -> None:
        if keys and event is not None and self.reservation is not None:
            self.reservation.commit(len(keys), event)

    @staticmethod
    def _shown(state: tuple[str, int | None] | None) -> int:
        if state is None:
            return NOT_ASKED
        name, found = state
        if name == _ANSWERED and found is not None:
            return found
        return {_REFUSED: REFUSED, _PASSED: NOT_ASKED}.get(name, FORFEITED)


def commit_again(reservation: Reservation, book: AnswerBook) -> None:
    """Commit to a new reservation of the same plan what the book of an earlier process has paid for."""
    queries, answers = book.spent()
    if queries and book.aggregator.check_event is not None:
        reservation.commit(queries, book.aggregator.check_event)
    if answers and book.aggregator.answer_event is not None:
        reservation.commit(answers, book.aggregator.answer_event)
