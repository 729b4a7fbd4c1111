import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import EntryPoint, version
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

from accounting import UserError
from dpml import cli, registry
from dpml.config import DPSGDConfig, DPSGDRun

Call = Callable[..., Any]
CLASSIC = "--examples 60000 --batch-size 256 --epochs 60 --delta 1e-5 --json"
OWN = "train dpsgd --model linear --delta 1e-3 --epochs 1 --batch-size 10 --dataset"


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def commands(group: click.Group, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """All commands and groups, as the words that call them."""
    found = [words]
    for name, command in group.commands.items():
        found += commands(command, (*words, name)) if isinstance(command, click.Group) else [(*words, name)]
    return found


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("words", commands(cli.dpml), ids=" ".join)
def test_every_command_has_help(call: Call, words: tuple[str, ...], flag: str) -> None:
    outcome = call(" ".join(words), flag)
    assert outcome.status == 0
    assert outcome.out.startswith(f"Usage: {' '.join(('dpml', *words))} ")
    assert outcome.err == ""


def test_every_option_has_help() -> None:
    for words in commands(cli.dpml):
        command: Any = cli.dpml
        for word in words:
            command = command.commands[word]
        assert command.help, words
        for option in command.params:
            # An argument has no help of its own: the command's names it.
            named = isinstance(option, click.Argument) or option.help
            assert named, (words, option.name)


def test_version(call: Call) -> None:
    assert call("--version").out == f"dpml, version {version('dpml')}\n"


@pytest.mark.parametrize("words", ["", "train", "calibrate"])
def test_a_group_alone_shows_its_commands(call: Call, words: str) -> None:
    outcome = call(words)
    assert outcome.status == 2
    assert "Commands:" in outcome.out


def test_the_flags_of_train_are_the_fields_of_a_run() -> None:
    command = cli.dpml.commands["train"].commands["dpsgd"]  # type: ignore[attr-defined]
    options = {option.name: option for option in command.params}
    assert set(options) - {"output", "recipe"} == {field.name for field in fields(DPSGDRun)}
    for name, option in options.items():
        assert option.opts == [f"--{name.replace('_', '-')}"]
        assert not option.required


@pytest.mark.parametrize("words", ["account", "calibrate"])
def test_the_flags_of_a_question_are_fields_too(words: str) -> None:
    command = cli.dpml.commands[words].commands["dpsgd"]  # type: ignore[attr-defined]
    names = {option.name for option in command.params}
    known = {field.name for field in fields(DPSGDConfig)} | {"examples", "as_json"}
    assert names <= known | {"group_size", "attack_tpr", "attack_fpr"}


# ---------------------------------------------------------------- train


def test_noise_in_epsilon_out(call: Call, own_data: Path, tmp_path: Path) -> None:
    outcome = call(OWN, own_data, "--noise-multiplier", 2, "--output", tmp_path / "a")
    assert outcome.status == 0
    summary = summary_of(tmp_path / "a")
    assert summary["noise_multiplier"] == 2
    assert summary["target_epsilon"] is None
    assert summary["planned_steps"] == summary["steps"] == 10
    plan = "account dpsgd --examples 100 --batch-size 10 --epochs 1 --noise-multiplier 2 --delta 1e-3 --json"
    assert json.loads(call(plan).out)["epsilon"] == summary["epsilon"]
    assert f"{summary['epsilon']:.4f} at δ = 0.001 (zero-out, number of records public)" in outcome.out


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("epsilon", [0.1, 3])
def test_budget_in_epsilon_just_below(
    call: Call, own_data: Path, tmp_path: Path, epsilon: float, accountant: str
) -> None:
    more = ("--epsilon", epsilon, "--accountant", accountant, "--output", tmp_path / "a")
    assert call(OWN, own_data, *more).status == 0
    summary = summary_of(tmp_path / "a")
    assert summary["target_epsilon"] == epsilon
    assert 0.995 * epsilon <= summary["epsilon"] <= epsilon
    assert summary["accountant"] == accountant
    assert 0 < summary["epsilon_lower"] <= summary["epsilon"]


def test_the_budget_s_epsilon_is_that_of_the_noise(call: Call, own_data: Path, tmp_path: Path) -> None:
    assert call(OWN, own_data, "--epsilon", 1, "--output", tmp_path / "a").status == 0
    first = summary_of(tmp_path / "a")
    noise = repr(first["noise_multiplier"])
    assert call(OWN, own_data, "--noise-multiplier", noise, "--output", tmp_path / "b").status == 0
    assert summary_of(tmp_path / "b")["epsilon"] == first["epsilon"]


def test_non_private(call: Call, own_data: Path, tmp_path: Path) -> None:
    line = "train dpsgd --non-private --model linear --epochs 2 --batch-size 10 --dataset"
    outcome = call(line, own_data, "--output", tmp_path / "a")
    assert outcome.status == 0
    assert "∞ (no privacy)" in outcome.out
    summary = summary_of(tmp_path / "a")
    nothing = (
        "epsilon epsilon_lower epsilon_spent target_epsilon delta accountant neighboring_relation "
        "privacy_unit n_is_public noise_multiplier clip_norm noise_is_secret sensitivity_slack"
    )
    assert {summary[key] for key in nothing.split()} == {None}
    assert summary["steps"] == summary["planned_steps"] == 20
    assert "without differential privacy" in (tmp_path / "a" / "statement.md").read_text("utf-8")
    events = call("account --delta 1e-5 --json --events", tmp_path / "a" / "privacy_events.json")
    assert json.loads(events.out)["epsilon"] is None
    events = call("account --delta 1e-5 --events", tmp_path / "a" / "privacy_events.json")
    assert re.search(r"^epsilon +inf$", events.out, re.M)


def test_add_or_remove_one_needs_a_sampling_probability(call: Call, own_data: Path, tmp_path: Path) -> None:
    asked = ("--noise-multiplier", 2, "--neighboring-relation", "add-or-remove-one")
    refused = call(OWN, own_data, *asked, "--output", tmp_path / "a")
    assert refused.status == 2
    assert "sampling_probability" in refused.error()
    assert not (tmp_path / "a").exists()
    given = ("--sampling-probability", 0.1, "--output", tmp_path / "a")
    assert call(OWN, own_data, *asked, *given).status == 0
    summary = summary_of(tmp_path / "a")
    assert summary["neighboring_relation"] == "add-or-remove-one"
    assert summary["n_is_public"] is False
    assert summary["sampling_probability"] == 0.1


def test_a_sampling_probability_alone_means_add_or_remove_one(
    call: Call, own_data: Path, tmp_path: Path
) -> None:
    more = ("--noise-multiplier", 2, "--sampling-probability", 0.2, "--output", tmp_path / "a")
    assert "(add-or-remove-one)" in call(OWN, own_data, *more).out
    assert summary_of(tmp_path / "a")["planned_steps"] == 5


def test_without_output_a_run_makes_a_folder_below_runs(
    call: Call, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(OWN, own_data, "--noise-multiplier", 2).status == 0
    [folder] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"own-dpsgd-\d{8}-\d{6}", folder.name)
    assert summary_of(folder)["status"] == "completed"


def test_the_output_is_printed_as_it_is(call: Call, own_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("[bold]:cat: " + "long" * 30)
    outcome = call(OWN, own_data, "--noise-multiplier", 2, "--output", folder)
    assert outcome.status == 0
    assert f"{folder}\n" in outcome.out
    assert f"tensorboard --logdir '{folder}'\n" in outcome.out


def test_a_data_set_may_have_any_name(call: Call, save_npz: Callable[..., Path]) -> None:
    name = "[red]x[bold] :cat:.npz"
    outcome = call(OWN.removesuffix(" --dataset"), "--dataset", save_npz(name), "--noise-multiplier", 2)
    assert outcome.status == 0
    assert f"{name}: step 10/10" in outcome.err


@pytest.fixture(autouse=True)
def runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without --output land in the test's folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_folder_from_end_to_end(call: Call, tmp_path: Path, channels: int) -> None:
    rng = np.random.default_rng(0)
    for split, n in (("train", 20), ("test", 5)):
        for label, name in enumerate(("dark", "light")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(128 * label, 128 * label + 128, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(folder / f"{i}.png")
    line = "train dpsgd --noise-multiplier 1 --delta 1e-3 --epochs 5 --batch-size 10 --image-size 6 --dataset"
    outcome = call(line, tmp_path / "images", "--output", tmp_path / "a")
    assert outcome.status == 0, outcome.err
    summary = summary_of(tmp_path / "a")
    assert summary["dataset"] == str(tmp_path / "images")
    assert summary["test_accuracy"] is not None
    assert summary["config"]["model"] == "cnn"


# ---------------------------------------------------------------- recipes


def test_defaults_come_from_the_recipe_and_a_typed_flag_wins(digits_run: Path) -> None:
    recipe = registry.default_run("dpsgd", "digits", private=True)
    assert recipe is not None
    config = summary_of(digits_run)["config"]
    typed = {"epsilon": 3.0, "delta": 1e-4, "epochs": 4.0, "batch_size": 128}
    assert config == {**vars(recipe), **typed}


def test_a_recipe_s_own_budget_is_nobody_s_wish(call: Call) -> None:
    assert "Got none of them" in call("train dpsgd --dataset digits --delta 1e-5").error()
    assert "delta" in call("train dpsgd --dataset digits --epsilon 1").error()


def test_recipes_lists_what_is_registered(call: Call) -> None:
    outcome = call("recipes")
    assert outcome.status == 0
    for name in ("dpsgd-digits", "dpsgd-mnist", "dpsgd-fashion-mnist", "dpsgd-cifar10"):
        assert re.search(rf"^{name} +\S", outcome.out, re.M)


def foreign_recipe(private: bool) -> DPSGDRun:
    """A recipe of somebody else."""
    wish: dict[str, Any] = {"epsilon": 9.0, "delta": 0.5} if private else {"non_private": True}
    return DPSGDRun(**wish, dataset="own.npz", model="mlp", epochs=1, batch_size=20, clip_norm=0.25)


def undocumented_recipe(private: bool) -> DPSGDRun:
    return foreign_recipe(private)


def failing_recipe(private: bool) -> DPSGDRun:  # noqa: ARG001
    """Fails."""
    raise ZeroDivisionError("oh\nno")


def lying_recipe(private: bool) -> Any:
    """Returns something else."""
    return {"private": private}


def _register(monkeypatch: pytest.MonkeyPatch, **recipes: str) -> None:
    entries = [
        EntryPoint(name.replace("_", "-"), f"{__name__}:{value}", registry.GROUP)
        for name, value in recipes.items()
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == registry.GROUP else [])


def test_another_package_s_recipe(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_npz: Callable[..., Path]
) -> None:
    save_npz()
    _register(monkeypatch, dpsgd_theirs="foreign_recipe", dpsgd_bare="undocumented_recipe")
    listed = call("recipes").out.splitlines()
    assert [line.split(None, 1)[0] for line in listed] == ["recipe", "dpsgd-bare", "dpsgd-theirs"]
    assert "(no description)" in listed[1]
    assert "A recipe of somebody" in listed[2]
    more = ("--noise-multiplier", 2, "--delta", 1e-3, "--batch-size", 10, "--output", tmp_path / "a")
    assert call("train dpsgd --dataset theirs", *more).status == 0
    config = summary_of(tmp_path / "a")["config"]
    assert config["dataset"] == "own.npz"
    assert (config["model"], config["clip_norm"]) == ("mlp", 0.25)
    assert (config["batch_size"], config["delta"], config["epsilon"]) == (10, 1e-3, None)
    assert call("train dpsgd --dataset theirs --non-private --output", tmp_path / "b").status == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("failing_recipe", "ZeroDivisionError: oh no"),
        ("lying_recipe", "returned dict"),
        ("no_such_recipe", "AttributeError"),
    ],
)
def test_a_broken_recipe_is_named(
    call: Call, monkeypatch: pytest.MonkeyPatch, value: str, words: str
) -> None:
    _register(monkeypatch, dpsgd_broken=value, dpsgd_good="foreign_recipe")
    outcome = call("train dpsgd --dataset broken --epsilon 1 --delta 1e-3")
    assert outcome.status == 2
    assert "'dpsgd-broken'" in outcome.error()
    assert words in outcome.error()
    listed = call("recipes")
    assert listed.status == 0
    assert "A recipe of somebody" in listed.out


def test_no_recipes_at_all(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    _register(monkeypatch)
    assert call("recipes").status == 0
    assert registry.default_run("dpsgd", "digits", private=True) is None


def test_recipes_that_ship_load_and_say_what_they_reach_and_cost() -> None:
    for name, entry in registry.recipe_entries().items():
        card = registry.recipe_card(registry.load_recipe(entry))
        assert card is not None, name
        assert card.reaches, name
        assert card.cost, name
        if name.startswith("dpsgd-"):
            for private in (True, False):
                run = registry.default_run("dpsgd", name.removeprefix("dpsgd-"), private=private)
                assert run is not None
                assert run.non_private is not private


# ---------------------------------------------------------------- account and calibrate


@pytest.mark.parametrize(("method", "epsilon"), [("pld", 2.3817), ("rdp", 2.5966)])
def test_account_of_the_classic_case(call: Call, method: str, epsilon: float) -> None:
    outcome = call(f"account dpsgd {CLASSIC} --noise-multiplier 1.1 --accountant {method}")
    assert outcome.status == 0
    report = json.loads(outcome.out)
    assert report["steps"] == 14_062
    assert report["epsilon"] == pytest.approx(epsilon, rel=0.005)
    assert 0.98 * 2.3817 < report["epsilon_lower"] <= report["epsilon"]
    assert report["sampling_probability"] == 256 / 60_000
    assert report["expected_batch_size"] == 256
    assert report["neighboring_relation"] == "zero-out"
    assert report["n_is_public"] is True
    assert report["accountant"] == method


def test_account_prints_what_json_holds(call: Call) -> None:
    line = f"account dpsgd {CLASSIC} --noise-multiplier 1.1"
    report = json.loads(call(line).out)
    text = call(line.replace("--json", "")).out
    rows = dict(re.split(r"  +", row) for row in text.splitlines())
    assert set(rows) == {key.replace("_", " ") for key in report}
    assert float(rows["epsilon"]) == pytest.approx(report["epsilon"], rel=1e-5)


@pytest.mark.parametrize("method", ["pld", "rdp"])
def test_calibrate_then_account(call: Call, method: str) -> None:
    found = json.loads(call(f"calibrate dpsgd {CLASSIC} --epsilon 3 --accountant {method}").out)
    assert found["target_epsilon"] == 3
    assert 0.995 * 3 <= found["epsilon"] <= 3
    noise = repr(found["noise_multiplier"])
    line = f"account dpsgd {CLASSIC} --noise-multiplier {noise} --accountant {method}"
    assert json.loads(call(line).out)["epsilon"] == found["epsilon"]


def test_train_with_calibrated_noise(call: Call, own_data: Path, tmp_path: Path) -> None:
    line = "calibrate dpsgd --examples 100 --batch-size 10 --epochs 1 --epsilon 2 --delta 1e-3 --json"
    noise = repr(json.loads(call(line).out)["noise_multiplier"])
    assert call(OWN, own_data, "--noise-multiplier", noise, "--output", tmp_path / "a").status == 0
    assert 0.995 * 2 <= summary_of(tmp_path / "a")["epsilon"] <= 2


def test_account_with_the_number_of_records_protected(call: Call) -> None:
    line = "account dpsgd --sampling-probability 0.01 --batch-size 256 --epochs 10 --noise-multiplier 1"
    report = json.loads(call(f"{line} --delta 1e-5 --json").out)
    assert report["steps"] == 1000
    assert report["neighboring_relation"] == "add-or-remove-one"
    assert report["n_is_public"] is False


def test_account_of_a_run_recomputes_its_epsilon(call: Call, digits_run: Path) -> None:
    summary = summary_of(digits_run)
    line = f"account --json --delta {summary['delta']} --events"
    report = json.loads(call(line, digits_run / "privacy_events.json").out)
    assert report["epsilon"] == summary["epsilon"]
    assert report["epsilon_lower"] == summary["epsilon_lower"]
    assert report["committed_epsilon"] == summary["epsilon_spent"]
    assert report["neighboring_relation"] == summary["neighboring_relation"]


# ---------------------------------------------------------------- the process


def test_the_console_script() -> None:
    script = Path(sys.executable).with_name("dpml")
    good = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    bad = subprocess.run([script, "trian"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert bad.stderr == "dpml: error: No such command 'trian'. Did you mean 'train'?\n"


def test_a_terminal_without_greek() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    code = "from dpml.cli import run; import sys; sys.argv[1:] = ['account', '--help']; run()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u03b4, in (0, 1)" in done.stdout


def test_a_reader_that_goes_away() -> None:
    code = "import sys; sys.argv[1:] = ['train', 'dpsgd', '--help']; from dpml.cli import run; run()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() != 0


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (OSError(28, "No space left on device"), "No space left on device."),
        (OSError(28, "No space left on device", b"a/b"), "No space left on device (a/b)."),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried"), "not enough memory"),
    ],
)
def test_a_machine_that_fails(
    call: Call, monkeypatch: pytest.MonkeyPatch, raised: Exception, words: str
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(registry, "recipe_entries", fail)
    outcome = call("recipes")
    assert outcome.status == 1
    assert words in outcome.error()


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(registry, "recipe_entries", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["recipes"])


def test_the_command_needs_no_torch_to_answer_questions() -> None:
    code = (
        "import sys; from dpml.cli import main; "
        f"assert main({f'account dpsgd {CLASSIC} --noise-multiplier 1.1'.split()!r}) == 0; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_errors_are_one_line_even_where_a_message_has_more(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise UserError("one\n  two")

    monkeypatch.setattr(registry, "recipe_entries", fail)
    assert call("recipes").error() == "one two"


# ---------------------------------------------------------------- what else can be found


def test_calibrate_finds_what_is_left_out(call: Call) -> None:
    line = "calibrate dpsgd --examples 6000 --delta 1e-4 --epsilon 2 --json"
    plan = {"noise-multiplier": 1.0, "epochs": 5.0, "batch-size": 60}
    for left_out, key, more in (
        ("noise-multiplier", "noise_multiplier", 0.99),
        ("batch-size", "expected_batch_size", 2),
    ):
        given = " ".join(f"--{name} {value}" for name, value in plan.items() if name != left_out)
        found = json.loads(call(f"{line} {given}").out)
        assert found["epsilon"] <= 2
        worse = found[key] + more if left_out == "batch-size" else found[key] * more
        flags = " ".join(f"--{n} {worse if n == left_out else v}" for n, v in plan.items())
        assert (
            json.loads(call(f"account dpsgd --examples 6000 --delta 1e-4 --json {flags}").out)["epsilon"] > 2
        )
    found = json.loads(call(f"{line} --noise-multiplier 1 --batch-size 60").out)
    assert found["epsilon"] <= 2
    again = f"--noise-multiplier 1 --batch-size 60 --epochs {(found['steps'] + 1.5) / 100}"
    assert json.loads(call(f"account dpsgd --examples 6000 --delta 1e-4 --json {again}").out)["epsilon"] > 2


def test_calibrate_for_a_risk(call: Call) -> None:
    line = "calibrate dpsgd --examples 6000 --epochs 5 --batch-size 60 --delta 1e-4 --json"
    found = json.loads(call(f"{line} --attack-tpr 0.05 --attack-fpr 0.01").out)
    assert 0.0499 <= found["attack_tpr_at_fpr_0.01"] <= 0.05 * (1 + 1e-3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epochs 5 --batch-size 60 --noise-multiplier 1 --epsilon 2", "Leave out exactly one"),
        ("--epochs 5 --epsilon 2", "Leave out exactly one"),
        ("--epochs 5 --batch-size 60", "Give either --epsilon"),
        (
            "--epochs 5 --batch-size 60 --epsilon 2 --attack-tpr 0.1 --attack-fpr 0.01",
            "Give either --epsilon",
        ),
        ("--noise-multiplier 1 --batch-size 60 --attack-tpr 0.1 --attack-fpr 0.01", "Give either --epsilon"),
        ("--epochs 5 --batch-size 60 --attack-tpr 0.1", "tpr"),
        ("--epochs 5 --batch-size 60 --attack-tpr 0.01 --attack-fpr 0.1", "tpr"),
    ],
)
def test_what_calibrate_cannot_make_sense_of(call: Call, flags: str, words: str) -> None:
    done = call(f"calibrate dpsgd --examples 6000 --delta 1e-4 {flags}")
    assert done.status == 2
    assert words in done.err
    assert done.err.count("\n") == 1


def test_epsilon_for_a_group(call: Call) -> None:
    line = "account dpsgd --examples 6000 --epochs 5 --batch-size 60 --noise-multiplier 1 --delta 1e-4 --json"
    one, three = (json.loads(call(f"{line} --group-size {size}").out) for size in (1, 3))
    assert three["epsilon"] > 2 * one["epsilon"]
    assert "attack_tpr_at_fpr_0.01" in one
    assert "attack_tpr_at_fpr_0.01" not in three
