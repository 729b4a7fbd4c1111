"""What a run says of itself: progress, accuracy, summary, statement and events."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accounting import Composed, Event, PrivacyAccountant, Repeated
from accounting.budget import Receipt
from accounting.curve import epsilon_curve
from accounting.pld import DEFAULT_TOLERANCE
from accounting.statement import PrivacyFacts, Risk, statement
from dpml.checkpoint import Checkpoint
from dpml.config import DPSGDConfig
from dpml.data.batches import to_device
from dpml.ledger import in_summary
from dpml.mechanism import SampledGaussianMechanism
from dpml.outputs import SUMMARY_VERSION, RunFolder, events_record
from dpml.planning import SamplingPlan
from dpml.tracking import Stopwatch, Tracker

Status = Literal["completed", "stopped", "diverged"]
NO_PRIVACY = (
    "# No privacy\n\nThis model was trained without differential privacy (`non_private`). It protects no "
    "record of "
    "the training set.\n"
)
"""The statement of a run without noise."""
_SUMMARY_KEYS = (
    "schema_version",
    "status",
    "method",
    "dataset",
    "epsilon",
    "epsilon_lower",
    "epsilon_spent",
    "target_epsilon",
    "delta",
    "accountant",
    "neighboring_relation",
    "privacy_unit",
    "n_is_public",
    "noise_multiplier",
    "clip_norm",
    "sampler",
    "sampling_probability",
    "expected_batch_size",
    "steps",
    "planned_steps",
    "test_accuracy",
    "train_seconds",
    "seed",
    "noise_is_secret",
    "sensitivity_slack",
    "selection_epsilon",
    "weights_sha256",
    "ledger",
    "config",
    "versions",
)
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

    def _repr_markdown_(self) -> str:
        """What a notebook shows of a result."""
        return self.statement


class Report:
    """Tells trackers and the output folder what happens. It reads a run and never changes it.

    `settings` is the configuration as it is written down.
    """

    def __init__(
        self,
        config: DPSGDConfig,
        settings: dict[str, Any],
        sampling: SamplingPlan,
        mechanism: SampledGaussianMechanism | None,
        plan: Event,
        folder: RunFolder | None,
        trackers: Sequence[Tracker],
        test_set: Any,
        training: Stopwatch,
    ) -> None:
        self.config, self.sampling, self.mechanism, self.plan = config, sampling, mechanism, plan
        self.folder, self.trackers, self.test_set = folder, trackers, test_set
        self.settings = settings
        self.mean_event = plan.events[0] if isinstance(plan, Composed) else None  # see `SamplingPlan.event`
        self.training = training
        self.accuracy: float | None = None
        self.steps = 0
        every = math.ceil(sampling.steps / _CURVE_POINTS)
        self._curve: dict[int, tuple[float, float]] = {}
        self._plan_bounds: tuple[float, float] | None = None
        self._log_steps = {*range(every, sampling.steps + 1, every), 1, sampling.steps}
        epoch = max(1, round(1 / sampling.sampling_probability))
        self._evaluate_every = max(epoch, math.ceil(sampling.steps / _EVALUATIONS))

    def start(self, committed: Event) -> None:
        """Write down the plan before the first release, and what an earlier process has committed of it."""
        if self.mechanism is not None and self.config.delta is not None:
            self._plan_bounds = self._bounds(self.plan)
            points = sorted(self._log_steps)
            bounds = self._along(points)
            # The curve is made on a coarser lattice; no part of the plan costs more than the plan.
            ceiling = self._plan_bounds[1]
            self._curve = {
                k: (lower, min(upper, ceiling)) for k, (lower, upper) in zip(points, bounds, strict=True)
            }
        self._write_events(committed, "running")
        settings = {**self.settings, **asdict(self.sampling), "planned_steps": self.sampling.steps}
        if self.mechanism is None:
            settings |= {"clip_norm": None, "neighboring_relation": None}
        else:
            settings["noise_multiplier"] = self.mechanism.noise.noise_multiplier
        for tracker in self.trackers:
            tracker.start(self.sampling.steps, settings)

    def step(
        self,
        step: int,
        trained: nn.Module,
        released: nn.Module,
        diagnostics: dict[str, float],
        checkpoint: Checkpoint,
    ) -> bool:
        """Report a step. False if the weights are not finite any more, trained or averaged.

        What depends on releases is shown when the checkpoint has them.
        """
        self.steps = step
        values: dict[str, float] = {}
        if step in self._log_steps:
            if step in self._curve:
                values["privacy/epsilon_lower"], values["privacy/epsilon"] = self._curve[step]
            done = step * self.sampling.expected_batch_size
            values["speed/examples_per_second"] = done / max(self.training.seconds, 1e-9)
            if self.mechanism is not None and self.config.clip_quantile is not None:
                values["privacy/clip_norm"] = self.mechanism.clipping.norm  # moved by noisy counts alone
        finite = True
        last = step == self.sampling.steps
        evaluated = step % self._evaluate_every == 0 or last
        if evaluated:
            weights = [*trained.parameters(), *released.parameters()]
            finite = all(bool(torch.isfinite(p).all()) for p in weights)
            self.accuracy = accuracy(released, self.test_set) if self.test_set is not None else None
            if self.accuracy is not None:
                values["test/accuracy"] = self.accuracy
        checkpoint.keep(needed=evaluated or "privacy/clip_norm" in values, over=last or not finite)
        for tracker in self.trackers:
            if values:
                tracker.scalars(step, values)
            if self.config.log_not_private and diagnostics and step in self._log_steps:
                tracker.not_private(step, _averages(diagnostics))
        return finite

    def finish(
        self,
        model: nn.Module,
        status: Status,
        committed: Event,
        *,
        name: str,
        test_set_is_public: bool,
        receipt: Receipt | None = None,
    ) -> TrainingResult:
        """Write all results, of a stopped run too. `receipt` is that of the ledger, if one was on."""
        if status != "completed" and self.test_set is not None:
            self.accuracy = accuracy(model, self.test_set)
        summary = self._summary(status, committed, name) | {"ledger": in_summary(receipt)}
        text = self._statement(summary, test_set_is_public, receipt)
        if self.folder is not None:
            summary["weights_sha256"] = self.folder.write_model("model.safetensors", model)
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
        given = {
            "status": status,
            "method": "dpsgd",
            "dataset": name,
            "sampler": "poisson",
            "sampling_probability": sampling.sampling_probability,
            "expected_batch_size": sampling.expected_batch_size,
            "steps": self.steps if mechanism is None else _count(committed, mechanism.event),
            "planned_steps": sampling.steps,
            "test_accuracy": self.accuracy,
            "train_seconds": self.training.seconds,
            "seed": config.seed,
            "config": self.settings,
        }
        if mechanism is not None:
            given |= {
                "epsilon": upper,
                "epsilon_lower": lower,
                "epsilon_spent": spent,
                "target_epsilon": config.epsilon,
                "delta": config.delta,
                "accountant": config.accountant,
                "neighboring_relation": sampling.neighboring_relation,
                "privacy_unit": "record",
                "n_is_public": sampling.n_is_public,
                "noise_multiplier": mechanism.noise.noise_multiplier,
                "clip_norm": config.clip_norm,
                "noise_is_secret": _is_secret(mechanism),
                "sensitivity_slack": mechanism.engine.slack,
            }
        if config.mean_noise is not None:
            given["mean_noise_multiplier"] = None if mechanism is None else config.mean_noise
        return summary_of(given)

    def _bounds(self, event: Event, tolerance: float = DEFAULT_TOLERANCE) -> tuple[float, float]:
        assert self.config.delta is not None  # noqa: S101 - private runs have one
        accountant = PrivacyAccountant(
            self.config.accountant,
            neighboring_relation=self.sampling.neighboring_relation,
            tolerance=tolerance,
        )
        accountant.record(event)
        return accountant.epsilon_bounds(self.config.delta)

    def _along(self, points: list[int]) -> list[tuple[float, float]]:
        """Bounds on ε after each of these steps, to look at while the plan runs."""
        assert self.mechanism is not None and self.config.delta is not None  # noqa: S101, PT018 - as above
        if self.mean_event is not None:
            steps = [Repeated(self.mechanism.event, k) for k in points]
            return [self._bounds(Composed([self.mean_event, part]), tolerance=0.01) for part in steps]
        return epsilon_curve(
            self.mechanism.event,
            points,
            self.config.delta,
            method=self.config.accountant,
            neighboring_relation=self.sampling.neighboring_relation,
        )

    def _statement(self, summary: dict[str, Any], test_set_is_public: bool, receipt: Receipt | None) -> str:
        if self.mechanism is None:
            return NO_PRIVACY
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
                clip_quantile=self.config.clip_quantile,
                mean_noise=self.config.mean_noise,
                ledger=receipt,
                **{key: summary[key] for key in copied.split()},
            )
        )


def summary_of(given: dict[str, Any]) -> dict[str, Any]:
    """A summary with all keys in their order; what is not given does not apply and is None."""
    versions = {package: version(package) for package in ("dpml", "torch", "opacus", "numpy", "scipy")}
    versions = {"python": platform.python_version(), **versions}
    known = {"schema_version": SUMMARY_VERSION, **given, "versions": versions}
    own = {key: value for key, value in known.items() if key not in _SUMMARY_KEYS}
    return {key: known.get(key) for key in _SUMMARY_KEYS} | own


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
            right += int((model(to_device(inputs, device)).argmax(dim=1).cpu() == targets).sum())
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


def _count(committed: Event, step: Event) -> int:
    parts = committed.events if isinstance(committed, Composed) else (committed,)
    return sum(part.count for part in parts if isinstance(part, Repeated) and part.event == step)


def _is_secret(mechanism: SampledGaussianMechanism) -> bool:
    return mechanism.noise.randomness.is_secret and mechanism.sampler.randomness.is_secret
