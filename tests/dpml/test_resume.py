"""A run that was cut short goes on as if nothing had happened, and releases nothing twice."""

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resume_checks import (
    STEPS,
    PrivacyViolation,
    Watcher,
    check_nothing_left,
    check_private,
    check_released,
    check_same,
    go_on,
    in_a_child,
    kill,
    record_releases,
    records,
    refusal,
    train,
)
from torch import nn
from torch.utils.data import TensorDataset

from accounting import PrivacyAccountant, Reservation, UserError
from dpml import checkpoint, outputs, report, resuming
from dpml.checkpoint import CHECKPOINT_FILE, Checkpoint
from dpml.mechanism import SampledGaussianMechanism, set_gradients
from dpml.noise import GaussianNoise
from dpml.outputs import RunFolder
from dpml.randomness import Randomness
from dpml.training_state import TrainingState, interrupts_held

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]


def shifted(inputs: torch.Tensor) -> torch.Tensor:
    return inputs + 0.1 * torch.rand_like(inputs)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05, amsgrad=True)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {"average": 0.9},
    "adaptive clip": {"clip_quantile": 0.5},
    "schedule": {"schedule": "linear", "momentum": 0.0},
    "mean": {"mean_noise": 3.0},
    "views": {"augment": shifted, "views": 2},
    "Adam": {"make_optimizer": adam, "schedule": "trapezoidal"},
    "per layer": {"clipping": "per-layer"},
    "without privacy": {"non_private": True, "noise_multiplier": None},
    "records one by one": {"train_set": [(x, int(y)) for x, y in records()]},
}


@pytest.mark.parametrize(
    ("name", "call"),
    # Step 14 is beyond the checkpoint of step 10; at step 4 there is that of the beginning, before the mean.
    [*((name, 14) for name in VARIANTS), ("mean", 4)],
)
def test_a_seeded_run_that_is_killed_is_bit_for_bit_the_uninterrupted_one(
    name: str, call: int, tmp_path: Path
) -> None:
    folder, settings = tmp_path / "a", {**VARIANTS[name], "insecure_noise_seed": 3}
    whole = train(tmp_path / "whole", **settings)
    assert whole.status == "completed"
    release = (Checkpoint, "keep") if settings.get("non_private") else (SampledGaussianMechanism, "release")
    assert in_a_child(lambda patch: (kill(patch, *release, call), train(folder, **settings))) == -9
    assert not (folder / "summary.json").exists()
    check_private(folder)
    result = go_on(folder, **settings)
    assert result.committed == whole.committed
    assert result.summary["epsilon_spent"] == whole.summary["epsilon_spent"]
    check_same(folder, tmp_path / "whole")


BOUNDARIES: dict[str, tuple[Any, str, int, bool]] = {
    "reserved": (PrivacyAccountant, "reserve", 1, False),
    "before the first rename": (Path, "replace", 1, True),
    "before the first checkpoint": (checkpoint, "write", 1, True),
    "before its rename": (Path, "replace", 2, True),  # the first is that of run.json
    "after the first checkpoint": (checkpoint, "write", 1, False),
    "plan written": (report.Report, "start", 1, False),
    "first commit": (Reservation, "commit", 1, False),
    "before a commit": (Reservation, "commit", 13, True),
    "committed": (Reservation, "commit", 13, False),
    "drawn": (GaussianNoise, "add", 13, False),
    "released": (SampledGaussianMechanism, "release", 13, False),
    "before a checkpoint": (checkpoint, "write", 2, True),
    "before a checkpoint's rename": (Path, "replace", 4, True),
    "persisted": (checkpoint, "write", 2, False),
    "shown": (report.Report, "step", 10, False),
    "after the last step": (SampledGaussianMechanism, "release", STEPS, False),
    "before the last checkpoint": (checkpoint, "write", 3, True),
    "after the last checkpoint": (checkpoint, "write", 3, False),
    "before the weights": (RunFolder, "write_model", 1, True),
    "before the summary": (RunFolder, "write_text", 5, True),
    "before the end of the checkpoint": (Checkpoint, "delete", 1, True),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "a"
    train(folder, insecure_noise_seed=3)
    return folder


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_sigkill_at_every_boundary(boundary: str, tmp_path: Path, uninterrupted: Path) -> None:
    folder, log = tmp_path / "a", tmp_path / "log"
    place, name, call, before = BOUNDARIES[boundary]

    def killed(patch: Patch) -> None:
        record_releases(patch, log)
        kill(patch, place, name, call, before=before)
        train(folder, insecure_noise_seed=3)

    assert in_a_child(killed) == -signal.SIGKILL
    if log.exists():  # never a release without its record
        [plan] = json.loads((folder / "privacy_events.json").read_text())["planned"]
        assert plan["count"] == STEPS
    if (folder / "summary.json").exists():
        with pytest.raises(UserError, match="complete"):
            go_on(folder, insecure_noise_seed=3)
        check_nothing_left(folder)
        return
    with pytest.MonkeyPatch.context() as patch:
        record_releases(patch, log)
        go_on(folder, insecure_noise_seed=3)
    check_released(log)
    check_same(folder, uninterrupted)


def stop_at(step: int) -> Any:
    class Stopping(Watcher):
        def scalars(self, now: int, values: Any) -> None:
            super().scalars(now, values)
            if now == step:
                raise KeyboardInterrupt

    return Stopping


def test_a_stopped_run_goes_on(tmp_path: Path, uninterrupted: Path) -> None:
    folder = tmp_path / "a"
    stopped = train(folder, insecure_noise_seed=3, trackers=[stop_at(7)(folder)])
    assert (stopped.status, stopped.summary["steps"]) == ("stopped", 7)
    check_private(folder)
    stopped = go_on(folder, insecure_noise_seed=3, trackers=[stop_at(15)(folder)])
    assert (stopped.status, stopped.summary["steps"]) == ("stopped", 15)
    assert 0 < stopped.summary["epsilon_spent"] < stopped.epsilon
    assert resuming.CHECKPOINT_FOLDER in {path.name for path in folder.iterdir()}
    go_on(folder, insecure_noise_seed=3)
    check_same(folder, uninterrupted)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Where tests run in the background, nobody listens to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_waits_for_the_end_of_a_step() -> None:
    seen = []

    def interrupted(times: int) -> None:
        with interrupts_held():
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            seen.append("the end of the step")

    with pytest.raises(KeyboardInterrupt):
        interrupted(1)
    assert seen
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        interrupted(2)
    assert not seen
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_within_a_step_is_like_a_kill(tmp_path: Path, uninterrupted: Path) -> None:
    folder, log, calls = tmp_path / "a", tmp_path / "log", []

    def interrupted(parameters: Any, sums: Any, divisor: float) -> None:
        calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt
        set_gradients(parameters, sums, divisor)

    with pytest.MonkeyPatch.context() as patch:
        record_releases(patch, log)
        patch.setattr("dpml.dpsgd.set_gradients", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(folder, insecure_noise_seed=3)
        assert not (folder / "summary.json").exists()
        go_on(folder, insecure_noise_seed=3)
    check_released(log)
    check_same(folder, uninterrupted)


def test_a_run_begins_where_there_is_none(tmp_path: Path, uninterrupted: Path) -> None:
    go_on(tmp_path / "a", insecure_noise_seed=3)
    check_same(tmp_path / "a", uninterrupted)
    assert "complete" in refusal(tmp_path / "a", insecure_noise_seed=3)
    (tmp_path / "thesis.txt").write_text("mine")
    assert "no run.json" in refusal(tmp_path)


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after step 13."""
    folder = tmp_path_factory.mktemp("killed") / "a"

    def work(patch: Patch) -> None:
        kill(patch, SampledGaussianMechanism, "release", 13)
        train(folder)

    assert in_a_child(work) == -signal.SIGKILL
    return folder


def at(folder: Path) -> Path:
    return folder / resuming.CHECKPOINT_FOLDER / CHECKPOINT_FILE


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_set": records(5)}, "other records"),
        ({"train_set": TensorDataset(*(t[:99] for t in records().tensors)), "epochs": 2.03}, "run with"),
        ({"train_set": [(x, int(y)) for x, y in records()]}, "other records"),
        ({"learning_rate": 0.1}, "learning_rate 0.5, now 0.1: keep its settings"),
        ({"noise_multiplier": 2.0}, "noise_multiplier 1.0, now 2.0"),
        ({"insecure_noise_seed": 1}, "insecure_noise_seed None, now 1"),
        ({"model": nn.Linear(4, 2)}, "another model or optimizer"),
        ({"make_optimizer": adam}, "another model or optimizer|damaged"),
    ],
)
def test_a_foreign_checkpoint_is_refused(settings: dict[str, Any], words: str, killed: Path) -> None:
    kept = at(killed).read_bytes()
    assert re.search(words, refusal(killed, **settings))
    assert at(killed).read_bytes() == kept


@pytest.mark.parametrize("package", ["torch", "numpy", "dpml"])
def test_other_versions_are_refused(package: str, killed: Path, monkeypatch: Patch) -> None:
    original = checkpoint.version
    monkeypatch.setattr(checkpoint, "version", lambda name: "0.1" if name == package else original(name))
    assert f"{package} " in (said := refusal(killed))
    assert "now '0.1': go on where it began, or start a new run" in said


def test_another_kernel_or_format_is_refused(killed: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(checkpoint, "_VERSION", "2")
    assert "is a checkpoint of version '1'; this is 2" in refusal(killed)
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint.native, "processor", lambda: "another")
    assert "run with processor" in refusal(killed)


def test_every_damaged_region_is_noticed(killed: Path, tmp_path: Path) -> None:
    content = at(killed).read_bytes()
    path = tmp_path / "c"
    places = {*range(16), *range(16, len(content), 97), len(content) - 1}
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(resuming.CannotResume, match=r"damaged|version"):
            checkpoint.read(path)
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(resuming.CannotResume, match="damaged"):
            checkpoint.read(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(resuming.CannotResume, match="damaged"):
        checkpoint.read(path)


@pytest.mark.parametrize("file", [CHECKPOINT_FILE, "run.json"])
def test_a_checkpoint_and_a_record_of_two_runs_are_refused(killed: Path, tmp_path: Path, file: str) -> None:
    """A twin has the same settings and records: its checkpoint would go on with noise of its own."""
    train(tmp_path / "twin", trackers=[stop_at(7)(tmp_path / "twin")])
    folder = Path(shutil.copytree(killed, tmp_path / "a"))
    path = at(folder) if file == CHECKPOINT_FILE else folder / file
    shutil.copy(tmp_path / "twin" / path.relative_to(folder), path)
    assert "is not of the run in this folder" in refusal(folder)
    (folder / "run.json").unlink()
    assert "no run.json" in refusal(folder)


@pytest.mark.parametrize("name", ["step", "mean_released", "seconds", "threads"])
@pytest.mark.parametrize("value", [None, -1, 1.5, "x", 10**9])
def test_numbers_of_a_state_that_are_none(killed: Path, tmp_path: Path, name: str, value: Any) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "a"))
    content = checkpoint.read(at(folder))
    part = content["about" if name == "threads" else "state"]
    part[name] = value if (name, value) != ("seconds", 1.5) else "1.5"
    checkpoint.write(at(folder), content)
    refusal(folder)


def test_a_pipe_is_no_checkpoint(killed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "a"))
    at(folder).unlink()
    os.mkfifo(at(folder))
    assert "no plain file" in refusal(folder)  # and does not wait for a writer


def test_a_lost_checkpoint_is_no_new_beginning(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    train(folder, trackers=[stop_at(7)(folder)])
    at(folder).unlink()
    assert "lost its checkpoint" in refusal(folder)
    at(folder).parent.rmdir()
    assert "lost its checkpoint" in refusal(folder)


def test_two_processes_do_not_go_on_together(killed: Path) -> None:
    with checkpoint._alone(at(killed).parent):
        assert "going on in another process" in refusal(killed)


def test_what_cannot_be_kept_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["odd"] = object()

    with pytest.raises(UserError, match=r"Got object in the state of the optimizer"):
        train(tmp_path / "a", make_optimizer=lambda p: Odd(p, lr=0.1))
    assert not (tmp_path / "a" / "privacy_events.json").exists()


@pytest.mark.usefixtures("interruptible")
def test_the_command(call: Any, own_data: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    line = "train dpsgd --noise-multiplier 2 --delta 1e-3 --epochs 2 --batch-size 10 --model linear --dataset"
    folder = tmp_path / "a"
    monkeypatch.setattr("dpml.tracking.ProgressLine.scalars", lambda *_: signal.raise_signal(signal.SIGINT))
    outcome = call(line, own_data, "--output", folder)
    assert outcome.status == 130
    assert f"'dpml resume {folder}' goes on" in outcome.err
    monkeypatch.undo()
    outcome = call("resume", folder)
    assert outcome.status == 0
    assert "20 steps" in outcome.out
    assert call("resume", folder).status == 2
    train(tmp_path / "b", trackers=[stop_at(3)(tmp_path / "b")])
    assert "a model of your own" in call("resume", tmp_path / "b").error()


# ---------------------------------------------------------------- full disks and folders


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: Patch) -> None:
    folder, original, calls = tmp_path / "a", os.fsync, []

    def full(handle: int) -> None:
        if f".{CHECKPOINT_FILE}" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        original(handle)

    monkeypatch.setattr(outputs.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train(folder, insecure_noise_seed=3)
    monkeypatch.undo()
    assert [path.name for path in at(folder).parent.iterdir()] == [CHECKPOINT_FILE]
    assert checkpoint.read(at(folder))["state"]["step"] == 0
    assert go_on(folder, insecure_noise_seed=3).status == "completed"


# ---------------------------------------------------------------- planted faults


def _noise_not_restored(patch: Patch) -> None:
    patch.setattr(Randomness, "restore", lambda *_: None)


def _noise_restored_from_the_beginning(patch: Patch) -> None:
    """As if the keys that are kept were those of the first step."""
    first: dict[int, Any] = {}
    state = Randomness.state
    patch.setattr(Randomness, "state", lambda self: first.setdefault(id(self), state(self)))


def _sampling_not_restored(patch: Patch) -> None:
    restore = TrainingState.restore

    def forgetful(self: TrainingState, kept: Any) -> None:
        sampling = self.streams["sampling"].state()
        restore(self, kept)
        self.streams["sampling"].restore(sampling)

    patch.setattr(TrainingState, "restore", forgetful)


def _weights_not_restored(patch: Patch) -> None:
    patch.setattr("dpml.training_state._copy", lambda *_: None)


def _keys_left(patch: Patch) -> None:
    patch.setattr(Checkpoint, "delete", lambda _: None)


def _keys_kept_at_the_end(patch: Patch) -> None:
    kept = TrainingState.kept
    patch.setattr(TrainingState, "kept", lambda self, **_: kept(self, with_keys=True))


def _readable(patch: Patch) -> None:
    def written(path: Path, content: bytes) -> None:
        path.write_bytes(content)
        path.chmod(0o644)

    patch.setattr(checkpoint, "write_private", written)


def _shown_before_it_is_persisted(patch: Patch) -> None:
    keep = Checkpoint.keep
    patch.setattr(Checkpoint, "keep", lambda self, **_: keep(self, needed=False))


FAULTS: dict[str, tuple[Plant, str]] = {
    "noise not restored": (_noise_not_restored, "sum: step 11|noise: step 11 was released twice"),
    "noise from the beginning": (_noise_restored_from_the_beginning, "sum: step|noise: two steps share"),
    "sampling not restored": (_sampling_not_restored, "sum: step 11 was done again with another sum"),
    "weights not restored": (_weights_not_restored, "sum: step 11 was done again with another sum"),
    "keys left": (_keys_left, "keys: the checkpoint of a completed run"),
    "keys kept at the end": (_keys_kept_at_the_end, "keys: the last step's figures"),
    "readable": (_readable, "keys: .* is readable by others"),
    "shown first": (_shown_before_it_is_persisted, "shown: figures of step 10"),
}


def check_killed_and_resumed(folder: Path, fault: Plant) -> None:
    """Kill a secret run after 13 steps, go on with it, and check all that it released, kept and showed."""
    log = folder.with_name("log")

    def work(patch: Patch) -> None:
        fault(patch)
        record_releases(patch, log)
        kill(patch, SampledGaussianMechanism, "release", 13)
        train(folder)

    with pytest.MonkeyPatch.context() as patch:
        assert in_a_child(work) == -signal.SIGKILL
        fault(patch)
        record_releases(patch, log)
        check_private(folder)
        go_on(folder, trackers=[Watcher(folder)])
        check_released(log)
        check_nothing_left(folder)
        train(folder.with_name("b"), trackers=[Watcher(folder.with_name("b"))])


def test_a_secret_run_that_is_killed_releases_each_step_once(tmp_path: Path) -> None:
    check_killed_and_resumed(tmp_path / "a", lambda _: None)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, tmp_path: Path) -> None:
    fault, words = FAULTS[name]
    with pytest.raises(PrivacyViolation, match=f"^({words})"):
        check_killed_and_resumed(tmp_path / "a", fault)


def test_a_checkpoint_s_keys_do_not_open_what_was_drawn_before(tmp_path: Path) -> None:
    folder, drawn = tmp_path / "a", []
    original = Randomness.words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Randomness, "words", lambda self, n: drawn.append(original(self, n)) or drawn[-1])
        train(folder, trackers=[stop_at(9)(folder)])
    before = np.concatenate(drawn)
    for state in checkpoint.read(at(folder))["state"]["streams"].values():
        stream = Randomness(bytes.fromhex(state["key"]), is_secret=True)
        assert not np.intersect1d(stream.words(10_000), before).size
