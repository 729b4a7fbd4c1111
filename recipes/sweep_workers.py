"""Runs of a sweep in processes of their own, which end when their parent does.

A killed run goes on from its checkpoint or its answers. What one that cannot go on had committed stays on
record: its `privacy_events.json` moves to `abandoned/`, and nothing else of it is kept.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

from accounting import BudgetExceeded, UnreachableBudget, UserError
from recipes.sweep_plan import Cell
from recipes.trials import go_on, read_summary, run_or_reuse

RUNS, ABANDONED = "runs", "abandoned"
EVENTS_FILE = "privacy_events.json"
Finished = Callable[[Cell, str | None], None]


def finished_summary(output: Path, cell: Cell) -> dict[str, Any] | None:
    """The summary of a cell that is over, completed or diverged, or None."""
    summary = read_summary(output / RUNS / cell.name)
    return summary if summary is not None and summary.get("status") in ("completed", "diverged") else None


# ---------------------------------------------------------------- the parent


@contextmanager
def sole_owner(output: Path) -> Iterator[None]:
    """Hold the folder against other sweeps, and wait until no worker of a killed one is left.

    Raises:
        UserError: if another sweep is going on there.
    """
    with (output / ".lock").open("a") as lock, (output / ".workers").open("a") as workers:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another sweep is going on in {str(output)!r}; wait for its end.") from None
        fcntl.flock(workers, fcntl.LOCK_EX)
        fcntl.flock(workers, fcntl.LOCK_UN)
        yield


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    cell: Cell | None = None


def run_cells(
    cells: Sequence[Cell], output: Path, finished: Finished, *, processes: int, threads: int
) -> None:
    """Run all cells, several at once, and call `finished` with each and with the reason if it failed."""
    context = multiprocessing.get_context("spawn")
    waiting, workers = deque(cells), list[_Worker]()
    try:
        while waiting or any(worker.cell for worker in workers):
            while len(workers) < min(processes, len(waiting) + len(workers)):
                workers.append(_start(context, output, threads))
            for worker in workers:
                if worker.cell is None and waiting:
                    _give(worker, waiting.popleft())
            for ready in wait([worker.connection for worker in workers if worker.cell]):
                worker = next(worker for worker in workers if worker.connection is ready)
                cell, worker_lives = worker.cell, True
                assert cell is not None  # noqa: S101 - only workers with one are waited for
                try:
                    error = worker.connection.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    error, worker_lives = _death(worker.process.exitcode), False
                worker.cell = None
                if not worker_lives:
                    workers.remove(worker)
                    worker.connection.close()
                finished(cell, error)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(5)
            worker.process.kill()
            worker.process.join()
            worker.connection.close()


def _start(context: SpawnContext, output: Path, threads: int) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, output, threads))
    process.start()
    theirs.close()  # so that the death of the worker ends the connection
    return _Worker(process, ours)


def _give(worker: _Worker, cell: Cell) -> None:
    worker.cell = cell
    try:
        worker.connection.send(cell)
    except OSError:  # it died before: its end of the connection says so to `wait`
        return


def _death(exit_code: int | None) -> str:
    if exit_code == -signal.SIGKILL:
        return "its process was killed (SIGKILL), most likely because the machine ran out of memory"
    return f"its process ended unexpectedly (exit status {exit_code}); see workers.log"


# ---------------------------------------------------------------- a worker


def _work(connection: Connection, output: Path, threads: int) -> None:
    """Run cells from the connection until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = os.open(output / "workers.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)  # the terminal is the parent's
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with (output / ".workers").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # held to the end: a sweep that is started again waits for it
        import torch

        torch.set_num_threads(threads)
        while True:
            try:
                cell = connection.recv()
                if not _parent().is_alive():
                    return
                connection.send(_run(cell, output))
            except (EOFError, OSError):
                return


def _parent() -> Any:
    return multiprocessing.parent_process()


def _end_with_parent() -> None:
    _parent().join()
    os._exit(1)


def _run(cell: Cell, output: Path) -> str | None:
    """Run a cell, or go on with it; return why it failed, if it did."""
    folder = output / RUNS / cell.name
    try:
        if go_on(cell.run, folder, label=cell.name) is None:
            set_aside(folder, output / ABANDONED)
            run_or_reuse(cell.run, folder, label=cell.name)
    except (UserError, BudgetExceeded, UnreachableBudget) as error:
        return _line(str(error))
    except Exception as error:  # whatever it is, the other cells go on
        return _line(f"{type(error).__name__}: {error}")
    return None


def set_aside(folder: Path, abandoned: Path) -> None:
    """Clear the folder of a run that was cut short. What it had planned to release stays on record.

    The folder is renamed first: killed at any moment, the record is counted once.
    """
    if not folder.exists():
        return
    if not (folder / EVENTS_FILE).exists() or _is_non_private(folder):  # then it released nothing that counts
        shutil.rmtree(folder)
        return
    abandoned.mkdir(exist_ok=True)
    number = next(k for k in range(1, 10**6) if not (abandoned / f"{folder.name}~{k}").exists())
    keep_events_alone(folder.rename(abandoned / f"{folder.name}~{number}"))


def keep_events_alone(folder: Path) -> None:
    """Delete everything else of an abandoned run."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != EVENTS_FILE:
            path.unlink()


def _is_non_private(folder: Path) -> bool:
    from accounting import NonPrivate, Repeated
    from dpml.outputs import read_events

    planned, _, _ = read_events(folder / EVENTS_FILE)
    return all(
        isinstance(event.event if isinstance(event, Repeated) else event, NonPrivate) for event in planned
    )


def _line(message: str) -> str:
    return " ".join(message.split())[:500]
