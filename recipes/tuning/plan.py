"""What a tuning run will do, in public numbers: the candidates, the noise of each, and the event of it all.

One trial draws a candidate uniformly from a public list, trains it, and scores it. Its event is the worst of
those of the candidates and, if private records decide, of the score: they are not the records that train, so
one record meets one of the two (parallel composition). `BestOfRuns` of that is the event of the selection.

The default number of trials is geometric (η = 1): it is 1 now and then, but costs about three times one run
for any number of trials. η = 0 costs about twice that, and often tries one candidate only. The Poisson
distribution varies least. It is cheaper than the geometric one for some ten trials, and dearer for thirty.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from accounting import (
    BestOfRuns,
    Event,
    Gaussian,
    Method,
    NeighboringRelation,
    OneOf,
    PrivacyAccountant,
    PrivacyBudget,
    UserError,
    calibrate_noise_multiplier,
)
from accounting.events import check_number
from dpml.config import DPSGDRun
from dpml.planning import SamplingPlan

TUNABLE = (
    *("model", "epochs", "batch_size", "sampling_probability", "clip_norm", "clipping", "clip_quantile"),
    *("learning_rate", "schedule", "momentum", "average", "views", "augment"),
)
"""The settings that may have several values. The others name the data, the privacy or the machine."""
GEOMETRIC = 1.0
MOST_CANDIDATES, MOST_MEAN_TRIALS = 1000, 10_000.0
Settings = Mapping[str, Any]


def candidates_of(run: DPSGDRun, lists: Mapping[str, Sequence[Any]]) -> list[DPSGDRun]:
    """All combinations of the listed values, each a complete configuration.

    Raises:
        UserError: if a setting cannot be tuned, a value is refused or named twice, or there are fewer than 2
            candidates, or more than 1,000.
    """
    for name, values in lists.items():
        if name not in TUNABLE:
            raise UserError(f"The setting {name!r} cannot be tuned; choose of {', '.join(TUNABLE)}.")
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise UserError(f"The candidates of {name} must be a list of values. Got {values!r:.60}.")
        if len({*map(repr, values)}) < len(values):
            raise UserError(
                f"The candidates of {name} hold a value twice: name each once. Got {values!r:.60}."
            )
    count = math.prod(map(len, lists.values()))
    if not 2 <= count <= MOST_CANDIDATES:
        raise UserError(
            f"Tuning needs from 2 to {MOST_CANDIDATES:,} candidates, such as learning_rate 0.1,0.3,1. "
            f"Got {count}."
        )
    picks = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    try:
        return [replace(run, **pick) for pick in picks]
    except TypeError as error:
        raise UserError(f"A candidate has a value of a wrong type: {error}.") from error


@dataclass(frozen=True)
class TuningPlan:
    """A tuning run in public numbers.

    Attributes:
        candidates: The configurations, each with its noise multiplier.
        trainings: The event of training each.
        score_noise: Standard deviation of the noise on the count of right answers; None where public
            records decide.
        mean_trials: E[K].
        shape: η of K's distribution; None is Poisson.
        charged: Whether the selection is paid for.
        relation: The neighbouring relation.
        method: How ε is computed: "rdp" where only Rényi divergences are known.
    """

    candidates: tuple[DPSGDRun, ...]
    trainings: tuple[Event, ...]
    score_noise: float | None
    mean_trials: float
    shape: float | None
    charged: bool
    relation: NeighboringRelation
    method: Method

    @property
    def trial(self) -> Event:
        """The event of one trial: training, and the noisy score if private records decide."""
        score = [] if self.score_noise is None else [Gaussian(self.score_noise)]
        parts = list(dict.fromkeys([*self.trainings, *score]))
        return parts[0] if len(parts) == 1 else OneOf(parts)

    @property
    def runs(self) -> BestOfRuns:
        """The best of a random number of trials; K is drawn from its `distribution`."""
        return BestOfRuns(self.trial, self.mean_trials, self.shape)

    @property
    def event(self) -> Event:
        """What is charged."""
        return self.runs if self.charged else self.trial

    def to_dict(self) -> dict[str, Any]:
        """Everything that a restarted run must agree on."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        plain["candidates"] = [asdict(candidate) for candidate in self.candidates]
        plain["trainings"] = [training.to_dict() for training in self.trainings]
        return plain


def make_plan(
    candidates: Sequence[DPSGDRun],
    *,
    examples: int,
    private_score: bool,
    mean_trials: float,
    shape: float,
    charged: bool,
) -> TuningPlan:
    """Work out the noise, such that the selection with everything in it stays within the candidates' budget.

    Args:
        candidates: They share ε and δ, or a noise multiplier and δ.
        examples: Records that each trial trains on.
        private_score: Whether private records decide, by a noisy count.
        mean_trials: E[K], above 1.
        shape: η > −1 of the truncated negative binomial distribution, or ∞ for Poisson.
        charged: Whether the selection is paid for.

    Raises:
        UserError: for numbers out of range, or a relation without a proof.
        UnreachableBudget: if no noise meets the budget.
    """
    mean = check_number(mean_trials, "mean_trials", "tune", low=1, high=MOST_MEAN_TRIALS, closed="right")
    eta = None if shape == math.inf else check_number(shape, "shape", "tune", low=-1, high=1000)
    kinds = [_Kind.of(candidate, examples) for candidate in candidates]
    relation = kinds[0].sampling.neighboring_relation
    if private_score and relation != "zero-out":
        raise UserError(
            f"A score on private records is analysed under zero-out only, where they stay at their places "
            f"(got {relation}); give --public-validation FILE.npz, or leave out the sampling probability."
        )
    if any(kind.sampling.neighboring_relation != relation for kind in kinds):
        raise UserError("All candidates must have the same neighbouring relation.")

    distinct = list(dict.fromkeys(kinds))
    first = candidates[0]
    method: Method = "rdp" if charged or private_score or len(distinct) > 1 else first.accountant

    def charge(event: Event) -> Event:
        return BestOfRuns(event, mean, eta) if charged else event

    def calibrate(make_event: Callable[[float], Event], budget: PrivacyBudget) -> float:
        return calibrate_noise_multiplier(
            lambda noise: charge(make_event(noise)), budget, method=method, neighboring_relation=relation
        )

    assert first.delta is not None  # noqa: S101 - private configurations have one
    if first.budget is None:
        assert first.noise_multiplier is not None  # noqa: S101 - the configuration has checked it
        noises = dict.fromkeys(distinct, first.noise_multiplier)
        accountant = PrivacyAccountant(method, neighboring_relation=relation)
        accountant.record(charge(OneOf([kind.event(noise) for kind, noise in noises.items()])))
        budget = PrivacyBudget(accountant.epsilon(first.delta), first.delta)
    else:
        budget = first.budget
        noises = {kind: calibrate(kind.event, budget) for kind in distinct}
    score_noise = calibrate(Gaussian, budget) if private_score else None
    if first.budget is not None and len(distinct) + private_score > 1:
        # Each of them meets the budget by itself; the worst of all at each order costs a little more.
        def scaled(scale: float) -> Event:
            score = [] if score_noise is None else [Gaussian(score_noise * scale)]
            return OneOf([*(kind.event(noise * scale) for kind, noise in noises.items()), *score])

        scale = calibrate(scaled, budget)
        noises = {kind: noise * scale for kind, noise in noises.items()}
        score_noise = None if score_noise is None else score_noise * scale
    return TuningPlan(
        candidates=tuple(
            replace(candidate, epsilon=None, noise_multiplier=noises[kind], accountant="rdp")
            for candidate, kind in zip(candidates, kinds, strict=True)
        ),
        trainings=tuple(kind.event(noises[kind]) for kind in kinds),
        score_noise=score_noise,
        mean_trials=mean,
        shape=eta,
        charged=charged,
        relation=relation,
        method=method,
    )


@dataclass(frozen=True)
class _Kind:
    """All of a candidate that its event depends on, beside the noise."""

    sampling: SamplingPlan
    adaptive_clip: bool
    mean_noise: float | None

    @classmethod
    def of(cls, run: DPSGDRun, examples: int) -> _Kind:
        sampling = SamplingPlan.of(
            examples=examples,
            batch_size=run.batch_size,
            epochs=run.epochs,
            sampling_probability=run.sampling_probability,
            neighboring_relation=run.neighboring_relation,
        )
        return cls(sampling, run.clip_quantile is not None, run.mean_noise)

    def event(self, noise_multiplier: float) -> Event:
        """The event of a whole training with this noise."""
        return self.sampling.event(
            noise_multiplier, adaptive_clip=self.adaptive_clip, mean_noise=self.mean_noise
        )
