"""Paths that a caller passes, and small files that are read whole."""

from __future__ import annotations

import errno
from pathlib import Path

from accounting.events import check_path

__all__ = ["check_path", "read_text", "require_plain"]

_MOST_BYTES = 50_000_000


def require_plain(path: Path) -> None:
    """Raise OSError for a device or a pipe: it may have no end, or nobody who writes to it."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is no plain file", str(path))


def read_text(path: Path) -> str:
    """The text of a plain file.

    Raises:
        OSError: if it cannot be read, or is neither a plain file nor small.
        ValueError: if it is no text.
    """
    require_plain(path)
    if path.is_file() and path.stat().st_size > _MOST_BYTES:
        raise OSError(errno.EFBIG, "it is far too large", str(path))
    return path.read_text(encoding="utf-8")
