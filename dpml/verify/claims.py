"""The claims about ε, against what the events cost."""

from __future__ import annotations

from dpml.verify.check import Check, Folder
from dpml.verify.composition import Bounds, epsilon_bounds
from dpml.verify.parts import NO_PROTECTION, Malformed, together

_NEAR = 0.005  # relative: how far below the upper bound a claim may lie if it is above the lower one
_ROUNDING = 1e-9  # relative: what both accountants may differ by where both are exact


def epsilon(folder: Folder) -> list[Check]:
    """The guarantee, and the lower bound on it."""
    parts = together(folder.events["planned"], folder.relation)
    if not folder.is_private:
        if parts == {NO_PROTECTION: 1}:
            return [Check("epsilon", "ok", "none is claimed, and the events have no protection")]
        return [Check("epsilon", "FAILED", "none is claimed, but the events are those of a private run")]
    claim = folder.number("epsilon")
    bounds = epsilon_bounds(parts, _delta(folder), claim=claim, seconds=folder.seconds)
    folder.bounds = (float(bounds.lower), float(bounds.upper))
    return [_claimed("epsilon", claim, bounds), _claimed_lower(folder.number("epsilon_lower"), bounds)]


def spent(folder: Folder) -> list[Check]:
    """The reading: ε of what was committed."""
    if not folder.is_private:
        return []
    claim, relation = folder.number("epsilon_spent"), folder.relation
    if claim > folder.number("epsilon"):
        return [Check("spent", "FAILED", "more was spent than planned")]
    planned, committed = (together(folder.events[key], relation) for key in ("planned", "committed"))
    if committed == planned:
        same = claim == folder.number("epsilon")
        words = "all of the plan" if same else "the whole plan was committed, but the reading is another ε"
        return [Check("spent", "ok" if same else "FAILED", words)]
    bounds = epsilon_bounds(committed, _delta(folder), claim=claim, seconds=folder.seconds)
    return [_claimed("spent", claim, bounds)]


def _delta(folder: Folder) -> float:
    delta = folder.number("delta")
    if not 1e-100 < delta < 1:
        raise Malformed(f"δ is {delta:g}")
    return delta


def _claimed(name: str, claim: float, bounds: Bounds) -> Check:
    lower, upper = float(bounds.lower), float(bounds.upper)
    between = f"it lies between {lower:.6g} and {upper:.6g}"
    if claim < lower * (1 - _ROUNDING):
        return Check(name, "FAILED", f"contradicted: {claim:.6g} is claimed, {between}")
    if claim >= upper * (1 - _ROUNDING):
        return Check(name, "ok", f"confirmed: {claim:.6g} is claimed, {between}")
    if claim >= upper * (1 - _NEAR):
        off = (upper - claim) / upper
        return Check(name, "ok", f"confirmed to within {off:.1%}: {claim:.6g} is claimed, {between}")
    return Check(name, "not checked", f"not confirmed: {claim:.6g} is claimed, {between}")


def _claimed_lower(claim: float, bounds: Bounds) -> Check:
    lower, upper = float(bounds.lower), float(bounds.upper)
    if claim > upper * (1 + _ROUNDING):
        words = f"contradicted: at least {claim:.6g} is claimed, but it is at most {upper:.6g}"
        return Check("epsilon_lower", "FAILED", words)
    if claim <= lower * (1 + _NEAR):
        return Check("epsilon_lower", "ok", f"confirmed: {claim:.6g} is claimed")
    return Check("epsilon_lower", "not checked", f"not confirmed: {claim:.6g} is claimed, {lower:.6g} proven")
