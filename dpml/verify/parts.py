"""What a run's events consist of, read from their JSON by rules of its own.

`accounting.events` has another reader of the same format. This one shares nothing with it, so that a mistake
in one of the two shows as two different ε. Every rule says which mechanism stands for the event:
noise over the sensitivity, or the ε of a pure guarantee.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mpmath as mp

RELATIONS = ("zero-out", "add-or-remove-one", "replace-one")
_DEEPEST = 32
_MOST = 10**15


class CannotVerify(Exception):
    """Nothing here can confirm or contradict this; the message says why."""


class Malformed(Exception):
    """This is no description of events; the message says why."""


@dataclass(frozen=True)
class Part:
    """An elementary mechanism, which runs on all records or on a Poisson sample of them.

    Attributes:
        kind: "gaussian", "laplace" or "pure" (all have a pair), "zcdp", "smooth", "best-of", "worst-of" or
            "all" (Rényi divergences alone), or "none" (no protection).
        numbers: Gaussian: (σ over the sensitivity,); Laplace: (scale over the sensitivity,); pure: (ε, δ);
            zCDP: (ρ,); smooth: (β, σ, shift); best-of: (mean number of runs, shape η).
        q: The probability that a record is in the sample.
        of: What one of the best-of runs consists of, which parts the worst-of is one of, or all run.
    """

    kind: str
    numbers: tuple[mp.mpf, ...] = ()
    q: float = 1.0
    of: tuple[tuple[Part, int], ...] = ()


Parts = dict[Part, int]
"""Parts, and how often each of them runs."""
NO_PROTECTION = Part("none")
WITHOUT_PAIR = ("zcdp", "smooth", "best-of", "worst-of", "all")


def read(body: object, relation: str) -> Parts:
    """The parts of one event, given as its JSON object, under a neighbouring relation.

    Raises:
        Malformed: if it is no event.
        CannotVerify: if it is one that nothing is known of here, or not under this relation.
    """
    if relation not in RELATIONS:
        raise Malformed(f"the neighbouring relation is {relation!r:.40}")
    with mp.workdps(60):
        return _merged(_read(body, relation, 0))


def together(bodies: list[Any], relation: str) -> Parts:
    """The parts of several events."""
    total: Counter[Part] = Counter()
    for body in bodies:
        total.update(read(body, relation))
    with mp.workdps(60):
        return _merged(total)


def _read(body: object, relation: str, depth: int) -> Parts:
    if not isinstance(body, Mapping) or depth > _DEEPEST:
        raise Malformed("an event is no JSON object, or nested too deeply")
    kind, doubled = body.get("type"), 2 if relation == "replace-one" else 1

    def inside() -> Parts:
        return _read(body.get("event"), relation, depth + 1)

    def number(name: str, low: float = 0.0, high: float = 1e15, *, zero: bool = False) -> mp.mpf:
        value = body.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise Malformed(f"{name} of {kind} is {value!r:.40}")
        if not (low < value <= high or (zero and value == low)):
            raise Malformed(f"{name} of {kind} is {value!r:.40}")
        return mp.mpf(value)

    match kind:
        case "Repeated":
            runs = _count(body.get("count"), "the count of Repeated")
            return {part: _count(k * runs, "a count") for part, k in inside().items()} if runs else {}
        case "Composed":
            members = body.get("events")
            if not isinstance(members, list):
                raise Malformed("the events of Composed are no list")
            total: Counter[Part] = Counter()
            for member in members:
                total.update(_read(member, relation, depth + 1))
            return dict(total)
        case "OneOf":
            members = body.get("events")
            if not isinstance(members, list) or not members:
                raise Malformed("the events of OneOf are no list of at least one")
            return _worst([_merged(_read(member, relation, depth + 1)) for member in members])
        case "PoissonSampled":
            q = float(number("sampling_probability", high=1.0, zero=True))
            return _sampled(_merged(inside()), q, relation)
        case "ShuffledEpoch" if relation != "add-or-remove-one":
            return inside()
        case "ZeroCost":
            return {}
        case "NonPrivate":
            return {NO_PROTECTION: 1}
        case "Gaussian":  # one record adds a vector of norm C; replacing it, a difference of norm 2C
            return {Part("gaussian", (number("noise_multiplier") / doubled,)): 1}
        case "Laplace":
            return {Part("laplace", (number("noise_multiplier") / doubled,)): 1}
        case "GNMax":  # one vote moves from a class to another: (1, −1), of norm √2
            return {Part("gaussian", (number("sigma") / mp.sqrt(2) / doubled,)): 1}
        case "GNMaxThreshold":  # the largest count moves by one
            return {Part("gaussian", (number("sigma") / doubled,)): 1}
        case "LNMax":  # (1, −1) has the L1 norm 2
            return _pure(2 * doubled / number("scale"))
        case "ReportNoisyMax":
            return _pure(number("epsilon", zero=True) * doubled)
        case "EpsilonDelta" if relation != "replace-one":
            return _pure(number("epsilon", zero=True), number("delta", high=1.0, zero=True))
        case "ZCDP":
            rho = number("rho", zero=True) * doubled**2
            return {Part("zcdp", (rho,)): 1} if rho else {}
        case "SmoothRelease":
            numbers = number("beta"), number("noise_multiplier"), number("shift", zero=True)
            return {Part("smooth", numbers): 1}
        case "BestOfRuns":
            if body.get("shape") is None:
                raise CannotVerify("a Poisson number of runs to choose from is not covered")
            base = _merged(inside())
            if not base or NO_PROTECTION in base:
                return base
            mean, shape = number("mean_runs", low=1.0), number("shape", low=-1.0, high=1e3)
            return {Part("best-of", (mean, shape), of=_in_order(base)): 1}
        case str():
            raise CannotVerify(f"the event {kind:.40} under the relation {relation} is not covered")
        case _:
            raise Malformed("an event has no type")


def _worst(members: list[Parts]) -> Parts:
    """One of several, whichever costs most."""
    distinct = list(dict.fromkeys(map(_in_order, members)))
    if len(distinct) == 1 or any(NO_PROTECTION in member for member in members):
        return next((member for member in members if NO_PROTECTION in member), members[0])
    return {Part("worst-of", of=tuple((Part("all", of=member), 1) for member in distinct)): 1}


def _in_order(parts: Parts) -> tuple[tuple[Part, int], ...]:
    return tuple(sorted(parts.items(), key=repr))


def _count(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
        raise Malformed(f"{what} is {value!r:.40}")
    return value


def _pure(epsilon: mp.mpf, delta: mp.mpf | int = 0) -> Parts:
    return {Part("pure", (epsilon, mp.mpf(delta))): 1} if epsilon or delta else {}


def _sampled(inner: Parts, q: float, relation: str) -> Parts:
    """All of `inner` on one and the same Poisson sample."""
    if q == 1 or not inner:
        return inner
    if q == 0:
        return {}
    if relation == "replace-one":
        raise CannotVerify("Poisson sampling under the relation replace-one is not covered")
    [(part, count), *others] = inner.items()
    if others or count > 1:
        raise CannotVerify("releases on one sample that are not all Gaussian are not covered")
    if part.kind == "none":
        return inner
    if part.kind in WITHOUT_PAIR:
        raise CannotVerify("a sample of a mechanism that has Rényi divergences alone is not covered")
    # A sample of a sample holds a record with the product of both probabilities.
    return {Part(part.kind, part.numbers, part.q * q): 1}


def _merged(parts: Mapping[Part, int]) -> Parts:
    """The same, with one Gaussian in place of all unsampled ones: their σ⁻² add."""
    if parts.get(NO_PROTECTION):
        return {NO_PROTECTION: 1}
    plain = {p: k for p, k in parts.items() if p.kind == "gaussian" and p.q == 1}
    rest = {p: k for p, k in parts.items() if p not in plain and k}
    if sum(plain.values()) == 0:
        return rest
    precision = mp.fsum(k / p.numbers[0] ** 2 for p, k in plain.items())
    return {Part("gaussian", (1 / mp.sqrt(precision),)): 1, **rest}
