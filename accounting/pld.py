"""Privacy-loss distributions: certified lower and upper bounds on ε(δ) and δ(ε) of a composition.

A step's losses are put on a lattice twice, once from above and once from below (`accounting.lattice`), and
composed by a tilted FFT (`accounting.tilted`). The width of the lattice is chosen from the question, coarse
to fine: first a coarse lattice says where ε lies and which tilt to use, then one of the width that this
asks for gives the bracket, which says how much finer it has to be if it is not narrow enough.

Sources: Doroshenko et al. 2022 (upper lattice); Zhu, Dong & Wang 2022 (dominating pairs, both directions).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import optimize
from scipy.special import erfcx, log_ndtr

from accounting.atoms import Atom, merge_gaussians
from accounting.errors import UnsupportedEvent
from accounting.lattice import Direction, cells, loss_range
from accounting.pairs import UNIT, DiscretePair, GaussianPair
from accounting.rdp import renyi_delta, renyi_epsilon
from accounting.tilted import Part, best_tilt, compose, infinite_mass, largest_loss, tilt_at

DEFAULT_TOLERANCE = 0.002
MOST_CELLS = 2**18
_MOST_REFINEMENTS = 6
WIDEST = 50.0  # e^h must not overflow
_NARROWEST = 1e-10  # far above the rounding of e^h
DIRECTIONS: tuple[Direction, ...] = ("remove", "add")


def epsilon_bounds(
    counts: Mapping[Atom, int], delta: float, tolerance: float = DEFAULT_TOLERANCE
) -> tuple[float, float]:
    """Return a lower and an upper bound on ε at `delta`, for the dominating pairs of a composition.

    Args:
        counts: Elementary mechanisms and how often each runs, from `accounting.events.atoms`.
        delta: In (0, 1).
        tolerance: The bracket's relative width to stop at. Where the limits of memory are reached first
            (2^18 cells a mechanism, 2^20 points a convolution) the bracket is wider, never wrong.

    Returns:
        0 ≤ lower ≤ upper. ∞ for a non-private event.

    Raises:
        UnsupportedEvent: for a mechanism of which only Rényi divergences are known.
    """
    simple = simple_epsilon(counts, delta)
    if simple is not None:
        return simple
    lower, upper = Question(counts, delta, None).bracket(tolerance)
    # Rényi's bound is rarely better than what was found, and then by much.
    if math.isinf(upper) or upper - lower > tolerance * upper:
        upper = max(lower, min(upper, renyi_epsilon(counts, delta)))
    return lower, upper


def delta_bounds(
    counts: Mapping[Atom, int], epsilon: float, tolerance: float = DEFAULT_TOLERANCE
) -> tuple[float, float]:
    """Return a lower and an upper bound on δ at `epsilon`; as `epsilon_bounds` otherwise.

    The tolerance is that of ε: the lattice is as fine as for an ε bracket of this relative width.
    """
    if not counts:
        return 0.0, 0.0
    if Atom.NON_PRIVATE in counts:
        return 1.0, 1.0
    exact = _only_gaussian(counts)
    if exact is not None:
        lower, upper = _widen(math.exp(_log_gaussian_delta(exact, epsilon)), 1e-9)
        return lower, min(1.0, upper)
    if epsilon >= pure_epsilon(counts):
        return 0.0, 0.0
    _require_pairs(counts)
    lower, upper = 0.0, renyi_delta(counts, epsilon)
    for _ in range(3):  # what is cut off the losses is chosen by how small δ is about
        guess = upper
        below, above = Question(counts, max(guess, 1e-300), epsilon).bracket(tolerance)
        lower, upper = max(lower, below), min(upper, above)
        if upper > 1e-4 * guess:
            break
    return min(lower, upper), upper


def simple_epsilon(counts: Mapping[Atom, int], delta: float) -> tuple[float, float] | None:
    """Bounds that need no lattice, or None."""
    if not counts:
        return 0.0, 0.0
    if Atom.NON_PRIVATE in counts:
        return math.inf, math.inf
    exact = _only_gaussian(counts)
    if exact is None:
        _require_pairs(counts)
        return None
    # Near δ(0) a relative error of δ is a larger one of ε, so both are widened.
    below = _gaussian_epsilon(exact, min(delta * (1 + 1e-9), 1 - UNIT)) * (1 - 1e-9)
    return below, _gaussian_epsilon(exact, delta * (1 - 1e-9)) * (1 + 1e-9)


def _require_pairs(counts: Mapping[Atom, int]) -> None:
    for atom in counts:
        if not atom.has_pair:
            raise UnsupportedEvent(
                f"{atom.mechanism!s:.80} has no privacy-loss distribution, only Rényi divergences; "
                'use PrivacyAccountant(method="rdp").'
            )


# ---------------------------------------------------------------- exact special cases


def _only_gaussian(counts: Mapping[Atom, int]) -> float | None:
    """The scale of the one unsampled Gaussian that `counts` consists of, or None."""
    [atom, *others] = merge_gaussians(counts)
    return (
        atom.mechanism.scale
        if not others and isinstance(atom.mechanism, GaussianPair) and atom.q == 1
        else None
    )


def _log_gaussian_delta(sigma: float, epsilon: float) -> float:
    """Log δ(ε) of the Gaussian mechanism: Balle & Wang 2018, Theorem 8."""
    mu = 1 / sigma
    z = epsilon / mu
    if z > 1e150:  # z² is no float, and δ is 0
        return -1e300
    gain = log_ndtr(mu / 2 - z)
    if mu < 1:
        # loss − gain = ε − ∫ (log Φ)′ over [−z − μ/2, −z + μ/2], without the cancellation.
        nodes, weights = np.polynomial.legendre.leggauss(20)
        hazard = math.sqrt(2 / math.pi) / erfcx((z - mu * nodes / 2) / math.sqrt(2))
        gap = -mu * float(weights @ (hazard - z)) / 2
    else:
        gap = float(epsilon + log_ndtr(-mu / 2 - z) - gain)
    return float(gain + np.log(-np.expm1(min(gap, -1e-300))))


def _gaussian_epsilon(sigma: float, delta: float) -> float:
    if _log_gaussian_delta(sigma, 0.0) <= math.log(delta):
        return 0.0
    mu = 1 / sigma
    high = (mu**2 / 2 + mu * math.sqrt(-2 * math.log(delta))) * (1 + 1e-9)
    root = optimize.brentq(
        lambda e: _log_gaussian_delta(sigma, e) - math.log(delta), 0.0, high, xtol=1e-16 * high, rtol=1e-13
    )
    return float(root)


def _widen(value: float, relative: float) -> tuple[float, float]:
    return value * (1 - relative), value * (1 + relative)


def pure_epsilon(counts: Mapping[Atom, int]) -> float:
    """The ε at which δ is zero: finite for bounded losses alone."""
    total = 0.0
    for atom, count in counts.items():
        if not atom.has_pair or not math.isfinite(atom.pair.pure_epsilon):
            return math.inf
        low, high = loss_range(atom, -700.0)
        total += count * max(-low, high)
    return total * (1 + 1e-12)


# ---------------------------------------------------------------- lattices, coarse to fine


@dataclass
class Question:
    """One composition, and what is asked about it: ε at `delta`, or δ at `epsilon` (about `delta`)."""

    counts: Mapping[Atom, int]
    delta: float
    epsilon: float | None

    def __post_init__(self) -> None:
        self.steps = sum(self.counts.values())
        # What is cut off the losses at either end adds up to far less than δ, and is charged.
        self.log_tail = max(math.log(self.delta) - 12 - math.log(self.steps), -690.0)
        self.ranges = [loss_range(atom, self.log_tail) for atom in self.counts]
        self.pure = pure_epsilon(self.counts)
        spans = [high - low for low, high in self.ranges]
        self.finest = max(max(spans) / MOST_CELLS, _NARROWEST)
        self.directions = DIRECTIONS
        self.easier: dict[Direction, float] = {}  # directions that matter no more, and their upper bounds
        if all(atom.sampling == "fixed-size" for atom in self.counts):
            self.directions = DIRECTIONS[:1]  # replace-one has but one

    def bracket(self, tolerance: float) -> tuple[float, float]:
        """Narrow a bracket from coarse to fine."""
        lower, upper = 0.0, self.pure if self.epsilon is None else 1.0
        if self.finest > WIDEST:
            return lower, upper
        h, tilt = self.width(tolerance)
        for _ in range(_MOST_REFINEMENTS):
            before = (lower, upper)
            above, below = self.bounds(h, tilt)
            lower, upper = max(lower, below), min(upper, above)
            upper = max(lower, upper)
            gap, wanted = upper - lower, self.wanted(upper, tilt, tolerance)
            if gap <= wanted or h <= self.finest:
                break
            if lower > 0 and gap > 0.9 * (before[1] - before[0]):  # the window is full: finer says less
                break
            # The gap shrinks with h² where cells are narrower than the losses spread, else more slowly.
            h = max(self.finest, h * min(0.7, max(1 / 8, 0.9 * math.sqrt(wanted / gap))))
            h = self.aligned(h)
        return lower, upper

    def wanted(self, upper: float, tilt: float, tolerance: float) -> float:
        """How wide the bracket may be."""
        if self.epsilon is None:
            return tolerance * upper + 1e-12
        # d log δ / dε is about −(tilt + 1) near ε.
        return min(tolerance * max((1 + tilt) * self.epsilon, 1.0), 0.2) * upper + 1e-300

    def coarse_parts(self) -> list[Part]:
        """Upper lattices that say where ε lies, and which tilt to use, and hardly cost anything."""
        h = max(self.finest, min(self._spread() / 2, WIDEST))
        return [(cells(atom, h, self.log_tail, "remove").upper(), k) for atom, k in self.counts.items()]

    def width(self, tolerance: float) -> tuple[float, float]:
        """The lattice width that should do, and the tilt, from a coarse lattice."""
        parts = self.coarse_parts()
        if self.epsilon is None:
            tilt, epsilon = best_tilt(parts, self.delta)
            epsilon = min(epsilon, self.pure, self.answer(parts, tilt, upper=True))
            tilt = tilt_at(parts, epsilon)
        else:
            tilt, epsilon = tilt_at(parts, self.epsilon), self.epsilon
        # Spreading a mass over a cell of width h adds h²/6 to its variance at most, and gathering loses twice
        # that: together about steps·(1 + tilt)·h²/4 of ε.
        least = 1e-5 if self.epsilon is None else 1 / (1 + tilt)
        goal = tolerance * max(epsilon, least)
        h = math.sqrt(2.0 * goal / (self.steps * (1 + tilt)))
        widest = max(high - low for low, high in self.ranges)
        return self.aligned(max(self.finest, min(h, widest / 64, WIDEST))), tilt

    def aligned(self, h: float) -> float:
        """`h` or somewhat less, such that the lattice suits the losses.

        If all losses lie on a lattice, it is one that this is a part of. The losses of a Poisson sample begin
        abruptly at log(1 − q), which should be the edge of a cell: the lower bound loses least so.
        """
        atom = max(self.counts, key=lambda atom: self.counts[atom])
        if atom.sampling == "poisson":
            spacing: float | None = -math.log1p(-atom.q)
        else:
            spacing = atom.pair.spacing if atom.sampling == "none" and len(self.counts) == 1 else None
        if spacing is None:
            return h
        if atom.sampling == "poisson" and h / 4 < spacing / 16 < h:  # wide cells cost the lower bound much
            h = spacing / 16
        fitting = spacing / max(1, math.ceil(spacing / h))  # 0 where q is next to nothing
        return fitting if fitting >= self.finest else h

    def _spread(self) -> float:
        """A small fraction of the losses' range, or of their standard deviation if that is smaller."""
        least = math.inf
        for atom, (low, high) in zip(self.counts, self.ranges, strict=True):
            least = min(least, max((high - low) / 100, 1e-300))
            if isinstance(atom.mechanism, GaussianPair):
                growth = min(1 / atom.mechanism.scale**2, 40.0)
                least = min(least, atom.q * math.sqrt(math.expm1(growth)))
        return least

    def bounds(self, h: float, tilt: float) -> tuple[float, float]:
        """An upper and a lower bound from the lattices of width h."""
        above, below = max(self.easier.values(), default=0.0), 0.0
        for direction in self.directions:
            if direction in self.easier:
                continue
            ups, downs = self.lattices(h, direction)
            if self.epsilon is None and largest_loss(ups) <= above and infinite_mass(ups) < self.delta:
                continue  # not the harder direction, without looking closer
            found = self.answer(ups, tilt, upper=True)
            above = max(above, found)
            if found <= below:  # settled: the other direction is harder
                self.easier[direction] = found
                continue
            if direction == "remove" or below < (1 - 1e-3) * above:  # else "add" is not the harder one
                below = max(below, self.answer(downs, tilt, upper=False))
        return above, below

    def lattices(self, h: float, direction: Direction) -> tuple[list[Part], list[Part]]:
        """All parts' lattices of width h, from above and from below."""
        ups: list[Part] = []
        downs: list[Part] = []
        for atom, count in self.counts.items():
            c = cells(atom, h, self.log_tail, direction)
            ups.append((c.upper(), count))
            pair = atom.pair
            if isinstance(pair, DiscretePair) or pair.bounds_differ or atom.sampling == "fixed-size":
                c = cells(atom, h, self.log_tail, direction, centred=True, upper=False)
            downs.append((c.lower(), count))
        return ups, downs

    def answer(self, parts: list[Part], tilt: float, *, upper: bool) -> float:
        """Bound ε at δ, or δ at ε, for one direction: ∞ or 1 (upper), 0 (lower) where no bound is found."""
        if self.epsilon is not None:
            if self.epsilon >= largest_loss(parts):
                return min(1.0, infinite_mass(parts) * (1 + 1e-9 if upper else 1 - 1e-9))
            return compose(parts, tilt_at(parts, self.epsilon)).delta(self.epsilon, upper=upper)
        if upper and infinite_mass(parts) >= self.delta:
            return math.inf
        for _ in range(12):
            tilted = compose(parts, tilt)
            found, inside = tilted.epsilon(self.delta, upper=upper)
            if inside:
                return found
            before, tilt = tilt, tilt_at(parts, found)
            if abs(tilt - before) <= 1e-9 * tilt:
                break
        return max(0.0, largest_loss(parts)) if upper else 0.0
