"""What the charts draw, read back from matplotlib's artists, the page's figures and the pictures."""

import json
import math
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from matplotlib.figure import Figure
from PIL import Image

from accounting import UserError
from recipes.charts import (
    PUBLISHED,
    Study,
    accuracy_chart,
    load_runs,
    pareto,
    pareto_chart,
    speed_chart,
    steps_chart,
    studies,
    write_page,
)
from recipes.charts.page import figures
from recipes.charts.plans import find_plans
from recipes.charts.style import AccuracyAxis
from recipes.table import table_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


def run(number: int = 0, **changed: Any) -> dict[str, Any]:
    values = {
        **{"recipe": "dpsgd-mnist", "run": f"run-{number}", "status": "completed", "method": "dpsgd"},
        **{"dataset": "mnist", "private": True, "epsilon": 1.0, "epsilon_lower": 0.99, "delta": 1e-5},
        **{"noise_multiplier": 2.0, "batch_size": 256, "steps": 100, "test_accuracy": 0.8},
        **{"train_seconds": 10.0 + number / 1000, "examples_per_second": 500.0, "seed": number},
    }
    return values | changed


def one_study(*rows: dict[str, Any]) -> Study:
    [study] = studies(table_of(rows))
    return study


def several() -> Study:
    points = [(1.0, 0.7), (1.0, 0.8), (3.0, 0.9)]
    rows = [run(n, epsilon=e, test_accuracy=a) for n, (e, a) in enumerate(points)]
    rows += [run(3, method="pate", recipe="pate-mnist", epsilon=2.0, test_accuracy=0.85, train_seconds=99.0)]
    ceiling = {"private": False, "epsilon": None, "delta": None, "noise_multiplier": None}
    rows += [run(4 + n, test_accuracy=a, **ceiling) for n, a in enumerate([0.94, 0.96])]
    rows += [run(9, status="failed", test_accuracy=None), run(10, status="diverged", test_accuracy=0.1)]
    return one_study(*rows)


def drawn(figure: Figure, gid: str) -> list[Any]:
    return [line for line in figure.axes[0].lines if line.get_gid() == gid]


def words(figure: Figure) -> str:
    return " ".join(figure.get_supxlabel().split())


# ---------------------------------------------------------------- cells and lines


def test_a_cell_is_the_mean_of_its_seeds_and_never_the_best() -> None:
    study = several()
    first = study.lines[0].cells[0]
    assert first.accuracies == (0.7, 0.8)
    assert first.mean == pytest.approx(0.75)
    assert first.deviation == pytest.approx(statistics.stdev([0.7, 0.8]))
    assert study.lines[0].cells[1].deviation is None
    assert study.left_out == {"failed": 1, "diverged": 1}


def test_different_delta_or_relation_is_never_on_one_line() -> None:
    rows = [run(0), run(1, epsilon=2.0, delta=1e-6), run(2, epsilon=3.0, config_sampling_probability=0.01)]
    study = one_study(*rows)
    assert [len(line.cells) for line in study.lines] == [1, 1, 1]
    assert all("δ = " in line.label for line in study.lines)
    assert "add-or-remove-one" in " ".join(line.label for line in study.lines)
    assert "differ" in study.guarantee_in_words


def test_a_swept_setting_splits_lines_but_one_that_follows_epsilon_does_not() -> None:
    swept = one_study(
        *(run(n, epsilon=e, config_epsilon=e, config_learning_rate=rate)
          for n, (e, rate) in enumerate([(1.0, 0.1), (1.0, 0.2), (2.0, 0.1), (2.0, 0.2)]))
    )  # fmt: skip
    assert [line.label for line in swept.lines] == ["DP-SGD, learning rate 0.1", "DP-SGD, learning rate 0.2"]
    assert [len(line.cells) for line in swept.lines] == [2, 2]
    suited = one_study(
        *(run(n, epsilon=e, config_epsilon=e, config_learning_rate=e / 10) for n, e in enumerate([1.0, 2.0]))
    )
    assert [line.label for line in suited.lines] == ["DP-SGD"]


def test_the_front_is_what_nothing_beats_at_the_same_guarantee() -> None:
    best = run(0, test_accuracy=0.9, train_seconds=5.0)
    beaten = run(1, epsilon=2.0, test_accuracy=0.8, train_seconds=9.0)
    elsewhere = run(2, epsilon=2.0, delta=1e-6, test_accuracy=0.8, train_seconds=9.0)
    quick = run(3, epsilon=2.0, steps=50, test_accuracy=0.7, train_seconds=1.0)
    study = one_study(best, beaten, elsewhere, quick)
    assert sorted(cell.runs[0] for cell in pareto(study.cells)) == ["run-0", "run-2", "run-3"]
    assert len([c for c in pareto_chart(study).axes[0].collections if c.get_gid() == "beaten"]) == 1


# ---------------------------------------------------------------- matplotlib


def test_the_accuracy_chart_draws_means_seeds_spread_and_ceiling() -> None:
    figure = accuracy_chart(several())
    means = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in drawn(figure, "means")}
    assert means["DP-SGD"] == [(1.0, pytest.approx(0.75)), (3.0, pytest.approx(0.9))]
    assert means["PATE"] == [(2.0, pytest.approx(0.85))]
    assert [list(line.get_ydata()) for line in drawn(figure, "seeds")] == [[0.7, 0.8]]
    [ceiling] = drawn(figure, "ceiling")
    assert list(ceiling.get_ydata()) == [pytest.approx(0.95)] * 2
    bars = [c for c in figure.axes[0].collections if len(c.get_paths()) == 1]
    low, high = bars[0].get_paths()[0].vertices[:, 1]
    assert high - low == pytest.approx(2 * statistics.stdev([0.7, 0.8]))
    assert "2 runs are left out: 1 diverged, 1 failed" in words(figure)
    assert "1 to 2 seeds" in words(figure)
    assert "axis starts at" in words(figure)
    assert figure.axes[0].get_xscale() == "log"
    assert "δ = 1e-5, zero-out" in figure.axes[0].get_xlabel()


def test_published_results_are_drawn_where_they_were_published() -> None:
    figure = accuracy_chart(several(), published=True, scale="accuracy")
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in drawn(figure, "published")}
    assert points == {(p.epsilon, p.accuracy) for p in PUBLISHED if p.dataset == "mnist"}
    assert {(2.93, 0.981), (2.0, 0.95), (8.0, 0.97), (1.97, 0.985)} <= points
    assert "depends on the votes" in words(figure)


def test_published_figures_say_what_they_are() -> None:
    for result in PUBLISHED:
        assert result.dataset in {"mnist", "fashion-mnist", "cifar10"}
        assert 0.5 < result.accuracy < 1 < result.epsilon + 0.5
        assert result.address.startswith("https://arxiv.org/abs/")
        assert result.data_dependent == result.method.startswith("PATE")


def test_high_accuracies_are_drawn_as_errors_with_better_above() -> None:
    study = one_study(run(0, test_accuracy=0.98), run(1, epsilon=3.0, test_accuracy=0.99))
    axes = accuracy_chart(study).axes[0]
    [line] = drawn(accuracy_chart(study), "means")
    assert list(line.get_ydata()) == [pytest.approx(0.02), pytest.approx(0.01)]
    assert axes.get_yscale() == "log"
    bottom, top = axes.get_ylim()
    assert bottom > 0.02
    assert top < 0.01
    assert len(axes.get_yticks()) >= 3


@pytest.mark.parametrize("accuracies", [(0.0,), (1.0,), (0.1, 0.9), (0.999,), (0.98, 0.981), (0.92, 1.0)])
@pytest.mark.parametrize("scale", ["auto", "accuracy", "error"])
def test_every_axis_holds_its_points(accuracies: tuple[float, ...], scale: str) -> None:
    axis = AccuracyAxis.of(accuracies, scale)
    assert 0 <= axis.low < axis.high <= 1
    for accuracy in accuracies:
        assert axis.low <= accuracy + 1e-12
        assert accuracy <= axis.high or (axis.as_error and accuracy == 1)


def test_speed_is_drawn_against_accuracy_in_either_unit() -> None:
    study = several()
    seconds, examples = speed_chart(study), speed_chart(study, speed="examples")
    coloured = [c for c in seconds.axes[0].collections if c.get_gid() == "cells"]
    points = [tuple(point) for marks in coloured for point in marks.get_offsets()]
    assert points == [pytest.approx(p) for p in ((10.0005, 0.75), (10.002, 0.9), (99.0, 0.85))]
    assert [epsilon for marks in coloured for epsilon in marks.get_array()] == [1.0, 3.0, 2.0]
    assert "per second" in examples.axes[0].get_xlabel()


def test_a_study_without_private_runs_has_no_epsilon_to_draw() -> None:
    study = one_study(run(0, private=False, epsilon=None, delta=None))
    with pytest.raises(ValueError, match="no private run"):
        accuracy_chart(study)


def test_steps_are_drawn_from_the_events_of_a_run(digits_run: Path) -> None:
    plans = list(find_plans([digits_run]))
    summary = json.loads((digits_run / "summary.json").read_text())
    [plan] = plans
    assert (plan.count, plan.delta) == (summary["planned_steps"], 1e-4)
    figure = steps_chart(plans, "digits")
    line = figure.axes[0].lines[0]
    assert line.get_xdata()[-1] == plan.count
    assert line.get_ydata()[-1] == pytest.approx(summary["epsilon"], rel=0.02)
    _, lowers, uppers = plan.curve()
    assert all(0 < low <= up for low, up in zip(lowers, uppers, strict=True))


# ---------------------------------------------------------------- the page


def test_the_page_s_figures_show_the_same(digits_run: Path) -> None:
    study = several()
    found = {
        heading: figure for heading, figure, _ in figures(study, list(find_plans([digits_run])), "accuracy")
    }
    assert len(found) == 4
    data = json.loads(found["Accuracy against ε"].to_json())["data"]
    [line] = [trace for trace in data if trace["name"] == "DP-SGD"]
    assert line["x"] == [1.0, 3.0]
    assert line["y"] == pytest.approx([0.75, 0.9])
    assert line["error_y"]["array"] == [pytest.approx(statistics.stdev([0.7, 0.8])), None]
    assert "σ = 2" in line["text"][0]
    assert "2 runs (seeds 0, 1)" in line["text"][0]
    assert "δ = 1e-5" in line["text"][0]
    [published] = [trace for trace in data if trace["name"] == "published"]
    assert len(published["x"]) == sum(p.dataset == "mnist" for p in PUBLISHED)
    assert all(isinstance(figure, go.Figure) for figure in found.values())


class _Loaded(HTMLParser):
    """Collects what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.divs = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.divs += tag == "div" and ("class", "plotly-graph-div") in attrs
        if tag != "a":
            self.loaded += [str(value) for name, value in attrs if name in {"src", "href", "srcset", "data"}]


def test_the_page_is_self_contained_and_escapes_names(tmp_path: Path) -> None:
    study = one_study(
        run(0, recipe="<img src=x>", run="<script>alert(1)</script>"), run(1, recipe="b", epsilon=2.0)
    )
    write_page([study], [], tmp_path / "new" / "chart.html")
    text = (tmp_path / "new" / "chart.html").read_text(encoding="utf-8")
    parser = _Loaded()
    parser.feed(text)
    assert parser.loaded == []
    assert parser.divs == 3
    assert "<script>alert" not in text
    assert "<img src=x>" not in text
    assert "Abadi et al. 2016" in text


# ---------------------------------------------------------------- reading, and the command


def test_the_command_draws_a_run_and_says_what_it_wrote(digits_run: Path, tmp_path: Path, call: Any) -> None:
    outcome = call("chart", digits_run, "--output", tmp_path / "charts")
    assert outcome.status == 0, outcome.err
    written = [Path(line).name for line in outcome.out.splitlines()]
    assert written == ["accuracy.png", "speed.png", "pareto.png", "steps.png", "chart.html"]
    assert sorted(written) == sorted(path.name for path in (tmp_path / "charts").iterdir())


def test_several_data_sets_have_pictures_of_their_own(tmp_path: Path, call: Any) -> None:
    table_of([run(0), run(1, dataset="digits")]).write_parquet(tmp_path / "sweep.parquet")
    outcome = call("chart", tmp_path)
    assert outcome.status == 0, outcome.err
    assert {"accuracy-mnist.png", "accuracy-digits.png"} <= {p.name for p in (tmp_path / "charts").iterdir()}


def test_a_mistake_gets_one_line(tmp_path: Path, call: Any) -> None:
    (tmp_path / "notes.txt").write_text("no table")
    (tmp_path / "other.json").write_text("[]")
    table_of([run(0, status="failed", test_accuracy=None)]).write_parquet(tmp_path / "failed.parquet")
    table_of([]).write_parquet(tmp_path / "none.parquet")
    (tmp_path / "empty").mkdir()
    for name, reason in {
        "missing": "no run, sweep or table",
        "empty": "no finished run",
        "notes.txt": "not a table",
        "other.json": "no JSON object",
        "failed.parquet": "1 failed",
        "none.parquet": "without a run",
    }.items():
        outcome = call("chart", tmp_path / name)
        assert outcome.status == 2, name
        assert reason in outcome.error(), name
    with pytest.raises(UserError, match="at least one"):
        load_runs([])


def test_a_run_that_is_named_twice_is_drawn_once(digits_run: Path) -> None:
    assert len(load_runs([digits_run, digits_run.parent])) == len(load_runs([digits_run.parent]))


def test_the_readme_s_picture_shows_the_committed_results() -> None:
    [study] = studies(load_runs([RESULTS / "digits-demo.json"]))
    with Image.open(ROOT / "docs" / "tradeoff-digits.png") as picture:
        assert picture.width >= 1000
        shown = json.loads(picture.text["Description"])
    assert len(shown) == len(study.figures())
    for old, new in zip(shown, study.figures(), strict=True):
        assert {k: v for k, v in old.items() if k[:9] != "accuracy_"} == {
            k: v for k, v in new.items() if k[:9] != "accuracy_"
        }
        assert math.isclose(old["accuracy_mean"], new["accuracy_mean"])
    means = drawn(accuracy_chart(study), "means")
    assert {line.get_label() for line in means} == {"DP-SGD", "PATE"}
    assert sorted(y for line in means for y in line.get_ydata()) == pytest.approx(
        sorted(row["accuracy_mean"] for row in shown if row["epsilon"])
    )
