"""Fuzz targets: the public names of `dpml`."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from begun import stopped_at_training
from fuzzing import Draw, naming, target
from targets_accounting import valid
from torch import nn
from torch.utils.data import TensorDataset

import dpml
from accounting import Gaussian, PrivacyAccountant, PrivacyBudget, Repeated
from dpml.data import from_arrays
from dpml.gradients.engine import ClippedSum
from dpml.planning import SamplingPlan
from dpml.verify import verify_run
from recipes.sweep import sweep

DPSGD: dict[str, Any] = {"noise_multiplier": 1.1, "delta": 1e-5, "batch_size": 8, "epochs": 2.0}
PATE: dict[str, Any] = {"noise_multiplier": 4.0, "delta": 1e-5, "queries": 8, "teachers": 5}
_CONFIGS: list[tuple[Any, dict[str, Any]]] = [
    (dpml.DPSGDConfig, DPSGD),
    (dpml.DPSGDRun, {**DPSGD, "dataset": "digits"}),
    (dpml.PATEConfig, PATE),
    (dpml.PATERun, {**PATE, "dataset": "digits"}),
]


def valid_config(config: Any) -> None:
    """Assert that a configuration is that of the same values, and that its numbers are numbers."""
    given = dict(vars(config))
    assert type(config)(**given) == config
    for field in fields(config):
        value, hint = given[field.name], str(field.type)
        if value is None:
            assert "None" in hint, field.name
        elif hint.startswith(("int", "float")):
            assert type(value) in (int, float), (field.name, value)
            assert math.isfinite(value)
            assert value >= 0 or field.name == "threshold"
            assert not hint.startswith("int") or type(value) is int
        elif hint.startswith("bool"):
            assert type(value) is bool
        else:
            assert isinstance(value, str), (field.name, value)
    if not config.non_private:
        assert config.epsilon is not None or config.noise_multiplier is not None
        assert config.noise_multiplier is None or config.noise_multiplier > 0
        assert 0 < config.delta < 1


@target("dpml: configurations", 12)
def _configs(draw: Draw) -> None:
    kind, good = draw.choice(_CONFIGS)
    names = [field.name for field in fields(kind)]
    changed = {draw.choice(names): draw.junk() for _ in range(draw.choice([1, 1, 1, 2]))}
    if len(changed) == 1 and not {*changed} & {"non_private", "epsilon", "noise_multiplier", "queries"}:
        [name] = changed
        with naming({"neighboring_relation": "relation"}.get(name, name)):
            config = kind(**{**good, **changed})
    else:
        config = kind(**{**good, **changed})
    valid_config(config)


def _data(rows: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


_BAD_TENSORS: list[Any] = [
    *(lambda: torch.full((20, 4), math.nan), lambda: torch.full((20, 4), math.inf), lambda: torch.zeros(20)),
    *(lambda: torch.zeros(0, 4), lambda: torch.zeros(20, 0), lambda: torch.zeros(20, 4, dtype=torch.int64)),
    *(
        lambda: torch.zeros(20, 4, dtype=torch.complex64),
        lambda: torch.zeros(19, 4),
        lambda: torch.tensor(1.0),
    ),
    *(lambda: torch.zeros(20, 4, dtype=torch.float64), lambda: torch.zeros(20, 4, dtype=torch.bool)),
    *(lambda: torch.zeros(20, 3), lambda: torch.zeros(20, 1, 2, 2)),
    lambda: torch.zeros(20, 4, requires_grad=True),
]
_BAD_LABELS: list[Any] = [
    *(lambda: torch.full((20,), -1), lambda: torch.full((20,), 7), lambda: torch.zeros(20)),
    *(lambda: torch.zeros(20, 1).long(), lambda: torch.tensor(0), lambda: torch.full((20,), 2**62)),
    *(lambda: torch.zeros(20, dtype=torch.bool), lambda: torch.zeros(20, dtype=torch.uint8)),
]


def _some_data(draw: Draw) -> Any:
    if draw.random() < 0.6:
        return _data()
    good = _data()
    try:
        match draw.randrange(4):
            case 0:
                return TensorDataset(draw.choice(_BAD_TENSORS)(), good.tensors[1])
            case 1:
                return TensorDataset(good.tensors[0], draw.choice(_BAD_LABELS)())
            case 2:
                return [(x, y) for x, y in zip(*good.tensors, strict=True)][: draw.randrange(20)]
    except (AssertionError, IndexError):  # PyTorch refuses tensors of different lengths
        pass
    return draw.choice(
        [draw.junk(), [draw.junk()] * 3, TensorDataset(torch.zeros(5, 4)), [(draw.junk(), 0)] * 20]
    )


@target("dpml: train_dpsgd", 2)
def _train_dpsgd(draw: Draw) -> None:
    good: dict[str, Any] = {
        "model": nn.Linear(4, 2),
        "train_set": _some_data(draw),
        "config": dpml.DPSGDConfig(**DPSGD),
        "test_set": None,
        "output": None,
        "trackers": (),
        "name": "data",
        "augment": None,
        "accountant": None,
        "loss": dpml.cross_entropy,
        "make_optimizer": None,
    }
    if draw.random() < 0.5:
        name = draw.choice(
            ["model", "train_set", "config", "test_set", "output", "augment", "accountant", "loss"]
        )
        junk = draw.junk()
        if name == "output" and isinstance(junk, str | os.PathLike) and str(junk).startswith(("/", "..")):
            return  # write nowhere else
        if callable(junk):
            return  # what somebody's own function raises is theirs
        good[name] = junk
    with stopped_at_training():
        dpml.train_dpsgd(**good)


@target("dpml: train_pate", 4)
def _train_pate(draw: Draw) -> None:
    good: dict[str, Any] = {
        "train_set": _some_data(draw),
        "public": draw.choice([torch.randn(10, 4), torch.randn(10, 4), *(make() for make in _BAD_TENSORS)]),
        "config": dpml.PATEConfig(**PATE),
        "classes": draw.choice([None, 2, draw.number()]),
        "test_set": None,
        "output": None,
        "accountant": None,
    }
    if draw.random() < 0.4:
        name = draw.choice(sorted(good))
        junk = draw.junk()
        if name == "output" and isinstance(junk, str | os.PathLike) and str(junk).startswith(("/", "..")):
            return
        good[name] = junk
    with stopped_at_training():
        dpml.train_pate(**good)


@target("dpml: run_dpsgd, run_pate", 2)
def _runs(draw: Draw) -> None:
    kind, good, run = draw.choice(
        [(dpml.DPSGDRun, DPSGD, dpml.run_dpsgd), (dpml.PATERun, PATE, dpml.run_pate)]
    )
    names = [field.name for field in fields(kind) if field.name not in ("dataset", "device", "workers")]
    config = kind(**{**good, "dataset": "digits", draw.choice(names): draw.junk()})
    with stopped_at_training():
        run(draw.maybe(config, 0.1))


@target("dpml: sampling plan", 4)
def _plan(draw: Draw) -> None:
    good = {"examples": 100, "batch_size": 10, "epochs": 2.0}
    good |= {"sampling_probability": None, "neighboring_relation": None}
    values = draw.one_wrong(draw.one_wrong(good)[0])[0] if draw.random() < 0.5 else draw.one_wrong(good)[0]
    plan = SamplingPlan.of(**values)
    assert 0 < plan.sampling_probability <= 1
    assert 1 <= plan.steps <= 10**15
    assert type(plan.steps) is int
    assert plan.n_is_public or values["sampling_probability"] is not None
    valid(plan.event(1.1))


@target("dpml: parts of a loop", 6)
def _parts(draw: Draw) -> None:
    random = dpml.Randomness.from_seed(0, "test")
    match draw.randrange(9):
        case 0:
            sampler = dpml.PoissonSampler(draw.maybe(50), draw.maybe(0.1), draw.maybe(random, 0.2))
            valid(sampler.event(Gaussian(1.0)))
            if sampler.examples < 10**6:
                drawn = sampler.sample()
                assert drawn.dtype == torch.int64
                assert not len(drawn) or 0 <= int(drawn.min()) <= int(drawn.max()) < sampler.examples
        case 1:
            noise = dpml.GaussianNoise(draw.maybe(1.0), draw.maybe(random, 0.2))
            assert type(noise.noise_multiplier) is float
            assert noise.noise_multiplier > 0
            sums = [torch.full((3,), draw.choice([0.0, 0.0, math.nan, math.inf])), torch.ones(2, 2)]
            clip_norm = draw.maybe(1.0, 0.7)
            [first, _] = noise.add(sums, clip_norm)
            assert torch.isfinite(first).all()
            if clip_norm * noise.noise_multiplier > 1e-200:
                assert not torch.equal(first, torch.zeros(3).double())  # there is noise
        case 2:
            found = dpml.Clipping(draw.maybe(1.0), draw.maybe("flat"))
            assert type(found.norm) is float
            assert 0 < found.norm < math.inf
        case 3:
            values = [draw.maybe(good, 0.3) for good in (1.0, 0.5, 8, 4.0)]
            adaptive = dpml.AdaptiveClipping(*values)
            valid(adaptive.event)
            adaptive.update(0.0, random)
            assert 0 < adaptive.norm < math.inf
            adaptive.count(draw.maybe(ClippedSum([], 0.0), 0.8))
        case 4:
            average = dpml.WeightAverage(draw.maybe(nn.Linear(2, 2), 0.3), draw.maybe(0.9))
            average.update(nn.Linear(2, 2))
            assert torch.isfinite(next(average.model.parameters())).all()
        case 5:
            examples = dpml.Examples(_some_data(draw), draw.maybe(8), 0, torch.device("cpu"), draw.maybe(1))
            assert len(examples) > 0
        case 6:
            parameters = [nn.Parameter(torch.zeros(3))]
            divisor = draw.junk()
            dpml.set_gradients(parameters, [torch.ones(3)], divisor)
            assert parameters[0].grad is not None
            assert torch.isfinite(parameters[0].grad).all()
            assert (parameters[0].grad >= 0).all()
        case 7:
            sampler = dpml.PoissonSampler(50, 0.1, random)
            noise = dpml.GaussianNoise(1.0, random)
            engine = draw.choice([dpml.BookKeepingEngine, dpml.OpacusEngine])()
            parts = [sampler, dpml.Clipping(1.0), noise, engine]
            parts[draw.randrange(4)] = draw.junk()
            mechanism = dpml.SampledGaussianMechanism(*parts)
            valid(mechanism.plan(draw.maybe(3)))
        case _:
            model = dpml.build(draw.maybe("mlp"), draw.maybe((4,)), draw.maybe(2))
            assert isinstance(model, nn.Module)


@target("dpml: randomness", 4)
def _randomness(draw: Draw) -> None:
    if draw.random() < 0.5:
        random = dpml.Randomness.from_seed(draw.maybe(3), draw.maybe("noise", 0.3))
    else:
        state = dpml.Randomness.from_seed(3, "noise").state()
        random = dpml.Randomness.secret()
        random.restore(draw.maybe(draw.one_wrong(state)[0], 0.1))
    assert type(random.is_secret) is bool
    before = random.state()["position"]
    count = draw.maybe(3)
    if isinstance(count, int) and 10**6 < count <= 10**15:
        return  # asked for, though nobody can wait for it
    drawn = random.words(count) if draw.random() < 0.5 else random.normals(count)
    assert len(drawn) == count
    assert type(before) is int
    assert random.state()["position"] >= before + count
    again = dpml.Randomness.secret()
    again.restore(random.state())
    assert (again.words(4) == random.words(4)).all()  # not one that was used before


@target("dpml: from_arrays", 6)
def _arrays(draw: Draw) -> None:
    rng = np.random.default_rng(0)
    good: dict[str, Any] = {
        "x_train": rng.normal(size=(6, 4)).astype("f4"),
        "y_train": np.array([0, 1, 0, 1, 2, 2]),
        "x_test": rng.normal(size=(4, 4)).astype("f4"),
        "y_test": np.array([0, 1, 2, 0]),
        "classes": None,
    }
    name = draw.choice(sorted(good))
    if draw.random() < 0.5 or name == "classes":
        good[name] = draw.junk()
    else:
        kind = draw.choice(["f2", "f8", "i1", "u8", "b", "c8", "O", "U3", "S3", "M8[s]", "m8[s]", "V4", "g"])
        good[name] = good[name].astype("i8").astype(kind)
        if draw.random() < 0.5:
            good[name] = good[name].reshape(draw.choice([(-1,), (-1, 1), (-1, 2), (1, -1), (-1, 1, 2)]))
    data = from_arrays("own", **good)
    assert data.x_train.dtype == torch.float32
    assert torch.isfinite(data.x_train).all()
    assert torch.isfinite(data.x_test).all()
    assert data.y_train.dtype == torch.int64
    assert type(data.classes) is int
    assert data.classes >= 2
    assert 0 <= int(data.y_train.min()) <= int(data.y_train.max()) < data.classes


@target("dpml: load", 1)
def _load(draw: Draw) -> None:
    name = draw.maybe("digits", 0.7)
    data = dpml.load(name, classes=draw.maybe(None, 0.3), image_size=draw.maybe(None, 0.3))
    assert name == "digits"
    assert data.classes == 10


@target("dpml: sweep", 1)
def _sweep(draw: Draw) -> None:
    axes = {"epsilon": [1, draw.maybe(3)], "delta": [1e-5], "epochs": draw.maybe([1], 0.2)}
    good = {"recipe": "dpsgd-digits", "output": "sweep", "axes": axes, "seeds": 2, "processes": 1}
    values, name = draw.one_wrong(good) if draw.random() < 0.7 else (good, "")
    junk = values["output"]
    if name == "recipe" and callable(values[name]):
        return  # what somebody's own function raises is theirs
    if isinstance(junk, str | os.PathLike) and str(junk).startswith(("/", "..")):
        return  # write nowhere else
    if isinstance(values["seeds"], int) and 1000 < values["seeds"] <= 10**15:
        return  # many runs, which somebody may ask for
    with stopped_at_training():
        sweep(**values)


@target("dpml: predictor, verify, names", 2)
def _folders(draw: Draw) -> None:
    match draw.randrange(3):
        case 0:
            dpml.PrivatePredictor(draw.junk(), budget=draw.maybe(PrivacyBudget(1.0, 1e-5)))
        case 1:
            verify_run(draw.junk(), seconds=draw.maybe(1.0))
        case _:
            accountant = PrivacyAccountant("rdp", budget=PrivacyBudget(2.0, 1e-5))
            with accountant.reserve(Repeated(Gaussian(30.0), 2)) as reservation:
                random = dpml.Randomness.from_seed(0, "test")
                mechanism = dpml.SampledGaussianMechanism(
                    dpml.PoissonSampler(50, 0.1, random),
                    dpml.Clipping(1.0),
                    dpml.GaussianNoise(1.0, random),
                    dpml.BookKeepingEngine(),
                )
                mechanism.release(copy.copy(draw.junk()), draw.maybe(reservation))
    raise AssertionError("nothing of this is what it should be")
