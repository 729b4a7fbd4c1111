"""The accountant of `dpml verify`: exact formulas, dp-accounting, and the accountant that it checks."""

import math
from typing import Any

import pytest
from dp_accounting.pld import privacy_loss_distribution as google
from scipy.special import ndtr

from accounting import (
    ZCDP,
    BestOfRuns,
    Composed,
    EpsilonDelta,
    Event,
    ExponentialMechanism,
    Gaussian,
    GNMax,
    GNMaxThreshold,
    Laplace,
    LNMax,
    NonPrivate,
    OneOf,
    PoissonSampled,
    PrivacyAccountant,
    Repeated,
    ShuffledEpoch,
    SmoothRelease,
    ZeroCost,
)
from dpml.verify.composition import Bounds, epsilon_bounds
from dpml.verify.parts import CannotVerify, Malformed, read


def steps(sigma: float, q: float, count: int) -> Event:
    return Repeated(PoissonSampled(Gaussian(sigma), q), count)


def bounds_of(event: Event, delta: float, relation: Any = "zero-out", **more: Any) -> Bounds:
    return epsilon_bounds(read(event.to_dict(), relation), delta, **more)


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """Balle & Wang 2018, Theorem 8."""
    a, b = 1 / (2 * sigma), epsilon * sigma
    return float(ndtr(a - b) - math.exp(epsilon) * ndtr(-a - b))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 5.0])
def test_one_gaussian_is_exact(sigma: float) -> None:
    found = bounds_of(Gaussian(sigma), 1e-5)
    assert found.width < 1e-15
    assert gaussian_delta(sigma, float(found.upper)) == pytest.approx(1e-5, rel=1e-9)


def test_composed_gaussians_are_one() -> None:
    assert bounds_of(Repeated(Gaussian(10.0), 25), 1e-5).upper == pytest.approx(
        float(bounds_of(Gaussian(2.0), 1e-5).upper), rel=1e-12
    )


@pytest.mark.parametrize(("scale", "delta"), [(0.5, 1e-5), (2.0, 1e-3)])
def test_one_laplace_is_exact(scale: float, delta: float) -> None:
    # δ(ε) = 1 − e^{(ε − 1/b)/2} for ε ≤ 1/b.
    found = bounds_of(Laplace(scale), delta)
    assert float(found.lower) == pytest.approx(1 / scale + 2 * math.log(1 - delta), rel=1e-9)
    assert float(found.upper) == pytest.approx(1 / scale + 2 * math.log(1 - delta), rel=1e-9)


def test_randomised_response_by_a_binomial_sum() -> None:
    """Kairouz, Oh & Viswanath 2015: δ(ε) of k runs is a sum over how many answers are true."""
    k, one = 20, 0.25
    found = bounds_of(Repeated(EpsilonDelta(one), k), 1e-4, width=0.01)

    def delta(epsilon: float) -> float:
        true = 1 / (1 + math.exp(-one))
        terms = (
            math.comb(k, i)
            * max(
                0.0, true**i * (1 - true) ** (k - i) - math.exp(epsilon) * true ** (k - i) * (1 - true) ** i
            )
            for i in range(k + 1)
        )
        return math.fsum(terms)

    assert delta(float(found.upper)) <= 1e-4 <= delta(float(found.lower))
    assert found.width <= 0.01


@pytest.mark.parametrize(
    ("event", "delta", "relation"),
    [
        (steps(1.1, 0.09, 44), 1e-4, "zero-out"),
        (steps(7.0, 0.16, 122), 1e-5, "add-or-remove-one"),
        (steps(2.0, 0.36, 168), 1e-5, "zero-out"),
        (steps(0.6, 0.02, 50), 1e-6, "zero-out"),
        (PoissonSampled(Gaussian(0.8), 0.05), 1e-5, "zero-out"),
        (Composed([steps(1.5, 0.05, 60), Gaussian(8.0), ZeroCost("public")]), 1e-5, "zero-out"),
        (Repeated(PoissonSampled(Composed([Gaussian(1.2), Gaussian(6.0)]), 0.1), 30), 1e-5, "zero-out"),
        (Repeated(PoissonSampled(Laplace(2.0), 0.1), 30), 1e-5, "zero-out"),
        (Repeated(EpsilonDelta(0.1, 1e-7), 20), 1e-5, "zero-out"),
        (Repeated(Laplace(20.0), 40), 1e-5, "replace-one"),
        (Repeated(ShuffledEpoch(Gaussian(5.0)), 3), 1e-5, "replace-one"),
        (Composed([Repeated(GNMaxThreshold(30.0), 100), Repeated(GNMax(20.0), 50)]), 1e-5, "replace-one"),
        (Repeated(LNMax(10.0), 12), 1e-5, "zero-out"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, Event) else None,
)
def test_it_brackets_what_the_accountant_brackets(event: Event, delta: float, relation: Any) -> None:
    accountant = PrivacyAccountant(neighboring_relation=relation, tolerance=5e-4)
    accountant.record(event)
    lower, upper = accountant.epsilon_bounds(delta)
    found = bounds_of(event, delta, relation, width=0.01)
    assert float(found.lower) <= upper * (1 + 1e-9)
    assert lower <= float(found.upper) * (1 + 1e-9)
    assert found.width <= 0.01


@pytest.mark.parametrize(("sigma", "q", "count"), [(1.0, 0.1, 20), (3.0, 0.2, 100)])
def test_dp_accounting_s_bounds_lie_around(sigma: float, q: float, count: int) -> None:
    found = bounds_of(steps(sigma, q, count), 1e-5, width=0.01)
    for pessimistic in (True, False):
        made = google.from_gaussian_mechanism(
            sigma,
            sampling_prob=q,
            pessimistic_estimate=pessimistic,
            value_discretization_interval=1e-3,
            use_connect_dots=pessimistic,
        )
        other = made.self_compose(count).get_epsilon_for_delta(1e-5)
        if pessimistic:
            assert float(found.lower) <= other
        else:
            assert other <= float(found.upper)


def test_the_bracket_shrinks_with_the_width_that_is_asked_for() -> None:
    wide, narrow = (bounds_of(steps(2.0, 0.3, 20), 1e-5, width=width) for width in (0.05, 0.001))
    assert wide.lower <= narrow.lower <= narrow.upper <= wide.upper
    assert 0 < narrow.width <= 0.001 < wide.width <= 0.05


@pytest.mark.parametrize(
    "event",
    [
        BestOfRuns(steps(2.0, 0.05, 100), 10.0, 1.0),
        BestOfRuns(Gaussian(3.0), 10.0, 0.0),
        BestOfRuns(EpsilonDelta(0.1), 5.0, -0.5),
        Composed([Repeated(GNMax(20.0), 50), SmoothRelease(0.01, 20.0, 4.0)]),
        ZCDP(0.1),
        # The first is worse at small orders, the second at large ones.
        OneOf([Composed([Repeated(Laplace(20.0), 30)]), Gaussian(3.0), EpsilonDelta(0.4)]),
        BestOfRuns(OneOf([Gaussian(4.0), steps(2.0, 0.05, 100)]), 10.0, 1.0),
    ],
    ids=lambda event: type(event).__name__,
)
def test_rényi_bounds_agree_with_the_accountant_s(event: Event) -> None:
    accountant = PrivacyAccountant("rdp")
    accountant.record(event)
    assert float(bounds_of(event, 1e-5).upper) == pytest.approx(accountant.epsilon(1e-5), rel=2e-3)


def test_one_of_several_that_cost_the_same_is_that_one() -> None:
    same = OneOf([Gaussian(2.0), Repeated(Gaussian(2.0), 1)])
    assert bounds_of(same, 1e-5) == bounds_of(Gaussian(2.0), 1e-5)
    assert bounds_of(OneOf([Gaussian(2.0), NonPrivate()]), 1e-5).lower == math.inf


def test_nothing_and_no_protection() -> None:
    assert bounds_of(Repeated(Gaussian(1.0), 0), 1e-5) == Bounds(0, 0)
    assert bounds_of(Composed([Gaussian(1.0), NonPrivate()]), 1e-5).lower == math.inf


@pytest.mark.parametrize(
    "event",
    [
        ExponentialMechanism(0.1),
        PoissonSampled(Composed([Gaussian(1.0), Laplace(1.0)]), 0.1),
        BestOfRuns(Gaussian(3.0), 10.0, None),
    ],
)
def test_what_is_not_known_is_said(event: Event) -> None:
    with pytest.raises(CannotVerify):
        bounds_of(event, 1e-5)


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"type": 3},
        {"type": "Gaussian"},
        {"type": "Gaussian", "noise_multiplier": True},
        {"type": "Gaussian", "noise_multiplier": 0},
        {"type": "Gaussian", "noise_multiplier": math.nan},
        {"type": "Repeated", "event": {"type": "ZeroCost"}, "count": -1},
        {"type": "Repeated", "event": {"type": "ZeroCost"}, "count": 2.5},
        {"type": "Composed", "events": {}},
        {"type": "PoissonSampled", "event": {"type": "ZeroCost"}, "sampling_probability": 1.5},
    ],
)
def test_what_is_no_event_is_refused(body: Any) -> None:
    with pytest.raises(Malformed):
        read(body, "zero-out")
