"""One example moves the clipped sum by at most C·(1 + 1e-5), in float32, whatever the others are.

Either the example is masked in its place, or it is removed and the later ones move up. Beside a test is the
worst excess over C, as a multiple of C, that was measured on an x86-64 processor with AVX-512.
"""

import math

import pytest
import torch
from one_example_at_a_time import KERNEL, PORTABLE, difference, length, micro_batch, targets_for, weighted
from torch import nn

from dpml import models
from dpml.gradients import Clipping
from dpml.gradients.engine import CLIPPING_MODES
from dpml.models.layers import StandardizedConv2d
from dpml.models.transformer import TransformerClassifier

both = pytest.mark.parametrize("engine", [KERNEL, PORTABLE], ids=["kernel", "portable"])
modes = pytest.mark.parametrize("mode", CLIPPING_MODES)
SLACK = 1e-5


def signed(outputs, signs):
    """A loss whose gradient for an output is its sign, so that gradients of all examples point one way."""
    return (outputs * signs).flatten(1).sum(dim=1)


def clipped_sum(engine, model, loss, x, y, clipping, mask=None):
    return engine.clipped_sum(model, loss, [micro_batch(x, y, mask=mask)], clipping).gradients


def excess(engine, model, loss, x, y, clipping, which):
    """How far one of these examples moves the sum, masked in its place or removed: the largest ‖·‖/C − 1."""
    n = len(y)
    full = clipped_sum(engine, model, loss, x, y, clipping)
    worst = -1.0
    for i in which:
        others = torch.arange(n) != i
        masked = clipped_sum(engine, model, loss, x, y, clipping, others)
        worst = max(worst, difference(full, masked) / clipping.norm - 1)
        if n > 1:
            removed = clipped_sum(engine, model, loss, x[others], y[others], clipping)
            worst = max(worst, difference(full, removed) / clipping.norm - 1)
    return worst


def ends(n):
    return sorted({0, n // 2, n - 1})


# ---------------------------------------------------------------- large layers, aligned gradients


def image(*shape):
    return lambda n: 1 + 0.5 * torch.rand(n, *shape)


LAYERS = {
    "linear 3,585": (lambda: nn.Linear(3585, 2), image(3585), 257),
    "linear 15,552": (lambda: nn.Linear(15_552, 2), image(15_552), 129),
    "linear 20,001": (lambda: nn.Linear(20_001, 1), image(20_001), 129),
    "linear of many outputs": (lambda: nn.Linear(5, 4001), image(5), 257),
    "linear over a sequence": (lambda: nn.Linear(65, 33), image(40, 65), 257),
    "linear over a long sequence of few": (lambda: nn.Linear(3, 2), image(1501, 3), 129),
    "linear over two positions": (lambda: nn.Linear(301, 203), image(2, 301), 129),
    "embedding": (lambda: nn.Embedding(3001, 40), lambda n: torch.randint(0, 9, (n, 50)), 257),
    "convolution of many positions": (lambda: nn.Conv2d(3, 8, 3, padding=1), image(3, 48, 48), 65),
    "convolution of one channel": (lambda: nn.Conv2d(1, 16, 8, 2, 2), image(1, 28, 28), 257),
    "convolution of wide patches": (lambda: nn.Conv2d(129, 17, 3), image(129, 5, 5), 65),
    "grouped convolution": (lambda: nn.Conv2d(8, 16, 3, groups=8), image(8, 9, 9), 257),
    "standardised convolution": (lambda: StandardizedConv2d(16, 17, 3), image(16, 8, 8), 129),
    "group normalisation": (lambda: nn.GroupNorm(2, 64), image(64, 9, 9), 257),
    "layer normalisation": (lambda: nn.LayerNorm(501), image(5, 501), 257),
}


def aligned(make, draw, n, kind, scale):
    """A layer, and n examples whose gradients are the same, nearly the same or just any."""
    torch.manual_seed(0)
    layer, x = make(), draw(n)
    if kind != "any":
        x = x[:1].expand_as(x).clone()
    if kind == "nearly the same" and x.is_floating_point():
        x *= 1 + 1e-6 * torch.randn_like(x)
    y = scale * torch.ones_like(layer(x)) if kind != "any" else scale * targets_for(layer, x)
    return layer, x, y


# Worst: 2.5e-6 masked, 2.2e-6 removed.
@both
@pytest.mark.parametrize("kind", ["the same", "nearly the same", "any"])
@pytest.mark.parametrize(("make", "draw", "most"), LAYERS.values(), ids=LAYERS)
def test_one_example_of_a_large_layer_moves_the_sum_by_at_most_the_clip_norm(engine, make, draw, most, kind):
    layer, x, y = aligned(make, draw, most, kind, 1.0)
    for mode in ("flat", "automatic") if kind == "the same" else ("flat",):
        clipping = Clipping(0.01, mode)  # far below all norms
        moved = excess(engine, layer, signed, x, y, clipping, ends(most)[:2])
        assert moved <= SLACK
        # The test can fail: in its place an example adds all that it may.
        assert moved >= -(1e-3 if mode == "flat" else 0.5)


THREE = {
    "linear": (lambda: nn.Linear(301, 2), image(301)),
    "linear over a sequence": (lambda: nn.Linear(17, 9), image(6, 17)),
    "convolution": (lambda: nn.Conv2d(3, 5, 3), image(3, 6, 6)),
}


# Worst: 2.3e-6 masked, 2.1e-6 removed.
@both
@modes
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("n", [1, 3, 63, 65, 127, 129, 257])
def test_the_batch_may_have_any_size_and_gradients_any_scale(engine, n, scale, mode):
    for make, draw in THREE.values():
        layer, x, y = aligned(make, draw, n, "nearly the same", scale)
        for norm in (1.0, 1e-7):
            assert excess(engine, layer, signed, x, y, Clipping(norm, mode), ends(n)[-2:]) <= SLACK


# Worst: 7.7e-7 masked, 2.9e-6 removed.
@both
def test_a_large_batch_of_aligned_gradients(engine):
    for make, draw in THREE.values():
        layer, x, y = aligned(make, draw, 1023, "nearly the same", 1e6)
        for norm in (1.0, 1e-7):
            assert excess(engine, layer, signed, x, y, Clipping(norm), [511, 1022]) <= SLACK


# ---------------------------------------------------------------- cancelling gradients


def cancelling(n, positions, inputs, outputs, nearly):
    """Pairs of positions whose terms of the gradient cancel, but for a part of size `nearly`."""
    half = torch.randn(n, positions // 2, inputs)
    x = torch.cat([half, half * (1 + nearly * torch.randn_like(half))], dim=1)
    signs = torch.randn(n, positions // 2, outputs)
    order = torch.randperm(positions)
    return x[:, order], torch.cat([signs, -signs], dim=1)[:, order]


# Worst: 5.2e-7 with the kernel, 2.1e-6 without. With norms by Gram matrices alone it would be 99: the
# rounding of a squared norm is relative to (Σ‖xₜ‖‖gₜ‖)².
@both
@pytest.mark.parametrize("nearly", [0.0, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize(
    ("positions", "inputs", "outputs"), [(2, 300, 200), (8, 200, 300), (64, 40, 30), (4, 3, 2)]
)
def test_terms_that_cancel_move_the_sum_by_at_most_the_clip_norm(engine, nearly, positions, inputs, outputs):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    for n in (1, 9, 65):
        x, y = cancelling(n, positions, inputs, outputs, nearly)
        # Clip norms from far below what rounding leaves to far above.
        for norm in (1e-8, 1e-4, 1e-2, 1.0):
            assert excess(engine, layer, signed, x, y, Clipping(norm), ends(n)[:1]) <= SLACK


def others_that_cancel(kind, n, nearly):
    if kind == "embedding":
        half = torch.randn(n, 30, 20)
        y = torch.cat([half, -half * (1 + nearly * torch.randn_like(half))], dim=1)
        return nn.Embedding(50, 20), torch.randint(0, 50, (n, 30)).repeat(1, 2), y
    if kind == "convolution":
        x, half = torch.randn(n, 70, 2, 1).repeat(1, 1, 1, 2), torch.randn(n, 60, 2, 1)
        x[..., 1] *= 1 + nearly * torch.randn(n, 70, 2)
        return nn.Conv2d(70, 60, 1), x, torch.cat([half, -half], dim=3)
    if kind == "one layer twice":
        return Difference(1 + nearly), torch.randn(n, 50), torch.randn(n, 40)
    x, y = cancelling(n, 40, 20, 10, nearly)
    layer = nn.Linear(20, 10)
    layer.weight.requires_grad_(False)
    return layer, x, y * (1 + nearly * torch.randn_like(y))


# Worst: 7.2e-8 with the kernel, 1.5e-7 without.
@both
@pytest.mark.parametrize("nearly", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("kind", ["embedding", "convolution", "one layer twice", "bias alone"])
def test_terms_that_cancel_in_other_layers(engine, nearly, kind):
    torch.manual_seed(0)
    layer, x, y = others_that_cancel(kind, 33, nearly)
    for norm in (1e-8, 1e-6, 1e-4, 1e-2):
        assert excess(engine, layer, signed, x, y, Clipping(norm), ends(33)) <= SLACK


class Difference(nn.Module):
    """A layer applied twice to nearly the same, and subtracted."""

    def __init__(self, factor):
        super().__init__()
        self.layer, self.factor = nn.Linear(50, 40), factor

    def forward(self, x):
        return self.layer(x) - self.layer(self.factor * x)


# ---------------------------------------------------------------- networks

NETWORKS = {
    "cnn for MNIST": (lambda: models.build("cnn", (1, 28, 28), 10), lambda n: torch.rand(n, 1, 28, 28), 65),
    "cnn for CIFAR": (lambda: models.build("cnn", (3, 32, 32), 10), lambda n: torch.rand(n, 3, 32, 32), 9),
    "attention": (
        lambda: TransformerClassifier(40, 24, 3, width=32, hidden=48),
        lambda n: torch.randint(0, 40, (n, 24)),
        33,
    ),
}


# Worst: 1.6e-7.
@both
@modes
@pytest.mark.parametrize(("make", "draw", "n"), NETWORKS.values(), ids=NETWORKS)
def test_one_example_of_a_network_moves_the_sum_by_at_most_the_clip_norm(engine, make, draw, n, mode):
    torch.manual_seed(0)
    model, x = make(), draw(n)
    y = targets_for(model, x)
    for norm in (1e-3, 0.3):
        assert -0.6 <= excess(engine, model, weighted, x, y, Clipping(norm, mode), ends(n)[1:]) <= SLACK


# ---------------------------------------------------------------- one example that is out of all bounds


# Worst: what the others contribute moves by 2.4e-7·C.
@both
@modes
@pytest.mark.parametrize("where", ["input", "loss"])
@pytest.mark.parametrize("huge", [1e18, 1e25, 3e38, math.inf, math.nan])
@pytest.mark.parametrize("kind", ["wide", "sequence", "convolution", "normalised", "embedding"])
def test_an_example_out_of_all_bounds_leaves_the_sum_of_the_others_alone(engine, kind, huge, where, mode):
    torch.manual_seed(0)
    n, bad = 9, 4
    model, draw = {
        "wide": (nn.Linear(2001, 2), image(2001)),
        "sequence": (nn.Linear(40, 30), image(6, 40)),
        "convolution": (nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3)), image(3, 8, 8)),
        "normalised": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), image(3, 6, 6)),
        "embedding": (nn.Embedding(9, 5), lambda n: torch.randint(0, 9, (n, 7))),
    }[kind]
    x = draw(n)
    y = targets_for(model, x)
    clipping = Clipping(0.01, mode)
    others = torch.arange(n) != bad
    wanted = clipped_sum(engine, model, signed, x, y, clipping, others)
    spoilt, spoilt_y = x.clone(), y.clone()
    if where == "input" and x.is_floating_point():
        spoilt[bad] = huge
    else:
        spoilt_y[bad] = huge
    got = clipped_sum(engine, model, signed, spoilt, spoilt_y, clipping)
    masked = clipped_sum(engine, model, signed, spoilt, spoilt_y, clipping, others)
    assert all(bool(torch.isfinite(g).all()) for g in got)
    assert difference(got, wanted) <= clipping.norm * (1 + SLACK)
    assert difference(masked, wanted) == 0
    # What it adds has one direction: that of its own clipped gradient, alone.
    alone = clipped_sum(engine, model, signed, spoilt, spoilt_y, clipping, ~others)
    assert difference(got, [a + b for a, b in zip(alone, wanted, strict=True)]) <= SLACK * clipping.norm
    assert length(alone) <= clipping.norm * (1 + SLACK)
