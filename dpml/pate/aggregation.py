"""How the teachers' votes become an answer: noise, then the class with most votes.

The object that draws the noise holds the events that say what it costs, and takes the noise's scale from
them: what is accounted is what runs.

Sources: LNMax: Papernot et al. 2017, arXiv:1610.05755, section 2.2. GNMax, Confident-GNMax (Algorithm 1) and
Interactive-GNMax (Algorithm 2): Papernot et al. 2018, arXiv:1802.08908.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from accounting import Composed, Event, GNMax, GNMaxThreshold, LNMax, NonPrivate, Repeated, UserError
from accounting.events import check_count, check_number
from dpml.exact import noisy_argmax, noisy_reaches
from dpml.pate.config import AGGREGATORS, AggregatorName
from dpml.randomness import Randomness

Counts = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Aggregator:
    """Answers queries from vote counts, with noise. Both steps of an answer have an event.

    Guarantee: with counts of which one record moves one vote of each query, `check` is `check_event` for each
    query and `choose` is `answer_event` for each query. Which query is checked or answered next, and whether,
    may depend on everything released before: `plan` bounds how many of each there are. (For Gaussian noise,
    the total of squared signal-to-noise ratios is fixed in advance, and that is all that a fully adaptive
    composition needs: Smith & Thakurta 2022. Laplace answers are all of one kind.)

    Attributes:
        answer_event: `GNMax(σ)` or `LNMax(scale)`, in votes; None answers without noise and without privacy.
        check_event: `GNMaxThreshold(σ₁)` for the confident and the interactive aggregator, else None.
        threshold: T, in votes, with a check.
        queries: The most queries that are asked, each charged for its check if there is one.
        answers: The most answers that are given.
    """

    answer_event: GNMax | LNMax | None
    check_event: GNMaxThreshold | None = None
    threshold: float | None = None
    queries: int
    answers: int

    def __post_init__(self) -> None:
        check_count(self.queries, "queries", "an aggregator", low=1)
        check_count(self.answers, "answers", "an aggregator", low=1)
        if self.answers > self.queries:
            raise UserError(
                f"There cannot be more answers than queries. Got {self.answers} > {self.queries}."
            )
        if (self.check_event is None) != (self.threshold is None):
            raise UserError("An aggregator needs both a threshold and its noise, or neither.")
        if self.check_event is None and self.answers != self.queries:
            raise UserError("Without a check every query has an answer: answers and queries must be equal.")
        if self.check_event is not None and isinstance(self.answer_event, LNMax):
            raise UserError("A check is for Gaussian noise: use gnmax with it, or lnmax without.")
        if self.threshold is not None:
            check_number(self.threshold, "threshold", "an aggregator", low=-1e9, high=1e9, closed="both")

    @property
    def plan(self) -> Event:
        """The event of everything that may be released."""
        if self.answer_event is None:
            return NonPrivate()
        answers = Repeated(self.answer_event, self.answers)
        if self.check_event is None:
            return answers
        return Composed([Repeated(self.check_event, self.queries), answers])

    def check(self, counts: Counts, randomness: Randomness) -> npt.NDArray[np.bool_]:
        """Whether the largest of each row's counts, with noise, reaches the threshold: bool [m].

        Args:
            counts: [m, classes]: votes, or what the votes exceed a prediction by.
            randomness: Where the noise comes from.
        """
        if self.check_event is None or self.threshold is None:
            raise UserError("This aggregator has no check.")
        largest = counts.max(axis=1, initial=-np.inf)
        draw = randomness.normal_draw(len(counts))
        return noisy_reaches(largest, self.check_event.sigma, draw, self.threshold)

    def choose(self, counts: Counts, randomness: Randomness) -> npt.NDArray[np.int64]:
        """The class of most votes after noise on each count, for each row: int64 [m]."""
        if self.answer_event is None:
            return np.asarray(counts.argmax(axis=1))
        if isinstance(self.answer_event, GNMax):
            return noisy_argmax(counts, self.answer_event.sigma, randomness.normal_draw(counts.size))
        return noisy_argmax(counts, self.answer_event.scale, randomness.laplace_draw(counts.size))

    def to_dict(self) -> dict[str, Any]:
        """A description as JSON; two aggregators are the same mechanism if theirs are equal."""
        return {
            "answer": None if self.answer_event is None else self.answer_event.to_dict(),
            "check": None if self.check_event is None else self.check_event.to_dict(),
            "threshold": self.threshold,
            "queries": self.queries,
            "answers": self.answers,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Aggregator:
        """The aggregator that `to_dict` described.

        Raises:
            UserError: if the description is none.
        """
        try:
            answer, check = data["answer"], data["check"]
            return cls(
                answer_event=None if answer is None else _event(answer, (GNMax, LNMax)),
                check_event=None if check is None else _event(check, (GNMaxThreshold,)),
                threshold=data["threshold"],
                queries=data["queries"],
                answers=data["answers"],
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"This describes no aggregator: {data!r:.200}") from error


def _event(data: dict[str, Any], kinds: tuple[type, ...]) -> Any:
    event = Event.from_dict(data)
    if not isinstance(event, kinds):
        raise UserError(f"{event} is no event of an aggregator.")
    return event


def aggregator(
    name: AggregatorName,
    *,
    noise_multiplier: float | None,
    queries: int,
    answers: int | None = None,
    threshold: float | None = None,
    threshold_noise: float | None = None,
) -> Aggregator:
    """Make an aggregator by name.

    Args:
        name: gnmax, confident-gnmax, interactive-gnmax (its check is on what votes exceed predictions by;
            to the accountant it is the same) or lnmax.
        noise_multiplier: Noise on each count, in votes: σ, or Laplace's scale. None for no noise at all.
        queries: The most queries.
        answers: The most answers; `queries` by default.
        threshold: T, in votes.
        threshold_noise: σ₁, in votes.
    """
    if name not in AGGREGATORS:
        raise UserError(f"The aggregator must be one of {', '.join(AGGREGATORS)}. Got {name!r}.")
    answer: GNMax | LNMax | None = None
    if noise_multiplier is not None:
        answer = LNMax(noise_multiplier) if name == "lnmax" else GNMax(noise_multiplier)
    if name in ("gnmax", "lnmax") and (answers, threshold, threshold_noise) != (None, None, None):
        raise UserError(f"The aggregator {name} answers every query: leave out answers and threshold.")
    if name in ("gnmax", "lnmax") or noise_multiplier is None:
        return Aggregator(answer_event=answer, queries=queries, answers=queries)
    if threshold_noise is None:
        raise UserError(f"The aggregator {name} needs a threshold_noise.")
    return Aggregator(
        answer_event=answer,
        check_event=GNMaxThreshold(threshold_noise),
        threshold=threshold,
        queries=queries,
        answers=queries if answers is None else answers,
    )
