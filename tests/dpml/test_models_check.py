"""Models that mix the examples of a batch are refused, in one line that names what is wrong."""

import copy

import pytest
import torch
from torch import nn

from accounting.errors import UserError
from dpml import models
from dpml.gradients import (
    Clipping,
    MicroBatch,
    OpacusEngine,
    cross_entropy,
    make_trainable,
    require_trainable,
)


class Do(nn.Module):
    """A layer that applies a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class BatchAttention(nn.Module):
    """Attention over the wrong dimension: each example attends to the others."""

    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return torch.softmax(self.query(x) @ self.key(x).transpose(-1, -2), dim=-1) @ self.value(x)


class Standardised(nn.Linear):
    """A subclass of a layer that is fine in itself."""

    def forward(self, x):
        y = super().forward(x)
        return (y - y.mean(dim=0)) / (1 + y.std(dim=0))


def chain(*layers):
    return nn.Sequential(nn.Linear(6, 6), *layers)


FLAT, IMAGE, SEQUENCE = torch.zeros(1, 6), torch.zeros(1, 2, 6, 6), torch.zeros(1, 5, 6)


def pixels(layer):
    return nn.Sequential(nn.Conv2d(2, 4, 3), layer, nn.Flatten(), nn.Linear(64, 3))


# ---------------------------------------------------------------- refused


NORMS = {
    "one dimension": lambda: (chain(nn.BatchNorm1d(6)), FLAT, "'1' (BatchNorm1d)"),
    "two dimensions": lambda: (pixels(nn.BatchNorm2d(4)), IMAGE, "'1' (BatchNorm2d)"),
    "three dimensions": lambda: (nn.Sequential(nn.BatchNorm3d(2)), None, "'0' (BatchNorm3d)"),
    "synchronised": lambda: (pixels(nn.SyncBatchNorm(4)), IMAGE, "'1' (SyncBatchNorm)"),
    "lazy": lambda: (chain(nn.LazyBatchNorm1d()), FLAT, "'1' (LazyBatchNorm1d)"),
    "not affine": lambda: (chain(nn.BatchNorm1d(6, affine=False)), FLAT, "'1' (BatchNorm1d)"),
    "no statistics": lambda: (
        chain(nn.BatchNorm1d(6, affine=False, track_running_stats=False)),
        FLAT,
        "'1' (BatchNorm1d)",
    ),
    "frozen": lambda: (chain(nn.BatchNorm1d(6).requires_grad_(False)), FLAT, "'1' (BatchNorm1d)"),
    "nested": lambda: (nn.Sequential(chain(nn.Sequential(nn.BatchNorm1d(6)))), FLAT, "'0.1.0' (BatchNorm1d)"),
    "a subclass": lambda: (chain(type("Mine", (nn.BatchNorm1d,), {})(6)), FLAT, "'1' (Mine)"),
    "the model itself": lambda: (nn.BatchNorm1d(6), FLAT, "'model' (BatchNorm1d)"),
}


@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("probe", [True, False], ids=["with an example", "without"])
def test_batch_normalisation_is_refused_by_name(case, training, probe):
    model, example, name = case()
    with pytest.raises(UserError) as raised:
        require_trainable(model.train(training), example if probe else None)
    message = str(raised.value)
    assert f"The layer {name} mixes the examples of a batch" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (pixels(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), "'1' (InstanceNorm2d)"),
        (nn.MultiheadAttention(6, 2), "'model' (MultiheadAttention)"),
        (nn.TransformerEncoderLayer(6, 2, 8), "'self_attn' (MultiheadAttention)"),
        (chain(nn.LSTM(6, 4)), "'1' (LSTM)"),
        (chain(nn.GRU(6, 4)), "'1' (GRU)"),
    ],
    ids=["instance norm with statistics", "attention", "transformer", "LSTM", "GRU"],
)
def test_layers_without_per_example_gradients_are_refused_by_name(model, name):
    with pytest.raises(UserError) as raised:
        require_trainable(model.train(), None)
    assert f"The layer {name} " in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_layer_with_parameters_and_buffers_is_refused_by_name():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(6, 6)
            self.register_buffer("seen", torch.zeros(()))

    with pytest.raises(UserError, match=r"'1' \(Counting\) has buffers"):
        require_trainable(chain(Counting()).train(), FLAT)


MIXING = {
    "centred": (chain(Do(lambda x: x - x.mean(dim=0))), FLAT),
    "scaled": (chain(Do(lambda x: x / (1 + x.std(dim=0)))), FLAT),
    "softmax over the batch": (chain(nn.Softmax(dim=0)), FLAT),
    "the example before": (chain(Do(lambda x: x + x.roll(1, dims=0))), FLAT),
    "the example after": (chain(Do(lambda x: x + x.roll(-1, dims=0))), FLAT),
    "a product with the batch": (chain(Do(lambda x: x @ x.T @ x)), FLAT),
    "attention over the batch": (BatchAttention(), FLAT),
    "the batch as channels": (
        chain(Do(lambda x: x[None]), nn.AvgPool2d((3, 1), stride=1, padding=(1, 0)), Do(lambda x: x[0])),
        FLAT,
    ),
    "a subclass of a good layer": (chain(Standardised(6, 3)), FLAT),
    "images": (pixels(Do(lambda x: x - x.mean(dim=(0, 2, 3), keepdim=True))), IMAGE),
    "without parameters of its own": (nn.Sequential(Do(lambda x: x - x.mean(0)), nn.Linear(6, 3)), FLAT),
}


@pytest.mark.parametrize(("model", "example"), MIXING.values(), ids=MIXING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_mixes_examples_is_refused(model, example, dtype):
    with pytest.raises(UserError) as raised:
        require_trainable(copy.deepcopy(model).train().to(dtype), example.to(dtype))
    assert "mixes the examples of a batch" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(7, 2),
        nn.Conv2d(1, 2, 3),
        nn.Embedding(3, 2),
        nn.Sequential(nn.Flatten(), Do(lambda x: x[:, 100])),
    ],
    ids=["width", "dimensions", "type", "index"],
)
def test_a_model_that_refuses_the_example_is_reported_in_one_line_with_its_reason(model):
    with pytest.raises(UserError, match=r"refuses inputs of shape \(2, 6\): ") as raised:
        require_trainable(model.train(), FLAT)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize("model", [None, 3, "cnn", nn.Linear, lambda x: x])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(UserError, match=r"must be a torch.nn.Module"):
        require_trainable(model, FLAT)


# ---------------------------------------------------------------- accepted


ACCEPTED = {
    "layer norm": (chain(nn.LayerNorm(6)), FLAT),
    "group norm": (pixels(nn.GroupNorm(2, 4)), IMAGE),
    "instance norm": (pixels(nn.InstanceNorm2d(4, affine=True)), IMAGE),
    "instance norm, not affine": (pixels(nn.InstanceNorm2d(4)), IMAGE),
    "dropout": (chain(nn.Dropout(0.5), nn.Linear(6, 3)), FLAT),
    "pooling": (pixels(nn.MaxPool2d(3, stride=1, padding=1)), IMAGE),
    "softmax over classes": (chain(nn.Softmax(dim=1)), FLAT),
    "embedding": (
        nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2)),
        torch.zeros(1, 3, dtype=torch.int64),
    ),
    "linear over a sequence": (nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), SEQUENCE),
    "attention within an example": (BatchAttention(), SEQUENCE),
    "sorting within an example": (chain(Do(lambda x: x.sort(dim=1).values)), FLAT),
    "a frozen first layer": (nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 2)), FLAT),
}


@pytest.mark.parametrize(("model", "example"), ACCEPTED.values(), ids=ACCEPTED)
def test_layers_that_treat_examples_independently_are_accepted(model, example):
    require_trainable(model.train(), example)
    require_trainable(model.train(), None)


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8)])
def test_the_models_that_come_with_dpml_are_accepted(name, shape):
    if name == "wrn-16-4" and min(shape[1:]) < 16:
        pytest.skip("too small for it")
    require_trainable(models.build(name, shape, 10).train(), torch.zeros(1, *shape))


def test_the_check_leaves_model_example_and_random_state_as_they_were():
    model = chain(nn.Dropout(0.5))
    example = torch.ones(1, 6)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    require_trainable(model.train(), example)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(example, torch.ones(1, 6))
    assert not example.requires_grad
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_the_values_of_the_example_do_not_matter():
    for example in (FLAT * torch.nan, FLAT + 1e30, FLAT - 1):
        require_trainable(chain(nn.LayerNorm(6)).train(), example)
        with pytest.raises(UserError, match="mixes"):
            require_trainable(MIXING["centred"][0].train(), example)


# ---------------------------------------------------------------- made trainable


@pytest.mark.parametrize(
    ("model", "example"),
    [(chain(nn.BatchNorm1d(6)), FLAT), (pixels(nn.BatchNorm2d(4)), IMAGE)],
    ids=["one dimension", "two dimensions"],
)
def test_batch_normalisation_is_replaced_in_a_copy(model, example):
    fixed = make_trainable(model).train()
    require_trainable(fixed, example)
    assert isinstance(fixed[1], nn.GroupNorm)
    assert isinstance(model[1], nn.modules.batchnorm._BatchNorm)
    assert torch.equal(fixed[0].weight, model[0].weight)
    assert fixed[0].weight is not model[0].weight


def test_a_model_that_was_made_trainable_trains():
    model = make_trainable(pixels(nn.BatchNorm2d(4))).train()
    batch = MicroBatch(torch.rand(3, 2, 6, 6), torch.tensor([0, 1, 2]), torch.ones(3, dtype=torch.bool))
    clipped = OpacusEngine().clipped_sum(model, cross_entropy, [batch], Clipping(1.0))
    assert all(bool(gradient.any()) for gradient in clipped.gradients[:2])


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("affine", [True, False])
def test_what_replaces_batch_normalisation_of_vectors_lets_them_through(width, affine):
    fixed = make_trainable(nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width, affine=affine)))
    outputs = fixed(torch.randn(50, 6))
    assert len(outputs.unique()) > 50 * width // 2, "groups of one or two numbers would leave 0 or ±1 of each"


def test_a_model_that_needs_no_fix_is_copied_as_it_is():
    model = chain(nn.LayerNorm(6))
    fixed = make_trainable(model)
    assert fixed is not model
    assert str(fixed) == str(model)
    assert all(torch.equal(a, b) for a, b in zip(fixed.parameters(), model.parameters(), strict=True))
