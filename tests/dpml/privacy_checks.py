"""What a training run really did, and whether that is the mechanism that it accounted for.

`observe` runs `dpml.dpsgd.train_dpsgd` on records whose gradients are known in closed form, and writes down
what it reads, sums, commits, draws and hands to the optimizer. `check` compares that with the event in the
result. It knows nothing of how the trainer works: sampling rate, clip norm and noise scale are recomputed
from what happened.

Record j has the gradient ±norms[j]·(e_j, e_j)/√2 over the model's two weights, whatever the weights are.
So each record has a coordinate of its own in each weight, and every sum tells who took part and by how much.

Every statistical test has a false-alarm rate of `ALPHA`, all its comparisons counted. A check makes fewer
than 20 of them: an honest run fails once in 10^10. `test_executed_mechanism.py` shows what is caught.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from accounting import Event, Gaussian, PoissonSampled, PrivacyAccountant, Repeated, Reservation
from dpml.config import DPSGDConfig
from dpml.dpsgd import train_dpsgd
from dpml.mechanism import SampledGaussianMechanism
from dpml.randomness import Randomness
from dpml.report import TrainingResult

ALPHA = 1e-11
RECORDS = 40
CLIP_NORM = 0.8
# Well below the clip norm, a little above it, far above it, in turn.
NORMS = CLIP_NORM * np.resize([0.5, 1.05, 3.0, 1e4], RECORDS)
SIGNS = np.resize([1.0, 1.0, -1.0], RECORDS)


class PrivacyViolation(AssertionError):
    """The executed mechanism is not the accounted one. The message begins with what differs."""


@dataclass
class Observation:
    """What happened in a run of T steps on n records with d coordinates.

    Attributes:
        reads: Which records were read in each step.
        sums: The clipped sums before noise, float64, shape [T, d].
        updates: The gradients that the optimizer got, float64, shape [T, d].
        log: "commit", "noise" and "update", in the order in which they happened.
        result: What the trainer returned.
    """

    reads: list[list[int]] = field(default_factory=list)
    sums: Any = field(default_factory=list)
    updates: Any = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    result: TrainingResult | None = None


class Records:
    """The data set: (one-hot input scaled to the gradient's norm, sign) pairs. It notes what is read."""

    def __init__(self, seen: Observation) -> None:
        self.seen = seen

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        if self.seen.reads:
            self.seen.reads[-1].append(number)
        inputs = torch.zeros(RECORDS)
        inputs[number] = NORMS[number] / math.sqrt(2)
        return inputs, torch.tensor(SIGNS[number], dtype=torch.float32)


class TwoWeights(nn.Module):
    """The sum of two linear maps of the same input, so that each gradient is spread over two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(RECORDS, 1, bias=False)
        self.second = nn.Linear(RECORDS, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.first(inputs)[:, 0] + self.second(inputs)[:, 0]


def signed_output(outputs: Tensor, signs: Tensor) -> Tensor:
    """A loss that is linear in the weights: its gradient is the input, times the sign."""
    return outputs * signs


def observe(*, interrupt_at: int | None = None, **settings: Any) -> Observation:
    """Run the trainer, 160 steps with q = 1/4 and noise multiplier 1 unless told otherwise."""
    seen = Observation()
    defaults = {
        "delta": 1e-5,
        "batch_size": RECORDS // 4,
        "epochs": 40,
        "clip_norm": CLIP_NORM,
        "micro_batch_size": 8,
        "device": "cpu",
    }
    if "epsilon" not in settings:
        defaults["noise_multiplier"] = 1.0

    class Optimizer(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            if interrupt_at is not None and len(seen.updates) == interrupt_at:
                raise KeyboardInterrupt
            seen.log.append("update")
            seen.updates.append(_flat([p.grad for p in self.param_groups[0]["params"]]))
            super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        _record_seams(seen, patch)
        # ε along the way is for display, and half of the time.
        patch.setattr("dpml.report.epsilon_curve", lambda _, points, *__, **___: [(0.0, 0.0)] * len(points))
        seen.result = train_dpsgd(
            TwoWeights(),
            Records(seen),
            DPSGDConfig(**{**defaults, **settings}),
            loss=signed_output,
            make_optimizer=lambda parameters: Optimizer(parameters, lr=0.01),
        )
    seen.sums = np.array(seen.sums).reshape(-1, 2 * RECORDS)
    seen.updates = np.array(seen.updates).reshape(-1, 2 * RECORDS)
    return seen


def _record_seams(seen: Observation, patch: pytest.MonkeyPatch) -> None:
    clipped_sum, commit = SampledGaussianMechanism.clipped_sum, Reservation.commit
    record, normals = PrivacyAccountant.record, Randomness.normal_draw
    reckoning: list[bool] = []

    def recorded_sum(self: Any, *arguments: Any) -> Any:
        seen.reads.append([])
        clipped = clipped_sum(self, *arguments)
        seen.sums.append(_flat(clipped.gradients))
        return clipped

    def recorded_commit(self: Reservation, parts: int = 1, event: Event | None = None) -> None:
        before = self.committed
        commit(self, parts, event)
        if not reckoning:
            seen.log.extend(["commit"] * (self.committed - before))

    def unrecorded(self: PrivacyAccountant, event: Event) -> None:
        reckoning.append(True)  # ε of an event is reckoned by recording it elsewhere; nothing is released
        record(self, event)
        reckoning.pop()

    def recorded_normals(self: Randomness, count: int) -> Any:
        seen.log.append("noise")
        return normals(self, count)

    patch.setattr(SampledGaussianMechanism, "clipped_sum", recorded_sum)
    patch.setattr(Reservation, "commit", recorded_commit)
    patch.setattr(PrivacyAccountant, "record", unrecorded)
    patch.setattr(Randomness, "normal_draw", recorded_normals)


def _flat(tensors: Sequence[Tensor]) -> np.ndarray:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors]).numpy().copy()


# ---------------------------------------------------------------- the check


def check(seen: Observation) -> None:
    """Raise PrivacyViolation unless what happened is the event that the result states."""
    result = seen.result
    assert result is not None
    summary, step, steps = result.summary, *_parts(result.committed)
    assert isinstance(step, PoissonSampled)
    assert isinstance(step.event, Gaussian)
    _check_steps(seen, steps)
    _check_order(seen.log)
    noise = seen.updates * summary["expected_batch_size"] - seen.sums
    scale = step.event.noise_multiplier * (1 + summary["sensitivity_slack"]) * summary["clip_norm"]
    check_noise(noise / scale)
    _check_noise_against_sums(noise / scale, seen.sums)
    _check_clipping(seen, summary["clip_norm"])
    _check_participation(seen)
    check_sampling(taking_part(seen), step.sampling_probability)


def taking_part(seen: Observation) -> np.ndarray:
    """Which record moved which sum, bool, shape [T, n]."""
    return seen.sums[:, :RECORDS] != 0


def _parts(event: Any) -> tuple[Any, int]:
    return (event.event, event.count) if isinstance(event, Repeated) else (event, 1)


def _require(holds: Any, what: str) -> None:
    if not bool(holds):
        raise PrivacyViolation(what)


def _check_steps(seen: Observation, committed: int) -> None:
    assert seen.result is not None
    planned = _parts(seen.result.planned)[1]
    updates = len(seen.updates)
    _require(
        updates <= committed, f"steps: {updates} updates were released, but only {committed} are accounted"
    )
    _require(
        committed <= planned, f"steps: {committed} steps are accounted, but only {planned} were reserved"
    )
    _require(
        seen.result.summary["steps"] == committed,
        f"steps: the summary says {seen.result.summary['steps']}, the event {committed}",
    )
    if seen.result.status == "completed":
        _require(updates == committed, f"steps: {committed} are accounted, but {updates} were released")
        _require(committed == planned, f"steps: {planned} were reserved, but {committed} completed the run")


def _check_order(log: list[str]) -> None:
    commits = 0
    for entry in log:
        if entry == "commit":
            commits += 1
            _require(commits == 1, "order: a second commit before the first one's update")
        else:
            _require(commits == 1, f"order: {entry} before the step was committed")
            commits -= entry == "update"


def check_noise(z: np.ndarray) -> None:
    """Noise over its accounted scale, shape [T, d], must be independent standard normals, fresh each step."""
    T, d = z.shape
    squares = z**2
    _require((squares.mean(axis=1) > 1e-6).all(), "noise: an update has none")  # what is left is rounding
    # Chi-square bounds: of all numbers together (with 12,800 of them, a scale that is 7 % off is
    # rejected with probability above 1 − 1e-4), of each step, and of each coordinate (half or double).
    _require_chi2(squares.sum(), T * d, 1, "noise: its scale is not the accounted one")
    _require_chi2(squares.sum(axis=1), d, T, "noise: its scale is not the accounted one in some step")
    _require_chi2(squares.sum(axis=0), T, d, "noise: its scale is not the accounted one in some coordinate")
    _require_normal(z.sum() / math.sqrt(T * d), 1, "noise: its mean is not zero")
    _require_normal(z.sum(axis=0) / math.sqrt(T), d, "noise: its mean is not zero in some coordinate")
    _require(stats.kstest(z.ravel(), "norm").pvalue >= ALPHA, "noise: it is not Gaussian")
    # Coordinates are independent: their sum has the variance d.
    _require_chi2((z.sum(axis=1) ** 2).sum() / d, T, 1, "noise: coordinates are correlated")
    _require(_no_two_alike(z.T), "noise: coordinates are correlated, two are the same")
    _require(_no_two_alike(z), "noise: it is not fresh, two steps have the same")
    if T > 1:
        lagged = (z[1:] * z[:-1]).sum() / math.sqrt((T - 1) * d)
        _require_normal(lagged, 1, "noise: it is not fresh, steps are correlated")


def _no_two_alike(rows: np.ndarray) -> bool:
    """No two rows are parallel: squared cosines of independent normals are Beta(1/2, (d − 1)/2)."""
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    k, d = rows.shape
    largest = np.triu((rows @ rows.T) ** 2, k=1).max()
    return bool(stats.beta.sf(largest, 0.5, (d - 1) / 2) * k * k / 2 >= ALPHA)


def _check_noise_against_sums(z: np.ndarray, sums: np.ndarray) -> None:
    lengths = np.linalg.norm(sums, axis=1)
    some = lengths > 0
    if some.any():
        along = (z[some] * sums[some]).sum(axis=1) / lengths[some]
        _require_normal(
            along.sum() / math.sqrt(some.sum()), 1, "noise: it is not independent of what it protects"
        )


def _check_clipping(seen: Observation, clip_norm: float) -> None:
    assert seen.result is not None
    slack = seen.result.summary["sensitivity_slack"]
    first, second = seen.sums[:, :RECORDS], seen.sums[:, RECORDS:]
    moved = np.hypot(first, second)
    worst = moved.max(initial=0)
    _require(
        worst <= clip_norm * (1 + slack),
        f"clipping: one record moved the sum by {worst / clip_norm:.6f} clip norms",
    )
    expected = SIGNS * np.minimum(NORMS, clip_norm) / math.sqrt(2)
    for part in (first, second):
        off = np.abs(np.where(part != 0, part - expected, 0)).max(initial=0)
        _require(
            off <= 1e-6 * clip_norm,
            "clipping: a record's part in the sum is not its own clipped gradient, but depends on others",
        )


def _check_participation(seen: Observation) -> None:
    for step, (reads, row) in enumerate(zip(seen.reads, taking_part(seen), strict=True), start=1):
        _require(
            reads == np.flatnonzero(row).tolist(),
            f"sampling: the records read in step {step} are not those that took part",
        )


def check_sampling(x: np.ndarray, q: float) -> None:
    """Participation, bool, shape [T, n], must be independent coin flips of probability q.

    All bounds are exact binomial ones, for any q. With T·n·q of 1,600, a rate that is 30 % off is rejected
    with certainty (it is 13 standard deviations off).
    """
    T, n = x.shape
    _require_binomial(x.sum(), T * n, q, 1, f"sampling: the rate {x.mean():.4f} is not the accounted {q:.4f}")
    _require_binomial(x.sum(axis=0), T, q, n, "sampling: some record's rate is not the accounted one")
    sizes = np.bincount(x.sum(axis=1), minlength=n + 1)
    share = stats.binom.pmf(np.arange(n + 1), n, q)
    _require_binomial(sizes, T, share, n + 1, "sampling: batch sizes are not those of independent inclusions")
    if q == 1:
        return
    both = (x.T.astype(int) @ x.astype(int))[np.triu_indices(n, k=1)]
    _require_binomial(both, T, q * q, len(both), "sampling: two records are not drawn independently")
    # The same of consecutive steps, in pairs that do not overlap.
    again = (x[0 : T - T % 2 : 2] & x[1::2]).sum()
    _require_binomial(again, (T // 2) * n, q * q, 1, "sampling: a step's sample depends on the one before")


def _require_chi2(values: Any, freedom: int, comparisons: int, what: str) -> None:
    low, high = stats.chi2.cdf(values, freedom), stats.chi2.sf(values, freedom)
    _require(np.min(np.minimum(low, high)) * 2 * comparisons >= ALPHA, what)


def _require_normal(values: Any, comparisons: int, what: str) -> None:
    _require(stats.norm.sf(np.abs(values)).min() * 2 * comparisons >= ALPHA, what)


def _require_binomial(values: Any, trials: int, probability: Any, comparisons: int, what: str) -> None:
    low = stats.binom.cdf(values, trials, probability)
    high = stats.binom.sf(np.asarray(values) - 1, trials, probability)
    _require(np.min(np.minimum(low, high)) * 2 * comparisons >= ALPHA, what)
