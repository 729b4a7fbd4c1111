"""How to audit. The command line is generated from these, as from `dpml.config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from accounting import UserError
from dpml.config import choice_field, count_field, number_field

CanaryKind = Literal["gradient", "mislabelled", "noise"]
CANARY_KINDS: tuple[CanaryKind, ...] = get_args(CanaryKind)
_MOST_CANARIES, _MOST_DRAWS = 100_000, 10**8


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """How to audit a DP-SGD run."""

    canaries: int = 1000
    """Records to plant; a fair coin decides for each whether it is in."""
    canary: CanaryKind = "gradient"
    """What is planted: gradient (white-box: each has a parameter of its own, seen in every step), mislabelled
    (test inputs with a wrong label) or noise (random inputs); of the last two only the final model tells."""
    confidence: float = 0.9999
    """An honest run is contradicted with a probability of at most one minus this."""

    def __post_init__(self) -> None:
        count_field(self, "canaries", low=32)
        if self.canaries > _MOST_CANARIES:
            raise UserError(f"At most {_MOST_CANARIES:,} canaries can be planted. Got {self.canaries:,}.")
        choice_field(self, "canary", CANARY_KINDS)
        _check_confidence(self)


@dataclass(frozen=True, kw_only=True)
class PATEAuditConfig:
    """How to audit PATE's aggregation."""

    delta: float = 1e-6
    """δ at which the ε of one query is bounded."""
    teachers: int = 250
    """Number of teachers, who have one vote each."""
    classes: int = 10
    """Number of classes."""
    draws: int = 200_000
    """Outcomes that are drawn for each histogram of votes. Rare ones tell most: more draws, larger bounds."""
    confidence: float = 0.9999
    """An honest aggregator is contradicted with a probability of at most one minus this."""

    def __post_init__(self) -> None:
        number_field(self, "delta", high=1)
        count_field(self, "teachers", low=2)
        count_field(self, "classes", low=2)
        count_field(self, "draws", low=100)
        if self.draws > _MOST_DRAWS:
            raise UserError(f"At most {_MOST_DRAWS:,} outcomes are drawn. Got {self.draws:,}.")
        if self.teachers > 10**6 or self.classes > 10**4:
            raise UserError(
                f"Up to a million teachers and 10,000 classes can be audited. Got {self.teachers:,} and "
                f"{self.classes:,}."
            )
        _check_confidence(self)


def _check_confidence(config: AuditConfig | PATEAuditConfig) -> None:
    number_field(config, "confidence", high=1)
    if not 1e-12 <= 1 - config.confidence <= 0.5:
        raise UserError(f"The confidence of an audit is customarily 0.9999. Got {config.confidence}.")
