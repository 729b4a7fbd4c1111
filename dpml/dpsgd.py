"""The DP-SGD trainer (Abadi et al. 2016): plan, reserve, then sample, clip, commit, add noise, step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from accounting import (
    Composed,
    Event,
    NonPrivate,
    PrivacyAccountant,
    Repeated,
    Reservation,
    UserError,
    calibrate_noise_multiplier,
)
from accounting.events import check_instance
from dpml import models
from dpml.adaptive import AdaptiveClipping
from dpml.augmentation import AUGMENTATIONS, Augment, require_independent_rows
from dpml.averaging import WeightAverage
from dpml.centring import Centred, NoisyMean
from dpml.checkpoint import Checkpoint, require_keepable
from dpml.config import DPSGDConfig, DPSGDRun
from dpml.data import LabeledData, load
from dpml.data.batches import Examples, check_records
from dpml.data.samplers import PoissonSampler
from dpml.device import choose_device
from dpml.features import features_of
from dpml.gradients import BookKeepingEngine, Clipping, Engine, Loss, cross_entropy
from dpml.gradients.engine import plain_sum, trainable_parameters
from dpml.gradients.models import make_trainable, require_example_losses, require_trainable
from dpml.ledger import closed, reserved, warn_of_look_alikes
from dpml.mechanism import SampledGaussianMechanism, set_gradients
from dpml.noise import GaussianNoise
from dpml.outputs import RunFolder
from dpml.planning import SamplingPlan, accountant_for, count_noise
from dpml.randomness import Randomness
from dpml.report import Report, Status, TrainingResult
from dpml.resuming import recorded_run, reopened
from dpml.tracking import Stopwatch, TensorBoard, Tracker
from dpml.training_state import TrainingState

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def run_dpsgd(
    run: DPSGDRun,
    *,
    output: str | os.PathLike[str] | None = None,
    trackers: Sequence[Tracker] = (),
    data: LabeledData | None = None,
    resume: bool = False,
) -> TrainingResult:
    """Train as a complete configuration says: load its data, build its model, and `train_dpsgd`.

    Args:
        run: The configuration.
        output: As for `train_dpsgd`.
        trackers: As for `train_dpsgd`.
        data: Train on this in place of what the configuration names, such as a part of it.
        resume: As for `train_dpsgd`.

    Raises:
        UserError: for a mistake in the configuration, the data or the output folder.
        BudgetExceeded, UnreachableBudget: if the budget cannot be met.
    """
    check_instance(run, DPSGDRun, "run", "run_dpsgd")
    if data is None:
        data = load(run.dataset, classes=run.classes, image_size=run.size)
    run = replace(run, model=model_name(run, data))
    x_train, x_test = data.x_train, data.x_test
    if run.features != "none":
        progress = _featuring(trackers)
        x_train, x_test = features_of(run.features, data, cached=not run.no_cache, progress=progress)
    # The weights' seed must not touch the caller's random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = models.build(run.model, tuple(x_train.shape[1:]), data.classes)
    return train_dpsgd(
        model,
        TensorDataset(x_train, data.y_train),
        run,
        test_set=TensorDataset(x_test, data.y_test),
        output=output,
        trackers=trackers,
        name=data.name,
        test_set_is_public=data.is_public_benchmark,
        resume=resume,
    )


def train_dpsgd(
    model: nn.Module,
    train_set: Any,
    config: DPSGDConfig,
    *,
    test_set: Any = None,
    loss: Loss = cross_entropy,
    make_optimizer: MakeOptimizer | None = None,
    fix_model: bool = False,
    output: str | os.PathLike[str] | None = None,
    trackers: Sequence[Tracker] = (),
    name: str = "the training set",
    test_set_is_public: bool = False,
    augment: Augment | None = None,
    accountant: PrivacyAccountant | None = None,
    resume: bool = False,
) -> TrainingResult:
    """Train a model on a data set with DP-SGD, under a budget or with a given noise.

    Guarantee: every model on the way, taken together, is (ε, δ)-differentially private with the ε of the
    returned summary, for one record of `train_set` under the configured relation. The whole plan is
    admitted before the first step, and each step is committed before its noise is drawn.

    Args:
        model: Trained in place; it ends with the averaged weights if the configuration asks for them. Its
            layers must treat the examples of a batch independently. With `mean_noise` it gets centred
            inputs of norm 1, and the result's model is the centring followed by this one.
        train_set: The private records: a map-style data set of (input, target) pairs.
        config: How to train.
        test_set: Public records for accuracy; (input, class) pairs.
        loss: From outputs and targets to one loss for each example.
        make_optimizer: From parameters to an optimizer; by default SGD as configured. It sees noisy
            gradients only, so any optimizer will do.
        fix_model: Replace layers that cannot be trained privately, in a copy (`TrainingResult.model`).
        output: A new folder for summary, events, statement, weights and TensorBoard.
        trackers: More receivers of progress.
        name: What the statement calls the data.
        test_set_is_public: Whether the test set is that of a public benchmark, for the statement.
        augment: From inputs [rows, ...] to as many rows, each changed at random and by itself, with torch's
            global generator; in place of the configured augmentation.
        accountant: One that other releases of these records go through too; its budget then pays for the
            plan. By default a new one, with the configured budget.
        resume: Go on with the run in `output` that was killed or stopped, from its checkpoint; begin it if
            nothing of it is there. All else must be as it was. Its plan is reserved again, and what it had
            released is committed again: these are the same releases. See `dpml.checkpoint`.

    Raises:
        UserError: for a mistake in model, data, configuration or output folder; nothing is spent then.
            A `CannotResume` if there is no checkpoint, or it is damaged, or of another run.
        BudgetExceeded, UnreachableBudget: if the budget cannot be met; nothing is spent then.
    """
    check_instance(config, DPSGDConfig, "config", "train_dpsgd")
    check_instance(model, nn.Module, "model", "train_dpsgd")
    if test_set is not None:
        check_records(test_set, "test set")
    device = choose_device(config.device)
    chosen = AUGMENTATIONS[config.augment] if augment is None else augment
    examples = Examples(train_set, config.micro_batch_size, config.workers, device, config.views, chosen)
    sampling = SamplingPlan.of(
        examples=len(examples),
        batch_size=config.batch_size,
        epochs=config.epochs,
        sampling_probability=config.sampling_probability,
        neighboring_relation=config.neighboring_relation,
    )
    inputs, targets = examples.probe()
    if chosen is not None and config.mean_noise is not None:
        raise UserError(
            "The mean of augmented inputs is not released; leave out mean_noise or the augmentation."
        )
    if chosen is not None:
        inputs = require_independent_rows(chosen, inputs)
    elif config.views > 1:
        raise UserError(
            f"{config.views} views of a record without an augmentation are {config.views} times the same; "
            "choose one (flip-crop), or 1 view."
        )
    engine = BookKeepingEngine()
    model = make_trainable(model) if fix_model else model
    centred = None if config.mean_noise is None else Centred(_input_size(inputs))
    model = (model if centred is None else nn.Sequential(centred, model)).to(device).train()
    if not config.non_private:
        require_trainable(model, inputs, engine)
        require_example_losses(model, loss, inputs, targets)
    parameters = trainable_parameters(model)
    optimizer = _optimizer(config, parameters, make_optimizer, is_kept=output is not None)
    schedule = _schedule(config, optimizer, sampling.steps)
    folder = None
    if output is not None:
        folder = reopened(output) if resume else RunFolder(output)

    streams = {purpose: _random(config, purpose) for purpose in ("sampling", "noise", "layers", "mean")}
    sampler = PoissonSampler(len(examples), sampling.sampling_probability, streams["sampling"])
    mechanism = None
    if not config.non_private:
        mechanism = _mechanism(config, sampling, sampler, engine, streams["noise"])
    mean = None if centred is None else _mean(config, sampling, streams["mean"])
    plan: Event = NonPrivate() if mechanism is None else mechanism.plan(sampling.steps)
    if mechanism is not None and mean is not None:
        plan = Composed([mean.event, plan])
    accountant = accountant_for(config, sampling.neighboring_relation, accountant)
    settings = asdict(config) | ({} if augment is None else {"augment": "a function"})
    average = WeightAverage(model, config.average) if config.average else None
    released = model if average is None else average.model
    clipping = None if mechanism is None else mechanism.clipping
    state = TrainingState(model, optimizer, schedule, average, clipping, streams, Stopwatch())
    checkpoint = Checkpoint(folder, state, {"settings": settings, "plan": plan.to_dict()}, train_set, device)
    status: Status = "completed"
    devices = [device] if device.type == "cuda" else []
    warn_of_look_alikes(accountant, train_set)
    with (
        reserved(accountant, plan, recorded_run(output) if resume else None) as reservation,
        checkpoint.opened(resume=resume, receipt=reservation.receipt),
        torch.random.fork_rng(devices=devices),
    ):
        _commit_again(state, mechanism, mean, reservation)
        board = [TensorBoard(folder.path, state.step if resume else None)] if folder else []
        everyone = [*trackers, *board]
        report = Report(
            config, settings, sampling, mechanism, plan, folder, everyone, test_set, state.training
        )
        report.start(reservation.committed_event if resume else Repeated(plan, 0))
        try:
            if centred is not None and mean is not None and not state.mean_released:
                with report.training, state.changing():
                    centred.mean.copy_(mean.release(mean.total(examples.inputs()), reservation))
                    state.mean_released = True
            if state.step > 0 and not report.step(state.step, model, released, {}, checkpoint):
                status = "diverged"
            for step in range(state.step + 1, sampling.steps + 1) if status == "completed" else ():
                with report.training, state.changing():
                    # Dropout's masks and augmentations go by place in a batch: with known ones, a record
                    # that moves the others would be seen. So they are secret too, and independent of
                    # earlier samples.
                    torch.manual_seed(int(streams["layers"].words(1)[0] >> np.uint64(1)))
                    batches = examples.micro_batches(sampler.sample())
                    if mechanism is None:
                        clipped = plain_sum(model, loss, batches)
                        sums = clipped.gradients
                    else:
                        clipped = mechanism.clipped_sum(model, loss, batches)
                        sums = mechanism.release(clipped, reservation)
                    set_gradients(parameters, sums, sampling.expected_batch_size)
                    optimizer.step()
                    if schedule is not None:
                        schedule.step()
                    if average is not None:
                        average.update(model)
                    state.step = step
                if not report.step(step, model, released, clipped.diagnostics, checkpoint):
                    status = "diverged"
                    break
        except KeyboardInterrupt:
            if not checkpoint.keep_interrupted():
                raise  # the weights are between two steps: the last checkpoint is what there is
            status = "stopped"
        optimizer.zero_grad()
        if average is not None:
            average.copy_to(model)
        committed = reservation.committed_event if mechanism is not None else plan
        result = report.finish(
            model,
            status,
            committed,
            name=name,
            test_set_is_public=test_set_is_public,
            receipt=closed(reservation),
        )
        if status != "stopped":
            checkpoint.delete()
        return result


def _optimizer(
    config: DPSGDConfig, parameters: list[nn.Parameter], make: MakeOptimizer | None, *, is_kept: bool
) -> torch.optim.Optimizer:
    """SGD as configured, or what `make` gives. One that is to be kept is tried before anything is spent."""
    if make is None:
        return torch.optim.SGD(parameters, lr=config.learning_rate, momentum=config.momentum)
    if is_kept:
        copies = [nn.Parameter(p.detach().clone()) for p in parameters]
        for copy in copies:
            copy.grad = torch.zeros_like(copy)
        trial = make(copies)
        trial.step()
        require_keepable(trial.state_dict())
    return make(parameters)


def _schedule(
    config: DPSGDConfig, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR | None:
    """The learning rate over the run, if it is not constant."""
    if config.schedule == "constant":
        return None
    # The share of the run in which the rate falls to zero.
    falling = {"linear": 1.0, "trapezoidal": 0.4}[config.schedule] * steps
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (steps - done) / falling))


def _commit_again(
    state: TrainingState,
    mechanism: SampledGaussianMechanism | None,
    mean: NoisyMean | None,
    reservation: Reservation,
) -> None:
    """Commit what an earlier process released: it is the same releases, and they stay paid for."""
    if mechanism is None:
        return
    if mean is not None and state.mean_released:
        reservation.commit(1, mean.event)
    if state.step > 0:
        reservation.commit(state.step, mechanism.event)


def _mechanism(
    config: DPSGDConfig,
    sampling: SamplingPlan,
    sampler: PoissonSampler,
    engine: Engine,
    randomness: Randomness,
) -> SampledGaussianMechanism:
    """The mechanism of each step, its noise calibrated to the budget if there is one."""
    noise_multiplier, adaptive = config.noise_multiplier, config.clip_quantile is not None
    if noise_multiplier is None:
        assert config.budget is not None  # noqa: S101 - the configuration has checked it
        noise_multiplier = calibrate_noise_multiplier(
            lambda noise: sampling.event(
                noise, engine.slack, adaptive_clip=adaptive, mean_noise=config.mean_noise
            ),
            config.budget,
            method=config.accountant,
            neighboring_relation=sampling.neighboring_relation,
        )
    noise = GaussianNoise(noise_multiplier, randomness)
    clipping: Clipping | AdaptiveClipping = Clipping(config.clip_norm, config.clipping)
    if config.clip_quantile is not None:
        batch_size = sampling.expected_batch_size
        deviation = count_noise(noise_multiplier, batch_size)
        clipping = AdaptiveClipping(config.clip_norm, config.clip_quantile, batch_size, deviation)
    return SampledGaussianMechanism(sampler, clipping, noise, engine)


def _mean(config: DPSGDConfig, sampling: SamplingPlan, randomness: Randomness) -> NoisyMean:
    """The release of the inputs' mean. Its divisor is the number of records where that is public."""
    noise = None
    if not config.non_private and config.mean_noise is not None:
        noise = GaussianNoise(config.mean_noise, randomness)
    return NoisyMean(noise, sampling.expected_batch_size / sampling.sampling_probability)


def _input_size(inputs: Any) -> int:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise UserError("Only inputs that are one tensor of real numbers have a mean; leave out mean_noise.")
    return inputs[0].numel()


def _featuring(trackers: Sequence[Tracker]) -> Callable[[str, int, int], None]:
    """What tells trackers how features are computed: a phase for each block of training or test images."""
    told = 0

    def progress(block: str, done: int, total: int) -> None:
        nonlocal told
        for tracker in trackers:
            if told == 0:
                tracker.phase(f"features, {block}", total)
            tracker.scalars(done, {})
        told = done if done < total else 0

    return progress


def model_name(run: DPSGDRun, data: LabeledData) -> str:
    """The model that a run names, or the one that suits its data."""
    if run.model != "auto":
        return run.model
    if run.features != "none":
        return "linear"
    is_image = len(data.example_shape) == 3 and min(data.example_shape[1:]) >= 4
    return "cnn" if is_image else "mlp"


def _random(config: DPSGDConfig, purpose: str) -> Randomness:
    if config.insecure_noise_seed is None:
        return Randomness.secret()
    return Randomness.from_seed(config.insecure_noise_seed, purpose)
