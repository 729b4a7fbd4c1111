"""Queries and noise for a budget: the plan stays within it, and is checked before training."""

import math

import numpy as np
import pytest
from scipy import stats

from accounting import (
    BudgetExceeded,
    Composed,
    GNMax,
    GNMaxThreshold,
    LNMax,
    NonPrivate,
    PrivacyAccountant,
    Repeated,
    UserError,
)
from dpml.pate.config import AGGREGATORS, PATEConfig
from dpml.pate.planning import (
    ASSUMED_FLIPS,
    ASSUMED_LEAD,
    affordable_queries,
    noise_of,
    overturned,
    plan_run,
)


def epsilon(plan, method="pld"):
    accountant = PrivacyAccountant(method)
    accountant.record(plan.event)
    return accountant.epsilon(1e-5)


def config(**values):
    return PATEConfig(**{"delta": 1e-5, **values})


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("given", [{}, {"queries": 50}, {"noise_multiplier": 60.0}])
def test_a_plan_stays_within_its_budget_and_uses_it(name, given):
    plan = plan_run(config(epsilon=2.0, aggregator=name, **given), 9000)
    assert epsilon(plan) <= 2.0
    one_more = 2.0 * (plan.aggregator.queries + 1) / plan.aggregator.queries
    assert epsilon(plan) > (1.99 if "noise_multiplier" not in given else 2.0 * 2.0 / one_more * 0.99)


def test_published_rules_of_thumb_come_out():
    """Data-independent GNMax: about 200 answers at ε = 2 with σ = 40, about 130 at ε = 1 with σ = 60."""
    assert abs(plan_run(config(epsilon=2.0, noise_multiplier=40.0), 9000).aggregator.queries - 200) <= 5
    assert abs(plan_run(config(epsilon=1.0, noise_multiplier=60.0), 9000).aggregator.queries - 130) <= 5


def test_one_query_more_than_affordable_costs_too_much():
    asked = config(epsilon=2.0, noise_multiplier=40.0)
    most = affordable_queries(asked, asked.budget, 40.0, 9000)
    for queries, fits in ((most, True), (most + 1, False)):
        accountant = PrivacyAccountant()
        accountant.record(Repeated(GNMax(40.0), queries))
        assert (accountant.epsilon(1e-5) <= 2.0) is fits


def test_noise_and_queries_alone_are_taken_as_they_are():
    plan = plan_run(config(noise_multiplier=40.0, queries=286, aggregator="confident-gnmax"), 9000)
    assert plan.event == Composed([Repeated(GNMaxThreshold(150.0), 286), Repeated(GNMax(40.0), 286)])
    assert plan.aggregator.threshold == 200.0
    assert plan_run(config(noise_multiplier=20.0, queries=100, aggregator="lnmax"), 9000).event == Repeated(
        LNMax(20.0), 100
    )
    assert plan_run(config(non_private=True, delta=None), 12).event == NonPrivate()


def test_fewer_answers_than_queries_cost_less():
    many = plan_run(config(noise_multiplier=40.0, queries=500, aggregator="confident-gnmax"), 9000)
    few = plan_run(
        config(noise_multiplier=40.0, queries=500, answers=100, aggregator="confident-gnmax"), 9000
    )
    assert few.aggregator.answers == 100
    assert epsilon(few) < epsilon(many)


def test_a_budget_without_room_for_one_query_is_refused():
    with pytest.raises(BudgetExceeded, match="one query alone costs more"):
        plan_run(config(epsilon=0.01, noise_multiplier=5.0), 9000)


def test_more_queries_than_inputs_are_refused():
    with pytest.raises(UserError, match=r"101 queries are more than the 100"):
        plan_run(config(epsilon=2.0, queries=101), 100)


def test_the_sanitised_release_is_in_the_plan_and_in_the_budget():
    given = config(epsilon=2.0, queries=100, publish_data_dependent=True, accountant="rdp")
    with_release = plan_run(given, 9000)
    plain = plan_run(config(epsilon=2.0, queries=100, accountant="rdp"), 9000)
    assert with_release.release is not None
    assert with_release.release.event in with_release.event.events
    assert epsilon(with_release, "rdp") <= 2.0
    assert noise_of(with_release.aggregator) > noise_of(plain.aggregator)


@pytest.mark.parametrize("lead", [0.0, 1.0, 2.5, 4.0])
def test_overturned_is_the_probability_that_noise_changes_the_winner(lead):
    random = np.random.default_rng(0)
    noise = random.normal(size=(200_000, 10))
    noise[:, 0] += lead
    wrong = int((noise.argmax(axis=1) != 0).sum())
    interval = stats.binomtest(wrong, len(noise)).proportion_ci(1 - 1e-9)
    assert interval.low <= overturned(lead) <= interval.high
    assert math.isclose(overturned(0.0), 0.9, rel_tol=1e-9)


def test_the_default_choice_is_the_most_queries_whose_answers_hold():
    chosen = plan_run(config(epsilon=2.0), 9000).aggregator
    more = plan_run(config(epsilon=2.0, queries=chosen.queries + 1), 9000).aggregator
    lead = ASSUMED_LEAD * 250
    assert overturned(lead / noise_of(chosen)) <= ASSUMED_FLIPS < overturned(lead / noise_of(more))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "Give a budget"),
        ({"noise_multiplier": 5.0}, "give queries"),
        ({"non_private": True, "epsilon": 2.0}, "Give a budget"),
        ({"epsilon": 2.0, "delta": None}, "Give delta"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"epsilon": 2.0, "teachers": 0}, "teachers"),
        ({"epsilon": 2.0, "queries": 0}, "queries"),
        ({"epsilon": 2.0, "queries": 2.5}, "queries"),
        ({"epsilon": 2.0, "aggregator": "gmax"}, "aggregator"),
        ({"epsilon": 2.0, "threshold": 100.0}, "answers every query"),
        ({"epsilon": 2.0, "rounds": 2}, "interactive"),
        ({"epsilon": 2.0, "student": "none"}, "student"),
        ({"epsilon": 2.0, "publish_data_dependent": True}, "accountant rdp"),
        (
            {"epsilon": 2.0, "publish_data_dependent": True, "accountant": "rdp", "aggregator": "lnmax"},
            "cannot be published",
        ),
        ({"epsilon": 2.0, "noise_multiplier": -1.0}, "noise_multiplier"),
        ({"epsilon": 2.0, "ridge": "much"}, "ridge"),
        ({"epsilon": 2.0, "no_cache": 1}, "no_cache"),
    ],
)
def test_mistakes_are_named_in_one_line(given, words):
    with pytest.raises(UserError, match=words) as caught:
        config(**given)
    assert "\n" not in str(caught.value)
