"""The lattices of privacy losses, and the convolution of them, each tested apart from the rest."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gaussian_delta, laplace_delta

from accounting.events import Atom
from accounting.pairs import Cells, Direction, Lattice, cells, loss_range
from accounting.pld import _Tilted

LOG_TAIL = -75.0
DIRECTIONS: tuple[Direction, Direction] = ("remove", "add")
ATOMS = [
    Atom("gaussian", 1.0),
    Atom("gaussian", 0.4, 0.3),
    Atom("gaussian", 1.1, 0.004),
    Atom("gaussian", 20.0, 0.9),
    Atom("gaussian", 1.0, 1e-7),
    Atom("laplace", 1.0),
    Atom("laplace", 0.2, 0.01),
    Atom("laplace", 50.0, 0.5),
    Atom("laplace", 1.0, 0.999),
]


def cut(atom: Atom, direction: Direction, count: int) -> Cells:
    low, high = loss_range(atom, LOG_TAIL)
    return cells(atom, (high - low) / count, LOG_TAIL, direction)


def hockey_stick(lattice: Lattice, epsilon: float) -> float:
    """Σ mass·(1 − e^{ε−loss})+ directly."""
    return lattice.infinite + float(np.sum(lattice.mass * np.maximum(-np.expm1(epsilon - lattice.losses), 0)))


def truth(atom: Atom, epsilon: float) -> float:
    exact = gaussian_delta if atom.noise == "gaussian" else laplace_delta
    return float(exact(atom.scale, atom.q, epsilon))


# ---------------------------------------------------------------- cells


@given(
    st.sampled_from(["gaussian", "laplace"]),
    st.floats(-1.5, 14),
    st.floats(-9, 0),
    st.sampled_from(DIRECTIONS),
    st.sampled_from([200, 333, 4096]),
)
@settings(max_examples=150, deadline=None)
def test_cells_hold_all_of_both_masses(
    noise: str, log_scale: float, log_q: float, direction: Direction, count: int
) -> None:
    found = cut(Atom(noise, 10**log_scale, 10**log_q), direction, count)  # type: ignore[arg-type]
    assert found.p.sum() + found.p_below + found.p_above == pytest.approx(1, abs=1e-12)
    assert found.q.sum() == pytest.approx(1, abs=1e-12)
    assert found.p.min() >= 0
    assert found.q.min() >= 0


def test_laplace_cells_hold_all_of_both_masses_at_awkward_scales() -> None:
    """Ranges whose ends fall on a cell's edge but for rounding: half of all mass is at either end."""
    rng = np.random.default_rng(0)
    for _ in range(400):
        scale, q = 10 ** rng.uniform(8, 14.9), 10 ** rng.uniform(-10, 0)
        for direction in DIRECTIONS:
            found = cut(Atom("laplace", scale, q), direction, 200)
            assert found.p.sum() == pytest.approx(1, abs=1e-12), (scale, q)
            assert found.q.sum() == pytest.approx(1, abs=1e-12), (scale, q)


@pytest.mark.parametrize("atom", ATOMS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_likelihood_ratios_of_cells_lie_within_the_cells(atom: Atom, direction: Direction) -> None:
    found = cut(atom, direction, 500)
    sure = (found.p > 1e-25) & (found.slack < 1e-6)
    assert sure.sum() > 30
    edges = (found.first + np.arange(len(found.p))) * found.h
    ratio = np.log(found.p[sure] / found.q[sure])
    assert np.all(ratio >= edges[sure] - found.slack[sure] - 1e-13)
    assert np.all(ratio <= edges[sure] + found.h + found.slack[sure] + 1e-13)


# ---------------------------------------------------------------- one step, no FFT


@pytest.mark.parametrize("atom", ATOMS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_upper_lattice_keeps_both_masses(atom: Atom, direction: Direction) -> None:
    lattice = cut(atom, direction, 700).upper()
    assert lattice.mass.sum() + lattice.infinite == pytest.approx(1, abs=1e-12)
    assert float(lattice.mass @ np.exp(-lattice.losses)) == pytest.approx(1, abs=1e-9)
    assert lattice.mass.min() >= 0


@pytest.mark.parametrize("atom", ATOMS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_lower_lattice_keeps_p_and_has_no_q_to_spare(atom: Atom, direction: Direction) -> None:
    """Losses are rounded down: P is kept, and Σ mass·e^{−loss}, which stands for Q, cannot be below it."""
    found = cut(atom, direction, 700)
    lattice = found.lower()
    assert lattice.mass.sum() == pytest.approx(float(found.p.sum()) + found.p_above, abs=1e-12)
    assert float(lattice.mass @ np.exp(-lattice.losses)) >= 1 - 1e-12
    assert lattice.infinite == 0
    assert lattice.mass.min() >= -1e-18


@pytest.mark.parametrize("atom", ATOMS, ids=str)
@pytest.mark.parametrize("count", [201, 2_000])
def test_one_step_on_either_lattice_is_on_its_side(atom: Atom, count: int) -> None:
    pairs = [(cut(atom, d, count).lower(), cut(atom, d, count).upper()) for d in DIRECTIONS]
    _, high = loss_range(atom, LOG_TAIL)
    for share in (0.0, 0.01, 0.03, 0.1, 0.2, 0.37, 0.5, 0.8):
        epsilon = share * high
        exact = truth(atom, epsilon)
        slip = 1e-14 + 1e-10 * exact
        assert max(hockey_stick(low, epsilon) for low, _ in pairs) <= exact + slip
        assert max(hockey_stick(up, epsilon) for _, up in pairs) >= exact - slip


@pytest.mark.parametrize("atom", ATOMS[:4], ids=str)
def test_the_gap_of_one_gaussian_step_closes_quadratically(atom: Atom) -> None:
    epsilon = loss_range(atom, -3.0)[1] / 3

    def gap(count: int) -> float:
        ups = (hockey_stick(cut(atom, d, count).upper(), epsilon) for d in DIRECTIONS)
        lows = (hockey_stick(cut(atom, d, count).lower(), epsilon) for d in DIRECTIONS)
        return max(ups) - max(lows)

    coarse = max(gap(count) for count in (1_000, 1_013, 1_031))
    fine = max(gap(count) for count in (8_000, 8_093, 8_219))
    assert 0 <= fine < coarse / 16


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
    found = _Tilted.compose(parts, tilt)
    indices = np.rint(found.losses / 0.125).astype(int).tolist()
    got = dict(zip(indices, found.mass.tolist(), strict=True))
    error = sum(abs(got.get(i, 0.0) - expected.get(i, 0.0)) for i in {*got, *expected})
    assert error <= found.error + found.relative
    assert found.error < 1e-8
    assert found.mean == pytest.approx(sum(i * 0.125 * m for i, m in expected.items()), rel=1e-12)


@pytest.mark.parametrize("tilt", [0.0, 0.7, 3.0, 25.0])
def test_hockey_sticks_of_a_composition_bracket_the_rational_ones(tilt: float) -> None:
    parts = small_lattices()
    first, exact = exact_composition(parts)
    found = _Tilted.compose(parts, tilt)
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
def test_composition_of_a_real_mechanism_equals_direct_convolution(direction: Direction) -> None:
    lattice = cut(Atom("gaussian", 1.2, 0.2), direction, 400).upper()
    direct = lattice.mass
    for _ in range(3):
        direct = np.convolve(direct, lattice.mass)
    whole = Lattice(lattice.h, 4 * lattice.first, direct, -math.expm1(4 * math.log1p(-lattice.infinite)))
    for tilt in (0.0, 2.0, 8.0):
        found = _Tilted.compose([(lattice, 4)], tilt)
        for epsilon in (0.05, 0.5, 1.5):
            delta = hockey_stick(whole, epsilon)
            assert found.delta(epsilon, upper=False) <= delta * (1 + 1e-12)
            assert delta * (1 - 1e-12) <= found.delta(epsilon, upper=True)


def test_mass_at_infinity_is_part_of_the_upper_bound_and_composes() -> None:
    lattice = Lattice(0.5, -1, np.array([0.4, 0.2, 0.3]), 0.1)
    found = _Tilted.compose([(lattice, 2)], 0.0)
    assert found.infinite == pytest.approx(0.19, rel=1e-12)
    assert found.delta(1e3, upper=True) >= 0.19 * (1 - 1e-12)
    assert found.delta(1e3, upper=False) == 0.0
