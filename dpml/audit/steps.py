"""What the noisy gradients of all steps tell about noise, clipping and sampling, if the noise is Gaussian.

The white-box view of Nasr et al. 2023, "Tight auditing of differentially private machine learning": in each
step, the score of a gradient-space canary is the noisy sum's coordinate along its gradient, over the clip
norm: noise alone, or noise plus one if the canary was sampled. A canary that is out never moves its
coordinate, so its scores are samples of the executed noise. All tests here are exact, or bounded by the sum
of their parts (Bonferroni).

Scores show noise on the canaries' own coordinates, clipping of their own gradients and the sampling of their
own places; not what befalls other parameters or records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from accounting import Event, Gaussian, PoissonSampled, PrivacyAccountant, Repeated, UserError
from accounting.accountant import Method
from accounting.events import NeighboringRelation
from dpml.audit.bounds import clopper_pearson
from dpml.audit.report import Bound, Check

_LOOKED_AT = 200_000  # scores that the law of the noise is tested on
_LEAST_NOISE = 0.01  # less is as good as none, and would take long to account for


@dataclass(frozen=True, eq=False)
class Steps:
    """What an audit of T steps with m gradient-space canaries saw.

    Attributes:
        scores: Each canary's coordinate of each step's noisy sum, in clip norms, float32 [T, m].
        sampled: Which canaries were in each step's sample, those that are out too, bool [T, m].
        included: Which canaries are in, bool [m].
        event: The accounted event of one step.
        slack: One record moves a sum by at most C·(1 + slack).
    """

    scores: npt.NDArray[np.float32]
    sampled: npt.NDArray[np.bool_]
    included: npt.NDArray[np.bool_]
    event: Event
    slack: float

    @property
    def steps(self) -> int:
        """T."""
        return len(self.scores)

    @property
    def sampling_probability(self) -> float:
        """The accounted q."""
        return self._parts()[1]

    @property
    def noise(self) -> float:
        """The accounted standard deviation of the noise, in clip norms."""
        return self._parts()[0] * (1 + self.slack)

    @property
    def noise_scores(self) -> npt.NDArray[np.float64]:
        """The scores of canaries that are out, float64 [T, m − included]: noise and nothing else."""
        return self.scores[:, ~self.included].astype(np.float64)

    @property
    def moved_scores(self) -> npt.NDArray[np.float64]:
        """The scores of canaries that are in, in the steps that sampled them, float64 [k]."""
        return self.scores[self.sampled & self.included].astype(np.float64)

    def membership_scores(self) -> npt.NDArray[np.float64]:
        """The logarithm of each canary's likelihood ratio, in against out, float64 [m].

        For the accounted mechanism, and of the scores alone: whom a step sampled is secret.
        """
        gain = (self.scores - 0.5) / self.noise**2
        q = self.sampling_probability
        with np.errstate(over="ignore"):
            inside = np.where(gain > 30, gain + math.log(q), np.log1p(q * np.expm1(np.minimum(gain, 30))))
        return np.asarray(inside.sum(axis=0, dtype=np.float64))

    def _parts(self) -> tuple[float, float]:
        step = self.event
        if not (isinstance(step, PoissonSampled) and isinstance(step.event, Gaussian)):
            raise UserError(f"Gradients can be audited of Gaussian noise on a Poisson sample. Got {step}.")
        return step.event.noise_multiplier, step.sampling_probability


def family_bound(
    seen: Steps,
    *,
    delta: float,
    accounted: float,
    beta: float,
    accountant: Method,
    relation: NeighboringRelation,
) -> Bound:
    """A lower bound on ε that assumes Poisson sampling, a sum of one canary's part, and Gaussian noise.

    The noise, what a canary adds, and how often, are each bounded by what was seen (β/3 each), and the
    accountant says what T steps of that cost.
    """
    noise = seen.noise_scores
    sigma = math.sqrt((noise**2).sum() / stats.chi2.ppf(beta / 3, noise.size)) if noise.size else math.inf
    moved = seen.moved_scores
    added = 0.0
    if moved.size:
        added = float(moved.mean() + stats.norm.ppf(beta / 3) * sigma / math.sqrt(moved.size))
    rate, _ = clopper_pearson(int(seen.sampled.sum()), seen.sampled.size, beta / 3)
    epsilon = 0.0
    if added > 0 and rate > 0:
        step = PoissonSampled(Gaussian(max(sigma / added, _LEAST_NOISE)), rate)
        account = PrivacyAccountant(accountant, neighboring_relation=relation)
        account.record(Repeated(step, seen.steps))
        epsilon = account.epsilon_bounds(delta)[0]
    return Bound(
        method="noise, clipping and sampling of each step (Nasr et al. 2023)",
        epsilon=epsilon,
        delta=delta,
        accounted=accounted,
        confidence=1 - beta,
        assumes="Gaussian noise, independent steps, Poisson sampling",
        details={
            "noise_multiplier_upper": sigma,
            "accounted_noise_multiplier": seen.noise,
            "clip_norms_added_lower": added,
            "sampling_probability_lower": rate,
            "accounted_sampling_probability": seen.sampling_probability,
            "scores": int(noise.size + moved.size),
        },
    )


def checks(seen: Steps, beta: float) -> list[Check]:
    """Is what was executed what is accounted? An honest run fails one with a probability of at most β.

    Each check looks for one way of being less private than accounted; more noise, or less clipping than
    allowed, is no fault.
    """
    q = seen.sampling_probability
    p_values = {
        "noise has the accounted scale": _p_scale(seen.noise_scores / seen.noise),
        "noise has it in every step": _p_each_step(seen.noise_scores / seen.noise),
        "noise is fresh in every step": _p_fresh(seen.noise_scores),
        "noise is Gaussian": _p_gaussian(seen.noise_scores),
        "a canary adds at most the clip norm": _p_clipped(seen),
        "no canary is sampled more often than accounted": _p_rate(seen.sampled, q),
        "a canary's steps are independent": _p_binomial_counts(seen.sampled.sum(axis=0), seen.steps, q),
        "canaries are sampled independently": _p_binomial_counts(
            seen.sampled.sum(axis=1), seen.sampled.shape[1], q
        ),
    }
    level = beta / len(p_values)
    return [Check(name, p_value, level) for name, p_value in p_values.items()]


def _p_scale(z: npt.NDArray[np.float64]) -> float:
    """Too little noise: the sum of squares of N standard normals is χ² with N degrees of freedom."""
    return float(stats.chi2.cdf((z**2).sum(), z.size))


def _p_each_step(z: npt.NDArray[np.float64]) -> float:
    return min(1.0, len(z) * float(stats.chi2.cdf((z**2).sum(axis=1), z.shape[1]).min()))


def _p_fresh(scores: npt.NDArray[np.float64]) -> float:
    """Noise that comes back: means over steps spread more than fresh noise allows (analysis of variance)."""
    T, m = scores.shape
    if T == 1:
        return 1.0
    means = scores.mean(axis=0)
    between = T * (means**2).sum() / m
    within = ((scores - means) ** 2).sum() / (m * (T - 1))
    return float(stats.f.sf(between / within, m, m * (T - 1))) if within > 0 else 0.0


def _p_gaussian(scores: npt.NDArray[np.float64]) -> float:
    """The law of the noise over its own spread: Kolmogorov & Smirnov's test, here on the cautious side."""
    some = scores.ravel()[:_LOOKED_AT]
    spread = math.sqrt((some**2).mean())
    return float(stats.kstest(some / spread, "norm").pvalue) if spread > 0 else 0.0


def _p_clipped(seen: Steps) -> float:
    moved, noise = seen.moved_scores, seen.noise_scores
    if not moved.size:
        return 1.0
    error = math.sqrt((noise**2).mean() / moved.size)
    excess = float(moved.mean()) - (1 + seen.slack) - 1e-6  # scores are of float32
    if error == 0:
        return 0.0 if excess > 0 else 1.0
    return float(stats.t.sf(excess / error, noise.size))


def _p_rate(sampled: npt.NDArray[np.bool_], q: float) -> float:
    T, m = sampled.shape
    everywhere = float(stats.binom.sf(int(sampled.sum()) - 1, T * m, q))
    one = m * float(stats.binom.sf(int(sampled.sum(axis=0).max()) - 1, T, q))
    return float(min(1.0, 2 * min(everywhere, one)))


def _p_binomial_counts(counts: npt.NDArray[np.int64], trials: int, q: float) -> float:
    """Whether independent counts are binomial: how many of them are k, for each k, is binomial too."""
    share = stats.binom.pmf(np.arange(trials + 1), trials, q)
    found = np.bincount(counts, minlength=trials + 1)
    low, high = stats.binom.cdf(found, len(counts), share), stats.binom.sf(found - 1, len(counts), share)
    return min(1.0, 2 * (trials + 1) * float(np.minimum(low, high).min()))
