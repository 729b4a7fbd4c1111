"""The adaptive clip norm: what is executed is one sampled event of gradients and count.

Noise of both, norms and counts are recomputed from what was read and handed to the optimizer. The faults
that the check must find are planted in the real code.
"""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import noises
import numpy as np
import privacy_checks
import pytest
import torch
from privacy_checks import NORMS, RECORDS, SIGNS, PrivacyViolation, check_noise, check_sampling, observe
from torch import nn
from torch.utils.data import TensorDataset

from accounting import Composed, Gaussian, PoissonSampled, PrivacyAccountant, Repeated, Reservation, UserError
from dpml import adaptive
from dpml.adaptive import AdaptiveClipping
from dpml.config import DPSGDConfig
from dpml.data.batches import Examples
from dpml.data.samplers import PoissonSampler
from dpml.dpsgd import train_dpsgd
from dpml.gradients import BookKeepingEngine, ClippedSum, Clipping, cross_entropy
from dpml.mechanism import SampledGaussianMechanism
from dpml.noise import GaussianNoise
from dpml.outputs import read_events
from dpml.planning import SamplingPlan, count_noise
from dpml.randomness import Randomness

B, START, QUANTILE = RECORDS // 4, 0.8, 0.6
STEPS = 480


def run(**settings):
    """An adaptive run, and the clip norm of each step as the engine was given it."""
    norms = []
    engine_sum = BookKeepingEngine.clipped_sum

    def recorded(self, model, loss, batches, clipping):
        if len(batches := list(batches)) == 0 or batches[0].inputs.shape[1:] == (RECORDS,):
            norms.append(clipping.norm)
        return engine_sum(self, model, loss, batches, clipping)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BookKeepingEngine, "clipped_sum", recorded)
        settings = {"epochs": STEPS // 4, "clip_norm": START, "clip_quantile": QUANTILE, **settings}
        seen = observe(**settings)
    return seen, np.array(norms[-len(seen.sums) :])


def check_adaptive(seen, norms, *, noise_multiplier=1.0):
    """Raise PrivacyViolation unless gradients and counts have the noise of the one event that is stated."""
    step, steps = seen.result.committed.event, seen.result.committed.count
    assert steps == len(norms)
    deviation = max(B / 20, 2.5 * noise_multiplier)
    slack = seen.result.summary["sensitivity_slack"]
    stated = PoissonSampled(
        Composed([Gaussian(noise_multiplier / (1 + slack)), Gaussian(2 * deviation)]), 1 / 4
    )
    privacy_checks._require(step == stated, "event: it is not gradients and count of one sample")
    privacy_checks._check_steps(seen, steps)
    privacy_checks._check_order(seen.log)
    took_part = seen.sums[:, :RECORDS] != 0
    check_sampling(took_part, 1 / 4)
    expected = took_part * SIGNS * np.minimum(NORMS, norms[:, None]) / math.sqrt(2)
    off = np.abs(seen.sums - np.hstack([expected, expected])).max(axis=1)
    privacy_checks._require((off <= 1e-6 * norms).all(), "clipping: it is not at the norm of the step")
    gradient_noise = (seen.updates * B - seen.sums) / (noise_multiplier * norms[:, None])
    # What each norm says of the noisy count before it.
    unclipped = QUANTILE - np.diff(np.log(norms)) / 0.2
    count = (took_part & (norms[:, None] >= NORMS)).sum(axis=1) - took_part.sum(axis=1) / 2
    scale = step.event.events[1].noise_multiplier / 2  # of a sum of ±1/2
    count_noises = ((unclipped - 0.5) * B - count[:-1]) / scale
    # The scale of the count's noise alone: 40 % off is rejected with a power above 0.999.
    privacy_checks._require_chi2(
        (count_noises**2).sum(), len(count_noises), 1, "count: its noise is not the accounted one"
    )
    size = took_part.sum(axis=1)
    for what in (np.ones(len(count)), count, size - B, count * (size - B)):
        along = (count_noises * what[:-1]).sum() / np.linalg.norm(what[:-1])
        privacy_checks._require_normal(along, 4, "count: its noise is not independent of the sample")
    check_noise(np.hstack([gradient_noise[:-1], count_noises[:, None]]))
    moves = np.diff(np.log(norms))
    spread = ((gradient_noise[:-1] ** 2).mean(axis=1) - 1) @ moves / np.linalg.norm(moves)
    privacy_checks._require_normal(
        spread * math.sqrt(RECORDS), 1, "noise: its scale is not that of the step's norm"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"insecure_noise_seed": 1},
        {},
        {"noise_multiplier": 0.15, "insecure_noise_seed": 2},
        {"micro_batch_size": 3, "insecure_noise_seed": 3},
        {"accountant": "rdp", "insecure_noise_seed": 4},
    ],
    ids=lambda settings: " ".join(settings) or "secret randomness",
)
def test_what_runs_is_what_is_accounted(settings):
    seen, norms = run(**settings)
    check_adaptive(seen, norms, noise_multiplier=settings.get("noise_multiplier", 1.0))


def test_the_noise_of_a_budget_pays_for_gradients_and_counts():
    seen, norms = run(epsilon=3.0, epochs=40, insecure_noise_seed=5)
    summary = seen.result.summary
    assert 0.99 * 3 <= summary["epsilon"] <= 3
    fixed = observe(epsilon=3.0, insecure_noise_seed=5).result.summary
    # The count's multiplier is five times the gradients', so one of 1/√(1 + 1/25) is left of them together.
    assert summary["noise_multiplier"] == pytest.approx(fixed["noise_multiplier"] * math.sqrt(1.04), rel=3e-3)
    noise = (seen.updates * B - seen.sums) / (summary["noise_multiplier"] * norms[:, None])
    check_noise(noise)


def test_results_do_not_depend_on_the_micro_batch_size():
    (a, norms), (b, other) = (run(micro_batch_size=m, epochs=20, insecure_noise_seed=6) for m in (1, 64))
    assert np.array_equal(norms, other)
    np.testing.assert_allclose(a.updates, b.updates, rtol=0, atol=1e-6 * norms.max())


def test_the_norm_goes_to_the_quantile_from_both_sides():
    for start in (1e-3, 1e3):
        _, norms = run(clip_norm=start, noise_multiplier=0.15, insecure_noise_seed=7)
        # 60 % of the records are below 2.4, and 50 % below or at 0.84.
        assert 0.84 < np.median(norms[300:]) < 2.4


# ---------------------------------------------------------------- planted faults

_noised, _count = adaptive.noised, AdaptiveClipping.count
_release, _commit = SampledGaussianMechanism.release, Reservation.commit


def _count_noise(factor):
    def plant(patch):
        def noised(values, scale, randomness):
            return values + factor * (_noised(values, scale, randomness) - values)

        patch.setattr(adaptive, "noised", noised)

    return plant


def _count_noise_drawn_once(patch):
    kept = []

    def noised(values, scale, randomness):
        kept.append(kept[0] if kept else _noised(values, scale, randomness) - values)
        return values + kept[0]

    patch.setattr(adaptive, "noised", noised)


def _count_of_zeros_and_ones(patch):
    """Each unclipped example adds 1, not 1/2: the count has twice the sensitivity."""

    def count(self, clipped):
        return _count(self, clipped) + clipped.diagnostics["examples"] / 2 - B / 2

    patch.setattr(AdaptiveClipping, "count", count)


def _divided_by_the_realised_batch(patch):
    def count(self, clipped):
        return _count(self, clipped) * B / max(1, clipped.diagnostics["examples"])

    patch.setattr(AdaptiveClipping, "count", count)


def _gradients_alone_are_charged(patch):
    event = SampledGaussianMechanism.event.fget
    alone = property(lambda self: replace(event(self), event=event(self).event.events[0]))
    patch.setattr(SampledGaussianMechanism, "event", alone)


def _two_samples_are_charged(patch):
    event = SampledGaussianMechanism.event.fget

    def apart(self):
        one = event(self)
        return Composed([PoissonSampled(part, one.sampling_probability) for part in one.event.events])

    patch.setattr(SampledGaussianMechanism, "event", property(apart))


def _more_count_noise_is_charged(patch):
    event = property(lambda self: Gaussian(3 * self.count_noise))
    patch.setattr(AdaptiveClipping, "event", event)


def _gradient_noise_at_the_first_norm(patch):
    noises.plant(patch, lambda self, shapes, _: noises.draw(self, shapes, START))


def _gradient_noise_at_the_next_norm(patch):
    def release(self, clipped, reservation):
        before, released = self.clipping.norm, _release(self, clipped, reservation)
        factor = self.clipping.norm / before
        return [g + factor * (r - g) for r, g in zip(released, clipped.gradients, strict=True)]

    patch.setattr(SampledGaussianMechanism, "release", release)


def _count_before_the_commit(patch):
    def release(self, clipped, reservation):
        noise = _noised(np.zeros(1), self.clipping.count_noise, self.noise.randomness)
        patch.setattr(adaptive, "noised", lambda values, *_: values + noise)
        return _release(self, clipped, reservation)

    patch.setattr(SampledGaussianMechanism, "release", release)


FAULTS = [
    ("count noise left out", _count_noise(0.0), "count: its noise is not the"),
    ("count noise 40 % too small", _count_noise(0.6), "count: its noise"),
    ("count noise 60 % too large", _count_noise(1.6), "count: its noise"),
    ("count noise drawn once", _count_noise_drawn_once, "count"),
    ("count of zeros and ones", _count_of_zeros_and_ones, "count: its noise"),
    ("divided by the realised batch", _divided_by_the_realised_batch, "count: its noise is not independent"),
    ("gradients alone are charged", _gradients_alone_are_charged, "event"),
    ("two samples are charged", _two_samples_are_charged, "event"),
    ("more count noise is charged", _more_count_noise_is_charged, "event"),
    ("gradient noise at the first norm", _gradient_noise_at_the_first_norm, "noise"),
    ("gradient noise at the next norm", _gradient_noise_at_the_next_norm, "noise"),
    ("count before the commit", _count_before_the_commit, "order: noise before"),
]


@pytest.mark.parametrize(("fault", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_planted_fault_is_caught(fault, message, monkeypatch):
    fault(monkeypatch)
    seen, norms = run(noise_multiplier=0.6, insecure_noise_seed=22)
    with pytest.raises(PrivacyViolation, match=f"^{message}"):
        check_adaptive(seen, norms, noise_multiplier=0.6)


# ---------------------------------------------------------------- one record, half a count


def _made(norm=1.0, quantile=0.5, batch_size=10, noise_multiplier=1.0, q=0.25, engine=None):
    deviation = count_noise(noise_multiplier, batch_size)
    return SampledGaussianMechanism(
        PoissonSampler(40, q, Randomness.from_seed(0, "sampling")),
        AdaptiveClipping(norm, quantile, batch_size, deviation),
        GaussianNoise(noise_multiplier, Randomness.from_seed(0, "noise")),
        engine or BookKeepingEngine(),
    )


def test_one_record_moves_the_count_by_a_half_and_nothing_else_does():
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)) * 3
    x[4], x[5, 0], x[6] = torch.nan, torch.inf, 0.0
    records = TensorDataset(x, torch.randint(0, 2, (12,)))
    mechanism, model = _made(norm=2.0), nn.Linear(3, 2)

    def count(numbers, size):
        batches = Examples(records, size).micro_batches(torch.tensor(numbers, dtype=torch.int64))
        return mechanism.clipping.count(mechanism.clipped_sum(model, cross_entropy, batches))

    everyone = list(range(12))
    whole = count(everyone, 5)
    assert whole == count(everyone, 1) == count(everyone, 64)
    assert count([], 5) == 0
    moved = [whole - count([j for j in everyone if j != i], 5) for i in everyone]
    assert set(moved) == {-0.5, 0.5}
    assert moved[4] == moved[5] == moved[6] == 0.5, "what is not finite was not clipped"


@pytest.mark.parametrize(
    "counts",
    [
        {},
        {"examples": 3},
        {"examples": 3, "clipped": 4},
        {"examples": 3, "clipped": -1},
        {"examples": math.nan, "clipped": 0},
        {"examples": 3, "clipped": 0.5},
    ],
    ids=str,
)
def test_an_engine_that_does_not_count_gives_no_release(counts):
    class Engine:
        slack = 0.0

        def clipped_sum(self, *_):
            return ClippedSum([torch.zeros(2, dtype=torch.float64)], 0.0, counts)

    mechanism = _made(engine=Engine())
    with PrivacyAccountant().reserve(mechanism.plan(1)) as reservation:
        clipped = mechanism.clipped_sum(nn.Linear(1, 1), cross_entropy, [])
        with pytest.raises(RuntimeError, match="no release"):
            mechanism.release(clipped, reservation)
        assert reservation.committed == 0
    assert mechanism.clipping.norm == 1.0


def test_a_sum_of_an_earlier_norm_is_not_released():
    mechanism, model = _made(), nn.Linear(1, 1)
    with PrivacyAccountant().reserve(mechanism.plan(5)) as reservation:
        first, second = (mechanism.clipped_sum(model, cross_entropy, []) for _ in range(2))
        mechanism.release(second, reservation)
        for old in (first, second):
            with pytest.raises(UserError, match="must be released before the next"):
                mechanism.release(old, reservation)
        assert reservation.committed == 1


def test_a_reservation_of_gradients_alone_is_foreign():
    mechanism = _made()
    for plan in (
        Repeated(PoissonSampled(mechanism.event.event.events[0], 0.25), 5),
        _made(batch_size=200).plan(5),  # which would have more noise on its count
    ):
        with PrivacyAccountant().reserve(plan) as reservation:
            clipped = mechanism.clipped_sum(nn.Linear(1, 1), cross_entropy, [])
            with pytest.raises(UserError, match=r"reserve mechanism\.plan"):
                mechanism.release(clipped, reservation)
            assert reservation.committed == 0


def test_the_norm_moves_as_in_the_paper_by_the_expected_batch_size(monkeypatch):
    clipping = AdaptiveClipping(2.0, 0.3, 10, 4.0)
    monkeypatch.setattr(adaptive, "noised", lambda values, scale, _: values + scale * 0.25)
    clipping.update(-1.5, Randomness.secret())
    share = 0.5 + (-1.5 + 4.0 * 0.25) / 10
    assert clipping.norm == pytest.approx(2.0 * math.exp(-0.2 * (share - 0.3)), rel=1e-12)


@pytest.mark.parametrize(("normal", "end"), [(1e9, 1e-12), (-1e9, 1e12)])
def test_the_norm_stays_a_number(normal, end, monkeypatch):
    clipping = AdaptiveClipping(1.0, 0.5, 10, 1.0)
    monkeypatch.setattr(adaptive, "noised", lambda values, scale, _: values + scale * normal)
    clipping.update(0.0, Randomness.secret())
    assert clipping.norm == pytest.approx(end)
    assert Clipping(clipping.norm)


@pytest.mark.parametrize(
    "change", [{"norm": 0.0}, {"quantile": 0.0}, {"quantile": 1.0}, {"batch_size": 0}, {"norm": math.nan}]
)
def test_mistakes_get_one_line(change):
    with pytest.raises(UserError, match="AdaptiveClipping") as raised:
        _made(**change)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- what is charged


@pytest.mark.parametrize(("noise", "batch_size"), [(1.0, 10), (1.0, 256), (1.0, 51), (40.0, 512), (0.01, 1)])
def test_plan_mechanism_and_the_paper_agree(noise, batch_size):
    sampling = SamplingPlan.of(examples=10 * batch_size, batch_size=batch_size, epochs=2)
    mechanism = _made(noise_multiplier=noise, batch_size=batch_size, q=0.1)
    plan = sampling.event(noise, BookKeepingEngine.slack, adaptive_clip=True)
    assert mechanism.plan(20) == plan
    deviation = max(batch_size / 20, 2.5 * noise)
    parts = Composed([Gaussian(noise / (1 + BookKeepingEngine.slack)), Gaussian(2 * deviation)])
    assert plan == Repeated(PoissonSampled(parts, 0.1), 20)
    # Andrew et al. 2021, Theorem 1: the two amount to one Gaussian on the same sample.
    together = ((noise / (1 + BookKeepingEngine.slack)) ** -2 + (2 * deviation) ** -2) ** -0.5
    assert together > 0.98 * noise
    one = PrivacyAccountant()
    one.record(Repeated(PoissonSampled(Gaussian(together), 0.1), 20))
    both = PrivacyAccountant()
    both.record(plan)
    assert both.epsilon(1e-5) == pytest.approx(one.epsilon(1e-5), rel=1e-6)


def test_a_run_from_the_command_charges_the_count(call, own_data, tmp_path):
    line = "train dpsgd --noise-multiplier 1 --delta 1e-3 --epochs 3 --batch-size 10 --dataset"
    costs = {}
    for name, more in (("fixed", []), ("adaptive", ["--clip-quantile", 0.5, "--clipping", "flat"])):
        folder = tmp_path / name
        assert call(line, own_data, "--output", folder, *more).status == 0
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        planned, committed, _ = read_events(folder / "privacy_events.json")
        accountant = PrivacyAccountant()
        accountant.record(committed[0])
        assert planned == committed
        assert summary["epsilon"] == accountant.epsilon(1e-3)
        assert (summary["noise_multiplier"], summary["clip_norm"]) == (1.0, 1.0)
        costs[name] = summary["epsilon"]
        statement = (folder / "statement.md").read_text("utf-8")
        assert ("follows the quantile 0.5" in statement) == (name == "adaptive")
        assert ("number of those below the clip norm" in statement) == (name == "adaptive")
    assert costs["adaptive"] > costs["fixed"] * 1.005


def test_the_norm_on_the_way_is_public():
    tracker = SimpleNamespace(seen=[], start=lambda *_: None, not_private=None, finish=lambda: None)
    tracker.scalars = lambda _, values: tracker.seen.append(values)
    records = TensorDataset(torch.randn(60, 4), torch.randint(0, 2, (60,)))
    settings = {"noise_multiplier": 1.0, "delta": 1e-3, "epochs": 2, "batch_size": 10, "clip_norm": 5.0}
    train_dpsgd(nn.Linear(4, 2), records, DPSGDConfig(**settings, clip_quantile=0.2), trackers=[tracker])
    norms = [values["privacy/clip_norm"] for values in tracker.seen if "privacy/clip_norm" in values]
    assert len(norms) == 12
    assert norms[-1] < 5.0


def test_only_flat_clipping_adapts():
    for mode in ("per-layer", "automatic"):
        with pytest.raises(UserError, match="needs flat clipping") as raised:
            DPSGDConfig(noise_multiplier=1.0, delta=1e-5, clip_quantile=0.5, clipping=mode)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("relation", ["zero-out", "add-or-remove-one"])
def test_the_statement_names_the_gap_where_there_is_one(relation):
    records = TensorDataset(torch.randn(60, 4), torch.randint(0, 2, (60,)))
    settings = {"noise_multiplier": 1.0, "delta": 1e-3, "epochs": 1, "batch_size": 10, "clip_quantile": 0.5}
    if relation == "add-or-remove-one":
        settings["sampling_probability"] = 1 / 6
    result = train_dpsgd(nn.Linear(4, 2), records, DPSGDConfig(**settings))
    assert ("across the clip norm" in result.statement) == (relation == "add-or-remove-one")
