"""ε for groups of records, against other derivations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as google
from scipy.stats import binom, norm

from accounting import (
    ZCDP,
    DiscreteGaussian,
    EpsilonDelta,
    Event,
    ExponentialMechanism,
    Gaussian,
    GNMax,
    Laplace,
    NonPrivate,
    PoissonSampled,
    PrivacyAccountant,
    Repeated,
    ReportNoisyMax,
    SampledWithoutReplacement,
    UnsupportedEvent,
    UserError,
)
from accounting.mixture import GroupGaussianPair


def bounds(event: Event, size: int, delta: float = 1e-5, **options: object) -> tuple[float, float]:
    accountant = PrivacyAccountant(**options)  # type: ignore[arg-type]
    accountant.record(event)
    return accountant.epsilon_bounds(delta, group_size=size)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_without_a_sample_a_group_multiplies_the_sensitivity(size: int) -> None:
    for made in (Gaussian, Laplace, GNMax):
        assert bounds(made(6.0), size) == bounds(made(6.0 / size), 1)
    assert bounds(DiscreteGaussian(9.0, 1), size) == bounds(DiscreteGaussian(9.0, size), 1)
    for choice in (ExponentialMechanism, ReportNoisyMax):
        assert bounds(choice(0.1), size)[1] == pytest.approx(bounds(choice(0.1 * size), 1)[1], rel=1e-9)
    assert bounds(ZCDP(0.01), size, method="rdp") == bounds(ZCDP(0.01 * size**2), 1, method="rdp")


def test_an_epsilon_delta_guarantee_grows_geometrically() -> None:
    accountant = PrivacyAccountant()
    accountant.record(EpsilonDelta(0.2, 1e-7))
    grown = 1e-7 * (1 + math.exp(0.2) + math.exp(0.4))
    lower, upper = accountant.delta_bounds(0.6, group_size=3)
    assert lower <= grown * (1 + 1e-9)
    assert upper == pytest.approx(grown, rel=1e-6)


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "size"), [(1.1, 0.004, 1_000, 2), (3.0, 0.05, 50, 5), (2.0, 0.01, 100, 9)]
)
def test_sampled_gaussians_agree_with_mixtures_of_gaussians(
    sigma: float, q: float, steps: int, size: int
) -> None:
    sensitivities = np.arange(size + 1, dtype=float)
    weights = binom.pmf(np.arange(size + 1), size, q)
    theirs = [
        google.from_mixture_gaussian_mechanism(
            sigma,
            sensitivities,
            weights,
            pessimistic_estimate=pessimistic,
            value_discretization_interval=1e-3,
        )
        .self_compose(steps)
        .get_epsilon_for_delta(1e-5)
        for pessimistic in (False, True)
    ]
    lower, upper = bounds(Repeated(PoissonSampled(Gaussian(sigma), q), steps), size)
    assert lower <= theirs[1] * (1 + 1e-9)
    assert upper >= theirs[0] * (1 - 1e-9)
    assert upper <= theirs[1] * 1.002
    assert lower >= 0.99 * upper


def test_one_step_of_a_group_is_exact() -> None:
    """δ(ε) of a mixture of Gaussians by its one threshold, found by bisection."""
    sigma, q, size, epsilon = 0.9, 0.2, 4, 0.7
    weights = binom.pmf(np.arange(size + 1), size, q)
    loss = lambda x: math.log(  # noqa: E731
        sum(w * norm.pdf(x, j, sigma) for j, w in enumerate(weights)) / norm.pdf(x, 0, sigma)
    )
    low, high = -10.0, 20.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) < epsilon else (low, middle)
    truth = sum(w * norm.sf(low, j, sigma) for j, w in enumerate(weights)) - math.exp(epsilon) * norm.sf(
        low, 0, sigma
    )
    accountant = PrivacyAccountant(tolerance=1e-4)
    accountant.record(PoissonSampled(Gaussian(sigma), q))
    below, above = accountant.delta_bounds(epsilon, group_size=size)
    assert below <= truth * (1 + 1e-9)
    assert above >= truth * (1 - 1e-9)
    assert above == pytest.approx(truth, rel=2e-3)


@pytest.mark.parametrize("event", [Laplace(3.0), ExponentialMechanism(0.3), ReportNoisyMax(0.3)])
def test_other_sampled_mechanisms_are_bounded_by_the_whole_group_at_once(event: Event) -> None:
    small = bounds(PoissonSampled(event, 0.01), 1, 1e-4)[1]
    group = bounds(PoissonSampled(event, 0.01), 3, 1e-4)[1]
    plain = bounds(event, 3, 1e-4)[1]
    assert small < group < plain


def test_a_group_never_costs_less_than_a_record_of_it() -> None:
    event = Repeated(PoissonSampled(Gaussian(1.0), 0.02), 300)
    found = [bounds(event, size)[1] for size in (1, 2, 3, 5, 9, 70, 200)]
    assert found == sorted(found)
    assert bounds(NonPrivate(), 3) == (math.inf, math.inf)


def test_a_group_as_large_as_its_tail_is_cut_says_no_less() -> None:
    """Above 64 records the far tail of the binomial is moved to its end: still a distribution."""
    pair = GroupGaussianPair(1.0, 0.001, 5_000)
    j, log_weight = pair._weights()
    assert len(j) < 100
    assert np.exp(log_weight).sum() == pytest.approx(1, abs=1e-12)


def test_what_has_no_proof_says_so() -> None:
    fixed = SampledWithoutReplacement(Gaussian(2.0), 10, 1_000)
    with pytest.raises(UnsupportedEvent, match="use PoissonSampled"):
        bounds(fixed, 2, neighboring_relation="replace-one")
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(UserError, match="'group_size' parameter"):
            bounds(Gaussian(1.0), wrong)  # type: ignore[arg-type]
