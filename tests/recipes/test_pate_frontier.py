"""The frontier of PATE: complete cases, a table and a chart that show what they are given."""

import numpy as np
import pytest
from PIL import Image

from dpml.pate.config import PATERun
from dpml.pate.planning import plan_run
from recipes import cifar10, digits, mnist
from recipes.charts import frontier_chart
from recipes.pate_frontier import by_case, cases, results_table


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_every_case_has_a_plan_within_its_budget(dataset):
    for name, run in cases(dataset).items():
        plan = plan_run(run, 9000)
        assert isinstance(run, PATERun), name
        assert run.log_not_private
        if run.queries is not None:
            assert plan.aggregator.queries == run.queries


@pytest.mark.parametrize("recipe", [digits.pate, mnist.pate, cifar10.pate])
@pytest.mark.parametrize("private", [True, False])
def test_recipes_are_complete(recipe, private):
    run = recipe(private)
    assert run.non_private is not private
    assert plan_run(run, 9000).aggregator.queries > 0


def rows():
    made = []
    for case, queries, accuracy in (("ε = 2, 70 queries", 70, 0.98), ("ε = 2, default queries", 136, 0.985)):
        for seed in (0, 1):
            made.append(
                {
                    "case": case,
                    "dataset": "mnist",
                    "epsilon": 1.99,
                    "noise_multiplier": 30.0,
                    "queries_asked": queries,
                    "queries_answered": queries,
                    "test_accuracy": accuracy + 0.001 * seed,
                    "data_dependent_epsilon": 0.5,
                    "seed": seed,
                }
            )
    return made


def test_the_table_has_a_row_for_each_case():
    table = results_table(rows())
    assert table.row_count == len(by_case(rows())) == 2
    assert "98.05% ± 0.07%" in list(table.columns[5].cells)


def test_the_chart_is_drawn(tmp_path):
    frontier_chart(rows(), tmp_path / "chart.png")
    pixels = np.asarray(Image.open(tmp_path / "chart.png").convert("L"))
    assert pixels.shape[0] > 400
    assert pixels.std() > 5
