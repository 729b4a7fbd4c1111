"""Sums of privacy losses, tilted towards the question.

Losses add up under composition, so their distributions convolve, which is a product of Fourier transforms.
Before that they are tilted: multiplied by e^{θ·loss} and normalised, with θ chosen so that the mean of
the tilted sum lies near the ε in question. This has three effects:

- The hockey-stick divergence becomes e^{K(θ)−θε} · Σ tilted(s)·e^{−θ(s−ε)}(1 − e^{−(s−ε)}), where K is the
  cumulant generating function and every term is positive and at most c(θ) (see `factor`). The factor in
  front times c(θ) is the Rényi bound of order 1 + θ. So every error that is made in the tilted sum
  (rounding of the FFT, mass that falls outside of the window and wraps around) is an error relative to
  the Rényi bound, however small δ is.
- The window needs to be only a few standard deviations of the tilted sum wide.
- The width of lattice and window follow from the question, which keeps them to a few thousand points.

Sources: Sommer, Meiser & Mohammadi 2019 (losses and their convolution); Koskela, Jälkö & Honkela 2020 (FFT).
The tilted sum is the saddle-point view of Alghamdi et al. 2023, evaluated exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft, optimize

from accounting.lattice import Lattice
from accounting.pairs import UNIT, FloatArray

Part = tuple[Lattice, int]
MOST_POINTS = 2**20
_LOG_OUTSIDE = math.log(1e-7)  # tilted mass that may fall outside of the window on either side


def factor(tilt: float) -> float:
    """c(θ): the largest value of e^{−θu}(1 − e^{−u}) over u ≥ 0."""
    return math.exp(tilt * math.log(tilt / (1 + tilt))) / (1 + tilt) if tilt > 0 else 1.0


def infinite_mass(parts: Sequence[Part]) -> float:
    """Mass of the composition at loss +∞."""
    return -math.expm1(math.fsum(k * math.log1p(-min(x.infinite, 1 - UNIT)) for x, k in parts))


def largest_loss(parts: Sequence[Part]) -> float:
    """The sum's largest finite loss: δ(ε) is the mass at +∞ from there on."""
    return math.fsum(k * float(x.losses[-1]) for x, k in parts) * (1 + 1e-12)


def _tilted_mass(lattice: Lattice, tilt: float) -> tuple[float, FloatArray]:
    """Log Σ mass·e^{θ·loss}, and the normalised terms."""
    exponent = tilt * lattice.losses
    exponent += lattice.log_mass
    top = float(exponent.max())
    exponent -= top
    weight = np.exp(exponent, out=exponent)
    total = float(weight.sum())
    weight /= total
    return top + math.log(total), weight


def log_moment(lattice: Lattice, tilt: float) -> float:
    """K(θ) of one lattice: log Σ mass·e^{θ·loss} over the finite losses."""
    exponent = tilt * lattice.losses
    exponent += lattice.log_mass
    top = float(exponent.max())
    exponent -= top
    return top + math.log(float(np.exp(exponent, out=exponent).sum()))


def log_renyi_delta(parts: Sequence[Part], tilt: float, epsilon: float) -> float:
    """Log of the Rényi bound on δ of order 1 + tilt (infinite mass aside)."""
    cumulant = sum(k * log_moment(lattice, tilt) for lattice, k in parts)
    return cumulant - tilt * epsilon + math.log(factor(tilt))


def best_tilt(parts: Sequence[Part], delta: float) -> tuple[float, float]:
    """The tilt that gives the least Rényi bound on ε at `delta`, and that bound (infinite mass aside)."""
    log_delta = math.log(delta)

    def bound(log_tilt: float) -> float:
        tilt = math.exp(log_tilt)
        return (log_renyi_delta(parts, tilt, 0.0) - log_delta) / tilt

    # Unimodal in θ: K(θ)/θ grows, the rest falls.
    found = optimize.minimize_scalar(bound, bounds=(-9.0, 16.0), method="bounded", options={"xatol": 0.05})
    return math.exp(float(found.x)), float(found.fun)


def tilt_at(parts: Sequence[Part], epsilon: float) -> float:
    """The tilt that gives the least Rényi bound on δ at `epsilon`."""

    def bound(log_tilt: float) -> float:
        return log_renyi_delta(parts, math.exp(log_tilt), epsilon)

    found = optimize.minimize_scalar(bound, bounds=(-9.0, 16.0), method="bounded", options={"xatol": 0.05})
    return math.exp(float(found.x))


@dataclass(frozen=True)
class Spectrum:
    """One lattice's tilted losses, ready to be convolved with themselves.

    Attributes:
        values: Transform of the tilted masses, rolled by `centre`, shape [size/2 + 1].
        log_size: Log of the magnitude, at least that of the transform's error.
        error: Relative error of `values`.
        centre: Index of the lattice point that was rolled to 0, counted from the lattice's offset.
    """

    values: npt.NDArray[np.complex128]
    log_size: FloatArray
    error: FloatArray
    centre: int
    cumulant: float
    mean: float
    variance: float
    widest: float
    offset: float

    @classmethod
    def of(cls, lattice: Lattice, tilt: float, size: int) -> Spectrum:
        """Tilt a lattice, and transform it on a ring of `size` points."""
        cumulant, weight = _tilted_mass(lattice, tilt)
        mean = float(weight @ lattice.losses)
        variance = float(weight @ (lattice.losses - mean) ** 2)
        centre = round((mean - lattice.offset) / lattice.h)
        start = (lattice.first - centre) % size
        rolled: FloatArray = np.zeros(size)
        if start + len(weight) <= size:
            rolled[start : start + len(weight)] = weight
        else:
            rolled += np.bincount((start + np.arange(len(weight))) % size, weight, size)
        values = fft.rfft(rolled)
        floor = 4 * UNIT * math.log2(size)
        magnitude = np.maximum(np.abs(values), floor)
        log_size = np.log(magnitude)
        widest = float(np.abs(lattice.losses[[0, -1]]).max())
        return cls(
            values, log_size, floor / magnitude, centre, cumulant, mean, variance, widest, lattice.offset
        )


@dataclass(frozen=True)
class TiltedSum:
    """The tilted distribution of a composition's loss, in a window around its mean.

    Attributes:
        tilt: θ.
        cumulant: K(θ), the log of the normaliser.
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

    def delta(self, epsilon: float, *, upper: bool) -> float:
        """Bound δ at `epsilon`, from above or from below."""
        start = int(np.searchsorted(self.losses, epsilon, side="right"))
        excess = self.losses[start:] - epsilon
        with np.errstate(under="ignore"):
            terms = self.mass[start:] * np.exp(-self.tilt * excess) * -np.expm1(-excess)
        error = self.error * factor(self.tilt)
        total = float(terms.sum()) + (error if upper else -error)
        infinite = self.infinite if upper else self.infinite * (1 - 1e-9)
        if total <= 0:
            return min(1.0, infinite)
        exponent = self.cumulant - self.tilt * epsilon + math.log(total)
        value = math.exp(min(exponent + (self.relative if upper else -self.relative), 0.0))
        return min(1.0, value + infinite)

    def epsilon(self, delta: float, *, upper: bool) -> tuple[float, bool]:
        """The ε ≥ 0 at which the bound on δ passes `delta`, on the safe side of the root.

        Between two points of the lattice, δ is linear in e^ε: a sum over the losses above. So the root is
        found in closed form, after the sums above each point.

        Returns:
            (ε, True); or, if the root is so far from the mean (about five deviations) that this tilt tells
            little, (the end of that interval on the root's side, False).
        """
        # Five deviations; more where all mass is at one point, less where e^{θ·reach} would not be a float.
        reach = min(max(5 * self.deviation, 6 / (1 + self.tilt)), 600 / (1 + self.tilt))
        lowest, highest = max(0.0, self.mean - reach), self.mean + reach
        if highest <= 0:
            return 0.0, upper
        start = max(0, int(np.searchsorted(self.losses, lowest, side="right")) - 1)
        losses, mass = self.losses[start:], self.mass[start:]
        target = delta - (self.infinite if upper else self.infinite * (1 - 1e-9))
        if target <= 0:
            return math.inf, True
        # All relative to e^{K − θ·centre}.
        centre = min(max(self.mean, lowest), float(losses[-1]))
        log_target = math.log(target) - self.cumulant + self.tilt * centre
        goal = math.exp(min(max(log_target + (-self.relative if upper else self.relative), -700.0), 700.0))
        x = losses - centre
        with np.errstate(under="ignore", over="ignore"):
            weight = mass * np.exp(np.minimum(-self.tilt * x, 700))
            decay = np.exp(np.clip(-x, -700, 700))
            above = np.append(np.cumsum(weight[::-1])[::-1], 0.0)[1:]
            weight *= decay
            below = np.append(np.cumsum(weight[::-1])[::-1], 0.0)[1:]
            error = self.error * factor(self.tilt) * np.exp(np.minimum(-self.tilt * x, 700))
            # Rounding of the sums, and of the difference.
            error = error + UNIT * (8 + len(x)) * (above + below / decay)
            value = above - below / decay + (error if upper else -error)
        reached = np.nonzero(value > goal if upper else value >= goal)[0]
        if not len(reached):
            if losses[0] <= 0:  # even at ε = 0 the bound is met
                return 0.0, True
            return float(lowest), False
        i = int(reached[-1])
        if i + 1 < len(x) and below[i] > 0:
            signed = above[i] + (error[i] if upper else -error[i]) - goal
            root = math.log(max(signed, 1e-320)) - math.log(below[i])
            root = min(max(root, float(x[i])), float(x[i + 1]))
        elif upper:  # above the window there is nothing but the error, which falls like e^{−θx}
            beyond = math.log(max(self.error, 1e-300)) + math.log(factor(self.tilt)) - math.log(goal)
            root = max(float(x[-1]), beyond / self.tilt) if self.tilt > 0 else math.inf
        else:
            root = float(x[i])
        margin = 1e-12 * (1 + abs(centre)) * (1 if upper else -1)
        found = max(0.0, centre + root + margin)
        return found, lowest <= found <= highest or (i + 1 >= len(x) and not upper)


_REACH = np.array([0.95, 0.6, 1.5, 0.3, 0.15, 0.08, 0.04])


@dataclass(frozen=True)
class Repetition:
    """The tilted sum of any number of runs of the same parts, up to a largest number.

    Attributes:
        tilt: θ.
        parts: One run.
        mean: K′(θ) of one run.
        variance: K″(θ) of one run.
        reaches: For each side and each t: (t, what K(θ ± t) exceeds its tangent by, for one run).
        limits: How far one run's losses reach below and above the mean.
    """

    tilt: float
    parts: Sequence[Part]
    mean: float
    variance: float
    reaches: tuple[list[tuple[float, float]], list[tuple[float, float]]]
    limits: tuple[float, float]

    @classmethod
    def of(cls, parts: Sequence[Part], tilt: float, most: int = 1) -> Repetition:
        """Prepare for up to `most` runs of `parts`."""
        value = mean = variance = below = above = 0.0
        for lattice, count in parts:
            cumulant, weight = _tilted_mass(lattice, tilt)
            first = float(weight @ lattice.losses)
            value += count * cumulant
            mean += count * first
            variance += count * float(weight @ (lattice.losses - first) ** 2)
            below += count * (first - float(lattice.losses[0]))
            above += count * (float(lattice.losses[-1]) - first)
        reaches: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
        deviation = math.sqrt(most * variance)
        natural = math.sqrt(-2 * _LOG_OUTSIDE)
        if deviation > 0:
            for side, sign in zip(reaches, (-1, 1), strict=True):
                for i, t in enumerate(_REACH * natural / deviation):
                    if (
                        i == 2
                        and min(most * gap / t - _LOG_OUTSIDE / t for t, gap in side)
                        < 2 * natural * deviation
                    ):
                        break  # nearly normal: what was found is near the best
                    moved = sum(k * log_moment(lattice, tilt + sign * t) for lattice, k in parts)
                    side.append((float(t), max(moved - value - sign * t * mean, 0.0)))
        return cls(tilt, parts, mean, variance, reaches, (max(below, 0.0), max(above, 0.0)))

    def window(self, runs: int) -> tuple[float, float]:
        """Distances below and above the mean outside of which `runs` runs have mass below 1e-7 each.

        Chernoff's bound: P(S ≥ mean + w) ≤ exp(K(θ+t) − K(θ) − t(mean + w)) for every t > 0, likewise below.
        """
        ends = [
            min([runs * limit, *((runs * gap - _LOG_OUTSIDE) / t for t, gap in side)])
            for side, limit in zip(self.reaches, self.limits, strict=True)
        ]
        return ends[0], ends[1]

    def size(self, runs: int) -> int:
        """Points of the transform that `runs` runs take."""
        needed = sum(self.window(runs)) / self.parts[0][0].h
        return 2 * int(fft.next_fast_len(max(8, int(min(needed, MOST_POINTS)) // 2 + 3), real=True))

    def spectra(self, size: int) -> list[tuple[Spectrum, int]]:
        """Transforms of one run's parts; several numbers of runs may share them."""
        return [(Spectrum.of(lattice, self.tilt, size), count) for lattice, count in self.parts]

    def sum(self, runs: int, spectra: Sequence[tuple[Spectrum, int]]) -> TiltedSum:
        """The tilted sum of `runs` runs."""
        below, above = self.window(runs)
        h, size = self.parts[0][0].h, 2 * len(spectra[0][0].values) - 2
        # Nothing is outside of a window that holds all losses.
        cut = [end < runs * limit for end, limit in zip((below, above), self.limits, strict=True)]
        outside = sum(cut) * math.exp(_LOG_OUTSIDE)
        if (below + above) / h + 2 > size:  # keep what fits; what falls outside is bounded by Chebyshev
            outside = min(1.0, 4 * runs * self.variance / (size * h) ** 2)
            below = size * h / 2
        repeated = [(spectrum, count * runs) for spectrum, count in spectra]
        infinite = infinite_mass([(lattice, count * runs) for lattice, count in self.parts])
        return convolve(repeated, self.tilt, h, size, runs * self.mean - below, outside, infinite)


def compose(parts: Sequence[Part], tilt: float) -> TiltedSum:
    """The tilted sum of all parts, each run as often as it says."""
    whole = Repetition.of(parts, tilt)
    return whole.sum(1, whole.spectra(whole.size(1)))


def convolve(
    spectra: Sequence[tuple[Spectrum, int]],
    tilt: float,
    h: float,
    size: int,
    bottom_loss: float,
    outside: float,
    infinite: float,
) -> TiltedSum:
    """Multiply the spectra's powers, transform back, and bound all errors on the way."""
    log_size = np.zeros(size // 2 + 1)
    cumulant = mean = variance = relative = 0.0
    shift, offset = 0, 0.0
    for s, count in spectra:
        log_size += count * s.log_size
        cumulant += count * s.cumulant
        mean += count * s.mean
        variance += count * s.variance
        shift += count * s.centre
        offset += count * s.offset
        relative += count * UNIT * (8 + tilt * s.widest)
    # Of many factors most of the product is nothing: what is below e⁻⁵⁰ is left out, and charged.
    [kept] = np.nonzero(log_size > -50)
    spectrum = np.zeros(size // 2 + 1, dtype=np.complex128)
    product = np.ones(len(kept), dtype=np.complex128)
    relative_error = np.zeros(len(kept))
    for s, count in spectra:
        product *= s.values[kept] ** count
        relative_error += count * (s.error[kept] + UNIT * (8 - s.log_size[kept]))
    spectrum[kept] = product
    # The factors' errors, the inverse transform's, and what was left out.
    transform_error = 4 * UNIT * math.log2(size)
    errors = np.exp(log_size[kept]) * (relative_error + transform_error)
    error_at_point = 2 * float(errors.sum()) / size + math.exp(-50) + transform_error / size
    raw = fft.irfft(spectrum, size)
    bottom = math.floor((bottom_loss - offset) / h)
    start = (bottom - shift) % size
    mass = np.concatenate([raw[start:], raw[:start]])
    return TiltedSum(
        tilt,
        cumulant,
        mean,
        math.sqrt(variance),
        np.asarray((bottom + np.arange(size)) * h + offset, dtype=np.float64),
        np.maximum(mass, 0, out=mass),
        outside + size * error_at_point,
        relative + UNIT * (64 + abs(cumulant) + tilt * abs(mean)) + size * UNIT,
        infinite,
    )
