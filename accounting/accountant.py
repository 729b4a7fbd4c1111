"""The accountant: records events, answers for ε and δ, and refuses what a budget does not allow.

Two rules can admit events to a budget, and the first plan decides which of them governs:

- **Rényi filter**, if the first plan fits it. Later plans may be chosen after looking at earlier releases.
- **One plan by PLD**, if the first plan fits the budget by the tighter account alone. Nothing more is ever
  admitted then. Since the choice follows from the first plan's parameters, which were fixed before any
  release, both are sound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Literal, get_args

from accounting import pld
from accounting.atoms import Atom
from accounting.budget import BudgetExceeded, PrivacyBudget, Receipt, ReservationError
from accounting.errors import UnsupportedEvent, UserError
from accounting.events import (
    Composed,
    Event,
    NeighboringRelation,
    Repeated,
    check_count,
    check_number,
    check_relation,
    merged,
    shown,
)
from accounting.filter import RenyiFilter
from accounting.group import for_group
from accounting.rdp import renyi_delta, renyi_epsilon
from accounting.search import largest_whole

Method = Literal["pld", "rdp"]
METHODS: tuple[Method, ...] = get_args(Method)
Rule = Literal["none", "one plan by PLD", "Rényi filter"]
_MOST_REPETITIONS = 10**12


class PrivacyAccountant:
    """Keeps count of what was released about one data set.

    Args:
        method: "pld" (privacy-loss distributions, tight) or "rdp" (Rényi, simple and looser).
        budget: If given, `record` and `reserve` admit nothing that would exceed it.
        neighboring_relation: Which data sets must be hard to tell apart, see
            `accounting.events.NeighboringRelation`. An event that is not analysed under it is refused.
        tolerance: Relative width at which `epsilon_bounds` stops narrowing.

    Guarantee:
        `epsilon(delta)` is an upper bound for everything recorded or reserved, provided that its
        parameters were fixed in advance; where they were not, admit events under a budget, whose
        guarantee is the budget itself.
    """

    def __init__(
        self,
        method: Method = "pld",
        *,
        budget: PrivacyBudget | None = None,
        neighboring_relation: NeighboringRelation = "zero-out",
        tolerance: float = pld.DEFAULT_TOLERANCE,
    ) -> None:
        if not isinstance(method, str) or method not in METHODS:
            raise UserError(
                f"The accountant's method must be one of {', '.join(METHODS)}. Got {shown(method)}."
            )
        if budget is not None and not isinstance(budget, PrivacyBudget):
            raise UserError(f"The budget must be a PrivacyBudget(epsilon, delta). Got {shown(budget)}.")
        self.method: Method = method
        self.budget = budget
        self.neighboring_relation = check_relation(neighboring_relation)
        self.tolerance = check_number(tolerance, "tolerance", "PrivacyAccountant", low=0, high=1)
        self._filter = None if budget is None else RenyiFilter(budget)
        self._events: list[Event] = []
        self._total: dict[Atom, int] = {}
        self._rule: Rule = "none"

    # ------------------------------------------------------------ recording

    def record(self, event: Event) -> None:
        """Record `event` before it is released.

        Raises:
            BudgetExceeded: if there is a budget and the event does not fit; nothing is recorded then.
            UnsupportedEvent: if the event has no proof under the accountant's relation.
        """
        with self.reserve(event) as reservation:
            reservation.commit_all()

    def reserve(self, event: Event) -> Reservation:
        """Admit the whole of `event` (a plan) or nothing.

        The returned reservation is a context manager. Commit to it before each release. What has not been
        committed when the block ends is given back where that is sound: under the Rényi filter, without a
        budget, and where nothing at all was committed. Else one plan by PLD stays spent in full.

        Raises:
            BudgetExceeded: if it does not fit; nothing is recorded then.
            UnsupportedEvent: if it has no proof under the accountant's relation.
        """
        rule = self._admit(event)
        if rule is None:
            raise self._refusal(event)
        self._rule = rule
        self._events.append(event)
        self._total = self._with(event)
        return Reservation(self, event, len(self._events) - 1)

    def fits(self, event: Event) -> bool:
        """Whether `reserve(event)` would admit it. Changes nothing. True without a budget."""
        return self._admit(event) is not None

    def remaining(self, event: Event) -> int:
        """How many more times `event` would be admitted, as one further plan. At most 10^12.

        Raises:
            UserError: if there is no budget.
        """
        if self.budget is None:
            raise UserError("An accountant without a budget has no remainder; give it a PrivacyBudget.")
        if not self.fits(event):
            return 0
        return largest_whole(lambda count: self.fits(Repeated(event, count)), 1, _MOST_REPETITIONS)

    @property
    def events(self) -> tuple[Event, ...]:
        """What was recorded or reserved, in order."""
        return tuple(self._events)

    @property
    def event(self) -> Event:
        """All of `events` as one."""
        return Composed(self._events)

    @property
    def rule(self) -> Rule:
        """Which rule governs the budget; "none" while nothing is spent or reserved, and without a budget."""
        return self._rule

    # ------------------------------------------------------------ answers

    def epsilon(self, delta: float, *, group_size: int = 1) -> float:
        """An upper bound on ε at `delta` for everything recorded or reserved.

        Args:
            delta: In (0, 1).
            group_size: How many records two neighbours may differ in, instead of one: see `accounting.group`.
        """
        return self._epsilon_of(for_group(self._counts(), group_size), delta)

    def epsilon_bounds(self, delta: float, *, group_size: int = 1) -> tuple[float, float]:
        """(lower, upper) bounds on ε at `delta` for the dominating pair of the events.

        The lower bound is one for that pair, by PLD under either method. It is no statement about how
        well an attack on this training would do.
        """
        counts = for_group(self._counts(), group_size)
        if self.method == "pld":
            return pld.epsilon_bounds(counts, _check_delta(delta), self.tolerance)
        upper = self._epsilon_of(counts, delta)
        with_pairs = {x: count for x, count in counts.items() if x.has_pair or x == Atom.NON_PRIVATE}
        return min(pld.epsilon_bounds(with_pairs, delta, self.tolerance)[0], upper), upper

    def delta(self, epsilon: float, *, group_size: int = 1) -> float:
        """An upper bound on δ at `epsilon` for everything recorded or reserved."""
        return self.delta_bounds(epsilon, group_size=group_size)[1]

    def delta_bounds(self, epsilon: float, *, group_size: int = 1) -> tuple[float, float]:
        """(lower, upper) bounds on δ at `epsilon`, as `epsilon_bounds`."""
        epsilon = check_number(epsilon, "epsilon", "delta()", low=0, high=1e9, closed="left")
        counts = for_group(self._counts(), group_size)
        if self.method == "pld":
            return pld.delta_bounds(counts, epsilon, self.tolerance)
        upper = renyi_delta(counts, epsilon)
        with_pairs = {x: count for x, count in counts.items() if x.has_pair or x == Atom.NON_PRIVATE}
        return min(pld.delta_bounds(with_pairs, epsilon, self.tolerance)[0], upper), upper

    # ------------------------------------------------------------ inside

    def _with(self, event: Event) -> dict[Atom, int]:
        """What was recorded together with `event`. A new dictionary."""
        total = dict(self._total)
        for atom, count in event.atoms(self.neighboring_relation).items():
            total[atom] = total.get(atom, 0) + count
        return total

    def _counts(self) -> dict[Atom, int]:
        return merged(self._total)

    def _restore(self, events: Iterable[Event], rule: Rule) -> None:
        """Take over what was admitted before, and by which rule."""
        self._events, self._total, self._rule = [], {}, rule
        for event in events:
            self._total = self._with(event)
            self._events.append(event)

    def _replace(self, position: int, event: Event) -> None:
        """Put `event` in the place of one that was recorded."""
        old = self._events[position].atoms(self.neighboring_relation)
        self._total = self._with(event)
        for atom, count in old.items():
            self._total[atom] -= count
        self._total = {atom: count for atom, count in self._total.items() if count}
        self._events[position] = event
        if not self._total:  # nothing was released, so the next plan is again the first
            self._rule = "none"

    def _epsilon_of(self, counts: Mapping[Atom, int], delta: float) -> float:
        delta = _check_delta(delta)
        if self.method == "pld":
            return pld.epsilon_bounds(counts, delta, self.tolerance)[1]
        return _finite_renyi_epsilon(counts, delta)

    def _judged(self, counts: Mapping[Atom, int], delta: float) -> float:
        """ε by which a plan is judged: by the method, or by Rényi divergences where an event has no PLD."""
        try:
            return self._epsilon_of(counts, delta)
        except UnsupportedEvent:
            return _finite_renyi_epsilon(counts, delta)

    def _admit(self, event: Event) -> Rule | None:
        """The rule under which `event` would be admitted now, or None."""
        if not isinstance(event, Event):
            raise UserError(f"An accountant records events such as Gaussian(1.1). Got {shown(event)}.")
        counts = merged(self._with(event))  # refuses what has no proof under the relation
        if self.budget is None or self._filter is None:
            return "none"
        if self._rule == "one plan by PLD":
            return None
        if self._filter.admits(counts):
            return "Rényi filter"
        if self._rule != "none":
            return None
        # PLD's bound is never above Rényi's, which is quicker.
        budget = self.budget
        fits = renyi_epsilon(counts, budget.delta) <= budget.epsilon
        if fits or self._judged(counts, budget.delta) <= budget.epsilon:
            return "one plan by PLD"
        return None

    def _refusal(self, event: Event) -> BudgetExceeded:
        budget, within = self.budget, self._filter
        assert budget is not None and within is not None  # noqa: S101, PT018 - only budgets refuse
        largest = self.remaining(event.event) if isinstance(event, Repeated) else None
        together = merged(self._with(event))
        if self._rule == "one plan by PLD":
            reason = "it was given to one plan, judged by PLD, and nothing more may be admitted"
            spent, asked = (self._judged(counts, budget.delta) for counts in (self._counts(), together))
        elif self._rule == "Rényi filter":
            reason = "the Rényi filter over all plans refuses it"
            spent, asked = within.epsilon(self._counts()), within.epsilon(together)
        else:
            reason = "the plan alone costs more"
            spent, asked = 0.0, self._judged(together, budget.delta)
        return BudgetExceeded(budget, spent, event, asked, largest, reason)


class Reservation:
    """A plan that was admitted. Made by `PrivacyAccountant.reserve`; commit before each release.

    A plan `Repeated(step, n)` has n parts of one kind. A plan `Composed([…])` has the parts of its members,
    which may be committed in any order; any other event is one part.

    Attributes:
        plan: What was reserved.
        step: The event of one part, where all are of one kind; else the plan.
        parts: How many parts the plan has, of all kinds.
    """

    def __init__(self, accountant: PrivacyAccountant, plan: Event, position: int) -> None:
        self.plan = plan
        self._planned = kinds(plan)
        self._committed = dict.fromkeys(self._planned, 0)
        self.step = next(iter(self._planned)) if len(self._planned) == 1 else plan
        self.parts = sum(self._planned.values())
        self._accountant = accountant
        self._position = position
        self._open = True

    @property
    def kinds(self) -> tuple[Event, ...]:
        """The events of which the plan has parts."""
        return tuple(self._planned)

    @property
    def committed(self) -> int:
        """How many parts were committed, of all kinds."""
        return sum(self._committed.values())

    def commit(self, parts: int = 1, event: Event | None = None) -> None:
        """Note that `parts` of the plan are about to be released.

        Args:
            parts: How many.
            event: Of which kind; it may be left out if the plan has one kind alone.

        Raises:
            ReservationError: if that is more than was reserved, or the block has ended. Do not release then.
        """
        parts = check_count(parts, "parts", "commit", low=1)
        kind = self.step if event is None else event
        if not self._open:
            raise ReservationError("The reservation is closed; reserve a new plan before releasing more.")
        if not isinstance(kind, Event) or kind not in self._planned:
            known = ", ".join(map(str, self._planned))
            raise ReservationError(f"The plan has no part {shown(kind)}: commit one of {known:.200}.")
        planned, committed = self._planned[kind], self._committed[kind]
        if committed + parts > planned:
            raise ReservationError(
                f"The plan has {planned} parts, {committed} are committed; {parts} more exceed it."
            )
        self._secure(kind, committed + parts)
        self._committed[kind] += parts

    def commit_all(self) -> None:
        """Commit what is left of the plan."""
        for event, planned in self._planned.items():
            if left := planned - self._committed[event]:
                self.commit(left, event)

    @property
    def committed_event(self) -> Event:
        """What was committed so far, as an event."""
        return part_of(self.plan, list(self._committed.values()))

    @property
    def receipt(self) -> Receipt | None:
        """Where the plan is recorded for good; None if that is nowhere."""
        return None

    def close(self) -> None:
        """End the reservation, giving back what was not committed where that is sound."""
        if self._open and (self._accountant.rule != "one plan by PLD" or self.committed == 0):
            self._accountant._replace(self._position, self.committed_event)
        self._open = False

    def _secure(self, kind: Event, total: int) -> None:
        """Make sure that `total` parts of a kind are recorded, before they count as committed."""

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def kinds(plan: Event) -> dict[Event, int]:
    """The parts of a plan that may be committed one by one, and how many there are of each."""
    found: dict[Event, int] = {}
    for member in plan.events if isinstance(plan, Composed) else (plan,):
        event, count = (member.event, member.count) if isinstance(member, Repeated) else (member, 1)
        found[event] = found.get(event, 0) + count
    return found


def part_of(plan: Event, counts: Sequence[int]) -> Event:
    """So many parts of a plan as an event: a count for each of its `kinds`, in their order."""
    planned = kinds(plan)
    if list(counts) == list(planned.values()):
        return plan
    parts = [Repeated(event, count) for event, count in zip(planned, counts, strict=True)]
    return parts[0] if len(parts) == 1 else Composed(parts)


def _finite_renyi_epsilon(counts: Mapping[Atom, int], delta: float) -> float:
    """Raises UnsupportedEvent for an event that has no finite Rényi divergence."""
    epsilon = renyi_epsilon(counts, delta)
    if math.isinf(epsilon) and Atom.NON_PRIVATE not in counts:
        odd = next(atom for atom in counts if math.isinf(renyi_epsilon({atom: 1}, 0.5)))
        raise UnsupportedEvent(
            f'{odd.mechanism!s:.80} has no finite Rényi divergence; use PrivacyAccountant(method="pld").'
        )
    return epsilon


def _check_delta(delta: float) -> float:
    return check_number(delta, "delta", "epsilon()", low=0, high=1)
