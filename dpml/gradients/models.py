"""Which models can be trained privately: those that treat the examples of a batch independently.

A layer that mixes the examples of a batch, such as batch normalisation, lets one record change every
other record's gradient. Clipping each gradient does not bound that, so no noise would be enough.
"""

from __future__ import annotations

import torch
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from accounting.errors import UserError


def require_trainable(model: nn.Module, example: object = None) -> None:
    """Raise UserError, naming the layer, if the model cannot be trained privately.

    Args:
        model: The model, in training mode.
        example: Inputs of a few examples, for their shape and type alone. Floating-point ones allow a test
            of independence on random numbers: the output of one must not depend on another.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"The model must be a torch.nn.Module. Got {type(model).__name__}.")
    for name, layer in model.named_modules():
        problem = _problem(layer)
        if problem:
            raise UserError(
                f"The layer {name or 'model'!r} ({type(layer).__name__}) {problem}; pass fix_model=True to "
                "have it replaced (BatchNorm by GroupNorm), or choose another layer."
            )
    if isinstance(example, Tensor) and example.is_floating_point() and _mixes_examples(model, example):
        raise UserError(
            "The model mixes the examples of a batch: the output for one depends on another, so clipping "
            "single gradients bounds nothing; compute each output from its own example alone."
        )


def make_trainable(model: nn.Module) -> nn.Module:
    """Return a copy in which layers that cannot be trained privately are replaced, where Opacus knows how."""
    fixed: nn.Module = ModuleValidator.fix(model)
    return fixed


def _problem(layer: nn.Module) -> str | None:
    # Opacus's validator passes over layers without trainable parameters; these mix examples all the same.
    if isinstance(layer, nn.modules.batchnorm._NormBase) and not isinstance(
        layer, nn.modules.instancenorm._InstanceNorm
    ):
        return "mixes the examples of a batch"
    trainable = any(p.requires_grad for p in layer.parameters(recurse=False))
    validators = ModuleValidator.VALIDATORS
    if trainable and type(layer) in validators and validators[type(layer)](layer):
        return "cannot be trained with per-example gradients"
    if trainable and any(True for _ in layer.buffers(recurse=False)):
        return "has buffers, which training would fill with statistics of private records"
    return None


def _mixes_examples(model: nn.Module, example: Tensor) -> bool:
    """Whether the first output has a gradient with respect to the second input, at a random point."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand((2, *example.shape[1:]), generator=generator, dtype=example.dtype)
    inputs = inputs.to(example.device).requires_grad_()
    state = torch.random.get_rng_state()
    try:
        outputs = model(inputs)
    except Exception as error:  # whatever the model raises is the user's to read, in one line
        reason = " ".join(str(error).split())
        raise UserError(f"The model refuses inputs of shape {tuple(inputs.shape)}: {reason:.200}") from error
    finally:
        torch.random.set_rng_state(state)
    if not isinstance(outputs, Tensor) or not outputs.requires_grad:
        return False
    [gradient] = torch.autograd.grad(outputs[0].sum(), inputs, allow_unused=True)
    return gradient is not None and bool((gradient[1] != 0).any())
