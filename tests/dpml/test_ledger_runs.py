"""Runs that a ledger pays for: DP-SGD, PATE, private prediction, and the command."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accounting import BudgetExceeded, PrivacyAccountant, PrivacyBudget, UserError
from accounting.events import Event
from accounting.ledger import Ledger, LedgerReservation
from dpml.config import DPSGDConfig
from dpml.dpsgd import train_dpsgd
from dpml.mechanism import SampledGaussianMechanism
from dpml.noise import GaussianNoise
from dpml.pate.predict import PrivatePredictor
from dpml.report import TrainingResult

Call = Callable[..., Any]
OWN = (
    "train dpsgd --model linear --delta 1e-3 --epochs 1 --batch-size 10 --epsilon 1 --ledger patients "
    "--dataset"
)
PATE = (
    "train pate --dataset digits --epsilon 2 --delta 1e-5 --teachers 20 --queries 5 --student supervised "
    "--student-epochs 2 --ledger patients --output"
)


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """The default ledger, with one data set."""
    monkeypatch.setenv("DPML_LEDGER", str(tmp_path / "ledger" / "ledger.sqlite"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = Ledger()
    made.declare("patients", PrivacyBudget(4.0, 1e-3))
    return made


def train(ledger: str | None = "patients", **changed: Any) -> TrainingResult:
    torch.manual_seed(0)
    x = torch.randn(60, 4)
    settings: dict[str, Any] = {"noise_multiplier": 4.0, "delta": 1e-3, "epochs": 2, "batch_size": 10}
    config = DPSGDConfig(**{**settings, "ledger": ledger, **changed})
    return train_dpsgd(nn.Linear(4, 2), TensorDataset(x, (x[:, 0] > 0).long()), config)


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


# ---------------------------------------------------------------- DP-SGD


def test_a_run_is_recorded_and_says_so(ledger: Ledger) -> None:
    result = train()
    record = result.summary["ledger"]
    [run] = ledger.data_set("patients").runs.values()
    assert run.plan == result.planned
    assert run.committed == [12]
    last = ledger.entries()[-1]
    assert record["name"] == "patients"
    assert (record["run_id"], record["head"], record["rows"]) == (run.run_id, last.hash, last.seq)
    assert record["budget"] == {"epsilon": 4.0, "delta": 0.001}
    assert ledger.verify(record["head"]).head_row == last.seq
    assert "a ledger was on" in result.statement
    assert f"entry {last.seq} of the ledger has the hash `{last.hash}`" in result.statement
    assert "budget of ε = 4 at δ = 0.001 (by the rule: Rényi filter)" in result.statement


def test_without_a_ledger_nothing_is_recorded_and_the_statement_says_so(ledger: Ledger) -> None:
    result = train(ledger=None)
    assert result.summary["ledger"] is None
    assert "since no ledger was on" in result.statement
    assert len(ledger.entries()) == 2


def test_runs_add_up_until_the_budget_refuses(ledger: Ledger) -> None:
    plan = train(noise_multiplier=1.8).planned
    done = 1
    while ledger.accountant("patients").fits(plan):
        train(noise_multiplier=1.8)
        done += 1
    with pytest.raises(BudgetExceeded, match="Ledger, 'patients'"):
        train(noise_multiplier=1.8)
    assert done >= 2
    data_set = ledger.data_set("patients")
    assert len(data_set.runs) == done
    assert data_set.spent()[1] <= 4.0
    memory = PrivacyAccountant(budget=PrivacyBudget(4.0, 1e-3))
    for _ in range(done):
        memory.record(plan)
    assert not memory.fits(plan)


def test_what_must_agree(ledger: Ledger) -> None:
    for changed, words in (
        ({"sampling_probability": 0.1}, "the relation zero-out, the run for add-or-remove-one"),
        ({"ledger": "others"}, "no data set 'others'"),
        ({"ledger": 3}, "name in the ledger"),
        ({"noise_multiplier": None, "non_private": True}, "leave out ledger or non_private"),
    ):
        with pytest.raises(UserError, match=words):
            train(**changed)
    assert [entry.kind for entry in ledger.entries()] == ["ledger", "budget"]
    config = DPSGDConfig(noise_multiplier=4.0, delta=1e-3, epochs=1, batch_size=10, ledger="patients")
    data = TensorDataset(torch.zeros(20, 4), torch.zeros(20, dtype=torch.int64))
    with pytest.raises(UserError, match="not that of 'patients' in a ledger"):
        train_dpsgd(nn.Linear(4, 2), data, config, accountant=PrivacyAccountant())


def test_a_run_that_fails_gives_back_what_it_did_not_release(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, draws = GaussianNoise.add, [0]

    def interrupted(self: GaussianNoise, *args: Any) -> Any:
        draws[0] += 1
        if draws[0] == 3:
            raise KeyboardInterrupt
        return add(self, *args)

    monkeypatch.setattr(GaussianNoise, "add", interrupted)
    result = train()
    assert result.status == "stopped"
    [run] = ledger.data_set("patients").runs.values()
    assert run.committed == [3]  # the third was about to be released
    assert result.summary["ledger"]["head"] == ledger.entries()[-1].hash


# ---------------------------------------------------------------- the record comes first


def every_draw_is_recorded(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look into the ledger whenever noise is about to be drawn: as many parts must be leased."""
    add, draws = GaussianNoise.add, [0]

    def watched(self: GaussianNoise, *args: Any) -> Any:
        draws[0] += 1
        leased = sum(sum(run.leased) for run in ledger.data_set("patients").runs.values())
        assert leased >= draws[0], "a release without its record"
        return add(self, *args)

    monkeypatch.setattr(GaussianNoise, "add", watched)
    train()
    assert draws[0] == 12


def release_before_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def release(self: SampledGaussianMechanism, clipped: Any, reservation: Any) -> Any:
        noisy = self.noise.add(clipped.gradients, self.clipping.norm)
        reservation.commit(1)
        return noisy

    monkeypatch.setattr(SampledGaussianMechanism, "release", release)


def lease_one_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    secure = LedgerReservation._secure

    def late(self: LedgerReservation, kind: Event, total: int) -> None:
        if total > 1:
            secure(self, kind, total - 1)

    monkeypatch.setattr(LedgerReservation, "_secure", late)


def lease_in_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LedgerReservation, "_secure", lambda *_: None)


def test_the_record_comes_before_the_noise(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    every_draw_is_recorded(ledger, monkeypatch)


@pytest.mark.parametrize("fault", [release_before_commit, lease_one_too_late, lease_in_memory_alone])
def test_a_planted_fault_is_caught(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="a release without its record"):
        every_draw_is_recorded(ledger, monkeypatch)


# ---------------------------------------------------------------- the command


def test_the_command(call: Call, ledger: Ledger, own_data: Path, tmp_path: Path) -> None:
    outcome = call(OWN, own_data, "--output", tmp_path / "a")
    assert outcome.status == 0, outcome.err
    run_id = summary_of(tmp_path / "a")["ledger"]["run_id"]
    assert f"patients, run {run_id}" in outcome.out
    head = summary_of(tmp_path / "a")["ledger"]["head"]
    shown = call("ledger show")
    assert "ε = 4 at δ = 0.001" in shown.out
    assert f"{run_id}  closed" in shown.out
    [found] = json.loads(call("ledger show patients --json").out)
    assert found["runs"][0]["released"] == found["runs"][0]["parts"] == 10
    assert 0 < found["if_fixed_in_advance"] <= 1.0 <= found["spent"] <= 4.0
    assert f"the given head is entry {ledger.verify().rows}" in call("ledger verify --head", head).out
    assert "not on its chain" in call("ledger verify --head 0").error()
    outcome = call(OWN.replace("--epsilon 1", "--epsilon 4"), own_data, "--output", tmp_path / "b")
    assert outcome.status == 3
    assert "of its repetitions would fit" in outcome.error()
    exported = json.loads(call("ledger export").out)
    rows = list(csv.DictReader(io.StringIO(call("ledger export --csv").out)))
    assert [row["hash"] for row in rows] == [entry["hash"] for entry in exported]
    assert json.loads(rows[1]["payload"]) == exported[1]["payload"]


def test_the_command_about_budgets(call: Call, ledger: Ledger) -> None:
    assert call("ledger init others --epsilon 1 --delta 1e-6 --relation add-or-remove-one").status == 0
    assert ledger.data_set("others").relation == "add-or-remove-one"
    assert "already" in call("ledger init others --epsilon 1 --delta 1e-6").error()
    assert "budget of ε = 2 at δ = 1e-06" in call("ledger budget others --epsilon 2").out
    ledger.accountant("patients").reserve(Event.from_dict(train(ledger=None).planned.to_dict()))
    assert "--despite-releases" in call("ledger budget patients --epsilon 6").error()
    outcome = call("ledger budget patients --epsilon 6 --despite-releases")
    assert (outcome.status, "odometer" in outcome.err) == (0, True)
    assert "the largest one, ε = 6" in call("ledger show").out
    [run_id] = ledger.data_set("patients").runs
    assert "is alive" in call("ledger close", run_id).error()
    assert "no run" in call("ledger close x").error()
    assert "'epsilon'" in call("ledger init x --epsilon -1 --delta 1e-5").error()


def test_without_a_ledger_the_command_says_how_to_make_one(
    call: Call, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPML_LEDGER", str(tmp_path / "none"))
    for line in ("ledger show", "ledger verify", "ledger export", "ledger budget x --epsilon 1"):
        assert "'dpml ledger init NAME" in call(line).error()
    assert "'dpml ledger init NAME" in call(OWN, own_data, "--output", tmp_path / "a").error()


def test_the_same_records_under_another_name(
    call: Call, ledger: Ledger, own_data: Path, tmp_path: Path
) -> None:
    ledger.declare("copy", PrivacyBudget(4.0, 1e-3))
    assert "looks like" not in call(OWN, own_data, "--output", tmp_path / "a").err
    outcome = call(OWN.replace("patients", "copy"), own_data, "--output", tmp_path / "b")
    assert "dpml: this looks like 'patients' under another name" in outcome.err
    assert "looks like" in call("ledger show").out
    public = (tmp_path / "b" / "summary.json").read_text() + (tmp_path / "b" / "statement.md").read_text()
    assert "patients" not in public


# ---------------------------------------------------------------- PATE


def test_a_pate_run_goes_on_in_the_ledger(
    call: Call, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpml.pate import trainer

    original = trainer.train_student

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train_student", interrupted)
    assert call(PATE, tmp_path / "a").status == 130
    [run] = ledger.data_set("patients").runs.values()
    assert run.committed == [5]
    monkeypatch.setattr(trainer, "train_student", original)
    book = tmp_path / "a" / "answers.sqlite"
    book.rename(tmp_path / "elsewhere")
    assert "has lost its answers" in call("resume", tmp_path / "a").error()
    (tmp_path / "elsewhere").rename(book)
    outcome = call("resume", tmp_path / "a")
    assert outcome.status == 0, outcome.err
    assert [entry.kind for entry in ledger.entries() if entry.run][-4:] == [
        "lease",
        "close",
        "reopen",
        "close",
    ]
    [run] = ledger.data_set("patients").runs.values()
    assert run.committed == [5]
    summary = summary_of(tmp_path / "a")
    assert summary["ledger"]["head"] == ledger.verify().head == ledger.entries()[-1].hash
    assert summary["ledger"]["run_id"] == run.run_id


def test_no_other_run_pays_for_the_answers_of_a_pate_run(
    call: Call, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    ledger.change_budget("patients", 60.0, 1e-3)
    with monkeypatch.context() as patch:
        patch.setattr("dpml.pate.trainer.train_student", interrupted)
        for name in ("a", "twin"):
            assert call(PATE, tmp_path / name).status == 130
    assert len(ledger.data_set("patients").runs) == 2
    record = tmp_path / "a" / "run.json"
    kept = record.read_bytes()
    shutil.copy(tmp_path / "twin" / "run.json", record)
    assert "go on with the same settings" in call("resume", tmp_path / "a").err
    record.write_bytes(kept)
    assert call("resume", tmp_path / "a").status == 0


def test_the_ledger_pays_for_predictions_too(call: Call, ledger: Ledger, tmp_path: Path) -> None:
    ledger.change_budget("patients", 9.0, 1e-3)
    assert call(PATE, tmp_path / "a").status == 0
    np.savez(tmp_path / "q.npz", x=np.random.default_rng(0).random((1, 1, 8, 8), dtype=np.float32))
    ask = ("predict", tmp_path / "a" / "ensemble", "--inputs", tmp_path / "q.npz")
    too_much = call(*ask, "--epsilon", 60, "--delta", 1e-5)
    assert (too_much.status, "Ledger, 'patients'" in too_much.error()) == (3, True)
    assert len(ledger.data_set("patients").runs) == 1
    outcome = call(*ask, "--epsilon", 4, "--delta", 1e-5)
    assert outcome.status == 0, outcome.err
    runs = list(ledger.data_set("patients").runs.values())
    predictor = PrivatePredictor(tmp_path / "a" / "ensemble")
    assert runs[1].counted == predictor.aggregator.plan
    rows = len(ledger.entries())
    assert call(*ask).status == 0
    assert len(ledger.entries()) == rows  # the book counts them
    ledger.verify()
