"""SIGKILL at random moments of training, PATE and a sweep on digits: what is left is sound and goes on.

    OMP_NUM_THREADS=1 python tests/dpml/kills.py [--kills 200] [--fresh 20] [--save docs/results/kills.json]

Each run is a real command with a ledger. It is killed, with all of its processes, at a moment drawn uniformly
from nothing to the duration of an uninterrupted run, start-up included; goes on; is killed again, at a moment
drawn anew; and so on, until a process ends by itself. A wait for a core does not count, so that moments fall
alike on a busy machine. Every second run has a known seed, the others secret noise. The first ones are the
command `dpml`, started afresh. The others are forked from a process that has imported everything, so that
they are killed while they work; they also note what they release. `kill_checks` says what must hold. A
failure says how its run is repeated.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from kill_checks import QUERIES, Answering, Kind, Place, Sweeping, Training

from accounting import PrivacyBudget
from dpml.cli import main as command

KINDS: dict[str, Kind] = {
    "train": Training(
        "train dpsgd --dataset digits --noise-multiplier 12 --delta 1e-5 --epochs 100 --batch-size 128",
        PrivacyBudget(1.05, 1e-5),
    ),
    "pate": Answering(
        f"train pate --dataset digits --noise-multiplier 10 --queries {QUERIES} --delta 1e-5 "
        "--student-epochs 2 --aggregator confident-gnmax --threshold 18 --threshold-noise 10",
        PrivacyBudget(17.0, 1e-5),
    ),
    "sweep": Sweeping(
        "sweep dpsgd-digits --noise-multiplier 2,4,8 --seeds 4 --epochs 2 --processes 2",
        PrivacyBudget(100.0, 1e-5),
    ),
}
TENTHS = 10
_LOOK = 0.02
SERVER = multiprocessing.get_context("forkserver")
LATE = ["sklearn.datasets", "torch._dynamo", "tensorboard.summary.writer.event_file_writer"]
"""What a run imports when it is on its way."""
SERVER.set_forkserver_preload(["kill_checks", "dpml.dpsgd", "dpml.pate.trainer", "recipes.sweep", *LATE])


@dataclass
class Outcome:
    """What became of one run.

    Attributes:
        seed: Of the moments.
        place: How it was made.
        seconds: Of an uninterrupted run.
        kills: The moment of each, as a share of an uninterrupted run, and what it met.
        failure: The error, if there was one.
    """

    seed: int
    place: Place
    seconds: float
    kills: list[tuple[float, str]] = field(default_factory=list)
    failure: str = ""


def forked_command(words: list[str], kind: Kind, place: Place, held: Connection) -> None:
    """The command in a child of a process that has imported everything; it notes what it releases."""
    os.setpgid(0, 0)
    with (place.path / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= place.environment
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        kind.record(patch, place)
        status = command(words)
    held.close()
    sys.exit(status)


def run(words: list[str], kind: Kind, place: Place, seconds: float | None) -> tuple[int, float]:
    """A command's exit status and its seconds; after so many it is killed, with all its processes.

    Seconds are those in which it did not wait for a core.
    """
    ended, held = multiprocessing.Pipe(duplex=False)  # it ends when none of the processes is left
    if place.forked:
        process = SERVER.Process(target=forked_command, args=(words, kind, place, held))
        process.start()
    else:
        with (place.path / "log").open("a") as log:
            process = subprocess.Popen(
                [Path(sys.executable).with_name("dpml"), *words],
                env={**os.environ, **place.environment},
                stdout=log,
                stderr=log,
                process_group=0,
                pass_fds=[held.fileno()],
            )
    held.close()
    began, own, left = time.monotonic(), 0.0, math.inf
    while not ended.poll(min(left, _LOOK)):
        own = time.monotonic() - began - waited(process.pid)
        left = math.inf if seconds is None else seconds - own
        if left <= 0:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not come to make its group, or has ended by itself
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            left = math.inf
    ended.close()
    if isinstance(process, subprocess.Popen):
        return process.wait(), own
    process.join()
    return process.exitcode, own


def waited(process: int) -> float:
    """Seconds that a process, or that one of its children that waited most, was ready and had no core."""
    longest = 0
    with suppress(OSError):  # it has ended, or the system does not tell
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        for each in (process, *children):
            longest = max(longest, int(Path(f"/proc/{each}/schedstat").read_text().split()[1]))
    return longest / 1e9


def uninterrupted(kind: Kind, path: Path, *, forked: bool) -> tuple[Path, float]:
    """The folder of a seeded run that nobody kills, and its duration, start-up included."""
    place = Place(path, kind.budget, secret=False, forked=forked)
    (ready := SERVER.Process()).start()  # the server imports everything before the clock starts
    ready.join()
    status, seconds = run(kind.begin(place), kind, place, None)
    if status:
        raise RuntimeError(f"exit status {status}: {(place.path / 'log').read_text()[-2000:]}")
    kind.check_whole(place, place.run)
    return place.run, seconds


def killed_run(kind: Kind, place: Place, other: Path, seconds: float, *, seed: int, kills: int) -> Outcome:
    """Kill a run and go on with it, at most so often, until it is completed; check it each time."""
    dice, outcome = random.Random(seed), Outcome(seed, place, seconds)
    words = kind.begin(place)
    try:
        while True:
            share = dice.random()
            wait = share * seconds if len(outcome.kills) < kills else None
            status, _ = run(words, kind, place, wait)
            if status == 0:
                break
            if status != -signal.SIGKILL:
                raise AssertionError(f"exit status {status}: {(place.path / 'log').read_text()[-2000:]}")
            outcome.kills.append((share, kind.check(place)))
            words = kind.go_on(place)
            if words[0] == "resume" and outcome.kills[-1][1] == "results written":
                status, _ = run(words, kind, place, None)
                assert status == 2, f"a complete run was resumed: exit status {status}"
                break
        kind.check_whole(place, other)
    except Exception:
        outcome.failure = traceback.format_exc()
    return outcome


def kill_all(kind: Kind, path: Path, *, seed: int, kills: int, forked: bool) -> Iterator[Outcome]:
    """Runs until there were so many kills, with a seed each."""
    path.mkdir(parents=True)
    other, seconds = uninterrupted(kind, path / "whole", forked=forked)
    while kills > 0:
        place = Place(path / f"{seed}", kind.budget, secret=bool(seed % 2), forked=forked)
        outcome = killed_run(kind, place, other, seconds, seed=seed, kills=kills)
        yield outcome
        if not outcome.failure:
            shutil.rmtree(place.path)
        seed, kills = seed + 1, kills - max(len(outcome.kills), bool(outcome.failure))


def figures(outcomes: list[Outcome]) -> dict[str, Any]:
    """What became of the runs of one kind."""
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    tenths = Counter(int(TENTHS * share) for share, _ in kills)
    good = [outcome for outcome in outcomes if not outcome.failure]
    return {
        "seconds_uninterrupted": {
            "forked" if outcome.place.forked else "afresh": round(outcome.seconds, 2) for outcome in outcomes
        },
        "kills": len(kills),
        "kills_of_the_command_started_afresh": sum(
            len(outcome.kills) for outcome in outcomes if not outcome.place.forked
        ),
        "kills_of_a_run_that_was_killed_before": sum(max(0, len(o.kills) - 1) for o in outcomes),
        "kills_by_tenth_of_the_duration": [tenths[tenth] for tenth in range(TENTHS)],
        "kills_by_what_they_met": dict(sorted(Counter(met for _, met in kills).items())),
        "runs": len(outcomes),
        "seeded_runs_identical": sum(not outcome.place.secret for outcome in good),
        "secret_runs_sound": sum(outcome.place.secret for outcome in good),
        "failures": [
            {
                "repeat": f"--seed {outcome.seed} --kills {len(outcome.kills)} "
                f"--fresh {0 if outcome.place.forked else len(outcome.kills)}",
                "kills": outcome.kills,
                "error": outcome.failure.strip().splitlines()[-1],
            }
            for outcome in outcomes
            if outcome.failure
        ],
    }


def measure(kind: Kind, path: Path, *, kills: int, fresh: int, seed: int) -> Iterator[dict[str, Any]]:
    """Kill runs of one kind so often, `fresh` of them started afresh; figures after each run."""
    outcomes: list[Outcome] = []
    for forked, wanted in ((False, min(fresh, kills)), (True, kills)):
        folder, first = path / ("forked" if forked else "afresh"), seed + len(outcomes)
        left = wanted - sum(len(outcome.kills) for outcome in outcomes)
        if left <= 0:
            continue
        for outcome in kill_all(kind, folder, seed=first, kills=left, forked=forked):
            outcomes.append(outcome)
            if outcome.failure:
                click.echo(f"FAILED, seed {outcome.seed}, left in {outcome.place.path}:\n{outcome.failure}")
            yield {"command": f"dpml {kind.words}", **figures(outcomes)}


@click.command()
@click.option("--kills", default=200, help="Of each kind.")
@click.option("--fresh", default=20, help="How many of them are of the command started afresh.")
@click.option("--kind", "names", multiple=True, type=click.Choice(list(KINDS)), help="By default all.")
@click.option("--seed", default=0, help="Of the first run's moments.")
@click.option("--save", type=click.Path(path_type=Path), help="Write the results as JSON.")
def main(kills: int, fresh: int, names: tuple[str, ...], seed: int, save: Path | None) -> None:
    """Kill, check, and print what was met."""
    found: dict[str, Any] = {}
    path, began = Path(tempfile.mkdtemp(prefix="kills-")), time.monotonic()
    for name in names or KINDS:
        for so_far in measure(KINDS[name], path / name, kills=kills, fresh=fresh, seed=seed):
            found[name] = so_far
            record = {
                "command": f"python tests/dpml/kills.py --kills {kills} --fresh {fresh} --seed {seed}",
                "date": datetime.now(UTC).date().isoformat(),
                "versions": {
                    "python": platform.python_version(),
                    **{p: version(p) for p in ("dpml", "torch")},
                },
                "seconds": round(time.monotonic() - began),
                "moments": "uniform from 0 to an uninterrupted run's duration, anew for each process",
                "kinds": found,
            }
            if save is not None:
                save.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
        click.echo(f"{name}: {json.dumps(found[name], indent=1, ensure_ascii=False)}")
    if any(kind["failures"] for kind in found.values()):
        sys.exit(1)
    shutil.rmtree(path)


if __name__ == "__main__":
    main()
