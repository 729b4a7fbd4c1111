"""Published recipes: complete, with a card, and what the papers say as far as fields express it."""

import pytest

from dpml.pate.planning import plan_run
from dpml.registry import recipe_card, recipe_entries, recipe_run
from recipes.published import abadi2016_mnist, de2022_cifar10, pate2017_mnist, pate2018_mnist


@pytest.mark.parametrize("name", ["abadi2016-mnist", "de2022-cifar10", "pate2017-mnist", "pate2018-mnist"])
def test_they_are_registered_with_a_card_and_a_twin(name: str) -> None:
    entry = recipe_entries()[name]
    card = recipe_card(entry.load())
    assert card is not None
    assert "published" in card.reaches
    private, twin = recipe_run(entry, private=True), recipe_run(entry, private=False)
    assert (private.non_private, twin.non_private) == (False, True)
    assert private.delta == 1e-5
    assert private.dataset == twin.dataset == name.split("-")[1]


def test_they_suit_an_epsilon_where_they_take_one() -> None:
    for recipe, own in ((abadi2016_mnist, 2.0), (de2022_cifar10, 8.0)):
        assert recipe().epsilon == own
        assert recipe(epsilon=1.0).epsilon == 1.0
        assert recipe(False, epsilon=1.0).epsilon is None


def test_the_papers_settings() -> None:
    image = de2022_cifar10()
    assert (image.model, image.batch_size, image.views, image.average) == ("wrn-16-4", 4096, 16, 0.9999)
    first, second = plan_run(pate2017_mnist(), 9000).aggregator, plan_run(pate2018_mnist(), 9000).aggregator
    assert (first.queries, second.queries, second.threshold) == (100, 1000, 200.0)
    assert second.check_event is not None
    assert second.check_event.sigma == 150.0
