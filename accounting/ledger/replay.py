"""What the entries of a ledger add up to: each data set's budget, its runs, and what they have spent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from accounting.accountant import PrivacyAccountant, Rule, kinds, part_of
from accounting.budget import PrivacyBudget
from accounting.events import Event, NeighboringRelation, check_relation
from accounting.filter import RenyiFilter
from accounting.ledger.file import Entry
from accounting.ledger.process import is_dead

_ROUNDING = 1e-6
"""By how much, relatively, another machine's arithmetic may judge a plan differently."""


@dataclass
class Run:
    """A plan that was reserved, and how far it got.

    Attributes:
        run_id: Its name in the ledger.
        entry: Its reservation.
        rule: The rule that admitted it.
        process: Who holds it: `accounting.ledger.process.this_process`.
        leased: Parts of each kind of the plan that may have been released.
        floor: Parts of each kind that an earlier process may have released.
        committed: Parts that were released, once the run is closed; None while it is open.
    """

    run_id: str
    entry: Entry
    rule: Rule
    process: Mapping[str, Any]
    leased: list[int] = field(default_factory=list)
    floor: list[int] = field(default_factory=list)
    committed: list[int] | None = None

    @cached_property
    def plan(self) -> Event:
        """What was reserved.

        Raises:
            UserError: if it holds an event of a type that is not known here.
        """
        return Event.from_dict(self.entry.payload["plan"])

    @cached_property
    def planned(self) -> list[int]:
        """Parts of each kind of the plan."""
        return list(kinds(self.plan).values())

    @property
    def released(self) -> Event:
        """What may have been released: what was committed by a run that is closed, else what was leased."""
        return part_of(self.plan, self.leased if self.committed is None else self.committed)

    @property
    def counted(self) -> Event:
        """What the budget is charged with: of an open run the whole plan, and of one plan by PLD as well."""
        kept = self.rule == "one plan by PLD" and self.committed is not None and any(self.committed)
        return self.plan if self.committed is None or kept else self.released

    @property
    def status(self) -> str:
        """closed, running, dead (open, and its process is gone) or open (no telling)."""
        if self.committed is not None:
            return "closed"
        return {True: "dead", False: "running", None: "open"}[is_dead(self.process)]


@dataclass
class DataSet:
    """A declared name, its budget and its runs.

    Attributes:
        name: As declared.
        budget: In force.
        relation: Of all its runs.
        runs: By id, in the order of their reservations.
        rule: Which rule governs the budget.
        ceiling: The largest ε that was in force, if the budget was changed after a release.
        version: The last entry that changed what the budget is charged with.
    """

    name: str
    budget: PrivacyBudget
    relation: NeighboringRelation
    runs: dict[str, Run] = field(default_factory=dict)
    rule: Rule = "none"
    ceiling: float | None = None
    version: int = 0

    @property
    def caveat(self) -> str:
        """What a budget that was changed after a release means for the guarantee; empty if it was not."""
        if self.ceiling is None:
            return ""
        return (
            f"The budget was changed after a release: the guarantee is that of the largest one, ε = "
            f"{self.ceiling:g}, and only if no larger one would have been chosen, whatever the results; else "
            "it is an odometer reading."
        )

    def accountant(self, *, released: bool = False) -> PrivacyAccountant:
        """An accountant in the state that the runs have left: of what they are charged with, or released."""
        accountant = PrivacyAccountant(budget=self.budget, neighboring_relation=self.relation)
        runs = self.runs.values()
        events = [run.released if released and run.rule != "one plan by PLD" else run.counted for run in runs]
        accountant._restore(events, self.rule)
        return accountant

    def spent(self) -> tuple[float, float]:
        """ε of what may have been released, and of that and all open plans; at δ, by the rule in force.

        Under the filter this is the least ε of a budget that would have admitted it.
        """
        return self._epsilon(released=True), self._epsilon(released=False)

    def epsilon_fixed_in_advance(self) -> float:
        """ε of all that the budget is charged with, if all of it had been planned in advance."""
        accountant = self.accountant()
        return accountant._judged(accountant._counts(), self.budget.delta)

    def _epsilon(self, *, released: bool) -> float:
        accountant = self.accountant(released=released)
        if not accountant._counts():
            return 0.0
        if self.rule == "one plan by PLD":
            return self.epsilon_fixed_in_advance()
        return RenyiFilter(self.budget).epsilon(accountant._counts())

    def require_admissible(self, event: Event, rule: Rule) -> None:
        """Raise ValueError unless `rule` admits `event` now, up to rounding."""
        accountant = self.accountant()
        accountant._filter = _relaxed(self.budget)
        accountant.budget = accountant._filter.budget
        first = not accountant._counts()
        if accountant._admit(event) not in ({rule, "Rényi filter"} if first else {"Rényi filter"}):
            raise ValueError("its plan does not fit the budget")


def _relaxed(budget: PrivacyBudget) -> RenyiFilter:
    return RenyiFilter(PrivacyBudget(budget.epsilon * (1 + _ROUNDING), budget.delta))


def replay(entries: Iterable[Entry], name: str | None = None, *, check: bool = False) -> dict[str, DataSet]:
    """The data sets by name, of all entries or of those about one.

    Args:
        entries: In order.
        name: Only this data set.
        check: Also judge again whether each reservation was within its budget.

    Raises:
        Mistake: naming the first entry that does not follow from those before it.
    """
    sets: dict[str, DataSet] = {}
    for entry in entries:
        spends_nothing = entry.kind in ("ledger", "fingerprint")
        if spends_nothing or (name is not None and entry.name != name):
            continue
        try:
            _ENTRIES[entry.kind](sets, entry, check)
            if entry.kind != "lease":
                sets[entry.name].version = entry.seq
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Mistake(entry.seq, str(error) or type(error).__name__) from error
    return sets


class Mistake(Exception):
    """An entry that does not follow from those before it."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row, self.reason = row, reason


def _budget(sets: dict[str, DataSet], entry: Entry, check: bool) -> None:
    payload = entry.payload
    budget = PrivacyBudget(payload["epsilon"], payload["delta"])
    relation = check_relation(payload["relation"])
    if entry.name not in sets:
        sets[entry.name] = DataSet(entry.name, budget, relation)
        return
    known = sets[entry.name]
    spent = known.accountant()._counts()
    if spent:
        if (budget.delta, relation) != (known.budget.delta, known.relation):
            raise ValueError("δ or the relation was changed after a release")
        if check and not _relaxed(budget).admits(spent):
            raise ValueError("the budget is below what was spent before")
        known.ceiling = max(known.ceiling or 0, known.budget.epsilon, budget.epsilon)
        known.rule = "Rényi filter"
    known.budget, known.relation = budget, relation


def _reserve(sets: dict[str, DataSet], entry: Entry, check: bool) -> None:
    known = sets[entry.name]
    if entry.run in known.runs:
        raise ValueError("the run was reserved before")
    run = Run(entry.run, entry, entry.payload["rule"], entry.payload["process"])
    if check:
        known.require_admissible(run.plan, run.rule)
    run.leased = [0] * len(run.planned)
    run.floor = list(run.leased)
    known.runs[entry.run], known.rule = run, run.rule


def _lease(sets: dict[str, DataSet], entry: Entry, _check: bool) -> None:
    run, leased = sets[entry.name].runs[entry.run], entry.payload["leased"]
    if run.committed is not None:
        raise ValueError("it leases parts of a run that is closed")
    _require_between(run.leased, leased, run.planned, "leases")
    run.leased = leased


def _close(sets: dict[str, DataSet], entry: Entry, _check: bool) -> None:
    known = sets[entry.name]
    run, committed = known.runs[entry.run], entry.payload["committed"]
    if run.committed is not None:
        raise ValueError("it closes a run that is closed")
    _require_between(run.floor, committed, run.leased, "closes with")
    run.committed = committed
    if not known.accountant()._counts():
        known.rule = "none"


def _reopen(sets: dict[str, DataSet], entry: Entry, check: bool) -> None:
    known = sets[entry.name]
    run = known.runs[entry.run]
    if check and run.committed is not None and run.counted != run.plan:
        del known.runs[entry.run]
        known.require_admissible(run.plan, entry.payload["rule"])
        known.runs[entry.run] = run
    run.leased = list(run.leased if run.committed is None else run.committed)
    run.floor, run.committed = list(run.leased), None
    run.process, run.rule = entry.payload["process"], entry.payload["rule"]
    known.rule = run.rule


_ENTRIES = {
    "budget": _budget,
    "reserve": _reserve,
    "lease": _lease,
    "close": _close,
    "reopen": _reopen,
}


def _require_between(low: list[int], counts: list[int], high: list[int], does: str) -> None:
    inside = all(
        type(count) is int and least <= count <= most
        for least, count, most in zip(low, counts, high, strict=True)
    )
    if not inside:
        raise ValueError(f"it {does} {counts} parts, where {low} to {high} are possible")
