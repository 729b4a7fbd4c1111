"""The mechanism of one DP-SGD step: sampler, clipping and noise in one object, and the event that they are.

The object that draws the sample, clips and adds the noise is the one that says which event that is. Nobody
types a sampling probability or a noise multiplier twice, so what is accounted is what runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from accounting import Composed, Event, Repeated, Reservation, UserError
from accounting.events import check_instance, check_number, shown
from dpml.adaptive import AdaptiveClipping
from dpml.data.samplers import PoissonSampler
from dpml.gradients.engine import ClippedSum, Clipping, Engine, Loss, MicroBatch
from dpml.noise import GaussianNoise
from dpml.planning import gaussian_event


@dataclass(frozen=True, eq=False)
class SampledGaussianMechanism:
    """A Poisson sample's clipped gradients, summed, with Gaussian noise (Abadi et al. 2016, Algorithm 1).

    Guarantee: `release` returns the sum plus N(0, (noise_multiplier·C)²) in every coordinate, rounded to a
    public grid (`dpml.exact`), after committing to the reservation; one record moves the sum by at most
    C·(1 + slack) under zero-out or add-or-remove-one. `event` states just that. With an adaptive clip norm,
    which is public, C is the norm of the step, and the same commit covers the count that moves it.

    Attributes:
        sampler: Draws each step's sample.
        clipping: Bounds each example's gradient, by a norm that is fixed or adapts.
        noise: The noise and its randomness.
        engine: Computes the clipped sums, and states its slack.
    """

    sampler: PoissonSampler
    clipping: Clipping | AdaptiveClipping
    noise: GaussianNoise
    engine: Engine

    def __post_init__(self) -> None:
        owner = "SampledGaussianMechanism"
        check_instance(self.sampler, PoissonSampler, "sampler", owner)
        if not isinstance(self.clipping, AdaptiveClipping):
            check_instance(self.clipping, Clipping, "clipping", owner)
        check_instance(self.noise, GaussianNoise, "noise", owner)
        if not hasattr(self.engine, "slack"):
            raise UserError(f"The 'engine' parameter of {owner} must be an engine. Got {shown(self.engine)}.")

    @property
    def event(self) -> Event:
        """The event of one step. The noise multiplier is that over the sensitivity, slack included."""
        release: Event = gaussian_event(self.noise.noise_multiplier, self.engine.slack)
        if isinstance(self.clipping, AdaptiveClipping):
            release = Composed([release, self.clipping.event])  # of one and the same sample
        return self.sampler.event(release)

    def plan(self, steps: int) -> Repeated:
        """The event of `steps` steps."""
        return Repeated(self.event, steps)

    def clipped_sum(self, model: nn.Module, loss: Loss, batches: Iterable[MicroBatch]) -> ClippedSum:
        """The sum over the sample in `batches`, before noise."""
        clipping = Clipping(self.clipping.norm, self.clipping.mode)
        clipped = self.engine.clipped_sum(model, loss, batches, clipping)
        if clipped.slack > self.engine.slack:
            raise RuntimeError(
                f"The engine exceeded its slack, {clipped.slack:g} > {self.engine.slack:g}: no release."
            )
        if isinstance(self.clipping, AdaptiveClipping):
            self.clipping.watch(clipped)
        return clipped

    def release(self, clipped: ClippedSum, reservation: Reservation) -> list[Tensor]:
        """Commit one step, then draw the noise, then return the noisy sum, float64, one tensor a parameter.

        Raises:
            ReservationError: if the reservation does not allow another step; no noise is drawn then.
            UserError: if the reservation is for something else, or the clip norm has adapted since.
        """
        check_instance(clipped, ClippedSum, "clipped", "release")
        check_instance(reservation, Reservation, "reservation", "release")
        if self.event not in reservation.kinds:
            raise UserError(
                f"The reservation is for {reservation.step}, but this mechanism runs {self.event}; "
                "reserve mechanism.plan(steps)."
            )
        count = self.clipping.count(clipped) if isinstance(self.clipping, AdaptiveClipping) else 0.0
        reservation.commit(1, self.event)
        noisy = self.noise.add(clipped.gradients, self.clipping.norm)
        if isinstance(self.clipping, AdaptiveClipping):
            self.clipping.update(count, self.noise.randomness)
        return noisy


def set_gradients(parameters: Iterable[nn.Parameter], sums: Iterable[Tensor], divisor: float) -> None:
    """Set each parameter's gradient to its sum over `divisor`, in the parameter's own type."""
    divisor = check_number(divisor, "divisor", "set_gradients", low=1e-15, high=1e15, closed="both")
    for parameter, total in zip(parameters, sums, strict=True):
        parameter.grad = (total / divisor).to(dtype=parameter.dtype, device=parameter.device)
