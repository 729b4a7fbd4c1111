"""An attacker who chooses each mechanism after seeing the outcomes of all earlier ones, answered exactly.

Mechanisms have a few outcomes, so everything here is a finite sum. P is the distribution of the outcomes on
one data set, Q that on its neighbour. A menu lists what the attacker may run; what was run so far is counted
in `Spent`, by menu position; a rule says whether counts, the candidate included, are admitted.

`strongest` finds, by backward induction, the largest δ(ε) = Σ max(0, P − e^ε·Q) that any policy reaches under
a rule. Of the past it needs only what was spent and the loss log(P/Q) of what came out, since of P's mass at
the loss L the part max(0, 1 − e^{ε−L}) counts. `leaves` walks the whole tree of a policy instead, and takes
any policy whatever.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Number = float | Fraction
Spent = tuple[int, ...]
Rule = Callable[[Spent], bool]
History = tuple[tuple[int, int], ...]
"""What was run, by menu position, and which outcome it had."""
Policy = Callable[[History], int | None]
"""The menu position of the next mechanism, or None to stop."""


@dataclass(frozen=True)
class Mechanism:
    """The probabilities of each outcome on the two data sets."""

    p: tuple[Number, ...]
    q: tuple[Number, ...]

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(_loss(p, q) for p, q in zip(self.p, self.q, strict=True))

    @property
    def swapped(self) -> Mechanism:
        """The same with the data sets exchanged, which no accountant may tell apart from it."""
        return Mechanism(self.q, self.p)

    def divergence(self, orders: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The Rényi divergence at each order, of the direction in which it is larger."""
        with np.errstate(divide="ignore", invalid="ignore"):
            p, q = np.log(np.array(self.p, float)), np.log(np.array(self.q, float))
            both = []
            for a, b in ((p, q), (q, p)):
                a, b = a[a > -np.inf], b[a > -np.inf]
                terms = orders[:, None] * a + (1 - orders[:, None]) * b
                both.append(np.logaddexp.reduce(terms, axis=1) / (orders - 1))
        return np.asarray(np.maximum(0.0, np.maximum(*both)))


def _loss(p: Number, q: Number) -> float:
    if q == 0:
        return math.inf
    return math.log(p / q) if p > 0 else -math.inf


def randomised_response(odds: Number, outcomes: int = 2) -> Mechanism:
    """Tell the truth `odds` times as often as each of the other outcomes. It is log(odds)-DP."""
    total = odds + outcomes - 1
    rest = (1 / total,) * (outcomes - 2)
    return Mechanism((odds / total, 1 / total, *rest), (1 / total, odds / total, *rest))


def rare(probability: float, loss: float) -> Mechanism:
    """Hardly ever anything happens, but then the loss is large. Its other direction is another mechanism."""
    there = probability * math.exp(-loss)
    return Mechanism((probability, 1 - probability), (there, 1 - there))


def failing(odds: float, delta: float) -> Mechanism:
    """Randomised response that with probability δ says plainly which data set it is: (log(odds), δ)-DP."""
    inner = randomised_response(odds)
    p = tuple((1 - delta) * x for x in inner.p)
    q = tuple((1 - delta) * x for x in inner.q)
    return Mechanism((*p, delta, 0.0), (*q, 0.0, delta))


def hockey_stick(leaves: Sequence[tuple[Any, Any]], factor: Any) -> tuple[Any, Any]:
    """δ at e^ε = `factor`, of P from Q and of Q from P."""
    return (
        sum(max(0, p - factor * q) for p, q in leaves),
        sum(max(0, q - factor * p) for p, q in leaves),
    )


def spend(spent: Spent, position: int) -> Spent:
    return tuple(count + (i == position) for i, count in enumerate(spent))


def spent_by(history: History, menu: Sequence[Mechanism]) -> Spent:
    return tuple(sum(position == i for position, _ in history) for i in range(len(menu)))


def loss_of(history: History, menu: Sequence[Mechanism]) -> float:
    return sum(menu[position].losses[outcome] for position, outcome in history)


def leaves(
    menu: Sequence[Mechanism], admits: Rule, policy: Policy, depth: int
) -> list[tuple[Number, Number]]:
    """The probabilities (P, Q) of every way in which the interaction can end.

    A branch ends at `depth`, when the policy stops, and when the rule refuses what it asks for.
    """

    def walk(history: History, p: Number, q: Number) -> list[tuple[Number, Number]]:
        asked = policy(history) if len(history) < depth else None
        if asked is None or not admits(spend(spent_by(history, menu), asked)):
            return [(p, q)]
        ends = []
        for outcome, (a, b) in enumerate(zip(menu[asked].p, menu[asked].q, strict=True)):
            if a > 0 or b > 0:
                ends += walk((*history, (asked, outcome)), p * a, q * b)
        return ends

    return walk((), 1, 1)


def strongest(menu: Sequence[Mechanism], admits: Rule, epsilon: float, depth: int) -> tuple[float, Policy]:
    """The largest δ(ε), of P from Q, that any policy of at most `depth` mechanisms reaches, and that policy.

    Losses are merged where they agree to 1e-10, which moves δ by about as much, relatively.
    """
    allowed = functools.cache(admits)
    losses = [tuple(zip(map(float, m.p), m.losses, strict=True)) for m in menu]

    @functools.cache
    def best(spent: Spent, loss: float) -> tuple[float, int | None]:
        value, choice = -math.expm1(min(0.0, epsilon - loss)), None
        if sum(spent) < depth:
            for i, outcomes in enumerate(losses):
                after = spend(spent, i)
                if allowed(after):
                    then = sum(p * best(after, round(loss + x, 10))[0] for p, x in outcomes if p > 0)
                    if then > value * (1 + 1e-12) + 1e-300:
                        value, choice = then, i
        return value, choice

    def policy(history: History) -> int | None:
        return best(spent_by(history, menu), round(loss_of(history, menu), 10))[1]

    return best((0,) * len(menu), 0.0)[0], policy
