"""Fuzz targets: all public names of `accounting`."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

import numpy as np
from fuzzing import Draw, naming, target

import accounting
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
    NonPrivate,
    OneOf,
    PoissonSampled,
    PrivacyAccountant,
    PrivacyBudget,
    RandomizedResponse,
    Repeated,
    ReportNoisyMax,
    SampledWithoutReplacement,
    ShuffledEpoch,
    SmoothRelease,
    ZeroCost,
    calibrate_noise_multiplier,
    calibrate_sampling_probability,
    calibrate_steps,
    epsilon_curve,
    gdp,
    pate,
    pate_sanitise,
    selection,
    statement,
    tradeoff,
)
from accounting.events import atoms

GOOD: dict[type[Event], dict[str, Any]] = {
    Gaussian: {"noise_multiplier": 1.1},
    Laplace: {"noise_multiplier": 2.0},
    DiscreteGaussian: {"sigma": 3.0, "sensitivity": 1},
    RandomizedResponse: {"noise_probability": 0.5, "answers": 3},
    ExponentialMechanism: {"epsilon": 0.5},
    ReportNoisyMax: {"epsilon": 0.5},
    EpsilonDelta: {"epsilon": 0.5, "delta": 1e-6},
    GNMax: {"sigma": 40.0},
    GNMaxThreshold: {"sigma": 100.0},
    LNMax: {"scale": 20.0},
    ZCDP: {"rho": 0.1},
    SmoothRelease: {"beta": 0.01, "noise_multiplier": 5.0, "shift": 1.0},
    ZeroCost: {"reason": "public"},
    NonPrivate: {},
    Repeated: {"event": Gaussian(2.0), "count": 7},
    PoissonSampled: {"event": Gaussian(1.1), "sampling_probability": 0.01},
    SampledWithoutReplacement: {"event": Gaussian(1.1), "sample_size": 10, "records": 1000},
    ShuffledEpoch: {"event": Gaussian(1.1)},
    Composed: {"events": [Gaussian(3.0), Laplace(5.0)]},
    OneOf: {"events": [Gaussian(3.0), Gaussian(5.0)]},
    BestOfRuns: {"event": Gaussian(3.0), "mean_runs": 5.0, "shape": 1.0},
}
_NUMERIC = {"noise_multiplier", "sigma", "scale", "sensitivity", "answers", "epsilon", "delta", "rho", "beta"}
_NUMERIC |= {"shift", "count", "sampling_probability", "sample_size", "records", "mean_runs", "shape"}


def valid(event: Event) -> None:
    """Assert that an accepted event says the same after a trip through JSON, and holds no odd number."""
    body = json.loads(json.dumps(event.to_dict(), allow_nan=False))
    assert Event.from_dict(body) == event
    assert hash(Event.from_dict(body)) == hash(event)
    for name, value in vars(event).items():
        if name in _NUMERIC and value is not None:
            assert type(value) in (int, float), (name, type(value))
            assert math.isfinite(value)
            assert value >= (-1 if name == "shape" else 0)


def valid_epsilon(value: object) -> None:
    assert type(value) is float, type(value)
    assert value >= 0  # and not NaN


def simple(draw: Draw) -> Event:
    """A valid event whose ε is soon computed."""
    kind = draw.choice(
        [Gaussian, Laplace, EpsilonDelta, GNMax, ReportNoisyMax, Repeated, NonPrivate, ZeroCost]
    )
    return kind(**GOOD[kind])


def made(draw: Draw, depth: int = 0) -> Event:
    """An event of any type, whose numbers may be anything; mostly refused at the top of it."""
    kind = draw.choice(list(GOOD))
    values = dict(GOOD[kind])
    for name in values:
        if draw.random() < 0.4:
            if name == "event":
                values[name] = made(draw, depth + 1) if depth < 3 else draw.junk()
            elif name == "events":
                values[name] = [made(draw, depth + 1) for _ in range(draw.randrange(3))]
            else:
                values[name] = draw.number()
    return kind(**values)


@target("accounting: events, one wrong", 10)
def _events(draw: Draw) -> None:
    kind = draw.choice([kind for kind in GOOD if GOOD[kind]])
    values, name = draw.one_wrong(GOOD[kind])
    with naming({"event": kind.__name__, "events": kind.__name__}.get(name, name)):
        valid(kind(**values))


@target("accounting: events, nested", 10)
def _nested(draw: Draw) -> None:
    event = made(draw)
    valid(event)
    parts = atoms(event, draw.choice(RELATIONS))
    assert all(type(count) is int and count > 0 for count in parts.values())
    assert all(0 < atom.q <= 1 for atom in parts)


@target("accounting: from_dict", 10)
def _from_dict(draw: Draw) -> None:
    kind = draw.choice(list(GOOD))
    body = Repeated(Composed([kind(**GOOD[kind]), Gaussian(1.0)]), 3).to_dict()
    data = draw.mutated_json(body) if draw.random() < 0.9 else draw.junk()
    valid(Event.from_dict(data))


@target("accounting: accountant, made", 5)
def _accountant(draw: Draw) -> None:
    good = {
        "method": "rdp",
        "budget": PrivacyBudget(1.0, 1e-5),
        "neighboring_relation": "zero-out",
        "tolerance": 0.1,
    }
    values, name = draw.one_wrong(good)
    with naming({"neighboring_relation": "relation"}.get(name, name)):
        accountant = PrivacyAccountant(**values)
    assert accountant.method in METHODS
    assert accountant.neighboring_relation in RELATIONS
    assert 0 < accountant.tolerance < 1


@target("accounting: accountant, used", 5)
def _used(draw: Draw) -> None:
    budget = draw.choice([None, PrivacyBudget(1.0, 1e-5)])
    accountant = PrivacyAccountant(draw.choice(METHODS), budget=budget, tolerance=0.2)
    if draw.random() < 0.5:
        accountant.record(draw.maybe(simple(draw), 0.2))
    match draw.randrange(6):
        case 0:
            valid_epsilon(accountant.epsilon(draw.maybe(1e-5), group_size=draw.maybe(1, 0.3)))
        case 1:
            low, high = accountant.epsilon_bounds(draw.maybe(1e-5), group_size=draw.maybe(1, 0.3))
            valid_epsilon(low)
            assert low <= high
        case 2:
            low, high = accountant.delta_bounds(draw.maybe(0.5), group_size=draw.maybe(1, 0.3))
            assert 0 <= low <= high <= 1
        case 3:
            assert type(accountant.fits(draw.junk())) is bool
        case 4:
            assert 0 <= accountant.remaining(draw.maybe(Gaussian(20.0))) <= 10**12
        case _:
            with accountant.reserve(draw.maybe(Repeated(Gaussian(50.0), 5), 0.2)) as reservation:
                kind = draw.choice([None, Gaussian(50.0), Gaussian(1.0), draw.junk()])
                before = reservation.committed
                parts = draw.maybe(2)
                reservation.commit(parts, kind)
                assert reservation.committed == before + parts
                assert type(parts) is not bool


@target("accounting: accountant, any event", 2)
def _any_event(draw: Draw) -> None:
    """ε of odd but valid events, of which a small part costs a second."""
    accountant = PrivacyAccountant(
        draw.choice(["rdp", "rdp", "pld"]), neighboring_relation=draw.choice(RELATIONS), tolerance=0.3
    )
    event = made(draw)
    accountant.record(event)
    low, high = accountant.epsilon_bounds(1e-5)
    valid_epsilon(low)
    assert low <= high


@target("accounting: budgets", 3)
def _budget(draw: Draw) -> None:
    values, name = draw.one_wrong({"epsilon": 1.0, "delta": 1e-5})
    with naming(name):
        budget = PrivacyBudget(**values)
    assert type(budget.epsilon) is float
    assert 0 < budget.epsilon <= 1e9
    assert 0 < budget.delta < 1


@target("accounting: calibration", 2)
def _calibration(draw: Draw) -> None:
    budget = PrivacyBudget(draw.choice([1.0, 1e-3, 50.0]), 1e-5)
    good: dict[str, Any] = {
        "make_event": lambda noise: Gaussian(noise),
        "budget": budget,
        "method": "rdp",
        "neighboring_relation": "zero-out",
        "tolerance": 0.05,
    }
    which = draw.randrange(3)
    if which == 1:
        good |= {"make_event": lambda n: Repeated(Gaussian(30.0), n), "most": 1000}
        del good["tolerance"]
    if which == 2:
        good["make_event"] = lambda q: PoissonSampled(Gaussian(2.0), q)
    values, _ = draw.one_wrong(good)
    if callable(values["make_event"]) and values["make_event"] is not good["make_event"]:
        return  # what somebody's own function raises is theirs
    function = (calibrate_noise_multiplier, calibrate_steps, calibrate_sampling_probability)[which]
    found = function(**values)
    assert type(found) in (int, float)
    assert found > 0
    accountant = PrivacyAccountant(values["method"], neighboring_relation=values["neighboring_relation"])
    accountant.record(values["make_event"](found))
    assert accountant.epsilon(budget.delta) <= budget.epsilon


@target("accounting: epsilon_curve", 2)
def _curve(draw: Draw) -> None:
    good = {"step": Gaussian(9.0), "steps": [1, 5], "delta": 1e-5, "method": "rdp", "tolerance": 0.1}
    values, _ = draw.one_wrong({**good, "neighboring_relation": "zero-out"})
    curve = epsilon_curve(**values)
    assert all(0 <= low <= high for low, high in curve)


@target("accounting: trade-off", 2)
def _tradeoff(draw: Draw) -> None:
    event, relation, tolerance = (
        draw.maybe(Gaussian(2.0), 0.3),
        draw.maybe("zero-out", 0.2),
        draw.maybe(0.1, 0.3),
    )
    options = {"neighboring_relation": relation, "tolerance": tolerance}
    match draw.randrange(5):
        case 0:
            low, high = tradeoff.tradeoff_curve(event, draw.maybe([0.1, 0.5]), **options)
            assert ((low >= 0) & (low <= high) & (high <= 1)).all()
        case 1:
            low, high = tradeoff.tpr_at_fpr(event, draw.maybe(0.1), **options)
            assert 0 <= low <= high <= 1
        case 2:
            low, high = tradeoff.attack_advantage(event, **options)
            assert 0 <= low <= high <= 1
        case 3:
            assert 0.5 <= tradeoff.attack_accuracy(draw.junk()) <= 1
        case _:
            make = draw.maybe(Gaussian, 0.2)
            if callable(make) and make is not Gaussian:
                return  # what somebody's own function raises is theirs
            wish = draw.choice(
                [{"fpr": draw.maybe(0.01), "tpr": draw.maybe(0.1)}, {"max_advantage": draw.junk()}]
            )
            noise = tradeoff.calibrate_noise_for_risk(
                make, **wish, **{**options, "tolerance": draw.maybe(0.05, 0.3)}
            )
            assert 0 < noise < math.inf


@target("accounting: GDP", 4)
def _gdp(draw: Draw) -> None:
    mu, epsilon, delta, rate = (draw.maybe(good) for good in (0.5, 1.0, 1e-5, 0.1))
    calls: list[Any] = [
        lambda: gdp.gaussian_mu(draw.maybe(Gaussian(2.0)), neighboring_relation=draw.maybe("zero-out")),
        lambda: gdp.delta_of_mu(mu, epsilon),
        lambda: gdp.epsilon_of_mu(mu, delta),
        lambda: gdp.mu_of(epsilon, delta),
        lambda: gdp.tradeoff_of_mu(mu, rate),
        lambda: gdp.tpr_of_mu(mu, rate),
        lambda: gdp.mu_of_tpr(rate, draw.maybe(0.5)),
        lambda: gdp.advantage_of_mu(mu),
        lambda: gdp.mu_of_advantage(rate),
        lambda: gdp.approximate_mu_by_clt(draw.maybe(1.0), draw.maybe(0.01), draw.maybe(100)),
        lambda: gdp.equivalent_mu(draw.maybe(Gaussian(2.0)), delta),
    ]
    found = draw.choice(calls)()
    assert isinstance(found, float)
    assert found >= 0


def _rows(draw: Draw) -> Any:
    good = np.array([[5, 3, 2], [10, 0, 0], [4, 3, 3]])
    match draw.randrange(5):
        case 0 | 1:
            return good
        case 2:
            bad = good.astype(draw.choice(["float64", "int8", "object", "U3", "bool", "complex128"]))
            bad[draw.randrange(3), draw.randrange(3)] = draw.choice([0, 1, -1, 7])
            return bad
        case 3:
            bad = good.astype(float)
            bad[draw.randrange(3), draw.randrange(3)] = draw.choice([math.nan, math.inf, 1e300, 0.5, -1.0])
            return bad
        case _:
            return draw.junk()


@target("accounting: PATE", 5)
def _pate(draw: Draw) -> None:
    votes, noise, orders = _rows(draw), draw.maybe(4.0, 0.3), draw.maybe([2.0, 10.0, 32.0], 0.3)
    answered = draw.choice([None, [True, False, True], draw.junk()])
    calls: list[Any] = [
        lambda: pate.gnmax_rdp(votes, noise, orders),
        lambda: pate.lnmax_rdp(votes, noise, orders),
        lambda: pate.threshold_rdp(votes, draw.maybe(6.0), noise, orders),
        lambda: pate.confident_gnmax_rdp(
            votes, noise, draw.maybe(6.0), draw.maybe(5.0), orders, answered=answered
        ),
        lambda: pate.data_dependent_rdp(draw.maybe([-1.0, -9.0]), noise, orders),
        lambda: pate.diagnose_gnmax(votes, noise, orders).epsilon(draw.maybe(1e-5)),
        lambda: (
            pate.diagnose_confident_gnmax(
                votes, noise, draw.maybe(6.0), draw.maybe(5.0), answered=answered
            ).rdp
        ),
        lambda: pate.diagnose_lnmax(votes, noise, orders).rdp,
        lambda: pate.moments_epsilon(votes, noise, draw.maybe(1e-5), draw.maybe(8)),
    ]
    found = np.asarray(draw.choice(calls)())
    assert (found >= 0).all()


@target("accounting: PATE, sanitised", 3)
def _sanitised(draw: Draw) -> None:
    if draw.random() < 0.3:
        noise = pate_sanitise.gnss_noise_multiplier(
            draw.maybe(0.1), order=draw.maybe(20.0), beta=draw.maybe(0.01), shift=draw.maybe(4.0)
        )
        assert 0 < noise < math.inf
        return
    names = {"noise_std": 4.0, "threshold": 6.0, "threshold_std": 5.0}
    mechanism = pate_sanitise.NoisyMax(**(names if draw.random() < 0.5 else draw.one_wrong(names)[0]))
    good = {"order": 20.0, "delta": 1e-5, "noise_multiplier": 5.0, "rng": lambda: 0.3, "beta": 0.01}
    good |= {"failure_probability": 1e-6, "answered": None, "both_directions": True, "mechanism": mechanism}
    released = pate_sanitise.sanitised_epsilon(_rows(draw), **draw.one_wrong(good)[0])
    valid_epsilon(released.epsilon)
    assert 0 <= released.rdp <= released.ceiling
    valid(SmoothRelease.of(released))


@target("accounting: selection", 3)
def _selection(draw: Draw) -> None:
    match draw.randrange(4):
        case 0:
            runs: selection.RunsDistribution = selection.NegativeBinomialRuns(
                draw.maybe(1.0), draw.maybe(0.1)
            )
        case 1:
            runs = selection.PoissonRuns(draw.junk())
        case 2:
            runs = selection.from_mean_runs(draw.maybe(10.0), draw.maybe(1.0))
        case _:
            runs = selection.NegativeBinomialRuns(1.0, 0.1)
            rho = draw.junk()
            found = selection.selection_divergence(
                draw.maybe(np.array([2.0, 8.0])), lambda _: rho, draw.maybe(runs, 0.3)
            )
            assert (np.asarray(found) >= 0).all()
    assert 0 < runs.mean_runs <= math.inf
    assert 0 <= runs.probability_of(draw.maybe(2)) <= 1
    assert runs.draw_runs(np.random.default_rng(0)) >= 0


@target("accounting: statement", 2)
def _statement(draw: Draw) -> None:
    risk = statement.Risk.of(draw.maybe(Gaussian(2.0)), draw.maybe(1e-5), draw.maybe("zero-out", 0.3))
    assert all(not math.isnan(value) for value in vars(risk).values() if isinstance(value, float))


def test_every_event_is_fuzzed() -> None:
    """New events join `GOOD`."""
    public = [getattr(accounting, name) for name in accounting.__all__]
    concrete = {each for each in public if inspect.isclass(each) and issubclass(each, Event)} - {Event}
    assert concrete == set(GOOD)
