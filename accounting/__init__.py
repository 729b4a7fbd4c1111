"""Privacy accounting: events, budgets, and bounds on ε and δ. Needs numpy and scipy alone.

>>> from accounting import Gaussian, PoissonSampled, PrivacyAccountant, Repeated
>>> accountant = PrivacyAccountant(method="pld")
>>> accountant.record(Repeated(PoissonSampled(Gaussian(1.1), 256 / 60_000), 14_062))
>>> round(accountant.epsilon(delta=1e-5), 2)
2.38
"""

from accounting.accountant import METHODS, Method, PrivacyAccountant, Reservation
from accounting.budget import BudgetExceeded, PrivacyBudget, ReservationError
from accounting.calibration import (
    UnreachableBudget,
    calibrate_batch_size,
    calibrate_noise_multiplier,
    calibrate_sampling_probability,
    calibrate_steps,
)
from accounting.curve import epsilon_curve
from accounting.curves import ZCDP, BestOfRuns, OneOf, SmoothRelease
from accounting.errors import UnsupportedEvent, UserError
from accounting.events import (
    RELATIONS,
    Composed,
    Event,
    NeighboringRelation,
    NonPrivate,
    PoissonSampled,
    Repeated,
    SampledWithoutReplacement,
    ShuffledEpoch,
    ZeroCost,
)
from accounting.mechanisms import (
    DiscreteGaussian,
    EpsilonDelta,
    ExponentialMechanism,
    Gaussian,
    GNMax,
    GNMaxThreshold,
    Laplace,
    LNMax,
    RandomizedResponse,
    ReportNoisyMax,
)

__all__ = [
    "METHODS",
    "RELATIONS",
    "ZCDP",
    "BestOfRuns",
    "BudgetExceeded",
    "Composed",
    "DiscreteGaussian",
    "EpsilonDelta",
    "Event",
    "ExponentialMechanism",
    "GNMax",
    "GNMaxThreshold",
    "Gaussian",
    "LNMax",
    "Laplace",
    "Method",
    "NeighboringRelation",
    "NonPrivate",
    "OneOf",
    "PoissonSampled",
    "PrivacyAccountant",
    "PrivacyBudget",
    "RandomizedResponse",
    "Repeated",
    "ReportNoisyMax",
    "Reservation",
    "ReservationError",
    "SampledWithoutReplacement",
    "ShuffledEpoch",
    "SmoothRelease",
    "UnreachableBudget",
    "UnsupportedEvent",
    "UserError",
    "ZeroCost",
    "calibrate_batch_size",
    "calibrate_noise_multiplier",
    "calibrate_sampling_probability",
    "calibrate_steps",
    "epsilon_curve",
]
