"""The accountant: recording, budgets, reservations, and which of two rules admits a plan."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting import (
    METHODS,
    BudgetExceeded,
    Composed,
    Event,
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    PrivacyAccountant,
    PrivacyBudget,
    Repeated,
    ReservationError,
    UnsupportedEvent,
    UserError,
)
from accounting.events import atoms
from accounting.filter import FILTER_ORDERS, RenyiFilter

STEP = PoissonSampled(Gaussian(1.1), 0.01)
BUDGET = PrivacyBudget(1.5, 1e-5)
SMALL = Repeated(STEP, 100)  # within the filter of BUDGET
LARGE = Repeated(STEP, 950)  # ε = 1.48 by PLD; the filter asks 1.8 for it


def guarded(budget: PrivacyBudget = BUDGET, method: str = "pld") -> PrivacyAccountant:
    return PrivacyAccountant(method, budget=budget, tolerance=0.02)  # type: ignore[arg-type]


def epsilon_of(event: Event, delta: float = 1e-5, method: str = "pld", relation: str = "zero-out") -> float:
    accountant = PrivacyAccountant(method, neighboring_relation=relation)  # type: ignore[arg-type]
    accountant.record(event)
    return accountant.epsilon(delta)


# ---------------------------------------------------------------- recording and answers


@pytest.mark.parametrize("method", METHODS)
def test_events_of_different_kinds_compose(method: str) -> None:
    events = [SMALL, Gaussian(10.0), Repeated(Laplace(20.0), 3), PoissonSampled(Laplace(2.0), 0.1)]
    accountant = PrivacyAccountant(method)  # type: ignore[arg-type]
    last = 0.0
    for event in events:
        accountant.record(event)
        assert accountant.epsilon(1e-5) > max(last, epsilon_of(event, method=method)) * 0.995
        last = accountant.epsilon(1e-5)
    assert accountant.events == tuple(events)
    assert accountant.event == Composed(events)
    assert last == epsilon_of(Composed(events), method=method)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_recorded_costs_nothing(method: str) -> None:
    accountant = PrivacyAccountant(method)  # type: ignore[arg-type]
    assert accountant.epsilon(1e-5) == 0.0
    assert accountant.epsilon_bounds(1e-5) == (0.0, 0.0)
    assert accountant.delta(0.0) == 0.0
    assert accountant.events == ()
    assert accountant.rule == "none"


@pytest.mark.parametrize("method", METHODS)
def test_a_non_private_release_costs_infinity(method: str) -> None:
    accountant = PrivacyAccountant(method)  # type: ignore[arg-type]
    accountant.record(NonPrivate())
    assert accountant.epsilon(1e-5) == math.inf
    assert accountant.epsilon_bounds(1e-5) == (math.inf, math.inf)
    assert accountant.delta(10.0) == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_bounds_end_with_the_method_s_epsilon(method: str) -> None:
    accountant = PrivacyAccountant(method)  # type: ignore[arg-type]
    accountant.record(SMALL)
    lower, upper = accountant.epsilon_bounds(1e-5)
    assert upper == accountant.epsilon(1e-5)
    assert 0 < lower <= upper


def test_pld_is_tighter_than_rdp() -> None:
    assert epsilon_of(LARGE) < 0.95 * epsilon_of(LARGE, method="rdp")


@pytest.mark.parametrize("method", ["PLD", "gdp", "", None, 1])
def test_an_unknown_method_is_refused(method: object) -> None:
    with pytest.raises(UserError, match=r"method must be one of pld, rdp\. Got"):
        PrivacyAccountant(method)  # type: ignore[arg-type]


@pytest.mark.parametrize("relation", ["add", "zero_out", None, 1])
def test_an_unknown_relation_is_refused(relation: object) -> None:
    with pytest.raises(UserError, match="relation must be one of zero-out, add-or-remove-one, replace-one"):
        PrivacyAccountant(neighboring_relation=relation)  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0, 1, -1e-5, math.nan, "1e-5", None, True])
@pytest.mark.parametrize("method", METHODS)
def test_delta_outside_of_the_open_unit_interval_is_refused(method: str, delta: object) -> None:
    accountant = PrivacyAccountant(method)  # type: ignore[arg-type]
    for ask in (accountant.epsilon, accountant.epsilon_bounds):
        with pytest.raises(UserError, match=r"'delta' parameter of epsilon\(\) must be in \(0, 1\)"):
            ask(delta)  # type: ignore[arg-type]


@pytest.mark.parametrize("epsilon", [-1e-9, math.inf, math.nan, "1", None, True])
def test_delta_at_a_bad_epsilon_is_refused(epsilon: object) -> None:
    with pytest.raises(UserError, match=r"'epsilon' parameter of delta\(\)"):
        PrivacyAccountant().delta(epsilon)  # type: ignore[arg-type]


@pytest.mark.parametrize("event", [None, 1.1, "Gaussian(1.1)", [STEP]], ids=repr)
def test_what_is_no_event_is_refused_and_not_recorded(event: object) -> None:
    accountant = PrivacyAccountant()
    for take in (accountant.record, accountant.reserve, accountant.fits):
        with pytest.raises(UserError, match="records events such as"):
            take(event)  # type: ignore[operator]
    assert accountant.events == ()


@pytest.mark.parametrize(("epsilon", "delta"), [(0, 1e-5), (-1, 1e-5), (1, 0), (1, 1), (math.inf, 1e-5)])
def test_a_budget_that_is_none_is_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(UserError, match="parameter of PrivacyBudget must be in"):
        PrivacyBudget(epsilon, delta)


def test_a_budget_has_to_be_a_privacy_budget() -> None:
    with pytest.raises(UserError, match=r"must be a PrivacyBudget\(epsilon, delta\)"):
        PrivacyAccountant(budget=3.0)  # type: ignore[arg-type]


# ---------------------------------------------------------------- neighbouring relations


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_replace_one_costs_what_half_the_noise_costs(method: str, kind: type[Gaussian]) -> None:
    doubled = epsilon_of(kind(8.0), method=method, relation="replace-one")
    assert doubled == epsilon_of(kind(4.0), method=method)
    assert doubled > 1.5 * epsilon_of(kind(8.0), method=method)


@pytest.mark.parametrize("method", METHODS)
def test_zero_out_and_add_or_remove_one_cost_the_same(method: str) -> None:
    event = Composed([SMALL, Gaussian(10.0), PoissonSampled(Laplace(2.0), 0.1)])
    zero_out = epsilon_of(event, method=method, relation="zero-out")
    assert zero_out == epsilon_of(event, method=method, relation="add-or-remove-one")


def test_replace_one_refuses_poisson_sampling_and_records_nothing() -> None:
    accountant = PrivacyAccountant(neighboring_relation="replace-one", budget=PrivacyBudget(5, 1e-5))
    for take in (accountant.record, accountant.reserve, accountant.fits, accountant.remaining):
        with pytest.raises(UnsupportedEvent, match="replace-one"):
            take(STEP)
    assert accountant.events == ()
    assert accountant.rule == "none"


# ---------------------------------------------------------------- asking a budget


def state(accountant: PrivacyAccountant) -> tuple[object, ...]:
    return accountant.events, accountant.rule, accountant.epsilon(1e-5)


def test_asking_changes_nothing() -> None:
    accountant = guarded()
    accountant.record(SMALL)
    before = state(accountant)
    assert accountant.fits(STEP)
    assert not accountant.fits(Repeated(STEP, 10**6))
    assert accountant.remaining(STEP) > 0
    assert state(accountant) == before


def test_without_a_budget_everything_fits_and_nothing_remains() -> None:
    accountant = PrivacyAccountant()
    assert accountant.fits(NonPrivate())
    with pytest.raises(UserError, match="has no remainder"):
        accountant.remaining(STEP)


@pytest.mark.parametrize("spent", [None, SMALL, LARGE], ids=["fresh", "filter", "one plan"])
@pytest.mark.parametrize("method", METHODS)
def test_what_remains_fits_and_one_more_does_not(method: str, spent: Event | None) -> None:
    accountant = guarded(PrivacyBudget(2.0, 1e-5), method)
    if spent is not None:
        accountant.record(spent)
    remains = accountant.remaining(STEP)
    assert not accountant.fits(Repeated(STEP, remains + 1))
    if remains:
        accountant.record(Repeated(STEP, remains))


def test_of_what_is_free_there_remains_a_trillion() -> None:
    assert guarded().remaining(Composed([])) == 10**12


@pytest.mark.parametrize("method", METHODS)
def test_a_non_private_release_fits_no_budget(method: str) -> None:
    accountant = guarded(PrivacyBudget(1e8, 0.5), method)
    assert accountant.remaining(NonPrivate()) == 0
    with pytest.raises(BudgetExceeded) as refusal:
        accountant.record(PoissonSampled(NonPrivate(), 1e-9))
    assert refusal.value.epsilon_asked == math.inf


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("spent", [None, SMALL, LARGE], ids=["fresh", "filter", "one plan"])
def test_a_refusal_says_what_was_spent_asked_and_would_fit(spent: Event | None) -> None:
    accountant = guarded()
    if spent is not None:
        accountant.record(spent)
    before, asked = state(accountant), Repeated(STEP, 10**5)
    with pytest.raises(BudgetExceeded) as caught:
        accountant.reserve(asked)
    refusal = caught.value
    assert state(accountant) == before
    assert refusal.budget == BUDGET
    assert refusal.asked == asked
    assert refusal.epsilon_asked > BUDGET.epsilon
    assert 0 <= refusal.spent <= BUDGET.epsilon
    assert (refusal.spent == 0) == (spent is None)
    assert refusal.largest_fit is not None
    assert not accountant.fits(Repeated(STEP, refusal.largest_fit + 1))
    assert refusal.largest_fit == 0 or accountant.fits(Repeated(STEP, refusal.largest_fit))
    assert "\n" not in str(refusal)
    assert "ε = 1.5 at δ = 1e-05" in str(refusal)


def test_only_repetitions_have_a_largest_fit() -> None:
    with pytest.raises(BudgetExceeded) as refusal:
        guarded().record(Gaussian(0.1))
    assert refusal.value.largest_fit is None
    assert "repetitions" not in str(refusal.value)


def test_a_plan_is_admitted_whole_or_not_at_all() -> None:
    accountant = guarded(method="rdp")
    most = accountant.remaining(STEP)
    with pytest.raises(BudgetExceeded) as refusal:
        accountant.reserve(Repeated(STEP, most + 1))
    assert refusal.value.largest_fit == most
    assert accountant.events == ()
    assert accountant.rule == "none"
    assert accountant.reserve(Repeated(STEP, most)).parts == most


# ---------------------------------------------------------------- rule 1: one plan by PLD


def test_a_plan_beyond_the_filter_is_the_last() -> None:
    accountant = guarded()
    assert not RenyiFilter(BUDGET).admits(atoms(LARGE))
    accountant.record(LARGE)
    assert accountant.rule == "one plan by PLD"
    assert accountant.epsilon(BUDGET.delta) <= BUDGET.epsilon
    for event in (Gaussian(1e9), Repeated(STEP, 0)):
        assert not accountant.fits(event)
        with pytest.raises(BudgetExceeded, match="given to one plan"):
            accountant.record(event)
        assert accountant.remaining(event) == 0
    assert accountant.events == (LARGE,)


def test_a_plan_by_pld_stays_spent_in_full_even_if_nothing_is_committed() -> None:
    accountant = guarded()
    with accountant.reserve(LARGE) as reservation:
        reservation.commit(3)
    assert accountant.events == (LARGE,)
    assert not accountant.fits(STEP)
    with pytest.raises(ReservationError, match="closed"):
        reservation.commit(1)


def test_a_plan_beyond_the_filter_is_refused_once_the_filter_governs() -> None:
    accountant = guarded()
    accountant.record(STEP)
    assert accountant.rule == "Rényi filter"
    with pytest.raises(BudgetExceeded, match="filter over all plans"):
        accountant.record(LARGE)
    assert accountant.rule == "Rényi filter"


# ---------------------------------------------------------------- rule 2: the Rényi filter


def test_within_the_filter_later_events_are_admitted_until_it_is_full() -> None:
    accountant = guarded()
    admitted = 0
    while accountant.fits(SMALL):
        accountant.record(SMALL)
        admitted += 1
        assert accountant.rule == "Rényi filter"
    assert 2 <= admitted < 10
    assert RenyiFilter(BUDGET).admits(atoms(accountant.event))
    with pytest.raises(BudgetExceeded):
        accountant.record(SMALL)
    assert len(accountant.events) == admitted


def test_under_the_filter_what_was_not_committed_is_given_back() -> None:
    accountant = guarded()
    with accountant.reserve(SMALL) as reservation:
        assert accountant.events == (SMALL,)
        reservation.commit(3)
        reservation.commit()
        assert reservation.committed_event == Repeated(STEP, 4)
    assert accountant.events == (Repeated(STEP, 4),)
    assert accountant.epsilon(1e-5) == pytest.approx(epsilon_of(Repeated(STEP, 4)), rel=0.02)
    fresh = guarded()
    fresh.record(Repeated(STEP, 4))
    assert accountant.remaining(STEP) == fresh.remaining(STEP)


def test_while_a_reservation_is_open_all_of_it_counts() -> None:
    accountant = guarded()
    plan = Repeated(STEP, 300)
    assert RenyiFilter(BUDGET).admits(atoms(plan))
    with accountant.reserve(plan), pytest.raises(BudgetExceeded):
        accountant.record(plan)
    assert accountant.events == (Repeated(STEP, 0),)
    assert accountant.epsilon(1e-5) == 0.0


def test_nested_reservations_give_back_each_its_own() -> None:
    accountant = guarded()
    other = PoissonSampled(Gaussian(2.0), 0.01)
    with accountant.reserve(SMALL) as outer, accountant.reserve(Repeated(other, 10)) as inner:
        outer.commit(5)
        inner.commit(2)
    assert accountant.events == (Repeated(STEP, 5), Repeated(other, 2))


@given(
    plans=st.lists(
        st.tuples(st.floats(0.7, 8), st.floats(1e-3, 0.3), st.integers(1, 200)), min_size=1, max_size=6
    ),
    epsilon=st.floats(0.2, 8),
)
@settings(max_examples=10, deadline=None)
def test_what_the_filter_admitted_is_within_the_budget_by_pld(
    plans: list[tuple[float, float, int]], epsilon: float
) -> None:
    """Not adaptively chosen here, so that composing PLDs is a fair judge."""
    accountant = guarded(PrivacyBudget(epsilon, 1e-6))
    for sigma, q, count in plans:
        plan = Repeated(PoissonSampled(Gaussian(sigma), q), count)
        if accountant.rule != "one plan by PLD" and accountant.fits(plan):
            accountant.record(plan)
    assert accountant.epsilon(1e-6) <= epsilon


def test_the_filter_charges_the_union_over_its_orders() -> None:
    """At one order α, the (ε, δ/|Λ|) conversion of Canonne, Kamath & Steinke 2020, Proposition 12."""
    thresholds = RenyiFilter(PrivacyBudget(2.0, 1e-5)).thresholds
    share = 1e-5 / len(FILTER_ORDERS)
    for order, threshold in zip(FILTER_ORDERS, thresholds, strict=True):
        delta = math.exp((order - 1) * (threshold - 2.0)) * (1 - 1 / order) ** (order - 1) / order
        assert delta == pytest.approx(share, rel=1e-9)


def test_the_filter_s_epsilon_is_the_budget_that_would_just_do() -> None:
    counts = atoms(SMALL)
    epsilon = RenyiFilter(BUDGET).epsilon(counts)
    assert RenyiFilter(PrivacyBudget(epsilon * (1 + 1e-9), BUDGET.delta)).admits(counts)
    assert not RenyiFilter(PrivacyBudget(epsilon * (1 - 1e-9), BUDGET.delta)).admits(counts)


# ---------------------------------------------------------------- reservations


def test_committing_more_than_was_reserved_is_refused_and_counts_nothing() -> None:
    with guarded().reserve(Repeated(STEP, 5)) as reservation:
        reservation.commit(4)
        with pytest.raises(ReservationError, match="has 5 parts, 4 are committed; 2 more exceed it"):
            reservation.commit(2)
        assert reservation.committed == 4
        reservation.commit(1)
        with pytest.raises(ReservationError):
            reservation.commit(1)


@pytest.mark.parametrize("parts", [0, -1, 1.0, True, None, "1"], ids=repr)
def test_a_bad_number_of_parts_is_refused(parts: object) -> None:
    with guarded().reserve(SMALL) as reservation:
        with pytest.raises(UserError, match="'parts' parameter of commit"):
            reservation.commit(parts)  # type: ignore[arg-type]
        assert reservation.committed == 0


def test_an_exception_in_the_block_keeps_what_was_committed_and_passes_on() -> None:
    accountant = guarded()
    reservation = accountant.reserve(SMALL)

    def run() -> None:
        with reservation:
            reservation.commit(7)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert accountant.events == (Repeated(STEP, 7),)
    with pytest.raises(ReservationError, match="closed"):
        reservation.commit(1)


def test_closing_twice_gives_back_once() -> None:
    accountant = guarded()
    reservation = accountant.reserve(SMALL)
    reservation.commit(2)
    reservation.close()
    accountant.record(Gaussian(50.0))
    reservation.close()
    assert accountant.events == (Repeated(STEP, 2), Gaussian(50.0))


def test_a_reservation_that_is_never_closed_stays_spent() -> None:
    accountant = guarded()
    accountant.reserve(SMALL)
    assert accountant.events == (SMALL,)


def test_an_event_that_is_no_repetition_has_one_part() -> None:
    accountant = guarded()
    with accountant.reserve(Gaussian(20.0)) as reservation:
        assert reservation.parts == 1
        reservation.commit_all()
        reservation.commit_all()
    assert accountant.events == (Gaussian(20.0),)


def test_without_a_budget_a_reservation_gives_back_too() -> None:
    accountant = PrivacyAccountant()
    with accountant.reserve(LARGE) as reservation:
        reservation.commit(10)
    assert accountant.events == (Repeated(STEP, 10),)


def test_recording_step_by_step_stays_quick() -> None:
    """Two thousand records must not cost two thousand times two thousand visits."""
    accountant = PrivacyAccountant()
    began = time.process_time()
    for _ in range(2_000):
        accountant.record(STEP)
    assert time.process_time() - began < 3
    assert accountant.epsilon(1e-5) == epsilon_of(Repeated(STEP, 2_000))
