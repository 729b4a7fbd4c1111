"""The contract of layer rules: the clipped sum is that of single examples, for any settings of a layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_example_at_a_time import (
    assert_is_the_sum_of_single_examples,
    micro_batch,
    targets_for,
    weighted,
)
from opacus.layers import DPLSTM, DPMultiheadAttention
from opacus.layers.dp_rnn import RNNLinear
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from accounting.errors import UserError
from dpml.gradients import BookKeepingEngine, Clipping, require_trainable
from dpml.gradients.engine import CLIPPING_MODES
from dpml.gradients.per_example import Outer, Rows
from dpml.gradients.rules import RULES, rule
from dpml.models.layers import StandardizedConv2d

# PyTorch says once that 'same' may copy its input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

CASES = {}
"""From a layer's type to a function that draws one, and a row's shape or a function that draws rows."""


def case(*kinds):
    """Register a function of the layer's type and of a way to draw its settings."""

    def register(function):
        CASES.update(dict.fromkeys(kinds, function))
        return function

    return register


class Settings:
    """Draws the settings of a layer."""

    def __init__(self, data):
        self.data = data

    def number(self, low, high):
        return self.data.draw(st.integers(low, high))

    def numbers(self, n, low, high):
        return tuple(self.number(low, high) for _ in range(n))

    def one_of(self, *choices):
        return self.data.draw(st.sampled_from(choices))

    def flag(self):
        return self.data.draw(st.booleans())


# ---------------------------------------------------------------- layers with a rule


@case(nn.Linear, NonDynamicallyQuantizableLinear, RNNLinear)
def linear(kind, draw):
    between = draw.numbers(draw.number(0, 3), 1, 7)
    inputs, outputs = draw.one_of(1, 2, 5, 16, 33), draw.one_of(1, 3, 8, 20)
    return kind(inputs, outputs, bias=draw.flag()), (*between, inputs)


def convolution(kind, draw, dims, padding_modes=("zeros", "reflect", "circular", "replicate")):
    groups = draw.one_of(1, 1, 2, 3)
    inputs, outputs = groups * draw.one_of(1, 2, 5, 17), groups * draw.one_of(1, 2, 9)
    kernel, dilation = draw.numbers(dims, 1, 4 if dims < 3 else 2), draw.numbers(dims, 1, 2)
    padding = draw.one_of("same", "valid", "numbers", "numbers")
    stride = (1,) * dims if padding == "same" else draw.numbers(dims, 1, 3)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    shape = (inputs, *(max(3, span + draw.number(0, 4)) for span in spans))
    layer = kind(
        inputs,
        outputs,
        kernel,
        stride,
        draw.numbers(dims, 0, 2) if padding == "numbers" else padding,
        dilation,
        groups,
        bias=draw.flag(),
        padding_mode=draw.one_of(*padding_modes),
    )
    return layer, shape


@case(nn.Conv2d)
def conv2d(kind, draw):
    return convolution(kind, draw, 2)


@case(nn.Conv1d)
def conv1d(kind, draw):
    return convolution(kind, draw, 1)


@case(StandardizedConv2d)
def standardized(kind, draw):
    layer, shape = convolution(kind, draw, 2)
    with torch.no_grad():
        layer.gain.copy_(torch.rand_like(layer.gain) + 0.5)
        for channel in range(draw.number(0, min(2, layer.out_channels))):
            # The variance is held at its bound: a filter that is constant, or that varies very little.
            constant = torch.full_like(layer.weight[channel], 0.25)
            layer.weight[channel] = draw.one_of(constant, 1e-4 * torch.randn_like(constant))
    return layer, shape


@case(nn.Embedding)
def embedding(kind, draw):
    count, between = draw.number(2, 6), draw.numbers(draw.number(0, 2), 1, 7)
    layer = kind(count, draw.one_of(1, 4, 17), padding_idx=draw.one_of(None, 0, 1, -1))
    return layer, lambda rows: torch.randint(0, count, (rows, *between))


@case(nn.GroupNorm)
def group_norm(kind, draw):
    groups, positions = draw.number(1, 3), draw.numbers(draw.number(0, 3), 1, 4)
    channels = groups * draw.number(2, 4)
    return kind(groups, channels, eps=draw.one_of(1e-5, 0.1)), (channels, *positions)


@case(nn.LayerNorm)
def layer_norm(kind, draw):
    shape = (*draw.numbers(draw.number(0, 2), 1, 4), draw.number(3, 7))
    return kind(shape, eps=draw.one_of(1e-5, 0.1), bias=draw.flag()), (
        *draw.numbers(draw.number(0, 2), 1, 7),
        *shape,
    )


@case(nn.RMSNorm)
def rms_norm(kind, draw):
    shape = (*draw.numbers(draw.number(0, 2), 1, 4), draw.number(1, 7))
    return kind(shape, eps=draw.one_of(None, 1e-5, 0.1)), (*draw.numbers(draw.number(0, 2), 1, 7), *shape)


# ---------------------------------------------------------------- layers without a rule


class Custom(nn.Module):
    """Parameters of its own, one of them a scalar."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width))
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return torch.sigmoid(x) * self.scale / self.temperature


class Adapter(nn.Module):
    """A linear layer that is frozen, and a trained correction of low rank (Hu et al. 2022)."""

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.base = nn.Parameter(torch.randn(outputs, inputs), requires_grad=False)
        self.down = nn.Parameter(torch.randn(rank, inputs))
        self.up = nn.Parameter(torch.randn(outputs, rank))

    def forward(self, x):
        return x @ self.base.T + x @ self.down.T @ self.up.T


class Doubled(nn.Linear):
    """A subclass that computes something else, so the rule of its parent must not be used for it."""

    def forward(self, x):
        return 2 * super().forward(x)


@case(Custom)
def custom(kind, draw):
    width = draw.number(1, 5)
    return kind(width), (*draw.numbers(draw.number(0, 2), 1, 4), width)


@case(Adapter)
def adapter(kind, draw):
    inputs = draw.number(1, 9)
    return kind(inputs, draw.number(1, 9), draw.number(1, 3)), (
        *draw.numbers(draw.number(0, 1), 1, 7),
        inputs,
    )


@case(Doubled)
def doubled(kind, draw):
    inputs = draw.number(1, 5)
    return kind(inputs, draw.number(1, 5)), (*draw.numbers(draw.number(0, 1), 1, 7), inputs)


@case(nn.PReLU)
def prelu(kind, draw):
    channels = draw.number(1, 4)
    return kind(draw.one_of(1, channels)), (channels, *draw.numbers(draw.number(0, 2), 1, 4))


@case(nn.ConvTranspose2d)
def conv_transpose2d(kind, draw):
    groups = draw.number(1, 2)
    inputs, stride = groups * draw.number(1, 3), draw.numbers(2, 1, 2)
    layer = kind(
        inputs,
        groups * draw.number(1, 3),
        draw.numbers(2, 2, 3),
        stride,
        padding=draw.number(0, 1),
        groups=groups,
        bias=draw.flag(),
    )
    return layer, (inputs, *draw.numbers(2, 2, 4))


@case(nn.Conv3d)
def conv3d(kind, draw):
    return convolution(kind, draw, 3, padding_modes=("zeros",))


@case(nn.InstanceNorm1d)
def instance_norm(kind, draw):
    channels = draw.number(1, 3)
    return kind(channels, affine=True), (channels, draw.number(3, 6))


# ---------------------------------------------------------------- the contract


def laid_out(x, layout):
    """The same numbers, otherwise in memory."""
    if layout == "channels last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "with gaps":
        return torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]
    if layout == "reversed" and x.ndim > 1:
        return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    return x


def names(kinds):
    return [kind.__name__ for kind in kinds]


def test_every_rule_has_a_case():
    assert set(RULES) <= set(CASES), "each layer with a rule needs a case here"


@pytest.mark.parametrize("kind", CASES, ids=names(CASES))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_clipped_sum_is_that_of_single_examples(kind, data):
    draw = Settings(data)
    torch.manual_seed(draw.number(0, 99))
    layer, shape = CASES[kind](kind, draw)
    views, n = draw.number(1, 3), draw.number(1, 5)
    x = shape(n * views) if callable(shape) else torch.randn(n * views, *shape)
    x = laid_out(x, draw.one_of("plain", "channels last", "with gaps", "reversed"))
    y = targets_for(layer, x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    for parameter in trained[1:] if draw.flag() else trained[:-1]:
        parameter.requires_grad_(draw.flag())
    assert_is_the_sum_of_single_examples(
        layer, x, y, views=views, modes=[draw.one_of(*CLIPPING_MODES)], scales=[draw.one_of(0.3, 1.0, 3.0)]
    )


SEVERAL_TILES = {
    "many positions": (lambda: nn.Linear(70, 19), (301, 70)),
    "a few of the kernel's tiles": (lambda: nn.Conv2d(3, 20, 3, padding=1), (3, 17, 19)),
    "wide patches": (lambda: nn.Conv2d(130, 12, 3), (130, 9, 9)),
    "rows of patches between one vector and two": (lambda: nn.Conv2d(5, 7, (2, 5), padding=2), (5, 12, 13)),
    "rows of a whole vector": (lambda: nn.Conv2d(4, 9, 4, stride=2, padding=3), (4, 9, 11)),
    "dilated rows": (lambda: nn.Conv2d(4, 9, 3, dilation=(1, 3), padding=3), (4, 14, 13)),
    "whole vectors of channels": (lambda: nn.Conv2d(48, 24, 1), (48, 12, 13)),
    "parts of vectors of channels": (lambda: nn.Conv2d(50, 23, 1, bias=False), (50, 5, 5)),
    "positions left out between": (lambda: nn.Conv2d(50, 23, 1, stride=2), (50, 7, 7)),
    "one channel": (lambda: nn.Conv2d(1, 16, 8, stride=2, padding=2), (1, 28, 28)),
    "one dimension": (lambda: nn.Conv1d(40, 33, 5, padding=2), (40, 180)),
    "standardised": (lambda: StandardizedConv2d(17, 18, 3, padding=1), (17, 13, 12)),
}


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(("make", "shape"), SEVERAL_TILES.values(), ids=SEVERAL_TILES)
def test_the_clipped_sum_is_that_of_single_examples_for_large_layers(make, shape, views):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(3 * views, *shape)
    assert_is_the_sum_of_single_examples(
        layer, x, targets_for(layer, x), views=views, modes=["flat", "automatic"]
    )


# ---------------------------------------------------------------- standardised weights at the bound


@pytest.mark.parametrize("square", [1e-6, 0.9e-4, 1.1e-4, 1e-2])
def test_standardised_weights_on_both_sides_of_the_bound(square):
    layer, x = standardized_with(square), torch.randn(4, 2, 5, 5)
    assert_is_the_sum_of_single_examples(layer, x, targets_for(layer, x))


def test_standardised_weights_just_below_the_bound():
    layer, x = standardized_with(0.9995e-4), torch.randn(4, 2, 5, 5)
    assert_is_the_sum_of_single_examples(layer, x, targets_for(layer, x))


def standardized_with(square):
    """Filters whose centred weights have this sum of squares."""
    torch.manual_seed(0)
    layer = StandardizedConv2d(2, 3, 3)
    with torch.no_grad():
        w = layer.weight.double()
        w -= w.mean(dim=(1, 2, 3), keepdim=True)
        layer.weight.copy_(w * (square / w.square().sum(dim=(1, 2, 3), keepdim=True)).sqrt())
    return layer


# ---------------------------------------------------------------- layers of Opacus


class OverSequences(nn.Module):
    """The outputs of a layer that also returns something else."""

    def __init__(self, layer, inputs):
        super().__init__()
        self.layer, self.inputs = layer, inputs

    def forward(self, x):
        return self.layer(*[x] * self.inputs)[0]


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("steps", [1, 5, 6])
def test_attention_of_opacus(steps, views):
    torch.manual_seed(0)
    model, x = OverSequences(DPMultiheadAttention(4, 2, batch_first=True), 3), torch.randn(6, steps, 4)
    assert_is_the_sum_of_single_examples(model, x, targets_for(model, x), views=views)


@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent_layers_of_opacus(layers):
    torch.manual_seed(0)
    model, x = OverSequences(DPLSTM(3, 4, layers, batch_first=True), 1), torch.randn(4, 5, 3)
    assert_is_the_sum_of_single_examples(model, x, targets_for(model, x), modes=["flat", "automatic"])


# ---------------------------------------------------------------- layers that are refused


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Bilinear(3, 3, 2)

    def forward(self, x):
        return self.both(x, x)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x):
        return self.inner(input=x)


REFUSED = {
    "two inputs": (TwoInputs, (3,), "Bilinear"),
    "an input by name": (Keywords, (3,), "Linear"),
    "two outputs": (lambda: nn.GRU(3, 2, batch_first=True), (4, 3), "GRU"),
    "the batch in another place": (
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2)),
        (4, 3),
        "Linear",
    ),
}


@pytest.mark.parametrize(("make", "shape", "name"), REFUSED.values(), ids=REFUSED)
def test_layers_that_do_not_map_a_tensor_of_rows_to_another_are_refused_in_one_line(make, shape, name):
    model, x = make(), torch.randn(2, *shape)
    with pytest.raises(UserError, match=name) as raised:
        BookKeepingEngine().clipped_sum(
            model, lambda outputs, _: outputs.reshape(2, -1).sum(dim=1), [micro_batch(x, x)], Clipping(1.0)
        )
    assert "\n" not in str(raised.value)


def test_an_embedding_that_counts_over_the_batch_is_refused_in_one_line():
    layer, x = nn.Embedding(4, 3, scale_grad_by_freq=True), torch.tensor([[1, 1], [2, 3]])
    with pytest.raises(UserError, match="scale_grad_by_freq") as raised:
        BookKeepingEngine().clipped_sum(layer, weighted, [micro_batch(x, torch.ones(2, 2, 3))], Clipping(1.0))
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- a user's own rule


class Gated(nn.Module):
    """A linear layer and a gate for each output: σ(gate)·Wx."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs)
        self.gate = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.sigmoid(self.gate) * (x @ self.weight.T)


def gated_rule(layer, x, g, views):
    assert x.ndim == 2
    x, g = (t.unflatten(0, (-1, views)) for t in (x, g))
    open_by = torch.sigmoid(layer.gate.detach())
    gate = (g * (x @ layer.weight.detach().T) * open_by * (1 - open_by)).sum(dim=1)
    return [Outer(("weight",), x, g * open_by), Rows(("gate",), [gate])]


def half_of_the_gate(layer, x, g, views):
    weight, gate = gated_rule(layer, x, g, views)
    return [weight, Rows(("gate",), [0.5 * t for t in gate.rows()])]


def without_the_gate(layer, x, g, views):
    return gated_rule(layer, x, g, views)[:1]


def of_the_other_example(layer, x, g, views):
    weight, gate = gated_rule(layer, x, g, views)
    return [weight, Rows(("gate",), [t.flip(0) for t in gate.rows()])]


@pytest.fixture
def own_rules(monkeypatch):
    """Rules that are registered in a test are gone after it."""
    for kind in [Gated, nn.Linear]:
        monkeypatch.setitem(RULES, kind, RULES.get(kind))
    del RULES[Gated]


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.usefixtures("own_rules")
def test_a_rule_of_ones_own_is_used_and_kept_to_the_contract(views):
    used = []

    @rule(Gated)
    def own(layer, x, g, views):
        used.append(views)
        return gated_rule(layer, x, g, views)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Gated(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.randn(5 * views, 4)
    assert_is_the_sum_of_single_examples(model, x, targets_for(model, x), views=views)
    assert set(used) == {views}
    require_trainable(model, x, BookKeepingEngine())


@pytest.mark.parametrize("wrong", [half_of_the_gate, without_the_gate, of_the_other_example])
@pytest.mark.usefixtures("own_rules")
def test_a_wrong_rule_is_found_before_training(wrong):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Gated(4, 3)), torch.randn(2, 4)
    require_trainable(model, x, BookKeepingEngine())
    rule(Gated)(wrong)
    with pytest.raises(UserError, match=r"'2\.gate'"):
        require_trainable(model, x, BookKeepingEngine())


@pytest.mark.usefixtures("own_rules")
def test_a_rule_for_a_known_layer_replaces_the_rule_that_was_there():
    def never(*_):
        raise ValueError("planted")

    rule(nn.Linear)(never)
    with pytest.raises(UserError, match="planted"):
        require_trainable(nn.Linear(2, 2), torch.ones(2, 2), BookKeepingEngine())
