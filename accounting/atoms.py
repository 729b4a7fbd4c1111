"""Elementary mechanisms: what events are made of, and what accountants analyse."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from accounting.pairs import DiscretePair, FloatArray, GaussianPair, Pair, ProductPair

LEAST_SCALE = 1e-6
LEAST_PROBABILITY = 1e-100
Sampling = Literal["none", "poisson", "fixed-size"]


class Curve(ABC):
    """A mechanism of which only Rényi divergences are known. Subclasses are frozen dataclasses."""

    @abstractmethod
    def divergence(self, orders: FloatArray) -> FloatArray:
        """An upper bound on the Rényi divergence of each of `orders`, in both directions; ∞ if none."""


@dataclass(frozen=True)
class NoProtection:
    """Everything is released: no bound on any divergence."""


@dataclass(frozen=True)
class Atom:
    """One elementary mechanism, on all data or on one sample of it.

    Attributes:
        mechanism: A dominating pair, a Rényi curve, or no protection at all.
        sampling: "poisson" (each record independently) or "fixed-size" (without replacement).
        q: The probability that a given record is in the sample.
    """

    mechanism: Pair | Curve | NoProtection
    sampling: Sampling = "none"
    q: float = 1.0

    NON_PRIVATE: ClassVar[Atom]

    @property
    def pair(self) -> Pair:
        """The dominating pair; accountants that need one check `has_pair` first."""
        assert isinstance(self.mechanism, Pair)  # noqa: S101 - callers check
        return self.mechanism

    @property
    def has_pair(self) -> bool:
        """Whether `pair` exists."""
        return isinstance(self.mechanism, Pair)

    @property
    def sampled_has_only0(self) -> bool:
        """Whether outputs exist that a run with the record in the sample never gives."""
        return isinstance(self.mechanism, DiscretePair) and self.mechanism.points(upper=True).only0 > 0


Atom.NON_PRIVATE = Atom(NoProtection())


def gaussian(scale: float) -> Atom:
    """Gaussian noise of standard deviation `scale` over the sensitivity."""
    return Atom.NON_PRIVATE if scale < LEAST_SCALE else Atom(GaussianPair(scale))


def merge_gaussians(counts: Mapping[Atom, int]) -> dict[Atom, int]:
    """Replace all unsampled Gaussians by the one that they compose to, exactly.

    Gaussian mechanisms of multipliers σᵢ compose to one of multiplier (Σ σᵢ⁻²)^(−1/2).
    """
    precision, plain, rest = [], 0, {}
    for atom, count in counts.items():
        if isinstance(atom.mechanism, GaussianPair) and atom.q == 1:
            precision.append(count / atom.mechanism.scale**2)
            plain += count
        else:
            rest[atom] = count
    if plain <= 1:
        return dict(counts)
    scale = math.fsum(precision) ** -0.5
    return {gaussian(scale): 1, **rest}


def one_sample(inner: Mapping[Atom, int], sampling: Sampling, q: float) -> dict[Atom, int]:
    """What running all of `inner` on one and the same sample amounts to.

    Raises:
        ValueError: with the reason, where no proof covers it.
    """
    inner = merge_gaussians(inner)
    if q == 1:
        return dict(inner)
    if q == 0 or not inner:
        return {}
    if Atom.NON_PRIVATE in inner:
        return {Atom.NON_PRIVATE: 1}
    for atom in inner:
        if not atom.has_pair:
            raise ValueError("a mechanism of which only Rényi divergences are known")
    [(atom, count), *others] = inner.items()
    if others or count > 1:
        if any(part.sampling != "none" for part in inner):
            raise ValueError("several samples inside of one sample")
        pairs = sorted(((part.pair, k) for part, k in inner.items()), key=repr)
        return {Atom(ProductPair(tuple(pairs)), sampling, max(q, LEAST_PROBABILITY)): 1}
    if atom.sampling != "none" and (atom.sampling, sampling) != ("poisson", "poisson"):
        raise ValueError("samples of two kinds, one inside of the other")
    # A Poisson sample of a Poisson sample holds each record independently, with the product of probabilities.
    return {Atom(atom.mechanism, sampling, max(atom.q * q, LEAST_PROBABILITY)): 1}
