"""Events of which only Rényi divergences are known. Accountants with method="rdp" analyse them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from accounting import pld
from accounting.atoms import Atom, Curve
from accounting.errors import UserError
from accounting.events import Event, NeighboringRelation, check_event, check_events, check_number, merged
from accounting.mechanisms import MOST_EPSILON, changes, store_number
from accounting.pairs import FloatArray
from accounting.pate_sanitise import SanitisedRelease, gnss_rdp
from accounting.rdp import rdp, renyi_delta
from accounting.selection import RunsDistribution, from_mean_runs, selection_divergence


@dataclass(frozen=True)
class ConcentratedCurve(Curve):
    """ρ·α."""

    rho: float

    def __str__(self) -> str:
        return f"A {self.rho:g}-zCDP mechanism"

    def divergence(self, orders: FloatArray) -> FloatArray:
        """ρ·α at each order."""
        return self.rho * orders


@dataclass(frozen=True)
class ZCDP(Event):
    """Any mechanism that is rho-zCDP (Bun & Steinke 2016): Rényi divergence ≤ rho·α at every order α.

    It has no privacy-loss distribution: use an accountant with method="rdp". Under replace-one, group
    privacy makes it 4·rho.
    """

    rho: float

    def __post_init__(self) -> None:
        store_number(self, "rho", 0, MOST_EPSILON, "left")

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        """One Rényi curve."""
        return {Atom(ConcentratedCurve(self.rho * changes(relation) ** 2)): 1} if self.rho else {}


# ---------------------------------------------------------------- the best of several runs


@dataclass(frozen=True)
class SelectionCurve(Curve):
    """`accounting.selection.selection_divergence` of a base mechanism."""

    base: tuple[tuple[Atom, int], ...]
    mean_runs: float
    shape: float | None

    def __str__(self) -> str:
        return f"The best of a random number of runs ({self.mean_runs:g} on average)"

    def divergence(self, orders: FloatArray) -> FloatArray:
        """What choosing the best of a random number of runs costs, at each order."""
        counts = dict(self.base)

        def base_delta(epsilon: float) -> float:
            if all(atom.has_pair for atom in counts):
                return pld.delta_bounds(counts, epsilon)[1]
            return renyi_delta(counts, epsilon)

        return selection_divergence(
            orders,
            lambda at: rdp(counts, at),
            _distribution(self.mean_runs, self.shape),
            base_delta if self.shape is None else None,
        )


@dataclass(frozen=True)
class BestOfRuns(Event):
    """The best of K independent runs of `event`, with K drawn at random and kept secret.

    Papernot & Steinke 2022, Theorem 2 (negative binomial) and Theorem 6 (Poisson). What has to hold is listed
    in `accounting.selection`: only the winner is released, and the score that decides is part of `event` or
    computed from public data; K comes from `distribution.draw_runs`.

    Attributes:
        event: One run: training and, if it looks at private data, the noisy score.
        mean_runs: E[K].
        shape: η of the truncated negative binomial: 1 is geometric, 0 logarithmic; None is a Poisson number.
    """

    event: Event
    mean_runs: float
    shape: float | None = 1.0
    may_be_sampled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_event(self.event, "BestOfRuns")
        mean = check_number(self.mean_runs, "mean_runs", "BestOfRuns", low=0, high=1e9)
        object.__setattr__(self, "mean_runs", mean)
        if self.shape is not None:
            shape = check_number(self.shape, "shape", "BestOfRuns", low=-1, high=1000)
            object.__setattr__(self, "shape", shape)
        self.distribution  # noqa: B018 - refuses a mean that the shape cannot have

    @property
    def distribution(self) -> RunsDistribution:
        """The distribution to draw K from."""
        return _distribution(self.mean_runs, self.shape)

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        """One Rényi curve; no protection if a run has none."""
        base = merged(self.event.atoms(relation))
        if not base or Atom.NON_PRIVATE in base:
            return base
        return {Atom(SelectionCurve(tuple(base.items()), self.mean_runs, self.shape)): 1}


def _distribution(mean_runs: float, shape: float | None) -> RunsDistribution:
    return from_mean_runs(mean_runs, float("inf") if shape is None else shape)


# ---------------------------------------------------------------- one of several events


@dataclass(frozen=True)
class WorstCurve(Curve):
    """The largest divergence of several mechanisms, at each order."""

    bases: tuple[tuple[tuple[Atom, int], ...], ...]

    def __str__(self) -> str:
        return f"One of {len(self.bases)} mechanisms"

    def divergence(self, orders: FloatArray) -> FloatArray:
        """The maximum over the mechanisms."""
        return np.asarray(np.max([rdp(dict(base), orders) for base in self.bases], axis=0))


@dataclass(frozen=True)
class OneOf(Event):
    """One of `events`, charged as the worst of them at each Rényi order.

    It covers two things, and both at once:

    - a mechanism that is drawn at random from a public list, independently of the data. With the choice
      known, the sum E_Q[(P/Q)^α] is the mean of those of the members, and a mean is at most the maximum;
    - parallel composition: a record is read by one member alone, since the members read disjoint parts. What
      goes from one part to another is post-processing. Which part a record is in must not depend on other
      records: under zero-out, fixed positions will do.

    Where all members cost the same it is one of them, and has a privacy-loss distribution if that has one.
    """

    events: tuple[Event, ...]
    may_be_sampled: ClassVar[bool] = False

    def __init__(self, events: Iterable[Event]) -> None:
        parts = check_events(events, "OneOf")
        if not parts:
            raise UserError("The 'events' of OneOf must be a list of at least one event. Got none.")
        object.__setattr__(self, "events", parts)

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        """Those of the one member, or one Rényi curve; no protection if a member has none."""
        bases = list(dict.fromkeys(tuple(merged(part.atoms(relation)).items()) for part in self.events))
        if any(Atom.NON_PRIVATE in dict(base) for base in bases):
            return {Atom.NON_PRIVATE: 1}
        return dict(bases[0]) if len(bases) == 1 else {Atom(WorstCurve(tuple(bases))): 1}


# ---------------------------------------------------------------- a sanitised data-dependent bound


@dataclass(frozen=True)
class SmoothCurve(Curve):
    """`accounting.pate_sanitise.gnss_rdp`."""

    beta: float
    noise_multiplier: float
    shift: float

    def __str__(self) -> str:
        return f"A release with smooth sensitivity (β = {self.beta:g})"

    def divergence(self, orders: FloatArray) -> FloatArray:
        """Infinite at large orders, which then say nothing."""
        return gnss_rdp(orders, self.beta, self.noise_multiplier, shift=self.shift)


@dataclass(frozen=True)
class SmoothRelease(Event):
    """The release of a PATE cost with Gaussian noise on its smooth sensitivity (Papernot et al. 2018, B).

    `SmoothRelease.of` makes it of what was released. It pays for publishing the number, not for the
    answers that the number is about.

    Attributes:
        beta: Of the β-smooth sensitivity.
        noise_multiplier: Standard deviation of the noise over the smooth sensitivity.
        shift: By how many of these standard deviations the number is moved up before.
    """

    beta: float
    noise_multiplier: float
    shift: float = 0.0
    may_be_sampled: ClassVar[bool] = False

    @classmethod
    def of(cls, released: SanitisedRelease) -> SmoothRelease:
        """The event of a release that `accounting.pate_sanitise.sanitised_epsilon` made."""
        return cls(released.beta, released.noise_multiplier, released.shift)

    def __post_init__(self) -> None:
        store_number(self, "beta", 0, 100)
        store_number(self, "noise_multiplier", 1e-6, 1e9)
        store_number(self, "shift", 0, 100, "left")

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:  # noqa: ARG002 - one vote either way
        """One Rényi curve. One record changes one teacher, under every relation."""
        return {Atom(SmoothCurve(self.beta, self.noise_multiplier, self.shift)): 1}
