"""Publishing what PATE's answers cost on the votes that there were, at a price.

A data-dependent price is a function f of private votes, and to publish it is one more release. f changes
much where teachers disagree and hardly at all where they agree, so its noise is scaled to the *smooth
sensitivity* (Nissim, Raskhodnikova & Smith 2007; for PATE: Papernot et al. 2018, Section B):

    S(D) = max_d e^{−βd}·L⁽ᵈ⁾(D),

which is β-smooth, S(D) ≤ e^β·S(D′), and at least |f(D) − f(D′)|, if L⁽⁰⁾(D) ≥ |f(D) − f(D′)| and
L⁽ᵈ⁾(D) ≤ L⁽ᵈ⁺¹⁾(D′) for all neighbours D, D′. One teacher votes on all queries, so prices, and L⁽ᵈ⁾, are
sums over queries.

**The state of a query.** With m classes and q = (m−1)/2·erfc(t), one moved vote changes t by at most 1/σ:
each gap between the sorted counts changes by at most 2, and x ↦ erfc(erfc⁻¹(x) ∓ 1/σ) is concave
(convex), so Jensen carries this over to the mean of erfc (Papernot et al. 2018, Section B, from q to q).
Hence a query is a cell of a grid of t, and a moved vote moves it by at most `reach` cells. Prices are
tabulated by cell, from the cell's *lower* end: its q is no smaller than the query's, so the table bounds
the divergence without any argument about monotonicity, and its differences within `reach` cells bound
L⁽⁰⁾ exactly, within `reach`·(d+1) cells L⁽ᵈ⁾. The paper's conditions C5 and C6 are not needed. A
threshold check's state is its largest count, with reach 1.

**The release** is Y = f(D) + σ·S(D)·(Z + z), Z ~ N(0, 1), with a public z: the standard normal's
(1 − η)-quantile. Then Y ≥ f(D) but with probability η. S(D) is private too, and to add z·σ·S(D) to a
published value would reveal it; so the shift is a part of the mechanism that `gnss_rdp` analyses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from scipy.ndimage import maximum_filter1d, minimum_filter1d
from scipy.special import log_ndtr, ndtri, ndtri_exp

from accounting.errors import UserError
from accounting.events import check_instance, check_number, shown
from accounting.pairs import FloatArray
from accounting.pate import (
    check_answered,
    check_noise,
    check_orders,
    check_votes,
    data_dependent_rdp,
    gnmax_log_q,
)
from accounting.rdp import epsilon_from_rdp

IntArray = npt.NDArray[np.int64]

_CELLS_PER_VOTE = 16  # a table's sensitivities are (16 + 1)/16 of the continuous function's
_MOST_TEACHERS = 200_000
# Noise is never smaller than this share of the public ceiling, so that rounding of f, at 1e-13, hides in it.
_LEAST_SENSITIVITY = 1e-9


class NormalSource(Protocol):
    """A generator of random numbers, such as `numpy.random.Generator` or `random.SystemRandom`."""

    def normal(self, loc: float, scale: float) -> float:
        """Return one draw from N(loc, scale²)."""
        ...


@dataclass(frozen=True)
class NoisyMax:
    """The public parameters of GNMax or, with a threshold, Confident-GNMax; all in votes.

    Raises:
        UserError: for a scale outside [1e-6, 1e9], or if only one of the threshold's two is given.
    """

    noise_std: float
    """σ of the noise on each count of an answer."""

    threshold: float | None = None
    """T: a query is answered if its largest count, with noise, reaches T. Without it all are."""

    threshold_std: float | None = None
    """σ₁ of that noise."""

    def __post_init__(self) -> None:
        check_noise(self.noise_std, "noise_std", "NoisyMax")
        if (self.threshold is None) != (self.threshold_std is None):
            raise UserError("NoisyMax needs both a threshold and a threshold_std, or neither.")
        if self.threshold is not None:
            check_number(self.threshold, "threshold", "NoisyMax", low=-1e9, high=1e9, closed="both")
            check_noise(self.threshold_std, "threshold_std", "NoisyMax")


class _Table(NamedTuple):
    """A price for each state of a query, and how many states one moved vote can cross."""

    prices: FloatArray
    reach: int

    def widened(self) -> _Table:
        """The largest price within reach: what a neighbour might have to pay."""
        return _Table(maximum_filter1d(self.prices, 2 * self.reach + 1, mode="nearest"), self.reach)

    def local_sensitivity(self) -> FloatArray:
        """How much the price can change within reach, for each state."""
        width = 2 * self.reach + 1
        above = maximum_filter1d(self.prices, width, mode="nearest") - self.prices
        return np.maximum(above, self.prices - minimum_filter1d(self.prices, width, mode="nearest"))

    def sensitivity_by_distance(self, states: IntArray, distances: int) -> FloatArray:
        """Σ over queries of L⁽ᵈ⁾, for d = 0 … distances − 1: the local sensitivity within d moved votes."""
        local, total = self.local_sensitivity(), np.zeros(distances)
        for state, count in zip(*np.unique(states, return_counts=True), strict=True):
            up = np.maximum.accumulate(local[state:])[:: self.reach]
            down = np.maximum.accumulate(local[state::-1])[:: self.reach]
            # Past the table's end, the end's own value may lie between two strides: take the largest of all.
            total += count * np.maximum(
                _padded(up, local[state:].max(), distances),
                _padded(down, local[: state + 1].max(), distances),
            )
        return total


def _padded(values: FloatArray, last: float, length: int) -> FloatArray:
    missing = max(0, length - len(values))
    return np.concatenate([values[:length], np.full(missing, last)])


class _Priced(NamedTuple):
    """One part of the cost: its table, and the state of each query that pays it."""

    table: _Table
    states: IntArray


def _answers(counts: FloatArray, noise_std: float, order: float, teachers: int) -> _Priced:
    """GNMax answers: the grid is t = j/(16σ), from 0 (all classes tied) to M/(2σ) (all teachers agree)."""
    classes = counts.shape[1]
    per_t = _CELLS_PER_VOTE * noise_std
    grid = np.arange(teachers * _CELLS_PER_VOTE // 2 + 1) / per_t
    log_q = math.log(classes - 1) + log_ndtr(-math.sqrt(2) * grid)  # q = (m−1)/2·erfc(t)
    prices = data_dependent_rdp(log_q, noise_std, [order])[:, 0]
    # A larger q is a valid bound too, so the least price up to a cell is one for it.
    table = _Table(np.minimum.accumulate(prices), _CELLS_PER_VOTE + 1)
    t = -ndtri_exp(gnmax_log_q(counts, noise_std) - math.log(classes - 1)) / math.sqrt(2)
    # Down by a millionth of a cell, lest rounding puts a query above its t; the reach has a cell to spare.
    cells = np.floor(t * per_t - 1e-6).astype(np.int64)
    return _Priced(table, np.clip(cells, 0, len(grid) - 1))


def _checks(counts: FloatArray, mechanism: NoisyMax, order: float, teachers: int) -> _Priced:
    """Threshold checks: the state is the largest count, from 0 to M."""
    assert mechanism.threshold is not None  # noqa: S101
    assert mechanism.threshold_std is not None  # noqa: S101
    gap = np.abs(np.arange(teachers + 1) - mechanism.threshold) / mechanism.threshold_std
    prices = data_dependent_rdp(log_ndtr(-gap), math.sqrt(2) * mechanism.threshold_std, [order])[:, 0]
    return _Priced(_Table(prices, 1), counts.max(axis=1).astype(np.int64))


@dataclass(frozen=True, repr=False)
class PrivateCost:
    """f(D) and S(D) of one set of votes. Not private: computed from the votes without noise."""

    not_private: ClassVar[bool] = True

    bound: float
    """f(D): bounds D_λ between the answers at D and at every neighbour. Private."""

    smooth_sensitivity: float
    """S(D): a β-smooth upper bound on how much one teacher can change `bound`. Private."""

    ceiling: float
    """The largest `bound` that any votes have: the data-independent price. Public."""

    def __repr__(self) -> str:
        return "<PrivateCost: NOT PRIVATE, computed from the teachers' votes; never publish it>"


def private_cost(
    votes: npt.ArrayLike,
    mechanism: NoisyMax,
    *,
    order: float,
    beta: float,
    answered: npt.ArrayLike | None = None,
    both_directions: bool = True,
) -> PrivateCost:
    """Return the data-dependent RDP of all answers at one order, and its β-smooth sensitivity. Private.

    Args:
        votes: Whole counts, shape [queries, classes]; every row sums to the number of teachers M, which
            is public.
        mechanism: The aggregator.
        order: λ, chosen without looking at the votes.
        beta: β > 0, likewise.
        answered: Which queries passed their check, shape [queries], as published with the answers; without
            it all are charged for an answer. See `sanitised_epsilon` for what each choice bounds.
        both_directions: Bound D_λ(A(D) ‖ A(D′)) and D_λ(A(D′) ‖ A(D)), the latter by the largest price
            among all neighbours D′. Otherwise the former alone, as in the papers.

    Raises:
        UserError: for votes that are not whole, rows of different sums, or more than 200,000 teachers.
    """
    check_instance(mechanism, NoisyMax, "mechanism", "private_cost")
    counts = check_votes(votes)
    teachers = _teachers(counts)
    order = _check_order(order)
    check_number(beta, "beta", "private_cost", low=0, high=100)
    if answered is not None and mechanism.threshold is None:
        raise UserError(
            "'answered' is for a NoisyMax with a threshold; without one, all queries are answered."
        )
    passed = check_answered(answered, len(counts))
    parts = [_answers(counts[passed], mechanism.noise_std, order, teachers)]
    ceiling = int(passed.sum()) * order / mechanism.noise_std**2
    if mechanism.threshold_std is not None:
        parts.append(_checks(counts, mechanism, order, teachers))
        ceiling += len(counts) * order / (2 * mechanism.threshold_std**2)
    if both_directions:
        parts = [_Priced(part.table.widened(), part.states) for part in parts]

    bound = math.fsum(float(part.table.prices[part.states].sum()) for part in parts)
    distances = np.arange(teachers + 1)  # M moved votes reach every data set
    by_distance = sum(
        (part.table.sensitivity_by_distance(part.states, len(distances)) for part in parts),
        start=np.zeros(len(distances)),
    )
    smooth = float(np.max(np.exp(-beta * distances) * by_distance))
    # The larger of a β-smooth function and a constant is β-smooth. Sums are rounded, so a little is added.
    return PrivateCost(bound, max(smooth * (1 + 1e-9), _LEAST_SENSITIVITY * ceiling), ceiling)


def _check_order(order: float) -> float:
    return check_number(order, "order", "a sanitised release", low=1, high=1e6)


def _teachers(counts: FloatArray) -> int:
    if len(counts) == 0:
        raise UserError("A sanitised release needs the votes of at least one query.")
    sums = counts.sum(axis=1)
    if (counts != np.rint(counts)).any() or (sums != sums[0]).any():
        raise UserError(
            "The vote counts must be whole, and every query's must sum to the number of teachers."
        )
    if sums[0] > _MOST_TEACHERS:
        raise UserError(f"At most {_MOST_TEACHERS} teachers are supported. Got {sums[0]:.0f}.")
    return int(sums[0])


def gnss_rdp(
    orders: npt.ArrayLike, beta: float, noise_multiplier: float, *, shift: float = 0.0
) -> FloatArray:
    """Return the RDP of Y = f(D) + σ·S(D)·(Z + z) at each order, shape [k]; infinite where it has none.

    **Guarantee.** Let |f(D) − f(D′)| ≤ min(S(D), S(D′)) and S(D) ≤ e^β·S(D′) for all neighbours. Then Y is
    (α, ρ)-RDP, in both directions, for

        ρ(α) = α·(1 + zσ(e^β − 1))² / (2σ²κ) − β − log κ / (2(α − 1)),   κ = 1 − (α − 1)(e^{2β} − 1) > 0,

    and no smaller number would do. The formula of the papers' code, there called Theorem 23 of Papernot et
    al. 2018, is αe^{2β}/σ² + (βα − ½·log(1 − 2βα))/(α − 1) for z = 0 and α < 1/(2β). It is larger than ρ
    while α ≤ 1/(4β), but falls below the exact divergence of two such Gaussians as α nears 1/(2β), as the
    tests show by quadrature; so it is not used here.

    **Proof.** Y is N(f + zσS, (σS)²). Let r = S(D′)/S(D), between e^{−β} and e^β. The divergence of D from
    D′ (Gil, Alajaji & Linder 2013) is V(r) + α·Δ²/(2σ²(1 + α(r² − 1))), V(r) = α/(α−1)·log r
    − log(1 + α(r² − 1))/(2(α−1)), where the means differ by Δ·S(D), Δ ≤ min(1, r) + zσ|1 − r|.
    V′ has the sign of r − 1, so V is largest at an end. With u = 2β, V(e^{−β}) ≥ V(e^β) is
    log(1 + α(e^u − 1)) − log(1 − α(1 − e^{−u})) ≥ 2αu; both sides are 0 at u = 0, and the left's derivative
    is α(1/(1 + (α−1)(1 − e^{−u})) + 1/(1 − (α−1)(e^u − 1))) ≥ 2α by the means' inequality.
    For r ≤ 1, c = zσ: (c + (1−c)r)²/(1 + α(r² − 1)) decreases in r. (Its numerator does if c ≥ 1; else its
    logarithmic derivative is 2(1−c)/(c + (1−c)r) − 2αr/(1 + α(r² − 1)) ≤ 2/r − 2/r.) At r = e^{−β} it is
    (1 + c(e^β − 1))²/κ. For r ≥ 1 it is at most (1 + c(e^β − 1))², and κ ≤ 1. So r = e^{−β} is the worst
    case of both terms. There 1 + α(r² − 1) = e^{−2β}κ, which gives ρ.

    Args:
        orders: Orders α, shape [k].
        beta: β of the smooth sensitivity.
        noise_multiplier: σ, the noise's standard deviation over the smooth sensitivity.
        shift: z ≥ 0, in standard deviations.
    """
    alpha = check_orders(orders)
    beta = check_number(beta, "beta", "gnss_rdp", low=0, high=100)
    sigma = check_number(noise_multiplier, "noise_multiplier", "gnss_rdp", low=1e-6, high=1e9)
    z = check_number(shift, "shift", "gnss_rdp", low=0, high=100, closed="left")
    lost = (alpha - 1) * math.expm1(2 * beta)
    valid = lost < 1
    lost = np.where(valid, lost, 0.5)
    kappa = 1 - lost
    means = alpha * (1 / sigma + z * math.expm1(beta)) ** 2 / (2 * kappa)
    variances = -beta - np.log1p(-lost) / (2 * (alpha - 1))
    return np.where(valid, means + np.maximum(variances, 0), np.inf)


def gnss_noise_multiplier(cost: float, *, order: float, beta: float, shift: float = 0.0) -> float:
    """Return the least σ at which `gnss_rdp` at `order` is `cost`.

    Raises:
        UserError: if no noise makes it as small as that; a smaller `beta` would.
    """
    order = _check_order(order)
    target = check_number(cost, "cost", "gnss_noise_multiplier", low=0, high=1e6)
    beta = check_number(beta, "beta", "gnss_noise_multiplier", low=0, high=100)
    shift = check_number(shift, "shift", "gnss_noise_multiplier", low=0, high=100, closed="left")
    lost = (order - 1) * math.expm1(2 * beta)
    left = -1.0 if lost >= 1 else target + beta + math.log1p(-lost) / (2 * (order - 1))
    inverse = math.sqrt(2 * max(left, 0) * (1 - lost) / order) - shift * math.expm1(beta) if left > 0 else 0.0
    if inverse <= 0:
        raise UserError(
            f"No noise releases this at a cost of {cost:g} with beta {beta:g}. Use a smaller beta."
        )
    return 1 / inverse


@dataclass(frozen=True)
class SanitisedRelease:
    """A data-dependent ε that may be published. Nothing in it but `rdp` and `epsilon` depends on votes."""

    epsilon: float
    """ε of answers and this release together; see `sanitised_epsilon`."""

    delta: float
    """The total δ, which includes `failure_probability`."""

    order: float
    """The one Rényi order λ that was released."""

    rdp: float
    """Released upper bound on the answers' RDP at that order."""

    release_rdp: float
    """RDP of this release itself, at that order; a part of `epsilon`."""

    ceiling: float
    """Data-independent RDP of the answers at that order. `rdp` is never above it."""

    failure_probability: float
    """η: how likely `rdp` is below the truth."""

    beta: float
    """Of the smooth sensitivity."""

    noise_multiplier: float
    """The noise's standard deviation over the smooth sensitivity."""

    shift: float
    """z, the standard normal's quantile at 1 − η."""

    both_directions: bool
    """Whether divergences in both directions are bounded, or as in the papers only the one from D."""

    all_charged: bool
    """Whether refused queries are charged for an answer too. Else `epsilon` is an odometer's reading."""

    def cost(self, orders: npt.ArrayLike) -> FloatArray:
        """Return the RDP of this release alone at `orders`; `accounting.SmoothRelease` is it as an event."""
        return gnss_rdp(orders, self.beta, self.noise_multiplier, shift=self.shift)


def sanitised_epsilon(
    votes: npt.ArrayLike,
    mechanism: NoisyMax,
    *,
    order: float,
    delta: float,
    noise_multiplier: float,
    rng: NormalSource | Callable[[], float],
    beta: float | None = None,
    failure_probability: float | None = None,
    answered: npt.ArrayLike | None = None,
    both_directions: bool = True,
) -> SanitisedRelease:
    """Release, once, a data-dependent ε for the answers to `votes`, with noise, from above.

    **Guarantee.** Let D be the votes, D′ any votes in which one teacher voted differently on any number of
    queries, A all answers and Y this release. The queries were fixed in advance, and so were all arguments
    but `votes`, `rng` and `answered`. Let η be `failure_probability`, and ε what is released.

    1. *At these votes.* But with probability η over the noise, Pr_D[(A, Y) ∈ S] ≤ e^ε·Pr_D′[(A, Y) ∈ S] +
       δ − η for all events S and all D′; with `both_directions`, also with D and D′ exchanged.
    2. *As a mechanism.* For all neighbours D, D′, numbers e and events S,
       Pr_D[(A, Y) ∈ S, ε ≤ e] ≤ e^e·Pr_D′[(A, Y) ∈ S, ε ≤ e] + δ.

    Proof: f(D) bounds D_λ of A, and ρ(λ) of `gnss_rdp` that of Y, so (ε*, δ − η) holds for the number
    ε* = f(D) + ρ(λ) + conversion (Canonne, Kamath & Steinke 2020, Proposition 12). ε < ε* has Z < −z and
    so probability η at most, hence 1. For 2: if e ≥ ε*, (ε*, δ − η) implies it; else the event has
    probability η ≤ δ at D.

    Args:
        votes: Whole counts, shape [queries, classes], rows summing to the number of teachers. Private.
        mechanism: The aggregator that answered.
        order: λ.
        delta: The total δ in (0, 1).
        noise_multiplier: σ of the release; see `gnss_noise_multiplier`.
        rng: What draws the noise: has `normal(loc, scale)`, or is a function that returns a standard
            normal number. For a release, it must be one that nobody can predict.
        beta: β of the smooth sensitivity; 0.2/λ by default.
        failure_probability: η in (0, δ); δ/2 by default.
        answered: Which queries passed their check, shape [queries]. Without it every query is charged for
            check and answer, and the guarantee above holds. With it refused queries are charged for their
            check alone; which ones passed was random and is held fixed here, so the result is an
            odometer's reading and no guarantee.
        both_directions: See `private_cost`.

    Raises:
        UserError: for wrong arguments; among them a `beta` too large for `order`.
    """
    total = check_number(delta, "delta", "sanitised_epsilon", low=0, high=1)
    order = _check_order(order)
    eta = total / 2 if failure_probability is None else failure_probability
    eta = check_number(eta, "failure_probability", "sanitised_epsilon", low=0, high=total)
    smoothness = 0.2 / order if beta is None else beta
    shift = max(0.0, -float(ndtri(eta)))
    release_rdp = float(gnss_rdp([order], smoothness, noise_multiplier, shift=shift)[0])
    if math.isinf(release_rdp):
        limit = math.log1p(1 / (order - 1)) / 2
        raise UserError(
            f"The 'beta' of a release at order {order:g} must be below {limit:.4g}. Got {smoothness:g}."
        )
    private = private_cost(
        votes, mechanism, order=order, beta=smoothness, answered=answered, both_directions=both_directions
    )
    std = noise_multiplier * private.smooth_sensitivity
    noisy = private.bound + std * (_standard_normal(rng) + shift)
    rdp = min(max(noisy, 0.0), private.ceiling)  # post-processing: the truth lies in between
    orders = np.array([order])
    return SanitisedRelease(
        epsilon=epsilon_from_rdp(np.array([rdp + release_rdp]), total - eta, orders),
        delta=total,
        order=order,
        rdp=rdp,
        release_rdp=release_rdp,
        ceiling=private.ceiling,
        failure_probability=eta,
        beta=smoothness,
        noise_multiplier=float(noise_multiplier),
        shift=shift,
        both_directions=both_directions,
        all_charged=answered is None,
    )


def _standard_normal(rng: NormalSource | Callable[[], float]) -> float:
    if not callable(rng) and not hasattr(rng, "normal"):
        raise UserError(f"The 'rng' of sanitised_epsilon must draw normal numbers. Got {shown(rng)}.")
    draw = float(rng() if callable(rng) else rng.normal(0.0, 1.0))
    if not math.isfinite(draw):
        raise UserError("The 'rng' of sanitised_epsilon must return a finite standard normal number.")
    return draw
