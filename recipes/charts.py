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


_PUBLISHED_PATE = (
    # Student accuracy on MNIST at the data-dependent ε that was reported, which is private information.
    ("LNMax, Papernot et al. 2017", 2.04, 0.98),
    ("Confident-GNMax, Papernot et al. 2018", 1.97, 0.985),
)


def frontier_chart(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a PATE student's test error against the number of queries, a line for each budget ε.

    Args:
        rows: Figures of runs, as `recipes.pate_frontier` collects them.
        path: Where the PNG goes.
    """
    budgets: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["case"].startswith("ε"):
            line = budgets.setdefault(row["case"].split(",")[0], {})
            line.setdefault(row["queries_asked"], []).append(1 - row["test_accuracy"])
    with mpl.rc_context({"font.size": 11, "font.family": "DejaVu Sans", "axes.edgecolor": _MUTED}):
        figure, axes = plt.subplots(figsize=(8, 4.8), dpi=160, layout="constrained")
        for (name, line), color in zip(budgets.items(), (_PRIVATE, _CEILING, _INK), strict=False):
            queries = sorted(line)
            means = [statistics.mean(line[count]) for count in queries]
            axes.plot(queries, means, "o-", color=color, linewidth=2, markersize=7, label=name, zorder=3)
            for count in queries:
                each = line[count]
                axes.plot([count] * len(each), each, ".", color=color, alpha=0.35, markersize=8, zorder=2)
        if rows[0]["dataset"] == "mnist":
            for name, epsilon, reached in _PUBLISHED_PATE:
                axes.axhline(1 - reached, color=_MUTED, linewidth=1.2, linestyle=":")
                words = f"{name}, data-dependent ε = {epsilon:g}"
                place = ("axes fraction", "data")
                axes.annotate(
                    words, (0.99, 1.02 - 1.02 * reached), xycoords=place, fontsize=8, ha="right", va="bottom"
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis, ticks, words in (
            (axes.xaxis, (10, 20, 50, 100, 200, 500), "{:g}"),
            (axes.yaxis, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5), "{:.0%}"),
        ):
            axis.set_ticks(ticks, [words.format(tick) for tick in ticks])
        axes.minorticks_off()
        counts = [count for line in budgets.values() for count in line]
        errors = [error for line in budgets.values() for each in line.values() for error in each]
        axes.set_xlim(min(counts) / 1.3, max(counts) * 1.5)
        axes.set_ylim(min(0.01, min(errors)) / 1.2, max(errors) * 1.3)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, length=0)
        axes.set_xlabel("queries, each answered: more of them mean more noise on each", color=_INK)
        axes.set_ylabel("the student's test error (dots: seeds)", color=_INK)
        title = f"PATE on {rows[0]['dataset'].upper()}: few precise answers or many noisy ones"
        axes.set_title(title, loc="left", color=_INK, fontweight="bold", pad=12)
        axes.legend(loc="upper right", frameon=False, labelcolor=_INK)
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
