"""What was released: frozen descriptions of mechanisms, independent of any accountant.

An event says what a mechanism did, in numbers that are public and that were fixed before it ran.
Events nest: ``Repeated(PoissonSampled(Gaussian(1.1), 0.01), 1_000)`` is a thousand steps of DP-SGD.
They are validated when made, hashable, and serialise to versioned JSON.

`atoms` flattens any event into the multiset of its elementary parts. Multiplicity is counted there
and nowhere else, so no accountant can lose it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args

from accounting.errors import UnsupportedEvent, UserError

SCHEMA_VERSION = 1
_DEEPEST_NESTING = 32
_MOST_RUNS = 10**15
_LEAST_SCALE = 1e-6
_LEAST_PROBABILITY = 1e-100

NeighboringRelation = Literal["zero-out", "add-or-remove-one", "replace-one"]
"""Which two data sets must be hard to tell apart.

- ``zero-out``: one record is replaced by one that contributes nothing. The number of records is
  public. This is the relation when a sampling probability was derived from that number.
- ``add-or-remove-one``: one record is added or removed. The number of records is protected, so the
  sampling probability has to be a number chosen without looking at it.
- ``replace-one``: one record is replaced by any other, which doubles the sensitivity of a sum.
"""
RELATIONS: tuple[NeighboringRelation, ...] = get_args(NeighboringRelation)


def shown(value: object) -> str:
    """`value` for a message: one line, at most 80 characters."""
    return " ".join(repr(value).split())[:80]


def check_number(
    value: object, name: str, owner: str, *, low: float, high: float, closed: str = "neither"
) -> float:
    """Return `value` as a float if it is a finite number between `low` and `high`.

    Args:
        value: What the caller passed.
        name: The parameter's name, for the message.
        owner: Whose parameter it is, for the message.
        low: Lower end of the interval.
        high: Upper end of the interval.
        closed: Which ends belong to the interval: "neither", "left", "right" or "both".

    Raises:
        UserError: in the form "The 'delta' parameter of PrivacyBudget must be in (0, 1). Got 1.5."
    """
    left, right = closed in ("left", "both"), closed in ("right", "both")
    interval = f"{'[' if left else '('}{low:g}, {high:g}{']' if right else ')'}"
    real = None if isinstance(value, bool) else value
    if isinstance(real, Real):
        try:
            number = float(real)
        except OverflowError:  # a huge int
            number = math.inf
        above = number >= low if left else number > low
        below = number <= high if right else number < high
        if math.isfinite(number) and above and below:
            return number
    raise UserError(f"The '{name}' parameter of {owner} must be in {interval}. Got {shown(value)}.")


def check_count(value: object, name: str, owner: str, *, low: int = 0) -> int:
    """Return `value` as an int if it is a whole number of at least `low`; raise UserError otherwise."""
    whole = None if isinstance(value, bool) else value
    if isinstance(whole, Integral) and low <= int(whole) <= 10**15:
        return int(whole)
    raise UserError(
        f"The '{name}' parameter of {owner} must be a whole number from {low} to 10^15. Got {shown(value)}."
    )


def check_relation(value: object) -> NeighboringRelation:
    """Return `value` if it names a neighbouring relation; raise UserError otherwise."""
    for relation in RELATIONS:
        if value == relation:
            return relation
    raise UserError(f"The neighbouring relation must be one of {', '.join(RELATIONS)}. Got {shown(value)}.")


@dataclass(frozen=True)
class Event:
    """Something that was, or will be, released. Abstract: make one of the subclasses."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable description, from which `from_dict` makes an equal event."""
        return {"schema_version": SCHEMA_VERSION, **self._body()}

    def _body(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"type": type(self).__name__}
        for name, value in vars(self).items():
            if isinstance(value, Event):
                fields[name] = value._body()
            elif isinstance(value, tuple):
                fields[name] = [part._body() for part in value]
            else:
                fields[name] = value
        return fields

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Event:
        """Return the event that `to_dict` described.

        Raises:
            UserError: if the description is of another schema version, names an unknown type, lacks a
                field or has one too many, or holds a value that the event refuses.
        """
        if not isinstance(data, Mapping):
            raise UserError(f"An event must be a JSON object. Got {type(data).__name__}.")
        body = dict(data)
        version = body.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise UserError(
                f"The event's schema_version must be {SCHEMA_VERSION}. Got {version!r}; "
                "read it with the version of dpml that wrote it."
            )
        return _from_body(body, depth=0)


def _from_body(body: object, depth: int) -> Event:
    if depth > _DEEPEST_NESTING:
        raise UserError(f"The event is nested deeper than {_DEEPEST_NESTING} levels.")
    if not isinstance(body, Mapping):
        raise UserError(f"An event must be a JSON object. Got {type(body).__name__}.")
    kind = EVENT_TYPES.get(str(body.get("type")))
    if kind is None:
        raise UserError(f"The event type {body.get('type')!r} is unknown. Known: {', '.join(EVENT_TYPES)}.")
    given, wanted = set(body) - {"type"}, set(kind.__dataclass_fields__)
    if given != wanted:
        raise UserError(
            f"A {kind.__name__} event has the fields {sorted(wanted)}. Got {sorted(map(str, given))}."
        )
    values: dict[str, Any] = {}
    for name in sorted(given):
        value = body[name]
        if name == "event":
            value = _from_body(value, depth + 1)
        elif name == "events":
            if not isinstance(value, list):
                raise UserError(f"The 'events' of Composed must be a list. Got {shown(value)}.")
            value = tuple(_from_body(part, depth + 1) for part in value)
        values[name] = value
    return kind(**values)


@dataclass(frozen=True)
class Gaussian(Event):
    """A sum of records, each of L2 norm at most C, released with N(0, (noise_multiplier·C)²) noise.

    `noise_multiplier` is the standard deviation over the clip norm C. What it means for the
    sensitivity depends on the neighbouring relation: C for zero-out and add-or-remove-one, 2C for
    replace-one.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", _noise_multiplier(self))


@dataclass(frozen=True)
class Laplace(Event):
    """A sum of records, each of L1 norm at most C, released with Laplace(noise_multiplier·C) noise.

    `noise_multiplier` is the scale over the clip norm C. As a dominating pair this covers vectors too,
    since the L1 norm bounds the privacy loss of independent coordinates.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", _noise_multiplier(self))


def _noise_multiplier(event: Gaussian | Laplace) -> float:
    owner = type(event).__name__
    return check_number(event.noise_multiplier, "noise_multiplier", owner, low=0, high=1e15)


@dataclass(frozen=True)
class NonPrivate(Event):
    """A release without any protection: ε is infinite. It says so instead of being left out."""


@dataclass(frozen=True)
class PoissonSampled(Event):
    """`event`, run on a sample that holds each record independently with `sampling_probability`.

    Several releases from one and the same sample are `PoissonSampled(Composed([…]), q)`. Two
    PoissonSampled events stand for two independent samples: to account releases that share a sample
    that way would under-count.
    """

    event: Event
    sampling_probability: float

    def __post_init__(self) -> None:
        _check_event(self.event, "PoissonSampled")
        q = check_number(
            self.sampling_probability,
            "sampling_probability",
            "PoissonSampled",
            low=0,
            high=1,
            closed="both",
        )
        object.__setattr__(self, "sampling_probability", q)


@dataclass(frozen=True)
class Repeated(Event):
    """`event`, run `count` times with fresh randomness each time."""

    event: Event
    count: int

    def __post_init__(self) -> None:
        _check_event(self.event, "Repeated")
        object.__setattr__(self, "count", check_count(self.count, "count", "Repeated"))


@dataclass(frozen=True)
class Composed(Event):
    """All of `events`, one after the other, each with fresh randomness."""

    events: tuple[Event, ...]

    def __init__(self, events: Iterable[Event]) -> None:
        if not isinstance(events, Iterable):
            raise UserError(f"The 'events' of Composed must be a list of events. Got {events!r:.80}.")
        parts = tuple(events)
        for part in parts:
            _check_event(part, "Composed")
        object.__setattr__(self, "events", parts)


def _check_event(value: object, owner: str) -> None:
    if not isinstance(value, Event):
        raise UserError(f"{owner} is made of events such as Gaussian(1.1). Got {shown(value)}.")


EVENT_TYPES: dict[str, type[Event]] = {
    kind.__name__: kind for kind in (Gaussian, Laplace, NonPrivate, PoissonSampled, Repeated, Composed)
}


@dataclass(frozen=True)
class Atom:
    """The elementary mechanism that accountants analyse: one additive noise, on one Poisson sample.

    Its dominating pair under adding or removing a record is the noise around 0 against the mixture of
    the noise around 0 (weight 1 − q) and around 1 (weight q); see Zhu, Dong & Wang 2022, Theorem 11.

    Attributes:
        noise: The density's family.
        scale: Standard deviation (Gaussian) or scale (Laplace) over the sensitivity.
        q: The sampling probability, 1 for no sampling.
    """

    noise: Literal["gaussian", "laplace", "none"]
    scale: float
    q: float = 1.0

    NON_PRIVATE: ClassVar[Atom]


Atom.NON_PRIVATE = Atom("none", 0.0)


def atoms(event: Event, relation: NeighboringRelation = "zero-out") -> dict[Atom, int]:
    """Flatten `event` into its elementary mechanisms and how often each of them runs.

    Unsampled Gaussians are merged into one, exactly: a composition of Gaussian mechanisms of
    multipliers σᵢ is one of multiplier (Σ σᵢ⁻²)^(−1/2).

    Raises:
        UnsupportedEvent: where no proof covers the event under this relation.
    """
    counts: dict[Atom, int] = {}
    _collect(event, 1, counts)
    counts = merge_gaussians(counts)
    if relation == "replace-one":
        counts = {_doubled_sensitivity(atom): count for atom, count in counts.items()}
    # Sorted, so that no sum over them depends on the order of recording.
    return dict(sorted(counts.items(), key=lambda item: (item[0].noise, item[0].scale, item[0].q)))


def _collect(event: Event, times: int, into: dict[Atom, int]) -> None:
    """Add `times` runs of `event` to the counts in `into`."""
    if times == 0:
        return
    if times > _MOST_RUNS:
        raise UnsupportedEvent(f"{event!r:.80} runs more than 10^15 times, which is not supported.")
    if isinstance(event, Repeated):
        _collect(event.event, times * event.count, into)
    elif isinstance(event, Composed):
        for part in event.events:
            _collect(part, times, into)
    elif isinstance(event, PoissonSampled):
        for atom, count in _sampled(event).items():
            into[atom] = into.get(atom, 0) + times * count
    else:
        atom = _elementary(event)
        into[atom] = into.get(atom, 0) + times


def _elementary(event: Event) -> Atom:
    if isinstance(event, Gaussian | Laplace):
        if event.noise_multiplier < _LEAST_SCALE:  # ε above 10^6: as good as none
            return Atom.NON_PRIVATE
        return Atom("gaussian" if isinstance(event, Gaussian) else "laplace", event.noise_multiplier)
    if isinstance(event, NonPrivate):
        return Atom.NON_PRIVATE
    raise UnsupportedEvent(
        f"{type(event).__name__} is not an event that the accountants know. Known: {', '.join(EVENT_TYPES)}."
    )


def _sampled(event: PoissonSampled) -> dict[Atom, int]:
    """The one atom that `event` amounts to, or none if it releases nothing."""
    q = event.sampling_probability
    inner: dict[Atom, int] = {}
    _collect(event.event, 1, inner)
    inner = merge_gaussians(inner)
    if q == 1:
        return inner
    if q == 0 or not inner:
        return {}
    if Atom.NON_PRIVATE in inner:
        return {Atom.NON_PRIVATE: 1}
    [(atom, count), *others] = inner.items()
    if others or count > 1:
        raise UnsupportedEvent(
            f"PoissonSampled of {_describe(inner)} has several releases on one sample that are not all "
            "Gaussian, which is not supported; release them on a sample each, or use Gaussian noise for all."
        )
    # A sample of a sample holds each record independently with the product of the probabilities.
    return {Atom(atom.noise, atom.scale, max(atom.q * q, _LEAST_PROBABILITY)): 1}


def merge_gaussians(counts: dict[Atom, int]) -> dict[Atom, int]:
    """Replace all unsampled Gaussians by the one that they compose to, exactly."""
    plain = {a: k for a, k in counts.items() if a.noise == "gaussian" and a.q == 1}
    if sum(plain.values()) <= 1:
        return counts
    precision = math.fsum(k / a.scale**2 for a, k in plain.items())
    rest = {a: k for a, k in counts.items() if a not in plain}
    scale = precision**-0.5
    return {Atom.NON_PRIVATE if scale < _LEAST_SCALE else Atom("gaussian", scale): 1, **rest}


def _doubled_sensitivity(atom: Atom) -> Atom:
    if atom.q != 1:
        raise UnsupportedEvent(
            f"Poisson sampling (probability {atom.q:g}) is not analysed under the relation replace-one; "
            "use zero-out (the number of records is public) or add-or-remove-one."
        )
    return Atom(atom.noise, atom.scale / 2)


def _describe(counts: dict[Atom, int]) -> str:
    return " and ".join(f"{count} × {atom.noise}({atom.scale:g})" for atom, count in counts.items())
