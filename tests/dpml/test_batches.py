import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from accounting.errors import UserError
from dpml.data.batches import Examples

CPU = torch.device("cpu")
N = 11


class Numbered:
    """A user's data set. Record i holds i, in the form that `make` gives it."""

    def __init__(self, make=lambda i: (torch.full((2,), float(i)), i), size=N):
        self.make, self.size, self.read = make, size, []

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if not 0 <= i < self.size:
            raise IndexError(i)
        self.read.append(i)
        return self.make(i)


def as_dict(i):
    return {"pixels": torch.full((2,), float(i)), "more": [torch.tensor(i), (float(i), i)]}, i


def tensors():
    return TensorDataset(torch.arange(N).float()[:, None].expand(N, 2), torch.arange(N))


def examples(data, size=4, workers=0):
    return Examples(data, size, workers, CPU)


def records(batches):
    """The targets of the places that hold an example, in order."""
    return [int(t) for batch in batches for t in batch.targets[batch.mask]]


SAMPLES = [[], [0], [N - 1], [1, 2, 3], [1, 2, 3, 5], [0, 2, 4, 6, 8], list(range(N))]


@pytest.mark.parametrize("size", [1, 3, 4, 64])
@pytest.mark.parametrize("make", [tensors, Numbered])
def test_each_sampled_record_stands_in_one_place_and_the_rest_is_padding(make, size):
    source = examples(make(), size)
    assert len(source) == N
    for sample in SAMPLES:
        batches = list(source.micro_batches(torch.tensor(sample, dtype=torch.int64)))
        assert records(batches) == sample
        assert len(batches) == -(-len(sample) // size)
        for batch in batches:
            assert batch.inputs.shape == (min(size, N), 2), "never padded beyond the whole data set"
            assert batch.targets.shape == (min(size, N),)
            assert batch.mask.shape == (min(size, N),)
            assert batch.mask.dtype == torch.bool
            assert torch.equal(batch.inputs[:, 0], batch.targets.float())


@pytest.mark.parametrize("make", [tensors, Numbered])
def test_an_empty_sample_reads_nothing_and_gives_no_micro_batches(make):
    data = make()
    source = examples(data)
    if isinstance(data, Numbered):
        data.read.clear()
    assert list(source.micro_batches(torch.zeros(0, dtype=torch.int64))) == []
    assert getattr(data, "read", []) == []


def test_padding_is_a_copy_of_a_sampled_record_and_no_other_record_is_read():
    data = Numbered()
    source = examples(data)
    data.read.clear()
    [batch] = source.micro_batches(torch.tensor([7, 9]))
    assert data.read == [7, 9]
    assert batch.mask.tolist() == [True, True, False, False]
    assert batch.targets.tolist() == [7, 9, 7, 7]


def test_micro_batches_are_read_one_at_a_time():
    data = Numbered()
    source = examples(data)
    data.read.clear()
    batches = source.micro_batches(torch.arange(N))
    next(batches)
    assert data.read == [0, 1, 2, 3]


def test_inputs_may_be_dicts_lists_and_tuples_of_tensors_and_numbers():
    source = examples(Numbered(as_dict))
    first, last = source.micro_batches(torch.arange(6))
    assert first.inputs["pixels"].shape == (4, 2)
    assert last.mask.tolist() == [True, True, False, False]
    assert last.inputs["pixels"][:, 0].tolist() == [4, 5, 4, 4]
    assert last.inputs["more"][0].tolist() == [4, 5, 4, 4]
    assert [part.tolist() for part in last.inputs["more"][1]] == [[4, 5, 4, 4]] * 2
    assert source.probe()[0]["pixels"].shape == (1, 2)


def test_records_may_be_lists():
    source = examples(Numbered(lambda i: [torch.tensor([float(i)]), i]))
    assert records(source.micro_batches(torch.tensor([2, 3]))) == [2, 3]


def test_targets_may_be_vectors():
    source = examples(Numbered(lambda i: (torch.tensor([float(i)]), torch.full((3,), float(i)))))
    [batch] = source.micro_batches(torch.tensor([2, 3]))
    assert batch.targets.shape == (4, 3)
    assert batch.targets[batch.mask].tolist() == [[2.0] * 3, [3.0] * 3]


@pytest.mark.parametrize("make", [lambda: Numbered(), lambda: Numbered(as_dict)], ids=["tensors", "dicts"])
def test_worker_processes_give_the_same_micro_batches(make):
    here, there = examples(make()), examples(make(), workers=2)
    for sample in [*SAMPLES, list(range(N)), []]:
        indices = torch.tensor(sample, dtype=torch.int64)
        expected, got = list(here.micro_batches(indices)), list(there.micro_batches(indices))
        assert records(got) == sample
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a.inputs, b.inputs, rtol=0, atol=0)
            assert torch.equal(a.targets, b.targets)
            assert torch.equal(a.mask, b.mask)
    assert there.probe() is not None


def test_worker_processes_survive_a_sample_that_was_read_in_part():
    source = examples(Numbered(), size=2, workers=2)
    started = source.micro_batches(torch.arange(N))
    assert records([next(started)]) == [0, 1]
    started.close()
    assert records(source.micro_batches(torch.tensor([5, 6, 7]))) == [5, 6, 7]


def test_the_probe_is_one_record_as_a_batch():
    for make in (tensors, Numbered):
        assert examples(make()).probe()[0].shape == (1, 2)


# ---------------------------------------------------------------- mistakes


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(2), 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Stream(), "map-style"),
        (iter([]), "map-style"),
        ({1, 2}, "map-style"),
        (None, "map-style"),
        (7, "map-style"),
        ([], "empty"),
        (TensorDataset(torch.zeros(0, 2), torch.zeros(0)), "empty"),
        (TensorDataset(torch.zeros(3, 2)), "pair"),
        (TensorDataset(*[torch.zeros(3)] * 3), "pair"),
        (Numbered(lambda _: torch.zeros(2)), "pair"),
        (Numbered(lambda _: (torch.zeros(2),)), "pair"),
        (Numbered(lambda _: (torch.zeros(2), 0, 1)), "pair"),
        (Numbered(lambda _: {"input": torch.zeros(2), "target": 0}), "pair"),
        (["ab", "cd"], "pair"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_data_set_that_cannot_be_sampled_is_refused_in_one_line(data, words):
    with pytest.raises(UserError) as raised:
        examples(data)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_records_of_strings_are_refused_in_one_line():
    source = examples(Numbered(lambda i: ("text", i)))
    with pytest.raises(UserError, match="tensors and numbers") as raised:
        list(source.micro_batches(torch.tensor([0])))
    assert "\n" not in str(raised.value)
