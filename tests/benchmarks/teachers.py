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
import numpy as np
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


def now() -> np.ndarray:
    """Seconds on the clock, and of the processor: what others do on the machine changes these less."""
    return np.array([time.perf_counter(), time.process_time()])


def one_by_one(kind: str, features: torch.Tensor, labels: torch.Tensor, members: torch.Tensor) -> np.ndarray:
    """Both times for these shards, one after the other."""
    since = now()
    for number, row in enumerate(members):
        rows = row[row >= 0]
        if kind == "linear":
            plain_ridge(features[rows], labels[rows])
        else:
            plain_network(features[rows], labels[rows], number)
    return now() - since


def _half(kind: str, number: int, teachers: int, cached: str) -> np.ndarray:
    torch.set_num_threads(1)
    inputs, labels, partition = shards(teachers)
    features = torch.load(cached, weights_only=True, mmap=True) if kind == "linear" else inputs
    mine = partition.members[number::2]
    one_by_one(kind, features, labels, mine[:2])  # warm
    return one_by_one(kind, features, labels, mine)


def together(
    kind: str, features: torch.Tensor, labels: torch.Tensor, seed: int
) -> tuple[np.ndarray, Ensemble]:
    """Both times for all 250 teachers."""
    partition, config = shards(TEACHERS)[2], DEFAULT
    since = now()
    if kind == "linear":
        made: Ensemble = train_linear(
            features, labels, 10, partition, features="function", function=lambda x: x, ridge=config.ridge
        )
    else:
        made = train_convolutional(
            features, labels, 10, partition, steps=config.teacher_steps, batch_size=config.teacher_batch_size,
            learning_rate=config.teacher_learning_rate, shift=config.teacher_shift, seed=seed,
        )  # fmt: skip
    return now() - since, made


@click.command()
@click.option("--rounds", default=3)
@click.option("--kind", "kinds", multiple=True, default=("linear", "convolutional"))
@click.option("--networks", default=100, help="Convolutional teachers of the 250 that two processes train.")
@click.option("--alone", default=10, help="Those that one process trains with all threads.")
@click.option("--save", type=click.Path(path_type=Path))
def main(rounds: int, kinds: tuple[str, ...], networks: int, alone: int, save: Path | None) -> None:
    """Time all ways, interleaved, in seconds for 250 teachers; print medians, and ensembles' accuracy."""
    cached = Path("runs") / "teachers-features.pt"
    cached.parent.mkdir(exist_ok=True)
    data = load("mnist")
    seen, tests = {"convolutional": data.x_train}, {"convolutional": data.x_test}
    if "linear" in kinds:
        seen["linear"], tests["linear"] = scattering(data.x_train), scattering(data.x_test)
        torch.save(seen["linear"], cached)
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in kinds}

    def add(kind: str, way: str, times: np.ndarray) -> None:
        for clock, seconds in zip(("seconds", "processor seconds"), times.tolist(), strict=True):
            found[kind].setdefault(f"{way}: {clock}", []).append(seconds)

    for number in range(rounds):
        for kind in kinds:
            if number == 0:  # compiles the kernel, if need be
                train_convolutional(
                    data.x_train, data.y_train, 10, shards(2)[2], steps=1, batch_size=1, learning_rate=0.1,
                    shift=0, seed=0,
                )  # fmt: skip
            times, made = together(kind, seen[kind], data.y_train, number)
            add(kind, "together", times)
            since = now()
            hits = made.votes(tests[kind]).argmax(dim=1) == data.y_test
            add(kind, "votes on 10,000 inputs", now() - since)
            found[kind].setdefault("accuracy without noise, %", []).append(100 * hits.double().mean().item())
            some = TEACHERS if kind == "linear" else networks
            with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
                halves = [pool.submit(_half, kind, half, some, str(cached)) for half in range(2)]
                both = np.array([half.result() for half in halves])
            both = np.array([both[:, 0].max(), both[:, 1].sum()])
            add(kind, "one by one, two processes", both * TEACHERS / some)
            some = TEACHERS if kind == "linear" else alone
            times = one_by_one(kind, seen[kind], data.y_train, shards(some)[2].members)
            add(kind, "one by one, all threads", times * TEACHERS / some)
            click.echo(
                f"{kind}: " + ", ".join(f"{way} {values[-1]:.2f}" for way, values in found[kind].items())
            )
    cached.unlink(missing_ok=True)
    record = {
        "command": "python tests/benchmarks/teachers.py "
        + " ".join(f"--kind {kind}" for kind in kinds)
        + f" --rounds {rounds} --networks {networks} --alone {alone}",
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernel": native.kernel() is not None,
        "for 250 teachers": found,
    }
    for kind, ways in found.items():
        for way, values in ways.items():
            middle, own = statistics.median(values), way.rpartition(": ")[2]
            ratio = middle / statistics.median(ways[f"together: {own}"]) if "one by one" in way else None
            times = "" if ratio is None else f"{ratio:6.2f} × together"
            click.echo(f"{kind:14} {way:45} {middle:8.2f} ({min(values):.2f} to {max(values):.2f}) {times}")
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
