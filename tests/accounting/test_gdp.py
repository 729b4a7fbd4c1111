"""μ: exact for Gaussians, and called an approximation elsewhere."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import gaussian_delta

from accounting import (
    Composed,
    Gaussian,
    GNMax,
    Laplace,
    NonPrivate,
    PoissonSampled,
    PrivacyAccountant,
    Repeated,
    UnsupportedEvent,
    UserError,
)
from accounting.gdp import (
    advantage_of_mu,
    approximate_mu_by_clt,
    delta_of_mu,
    epsilon_of_mu,
    equivalent_mu,
    gaussian_mu,
    mu_of,
    mu_of_advantage,
    mu_of_tpr,
    tpr_of_mu,
    tradeoff_of_mu,
)
from accounting.tradeoff import attack_advantage, tpr_at_fpr


def test_mu_of_compositions() -> None:
    assert gaussian_mu(Gaussian(2.0)) == 0.5
    assert gaussian_mu(Repeated(Gaussian(2.0), 16)) == pytest.approx(2.0, rel=1e-14)
    assert gaussian_mu(Composed([Gaussian(1.0), Repeated(Gaussian(3.0), 9)])) == pytest.approx(math.sqrt(2))
    assert gaussian_mu(Gaussian(2.0), neighboring_relation="replace-one") == 1.0
    assert gaussian_mu(GNMax(math.sqrt(2))) == pytest.approx(1.0)
    assert gaussian_mu(Composed([])) == 0.0
    assert gaussian_mu(PoissonSampled(Gaussian(1.0), 1.0)) == 1.0
    assert gaussian_mu(NonPrivate()) == math.inf


@pytest.mark.parametrize(
    "event", [PoissonSampled(Gaussian(1.0), 0.5), Laplace(1.0), Composed([Gaussian(1.0), Laplace(1.0)])]
)
def test_what_is_not_gaussian_has_no_mu(event: object) -> None:
    with pytest.raises(UnsupportedEvent, match="tradeoff_curve"):
        gaussian_mu(event)  # type: ignore[arg-type]


@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0, 5.0, 30.0])
def test_epsilon_and_delta(mu: float) -> None:
    for epsilon in (0.0, 0.5 * mu, mu**2 / 2 + 3 * mu):
        exact = gaussian_delta(1 / mu, 1.0, epsilon)
        delta = delta_of_mu(mu, epsilon)
        assert delta == pytest.approx(float(exact), rel=1e-10)
        if 0 < delta < 1:
            assert mu_of(epsilon, delta) == pytest.approx(mu, rel=1e-9)
            if epsilon:
                assert epsilon_of_mu(mu, delta) == pytest.approx(epsilon, rel=1e-9)


def test_the_ends() -> None:
    assert delta_of_mu(0.0, 1.0) == 0.0
    assert epsilon_of_mu(0.0, 1e-5) == 0.0
    assert epsilon_of_mu(1e-6, 0.1) == 0.0
    assert mu_of(0.0, 0.1) == pytest.approx(mu_of_advantage(0.1), rel=1e-9)
    assert tradeoff_of_mu(1.0, 0.0) == 1.0
    assert tradeoff_of_mu(1.0, 1.0) == 0.0
    assert tradeoff_of_mu(0.0, 0.3) == pytest.approx(0.7)
    assert tpr_of_mu(3.0, 0.0) == 0.0


@given(mu=st.floats(1e-3, 6), alpha=st.floats(1e-6, 0.999))
def test_attacks(mu: float, alpha: float) -> None:
    power = tpr_of_mu(mu, alpha)
    with mp.workdps(40):
        quantile = mp.sqrt(2) * mp.erfinv(2 * mp.mpf(alpha) - 1)
        assert power == pytest.approx(float(mp.ncdf(quantile + mp.mpf(mu))), rel=1e-12)
        assert advantage_of_mu(mu) == pytest.approx(float(2 * mp.ncdf(mp.mpf(mu) / 2) - 1), rel=1e-12)
    assert tradeoff_of_mu(mu, alpha) == pytest.approx(1 - power, abs=1e-15)
    assert mu_of_advantage(advantage_of_mu(mu)) == pytest.approx(mu, rel=1e-6)
    if power < 1 - 1e-9:
        assert mu_of_tpr(alpha, power) == pytest.approx(mu, rel=1e-5)
    low, high = tpr_at_fpr(Gaussian(1 / mu), alpha)
    assert low * (1 - 1e-12) <= power <= high * (1 + 1e-12)
    low, high = attack_advantage(Gaussian(1 / mu))
    assert low <= advantage_of_mu(mu) <= high


def test_a_tpr_that_guessing_reaches() -> None:
    assert mu_of_tpr(0.2, 0.1) == 0.0


@pytest.mark.parametrize("delta", [1e-8, 1e-5, 1e-2])
def test_equivalent_mu_has_the_same_epsilon_and_is_exact_for_gaussians(delta: float) -> None:
    assert equivalent_mu(Repeated(Gaussian(4.0), 9), delta) == pytest.approx(0.75, rel=1e-6)
    event = Repeated(PoissonSampled(Gaussian(1.0), 0.01), 2000)
    accountant = PrivacyAccountant()
    accountant.record(event)
    mu = equivalent_mu(event, delta)
    assert epsilon_of_mu(mu, delta) == pytest.approx(accountant.epsilon(delta), rel=1e-9)
    assert equivalent_mu(NonPrivate(), delta) == math.inf


def test_equivalent_mu_where_epsilon_is_zero() -> None:
    mu = equivalent_mu(PoissonSampled(Gaussian(1.0), 0.01), 0.05)
    assert mu == pytest.approx(mu_of_advantage(0.05), rel=1e-9)


def test_the_limit_is_an_approximation_that_understates() -> None:
    sigma, q, steps = 1.0, 0.01, 2000
    mu = approximate_mu_by_clt(sigma, q, steps)
    assert mu == pytest.approx(q * math.sqrt(steps * (math.e - 1)), rel=1e-14)
    event = Repeated(PoissonSampled(Gaussian(sigma), q), steps)
    # Not a bound: in the tail, the certified lower bound is above it.
    low, _ = tpr_at_fpr(event, 1e-6)
    assert tpr_of_mu(mu, 1e-6) < low
    # But near in the middle, and in the limit.
    low, high = attack_advantage(event)
    assert advantage_of_mu(mu) == pytest.approx(high, rel=0.02)
    many = Repeated(PoissonSampled(Gaussian(5.0), 1e-3), 10**6)
    assert advantage_of_mu(approximate_mu_by_clt(5.0, 1e-3, 10**6)) == pytest.approx(
        attack_advantage(many)[1], rel=3e-3
    )
    assert approximate_mu_by_clt(1.0, 0.5, 0) == 0.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: delta_of_mu(-1.0, 1.0),
        lambda: delta_of_mu(1.0, -1.0),
        lambda: delta_of_mu(math.nan, 1.0),
        lambda: epsilon_of_mu(1.0, 0.0),
        lambda: epsilon_of_mu(1e9, 0.1),
        lambda: mu_of(1.0, 1.0),
        lambda: mu_of(1e8, 0.1),
        lambda: tpr_of_mu(1.0, 1.5),
        lambda: mu_of_tpr(0.0, 0.5),
        lambda: mu_of_advantage(1.0),
        lambda: approximate_mu_by_clt(1.0, 2.0, 10),
        lambda: approximate_mu_by_clt(1e-3, 0.1, 10),
        lambda: approximate_mu_by_clt(1.0, 0.1, 1.5),  # type: ignore[arg-type]
        lambda: equivalent_mu(Gaussian(1.0), 0.0),
        lambda: gaussian_mu("x"),  # type: ignore[arg-type]
    ],
)
def test_mistakes_take_one_line(call: object) -> None:
    with pytest.raises(UserError) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
