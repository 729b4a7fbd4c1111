"""The ways to compute gradients that the benchmark compares: plain, ours, Opacus's and others.

Each variant prepares a problem once, and gives a step: forward, backward and, but for the plain ones,
clipping and summing. A step returns one tensor for each parameter: the gradient of the mean loss, or the
sum of clipped gradients. There is no noise and no optimizer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from gradients_cases import Problem
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import dpml.gradients
from dpml.gradients import Clipping, MicroBatch

CLIP_NORM = 1.0
MICRO = 64  # of the other programs, where a variant is in micro-batches
Gradients = list[Tensor]
Step = Callable[[], Gradients]


class Refused(Exception):
    """A variant does not apply to a problem; one line says why."""


def slices(problem: Problem, size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches, or all at once. A batch that is one micro-batch anyway is refused: nothing new."""
    if size is None:
        return iter([(problem.inputs, problem.targets)])
    if len(problem.targets) <= size:
        raise Refused(f"the batch is one micro-batch of {size}")
    return zip(torch.split(problem.inputs, size), torch.split(problem.targets, size), strict=True)


def total(parts: Iterable[Gradients]) -> Gradients:
    """The sum over micro-batches."""
    first, *others = parts
    for other in others:
        torch._foreach_add_(first, other)
    return first


def plain(
    problem: Problem, channels_last: bool = False, compiled: bool = False, micro: int | None = None
) -> Step:
    """Without privacy, as users write it. Inputs are converted beforehand, which is not timed."""
    model, n = problem.model, len(problem.targets)
    if channels_last and problem.images:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = problem.inputs.contiguous(memory_format=torch.channels_last)
        problem = Problem(model, inputs, problem.targets, problem.micro)
    elif channels_last and micro is None:
        raise Refused("not a model for images")
    batches = list(slices(problem, micro))

    def mean_loss(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x), y, reduction="sum") / n

    compute = torch.compile(mean_loss) if compiled else mean_loss

    def step() -> Gradients:
        model.zero_grad()
        for x, y in batches:
            compute(x, y).backward()  # type: ignore[no-untyped-call]
        return [p.grad for p in model.parameters() if p.grad is not None]

    return step


def dpml_engine(problem: Problem, engine: str) -> Step:
    """An engine of dpml. Whatever memory format it likes, it converts the inputs itself, in the step."""
    if not hasattr(dpml.gradients, engine):
        raise Refused(f"dpml.gradients has no {engine}")
    instance = getattr(dpml.gradients, engine)()
    size = problem.micro if problem.micro < len(problem.targets) else None
    batches = [MicroBatch(x, y, torch.ones(len(y), dtype=torch.bool)) for x, y in slices(problem, size)]

    def step() -> Gradients:
        result = instance.clipped_sum(
            problem.model, partial(cross_entropy, reduction="none"), batches, Clipping(CLIP_NORM)
        )
        gradients: Gradients = result.gradients
        return gradients

    return step


def opacus_hooks(problem: Problem, micro: int | None = None) -> Step:
    """Opacus's per-example gradients, clipped and summed by its optimizer, in float32."""
    model = GradSampleModule(problem.model, loss_reduction="sum")
    optimizer = DPOptimizer(_sgd(model), **_options(problem))
    batches = list(slices(problem, micro))

    def one(x: Tensor, y: Tensor) -> Gradients:
        cross_entropy(model(x), y, reduction="sum").backward()  # type: ignore[no-untyped-call]
        optimizer.clip_and_accumulate()
        gradients = [p.summed_grad for p in optimizer.params]
        optimizer.zero_grad(set_to_none=True)
        return gradients

    return lambda: total(one(x, y) for x, y in batches)


def opacus_ghost(problem: Problem, micro: int | None = None) -> Step:
    """Opacus's ghost clipping: norms in one backward pass, the weighted sum in a second one."""
    model = GradSampleModuleFastGradientClipping(
        problem.model, max_grad_norm=CLIP_NORM, use_ghost_clipping=True, loss_reduction="sum"
    )
    optimizer = DPOptimizerFastGradientClipping(_sgd(model), **_options(problem))
    criterion = DPLossFastGradientClipping(
        model, optimizer, nn.CrossEntropyLoss(reduction="sum"), loss_reduction="sum"
    )
    batches = list(slices(problem, micro))

    def one(x: Tensor, y: Tensor) -> Gradients:
        criterion(model(x), y).backward()
        gradients = [p.grad for p in optimizer.params]
        optimizer.zero_grad(set_to_none=True)
        return gradients

    return lambda: total(one(x, y) for x, y in batches)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def _options(problem: Problem) -> dict[str, Any]:
    return {
        "noise_multiplier": 0.0,
        "max_grad_norm": CLIP_NORM,
        "expected_batch_size": len(problem.targets),
        "loss_reduction": "sum",
    }


def torch_func(problem: Problem, compiled: bool = False, micro: int | None = None) -> Step:
    """vmap over grad, as in PyTorch's tutorial on per-sample gradients, then clipping."""
    parameters = {name: p.detach() for name, p in problem.model.named_parameters()}
    batches = list(slices(problem, micro))

    def example_loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(problem.model, parameters, (x[None],))
        return cross_entropy(outputs, y[None])

    per_example = vmap(grad(example_loss), in_dims=(None, 0, 0))

    def clipped(x: Tensor, y: Tensor) -> Gradients:
        gradients = per_example(parameters, x, y).values()
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        weights = (CLIP_NORM / norms).clamp(max=1.0)
        return [torch.einsum("i,i...", weights, g) for g in gradients]

    compute = torch.compile(clipped) if compiled else clipped
    return lambda: total(compute(x, y) for x, y in batches)


def jax_privacy(problem: Problem, micro: int | None = None) -> Step:
    """jax-privacy, where it is installed. JAX takes as many threads as there are cores."""
    if importlib.util.find_spec("jax_privacy") is None:
        raise Refused("jax-privacy is not installed")
    import gradients_jax

    slices(problem, micro)
    step: Step = gradients_jax.clipped_sum(problem.model, problem.inputs, problem.targets, CLIP_NORM, micro)
    return step


PLAIN: dict[str, Callable[[Problem], Step]] = {
    "plain": plain,
    "plain-channels-last": partial(plain, channels_last=True),
    "plain-compiled": partial(plain, compiled=True),
    "plain-micro": partial(plain, channels_last=True, micro=MICRO),
}
PRIVATE: dict[str, Callable[[Problem], Step]] = {
    "ours": partial(dpml_engine, engine="BookKeepingEngine"),
    "opacus-engine": partial(dpml_engine, engine="OpacusEngine"),
    "opacus-hooks": opacus_hooks,
    "opacus-hooks-micro": partial(opacus_hooks, micro=MICRO),
    "opacus-ghost": opacus_ghost,
    "opacus-ghost-micro": partial(opacus_ghost, micro=MICRO),
    "vmap": torch_func,
    "vmap-micro": partial(torch_func, micro=MICRO),
    "vmap-compiled": partial(torch_func, compiled=True),
    "jax-privacy": jax_privacy,
    "jax-privacy-micro": partial(jax_privacy, micro=MICRO),
}
VARIANTS = PLAIN | PRIVATE
OPACUS = ("opacus-hooks", "opacus-hooks-micro", "opacus-ghost", "opacus-ghost-micro")


def expected(problem: Problem) -> dict[str, Gradients]:
    """The mean gradient and the sum of clipped gradients by a loop over the examples, in float64."""
    model, n = problem.model.double(), len(problem.targets)
    inputs = problem.inputs.double() if problem.inputs.is_floating_point() else problem.inputs
    parameters = list(model.parameters())
    sums = {kind: [torch.zeros_like(p) for p in parameters] for kind in ("plain", "private")}
    for i in range(n):
        loss = cross_entropy(model(inputs[i : i + 1]), problem.targets[i : i + 1])
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        torch._foreach_add_(sums["plain"], gradients, alpha=1 / n)
        torch._foreach_add_(sums["private"], gradients, alpha=min(1.0, CLIP_NORM / float(norm)))
    return sums


def difference(got: Gradients, wanted: Gradients) -> float:
    """‖got − wanted‖₂ / ‖wanted‖₂ over all parameters."""
    apart = torch.stack([(a - b).norm() for a, b in zip(got, wanted, strict=True)]).norm()
    return float(apart / torch.stack([b.norm() for b in wanted]).norm())
