"""What the answers cost at the votes that there were: a diagnostic, and a number to publish.

See `accounting.pate` for the first and `accounting.pate_sanitise` for the second.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from accounting import GNMax, LNMax, Reservation
from accounting.pate import (
    DataDependentDiagnostic,
    diagnose_confident_gnmax,
    diagnose_gnmax,
    diagnose_lnmax,
)
from accounting.pate_sanitise import NoisyMax, sanitised_epsilon
from dpml.pate.aggregation import Aggregator
from dpml.pate.answers import AnswerBook
from dpml.pate.planning import PATEPlan
from dpml.randomness import Randomness

Votes = npt.NDArray[np.int64]
RELEASE = "data-dependent epsilon"
"""The name of the sanitised release in the book."""


def diagnose(
    aggregator: Aggregator, votes: Votes, answered: npt.NDArray[np.bool_]
) -> DataDependentDiagnostic:
    """The data-dependent cost of all queries together. NOT private.

    As in the papers, a query that was refused is charged for its check alone: a reading of what this run
    spent.

    Args:
        aggregator: The mechanism.
        votes: Of the queries that were asked, [m, classes].
        answered: Which of them were answered, [m].
    """
    if isinstance(aggregator.answer_event, LNMax):
        return diagnose_lnmax(votes, aggregator.answer_event.scale)
    assert isinstance(aggregator.answer_event, GNMax)  # noqa: S101 - without noise there is nothing to say
    sigma = aggregator.answer_event.sigma
    if aggregator.check_event is None or aggregator.threshold is None:
        return diagnose_gnmax(votes, sigma)
    check = aggregator.check_event.sigma
    return diagnose_confident_gnmax(votes, sigma, aggregator.threshold, check, answered=answered)


def publish(
    plan: PATEPlan,
    book: AnswerBook,
    votes: Votes,
    delta: float,
    randomness: Randomness,
    reservation: Reservation,
) -> dict[str, Any] | None:
    """Release the data-dependent ε with noise, once; or again what was released. None if it is forfeited.

    Every query is charged as if it had been answered, so that the number is a guarantee and no reading.

    Args:
        plan: Of the run; it pays for the release.
        book: Where it is kept.
        votes: Of the queries that were asked, [m, classes]. Private.
        delta: δ.
        randomness: Where noise comes from.
        reservation: Of the plan.
    """
    release, by = plan.release, plan.aggregator
    assert release is not None  # noqa: S101 - the caller has seen to it
    assert isinstance(by.answer_event, GNMax)  # noqa: S101 - the configuration has checked it
    check = None if by.check_event is None else by.check_event.sigma
    mechanism = NoisyMax(by.answer_event.sigma, by.threshold, check)
    reservation.commit(1, release.event)

    def draw() -> str:
        released = sanitised_epsilon(
            votes,
            mechanism,
            order=release.order,
            delta=delta,
            noise_multiplier=release.noise_multiplier,
            rng=lambda: float(randomness.normals(1)[0]),
            beta=release.beta,
            failure_probability=release.failure_probability,
        )
        return json.dumps({"epsilon": released.epsilon, "delta": released.delta, "order": released.order})

    text = book.release(RELEASE, draw, is_secret=randomness.is_secret)
    return None if text is None else json.loads(text)
