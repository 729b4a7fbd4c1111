"""Attacks on the budget: mechanisms that are chosen after looking at what earlier ones gave away.

The Rényi filter has to hold against every policy. Backward induction finds the strongest one, so for these
menus of small mechanisms its promise is checked against the worst that exists, not against a sample of
attackers.

The same attackers break the rule that suggests itself: after each release compose the privacy-loss
distributions of all that was run so far, and admit the next mechanism while the composed δ(ε) is within the
budget. `test_why_composing_what_was_spent_is_no_filter` does it by hand, in rational numbers.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from adversary import (
    History,
    Mechanism,
    Number,
    Policy,
    Rule,
    Spent,
    failing,
    hockey_stick,
    leaves,
    loss_of,
    randomised_response,
    rare,
    spend,
    spent_by,
    strongest,
)
from scipy import stats

from accounting import Event, Gaussian, Laplace, PrivacyAccountant, PrivacyBudget
from accounting.filter import FILTER_ORDERS, RenyiFilter


def renyi_rule(menu: Sequence[Mechanism], budget: PrivacyBudget) -> Rule:
    """The filter's rule for mechanisms that are no events: exact divergences, summed, at any order."""
    thresholds = RenyiFilter(budget).thresholds
    divergences = np.array([mechanism.divergence(FILTER_ORDERS) for mechanism in menu])

    def admits(spent: Spent) -> bool:
        used = [count * rho for count, rho in zip(spent, divergences, strict=True) if count]
        return bool(np.any(np.sum(used, axis=0) <= thresholds))

    return admits


def composing_rule(menu: Sequence[Mechanism], factor: Number, delta: Number) -> Rule:
    """The tempting rule: δ at e^ε = `factor` of what was run, as if it had been planned, is within δ."""

    @functools.cache
    def composed(spent: Spent) -> dict[tuple[int, ...], tuple[Number, Number]]:
        """(P, Q) by how often each outcome of each mechanism came up."""
        last = next((i for i in reversed(range(len(menu))) if spent[i]), None)
        if last is None:
            return {(0,) * sum(len(m.p) for m in menu): (1, 1)}
        before = composed(tuple(count - (i == last) for i, count in enumerate(spent)))
        start = sum(len(m.p) for m in menu[:last])
        together: dict[tuple[int, ...], tuple[Number, Number]] = {}
        for key, (p, q) in before.items():
            for outcome, (a, b) in enumerate(zip(menu[last].p, menu[last].q, strict=True)):
                into = tuple(n + (i == start + outcome) for i, n in enumerate(key))
                old = together.get(into, (0, 0))
                together[into] = (old[0] + p * a, old[1] + q * b)
        return together

    return lambda spent: max(hockey_stick(list(composed(spent).values()), factor)) <= delta


def worst(menu: Sequence[Mechanism], admits: Rule, epsilon: float, depth: int) -> float:
    """The δ(ε) that the strongest policy reaches, of the direction in which it is larger."""
    swapped = [mechanism.swapped for mechanism in menu]
    return max(strongest(side, admits, epsilon, depth)[0] for side in (menu, swapped))


# ---------------------------------------------------------------- the rule that is no filter


def test_why_composing_what_was_spent_is_no_filter() -> None:
    """Three randomised responses with odds 6/5, (6/5)² and (6/5)³; the budget is ε = 2·log(6/5), δ = 0.1065.

    Two plans fit the budget: {1st, 3rd} composes to δ = 36/341 = 0.1056, and {1st, 2nd, 2nd} to
    δ = 396/3721 = 0.1064. Both begin with the 1st. If that points to P, go on with the first plan, else with
    the second. On every branch what was run composes to at most 0.1065, so the rule admits all of it. But of
    each plan only the half is run in which it does more harm, and the whole has δ = 0.1320.
    """
    r = Fraction(6, 5)
    menu = [randomised_response(r**k) for k in (1, 2, 3)]
    delta = Fraction(1065, 10_000)
    admits = composing_rule(menu, r**2, delta)
    assert admits((1, 0, 1))
    assert admits((1, 2, 0))
    assert not admits((1, 1, 1))

    def policy(history: History) -> int:
        if not history:
            return 0
        return 2 if history[0] == (0, 0) else 1

    ends = leaves(menu, admits, policy, depth=3)
    assert len(ends) == 6
    assert sum(p for p, _ in ends) == sum(q for _, q in ends) == 1
    reached = hockey_stick(ends, r**2)[0]
    assert reached == Fraction(167_436, 1_268_861)
    assert reached > Fraction(123, 100) * delta
    # Backward induction finds this policy by itself, and nothing better in three steps.
    assert strongest(menu, admits, 2 * math.log(r), depth=3)[0] == pytest.approx(float(reached), rel=1e-9)
    # The filter, with the same menu and budget, holds.
    budget = PrivacyBudget(2 * math.log(r), float(delta))
    assert worst(menu, renyi_rule(menu, budget), budget.epsilon, depth=12) <= budget.delta


@pytest.mark.parametrize(
    ("menu_epsilons", "budget", "depth", "factor"),
    [
        ((0.05, 0.10, 0.25), PrivacyBudget(0.4, 0.00192), 16, 1.8),
        ((0.10, 0.40), PrivacyBudget(2.0, 1e-6), 30, 1.5),
        ((0.10, 0.20), PrivacyBudget(0.2, 0.0279), 6, 1.2),
    ],
)
def test_composing_what_was_spent_exceeds_the_budget(
    menu_epsilons: tuple[float, ...], budget: PrivacyBudget, depth: int, factor: float
) -> None:
    """At budgets as they are used, the strongest policy takes up to 1.8 times the δ that was allowed."""
    menu = [randomised_response(math.exp(epsilon)) for epsilon in menu_epsilons]
    naive = composing_rule(menu, math.exp(budget.epsilon), budget.delta)
    assert strongest(menu, naive, budget.epsilon, depth)[0] > factor * budget.delta
    assert worst(menu, renyi_rule(menu, budget), budget.epsilon, depth) <= budget.delta


# ---------------------------------------------------------------- the Rényi filter holds

BUDGETS = [
    PrivacyBudget(0.5, 0.2),
    PrivacyBudget(1.0, 0.05),
    PrivacyBudget(2.0, 0.05),
    PrivacyBudget(2.0, 1e-3),
    PrivacyBudget(3.0, 1e-6),
]
MENUS = {
    "binary": [randomised_response(math.exp(epsilon)) for epsilon in (0.1, 0.3, 0.8)],
    "k-ary": [randomised_response(1.12**k, outcomes) for k, outcomes in ((1, 2), (2, 3), (3, 5))],
    "rare": [rare(0.01, 1.5), rare(0.01, 1.5).swapped, rare(1e-8, 3.5), randomised_response(1.2)],
    "failing": [failing(1.2, 1e-3), randomised_response(1.14), rare(1e-4, 5.0)],
}


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("name", MENUS)
def test_the_filter_holds_against_the_strongest_policy(name: str, budget: PrivacyBudget) -> None:
    """It gets somewhere, so nothing here is trivial, and it stays far below the budget."""
    menu = MENUS[name]
    assert 0 < worst(menu, renyi_rule(menu, budget), budget.epsilon, depth=24) <= budget.delta


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_the_filter_holds_against_mechanisms_made_to_measure(budget: PrivacyBudget) -> None:
    """For each order a mechanism that uses up its threshold at once, where the order's conversion is tight.

    Each of them alone reaches about δ/|Λ|. Randomised responses beside them let the attacker first gather an
    advantage.
    """
    share = budget.delta / len(FILTER_ORDERS)
    menu = []
    for order, threshold in zip(FILTER_ORDERS, RenyiFilter(budget).thresholds, strict=True):
        if threshold > 0 and order * share < 0.1:
            loss = budget.epsilon + math.log(order / (order - 1))
            # D_α of a rare event is log(1 + p·e^{(α−1)·loss} + …)/(α−1).
            excess = (order - 1) * threshold
            log_probability = excess + math.log(-math.expm1(-excess)) - (order - 1) * loss
            menu.append(rare(0.9 * math.exp(log_probability), loss))
    menu = [*menu[::2], *(m.swapped for m in menu[1::4]), randomised_response(1.1), randomised_response(1.4)]
    assert 0.5 * share < worst(menu, renyi_rule(menu, budget), budget.epsilon, depth=5) <= budget.delta


def test_the_same_attack_breaks_thresholds_that_forget_the_conversion() -> None:
    """Divergences may add up to less than ε, not to ε: otherwise nothing would pay for δ."""
    menu, budget = MENUS["binary"], PrivacyBudget(1.0, 0.05)
    divergences = np.array([mechanism.divergence(FILTER_ORDERS) for mechanism in menu])

    def admits(spent: Spent) -> bool:
        return bool(np.any(np.array(spent) @ divergences <= budget.epsilon))

    assert worst(menu, admits, budget.epsilon, depth=14) > budget.delta


def test_a_mechanism_that_may_fail_outright_is_never_admitted() -> None:
    menu = [failing(1.01, 1e-12)]
    assert not renyi_rule(menu, PrivacyBudget(100.0, 0.5))((1,))


def _ahead_or(menu: Sequence[Mechanism], admits: Rule, behind: int | None, sign: int) -> Policy:
    """Spend the most while the loss leans to one side, else `behind`."""

    def policy(history: History) -> int | None:
        spent = spent_by(history, menu)
        allowed = [i for i in range(len(menu)) if admits(spend(spent, i))]
        if sign * loss_of(history, menu) < 0:
            return behind
        return max(allowed, key=lambda i: max(menu[i].losses), default=None)

    return policy


def _whimsical(menu: Sequence[Mechanism], admits: Rule, seed: int) -> Policy:
    """Another arbitrary choice for each history."""

    def policy(history: History) -> int | None:
        spent = spent_by(history, menu)
        allowed = [i for i in range(len(menu)) if admits(spend(spent, i))]
        return random.Random(repr((seed, history))).choice(allowed) if allowed else None

    return policy


@pytest.mark.parametrize("budget", [PrivacyBudget(0.5, 0.2), PrivacyBudget(0.6, 0.2)], ids=str)
@pytest.mark.parametrize("name", ["binary", "k-ary", "rare"])
def test_the_filter_holds_on_the_whole_tree_of_any_policy(name: str, budget: PrivacyBudget) -> None:
    """Greedy, cautious, contrary and arbitrary policies, in both directions; none beats the strongest."""
    menu, depth = MENUS[name], 6
    admits = functools.cache(renyi_rule(menu, budget))
    most, best = strongest(menu, admits, budget.epsilon, depth)
    swapped = [mechanism.swapped for mechanism in menu]
    most_back = strongest(swapped, admits, budget.epsilon, depth)[0]
    policies = [_ahead_or(menu, admits, behind, sign) for behind in (None, 0, 1) for sign in (1, -1)]
    policies += [_whimsical(menu, admits, seed) for seed in range(6)]
    for policy in [best, *policies]:
        ends = leaves(menu, admits, policy, depth)
        assert math.fsum(p for p, _ in ends) == pytest.approx(1, abs=1e-12)
        assert math.fsum(q for _, q in ends) == pytest.approx(1, abs=1e-12)
        reached, back = hockey_stick(ends, math.exp(budget.epsilon))
        assert reached <= most * (1 + 1e-8) + 1e-15
        assert back <= most_back * (1 + 1e-8) + 1e-15
        assert max(reached, back) <= budget.delta
        if policy is best:
            assert reached == pytest.approx(most, rel=1e-8, abs=1e-15)


# ---------------------------------------------------------------- through the accountant


def _binned(event: Event, cuts: Sequence[float]) -> Mechanism:
    """What is left of an event's output, with the true value 1 or 0, if only its bin is looked at."""
    assert isinstance(event, Gaussian | Laplace)
    noise = stats.norm if isinstance(event, Gaussian) else stats.laplace
    edges = np.array([-np.inf, *cuts, np.inf])
    p, q = (np.diff(noise.cdf(edges, loc=x, scale=event.noise_multiplier)) for x in (1.0, 0.0))
    return Mechanism(tuple(map(float, p)), tuple(map(float, q)))


@pytest.mark.parametrize(
    ("budget", "cuts"),
    [
        (PrivacyBudget(0.5, 0.2), (0.5,)),
        (PrivacyBudget(1.0, 0.05), (0.5,)),
        (PrivacyBudget(1.5, 0.02), (0.0, 1.0)),
    ],
    ids=str,
)
def test_the_accountant_holds_its_budget(budget: PrivacyBudget, cuts: tuple[float, ...]) -> None:
    """The attacker asks `PrivacyAccountant` itself, for Laplace or Gaussian noise, and sees bins."""
    events = [Laplace(8.0), Laplace(3.0), Gaussian(6.0)]
    menu = [_binned(event, cuts) for event in events]

    @functools.cache
    def admits(spent: Spent) -> bool:
        accountant = PrivacyAccountant(budget=budget)
        for event in itertools.chain.from_iterable([e] * n for e, n in zip(events, spent, strict=True)):
            if not accountant.fits(event):
                return False
            accountant.record(event)
        return True

    reached = worst(menu, admits, budget.epsilon, depth=8)
    assert reached <= budget.delta
    assert reached > 0
