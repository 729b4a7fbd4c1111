"""`dpml verify`: honest runs are believed, and whatever is changed in one afterwards is noticed."""

import copy
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accounting import UserError
from dpml.cli import main
from dpml.tracking import ProgressLine
from dpml.verify import Verification, claims, verify_run
from dpml.verify.composition import Bounds, epsilon_bounds

Call = Callable[..., Any]
KNOWN: dict[Any, Bounds] = {}
FUZZ = int(os.environ.get("DPML_VERIFY_FUZZ", "25"))
OWN = "train dpsgd --model linear --delta 1e-3 --batch-size 10 --epochs 1 --noise-multiplier 2 --dataset"
PATE = "train pate --dataset digits --teachers 8 --teacher linear --student-epochs 2 --delta 1e-4"


@pytest.fixture(scope="module")
def pate_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pate"
    line = f"{PATE} --queries 20 --noise-multiplier 12 --aggregator confident-gnmax --threshold 3 --output"
    assert main([*line.split(), str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def each_epsilon_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same events at the same δ have the same ε: most tests change something else."""

    def bounds(parts: Any, delta: float, **more: Any) -> Bounds:
        key = frozenset(parts.items()), delta
        if key not in KNOWN:
            KNOWN[key] = epsilon_bounds(parts, delta, **{**more, "claim": None})
        return KNOWN[key]

    monkeypatch.setattr(claims, "epsilon_bounds", bounds)


@pytest.fixture
def digits(digits_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits_run, tmp_path / "digits"))


@pytest.fixture
def pate(pate_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pate_run, tmp_path / "pate"))


def change(path: Path, edit: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text("utf-8"))
    edit(data)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")


def failed(verification: Verification) -> set[str]:
    return {check.name for check in verification.failed}


# ---------------------------------------------------------------- honest runs


def test_an_honest_run_is_believed(digits_run: Path, call: Call) -> None:
    done = call("verify", digits_run)
    assert done.status == 0
    assert "FAILED" not in done.out
    assert "not checked" not in done.out
    assert (
        done.out.strip().splitlines()[-1].startswith("A third party may believe: the events of this run cost")
    )


def test_an_honest_pate_run_is_believed(pate_run: Path) -> None:
    found = verify_run(pate_run)
    assert found.believable, found.lines()
    assert {check.verdict for check in found.checks} == {"ok"}


@pytest.mark.parametrize(
    "options",
    [
        "--clip-quantile 0.5",
        "--clipping per-layer",
        "--accountant rdp",
        "--sampling-probability 0.1",
        "--insecure-noise-seed 1",
        "--log-not-private",
        "--mean-noise 30",
    ],
)
def test_honest_runs_of_other_kinds_are_believed(
    options: str, call: Call, own_data: Path, tmp_path: Path
) -> None:
    assert call(OWN, own_data, *options.split(), "--output", tmp_path / "run").status == 0
    found = verify_run(tmp_path / "run")
    assert found.believable, found.lines()
    warned = {check.name for check in found.checks if check.verdict == "warning"}
    assert warned == (
        {"randomness"} if "seed" in options else {"not_private"} if "not-private" in options else set()
    )
    assert ("not for release" in found.conclusion) == ("seed" in options)


def test_a_tuned_run_is_believed(call: Call, own_data: Path, tmp_path: Path) -> None:
    """Of such a selection upper bounds are known alone: nothing is contradicted, and ε agrees."""
    line = "tune dpsgd-digits --epochs 0.5,1 --batch-size 15 --model linear --delta 1e-3 --noise-multiplier 3"
    run = tmp_path / "tuned"
    assert call(line, "--mean-trials", 3, "--dataset", own_data, "--output", run).status == 0
    found = verify_run(run)
    assert not failed(found), found.lines()
    assert {check.name for check in found.checks if check.verdict == "ok"} >= {
        "statement",
        "weights",
        "events",
    }
    assert found.epsilon_bounds is not None
    claimed = json.loads((run / "summary.json").read_text("utf-8"))["epsilon"]
    assert found.epsilon_bounds[1] == pytest.approx(claimed, rel=3e-3)


def test_a_ledger_s_chain_is_checked(
    call: Call, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPML_LEDGER", str(tmp_path / "ledger.sqlite"))
    assert call("ledger init patients --epsilon 8 --delta 1e-3").status == 0
    earlier = (tmp_path / "ledger.sqlite").read_bytes()
    run = tmp_path / "run"
    assert call(OWN, own_data, "--ledger", "patients", "--output", run).status == 0
    assert verify_run(run).believable, verify_run(run).lines()
    (tmp_path / "ledger.sqlite").write_bytes(earlier)  # rolled back to before the run
    assert failed(verify_run(run)) == {"ledger"}
    monkeypatch.setenv("DPML_LEDGER", str(tmp_path / "elsewhere.sqlite"))
    [check] = [check for check in verify_run(run).checks if check.name == "ledger"]
    assert check.verdict == "not checked"


@pytest.mark.parametrize("aggregator", ["lnmax", "gnmax --publish-data-dependent --accountant rdp"])
def test_honest_pate_runs_of_other_kinds_are_believed(aggregator: str, call: Call, tmp_path: Path) -> None:
    line = f"{PATE} --queries 10 --noise-multiplier 20 --aggregator {aggregator} --output"
    assert call(line, tmp_path / "run").status == 0
    found = verify_run(tmp_path / "run")
    assert found.believable, found.lines()


def test_runs_without_privacy_agree_with_themselves(call: Call, own_data: Path, tmp_path: Path) -> None:
    line = "train dpsgd --model linear --batch-size 10 --epochs 1 --non-private --dataset"
    assert call(line, own_data, "--output", tmp_path / "run").status == 0
    found = verify_run(tmp_path / "run")
    assert found.believable, found.lines()
    assert found.conclusion == "A third party may believe: this run promises no privacy, and its files agree."


def test_a_stopped_run_is_believed(
    call: Call, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ProgressLine.scalars

    def scalars(self: ProgressLine, step: int, values: Any) -> None:
        original(self, step, values)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLine, "scalars", scalars)
    assert call(OWN, own_data, "--output", tmp_path / "run").status == 130
    found = verify_run(tmp_path / "run")
    assert found.believable, found.lines()
    [events] = [check.words for check in found.checks if check.name == "events"]
    assert events == "4 of 10 planned were committed"


def test_a_run_that_was_killed_has_claimed_nothing(digits: Path) -> None:
    (digits / "summary.json").unlink()
    assert failed(verify_run(digits)) == {"summary.json"}  # the events say that it was completed
    change(digits / "privacy_events.json", lambda record: record.update(status="running"))
    found = verify_run(digits)
    assert not found.failed
    assert not found.believable
    assert found.conclusion == "A third party may not believe an ε of this run yet: nothing is claimed."


# ---------------------------------------------------------------- what is changed afterwards


def scaled(name: str, by: float) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        data[name] *= by

    return edit


def put(name: str, value: Any) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        data[name] = value

    return edit


SUMMARY = {
    "ε lowered": (scaled("epsilon", 0.98), "epsilon"),
    "ε raised": (scaled("epsilon", 1.02), "summary"),
    "the lower ε raised": (scaled("epsilon_lower", 1.02), "epsilon_lower"),
    "the reading lowered": (scaled("epsilon_spent", 0.98), "spent"),
    "σ raised": (scaled("noise_multiplier", 1.02), "summary"),
    "q lowered": (scaled("sampling_probability", 0.98), "summary"),
    "fewer steps": (put("steps", 43), "summary"),
    "fewer steps planned": (put("planned_steps", 43), "summary"),
    "δ lowered": (scaled("delta", 0.5), "epsilon"),
    "relation": (put("neighboring_relation", "add-or-remove-one"), "summary"),
    "slack": (put("sensitivity_slack", 0.1), "summary"),
    "secret": (put("noise_is_secret", False), "summary"),
    "public": (put("n_is_public", False), "summary"),
    "accountant": (put("accountant", "rdp"), "summary"),
    "target": (put("target_epsilon", 2.0), "summary"),
    "clip norm": (scaled("clip_norm", 2), "summary"),
    "selection": (put("selection_epsilon", 0.5), "summary"),
    "status": (put("status", "stopped"), "summary"),
    "data set": (put("dataset", "mnist"), "statement"),
    "hash": (put("weights_sha256", "0" * 64), "weights"),
}


@pytest.mark.parametrize("what", SUMMARY)
def test_a_changed_summary_is_noticed(what: str, digits: Path) -> None:
    edit, check = SUMMARY[what]
    change(digits / "summary.json", edit)
    found = verify_run(digits)
    assert check in failed(found), found.lines()
    assert found.conclusion.startswith("A third party may not believe this run: ")


def test_both_epsilons_lowered_together_are_noticed(digits: Path) -> None:
    def edit(data: Any) -> None:
        for name in ("epsilon", "epsilon_lower", "epsilon_spent"):
            data[name] *= 0.98

    change(digits / "summary.json", edit)
    assert "epsilon" in failed(verify_run(digits))


def planned_and_committed(edit: Callable[[Any], None]) -> Callable[[Any], None]:
    def both(record: Any) -> None:
        edit(record["planned"][0])
        edit(record["committed"][0])

    return both


def noisier(plan: Any) -> None:
    plan["event"]["event"]["noise_multiplier"] *= 1.02


def rarer(plan: Any) -> None:
    plan["event"]["sampling_probability"] *= 0.98


EVENTS = {
    "σ raised": (planned_and_committed(noisier), {"epsilon_lower", "summary"}),
    "q lowered": (planned_and_committed(rarer), {"epsilon_lower", "summary"}),
    "fewer steps": (planned_and_committed(put("count", 42)), {"epsilon_lower", "summary"}),
    "more steps": (planned_and_committed(put("count", 46)), {"epsilon", "summary"}),
    "one committed event dropped": (lambda record: put("count", 43)(record["committed"][0]), {"summary"}),
    "one more committed": (lambda record: put("count", 45)(record["committed"][0]), {"events"}),
    "none committed": (lambda record: put("count", 0)(record["committed"][0]), {"summary"}),
    "relation": (put("neighboring_relation", "add-or-remove-one"), {"summary", "statement"}),
    "accountant": (put("accountant", "rdp"), {"summary"}),
    "an event that nobody knows": (
        lambda record: record["planned"].append({"schema_version": 1, "type": "Magic"}),
        {"summary", "statement"},
    ),
}


@pytest.mark.parametrize("what", EVENTS)
def test_changed_events_are_noticed(what: str, digits: Path) -> None:
    edit, checks = EVENTS[what]
    change(digits / "privacy_events.json", edit)
    found = verify_run(digits)
    assert checks & failed(found), found.lines()
    if "epsilon" in checks or "epsilon_lower" in checks:
        assert checks <= failed(found), found.lines()


def test_one_digit_of_the_statement_is_noticed(digits: Path) -> None:
    path = digits / "statement.md"
    text = path.read_text("utf-8")
    for i in random.Random(0).sample([i for i, letter in enumerate(text) if letter.isdigit()], 3):
        digit = str((int(text[i]) + 1) % 10)
        path.write_text(text[:i] + digit + text[i + 1 :], "utf-8")
        found = verify_run(digits)
        assert failed(found) == {"statement"}
    path.unlink()
    assert failed(verify_run(digits)) == {"statement"}


def test_one_byte_of_the_weights_is_noticed(digits: Path) -> None:
    path = digits / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert failed(verify_run(digits)) == {"weights"}
    path.unlink()
    assert failed(verify_run(digits)) == {"weights"}


PATE_SUMMARY = {
    "σ raised": (scaled("noise_multiplier", 1.02), "summary"),
    "the check's σ raised": (scaled("threshold_noise", 1.02), "summary"),
    "fewer answers": (lambda data: put("queries_answered", data["queries_answered"] - 1)(data), "answers"),
    "fewer queries": (lambda data: put("queries_asked", data["queries_asked"] - 1)(data), "answers"),
    "teachers": (put("teachers", 9), "summary"),
    "threshold": (put("threshold", 4.0), "statement"),
    "ε lowered": (scaled("epsilon", 0.98), "epsilon"),
}


@pytest.mark.parametrize("what", PATE_SUMMARY)
def test_a_changed_pate_summary_is_noticed(what: str, pate: Path) -> None:
    edit, check = PATE_SUMMARY[what]
    change(pate / "summary.json", edit)
    found = verify_run(pate)
    assert check in failed(found), found.lines()


def test_a_committed_answer_that_is_dropped_is_noticed(pate: Path) -> None:
    def drop(record: Any) -> None:
        committed = record["committed"][0]["events"][0]
        committed["count"] -= 1

    change(pate / "privacy_events.json", drop)
    assert {"summary", "answers"} <= failed(verify_run(pate))


def test_a_changed_book_is_noticed(pate: Path) -> None:
    base = sqlite3.connect(pate / "answers.sqlite")
    base.execute("DELETE FROM queries WHERE key IN (SELECT key FROM queries LIMIT 1)")
    base.commit()
    base.close()
    assert failed(verify_run(pate)) == {"answers"}
    (pate / "answers.sqlite").write_bytes(b"no database")
    assert failed(verify_run(pate)) == {"answers"}


# ---------------------------------------------------------------- the command, and hostile files


def test_the_command_s_exit_status_and_json(digits: Path, call: Call, tmp_path: Path) -> None:
    assert "is no run" in call("verify", tmp_path).error()
    assert call("verify", tmp_path / "nothing").status == 2
    done = call("verify", digits, "--json")
    [report] = json.loads(done.out)
    assert done.status == 0
    assert report["believable"] is True
    assert report["epsilon_lower"] <= report["epsilon_upper"]
    change(digits / "summary.json", scaled("epsilon", 0.98))
    assert call("verify", digits).status == 1
    assert "FAILED       epsilon  " in call("verify", digits).out


@pytest.mark.parametrize("name", ["summary.json", "privacy_events.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema_version": NaN}', b"[" * 100_000]
)
def test_a_file_that_is_no_json_fails(name: str, content: bytes, digits: Path) -> None:
    (digits / name).write_bytes(content)
    assert name in failed(verify_run(digits))


def test_a_folder_in_place_of_a_file_fails(digits: Path) -> None:
    for name in ("summary.json", "model.safetensors", "statement.md"):
        (digits / name).unlink()
        (digits / name).mkdir()
    assert "summary.json" in failed(verify_run(digits))


ODD: list[Any] = [
    *(None, True, 0, -1, 1e308, -1e-308, 10**30, 10**400, 0.5, "", "pld", [], {}, [[]]),
    {"type": "Gaussian"},
]


def mutated(data: Any, rng: random.Random) -> Any:
    """The same JSON with one value, somewhere, changed, removed or doubled."""
    data = copy.deepcopy(data)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(data)
    node, key = rng.choice(places)
    if rng.random() < 0.15:
        del node[key]
    elif isinstance(node, list) and rng.random() < 0.3:
        node.append(node[key])
    else:
        node[key] = rng.choice(ODD)
    return data


@pytest.mark.parametrize("kind", ["dpsgd", "pate"])
def test_mutated_files_never_give_a_traceback(
    kind: str, pate: Path, call: Call, own_data: Path, tmp_path: Path
) -> None:
    """Set DPML_VERIFY_FUZZ to a few thousand for a long look."""
    folder = pate
    if kind == "dpsgd":  # a sample of everything is an unsampled Gaussian: quick
        folder = tmp_path / "whole"
        line = OWN.replace("--batch-size 10 --epochs 1", "--batch-size 100 --epochs 3")
        assert call(line, own_data, "--output", folder).status == 0
    rng = random.Random(kind)
    originals = {
        name: json.loads((folder / name).read_text("utf-8"))
        for name in ("summary.json", "privacy_events.json")
    }
    believed = 0
    for _ in range(FUZZ):
        name = rng.choice(list(originals))
        (folder / name).write_text(json.dumps(mutated(originals[name], rng)), "utf-8")
        try:
            found = verify_run(folder, seconds=1)
        except UserError:
            raise AssertionError("a damaged run is still a run") from None
        assert found.lines()
        json.dumps(found.to_dict(), allow_nan=False)
        believed += found.believable
        (folder / name).write_text(json.dumps(originals[name]), "utf-8")
    assert believed < FUZZ  # figures that nothing can check, such as the accuracy, may change
    assert verify_run(folder).believable
