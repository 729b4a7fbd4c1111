from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from accounting import PrivacyBudget, UserError
from dpml.config import CLIPPING_MODES, DPSGDConfig, DPSGDRun
from dpml.gradients import engine

NOISE: dict[str, Any] = {"noise_multiplier": 1.0, "delta": 1e-5}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", np.float32(2)),
        ("epochs", 2),
        ("batch_size", np.int64(2)),
        ("clip_norm", np.float32(2)),
        ("momentum", 0),
        ("seed", np.uint8(2)),
        ("sampling_probability", 1),
        ("insecure_noise_seed", np.int32(2)),
    ],
)
def test_numbers_become_python_s_own(name: str, value: Any) -> None:
    kept = getattr(DPSGDConfig(**{**NOISE, name: value}), name)
    assert type(kept) in (int, float)
    assert kept == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", "3"),
        ("epochs", None),
        ("epochs", True),
        ("batch_size", 2.0),
        ("batch_size", None),
        ("batch_size", True),
        ("clip_norm", None),
        ("clip_norm", [1.0]),
        ("learning_rate", None),
        ("momentum", None),
        ("micro_batch_size", None),
        ("workers", None),
        ("seed", None),
        ("seed", 1.5),
        ("non_private", "no"),
        ("log_not_private", 1),
        ("device", "tpu"),
        ("schedule", "cosine"),
        ("accountant", "gdp"),
        ("clipping", "per-example"),
        ("clipping", None),
        ("clip_quantile", 0.0),
        ("clip_quantile", 1.0),
        ("clip_quantile", "0.5"),
        ("neighboring_relation", "same"),
        ("delta", "1e-5"),
        ("noise_multiplier", "1"),
    ],
)
def test_wrong_types_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError) as raised:
        DPSGDConfig(**{**NOISE, name: value})
    assert "\n" not in str(raised.value)
    assert repr(value) in str(raised.value) or name == "delta"


@pytest.mark.parametrize("dataset", ["", None, 3, b"mnist"])
def test_a_data_set_has_a_name(dataset: Any) -> None:
    with pytest.raises(UserError, match="must be a name or a path"):
        DPSGDRun(**NOISE, dataset=dataset)


def test_a_path_is_one_too() -> None:
    dataset: Any = Path("own.npz")
    assert DPSGDRun(**NOISE, dataset=dataset).dataset == "own.npz"


@pytest.mark.parametrize("wishes", [{}, {"epsilon": 1.0, "noise_multiplier": 1.0}])
def test_exactly_one_wish(wishes: dict[str, float]) -> None:
    with pytest.raises(UserError, match="Give exactly one of epsilon"):
        DPSGDConfig(delta=1e-5, **wishes)


def test_budget() -> None:
    assert DPSGDConfig(epsilon=2, delta=1e-5).budget == PrivacyBudget(2.0, 1e-5)
    assert DPSGDConfig(**NOISE).budget is None
    assert DPSGDConfig(non_private=True).budget is None


def test_the_command_offers_what_engines_are_asked_for() -> None:
    # Written twice, because the command must not import torch before it knows what is wanted.
    assert engine.CLIPPING_MODES == CLIPPING_MODES == get_args(engine.ClippingMode)


def test_frozen_and_by_name_alone() -> None:
    config: Any = DPSGDConfig(**NOISE)
    with pytest.raises(AttributeError):
        config.epsilon = 1.0
    make: Any = DPSGDConfig
    with pytest.raises(TypeError):
        make(1.0)


def test_only_wishes_and_derived_settings_are_optional() -> None:
    optional = {field.name for field in fields(DPSGDRun) if field.default is None}
    assert optional == {
        *("epsilon", "delta", "noise_multiplier", "sampling_probability", "neighboring_relation"),
        *("insecure_noise_seed", "classes", "image_size", "clip_quantile", "ledger", "mean_noise"),
    }
