"""An audit of the user's own DP-SGD run: the real trainer on the real data, with planted canaries."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accounting import PrivacyAccountant, Repeated, UserError
from accounting.events import check_instance
from dpml import models
from dpml.audit.bounds import gaussian_one_run_epsilon, guess_counts, one_run_epsilon, right_guesses
from dpml.audit.canaries import Canaries, CanaryModel, watched_sgd
from dpml.audit.config import AuditConfig
from dpml.audit.report import AuditReport, Bound, Check
from dpml.audit.steps import Steps, checks, family_bound
from dpml.config import DPSGDRun
from dpml.data import load
from dpml.dpsgd import model_name, train_dpsgd
from dpml.outputs import RunFolder
from dpml.planning import SamplingPlan
from dpml.randomness import Randomness
from dpml.report import TrainingResult
from dpml.tracking import Scalars, Tracker

_MOST_SCORES = 2 * 10**8


@dataclass
class _Start:
    """A tracker that tells when the first step begins: what was tried before is no part of the run."""

    begin: Callable[[], None]

    def start(self, planned_steps: int, config: Any) -> None:
        del planned_steps, config
        self.begin()

    def phase(self, name: str, steps: int) -> None: ...

    def scalars(self, step: int, values: Scalars) -> None: ...

    def not_private(self, step: int, values: Scalars) -> None: ...

    def finish(self) -> None: ...


def audit_dpsgd(
    run: DPSGDRun,
    config: AuditConfig | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    trackers: Sequence[Tracker] = (),
) -> AuditReport:
    """Train as `run` says, with planted canaries, and bound ε from below by telling which were in.

    The trainer, its engine, sampler, mechanism and noise are those of `run_dpsgd`. The sampling probability
    and the steps are those of the run without canaries, and so are event and accounted ε. The data holds a
    place for each canary on top. Gradient-space canaries add a parameter each, which no other record moves
    and the model's outputs do not depend on.

    An audit is a training run on the user's records, and costs them their ε once more. All that it reports
    follows from that run's releases and from the canaries, so this ε covers it too.

    Args:
        run: A complete configuration, with privacy and a fixed clip norm.
        config: How to audit.
        output: A new folder for `audit.json`, `audit.md` and `audit.png`.
        trackers: Receivers of the training's progress.

    Raises:
        UserError: for a mistake in the configuration, the data or the output folder.
        BudgetExceeded, UnreachableBudget: if the budget cannot be met.
        KeyboardInterrupt: if training is interrupted: a run that was cut short is not audited.
    """
    config = AuditConfig() if config is None else config
    check_instance(run, DPSGDRun, "run", "audit_dpsgd")
    check_instance(config, AuditConfig, "config", "audit_dpsgd")
    if run.non_private:
        raise UserError("A run without privacy claims no ε that could be audited; leave out non_private.")
    if config.canary == "gradient" and run.clip_quantile is not None:
        raise UserError(
            "Gradient-space canaries need a fixed clip norm: leave out clip_quantile, or plant mislabelled "
            "canaries."
        )
    if run.features != "none" or run.mean_noise is not None:
        raise UserError(
            "Canaries are planted among records as they are: audit a run without features and mean_noise, "
            "such as that of a recipe which has neither (papernot2020-mnist)."
        )
    folder = None if output is None else RunFolder(output)
    data = load(run.dataset, classes=run.classes, image_size=run.size)
    sampling = SamplingPlan.of(
        examples=len(data.x_train),
        batch_size=run.batch_size,
        epochs=run.epochs,
        sampling_probability=run.sampling_probability,
        neighboring_relation=run.neighboring_relation,
    )
    if config.canary == "gradient" and sampling.steps * config.canaries > _MOST_SCORES:
        raise UserError(
            f"{config.canaries:,} canaries in {sampling.steps:,} steps make more than {_MOST_SCORES:,} "
            "scores to keep; choose fewer canaries."
        )
    # The same mechanism for more places: the probability goes in as a number.
    run = replace(
        run,
        model=model_name(run, data),
        sampling_probability=sampling.sampling_probability,
        neighboring_relation=sampling.neighboring_relation,
    )
    seed = run.insecure_noise_seed
    coins = Randomness.secret() if seed is None else Randomness.from_seed(seed, "canaries")
    canaries = Canaries(data, config.canaries, config.canary, run.clip_norm, coins)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = models.build(run.model, data.example_shape, data.classes)
    sums: list[npt.NDArray[np.float32]] = []
    result = _train(model, canaries, run, sums, TensorDataset(data.x_test, data.y_test), trackers)
    if result.status == "stopped":
        raise KeyboardInterrupt
    if result.status == "diverged":
        raise UserError("The weights are not finite any more: nothing to audit; lower the learning rate.")
    report = _judged(result, canaries, sums, run, config)
    if folder is not None:
        report.write(folder)
    return report


def _train(
    model: nn.Module,
    canaries: Canaries,
    run: DPSGDRun,
    sums: list[npt.NDArray[np.float32]],
    test_set: TensorDataset,
    trackers: Sequence[Tracker],
) -> TrainingResult:
    """Train, and collect what an observer sees of gradient-space canaries."""
    make_optimizer = None
    if canaries.kind == "gradient":
        model = CanaryModel(model, canaries.count)
        settings = {"lr": run.learning_rate, "momentum": run.momentum}
        make_optimizer = watched_sgd(canaries, model, run.batch_size, sums, **settings)
    return train_dpsgd(
        model,
        canaries.train_set,
        run,
        test_set=test_set,
        loss=canaries.loss,
        make_optimizer=make_optimizer,
        trackers=[*trackers, _Start(canaries.not_started)],
    )


def _judged(
    result: TrainingResult,
    canaries: Canaries,
    sums: list[npt.NDArray[np.float32]],
    run: DPSGDRun,
    config: AuditConfig,
) -> AuditReport:
    """All bounds and checks, each with an equal share of the chance to be wrong."""
    summary, included = result.summary, canaries.included
    delta, relation = summary["delta"], summary["neighboring_relation"]
    accountant = PrivacyAccountant(run.accountant, neighboring_relation=relation)
    accountant.record(result.planned)
    more: list[Bound] = []
    found: list[Check] = []
    share = (1 - config.confidence) / 2
    if canaries.kind == "gradient":
        share = (1 - config.confidence) / 4
        step = result.planned.event if isinstance(result.planned, Repeated) else result.planned
        scores = np.array(sums) / np.float32(run.clip_norm)
        seen = Steps(scores, np.array(canaries.sampled), included, step, summary["sensitivity_slack"])
        told, found = seen.membership_scores(), checks(seen, share)
        more = [
            family_bound(
                seen,
                delta=delta,
                accounted=summary["epsilon"],
                beta=share,
                accountant=run.accountant,
                relation=relation,
            )
        ]
    else:
        told = canaries.score(result.model)
    return AuditReport(
        title=f"DP-SGD on {run.dataset}",
        epsilon=summary["epsilon"],
        epsilon_lower=summary["epsilon_lower"],
        delta=delta,
        confidence=config.confidence,
        bounds=[*one_run_bounds(told, included, accountant.epsilon, delta, share), *more],
        checks=found,
        about={
            "method": "dpsgd",
            "canaries": canaries.count,
            "canary": canaries.kind,
            "included": int(included.sum()),
            "records": len(canaries.train_set) - canaries.count,
            "steps": summary["steps"],
            "noise_multiplier": summary["noise_multiplier"],
            "sampling_probability": summary["sampling_probability"],
            "neighboring_relation": relation,
            "accountant": run.accountant,
            "test_accuracy": summary["test_accuracy"],
            "train_seconds": summary["train_seconds"],
            "noise_is_secret": summary["noise_is_secret"],
            "config": asdict(run),
            "versions": summary["versions"],
        },
    )


def one_run_bounds(
    scores: npt.NDArray[np.float64],
    included: npt.NDArray[np.bool_],
    accounted: Callable[[float], float],
    delta: float,
    beta: float,
) -> list[Bound]:
    """The one-run bounds, without and with an assumption, each wrong with a probability of at most `beta`.

    (ε, δ)-DP lets all be told with a probability of δ for each canary, so at a confidence above 1 − m·δ
    nothing follows from one run. The bound without assumption is therefore one on ε at a smaller δ where need
    be.

    Args:
        scores: One for each canary, higher for "rather in", shape [m].
        included: Which are in, bool [m].
        accounted: From δ to the accounted ε.
        delta: The run's δ.
        beta: β.
    """
    tried = guess_counts(len(scores))
    right = {guesses: right_guesses(scores, included, guesses) for guesses in tried}
    share = beta / len(tried)

    def best(method: str, assumes: str | None, bound: Callable[..., float], at: float) -> Bound:
        found = {r: bound(len(scores), r, v, at, share) for r, v in right.items()}
        guesses = max(found, key=lambda r: found[r])
        numbers = {"canaries": len(scores), "guesses": guesses, "right": right[guesses], "tried": tried}
        return Bound(method, found[guesses], at, accounted(at), 1 - beta, assumes, numbers)

    small = min(delta, share / len(scores))
    return [
        best("one run (Steinke et al. 2023)", None, one_run_epsilon, small),
        best("one run, f-DP (Mahloujifar et al. 2024)", "Gaussian DP", gaussian_one_run_epsilon, delta),
    ]
