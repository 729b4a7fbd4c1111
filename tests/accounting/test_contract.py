"""What every event and every accountant has to keep, whatever it computes.

A new event type joins `INSTANCES`, and a new accountant `METHODS`; nothing else is needed to be held to all
of this. Times are kept short by a wide tolerance, which no promise here depends on.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting import (
    METHODS,
    RELATIONS,
    ZCDP,
    BestOfRuns,
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
    Method,
    NeighboringRelation,
    NonPrivate,
    OneOf,
    PoissonSampled,
    PrivacyAccountant,
    RandomizedResponse,
    Repeated,
    ReportNoisyMax,
    SampledWithoutReplacement,
    ShuffledEpoch,
    SmoothRelease,
    UnsupportedEvent,
    ZeroCost,
)
from accounting.events import EVENT_TYPES, atoms

DELTA = 1e-5
TOLERANCE = 0.02
RUNS = 4

ELEMENTARY: dict[str, Event] = {
    "Gaussian": Gaussian(2.0),
    "Laplace": Laplace(3.0),
    "DiscreteGaussian": DiscreteGaussian(5.0, 2),
    "RandomizedResponse": RandomizedResponse(0.7, 4),
    "ExponentialMechanism": ExponentialMechanism(0.4),
    "ReportNoisyMax": ReportNoisyMax(0.4),
    "EpsilonDelta pure": EpsilonDelta(0.4),
    "EpsilonDelta": EpsilonDelta(0.3, 1e-7),
    "GNMax": GNMax(10.0),
    "GNMaxThreshold": GNMaxThreshold(10.0),
    "LNMax": LNMax(10.0),
    "ZCDP": ZCDP(0.01),
    "SmoothRelease": SmoothRelease(0.01, 20.0),
    "BestOfRuns": BestOfRuns(Gaussian(5.0), 10.0),
    "BestOfRuns, Poisson": BestOfRuns(Gaussian(5.0), 10.0, None),
    "NonPrivate": NonPrivate(),
    "ZeroCost": ZeroCost("It depends on public data alone."),
}
TWO_RELEASES = Composed([Gaussian(3.0), Laplace(5.0)])
ONE_SAMPLE = [
    *(
        name
        for name, event in ELEMENTARY.items()
        if event.may_be_sampled and name not in ("ZCDP", "NonPrivate")
    )
]
STEP = PoissonSampled(Gaussian(1.1), 0.02)

INSTANCES: dict[str, Event] = {
    **ELEMENTARY,
    **{f"PoissonSampled {name}": PoissonSampled(ELEMENTARY[name], 0.05) for name in ONE_SAMPLE},
    "PoissonSampled NonPrivate": PoissonSampled(NonPrivate(), 0.05),
    "PoissonSampled, two releases": PoissonSampled(TWO_RELEASES, 0.05),
    "SampledWithoutReplacement": SampledWithoutReplacement(Gaussian(4.0), 5, 100),
    "SampledWithoutReplacement Laplace": SampledWithoutReplacement(Laplace(6.0), 5, 100),
    "SampledWithoutReplacement DiscreteGaussian": SampledWithoutReplacement(DiscreteGaussian(4.0), 5, 100),
    "SampledWithoutReplacement EpsilonDelta": SampledWithoutReplacement(EpsilonDelta(0.3, 1e-7), 5, 100),
    "SampledWithoutReplacement, two releases": SampledWithoutReplacement(TWO_RELEASES, 5, 100),
    "ShuffledEpoch": ShuffledEpoch(Gaussian(2.0)),
    "Repeated": Repeated(STEP, 3),
    "Composed": Composed([STEP, Laplace(9.0), Gaussian(9.0), EpsilonDelta(0.1)]),
    "nothing": Composed([]),
    "OneOf": OneOf([STEP, Gaussian(9.0)]),
}

# What has no proof, and must say so. Relations first, then methods.
UNSUPPORTED: dict[type[Event], set[str]] = {
    PoissonSampled: {"replace-one"},
    SampledWithoutReplacement: {"zero-out", "add-or-remove-one"},
    ShuffledEpoch: {"add-or-remove-one"},
    RandomizedResponse: {"add-or-remove-one"},
    ZCDP: {"pld"},
    SmoothRelease: {"pld"},
    BestOfRuns: {"pld"},
    OneOf: {"pld"},
}


def parts_of(event: Event) -> list[Event]:
    """`event` and everything inside of it."""
    return [event, *itertools.chain.from_iterable(parts_of(part) for part in event._parts())]


def costs_nothing_or_everything(event: Event) -> bool:
    return any(isinstance(part, NonPrivate | ZeroCost) for part in parts_of(event))


def is_supported(event: Event, relation: str, method: str = "any") -> bool:
    parts = parts_of(event)
    refused = set[str]().union(*(UNSUPPORTED.get(type(part), set()) for part in parts))
    if any(isinstance(part, EpsilonDelta) and part.delta > 0 for part in parts):
        refused |= {"rdp"}
    if isinstance(event, PoissonSampled | SampledWithoutReplacement) and isinstance(event.event, ZeroCost):
        refused -= {"replace-one"}  # nothing is sampled
    if relation in refused or method in refused:
        return False
    return not set(METHODS) <= refused


SUPPORTED = [
    pytest.param(event, relation, method, id=f"{name}-{relation}-{method}")
    for name, event in INSTANCES.items()
    for relation in ("zero-out", "replace-one")  # under add-or-remove-one the atoms are zero-out's: see below
    for method in METHODS
    if is_supported(event, relation, method)
]
every_supported = pytest.mark.parametrize(("event", "relation", "method"), SUPPORTED)


def accountant_of(relation: str, method: str, *events: Event) -> PrivacyAccountant:
    made = PrivacyAccountant(
        method,  # type: ignore[arg-type]
        neighboring_relation=relation,  # type: ignore[arg-type]
        tolerance=TOLERANCE,
    )
    for event in events:
        made.record(event)
    return made


def bounds_of(event: Event, relation: str, method: str, delta: float = DELTA) -> tuple[float, float]:
    """(lower, upper); by "rdp" the lower bound is left out, which is PLD's and takes longer."""
    counts = tuple(atoms(event, relation).items())  # type: ignore[arg-type]
    return _bounds_of(counts, event, relation, method, delta)


_known: dict[tuple[object, ...], tuple[float, float]] = {}


def _bounds_of(
    counts: tuple[object, ...], event: Event, relation: str, method: str, delta: float
) -> tuple[float, float]:
    key = (counts, method, delta)
    if key not in _known:
        accountant = accountant_of(relation, method, event)
        only_upper = (0.0, accountant.epsilon(delta)) if method == "rdp" else None
        _known[key] = only_upper or accountant.epsilon_bounds(delta)
    return _known[key]


# ---------------------------------------------------------------- the list


def test_every_event_type_has_an_instance() -> None:
    concrete = {kind for kind in EVENT_TYPES.values() if not inspect.isabstract(kind)}
    assert concrete <= {type(event) for event in INSTANCES.values()}


def test_every_event_that_may_be_sampled_is_sampled_in_the_list() -> None:
    sampled = {type(event.event) for event in INSTANCES.values() if isinstance(event, PoissonSampled)}
    elementary = {type(event) for event in ELEMENTARY.values() if event.may_be_sampled}
    assert elementary - {ZCDP} <= sampled


# ---------------------------------------------------------------- JSON and hashing


@pytest.mark.parametrize("event", INSTANCES.values(), ids=INSTANCES.keys())
def test_json_and_back(event: Event) -> None:
    text = json.dumps(event.to_dict(), allow_nan=False)
    twin = Event.from_dict(json.loads(text))
    assert twin == event
    assert hash(twin) == hash(event)
    assert json.dumps(twin.to_dict(), allow_nan=False) == text


# ---------------------------------------------------------------- multiplicity and order


@every_supported
def test_repeated_is_composed_is_recorded_that_often(event: Event, relation: str, method: str) -> None:
    repeated = accountant_of(relation, method, Repeated(event, RUNS))
    others = [
        accountant_of(relation, method, *[event] * RUNS),
        accountant_of(relation, method, Composed([event] * RUNS)),
        accountant_of(relation, method, Repeated(Repeated(event, 2), RUNS // 2)),
        accountant_of(relation, method, event, Repeated(event, RUNS - 1), Repeated(event, 0)),
    ]
    counts = atoms(repeated.event, relation)  # type: ignore[arg-type]
    for other in others:
        assert atoms(other.event, relation) == counts  # type: ignore[arg-type]
    assert others[0].epsilon(DELTA) == repeated.epsilon(DELTA) == others[1].epsilon(DELTA)
    assert others[0].delta(0.3) == repeated.delta(0.3)


@every_supported
def test_more_runs_cost_more(event: Event, relation: str, method: str) -> None:
    """The count of runs reaches the answer, under every event and accountant."""
    once, often = bounds_of(event, relation, method), bounds_of(Repeated(event, RUNS), relation, method)
    if costs_nothing_or_everything(event) or event == Composed([]):
        assert once == often
        assert once[1] in (0.0, math.inf)
    else:
        assert 0 < 1.05 * once[1] < often[1]
        assert once[0] <= often[1]


@every_supported
def test_the_order_of_recording_does_not_matter_at_all(event: Event, relation: str, method: str) -> None:
    sampled = SampledWithoutReplacement(Gaussian(3.0), 1, 10) if relation == "replace-one" else STEP
    found = {
        accountant_of(relation, method, *order).epsilon(DELTA)
        for order in itertools.islice(itertools.permutations([event, sampled, Laplace(9.0)]), 0, 6, 2)
    }
    assert len(found) == 1


# ---------------------------------------------------------------- bounds


@every_supported
@pytest.mark.parametrize("delta", [1e-12, 0.1])
def test_bounds_are_ordered(event: Event, relation: str, method: str, delta: float) -> None:
    accountant = accountant_of(relation, method, event)
    if is_supported(event, relation, "pld"):
        lower, upper = accountant.epsilon_bounds(delta)
        assert 0 <= lower <= upper
        assert upper == accountant.epsilon(delta)
    assert accountant.epsilon(delta) >= 0


@every_supported
def test_a_smaller_delta_costs_more(event: Event, relation: str, method: str) -> None:
    deltas = (1e-12, DELTA, 0.1)
    bounds = [bounds_of(event, relation, method, delta) for delta in deltas]
    for (_, upper), (lower, _) in itertools.combinations(bounds, 2):
        assert lower <= upper
    for (_, more), (_, less) in itertools.pairwise(bounds):
        assert less <= more * (1 + TOLERANCE)


@pytest.mark.parametrize(
    ("event", "relation"),
    [
        pytest.param(event, relation, id=f"{name}-{relation}")
        for name, event in INSTANCES.items()
        for relation in ("zero-out", "replace-one")
        if is_supported(event, relation, "pld") and is_supported(event, relation, "rdp")
    ],
)
def test_pld_is_never_above_renyi(event: Event, relation: str) -> None:
    for runs, delta in ((1, DELTA), (RUNS, DELTA), (RUNS, 0.01)):
        many = Repeated(event, runs)
        renyi = bounds_of(many, relation, "rdp", delta)[1]
        lower, upper = bounds_of(many, relation, "pld", delta)
        assert lower <= renyi * (1 + 1e-9)
        assert upper <= renyi * (1 + 1e-9) or upper <= lower * (1 + TOLERANCE) + 1e-9


@every_supported
def test_delta_and_epsilon_do_not_contradict_each_other(event: Event, relation: str, method: str) -> None:
    accountant = accountant_of(relation, method, event)
    epsilon = accountant.epsilon(DELTA)
    if epsilon == math.inf:
        assert accountant.delta(10.0) == 1.0
        return
    slack = 1e-6 if method == "rdp" else 0.2  # δ is bounded on a lattice of its own
    assert accountant.delta(epsilon) <= DELTA * (1 + slack)
    if (lower := bounds_of(event, relation, method)[0]) > 0:
        assert accountant.delta(lower) >= DELTA * (1 - 1e-6)
    assert accountant.delta(0.0) >= accountant.delta(0.1) >= accountant.delta(1.0) >= 0.0


@every_supported
def test_epsilon_at_the_delta_of_an_epsilon_brackets_it(event: Event, relation: str, method: str) -> None:
    """A bound on δ from above, asked for its ε, gives no more than a bound on ε from above may."""
    accountant = accountant_of(relation, method, event)
    for epsilon in (0.0, 0.2):
        delta = accountant.delta(epsilon)
        if 0 < delta < 1:
            lower, _ = bounds_of(event, relation, method, delta)
            assert lower <= epsilon * (1 + 1e-6) + 1e-9


# ---------------------------------------------------------------- relations


@pytest.mark.parametrize("event", INSTANCES.values(), ids=INSTANCES.keys())
def test_adding_a_record_costs_what_zeroing_it_costs(event: Event) -> None:
    relations: tuple[NeighboringRelation, NeighboringRelation] = ("add-or-remove-one", "zero-out")
    if all(is_supported(event, relation) for relation in relations):
        adding, zeroing = (atoms(event, relation) for relation in relations)
        assert adding == zeroing


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("event", INSTANCES.values(), ids=INSTANCES.keys())
def test_replacing_a_record_costs_no_less_than_zeroing_it(event: Event, method: Method) -> None:
    if all(is_supported(event, relation, method) for relation in ("zero-out", "replace-one")):
        lower, upper = bounds_of(event, "zero-out", method)
        replaced = bounds_of(event, "replace-one", method)[1]
        assert replaced >= lower
        assert replaced >= upper * (1 - TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("event", INSTANCES.values(), ids=INSTANCES.keys())
def test_what_has_no_proof_is_refused_in_one_line_that_names_an_alternative(
    event: Event, relation: NeighboringRelation, method: Method
) -> None:
    accountant = PrivacyAccountant(method, neighboring_relation=relation)
    if is_supported(event, relation, method):
        accountant.record(event)
        assert accountant.events == (event,)
        return
    with pytest.raises(UnsupportedEvent) as refusal:
        accountant_of(relation, method, event).epsilon(DELTA)
    message = str(refusal.value)
    assert "\n" not in message
    assert len(message) < 400
    assert "use " in message
    if not is_supported(event, relation):
        with pytest.raises(UnsupportedEvent):
            accountant.record(event)
        assert accountant.events == ()


@pytest.mark.parametrize("method", METHODS)
def test_a_composition_is_refused_if_a_part_is(method: Method) -> None:
    for event in (STEP, Repeated(STEP, 3), Composed([Gaussian(1.0), Repeated(STEP, 2)])):
        with pytest.raises(UnsupportedEvent, match="PoissonSampled"):
            PrivacyAccountant(method, neighboring_relation="replace-one").record(event)


# ---------------------------------------------------------------- more noise, smaller samples

NOISE = st.sampled_from([Gaussian, Laplace])
SCALES = st.floats(-0.3, 2.5).map(lambda x: 10**x)
PROBABILITIES = st.floats(-5, 0).map(lambda x: 10**x)
FACTORS = st.floats(1.01, 3)
COUNTS = st.integers(1, 200)


def assert_no_dearer(cheap: Event, dear: Event, delta: float, relation: str = "zero-out") -> None:
    for method in METHODS:
        if not is_supported(cheap, relation, method):
            continue
        lower, upper = bounds_of(cheap, relation, method, delta)
        above = bounds_of(dear, relation, method, delta)[1]
        assert lower <= above * (1 + 1e-9)
        assert upper <= above * (1 + TOLERANCE) + 1e-9


@given(NOISE, SCALES, PROBABILITIES, COUNTS, FACTORS, st.floats(-12, -0.5).map(lambda x: 10**x))
@settings(max_examples=8, deadline=None)
def test_epsilon_falls_with_noise_and_rises_with_sampling_and_steps(
    kind: type[Gaussian], scale: float, q: float, count: int, factor: float, delta: float
) -> None:
    plan = Repeated(PoissonSampled(kind(scale), q), count)
    for dearer in (
        Repeated(PoissonSampled(kind(scale / factor), q), count),
        Repeated(PoissonSampled(kind(scale), min(1.0, q * factor)), count),
        Repeated(PoissonSampled(kind(scale), q), math.ceil(count * factor)),
        Composed([plan, Gaussian(50.0)]),
    ):
        assert_no_dearer(plan, dearer, delta)
    assert_no_dearer(plan, plan, delta / factor)


@given(NOISE, SCALES, st.integers(1, 1000), COUNTS, FACTORS)
@settings(max_examples=5, deadline=None)
def test_the_same_for_samples_of_fixed_size(
    kind: type[Gaussian], scale: float, size: int, count: int, factor: float
) -> None:
    plan = Repeated(SampledWithoutReplacement(kind(2 * scale), size, 1000), count)
    for dearer in (
        Repeated(SampledWithoutReplacement(kind(2 * scale / factor), size, 1000), count),
        Repeated(SampledWithoutReplacement(kind(2 * scale), min(1000, 2 * size), 1000), count),
        Repeated(SampledWithoutReplacement(kind(2 * scale), size, 1000), 2 * count),
    ):
        assert_no_dearer(plan, dearer, DELTA, "replace-one")


@pytest.mark.parametrize("name", [*ONE_SAMPLE, "two releases"])
def test_a_sample_costs_less_than_all_records_and_more_than_a_smaller_sample(name: str) -> None:
    event = ELEMENTARY.get(name, TWO_RELEASES)
    some = [PoissonSampled(event, q) for q in (1e-4, 0.01, 0.5, 1.0)]
    for smaller, larger in itertools.pairwise(some):
        assert_no_dearer(smaller, larger, DELTA)
    if not costs_nothing_or_everything(event):
        assert bounds_of(some[1], "zero-out", "pld")[1] < 0.5 * bounds_of(some[3], "zero-out", "pld")[1]


@pytest.mark.parametrize("method", METHODS)
def test_two_releases_on_one_sample_cost_more_than_on_two(method: Method) -> None:
    """To account a shared sample as independent ones would under-count (here at a δ that shows it)."""
    shared = Repeated(PoissonSampled(Composed([Laplace(0.5), Laplace(0.5)]), 0.01), 10)
    apart = Repeated(PoissonSampled(Laplace(0.5), 0.01), 20)
    assert bounds_of(shared, "zero-out", method)[1] > 1.2 * bounds_of(apart, "zero-out", method)[1]
