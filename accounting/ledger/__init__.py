"""The budget belongs to the data, not to the run: what each data set of a machine has paid.

>>> from accounting import PrivacyBudget
>>> from accounting.ledger import Ledger
>>> ledger = Ledger("ledger.sqlite")                                         # doctest: +SKIP
>>> ledger.declare("patients-2026", PrivacyBudget(epsilon=3, delta=1e-6))    # doctest: +SKIP
>>> accountant = ledger.accountant("patients-2026")  # for accountant= of a trainer; doctest: +SKIP
"""

from accounting.ledger.accountant import LedgerAccountant, LedgerReservation
from accounting.ledger.file import Entry, LedgerBroken
from accounting.ledger.ledger import Ledger, Verified, check_name, default_path
from accounting.ledger.replay import DataSet, Run

__all__ = [
    "DataSet",
    "Entry",
    "Ledger",
    "LedgerAccountant",
    "LedgerBroken",
    "LedgerReservation",
    "Run",
    "Verified",
    "check_name",
    "default_path",
]
