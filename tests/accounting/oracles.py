"""Exact or independent answers that the accountants are tested against.

Nothing here imports the accountants' own formulas. Closed forms are evaluated by mpmath with 40 digits;
compositions come from dp-accounting 0.6.0 (Google), whose connect-the-dots PLD is an upper bound
("pessimistic") and whose privacy-buckets PLD is a lower one ("optimistic").
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
from dp_accounting.pld import privacy_loss_distribution as google

DIGITS = 40

# Balle & Wang 2018, Theorem 8, and the same region {x : loss > ε} for a mixture (1−q)·f(x) + q·f(x−1):
# δ(ε) = P(region) − e^ε·Q(region), with the region's end solved for.


def _region_end(q: Any, epsilon: Any) -> Any:
    """The base loss log f(x−1)/f(x) at which the mixture's loss over f is ε; −∞ if it is always above."""
    ratio = (mp.e**epsilon - 1 + q) / q
    return mp.log(ratio) if ratio > 0 else -mp.inf


def gaussian_delta(sigma: float, q: float, epsilon: float) -> Any:
    """δ(ε) of one Poisson-sampled Gaussian, the larger of both directions."""
    with mp.workdps(DIGITS):
        s, q, e = mp.mpf(sigma), mp.mpf(q), mp.mpf(epsilon)
        x = s * s * _region_end(q, e) + mp.mpf(1) / 2
        remove = (1 - q) * mp.ncdf(-x / s) + q * mp.ncdf((1 - x) / s) - mp.e**e * mp.ncdf(-x / s)
        x = s * s * _region_end(q, -e) + mp.mpf(1) / 2  # the losses of adding lie below −ε
        add = mp.ncdf(x / s) - mp.e**e * ((1 - q) * mp.ncdf(x / s) + q * mp.ncdf((x - 1) / s))
        return max(remove, add, mp.mpf(0))


def laplace_delta(scale: float, q: float, epsilon: float) -> Any:
    """δ(ε) of one Poisson-sampled Laplace, the larger of both directions."""
    with mp.workdps(DIGITS):
        q, e, rate = mp.mpf(q), mp.mpf(epsilon), 1 / mp.mpf(scale)
        remove = add = mp.mpf(0)
        end = _region_end(q, e)
        if end < rate:
            x = max((end / rate + 1) / 2, mp.mpf(0))
            base, shifted = mp.e ** (-rate * x) / 2, 1 - mp.e ** (-rate * (1 - x)) / 2
            remove = (1 - q) * base + q * shifted - mp.e**e * base
        end = _region_end(q, -e)
        if end > -rate:
            x = min((end / rate + 1) / 2, mp.mpf(1))
            base, shifted = 1 - mp.e ** (-rate * x) / 2, mp.e ** (-rate * (1 - x)) / 2
            add = base - mp.e**e * ((1 - q) * base + q * shifted)
        return max(remove, add, mp.mpf(0))


def epsilon_at(delta_of: Callable[[Any], Any], delta: float, high: float) -> float:
    """The ε at which a falling δ(ε) passes `delta`, by bisection in mpmath."""
    low, top = mp.mpf(0), mp.mpf(high)
    for _ in range(70):
        middle = (low + top) / 2
        low, top = (middle, top) if delta_of(middle) > delta else (low, middle)
    return float(top)


def two_laplaces_delta(rate: float, epsilon: float) -> Any:
    """δ(ε) of two unsampled Laplace mechanisms of loss ±rate: one integrated out against the other.

    The loss is +rate with mass 1/2, −rate with mass e^{−rate}/2, and rate·(2x − 1) with the density
    rate·e^{−rate·(1−x)}/2 for x in [0, 1].
    """
    with mp.workdps(30):
        r = mp.mpf(rate)

        def one(e: Any) -> Any:  # the hockey-stick divergence of one mechanism, at any real ε
            if e >= r:
                return mp.mpf(0)
            return 1 - mp.e**e if e <= -r else 1 - mp.e ** ((e - r) / 2)

        inside = mp.quad(
            lambda x: r * mp.e ** (-r * (1 - x)) / 2 * one(epsilon - r * (2 * x - 1)),
            sorted({mp.mpf(0), mp.mpf(1), min(max(mp.mpf(epsilon) / (2 * r), mp.mpf(0)), mp.mpf(1))}),
        )
        return one(epsilon - r) / 2 + mp.e**-r * one(epsilon + r) / 2 + inside


# ---------------------------------------------------------------- Rényi moments


def _excess(v: Any, order: Any) -> Any:
    return (1 + v) ** order - 1 - order * v


def gaussian_moment(sigma: float, q: float, order: float) -> Any:
    """E_Q[(P/Q)^α] − 1 of the sampled Gaussian, P the mixture.

    Whole orders: the binomial sum of Mironov, Talwar & Zhang 2019, Section 3.3. Fractional orders: the
    trapezoidal rule at 60 digits, whose step is a quarter of the accountant's or less.
    """
    with mp.workdps(60):
        s, p, a = mp.mpf(sigma), mp.mpf(q), mp.mpf(order)
        if order == int(order):
            terms = range(int(order) + 1)
            choose = (mp.binomial(a, k) * (1 - p) ** (a - k) * p**k for k in terms)
            return mp.fsum(
                c * mp.expm1(k * (k - 1) / (2 * s * s)) for k, c in zip(terms, choose, strict=True)
            )
        step = min(s / 8, s * s / 5)
        low, high = -11 * s, a + 11 * s
        nodes = (low + step * i for i in range(int((high - low) / step)))
        return step * mp.fsum(
            mp.npdf(x, 0, s) * _excess(p * mp.expm1((2 * x - 1) / (2 * s * s)), a) for x in nodes
        )


def gaussian_moment_of_adding(sigma: float, q: float, order: int) -> Any:
    """E_P[(Q/P)^α] − 1: the other direction, by the trapezoidal rule."""
    with mp.workdps(40):
        s, p, a = mp.mpf(sigma), mp.mpf(q), mp.mpf(order)
        step = s / 12
        nodes = (-(a + 12 * s) + step * i for i in range(int((a + 24 * s) / step)))
        return step * mp.fsum(
            mp.npdf(x, 0, s) * ((1 + p * mp.expm1((2 * x - 1) / (2 * s * s))) ** (1 - a) - 1) for x in nodes
        )


def laplace_moment(scale: float, q: float, order: float) -> Any:
    """The same for the sampled Laplace.

    Whole orders: the binomial sum, with E_Q[e^{kL}] = (k·e^{(k−1)r} + (k−1)·e^{−kr})/(2k−1), which is
    Mironov 2017, Proposition 6. Fractional orders: quadrature between the two atoms.
    """
    with mp.workdps(60):
        r, p, a = 1 / mp.mpf(scale), mp.mpf(q), mp.mpf(order)
        if order == int(order):
            moments = ((k, (k * mp.e ** ((k - 1) * r) + (k - 1) * mp.e ** (-k * r)) / (2 * k - 1))
                       for k in range(int(order) + 1))  # fmt: skip
            return mp.fsum(mp.binomial(a, k) * p**k * (1 - p) ** (a - k) * m for k, m in moments) - 1
        ends = mp.e**-r * _excess(p * mp.expm1(r), a) / 2 + _excess(p * mp.expm1(-r), a) / 2
        points = [mp.mpf(i) / 8 for i in range(9)]
        inside = mp.quad(
            lambda x: r / 2 * mp.e ** (-r * x) * _excess(p * mp.expm1(r * (2 * x - 1)), a),
            points,
            maxdegree=6,
        )
        return ends + inside


# ---------------------------------------------------------------- dp-accounting

Part = tuple[str, float, float, int]  # noise, scale, sampling probability, count


@functools.cache
def google_pld(parts: tuple[Part, ...], interval: float, pessimistic: bool) -> Any:
    """dp-accounting's PLD of a composition under add-or-remove-one."""
    logging.getLogger().setLevel(logging.ERROR)  # it announces its choice of algorithm as a warning
    whole = None
    for noise, scale, q, count in parts:
        make = google.from_gaussian_mechanism if noise == "gaussian" else google.from_laplace_mechanism
        one = make(
            scale,
            value_discretization_interval=interval,
            sampling_prob=q,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        )
        many = one.self_compose(count) if count > 1 else one
        whole = many if whole is None else whole.compose(many)
    return whole


def google_epsilon(parts: tuple[Part, ...], delta: float, interval: float, *, pessimistic: bool) -> float:
    return float(google_pld(parts, interval, pessimistic).get_epsilon_for_delta(delta))


def log_space(low: float, high: float, count: int) -> list[float]:
    return [math.exp(math.log(low) + i * math.log(high / low) / (count - 1)) for i in range(count)]
