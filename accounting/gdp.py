"""Gaussian differential privacy: one number, μ, for a whole trade-off curve (Dong, Roth & Su 2022).

A mechanism is μ-GDP if telling two neighbouring data sets apart is at least as hard as telling N(0, 1) from
N(μ, 1). For compositions of Gaussian mechanisms without sampling, μ says everything and is exact. For all
others, a μ says less than the curve: two functions below give one, and their names say which kind of
approximation it is.

Conversions are closed forms in floats, right to about 1e-12 relatively; they are not widened by their
rounding. Numbers of theorems are those of arXiv:1905.02383.
"""

from __future__ import annotations

import math

from scipy import optimize
from scipy.special import erf, erfinv, ndtr, ndtri

from accounting.accountant import PrivacyAccountant
from accounting.atoms import Atom
from accounting.errors import UnsupportedEvent, UserError
from accounting.events import (
    Event,
    NeighboringRelation,
    atoms,
    check_count,
    check_number,
    shown,
)
from accounting.pld import _gaussian_epsilon, _log_gaussian_delta, _only_gaussian

_LEAST_MU, _MOST_MU = 1e-12, 1e3


def gaussian_mu(event: Event, *, neighboring_relation: NeighboringRelation = "zero-out") -> float:
    """Return the μ of a composition of Gaussian mechanisms without sampling: μ = √(Σ 1/σ²), exactly.

    Guarantee: `event` is μ-GDP under the relation, and no smaller μ will do (Corollary 3.3).

    Returns:
        μ ≥ 0; 0 if nothing is released, ∞ for a release without protection.

    Raises:
        UnsupportedEvent: if the event holds anything else than Gaussian mechanisms on all records.
    """
    if not isinstance(event, Event):
        raise UserError(f"A μ is that of an event such as Gaussian(1.1). Got {shown(event)}.")
    counts = atoms(event, neighboring_relation)
    if not counts:
        return 0.0
    if Atom.NON_PRIVATE in counts:
        return math.inf
    scale = _only_gaussian(counts)
    if scale is None:
        raise UnsupportedEvent(
            f"{shown(event)} is not made of unsampled Gaussians alone, so no μ says exactly "
            "what it guarantees; use tradeoff_curve, or equivalent_mu for one δ."
        )
    return 1 / scale


# ---------------------------------------------------------------- μ and (ε, δ)


def delta_of_mu(mu: float, epsilon: float) -> float:
    """The least δ with which every μ-GDP mechanism is (epsilon, δ)-DP: Corollary 2.13. μ ≤ 1000."""
    mu = _checked_mu(mu, "delta_of_mu")
    epsilon = check_number(epsilon, "epsilon", "delta_of_mu", low=0, high=1e9, closed="left")
    return math.exp(_log_gaussian_delta(1 / mu, epsilon)) if mu else 0.0


def epsilon_of_mu(mu: float, delta: float) -> float:
    """The least ε with which every μ-GDP mechanism is (ε, delta)-DP: `delta_of_mu`, solved for ε."""
    mu = _checked_mu(mu, "epsilon_of_mu")
    delta = check_number(delta, "delta", "epsilon_of_mu", low=0, high=1)
    return _gaussian_epsilon(1 / mu, delta) if mu else 0.0


def mu_of(epsilon: float, delta: float) -> float:
    """The largest μ with which every μ-GDP mechanism is (epsilon, delta)-DP: Corollary 2.13, solved for μ.

    It says what noise would do for a budget: σ = 1/μ. It does not say that an (epsilon, delta)-DP mechanism
    is μ-GDP, which follows from one pair (ε, δ) for no μ.

    Raises:
        UserError: if a number is out of range, or ε so large that μ is above 1000.
    """
    epsilon = check_number(epsilon, "epsilon", "mu_of", low=0, high=1e9, closed="left")
    goal = math.log(check_number(delta, "delta", "mu_of", low=0, high=1))

    def excess(log_mu: float) -> float:
        return max(_log_gaussian_delta(math.exp(-log_mu), epsilon), -1e4) - goal

    low, high = math.log(_LEAST_MU), math.log(_MOST_MU)
    if excess(high) < 0:
        raise UserError(f"ε = {epsilon:g} at δ = {delta:g} allows a μ above {_MOST_MU:g}; ask for less.")
    if excess(low) > 0:
        return 0.0
    return math.exp(optimize.brentq(excess, low, high, xtol=1e-14, rtol=1e-14))


# ---------------------------------------------------------------- μ and attacks


def tradeoff_of_mu(mu: float, false_positive_rate: float) -> float:
    """The least false negative rate against a μ-GDP mechanism: Φ(Φ⁻¹(1 − α) − μ) (Section 2.2)."""
    mu = _checked_mu(mu, "tradeoff_of_mu")
    alpha = _checked_rate(false_positive_rate, "false_positive_rate", "tradeoff_of_mu")
    return float(ndtr(-ndtri(alpha) - mu))


def tpr_of_mu(mu: float, false_positive_rate: float) -> float:
    """The largest true positive rate against a μ-GDP mechanism: Φ(Φ⁻¹(α) + μ)."""
    mu = _checked_mu(mu, "tpr_of_mu")
    return float(ndtr(ndtri(_checked_rate(false_positive_rate, "false_positive_rate", "tpr_of_mu")) + mu))


def mu_of_tpr(false_positive_rate: float, true_positive_rate: float) -> float:
    """The μ at which the largest true positive rate is this one; 0 if guessing alone reaches it."""
    alpha = check_number(false_positive_rate, "false_positive_rate", "mu_of_tpr", low=0, high=1)
    power = check_number(true_positive_rate, "true_positive_rate", "mu_of_tpr", low=0, high=1)
    return max(0.0, float(ndtri(power) - ndtri(alpha)))


def advantage_of_mu(mu: float) -> float:
    """The largest TPR − FPR against a μ-GDP mechanism: 2Φ(μ/2) − 1."""
    return float(erf(_checked_mu(mu, "advantage_of_mu") / math.sqrt(8)))


def mu_of_advantage(advantage: float) -> float:
    """The μ at which the largest TPR − FPR is this one: the inverse of `advantage_of_mu`."""
    value = check_number(advantage, "advantage", "mu_of_advantage", low=0, high=1, closed="left")
    return math.sqrt(8) * float(erfinv(value))


# ---------------------------------------------------------------- one number for a curve that is not Gaussian


def equivalent_mu(
    event: Event, delta: float, *, neighboring_relation: NeighboringRelation = "zero-out"
) -> float:
    """Return the largest μ whose Gaussian mechanism has no larger ε at `delta` than is certified for `event`.

    A figure of speech: "at this δ, as good as Gaussian noise of σ = 1/μ". It rests on the upper bound on ε,
    so it does not flatter the event at this δ. It promises nothing at other δ: the event need not be μ-GDP.
    Where δ(0) ≤ `delta`, ε is 0, and μ that of the Gaussian mechanism with δ(0) = `delta`.

    Returns:
        μ ≥ 0; ∞ for a release without protection.

    Raises:
        UserError, UnsupportedEvent: as `PrivacyAccountant.epsilon`; also if μ is above 1000.
    """
    accountant = PrivacyAccountant(neighboring_relation=neighboring_relation)
    accountant.record(event)
    epsilon = accountant.epsilon(delta)
    return mu_of(epsilon, delta) if math.isfinite(epsilon) else math.inf


def approximate_mu_by_clt(noise_multiplier: float, sampling_probability: float, steps: int) -> float:
    """Return the limit q·√(T·(e^{1/σ²} − 1)) for T Poisson-sampled Gaussian mechanisms (Bu et al. 2020).

    NOT a bound: the central limit theorem holds for T → ∞ with q·√T fixed. At finite T it often understates
    what is lost, most of all in the tails (small δ, small false positive rates) and for small σ. Use it to
    think with; `tradeoff_curve` and `PrivacyAccountant` are for guarantees. For add-or-remove-one and
    zero-out.

    Args:
        noise_multiplier: σ, in [0.05, 1e7].
        sampling_probability: q, in [0, 1].
        steps: T.
    """
    owner = "approximate_mu_by_clt"
    sigma = check_number(noise_multiplier, "noise_multiplier", owner, low=0.05, high=1e7, closed="both")
    q = _checked_rate(sampling_probability, "sampling_probability", owner)
    return q * math.sqrt(check_count(steps, "steps", owner) * math.expm1(sigma**-2))


def _checked_mu(mu: float, owner: str) -> float:
    return check_number(mu, "mu", owner, low=0, high=_MOST_MU, closed="both")


def _checked_rate(rate: float, name: str, owner: str) -> float:
    return check_number(rate, name, owner, low=0, high=1, closed="both")
