"""Fuzz targets: every command, with mutated flags, values and paths."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
from pathlib import Path
from typing import Any

import click
import numpy as np
from begun import stopped_at_training
from fuzzing import Draw, kept_folder, target

from accounting import UserError
from dpml.cli import dpml, main

_ERROR = "dpml: error: "
_STATUSES = (0, 1, 2, 3, 130)
_FINDS_NOTHING: list[str] = [
    "/no/such/file",
    "/dev/null",
    "/dev/zero",
    "",
    ".",
    "..",
    "a\x00b",
    "ε" * 3,
    "x" * 5000,
]


def call(words: list[str], *, trains: bool = False) -> tuple[int | None, str]:
    """Call the command: its status, None where training would begin, and its output.

    Args:
        words: What is typed.
        trains: Let it train.

    Raises:
        UserError: with the one line that a mistake got, so that it is judged as any other refusal.
    """
    out, err, status = io.StringIO(), io.StringIO(), None
    until = contextlib.nullcontext() if trains else stopped_at_training()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), until:
        status = main(words)
    if status is None:
        return None, out.getvalue()
    assert status in _STATUSES, status
    assert "Traceback" not in err.getvalue()
    lines = [line for line in err.getvalue().splitlines() if line.startswith(_ERROR)]
    if status in (2, 3) and not lines:
        assert out.getvalue().startswith("Usage:"), err.getvalue()[:300]
    elif status in (2, 3):
        assert len(lines) == 1, lines
        assert err.getvalue().endswith(lines[0] + "\n")
        raise UserError(lines[0].removeprefix(_ERROR))
    elif status == 1:
        assert lines or out.getvalue()
        if lines:
            raise UserError(lines[0].removeprefix(_ERROR))
    return status, out.getvalue()


@functools.cache
def data_folder() -> Path:
    """Small valid files for all cases: they are read, and never written."""
    folder = kept_folder()
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, n in (("train", 40), ("test", 20)):
        x = rng.normal(size=(n, 4)).astype("f4")
        arrays |= {f"x_{split}": x, f"y_{split}": (x[:, 0] > 0).astype("i8")}
    np.savez(folder / "own.npz", **arrays, x=arrays["x_test"], y=arrays["y_test"], x_public=arrays["x_test"])
    return folder


def own_file() -> str:
    """A data set of 40 records, two classes of four numbers."""
    return str(data_folder() / "own.npz")


def commands(group: click.Command = dpml, above: str = "") -> list[str]:
    """All commands that do something, by their words after `dpml`."""
    if not isinstance(group, click.Group):
        return [above]
    context = click.Context(group)
    parts = {name: group.get_command(context, name) for name in group.list_commands(context)}
    return [
        words for name, part in parts.items() if part for words in commands(part, f"{above} {name}".strip())
    ]


def _command(name: str) -> click.Command:
    command: click.Command = dpml
    for word in name.split():
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), word)
        assert found is not None
        command = found
    return command


def value(draw: Draw, option: click.Parameter) -> str:
    """A value for an option: often one that fits its type."""
    if isinstance(option.type, click.Choice) and draw.random() < 0.6:
        return str(draw.choice(option.type.choices))
    if draw.random() < 0.25:
        return draw.text()
    number = draw.number()
    while isinstance(number, int) and abs(number) > 10**4000:
        number = draw.number()
    return str(number)


def mutated(draw: Draw, name: str, good: dict[str, str | None]) -> list[str]:
    """The words of a command with some of its flags changed, left out or added."""
    flags = dict(good)
    options = [
        each for each in _command(name).params if isinstance(each, click.Option) and each.name != "output"
    ]
    for _ in range(draw.choice([1, 1, 1, 2, 3]) if options else 0):
        option = draw.choice(options)
        flag = option.opts[0]
        if flag in flags and draw.random() < 0.15:
            del flags[flag]
        elif flag in ("--workers", "--device", "--processes"):
            flags[flag] = draw.choice(["0", "-1", "x", "cpu", "1e3", "2"])
        elif flag == "--dataset":
            flags[flag] = draw.choice(_FINDS_NOTHING)
        else:
            flags[flag] = None if option.is_flag else value(draw, option)
    words = name.split()
    for flag, chosen in flags.items():
        words += [flag] if chosen is None else [flag, chosen]
    if draw.random() < 0.05:
        words.insert(draw.randrange(len(words) + 1), draw.text())
    return words


_PLAN: dict[str, str | None] = {
    "--examples": "1000",
    "--batch-size": "50",
    "--epochs": "2",
    "--delta": "1e-5",
}
_WISH: dict[str, str | None] = {"--noise-multiplier": "1.1", "--delta": "1e-5"}


def _valid_answer(out: str) -> None:
    """Assert that an answer in JSON holds a valid ε."""
    answer = json.loads(out, parse_constant=float)
    epsilon, lower = answer["epsilon"], answer["epsilon_lower"]
    assert epsilon is None or 0 <= epsilon < math.inf
    assert lower is None or 0 <= lower < math.inf
    assert epsilon is None or (lower is not None and lower <= epsilon)
    assert 0 < answer["delta"] < 1
    assert answer["noise_multiplier"] > 0
    if "target_epsilon" in answer and answer["target_epsilon"] is not None:
        assert epsilon is not None
        assert epsilon <= answer["target_epsilon"] * (1 + 1e-9)


@target("command: account dpsgd", 1)
def _account(draw: Draw) -> None:
    words = mutated(
        draw, "account dpsgd", {**_PLAN, "--noise-multiplier": "1.1", "--accountant": "rdp", "--json": None}
    )
    status, out = call(words)
    if status == 0 and "--json" in words and "--help" not in words:
        _valid_answer(out)


@target("command: calibrate dpsgd", 1)
def _calibrate(draw: Draw) -> None:
    words = mutated(
        draw, "calibrate dpsgd", {**_PLAN, "--epsilon": "3", "--accountant": "rdp", "--json": None}
    )
    status, out = call(words)
    if status == 0 and "--json" in words and "--help" not in words:
        _valid_answer(out)


@target("command: account and calibrate pate", 1)
def _pate(draw: Draw) -> None:
    wish = draw.choice([{"--queries": "20"}, {"--noise-multiplier": "40"}, {"--queries": "20"}])
    good = {"--delta": "1e-5", "--teachers": "100", "--accountant": "rdp", "--json": None, **wish}
    name = draw.choice(["account pate", "calibrate pate"])
    good |= {"--epsilon": "3"} if name[0] == "c" else {"--queries": "20", "--noise-multiplier": "40"}
    words = mutated(draw, name, good)
    status, out = call(words)
    if status == 0 and "--json" in words and "--help" not in words:
        _valid_answer(out)


@target("command: train dpsgd", 3)
def _train_dpsgd(draw: Draw) -> None:
    good = {"--dataset": own_file(), **_WISH, "--batch-size": "8", "--epochs": "2", "--output": "run"}
    call(mutated(draw, "train dpsgd", {**good, "--no-cache": None, "--accountant": "rdp"}))


@target("command: train pate", 2)
def _train_pate(draw: Draw) -> None:
    good = {"--dataset": own_file(), **_WISH, "--teachers": "5", "--queries": "5", "--output": "run"}
    call(mutated(draw, "train pate", {**good, "--no-cache": None, "--accountant": "rdp"}))


@target("command: sweep", 1)
def _sweep(draw: Draw) -> None:
    good = {
        "--dataset": own_file(),
        **_WISH,
        "--epochs": "1,2",
        "--output": "out",
        "--batch-size": "8",
        "--model": "mlp",
    }
    words = mutated(draw, "sweep", good)
    words.insert(1, draw.choice(["dpsgd-digits", "dpsgd-digits", "pate-digits", draw.text()]))
    if "--seeds" in words and len(words[words.index("--seeds") + 1 :][0]) > 3:
        return  # many thousand runs, which somebody may ask for
    call(words)


@target("command: tune", 1)
def _tune(draw: Draw) -> None:
    good = {
        **_WISH,
        "--learning-rate": "0.1,0.5",
        "--output": "out",
        "--dataset": own_file(),
        "--batch-size": "8",
    }
    words = mutated(draw, "tune", {**good, "--epochs": "1", "--model": "mlp"})
    words.insert(1, draw.choice(["dpsgd-digits", "dpsgd-digits", "pate-digits", draw.text()]))
    call(words)


@target("command: the others", 2)
def _others(draw: Draw) -> None:
    path = draw.choice([*_FINDS_NOTHING, draw.text(), str(data_folder()), own_file(), "/etc/passwd"])
    name = draw.choice(["resume", "predict", "account", "recipes", "chart", "verify", "ledger", "audit", ""])
    options: dict[str, list[str]] = {
        "predict": [
            "--inputs",
            draw.choice([path, own_file()]),
            "--epsilon",
            str(draw.choice([1.0, -1, math.nan])),
        ],
        "account": ["--events", path, "--delta", draw.choice(["1e-5", "2", "nan"])],
        "chart": ["--output", "charts"],
        "verify": ["--seconds", draw.choice(["1", "0", "nan", "inf", "x"])],
    }
    arguments = [] if name == "account" else [path]
    words = [name, *arguments, *options.get(name, [])]
    if draw.random() < 0.2:
        words.insert(draw.randrange(len(words) + 1), draw.text())
    if draw.random() < 0.1:
        words = [*draw.choice(commands()).split(), draw.choice(["--help", "-h", "--version", "-x"])]
    status, _ = call(words)
    assert status != 0 or name in ("recipes", "") or words[-1] in ("-h", "--version") or "--help" in words, (
        "nothing of this is what it should be"
    )
