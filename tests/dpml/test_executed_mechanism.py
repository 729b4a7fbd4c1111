"""The accounted mechanism is the executed one; and each planted fault is found by the check that says so.

`privacy_checks` says what is recorded, what is recomputed, and with which power. Faults are planted in the
real code, one at a time. A fault that were not found would be a hole in the check; so every test of this
file can fail.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import noises
import numpy as np
import privacy_checks
import pytest
import torch
from privacy_checks import CLIP_NORM, RECORDS, PrivacyViolation, check, observe, taking_part

from accounting import Event, Repeated, Reservation
from accounting.budget import ReservationError
from dpml import dpsgd, mechanism
from dpml.data.batches import Examples
from dpml.data.samplers import PoissonSampler
from dpml.gradients import BookKeepingEngine
from dpml.gradients.engine import ClippedSum, Clipping, plain_sum, trainable_parameters
from dpml.mechanism import SampledGaussianMechanism
from dpml.randomness import Randomness

Patch = pytest.MonkeyPatch
Fault = Callable[[Patch], None]


# ---------------------------------------------------------------- honest runs


@pytest.mark.parametrize(
    "settings",
    [
        {"insecure_noise_seed": 1},
        {"insecure_noise_seed": 2},
        {},
        {"epsilon": 3.0, "insecure_noise_seed": 3},
        {"noise_multiplier": 0.3, "clip_norm": 20.0, "insecure_noise_seed": 4},
        {"sampling_probability": 0.2, "batch_size": 7, "epochs": 40, "insecure_noise_seed": 5},
        {"batch_size": RECORDS, "insecure_noise_seed": 6},
        {"micro_batch_size": 1, "epochs": 30, "insecure_noise_seed": 7},
        {"micro_batch_size": 64, "insecure_noise_seed": 8},
        {"accountant": "rdp", "insecure_noise_seed": 9},
    ],
    ids=lambda settings: " ".join(settings) or "secret randomness",
)
def test_what_runs_is_what_is_accounted(settings):
    check(observe(**settings))


def test_empty_batches_are_steps_of_pure_noise():
    seen = observe(batch_size=1, epochs=5, insecure_noise_seed=10)
    check(seen)
    empty = ~taking_part(seen).any(axis=1)
    # Binomial(200, (1 − 1/40)^40): 73 expected, below 20 with probability 1e-18.
    assert empty.sum() >= 20
    assert (np.abs(seen.updates[empty]).max(axis=1) > 0).all()


def test_results_do_not_depend_on_the_micro_batch_size():
    runs = [observe(micro_batch_size=m, epochs=10, insecure_noise_seed=11) for m in (1, 3, 64)]
    for other in runs[1:]:
        assert np.array_equal(taking_part(runs[0]), taking_part(other))
        np.testing.assert_allclose(runs[0].updates, other.updates, rtol=0, atol=1e-6 * CLIP_NORM)


def test_a_stopped_run_has_accounted_what_it_released_and_costs_its_plan():
    seen = observe(interrupt_at=7, insecure_noise_seed=12)
    assert seen.result.status == "stopped"
    assert len(seen.updates) == 7
    # The eighth was committed and its noise drawn when the interrupt came: counted, though unreleased.
    assert seen.result.committed == Repeated(seen.result.planned.event, 8)
    assert seen.result.summary["steps"] == 8
    assert seen.result.summary["planned_steps"] == 160
    assert 0 < seen.result.summary["epsilon_spent"] < seen.result.epsilon
    assert seen.result.epsilon == observe(insecure_noise_seed=12).result.epsilon
    seen.sums = seen.sums[:7]
    privacy_checks._check_steps(seen, 8)
    privacy_checks._check_order(seen.log)


def test_no_gradient_of_a_private_record_stays_on_the_model():
    seen = observe(epochs=2, insecure_noise_seed=13)
    assert all(parameter.grad is None for parameter in seen.result.model.parameters())
    assert all(not vars(parameter) for parameter in seen.result.model.parameters())


def test_secret_runs_share_neither_noise_nor_samples_and_seeded_ones_share_both():
    def run(**settings):
        seen = observe(epochs=5, **settings)
        return seen.updates, taking_part(seen), seen.result.summary["noise_is_secret"]

    (a, in_a, secret), (b, in_b, _) = run(), run()
    assert secret is True
    assert not np.array_equal(in_a, in_b)
    assert np.intersect1d(a, b).size < 1e-2 * a.size  # on a grid, a few meet by chance
    (c, in_c, secret), (d, in_d, _) = run(insecure_noise_seed=14), run(insecure_noise_seed=14)
    assert secret is False
    assert np.array_equal(in_c, in_d)
    assert np.array_equal(c, d)
    e, in_e, _ = run(insecure_noise_seed=15)
    assert not np.array_equal(in_c, in_e)
    assert np.intersect1d(c, e).size == 0


def test_the_seed_of_a_run_fixes_no_noise():
    a, b = (observe(epochs=5, seed=16) for _ in range(2))
    # On a grid of a millionth of the noise a few numbers meet by chance.
    assert np.intersect1d(a.updates, b.updates).size < 1e-2 * a.updates.size


# ---------------------------------------------------------------- planted faults: noise

_draw = noises.draw
_release = SampledGaussianMechanism.release
_mechanism_sum = SampledGaussianMechanism.clipped_sum
_engine_sum = BookKeepingEngine.clipped_sum
_sample = PoissonSampler.sample
_micro_batches = Examples.micro_batches


def _scaled_noise(factor: float) -> Fault:
    def plant(patch: Patch) -> None:
        noises.plant(patch, lambda self, shapes, norm: [n * factor for n in _draw(self, shapes, norm)])

    return plant


def _noise_left_out(patch: Patch) -> None:
    noises.plant(patch, lambda _, shapes, __: [torch.zeros(*s) for s in shapes])


def _noise_drawn_once(patch: Patch) -> None:
    drawn = []

    def draw(self, shapes, norm):
        drawn.append(drawn[0] if drawn else _draw(self, shapes, norm))
        return drawn[0]

    noises.plant(patch, draw)


def _noise_reused_every_other_step(patch: Patch) -> None:
    drawn = []

    def draw(self, shapes, norm):
        drawn.append(drawn[-1] if len(drawn) % 2 else _draw(self, shapes, norm))
        return drawn[-1]

    noises.plant(patch, draw)


def _noise_correlated_over_steps(patch: Patch) -> None:
    last = []

    def draw(self, shapes, norm):
        fresh = _draw(self, shapes, norm)
        mixed = (
            [math.sqrt(0.91) * new + 0.3 * old for new, old in zip(fresh, last[-1], strict=True)]
            if last
            else fresh
        )
        last.append(mixed)
        return mixed

    noises.plant(patch, draw)


def _one_number_for_all_coordinates(patch: Patch) -> None:
    def draw(self, shapes, norm):
        [number] = _draw(self, [[1]], norm)
        return [number.expand(*shape) for shape in shapes]

    noises.plant(patch, draw)


def _same_noise_for_both_parameters(patch: Patch) -> None:
    noises.plant(patch, lambda self, shapes, norm: _draw(self, shapes[:1], norm) * 2)


def _noise_of_another_law(patch: Patch) -> None:
    def draw(self, shapes, norm):
        size = 2 * RECORDS
        uniform = torch.from_numpy(self.randomness.uniforms(size)) * 2 - 1
        uniform *= math.sqrt(3) * self.noise_multiplier * norm  # the right standard deviation
        return [part.view(*s) for part, s in zip(uniform.split(RECORDS), shapes, strict=True)]

    noises.plant(patch, draw)


def _noise_for_one_parameter_only(patch: Patch) -> None:
    def draw(self, shapes, norm):
        first, second = _draw(self, shapes, norm)
        return [first, torch.zeros_like(second)]

    noises.plant(patch, draw)


def _noise_once_per_micro_batch(patch: Patch) -> None:
    def release(self, clipped, reservation):
        released = _release(self, clipped, reservation)
        for _ in range(1, math.ceil(clipped.diagnostics["examples"] / 8)):
            more = _draw(self.noise, [g.shape for g in released], self.clipping.norm)
            released = [a + b for a, b in zip(released, more, strict=True)]
        return released

    patch.setattr(SampledGaussianMechanism, "release", release)


def _empty_batches_skipped(patch: Patch) -> None:
    def release(self, clipped, reservation):
        if clipped.diagnostics["examples"] == 0:
            reservation.commit(1)
            return clipped.gradients
        return _release(self, clipped, reservation)

    patch.setattr(SampledGaussianMechanism, "release", release)


def _divided_by_the_realised_batch(patch: Patch) -> None:
    def release(self, clipped, reservation):
        factor = RECORDS / 4 / max(1, clipped.diagnostics["examples"])
        return [total * factor for total in _release(self, clipped, reservation)]

    patch.setattr(SampledGaussianMechanism, "release", release)


def _event_with_more_noise(patch: Patch) -> None:
    event = mechanism.gaussian_event
    patch.setattr(mechanism, "gaussian_event", lambda sigma, slack: event(1.3 * sigma, slack))


def _noise_that_follows_the_sum(patch: Patch) -> None:
    def release(self, clipped, reservation):
        released = _release(self, clipped, reservation)
        return [r + 0.3 * g for r, g in zip(released, clipped.gradients, strict=True)]

    patch.setattr(SampledGaussianMechanism, "release", release)


# ---------------------------------------------------------------- planted faults: clipping


def _clip_norm(factor: float) -> Fault:
    def plant(patch: Patch) -> None:
        def clipped_sum(self, model, loss, batches, clipping):
            return _engine_sum(self, model, loss, batches, Clipping(factor * clipping.norm))

        patch.setattr(BookKeepingEngine, "clipped_sum", clipped_sum)

    return plant


def _clipping_left_out(patch: Patch) -> None:
    def clipped_sum(self, model, loss, batches, _):
        return replace(plain_sum(model, loss, batches), slack=self.slack)

    patch.setattr(BookKeepingEngine, "clipped_sum", clipped_sum)


def _clipped_per_micro_batch(patch: Patch) -> None:
    def clipped_sum(self, model, loss, batches, clipping):
        totals = [torch.zeros_like(p, dtype=torch.float64) for p in trainable_parameters(model)]
        for batch in batches:
            sums = plain_sum(model, loss, [batch]).gradients
            norm = math.sqrt(sum(float((g**2).sum()) for g in sums))
            for total, part in zip(totals, sums, strict=True):
                total += part * min(1.0, clipping.norm / norm)
        return ClippedSum(totals, self.slack)

    patch.setattr(BookKeepingEngine, "clipped_sum", clipped_sum)


def _clipped_per_parameter(patch: Patch) -> None:
    def clipped_sum(self, model, loss, batches, clipping):
        kept = list(batches)
        totals = []
        for mine in trainable_parameters(model):
            others = [p for p in model.parameters() if p is not mine]
            for other in others:
                other.requires_grad_(False)
            totals += _engine_sum(self, model, loss, kept, clipping).gradients
            for other in others:
                other.requires_grad_(True)
        return ClippedSum(totals, self.slack)

    patch.setattr(BookKeepingEngine, "clipped_sum", clipped_sum)


def _clipped_after_the_sum(patch: Patch) -> None:
    """The whole sum is cut to the expected batch size times the clip norm."""

    def clipped_sum(self, model, loss, batches, clipping):
        sums = plain_sum(model, loss, batches).gradients
        norm = math.sqrt(sum(float((g**2).sum()) for g in sums))
        factor = min(1.0, RECORDS / 4 * clipping.norm / max(norm, 1e-9))
        return ClippedSum([g * factor for g in sums], self.slack)

    patch.setattr(BookKeepingEngine, "clipped_sum", clipped_sum)


def _scaled_up_to_the_clip_norm(patch: Patch) -> None:
    """Each gradient is normalised. It would be private, but it is not what is stated."""

    def clipped_sum(self, model, loss, batches):
        tiny = self.engine.clipped_sum(model, loss, batches, Clipping(1e-3 * self.clipping.norm))
        return replace(tiny, gradients=[1e3 * g for g in tiny.gradients])

    patch.setattr(SampledGaussianMechanism, "clipped_sum", clipped_sum)


def _a_record_counted_twice(patch: Patch) -> None:
    def micro_batches(self, indices):
        return _micro_batches(self, torch.cat([indices, indices[:1]]))

    patch.setattr(Examples, "micro_batches", micro_batches)


# ---------------------------------------------------------------- planted faults: sampling


def _sampler(sample: Callable[[PoissonSampler], torch.Tensor]) -> Fault:
    return lambda patch: patch.setattr(PoissonSampler, "sample", sample)


def _words(sampler: PoissonSampler) -> torch.Tensor:
    return torch.from_numpy(sampler.randomness.uniforms(sampler.examples))


def _sampling_without_replacement(patch: Patch) -> None:
    def sample(self):
        return _words(self).argsort()[: round(self.sampling_probability * self.examples)].sort().values

    patch.setattr(PoissonSampler, "sample", sample)


def _shuffled_epochs(patch: Patch) -> None:
    queue: list[torch.Tensor] = []

    def sample(self):
        if not queue:
            queue.extend(_words(self).argsort().split(round(self.sampling_probability * self.examples)))
        return queue.pop().sort().values

    patch.setattr(PoissonSampler, "sample", sample)


def _shuffled_epochs_of_random_sizes(patch: Patch) -> None:
    """Batches of binomial sizes, dealt from a shuffled deck: only the dependence between steps is wrong."""
    deck: list[int] = []

    def sample(self):
        size, dealt = len(_sample(self)), []
        while len(dealt) < size:
            if not deck:
                deck.extend(_words(self).argsort().tolist())
            card = deck.pop()
            if card not in dealt:
                dealt.append(card)
        return torch.tensor(sorted(dealt), dtype=torch.int64)

    patch.setattr(PoissonSampler, "sample", sample)


def _same_sample_again(patch: Patch) -> None:
    samples: list[torch.Tensor] = []

    def sample(self):
        samples.append(samples[-1] if len(samples) % 2 else _sample(self))
        return samples[-1]

    patch.setattr(PoissonSampler, "sample", sample)


def _pairs_together(patch: Patch) -> None:
    def sample(self):
        pairs = (_words(self)[: self.examples // 2] < self.sampling_probability).nonzero()[:, 0]
        return torch.stack([2 * pairs, 2 * pairs + 1], dim=1).flatten()

    patch.setattr(PoissonSampler, "sample", sample)


def _one_record_always(patch: Patch) -> None:
    patch.setattr(
        PoissonSampler, "sample", lambda self: torch.cat([torch.tensor([0]), _sample(self)]).unique()
    )


def _one_record_never(patch: Patch) -> None:
    patch.setattr(PoissonSampler, "sample", lambda self: (lambda s: s[s > 0])(_sample(self)))


def _executed_rate(factor: float) -> Fault:
    return _sampler(lambda self: (_words(self) < factor * self.sampling_probability).nonzero()[:, 0])


def _event_of_another_rate(patch: Patch) -> None:
    event = PoissonSampler.event
    patch.setattr(
        PoissonSampler,
        "event",
        lambda self, release: replace(
            event(self, release), sampling_probability=self.sampling_probability / 2
        ),
    )


def _drawn_again_until_not_empty(patch: Patch) -> None:
    def sample(self):
        while True:
            drawn = _sample(self)
            if len(drawn):
                return drawn

    patch.setattr(PoissonSampler, "sample", sample)


def _last_batch_dropped(patch: Patch) -> None:
    def micro_batches(self, indices):
        return _micro_batches(self, indices[: len(indices) // self._size * self._size])

    patch.setattr(Examples, "micro_batches", micro_batches)


def _last_batch_read_but_dropped(patch: Patch) -> None:
    def clipped_sum(self, model, loss, batches):
        return _mechanism_sum(self, model, loss, [b for b in batches if b.mask.all()])

    patch.setattr(SampledGaussianMechanism, "clipped_sum", clipped_sum)


def _batch_capped(patch: Patch) -> None:
    """No more than a physical batch is taken, as by a loader with a largest batch size."""
    patch.setattr(PoissonSampler, "sample", lambda self: _sample(self)[: RECORDS // 4])


# ---------------------------------------------------------------- planted faults: order and steps


def _release_before_the_commit(patch: Patch) -> None:
    def release(self, clipped, reservation):
        drawn = _draw(self.noise, [g.shape for g in clipped.gradients], self.clipping.norm)
        reservation.commit(1)
        return [g + n for g, n in zip(clipped.gradients, drawn, strict=True)]

    patch.setattr(SampledGaussianMechanism, "release", release)


def _commit_after_the_next_update(patch: Patch) -> None:
    late: list[Reservation] = []

    def release(self, clipped, reservation):
        if late:
            reservation.commit(1)
        late.append(reservation)
        drawn = _draw(self.noise, [g.shape for g in clipped.gradients], self.clipping.norm)
        return [g + n for g, n in zip(clipped.gradients, drawn, strict=True)]

    patch.setattr(SampledGaussianMechanism, "release", release)


def _two_committed_at_once(patch: Patch) -> None:
    commit, calls = Reservation.commit, []

    def in_pairs(self, parts=1, event=None):
        calls.extend([1] * (parts == 1))
        if parts > 1 or len(calls) % 2:
            commit(self, max(2, parts), event)

    patch.setattr(Reservation, "commit", in_pairs)


def _first_step_not_committed(patch: Patch) -> None:
    commit, calls = Reservation.commit, []

    def all_but_the_first(self, parts=1, event=None):
        calls.extend([1] * (parts == 1))
        if parts > 1 or len(calls) > 1:
            commit(self, parts, event)

    patch.setattr(Reservation, "commit", all_but_the_first)


def _one_step_too_few_reported(patch: Patch) -> None:
    event = property(lambda self: Repeated(self.step, self.committed - 1))
    patch.setattr(Reservation, "committed_event", event)


def _one_step_too_many_reported(patch: Patch) -> None:
    event = property(lambda self: Repeated(self.step, self.committed + 1))
    patch.setattr(Reservation, "committed_event", event)


def _unguarded_commit(self: Reservation, parts: int = 1, event: Event | None = None) -> None:
    self._committed[event or self.step] += parts


_counted_event = property(lambda self: Repeated(self.step, self.committed))


def _loop_once_more(patch: Patch) -> None:
    """Shadow `range` in the trainer: what counts from 1 in steps of 1 goes one further."""
    longer = lambda low, high, by=1: range(low, high + (low == by == 1), by)  # noqa: E731
    patch.setattr(dpsgd, "range", longer, raising=False)


def _one_step_more_than_planned(patch: Patch) -> None:
    patch.setattr(Reservation, "commit", _unguarded_commit)
    patch.setattr(Reservation, "committed_event", _counted_event)
    _loop_once_more(patch)


def _one_step_more_reserved(patch: Patch) -> None:
    plan = SampledGaussianMechanism.plan
    patch.setattr(SampledGaussianMechanism, "plan", lambda self, steps: plan(self, steps + 1))


def _one_step_less_reserved(patch: Patch) -> None:
    plan = SampledGaussianMechanism.plan
    patch.setattr(SampledGaussianMechanism, "plan", lambda self, steps: plan(self, steps - 1))
    patch.setattr(Reservation, "commit", _unguarded_commit)
    patch.setattr(Reservation, "committed_event", _counted_event)


FAULTS: list[tuple[str, Fault, str]] = [
    ("noise left out", _noise_left_out, "noise: an update has none"),
    ("noise at half the scale", _scaled_noise(0.5), "noise: its scale"),
    ("noise 30 % too small", _scaled_noise(0.7), "noise: its scale"),
    ("noise 10 % too small", _scaled_noise(0.9), "noise: its scale"),
    ("noise 30 % too large", _scaled_noise(1.3), "noise: its scale"),
    ("noise drawn once and reused", _noise_drawn_once, "noise"),
    ("noise reused every other step", _noise_reused_every_other_step, "noise: it is not fresh, two"),
    ("noise correlated over steps", _noise_correlated_over_steps, "noise: it is not fresh, steps"),
    ("one number for all coordinates", _one_number_for_all_coordinates, "noise"),
    ("same noise for both parameters", _same_noise_for_both_parameters, "noise: coordinates"),
    ("noise of another law", _noise_of_another_law, "noise: it is not Gaussian"),
    ("noise for one parameter only", _noise_for_one_parameter_only, "noise"),
    ("noise once per micro-batch", _noise_once_per_micro_batch, "noise: its scale"),
    ("divided by the realised batch", _divided_by_the_realised_batch, "noise"),
    ("event with more noise", _event_with_more_noise, "noise: its scale"),
    ("noise that follows the sum", _noise_that_follows_the_sum, "noise"),
    ("clipping left out", _clipping_left_out, "clipping: one record moved"),
    ("clipped at 1.3 clip norms", _clip_norm(1.3), "clipping: one record moved .* 1.3"),
    ("clipped at 1.0001 clip norms", _clip_norm(1.0001), "clipping: one record moved .* 1.0001"),
    ("clipped at 0.7 clip norms", _clip_norm(0.7), "clipping: a record's part"),
    ("clipped per micro-batch", _clipped_per_micro_batch, "clipping: a record's part"),
    ("clipped per parameter", _clipped_per_parameter, "clipping: one record moved .* 1.41"),
    ("clipped after the sum", _clipped_after_the_sum, "clipping: one record moved"),
    ("scaled up to the clip norm", _scaled_up_to_the_clip_norm, "clipping: a record's part"),
    ("a record counted twice", _a_record_counted_twice, "clipping: one record moved .* 2.0"),
    ("sampling without replacement", _sampling_without_replacement, "sampling: batch sizes"),
    ("shuffled epochs", _shuffled_epochs, "sampling: batch sizes"),
    ("shuffled epochs of random sizes", _shuffled_epochs_of_random_sizes, "sampling: a step's sample"),
    ("same sample again", _same_sample_again, "sampling: a step's sample"),
    ("pairs drawn together", _pairs_together, "sampling"),
    ("one record always drawn", _one_record_always, "sampling: some record"),
    ("one record never drawn", _one_record_never, "sampling: some record"),
    ("rate 30 % too large", _executed_rate(1.3), "sampling: the rate"),
    ("rate 30 % too small", _executed_rate(0.7), "sampling: the rate"),
    ("event of another rate", _event_of_another_rate, "sampling: the rate"),
    ("last batch dropped", _last_batch_dropped, "sampling"),
    ("last batch read but dropped", _last_batch_read_but_dropped, "sampling: the records read"),
    ("batch capped", _batch_capped, "sampling"),
    ("release before the commit", _release_before_the_commit, "order: noise before"),
    ("commit after the next update", _commit_after_the_next_update, "steps: 160 updates"),
    ("two steps committed at once", _two_committed_at_once, "order: a second commit"),
    ("first step not committed", _first_step_not_committed, "steps: 160 updates .* 159"),
    ("one step too few reported", _one_step_too_few_reported, "steps: 160 updates .* 159"),
    ("one step too many reported", _one_step_too_many_reported, "steps: 161 .* only 160"),
    ("one step more than planned", _one_step_more_than_planned, "steps: 161 .* only 160"),
    ("one step more reserved", _one_step_more_reserved, "steps: 161 were reserved, but 160"),
    ("one step less reserved", _one_step_less_reserved, "steps: 160 .* only 159"),
]


@pytest.mark.parametrize(("fault", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_planted_fault_is_caught(fault, message, monkeypatch):
    fault(monkeypatch)
    seen = observe(insecure_noise_seed=20)
    with pytest.raises(PrivacyViolation, match=f"^{message}"):
        check(seen)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_empty_batches_skipped, "noise: an update has none"),
        (_drawn_again_until_not_empty, "sampling: the rate"),
    ],
    ids=["empty batches skipped", "drawn again until not empty"],
)
def test_a_planted_fault_of_empty_batches_is_caught(fault, message, monkeypatch):
    fault(monkeypatch)
    seen = observe(batch_size=1, epochs=5, insecure_noise_seed=22)
    with pytest.raises(PrivacyViolation, match=f"^{message}"):
        check(seen)


def test_an_extra_step_is_refused_before_its_noise_is_drawn(monkeypatch):
    _loop_once_more(monkeypatch)
    drawn = []
    noises.plant(monkeypatch, lambda *arguments: drawn.append(1) or _draw(*arguments))
    with pytest.raises(ReservationError, match="160 are committed; 1 more exceed it"):
        observe(insecure_noise_seed=22)
    assert len(drawn) == 160


def test_a_secret_stream_that_is_none_is_caught(monkeypatch):
    def predictable(cls):
        return cls(bytes(32), is_secret=True)

    monkeypatch.setattr(Randomness, "secret", classmethod(predictable))
    a, b = (observe(epochs=5) for _ in range(2))
    assert np.array_equal(a.updates, b.updates)  # what the test of secret runs above would find
