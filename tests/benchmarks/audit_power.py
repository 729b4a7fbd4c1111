"""How often an audit notices less noise than accounted, and how its bounds lie in honest runs.

`nice python tests/benchmarks/audit_power.py [--save docs/results/audit-power.json]`. scikit-learn's digits,
softmax regression by DP-SGD with gradient-space canaries; the noise that is drawn is scaled by a factor,
which the accountant does not know of. A factor of 1 is an honest run: what is flagged there is a false alarm.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest

from dpml.audit.config import CANARY_KINDS, AuditConfig, CanaryKind
from dpml.audit.dpsgd import audit_dpsgd
from dpml.audit.report import AuditReport
from dpml.config import DPSGDRun
from dpml.noise import GaussianNoise

RUN = DPSGDRun(
    dataset="digits",
    model="linear",
    noise_multiplier=2.0,
    delta=1e-5,
    epochs=4,
    batch_size=512,
    clip_norm=0.5,
    learning_rate=0.3,
    micro_batch_size=512,
)
CONFIDENCE = 0.9999
FACTORS = (1.0, 0.9, 0.8, 0.7, 0.5)
_draw = GaussianNoise.draw


def audited(factor: float, canaries: int, kind: CanaryKind, seed: int) -> AuditReport:
    """One run with noise of `factor` times the accounted scale."""
    run = DPSGDRun(**{**vars(RUN), "insecure_noise_seed": seed})
    config = AuditConfig(canaries=canaries, canary=kind, confidence=CONFIDENCE)
    with pytest.MonkeyPatch.context() as patch:
        if factor != 1:
            patch.setattr(
                GaussianNoise,
                "draw",
                lambda self, shapes, norm: [noise * factor for noise in _draw(self, shapes, norm)],
            )
        return audit_dpsgd(run, config)


def row(factor: float, canaries: int, reports: list[AuditReport], seconds: float) -> dict[str, Any]:
    """What became of the runs with one factor and number of canaries."""

    def share(flagged: list[bool]) -> float:
        return sum(flagged) / len(flagged)

    bounds = {}
    for place, bound in enumerate(reports[0].bounds):
        found = [report.bounds[place].epsilon for report in reports]
        bounds[bound.method] = {
            "assumes": bound.assumes,
            "delta": bound.delta,
            "accounted": bound.accounted,
            "mean": statistics.fmean(found),
            "least": min(found),
            "largest": max(found),
            "above_accounted": share([report.bounds[place].contradicts for report in reports]),
        }
    checks = [check.name for check in reports[0].checks]
    return {
        "noise": factor,
        "canaries": canaries,
        "runs": len(reports),
        "flagged": share([bool(report.contradictions) for report in reports]),
        "a_check_fails": share([not all(c.holds for c in report.checks) for report in reports]),
        "check_fails": {
            name: share([not report.checks[place].holds for report in reports])
            for place, name in enumerate(checks)
        },
        "bounds": bounds,
        "seconds_per_run": round(seconds / len(reports), 2),
    }


@click.command()
@click.option("--save", type=click.Path(path_type=Path), help="Write the results as JSON.")
@click.option("--honest", default=50, help="Honest runs for each number of canaries.")
@click.option("--faulty", default=20, help="Runs for each factor below 1 and number of canaries.")
@click.option("--canaries", default="50,200,800", help="Numbers of canaries, with commas.")
@click.option("--kind", type=click.Choice(CANARY_KINDS), default="gradient", help="What is planted.")
def main(save: Path | None, honest: int, faulty: int, canaries: str, kind: CanaryKind) -> None:
    """Audit, and print a table."""
    rows = []
    click.echo("noise canaries  runs  flagged  scale check  ε above the accounted, by bound")
    for count in map(int, canaries.split(",")):
        for factor in FACTORS:
            begin = time.perf_counter()
            runs = honest if factor == 1 else faulty
            if not runs:
                continue
            reports = [audited(factor, count, kind, seed) for seed in range(runs)]
            rows.append(row(factor, count, reports, time.perf_counter() - begin))
            scale = rows[-1]["check_fails"].get("noise has the accounted scale", math.nan)
            above = "  ".join(f"{bound['above_accounted']:.2f}" for bound in rows[-1]["bounds"].values())
            click.echo(f"{factor:5} {count:8} {runs:5} {rows[-1]['flagged']:8.2f} {scale:12.2f}  {above}")
            if save is not None:
                save.write_text(json.dumps(_results(rows), indent=1, ensure_ascii=False) + "\n", "utf-8")


def _results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    run = {key: value for key, value in vars(RUN).items() if key != "insecure_noise_seed"}
    return {
        "command": "python tests/benchmarks/audit_power.py",
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "confidence": CONFIDENCE,
        "steps": math.floor(RUN.epochs * 1437 / RUN.batch_size),
        "run": run,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
