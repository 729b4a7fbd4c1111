"""Calibration ends at or below its target, and hardly below it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from oracles import gaussian_delta

from accounting import (
    METHODS,
    Composed,
    Event,
    Gaussian,
    Laplace,
    PoissonSampled,
    PrivacyAccountant,
    PrivacyBudget,
    Repeated,
    UnreachableBudget,
    UnsupportedEvent,
    calibrate_noise_multiplier,
)

MakeEvent = Callable[[float], Event]


def dpsgd(q: float, steps: int) -> MakeEvent:
    return lambda sigma: Repeated(PoissonSampled(Gaussian(sigma), q), steps)


def epsilon_of(event: Event, delta: float, method: str) -> float:
    accountant = PrivacyAccountant(method)  # type: ignore[arg-type]
    accountant.record(event)
    return accountant.epsilon(delta)


@pytest.mark.parametrize("epsilon", [0.05, 1.0, 20.0])
@pytest.mark.parametrize(("q", "steps", "delta"), [(256 / 60_000, 2_000, 1e-5), (0.1, 300, 1e-7)])
@pytest.mark.parametrize("method", METHODS)
def test_dpsgd_ends_within_a_thousandth_below_the_target(
    method: str, q: float, steps: int, delta: float, epsilon: float
) -> None:
    make, budget = dpsgd(q, steps), PrivacyBudget(epsilon, delta)
    sigma = calibrate_noise_multiplier(make, budget, method=method)  # type: ignore[arg-type]
    assert 0.999 * epsilon <= epsilon_of(make(sigma), delta, method) <= epsilon


@pytest.mark.parametrize(
    "make",
    [
        Laplace,
        lambda scale: Repeated(PoissonSampled(Laplace(scale), 0.05), 100),
        lambda sigma: Composed([Repeated(PoissonSampled(Gaussian(sigma), 0.02), 50), Gaussian(8 * sigma)]),
    ],
    ids=["laplace", "sampled laplace", "mixed"],
)
@pytest.mark.parametrize("epsilon", [0.2, 4.0])
def test_other_events_end_within_a_thousandth_below_the_target(make: MakeEvent, epsilon: float) -> None:
    noise = calibrate_noise_multiplier(make, PrivacyBudget(epsilon, 1e-6))
    assert 0.999 * epsilon <= epsilon_of(make(noise), 1e-6, "pld") <= epsilon


@pytest.mark.parametrize("epsilon", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("delta", [1e-10, 1e-3])
def test_an_unsampled_gaussian_meets_the_closed_form(epsilon: float, delta: float) -> None:
    """Balle & Wang 2018, Theorem 8: δ(ε) at σ is met, and would be missed with 0.2 % less noise."""
    sigma = calibrate_noise_multiplier(Gaussian, PrivacyBudget(epsilon, delta))
    assert gaussian_delta(sigma, 1.0, epsilon) <= delta
    assert gaussian_delta(0.998 * sigma, 1.0, epsilon) > delta


def test_the_classic_mnist_setting() -> None:
    """n = 60,000, batch 256, 60 epochs, ε = 3, δ = 1e-5: σ = 0.969 by dp-accounting's PLD."""
    sigma = calibrate_noise_multiplier(dpsgd(256 / 60_000, 14_062), PrivacyBudget(3.0, 1e-5))
    assert sigma == pytest.approx(0.969, rel=0.003)


def test_a_smaller_tolerance_comes_closer() -> None:
    make, budget = dpsgd(0.01, 500), PrivacyBudget(2.0, 1e-5)
    sigma = calibrate_noise_multiplier(make, budget, tolerance=1e-5)
    assert 2.0 * (1 - 1e-5) <= epsilon_of(make(sigma), 1e-5, "pld") <= 2.0


@pytest.mark.parametrize(("epsilon", "delta"), [(1e-9, 1e-15), (1e-6, 1e-300)])
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_out_of_reach_is_refused_in_one_line(method: str, epsilon: float, delta: float) -> None:
    with pytest.raises(UnreachableBudget) as refusal:
        calibrate_noise_multiplier(Gaussian, PrivacyBudget(epsilon, delta), method=method)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith("No noise multiplier up to 1e+07 meets ε = ")


@pytest.mark.parametrize("method", METHODS)
def test_zero_out_and_add_or_remove_one_need_the_same_noise(method: str) -> None:
    make, budget = dpsgd(0.02, 200), PrivacyBudget(2.0, 1e-5)
    noise = [
        calibrate_noise_multiplier(make, budget, method=method, neighboring_relation=relation)  # type: ignore[arg-type]
        for relation in ("zero-out", "add-or-remove-one")
    ]
    assert noise[0] == noise[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_replace_one_needs_twice_the_noise(method: str, kind: type[Gaussian]) -> None:
    budget = PrivacyBudget(1.0, 1e-5)
    single, double = (
        calibrate_noise_multiplier(kind, budget, method=method, neighboring_relation=relation)  # type: ignore[arg-type]
        for relation in ("add-or-remove-one", "replace-one")
    )
    assert double == pytest.approx(2 * single, rel=0.002)


def test_replace_one_refuses_poisson_sampling() -> None:
    with pytest.raises(UnsupportedEvent, match="replace-one"):
        calibrate_noise_multiplier(
            dpsgd(0.02, 200), PrivacyBudget(2.0, 1e-5), neighboring_relation="replace-one"
        )
