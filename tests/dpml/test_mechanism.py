import inspect
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from accounting import Gaussian, PoissonSampled, PrivacyAccountant, Repeated, UserError
from accounting.budget import ReservationError
from dpml.data.samplers import PoissonSampler
from dpml.gradients import ClippedSum, Clipping, OpacusEngine
from dpml.mechanism import SampledGaussianMechanism, set_gradients
from dpml.noise import GaussianNoise
from dpml.planning import gaussian_event
from dpml.randomness import Randomness


@dataclass
class FixedEngine:
    """An engine with a stated and an actual slack, whose sums are ones."""

    slack: float = 0.0
    actual: float = 0.0

    def clipped_sum(self, *_):
        return ClippedSum([torch.ones(3, dtype=torch.float64)], self.actual)


def make(*, sigma=1.5, q=0.25, clip_norm=2.0, engine=None, seed=0):
    return SampledGaussianMechanism(
        PoissonSampler(8, q, Randomness.from_seed(seed, "sampling")),
        Clipping(clip_norm),
        GaussianNoise(sigma, Randomness.from_seed(seed, "noise")),
        engine or FixedEngine(),
    )


@pytest.fixture
def draws(monkeypatch):
    """How often noise was drawn."""
    count = []
    normals = Randomness.normal_draw
    monkeypatch.setattr(Randomness, "normal_draw", lambda self, n: count.append(n) or normals(self, n))
    return count


SUM = ClippedSum([torch.zeros(2, 3, dtype=torch.float64), torch.ones(4, dtype=torch.float64)], 0.0)


@pytest.mark.parametrize("slack", [0.0, 1e-5, 0.5])
def test_the_event_is_the_sampler_of_the_noise_over_the_sensitivity(slack):
    mechanism = make(engine=FixedEngine(slack))
    assert mechanism.event == PoissonSampled(Gaussian(1.5 / (1 + slack)), 0.25)
    assert mechanism.plan(7) == Repeated(mechanism.event, 7)


def test_the_engines_slack_is_charged():
    charged = make(engine=OpacusEngine()).event
    assert charged.event.noise_multiplier == 1.5 / (1 + OpacusEngine.slack) < 1.5


def test_the_event_does_not_depend_on_the_clip_norm():
    assert make(clip_norm=1e-3).event == make(clip_norm=1e3).event


@pytest.mark.parametrize("slack", [-1e-9, 1.1, math.inf, math.nan])
def test_a_slack_that_is_none_is_refused(slack):
    with pytest.raises(UserError, match="'slack'"):
        gaussian_event(1.0, slack)
    with pytest.raises(UserError, match="'slack'"):
        make(engine=FixedEngine(slack)).event  # noqa: B018


def test_release_adds_the_noise_of_the_event_to_the_sum(draws):
    mechanism = make()
    with PrivacyAccountant().reserve(mechanism.plan(1)) as reservation:
        released = mechanism.release(SUM, reservation)
    expected = GaussianNoise(1.5, Randomness.from_seed(0, "noise")).add(SUM.gradients, 2.0)
    for noisy, noise in zip(released, expected, strict=True):
        assert noisy.dtype == torch.float64
        assert torch.equal(noisy, noise)
    assert draws == [10, 10]
    assert reservation.committed == 1


def test_release_leaves_the_sum_as_it_was():
    mechanism = make()
    with PrivacyAccountant().reserve(mechanism.plan(1)) as reservation:
        mechanism.release(SUM, reservation)
    assert torch.equal(SUM.gradients[0], torch.zeros(2, 3, dtype=torch.float64))


def test_an_exhausted_reservation_draws_no_noise(draws):
    mechanism = make()
    with PrivacyAccountant().reserve(mechanism.plan(2)) as reservation:
        mechanism.release(SUM, reservation)
        mechanism.release(SUM, reservation)
        with pytest.raises(ReservationError, match="2 parts, 2 are committed"):
            mechanism.release(SUM, reservation)
    assert len(draws) == 2
    assert reservation.committed == 2


def test_a_closed_reservation_draws_no_noise(draws):
    mechanism = make()
    with PrivacyAccountant().reserve(mechanism.plan(2)) as reservation:
        pass
    with pytest.raises(ReservationError, match="closed"):
        mechanism.release(SUM, reservation)
    assert draws == []
    assert reservation.committed == 0


@pytest.mark.parametrize(
    "other",
    [
        {"sigma": 1.4},
        {"sigma": 1.6},
        {"q": 0.2},
        {"q": 0.3},
        {"q": 1.0},
        {"engine": FixedEngine(1e-5)},
    ],
    ids=str,
)
def test_a_reservation_for_another_mechanism_draws_no_noise_and_commits_nothing(other, draws):
    with (
        PrivacyAccountant().reserve(make(**other).plan(5)) as reservation,
        pytest.raises(UserError, match=r"reserve mechanism\.plan"),
    ):
        make().release(SUM, reservation)
    assert draws == []
    assert reservation.committed == 0


def test_a_reservation_of_another_shape_is_foreign_too(draws):
    mechanism = make()
    for plan in (Gaussian(1.5), Repeated(mechanism.plan(2), 3)):
        with PrivacyAccountant().reserve(plan) as reservation, pytest.raises(UserError):
            mechanism.release(SUM, reservation)
    assert draws == []


def test_a_reservation_of_one_unrepeated_step_is_worth_one_release(draws):
    mechanism = make()
    with PrivacyAccountant().reserve(mechanism.event) as reservation:
        mechanism.release(SUM, reservation)
        with pytest.raises(ReservationError):
            mechanism.release(SUM, reservation)
    assert len(draws) == 1


def test_noise_that_was_turned_down_after_the_reservation_is_noticed(draws):
    mechanism = make()
    with PrivacyAccountant().reserve(mechanism.plan(2)) as reservation:
        mechanism.release(SUM, reservation)
        mechanism.noise.noise_multiplier = 0.1
        with pytest.raises(UserError, match="The reservation is for"):
            mechanism.release(SUM, reservation)
    assert len(draws) == 1


def test_a_mechanism_cannot_be_given_another_part():
    with pytest.raises(AttributeError):
        make().sampler = make().sampler
    with pytest.raises(AttributeError):
        make().clipping.norm = 3.0


def test_a_failing_ledger_prevents_the_noise(draws, monkeypatch):
    mechanism = make()
    accountant = PrivacyAccountant()
    with accountant.reserve(mechanism.plan(2)) as reservation:

        def fail(*_):
            raise OSError("no space left on device")

        monkeypatch.setattr(reservation, "commit", fail)
        with pytest.raises(OSError, match="no space"):
            mechanism.release(SUM, reservation)
    assert draws == []


def test_an_engine_that_exceeds_its_slack_gives_no_sum():
    mechanism = make(engine=FixedEngine(slack=1e-6, actual=1e-5))
    with pytest.raises(RuntimeError, match="exceeded its slack"):
        mechanism.clipped_sum(nn.Linear(1, 1), None, [])
    assert make(engine=FixedEngine(slack=1e-5, actual=1e-5)).clipped_sum(nn.Linear(1, 1), None, [])


@pytest.mark.parametrize("norm", [0, -1.0, math.inf, math.nan, "1", None, True])
def test_a_clip_norm_out_of_range_is_refused(norm):
    with pytest.raises(UserError, match="'clip_norm' parameter of Clipping must be in"):
        Clipping(norm)


# ---------------------------------------------------------------- the divisor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_noisy_sum_is_divided_by_the_given_number_in_the_parameters_type(dtype):
    parameters = [nn.Parameter(torch.zeros(2, 3, dtype=dtype)), nn.Parameter(torch.zeros((), dtype=dtype))]
    sums = [torch.arange(6, dtype=torch.float64).view(2, 3), torch.tensor(7.0, dtype=torch.float64)]
    set_gradients(parameters, sums, 256)
    for parameter, total in zip(parameters, sums, strict=True):
        assert parameter.grad.dtype == dtype
        assert torch.equal(parameter.grad, (total / 256).to(dtype))


def test_the_divisor_cannot_be_the_realised_batch_size():
    # Nothing that depends on the sample reaches the division: not the sum's diagnostics, not the batches.
    assert list(inspect.signature(set_gradients).parameters) == ["parameters", "sums", "divisor"]


def test_sums_for_other_parameters_are_refused():
    with pytest.raises(ValueError, match="argument"):
        set_gradients([nn.Parameter(torch.zeros(2))], [], 1.0)
