"""The configuration of a run in its output folder, from which `dpml resume` goes on with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accounting import UserError
from accounting.budget import Receipt
from dpml.config import DPSGDRun
from dpml.ledger import in_summary
from dpml.outputs import RunFolder
from dpml.pate.config import PATERun
from dpml.paths import check_path, read_text

CONFIG_FILE = "run.json"
CHECKPOINT_FOLDER = "checkpoint"
EVENTS_FILE = "privacy_events.json"
_RUNS: dict[str, type[DPSGDRun] | type[PATERun]] = {"dpsgd": DPSGDRun, "pate": PATERun}
_OVER = ("completed", "diverged")


class CannotResume(UserError):
    """A run that ended early cannot be gone on with. What it has planned stays paid for."""


def write_run(
    folder: RunFolder,
    method: str,
    config: Mapping[str, Any],
    receipt: Receipt | None,
    checkpoint: str | None = None,
) -> None:
    """Write down a run before it begins: its configuration, where a ledger has it, what its checkpoint is."""
    record = {"method": method, "config": config, "ledger": in_summary(receipt), "checkpoint": checkpoint}
    folder.write_json(CONFIG_FILE, record)


def recorded_run(folder: str | os.PathLike[str] | None) -> str | None:
    """The id under which a ledger knows the run in a folder, if one does.

    Raises:
        CannotResume: if the folder's record of it is damaged.
    """
    return _recorded(folder)[0]


def recorded_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """What tells the checkpoint of the run in a folder from those of others; raises as `recorded_run`."""
    return _recorded(folder)[1]


def _recorded(folder: str | os.PathLike[str] | None) -> tuple[str | None, str | None]:
    path = Path(folder or ".") / CONFIG_FILE
    try:
        record = json.loads(read_text(path))
        receipt = record.get("ledger")
        return None if receipt is None else str(receipt["run_id"]), record.get("checkpoint")
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CannotResume(f"{str(path)!r} is damaged: {error!s:.100}") from error


def read_run(folder: str | os.PathLike[str]) -> DPSGDRun | PATERun:
    """The configuration of a run that ended early, from its output folder.

    Raises:
        CannotResume: if the folder holds no such run, one that is over, or one of a model of your own.
    """
    path = check_path(folder, "run")
    if not path.is_dir():
        raise CannotResume(f"There is no run {str(path)!r} to go on with.")
    require_unfinished(path)
    try:
        record = json.loads(read_text(path / CONFIG_FILE))
        config, run = record["config"], _RUNS[record["method"]]
        if "dataset" not in config:
            raise CannotResume(
                f"The run {str(path)!r} is of a model of your own: call train_dpsgd or train_pate again, as "
                "before, with resume=True."
            )
        return run(**config)
    except CannotResume:
        raise
    except OSError as error:
        raise _no_record(path) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CannotResume(f"{str(path / CONFIG_FILE)!r} is damaged: {error!s:.100}") from error


def _no_record(path: Path) -> CannotResume:
    return CannotResume(
        f"{str(path)!r} cannot be resumed: it has no {CONFIG_FILE}. A run that was killed before it was "
        "written has released nothing: start it again in another folder."
    )


def require_unfinished(path: Path) -> None:
    """Raise CannotResume if the run in a folder is over. What a kill has left of its checkpoint goes then."""
    try:
        status = json.loads(read_text(path / "summary.json")).get("status")
    except (OSError, ValueError, AttributeError, RecursionError):
        return
    if status in _OVER:
        forget_checkpoint(path)
        raise CannotResume(f"The run {str(path)!r} is complete ({status}): there is nothing to resume.")


def forget_checkpoint(path: Path) -> None:
    """Delete what a kill has left of the checkpoint of a run that is over: it holds keys of noise."""
    shutil.rmtree(path / CHECKPOINT_FOLDER, ignore_errors=True)


def reopened(output: str | os.PathLike[str]) -> RunFolder:
    """The folder of a run that goes on, or begins there if nothing of it is there yet.

    Raises:
        CannotResume: if it holds something else, or a run that is over.
        UserError: if it cannot be written to.
    """
    path = check_path(output, "output folder")
    if not path.is_dir() or not any(path.iterdir()):
        return RunFolder(path)
    require_unfinished(path)
    before_the_first_file = {f".{CONFIG_FILE}.tmp", CHECKPOINT_FOLDER}
    names = {item.name for item in path.iterdir()}
    if CONFIG_FILE not in names and names - before_the_first_file:
        raise _no_record(path)
    return RunFolder.reopen(path)
