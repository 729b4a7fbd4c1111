import math

import pytest
import torch
from opacus.validators import ModuleValidator

from accounting.errors import UserError
from dpml.models import MODELS, build

IMAGES = [
    (1, 28, 28),
    (3, 32, 32),
    (1, 8, 8),
    (3, 8, 8),
    (1, 4, 4),
    (2, 4, 60),
    (1, 19, 19),
    (1, 20, 20),
    (3, 20, 21),
    (1, 20, 90),
    (2, 28, 28),
    (3, 27, 50),
    (4, 64, 64),
    (1, 96, 96),
    (81, 7, 7),
    (243, 8, 4),
    (243, 4, 2),
    (6, 40, 4),
]
FLAT = [(1,), (30,), (5, 7), (1, 3, 3), (2, 3, 4, 5)]
ALL = [
    *[(name, shape) for name in ("cnn", "mlp", "linear", "linear-without-bias") for shape in IMAGES],
    *[(name, shape) for name in ("mlp", "linear", "linear-without-bias") for shape in FLAT],
    *[("wrn-16-4", shape) for shape in [(3, 32, 32), (1, 28, 28), (1, 16, 16), (2, 17, 40)]],
]

everywhere = pytest.mark.parametrize(("name", "shape"), ALL)


@everywhere
@pytest.mark.parametrize("n", [0, 1, 3])
def test_logits_for_any_shape_and_batch(name, shape, n):
    assert build(name, shape, classes=7)(torch.rand(n, *shape)).shape == (n, 7)


@everywhere
def test_valid_for_per_example_gradients(name, shape):
    assert ModuleValidator.validate(build(name, shape, classes=3), strict=True) == []


@everywhere
def test_examples_do_not_mix(name, shape):
    x = torch.rand(3, *shape, requires_grad=True)
    build(name, shape, classes=3)(x)[1].square().sum().backward()
    assert x.grad[0].abs().max() == 0
    assert x.grad[1].abs().max() > 0
    assert x.grad[2].abs().max() == 0


@everywhere
def test_every_parameter_has_a_gradient(name, shape):
    model = build(name, shape, classes=3)
    torch.nn.functional.cross_entropy(model(torch.rand(2, *shape)), torch.tensor([0, 2])).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("cnn", (1, 28, 28), 26_010),  # Papernot et al. 2020, MNIST
        ("cnn", (3, 32, 32), 550_570),  # Papernot et al. 2020, CIFAR-10
        ("cnn", (243, 8, 8), 187_210),  # Tramèr & Boneh 2021, CIFAR-10
        ("cnn", (1, 8, 8), 160 + 4_640 + 128 * 32 + 32 + 330),
        ("mlp", (1, 28, 28), 785 * 128 + 129 * 128 + 129 * 10),
        ("linear", (1, 28, 28), 7_850),
        ("linear", (30,), 310),
        ("linear-without-bias", (30,), 300),
        ("wrn-16-4", (3, 32, 32), 2_753_818),  # De et al. 2022
    ],
)
def test_number_of_parameters(name, shape, expected):
    assert sum(p.numel() for p in build(name, shape, classes=10).parameters()) == expected


def test_a_bias_takes_half_of_the_squared_norm():
    """Of a per-example gradient, for an input of norm 1: what the weights get is clipped by √2 more."""
    x, y = torch.nn.functional.normalize(torch.randn(1, 30)), torch.tensor([2])

    def gradients(model):
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        return [parameter.grad for parameter in model.parameters()]

    weight, bias = gradients(build("linear", (30,), 10))
    [alone] = gradients(build("linear-without-bias", (30,), 10))
    assert torch.equal(weight, alone)
    torch.testing.assert_close(weight.norm(), bias.norm())


def test_parameters_do_not_grow_with_the_image():
    def count(*shape):
        return sum(math.prod(p.shape) for p in build("cnn", shape, classes=10).parameters())

    assert count(1, 28, 28) == count(1, 96, 64)
    assert count(3, 32, 32) == count(3, 65, 128)
    assert count(243, 8, 8) == count(243, 24, 17)


@pytest.mark.parametrize("name", MODELS)
def test_the_callers_seed_decides_the_weights(name):
    def weights(seed):
        torch.manual_seed(seed)
        return torch.nn.utils.parameters_to_vector(build(name, (3, 32, 32), 10).parameters())

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_shape_may_be_a_torch_size():
    data = torch.zeros(5, 1, 8, 8)
    assert build("cnn", data.shape[1:], 2)(data).shape == (5, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cmn", (1, 8, 8), 10), ["'cmn'", "did you mean 'cnn'", "cnn, mlp, linear"]),
        (("CNN", (1, 8, 8), 10), ["'CNN'", "did you mean 'cnn'"]),
        (("resnet", (1, 8, 8), 10), ["'resnet'", "cnn, mlp, linear"]),
        (("cnn", (64,), 10), ["'cnn'", "(64,)", "mlp"]),
        (("cnn", (8, 8), 10), ["'cnn'", "(8, 8)"]),
        (("cnn", (1, 3, 8), 10), ["'cnn'", "(1, 3, 8)", "4×4"]),
        (("wrn-16-4", (1, 15, 28), 10), ["'wrn-16-4'", "(1, 15, 28)", "16×16"]),
        (("wrn-16-4", (64,), 10), ["'wrn-16-4'", "(64,)"]),
        (("mlp", (), 10), ["shape", "()"]),
        (("mlp", (0, 3), 10), ["shape", "(0, 3)"]),
        (("mlp", (2.0,), 10), ["shape", "(2.0,)"]),
        (("mlp", (2,), 1), ["at least 2", "1"]),
        (("mlp", (2,), 2.0), ["at least 2", "2.0"]),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(UserError) as raised:
        build(*arguments)
    message = str(raised.value)
    assert "\n" not in message
    assert all(word in message for word in words)
