"""Rényi divergences in mpmath, for what has no pair: an upper bound on ε alone.

Written with K(α) = (α − 1)·D_α = log E_Q[(P/Q)^α], which is convex in α and 0 at α = 1. So between two whole
orders, its chord is an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

import mpmath as mp

from dpml.verify.parts import CannotVerify, Part

Cumulant = Callable[[mp.mpf], mp.mpf]
_LARGEST = 2**20
_LARGEST_SAMPLED = 4096  # a sum of as many terms


def renyi_epsilon(parts: Mapping[Part, int], delta: float) -> mp.mpf:
    """The least ε that some order proves at `delta`.

    Raises:
        CannotVerify: for a part whose divergence is not known here.
    """
    with mp.workdps(40):
        cumulants = [(cumulant(part), k) for part, k in parts.items()]

        def epsilon(log_order: mp.mpf) -> mp.mpf:
            alpha = 1 + mp.exp(log_order)
            total = mp.fsum(k * of(alpha) for of, k in cumulants)
            # Canonne, Kamath & Steinke 2020, Proposition 12.
            return (total - mp.log(delta * alpha)) / (alpha - 1) + mp.log1p(-1 / alpha)

        return max(mp.mpf(0), _least(epsilon, mp.log("0.01"), mp.log(_LARGEST - 1)))


def _least(of: Callable[[mp.mpf], mp.mpf], low: mp.mpf, high: mp.mpf) -> mp.mpf:
    """The least of a function's values on a grid, and on finer ones around the best of it."""
    best = mp.inf
    for _ in range(6):
        step = (high - low) / 12
        grid = [low + i * step for i in range(13)]
        values = [of(x) for x in grid]
        at = min(range(13), key=values.__getitem__)
        best = min(best, values[at])
        low, high = grid[max(0, at - 1)], grid[min(12, at + 1)]
    return best


def cumulant(part: Part) -> Cumulant:
    """K of one part, in both directions."""
    match part.kind:
        case "gaussian" if part.q < 1:
            return _between_whole(partial(_sampled_gaussian, part.numbers[0], mp.mpf(part.q)))
        case "gaussian":
            return lambda alpha: alpha * (alpha - 1) / (2 * part.numbers[0] ** 2)
        case "laplace" if part.q == 1:
            return partial(_laplace, part.numbers[0])
        case "pure" if part.q == 1 and part.numbers[1] == 0:
            return partial(_pure, part.numbers[0])
        case "zcdp":
            return lambda alpha: part.numbers[0] * alpha * (alpha - 1)
        case "smooth":
            return partial(_smooth, *part.numbers)
        case "best-of":
            return _best_of(part)
        case "worst-of" | "all":
            members = [(cumulant(base), k) for base, k in part.of]
            combined = max if part.kind == "worst-of" else mp.fsum
            return lambda alpha: combined([k * of(alpha) for of, k in members])
    raise CannotVerify(f"no Rényi divergence of {'sampled ' * (part.q < 1)}{part.kind} is known here")


def _between_whole(of: Callable[[int], mp.mpf]) -> Cumulant:
    known = cache(of)

    def chord(alpha: mp.mpf) -> mp.mpf:
        below = int(mp.floor(alpha))
        if below >= _LARGEST_SAMPLED:
            return mp.inf
        share = alpha - below
        left = known(below) if below > 1 else mp.mpf(0)
        return (1 - share) * left + share * known(below + 1) if share else left

    return chord


def _sampled_gaussian(sigma: mp.mpf, q: mp.mpf, alpha: int) -> mp.mpf:
    """Mironov, Talwar & Zhang 2019, section 3.3: E of ((1−q) + q·P/Q)^α; the other direction is smaller."""
    total, binomial = mp.mpf(0), mp.mpf(1)
    for j in range(alpha + 1):
        total += binomial * (1 - q) ** (alpha - j) * q**j * mp.exp(j * (j - 1) / (2 * sigma**2))
        binomial = binomial * (alpha - j) / (j + 1)
    return mp.log(total)


def _laplace(scale: mp.mpf, alpha: mp.mpf) -> mp.mpf:
    """Mironov 2017, Proposition 6."""
    share = alpha / (2 * alpha - 1)
    return mp.log(share * mp.exp((alpha - 1) / scale) + (1 - share) * mp.exp(-alpha / scale))


def _pure(epsilon: mp.mpf, alpha: mp.mpf) -> mp.mpf:
    """Randomised response, the worst ε-DP mechanism."""
    return mp.log((mp.exp(alpha * epsilon) + mp.exp((1 - alpha) * epsilon)) / (1 + mp.exp(epsilon)))


def _smooth(beta: mp.mpf, sigma: mp.mpf, shift: mp.mpf, alpha: mp.mpf) -> mp.mpf:
    """N(f, (σS)²) plus zσS, |f − f′| ≤ min(S, S′), S ≤ e^β·S′; worst at S′ = e^{−β}·S.

    The divergence of N(m, s²) from N(m′, s′²) (Gil, Alajaji & Linder 2013), whose means are at most
    (e^{−β} + zσ(1 − e^{−β}))·S apart; αs′² + (1 − α)s² has to be positive.
    """
    ratio = mp.exp(-beta)  # s′/s
    mixed = alpha * ratio**2 + 1 - alpha
    if mixed <= 0:
        return mp.inf
    apart = (ratio + shift * sigma * (1 - ratio)) / sigma
    means = alpha * apart**2 / (2 * mixed)
    spreads = mp.log(ratio) + mp.log(ratio**2 / mixed) / (2 * (alpha - 1))
    return (alpha - 1) * (means + max(spreads, 0))


def _best_of(part: Part) -> Cumulant:
    """Papernot & Steinke 2022, Theorem 2: the best of a truncated negative binomial number of runs."""
    mean, eta = part.numbers
    runs = [(cumulant(base), k) for base, k in part.of]

    def divergence(alpha: mp.mpf) -> mp.mpf:
        return mp.fsum(k * of(alpha) for of, k in runs) / (alpha - 1)

    inverse = _log_inverse_gamma(mean, eta)

    def price(log_order: mp.mpf) -> mp.mpf:
        other = 1 + mp.exp(log_order)
        return (1 - 1 / other) * divergence(other) + inverse / other

    least = min(inverse, _least(price, mp.log("0.1"), mp.log(_LARGEST - 1)))
    return lambda alpha: (alpha - 1) * (divergence(alpha) + (1 + eta) * least) + mp.log(mean)


def _log_inverse_gamma(mean: mp.mpf, eta: mp.mpf) -> mp.mpf:
    """Log 1/γ of the distribution with this mean: (1/γ − 1)·η/(1 − γ^η), or (1/γ − 1)/log(1/γ) for η = 0."""

    def excess(x: mp.mpf) -> mp.mpf:
        factor = 1 / x if eta == 0 else eta / (1 - mp.exp(-eta * x))
        return (mp.exp(x) - 1) * factor - mean

    low, high = mp.mpf("1e-20"), mp.mpf(1)
    while excess(high) < 0:
        high *= 2
        if high > 1e4:
            raise CannotVerify("the number of runs to choose from has no such mean")
    for _ in range(120):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return high
