"""What one record changes in a partition: its own shard, and nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from accounting import UserError
from dpml.pate.partition import Partition, default_places, record_digests

# Seeds are fixed; besides, no statistical bound is crossed by chance more than once in 10^11.
ALPHA = 1e-11
N = 30


def records(n=N, seed=0, width=3):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(n, width, generator=generator)
    return inputs, torch.randint(10, (n,), generator=generator)


def shards(inputs, labels, teachers=4, *, places=None, key=0):
    """For each teacher what sits at its places: (numbers, label), or None. Row numbers are left out."""
    parts = Partition.of(inputs, labels, teachers, places=places or max(1, len(inputs)), key=key)
    return [
        [(tuple((inputs[row] + 0.0).tolist()), int(labels[row])) if row >= 0 else None for row in members]
        for members in parts.members.tolist()
    ]


def changed(before, after):
    """The teachers whose places hold something else."""
    return [teacher for teacher, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]


def without(inputs, labels, row):
    kept = [other for other in range(len(inputs)) if other != row]
    return inputs[kept], labels[kept]


def check_partition(inputs, labels, teachers, places):
    """Assert that each record has one shard, and that without it that shard alone is another one."""
    members = Partition.of(inputs, labels, teachers, places=places).members
    rows = members[members >= 0].tolist()
    assert len(rows) == len(set(rows)), "partition: a record is in two shards"
    before = shards(inputs, labels, teachers, places=places)
    for row in range(len(inputs)):
        own = [] if row not in rows else [int((members == row).any(dim=1).nonzero())]
        moved = changed(before, shards(*without(inputs, labels, row), teachers, places=places))
        assert moved == own, f"partition: without a record of shards {own} the shards {moved} change"


# ---------------------------------------------------------------- one record


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_record_is_in_exactly_one_shard(n, teachers, key, seed):
    members = Partition.of(*records(n, seed), teachers, places=n, key=key).members
    assert members.shape == (teachers, n)
    assert members.dtype == torch.int64
    assert sorted(members[members >= 0].tolist()) == list(range(n))


@pytest.mark.parametrize("places", [N, 6, 2, 1])
@pytest.mark.parametrize("teachers", [1, 4, 25])
def test_without_a_record_one_shard_changes_and_no_other_record_moves(teachers, places):
    check_partition(*records(), teachers, places)


@given(
    st.integers(0, N - 1), st.floats(width=32, allow_nan=False), st.integers(0, 9), st.sampled_from([2, N])
)
@settings(max_examples=100, deadline=None)
def test_a_changed_record_changes_two_shards_at_most(row, value, label, places):
    inputs, labels = records()
    before = shards(inputs, labels, places=places)
    inputs, labels = inputs.clone(), labels.clone()
    inputs[row, 1], labels[row] = value, label
    assert len(changed(before, shards(inputs, labels, places=places))) <= 2


@given(st.permutations(range(N)), st.sampled_from([2, 5, N]))
@settings(max_examples=50, deadline=None)
def test_the_order_of_rows_does_not_matter(order, places):
    inputs, labels = records()
    inputs[10:13], labels[10:13] = inputs[0], labels[0]  # equal ones among them
    assert shards(inputs, labels, places=places) == shards(inputs[order], labels[order], places=places)


def test_which_records_overflow_is_the_shard_s_own_matter():
    inputs, labels = records(200)
    whole = shards(inputs, labels, 5)
    for places in (1, 7, 30):
        few = shards(inputs, labels, 5, places=places)
        assert few == [shard[:places] for shard in whole]  # the same ones go first, whoever else is there
    check_partition(inputs[:60], labels[:60], 5, places=7)


def test_duplicates_share_a_shard_and_count_one_by_one():
    inputs, labels = records()
    inputs[3:9], labels[3:9] = inputs[0], labels[0]
    home = [shard for shard in shards(inputs, labels) if (tuple(inputs[0].tolist()), int(labels[0])) in shard]
    assert len(home) == 1
    assert home[0].count((tuple(inputs[0].tolist()), int(labels[0]))) == 7
    check_partition(inputs, labels, 4, places=N)


def test_minus_zero_is_zero():
    inputs, labels = records()
    inputs[:, 1] = 0.0
    minus = inputs.clone()
    minus[:, 1] = -0.0
    assert record_digests(inputs, labels, 0) == record_digests(minus, labels, 0)
    assert shards(inputs, labels) == shards(minus, labels)


def test_every_number_the_label_and_the_key_matter_and_nothing_else():
    inputs, labels = torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64)
    digests = {record_digests(inputs, labels, 0), record_digests(inputs, labels + 1, 0)}
    digests |= {record_digests(inputs, labels, key) for key in (1, -1, 2**70)}
    for place in range(5):
        other = inputs.clone()
        other[0, place] = 1e-45
        digests.add(record_digests(other, labels, 0))
    assert len(digests) == 10
    assert {len(digest) for digest in digests} == {16}
    assert record_digests(inputs.view(1, 1, 5), labels, 0) in digests
    transposed = records()[0].T.contiguous().T  # other strides
    assert record_digests(transposed, records()[1], 0) == record_digests(*records(), 0)


def test_a_record_s_digest_is_its_own():
    inputs, labels = records()
    together = record_digests(inputs, labels, 7)
    alone = [record_digests(inputs[row : row + 1], labels[row : row + 1], 7) for row in range(N)]
    assert together == b"".join(alone)


def test_hostile_numbers_have_a_shard_like_any_other():
    inputs, labels = records()
    inputs[0], inputs[1, 0], inputs[2], inputs[3] = 1e38, -1e38, torch.inf, 1e-45
    check_partition(inputs, labels, 4, places=N)
    before = Partition.of(*without(inputs, labels, 5), 4, places=N)
    inputs[5, 0] = torch.nan
    after = Partition.of(inputs, labels, 4, places=N)
    moved = [a.numel() != b.numel() for a, b in zip(_rows(before), _rows(after), strict=True)]
    assert sum(moved) == 1


def _rows(partition):
    return [members[members >= 0] for members in partition.members]


# ---------------------------------------------------------------- sizes


def sizes(members):
    return (members >= 0).sum(dim=1).numpy()


def are_multinomial(counts):
    """A two-sided chi-square test of equal chances and independence."""
    expected = counts.sum() / len(counts)
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    return 2 * min(stats.chi2.cdf(statistic, freedom), stats.chi2.sf(statistic, freedom)) > ALPHA


@pytest.mark.parametrize("key", [0, 1, 12345])
def test_sizes_are_those_of_balls_thrown_into_bins(key):
    inputs, labels = records(20_000)
    counts = sizes(Partition.of(inputs, labels, 100, places=400, key=key).members)
    assert are_multinomial(counts)
    # Power: shards of equal sizes, and chances that differ by 30 %, are found.
    assert not are_multinomial(np.full(100, 200))
    assert not are_multinomial(counts * np.resize([0.85, 1.15], 100))


def test_another_key_is_an_independent_partition():
    inputs, labels = records(5000)
    homes = []
    for key in (0, 1):
        members = Partition.of(inputs, labels, 10, places=5000, key=key).members
        homes.append(torch.empty(5000, dtype=torch.int64))
        for teacher, rows in enumerate(members):
            homes[-1][rows[rows >= 0]] = teacher
    table = np.bincount(homes[0] * 10 + homes[1], minlength=100)
    assert are_multinomial(table)
    assert not are_multinomial(np.bincount(homes[0] * 11, minlength=100))


@pytest.mark.parametrize(("n", "teachers"), [(1, 1), (60, 60), (1437, 25), (60_000, 250), (60_000, 5000)])
def test_default_places_are_hardly_ever_exceeded(n, teachers):
    places = default_places(n, teachers)
    assert stats.binom.sf(places, n, 1 / teachers) < 1e-8
    assert places <= n / teachers + 6 * (n / teachers) ** 0.5 + 7


def test_no_shard_exceeds_the_default_places():
    inputs, labels = records(5000)
    members = Partition.of(inputs, labels, 50, places=default_places(5000, 50)).members
    assert (members >= 0).sum() == 5000
    assert Partition.of(inputs, labels, 50, places=3).teachers == 50


# ---------------------------------------------------------------- mistakes


def test_more_teachers_than_records_are_refused():
    with pytest.raises(UserError, match="11 teachers need at least as many records, there are 10"):
        default_places(10, 11)


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", None, True])
@pytest.mark.parametrize("name", ["teachers", "places"])
def test_a_number_that_is_none_is_refused(name, count):
    numbers = {"teachers": 2, "places": 2, name: count}
    with pytest.raises(UserError, match=f"'{name}' parameter of a partition"):
        Partition.of(*records(), numbers["teachers"], places=numbers["places"])


def test_labels_that_are_too_few_are_refused():
    inputs, labels = records()
    with pytest.raises((UserError, ValueError)):
        Partition.of(inputs, labels[1:], 2, places=N)
