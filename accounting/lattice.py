"""Privacy losses on a lattice: certified from above and from below.

For two output distributions (P, Q), the privacy loss is L = log(P/Q) under P. The directions are "remove"
(P has the record) and "add" (Q has it). `Cells` holds P and Q masses of the loss intervals
(j·h, (j+1)·h], exact but for rounding. From them come two lattices:

- `upper`, of width h: in every cell the mass is spread to the cell's two ends so that P and Q masses are kept
  ("connect the dots", Doroshenko et al. 2022). Spreading the likelihood ratio with its mean kept makes
  the pair easier to tell apart (Blackwell), so every δ(ε) from it is an upper bound.
- `lower`: every cell is gathered at one point, its mean likelihood ratio: that is post-processing, the
  observer is told the cell alone. The lattice's points are the middles of the cells, and a cell's mean is off
  its middle by very little. Where it lies below, some mass of the cell above is added to the point, and where
  it lies above, some of the cell below, so that the mean of what arrives is what the point stands for. That
  is post-processing again. Where there is not enough to add, the mass is rounded down. So every δ(ε) from it
  is a lower bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from accounting.atoms import Atom
from accounting.pairs import UNIT, FloatArray, Masses

Direction = Literal["remove", "add"]
_UNDERFLOW = 1e-290
_BELOW = 1e-9


@dataclass(frozen=True)
class Lattice:
    """A (sub-)distribution of privacy losses on the points (first + i)·h + offset.

    Attributes:
        h: Distance of the points.
        first: Index of the first point.
        mass: P mass at each point, shape [n].
        infinite: P mass at loss +∞.
        offset: What every point is moved by.
    """

    h: float
    first: int
    mass: FloatArray
    infinite: float
    offset: float = 0.0

    @cached_property
    def losses(self) -> FloatArray:
        """The points, shape [n]."""
        points = (self.first + np.arange(len(self.mass))) * self.h + self.offset
        return np.asarray(points, dtype=np.float64)

    @cached_property
    def log_mass(self) -> FloatArray:
        """Log of the masses, −∞ where there is none, shape [n]."""
        empty = np.full(len(self.mass), -np.inf)
        return np.asarray(np.log(self.mass, where=self.mass > 0, out=empty))


@dataclass(frozen=True)
class Cells:
    """P and Q masses of the loss intervals (edge, edge + h], in one direction.

    Attributes:
        h: Width of a cell.
        first: The first cell's lower edge is (first + shift)·h.
        shift: 0, or −1/2 if the middles of the cells are to lie at multiples of h.
        p: P masses, shape [n].
        q: Q masses, shape [n].
        slack: Bound on the float error of log(p/q), shape [n].
        p_below: P mass of losses below the first cell.
        p_above: P mass of finite losses above the last cell.
        p_infinite: P mass of loss +∞.
        p_zero: P mass, and Q mass, of loss exactly 0, beside what the cells hold.
    """

    h: float
    first: int
    shift: float
    p: FloatArray
    q: FloatArray
    slack: FloatArray
    p_below: float = 0.0
    p_above: float = 0.0
    p_infinite: float = 0.0
    p_zero: float = 0.0

    @cached_property
    def _inverse_ratio(self) -> tuple[FloatArray, FloatArray]:
        """e^{−u}, with u the log of the mean ratio p/q relative to the cell's lower edge, and its error."""
        edges = (self.first + self.shift + np.arange(len(self.p))) * self.h
        size = np.abs(edges)
        known = (self.p > _UNDERFLOW) & (self.q > _UNDERFLOW) & (size < 700)
        ratio = np.divide(self.q, self.p, where=known, out=np.zeros_like(self.p))
        # e^edge carries the rounding of its argument.
        error = np.where(known, self.slack + UNIT * (8 + 2 * size), 1.0)
        return ratio * np.exp(np.clip(edges, -700, 700)), error

    def upper(self) -> Lattice:
        """A lattice at the cells' edges whose δ(ε) is an upper bound for every ε."""
        inverse, error = self._inverse_ratio
        inverse = np.clip(inverse * np.maximum(1 - error, 0), math.exp(-self.h), 1)
        to_upper = self.p * (1 - inverse) / -math.expm1(-self.h)
        mass = np.zeros(len(self.p) + 1)
        mass[:-1] += self.p - to_upper
        mass[1:] += to_upper
        mass[0] += self.p_below
        if self.p_zero:
            mass[-self.first] += self.p_zero
        infinite = self.p_above + self.p_infinite
        return Lattice(self.h, self.first, np.maximum(mass, 0), infinite, self.shift * self.h)

    def lower(self) -> Lattice:
        """A lattice at the cells' middles whose δ(ε) is a lower bound for every ε.

        Mass below the first cell is dropped (moved to −∞), mass above the last is moved into it.
        """
        h = self.h
        inverse, error = self._inverse_ratio
        inverse = np.where(error < 1, inverse * (1 + error), 1.0)
        # The points lie a billionth of h lower than the middles, so that float errors do not count.
        inverse = np.clip(inverse, math.exp(-h), 1) * math.exp(h / 2 - _BELOW * h)
        # By how much a cell's mass lifts (+) the mean ratio at its own point, at the point below, and
        # pulls it down at the point above.
        own = self.p * (1 - inverse)
        lift = self.p * (1 - inverse * math.exp(-h))
        pull = self.p * (inverse * math.exp(h) - 1)
        need, spare = np.maximum(-own, 0), np.maximum(own, 0)
        down, up = np.zeros_like(own), np.zeros_like(own)
        np.divide(need[:-1], lift[1:], where=lift[1:] > _UNDERFLOW, out=down[1:])
        np.divide(spare[1:], pull[:-1], where=pull[:-1] > _UNDERFLOW, out=up[:-1])
        np.minimum(down, 0.5, out=down)
        np.minimum(up, 0.5, out=up)
        # What moves away does not lift its own point.
        up[:-1] *= 1 - down[1:] - up[1:]
        lifted = np.append(down[1:] * lift[1:], 0.0)
        stay = 1 - down - up
        enough = np.divide(lifted, need, where=need > _UNDERFLOW, out=np.where(need > 0, 0.0, 1.0))
        kept = np.minimum(stay, enough)
        down += stay - kept
        mass = np.zeros(len(own) + 2)
        mass[1:-1] += self.p * kept
        mass[:-2] += self.p * down
        mass[2:] += self.p * up
        mass[-2] += self.p_above
        offset = (self.shift + 0.5 - _BELOW) * h - 4 * UNIT  # for the rounding of `own`, `lift` and `pull`
        return Lattice(h, self.first - 1, np.maximum(mass, 0), self.p_infinite, offset)


# ---------------------------------------------------------------- cutting an atom's losses into cells


def loss_range(atom: Atom, log_tail: float) -> tuple[float, float]:
    """Ends of the losses (removal) outside which P and Q have mass below exp(log_tail) on either side."""
    low, high = atom.pair.loss_range(log_tail)
    if atom.sampling == "none":
        return low, high
    # Large losses come from samples with the record alone.
    high = atom.pair.loss_range(min(log_tail - math.log(atom.q), -2.0))[1]
    # Mass that only m0 has, and all mass at very low base losses, is at log(1 − q).
    only0 = atom.sampled_has_only0
    bottom = math.log1p(-atom.q) if only0 else _mixture_loss(low, atom.q)
    top = _mixture_loss(high, atom.q)
    if atom.sampling == "poisson":
        return bottom, top
    return -top, top  # the pair for fixed sizes is made of the upper half and its mirror image


def cells(
    atom: Atom, h: float, log_tail: float, direction: Direction, *, centred: bool = False, upper: bool = True
) -> Cells:
    """Cut the losses of `atom` into cells of width `h`.

    Args:
        atom: A mechanism with a pair, sampled or not.
        h: Width of a cell, above 0.
        log_tail: log of the mass that may be cut off at either end (it is kept in p_below and p_above).
        direction: "remove" for the pair (with the record, without), "add" for its mirror image.
        centred: Whether the cells' middles, instead of their edges, lie at multiples of h.
        upper: Which lattice will be made of the cells, where the pair is known within bounds only.
    """
    shift = -0.5 if centred else 0.0
    if atom.sampling == "fixed-size":
        return _fixed_size_cells(atom, h, log_tail, shift, upper=upper)
    low, high = loss_range(atom, log_tail)
    # One cell more at either end, so that rounding of the range cannot cut off a mass.
    first, last = math.floor(low / h - shift) - 1, math.ceil(high / h - shift) + 1
    edges = np.arange(first, last + 1, dtype=np.float64) * h + shift * h
    m = _base_masses(atom, edges, upper=upper)
    q = atom.q
    mixture = m.m1 if q == 1 else (1 - q) * m.m0 + q * m.m1
    if direction == "remove":
        below, above = ((1 - q) * m0 + q * m1 for m0, m1 in (m.below, m.above))
        return Cells(h, first, shift, mixture, m.m0, m.slack, below, above, q * m.only1)
    only0 = m.only0 if q == 1 else 0.0
    mirrored = -last if shift == 0 else 1 - last
    return Cells(h, mirrored, shift, m.m0[::-1], mixture[::-1], m.slack[::-1], m.above[0], m.below[0], only0)


def _base_masses(atom: Atom, edges: FloatArray, *, upper: bool) -> Masses:
    """Masses of m0 and m1 where the mixture's loss lies between `edges`."""
    if atom.q == 1:
        return atom.pair.masses(edges, upper=upper)
    base = _base_loss(edges, atom.q)
    m = atom.pair.masses(base, upper=upper)
    if m.only0:  # its loss is finite once the record may be missing from the sample: log(1 − q)
        m.m0[max(0, int(np.searchsorted(base, -np.inf, side="right")) - 1)] += m.only0
    return m


def _fixed_size_cells(atom: Atom, h: float, log_tail: float, shift: float, *, upper: bool) -> Cells:
    """The pair for a sample of fixed size without replacement, under replace-one.

    Zhu, Dong & Wang 2022, Theorem 11 (3): the profile is that of (mixture, m0) for ε ≥ 0 and that of
    (m1, mixture') for ε < 0, with mixture' = (1−q)·m1 + q·m0. It is convex, hence the profile of one pair:
    the positive losses of the first, the negative losses of the second (for pairs that are their own mirror
    image, the negated losses of the first), and what is left of either mass at loss 0.
    """
    _, high = loss_range(atom, log_tail)
    last = math.ceil(high / h - shift) + 1
    edges = np.arange(last + 1, dtype=np.float64) * h + shift * h
    m = _base_masses(atom, np.maximum(edges, 0), upper=upper)
    q = atom.q
    mixture = (1 - q) * m.m0 + q * m.m1
    above = (1 - q) * m.above[0] + q * m.above[1]
    zero = max(0.0, 1.0 - math.fsum(mixture) - math.fsum(m.m0) - m.above[0] - above - q * m.only1)
    # P of the negative losses is Q of the positive ones, and the other way round.
    if shift == 0:
        p, other = np.concatenate([m.m0[::-1], mixture]), np.concatenate([mixture[::-1], m.m0])
        slack = np.concatenate([m.slack[::-1], m.slack])
        return Cells(h, -last, 0.0, p, other, slack, m.above[0], above, q * m.only1, zero)
    # The cell around 0 holds a bit of either side.
    centre = np.array([m.m0[0] + mixture[0] + max(0.0, zero - 64 * UNIT)])
    p = np.concatenate([m.m0[:0:-1], centre, mixture[1:]])
    other = np.concatenate([mixture[:0:-1], centre, m.m0[1:]])
    slack = np.concatenate([m.slack[:0:-1], [0.0], m.slack[1:]])
    return Cells(h, 1 - last, shift, p, other, slack, m.above[0], above, q * m.only1)


def _mixture_loss(base_loss: float, q: float) -> float:
    """log(1 − q + q·e^loss)."""
    if q == 1:
        return base_loss
    if abs(base_loss) < 1:  # log1p keeps relative precision where the loss is tiny
        return float(np.log1p(q * np.expm1(base_loss)))
    return float(np.logaddexp(np.log1p(-q), np.log(q) + base_loss))


def _base_loss(loss: FloatArray, q: float) -> FloatArray:
    """The inverse of `_mixture_loss`; −∞ where the mixture never gets so low."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        small = np.log1p(np.maximum(np.expm1(np.minimum(loss, 30)) / q, -1))
        if loss[-1] <= 1:
            return np.asarray(small)
        large = loss + np.log1p(-(1 - q) * np.exp(-loss)) - np.log(q)
    return np.where(loss > 1, large, small)
