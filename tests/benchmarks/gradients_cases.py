"""The models, sizes and inputs on which the benchmark of gradients measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpml.models import TransformerClassifier, build

CLASSES = 10
VOCABULARY, LENGTH = 10_000, 128
SHAPES = {
    "mnist-cnn": (1, 28, 28),
    "cifar-cnn": (3, 32, 32),
    "linear-3969": (3969,),  # scattering features of MNIST and CIFAR-10 (Tramèr & Boneh 2021)
    "linear-15552": (15552,),
    "wrn-16-4": (3, 32, 32),
    "transformer": (LENGTH,),
}


@dataclass(frozen=True)
class Case:
    """A model and a batch.

    Attributes:
        model: One of `SHAPES`.
        batch: Examples in a step.
        micro: Examples in one of our engine's micro-batches.
        tolerance: Relative error of the gradients, against float64, beyond which a variant is not timed.
    """

    model: str
    batch: int
    micro: int
    tolerance: float = 1e-3

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.model} × {self.batch}"


CASES = [
    Case("mnist-cnn", 256, 256),
    Case("mnist-cnn", 1024, 256),
    Case("cifar-cnn", 256, 64),
    Case("cifar-cnn", 1024, 64),
    Case("linear-3969", 256, 256),
    Case("linear-3969", 1024, 1024),
    Case("linear-15552", 256, 256),
    Case("linear-15552", 1024, 1024),
    # Rounding moves some of its ReLUs across their kink, which changes an example's gradient by up to 1%.
    Case("wrn-16-4", 64, 16, tolerance=1e-2),
    Case("transformer", 64, 32),
]


@dataclass(frozen=True, eq=False)
class Problem:
    """What a variant is given: a model of its own, inputs and targets.

    Attributes:
        model: In training mode.
        inputs: First dimension `batch`.
        targets: Classes, shape [batch].
        micro: As in `Case`.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    micro: int

    @property
    def images(self) -> bool:
        """Whether the inputs have a memory format to choose."""
        return self.inputs.dim() == 4


def make_problem(case: Case) -> Problem:
    """The same weights and numbers whenever it is called."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, *SHAPES[case.model])
    targets = torch.randint(0, CLASSES, (case.batch,), generator=generator)
    if case.model == "transformer":
        inputs = torch.randint(0, VOCABULARY, shape, generator=generator)
    else:
        inputs = torch.randn(shape, generator=generator)
    torch.manual_seed(0)
    return Problem(MAKERS[case.model](), inputs, targets, case.micro)


def _built(name: str, shape: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: build(name, shape, CLASSES)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "mnist-cnn": _built("cnn", SHAPES["mnist-cnn"]),
    "cifar-cnn": _built("cnn", SHAPES["cifar-cnn"]),
    "linear-3969": _built("linear", SHAPES["linear-3969"]),
    "linear-15552": _built("linear", SHAPES["linear-15552"]),
    "wrn-16-4": _built("wrn-16-4", SHAPES["wrn-16-4"]),
    "transformer": lambda: TransformerClassifier(VOCABULARY, LENGTH, CLASSES),
}
