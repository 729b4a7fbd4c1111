"""Privacy losses of the elementary mechanisms: exact masses on a lattice of losses.

For a dominating pair (P, Q), the privacy loss is L = log(P/Q) under P. Here P is the mixture
(1−q)·f(x) + q·f(x−1) of a noise density f, and Q is f itself: the pair for *removing* a record. The
pair for *adding* one is (Q, P), whose losses are the negatives; both are read off the same masses.

`Cells` holds P and Q masses of the loss intervals (j·h, (j+1)·h]. From them come two lattices:

- `upper`: in every cell the mass is spread to the cell's two ends so that P and Q masses are kept
  ("connect the dots", Doroshenko et al. 2022). Spreading the likelihood ratio with its mean kept makes
  the pair easier to tell apart (Blackwell), so every δ(ε) from it is an upper bound.
- `lower`: every cell is first gathered at one point, the logarithm of its mean likelihood ratio: that is
  post-processing, the observer is told the cell alone. Two neighbouring cells make one interval of a
  lattice of width 2h. Each of the two points is then assigned at random to the interval's lower or upper
  end, with probabilities chosen such that the mean likelihood ratio of what arrives at each lattice point is
  the ratio that the point stands for, or above it. That is post-processing again, and rounding down.
  So every δ(ε) from it is a lower bound, and like the upper one it is off by a second-order amount.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri_exp

from accounting.events import Atom

FloatArray = npt.NDArray[np.float64]
Direction = Literal["remove", "add"]
UNIT = 2.0**-53
_UNDERFLOW = 1e-290
# How much the lower lattice mixes: 0 loses the least variance, more copes with steeper densities.
_MIXING = 0.1


@dataclass(frozen=True)
class Lattice:
    """A (sub-)distribution of privacy losses on the points (first + i)·h.

    Attributes:
        h: Distance of the points.
        first: Index of the first point.
        mass: P mass at each point, shape [n].
        infinite: P mass at loss +∞.
    """

    h: float
    first: int
    mass: FloatArray
    infinite: float

    @cached_property
    def losses(self) -> FloatArray:
        """The points, shape [n]."""
        return np.asarray((self.first + np.arange(len(self.mass))) * self.h, dtype=np.float64)

    @cached_property
    def log_mass(self) -> FloatArray:
        """Log of the masses, −∞ where there is none, shape [n]."""
        empty = np.full(len(self.mass), -np.inf)
        return np.asarray(np.log(self.mass, where=self.mass > 0, out=empty))


@dataclass(frozen=True)
class Cells:
    """P and Q masses of the loss intervals (j·h, (j+1)·h], j = first, first+1, …, in one direction.

    Attributes:
        h: Width of a cell.
        first: Index j of the first cell, even.
        p: P masses, shape [n], n even.
        q: Q masses, shape [n].
        slack: Bound on the float error of log(p/q), shape [n].
        p_below: P mass of losses below the first cell.
        p_above: P mass of losses above the last cell.
    """

    h: float
    first: int
    p: FloatArray
    q: FloatArray
    slack: FloatArray
    p_below: float
    p_above: float

    @cached_property
    def _position(self) -> FloatArray:
        """Log of the mean likelihood ratio, relative to the cell's lower edge."""
        known = (self.p > 0) & (self.q > 0)  # elsewhere the slack is infinite, or there is no mass
        ratio = np.log(self.p, where=known, out=np.zeros_like(self.p))
        ratio -= np.log(self.q, where=known, out=np.zeros_like(self.q))
        return np.asarray(ratio - (self.first + np.arange(len(self.p))) * self.h)

    def upper(self) -> Lattice:
        """A lattice of width h whose δ(ε) is an upper bound for every ε."""
        position = np.clip(self._position + self.slack, 0, self.h)
        to_upper = self.p * np.expm1(-position) / np.expm1(-self.h)
        mass = np.zeros(len(self.p) + 1)
        mass[:-1] += self.p - to_upper
        mass[1:] += to_upper
        mass[0] += self.p_below
        return Lattice(self.h, self.first, np.maximum(mass, 0), self.p_above)

    def lower(self) -> Lattice:
        """A lattice of width 2h whose δ(ε) is a lower bound for every ε.

        Mass below the first cell is dropped (moved to −∞), mass above the last is moved into it.
        """
        # p1, p2: masses of an interval's two points; p·(1 − e^{−u}) and p·(e^{2h−u} − 1), with u the distance
        # from the interval's lower end, say how far they pull the mean ratio above or below an end.
        position = np.clip(self._position - self.slack, 0, self.h)
        u1, u2 = position[0::2], position[1::2] + self.h
        p1, p2 = self.p[0::2], self.p[1::2]
        lift1, lift2 = -p1 * np.expm1(-u1), -p2 * np.expm1(-u2)
        pull1, pull2 = p1 * np.expm1(2 * self.h - u1), p2 * np.expm1(2 * self.h - u2)
        # At every lattice point, what the interval above lifts must cover what the interval below pulls.
        lifted = np.append((1 - _MIXING) * lift1 + _MIXING * lift2, 0.0)
        pulled = np.append(0.0, _MIXING * pull1 + (1 - _MIXING) * pull2)
        balance = np.sqrt(lifted * pulled)
        balance[:-1] = np.minimum(balance[:-1], lift1 + lift2)
        up1, up2 = _assign(lift1, lift2, pull1, pull2, balance)
        mass = np.zeros(len(p1) + 1)
        mass[:-1] += p1 * (1 - up1) + p2 * (1 - up2)
        mass[1:] += p1 * up1 + p2 * up2
        mass[-1] += self.p_above
        return Lattice(2 * self.h, self.first // 2, mass, 0.0)


def _assign(
    lift1: FloatArray, lift2: FloatArray, pull1: FloatArray, pull2: FloatArray, balance: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return probabilities of moving the two points of each interval up.

    With them an interval lifts its lower end by at least `balance` there and pulls its upper end by at most
    `balance` there; with equality where possible.
    """
    wanted_lift, wanted_pull = balance[:-1], balance[1:]
    # Solve lift·(1 − up) = wanted_lift and pull·up = wanted_pull.
    spare = lift1 + lift2 - wanted_lift
    determinant = lift1 * pull2 - lift2 * pull1
    solvable = determinant < -_UNDERFLOW
    safe = np.where(solvable, determinant, -1.0)
    up1 = (spare * pull2 - lift2 * wanted_pull) / safe
    up2 = (lift1 * wanted_pull - spare * pull1) / safe
    exact = solvable & (up1 >= 0) & (up1 <= 1) & (up2 >= 0) & (up2 <= 1)
    # Otherwise keep the lower point down, and move the upper one up as far as both conditions allow.
    by_lift = np.divide(spare, lift2, where=lift2 > _UNDERFLOW, out=np.zeros_like(spare))
    by_pull = np.divide(wanted_pull, pull2, where=pull2 > _UNDERFLOW, out=np.zeros_like(spare))
    partly = np.clip(np.minimum(by_lift, by_pull), 0, 1)
    return np.where(exact, up1, 0.0), np.where(exact, up2, partly)


def loss_range(atom: Atom, log_tail: float) -> tuple[float, float]:
    """Ends of the losses (removal) outside which P and Q have mass below exp(log_tail) on either side."""
    base = _base_range(atom, log_tail)
    return _mixture_loss(base[0], atom.q), _mixture_loss(base[1], atom.q)


def cells(atom: Atom, h: float, log_tail: float, direction: Direction) -> Cells:
    """Cut the losses of `atom` into cells of width `h`.

    Args:
        atom: A noise, sampled or not.
        h: Width of a cell, above 0.
        log_tail: log of the mass that may be cut off at either end (it is kept in p_below and p_above).
        direction: "remove" for the pair (mixture, noise), "add" for (noise, mixture).
    """
    low, high = loss_range(atom, log_tail)
    # One interval more at either end, so that rounding of the range cannot cut off a mass.
    first, last = 2 * int(np.floor(low / (2 * h))) - 2, 2 * int(np.ceil(high / (2 * h))) + 2
    edges = _base_loss(np.arange(first, last + 1, dtype=np.float64) * h, atom.q)
    (m0, below0, above0), (m1, below1, above1), slack = _masses(atom, edges)
    mixture = (1 - atom.q) * m0 + atom.q * m1
    if direction == "remove":
        below, above = (
            (1 - atom.q) * below0 + atom.q * below1,
            (1 - atom.q) * above0 + atom.q * above1,
        )
        return Cells(h, first, mixture, m0, slack, below, above)
    return Cells(h, -last, m0[::-1], mixture[::-1], slack[::-1], above0, below0)


def _mixture_loss(base_loss: float, q: float) -> float:
    """log(1 − q + q·e^loss)."""
    if q == 1:
        return base_loss
    if abs(base_loss) < 1:  # log1p keeps relative precision where the loss is tiny
        return float(np.log1p(q * np.expm1(base_loss)))
    return float(np.logaddexp(np.log1p(-q), np.log(q) + base_loss))


def _base_loss(loss: FloatArray, q: float) -> FloatArray:
    """The inverse of `_mixture_loss`; −∞ where the mixture never gets so low."""
    if q == 1:
        return loss
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        small = np.log1p(np.maximum(np.expm1(np.minimum(loss, 30)) / q, -1))
        large = loss + np.log1p(-(1 - q) * np.exp(-loss)) - np.log(q)
    return np.where(loss > 1, large, small)


def _base_range(atom: Atom, log_tail: float) -> tuple[float, float]:
    rate = 1 / atom.scale
    if atom.noise == "laplace":
        return -rate, rate
    z = -float(ndtri_exp(log_tail))
    return -rate * z - rate**2 / 2, rate * z + rate**2 / 2


Masses = tuple[FloatArray, float, float]


def _masses(atom: Atom, edges: FloatArray) -> tuple[Masses, Masses, FloatArray]:
    """Masses under f(x) and under f(x−1) of the base-loss intervals between `edges`.

    Returns:
        (cells, below, above) for f(x), the same for f(x−1), and a bound on the relative float error of
        a cell's mass, shape [n], infinite where masses underflow. An interval includes its upper edge.
    """
    if atom.noise == "laplace":
        return _laplace_masses(1 / atom.scale, edges)
    mu = 1 / atom.scale
    noise, slack0 = _normal_masses(edges / mu + mu / 2)
    shifted, slack1 = _normal_masses(edges / mu - mu / 2)
    return noise, shifted, slack0 + slack1


def _normal_masses(z: FloatArray) -> tuple[Masses, FloatArray]:
    """Standard normal masses between the points `z`, from whichever tail is the smaller."""
    left, right = ndtr(z), ndtr(-z)
    use_left = z[1:] <= 0
    mass = np.where(use_left, np.diff(left), -np.diff(right))
    near = np.where(use_left, left[1:], right[:-1])
    size = np.where(np.isfinite(z), np.abs(z), 0)
    density = np.exp(-0.5 * np.minimum(size[1:], size[:-1]) ** 2) * 0.4
    error = 8 * UNIT * (near + density * np.maximum(size[1:], size[:-1]))
    with np.errstate(divide="ignore", invalid="ignore"):
        slack = np.where(mass > _UNDERFLOW, error / mass, np.inf)
    return (np.maximum(mass, 0), float(left[0]), float(right[-1])), slack


def _laplace_masses(rate: float, edges: FloatArray) -> tuple[Masses, Masses, FloatArray]:
    """The loss is −rate for x ≤ 0, rate·(2x − 1) between, and rate for x ≥ 1."""
    # Losses at the ends are atoms; the widening keeps float rounding from splitting them off.
    inside = np.clip((edges / rate + 1) / 2, 0, 1)
    below = edges < -rate * (1 - 4 * UNIT)
    above = edges >= rate * (1 - 4 * UNIT)
    survival0 = np.where(below, 1.0, np.where(above, 0.0, 0.5 * np.exp(-rate * inside)))
    cdf1 = np.where(below, 0.0, np.where(above, 1.0, 0.5 * np.exp(-rate * (1 - inside))))
    m0, m1 = -np.diff(survival0), np.diff(cdf1)
    with np.errstate(divide="ignore", invalid="ignore"):
        slack = 8 * UNIT * (1 + rate) * (survival0[:-1] / m0 + cdf1[1:] / m1)
    slack = np.where((m0 > _UNDERFLOW) & (m1 > _UNDERFLOW), slack, np.inf)
    return (m0, 0.0, 0.0), (m1, 0.0, 0.0), slack
