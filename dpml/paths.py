"""Paths that a caller passes, and small files that are read whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from accounting import UserError
from accounting.events import shown

_MOST_BYTES = 50_000_000


def check_path(value: object, name: str) -> Path:
    """Return `value` as a path; raise UserError unless it is a text or a path without null bytes."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or "\0" in path:
        raise UserError(f"The {name} must be a path. Got {shown(value)}.")
    return Path(path)


def read_text(path: Path) -> str:
    """The text of a plain file: a device or a pipe may have no end, and is not opened.

    Raises:
        OSError: if it cannot be read, or is neither a plain file nor small.
        ValueError: if it is no text.
    """
    if path.exists() and not path.is_dir():
        if not path.is_file():
            raise OSError(errno.EINVAL, "it is no plain file", str(path))
        if path.stat().st_size > _MOST_BYTES:
            raise OSError(errno.EFBIG, "it is far too large", str(path))
    return path.read_text(encoding="utf-8")
