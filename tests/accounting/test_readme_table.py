"""The table of accounting/README.md: every cell is what the programs answer, the anchors' too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dp_accounting as google
import pytest
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from accounting import (
    RELATIONS,
    ZCDP,
    BestOfRuns,
    Composed,
    DiscreteGaussian,
    EpsilonDelta,
    Event,
    ExponentialMechanism,
    Gaussian,
    GNMax,
    GNMaxThreshold,
    Laplace,
    LNMax,
    PoissonSampled,
    PrivacyAccountant,
    RandomizedResponse,
    ReportNoisyMax,
    SampledWithoutReplacement,
    ShuffledEpoch,
    SmoothRelease,
    UnsupportedEvent,
)

README = Path(__file__).parents[2] / "accounting" / "README.md"


@dataclass(frozen=True)
class Row:
    """An event of ours, and of dp-accounting where it has one. Opacus knows Gaussians on Poisson samples."""

    name: str
    event: Event
    theirs: google.DpEvent | None = None
    opacus: bool = False


def poisson(event: google.DpEvent) -> google.DpEvent:
    return google.PoissonSampledDpEvent(0.1, event)


TWO = google.ComposedDpEvent([google.GaussianDpEvent(2.0), google.LaplaceDpEvent(2.0)])
ROWS = [
    Row("Gaussian", Gaussian(2.0), google.GaussianDpEvent(2.0), opacus=True),
    Row("Laplace", Laplace(2.0), google.LaplaceDpEvent(2.0)),
    Row("discrete Gaussian", DiscreteGaussian(2.0)),
    Row("randomised response", RandomizedResponse(0.5, 3), google.RandomizedResponseDpEvent(0.5, 3)),
    Row("exponential mechanism", ExponentialMechanism(0.5)),
    Row("report noisy max", ReportNoisyMax(0.5)),
    Row("(ε, 0)-DP", EpsilonDelta(0.5)),
    Row("(ε, δ)-DP", EpsilonDelta(0.5, 1e-6)),
    Row("zCDP", ZCDP(0.1), google.ZCDpEvent(0.1)),
    Row("PATE: GNMax answer", GNMax(20.0)),
    Row("PATE: GNMax threshold check", GNMaxThreshold(20.0)),
    Row("PATE: LNMax answer", LNMax(20.0)),
    Row("PATE: sanitised bound", SmoothRelease(0.05, 5.0)),
    Row(
        "best of a random number of runs",
        BestOfRuns(Gaussian(5.0), 10.0),
        RepeatAndSelectDpEvent(google.GaussianDpEvent(5.0), 10.0, 1.0),
    ),
    Row("Poisson: Gaussian", PoissonSampled(Gaussian(2.0), 0.1), poisson(google.GaussianDpEvent(2.0)), True),
    Row("Poisson: Laplace", PoissonSampled(Laplace(2.0), 0.1), poisson(google.LaplaceDpEvent(2.0))),
    Row("Poisson: exponential mechanism", PoissonSampled(ExponentialMechanism(0.5), 0.1)),
    Row("Poisson: (ε, δ)-DP", PoissonSampled(EpsilonDelta(0.5, 1e-6), 0.1)),
    Row(
        "Poisson: Gaussian and Laplace on one sample",
        PoissonSampled(Composed([Gaussian(2.0), Laplace(2.0)]), 0.1),
        poisson(TWO),
    ),
    Row(
        "fixed size: Gaussian",
        SampledWithoutReplacement(Gaussian(2.0), 10, 100),
        google.SampledWithoutReplacementDpEvent(100, 10, google.GaussianDpEvent(2.0)),
    ),
    Row("fixed size: Laplace", SampledWithoutReplacement(Laplace(2.0), 10, 100)),
    Row("shuffled epoch (no amplification)", ShuffledEpoch(Gaussian(2.0))),
]


def ours(event: Event, method: str) -> str:
    """What our accountant has, under any relation."""
    answers = set()
    for relation in RELATIONS:
        accountant = PrivacyAccountant(method, neighboring_relation=relation)  # type: ignore[arg-type]
        try:
            accountant.record(event)
            lower, upper = accountant.epsilon_bounds(1e-4)
        except UnsupportedEvent:
            continue
        assert 0 <= lower <= upper < math.inf
        answers.add("upper" if method == "rdp" else "both" if lower > 0 else "upper")
    assert len(answers) <= 1
    return answers.pop() if answers else "–"


def theirs(event: google.DpEvent | None, accountant: type[google.PrivacyAccountant]) -> str:
    if event is None:
        return "–"
    known = (accountant(neighboring_relation=relation).supports(event) for relation in supported(accountant))
    return "upper" if any(known) else "–"


def supported(accountant: type[google.PrivacyAccountant]) -> Iterator[google.NeighboringRelation]:
    for relation in google.NeighboringRelation:
        try:
            accountant(neighboring_relation=relation)
        except ValueError:
            continue
        yield relation


def line(row: Row) -> str:
    cells = [
        row.name,
        ours(row.event, "pld"),
        ours(row.event, "rdp"),
        theirs(row.theirs, PLDAccountant),
        theirs(row.theirs, RdpAccountant),
        "upper" if row.opacus else "–",
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_readme_says_what_is_supported(row: Row) -> None:
    assert line(row) in README.read_text().splitlines()


if __name__ == "__main__":
    print("\n".join(map(line, ROWS)))
