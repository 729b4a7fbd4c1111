"""Noise whose law is exact, though computers have only floating-point numbers.

Noise in float64 takes few of the values that real noise takes, and which sums it can make with the data's own
number is seen in the low bits of the result: whoever looks there may read the data (Mironov 2012, "On
significance of the least significant bits for differential privacy"; Haney et al. 2022; Holohan & Braghin
2021). So nothing is released here but what real noise would have given: the real number `value + noise`,
rounded to a grid, or compared with another. That is post-processing of the ideal mechanism, and costs its ε
and δ and no more.

Why it is exact: a drawn number in float64 stands for a cell of real ones (`dpml.randomness.Draw`), of which
any further bit is still undrawn, uniform and independent. Where every number within the bound of error gives
the same result, that is the result. Where not, in one of some hundred thousand cases, further bits are drawn
and the result is worked out in interval arithmetic until it is certain. What remains is the cipher's
difference from true randomness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mpmath
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from accounting.errors import UserError
from accounting.events import check_instance, check_number
from dpml.randomness import Draw, Randomness

Floats = npt.NDArray[np.float64]
Interval = Any  # mpmath's, which has no types
_AT_ONCE = 2**14  # numbers that fit a processor's cache
_LEAST_SCALE = 2.0**-900  # far from where float64 loses bits


class GaussianNoise:
    """Independent normal noise of standard deviation noise_multiplier·C.

    Noise is drawn afresh at every call, from a stream that never repeats.

    Args:
        noise_multiplier: Standard deviation over the clip norm, above 0.
        randomness: Secret, unless the result is for tests alone.
    """

    def __init__(self, noise_multiplier: float, randomness: Randomness) -> None:
        self.noise_multiplier = check_number(
            noise_multiplier, "noise_multiplier", "GaussianNoise", low=0, high=1e15
        )
        self.randomness = check_instance(randomness, Randomness, "randomness", "GaussianNoise")

    def add(self, sums: Sequence[Tensor], clip_norm: float) -> list[Tensor]:
        """Sums with noise, on the grid of `grid_of(noise_multiplier·C)`: float64, each on its own device.

        Guarantee: distributed exactly as the sums with real normal noise, rounded to the grid.

        Args:
            sums: Finite, of any shapes.
            clip_norm: C, above 0.

        Raises:
            UserError: for another C, with which there would be no noise, or no number; or for other sums.
        """
        scale = self.noise_multiplier * check_number(clip_norm, "clip_norm", "add", low=0, high=1e15)
        flat = torch.cat(
            [part.detach().to("cpu", torch.float64).flatten() for part in sums] or [torch.empty(0)]
        )
        if not torch.isfinite(flat).all():
            raise UserError("The sums must be finite: noise would not hide what is not.")
        noisy = torch.from_numpy(noised(flat.numpy(), scale, self.randomness))
        parts = torch.split(noisy, [part.numel() for part in sums])
        return [part.view(like.shape).to(like.device) for part, like in zip(parts, sums, strict=True)]


def noised(values: Floats, scale: float, randomness: Randomness) -> Floats:
    """`values` with normal noise, rounded to `grid_of(scale)`: exactly as real noise would give it.

    Args:
        values: Finite, [n].
        scale: Standard deviation.
        randomness: Where noise comes from.
    """
    starts = range(0, len(values), _AT_ONCE)
    parts = [_noised(values[start : start + _AT_ONCE], scale, randomness) for start in starts]
    return np.concatenate(parts) if parts else np.empty(0)


def _noised(values: Floats, scale: float, randomness: Randomness) -> Floats:
    grid = grid_of(scale)
    draw = randomness.normal_draw(len(values))
    exact = (values + scale * draw.values) / grid
    released = np.rint(exact)
    # Of `exact`: the error of the draw, and that of a product, a sum, and the sum's parts.
    error = scale / grid * draw.error + (np.abs(values) / grid + np.abs(exact)) * 2.0**-50
    for i in _unsure(0.5 - np.abs(exact - released) <= error, draw):
        released[i] = _settle(values[i], scale, draw, i, lambda noisy: _floor(noisy / grid + 0.5))
    return released * grid


def grid_of(scale: float) -> float:
    """The grid of noisy values: a power of two, about a millionth of the noise's standard deviation.

    It is fixed by public numbers.
    """
    return 2.0 ** (math.frexp(max(scale, _LEAST_SCALE))[1] - 20)


def noisy_argmax(counts: Floats, scale: float, draw: Draw) -> npt.NDArray[np.int64]:
    """The place of the largest of each row's `counts` + `scale`·(drawn numbers), exactly: int64 [m].

    Args:
        counts: [m, k].
        scale: Of the noise.
        draw: m·k numbers.
    """
    noise = scale * draw.values.reshape(counts.shape)
    noisy = np.asarray(counts + noise)
    best: npt.NDArray[np.int64] = noisy.argmax(axis=1)
    error = scale * draw.error + (np.abs(noisy) + np.abs(noise)) * 2.0**-50
    # Whatever might be largest. Doubtful numbers might be anywhere.
    lower = np.take_along_axis(noisy - error, best[:, None], axis=1)
    rivals = (noisy + error >= lower).sum(axis=1) > 1
    rivals[draw.doubtful // counts.shape[1]] = True
    for row in np.flatnonzero(rivals):
        best[row] = _largest(counts[row], scale, draw, int(row) * counts.shape[1])
    return best


def noisy_reaches(counts: Floats, scale: float, draw: Draw, threshold: float) -> npt.NDArray[np.bool_]:
    """Whether `counts` + `scale`·(drawn numbers) reach the threshold, exactly: bool [m]."""
    noise = scale * draw.values
    margin = np.asarray(counts + noise) - threshold
    reached = margin >= 0
    error = scale * draw.error + (np.abs(margin) + np.abs(noise) + abs(threshold)) * 2.0**-50
    for i in _unsure(np.abs(margin) <= error, draw):
        reached[i] = _settle(counts[i], scale, draw, i, lambda noisy: _reaches(noisy, threshold))
    return reached


def _unsure(unsure: npt.NDArray[np.bool_], draw: Draw) -> list[int]:
    unsure[draw.doubtful] = True
    return [int(i) for i in np.flatnonzero(unsure)]


def _settle(
    value: np.float64, scale: float, draw: Draw, position: int, decide: Callable[[Interval], int | None]
) -> int:
    """What `decide` says of `value` + `scale`·(the number drawn at `position`), on enough bits."""
    found = None
    for bits in _more_bits():
        found = decide(float(value) + scale * draw.enclose(position, bits))
        if found is not None:
            break
    return int(found or 0)


def _largest(counts: Floats, scale: float, draw: Draw, start: int) -> int:
    """The place of the largest of a row whose draws begin at `start`."""
    for bits in _more_bits():
        noisy = [float(count) + scale * draw.enclose(start + j, bits) for j, count in enumerate(counts)]
        best = max(range(len(noisy)), key=lambda j: noisy[j].a)
        if all(noisy[j].b < noisy[best].a for j in range(len(noisy)) if j != best):
            break
    return best


def _more_bits() -> Iterator[int]:
    """Ever more bits, with interval arithmetic that has room for them."""
    before, bits = mpmath.iv.prec, 64
    try:
        while True:
            mpmath.iv.prec = 100 + 2 * bits
            yield bits
            bits *= 2
    finally:
        mpmath.iv.prec = before


def _floor(x: Interval) -> int | None:
    """⌊x⌋, if it is the same for the whole interval."""
    if x.a == -math.inf or x.b == math.inf:  # of a uniform number nothing but zeros is known so far
        return None
    low, high = (mpmath.libmp.to_int(end, "f") for end in x._mpi_)
    return int(low) if low == high else None


def _reaches(x: Interval, threshold: float) -> int | None:
    """Whether x ≥ threshold, if it is the same for the whole interval."""
    return None if threshold in x else int(x.a > threshold)
