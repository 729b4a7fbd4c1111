"""What all charts look like: colours that colour-blind readers tell apart, marks that survive grey print."""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#5f6c7b", "#e4e7eb"
# Okabe & Ito 2008, in an order in which neighbours also differ in lightness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7a4f9e", "#4d4d4d")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
PLOTLY_MARKS = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "triangle-down",
    "cross",
    "x",
    "triangle-left",
    "triangle-right",
)
# Even in lightness, and the same to colour-blind readers; without its end, which is too pale on white.
SCALE = ListedColormap(mpl.colormaps["cividis"](np.linspace(0, 0.86, 256)), "cividis, without its end")
_NEAR_TOP = 0.9
_SHORTEST = 0.02


@dataclass(frozen=True)
class AccuracyAxis:
    """How accuracy is drawn: as it is, or as the error on a log scale where all of it is high.

    Attributes:
        as_error: Whether the error is drawn.
        low: Lower end of the range of accuracies.
        high: Upper end.
    """

    as_error: bool
    low: float
    high: float

    @classmethod
    def of(cls, accuracies: Iterable[float], scale: str = "auto") -> AccuracyAxis:
        """The axis for some accuracies; with the scale "auto", the error if all are above 90 %."""
        values = list(accuracies)
        as_error = scale == "error" or (scale == "auto" and min(values) >= _NEAR_TOP and max(values) < 1)
        if as_error:
            least = min((1 - value for value in values if value < 1), default=0.01)
            return cls(True, 1 - min(1.0, max(1 - min(values), least) * 1.35), 1 - least / 1.35)
        spread = max(max(values) - min(values), _SHORTEST)
        return cls(False, max(0.0, min(values) - 0.12 * spread), min(1.0, max(values) + 0.08 * spread))

    def value(self, accuracy: float) -> float:
        """What is drawn for an accuracy."""
        return 1 - accuracy if self.as_error else accuracy

    def percent(self, accuracy: float) -> str:
        """An accuracy in words, to the digits that matter on this axis."""
        return f"{100 * accuracy:.{2 if self.as_error else 1}f} %"

    @property
    def label(self) -> str:
        """The axis's label."""
        return "test error (log scale; up is better)" if self.as_error else "test accuracy"

    @property
    def ticks(self) -> list[float]:
        """Errors to mark: 1, 2 and 5 times powers of ten, or more where few of them are in range."""
        least, most = 1 - self.high, 1 - self.low
        for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), (1, *(n / 10 for n in range(11, 100)))):
            powers = range(math.floor(math.log10(least)), 1)
            ticks = [d * 10.0**p for p in powers for d in digits if least <= d * 10.0**p <= most]
            if len(ticks) >= 3:
                break
        return ticks[:: max(1, len(ticks) // 8)]

    @property
    def note(self) -> str:
        """What the reader should know of the range."""
        if self.as_error:
            return "the axis is the error, on a log scale that ends where the points do"
        if self.low > 0:
            return f"the accuracy axis starts at {100 * self.low:.0f} %, not at 0"
        return ""

    def apply(self, axes: Any) -> None:
        """Set the y axis."""
        axes.set_ylabel(self.label, color=INK)
        if self.as_error:
            axes.set_yscale("log")
            axes.set_yticks(self.ticks, [f"{tick:.3g} %" for tick in (100 * t for t in self.ticks)])
            axes.minorticks_off()
        else:
            axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
        axes.set_ylim(self.value(self.low), self.value(self.high))


class _Picture(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def new_figure(title: str, *, height: float = 5.0) -> tuple[Figure, Any]:
    """A figure of 8 inches with one pair of axes."""
    with mpl.rc_context({"font.size": 11, "font.family": "DejaVu Sans", "axes.edgecolor": MUTED}):
        figure = _Picture(figsize=(8, height), dpi=160, layout="constrained")
        axes = figure.subplots()
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, length=0)
        axes.set_title(title, loc="left", color=INK, fontweight="bold", pad=12)
    return figure, axes


def log_ticks(values: Sequence[float], *, most: int = 8) -> dict[float, str]:
    """Ticks of a log axis and their words: the values if they are few and apart, else round numbers."""
    low, high = min(values), max(values)
    ticks: list[float] = []
    for value in sorted(set(values)):
        if not ticks or value > ticks[-1] * 1.18 * (high / low) ** 0.02:
            ticks.append(value)
    if len(ticks) > most or len(ticks) < len({f"{value:.2g}" for value in values}):
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        ticks = [d * 10.0**p for p in powers for d in (1, 2, 5) if low / 1.3 <= d * 10.0**p <= high * 1.3]
        if len(ticks) > most:
            ticks = [10.0**p for p in powers if low / 1.3 <= 10.0**p <= high * 1.3]
    return {tick: f"{tick:.2g}" if tick < 100 else f"{tick:,.0f}" for tick in ticks or [low]}


def log_axis(axis: Any, values: Sequence[float]) -> None:
    """A matplotlib log axis with `log_ticks`."""
    ticks = log_ticks(values)
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(list(ticks), list(ticks.values()))
    axis.set_minor_locator(mpl.ticker.NullLocator())


def footnote(figure: Figure, parts: Iterable[str], *, width: int = 142) -> None:
    """Small words below the chart. Each part is a sentence; empty ones are left out."""
    text = " ".join(f"{part[0].upper()}{part[1:]}." for part in parts if part)
    lines = textwrap.fill(text, width)
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=7.5, color=MUTED, linespacing=1.35)


def legend(axes: Any) -> None:
    """A legend below the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 2 if max(map(len, labels)) > 28 or len(labels) > 9 else min(3, len(labels))
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.11), "borderaxespad": 0.5}
        look = {"frameon": False, "labelcolor": INK, "fontsize": 9, "columnspacing": 2.5}
        axes.legend(handles, labels, ncols=columns, **below, **look)


def write_picture(figure: Figure, path: Path, figures: object = None) -> None:
    """Write a PNG. What it shows is kept in it as text too, so that a picture can be checked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {} if figures is None else {"Description": json.dumps(figures)}
    figure.savefig(path, metadata=metadata)
