"""Audits of honest training runs, and of runs with a fault planted in the real code, which they must flag."""

import json
import math
from dataclasses import replace

import noises
import numpy as np
import pytest
import test_executed_mechanism as planted
import torch
from test_executed_mechanism import Patch

from accounting import Gaussian, PoissonSampled, PrivacyAccountant, Repeated, UserError
from dpml.audit.canaries import Canaries, CanaryModel
from dpml.audit.config import AuditConfig
from dpml.audit.dpsgd import audit_dpsgd
from dpml.audit.report import Bound
from dpml.audit.steps import Steps, checks, family_bound
from dpml.config import DPSGDRun
from dpml.data import load
from dpml.data.batches import Examples
from dpml.data.samplers import PoissonSampler
from dpml.dpsgd import run_dpsgd
from dpml.randomness import Randomness

RUN = DPSGDRun(
    dataset="digits",
    model="linear",
    noise_multiplier=1.5,
    delta=1e-5,
    epochs=3,
    batch_size=128,
    clip_norm=0.5,
    learning_rate=0.1,
    micro_batch_size=256,
    insecure_noise_seed=1,
)
SMALL = AuditConfig(canaries=200)


# ---------------------------------------------------------------- honest runs


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"insecure_noise_seed": None},
        {"clipping": "automatic", "clip_norm": 1e-3},
        {"clipping": "per-layer", "accountant": "rdp"},
        {"model": "mlp", "average": 0.9, "momentum": 0.0},
        {"sampling_probability": 0.05},
        {"batch_size": 1437, "epochs": 5},
    ],
    ids=lambda settings: " ".join(settings) or "as it is",
)
def test_honest_runs_are_consistent(settings):
    report = audit_dpsgd(replace(RUN, **settings), SMALL)
    assert report.contradictions == []
    assert report.verdict == "consistent"
    assert len(report.checks) == 8
    assert [bound.assumes is None for bound in report.bounds] == [True, False, False]
    for bound in report.bounds:
        assert 0 <= bound.epsilon < bound.accounted
    # The sharp bound is of use: it is a good part of the accounted ε. (Per-layer clipping leaves a canary,
    # which has one layer of two, 1/√2 of the clip norm.)
    assert report.bounds[2].epsilon > (0.05 if "clipping" in settings else 0.15) * report.epsilon


@pytest.mark.parametrize("kind", ["mislabelled", "noise"])
def test_honest_runs_with_input_space_canaries_are_consistent(kind):
    report = audit_dpsgd(replace(RUN, clip_quantile=0.5), AuditConfig(canaries=200, canary=kind))
    assert report.verdict == "consistent"
    assert (len(report.bounds), report.checks) == (2, [])


def test_input_space_canaries_are_told_apart_without_privacy_to_speak_of():
    run = replace(RUN, noise_multiplier=0.1, epochs=12, learning_rate=1.0, clip_norm=5.0)
    report = audit_dpsgd(run, AuditConfig(canaries=200, canary="noise", confidence=0.99))
    assert report.bounds[0].details["right"] > 0.7 * report.bounds[0].details["guesses"]
    assert report.bounds[0].epsilon > 0
    assert report.verdict == "consistent"


def test_the_audited_mechanism_is_that_of_the_run_without_canaries():
    report, result = audit_dpsgd(RUN, SMALL), run_dpsgd(RUN)
    for key in ("steps", "sampling_probability", "noise_multiplier", "neighboring_relation"):
        assert report.about[key] == result.summary[key]
    assert report.epsilon == result.epsilon
    assert report.about["records"] == 1437


# ---------------------------------------------------------------- planted faults


def _once_per_micro_batch(patch: Patch) -> None:
    """Noise of σ/√k for each micro-batch, where k is how many there are expected to be."""
    read = []

    def micro_batches(self, indices):
        found = list(planted._micro_batches(self, indices))
        read.append(len(found))
        return iter(found)

    def draw(self, shapes, norm):
        totals = [torch.zeros(*shape, dtype=torch.float64) for shape in shapes]
        for _ in range(read[-1]):
            totals = [
                t + n / math.sqrt(2) for t, n in zip(totals, planted._draw(self, shapes, norm), strict=True)
            ]
        return totals

    patch.setattr(Examples, "micro_batches", micro_batches)
    noises.plant(patch, draw)


def _one_canary_always(patch: Patch) -> None:
    coins = Randomness.from_seed(1, "canaries")
    number = Canaries(load("digits"), SMALL.canaries, "gradient", RUN.clip_norm, coins).places[:1]
    patch.setattr(PoissonSampler, "sample", lambda self: torch.cat([number, planted._sample(self)]).unique())


def _uniform_noise(patch: Patch) -> None:
    def draw(self, shapes, norm):
        scale = math.sqrt(3) * self.noise_multiplier * norm  # the right standard deviation
        return [
            scale * (2 * torch.from_numpy(self.randomness.uniforms(math.prod(s))).view(*s) - 1)
            for s in shapes
        ]

    noises.plant(patch, draw)


LITTLE = {"batch_size": 4, "micro_batch_size": 2, "epochs": 0.15}
FAULTS = [
    ("noise at half the scale", planted._scaled_noise(0.5), {}, "noise of the|noise has the accounted scale"),
    ("noise left out", planted._noise_left_out, {}, "noise has the accounted scale"),
    (
        "noise accounted a third too large",
        planted._event_with_more_noise,
        {},
        "noise has the accounted scale",
    ),
    ("noise drawn once", planted._noise_drawn_once, {}, "noise is fresh"),
    ("noise reused every other step", planted._noise_reused_every_other_step, {}, "noise is fresh"),
    ("noise of another law", _uniform_noise, {}, "noise is Gaussian"),
    ("noise once per micro-batch", _once_per_micro_batch, LITTLE, "noise has it in every step"),
    ("no clipping", planted._clipping_left_out, {}, "a canary adds at most the clip norm"),
    ("twice the clip norm", planted._clip_norm(2.0), {}, "a canary adds at most the clip norm"),
    ("one record in every batch", _one_canary_always, {}, "no canary is sampled more often"),
    ("sampled more often", planted._executed_rate(1.5), {}, "no canary is sampled more often"),
    ("shuffled", planted._shuffled_epochs, {}, "a canary's steps are independent"),
    ("the same sample again", planted._same_sample_again, {}, "a canary's steps are independent"),
]


@pytest.mark.parametrize(
    ("fault", "settings", "message"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS]
)
def test_a_planted_fault_is_flagged(fault, settings, message, monkeypatch):
    fault(monkeypatch)
    canaries = 400 if settings else SMALL.canaries
    report = audit_dpsgd(replace(RUN, **settings), replace(SMALL, canaries=canaries))
    assert report.verdict == "CONTRADICTED"
    assert any(message.split("|")[-1] in words for words in report.contradictions), report.contradictions


def test_the_settings_of_the_fault_in_micro_batches_are_consistent_without_it():
    assert audit_dpsgd(replace(RUN, **LITTLE), replace(SMALL, canaries=400)).verdict == "consistent"


def test_too_little_noise_puts_every_bound_above_the_accounted_epsilon(monkeypatch):
    planted._scaled_noise(0.05)(monkeypatch)
    report = audit_dpsgd(replace(RUN, noise_multiplier=4.0), SMALL)
    assert all(bound.contradicts for bound in report.bounds)


# ---------------------------------------------------------------- statistics of steps


def _made_up(rng, *, T=60, m=400, q=0.2, sigma=2.0, added=1.0, noise=None):
    """What an honest run would show; each part can be made another."""
    sampled, included = rng.random((T, m)) < q, rng.random(m) < 0.5
    scores = sigma * rng.normal(size=(T, m)) if noise is None else noise
    scores = (scores + added * (sampled & included)).astype(np.float32)
    return Steps(scores, sampled, included, PoissonSampled(Gaussian(sigma), q), 0.0)


def test_checks_are_false_alarms_at_most_as_often_as_stated():
    rng, runs, beta = np.random.default_rng(3), 150, 0.2
    alarms = [not all(check.holds for check in checks(_made_up(rng), beta)) for _ in range(runs)]
    assert sum(alarms) <= 52  # 30 would be allowed on average; beyond 52 has probability 1e-5


def test_the_family_bound_is_right_and_sharp():
    rng, settings = np.random.default_rng(4), {"delta": 1e-5, "accountant": "rdp", "relation": "zero-out"}
    account = PrivacyAccountant("rdp")
    account.record(Repeated(_made_up(rng).event, 60))
    lower, _ = account.epsilon_bounds(1e-5)
    for m, share in ((400, 0.5), (4000, 0.8)):
        bounds = [
            family_bound(_made_up(rng, m=m), accounted=1.0, beta=1e-4, **settings).epsilon for _ in range(5)
        ]
        assert share * lower < min(bounds) <= max(bounds) < lower


def test_membership_scores_are_likelihood_ratios():
    seen = _made_up(np.random.default_rng(5), T=5, m=7)
    density = lambda x, at: np.exp(-((x - at) ** 2) / 8)  # noqa: E731
    x = seen.scores.astype(np.float64)
    ratio = (0.8 * density(x, 0) + 0.2 * density(x, 1)) / density(x, 0)
    np.testing.assert_allclose(seen.membership_scores(), np.log(ratio).sum(axis=0), rtol=1e-5)


# ---------------------------------------------------------------- canaries, report, mistakes


def test_canaries_are_where_their_coins_say():
    data = load("digits")
    made = Canaries(data, 100, "gradient", 0.5, Randomness.from_seed(2, "canaries"))
    inputs, targets = made.train_set.tensors
    assert len(targets) == 1437 + 100
    marks = targets[made.places]
    expected = 10 + torch.arange(100) + 100 * torch.from_numpy(~made.included)
    assert torch.equal(marks, expected)
    assert (targets < 10).sum() == 1437
    assert 20 < made.included.sum() < 80
    model = CanaryModel(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), 100)
    losses = made.loss(model(inputs[made.places]), marks)
    gradient = torch.autograd.grad(losses.sum(), model.canary.weight)[0][:, 0]
    # Each canary that is in moves its own parameter, by far more than the clip norm; the others move none.
    assert torch.equal(gradient > 100 * 0.5, torch.from_numpy(made.included))
    assert torch.equal(gradient != 0, torch.from_numpy(made.included))
    assert torch.equal(model.eval()(inputs[:3]), model.model(inputs[:3]))


def test_mislabelled_canaries_have_a_wrong_label_and_those_that_are_out_no_loss():
    data = load("digits")
    made = Canaries(data, 200, "mislabelled", 0.5, Randomness.from_seed(3, "canaries"))
    targets = made.train_set.tensors[1]
    for row, label in zip(made.inputs, made.labels, strict=True):
        [place] = (data.x_test == row).flatten(1).all(dim=1).nonzero()[:1, 0]
        assert data.y_test[place] != label
    out = targets[made.places[torch.from_numpy(~made.included)]]
    assert (made.loss(torch.randn(len(out), 10), out) == 0).all()
    assert (made.loss(torch.randn(5, 10), targets[targets < 10][:5]) > 0).all()


def test_a_report_is_written_whole(tmp_path):
    report = audit_dpsgd(RUN, SMALL, output=tmp_path / "audit")
    found = json.loads((tmp_path / "audit" / "audit.json").read_text(encoding="utf-8"))
    assert found["verdict"] == "consistent"
    assert found["epsilon"] == report.epsilon
    assert [bound["epsilon"] for bound in found["bounds"]] == [b.epsilon for b in report.bounds]
    assert found["about"]["canaries"] == 200
    assert found["about"]["noise_is_secret"] is False
    words = (tmp_path / "audit" / "audit.md").read_text(encoding="utf-8")
    assert "is no proof of\nprivacy" in words
    assert (tmp_path / "audit" / "audit.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="not empty"):
        audit_dpsgd(RUN, SMALL, output=tmp_path / "audit")


def test_a_bound_without_end_can_be_written_and_drawn(tmp_path):
    report = audit_dpsgd(RUN, SMALL)
    endless = Bound("a method", math.inf, 1e-5, 1.0, 0.99, None)
    report = replace(report, bounds=[endless, replace(endless, epsilon=0.0, accounted=math.inf)])
    report.write(tmp_path / "endless")
    found = json.loads((tmp_path / "endless" / "audit.json").read_text(encoding="utf-8"))
    assert [(b["epsilon"], b["is_infinite"]) for b in found["bounds"]] == [(None, True), (0.0, False)]
    assert found["verdict"] == "CONTRADICTED"


@pytest.mark.parametrize(
    ("run", "config", "message"),
    [
        ({"noise_multiplier": None, "non_private": True}, {}, "claims no ε"),
        ({"clip_quantile": 0.5}, {}, "fixed clip norm"),
        ({}, {"canaries": 400, "canary": "mislabelled"}, "360 test inputs for 400"),
        ({"epochs": 1000}, {"canaries": 100_000}, "choose fewer canaries"),
        ({"dataset": "digitz"}, {}, "did you mean 'digits'"),
    ],
)
def test_what_cannot_be_audited_is_said_in_one_line(run, config, message):
    with pytest.raises(UserError, match=message):
        audit_dpsgd(replace(RUN, **run), replace(SMALL, **config))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("canaries", 31),
        ("canaries", 10**6),
        ("canaries", 50.5),
        ("canary", "bird"),
        ("confidence", 1.0),
        ("confidence", 0.1),
        ("confidence", math.nan),
        ("confidence", 1 - 1e-14),
    ],
)
def test_mistakes_in_how_to_audit(name, value):
    with pytest.raises(UserError, match=name):
        AuditConfig(**{name: value})


def test_a_run_that_diverged_is_not_audited(monkeypatch):
    planted._scaled_noise(math.inf)(monkeypatch)
    with pytest.raises(UserError, match="weights are not finite"):
        audit_dpsgd(RUN, SMALL)


def test_an_interrupted_run_is_not_audited(monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(PoissonSampler, "sample", interrupt)
    with pytest.raises(KeyboardInterrupt):
        audit_dpsgd(RUN, SMALL)
