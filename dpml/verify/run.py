"""`verify_run`: read a run's folder, check everything that it says, and say what may be believed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accounting import UserError
from accounting.events import check_number
from dpml.paths import check_path, read_text
from dpml.verify import answers, claims, consistency, files
from dpml.verify.check import Check, Folder
from dpml.verify.parts import CannotVerify, Malformed

_HOSTILE = (
    *(Malformed, UserError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    *(RecursionError, OSError),
)
"""What reading content of odd types or sizes may raise: these checks fail, and say so."""


@dataclass(frozen=True)
class Verification:
    """What was found in a run's folder.

    Attributes:
        folder: Where.
        checks: Every check with its verdict.
        summary: The run's summary as it was read; None if there is none.
        epsilon_bounds: (lower, upper) bounds on the plan's ε, recomputed; None if they could not be.
    """

    folder: Path
    checks: tuple[Check, ...]
    summary: dict[str, Any] | None = field(repr=False)
    epsilon_bounds: tuple[float, float] | None

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.verdict == "FAILED")

    @property
    def believable(self) -> bool:
        """Whether nothing failed and the claim about privacy was confirmed."""
        confirmed = any(check.name == "epsilon" and check.verdict == "ok" for check in self.checks)
        return confirmed and not self.failed

    @property
    def conclusion(self) -> str:
        """What a third party may believe, in one line."""
        if self.failed:
            names = ", ".join(dict.fromkeys(check.name for check in self.failed))
            return f"A third party may not believe this run: {names} FAILED."
        if not self.believable or self.summary is None:
            odd = next(
                (check.words for check in self.checks if check.name == "epsilon"), "nothing is claimed"
            )
            return f"A third party may not believe an ε of this run yet: {odd}."
        if self.summary.get("epsilon") is None:
            return "A third party may believe: this run promises no privacy, and its files agree."
        release = (
            " It is not for release, since its noise is known." if not self.summary["noise_is_secret"] else ""
        )
        upper = max(self.summary["epsilon"], 0.0 if self.epsilon_bounds is None else self.epsilon_bounds[1])
        said = "" if upper == self.summary["epsilon"] else f" (it says {self.summary['epsilon']:.6g})"
        return (
            f"A third party may believe: the events of this run cost at most ε = {upper:.6g}{said} "
            f"at δ = {self.summary['delta']:g} ({self.summary['neighboring_relation']}), if they "
            f"are what ran.{release}"
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """One line for each check, and the conclusion."""
        return [*(f"  {c.verdict:<11}  {c.name:<19}  {c.words}" for c in self.checks), self.conclusion]

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        lower, upper = self.epsilon_bounds or (None, None)
        return {
            "folder": str(self.folder),
            "believable": self.believable,
            "conclusion": self.conclusion,
            "epsilon_lower": lower,
            "epsilon_upper": None if upper == float("inf") else upper,
            "checks": [vars(check) for check in self.checks],
        }


def verify_run(folder: str | os.PathLike[str], *, seconds: float = 60.0) -> Verification:
    """Check everything that a run's folder says of itself. Changes nothing, and asks nothing of the network.

    It can tell whether the figures follow from the events and the files belong together. It cannot
    tell whether the events are what ran: that takes the code and the data.

    Args:
        folder: The output folder of `dpml train`.
        seconds: Processor time for each ε, after which the bracket is as wide as it is.

    Raises:
        UserError: if the folder is none, or holds no run.
    """
    path = check_path(folder, "run")
    seconds = check_number(seconds, "seconds", "verify_run", low=0, high=1e6)
    try:
        is_folder = path.is_dir()
    except OSError:  # of a name that is too long
        is_folder = False
    if not is_folder:
        raise UserError(f"There is no run {str(path)[:200]!r}: it is no folder.")
    if not any(os.path.lexists(path / name) for name in ("privacy_events.json", "summary.json")):
        raise UserError(f"{str(path)!r} is no run: it holds neither privacy_events.json nor summary.json.")
    checks: list[Check] = []
    record, summary = (_json(path, name, checks) for name in ("privacy_events.json", "summary.json"))
    read = Folder(path, record, summary, seconds)

    def run(name: str, check: Callable[[Folder], list[Check]]) -> None:
        try:
            checks.extend(check(read))
        except CannotVerify as reason:
            checks.append(Check(name, "not checked", str(reason)))
        except _HOSTILE as error:
            words = " ".join(str(error).split()) or type(error).__name__
            checks.append(Check(name, "FAILED", f"what it is made of cannot be read: {words:.160}"))

    bounds = None
    if record is not None:
        run("events", consistency.events)
    if summary is not None:
        if record is not None and not any(check.verdict == "FAILED" for check in checks):
            run("epsilon", claims.epsilon)
            bounds = read.bounds
            run("spent", claims.spent)
            run("summary", consistency.summary)
        run("statement", files.statement)
        run("weights", files.weights)
        run("randomness", files.randomness)
        run("ledger", files.ledger)
    run("answers", answers.book)
    run("not_private", files.not_private)
    return Verification(path, tuple(checks), summary, bounds)


def _json(folder: Path, name: str, checks: list[Check]) -> dict[str, Any] | None:
    """A JSON object from a file of the run; None, and a check that says why, if it is none."""
    path = folder / name
    if name == "summary.json" and not os.path.lexists(path):
        running = '"status": "running"' in _text(folder / "privacy_events.json")
        words = (
            "none yet: the run goes on or was killed, and has claimed nothing" if running else "is missing"
        )
        checks.append(Check(name, "not checked" if running else "FAILED", words))
        return None

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        data = json.loads(read_text(path), parse_constant=refuse)
    except OSError as error:
        checks.append(Check(name, "FAILED", f"cannot be read ({error.strerror})"))
        return None
    except (ValueError, RecursionError) as error:
        checks.append(Check(name, "FAILED", f"is no JSON ({error!s:.80})"))
        return None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != 1 or isinstance(version, bool):
        checks.append(Check(name, "FAILED", f"is not of version 1 (got {version!r:.40})"))
        return None
    checks.append(Check(name, "ok", "can be read"))
    return dict(data)


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError):
        return ""
