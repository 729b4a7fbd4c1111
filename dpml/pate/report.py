"""What a PATE run says of itself: progress, accuracy, summary, statement and events."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from accounting import (
    Composed,
    Event,
    NeighboringRelation,
    PrivacyAccountant,
    Repeated,
    UnsupportedEvent,
)
from accounting.budget import Receipt
from accounting.statement import PATEFacts, Risk, statement
from dpml.ledger import in_summary
from dpml.outputs import RunFolder, events_record, write_private
from dpml.pate.answers import AnswerBook
from dpml.pate.config import PATEConfig
from dpml.pate.ensembles import Voters
from dpml.pate.planning import PATEPlan, noise_of
from dpml.pate.publishing import RELEASE, diagnose
from dpml.pate.teachers import Ensemble, Progress
from dpml.report import NO_PRIVACY, Status, TrainingResult, accuracy, summary_of
from dpml.resuming import write_run
from dpml.tracking import Stopwatch, Tracker


class PATEReport:
    """Tells trackers and the output folder what happens. It reads a run and never changes it."""

    def __init__(
        self,
        config: PATEConfig,
        plan: PATEPlan,
        folder: RunFolder | None,
        trackers: Sequence[Tracker],
        test_set: Any,
        relation: NeighboringRelation,
        name: str,
        test_set_is_public: bool,
    ) -> None:
        self.config, self.plan, self.folder, self.trackers = config, plan, folder, trackers
        self.test_set, self.relation, self.name = test_set, relation, name
        self.test_set_is_public = test_set_is_public
        self.training = Stopwatch()
        self.published: dict[str, Any] | None = None
        self._ledger: Receipt | None = None
        self._bounds_of_plan: tuple[float, float] | None = None
        if not config.non_private:
            self._bounds_of_plan = self._bounds(plan.event)

    # ------------------------------------------------------------ on the way

    def start(self, receipt: Receipt | None = None) -> None:
        """Write down the plan before anything is trained, and where a ledger has it."""
        self._ledger = receipt
        aggregator = self.plan.aggregator
        settings = {
            **asdict(self.config),
            "queries": aggregator.queries,
            "noise_multiplier": None if self.config.non_private else noise_of(self.plan.aggregator),
            "neighboring_relation": None if self.config.non_private else self.relation,
        }
        if self.folder is not None:
            write_run(self.folder, "pate", asdict(self.config), receipt)  # first: from here on it can go on
        self._write_events(Repeated(self.plan.event, 0), "running")
        for tracker in self.trackers:
            tracker.start(aggregator.queries, settings)

    def phase(self, name: str, steps: int) -> Progress:
        """Begin a part of the run; returns what to call on the way."""
        for tracker in self.trackers:
            tracker.phase(name, steps)

        def progress(done: int, _total: int) -> None:
            for tracker in self.trackers:
                tracker.scalars(done, {})

        return progress

    def answering(self, book: AnswerBook) -> Callable[[], None]:
        """Begin the questions; returns what to call after each block of them."""
        self.phase("queries", self.plan.aggregator.queries)

        def progress() -> None:
            asked, answered = book.spent()
            values = {"pate/queries_answered": float(answered)}
            if not self.config.non_private:
                lower, upper = self._bounds(book.committed_event)
                values |= {"privacy/epsilon": upper, "privacy/epsilon_lower": lower}
            for tracker in self.trackers:
                tracker.scalars(asked, values)

        return progress

    def studying(self) -> Callable[[int, int, nn.Module], None]:
        """Begin the student's training; returns what to call after each of its epochs."""
        self.phase("student", self.config.student_epochs)

        def progress(epoch: int, _epochs: int, student: nn.Module) -> None:
            values = {}
            if self.test_set is not None:
                with self.training.paused():
                    values["test/accuracy"] = accuracy(student, self.test_set)
            for tracker in self.trackers:
                tracker.scalars(epoch, values)

        return progress

    def save_ensemble(self, ensemble: Ensemble) -> None:
        """Keep the teachers, for `dpml predict`, with the plan that they have to pay for already."""
        if self.folder is None:
            return
        more: dict[str, Any] = {"data": self.name, "neighboring_relation": self.relation}
        if not self.config.non_private:
            more["planned"] = self.plan.event.to_dict()
        if self._ledger is not None:
            more["ledger"] = self._ledger.name
        ensemble.save(self.folder.path / "ensemble", **more)

    def diagnose(self, voters: Voters, book: AnswerBook, keys: list[bytes]) -> None:
        """Write figures that are computed from votes without noise, if asked to: to an owner's file."""
        if not self.config.log_not_private or self.folder is None:
            return
        asked, answered = book.outcomes(keys)
        votes = voters.votes.numpy()[asked]
        figures: dict[str, Any] = {
            "warning": "NOT PRIVATE: computed from the teachers' votes without noise. Do not publish.",
            "mean_largest_share_of_votes": float(votes.max(axis=1).mean() / self.config.teachers),
        }
        if self.config.aggregator == "interactive-gnmax":
            figures["data_dependent_epsilon"] = None  # its theory is for queries that were fixed beforehand
        elif not self.config.non_private and self.config.delta is not None:
            cost = diagnose(self.plan.aggregator, votes, answered[asked])
            figures |= {"data_dependent_epsilon": cost.epsilon(self.config.delta), "delta": self.config.delta}
        if self.test_set is not None:
            figures["ensemble_test_accuracy"] = accuracy(_Plurality(voters.ensemble), self.test_set)
        folder = self.folder.path / "not_private"
        folder.mkdir(mode=0o700, exist_ok=True)
        write_private(folder / "pate.json", (json.dumps(figures, indent=2) + "\n").encode())

    # ------------------------------------------------------------ the end

    def finish(
        self, student: nn.Module | None, status: Status, book: AnswerBook, receipt: Receipt | None = None
    ) -> TrainingResult:
        """Write all results; of a stopped run, what there is. `receipt` is that of the ledger, if any."""
        reached = None
        if student is not None and self.test_set is not None:
            reached = accuracy(student, self.test_set)
        committed = self._committed(book)
        summary = self._summary(status, committed, book.spent(), reached) | {"ledger": in_summary(receipt)}
        text = NO_PRIVACY if self.config.non_private else self._statement(summary, receipt)
        if self.folder is not None:
            if student is not None:
                summary["weights_sha256"] = self.folder.write_model("model.safetensors", student)
            self._write_events(committed, status)
            self.folder.write_text("statement.md", text)
            self.folder.write_json("summary.json", summary)
        for tracker in self.trackers:
            tracker.finish()
        return TrainingResult(student or nn.Identity(), status, summary, text, self.plan.event, committed)

    def _summary(
        self, status: Status, committed: Event, spent: tuple[int, int], reached: float | None
    ) -> dict[str, Any]:
        config, by = self.config, self.plan.aggregator
        queries, answers = spent
        given: dict[str, Any] = {
            "status": status,
            "method": "pate",
            "dataset": self.name,
            "test_accuracy": reached,
            "train_seconds": self.training.seconds,
            "seed": config.seed,
            "config": asdict(config),
            "aggregator": config.aggregator,
            "teachers": config.teachers,
            "queries_planned": by.queries,
            "answers_planned": by.answers,
            "queries_asked": queries,
            "queries_answered": answers,
            "threshold": by.threshold,
            "threshold_noise": None if by.check_event is None else by.check_event.sigma,
            "sanitised_epsilon": None if self.published is None else self.published["epsilon"],
        }
        if self._bounds_of_plan is not None:
            lower, upper = self._bounds_of_plan
            done = committed == self.plan.event
            given |= {
                "epsilon": upper,
                "epsilon_lower": lower,
                "epsilon_spent": upper if done else self._bounds(committed)[1],
                "target_epsilon": config.epsilon,
                "delta": config.delta,
                "accountant": config.accountant,
                "neighboring_relation": self.relation,
                "privacy_unit": "record",
                "n_is_public": config.places is None,
                "noise_multiplier": None if self.config.non_private else noise_of(self.plan.aggregator),
                "noise_is_secret": config.insecure_noise_seed is None,
            }
        return summary_of(given)

    def _statement(self, summary: dict[str, Any], receipt: Receipt | None) -> str:
        copied = (
            "dataset status epsilon epsilon_lower epsilon_spent delta accountant noise_multiplier "
            "n_is_public noise_is_secret aggregator teachers threshold threshold_noise"
        )
        try:
            risk = Risk.of(self.plan.event, summary["delta"], self.relation)
        except UnsupportedEvent:  # a sanitised release has Rényi divergences only
            risk = None
        return statement(
            PATEFacts(
                method="PATE",
                relation=self.relation,
                risk=risk,
                test_set_is_public=self.test_set_is_public,
                not_private_logs=self.config.log_not_private,
                planned_queries=summary["queries_planned"],
                planned_answers=summary["answers_planned"],
                queries=summary["queries_asked"],
                answers=summary["queries_answered"],
                published=summary["sanitised_epsilon"],
                ledger=receipt,
                **{key: summary[key] for key in copied.split()},
            )
        )

    def _committed(self, book: AnswerBook) -> Event:
        answers = book.committed_event
        if self.plan.release is None or not book.has_paid(RELEASE):
            return answers
        if answers == self.plan.aggregator.plan:
            return self.plan.event
        return Composed([answers, self.plan.release.event])

    def _write_events(self, committed: Event, status: str) -> None:
        if self.folder is not None:
            record = events_record(
                planned=self.plan.event,
                committed=committed,
                relation=self.relation,
                accountant=self.config.accountant,
                status=status,
            )
            self.folder.write_json("privacy_events.json", record)

    def _bounds(self, event: Event) -> tuple[float, float]:
        assert self.config.delta is not None  # noqa: S101 - private runs have one
        accountant = PrivacyAccountant(self.config.accountant, neighboring_relation=self.relation)
        accountant.record(event)
        return accountant.epsilon_bounds(self.config.delta)


class _Plurality(nn.Module):
    """The teachers' votes as if they were logits."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self._ensemble = ensemble
        self.register_parameter("device", nn.Parameter(torch.empty(0)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Votes, [m, classes]."""
        return self._ensemble.votes(inputs)
