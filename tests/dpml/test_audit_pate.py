"""Audits of PATE's aggregation: honest ones are consistent, faulty ones are flagged."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from accounting import LNMax, UserError
from dpml.audit.config import PATEAuditConfig
from dpml.audit.pate import _laplace_tail, _normal_tail, audit_pate
from dpml.pate.aggregation import Aggregator, aggregator
from dpml.randomness import Randomness

SMALL = PATEAuditConfig(draws=40_000)
_choose, _check = Aggregator.choose, Aggregator.check


def make(name, noise=20.0, **settings):
    if name in ("confident-gnmax", "interactive-gnmax"):
        settings = {"threshold": 200, "threshold_noise": 75.0} | settings
    return aggregator(name, noise_multiplier=noise, queries=100, **settings)


def audited(made, config=SMALL, seed=1, **more):
    return audit_pate(made, config, randomness=Randomness.from_seed(seed, "audit"), **more)


@pytest.mark.parametrize(
    ("made", "config"),
    [
        (make("gnmax"), SMALL),
        (make("gnmax", 2.0), SMALL),
        (make("gnmax", 1.0), PATEAuditConfig(draws=40_000, teachers=3, classes=2, delta=1e-3)),
        (make("lnmax"), SMALL),
        (make("lnmax", 1.0), SMALL),
        (make("confident-gnmax"), SMALL),
        (make("interactive-gnmax", threshold=125.5), SMALL),
        (make("confident-gnmax", threshold=-3.0), SMALL),
        (make("confident-gnmax", 1e5, threshold_noise=1e6), SMALL),
    ],
)
def test_honest_aggregators_are_consistent(made, config):
    report = audited(made, config)
    assert report.contradictions == []
    free, family = report.bounds
    assert 0 <= free.epsilon < free.accounted
    # The scale of the noise is found to a few per cent, and ε with it.
    assert 0.85 * family.accounted < family.epsilon < family.accounted
    assert len(report.checks) == 1 + (made.check_event is not None)


def test_the_outcome_bound_comes_near_where_noise_is_small():
    # With two classes the answer is a threshold on what separates neighbours best, so rare answers tell it.
    report = audited(make("lnmax", 1.0), PATEAuditConfig(delta=1e-9))
    assert report.bounds[0].epsilon > 0.7 * report.epsilon
    assert report.epsilon == pytest.approx(2.0)


def test_tails_of_the_noise():
    rng = np.random.default_rng(1)
    for tail, noise in ((_normal_tail, rng.normal), (_laplace_tail, rng.laplace)):
        difference = noise(size=400_000) - noise(size=400_000)
        for lead in (0.5, 1.4, 3.0):
            times, expected = int((difference > lead).sum()), tail(lead)
            assert stats.binomtest(times, 400_000, expected).pvalue > 1e-6


# ---------------------------------------------------------------- planted faults


def _check_without_noise(patch):
    check = lambda self, counts, *_: counts.max(axis=1) >= self.threshold  # noqa: E731
    patch.setattr(Aggregator, "check", check)


def _answer_without_noise(patch):
    patch.setattr(Aggregator, "choose", lambda _, counts, *__: counts.argmax(axis=1))


def _answer_with_less_noise(factor):
    # Counts far apart and little noise are as good as counts that are scaled up.
    return lambda patch: patch.setattr(
        Aggregator, "choose", lambda self, counts, randomness: _choose(self, counts / factor, randomness)
    )


def _check_with_less_noise(patch):
    def check(self, counts, randomness):
        return _check(self, self.threshold + (counts - self.threshold) / 0.7, randomness)

    patch.setattr(Aggregator, "check", check)


OUTCOMES, ANSWER, CHECK = "outcomes of one query", "noise of the answer", "noise of the check"


@pytest.mark.parametrize(
    ("made", "fault", "flagged"),
    [
        (make("confident-gnmax"), _check_without_noise, (OUTCOMES, CHECK)),
        (make("interactive-gnmax", threshold=130), _check_without_noise, (OUTCOMES, CHECK)),
        (make("confident-gnmax"), _check_with_less_noise, (CHECK,)),
        (make("gnmax"), _answer_without_noise, (OUTCOMES, ANSWER)),
        (make("lnmax"), _answer_without_noise, (OUTCOMES, ANSWER)),
        (make("gnmax"), _answer_with_less_noise(0.9), (ANSWER,)),
        (make("gnmax"), _answer_with_less_noise(1 / math.sqrt(2)), (ANSWER, "by scale of the noise")),
        (make("gnmax", 2.0), _answer_with_less_noise(0.3), (OUTCOMES, ANSWER, "by scale of the noise")),
        (make("lnmax"), _answer_with_less_noise(0.9), (ANSWER,)),
    ],
)
def test_planted_faults_are_flagged(made, fault, flagged, monkeypatch):
    fault(monkeypatch)
    report = audited(made)
    assert report.verdict == "CONTRADICTED"
    for words in flagged:
        assert any(words in found for found in report.contradictions), (words, report.contradictions)


def test_an_answer_that_is_charged_too_little_is_flagged_by_its_outcomes(monkeypatch):
    honest = LNMax.atoms
    monkeypatch.setattr(LNMax, "atoms", lambda self, relation: honest(LNMax(2 * self.scale), relation))
    report = audited(make("lnmax", 1.0))
    assert report.bounds[0].contradicts
    assert all(check.holds for check in report.checks)


# ---------------------------------------------------------------- report, mistakes


def test_a_report_is_written_whole(tmp_path):
    report = audited(make("confident-gnmax"), output=tmp_path / "audit")
    found = json.loads((tmp_path / "audit" / "audit.json").read_text(encoding="utf-8"))
    assert found["verdict"] == report.verdict == "consistent"
    assert found["about"]["aggregator"]["threshold"] == 200
    assert (tmp_path / "audit" / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_secret_noise_is_the_default():
    assert audit_pate(make("gnmax"), PATEAuditConfig(draws=100)).about["noise_is_secret"] is True


def test_an_aggregator_without_noise_claims_nothing():
    with pytest.raises(UserError, match="claims no ε"):
        audit_pate(aggregator("gnmax", noise_multiplier=None, queries=1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("draws", 99),
        ("draws", 10**9),
        ("teachers", 1),
        ("teachers", 10**7),
        ("classes", 1),
        ("classes", 10**5),
        ("delta", 1.0),
        ("delta", "small"),
        ("confidence", 1.5),
    ],
)
def test_mistakes_in_how_to_audit(name, value):
    with pytest.raises(UserError, match=name if name != "draws" else "draw"):
        PATEAuditConfig(**{name: value})
