"""The charts as matplotlib figures, for papers and notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from recipes.charts.plans import Plan
from recipes.charts.published import Published, published_results
from recipes.charts.study import METHODS, Cell, Line, Study, name_of, pareto, small
from recipes.charts.style import (
    COLOURS,
    INK,
    MARKS,
    MUTED,
    SCALE,
    AccuracyAxis,
    footnote,
    legend,
    log_axis,
    new_figure,
)

Scale = Literal["auto", "accuracy", "error"]
Speed = Literal["seconds", "examples"]
_HALO = [withStroke(linewidth=2.5, foreground="white")]
_FEW = 9
_DASHES = ("--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))


def accuracy_chart(study: Study, *, published: bool = False, scale: Scale = "auto") -> Figure:
    """Test accuracy against ε: a line for each method or recipe, the spread over seeds, and the ceilings.

    Args:
        study: What is drawn.
        published: Whether published results on the same data are drawn too.
        scale: "accuracy", "error" (on a log scale), or "auto": the error where every accuracy is above 90 %.

    Raises:
        ValueError: if there is no private run, so that there is no ε.
    """
    others = published_results(study.dataset) if published else []
    epsilons = [e for cell in study.cells if (e := cell.epsilon)] + [other.epsilon for other in others]
    if not epsilons:
        raise ValueError("There is no private run to draw against ε.")
    axis = _accuracy_axis(study, scale, others)
    beside = ", beside published results" if others else ""
    title = f"{name_of(study.dataset)}: accuracy against privacy{beside}"
    figure, axes = new_figure(title, height=6.2 if others else 5.4)
    for (line, colour, mark), below in zip(_styled(study.lines), _sides(), strict=False):
        _draw_line(axes, line, colour, mark, axis, study, below=below)
    _draw_ceilings(axes, study, axis)
    key = _draw_published(axes, others, axis)
    log_axis(axes.xaxis, epsilons)
    axes.set_xlim(min(epsilons) / 1.3, max(epsilons) * 1.5)
    axis.apply(axes)
    axes.set_xlabel(f"{study.guarantee_in_words} (log scale; smaller is more private)", color=INK)
    legend(axes)
    footnote(figure, (study.seeds_in_words, axis.note, study.left_out_in_words, key))
    return figure


def speed_chart(study: Study, *, speed: Speed = "seconds", scale: Scale = "auto") -> Figure:
    """Test accuracy against training seconds or examples per second, coloured by ε.

    Raises:
        ValueError: if no run knows its speed.
    """
    timed = [cell for cell in (*study.cells, *study.ceilings) if _speed(cell, speed)]
    if not timed:
        raise ValueError("No run knows how long it took.")
    axis = _accuracy_axis(study, scale)
    figure, axes = new_figure(f"{name_of(study.dataset)}: accuracy against speed", height=5.4)
    epsilons = [cell.epsilon for cell in timed if cell.epsilon]
    norm, points = _log_norm(epsilons), None
    for line, _, mark in _styled(study.lines):
        cells = [cell for cell in line.cells if _speed(cell, speed)]
        if cells:
            at = [_speed(cell, speed) for cell in cells]
            _error_bars(axes, at, cells, axis, MUTED)
            points = axes.scatter(
                at,
                [axis.value(cell.mean) for cell in cells],
                c=[cell.epsilon for cell in cells],
                **{"norm": norm, "cmap": SCALE, "marker": mark, "s": 70, "zorder": 3},
                edgecolors=INK,
                linewidths=0.7,
                label=line.label,
                gid="cells",
            )
    _scatter_ceilings(axes, study, axis, speed)
    if points is not None:
        _colour_bar(figure, axes, points, study.guarantee_in_words, epsilons)
    speeds = [found for cell in timed if (found := _speed(cell, speed))]
    log_axis(axes.xaxis, speeds)
    axes.set_xlim(min(speeds) / 1.4, max(speeds) * 1.4)
    axis.apply(axes)
    words = {
        "seconds": "training seconds (log scale; less is faster)",
        "examples": "training examples per second (log scale; more is faster)",
    }
    axes.set_xlabel(words[speed], color=INK)
    legend(axes)
    machine = "time as it was on the machine and under the load of each run: no comparison between machines"
    footnote(figure, (study.seeds_in_words, machine, axis.note, study.left_out_in_words))
    return figure


def pareto_chart(study: Study, *, scale: Scale = "auto") -> Figure:
    """ε, test accuracy and training seconds at once: what no other setting beats is full, the rest faint.

    Raises:
        ValueError: if no private run knows its training seconds.
    """
    timed = [cell for cell in study.cells if cell.seconds]
    if not timed:
        raise ValueError("No private run knows how long it took.")
    front = pareto(study.cells)
    axis = _accuracy_axis(study, scale)
    figure, axes = new_figure(f"{name_of(study.dataset)}: what no other setting beats", height=5.4)
    seconds = [found for cell in timed if (found := cell.mean_seconds)]
    norm, points = _log_norm(seconds), None
    for line, _, mark in _styled(study.lines):
        for kind, look in (
            ("beaten", {"alpha": 0.45, "s": 45, "zorder": 2, "edgecolors": "none"}),
            ("front", {"s": 95, "zorder": 3, "edgecolors": INK, "linewidths": 1.2}),
        ):
            cells = [c for c in line.cells if c.seconds and (c in front) == (kind == "front")]
            if cells:
                points = axes.scatter(
                    [cell.epsilon for cell in cells],
                    [axis.value(cell.mean) for cell in cells],
                    c=[cell.mean_seconds for cell in cells],
                    **{"norm": norm, "cmap": SCALE, "marker": mark},
                    **look,
                    gid=kind,
                )
        axes.plot([], [], mark, color=MUTED, label=line.label, markersize=8)
    if len(front) <= _FEW:
        for cell in front:
            _annotate(axes, cell.epsilon, axis.value(cell.mean), _seconds(cell.mean_seconds), (9, -4))
    _draw_ceilings(axes, study, axis)
    _colour_bar(figure, axes, points, "training seconds", seconds)
    epsilons = [cell.epsilon for cell in timed if cell.epsilon]
    log_axis(axes.xaxis, epsilons)
    axes.set_xlim(min(epsilons) / 1.3, max(epsilons) * 1.5)
    axis.apply(axes)
    axes.set_xlabel(f"{study.guarantee_in_words} (log scale; smaller is more private)", color=INK)
    legend(axes)
    verdict = f"{len(front)} of {len(timed)} settings are beaten by none in ε, accuracy and seconds at once"
    caution = "compared by their means, whatever the spread, and only at equal δ and relation"
    footnote(figure, (f"outlined: {verdict}, {caution}", axis.note, study.left_out_in_words))
    return figure


def steps_chart(plans: Iterable[Plan], dataset: str) -> Figure:
    """ε after every step of each plan: upper bound as a line, the gap to the lower bound shaded.

    Raises:
        ValueError: if there is no plan.
    """
    shown = list(plans)
    if not shown:
        raise ValueError("There is no plan to draw.")
    figure, axes = new_figure(f"{name_of(dataset)}: what each step costs", height=5.4)
    widest, ends = 0.0, []
    guarantees = {(plan.delta, plan.relation) for plan in shown}
    for index, plan in enumerate(shown):
        steps, lowers, uppers = plan.curve()
        colour = COLOURS[index % len(COLOURS)]
        label = plan.label
        if len(guarantees) > 1:
            label += f" (δ = {small(plan.delta)}, {plan.relation})"
        axes.fill_between(steps, lowers, uppers, color=colour, alpha=0.25, linewidth=0)
        style = "-" if plan.method != "pate" else "--"
        axes.plot(steps, uppers, style, color=colour, linewidth=1.8, label=label)
        axes.plot(steps[-1:], uppers[-1:], MARKS[index % len(MARKS)], color=colour, markersize=6)
        widest = max(widest, *((u - low) / u for low, u in zip(lowers, uppers, strict=True) if u > 0))
        ends += [uppers[0], uppers[-1]]
    log_axis(axes.xaxis, [1, *(plan.count for plan in shown)])
    log_axis(axes.yaxis, [max(end, 1e-3) for end in ends])
    units = " or ".join(sorted({plan.unit for plan in shown}, reverse=True))
    axes.set_xlabel(f"{units} (log scale)", color=INK)
    delta, relation = shown[0].delta, shown[0].relation
    words = (
        f"ε at δ = {small(delta)}, {relation}" if len(guarantees) == 1 else "ε (δ, relation: see the legend)"
    )
    axes.set_ylabel(f"{words} (log scale)", color=INK)
    legend(axes)
    parts = (
        f"lines: upper bound; shaded: down to the lower bound, at most {100 * max(widest, 1e-4):.2f} % below",
        "on the way ε is a reading: the guarantee of a run that was stopped is its whole plan's",
    )
    footnote(figure, parts)
    return figure


# ---------------------------------------------------------------- parts


def _styled(lines: Sequence[Line]) -> Iterator[tuple[Line, str, str]]:
    for index, line in enumerate(lines):
        yield line, COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]


def _sides() -> Iterator[bool]:
    """Whether a line's labels go below its points: lines take turns."""
    while True:
        yield True
        yield False


def _accuracy_axis(study: Study, scale: str, others: Sequence[Published] = ()) -> AccuracyAxis:
    accuracies = [a for cell in (*study.cells, *study.ceilings) for a in (*cell.accuracies, cell.mean)]
    return AccuracyAxis.of([*accuracies, *(other.accuracy for other in others)], scale)


def _draw_line(
    axes: Any, line: Line, colour: str, mark: str, axis: AccuracyAxis, study: Study, *, below: bool
) -> None:
    epsilons = [cell.epsilon for cell in line.cells]
    means = [axis.value(cell.mean) for cell in line.cells]
    _error_bars(axes, epsilons, line.cells, axis, colour)
    for cell in line.cells:
        if len(cell.runs) > 1:
            each = [axis.value(accuracy) for accuracy in cell.accuracies]
            look = {"color": colour, "alpha": 0.3, "markersize": 7, "zorder": 2}
            axes.plot([cell.epsilon] * len(each), each, ".", gid="seeds", **look)
    axes.plot(
        epsilons,
        means,
        mark,
        linestyle="-",
        color=colour,
        linewidth=2,
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=0.8,
        label=line.label,
        zorder=3,
        gid="means",
    )
    if len(study.cells) <= _FEW:
        for cell, value in zip(line.cells, means, strict=True):
            _annotate(axes, cell.epsilon, value, axis.percent(cell.mean), (8, -14 if below else 7), colour)


def _error_bars(
    axes: Any, at: Sequence[float | None], cells: Sequence[Cell], axis: AccuracyAxis, colour: str
) -> None:
    for x, cell in zip(at, cells, strict=True):
        if cell.deviation is not None:
            y = axis.value(cell.mean)
            axes.errorbar(x, y, cell.deviation, color=colour, capsize=3.5, linewidth=1.3, zorder=2.5)


def _draw_ceilings(axes: Any, study: Study, axis: AccuracyAxis) -> None:
    for index, cell in enumerate(study.ceilings):
        name = METHODS.get(cell.method, cell.method)
        colours = [c for line, c, _ in _styled(study.lines) if line.method == cell.method]
        axes.axhline(
            axis.value(cell.mean),
            color=colours[0] if colours else INK,
            linewidth=1.4,
            linestyle=_DASHES[index % len(_DASHES)],
            zorder=1,
            label=f"{name} without privacy: {axis.percent(cell.mean)}",
            gid="ceiling",
        )


def _scatter_ceilings(axes: Any, study: Study, axis: AccuracyAxis, speed: Speed) -> None:
    for index, cell in enumerate(cell for cell in study.ceilings if _speed(cell, speed)):
        _error_bars(axes, [_speed(cell, speed)], [cell], axis, MUTED)
        axes.plot(
            [_speed(cell, speed)],
            [axis.value(cell.mean)],
            MARKS[-1 - index % len(MARKS)],
            markerfacecolor="white",
            markeredgecolor=INK,
            markersize=9,
            linestyle="none",
            label=f"{METHODS.get(cell.method, cell.method)} without privacy",
        )


def _draw_published(axes: Any, others: Sequence[Published], axis: AccuracyAxis) -> str:
    """Draw published results as numbered marks; return the key to the numbers."""
    if not others:
        return ""
    for number, other in enumerate(others, 1):
        mark = "X" if other.data_dependent else "*"
        look = {"color": "white", "markeredgecolor": INK, "markersize": 11 if mark == "*" else 8}
        axes.plot(other.epsilon, axis.value(other.accuracy), mark, gid="published", zorder=2.8, **look)
        left = any(0 < other.epsilon / near.epsilon - 1 < 0.12 for near in others[number:]) or any(
            near.epsilon == other.epsilon for near in others[number:]
        )
        _annotate(axes, other.epsilon, axis.value(other.accuracy), f"{number}", (-10 if left else 6, 4))
    axes.plot([], [], "*", color="white", markeredgecolor=INK, markersize=11, label="published: see below")
    key = "; ".join(_cited(number, other) for number, other in enumerate(others, 1))
    crosses = "; a cross is an ε that depends on the votes, not to be compared"
    crosses = crosses if any(other.data_dependent for other in others) else ""
    return f"published, as reported, at δ = 1e-5{crosses}: {key}"


def _cited(number: int, other: Published) -> str:
    note = f", {other.note}" if other.note else ""
    reached = f"{100 * other.accuracy:.1f} % at ε = {other.epsilon:g}"
    return f"[{number}] {other.citation}, {other.method}, {reached}{note}"


def _annotate(
    axes: Any, x: float | None, y: float, text: str, offset: tuple[float, float], colour: str = INK
) -> None:
    axes.annotate(
        text,
        (x, y),
        textcoords="offset points",
        xytext=offset,
        fontsize=8.5,
        color=colour,
        path_effects=_HALO,
        zorder=5,
    )


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2g} s" if value < 99.5 else f"{value / 60:.3g} min"


def _speed(cell: Cell, speed: Speed) -> float | None:
    return cell.mean_seconds if speed == "seconds" else cell.mean_speed


def _colour_bar(figure: Figure, axes: Any, points: Any, label: str, values: Sequence[float]) -> None:
    bar: Any = figure.colorbar(points, ax=axes, pad=0.02, aspect=30)
    bar.solids.set_alpha(1)
    bar.outline.set_visible(False)
    bar.set_label(f"{label} (log scale)", color=INK)
    log_axis(bar.ax.yaxis, values)
    bar.ax.tick_params(colors=INK, length=0)


def _log_norm(values: Sequence[float]) -> LogNorm | None:
    if not values:
        return None
    low, high = min(values), max(values)
    return LogNorm(low, high) if high > low * 1.01 else LogNorm(low / 2, high * 2)
