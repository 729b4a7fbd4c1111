"""Rényi differential privacy: the divergence of each elementary mechanism, and its conversion to (ε, δ).

For an order α > 1, a mechanism is (α, ρ)-RDP if the Rényi divergence of order α between its outputs on
neighbouring data sets is at most ρ (Mironov 2017). Divergences of one order add up under composition.

All divergences here are computed from A − 1, where A = E_Q[(P/Q)^α]. Since E_Q[P/Q − 1] = 0, the
integrand can be written without its constant and linear parts and is then nowhere negative, so
nothing cancels: tiny sampling probabilities keep their full relative precision.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln, logsumexp

from accounting.events import Atom

FloatArray = npt.NDArray[np.float64]

# Quadrature and summation are exact to about 1e-12; bounds are raised by a thousand times that.
_RELATIVE_SLACK = 1e-9

FRACTIONAL_ORDERS: FloatArray = np.concatenate(
    [1 + np.geomspace(1e-3, 0.1, 12)[:-1], np.arange(11, 120) / 10]
)
INTEGER_ORDERS: FloatArray = np.unique(
    np.concatenate([np.arange(12, 65), np.rint(np.geomspace(64, 8192, 43))])
)
ORDERS: FloatArray = np.concatenate([FRACTIONAL_ORDERS, INTEGER_ORDERS])
"""Orders that a conversion minimises over: dense where ε between 0.1 and 10 has its optimum."""


def rdp(counts: Mapping[Atom, int], orders: FloatArray = ORDERS) -> FloatArray:
    """Return an upper bound on the Rényi divergence of a composition at each of `orders`.

    Args:
        counts: Elementary mechanisms and how often each runs, from `accounting.events.atoms`.
        orders: Orders α > 1, shape [k].
    """
    total = np.zeros(len(orders))
    for atom, count in counts.items():
        total += count * _divergence(atom, np.asarray(orders, dtype=np.float64))
    return total


def _divergence(atom: Atom, orders: FloatArray) -> FloatArray:
    if atom.noise == "none":
        return np.full(len(orders), np.inf)
    if atom.noise == "gaussian":
        # Mironov 2017, Corollary 3. Sampling never increases it (joint quasi-convexity).
        unsampled = orders / (2 * atom.scale**2)
        if atom.q == 1 or atom.scale < 0.05:
            return unsampled
        log_a_minus_1 = _sampled_gaussian(atom, orders)
    else:
        unsampled = np.full(len(orders), 1 / atom.scale)  # pure ε-DP bounds every order
        log_a_minus_1 = _sampled_laplace(atom, orders)
    log_a_minus_1 += _RELATIVE_SLACK + 1e-14 * np.abs(log_a_minus_1)
    sampled = np.logaddexp(0, log_a_minus_1) / (orders - 1)
    # For A − 1 far below one, logaddexp keeps only absolute precision; log1p(x) ≤ x keeps relative.
    tiny = np.exp(np.minimum(log_a_minus_1, 0)) / (orders - 1)
    sampled = np.where(log_a_minus_1 < -30, tiny, sampled)
    return np.minimum(sampled, unsampled)


def _sampled_gaussian(atom: Atom, orders: FloatArray) -> FloatArray:
    """log(A − 1) for the Poisson-sampled Gaussian, at each order.

    The divergence of the mixture from the plain Gaussian is the larger of the two directions
    (Mironov, Talwar & Zhang 2019, Theorem 5).
    """
    whole = (orders == np.rint(orders)) & (orders >= 2)
    out = np.empty(len(orders))
    if whole.any():
        out[whole] = _gaussian_binomial(atom, orders[whole])
    if not whole.all():
        out[~whole] = _gaussian_quadrature(atom, orders[~whole])
    return out


def _gaussian_binomial(atom: Atom, orders: FloatArray) -> FloatArray:
    """Σ_{k≥2} C(α,k) (1−q)^{α−k} q^k (exp(k(k−1)/2σ²) − 1): Mironov et al. 2019, Section 3.3, minus Σ=1."""
    top = int(orders.max())
    k = np.arange(2, top + 1, dtype=np.float64)
    exponent = k * (k - 1) / (2 * atom.scale**2)
    log_growth = exponent + np.log(-np.expm1(-exponent)) + k * np.log(atom.q) - gammaln(k + 1)
    out = np.empty(len(orders))
    for i, order in enumerate(orders):
        kk, growth = k[: int(order) - 1], log_growth[: int(order) - 1]
        terms = gammaln(order + 1) - gammaln(order - kk + 1) + growth
        out[i] = logsumexp(terms + (order - kk) * np.log1p(-atom.q))
    return out


def _gaussian_quadrature(atom: Atom, orders: FloatArray) -> FloatArray:
    """The same for fractional orders, by the trapezoidal rule.

    The integrand is analytic for |Im x| < πσ² and decays like a Gaussian, so the rule converges
    geometrically (Trefethen & Weideman 2014, Theorem 5.1). The step makes that error e⁻⁴⁰.
    """
    sigma = atom.scale
    per_sigma = 2.0 if sigma > 4 else max(2.0, (40 + 4.45 * sigma**2) / (18.75 * sigma))
    step = sigma / per_sigma
    x = np.arange(-9 * sigma - step, orders.max() + 9 * sigma + step, step)
    log_density = -0.5 * (x / sigma) ** 2 - 0.5 * np.log(2 * np.pi) - np.log(sigma)
    loss = (2 * x - 1) / (2 * sigma**2)
    # e⁻⁴⁰ of the peak is lost in the tails and between the nodes.
    return np.asarray(logsumexp(_log_excess(loss, atom.q, orders) + log_density + np.log(step), axis=1))


def _sampled_laplace(atom: Atom, orders: FloatArray) -> FloatArray:
    """log(A − 1) for the (sampled) Laplace mechanism: constant losses outside [0, 1], quadrature inside."""
    rate = 1 / atom.scale
    x, w = _graded_nodes(rate, atom.q, float(orders.max()))
    loss = np.concatenate([[-rate], rate * (2 * x - 1), [rate]])
    log_mass = np.concatenate([[np.log(0.5)], np.log(w * rate / 2) - rate * x, [np.log(0.5) - rate]])
    return np.asarray(logsumexp(_log_excess(loss, atom.q, orders) + log_mass, axis=1))


def _graded_nodes(rate: float, q: float, top: float) -> tuple[FloatArray, FloatArray]:
    """Nodes and weights on [0, 1], dense where the integrand is steep.

    It changes by e^{rate·x} around 0, likewise around the point where the mixture's two parts are equal,
    and by e^{2·α·rate·x} around 1. Panels shrink geometrically to these points, until they are flat.
    """
    equal = 0.5 + (np.log1p(-q) - np.log(q)) / (2 * rate) if q < 1 else 0.5
    edges = [0.0, 1.0]
    for centre, slope in ((0.0, rate), (float(np.clip(equal, 0, 1)), 2 * rate), (1.0, 2 * top * rate)):
        halvings = np.arange(max(1, int(np.ceil(np.log2(max(slope / 8, 1)))) + 1))
        edges += [centre, *(centre + 0.5**halvings), *(centre - 0.5**halvings)]
    ends = np.unique(np.clip(edges, 0, 1))
    nodes, weights = np.polynomial.legendre.leggauss(24)
    half = np.diff(ends)[:, None] / 2
    return (ends[:-1, None] + half * (nodes + 1)).ravel(), (half * weights).ravel()


def _log_excess(loss: FloatArray, q: float, orders: FloatArray) -> FloatArray:
    """Log of (1+v)^α − 1 − αv, where v = q(e^loss − 1); shape [orders, losses]. It is never negative."""
    alpha = orders[:, None]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        v = q * np.expm1(loss)[None, :]
        log_ratio = np.logaddexp(np.log1p(-q), np.log(q) + loss) if q < 1 else loss
        log_ratio = np.where(np.abs(v[0]) < 0.5, np.log1p(v[0]), log_ratio)
        power = alpha * log_ratio[None, :]
        # The same as (1+v)^α − 1 − αv, but with α − 1 factored out, which may be small.
        direct = np.log((1 + v) * np.expm1((alpha - 1) * log_ratio) - (alpha - 1) * v)
        # 1 + αv = 1 − α + α·e^log_ratio, kept in the exponent so that nothing overflows.
        rest = (1 - alpha) * np.exp(-power) + alpha * np.exp((1 - alpha) * log_ratio)
        large = power + np.log1p(-rest)
        # Taylor's remainder where the difference would cancel: α(α−1)v²/2 · (1 + (α−2)v/3 · (1 + …)).
        series = 1 + (alpha - 4) * v / 6
        for j in (5, 4, 3):
            series = 1 + (alpha - j + 1) * v / j * series
        small = np.log(alpha * (alpha - 1) / 2) + 2 * np.log(np.abs(v)) + np.log(series)
        cancels = np.abs(v) < 3e-3 / (1 + alpha)
    return np.where(cancels, small, np.where(power > 30, large, direct))


def log_hockey_stick_factor(order: FloatArray) -> FloatArray:
    """Log of sup_u≥0 e^{−(α−1)u}(1 − e^{−u}) = (1/α)(1 − 1/α)^{α−1}."""
    return np.asarray((order - 1) * np.log1p(-1 / order) - np.log(order))


def epsilon_from_rdp(rho: FloatArray, delta: float, orders: FloatArray = ORDERS) -> float:
    """Return the least ε that (α, ρ(α))-RDP at the given orders guarantees at `delta`.

    Canonne, Kamath & Steinke 2020, Proposition 12.
    """
    bounds = rho + (log_hockey_stick_factor(orders) - np.log(delta)) / (orders - 1)
    return float(max(0.0, np.min(bounds, initial=np.inf)))


def delta_from_rdp(rho: FloatArray, epsilon: float, orders: FloatArray = ORDERS) -> float:
    """Return the least δ that (α, ρ(α))-RDP at the given orders guarantees at `epsilon`; same source."""
    logs = (orders - 1) * (rho - epsilon) + log_hockey_stick_factor(orders)
    return float(np.exp(min(0.0, np.min(logs, initial=0.0))))


def best_order(rho: FloatArray, delta: float, orders: FloatArray = ORDERS) -> float:
    """The order at which `epsilon_from_rdp` attains its minimum."""
    bounds = rho + (log_hockey_stick_factor(orders) - np.log(delta)) / (orders - 1)
    return float(orders[int(np.argmin(bounds))])
