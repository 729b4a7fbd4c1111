"""Mixtures of Gaussians: groups of records on a Poisson sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln, logsumexp, ndtri_exp, xlog1py, xlogy

from accounting.pairs import UNIT, FloatArray, Masses, Pair, normal_masses

_MANY = 64


@dataclass(frozen=True)
class GroupGaussianPair(Pair):
    """Gaussian noise on a Poisson sample, for a group of `size` records that all pull the same way.

    Σ_j Binomial(size, q)(j) · N(j, scale²) against N(0, scale²): Ganesh 2024, Theorem 3.1. The likelihood
    ratio grows with the output x, so intervals of the loss are intervals of x.
    """

    scale: float
    q: float
    size: int

    def _weights(self) -> tuple[FloatArray, FloatArray]:
        """Numbers of the group's records in the sample that matter, and their log probabilities."""
        j = np.arange(self.size + 1, dtype=np.float64)
        others = self.size - j
        log_weight = gammaln(self.size + 1) - gammaln(j + 1) - gammaln(others + 1)
        log_weight += xlogy(j, self.q) + xlog1py(others, -self.q)
        keep = np.ones(len(j), dtype=bool)
        if self.size > _MANY:
            # A tail is moved to its upper end, which only makes the two easier to tell apart.
            keep = np.exp(log_weight) > 1e-30
            last = int(np.nonzero(keep)[0][-1])
            log_weight[-1] = logsumexp(log_weight[min(last + 1, self.size) :])
            keep[-1] = True
        return j[keep], log_weight[keep]

    def _loss(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """log(m1/m0) at outputs x, and its derivative."""
        j, log_weight = self._weights()
        terms = (log_weight - j**2 / (2 * self.scale**2))[:, None] + np.outer(j / self.scale**2, x)
        top = terms.max(axis=0)
        weights = np.exp(terms - top)
        total = weights.sum(axis=0)
        return top + np.log(total), (j @ weights) / total / self.scale**2

    def _output(self, losses: FloatArray) -> FloatArray:
        """The output x at which the loss is as given; −∞ where it never gets so low."""
        bottom = self.size * math.log1p(-self.q)
        reach = 45 * self.scale
        table = np.linspace(-reach, self.size + reach, 4001)
        x = np.interp(losses, self._loss(table)[0], table)
        reachable = (losses > bottom) & (x > -reach) & (x < self.size + reach)
        y = x[reachable]
        for _ in range(8):
            value, slope = self._loss(y)
            step = (value - losses[reachable]) / slope
            y = y - np.clip(step, -self.scale / 4, self.scale / 4)
        x[reachable] = y
        return np.where(losses > bottom, x, -np.inf)

    def loss_range(self, log_tail: float) -> tuple[float, float]:
        z = -float(ndtri_exp(log_tail)) * self.scale
        j, log_weight = self._weights()
        far = float(j[log_weight > log_tail - 3].max()) if self.size > 1 else 1.0
        low, high = self._loss(np.array([-z, min(self.size, far) + z]))[0]
        return float(low), float(high)

    def masses(self, edges: FloatArray, *, upper: bool) -> Masses:
        x = self._output(edges)
        m0, ends0, slack = normal_masses(x / self.scale)
        m1 = np.zeros(len(edges) - 1)
        below = above = 0.0
        worst = slack
        for j, log_weight in zip(*self._weights(), strict=True):
            part, ends, error = normal_masses((x - j) / self.scale)
            weight = math.exp(log_weight)
            m1 += weight * part
            below += weight * ends[0]
            above += weight * ends[1]
            worst = np.where(part * weight > UNIT * m1, np.maximum(worst, error), worst)
        return Masses(m0, m1, 2 * worst + 1e-13, (ends0[0], below), (ends0[1], above))
