"""From votes to answers: the noise that is drawn is the noise that is accounted for.

`check_noise` sees the noise from outside: counts of a class of their own write down what is added to them.
Every statistical bound has a false-alarm rate below `ALPHA`, of which a run of all tests makes fewer than 900
comparisons; and seeds are fixed besides.
"""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from accounting import (
    Composed,
    Gaussian,
    GNMax,
    GNMaxThreshold,
    LNMax,
    NonPrivate,
    PrivacyAccountant,
    Repeated,
    UserError,
)
from accounting.events import Event
from dpml.pate.aggregation import AGGREGATORS, Aggregator, aggregator
from dpml.pate.answers import REFUSED, AnswerBook, Desk
from dpml.randomness import Randomness

ALPHA = 1e-13
QUERIES, CLASSES = 1500, 8
CONFIDENT = {"queries": 50, "answers": 20, "threshold": 60.0, "threshold_noise": 15.0}


def noise(seed=0):
    return Randomness.from_seed(seed, "noise")


def make(name="gnmax", scale=4.0, **settings):
    defaults = CONFIDENT if "-" in name else {"queries": 50}
    return aggregator(name, noise_multiplier=scale, **{**defaults, **settings})


class Watched(np.ndarray):
    """Counts that write down by how much every sum or difference differs from them."""

    seen: list

    def __array_finalize__(self, source):
        self.seen = getattr(source, "seen", [])

    def __array_ufunc__(self, function, method, *inputs, **settings):
        plain = [np.asarray(value) if isinstance(value, Watched) else value for value in inputs]
        settings.pop("out", None)
        result = getattr(function, method)(*plain, **settings)
        if function in (np.add, np.subtract) and method == "__call__":
            self.seen.append(np.asarray(result) - np.asarray(self))
        if not isinstance(result, np.ndarray) or result.dtype == bool:
            return result
        result = result.view(Watched)
        result.seen = self.seen
        return result


def watched(counts):
    counts = np.asarray(counts, dtype=np.float64).view(Watched)
    counts.seen = []
    return counts


def drawn(step, counts):
    """What `step` adds to counts."""
    counts = watched(counts)
    step(counts, noise())
    return counts.seen


# ---------------------------------------------------------------- reusable checks


def check_noise(z, law="norm"):
    """Assert that noise over its scale, [queries, numbers], is independent and of the law, two-sided.

    12,000 numbers know a scale to 0.65 %: what is 30 % off is more than 30 standard deviations off.
    """
    assert np.abs(z).mean() > 1e-6, "noise: there is none"
    assert len(np.unique(np.round(z, 12))) > 0.99 * z.size, "noise: the same number is used again"
    assert stats.kstest(z.ravel(), law).pvalue > ALPHA, "noise: its law or scale is not the accounted one"
    uniform = np.clip(getattr(stats, law).cdf(z), 1e-15, 1 - 1e-15)
    z = stats.norm.ppf(uniform)  # so that one set of tests does for both laws
    rows, width = z.shape
    _require_chi2((z**2).sum(), z.size, "noise: its scale is not the accounted one")
    for column in z.T:
        _require_chi2((column**2).sum(), rows, "noise: its scale is not the accounted one for some class")
    assert abs(z.sum()) < stats.norm.isf(ALPHA) * math.sqrt(z.size), "noise: its mean is not zero"
    _require_chi2((z.sum(axis=1) ** 2).sum() / width, rows, "noise: classes are correlated")
    lagged = (z[1:] * z[:-1]).sum() / math.sqrt(z[1:].size)
    assert abs(lagged) < stats.norm.isf(ALPHA), "noise: queries are correlated"
    if width > 1:
        cosines = np.corrcoef(z.T)[np.triu_indices(width, k=1)]
        assert np.abs(cosines).max() < stats.norm.isf(ALPHA / 100) / math.sqrt(rows), (
            "noise: classes are correlated"
        )


def _require_chi2(value, freedom, what):
    assert 2 * min(stats.chi2.cdf(value, freedom), stats.chi2.sf(value, freedom)) > ALPHA / 10, what


def check_answer_noise(by):
    """Assert that every count of every query gets noise of the event's scale, before the maximum."""
    counts = np.random.default_rng(0).integers(0, 250, size=(QUERIES, CLASSES))
    added = drawn(by.choose, counts)
    assert len(added) == 1, "noise: counts are not noised once, before the maximum"
    assert added[0].shape == counts.shape, "noise: not every count has its own"
    event = by.answer_event
    scale, law = (event.sigma, "norm") if isinstance(event, GNMax) else (event.scale, "laplace")
    check_noise(added[0] / scale, law)


def check_threshold_noise(by):
    """Assert that every query's largest count gets noise of its own, of the event's scale."""
    counts = np.random.default_rng(0).integers(0, 250, size=(8 * QUERIES, CLASSES))
    added = drawn(by.check, counts)
    assert len(added) == 1, "noise: the check has none"
    assert added[0].shape == (8 * QUERIES,), "noise: not every query has its own"
    check_noise(added[0][:, None] / by.check_event.sigma)


def check_trade_off(by, queries=20_000, confidence=1e-6, share=0.5):
    """Assert that answers tell two neighbouring histograms apart no better than the event says.

    One of three votes moves from class 0 to class 1. Between two classes under Gaussian noise, saying which
    has won is the best attack at ε = 0 on the noisy counts too. Its two chances are bounded by Clopper &
    Pearson, each at 10^-6: together they would have to be 6.7 standard deviations off for a false alarm. It
    must reach `share` of what is accounted, or the check could see nothing.
    """
    answers = [
        by.choose(np.tile([2.0 - moved, 1.0 + moved], (queries, 1)), noise(seed))
        for seed, moved in enumerate((0, 1))
    ]
    wrongly, rightly = (int((answer == 1).sum()) for answer in answers)
    least = stats.beta.ppf(confidence, rightly, queries - rightly + 1)
    most = stats.beta.isf(confidence, wrongly + 1, queries - wrongly)
    for epsilon in (0.0, 0.3, 1.0):
        accounted = delta_of(by.answer_event, epsilon)
        assert least - math.exp(epsilon) * most <= accounted, (
            f"trade-off: an attack has δ = {least - math.exp(epsilon) * most:.4f} at ε = {epsilon}, "
            f"{accounted:.4f} is accounted"
        )
    assert least - most >= share * delta_of(by.answer_event, 0.0), "trade-off: the attack has no power"


def delta_of(event: Event, epsilon: float) -> float:
    accountant = PrivacyAccountant()
    accountant.record(event)
    return accountant.delta(epsilon)


def check_plan(by):
    """Assert that the plan charges every query's check and every answer."""
    accounted = {}
    for event in by.plan.events if isinstance(by.plan, Composed) else [by.plan]:
        step, count = (event.event, event.count) if isinstance(event, Repeated) else (event, 1)
        accounted[step] = accounted.get(step, 0) + count
    assert accounted.get(by.answer_event) == by.answers, "plan: answers are not charged"
    if by.check_event is not None:
        assert accounted.get(by.check_event) == by.queries, "plan: checks are not charged"


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("scale", [0.5, 40.0, 1e6])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_count_gets_noise_of_its_own_of_the_accounted_scale(name, scale):
    check_answer_noise(make(name, scale))


@pytest.mark.parametrize("name", ["confident-gnmax", "interactive-gnmax"])
def test_every_check_gets_noise_of_its_own_of_the_accounted_scale(name):
    check_threshold_noise(make(name, threshold_noise=150.0))
    check_threshold_noise(make(name, threshold_noise=0.1))


@pytest.mark.parametrize("law", ["norm", "laplace"])
@pytest.mark.parametrize("factor", [0.7, 0.9, 1.1, 1.3])
def test_noise_of_another_scale_is_found(law, factor):
    stream = noise(5)
    z = (stream.normals if law == "norm" else stream.laplaces)(QUERIES * CLASSES).reshape(QUERIES, CLASSES)
    check_noise(z, law)
    with pytest.raises(AssertionError, match=r"^noise: its"):
        check_noise(factor * z, law)


def test_noise_of_another_law_or_correlated_noise_is_found():
    z = noise(6).normals(QUERIES * CLASSES).reshape(QUERIES, CLASSES)
    for wrong in (
        noise(6).laplaces(z.size).reshape(z.shape) / math.sqrt(2),
        np.repeat(z[:, :1], CLASSES, axis=1),
        np.repeat(z[:1], QUERIES, axis=0),
        np.sqrt(0.7) * z + np.sqrt(0.3) * z[:, :1],
        np.sqrt(0.7) * z + np.sqrt(0.3) * np.roll(z, 1, axis=0),
        z + 0.1,
        np.where(np.arange(CLASSES) == 3, 0.7 * z, z),
    ):
        with pytest.raises(AssertionError, match=r"^noise: "):
            check_noise(wrong)


def test_an_answer_and_its_check_have_different_noise():
    by, stream = make("confident-gnmax"), noise()
    counts = [watched(np.zeros((QUERIES, CLASSES))) for _ in range(3)]
    by.check(counts[0], stream)
    by.choose(counts[1], stream)
    by.choose(counts[2], stream)
    numbers = np.concatenate([np.ravel(c.seen[0]) / s for c, s in zip(counts, (15.0, 4.0, 4.0), strict=True)])
    assert len(np.unique(np.round(numbers, 9))) == numbers.size


def test_nothing_is_drawn_for_no_queries():
    by = make("confident-gnmax")
    assert by.check(np.zeros((0, 3)), noise()).shape == (0,)
    assert by.choose(np.zeros((0, 3)), noise()).shape == (0,)


# ---------------------------------------------------------------- what the noise costs


@pytest.mark.parametrize("scale", [0.8, 1.5, 4.0])
def test_no_attack_beats_the_accounted_trade_off_and_the_best_one_comes_near(scale):
    check_trade_off(make("gnmax", scale))


def test_the_attack_is_within_the_accounted_trade_off_of_lnmax():
    check_trade_off(make("lnmax", 2.0), share=0.4)


@pytest.mark.parametrize("scale", [0.8, 4.0, 40.0])
def test_a_vote_moves_two_counts(scale):
    """√2 of L2 sensitivity for an answer, one for a check, two of L1 sensitivity for Laplace's answer."""
    for epsilon in (0.0, 0.1, 1.0):
        for event, same in (
            (make("gnmax", scale).answer_event, Gaussian(scale / math.sqrt(2))),
            (make("confident-gnmax", threshold_noise=scale).check_event, Gaussian(scale)),
        ):
            assert delta_of(event, epsilon) == pytest.approx(delta_of(same, epsilon), rel=1e-9)
    accountant = PrivacyAccountant()
    accountant.record(make("lnmax", scale).answer_event)
    assert accountant.epsilon(1e-12) == pytest.approx(2 / scale, rel=1e-3)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_plan_charges_every_answer_and_every_check(name):
    by = make(name)
    check_plan(by)
    assert by.plan == {
        "gnmax": Repeated(GNMax(4.0), 50),
        "lnmax": Repeated(LNMax(4.0), 50),
    }.get(name, Composed([Repeated(GNMaxThreshold(15.0), 50), Repeated(GNMax(4.0), 20)]))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_without_noise_the_plan_is_not_private(name):
    by = make(name, None)
    assert by.plan == NonPrivate()
    assert by.check_event is None
    assert by.answers == by.queries == 50


# ---------------------------------------------------------------- answers


def chances(votes, scale, law):
    """How likely each class is to have most votes after noise, by numerical integration."""
    law = getattr(stats, law)

    def wins(chosen):
        def at(x):
            others = [law.cdf((x - v) / scale) for k, v in enumerate(votes) if k != chosen]
            return law.pdf((x - votes[chosen]) / scale) / scale * math.prod(others)

        low, high = min(votes) - 40 * scale, max(votes) + 40 * scale
        return integrate.quad(at, low, high, points=sorted(set(votes)), limit=500)[0]

    return np.array([wins(chosen) for chosen in range(len(votes))])


def are_chances(found, expected):
    """A two-sided exact test of each class's number."""
    low = stats.binom.cdf(found, found.sum(), expected)
    high = stats.binom.sf(found - 1, found.sum(), expected)
    return 2 * len(found) * np.minimum(low, high).min() > ALPHA


@pytest.mark.parametrize("votes", [[9.0, 7.0, 2.0, 0.0], [5.0, 5.0, 5.0], [0.0, 12.0]])
@pytest.mark.parametrize(("name", "law"), [("gnmax", "norm"), ("lnmax", "laplace")])
def test_answers_have_their_exact_chances(name, law, votes):
    answers = make(name, 4.0).choose(np.tile(votes, (30_000, 1)), noise(1))
    found = np.bincount(answers, minlength=len(votes))
    expected = chances(votes, 4.0, law)
    assert expected.sum() == pytest.approx(1, abs=1e-6)
    assert are_chances(found, expected)
    if len(set(votes)) > 1:  # power
        assert not are_chances(found, chances(votes, 4.0 * 0.7, law))
        assert not are_chances(found, chances(votes, 4.0 * 1.3, law))


@pytest.mark.parametrize("largest", [40.0, 60.0, 70.0])
def test_checks_pass_with_their_exact_chances(largest):
    counts = np.tile([3.0, largest, largest - 1], (20_000, 1))
    passed = int(make("confident-gnmax").check(counts, noise(2)).sum())
    found = np.array([passed, 20_000 - passed])
    expected = stats.norm.cdf((largest - 60) / 15)
    assert are_chances(found, np.array([expected, 1 - expected]))
    assert not are_chances(found, np.array([expected - 0.05, 1.05 - expected]))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_without_noise_the_plurality_wins_and_the_first_of_equals(name):
    counts = np.array([[1.0, 5, 2], [4, 4, 0], [0, 3, 3], [0, 0, 9]])
    assert make(name, None).choose(counts, noise()).tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_clear_vote_is_answered_as_the_teachers_say(name):
    counts = np.where(np.eye(5) > 0, 1e6, 0.0)
    assert make(name).choose(counts, noise()).tolist() == list(range(5))


def ask(by, votes, predictions=None):
    import torch

    tensors = [None if counts is None else torch.tensor(counts) for counts in (votes, predictions)]
    desk = Desk(by, AnswerBook(":memory:", by), noise())
    return desk.ask([bytes([row]) for row in range(len(votes))], *tensors).tolist()


def test_the_interactive_check_is_on_what_votes_exceed_predictions_by():
    by = make("interactive-gnmax", 0.01, threshold=30.0, threshold_noise=0.01)
    votes = [[90, 10, 0], [90, 10, 0], [90, 10, 0], [50, 50, 0], [90, 10, 0]]
    predictions = [[90, 10, 0], [70, 20, 10], [40, 50, 10], [100, 0, 0], [0, 0, 100]]
    # The answer is the class of most votes, not that of the largest difference.
    assert ask(by, votes, predictions)[:3] == [REFUSED, REFUSED, 0]
    assert ask(by, votes, predictions)[3] in (0, 1)
    assert ask(by, votes, predictions)[4] == 0


def test_the_confident_check_is_on_votes():
    by = make("confident-gnmax", 0.01, threshold=60.0, threshold_noise=0.01)
    assert ask(by, [[90, 10, 0], [40, 50, 10], [0, 39, 61]]) == [0, REFUSED, 2]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 0}, "'queries' parameter of an aggregator"),
        ({"queries": 2.5}, "'queries' parameter of an aggregator"),
        ({"name": "confident-gnmax", "answers": 0}, "'answers' parameter of an aggregator"),
        ({"name": "confident-gnmax", "answers": 51}, r"cannot be more answers than queries. Got 51 > 50"),
        ({"name": "confident-gnmax", "threshold": None}, "both a threshold and its noise"),
        ({"name": "interactive-gnmax", "threshold_noise": None}, "interactive-gnmax needs a threshold_noise"),
        ({"name": "confident-gnmax", "threshold": math.nan}, "'threshold' parameter of an aggregator"),
        ({"name": "confident-gnmax", "threshold_noise": 0}, "'sigma' parameter of GNMaxThreshold"),
        ({"name": "gnmax", "scale": -1.0}, "'sigma' parameter of GNMax"),
        ({"name": "gnmax", "scale": 0}, "'sigma' parameter of GNMax"),
        ({"name": "lnmax", "scale": math.inf}, "'scale' parameter of LNMax"),
        ({"name": "majority-"}, "The aggregator must be one of gnmax, confident-gnmax"),
    ],
)
def test_a_mistake_is_refused(settings, message):
    with pytest.raises(UserError, match=message) as refused:
        make(**settings)
    assert "\n" not in str(refused.value)


def test_an_aggregator_without_a_check_answers_every_query_and_checks_none():
    with pytest.raises(UserError, match="answers and queries must be equal"):
        Aggregator(answer_event=GNMax(1.0), queries=5, answers=4)
    with pytest.raises(UserError, match="both a threshold and its noise"):
        Aggregator(answer_event=GNMax(1.0), threshold=3.0, queries=5, answers=5)
    with pytest.raises(UserError, match="has no check"):
        make("gnmax").check(np.zeros((1, 3)), noise())


def test_descriptions_tell_mechanisms_apart():
    others = [
        make(),
        make(scale=4.5),
        make("lnmax"),
        make("confident-gnmax"),
        make(queries=51),
        make(scale=None),
    ]
    others += [make("confident-gnmax", **{name: CONFIDENT[name] + 1}) for name in CONFIDENT]
    texts = {str(sorted(by.to_dict().items(), key=str)) for by in others}
    assert len(texts) == len(others)
    assert make().to_dict() == make().to_dict()
