"""The elementary mechanisms, as events.

Every one of them says what it costs under which neighbouring relation. Where a relation is not named, a
mechanism's own parameters are those of adding, removing or zeroing one record, and replace-one, which is a
removal and an addition, doubles the sensitivity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from accounting.atoms import LEAST_SCALE, Atom, gaussian
from accounting.errors import UnsupportedEvent, UserError
from accounting.events import Event, NeighboringRelation, check_count, check_number, shown
from accounting.pairs import (
    BoundedRangePair,
    DiscreteGaussianPair,
    LaplacePair,
    ResponsePair,
    SwappedResponsePair,
    UniformResponsePair,
)

MOST_EPSILON = 1e6  # of one mechanism: beyond, it is as good as no protection
_LEAST_NOISE = 1e-200  # probability of a random answer: likewise
_ROOT_2 = 2**0.5


def store_number(event: Event, name: str, low: float, high: float, closed: str = "neither") -> None:
    """Validate a field and store it as a float."""
    value = check_number(getattr(event, name), name, type(event).__name__, low=low, high=high, closed=closed)
    object.__setattr__(event, name, value)


def changes(relation: NeighboringRelation) -> int:
    """How many additions or removals a change from one neighbour to the other is made of."""
    return 2 if relation == "replace-one" else 1


# ---------------------------------------------------------------- additive noise


@dataclass(frozen=True)
class Gaussian(Event):
    """A sum of records, each of L2 norm at most C, released with N(0, (noise_multiplier·C)²) noise.

    `noise_multiplier` is the standard deviation over the clip norm C. What it means for the
    sensitivity depends on the neighbouring relation: C for zero-out and add-or-remove-one, 2C for
    replace-one.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        store_number(self, "noise_multiplier", 0, 1e15)

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        return {gaussian(self.noise_multiplier / changes(relation)): 1}


@dataclass(frozen=True)
class Laplace(Event):
    """A sum of records, each of L1 norm at most C, released with Laplace(noise_multiplier·C) noise.

    `noise_multiplier` is the scale over the clip norm C. As a dominating pair this covers vectors too,
    since the L1 norm bounds the privacy loss of independent coordinates.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        store_number(self, "noise_multiplier", 0, 1e15)

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        scale = self.noise_multiplier / changes(relation)
        return {Atom.NON_PRIVATE if scale < LEAST_SCALE else Atom(LaplacePair(scale)): 1}


@dataclass(frozen=True)
class DiscreteGaussian(Event):
    """A whole number, released with discrete Gaussian noise (Canonne, Kamath & Steinke 2020).

    Attributes:
        sigma: The noise's parameter: P(x) ∝ exp(−x²/2σ²), in units of the number. At most 10,000.
        sensitivity: How much one record changes the number at most, a whole number.

    The noise is log-concave, so the largest shift dominates all smaller ones. ε does not always fall as sigma
    grows: the exact δ of a lattice distribution is not monotone.
    """

    sigma: float
    sensitivity: int = 1

    def __post_init__(self) -> None:
        store_number(self, "sigma", 0, 1e4, "right")
        value = check_count(self.sensitivity, "sensitivity", "DiscreteGaussian", low=1)
        if value > 10_000:
            raise UserError(f"The 'sensitivity' of DiscreteGaussian must be at most 10,000. Got {value}.")
        object.__setattr__(self, "sensitivity", value)

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        shift = self.sensitivity * changes(relation)
        if shift**2 > MOST_EPSILON * self.sigma**2:
            return {Atom.NON_PRIVATE: 1}
        return {Atom(DiscreteGaussianPair(self.sigma, shift)): 1}


# ---------------------------------------------------------------- choices


@dataclass(frozen=True)
class RandomizedResponse(Event):
    """Each record's answer out of `answers`, replaced by a uniformly drawn one with `noise_probability`.

    Relations: replace-one (the answer is another one), and zero-out (a record that contributes nothing gives
    a uniform answer). Under add-or-remove-one the number of answers would tell.
    """

    noise_probability: float
    answers: int = 2
    may_be_sampled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        store_number(self, "noise_probability", 0, 1, "both")
        object.__setattr__(self, "answers", check_count(self.answers, "answers", "RandomizedResponse", low=2))

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        if self.noise_probability < _LEAST_NOISE:
            return {Atom.NON_PRIVATE: 1}
        if self.noise_probability == 1:
            return {}
        if relation == "replace-one":
            return {Atom(SwappedResponsePair(self.noise_probability, self.answers)): 1}
        if relation == "zero-out":
            return {Atom(UniformResponsePair(self.noise_probability, self.answers)): 1}
        raise UnsupportedEvent(
            f"{shown(self)} is not analysed under the relation add-or-remove-one, since the number of "
            "answers is released; use replace-one or zero-out."
        )


@dataclass(frozen=True)
class ExponentialMechanism(Event):
    """A choice with probabilities proportional to exp(epsilon·score / 2Δ) (McSherry & Talwar 2007).

    `epsilon` is that of the exponent, Δ how much one record changes any score at most. For scores that one
    record can only raise (or only lower), `epsilon` is that of exp(epsilon·score / Δ). Beyond being
    ε-DP its losses have a range of ε only (Dong, Durfee & Rogers 2020), which composes better. Choosing with
    Gumbel noise is the same mechanism.
    """

    epsilon: float

    def __post_init__(self) -> None:
        store_number(self, "epsilon", 0, MOST_EPSILON, "left")

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        if self.epsilon == 0:
            return {}
        epsilon = self.epsilon * changes(relation)
        # Beyond, an e^ε would not be a float; randomised response is the same there but for log 2.
        return {Atom(BoundedRangePair(epsilon) if epsilon <= 500 else ResponsePair(epsilon)): 1}


@dataclass(frozen=True)
class ReportNoisyMax(Event):
    """The index of the largest score after adding Laplace noise of scale 2Δ/epsilon to each.

    Δ is how much one record changes any score at most; Δ/epsilon is enough for scores that one record can
    only raise (or only lower). Dwork & Roth 2014, Claim 3.9: ε-DP.
    """

    epsilon: float

    def __post_init__(self) -> None:
        store_number(self, "epsilon", 0, MOST_EPSILON, "left")

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        return _pure(self.epsilon * changes(relation))


def _pure(epsilon: float, delta: float = 0.0) -> dict[Atom, int]:
    if epsilon == 0 and delta == 0:
        return {}
    return {Atom(ResponsePair(epsilon, delta)): 1}


# ---------------------------------------------------------------- guarantees without a mechanism


@dataclass(frozen=True)
class EpsilonDelta(Event):
    """Any mechanism that is (epsilon, delta)-DP when one record is added, removed or zeroed."""

    epsilon: float
    delta: float = 0.0

    def __post_init__(self) -> None:
        store_number(self, "epsilon", 0, MOST_EPSILON, "left")
        store_number(self, "delta", 0, 1, "left")
        if self.delta >= 1:
            raise UserError("The 'delta' parameter of EpsilonDelta must be in [0, 1). Got 1.")

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        if relation != "replace-one":
            return _pure(self.epsilon, self.delta)
        # Through the data set without the record: δ and e^ε·δ add up.
        delta = self.delta * (1 + np.exp(min(self.epsilon, 700.0)))
        return _pure(2 * self.epsilon, float(delta)) if delta < 1 else {Atom.NON_PRIVATE: 1}


# ---------------------------------------------------------------- PATE


@dataclass(frozen=True)
class _TeacherVote(Event):
    """One query that all teachers vote on. One record belongs to one teacher, and so changes one vote.

    It takes a partition by the records themselves (such as a hash), so that no other teacher's data shifts
    when one comes or goes. Under replace-one the record may leave one teacher and its successor join
    another, so two votes change.
    """

    may_be_sampled: ClassVar[bool] = False


@dataclass(frozen=True)
class GNMax(_TeacherVote):
    """The class with most votes after N(0, sigma²) noise on each count (Papernot et al. 2018).

    A changed vote moves two counts by one, √2 in L2; the answer is post-processing of the noisy counts.
    This bound does not look at the votes.
    """

    sigma: float

    def __post_init__(self) -> None:
        store_number(self, "sigma", 0, 1e15)

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        return {gaussian(self.sigma / _ROOT_2 / changes(relation)): 1}


@dataclass(frozen=True)
class GNMaxThreshold(_TeacherVote):
    """Whether the largest count plus N(0, sigma²) noise reaches a threshold: Confident-GNMax's check.

    One changed vote moves the largest count by at most one. It is charged for every query that is asked,
    those that are then refused too; a query that is answered costs a `GNMax` on top.
    """

    sigma: float

    def __post_init__(self) -> None:
        store_number(self, "sigma", 0, 1e15)

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        return {gaussian(self.sigma / changes(relation)): 1}


@dataclass(frozen=True)
class LNMax(_TeacherVote):
    """The class with most votes after Laplace(scale) noise on each count (Papernot et al. 2017).

    A changed vote moves two counts by one: 2/scale-DP.
    """

    scale: float

    def __post_init__(self) -> None:
        store_number(self, "scale", 0, 1e15)

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        scale = self.scale / changes(relation)
        return {Atom.NON_PRIVATE: 1} if scale < LEAST_SCALE else _pure(2 / scale)
