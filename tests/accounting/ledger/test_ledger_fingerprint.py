"""Fingerprints: what they recognise, what they do not, and that they say nothing without the key."""

import stat

import numpy as np
import pytest

from accounting import PrivacyBudget, UserError
from accounting.ledger import Ledger
from accounting.ledger.fingerprint import SIZE, key_path, likeness, read_key, seal, sketch, unseal

KEY, OTHER_KEY = b"k" * 32, b"o" * 32


def records(first: int, last: int) -> list[bytes]:
    return [number.to_bytes(4, "big") for number in range(first, last)]


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [
        ((0, 20_000), (0, 20_000), 1, 1),
        ((0, 20_000), (0, 1_000), 1, 1),  # a part of it
        ((0, 20_000), (10_000, 30_000), 0.4, 0.6),
        ((0, 20_000), (18_000, 38_000), 0.05, 0.15),
        ((0, 20_000), (20_000, 40_000), 0, 0),
        ((0, 300), (0, 300), 1, 1),
        ((0, 300), (150, 450), 0.5, 0.5),
        ((0, 10), (0, 10), 0, 0),  # too few to say
        ((0, 0), (0, 20_000), 0, 0),
    ],
)
def test_likeness_is_the_share_of_the_smaller_one(one, other, low, high) -> None:
    sketches = [sketch(records(*part), KEY) for part in (one, other)]
    assert low <= likeness(*sketches) <= high
    assert likeness(*sketches) == likeness(*reversed(sketches))


def test_order_and_repetition_do_not_matter() -> None:
    some = records(0, 5_000)
    mixed = [some[i] for i in np.random.default_rng(0).permutation(5_000)] + some[:100]
    assert (sketch(some, KEY) == sketch(mixed, KEY)).all()


def test_without_the_key_it_says_nothing() -> None:
    few, many = sketch(records(0, 5), KEY), sketch(records(0, 50_000), KEY)
    assert len(seal(few, KEY)) == len(seal(many, KEY))
    assert seal(many, KEY) != seal(many, KEY)
    assert (unseal(seal(many, KEY), KEY) == many).all()
    assert (unseal(seal(few, KEY), KEY) == few).all()
    assert likeness(unseal(seal(many, KEY), OTHER_KEY), many) == 0
    assert likeness(sketch(records(0, 50_000), OTHER_KEY), many) == 0
    # Sealed, its bits are fair coins, though its numbers are small and in order: within six deviations.
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(seal(many, KEY)), np.uint8))
    assert abs(bits.mean() - 0.5) < 6 * 0.5 / len(bits) ** 0.5
    assert len(many) == SIZE


def test_the_ledger_names_what_looks_alike(ledger: Ledger) -> None:
    ledger.declare("copy", PrivacyBudget(1, 1e-5))
    ledger.declare("unlike", PrivacyBudget(1, 1e-5))
    patients = ledger.accountant("patients")
    assert patients.look_alikes(records(0, 4_000)) == []
    assert patients.look_alikes(records(0, 4_000)) == []  # its own name is no other
    assert [entry.kind for entry in ledger.entries()].count("fingerprint") == 1
    assert ledger.accountant("copy").look_alikes(records(1_000, 3_000)) == ["patients"]
    assert ledger.accountant("unlike").look_alikes(records(4_000, 8_000)) == []
    assert ledger.look_alikes() == {"patients": ["copy"], "copy": ["patients"]}
    assert ledger.data_set("patients").rule == "none"
    ledger.verify()


def test_the_key(ledger: Ledger) -> None:
    path = key_path(ledger.path)
    assert ledger.look_alikes() == {}
    key = read_key(ledger.path)
    assert key == read_key(ledger.path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(p.name for p in path.parent.iterdir()) == ["ledger.sqlite", "ledger.sqlite.key"]
    path.unlink()
    ledger.path.chmod(0o660)  # a ledger of its group
    assert read_key(ledger.path) != key
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.write_bytes(b"")
    with pytest.raises(UserError, match="holds no key"):
        ledger.accountant("patients").look_alikes(records(0, 100))
