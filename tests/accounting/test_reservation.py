"""Reservations of plans with parts of several kinds: what may be committed, and what is given back."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting import (
    Composed,
    EpsilonDelta,
    Event,
    Gaussian,
    GNMax,
    GNMaxThreshold,
    Laplace,
    LNMax,
    PoissonSampled,
    PrivacyAccountant,
    PrivacyBudget,
    Repeated,
    Reservation,
    ReservationError,
)

CHECK, ANSWER = GNMaxThreshold(150.0), GNMax(40.0)
PLAN = Composed([Repeated(CHECK, 6), Repeated(ANSWER, 3)])
BUDGET = PrivacyBudget(2.0, 1e-5)
LARGE = Composed([Repeated(CHECK, 400), Repeated(ANSWER, 140)])  # fits BUDGET by PLD, not by the filter


def reserve(plan: Event = PLAN, budget: PrivacyBudget | None = None) -> Reservation:
    return PrivacyAccountant(budget=budget, tolerance=0.02).reserve(plan)


def atoms(event: Event) -> dict:
    return {atom: count for atom, count in event.atoms("zero-out").items() if count}


def test_a_plan_has_the_parts_of_its_members():
    assert reserve().parts == 9
    assert reserve(Composed([CHECK, ANSWER, ANSWER])).parts == 3
    assert reserve(Repeated(CHECK, 5)).parts == 5
    assert reserve(CHECK).parts == 1
    assert reserve(Composed([])).parts == 0


def test_members_of_one_kind_are_one_kind():
    reservation = reserve(Composed([Repeated(ANSWER, 2), CHECK, ANSWER]))
    reservation.commit(3, ANSWER)
    with pytest.raises(ReservationError, match="The plan has 3 parts, 3 are committed; 1 more exceed it"):
        reservation.commit(1, ANSWER)
    only = reserve(Composed([Repeated(ANSWER, 2), ANSWER]))
    only.commit(3)  # one kind alone need not be named
    assert only.committed_event == only.plan


def test_a_composition_within_is_one_part():
    pair = Composed([CHECK, ANSWER])
    reservation = reserve(Composed([Repeated(pair, 4), ANSWER]))
    assert reservation.parts == 5
    reservation.commit(2, pair)
    with pytest.raises(ReservationError, match="has no part"):
        reservation.commit(1, CHECK)
    assert atoms(reservation.committed_event) == atoms(Repeated(pair, 2))


@pytest.mark.parametrize("order", sorted(set(itertools.permutations([CHECK] * 3 + [ANSWER] * 2)), key=str))
def test_the_order_of_commits_does_not_matter(order):
    reservation = reserve(Composed([Repeated(CHECK, 3), Repeated(ANSWER, 2)]))
    for done, event in enumerate(order):
        assert reservation.committed == done
        reservation.commit(1, event)
    assert reservation.committed_event == reservation.plan


@given(st.lists(st.tuples(st.sampled_from([CHECK, ANSWER]), st.integers(1, 4)), max_size=12))
@settings(max_examples=150, deadline=None)
def test_no_kind_exceeds_its_own_number_whatever_is_asked(asked):
    reservation, left, done = reserve(), {CHECK: 6, ANSWER: 3}, {CHECK: 0, ANSWER: 0}
    for event, parts in asked:
        if parts <= left[event]:
            reservation.commit(parts, event)
            left[event] -= parts
            done[event] += parts
        else:
            with pytest.raises(ReservationError, match=f"{parts} more exceed it"):
                reservation.commit(parts, event)
        assert reservation.committed == sum(done.values())
        expected = Composed([Repeated(kind, count) for kind, count in done.items()])
        assert atoms(reservation.committed_event) == atoms(expected)


def test_one_kind_cannot_use_what_is_left_of_another():
    reservation = reserve()
    reservation.commit(3, ANSWER)
    with pytest.raises(ReservationError, match="The plan has 3 parts, 3 are committed; 1 more exceed it"):
        reservation.commit(1, ANSWER)
    assert reservation.committed == 3
    reservation.commit(6, CHECK)


@pytest.mark.parametrize("event", [None, GNMax(40.5), Gaussian(40.0), LNMax(40.0), PLAN, Repeated(ANSWER, 3)])
def test_an_unknown_kind_is_refused_in_one_line_and_counts_nothing(event):
    reservation = reserve()
    with pytest.raises(ReservationError, match=r"The plan has no part .*: commit one of ") as refused:
        reservation.commit(1, event)
    assert "\n" not in str(refused.value)
    assert reservation.committed == 0


def test_an_equal_event_is_the_same_kind():
    reservation = reserve()
    reservation.commit(2, GNMax(sigma=40))
    reservation.commit(1, GNMax(40.0))
    with pytest.raises(ReservationError, match="1 more exceed it"):
        reservation.commit(1, GNMax(40.0))


def test_nothing_is_committed_once_closed():
    reservation = reserve()
    reservation.commit(1, ANSWER)
    reservation.close()
    for refused in (lambda: reservation.commit(1, CHECK), reservation.commit_all):
        with pytest.raises(ReservationError, match="closed"):
            refused()
    assert reservation.committed == 1


def test_commit_all_commits_what_is_left_of_each_kind():
    reservation = reserve()
    reservation.commit(2, ANSWER)
    reservation.commit_all()
    reservation.commit_all()
    assert reservation.committed == 9
    assert reservation.committed_event == PLAN


def test_a_plan_of_every_kind_of_event_can_be_reserved_and_committed():
    kinds = [Gaussian(30.0), Laplace(50.0), PoissonSampled(Gaussian(3.0), 0.01), EpsilonDelta(0.01, 1e-9)]
    kinds += [CHECK, ANSWER, LNMax(90.0), Composed([CHECK, ANSWER])]
    reservation = reserve(Composed([Repeated(kind, 2) for kind in kinds]))
    for kind in random.Random(0).sample(kinds * 2, 2 * len(kinds)):
        reservation.commit(1, kind)
    assert reservation.committed_event == reservation.plan


def test_what_was_not_committed_costs_nothing_once_given_back():
    accountant = PrivacyAccountant(budget=BUDGET, tolerance=0.02)
    with accountant.reserve(PLAN) as reservation:
        whole = accountant.epsilon(1e-5)
        reservation.commit(2, ANSWER)
        reservation.commit(1, CHECK)
        assert accountant.epsilon(1e-5) == whole  # open: all of it counts
    assert accountant.rule == "Rényi filter"
    other = PrivacyAccountant(tolerance=0.02)
    other.record(Composed([Repeated(CHECK, 1), Repeated(ANSWER, 2)]))
    assert accountant.epsilon(1e-5) == other.epsilon(1e-5) < whole
    assert atoms(accountant.event) == atoms(other.event)


def test_what_is_given_back_can_be_reserved_again_and_no_more():
    accountant = PrivacyAccountant(budget=BUDGET, tolerance=0.02)
    pair = Composed([CHECK, ANSWER])
    accountant.record(pair)  # from here on the filter governs
    most = accountant.remaining(pair)
    plan = Composed([Repeated(CHECK, most), Repeated(ANSWER, most)])
    with accountant.reserve(plan) as reservation:
        assert not accountant.fits(pair)
        reservation.commit(5, ANSWER)
        reservation.commit(5, CHECK)
    assert accountant.remaining(pair) == most - 5


def test_a_reservation_of_which_nothing_was_committed_leaves_nothing():
    accountant = PrivacyAccountant(budget=BUDGET, tolerance=0.02)
    accountant.reserve(PLAN).close()
    assert accountant.epsilon(1e-5) == 0.0


def test_nested_reservations_give_back_each_its_own_kinds():
    accountant = PrivacyAccountant(budget=BUDGET, tolerance=0.02)
    with accountant.reserve(PLAN) as outer, accountant.reserve(PLAN) as inner:
        outer.commit(1, CHECK)
        inner.commit(2, ANSWER)
    assert atoms(accountant.event) == atoms(Composed([CHECK, Repeated(ANSWER, 2)]))


def test_one_plan_by_pld_stays_spent_whatever_was_committed():
    accountant = PrivacyAccountant(budget=BUDGET, tolerance=0.02)
    with accountant.reserve(LARGE) as reservation:
        assert accountant.rule == "one plan by PLD"
        whole = accountant.epsilon(1e-5)
        reservation.commit(1, ANSWER)
    assert atoms(reservation.committed_event) == atoms(ANSWER)
    assert accountant.epsilon(1e-5) == whole
    assert accountant.events == (LARGE,)
    assert not accountant.fits(GNMax(1e9))


def test_an_exception_in_the_block_keeps_what_was_committed_of_each_kind():
    accountant = PrivacyAccountant(budget=BUDGET, tolerance=0.02)
    reservation = accountant.reserve(PLAN)

    def fail_half_way() -> None:
        with reservation:
            reservation.commit(4, CHECK)
            reservation.commit(1, ANSWER)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert atoms(accountant.event) == atoms(Composed([Repeated(CHECK, 4), ANSWER]))
