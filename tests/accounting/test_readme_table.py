"""The table of accounting/README.md: every cell is what the programs answer, the anchors' too."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import dp_accounting as google
import numpy as np
import prv_accountant as microsoft
import pytest
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from riskcal.accountants import CTDAccountant
from scipy.stats import binom, norm

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
    NeighboringRelation,
    PoissonSampled,
    PrivacyAccountant,
    RandomizedResponse,
    Repeated,
    ReportNoisyMax,
    SampledWithoutReplacement,
    ShuffledEpoch,
    SmoothRelease,
    UnsupportedEvent,
)
from accounting.tradeoff import tpr_at_fpr

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its docstrings have invalid escapes
    from autodp import mechanism_zoo as zoo
    from autodp import rdp_bank
    from autodp.autodp_core import Mechanism
    from autodp.transformer_zoo import AmplificationBySampling, Composition

README = Path(__file__).parents[2] / "accounting" / "README.md"
DELTA = 1e-4
RELEASES = (1, 50)
ADD: NeighboringRelation = "add-or-remove-one"
REPLACE: NeighboringRelation = "replace-one"
AUTODP_WARNS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # at the ends of its searches


@dataclass(frozen=True)
class Row:
    """An event of ours, and of the anchors that have one.

    Opacus and riskcal know Gaussians, on Poisson samples or on all data, and nothing else. autodp's events
    are made anew for each question, under `relation`.
    """

    name: str
    event: Event
    theirs: google.DpEvent | None = None
    prv: microsoft.PrivacyRandomVariable | None = None
    autodp: Callable[[], Mechanism] | None = None
    relation: NeighboringRelation = ADD


class Stated(Mechanism):  # type: ignore[misc]
    """autodp's way to add a mechanism: one guarantee, and its kind."""

    def __init__(self, guarantee: object, kind: str) -> None:
        super().__init__()
        self.name, self.params = "stated", {}
        self.propagate_updates(guarantee, kind)


def sampled(mechanism: Mechanism) -> Mechanism:
    return AmplificationBySampling()(mechanism, 0.1)


def fixed_size(mechanism: Mechanism) -> Mechanism:
    mechanism.neighboring = "replace_one"  # of which autodp cannot know
    return AmplificationBySampling(PoissonSampling=False)(mechanism, 0.1)


def gnmax_rdp(order: float) -> float:
    return rdp_bank.RDP_inde_pate_gaussian({"sigma": 20.0}, order)


def screen_rdp(order: float) -> float:
    return rdp_bank.RDP_independent_noisy_screen({"sigma": 20.0, "thresh": 100, "k": 200}, order)


def poisson(event: google.DpEvent) -> google.DpEvent:
    return google.PoissonSampledDpEvent(0.1, event)


TWO = google.ComposedDpEvent([google.GaussianDpEvent(2.0), google.LaplaceDpEvent(2.0)])
ROWS = [
    Row(
        "Gaussian",
        Gaussian(2.0),
        google.GaussianDpEvent(2.0),
        microsoft.GaussianMechanism(2.0),
        lambda: zoo.GaussianMechanism(2.0),
    ),
    Row(
        "Laplace",
        Laplace(2.0),
        google.LaplaceDpEvent(2.0),
        microsoft.LaplaceMechanism(1 / 2.0),
        lambda: zoo.LaplaceMechanism(2.0),
    ),
    Row("discrete Gaussian", DiscreteGaussian(2.0), autodp=lambda: zoo.DiscreteGaussianMechanism(2.0)),
    Row(
        "randomised response",
        RandomizedResponse(0.5, 2),
        google.RandomizedResponseDpEvent(0.5, 2),
        autodp=lambda: zoo.RandresponseMechanism(0.75),
        relation=REPLACE,
    ),
    Row("exponential mechanism", ExponentialMechanism(0.5), autodp=lambda: zoo.ExponentialMechanism(0.5)),
    Row("report noisy max", ReportNoisyMax(0.5)),
    Row(
        "(ε, 0)-DP",
        EpsilonDelta(1.0),
        prv=microsoft.PureDPMechanism(1.0),
        autodp=lambda: zoo.PureDP_Mechanism(1.0),
    ),
    Row(
        "(ε, δ)-DP",
        EpsilonDelta(1.0, 1e-6),
        prv=microsoft.ApproximateDPMechanism(1.0, 1e-6),
        autodp=lambda: Stated((1.0, 1e-6), "approxDP"),
    ),
    Row("zCDP", ZCDP(0.1), google.ZCDpEvent(0.1), autodp=lambda: zoo.zCDP_Mechanism(0.1)),
    Row("PATE: GNMax answer", GNMax(20.0), autodp=lambda: Stated(gnmax_rdp, "RDP")),
    Row("PATE: GNMax threshold check", GNMaxThreshold(20.0), autodp=lambda: Stated(screen_rdp, "RDP")),
    Row("PATE: LNMax answer", LNMax(20.0)),
    Row("PATE: sanitised bound", SmoothRelease(0.05, 5.0)),
    Row(
        "best of a random number of runs",
        BestOfRuns(Gaussian(5.0), 10.0),
        RepeatAndSelectDpEvent(google.GaussianDpEvent(5.0), 10.0, 1.0),
    ),
    Row(
        "Poisson: Gaussian",
        PoissonSampled(Gaussian(2.0), 0.1),
        poisson(google.GaussianDpEvent(2.0)),
        microsoft.PoissonSubsampledGaussianMechanism(0.1, 2.0),
        lambda: sampled(zoo.GaussianMechanism(2.0)),
    ),
    Row(
        "Poisson: Laplace",
        PoissonSampled(Laplace(2.0), 0.1),
        poisson(google.LaplaceDpEvent(2.0)),
        autodp=lambda: sampled(zoo.LaplaceMechanism(2.0)),
    ),
    Row(
        "Poisson: exponential mechanism",
        PoissonSampled(ExponentialMechanism(0.5), 0.1),
        autodp=lambda: sampled(zoo.ExponentialMechanism(0.5)),
    ),
    Row(
        "Poisson: (ε, δ)-DP",
        PoissonSampled(EpsilonDelta(0.5, 1e-6), 0.1),
        autodp=lambda: sampled(Stated((0.5, 1e-6), "approxDP")),
    ),
    Row(
        "Poisson: Gaussian and Laplace on one sample",
        PoissonSampled(Composed([Gaussian(2.0), Laplace(2.0)]), 0.1),
        poisson(TWO),
        autodp=lambda: sampled(
            Composition()([zoo.GaussianMechanism(2.0), zoo.LaplaceMechanism(2.0)], [1, 1])
        ),
    ),
    # autodp's noise is over the sensitivity, which replacing a record doubles.
    Row(
        "fixed size: Gaussian",
        SampledWithoutReplacement(Gaussian(2.0), 10, 100),
        google.SampledWithoutReplacementDpEvent(100, 10, google.GaussianDpEvent(2.0)),
        autodp=lambda: fixed_size(zoo.GaussianMechanism(1.0)),
        relation=REPLACE,
    ),
    Row(
        "fixed size: Laplace",
        SampledWithoutReplacement(Laplace(2.0), 10, 100),
        autodp=lambda: fixed_size(zoo.LaplaceMechanism(1.0)),
        relation=REPLACE,
    ),
    Row("shuffled epoch (no amplification)", ShuffledEpoch(Gaussian(2.0))),
]


def ours(event: Event, method: str) -> str:
    """What our accountant has, under any relation."""
    answers = set()
    for relation in RELATIONS:
        accountant = PrivacyAccountant(method, neighboring_relation=relation)  # type: ignore[arg-type]
        try:
            accountant.record(event)
            lower, upper = accountant.epsilon_bounds(DELTA)
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


def certified(row: Row, releases: int) -> tuple[float, float]:
    """Our bounds, (0, ∞) where there are none."""
    accountant = PrivacyAccountant("pld", neighboring_relation=row.relation)
    try:
        accountant.record(Repeated(row.event, releases))
        return accountant.epsilon_bounds(DELTA)
    except UnsupportedEvent:
        return 0.0, math.inf


def verdict(row: Row, bounds: Callable[[int], tuple[float, float]]) -> str:
    """What an anchor's (lower, upper) is worth: bounds that ours prove wrong are an estimate."""
    sound, two_sided = True, True
    for releases in RELEASES:
        (lower, upper), (low, high) = bounds(releases), certified(row, releases)
        if upper == math.inf:
            return "–"
        sound &= low <= upper and lower <= high
        two_sided &= lower > 0
    return "estimate" if not sound else "both" if two_sided else "upper"


def prv(row: Row) -> str:
    if row.prv is None:
        return "–"
    return verdict(row, lambda releases: prv_bounds(row.prv, releases, DELTA))


def prv_bounds(variable: microsoft.PrivacyRandomVariable, releases: int, delta: float) -> tuple[float, float]:
    accountant = microsoft.PRVAccountant(
        variable, eps_error=0.05, delta_error=delta / 1000, max_self_compositions=releases
    )
    lower, _, upper = accountant.compute_epsilon(delta, [releases])
    return lower, upper


def autodp(row: Row) -> str:
    make = row.autodp
    if make is None:
        return "–"
    return verdict(row, lambda releases: (0.0, float(Composition()([make()], [releases]).get_eps(DELTA))))


def of_gaussians(row: Row) -> tuple[float, float] | None:
    """Noise multiplier and sampling probability, if the row is about Gaussians."""
    match row.event:
        case Gaussian(noise):
            return noise, 1.0
        case PoissonSampled(Gaussian(noise), probability):
            return noise, probability
    return None


def riskcal(row: Row) -> str:
    step = of_gaussians(row)
    if step is None:
        return "–"

    def bounds(releases: int) -> tuple[float, float]:
        accountant = CTDAccountant()
        for _ in range(releases):
            accountant.step(noise_multiplier=step[0], sample_rate=step[1])
        return 0.0, accountant.get_epsilon(delta=DELTA)

    return verdict(row, bounds)


def line(row: Row) -> str:
    cells = [
        row.name,
        ours(row.event, "pld"),
        ours(row.event, "rdp"),
        theirs(row.theirs, PLDAccountant),
        theirs(row.theirs, RdpAccountant),
        "upper" if of_gaussians(row) else "–",  # Opacus
        prv(row),
        autodp(row),
        riskcal(row),
    ]
    return f"| {' | '.join(cells)} |"


@AUTODP_WARNS
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_readme_says_what_is_supported(row: Row) -> None:
    assert line(row) in README.read_text().splitlines()


# ---------------------------------------------------------------- where an anchor is below the truth


def test_prv_accountant_is_below_the_exact_delta_of_many_pure_releases() -> None:
    _, upper = prv_bounds(microsoft.PureDPMechanism(1.0), 50, 1e-5)
    ones = np.arange(51)  # of 50 answers of randomised response, each with loss ±1
    losses = 2.0 * ones - 50
    delta = np.sum(binom.pmf(ones, 50, 1 / (1 + math.exp(-1))) * np.maximum(-np.expm1(upper - losses), 0))
    assert upper < 43.98
    assert delta > 2.9e-5  # where PRV promises 1e-5
    bounds = PrivacyAccountant(neighboring_relation=ADD)
    bounds.record(Repeated(EpsilonDelta(1.0), 50))
    assert bounds.epsilon_bounds(1e-5)[0] > 45.67


@AUTODP_WARNS
def test_autodp_is_below_the_exact_delta_of_a_threshold_check() -> None:
    claimed = float(Stated(screen_rdp, "RDP").get_eps(DELTA))
    passed, passed_by_neighbour = norm.sf([48 / 20, 49 / 20])  # 52 votes or 51, σ = 20, threshold 100
    assert claimed < 0.041
    assert passed - math.exp(0.125) * passed_by_neighbour > DELTA


@AUTODP_WARNS
def test_autodp_s_fourier_accountant_gives_a_negative_epsilon() -> None:
    assert zoo.GaussianMechanism(2.0, phi_off=False).get_eps(DELTA) < 0


@pytest.mark.slow
def test_riskcal_s_true_positive_rate_is_below_what_an_attack_reaches() -> None:
    accountant = CTDAccountant()
    accountant.history = [(0.8, 0.01, 1_000)]
    plan = Repeated(PoissonSampled(Gaussian(0.8), 0.01), 1_000)
    lower, upper = tpr_at_fpr(plan, 0.01, neighboring_relation=ADD)
    assert 1 - accountant.get_beta(alpha=0.01) < 0.99905 * lower
    assert 1 - accountant.get_beta(alpha=0.01, grid_step=2e-5) < 0.96 * lower
    assert upper < 1.001 * lower


if __name__ == "__main__":
    print("\n".join(map(line, ROWS)))
