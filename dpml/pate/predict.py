"""Private prediction: the teachers themselves answer, with noise at inference, under a budget that lasts.

No student is trained. Every new input costs, the same input asked again does not, and when the budget is used
the rest is refused. The book of answers lies beside the ensemble, so the count goes on from call to call and
from process to process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from accounting import BudgetExceeded, Composed, Event, PrivacyAccountant, PrivacyBudget, Repeated, UserError
from accounting.events import check_instance, check_number, check_relation
from accounting.ledger import Ledger
from dpml.ledger import closed, in_summary
from dpml.pate.aggregation import Aggregator, aggregator
from dpml.pate.answers import NOT_ASKED, AnswerBook, Desk, query_keys
from dpml.pate.teachers import load_ensemble
from dpml.randomness import Randomness

_BOOK = "serving.sqlite"
_NOISE_SHARE = 0.16  # of the teachers: 40 votes of 250, the published choice
_THRESHOLD_SHARE, _CHECK_NOISE = 0.8, 3.75


class PrivatePredictor:
    """An ensemble that answers under a budget.

    Guarantee: all answers ever given, by all processes that serve this ensemble, together with the student
    that was trained of it (if its run planned one), are (ε, δ)-differentially private with the budget's ε
    and δ for one record of the teachers' data. Inputs may be chosen after looking at earlier answers.

    Args:
        folder: The ensemble, such as `runs/b/ensemble`.
        budget: For the ensemble's data, the run's own plan included. It is fixed by the first call, which
            also fixes the noise; later calls may leave it out. If a ledger has paid for the ensemble, the
            first call has it pay for all the answers that this budget allows.
        noise_multiplier: Noise on a count, in votes; by default 0.16 times the teachers.
        confident: Refuse, at the price of a check, where fewer than 80 % of the teachers seem to agree.
        randomness: Where noise comes from; secret by default.

    Raises:
        UserError: if the folder holds no ensemble, there is no budget yet, or another one than before.
        BudgetExceeded: if the budget does not even pay for one answer.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        budget: PrivacyBudget | None = None,
        noise_multiplier: float | None = None,
        confident: bool = False,
        randomness: Randomness | None = None,
    ) -> None:
        if budget is not None:
            check_instance(budget, PrivacyBudget, "budget", "PrivatePredictor")
        if randomness is not None:
            check_instance(randomness, Randomness, "randomness", "PrivatePredictor")
        self.ensemble, description = load_ensemble(folder)
        path = Path(folder) / _BOOK
        about: dict[str, Any]
        if path.exists():
            title = AnswerBook.read_title(path)
            about = title["about"]
            self.aggregator = Aggregator.from_dict(title["aggregator"])
            try:
                self.budget = PrivacyBudget(**title["about"]["budget"])
            except (KeyError, TypeError) as error:
                raise UserError(f"{str(path)!r} is damaged: it names no budget.") from error
            self._require_same(budget, noise_multiplier, confident)
        else:
            if budget is None:
                raise UserError("Give a budget, epsilon and delta, with the first question to an ensemble.")
            noise = _NOISE_SHARE * self.ensemble.teachers if noise_multiplier is None else noise_multiplier
            check_number(noise, "noise_multiplier", "private prediction", low=0, high=1e7)
            self.budget = budget
            self.aggregator = self._plan(description, noise, confident)
            about = {"budget": {"epsilon": budget.epsilon, "delta": budget.delta}}
            if description.get("ledger") is not None:
                about["ledger"] = self._record(description)
        self.book = AnswerBook(path, self.aggregator, about)
        self._desk = Desk(self.aggregator, self.book, randomness or Randomness.secret())

    @property
    def left(self) -> int:
        """How many new inputs can still be asked about."""
        return self.aggregator.queries - self.book.spent()[0]

    def predict(self, inputs: Tensor) -> npt.NDArray[np.int64]:
        """A class for each input, or `dpml.pate.answers.REFUSED` or `FORFEITED`: int64 [m].

        All of them are answered, or none: nothing is spent if the budget does not pay for all new ones.

        Args:
            inputs: Float32 [m, ...], formed like the teachers' records.

        Raises:
            BudgetExceeded: if there are more new inputs than `left`.
            UserError: for inputs of another form.
        """
        keys = query_keys(inputs)
        new = len({key for key, state in zip(keys, self.book.states(keys), strict=True) if state is None})
        if new > self.left:
            raise self._exceeded(new)
        shown = self._desk.ask(keys, self.ensemble.votes(inputs))
        if (shown == NOT_ASKED).any():  # another process was faster
            raise self._exceeded(int((shown == NOT_ASKED).sum()))
        return shown

    def _plan(self, description: dict[str, Any], noise: float, confident: bool) -> Aggregator:
        """As many answers as the budget pays for beside what the ensemble's run has planned."""
        relation = check_relation(description.get("neighboring_relation", "zero-out"))
        accountant = PrivacyAccountant(budget=self.budget, neighboring_relation=relation)
        if description.get("planned") is not None:
            accountant.record(Event.from_dict(description["planned"]))
        one = self._aggregator(noise, 1, confident).plan
        queries = accountant.remaining(one)
        if queries == 0:
            accountant.record(one)  # raises, and says what is missing
        return self._aggregator(noise, queries, confident)

    def _record(self, description: dict[str, Any]) -> dict[str, Any] | None:
        """Let the ledger that paid for the ensemble pay for all answers too, before the first one.

        From then on the book counts them, as it does without a ledger.
        """
        accountant = Ledger().accountant(description["ledger"])
        with accountant.reserve(self.aggregator.plan) as reservation:
            reservation.commit_all()
        return in_summary(closed(reservation))

    def _aggregator(self, noise: float, queries: int, confident: bool) -> Aggregator:
        return aggregator(
            "confident-gnmax" if confident else "gnmax",
            noise_multiplier=noise,
            queries=queries,
            threshold=_THRESHOLD_SHARE * self.ensemble.teachers if confident else None,
            threshold_noise=_CHECK_NOISE * noise if confident else None,
        )

    def _require_same(self, budget: PrivacyBudget | None, noise: float | None, confident: bool) -> None:
        if budget not in (None, self.budget):
            raise UserError(
                f"This ensemble serves under a budget of {self.budget}, fixed by the first question; it "
                f"cannot "
                f"be changed to {budget}."
            )
        event = self.aggregator.answer_event
        if noise is not None and noise != getattr(event, "sigma", None):
            raise UserError(
                f"This ensemble answers with {event}, fixed by the first question. Got {noise:g}."
            )
        if confident and self.aggregator.check_event is None:
            raise UserError("This ensemble answers without a check, fixed by the first question.")

    def _exceeded(self, asked: int) -> BudgetExceeded:
        by = self.aggregator
        accountant = PrivacyAccountant()
        accountant.record(self.book.committed_event)
        spent = accountant.epsilon(self.budget.delta)
        one = self._aggregator(getattr(by.answer_event, "sigma", 1.0), 1, by.check_event is not None).plan
        together = Composed([by.plan, Repeated(one, asked)])
        accountant = PrivacyAccountant()
        accountant.record(together)
        reason = f"{asked} new inputs are more than the {self.left} that are left of {by.queries}"
        return BudgetExceeded(
            self.budget, spent, together, accountant.epsilon(self.budget.delta), self.left, reason
        )
