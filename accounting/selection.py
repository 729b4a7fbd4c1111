"""The price of choosing the best of several runs, for instance of hyperparameter tuning.

Run a private mechanism K times and release the best result only. If K were fixed, this would cost nearly as
much as releasing all K. If K is drawn at random from a negative binomial distribution, it costs a few times
one run, and E[K] enters through its logarithm only (Liu & Talwar 2019; Papernot & Steinke 2022).
`selection_divergence` bounds the Rényi divergence of the whole procedure.

What has to hold, or the bounds say nothing:

- Only the winner is released. A chart, a log or a checkpoint of any other run is a further release, and so
  are K itself and the time that all runs took.
- The score that decides is private too, or depends on public data alone. A score that was computed from
  private records belongs to the base mechanism: its event composes the training and the noisy score.
- Scores are compared by a rule that does not look at the private data; ties as well.
- K is drawn by `draw_runs`, in secret, independently of the data, and runs are neither added nor cut short
  afterwards.
- All runs are independent, with fresh noise, of one and the same base mechanism. That mechanism may draw its
  hyperparameters at random from a public list; its divergence is then at most that of the worst candidate. A
  search that proposes the next candidate from the scores of earlier ones is another mechanism.

Why K has to be random (the idea of the proofs): let f(x) = E[x^K], and F the base's distribution function
along the order of scores. The best of K runs is at most y with probability f(F(y)), so its density is the
base's times f′ at a probability q, and the divergence grows by what

    log(f′(q)^λ · f′(q′)^{1−λ}) / (λ−1)

can be, where q and q′ are the probabilities of one event under both data sets. This is small if f′ is steep
nowhere in the logarithm. Both theorems of Papernot & Steinke that are used here come from this.

Sources: Liu & Talwar 2019, arXiv:1811.07971; Papernot & Steinke 2022, arXiv:2110.03620 (version 2).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from scipy import optimize
from scipy.special import gammaln

from accounting.errors import UserError
from accounting.events import check_array, shown
from accounting.pairs import FloatArray
from accounting.rdp import ORDERS

LEAST_GAMMA = 1e-15
MOST_SHAPE = 1e3
MOST_MEAN = 1e9
_SLACK = 1e-12  # a thousand times the rounding of the formulas below

SEARCH_ORDERS: FloatArray = ORDERS[ORDERS >= 1.1]
"""Orders λ̂ that the bound is minimised over, beside the caller's own. Each of them gives a bound."""


class RunsDistribution(ABC):
    """How many times the base mechanism runs. Abstract: make one of the subclasses."""

    @property
    @abstractmethod
    def mean_runs(self) -> float:
        """E[K], of which the expected cost in time is a multiple."""

    @abstractmethod
    def probability_of(self, runs: int) -> float:
        """P(K = runs), for any whole number `runs`; 0 outside of the support."""

    @abstractmethod
    def draw_runs(self, rng: np.random.Generator) -> int:
        """Draw K. Exact, but for the rounding of `rng`'s floating-point numbers.

        K is a secret, so `rng` should be keyed by the operating system's entropy and used for nothing that
        is published.
        """


@dataclass(frozen=True)
class NegativeBinomialRuns(RunsDistribution):
    """The truncated negative binomial distribution on 1, 2, 3, … (Papernot & Steinke 2022, Definition 1).

    P(K = k) is proportional to (1−γ)^k · Γ(k+η)/k!. The price of selection is about (2+η) times one run, so a
    smaller shape is cheaper; in return K varies more, and is often 1.

    Attributes:
        shape: η, above −1 and at most 1000. 1 is the geometric distribution, 0 the logarithmic one.
        gamma: γ, from 1e-15 to below 1. The smaller, the more runs.

    Raises:
        UserError: if one of them is outside of its interval.
    """

    shape: float
    gamma: float

    def __post_init__(self) -> None:
        shape = _number(self.shape, "shape", "NegativeBinomialRuns", "above -1 and at most 1000")
        if not -1 < shape <= MOST_SHAPE:
            raise _refusal("shape", "NegativeBinomialRuns", "above -1 and at most 1000", self.shape)
        gamma = _number(self.gamma, "gamma", "NegativeBinomialRuns", "in [1e-15, 1)")
        if not LEAST_GAMMA <= gamma < 1:
            raise _refusal("gamma", "NegativeBinomialRuns", "in [1e-15, 1)", self.gamma)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "gamma", gamma)

    @property
    def log_mean_runs(self) -> float:
        """The logarithm of E[K] = f′(1), which stays finite where E[K] does not."""
        growth = -(1 + self.shape) * math.log(self.gamma)
        return math.log1p(-self.gamma) + growth + self._log_normaliser

    @property
    def mean_runs(self) -> float:
        """E[K]: (1/γ − 1)·η/(1 − γ^η), which is 1/γ for η = 1 and (1/γ − 1)/log(1/γ) for η = 0."""
        return math.exp(min(self.log_mean_runs, 709.0))

    def probability_of(self, runs: int) -> float:
        """P(K = runs), Definition 1; 0 below 1."""
        runs = _whole(runs)
        if runs < 1:
            return 0.0
        ratio = gammaln(runs + self.shape) - gammaln(1 + self.shape) - gammaln(runs + 1)
        return math.exp(self._log_normaliser + float(ratio) + runs * math.log1p(-self.gamma))

    def draw_runs(self, rng: np.random.Generator) -> int:
        """Draw K ≥ 1; see `RunsDistribution.draw_runs`.

        K is one plus a Poisson number, mixed over its mean: with b = γ/(1−γ), the density of
        g is proportional to g^{η−1}·e^{−bg}·(1 − e^{−g}), and K given g is Poisson(g) given that it is not 0.
        Written as g^η ∫₀¹ e^{−(b+s)g} ds, the density is that of a gamma variable of shape 1 + η and
        rate b + s, where s has the density ∝ (b+s)^{−1−η}. Each step is drawn without rejection, for every
        η > −1.
        """
        # b + s = γ^v/(1−γ), where e^{xv} is uniform on the interval from 1 to e^x.
        x = -self.shape * math.log(self.gamma)
        v = _between_exponentials(rng.random(), x)
        rate = self.gamma**v / (1 - self.gamma)
        intensity = rng.gamma(1 + self.shape) / rate
        # The first of at least one arrivals in [0, intensity], then the arrivals after it.
        first = -math.log1p(rng.random() * math.expm1(-intensity))
        return 1 + int(rng.poisson(max(0.0, intensity - first)))

    @property
    def _log_normaliser(self) -> float:
        """log(η/(γ^{−η} − 1)): P(K = 1) over 1 − γ. For η = 0 its limit 1/log(1/γ)."""
        log_inverse = -math.log(self.gamma)
        x = self.shape * log_inverse
        if abs(x) < 1e-8:  # x/(e^x − 1) = 1 − x/2 + …
            return -x / 2 - math.log(log_inverse)
        if x > 0:
            return math.log(self.shape) - x - math.log(-math.expm1(-x))
        return math.log(-self.shape) - math.log(-math.expm1(x))


@dataclass(frozen=True)
class PoissonRuns(RunsDistribution):
    """K is Poisson distributed. It may be 0: then something that does not depend on the data is released.

    Of all shapes this varies least, and costs most unless the base mechanism is very private.

    Attributes:
        mean: μ, above 0 and at most 1e9.

    Raises:
        UserError: if it is not.
    """

    mean: float

    def __post_init__(self) -> None:
        mean = _number(self.mean, "mean", "PoissonRuns", "above 0 and at most 1e9")
        if not 0 < mean <= MOST_MEAN:
            raise _refusal("mean", "PoissonRuns", "above 0 and at most 1e9", self.mean)
        object.__setattr__(self, "mean", mean)

    @property
    def mean_runs(self) -> float:
        """E[K] = μ."""
        return self.mean

    def probability_of(self, runs: int) -> float:
        """P(K = runs) = e^{−μ} μ^runs / runs!; 0 below 0."""
        runs = _whole(runs)
        if runs < 0:
            return 0.0
        return math.exp(runs * math.log(self.mean) - self.mean - math.lgamma(runs + 1))

    def draw_runs(self, rng: np.random.Generator) -> int:
        """Draw K ≥ 0; see `RunsDistribution.draw_runs`."""
        return int(rng.poisson(self.mean))


def from_mean_runs(mean: float, shape: float) -> RunsDistribution:
    """Return the distribution of this shape with E[K] = `mean`, to a relative 1e-12 or so.

    Args:
        mean: E[K]. Above 1; for the Poisson distribution above 0.
        shape: η > −1, or ∞ for the Poisson distribution, which is the limit of large shapes.

    Raises:
        UserError: if an argument is outside of its interval, or if the shape does not reach the mean with any
            γ that is at least 1e-15, as happens near −1.
    """
    shape = _number(shape, "shape", "from_mean_runs", "above -1 and at most 1000, or infinite")
    if shape == math.inf:
        return PoissonRuns(mean)
    shape = NegativeBinomialRuns(shape, 0.5).shape
    number = _number(mean, "mean", "from_mean_runs", "above 1 and at most 1e9")
    if not 1 < number <= MOST_MEAN:
        raise _refusal("mean", "from_mean_runs", "above 1 and at most 1e9", mean)
    largest = NegativeBinomialRuns(shape, LEAST_GAMMA).mean_runs
    if number > largest:
        raise UserError(
            f"The shape {shape:g} reaches a mean of at most {largest:.3g} runs. "
            f"Got {number:g}; take a larger shape or a smaller mean."
        )

    def excess(log_odds: float) -> float:
        return NegativeBinomialRuns(shape, _gamma(log_odds)).log_mean_runs - math.log(number)

    # In the log-odds of γ the mean falls from `largest` to 1.
    if excess(36.0) >= 0:
        return NegativeBinomialRuns(shape, _gamma(36.0))
    root = optimize.brentq(excess, math.log(LEAST_GAMMA), 36.0, xtol=1e-13, rtol=1e-14)
    return NegativeBinomialRuns(shape, _gamma(float(root)))


def selection_divergence(
    orders: FloatArray,
    base_divergence: Callable[[FloatArray], FloatArray],
    distribution: RunsDistribution,
    base_delta: Callable[[float], float] | None = None,
) -> FloatArray:
    """Bound the Rényi divergence of releasing the best of K runs of a base mechanism, from above.

    Guarantee:
        At each order the result is at least the divergence between the outputs on two neighbouring data sets,
        in both directions, under the assumptions that the module names. It does not fall with the order.

    Args:
        orders: Orders λ > 1, shape [k].
        base_divergence: Given orders above 1, shape [m], returns the base mechanism's Rényi divergence at
            each or an upper bound, shape [m], for both directions. It is asked once. ∞ and NaN both
            mean that nothing is known at that order.
        distribution: That of K.
        base_delta: Given ε̂ > 0, returns a δ̂ for which the base mechanism is (ε̂, δ̂)-DP. Needed for the
            Poisson distribution alone, and asked once for each order.

    Returns:
        The bounds, shape [k]. ∞ where nothing is proven.

    Raises:
        UserError: if an order is not above 1, a callable returns something else than it should, or a Poisson
            distribution comes without `base_delta`.
    """
    wanted = check_array(orders, "orders", "selection_divergence")
    if wanted.ndim != 1 or not np.all(wanted > 1) or not np.all(np.isfinite(wanted)):
        raise UserError(f"The orders must be a list of finite numbers above 1. Got {shown(orders)}.")
    if isinstance(distribution, NegativeBinomialRuns):
        grid = np.union1d(SEARCH_ORDERS, wanted)
        bounds = _negative_binomial(grid, _checked(base_divergence(grid), len(grid)), distribution)
    elif isinstance(distribution, PoissonRuns):
        if base_delta is None:
            raise UserError("A Poisson number of runs needs base_delta, which gives the base's δ at an ε.")
        grid = np.unique(wanted)
        rho = _checked(base_divergence(grid), len(grid))
        bounds = _poisson(grid, rho, distribution, base_delta)
    else:
        raise UserError(
            f"The distribution must be NegativeBinomialRuns or PoissonRuns. Got {shown(distribution)}."
        )
    # A divergence does not fall with its order, so a bound at a larger order serves the smaller ones.
    bounds = np.minimum.accumulate(bounds[::-1])[::-1]
    return np.asarray(bounds[np.searchsorted(grid, wanted)])


def _negative_binomial(orders: FloatArray, rho: FloatArray, runs: NegativeBinomialRuns) -> FloatArray:
    """Papernot & Steinke 2022, Theorem 2, which holds for every η > −1 and every λ̂ ≥ 1.

    Here f′(x) = E[K]·(γ/r)^{1+η} with r = 1 − (1−γ)x, which lies between γ and 1 and is the probability of an
    event. Of two such, r′ ≤ (r·e^{ε(λ̂)})^{1−1/λ̂} by the definition of ε(λ̂). Inserting this and r ≥ γ into
    the module's formula leaves the four terms below.
    """
    log_inverse = -math.log(runs.gamma)
    searched = (1 - 1 / orders) * rho + log_inverse / orders
    least = min(float(np.min(searched)), log_inverse)  # λ̂ = 1 asks nothing of the base
    factor = 1 + runs.shape
    log_mean = max(0.0, runs.log_mean_runs)
    rounding = _SLACK * (1 + factor * log_inverse)
    whole = rho + factor * least + (log_mean + rounding) / (orders - 1)
    return np.asarray(whole * (1 + _SLACK))


def _poisson(
    orders: FloatArray, rho: FloatArray, runs: PoissonRuns, base_delta: Callable[[float], float]
) -> FloatArray:
    """Papernot & Steinke 2022, Theorem 6, with the mass of K = 0 added.

    Here f′(x) = μ·e^{μ(x−1)}, and λ(q−1) + (λ−1)(1−q′) ≤ (λ−1)·δ̂ if the base is (ε̂, δ̂)-DP with
    e^{ε̂} ≤ 1 + 1/(λ−1); the largest such ε̂ has the least δ̂. So all outcomes with K ≥ 1 contribute at most
    μ·e^{(λ−1)(ε + μδ̂)} to the sum whose logarithm over λ − 1 is the divergence. K = 0 contributes its
    probability e^{−μ} on both data sets. Without it the bound would be false for μ < 1.
    """
    delta = np.array([_checked_delta(base_delta(math.log1p(1 / (order - 1)))) for order in orders])
    drift = runs.mean * delta
    logs = math.log(runs.mean) + (orders - 1) * (rho + drift)
    slack = _SLACK * (1 + abs(math.log(runs.mean)) + np.where(np.isfinite(logs), np.abs(logs), 0.0))
    return np.asarray((np.maximum(0.0, np.logaddexp(-runs.mean, logs)) + slack) / (orders - 1))


def _between_exponentials(uniform: float, x: float) -> float:
    """The v in [0, 1] at which e^{xv} has come the part `uniform` of the way from 1 to e^x."""
    if abs(x) < 1e-12:
        return uniform
    if x < 0:
        return math.log1p(uniform * math.expm1(x)) / x
    # The same divided by e^x, from the other end, so that nothing overflows.
    return 1 + math.log1p((1 - uniform) * math.expm1(-x)) / x


def _gamma(log_odds: float) -> float:
    """γ from log(γ/(1−γ)), kept within what `NegativeBinomialRuns` takes."""
    return min(max(1 / (1 + math.exp(-log_odds)), LEAST_GAMMA), 1 - 2**-53)


def _checked(values: FloatArray, count: int) -> FloatArray:
    rho = check_array(values, "result", "base_divergence")
    if rho.shape != (count,):
        raise UserError(f"base_divergence must return one number for each order. Got shape {rho.shape}.")
    if np.any(rho < 0):
        raise UserError(f"base_divergence must return divergences, at least 0. Got {rho.min():g}.")
    return np.where(np.isnan(rho), np.inf, rho)


def _checked_delta(value: float) -> float:
    delta = _number(value, "result", "base_delta", "in [0, 1]")
    if not 0 <= delta <= 1:
        raise _refusal("result", "base_delta", "in [0, 1]", value)
    return delta


def _refusal(name: str, owner: str, interval: str, value: object) -> UserError:
    return UserError(f"The '{name}' parameter of {owner} must be {interval}. Got {shown(value)}.")


def _number(value: object, name: str, owner: str, interval: str) -> float:
    real = None if isinstance(value, bool) else value
    if isinstance(real, Real):
        try:
            return float(real)
        except OverflowError:  # a huge int
            pass
    raise _refusal(name, owner, interval, value)


def _whole(value: object) -> int:
    whole = None if isinstance(value, bool) else value
    if not isinstance(whole, Integral):
        raise _refusal("runs", "probability_of", "a whole number", value)
    if abs(int(whole)) > 10**15:
        raise _refusal("runs", "probability_of", "at most 10^15", value)
    return int(whole)
