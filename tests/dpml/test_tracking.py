import io
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpml.tracking import ProgressLine, TensorBoard

Call = Callable[..., Any]
OWN = "train dpsgd --model linear --noise-multiplier 1 --delta 1e-3 --epochs 6 --batch-size 10 --dataset"


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def curve(events: Any, tag: str) -> tuple[list[int], list[float]]:
    points = events.Scalars(tag)
    return [point.step for point in points], [point.value for point in points]


def plugins(events: Any) -> str:
    return str(events.Tags())


def test_the_curves_of_a_run(digits_run: Path) -> None:
    summary = json.loads((digits_run / "summary.json").read_text("utf-8"))
    events = read(digits_run)
    for tag, last in (
        ("privacy/epsilon", "epsilon"),
        ("privacy/epsilon_lower", "epsilon_lower"),
        ("test/accuracy", "test_accuracy"),
    ):
        steps, values = curve(events, tag)
        assert steps == sorted(set(steps))
        assert steps[-1] == summary["planned_steps"]
        if tag.startswith("privacy/"):
            assert len(steps) > 10
            assert steps[0] == 1
            assert values == sorted(values)
            assert values[0] > 0
        assert values[-1] == pytest.approx(summary[last], rel=0.01)
    _, epsilon = curve(events, "privacy/epsilon")
    _, lower = curve(events, "privacy/epsilon_lower")
    assert all(low <= high for low, high in zip(lower, epsilon, strict=True))
    assert epsilon[-1] == pytest.approx(summary["epsilon"], rel=1e-5)
    assert max(epsilon) <= summary["epsilon"] * (1 + 1e-6)
    assert all(value > 0 for value in curve(events, "speed/examples_per_second")[1])


def test_the_configuration_and_the_hyperparameters(digits_run: Path) -> None:
    events = read(digits_run)
    [text] = events.Tensors("configuration/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    for row in ("| dataset | `digits` |", "| epochs | `4.0` |", "| expected_batch_size | `128` |"):
        assert row in table
    content = events.summary_metadata
    hparams = {tag for tag, metadata in content.items() if metadata.plugin_data.plugin_name == "hparams"}
    assert "_hparams_/session_start_info" in hparams
    assert "_hparams_/session_end_info" in hparams


def test_nothing_private_is_logged_unless_asked(digits_run: Path) -> None:
    assert not (digits_run / "not_private").exists()
    assert not [tag for tag in read(digits_run).Tags()["scalars"] if "not_private" in tag or "loss" in tag]


def test_private_figures_are_for_their_owner(call: Call, own_data: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        assert call(OWN, own_data, "--log-not-private", "--output", tmp_path / "a").status == 0
    finally:
        os.umask(before)
    folder = tmp_path / "a" / "not_private"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = list(folder.iterdir())
    assert files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    private = read(folder).Tags()["scalars"]
    assert "not_private/train_loss" in private
    assert all(tag.startswith("not_private/") for tag in private)
    for public in (tmp_path / "a").glob("events.out.tfevents.*"):
        assert b"not_private/" not in public.read_bytes()
        assert b"train_loss" not in public.read_bytes()
    assert "not_private/" in (tmp_path / "a" / "statement.md").read_text("utf-8")


def test_a_folder_is_untouched_before_the_start(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    assert list(tmp_path.iterdir()) == []
    board.start(3, {"epochs": 3, "epsilon": None})
    board.scalars(1, {"privacy/epsilon": 0.5})
    board.finish()
    assert curve(read(tmp_path), "privacy/epsilon") == ([1], [0.5])


def test_progress_without_a_terminal() -> None:
    stream = io.StringIO()
    line = ProgressLine("[red]data[/red] :cat:", stream)
    line.start(1000, {})
    for step in range(1, 1001):
        line.scalars(step, {"privacy/epsilon": step / 1000, "speed/examples_per_second": 1234.5})
    line.scalars(1000, {"test/accuracy": 0.9})
    line.not_private(1000, {"train_loss": 0.123})
    line.finish()
    lines = stream.getvalue().splitlines()
    assert 3 <= len(lines) <= 12
    assert lines[0].startswith("[red]data[/red] :cat:: step 1/1000 · ε 0.001 · 1,23")
    assert all("loss" not in text and "0.123" not in text for text in lines)


def test_progress_may_finish_before_it_started_and_twice() -> None:
    line = ProgressLine("x", io.StringIO())
    line.finish()
    line.start(1, {})
    line.finish()
    line.finish()
