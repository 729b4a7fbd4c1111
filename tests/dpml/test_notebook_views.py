"""What a notebook shows of results, data and mistakes."""

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell

import dpml
from dpml.verify import verify_run


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dpml.PrivacyBudget(-1, 1e-5)", "UserError: The 'epsilon' parameter of PrivacyBudget"),
        ("accountant.record(accounting.Gaussian(0.1))", "BudgetExceeded: The event does not fit the budget"),
    ],
)
def test_a_mistake_is_one_line_without_a_traceback(line, words, capsys):
    shell = InteractiveShell()
    shell.run_cell(
        "import accounting, dpml\naccountant = dpml.PrivacyAccountant(budget=dpml.PrivacyBudget(1, 1e-5))"
    )
    capsys.readouterr()
    shell.run_cell(line)
    shown = capsys.readouterr().out
    assert words in shown
    assert shown.strip().count("\n") == 0


def test_data_in_numpy_arrays_trains_and_the_result_shows_its_statement(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 4)), rng.integers(0, 2, 120)
    data = dpml.from_arrays("mine", x_train=x[:100], y_train=y[:100], x_test=x[100:], y_test=y[100:])
    config = dpml.DPSGDConfig(noise_multiplier=4, delta=1e-4, epochs=1, batch_size=20)
    model = dpml.build("linear", data.example_shape, data.classes)
    result = dpml.train_dpsgd(model, data.train_set, config, test_set=data.test_set, output=tmp_path / "run")
    assert result._repr_markdown_() == (tmp_path / "run" / "statement.md").read_text(encoding="utf-8")
    verification = verify_run(tmp_path / "run")
    assert str(verification).splitlines() == verification.lines()
    assert verification.believable
