"""`dpml audit`: lower bounds on ε from the user's own configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpml.audit.config import AuditConfig, PATEAuditConfig
from dpml.config import DPSGDRun
from dpml.options import options_from, typed
from dpml.pate.config import AGGREGATORS
from dpml.recipe_option import RECIPE, configuration

if TYPE_CHECKING:
    from dpml.audit.report import AuditReport

_OUTPUT = click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="A new folder for audit.json, audit.md and audit.png.",
)


@click.group()
def audit() -> None:
    """Bound ε from below: run the real code with planted canaries, and attack what it releases."""


@audit.command("dpsgd")
@RECIPE
@options_from(DPSGDRun)
@options_from(AuditConfig)
@_OUTPUT
def audit_dpsgd(output: Path, recipe: str | None, **values: Any) -> int:
    """Train with DP-SGD and planted canaries. The options are those of `dpml train dpsgd`, and how to audit.

    Exit status 1 if the accounted ε is contradicted.
    """
    from dpml.audit.dpsgd import audit_dpsgd
    from dpml.tracking import ProgressLine

    given = typed(values)
    how = AuditConfig(**{name: given.pop(name) for name in AuditConfig.__annotations__ if name in given})
    run = DPSGDRun(**configuration("dpsgd", recipe, given))
    progress = ProgressLine(f"audit of {Path(run.dataset).name}")
    try:
        report = audit_dpsgd(run, how, output=output, trackers=[progress])
    finally:
        progress.finish()
    return _shown(report, output)


@audit.command("pate")
@click.option("--aggregator", type=click.Choice(AGGREGATORS), default="gnmax", help="How answers are made.")
@click.option(
    "--noise-multiplier",
    type=float,
    required=True,
    help="Noise on each count, in votes: standard deviation, for lnmax the scale of Laplace noise.",
)
@click.option("--threshold", type=float, help="Votes from which a check lets a query pass.")
@click.option("--threshold-noise", type=float, help="Standard deviation of the check's noise, in votes.")
@options_from(PATEAuditConfig)
@_OUTPUT
def audit_pate(
    aggregator: str,
    noise_multiplier: float,
    threshold: float | None,
    threshold_noise: float | None,
    output: Path,
    **values: Any,
) -> int:
    """Draw many answers of PATE's aggregation to neighbouring votes, against the accounted ε of a query.

    Exit status 1 if the accounted ε is contradicted.
    """
    from dpml.audit.pate import audit_pate
    from dpml.pate.aggregation import aggregator as make

    made = make(
        aggregator,  # type: ignore[arg-type] # click has checked the choice
        noise_multiplier=noise_multiplier,
        queries=1,
        threshold=threshold,
        threshold_noise=threshold_noise,
    )
    return _shown(audit_pate(made, PATEAuditConfig(**typed(values)), output=output), output)


def _shown(report: AuditReport, output: Path) -> int:
    """Print the report in short; 1 if it contradicts."""
    from dpml.table import print_table

    accounted = f"{report.epsilon:.4f} at δ = {report.delta:g}"
    rows = {"accounted ε": f"{accounted} (upper bound), {report.epsilon_lower:.4f} (lower)"}
    for bound in report.bounds:
        at = (
            ""
            if bound.delta == report.delta
            else f" at δ = {bound.delta:.2g} (accounted {bound.accounted:.4f})"
        )
        assumed = f", assuming {bound.assumes}" if bound.assumes else ", assuming nothing"
        rows[bound.method] = f"ε ≥ {bound.epsilon:.4f}{at}{assumed}"
    if report.checks:
        held = sum(check.holds for check in report.checks)
        rows["checks"] = f"{held} of {len(report.checks)} hold"
    rows["verdict"] = f"{report.verdict} at confidence {report.confidence:g}"
    rows["output"] = str(output)
    print_table(rows)
    for words in report.contradictions:
        click.echo(f"dpml: contradicted: {words}", err=True)
    return int(bool(report.contradictions))
