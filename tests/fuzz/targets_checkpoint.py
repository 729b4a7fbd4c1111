"""Fuzz targets: a DP-SGD run that was stopped and goes on from its checkpoint, with or without a ledger."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fuzzing import Draw, kept_folder, places, target
from targets_command import call, own_file
from targets_files import write_mutated

import dpml
from accounting import PrivacyBudget
from accounting.ledger import Ledger
from dpml import checkpoint, resuming
from dpml.checkpoint import CHECKPOINT_FILE
from dpml.tracking import ProgressLine

_STEPS, _STOPPED = 10, 4
_LEDGER = "ledger.sqlite"
_FILE = f"{resuming.CHECKPOINT_FOLDER}/{CHECKPOINT_FILE}"


class _Stop(ProgressLine):
    """Ctrl-C after some steps."""

    def scalars(self, step: int, values: Any) -> None:
        del values
        if step == _STOPPED:
            raise KeyboardInterrupt


@functools.cache
def _stopped() -> Path:
    """A folder of runs that were stopped: `one` and its twin, two that a ledger pays for, another one."""
    folder = kept_folder()
    Ledger(folder / _LEDGER).declare("a", PrivacyBudget(9.0, 1e-2))
    common: dict[str, Any] = {"dataset": own_file(), "batch_size": 8, "epochs": 2.0}
    common |= {"noise_multiplier": 4.0, "delta": 1e-3, "accountant": "rdp", "model": "linear"}
    paid = {"ledger": "a", "accountant": "pld"}
    runs = {"one": {}, "twin": {}, "paid": paid, "paid-twin": paid, "other": {"learning_rate": 0.3}}
    with mock.patch.dict(os.environ, DPML_LEDGER=str(folder / _LEDGER)):
        for name, settings in runs.items():
            run = dpml.DPSGDRun(**{**common, **settings})
            result = dpml.run_dpsgd(run, output=folder / name, trackers=[_Stop(name)])
            assert result.status == "stopped"
    return folder


@functools.cache
def _resumed(name: str) -> tuple[bytes, Any]:
    """The weights and the events of a run that went on unharmed."""
    folder = Path(shutil.copytree(_stopped(), kept_folder() / "whole"))
    with mock.patch.dict(os.environ, DPML_LEDGER=str(folder / _LEDGER)):
        assert call(["resume", str(folder / name)], trains=True)[0] == 0
    return _told(folder / name)


def _told(run: Path) -> tuple[bytes, Any]:
    events = json.loads((run / resuming.EVENTS_FILE).read_text())
    return (run / "model.safetensors").read_bytes(), events


def _resume(draw: Draw, name: str, harm: Callable[[Path], None], *, is_kept: bool = False) -> None:
    """Go on with a copy of a run that was harmed. What is accepted ends as the run unharmed, bit for bit.

    In the ledger, what was released before stays paid for whatever comes of it, and no run pays for less.

    Args:
        draw: The case.
        name: Of the run.
        harm: Does it to the copy.
        is_kept: Whether the seal is good, so that the run goes on with whatever it is given.
    """
    shutil.copytree(_stopped(), draw.folder, dirs_exist_ok=True)
    ledger = Ledger(draw.folder / _LEDGER)
    before = ledger.data_set("a").runs
    harm(draw.folder / name)
    try:
        call(["resume", name], trains=True)
        (weights, events), (good_weights, good_events) = _told(Path(name)), _resumed(name)
        assert events["planned"] == good_events["planned"]
        if is_kept and events["status"] == "diverged":
            return  # it was given weights that are not finite
        assert events == good_events
        assert weights == good_weights or is_kept
        if name.startswith("paid"):
            record = json.loads((Path(name) / "summary.json").read_text())["ledger"]
            assert ledger.verify(record["head"]).rows >= record["rows"]
            assert ledger.data_set("a").runs[record["run_id"]].committed == [_STEPS]
    finally:
        ledger.verify(ledger.entries()[-1].hash)
        after = ledger.data_set("a").runs
        for run_id, run in before.items():
            assert sum(after[run_id].committed or after[run_id].leased) >= sum(run.committed or [])


@target("file: a checkpoint, bytes", 2)
def _bytes(draw: Draw) -> None:
    _resume(draw, draw.choice(["one", "paid"]), lambda run: write_mutated(draw, run / _FILE))


@target("file: a checkpoint, resealed", 2)
def _resealed(draw: Draw) -> None:
    """A part of the state is replaced and the seal made anew, as only the owner of its keys can do.

    What an optimizer keeps is for its class to judge, and left alone.
    """

    def harm(run: Path) -> None:
        content = checkpoint.read(run / _FILE)
        own = {name: part for name, part in content["state"].items() if name != "optimizer"}
        holder, key = draw.choice([*places(own), *places(content["about"]), (content, "data_key")])
        kept = holder[key]
        if isinstance(kept, torch.Tensor):
            holder[key] = draw.choice([torch.zeros(3), torch.full_like(kept, torch.nan), kept.double(), None])
        else:
            holder[key] = draw.json_value()
        checkpoint.write(run / _FILE, {**content, "state": {**content["state"], **own}})

    _resume(draw, draw.choice(["one", "paid"]), harm, is_kept=True)


@target("file: a run, swapped", 1)
def _swapped(draw: Draw) -> None:
    """A checkpoint, or a record, of another run in the place of its own."""
    name = draw.choice(["one", "paid", "paid", "twin", "paid-twin", "other"])
    donor = draw.choice([each for each in ("one", "twin", "paid", "paid-twin", "other") if each != name])
    file = draw.choice([_FILE, "run.json"])
    _resume(draw, name, lambda run: shutil.copy(_stopped() / donor / file, run / file) and None)


@target("file: a stopped run, edited", 2)
def _edited(draw: Draw) -> None:
    def harm(run: Path) -> None:
        for _ in range(draw.choice([1, 1, 2])):
            write_mutated(
                draw, run / draw.choice(["run.json", "run.json", "summary.json", "privacy_events.json"])
            )

    _resume(draw, draw.choice(["one", "paid"]), harm)
