"""What a tuning run accounts for is what ran, it leaves the winner alone, and planted faults are caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tuning_checks import Observation, PrivacyViolation, check, observe

from accounting import BestOfRuns, OneOf
from dpml.config import DPSGDRun
from dpml.tracking import TensorBoard
from recipes.tuning import plan, scores, state, trials

Patch = pytest.MonkeyPatch
Fault = Callable[[Patch], None]
SETTINGS: dict[str, Any] = {
    "candidates": {"learning_rate": [0.1, 1.0], "clip_norm": [0.5, 1.0]},
    "delta": 1e-3,
    "noise_multiplier": 3.0,
    "mean_trials": 4.0,
}


def run_of(data: Path, **changed: Any) -> DPSGDRun:
    # This seed makes 24 trials of a mean of 12, and fixes their noise, so that all these tests see the same.
    settings = {"delta": 1e-3, "noise_multiplier": 3.0, "model": "linear", "epochs": 0.5, "batch_size": 15}
    return DPSGDRun(**{"dataset": str(data), "insecure_noise_seed": 23, **settings, **changed})


def tuned(data: Path, folder: Path, **settings: Any) -> Observation:
    return observe(run_of(data), folder, **{**SETTINGS, **settings})


def test_what_runs_is_what_is_accounted(own_data: Path, tmp_path: Path) -> None:
    seen = tuned(own_data, tmp_path / "a", mean_trials=12.0)
    assert len(seen.picks) >= 10
    check(seen, private_score=True)


# ---------------------------------------------------------------- planted faults


def _selection_not_charged(patch: Patch) -> None:
    patch.setattr(plan.TuningPlan, "event", property(lambda self: self.trial))


def _fewer_trials_charged(patch: Patch) -> None:
    patch.setattr(plan.TuningPlan, "event", property(lambda self: BestOfRuns(self.trial, 1.5, self.shape)))


def _score_without_noise(patch: Patch) -> None:
    patch.setattr(scores.Split, "score", lambda self, model, *_: scores.accuracy(model, self.validation))


def _score_with_less_noise(patch: Patch) -> None:
    score = scores.Split.score
    patch.setattr(
        scores.Split, "score", lambda self, model, noise, random: score(self, model, noise / 4, random)
    )


def _score_in_no_event(patch: Patch) -> None:
    patch.setattr(plan.TuningPlan, "trial", property(lambda self: OneOf(dict.fromkeys(self.trainings))))


def _fixed_number(patch: Patch) -> None:
    patch.setattr(
        state, "draw_trials", lambda plan, random: [int(w % 4) for w in random.words(int(plan.mean_trials))]
    )


def _one_trial_more(patch: Patch) -> None:
    draw = state.draw_trials
    patch.setattr(state, "draw_trials", lambda plan, random: [*draw(plan, random), *([0] * 6)])


def _first_candidate_preferred(patch: Patch) -> None:
    draw = state.draw_trials
    patch.setattr(state, "draw_trials", lambda *args: [pick if pick < 3 else 0 for pick in draw(*args)])


def _last_trial_dropped(patch: Patch) -> None:
    opened = state.TuningState._write

    def write(self: Any) -> None:
        if self.done == len(self.picks) - 1:
            self.done += 1
        opened(self)

    patch.setattr(state.TuningState, "_write", write)


def _state_left_behind(patch: Patch) -> None:
    patch.setattr(state.TuningState, "delete", lambda _: None)


def _curves_of_every_trial(patch: Patch) -> None:
    run, write = trials._run_trial, trials._write_curves
    losers: list[Any] = []

    def run_trial(plan: Any, split: Any, state: Any, base: Any) -> None:
        run(plan, split, state, base)
        losers.append(state.best)

    def write_curves(path: Path, winner: Any, summary: Any) -> None:
        write(path, winner, summary)
        write_loser = TensorBoard(path / "other")
        write_loser.start(1, {})
        write_loser.scalars(1, dict(losers[0].progress[-1][1]))
        write_loser.finish()

    patch.setattr(trials, "_run_trial", run_trial)
    patch.setattr(trials, "_write_curves", write_curves)


def _worst_released(patch: Patch) -> None:
    above = state._above
    patch.setattr(state, "_above", lambda score, other: not above(score, other))


FAULTS: list[tuple[Fault, str]] = [
    (_selection_not_charged, "the selection is not charged"),
    (_fewer_trials_charged, "the number of trials has another distribution"),
    (_score_without_noise, "the score's noise is not the accounted one"),
    (_score_with_less_noise, "the score's noise is not the accounted one"),
    (_score_in_no_event, "the score of private records is in no event"),
    (_fixed_number, "the number of trials has another distribution"),
    (_one_trial_more, "the number of trials has another distribution"),
    (_first_candidate_preferred, "the candidates are not drawn uniformly"),
    (_last_trial_dropped, "the number of trials is not the one that was drawn"),
    (_state_left_behind, "something else is left in the folder"),
    (_curves_of_every_trial, "something else is left in the folder"),
    (_worst_released, "what was released is not the best trial"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_planted_fault_is_caught(
    fault: Fault, message: str, own_data: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    mean = 12.0 if "noise" in message else 4.0  # enough to tell one scale from another
    seen = tuned(own_data, tmp_path / "a", mean_trials=mean)
    with pytest.raises(PrivacyViolation, match=message):
        check(seen, private_score=True)


def test_a_trial_that_is_not_accounted_releases_nothing(
    own_data: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    run = trials.run_dpsgd
    monkeypatch.setattr(
        trials,
        "run_dpsgd",
        lambda configuration, **more: run(
            DPSGDRun(**{**vars(configuration), "noise_multiplier": 2.0}), **more
        ),
    )
    with pytest.raises(RuntimeError, match=r"A trial ran .* is accounted"):
        tuned(own_data, tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {state.FOLDER, "privacy_events.json"}
