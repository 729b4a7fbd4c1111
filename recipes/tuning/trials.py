"""Run the trials of a tuning run, and publish the winner as the output of an ordinary run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.utils.data import TensorDataset

from accounting import BudgetExceeded, PrivacyAccountant, Reservation, UserError
from accounting.budget import Receipt
from accounting.statement import PrivacyFacts, Risk, SelectionFacts, statement
from dpml.config import DPSGDRun
from dpml.data import LabeledData, load
from dpml.dpsgd import model_name, run_dpsgd
from dpml.features import features_of
from dpml.ledger import closed, in_summary, reserved, warn_of_look_alikes
from dpml.outputs import events_record
from dpml.planning import accountant_for
from dpml.randomness import Randomness
from dpml.registry import recipe_entry, recipe_run
from dpml.report import TrainingResult
from dpml.tracking import Scalars, TensorBoard
from recipes.tuning.plan import GEOMETRIC, TuningPlan, candidates_of, make_plan
from recipes.tuning.scores import Split
from recipes.tuning.state import FOLDER, Best, TuningState


def tune(
    run: DPSGDRun | str,
    output: str | os.PathLike[str],
    *,
    candidates: Mapping[str, Sequence[Any]],
    epsilon: float | None = None,
    delta: float | None = None,
    noise_multiplier: float | None = None,
    mean_trials: float = 10.0,
    shape: float = GEOMETRIC,
    public_validation: str | os.PathLike[str] | None = None,
    exempt_public_benchmark: bool = False,
    started: Callable[[], None] | None = None,
) -> TrainingResult:
    """Train a secret, random number of trials of DP-SGD, release the best of them alone, and charge for that.

    Guarantee: what is in the output folder afterwards is (ε, δ)-differentially private with the ε of the
    summary, for one record that trains, and for one that decides unless those are public. The time that all
    trials take is not covered. A run that was killed goes on when it is called again in the same way.

    Args:
        run: All other settings: a configuration, or a recipe's name. Its own ε, δ or noise do not count.
        output: A new folder for what an ordinary run leaves, or that of a run to go on with.
        candidates: By setting, the values to try; a trial draws uniformly among all combinations.
        epsilon: The budget for everything. Or give `noise_multiplier`, and ε follows.
        delta: δ of the whole selection.
        noise_multiplier: That of each trial's training.
        mean_trials: E[K], above 1.
        shape: η of K's distribution: 1 is geometric, 0 logarithmic, ∞ Poisson; see `recipes.tuning.plan`.
        public_validation: An `.npz` file with `x` and `y`, public examples that decide. By default the last
            tenth of the training set does: exactly for a public benchmark, by a noisy count for other data.
        exempt_public_benchmark: Charge one trial only, and say so. For public benchmarks.
        started: Called when everything is checked and the trials begin, or go on.

    Raises:
        UserError: for a mistake in the configuration, the data or the output folder; nothing is spent then.
        UnreachableBudget: if no noise meets the budget.
        KeyboardInterrupt: after Ctrl-C. Nothing is released then.
    """
    wish = {"epsilon": epsilon, "noise_multiplier": noise_multiplier, "delta": delta}
    base = replace(complete(run, epsilon), **wish, non_private=False, accountant="pld")  # type: ignore[arg-type]
    if base.log_not_private:
        raise UserError(
            "Tuning logs no private figures: they would show other trials. Leave log_not_private out."
        )
    if base.ledger is not None and exempt_public_benchmark:
        raise UserError("A ledger charges all that is released: leave out ledger or exempt_public_benchmark.")
    if base.features != "none" and public_validation is not None:
        raise UserError(
            "A file of public examples that decide is for models of the examples themselves: leave out "
            "public_validation or features."
        )
    data = load(base.dataset, classes=base.classes, image_size=base.size)
    base = replace(base, model=model_name(base, data))
    # Features are computed once, for all trials; what is trained on is then a data set of features.
    configurations = candidates_of(replace(base, features="none", ledger=None), candidates)
    data = _seen(data, base)
    if exempt_public_benchmark and not data.is_public_benchmark:
        raise UserError(
            f"Only a public benchmark can be exempt from the price of selection, and {data.name!r} is none: "
            "leave it out."
        )
    split = Split.of(data, None if public_validation is None else Path(public_validation))
    plan = make_plan(
        configurations,
        examples=split.data.train_examples,
        private_score=not split.is_public,
        mean_trials=mean_trials,
        shape=shape,
        charged=not exempt_public_benchmark,
    )
    for candidate in plan.candidates:
        _rehearse(candidate, split.data)
    about = {"target_epsilon": epsilon, "data": repr(split.data), "score": split.words, "ledger": base.ledger}
    accountant = accountant_for(replace(base, accountant=plan.method), plan.relation, None)
    warn_of_look_alikes(accountant, TensorDataset(data.x_train))
    with (
        TuningState.opened(output, plan, about, _random(base, "trials")) as state,
        _reserved(accountant, plan, state) as reservation,
    ):
        reservation.commit_all()
        _write_events(state, plan, "running")
        if started is not None:
            started()
        while state.done < len(state.picks):
            _run_trial(plan, split, state, base)
        winner = state.best or _nothing_drawn(plan, split.data, state)
        return _publish(winner, plan, split, state, base, candidates, closed(reservation))


@contextmanager
def _reserved(accountant: PrivacyAccountant, plan: TuningPlan, state: TuningState) -> Iterator[Reservation]:
    """Reserve the selection, or go on with what a ledger has of it. A refused one leaves no state."""
    try:
        reservation = reserved(accountant, plan.event, state.ledger_run)
    except BudgetExceeded:
        if state.ledger_run is None:
            state.delete()
        raise
    with reservation:
        if reservation.receipt is not None:
            state.reserved(reservation.receipt.run_id)
        yield reservation


def complete(run: DPSGDRun | str, epsilon: float | None) -> DPSGDRun:
    """The configuration, from a recipe if it was named."""
    found: object = run
    if isinstance(run, str):
        found = recipe_run(recipe_entry(run), private=True, epsilon=epsilon)
    if not isinstance(found, DPSGDRun):
        raise UserError(f"Tuning is for DP-SGD: give a DPSGDRun or its recipe, not {run!r:.60}.")
    return found


def _seen(data: LabeledData, run: DPSGDRun) -> LabeledData:
    """The data as the model sees it: features in place of images, if the configuration says so."""
    if run.features == "none":
        return data
    x_train, x_test = features_of(run.features, data, cached=not run.no_cache)
    return replace(data, x_train=x_train.float(), x_test=x_test.float())


def _rehearse(candidate: DPSGDRun, data: LabeledData) -> TrainingResult:
    """One step on two made-up records: a candidate that cannot be trained is refused before any trial."""
    inputs = torch.rand((2, *data.example_shape), generator=torch.Generator().manual_seed(0))
    made_up = replace(data, x_train=inputs, y_train=torch.tensor([0, 1]))
    short = replace(
        candidate, epochs=1, batch_size=2, sampling_probability=None, neighboring_relation=None, no_cache=True
    )
    return run_dpsgd(short, data=made_up)


def _run_trial(plan: TuningPlan, split: Split, state: TuningState, base: DPSGDRun) -> None:
    """Train the candidate of the next trial with fresh noise, and score it."""
    number, pick = state.done, state.picks[state.done]
    candidate = replace(plan.candidates[pick], insecure_noise_seed=_seed_of_trial(base, number))
    progress = _Progress()
    result = run_dpsgd(candidate, data=split.data, trackers=[progress])
    if result.status == "stopped":
        raise KeyboardInterrupt
    if result.planned != plan.trainings[pick]:
        raise RuntimeError(f"A trial ran {result.planned}, but {plan.trainings[pick]} is accounted.")
    score = None
    if result.status == "completed":  # that is, finite; which the released weights show
        score = split.score(result.model, plan.score_noise, _random(base, f"score {number}"))
    state.finished(pick, result.model, score, result.summary, progress.figures)


def _nothing_drawn(plan: TuningPlan, data: LabeledData, state: TuningState) -> Best:
    """A Poisson number of trials may be 0: then a model that has seen none of the records is released."""
    result = _rehearse(plan.candidates[0], data)
    state.finished(0, result.model, None, result.summary, [])
    assert state.best is not None  # noqa: S101 - it is the first
    return state.best


def _publish(
    winner: Best,
    plan: TuningPlan,
    split: Split,
    state: TuningState,
    base: DPSGDRun,
    lists: Mapping[str, Sequence[Any]],
    receipt: Receipt | None,
) -> TrainingResult:
    """Write what an ordinary run leaves, and delete the rest. Killed on the way, it starts over."""
    folder = state.folder
    model = _rehearse(plan.candidates[winner.pick], split.data).model  # of the same form
    safetensors.torch.load_model(model, folder.path / FOLDER / winner.weights)
    summary = _summary(winner, plan, split, base, lists) | {"ledger": in_summary(receipt)}
    text = _statement(summary, plan, split, receipt)
    summary["weights_sha256"] = folder.write_model("model.safetensors", model)
    _write_curves(folder.path, winner, summary)
    folder.write_text("statement.md", text)
    _write_events(state, plan, summary["status"])
    folder.write_json("summary.json", summary)
    state.delete()
    return TrainingResult(model, summary["status"], summary, text, plan.event, plan.event)


def _summary(
    winner: Best, plan: TuningPlan, split: Split, base: DPSGDRun, lists: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """The winner's summary, with ε of the whole selection."""
    assert base.delta is not None  # noqa: S101 - private configurations have one
    accountant = PrivacyAccountant(plan.method, neighboring_relation=plan.relation)
    accountant.record(plan.event)
    lower, upper = accountant.epsilon_bounds(base.delta)
    alone = PrivacyAccountant(neighboring_relation=plan.relation)
    alone.record(plan.trainings[winner.pick])
    one = min(alone.epsilon(base.delta), upper)
    wish = {
        "epsilon": base.epsilon,
        "insecure_noise_seed": base.insecure_noise_seed,
        "accountant": plan.method,
        "features": base.features,
        "ledger": base.ledger,
    }
    if base.epsilon is not None:
        wish["noise_multiplier"] = None
    return {
        **winner.summary,
        "epsilon": upper,
        "epsilon_lower": lower,
        "epsilon_spent": upper,
        "target_epsilon": base.epsilon,
        "accountant": plan.method,
        "selection_epsilon": upper - one if plan.charged else 0.0,
        "config": {**winner.summary["config"], **wish},
        "selection": {
            "charged": plan.charged,
            "candidates": {name: list(values) for name, values in lists.items()},
            "chosen": {name: getattr(plan.candidates[winner.pick], name) for name in lists},
            "mean_trials": plan.mean_trials,
            "shape": plan.shape,
            "score": split.words,
            "score_noise": plan.score_noise,
            "validation_accuracy": winner.score,
            "epsilon_of_one": one,
            "words": _words(plan, split, lists, winner.score),
        },
    }


def _words(
    plan: TuningPlan, split: Split, lists: Mapping[str, Sequence[Any]], score: float | None
) -> dict[str, str]:
    """How the model was chosen, for the statement."""
    values = [f"{name.replace('_', ' ')} {', '.join(map(str, values))}" for name, values in lists.items()]
    law = {None: "Poisson", 1.0: "geometric", 0.0: "logarithmic"}.get(
        plan.shape, f"truncated negative binomial, η = {plan.shape}"
    )
    noise = (
        ""
        if plan.score_noise is None
        else f", with noise of standard deviation {plan.score_noise:.6g} on the count"
    )
    released = "" if score is None else f"; released: {score:.4f}"
    return {
        "candidates": f"{' × '.join(values)}: {len(plan.candidates)} candidates, drawn uniformly",
        "trials": f"a secret number, drawn at random ({law}, {plan.mean_trials:g} on average)",
        "score": f"{split.words}{noise}{released}",
    }


def _statement(summary: dict[str, Any], plan: TuningPlan, split: Split, receipt: Receipt | None) -> str:
    selection = summary["selection"]
    copied = (
        "dataset status epsilon epsilon_lower epsilon_spent delta accountant noise_multiplier clip_norm "
        "n_is_public sensitivity_slack sampling_probability expected_batch_size planned_steps steps "
        "noise_is_secret"
    )
    return statement(
        PrivacyFacts(
            method="DP-SGD",
            relation=plan.relation,
            risk=Risk.of(plan.event, summary["delta"], plan.relation) if plan.method == "pld" else None,
            test_set_is_public=split.data.is_public_benchmark,
            not_private_logs=False,
            clip_quantile=summary["config"]["clip_quantile"],
            mean_noise=summary["config"]["mean_noise"],
            ledger=receipt,
            selection=SelectionFacts(
                **{name: selection[name] for name in ("charged", "epsilon_of_one")}, **selection["words"]
            ),
            **{key: summary[key] for key in copied.split()},
        )
    )


def _write_events(state: TuningState, plan: TuningPlan, status: str) -> None:
    record = events_record(
        planned=plan.event,
        committed=plan.event,
        relation=plan.relation,
        accountant=plan.method,
        status=status,
    )
    state.folder.write_json("privacy_events.json", record)


def _write_curves(path: Path, winner: Best, summary: dict[str, Any]) -> None:
    """The winner's figures for TensorBoard; ε is that of the selection, and is known at the end only."""
    for leftover in path.glob("events.out.tfevents.*"):
        leftover.unlink()  # of this, if it was killed on the way
    board = TensorBoard(path)
    board.start(summary["planned_steps"], {**summary["config"], "dataset": summary["dataset"]})
    for step, figures in winner.progress:
        board.scalars(step, {tag: value for tag, value in figures.items() if "epsilon" not in tag})
    bounds = {"privacy/epsilon": summary["epsilon"], "privacy/epsilon_lower": summary["epsilon_lower"]}
    board.scalars(summary["planned_steps"], bounds)
    board.finish()


class _Progress:
    """A tracker that keeps a trial's figures to itself."""

    def __init__(self) -> None:
        self.figures: list[tuple[int, dict[str, float]]] = []

    def start(self, planned_steps: int, config: Mapping[str, object]) -> None:
        """Nothing is shown."""

    def phase(self, name: str, steps: int) -> None:
        """Nothing is shown."""

    def scalars(self, step: int, values: Scalars) -> None:
        """Keep public figures, in case this trial wins."""
        self.figures.append((step, dict(values)))

    def not_private(self, step: int, values: Scalars) -> None:
        """Nothing of it is kept."""

    def finish(self) -> None:
        """Nothing is shown."""


def _random(run: DPSGDRun, purpose: str) -> Randomness:
    if run.insecure_noise_seed is None:
        return Randomness.secret()
    return Randomness.from_seed(run.insecure_noise_seed, f"tuning, {purpose}")


def _seed_of_trial(run: DPSGDRun, number: int) -> int | None:
    """None, unless the noise is not to be secret: then each trial has a seed of its own."""
    if run.insecure_noise_seed is None:
        return None
    return int(_random(run, f"trial {number}").words(1)[0] % 10**15)
