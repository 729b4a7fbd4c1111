"""The average of the weights is what is released and measured, and it costs nothing."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accounting import UserError
from dpml.averaging import WeightAverage
from dpml.config import DPSGDConfig
from dpml.dpsgd import train_dpsgd
from dpml.report import accuracy


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def records(n=60, seed=0):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0] > 0).long())


def train(tmp_path=None, *, stop_at=None, rate=0.5, **changed):
    """Train a linear model of zeros; its result, and the weights after every step."""
    settings = {
        "noise_multiplier": 1.0,
        "delta": 1e-3,
        "epochs": 4,
        "batch_size": 10,
        "insecure_noise_seed": 1,
    }
    trail = []

    class Optimizer(torch.optim.SGD):
        def step(self, closure=None):
            if len(trail) == stop_at:
                raise KeyboardInterrupt
            super().step(closure)
            trail.append(flat(model))

    model = nn.Linear(4, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    result = train_dpsgd(
        model,
        records(),
        DPSGDConfig(**{**settings, **changed}),
        test_set=records(40, seed=1),
        make_optimizer=lambda parameters: Optimizer(parameters, lr=rate),
        output=tmp_path,
    )
    assert result.model is model
    return result, trail


def averaged(trail, decay):
    """From zeros, by the recursion of De et al. 2022."""
    mean = torch.zeros_like(trail[0]).double()
    for t, weights in enumerate(trail):
        d = min(decay, (1 + t) / (10 + t))
        mean = d * mean + (1 - d) * weights.double()
    return mean


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_the_released_model_is_the_average_of_the_steps(tmp_path, decay):
    result, trail = train(tmp_path / "a", average=decay)
    assert len(trail) == 25
    trail = trail[1:]  # the first was a trial with zeros, to see whether the optimizer can be kept
    torch.testing.assert_close(flat(result.model).double(), averaged(trail, decay), rtol=1e-5, atol=1e-6)
    assert (flat(result.model) - trail[-1]).abs().max() > 1e-3
    kept = safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")
    assert torch.equal(kept["weight"], result.model.weight)
    assert torch.equal(kept["bias"], result.model.bias)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text("utf-8"))
    assert summary["config"]["average"] == decay
    assert summary["test_accuracy"] == accuracy(result.model, records(40, seed=1))


def test_training_goes_on_with_the_weights_themselves_and_costs_the_same():
    (with_it, trail), (without, plain) = train(average=0.9), train()
    assert all(torch.equal(a, b) for a, b in zip(trail, plain, strict=True))
    assert torch.equal(flat(without.model), plain[-1])
    assert with_it.planned == without.planned
    assert with_it.committed == without.committed
    assert with_it.epsilon == without.epsilon


def test_a_stopped_run_releases_the_average_so_far():
    result, trail = train(average=0.9, stop_at=7)
    assert result.status == "stopped"
    torch.testing.assert_close(flat(result.model).double(), averaged(trail, 0.9), rtol=1e-5, atol=1e-6)
    assert result.summary["test_accuracy"] == accuracy(result.model, records(40, seed=1))


def test_weights_that_are_not_finite_are_noticed_through_the_average():
    result, _ = train(average=0.9999, rate=3e38, noise_multiplier=100.0)
    assert result.status == "diverged"


def test_without_privacy_too():
    result, trail = train(average=0.9, non_private=True, noise_multiplier=None, delta=None)
    torch.testing.assert_close(flat(result.model).double(), averaged(trail, 0.9), rtol=1e-5, atol=1e-6)


def test_buffers_follow_and_a_tied_weight_is_averaged_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.second.weight = self.first.weight
            self.register_buffer("scale", torch.zeros(3))
            self.register_buffer("count", torch.tensor(0))

    model = Net()
    average = WeightAverage(model, 0.9)
    before = model.first.weight.detach().clone()
    with torch.no_grad():
        model.first.weight += 1
        model.scale += 1
        model.count += 5
    average.update(model)
    assert average.model.second.weight is average.model.first.weight
    torch.testing.assert_close(average.model.first.weight.detach(), before + 0.9)  # decay (1 + 0)/(10 + 0)
    torch.testing.assert_close(average.model.scale, torch.full((3,), 0.9))
    assert int(average.model.count) == 5
    average.copy_to(model)
    torch.testing.assert_close(model.first.weight.detach(), before + 0.9)
    assert model.first.weight.requires_grad


@pytest.mark.parametrize("decay", [1.0, -0.1, np.nan, None, "0.9"])
def test_a_decay_that_is_none_gets_one_line(decay):
    with pytest.raises(UserError, match="'average' parameter of a run") as raised:
        DPSGDConfig(noise_multiplier=1.0, delta=1e-5, average=decay)
    assert "\n" not in str(raised.value)
