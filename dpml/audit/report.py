"""What an audit reports: lower bounds beside the accounted ones, checks, a verdict, words and a picture."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any, Literal

from dpml.outputs import RunFolder

AUDIT_VERSION = 1
Verdict = Literal["consistent", "CONTRADICTED"]
_INK, _BLUE, _RED = "#1f2933", "#2f6fde", "#c0392b"


@dataclass(frozen=True)
class Bound:
    """A lower bound on ε.

    Attributes:
        method: How it was found.
        epsilon: The bound, on ε at `delta`; may be infinite.
        delta: δ.
        accounted: The accounted upper bound on ε at this δ.
        confidence: The probability with which it is not above the true ε.
        assumes: What it takes for granted; None if nothing.
        details: The numbers that it is made of, such as canaries, guesses, and how many were right.
    """

    method: str
    epsilon: float
    delta: float
    accounted: float
    confidence: float
    assumes: str | None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def contradicts(self) -> bool:
        """Whether it is above the accounted ε."""
        return self.epsilon > self.accounted


@dataclass(frozen=True)
class Check:
    """A test of the executed mechanism against the accounted one.

    Attributes:
        name: What should hold.
        p_value: The probability of what was seen, or anything further off, if it holds.
        level: Below this, it does not.
    """

    name: str
    p_value: float
    level: float

    @property
    def holds(self) -> bool:
        """Whether the data do not speak against it."""
        return self.p_value >= self.level


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit.

    Guarantee: if what was executed is what is accounted, and the bounds' assumptions hold, the verdict is
    "CONTRADICTED" with a probability of at most 1 − `confidence`: all bounds and checks share it.

    Attributes:
        title: What was audited.
        epsilon: The accounted upper bound on ε; infinite if nothing is claimed.
        epsilon_lower: The accountant's lower bound for the dominating pair of the events.
        delta: δ.
        confidence: Of the verdict.
        bounds: Empirical lower bounds.
        checks: Tests of the mechanism.
        about: What else is to be known: data set, canaries, configuration.
    """

    title: str
    epsilon: float
    epsilon_lower: float
    delta: float
    confidence: float
    bounds: list[Bound]
    checks: list[Check]
    about: dict[str, Any]

    @property
    def contradictions(self) -> list[str]:
        """What speaks against the accounted ε, in words."""
        above = [
            f"ε is at least {bound.epsilon:.4g} at δ = {bound.delta:.2g} by {bound.method}, "
            f"above the accounted {bound.accounted:.4g}"
            for bound in self.bounds
            if bound.contradicts
        ]
        return above + [f"not so: {check.name}" for check in self.checks if not check.holds]

    @property
    def verdict(self) -> Verdict:
        """Whether anything contradicts what is accounted."""
        return "CONTRADICTED" if self.contradictions else "consistent"

    def to_dict(self) -> dict[str, Any]:
        """The content of `audit.json`."""
        checks = [{**asdict(check), "holds": check.holds} for check in self.checks]
        return {
            "schema_version": AUDIT_VERSION,
            "title": self.title,
            "verdict": self.verdict,
            "contradictions": self.contradictions,
            "confidence": self.confidence,
            "epsilon": self.epsilon,
            "epsilon_lower": self.epsilon_lower,
            "delta": self.delta,
            # JSON has no infinity, and null would look like no bound.
            "bounds": [{**asdict(b), "is_infinite": math.isinf(b.epsilon)} for b in self.bounds],
            "checks": checks,
            "about": self.about,
        }

    def text(self) -> str:
        """The report in words, as Markdown."""
        lines = [
            f"# Audit of {self.title}",
            "",
            f"**{self.verdict}** at confidence {self.confidence:g}.",
            *[f"- {words}" for words in self.contradictions],
            "",
            f"Accounted: ε ≤ {self.epsilon:.4g} at δ = {self.delta:g}, the guarantee (no less than "
            f"{self.epsilon_lower:.4g} for the worst records that the accountant allows for).",
            "",
            "| lower bound by | ε is at least | accounted at most | at δ | assumes |",
            "| --- | --- | --- | --- | --- |",
            *[
                f"| {b.method} | {b.epsilon:.4g} | {b.accounted:.4g} | {b.delta:.2g} | "
                f"{b.assumes or 'nothing'} |"
                for b in self.bounds
            ],
            "",
        ]
        if self.checks:
            rows = [f"| {c.name} | {c.p_value:.2g} | {'yes' if c.holds else '**no**'} |" for c in self.checks]
            lines += ["| executed as accounted? | p-value | |", "| --- | --- | --- |", *rows, ""]
        return "\n".join([*lines, _MEANING])

    def write(self, output: str | os.PathLike[str] | RunFolder) -> None:
        """Write `audit.json`, `audit.md` and `audit.png` to a new folder.

        Raises:
            UserError: if the folder holds files already, or cannot be written to.
        """
        folder = output if isinstance(output, RunFolder) else RunFolder(output)
        folder.write_json("audit.json", self.to_dict())
        folder.write_text("audit.md", self.text())
        (folder.path / "audit.png").write_bytes(self.plot())

    def plot(self) -> bytes:
        """A PNG: each lower bound as a bar, and the accounted ε at its δ as a mark."""
        # Imported here: it takes a second. Figure alone leaves the caller's backend and settings as they are.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 1.7 + 0.8 * len(self.bounds)), dpi=150, layout="constrained")
        axes = figure.subplots()
        values = [value for b in self.bounds for value in (b.epsilon, b.accounted) if math.isfinite(value)]
        right = 1.15 * max(values, default=0.0) or 1.0
        for row, bound in enumerate(self.bounds):
            length = min(bound.epsilon, right)
            axes.barh(row, length, height=0.45, color=_RED if bound.contradicts else _BLUE)
            words = "∞" if math.isinf(bound.epsilon) else f"{bound.epsilon:.3g}"
            if math.isfinite(bound.accounted):
                axes.plot([bound.accounted] * 2, [row - 0.36, row + 0.36], color=_INK, linewidth=2.2)
                axes.annotate(
                    f"{bound.accounted:.3g}",
                    (bound.accounted, row - 0.38),
                    ha="center",
                    va="bottom",
                    color=_INK,
                )
            axes.annotate(
                words,
                (length, row),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=_RED if bound.contradicts else _BLUE,
                fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
            )
        names = [f"{b.method}\nat δ = {b.delta:.2g}\nassumes {b.assumes or 'nothing'}" for b in self.bounds]
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.65)
        axes.set_xlim(0, 1.08 * right)
        axes.set_xlabel("ε: empirical lower bound (bar), accounted upper bound (mark)", color=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK)
        colour = _RED if self.contradictions else _INK
        figure.suptitle(
            f"Audit of {self.title}: {self.verdict}", color=colour, fontweight="bold", fontsize=11
        )
        buffer = BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()


_MEANING = """## What this says

A lower bound says that what was audited leaks at least that much: an attacker who saw its releases told
neighbouring data apart better than any smaller ε would allow. One that is above the accounted ε, or a check
that fails, means that the code does not do what was accounted for.

It does not say that no more is leaked. A better attacker may find more, so "consistent" is no proof of
privacy, and only the accounted ε is a guarantee. A bound that assumes something is worth as much as the
assumption. What is measured on canaries need not hold for other parameters and records.

An audit of training has trained on the records, and costs them their ε once more.
"""
