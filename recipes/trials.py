"""Runs of one configuration over several settings and seeds, kept on disk and not repeated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpml.pate.config import PATERun
from dpml.paths import read_text
from dpml.registry import Run
from dpml.tracking import ProgressLine

if TYPE_CHECKING:
    from dpml.report import TrainingResult


def run_or_reuse(run: Run, folder: Path, *, label: str | None) -> dict[str, Any]:
    """Return the summary of `run`, from `folder` if it holds a completed run of the same configuration.

    One that was cut short goes on. A folder with another run of ours, or one that cannot go on, is replaced;
    anything else is left alone and refused. Progress is shown under `label`, or not at all.
    """
    from dpml.resuming import forget_checkpoint

    summary = read_summary(folder)
    if summary is not None and summary["status"] == "completed" and is_of(summary["config"], run):
        forget_checkpoint(folder)
        return summary
    result = go_on(run, folder, label=label)
    if result is None:
        if any((folder / name).exists() for name in ("run.json", "privacy_events.json")):
            shutil.rmtree(folder)
        result = _train(run, folder, label, resume=False)
    if result.status == "stopped":
        raise KeyboardInterrupt
    return result.summary


def go_on(run: Run, folder: Path, *, label: str | None) -> TrainingResult | None:
    """Go on with `run` in a folder where it was cut short; None if that cannot be."""
    from dpml.resuming import CannotResume, read_run

    try:
        if not is_of(json.loads(json.dumps(asdict(read_run(folder)))), run):
            return None
        return _train(run, folder, label, resume=True)
    except CannotResume:
        return None


def _train(run: Run, folder: Path, label: str | None, *, resume: bool) -> TrainingResult:
    # Imported here: a table of runs needs no torch.
    from dpml.dpsgd import run_dpsgd
    from dpml.pate.trainer import run_pate

    trackers = [] if label is None else [ProgressLine(label)]
    if isinstance(run, PATERun):
        return run_pate(run, output=folder, trackers=trackers, resume=resume)
    return run_dpsgd(run, output=folder, trackers=trackers, resume=resume)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's `summary.json`, or None."""
    try:
        data: object = json.loads(read_text(folder / "summary.json"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def by_noise(summaries: Iterable[Mapping[str, Any]]) -> dict[float | None, list[Mapping[str, Any]]]:
    """Group summaries by noise multiplier, most noise first, the non-private ones (None) last."""
    groups: dict[float | None, list[Mapping[str, Any]]] = {}
    for summary in summaries:
        groups.setdefault(summary["noise_multiplier"], []).append(summary)
    return dict(sorted(groups.items(), key=lambda item: -(item[0] or -1.0)))


def is_of(config: dict[str, Any], run: Run) -> bool:
    """Whether this configuration from a folder is that of `run`."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(run)))
    if plain.get("model") == "auto":  # which a summary replaces by what was chosen
        plain["model"] = config.get("model")
    return config == plain
