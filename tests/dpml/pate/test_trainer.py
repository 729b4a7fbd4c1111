"""PATE runs on digits: what they leave, what they cost, and that an interrupted one goes on."""

import json
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import dpml
from accounting import BudgetExceeded, Composed, Event, GNMax, PrivacyAccountant, PrivacyBudget, UserError
from dpml.cli import main
from dpml.outputs import read_events
from dpml.pate.answers import AnswerBook, Desk, query_keys
from dpml.pate.ensembles import train_teachers
from dpml.pate.guesses import choose_queries
from dpml.pate.trainer import run_pate, train_pate
from dpml.resuming import read_run

QUICK = {"student": "supervised", "student_epochs": 2, "teachers": 20}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dpml" / "pate"


def digits_run(**values):
    given = {"dataset": "digits", "epsilon": 8.0, "delta": 1e-5, **QUICK, **values}
    return dpml.PATERun(**given)


def epsilon_of(events, method="pld"):
    accountant = PrivacyAccountant(method)
    for event in events:
        accountant.record(event)
    return accountant.epsilon(1e-5)


def test_a_run_leaves_everything_and_its_epsilon_can_be_recomputed(tmp_path):
    result = run_pate(digits_run(log_not_private=True), output=tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["method"] == "pate"
    assert summary["status"] == "completed"
    assert summary["teachers"] == 20
    assert summary["queries_asked"] == summary["queries_answered"] == summary["queries_planned"]
    assert summary["epsilon_lower"] <= summary["epsilon"] <= 8.0
    assert summary["noise_is_secret"] is True
    for absent in ("clip_norm", "sampler", "sampling_probability", "steps", "sensitivity_slack"):
        assert summary[absent] is None
    planned, committed, record = read_events(tmp_path / "run" / "privacy_events.json")
    assert record["status"] == "completed"
    assert planned == committed == [result.planned]
    assert epsilon_of(planned) == pytest.approx(summary["epsilon"], rel=1e-9)
    assert "PATE" in (tmp_path / "run" / "statement.md").read_text()
    for name in ("model.safetensors", "ensemble/ensemble.safetensors", "answers.sqlite"):
        assert (tmp_path / "run" / name).is_file()
    assert any(path.name.startswith("events.out.tfevents") for path in (tmp_path / "run").iterdir())


def test_nothing_private_is_public(tmp_path):
    run_pate(digits_run(log_not_private=True), output=tmp_path / "run")
    run = tmp_path / "run"
    for folder in (run / "ensemble", run / "not_private"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for file in folder.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
    figures = json.loads((run / "not_private" / "pate.json").read_text())
    assert 0 < figures["data_dependent_epsilon"] < 8
    public = "".join(
        (run / name).read_text() for name in ("summary.json", "statement.md", "privacy_events.json")
    )
    for figure in ("data_dependent_epsilon", "ensemble_test_accuracy"):
        assert str(figures[figure]) not in public
    quiet = tmp_path / "quiet"
    run_pate(digits_run(), output=quiet)
    assert not (quiet / "not_private").exists()


def test_votes_from_the_cache_give_the_same_answers(tmp_path, cache):
    run = digits_run(insecure_noise_seed=3)
    first = run_pate(run, output=tmp_path / "a")
    assert stat.S_IMODE(next(cache.iterdir()).stat().st_mode) == 0o700
    second = run_pate(run, output=tmp_path / "b")
    third = run_pate(digits_run(insecure_noise_seed=3, no_cache=True), output=tmp_path / "c")
    keys = query_keys(dpml.load("digits").x_test[:324])
    by = [AnswerBook(tmp_path / name / "answers.sqlite", _aggregator(first), _about()) for name in "abc"]
    assert by[0].states(keys) == by[1].states(keys) == by[2].states(keys)
    for one, other in ((first, second), (first, third)):
        for name, tensor in one.model.state_dict().items():
            assert torch.equal(tensor, other.model.state_dict()[name])


def _aggregator(result):
    from dpml.pate.planning import plan_run

    config = result.summary["config"]
    return plan_run(dpml.PATERun(**config), 324).aggregator


def _about():
    from dpml.pate.ensembles import teacher_settings

    return {"teachers": teacher_settings(digits_run()), "data": "digits"}


def test_a_damaged_cache_is_trained_again(tmp_path, cache):
    run = digits_run(insecure_noise_seed=3)
    first = run_pate(run, output=tmp_path / "a")
    for folder in cache.iterdir():
        (folder / "votes.npy").write_bytes(b"\x93NUMPY nonsense")
    second = run_pate(run, output=tmp_path / "b")
    assert first.summary["test_accuracy"] == second.summary["test_accuracy"]


def test_a_budget_that_does_not_fit_is_refused_before_teachers_are_trained(tmp_path, cache):
    with pytest.raises(BudgetExceeded):
        run_pate(digits_run(noise_multiplier=4.0, queries=300), output=tmp_path / "run")
    assert not cache.exists()
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("aggregator", ["confident-gnmax", "interactive-gnmax", "lnmax"])
def test_all_aggregators_train_a_student_within_their_plan(aggregator, tmp_path):
    noise = {"noise_multiplier": 3.0, "queries": 60, "epsilon": None, "delta": 1e-5}
    result = run_pate(digits_run(aggregator=aggregator, **noise), output=tmp_path / "run")
    summary = result.summary
    assert summary["queries_asked"] <= 60
    assert 0 < summary["queries_answered"] <= summary["queries_asked"]
    assert summary["epsilon_spent"] <= summary["epsilon"] * (1 + 1e-9)
    if aggregator == "confident-gnmax":
        assert summary["queries_answered"] < summary["queries_asked"]
        assert summary["epsilon_spent"] < summary["epsilon"]


def test_non_private_answers_are_pluralities(tmp_path):
    result = run_pate(
        digits_run(non_private=True, epsilon=None, delta=None, queries=100), output=tmp_path / "run"
    )
    assert result.summary["epsilon"] is None
    assert result.summary["noise_multiplier"] is None
    assert "No privacy" in result.statement


def test_a_published_epsilon_is_paid_for_and_replayed(tmp_path):
    run = digits_run(publish_data_dependent=True, accountant="rdp", insecure_noise_seed=1)
    result = run_pate(run, output=tmp_path / "run")
    assert result.summary["sanitised_epsilon"] is not None
    assert "sanitised" in result.statement
    assert isinstance(result.planned, Composed)
    assert result.committed == result.planned
    assert result.summary["epsilon"] <= 8.0
    summary = tmp_path / "run" / "summary.json"
    summary.unlink()
    again = run_pate(read_run(tmp_path / "run"), output=tmp_path / "run", resume=True)
    assert again.summary["sanitised_epsilon"] == result.summary["sanitised_epsilon"]


def _plan(run):
    from dpml.pate.planning import plan_run

    return plan_run(run, 324).aggregator


def test_what_cannot_be_resumed_says_so(tmp_path):
    with pytest.raises(UserError, match="no run"):
        read_run(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="cannot be resumed"):
        read_run(tmp_path / "other")
    (tmp_path / "other" / "run.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_run(tmp_path / "other")


def test_one_budget_pays_for_dp_sgd_and_pate():
    from recipes.one_budget import train_both

    both = train_both(dpml.load("digits"), epsilon=8.0)
    assert 0 < both.epsilon <= 8.0
    assert both.queries > 0
    assert both.features_accuracy > 0.7
    assert both.student_accuracy > 0.3


def test_a_shared_accountant_refuses_what_the_first_has_used():
    data = dpml.load("digits")
    accountant = PrivacyAccountant(budget=PrivacyBudget(2.0, 1e-5))
    accountant.record(GNMax(5.0))
    with pytest.raises(BudgetExceeded):
        train_pate(
            TensorDataset(data.x_train, data.y_train),
            data.x_test,
            dpml.PATEConfig(noise_multiplier=4.0, queries=50, delta=1e-5, **QUICK),
            accountant=accountant,
        )
    assert accountant.events == (GNMax(5.0),)


def test_the_callers_random_state_is_left_alone():
    data = dpml.load("digits")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    config = dpml.PATEConfig(noise_multiplier=4.0, queries=20, delta=1e-5, **QUICK)
    train_pate(TensorDataset(data.x_train, data.y_train), data.x_test, config, classes=10)
    assert torch.equal(torch.rand(3), expected)


def test_public_inputs_of_ones_own(tmp_path):
    data = dpml.load("digits")
    np.savez(tmp_path / "public.npz", x_public=data.x_test[:100].numpy())
    result = run_pate(digits_run(public=str(tmp_path / "public.npz"), queries=30))
    assert result.summary["queries_asked"] == 30
    np.savez(tmp_path / "wrong.npz", x=data.x_test[:100].numpy())
    with pytest.raises(UserError, match="x_public"):
        run_pate(digits_run(public=str(tmp_path / "wrong.npz")))
    np.savez(tmp_path / "shape.npz", x_public=np.zeros((5, 3), dtype=np.float32))
    with pytest.raises(UserError, match="shape"):
        run_pate(digits_run(public=str(tmp_path / "shape.npz")))


def test_predict_answers_under_a_budget_that_lasts(tmp_path):
    run_pate(digits_run(), output=tmp_path / "run")
    folder, data = tmp_path / "run" / "ensemble", dpml.load("digits")
    with pytest.raises(UserError, match="Give a budget"):
        dpml.PrivatePredictor(folder)
    with pytest.raises(BudgetExceeded):  # the run's own plan costs 8
        dpml.PrivatePredictor(folder, budget=PrivacyBudget(8.0, 1e-5))
    predictor = dpml.PrivatePredictor(folder, budget=PrivacyBudget(12.0, 1e-5))
    left = predictor.left
    shown = predictor.predict(data.x_test[:5])
    assert predictor.left == left - 5
    again = dpml.PrivatePredictor(folder)  # another process, another day
    assert np.array_equal(again.predict(data.x_test[:5]), shown)
    assert again.left == left - 5
    with pytest.raises(BudgetExceeded, match="more than the"):
        again.predict(data.x_test)
    assert again.left == left - 5
    again.predict(data.x_test[5 : 5 + again.left])
    assert again.left == 0
    with pytest.raises(BudgetExceeded):
        again.predict(data.x_test[-1:])
    with pytest.raises(UserError, match="fixed by the first question"):
        dpml.PrivatePredictor(folder, budget=PrivacyBudget(50.0, 1e-5))
    with pytest.raises(UserError, match="fixed by the first question"):
        dpml.PrivatePredictor(folder, noise_multiplier=1.0)
    run = Event.from_dict(json.loads((folder / "ensemble.json").read_text())["planned"])
    assert epsilon_of([run, predictor.aggregator.plan]) <= 12.0


def test_two_predictors_at_once_never_overspend(tmp_path):
    data = dpml.load("digits")
    ensemble = train_teachers(data.x_train, data.y_train, 10, digits_run())
    ensemble.save(tmp_path / "ensemble")
    first = dpml.PrivatePredictor(tmp_path / "ensemble", budget=PrivacyBudget(4.0, 1e-5))
    second = dpml.PrivatePredictor(tmp_path / "ensemble")
    count = first.left
    first.predict(data.x_test[: count - 2])
    second.predict(data.x_test[count : count + 2])
    for one in (first, second):
        assert one.left == 0
        with pytest.raises(BudgetExceeded):
            one.predict(data.x_test[-3:])


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run `dpml` in a folder of its own; returns its exit status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(words, *more):
        status = main([*words.split(), *more])
        return status, *capsys.readouterr()

    return run


def test_the_command_trains_and_predicts(command, tmp_path):
    budget = "--epsilon 8 --delta 1e-5"
    train = "train pate --dataset digits --student supervised --student-epochs 2 --teachers 20"
    status, out, err = command(f"{train} {budget} --output run")
    assert (status, "answered, by 20 teachers" in out) == (0, True), err
    np.savez(tmp_path / "q.npz", x=dpml.load("digits").x_test[:3].numpy())
    ask = "predict run/ensemble --inputs q.npz"
    assert command(ask)[0] == 2
    status, _, err = command(f"{ask} --epsilon 8.5 --delta 1e-5")
    assert (status, err.count("\n")) == (3, 1)
    status, out, err = command(f"{ask} --epsilon 15 --delta 1e-5 --json")
    assert (status, len(json.loads(out)["classes"])) == (0, 3), err
    assert command("account --events run/privacy_events.json --delta 1e-5")[0] == 0
    status, _, err = command("resume run")
    assert (status, "complete" in err) == (2, True)
    assert command(f"{train} --epsilon 0.01 --noise-multiplier 2 --delta 1e-5 --output no")[0] == 3


def test_questions_about_pate_are_answered_before_training(command):
    status, out, _ = command("calibrate pate --epsilon 2 --delta 1e-5 --json")
    assert (status, json.loads(out)["queries"]) == (0, 136)
    status, out, _ = command(
        "account pate --queries 100 --noise-multiplier 20 --delta 1e-5 --aggregator lnmax --json"
    )
    assert status == 0
    assert json.loads(out)["epsilon"] == pytest.approx(4.31, abs=0.01)
    assert command("calibrate pate --epsilon 2 --delta 1e-5 --queries 50 --noise-multiplier 1 --json")[0] == 2
    assert command("account pate --queries 100 --delta 1e-5")[0] == 2


def test_ctrl_c_keeps_what_was_answered(tmp_path):
    code = "import sys; from dpml.cli import main; sys.exit(main(sys.argv[1:]))"
    command = "train pate --dataset digits --epsilon 8 --delta 1e-5 --student-epochs 100000 --teachers 20"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command.split(), "--output", "run"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "student" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert summary["queries_answered"] > 0
    assert read_run(tmp_path / "run").teachers == 20


@pytest.mark.parametrize("choice", ["typical", "first"])
def test_the_queries_are_the_chosen_ones(choice, tmp_path):
    run_pate(
        digits_run(noise_multiplier=4.0, queries=40, epsilon=None, choice=choice), output=tmp_path / "run"
    )
    public = dpml.load("digits").x_test[:324]
    wanted = choose_queries(public, 40, seed=0) if choice == "typical" else torch.arange(40)
    run = read_config(tmp_path / "run")
    asked, _ = AnswerBook(tmp_path / "run" / "answers.sqlite", _plan(run), _about()).outcomes(
        query_keys(public)
    )
    assert sorted(wanted.tolist()) == np.flatnonzero(asked).tolist()


def read_config(folder):
    return dpml.PATERun(**json.loads((folder / "run.json").read_text())["config"])


def test_interactive_rounds_ask_what_the_student_is_least_sure_of(monkeypatch, tmp_path):
    seen = []
    original = Desk.ask

    def ask(self, keys, votes, predictions=None):
        seen.append((len(keys), predictions))
        return original(self, keys, votes, predictions)

    monkeypatch.setattr(Desk, "ask", ask)
    noise = {"noise_multiplier": 2.0, "queries": 50, "epsilon": None, "threshold": 8.0}
    run = digits_run(aggregator="interactive-gnmax", rounds=3, log_not_private=True, **noise)
    result = run_pate(run, output=tmp_path / "run")
    # Data-dependent costs add up for queries that were fixed beforehand: of these there is none to write.
    figures = json.loads((tmp_path / "run" / "not_private" / "pate.json").read_text())
    assert figures["data_dependent_epsilon"] is None
    assert [count for count, _ in seen] == [16, 17, 17]
    assert seen[0][1] is None
    for _, predictions in seen[1:]:
        assert torch.allclose(predictions.sum(dim=1), torch.full((17,), 20.0), atol=1e-3)
        assert predictions.max(dim=1).values.median() < 20  # not those it is sure of
    assert result.summary["queries_asked"] == 50
