"""Privacy accounting: events, budgets, and bounds on ε and δ. Needs numpy and scipy alone.

>>> from accounting import Gaussian, PoissonSampled, PrivacyAccountant, Repeated
>>> accountant = PrivacyAccountant(method="pld")
>>> accountant.record(Repeated(PoissonSampled(Gaussian(1.1), 256 / 60_000), 14_062))
>>> round(accountant.epsilon(delta=1e-5), 2)
2.38
"""

from accounting.accountant import METHODS, Method, PrivacyAccountant, Reservation
from accounting.budget import BudgetExceeded, PrivacyBudget, ReservationError
from accounting.calibration import UnreachableBudget, calibrate_noise_multiplier
from accounting.errors import UnsupportedEvent, UserError
from accounting.events import (
    RELATIONS,
    Composed,
    Event,
    Gaussian,
    Laplace,
    NeighboringRelation,
    NonPrivate,
    PoissonSampled,
    Repeated,
)

__all__ = [
    "METHODS",
    "RELATIONS",
    "BudgetExceeded",
    "Composed",
    "Event",
    "Gaussian",
    "Laplace",
    "Method",
    "NeighboringRelation",
    "NonPrivate",
    "PoissonSampled",
    "PrivacyAccountant",
    "PrivacyBudget",
    "Repeated",
    "Reservation",
    "ReservationError",
    "UnreachableBudget",
    "UnsupportedEvent",
    "UserError",
    "calibrate_noise_multiplier",
]
