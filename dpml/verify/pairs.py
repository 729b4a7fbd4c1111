"""One run of a mechanism: how likely its privacy loss is to exceed a number, with and without the record.

That is all that the accountant in `dpml.verify.composition` knows of a mechanism, in mpmath at the working
precision. For a pair (P, Q) of output distributions and the loss L = log(P/Q),

    tails(γ) = (P[L > log γ], Q[L > log γ]),    δ(γ) = P[L > log γ] − γ·Q[L > log γ],

and −Q[L > log γ] is a slope of the convex function δ at γ. All pairs here are the same in both directions
until they are sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mpmath as mp

from dpml.verify.parts import CannotVerify, Part

Tails = Callable[[mp.mpf], tuple[mp.mpf, mp.mpf]]
_ONE, _NOTHING = (mp.mpf(1), mp.mpf(1)), (mp.mpf(0), mp.mpf(0))


def tails(part: Part, *, add: bool) -> Tails:
    """The tails of a part: with the record against without it; the other way round if `add`.

    Raises:
        CannotVerify: for a mechanism that has no pair here.
    """
    unsampled = _unsampled(part)
    one_way = unsampled if part.q == 1 else partial(_sampled, unsampled, mp.mpf(part.q))
    return partial(_mirrored, one_way) if add and part.q < 1 else one_way


def _unsampled(part: Part) -> Tails:
    match part.kind:
        case "gaussian":
            return partial(_gaussian, part.numbers[0])
        case "laplace":
            return partial(_laplace, part.numbers[0])
        case "pure":
            return partial(_pure, *part.numbers)
    raise CannotVerify(f"a mechanism of the kind {part.kind} is not covered beside others or sampled")


def _sampled(base: Tails, q: mp.mpf, gamma: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    """(1−q)·Q + q·P against Q: the ratio exceeds γ where P/Q exceeds 1 + (γ−1)/q."""
    inner = 1 + (gamma - 1) / q
    if inner <= 0:
        return _ONE
    p, r = base(inner)
    return (1 - q) * r + q * p, r


def _mirrored(base: Tails, gamma: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    """Q against P: its loss exceeds log γ where that of P against Q is below −log γ."""
    p, r = base(1 / gamma)
    return 1 - r, 1 - p


def _gaussian(sigma: mp.mpf, gamma: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    """N(1, σ²) against N(0, σ²): L = (2x − 1)/2σ²."""
    x = sigma**2 * mp.log(gamma) + mp.mpf(1) / 2
    return mp.ncdf((1 - x) / sigma), mp.ncdf(-x / sigma)


def _laplace(scale: mp.mpf, gamma: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    """Laplace(1, b) against Laplace(0, b): L = (|x| − |x−1|)/b."""
    loss = mp.log(gamma) * scale
    if loss >= 1:
        return _NOTHING
    if loss < -1:
        return _ONE
    x = (loss + 1) / 2  # in [0, 1)
    return 1 - mp.exp((x - 1) / scale) / 2, mp.exp(-x / scale) / 2


def _pure(epsilon: mp.mpf, delta: mp.mpf, gamma: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    """Randomised response with a chance δ to tell all (Kairouz, Oh & Viswanath 2015, Theorem 3.1)."""
    loss = mp.log(gamma)
    if loss >= epsilon:
        return delta, mp.mpf(0)
    if loss < -epsilon:
        return mp.mpf(1), 1 - delta
    likely = (1 - delta) / (1 + mp.exp(-epsilon))
    return delta + likely, likely * mp.exp(-epsilon)
