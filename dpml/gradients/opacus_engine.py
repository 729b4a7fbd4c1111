"""Another engine: per-example gradients by Opacus's layer rules, clipped and summed in float64."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from accounting.errors import UserError
from dpml.gradients.engine import (
    ClippedSum,
    Clipping,
    Loss,
    MicroBatch,
    example_losses,
    trainable_parameters,
)
from dpml.planning import ENGINE_SLACK

if TYPE_CHECKING:
    from opacus.grad_sample import GradSampleModule


class OpacusEngine:
    """Materialises each example's gradient (Yousefpour et al. 2021), so memory grows with a micro-batch.

    Slack: norms, weights and sums are taken in float64 from the very vectors that are summed, which for
    samples of up to 10^5 examples leaves an error below 1e-9·C. Under zero-out that is all: the others keep
    their places in micro-batches of a fixed shape, and their gradients are the same bit for bit. Under
    add-or-remove-one the others move up, and their float32 gradients may round differently there: for
    ordinary networks by far less than the slack of 1e-5, but for inputs of extreme scale it is no bound.
    """

    slack = ENGINE_SLACK

    def clipped_sum(
        self, model: nn.Module, loss: Loss, batches: Iterable[MicroBatch], clipping: Clipping
    ) -> ClippedSum:
        """Sum the clipped gradients of all examples; see `Engine.clipped_sum`."""
        if clipping.mode != "flat":
            raise UserError(
                f"The Opacus engine clips flat, not {clipping.mode!r}; use BookKeepingEngine for that."
            )
        parameters = trainable_parameters(model)
        totals = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        counts: Counter[str] = Counter(examples=0, clipped=0, non_finite=0)
        sums = {"loss_sum": 0.0, "norm_sum": 0.0}
        with _per_example(model) as hooked:
            for batch in batches:
                if batch.views != 1:
                    raise UserError(
                        "The Opacus engine takes one view of each example; use BookKeepingEngine."
                    )
                losses = example_losses(loss, hooked(batch.inputs), batch)
                # Padding and non-finite losses are selected away: a product with zero would keep NaN.
                counted = batch.mask & torch.isfinite(losses.detach())
                torch.where(counted, losses, 0.0).sum().backward()  # type: ignore[no-untyped-call]
                gradients = [_take_gradient(p, len(losses)) for p in parameters]
                squares = [torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) ** 2 for g in gradients]
                norms = torch.stack(squares).sum(dim=0).sqrt()
                finite = counted & torch.isfinite(norms)
                weights = torch.where(finite, (clipping.norm / norms).clamp(max=1.0), 0.0)
                for total, gradient in zip(totals, gradients, strict=True):
                    if not bool(finite.all()):
                        gradient = torch.where(finite[:, None], gradient, 0.0)
                    total += (weights @ gradient.double()).view_as(total)
                counts["examples"] += int(batch.mask.sum())
                counts["clipped"] += int((finite & (norms > clipping.norm)).sum())
                counts["non_finite"] += int((batch.mask & ~finite).sum())
                sums["loss_sum"] += float(losses.detach()[finite].sum())
                sums["norm_sum"] += float(norms[finite].sum())
        return ClippedSum(totals, self.slack, {**counts, **sums})


@contextmanager
def _per_example(model: nn.Module) -> Iterator[nn.Module]:
    """Attach Opacus's hooks for the duration of one sample, and leave the model as it was."""
    from opacus.grad_sample import GradSampleModule  # see `dpml.gradients.rules`

    saved = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in saved:
        parameter.grad = None  # a backward pass would add private gradients to the caller's tensor, in place
    hooked: GradSampleModule | None = None
    try:
        hooked = GradSampleModule(model, loss_reduction="sum")
        with warnings.catch_warnings():
            # Inputs need no gradient, and torch says so in every backward pass.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield hooked
    finally:
        if hooked is not None:
            hooked.to_standard_module()
        else:  # it refused the model, with some hooks attached already
            for handle in getattr(model, "autograd_grad_sample_hooks", ()):
                handle.remove()
        for parameter, gradient in saved:
            parameter.grad = gradient
            for name in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                if hasattr(parameter, name):
                    delattr(parameter, name)
        for module in model.modules():
            # left behind by an interrupted pass, or by a model that was refused
            for name in (
                "activations",
                "max_batch_len",
                "autograd_grad_sample_hooks",
                "ft_compute_sample_grad",
            ):
                if hasattr(module, name):
                    delattr(module, name)


def _take_gradient(parameter: nn.Parameter, examples: int) -> Tensor:
    """The gradients of a parameter, shape [examples, size]; zero if the loss does not depend on it."""
    gradient: Tensor | None = parameter.grad_sample  # type: ignore[attr-defined]
    parameter.grad_sample = None  # type: ignore[attr-defined]
    parameter.grad = None
    if gradient is None:
        return parameter.new_zeros(examples, parameter.numel())
    if len(gradient) != examples:
        raise UserError(
            f"A layer computed the gradients of {len(gradient)} rows for {examples} examples; each layer "
            "must see the batch as its first dimension."
        )
    return gradient.detach().reshape(examples, parameter.numel())
