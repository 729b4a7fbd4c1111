"""The noisy mean of the inputs: what runs is what is accounted, and each planted fault is found."""

import json
import math
from collections.abc import Callable
from typing import Any

import noises
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from accounting import (
    Composed,
    Gaussian,
    PoissonSampled,
    PrivacyAccountant,
    Repeated,
    Reservation,
    ReservationError,
    UserError,
)
from dpml import centring, dpsgd
from dpml.centring import Centred, NoisyMean, contributions
from dpml.config import DPSGDConfig
from dpml.dpsgd import train_dpsgd
from dpml.noise import GaussianNoise
from dpml.planning import ENGINE_SLACK, SamplingPlan
from dpml.randomness import Randomness
from dpml.report import TrainingResult

ALPHA = 1e-11
RECORDS, SIZE = 60, 2000
MEAN_NOISE = 7.0
Patch = pytest.MonkeyPatch


class Violation(AssertionError):
    """The release is not the one that is accounted."""


def data(n: int = RECORDS) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, SIZE, generator=generator) * torch.logspace(-6, 6, n)[:, None] + 1e-3
    x[1], x[2, 3], x[4, 5] = 0, torch.nan, torch.inf
    return TensorDataset(x, torch.arange(n) % 2)


def train(records: Any = None, **changed: Any) -> TrainingResult:
    settings: dict[str, Any] = {
        "noise_multiplier": 1.0, "delta": 1e-3, "epochs": 2, "batch_size": 20, "mean_noise": MEAN_NOISE
    }  # fmt: skip
    wanted = settings | changed
    if "epsilon" in changed:
        del wanted["noise_multiplier"]
    return train_dpsgd(nn.Linear(SIZE, 2), records or data(), DPSGDConfig(**wanted))


def honest_sum(rows: Tensor) -> np.ndarray:
    """Another derivation: record by record."""
    total = np.zeros(SIZE)
    for row in rows.double().numpy():
        norm = np.sqrt((row**2).sum())
        if np.isfinite(norm) and norm > 0:
            total += row / norm
    return total


def check(patch: Patch, **settings: Any) -> TrainingResult:
    """Run, and raise Violation unless the mean was released as its event says."""
    log: list[Any] = []
    reckoning: list[bool] = []
    commit, draw, record = Reservation.commit, Randomness.normal_draw, PrivacyAccountant.record

    def recorded_commit(self: Reservation, parts: int = 1, event: Any = None) -> None:
        commit(self, parts, event)
        if not reckoning:
            log.append(event or self.step)

    def unrecorded(self: PrivacyAccountant, event: Any) -> None:
        reckoning.append(True)  # ε is reckoned by recording an event elsewhere; nothing is released
        record(self, event)
        reckoning.pop()

    def recorded_draw(self: Randomness, count: int) -> Any:
        log.append(count)
        return draw(self, count)

    reserved: list[Any] = []
    reserve = PrivacyAccountant.reserve

    def recorded_reserve(self: PrivacyAccountant, event: Any) -> Any:
        reserved.append(event)
        return reserve(self, event)

    patch.setattr(Reservation, "commit", recorded_commit)
    patch.setattr(Randomness, "normal_draw", recorded_draw)
    patch.setattr(PrivacyAccountant, "reserve", recorded_reserve)
    patch.setattr(PrivacyAccountant, "record", unrecorded)
    result = train(**settings)
    patch.undo()
    event = Gaussian(MEAN_NOISE / (1 + ENGINE_SLACK))
    if not (isinstance(result.planned, Composed) and result.planned.events[0] == event):
        raise Violation("plan: the mean is not in it")
    if result.planned not in reserved:
        raise Violation("plan: it was not reserved")
    first = log.index(SIZE) if SIZE in log else -1
    if first < 0:
        raise Violation("noise: none was drawn")
    if event not in log[:first]:
        raise Violation("order: noise before the commit")
    layer = result.model[0]  # type: ignore[index]
    z = (layer.mean.double().numpy() * RECORDS - honest_sum(data().tensors[0])) / MEAN_NOISE
    low, high = stats.chi2.cdf((z**2).sum(), SIZE), stats.chi2.sf((z**2).sum(), SIZE)
    # With 2,000 numbers a scale that is 30 % off is missed with probability below 1e-15.
    if 2 * min(low, high) < ALPHA:
        raise Violation("noise: its scale is not the accounted one")
    if abs(z.sum()) / math.sqrt(SIZE) > stats.norm.isf(ALPHA / 2):
        raise Violation("sum: it is not that of the records' unit vectors")
    return result


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"insecure_noise_seed": 1},
        {"epsilon": 3.0},
        {"sampling_probability": 1 / 3},
        {"clip_quantile": 0.5},
        {"micro_batch_size": 7},
    ],
    ids=lambda settings: " ".join(settings) or "secret",
)
def test_the_released_mean_is_the_accounted_one(monkeypatch: Patch, settings: dict[str, Any]) -> None:
    result = check(monkeypatch, **settings)
    assert result.status == "completed"
    assert result.planned == result.committed
    assert result.summary["steps"] == result.summary["planned_steps"] == 6
    assert result.summary["mean_noise_multiplier"] == MEAN_NOISE


_release, _total = NoisyMean.release, NoisyMean.total


def _no_noise(patch: Patch) -> None:
    patch.setattr(
        NoisyMean,
        "release",
        lambda self, total, reservation: (reservation.commit(1, self.event), total / self.divisor)[1],
    )


def _noise_scaled(factor: float) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        noises.plant(patch, lambda self, shapes, norm: [factor * n for n in noises.draw(self, shapes, norm)])

    return plant


def _noise_before_commit(patch: Patch) -> None:
    def release(self: NoisyMean, total: Tensor, reservation: Reservation) -> Tensor:
        assert self.noise is not None
        [noise] = noises.draw(self.noise, [total.shape], 1.0)
        reservation.commit(1, self.event)
        return (total + noise) / self.divisor

    patch.setattr(NoisyMean, "release", release)


def _clip_left_out(patch: Patch) -> None:
    patch.setattr(centring, "contributions", lambda rows: rows.flatten(1).double().nan_to_num(0, 0, 0))


def _not_in_the_plan(patch: Patch) -> None:
    patch.setattr(dpsgd, "Composed", lambda events: events[-1])
    patch.setattr(NoisyMean, "release", lambda self, total, _: _release(self, total, _Anything()))


def _not_committed(patch: Patch) -> None:
    patch.setattr(NoisyMean, "release", lambda self, total, _: _release(self, total, _Anything()))


def _a_record_counted_twice(patch: Patch) -> None:
    patch.setattr(
        NoisyMean,
        "total",
        lambda self, inputs: _total(self, [part.repeat_interleave(40, dim=0) for part in inputs]),
    )


class _Anything:
    """A reservation that allows anything and counts nothing."""

    def commit(self, parts: int = 1, event: Any = None) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (_no_noise, "noise: none was drawn"),
        (_noise_scaled(0.7), "noise: its scale"),
        (_noise_scaled(1.3), "noise: its scale"),
        (_noise_before_commit, "order"),
        (_clip_left_out, "noise: its scale"),
        (_not_in_the_plan, "plan"),
        (_not_committed, "order"),
        (_a_record_counted_twice, "noise: its scale"),
    ],
)
def test_planted_faults_are_found(monkeypatch: Patch, fault: Callable[[Patch], None], found: str) -> None:
    with monkeypatch.context() as patch:
        fault(patch)
        with pytest.raises(Violation, match=found):
            check(monkeypatch)


def test_epsilon_is_that_of_the_composed_events() -> None:
    dp_accounting = pytest.importorskip("dp_accounting")
    summary = train(delta=1e-5, mean_noise=2.0).summary
    from dp_accounting.pld import privacy_loss_distribution as pld

    slack, q = 1 + ENGINE_SLACK, summary["sampling_probability"]
    options = {"value_discretization_interval": 1e-4, "pessimistic_estimate": True}
    mean = pld.from_gaussian_mechanism(2.0 / slack, **options)
    step = pld.from_gaussian_mechanism(1.0 / slack, sampling_prob=q, **options)
    oracle = mean.compose(step.self_compose(summary["steps"])).get_epsilon_for_delta(1e-5)
    assert summary["epsilon_lower"] <= oracle * (1 + 1e-3)
    assert summary["epsilon"] == pytest.approx(oracle, rel=3e-3)
    without = step.self_compose(summary["steps"]).get_epsilon_for_delta(1e-5)
    assert summary["epsilon"] > without * 1.02
    assert dp_accounting is not None


def test_the_budget_pays_for_the_mean(tmp_path: Any) -> None:
    config = DPSGDConfig(epsilon=2.0, delta=1e-3, epochs=2, batch_size=20, mean_noise=3.0)
    result = train_dpsgd(nn.Linear(SIZE, 2), data(), config, output=tmp_path / "run")
    assert 1.98 < result.epsilon <= 2
    assert "each scaled to norm 1: noise multiplier 3" in result.statement
    assert "and the mean of the inputs" in result.statement
    events = json.loads((tmp_path / "run" / "privacy_events.json").read_text())
    assert events["planned"] == events["committed"] == [result.planned.to_dict()]
    plain = train(epsilon=2.0, mean_noise=None).summary
    assert result.summary["noise_multiplier"] > plain["noise_multiplier"]
    assert "mean_noise_multiplier" not in plain


def test_the_plan_of_the_calculator_is_that_of_the_trainer() -> None:
    plan = SamplingPlan.of(examples=RECORDS, batch_size=20, epochs=2).event(1.0, mean_noise=MEAN_NOISE)
    assert plan == train().planned


def test_a_run_stopped_early_has_accounted_the_mean() -> None:
    class Stop:
        def start(self, planned_steps: int, config: Any) -> None: ...
        def phase(self, name: str, steps: int) -> None: ...
        def not_private(self, step: int, values: Any) -> None: ...
        def finish(self) -> None: ...

        def scalars(self, step: int, _values: Any) -> None:
            if step == 2:
                raise KeyboardInterrupt

    config = DPSGDConfig(
        noise_multiplier=1.0, delta=1e-3, epochs=2, batch_size=20, mean_noise=MEAN_NOISE
    )  # fmt: skip
    result = train_dpsgd(nn.Linear(SIZE, 2), data(), config, trackers=[Stop()])
    assert result.status == "stopped"
    assert result.summary["steps"] == 2
    mean, steps = Gaussian(MEAN_NOISE / (1 + ENGINE_SLACK)), result.planned.events[1]  # type: ignore[attr-defined]
    assert result.committed == Composed([Repeated(mean, 1), Repeated(steps.event, 2)])
    assert 0 < result.summary["epsilon_spent"] < result.epsilon


def test_a_contribution_has_norm_one_at_most_whatever_a_record_holds() -> None:
    tiny = torch.full((1, 40), 1e-44)
    rows = torch.cat([data().tensors[0][:, :40], tiny, torch.full((1, 40), 3e38), -tiny, torch.zeros(1, 40)])
    norms = contributions(rows).norm(dim=1)
    assert torch.isfinite(norms).all()
    assert norms.max() <= 1 + ENGINE_SLACK
    doubles = torch.cat([rows.double() * 1e-150, rows.double() * 1e160, torch.full((1, 40), 5e-324).double()])
    norms = contributions(doubles).norm(dim=1)
    assert torch.isfinite(norms).all()
    assert norms.max() <= 1 + ENGINE_SLACK


def test_half_precision_rows_keep_to_the_norm() -> None:
    rows = torch.nn.functional.normalize(torch.randn(30, 30_000)).half()
    assert contributions(rows.float()).norm(dim=1).max() <= 1 + ENGINE_SLACK
    assert (Centred(30_000)(rows).norm(dim=1) - 1).abs().max() < 1e-5


def test_centred_inputs_keep_their_shape() -> None:
    centred, maps = Centred(24), torch.randn(5, 2, 3, 4)
    centred.mean.copy_(torch.randn(24) / 10)
    assert centred(maps).shape == maps.shape
    assert torch.equal(centred(maps).flatten(1), centred(maps.flatten(1)))


def test_without_privacy_the_mean_is_exact() -> None:
    config = DPSGDConfig(non_private=True, epochs=2, batch_size=20, mean_noise=5.0, learning_rate=0.01)
    x = torch.randn(RECORDS, SIZE) + 1
    result = train_dpsgd(nn.Linear(SIZE, 2), TensorDataset(x, torch.arange(RECORDS) % 2), config)
    got = result.model[0].mean  # type: ignore[index,union-attr]
    torch.testing.assert_close(got, nn.functional.normalize(x).mean(dim=0), rtol=1e-5, atol=1e-7)
    assert result.summary["epsilon"] is None
    assert result.summary["mean_noise_multiplier"] is None


def test_the_divisor_is_public_where_the_number_of_records_is_not(monkeypatch: Patch) -> None:
    divisors = []

    def total(self: NoisyMean, inputs: Any) -> Tensor:
        divisors.append(self.divisor)
        return _total(self, inputs)

    monkeypatch.setattr(NoisyMean, "total", total)
    for n in (50, 60):
        train(data(n), sampling_probability=0.25)
    assert divisors == [80.0, 80.0]


def test_a_release_needs_its_reservation() -> None:
    mean = NoisyMean(GaussianNoise(5.0, Randomness.from_seed(0, "mean")), 10.0)
    with (
        PrivacyAccountant().reserve(PoissonSampled(Gaussian(1.0), 0.1)) as reservation,
        pytest.raises(ReservationError, match="no part"),
    ):
        mean.release(torch.zeros(3, dtype=torch.float64), reservation)
    with pytest.raises(UserError, match="needs a reservation"):
        mean.release(torch.zeros(3, dtype=torch.float64), None)


def test_mistakes_are_one_line() -> None:
    for wrong in (0, -1, math.nan, "much"):
        with pytest.raises(UserError, match="mean_noise"):
            DPSGDConfig(epsilon=1, delta=1e-5, mean_noise=wrong)  # type: ignore[arg-type]
    words = TensorDataset(torch.ones(30, 4, dtype=torch.int64), torch.zeros(30, dtype=torch.int64))
    with pytest.raises(UserError, match="leave out mean_noise"):
        train(words)
    images = TensorDataset(torch.rand(30, 3, 8, 8), torch.zeros(30, dtype=torch.int64))
    with pytest.raises(UserError, match="augmented"):
        train(images, augment="flip-crop")
