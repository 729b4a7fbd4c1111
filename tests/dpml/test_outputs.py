import json
import math
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accounting import Gaussian, PoissonSampled, PrivacyAccountant, Repeated, UserError
from dpml import data, models
from dpml.outputs import RunFolder, events_record, read_events
from dpml.report import accuracy

Call = Callable[..., Any]
KEYS = {
    *("schema_version", "status", "method", "dataset", "epsilon", "epsilon_lower", "epsilon_spent"),
    *("target_epsilon", "delta", "accountant", "neighboring_relation", "privacy_unit"),
    *("n_is_public", "noise_multiplier", "clip_norm", "sampler", "sampling_probability"),
    *("expected_batch_size", "steps", "planned_steps", "test_accuracy", "train_seconds", "seed"),
    *("noise_is_secret", "sensitivity_slack", "selection_epsilon", "weights_sha256", "ledger", "config"),
    "versions",
}


def strict_json(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}, which is not JSON")

    parsed: dict[str, Any] = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    return parsed


def test_the_files_of_a_run(digits_run: Path) -> None:
    names = {p.name for p in digits_run.iterdir()}
    [curves] = [name for name in names if name.startswith("events.out.tfevents.")]
    written = {"summary.json", "privacy_events.json", "statement.md", "model.safetensors", "run.json"}
    assert names - {curves} == written
    # Whoever may read the folder may read all of it: nothing is public here but for the model's reader.
    modes = {stat.S_IMODE((digits_run / name).stat().st_mode) for name in names}
    assert len(modes) == 1


def test_the_summary_has_the_contract_s_keys(digits_run: Path) -> None:
    summary = strict_json(digits_run / "summary.json")
    assert set(summary) == KEYS
    assert summary["schema_version"] == 1
    assert (summary["status"], summary["method"], summary["dataset"]) == ("completed", "dpsgd", "digits")
    assert (summary["sampler"], summary["privacy_unit"]) == ("poisson", "record")
    assert summary["steps"] == summary["planned_steps"] == math.floor(4 * 1437 / 128)
    assert summary["sampling_probability"] == 128 / 1437
    assert summary["expected_batch_size"] == 128
    assert 0 <= summary["epsilon_lower"] <= summary["epsilon"] <= summary["target_epsilon"] == 3
    assert summary["epsilon_spent"] == summary["epsilon"] >= 0.995 * 3
    assert summary["noise_is_secret"] is True
    assert summary["n_is_public"] is True
    assert summary["selection_epsilon"] is None
    assert 0 < summary["sensitivity_slack"] < 1e-3
    assert 0 < summary["train_seconds"] < 60
    assert {"python", "dpml", "torch", "opacus", "numpy", "scipy"} == set(summary["versions"])


def test_anybody_can_recompute_epsilon(digits_run: Path) -> None:
    summary = strict_json(digits_run / "summary.json")
    planned, committed, record = read_events(digits_run / "privacy_events.json")
    assert planned == committed
    assert record["status"] == "completed"
    accountant = PrivacyAccountant(neighboring_relation=record["neighboring_relation"])
    for event in planned:
        accountant.record(event)
    assert accountant.epsilon(summary["delta"]) == summary["epsilon"]
    # The noise over the clip norm, slack included, is the event's.
    [plan] = planned
    noise = summary["noise_multiplier"] / (1 + summary["sensitivity_slack"])
    step = PoissonSampled(Gaussian(noise), summary["sampling_probability"])
    assert plan == Repeated(step, summary["planned_steps"])


def test_the_weights_reproduce_the_accuracy(digits_run: Path) -> None:
    summary = strict_json(digits_run / "summary.json")
    digits = data.load("digits")
    model = models.build(summary["config"]["model"], digits.example_shape, digits.classes)
    safetensors.torch.load_model(model, digits_run / "model.safetensors", strict=True)
    assert accuracy(model, TensorDataset(digits.x_test, digits.y_test)) == summary["test_accuracy"]
    assert summary["test_accuracy"] > 0.5


OWN = "train dpsgd --model mlp --noise-multiplier 1 --delta 1e-3 --epochs 1 --batch-size 10 --dataset"


def weights(folder: Path) -> torch.Tensor:
    loaded = safetensors.torch.load_file(folder / "model.safetensors")
    return torch.cat([loaded[name].flatten() for name in sorted(loaded)])


def test_seeds(call: Call, own_data: Path, tmp_path: Path) -> None:
    seeded = ("--seed", 3, "--insecure-noise-seed", 4)
    runs: dict[str, tuple[Any, ...]] = {
        "a": seeded,
        "b": seeded,
        "small": (*seeded, "--micro-batch-size", 3),
        "one": (*seeded, "--micro-batch-size", 1),
        "noise": ("--seed", 3, "--insecure-noise-seed", 5),
        "start": ("--seed", 4, "--insecure-noise-seed", 4),
        "secret": ("--seed", 3),
        "secret2": ("--seed", 3),
    }
    made = {}
    for name, more in runs.items():
        outcome = call(OWN, own_data, *more, "--output", tmp_path / name)
        assert outcome.status == 0
        warned = "noise came from a known seed; this run is not for release" in outcome.err
        assert warned == ("--insecure-noise-seed" in more)
        made[name] = weights(tmp_path / name)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    assert torch.allclose(made["a"], made["small"], rtol=0, atol=1e-4)
    assert torch.allclose(made["a"], made["one"], rtol=0, atol=1e-4)
    for other in ("noise", "start", "secret"):
        assert (made["a"] - made[other]).abs().max() > 1e-2, other
    assert (made["secret"] - made["secret2"]).abs().max() > 1e-2
    for name in runs:
        secret = strict_json(tmp_path / name / "summary.json")["noise_is_secret"]
        text = (tmp_path / name / "statement.md").read_text("utf-8")
        assert secret == name.startswith("secret")
        assert ("Not for release" in text) != secret


# ---------------------------------------------------------------- the parts


def test_infinity_and_nan_become_null(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a")
    content = {"a": math.inf, "b": [math.nan, 1.5], "c": {"d": (-math.inf,)}, "e": "∞"}
    folder.write_json("x.json", content)
    expected = {"a": None, "b": [None, 1.5], "c": {"d": [None]}, "e": "∞"}
    assert strict_json(tmp_path / "a" / "x.json") == expected


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "a")
    folder.write_text("x.txt", "first")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        folder.write_text("x.txt", "second")
    assert (tmp_path / "a" / "x.txt").read_text("utf-8") == "first"


def test_weights_are_written_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a")
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    folder.write_model("m.safetensors", model)
    folder.write_text("x.txt", "")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["m.safetensors", "x.txt"]
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "a").iterdir()}
    assert len(modes) == 1
    other = nn.Linear(3, 3)
    safetensors.torch.load_model(nn.Sequential(other, nn.Tanh(), other), tmp_path / "a" / "m.safetensors")
    assert torch.equal(other.weight, shared.weight)


def test_a_folder_that_vanished(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a")
    (tmp_path / "a").rmdir()
    with pytest.raises(OSError, match="No such file"):
        folder.write_model("m.safetensors", nn.Linear(2, 2))
    with pytest.raises(OSError, match="No such file"):
        folder.write_text("x.txt", "")


def test_events_make_the_round_trip(tmp_path: Path) -> None:
    plan = Repeated(PoissonSampled(Gaussian(1.5), 0.25), 7)
    done = Repeated(plan.event, 3)
    record = events_record(
        planned=plan, committed=done, relation="add-or-remove-one", accountant="rdp", status="stopped"
    )
    RunFolder(tmp_path / "a").write_json("e.json", record)
    planned, committed, rest = read_events(tmp_path / "a" / "e.json")
    assert (planned, committed) == ([plan], [done])
    assert (rest["neighboring_relation"], rest["accountant"]) == ("add-or-remove-one", "rdp")


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("", "utf-8")
    with pytest.raises(UserError, match="is not empty; choose a new one"):
        RunFolder(tmp_path)


# ---------------------------------------------------------------- when the machine fails


@pytest.mark.parametrize("name", ["summary.json", "model.safetensors", "privacy_events.json"])
def test_a_full_disk_gets_one_line(
    call: Call, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    original = RunFolder._replace

    def replace(self: RunFolder, wanted: str, content: bytes) -> None:
        if wanted == name:
            raise OSError(28, "No space left on device", str(self.path / wanted))
        original(self, wanted, content)

    monkeypatch.setattr(RunFolder, "_replace", replace)
    outcome = call(OWN, own_data, "--output", tmp_path / "a")
    assert outcome.status == 1
    [line] = [line for line in outcome.err.splitlines() if "step" not in line]
    assert line == f"dpml: error: No space left on device ({tmp_path / 'a' / name})."
    # What was released is never lost: the plan, at least, is on the disk, or nothing was released.
    assert (tmp_path / "a" / "privacy_events.json").exists() == (name != "privacy_events.json")


VANISHING = """
import shutil, sys
from dpml import cli
from dpml.tracking import ProgressLine
report = ProgressLine.scalars
def scalars(self, step, values):
    report(self, step, values)
    if step == 3:
        shutil.rmtree({folder!r})
ProgressLine.scalars = scalars
sys.argv[1:] = {arguments!r}
cli.run()
"""
SMALL_DISK = """
import resource, sys
from dpml import cli
from dpml.tracking import TensorBoard
start = TensorBoard.start
def limited(*arguments):
    start(*arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
TensorBoard.start = limited
sys.argv[1:] = {arguments!r}
cli.run()
"""


@pytest.mark.parametrize(
    ("program", "words"), [(VANISHING, "No such file or directory ("), (SMALL_DISK, "File too large")]
)
def test_a_disk_that_fails_under_tensorboard(
    own_data: Path, tmp_path: Path, program: str, words: str
) -> None:
    """TensorBoard writes in a thread, whose traceback nobody should see."""
    folder = str(tmp_path / "a")
    code = program.format(folder=folder, arguments=[*OWN.split(), str(own_data), "--output", folder])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "step" not in line]
    assert line.startswith(f"dpml: error: {words}")
    # Where the folder is still there, so is the plan that was paid for.
    assert (tmp_path / "a").exists() == (tmp_path / "a" / "privacy_events.json").exists()
