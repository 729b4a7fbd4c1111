"""A budget (ε, δ), and the refusal when it is used up."""

from __future__ import annotations

from dataclasses import dataclass

from accounting.errors import OneLine, UserError
from accounting.events import Event, check_number


@dataclass(frozen=True)
class PrivacyBudget:
    """The most that may be spent: ε and δ together.

    Attributes:
        epsilon: Above 0.
        delta: In (0, 1). Customarily well below one over the number of records.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        epsilon = check_number(self.epsilon, "epsilon", "PrivacyBudget", low=0, high=1e9)
        delta = check_number(self.delta, "delta", "PrivacyBudget", low=0, high=1)
        object.__setattr__(self, "epsilon", epsilon)
        object.__setattr__(self, "delta", delta)

    def __str__(self) -> str:
        return f"ε = {self.epsilon:g} at δ = {self.delta:g}"


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a ledger says of a run: how the run's statement is tied to the ledger's chain of entries.

    Attributes:
        name: The data set's name in the ledger.
        run_id: The run's.
        head: The hash of the ledger's last entry of this run, which stands for all entries before it.
        rows: How many entries that are.
        budget: The data set's.
        spent: ε of all plans of the data set together, under the rule, at the budget's δ.
        rule: Which rule governs the budget, in words.
        caveat: What a changed budget means for the guarantee; empty if it was never changed after a release.
    """

    name: str
    run_id: str
    head: str
    rows: int
    budget: PrivacyBudget
    spent: float
    rule: str
    caveat: str = ""


class BudgetExceeded(OneLine):
    """An event that does not fit in what is left of a budget. Nothing was recorded or released.

    Attributes:
        budget: The budget.
        spent: ε of what was admitted before, an upper bound at the budget's δ.
        asked: The event that was refused.
        epsilon_asked: ε of what was admitted before together with the event, an upper bound.
        largest_fit: If the event is a `Repeated`, how many of its repetitions would be admitted.
    """

    def __init__(
        self,
        budget: PrivacyBudget,
        spent: float,
        asked: Event,
        epsilon_asked: float,
        largest_fit: int | None,
        reason: str,
    ) -> None:
        self.budget = budget
        self.spent = spent
        self.asked = asked
        self.epsilon_asked = epsilon_asked
        self.largest_fit = largest_fit
        part = "" if largest_fit is None else f"; {largest_fit} of its repetitions would fit"
        super().__init__(
            f"The event does not fit the budget of {budget}: {reason} "
            f"(spent before: ε = {spent:.6g}, with it: ε = {epsilon_asked:.6g}){part}."
        )


class ReservationError(UserError):
    """A commit outside of its reservation: too many, or after it was closed."""
