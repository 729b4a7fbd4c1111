"""Train models with differential privacy and never lose count of what that cost.

>>> import dpml
>>> config = dpml.DPSGDConfig(epsilon=3, delta=1e-5, epochs=10, batch_size=256)
>>> result = dpml.train_dpsgd(model, train_set, config)          # doctest: +SKIP
>>> print(result.statement)                                      # doctest: +SKIP

Names are imported when they are first used: `import dpml` alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accounting import (
        BudgetExceeded,
        PrivacyAccountant,
        PrivacyBudget,
        Repeated,
        UserError,
        calibrate_noise_multiplier,
    )
    from accounting.ledger import Ledger
    from dpml.adaptive import AdaptiveClipping
    from dpml.averaging import WeightAverage
    from dpml.config import DPSGDConfig, DPSGDRun
    from dpml.data import from_arrays, load
    from dpml.data.batches import Examples
    from dpml.data.samplers import PoissonSampler
    from dpml.dpsgd import run_dpsgd, train_dpsgd
    from dpml.gradients import BookKeepingEngine, Clipping, OpacusEngine, cross_entropy
    from dpml.mechanism import SampledGaussianMechanism, set_gradients
    from dpml.models import build
    from dpml.noise import GaussianNoise
    from dpml.pate.config import PATEConfig, PATERun
    from dpml.pate.predict import PrivatePredictor
    from dpml.pate.trainer import run_pate, train_pate
    from dpml.randomness import Randomness
    from dpml.report import TrainingResult

_HOMES = {
    "AdaptiveClipping": "dpml.adaptive",
    "BudgetExceeded": "accounting",
    "Clipping": "dpml.gradients",
    "DPSGDConfig": "dpml.config",
    "DPSGDRun": "dpml.config",
    "Examples": "dpml.data.batches",
    "GaussianNoise": "dpml.noise",
    "BookKeepingEngine": "dpml.gradients",
    "Ledger": "accounting.ledger",
    "OpacusEngine": "dpml.gradients",
    "PATEConfig": "dpml.pate.config",
    "PATERun": "dpml.pate.config",
    "PoissonSampler": "dpml.data.samplers",
    "PrivacyAccountant": "accounting",
    "PrivacyBudget": "accounting",
    "PrivatePredictor": "dpml.pate.predict",
    "Randomness": "dpml.randomness",
    "Repeated": "accounting",
    "SampledGaussianMechanism": "dpml.mechanism",
    "TrainingResult": "dpml.report",
    "UserError": "accounting",
    "WeightAverage": "dpml.averaging",
    "build": "dpml.models",
    "calibrate_noise_multiplier": "accounting",
    "cross_entropy": "dpml.gradients",
    "from_arrays": "dpml.data",
    "load": "dpml.data",
    "run_dpsgd": "dpml.dpsgd",
    "run_pate": "dpml.pate.trainer",
    "set_gradients": "dpml.mechanism",
    "train_dpsgd": "dpml.dpsgd",
    "train_pate": "dpml.pate.trainer",
}

__all__ = [
    "AdaptiveClipping",
    "BookKeepingEngine",
    "BudgetExceeded",
    "Clipping",
    "DPSGDConfig",
    "DPSGDRun",
    "Examples",
    "GaussianNoise",
    "Ledger",
    "OpacusEngine",
    "PATEConfig",
    "PATERun",
    "PoissonSampler",
    "PrivacyAccountant",
    "PrivacyBudget",
    "PrivatePredictor",
    "Randomness",
    "Repeated",
    "SampledGaussianMechanism",
    "TrainingResult",
    "UserError",
    "WeightAverage",
    "build",
    "calibrate_noise_multiplier",
    "cross_entropy",
    "from_arrays",
    "load",
    "run_dpsgd",
    "run_pate",
    "set_gradients",
    "train_dpsgd",
    "train_pate",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dpml' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
