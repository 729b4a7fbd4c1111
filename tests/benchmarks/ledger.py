"""What the ledger costs: DP-SGD with and without it, in pairs of runs, turn and turn about.

    DPML_DATA=… python tests/benchmarks/ledger.py [--rounds 5] [--save FILE]

Each case trains the same plan with an accountant in memory and with one of a ledger on this disk. What is
compared is the wall-clock time of the steps (an fsync waits, and burns no processor time), from the first
commit to the last, and which share of it was spent in commits: a busy machine disturbs that less. The table
gives medians over the rounds and their spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

import dpml
from accounting import PrivacyAccountant, PrivacyBudget, Reservation
from accounting.ledger import Ledger

BUDGET = PrivacyBudget(1e6, 1e-5)


def cases() -> dict[str, tuple[Callable[[], Any], TensorDataset, dpml.DPSGDConfig]]:
    """Model, records and settings by name: the digits recipe, and steps of the MNIST recipe's size."""
    digits, mnist = dpml.load("digits"), dpml.load("mnist")
    common: dict[str, Any] = {"noise_multiplier": 1.0, "delta": 1e-5, "clip_norm": 0.5, "learning_rate": 0.3}
    small = dpml.DPSGDConfig(**common, epochs=60, batch_size=512, micro_batch_size=512)
    large = dpml.DPSGDConfig(**common, epochs=4, batch_size=256)
    return {
        "digits, softmax regression, B = 512": (
            lambda: dpml.build("linear", digits.example_shape, digits.classes),
            TensorDataset(digits.x_train, digits.y_train),
            small,
        ),
        "MNIST, CNN, B = 256": (
            lambda: dpml.build("cnn", mnist.example_shape, mnist.classes),
            TensorDataset(mnist.x_train, mnist.y_train),
            large,
        ),
    }


class Timer:
    """When each commit of a run began, and how long it took."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.commits: list[float] = []
        self._commit = Reservation.commit

    def __enter__(self) -> Timer:
        times, commits, commit = self.times, self.commits, self._commit

        def timed(self: Reservation, *args: Any) -> None:
            times.append(time.perf_counter())
            commit(self, *args)
            commits.append(time.perf_counter() - times[-1])

        Reservation.commit = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Reservation.commit = self._commit  # type: ignore[method-assign]

    @property
    def per_step(self) -> float:
        """Seconds of a step: the last one's own is left out on both sides."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)

    @property
    def share(self) -> float:
        """Share of this time that was spent in commits."""
        return sum(self.commits[:-1]) / (self.times[-1] - self.times[0])


def timed_run(case: Any, accountant: PrivacyAccountant) -> Timer:
    """The times of a run's commits."""
    make, records, config = case
    torch.manual_seed(0)
    with Timer() as timer:
        dpml.train_dpsgd(make(), records, replace(config, insecure_noise_seed=0), accountant=accountant)
    return timer


def measure(name: str, case: Any, folder: Path, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    without, with_ledger, ratios, shares, leases = [], [], [], [], 0
    for number in range(rounds):
        ledger = Ledger(folder / f"{name}-{number}.sqlite")
        ledger.declare("records", BUDGET)
        pair = {}
        for kind in ("without", "with") if number % 2 else ("with", "without"):
            accountant = ledger.accountant("records") if kind == "with" else PrivacyAccountant(budget=BUDGET)
            pair[kind] = timed_run(case, accountant)
        without.append(pair["without"].per_step)
        with_ledger.append(pair["with"].per_step)
        ratios.append(pair["with"].per_step / pair["without"].per_step)
        shares.append(pair["with"].share)
        leases = sum(entry.kind == "lease" for entry in ledger.entries())
    return {
        "case": name,
        "steps": len(pair["with"].times),
        "leases": leases,
        "ms_per_step_without": 1e3 * statistics.median(without),
        "ms_per_step_with": 1e3 * statistics.median(with_ledger),
        "ratio_median": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "share_of_commits_median": statistics.median(shares),
        "share_of_commits_range": [min(shares), max(shares)],
    }


def lease_seconds(folder: Path, count: int = 30) -> float:
    """The median time of one durable entry."""
    ledger = Ledger(folder / "lease.sqlite")
    times = []
    for number in range(count):
        began = time.perf_counter()
        ledger.declare(f"records {number}", BUDGET)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    """Print the table; save it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        entry = lease_seconds(Path(folder))
        rows = [measure(name, case, Path(folder), options.rounds) for name, case in cases().items()]
    print(f"one durable entry: {1e3 * entry:.1f} ms")
    for row in rows:
        low, high = row["ratio_range"]
        least, most = row["share_of_commits_range"]
        print(
            f"{row['case']}: {row['ms_per_step_without']:.2f} ms a step without, "
            f"{row['ms_per_step_with']:.2f} with a ledger, ratio {row['ratio_median']:.4f} "
            f"({low:.4f} to {high:.4f}), in commits {row['share_of_commits_median']:.2%} ({least:.2%} to "
            f"{most:.2%}); {row['leases']} leases for {row['steps']} steps"
        )
    if options.save:
        record = {"rounds": options.rounds, "entry_ms": 1e3 * entry, "rows": rows}
        options.save.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
