"""Which process holds a run, and whether it is provably dead.

A process is its number and the moment it started, within one boot of one machine and one space of process
numbers (a container has its own). Where any of that is unknown or another, nothing is proven.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def host_name() -> str:
    """The machine's name."""
    return platform.node() or "unknown"


def this_process() -> dict[str, Any]:
    """The identity of the calling process, as JSON."""
    return {"pid": os.getpid(), "started": _started(os.getpid()), **_place()}


def is_dead(process: Mapping[str, Any]) -> bool | None:
    """Whether a process that called `this_process` is gone: True and False are proven, None is unknown."""
    if any(process.get(key) is None or process[key] != value for key, value in _place().items()):
        return None
    pid, started = process.get("pid"), process.get("started")
    if not isinstance(pid, int) or started is None:
        return None
    return bool(_started(pid) != started)


def _place() -> dict[str, Any]:
    """Where a process number means something: machine, boot, space. None where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        boot, space = None, None
    return {"host": host_name(), "boot": boot, "space": space}


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the boot; None if there is none, or no telling."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return None if fields[0] in "ZX" else int(fields[19])  # a zombie is dead
