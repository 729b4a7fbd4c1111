"""One of several events, charged as the worst of them."""

from __future__ import annotations

import numpy as np
import pytest

from accounting import (
    BestOfRuns,
    Event,
    Gaussian,
    NonPrivate,
    OneOf,
    PoissonSampled,
    PrivacyAccountant,
    Repeated,
    UnsupportedEvent,
    UserError,
)
from accounting.atoms import Atom
from accounting.events import atoms
from accounting.rdp import rdp

TRAINING = Repeated(PoissonSampled(Gaussian(1.0), 0.05), 50)  # worse than the count at large orders only
COUNT = Gaussian(1.2)
ORDERS = np.array([1.5, 4.0, 16.0, 64.0])


def epsilon(event: Event) -> float:
    accountant = PrivacyAccountant("rdp")
    accountant.record(event)
    return accountant.epsilon(1e-5)


def test_it_is_the_worst_at_each_order() -> None:
    each = np.array([rdp(atoms(event), ORDERS) for event in (TRAINING, COUNT)])
    assert len(set(each.argmax(axis=0))) == 2  # neither is the worst throughout
    assert np.array_equal(rdp(atoms(OneOf([TRAINING, COUNT])), ORDERS), each.max(axis=0))


def test_a_random_member_costs_no_more_than_the_worst() -> None:
    """Gaussians: (i, x + σᵢz) with a uniform i, by its exact divergence α(α−1)/2σ² in the exponent."""
    sigmas = np.array([1.0, 2.0, 5.0])
    exponents = np.outer(ORDERS * (ORDERS - 1) / 2, sigmas**-2)
    mixed = (np.logaddexp.reduce(exponents, axis=1) - np.log(3)) / (ORDERS - 1)
    bound = rdp(atoms(OneOf(map(Gaussian, sigmas))), ORDERS)
    assert np.all(mixed <= bound)
    assert np.all(mixed >= bound - np.log(3) / (ORDERS - 1) - 1e-9)


def test_it_is_never_below_a_member_and_never_above_all() -> None:
    together = epsilon(Repeated(OneOf([TRAINING, COUNT]), 2))
    for member in (TRAINING, COUNT):
        assert together >= epsilon(Repeated(member, 2))
    assert together < epsilon(TRAINING) + 2 * epsilon(COUNT) + epsilon(TRAINING)
    assert epsilon(BestOfRuns(OneOf([TRAINING, COUNT]), 10)) >= epsilon(BestOfRuns(COUNT, 10))


def test_equal_members_are_one_and_keep_its_privacy_loss_distribution() -> None:
    assert atoms(OneOf([TRAINING, TRAINING])) == atoms(TRAINING)
    tight = PrivacyAccountant()
    tight.record(OneOf([TRAINING]))
    assert tight.epsilon(1e-5) < epsilon(TRAINING)
    different = PrivacyAccountant()
    different.record(OneOf([TRAINING, COUNT]))
    with pytest.raises(UnsupportedEvent, match="One of 2 mechanisms"):
        different.epsilon(1e-5)


def test_no_protection_in_one_member_is_none_at_all() -> None:
    assert atoms(OneOf([Gaussian(9.0), NonPrivate()])) == {Atom.NON_PRIVATE: 1}


@pytest.mark.parametrize("wrong", [[], None, [1.0], 3])
def test_a_mistake_gets_one_line(wrong: object) -> None:
    with pytest.raises(UserError, match="OneOf"):
        OneOf(wrong)  # type: ignore[arg-type]
