"""How well an attack can do: trade-off functions, membership inference, and noise for a given risk.

An attack looks at what was released and decides which of two neighbouring data sets it came from; with the
data sets "without" and "with" a record, that is membership inference. Its false positive rate (FPR) is how
often it says "with" of a release made without the record, its true positive rate (TPR) how often it says so
rightly. The trade-off function f maps an FPR α to the smallest false negative rate 1 − TPR that any attack
can have.

f is the symmetric, convex trade-off function of the composition's dominating pairs: the one that says
exactly what δ(ε) says for all ε ≥ 0 together (Dong, Roth & Su 2022, Proposition 2.12; numbers as in
arXiv:1905.02383),

    f(α) = supremum over ε ≥ 0 of max{0, 1 − δ(ε) − e^ε·α, e^{−ε}·(1 − δ(ε) − α)}.

It holds for either of the two data sets as the null hypothesis, and for attackers who know all other records.
Where the pairs of "remove" and "add" differ, it is the largest convex function below both of their trade-off
functions, so at some α neither of them alone may reach it. All functions here return bounds (lower, upper)
on such a number; the one on the safe side is the guarantee, and the other says how much of it may be the
accountant's looseness. It is no statement about how well an attack on a particular training would do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from accounting.atoms import Atom
from accounting.calibration import LEAST_NOISE, MOST_NOISE, UnreachableBudget
from accounting.errors import UserError
from accounting.events import (
    Event,
    NeighboringRelation,
    atoms,
    check_array,
    check_number,
    check_relation,
    shown,
)
from accounting.pairs import UNIT, FloatArray
from accounting.profile import PrivacyProfile
from accounting.search import approach

DEFAULT_TOLERANCE = 2e-3
_MOST_ROUNDS = 16
_FIRST_POINTS = 24
_LEAST_RATE = 1e-12  # at an FPR of 0 (or 1) the curve is as close as at this one
_AT_ONCE = 1024
_ROUGH = 0.05  # tolerance of the first look
_SHARE = 4  # a bracket of δ becomes one of f of about three times its width between the points
_TINY = 1e-300
_ROUNDING = 4e-15  # of a sum of a few terms of at most 1


def tradeoff_curve(
    event: Event,
    false_positive_rates: npt.ArrayLike,
    *,
    neighboring_relation: NeighboringRelation = "zero-out",
    tolerance: float = DEFAULT_TOLERANCE,
) -> tuple[FloatArray, FloatArray]:
    """Return a lower and an upper bound on the trade-off function f at each of `false_positive_rates`.

    Guarantee: no test of `event`'s release on one neighbouring data set against its release on the other, in
    either order, has a false positive rate of at most α and a false negative rate below `lower`. The
    event's parameters must have been fixed in advance.

    Args:
        event: What is released (the whole plan).
        false_positive_rates: Each α in [0, 1], in any order, shape [k].
        neighboring_relation: Which data sets are neighbours.
        tolerance: The bracket's width to stop at, as a share of 1 − α − f(α), which is TPR − FPR of the best
            attack. Where that cannot be reached the bracket is wider, never wrong.

    Returns:
        (lower, upper), each of shape [k], with 0 ≤ lower ≤ upper ≤ 1 − α.

    Raises:
        UserError: if a rate is not in [0, 1].
        UnsupportedEvent: if the event has no proof under the relation, or only Rényi divergences.
    """
    alphas = _checked_rates(false_positive_rates)
    return _Tradeoff(event, neighboring_relation, tolerance).at(alphas)


def tpr_at_fpr(
    event: Event,
    false_positive_rate: float,
    *,
    neighboring_relation: NeighboringRelation = "zero-out",
    tolerance: float = DEFAULT_TOLERANCE,
) -> tuple[float, float]:
    """Return bounds on the largest true positive rate of an attack with this false positive rate: 1 − f(α).

    The upper one is the guarantee. Arguments and errors as for `tradeoff_curve`.
    """
    alpha = check_number(
        false_positive_rate, "false_positive_rate", "tpr_at_fpr", low=0, high=1, closed="both"
    )
    lower, upper = tradeoff_curve(
        event, [alpha], neighboring_relation=neighboring_relation, tolerance=tolerance
    )
    return 1 - float(upper[0]), 1 - float(lower[0])


def attack_advantage(
    event: Event,
    *,
    neighboring_relation: NeighboringRelation = "zero-out",
    tolerance: float = DEFAULT_TOLERANCE,
) -> tuple[float, float]:
    """Return bounds on the largest TPR − FPR of any attack: the total variation distance, which is δ(0).

    The upper one is the guarantee. Arguments and errors as for `tradeoff_curve`.
    """
    tolerance = _checked_tolerance(tolerance, "attack_advantage")
    counts = _counts(event, neighboring_relation)
    lower, upper = PrivacyProfile(counts, tolerance=tolerance).bounds([0.0])
    return float(lower[0]), float(upper[0])


def attack_accuracy(advantage: float) -> float:
    """How often an attack of this advantage guesses right if a record took part with probability 1/2."""
    return (1 + check_number(advantage, "advantage", "attack_accuracy", low=0, high=1, closed="both")) / 2


# ---------------------------------------------------------------- noise for a risk


def calibrate_noise_for_risk(
    make_event: Callable[[float], Event],
    *,
    fpr: float | None = None,
    tpr: float | None = None,
    max_advantage: float | None = None,
    neighboring_relation: NeighboringRelation = "zero-out",
    tolerance: float = 1e-3,
) -> float:
    """Return a noise multiplier with which no attack does better than asked, and hardly more than that takes.

    Ask either for a TPR of at most `tpr` at an FPR of `fpr`, or for a TPR − FPR of at most `max_advantage` at
    any FPR.

    Args:
        make_event: From a noise multiplier to the event (the whole plan); the risk must fall as it grows.
        fpr: In (0, 1).
        tpr: In (fpr, 1).
        max_advantage: In (0, 1).
        neighboring_relation: Which data sets are neighbours.
        tolerance: The guaranteed TPR − FPR ends in [(1 − tolerance)·target, target], the target being
            `tpr` − `fpr` or `max_advantage`. So it ends within a share `tolerance` of `tpr` too.

    Returns:
        A noise multiplier σ: `tpr_at_fpr`, or `attack_advantage`, of make_event(σ) at the same relation
        with the tolerance `tolerance / 4` has an upper bound of at most the target. 0.01 where that is
        enough.

    Raises:
        UserError: if it is not one of the two questions, or a number is out of range.
        UnreachableBudget: if even a noise multiplier of 1e7 does not meet the target.
    """
    tolerance = _checked_tolerance(tolerance, "calibrate_noise_for_risk")
    relation = check_relation(neighboring_relation)
    if not callable(make_event):
        raise UserError(f"'make_event' must be a function that makes an event. Got {shown(make_event)}.")
    alpha, target = _checked_target(fpr, tpr, max_advantage)

    def excess(noise: float, precision: float = _ROUGH) -> float:
        """The guaranteed TPR − FPR."""
        event = make_event(noise)
        if alpha is None:
            return attack_advantage(event, neighboring_relation=relation, tolerance=precision)[1]
        _, most = tpr_at_fpr(event, alpha, neighboring_relation=relation, tolerance=precision)
        return most - alpha

    # First roughly, since precise answers take long.
    good, bad = 1.0, 0.0
    while excess(good) > target:
        good, bad = 4 * good, good
        if good > MOST_NOISE:
            raise UnreachableBudget(
                f"No noise multiplier up to {MOST_NOISE:g} keeps TPR − FPR at or below {target:g}; "
                "allow more, or plan fewer steps or a smaller batch."
            )
    while not bad:
        if good == LEAST_NOISE:
            return good
        less = max(good / 4, LEAST_NOISE)
        good, bad = (good, less) if excess(less) > target else (less, 0.0)
    return _sharpen(
        lambda noise: excess(noise, tolerance / 4),
        approach(excess, bad, good, target, tolerance=_ROUGH),
        target,
        tolerance,
    )


def _sharpen(risk: Callable[[float], float], near: float, target: float, tolerance: float) -> float:
    """The least noise with risk ≤ target, to `tolerance`, given that it is not far from `near`."""
    good, found, factor = near, risk(near), 1.01
    while found > target:  # a finer lattice's bound is hardly ever the larger one
        good, factor = good * factor, factor**2
        found = risk(good)
    bad, factor = good, 1.02
    while (worse := risk(bad / factor)) <= target:
        good = bad = bad / factor
        found, factor = worse, factor**2
        if good < LEAST_NOISE:
            return good
    return approach(risk, bad / factor, good, target, tolerance=tolerance, good_value=found)


def _checked_target(
    fpr: float | None, tpr: float | None, max_advantage: float | None
) -> tuple[float | None, float]:
    """The FPR in question (None for the advantage), and the target for TPR − FPR."""
    owner = "calibrate_noise_for_risk"
    if (fpr is None) != (tpr is None) or (fpr is None) == (max_advantage is None):
        raise UserError(f"{owner} takes either fpr and tpr, or max_advantage.")
    if max_advantage is not None:
        return None, check_number(max_advantage, "max_advantage", owner, low=0, high=1)
    alpha = check_number(fpr, "fpr", owner, low=0, high=1)
    most = check_number(tpr, "tpr", owner, low=0, high=1)
    # 1 − fpr is what rounds: the subtraction of the two must not end above.
    target = (most - alpha) * (1 - 4 * UNIT)
    if target <= 1e-9 * most:
        raise UserError(
            f"The 'tpr' of {owner} must be above the 'fpr', which guessing alone reaches. "
            f"Got tpr={most:g}, fpr={alpha:g}."
        )
    return alpha, target


# ---------------------------------------------------------------- the curve


def _checked_rates(rates: npt.ArrayLike) -> FloatArray:
    alphas = check_array(rates, "false_positive_rates", "tradeoff_curve")
    if alphas.ndim != 1 or not ((alphas >= 0) & (alphas <= 1)).all():
        raise UserError(
            f"The 'false_positive_rates' must be a list of numbers in [0, 1]. Got {shown(rates)}."
        )
    return alphas


def _checked_tolerance(tolerance: float, owner: str) -> float:
    return check_number(tolerance, "tolerance", owner, low=0, high=1)


def _counts(event: Event, relation: NeighboringRelation) -> dict[Atom, int]:
    if not isinstance(event, Event):
        raise UserError(f"A trade-off is that of an event such as Gaussian(1.1). Got {shown(event)}.")
    return atoms(event, relation)


class _Tradeoff:
    """The trade-off function of one event, bounded by supporting lines that are chosen as they are needed."""

    def __init__(self, event: Event, relation: NeighboringRelation, tolerance: float) -> None:
        self.tolerance = _checked_tolerance(tolerance, "tradeoff_curve")
        counts = _counts(event, relation)
        self.profile = PrivacyProfile(counts, tolerance=_ROUGH)

    def at(self, alphas: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Bounds on f at each of `alphas`, shape [k]."""
        if self.profile.trivial:
            # Nothing was released: guess. Everything was: be certain.
            both = 1 - alphas if not self.profile.counts else np.zeros_like(alphas)
            return both, both.copy()
        if self.profile.gaussian is not None:
            return _gaussian_tradeoff(1 / self.profile.gaussian, alphas)
        return self._sandwich(alphas)

    def _sandwich(self, alphas: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Bounds from δ at some ε. At each turn ε are added, and looked at closely, where they tell most."""
        inside = (alphas > 0) & (alphas < 1)
        epsilons = self._first_epsilons(alphas)
        sharp = np.array([-1.0])
        for turn in range(_MOST_ROUNDS):
            self.profile.tolerance = max(_ROUGH, self.tolerance / _SHARE)
            below, above = self.profile.bounds(epsilons)
            lower = from_below(epsilons, above, alphas)
            upper, decisive = from_above(epsilons, below, above, alphas)
            upper = np.clip(upper, lower, 1 - alphas)
            wanted = self.tolerance * (1 - alphas - lower) + 8 * _ROUNDING
            wide = inside & (upper - lower > wanted)
            more = _apart(sharp, decisive[wide])
            if not len(more) or turn == _MOST_ROUNDS - 1:
                break
            self.profile.tolerance = self.tolerance / _SHARE
            self.profile.bounds(more)
            sharp, epsilons = np.union1d(sharp, more), np.union1d(epsilons, more)
        return lower, upper

    def _first_epsilons(self, alphas: FloatArray) -> FloatArray:
        """From 0 to where δ does not matter any more beside the smallest rate."""
        rates = np.minimum(alphas, 1 - alphas)
        least = float(np.min(rates, where=rates > 0, initial=1.0)) if (rates > 0).all() else _LEAST_RATE
        # TPR − FPR is concave in FPR, so at this rate it is at least `least` times its largest value.
        [advantage], _ = self.profile.bounds([0.0])
        self.profile.enough = max(0.1 * self.tolerance * least * float(advantage), 1e-290)
        furthest = self.profile.furthest_epsilon(self.profile.enough)
        spread = np.linspace(0, furthest, _FIRST_POINTS)
        near_zero = np.geomspace(1e-4, 1, _FIRST_POINTS // 2, endpoint=False) * furthest
        # Bounded losses have nothing beyond.
        last = [self.profile.pure] if self.profile.pure < 690 else []
        return np.unique(np.concatenate([spread, near_zero, last]))


def _apart(known: FloatArray, wished: FloatArray) -> FloatArray:
    """Those of `wished` that are not as good as known (`known` begins below 0)."""
    wished = np.unique(wished[(wished >= 0) & (wished < 690)])
    place = np.searchsorted(known, wished)
    before, after = known[place - 1], known[np.minimum(place, len(known) - 1)]
    nearest = np.minimum(np.abs(wished - before), np.abs(wished - after))
    return np.asarray(wished[nearest > 1e-9 * (1e-6 + wished)])


def from_below(epsilons: FloatArray, above: FloatArray, alphas: FloatArray) -> FloatArray:
    """A lower bound on f at each of `alphas`, from upper bounds on δ at some ε ≥ 0.

    Dong, Roth & Su 2022, Proposition 2.11: who is (ε_i, δ_i)-DP for some i is f-DP with the largest of
    max{0, 1 − δ_i − e^{ε_i}·α, e^{−ε_i}·(1 − δ_i − α)} over these i.

    Args:
        epsilons: ε ≥ 0, shape [n].
        above: Upper bounds on δ there, shape [n].
        alphas: Shape [k].
    """
    return np.maximum(_highest(np.exp(epsilons), above, alphas)[0] - _ROUNDING, 0)


def from_above(
    epsilons: FloatArray, below: FloatArray, above: FloatArray, alphas: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """An upper bound on f at each of `alphas`, from both bounds on δ at some ε ≥ 0.

    f(α) is the supremum of 1 − g(y) − y·α over all y > 0, where g(y) is δ as a function of y = e^ε: the
    larger of the two directions' divergences, so convex, falling, and g(1/y) = 1 − 1/y + g(y)/y. Hence y < 1
    gives (1 − g(y) − α)/y of a y > 1, and only lower bounds on g(y) for all y ≥ 1 are needed. Let y_0 = 1 <
    y_1 < … be the points, b_i ≤ g(y_i) ≤ a_i.

    1. g is convex, so it never falls more steeply after y_i than on the way to it from any y_j before. On
       [y_i, y_{i+1}], g(y) ≥ l(y) = b_i + s·(y − y_i) with s the largest (b_i − a_j)/(y_i − y_j). At y_0 it
       falls by at most (1 − g(1))/2 per y: the identity above says that the slopes on its two sides add up
       to g(1) − 1, and the right one is not the smaller. And (1 − b_0)/2 may be used instead, since g(1) −
       (1 − g(1))/2·(y − 1) grows with g(1).
    2. Likewise from the other side, g(y) ≥ r(y) = b_{i+1} + t·(y − y_{i+1}), with t the smallest
       (a_j − b_{i+1})/(y_j − y_{i+1}) over the points after it, or 0. Behind the last point, g(y) ≥ 0.
    3. So on the interval 1 − g(y) − y·α ≤ min(L, R), where L and R are 1 − l(y) − y·α and 1 − r(y) − y·α,
       both linear. For any c in it, the minimum is at most L on [y_i, c] and at most R on [c, y_{i+1}],
       hence at most the largest of L(y_i), L(c), R(c), R(y_{i+1}). The same is true of y·α and α changing
       places. The best c is where l and r meet; that floats find it only nearly does no harm.

    Args:
        epsilons: ε_0 = 0 < ε_1 < …, shape [n].
        below: Lower bounds on δ there, shape [n].
        above: Upper bounds on δ there, shape [n].
        alphas: Shape [k].

    Returns:
        (upper bounds, the ε that each of them comes from), shape [k] both.
    """
    y = np.exp(epsilons)
    after, before = _slopes(epsilons, below, above)
    gap = np.append(y[:-1] * np.expm1(np.diff(epsilons)), np.inf)
    ends, leaning = np.append(below[1:], 0.0), np.append(before[1:], 0.0)
    # Where l and r meet, counted from y_i.
    with np.errstate(divide="ignore", invalid="ignore"):
        meet = (below - ends + leaning * np.where(np.isfinite(gap), gap, 0)) / (leaning - after)
    meet = np.where(np.isfinite(meet), np.clip(meet, 0, np.where(np.isfinite(gap), gap, 1e300)), 0.0)
    rest = np.where(np.isfinite(gap), gap - meet, 0.0)
    least = np.minimum(below + after * meet, ends - leaning * rest)
    least = np.maximum(least - _ROUNDING * below, 0)
    points = np.concatenate([y, y + meet])
    value, place = _highest(points, np.concatenate([below, least]), alphas)
    return value + _ROUNDING, np.log(points[place])


def _slopes(epsilons: FloatArray, below: FloatArray, above: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Lower bounds on g's slope after each point, upper bounds on it before each point, shape [n] both."""
    # y_i − y_j without cancellation, [i, j].
    smaller, apart = np.minimum.outer(epsilons, epsilons), np.subtract.outer(epsilons, epsilons)
    rise = np.sign(apart) * np.exp(smaller) * np.expm1(np.abs(apart))
    earlier = np.tri(len(epsilons), k=-1, dtype=bool)
    np.fill_diagonal(rise, 1.0)
    chord = np.subtract.outer(below, above) / rise
    after = np.where(earlier, chord, -np.inf).max(axis=1)
    after[0] = -(1 - below[0]) / 2
    before = np.where(earlier.T, chord, np.inf).min(axis=1)
    return np.clip(after * (1 + _ROUNDING), -1, 0), np.minimum(before, 0) * (1 - _ROUNDING)


def _highest(y: FloatArray, delta: FloatArray, alphas: FloatArray) -> tuple[FloatArray, npt.NDArray[np.intp]]:
    """The largest of 1 − δ − y·α and (1 − δ − α)/y at each α, and the index of its pair (y, δ)."""
    best, place = np.zeros_like(alphas), np.zeros(len(alphas), dtype=np.intp)
    for start in range(0, len(alphas), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        alpha = alphas[part, None]
        with np.errstate(over="ignore"):
            lines = np.maximum(1 - delta - y * alpha, (1 - delta - alpha) / y)
        place[part] = lines.argmax(axis=1)
        best[part] = lines.max(axis=1)
    return best, place


def _gaussian_tradeoff(mu: float, alphas: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Φ(Φ⁻¹(1 − α) − μ), widened by its rounding (Dong et al. 2022, Section 2.2)."""
    lower, upper = 1 - alphas, 1 - alphas  # right where α is 0 or 1
    inside = (alphas > 0) & (alphas < 1)
    z = -ndtri(alphas[inside])
    exact = ndtr(z - mu)
    # (log Φ)′(x) is at most |x| + 1; ndtri and ndtr are good to a few units.
    rounding = 16 * UNIT * (4 + (1 + np.abs(z - mu)) * (np.abs(z) + mu))
    lower[inside] = np.maximum(exact * (1 - np.minimum(rounding, 1)) - _TINY, 0)
    upper[inside] = np.minimum(exact * (1 + rounding) + _TINY, 1 - alphas[inside])
    return np.minimum(lower, upper), upper
