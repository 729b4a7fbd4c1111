"""Bounds by privacy-loss distributions: they bracket the truth, and closely."""

from __future__ import annotations

import itertools
import math
import time

import mpmath as mp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import atom_of, is_gaussian, scale_of
from oracles import (
    Part,
    epsilon_at,
    gaussian_delta,
    google_epsilon,
    google_pld,
    laplace_delta,
    two_laplaces_delta,
)

from accounting import (
    Composed,
    Event,
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    PrivacyAccountant,
    Repeated,
)
from accounting.atoms import Atom
from accounting.curve import epsilon_curve
from accounting.events import atoms
from accounting.pld import delta_bounds, epsilon_bounds

TOLERANCE = 0.005


def event_of(parts: tuple[Part, ...]) -> Composed:
    kinds = {"gaussian": Gaussian, "laplace": Laplace}
    return Composed([Repeated(PoissonSampled(kinds[n](s), q), k) for n, s, q, k in parts])


def bounds_of(event: Event, delta: float, method: str = "pld") -> tuple[float, float]:
    accountant = PrivacyAccountant(method)  # type: ignore[arg-type]
    accountant.record(event)
    return accountant.epsilon_bounds(delta)


def assert_brackets(counts: dict[Atom, int], epsilon: float, truth: object) -> None:
    """Both bounds of δ at `epsilon`, and of ε at the true δ, are on their side."""
    lower, upper = delta_bounds(counts, epsilon)
    assert lower <= truth <= upper, f"δ({epsilon}): {lower}, {mp.nstr(truth, 12)}, {upper}"
    delta = float(truth)  # type: ignore[arg-type]
    if 1e-300 < delta < 1:
        low, high = epsilon_bounds(counts, delta)
        slip = 1e-13 * epsilon + 1e-15  # δ was rounded to a float
        assert low - slip <= epsilon <= high + slip, f"ε({delta}): {low}, {epsilon}, {high}"


# ---------------------------------------------------------------- one mechanism, closed forms


@pytest.mark.parametrize("q", [1e-8, 1e-3, 0.1, 0.9, 0.999999])
@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.1, 3.0, 30.0, 1000.0])
def test_one_sampled_gaussian(sigma: float, q: float) -> None:
    for z in (-1, 2, 6):  # deviations of the noise at which the loss is ε
        epsilon = math.log1p(q * math.expm1(z / sigma + 0.5 / sigma**2))
        epsilon = max(0.0, epsilon)
        assert_brackets({atom_of("gaussian", sigma, q): 1}, epsilon, gaussian_delta(sigma, q, epsilon))


@pytest.mark.parametrize("q", [1e-8, 1e-4, 0.01, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("scale", [0.1, 0.7, 3.0, 30.0, 1000.0])
def test_one_sampled_laplace(scale: float, q: float) -> None:
    for share in (0.0, 0.3, 0.9, 0.999):
        epsilon = math.log1p(q * math.expm1(share / scale))
        assert_brackets({atom_of("laplace", scale, q): 1}, epsilon, laplace_delta(scale, q, epsilon))


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.0, 7.0, 1e3, 1e6, 1e9, 1e12, 1e14])
def test_an_unsampled_gaussian_is_exact_to_1e_8(sigma: float) -> None:
    for z in (0.0, 0.1, 1.0, 6.0):
        epsilon = z / sigma + (0.5 / sigma**2 if z else 0)
        truth = gaussian_delta(sigma, 1.0, epsilon)
        lower, upper = delta_bounds({atom_of("gaussian", sigma): 1}, epsilon)
        assert lower <= truth <= upper <= lower * (1 + 1e-8)
        if epsilon:
            low, high = epsilon_bounds({atom_of("gaussian", sigma): 1}, float(truth))
            assert low <= epsilon <= high <= low * (1 + 1e-7)


def test_an_unsampled_gaussian_just_below_its_total_variation() -> None:
    """Near δ(0) a tiny error of δ is a large one of ε."""
    truth = 1e-9
    delta = float(gaussian_delta(1.0, 1.0, truth))
    low, high = epsilon_bounds({atom_of("gaussian", 1.0): 1}, delta)
    assert low <= truth <= high


@pytest.mark.parametrize(("sigma", "epsilon"), [(0.5, 3.0), (1.0, 1.0), (3.0, 0.1), (3.0, 1.5), (40.0, 0.06)])
def test_a_gaussian_on_the_lattice(sigma: float, epsilon: float) -> None:
    """A second mechanism, which changes δ by less than 1e-12, forces the closed form's case to convolve."""
    counts = {atom_of("gaussian", sigma): 1, atom_of("gaussian", 1e13, 0.5): 1}
    truth = gaussian_delta(sigma, 1.0, epsilon)
    lower, upper = delta_bounds(counts, epsilon)
    assert lower <= truth * (1 + mp.mpf(10) ** -9)
    assert truth <= upper <= 1.25 * lower
    low, high = epsilon_bounds(counts, float(truth))
    assert low - 1e-9 <= epsilon <= high <= low * (1 + 2 * TOLERANCE) + 1e-8


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_a_weak_mechanism_on_a_rare_sample_loses_no_mass(noise: str) -> None:
    """The range of losses is relative to q·rate, far below the rounding of 1 − q."""
    truth_of = gaussian_delta if noise == "gaussian" else laplace_delta
    for scale, q in ((1e10, 1e-8), (1e12, 0.3), (1e14, 0.5), (2e14, 4e-7)):
        lower, upper = delta_bounds({atom_of(noise, scale, q): 1}, 0.0)
        assert lower <= truth_of(scale, q, 0.0) <= upper < 1e-8


# ---------------------------------------------------------------- small compositions


@pytest.mark.parametrize("rate", [0.2, 1.0, 4.0])
def test_two_laplaces(rate: float) -> None:
    """k = 2 by quadrature of one mechanism's closed form against the other's losses."""
    for share in (0.0, 0.4, 1.0, 1.7, 1.99):
        epsilon = share * rate
        lower, upper = delta_bounds({atom_of("laplace", 1 / rate): 2}, epsilon)
        assert lower <= two_laplaces_delta(rate, epsilon) * (1 + mp.mpf(10) ** -12)
        assert two_laplaces_delta(rate, epsilon) <= upper * (1 + mp.mpf(10) ** -12)


def test_many_gaussians_are_one_gaussian() -> None:
    """k runs of σ·√k on the lattice, beside a negligible mechanism, are one run of σ."""
    counts = {atom_of("gaussian", 20.0): 100, atom_of("gaussian", 1e13, 0.5): 1}
    for delta in (1e-12, 1e-5, 0.1):
        truth = epsilon_at(lambda e: gaussian_delta(2.0, 1.0, e), delta, 20.0)
        low, high = epsilon_bounds(counts, delta)
        assert low - 1e-9 <= truth <= high <= truth * (1 + TOLERANCE) + 1e-8


def test_laplace_noise_alone_never_costs_more_than_the_sum_of_its_pure_epsilons() -> None:
    for delta in (1e-300, 1e-15, 1e-3):
        assert bounds_of(Repeated(Laplace(10), 7), delta)[1] <= 0.7 * (1 + 1e-9)
    accountant = PrivacyAccountant()
    accountant.record(Repeated(Laplace(10), 7))
    assert accountant.delta(0.7001) == 0.0
    assert accountant.delta(0.6999) > 0.0


# ---------------------------------------------------------------- dp-accounting

SINGLE = [
    *itertools.product([0.6, 0.8, 2.0], [0.001, 0.01, 0.1], [10, 1_000], [1e-5]),
    *itertools.product([5.0, 20.0], [0.05, 0.5, 0.9], [100], [1e-6]),
    *itertools.product([1.0, 4.0], [0.02], [1, 100, 5_000], [1e-8, 1e-2]),
]
MIXED: list[tuple[tuple[Part, ...], float]] = [
    ((("gaussian", 1.1, 0.01, 500), ("gaussian", 10.0, 1.0, 1), ("laplace", 20.0, 1.0, 5)), 1e-5),
    ((("gaussian", 1.1, 0.01, 500), ("gaussian", 0.8, 0.002, 300)), 1e-6),
    ((("gaussian", 3.0, 0.3, 50), ("laplace", 2.0, 0.05, 100)), 1e-5),
    ((("laplace", 1.0, 0.01, 1_000),), 1e-5),
    ((("laplace", 5.0, 1.0, 40),), 1e-6),
    ((("gaussian", 2.0, 0.1, 100), ("gaussian", 2.0, 0.2, 50), ("gaussian", 4.0, 1.0, 1)), 1e-5),
]
COMPOSITIONS: list[tuple[tuple[Part, ...], float]] = [
    *(((("gaussian", sigma, q, steps),), delta) for sigma, q, steps, delta in SINGLE),
    *MIXED,
]


@pytest.mark.parametrize(("parts", "delta"), COMPOSITIONS, ids=[str(i) for i in range(len(COMPOSITIONS))])
def test_agrees_with_dp_accounting(parts: tuple[Part, ...], delta: float) -> None:
    interval = 5e-4 if len(parts) == 1 and parts[0][3] > 100 else 2e-4
    lower, upper = bounds_of(event_of(parts), delta)
    highest = google_epsilon(parts, delta, interval, pessimistic=True)
    lowest = google_epsilon(parts, delta, interval, pessimistic=False)
    assert lowest <= upper * (1 + 1e-9)
    assert lower <= highest * (1 + 1e-9)
    assert upper <= highest * (1 + TOLERANCE) + 1e-6


@pytest.mark.parametrize("parts", [COMPOSITIONS[9][0], *(parts for parts, _ in MIXED[:3])])
def test_delta_agrees_with_dp_accounting(parts: tuple[Part, ...]) -> None:
    for epsilon in (0.0, 0.5, 2.0):
        lower, upper = delta_bounds(atoms(event_of(parts)), epsilon)
        highest = google_pld(parts, 2e-4, True).get_delta_for_epsilon(epsilon)
        lowest = google_pld(parts, 2e-4, False).get_delta_for_epsilon(epsilon)
        assert lowest <= upper * (1 + 1e-9)
        assert lower <= highest * (1 + 1e-9)


def test_the_classic_mnist_setting() -> None:
    """n = 60,000, batch 256, σ = 1.1, 60 epochs, δ = 1e-5: 2.3817 by dp-accounting's PLD at 1e-4."""
    parts: tuple[Part, ...] = (("gaussian", 1.1, 256 / 60_000, 14_062),)
    lower, upper = bounds_of(event_of(parts), 1e-5)
    assert upper == pytest.approx(2.3817, rel=0.005)
    assert lower <= google_epsilon(parts, 1e-5, 1e-4, pessimistic=True)
    assert google_epsilon(parts, 1e-5, 1e-4, pessimistic=False) <= upper
    assert upper <= lower * (1 + 2 * TOLERANCE)


# ---------------------------------------------------------------- properties

STEPS = st.builds(
    lambda kind, scale, q, count: Repeated(PoissonSampled(kind(scale), q), count),
    st.sampled_from([Gaussian, Laplace]),
    st.floats(0.6, 30),
    st.floats(1e-3, 0.9),
    st.integers(1, 60),
)


@given(STEPS, STEPS, st.floats(1e-12, 0.2))
@settings(max_examples=8, deadline=None)
def test_bounds_are_ordered_and_below_renyi(one: Event, other: Event, delta: float) -> None:
    event = Composed([one, other])
    lower, upper = bounds_of(event, delta)
    assert 0 <= lower <= upper <= bounds_of(event, delta, "rdp")[1]


@given(
    st.floats(0.6, 30),
    st.floats(1e-3, 0.6),
    st.integers(1, 300),
    st.floats(1e-12, 0.1),
    st.sampled_from(["gaussian", "laplace"]),
)
@settings(max_examples=4, deadline=None)
def test_epsilon_rises_with_steps_and_sampling_and_falls_with_noise_and_delta(
    scale: float, q: float, steps: int, delta: float, noise: str
) -> None:
    def bounds(scale: float, q: float, steps: int, delta: float) -> tuple[float, float]:
        return epsilon_bounds({atom_of(noise, scale, q): steps}, delta)

    lower, _ = bounds(scale, q, steps, delta)
    for worse in (
        (scale, q, 2 * steps, delta),
        (scale, 1.5 * q, steps, delta),
        (scale / 1.3, q, steps, delta),
        (scale, q, steps, delta / 10),
    ):
        assert lower <= bounds(*worse)[1]


def test_the_order_of_composition_does_not_matter_at_all() -> None:
    parts = [
        Repeated(PoissonSampled(Gaussian(1.1), 0.01), 77),
        Repeated(PoissonSampled(Gaussian(0.9), 0.003), 31),
        Repeated(Laplace(7.0), 3),
        Gaussian(9.0),
        Gaussian(7.3),
    ]
    orders = [parts, parts[::-1], parts[2:] + parts[:2], [parts[i] for i in (3, 0, 4, 2, 1)]]
    assert len({bounds_of(Composed(order), 1e-5) for order in orders}) == 1


@pytest.mark.parametrize(
    "event",
    [
        Gaussian(3.0),
        Laplace(3.0),
        NonPrivate(),
        PoissonSampled(Gaussian(1.0), 0.1),
        PoissonSampled(Laplace(1.0), 0.1),
        PoissonSampled(Composed([Gaussian(2.0), Gaussian(3.0)]), 0.1),
        PoissonSampled(PoissonSampled(Gaussian(1.0), 0.5), 0.2),
        Composed([Gaussian(3.0), Laplace(3.0), PoissonSampled(Gaussian(1.0), 0.1)]),
        Repeated(Laplace(3.0), 2),
    ],
    ids=lambda event: type(event).__name__,
)
@pytest.mark.parametrize("method", ["pld", "rdp"])
def test_repeated_costs_exactly_what_the_repetitions_cost(event: Event, method: str) -> None:
    """dp-accounting loses a repeated event's count for some event types; here, for none."""
    singly = PrivacyAccountant(method)  # type: ignore[arg-type]
    for _ in range(10):
        singly.record(event)
    assert bounds_of(Repeated(event, 10), 1e-5, method) == singly.epsilon_bounds(1e-5)
    assert bounds_of(event, 1e-5, method)[1] < singly.epsilon(1e-5) or event == NonPrivate()


@given(STEPS, st.floats(1e-14, 0.1))
@settings(max_examples=6, deadline=None)
def test_delta_and_epsilon_bounds_do_not_contradict_each_other(event: Event, delta: float) -> None:
    counts = atoms(event)
    low, high = epsilon_bounds(counts, delta)
    assert delta_bounds(counts, high)[0] <= delta * (1 + 1e-9)
    if low > 0:
        assert delta_bounds(counts, low)[1] >= delta * (1 - 1e-9)


def test_a_smaller_tolerance_gives_a_narrower_bracket_within_the_wider() -> None:
    counts = {atom_of("gaussian", 1.1, 0.01): 1_000}
    widths = []
    for tolerance in (0.05, 0.005, 0.0005):
        lower, upper = epsilon_bounds(counts, 1e-5, tolerance)
        assert upper - lower <= tolerance * upper
        widths.append((lower, upper))
    assert max(lower for lower, _ in widths) <= min(upper for _, upper in widths)


def test_the_curve_brackets_what_single_questions_bracket() -> None:
    step = Composed([PoissonSampled(Gaussian(1.1), 0.01), Gaussian(80.0)])
    points = epsilon_curve(step, [0, 1, 37, 1_000], 1e-5)
    assert points[0] == (0.0, 0.0)
    for count, (lower, upper) in zip([1, 37, 1_000], points[1:], strict=True):
        low, high = bounds_of(Repeated(step, count), 1e-5)
        assert lower <= high
        assert low <= upper
        assert lower <= upper


# ---------------------------------------------------------------- corners

CORNERS: dict[str, tuple[Event, float]] = {
    "δ = 1e-15": (Repeated(PoissonSampled(Gaussian(1.1), 0.01), 1_000), 1e-15),
    "δ = 1e-300": (Repeated(PoissonSampled(Gaussian(1.1), 0.01), 1_000), 1e-300),
    "δ = 0.5": (Repeated(PoissonSampled(Gaussian(1.1), 0.01), 1_000), 0.5),
    "δ next to 1": (PoissonSampled(Gaussian(0.3), 0.9), 1 - 1e-12),
    "σ = 0.3": (Repeated(PoissonSampled(Gaussian(0.3), 0.01), 100), 1e-5),
    "σ = 1000": (Repeated(PoissonSampled(Gaussian(1e3), 0.5), 10_000), 1e-5),
    "σ = 0.01": (Repeated(PoissonSampled(Gaussian(0.01), 0.1), 2), 1e-5),
    "σ = 1e-4": (Repeated(PoissonSampled(Gaussian(1e-4), 0.1), 2), 1e-5),
    "σ = 1e14": (Repeated(PoissonSampled(Gaussian(1e14), 0.5), 2), 1e-5),
    "q = 1e-8": (Repeated(PoissonSampled(Gaussian(1.0), 1e-8), 30), 1e-12),
    "q = 1e-300": (Repeated(PoissonSampled(Gaussian(1.0), 1e-300), 10), 1e-5),
    "q = 5e-324": (PoissonSampled(Laplace(1.0), 5e-324), 1e-5),
    "q next to 1": (Repeated(PoissonSampled(Gaussian(1.0), 1 - 1e-12), 10), 1e-5),
    "1e7 steps": (Repeated(PoissonSampled(Gaussian(5.0), 0.001), 10**7), 1e-5),
    "1e7 steps of Laplace": (Repeated(PoissonSampled(Laplace(100.0), 0.01), 10**7), 1e-5),
    "scale 0.01": (Repeated(PoissonSampled(Laplace(0.01), 0.01), 10), 1e-5),
    "one strong, many weak": (
        Composed([Gaussian(0.5), Repeated(PoissonSampled(Gaussian(3.0), 1e-4), 10**6)]),
        1e-6,
    ),
}


@pytest.mark.parametrize(("event", "delta"), CORNERS.values(), ids=CORNERS.keys())
def test_corners_get_a_bracket_in_time(event: Event, delta: float) -> None:
    began = time.process_time()
    lower, upper = bounds_of(event, delta)
    assert 0 <= lower <= upper < math.inf
    assert time.process_time() - began < 60  # generous: some take 3 s on a busy core
    counts = atoms(event)
    assert delta_bounds(counts, upper)[0] <= delta * (1 + 1e-9)


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-3, 1.0, 30.0, 1e3])
def test_delta_from_zero_to_a_thousand(epsilon: float) -> None:
    for atom in (
        atom_of("gaussian", 0.5, 0.1),
        atom_of("laplace", 0.01, 0.1),
        atom_of("gaussian", 30.0, 0.9),
    ):
        lower, upper = delta_bounds({atom: 20}, epsilon)
        assert 0 <= lower <= upper <= 1
        single = gaussian_delta if is_gaussian(atom) else laplace_delta
        assert upper >= float(single(scale_of(atom), atom.q, epsilon))  # 20 runs cost no less than one


@pytest.mark.parametrize("noise", [1e-320, 1e-200, 1e-100, 1e-9])
@pytest.mark.parametrize("kind", [Gaussian, Laplace])
@pytest.mark.parametrize("method", ["pld", "rdp"])
def test_next_to_no_noise_costs_next_to_infinity(kind: type[Gaussian], noise: float, method: str) -> None:
    for event in (kind(noise), Repeated(kind(noise), 3), PoissonSampled(kind(noise), 0.1)):
        assert bounds_of(event, 1e-5, method)[1] >= 1e6


def test_nothing_costs_nothing_and_no_protection_costs_infinity() -> None:
    assert bounds_of(Composed([]), 1e-5) == (0.0, 0.0)
    assert bounds_of(Composed([Gaussian(1), NonPrivate()]), 1e-5) == (math.inf, math.inf)
    assert delta_bounds(atoms(NonPrivate()), 5.0) == (1.0, 1.0)
