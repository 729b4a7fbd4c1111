"""Dominating pairs: the two output distributions of a mechanism that are easiest to tell apart.

A pair is (m1, m0): what is released with the record in question, and without it. Every pair here
dominates its mechanism in both directions (Zhu, Dong & Wang 2022, Definition 7): no two neighbouring data
sets are easier to tell apart than m1 from m0, whichever of the two has the record.

A pair is described by its base loss, ℓ = log(m1/m0). `masses` says how much of either distribution lies in
given intervals of ℓ; all that the accountants compute is made of that.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri_exp

FloatArray = npt.NDArray[np.float64]
UNIT = 2.0**-53
_UNDERFLOW = 1e-290


@dataclass(frozen=True)
class Masses:
    """How much of m0 and m1 lies in intervals (edges[j], edges[j+1]] of the base loss, and outside.

    Attributes:
        m0, m1: Masses of the intervals, shape [n].
        slack: Bound on the relative float error of m1/m0 in each interval, shape [n]; ∞ where unknown.
        below: (m0, m1) masses of finite losses at or below the first edge.
        above: (m0, m1) masses of finite losses above the last edge.
        only0: m0 mass where m1 has none (ℓ = −∞).
        only1: m1 mass where m0 has none (ℓ = +∞).
    """

    m0: FloatArray
    m1: FloatArray
    slack: FloatArray
    below: tuple[float, float] = (0.0, 0.0)
    above: tuple[float, float] = (0.0, 0.0)
    only0: float = 0.0
    only1: float = 0.0


@dataclass(frozen=True)
class Pair(ABC):
    """A dominating pair. Frozen and hashable: equal pairs are one mechanism, run several times."""

    @abstractmethod
    def loss_range(self, log_tail: float) -> tuple[float, float]:
        """Ends of the base losses outside which m0 and m1 have mass below exp(log_tail) on either side."""

    @abstractmethod
    def masses(self, edges: FloatArray, *, upper: bool) -> Masses:
        """Masses between ascending `edges` (−∞ may come several times).

        Where a pair is known within bounds only, `upper` asks for one that dominates it, and otherwise for
        one that it dominates; both in both directions.
        """

    @property
    def pure_epsilon(self) -> float:
        """The largest base loss in absolute value, ∞ if unbounded."""
        return math.inf

    @property
    def bounds_differ(self) -> bool:
        """Whether the pair is known within bounds only, and `upper` makes a difference."""
        return False

    @property
    def spacing(self) -> float | None:
        """Width of a lattice through 0 that holds all base losses, if there is one."""
        return None


@dataclass(frozen=True)
class GaussianPair(Pair):
    """N(1, scale²) against N(0, scale²)."""

    scale: float

    def loss_range(self, log_tail: float) -> tuple[float, float]:
        mu, z = 1 / self.scale, -float(ndtri_exp(log_tail))
        return -mu * z - mu**2 / 2, mu * z + mu**2 / 2

    def masses(self, edges: FloatArray, *, upper: bool) -> Masses:
        mu = 1 / self.scale
        m0, ends0, slack0 = normal_masses(edges / mu + mu / 2)
        m1, ends1, slack1 = normal_masses(edges / mu - mu / 2)
        return Masses(m0, m1, slack0 + slack1, (ends0[0], ends1[0]), (ends0[1], ends1[1]))


def normal_masses(z: FloatArray) -> tuple[FloatArray, tuple[float, float], FloatArray]:
    """Standard normal masses between the points `z`, the two tails', and relative errors."""
    size = np.abs(z)
    tail = ndtr(-size)
    left, right = tail[:-1], tail[1:]
    negative = z <= 0
    mass = np.where(negative[1:], right - left, left - right)
    [straddles] = np.nonzero(negative[:-1] & ~negative[1:])
    mass[straddles] = 1 - left[straddles] - right[straddles]
    # ndtr is good to a few units, z to one: and φ(z) ≤ (z + 0.8)·ndtr(−z) for z ≥ 0.
    near, far = np.maximum(left, right), np.where(np.isfinite(size), size, 0)
    far = np.maximum(far[:-1], far[1:])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        slack = np.where(mass > _UNDERFLOW, 8 * UNIT * near * (1 + far * (far + 0.8)) / mass, np.inf)
    ends = (
        float(tail[0] if negative[0] else 1 - tail[0]),
        float(1 - tail[-1] if negative[-1] else tail[-1]),
    )
    return np.maximum(mass, 0), ends, slack


@dataclass(frozen=True)
class LaplacePair(Pair):
    """Laplace(1, scale) against Laplace(0, scale)."""

    scale: float

    @property
    def pure_epsilon(self) -> float:
        return 1 / self.scale

    def loss_range(self, log_tail: float) -> tuple[float, float]:
        return -1 / self.scale, 1 / self.scale

    def masses(self, edges: FloatArray, *, upper: bool) -> Masses:
        # The loss is −rate for x ≤ 0, rate·(2x − 1) between, and rate for x ≥ 1.
        # Losses at the ends are atoms; the widening keeps float rounding from splitting them off.
        rate = 1 / self.scale
        inside = np.clip((edges / rate + 1) / 2, 0, 1)
        below = edges < -rate * (1 - 4 * UNIT)
        above = edges >= rate * (1 - 4 * UNIT)
        survival0 = np.where(below, 1.0, np.where(above, 0.0, 0.5 * np.exp(-rate * inside)))
        cdf1 = np.where(below, 0.0, np.where(above, 1.0, 0.5 * np.exp(-rate * (1 - inside))))
        m0, m1 = -np.diff(survival0), np.diff(cdf1)
        with np.errstate(divide="ignore", invalid="ignore"):
            slack = 8 * UNIT * (1 + rate) * (survival0[:-1] / m0 + cdf1[1:] / m1)
        return Masses(m0, m1, np.where((m0 > _UNDERFLOW) & (m1 > _UNDERFLOW), slack, np.inf))


@dataclass(frozen=True)
class BoundedRangePair(Pair):
    """Every mechanism whose losses, for any two neighbours, lie in an interval of width `epsilon`.

    Dong, Durfee & Rogers 2020 show that the worst such mechanisms have two losses, t and t − ε, for some t
    in [0, ε]. Their privacy profiles max(0, p_t − γ·q_t) have as supremum over t, attained at
    t = (log γ + ε)/2, the function (1 − √(γ·e^{−ε}))² / (1 − e^{−ε}) for e^{−ε} ≤ γ ≤ e^ε. It is convex,
    hence the profile of a pair (Zhu et al. 2022, Proposition 8), and that is this one. It is its own mirror
    image, and everywhere below the profile of randomised response, which is all that pure ε-DP gives.
    From below stands one such mechanism, that with losses ±ε/2.
    """

    epsilon: float

    @property
    def bounds_differ(self) -> bool:
        return True

    @property
    def pure_epsilon(self) -> float:
        return self.epsilon

    def loss_range(self, log_tail: float) -> tuple[float, float]:
        return -self.epsilon, self.epsilon

    def masses(self, edges: FloatArray, *, upper: bool) -> Masses:
        if not upper:
            return ResponsePair(self.epsilon / 2).masses(edges, upper=False)
        # m1(ℓ > x) = (1 − e^{(x−ε)/2}) / (1 − e^{−ε}), m0 the mirror image.
        inside = np.clip(edges, -self.epsilon, self.epsilon)
        whole = -math.expm1(-self.epsilon)
        step = -np.expm1(-np.diff(inside) / 2) / whole
        m1 = np.exp((inside[1:] - self.epsilon) / 2) * step
        m0 = np.exp((-inside[:-1] - self.epsilon) / 2) * step
        with np.errstate(divide="ignore", invalid="ignore"):
            slack = 32 * UNIT * (1 + self.epsilon) * (1 + self.epsilon / np.diff(inside))
        return Masses(m0, m1, np.where(step > 0, slack, np.inf))


# ---------------------------------------------------------------- finitely many losses


@dataclass(frozen=True)
class Points:
    """A discrete pair: `m0` and `m1` masses at ascending finite `losses`, and at −∞ and +∞."""

    losses: FloatArray
    m0: FloatArray
    m1: FloatArray
    only0: float = 0.0
    only1: float = 0.0


@dataclass(frozen=True)
class DiscretePair(Pair):
    """A pair with finitely many losses, or finitely many that matter."""

    @abstractmethod
    def points(self, *, upper: bool) -> Points:
        """All losses, with the masses of either distribution."""

    def loss_range(self, log_tail: float) -> tuple[float, float]:
        points = self.points(upper=True)
        matter = (points.m0 > 0.5 * math.exp(log_tail)) | (points.m1 > 0.5 * math.exp(log_tail))
        losses = points.losses[matter]
        if not len(losses):
            return 0.0, 0.0
        return float(losses[0]), float(losses[-1])

    def masses(self, edges: FloatArray, *, upper: bool) -> Masses:
        points, n = self.points(upper=upper), len(edges) - 1
        place = np.searchsorted(edges, points.losses, side="left") - 1
        low, high = place < 0, place >= n
        inside = ~(low | high)
        m0 = _sums(place[inside], points.m0[inside], n)
        m1 = _sums(place[inside], points.m1[inside], n)
        counts = np.bincount(place[inside], minlength=n)
        below = float(points.m0[low].sum()), float(points.m1[low].sum())
        above = float(points.m0[high].sum()), float(points.m1[high].sum())
        slack = 8.0 * UNIT * (1 + counts + np.abs(np.nan_to_num(edges[1:], posinf=0, neginf=0)))
        return Masses(m0, m1, np.asarray(slack, dtype=np.float64), below, above, points.only0, points.only1)


def _sums(place: npt.NDArray[np.intp], mass: FloatArray, n: int) -> FloatArray:
    """How much mass falls into each of n places."""
    return np.bincount(place, mass, n).astype(np.float64, copy=False)


@dataclass(frozen=True)
class ResponsePair(DiscretePair):
    """Randomised response that tells (ε, δ)-DP apart best: Kairouz, Oh & Viswanath 2015, Theorem 3.1.

    It dominates every (ε, δ)-DP mechanism, in both directions.
    """

    epsilon: float
    delta: float = 0.0

    def __str__(self) -> str:
        return f"An (ε, δ)-DP mechanism with ε = {self.epsilon:g}, δ = {self.delta:g}"

    @property
    def pure_epsilon(self) -> float:
        return math.inf if self.delta else self.epsilon

    @property
    def spacing(self) -> float | None:
        return self.epsilon

    def points(self, *, upper: bool) -> Points:
        likely = 1 / (1 + math.exp(-self.epsilon))
        rest = 1 - self.delta
        unlikely = likely * math.exp(-self.epsilon)
        losses = np.array([-self.epsilon, self.epsilon])
        m1 = rest * np.array([unlikely, likely])
        return Points(losses, m1[::-1].copy(), m1, self.delta, self.delta)


@dataclass(frozen=True)
class UniformResponsePair(DiscretePair):
    """An answer out of k, replaced by a uniform one with probability `noise`, against a uniform one."""

    noise: float
    answers: int

    @property
    def pure_epsilon(self) -> float:
        return float(np.abs(self.points(upper=True).losses).max())

    def points(self, *, upper: bool) -> Points:
        k, honest = self.answers, 1 - self.noise
        m0 = np.array([(k - 1) / k, 1 / k])
        m1 = np.array([self.noise * m0[0], honest + self.noise / k])
        return Points(np.array([math.log(self.noise), math.log1p((k - 1) * honest)]), m0, m1)


@dataclass(frozen=True)
class SwappedResponsePair(DiscretePair):
    """The same randomised answer, against that of a record whose true answer is another one."""

    noise: float
    answers: int

    @property
    def pure_epsilon(self) -> float:
        return math.log1p(self.answers * (1 - self.noise) / self.noise)

    @property
    def spacing(self) -> float | None:
        return self.pure_epsilon

    def points(self, *, upper: bool) -> Points:
        k, lie = self.answers, self.noise / self.answers
        m1 = np.array([lie, (k - 2) * lie, 1 - self.noise + lie])
        return Points(np.array([-self.pure_epsilon, 0.0, self.pure_epsilon]), m1[::-1].copy(), m1)


@dataclass(frozen=True)
class DiscreteGaussianPair(DiscretePair):
    """Discrete Gaussian noise (Canonne, Kamath & Steinke 2020) of parameter sigma, shifted by `shift`."""

    sigma: float
    shift: int

    @property
    def spacing(self) -> float | None:
        return self.shift / (2 * self.sigma**2)

    def points(self, *, upper: bool) -> Points:
        return _discrete_gaussian(self.sigma, self.shift)


@lru_cache(maxsize=8)
def _discrete_gaussian(sigma: float, shift: int) -> Points:
    reach = math.ceil(36 * sigma) + 1  # what lies beyond has mass below 1e-280
    x = np.arange(-reach, reach + shift + 1, dtype=np.float64)
    weight0, weight1 = -0.5 * (x / sigma) ** 2, -0.5 * ((x - shift) / sigma) ** 2
    total = math.fsum(np.exp(weight0))
    losses = shift * (2 * x - shift) / (2 * sigma**2)
    return Points(losses, np.exp(weight0) / total, np.exp(weight1) / total)


@dataclass(frozen=True)
class ProductPair(DiscretePair):
    """Several releases about one and the same sample: the product of their pairs.

    Each part is cut into cells of the base loss. From above, the masses of a cell are spread to its two ends,
    which makes them easier to tell apart (Doroshenko et al. 2022); from below they are gathered, which
    is post-processing. Losses of independent releases add; the sums are cut into cells again.

    Attributes:
        parts: Pairs, and how often each is run on the sample.
    """

    parts: tuple[tuple[Pair, int], ...]

    @property
    def bounds_differ(self) -> bool:
        return True

    def points(self, *, upper: bool) -> Points:
        return _product(self.parts, upper)


_PRODUCT_CELLS = 1500
_PRODUCT_LOG_TAIL = -90.0


@lru_cache(maxsize=8)
def _product(parts: tuple[tuple[Pair, int], ...], upper: bool) -> Points:
    total: Points | None = None
    for pair, count in parts:
        step = discretise(pair, _PRODUCT_CELLS, upper=upper)
        power: Points | None = None
        while count:  # by squaring
            if count & 1:
                power = step if power is None else _multiply(power, step, upper)
            count >>= 1
            if count:
                step = _multiply(step, step, upper)
        assert power is not None  # noqa: S101 - counts are at least 1
        total = power if total is None else _multiply(total, power, upper)
    assert total is not None  # noqa: S101 - there are at least two parts
    return total


def _multiply(a: Points, b: Points, upper: bool) -> Points:
    losses = np.add.outer(a.losses, b.losses).ravel()
    m0, m1 = np.multiply.outer(a.m0, b.m0).ravel(), np.multiply.outer(a.m1, b.m1).ravel()
    edges = np.linspace(losses.min() - 1e-9, losses.max() + 1e-9, _PRODUCT_CELLS + 1)
    place = np.clip(np.searchsorted(edges, losses, side="left") - 1, 0, _PRODUCT_CELLS - 1)
    n = _PRODUCT_CELLS
    gathered = Masses(_sums(place, m0, n), _sums(place, m1, n), np.full(n, 4 * UNIT * len(a.m0)))
    only0, only1 = (
        -math.expm1(math.log1p(-x) + math.log1p(-y)) for x, y in ((a.only0, b.only0), (a.only1, b.only1))
    )
    return _as_points(edges, gathered, only0, only1, upper)


def discretise(pair: Pair, cells: int, *, upper: bool) -> Points:
    """A discrete pair that dominates `pair` (upper), or is dominated by it, in both directions."""
    if isinstance(pair, DiscretePair) and len(pair.points(upper=upper).losses) <= cells:
        return pair.points(upper=upper)
    low, high = pair.loss_range(_PRODUCT_LOG_TAIL)
    margin = 1e-9 * max(1.0, high - low)
    edges = np.linspace(low - margin, high + margin, cells + 1)
    m = pair.masses(edges, upper=upper)
    if upper:  # what lies outside counts as telling the two apart for certain
        only0 = m.only0 + m.below[0] + m.above[0]
        only1 = m.only1 + m.below[1] + m.above[1]
    else:  # outside: told apart no better than the nearest cell
        m.m0[0] += m.below[0]
        m.m1[0] += m.below[1]
        m.m0[-1] += m.above[0]
        m.m1[-1] += m.above[1]
        only0, only1 = m.only0, m.only1
    return _as_points(edges, m, only0, only1, upper)


def _as_points(edges: FloatArray, m: Masses, only0: float, only1: float, upper: bool) -> Points:
    if not upper:
        known = (m.m0 > _UNDERFLOW) & (m.m1 > _UNDERFLOW)
        # What only one of the two distributions has here is left aside: merged into the others' largest cell.
        m0, m1 = m.m0[known], m.m1[known]
        heaviest = int(np.argmax(m0 + m1))
        m0[heaviest] += m.m0[~known].sum()
        m1[heaviest] += m.m1[~known].sum()
        losses = np.log(m1 / m0)
        order = np.argsort(losses, kind="stable")
        return Points(losses[order], m0[order], m1[order], only0, only1)
    # A cell's masses are x + y and x·e^low + y·e^high, with x at its lower and y at its upper end.
    width = float(edges[1] - edges[0])
    with np.errstate(over="ignore"):
        growth = math.expm1(width)
        lowest = np.exp(-edges[:-1])
    y = np.clip((m.m1 * lowest - m.m0) / growth, 0, m.m0)
    # Float error moves the split by slack; a little more of m1 is said to be at +∞ than could be lost by it.
    m0 = np.zeros(len(edges))
    m0[:-1] += m.m0 - y
    m0[1:] += y
    with np.errstate(over="ignore", invalid="ignore"):
        m1 = m0 * np.exp(edges)
    tiny = ~np.isfinite(m1)
    lost0, lost1 = float(m0[tiny].sum()), max(0.0, float(m.m1.sum() - m1[~tiny].sum()))
    return Points(edges[~tiny], m0[~tiny], m1[~tiny], only0 + lost0, only1 + lost1)
