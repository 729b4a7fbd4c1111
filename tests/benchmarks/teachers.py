"""How fast teachers train together: against one after the other, with all threads and in two processes.

`python tests/benchmarks/teachers.py [--save docs/results/pate-teachers.json]`. Real MNIST (see `DPML_DATA`),
250 shards; rounds are interleaved. Each way trains the same models on the same shards: ridge regressions on
scattering features, which are computed beforehand, and convolutional networks as PATEConfig has them, which
take as many steps on batches drawn alike. All seconds are for 250 teachers; those of fewer are scaled.
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
from dpml.pate import native
from dpml.pate.config import PATEConfig
from dpml.pate.features import scattering
from dpml.pate.partition import Partition, default_places
from dpml.pate.teachers import Ensemble, _moved, draw_batches, train_convolutional, train_linear

TEACHERS = 250
DEFAULT = PATEConfig(non_private=True)


def shards(teachers: int) -> tuple[torch.Tensor, torch.Tensor, Partition]:
    """The first shards of the usual partition of MNIST into 250."""
    data = load("mnist")
    places = default_places(len(data.x_train), TEACHERS)
    whole = Partition.of(data.x_train, data.y_train, TEACHERS, places=places)
    return data.x_train, data.y_train, Partition(whole.members[:teachers])


def plain_ridge(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One teacher, as one would write it: centre, solve, transform."""
    target = nn.functional.one_hot(y, 10).float()
    centred, wanted = x - x.mean(dim=0), target - target.mean(dim=0)
    gram = centred @ centred.T
    gram.diagonal().add_(DEFAULT.ridge * gram.diagonal().mean())
    return centred.T @ torch.linalg.solve(gram, wanted)


def plain_network(x: torch.Tensor, y: torch.Tensor, seed: int) -> nn.Module:
    """One teacher, as one would write it: modules, an optimizer, a loop over batches that lie ready.

    Channels last and the fused optimizer are the fastest here, by some per cent.
    """
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(400, 10),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    steps, size = DEFAULT.teacher_steps, DEFAULT.teacher_batch_size
    rows, moves = draw_batches(torch.arange(len(y)), steps, size, DEFAULT.teacher_shift, seed)
    images = _moved(x[rows.flatten()], moves.flatten(0, 1)).contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=DEFAULT.teacher_learning_rate, momentum=0.9, nesterov=True, weight_decay=1e-4,
        fused=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch, classes in zip(images.split(size), y[rows], strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch), classes).backward()
        optimizer.step()
        schedule.step()
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


def together(kind: str, features: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[float, Ensemble]:
    """Seconds for all 250 teachers."""
    partition, config = shards(TEACHERS)[2], DEFAULT
    since = time.perf_counter()
    if kind == "linear":
        made: Ensemble = train_linear(
            features, labels, 10, partition, features="function", function=lambda x: x, ridge=config.ridge
        )
    else:
        made = train_convolutional(
            features, labels, 10, partition, steps=config.teacher_steps, batch_size=config.teacher_batch_size,
            learning_rate=config.teacher_learning_rate, shift=config.teacher_shift, seed=seed,
        )  # fmt: skip
    return time.perf_counter() - since, made


@click.command()
@click.option("--rounds", default=3)
@click.option("--networks", default=100, help="Convolutional teachers of the 250 that two processes train.")
@click.option("--alone", default=10, help="Those that one process trains with all threads.")
@click.option("--save", type=click.Path(path_type=Path))
def main(rounds: int, networks: int, alone: int, save: Path | None) -> None:
    """Time all ways, interleaved, in seconds for 250 teachers; print medians, and ensembles' accuracy."""
    cached = Path("runs") / "teachers-features.pt"
    cached.parent.mkdir(exist_ok=True)
    data = load("mnist")
    inputs, labels = data.x_train, data.y_train
    since = time.perf_counter()
    features = scattering(inputs)
    seconds_features = time.perf_counter() - since
    tests = {"linear": scattering(data.x_test), "convolutional": data.x_test}
    torch.save(features, cached)
    found: dict[str, dict[str, list[float]]] = {}
    together("convolutional", inputs, labels, 0)  # compiles the kernel, if need be
    for number in range(rounds):
        for kind, seen in (("linear", features), ("convolutional", inputs)):
            of = found.setdefault(kind, {})
            seconds, made = together(kind, seen, labels, number)
            of.setdefault("together", []).append(seconds)
            since = time.perf_counter()
            hits = made.votes(tests[kind]).argmax(dim=1) == data.y_test
            of.setdefault("votes on 10,000 inputs", []).append(time.perf_counter() - since)
            of.setdefault("ensemble accuracy, %", []).append(100 * hits.double().mean().item())
            some = TEACHERS if kind == "linear" else alone
            seconds = one_by_one(kind, seen, labels, shards(some)[2].members) * TEACHERS / some
            of.setdefault("one by one, all threads", []).append(seconds)
            some = TEACHERS if kind == "linear" else networks
            with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
                halves = [pool.submit(_half, kind, half, some, str(cached)) for half in range(2)]
                seconds = max(half.result() for half in halves) * TEACHERS / some
            of.setdefault("one by one, two processes", []).append(seconds)
            click.echo(f"{kind}: " + ", ".join(f"{way} {numbers[-1]:.2f}" for way, numbers in of.items()))
    cached.unlink()
    record = {
        "command": "python tests/benchmarks/teachers.py "
        f"--rounds {rounds} --networks {networks} --alone {alone}",
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernel": native.kernel() is not None,
        "features_seconds": seconds_features,
        "seconds for 250 teachers": found,
    }
    for kind, ways in found.items():
        for way, numbers in ways.items():
            median = statistics.median(numbers)
            ratio = (
                f"{median / statistics.median(ways['together']):6.2f} × together" if "one by" in way else ""
            )
            click.echo(f"{kind:14} {way:28} {median:8.2f} ({min(numbers):.2f} to {max(numbers):.2f}) {ratio}")
    click.echo(f"features of 60,000 images {seconds_features:.0f} s")
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
