"""Trade-off functions: brackets around exact curves, and noise for a risk."""

from __future__ import annotations

import functools
import math
import time

import mpmath as mp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gaussian_delta, google_pld

from accounting import (
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
    UnreachableBudget,
    UnsupportedEvent,
    UserError,
)
from accounting.tradeoff import (
    attack_accuracy,
    attack_advantage,
    calibrate_noise_for_risk,
    from_above,
    from_below,
    tpr_at_fpr,
    tradeoff_curve,
)

Array = npt.NDArray[np.float64]
DPSGD = Repeated(PoissonSampled(Gaussian(1.1), 256 / 60_000), 14_062)
RATES = np.concatenate([[0, 1], np.geomspace(1e-6, 0.5, 25), 1 - np.geomspace(1e-6, 0.4, 15)])


# ---------------------------------------------------------------- exact curves of discrete pairs


def outcomes(p: list[float], q: list[float], runs: int) -> tuple[Array, Array]:
    """All outcomes' probabilities after `runs` runs."""
    return (functools.reduce(np.kron, [np.array(one)] * runs) for one in (p, q))  # type: ignore[return-value]


def neyman_pearson(p: Array, q: Array) -> Array:
    """Vertices (α, β) of the trade-off function, null q against alternative p."""
    with np.errstate(divide="ignore"):
        order = np.argsort(-np.log(p) + np.log(q), kind="stable")
    alpha = np.append(0.0, np.cumsum(q[order]))
    beta = np.append(0.0, np.cumsum(p[order][::-1]))[::-1]
    return np.stack([alpha, beta], axis=1)


def hull(points: Array, alphas: Array) -> Array:
    """The largest convex function below all `points`, at `alphas`."""
    kept: list[Array] = []
    for point in points[np.lexsort((points[:, 1], points[:, 0]))]:
        while len(kept) > 1 and np.linalg.det([kept[-1] - kept[-2], point - kept[-2]]) <= 0:
            kept.pop()
        kept.append(point)
    vertices = np.array(kept)
    return np.asarray(np.interp(alphas, vertices[:, 0], vertices[:, 1]))


def exact_curve(p: list[float], q: list[float], runs: int, alphas: Array) -> Array:
    first, second = outcomes(p, q, runs)
    both = np.concatenate([neyman_pearson(first, second), neyman_pearson(second, first)])
    return hull(both, alphas)


def responses(noise: float, answers: int, relation: str) -> tuple[list[float], list[float]]:
    truth, lie = 1 - noise + noise / answers, noise / answers
    told = [truth] + [lie] * (answers - 1)
    return told, told[::-1] if relation == "replace-one" else [1 / answers] * answers


@pytest.mark.parametrize("relation", ["replace-one", "zero-out"])
@pytest.mark.parametrize(
    ("noise", "answers", "runs"), [(0.5, 3, 1), (0.5, 3, 5), (0.8, 4, 4), (0.3, 3, 2), (0.95, 3, 6)]
)
def test_randomised_response_is_bracketed(noise: float, answers: int, runs: int, relation: str) -> None:
    event = Repeated(RandomizedResponse(noise, answers), runs)
    lower, upper = tradeoff_curve(event, RATES, neighboring_relation=relation)  # type: ignore[arg-type]
    truth = exact_curve(*responses(noise, answers, relation), runs, RATES)
    assert (lower <= truth + 1e-12).all()
    assert (truth <= upper + 1e-12).all()
    # Losses that lie on no lattice, few in number, are what the lattice likes least.
    assert (upper - lower)[2:] == pytest.approx(0, abs=4e-3)


def test_one_response_in_closed_form() -> None:
    epsilon = 1.0  # randomised response is what f_{ε,0} is made for
    alphas = np.linspace(0, 1, 21)
    lower, upper = tradeoff_curve(EpsilonDelta(epsilon), alphas)
    truth = np.maximum(0, np.maximum(1 - math.e * alphas, (1 - alphas) / math.e))
    assert (lower <= truth + 1e-15).all()
    assert (truth <= upper + 1e-15).all()
    assert lower == pytest.approx(truth, abs=1e-4)
    assert upper == pytest.approx(truth, abs=1e-4)


def test_epsilon_delta() -> None:
    alphas = np.geomspace(1e-3, 0.9, 20)
    lower, upper = tradeoff_curve(EpsilonDelta(0.7, 0.01), alphas)
    y = math.exp(0.7)
    truth = np.maximum(0, np.maximum(0.99 - y * alphas, (0.99 - alphas) / y))
    assert (lower <= truth + 1e-12).all()
    assert (truth <= upper + 1e-12).all()
    assert upper - lower == pytest.approx(0, abs=1e-3)


# ---------------------------------------------------------------- Gaussian curves


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 7.0, 1e4])
def test_gaussian_in_closed_form(sigma: float) -> None:
    lower, upper = tradeoff_curve(Gaussian(sigma), RATES)
    for alpha, low, high in zip(RATES, lower, upper, strict=True):
        with mp.workdps(40):
            z = (
                mp.sqrt(2) * mp.erfinv(1 - 2 * mp.mpf(float(alpha)))
                if 0 < alpha < 1
                else (1 - 2 * alpha) * mp.inf
            )
            truth = mp.ncdf(z - 1 / mp.mpf(sigma))
            assert low <= truth <= high
            assert high - low <= 1e-11 * truth + mp.mpf("1e-299")


def test_composed_gaussians_are_one() -> None:
    ours = tradeoff_curve(Repeated(Gaussian(4.0), 16), RATES)
    one = tradeoff_curve(Gaussian(1.0), RATES)
    assert np.array(ours) == pytest.approx(np.array(one), rel=1e-12)
    doubled = tradeoff_curve(Gaussian(2.0), RATES, neighboring_relation="replace-one")
    assert np.array(doubled) == pytest.approx(np.array(one), rel=1e-12)


def sampled_curve(sigma: float, q: float, alpha: float) -> object:
    """f(α) of one sampled Gaussian: the highest line, by golden-section search."""
    best = mp.mpf(0)
    for line in (
        lambda y, delta: 1 - delta - y * alpha,
        lambda y, delta: (1 - delta - alpha) / y,
    ):
        low, high = mp.mpf(0), mp.mpf(math.log1p(q * math.expm1(9 / sigma)))
        ratio = (mp.sqrt(5) - 1) / 2
        for _ in range(60):
            a, b = high - ratio * (high - low), low + ratio * (high - low)
            left, right = (line(mp.e**x, gaussian_delta(sigma, q, x)) for x in (a, b))
            low, high = (a, high) if left < right else (low, b)
            best = max(best, left, right)
        best = max(best, line(mp.mpf(1), gaussian_delta(sigma, q, 0)))
    return best


@pytest.mark.parametrize(("sigma", "q"), [(1.0, 0.1), (0.7, 0.01), (3.0, 0.5)])
def test_sampled_gaussian_is_bracketed(sigma: float, q: float) -> None:
    alphas = [1e-5, 1e-3, 0.1, 0.5, 0.9]
    lower, upper = tradeoff_curve(PoissonSampled(Gaussian(sigma), q), alphas)
    for alpha, low, high in zip(alphas, lower, upper, strict=True):
        truth = sampled_curve(sigma, q, alpha)
        assert low <= truth <= high
        assert high - low <= 2.1e-3 * (1 - alpha - truth)


def test_the_sampled_curve_is_reached_by_a_likelihood_ratio_test() -> None:
    # The test "x > t" for N(0, σ²) against the mixture, and the other way round.
    sigma, q = 1.0, 0.1
    for t in (1.5, 2.5, 3.5):
        alpha = float(mp.ncdf(-t / sigma))
        power = (1 - q) * alpha + q * float(mp.ncdf((1 - t) / sigma))
        _, high = tpr_at_fpr(PoissonSampled(Gaussian(sigma), q), alpha)
        assert power <= high
        assert power == pytest.approx(high, rel=3e-3)


def test_dpsgd_against_lines_from_dp_accounting() -> None:
    parts = (("gaussian", 1.1, 256 / 60_000, 14_062),)
    epsilons = np.linspace(0, 4.5, 150)
    above, below = (
        np.array(google_pld(parts, 1e-3, pessimistic).get_delta_for_epsilon(epsilons))
        for pessimistic in (True, False)
    )
    alphas = np.geomspace(1e-5, 0.9, 30)
    lower, upper = tradeoff_curve(DPSGD, alphas)
    theirs = from_below(epsilons, above + 1e-11, alphas)  # sound, and a little below
    optimistic = from_below(epsilons, below - 1e-11, alphas)  # no bound: within the lines' spacing of one
    assert (theirs <= upper).all()
    assert (lower <= optimistic + 1e-3).all()
    assert lower == pytest.approx(theirs, abs=2e-3)


# ---------------------------------------------------------------- every curve

EVENTS: dict[str, tuple[Event, str]] = {
    "dpsgd": (DPSGD, "zero-out"),
    "one step": (PoissonSampled(Gaussian(1.0), 0.01), "add-or-remove-one"),
    "laplace": (Repeated(Laplace(5.0), 20), "zero-out"),
    "responses": (Repeated(RandomizedResponse(0.5, 3), 10), "replace-one"),
    "fixed size": (Repeated(SampledWithoutReplacement(Gaussian(1.0), 100, 10_000), 500), "replace-one"),
    "little": (Repeated(PoissonSampled(Gaussian(30.0), 1e-3), 10), "zero-out"),
    "mixture": (Composed([Repeated(PoissonSampled(Gaussian(1.0), 0.01), 1000), Laplace(2.0)]), "zero-out"),
    "gaussian": (Gaussian(1.5), "zero-out"),
    "nothing": (Composed([]), "zero-out"),
    "everything": (NonPrivate(), "zero-out"),
}


@pytest.mark.parametrize("name", EVENTS)
def test_what_every_curve_is(name: str) -> None:
    event, relation = EVENTS[name]
    alphas = np.unique(np.concatenate([np.linspace(0, 1, 41), np.geomspace(1e-5, 0.03, 20)]).round(12))
    lower, upper = tradeoff_curve(event, alphas, neighboring_relation=relation)  # type: ignore[arg-type]
    assert (lower >= 0).all()
    assert (lower <= upper).all()
    assert (upper <= 1 - alphas).all()
    assert lower[-1] == upper[-1] == 0
    if name != "everything":
        assert lower[0] >= 1 - 1e-9
    wanted = 2.1e-3 * (1 - alphas - lower) + 1e-13
    assert (upper - lower <= wanted)[1:].all()
    # The lower bound is a largest of falling lines: falling, and convex.
    assert (np.diff(lower) <= 1e-12).all()
    slopes = np.diff(lower) / np.diff(alphas)
    assert (np.diff(slopes) >= -1e-9 / np.diff(alphas)[1:]).all()
    # Symmetric: f(f(α)) = α where f is above 0 and falls.
    inside = (lower > 1e-3) & (alphas > 1e-3)
    again_lower, again_upper = tradeoff_curve(
        event,
        lower[inside],
        neighboring_relation=relation,  # type: ignore[arg-type]
    )
    assert (again_upper >= alphas[inside] - 1e-9).all()
    again_lower, _ = tradeoff_curve(
        event,
        upper[inside],
        neighboring_relation=relation,  # type: ignore[arg-type]
    )
    assert (again_lower <= alphas[inside] + 1e-9).all()


@settings(max_examples=10, deadline=None)
@given(
    sigma=st.floats(0.5, 20),
    q=st.floats(1e-3, 0.9),
    steps=st.integers(1, 2000),
    alpha=st.floats(1e-6, 1 - 1e-6),
)
def test_brackets_of_different_tolerance_overlap(sigma: float, q: float, steps: int, alpha: float) -> None:
    event = Repeated(PoissonSampled(Gaussian(sigma), q), steps)
    low, high = tpr_at_fpr(event, alpha)
    loose_low, loose_high = tpr_at_fpr(event, alpha, tolerance=0.1)
    assert alpha - 1e-14 <= low <= high <= 1
    assert low <= loose_high
    assert loose_low <= high


def test_the_upper_bound_holds_for_bounds_on_delta_that_are_far_apart() -> None:
    """Any curve between the given bounds on δ must stay below: here the Gaussian, with sloppy brackets."""
    rng = np.random.default_rng(3)
    alphas = np.linspace(0, 1, 101)
    for mu in (0.3, 1.0, 3.0):
        truth = np.array(tradeoff_curve(Gaussian(1 / mu), alphas)[0])
        for _ in range(50):
            epsilons = np.append(0.0, np.sort(rng.uniform(1e-3, 6 * mu, 7)))
            delta = np.array([float(gaussian_delta(1 / mu, 1.0, float(epsilon))) for epsilon in epsilons])
            below, above = delta * rng.uniform(0.5, 1, 8), delta * rng.uniform(1, 1.5, 8)
            above = np.minimum(above, 1)
            upper, decisive = from_above(epsilons, below, above, alphas)
            assert (upper >= truth - 1e-12).all()
            assert (decisive >= 0).all()
            assert (from_below(epsilons, above, alphas) <= truth + 1e-12).all()


def test_a_hundred_rates_in_well_under_a_second() -> None:
    alphas = np.geomspace(1e-5, 0.999, 100)
    tradeoff_curve(DPSGD, alphas[:1])
    start = time.perf_counter()
    tradeoff_curve(DPSGD, alphas)
    assert time.perf_counter() - start < 4  # 0.25 s on an idle core


# ---------------------------------------------------------------- single numbers


def test_advantage_is_total_variation() -> None:
    for sigma in (0.3, 1.0, 20.0):
        low, high = attack_advantage(Gaussian(sigma))
        assert low <= 2 * mp.ncdf(1 / mp.mpf(sigma) / 2) - 1 <= high
        assert high == pytest.approx(low, rel=3e-9)
    first, second = outcomes(*responses(0.5, 3, "zero-out"), 5)
    low, high = attack_advantage(Repeated(RandomizedResponse(0.5, 3), 5))
    truth = np.abs(first - second).sum() / 2
    assert low <= truth * (1 + 1e-12)
    assert truth <= high * (1 + 1e-12)
    assert high - low <= 3e-3 * high
    assert attack_advantage(Composed([])) == (0, 0)
    assert attack_advantage(NonPrivate()) == (1, 1)


def test_tpr_at_fpr() -> None:
    # μ = 1, so TPR at FPR 0.1 % is Φ(Φ⁻¹(0.001) + 1) = Φ(−2.0902…).
    low, high = tpr_at_fpr(Gaussian(1.0), 1e-3)
    assert low <= high
    assert high == pytest.approx(0.018299, abs=1e-6)
    low, high = tpr_at_fpr(DPSGD, 1e-3)
    assert 1e-3 < low <= high <= low + 2e-3 * high
    assert tpr_at_fpr(Composed([]), 0.25) == (0.25, 0.25)
    assert tpr_at_fpr(NonPrivate(), 0.0) == (1, 1)
    assert tpr_at_fpr(DPSGD, 1.0) == (1, 1)


def test_accuracy() -> None:
    assert attack_accuracy(0.0) == 0.5
    assert attack_accuracy(1.0) == 1.0
    assert attack_accuracy(0.2) == 0.6


# ---------------------------------------------------------------- noise for a risk


def plan(sigma: float) -> Event:
    return Repeated(PoissonSampled(Gaussian(sigma), 0.01), 1000)


def test_calibration_in_closed_form() -> None:
    sigma = calibrate_noise_for_risk(Gaussian, fpr=0.01, tpr=0.05)
    with mp.workdps(30):
        quantile = [mp.sqrt(2) * mp.erfinv(2 * mp.mpf(x) - 1) for x in ("0.05", "0.01")]
        exact = float(1 / (quantile[0] - quantile[1]))
    assert exact * (1 - 1e-9) <= sigma <= exact * 1.002
    sigma = calibrate_noise_for_risk(Gaussian, max_advantage=0.1)
    with mp.workdps(30):
        exact = float(1 / (2 * mp.sqrt(2) * mp.erfinv(mp.mpf("0.1"))))
    assert exact * (1 - 1e-9) <= sigma <= exact * 1.002


@pytest.mark.parametrize(("fpr", "tpr"), [(0.01, 0.02), (1e-3, 0.01), (0.1, 0.4)])
def test_calibrated_tpr_ends_at_or_below_and_within_a_thousandth(fpr: float, tpr: float) -> None:
    sigma = calibrate_noise_for_risk(plan, fpr=fpr, tpr=tpr)
    _, high = tpr_at_fpr(plan(sigma), fpr, tolerance=1e-3 / 4)
    assert high <= tpr
    assert high - fpr >= (1 - 1e-3) * (tpr - fpr) * (1 - 1e-9)
    # A little less noise does not do.
    assert tpr_at_fpr(plan(sigma * 0.995), fpr)[0] > tpr


@pytest.mark.parametrize("goal", [0.01, 0.3])
def test_calibrated_advantage(goal: float) -> None:
    sigma = calibrate_noise_for_risk(plan, max_advantage=goal)
    _, high = attack_advantage(plan(sigma), tolerance=1e-3 / 4)
    assert (1 - 1e-3) * goal <= high <= goal
    assert attack_advantage(plan(sigma * 0.995))[0] > goal


def test_calibration_under_another_relation_and_another_event() -> None:
    one = calibrate_noise_for_risk(Gaussian, fpr=0.01, tpr=0.1)
    two = calibrate_noise_for_risk(Gaussian, fpr=0.01, tpr=0.1, neighboring_relation="replace-one")
    assert two == pytest.approx(2 * one, rel=2e-3)
    scale = calibrate_noise_for_risk(Laplace, max_advantage=0.2)
    # Total variation of Laplace(0, b) and Laplace(1, b) is 1 − e^{−1/2b}.
    assert scale == pytest.approx(-0.5 / math.log(0.8), rel=3e-3)


def test_nothing_to_hide_takes_the_least_noise() -> None:
    assert calibrate_noise_for_risk(lambda _: Composed([]), max_advantage=0.5) == 0.01


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"fpr": 0.1},
        {"tpr": 0.1},
        {"fpr": 0.1, "tpr": 0.2, "max_advantage": 0.1},
        {"fpr": 0.1, "tpr": 0.1},
        {"fpr": 0.2, "tpr": 0.1},
        {"fpr": 0.0, "tpr": 0.1},
        {"fpr": 0.1, "tpr": 1.0},
        {"fpr": -0.1, "tpr": 0.5},
        {"fpr": "x", "tpr": 0.5},
        {"max_advantage": 0.0},
        {"max_advantage": 1.0},
        {"max_advantage": 0.1, "tolerance": 0.0},
        {"max_advantage": 0.1, "neighboring_relation": "none"},
    ],
)
def test_impossible_risks_take_one_line(asked: dict[str, float]) -> None:
    with pytest.raises(UserError) as caught:
        calibrate_noise_for_risk(plan, **asked)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_risk_that_no_noise_meets() -> None:
    with pytest.raises(UnreachableBudget, match="No noise multiplier"):
        calibrate_noise_for_risk(lambda _: NonPrivate(), max_advantage=0.5)
    with pytest.raises(UserError, match="such as Gaussian"):
        calibrate_noise_for_risk(lambda sigma: sigma, max_advantage=0.5)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("rates", [[-0.1], [1.1], [math.nan], 0.5, ["x"], [[0.1]], None])
def test_bad_rates_take_one_line(rates: object) -> None:
    with pytest.raises(UserError) as caught:
        tradeoff_curve(Gaussian(1.0), rates)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_other_mistakes() -> None:
    with pytest.raises(UserError, match="tolerance"):
        tradeoff_curve(Gaussian(1.0), [0.1], tolerance=2.0)
    with pytest.raises(UserError, match="such as Gaussian"):
        attack_advantage("Gaussian")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="relation"):
        attack_advantage(Gaussian(1.0), neighboring_relation="x")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="advantage"):
        attack_accuracy(1.5)
    with pytest.raises(UnsupportedEvent, match="replace-one"):
        tradeoff_curve(DPSGD, [0.1], neighboring_relation="replace-one")


def test_no_rates_no_answer() -> None:
    assert [len(bound) for bound in tradeoff_curve(DPSGD, [])] == [0, 0]
