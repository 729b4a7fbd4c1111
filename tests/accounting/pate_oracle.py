"""Independent answers for PATE: the papers' propositions in mpmath, and exact output distributions.

Nothing here imports the module that it judges. The propositions are typed from Papernot et al. 2017
(arXiv:1610.05755) and 2018 (arXiv:1802.08908); the distributions come from Gauss–Legendre quadrature of
"count i plus its noise is the largest", whose integrand is positive, so that small probabilities keep
their relative precision.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import mpmath as mp
import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr

DIGITS = 40
Array = npt.NDArray[np.float64]
Votes = Sequence[float]


def gnmax_log_q(votes: Votes, sigma: float) -> Any:
    """2018, Proposition 7."""
    top = max(range(len(votes)), key=lambda i: votes[i])
    with mp.workdps(DIGITS):
        others = [mp.mpf(votes[top]) - v for i, v in enumerate(votes) if i != top]
        return mp.log(sum(mp.erfc(gap / (2 * mp.mpf(sigma))) for gap in others) / 2)


def theorem_6(log_q: Any, variance: Any, order: float) -> tuple[Any, bool]:
    """2018, Theorem 6 with Proposition 10 for an (α, α/variance)-RDP mechanism: (RDP, whether it helps)."""
    with mp.workdps(DIGITS):
        lam, variance = mp.mpf(order), mp.mpf(variance)
        independent = lam / variance
        if log_q >= 0:
            return independent, False
        mu2 = mp.sqrt(variance * -log_q)
        mu1 = mu2 + 1
        if mu2 <= 1 or lam > mu1:
            return independent, False
        eps1, eps2 = mu1 / variance, mu2 / variance
        if log_q > (mu2 - 1) * eps2 - mu2 * mp.log(mu1 / (mu1 - 1) * mu2 / (mu2 - 1)):
            return independent, False
        log_1_q = mp.log1p(-mp.exp(log_q))
        log_a = log_1_q - mp.log1p(-mp.exp((log_q + eps2) * (mu2 - 1) / mu2))
        log_b = eps1 - log_q / (mu1 - 1)
        # (1−q)·A^{λ−1} + q·B^{λ−1} − 1, without losing what is tiny
        excess = mp.expm1(log_1_q + (lam - 1) * log_a) + mp.exp(log_q + (lam - 1) * log_b)
        dependent = mp.log1p(excess) / (lam - 1)
        return min(dependent, independent), dependent < independent


def gnmax_rdp(votes: Votes, sigma: float, order: float) -> tuple[Any, bool]:
    with mp.workdps(DIGITS):
        return theorem_6(gnmax_log_q(votes, sigma), mp.mpf(sigma) ** 2, order)


def threshold_rdp(votes: Votes, threshold: float, sigma: float, order: float) -> tuple[Any, bool]:
    """2018, Section A: the check is a mechanism with two outcomes on a number of sensitivity 1."""
    with mp.workdps(DIGITS):
        distance = abs(mp.mpf(max(votes)) - threshold) / sigma
        log_q = mp.log(mp.erfc(distance / mp.sqrt(2)) / 2)
        return theorem_6(log_q, 2 * mp.mpf(sigma) ** 2, order)


def lnmax_rdp(votes: Votes, scale: float, order: float) -> tuple[Any, bool]:
    """2017, Lemma 4 and Theorems 2 and 3, the moment of order λ = α − 1 divided by λ."""
    top = max(range(len(votes)), key=lambda i: votes[i])
    with mp.workdps(DIGITS):
        gamma, lam = 1 / mp.mpf(scale), mp.mpf(order) - 1
        gaps = [gamma * (votes[top] - v) for i, v in enumerate(votes) if i != top]
        q = sum((2 + g) / (4 * mp.exp(g)) for g in gaps)
        independent = min(2 * gamma, 2 * gamma**2 * (lam + 1))
        if not q < (mp.exp(2 * gamma) - 1) / (mp.exp(4 * gamma) - 1):
            return independent, False
        # log((1−q)·((1−q)/(1−e^{2γ}q))^λ + q·e^{2γλ}), from its excess over 1
        first = (lam + 1) * mp.log1p(-q) - lam * mp.log1p(-mp.exp(2 * gamma) * q)
        dependent = mp.log1p(mp.expm1(first) + q * mp.exp(2 * gamma * lam)) / lam
        return min(dependent, independent), dependent < independent


def _log_density(noise: str, x: Array) -> Array:
    return -x * x / 2 - np.log(2 * np.pi) / 2 if noise == "gaussian" else -np.abs(x) - np.log(2)


def _log_cdf(noise: str, x: Array) -> Array:
    if noise == "gaussian":
        return np.asarray(log_ndtr(x))
    return np.where(x < 0, x - np.log(2), np.log1p(-np.exp(-np.abs(x)) / 2))


def outcomes(votes: Votes, scale: float, noise: Literal["gaussian", "laplace"] = "gaussian") -> Array:
    """Exact probabilities of each class under noisy max, shape [classes]."""
    counts = np.asarray(votes, dtype=np.float64) / scale
    reach = 12 if noise == "gaussian" else 60
    ends = np.unique(
        np.concatenate([counts, np.linspace(counts.min() - reach, counts.max() + reach, 4 * reach)])
    )
    nodes, weights = np.polynomial.legendre.leggauss(16)
    half = np.diff(ends)[:, None] / 2
    x, w = (ends[:-1, None] + half * (nodes + 1)).ravel(), (half * weights).ravel()
    log_cdfs = np.array([_log_cdf(noise, x - c) for c in counts])
    everything = log_cdfs.sum(axis=0)
    return np.array(
        [
            np.exp(_log_density(noise, x - c) + everything - own) @ w
            for c, own in zip(counts, log_cdfs, strict=True)
        ]
    )


def renyi(p: Array, q: Array, order: float) -> float:
    """Rényi divergence of two distributions on a few outcomes."""
    return float(np.log(np.sum(np.exp(order * np.log(p) + (1 - order) * np.log(q)))) / (order - 1))


def gaussian_renyi(mean: float, std: float, other_mean: float, other_std: float, order: float) -> Any:
    """D_α(N(mean, std²) ‖ N(other_mean, other_std²)) by quadrature of its definition."""
    with mp.workdps(18):
        p0, q0, a = mp.mpf(std), mp.mpf(other_std), mp.mpf(order)

        def integrand(x: Any) -> Any:
            log_p = -(((x - mean) / p0) ** 2) / 2 - mp.log(p0)
            log_q = -(((x - other_mean) / q0) ** 2) / 2 - mp.log(q0)
            return mp.exp(a * log_p + (1 - a) * log_q) / mp.sqrt(2 * mp.pi)

        precision = a / p0**2 + (1 - a) / q0**2  # of the integrand, which is Gaussian itself
        centre = (a * mean / p0**2 + (1 - a) * other_mean / q0**2) / precision
        width = 1 / mp.sqrt(precision)
        area = mp.quad(integrand, [centre + k * width for k in range(-10, 11, 5)])
        return mp.log(area) / (a - 1)


def histograms(teachers: int, classes: int) -> Iterator[tuple[int, ...]]:
    """All ways in which `teachers` can vote for `classes`."""
    for bars in itertools.combinations(range(teachers + classes - 1), classes - 1):
        ends = (-1, *bars, teachers + classes - 1)
        yield tuple(ends[i + 1] - ends[i] - 1 for i in range(classes))


def neighbours(votes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All votes in which one teacher voted differently."""
    for source, target in itertools.permutations(range(len(votes)), 2):
        if votes[source] > 0:
            moved = list(votes)
            moved[source] -= 1
            moved[target] += 1
            yield tuple(moved)


def moves(votes: Sequence[int], other: Sequence[int]) -> int:
    """How many teachers have to vote differently to get from one histogram to the other."""
    return sum(abs(a - b) for a, b in zip(votes, other, strict=True)) // 2
