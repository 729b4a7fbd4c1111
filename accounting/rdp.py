"""Rényi differential privacy: the divergence of each elementary mechanism, and its conversion to (ε, δ).

For an order α > 1, a mechanism is (α, ρ)-RDP if the Rényi divergence of order α between its outputs on
neighbouring data sets is at most ρ (Mironov 2017). Divergences of one order add up under composition.

All divergences here are computed from A − 1, where A = E_Q[(P/Q)^α]. Since E_Q[P/Q − 1] = 0, the
integrand can be written without its constant and linear parts and is then nowhere negative, so
nothing cancels: tiny sampling probabilities keep their full relative precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from scipy.special import gammaln, logsumexp

from accounting.atoms import Atom, Curve, NoProtection
from accounting.mixture import GroupGaussianPair
from accounting.pairs import (
    BoundedRangePair,
    DiscreteGaussianPair,
    DiscretePair,
    FloatArray,
    GaussianPair,
    LaplacePair,
    Pair,
    Points,
    ProductPair,
    ResponsePair,
    UniformResponsePair,
)

# Quadrature and summation are exact to about 1e-12; bounds are raised by a thousand times that.
_RELATIVE_SLACK = 1e-9
_MOST_QUADRATURE = 64.0
_MOST_BINOMIAL = 256.0
_MOST_NODES = 2**15

FRACTIONAL_ORDERS: FloatArray = np.concatenate(
    [1 + np.geomspace(1e-3, 0.1, 12)[:-1], np.arange(11, 120) / 10]
)
INTEGER_ORDERS: FloatArray = np.unique(
    np.concatenate([np.arange(12, 65), np.rint(np.geomspace(64, 8192, 43))])
)
ORDERS: FloatArray = np.concatenate([FRACTIONAL_ORDERS, INTEGER_ORDERS])
"""Orders that a conversion minimises over: dense where ε between 0.1 and 10 has its optimum."""
_NEXT_TO_ONE: FloatArray = np.array([1.001])
_LOW_ORDERS: FloatArray = 1 + np.geomspace(1e-6, 0.02, 24)
_MIDDLE_ORDERS: FloatArray = 1 + np.geomspace(0.02, 63, 24)
_HIGH_ORDERS: FloatArray = np.unique(np.rint(np.geomspace(64, 2**17, 34)))


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
    match atom.mechanism:
        case NoProtection():
            return np.full(len(orders), np.inf)
        case Curve() as curve:
            return curve.divergence(orders)
        case pair:
            unsampled = _unsampled(pair, orders)
    if atom.q == 1 or (isinstance(pair, GaussianPair) and pair.scale < 0.05):
        return unsampled
    log_a_minus_1 = _log_a_minus_1(pair, atom, orders)
    log_a_minus_1 = log_a_minus_1 + _RELATIVE_SLACK + 1e-14 * np.abs(log_a_minus_1)
    with np.errstate(over="ignore"):
        sampled = np.logaddexp(0, log_a_minus_1) / (orders - 1)
    # For A − 1 far below one, logaddexp keeps only absolute precision; log1p(x) ≤ x keeps relative.
    tiny = np.exp(np.minimum(log_a_minus_1, 0)) / (orders - 1)
    sampled = np.where(log_a_minus_1 < -30, tiny, sampled)
    # Sampling never increases a divergence (joint quasi-convexity).
    return np.minimum(sampled, unsampled)


def _unsampled(pair: Pair, orders: FloatArray) -> FloatArray:
    """Divergence of the pair itself, the larger of both directions."""
    match pair:
        case GaussianPair(scale):
            return orders / (2 * scale**2)  # Mironov 2017, Corollary 3
        case BoundedRangePair(epsilon):
            # ε²/8-zCDP (Cesar & Rogers 2021, Lemma 3.4), and ε-DP.
            return np.minimum(orders * epsilon**2 / 8, _from_excess(_two_losses(epsilon), orders))
        case LaplacePair(scale):
            return np.minimum(1 / scale, _from_excess(_laplace_nodes(scale, 1.0, orders), orders))
        case GroupGaussianPair(scale, q, size):
            # No tighter than all of the group being sampled as soon as one record is; see `accounting.group`.
            whole = Atom(GaussianPair(scale / size), "poisson", float(-np.expm1(size * np.log1p(-q))))
            return _divergence(whole, orders)
        case ProductPair(parts):
            return np.asarray(sum(count * _unsampled(part, orders) for part, count in parts))
        case ResponsePair(epsilon, 0.0):
            return _from_excess(_two_losses(epsilon), orders)
        case DiscreteGaussianPair(sigma, shift):
            # Canonne, Kamath & Steinke 2020, Proposition 5; exact at whole orders.
            gaussian = orders * (shift / sigma) ** 2 / 2
            nodes = _discrete_gaussian_nodes(sigma, shift, np.minimum(orders, _MOST_QUADRATURE))
            if nodes is None:
                return gaussian
            summed = np.minimum(gaussian, _from_excess(nodes, orders))
            return np.where(orders <= _MOST_QUADRATURE, summed, gaussian)
        case DiscretePair():
            points = pair.points(upper=True)
            if points.only1 or (points.only0 and _needs_both(pair)):
                return np.full(len(orders), np.inf)
            return np.maximum(
                _from_excess(_as_nodes(points), orders),
                _from_excess((-points.losses, np.log(points.m1)), orders) if _needs_both(pair) else 0.0,
            )
    raise AssertionError(f"no divergence for {pair!r}")


Nodes = tuple[FloatArray, FloatArray]
"""Losses, and the log of the m0 mass (or weighted density) of each; shape [n] both."""


def _as_nodes(points: Points) -> Nodes:
    losses, m0 = points.losses, points.m0
    with np.errstate(divide="ignore", invalid="ignore"):
        log_mass = np.log(m0)
        # A mass that underflowed: its outcome counts through the other distribution's.
        log_mass = np.where(m0 > 0, log_mass, np.log(points.m1) - losses)
    if points.only0:
        return np.append(losses, -np.inf), np.append(log_mass, np.log(points.only0))
    return losses, log_mass


def _two_losses(epsilon: float) -> Nodes:
    """Randomised response."""
    low = -np.logaddexp(0, epsilon)
    return np.array([-epsilon, epsilon]), np.array([epsilon + low, low])


def _discrete_gaussian_nodes(sigma: float, shift: int, orders: FloatArray) -> Nodes | None:
    """All points that matter at `orders`; None where they are too many."""
    reach = 36 * sigma + 1
    x = np.arange(-math.ceil(reach), math.ceil(reach + float(orders.max()) * shift) + 1, dtype=np.float64)
    if len(x) > _MOST_NODES:
        return None
    log_mass = -0.5 * (x / sigma) ** 2
    return shift * (2 * x - shift) / (2 * sigma**2), log_mass - logsumexp(log_mass)


def _needs_both(pair: Pair) -> bool:
    """Whether the pair is not its own mirror image."""
    return isinstance(pair, UniformResponsePair)


def _from_excess(nodes: Nodes, orders: FloatArray) -> FloatArray:
    """Divergence of an unsampled pair from its nodes."""
    losses, log_mass = nodes
    logs = logsumexp(_log_excess(losses, 1.0, orders) + log_mass, axis=1) + _RELATIVE_SLACK
    return np.asarray(np.logaddexp(0, logs) / (orders - 1))


def _log_a_minus_1(pair: Pair, atom: Atom, orders: FloatArray) -> FloatArray:
    """log(A − 1) on a sample; ∞ where only the unsampled bound holds.

    All pairs that may be sampled are their own mirror image. Then the mixture's divergence from m0 is the
    larger of the two directions (Mironov, Talwar & Zhang 2019, Theorem 5).
    """
    if atom.sampling == "fixed-size":
        return _fixed_size(pair, atom.q, orders)
    match pair:
        case GaussianPair(scale):
            return _sampled_gaussian(scale, atom.q, orders)
        case DiscreteGaussianPair(sigma, shift):
            return _sampled_discrete_gaussian(sigma, shift, atom.q, orders)
        case ResponsePair(epsilon, 0.0):
            losses, log_mass = _two_losses(epsilon)
        case LaplacePair(scale):
            losses, log_mass = _laplace_nodes(scale, atom.q, orders)
        case BoundedRangePair(epsilon):
            losses, log_mass = _bounded_range_nodes(epsilon, atom.q, orders)
        case ProductPair():
            return _interpolated(pair, atom.q, orders)
        case DiscretePair():
            points = pair.points(upper=True)
            if points.only1:
                return np.full(len(orders), np.inf)
            losses, log_mass = _as_nodes(points)
        case _:
            return np.full(len(orders), np.inf)
    return np.asarray(logsumexp(_log_excess(losses, atom.q, orders) + log_mass, axis=1))


def _sampled_gaussian(sigma: float, q: float, orders: FloatArray) -> FloatArray:
    """Quadrature for small and fractional orders, the binomial sum for large whole ones."""
    large = (orders == np.rint(orders)) & (orders > _MOST_QUADRATURE)
    out = np.empty(len(orders))
    if large.any():

        def log_growth(k: FloatArray) -> FloatArray:
            exponent = k * (k - 1) / (2 * sigma**2)
            return np.asarray(exponent + np.log(-np.expm1(-exponent)))

        out[large] = _binomial(log_growth, q, orders[large])
    if not large.all():
        out[~large] = _gaussian_quadrature(sigma, q, orders[~large])
    return out


def _sampled_discrete_gaussian(sigma: float, shift: int, q: float, orders: FloatArray) -> FloatArray:
    """As for the Gaussian of scale sigma/shift, whose moments of whole orders are the same, exactly.

    Between whole orders log A is summed over the points, or, where these are many, the trapezoidal
    rule over them is the Gaussian's integral to e⁻⁷⁰; else only the unsampled bound is given.
    """
    out = np.full(len(orders), np.inf)
    near = orders <= _MOST_QUADRATURE
    out[~near] = _sampled_gaussian(sigma / shift, q, orders[~near])
    if not near.any():
        return out
    nodes = _discrete_gaussian_nodes(sigma, shift, orders[near])
    if nodes is not None:
        out[near] = logsumexp(_log_excess(nodes[0], q, orders[near]) + nodes[1], axis=1)
    elif sigma > 4 and sigma**2 > 4 * shift:
        out[near] = _sampled_gaussian(sigma / shift, q, orders[near])
    return out


def _binomial(log_growth: Callable[[FloatArray], FloatArray], q: float, orders: FloatArray) -> FloatArray:
    """Σ_{k≥2} C(α,k) (1−q)^{α−k} q^k (M(k) − 1) at whole orders: Mironov et al. 2019, Section 3.3, minus Σ=1.

    `log_growth` is log(M(k) − 1), with M(k) the k-th moment of m1/m0 under m0.
    """
    k = np.arange(2, int(orders.max()) + 1, dtype=np.float64)
    terms_of_k = log_growth(k) + k * np.log(q) - gammaln(k + 1)
    out = np.empty(len(orders))
    for i, order in enumerate(orders):
        n = int(order) - 1
        terms = gammaln(order + 1) - gammaln(order - k[:n] + 1) + terms_of_k[:n]
        out[i] = logsumexp(terms + (order - k[:n]) * np.log1p(-q))
    return out


def _interpolated(pair: ProductPair, q: float, orders: FloatArray) -> FloatArray:
    """The binomial sum at whole orders up to a limit; between them log A is convex in the order."""

    def log_growth(k: FloatArray) -> FloatArray:
        exponent = (k - 1) * _unsampled(pair, k)
        with np.errstate(invalid="ignore"):
            return np.where(np.isinf(exponent), np.inf, exponent + np.log(-np.expm1(-exponent)))

    out = np.full(len(orders), np.inf)
    near = orders <= _MOST_BINOMIAL
    if not near.any():
        return out
    whole = np.arange(2, np.ceil(orders[near].max()) + 1)
    log_a = np.concatenate([[0.0, 0.0], np.logaddexp(0, _binomial(log_growth, q, whole) + _RELATIVE_SLACK)])
    low = np.floor(orders[near]).astype(int)
    high = np.ceil(orders[near]).astype(int)
    share = orders[near] - low
    between = (1 - share) * log_a[low] + share * log_a[high]
    with np.errstate(divide="ignore"):  # log(e^x − 1)
        out[near] = between + np.log(-np.expm1(-between))
    return out


def _gaussian_quadrature(sigma: float, q: float, orders: FloatArray) -> FloatArray:
    """The trapezoidal rule.

    The integrand is analytic for |Im x| < πσ² and decays like a Gaussian, so the rule converges
    geometrically (Trefethen & Weideman 2014, Theorem 5.1). The step makes that error e⁻⁴⁰.
    """
    per_sigma = 2.0 if sigma > 4 else max(2.0, (40 + 4.45 * sigma**2) / (18.75 * sigma))
    step = sigma / per_sigma
    x = np.arange(-9 * sigma - step, orders.max() + 9 * sigma + step, step)
    log_density = -0.5 * (x / sigma) ** 2 - 0.5 * np.log(2 * np.pi) - np.log(sigma)
    loss = (2 * x - 1) / (2 * sigma**2)
    # e⁻⁴⁰ of the peak is lost in the tails and between the nodes.
    return np.asarray(logsumexp(_log_excess(loss, q, orders) + log_density + np.log(step), axis=1))


def _fixed_size(pair: Pair, q: float, orders: FloatArray) -> FloatArray:
    """log(A − 1) for samples of fixed size under replace-one, from the pair in `accounting.lattice`.

    With L the mixture's loss, its positive half gives m0·(e^{αL} − 1) and the negative one, its mirror image,
    e^L·m0·(e^{−αL} − 1). Their sum has no terms of first order in L. At large orders, and where no
    quadrature is at hand, it is bounded: it exceeds the Poisson sample's, m0·(e^{αL} − 1 − α(e^L − 1)), by
    m0·(e^{(1−α)L} − 1 + (α−1)(e^L − 1)), which adds up to less than (α−1)·q times m0's distance from m1.
    """
    whole = pair.masses(np.array([0.0, np.inf]), upper=True)
    distance = min(1.0, float(whole.m1[0] - whole.m0[0]) + whole.only1 + _RELATIVE_SLACK)
    poisson = _log_a_minus_1(pair, Atom(pair, "poisson", q), orders)
    out = np.logaddexp(poisson, np.log((orders - 1) * q * distance))
    weak = isinstance(pair, GaussianPair) and pair.scale > 0.5
    near = orders <= (_MOST_BINOMIAL if weak else _MOST_QUADRATURE)
    if not near.any():
        return out
    top = float(orders[near].max())
    match pair:
        case GaussianPair(scale):
            nodes, weights = np.polynomial.legendre.leggauss(16)
            edges = np.arange(0.5, top + 12 * scale + 1, scale / 2)
            half = scale / 4
            x = (edges[:, None] + half * (nodes + 1)).ravel()
            losses = (2 * x - 1) / (2 * scale**2)
            log_mass = -0.5 * (x / scale) ** 2 + np.log(np.tile(half * weights, len(edges)))
            log_mass -= 0.5 * np.log(2 * np.pi) + np.log(scale)
        case LaplacePair(scale):
            losses, log_mass = _laplace_nodes(scale, q, orders[near])
        case BoundedRangePair(epsilon):
            losses, log_mass = _bounded_range_nodes(epsilon, q, orders[near])
        case ResponsePair(epsilon, 0.0):
            losses, log_mass = _two_losses(epsilon)
        case DiscreteGaussianPair(sigma, shift):
            points = _discrete_gaussian_nodes(sigma, shift, orders[near])
            if points is None:
                return out
            losses, log_mass = points
        case DiscretePair() if not isinstance(pair, ProductPair) and not pair.points(upper=True).only1:
            losses, log_mass = _as_nodes(pair.points(upper=True))
        case _:
            return out
    losses, log_mass = losses[losses > 0], log_mass[losses > 0]
    alpha = orders[near][:, None]
    loss = np.log1p(q * np.expm1(np.minimum(losses, 1)))
    loss = np.where(losses < 1, loss, np.logaddexp(np.log1p(-q), np.log(q) + losses))[None, :]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        direct = np.log(np.expm1(alpha * loss) + np.expm1((1 - alpha) * loss) - np.expm1(loss))
        square = (alpha**2 - alpha) * loss**2
        small = np.log(square) + np.log1p(loss / 2 + (alpha**2 - alpha + 2) * loss**2 / 12)
        large = alpha * loss + np.log1p(np.exp((1 - 2 * alpha) * loss) - np.exp((1 - alpha) * loss))
    log_f = np.where(alpha * loss < 1e-3, small, np.where(alpha * loss > 30, large, direct))
    out[near] = logsumexp(log_f + log_mass, axis=1)
    return out


def _laplace_nodes(scale: float, q: float, orders: FloatArray) -> Nodes:
    """Constant losses outside [0, 1], quadrature inside."""
    rate = 1 / scale
    x, w = _graded_nodes(rate, q, float(orders.max()))
    loss = np.concatenate([[-rate], rate * (2 * x - 1), [rate]])
    log_mass = np.concatenate([[np.log(0.5)], np.log(w * rate / 2) - rate * x, [np.log(0.5) - rate]])
    return loss, log_mass


def _bounded_range_nodes(epsilon: float, q: float, orders: FloatArray) -> Nodes:
    """Quadrature of m0's density, ε·e^{−εx}/(1 − e^{−ε}) where the loss is ε·(2x − 1)."""
    x, w = _graded_nodes(epsilon, q, float(orders.max()))
    return epsilon * (2 * x - 1), np.log(w * epsilon / -np.expm1(-epsilon)) - epsilon * x


def _graded_nodes(rate: float, q: float, top: float) -> tuple[FloatArray, FloatArray]:
    """Nodes and weights on [0, 1], dense where the integrand is steep.

    It changes by e^{rate·x} around 0, likewise around the point where the mixture's two parts are equal,
    and by e^{2·α·rate·x} around 1. Panels shrink geometrically to these points, until they are flat.
    """
    equal = 0.5 + (np.log1p(-q) - np.log(q)) / (2 * rate) if q < 1 else 0.5
    edges = [0.0, 0.5, 1.0]  # losses change their sign at 1/2
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


def renyi_epsilon(counts: Mapping[Atom, int], delta: float) -> float:
    """The least ε at `delta` over all orders: few orders far apart, then more around the best."""
    if not counts or _total_variation(counts) <= delta:
        return 0.0
    return max(
        0.0, _least(counts, lambda rho, a: rho + (log_hockey_stick_factor(a) - np.log(delta)) / (a - 1))
    )


def renyi_delta(counts: Mapping[Atom, int], epsilon: float) -> float:
    """The least δ at `epsilon` over all orders."""
    if not counts:
        return 0.0
    log_delta = _least(counts, lambda rho, a: (a - 1) * (rho - epsilon) + log_hockey_stick_factor(a))
    return min(float(np.exp(min(0.0, log_delta))), _total_variation(counts))


def _total_variation(counts: Mapping[Atom, int]) -> float:
    """A bound on δ at ε = 0 from a divergence next to order 1: Bretagnolle & Huber 1979."""
    return math.sqrt(-math.expm1(-float(rdp(counts, _NEXT_TO_ONE)[0])))


def _least(counts: Mapping[Atom, int], bound: Callable[[FloatArray, FloatArray], FloatArray]) -> float:
    """The least value of a bound that is unimodal in the order (any order gives a valid one)."""

    def values(orders: FloatArray) -> FloatArray:
        return bound(rdp(counts, orders), orders)

    orders = _MIDDLE_ORDERS
    found = values(orders)
    i = int(np.argmin(found))
    if i in (0, len(orders) - 1):
        low, high = np.append(_LOW_ORDERS, orders[1]), np.append(orders[-2], _HIGH_ORDERS)
        orders = low if i == 0 else high
        found = values(orders)
        i = int(np.argmin(found))
    least = found[i]
    for _ in range(3):  # since next to the best order the bound may rise steeply
        low, high = orders[max(i - 1, 0)], orders[min(i + 1, len(orders) - 1)]
        orders = 1 + np.geomspace(low - 1, high - 1, 10)
        if high > _MOST_QUADRATURE:
            orders = np.unique(np.rint(orders))
        found = values(orders)
        i = int(np.argmin(found))
        least = np.fmin(least, found[i])
    return float(least)
