"""Each planted fault is found by the check that says so; and the honest code passes that check.

The checks are those of the tests beside this one. Faults are planted in the real code, one at a time, and
each is one that somebody could well make. A check that missed one would have a hole.
"""

import numpy as np
import pytest
import test_aggregation
import test_answers
import test_partition
import test_teachers
import torch
from test_answers import folder  # noqa: F401 - a fixture

from accounting import Gaussian, GNMax, Repeated
from dpml.pate import partition, teachers
from dpml.pate.aggregation import Aggregator
from dpml.pate.answers import AnswerBook, Desk
from dpml.pate.partition import Partition

Patch = pytest.MonkeyPatch

# ---------------------------------------------------------------- checks


def noise_of_answers(_):
    test_aggregation.check_answer_noise(test_aggregation.make("gnmax"))


def noise_of_laplace_answers(_):
    test_aggregation.check_answer_noise(test_aggregation.make("lnmax"))


def noise_of_checks(_):
    test_aggregation.check_threshold_noise(test_aggregation.make("confident-gnmax"))


def trade_off(_):
    test_aggregation.check_trade_off(test_aggregation.make("gnmax", 1.0))


def plan(_):
    test_aggregation.check_plan(test_aggregation.make("confident-gnmax"))


def shards(_):
    test_partition.check_partition(*test_partition.records(), 4, places=30)


def overflowing(_):
    test_partition.check_partition(*test_partition.records(), 4, places=6)


def linear(_):
    test_teachers.check_teachers("values", rows=(0, 17))


def convolutional(_):
    test_teachers.check_teachers("convolutional", rows=(0, 17))


def portable(_):
    test_teachers.check_teachers("portable", rows=(0, 17))


def desk(folder):  # noqa: F811
    test_answers.check_desk(folder)


# ---------------------------------------------------------------- planted faults: noise


def _noise_left_out(patch: Patch) -> None:
    patch.setattr(Aggregator, "choose", lambda _, counts, *__: counts.argmax(axis=1))


def _noise_after_the_maximum(patch: Patch) -> None:
    def choose(self, counts, randomness):
        largest = counts.max(axis=1) + self.answer_event.sigma * randomness.normals(len(counts))
        return np.where(largest > -1e9, counts.argmax(axis=1), 0)

    patch.setattr(Aggregator, "choose", choose)


def _noisy(draw):
    def plant(patch: Patch) -> None:
        def choose(self, counts, randomness):
            return (counts + draw(self, counts, randomness)).argmax(axis=1)

        patch.setattr(Aggregator, "choose", choose)

    return plant


_one_number_for_all_classes = _noisy(
    lambda self, counts, randomness: np.broadcast_to(
        self.answer_event.sigma * randomness.normals(len(counts))[:, None], counts.shape
    )
)
_one_number_for_all_queries = _noisy(
    lambda self, counts, randomness: np.broadcast_to(
        self.answer_event.sigma * randomness.normals(counts.shape[1]), counts.shape
    )
)
_noise_of_half_the_scale = _noisy(
    lambda self, counts, randomness: (
        self.answer_event.sigma / 2 * randomness.normals(counts.size).reshape(counts.shape)
    )
)
_noise_for_the_accounted_gaussian = _noisy(
    lambda self, counts, randomness: (
        self.answer_event.sigma / np.sqrt(2) * randomness.normals(counts.size).reshape(counts.shape)
    )
)
_gaussian_noise_for_laplace = _noisy(
    lambda self, counts, randomness: (
        self.answer_event.scale * randomness.normals(counts.size).reshape(counts.shape)
    )
)


def _check_without_noise(patch: Patch) -> None:
    check = lambda self, counts, *_: counts.max(axis=1) >= self.threshold  # noqa: E731
    patch.setattr(Aggregator, "check", check)


def _check_with_noise_on_the_threshold_of_all(patch: Patch) -> None:
    def check(self, counts, randomness):
        return counts.max(axis=1) - self.check_event.sigma * randomness.normals(1) >= self.threshold

    patch.setattr(Aggregator, "check", check)


# ---------------------------------------------------------------- planted faults: what is charged


def _sensitivity_of_one(patch: Patch) -> None:
    """As if a vote moved one count: GNMax(σ) as Gaussian(σ)."""
    patch.setattr(GNMax, "atoms", lambda self, relation: Gaussian(self.sigma).atoms(relation))


def _checks_not_in_the_plan(patch: Patch) -> None:
    patch.setattr(Aggregator, "plan", property(lambda self: Repeated(self.answer_event, self.answers)))


def _checks_of_answers_only_in_the_plan(patch: Patch) -> None:
    honest = Aggregator.plan.fget

    def few(self):
        checks, answers = honest(self).events
        return type(honest(self))([Repeated(checks.event, answers.count), answers])

    patch.setattr(Aggregator, "plan", property(few))


def _checks_not_reported(patch: Patch) -> None:
    honest = Desk._commit

    def commit(self, keys, event):
        if event != self.aggregator.check_event:
            honest(self, keys, event)

    patch.setattr(Desk, "_commit", commit)


def _refused_queries_not_charged(patch: Patch) -> None:
    """Only queries that passed their check count against the plan, and in the event."""

    def spent(self):
        count = "SELECT COUNT(CASE WHEN state != 'refused' THEN 1 END), COUNT(class) FROM queries"
        return self._base.execute(count).fetchone()

    patch.setattr(AnswerBook, "spent", spent)


def _refused_queries_asked_again(patch: Patch) -> None:
    honest = AnswerBook.persist_checks

    def persist(self, keys, passed):
        honest(self, keys, passed)
        self._base.execute("DELETE FROM queries WHERE state = 'refused'")

    patch.setattr(AnswerBook, "persist_checks", persist)


def _a_plan_without_an_end(patch: Patch) -> None:
    def commit(self, keys, before, after):
        states = zip(keys, self.states(keys), strict=True)
        admitted = [key for key, state in states if (state and state[0]) == before]
        with self._transaction():
            put = "INSERT OR REPLACE INTO queries VALUES (?, ?, NULL)"
            self._base.executemany(put, [(key, after) for key in admitted])
        return admitted

    patch.setattr(AnswerBook, "_commit", commit)
    patch.setattr(Desk, "_commit", lambda *_: None)


# ---------------------------------------------------------------- planted faults: order and repetition


def _ask(order):
    """A desk that goes about answering in another order."""

    def plant(patch: Patch) -> None:
        def ask(self, keys, votes, predictions=None):  # noqa: ARG001
            counts, shown = votes.numpy(), np.full(len(keys), -3)
            asked = self.book.commit_checks(keys)
            self._commit(asked, self.aggregator.check_event)
            rows = [keys.index(key) for key in asked]
            self.book.persist_checks(asked, self.aggregator.check(counts[rows], self.randomness))
            order(self, keys, counts, shown)
            return shown

        patch.setattr(Desk, "ask", ask)

    return plant


def _drawn_before_the_commit(self, keys, counts, shown):
    passed = [row for row, state in enumerate(self.book.states(keys)) if state and state[0] == "passed"]
    shown[passed] = self.aggregator.choose(counts[passed], self.randomness)
    due = self.book.commit_answers(keys)
    self._commit(due, self.aggregator.answer_event)
    self.book.persist_answers(due, shown[[keys.index(key) for key in due]])


def _shown_and_not_written_down(self, keys, counts, shown):
    due = self.book.commit_answers(keys)
    self._commit(due, self.aggregator.answer_event)
    rows = [keys.index(key) for key in due]
    shown[rows] = self.aggregator.choose(counts[rows], self.randomness)


def _drawn_twice(self, keys, counts, shown):
    due = self.book.commit_answers(keys)
    self._commit(due, self.aggregator.answer_event)
    rows = [keys.index(key) for key in due]
    self.book.persist_answers(due, self.aggregator.choose(counts[rows], self.randomness))
    shown[rows] = self.aggregator.choose(counts[rows], self.randomness)


def _answers_drawn_again_when_asked_again(patch: Patch) -> None:
    """A replay that is none: what is answered is taken for due."""
    honest = AnswerBook.commit_answers

    def commit(self, keys):
        done = [
            key
            for key, state in zip(keys, self.states(keys), strict=True)
            if state and state[0] == "answered"
        ]
        return honest(self, keys) + done

    patch.setattr(AnswerBook, "commit_answers", commit)
    patch.setattr(Desk, "_commit", lambda *_: None)


# ---------------------------------------------------------------- planted faults: partition


def _by_position(patch: Patch) -> None:
    def of(cls, inputs, labels, teachers, *, places, key=0):  # noqa: ARG001
        members = torch.full((teachers, places), -1, dtype=torch.int64)
        for row in range(min(len(inputs), teachers * places)):
            members[row % teachers, row // teachers] = row
        return cls(members)

    patch.setattr(Partition, "of", classmethod(of))


def _in_two_shards(patch: Patch) -> None:
    honest = Partition.of.__func__

    def of(cls, inputs, labels, teachers, *, places, key=0):
        members = honest(cls, inputs, labels, teachers, places=places, key=key).members
        members[1, -1] = members[0, 0]
        return cls(members)

    patch.setattr(Partition, "of", classmethod(of))


def _in_the_order_of_a_common_shuffle(patch: Patch) -> None:
    """Balanced shards of shuffled rows: a shuffle of one row less is another one."""

    def of(cls, inputs, labels, teachers, *, places, key=0):  # noqa: ARG001
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(key))
        members = torch.full((teachers, places), -1, dtype=torch.int64)
        for position, row in enumerate(order.tolist()):
            members[position % teachers, position // teachers] = row
        return cls(members)

    patch.setattr(Partition, "of", classmethod(of))


def _by_hashes_of_row_and_record(patch: Patch) -> None:
    honest = partition.record_digests

    def digests(inputs, labels, key):
        return honest(inputs, labels + 100 * torch.arange(len(labels)), key)

    patch.setattr(partition, "record_digests", digests)


def _overflow_goes_to_the_next_shard(patch: Patch) -> None:
    honest = Partition.of.__func__

    def of(cls, inputs, labels, teachers, *, places, key=0):
        members = honest(cls, inputs, labels, teachers, places=len(inputs), key=key).members
        lost, members = members[:, places:][members[:, places:] >= 0], members[:, :places]
        free = (members < 0).nonzero()
        for (teacher, place), row in zip(free.tolist(), lost.tolist(), strict=False):
            members[teacher, place] = row
        return cls(members)

    patch.setattr(Partition, "of", classmethod(of))


# ---------------------------------------------------------------- planted faults: teachers


def _centred_by_the_mean_of_all(patch: Patch) -> None:
    honest = teachers._solve_ridge

    def solve(x, y, present, ridge):
        mean = (x * present).sum(dim=(0, 1)) / present.sum()
        return honest((x - mean) * present, y, present, ridge)

    patch.setattr(teachers, "_solve_ridge", solve)


def _scaled_by_the_spread_of_all(patch: Patch) -> None:
    honest = teachers._solve_ridge
    patch.setattr(
        teachers, "_solve_ridge", lambda x, y, present, ridge: honest(x, y, present, ridge * x.std())
    )


def _normalised_over_all_networks(patch: Patch) -> None:
    honest = teachers._networks
    patch.setattr(teachers, "_networks", lambda group, x: honest(group, (x - x.mean()) / x.std()))


def _gradients_clipped_together(patch: Patch) -> None:
    step = torch.optim.SGD.step

    def clipped(self, closure=None):
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1e-3)
        return step(self, closure)

    patch.setattr(torch.optim.SGD, "step", clipped)


def _loss_of_all_records_together(patch: Patch) -> None:
    """As many random numbers as there are records: one less, and all batches are others."""
    honest = teachers.train_convolutional

    def train(inputs, labels, classes, shards, **settings):
        return honest(inputs, labels, classes, shards, **{**settings, "seed": settings["seed"] + len(inputs)})

    patch.setattr(test_teachers, "train_convolutional", train)


FAULTS = [
    ("noise left out", _noise_left_out, noise_of_answers, "noise: counts are not noised"),
    ("noise after the maximum", _noise_after_the_maximum, noise_of_answers, "noise: "),
    ("one number for all classes", _one_number_for_all_classes, noise_of_answers, "noise: "),
    ("one number for all queries", _one_number_for_all_queries, noise_of_answers, "noise: "),
    ("noise of half the scale", _noise_of_half_the_scale, noise_of_answers, "noise: its law or scale"),
    ("noise for sensitivity one", _noise_for_the_accounted_gaussian, noise_of_answers, "noise: its law"),
    (
        "noise for sensitivity one, attacked",
        _noise_for_the_accounted_gaussian,
        trade_off,
        "trade-off: an attack",
    ),
    ("noise left out, attacked", _noise_left_out, trade_off, "trade-off: an attack"),
    (
        "Gaussian for Laplace",
        _gaussian_noise_for_laplace,
        noise_of_laplace_answers,
        "noise: its law or scale",
    ),
    ("a check without noise", _check_without_noise, noise_of_checks, "noise: the check has none"),
    ("one number for all checks", _check_with_noise_on_the_threshold_of_all, noise_of_checks, "noise: "),
    ("sensitivity one for two counts", _sensitivity_of_one, trade_off, "trade-off: an attack"),
    ("checks not in the plan", _checks_not_in_the_plan, plan, "plan: checks are not charged"),
    ("a check for each answer alone", _checks_of_answers_only_in_the_plan, plan, "plan: checks are not"),
    ("checks not reported", _checks_not_reported, desk, "charge: "),
    ("refused queries not charged", _refused_queries_not_charged, desk, "plan: |charge: "),
    (
        "refused queries asked again",
        _refused_queries_asked_again,
        desk,
        "draws: .* check .* more than once|charge: ",
    ),
    ("a plan without an end", _a_plan_without_an_end, desk, "plan: |charge: "),
    ("drawn before the commit", _ask(_drawn_before_the_commit), desk, "order: noise is drawn"),
    ("shown and not written down", _ask(_shown_and_not_written_down), desk, "shown: .* not in the book"),
    ("drawn twice", _ask(_drawn_twice), desk, "draws: .* answer .* more than once"),
    ("drawn again when asked again", _answers_drawn_again_when_asked_again, desk, "(order|draws|charge): "),
    ("shards by position", _by_position, shards, "partition: without a record"),
    ("a record in two shards", _in_two_shards, shards, "partition: a record is in two"),
    ("shards of a common shuffle", _in_the_order_of_a_common_shuffle, shards, "partition: without a record"),
    ("hashes of the row too", _by_hashes_of_row_and_record, shards, "partition: without a record"),
    ("overflow goes elsewhere", _overflow_goes_to_the_next_shard, overflowing, "partition: without a record"),
    ("linear teachers by position", _by_position, linear, "teachers: a record of"),
    ("centred by the mean of all", _centred_by_the_mean_of_all, linear, "teachers: a record of"),
    ("scaled by the spread of all", _scaled_by_the_spread_of_all, linear, "teachers: a record of"),
    ("networks by position", _by_position, convolutional, "teachers: a record of"),
    ("normalised over all networks", _normalised_over_all_networks, portable, "teachers: a record of"),
    ("gradients clipped together", _gradients_clipped_together, portable, "teachers: a record of"),
    ("batches by the number of records", _loss_of_all_records_together, convolutional, "teachers: a record"),
]
CHECKS = list(dict.fromkeys(check for _, _, check, _ in FAULTS))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_honest_code_passes(check, folder):  # noqa: F811
    check(folder)


@pytest.mark.parametrize(
    ("fault", "check", "message"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS]
)
def test_a_planted_fault_is_caught(fault, check, message, folder, monkeypatch):  # noqa: F811
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=f"^({message})"):
        check(folder)
