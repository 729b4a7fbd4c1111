"""Rényi divergences and their conversion: never below the truth, and hardly above it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting import rdp as google_rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import atom_of
from oracles import (
    Outcomes,
    answers_of,
    discrete_gaussian_outcomes,
    gaussian_delta,
    gaussian_moment,
    gaussian_moment_of_adding,
    google_epsilon,
    laplace_moment,
    profile_of,
    randomised_response,
    two_losses,
)

from accounting import Gaussian, Laplace, PoissonSampled, PrivacyAccountant, Repeated
from accounting.atoms import Atom
from accounting.curves import ConcentratedCurve
from accounting.pairs import (
    BoundedRangePair,
    DiscreteGaussianPair,
    FloatArray,
    GaussianPair,
    LaplacePair,
    Pair,
    ProductPair,
    ResponsePair,
    SwappedResponsePair,
    UniformResponsePair,
)
from accounting.rdp import (
    ORDERS,
    delta_from_rdp,
    epsilon_from_rdp,
    log_hockey_stick_factor,
    rdp,
    renyi_delta,
    renyi_epsilon,
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
        atom, unsampled = atom_of("gaussian", sigma, q), order / (2 * sigma**2)
        assert_tight(atom, order, gaussian_moment(sigma, q, order), unsampled)


@pytest.mark.parametrize("q", PROBABILITIES)
@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.9, 4.1, 1000.0])
def test_sampled_gaussian_at_fractional_orders(sigma: float, q: float) -> None:
    for order in FRACTIONAL:
        atom, unsampled = atom_of("gaussian", sigma, q), order / (2 * sigma**2)
        assert_tight(atom, order, gaussian_moment(sigma, q, order), unsampled)


@pytest.mark.parametrize("q", [1e-8, 0.5])
def test_sampled_gaussian_with_little_noise_at_a_fractional_order(q: float) -> None:
    assert_tight(atom_of("gaussian", 0.1, q), 2.5, gaussian_moment(0.1, q, 2.5), 125.0)


@pytest.mark.parametrize("q", [*PROBABILITIES, 1.0])
@pytest.mark.parametrize("scale", [0.01, 0.021, 0.1, 1.0, 30.0, 1000.0])
def test_sampled_laplace_at_whole_orders(scale: float, q: float) -> None:
    for order in WHOLE:
        assert_tight(atom_of("laplace", scale, q), order, laplace_moment(scale, q, order), 1 / scale)


@pytest.mark.parametrize("q", [1e-8, 0.1, 1.0])
@pytest.mark.parametrize("scale", [0.3, 1.0, 1000.0])
def test_sampled_laplace_at_fractional_orders(scale: float, q: float) -> None:
    for order in FRACTIONAL:
        assert_tight(atom_of("laplace", scale, q), order, laplace_moment(scale, q, order), 1 / scale)


# ---------------------------------------------------------------- divergences of the other pairs


def moment_of(outcomes: Outcomes, q: float, order: float, *, adding: bool = False) -> Any:
    """E_Q[(P/Q)^α] of the mixture over the base, or of the base over the mixture."""
    with mp.workdps(40):
        p, a = mp.mpf(q), mp.mpf(order)
        pairs = (((1 - p) * m0 + p * m1, m0) for m0, m1 in outcomes)
        ordered = ((n, m) if adding else (m, n) for m, n in pairs)
        return mp.fsum(m**a * n ** (1 - a) for m, n in ordered if m)


def fixed_size_moment(outcomes: Outcomes, q: float, order: float) -> Any:
    """The same of the pair whose positive losses are the mixture's, and negative ones their mirror image."""
    with mp.workdps(40):
        p, a = mp.mpf(q), mp.mpf(order)
        larger = [((1 - p) * m0 + p * m1, m0) for m0, m1 in outcomes if m1 > m0]
        rest = 1 - mp.fsum(m + n for m, n in larger)
        return rest + mp.fsum(m**a * n ** (1 - a) + n**a * m ** (1 - a) for m, n in larger)


DISCRETE: list[tuple[Pair, Outcomes]] = [
    (ResponsePair(0.01), randomised_response(0.01)[1:3]),
    (ResponsePair(1.0), randomised_response(1.0)[1:3]),
    (ResponsePair(20.0), randomised_response(20.0)[1:3]),
    (DiscreteGaussianPair(0.7, 1), discrete_gaussian_outcomes(0.7, 1)),
    (DiscreteGaussianPair(3.0, 2), discrete_gaussian_outcomes(3.0, 2)),
    (SwappedResponsePair(0.375, 5), answers_of(0.375, 5, other_is_uniform=False)),
]
NOT_SAMPLED: list[tuple[Pair, Outcomes]] = [
    (UniformResponsePair(0.375, 5), answers_of(0.375, 5, other_is_uniform=True)),
    (UniformResponsePair(0.96, 2), answers_of(0.96, 2, other_is_uniform=True)),
]


def named(value: object) -> str:
    return repr(value) if isinstance(value, Pair) else "outcomes"


def assert_just_above(atom: Atom, order: float, moment: Any) -> None:
    truth = float(mp.log(moment) / (mp.mpf(order) - 1))
    found = divergence(atom, order)
    assert truth * (1 - 1e-12) <= found <= truth * (1 + 1e-8) + 2e-9 / (order - 1)


@pytest.mark.parametrize(("pair", "outcomes"), [*DISCRETE, *NOT_SAMPLED], ids=named)
def test_discrete_pairs(pair: Pair, outcomes: Outcomes) -> None:
    """Both directions, with and without a sample."""
    probabilities = (1.0,) if isinstance(pair, UniformResponsePair) else (1e-6, 0.01, 0.9, 1.0)
    for order in (1.01, 1.7, 2.0, 5.0, 33.0):
        for q in probabilities:
            atom = Atom(pair) if q == 1 else Atom(pair, "poisson", q)
            both = moment_of(outcomes, q, order), moment_of(outcomes, q, order, adding=True)
            assert_just_above(atom, order, max(both))


@pytest.mark.parametrize(("pair", "outcomes"), DISCRETE, ids=named)
@pytest.mark.parametrize("q", [1e-6, 0.01, 0.5, 0.99])
def test_discrete_pairs_on_a_sample_of_fixed_size(pair: Pair, outcomes: Outcomes, q: float) -> None:
    for order in (1.01, 1.7, 2.0, 5.0, 33.0):
        atom = Atom(pair, "fixed-size", q)
        truth = float(mp.log(fixed_size_moment(outcomes, q, order)) / (mp.mpf(order) - 1))
        found = divergence(atom, order)
        assert truth * (1 - 1e-12) <= found <= truth * (1 + 1e-6) + 2e-9 / (order - 1)
    for order in (100.0, 300.0):  # a bound, which is no closer than the distance of the two masses
        truth = float(mp.log(fixed_size_moment(outcomes, q, order)) / (mp.mpf(order) - 1))
        assert divergence(Atom(pair, "fixed-size", q), order) >= truth * (1 - 1e-12)


def in_cells(pair: Pair, cells: int, edges: FloatArray) -> Outcomes:
    """Masses of a continuous pair between losses, by the profile's derivative: an outcome for each cell."""
    profile = profile_of(pair)
    with mp.workdps(30):
        step = mp.mpf(10) ** -12

        def above(t: float, *, with_record: bool) -> Any:
            y = mp.e ** mp.mpf(t)
            slope = (profile(y * (1 + step)) - profile(y * (1 - step))) / (2 * step * y)
            return profile(y) - y * slope if with_record else -slope  # m1 and m0 beyond t

        tails = [(above(t, with_record=False), above(t, with_record=True)) for t in edges.tolist()]
    return [(a0 - b0, a1 - b1) for (a0, a1), (b0, b1) in itertools.pairwise(tails)][:cells]


@pytest.mark.parametrize("pair", [GaussianPair(0.8), GaussianPair(3.0), LaplacePair(0.7)], ids=str)
@pytest.mark.parametrize("q", [0.001, 0.2, 0.9])
def test_a_sample_of_fixed_size_of_continuous_pairs(pair: Pair, q: float) -> None:
    """Above the divergence of the pair seen through 400 cells, which is post-processing, and close to it."""
    if isinstance(pair, GaussianPair):  # the loss 8 deviations beyond what matters at order 9
        top = (2 * (9 + 8 * pair.scale) - 1) / (2 * pair.scale**2)
    else:
        top = 1.001 / 0.7
    outcomes = in_cells(pair, 400, np.linspace(1e-6, top, 401))
    for order in (1.3, 2.0, 5.0, 9.0):
        truth = float(mp.log(fixed_size_moment(outcomes, q, order)) / (mp.mpf(order) - 1))
        found = divergence(Atom(pair, "fixed-size", q), order)
        assert truth * (1 - 1e-9) <= found <= truth * 1.01 + 2e-9 / (order - 1)


@pytest.mark.parametrize("epsilon", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("q", [1e-3, 0.5, 1.0])
def test_bounded_range_is_above_every_pair_of_two_losses(epsilon: float, q: float) -> None:
    atom = Atom(BoundedRangePair(epsilon)) if q == 1 else Atom(BoundedRangePair(epsilon), "poisson", q)
    for order in (1.2, 2.0, 10.0, 60.0):
        found = divergence(atom, order)
        for share in (0.05, 0.3, 0.5, 0.7, 0.95):
            moment = moment_of(two_losses(epsilon, share * epsilon), q, order)
            assert found >= float(mp.log(moment) / (order - 1)) * (1 - 1e-12)
        whole = divergence(Atom(ResponsePair(epsilon)), order)
        assert found <= whole * (1 + 1e-8)


@pytest.mark.parametrize("q", [1e-4, 0.1])
def test_a_product_on_one_sample_lies_between_its_parts_and_no_sample(q: float) -> None:
    parts = (GaussianPair(1.5), LaplacePair(2.0))
    product = Atom(ProductPair(((parts[0], 1), (parts[1], 2))), "poisson", q)
    for order in (1.5, 2.0, 7.5, 64.0, 200.0):
        found = divergence(product, order)
        unsampled = order / (2 * 1.5**2) + 2 * divergence(Atom(parts[1]), order)
        assert max(divergence(Atom(part, "poisson", q), order) for part in parts) <= found <= unsampled


@pytest.mark.parametrize("order", [2.0, 3.0, 8.0])
def test_two_gaussians_as_a_product_are_one_gaussian(order: float) -> None:
    product = Atom(ProductPair(((GaussianPair(3.0), 1), (GaussianPair(4.0), 1))), "poisson", 0.01)
    assert divergence(product, order) == pytest.approx(divergence(atom_of("gaussian", 2.4, 0.01), order))


def test_what_has_no_divergence_has_an_infinite_one() -> None:
    for atom in (
        Atom.NON_PRIVATE,
        Atom(ResponsePair(1.0, 1e-9)),
        Atom(ResponsePair(1.0, 1e-9), "poisson", 0.1),
        Atom(ResponsePair(1.0, 1e-9), "fixed-size", 0.1),
    ):
        assert np.all(np.isinf(rdp({atom: 1, atom_of("gaussian", 1.0): 1})))
        assert renyi_epsilon({atom: 1}, 1e-5) == math.inf
        assert renyi_delta({atom: 1}, 1.0) == 1.0


def test_the_grid_of_orders_gets_the_same_answers_as_single_orders() -> None:
    for atom in (atom_of("gaussian", 1.3, 0.01), atom_of("laplace", 0.7, 0.01)):
        together = rdp({atom: 1})
        alone = [divergence(atom, order) for order in ORDERS]
        np.testing.assert_allclose(together, alone, rtol=1e-8)


def test_unsampled_gaussian_is_order_over_twice_the_variance() -> None:
    """Mironov 2017, Corollary 3."""
    np.testing.assert_allclose(rdp({atom_of("gaussian", 2.0): 3}), 3 * ORDERS / 8, rtol=1e-15)


@pytest.mark.parametrize(("sigma", "q"), [(0.7, 0.3), (1.0, 0.01), (2.0, 0.5), (5.0, 0.9), (0.8, 0.99)])
def test_adding_a_record_is_the_smaller_direction_for_gaussians(sigma: float, q: float) -> None:
    """Mironov, Talwar & Zhang 2019, Theorem 5, which lets the accountant look at removal alone."""
    for order in (2, 3, 8):
        adding = float(mp.log1p(gaussian_moment_of_adding(sigma, q, order)) / (order - 1))
        assert 0 < adding <= divergence(atom_of("gaussian", sigma, q), order)


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
        assert 0 < adding <= divergence(atom_of("laplace", scale, q), order)


@given(q=st.floats(1e-6, 0.999), scale=st.floats(0.2, 100), noise=st.sampled_from(["gaussian", "laplace"]))
@settings(max_examples=30, deadline=None)
def test_divergences_rise_with_the_order_and_with_sampling(q: float, scale: float, noise: str) -> None:
    some, more = rdp({atom_of(noise, scale, q): 1}), rdp({atom_of(noise, scale, min(1.0, 1.5 * q)): 1})
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


@pytest.mark.parametrize(
    "counts",
    [
        {atom_of("gaussian", 1.1, 0.01): 1_000},
        {atom_of("gaussian", 30.0): 1},
        {atom_of("gaussian", 0.2): 1},
        {atom_of("gaussian", 0.8, 0.001): 10, atom_of("laplace", 20.0): 3},
        {atom_of("laplace", 1.0, 0.01): 1_000},
        {atom_of("gaussian", 1.0, 1e-7): 10},
        {Atom(ResponsePair(0.1)): 100},
        {Atom(BoundedRangePair(0.1)): 100},
        {Atom(ConcentratedCurve(0.02)): 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("delta", [1e-15, 1e-6, 0.01])
def test_the_search_over_orders_finds_what_a_dense_grid_finds(counts: dict[Atom, int], delta: float) -> None:
    """Orders from 1 + 1e-5 to 10^5, 4,000 of them."""
    orders = 1 + np.geomspace(1e-5, 63, 3_000)
    whole = np.unique(np.rint(np.geomspace(64, 1e5, 1_000)))
    orders = np.concatenate([orders, whole])
    curve = rdp(counts, orders)
    dense = epsilon_from_rdp(curve, delta, orders)
    assert renyi_epsilon(counts, delta) <= dense * 1.003 + 1e-9
    sparse = epsilon_from_rdp(rdp(counts), delta)
    assert renyi_epsilon(counts, delta) <= sparse * 1.001 + 1e-9
    for epsilon in (0.5 * dense, dense):
        if epsilon > 0:
            assert renyi_delta(counts, epsilon) <= delta_from_rdp(curve, epsilon, orders) * 1.05


@pytest.mark.parametrize("delta", [1e-12, 1e-6, 1e-2])
def test_rho_zcdp_converts_as_a_gaussian_does(delta: float) -> None:
    """ρ = 1/2σ², so above a Gaussian's exact ε, and below ρ + 2√(ρ·log 1/δ) of Bun & Steinke 2016."""
    for rho in (1e-6, 0.01, 1.0, 100.0):
        epsilon = renyi_epsilon({Atom(ConcentratedCurve(rho)): 1}, delta)
        assert epsilon == pytest.approx(renyi_epsilon({atom_of("gaussian", (2 * rho) ** -0.5): 1}, delta))
        assert gaussian_delta((2 * rho) ** -0.5, 1.0, epsilon) <= delta
        assert epsilon <= rho + 2 * math.sqrt(rho * math.log(1 / delta))


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
