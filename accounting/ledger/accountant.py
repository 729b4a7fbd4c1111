"""An accountant whose memory is the ledger: reservations are transactions, commits are leased blocks."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accounting.accountant import PrivacyAccountant, Reservation
from accounting.budget import BudgetExceeded, Receipt, ReservationError
from accounting.errors import UserError
from accounting.events import Event
from accounting.ledger.file import Chain, Entry, LedgerBroken, LedgerFile
from accounting.ledger.fingerprint import Sketch, alike, read_key, seal, sketch, unseal
from accounting.ledger.process import is_dead, this_process
from accounting.ledger.replay import DataSet, Mistake, replay

LEASE_SECONDS = 3.0
"""How long a leased block of commits lasts, about: a crash forfeits one block."""
_GROWTH = 8  # of a block over the one before, while the speed is not known well
_LEASE_SHARE = 0.01  # of the run's time so far, once that is longer: few entries for long runs


def data_set_of(entries: Sequence[Entry], path: Path, name: str) -> DataSet:
    """A data set as the entries have it.

    Raises:
        UserError: if it was never declared.
        LedgerBroken: if the entries do not add up.
    """
    try:
        sets = replay(entries, name)
    except Mistake as error:
        raise LedgerBroken(path, error.reason, error.row) from error
    if name not in sets:
        known = ", ".join(dict.fromkeys(e.name for e in entries if e.kind == "budget")) or "none so far"
        raise UserError(
            f"The ledger {str(path)!r} has no data set {name!r} (it has: {known:.200}); "
            "'dpml ledger init NAME' declares one."
        )
    return sets[name]


def sketches_by_name(entries: Iterable[Entry], path: Path, key: bytes) -> dict[str, list[Sketch]]:
    """All fingerprints, of each data set.

    Raises:
        LedgerBroken: if one cannot be opened.
    """
    found: dict[str, list[Sketch]] = {}
    for entry in entries:
        if entry.kind == "fingerprint":
            try:
                found.setdefault(entry.name, []).append(unseal(entry.payload["sketch"], key))
            except (KeyError, TypeError, ValueError) as error:
                raise LedgerBroken(path, "it holds no fingerprint", entry.seq) from error
    return found


class LedgerAccountant(PrivacyAccountant):
    """An accountant for one data set of a ledger. Made by `Ledger.accountant`.

    `reserve` admits a plan or refuses it, beside all that any run of any process and user has reserved; a
    transaction records it. What `fits`, `remaining`, `epsilon` and the others say is as of the last look: of
    `refresh`, `reserve` or a reservation's `close`.

    Attributes:
        name: The data set's.
        data_set: The state of the last look.
    """

    def __init__(self, file: LedgerFile, name: str) -> None:
        self.file, self.name = file, name
        with file.transaction(write=False) as chain:
            self._entries = chain.entries()
        self.data_set = data_set_of(self._entries, file.path, name)
        super().__init__(budget=self.data_set.budget, neighboring_relation=self.data_set.relation)
        self._look(self.data_set)

    def refresh(self) -> None:
        """Look at the ledger again."""
        with self.file.transaction(write=False) as chain:
            self._read(chain)

    def reserve(self, event: Event) -> LedgerReservation:
        """Admit the whole of `event` and record that, in one transaction; as `PrivacyAccountant.reserve`.

        Raises:
            BudgetExceeded: if it does not fit beside what all runs have reserved; nothing is recorded then.
            OSError: if the ledger cannot be written; nothing is reserved then.
        """
        run_id = secrets.token_hex(6)

        def admitted() -> dict[str, Any]:
            PrivacyAccountant.reserve(self, event)  # in memory; raises if it does not fit
            return {"plan": event.to_dict(), "rule": self._rule, "process": this_process()}

        return LedgerReservation(self, event, self._record("reserve", run_id, admitted))

    def reopen(self, run_id: str, event: Event) -> LedgerReservation:
        """Go on with a run that was closed, or whose process is dead, under its plan.

        The caller must first commit again what earlier processes have released, by a record of its own that
        is written before each release: `dpml.pate.answers` is one.

        Raises:
            UserError: if there is no such run, it has another plan, or another process may still hold it.
            BudgetExceeded: if what it had given back was taken by other runs.
        """
        leased: list[int] = []

        def admitted() -> dict[str, Any]:
            run = self.data_set.runs.get(run_id)
            if run is None:
                raise UserError(f"The ledger has no run {run_id!r} of {self.name!r} to go on with.")
            if run.plan != event:
                raise UserError(f"The run {run_id!r} was reserved with another plan: keep its settings.")
            if run.committed is None and is_dead(run.process) is not True:
                raise UserError(
                    f"The run {run_id!r} may still be running (process {run.process.get('pid')} on "
                    f"{run.process.get('host')}); if it is not, 'dpml ledger close {run_id}'."
                )
            leased[:] = run.leased if run.committed is None else run.committed
            if run.counted != run.plan:  # it must be admitted again, beside what the others are charged with
                rest = [other.counted for other in self.data_set.runs.values() if other is not run]
                self._restore(rest, self._rule)
                if not self._total:
                    self._rule = "none"
                PrivacyAccountant.reserve(self, event)
            return {"rule": self._rule, "process": this_process()}

        return LedgerReservation(self, event, self._record("reopen", run_id, admitted), leased)

    def look_alikes(self, records: Iterable[bytes]) -> list[str]:
        """Remember what the data looks like, and name other data sets of the ledger that look like it.

        See `accounting.ledger.fingerprint`. It is computed from private records without noise: for the eyes
        of whoever may see them, and for no file but the ledger, where it is sealed.
        """
        key = read_key(self.file.path)
        mine = sketch(records, key)
        with self.file.transaction(write=True) as chain:
            sketches = sketches_by_name(chain.entries(), self.file.path, key)
            known = sketches.get(self.name, [])
            if not any(np.array_equal(mine, other) for other in known):
                chain.append("fingerprint", self.name, sketch=seal(mine, key))
        return alike(self.name, {**sketches, self.name: [mine]})

    def _record(self, kind: str, run_id: str, decide: Callable[[], dict[str, Any]]) -> Entry:
        """Append what `decide` says of the present state, which the same transaction finds unchanged.

        To decide may take a while, so nobody is kept waiting meanwhile; if another run came first, it is
        decided again.
        """
        while True:
            self.refresh()
            version, payload = self.data_set.version, decide()
            with self.file.transaction(write=True) as chain:
                self._read(chain)
                if self.data_set.version == version:
                    entry = chain.append(kind, self.name, run_id, **payload)
                    self._read(chain)
                    return entry

    def _read(self, chain: Chain) -> None:
        self._entries = chain.entries(self._entries)
        self._look(data_set_of(self._entries, self.file.path, self.name))

    def _look(self, data_set: DataSet) -> None:
        state = data_set.accountant()
        self.data_set, self.budget, self._filter = data_set, state.budget, state._filter
        self.neighboring_relation = state.neighboring_relation
        self._events, self._total, self._rule = state._events, state._total, state._rule

    def _refusal(self, event: Event) -> BudgetExceeded:
        error = super()._refusal(event)
        dead = [
            run_id
            for run_id, run in self.data_set.runs.items()
            if run.status == "dead" and (self._rule == "Rényi filter" or not any(run.leased))
        ]
        hint = f" 'dpml ledger close {dead[0]}' gives back what a dead run has not used." if dead else ""
        error.args = (f"Ledger, {self.name!r}: {error}{hint}",)
        return error


@dataclass
class _Pace:
    """The size of leased blocks of one kind, such that one lasts about as long as it should."""

    began: float
    since: float
    block: int = 0

    def next(self, now: float) -> int:
        """The next block's size."""
        lasted = max(now - self.since, 1e-9)
        wanted = max(LEASE_SECONDS, _LEASE_SHARE * (now - self.began))
        self.block = max(1, min(_GROWTH * self.block, int(self.block * wanted / lasted)))
        self.since = now
        return self.block


class LedgerReservation(Reservation):
    """A plan that the ledger holds.

    Commits are leased from it in blocks, each of which is on the disk before the first commit of it returns.
    A crash forfeits what was leased and not used. A reservation belongs to the process that made it.

    Attributes:
        unclosed: Why the run could not be closed in the ledger, where it then counts in full; else empty.
    """

    unclosed = ""

    def __init__(
        self,
        accountant: LedgerAccountant,
        plan: Event,
        entry: Entry,
        leased: Sequence[int] | None = None,
    ) -> None:
        super().__init__(accountant, plan, position=-1)  # its place is in the ledger
        self._ledger = accountant
        self._last = entry
        self._lost = False
        self._floor = list(leased or [0] * len(self._planned))
        self._leased = dict(zip(self._planned, self._floor, strict=True))
        self._paces: dict[Event, _Pace] = {}
        self._pid = os.getpid()

    @property
    def run_id(self) -> str:
        """The run's id in the ledger."""
        return self._last.run

    @property
    def receipt(self) -> Receipt:
        """What the ledger says of this run, as of its last entry."""
        data_set = self._ledger.data_set
        return Receipt(
            name=self._ledger.name,
            run_id=self.run_id,
            head=self._last.hash,
            rows=self._last.seq,
            budget=data_set.budget,
            spent=data_set.spent()[1],
            rule=data_set.rule,
            caveat=data_set.caveat,
        )

    def close(self) -> None:
        """End the reservation and record what was committed.

        Where the ledger cannot be written any more, the run stays open in it, and counts in full: nothing is
        lost but what could have been given back.
        """
        if not self._open or os.getpid() != self._pid:
            return
        self._open = False
        done = [max(pair) for pair in zip(self._committed.values(), self._floor, strict=True)]
        file = self._ledger.file
        try:
            with file.transaction(write=True) as chain:
                self._require_ours(chain)
                entry = chain.append("close", self._ledger.name, self.run_id, committed=done)
                self._ledger._read(chain)
        except (OSError, UserError) as error:
            self.unclosed = f"The run {self.run_id} stays open in the ledger, and counts in full: {error}"
            return
        self._last = entry

    def _secure(self, kind: Event, total: int) -> None:
        if os.getpid() != self._pid:
            raise ReservationError("The reservation belongs to another process; reserve in this one.")
        if self._lost:
            raise ReservationError("The ledger could not be written before; reserve a new plan.")
        if total <= self._leased[kind]:
            return
        now = time.monotonic()
        pace = self._paces.setdefault(kind, _Pace(now, now))
        block = max(pace.next(now), total - self._leased[kind])
        pace.block = block
        leased = {**self._leased, kind: min(self._leased[kind] + block, self._planned[kind])}
        try:
            with self._ledger.file.transaction(write=True) as chain:
                self._require_ours(chain)
                entry = chain.append("lease", self._ledger.name, self.run_id, leased=list(leased.values()))
        except BaseException:
            self._lost = True  # whether it was recorded is not known
            raise
        self._leased, self._last = leased, entry

    def _require_ours(self, chain: Chain) -> None:
        """Raise unless all that this reservation wrote is there, and nobody else has ended the run."""
        if not chain.holds(self._last.seq, self._last.hash):
            raise LedgerBroken(self._ledger.file.path, f"entries of the run {self.run_id} are gone")
        seq, _, kind = chain.last(self.run_id)
        if seq > self._last.seq and kind != "lease":
            raise ReservationError(
                f"The run {self.run_id} was ended from elsewhere: by 'dpml ledger close', or resumed."
            )
