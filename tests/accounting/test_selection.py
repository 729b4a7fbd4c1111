"""The price of choosing the best of a random number of runs, against exact answers for small mechanisms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import mpmath as mp
import numpy as np
import numpy.typing as npt
import pytest
from dp_accounting.dp_event import GaussianDpEvent, RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from accounting.errors import UserError
from accounting.selection import (
    NegativeBinomialRuns,
    PoissonRuns,
    RunsDistribution,
    from_mean_runs,
    selection_divergence,
)

FloatArray = npt.NDArray[np.float64]
Masses = Sequence[Any]

# ---------------------------------------------------------------- exact answers, by mpmath


def generating_function(runs: RunsDistribution) -> Callable[[Any], Any]:
    """E[x^K], summed by hand from Papernot & Steinke 2022, Definition 1; e^{μ(x−1)} for Poisson."""
    if isinstance(runs, PoissonRuns):
        return lambda x: mp.e ** (runs.mean * (x - 1))
    assert isinstance(runs, NegativeBinomialRuns)
    shape, gamma = mp.mpf(runs.shape), mp.mpf(runs.gamma)
    if shape == 0:
        return lambda x: mp.log(1 - (1 - gamma) * x) / mp.log(gamma)
    return lambda x: ((1 - (1 - gamma) * x) ** -shape - 1) / (gamma**-shape - 1)


def best_of(base: Masses, runs: RunsDistribution) -> list[Any]:
    """The distribution of the best of K, for outcomes in ascending order; K = 0 is an outcome of its own.

    P(best ≤ y) = E[F(y)^K].
    """
    f = generating_function(runs)
    at = [mp.mpf(0)]
    for mass in base:
        at.append(at[-1] + mass)
    masses = [f(high) - f(low) for low, high in itertools.pairwise(at)]
    return [f(at[0]), *masses] if f(at[0]) > 0 else masses


def exact_divergence(p: Masses, q: Masses, order: float) -> float:
    """The Rényi divergence, of the direction in which it is larger."""
    with mp.workdps(60):
        a = mp.mpf(order)
        return max(
            float(mp.log(mp.fsum(x**a * y ** (1 - a) for x, y in zip(*pair, strict=True))) / (a - 1))
            for pair in ((p, q), (q, p))
        )


def exact_selection(p: Masses, q: Masses, runs: RunsDistribution, order: float) -> float:
    with mp.workdps(60):
        return exact_divergence(best_of(p, runs), best_of(q, runs), order)


def divergence_of(p: Masses, q: Masses) -> Callable[[FloatArray], FloatArray]:
    """The base's divergence as `selection_divergence` asks for it."""
    log_p, log_q = (np.array([float(mp.log(x)) for x in masses]) for masses in (p, q))

    def divergence(orders: FloatArray) -> FloatArray:
        a = orders[:, None]
        there = np.logaddexp.reduce(a * log_p + (1 - a) * log_q, axis=1)
        back = np.logaddexp.reduce(a * log_q + (1 - a) * log_p, axis=1)
        return np.asarray(np.maximum(0, np.maximum(there, back)) / (orders - 1))

    return divergence


def delta_of(p: Masses, q: Masses) -> Callable[[float], float]:
    def delta(epsilon: float) -> float:
        e = mp.e**epsilon
        there = mp.fsum(max(mp.mpf(0), x - e * y) for x, y in zip(p, q, strict=True))
        back = mp.fsum(max(mp.mpf(0), y - e * x) for x, y in zip(p, q, strict=True))
        return min(1.0, float(max(there, back)))

    return delta


def bound(p: Masses, q: Masses, runs: RunsDistribution, orders: Sequence[float]) -> FloatArray:
    return selection_divergence(np.array(orders), divergence_of(p, q), runs, delta_of(p, q))


# ---------------------------------------------------------------- the bound is above the truth

logs = st.floats(-6, 0)
shapes = st.sampled_from([-0.9, -0.5, 0.0, 1e-10, 0.5, 1.0, 3.0, 20.0])


@st.composite
def bases(draw: st.DrawFn) -> tuple[Masses, Masses]:
    """Two distributions on two to four ordered outcomes, some of them rare, from near to far apart."""
    size = draw(st.integers(2, 4))
    apart = draw(st.sampled_from([0.01, 0.3, 1.0, 4.0]))
    weights = [mp.mpf(10) ** draw(logs) for _ in range(size)]
    moved = [w * mp.e ** mp.mpf(apart * draw(st.floats(-1, 1))) for w in weights]
    return tuple([w / mp.fsum(ws) for w in ws] for ws in (weights, moved))  # type: ignore[return-value]


orders_drawn = st.lists(st.floats(-1.7, 2.3).map(lambda x: 1 + 10**x), min_size=1, max_size=3)


@settings(deadline=None, max_examples=400)
@given(bases(), shapes, st.floats(-5, -0.001).map(lambda x: 10**x), orders_drawn)
def test_negative_binomial_bound_is_above_the_exact_divergence(
    base: tuple[Masses, Masses], shape: float, gamma: float, orders: list[float]
) -> None:
    runs = NegativeBinomialRuns(shape, gamma)
    for order, upper in zip(orders, bound(*base, runs, orders), strict=True):
        assert exact_selection(*base, runs, order) <= upper


@settings(deadline=None, max_examples=400)
@given(bases(), st.floats(-2, 1.7).map(lambda x: 10**x), orders_drawn)
def test_poisson_bound_is_above_the_exact_divergence(
    base: tuple[Masses, Masses], mean: float, orders: list[float]
) -> None:
    runs = PoissonRuns(mean)
    for order, upper in zip(orders, bound(*base, runs, orders), strict=True):
        assert exact_selection(*base, runs, order) <= upper


def masses(*values: float) -> Masses:
    return [mp.mpf(1) - mp.fsum(values), *map(mp.mpf, values)]


@pytest.mark.parametrize("shape", [-0.5, 0.0, 1.0, 2.0])
def test_charging_one_run_undercounts_by_the_factor_of_the_theorem(shape: float) -> None:
    """A base that is ε-DP, whose best of K has (2 + η)·ε nearly: no constant in Theorem 2 can be smaller.

    On one data set the middle outcome is e^ε times as likely, and the best one e^{−ε} times, so the
    middle one wins more often for both reasons.
    """
    epsilon, order = 0.3, 2000.0
    near, far = masses(1e-4, 1e-2), masses(1e-4 * math.exp(epsilon), 1e-2 * math.exp(-epsilon))
    runs = NegativeBinomialRuns(shape, 1e-7)
    one = exact_divergence(near, far, order)
    truth = exact_selection(near, far, runs, order)
    assert one <= epsilon
    assert (
        (2 + shape) * 0.95 * epsilon
        < truth
        <= bound(near, far, runs, [order])[0]
        < (2 + shape) * 1.1 * epsilon
    )


@pytest.mark.parametrize("runs", [PoissonRuns(20.0), NegativeBinomialRuns(1.0, 0.05)], ids=str)
def test_the_mean_number_of_runs_is_paid_for(runs: RunsDistribution) -> None:
    """A best outcome that is rare comes up E[K] times as often: the term log E[K]/(λ−1), whole."""
    near, far, order = masses(1e-9), masses(1e-3), 3.0
    truth, one = exact_selection(near, far, runs, order), exact_divergence(near, far, order)
    assert truth == pytest.approx(one + math.log(runs.mean_runs) / (order - 1), rel=0.02)
    assert one * 1.05 < truth <= bound(near, far, runs, [order])[0]


def test_without_the_mass_of_no_runs_the_poisson_bound_would_be_false() -> None:
    """With μ < 1 the term log(μ)/(λ−1) alone is negative where the truth is not."""
    near, far = masses(0.3), masses(0.31)
    runs, order = PoissonRuns(0.5), 2.0
    rho = divergence_of(near, far)(np.array([order]))[0]
    delta = delta_of(near, far)(math.log1p(1 / (order - 1)))
    without = rho + runs.mean * delta + math.log(runs.mean) / (order - 1)
    assert without < 0 < exact_selection(near, far, runs, order) <= bound(near, far, runs, [order])[0]


# ---------------------------------------------------------------- values from elsewhere


def gaussian(sigma: float) -> Callable[[FloatArray], FloatArray]:
    return lambda orders: orders / (2 * sigma**2)


@pytest.mark.parametrize("shape", [-0.5, 0.0, 1.0, 4.0])
@pytest.mark.parametrize("gamma", [0.3, 0.01, 1e-6])
def test_gaussian_base_in_closed_form(shape: float, gamma: float) -> None:
    """With ε(λ) = λ/2σ² the best λ̂ is σ√(2L) with L = log(1/γ), and Theorem 2 becomes

    λ/2σ² + (1+η)·(√(2L)/σ − 1/2σ²) + log E[K]/(λ−1).
    """
    sigma, order = 4.0, 60.0
    with mp.workdps(30):
        f = generating_function(NegativeBinomialRuns(shape, gamma))
        inverse = mp.log(1 / mp.mpf(gamma))
        wanted = order / (2 * sigma**2) + (1 + shape) * (mp.sqrt(2 * inverse) / sigma - 1 / (2 * sigma**2))
        wanted = float(wanted + mp.log(mp.diff(f, mp.mpf(1), direction=-1)) / (order - 1))
    got = selection_divergence(np.array([order]), gaussian(sigma), NegativeBinomialRuns(shape, gamma))[0]
    assert wanted <= got * (1 + 1e-9)
    assert got == pytest.approx(wanted, rel=1e-4)


def test_golden_values() -> None:
    # 20/32 + 2·(√(2·log 100)/4 − 1/32) + log(100)/19, by hand; the search over λ̂ is on a grid.
    geometric = selection_divergence(np.array([20.0]), gaussian(4.0), NegativeBinomialRuns(1.0, 0.01))
    assert 2.322307 < geometric[0] < 2.3226
    # log(e⁻⁵ + 5·e^{2·(0.1 + 5·0.01)})/2 = log(0.0067379 + 6.7492940)/2
    flat = selection_divergence(np.array([3.0]), lambda x: 0.1 + 0 * x, PoissonRuns(5), lambda _: 0.01)
    assert flat[0] == pytest.approx(0.9552180, abs=1e-6)


def test_pure_privacy_of_a_geometric_number_of_runs_costs_three_times() -> None:
    """The result of Liu & Talwar 2019: at most 3ε, however many runs, at large orders."""
    runs = NegativeBinomialRuns(1.0, 1e-4)
    got = selection_divergence(np.array([1e6]), lambda x: 0.2 + 0 * x, runs)[0]
    assert 0.6 < got < 0.605


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("mean", [1.5, 10.0, 1000.0])
def test_dp_accounting_agrees(shape: float, mean: float) -> None:
    """Never above, since more λ̂ are tried, and hardly below."""
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 65)) + [128.0, 256.0, 512.0, 1024.0]
    theirs = RdpAccountant(orders)
    theirs.compose(RepeatAndSelectDpEvent(GaussianDpEvent(3.0), mean, shape))
    ours = selection_divergence(np.array(orders), gaussian(3.0), from_mean_runs(mean, shape))
    assert np.all(ours <= theirs._rdp * (1 + 1e-8))
    assert ours[:140] == pytest.approx(theirs._rdp[:140], rel=0.01)


# ---------------------------------------------------------------- edges


def test_the_bound_does_not_fall_with_the_order_and_keeps_the_callers_order() -> None:
    orders = np.array([50.0, 1.001, 3.0, 3.0, 1e5])
    for runs in (NegativeBinomialRuns(0.5, 0.01), PoissonRuns(7.0)):
        bounds = selection_divergence(orders, gaussian(5.0), runs, lambda _: 1e-3)
        assert bounds[2] == bounds[3]
        assert np.all(np.diff(bounds[np.argsort(orders)]) >= 0)
        assert np.all(bounds >= gaussian(5.0)(orders) * (orders > 2))


def test_where_nothing_is_known_of_the_base_nothing_is_proven() -> None:
    def known_below_ten(orders: FloatArray) -> FloatArray:
        return np.where(orders < 10, 0.1, np.nan)

    orders = np.array([2.0, 9.0, 10.0, 11.0])
    for runs in (NegativeBinomialRuns(1.0, 0.01), PoissonRuns(7.0)):
        bounds = selection_divergence(orders, known_below_ten, runs, lambda _: 0.0)
        assert np.isfinite(bounds).tolist() == [True, True, False, False]
    nothing = selection_divergence(orders, lambda x: np.inf + 0 * x, NegativeBinomialRuns(1.0, 0.01))
    assert np.all(np.isinf(nothing))
    assert selection_divergence(np.array([]), gaussian(1.0), NegativeBinomialRuns(1.0, 0.5)).shape == (0,)


@pytest.mark.parametrize("shape", [-1 + 1e-9, -1e-9, 0.0, 1e-9, 1.0, 1000.0])
@pytest.mark.parametrize("gamma", [1e-15, 1e-3, 1 - 1e-12])
def test_extreme_distributions_are_handled(shape: float, gamma: float) -> None:
    runs = NegativeBinomialRuns(shape, gamma)
    bounds = selection_divergence(np.array([1 + 1e-6, 2.0, 1e7]), gaussian(3.0), runs)
    assert np.all(np.isfinite(bounds))
    assert runs.mean_runs >= 1 - 1e-9
    rng = np.random.default_rng(0)
    assert min(runs.draw_runs(rng) for _ in range(50)) >= 1


# ---------------------------------------------------------------- the distribution of K

DISTRIBUTIONS = [
    *(NegativeBinomialRuns(shape, gamma) for shape in (-0.7, 0.0, 0.4, 1.0, 6.0) for gamma in (0.03, 0.6)),
    PoissonRuns(0.4),
    PoissonRuns(12.0),
]


@pytest.mark.parametrize("runs", DISTRIBUTIONS, ids=str)
def test_probabilities_have_the_generating_function_and_the_mean(runs: RunsDistribution) -> None:
    k = np.arange(0, 4000)
    probabilities = np.array([runs.probability_of(int(i)) for i in k])
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert k @ probabilities == pytest.approx(runs.mean_runs, rel=1e-10)
    f = generating_function(runs)
    for x in (0.1, 0.5, 0.95):
        assert float(f(mp.mpf(x))) == pytest.approx(float(probabilities @ x**k), rel=1e-10)
    assert runs.probability_of(-1) == 0
    if isinstance(runs, NegativeBinomialRuns):
        assert runs.probability_of(0) == 0


def chi_square(draws: npt.NDArray[np.int64], runs: RunsDistribution) -> float:
    """The p-value of `draws` under `runs`, in cells of at least 25 expected draws each."""
    edges, mass, expected = [], 0.0, []
    for k in range(int(draws.max()) + 2):
        mass += runs.probability_of(k) * len(draws)
        if mass >= 25:
            edges.append(k)
            expected.append(mass)
            mass = 0.0
    counts = np.bincount(np.searchsorted(edges, draws), minlength=len(edges) + 1)
    expected.append(max(len(draws) - sum(expected), 1e-9))
    if expected[-1] < 25:  # the tail joins the last cell
        expected = [*expected[:-2], expected[-2] + expected[-1]]
        counts = np.array([*counts[:-2], counts[-2] + counts[-1]])
    statistic = float(np.sum((counts - np.array(expected)) ** 2 / np.array(expected)))
    return float(stats.chi2.sf(statistic, len(counts) - 1))


@pytest.mark.parametrize("runs", DISTRIBUTIONS, ids=str)
def test_draws_have_the_distribution(runs: RunsDistribution) -> None:
    """Wrongly rejected at a rate of 1e-10; a mean or a shape that is far off is rejected at the same level.

    Far off: 30% more runs after the first, or the same mean with a 1 + η that is 50% larger.
    """
    rng = np.random.default_rng(20_220_425)
    draws = np.array([runs.draw_runs(rng) for _ in range(40_000)])
    assert chi_square(draws, runs) > 1e-10
    if isinstance(runs, PoissonRuns):
        assert chi_square(draws, PoissonRuns(runs.mean * 1.3)) < 1e-10
    elif isinstance(runs, NegativeBinomialRuns):
        assert chi_square(draws, from_mean_runs(1.3 * runs.mean_runs - 0.3, runs.shape)) < 1e-10
        other = from_mean_runs(runs.mean_runs, runs.shape + 0.5 * (1 + runs.shape))
        if runs.mean_runs > 2:
            assert chi_square(draws, other) < 1e-10


@settings(deadline=None, max_examples=100)
@given(st.floats(-3, 5).map(lambda x: 1 + 10**x), st.floats(-0.4, 50))
def test_a_mean_leads_to_the_distribution_that_has_it(mean: float, shape: float) -> None:
    runs = from_mean_runs(mean, shape)
    assert isinstance(runs, NegativeBinomialRuns)
    assert runs.shape == shape
    assert runs.mean_runs - 1 == pytest.approx(mean - 1, rel=1e-9)


def test_a_mean_of_known_distributions() -> None:
    assert from_mean_runs(20.0, 1.0).mean_runs == pytest.approx(20, rel=1e-12)
    geometric, logarithmic = from_mean_runs(20.0, 1.0), NegativeBinomialRuns(0.0, 0.1)
    assert isinstance(geometric, NegativeBinomialRuns)
    assert geometric.gamma == pytest.approx(0.05, rel=1e-12)
    assert logarithmic.mean_runs == pytest.approx(9 / math.log(10), rel=1e-14)
    assert from_mean_runs(0.5, math.inf) == PoissonRuns(0.5)
    assert from_mean_runs(1 + 1e-15, 0.0).mean_runs == pytest.approx(1, abs=1e-12)


# ---------------------------------------------------------------- mistakes

RUNS = NegativeBinomialRuns(1.0, 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NegativeBinomialRuns(-1, 0.5), "'shape' parameter of NegativeBinomialRuns must be above -1"),
        (lambda: NegativeBinomialRuns(math.nan, 0.5), "'shape'"),
        (lambda: NegativeBinomialRuns(math.inf, 0.5), "'shape'"),
        (lambda: NegativeBinomialRuns("1", 0.5), "'shape'"),  # type: ignore[arg-type]
        (lambda: NegativeBinomialRuns(1, 1.0), "'gamma' parameter of NegativeBinomialRuns must be in"),
        (lambda: NegativeBinomialRuns(1, 0), "'gamma'"),
        (lambda: NegativeBinomialRuns(1, True), "'gamma'"),
        (lambda: PoissonRuns(0), "'mean' parameter of PoissonRuns must be above 0"),
        (lambda: PoissonRuns(10**400), "'mean'"),
        (lambda: from_mean_runs(1.0, 1.0), "'mean' parameter of from_mean_runs must be above 1"),
        (lambda: from_mean_runs(10.0, -1.0), "'shape'"),
        (lambda: from_mean_runs(1e6, -0.9), "The shape -0.9 reaches a mean of at most"),
        (lambda: RUNS.probability_of(1.5), "must be a whole number. Got 1.5"),  # type: ignore[arg-type]
        (lambda: selection_divergence(np.array([1.0, 2.0]), gaussian(1.0), RUNS), "above 1. Got"),
        (lambda: selection_divergence(np.array(2.0), gaussian(1.0), RUNS), "The orders must be a list"),
        (
            lambda: selection_divergence(np.array([2.0]), lambda _: np.ones(1), RUNS),
            "one number for each order",
        ),
        (lambda: selection_divergence(np.array([2.0]), lambda x: -x, RUNS), "at least 0"),
        (lambda: selection_divergence(np.array([2.0]), gaussian(1.0), PoissonRuns(3)), "needs base_delta"),
        (
            lambda: selection_divergence(np.array([2.0]), gaussian(1.0), PoissonRuns(3), lambda _: 1.5),
            "in [0, 1]. Got 1.5",
        ),
        (
            lambda: selection_divergence(np.array([2.0]), gaussian(1.0), 10),  # type: ignore[arg-type]
            "must be NegativeBinomialRuns or PoissonRuns. Got 10",
        ),
    ],
)
def test_a_mistake_gets_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
