import dataclasses

import pytest
import torch

from accounting.errors import UserError
from dpml.data import LabeledData, load


def make(**changes):
    fields = {
        "name": "mine",
        "x_train": torch.rand(6, 1, 4, 4),
        "y_train": torch.tensor([0, 1, 2, 0, 1, 2]),
        "x_test": torch.rand(2, 1, 4, 4),
        "y_test": torch.tensor([2, 0]),
        "classes": 3,
    }
    return LabeledData(**(fields | changes))


def test_properties():
    data = make()
    assert data.example_shape == (1, 4, 4)
    assert (data.train_examples, data.test_examples) == (6, 2)
    assert not data.is_public_benchmark
    assert repr(data) == "LabeledData('mine', 6 + 2 examples of shape (1, 4, 4), 3 classes)"


def test_is_frozen_and_compares_by_identity():
    data = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.classes = 4
    assert data == data
    assert data != make()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_train": torch.rand(6, 1, 4, 4).double()}, ["x_train", "float64"]),
        ({"y_test": torch.tensor([2.0, 0.0])}, ["y_test", "float32"]),
        ({"x_test": torch.rand(2)}, ["x_test", "[2]"]),
        ({"x_test": torch.rand(2, 0)}, ["x_test", "[2, 0]"]),
        ({"y_test": torch.zeros(2, 3, dtype=torch.int64)}, ["y_test", "[2, 3]", "argmax"]),
        ({"y_train": torch.tensor([0, 1])}, ["x_train", "y_train", "6", "2"]),
        (
            {"x_test": torch.rand(0, 1, 4, 4), "y_test": torch.tensor([]).long()},
            ["x_test", "empty"],
        ),
        ({"x_test": torch.rand(2, 1, 4, 8)[..., ::2]}, ["x_test", "contiguous"]),
        ({"x_test": torch.rand(2, 1, 4, 5)}, ["[1, 4, 4]", "[1, 4, 5]"]),
        ({"y_test": torch.tensor([0, -3])}, ["y_test", "-3"]),
        ({"y_test": torch.tensor([0, 3])}, ["y_test", "label 3", "0 to 2"]),
        ({"classes": 1}, ["classes", "at least 2", "1"]),
        ({"classes": 3.0}, ["classes", "3.0"]),
    ],
)
def test_refuses_faulty_fields(refused, changes, words):
    refused(lambda: make(**changes), "mine", *words)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("count", [1, 3])
def test_counts_values_that_are_not_finite(refused, value, count):
    x = torch.rand(6, 1, 4, 4)
    x.view(-1)[:count] = value
    refused(lambda: make(x_train=x), "x_train", f" {count} NaN or infinite value")


def test_unknown_name_suggests_the_nearest(refused):
    refused(lambda: load("minst"), "'minst'", "did you mean 'mnist'", "digits", "fashion-mnist")
    refused(lambda: load("CIFAR-10"), "did you mean 'cifar10'")
    assert "did you mean" not in refused(lambda: load("no/such/file.npz"), "no/such/file.npz", ".npz")


def test_arguments_that_do_not_apply_are_refused(refused, tmp_path, monkeypatch):
    refused(lambda: load("digits", classes=7), "digits", "10", "7")
    refused(lambda: load("digits", image_size=(4, 4)), "image_size", "digits")
    monkeypatch.chdir(tmp_path)  # a long path would be cut in the message
    (tmp_path / "a.npz").touch()
    refused(lambda: load("a.npz", image_size=(4, 4)), "image_size", "a.npz")


def test_errors_are_value_errors():
    with pytest.raises(ValueError, match="no data set"):
        load("nothing")
    assert issubclass(UserError, ValueError)
