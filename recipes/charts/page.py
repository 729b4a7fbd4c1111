"""One page with all charts, to explore: it is self-contained and opens offline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from matplotlib.colors import to_hex
from plotly.offline import get_plotlyjs

from recipes.charts.plans import Plan
from recipes.charts.published import Published, published_results
from recipes.charts.study import METHODS, Cell, Line, Study, name_of, pareto, small
from recipes.charts.style import COLOURS, GRID, INK, MUTED, PLOTLY_MARKS, SCALE, AccuracyAxis, log_ticks

_CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}
_COLOURSCALE = [to_hex(colour) for colour in SCALE(range(0, 256, 15))]
_PLAN_DASHES = {"pate": "dash"}
_DASHES = ("dash", "dot", "dashdot", "longdash")
_GUIDE = """
<p>Each point is a <em>setting</em>: all runs that differ in nothing but their seed. It lies at their mean
test accuracy, never at the best; the bar is one standard deviation, and faint dots are single runs.</p>
<p><strong>ε</strong> is the privacy guarantee of one run, an upper bound at the δ and under the neighbouring
relation beside it: smaller is more private. Values at a different δ or relation are never on one line, and
must not be compared. Whoever publishes all of these runs on private data has paid for them all, which is more
than the ε of each.</p>
<p>Dashed lines are the <strong>ceiling</strong>: the same method without privacy. Training seconds are of the
machine and under the load of the run. Click a name in a legend to hide it, drag to enlarge, double-click to
go back.</p>
"""
_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; color: {INK}; background: #fff;
       max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .3rem; }}
h2 {{ font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 1px solid {GRID}; }}
h3 {{ font-size: 1rem; margin: 1.6rem 0 0; }}
.note {{ color: {MUTED}; font-size: .85rem; margin: 0 0 1rem; }}
.guide {{ background: #f6f8fa; border-radius: 6px; padding: .3rem 1rem; font-size: .92rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; width: 100%; }}
th, td {{ padding: .3rem .6rem; text-align: right; border-bottom: 1px solid {GRID}; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
.words td, .words th {{ text-align: left; }}
th {{ font-weight: 600; background: #f6f8fa; }}
"""


def write_page(studies: Sequence[Study], plans: Sequence[Plan], path: Path, *, scale: str = "auto") -> None:
    """Write the page.

    Args:
        studies: What is drawn, one after the other.
        plans: Plans of their runs.
        path: Where the page goes.
        scale: Of the accuracy, as for `accuracy_chart`.
    """
    names = ", ".join(name_of(study.dataset) for study in studies)
    title = escape(f"Privacy, accuracy and speed: {names}")
    parts = [f"<h1>{title}</h1>", f'<div class="guide">{_GUIDE}</div>']
    for study in studies:
        own = [plan for plan in plans if plan.dataset == study.dataset]
        parts += _sections(study, own, scale)
    body = "\n".join(parts)
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n<script>{get_plotlyjs()}</script></head>\n<body>{body}</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _sections(study: Study, plans: Sequence[Plan], scale: str) -> Iterator[str]:
    yield f"<h2>{escape(name_of(study.dataset))}</h2>"
    notes = [study.seeds_in_words, study.left_out_in_words]
    yield f'<p class="note">{escape(". ".join(n[0].upper() + n[1:] for n in notes if n))}.</p>'
    others = published_results(study.dataset)
    for heading, figure, note in figures(study, plans, scale):
        yield f"<h3>{escape(heading)}</h3>"
        yield figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG)
        yield f'<p class="note">{escape(note)}</p>' if note else ""
    yield "<h3>All settings</h3>"
    yield _cell_table(study)
    if others:
        yield "<h3>Published results</h3>"
        yield _published_table(others)


def figures(study: Study, plans: Sequence[Plan], scale: str = "auto") -> Iterator[tuple[str, go.Figure, str]]:
    """Heading, plotly figure and note of each chart that there is data for."""
    others = published_results(study.dataset)
    cells = (*study.cells, *study.ceilings)
    accuracies = [a for cell in cells for a in (*cell.accuracies, cell.mean)]
    axis = AccuracyAxis.of([*accuracies, *(other.accuracy for other in others)], scale)
    note = f"{axis.note[:1].upper()}{axis.note[1:]}." if axis.note else ""
    if study.cells or others:
        crosses = " Published results are as reported; crosses: ε depends on the votes." if others else ""
        yield "Accuracy against ε", _accuracy_figure(study, others, axis), note + crosses
    if any(cell.seconds for cell in cells):
        yield "Accuracy against training time", _speed_figure(study, axis), note
    if any(cell.seconds for cell in study.cells):
        words = "Outlined: no other setting of the same δ and relation is as good in ε, accuracy and seconds."
        yield "What no other setting beats", _pareto_figure(study, axis), words
    if plans:
        words = "Upper bounds. On the way ε is a reading: the guarantee of a stopped run is its whole plan's."
        yield "ε after every step", _steps_figure(plans), words


def _accuracy_figure(study: Study, others: Sequence[Published], axis: AccuracyAxis) -> go.Figure:
    figure = go.Figure()
    for index, line in enumerate(study.lines):
        colour = COLOURS[index % len(COLOURS)]
        seeds = [(cell.epsilon, a) for cell in line.cells if len(cell.runs) > 1 for a in cell.accuracies]
        figure.add_scatter(
            x=[epsilon for epsilon, _ in seeds],
            y=[axis.value(accuracy) for _, accuracy in seeds],
            mode="markers",
            marker={"color": colour, "size": 5, "opacity": 0.35},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=line.label,
            name=f"{escape(line.label)}, single seeds",
        )
        figure.add_scatter(
            x=[cell.epsilon for cell in line.cells],
            y=[axis.value(cell.mean) for cell in line.cells],
            error_y={"type": "data", "array": [cell.deviation for cell in line.cells], "thickness": 1.3},
            mode="lines+markers",
            marker={"color": colour, "size": 9, "symbol": _mark(index)},
            line={"color": colour, "width": 2},
            name=escape(line.label),
            legendgroup=line.label,
            **_hover(line),
        )
    for index, cell in enumerate(study.ceilings):
        figure.add_hline(
            y=axis.value(cell.mean),
            line={"color": INK, "width": 1.3, "dash": _DASHES[index % len(_DASHES)]},
            showlegend=True,
            name=f"{_ceiling(cell)}: {_accuracy(cell)}",
        )
    if others:
        figure.add_scatter(
            x=[other.epsilon for other in others],
            y=[axis.value(other.accuracy) for other in others],
            mode="markers",
            marker={
                "symbol": ["x-open" if other.data_dependent else "star-open" for other in others],
                "size": 11,
                "color": INK,
            },
            name="published",
            text=[_cited(other) for other in others],
            hovertemplate="%{text}<extra></extra>",
        )
    epsilons = [*(cell.epsilon for cell in study.cells), *(other.epsilon for other in others)]
    return _dressed(figure, f"{study.guarantee_in_words} (log scale)", epsilons, axis)


def _speed_figure(study: Study, axis: AccuracyAxis) -> go.Figure:
    figure = go.Figure()
    for index, line in enumerate(study.lines):
        cells = [cell for cell in line.cells if cell.seconds]
        if cells:
            figure.add_scatter(
                x=[cell.mean_seconds for cell in cells],
                y=[axis.value(cell.mean) for cell in cells],
                mode="markers",
                marker=_coloured(index, [cell.epsilon for cell in cells]),
                name=escape(line.label),
                **_hover(Line(line.label, line.method, tuple(cells))),
            )
    for cell in study.ceilings:
        if cell.seconds:
            figure.add_scatter(
                x=[cell.mean_seconds],
                y=[axis.value(cell.mean)],
                mode="markers",
                marker={"symbol": "star-open", "size": 13, "color": INK},
                name=_ceiling(cell),
                **_hover(Line(_ceiling(cell), cell.method, (cell,))),
            )
    figure.update_layout(coloraxis=_colour_axis([cell.epsilon for cell in study.cells if cell.seconds], "ε"))
    seconds = [cell.mean_seconds for cell in (*study.cells, *study.ceilings)]
    return _dressed(figure, "training seconds (log scale; less is faster)", seconds, axis)


def _pareto_figure(study: Study, axis: AccuracyAxis) -> go.Figure:
    figure, front = go.Figure(), pareto(study.cells)
    for index, line in enumerate(study.lines):
        cells = [cell for cell in line.cells if cell.seconds]
        if cells:
            best = [cell in front for cell in cells]
            marker = _coloured(index, [cell.mean_seconds for cell in cells])
            marker |= {"opacity": [1 if b else 0.3 for b in best], "size": [14 if b else 9 for b in best]}
            marker["line"] = {"color": INK, "width": [1.6 if b else 0 for b in best]}
            figure.add_scatter(
                x=[cell.epsilon for cell in cells],
                y=[axis.value(cell.mean) for cell in cells],
                mode="markers",
                marker=marker,
                name=escape(line.label),
                **_hover(Line(line.label, line.method, tuple(cells))),
            )
    seconds = [cell.mean_seconds for cell in study.cells if cell.seconds]
    figure.update_layout(coloraxis=_colour_axis(seconds, "seconds"))
    epsilons = [cell.epsilon for cell in study.cells if cell.seconds]
    return _dressed(figure, f"{study.guarantee_in_words} (log scale)", epsilons, axis)


def _steps_figure(plans: Sequence[Plan]) -> go.Figure:
    figure, ends = go.Figure(), []
    for index, plan in enumerate(plans):
        steps, lowers, uppers = plan.curve()
        ends += [max(uppers[0], 1e-3), max(uppers[-1], 1e-3)]
        figure.add_scatter(
            x=steps,
            y=uppers,
            mode="lines",
            line={
                "color": COLOURS[index % len(COLOURS)],
                "dash": _PLAN_DASHES.get(plan.method, "solid"),
            },
            name=escape(plan.label),
            customdata=lowers,
            hovertemplate=f"{escape(plan.label)}<br>after %{{x:,}} {plan.unit}: ε ≤ %{{y:.4f}}, ≥ "
            f"%{{customdata:.4f}}<br>δ = {small(plan.delta)}, {plan.relation}<extra></extra>",
        )
    figure.update_layout(**_layout())
    units = " or ".join(sorted({plan.unit for plan in plans}, reverse=True))
    figure.update_xaxes(title=f"{units} (log scale)", **_log_axis([1, *(plan.count for plan in plans)]))
    figure.update_yaxes(title="ε at each plan's δ (log scale)", **_log_axis(ends))
    return figure


# ---------------------------------------------------------------- parts

_AXIS: dict[str, Any] = {"gridcolor": GRID, "zeroline": False, "linecolor": MUTED}


def _layout() -> dict[str, Any]:
    return {
        "template": "plotly_white",
        "height": 470,
        "margin": {"l": 70, "r": 20, "t": 20, "b": 60},
        "font": {"family": "system-ui, DejaVu Sans, sans-serif", "size": 13, "color": INK},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0},
        "hoverlabel": {"align": "left"},
    }


def _dressed(figure: go.Figure, below: str, values: Sequence[float | None], axis: AccuracyAxis) -> go.Figure:
    figure.update_layout(**_layout())
    figure.update_xaxes(title=below, **_log_axis(values))
    ends = [axis.value(axis.low), axis.value(axis.high)]
    if axis.as_error:
        words = [f"{100 * tick:.3g} %" for tick in axis.ticks]
        figure.update_yaxes(type="log", range=[math.log10(end) for end in ends], tickvals=axis.ticks)
        figure.update_yaxes(ticktext=words, title=axis.label, **_AXIS)
    else:
        figure.update_yaxes(range=ends, tickformat=".3~p", title=axis.label, **_AXIS)
    return figure


def _log_axis(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value]
    ticks = log_ticks(known)
    ends = [math.log10(min(known) / 1.3), math.log10(max(known) * 1.4)]
    return {"type": "log", "range": ends, "tickvals": list(ticks), "ticktext": list(ticks.values()), **_AXIS}


def _hover(line: Line) -> dict[str, Any]:
    return {
        "text": [_told(line.label, cell) for cell in line.cells],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _told(label: str, cell: Cell) -> str:
    """What hovering over a setting shows."""
    rows = [f"<b>{escape(label)}</b>", f"accuracy {_accuracy(cell)}"]
    if cell.epsilon is not None:
        lower = "" if cell.epsilon_lower is None else f" (at least {cell.epsilon_lower:.4f})"
        rows.append(f"ε = {cell.epsilon:.4f}{lower} at δ = {small(cell.delta)}, {cell.relation}")
    if cell.noise_multiplier is not None:
        rows.append(f"σ = {cell.noise_multiplier:.4g}{' votes' if cell.method == 'pate' else ''}")
    seeds = ", ".join(str(seed) for seed in cell.seeds if seed is not None)
    rows.append(f"{len(cell.runs)} {'run' if len(cell.runs) == 1 else 'runs'} (seeds {seeds or 'unknown'})")
    if cell.mean_seconds is not None:
        rows.append(f"{_seconds(cell)} s a run")
    names = [escape(name if len(name) < 60 else f"…{name[-58:]}") for name in cell.runs]
    return "<br>".join([*rows, *names[:5], *(["…"] if len(names) > 5 else [])])


def _accuracy(cell: Cell) -> str:
    spread = "" if cell.deviation is None else f" ± {cell.deviation:.2%}"
    return f"{cell.mean:.2%}{spread}".replace("%", " %")


def _ceiling(cell: Cell) -> str:
    return f"{escape(METHODS.get(cell.method, cell.method))} without privacy"


def _cited(other: Published) -> str:
    rows = [
        f"<b>{escape(other.citation)}</b>: {escape(other.method)}",
        f"{100 * other.accuracy:.1f} % at ε = {other.epsilon:g}, δ = {small(other.delta)}",
    ]
    return "<br>".join([*rows, *([escape(other.note)] if other.note else [])])


def _mark(index: int) -> str:
    return PLOTLY_MARKS[index % len(PLOTLY_MARKS)]


def _coloured(index: int, values: Sequence[float | None]) -> dict[str, Any]:
    """Marks coloured by the logarithm of some values, on the colour axis that all lines share."""
    return {
        "symbol": _mark(index),
        "size": 12,
        "color": [_log10(value) for value in values],
        "coloraxis": "coloraxis",
        "line": {"color": INK, "width": 0.7},
    }


def _colour_axis(values: Sequence[float | None], title: str) -> dict[str, Any]:
    known = [value for value in values if value]
    ticks = log_ticks(known) if known else {}
    places = {"tickvals": [_log10(tick) for tick in ticks], "ticktext": list(ticks.values())}
    return {"colorscale": _COLOURSCALE, "colorbar": {"title": f"{title} (log)", "thickness": 14, **places}}


def _log10(value: float | None) -> float | None:
    return None if not value else math.log10(value)


def _cell_table(study: Study) -> str:
    heads = ("setting", "ε", "δ", "relation", "σ", "batch size", "steps", "accuracy ± sd", "runs", "seconds")
    rows = [(line.label, cell) for line in study.lines for cell in line.cells]
    rows += [(f"{METHODS.get(c.method, c.method)} without privacy", c) for c in study.ceilings]
    body = []
    for label, cell in rows:
        body.append(
            [
                escape(label),
                "∞" if cell.epsilon is None else f"{cell.epsilon:.3f}",
                "" if cell.epsilon is None else small(cell.delta),
                escape(cell.relation or ""),
                _figure(cell.noise_multiplier, ".4g"),
                _figure(cell.batch_size, ",.0f"),
                _figure(cell.steps, ",.0f"),
                _accuracy(cell),
                str(len(cell.runs)),
                _seconds(cell),
            ]
        )
    return _table(heads, body)


def _published_table(others: Sequence[Published]) -> str:
    heads = ("source", "method", "ε", "δ", "accuracy", "note")
    rows = [
        [
            f'<a href="{escape(other.address)}">{escape(other.citation)}</a>',
            escape(other.method),
            f"{other.epsilon:g}",
            small(other.delta),
            f"{100 * other.accuracy:.1f} %",
            escape(other.note),
        ]
        for other in others
    ]
    return _table(heads, rows, "words")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "figures") -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "\n".join(f"<tr>{''.join(f'<td>{entry}</td>' for entry in row)}</tr>" for row in rows)
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{table}</table></div>'


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _seconds(cell: Cell) -> str:
    seconds = cell.mean_seconds
    return "" if seconds is None else f"{seconds:.3g}" if seconds < 100 else f"{seconds:,.0f}"
