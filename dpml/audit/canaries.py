"""Canaries: records that are planted in the training set, half of them by secret coins.

The data set keeps a place for each canary. One whose coin says "out" is zeroed out: its place holds a record
whose loss is nought, which is what the relation compares with (and, for a sampling probability that is a
number, what a missing record amounts to). What a record is follows from its target:

    0 … classes − 1                     an ordinary record, and an input-space canary that is in
    classes + i                         gradient-space canary i, in
    classes + canaries + i              canary i, out

A gradient-space canary has a parameter of its own, which no other record moves, and a gradient far above the
clip norm: after clipping, it moves that coordinate by just the clip norm C, whatever the model has learned
(the "Dirac canaries" of Nasr et al. 2023, "Tight auditing of differentially private machine learning").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from accounting import UserError
from dpml.audit.config import CanaryKind
from dpml.data import LabeledData
from dpml.gradients import cross_entropy
from dpml.randomness import Randomness

_LOUDNESS = 1e3  # the unclipped gradient of a gradient-space canary, in clip norms


class CanaryModel(nn.Module):
    """A model with one more parameter for each canary. For evaluation, it is the model alone."""

    def __init__(self, model: nn.Module, canaries: int) -> None:
        super().__init__()
        self.model = model
        self.canary = nn.Linear(1, canaries, bias=False)
        nn.init.zeros_(self.canary.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """The model's outputs [rows, classes]; in training with the canaries' parameters beside them."""
        outputs: Tensor = self.model(inputs)
        if not self.training:
            return outputs
        return torch.cat([outputs, self.canary(outputs.new_ones(len(outputs), 1))], dim=1)


class Canaries:
    """The canaries of one run: their coins, their places in the data, and the loss that makes them.

    Args:
        data: The user's own records.
        count: m, at least 2.
        kind: "gradient" (see above), "mislabelled" (test inputs with a wrong label) or "noise" (uniform noise
            with a random label); the last two are records like any other.
        clip_norm: C.
        randomness: Where the coins come from, and all else that is random in a canary.

    Attributes:
        included: The coins, bool [m]. The attacker must not see them before guessing.
        places: Which record of `train_set` is canary i, int64 [m].
        sampled: For each step done, which canaries took part, out or in: bool [m] each.

    Raises:
        UserError: if there are not enough test inputs.
    """

    def __init__(
        self, data: LabeledData, count: int, kind: CanaryKind, clip_norm: float, randomness: Randomness
    ) -> None:
        self.kind, self.count, self.classes = kind, count, data.classes
        self.included = randomness.words(count) >> np.uint64(63) == 1
        self._loudness = max(_LOUDNESS * clip_norm, 100.0)  # far above automatic clipping's 0.01 as well
        self.inputs, self.labels = _records(data, count, kind, randomness)
        marks = data.classes + torch.arange(count)
        is_in = torch.from_numpy(self.included)
        targets = torch.where(is_in, marks if kind == "gradient" else self.labels, marks + count)
        # Scattered among the records, so that what befalls the first or the last ones befalls some.
        order = torch.from_numpy(np.argsort(randomness.words(len(data.x_train) + count)))
        self.places = torch.argsort(order)[len(data.x_train) :]
        self.train_set = TensorDataset(
            torch.cat([data.x_train, self.inputs])[order], torch.cat([data.y_train, targets])[order]
        )
        self.sampled: list[np.ndarray] = []
        self._seen = torch.zeros(count, dtype=torch.bool)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each row, shape [rows]: cross-entropy, a canary's own parameter, or nought."""
        canary = targets - self.classes
        if self.kind != "gradient":
            ordinary = cross_entropy(outputs, targets.clamp(max=self.classes - 1))
            return torch.where(canary >= 0, 0 * ordinary, ordinary)
        self._seen[(canary[canary >= 0] % self.count).cpu()] = True
        ordinary = cross_entropy(outputs[:, : self.classes], targets.clamp(max=self.classes - 1))
        own = outputs[:, self.classes :].gather(1, canary.clamp(0, self.count - 1)[:, None])[:, 0]
        loud = self._loudness * own
        return torch.where(canary < 0, ordinary, torch.where(canary < self.count, loud, 0 * loud))

    def step_done(self) -> None:
        """A step ends: note which canaries were in its sample."""
        self.sampled.append(self._seen.numpy().copy())
        self._seen.zero_()

    def not_started(self) -> None:
        """Forget what was seen when the trainer tried the loss before the first step."""
        self._seen.zero_()

    def score(self, model: nn.Module) -> np.ndarray:
        """How well a model fits each canary, float64 [m]: minus its loss, whether it was in or not."""
        device = next(model.parameters()).device
        model.eval()
        with torch.no_grad():
            parts = [
                cross_entropy(model(x.to(device)), y.to(device)).double().cpu()
                for x, y in zip(torch.split(self.inputs, 1000), torch.split(self.labels, 1000), strict=True)
            ]
        return -torch.cat(parts).numpy()


def _records(
    data: LabeledData, count: int, kind: CanaryKind, randomness: Randomness
) -> tuple[Tensor, Tensor]:
    """Inputs [m, …] and labels [m] of the canaries."""
    shape = (count, *data.example_shape)
    if kind == "gradient":
        return torch.zeros(shape), torch.zeros(count, dtype=torch.int64)
    shift = torch.from_numpy((randomness.words(count) % np.uint64(data.classes - 1)).astype(np.int64))
    if kind == "noise":
        values = randomness.uniforms(int(np.prod(shape))).reshape(shape)
        label = torch.from_numpy((randomness.words(count) % np.uint64(data.classes)).astype(np.int64))
        return torch.from_numpy(values).float(), label
    if count > len(data.x_test):
        raise UserError(
            f"There are {len(data.x_test)} test inputs for {count} mislabelled canaries; choose fewer, or "
            "another kind."
        )
    rows = torch.from_numpy(np.argsort(randomness.words(len(data.x_test)))[:count])
    return data.x_test[rows], (data.y_test[rows] + 1 + shift) % data.classes


def watched_sgd(
    canaries: Canaries, model: CanaryModel, divisor: float, seen: list[np.ndarray], **settings: Any
) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """Make SGD that also writes down the noisy gradient of each canary's parameter.

    The trainer hands it released gradients only, so what it writes down is what an observer of all steps
    sees.

    Args:
        canaries: Told when a step is done.
        model: Whose canaries' parameters are watched.
        divisor: What the trainer divides noisy sums by: the expected batch size.
        seen: Takes one float32 array [m] for each step, the noisy sum.
        settings: Of `torch.optim.SGD`.
    """

    class WatchedSGD(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            gradient = model.canary.weight.grad
            assert gradient is not None  # noqa: S101 - the trainer sets each before a step
            seen.append((gradient[:, 0].detach().double().cpu() * divisor).float().numpy())
            canaries.step_done()
            return super().step(closure)

    return lambda parameters: WatchedSGD(parameters, **settings)
