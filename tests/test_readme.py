"""What the README shows runs as it stands there."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dpml.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
    if line.startswith("dpml ")
]


def test_the_call_trains_a_users_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [call] = [block for block in BLOCKS if "train_dpsgd(" in block]
    monkeypatch.chdir(tmp_path)
    x, y = torch.randn(600, 5), torch.randint(0, 3, (600,))
    names: dict[str, Any] = {
        "model": nn.Linear(5, 3),
        "train_set": TensorDataset(x[:512], y[:512]),
        "test_set": TensorDataset(x[512:], y[512:]),
    }
    exec(call, names)  # noqa: S102 - the README's own code
    assert names["result"].status == "completed"
    assert names["result"].epsilon <= 3
    assert (tmp_path / "runs/mine/summary.json").exists()


def test_the_loop_from_the_parts_spends_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    [loop] = [block for block in BLOCKS if "mechanism.release" in block]
    names: dict[str, Any] = {}
    exec(loop, names)  # noqa: S102 - the README's own code
    printed = float(re.findall(r"ε = ([\d.]+)", capsys.readouterr().out)[0])
    assert names["reservation"].committed == names["steps"]
    assert 2.3 < printed < 2.5
    data, model = names["data"], names["model"]
    right = (model(data.x_test).argmax(1) == data.y_test).double().mean()
    assert right > 0.85, "the README's loop learns"


def test_the_questions_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    questions = [c for c in COMMANDS if c.split()[1] in ("account", "calibrate") and "--events" not in c]
    assert len(questions) >= 2
    for command in questions:
        assert main(shlex.split(command)[1:]) == 0, command
        assert "epsilon" in capsys.readouterr().out


def test_every_command_names_flags_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(COMMANDS) >= 6
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        flags = {word for word in words if word.startswith("--")}
        path = [word for word in words if not word.startswith("-")][:2]
        path = (
            path if path[0] in ("train", "calibrate", "ledger") or path[-1] in ("dpsgd", "pate") else path[:1]
        )
        assert main([*path, "--help"]) == 0
        text = capsys.readouterr().out
        assert not [flag for flag in flags if flag not in text], command


def test_the_accounting_readme_runs() -> None:
    text = (Path(__file__).parents[1] / "accounting" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 3
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)  # noqa: S102 - the README's own code
        if "guarded" in names:
            promised = int(re.findall(r"remaining\(step\) +# (\d+)", block)[0])
            assert names["reservation"].committed == 1
            fresh = names["PrivacyAccountant"](budget=names["guarded"].budget)
            assert fresh.remaining(names["step"]) == promised
