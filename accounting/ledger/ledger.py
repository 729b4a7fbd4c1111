"""The ledger: what each data set of a machine has paid, over all runs, users and processes."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from accounting.budget import PrivacyBudget
from accounting.errors import UserError
from accounting.events import NeighboringRelation, check_instance, check_path, check_relation, shown
from accounting.filter import RenyiFilter
from accounting.ledger.accountant import LedgerAccountant, data_set_of, sketches_by_name
from accounting.ledger.file import Chain, Entry, LedgerBroken, LedgerFile
from accounting.ledger.fingerprint import alike, key_path, read_key
from accounting.ledger.process import is_dead
from accounting.ledger.replay import DataSet, Mistake, replay

_LONGEST_NAME = 200


@dataclass(frozen=True)
class Verified:
    """A ledger that was verified.

    Attributes:
        rows: How many entries it has.
        head: The hash of the last one.
        head_row: The row of the head that was asked about; None if none was.
    """

    rows: int
    head: str
    head_row: int | None = None


def default_path() -> Path:
    """`$DPML_LEDGER`, or `dpml/ledger.sqlite` in the user's data folder."""
    given = os.environ.get("DPML_LEDGER")
    if given:
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "dpml" / "ledger.sqlite"


def check_name(name: object) -> str:
    """Return a data set's name in its one form (Unicode's NFC), or raise UserError if it cannot be one."""
    if isinstance(name, str):
        plain = unicodedata.normalize("NFC", name)
        if plain and plain == plain.strip() and plain.isprintable() and len(plain) <= _LONGEST_NAME:
            return plain
    raise UserError(
        f"A data set's name in the ledger must be 1 to {_LONGEST_NAME} printable characters, without space "
        f"at its ends. Got {shown(name)}."
    )


class Ledger:
    """A durable, append-only record of every plan and release that touched a data set.

    Guarantee: all releases ever made of one data set through `accountant`, by any number of processes at
    once, are (ε, δ)-differentially private with the data set's budget, if that was never changed after a
    release; a crash at any moment loses no release. Identity is the declared name: nothing finds data under
    two names but the fingerprint, which only warns.

    Args:
        path: The file, on a local disk; by default `default_path()`. It need not exist.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = default_path() if path is None else check_path(path, "ledger")
        self._file = LedgerFile(self.path)

    # ------------------------------------------------------------ budgets

    def declare(
        self,
        name: str,
        budget: PrivacyBudget,
        neighboring_relation: NeighboringRelation = "zero-out",
        *,
        group: bool = False,
    ) -> None:
        """Declare a data set and its budget.

        Args:
            name: What it is called.
            budget: For all that is ever released of it.
            neighboring_relation: Of all its runs.
            group: Let the file's group read and write a ledger that is made now; else its owner alone.

        Raises:
            UserError: if the name is taken or impossible.
        """
        name, relation = check_name(name), check_relation(neighboring_relation)
        check_instance(budget, PrivacyBudget, "budget", "declare")
        check_instance(group, bool, "group", "declare")
        self._file.create(group=group)
        with self._file.transaction(write=True) as chain:
            if name in self._replayed(chain.entries(), name):
                raise UserError(f"The ledger has {name!r} already; 'dpml ledger budget' changes its budget.")
            self._write_budget(chain, name, budget, relation)

    def change_budget(
        self,
        name: str,
        epsilon: float,
        delta: float | None = None,
        *,
        despite_releases: bool = False,
    ) -> DataSet:
        """Change a data set's budget: freely while nothing is spent or reserved, after that at a price.

        A budget is a guarantee because it was fixed before the first release. One that is raised because of
        what releases have shown is none (an odometer, Rogers et al. 2016). So that has to be asked for;
        `show` and all later statements say it. From then on the Rényi filter governs. δ and the relation are
        kept: the filter's thresholds follow from them.

        Args:
            name: The data set's.
            epsilon: The new ε.
            delta: The new δ; by default the old one.
            despite_releases: Change ε after a release, and lose the guarantee as described.

        Raises:
            UserError: if something was released and `despite_releases` was not given, δ would change then, or
                the new ε does not cover what was spent.
        """
        name = check_name(name)
        check_instance(despite_releases, bool, "despite_releases", "change_budget")
        with self._file.transaction(write=True) as chain:
            known = data_set_of(chain.entries(), self.path, name)
            budget = PrivacyBudget(epsilon, known.budget.delta if delta is None else delta)
            spent = known.accountant()._counts()
            if spent and not despite_releases:
                raise UserError(
                    f"Something of {name!r} was released or is reserved, and a budget that is changed after "
                    "looking at results is no guarantee any more; if that is meant, add --despite-releases, "
                    "and every later statement will say so."
                )
            if spent and budget.delta != known.budget.delta:
                raise UserError(f"δ of {name!r} is fixed since its first release: {known.budget.delta:g}.")
            if spent and not RenyiFilter(budget).admits(spent):
                least = RenyiFilter(budget).epsilon(spent)
                raise UserError(
                    f"ε = {epsilon:g} is less than what {name!r} has spent or reserved, by the Rényi filter: "
                    f"{least:.6g}."
                )
            self._write_budget(chain, name, budget, known.relation)
        return self.data_set(name)

    # ------------------------------------------------------------ runs

    def accountant(self, name: str) -> LedgerAccountant:
        """The accountant of a data set, for `accountant=` of the trainers.

        Raises:
            UserError: if there is no ledger or no such data set.
        """
        return LedgerAccountant(self._file, check_name(name))

    def close_run(self, run_id: str) -> str:
        """End a run whose process is gone: what it has leased is spent, the rest is given back.

        Returns:
            The name of its data set.

        Raises:
            UserError: if there is no such run, it is closed, or its process is alive.
        """
        with self._file.transaction(write=True) as chain:
            name = next((e.name for e in chain.entries() if e.run == run_id and e.kind == "reserve"), None)
            if name is None:
                raise UserError(f"The ledger has no run {shown(run_id)}; 'dpml ledger show' lists them.")
            run = data_set_of(chain.entries(), self.path, name).runs[run_id]
            if run.committed is not None:
                raise UserError(f"The run {run_id} is closed already.")
            if is_dead(run.process) is False:
                raise UserError(f"The run {run_id} is running: its process {run.process['pid']} is alive.")
            chain.append("close", name, run_id, committed=run.leased)
        return name

    # ------------------------------------------------------------ reading

    def entries(self) -> list[Entry]:
        """All entries, checked against the chain."""
        with self._file.transaction(write=False) as chain:
            return chain.entries()

    def names(self) -> list[str]:
        """The names of all data sets, in the order of their declaration."""
        return list(dict.fromkeys(entry.name for entry in self.entries() if entry.kind == "budget"))

    def data_set(self, name: str) -> DataSet:
        """What a data set has spent, and its runs."""
        return data_set_of(self.entries(), self.path, check_name(name))

    def look_alikes(self) -> dict[str, list[str]]:
        """Which data sets look like which, by their fingerprints; empty without the key.

        It is computed from private records without noise: for the eyes of whoever may see them.
        """
        if not os.access(key_path(self.path), os.R_OK):
            return {}
        sketches = sketches_by_name(self.entries(), self.path, read_key(self.path))
        return {name: found for name in sketches if (found := alike(name, sketches))}

    def verify(self, head: str | None = None) -> Verified:
        """Check every entry's hash, that the entries add up, and that each plan was within its budget.

        Args:
            head: A hash that a statement or `summary.json` carries: it must be on the chain. This alone
                notices a ledger that was replaced, cut or rolled back to before that run.

        Raises:
            LedgerBroken: naming the first row that is wrong.
        """
        entries = self.entries()
        self._replayed(entries, check=True)
        rows = {entry.hash: entry.seq for entry in entries}
        if head is not None and (not isinstance(head, str) or head not in rows):
            raise LedgerBroken(
                self.path, f"the head {shown(head)} is not on its chain: it was cut, rolled back or replaced"
            )
        return Verified(len(entries), entries[-1].hash, None if head is None else rows[head])

    def _replayed(
        self, entries: list[Entry], name: str | None = None, *, check: bool = False
    ) -> dict[str, DataSet]:
        try:
            return replay(entries, name, check=check)
        except Mistake as error:
            raise LedgerBroken(self.path, error.reason, error.row) from error

    @staticmethod
    def _write_budget(chain: Chain, name: str, budget: PrivacyBudget, relation: NeighboringRelation) -> None:
        chain.append("budget", name, epsilon=budget.epsilon, delta=budget.delta, relation=relation)
