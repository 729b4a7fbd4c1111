"""All charts of some studies, in one folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from recipes.charts.page import write_page
from recipes.charts.pictures import Scale, accuracy_chart, pareto_chart, speed_chart, steps_chart
from recipes.charts.plans import Plan, find_plans
from recipes.charts.published import published_results
from recipes.charts.study import Study
from recipes.charts.style import write_picture


def draw_all(
    studies: Sequence[Study], paths: Sequence[Path], output: Path, *, scale: Scale = "auto"
) -> list[Path]:
    """Write every picture that there is data for, and the page; return the files, the page last.

    A kind of chart has a file `KIND.png`, or `KIND-DATASET.png` if there are several data sets.

    Args:
        studies: What is drawn.
        paths: Where the runs are: their plans are looked for there.
        output: A folder; what is there under the same names is replaced.
        scale: Of the accuracy, as for `accuracy_chart`.

    Raises:
        OSError: if the folder cannot be written to.
    """
    output.mkdir(parents=True, exist_ok=True)
    plans = list(find_plans(paths))
    written = []
    for study in studies:
        own = [plan for plan in plans if plan.dataset == study.dataset]
        suffix = f"-{Path(study.dataset).stem}" if len(studies) > 1 else ""
        for kind, figure in _figures(study, own, scale):
            written.append(output / f"{kind}{suffix}.png")
            write_picture(figure, written[-1], study.figures())
    write_page(studies, plans, output / "chart.html", scale=scale)
    return [*written, output / "chart.html"]


def _figures(study: Study, plans: Sequence[Plan], scale: Scale) -> Iterator[tuple[str, Figure]]:
    if study.cells:
        yield "accuracy", accuracy_chart(study, scale=scale)
    if published_results(study.dataset):
        yield "published", accuracy_chart(study, published=True, scale=scale)
    if any(cell.seconds for cell in (*study.cells, *study.ceilings)):
        yield "speed", speed_chart(study, scale=scale)
    if any(cell.seconds for cell in study.cells):
        yield "pareto", pareto_chart(study, scale=scale)
    if plans:
        yield "steps", steps_chart(plans, study.dataset)
