"""To be merged into test_models_check.py with the patch."""

import copy

import pytest
import torch
from opacus.layers import DPLSTM, DPMultiheadAttention
from test_gradients import MODELS, build, data
from test_models_check import ACCEPTED, FLAT, IMAGE, SEQUENCE, Do, chain, pixels
from torch import nn

from accounting.errors import UserError
from dpml.gradients import Clipping, MicroBatch, OpacusEngine, cross_entropy, require_trainable

TOKENS = torch.zeros(1, 2, dtype=torch.int64)


class Collector(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        with torch.no_grad():
            self.mean.copy_(x.mean(dim=0))
        return x


class RootWithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift, self.inner, self.position = nn.Parameter(torch.zeros(6)), nn.Linear(6, 6), nn.Module()
        self.position.register_buffer("table", torch.ones(6))

    def forward(self, x):
        return self.inner(x) + self.shift + self.position.table


class FunctionallyTied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)

    def forward(self, tokens):
        return nn.functional.linear(self.embed(tokens).mean(dim=1), self.embed.weight)


class OutputDropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        self.layer(2 * x)
        return self.layer(x)


class TwoInputs(nn.Module):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6, 6))

        def forward(self, x, z=None):
            return x @ self.weight + (0 if z is None else (z @ self.weight) ** 2)

    def __init__(self):
        super().__init__()
        self.layer = self.Layer()

    def forward(self, x):
        return self.layer(x, x**2)


def time_first(layers):
    return nn.Sequential(Do(lambda x: x.transpose(0, 1)), layers, Do(lambda x: x.transpose(0, 1).mean(dim=1)))


class Attending(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 8), nn.Linear(8, 2)
        self.attend = DPMultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x):
        h = self.embed(x)
        return self.out(self.attend(h, h, h, need_weights=False)[0].mean(dim=1))


class LastState(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.lstm, self.out = DPLSTM(6, 5, batch_first=batch_first), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


LEAKING = {
    "centred behind detach": (chain(Do(lambda x: x - x.mean(0).detach())), FLAT, "mixes the examples"),
    "ranked": (chain(Do(lambda x: x * x.argsort(0))), FLAT, "mixes the examples"),
    "mixed, then softmax": (
        chain(Do(lambda x: x - 2 * x.mean(0)), nn.Softmax(1)),
        FLAT,
        "mixes the examples",
    ),
    "mixed, outputs sum to zero": (
        chain(Do(lambda x: x - 2 * x.mean(0)), Do(lambda x: torch.cat([x, -x], dim=1))),
        FLAT,
        "mixes the examples",
    ),
    "tokens that are mixed": (
        nn.Sequential(nn.Embedding(5, 3), Do(lambda x: x - x.mean(0)), nn.Flatten(), nn.Linear(6, 2)),
        TOKENS,
        "mixes the examples",
    ),
    "attention over the batch": (Attending(batch_first=False), TOKENS, "mixes the examples"),
    "recurrence over the batch": (LastState(batch_first=False), SEQUENCE, "mixes the examples"),
    "embedding with max_norm": (
        nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Flatten(), nn.Linear(6, 2)),
        TOKENS,
        r"'0' \(Embedding\) rescales",
    ),
    "instance norm with statistics": (
        pixels(nn.InstanceNorm2d(4, track_running_stats=True)),
        IMAGE,
        r"'1' \(InstanceNorm2d\) keeps statistics",
    ),
    "a collecting buffer": (nn.Sequential(Collector(), nn.Linear(6, 2)), FLAT, "changes '0.mean'"),
    "time first, two steps": (time_first(nn.Linear(6, 4)), SEQUENCE[:, :2], "gradient of '1.weight'"),
    "time first": (time_first(nn.Linear(6, 4)), SEQUENCE, "cannot be had per example"),
    "a weight used without its layer": (FunctionallyTied(), TOKENS, "gradient of 'embed.weight'"),
    "an output that is dropped": (OutputDropped(), FLAT, "gradient of 'layer.weight'"),
    "a layer of two inputs": (TwoInputs(), FLAT, "gradient of 'layer.weight'"),
    "padding_idx": (
        nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Flatten(), nn.Linear(32, 3)),
        torch.zeros(1, 8, dtype=torch.int64),
        "gradient of '0.weight'",
    ),
    "circular padding": (
        nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Flatten()),
        IMAGE,
        "gradient of '0.weight'",
    ),
    "parameters beside buffers": (RootWithBuffers(), FLAT, r"'model' \(RootWithBuffers\) has buffers"),
    "no rule": (nn.Sequential(nn.EmbeddingBag(5, 3), nn.Linear(3, 2)), TOKENS, "cannot be had per example"),
}


@pytest.mark.parametrize(("model", "example", "words"), LEAKING.values(), ids=LEAKING)
def test_models_whose_gradients_are_not_those_of_single_examples_are_refused(model, example, words):
    with pytest.raises(UserError, match=words) as raised:
        require_trainable(copy.deepcopy(model).train(), example, OpacusEngine())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("model", "example"),
    [
        *ACCEPTED.values(),
        (chain(Do(lambda x: nn.functional.dropout(x, 0.5, True)), nn.Linear(6, 2)), FLAT),
        (Attending(batch_first=True), TOKENS),
        (LastState(batch_first=True), SEQUENCE),
    ],
)
def test_accepted_with_its_gradients(model, example):
    require_trainable(model.train(), example, OpacusEngine())


@pytest.mark.parametrize(("make", "draw"), MODELS.values(), ids=MODELS)
def test_every_model_of_the_engines_tests_is_accepted(make, draw):
    require_trainable(build(make), data(draw, 1)[0], OpacusEngine())


@pytest.mark.parametrize(
    ("name", "error"), [("parameters beside buffers", NotImplementedError), ("no rule", ValueError)]
)
def test_a_model_that_opacus_refuses_is_left_as_it_was(name, error):
    model = LEAKING[name][0]
    before = [sorted(vars(m)) for m in model.modules()], [sorted(vars(p)) for p in model.parameters()]
    batch = MicroBatch(TOKENS.expand(2, -1), torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool))
    for _ in range(2):
        with pytest.raises(error):
            OpacusEngine().clipped_sum(model, cross_entropy, [batch], Clipping(1.0))
        assert (
            [sorted(vars(m)) for m in model.modules()],
            [sorted(vars(p)) for p in model.parameters()],
        ) == before
