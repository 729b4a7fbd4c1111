"""The clipped sum is that of single examples when layers share weights, are used again or are left out."""

import pytest
import torch
from one_example_at_a_time import (
    KERNEL,
    PORTABLE,
    assert_is_the_sum_of_single_examples,
    difference,
    micro_batch,
    targets_for,
    weighted,
)
from torch import nn

from accounting.errors import UserError
from dpml import models
from dpml.gradients import Clipping
from dpml.gradients.rules import trained
from dpml.models.layers import StandardizedConv2d
from dpml.models.transformer import TransformerClassifier

both = pytest.mark.parametrize("engine", [KERNEL, PORTABLE], ids=["kernel", "portable"])


class Steps(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.steps = forward

    def forward(self, x):
        return self.steps(self, x)


def tied(first, second, *names):
    """The same parameters in two layers."""
    for name in names:
        setattr(second, name, getattr(first, name))
    return {"first": first, "second": second}


def in_turn(m, x):
    return m.second(torch.tanh(m.first(x)))


def decoder():
    embed, mix, out = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7)
    out.weight = embed.weight
    return Steps(lambda m, x: m.out(torch.tanh(m.mix(m.embed(x)))), embed=embed, mix=mix, out=out)


def two_tables():
    layers = tied(nn.Embedding(6, 4), nn.Embedding(6, 4, padding_idx=2), "weight")
    return Steps(lambda m, x: m.first(x) * torch.tanh(m.second(x.flip(1))), **layers)


def several_times(layer, times=3):
    def again(m, x):
        for _ in range(times):
            x = torch.tanh(m.layer(x))
        return x

    return Steps(again, layer=layer)


class Power(nn.Module):
    """A layer without a rule."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return torch.sigmoid(x) * self.scale


class InPlace(nn.Module):
    """An activation that overwrites the output of the layer before it."""

    def forward(self, x):
        return x.mul_(0.5).tanh_()


def floats(*shape):
    return lambda n: torch.randn(n, *shape)


def tokens(length):
    return lambda n: torch.randint(0, 6, (n, length))


NETWORKS = {
    "embedding and decoder": (decoder, tokens(5)),
    "embedding and decoder, one token": (decoder, tokens(1)),
    "two tables": (two_tables, tokens(4)),
    "one table twice": (
        lambda: Steps(lambda m, x: m.table(x).tanh() * m.table(x + 1), table=nn.Embedding(7, 4)),
        tokens(3),
    ),
    "two linear layers, one weight": (
        lambda: Steps(in_turn, **tied(nn.Linear(5, 5), nn.Linear(5, 5), "weight")),
        floats(5),
    ),
    "two linear layers, one weight and bias": (
        lambda: Steps(in_turn, **tied(nn.Linear(5, 5), nn.Linear(5, 5), "weight", "bias")),
        floats(3, 5),
    ),
    "two linear layers, one weight and one bias": (
        lambda: Steps(in_turn, **tied(nn.Linear(5, 5), nn.Linear(5, 5, bias=False), "weight")),
        floats(3, 5),
    ),
    "a sequence, then one position": (
        lambda: Steps(lambda m, x: m.layer(torch.tanh(m.layer(x)).mean(1)), layer=nn.Linear(5, 5)),
        floats(4, 5),
    ),
    "a linear layer and its transpose": (
        lambda: Steps(
            lambda m, x: nn.functional.linear(m.first(x).tanh(), m.second.weight.T[:3, :3]) + m.second(x),
            first=nn.Linear(5, 3),
            second=nn.Linear(5, 3).requires_grad_(False),
        ),
        floats(5),
    ),
    "a convolution and a linear layer, one bias": (
        lambda: Steps(
            lambda m, x: m.second(torch.tanh(m.first(x)).flatten(2).mean(2)),
            **tied(nn.Conv2d(3, 3, 3), nn.Linear(3, 3), "bias"),
        ),
        floats(3, 5, 5),
    ),
    "two convolutions, one weight": (
        lambda: Steps(
            in_turn, **tied(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, stride=2, bias=False), "weight")
        ),
        floats(3, 6, 6),
    ),
    "linear several times": (lambda: several_times(nn.Linear(6, 6)), floats(6)),
    "linear over a sequence several times": (lambda: several_times(nn.Linear(6, 6)), floats(70, 6)),
    "convolution several times": (lambda: several_times(nn.Conv2d(4, 4, 3, padding=1)), floats(4, 5, 5)),
    "standardised convolution several times": (
        lambda: several_times(StandardizedConv2d(4, 4, 3, padding=1)),
        floats(4, 5, 5),
    ),
    "normalisation several times": (lambda: several_times(nn.GroupNorm(2, 4)), floats(4, 5)),
    "layer without a rule several times": (lambda: several_times(Power(4)), floats(4)),
    "in place": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), InPlace(), nn.Flatten(), nn.Linear(36, 5), InPlace()),
        floats(2, 5, 5),
    ),
    "rectified in place": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4), nn.ELU(inplace=True)),
        floats(5),
    ),
    "added in place": (
        lambda: Steps(lambda m, x: m.a(x).add_(m.b(x)).mul_(2), a=nn.Linear(5, 4), b=nn.Linear(5, 4)),
        floats(5),
    ),
    "overwritten input of a layer whose bias alone is trained": (
        lambda: Steps(lambda m, x: m.b(m.a(x)) + m.a(x).mul_(3), a=nn.Linear(5, 4), b=frozen(4, 4, "weight")),
        floats(5),
    ),
    "an output that is not used": (
        lambda: Steps(lambda m, x: (m.a(x), m.b(x))[1], a=nn.Linear(5, 4), b=nn.Linear(5, 4)),
        floats(5),
    ),
    "a layer that is not called": (
        lambda: Steps(lambda m, x: m.b(x), a=nn.Conv2d(5, 4, 3), b=nn.Linear(5, 4)),
        floats(5),
    ),
    "an output that is cut off": (
        lambda: Steps(lambda m, x: m.a(x).detach() * m.b(x), a=nn.Linear(5, 4), b=nn.Linear(5, 4)),
        floats(5),
    ),
    "a part of an output": (
        lambda: Steps(lambda m, x: m.a(x)[:, 1:3], a=nn.Linear(5, 4)),
        floats(5),
    ),
    "residual connections": (
        lambda: Steps(
            lambda m, x: x + m.second(torch.tanh(x + m.first(x))),
            first=nn.Linear(5, 5),
            second=nn.Linear(5, 5),
        ),
        floats(6, 5),
    ),
    "weights frozen, biases trained": (lambda: partly_frozen("weight"), floats(4, 6, 6)),
    "biases frozen, weights trained": (lambda: partly_frozen("bias"), floats(4, 6, 6)),
    "normalisation without parameters": (
        lambda: nn.Sequential(
            nn.Linear(5, 6),
            nn.LayerNorm(6, elementwise_affine=False),
            nn.GroupNorm(2, 6, affine=False),
            nn.Tanh(),
            nn.RMSNorm(6, elementwise_affine=False),
            nn.Linear(6, 3),
        ),
        floats(5),
    ),
    "attention": (lambda: TransformerClassifier(6, 5, 3, width=8, heads=2, hidden=12), tokens(5)),
    "cnn for MNIST": (lambda: models.build("cnn", (1, 28, 28), 10), floats(1, 28, 28)),
    "cnn for CIFAR": (lambda: models.build("cnn", (3, 32, 32), 10), floats(3, 32, 32)),
}


def frozen(inputs, outputs, *names):
    layer = nn.Linear(inputs, outputs)
    for name in names:
        getattr(layer, name).requires_grad_(False)
    return layer


def partly_frozen(name):
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3),
        nn.GroupNorm(2, 6),
        nn.Tanh(),
        StandardizedConv2d(6, 4, 3),
        nn.Flatten(2),
        nn.Linear(4, 5),
        nn.LayerNorm(5),
    )
    for layer in model:
        if name in trained(layer):
            getattr(layer, name).requires_grad_(False)
    return model


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(("make", "draw"), NETWORKS.values(), ids=NETWORKS)
def test_the_clipped_sum_is_that_of_single_examples(make, draw, views):
    torch.manual_seed(1)  # no two numbers of a maximum are so close that float32 cannot tell them apart
    model, x = make(), draw(4 * views)
    assert_is_the_sum_of_single_examples(model, x, targets_for(model, x), views=views, scales=(0.5, 1.0))


def test_the_clipped_sum_of_a_wide_residual_network_is_that_of_single_examples():
    torch.manual_seed(0)
    model, x = models.build("wrn-16-4", (3, 32, 32), 10), torch.randn(2, 3, 32, 32)
    # float32 rounds in each of its 16 layers.
    assert_is_the_sum_of_single_examples(model, x, targets_for(model, x), modes=["flat"], single=1e-4)


@both
def test_an_input_that_is_overwritten_after_a_layer_without_a_rule(engine):
    torch.manual_seed(0)

    def in_place(m, x):
        h = m.a(x)
        h += m.b(h)
        return h

    model, x = Steps(in_place, a=nn.Linear(5, 4), b=Power(4)), torch.randn(3, 5)
    y = targets_for(model, x)
    with pytest.raises(UserError, match="overwritten"):
        engine.clipped_sum(model, weighted, [micro_batch(x, y)], Clipping(1e6))


@both
@pytest.mark.parametrize("bad", [0, 1, 5])
def test_a_bad_view_takes_its_example_with_it_and_nothing_else(engine, bad):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))
    x = torch.randn(8, 2, 5, 5)
    y = targets_for(model, x)
    spoilt = x.clone()
    spoilt[bad, 0, 2, 2] = torch.nan
    mask = torch.arange(4) != bad // 2
    for mode in ("flat", "per-layer", "automatic"):
        wanted = engine.clipped_sum(model, weighted, [micro_batch(x, y, 2, mask)], Clipping(0.1, mode))
        got = engine.clipped_sum(model, weighted, [micro_batch(spoilt, y, 2)], Clipping(0.1, mode))
        assert difference(got.gradients, wanted.gradients) <= 1e-7
        assert got.diagnostics["non_finite"] == 1
