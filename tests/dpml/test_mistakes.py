"""What careless users type: each mistake gets one line on what to change, and leaves nothing behind."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpml import data

Call = Callable[..., Any]
PLAN = "--examples 1000 --batch-size 10 --epochs 1 --delta 1e-5"
GOOD = {
    "--model": "linear",
    "--noise-multiplier": "2",
    "--delta": "1e-3",
    "--epochs": "1",
    "--batch-size": "10",
}


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def refused(call: Call, line: str, *more: object, status: int = 2) -> str:
    outcome = call(line, *more)
    assert outcome.status == status, outcome
    assert list(Path().iterdir()) == []
    error: str = outcome.error()
    assert error.endswith((".", ")", "?"))
    return error


def train(call: Call, dataset: object, *, status: int = 2, **flags: str | None) -> str:
    """Train with good flags, some of them changed, or left out if None."""
    given = {**GOOD, **{f"--{name.replace('_', '-')}": value for name, value in flags.items()}}
    words = [word for name, value in given.items() if value is not None for word in (name, value)]
    return refused(call, "train dpsgd --dataset", dataset, *words, "--output", "a", status=status)


# ---------------------------------------------------------------- the words of the command


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian", "Did you mean 'train'?"),
        ("train nothing", "No such command 'nothing'"),
        ("--verbose", "No such option '--verbose'"),
        ("train dpsgd", "Missing option '--dataset'"),
        ("train dpsgd --dataset", "requires an argument"),
        ("train dpsgd --dataset digits --epoch 3", "--epochs"),
        ("train dpsgd --dataset digits surplus", "unexpected extra argument"),
        ("train dpsgd --dataset digits --epochs many", "'many' is not a valid float"),
        ("train dpsgd --dataset digits --batch-size 1.5", "'1.5' is not a valid integer"),
        ("train dpsgd --dataset digits --accountant gdp", "'pld', 'rdp'"),
        ("train dpsgd --dataset digits --device tpu", "'cpu', 'cuda'"),
        ("train dpsgd --dataset digits --neighboring-relation same", "'zero-out'"),
        ("account", "--events FILE and --delta"),
        ("account --delta 1e-5", "--events FILE and --delta"),
        ("account --events a.json", "--events FILE and --delta"),
        ("account --delta 1e-5 dpsgd", "behind 'dpsgd'"),
        ("account dpsgd", "Missing option"),
        ("account dpsgd --examples 10 --batch-size 5 --epochs 1 --delta 1e-5", "'--noise-multiplier'"),
        ("account dpsgd --examples 10 --epochs 1 --delta 1e-5 --noise-multiplier 1", "'--batch-size'"),
        ("account dpsgd --batch-size 5 --epochs 1 --delta 1e-5 --noise-multiplier 1", "number of examples"),
        ("calibrate dpsgd", "Missing option"),
        (f"calibrate dpsgd {PLAN}", "--epsilon"),
    ],
)
def test_words(call: Call, line: str, words: str) -> None:
    assert words in refused(call, line)


# ---------------------------------------------------------------- privacy


@pytest.mark.parametrize("delta", ["0", "1", "-1e-5", "1.5", "nan", "inf", "1e-400"])
def test_delta(call: Call, own_data: Path, delta: str) -> None:
    assert "'delta'" in train(call, own_data, delta=delta)
    assert "'delta'" in refused(call, f"account dpsgd {PLAN} --noise-multiplier 1 --delta {delta}")
    assert "'delta'" in refused(call, f"calibrate dpsgd {PLAN} --epsilon 1 --delta {delta}")


@pytest.mark.parametrize("epsilon", ["0", "-1", "nan", "inf", "1e10"])
def test_epsilon(call: Call, own_data: Path, epsilon: str) -> None:
    message = train(call, own_data, noise_multiplier=None, epsilon=epsilon)
    assert "'epsilon' parameter of a run must be in (0, 1e+09)" in message
    assert "'epsilon'" in refused(call, f"calibrate dpsgd {PLAN} --epsilon {epsilon}")


@pytest.mark.parametrize("noise", ["0", "-1", "nan", "inf", "1e8"])
def test_noise(call: Call, own_data: Path, noise: str) -> None:
    assert "'noise_multiplier'" in train(call, own_data, noise_multiplier=noise)
    assert "'noise_multiplier'" in refused(call, f"account dpsgd {PLAN} --noise-multiplier {noise}")


def test_both_or_neither(call: Call, own_data: Path) -> None:
    assert "Got epsilon and noise_multiplier" in train(call, own_data, epsilon="1")
    assert "Got none of them" in train(call, own_data, noise_multiplier=None)
    both = [word for pair in GOOD.items() for word in pair]
    message = refused(call, "train dpsgd --non-private --output a --dataset", own_data, *both)
    assert "Got noise_multiplier and non_private" in message


def test_no_delta(call: Call, own_data: Path) -> None:
    assert "1e-5 is customary for 60,000" in train(call, own_data, delta=None)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_a_budget_that_cannot_be_met(call: Call, own_data: Path, accountant: str) -> None:
    impossible = {"epsilon": "1e-9", "delta": "1e-12", "noise_multiplier": None, "accountant": accountant}
    assert refused(
        call, f"calibrate dpsgd {PLAN} --delta 1e-12 --epsilon 1e-9 --accountant {accountant}", status=3
    ).startswith("No noise multiplier up to 1e+07 meets ε = 1e-09 at δ = 1e-12")
    folder = Path("a")
    given = {**GOOD, **{f"--{key.replace('_', '-')}": value for key, value in impossible.items()}}
    words = [word for name, value in given.items() if value is not None for word in (name, value)]
    outcome = call("train dpsgd --dataset", own_data, *words, "--output", folder)
    assert outcome.status == 3
    assert "No noise multiplier" in outcome.error()
    # Nothing is in the way of a second try.
    assert not folder.exists() or list(folder.iterdir()) == []


def test_relations(call: Call, own_data: Path) -> None:
    assert "sampling_probability" in train(call, own_data, neighboring_relation="add-or-remove-one")
    assert "not analysed under" in train(call, own_data, neighboring_relation="replace-one")


# ---------------------------------------------------------------- the other settings


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("epochs", "0", "'epochs'"),
        ("epochs", "nan", "'epochs'"),
        ("epochs", "1e-3", "0.001 epochs make no step of 10 examples"),
        ("batch_size", "0", "'batch_size'"),
        ("batch_size", "101", "larger than the 100 training examples"),
        ("sampling_probability", "0", "'sampling_probability'"),
        ("sampling_probability", "1.1", "'sampling_probability'"),
        ("clip_norm", "0", "'clip_norm'"),
        ("clip_norm", "inf", "'clip_norm'"),
        ("learning_rate", "-1", "'learning_rate'"),
        ("momentum", "1", "'momentum'"),
        ("momentum", "-0.1", "'momentum'"),
        ("micro_batch_size", "0", "'micro_batch_size'"),
        ("workers", "-1", "'workers'"),
        ("seed", "-1", "'seed'"),
        ("seed", "1" + 30 * "0", "'seed'"),
        ("insecure_noise_seed", "-1", "'insecure_noise_seed'"),
        ("model", "lineer", "did you mean 'linear'?"),
        ("model", "transformer", "choose one of cnn, mlp, linear"),
        ("model", "cnn", "choose 'mlp' or 'linear'"),
        ("classes", "1", "'classes'"),
        ("image_size", "8", "image_size is for image folders"),
        ("image_size", "0", "'image_size'"),
    ],
)
def test_settings(call: Call, own_data: Path, flag: str, value: str, words: str) -> None:
    assert words in train(call, own_data, **{flag: value})


def test_a_batch_larger_than_the_data_in_a_question(call: Call) -> None:
    line = "account dpsgd --examples 100 --batch-size 1000 --epochs 1 --noise-multiplier 1 --delta 1e-5"
    assert "choose at most 100" in refused(call, line)


def test_cuda_without_a_gpu(call: Call, own_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "not available" in train(call, own_data, device="cuda")


# ---------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("digitz", "did you mean 'digits'?"),
        ("imagenet", "give one of digits, mnist, fashion-mnist, cifar10"),
        ("/no/such/file.npz", "There is no data set or path"),
        ("", "must be a name or a path"),
        (".", "no folder 'train'"),
        (__file__, "not a readable .npz file"),
    ],
)
def test_datasets(call: Call, dataset: str, words: str) -> None:
    assert words in train(call, dataset)


def _with(values: np.ndarray[Any, Any], value: float) -> np.ndarray[Any, Any]:
    changed = values.copy()
    changed.flat[3] = value
    return changed


X, Y = np.zeros((100, 4), np.float32), np.arange(100) % 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x_train": _with(X, np.nan)}, "x_train of .* holds 1 NaN or infinite value"),
        ({"x_test": _with(X[:20], np.inf)}, "x_test of .* holds 1 NaN or infinite value"),
        ({"y_train": _with(Y, -1)}, "y_train of .* holds the label -1"),
        ({"y_test": _with(Y[:20], 7)}, "y_test of .* holds the label 7"),
        ({"y_train": Y[:99]}, "100 examples in x_train but 99 labels in y_train"),
        ({"x_train": X.astype(object)}, "x_train of .* holds Python objects"),
        ({"y_train": Y.astype(object)}, "y_train of .* holds Python objects"),
        ({"x_train": X.astype(str)}, "x_train of .* must hold real numbers"),
        ({"y_train": Y.astype(float)}, "y_train of .* must hold integer labels"),
        ({"y_train": _with(Y, 10**9)}, "would make 1000000001 classes"),
        ({"y_train": 0 * Y}, "at least 2"),
        ({"x_train": X[:0], "y_train": Y[:0]}, "empty"),
        ({"x_test": X[:20, :3]}, r"shape \[4\] in x_train, but \[3\] in x_test"),
        ({"y_test": None}, "has no array y_test"),
    ],
)
def test_arrays(call: Call, save_npz: Callable[..., Path], changed: dict[str, Any], words: str) -> None:
    path = save_npz(**changed)
    message = train(call, path)
    assert re.search(words, message), message


def test_labels_beyond_the_classes_given(call: Call, save_npz: Callable[..., Path]) -> None:
    path = save_npz(y_train=np.arange(100) % 3)
    assert "2 classes have the labels 0 to 1" in train(call, path, classes="2")


def test_a_damaged_file(call: Call, own_data: Path, tmp_path: Path) -> None:
    content = own_data.read_bytes()
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    assert "not a readable .npz file" in train(call, tmp_path / "half.npz")


def test_a_benchmark_that_cannot_be_had(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPML_DATA", raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(data.official, "cache_folder", lambda: tmp_path / "cache")
    assert "mnist" in train(call, "mnist")


# ---------------------------------------------------------------- the output folder


def _as_it_was(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file()}


def test_nothing_is_overwritten(call: Call, own_data: Path, digits_run: Path) -> None:
    before = _as_it_was(digits_run)
    words = [word for pair in GOOD.items() for word in pair]
    message = refused(call, "train dpsgd --dataset", own_data, *words, "--output", digits_run)
    assert "is not empty; choose a new one" in message
    assert _as_it_was(digits_run) == before


def test_a_folder_with_one_foreign_file(call: Call, own_data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".hidden").write_text("mine", "utf-8")
    words = [word for pair in GOOD.items() for word in pair]
    refused(call, "train dpsgd --dataset", own_data, *words, "--output", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [".hidden"]


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/dpml", "/proc/1/a/b", 300 * "x", "dangling"])
def test_folders_that_cannot_be_made(call: Call, own_data: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("mine", "utf-8")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    words = [word for pair in GOOD.items() for word in pair]
    message = refused(call, "train dpsgd --dataset", own_data, *words, "--output", tmp_path / where)
    assert "cannot be written to (" in message
    assert (tmp_path / "file").read_text("utf-8") == "mine"


def test_an_empty_folder_is_welcome(call: Call, own_data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    words = [word for pair in GOOD.items() for word in pair]
    assert call("train dpsgd --dataset", own_data, *words, "--output", tmp_path / "empty").status == 0


# ---------------------------------------------------------------- events files


def nested(depth: int) -> dict[str, Any]:
    event: dict[str, Any] = {"type": "Gaussian", "noise_multiplier": 1.0}
    for _ in range(depth):
        event = {"type": "Repeated", "event": event, "count": 1}
    return {"schema_version": 1, **event}


GAUSSIAN = {"schema_version": 1, "type": "Gaussian", "noise_multiplier": 1.0}


def gaussian(noise: float) -> list[dict[str, Any]]:
    return [{**GAUSSIAN, "noise_multiplier": noise}]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"schema_version": 2}, "version 1"),
        ({"schema_version": None}, "version 1"),
        ({"planned": None}, "no list 'planned'"),
        ({"planned": []}, "no list 'planned'"),
        ({"committed": {}}, "no list 'committed'"),
        ({"planned": [1]}, "must be a JSON object"),
        ({"planned": [{}]}, "schema_version"),
        ({"planned": [{**GAUSSIAN, "type": "Gauss\n\x1b[31m"}]}, "is unknown"),
        ({"planned": [{**GAUSSIAN, "type": ["Gaussian"]}]}, "is unknown"),
        ({"planned": [{**GAUSSIAN, "extra": 1}]}, "has the fields"),
        ({"planned": [{"schema_version": 1, "type": "Gaussian"}]}, "has the fields"),
        ({"planned": gaussian(float("nan"))}, "'noise_multiplier'"),
        ({"planned": gaussian(0)}, "'noise_multiplier'"),
        ({"planned": [{**nested(1), "count": -1}]}, "'count'"),
        ({"planned": [{**nested(1), "count": 2.0}]}, "'count'"),
        ({"planned": [{**nested(1), "count": True}]}, "'count'"),
        ({"planned": [nested(100)]}, "nested deeper"),
        ({"neighboring_relation": "none"}, "neighbouring relation"),
        ({"neighboring_relation": ["zero-out"]}, "neighbouring relation"),
        ({"neighboring_relation": "replace-one"}, "not analysed under the relation replace-one"),
        ({"accountant": "gdp"}, "one of pld, rdp"),
        ({"accountant": ["pld"]}, "one of pld, rdp"),
    ],
)
def test_events_that_are_not(
    call: Call, digits_run: Path, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    good = json.loads((digits_run / "privacy_events.json").read_text("utf-8"))
    (tmp_path / "bad.json").write_text(json.dumps({**good, **changed}), "utf-8")
    assert words in refused(call, "account --delta 1e-5 --json --events", tmp_path / "bad.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1" * 10_000,
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\x00" * 10**6,
    ],
    ids=["empty", "open", "list", "null", "digits", "bytes", "deep list", "deep object", "zeros"],
)
def test_files_that_are_no_events_files(call: Call, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    assert "'../bad.json'" in refused(call, "account --delta 1e-5 --events ../bad.json")


def test_the_wrong_file_of_a_run(call: Call, digits_run: Path) -> None:
    line = "account --delta 1e-5 --events"
    assert "no list 'planned'" in refused(call, line, digits_run / "summary.json")
    assert "not valid JSON" in refused(call, line, digits_run / "model.safetensors")
    assert "Is a directory" in refused(call, line, digits_run)
    assert "No such file" in refused(call, line, digits_run / "nothing.json")
