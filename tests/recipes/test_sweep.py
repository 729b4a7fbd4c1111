"""Sweeps: what is run, what is kept when processes are killed, the table, and what all runs cost together."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from accounting import Gaussian, PoissonSampled, PrivacyAccountant, Repeated, UserError
from dpml.cli import main
from dpml.config import DPSGDRun
from dpml.outputs import read_events
from dpml.pate.config import PATERun
from dpml.planning import ENGINE_SLACK
from recipes import digits
from recipes.sweep import results_table, sweep
from recipes.sweep_plan import Plan, group_of
from recipes.sweep_statement import compose
from recipes.sweep_workers import set_aside
from recipes.table import COLUMNS, read_runs, summary_row, table_of
from recipes.trials import read_summary, run_or_reuse

# Ctrl-C is to be heard also where the tests run in the background.
MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from dpml.cli import run
run()
"""
COMMAND = [sys.executable, "-c", MAIN, "sweep", "dpsgd-digits"]
PROMISED = """
    recipe run status error method dataset private epsilon epsilon_lower delta noise_multiplier batch_size
    steps test_accuracy train_seconds examples_per_second seed
""".split()  # noqa: SIM905 - the contract, as it is written


def children(pid: int) -> set[int]:
    """The workers of a running sweep."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return {int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()}
    except OSError:
        return set()


def wait_for(condition, what: str, seconds: float = 300.0):
    """The first true answer of `condition`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"no {what} in {seconds} s")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pl.DataFrame]:
    """A small sweep of two seeds with a ceiling, and a cell that fails: its batch is larger than the data."""
    folder = tmp_path_factory.mktemp("sweep") / "new"
    axes = {"batch_size": [512, 5000], "noise_multiplier": [4.0]}

    def tiny(private: bool):
        return replace(digits.dpsgd(private), epochs=2.0 if private else 1.0)

    return folder, sweep(tiny, folder, axes, seeds=2, with_ceiling=True, processes=1)


# ---------------------------------------------------------------- the plan


def test_the_cells_are_the_product_of_axes_and_seeds():
    axes = {"epsilon": [1, 3], "clip_norm": [0.1], "model": ["linear", "mlp"]}
    plan = Plan.of("dpsgd-digits", axes, seeds=2, with_ceiling=True)
    names = [cell.name for cell in plan.cells]
    assert names[0] == "epsilon-1_model-linear_seed-0"
    assert len(set(names)) == len(names) == 2 * 2 * 2 + 2 * 2
    assert {cell.run.clip_norm for cell in plan.cells if not cell.run.non_private} == {0.1}
    ceilings = [cell for cell in plan.cells if cell.run.non_private]
    assert [cell.run.model for cell in ceilings] == ["linear", "mlp", "linear", "mlp"]
    assert group_of("epsilon-1_model-linear_seed-0") == "epsilon-1_model-linear"


def test_noise_takes_the_place_of_the_recipe_s_budget_and_a_budget_that_of_noise():
    plan = Plan.of("dpsgd-digits", {"noise_multiplier": [2.0]}, seeds=1, with_ceiling=False)
    assert (plan.cells[0].run.epsilon, plan.cells[0].run.noise_multiplier) == (None, 2.0)
    plan = Plan.of("pate2017-mnist", {"epsilon": [2.0]}, seeds=1, with_ceiling=False)
    run = plan.cells[0].run
    assert isinstance(run, PATERun)
    assert (run.epsilon, run.noise_multiplier, run.queries) == (2.0, None, 100)


def test_a_recipe_that_suits_an_epsilon_is_told():
    def suits(private: bool, epsilon: float | None = None):
        return replace(digits.dpsgd(private), epsilon=epsilon or 3.0, epochs=epsilon or 1.0)

    plan = Plan.of(suits, {"epsilon": [1.0, 8.0]}, seeds=1, with_ceiling=False)
    assert [cell.run.epochs for cell in plan.cells] == [1.0, 8.0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("dpsgd-digit", "did you mean 'dpsgd-digits'"),
        ("dpsgd-digits --teachers 3", "has no axis 'teachers'"),
        ("dpsgd-digits --epsilon 1,2 --noise-multiplier 3", "not both"),
        ("dpsgd-digits --epsilon 1,1", "twice"),
        ("dpsgd-digits --epsilon one", "'one' is not a valid float"),
        ("dpsgd-digits --epsilon nan", "epsilon"),
        ("dpsgd-digits --epsilon 1,", "not a valid float"),
        ("dpsgd-digits --seeds 0", "seeds"),
        ("dpsgd-digits --processes 0", "processes"),
        ("dpsgd-digits --schedule linear,square", "'square' is not one of"),
    ],
)
def test_a_mistake_gets_one_line(call, tmp_path: Path, words: str, said: str):
    outcome = call(f"sweep {words}", "--output", tmp_path / "a")
    assert outcome.status == 2
    assert said in outcome.error()


def test_a_folder_with_something_else_is_refused(call, tmp_path: Path, swept):
    (tmp_path / "thesis.txt").write_text("mine")
    line = "sweep dpsgd-digits --epsilon 1 --output"
    assert "holds no sweep" in call(line, tmp_path).error()
    assert "another sweep" in call(line, swept[0]).error()
    assert "cannot be made" in call(line, tmp_path / "thesis.txt").error()
    assert (tmp_path / "thesis.txt").read_text() == "mine"


# ---------------------------------------------------------------- a sweep and its table


def test_a_failed_cell_is_kept_with_its_reason_and_the_others_go_on(swept):
    _, runs = swept
    assert runs["status"].to_list() == ["completed", "failed"] * 2 + ["completed"] * 2
    failed = runs.filter(pl.col("status") == "failed")
    assert all("batch size 5000 is larger" in error for error in failed["error"])
    assert failed["epsilon"].to_list() == failed["test_accuracy"].to_list() == [None, None]
    assert runs["private"].to_list() == [True] * 4 + [False] * 2
    assert runs["seed"].to_list() == [0, 0, 1, 1, 0, 1]
    assert runs["noise_multiplier"][0] == 4.0
    assert runs["epsilon_lower"][0] <= runs["epsilon"][0]
    assert runs["examples_per_second"][0] == pytest.approx(
        runs["steps"][0] * runs["batch_size"][0] / runs["train_seconds"][0]
    )
    table = results_table(runs)
    assert list(table.columns[0].cells) == ["batch-size-512", "batch-size-5000", "non-private"]
    assert list(table.columns[-1].cells) == ["2", "0 (2 failed)", "2"]


def test_the_columns_are_those_that_charts_rely_on(swept):
    folder, runs = swept
    assert list(runs.columns)[: len(PROMISED)] == PROMISED
    assert {"config_clip_norm", "config_teachers", "config_dataset", "config_log_not_private"} <= set(COLUMNS)
    assert read_runs(folder).equals(runs)
    assert read_runs(folder / "sweep.parquet").equals(runs)
    assert table_of([]).schema == table_of([{"run": "x"}]).schema == runs.schema
    assert runs.schema["config_clip_quantile"] == pl.Float64  # null in every row
    assert runs.schema["config_non_private"] == pl.Boolean
    assert runs.schema["config_augment"] == pl.String


def test_pandas_reads_the_table(swept):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.read_parquet(swept[0] / "sweep.parquet")
    assert list(frame.columns) == list(COLUMNS)
    assert len(frame) == 6
    assert frame["epsilon"].dtype == "float64"


def test_plain_run_folders_are_read_too(swept):
    folder, runs = swept
    several = read_runs(folder / "runs")
    assert sorted(several["run"]) == sorted(runs.filter(pl.col("status") == "completed")["run"])
    assert several["recipe"].null_count() == len(several)
    one = read_runs([folder / "runs" / "batch-size-512_seed-0", folder / "runs" / "batch-size-512_seed-1"])
    assert one["run"].to_list() == ["batch-size-512_seed-0", "batch-size-512_seed-1"]
    assert one.drop("recipe").equals(runs[[0, 2]].drop("recipe"))


def test_what_is_no_run_is_refused(tmp_path: Path):
    (tmp_path / "a.parquet").write_bytes(b"no")
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "b.parquet")
    for path, words in (("a.parquet", "not a table"), ("b.parquet", "something else"), ("c", "no run")):
        with pytest.raises(UserError, match=words):
            read_runs(tmp_path / path)
    with pytest.raises(UserError, match="no finished run"):
        read_runs(tmp_path)
    with pytest.raises(UserError, match="at least one"):
        read_runs([])


def test_a_diverged_run_and_values_of_a_wrong_type_make_a_row():
    summary = {"status": "diverged", "epsilon": 1, "steps": "many", "config": {"epochs": 3, "views": None}}
    [row] = table_of([summary_row(summary, recipe="r", run="a")]).to_dicts()
    assert (row["status"], row["epsilon"], row["steps"], row["config_epochs"]) == ("diverged", 1.0, None, 3.0)
    assert "not finite" in row["error"]


# ---------------------------------------------------------------- what all runs cost together


def test_the_composition_is_that_of_another_accountant(swept):
    folder, runs = swept
    text = (folder / "statement.md").read_text("utf-8")
    private = runs.filter(pl.col("private") & (pl.col("status") == "completed"))
    noise, steps = private["noise_multiplier"][0] / (1 + ENGINE_SLACK), int(private["steps"].sum())
    [group] = compose(Plan("tiny", _plan_cells(folder)), folder)
    assert (group.runs, group.abandoned, group.relation) == (2, 0, "zero-out")
    ours = PrivacyAccountant()
    ours.record(Repeated(PoissonSampled(Gaussian(noise), 512 / 1437), steps))
    assert group.epsilon == pytest.approx(ours.epsilon(1e-5), rel=1e-6)
    dp_accounting = pytest.importorskip("dp_accounting")
    theirs = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-4)
    event = dp_accounting.PoissonSampledDpEvent(512 / 1437, dp_accounting.GaussianDpEvent(noise))
    theirs.compose(event, steps)
    assert group.epsilon == pytest.approx(theirs.get_epsilon(1e-5), rel=3e-3)
    assert f"**ε = {math.ceil(group.epsilon * 1e4) / 1e4:.4f} at δ = 1e-05**" in text
    for words in (
        "released them all",
        "picking the best",
        "dpml tune",
        "for information",
        "protect no record",
    ):
        assert words in text


def _plan_cells(folder: Path):
    from dpml.config import DPSGDRun
    from recipes.sweep_plan import Cell

    record = json.loads((folder / "sweep.json").read_text())
    return tuple(Cell(cell["name"], DPSGDRun(**cell["config"])) for cell in record["cells"])


def test_different_relations_are_not_composed(tmp_path: Path):
    axes = {"sampling_probability": [None, 0.2], "noise_multiplier": [4.0], "epochs": [1.0]}
    plan = Plan.of("dpsgd-digits", axes, seeds=1, with_ceiling=False)
    sweep("dpsgd-digits", tmp_path / "a", axes, processes=1)
    groups = compose(plan, tmp_path / "a")
    assert {group.relation for group in groups} == {"zero-out", "add-or-remove-one"}
    assert "cannot be composed" in (tmp_path / "a" / "statement.md").read_text("utf-8")


def test_of_an_abandoned_run_nothing_but_its_events_is_kept(tmp_path: Path):
    for number in (1, 2):
        run = tmp_path / "runs" / "a"
        (run / "not_private").mkdir(parents=True)
        (run / "not_private" / "pate.json").write_text("{}")
        (run / "model.safetensors").write_bytes(b"x")
        planned = [Repeated(Gaussian(1.0), 3).to_dict()]
        record = {"schema_version": 1, "planned": planned, "committed": planned}
        (run / "privacy_events.json").write_text(json.dumps(record))
        set_aside(run, tmp_path / "abandoned")
        assert not run.exists()
        assert [p.name for p in (tmp_path / "abandoned" / f"a~{number}").iterdir()] == ["privacy_events.json"]


# ---------------------------------------------------------------- killed processes


def test_a_checkpoint_that_a_kill_has_left_of_a_completed_run_goes(tmp_path: Path):
    """A kill may come after the summary and before the checkpoint, with its keys, is deleted."""

    def go() -> pl.DataFrame:
        axes = {"noise_multiplier": [4.0], "epochs": [1.0]}
        return sweep("dpsgd-digits", tmp_path / "a", axes, seeds=1, processes=1)

    first = go()
    checkpoint = tmp_path / "a" / "runs" / first["run"][0] / "checkpoint"
    assert not checkpoint.exists()
    checkpoint.mkdir()
    (checkpoint / "keys").write_bytes(b"k")
    assert go().equals(first)
    assert not checkpoint.exists()
    checkpoint.mkdir()
    config = json.loads((checkpoint.parent / "summary.json").read_text())["config"]
    run_or_reuse(DPSGDRun(**config), checkpoint.parent, label=None)
    assert not checkpoint.exists()


@pytest.mark.slow
def test_24_runs_killed_at_random_end_with_the_same_24_rows(tmp_path: Path):
    """SIGKILL to the parent three times, at random moments; nothing that was finished is run again."""
    folder = tmp_path / "sweep"
    words = [
        "--noise-multiplier",
        "2,4,8",
        "--clip-norm",
        "0.1,0.5",
        "--seeds",
        "4",
        "--epochs",
        "1",
        "--processes",
        "2",
        "--output",
    ]
    dice = random.Random()
    finished: dict[Path, int] = {}
    killed = 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        done = len(list(folder.glob("runs/*/summary.json")))
        process = subprocess.Popen(
            [*COMMAND, *words, str(folder)], env=environment, stderr=subprocess.DEVNULL
        )
        target = done + dice.randrange(1, 6)
        wait_for(
            lambda p=process, t=target: (
                p.poll() is not None or len(list(folder.glob("runs/*/summary.json"))) >= t
            ),
            "finished runs",
        )
        time.sleep(dice.random() * 0.1)
        workers = children(process.pid)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        wait_for(lambda w=workers: not any(map(alive, w)), "end of the workers", 30)
        now = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/summary.json")}
        assert finished.items() <= now.items()
        finished = now
    assert killed  # on a fast machine the last of them may come too late
    assert main(["sweep", "dpsgd-digits", *words, str(folder)]) == 0
    runs = read_runs(folder)
    plan = json.loads((folder / "sweep.json").read_text())
    assert runs["run"].to_list() == [cell["name"] for cell in plan["cells"]]
    assert len(set(runs["run"])) == 24
    assert set(runs["status"]) == {"completed"}
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    abandoned = list((folder / "abandoned").glob("*/*"))
    assert {path.name for path in abandoned} <= {"privacy_events.json"}
    for path in abandoned:
        assert read_events(path)[0]
    counted = f"All {24 + len(abandoned)} private runs"
    assert counted in (folder / "statement.md").read_text("utf-8")


def test_a_worker_s_death_fails_its_cell_alone_and_is_made_good_by_the_next_call(tmp_path: Path):
    folder = tmp_path / "sweep"
    words = ["--noise-multiplier", "4", "--epochs", "400,1", "--seeds", "1", "--processes", "1", "--output"]
    process = subprocess.Popen([*COMMAND, *words, str(folder)], stdout=subprocess.DEVNULL)
    long = folder / "runs" / "epochs-400_seed-0"
    wait_for(lambda: (long / "privacy_events.json").exists(), "start of the run")
    [worker] = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    assert process.wait(300) == 1
    runs = read_runs(folder)
    assert runs["status"].to_list() == ["failed", "completed"]
    assert "SIGKILL" in runs["error"][0]
    assert read_summary(long) is None
    checkpoint = long / "checkpoint" / "checkpoint.safetensors"
    before = checkpoint.stat().st_mtime_ns

    process = subprocess.Popen([*COMMAND, *words, str(folder)], stderr=subprocess.DEVNULL)
    wait_for(lambda: checkpoint.stat().st_mtime_ns != before, "a checkpoint of the run that goes on")
    process.kill()
    process.wait()
    assert not (folder / "abandoned").exists()  # it went on

    shutil.rmtree(long / "checkpoint")  # now it cannot
    process = subprocess.Popen([*COMMAND, *words, str(folder)], stderr=subprocess.DEVNULL)
    wait_for(lambda: (folder / "abandoned" / "epochs-400_seed-0~1").exists(), "record of the killed run")
    workers = wait_for(lambda: children(process.pid), "worker")
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130
    wait_for(lambda: not any(map(alive, workers)), "end of the worker", 30)
