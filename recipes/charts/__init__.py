"""Charts of privacy, accuracy and speed: pictures for papers, one page to explore.

    study, = studies(load_runs([Path("runs/sweep")]))
    accuracy_chart(study)

The functions return matplotlib figures, which notebooks show.
"""

from recipes.charts.frontier import frontier_chart
from recipes.charts.page import write_page
from recipes.charts.pictures import accuracy_chart, pareto_chart, speed_chart, steps_chart
from recipes.charts.plans import Plan, find_plans
from recipes.charts.published import PUBLISHED, Published, published_results
from recipes.charts.reading import load_runs, runs_of
from recipes.charts.study import Cell, Line, Study, pareto, studies
from recipes.charts.writing import draw_all

__all__ = [
    "PUBLISHED",
    "Cell",
    "Line",
    "Plan",
    "Published",
    "Study",
    "accuracy_chart",
    "draw_all",
    "find_plans",
    "frontier_chart",
    "load_runs",
    "pareto",
    "pareto_chart",
    "published_results",
    "runs_of",
    "speed_chart",
    "steps_chart",
    "studies",
    "write_page",
]
