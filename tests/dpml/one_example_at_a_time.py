"""The sums that engines must give: plain backpropagation of one example after the other, in float64."""

import copy
import math

import torch
from torch import nn

from dpml.gradients import BookKeepingEngine, Clipping, MicroBatch
from dpml.gradients.engine import CLIPPING_MODES, trainable_parameters

PORTABLE, KERNEL = BookKeepingEngine(use_kernel=False), BookKeepingEngine()


def weighted(outputs, targets):
    """A smooth loss in which each output has a weight of its own: Σ target·tanh(output)."""
    return (torch.tanh(outputs).flatten(1) * targets.flatten(1)).sum(dim=1)


def length(tensors):
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))


def difference(a, b):
    return length([s.double() - t.double() for s, t in zip(a, b, strict=True)])


def micro_batch(x, y, views=1, mask=None):
    m = len(y) // views
    return MicroBatch(x, y, torch.ones(m, dtype=torch.bool) if mask is None else torch.as_tensor(mask), views)


def twice_as_precise(model):
    """A copy of the same numbers in float64."""
    return copy.deepcopy(model).double()


def as_double(x):
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


def single_gradients(model, loss, x, y, views=1):
    """Of each example, alone: the gradients of the mean loss of its views, float64, in the model's order."""
    model = twice_as_precise(model)
    parameters = trainable_parameters(model)
    # PyTorch 2's GroupNorm writes out of bounds if its input has its channels last and needs no gradient.
    x = x.contiguous()
    every = []
    for start in range(0, len(y), views):
        rows = slice(start, start + views)
        value = loss(model(as_double(x[rows])), as_double(y[rows])).mean()
        every.append(
            torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
            if value.requires_grad
            else [torch.zeros_like(p) for p in parameters]
        )
    return every


def layers_of(model):
    """For each trained parameter a number of the layer that owns it, the first one where several do."""
    owners = {}
    for number, layer in enumerate(model.modules()):
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(parameter, number)
    return [owners[parameter] for parameter in trainable_parameters(model)]


def clipped(gradients, layers, clipping):
    """One example's gradients, scaled by the formulas of `Clipping`."""
    norm, mode = clipping.norm, clipping.mode
    if mode == "automatic":
        factor = norm / (length(gradients) + 0.01)
        return [factor * g for g in gradients]
    groups = layers if mode == "per-layer" else [0] * len(layers)
    limit = norm / math.sqrt(len(set(groups)))
    found = {}
    for group in set(groups):
        own = length([g for g, of in zip(gradients, groups, strict=True) if of == group])
        found[group] = min(1.0, limit / own) if own else 1.0
    return [found[of] * g for g, of in zip(gradients, groups, strict=True)]


def assert_is_the_sum_of_single_examples(
    model, x, y, *, views=1, loss=weighted, modes=CLIPPING_MODES, scales=(1.0,), precise=1e-10, single=1e-5
):
    """The property of all engines and layer rules.

    The clipped sum is that of single examples, in float64 and float32, with the kernel and without, for
    clip norms around the middle of the examples' norms.

    Args:
        model: In float32.
        x, y: Inputs and targets of m·views rows.
        views: Rows of each example.
        loss: The loss.
        modes: Clipping modes to be tried.
        scales: Clip norms, in multiples of the middle norm.
        precise: What may differ in float64, relative to the sum of the clipped norms.
        single: The same in float32.
    """
    every = single_gradients(model, loss, x, y, views)
    norms = sorted(length(gradients) for gradients in every)
    layers = layers_of(model)
    for mode in modes:
        for scale in scales:
            clipping = Clipping(max(scale * norms[len(norms) // 2], 1e-9), mode)
            parts = [clipped(gradients, layers, clipping) for gradients in every]
            expected = [sum(of_one) for of_one in zip(*parts, strict=True)]
            size = sum(length(part) for part in parts)
            for engine, of, tolerance in (
                (PORTABLE, twice_as_precise(model), precise),
                (PORTABLE, model, single),
                (KERNEL, model, single),
            ):
                same = next(of.parameters()).dtype == torch.float64
                batch = micro_batch(*(map(as_double, (x, y)) if same else (x, y)), views)
                got = engine.clipped_sum(of, loss, [batch], clipping)
                for total, wanted in zip(got.gradients, expected, strict=True):
                    assert total.dtype == torch.float64
                    assert total.shape == wanted.shape
                away = difference(got.gradients, expected)
                assert away <= tolerance * size + 1e-30, (mode, scale, engine.use_kernel, same, away / size)
                assert got.diagnostics["examples"] == len(every)
                assert got.diagnostics["non_finite"] == 0


def targets_for(model: nn.Module, x):
    """Weights of the outputs for `weighted`."""
    with torch.no_grad():
        return torch.randn_like(model(x))
