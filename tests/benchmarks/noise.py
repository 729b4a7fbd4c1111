"""What exact noise costs: processor time of noisy sums, beside plain float64 noise from the same stream.

`python tests/benchmarks/noise.py [--save docs/results/noise-speed.json]`. Sums of as many numbers as the
models of the recipes have weights; rounds are interleaved.
"""

from __future__ import annotations

import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np

from dpml.exact import noised
from dpml.randomness import Randomness

SIZES = {"digits, linear": 650, "MNIST, linear on features": 39_700, "CIFAR-10, CNN": 550_570}


@click.command()
@click.option("--rounds", default=30)
@click.option("--save", type=click.Path(path_type=Path))
def main(rounds: int, save: Path | None) -> None:
    """Time both, interleaved; print medians."""
    found: dict[str, dict[str, float]] = {}
    for name, size in SIZES.items():
        values = np.random.default_rng(0).normal(size=size) * 10
        random = Randomness.secret()
        times: dict[str, list[float]] = {"plain": [], "exact": []}
        for _ in range(rounds):
            since = time.process_time()
            values + 1.1 * random.normals(size)
            between = time.process_time()
            noised(values, 1.1, random)
            times["plain"].append(between - since)
            times["exact"].append(time.process_time() - between)
        found[name] = {f"{way}, ms": 1000 * statistics.median(each) for way, each in times.items()}
        click.echo(f"{name:28} {size:9,} numbers: {found[name]}")
    if save is not None:
        record = {
            "command": f"python tests/benchmarks/noise.py --rounds {rounds}",
            "date": datetime.now(UTC).date().isoformat(),
            "processor time": found,
        }
        save.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
