"""The DP-SGD trainer (Abadi et al. 2016): plan, reserve, then sample, clip, commit, add noise, step."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accounting import (
    Event,
    NonPrivate,
    PrivacyAccountant,
    Repeated,
    Reservation,
    UserError,
    calibrate_noise_multiplier,
)
from accounting.curve import epsilon_curve
from accounting.statement import PrivacyFacts, Risk, statement
from dpml import models
from dpml.config import DPSGDConfig, DPSGDRun
from dpml.data import LabeledData, load
from dpml.data.batches import Examples
from dpml.data.samplers import PoissonSampler
from dpml.gradients import Clipping, Engine, Loss, OpacusEngine, cross_entropy
from dpml.gradients.engine import plain_sum, trainable_parameters
from dpml.gradients.models import make_trainable, require_example_losses, require_trainable
from dpml.mechanism import SampledGaussianMechanism, set_gradients
from dpml.noise import GaussianNoise
from dpml.outputs import SUMMARY_VERSION, RunFolder, events_record
from dpml.planning import SamplingPlan
from dpml.randomness import Randomness
from dpml.tracking import Stopwatch, TensorBoard, Tracker

Status = Literal["completed", "stopped", "diverged"]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
_CURVE_POINTS = 40
_EVALUATIONS = 20


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """What a run gave.

    Attributes:
        model: The trained model (a copy of yours if it had to be fixed).
        status: "completed", "stopped" (by an interrupt) or "diverged" (weights are not finite).
        summary: The content of `summary.json`.
        statement: The privacy statement in Markdown.
        planned: The event of the whole plan.
        committed: The event of what was released.
    """

    model: nn.Module
    status: Status
    summary: dict[str, Any]
    statement: str
    planned: Event
    committed: Event

    @property
    def epsilon(self) -> float:
        """The guarantee: an upper bound on ε for the whole plan; infinite without privacy."""
        value = self.summary["epsilon"]
        return math.inf if value is None else float(value)


def run_dpsgd(
    run: DPSGDRun, *, output: str | os.PathLike[str] | None = None, trackers: Sequence[Tracker] = ()
) -> TrainingResult:
    """Train as a complete configuration says: load its data, build its model, and `train_dpsgd`.

    Raises:
        UserError: for a mistake in the configuration, the data or the output folder.
        BudgetExceeded, UnreachableBudget: if the budget cannot be met.
    """
    size = None if run.image_size is None else (run.image_size, run.image_size)
    data = load(run.dataset, classes=run.classes, image_size=size)
    run = replace(run, model=_model_name(run, data))
    # The weights' seed must not touch the caller's random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = models.build(run.model, data.example_shape, data.classes)
    return train_dpsgd(
        model,
        TensorDataset(data.x_train, data.y_train),
        run,
        test_set=TensorDataset(data.x_test, data.y_test),
        output=output,
        trackers=trackers,
        name=data.name,
        test_set_is_public=data.is_public_benchmark,
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
) -> TrainingResult:
    """Train a model on a data set with DP-SGD, under a budget or with a given noise.

    Guarantee: every model on the way, taken together, is (ε, δ)-differentially private with the ε of the
    returned summary, for one record of `train_set` under the configured relation. The whole plan is
    admitted before the first step, and each step is committed before its noise is drawn.

    Args:
        model: Trained in place. Its layers must treat the examples of a batch independently.
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

    Raises:
        UserError: for a mistake in model, data, configuration or output folder; nothing is spent then.
        BudgetExceeded, UnreachableBudget: if the budget cannot be met; nothing is spent then.
    """
    device = _device(config.device)
    examples = Examples(train_set, config.micro_batch_size, config.workers, device)
    sampling = SamplingPlan.of(
        examples=len(examples),
        batch_size=config.batch_size,
        epochs=config.epochs,
        sampling_probability=config.sampling_probability,
        neighboring_relation=config.neighboring_relation,
    )
    engine = OpacusEngine()
    model = (make_trainable(model) if fix_model else model).to(device).train()
    if not config.non_private:
        inputs, targets = examples.probe()
        require_trainable(model, inputs, engine)
        require_example_losses(model, loss, inputs, targets)
    parameters = trainable_parameters(model)
    optimizer = (
        torch.optim.SGD(parameters, lr=config.learning_rate, momentum=config.momentum)
        if make_optimizer is None
        else make_optimizer(parameters)
    )
    schedule = None
    if config.schedule != "constant":  # the share of the run in which the rate falls to zero
        falling = {"linear": 1.0, "trapezoidal": 0.4}[config.schedule] * sampling.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: min(1.0, (sampling.steps - done) / falling)
        )
    folder = None if output is None else RunFolder(output)
    trackers = [*trackers, TensorBoard(folder.path)] if folder else list(trackers)

    sampler = PoissonSampler(len(examples), sampling.sampling_probability, _random(config, "sampling"))
    mechanism = None if config.non_private else _mechanism(config, sampling, sampler, engine)
    plan: Event = NonPrivate() if mechanism is None else mechanism.plan(sampling.steps)
    accountant = PrivacyAccountant(
        config.accountant, budget=config.budget, neighboring_relation=sampling.neighboring_relation
    )
    report = _Report(config, sampling, mechanism, plan, folder, trackers, test_set)
    status: Status = "completed"
    layers = _random(config, "layers")
    devices = [device] if device.type == "cuda" else []
    with accountant.reserve(plan) as reservation, torch.random.fork_rng(devices=devices):
        report.start(reservation)
        try:
            for step in range(1, sampling.steps + 1):
                with report.training:
                    # Dropout's masks go by place in a batch: with known ones, a record that moves the
                    # others would be seen. So they are secret too, and independent of earlier samples.
                    torch.manual_seed(int(layers.words(1)[0] >> np.uint64(1)))
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
                if not report.step(step, model, clipped.diagnostics):
                    status = "diverged"
                    break
        except KeyboardInterrupt:
            status = "stopped"
        optimizer.zero_grad()
        committed = reservation.committed_event if mechanism is not None else plan
        return report.finish(model, status, committed, name=name, test_set_is_public=test_set_is_public)


def _mechanism(
    config: DPSGDConfig, sampling: SamplingPlan, sampler: PoissonSampler, engine: Engine
) -> SampledGaussianMechanism:
    """The mechanism of each step, its noise calibrated to the budget if there is one."""
    noise_multiplier = config.noise_multiplier
    if noise_multiplier is None:
        assert config.budget is not None  # noqa: S101 - the configuration has checked it
        noise_multiplier = calibrate_noise_multiplier(
            lambda noise: sampling.event(noise, engine.slack),
            config.budget,
            method=config.accountant,
            neighboring_relation=sampling.neighboring_relation,
        )
    noise = GaussianNoise(noise_multiplier, _random(config, "noise"))
    return SampledGaussianMechanism(sampler, Clipping(config.clip_norm), noise, engine)


class _Report:
    """Tells trackers and the output folder what happens. It reads a run and never changes it."""

    def __init__(
        self,
        config: DPSGDConfig,
        sampling: SamplingPlan,
        mechanism: SampledGaussianMechanism | None,
        plan: Event,
        folder: RunFolder | None,
        trackers: Sequence[Tracker],
        test_set: Any,
    ) -> None:
        self.config, self.sampling, self.mechanism, self.plan = config, sampling, mechanism, plan
        self.folder, self.trackers, self.test_set = folder, trackers, test_set
        self.training = Stopwatch()
        self.accuracy: float | None = None
        self.steps = 0
        every = math.ceil(sampling.steps / _CURVE_POINTS)
        self._curve: dict[int, tuple[float, float]] = {}
        self._plan_bounds: tuple[float, float] | None = None
        self._log_steps = {*range(every, sampling.steps + 1, every), 1, sampling.steps}
        epoch = max(1, round(1 / sampling.sampling_probability))
        self._evaluate_every = max(epoch, math.ceil(sampling.steps / _EVALUATIONS))

    def start(self, reservation: Reservation) -> None:
        """Write down the plan before the first release."""
        if self.mechanism is not None and self.config.delta is not None:
            self._plan_bounds = self._bounds(self.plan)
            points = sorted(self._log_steps)
            bounds = epsilon_curve(
                reservation.step,
                points,
                self.config.delta,
                method=self.config.accountant,
                neighboring_relation=self.sampling.neighboring_relation,
            )
            # The curve is made on a coarser lattice; no part of the plan costs more than the plan.
            ceiling = self._plan_bounds[1]
            self._curve = {
                k: (lower, min(upper, ceiling)) for k, (lower, upper) in zip(points, bounds, strict=True)
            }
        self._write_events(Repeated(self.plan, 0), "running")
        settings = {**asdict(self.config), **asdict(self.sampling), "planned_steps": self.sampling.steps}
        if self.mechanism is None:
            settings |= {"clip_norm": None, "neighboring_relation": None}
        else:
            settings["noise_multiplier"] = self.mechanism.noise.noise_multiplier
        for tracker in self.trackers:
            tracker.start(self.sampling.steps, settings)

    def step(self, step: int, model: nn.Module, diagnostics: dict[str, float]) -> bool:
        """Report a step that was released. False if the weights are not finite any more."""
        self.steps = step
        values: dict[str, float] = {}
        if step in self._log_steps:
            if step in self._curve:
                values["privacy/epsilon_lower"], values["privacy/epsilon"] = self._curve[step]
            done = step * self.sampling.expected_batch_size
            values["speed/examples_per_second"] = done / max(self.training.seconds, 1e-9)
        finite = True
        last = step == self.sampling.steps
        if step % self._evaluate_every == 0 or last:
            finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
            self.accuracy = accuracy(model, self.test_set) if self.test_set is not None else None
            if self.accuracy is not None:
                values["test/accuracy"] = self.accuracy
        for tracker in self.trackers:
            if values:
                tracker.scalars(step, values)
            if self.config.log_not_private and diagnostics and step in self._log_steps:
                tracker.not_private(step, _averages(diagnostics))
        return finite

    def finish(
        self, model: nn.Module, status: Status, committed: Event, *, name: str, test_set_is_public: bool
    ) -> TrainingResult:
        """Write all results, of a stopped run too."""
        if status != "completed" and self.test_set is not None:
            self.accuracy = accuracy(model, self.test_set)
        summary = self._summary(status, committed, name)
        text = self._statement(summary, test_set_is_public)
        if self.folder is not None:
            self.folder.write_model("model.safetensors", model)
            self._write_events(committed, status)
            self.folder.write_text("statement.md", text)
            self.folder.write_json("summary.json", summary)
        for tracker in self.trackers:
            tracker.finish()
        return TrainingResult(model, status, summary, text, self.plan, committed)

    def _write_events(self, committed: Event, status: str) -> None:
        if self.folder is not None:
            record = events_record(
                planned=self.plan,
                committed=committed,
                relation=self.sampling.neighboring_relation,
                accountant=self.config.accountant,
                status=status,
            )
            self.folder.write_json("privacy_events.json", record)

    def _summary(self, status: Status, committed: Event, name: str) -> dict[str, Any]:
        config, sampling, mechanism = self.config, self.sampling, self.mechanism
        lower = upper = spent = None
        if self._plan_bounds is not None:
            lower, upper = self._plan_bounds
            spent = upper if committed == self.plan else self._bounds(committed)[1]
        private = mechanism is not None
        return {
            "schema_version": SUMMARY_VERSION,
            "status": status,
            "method": "dpsgd",
            "dataset": name,
            "epsilon": upper,
            "epsilon_lower": lower,
            "epsilon_spent": spent,
            "target_epsilon": config.epsilon,
            "delta": config.delta if private else None,
            "accountant": config.accountant if private else None,
            "neighboring_relation": sampling.neighboring_relation if private else None,
            "privacy_unit": "record" if private else None,
            "n_is_public": sampling.n_is_public if private else None,
            "noise_multiplier": mechanism.noise.noise_multiplier if mechanism else None,
            "clip_norm": config.clip_norm if private else None,
            "sampler": "poisson",
            "sampling_probability": sampling.sampling_probability,
            "expected_batch_size": sampling.expected_batch_size,
            "steps": self.steps if mechanism is None else _parts(committed),
            "planned_steps": sampling.steps,
            "test_accuracy": self.accuracy,
            "train_seconds": self.training.seconds,
            "seed": config.seed,
            "noise_is_secret": _is_secret(mechanism),
            "sensitivity_slack": mechanism.engine.slack if mechanism else None,
            "selection_epsilon": None,
            "config": asdict(config),
            "versions": {
                "python": platform.python_version(),
                **{package: version(package) for package in ("dpml", "torch", "opacus", "numpy", "scipy")},
            },
        }

    def _bounds(self, event: Event) -> tuple[float, float]:
        assert self.config.delta is not None  # noqa: S101 - private runs have one
        accountant = PrivacyAccountant(
            self.config.accountant, neighboring_relation=self.sampling.neighboring_relation
        )
        accountant.record(event)
        return accountant.epsilon_bounds(self.config.delta)

    def _statement(self, summary: dict[str, Any], test_set_is_public: bool) -> str:
        if self.mechanism is None:
            return (
                "# No privacy\n\nThis model was trained without differential privacy (`non_private`). "
                "It protects no record of the training set.\n"
            )
        copied = (
            "dataset status epsilon epsilon_lower epsilon_spent delta accountant noise_multiplier clip_norm "
            "n_is_public sensitivity_slack sampling_probability expected_batch_size planned_steps steps "
            "noise_is_secret"
        )
        return statement(
            PrivacyFacts(
                method="DP-SGD",
                relation=self.sampling.neighboring_relation,
                risk=Risk.of(self.plan, summary["delta"], self.sampling.neighboring_relation),
                test_set_is_public=test_set_is_public,
                not_private_logs=self.config.log_not_private,
                **{key: summary[key] for key in copied.split()},
            )
        )


def accuracy(model: nn.Module, test_set: Any) -> float:
    """The share of `test_set` whose largest output is at the target class."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    right = total = 0
    chunks = (
        zip(*(torch.split(tensor, 1000) for tensor in test_set.tensors), strict=True)
        if isinstance(test_set, TensorDataset)
        else DataLoader(test_set, batch_size=1000)
    )
    with torch.no_grad():
        for inputs, targets in chunks:
            right += int((model(inputs.to(device)).argmax(dim=1).cpu() == targets).sum())
            total += len(targets)
    model.train(training)
    return right / max(1, total)


def _averages(diagnostics: dict[str, float]) -> dict[str, float]:
    count = max(1.0, diagnostics["examples"])
    return {
        "train_loss": diagnostics["loss_sum"] / count,
        "gradient_norm": diagnostics["norm_sum"] / count,
        "clipped_share": diagnostics["clipped"] / count,
        "non_finite_examples": diagnostics["non_finite"],
        "realised_batch_size": diagnostics["examples"],
    }


def _parts(committed: Event) -> int:
    return committed.count if isinstance(committed, Repeated) else 1


def _is_secret(mechanism: SampledGaussianMechanism | None) -> bool | None:
    if mechanism is None:
        return None
    return mechanism.noise.randomness.is_secret and mechanism.sampler.randomness.is_secret


def _model_name(run: DPSGDRun, data: LabeledData) -> str:
    if run.model != "auto":
        return run.model
    is_image = len(data.example_shape) == 3 and min(data.example_shape[1:]) >= 4
    return "cnn" if is_image else "mlp"


def _random(config: DPSGDConfig, purpose: str) -> Randomness:
    if config.insecure_noise_seed is None:
        return Randomness.secret()
    return Randomness.from_seed(config.insecure_noise_seed, purpose)


def _device(wish: str) -> torch.device:
    if wish == "cuda" and not torch.cuda.is_available():
        raise UserError("The device cuda is not available on this machine; use cpu or auto.")
    return torch.device("cuda" if wish != "cpu" and torch.cuda.is_available() else "cpu")
