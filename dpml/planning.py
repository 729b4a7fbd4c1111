"""The plan of a DP-SGD run in numbers: what is asked before training, and what training then executes.

Nothing here needs torch, so `dpml account` and `dpml calibrate` answer at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from accounting import (
    Composed,
    Event,
    Gaussian,
    NeighboringRelation,
    PoissonSampled,
    PrivacyAccountant,
    Repeated,
    UserError,
)
from accounting.events import check_count, check_instance, check_number
from accounting.ledger import Ledger, LedgerAccountant
from dpml.config import PrivateConfig

ENGINE_SLACK = 1e-5
"""The slack of dpml's engines: one record moves a clipped sum by at most C·(1 + slack)."""


def gaussian_event(noise_multiplier: float, slack: float = ENGINE_SLACK) -> Gaussian:
    """Gaussian noise for a sensitivity of C·(1 + slack), where the multiplier is over C."""
    slack = check_number(slack, "slack", "an engine", low=0, high=1, closed="both")
    return Gaussian(noise_multiplier / (1 + slack))


def count_noise(noise_multiplier: float, expected_batch_size: int) -> float:
    """Standard deviation of the noise on an adaptive clip norm's count, beside gradients of this noise.

    B/20 as in Andrew et al. 2021, and 2.5 times the noise multiplier of the gradients where that is more:
    so the count never costs more than 2 % less noise on the gradients would.
    """
    return max(expected_batch_size / 20, 2.5 * noise_multiplier)


def count_event(deviation: float) -> Gaussian:
    """Noise of this standard deviation on a sum of terms of ±1/2, one for each record of the sample."""
    return Gaussian(deviation / 0.5)


def accountant_for(
    config: PrivateConfig, relation: NeighboringRelation, shared: PrivacyAccountant | None
) -> PrivacyAccountant:
    """The accountant of a run: a new one with the configured budget, or one that is shared with other runs.

    Raises:
        UserError: if the shared one is for another relation, for which the run's plan would mean another ε,
            or not that of the configured ledger; if there is no such ledger or no such data set in it.
    """
    if shared is None and config.ledger is None:
        return PrivacyAccountant(config.accountant, budget=config.budget, neighboring_relation=relation)
    if shared is None:
        shared = Ledger().accountant(str(config.ledger))
    elif config.ledger is not None and not (
        isinstance(shared, LedgerAccountant) and shared.name == config.ledger
    ):
        raise UserError(
            f"The accountant is not that of {config.ledger!r} in a ledger; leave out one of the two."
        )
    check_instance(shared, PrivacyAccountant, "accountant", "a run")
    if shared.neighboring_relation != relation:
        raise UserError(
            f"The accountant is for the relation {shared.neighboring_relation}, the run for {relation}; make "
            "them the same."
        )
    return shared


@dataclass(frozen=True)
class SamplingPlan:
    """How often is sampled, and with which probability.

    Attributes:
        sampling_probability: q of each step.
        steps: Number of steps, at least 1.
        expected_batch_size: B, the public divisor of each noisy sum.
        neighboring_relation: The relation that these numbers allow.
        n_is_public: Whether they were derived from the number of records, which is then public.
    """

    sampling_probability: float
    steps: int
    expected_batch_size: int
    neighboring_relation: NeighboringRelation
    n_is_public: bool

    @classmethod
    def of(
        cls,
        *,
        examples: int | None,
        batch_size: int,
        epochs: float,
        sampling_probability: float | None = None,
        neighboring_relation: NeighboringRelation | None = None,
    ) -> SamplingPlan:
        """Work out the plan, without the number of records where it is to be protected.

        Raises:
            UserError: if the relation needs a sampling probability as a number, the batch is larger than the
                data, or there is not a single step.
        """
        batch_size = check_count(batch_size, "batch_size", "a run", low=1)
        epochs = check_number(epochs, "epochs", "a run", low=0, high=1e9)
        relation = neighboring_relation or (
            "zero-out" if sampling_probability is None else "add-or-remove-one"
        )
        if relation == "replace-one":
            raise UserError(
                "Poisson sampling is not analysed under the relation replace-one; use zero-out (the number "
                "of records is public) or add-or-remove-one (give a sampling probability)."
            )
        if sampling_probability is None:
            if relation == "add-or-remove-one":
                raise UserError(
                    "The relation add-or-remove-one protects the number of records, so the sampling "
                    "probability may not be derived from it; give sampling_probability as a number, or use "
                    "zero-out."
                )
            if examples is None:
                raise UserError("Give the number of examples, or a sampling_probability.")
            examples = check_count(examples, "examples", "a run", low=1)
            if batch_size > examples:
                raise UserError(
                    f"The batch size {batch_size} is larger than the {examples} training examples; "
                    f"choose at most {examples}."
                )
            q, n_is_public = batch_size / examples, True
            steps = math.floor(epochs * examples / batch_size)
        else:
            q = check_number(
                sampling_probability, "sampling_probability", "a run", low=0, high=1, closed="right"
            )
            n_is_public = False
            if epochs / q > 1e15:
                raise UserError(
                    f"{epochs:g} epochs with sampling probability {q:g} make more than 10^15 steps; "
                    "choose fewer epochs or a larger probability."
                )
            steps = math.floor(epochs / q * (1 + 1e-12))
        if relation == "zero-out":
            n_is_public = True
        if steps < 1:
            raise UserError(f"{epochs:g} epochs make no step of {batch_size} examples; give more epochs.")
        return cls(q, steps, batch_size, relation, n_is_public)

    def step_event(
        self, noise_multiplier: float, slack: float = ENGINE_SLACK, *, adaptive_clip: bool = False
    ) -> PoissonSampled:
        """The event of one step with this noise on the gradients.

        With an adaptive clip norm each sample is released twice, as noisy gradients and as a noisy count.
        """
        release: Event = gaussian_event(noise_multiplier, slack)
        if adaptive_clip:
            count = count_event(count_noise(noise_multiplier, self.expected_batch_size))
            release = Composed([release, count])
        return PoissonSampled(release, self.sampling_probability)

    def event(
        self,
        noise_multiplier: float,
        slack: float = ENGINE_SLACK,
        *,
        adaptive_clip: bool = False,
        mean_noise: float | None = None,
    ) -> Event:
        """The event of the whole run: all steps as `step_event`.

        With `mean_noise` the mean of the inputs is released before the first step (`dpml.centring`).
        """
        steps = Repeated(self.step_event(noise_multiplier, slack, adaptive_clip=adaptive_clip), self.steps)
        return steps if mean_noise is None else Composed([gaussian_event(mean_noise), steps])
