"""Runs that are killed and go on, what they released, and whether that is sound.

`released` writes down each noisy sum of a run, in whatever process it is made. `check_released` then looks at
those of all processes together: each step was released once, if in several processes then as the same
numbers, and no two steps share their noise.
"""

import json
import os
import re
import signal
import stat
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from accounting import UserError
from dpml import checkpoint, dpsgd, resuming
from dpml.checkpoint import CHECKPOINT_FILE
from dpml.config import DPSGDConfig
from dpml.mechanism import SampledGaussianMechanism
from dpml.report import TrainingResult
from dpml.tracking import TensorBoard

STEPS = 20
"""Of the runs here: two epochs of ten steps. Their checkpoints are of step 0, 10 and 20."""


class PrivacyViolation(AssertionError):
    """What was released is not what was paid for. The message begins with what is wrong."""


def records(number: int = 0) -> TensorDataset:
    drawn = np.random.default_rng(number).normal(size=(100, 4)).astype(np.float32)
    return TensorDataset(torch.from_numpy(drawn), torch.from_numpy((drawn[:, 0] > 0).astype(np.int64)))


def train(folder: Path | None, *, resume: bool = False, **settings: Any) -> TrainingResult:
    """A tiny run, the same each time but for its noise."""
    torch.manual_seed(0)
    passed = {name: settings.pop(name) for name in ("make_optimizer", "augment") if name in settings}
    train_set = settings.pop("train_set", records())
    trackers = settings.pop("trackers", ())
    model = settings.pop("model", None) or nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    base: dict[str, Any] = {"noise_multiplier": 1.0, "delta": 1e-3, "epochs": 2, "batch_size": 10}
    return dpsgd.train_dpsgd(
        model,
        train_set,
        DPSGDConfig(**{**base, **settings}),
        test_set=records(1),
        output=folder,
        resume=resume,
        trackers=trackers,
        **passed,
    )


def go_on(folder: Path, **settings: Any) -> TrainingResult:
    return train(folder, resume=True, **settings)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def kill(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *, before: bool = False) -> None:
    """SIGKILL this process at the given call of a function, counted from 1."""
    original, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if before and calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        made = original(*arguments, **named)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    patch.setattr(owner, name, counted)


def in_a_child(work: Callable[[pytest.MonkeyPatch], Any]) -> int:
    """Do something in a process of its own; return its exit status, negative for a signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TensorBoard's threads are of no use there
        child = os.fork()
    if child == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                work(patch)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---------------------------------------------------------------- what a run says


def told(folder: Path) -> dict[str, Any]:
    """What a completed run says and leaves, but for times, and for what depends on others in its ledger."""
    summary = json.loads((folder / "summary.json").read_text())
    del summary["train_seconds"]
    statement = (folder / "statement.md").read_text("utf-8")
    if summary["ledger"] is not None:
        summary["ledger"] = {key: summary["ledger"][key] for key in ("name", "budget", "rule", "caveat")}
        statement = re.sub("of which ε = .*? looks for it", "", statement)
    events = json.loads((folder / "privacy_events.json").read_text())
    return {"summary": summary, "statement": statement, "events": events, "weights": weights(folder)}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What a run shows in TensorBoard, but for its speed."""
    # Files are read by the second in their name, and processes here may share one.
    for number, path in enumerate(sorted(folder.glob("events*"), key=lambda p: p.stat().st_mtime_ns)):
        path.rename(folder / f"events.out.tfevents.{number:010d}")
    shown = EventAccumulator(str(folder))
    shown.Reload()
    return {
        tag: [(point.step, point.value) for point in shown.Scalars(tag)]
        for tag in shown.Tags()["scalars"]
        if tag != "speed/examples_per_second"
    }


def check_same(folder: Path, other: Path) -> None:
    """Assert that two completed DP-SGD runs say, show and leave the same, and nothing besides."""
    assert told(folder) == told(other)
    shown = curves(folder)
    assert shown == curves(other)
    assert all(len({step for step, _ in points}) == len(points) for points in shown.values())
    check_nothing_left(folder)


# ---------------------------------------------------------------- what was released


def record_releases(patch: pytest.MonkeyPatch, log: Path) -> None:
    """Append (step, sum, noisy sum) of each release to a file; the step is how many were committed.

    The plan is of one kind of step. Each line begins anew: a kill may have torn the one before.
    """
    original = SampledGaussianMechanism.release

    def release(self: SampledGaussianMechanism, clipped: Any, reservation: Any) -> list[Tensor]:
        before = _flat(clipped.gradients)
        noisy = original(self, clipped, reservation)
        with log.open("a") as file:
            line = [reservation.committed, before.tolist(), _flat(noisy).tolist()]
            file.write("\n" + json.dumps(line) + "\n")
        return noisy

    patch.setattr(SampledGaussianMechanism, "release", release)


def released(log: Path) -> list[tuple[int, Any, Any]]:
    """What `record_releases` has written, but for lines that a kill has torn."""
    lines = log.read_text().splitlines() if log.exists() else []
    whole = [line for line in lines if line.endswith("]]")]
    return [(step, *map(np.array, sums)) for step, *sums in map(json.loads, whole)]


def check_released(log: Path, planned: int = STEPS) -> None:
    """Raise PrivacyViolation unless all processes together released each of the planned steps once."""
    steps: dict[int, tuple[Any, Any]] = {}
    for step, total, noisy in released(log):
        was_total, was_noisy = steps.setdefault(step, (total, noisy))
        if not np.array_equal(was_total, total):
            raise PrivacyViolation(f"sum: step {step} was done again with another sum")
        if not np.array_equal(was_noisy, noisy):
            raise PrivacyViolation(f"noise: step {step} was released twice, with fresh noise")
    if sorted(steps) != list(range(1, planned + 1)):
        raise PrivacyViolation(f"steps: {sorted(steps)} were released of {planned}")
    noises = [noisy - total for total, noisy in steps.values()]
    for i, one in enumerate(noises):
        if any(np.allclose(one, other, atol=1e-4) for other in noises[:i]):
            raise PrivacyViolation("noise: two steps share it, so their difference has none")


def check_nothing_left(folder: Path) -> None:
    """Raise PrivacyViolation if anything of a completed run's checkpoint is left."""
    if (folder / resuming.CHECKPOINT_FOLDER).exists():
        raise PrivacyViolation("keys: the checkpoint of a completed run is still there")


def check_private(folder: Path) -> None:
    """Raise PrivacyViolation if anybody else can read a checkpoint."""
    inside = folder / resuming.CHECKPOINT_FOLDER
    for path in (inside, *inside.iterdir()):
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise PrivacyViolation(f"keys: {path.name} is readable by others")


class Watcher(TensorBoard):
    """A tracker that looks whether the checkpoint has what is shown."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / resuming.CHECKPOINT_FOLDER / CHECKPOINT_FILE

    def start(self, *_: Any) -> None:
        pass

    def scalars(self, step: int, values: Any) -> None:
        if not values.keys() & {"test/accuracy", "privacy/clip_norm"}:
            return
        state = checkpoint.read(self.path)["state"]
        if state["step"] != step:
            raise PrivacyViolation(f"shown: figures of step {step}, but step {state['step']} is persisted")
        if step == STEPS and state["streams"] is not None:
            raise PrivacyViolation("keys: the last step's figures are shown while its keys are there")

    def finish(self) -> None:
        pass


def _flat(tensors: Any) -> Any:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors]).numpy().copy()


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        go_on(folder, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)
