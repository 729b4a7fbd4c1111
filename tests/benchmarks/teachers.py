"""How fast teachers train together: against one after the other, with all threads and in two processes.

`python tests/benchmarks/teachers.py [--save docs/results/pate-teachers.json]`. Real MNIST (see `DPML_DATA`),
250 shards; rounds are interleaved. Each way trains the same models on the same shards: ridge regressions on
scattering features, which are computed beforehand, and convolutional networks, which take the same steps.
"""

from __future__ import annotations

import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

import click
import torch
from torch import nn

from dpml.data import load
from dpml.pate.features import scattering
from dpml.pate.partition import Partition, default_places
from dpml.pate.teachers import new_networks, train_convolutional, train_linear

RIDGE, STEPS, BATCH = 0.02, 60, 32


def shards(teachers: int) -> tuple[torch.Tensor, torch.Tensor, Partition]:
    """The first shards of the usual partition of MNIST into 250."""
    data = load("mnist")
    places = default_places(len(data.x_train), 250)
    whole = Partition.of(data.x_train, data.y_train, 250, places=places)
    return data.x_train, data.y_train, Partition(whole.members[:teachers])


def plain_ridge(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One teacher, as one would write it: centre, solve, transform."""
    target = nn.functional.one_hot(y, 10).float()
    centred, wanted = x - x.mean(dim=0), target - target.mean(dim=0)
    gram = centred @ centred.T
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return centred.T @ torch.linalg.solve(gram, wanted)


def plain_network(x: torch.Tensor, y: torch.Tensor, seed: int) -> nn.Module:
    """One teacher, as one would write it: modules, an optimizer, a loop."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    for _ in range(STEPS):
        rows = torch.randint(len(y), (BATCH,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    return net


def one_by_one(kind: str, features: torch.Tensor, labels: torch.Tensor, members: torch.Tensor) -> float:
    """Seconds for these shards, one after the other."""
    since = time.perf_counter()
    for number, row in enumerate(members):
        rows = row[row >= 0]
        if kind == "linear":
            plain_ridge(features[rows], labels[rows])
        else:
            plain_network(features[rows], labels[rows], number)
    return time.perf_counter() - since


def _half(kind: str, number: int, teachers: int, cached: str) -> float:
    torch.set_num_threads(1)
    inputs, labels, partition = shards(teachers)
    features = torch.load(cached, weights_only=True, mmap=True) if kind == "linear" else inputs
    mine = partition.members[number::2]
    one_by_one(kind, features, labels, mine[:2])  # warm
    return one_by_one(kind, features, labels, mine)


@click.command()
@click.option("--rounds", default=3)
@click.option("--networks", default=50, help="Convolutional teachers of the 250 that are timed.")
@click.option("--save", type=click.Path(path_type=Path))
def main(rounds: int, networks: int, save: Path | None) -> None:
    """Time all ways, interleaved; print medians."""
    cached = Path("runs") / "teachers-features.pt"
    cached.parent.mkdir(exist_ok=True)
    inputs, labels, _ = shards(1)
    since = time.perf_counter()
    features = scattering(inputs)
    seconds_features = time.perf_counter() - since
    torch.save(features, cached)
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for kind, teachers in (("linear", 250), ("convolutional", networks)):
            partition = shards(teachers)[2]
            times = found.setdefault(kind, {})
            since = time.perf_counter()
            if kind == "linear":
                train_linear(
                    features, labels, 10, partition, features="function", function=lambda x: x, ridge=RIDGE
                )
            else:
                train_convolutional(
                    inputs, labels, 10, partition, steps=STEPS, batch_size=BATCH, learning_rate=0.05, seed=0
                )
            times.setdefault("together", []).append(time.perf_counter() - since)
            alone = one_by_one(kind, features if kind == "linear" else inputs, labels, partition.members)
            times.setdefault("one by one, all threads", []).append(alone)
            with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
                halves = [pool.submit(_half, kind, number, teachers, str(cached)) for number in range(2)]
                times.setdefault("one by one, two processes", []).append(max(h.result() for h in halves))
    cached.unlink()
    assert set(new_networks(1, (1, 28, 28), 10, 0))  # the networks that plain_network spells out
    record = {
        "command": f"python tests/benchmarks/teachers.py --rounds {rounds} --networks {networks}",
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "features_seconds": seconds_features,
        "seconds": found,
    }
    for kind, times in found.items():
        for way, seconds in times.items():
            ratio = statistics.median(seconds) / statistics.median(times["together"])
            click.echo(f"{kind:14} {way:28} {statistics.median(seconds):8.2f} s  {ratio:5.2f} × together")
    click.echo(f"features of 60,000 images {seconds_features:.0f} s")
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
