"""What fuzzing found, each by itself: inputs that once got a traceback, or were wrongly accepted."""

from __future__ import annotations

import json
import os
import sqlite3
import zipfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dpml
from accounting import (
    Composed,
    Gaussian,
    OneOf,
    PrivacyAccountant,
    PrivacyBudget,
    Repeated,
    UserError,
    calibrate_noise_multiplier,
    calibrate_steps,
    epsilon_curve,
    pate,
    pate_sanitise,
    selection,
    statement,
    tradeoff,
)
from accounting.events import atoms
from accounting.ledger import Ledger
from dpml.audit.bounds import clopper_pearson_epsilon
from dpml.audit.dpsgd import audit_dpsgd
from dpml.audit.pate import audit_pate
from dpml.cli import main
from dpml.features import cache
from dpml.outputs import read_events
from dpml.pate.aggregation import aggregator
from dpml.pate.answers import AnswerBook
from dpml.pate.teachers import load_ensemble
from dpml.paths import read_text
from dpml.verify import verify_run
from recipes.sweep import sweep

HUGE = 10**5000
BUDGET = PrivacyBudget(1.0, 1e-5)
RANDOM = dpml.Randomness.from_seed(0, "test")
DPSGD: dict[str, Any] = {"noise_multiplier": 1.0, "delta": 1e-5}


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


CALLS: dict[str, Any] = {
    # More digits than Python writes, texts of several lines, and objects without a text.
    "a huge noise": lambda: Gaussian(HUGE),
    "a huge count": lambda: Repeated(Gaussian(1.0), HUGE),
    "no text": lambda: Gaussian(Odd()),
    "a huge model": lambda: dpml.build(HUGE, (3,), 2),
    "a switch": lambda: dpml.DPSGDConfig(**DPSGD, log_not_private=HUGE),
    # Arrays, whose comparison is no yes or no.
    "a list of relations": lambda: PrivacyAccountant(neighboring_relation=np.array(["zero-out", "a"])),
    "a list of methods": lambda: PrivacyAccountant(np.array(["pld", "rdp"])),
    "an array of clippings": lambda: dpml.Clipping(1.0, np.array(["flat", "flat"])),
    "an array of models": lambda: dpml.DPSGDRun(**DPSGD, dataset="digits", model=np.array(["a", "b"])),
    "no dimension": lambda: OneOf(np.array(1.5)),
    "no list": lambda: Composed(np.array(1.5)),
    # A misspelt relation once counted as zero-out: half of what replace-one costs.
    "a misspelt relation": lambda: atoms(Gaussian(1.0), "replace_one"),
    "no event": lambda: epsilon_curve(1.0, [1], 1e-5),
    "no steps": lambda: epsilon_curve(Gaussian(1.0), 5, 1e-5),
    "no function": lambda: calibrate_noise_multiplier(1.0, BUDGET),
    "no budget": lambda: calibrate_steps(lambda n: Repeated(Gaussian(9.0), n), 1.0),
    "no tolerance": lambda: calibrate_noise_multiplier(Gaussian, BUDGET, tolerance="a"),
    "no part": lambda: PrivacyAccountant().reserve(Gaussian(1.0)).commit(1, {}),
    "no orders": lambda: pate.gnmax_rdp([[3, 2]], 1.0, "a"),
    "no probabilities": lambda: pate.data_dependent_rdp(-1.0, 1.0),
    "endless moments": lambda: pate.moments_epsilon([[3, 2]], 1.0, 1e-5, 10**15),
    "no beta": lambda: pate_sanitise.gnss_noise_multiplier(0.1, order=20.0, beta="a"),
    "no rates": lambda: tradeoff.tradeoff_curve(Gaussian(1.0), "0.1"),
    "no divergence": lambda: selection.selection_divergence("a", np.ones_like, selection.PoissonRuns(2.0)),
    "endless runs": lambda: selection.PoissonRuns(2.0).probability_of(10**400),
    "no risk": lambda: statement.Risk.of(Gaussian(1.0), float("nan"), "zero-out"),
    # Noise that is none.
    "a clip norm of zero": lambda: dpml.GaussianNoise(1.0, RANDOM).add([torch.zeros(2)], 0.0),
    "a clip norm below zero": lambda: dpml.GaussianNoise(1.0, RANDOM).add([torch.zeros(2)], -1.0),
    "a clip norm of NaN": lambda: dpml.GaussianNoise(1.0, RANDOM).add([torch.zeros(2)], float("nan")),
    "an infinite sum": lambda: dpml.GaussianNoise(1.0, RANDOM).add([torch.full((2,), float("inf"))], 1.0),
    "no randomness": lambda: dpml.GaussianNoise(1.0, np.random.default_rng(0)),
    "no numbers": lambda: dpml.Randomness.from_seed(0, "test").words(-1),  # moved the stream back
    "half a seed": lambda: dpml.Randomness.from_seed(1.5, "test"),  # was that of 1
    "a secret text": lambda: dpml.Randomness.secret().restore({**RANDOM.state(), "is_secret": "false"}),
    "no key": lambda: dpml.Randomness.secret().restore({**RANDOM.state(), "key": 1}),
    # Parts of a loop.
    "no decay": lambda: dpml.WeightAverage(nn.Linear(2, 2), float("nan")),
    "no divisor": lambda: dpml.set_gradients([], [], 0),
    "no views": lambda: dpml.Examples([(0, 0)], views=0),
    "no sampler": lambda: dpml.SampledGaussianMechanism(None, dpml.Clipping(1.0), None, None),
    "no model's name": lambda: dpml.build([], (4,), 2),
    "no shape": lambda: dpml.build("mlp", 4, 2),
    "no configuration": lambda: dpml.train_dpsgd(nn.Linear(2, 2), [(torch.zeros(2), 0)], {}),
    "no run": lambda: dpml.run_pate(None),
    "no records": lambda: dpml.train_pate(5, torch.zeros(3, 2), dpml.PATEConfig(**DPSGD, queries=1)),
    "a test set of nothing": lambda: dpml.train_dpsgd(
        nn.Linear(2, 2), [(torch.zeros(2), 0)] * 300, dpml.DPSGDConfig(**DPSGD), test_set=3
    ),
    "no data": lambda: dpml.load(None),
    "no folder": lambda: dpml.PrivatePredictor(3),
    "no run's folder": lambda: verify_run(3),
    "no time": lambda: verify_run(".", seconds=float("nan")),
    # The ledger, by a path or with values that are none.
    "no path of a ledger": lambda: Ledger(3),
    "no text of a path": lambda: Ledger("a\0b"),
    # Audits.
    "no run to audit": lambda: audit_dpsgd(3),
    "no way to audit": lambda: audit_dpsgd(dpml.DPSGDRun(**DPSGD, dataset="digits"), 3),
    "no aggregator": lambda: audit_pate(3),
    "no releases": lambda: clopper_pearson_epsilon("a", 5, 1, 5, 1e-5, 0.1),
    "no beta of an audit": lambda: clopper_pearson_epsilon(1, 5, 1, 5, 1e-5, (0.1,)),
    # Sweeps.
    "no folder for a sweep": lambda: sweep("dpsgd-digits", {}),
    "no axes": lambda: sweep("dpsgd-digits", "out", "epsilon"),
    "an axis of no values": lambda: sweep("dpsgd-digits", "out", {"epsilon": 3}),
    "a huge axis": lambda: sweep("dpsgd-digits", "out", {"epsilon": [1, HUGE], "delta": [1e-5]}),
    "a recipe of 5000 characters": lambda: sweep("x" * 5000, "out"),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_clear_line(name: str) -> None:
    with pytest.raises(UserError) as found:
        CALLS[name]()
    assert type(found.value) is not ValueError
    assert 10 < len(str(found.value)) < 500
    assert "\n" not in str(found.value)


def test_devices_and_pipes_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="plain file"):
            read_text(path)
        with pytest.raises(UserError, match="plain file"):
            read_events(path)


def test_a_pipe_in_a_cache_is_no_cache(tmp_path: Path) -> None:
    """Nobody writes to it: whoever opens it waits for ever, and no signal helps."""
    os.mkfifo(tmp_path / "ensemble.safetensors")
    (tmp_path / "ensemble.json").write_text("{}")
    with pytest.raises(UserError, match="plain file"):
        load_ensemble(tmp_path)
    assert cache._read(tmp_path / "ensemble.safetensors") is None


def test_a_version_is_no_truth_value(tmp_path: Path) -> None:
    body = Gaussian(1.0).to_dict()
    record = {"schema_version": True, "planned": [body], "committed": [body]}
    (tmp_path / "events.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="not an events file of version 1"):
        read_events(tmp_path / "events.json")


def test_a_header_that_claims_more_than_memory_holds(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    np.savez(path, y_train=np.arange(2), x_test=np.zeros((2, 2)), y_test=np.arange(2))
    with zipfile.ZipFile(path, "a") as archive, archive.open("x_train.npy", "w") as member:
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**15, 4)}
        np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(UserError, match="damaged"):
        dpml.load(path)


def test_a_cache_whose_header_is_cut_is_none(tmp_path: Path) -> None:
    path = tmp_path / "block.npy"
    cache._write(path, iter([np.zeros((2, 2), dtype=np.float16)]), 2)
    path.write_bytes(path.read_bytes().replace(b"}", b" "))
    assert cache._read(path) is None


def test_a_book_without_its_columns(tmp_path: Path) -> None:
    by = aggregator("gnmax", noise_multiplier=4.0, queries=3)
    AnswerBook(tmp_path / "book", by).close()
    with closing(sqlite3.connect(tmp_path / "book")) as base:
        base.execute("ALTER TABLE queries DROP COLUMN class")
        base.commit()
    with pytest.raises((UserError, OSError), match="no such column"):
        AnswerBook(tmp_path / "book", by)


def test_a_delta_below_all_normal_floats() -> None:
    accountant = PrivacyAccountant()
    accountant.record(Gaussian(1.0))
    low, high = accountant.epsilon_bounds(5e-324)  # once: no convergence
    assert 38.0 < low <= high < 39.1  # μ²/2 + μ·√(2·log(1/δ)) is above it


@pytest.mark.parametrize("words", [["verify", "a\0b"], ["train", "dpsgd", "--epochs", "x" * 5000]])
def test_words_that_no_line_takes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("dpml: error: ")
    assert message.count("\n") == 1
    assert len(message) < 1100


def test_odd_records_sizes_and_divisors_get_one_line() -> None:
    class Odd(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            return torch.zeros(2), object()

    with pytest.raises(UserError, match="cannot be put together in one batch"):
        dpml.Examples(Odd(), 2, 0, torch.device("cpu"), 1).probe()
    for shape, classes in (((10**5000,), 2), ((10**9,), 2), ((4,), 10**12)):
        with pytest.raises(UserError, match=r"at most 10\^"):
            dpml.build("mlp", shape, classes)
    parameter = nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match="divisor"):
        dpml.set_gradients([parameter], [torch.ones(3)], 5e-324)


def test_odd_counts_and_states_of_a_stream_get_one_line() -> None:
    stream = dpml.Randomness.from_seed(0, "test")
    with pytest.raises(UserError, match="count"):
        stream.normals({1})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no state of a stream"):
        stream.restore(np.float64(1))  # type: ignore[arg-type]


def test_a_book_whose_text_is_no_text_is_refused(tmp_path: Path) -> None:
    given = aggregator("gnmax", noise_multiplier=4.0, queries=3)
    AnswerBook(tmp_path / "book", given).close()
    content = (tmp_path / "book").read_bytes()
    assert b"CREATE TABLE queries" in content
    (tmp_path / "book").write_bytes(content.replace(b"CREATE TABLE queries", b"CREATE T\xaaBLE queries"))
    with pytest.raises(UserError, match="holds no answers"):
        AnswerBook(tmp_path / "book", given)


def test_a_name_that_no_folder_can_have_is_no_run() -> None:
    with pytest.raises(UserError, match="it is no folder"):
        verify_run("x" * 5000)
