import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dpml.data import from_arrays, load

X = np.arange(24, dtype=np.float32).reshape(6, 4)
Y = np.array([0, 1, 2, 2, 1, 0])


def arrays(**changes) -> dict[str, np.ndarray]:
    return {"x_train": X, "y_train": Y, "x_test": X[:2], "y_test": Y[:2]} | changes


def save(path: Path, **changes) -> Path:
    np.savez(path, **arrays(**changes))
    return path


# What becomes of types and shapes

NUMBERS = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
)
SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, max_side=5)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), dtype=NUMBERS, shape=SHAPES, compressed=st.booleans())
def test_any_numbers_of_any_shape_survive_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, data, dtype, shape, compressed
):
    kind = np.dtype(dtype)
    limits = {"min_value": -1000, "max_value": 1000} if kind.kind == "f" else {}
    x = data.draw(hnp.arrays(dtype, (3, *shape), elements=limits))
    path = tmp_path_factory.getbasetemp() / "round-trip.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays(x_train=x, y_train=Y[:3], x_test=x[:2]))
    loaded = load(path).x_train

    expected = x[:, None] if x.ndim == 3 else x
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        expected = x.transpose(0, 3, 1, 2)
    expected = expected.astype(np.float32)
    if kind == np.uint8 and expected.ndim > 2:
        expected = expected / np.float32(255)
    assert loaded.dtype == torch.float32
    assert loaded.is_contiguous()
    np.testing.assert_array_equal(loaded.numpy(), expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((10,), (10,)),  # features
        ((28, 28), (1, 28, 28)),
        ((28, 28, 1), (1, 28, 28)),
        ((32, 32, 3), (3, 32, 32)),
        ((32, 24, 4), (4, 32, 24)),
        ((3, 32, 32), (3, 32, 32)),
        ((3, 32, 3), (3, 32, 3)),  # either; channel-first wins
        ((16, 8, 2), (16, 8, 2)),  # two channels are never last
        ((2, 3, 4, 5), (2, 3, 4, 5)),
    ],
)
def test_shapes(shape, expected):
    data = from_arrays("a", **arrays(x_train=np.zeros((6, *shape)), x_test=np.zeros((2, *shape))))
    assert data.example_shape == expected


def test_only_bytes_with_image_axes_are_scaled():
    bytes_ = np.full((6, 2, 2), 255, np.uint8)
    images = from_arrays("a", **arrays(x_train=bytes_, x_test=bytes_[:2]))
    assert images.x_train.max() == 1
    features = from_arrays("a", **arrays(x_train=bytes_[:, 0], x_test=bytes_[:2, 0]))
    assert features.x_train.max() == 255
    wide = bytes_.astype(np.int32)
    assert from_arrays("a", **arrays(x_train=wide, x_test=wide[:2])).x_train.max() == 255


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64, ">i2"])
def test_labels_of_any_integer_type(tmp_path, dtype):
    data = load(save(tmp_path / "a.npz", y_train=Y.astype(dtype)))
    assert data.y_train.dtype == torch.int64
    assert data.y_train.tolist() == Y.tolist()
    assert data.classes == 3
    assert not data.is_public_benchmark


def test_labels_may_be_a_column_or_bool():
    column = from_arrays("a", **arrays(y_train=Y[:, None], y_test=Y[:2, None]))
    assert column.y_train.tolist() == Y.tolist()
    boolean = from_arrays("a", **arrays(y_train=Y > 0, y_test=Y[:2] > 0))
    assert (boolean.classes, boolean.y_test.tolist()) == (2, [0, 1])


def test_classes_can_be_set(tmp_path):
    assert load(save(tmp_path / "a.npz"), classes=10).classes == 10
    assert load(save(tmp_path / "b.npz", y_train=Y + 5000), classes=6000).classes == 6000


def test_the_callers_arrays_are_copied():
    x, y = X.copy(), Y.copy()
    data = from_arrays("a", x_train=x, y_train=y, x_test=X, y_test=Y)
    x[:], y[:] = -1, -1
    assert data.x_train.min() == 0
    assert data.y_train.min() == 0


def test_lists_are_arrays_too():
    data = from_arrays("a", x_train=[[0], [1]], y_train=[0, 1], x_test=[[2]], y_test=[1])
    assert data.x_test.tolist() == [[2.0]]


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "a.npz")
    assert load("~/a.npz").name == "~/a.npz"


# Mistakes

BIG = np.where(X == 3, 1e39, X.astype(np.float64))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_train": np.where(X < 2, np.nan, X)}, ["x_train", "2 NaN"]),
        ({"x_test": np.where(X[:2] == 1, -np.inf, X[:2])}, ["x_test", "1 NaN or infinite"]),
        ({"x_train": BIG}, ["x_train", "1e+39", "float32"]),
        ({"x_train": X.astype(complex)}, ["x_train", "complex128"]),
        ({"x_train": X.astype(str)}, ["x_train", "<U32"]),
        ({"x_train": X.astype("M8[s]")}, ["x_train", "datetime64"]),
        ({"x_train": np.zeros(6, "f4,f4")}, ["x_train", "f0"]),
        ({"x_train": np.float32(1)}, ["x_train", "[]"]),
        ({"x_train": X[:, 0]}, ["x_train", "[6]"]),
        ({"x_train": X[:, :0]}, ["x_train", "[6, 0]"]),
        ({"x_train": X[:0], "y_train": Y[:0]}, ["x_train", "empty"]),
        ({"x_test": X[:0], "y_test": Y[:0]}, ["x_test", "empty"]),
        ({"x_train": X[:5]}, ["x_train", "y_train", "5", "6"]),
        ({"x_test": X[:2, :3]}, ["x_train", "x_test", "[4]", "[3]"]),
        ({"y_train": Y.astype(float)}, ["y_train", "float64", "int64"]),
        ({"y_train": np.array(list("abcabc"))}, ["y_train", "<U1"]),
        ({"y_train": np.array(1)}, ["y_train", "[]"]),
        ({"y_train": np.eye(6, dtype=int)}, ["y_train", "[6, 6]", "one-hot"]),
        ({"y_train": Y - 1}, ["y_train", "label -1"]),
        ({"y_train": Y * 0 - 5}, ["y_train", "label -5"]),
        ({"y_train": Y * 0}, ["classes", "at least 2", "got 1"]),
        ({"y_test": Y[:2] + 2}, ["y_test", "label 3", "0 to 2"]),
        ({"y_train": Y + 10**9}, ["y_train", "1000000002", "set classes"]),
        ({"y_train": np.full(6, 2**64 - 1, np.uint64)}, ["y_train", str(2**64 - 1)]),
    ],
)
def test_mistakes_are_named(refused, tmp_path, changes, words):
    path = save(tmp_path / "a.npz", **changes)
    refused(lambda: load(path), str(path), *words)


def test_labels_beyond_the_given_classes(refused, tmp_path):
    refused(lambda: load(save(tmp_path / "a.npz"), classes=2), "y_train", "label 2", "0 to 1")
    refused(lambda: load(tmp_path / "a.npz", classes=0), "classes", "at least 2", "got 0")
    refused(lambda: load(tmp_path / "a.npz", classes=True), "classes", "Got True")


def test_missing_arrays_are_listed(refused, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x_train=X, Y_train=Y, x_test=X)
    assert "x_train, y_train, x_test, y_test" in refused(lambda: load(path), "no array y_train, y_test:")


def test_extra_arrays_are_ignored(tmp_path):
    assert load(save(tmp_path / "a.npz", extra=np.array([None]))).classes == 3


class Malice:
    ran = False

    def __reduce__(self):
        return (setattr, (Malice, "ran", True))


def test_nothing_is_unpickled(refused, tmp_path):
    objects = np.array([[Malice()]] * 6)
    refused(lambda: load(save(tmp_path / "a.npz", x_train=objects)), "x_train", "Python objects")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Malice()))
    refused(lambda: load(tmp_path / "b.npz"), "b.npz", "not a readable .npz")
    assert not Malice.ran


def test_files_that_are_no_npz(refused, tmp_path):
    path = tmp_path / "a.npz"
    for content in (b"", b"PK\x03\x04 and more", b"label,pixel\n1,2\n"):
        path.write_bytes(content)
        refused(lambda: load(path), str(path), "not a readable .npz")
    with path.open("wb") as file:
        np.save(file, X)
    refused(lambda: load(path), str(path), "single array")


def test_damaged_npz(refused, tmp_path):
    path = save(tmp_path / "a.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(lambda: load(path), str(path), "not a readable .npz")
    start = whole.index(X.tobytes())
    path.write_bytes(whole[:start] + b"\xff" + whole[start + 1 :])
    refused(lambda: load(path), str(path), "x_train", "damaged")


def test_a_member_that_is_no_array(refused, tmp_path):
    path = save(tmp_path / "a.npz")
    other = tmp_path / "b.npz"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            target.writestr(name, b"text" if name == "y_test.npy" else source.read(name))
    refused(lambda: load(other), str(other), "y_test")
