"""ε of a composition, between two bounds: slow, short, and in exact integers where it counts.

One step's privacy profile δ(γ) = sup_S P(S) − γ·Q(S) is convex in γ = e^ε. Every convex function from 1 − γ
down to a constant is the profile of a pair, and if one profile lies above another, so do those of their
compositions with anything (Zhu, Dong & Wang 2022, Proposition 8, Theorem 10). So, on the lattice of losses:

- from above: connect the points of δ at γ = e^{ih} (Doroshenko et al. 2022);
- from below: connect points as far under these as the curve may lie under its chords, and take the lower
  convex hull; tangents at the points say how far that is.

Such a pair has its losses at i·h, with P-masses γ·(change of slope). These are rounded, up or down, to
multiples of 10^−D, and composed by multiplying whole numbers: the masses are written one after the other into
one long decimal number, whose square holds all sums of products, exactly. There is no Fourier transform of
floats here, and no rounding that is not in the direction of the bound. What mpmath computes before, with
many more digits than are kept, is moved by one unit in that direction.
"""

from __future__ import annotations

import decimal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import mpmath as mp

from dpml.verify.pairs import Tails, tails
from dpml.verify.parts import NO_PROTECTION, WITHOUT_PAIR, CannotVerify, Part
from dpml.verify.renyi import renyi_epsilon

_EXACT = decimal.Context(
    prec=decimal.MAX_PREC, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, traps=[decimal.Inexact]
)
_MOST_CELLS = 2**16
_FINEST = 24  # h = 2^−24
_CUT = mp.mpf("1e-6")  # of δ: what may be moved from the ends of a distribution
_HAIR = mp.mpf("1e-12")  # of δ: for the few last steps in mpmath
_MOST_LOSS = 1e5


@dataclass(frozen=True)
class Bounds:
    """Bounds on ε; `upper` may be infinite."""

    lower: mp.mpf
    upper: mp.mpf

    @property
    def width(self) -> mp.mpf:
        """Relative to the upper one; 1 where nothing is known."""
        if self.upper == 0:
            return mp.mpf(0)
        return mp.mpf(1) if mp.isinf(self.upper) else (self.upper - self.lower) / self.upper


@dataclass(frozen=True)
class Masses:
    """P's masses of losses (first + i)·h, and of the loss ∞, in units of 10^−D."""

    first: int
    finite: list[int]
    infinite: int


def epsilon_bounds(
    parts: Mapping[Part, int],
    delta: float,
    *,
    width: float = 0.004,
    claim: float | None = None,
    seconds: float = 60.0,
) -> Bounds:
    """Bounds on ε at `delta` of parts that run as often as given, each with fresh randomness.

    Args:
        parts: From `dpml.verify.parts`.
        delta: In (0, 1).
        width: Relative width of the bracket to stop at.
        claim: An ε; if given, go on for a while until it is seen on which side of the upper bound it lies.
        seconds: Processor time after which to stop refining, so that an answer does not depend on the load.

    Raises:
        CannotVerify: for a part that is not known here.
    """
    nothing = mp.mpf(0)
    if not parts:
        return Bounds(nothing, nothing)
    if NO_PROTECTION in parts:
        return Bounds(mp.inf, mp.inf)
    with_pair = {part: k for part, k in parts.items() if part.kind not in WITHOUT_PAIR}
    if with_pair != parts:  # what is left out costs something, so the others' lower bound is one
        upper = renyi_epsilon(parts, delta)
        lower = epsilon_bounds(with_pair, delta, width=width, seconds=seconds).lower
        return Bounds(lower, upper)
    directions = [_Direction(parts, delta, add=False)]
    if any(part.q < 1 for part in parts):
        directions.append(_Direction(parts, delta, add=True))
    if sum(parts.values()) == 1:
        exact = [direction.exact_epsilon() for direction in directions]
        return Bounds(max(low for low, _ in exact), max(high for _, high in exact))
    start, found = time.process_time(), Bounds(nothing, mp.inf)
    level = min(direction.coarsest for direction in directions)
    while level <= _FINEST:
        began = time.process_time()
        until = start + 2 * seconds
        uppers = [direction.epsilon(level, until, upper=True) for direction in directions]
        lowers = [direction.epsilon(level, until, upper=False) for direction in directions]
        if None in uppers or None in lowers:
            break
        found = Bounds(
            max(found.lower, *(x for x in lowers if x is not None)),
            min(found.upper, max(x for x in uppers if x is not None)),
        )
        now = time.process_time()
        narrow = found.width <= width
        undecided = claim is not None and found.lower <= claim < found.upper and found.width > width / 8
        if (narrow and not undecided) or now - start + 3 * (now - began) > seconds:
            break
        level += 1
    return found


class _Direction:
    """A composition in one direction: with the record against without it, or (`add`) the other way round."""

    def __init__(self, parts: Mapping[Part, int], delta: float, *, add: bool) -> None:
        self.parts, self.delta = dict(parts), mp.mpf(delta)
        self.runs = sum(parts.values())
        self.digits = 32 + max(0, int(mp.ceil(-mp.log10(self.delta)))) + len(str(self.runs))
        self.unit = 10**self.digits
        self.tails = {part: tails(part, add=add) for part in parts}
        self._known: dict[tuple[Part, float], tuple[mp.mpf, mp.mpf, mp.mpf]] = {}
        with mp.workdps(self.digits + 10):
            self.ends = {part: self._ends(self.tails[part]) for part in parts}
        most = max(max(abs(low), abs(high)) for low, high in self.ends.values())
        if most > _MOST_LOSS:
            raise CannotVerify(f"a loss of {mp.nstr(most, 3)} in a single release is too large")
        self.precision = self.digits + 24 + int(most / 2)
        self.coarsest = -max(0, int(mp.ceil(mp.log(max(most, 1) / 1000, 2))))

    def exact_epsilon(self) -> tuple[mp.mpf, mp.mpf]:
        """ε of one part that runs once, by bisection of its profile."""
        [(part, _)] = self.parts.items()
        with mp.workdps(self.precision):

            def profile(epsilon: mp.mpf) -> mp.mpf:
                p, r = self.tails[part](mp.exp(epsilon))
                return p - mp.exp(epsilon) * r

            if profile(mp.mpf(0)) <= self.delta:
                return mp.mpf(0), mp.mpf(0)
            low, high = mp.mpf(0), mp.mpf(1)
            while profile(high) > self.delta:
                low, high = high, 2 * high
                if high > 4 * _MOST_LOSS:
                    return low, mp.inf
            while high - low > high * mp.mpf("1e-20"):
                middle = (low + high) / 2
                low, high = (middle, high) if profile(middle) > self.delta else (low, middle)
            return low, high

    def epsilon(self, level: int, until: float, *, upper: bool) -> mp.mpf | None:
        """A bound on ε from the lattice of width 2^−level; None if that takes too much space or time."""
        total: Masses | None = None
        for part, count in self.parts.items():
            step = self._step(part, level, upper=upper)
            power, done, size = None, 0, 1
            while step is not None:
                if count & size:
                    power, done = self._composed(power, step, done + size, upper=upper), done + size
                if done == count:
                    break
                step, size = self._composed(step, step, 2 * size, upper=upper), 2 * size
                if len(step.finite) > _MOST_CELLS or time.process_time() > until:
                    return None
            if power is None:
                return None
            total = self._composed(total, power, self.runs, upper=upper)
        assert total is not None  # noqa: S101 - there are parts
        return self._solved(total, mp.ldexp(mp.mpf(1), -level), upper=upper)

    # ------------------------------------------------------------ one step

    def _ends(self, of: Tails) -> tuple[mp.mpf, mp.mpf]:
        """Losses below and above which P has next to nothing."""
        little = _CUT * self.delta / self.runs / 8

        def first(enough: mp.mpf, *, above: bool) -> mp.mpf:
            def reached(loss: mp.mpf) -> bool:
                p, _ = of(mp.exp(loss if above else -loss))
                return bool((p if above else 1 - p) <= enough)

            low, high = mp.mpf(-16), mp.mpf(16)
            while not reached(high) and high < 4 * _MOST_LOSS:
                low, high = high, 2 * high
            while high - low > abs(high) / 64 + mp.mpf("1e-4"):
                middle = (low + high) / 2
                low, high = (low, middle) if reached(middle) else (middle, high)
            return high

        infinite = of(mp.exp(4 * _MOST_LOSS))[0]
        return -first(little, above=False), first(infinite + little, above=True)

    def _point(self, part: Part, loss: float) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
        """γ = e^loss, δ(γ), and a slope of δ there."""
        key = (part, loss)
        if key not in self._known:
            gamma = mp.exp(loss)
            p, r = self.tails[part](gamma)
            self._known[key] = gamma, p - gamma * r, -r
        return self._known[key]

    def _step(self, part: Part, level: int, *, upper: bool) -> Masses | None:
        """One run of a part, on the lattice."""
        h = 2.0**-level
        low, high = self.ends[part]
        first, last = int(mp.floor(low / h)) - 1, int(mp.ceil(high / h)) + 1
        if last - first > _MOST_CELLS // 4:
            return None
        with mp.workdps(self.precision):
            points = [self._point(part, i * h) for i in range(first, last + 1)]
            gammas = [gamma for gamma, _, _ in points]
            if upper:
                corners = list(range(len(points)))
                values = [value for _, value, _ in points]
                slopes = [(values[0] - 1) / gammas[0]]  # a chord from δ(0) = 1
            else:
                corners, values = _below(points)
                slopes = [mp.mpf(-1)]
                if not corners:  # too coarse: nothing but what is lost for ever
                    return Masses(0, [0], max(0, int(points[-1][1] * self.unit) - 1))
            for i, j in pairwise(corners):
                slopes.append((values[j] - values[i]) / (gammas[j] - gammas[i]))
            slopes.append(mp.mpf(0))
            finite = [0] * (corners[-1] - corners[0] + 1)
            for place, i in enumerate(corners):
                mass = gammas[i] * (slopes[place + 1] - slopes[place])
                finite[i - corners[0]] = self._rounded(mass, upper=upper)
            infinite = self._rounded(values[corners[-1]], upper=upper)
        return Masses(first + corners[0], finite, infinite)

    def _rounded(self, mass: mp.mpf, *, upper: bool) -> int:
        units = int(mp.floor(mass * self.unit))
        return max(0, units + 2 if upper else units - 1)

    # ------------------------------------------------------------ composition

    def _composed(self, a: Masses | None, b: Masses, runs: int, *, upper: bool) -> Masses:
        """Sums of independent losses, `runs` runs altogether, with next to nothing cut off at the ends."""
        if a is None:
            return b
        products = _convolved(a.finite, b.finite, self.digits)
        up = self.unit - 1 if upper else 0  # rounds up
        finite = [(x + up) // self.unit for x in products]
        mass_a, mass_b = sum(a.finite), sum(b.finite)
        infinite = (a.infinite * (mass_b + b.infinite) + b.infinite * mass_a + up) // self.unit
        cut = int(_CUT * self.delta * runs / self.runs / 8 * self.unit)
        low, below = _cut_off(finite, cut)
        high, above = _cut_off(finite[::-1], cut)
        kept = finite[low : len(finite) - high] or [0]
        if upper:
            kept[0] += below
            infinite += above
        return Masses(a.first + b.first + low, kept, infinite)

    def _solved(self, total: Masses, h: mp.mpf, *, upper: bool) -> mp.mpf:
        """The least ε ≥ 0 at which Σ p·(1 − e^{ε − loss})₊ is at most δ."""
        with mp.workdps(self.digits + 10):
            target = self.delta * (1 - _HAIR if upper else 1 + _HAIR)
            above, weighted = mp.mpf(total.infinite) / self.unit, mp.mpf(0)
            if above >= target:
                return mp.inf
            loss = (total.first + len(total.finite) - 1) * h
            lowered, by = mp.exp(-loss), mp.exp(h)  # e^{−loss}
            for units in reversed(total.finite):
                if loss <= 0:
                    break
                if units:
                    mass = mp.mpf(units) / self.unit
                    above, weighted = above + mass, weighted + mass * lowered
                lowered, loss = lowered * by, loss - h
                if above - weighted / lowered > target:  # δ(ε) at the next smaller loss
                    return max(mp.mpf(0), mp.log((above - target) / weighted))
            if above - weighted > target:
                return max(mp.mpf(0), mp.log((above - target) / weighted))
            return mp.mpf(0)


def _below(points: list[tuple[mp.mpf, mp.mpf, mp.mpf]]) -> tuple[list[int], list[mp.mpf]]:
    """Corners of a convex function below δ, and its values there; none if the lattice is too coarse.

    Left of the first corner the function is 1 − γ, right of the last it is constant: both are below δ.
    """
    gaps = [_gap(*left, *right) for left, right in pairwise(points)]
    end = points[-1][1] if points[-1][2] == 0 else mp.mpf(0)  # what is lost for ever
    lowered = [
        value - max(gaps[max(0, i - 1)], gaps[min(i, len(gaps) - 1)])
        for i, (_, value, _) in enumerate(points)
    ]
    above = [lowered[i] > max(1 - gamma, end) for i, (gamma, _, _) in enumerate(points)]
    first = last = next(i for i, (gamma, _, _) in enumerate(points) if gamma >= 1)
    if not above[first]:
        return [], []
    while first > 0 and above[first - 1]:
        first -= 1
    while last < len(points) - 1 and above[last + 1]:
        last += 1
    if points[first][0] >= 1 - end or points[last][0] <= 1:
        return [], []
    values = [mp.mpf(0)] * len(points)
    for i in range(first, last + 1):
        values[i] = lowered[i]
    values[first], values[last] = 1 - points[first][0], end
    hull: list[int] = []
    for i in range(first, last + 1):
        while len(hull) >= 2:
            a, b = hull[-2:]
            across = (values[i] - values[a]) * (points[b][0] - points[a][0])
            if values[b] - values[a] < across / (points[i][0] - points[a][0]):
                break
            hull.pop()
        hull.append(i)
    return hull, values


def _gap(
    gamma: mp.mpf, value: mp.mpf, slope: mp.mpf, next_gamma: mp.mpf, next_value: mp.mpf, next_slope: mp.mpf
) -> mp.mpf:
    """How far a chord may lie above a convex function: at most as far as above where the tangents meet."""
    chord = (next_value - value) / (next_gamma - gamma)
    if next_slope <= slope:
        return mp.mpf(0)
    left, right = max(chord - slope, 0), max(next_slope - chord, 0)
    return (next_gamma - gamma) * left * right / (next_slope - slope)


def _convolved(a: list[int], b: list[int], digits: int) -> list[int]:
    """Sums of products of whole numbers below 2·10^digits, by one exact multiplication of decimal numbers."""
    cell = 2 * digits + 2 + len(str(min(len(a), len(b))))
    long = [
        decimal.Decimal("".join(f"{x:0{cell}d}" for x in numbers))
        for numbers in ((a, b) if a is not b else (a,))
    ]
    product = _EXACT.multiply(long[0], long[-1])
    count = len(a) + len(b) - 1
    text = f"{product:f}".zfill(cell * count)
    return [int(text[i : i + cell]) for i in range(0, cell * count, cell)]


def _cut_off(masses: list[int], most: int) -> tuple[int, int]:
    """How many of the first masses have a sum of at most `most`, and that sum."""
    total = 0
    for i, mass in enumerate(masses):
        if total + mass > most:
            return i, total
        total += mass
    return len(masses), total
