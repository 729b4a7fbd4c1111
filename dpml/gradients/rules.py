"""How each layer's per-example gradients follow from its inputs and the gradients of its outputs.

A rule is a function of the layer, its inputs x, the gradients g of its outputs (both with m·views rows, the
views of an example one after the other) and `views`. It returns forms that together stand for all trainable
parameters that the layer itself owns. Register yours:

    @rule(MyLayer)
    def my_layer(layer, x, g, views):
        return [Rows(("weight",), [...])]  # one gradient of layer.weight for each of the m examples

Layers without a rule take Opacus's, and layers without that one, if they map one tensor to one tensor, are
differentiated again for each example. `tests/dpml/test_layer_rules.py` is the contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from accounting.errors import UserError
from dpml.gradients import native
from dpml.gradients.per_example import (
    Geometry,
    Lookup,
    Outer,
    Patches,
    PerExample,
    Rows,
    Standardized,
    by_example,
    for_kernel,
)
from dpml.models.layers import StandardizedConv2d

Rule = Callable[[Any, Tensor, Tensor, int], Sequence[PerExample]]
RULES: dict[type[nn.Module], Rule] = {}
"""From a layer's exact type to its rule: a subclass may compute something else."""


def rule(*types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these layers."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(types, function))
        return function

    return register


def per_example(layer: nn.Module, x: Tensor, g: Tensor, views: int) -> Sequence[PerExample]:
    """Forms of the gradients of the parameters that `layer` owns."""
    found = RULES.get(type(layer))
    if found is None:
        found = _other_rule(type(layer))
        dtype = next(iter(trained(layer).values())).dtype  # these compute with the layer's own numbers
        x, g = x.to(dtype) if x.is_floating_point() else x, g.to(dtype)
    return found(layer, x, g, views)


def _other_rule(kind: type[nn.Module]) -> Rule:
    # Imported when a layer needs it, for that takes about half as long as importing torch.
    from opacus.grad_sample import GradSampleModule
    from opacus.layers.dp_rnn import RNNLinear

    if kind is RNNLinear:
        return linear
    return _by_opacus if kind in GradSampleModule.GRAD_SAMPLERS else _again


def trained(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters that a layer itself owns, by name; not those of layers in it that it shows."""
    if not any(p is not None and p.requires_grad for p in layer._parameters.values()):
        return {}  # at once, as most layers have none
    own = {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
    inner = {p for child in layer.children() for p in child.parameters()}
    return {name: p for name, p in own.items() if p not in inner} if inner else own


@rule(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
def linear(layer: nn.Linear, x: Tensor, g: Tensor, views: int) -> Sequence[PerExample]:
    """Y = Wx + b at each position."""
    x, g = (by_example(t.reshape(len(t), -1, t.shape[-1]), views) for t in (x, g))
    return [Outer(tuple(trained(layer)), x, g)]


@rule(nn.Conv2d)
def conv2d(layer: nn.Conv2d, x: Tensor, g: Tensor, views: int) -> Sequence[PerExample]:
    """Any stride, padding, dilation and groups."""
    return _convolution(layer, x, g, views)


def _convolution(layer: nn.Conv2d, x: Tensor, g: Tensor, views: int) -> Sequence[Patches]:
    x, padding = _padded(layer, x)
    geometry = Geometry(layer.weight.shape, layer.stride, padding, layer.dilation, layer.groups)
    names = tuple(n for n in trained(layer) if n in ("weight", "bias"))
    return [Patches(names, x, g, geometry, views)]


@rule(nn.Conv1d)
def conv1d(layer: nn.Conv1d, x: Tensor, g: Tensor, views: int) -> Sequence[PerExample]:
    """A convolution over images of height 1."""
    x, padding = _padded(layer, x)
    shape = (*layer.weight.shape[:2], 1, layer.weight.shape[2])
    stride, padding, dilation = (1, *layer.stride), (0, *padding), (1, *layer.dilation)
    geometry = Geometry(shape, stride, padding, dilation, layer.groups)
    return [Patches(tuple(trained(layer)), x[:, :, None], g[:, :, None], geometry, views)]


def _padded(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with the padding that a number of zeros on both sides cannot say, and the rest of it."""
    none = (0,) * len(layer.kernel_size)
    if layer.padding_mode != "zeros":
        return functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), none
    if layer.padding == "same":
        return functional.pad(x, layer._reversed_padding_repeated_twice), none
    return x, none if isinstance(layer.padding, str) else layer.padding


@rule(StandardizedConv2d)
def standardized(layer: StandardizedConv2d, x: Tensor, g: Tensor, views: int) -> Sequence[PerExample]:
    """The gradients of the standardised weight, pulled back to weight and gain."""
    names = tuple(trained(layer))
    if not {"weight", "gain"} <= set(names):
        return _again(layer, x, g, views)
    [effective] = _convolution(layer, x, g, views)
    with torch.no_grad():
        v, scale, bounded = layer.standardized()
    gain, v, scale = (t.detach().to(x.dtype) for t in (layer.gain, v, scale))
    return [Standardized(names, effective, v, gain, scale, bounded)]


@rule(nn.Embedding)
def embedding(layer: nn.Embedding, x: Tensor, g: Tensor, views: int) -> Sequence[PerExample]:
    """Rows of a table; the padding index gets no gradient."""
    if layer.scale_grad_by_freq:
        raise UserError(
            "An Embedding with scale_grad_by_freq divides by counts over the batch, which mixes its examples."
        )
    indices = x.reshape(len(x) // views, -1)
    g = g.reshape(*indices.shape, g.shape[-1])
    if layer.padding_idx is not None:
        g = g.masked_fill((indices == layer.padding_idx)[:, :, None], 0)
    return [Lookup(indices, g, layer.num_embeddings)]


@rule(nn.GroupNorm)
def group_norm(layer: nn.GroupNorm, x: Tensor, g: Tensor, views: int) -> Sequence[PerExample]:
    """Scale and shift of each channel: Σ g·x̂ and Σ g over positions, x̂ the normalised input."""
    normal = functional.group_norm(x, layer.num_groups, eps=layer.eps)
    positions = tuple(range(2, x.ndim))
    return [affine(layer, [t.sum(dim=positions) if positions else t for t in (g * normal, g)], views)]


@rule(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, x: Tensor, g: Tensor, views: int) -> Sequence[PerExample]:
    """As `group_norm`, with a scale and shift of each place."""
    shape = list(layer.normalized_shape)
    if for_kernel(x, g):
        x, g = (t.reshape(len(t), -1, math.prod(shape)).contiguous() for t in (x, g))
        found = native.layer_norm_rows(x, g, layer.eps)
        if found is not None:
            return [affine(layer, [t.view(-1, *shape) for t in found], views)]
    x, g = (t.reshape(len(t), -1, *shape) for t in (x, g))
    normal = functional.layer_norm(x, shape, eps=layer.eps)
    return [affine(layer, [t.sum(dim=1) for t in (g * normal, g)], views)]


@rule(nn.RMSNorm)
def rms_norm(layer: nn.RMSNorm, x: Tensor, g: Tensor, views: int) -> Sequence[PerExample]:
    """A scale of each place."""
    shape = list(layer.normalized_shape)
    x, g = (t.reshape(len(t), -1, *shape) for t in (x, g))
    return [affine(layer, [(g * functional.rms_norm(x, shape, eps=layer.eps)).sum(dim=1)], views)]


def affine(layer: nn.Module, rows: Sequence[Tensor], views: int) -> PerExample:
    """From the gradients of weight and bias for each of m·views rows."""
    found = dict(zip(("weight", "bias"), rows, strict=False))
    names = tuple(trained(layer))
    return Rows(names, [_views_summed(found[name], views) for name in names])


def _views_summed(rows: Tensor, views: int) -> Tensor:
    """From a gradient for each of m·views rows to one for each example."""
    return rows if views == 1 else rows.view(-1, views, *rows.shape[1:]).sum(dim=1)


def _by_opacus(layer: nn.Module, x: Tensor, g: Tensor, views: int) -> Sequence[PerExample]:
    """By the rule that Opacus has for this type (Yousefpour et al. 2021)."""
    from opacus.grad_sample import GradSampleModule

    found = GradSampleModule.GRAD_SAMPLERS[type(layer)](layer, [x], g)
    names = {p: name for name, p in trained(layer).items()}
    kept = {names[p]: _views_summed(rows, views) for p, rows in found.items() if p in names}
    return [Rows(tuple(kept), list(kept.values()))]


def _again(layer: nn.Module, x: Tensor, g: Tensor, views: int) -> Sequence[PerExample]:
    """By running the layer again for each example, and differentiating it."""
    parameters: dict[str, Tensor] = {**trained(layer)}

    def single(one: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        def output(values: dict[str, Tensor]) -> Tensor:
            result: Tensor = torch.func.functional_call(layer, values, (one[None],))
            return result[0]

        pull_back = torch.func.vjp(output, parameters)[1]
        found: dict[str, Tensor] = pull_back(gradient)[0]
        return found

    rows = torch.func.vmap(single, randomness="error")(x, g)
    return [Rows(tuple(rows), [_views_summed(t.detach(), views) for t in rows.values()])]


SHIPPED = frozenset(RULES)
"""The layers whose rules come with dpml: about these Opacus need not be asked."""
