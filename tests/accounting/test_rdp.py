"""Rényi divergences and their conversion: never below the truth, and hardly above it."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting import rdp as google_rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    gaussian_delta,
    gaussian_moment,
    gaussian_moment_of_adding,
    google_epsilon,
    laplace_moment,
)

from accounting import Gaussian, Laplace, PoissonSampled, PrivacyAccountant, Repeated
from accounting.events import Atom
from accounting.rdp import (
    ORDERS,
    best_order,
    delta_from_rdp,
    epsilon_from_rdp,
    log_hockey_stick_factor,
    rdp,
)

FRACTIONAL = (1.001, 1.0095, 1.7, 4.3, 11.9)
WHOLE = (2, 5, 33, 256)
PROBABILITIES = (1e-8, 1e-4, 0.1, 0.9)


def divergence(atom: Atom, order: float) -> float:
    return float(rdp({atom: 1}, np.array([order], dtype=np.float64))[0])


def assert_tight(atom: Atom, order: float, moment: object, unsampled: float) -> None:
    """The divergence is at or above log(1 + moment)/(α−1) and within 1e-8 of it."""
    truth = float(mp.log1p(moment) / (mp.mpf(order) - 1))
    found = divergence(atom, order)
    assert found >= truth * (1 - 1e-15), f"below the truth by {found / truth - 1:.2e}"
    assert found <= min(truth * (1 + 1e-8) + 1e-9 / (order - 1), unsampled * (1 + 1e-15))


# ---------------------------------------------------------------- divergences against mpmath


@pytest.mark.parametrize("q", PROBABILITIES)
@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0, 3.9, 4.1, 30.0, 1000.0])
def test_sampled_gaussian_at_whole_orders(sigma: float, q: float) -> None:
    for order in WHOLE:
        atom, unsampled = Atom("gaussian", sigma, q), order / (2 * sigma**2)
        assert_tight(atom, order, gaussian_moment(sigma, q, order), unsampled)


@pytest.mark.parametrize("q", PROBABILITIES)
@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.9, 4.1, 1000.0])
def test_sampled_gaussian_at_fractional_orders(sigma: float, q: float) -> None:
    for order in FRACTIONAL:
        atom, unsampled = Atom("gaussian", sigma, q), order / (2 * sigma**2)
        assert_tight(atom, order, gaussian_moment(sigma, q, order), unsampled)


@pytest.mark.parametrize("q", [1e-8, 0.5])
def test_sampled_gaussian_with_little_noise_at_a_fractional_order(q: float) -> None:
    assert_tight(Atom("gaussian", 0.1, q), 2.5, gaussian_moment(0.1, q, 2.5), 125.0)


@pytest.mark.parametrize("q", [*PROBABILITIES, 1.0])
@pytest.mark.parametrize("scale", [0.01, 0.021, 0.1, 1.0, 30.0, 1000.0])
def test_sampled_laplace_at_whole_orders(scale: float, q: float) -> None:
    for order in WHOLE:
        assert_tight(Atom("laplace", scale, q), order, laplace_moment(scale, q, order), 1 / scale)


@pytest.mark.parametrize("q", [1e-8, 0.1, 1.0])
@pytest.mark.parametrize("scale", [0.3, 1.0, 1000.0])
def test_sampled_laplace_at_fractional_orders(scale: float, q: float) -> None:
    for order in FRACTIONAL:
        assert_tight(Atom("laplace", scale, q), order, laplace_moment(scale, q, order), 1 / scale)


def test_the_grid_of_orders_gets_the_same_answers_as_single_orders() -> None:
    for atom in (Atom("gaussian", 1.3, 0.01), Atom("laplace", 0.7, 0.01)):
        together = rdp({atom: 1})
        alone = [divergence(atom, order) for order in ORDERS]
        np.testing.assert_allclose(together, alone, rtol=1e-8)


def test_unsampled_gaussian_is_order_over_twice_the_variance() -> None:
    """Mironov 2017, Corollary 3."""
    np.testing.assert_allclose(rdp({Atom("gaussian", 2.0): 3}), 3 * ORDERS / 8, rtol=1e-15)


@pytest.mark.parametrize(("sigma", "q"), [(0.7, 0.3), (1.0, 0.01), (2.0, 0.5), (5.0, 0.9), (0.8, 0.99)])
def test_adding_a_record_is_the_smaller_direction_for_gaussians(sigma: float, q: float) -> None:
    """Mironov, Talwar & Zhang 2019, Theorem 5, which lets the accountant look at removal alone."""
    for order in (2, 3, 8):
        adding = float(mp.log1p(gaussian_moment_of_adding(sigma, q, order)) / (order - 1))
        assert 0 < adding <= divergence(Atom("gaussian", sigma, q), order)


@pytest.mark.parametrize(("scale", "q"), [(0.3, 0.1), (1.0, 0.01), (1.0, 0.9), (5.0, 0.5)])
def test_adding_a_record_is_the_smaller_direction_for_laplace(scale: float, q: float) -> None:
    """By a midpoint rule over the finite part; the two atoms exactly."""
    rate = 1 / scale
    x = (np.arange(200_000) + 0.5) / 200_000
    base_loss = np.concatenate([[-rate], rate * (2 * x - 1), [rate]])
    mass = np.concatenate([[0.5], rate / 2 * np.exp(-rate * x) / len(x), [0.5 * math.exp(-rate)]])
    ratio = 1 + q * np.expm1(base_loss)  # mixture over noise
    for order in (1.5, 2.0, 8.0):
        adding = math.log(float(np.sum(mass * ratio ** (1 - order)))) / (order - 1)
        assert 0 < adding <= divergence(Atom("laplace", scale, q), order)


@given(q=st.floats(1e-6, 0.999), scale=st.floats(0.2, 100), noise=st.sampled_from(["gaussian", "laplace"]))
@settings(max_examples=30, deadline=None)
def test_divergences_rise_with_the_order_and_with_sampling(q: float, scale: float, noise: str) -> None:
    some, more = rdp({Atom(noise, scale, q): 1}), rdp({Atom(noise, scale, min(1.0, 1.5 * q)): 1})
    sorted_by_order = some[np.argsort(ORDERS)]
    assert np.all(np.diff(sorted_by_order) >= -1e-8 * sorted_by_order[1:])
    assert np.all(some <= more * (1 + 1e-8))
    assert np.all(some > 0)


# ---------------------------------------------------------------- conversion


def test_the_conversion_factor_is_the_supremum_that_it_is_said_to_be() -> None:
    """sup_u≥0 e^{−(α−1)u}(1 − e^{−u}), by brute force: Canonne, Kamath & Steinke 2020, Proposition 12."""
    u = np.linspace(0, 20, 2_000_001)
    for order in (1.01, 1.5, 2.0, 7.3, 100.0):
        brute = float(np.max(np.exp(-(order - 1) * u) * -np.expm1(-u)))
        assert math.exp(float(log_hockey_stick_factor(np.array(order)))) == pytest.approx(brute, rel=1e-7)


@given(rho=st.floats(1e-6, 10), delta=st.floats(1e-14, 0.4))
@settings(max_examples=50, deadline=None)
def test_delta_and_epsilon_conversions_are_inverses(rho: float, delta: float) -> None:
    curve = rho * ORDERS
    epsilon = epsilon_from_rdp(curve, delta)
    if epsilon > 0:
        assert delta_from_rdp(curve, epsilon) == pytest.approx(delta, rel=1e-9)
    else:
        assert delta_from_rdp(curve, 0.0) <= delta * (1 + 1e-9)


def test_the_best_order_attains_the_minimum() -> None:
    curve = rdp({Atom("gaussian", 1.1, 0.01): 1000})
    order = best_order(curve, 1e-5)
    at = curve[order == ORDERS]
    assert epsilon_from_rdp(at, 1e-5, np.array([order])) == epsilon_from_rdp(curve, 1e-5)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0, 30.0, 300.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-6, 1e-2])
def test_an_unsampled_gaussian_costs_at_least_its_exact_epsilon(sigma: float, delta: float) -> None:
    """δ at the Rényi ε is no more than asked for by Balle & Wang 2018, Theorem 8."""
    accountant = PrivacyAccountant("rdp")
    accountant.record(Gaussian(sigma))
    assert gaussian_delta(sigma, 1.0, accountant.epsilon(delta)) <= delta


# ---------------------------------------------------------------- against dp-accounting


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta"),
    [
        (1.1, 256 / 60_000, 14_062, 1e-5),
        (0.6, 0.001, 1_000, 1e-6),
        (0.8, 0.01, 100, 1e-5),
        (1.0, 0.05, 500, 1e-5),
        (2.0, 0.1, 1_000, 1e-7),
        (5.0, 0.5, 200, 1e-5),
        (20.0, 0.01, 100_000, 1e-9),
        (1.5, 1e-4, 1_000_000, 1e-8),
    ],
)
def test_no_looser_than_dp_accounting_and_no_lower_than_its_optimistic_pld(
    sigma: float, q: float, steps: int, delta: float
) -> None:
    ours = PrivacyAccountant("rdp")
    ours.record(Repeated(PoissonSampled(Gaussian(sigma), q), steps))
    theirs = google_rdp.RdpAccountant(orders=ORDERS.tolist())
    theirs.compose(dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(sigma)), steps)
    lowest = google_epsilon((("gaussian", sigma, q, steps),), delta, 1e-3, pessimistic=False)
    assert lowest <= ours.epsilon(delta) <= theirs.get_epsilon(delta) * 1.001


def test_the_classic_mnist_setting() -> None:
    """n = 60,000, batch 256, σ = 1.1, 60 epochs: 2.5966 by dp-accounting's RDP at its default orders."""
    accountant = PrivacyAccountant("rdp")
    accountant.record(Repeated(PoissonSampled(Gaussian(1.1), 256 / 60_000), 14_062))
    assert accountant.epsilon(1e-5) == pytest.approx(2.5966, rel=0.005)


def test_the_order_of_recording_does_not_matter_at_all() -> None:
    events = [
        Repeated(PoissonSampled(Gaussian(1.1), 0.01), 77),
        Repeated(PoissonSampled(Gaussian(0.9), 0.003), 31),
        Repeated(Laplace(7.0), 3),
        Gaussian(9.0),
        Gaussian(7.3),
    ]
    found = set()
    for turn in range(len(events)):
        accountant = PrivacyAccountant("rdp")
        for event in events[turn:] + events[:turn]:
            accountant.record(event)
        found.add(accountant.epsilon(1e-5))
    assert len(found) == 1


def test_delta_at_epsilon_is_the_one_that_epsilon_was_asked_for() -> None:
    accountant = PrivacyAccountant("rdp")
    accountant.record(Repeated(PoissonSampled(Laplace(2.0), 0.02), 500))
    for delta in (1e-12, 1e-5, 0.1):
        assert accountant.delta(accountant.epsilon(delta)) <= delta * (1 + 1e-9)
