"""Events: what they accept, how they serialise, and what they amount to for an accountant."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from makers import is_gaussian, scale_of

from accounting import (
    METHODS,
    ZCDP,
    Composed,
    DiscreteGaussian,
    EpsilonDelta,
    Event,
    ExponentialMechanism,
    Gaussian,
    GNMax,
    GNMaxThreshold,
    Laplace,
    LNMax,
    NeighboringRelation,
    NonPrivate,
    PoissonSampled,
    PrivacyAccountant,
    RandomizedResponse,
    Repeated,
    ReportNoisyMax,
    SampledWithoutReplacement,
    ShuffledEpoch,
    UnsupportedEvent,
    UserError,
    ZeroCost,
)
from accounting.atoms import Atom
from accounting.events import EVENT_TYPES, atoms
from accounting.pairs import (
    BoundedRangePair,
    DiscreteGaussianPair,
    GaussianPair,
    LaplacePair,
    ProductPair,
    ResponsePair,
    SwappedResponsePair,
    UniformResponsePair,
)

NOT_A_POSITIVE_NUMBER = [-1, 0, math.nan, math.inf, -math.inf, 1e15, 10**400, "1", True, None, 1j, [1.0]]
NOT_A_PROBABILITY = [-1e-9, 1.0000001, math.nan, math.inf, "0.5", True, None, 10**400]
NOT_A_COUNT = [-1, 1.0, 1.5, math.nan, math.inf, "3", True, None, 10**15 + 1, 10**400]


def shortened(value: object) -> str:
    return repr(value)[:12]


def elementary_events() -> st.SearchStrategy[Event]:
    noise, loss = st.floats(1e-3, 1e14), st.floats(0, 1e6, exclude_max=True)
    return st.one_of(
        *(st.builds(kind, noise) for kind in (Gaussian, Laplace, GNMax, GNMaxThreshold, LNMax)),
        *(st.builds(kind, loss) for kind in (ExponentialMechanism, ReportNoisyMax, ZCDP)),
        st.builds(DiscreteGaussian, st.floats(0.1, 100), st.integers(1, 100)),
        st.builds(RandomizedResponse, st.floats(1e-3, 1), st.integers(2, 10**15)),
        st.builds(EpsilonDelta, loss, st.floats(0, 0.999)),
        st.builds(ZeroCost, st.just("public")),
        st.just(NonPrivate()),
    )


def nested_events() -> st.SearchStrategy[Event]:
    return st.recursive(
        elementary_events(),
        lambda inner: st.one_of(
            st.builds(PoissonSampled, inner, st.floats(0, 1)),
            st.builds(SampledWithoutReplacement, inner, st.integers(1, 50), st.integers(50, 10**15)),
            st.builds(ShuffledEpoch, inner),
            st.builds(Repeated, inner, st.integers(0, 100)),
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
@pytest.mark.parametrize("kind", [Gaussian, Laplace, GNMax, GNMaxThreshold, LNMax])
def test_noise_that_is_no_positive_number_is_refused(kind: type[Gaussian], value: object) -> None:
    with pytest.raises(UserError, match=f"^The '[a-z_]+' parameter of {kind.__name__} must be in"):
        kind(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", NOT_A_PROBABILITY, ids=shortened)
def test_a_sampling_probability_outside_of_the_unit_interval_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="'sampling_probability' parameter of PoissonSampled"):
        PoissonSampled(Gaussian(1), value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [*NOT_A_PROBABILITY, 1.0], ids=shortened)
def test_a_delta_that_is_no_probability_below_one_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"'delta' parameter of EpsilonDelta must be in \[0, 1\)"):
        EpsilonDelta(1.0, value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", NOT_A_PROBABILITY, ids=shortened)
def test_a_noise_probability_outside_of_the_unit_interval_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="'noise_probability' parameter of RandomizedResponse"):
        RandomizedResponse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1e-9, 1e6 + 1, math.nan, math.inf, "1", True, None], ids=shortened)
@pytest.mark.parametrize("kind", [ExponentialMechanism, ReportNoisyMax, EpsilonDelta, ZCDP])
def test_a_loss_that_is_no_finite_number_is_refused(kind: type[EpsilonDelta], value: object) -> None:
    with pytest.raises(UserError, match=f"'(epsilon|rho)' parameter of {kind.__name__} must be in"):
        kind(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, 1, *NOT_A_COUNT], ids=shortened)
def test_fewer_than_two_answers_are_refused(value: object) -> None:
    with pytest.raises(UserError, match="'answers' parameter of RandomizedResponse"):
        RandomizedResponse(0.5, value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, 10_001, *NOT_A_COUNT], ids=shortened)
def test_a_sensitivity_that_is_no_small_whole_number_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="'sensitivity'"):
        DiscreteGaussian(1.0, value)  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "records"), [(0, 10), (11, 10), (1, 0), (1.0, 10), (True, 10), (1, "10")])
def test_a_sample_is_no_larger_than_the_records(size: object, records: object) -> None:
    with pytest.raises(UserError, match="parameter of SampledWithoutReplacement must be"):
        SampledWithoutReplacement(Gaussian(1), size, records)  # type: ignore[arg-type]
    assert SampledWithoutReplacement(Gaussian(1), 10, 10).sample_size == 10


@pytest.mark.parametrize("reason", ["", "  ", None, 1], ids=repr)
def test_what_costs_nothing_says_why(reason: object) -> None:
    with pytest.raises(UserError, match="'reason' parameter of ZeroCost must be words"):
        ZeroCost(reason)  # type: ignore[arg-type]


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
    for make in (
        lambda: PoissonSampled(part, 0.1),  # type: ignore[arg-type]
        lambda: SampledWithoutReplacement(part, 1, 2),  # type: ignore[arg-type]
        lambda: ShuffledEpoch(part),  # type: ignore[arg-type]
        lambda: Repeated(part, 2),  # type: ignore[arg-type]
        lambda: Composed([part]),  # type: ignore[list-item]
    ):
        with pytest.raises(UserError, match="is made of events such as"):
            make()


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
    same_number = {kind(1.0) for kind in (ExponentialMechanism, ReportNoisyMax, EpsilonDelta, ZCDP, GNMax)}
    assert len(same_number) == 5


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
    "abstract family": {"type": "_TeacherVote"},
    "no reason": {"type": "ZeroCost", "reason": ""},
    "answers as float": {"type": "RandomizedResponse", "noise_probability": 0.5, "answers": 2.0},
    "class variable": {"type": "GNMax", "sigma": 1.0, "may_be_sampled": True},
    "sample beyond the records": {
        "type": "SampledWithoutReplacement",
        "event": GAUSSIAN,
        "sample_size": 3,
        "records": 2,
    },
    "field left to its default": {"type": "EpsilonDelta", "epsilon": 1.0},
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


def nested(levels: int) -> Event:
    event: Event = Gaussian(1)
    for _ in range(levels):
        event = Repeated(event, 1)
    return event


def test_what_can_be_made_can_be_read_back_and_deeper_nesting_is_refused_when_made() -> None:
    deepest = nested(32)
    assert Event.from_dict(json.loads(json.dumps(deepest.to_dict()))) == deepest
    for make in (
        lambda: Repeated(deepest, 1),
        lambda: Composed([Gaussian(1), deepest]),
        lambda: PoissonSampled(deepest, 0.5),
        lambda: SampledWithoutReplacement(deepest, 1, 2),
        lambda: ShuffledEpoch(deepest),
    ):
        with pytest.raises(UserError, match="would be nested deeper than 32 levels"):
            make()


# ---------------------------------------------------------------- atoms


def sampled(event: Event, q: float = 0.1) -> PoissonSampled:
    return PoissonSampled(event, q)


def test_multiplicity_multiplies_through_nesting() -> None:
    step = sampled(Gaussian(2), 0.1)
    event = Repeated(Composed([Repeated(step, 3), Composed([step]), Repeated(Laplace(1), 5)]), 7)
    assert atoms(event) == {Atom(GaussianPair(2.0), "poisson", 0.1): 28, Atom(LaplacePair(1.0)): 35}


@given(nested_events(), st.integers(1, 5), st.sampled_from(["zero-out", "add-or-remove-one", "replace-one"]))
def test_repeated_is_the_event_composed_that_often(
    event: Event, count: int, relation: NeighboringRelation
) -> None:
    try:
        together = atoms(Repeated(event, count), relation)
    except UnsupportedEvent:
        with pytest.raises(UnsupportedEvent):
            atoms(Composed([event] * count), relation)
        return
    assert together == atoms(Composed([event] * count), relation)
    assert atoms(Repeated(event, 0), relation) == {}


def test_zero_repetitions_and_empty_compositions_cost_nothing() -> None:
    for event in (
        Repeated(NonPrivate(), 0),
        Composed([]),
        sampled(NonPrivate(), 0),
        sampled(Composed([])),
        ZeroCost("it is public"),
        sampled(ZeroCost("it is public")),
        EpsilonDelta(0.0),
        ZCDP(0.0),
        ExponentialMechanism(0.0),
        ReportNoisyMax(0.0),
        RandomizedResponse(1.0),
    ):
        assert atoms(event) == {}
    assert atoms(Composed([Repeated(Laplace(1), 0), Laplace(2)])) == {Atom(LaplacePair(2.0)): 1}


def test_a_sample_of_a_sample_has_the_product_of_the_probabilities() -> None:
    assert atoms(sampled(sampled(Gaussian(2), 0.5), 0.25)) == {Atom(GaussianPair(2.0), "poisson", 0.125): 1}
    assert atoms(sampled(sampled(Laplace(2), 1), 0.25)) == {Atom(LaplacePair(2.0), "poisson", 0.25): 1}


def test_a_product_of_probabilities_that_underflows_does_not_become_zero() -> None:
    [atom] = atoms(sampled(sampled(Gaussian(1), 1e-200), 1e-200))
    assert atom.q > 0


def test_sampling_with_probability_one_is_no_sampling() -> None:
    assert atoms(sampled(Laplace(3), 1)) == atoms(Laplace(3))
    assert atoms(sampled(Repeated(Laplace(3), 4), 1)) == {Atom(LaplacePair(3.0)): 4}
    everybody = SampledWithoutReplacement(Repeated(Laplace(3), 4), 7, 7)
    assert atoms(everybody) == {Atom(LaplacePair(3.0)): 4}
    assert atoms(sampled(RandomizedResponse(0.5), 1)) == atoms(RandomizedResponse(0.5))
    assert atoms(sampled(ZCDP(0.5), 1)) == atoms(ZCDP(0.5))


def test_gaussians_on_one_sample_are_one_gaussian() -> None:
    # Multipliers 3 and 4: precision 1/9 + 1/16 = (5/12)².
    event = sampled(Composed([Gaussian(3), Gaussian(4)]))
    [(atom, count)] = atoms(event).items()
    assert (is_gaussian(atom), atom.sampling, atom.q, count) == (True, "poisson", 0.1, 1)
    assert scale_of(atom) == pytest.approx(2.4, rel=1e-15)


def test_unsampled_gaussians_are_one_gaussian_and_the_rest_stays() -> None:
    event = Composed([Gaussian(3), Laplace(1), Gaussian(4), sampled(Gaussian(3))])
    found = atoms(event)
    assert sorted(found.values()) == [1, 1, 1]
    [merged] = [scale_of(a) for a in found if is_gaussian(a) and a.q == 1]
    assert merged == pytest.approx(2.4, rel=1e-15)
    assert Atom(GaussianPair(3.0), "poisson", 0.1) in found
    assert Atom(LaplacePair(1.0)) in found


def test_two_samples_are_not_one_sample() -> None:
    two = Composed([sampled(Gaussian(3)), sampled(Gaussian(3))])
    assert atoms(two) == {Atom(GaussianPair(3.0), "poisson", 0.1): 2}


def test_several_releases_on_one_sample_are_one_product() -> None:
    pairs = ((GaussianPair(1.0), 1), (LaplacePair(2.0), 2))
    for parts in ([Gaussian(1), Laplace(2), Laplace(2)], [Laplace(2), Gaussian(1), Laplace(2)]):
        event = sampled(Composed(parts))
        assert atoms(event) == {Atom(ProductPair(pairs), "poisson", 0.1): 1}
        fixed = SampledWithoutReplacement(Composed(parts), 1, 10)
        halved = ((GaussianPair(0.5), 1), (LaplacePair(1.0), 2))
        assert atoms(fixed, "replace-one") == {Atom(ProductPair(halved), "fixed-size", 0.1): 1}
    [(atom, count)] = atoms(sampled(Repeated(Laplace(2), 2))).items()
    assert (atom, count) == (Atom(ProductPair(((LaplacePair(2.0), 2),)), "poisson", 0.1), 1)


def test_several_samples_inside_of_one_sample_are_refused() -> None:
    """They share the outer sample, so they are neither independent samples nor one."""
    inner = sampled(Gaussian(1), 0.5)
    for event in (Repeated(inner, 2), Composed([inner, Laplace(1)])):
        with pytest.raises(UnsupportedEvent, match="several samples inside of one sample"):
            atoms(sampled(event))


def test_samples_of_two_kinds_in_one_another_are_refused() -> None:
    fixed = SampledWithoutReplacement(Gaussian(1), 1, 10)
    for event in (
        SampledWithoutReplacement(fixed, 1, 10),
        Composed([SampledWithoutReplacement(PoissonSampled(Gaussian(1), 0.5), 1, 10)]),
        PoissonSampled(fixed, 0.5),
    ):
        for relation in ("zero-out", "add-or-remove-one", "replace-one"):
            with pytest.raises(UnsupportedEvent):
                atoms(event, relation)


@pytest.mark.parametrize(
    "event",
    [RandomizedResponse(0.5), GNMax(1), GNMaxThreshold(1), LNMax(1), ShuffledEpoch(Gaussian(1))],
    ids=lambda event: type(event).__name__,
)
def test_what_is_not_the_same_without_a_record_and_with_one_that_adds_nothing_is_not_sampled(
    event: Event,
) -> None:
    """The batches of a shuffled sample would shift with the record; so would a vote's majority."""
    for inner in (event, Composed([Gaussian(1), event]), Repeated(event, 2)):
        with pytest.raises(UnsupportedEvent, match=f"^{type(event).__name__}.* inside of a sample"):
            atoms(sampled(inner))


def test_a_sampled_non_private_release_is_non_private() -> None:
    assert atoms(sampled(Composed([NonPrivate(), Laplace(1)]), 1e-9)) == {Atom.NON_PRIVATE: 1}


# ---------------------------------------------------------------- relations


def test_replace_one_halves_the_scale_once() -> None:
    event = Composed([Gaussian(3), Gaussian(4), Laplace(3), Laplace(3)])
    found = atoms(event, "replace-one")
    assert found.pop(Atom(LaplacePair(1.5))) == 2
    [(atom, count)] = found.items()
    assert (scale_of(atom), count) == (pytest.approx(1.2, rel=1e-15), 1)


@pytest.mark.parametrize(
    ("event", "zero_out", "replace_one"),
    [
        (DiscreteGaussian(3.0, 2), DiscreteGaussianPair(3.0, 2), DiscreteGaussianPair(3.0, 4)),
        (ExponentialMechanism(0.5), BoundedRangePair(0.5), BoundedRangePair(1.0)),
        (ExponentialMechanism(500.0), BoundedRangePair(500.0), ResponsePair(1000.0)),
        (ReportNoisyMax(0.5), ResponsePair(0.5), ResponsePair(1.0)),
        (EpsilonDelta(0.5), ResponsePair(0.5), ResponsePair(1.0)),
        (GNMaxThreshold(2.0), GaussianPair(2.0), GaussianPair(1.0)),
        (LNMax(4.0), ResponsePair(0.5), ResponsePair(1.0)),
        (RandomizedResponse(0.5, 4), UniformResponsePair(0.5, 4), SwappedResponsePair(0.5, 4)),
        (ShuffledEpoch(Laplace(3.0)), LaplacePair(3.0), LaplacePair(1.5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_an_event_is_under_each_relation(event: Event, zero_out: object, replace_one: object) -> None:
    assert atoms(event, "zero-out") == {Atom(zero_out): 1}  # type: ignore[arg-type]
    assert atoms(event, "replace-one") == {Atom(replace_one): 1}  # type: ignore[arg-type]


def test_a_changed_vote_is_the_root_of_two() -> None:
    [atom] = atoms(GNMax(3.0))
    assert scale_of(atom) == pytest.approx(3 / math.sqrt(2), rel=1e-15)
    [moved] = atoms(GNMax(3.0), "replace-one")  # to another teacher: two votes change
    assert scale_of(moved) == pytest.approx(scale_of(atom) / 2, rel=1e-15)


def test_two_changes_of_one_record_add_up_delta_times_e_to_the_epsilon() -> None:
    """Group privacy (Dwork & Roth 2014, Theorem 2.2, with δ): (2ε, (1 + e^ε)·δ)."""
    [atom] = atoms(EpsilonDelta(0.5, 1e-5), "replace-one")
    assert isinstance(atom.mechanism, ResponsePair)
    assert atom.mechanism.epsilon == 1.0
    assert atom.mechanism.delta == pytest.approx(1e-5 * (1 + math.exp(0.5)), rel=1e-15)
    assert atoms(EpsilonDelta(20.0, 1e-5), "replace-one") == {Atom.NON_PRIVATE: 1}


def test_replace_one_refuses_poisson_sampling_and_names_what_would_do() -> None:
    message = r"probability=0\.1\).*replace-one.*zero-out.*add-or-remove-one.*SampledWithoutReplacement"
    with pytest.raises(UnsupportedEvent, match=message):
        atoms(sampled(Gaussian(1)), "replace-one")
    assert atoms(sampled(Gaussian(1), 1), "replace-one") == {Atom(GaussianPair(0.5)): 1}


def test_a_sample_of_fixed_size_is_for_replace_one_alone() -> None:
    event = SampledWithoutReplacement(Gaussian(3), 10, 1_000)
    assert atoms(event, "replace-one") == {Atom(GaussianPair(1.5), "fixed-size", 0.01): 1}
    for relation in ("zero-out", "add-or-remove-one"):
        with pytest.raises(UnsupportedEvent, match=r"replace-one.*PoissonSampled"):
            atoms(event, relation)


@pytest.mark.parametrize("event", [ShuffledEpoch(Gaussian(1)), RandomizedResponse(0.5)], ids=repr)
def test_what_adding_a_record_would_shift_is_refused_under_it(event: Event) -> None:
    with pytest.raises(UnsupportedEvent, match=r"add-or-remove-one.*use .*(zero-out|replace-one)"):
        atoms(event, "add-or-remove-one")


# ---------------------------------------------------------------- a new mechanism


@pytest.fixture
def telepathy() -> Iterator[type[Event]]:
    """A mechanism that somebody else brings: a frozen dataclass and its atoms, and nothing else."""

    @dataclass(frozen=True)
    class Telepathy(Event):
        clarity: float

        def atoms(self, relation: NeighboringRelation) -> dict[Atom, int]:
            if relation == "replace-one":
                raise UnsupportedEvent("Telepathy is not analysed under replace-one; use zero-out.")
            return {Atom(LaplacePair(1 / self.clarity)): 2}

    yield Telepathy
    del EVENT_TYPES["Telepathy"]


def test_a_new_mechanism_needs_to_say_its_atoms_alone(telepathy: type[Event]) -> None:
    event = telepathy(0.5)  # type: ignore[call-arg]
    assert Event.from_dict(json.loads(json.dumps(event.to_dict()))) == event
    assert atoms(Repeated(Composed([event, Laplace(2.0)]), 3)) == {Atom(LaplacePair(2.0)): 9}
    for method in METHODS:
        ours, known = PrivacyAccountant(method), PrivacyAccountant(method)
        ours.record(Repeated(event, 3))
        known.record(Repeated(Laplace(2.0), 6))
        assert ours.epsilon(1e-5) == known.epsilon(1e-5)
    with pytest.raises(UnsupportedEvent, match="Telepathy"):
        PrivacyAccountant(neighboring_relation="replace-one").record(event)


def test_an_event_that_does_not_say_its_atoms_cannot_be_made() -> None:
    try:

        class Vague(Event):
            pass

        with pytest.raises(TypeError, match="abstract"):
            Vague()  # type: ignore[abstract]
        with pytest.raises(UserError, match="type 'Vague' is unknown"):
            Event.from_dict({"schema_version": 1, "type": "Vague"})
    finally:
        del EVENT_TYPES["Vague"]


def test_more_runs_than_a_float_can_hold_are_refused() -> None:
    event: Event = sampled(Gaussian(1e3))
    for _ in range(25):
        event = Repeated(event, 10**15)
    with pytest.raises(UnsupportedEvent, match=r"10\^15"):
        atoms(event)


def test_runs_are_counted_alike_however_they_are_written() -> None:
    most = Repeated(sampled(Gaussian(1e3)), 10**15)
    assert list(atoms(most).values()) == [10**15]
    for event in (Repeated(most, 2), Composed([most, most])):
        with pytest.raises(UnsupportedEvent, match=r"10\^15"):
            atoms(event)
