"""Data-dependent prices of PATE: as the papers state them, and never below the exact divergence."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pate_oracle as oracle
import pytest
from scipy.special import log_ndtr

from accounting import PrivacyAccountant, Repeated
from accounting.errors import UserError
from accounting.events import Composed, Event
from accounting.pate import (
    DataDependentDiagnostic,
    confident_gnmax_rdp,
    data_dependent_rdp,
    diagnose_confident_gnmax,
    diagnose_gnmax,
    diagnose_lnmax,
    gnmax_log_q,
    gnmax_rdp,
    lnmax_log_q,
    lnmax_rdp,
    moments_epsilon,
    threshold_log_q,
    threshold_rdp,
)
from accounting.rdp import ORDERS, epsilon_from_rdp

CASES = 400


def random_votes(rng: np.random.Generator, classes: int) -> np.ndarray:
    """One row: anything from a tie to agreement, of 3 to 3,000 teachers."""
    teachers = int(np.exp(rng.uniform(np.log(3), np.log(3000))))
    agreement = rng.choice([0.0, 0.3, 0.8, 0.97, 1.0])
    share = agreement * np.eye(classes)[rng.integers(classes)] + (1 - agreement) / classes
    return rng.multinomial(teachers, share / share.sum())


# ---- The papers' propositions ------------------------------------------------------------------------


def test_gnmax_is_propositions_7_8_10_and_theorem_6() -> None:
    rng = np.random.default_rng(1)
    helped = 0
    for _ in range(CASES):
        votes = random_votes(rng, int(rng.integers(2, 11)))
        sigma = float(np.exp(rng.uniform(np.log(0.3), np.log(votes.sum()))))
        order = float(1 + np.exp(rng.uniform(-4, 4)))
        log_q = gnmax_log_q([votes], sigma)[0]
        assert log_q == pytest.approx(float(oracle.gnmax_log_q(votes.tolist(), sigma)), rel=1e-11, abs=1e-13)
        truth, better = oracle.gnmax_rdp(votes.tolist(), sigma, order)
        [[got]] = gnmax_rdp([votes], sigma, [order])
        assert got == pytest.approx(float(truth), rel=1e-8, abs=1e-299)
        assert got >= float(truth) * (1 - 1e-13)
        helped += better
    assert 0.25 * CASES < helped < 0.9 * CASES  # both branches were met


def test_the_threshold_check_is_theorem_6_on_its_likelier_outcome() -> None:
    rng = np.random.default_rng(2)
    helped = 0
    for _ in range(CASES // 2):
        votes = random_votes(rng, int(rng.integers(2, 11)))
        threshold = float(rng.uniform(0, 1.5) * votes.sum())
        sigma = float(np.exp(rng.uniform(np.log(0.3), np.log(votes.sum()))))
        order = float(1 + np.exp(rng.uniform(-4, 4)))
        truth, better = oracle.threshold_rdp(votes.tolist(), threshold, sigma, order)
        [[got]] = threshold_rdp([votes], threshold, sigma, [order])
        assert got == pytest.approx(float(truth), rel=1e-8, abs=1e-299)
        assert got <= order / (2 * sigma**2) * (1 + 1e-12)
        helped += better
    assert 0.1 * CASES < helped < 0.45 * CASES


def test_lnmax_is_lemma_4_and_theorems_2_and_3() -> None:
    rng = np.random.default_rng(3)
    helped = 0
    for _ in range(CASES):
        votes = random_votes(rng, int(rng.integers(2, 11)))
        scale = float(np.exp(rng.uniform(np.log(0.3), np.log(votes.sum()))))
        order = float(1 + np.exp(rng.uniform(-4, 4)))
        truth, better = oracle.lnmax_rdp(votes.tolist(), scale, order)
        [[got]] = lnmax_rdp([votes], scale, [order])
        assert got == pytest.approx(float(truth), rel=1e-8, abs=1e-299)
        assert got >= float(truth) * (1 - 1e-13)
        helped += better
    assert 0.25 * CASES < helped < 0.9 * CASES


def test_queries_are_rows_and_do_not_mix() -> None:
    rng = np.random.default_rng(4)
    votes = np.array([rng.multinomial(100, p) for p in rng.dirichlet(np.full(5, 0.3), 3000)])
    orders = [1.5, 8.0, 30.0]
    together = gnmax_rdp(votes, 8.0, orders)
    assert together.shape == (3000, 3)
    for row in (0, 17, 2999):
        assert np.array_equal(together[row], gnmax_rdp(votes[row : row + 1], 8.0, orders)[0])
        assert np.array_equal(together[row], gnmax_rdp([votes[row, ::-1]], 8.0, orders)[0])
    assert diagnose_gnmax(votes, 8.0, orders).rdp == pytest.approx(together.sum(axis=0), rel=1e-12)
    assert diagnose_lnmax(votes, 8.0, orders).rdp == pytest.approx(
        lnmax_rdp(votes, 8.0, orders).sum(axis=0), rel=1e-12
    )


# ---- Edges -------------------------------------------------------------------------------------------


def test_agreement_that_underflows_every_double_keeps_its_logarithm() -> None:
    log_q = gnmax_log_q([[50_000, 0]], 79.0)[0]
    assert log_q == pytest.approx(float(oracle.gnmax_log_q([50_000, 0], 79.0)), rel=1e-12)
    assert log_q < -1e5
    price = gnmax_rdp([[50_000, 0]], 79.0, ORDERS)
    assert np.all(price > 0)
    assert np.all(price[:, ORDERS < 1000] < 1e-30)
    assert lnmax_log_q([[10**9, 0]], 1e-3)[0] == pytest.approx(-1e12, rel=1e-6)
    assert np.all(lnmax_rdp([[10**9, 0]], 1e-3, [1.5, 20.0]) < 1e-200)


def test_a_tie_costs_what_any_votes_may_cost() -> None:
    assert gnmax_log_q([[7, 7]], 3.0)[0] == pytest.approx(math.log(0.5))
    assert gnmax_log_q([[7, 7, 0, 7]], 3.0)[0] >= 0  # a union bound may exceed one
    orders = np.array([1.01, 2.0, 50.0])
    for votes in ([[7, 7]], [[7, 7, 0, 7]], [[1, 0, 0]]):
        assert gnmax_rdp(votes, 3.0, orders)[0] == pytest.approx(orders / 9.0)
        assert lnmax_rdp(votes, 20.0, orders)[0] == pytest.approx(np.minimum(0.1, 0.005 * orders))


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 1e9])
def test_extreme_noise_gives_bounds(sigma: float) -> None:
    votes = [[10, 0], [6, 5], [5, 5], [10**9, 1]]
    price = gnmax_rdp(votes, sigma, ORDERS)
    assert np.all((price >= 0) & (price <= ORDERS / sigma**2))
    assert np.all(np.isfinite(price))
    both = confident_gnmax_rdp(votes, sigma, 8, sigma, ORDERS)
    assert np.all((both >= price) & (both <= 1.5 * ORDERS / sigma**2 * (1 + 1e-12)))


def test_no_queries_cost_nothing() -> None:
    assert gnmax_rdp(np.empty((0, 3)), 1.0, [2.0]).shape == (0, 1)
    assert diagnose_gnmax(np.empty((0, 3)), 1.0).epsilon(1e-5) == epsilon_from_rdp(
        np.zeros(len(ORDERS)), 1e-5
    )


@pytest.mark.parametrize(
    "votes",
    [
        [[5], [4]],
        [5, 4],
        [[5, math.nan]],
        [[5, math.inf]],
        [[5, -1]],
        [[0, 0], [1, 2]],
        [["a", "b"]],
        [[True, False]],
        [[1, 2], [3]],
        [[1e300, 0]],
        None,
    ],
)
def test_wrong_votes_are_refused_in_one_line(votes: object) -> None:
    for call in (
        lambda: gnmax_rdp(votes, 1.0),  # type: ignore[arg-type]
        lambda: lnmax_rdp(votes, 1.0),  # type: ignore[arg-type]
        lambda: diagnose_confident_gnmax(votes, 1.0, 3, 1.0),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_other_wrong_arguments_are_refused() -> None:
    votes = [[5, 1]]
    for sigma in (0, -1.0, math.nan, math.inf, "2", 1e-9):
        with pytest.raises(UserError, match="noise_std"):
            gnmax_rdp(votes, sigma)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="noise_scale"):
            lnmax_rdp(votes, sigma)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="threshold_std"):
            threshold_rdp(votes, 3, sigma)  # type: ignore[arg-type]
    for orders in ([1.0], [0.5, 2.0], [math.nan], 3.0, [math.inf]):
        with pytest.raises(UserError, match="orders"):
            gnmax_rdp(votes, 1.0, orders)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="threshold"):
        threshold_rdp(votes, math.nan, 1.0)
    for answered in ([True, False], [1], "yes"):
        with pytest.raises(UserError, match="answered"):
            confident_gnmax_rdp(votes, 1.0, 3, 1.0, answered=answered)
    with pytest.raises(UserError, match="Log-prob"):
        data_dependent_rdp([math.nan], 1.0)
    with pytest.raises(UserError, match="delta"):
        moments_epsilon(votes, 1.0, 1.0)


# ---- Truth: exact output distributions ---------------------------------------------------------------


def test_q_bounds_the_true_probability() -> None:
    rng = np.random.default_rng(5)
    for votes in ([9, 4], [12, 9, 7], [10, 10, 1], [30, 5, 5, 5, 5]):
        for scale in (1.0, 4.0):
            for noise, bound in (("gaussian", gnmax_log_q), ("laplace", lnmax_log_q)):
                exact = oracle.outcomes(votes, scale, noise)  # type: ignore[arg-type]
                assert exact.sum() == pytest.approx(1, rel=1e-10)
                missed = np.sort(exact)[:-1].sum()
                q = math.exp(bound([votes], scale)[0])
                assert missed <= q * (1 + 1e-9)
                assert q <= missed * len(votes)  # a union bound over classes - 1 events
                if len(votes) == 2:
                    assert q == pytest.approx(missed, rel=1e-7)
    # The quadrature itself, against simulation: 10⁶ draws, six standard deviations.
    drawn = np.argmax([12, 9, 7] + 4.0 * rng.standard_normal((1_000_000, 3)), axis=1)
    exact = oracle.outcomes([12, 9, 7], 4.0)
    assert np.bincount(drawn) / 1e6 == pytest.approx(exact, abs=6 * 0.0005)


@pytest.mark.parametrize(
    "votes", [(12, 0), (9, 3), (7, 5), (6, 6), (12, 0, 0), (9, 2, 1), (6, 3, 3), (5, 5, 2)]
)
def test_no_neighbour_is_further_away_than_the_bound(votes: tuple[int, ...]) -> None:
    orders = np.array([1.05, 1.5, 2.0, 3.0, 6.0, 20.0])
    for scale in (0.7, 1.5, 3.0, 10.0):
        for noise, bound in (
            ("gaussian", gnmax_rdp([votes], scale, orders)[0]),
            ("laplace", lnmax_rdp([votes], scale, orders)[0]),
        ):
            here = oracle.outcomes(votes, scale, noise)  # type: ignore[arg-type]
            for other in oracle.neighbours(votes):
                there = oracle.outcomes(other, scale, noise)  # type: ignore[arg-type]
                exact = np.array([oracle.renyi(here, there, a) for a in orders])
                assert np.all(exact <= bound * (1 + 1e-9) + 1e-13)


def test_the_bound_is_not_idle() -> None:
    """Where teachers agree it is far below the data-independent price, and yet not far above the truth."""
    votes, sigma, order = (12, 0), 2.0, 3.0
    [[bound]] = gnmax_rdp([votes], sigma, [order])
    exact = oracle.renyi(oracle.outcomes(votes, sigma), oracle.outcomes((11, 1), sigma), order)
    assert bound < 0.05 * order / sigma**2
    assert bound / 100 < exact < bound


def test_no_neighbour_of_a_check_is_further_away_than_the_bound() -> None:
    orders = np.array([1.05, 2.0, 6.0, 20.0])
    helped = 0
    for largest in range(6, 13):
        for threshold in (2.0, 7.5, 9.0, 14.0):
            for sigma in (0.8, 2.0, 5.0):
                [bound] = threshold_rdp([[largest, 12 - largest]], threshold, sigma, orders)
                helped += int((bound < orders / (2 * sigma**2) * 0.999).sum())
                for other in (largest - 1, largest + 1):
                    p = np.exp(log_ndtr(np.array([1, -1]) * (largest - threshold) / sigma))
                    q = np.exp(log_ndtr(np.array([1, -1]) * (other - threshold) / sigma))
                    exact = np.array([oracle.renyi(p, q, a) for a in orders])
                    assert np.all(exact <= bound * (1 + 1e-9) + 1e-13)
    assert helped > 50


# ---- Confident-GNMax ---------------------------------------------------------------------------------


def test_a_refused_query_pays_for_its_check_alone() -> None:
    votes = [[90, 10], [55, 45], [70, 30]]
    orders = [2.0, 10.0]
    checks, answers = threshold_rdp(votes, 60, 10.0, orders), gnmax_rdp(votes, 5.0, orders)
    whole = confident_gnmax_rdp(votes, 5.0, 60, 10.0, orders)
    assert whole == pytest.approx(checks + answers)
    spent = confident_gnmax_rdp(votes, 5.0, 60, 10.0, orders, answered=[True, False, True])
    assert spent[[0, 2]] == pytest.approx(whole[[0, 2]])
    assert spent[1] == pytest.approx(checks[1])
    assert np.all(checks > 0)
    total = diagnose_confident_gnmax(votes, 5.0, 60, 10.0, orders, answered=[True, False, True])
    assert total.rdp == pytest.approx(spent.sum(axis=0))


def test_the_check_says_how_likely_its_rarer_outcome_is() -> None:
    log_q = threshold_log_q([[90, 10], [60, 40], [30, 20]], 60, 10.0)
    assert np.exp(log_q) == pytest.approx([0.0013498980316301, 0.5, 0.0013498980316301], rel=1e-10)


# ---- LNMax, as published -----------------------------------------------------------------------------


def test_the_moments_accountant_of_2017() -> None:
    """100 queries at scale 20, δ = 1e-5: MNIST of Papernot et al. 2017.

    The paper reports 5.80 by strong composition and 2.04 by its data-dependent moments. Its strong
    composition is reproduced from 2/b alone. Its 2.04 needs the votes of its teachers, which are not here;
    what is tested is the formula at votes of which both ends are known, and which votes give 2.04.
    """
    steps, gamma, delta = 100, 1 / 20, 1e-5
    strong = 4 * steps * gamma**2 + 2 * gamma * math.sqrt(2 * steps * math.log(1 / delta))
    assert round(strong, 2) == 5.80

    tied = np.tile([125, 125], (steps, 1))
    # min over λ of (Σ 2γ²λ(λ+1) + log 1/δ)/λ, at λ = 5
    assert round(moments_epsilon(tied, 20, delta), 2) == 5.30
    # With 8 moments nothing below log(1/δ)/8 can be reported, however much the teachers agree.
    agreed = np.tile([250] + 9 * [0], (steps, 1))
    assert math.log(1 / delta) / 8 < moments_epsilon(agreed, 20, delta) < math.log(1 / delta) / 8 + 0.01
    # If all 100 queries had the same votes, 2.04 would be 145 or 146 of 250 for the plurality.
    margin = [
        np.tile([145] + 6 * [12] + 3 * [11], (steps, 1)),
        np.tile([146] + 5 * [12] + 4 * [11], (steps, 1)),
    ]
    looser, tighter = (moments_epsilon(votes, 20, delta) for votes in margin)
    assert tighter < 2.04 < looser

    for votes in (tied, agreed, *margin):
        modern = diagnose_lnmax(votes, 20).epsilon(delta)
        assert modern < moments_epsilon(votes, 20, delta)
        every_moment = moments_epsilon(votes, 20, delta, moments=500)
        assert modern < every_moment <= moments_epsilon(votes, 20, delta)


# ---- What a diagnostic is not ------------------------------------------------------------------------


def test_a_diagnostic_is_no_event_and_cannot_be_spent_or_stored() -> None:
    diagnostic = diagnose_gnmax([[90, 10]], 5.0)
    assert diagnostic.not_private is True
    assert not isinstance(diagnostic, Event)
    assert not hasattr(diagnostic, "to_dict")
    with pytest.raises(TypeError):
        json.dumps(diagnostic)
    for spend in (
        lambda: Repeated(diagnostic, 2),  # type: ignore[arg-type]
        lambda: Composed([diagnostic]),  # type: ignore[list-item]
        lambda: PrivacyAccountant().record(diagnostic),  # type: ignore[arg-type]
    ):
        with pytest.raises((UserError, TypeError)):
            spend()
    for text in (repr(diagnostic), str(diagnostic), f"{diagnostic}", f"{[diagnostic]}"):
        assert "NOT PRIVATE" in text
        assert not any(character.isdigit() for character in text)


def test_a_diagnostic_is_frozen_and_converts_as_everything_else() -> None:
    votes = np.array([[90, 10], [80, 20]])
    diagnostic = diagnose_gnmax(votes, 5.0)
    assert diagnostic.epsilon(1e-5) == epsilon_from_rdp(gnmax_rdp(votes, 5.0).sum(axis=0), 1e-5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        diagnostic.rdp = np.zeros(3)  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        diagnostic.rdp[0] = 0.0
    mine = np.array([1.0])
    kept = DataDependentDiagnostic(np.array([2.0]), mine)
    mine[0] = 5.0
    assert kept.rdp[0] == 1.0
    with pytest.raises(UserError, match="one RDP"):
        DataDependentDiagnostic(np.array([2.0, 3.0]), mine)
    with pytest.raises(UserError, match="delta"):
        diagnostic.epsilon(0)
