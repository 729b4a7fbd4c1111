"""Lower bounds on ε from how well an attacker guesses. Each is wrong with a probability of at most β.

`one_run_epsilon` and `clopper_pearson_epsilon` assume nothing about the algorithm.
`gaussian_one_run_epsilon` assumes that its trade-off function is one of Gaussian differential privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import betaincinv, expit, ndtr, ndtri
from scipy.stats import binom

from accounting import UserError
from accounting.events import check_count, check_number
from accounting.gdp import epsilon_of_mu

_MOST = 1e4  # beyond this ε, and this μ, nothing is worth telling apart
_PRECISION = 1e-6


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Bound the probability of this many right guesses, or more, after an (ε, δ)-DP algorithm.

    Steinke, Nasr & Jagielski 2023, "Privacy auditing with one (1) training run" (arXiv:2305.08846), Theorem
    5.2 in the form of Corollary 5.4: let each of m canaries be in the data by a fair coin of its own, and let
    r guesses, made of the output alone, name a canary and its coin. Then P[v or more are right] is at most
    P[W ≥ v] + 2·m·δ·α, where W is binomial with r trials of probability e^ε/(1 + e^ε), and α is the largest
    P[v > W ≥ v − i]/i over i = 1 … v.

    Args:
        canaries: m; those that the attacker abstains from count too.
        guesses: r, fixed before the output was seen.
        correct: v.
        epsilon: ε ≥ 0.
        delta: δ in [0, 1].
    """
    right = float(expit(epsilon))
    tail = float(binom.sf(correct - 1, guesses, right))
    if delta == 0 or correct == 0:
        return tail
    i = np.arange(1, correct + 1)
    # P[v > W ≥ v − i], summed up from the single probabilities: a difference of tails would cancel.
    between = np.cumsum(binom.pmf(correct - i, guesses, right))
    return min(1.0, tail + 2 * canaries * delta * float((between / i).max()))


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, beta: float) -> float:
    """The ε up to which `correct` right guesses of `guesses` refute (ε, δ)-DP. 0 if they refute nothing.

    Guarantee: if the algorithm is (ε, δ)-DP, the result is above ε with a probability of at most β
    (Steinke, Nasr & Jagielski 2023, Corollary 5.4, inverted). It assumes nothing else.

    Raises:
        UserError: for numbers that cannot be.
    """
    _check_guesses(canaries, guesses, correct, delta, beta)
    return _last_refuted(lambda e: one_run_p_value(canaries, guesses, correct, e, delta) <= beta)


def gaussian_one_run_mu(canaries: int, guesses: int, correct: int, beta: float) -> float:
    """The μ up to which `correct` right guesses of `guesses` refute Gaussian differential privacy.

    Guarantee: if the algorithm is μ-GDP, the result is above μ with a probability of at most β (Mahloujifar,
    Melis & Chaudhuri 2024, "Auditing f-differential privacy in one run", arXiv:2410.22235, the recursion of
    their algorithm for guesses of membership). Arguments as for `one_run_epsilon`.
    """
    _check_guesses(canaries, guesses, correct, 0.0, beta)
    return _last_refuted(lambda mu: _refutes_gaussian(mu, canaries, guesses, correct, beta))


def gaussian_one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, beta: float) -> float:
    """The ε at δ of `gaussian_one_run_mu`: a lower bound that assumes Gaussian differential privacy."""
    mu = gaussian_one_run_mu(canaries, guesses, correct, beta)
    return epsilon_of_mu(min(mu, 1e3), delta) if mu > 0 else 0.0


def _refutes_gaussian(mu: float, canaries: int, guesses: int, correct: int, beta: float) -> bool:
    """Whether so many right guesses are too many for μ-GDP.

    Were they as likely as β, then r and h would bound, from v right guesses downwards, what right and
    wrong ones add to the expectation of a random canary. Together they must not exceed guesses/canaries.
    """
    right, wrong = beta * correct / canaries, beta * (guesses - correct) / canaries
    for i in range(correct - 1, -1, -1):
        more = max(wrong, float(ndtr(ndtri(right) - mu)))  # the inverse of 1 − f, at `right`
        if more == wrong:
            break  # neither of the two can change any more
        right = min(1.0, right + i / (guesses - i) * (more - wrong))
        wrong = more
    return right + wrong > guesses / canaries


def clopper_pearson(successes: int, trials: int, beta: float) -> tuple[float, float]:
    """Bounds (lower, upper) on a probability, each wrong with a probability of at most β (Clopper 1934)."""
    low = float(betaincinv(successes, trials - successes + 1, beta)) if successes > 0 else 0.0
    high = float(betaincinv(successes + 1, trials - successes, 1 - beta)) if successes < trials else 1.0
    return low, high


def rates_epsilon(tpr_lower: float, fpr_upper: float, delta: float) -> float:
    """The ε that an attack of at least this TPR and at most this FPR needs at δ: 0 if it needs none.

    (ε, δ)-DP gives TPR ≤ e^ε·FPR + δ, and 1 − FPR ≤ e^ε·(1 − TPR) + δ (Kairouz, Oh & Viswanath 2015,
    Theorem 2.1).
    """
    found = 0.0
    for high, low in ((tpr_lower, fpr_upper), (1 - fpr_upper, 1 - tpr_lower)):
        if high - delta > low:
            found = max(found, math.log((high - delta) / low) if low > 0 else math.inf)
    return found


def clopper_pearson_epsilon(
    true_positives: int, positives: int, false_positives: int, negatives: int, delta: float, beta: float
) -> float:
    """A lower bound on ε from an attack on many independent releases.

    Guarantee: if the algorithm is (ε, δ)-DP, the result is above ε with a probability of at most β (a
    Clopper-Pearson bound of β/2 on each rate, as in Nasr et al. 2021, "Adversary instantiation"). It assumes
    nothing else.

    Args:
        true_positives: How often the attacker said "with" of releases with the record.
        positives: How many of these there were.
        false_positives: How often of releases without it.
        negatives: How many of these there were.
        delta: δ in [0, 1).
        beta: β in (0, 1).

    Raises:
        UserError: for numbers that cannot be.
    """
    for said, of in ((true_positives, positives), (false_positives, negatives)):
        check_count(of, "trials", "an audit", low=1)
        if check_count(said, "positives", "an audit") > of:
            raise UserError(f"There cannot be {said} of {of} releases.")
    check_number(delta, "delta", "an audit", low=0, high=1, closed="left")
    check_number(beta, "beta", "an audit", low=0, high=1)
    tpr_lower, _ = clopper_pearson(true_positives, positives, beta / 2)
    _, fpr_upper = clopper_pearson(false_positives, negatives, beta / 2)
    return rates_epsilon(tpr_lower, fpr_upper, delta)


def guess_counts(canaries: int) -> list[int]:
    """How many guesses are tried: all canaries, half of them, and so on down to 16 at least.

    Which of them does best is not known beforehand, so each gets an equal share of β (a union bound).
    """
    counts = [canaries]
    while counts[-1] >= 32:
        counts.append(counts[-1] // 2)
    return counts


def right_guesses(scores: np.ndarray, included: np.ndarray, guesses: int) -> int:
    """How many of `guesses` are right: "in" for the highest scores, "out" for the lowest, half of each."""
    order = np.argsort(scores, kind="stable")
    low, high = order[: guesses // 2], order[len(order) - (guesses - guesses // 2) :]
    return int((~included[low]).sum() + included[high].sum())


def _check_guesses(canaries: int, guesses: int, correct: int, delta: float, beta: float) -> None:
    check_count(canaries, "canaries", "an audit", low=1)
    check_count(guesses, "guesses", "an audit")
    check_count(correct, "correct", "an audit")
    check_number(delta, "delta", "an audit", low=0, high=1, closed="both")
    check_number(beta, "beta", "an audit", low=0, high=1)
    if not correct <= guesses <= canaries:
        raise UserError(
            f"There cannot be {correct} right guesses of {guesses} about {canaries} canaries: "
            "each number must be at most the next one."
        )


def _last_refuted(refuted: Callable[[float], bool]) -> float:
    """The largest number that is refuted together with all below it, rounded down; 0 if none is."""
    if not refuted(0.0):
        return 0.0
    good, bad = 0.0, 1.0
    while refuted(bad):
        good, bad = bad, 2 * bad
        if bad > _MOST:
            return good
    while bad - good > _PRECISION * bad:
        middle = (good + bad) / 2
        good, bad = (middle, bad) if refuted(middle) else (good, middle)
    return good
