"""An audit of PATE's aggregation: many answers of the executed aggregator to neighbouring votes.

One changed record changes one teacher's vote at most, and so two counts by one (√2 in L2). For several pairs
of such histograms, the aggregator that would serve the teachers draws many outcomes of one query, refused or
a class. An outcome that is more likely on one side than the accounted ε of a query allows is a contradiction.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import binom

from accounting import Composed, Event, GNMax, GNMaxThreshold, LNMax, PrivacyAccountant, UserError
from accounting.events import check_instance
from dpml.audit.bounds import clopper_pearson, clopper_pearson_epsilon
from dpml.audit.config import PATEAuditConfig
from dpml.audit.report import AuditReport, Bound, Check
from dpml.outputs import RunFolder
from dpml.pate.aggregation import Aggregator
from dpml.pate.answers import REFUSED
from dpml.randomness import Randomness

_LEADS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # of the first class, in noise on the two counts' difference
_MARGINS = (-1.0, 0.0, 1.0)  # of the largest count beyond the threshold, in noise on it
_BLOCK = 100_000
Outcomes = npt.NDArray[np.int64]
Counts = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NoiseFound:
    """How much noise one part of the aggregator was seen to add, in votes.

    Attributes:
        part: "answer" or "check".
        accounted: The accounted scale.
        upper: A bound on the executed one, if its law is the accounted one.
        p_value: The probability of as little noise as was seen, or less, at the accounted scale.
    """

    part: str
    accounted: float
    upper: float
    p_value: float


def audit_pate(
    aggregator: Aggregator,
    config: PATEAuditConfig | None = None,
    *,
    randomness: Randomness | None = None,
    output: str | os.PathLike[str] | None = None,
) -> AuditReport:
    """Bound the ε of one query from below by the outcomes of many, for neighbouring votes.

    Args:
        aggregator: The mechanism; all that is drawn comes from its `check` and `choose`.
        config: How to audit.
        randomness: Where noise comes from; secret by default.
        output: A new folder for `audit.json`, `audit.md` and `audit.png`.

    Raises:
        UserError: for an aggregator without noise, or a folder that cannot be written to.
    """
    config = PATEAuditConfig() if config is None else config
    randomness = Randomness.secret() if randomness is None else randomness
    check_instance(aggregator, Aggregator, "aggregator", "audit_pate")
    check_instance(config, PATEAuditConfig, "config", "audit_pate")
    check_instance(randomness, Randomness, "randomness", "audit_pate")
    delta, draws = config.delta, config.draws
    if aggregator.answer_event is None:
        raise UserError("An aggregator without noise claims no ε that could be audited.")
    folder = None if output is None else RunFolder(output)
    query = _one_query(aggregator.check_event, aggregator.answer_event)
    accountant = PrivacyAccountant(method="pld")
    accountant.record(query)
    lower, upper = accountant.epsilon_bounds(delta)
    share = (1 - config.confidence) / 3
    bound = _outcome_bound(aggregator, config, randomness, upper, share)
    noise = _noise_found(aggregator, draws, randomness, share)
    report = AuditReport(
        title="PATE's aggregation, one query",
        epsilon=upper,
        epsilon_lower=lower,
        delta=delta,
        confidence=config.confidence,
        bounds=[bound, _family_bound(aggregator, noise, delta, upper, share)],
        checks=[
            Check(f"noise of the {n.part} is as large as accounted", n.p_value, share / 2) for n in noise
        ],
        about={
            "method": "pate",
            "aggregator": aggregator.to_dict(),
            "config": asdict(config),
            "neighboring_relation": "zero-out",
            "noise_is_secret": randomness.is_secret,
        },
    )
    if folder is not None:
        report.write(folder)
    return report


def _one_query(check: GNMaxThreshold | None, answer: GNMax | LNMax) -> Event:
    """What a query that is checked, and answered if it passes, costs at most."""
    return answer if check is None else Composed([check, answer])


# ---------------------------------------------------------------- outcomes


def _outcome_bound(
    aggregator: Aggregator,
    config: PATEAuditConfig,
    randomness: Randomness,
    accounted: float,
    beta: float,
) -> Bound:
    """The largest Clopper-Pearson bound over all pairs and outcomes, each with its share of β."""
    delta, draws = config.delta, config.draws
    histograms = _histograms(aggregator, config.teachers, config.classes)
    outcomes = (REFUSED, *range(config.classes))
    share = beta / (len(histograms) * len(outcomes) * 2)
    best, told = 0.0, dict[str, Any]()
    for votes in histograms:
        changed = votes.copy()
        changed[:2] += (-1, 1)
        drawn = [_outcomes(aggregator, counts, draws, randomness) for counts in (votes, changed)]
        for outcome in outcomes:
            counts = [int((found == outcome).sum()) for found in drawn]
            # An outcome may be likelier with either of the two.
            for first, second in (counts, counts[::-1]):
                epsilon = clopper_pearson_epsilon(first, draws, second, draws, delta, share)
                if epsilon > best:
                    words = "refused" if outcome == REFUSED else f"class {outcome}"
                    best, told = epsilon, {"votes": votes.tolist(), "outcome": words, "times": counts}
    return Bound(
        method="outcomes of one query (Clopper-Pearson)",
        epsilon=best,
        delta=delta,
        accounted=accounted,
        confidence=1 - beta,
        assumes=None,
        details={"draws": draws, "pairs": len(histograms), **told},
    )


def _outcomes(aggregator: Aggregator, counts: Counts, draws: int, randomness: Randomness) -> Outcomes:
    """Outcomes of the same query asked again and again: a class, or `REFUSED`; int64 [draws]."""
    found = np.full(draws, REFUSED)
    for start in range(0, draws, _BLOCK):
        rows = np.tile(counts, (min(_BLOCK, draws - start), 1))
        passed = np.arange(len(rows))
        if aggregator.check_event is not None:
            passed = np.flatnonzero(aggregator.check(rows, randomness))
        found[start + passed] = aggregator.choose(rows[passed], randomness)
    return found


def _histograms(aggregator: Aggregator, teachers: int, classes: int) -> list[Counts]:
    """Votes whose first class leads the second one, or is about as large as the threshold, by some noise.

    One vote then moves from the first class to the second.
    """
    spread = math.sqrt(2) * _scale(aggregator)
    leads = {min(teachers, round((teachers + lead * spread) / 2)) for lead in _LEADS}
    found = [_votes(top, teachers, classes, in_two=True) for top in sorted(leads)]
    if aggregator.check_event is not None and aggregator.threshold is not None:
        noise, threshold = aggregator.check_event.sigma, aggregator.threshold
        around = {math.ceil(threshold), *(round(threshold + margin * noise) for margin in _MARGINS)}
        tops = [top for top in sorted(around) if 1 <= top <= teachers]
        # The other votes are spread, so that the first class has most of them.
        found += [_votes(top, teachers, classes, in_two=False) for top in tops]
    return found


def _votes(top: int, teachers: int, classes: int, *, in_two: bool) -> Counts:
    """`top` votes for the first class; the others for the second one, or spread over all others."""
    counts = np.zeros(classes)
    others = 1 if in_two else classes - 1
    counts[0] = top
    counts[1 : 1 + others] = (teachers - top) // others
    counts[1] += (teachers - top) % others
    return counts


# ---------------------------------------------------------------- noise


def _noise_found(aggregator: Aggregator, draws: int, randomness: Randomness, beta: float) -> list[NoiseFound]:
    """The noise of the answer and of the check, each from how often it overturns what is a little ahead.

    Each upper bound is wrong with a probability of at most β/2.
    """
    accounted = _scale(aggregator)
    lead = float(max(1, round(math.sqrt(2) * accounted)))
    overturned = _laplace_tail if isinstance(aggregator.answer_event, LNMax) else _normal_tail
    answer_only = replace(aggregator, check_event=None, threshold=None, answers=aggregator.queries)
    times = int((_outcomes(answer_only, np.array([lead, 0.0]), draws, randomness) == 1).sum())
    found = [_found("answer", overturned, lead, accounted, times, draws, beta / 2)]
    if aggregator.check_event is not None and aggregator.threshold is not None:
        sigma = aggregator.check_event.sigma
        short = np.array([aggregator.threshold - sigma])
        times = int((_outcomes(aggregator, short, draws, randomness) != REFUSED).sum())
        found.append(_found("check", lambda x: float(ndtr(-x)), sigma, sigma, times, draws, beta / 2))
    return found


def _found(
    part: str,
    overturned: Callable[[float], float],
    lead: float,
    accounted: float,
    times: int,
    draws: int,
    beta: float,
) -> NoiseFound:
    """From `times` of `draws` that noise overturned `lead` votes; `overturned` says how likely, in scales."""
    p_value = float(binom.cdf(times, draws, overturned(lead / accounted)))
    _, most = clopper_pearson(times, draws, beta)
    if most >= overturned(1e-6):
        return NoiseFound(part, accounted, math.inf, p_value)
    scales = brentq(lambda x: overturned(x) - most, 1e-6, 700)
    return NoiseFound(part, accounted, lead / scales, p_value)


def _normal_tail(lead: float) -> float:
    """P[the second count ends above the first] for a lead in σ: their difference has variance 2·σ²."""
    return float(ndtr(-lead / math.sqrt(2)))


def _laplace_tail(lead: float) -> float:
    """The same for Laplace noise: the difference of two of scale 1 exceeds x with e^−x·(2 + x)/4."""
    return math.exp(-lead) * (2 + lead) / 4


def _family_bound(
    aggregator: Aggregator, noise: list[NoiseFound], delta: float, accounted: float, beta: float
) -> Bound:
    """What a query costs at least with as much noise as can have been, if its law is the accounted one."""
    kind = LNMax if isinstance(aggregator.answer_event, LNMax) else GNMax
    epsilon = 0.0
    if all(math.isfinite(part.upper) for part in noise):
        check = GNMaxThreshold(noise[1].upper) if len(noise) > 1 else None
        accountant = PrivacyAccountant(method="pld")
        accountant.record(_one_query(check, kind(noise[0].upper)))
        epsilon = accountant.epsilon_bounds(delta)[0]
    return Bound(
        method="scale of the noise",
        epsilon=epsilon,
        delta=delta,
        accounted=accounted,
        confidence=1 - beta,
        assumes="Laplace noise" if kind is LNMax else "Gaussian noise",
        details={part.part: {"accounted": part.accounted, "upper": part.upper} for part in noise},
    )


def _scale(aggregator: Aggregator) -> float:
    """The noise on a count, in votes."""
    event = aggregator.answer_event
    assert event is not None  # noqa: S101 - the caller has checked it
    return event.scale if isinstance(event, LNMax) else event.sigma
