"""Charts of results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from recipes.trials import by_noise

_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_PRIVATE, _CEILING = "#2f6fde", "#d9822b"


def tradeoff_chart(summaries: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draw test accuracy against ε, one point a noise level, with the spread over seeds and the ceiling.

    Args:
        summaries: Contents of `summary.json` of private runs and, if any, non-private ones.
        path: Where the PNG goes.
        title: The chart's title.
    """
    groups = by_noise(summaries)
    ceiling = groups.pop(None, [])
    with mpl.rc_context({"font.size": 11, "font.family": "DejaVu Sans", "axes.edgecolor": _MUTED}):
        figure, axes = plt.subplots(figsize=(8, 4.8), dpi=160, layout="constrained")
        _draw_points(axes, groups)
        if ceiling:
            _draw_ceiling(axes, ceiling)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        ticks = [runs[0]["epsilon"] for runs in groups.values()]
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.set_xlim(min(ticks) / 1.3, max(ticks) * 1.45)
        axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(xmax=1, decimals=None))
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, length=0)
        delta, relation = summaries[0]["delta"], summaries[0]["neighboring_relation"]
        axes.set_xlabel(f"ε at δ = {delta:g}, {relation} (smaller is more private)", color=_INK)
        axes.set_ylabel("test accuracy", color=_INK)
        axes.set_title(title, loc="left", color=_INK, fontweight="bold", pad=12)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def _draw_points(axes: Any, groups: dict[float | None, list[dict[str, Any]]]) -> None:
    epsilons = [runs[0]["epsilon"] for runs in groups.values()]
    means = [statistics.mean(_accuracies(runs)) for runs in groups.values()]
    axes.plot(epsilons, means, "o-", color=_PRIVATE, linewidth=2, markersize=7, zorder=3)
    for (noise, runs), epsilon, mean in zip(groups.items(), epsilons, means, strict=True):
        values = _accuracies(runs)
        if len(values) > 1:
            axes.plot(
                [epsilon] * len(values), values, ".", color=_PRIVATE, alpha=0.35, markersize=8, zorder=2
            )
            deviation = statistics.stdev(values)
            axes.errorbar(epsilon, mean, deviation, color=_PRIVATE, capsize=4, linewidth=1.4, zorder=3)
        axes.annotate(
            f"{mean:.1%}\nσ = {noise:.3g}",
            (epsilon, mean),
            textcoords="offset points",
            xytext=(10, -22),
            fontsize=9,
            color=_INK,
        )
    count = max(len(runs) for runs in groups.values())
    label = f"DP-SGD, mean and standard deviation of {count} seeds" if count > 1 else "DP-SGD, one seed"
    axes.plot([], [], "o-", color=_PRIVATE, label=label)


def _draw_ceiling(axes: Any, runs: list[dict[str, Any]]) -> None:
    mean = statistics.mean(_accuracies(runs))
    axes.axhline(mean, color=_CEILING, linewidth=1.6, linestyle="--", zorder=1)
    axes.plot([], [], "--", color=_CEILING, label=f"without privacy: {mean:.1%}")
    axes.legend(loc="lower right", frameon=False, labelcolor=_INK)


def _accuracies(runs: list[dict[str, Any]]) -> list[float]:
    return [run["test_accuracy"] for run in runs]
