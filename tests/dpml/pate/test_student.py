"""The student of PATE: what it learns from few answers, and which mistakes it names."""

from functools import cache

import pytest
import torch
from torch.nn import functional

from accounting import UserError
from dpml.data import load
from dpml.pate.guesses import choose_queries
from dpml.pate.student import StudentSettings, train_student

QUICK = StudentSettings(epochs=1)


@cache
def digits():
    return load("digits")


def asked(k=40, seed=0):
    return torch.randperm(len(digits().x_train), generator=torch.Generator().manual_seed(seed))[:k]


def accuracy(student, flat=False):
    x = digits().x_test.flatten(1) if flat else digits().x_test
    with torch.no_grad():
        return (student(x).argmax(dim=1) == digits().y_test).float().mean().item()


def train(settings=QUICK, *, flat=False, rows=None, **changed):
    x = digits().x_train.flatten(1) if flat else digits().x_train
    rows = asked() if rows is None else rows
    given = {"public": x, "asked": rows, "answers": digits().y_train[rows], "classes": 10} | changed
    seed = given.pop("seed", 0)
    report = given.pop("report", None)
    return train_student(*given.values(), settings, seed=seed, report=report)


@pytest.mark.parametrize(("method", "least"), [("supervised", 0.7), ("fixmatch", 0.75), ("spread", 0.85)])
def test_forty_answers_go_a_long_way(method, least):
    settings = StudentSettings(method=method, epochs=6, batch_size=64, width=8)
    student = train(settings)
    assert not student.training
    assert accuracy(student) > least


def test_feature_vectors_and_soft_answers():
    settings = StudentSettings(epochs=6, batch_size=64)
    soft = 0.9 * functional.one_hot(digits().y_train[asked()], 10).double() + 0.01
    assert accuracy(train(settings, flat=True, answers=soft), flat=True) > 0.7


def test_hard_answers_are_soft_ones_without_doubt():
    soft = functional.one_hot(digits().y_train[asked()], 10).float()
    x = digits().x_test
    assert torch.equal(train()(x), train(answers=soft)(x))


def test_same_seed_same_student_and_the_callers_random_state_stays():
    x = digits().x_test
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = train(), train(), train(seed=1)
    choose_queries(digits().x_train, 10)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first(x), second(x))
    assert not torch.equal(first(x), other(x))


def test_reports_each_epoch_and_reports_do_not_matter():
    seen = []

    def report(epoch, epochs, student):
        seen.append((epoch, epochs, tuple(student(digits().x_test[:3]).shape)))
        torch.rand(1)

    settings = StudentSettings(epochs=3, batch_size=500)
    student = train(settings, report=report)
    assert seen == [(1, 3, (3, 10)), (2, 3, (3, 10)), (3, 3, (3, 10))]
    assert torch.equal(student(digits().x_test), train(settings)(digits().x_test))


@pytest.mark.parametrize("shape", [(7,), (1, 4, 4), (3, 9, 6), (1, 28, 28), (3, 32, 32)])
def test_any_shape_and_fewer_inputs_than_a_batch(shape):
    public = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    public[3] = public[1]
    settings = StudentSettings(epochs=2, flip=True)
    student = train_student(public, torch.tensor([1, 4]), torch.tensor([2, 0]), 4, settings)
    logits = student(public[:1])
    assert logits.shape == (1, 4)
    assert logits.isfinite().all()


def test_a_class_without_answers_and_equal_inputs_are_no_obstacle():
    rows = asked(100)
    rows = rows[digits().y_train[rows] != 3]
    assert train(rows=rows)(digits().x_test).isfinite().all()
    student = train_student(torch.ones(6, 4), torch.tensor([0]), torch.tensor([1]), 2, QUICK)
    assert student(torch.ones(1, 4)).isfinite().all()


@pytest.mark.parametrize("flat", [False, True])
def test_queries_are_distinct_rows_that_cover_the_classes(flat):
    x = digits().x_train.flatten(1) if flat else digits().x_train
    rows = choose_queries(x, 30)
    assert rows.dtype == torch.int64
    assert len(rows.unique()) == 30
    assert rows.min() >= 0
    assert rows.max() < len(x)
    assert len(digits().y_train[rows].unique()) == 10
    assert torch.equal(rows, choose_queries(x, 30))
    assert not torch.equal(rows, choose_queries(x, 30, seed=1))


def test_queries_among_duplicates_and_all_of_them():
    assert choose_queries(torch.ones(4, 3), 4).sort().values.tolist() == [0, 1, 2, 3]
    assert choose_queries(torch.rand(1, 1, 4, 4).repeat(3, 1, 1, 1), 2).unique().numel() == 2


NAN = torch.full((4, 3), torch.nan)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"public": torch.rand(20, 3, 4)}, "(20, 3, 4)"),
        ({"public": torch.rand(20, 3).double()}, "float64"),
        ({"public": [[0.0]]}, "Got list"),
        ({"public": NAN}, "12 numbers"),
        ({"public": torch.rand(0, 3)}, "shape (0, 3)"),
        ({"public": torch.rand(9, 1, 3, 3)}, "4×4"),
        ({"asked": torch.tensor([], dtype=torch.int64), "answers": torch.tensor([])}, "one answer at least"),
        ({"asked": torch.tensor([0, 0])}, "1 repeated"),
        ({"asked": torch.tensor([0, 10**6])}, "0 to 1000000"),
        ({"asked": torch.tensor([-1, 0])}, "-1 to 0"),
        ({"asked": torch.tensor([0.0, 1.0])}, "int64 [k]"),
        ({"answers": torch.tensor([1])}, "int64 [2]"),
        ({"answers": torch.tensor([1, 10])}, "from 0 to 9"),
        ({"answers": torch.tensor([1, -1])}, "from 0 to 9"),
        ({"answers": torch.tensor([1.0, 2.0])}, "floats [2, 10]"),
        ({"answers": torch.full((2, 10), 0.2)}, "one in sum"),
        ({"answers": torch.full((2, 10), torch.nan)}, "one in sum"),
        ({"classes": 1}, "classes"),
        ({"seed": -1}, "seed"),
    ],
)
def test_each_mistake_gets_one_line(changed, words):
    rows = torch.tensor([0, 1])
    with pytest.raises(UserError) as caught:
        train(**({"asked": rows, "answers": rows} | changed))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"method": "gan"},
        {"epochs": 0},
        {"epochs": 1.5},
        {"batch_size": 1},
        {"answer_batch_size": 1},
        {"width": 0},
        {"learning_rate": 0.0},
        {"threshold": 1.0},
        {"average": 1.0},
        {"spread_kept": 0.0},
        {"spread_share": 1.1},
        {"weight_decay": float("nan")},
        {"strength": 3.0},
        {"flip": 1},
    ],
)
def test_each_setting_is_checked(changed):
    with pytest.raises(UserError):
        StudentSettings(**changed)


@pytest.mark.parametrize("count", [0, 11, 2.0])
def test_the_count_of_queries_is_checked(count):
    with pytest.raises(UserError):
        choose_queries(torch.rand(10, 3), count)
