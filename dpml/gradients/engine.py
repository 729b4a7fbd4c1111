"""What an engine is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from accounting.errors import UserError
from accounting.events import check_number, shown

Loss = Callable[[Any, Tensor], Tensor]
"""From a model's outputs and the targets of m examples to their losses, shape [m], not reduced."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each example, shape [m]: the default loss."""
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


ClippingMode = Literal["flat", "per-layer", "automatic"]
CLIPPING_MODES = ("flat", "per-layer", "automatic")


@dataclass(frozen=True)
class Clipping:
    """How the gradient of each example is bounded. Whatever the mode, its norm is then at most `norm`.

    Attributes:
        norm: C, the sensitivity of the sum, above 0.
        mode: "flat": a gradient g is scaled by min(1, C/‖g‖₂) (Abadi et al. 2016, Algorithm 1);
            "per-layer": the same for each of L layers apart, with C/√L (McMahan et al. 2018), so that C
            bounds all of them together; "automatic": g is scaled by C/(‖g‖₂ + 0.01), large or small (Bu,
            Wang, Zha & Karypis 2022, "Automatic clipping").
    """

    norm: float
    mode: ClippingMode = "flat"

    def __post_init__(self) -> None:
        norm = check_number(self.norm, "clip_norm", "Clipping", low=0, high=1e15)
        object.__setattr__(self, "norm", norm)
        if not isinstance(self.mode, str) or self.mode not in CLIPPING_MODES:
            raise UserError(
                f"The clipping must be one of {', '.join(CLIPPING_MODES)}. Got {shown(self.mode)}."
            )


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A part of a sample that is processed at once.

    Attributes:
        inputs: The model's argument, first dimension m·views.
        targets: The loss's second argument, first dimension m·views.
        mask: Which of the m places hold an example, bool, shape [m]. The others are padding: whatever
            stands there contributes nothing.
        views: Rows of the same example, one after the other: its gradient is that of their mean loss, and
            is clipped once (augmentation multiplicity, De et al. 2022).
    """

    inputs: Any
    targets: Tensor
    mask: Tensor
    views: int = 1


@dataclass(frozen=True, eq=False)
class ClippedSum:
    """The sum of an engine over one sample, before noise. It is private: nothing of it may be shown.

    Attributes:
        gradients: One float64 tensor for each trainable parameter, in the model's order.
        slack: One example moves `gradients` by at most C·(1 + slack).
        diagnostics: Private figures ("examples", "clipped", "non_finite", "loss_sum", "norm_sum").
    """

    gradients: list[Tensor]
    slack: float
    diagnostics: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """A way to compute clipped sums. Another engine must give the same sums up to rounding.

    Attributes:
        slack: As in `ClippedSum`, for any batch; known before the first one, because the plan needs it.
    """

    slack: float

    def clipped_sum(
        self, model: nn.Module, loss: Loss, batches: Iterable[MicroBatch], clipping: Clipping
    ) -> ClippedSum:
        """Sum the clipped gradients of all examples in `batches`.

        The result does not depend on how the sample is cut into micro-batches, up to rounding. No
        micro-batches give zeros. An example whose loss or gradient is not finite contributes zero and is
        counted.
        """
        ...


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, each once, in the model's order.

    Raises:
        UserError: if there are none.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UserError("The model has no trainable parameters; set requires_grad on some.")
    return parameters


def example_losses(loss: Loss, outputs: Any, batch: MicroBatch) -> Tensor:
    """The losses of a micro-batch, shape [m], checked; the mean over the views of each example.

    Raises:
        UserError: if `loss` reduces over examples.
    """
    losses = loss(outputs, batch.targets)
    rows = len(batch.mask) * batch.views
    if not isinstance(losses, Tensor) or losses.shape != (rows,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise UserError(
            f"The loss must return one value for each of the {rows} examples, shape "
            f"({rows},); use reduction='none'. Got {shape}."
        )
    return losses if batch.views == 1 else losses.view(-1, batch.views).mean(dim=1)


def channels_last(inputs: Any) -> Any:
    """Images with their channels last in memory, which convolutions and poolings are faster on."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not inputs.is_floating_point():
        return inputs
    if inputs.shape[1] > 1:
        return inputs.contiguous(memory_format=torch.channels_last)
    n, _, h, w = inputs.shape  # one channel is both; only the strides say what the next layer is to do
    return inputs.contiguous().as_strided((n, 1, h, w), (h * w, 1, w, 1))


def plain_sum(model: nn.Module, loss: Loss, batches: Iterable[MicroBatch]) -> ClippedSum:
    """The sum of unclipped gradients, for training without privacy. Its sensitivity is unbounded."""
    parameters = trainable_parameters(model)
    totals = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for batch in batches:
        losses = example_losses(loss, model(batch.inputs), batch)
        gradients = torch.autograd.grad(losses[batch.mask].sum(), parameters, allow_unused=True)
        for total, gradient in zip(totals, gradients, strict=True):
            if gradient is not None:
                total += gradient
    return ClippedSum(totals, slack=float("inf"))
