"""Exact or independent answers that the accountants are tested against.

Nothing here uses the accountants' own formulas; pairs are imported for their names and parameters. Closed
forms are evaluated by mpmath with 40 digits; compositions come from
dp-accounting 0.6.0 (Google), whose connect-the-dots PLD is an upper bound ("pessimistic") and whose
privacy-buckets PLD is a lower one ("optimistic").
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable
from typing import Any, ParamSpec

import mpmath as mp
from dp_accounting.pld import privacy_loss_distribution as google

from accounting.atoms import Atom
from accounting.pairs import (
    BoundedRangePair,
    DiscreteGaussianPair,
    GaussianPair,
    LaplacePair,
    Pair,
    ResponsePair,
    SwappedResponsePair,
    UniformResponsePair,
)

DIGITS = 40
P = ParamSpec("P")

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


# ---------------------------------------------------------------- one step of any pair
#
# A profile is γ ↦ Σ max(0, m1 − γ·m0), for every γ ≥ 0.

Profile = Callable[[Any], Any]
Outcomes = list[tuple[Any, Any]]
"""(m0, m1) of each outcome."""


def precise(make: Callable[P, Outcomes]) -> Callable[P, Outcomes]:
    """Masses of 40 digits: a mirrored profile is a small difference of large numbers."""

    @functools.wraps(make)
    def with_digits(*args: P.args, **kwargs: P.kwargs) -> Outcomes:
        with mp.workdps(DIGITS):
            return make(*args, **kwargs)

    return with_digits


def gaussian_profile(scale: float) -> Profile:
    s = mp.mpf(scale)
    half = 1 / (2 * s)
    return lambda y: (
        mp.ncdf(half - s * mp.log(y)) - y * mp.ncdf(-half - s * mp.log(y)) if y > 0 else mp.mpf(1)
    )


def laplace_profile(scale: float) -> Profile:
    rate = 1 / mp.mpf(scale)

    def profile(y: Any) -> Any:
        if y <= mp.e**-rate:
            return 1 - y
        return max(mp.mpf(0), 1 - mp.sqrt(y * mp.e**-rate))

    return profile


def bounded_range_profile(epsilon: float) -> Profile:
    """The best of all pairs with two losses t and t − ε: Dong, Durfee & Rogers 2020, by search over t."""
    e = mp.mpf(epsilon)

    def profile(y: Any) -> Any:
        def of(t: Any) -> Any:
            return outcomes_profile(two_losses(e, t))(y)

        best = max((mp.mpf(i) / 64 * e for i in range(65)), key=of)
        low, high = max(best - e / 64, mp.mpf(0)), min(best + e / 64, e)
        for _ in range(60):  # unimodal around the best
            one, two = low + (high - low) * mp.mpf("0.382"), low + (high - low) * mp.mpf("0.618")
            low, high = (low, two) if of(one) >= of(two) else (one, high)
        return of((low + high) / 2)

    return profile


@precise
def two_losses(width: float, t: float) -> Outcomes:
    """The pair with the losses t and t − width."""
    w, t = mp.mpf(width), mp.mpf(t)
    m1 = (mp.e**w - mp.e**t) / mp.expm1(w)
    return [(m1 * mp.e**-t, m1), ((1 - m1) * mp.e ** (w - t), 1 - m1)]


@precise
def randomised_response(epsilon: float, delta: float = 0.0) -> Outcomes:
    """Kairouz, Oh & Viswanath 2015, Section 2.3: with probability δ the input itself, else an ε-DP bit."""
    likely = (1 - mp.mpf(delta)) / (1 + mp.e ** -mp.mpf(epsilon))
    unlikely = likely * mp.e ** -mp.mpf(epsilon)
    return [(mp.mpf(0), mp.mpf(delta)), (likely, unlikely), (unlikely, likely), (mp.mpf(delta), mp.mpf(0))]


@precise
def answers_of(noise_probability: float, answers: int, *, other_is_uniform: bool) -> Outcomes:
    """A randomised answer, against another record's, or against a uniform one; a mass for each answer."""
    p, k = mp.mpf(noise_probability), answers
    true, lie = 1 - p + p / k, p / k
    with_record = [true] + [lie] * (k - 1)
    without = [mp.mpf(1) / k] * k if other_is_uniform else [lie, true] + [lie] * (k - 2)
    return list(zip(without, with_record, strict=True))


@functools.cache
@precise
def discrete_gaussian_outcomes(sigma: float, shift: int) -> Outcomes:
    """Masses exp(−x²/2σ²) around 0 and around `shift`, to 40 deviations beyond 310 shifts.

    Moments of order α have their weight around α shifts.
    """
    s = mp.mpf(sigma)
    whole = range(-math.ceil(40 * sigma) - shift, math.ceil(40 * sigma) + 310 * shift + 1)
    weight = {x: mp.e ** (-(mp.mpf(x) ** 2) / (2 * s * s)) for x in range(whole[0] - shift, whole[-1] + 1)}
    norm = mp.fsum(weight.values())
    return [(weight[x] / norm, weight[x - shift] / norm) for x in whole]


def outcomes_profile(outcomes: Outcomes) -> Profile:
    def profile(y: Any) -> Any:
        return mp.fsum(m1 - y * m0 for m0, m1 in outcomes if m1 > y * m0)

    return profile


def mirrored(profile: Profile) -> Profile:
    """Σ max(0, m0 − γ·m1), which is 1 − γ + γ·(the profile at 1/γ)."""
    return lambda y: 1 - y + y * profile(1 / y) if y > 0 else mp.mpf(1)


def poisson_delta(profile: Profile, q: float, epsilon: float) -> Any:
    """δ(ε) on a Poisson sample, the larger of both directions, by substitution in Σ max(0, ·)."""
    with mp.workdps(DIGITS):
        p, y = mp.mpf(q), mp.e ** mp.mpf(epsilon)
        remove = p * profile((y - 1 + p) / p)
        rest = 1 - y * (1 - p)
        add = rest * mirrored(profile)(y * p / rest) if rest > 0 else mp.mpf(0)
        return max(remove, add, mp.mpf(0))


def fixed_size_delta(profile: Profile, q: float, epsilon: float) -> Any:
    """δ(ε ≥ 0) on a sample of fixed size, replace-one: Zhu, Dong & Wang 2022, Theorem 11 (3)."""
    with mp.workdps(DIGITS):
        p, y = mp.mpf(q), mp.e ** mp.mpf(epsilon)
        return p * profile((y - 1 + p) / p)


def profile_of(pair: Pair) -> Profile:
    match pair:
        case GaussianPair(scale):
            return gaussian_profile(scale)
        case LaplacePair(scale):
            return laplace_profile(scale)
        case BoundedRangePair(epsilon):
            return bounded_range_profile(epsilon)
        case ResponsePair(epsilon, delta):
            return outcomes_profile(randomised_response(epsilon, delta))
        case DiscreteGaussianPair(sigma, shift):
            return outcomes_profile(discrete_gaussian_outcomes(sigma, shift))
        case UniformResponsePair(noise, k) | SwappedResponsePair(noise, k):
            uniform = isinstance(pair, UniformResponsePair)
            return outcomes_profile(answers_of(noise, k, other_is_uniform=uniform))
    raise AssertionError(f"no oracle for {pair!r}")


def exact_delta(atom: Atom, epsilon: float) -> Any:
    """δ(ε) of one run of `atom`."""
    delta = fixed_size_delta if atom.sampling == "fixed-size" else poisson_delta
    return delta(profile_of(atom.pair), atom.q, epsilon)


@precise
def composed_outcomes(outcomes: Outcomes, count: int) -> Outcomes:
    """All of `count` independent runs, outcomes of one loss gathered; for few outcomes."""
    whole: Outcomes = [(mp.mpf(1), mp.mpf(1))]
    for _ in range(count):
        sums: dict[str, tuple[Any, Any]] = {}
        for (a0, a1), (b0, b1) in itertools.product(whole, outcomes):
            m0, m1 = a0 * b0, a1 * b1
            if m0 or m1:
                key = mp.nstr(m1 / m0, 25) if m0 else "inf"
                other = sums.get(key, (mp.mpf(0), mp.mpf(0)))
                sums[key] = (other[0] + m0, other[1] + m1)
        whole = list(sums.values())
    return whole


def pure_composition_delta(epsilon: float, count: int, at: float) -> Any:
    """δ of `count` ε-DP mechanisms: the binomial sum of Kairouz, Oh & Viswanath 2015, Theorem 3.3."""
    with mp.workdps(DIGITS):
        e, y = mp.mpf(epsilon), mp.e ** mp.mpf(at)
        terms = []
        for i in range(count + 1):
            gap = mp.e ** ((count - i) * e) - y * mp.e ** (i * e)
            if gap > 0:
                terms.append(mp.binomial(count, i) * gap)
        return mp.fsum(terms) / (1 + mp.e**e) ** count


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
