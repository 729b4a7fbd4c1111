"""Fuzz targets: audits, from Python and from the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from begun import stopped_at_training
from fuzzing import Draw, naming, target
from targets_command import call, mutated, own_file

import dpml
from dpml.audit import bounds
from dpml.audit.config import AuditConfig, PATEAuditConfig
from dpml.audit.dpsgd import audit_dpsgd
from dpml.audit.pate import audit_pate
from dpml.audit.report import AuditReport
from dpml.pate.aggregation import aggregator

_HOW: dict[str, Any] = {"canaries": 64, "canary": "gradient", "confidence": 0.999}
_HOW_PATE: dict[str, Any] = {"delta": 1e-5, "teachers": 50, "classes": 3, "draws": 200, "confidence": 0.999}
_MANY = 5000  # draws and classes that take longer than a case has


def _valid_report(report: AuditReport) -> None:
    """Assert that a report can be written, and that what it says follows from what it has."""
    assert "NaN" not in json.dumps(report.to_dict())
    assert 0 <= report.epsilon_lower <= report.epsilon
    for bound in report.bounds:
        assert bound.epsilon >= 0
        assert bound.contradicts == (bound.epsilon > bound.accounted)
    assert all(0 <= check.p_value <= 1 for check in report.checks)
    assert report.verdict in report.text()


@target("audit: configurations", 5)
def _configs(draw: Draw) -> None:
    kind, good = draw.choice([(AuditConfig, _HOW), (PATEAuditConfig, _HOW_PATE)])
    values, name = draw.one_wrong(good)
    with naming(name):
        config = kind(**values)
    assert 0.5 <= config.confidence < 1
    assert all(type(value) in (int, float, str) for value in vars(config).values())


@target("audit: bounds", 5)
def _bounds(draw: Draw) -> None:
    guesses = {"canaries": 100, "guesses": 50, "correct": 45}
    calls: list[tuple[Any, dict[str, Any]]] = [
        (bounds.one_run_epsilon, {**guesses, "delta": 1e-5, "beta": 0.01}),
        (bounds.gaussian_one_run_epsilon, {**guesses, "delta": 1e-5, "beta": 0.01}),
        (bounds.gaussian_one_run_mu, {**guesses, "beta": 0.01}),
        (
            bounds.clopper_pearson_epsilon,
            {
                **{"true_positives": 40, "positives": 50, "false_positives": 5, "negatives": 50},
                **{"delta": 1e-5, "beta": 0.01},
            },
        ),
    ]
    function, good = draw.choice(calls)
    values, _ = draw.one_wrong(good)
    found = function(**values)
    assert type(found) is float
    assert 0 <= found <= math.inf


@target("audit: audit_dpsgd", 2)
def _dpsgd(draw: Draw) -> None:
    """An audit of an odd run begins, or is refused."""
    run = {"dataset": own_file(), "noise_multiplier": 2.0, "delta": 1e-3, "batch_size": 8}
    name = draw.choice([*dpml.DPSGDRun.__dataclass_fields__])
    if name not in ("dataset", "device", "workers") and draw.random() < 0.5:
        run[name] = draw.junk()
    values = draw.one_wrong(_HOW)[0] if draw.random() < 0.3 else _HOW
    with stopped_at_training():
        audit_dpsgd(draw.maybe(dpml.DPSGDRun(**run), 0.1), draw.maybe(AuditConfig(**values), 0.1))


@target("audit: audit_pate", 1.5)
def _pate(draw: Draw) -> None:
    odd = {"noise_multiplier": draw.maybe(20.0, 0.3), "queries": 1}
    if draw.random() < 0.4:
        odd |= {"threshold": draw.maybe(30.0, 0.3), "threshold_noise": draw.maybe(15.0, 0.3)}
    kind = "confident-gnmax" if "threshold" in odd else draw.choice(["gnmax", "lnmax", "none"])
    values = draw.one_wrong(_HOW_PATE)[0] if draw.random() < 0.5 else _HOW_PATE
    config = PATEAuditConfig(**values)
    if config.draws > _MANY or config.classes > _MANY:
        return  # somebody may ask for it
    made = draw.maybe(aggregator(kind, **odd), 0.1)
    randomness = dpml.Randomness.from_seed(draw.randrange(10**6), "audit")
    _valid_report(audit_pate(made, draw.maybe(config, 0.1), randomness=draw.maybe(randomness, 0.1)))


@target("audit: a run, to its end", 0.2)
def _whole(draw: Draw) -> None:
    """An honest run is not contradicted, whatever it is like."""
    run = dpml.DPSGDRun(
        dataset=own_file(),
        noise_multiplier=draw.choice([0.3, 1.0, 5.0]),
        delta=draw.choice([1e-3, 1e-9, 0.3]),
        batch_size=draw.choice([1, 8, 40]),
        epochs=draw.choice([0.5, 1.0, 2.0]),
        insecure_noise_seed=draw.randrange(10**6),
        clip_norm=draw.choice([1e-3, 1.0, 100.0]),
        model=draw.choice(["linear", "mlp"]),
        clipping=draw.choice(["flat", "per-layer", "automatic"]),
    )
    kind = draw.choice(["gradient", "gradient", "mislabelled", "noise"])
    report = audit_dpsgd(run, AuditConfig(canaries=32, canary=kind, confidence=1 - 1e-9))
    _valid_report(report)
    assert report.verdict == "consistent", report.contradictions


@target("command: audit dpsgd", 1)
def _audit_dpsgd(draw: Draw) -> None:
    good: dict[str, str | None] = {"--dataset": own_file(), "--noise-multiplier": "2"}
    good |= {"--delta": "1e-3", "--batch-size": "8", "--canaries": "64", "--output": "audit"}
    call(mutated(draw, "audit dpsgd", good))


@target("command: audit pate", 0.5)
def _audit_pate(draw: Draw) -> None:
    good: dict[str, str | None] = {"--noise-multiplier": "20", "--draws": "200", "--teachers": "50"}
    words = mutated(draw, "audit pate", {**good, "--classes": "3", "--output": "audit"})
    if any(word.isascii() and word.isdecimal() and int(word[:9]) > _MANY for word in words):
        return  # somebody may ask for it
    try:
        status, _ = call(words)
    finally:
        written = Path("audit/audit.json")
        if written.exists():
            assert json.loads(written.read_text())["verdict"] in ("consistent", "CONTRADICTED")
    assert status in (0, 1)
