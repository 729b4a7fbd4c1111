"""The PATE frontier: accuracy over budgets and numbers of queries."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.charts.published import published_results
from recipes.charts.style import COLOURS, INK, MARKS, MUTED, new_figure, write_picture


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
    title = f"PATE on {rows[0]['dataset'].upper()}: few precise answers or many noisy ones"
    figure, axes = new_figure(title, height=4.8)
    for (name, line), colour, mark in zip(budgets.items(), COLOURS, MARKS, strict=False):
        queries = sorted(line)
        means = [statistics.mean(line[count]) for count in queries]
        axes.plot(queries, means, f"{mark}-", color=colour, linewidth=2, markersize=7, label=name, zorder=3)
        for count in queries:
            each = line[count]
            axes.plot([count] * len(each), each, ".", color=colour, alpha=0.35, markersize=8, zorder=2)
    for other in published_results(rows[0]["dataset"]):
        if other.data_dependent:
            axes.axhline(1 - other.accuracy, color=MUTED, linewidth=1.2, linestyle=":")
            words = f"{other.method}, {other.citation}, data-dependent ε = {other.epsilon:g}"
            place = (0.99, 1.02 * (1 - other.accuracy))
            axes.annotate(
                words, place, xycoords=("axes fraction", "data"), fontsize=8, ha="right", va="bottom"
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
    axes.set_xlabel("queries, each answered: more of them mean more noise on each", color=INK)
    axes.set_ylabel("the student's test error (dots: seeds)", color=INK)
    axes.legend(loc="upper right", frameon=False, labelcolor=INK)
    write_picture(figure, path)
