"""`dpml audit` from the command line."""

import json

import pytest
import test_executed_mechanism as planted

DPSGD = (
    "audit dpsgd --dataset digits --noise-multiplier 1.5 --delta 1e-5 --epochs 2 --batch-size 128 "
    "--canaries 100 --insecure-noise-seed 1 --output"
)
PATE = "audit pate --noise-multiplier 20 --draws 5000 --output"


def test_an_audit_of_training(call, tmp_path):
    outcome = call(DPSGD, str(tmp_path / "a"))
    assert outcome.status == 0
    assert "consistent at confidence 0.9999" in outcome.out
    assert "8 of 8 hold" in outcome.out
    assert outcome.out.count("ε ≥ ") == 3
    found = json.loads((tmp_path / "a" / "audit.json").read_text(encoding="utf-8"))
    assert found["about"]["config"]["model"] == "linear"  # of the data set's recipe
    assert found["about"]["canaries"] == 100


def test_a_contradiction_ends_with_status_1(call, tmp_path, monkeypatch):
    planted._scaled_noise(0.5)(monkeypatch)
    outcome = call(DPSGD, str(tmp_path / "a"))
    assert outcome.status == 1
    assert "CONTRADICTED at confidence 0.9999" in outcome.out
    assert "dpml: contradicted: not so: noise has the accounted scale" in outcome.err


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--aggregator lnmax",
        "--aggregator confident-gnmax --threshold 200 --threshold-noise 100 --teachers 300",
    ],
)
def test_an_audit_of_aggregation(call, tmp_path, more):
    outcome = call(PATE, str(tmp_path / "a"), *more.split())
    assert outcome.status == 0
    assert "consistent" in outcome.out
    assert (tmp_path / "a" / "audit.png").is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{DPSGD} FOLDER --canaries 5", "canaries"),
        (f"{DPSGD} FOLDER --confidence 2", "confidence"),
        (f"{DPSGD} FOLDER --epsilon 1", "exactly one of epsilon"),
        ("audit dpsgd --dataset digits --non-private --output FOLDER", "claims no ε"),
        ("audit dpsgd --dataset digits --epsilon 1 --delta 1e-5", "--output"),
        ("audit dpsgd --dataset nowhere --epsilon 1 --delta 1e-5 --output FOLDER", "nowhere"),
        (f"{PATE} FOLDER --aggregator confident-gnmax", "threshold"),
        (f"{PATE} FOLDER --threshold 3", "answers every query"),
        (f"{PATE} FOLDER --draws 1", "draws"),
        (f"{PATE} FOLDER --noise-multiplier nan", "sigma"),
    ],
)
def test_mistakes_get_one_line(call, tmp_path, line, message):
    outcome = call(line.replace("FOLDER", str(tmp_path / "a")))
    assert outcome.status == 2
    assert message in outcome.error()


def test_a_folder_with_files_is_refused_before_anything_is_done(call, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for line in (DPSGD, PATE):
        assert "not empty" in call(line, str(tmp_path)).error()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
