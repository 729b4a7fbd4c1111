"""Group privacy: what the same releases guarantee for groups of k records."""

from __future__ import annotations

import math
from collections.abc import Mapping

from accounting.atoms import Atom, Curve, gaussian
from accounting.curves import ConcentratedCurve
from accounting.errors import UnsupportedEvent
from accounting.events import check_count, merged
from accounting.mixture import GroupGaussianPair
from accounting.pairs import (
    BoundedRangePair,
    DiscreteGaussianPair,
    GaussianPair,
    LaplacePair,
    Pair,
    ProductPair,
    ResponsePair,
)


def for_group(counts: Mapping[Atom, int], size: int) -> dict[Atom, int]:
    """The elementary mechanisms, for neighbours that differ in `size` records instead of one.

    Sensitivities and pure ε grow with the size. Where a Gaussian runs on a Poisson sample, the number of the
    group's records in it is binomial: the pair is a mixture of Gaussians (Ganesh 2024, Theorem 3.1). For
    other mechanisms on a Poisson sample, all of the group is taken to be in it as soon as one record is: P is
    (1 − q′)·m0 + q′·m1 with q′ = 1 − (1 − q)^size and m1 at the whole group's distance.

    Raises:
        UnsupportedEvent: for samples of a fixed size, and where only Rényi divergences are known.
    """
    size = check_count(size, "group_size", "PrivacyAccountant", low=1)
    if size == 1:
        return dict(counts)
    out: dict[Atom, int] = {}
    for atom, count in counts.items():
        grown = _grown(atom, size)
        out[grown] = out.get(grown, 0) + count
    return merged(out)


def _grown(atom: Atom, size: int) -> Atom:
    mechanism = atom.mechanism
    if atom.sampling == "fixed-size":
        raise UnsupportedEvent(
            "Groups of records are not analysed for samples of a fixed size; use PoissonSampled."
        )
    if isinstance(mechanism, ConcentratedCurve):
        return Atom(ConcentratedCurve(mechanism.rho * size**2))  # Bun & Steinke 2016, Proposition 1.9
    if isinstance(mechanism, Curve):
        raise UnsupportedEvent(
            f"Groups of records are not analysed for {mechanism!s:.80}, of which only Rényi divergences are "
            "known; use an event with a mechanism, such as Gaussian."
        )
    if not isinstance(mechanism, Pair):
        return atom
    if atom.sampling == "poisson" and isinstance(mechanism, GaussianPair):
        return Atom(GroupGaussianPair(mechanism.scale, atom.q, size))
    pair = _distant(mechanism, size)
    if atom.sampling == "none":
        return gaussian(pair.scale) if isinstance(pair, GaussianPair) else Atom(pair)
    return Atom(pair, "poisson", -math.expm1(size * math.log1p(-atom.q)))


def _distant(pair: Pair, size: int) -> Pair:
    """The pair of data sets that differ in `size` records, all of which take part."""
    match pair:
        case GaussianPair(scale):
            return GaussianPair(scale / size)
        case LaplacePair(scale):
            return LaplacePair(scale / size)
        case DiscreteGaussianPair(sigma, shift):
            return DiscreteGaussianPair(sigma, shift * size)
        case BoundedRangePair(epsilon):
            # Ranges add up, as losses do along a chain of neighbours.
            return BoundedRangePair(size * epsilon) if size * epsilon <= 500 else ResponsePair(size * epsilon)
        case ProductPair(parts):
            return ProductPair(tuple((_distant(part, size), count) for part, count in parts))
        case ResponsePair(epsilon, delta) if delta > 0:
            # Dwork & Roth 2014, Theorem 2.2, with the geometric sum kept.
            grown = (
                delta * math.expm1(min(size * epsilon, 700.0)) / math.expm1(epsilon)
                if epsilon
                else delta * size
            )
            return ResponsePair(size * epsilon, min(grown, 1 - 2.0**-53))
        case _:
            return ResponsePair(size * pair.pure_epsilon)
