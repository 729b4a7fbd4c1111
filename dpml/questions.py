"""The commands that answer before anything is trained: `dpml account` and `dpml calibrate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from accounting import (
    Event,
    PrivacyAccountant,
    PrivacyBudget,
    Repeated,
    calibrate_batch_size,
    calibrate_noise_multiplier,
    calibrate_steps,
)
from accounting.events import check_count, check_number, check_relation
from accounting.tradeoff import calibrate_noise_for_risk, tradeoff_curve
from dpml.config import DPSGDConfig
from dpml.options import options_from, typed
from dpml.pate.config import PATEConfig
from dpml.pate.planning import ASSUMED_LEAD, noise_of, overturned, plan_run
from dpml.planning import ENGINE_SLACK, SamplingPlan
from dpml.table import print_table

_QUESTION = ("batch_size", "epochs", "sampling_probability", "neighboring_relation", "accountant")
_GROUP_HELP = "ε for groups of this many records, instead of one."


# ---------------------------------------------------------------- account


@click.group(invoke_without_command=True)
@click.option("--events", type=click.Path(path_type=Path), help="A run's privacy_events.json.")
@click.option("--delta", type=float, help="δ, in (0, 1).")
@click.option("--group-size", type=int, default=1, help=_GROUP_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def account(
    ctx: click.Context, events: Path | None, delta: float | None, group_size: int, as_json: bool
) -> None:
    """Compute ε, of a plan in numbers or of the events that a run recorded."""
    if ctx.invoked_subcommand is not None:
        if events is not None or delta is not None:
            raise click.UsageError(f"Put the options behind {ctx.invoked_subcommand!r}.")
        return
    if events is None or delta is None:
        raise click.UsageError("Give --events FILE and --delta, or use 'dpml account dpsgd'.")
    from dpml.outputs import read_events

    planned, committed, record = read_events(events)
    relation = check_relation(record.get("neighboring_relation"))
    method = record.get("accountant", "pld")
    answers = {"planned": planned, "committed": committed}
    report: dict[str, Any] = {"delta": delta, "neighboring_relation": relation, "accountant": method}
    if record.get("status") == "running":  # the run goes on, or was killed: only its plan is known
        del answers["committed"]
        report |= {"committed_epsilon": None, "committed_epsilon_lower": None}
    for name, parts in answers.items():
        accountant = PrivacyAccountant(method, neighboring_relation=relation)
        for event in parts:
            accountant.record(event)
        lower, upper = accountant.epsilon_bounds(delta, group_size=group_size)
        prefix = "" if name == "planned" else "committed_"
        report |= {f"{prefix}epsilon": upper, f"{prefix}epsilon_lower": lower}
    _print(report, as_json)


def _dpsgd_question(*, required: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that `account dpsgd` and `calibrate dpsgd` share."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        examples = click.option("--examples", type=int, help="Number of training records n.")
        plan = options_from(DPSGDConfig, only=_QUESTION, required=required)
        delta = click.option("--delta", type=float, required=True, help="δ, in (0, 1).")
        as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
        return examples(plan(delta(as_json(command))))

    return decorate


@account.command("dpsgd")
@_dpsgd_question(required=("batch_size", "epochs"))
@click.option("--noise-multiplier", type=float, required=True, help="Standard deviation over clip norm.")
@click.option("--group-size", type=int, default=1, help=_GROUP_HELP)
def account_dpsgd(
    noise_multiplier: float, delta: float, group_size: int, as_json: bool, **values: Any
) -> None:
    """The ε of DP-SGD with a given noise."""
    sampling, method = _sampling(values)
    noise_multiplier = check_number(noise_multiplier, "noise_multiplier", "a run", low=0, high=1e7)
    _print(_answer(sampling, noise_multiplier, delta, method, group_size), as_json)


# ---------------------------------------------------------------- calibrate


@click.group()
def calibrate() -> None:
    """Find the noise, the epochs or the batch size for a budget."""


@calibrate.command("dpsgd")
@_dpsgd_question()
@click.option("--noise-multiplier", type=float, help="Standard deviation over clip norm.")
@click.option("--epsilon", type=float, help="The budget ε.")
@click.option("--attack-tpr", type=float, help="Instead of ε: the largest true positive rate of an attack …")
@click.option("--attack-fpr", type=float, help="… at this false positive rate, such as 0.05 at 0.01.")
def calibrate_dpsgd(
    epsilon: float | None,
    attack_tpr: float | None,
    attack_fpr: float | None,
    delta: float,
    as_json: bool,
    **values: Any,
) -> None:
    """The least noise, or the most epochs, or the largest batch, with which DP-SGD stays within ε.

    What is looked for is the one that is left out of --noise-multiplier, --epochs and --batch-size.
    """
    wanted = [name for name in ("noise_multiplier", "epochs", "batch_size") if values[name] is None]
    if len(wanted) != 1:
        raise click.UsageError(
            "Leave out exactly one of --noise-multiplier, --epochs and --batch-size: the one to find."
        )
    by_risk = attack_tpr is not None or attack_fpr is not None
    if (epsilon is not None) == by_risk or (by_risk and wanted != ["noise_multiplier"]):
        raise click.UsageError(
            "Give either --epsilon, or to find noise --attack-tpr and --attack-fpr together."
        )
    if by_risk:
        sampling, method = _sampling(values)
        noise = calibrate_noise_for_risk(
            sampling.event,
            fpr=attack_fpr,
            tpr=attack_tpr,
            neighboring_relation=sampling.neighboring_relation,
        )
        target: dict[str, Any] = {"target_attack_tpr": attack_tpr, "attack_fpr": attack_fpr}
    else:
        assert epsilon is not None  # noqa: S101 - checked above
        noise, sampling, method = _within(PrivacyBudget(epsilon, delta), wanted[0], values)
        target = {"target_epsilon": epsilon}
    _print({**_answer(sampling, noise, delta, method), **target}, as_json)


def _within(budget: PrivacyBudget, wanted: str, values: dict[str, Any]) -> tuple[float, SamplingPlan, Any]:
    """Noise multiplier, plan and accountant that stay within `budget`; `wanted` is what to find."""
    noise = values.pop("noise_multiplier")
    method = values.get("accountant") or "pld"

    def plan(**found: Any) -> SamplingPlan:
        return _sampling({**values, **found})[0]

    sampling = plan() if wanted == "noise_multiplier" else plan(**{wanted: 1})
    options: dict[str, Any] = {
        "method": method,
        "neighboring_relation": sampling.neighboring_relation,
    }
    if wanted == "noise_multiplier":
        return calibrate_noise_multiplier(sampling.event, budget, **options), sampling, method
    noise = check_number(noise, "noise_multiplier", "a run", low=0, high=1e7)
    if wanted == "epochs":
        step = sampling.step_event(noise)

        def steps_of(count: int) -> Event:
            return Repeated(step, count)

        steps = calibrate_steps(steps_of, budget, **options)
        # Half a step more, so that rounding down does not lose one.
        return noise, plan(epochs=(steps + 0.5) * sampling.sampling_probability), method
    examples = values.get("examples")
    found = calibrate_batch_size(
        lambda size: plan(batch_size=size).event(noise), budget, most=examples or 10**9, **options
    )
    return noise, plan(batch_size=found), method


# ---------------------------------------------------------------- PATE

_PATE = (
    "delta",
    "teachers",
    "aggregator",
    "queries",
    "answers",
    "threshold",
    "threshold_noise",
    "accountant",
)


@account.command("pate")
@options_from(
    PATEConfig, only=(*_PATE, "noise_multiplier"), required=("delta", "queries", "noise_multiplier")
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def account_pate(as_json: bool, **values: Any) -> None:
    """The ε of PATE's answers with a given noise, whatever the votes are."""
    config = PATEConfig(**typed(values))
    assert config.queries is not None  # noqa: S101 - the option is required
    _print(_pate_answer(config, config.queries), as_json)


@calibrate.command("pate")
@options_from(PATEConfig, only=(*_PATE, "noise_multiplier", "epsilon"), required=("delta", "epsilon"))
@click.option(
    "--available", type=int, default=9000, help="How many public inputs there are; 9000 by default."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def calibrate_pate(available: int, as_json: bool, **values: Any) -> None:
    """Few precise answers or many noisy ones: the noise for --queries, the queries for --noise-multiplier.

    With neither, it is the most queries at whose noise answers are rarely overturned where the winner is
    ahead of the others by 60 % of the teachers. What that chance is comes with every answer.
    """
    config = PATEConfig(**typed(values))
    if config.queries is not None and config.noise_multiplier is not None:
        raise click.UsageError("Leave out --queries or --noise-multiplier: the one to find.")
    plan = plan_run(config, check_count(available, "available", "a question", low=1))
    _print({**_pate_answer(config, available), "target_epsilon": config.epsilon}, as_json)
    if config.queries is None and config.noise_multiplier is None and not as_json:
        click.echo("\nOther choices for this budget:")
        queries = plan.aggregator.queries
        rows = {}
        for count in sorted({max(1, queries // 4), max(1, queries // 2), 2 * queries, 4 * queries}):
            other = plan_run(replace(config, queries=count), max(available, count)).aggregator
            chance = _overturned(config, noise_of(other))
            rows[f"{count} queries"] = f"noise {noise_of(other):.4g}, overturned {chance:.2%}"
        print_table(rows)


def _pate_answer(config: PATEConfig, available: int) -> dict[str, Any]:
    plan = plan_run(config, available)
    accountant = PrivacyAccountant(config.accountant)
    accountant.record(plan.event)
    assert config.delta is not None  # noqa: S101 - the option is required
    lower, upper = accountant.epsilon_bounds(config.delta)
    by = plan.aggregator
    return {
        "epsilon": upper,
        "epsilon_lower": lower,
        "noise_multiplier": noise_of(by),
        "delta": config.delta,
        "queries": by.queries,
        "answers": by.answers,
        "threshold": by.threshold,
        "threshold_noise": None if by.check_event is None else by.check_event.sigma,
        "teachers": config.teachers,
        "aggregator": config.aggregator,
        "overturned_at_60_percent_lead": _overturned(config, noise_of(by)),
        "accountant": config.accountant,
    }


def _overturned(config: PATEConfig, noise: float) -> float:
    spread = noise * 2**0.5 if config.aggregator == "lnmax" else noise
    return overturned(ASSUMED_LEAD * config.teachers / spread)


# ---------------------------------------------------------------- answers


def _sampling(values: dict[str, Any]) -> tuple[SamplingPlan, Any]:
    given = typed(values)
    method = given.pop("accountant", "pld")
    return SamplingPlan.of(examples=given.pop("examples", None), **given), method


def _answer(
    sampling: SamplingPlan, noise: float, delta: float, method: Any, group_size: int = 1
) -> dict[str, Any]:
    """All that there is to say about a plan."""
    accountant = PrivacyAccountant(method, neighboring_relation=sampling.neighboring_relation)
    plan = sampling.event(noise)
    accountant.record(plan)
    lower, upper = accountant.epsilon_bounds(delta, group_size=group_size)
    risk: dict[str, Any] = {}
    if group_size == 1:
        rates = [0.01, 0.001]
        misses, _ = tradeoff_curve(plan, rates, neighboring_relation=sampling.neighboring_relation)
        risk = {
            f"attack_tpr_at_fpr_{rate}": 1 - float(miss) for rate, miss in zip(rates, misses, strict=True)
        }
    return {
        "epsilon": upper,
        "epsilon_lower": lower,
        "noise_multiplier": noise,
        "delta": delta,
        "group_size": group_size,
        **risk,
        "steps": sampling.steps,
        "sampling_probability": sampling.sampling_probability,
        "expected_batch_size": sampling.expected_batch_size,
        "neighboring_relation": sampling.neighboring_relation,
        "n_is_public": sampling.n_is_public,
        "accountant": method,
        "sensitivity_slack": ENGINE_SLACK,
    }


def _print(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        finite = {k: None if v == float("inf") else v for k, v in report.items()}
        click.echo(json.dumps(finite, indent=2, ensure_ascii=False))
        return
    print_table(
        {
            key.replace("_", " "): f"{value:.6g}" if isinstance(value, float) else str(value)
            for key, value in report.items()
        }
    )
