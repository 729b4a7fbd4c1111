"""jax-privacy's clipped gradients of the benchmark's simpler models, which are translated layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax  # type: ignore[import-not-found, unused-ignore]
import jax.numpy as jnp  # type: ignore[import-not-found, unused-ignore]
import numpy as np
import torch
from jax import lax
from jax_privacy import clipped_grad  # type: ignore[import-not-found, unused-ignore]
from torch import nn

Function = Callable[[Sequence[Any], Any], Any]


def translated(model: nn.Sequential) -> Function:
    """The model as a function of its parameters, in PyTorch's order and shapes, and of a batch."""

    def apply(parameters: Sequence[Any], x: Any) -> Any:
        left = iter(parameters)
        for layer in model:
            match layer:
                case nn.Conv2d():
                    ends = [(int(p), int(p)) for p in layer.padding]
                    x = lax.conv_general_dilated(x, next(left), layer.stride, ends)
                    x += next(left)[:, None, None]
                case nn.MaxPool2d():
                    sides, steps = (1, 1, *_pair(layer.kernel_size)), (1, 1, *_pair(layer.stride))
                    x = lax.reduce_window(x, -jnp.inf, lax.max, sides, steps, "VALID")
                case nn.Linear():
                    x = x @ next(left).T + next(left)
                case nn.Tanh():
                    x = jnp.tanh(x)
                case nn.Flatten():
                    x = x.reshape(len(x), -1)
                case _:
                    raise NotImplementedError(f"{type(layer).__name__} has no translation to JAX")
        return x

    return apply


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def clipped_sum(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, clip_norm: float, micro: int | None
) -> Callable[[], list[torch.Tensor]]:
    """A compiled step, as `jax_privacy.clipped_grad` gives it."""
    if not isinstance(model, nn.Sequential):
        raise NotImplementedError("only sequential models have a translation to JAX")
    apply = translated(model)

    def loss(parameters: Sequence[Any], x: Any, y: Any) -> Any:
        scores = jax.nn.log_softmax(apply(parameters, x))
        return -jnp.take_along_axis(scores, y[:, None], axis=1).mean()

    size = micro if micro is not None and micro < len(targets) else None
    gradient = clipped_grad(loss, l2_clip_norm=clip_norm, batch_argnums=(1, 2), microbatch_size=size)
    compute = jax.jit(gradient)
    parameters = [jnp.asarray(p.detach().numpy()) for p in model.parameters()]
    x, y = jnp.asarray(inputs.numpy()), jnp.asarray(targets.numpy())

    def step() -> list[torch.Tensor]:
        result = jax.block_until_ready(compute(parameters, x, y))
        return [torch.from_numpy(np.array(g)) for g in result]

    return step
