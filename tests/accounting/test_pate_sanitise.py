"""Publishing a data-dependent ε: its sensitivity against brute force, its noise against quadrature."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pate_oracle as oracle
import pytest
from scipy.special import ndtri

from accounting.errors import UserError
from accounting.pate import confident_gnmax_rdp, gnmax_rdp
from accounting.pate_sanitise import (
    NoisyMax,
    PrivateCost,
    SanitisedRelease,
    gnss_noise_multiplier,
    gnss_rdp,
    private_cost,
    sanitised_epsilon,
)
from accounting.rdp import ORDERS, epsilon_from_rdp

# ---- The price, and how much one teacher can change it -----------------------------------------------

SETTINGS = [
    (NoisyMax(0.6), 2.0, 0.1),
    (NoisyMax(1.3), 1.5, 0.4),
    (NoisyMax(1.3), 4.0, 0.05),
    (NoisyMax(1.3, threshold=6.0, threshold_std=0.8), 3.0, 0.1),
    (NoisyMax(2.5, threshold=9.5, threshold_std=2.0), 2.0, 0.3),
]


def costs_of_all(
    datasets: list[tuple[tuple[int, ...], ...]], mechanism: NoisyMax, order: float, beta: float, both: bool
) -> list[PrivateCost]:
    return [
        private_cost(np.array(votes), mechanism, order=order, beta=beta, both_directions=both)
        for votes in datasets
    ]


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("mechanism", "order", "beta"), SETTINGS)
@pytest.mark.parametrize(("teachers", "classes", "queries"), [(9, 3, 1), (12, 2, 1), (4, 3, 2)])
def test_smooth_sensitivity_against_all_data_sets(
    mechanism: NoisyMax, order: float, beta: float, both: bool, teachers: int, classes: int, queries: int
) -> None:
    """S is at least max over D′ of e^{−β·distance}·LS(D′), and β-smooth; LS from all neighbours."""
    datasets = list(itertools.product(oracle.histograms(teachers, classes), repeat=queries))
    costs = costs_of_all(datasets, mechanism, order, beta, both)
    bound = np.array([cost.bound for cost in costs])
    smooth = np.array([cost.smooth_sensitivity for cost in costs])
    # A teacher changes one vote of each query, so the queries' distances do not add up.
    distance = np.array(
        [[max(oracle.moves(a, b) for a, b in zip(d, e, strict=True)) for e in datasets] for d in datasets]
    )
    near = distance <= 1
    change = np.abs(bound[:, None] - bound)
    assert queries > 1 or change[near].max() > 0.01 * costs[0].ceiling  # the price depends on the votes
    assert np.all(change[near] <= np.minimum(smooth[:, None], smooth)[near])
    assert np.all((smooth[:, None] <= math.exp(beta) * smooth * (1 + 1e-12)) | ~near)
    brute = np.max(np.exp(-beta * distance) * np.max(change * near, axis=1), axis=1)
    assert np.all(smooth >= brute * (1 - 1e-12))
    assert np.all(bound <= np.array([cost.ceiling for cost in costs]) * (1 + 1e-12))


@pytest.mark.parametrize(("mechanism", "order", "beta"), SETTINGS)
def test_the_price_is_at_least_the_papers_and_not_much_more(
    mechanism: NoisyMax, order: float, beta: float
) -> None:
    rng = np.random.default_rng(1)
    votes = np.array([rng.multinomial(12, p) for p in rng.dirichlet([0.3] * 4, 50)])
    if mechanism.threshold is None:
        paper = gnmax_rdp(votes, mechanism.noise_std, [order]).sum()
    else:
        assert mechanism.threshold_std is not None
        args = (mechanism.noise_std, mechanism.threshold, mechanism.threshold_std)
        paper = confident_gnmax_rdp(votes, *args, [order]).sum()
    one = private_cost(votes, mechanism, order=order, beta=beta, both_directions=False)
    both = private_cost(votes, mechanism, order=order, beta=beta)
    assert paper * (1 - 1e-12) <= one.bound <= paper * 1.05
    assert one.bound <= both.bound <= one.ceiling * (1 + 1e-12)


@pytest.mark.parametrize("sigma", [0.8, 1.5, 3.0])
def test_no_neighbour_is_further_away_in_either_direction(sigma: float) -> None:
    order = 2.5
    for votes in [(12, 0), (10, 2), (7, 5), (12, 0, 0), (9, 2, 1), (5, 5, 2)]:
        cost = private_cost([votes], NoisyMax(sigma), order=order, beta=0.1)
        here = oracle.outcomes(votes, sigma)
        for other in oracle.neighbours(votes):
            there = oracle.outcomes(other, sigma)
            assert oracle.renyi(here, there, order) <= cost.bound * (1 + 1e-9)
            assert oracle.renyi(there, here, order) <= cost.bound * (1 + 1e-9)


def test_one_direction_does_not_bound_the_other() -> None:
    """Why `both_directions` is the default."""
    votes, other, sigma, order = (12, 0), (11, 1), 1.0, 2.0
    cost = private_cost([votes], NoisyMax(sigma), order=order, beta=0.1, both_directions=False)
    here, there = oracle.outcomes(votes, sigma), oracle.outcomes(other, sigma)
    assert oracle.renyi(here, there, order) <= cost.bound < oracle.renyi(there, here, order) / 1000


def test_sensitivity_is_not_idle() -> None:
    """Agreement is far from any change: S is a small part of what it is where teachers are divided."""
    agreed = private_cost([[2000, 0, 0]], NoisyMax(40.0), order=8.0, beta=0.02)
    divided = private_cost([[1100, 900, 0]], NoisyMax(40.0), order=8.0, beta=0.02)
    assert agreed.smooth_sensitivity < 1e-4 * divided.smooth_sensitivity
    # Local sensitivity alone, in the limit of no smoothing, is the slope of the paper's bound.
    votes = np.array([[1140, 860, 0], [1139, 861, 0]])
    step = float(np.diff(gnmax_rdp(votes, 40.0, [8.0])[:, 0])[0])
    local = private_cost(votes[:1], NoisyMax(40.0), order=8.0, beta=99.0, both_directions=False)
    assert 0 < step <= local.smooth_sensitivity <= 1.2 * step


def test_local_sensitivity_of_a_check_as_in_the_papers_code() -> None:
    """Figures of tensorflow/privacy, research/pate_2018, smooth_sensitivity_test.py: 30 teachers, λ = 10."""
    mechanism = {t: NoisyMax(1.0, threshold=t, threshold_std=2.0) for t in (16.0, 2.0)}

    def local(largest: int, threshold: float) -> float:
        rest = 30 - largest
        votes = [[largest, (rest + 1) // 2, rest // 2]]
        arguments = {"order": 10.0, "beta": 99.0, "answered": [False], "both_directions": False}
        return private_cost(votes, mechanism[threshold], **arguments).smooth_sensitivity  # type: ignore[arg-type]

    # Entry d of a list is the larger of the sensitivities at largest counts 20 + d and 20 − d.
    published = {
        16.0: [0, 0, 0, 1.48454129e-04, 1.47826870e-02, 3.94153241e-02, 6.45775697e-02, 9.01543247e-02],
        2.0: [1.60212079e-01, 2.07021132e-01, 2.07021132e-01, 1.93127860e-01, 1.68302106e-01, 1.42180452e-01],
    }
    for threshold, values in published.items():
        for distance, value in enumerate(values):
            got = max(local(20 + distance, threshold), local(20 - distance, threshold))
            assert got == pytest.approx(value, rel=1e-7, abs=2e-9)  # bounds are raised by 1e-9 of the price


def test_queries_of_the_same_votes_add_up() -> None:
    mechanism = NoisyMax(5.0, threshold=25.0, threshold_std=4.0)
    one = private_cost([[30, 8, 2]], mechanism, order=3.0, beta=0.1)
    many = private_cost([[30, 8, 2]] * 7, mechanism, order=3.0, beta=0.1)
    for field in ("bound", "smooth_sensitivity", "ceiling"):
        assert getattr(many, field) == pytest.approx(7 * getattr(one, field), rel=1e-12)
    refused = private_cost([[30, 8, 2]] * 7, mechanism, order=3.0, beta=0.1, answered=[True] + [False] * 6)
    checks = private_cost([[30, 8, 2]], mechanism, order=3.0, beta=0.1, answered=[False])
    assert refused.bound == pytest.approx(one.bound + 6 * checks.bound, rel=1e-12)
    assert refused.ceiling == pytest.approx(3 / 25 + 7 * 3 / 32, rel=1e-12)


# ---- The noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.7, 3.0])
@pytest.mark.parametrize(("beta", "sigma", "order"), [(0.01, 1.0, 2.0), (0.1, 0.4, 4.0), (0.02, 30.0, 20.0)])
def test_gnss_is_the_divergence_of_the_worst_neighbours(
    shift: float, beta: float, sigma: float, order: float
) -> None:
    """At D with S = 1 against D′ with S = e^{−β} and f smaller by S(D′): equality."""
    r = math.exp(-beta)
    exact = oracle.gaussian_renyi(r + sigma * shift, sigma, sigma * shift * r, sigma * r, order)
    [bound] = gnss_rdp([order], beta, sigma, shift=shift)
    assert bound == pytest.approx(float(exact), rel=1e-9)
    # Any other neighbours that the smooth sensitivity allows are closer.
    for ratio, move in [
        (1.0, 1.0),
        (math.exp(beta), 1.0),
        (math.exp(beta), -1.0),
        (r, -r),
        (1 - beta / 2, 0.4),
    ]:
        exact = oracle.gaussian_renyi(
            move + sigma * shift, sigma, sigma * shift * ratio, sigma * ratio, order
        )
        assert float(exact) <= bound * (1 + 1e-12)


def scaled_renyi(move: Any, ratio: Any, sigma: Any, order: float) -> Any:
    """D_α(N(move, σ²) ‖ N(0, (ratio·σ)²)) by the closed form of Gil, Alajaji & Linder 2013."""
    mixed = order * ratio**2 + 1 - order
    logs = np.log(ratio) + (2 * np.log(ratio) - np.log(mixed)) / (2 * (order - 1))
    return logs + order * move**2 / (2 * sigma**2 * mixed)


def test_the_closed_form_is_the_quadrature() -> None:
    for move, ratio, sigma, order in [(0.5, 0.9, 2.0, 3.0), (-1.0, 1.3, 0.5, 2.0), (0.0, 0.97, 1.0, 8.0)]:
        exact = oracle.gaussian_renyi(move, sigma, 0.0, ratio * sigma, order)
        assert scaled_renyi(move, ratio, sigma, order) == pytest.approx(float(exact), rel=1e-10)


def test_gnss_bounds_every_allowed_pair() -> None:
    """16,000 random pairs, many of them at the ends of what is allowed."""
    rng = np.random.default_rng(2)
    n, largest = 1_000, 0.0
    for beta, order in [(0.003, 30.0), (0.05, 3.0), (0.2, 1.5), (0.02, 20.0)]:
        for shift in (0.0, 0.5, 2.0, 5.0):
            sigma = np.exp(rng.uniform(-2, 4, n))
            ratio = np.exp(beta * np.clip(rng.uniform(-1.3, 1.3, n), -1, 1))
            move = np.minimum(1, ratio) * np.clip(rng.uniform(-1.3, 1.3, n), -1, 1)
            exact = scaled_renyi(move + sigma * shift * (1 - ratio), ratio, sigma, order)
            bound = np.array([gnss_rdp([order], beta, s, shift=shift)[0] for s in sigma])
            assert np.all(exact <= bound * (1 + 1e-9))
            largest = max(largest, float(np.max(exact / bound)))
    assert largest > 1 - 1e-9  # attained


def papers_gnss(order: float, beta: float, sigma: float) -> float:
    """The formula of tensorflow/privacy, research/pate_2018, smooth_sensitivity.py."""
    logs = beta * order - math.log(1 - 2 * order * beta) / 2
    return order * math.exp(2 * beta) / sigma**2 + logs / (order - 1)


def test_the_papers_formula_for_gnss_is_looser_at_first_and_false_at_the_end() -> None:
    for beta in (0.001, 0.01, 0.1):
        for order in np.linspace(1.001, 1 / (4 * beta), 30):
            for sigma in (0.3, 3.0, 30.0):
                assert gnss_rdp([order], beta, sigma)[0] <= papers_gnss(order, beta, sigma)
    # β = 0.49/λ, as in that code. f falls by S(D′) and S by e^{−β}: neighbours that nothing forbids.
    order, sigma = 20.0, 10.0
    beta = 0.49 / order
    r = math.exp(-beta)
    exact = float(oracle.gaussian_renyi(r, sigma, 0.0, sigma * r, order))
    assert papers_gnss(order, beta, sigma) < 0.2 * exact
    assert exact == pytest.approx(gnss_rdp([order], beta, sigma)[0], rel=1e-9)


def test_gnss_knows_where_it_ends() -> None:
    orders = np.array([1.01, 1.5, 2.0, 4.9, 5.5, 5.6, 60.0])
    assert np.array_equal(np.isfinite(gnss_rdp(orders, 0.1, 3.0)), orders < 1 + 1 / math.expm1(0.2))  # 5.517
    # Without smoothing it is the Gaussian mechanism of sensitivity 1.
    assert gnss_rdp([2.0, 9.0], 1e-12, 4.0) == pytest.approx(np.array([2.0, 9.0]) / 32, rel=1e-9)


def test_noise_for_a_given_cost() -> None:
    for cost, order, beta, shift in [(0.1, 8.0, 0.02, 4.4), (2.0, 3.0, 0.1, 0.0), (0.01, 20.0, 0.001, 1.0)]:
        sigma = gnss_noise_multiplier(cost, order=order, beta=beta, shift=shift)
        assert gnss_rdp([order], beta, sigma, shift=shift)[0] == pytest.approx(cost, rel=1e-9)
    for cost, beta in [(1e-4, 0.03), (0.1, 0.5)]:
        with pytest.raises(UserError, match="smaller beta"):
            gnss_noise_multiplier(cost, order=8.0, beta=beta, shift=4.0)


# ---- The release ---------------------------------------------------------------------------------------

VOTES = np.array([[36, 3, 1], [25, 10, 5], [38, 1, 1], [20, 20, 0]])
MECHANISM = NoisyMax(5.0)
ARGUMENTS = {"order": 3.0, "beta": 0.05, "noise_multiplier": 0.1, "delta": 0.3, "failure_probability": 0.1}


def release(draw: float, **changes: object) -> SanitisedRelease:
    return sanitised_epsilon(VOTES, MECHANISM, rng=lambda: draw, **{**ARGUMENTS, **changes})  # type: ignore[arg-type]


def test_what_is_released_is_the_shifted_noisy_bound() -> None:
    private = private_cost(VOTES, MECHANISM, order=3.0, beta=0.05)
    for draw in (-0.5, 0.0, 0.3):
        got = release(draw)
        expected = private.bound + 0.1 * private.smooth_sensitivity * (draw + 1.2815515655446004)
        assert 0 < expected < private.ceiling
        assert got.rdp == pytest.approx(expected, rel=1e-12)
        assert got.release_rdp == pytest.approx(gnss_rdp([3.0], 0.05, 0.1, shift=got.shift)[0], rel=1e-12)
        whole = np.array([got.rdp + got.release_rdp])
        assert got.epsilon == epsilon_from_rdp(whole, 0.3 - 0.1, np.array([3.0]))
        assert got.delta == 0.3
        assert got.failure_probability == 0.1
        assert np.array_equal(got.cost(ORDERS), gnss_rdp(ORDERS, 0.05, 0.1, shift=got.shift))
    assert release(-1e6).rdp == 0
    assert release(1e6).rdp == private.ceiling


def test_it_under_reports_as_often_as_it_says() -> None:
    """Deterministic: at the quantiles of the noise, exactly the lowest tenth under-reports."""
    truth = private_cost(VOTES, MECHANISM, order=3.0, beta=0.05).bound
    quantiles = ndtri((np.arange(200) + 0.5) / 200)
    assert sum(release(float(draw)).rdp < truth for draw in quantiles) == 20


def test_it_under_reports_as_often_as_it_says_with_a_generator() -> None:
    """1,000 releases at η = 0.1: 100 ± 9.5. Accepts 41 … 159 (six deviations); η/3 or 2η would be refused."""
    truth = private_cost(VOTES, MECHANISM, order=3.0, beta=0.05).bound
    rng = np.random.default_rng(3)
    low = sum(sanitised_epsilon(VOTES, MECHANISM, rng=rng, **ARGUMENTS).rdp < truth for _ in range(1000))  # type: ignore[arg-type]
    assert 40 < low < 160


def test_only_the_noisy_value_depends_on_the_votes() -> None:
    """Other votes, the same noise: every other field of the release is the same."""
    one = dataclasses.asdict(release(0.2))
    two = dataclasses.asdict(
        sanitised_epsilon([[32, 5, 3]] * 4, MECHANISM, rng=lambda: 0.2, **ARGUMENTS)  # type: ignore[arg-type]
    )
    assert one["rdp"] != two["rdp"]
    assert {name for name in one if one[name] != two[name]} == {"rdp", "epsilon"}


def test_private_parts_do_not_print_themselves() -> None:
    text = repr(private_cost(VOTES, MECHANISM, order=3.0, beta=0.05))
    assert "NOT PRIVATE" in text
    assert not any(character.isdigit() for character in text)


def test_defaults_give_a_release() -> None:
    rng = np.random.default_rng(4)
    votes = np.array([rng.multinomial(5000, p) for p in rng.dirichlet([30, 0.5, 0.5], 200)])
    mechanism = NoisyMax(100.0, threshold=3000.0, threshold_std=150.0)
    got = sanitised_epsilon(votes, mechanism, order=20, delta=1e-6, noise_multiplier=20, beta=0.002, rng=rng)
    assert got.all_charged
    assert got.both_directions
    assert got.failure_probability == 5e-7
    assert got.rdp < 0.3 * got.ceiling
    passed = votes.max(axis=1) > 3500
    spent = sanitised_epsilon(
        votes, mechanism, order=20, delta=1e-6, noise_multiplier=20, rng=rng, answered=passed
    )
    assert not spent.all_charged
    assert spent.beta == 0.01


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"beta": 0.21}, "beta"),  # at order 3 the limit is log(1.5)/2 = 0.2027
        ({"beta": 0.0}, "beta"),
        ({"order": 1.0}, "order"),
        ({"order": math.nan}, "order"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"failure_probability": 0.3}, "failure_probability"),
        ({"failure_probability": 0.0}, "failure_probability"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"answered": [True] * 4}, "answered"),
        ({"rng": lambda: math.nan}, "rng"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, object], word: str) -> None:
    arguments = {"rng": lambda: 0.0, **ARGUMENTS, **changes}
    with pytest.raises(UserError, match=word) as refused:
        sanitised_epsilon(VOTES, MECHANISM, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "votes", [[[5.5, 4.5]], [[5, 4], [5, 5]], np.empty((0, 2)), [[300_000, 0]], [[5], [5]], [[-1, 11]]]
)
def test_votes_of_no_fixed_number_of_teachers_are_refused(votes: object) -> None:
    with pytest.raises(UserError):
        private_cost(votes, MECHANISM, order=2.0, beta=0.1)  # type: ignore[arg-type]


def test_wrong_aggregators_are_refused() -> None:
    for wrong in (
        {"noise_std": 0},
        {"noise_std": 1.0, "threshold": 3.0},
        {"noise_std": 1.0, "threshold_std": 3.0},
        {"noise_std": 1.0, "threshold": math.nan, "threshold_std": 3.0},
        {"noise_std": 1.0, "threshold": 3.0, "threshold_std": -1.0},
    ):
        with pytest.raises(UserError):
            NoisyMax(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("both", [True, False])
def test_no_neighbour_of_a_release_is_further_away_than_its_cost(both: bool) -> None:
    """End to end: Y at all votes of 9 teachers against Y at their neighbours, each with its own noise."""
    order, beta, largest = 3.0, 0.1, 0.0
    costs = {
        votes: private_cost([votes], NoisyMax(1.0), order=order, beta=beta, both_directions=both)
        for votes in oracle.histograms(9, 3)
    }
    for multiplier, shift in [(0.3, 0.0), (3.0, 1.0), (30.0, 4.4)]:
        [bound] = gnss_rdp([order], beta, multiplier, shift=shift)
        for votes, here in costs.items():
            for other in oracle.neighbours(votes):
                there = costs[other]
                ratio = there.smooth_sensitivity / here.smooth_sensitivity
                move = (here.bound - there.bound) / here.smooth_sensitivity
                exact = scaled_renyi(move + multiplier * shift * (1 - ratio), ratio, multiplier, order)
                assert exact <= bound * (1 + 1e-9)
                largest = max(largest, float(exact) / bound)
    assert largest > 0.3  # some neighbours come near


def test_the_grid_covers_the_largest_agreement() -> None:
    """All teachers agree: the state is the grid's last cell but one, for odd numbers of teachers too."""
    for teachers in (1, 2, 7, 20, 21):
        votes = [[teachers, 0, 0]]
        cost = private_cost(votes, NoisyMax(2.0), order=2.0, beta=0.1, both_directions=False)
        nearly = gnmax_rdp([[teachers - 0.3, 0, 0]], 2.0, [2.0])[0, 0]
        assert gnmax_rdp(votes, 2.0, [2.0])[0, 0] <= cost.bound <= nearly * (1 + 1e-12)
