"""What a tuning run really did, and whether that is what it accounted for and all that it left behind.

`observe` runs `recipes.tuning.tune` on small data and notes which trials ran, what decided between them, and
what lies in the folder afterwards. `check` compares that with the event in `privacy_events.json`.
`test_tuning_privacy.py` shows which faults it catches.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from accounting import BestOfRuns, Event, Gaussian, OneOf, Repeated
from accounting.statement import Risk
from dpml.config import DPSGDRun
from dpml.outputs import read_events
from dpml.randomness import Randomness
from dpml.report import TrainingResult
from recipes.tuning import scores, state, trials, tune

ALPHA = 1e-9
FILES = {"model.safetensors", "privacy_events.json", "statement.md", "summary.json"}


class PrivacyViolation(AssertionError):
    """What ran or was left is not what was accounted. The message begins with what differs."""


@dataclass
class Observation:
    """What happened.

    Attributes:
        folder: The output folder.
        trained: What each trial's training returned, rehearsals left out.
        exact: Accuracy of each trial's model on the records that decide, before noise.
        scores: What decided.
        picks: The candidates that were drawn.
        result: What `tune` returned.
    """

    folder: Path
    trained: list[TrainingResult] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    picks: list[int] = field(default_factory=list)
    plan: Any = None
    result: Any = None


def own_run(data: Path, **changed: Any) -> DPSGDRun:
    """A small run with known noise."""
    settings = {"delta": 1e-3, "noise_multiplier": 3.0, "model": "linear", "epochs": 0.5, "batch_size": 15}
    return DPSGDRun(**{"dataset": str(data), "insecure_noise_seed": 23, **settings, **changed})


class Killed(BaseException):
    """In place of a signal that cannot be caught."""


def killed_at_each_write(
    patch: pytest.MonkeyPatch, attempt: Callable[[], Any], killed: Callable[[], None] = lambda: None
) -> tuple[Any, int]:
    """Attempt again and again, each time stopped one file later, until it ends: its result, and how often.

    A little further each time, or it would never end. `killed` is called after each stop.
    """
    replaced, left = Path.replace, 1

    def killing(self: Path, target: Any) -> Path:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return replaced(self, target)

    patch.setattr(Path, "replace", killing)
    for attempts in itertools.count(1):
        left = attempts
        try:
            return attempt(), attempts
        except Killed:
            killed()
    raise AssertionError


def observe(run: Any, folder: Path, **settings: Any) -> Observation:
    """Tune, and note what happens."""
    seen = Observation(folder)
    with pytest.MonkeyPatch.context() as patch:
        watch(seen, patch)
        seen.result = tune(run, folder, **settings)
    return seen


def watch(seen: Observation, patch: pytest.MonkeyPatch) -> None:
    """Note what happens from here on, at the seams between trainer, score and state."""
    run_dpsgd, accuracy = trials.run_dpsgd, scores.accuracy
    finished, draw = state.TuningState.finished, state.draw_trials

    def noted_run(run: Any, **more: Any) -> TrainingResult:
        result = run_dpsgd(run, **more)
        if more["data"].train_examples > 2:
            seen.trained.append(result)
        return result

    def noted_accuracy(*arguments: Any) -> float:
        seen.exact.append(accuracy(*arguments))
        return seen.exact[-1]

    def noted_finish(self: Any, pick: int, model: Any, score: float | None, *more: Any) -> None:
        finished(self, pick, model, score, *more)
        seen.scores.append(score)

    def noted_draw(plan: Any, random: Any) -> list[int]:
        seen.plan, seen.picks = plan, draw(plan, random)
        return seen.picks

    patch.setattr(trials, "run_dpsgd", noted_run)
    # What a trial says of its own ε is shown to nobody, and most of the time.
    patch.setattr("dpml.report.epsilon_curve", lambda _, points, *__, **___: [(0.0, 0.0)] * len(points))
    patch.setattr("dpml.report.Risk.of", lambda *_: Risk(mu=1.0, tpr_at_fpr_1=1.0, tpr_at_fpr_01=1.0))
    patch.setattr(scores, "accuracy", noted_accuracy)
    patch.setattr(state.TuningState, "finished", noted_finish)
    patch.setattr(state, "draw_trials", noted_draw)


def require(holds: Any, what: str) -> None:
    """Raise PrivacyViolation unless it holds."""
    if not holds:
        raise PrivacyViolation(what)


def check(seen: Observation, *, private_score: bool) -> None:
    """Raise PrivacyViolation unless the run is what it accounted for and left nothing else."""
    [planned], [committed], record = read_events(seen.folder / "privacy_events.json")
    require(planned == committed == seen.result.planned, "the events are not those of the run")
    require(isinstance(planned, BestOfRuns), "the selection is not charged")
    assert isinstance(planned, BestOfRuns)
    members = set(planned.event.events) if isinstance(planned.event, OneOf) else {planned.event}
    _check_trials(seen, members)
    _check_scores(seen, members, private_score)
    _check_number(seen, planned)
    _check_price(seen, planned, members, record)
    check_folder(seen)


def _check_trials(seen: Observation, members: set[Event]) -> None:
    for trained in seen.trained:
        require(trained.planned in members, "a trial ran another mechanism than is accounted")
    require(len(seen.trained) == len(seen.picks), "the number of trials is not the one that was drawn")
    ranks = [-math.inf if score is None else score for score in seen.scores]
    require(len(ranks) == len(seen.picks), "the number of trials that were compared is not the one drawn")
    winner = seen.trained[ranks.index(max(ranks))]
    released = safetensors.torch.load_file(seen.folder / "model.safetensors")
    same = all(bool(Tensor.equal(released[k].cpu(), v.cpu())) for k, v in winner.model.state_dict().items())
    require(same, "what was released is not the best trial")


def _check_scores(seen: Observation, members: set[Event], private: bool) -> None:
    """Two-sided: noise of the accounted scale, given enough trials."""
    if not private:
        require(seen.scores == seen.exact, "the score is not the accuracy on public records")
        return
    noises = [event.noise_multiplier for event in members if isinstance(event, Gaussian)]
    require(len(noises) == 1, "the score of private records is in no event")
    held_out = 10
    z = (np.array(seen.scores, dtype=float) - np.array(seen.exact)) * held_out / noises[0]
    tail = stats.chi2(len(z)).cdf(float(np.sum(z**2)))
    require(ALPHA < tail < 1 - ALPHA, "the score's noise is not the accounted one")


def _check_number(seen: Observation, planned: BestOfRuns) -> None:
    """K has the accounted distribution and each candidate the same probability, by 400 more draws."""
    drawn = [state.draw_trials(seen.plan, Randomness.secret()) for _ in range(400)]
    counts = np.array([len(picks) for picks in drawn])
    deciles = sorted({int(np.quantile(counts, q)) for q in np.arange(0.1, 1, 0.1)})
    cells = np.digitize(counts, deciles, right=True)
    below = [sum(planned.distribution.probability_of(k) for k in range(edge + 1)) for edge in deciles]
    expected = np.diff([0.0, *below, 1.0]) * len(counts)
    found = np.bincount(cells, minlength=len(expected))
    keep = expected > 0
    chi2 = float(np.sum((found[keep] - expected[keep]) ** 2 / expected[keep]))
    # The cells are cut where the draws are, which makes few of them even: the bound has room for that.
    require(chi2 < stats.chi2(len(expected)).isf(ALPHA) + 20, "the number of trials has another distribution")
    picks = np.concatenate(drawn)
    even = np.bincount(picks, minlength=len(seen.plan.candidates))
    require(stats.chisquare(even).pvalue > ALPHA, "the candidates are not drawn uniformly")


def _check_price(seen: Observation, planned: BestOfRuns, members: set[Event], record: Any) -> None:
    """ε is at least, and nearly, dp-accounting's for the most expensive member."""
    summary = json.loads((seen.folder / "summary.json").read_text("utf-8"))
    assert planned.shape is not None
    theirs = max(
        oracle_epsilon(event, planned.mean_runs, planned.shape, summary["delta"]) for event in members
    )
    require(summary["epsilon"] >= theirs * 0.99, "ε is below the price of selection")
    require(summary["epsilon"] <= theirs * 1.2, "ε is far above the price of selection")
    require(record["accountant"] == summary["accountant"] == "rdp", "another accountant is named")


def oracle_epsilon(event: Event, mean_runs: float, shape: float, delta: float) -> float:
    """ε of the best of several runs of a training or of a noisy count, by dp-accounting."""
    if isinstance(event, Gaussian):
        base: Any = dp_event.GaussianDpEvent(event.noise_multiplier)
    else:
        assert isinstance(event, Repeated)
        step: Any = event.event
        sampled = dp_event.PoissonSampledDpEvent(
            step.sampling_probability, dp_event.GaussianDpEvent(step.event.noise_multiplier)
        )
        base = dp_event.SelfComposedDpEvent(sampled, event.count)
    accountant = RdpAccountant()
    accountant.compose(dp_event.RepeatAndSelectDpEvent(base, mean_runs, shape))
    return float(accountant.get_epsilon(delta))


def check_folder(seen: Observation) -> None:
    """The winner's files, and nothing of any other trial or of their number."""
    names = {path.name for path in seen.folder.rglob("*")}
    curves = [name for name in names if name.startswith("events.out.tfevents.")]
    require(names - set(curves) == FILES, "something else is left in the folder")
    require(len(curves) == 1, "there are the curves of several trials")
    board = EventAccumulator(str(seen.folder / curves[0])).Reload()
    summary = seen.result.summary
    [epsilon] = board.Scalars("privacy/epsilon")
    require(math.isclose(epsilon.value, summary["epsilon"], rel_tol=1e-6), "the curve shows another ε")
    if seen.trained:
        steps = [point.step for point in board.Scalars("test/accuracy")]
        require(steps == sorted(set(steps)), "there are the curves of several trials")
    shown = json.dumps(summary) + (seen.folder / "statement.md").read_text("utf-8")
    require("unreleased" not in shown and "picks" not in shown, "the secret state is published")
