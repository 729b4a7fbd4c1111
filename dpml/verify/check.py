"""What a check says, and what it looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["ok", "FAILED", "not checked", "warning"]


@dataclass(frozen=True)
class Check:
    """One check: what was looked at, what came out, and in which words."""

    name: str
    verdict: Verdict
    words: str


@dataclass
class Folder:
    """A run's folder with its two JSON files; either may be missing or hold anything.

    Attributes:
        path: The folder.
        record: `privacy_events.json`.
        summary: `summary.json`.
        seconds: Processor time for each ε.
        bounds: Bounds on the plan's ε, once they are computed.
    """

    path: Path
    record: dict[str, Any] | None
    summary: dict[str, Any] | None
    seconds: float
    bounds: tuple[float, float] | None = None

    @property
    def events(self) -> dict[str, Any]:
        """`privacy_events.json`, where it is there."""
        if self.record is None:
            raise LookupError("there are no events")
        return self.record

    @property
    def figures(self) -> dict[str, Any]:
        """`summary.json`, where it is there."""
        if self.summary is None:
            raise LookupError("there is no summary")
        return self.summary

    @property
    def relation(self) -> str:
        """The neighbouring relation of the events."""
        relation = self.events.get("neighboring_relation")
        if not isinstance(relation, str):
            raise TypeError(f"the neighbouring relation is {relation!r:.40}")
        return relation

    def number(self, name: str) -> float:
        """A finite number of the summary."""
        value = self.figures[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise TypeError(f"{name} is {value!r:.40}")
        return float(value)

    @property
    def is_private(self) -> bool:
        """Whether the run says that it is: it has an ε or a δ."""
        return self.figures.get("epsilon") is not None or self.figures.get("delta") is not None
