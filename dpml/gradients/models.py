"""Which models can be trained privately: those that treat the examples of a batch independently.

A layer that mixes the examples of a batch, such as batch normalisation, lets one record change every
other record's gradient. Clipping each gradient does not bound that, so no noise would be enough. And a
layer that writes what it sees into its weights or buffers releases it without any noise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from accounting.errors import UserError
from dpml.gradients.engine import (
    Clipping,
    Engine,
    Loss,
    MicroBatch,
    example_losses,
    trainable_parameters,
)
from dpml.gradients.rules import SHIPPED


def require_trainable(model: nn.Module, example: object = None, engine: Engine | None = None) -> None:
    """Raise UserError, naming the layer where one is to blame, if the model cannot be trained privately.

    With an example, the model is tried on two made-up examples of its shape: the output of one must not
    depend on the other, nothing may be written into weights or buffers, and the engine's gradient of each
    must be that of plain backpropagation. A model that is random (dropout without a layer) is spared the
    last comparison.

    Args:
        model: The model, in training mode.
        example: Inputs of a few examples, tensors in dicts, lists and tuples, for their shape and type alone.
        engine: The engine that will compute the gradients.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"The model must be a torch.nn.Module. Got {type(model).__name__}.")
    for name, layer in model.named_modules():
        problem = _problem(layer)
        if problem:
            raise UserError(f"The layer {name or 'model'!r} ({type(layer).__name__}) {problem}.")
    if example is not None:
        generator = torch.Generator().manual_seed(0)
        with _restored(model):
            _require_independence(model, example, generator)
            if engine is not None:
                _require_gradients(model, example, generator, engine)


def require_example_losses(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> None:
    """Raise UserError unless the loss gives each example a value that depends on that example alone.

    Args:
        model: A model that `require_trainable` accepts.
        loss: The loss.
        inputs: Inputs of one example, for their shape and type alone.
        targets: Its targets, likewise.
    """
    with _restored(model), torch.no_grad():
        outputs = model(_stack(inputs, inputs))
        pair = MicroBatch(inputs, _stack(targets, targets), torch.ones(2, dtype=torch.bool))
        try:
            alone = example_losses(loss, outputs, pair)[0]
            spoilt = example_losses(loss, _map(outputs, _spoil_second), pair)[0]
        except UserError:
            raise
        except Exception as error:  # whatever the loss raises is the user's to read, in one line
            reason = " ".join(str(error).split())
            raise UserError(f"The loss refuses the model's outputs and the targets: {reason:.200}") from error
        if not torch.allclose(alone, spoilt, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise UserError(
                "The loss mixes the examples of a batch: the value for one depends on another, so clipping "
                "single gradients bounds nothing; compute each value from its own example alone."
            )


def _spoil_second(outputs: Tensor) -> Tensor:
    spoilt = outputs.clone()
    if spoilt.is_floating_point():
        spoilt[1:] = torch.nan
    return spoilt


def make_trainable(model: nn.Module) -> nn.Module:
    """Return a copy in which layers that cannot be trained privately are replaced.

    Batch normalisation becomes GroupNorm, instance normalisation loses its running statistics, and Opacus's
    fixers do the rest.
    """
    fixed = copy.deepcopy(model)
    norms = nn.modules.batchnorm._NormBase
    for name, layer in list(fixed.named_modules()):
        if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
            layer.track_running_stats = False
            for statistic in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(layer, statistic, None)
        elif isinstance(layer, norms):
            width = layer.num_features
            # A vector is one group: normalised alone, each of its numbers would become 0.
            groups = 1 if isinstance(layer, nn.BatchNorm1d) else math.gcd(32, width)
            group = nn.GroupNorm(groups, width, eps=layer.eps, affine=layer.affine)
            group.requires_grad_(any(p.requires_grad for p in layer.parameters()))
            parent, _, child = name.rpartition(".")
            if not child:
                return group
            setattr(fixed.get_submodule(parent), child, group)
    from opacus.validators import ModuleValidator  # see `dpml.gradients.rules`

    trainable: nn.Module = ModuleValidator.fix(fixed)
    return trainable


def _problem(layer: nn.Module) -> str | None:
    # Opacus's validator passes over layers without trainable parameters; these mix examples all the same.
    norm = nn.modules.batchnorm._NormBase
    if isinstance(layer, norm) and not isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return "mixes the examples of a batch; use GroupNorm, or pass fix_model=True to have it replaced"
    if isinstance(layer, norm) and layer.track_running_stats:
        return "keeps statistics of private records; set track_running_stats=False"
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None:
        return "rescales the weights of the records that it sees, without noise; leave out max_norm"
    trainable = any(p.requires_grad for p in layer.parameters(recurse=False))
    if trainable and type(layer) not in SHIPPED and not _valid_by_opacus(layer):
        return (
            "cannot be trained with per-example gradients; pass fix_model=True to have it replaced, or "
            "choose another layer"
        )
    if trainable and any(True for _ in layer.buffers()):
        return "has buffers beside parameters of its own, which is not supported; put them into layers apart"
    return None


def _valid_by_opacus(layer: nn.Module) -> bool:
    from opacus.validators import ModuleValidator

    validators = ModuleValidator.VALIDATORS
    return type(layer) not in validators or not validators[type(layer)](layer)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Leave weights, buffers and the random state as they were, whatever a forward pass does to them."""
    random = torch.random.get_rng_state()
    kept = {name: value.detach().clone() for name, value in _state(model).items()}
    try:
        yield
    finally:
        torch.random.set_rng_state(random)
        with torch.no_grad():
            for name, value in _state(model).items():
                value.copy_(kept[name])


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _require_independence(model: nn.Module, example: object, generator: torch.Generator) -> None:
    first, second, other = (_made_up(example, generator) for _ in range(3))
    before = {name: value.detach().clone() for name, value in _state(model).items()}
    pair = _outputs(model, _stack(first, second))
    for name, value in _state(model).items():
        if not torch.equal(value, before[name]):
            raise UserError(
                f"The model changes {name!r} when it is applied, which would release private records without "
                "noise; compute outputs only."
            )
    # NaN spreads through all arithmetic, also where gradients are cut off; the other number also moves
    # what is sorted or compared.
    for beside in (
        other,
        _map(first, lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t),
    ):
        for changed, row in ((_stack(first, beside), 0), (_stack(beside, second), 1)):
            for kept, got in zip(pair, _outputs(model, changed), strict=True):
                if not torch.allclose(kept[row], got[row], rtol=1e-4, atol=1e-6, equal_nan=True):
                    raise UserError(
                        "The model mixes the examples of a batch: the output for one depends on another, so "
                        "clipping single gradients bounds nothing; compute each output from its own example "
                        "alone, with the batch as the first dimension."
                    )


def _require_gradients(model: nn.Module, example: object, generator: torch.Generator, engine: Engine) -> None:
    first, second = (_made_up(example, generator) for _ in range(2))
    dropouts = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    for layer in dropouts:
        layer.eval()
    try:
        pair = _stack(first, second)
        outputs, again = _outputs(model, pair), _outputs(model, pair, seed=1)
        if not all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True)):
            return
        weights = [torch.randn(o.shape[1:], generator=generator).to(o) for o in outputs]

        def loss(outputs: Any, targets: Tensor) -> Tensor:
            del targets
            parts = [
                (o * w).reshape(2, -1).sum(dim=1) for o, w in zip(_leaves(outputs), weights, strict=True)
            ]
            return torch.stack(parts).sum(dim=0)

        parameters = trainable_parameters(model)
        nobody = torch.zeros(2, device=weights[0].device)
        for row in (0, 1):
            mask = torch.arange(2, device=weights[0].device) == row
            try:
                got = engine.clipped_sum(
                    model, loss, [MicroBatch(pair, nobody, mask)], Clipping(1e14)
                ).gradients
            except Exception as error:  # from a layer rule; one line for the user
                reason = " ".join(str(error).split())
                raise UserError(f"The model's gradients cannot be had per example: {reason:.200}") from error
            wanted = torch.autograd.grad(
                loss(model(pair), nobody)[row], parameters, materialize_grads=True, allow_unused=True
            )
            whole = sum(float(b.norm()) for b in wanted)
            for parameter, a, b in zip(parameters, got, wanted, strict=True):
                if not float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-5 * whole:
                    names = [name for name, p in model.named_parameters() if p is parameter]
                    raise UserError(
                        f"The gradient of {names[0]!r} for one example differs from that of the example "
                        "alone. Each layer must be called as a layer, with the batch first and one tensor as "
                        "its input, and each of its outputs used; padding_idx and padding modes other than "
                        "zeros are not supported."
                    )
    finally:
        for layer in dropouts:
            layer.train()


def _outputs(model: nn.Module, inputs: Any, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    try:
        outputs = model(inputs)
    except Exception as error:  # whatever the model raises is the user's to read, in one line
        [shape, *_] = [tuple(t.shape) for t in _leaves(inputs)] or [()]
        reason = " ".join(str(error).split())
        raise UserError(f"The model refuses inputs of shape {shape}: {reason:.200}") from error
    return _leaves(outputs)


def _made_up(example: object, generator: torch.Generator) -> Any:
    """One example of the same shapes and types: uniform numbers, or zeros and ones where they are whole."""

    def draw(tensor: Tensor) -> Tensor:
        shape = (1, *tensor.shape[1:])
        if tensor.is_floating_point():
            return torch.rand(shape, generator=generator).to(tensor)
        return torch.randint(0, 2, shape, generator=generator).to(tensor)

    return _map(example, draw)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(part, change) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_map(part, change) for part in value]
    return value


def _leaves(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def _stack(first: Any, second: Any) -> Any:
    others = iter(_leaves(second))
    return _map(first, lambda tensor: torch.cat([tensor, next(others)]))
