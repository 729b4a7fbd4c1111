"""What a run leaves in its output folder. Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from accounting import Event, NeighboringRelation, UserError
from dpml.paths import check_path, read_text

SUMMARY_VERSION = 1
EVENTS_VERSION = 1


class RunFolder:
    """A folder for one run. Nothing that is already there is overwritten.

    Args:
        path: The folder; made, with its parents, if it does not exist.

    Raises:
        UserError: if it holds files already, is not a folder, or cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = check_path(path, "output folder")
        with _writable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise UserError(f"The output folder {str(self.path)!r} is not empty; choose a new one.")

    @classmethod
    def reopen(cls, path: str | os.PathLike[str]) -> RunFolder:
        """The folder of a run that goes on.

        Raises:
            UserError: if it cannot be written to.
        """
        folder = cls.__new__(cls)
        folder.path = Path(path)
        with _writable(folder.path):
            return folder

    def write_text(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        self._replace(name, text.encode())

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON file atomically. Infinity and NaN become null: JSON has neither."""
        self.write_text(name, json.dumps(_finite(data), indent=2, ensure_ascii=False) + "\n")

    def write_model(self, name: str, model: nn.Module) -> str:
        """Write a model's weights as safetensors, atomically; return the file's SHA-256."""
        # By way of a file of its own: safetensors shares a tied weight only when it writes one, and that
        # file has mode 600 and has not reached the disk.
        with tempfile.TemporaryDirectory(prefix=".", dir=self.path) as folder:
            written = Path(folder) / name
            try:
                safetensors.torch.save_model(model, str(written))
            except safetensors.SafetensorError as error:
                raise OSError(f"cannot write {str(self.path / name)!r}: {error}") from error
            content = written.read_bytes()
            self._replace(name, content)
        return hashlib.sha256(content).hexdigest()

    def _replace(self, name: str, content: bytes) -> None:
        temporary = self.path / f".{name}.tmp"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Check that a folder can be written to when the block has ended; its OSErrors are a user's mistake."""
    try:
        yield
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"The output folder {str(path)!r} cannot be written to ({reason}); choose another."
        ) from error


def write_private(path: Path, content: bytes) -> None:
    """Write a file that its owner alone can read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise


def events_record(
    *, planned: Event, committed: Event, relation: NeighboringRelation, accountant: str, status: str
) -> dict[str, Any]:
    """The content of `privacy_events.json`, from which anybody can recompute ε."""
    return {
        "schema_version": EVENTS_VERSION,
        "status": status,
        "neighboring_relation": relation,
        "accountant": accountant,
        "planned": [planned.to_dict()],
        "committed": [committed.to_dict()],
    }


def read_events(path: str | os.PathLike[str]) -> tuple[list[Event], list[Event], dict[str, Any]]:
    """Read `privacy_events.json`: planned events, committed events, and the rest of the file.

    Raises:
        UserError: if the file is missing, not JSON, of another version, or describes no valid events.
    """
    name = str(path)
    try:
        data = json.loads(read_text(check_path(path, "events file")))
    except OSError as error:
        raise UserError(f"The events file {name!r} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"The events file {name!r} is not valid JSON; is it the right file?") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != EVENTS_VERSION or isinstance(version, bool):
        raise UserError(f"{name!r} is not an events file of version {EVENTS_VERSION}.")
    lists = []
    for key in ("planned", "committed"):
        if not isinstance(data.get(key), list) or not data[key]:
            raise UserError(f"The events file {name!r} has no list {key!r} of at least one event.")
        lists.append([Event.from_dict(item) for item in data[key]])
    return lists[0], lists[1], data


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
