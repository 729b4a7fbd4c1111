"""The PATE trainer (Papernot et al. 2017, 2018): plan, reserve, train teachers, ask, train a student."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from accounting import PrivacyAccountant, UserError
from accounting.events import check_instance, shown
from dpml.data import LabeledData, load
from dpml.data.arrays import load_inputs
from dpml.data.batches import check_records
from dpml.device import choose_device
from dpml.ledger import closed, reserved, warn_of_look_alikes
from dpml.outputs import RunFolder
from dpml.pate.answers import REFUSED, AnswerBook, Desk, commit_again, query_keys
from dpml.pate.config import PATEConfig, PATERun
from dpml.pate.ensembles import Voters, obtain_voters, teacher_settings
from dpml.pate.features import Features
from dpml.pate.guesses import choose_queries
from dpml.pate.planning import plan_run
from dpml.pate.publishing import publish
from dpml.pate.report import PATEReport
from dpml.pate.student import Report as Watch
from dpml.pate.student import StudentSettings, train_student
from dpml.planning import accountant_for
from dpml.randomness import Randomness
from dpml.report import TrainingResult
from dpml.resuming import recorded_run
from dpml.tracking import TensorBoard, Tracker

_ROUNDS = 3
_BOOK = "answers.sqlite"


def run_pate(
    run: PATERun,
    *,
    output: str | os.PathLike[str] | None = None,
    trackers: Sequence[Tracker] = (),
    resume: bool = False,
) -> TrainingResult:
    """Train as a complete configuration says: load its data, split off public inputs, and `train_pate`.

    By default, as in the papers, the public inputs are the first part of the test set, without its labels;
    accuracy is measured on the rest.

    Raises:
        UserError: for a mistake in the configuration, the data or the output folder.
        BudgetExceeded, UnreachableBudget: if the budget cannot be met.
    """
    check_instance(run, PATERun, "run", "run_pate")
    data = load(run.dataset, classes=run.classes, image_size=run.size)
    public, test_set = _public_inputs(run, data)
    return train_pate(
        TensorDataset(data.x_train, data.y_train),
        public,
        run,
        classes=data.classes,
        test_set=test_set,
        output=output,
        trackers=trackers,
        name=data.name,
        test_set_is_public=data.is_public_benchmark,
        resume=resume,
    )


def train_pate(
    train_set: Any,
    public: Tensor,
    config: PATEConfig,
    *,
    classes: int | None = None,
    test_set: Any = None,
    features: Features | None = None,
    accountant: PrivacyAccountant | None = None,
    output: str | os.PathLike[str] | None = None,
    trackers: Sequence[Tracker] = (),
    name: str = "the training set",
    test_set_is_public: bool = False,
    resume: bool = False,
) -> TrainingResult:
    """Train teachers on private records, ask them about public inputs under a budget, and train a student.

    Guarantee: the student and all answers, taken together, are (ε, δ)-differentially private with the ε of
    the returned summary, for one record of `train_set` under the relation in it, whatever the votes are.
    The plan is admitted before a teacher is trained, and every query is committed before its noise is drawn.

    Args:
        train_set: The private records: a map-style data set of (input, class) pairs.
        public: Public inputs, float32 [n, ...], formed like the private ones.
        config: How to train.
        classes: Number of classes; by default one more than the largest label.
        test_set: Public records for accuracy; (input, class) pairs.
        features: What linear teachers look at, from inputs [m, ...] to [m, d]; in place of the configured
            features. It must be public, or paid for: see `dpml.pate.features`.
        accountant: One that other releases of these records go through too; its budget then pays for the
            plan. By default a new one, with the configured budget.
        output: A new folder for summary, events, statement, weights, ensemble, answers and TensorBoard.
        trackers: More receivers of progress.
        name: What the statement calls the data.
        test_set_is_public: Whether the test set is that of a public benchmark, for the statement.
        resume: Go on in a folder whose run ended early. What was answered is replayed, what was paid stays
            paid.

    Returns:
        The student and what there is to say about it.

    Raises:
        UserError: for a mistake in data, configuration or output folder; nothing is spent then.
        BudgetExceeded, UnreachableBudget: if the budget cannot be met; nothing is spent then.
    """
    check_instance(config, PATEConfig, "config", "train_pate")
    if test_set is not None:
        check_records(test_set, "test set")
    device = choose_device(config.device)
    records = _records(train_set, classes, public)
    keys = query_keys(records.x_test)
    plan = plan_run(config, len(set(keys)))
    accountant = accountant_for(config, config.neighboring_relation, accountant)
    folder = None
    if output is not None:
        folder = RunFolder.reopen(output) if resume else RunFolder(output)
    trackers = [*trackers, TensorBoard(folder.path)] if folder else list(trackers)

    warn_of_look_alikes(accountant, train_set)
    with reserved(accountant, plan.event, _recorded_run(output) if resume else None) as reservation:
        relation = accountant.neighboring_relation
        report = PATEReport(config, plan, folder, trackers, test_set, relation, name, test_set_is_public)
        receipt = reservation.receipt
        about = {"teachers": teacher_settings(config), "data": name}
        if receipt is not None:  # what one run has released, no other can go on to pay for
            about["run"] = receipt.run_id
        # Before the run is written down: one of the ledger without a book is taken for one that lost it.
        book = AnswerBook(":memory:" if folder is None else folder.path / _BOOK, plan.aggregator, about)
        report.start(receipt)
        if not config.non_private:
            commit_again(reservation, book)
        random = Randomness.secret()
        if config.insecure_noise_seed is not None:
            random = Randomness.from_seed(config.insecure_noise_seed, "answers")
        try:
            with report.training:
                voters = obtain_voters(
                    records.x_train,
                    records.y_train,
                    records.classes,
                    records.x_test,
                    config,
                    features=features,
                    progress=report.phase("teachers", config.teachers),
                )
                report.save_ensemble(voters.ensemble)
                desk = Desk(
                    plan.aggregator,
                    book,
                    random,
                    None if config.non_private else reservation,
                    progress=report.answering(book),
                )
                teach = _Teaching(records, config, device)
                rows, answers = _ask(config, desk, keys, voters, records.x_test, teach)
                if plan.release is not None:
                    assert config.delta is not None  # noqa: S101 - private runs have one
                    asked, _ = book.outcomes(keys)
                    votes = voters.votes.numpy()[asked]
                    report.published = publish(plan, book, votes, config.delta, random, reservation)
                report.diagnose(voters, book, keys)
                student = teach(rows, answers, report.studying())
        except KeyboardInterrupt:
            report.finish(None, "stopped", book, closed(reservation))
            raise
        return report.finish(student, "completed", book, closed(reservation))


def _recorded_run(folder: str | os.PathLike[str] | None) -> str | None:
    """The id under which a ledger knows the run in a folder, if one does.

    Raises:
        UserError: if the folder has lost the answers that the ledger has paid for: they would be drawn again.
    """
    run_id = recorded_run(folder)
    if run_id is not None and not (book := Path(folder or ".") / _BOOK).exists():
        raise UserError(
            f"The run {run_id} of the ledger has lost its answers, {str(book)!r}; start a new run."
        )
    return run_id


@dataclass(frozen=True, eq=False)
class _Teaching:
    """Trains students on the public inputs, from answers."""

    records: LabeledData
    config: PATEConfig
    device: torch.device

    def __call__(self, rows: Tensor, answers: Tensor, watch: Watch | None = None) -> nn.Module:
        """A student that has learned from `answers` [k] to the public inputs `rows` [k]."""
        if len(rows) == 0:
            raise UserError(
                "No query was answered, so there is nothing to learn from; lower the threshold, or use "
                "gnmax. "
                "What was asked is paid for."
            )
        settings = StudentSettings(
            method=self.config.student,
            epochs=self.config.student_epochs,
            learning_rate=self.config.student_learning_rate,
            width=self.config.student_width,
            flip=self.config.student_flip,
        )
        return train_student(
            self.records.x_test,
            rows,
            answers,
            self.records.classes,
            settings,
            seed=self.config.seed,
            device=self.device,
            report=watch,
        )


def _ask(
    config: PATEConfig, desk: Desk, keys: list[bytes], voters: Voters, public: Tensor, teach: _Teaching
) -> tuple[Tensor, Tensor]:
    """Ask all queries of the plan; return the rows that have an answer, and their classes.

    The interactive aggregator asks in rounds. After each, a student says what it expects, and of what it is
    least sure. A refused query on which it is sure keeps its class (Papernot et al. 2018, Algorithm 2);
    that is made of what was released, and costs nothing.
    """
    place: dict[bytes, int] = {}
    for row, key in enumerate(keys):
        place.setdefault(key, row)
    candidates = torch.tensor(list(place.values()))  # equal inputs are one
    rounds = (config.rounds or _ROUNDS) if config.aggregator == "interactive-gnmax" else 1
    known: dict[int, int] = {}
    expected: Tensor | None = None
    for part in range(rounds):
        count = (desk.aggregator.queries + part) // rounds
        rows = candidates[_next_queries(config, public[candidates], count, expected, candidates)]
        candidates = candidates[~torch.isin(candidates, rows)]
        votes = None if expected is None else expected[rows] * config.teachers
        shown = desk.ask([keys[row] for row in rows], voters.votes[rows], votes)
        for row, found in zip(rows.tolist(), shown.tolist(), strict=True):
            if found >= 0:
                known[row] = found
            elif found == REFUSED and expected is not None and expected[row].max() > config.confidence:
                known[row] = int(expected[row].argmax())
        if part + 1 < rounds and known:
            student = teach(torch.tensor(list(known)), torch.tensor(list(known.values())))
            expected = _probabilities(student, public)
    return torch.tensor(list(known), dtype=torch.int64), torch.tensor(list(known.values()), dtype=torch.int64)


def _next_queries(
    config: PATEConfig, inputs: Tensor, count: int, expected: Tensor | None, candidates: Tensor
) -> Tensor:
    """Which `count` of the inputs to ask about next: those that a student, if any, is least sure of."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    if expected is not None:
        return expected[candidates].max(dim=1).values.argsort(stable=True)[:count]
    if config.choice == "first":
        return torch.arange(count)
    return choose_queries(inputs, count, seed=config.seed)


def _probabilities(student: nn.Module, public: Tensor) -> Tensor:
    """What a student expects of each public input: [n, classes] on the CPU."""
    device = next(student.parameters()).device
    with torch.no_grad():
        parts = [student(part.to(device)).softmax(dim=1).cpu() for part in torch.split(public, 1000)]
    return torch.cat(parts)


def _records(train_set: Any, classes: int | None, public: Tensor) -> LabeledData:
    """Private records as `x_train`, public inputs as `x_test` with made-up labels, all checked."""
    check_records(train_set, "training set")
    if isinstance(train_set, TensorDataset):
        inputs, labels = train_set.tensors
    else:
        try:
            inputs, labels = next(iter(DataLoader(train_set, batch_size=len(train_set))))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError("The records must be pairs of numbers, all of the same shape.") from error
    if not isinstance(inputs, Tensor) or not isinstance(labels, Tensor) or labels.numel() == 0:
        raise UserError("Each record must be a pair of tensors or numbers (input, class).")
    if not isinstance(public, Tensor) or public.ndim < 2:
        raise UserError(f"The public inputs must be a tensor [n, ...]. Got {shown(public)}.")
    return LabeledData(
        name="the private records with the public inputs as x_test",
        x_train=inputs.contiguous(),
        y_train=labels.contiguous(),
        x_test=public.contiguous(),
        y_test=torch.zeros(len(public), dtype=torch.int64),
        classes=int(labels.max()) + 1 if classes is None else classes,
    )


def _public_inputs(run: PATERun, data: LabeledData) -> tuple[Tensor, TensorDataset]:
    """Public inputs, and the test records that accuracy is measured on."""
    if run.public is not None:
        return load_inputs(run.public, "x_public"), TensorDataset(data.x_test, data.y_test)
    count = run.public_examples
    if count is None:
        count = data.test_examples * 9 // 10
    if not 0 < count < data.test_examples:
        raise UserError(
            f"{count} public examples of {data.test_examples} test examples leave none to measure accuracy "
            f"on, or none to ask about: choose from 1 to {data.test_examples - 1}, or bring a file (public)."
        )
    return data.x_test[:count], TensorDataset(data.x_test[count:], data.y_test[count:])
