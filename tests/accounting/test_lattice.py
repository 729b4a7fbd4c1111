"""The lattices of privacy losses, and the convolution of them, each tested apart from the rest."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import atom_of
from oracles import exact_delta
from scipy import optimize

from accounting.atoms import Atom, Sampling
from accounting.lattice import Cells, Direction, Lattice, cells, loss_range
from accounting.pairs import (
    BoundedRangePair,
    DiscreteGaussianPair,
    FloatArray,
    GaussianPair,
    LaplacePair,
    ProductPair,
    ResponsePair,
    SwappedResponsePair,
    UniformResponsePair,
)
from accounting.tilted import compose

LOG_TAIL = -75.0
DIRECTIONS: tuple[Direction, Direction] = ("remove", "add")
CONTINUOUS = [
    atom_of("gaussian", 1.0),
    atom_of("gaussian", 0.4, 0.3),
    atom_of("gaussian", 1.1, 0.004),
    atom_of("gaussian", 20.0, 0.9),
    atom_of("gaussian", 1.0, 1e-7),
    atom_of("laplace", 1.0),
    atom_of("laplace", 0.2, 0.01),
    atom_of("laplace", 50.0, 0.5),
    atom_of("laplace", 1.0, 0.999),
    Atom(BoundedRangePair(0.5)),
    Atom(BoundedRangePair(6.0), "poisson", 0.02),
]
FIXED_SIZE = [
    Atom(GaussianPair(1.1), "fixed-size", 0.004),
    Atom(GaussianPair(0.4), "fixed-size", 0.3),
    Atom(LaplacePair(0.7), "fixed-size", 0.05),
    Atom(BoundedRangePair(2.0), "fixed-size", 0.5),
    Atom(ResponsePair(1.0), "fixed-size", 0.1),
]
DISCRETE = [
    Atom(ResponsePair(1.0)),
    Atom(ResponsePair(3.0, 1e-3)),
    Atom(ResponsePair(1.0, 1e-3), "poisson", 0.1),
    Atom(DiscreteGaussianPair(2.3, 1)),
    Atom(DiscreteGaussianPair(0.7, 2), "poisson", 0.01),
    Atom(UniformResponsePair(0.375, 5)),
    Atom(SwappedResponsePair(0.375, 5)),
]
PRODUCT = ProductPair(((GaussianPair(1.3), 1), (LaplacePair(2.0), 2)))
PRODUCTS = [Atom(PRODUCT, "poisson", 0.05), Atom(PRODUCT, "fixed-size", 0.05)]
ATOMS = [*CONTINUOUS, *DISCRETE, *FIXED_SIZE]


def cut(atom: Atom, direction: Direction, count: int, **how: bool) -> Cells:
    low, high = loss_range(atom, LOG_TAIL)
    return cells(atom, (high - low) / count, LOG_TAIL, direction, **how)


def edges_of(found: Cells) -> FloatArray:
    """Lower edges of the cells."""
    return np.asarray((found.first + found.shift + np.arange(len(found.p))) * found.h)


def hockey_stick(lattice: Lattice, epsilon: float) -> float:
    """Σ mass·(1 − e^{ε−loss})+ directly."""
    return lattice.infinite + float(np.sum(lattice.mass * np.maximum(-np.expm1(epsilon - lattice.losses), 0)))


def total(found: Cells) -> float:
    """All P mass, wherever it is."""
    return float(found.p.sum()) + found.p_below + found.p_above + found.p_infinite + found.p_zero


# ---------------------------------------------------------------- cells


@given(
    st.sampled_from(["gaussian", "laplace"]),
    st.floats(-1.5, 14),
    st.floats(-9, 0),
    st.sampled_from(DIRECTIONS),
    st.sampled_from([200, 333, 4096]),
    st.booleans(),
    st.sampled_from(["poisson", "fixed-size"]),
)
@settings(max_examples=200, deadline=None)
def test_cells_hold_all_of_both_masses(
    noise: str,
    log_scale: float,
    log_q: float,
    direction: Direction,
    count: int,
    centred: bool,
    sampling: Sampling,
) -> None:
    found = cut(atom_of(noise, 10**log_scale, 10**log_q, sampling), direction, count, centred=centred)
    assert total(found) == pytest.approx(1, abs=1e-12)
    assert found.q.sum() + found.p_zero == pytest.approx(1, abs=1e-12)
    assert found.p.min() >= 0
    assert found.q.min() >= 0


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("atom", [*ATOMS, *PRODUCTS], ids=str)
def test_cells_of_every_pair_hold_all_of_both_masses(atom: Atom, direction: Direction, centred: bool) -> None:
    for count in (200, 333, 1024):
        found = cut(atom, direction, count, centred=centred)
        assert total(found) == pytest.approx(1, abs=1e-12)
        only_in_q = 1 - found.q.sum() - found.p_zero
        assert -1e-12 <= only_in_q <= getattr(atom.mechanism, "delta", 0.0) + 1e-12
        assert min(found.p.min(), found.q.min(), found.p_zero) >= 0


def test_laplace_cells_hold_all_of_both_masses_at_awkward_scales() -> None:
    """Ranges whose ends fall on a cell's edge but for rounding: half of all mass is at either end."""
    rng = np.random.default_rng(0)
    for _ in range(400):
        scale, q = 10 ** rng.uniform(8, 14.9), 10 ** rng.uniform(-10, 0)
        for direction in DIRECTIONS:
            found = cut(atom_of("laplace", scale, q), direction, 200)
            assert found.p.sum() == pytest.approx(1, abs=1e-12), (scale, q)
            assert found.q.sum() == pytest.approx(1, abs=1e-12), (scale, q)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("atom", [*CONTINUOUS, *FIXED_SIZE], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_likelihood_ratios_of_cells_lie_within_the_cells(
    atom: Atom, direction: Direction, centred: bool
) -> None:
    found = cut(atom, direction, 500, centred=centred)
    sure = (found.p > 1e-25) & (found.q > 1e-25) & (found.slack < 1e-6)
    assert sure.sum() > (1 if isinstance(atom.mechanism, ResponsePair) else 30)
    edges = edges_of(found)
    ratio = np.log(found.p[sure] / found.q[sure])
    assert np.all(ratio >= edges[sure] - found.slack[sure] - 1e-13)
    assert np.all(ratio <= edges[sure] + found.h + found.slack[sure] + 1e-13)


# ---------------------------------------------------------------- one step, no FFT


@pytest.mark.parametrize("atom", [*ATOMS, *PRODUCTS], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_upper_lattice_keeps_both_masses(atom: Atom, direction: Direction) -> None:
    found = cut(atom, direction, 700)
    lattice = found.upper()
    assert lattice.mass.sum() + lattice.infinite == pytest.approx(1, abs=1e-12)
    q = float(found.q.sum()) + found.p_zero
    assert float(lattice.mass @ np.exp(-lattice.losses)) == pytest.approx(q, abs=1e-9)
    assert lattice.mass.min() >= 0


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("atom", [*ATOMS, *PRODUCTS], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_lower_lattice_keeps_p_and_has_no_q_to_spare(
    atom: Atom, direction: Direction, centred: bool
) -> None:
    """P is kept, and Σ mass·e^{−loss}, which stands for Q, cannot be below it: no loss is rounded up."""
    found = cut(atom, direction, 700, centred=centred, upper=False)
    lattice = found.lower()
    kept = float(found.p.sum()) + found.p_above + found.p_infinite
    assert lattice.mass.sum() + lattice.infinite == pytest.approx(kept, abs=1e-12)
    assert float(lattice.mass @ np.exp(-lattice.losses)) >= float(found.q.sum()) * (1 - 1e-12)
    assert 0 <= lattice.infinite <= found.p_infinite
    assert lattice.mass.min() >= -1e-18


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_lower_lattice_is_no_wider_and_lies_at_the_cells_middles(
    direction: Direction, centred: bool
) -> None:
    found = cut(atom_of("gaussian", 1.1, 0.1), direction, 333, centred=centred)
    lattice = found.lower()
    assert lattice.h == found.h
    middles = edges_of(found) + found.h / 2
    assert lattice.losses[1:-1] == pytest.approx(middles, abs=2e-9 * found.h)
    assert np.all(lattice.losses[1:-1] < middles)
    nearest = np.abs(lattice.losses / found.h - np.rint(lattice.losses / found.h))
    assert nearest == pytest.approx(0.0 if centred else 0.5, abs=1e-6)


@pytest.mark.parametrize("atom", ATOMS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_losses_of_the_lower_lattice_are_not_above_the_likelihood_ratios(
    atom: Atom, direction: Direction
) -> None:
    """From every point upwards, there is no more than P and no less than Q of some set of outcomes.

    Since mass moves to the point below or above alone, the sums from a point upwards lie between those of the
    cells; hence the hockey sticks of the lattice are at most those of the cells, at every ε.
    """
    found = cut(atom, direction, 500, centred=True, upper=False)
    lattice = found.lower()
    losses = edges_of(found) + found.h
    for share in np.linspace(-1, 1, 41):
        epsilon = float(share) * float(np.abs(losses).max())
        weight = found.p - found.q * math.exp(min(epsilon, 700.0))
        cells_delta = float(np.maximum(weight, 0).sum()) + found.p_above + found.p_infinite
        cells_delta += found.p_below + max(0.0, found.p_zero * -math.expm1(min(epsilon, 700.0)))
        assert hockey_stick(lattice, epsilon) <= cells_delta * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize("atom", ATOMS, ids=str)
@pytest.mark.parametrize("count", [201, 2_000])
def test_one_step_on_either_lattice_is_on_its_side(atom: Atom, count: int) -> None:
    pairs = [
        (cut(atom, d, count, centred=centred, upper=False).lower(), cut(atom, d, count).upper())
        for d in DIRECTIONS
        for centred in (False, True)
    ]
    _, high = loss_range(atom, LOG_TAIL)
    for share in (0.0, 0.01, 0.03, 0.1, 0.2, 0.37, 0.5, 0.8):
        epsilon = share * high
        exact = float(exact_delta(atom, epsilon))
        slip = 1e-14 + 1e-10 * exact
        assert max(hockey_stick(low, epsilon) for low, _ in pairs) <= exact + slip
        assert max(hockey_stick(up, epsilon) for _, up in pairs) >= exact - slip


@pytest.mark.parametrize("atom", [*CONTINUOUS[:4], FIXED_SIZE[0]], ids=str)
def test_the_gap_of_one_gaussian_step_closes_quadratically(atom: Atom) -> None:
    epsilon = loss_range(atom, -3.0)[1] / 3

    def gap(count: int) -> float:
        ups = (hockey_stick(cut(atom, d, count).upper(), epsilon) for d in DIRECTIONS)
        lows = (hockey_stick(cut(atom, d, count).lower(), epsilon) for d in DIRECTIONS)
        return max(ups) - max(lows)

    coarse = max(gap(count) for count in (1_000, 1_013, 1_031))
    fine = max(gap(count) for count in (8_000, 8_093, 8_219))
    assert 0 <= fine < coarse / 16


@pytest.mark.parametrize("atom", PRODUCTS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_product_from_below_is_below_the_product_from_above(atom: Atom, direction: Direction) -> None:
    above = cut(atom, direction, 1_000, upper=True).upper()
    below = cut(atom, direction, 1_000, centred=True, upper=False).lower()
    for epsilon in np.linspace(0, 0.5, 26):
        low, high = hockey_stick(below, float(epsilon)), hockey_stick(above, float(epsilon))
        assert low <= high
        assert high <= 1.02 * hockey_stick(below, float(epsilon) - 2 * above.h) + 1e-6


# ---------------------------------------------------------------- convolution


def small_lattices() -> list[tuple[Lattice, int]]:
    one = Lattice(0.125, -4, np.array([3, 7, 11, 13, 2, 1, 5, 9, 13]) / 64, 0.0)
    two = Lattice(0.125, -2, np.array([5, 3, 0, 1, 7]) / 16, 0.0)
    return [(one, 3), (two, 4)]


def exact_composition(parts: list[tuple[Lattice, int]]) -> tuple[int, list[Fraction]]:
    """First index and masses of the sum, in rational arithmetic."""
    first, total = 0, [Fraction(1)]
    for lattice, count in parts:
        masses = [Fraction(float(m)) for m in lattice.mass]
        for _ in range(count):
            longer = [Fraction(0)] * (len(total) + len(masses) - 1)
            for i, a in enumerate(total):
                for j, b in enumerate(masses):
                    longer[i + j] += a * b
            first, total = first + lattice.first, longer
    return first, total


@pytest.mark.parametrize("tilt", [0.0, 0.7, 3.0, 25.0])
def test_composition_is_the_exact_convolution_to_within_the_stated_error(tilt: float) -> None:
    parts = small_lattices()
    first, exact = exact_composition(parts)
    losses = (first + np.arange(len(exact))) * 0.125
    weights = np.array([float(m) for m in exact]) * np.exp(tilt * (losses - losses.max()))
    expected = dict(zip(np.rint(losses / 0.125).astype(int).tolist(), weights / weights.sum(), strict=True))
    found = compose(parts, tilt)
    indices = np.rint(found.losses / 0.125).astype(int).tolist()
    got = dict(zip(indices, found.mass.tolist(), strict=True))
    error = sum(abs(got.get(i, 0.0) - expected.get(i, 0.0)) for i in {*got, *expected})
    assert error <= found.error + found.relative
    assert found.error < 2.1e-7  # 1e-7 for what may lie outside of the window, on either side
    assert found.mean == pytest.approx(sum(i * 0.125 * m for i, m in expected.items()), rel=1e-12)


@pytest.mark.parametrize("tilt", [0.0, 0.7, 3.0, 25.0])
def test_hockey_sticks_of_a_composition_bracket_the_rational_ones(tilt: float) -> None:
    parts = small_lattices()
    first, exact = exact_composition(parts)
    found = compose(parts, tilt)
    for epsilon in (0.0, 0.3, 1.0, 2.5, 4.05):
        terms = (
            float(m) * -math.expm1(epsilon - (first + i) * 0.125)
            for i, m in enumerate(exact)
            if (first + i) * 0.125 > epsilon
        )
        delta = math.fsum(terms)
        assert found.delta(epsilon, upper=False) <= delta * (1 + 1e-14)
        assert found.delta(epsilon, upper=True) >= delta * (1 - 1e-14)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("side", ["upper", "lower"])
def test_composition_of_a_real_mechanism_equals_direct_convolution(direction: Direction, side: str) -> None:
    found_cells = cut(atom_of("gaussian", 1.2, 0.2), direction, 400, centred=side == "lower")
    lattice = found_cells.upper() if side == "upper" else found_cells.lower()
    direct = lattice.mass
    for _ in range(3):
        direct = np.convolve(direct, lattice.mass)
    infinite = -math.expm1(4 * math.log1p(-lattice.infinite))
    whole = Lattice(lattice.h, 4 * lattice.first, direct, infinite, 4 * lattice.offset)
    for tilt in (0.0, 2.0, 8.0):
        found = compose([(lattice, 4)], tilt)
        for epsilon in (0.05, 0.5, 1.5):
            delta = hockey_stick(whole, epsilon)
            assert found.delta(epsilon, upper=False) <= delta * (1 + 1e-12)
            assert delta * (1 - 1e-12) <= found.delta(epsilon, upper=True)


def test_offsets_add_up() -> None:
    """Points off the multiples of h, each by an offset of its own, sum to points off them by all of these."""
    (one, _), (two, _) = small_lattices()
    moved = [(replace(one, offset=0.03125), 3), (replace(two, offset=-0.0625), 4)]
    plain, shifted = compose([(one, 3), (two, 4)], 0.0), compose(moved, 0.0)
    by = 3 * 0.03125 - 4 * 0.0625
    assert shifted.mean == pytest.approx(plain.mean + by, rel=1e-12)
    for epsilon in (0.3, 1.0, 2.5):
        for upper in (True, False):
            expected = plain.delta(epsilon - by, upper=upper)
            assert shifted.delta(epsilon, upper=upper) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("tilt", [0.7, 3.0, 25.0])
@pytest.mark.parametrize("delta", [1e-4, 0.01, 0.2])
def test_epsilon_is_on_its_side_of_the_root_of_delta(tilt: float, delta: float) -> None:
    """Whatever the tilt: where it says that it knows, and else it says in which direction to look."""
    parts = small_lattices()
    first, exact = exact_composition(parts)
    whole = Lattice(0.125, first, np.array([float(m) for m in exact]), 0.0)
    root = optimize.brentq(lambda e: hockey_stick(whole, e) - delta, 0.0, 6.0, xtol=1e-15)
    found = compose(parts, tilt)
    for upper in (True, False):
        epsilon, known = found.epsilon(delta, upper=upper)
        if not known:
            assert math.copysign(1, epsilon - found.mean) == math.copysign(1, root - found.mean)
        elif upper:
            assert epsilon >= root
        else:
            assert epsilon <= root
    if tilt < 4:
        assert found.epsilon(delta, upper=True)[0] == pytest.approx(root, rel=0.01)


def test_mass_at_infinity_is_part_of_the_upper_bound_and_composes() -> None:
    lattice = Lattice(0.5, -1, np.array([0.4, 0.2, 0.3]), 0.1)
    found = compose([(lattice, 2)], 0.0)
    assert found.infinite == pytest.approx(0.19, rel=1e-12)
    assert found.delta(1e3, upper=True) >= 0.19 * (1 - 1e-12)
    assert 0 <= found.delta(1e3, upper=False) <= 0.19
