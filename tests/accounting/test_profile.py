"""δ at many ε at once: on the right side everywhere, narrow, and in agreement with one question at a time."""

from __future__ import annotations

import math
import time

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import atom_of
from oracles import gaussian_delta, google_pld, laplace_delta, two_laplaces_delta

from accounting import (
    ZCDP,
    Composed,
    EpsilonDelta,
    Event,
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    RandomizedResponse,
    Repeated,
    SampledWithoutReplacement,
    UnsupportedEvent,
    UserError,
)
from accounting.events import atoms
from accounting.pld import delta_bounds
from accounting.profile import PrivacyProfile, delta_profile

DPSGD = Repeated(PoissonSampled(Gaussian(1.1), 256 / 60_000), 14_062)


@pytest.mark.parametrize("q", [1e-4, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 5.0])
def test_one_gaussian_is_bracketed_closely_at_every_epsilon(sigma: float, q: float) -> None:
    top = math.log1p(q * math.expm1(7 / sigma))
    epsilons = np.linspace(0, top, 40)
    lower, upper = delta_profile({atom_of("gaussian", sigma, q): 1}, epsilons)
    truth = np.array([float(gaussian_delta(sigma, q, float(epsilon))) for epsilon in epsilons])
    assert (lower * (1 - 1e-12) <= truth).all()
    assert (truth <= upper * (1 + 1e-12)).all()
    # −dδ/dε, and so a bound on TPR − FPR of the test with this threshold.
    steps = np.maximum(-np.gradient(truth, epsilons), 0)
    assert (upper - lower <= 3e-3 * (truth + steps)).all()


@pytest.mark.parametrize(("scale", "q"), [(0.5, 1.0), (2.0, 0.1), (0.3, 0.01)])
def test_one_laplace(scale: float, q: float) -> None:
    end = math.log1p(q * math.expm1(1 / scale))
    epsilons = np.linspace(0, 1.1 * end, 30)
    lower, upper = delta_profile({atom_of("laplace", scale, q): 1}, epsilons)
    truth = np.array([float(laplace_delta(scale, q, float(epsilon))) for epsilon in epsilons])
    assert (lower * (1 - 1e-12) <= truth).all()
    assert (truth <= upper * (1 + 1e-12)).all()
    assert (upper[epsilons > end * (1 + 1e-9)] == 0).all()


def test_two_laplaces() -> None:
    epsilons = np.linspace(0, 3.9, 14)
    lower, upper = delta_profile(atoms(Repeated(Laplace(0.5), 2)), epsilons)
    for low, epsilon, high in zip(lower, epsilons, upper, strict=True):
        assert low <= two_laplaces_delta(2.0, float(epsilon)) <= high


def test_dpsgd_agrees_with_dp_accounting() -> None:
    parts = (("gaussian", 1.1, 256 / 60_000, 14_062),)
    above, below = google_pld(parts, 1e-3, True), google_pld(parts, 1e-3, False)
    epsilons = [0.0, 0.1, 0.5, 1.0, 2.0, 2.38, 4.0]
    lower, upper = delta_profile(atoms(DPSGD), epsilons)
    for low, epsilon, high in zip(lower, epsilons, upper, strict=True):
        assert low <= float(above.get_delta_for_epsilon(epsilon)) * (1 + 1e-9) + 1e-11
        assert float(below.get_delta_for_epsilon(epsilon)) <= high * (1 + 1e-9) + 1e-11
        assert high - low <= 0.01 * high


EVENTS: dict[str, tuple[Event, str, float]] = {
    "dpsgd": (DPSGD, "zero-out", 6.0),
    "one step": (PoissonSampled(Gaussian(1.0), 0.01), "zero-out", 8.0),
    "laplace": (Repeated(Laplace(3.0), 50), "zero-out", 16.0),
    "responses": (Repeated(RandomizedResponse(0.5, 3), 10), "replace-one", 11.0),
    "fixed size": (Repeated(SampledWithoutReplacement(Gaussian(1.0), 100, 10_000), 500), "replace-one", 6.0),
    "little": (Repeated(PoissonSampled(Gaussian(30.0), 1e-3), 10), "zero-out", 1e-3),
    "mixture": (
        Composed(
            [Repeated(PoissonSampled(Gaussian(1.0), 0.01), 1000), Laplace(2.0), EpsilonDelta(0.5, 1e-6)]
        ),
        "zero-out",
        6.0,
    ),
    "gaussians": (Repeated(Gaussian(3.0), 7), "zero-out", 9.0),
    "nothing": (Composed([]), "zero-out", 3.0),
    "everything": (Composed([NonPrivate(), Gaussian(1.0)]), "zero-out", 3.0),
}


@pytest.mark.parametrize("name", EVENTS)
def test_agrees_with_one_question_at_a_time(name: str) -> None:
    event, relation, top = EVENTS[name]
    counts = atoms(event, relation)  # type: ignore[arg-type]
    epsilons = np.linspace(0, top, 60)
    lower, upper = delta_profile(counts, epsilons)
    assert (lower >= 0).all()
    assert (upper <= 1).all()
    assert (lower <= upper).all()
    assert (np.diff(upper) <= 0).all()
    for i in (0, 1, 7, 20, 40, 58):
        low, high = delta_bounds(counts, float(epsilons[i]))
        assert lower[i] <= high * (1 + 1e-12)
        assert low <= upper[i] * (1 + 1e-12)


def test_answers_do_not_depend_on_order_or_company_beyond_the_tolerance() -> None:
    counts = atoms(PoissonSampled(Gaussian(1.0), 0.01))
    epsilons = np.array([0.5, 0.0, 2.0, 0.5])
    lower, upper = delta_profile(counts, epsilons)
    assert lower[0] == lower[3]
    assert upper[0] == upper[3]
    for i, epsilon in enumerate(epsilons):
        [low], [high] = delta_profile(counts, [epsilon])
        assert low <= upper[i]
        assert lower[i] <= high


def test_negative_epsilon() -> None:
    sigma, q, epsilon = 0.8, 0.3, 0.7
    counts = {atom_of("gaussian", sigma, q): 1}
    [low], [high] = delta_profile(counts, [-epsilon])

    def direction(first: object, second: object) -> object:
        grid = mp.linspace(-12, 13, 25)
        return mp.quad(lambda x: max(first(x) - mp.e**-epsilon * second(x), 0), grid)  # type: ignore[operator]

    def without(x: object) -> object:
        return mp.npdf(x, 0, sigma)

    def mixed(x: object) -> object:
        return (1 - q) * mp.npdf(x, 0, sigma) + q * mp.npdf(x, 1, sigma)

    truth = max(direction(mixed, without), direction(without, mixed))
    assert low - 1e-6 <= truth <= high + 1e-6
    assert high - low < 1e-3
    assert delta_profile({}, [-1.0, 1.0])[1] == pytest.approx([-math.expm1(-1), 0])


def test_instalments_keep_what_was_composed() -> None:
    profile = PrivacyProfile(atoms(DPSGD))
    profile.bounds([0.0, 1.0, 2.0])
    made = len(profile._sums)
    profile.bounds([0.5, 1.5])
    assert len(profile._sums) == made


@settings(max_examples=12, deadline=None)
@given(
    sigma=st.floats(0.4, 20),
    q=st.floats(1e-4, 0.9),
    steps=st.integers(1, 3000),
    tolerance=st.floats(1e-4, 0.05),
)
def test_brackets_of_different_tolerance_overlap(
    sigma: float, q: float, steps: int, tolerance: float
) -> None:
    counts = {atom_of("gaussian", sigma, q): steps}
    epsilons = np.linspace(0, min(20.0, 0.1 + 8 * q * math.sqrt(steps) / sigma), 9)
    lower, upper = delta_profile(counts, epsilons, tolerance=tolerance)
    other_lower, other_upper = delta_profile(counts, epsilons, tolerance=0.01)
    assert (lower <= other_upper).all()
    assert (other_lower <= upper).all()


def test_a_curve_takes_no_time() -> None:
    counts = atoms(DPSGD)
    delta_profile(counts, [0.0])
    start = time.perf_counter()
    delta_profile(counts, np.linspace(0, 5, 300))
    assert time.perf_counter() - start < 3  # 0.1 s on an idle core


@pytest.mark.parametrize("epsilons", [[math.nan], [math.inf], [[1.0]], 1.0, ["a"], None])
def test_mistakes_take_one_line(epsilons: object) -> None:
    with pytest.raises(UserError) as caught:
        delta_profile(atoms(Gaussian(1.0)), epsilons)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_what_has_no_profile_says_so() -> None:
    with pytest.raises(UnsupportedEvent, match="Rényi"):
        delta_profile(atoms(ZCDP(0.1)), [1.0])
    with pytest.raises(UserError, match="tolerance"):
        delta_profile({}, [1.0], tolerance=0)


def test_no_epsilon_no_answer() -> None:
    lower, upper = delta_profile(atoms(DPSGD), [])
    assert lower.shape == upper.shape == (0,)
