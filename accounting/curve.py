"""ε against steps, without composing from scratch at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from accounting import pld
from accounting.accountant import METHODS, Method
from accounting.atoms import Atom, merge_gaussians
from accounting.errors import UserError
from accounting.events import Event, NeighboringRelation, atoms, check_count, check_number, shown
from accounting.pairs import FloatArray
from accounting.rdp import log_hockey_stick_factor, rdp
from accounting.tilted import Part, Repetition, infinite_mass, largest_loss, tilt_at

_RATIO = 1.05  # of the numbers of steps at which the bounds are computed, where more are asked for
_FEW = 64
_ORDERS: FloatArray = np.concatenate(
    [1 + np.geomspace(0.005, 63, 150), np.unique(np.rint(np.geomspace(65, 2**14, 50)))]
)
_LARGE = 100.0  # beyond this a curve is drawn by Rényi bounds alone: quick, and large either way


def epsilon_curve(
    step: Event,
    steps: Sequence[int],
    delta: float,
    *,
    method: Method = "pld",
    neighboring_relation: NeighboringRelation = "zero-out",
    tolerance: float = 0.01,
) -> list[tuple[float, float]]:
    """Return (lower, upper) bounds on ε after each of several numbers of steps.

    Up to 64 different numbers are answered one by one. Of more, the bounds are computed at numbers 5 % apart
    (which moves ε by about 2.5 %); in between, the next larger number's upper bound and the next smaller
    one's lower bound hold, since ε never falls.

    A curve to look at while a plan runs. The guarantee of a run that may be stopped early is the plan's.

    Args:
        step: The event of one step.
        steps: Numbers of steps, in any order.
        delta: In (0, 1).
        method: "pld" or "rdp", for the upper bound; the lower one is by PLD.
        neighboring_relation: As for `PrivacyAccountant`.
        tolerance: Relative width of the bracket where it is computed.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f"The method must be {' or '.join(METHODS)}. Got {shown(method)}.")
    if not isinstance(steps, Sequence):
        raise UserError(
            f"The 'steps' of epsilon_curve() must be a list of whole numbers. Got {shown(steps)}."
        )
    delta = check_number(delta, "delta", "epsilon_curve()", low=0, high=1)
    ends = (steps[0], steps[-1]) if isinstance(steps, range) and steps else steps  # all of a range is whole
    checked = [check_count(count, "steps", "epsilon_curve()") for count in ends]
    steps = steps if isinstance(steps, range) else checked
    counts = atoms(step, neighboring_relation)
    if not counts or not steps:
        return [(0.0, 0.0)] * len(steps)
    renyi = _renyi_curve(counts, steps, delta)
    if method == "rdp" and not all(atom.has_pair for atom in counts):
        return [(0.0, upper) for upper in renyi]
    if math.inf > max(renyi) > _LARGE:
        return [(0.0, upper) for upper in renyi]
    lowers, uppers = _envelope(counts, steps, delta, tolerance)
    if method == "rdp":
        uppers = renyi
    return [(low, max(low, min(up, cap))) for low, up, cap in zip(lowers, uppers, renyi, strict=True)]


def _renyi_curve(counts: Mapping[Atom, int], steps: Sequence[int], delta: float) -> list[float]:
    rho = rdp(counts, _ORDERS)
    conversion = (log_hockey_stick_factor(_ORDERS) - math.log(delta)) / (_ORDERS - 1)
    counts_of_steps = np.asarray(steps, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        bounds = [
            np.min(np.outer(some, rho) + conversion, axis=1) for some in np.array_split(counts_of_steps, 16)
        ]
    return [float(x) for x in np.where(counts_of_steps > 0, np.maximum(np.concatenate(bounds), 0), 0)]


def _envelope(
    counts: Mapping[Atom, int], steps: Sequence[int], delta: float, tolerance: float
) -> tuple[list[float], list[float]]:
    """Lower and upper bounds at all `steps` from those at the nodes."""
    wanted = sorted(set(steps) - {0})
    nodes = wanted if len(wanted) <= _FEW else _spread(wanted)
    bounds = _at_nodes(counts, nodes, delta, tolerance)
    # ε never falls with the number of steps, so neither do the best bounds.
    lowers = list(accumulate((low for low, _ in bounds), max))
    uppers = list(accumulate((up for _, up in reversed(bounds)), min))[::-1]
    at = np.array(nodes)
    below = np.searchsorted(at, steps, side="right") - 1
    above = np.searchsorted(at, steps, side="left")
    return (
        [lowers[i] if i >= 0 else 0.0 for i in below.tolist()],
        [uppers[i] if k else 0.0 for i, k in zip(above.tolist(), steps, strict=True)],
    )


def _spread(wanted: list[int]) -> list[int]:
    """The first, the last, and between them numbers at least 5 % apart."""
    nodes = [wanted[-1]]
    for count in reversed(wanted):
        if count * _RATIO <= nodes[-1]:
            nodes.append(count)
    return sorted({*nodes, wanted[0]})


def _at_nodes(
    counts: Mapping[Atom, int], nodes: Sequence[int], delta: float, tolerance: float
) -> list[tuple[float, float]]:
    """Bounds at ascending numbers of steps; neighbours within a factor of two share tilt and transforms."""
    most = nodes[-1]

    def alone(count: int) -> tuple[float, float]:
        runs = merge_gaussians({atom: k * count for atom, k in counts.items()})
        return pld.epsilon_bounds(runs, delta, tolerance)

    whole = {atom: k * most for atom, k in counts.items()}
    if len(nodes) < 4 or pld.simple_epsilon(whole, delta) is not None:
        return [alone(count) for count in nodes]
    question = pld.Question(whole, delta, None)
    if question.finest > 1:
        return [alone(count) for count in nodes]
    h, _ = question.width(tolerance)
    if len(nodes) > _FEW and all(atom.sampling == "poisson" for atom in counts):
        h *= 2  # what is lost is less than what lies between the nodes
    families = [
        _Family([(lattice, k // most) for lattice, k in parts], delta, upper=upper)
        for i, direction in enumerate(question.directions)
        for parts, upper in zip(question.lattices(h, direction), (True, False), strict=True)
        if upper or i == 0
    ]
    out: list[tuple[float, float]] = []
    guess = alone(most)[1]
    for count in reversed(nodes):
        found = [(family.epsilon(count, guess), family.upper) for family in families]
        uppers = [value for value, upper in found if upper]
        lowers = [value for value, upper in found if not upper]
        if None in uppers or None in lowers:
            out.append(alone(count))
        else:
            lower, upper_bound = (
                max(x for x in lowers if x is not None),
                max(x for x in uppers if x is not None),
            )
            out.append((min(lower, upper_bound), upper_bound))
        guess = out[-1][1]
    return out[::-1]


class _Family:
    """Runs of the same parts in descending numbers; the tilt is renewed where it tells too little."""

    def __init__(self, parts: list[Part], delta: float, *, upper: bool) -> None:
        self.parts, self.delta, self.upper = parts, delta, upper
        self._least, self._found = math.inf, 0.0

    def epsilon(self, count: int, guess: float) -> float | None:
        """The bound after `count` runs, about `guess`; None if none is found."""
        repeated = [(lattice, k * count) for lattice, k in self.parts]
        most = largest_loss(repeated)
        if self.upper and infinite_mass(repeated) < self.delta and most <= 0.9 * guess:
            return most
        for fresh in (False, True):
            if fresh or count < self._least:
                self._least = count / 2
                self._runs = Repetition.of(self.parts, tilt_at(repeated, self._found or guess), count)
                self._spectra = self._runs.spectra(self._runs.size(count))
            found, inside = self._runs.sum(count, self._spectra).epsilon(self.delta, upper=self.upper)
            if inside and math.isfinite(found):
                self._found = found
                return found
        return None
