"""How many queries at which noise: the plan of a PATE run, worked out before anything private is touched.

For a budget, queries and noise are exchangeable: with Gaussian noise of σ votes, Q answers cost as much as
one Gaussian release of noise multiplier σ/√(2Q). Few precise answers or many noisy ones? Up to some noise,
answers stay right, and more of them teach more. Beyond, noise overturns them. So the choice here is the
most queries at which noise overturns an answer with a probability of at most 1 in 200, if the class that
wins is ahead by 60 % of the teachers. That share is an assumption, made without looking at votes. Where
teachers agree less, give a smaller number of queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_ndtr, ndtri

from accounting import (
    BudgetExceeded,
    Composed,
    Event,
    LNMax,
    PrivacyAccountant,
    PrivacyBudget,
    SmoothRelease,
    UserError,
    calibrate_noise_multiplier,
)
from accounting.pate_sanitise import gnss_noise_multiplier
from accounting.search import largest_whole
from dpml.pate.aggregation import Aggregator, aggregator
from dpml.pate.config import PATEConfig

ASSUMED_LEAD = 0.6
ASSUMED_FLIPS = 0.005
_CHECK_NOISE = 3.75  # that of the published Confident-GNMax: 150 votes beside 40
_THRESHOLD = {"confident-gnmax": 0.8, "interactive-gnmax": 0.5}


@dataclass(frozen=True)
class PublicRelease:
    """The parameters of a sanitised release of the data-dependent ε (`accounting.pate_sanitise`)."""

    order: float
    beta: float
    noise_multiplier: float
    shift: float
    failure_probability: float

    @classmethod
    def of(cls, config: PATEConfig) -> PublicRelease:
        """As configured; half of δ is for the chance that the released number is too small."""
        assert config.delta is not None  # noqa: S101 - the configuration has checked it
        order, beta, eta = config.publish_order, 0.2 / config.publish_order, config.delta / 2
        shift = -float(ndtri(eta))
        noise = gnss_noise_multiplier(config.publish_cost, order=order, beta=beta, shift=shift)
        return cls(order, beta, noise, shift, eta)

    @property
    def event(self) -> Event:
        """What the release costs."""
        return SmoothRelease(self.beta, self.noise_multiplier, self.shift)


@dataclass(frozen=True)
class PATEPlan:
    """What a run will ask, and what that costs at most.

    Attributes:
        aggregator: The mechanism, with the number of queries and answers.
        release: The sanitised release after the answers, if one was asked for.
    """

    aggregator: Aggregator
    release: PublicRelease | None

    @property
    def event(self) -> Event:
        """The event of the whole run."""
        return _with_release(self.aggregator.plan, self.release)


def plan_run(config: PATEConfig, available: int) -> PATEPlan:
    """Work out queries and noise from what was given: a budget, noise, queries, or several of them.

    Args:
        config: What was asked for.
        available: How many different public inputs there are to ask about.

    Raises:
        UserError: for more queries than public inputs.
        BudgetExceeded, UnreachableBudget: if the budget does not allow what was asked for.
    """
    queries, noise = config.queries, config.noise_multiplier
    if queries is not None and queries > available:
        raise UserError(
            f"{queries} queries are more than the {available} different public inputs; ask at most as many."
        )
    if config.non_private:
        chosen = available if queries is None else queries
        return PATEPlan(aggregator(config.aggregator, noise_multiplier=None, queries=chosen), None)
    release = PublicRelease.of(config) if config.publish_data_dependent else None
    budget = config.budget
    if budget is not None:
        if noise is None:
            queries = choose_queries_number(config, budget, available) if queries is None else queries
            noise = calibrated_noise(config, budget, queries)
        elif queries is None:
            queries = affordable_queries(config, budget, noise, available)
    assert queries is not None  # noqa: S101 - without a budget, the configuration asks for both
    assert noise is not None  # noqa: S101
    return PATEPlan(aggregator_of(config, noise, queries), release)


def aggregator_of(config: PATEConfig, noise: float, queries: int) -> Aggregator:
    """The configured aggregator with this noise and this number of queries."""
    check = config.aggregator in _THRESHOLD
    threshold, threshold_noise = config.threshold, config.threshold_noise
    if check and threshold is None:
        threshold = _THRESHOLD[config.aggregator] * config.teachers
    if check and threshold_noise is None:
        threshold_noise = _CHECK_NOISE * noise
    return aggregator(
        config.aggregator,
        noise_multiplier=noise,
        queries=queries,
        answers=None if config.answers is None else min(config.answers, queries),
        threshold=threshold,
        threshold_noise=threshold_noise,
    )


def calibrated_noise(config: PATEConfig, budget: PrivacyBudget, queries: int) -> float:
    """The least noise, in votes, with which `queries` queries stay within the budget."""
    release = PublicRelease.of(config) if config.publish_data_dependent else None
    return calibrate_noise_multiplier(
        lambda noise: _with_release(aggregator_of(config, noise, queries).plan, release),
        budget,
        method=config.accountant,
    )


def affordable_queries(config: PATEConfig, budget: PrivacyBudget, noise: float, available: int) -> int:
    """The most queries, up to `available`, that the budget pays for at this noise.

    Raises:
        BudgetExceeded: if it does not pay for one.
    """
    release = PublicRelease.of(config) if config.publish_data_dependent else None

    def event(queries: int) -> Event:
        return _with_release(aggregator_of(config, noise, queries).plan, release)

    def epsilon(queries: int) -> float:
        accountant = PrivacyAccountant(config.accountant)
        accountant.record(event(queries))
        return accountant.epsilon(budget.delta)

    if (one := epsilon(1)) > budget.epsilon:
        raise BudgetExceeded(budget, 0.0, event(1), one, None, "one query alone costs more")
    return largest_whole(lambda queries: epsilon(queries) <= budget.epsilon, 1, available)


def choose_queries_number(config: PATEConfig, budget: PrivacyBudget, available: int) -> int:
    """The most queries at whose noise answers are rarely overturned; see the module's first lines."""
    lead = ASSUMED_LEAD * config.teachers

    def good(queries: int) -> bool:
        noise = calibrated_noise(config, budget, queries)
        spread = noise * np.sqrt(2) if config.aggregator == "lnmax" else noise  # its standard deviation
        return overturned(lead / spread) <= ASSUMED_FLIPS

    return largest_whole(good, 1, available)


def overturned(lead: float, classes: int = 10) -> float:
    """The probability that Gaussian noise changes the winner.

    Args:
        lead: Votes by which the winner is ahead of every other class, over the noise's standard deviation.
        classes: Number of classes.
    """
    z, weights = np.polynomial.hermite_e.hermegauss(64)
    right = np.exp((classes - 1) * log_ndtr(z + lead)) @ weights / weights.sum()
    return float(1 - right)


def noise_of(by: Aggregator) -> float:
    """Noise on a count, in votes."""
    if by.answer_event is None:
        return 0.0
    return by.answer_event.scale if isinstance(by.answer_event, LNMax) else by.answer_event.sigma


def _with_release(answers: Event, release: PublicRelease | None) -> Event:
    if release is None:
        return answers
    parts = answers.events if isinstance(answers, Composed) else (answers,)
    return Composed([*parts, release.event])
