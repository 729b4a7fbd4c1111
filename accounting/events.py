"""What was released: frozen descriptions of mechanisms, independent of any accountant.

An event says what a mechanism did, in numbers that are public and that were fixed before it ran.
Events nest: ``Repeated(PoissonSampled(Gaussian(1.1), 0.01), 1_000)`` is a thousand steps of DP-SGD.
They are validated when made, hashable, and serialise to versioned JSON. Here are the events that are
made of others; `accounting.mechanisms` has those that are not.

`atoms` flattens any event into the multiset of its elementary parts. Multiplicity is counted by `Repeated`
and `Composed` alone, so neither an accountant nor a new mechanism can lose it.
"""

from __future__ import annotations

import inspect
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from accounting.atoms import Atom, Sampling, merge_gaussians, one_sample
from accounting.errors import UnsupportedEvent, UserError

SCHEMA_VERSION = 1
_DEEPEST_NESTING = 32
_MOST_RUNS = 10**15
_Kind = TypeVar("_Kind")

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
    try:
        words = " ".join(repr(value).split())
    except Exception:  # of an int of thousands of digits, or an object that is broken
        words = f"<{type(value).__name__}>"
    return words if len(words) <= 80 else words[:79] + "…"


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


def check_array(value: object, name: str, owner: str) -> npt.NDArray[np.float64]:
    """Return `value` as an array of floats, of any shape; raise UserError unless it holds numbers alone."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # rows of different lengths
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "iuf":
        raise UserError(f"The '{name}' parameter of {owner} must be numbers. Got {shown(value)}.")
    with np.errstate(over="ignore"):
        return array.astype(np.float64)


def check_instance(value: object, kind: type[_Kind], name: str, owner: str) -> _Kind:
    """Return `value` if it is an instance of `kind`; raise UserError otherwise."""
    if isinstance(value, kind):
        return value
    raise UserError(f"The '{name}' parameter of {owner} must be a {kind.__name__}. Got {shown(value)}.")


def check_path(value: object, name: str) -> Path:
    """Return `value` as a path; raise UserError unless it is a text or a path without null bytes."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or "\0" in path:
        raise UserError(f"The {name} must be a path. Got {shown(value)}.")
    return Path(path)


def check_relation(value: object) -> NeighboringRelation:
    """Return `value` if it names a neighbouring relation; raise UserError otherwise."""
    for relation in RELATIONS:
        if isinstance(value, str) and value == relation:
            return relation
    raise UserError(f"The neighbouring relation must be one of {', '.join(RELATIONS)}. Got {shown(value)}.")


@dataclass(frozen=True)
class Event(ABC):
    """Something that was, or will be, released. Abstract: make one of the subclasses.

    A new mechanism is a frozen dataclass that inherits from this class, validates its fields when made, and
    says in `atoms` what it consists of. JSON, multiplicity, composition and both accountants follow.
    """

    # Whether leaving a record out of a sample and its contributing nothing are the same thing.
    may_be_sampled: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        known = EVENT_TYPES.setdefault(cls.__name__, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"There is an event {cls.__name__} already, in {known.__module__}.")
        EVENT_TYPES[cls.__name__] = cls  # defined again, as in a notebook

    @abstractmethod
    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        """The elementary mechanisms that this consists of, and how often each of them runs.

        Raises:
            UnsupportedEvent: where no proof covers the event under this relation; it names an alternative.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable description, from which `from_dict` makes an equal event."""
        return {"schema_version": SCHEMA_VERSION, **self._body()}

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"type": type(self).__name__}
        for name in _field_names(type(self)):
            value = getattr(self, name)
            if isinstance(value, Event):
                body[name] = value._body()
            elif isinstance(value, tuple):
                body[name] = [part._body() for part in value]
            else:
                body[name] = value
        return body

    def _parts(self) -> tuple[Event, ...]:
        values = [getattr(self, name) for name in _field_names(type(self))]
        nested = [value if isinstance(value, tuple) else (value,) for value in values]
        return tuple(part for parts in nested for part in parts if isinstance(part, Event))

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
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise UserError(
                f"The event's schema_version must be {SCHEMA_VERSION}. Got {shown(version)}; "
                "read it with the version of dpml that wrote it."
            )
        return _from_body(body, depth=0)


EVENT_TYPES: dict[str, type[Event]] = {}


def _field_names(kind: type[Event]) -> list[str]:
    return [field.name for field in fields(kind)]


def known_events() -> list[str]:
    """Names of all events that can be made."""
    return [name for name, kind in EVENT_TYPES.items() if not inspect.isabstract(kind)]


def _from_body(body: object, depth: int) -> Event:
    if depth > _DEEPEST_NESTING:
        raise UserError(f"The event is nested deeper than {_DEEPEST_NESTING} levels.")
    if not isinstance(body, Mapping):
        raise UserError(f"An event must be a JSON object. Got {type(body).__name__}.")
    kind = EVENT_TYPES.get(str(body.get("type")))
    if kind is None or inspect.isabstract(kind):
        raise UserError(
            f"The event type {shown(body.get('type'))} is unknown. Known: {', '.join(known_events())}."
        )
    given, wanted = set(body) - {"type"}, set(_field_names(kind))
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


def check_event(value: object, owner: str) -> None:
    """Raise UserError unless `value` is an event that may be a part of another one."""
    if not isinstance(value, Event):
        raise UserError(f"{owner} is made of events such as Gaussian(1.1). Got {shown(value)}.")
    if _depth(value) >= _DEEPEST_NESTING:
        raise UserError(f"{owner} would be nested deeper than {_DEEPEST_NESTING} levels.")


def check_events(values: object, owner: str) -> tuple[Event, ...]:
    """Return `values` as a tuple of events that may be parts of another one; raise UserError otherwise."""
    try:
        parts: tuple[Event, ...] = tuple(values)  # type: ignore[arg-type]
    except TypeError:
        raise UserError(f"The 'events' of {owner} must be a list of events. Got {shown(values)}.") from None
    for part in parts:
        check_event(part, owner)
    return parts


def _depth(event: Event, known: dict[int, int] | None = None) -> int:
    """How deep events nest; a part that occurs several times is looked at once."""
    known = {} if known is None else known
    if id(event) not in known:
        known[id(event)] = 1 + max((_depth(part, known) for part in event._parts()), default=-1)
    return known[id(event)]


def atoms(event: Event, relation: NeighboringRelation = "zero-out") -> dict[Atom, int]:
    """Flatten `event` into its elementary mechanisms and how often each of them runs.

    Unsampled Gaussians are merged into one, exactly.

    Raises:
        UserError: for what is no event, or no relation.
        UnsupportedEvent: where no proof covers the event under this relation.
    """
    if not isinstance(event, Event):
        raise UserError(f"An event such as Gaussian(1.1) is needed. Got {shown(event)}.")
    return merged(event.atoms(check_relation(relation)))


def merged(counts: Mapping[Atom, int]) -> dict[Atom, int]:
    """The same counts, unsampled Gaussians merged, in an order that does not depend on that of recording."""
    return dict(sorted(merge_gaussians(counts).items(), key=repr))


# ---------------------------------------------------------------- events made of events


@dataclass(frozen=True)
class Repeated(Event):
    """`event`, run `count` times with fresh randomness each time."""

    event: Event
    count: int

    def __post_init__(self) -> None:
        check_event(self.event, "Repeated")
        object.__setattr__(self, "count", check_count(self.count, "count", "Repeated"))

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        counts = {atom: count * self.count for atom, count in self.event.atoms(relation).items()}
        return _countable(self, counts) if self.count else {}


@dataclass(frozen=True)
class Composed(Event):
    """All of `events`, one after the other, each with fresh randomness."""

    events: tuple[Event, ...]

    def __init__(self, events: Iterable[Event]) -> None:
        object.__setattr__(self, "events", check_events(events, "Composed"))

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        counts: dict[Atom, int] = {}
        for part in self.events:
            for atom, count in part.atoms(relation).items():
                counts[atom] = counts.get(atom, 0) + count
        return _countable(self, counts)


def _countable(event: Event, counts: dict[Atom, int]) -> dict[Atom, int]:
    if any(count > _MOST_RUNS for count in counts.values()):
        raise UnsupportedEvent(f"{shown(event)} runs more than 10^15 times, which is not supported.")
    return counts


@dataclass(frozen=True)
class PoissonSampled(Event):
    """`event`, run on a sample that holds each record independently with `sampling_probability`.

    Several releases from one and the same sample are `PoissonSampled(Composed([…]), q)`. Two
    PoissonSampled events stand for two independent samples: to account releases that share a sample
    that way would under-count.

    Relations: zero-out and add-or-remove-one (Zhu, Dong & Wang 2022, Theorem 11).
    """

    event: Event
    sampling_probability: float

    def __post_init__(self) -> None:
        check_event(self.event, "PoissonSampled")
        q = check_number(
            self.sampling_probability,
            "sampling_probability",
            "PoissonSampled",
            low=0,
            high=1,
            closed="both",
        )
        object.__setattr__(self, "sampling_probability", q)

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        inner = self.event.atoms(relation)
        if relation == "replace-one" and self.sampling_probability < 1 and inner:
            raise UnsupportedEvent(
                f"{shown(self)} is not analysed under the relation replace-one; use zero-out (the number of "
                "records is public), add-or-remove-one, or SampledWithoutReplacement (a fixed size)."
            )
        return _sampled(self, inner, "poisson", self.sampling_probability)


@dataclass(frozen=True)
class SampledWithoutReplacement(Event):
    """`event`, run on a uniformly drawn set of `sample_size` of the `records` records.

    The sizes are public. Relation: replace-one, which doubles a sum's sensitivity (Zhu et al. 2022,
    Theorem 11 (3)). Batches cut from a shuffled list are not such samples: see `ShuffledEpoch`.
    """

    event: Event
    sample_size: int
    records: int

    def __post_init__(self) -> None:
        check_event(self.event, "SampledWithoutReplacement")
        for name in ("sample_size", "records"):
            value = check_count(getattr(self, name), name, "SampledWithoutReplacement", low=1)
            object.__setattr__(self, name, value)
        if self.sample_size > self.records:
            raise UserError(
                f"The 'sample_size' parameter of SampledWithoutReplacement must be at most the number of "
                f"records, {self.records}. Got {self.sample_size}."
            )

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        if relation != "replace-one" and self.sample_size < self.records:
            raise UnsupportedEvent(
                f"{shown(self)} is analysed under the relation replace-one only (got {relation}); use "
                'neighboring_relation="replace-one", or PoissonSampled.'
            )
        return _sampled(self, self.event.atoms(relation), "fixed-size", self.sample_size / self.records)


def _sampled(event: Event, inner: dict[Atom, int], sampling: Sampling, q: float) -> dict[Atom, int]:
    if q < 1 and (odd := _unsuitable(event)) is not None:
        raise UnsupportedEvent(
            f"{shown(odd)} inside of a sample is not supported: a record that is left out and one that "
            "contributes nothing are not the same there; account it without sampling."
        )
    try:
        return one_sample(inner, sampling, q)
    except ValueError as error:
        raise UnsupportedEvent(
            f"{shown(event)} is not supported: it holds {error}; account it without sampling."
        ) from None


def _unsuitable(event: Event) -> Event | None:
    """The first part of `event` that must not be run on a sample, if any."""
    if not event.may_be_sampled:
        return event
    return next((odd for part in event._parts() if (odd := _unsuitable(part)) is not None), None)


@dataclass(frozen=True)
class ShuffledEpoch(Event):
    """`event`, run on each batch of one pass over a shuffled data set, cut into batches of fixed size.

    A record is in one batch, so an epoch costs what `event` costs once (parallel composition). There is no
    amplification: shuffling is not sampling, and accounting it as such under-states ε many times over (Chua
    et al. 2024). Relations: zero-out and replace-one; under add-or-remove-one the batches would shift.
    """

    event: Event
    may_be_sampled: ClassVar[bool] = False  # a sample's batches shift with every record in it

    def __post_init__(self) -> None:
        check_event(self.event, "ShuffledEpoch")

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        if relation == "add-or-remove-one":
            raise UnsupportedEvent(
                f"{shown(self)} is not analysed under the relation add-or-remove-one, which would shift all "
                "batches; use zero-out or replace-one."
            )
        return self.event.atoms(relation)


@dataclass(frozen=True)
class ZeroCost(Event):
    """A release that costs nothing, and why: for example one that does not depend on the private data.

    It is listed instead of being left out, so that a reviewer can disagree.
    """

    reason: str

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str) or not self.reason.strip():
            raise UserError(f"The 'reason' parameter of ZeroCost must be words. Got {shown(self.reason)}.")

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        return {}


@dataclass(frozen=True)
class NonPrivate(Event):
    """A release without any protection: ε is infinite. It says so instead of being left out."""

    def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
        return {Atom.NON_PRIVATE: 1}
