"""PATE: what an answer of the teachers costs, given how they voted.

A teacher is trained on records of its own, so one changed record changes one teacher, and that one moves
one vote of each query from a class to another. An aggregator adds noise to the votes and answers with the
class that then has most (GNMax with Gaussian noise, LNMax with Laplace noise). Confident-GNMax first
checks whether the largest count, with noise, reaches a threshold.

Whatever the votes are, such an answer has a fixed price; that price is an event and enters budgets. This
module computes the *data-dependent* price: where the teachers agree, the answer would have been the same
without any one of them, and it costs next to nothing.

**Every number here is computed from private votes, without noise.** It is a diagnostic for people who
may see the votes. It never gates, never enters a ledger and is never published; to publish a
data-dependent ε, use `accounting.pate_sanitise`, which pays for that.

What is bounded, for votes D: D_α(A(D) ‖ A(D′)) for every D′ in which one teacher voted differently, where
A is the aggregator. That is the direction and the notion of the PATE papers. It is a statement about D
alone: it is no guarantee for D′, and the opposite divergence is bounded by the price at D′.

Sources: Papernot et al. 2017, "Semi-supervised knowledge transfer for deep learning from private training
data", arXiv:1610.05755; Papernot et al. 2018, "Scalable private learning with PATE", arXiv:1802.08908.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr, logsumexp

from accounting.errors import UserError
from accounting.events import check_array, check_count, check_number
from accounting.pairs import FloatArray
from accounting.rdp import ORDERS, epsilon_from_rdp

BoolArray = npt.NDArray[np.bool_]

# The formulas below are exact to about 1e-12; bounds are raised by a thousand times that.
_RELATIVE_SLACK = 1e-9
_MOST_VOTES = 1e9
_MOST_MOMENTS = 10_000
_CHUNK = 2048


def check_votes(votes: npt.ArrayLike) -> FloatArray:
    """Return vote counts as floats, shape [queries, classes].

    Raises:
        UserError: unless the counts are a table of finite numbers from 0 to 10⁹ with at least two classes
            and, in every row, at least one vote.
    """
    try:
        table = np.asarray(votes)
    except ValueError:  # rows of different lengths
        table = np.empty(0, dtype=object)
    if table.dtype.kind not in "iuf" or table.ndim != 2:
        raise UserError("The votes must be a table of numbers of shape [queries, classes].")
    if table.shape[1] < 2:
        raise UserError(f"The votes must be over at least 2 classes. Got {table.shape[1]}.")
    counts = table.astype(np.float64)
    good = (counts >= 0) & (counts <= _MOST_VOTES)  # false for NaN
    if not good.all():
        row, column = np.argwhere(~good)[0]
        bad = f"{counts[row, column]:g} (query {row}, class {column})"
        raise UserError(f"Every vote count must be a number from 0 to 10^9. Got {bad}.")
    empty = counts.sum(axis=1) == 0
    if empty.any():
        raise UserError(f"Every query must have at least one vote. Query {int(np.argmax(empty))} has none.")
    return counts


def check_orders(orders: npt.ArrayLike) -> FloatArray:
    """Return Rényi orders as floats, shape [k]; raise UserError unless all are finite and above 1."""
    array = check_array(orders, "orders", "PATE's bounds")
    if array.ndim != 1 or not (np.isfinite(array) & (array > 1)).all():
        raise UserError("The Rényi orders must be a list of finite numbers above 1.")
    return array


def check_noise(value: object, name: str, owner: str) -> float:
    """Return `value` as a float if noise of this scale, in votes, can be analysed; else raise UserError."""
    return check_number(value, name, owner, low=1e-6, high=1e9, closed="both")


def check_answered(answered: npt.ArrayLike | None, queries: int) -> BoolArray:
    """Return which queries were answered, shape [queries]; all of them if `answered` is None."""
    if answered is None:
        return np.ones(queries, dtype=np.bool_)
    try:
        mask = np.asarray(answered)
    except (TypeError, ValueError):  # rows of different lengths
        mask = np.empty(0)
    if mask.dtype != np.bool_ or mask.shape != (queries,):
        raise UserError(f"'answered' must hold one true or false for each of the {queries} queries.")
    return mask


def _gaps(counts: FloatArray) -> FloatArray:
    """Votes by which each other class is behind the plurality: [queries, classes − 1]; ties are 0."""
    ordered = np.sort(counts, axis=1)
    return np.asarray(ordered[:, -1:] - ordered[:, :-1])


def gnmax_log_q(votes: npt.ArrayLike, noise_std: float) -> FloatArray:
    """Return an upper bound on log Pr[GNMax does not answer with the plurality], shape [queries].

    Papernot et al. 2018, Proposition 7, a union bound over the other classes. At a tie the plurality is
    any one of the tied classes. Nothing underflows: a gap of a million votes gives its true −10¹¹.

    Args:
        votes: Counts, shape [queries, classes].
        noise_std: Standard deviation σ of the noise on each count, in votes.
    """
    sigma = check_noise(noise_std, "noise_std", "GNMax")
    # Proposition 7: q ≤ ½ Σ erfc(gap / 2σ), and ½ erfc(x) = Φ(−√2·x).
    tails = log_ndtr(-_gaps(check_votes(votes)) / (np.sqrt(2) * sigma))
    return np.asarray(logsumexp(tails, axis=1))


def threshold_log_q(votes: npt.ArrayLike, threshold: float, threshold_std: float) -> FloatArray:
    """Return the log-probability of the less likely outcome of the threshold check, shape [queries].

    Papernot et al. 2018, Algorithm 1: the check passes if max_j n_j + N(0, σ₁²) ≥ T. It is exact.

    Args:
        votes: Counts, shape [queries, classes].
        threshold: T, in votes.
        threshold_std: σ₁, in votes.
    """
    sigma = check_noise(threshold_std, "threshold_std", "Confident-GNMax")
    level = check_number(threshold, "threshold", "Confident-GNMax", low=-1e9, high=1e9, closed="both")
    largest = check_votes(votes).max(axis=1)
    return np.asarray(log_ndtr(-np.abs(largest - level) / sigma))


def data_dependent_rdp(log_q: npt.ArrayLike, scale: float, orders: npt.ArrayLike = ORDERS) -> FloatArray:
    """Return the RDP at given data of a mechanism that has one very likely outcome, shape [n, k].

    Let M be (α, α/s²)-RDP for all α > 1 on all data, and let it give some outcome o on data D with
    Pr[M(D) ≠ o] ≤ q. Then D_α(M(D) ‖ M(D′)) is at most the returned number for every neighbour D′. The
    number is never above α/s², and where the theorem does not apply it is α/s².

    Papernot et al. 2018, Theorem 6, with μ₁, μ₂ of Proposition 10. The theorem asks for three things:
    α ≤ μ₁; μ₂ > 1, so that A is positive; and q small enough that its bound increases in q, so that an
    upper bound may stand for the probability. The last needs B ≥ A beside the paper's condition; where
    that fails, the bound is above log B > ε₁ ≥ α/s², and the minimum discards it.

    Args:
        log_q: log q, shape [n].
        scale: s > 0, which is σ for GNMax (Proposition 8) and √2·σ₁ for the threshold check.
        orders: Orders α, shape [k].
    """
    alpha = check_orders(orders)[None, :]
    logq = check_array(log_q, "log_q", "data_dependent_rdp")
    if logq.ndim != 1 or np.isnan(logq).any():
        raise UserError("Log-probabilities must be a list of numbers.")
    logq = logq[:, None]
    variance = check_number(scale, "scale", "data_dependent_rdp", low=1e-7, high=1e10) ** 2
    independent = np.broadcast_to(alpha / variance, (len(logq), alpha.shape[1]))

    surprise = np.clip(-logq, 0, 1e300)
    mu2 = np.sqrt(variance * surprise)  # Proposition 10
    mu1 = mu2 + 1
    small = np.broadcast_to(mu2 > 1, logq.shape)
    mu2, mu1 = np.where(small, mu2, 2.0), np.where(small, mu1, 3.0)
    logq = np.where(small, -surprise, -4 / variance)  # only a stand-in, where the bound is not used
    eps1, eps2 = mu1 / variance, mu2 / variance  # Proposition 8
    # Theorem 6: q ≤ e^{(μ₂−1)ε₂} / (μ₁/(μ₁−1) · μ₂/(μ₂−1))^{μ₂}
    limit = (mu2 - 1) * eps2 - mu2 * (np.log1p(1 / (mu1 - 1)) + np.log1p(1 / (mu2 - 1)))
    applies = small & (logq <= limit) & (alpha <= mu1)

    log_1_q = _log1mexp(logq)
    # Theorem 6: A = (1 − q) / (1 − (q·e^ε₂)^{(μ₂−1)/μ₂}), B = e^ε₁ / q^{1/(μ₁−1)}
    log_a = log_1_q - _log1mexp((logq + eps2) * (mu2 - 1) / mu2)
    log_b = eps1 - logq / (mu1 - 1)
    # Theorem 6: D_α ≤ 1/(α−1) · log((1−q)·A^{α−1} + q·B^{α−1})
    log_sum = np.logaddexp(log_1_q + (alpha - 1) * log_a, logq + (alpha - 1) * log_b)
    dependent = np.maximum(log_sum, 0) / (alpha - 1) * (1 + _RELATIVE_SLACK) + 1e-300
    return np.where(applies, np.minimum(dependent, independent), independent)


def _log1mexp(x: FloatArray) -> FloatArray:
    """log(1 − e^x) for x < 0, to full relative precision."""
    return np.where(
        x < -0.5, np.log1p(-np.exp(np.minimum(x, -0.5))), np.log(-np.expm1(np.minimum(x, -1e-300)))
    )


def gnmax_rdp(votes: npt.ArrayLike, noise_std: float, orders: npt.ArrayLike = ORDERS) -> FloatArray:
    """Return the data-dependent RDP of each GNMax answer, shape [queries, k].

    D_α(A(D) ‖ A(D′)) at the given votes D, for all votes D′ of which one was moved; at most α/σ²
    (Papernot et al. 2018, Propositions 7, 8 and 10 and Theorem 6). Answers to queries that were fixed in
    advance add up.

    Args:
        votes: Counts, shape [queries, classes]. Private.
        noise_std: Standard deviation σ of the noise on each count, in votes.
        orders: Orders α, shape [k].
    """
    return data_dependent_rdp(gnmax_log_q(votes, noise_std), noise_std, orders)


def threshold_rdp(
    votes: npt.ArrayLike, threshold: float, threshold_std: float, orders: npt.ArrayLike = ORDERS
) -> FloatArray:
    """Return the data-dependent RDP of each threshold check of Confident-GNMax, shape [queries, k].

    As for `gnmax_rdp`; at most α/(2σ₁²), since one moved vote moves the largest count by at most 1. The
    check has two outcomes, of which the more likely one takes the plurality's part in Theorem 6.
    """
    log_q = threshold_log_q(votes, threshold, threshold_std)
    return data_dependent_rdp(log_q, np.sqrt(2) * threshold_std, orders)


def confident_gnmax_rdp(
    votes: npt.ArrayLike,
    noise_std: float,
    threshold: float,
    threshold_std: float,
    orders: npt.ArrayLike = ORDERS,
    *,
    answered: npt.ArrayLike | None = None,
) -> FloatArray:
    """Return the data-dependent RDP of each query to Confident-GNMax, shape [queries, k].

    Every query is charged for its check, and the answered ones for their answer too.

    Args:
        votes: Counts, shape [queries, classes]. Private.
        noise_std: σ of the answer, in votes.
        threshold: T, in votes.
        threshold_std: σ₁ of the check, in votes.
        orders: Orders α, shape [k].
        answered: Which queries passed their check, shape [queries]. Without it all are charged as if
            they had, which bounds the divergence of the whole mechanism. With it the result is what this
            run spent: an odometer's reading, since which queries passed was itself random.
    """
    counts = check_votes(votes)
    passed = check_answered(answered, len(counts))
    checks = threshold_rdp(counts, threshold, threshold_std, orders)
    return checks + np.where(passed[:, None], gnmax_rdp(counts, noise_std, orders), 0)


def lnmax_log_q(votes: npt.ArrayLike, noise_scale: float) -> FloatArray:
    """Return an upper bound on log Pr[LNMax does not answer with the plurality], shape [queries].

    Papernot et al. 2017, Lemma 4.

    Args:
        votes: Counts, shape [queries, classes].
        noise_scale: Scale b = 1/γ of the Laplace noise on each count, in votes.
    """
    scale = check_noise(noise_scale, "noise_scale", "LNMax")
    gap = _gaps(check_votes(votes)) / scale
    return np.asarray(logsumexp(np.log(2 + gap) - np.log(4) - gap, axis=1))  # Lemma 4, γ·gap


def lnmax_rdp(votes: npt.ArrayLike, noise_scale: float, orders: npt.ArrayLike = ORDERS) -> FloatArray:
    """Return the data-dependent RDP of each LNMax answer, shape [queries, k].

    Whatever the votes, an answer is (2/b)-differentially private. The result is the least of that, of
    Theorem 2 and of Theorem 3 of Papernot et al. 2017, whose moment of order λ is λ times the RDP of
    order α = λ + 1. Direction and composition are as for `gnmax_rdp`.

    Args:
        votes: Counts, shape [queries, classes]. Private.
        noise_scale: Scale b = 1/γ of the Laplace noise on each count, in votes.
        orders: Orders α, shape [k].
    """
    alpha = check_orders(orders)[None, :]
    logq = lnmax_log_q(votes, noise_scale)[:, None]
    pure = 2 / float(noise_scale)  # Section 3.2: (2γ, 0)-DP
    independent = np.minimum(pure, pure**2 * alpha / 2)  # Theorem 2: λ-th moment ≤ 2γ²λ(λ+1)
    # Theorem 3 applies if q < (e^{2γ} − 1)/(e^{4γ} − 1) = 1/(e^{2γ} + 1)
    applies = logq < -np.logaddexp(0, pure)
    logq = np.where(applies, logq, -np.logaddexp(0, pure) - 1)
    log_1_q = _log1mexp(logq)
    # Theorem 3: log((1−q)·((1−q)/(1−e^{2γ}q))^λ + q·e^{2γλ})
    first = log_1_q + (alpha - 1) * (log_1_q - _log1mexp(logq + pure))
    moment = np.maximum(np.logaddexp(first, logq + pure * (alpha - 1)), 0)
    dependent = moment / (alpha - 1) * (1 + _RELATIVE_SLACK) + 1e-300
    return np.where(
        applies, np.minimum(dependent, independent), np.broadcast_to(independent, dependent.shape)
    )


def moments_epsilon(votes: npt.ArrayLike, noise_scale: float, delta: float, moments: int = 8) -> float:
    """Return the ε of LNMax that Papernot et al. 2017 would have reported. Not private.

    ε = min over λ = 1 … `moments` of (α(λ) + log 1/δ)/λ (Abadi et al. 2016, Theorem 2). The analysis that
    was published with the paper uses 8 moments, so it never reports less than log(1/δ)/8. The same bounds
    through `diagnose_lnmax` and the present conversion are tighter.
    """
    failure = check_number(delta, "delta", "moments_epsilon", low=0, high=1)
    if check_count(moments, "moments", "moments_epsilon", low=1) > _MOST_MOMENTS:
        raise UserError(f"The 'moments' of moments_epsilon must be at most {_MOST_MOMENTS}. Got {moments}.")
    orders = 1.0 + np.arange(1, moments + 1)
    rdp = lnmax_rdp(votes, noise_scale, orders).sum(axis=0)
    return float(np.min(rdp - np.log(failure) / (orders - 1)))


@dataclass(frozen=True, eq=False, repr=False)
class DataDependentDiagnostic:
    """The data-dependent RDP of all answers together: a look at private votes, not a guarantee to publish.

    It is no event. It has no `to_dict`, so no budget, accountant or ledger takes it, and its text form
    holds no number. `accounting.pate_sanitise` makes an ε of it that may be published.
    """

    not_private: ClassVar[bool] = True

    orders: FloatArray
    """Orders α, shape [k]. Read-only."""

    rdp: FloatArray
    """Sum over the queries of the RDP at each order, shape [k]. Read-only. Private."""

    def __post_init__(self) -> None:
        for name in ("orders", "rdp"):
            array = np.array(getattr(self, name), dtype=np.float64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if check_orders(self.orders).shape != self.rdp.shape:
            raise UserError("A DataDependentDiagnostic needs one RDP for each order.")

    def epsilon(self, delta: float) -> float:
        """Return the ε at `delta` that holds at these votes. Private: it must not be published.

        For every neighbour D′ and every event S: Pr[A(D) ∈ S] ≤ e^ε·Pr[A(D′) ∈ S] + δ. Only for queries
        that did not depend on earlier answers.
        """
        failure = check_number(delta, "delta", "DataDependentDiagnostic.epsilon", low=0, high=1)
        return epsilon_from_rdp(self.rdp, failure, self.orders)

    def __repr__(self) -> str:
        return "<DataDependentDiagnostic: NOT PRIVATE, computed from the teachers' votes; never publish it>"


def diagnose_gnmax(
    votes: npt.ArrayLike, noise_std: float, orders: npt.ArrayLike = ORDERS
) -> DataDependentDiagnostic:
    """Return the data-dependent price of all GNMax answers together; arguments as in `gnmax_rdp`."""
    counts, alpha = check_votes(votes), check_orders(orders)
    return _summed(len(counts), alpha, lambda rows: gnmax_rdp(counts[rows], noise_std, alpha))


def diagnose_confident_gnmax(
    votes: npt.ArrayLike,
    noise_std: float,
    threshold: float,
    threshold_std: float,
    orders: npt.ArrayLike = ORDERS,
    *,
    answered: npt.ArrayLike | None = None,
) -> DataDependentDiagnostic:
    """Return the price of all queries to Confident-GNMax; arguments as in `confident_gnmax_rdp`."""
    counts, alpha = check_votes(votes), check_orders(orders)
    passed = check_answered(answered, len(counts))

    def cost(rows: slice) -> FloatArray:
        return confident_gnmax_rdp(
            counts[rows], noise_std, threshold, threshold_std, alpha, answered=passed[rows]
        )

    return _summed(len(counts), alpha, cost)


def diagnose_lnmax(
    votes: npt.ArrayLike, noise_scale: float, orders: npt.ArrayLike = ORDERS
) -> DataDependentDiagnostic:
    """Return the data-dependent price of all LNMax answers together; arguments as in `lnmax_rdp`."""
    counts, alpha = check_votes(votes), check_orders(orders)
    return _summed(len(counts), alpha, lambda rows: lnmax_rdp(counts[rows], noise_scale, alpha))


def _summed(queries: int, orders: FloatArray, cost: Callable[[slice], FloatArray]) -> DataDependentDiagnostic:
    """The sum of all queries' costs, by blocks of rows: memory does not grow with queries times orders."""
    total = np.zeros(len(orders))
    for start in range(0, queries, _CHUNK):
        total += cost(slice(start, start + _CHUNK)).sum(axis=0)
    return DataDependentDiagnostic(orders, total)
