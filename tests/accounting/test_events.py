"""Events: what they accept, how they serialise, and what they amount to for an accountant."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounting import (
    Composed,
    Event,
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    Repeated,
    UnsupportedEvent,
    UserError,
)
from accounting.events import Atom, atoms

NOT_A_POSITIVE_NUMBER = [-1, 0, math.nan, math.inf, -math.inf, 1e15, 10**400, "1", True, None, 1j, [1.0]]
NOT_A_PROBABILITY = [-1e-9, 1.0000001, math.nan, math.inf, "0.5", True, None, 10**400]
NOT_A_COUNT = [-1, 1.0, 1.5, math.nan, math.inf, "3", True, None, 10**15 + 1, 10**400]


def shortened(value: object) -> str:
    return repr(value)[:12]


def nested_events() -> st.SearchStrategy[Event]:
    noise = st.floats(1e-3, 1e14)
    leaves = st.one_of(st.builds(Gaussian, noise), st.builds(Laplace, noise), st.just(NonPrivate()))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(PoissonSampled, inner, st.floats(0, 1)),
            st.builds(Repeated, inner, st.integers(0, 10**6)),
            st.builds(Composed, st.lists(inner, max_size=3)),
        ),
        max_leaves=8,
    )


# ---------------------------------------------------------------- validation


def test_the_message_says_parameter_owner_interval_and_value() -> None:
    with pytest.raises(UserError) as refusal:
        Gaussian(-1)
    expected = "The 'noise_multiplier' parameter of Gaussian must be in (0, 1e+15). Got -1."
    assert str(refusal.value) == expected


def test_a_probability_may_be_zero_or_one_and_the_message_says_so() -> None:
    assert PoissonSampled(Gaussian(1), 0).sampling_probability == 0.0
    assert PoissonSampled(Gaussian(1), 1).sampling_probability == 1.0
    with pytest.raises(UserError) as refusal:
        PoissonSampled(Gaussian(1), 1.5)
    expected = "The 'sampling_probability' parameter of PoissonSampled must be in [0, 1]. Got 1.5."
    assert str(refusal.value) == expected


def test_a_count_is_a_whole_number_and_the_message_says_so() -> None:
    with pytest.raises(UserError) as refusal:
        Repeated(Gaussian(1), 2.5)  # type: ignore[arg-type]
    expected = "The 'count' parameter of Repeated must be a whole number from 0 to 10^15. Got 2.5."
    assert str(refusal.value) == expected


@pytest.mark.parametrize("value", NOT_A_POSITIVE_NUMBER, ids=shortened)
@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_noise_that_is_no_positive_number_is_refused(kind: type[Gaussian], value: object) -> None:
    with pytest.raises(UserError, match=f"^The 'noise_multiplier' parameter of {kind.__name__} must be in"):
        kind(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", NOT_A_PROBABILITY, ids=shortened)
def test_a_sampling_probability_outside_of_the_unit_interval_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="'sampling_probability' parameter of PoissonSampled"):
        PoissonSampled(Gaussian(1), value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", NOT_A_COUNT, ids=shortened)
def test_a_count_that_is_no_whole_number_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="'count' parameter of Repeated"):
        Repeated(Gaussian(1), value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.ones((3, 3)), "two\nlines", "x" * 40_000], ids=["array", "str", "long"])
@pytest.mark.parametrize("make", [Gaussian, lambda v: Repeated(Gaussian(1), v), lambda v: Repeated(v, 1)])
def test_a_refusal_is_one_short_line_whatever_was_passed(make: type[Gaussian], value: object) -> None:
    with pytest.raises(UserError) as refusal:
        make(value)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("part", [None, 1.1, "Gaussian(1.1)", Gaussian, [Gaussian(1)]], ids=repr)
def test_what_is_no_event_is_refused_as_a_part(part: object) -> None:
    for make in (lambda: PoissonSampled(part, 0.1), lambda: Repeated(part, 2), lambda: Composed([part])):
        with pytest.raises(UserError, match="is made of events such as"):
            make()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("value", [None, 3, Gaussian(1)], ids=repr)
def test_composed_refuses_what_is_no_list(value: object) -> None:
    with pytest.raises(UserError, match="must be a list of events"):
        Composed(value)  # type: ignore[arg-type]


# ---------------------------------------------------------------- values


def test_events_are_frozen() -> None:
    event = Gaussian(1.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.noise_multiplier = 100.0  # type: ignore[misc]


def test_numbers_are_normalised_so_that_equal_events_are_equal() -> None:
    assert Gaussian(1) == Gaussian(1.0) == Gaussian(np.float32(1))
    assert Repeated(Gaussian(1), np.int64(3)) == Repeated(Gaussian(1), 3)
    assert type(Repeated(Gaussian(1), np.int64(3)).count) is int
    assert type(Gaussian(np.float32(1)).noise_multiplier) is float


def test_events_of_different_kinds_or_numbers_differ() -> None:
    events = {Gaussian(1), Gaussian(2), Laplace(1), NonPrivate(), Repeated(Gaussian(1), 1), Composed([])}
    assert len(events) == 6


def test_composed_accepts_lists_generators_and_tuples_alike() -> None:
    parts = [Gaussian(1), Laplace(2)]
    assert Composed(parts) == Composed(tuple(parts)) == Composed(p for p in parts)
    assert Composed(parts).events == tuple(parts)


@given(nested_events())
def test_equal_events_have_equal_hashes(event: Event) -> None:
    twin = Event.from_dict(event.to_dict())
    assert twin == event
    assert hash(twin) == hash(event)


# ---------------------------------------------------------------- JSON


@given(nested_events())
def test_json_returns_an_equal_event(event: Event) -> None:
    text = json.dumps(event.to_dict(), allow_nan=False)
    assert Event.from_dict(json.loads(text)) == event


def test_the_json_form_is_stable() -> None:
    event = Repeated(PoissonSampled(Composed([Gaussian(1.1), NonPrivate()]), 0.01), 3)
    assert event.to_dict() == {
        "schema_version": 1,
        "type": "Repeated",
        "count": 3,
        "event": {
            "type": "PoissonSampled",
            "sampling_probability": 0.01,
            "event": {
                "type": "Composed",
                "events": [{"type": "Gaussian", "noise_multiplier": 1.1}, {"type": "NonPrivate"}],
            },
        },
    }


GAUSSIAN = {"type": "Gaussian", "noise_multiplier": 1.0}
BAD_BODIES = {
    "unknown type": {"type": "Magic"},
    "abstract type": {"type": "Event"},
    "no type": {"noise_multiplier": 1.0},
    "type is a list": {"type": ["Gaussian"], "noise_multiplier": 1.0},
    "missing field": {"type": "Gaussian"},
    "extra field": {**GAUSSIAN, "clip_norm": 1.0},
    "NaN": {"type": "Gaussian", "noise_multiplier": math.nan},
    "infinity": {"type": "Laplace", "noise_multiplier": math.inf},
    "number as text": {"type": "Gaussian", "noise_multiplier": "1.0"},
    "number as bool": {"type": "PoissonSampled", "event": GAUSSIAN, "sampling_probability": True},
    "null": {"type": "Gaussian", "noise_multiplier": None},
    "count as float": {"type": "Repeated", "event": GAUSSIAN, "count": 3.0},
    "event is a list": {"type": "Repeated", "event": [GAUSSIAN], "count": 3},
    "event is a number": {"type": "Repeated", "event": 1.0, "count": 3},
    "events is an object": {"type": "Composed", "events": GAUSSIAN},
    "events holds a number": {"type": "Composed", "events": [1.0]},
    "version inside": {"type": "Composed", "events": [{"schema_version": 1, **GAUSSIAN}]},
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_bad_json_is_refused_in_one_line(body: dict[str, object]) -> None:
    with pytest.raises(UserError) as refusal:
        Event.from_dict({"schema_version": 1, **body})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("version", [None, 0, 2, "1"], ids=repr)
def test_another_schema_version_is_refused(version: object) -> None:
    with pytest.raises(UserError, match="schema_version must be 1"):
        Event.from_dict({"schema_version": version, **GAUSSIAN})


def test_a_missing_schema_version_is_refused() -> None:
    with pytest.raises(UserError, match="schema_version must be 1"):
        Event.from_dict(GAUSSIAN)


@pytest.mark.parametrize("data", [[], None, "Gaussian", 1], ids=repr)
def test_what_is_no_json_object_is_refused(data: object) -> None:
    with pytest.raises(UserError, match="must be a JSON object"):
        Event.from_dict(data)  # type: ignore[arg-type]


def test_json_nested_too_deeply_is_refused_before_the_stack_overflows() -> None:
    body: dict[str, object] = dict(GAUSSIAN)
    for _ in range(500):
        body = {"type": "Repeated", "event": body, "count": 1}
    with pytest.raises(UserError, match="nested deeper than 32"):
        Event.from_dict({"schema_version": 1, **body})


# ---------------------------------------------------------------- atoms


def sampled(event: Event, q: float = 0.1) -> PoissonSampled:
    return PoissonSampled(event, q)


def test_multiplicity_multiplies_through_nesting() -> None:
    step = sampled(Gaussian(2), 0.1)
    event = Repeated(Composed([Repeated(step, 3), Composed([step]), Repeated(Laplace(1), 5)]), 7)
    assert atoms(event) == {Atom("gaussian", 2.0, 0.1): 28, Atom("laplace", 1.0): 35}


@given(nested_events(), st.integers(0, 5))
def test_repeated_is_the_event_composed_that_often(event: Event, count: int) -> None:
    try:
        together = atoms(Repeated(event, count))
    except UnsupportedEvent:
        with pytest.raises(UnsupportedEvent):
            atoms(Composed([event] * count))
        return
    assert together == atoms(Composed([event] * count))


def test_zero_repetitions_and_empty_compositions_cost_nothing() -> None:
    for event in (Repeated(NonPrivate(), 0), Composed([]), sampled(NonPrivate(), 0), sampled(Composed([]))):
        assert atoms(event) == {}
    assert atoms(Composed([Repeated(Laplace(1), 0), Laplace(2)])) == {Atom("laplace", 2.0): 1}


def test_a_sample_of_a_sample_has_the_product_of_the_probabilities() -> None:
    assert atoms(sampled(sampled(Gaussian(2), 0.5), 0.25)) == {Atom("gaussian", 2.0, 0.125): 1}
    assert atoms(sampled(sampled(Laplace(2), 1), 0.25)) == {Atom("laplace", 2.0, 0.25): 1}


def test_a_product_of_probabilities_that_underflows_does_not_become_zero() -> None:
    [atom] = atoms(sampled(sampled(Gaussian(1), 1e-200), 1e-200))
    assert atom.q > 0


def test_sampling_with_probability_one_is_no_sampling() -> None:
    assert atoms(sampled(Laplace(3), 1)) == atoms(Laplace(3))
    assert atoms(sampled(Repeated(Laplace(3), 4), 1)) == {Atom("laplace", 3.0): 4}


def test_gaussians_on_one_sample_are_one_gaussian() -> None:
    # Multipliers 3 and 4: precision 1/9 + 1/16 = (5/12)².
    event = sampled(Composed([Gaussian(3), Gaussian(4)]))
    [(atom, count)] = atoms(event).items()
    assert (atom.noise, atom.q, count) == ("gaussian", 0.1, 1)
    assert atom.scale == pytest.approx(2.4, rel=1e-15)


def test_unsampled_gaussians_are_one_gaussian_and_the_rest_stays() -> None:
    event = Composed([Gaussian(3), Laplace(1), Gaussian(4), sampled(Gaussian(3))])
    found = atoms(event)
    assert sorted(found.values()) == [1, 1, 1]
    [merged] = [a.scale for a in found if a.noise == "gaussian" and a.q == 1]
    assert merged == pytest.approx(2.4, rel=1e-15)
    assert Atom("gaussian", 3.0, 0.1) in found
    assert Atom("laplace", 1.0) in found


def test_two_samples_are_not_one_sample() -> None:
    assert atoms(Composed([sampled(Gaussian(3)), sampled(Gaussian(3))])) == {Atom("gaussian", 3.0, 0.1): 2}


def test_several_releases_on_one_sample_must_all_be_gaussian() -> None:
    mixed = Composed([Gaussian(1), Laplace(2)])
    for inner in (Repeated(Laplace(2), 2), mixed, Repeated(sampled(Gaussian(1)), 2)):
        with pytest.raises(UnsupportedEvent, match="several releases on one sample"):
            atoms(sampled(inner))


def test_a_sampled_non_private_release_is_non_private() -> None:
    assert atoms(sampled(Composed([NonPrivate(), Laplace(1)]), 1e-9)) == {Atom.NON_PRIVATE: 1}


def test_replace_one_halves_the_scale_once() -> None:
    event = Composed([Gaussian(3), Gaussian(4), Laplace(3), Laplace(3)])
    found = atoms(event, "replace-one")
    assert found.pop(Atom("laplace", 1.5)) == 2
    [(atom, count)] = found.items()
    assert (atom.scale, count) == (pytest.approx(1.2, rel=1e-15), 1)


def test_replace_one_refuses_sampling_and_names_what_would_do() -> None:
    with pytest.raises(UnsupportedEvent, match=r"probability 0\.1.*replace-one.*zero-out.*add-or-remove-one"):
        atoms(sampled(Gaussian(1)), "replace-one")
    assert atoms(sampled(Gaussian(1), 1), "replace-one") == {Atom("gaussian", 0.5): 1}


def test_an_event_of_another_kind_is_refused_by_name() -> None:
    class Telepathy(Event):
        pass

    with pytest.raises(UnsupportedEvent, match="Telepathy is not an event that the accountants know"):
        atoms(Composed([Telepathy()]))


def test_more_runs_than_a_float_can_hold_are_refused() -> None:
    event: Event = sampled(Gaussian(1e3))
    for _ in range(25):
        event = Repeated(event, 10**15)
    with pytest.raises(UnsupportedEvent, match=r"10\^15"):
        atoms(event)
