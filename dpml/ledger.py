"""What trainers do with a ledger, if one is on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from accounting import Event, PrivacyAccountant, Reservation, UserError
from accounting.budget import Receipt
from accounting.ledger import LedgerAccountant, LedgerReservation


def reserved(accountant: PrivacyAccountant, plan: Event, run_id: str | None = None) -> Reservation:
    """Reserve a plan, or go on with the run that a ledger has of it.

    Raises:
        UserError: if a ledger has the run, but the accountant is not of that ledger.
        BudgetExceeded: if the plan does not fit.
    """
    if run_id is None:
        return accountant.reserve(plan)
    if not isinstance(accountant, LedgerAccountant):
        raise UserError(f"A ledger has this run, as {run_id}: it needs the ledger's accountant to go on.")
    return accountant.reopen(run_id, plan)


def closed(reservation: Reservation) -> Receipt | None:
    """Close a reservation; return what the ledger says of it, None without a ledger."""
    reservation.close()
    if isinstance(reservation, LedgerReservation) and reservation.unclosed:
        _warn(reservation.unclosed)
    return reservation.receipt


def in_summary(receipt: Receipt | None) -> dict[str, Any] | None:
    """What `summary.json` says of the ledger."""
    return None if receipt is None else asdict(receipt)


def warn_of_look_alikes(accountant: PrivacyAccountant, train_set: Any) -> None:
    """Say on the terminal if the ledger knows the records under another name.

    Records are compared by their inputs, of a data set of tensors: others could be read only one by one.
    """
    inputs = getattr(train_set, "tensors", (None,))[0]
    if not isinstance(accountant, LedgerAccountant) or inputs is None:
        return

    def records() -> Iterator[bytes]:
        for row in inputs.detach().cpu().contiguous().numpy():
            yield row.tobytes()

    try:
        names = accountant.look_alikes(records())
    except (OSError, UserError) as error:  # it only warns, so it stops nothing
        _warn(f"The records were not compared with those of other names in the ledger: {error}")
        return
    for name in names:
        _warn(
            f"this looks like {name!r} under another name: the two budgets are for the same people, and what "
            "they spend adds up."
        )


def _warn(message: str) -> None:
    print(f"dpml: {' '.join(message.split())}", file=sys.stderr)
