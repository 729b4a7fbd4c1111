from dataclasses import replace
from typing import Any

import pytest

from accounting import Gaussian, PoissonSampled, Repeated
from accounting.statement import PrivacyFacts, Risk, statement
from accounting.tradeoff import tpr_at_fpr

PLAN = Repeated(PoissonSampled(Gaussian(1.1), 256 / 60_000), 14_062)

FACTS = PrivacyFacts(
    dataset="mnist",
    method="DP-SGD",
    status="completed",
    relation="zero-out",
    n_is_public=True,
    epsilon=2.38172,
    epsilon_lower=2.37429,
    epsilon_spent=2.38172,
    delta=1e-5,
    accountant="pld",
    noise_multiplier=1.1,
    clip_norm=1.0,
    sensitivity_slack=1e-5,
    sampling_probability=256 / 60_000,
    expected_batch_size=256,
    planned_steps=14_062,
    steps=14_062,
    noise_is_secret=True,
    risk=Risk(mu=0.58624, tpr_at_fpr_1=0.040211, tpr_at_fpr_01=0.0060518),
    test_set_is_public=True,
    not_private_logs=False,
)


def written(**changed: Any) -> str:
    return statement(replace(FACTS, **changed))


def test_what_a_reviewer_looks_for() -> None:
    text = written()
    for words in (
        "**(ε, δ)-differential privacy with ε = 2.3818 and δ = 1e-05**",
        "`mnist`",
        "zero-out",
        "the number of training records",
        "| steps planned, released | 14,062, 14,062 |",
        "| clip norm, noise multiplier | 1, 1.1 |",
        "(expected batch size 256)",
        "secret, keyed by the operating system",
        "`privacy_events.json`",
        "dpml account --events privacy_events.json --delta 1e-05",
        "e^ε ≈ 10.8 times",
        "TPR 4.03 % at FPR 1 %; TPR 0.61 % at FPR 0.1 %",
        "μ = 0.5863 ",
    ):
        assert words in text
    assert text.startswith("# Privacy statement\n\nThe model")
    assert "Not for release" not in text
    assert "stopped" not in text
    assert "not_private" not in text


@pytest.mark.parametrize("value", [1e-9, 0.00005, 0.12345, 0.99995, 2.38171703, 2.3817, 7.0, 123.456789, 1e7])
def test_bounds_are_rounded_to_the_safe_side(value: float) -> None:
    text = written(epsilon=value, epsilon_lower=value)
    upper = float(text.split("ε, upper bound (the guarantee) | ")[1].split(" |")[0])
    lower = float(text.split("ε, lower bound for the dominating pair | ")[1].split(" |")[0])
    assert 0 <= lower <= value <= upper
    assert upper - lower < 1.01e-4 * max(1, value)
    assert f"ε = {upper:.4f} and δ" in text


def test_a_stopped_run() -> None:
    text = written(status="stopped", steps=7_000, epsilon_spent=1.68001)
    assert "was stopped after 7,000 of 14,062 steps" in text
    assert "an odometer reading and no guarantee" in text
    assert "The reading: ε = 1.6801." in text
    assert "with ε = 2.3818 and" in text


def test_a_diverged_run() -> None:
    text = written(status="diverged", steps=7_000, epsilon_spent=1.68)
    assert "ended, because its weights were not finite any more, after 7,000 of 14,062 steps" in text
    assert "was stopped" not in text


def test_a_known_seed() -> None:
    text = written(noise_is_secret=False)
    assert "> **Not for release.** Noise and sampling came from a known seed" in text
    assert "SEEDED, not secret" in text


def test_a_protected_number_of_records() -> None:
    text = written(relation="add-or-remove-one", n_is_public=False)
    assert "(add-or-remove-one)" in text
    assert "**What is public**: the form of a record (shape, number of classes), and every" in text
    assert "The number of training records is not." in text


def test_private_logs_and_a_user_s_test_set() -> None:
    text = written(not_private_logs=True, test_set_is_public=False)
    assert "Do not publish them." in text
    assert "The test set you gave is taken to be public" in text


def test_rdp_and_replace_one_have_their_words() -> None:
    assert "Rényi differential privacy" in written(accountant="rdp")
    assert "(replace-one)" in written(relation="replace-one")


def test_a_large_epsilon_is_said_as_it_is() -> None:
    assert "e^ε ≈ ∞ times" in written(epsilon=1e6)


def test_the_risk_is_that_of_the_whole_plan() -> None:
    risk = Risk.of(PLAN, 1e-5, "zero-out")
    for fpr, tpr in ((0.01, risk.tpr_at_fpr_1), (0.001, risk.tpr_at_fpr_01)):
        lower, upper = tpr_at_fpr(PLAN, fpr)
        assert lower <= tpr
        assert tpr == pytest.approx(upper, rel=1e-3)
    assert risk.mu == pytest.approx(0.5862, abs=1e-3)
    assert Risk.of(Gaussian(1e-4), 1e-5, "zero-out").mu == float("inf")
