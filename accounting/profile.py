"""The privacy profile: certified bounds on δ(ε) of one composition, at many ε.

δ(ε) is the hockey-stick divergence of order e^ε, the larger of both directions ("remove" and "add"). One
tilted sum (`accounting.tilted`) bounds it at every ε, and closely within a few standard deviations of its
mean. So a handful of them covers a curve, and each ε takes the best of all bounds.

How close is close enough is measured by the test that δ(ε) belongs to, which decides by whether the loss
exceeds ε: its true positive rate is P(L > ε), its false positive rate Q(L > ε), and δ(ε) = P(L > ε) −
e^ε·Q(L > ε).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from accounting.atoms import Atom
from accounting.errors import UnsupportedEvent, UserError
from accounting.events import check_array, check_number, shown
from accounting.lattice import Direction, Lattice
from accounting.pairs import UNIT, FloatArray
from accounting.pld import WIDEST, Question, _only_gaussian, delta_bounds, pure_epsilon
from accounting.rdp import renyi_delta
from accounting.tilted import (
    Part,
    Repetition,
    TiltedSum,
    best_tilt,
    compose,
    factor,
    infinite_mass,
    log_renyi_delta,
    tilt_at,
)

DEFAULT_TOLERANCE = 1e-3
_MOST_REFINEMENTS = 5
_MOST_WORK = 2**23  # points of all sums together, after which nothing is refined any more
_LEAST_DELTA = 1e-300
_REACH = 2.5  # deviations from its mean up to which a tilted sum is expected to be precise
_DEEPER = 8.0  # by how much less than δ, in log, the tails are cut off for
_ROUNDING = 1e-9
_FAR = 6.0  # deviations beyond which it is not even asked


def delta_profile(
    counts: Mapping[Atom, int], epsilons: npt.ArrayLike, *, tolerance: float = DEFAULT_TOLERANCE
) -> tuple[FloatArray, FloatArray]:
    """Return a lower and an upper bound on δ at each of `epsilons`, for a composition's dominating pairs.

    Args:
        counts: Elementary mechanisms and how often each runs, from `accounting.events.atoms`.
        epsilons: Finite numbers of either sign in any order, shape [k]. Those below 0 are answered by
            δ(−ε) = 1 − e^{−ε} + e^{−ε}·δ(ε), which holds for the larger of both directions.
        tolerance: The bracket's width to stop at, as a share of TPR − FPR of the test that decides by
            whether the loss exceeds |ε|. At ε = 0 that is δ itself, at large ε it is P(loss > ε). Where the
            limits of memory and time are reached first (2^23 points) the bracket is wider, never wrong.

    Returns:
        (lower, upper), each of shape [k], with 0 ≤ lower ≤ upper ≤ 1.

    Raises:
        UserError: if an ε or the tolerance is out of range.
        UnsupportedEvent: for a mechanism of which only Rényi divergences are known.
    """
    return PrivacyProfile(counts, tolerance=tolerance).bounds(epsilons)


class PrivacyProfile:
    """`delta_profile` in instalments: what was composed for one question is kept for the next.

    Args:
        counts: Elementary mechanisms and how often each runs, from `accounting.events.atoms`.
        tolerance: As for `delta_profile`.

    Attributes:
        tolerance: May be changed between two questions.
        enough: A width of the bracket that will do at every ε, whatever the tolerance says.
        trivial: Whether nothing is released, or everything.
        gaussian: The noise of the one unsampled Gaussian mechanism that all amounts to, if it does.
        pure: The ε from which on δ is 0, or ∞.
    """

    def __init__(self, counts: Mapping[Atom, int], *, tolerance: float = DEFAULT_TOLERANCE) -> None:
        for atom in counts:
            if not atom.has_pair and atom != Atom.NON_PRIVATE:
                raise UnsupportedEvent(
                    f"{shown(atom.mechanism)} has only Rényi divergences, from which no privacy "
                    'profile follows; use PrivacyAccountant(method="rdp") for ε at one δ.'
                )
        self.counts = dict(counts)
        self.tolerance = check_number(tolerance, "tolerance", "PrivacyProfile", low=0, high=1)
        self.trivial = not counts or Atom.NON_PRIVATE in counts
        self.gaussian = None if self.trivial else _only_gaussian(counts)
        self.enough = 0.0
        self._exact = self.trivial or self.gaussian is not None
        self.pure = math.inf if self._exact else pure_epsilon(counts)
        self._sums: list[_Bracket] = []
        self._coarse: list[Part] = []
        self._furthest, self._least = -1.0, 1.0
        self._work = 0
        self._settled: list[tuple[float, float, float]] = []

    def bounds(self, epsilons: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """`delta_profile` of this composition."""
        wanted = _checked(epsilons)
        distinct, place = np.unique(np.abs(wanted), return_inverse=True)
        lower, upper = (bound[place] for bound in self._at(distinct))
        # (p − q/γ)₊ = p − q/γ + (q − γ·p)₊/γ, integrated.
        below, shrink = wanted < 0, np.exp(-np.abs(wanted))
        lower = np.where(below, (1 - shrink + shrink * lower) * (1 - 4 * UNIT) - 4 * UNIT, lower)
        upper = np.where(below, (1 - shrink + shrink * upper) * (1 + 4 * UNIT) + 4 * UNIT, upper)
        return np.clip(lower, 0, 1), np.clip(upper, 0, 1)

    def furthest_epsilon(self, delta: float) -> float:
        """An ε beyond which the finite losses contribute less than about `delta` (a guess, no bound)."""
        if self._exact:
            return 0.0
        self._look_as_far_as(delta)
        return min(best_tilt(self._coarse, delta)[1], self.pure, 690.0)

    # ------------------------------------------------------------ inside

    def _at(self, epsilons: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Bounds at distinct, ascending ε ≥ 0."""
        if self._exact:
            both = np.array([delta_bounds(self.counts, float(epsilon)) for epsilon in epsilons])
            return both.reshape(-1, 2)[:, 0], both.reshape(-1, 2)[:, 1]
        lower, upper = np.zeros_like(epsilons), np.zeros_like(epsilons)
        inside = epsilons < self.pure
        if inside.any():
            book = _Book(epsilons[inside], self.tolerance, self.enough)
            self._fill(book)
            lower[inside], upper[inside] = book.lower, np.maximum(book.lower, book.upper)
        # δ falls: every bound holds on one side of where it was found.
        return np.maximum.accumulate(lower[::-1])[::-1], np.minimum.accumulate(upper)

    def _fill(self, book: _Book) -> None:
        """Narrow the bracket at every ε of `book`."""
        for bracket in self._sums:
            book.enter(bracket)
        done = book.narrow
        for start, end, tolerance in self._settled:
            if self.tolerance >= tolerance:
                done |= (start <= book.epsilons) & (book.epsilons <= end)
        if not done.all():
            furthest = float(book.epsilons[~done][-1])
            if furthest > self._furthest:
                self._look_as_far_as(renyi_delta(self.counts, furthest), furthest)
                self._furthest = furthest
        while self._coarse and not done.all():
            if self._work > _MOST_WORK:  # no more than one look at what no sum has said anything about
                done |= book.upper < 1
                if done.all():
                    break
            first = int(np.argmin(done))
            end = self._answer_around(book, first, float(book.epsilons[~done][-1]))
            # What is not narrow now is as narrow as it gets, up to the last ε that was looked at.
            end = max(end, float(book.epsilons[first]))
            last = float(book.epsilons[book.epsilons <= end][-1])
            self._settled.append((float(book.epsilons[first]), last, self.tolerance))
            done |= book.narrow | (book.epsilons <= last)
        for i in np.nonzero(~book.narrow & (book.gap > 0.5 * book.upper))[0]:
            book.upper_of["remove"][i] = book.upper_of["add"][i] = min(
                book.upper[i], renyi_delta(self.counts, float(book.epsilons[i]))
            )

    def _look_as_far_as(self, delta: float, epsilon: float | None = None) -> None:
        """Make the coarse lattice that tilts are chosen by; it reaches to where δ is `delta`.

        Rényi bounds can be far above δ, so given an `epsilon` the lattice itself then says what δ is there.
        """
        for _ in range(8 if epsilon is not None else 1):
            self._least = max(delta * math.exp(-_DEEPER), _LEAST_DELTA)
            question = Question(self.counts, self._least, 0.0)
            if question.finest > WIDEST:
                self._coarse = []
                return
            self._coarse = question.coarse_parts()
            if epsilon is None:
                return
            tilt = tilt_at(self._coarse, epsilon)
            found = math.exp(min(log_renyi_delta(self._coarse, tilt, epsilon), 0.0))
            found += infinite_mass(self._coarse)
            if found > 0.1 * delta or delta <= _LEAST_DELTA:
                return
            delta = found

    def _answer_around(self, book: _Book, first: int, last: float) -> float:
        """Answer the ε at index `first`, and others near above it.

        Returns:
            The ε up to which no other tilt would tell more.
        """
        epsilon = float(book.epsilons[first])
        tilt = tilt_at(self._coarse, epsilon)
        sum_there = Repetition.of(self._coarse, tilt)
        ahead = tilt_at(self._coarse, min(epsilon + 0.6 * _REACH * math.sqrt(sum_there.variance), last))
        there = Repetition.of(self._coarse, ahead)
        if there.mean - epsilon > (_REACH + 1) * math.sqrt(there.variance):
            there = sum_there  # the first ε would be too far away
        self._answer_with(book, there, epsilon)
        return there.mean + 0.4 * _REACH * math.sqrt(there.variance)

    def _answer_with(self, book: _Book, coarse: Repetition, epsilon: float) -> None:
        """Compose with this tilt, finer and finer until `epsilon` and those near above it are answered."""
        tilt = coarse.tilt
        end = max(epsilon, coarse.mean + _REACH * math.sqrt(coarse.variance))
        near = (book.epsilons >= epsilon) & (book.epsilons <= end)
        # As deep as the coarse lattice: else its moments would not be those of the finer ones.
        question = Question(self.counts, self._least, epsilon)
        # About steps·h²/4 is added to the variance, or taken from it, and so a share (1 + tilt)² of that to
        # δ.
        share = self.tolerance * (1 + tilt * -math.expm1(-end)) / (1 + tilt) ** 2
        widest = max(high - low for low, high in question.ranges) / 64
        h = question.aligned(max(question.finest, min(math.sqrt(2 * share / question.steps), widest, WIDEST)))
        gap, shrink, order = np.full(int(near.sum()), np.inf), 1.0, 2.5
        for _ in range(_MOST_REFINEMENTS):
            bracket = _Bracket.of(question, h, tilt, (epsilon, end))
            self._sums.append(bracket)
            self._work += bracket.points
            book.enter(bracket)
            before, gap = gap, book.gap[near]
            excess = gap / book.wanted[near]
            unfinished = (excess > 1) & (gap < 0.9 * before)
            if not unfinished.any() or h <= question.finest or self._work > _MOST_WORK:
                return
            worst = int(np.argmax(np.where(unfinished, excess, 0)))
            if math.isfinite(before[worst]):  # the gap shrinks with a power of h between 1 and 4
                order = min(max(math.log(gap[worst] / before[worst]) / math.log(shrink), 1.0), 4.0)
            shrink = min(0.7, max(1 / 16, 0.9 * float(excess[worst]) ** (-1 / order)))
            finer = question.aligned(max(question.finest, h * shrink))
            h, shrink = finer, min(finer / h, 0.9)


def _checked(epsilons: npt.ArrayLike) -> FloatArray:
    wanted = check_array(epsilons, "epsilons", "PrivacyProfile")
    if wanted.ndim != 1 or not np.isfinite(wanted).all():
        raise UserError(f"The 'epsilons' must be a list of finite numbers. Got {shown(epsilons)}.")
    return wanted


# ---------------------------------------------------------------- many ε from one tilted sum


@dataclass(frozen=True)
class _Bracket:
    """Tilted sums of one tilt, per direction from above and from below, and the ε they were made for."""

    above: dict[Direction, TiltedSum]
    below: dict[Direction, TiltedSum]
    made_for: tuple[float, float]

    @classmethod
    def of(cls, question: Question, h: float, tilt: float, made_for: tuple[float, float]) -> _Bracket:
        above: dict[Direction, TiltedSum] = {}
        below: dict[Direction, TiltedSum] = {}
        for direction in question.directions:
            ups, downs = question.lattices(h, direction)
            if question.steps == 1:
                above[direction], below[direction] = _as_it_is(ups[0][0]), _as_it_is(downs[0][0])
            else:
                above[direction], below[direction] = compose(ups, tilt), compose(downs, tilt)
        return cls(above, below, made_for)

    @property
    def points(self) -> int:
        """How much work the sums were."""
        return sum(len(t.losses) for t in [*self.above.values(), *self.below.values()])

    def tells_about(self, epsilons: FloatArray) -> npt.NDArray[np.bool_]:
        """At which ε these sums may be precise."""
        useful = (epsilons >= self.made_for[0]) & (epsilons <= self.made_for[1])
        for t in self.above.values():
            useful |= np.abs(epsilons - t.mean) <= _FAR * t.deviation
        return useful


@dataclass
class _Book:
    """What is known so far about δ at some ε.

    Attributes:
        epsilons: Ascending, distinct, at least 0, shape [k].
        tolerance: The share of TPR − FPR that the bracket should be as narrow as.
        enough: A width that will do in any case.
        lower_of, upper_of: The best bounds on each direction's divergence, shape [k].
        advantage: About TPR − FPR of the test with this threshold, shape [k].
    """

    epsilons: FloatArray
    tolerance: float
    enough: float
    lower_of: dict[Direction, FloatArray] = field(init=False)
    upper_of: dict[Direction, FloatArray] = field(init=False)
    advantage: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.epsilons)
        self.lower_of = {"remove": np.zeros(n), "add": np.zeros(n)}
        self.upper_of = {"remove": np.ones(n), "add": np.ones(n)}
        self.advantage = np.zeros(n)

    @property
    def lower(self) -> FloatArray:
        return np.maximum(self.lower_of["remove"], self.lower_of["add"])

    @property
    def upper(self) -> FloatArray:
        return np.maximum(self.upper_of["remove"], self.upper_of["add"])

    @property
    def gap(self) -> FloatArray:
        return self.upper - self.lower

    @property
    def wanted(self) -> FloatArray:
        return np.maximum(self.tolerance * self.advantage, self.enough) + _LEAST_DELTA

    @property
    def narrow(self) -> npt.NDArray[np.bool_]:
        """Where the bracket is narrow enough."""
        return self.gap <= self.wanted

    def enter(self, bracket: _Bracket) -> None:
        """Take the bounds that `bracket` gives."""
        asked = bracket.tells_about(self.epsilons)
        if not asked.any():
            return
        for direction, t in bracket.above.items():
            upper, advantage = _answers(t, self.epsilons[asked], upper=True)
            lower, _ = _answers(bracket.below[direction], self.epsilons[asked], upper=False)
            better = lower > self.lower[asked]
            self.advantage[asked] = np.where(better, advantage, self.advantage[asked])
            self.upper_of[direction][asked] = np.minimum(upper, self.upper_of[direction][asked])
            self.lower_of[direction][asked] = np.maximum(lower, self.lower_of[direction][asked])
            if len(bracket.above) == 1:  # the pair is its own mirror image
                self.upper_of["add"], self.lower_of["add"] = self.upper_of["remove"], self.lower_of["remove"]


def _as_it_is(lattice: Lattice) -> TiltedSum:
    """A single run's losses: nothing is convolved, so nothing is tilted, and every ε is answered."""
    return TiltedSum(
        tilt=0.0,
        cumulant=0.0,
        mean=0.0,
        deviation=math.inf,
        losses=lattice.losses,
        mass=lattice.mass,
        error=0.0,
        relative=64 * UNIT,
        infinite=lattice.infinite,
    )


def _answers(t: TiltedSum, epsilons: FloatArray, *, upper: bool) -> tuple[FloatArray, FloatArray]:
    """`TiltedSum.delta` at ascending `epsilons`, and about TPR − FPR of the tests with these thresholds."""
    above, excess = _sums_above(t, epsilons)
    error = t.error * factor(t.tilt)
    # Every term is positive, so rounding grows with the number of additions at most.
    rounding = t.relative + UNIT * (len(t.losses) + 16 * len(epsilons))
    scale = t.cumulant - t.tilt * epsilons
    with np.errstate(divide="ignore", under="ignore"):
        total = np.log(np.maximum(excess + (error if upper else -error), 0))
        value = np.exp(np.minimum(scale + total + (rounding if upper else -rounding), 0))
        apart = above * -np.expm1(-epsilons) + excess * np.exp(-epsilons)
        advantage = np.exp(np.minimum(scale + np.log(np.maximum(apart, 0)), 0))
    infinite = t.infinite if upper else t.infinite * (1 - _ROUNDING)
    return np.minimum(value + infinite, 1), np.minimum(advantage + t.infinite, 1)


def _sums_above(t: TiltedSum, epsilons: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Σ mass·e^{−θ(s−ε)} over the losses s above each ε, and Σ mass·e^{−θ(s−ε)}·(1 − e^{−(s−ε)}).

    From the largest ε down, each from the one before: with d between the two,
    1 − e^{−(s−ε)} = (1 − e^{−d}) + e^{−d}·(1 − e^{−(s−ε−d)}).
    """
    ends = np.append(np.searchsorted(t.losses, epsilons, side="right"), len(t.losses))
    above, excess = np.zeros(len(epsilons)), np.zeros(len(epsilons))
    a = e = 0.0
    following = float(epsilons[-1])
    with np.errstate(under="ignore"):
        for i in range(len(epsilons) - 1, -1, -1):
            here = float(epsilons[i])
            d, following = following - here, here
            over = t.losses[ends[i] : ends[i + 1]] - here
            weight = t.mass[ends[i] : ends[i + 1]] * np.exp(-t.tilt * over)
            fade = math.exp(-t.tilt * d)
            e = float(weight @ -np.expm1(-over)) + fade * (a * -math.expm1(-d) + e * math.exp(-d))
            a = float(weight.sum()) + fade * a
            above[i], excess[i] = a, e
    return above, excess
