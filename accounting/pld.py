"""Privacy-loss distributions: certified lower and upper bounds on ε(δ) and δ(ε) of a composition.

A step's losses are put on a lattice twice, once from above and once from below (`accounting.pairs`).
Losses add up under composition, so their distributions convolve, which is a product of Fourier
transforms. Before that they are tilted: multiplied by e^{θ·loss} and normalised, with θ chosen so that
the mean of the tilted sum lies near the ε in question. This has three effects:

- The hockey-stick divergence becomes e^{K(θ)−θε} · Σ tilted(s)·e^{−θ(s−ε)}(1 − e^{−(s−ε)}), where K is the
  cumulant generating function and every term is positive and at most c(θ) (see `_factor`). The factor in
  front times c(θ) is the Rényi bound of order 1 + θ. So every error that is made in the tilted sum
  (rounding of the FFT, mass that falls outside of the window and wraps around) is an error relative to
  the Rényi bound, however small δ is.
- The window needs to be only a few standard deviations of the tilted sum wide.
- The width of lattice and window follow from the question, which keeps them to a few thousand points.

Sources: Sommer, Meiser & Mohammadi 2019 (losses and their convolution); Koskela, Jälkö & Honkela 2020
(FFT); Doroshenko et al. 2022 (upper lattice); Zhu, Dong & Wang 2022 (dominating pairs and both
directions). The tilted sum is the saddle-point view of Alghamdi et al. 2023, evaluated exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft, optimize
from scipy.special import erfcx, log_ndtr

from accounting.events import Atom, merge_gaussians
from accounting.pairs import UNIT, Direction, Lattice, cells, loss_range
from accounting.rdp import best_order, delta_from_rdp, epsilon_from_rdp, rdp

FloatArray = npt.NDArray[np.float64]
Part = tuple[Lattice, int]

DEFAULT_TOLERANCE = 0.005
MOST_CELLS = 2**18
MOST_POINTS = 2**19
_OUTSIDE = 1e-9  # tilted mass that may fall outside of the window on either side: relative to Rényi's δ
_LOG_TAIL = -75.0  # mass e⁻⁷⁵ ≈ 3e-33 per step is cut off the losses, and charged


def epsilon_bounds(
    counts: Mapping[Atom, int], delta: float, tolerance: float = DEFAULT_TOLERANCE
) -> tuple[float, float]:
    """Return a lower and an upper bound on ε at `delta`, for the dominating pairs of a composition.

    Args:
        counts: Elementary mechanisms and how often each runs, from `accounting.events.atoms`.
        delta: In (0, 1).
        tolerance: The bracket's relative width to stop at. Where the limits of memory are reached first
            (2^18 cells a mechanism, 2^19 points a convolution) the bracket is wider, never wrong.

    Returns:
        0 ≤ lower ≤ upper. ∞ for a non-private event.
    """
    if not counts:
        return 0.0, 0.0
    if Atom.NON_PRIVATE in counts:
        return math.inf, math.inf
    exact = _only_gaussian(counts)
    if exact is not None:
        # Near δ(0) a relative error of δ is a larger one of ε, so both are widened.
        below = _gaussian_epsilon(exact.scale, min(delta * (1 + 1e-9), 1 - UNIT)) * (1 - 1e-9)
        return below, _gaussian_epsilon(exact.scale, delta * (1 - 1e-9)) * (1 + 1e-9)
    lower, upper, _ = _bracket(counts, delta, tolerance)
    return lower, upper


def epsilon_curve(
    counts: Mapping[Atom, int], multiples: Sequence[int], delta: float, tolerance: float = 0.02
) -> list[tuple[float, float]]:
    """Return `epsilon_bounds` after each of several numbers of runs of `counts`.

    The lattices are made once, for the largest multiple, and serve all others.

    Args:
        counts: One run, from `accounting.events.atoms`.
        multiples: How many runs, each at least 0.
        delta: In (0, 1).
        tolerance: As for `epsilon_bounds`, for the largest multiple.
    """
    most = max(multiples, default=0)
    whole = {atom: count * most for atom, count in counts.items()}
    if most == 0 or not counts or Atom.NON_PRIVATE in counts or _only_gaussian(whole):
        return [epsilon_bounds(_times(counts, m), delta, tolerance) for m in multiples]
    _, _, grid = _bracket(whole, delta, tolerance)
    if grid is None:
        return [epsilon_bounds(_times(counts, m), delta, tolerance) for m in multiples]
    return [_curve_point(counts, grid, m, most, delta) for m in multiples]


def _curve_point(
    counts: Mapping[Atom, int], grid: _Grid, multiple: int, most: int, delta: float
) -> tuple[float, float]:
    if multiple == 0:
        return 0.0, 0.0
    some = _times(counts, multiple)
    rho = rdp(some)
    tilt = best_order(rho, delta) - 1
    upper = min(epsilon_from_rdp(rho, delta), _pure_epsilon(some))
    lowers = [[(x, k // most * multiple) for x, k in parts] for parts in grid.lower]
    uppers = [[(x, k // most * multiple) for x, k in parts] for parts in grid.upper]
    lower = max(_epsilon(p, delta, tilt, upper=False) for p in lowers)
    upper = min(upper, max(_epsilon(p, delta, tilt, upper=True) for p in uppers))
    return lower, max(lower, upper)


def _times(counts: Mapping[Atom, int], multiple: int) -> dict[Atom, int]:
    """The counts of `multiple` runs, unsampled Gaussians merged as `atoms` does."""
    return merge_gaussians({atom: count * multiple for atom, count in counts.items() if multiple})


def _bracket(counts: Mapping[Atom, int], delta: float, tolerance: float) -> tuple[float, float, _Grid | None]:
    """Narrow a bracket on ε from coarse to fine; the last grid serves for other questions."""
    rho = rdp(counts)
    tilt = best_order(rho, delta) - 1
    lower, upper = 0.0, min(epsilon_from_rdp(rho, delta), _pure_epsilon(counts))
    grid: _Grid | None = None
    for grid in _grids(counts, upper, tilt, tolerance):
        before = upper - lower
        lower = max(lower, *(_epsilon(p, delta, tilt, upper=False) for p in grid.lower))
        upper = min(upper, max(_epsilon(p, delta, tilt, upper=True) for p in grid.upper))
        upper = max(lower, upper)
        if not grid.refine(upper - lower, tolerance * upper + 1e-9):
            break
        if lower > 0 and upper - lower > 0.95 * before:  # the window is full: finer lattices say less
            break
    return lower, upper, grid


def delta_bounds(
    counts: Mapping[Atom, int], epsilon: float, tolerance: float = DEFAULT_TOLERANCE
) -> tuple[float, float]:
    """Return a lower and an upper bound on δ at `epsilon`; as `epsilon_bounds` otherwise.

    The tolerance is that of ε: the lattice is as fine as for an ε bracket of this relative width.
    """
    if not counts:
        return 0.0, 0.0
    if Atom.NON_PRIVATE in counts:
        return 1.0, 1.0
    exact = _only_gaussian(counts)
    if exact is not None:
        lower, upper = _widen(math.exp(_log_gaussian_delta(exact.scale, epsilon)), 1e-9)
        return lower, min(1.0, upper)
    if epsilon >= _pure_epsilon(counts):
        return 0.0, 0.0
    rho = rdp(counts)
    renyi = delta_from_rdp(rho, epsilon)
    tilt = best_order(rho, max(renyi, 1e-300)) - 1
    lower, upper = 0.0, renyi
    for grid in _grids(counts, max(epsilon, 1e-6), tilt, tolerance):
        before = upper - lower
        lower = max(lower, *(_delta(p, epsilon, tilt, upper=False) for p in grid.lower))
        upper = min(upper, max(_delta(p, epsilon, tilt, upper=True) for p in grid.upper))
        upper = max(lower, upper)
        # d log δ / dε is about −(tilt + 1) near ε.
        wanted = (1 + tilt) * tolerance * max(epsilon, 1e-6) * upper
        if not grid.refine(upper - lower, min(wanted, 0.2 * upper) + 1e-300):
            break
        if lower > 0 and upper - lower > 0.95 * before:
            break
    return lower, upper


# ---------------------------------------------------------------- exact special cases


def _only_gaussian(counts: Mapping[Atom, int]) -> Atom | None:
    """The one unsampled Gaussian that `counts` consists of, or None."""
    [atom, *others] = merge_gaussians(dict(counts))
    return atom if not others and atom.noise == "gaussian" and atom.q == 1 else None


def _log_gaussian_delta(sigma: float, epsilon: float) -> float:
    """Log δ(ε) of the Gaussian mechanism: Balle & Wang 2018, Theorem 8."""
    mu = 1 / sigma
    z = epsilon / mu
    gain = log_ndtr(mu / 2 - z)
    if mu < 1:
        # loss − gain = ε − ∫ (log Φ)′ over [−z − μ/2, −z + μ/2], without the cancellation.
        nodes, weights = np.polynomial.legendre.leggauss(20)
        hazard = math.sqrt(2 / math.pi) / erfcx((z - mu * nodes / 2) / math.sqrt(2))
        gap = -mu * float(weights @ (hazard - z)) / 2
    else:
        gap = float(epsilon + log_ndtr(-mu / 2 - z) - gain)
    return float(gain + np.log(-np.expm1(min(gap, -1e-300))))


def _gaussian_epsilon(sigma: float, delta: float) -> float:
    if _log_gaussian_delta(sigma, 0.0) <= math.log(delta):
        return 0.0
    mu = 1 / sigma
    high = (mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta))) * (1 + 1e-9)
    root = optimize.brentq(
        lambda e: _log_gaussian_delta(sigma, e) - math.log(delta), 0.0, high, xtol=1e-16 * high, rtol=1e-13
    )
    return float(root)


def _widen(value: float, relative: float) -> tuple[float, float]:
    return value * (1 - relative), value * (1 + relative)


def _pure_epsilon(counts: Mapping[Atom, int]) -> float:
    """The ε at which δ is zero: finite for Laplace noise alone."""
    total = 0.0
    for atom, count in counts.items():
        if atom.noise != "laplace":
            return math.inf
        total += count * loss_range(atom, _LOG_TAIL)[1]
    return total * (1 + 1e-12)


# ---------------------------------------------------------------- lattices, coarse to fine


@dataclass
class _Grid:
    """The lattices of all parts at one width, for both directions, from above and from below."""

    h: float
    finest: float
    upper: list[list[Part]]
    lower: list[list[Part]]
    next_h: float | None = None

    def refine(self, gap: float, wanted: float) -> bool:
        """Decide on a finer width if the bracket is still too wide. False when there is nothing to gain."""
        if gap <= wanted or self.h <= self.finest:
            return False
        # The gap shrinks with h² where cells are narrower than the losses spread, else with h.
        ratio = min(0.6, max(1 / 4, 0.9 * math.sqrt(wanted / gap)))
        self.next_h = max(self.finest, self.h * ratio)
        return True


def _grids(counts: Mapping[Atom, int], epsilon: float, tilt: float, tolerance: float) -> Iterator[_Grid]:
    steps = sum(counts.values())
    log_tail = _LOG_TAIL - math.log(steps)
    widths = [high - low for low, high in (loss_range(atom, log_tail) for atom in counts)]
    finest = max(max(widths) / MOST_CELLS, sum(w * w for w in widths) ** 0.5 * 1e-12)
    # Spreading a mass over a cell of width h adds a variance of about h²/6 a step.
    guess = math.sqrt(3 * tolerance * max(epsilon, 0.05) / (steps * (1 + tilt)))
    h: float | None = max(finest, min(guess, max(widths) / 200, 50.0))
    if finest > 50:  # e^h must not overflow; Rényi's bound serves
        return
    while h is not None:
        both: list[tuple[list[Part], list[Part]]] = []
        directions: tuple[Direction, Direction] = ("remove", "add")
        for direction in directions:
            cut = [(cells(atom, h, log_tail, direction), k) for atom, k in counts.items()]
            both.append(([(c.upper(), k) for c, k in cut], [(c.lower(), k) for c, k in cut]))
        grid = _Grid(h, finest, [upper for upper, _ in both], [lower for _, lower in both])
        yield grid
        h = grid.next_h


def _epsilon(parts: list[Part], delta: float, tilt: float, *, upper: bool) -> float:
    """Bound ε at `delta` for one direction: ∞ (upper) or 0 (lower) where no bound is found."""
    if upper and _infinite(parts) >= delta:
        return math.inf
    for _ in range(12):
        tilted = _Tilted.compose(parts, tilt)
        found, inside = tilted.epsilon(delta, upper=upper)
        if inside:
            return found
        before, tilt = tilt, _tilt_for(parts, found, tilt)
        if tilt == before:
            break
    return math.inf if upper else 0.0


def _delta(parts: list[Part], epsilon: float, tilt: float, *, upper: bool) -> float:
    tilted = _Tilted.compose(parts, _tilt_for(parts, epsilon, tilt))
    return tilted.delta(epsilon, upper=upper)


# ---------------------------------------------------------------- tilted sums


def _infinite(parts: list[Part]) -> float:
    """Mass of the composition at loss +∞."""
    return -math.expm1(math.fsum(k * math.log1p(-lattice.infinite) for lattice, k in parts))


def _cumulants(parts: list[Part], tilt: float) -> tuple[float, float, float]:
    """K(θ), K′(θ) and K″(θ) of the sum of all finite losses."""
    value = mean = variance = 0.0
    for lattice, count in parts:
        losses = lattice.losses
        log_total, weight = _tilted_mass(lattice, tilt)
        first = float(weight @ losses)
        value += count * log_total
        mean += count * first
        variance += count * float(weight @ (losses - first) ** 2)
    return value, mean, variance


def _tilted_mass(lattice: Lattice, tilt: float) -> tuple[float, FloatArray]:
    """Log Σ mass·e^{θ·loss}, and the normalised terms."""
    exponent = lattice.log_mass + tilt * lattice.losses
    top = float(exponent.max())
    weight = np.exp(exponent - top)
    total = float(weight.sum())
    return top + math.log(total), weight / total


def _log_moment(lattice: Lattice, tilt: float) -> float:
    """Log Σ mass·e^{θ·loss} over the finite losses."""
    exponent = lattice.log_mass + tilt * lattice.losses
    top = float(exponent.max())
    exponent -= top
    return top + math.log(float(np.exp(exponent, out=exponent).sum()))


def _tilt_for(parts: list[Part], epsilon: float, guess: float) -> float:
    """The θ ≥ 0 at which the tilted sum has mean `epsilon`, roughly; 0 if its mean is above already."""
    low, high = 0.0, math.inf
    theta = max(guess, 1e-3)
    for _ in range(60):
        _, mean, variance = _cumulants(parts, theta)
        if abs(mean - epsilon) <= 0.25 * math.sqrt(variance) or high - low < 1e-6 * high:
            break
        low, high = (theta, high) if mean < epsilon else (low, theta)
        newton = theta + (epsilon - mean) / variance if variance > 0 else math.inf
        middle = (low + high) / 2 if math.isfinite(high) else 4 * low
        theta = newton if low < newton < min(high, 8 * theta) else middle
        if theta < 1e-6:
            return 0.0
        if theta > 1e6:
            break
    return theta


def _factor(tilt: float) -> float:
    """c(θ) = sup_u≥0 e^{−θu}(1 − e^{−u}): no term of the sum in `_Tilted.delta` is larger."""
    if tilt == 0:
        return 1.0
    return math.exp(tilt * math.log(tilt / (1 + tilt))) / (1 + tilt)


@dataclass(frozen=True)
class _Tilted:
    """The tilted distribution of a sum of losses, on a window around its mean.

    Attributes:
        tilt: θ.
        cumulant: K(θ).
        mean: K′(θ).
        deviation: √K″(θ).
        losses: The window's points, ascending, shape [n].
        mass: Tilted mass at each point; float noise below zero is cut, shape [n].
        error: Bound on the sum over all points of |mass − truth|.
        relative: Bound on the relative error of the rest: weights, K(θ), and products of many factors.
        infinite: Untilted mass at +∞.
    """

    tilt: float
    cumulant: float
    mean: float
    deviation: float
    losses: FloatArray
    mass: FloatArray
    error: float
    relative: float
    infinite: float

    @classmethod
    def compose(cls, parts: list[Part], tilt: float) -> _Tilted:
        cumulant, mean, variance = _cumulants(parts, tilt)
        h = parts[0][0].h
        below, above = _window(parts, tilt, (cumulant, mean, variance))
        size = fft.next_fast_len(max(16, int((below + above) / h) + 4), real=True)
        outside = 2 * _OUTSIDE
        if size > MOST_POINTS:  # keep what fits; what falls outside is bounded by Chebyshev
            size = fft.next_fast_len(MOST_POINTS, real=True)
            outside = min(1.0, 4 * variance / (size * h) ** 2)
            below = above = size * h / 2
        transform_error = 4 * UNIT * math.log2(size)
        shift, relative = 0, 0.0
        log_size, relative_error = np.zeros(size // 2 + 1), np.zeros(size // 2 + 1)
        factors: list[tuple[npt.NDArray[np.complex128], int]] = []
        for lattice, count in parts:
            _, weight = _tilted_mass(lattice, tilt)
            centre = round(float(weight @ np.arange(len(weight))))
            indices = (np.arange(len(weight)) - centre) % size
            factor = fft.rfft(np.bincount(indices, weight, size))
            magnitude = np.maximum(np.abs(factor), transform_error)
            log_magnitude = np.log(magnitude)
            log_size += count * log_magnitude
            relative_error += count * (transform_error / magnitude + UNIT * (8 - log_magnitude))
            factors.append((factor, count))
            shift += count * (lattice.first + centre)
            relative += count * UNIT * (8 + tilt * float(np.abs(lattice.losses[[0, -1]]).max()))
        # Of many factors most of the product is nothing: what is below e⁻⁵⁰ is left out, and charged.
        kept = log_size > -50
        spectrum = np.zeros(size // 2 + 1, dtype=np.complex128)
        spectrum[kept] = np.prod([factor[kept] ** count for factor, count in factors], axis=0)
        # The factors' errors, the inverse transform's, and what was left out.
        errors = np.exp(log_size[kept]) * (relative_error[kept] + transform_error)
        error_at_point = 2 * float(errors.sum()) / size + math.exp(-50) + transform_error / size
        raw = fft.irfft(spectrum, size)
        bottom = math.floor((mean - below) / h)
        window = bottom + np.arange(size)
        return cls(
            tilt,
            cumulant,
            mean,
            math.sqrt(variance),
            window.astype(np.float64) * h,
            np.maximum(raw[(window - shift) % size], 0),
            outside + size * error_at_point,
            relative + UNIT * (64 + abs(cumulant) + tilt * abs(mean)) + size * UNIT,
            _infinite(parts),
        )

    def delta(self, epsilon: float, *, upper: bool) -> float:
        """Bound δ at `epsilon`, from above or from below."""
        start = int(np.searchsorted(self.losses, epsilon, side="right"))
        excess = self.losses[start:] - epsilon
        with np.errstate(under="ignore"):
            terms = self.mass[start:] * np.exp(-self.tilt * excess) * -np.expm1(-excess)
        error = self.error * _factor(self.tilt)
        total = float(terms.sum()) + (error if upper else -error)
        if total <= 0:
            return 0.0
        exponent = self.cumulant - self.tilt * epsilon + math.log(total)
        value = math.exp(min(exponent + (self.relative if upper else -self.relative), 0.0))
        return min(1.0, value + self.infinite) if upper else value

    def epsilon(self, delta: float, *, upper: bool) -> tuple[float, bool]:
        """The ε ≥ 0 at which the bound on δ passes `delta`, on the safe side of the root.

        Returns:
            (ε, True); or, if the root is further than five deviations from the mean, where this tilt tells
            little, (the end of that interval on the root's side, False).
        """
        log_delta = math.log(delta)

        def excess(epsilon: float) -> float:
            return math.log(max(self.delta(epsilon, upper=upper), 1e-320)) - log_delta

        # From the top down, because errors weigh more the further ε lies below the mean.
        above = self.mean + 5 * self.deviation
        if above <= 0:
            return 0.0, upper
        probes = np.linspace(above, max(0.0, self.mean - 5 * self.deviation), 11)
        passed = next((i for i, epsilon in enumerate(probes) if excess(epsilon) > 0), None)
        if passed is None:
            return float(probes[-1]), bool(probes[-1] == 0 and (upper or self.tilt == 0))
        if passed == 0:
            return float(above), False
        low, high = float(probes[passed]), float(probes[passed - 1])
        root = float(optimize.brentq(excess, low, high, xtol=1e-13, rtol=1e-9))
        # brentq's answer may lie on either side; step over to the safe one.
        step = (1e-9 * root + 1e-12) * (1 if upper else -1)
        for _ in range(40):
            if (excess(root) <= 0) == upper:
                return root, True
            root, step = max(0.0, root + step), 2 * step
        return high if upper else low, True


def _window(parts: list[Part], tilt: float, cumulants: tuple[float, float, float]) -> tuple[float, float]:
    """Distances below and above the mean outside which the tilted sum has mass below `_OUTSIDE` each.

    Chernoff's bound: P(S ≥ mean + w) ≤ exp(K(θ+t) − K(θ) − t(mean + w)) for every t > 0, likewise below.
    """
    value, mean, variance = cumulants
    deviation = math.sqrt(variance)
    log_target = -math.log(_OUTSIDE)
    range_below = mean - sum(k * float(lattice.losses[0]) for lattice, k in parts)
    range_above = sum(k * float(lattice.losses[-1]) for lattice, k in parts) - mean
    if deviation <= 0:
        return max(range_below, 0.0), max(range_above, 0.0)
    ends = []
    for sign, limit in ((-1, range_below), (1, range_above)):
        best = limit
        for t in np.array([0.4, 0.9]) * math.sqrt(2 * log_target) / deviation:
            moved = sum(k * _log_moment(lattice, tilt + sign * t) for lattice, k in parts)
            best = min(best, (moved - value - sign * t * mean + log_target) / t)
        ends.append(max(best, 0.0))
    return ends[0], ends[1]
