"""Lower bounds on ε against exact mechanisms: never above the truth more often than stated, and near it."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from accounting import UserError
from dpml.audit.bounds import (
    clopper_pearson,
    clopper_pearson_epsilon,
    gaussian_one_run_epsilon,
    gaussian_one_run_mu,
    guess_counts,
    one_run_epsilon,
    one_run_p_value,
    rates_epsilon,
    right_guesses,
)


def truth(epsilon):
    """How often randomised response tells the coin."""
    return 1 / (1 + math.exp(-epsilon))


# ---------------------------------------------------------------- one run, no assumption


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct"), [(1, 1, 1), (7, 5, 4), (20, 12, 12), (30, 30, 17)]
)
@pytest.mark.parametrize("delta", [0.0, 1e-4, 0.02])
def test_the_tail_of_the_theorem_in_exact_fractions(canaries, guesses, correct, delta):
    odds = Fraction(5, 2)
    p = odds / (1 + odds)
    mass = [math.comb(guesses, w) * p**w * (1 - p) ** (guesses - w) for w in range(guesses + 1)]
    tail = sum(mass[correct:])
    alpha = max(Fraction(sum(mass[max(0, correct - i) : correct]), i) for i in range(1, correct + 1))
    expected = min(1.0, float(tail + 2 * canaries * Fraction(delta) * alpha))
    found = one_run_p_value(canaries, guesses, correct, math.log(odds), delta)
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_numbers_that_the_paper_prints():
    # Steinke, Nasr & Jagielski 2023, Appendix D; the last one is that of Figure 11 (printed as 2.675).
    assert one_run_p_value(100, 100, 75, math.log(3), 0.0) == pytest.approx(0.553, abs=5e-4)
    assert one_run_epsilon(100, 100, 75, 0.0, 0.05) == pytest.approx(0.702, abs=5e-4)
    assert one_run_epsilon(100, 100, 75, 1e-4, 0.05) == pytest.approx(0.699, abs=5e-4)
    assert one_run_epsilon(1000, 100, 75, 1e-4, 0.05) == pytest.approx(0.673, abs=5e-4)
    assert one_run_epsilon(100_000, 1510, 1439, 1e-5, 0.05) == pytest.approx(2.6755, abs=5e-4)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("correct", [520, 600, 900, 1000])
def test_what_is_refuted_for_an_epsilon_is_refuted_for_all_smaller_ones(delta, correct):
    epsilons = np.linspace(0, 12, 200)
    values = [one_run_p_value(1000, 1000, correct, e, delta) for e in epsilons]
    bound = one_run_epsilon(1000, 1000, correct, delta, 1e-2)
    assert all(value <= 1e-2 for e, value in zip(epsilons, values, strict=True) if e < bound)
    assert all(value > 1e-2 for e, value in zip(epsilons, values, strict=True) if e > bound + 1e-4)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("guesses", [50, 400])
@pytest.mark.parametrize("beta", [0.05, 1e-4])
def test_randomised_response_is_bounded_rightly_in_all_but_beta(epsilon, guesses, beta):
    # Whether the bound is above the truth follows from the number of right guesses, whose law is known.
    right = np.arange(guesses + 1)
    above = np.array([one_run_epsilon(1000, guesses, v, 0.0, beta) > epsilon for v in right])
    wrong = stats.binom.pmf(right, guesses, truth(epsilon))[above].sum()
    assert wrong <= beta
    # It is no more cautious than a whole number of guesses forces it to be.
    assert wrong + stats.binom.pmf(right[~above][-1], guesses, truth(epsilon)) > beta


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0])
def test_randomised_response_of_many_canaries_is_bounded_tightly(epsilon):
    right = round(20_000 * truth(epsilon))
    assert 0.85 * epsilon < one_run_epsilon(20_000, 20_000, right, 0.0, 1e-4) < epsilon


@pytest.mark.parametrize("delta", [1e-4, 1e-2])
def test_mechanisms_that_fail_with_probability_delta(delta):
    epsilon, m, beta = 1.0, 150, 0.05
    right = np.arange(m + 1)
    above = np.array([one_run_epsilon(m, m, v, delta, beta) > epsilon for v in right])
    # Each coin is shown with probability δ, or else randomised.
    each = stats.binom.pmf(right, m, delta + (1 - delta) * truth(epsilon))[above].sum()
    # All coins are shown with probability δ, or else all randomised.
    together = delta + (1 - delta) * stats.binom.pmf(right, m, truth(epsilon))[above].sum()
    assert max(each, together) <= beta


def test_delta_costs_something_and_without_guesses_there_is_nothing():
    without, little, much = (one_run_epsilon(1000, 1000, 800, delta, 0.01) for delta in (0, 1e-5, 1e-3))
    assert without > little > much > 0
    assert one_run_epsilon(1000, 0, 0, 1e-5, 0.01) == 0
    assert one_run_epsilon(1000, 100, 50, 1e-5, 0.01) == 0
    # δ·m above the chance to be wrong: everything may have been shown by accident.
    assert one_run_epsilon(1000, 1000, 1000, 1e-2, 1e-4) == 0


# ---------------------------------------------------------------- one run, Gaussian


@pytest.mark.parametrize(("mu", "share"), [(0.5, 0.3), (2.0, 0.5)])
def test_gaussian_canaries_are_bounded_rightly_and_usefully(mu, share):
    # 300 runs of an exactly μ-GDP mechanism. At β = 0.05, more than 40 wrong ones have probability 1e-8.
    rng, m, guesses, runs, beta = np.random.default_rng(1), 400, 200, 300, 0.05
    bounds = []
    for _ in range(runs):
        coins = rng.random(m) < 0.5
        scores = rng.normal(size=m) + mu * coins
        right = right_guesses(scores, coins, guesses)
        bounds.append(gaussian_one_run_mu(m, guesses, right, beta))
    assert stats.binom.sf(40, runs, beta) < 1e-7
    assert (np.array(bounds) > mu).sum() <= 40
    assert np.mean(bounds) > share * mu


def test_the_family_makes_the_bound_sharper():
    free = one_run_epsilon(1000, 200, 195, 1e-7, 1e-3)
    assert gaussian_one_run_epsilon(1000, 200, 195, 1e-7, 1e-3) > 1.2 * free
    assert gaussian_one_run_epsilon(1000, 200, 100, 1e-7, 1e-3) == 0


# ---------------------------------------------------------------- many runs


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (70, 1000)])
def test_clopper_pearson_against_scipy(successes, trials):
    interval = stats.binomtest(successes, trials).proportion_ci(1 - 2 * 1e-3, method="exact")
    assert clopper_pearson(successes, trials, 1e-3) == pytest.approx(tuple(interval), abs=1e-12)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.0), (2.0, 0.0), (1.0, 0.05)])
def test_many_runs_of_randomised_response(epsilon, delta):
    # With both rates' laws known, the chance that the bound is above the truth is a finite sum.
    n, beta = 60, 0.05
    high = delta + (1 - delta) * truth(epsilon)
    says = np.arange(n + 1)
    above = [[clopper_pearson_epsilon(a, n, b, n, delta, beta) > epsilon for b in says] for a in says]
    wrong = stats.binom.pmf(says, n, high) @ np.array(above) @ stats.binom.pmf(says, n, 1 - high)
    assert wrong <= beta
    many = 100_000
    near = clopper_pearson_epsilon(round(many * high), many, round(many * (1 - high)), many, delta, 1e-4)
    assert 0.9 * epsilon < near <= epsilon


def test_rates_are_used_in_both_directions():
    assert rates_epsilon(0.5, 0.05, 0.0) == pytest.approx(math.log(10))
    assert rates_epsilon(0.95, 0.5, 0.0) == pytest.approx(math.log(10))
    assert rates_epsilon(0.5, 0.0, 0.1) == math.inf
    assert rates_epsilon(0.3, 0.4, 0.0) == 0
    assert rates_epsilon(0.1, 0.0, 0.2) == 0


# ---------------------------------------------------------------- guesses, mistakes


def test_guesses_are_made_from_both_ends():
    scores = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    coins = np.array([True, True, False, True, False, False])
    assert [right_guesses(scores, coins, r) for r in (2, 4, 5, 6)] == [2, 4, 4, 4]
    assert guess_counts(100) == [100, 50, 25]
    assert guess_counts(16) == [16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11, 5, 0.0, 0.1), "at most the next one"),
        ((10, 5, 6, 0.0, 0.1), "at most the next one"),
        ((10, 5, -1, 0.0, 0.1), "correct"),
        ((10, 5, 5, 1.5, 0.1), "delta"),
        ((10, 5, 5, math.nan, 0.1), "delta"),
        ((10, 5, 5, 0.0, 0.0), "beta"),
        (("ten", 5, 5, 0.0, 0.1), "canaries"),
    ],
)
def test_numbers_that_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        one_run_epsilon(*arguments)
    with pytest.raises(UserError, match="cannot be 5 of 4"):
        clopper_pearson_epsilon(5, 4, 0, 4, 0.0, 0.1)
