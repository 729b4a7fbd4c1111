"""What safety costs: the share of a private step that ledger, checkpoints and exact noise take.

    DPML_DATA=… python tests/benchmarks/safety.py [--rounds 5] [--save docs/results/safety-speed.json]

Each case trains with a ledger and an output folder on this disk, as a command would. It counts the wall-clock
time (an fsync waits, and burns no processor time) of steps, noise, commits and checkpoints, but not that of
evaluation and TensorBoard. Plain noise is float64 noise from the same generator, drawn and thrown away once
a step, outside of the step's time, for comparison. The table gives medians over rounds and their range.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import dpml
from accounting import PrivacyBudget, Reservation
from accounting.ledger import Ledger
from dpml.checkpoint import Checkpoint
from dpml.dpsgd import model_name
from dpml.features import features_of
from dpml.noise import GaussianNoise
from recipes import cifar10, digits, mnist

BUDGET = PrivacyBudget(1e6, 1e-5)
Case = tuple[Callable[[], Any], TensorDataset, dpml.DPSGDConfig]


def cases() -> dict[str, Case]:
    """Model, records and settings by name: those of recipes, shortened."""

    def case(run: Any, epochs: float) -> Case:
        data = dpml.load(run.dataset)
        x = data.x_train if run.features == "none" else features_of(run.features, data)[0]
        names = dpml.DPSGDConfig.__dataclass_fields__
        settings = {k: v for k, v in vars(run).items() if k in names}
        settings |= {"epochs": epochs, "epsilon": None, "noise_multiplier": 2.0, "delta": 1e-5}
        return (
            lambda: dpml.build(model_name(run, data), tuple(x.shape[1:]), data.classes),
            TensorDataset(x, data.y_train),
            dpml.DPSGDConfig(**settings),
        )

    return {
        "digits, softmax regression × 512": case(digits.dpsgd(), 60),
        "MNIST, linear on features × 8,192": case(mnist.dpsgd(), 5),
        "MNIST, CNN × 256": case(replace(mnist.papernot2020(), batch_size=256), 1),
        "CIFAR-10, CNN × 256": case(replace(cifar10.papernot2020(), batch_size=256), 0.1),
    }


@contextmanager
def timed() -> Iterator[Counter[str]]:
    """Seconds spent by what, of all runs in the block."""
    seconds: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds[name] += time.perf_counter() - began

        return wrapper

    exact = counted("exact noise", GaussianNoise.add)

    def both(self: GaussianNoise, sums: Sequence[Tensor], clip_norm: float) -> list[Tensor]:
        began = time.perf_counter()
        size = sum(part.numel() for part in sums)
        plain = torch.cat([part.flatten() for part in sums]).numpy() + self.randomness.normals(size)
        assert plain.shape == (size,)
        seconds["plain noise"] += time.perf_counter() - began
        noisy: list[Tensor] = exact(self, sums, clip_norm)
        return noisy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reservation, "commit", counted("ledger", Reservation.commit))
        patch.setattr(Checkpoint, "keep", counted("checkpoints", Checkpoint.keep))
        patch.setattr(GaussianNoise, "add", both)
        yield seconds


def shares(case: Case, folder: Path) -> dict[str, float]:
    """Of one run: milliseconds a step, and shares of it."""
    make, records, config = case
    ledger = Ledger(folder / "ledger.sqlite")
    ledger.declare("records", BUDGET)
    torch.manual_seed(0)
    with timed() as seconds:
        result = dpml.train_dpsgd(
            make(), records, config, accountant=ledger.accountant("records"), output=folder / "run"
        )
    # Checkpoints are written between two steps, outside of what counts as training.
    total = result.summary["train_seconds"] - seconds["plain noise"] + seconds["checkpoints"]
    names = ("ledger", "checkpoints", "exact noise", "plain noise")
    return {"ms a step": 1e3 * total / result.summary["steps"]} | {n: seconds[n] / total for n in names}


@click.command()
@click.option("--rounds", default=5)
@click.option("--save", type=click.Path(path_type=Path))
def main(rounds: int, save: Path | None) -> None:
    """Measure all cases, interleaved; print medians and ranges."""
    torch.set_num_threads(1)
    every = cases()
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in every}
    for _ in range(rounds):
        for name, case in every.items():
            with tempfile.TemporaryDirectory() as folder:
                rows[name].append(shares(case, Path(folder)))
    table = {
        name: {key: _summary([row[key] for row in runs]) for key in runs[0]} for name, runs in rows.items()
    }
    for name, row in table.items():
        milliseconds, _, _ = row["ms a step"]
        costs = {key: values for key, values in row.items() if key != "ms a step"}
        words = (f"{key} {m:.2%} ({low:.2%} to {high:.2%})" for key, (m, low, high) in costs.items())
        click.echo(f"{name}: {milliseconds:.2f} ms a step; {', '.join(words)}")
    if save is not None:
        record = {
            "command": f"python tests/benchmarks/safety.py --rounds {rounds}",
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {package: version(package) for package in ("dpml", "torch", "numpy")},
            "median, least, most": table,
        }
        save.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _summary(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


if __name__ == "__main__":
    main()
