"""Teachers, trained together as one stacked model, and how they vote.

Every teacher sees its own shard alone, and that must hold to the last bit: what one record changes is one
teacher. So nothing here is shared between teachers. All tensors have shapes that follow from public numbers,
each teacher draws its own random numbers, and as many of them whatever its records are.

An ensemble is private: it was fitted to records without noise. Only answers of `dpml.pate.aggregation` may
leave.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from accounting import UserError
from dpml.outputs import write_private
from dpml.pate import native
from dpml.pate.config import FEATURES
from dpml.pate.features import Features, features_by_name
from dpml.pate.partition import Partition
from dpml.paths import check_path, read_text, require_plain

Progress = Callable[[int, int], None]
"""Called with the number of teachers that are trained, and of all."""

_FILE, _WEIGHTS, _VERSION = "ensemble.json", "ensemble.safetensors", 1
_GROUP_BYTES = 2**26  # of a group's records or features, held at once
_ROWS = 512  # inputs that vote at once


def silent(done: int, total: int) -> None:
    """Nothing to show."""


class Ensemble(ABC):
    """Teachers that were trained on disjoint shards. Private.

    Attributes:
        classes: Number of classes.
        example_shape: The shape of one input.
    """

    kind: ClassVar[str]
    classes: int
    example_shape: tuple[int, ...]

    @property
    @abstractmethod
    def teachers(self) -> int:
        """Number of teachers."""

    @abstractmethod
    def predict(self, inputs: Tensor) -> Tensor:
        """Each teacher's class for each input: int64 [m, teachers], private."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What `load_ensemble` needs beside the weights, as JSON."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The teachers' weights, teachers along the first axis."""

    def votes(self, inputs: Tensor) -> Tensor:
        """How many teachers vote for each class: int64 [m, classes], each row sums to them all. Private."""
        if tuple(inputs.shape[1:]) != self.example_shape:
            raise UserError(
                f"The teachers were trained on inputs of shape {self.example_shape}, these have shape "
                f"{tuple(inputs.shape[1:])}: bring inputs of the same form."
            )
        counts = torch.zeros(len(inputs), self.classes, dtype=torch.int64)
        for start in range(0, len(inputs), _ROWS):
            chosen = self.predict(inputs[start : start + _ROWS]).cpu()
            counts[start : start + _ROWS].scatter_add_(1, chosen, torch.ones_like(chosen))
        return counts

    def save(self, folder: Path, **more: Any) -> None:
        """Write the ensemble to a folder that its owner alone can read. `more` goes into its JSON file."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in self.weights().items()}
        write_private(folder / _WEIGHTS, safetensors.torch.save(weights))
        description = {
            "schema_version": _VERSION,
            "kind": self.kind,
            "classes": self.classes,
            "example_shape": list(self.example_shape),
            **self.settings(),
            **more,
        }
        write_private(folder / _FILE, (json.dumps(description, indent=2) + "\n").encode())


# ---------------------------------------------------------------- linear


@dataclass(frozen=True, eq=False)
class LinearEnsemble(Ensemble):
    """Ridge regression on features: logits are features · weights + bias.

    Attributes:
        features: The features' name, or "function" if they are a function of the caller's.
        function: From inputs [m, ...] to features [m, d].
        weight: Float32 [teachers, d, classes].
        bias: Float32 [teachers, classes].
    """

    kind: ClassVar[str] = "linear"
    classes: int
    example_shape: tuple[int, ...]
    features: str
    function: Features
    weight: Tensor
    bias: Tensor

    @property
    def teachers(self) -> int:
        """Number of teachers."""
        return len(self.weight)

    def predict(self, inputs: Tensor) -> Tensor:
        """Each teacher's class for each input: int64 [m, teachers]."""
        rows = self.function(inputs.to(self.weight.device))
        logits = torch.matmul(rows, self.weight).add_(self.bias[:, None])  # [teachers, m, classes]
        return logits.argmax(dim=2).T

    def settings(self) -> dict[str, Any]:
        """The features' name."""
        return {"features": self.features}

    def weights(self) -> dict[str, Tensor]:
        """Weight and bias."""
        return {"weight": self.weight, "bias": self.bias}


def train_linear(
    inputs: Tensor,
    labels: Tensor,
    classes: int,
    partition: Partition,
    *,
    features: str,
    function: Features,
    ridge: float,
    progress: Progress = silent,
) -> LinearEnsemble:
    """Train ridge regressions to one-hot labels, one for each shard, by batched matrix products.

    A shard has fewer records than features, so each teacher is solved for in the span of its records:
    with centred features X [p, d] and labels Y [p, classes], W = Xᵀ(XXᵀ + r·s·I)⁻¹Y, where s is the mean of
    XXᵀ's diagonal. Centring uses the shard's own mean. One Gram matrix and one Cholesky factor a teacher,
    for a group of teachers at once; nothing iterates.

    Args:
        inputs: Private, [n, ...].
        labels: Private, int64 [n].
        classes: Number of classes.
        partition: Who sees what.
        features: The features' name.
        function: The features.
        ridge: r > 0.
        progress: Told about finished teachers.
    """
    width = function(inputs[:1]).shape[1]
    weight = torch.zeros(partition.teachers, width, classes)
    bias = torch.zeros(partition.teachers, classes)
    places = partition.members.shape[1]
    group = max(1, _GROUP_BYTES // (4 * width * places))
    for start in range(0, partition.teachers, group):
        members = partition.members[start : start + group]
        present = (members >= 0)[:, :, None].float()  # [g, p, 1]
        # By selection: what an empty place would show times zero is not zero if it is not finite.
        x = function(_at(inputs, members).flatten(0, 1)).view(*members.shape, width)
        x = torch.where(present > 0, x, 0.0)
        y = torch.nn.functional.one_hot(_at(labels, members), classes) * present
        solved = _solve_ridge(x, y, present, ridge)
        weight[start : start + group], bias[start : start + group] = solved
        progress(min(start + group, partition.teachers), partition.teachers)
    return LinearEnsemble(classes, tuple(inputs.shape[1:]), features, function, weight, bias)


def _at(records: Tensor, rows: Tensor) -> Tensor:
    """What `records` [n, ...] hold at `rows` [a, b], and zeros where a row is -1: [a, b, ...].

    Those zeros keep any one record from showing up at another teacher's empty places.
    """
    present = (rows >= 0).view(*rows.shape, *[1] * (records.ndim - 1))
    return torch.where(present, records[rows.clamp(min=0)], torch.zeros((), dtype=records.dtype))


def _solve_ridge(x: Tensor, y: Tensor, present: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weights [g, d, classes], biases [g, classes] of teachers with x [g, p, d] and y [g, p, classes].

    Places without a record are zero before and after centring, and take no part.
    """
    count = present.sum(dim=1).clamp(min=1)  # [g, 1]
    mean, mean_label = x.sum(dim=1) / count, y.sum(dim=1) / count
    x = (x - mean[:, None]) * present
    y = (y - mean_label[:, None]) * present
    gram = torch.bmm(x, x.mT)
    scale = gram.diagonal(dim1=1, dim2=2).sum(dim=1) / count[:, 0]
    gram.diagonal(dim1=1, dim2=2).add_((ridge * scale).clamp(min=1e-12)[:, None])
    factor, failed = torch.linalg.cholesky_ex(gram)
    dual = torch.cholesky_solve(y, factor)
    weight = torch.bmm(x.mT, dual)
    bias = mean_label - torch.bmm(mean[:, None], weight)[:, 0]
    # A teacher whose records defeat the arithmetic votes for class 0, and no other teacher notices.
    sound = (failed == 0) & weight.isfinite().all(dim=2).all(dim=1) & bias.isfinite().all(dim=1)
    weight = torch.where(sound[:, None, None], weight, 0.0)
    return weight, torch.where(sound[:, None], bias, 0.0)


# ---------------------------------------------------------------- convolutional


@dataclass(frozen=True, eq=False)
class ConvolutionalEnsemble(Ensemble):
    """Small convolutional networks on images: 5×5 and 3×3 convolutions, both by two, and a linear layer.

    Attributes:
        parameters: Stacked weights by name, teachers along the first axis; see `new_networks`.
    """

    kind: ClassVar[str] = "convolutional"
    classes: int
    example_shape: tuple[int, ...]
    parameters: dict[str, Tensor]

    @property
    def teachers(self) -> int:
        """Number of teachers."""
        return len(self.parameters["bias3"])

    def predict(self, inputs: Tensor) -> Tensor:
        """Each teacher's class for each input: int64 [m, teachers]."""
        if (library := native.kernel()) is not None and inputs.device.type == "cpu":
            return native.classes(library, self.parameters, inputs)
        chosen = []
        with torch.no_grad():
            for start in range(0, self.teachers, _NETWORKS):
                group = _group(self.parameters, start)
                x = inputs[:, None].expand(-1, len(group["bias3"]), *inputs.shape[1:])
                chosen.append(_networks(group, x).argmax(dim=2).T)
        return torch.cat(chosen, dim=1)

    def settings(self) -> dict[str, Any]:
        """The form of the networks, whose sizes the weights' shapes say."""
        return {"network": _FORM}

    def weights(self) -> dict[str, Tensor]:
        """The stacked weights."""
        return self.parameters


_NETWORKS = 10  # trained between two reports of progress
_FILTERS = (16, 16)  # multiples of the kernel's vectors
_FORM = "5×5 by two, 3×3 by two, linear"
_MOMENTUM, _DECAY = 0.9, 1e-4


def new_networks(teachers: int, example_shape: tuple[int, ...], classes: int, seed: int) -> dict[str, Tensor]:
    """Initial weights of `teachers` networks (He et al. 2015), which depend on no record.

    Raises:
        UserError: `example_shape` is not `(channels, height, width)`, or a side is below 9.
    """
    if len(example_shape) != 3 or min(example_shape[1:]) < 9:
        raise UserError(
            f"Convolutional teachers need images of shape (channels, height, width), at least 9×9, got "
            f"{example_shape}: choose linear teachers."
        )
    generator = torch.Generator().manual_seed(seed)

    def normal(inputs: int, *shape: int) -> Tensor:
        return torch.randn(teachers, *shape, generator=generator) * math.sqrt(2 / inputs)

    channels, first, second = example_shape[0], *_FILTERS
    flat = second * math.prod(((side - 5) // 2 - 2) // 2 + 1 for side in example_shape[1:])
    return {
        "weight1": normal(25 * channels, first, channels, 5, 5),
        "bias1": torch.zeros(teachers, first),
        "weight2": normal(9 * first, second, first, 3, 3),
        "bias2": torch.zeros(teachers, second),
        "weight3": normal(2 * flat, flat, classes),
        "bias3": torch.zeros(teachers, classes),
    }


def train_convolutional(
    inputs: Tensor,
    labels: Tensor,
    classes: int,
    partition: Partition,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    shift: int,
    seed: int,
    progress: Progress = silent,
) -> ConvolutionalEnsemble:
    """Train a network on each shard by stochastic gradient descent, in the kernel where there is one.

    Batches are drawn with replacement, and their images moved at random, by random numbers of the teacher's
    own that are the same whatever the records are. Every teacher takes the same number of steps.

    Args:
        inputs: Private images, [n, channels, height, width].
        labels: Private, int64 [n].
        classes: Number of classes.
        partition: Who sees what.
        steps: Steps of each teacher; the learning rate falls to zero over them, as a cosine.
        batch_size: Records in a batch.
        learning_rate: The first learning rate, with Nesterov momentum of 0.9.
        shift: How far an image is moved at most, in pixels, along either side.
        seed: Fixes initial weights, batches and moves. It may be known: one record still changes one teacher
            alone.
        progress: Told about finished teachers.
    """
    shape = tuple(inputs.shape[1:])
    parameters = new_networks(partition.teachers, shape, classes, seed)
    own = torch.Generator().manual_seed(seed + 1)
    seeds = torch.randint(2**62, (partition.teachers,), generator=own).tolist()
    rates = [learning_rate * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    library = native.kernel() if inputs.device.type == "cpu" else None
    images = inputs if library is None else native.channels_last(inputs)
    for start in range(0, partition.teachers, _NETWORKS):
        members = partition.members[start : start + _NETWORKS]
        keys = seeds[start : start + _NETWORKS]
        draws = [
            draw_batches(row, steps, batch_size, shift, key) for row, key in zip(members, keys, strict=True)
        ]
        rows, moves = (torch.stack(drawn) for drawn in zip(*draws, strict=True))
        group = _group(parameters, start)
        if library is None:
            group = _trained(group, images, labels, rows, moves, rates)
        else:
            settings = {"momentum": _MOMENTUM, "decay": _DECAY}
            group = native.train(library, group, images, labels.contiguous(), rows, moves, rates, **settings)
        for name, tensor in group.items():
            parameters[name][start : start + _NETWORKS] = tensor
        progress(min(start + _NETWORKS, partition.teachers), partition.teachers)
    return ConvolutionalEnsemble(classes, shape, parameters)


def draw_batches(members: Tensor, steps: int, size: int, shift: int, seed: int) -> tuple[Tensor, Tensor]:
    """A teacher's batches: rows of its records, int64 [steps, size], and moves in pixels, [steps, size, 2].

    Rows are -1 if it has no records. `members` as in `Partition`, one row of them.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(steps, size, generator=generator, dtype=torch.float64)
    moves = torch.randint(-shift, shift + 1, (steps, size, 2), generator=generator)
    return members[(uniform * (members >= 0).sum()).long()], moves


def _group(parameters: dict[str, Tensor], start: int) -> dict[str, Tensor]:
    return {name: tensor[start : start + _NETWORKS] for name, tensor in parameters.items()}


def _trained(
    group: dict[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    rows: Tensor,
    moves: Tensor,
    rates: list[float],
) -> dict[str, Tensor]:
    """The networks after their steps, without the kernel: their convolutions are one grouped convolution.

    Args:
        group: Weights of g networks.
        inputs: Images, [n, channels, height, width].
        labels: Int64 [n].
        rows: Int64 [g, steps, batch].
        moves: Int64 [g, steps, batch, 2].
        rates: A learning rate for each step.
    """
    group = {name: tensor.clone().requires_grad_() for name, tensor in group.items()}
    optimizer = torch.optim.SGD(
        group.values(), lr=rates[0], momentum=_MOMENTUM, nesterov=True, weight_decay=_DECAY
    )
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        batch = rows[:, step]
        optimizer.zero_grad()
        x = _moved(_at(inputs, batch).flatten(0, 1), moves[:, step].flatten(0, 1))
        logits = _networks(group, x.view(*batch.shape, *x.shape[1:]).transpose(0, 1))
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), _at(labels, batch).flatten(), reduction="none"
        )
        # The sum over teachers: each one's gradient is that of its own mean. An empty shard has none.
        torch.autograd.backward((losses.view_as(batch) * (batch >= 0)).sum() / batch.shape[1])
        optimizer.step()
    return {name: tensor.detach() for name, tensor in group.items()}


def _moved(images: Tensor, moves: Tensor) -> Tensor:
    """Images [m, channels, h, w]: what was at (y + dy, x + dx) comes to (y, x), and zeros from outside."""
    reach = int(moves.abs().max())
    if reach == 0:
        return images
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (reach,) * 4)
    y = (moves[:, 0, None] + torch.arange(reach, reach + height))[:, :, None]
    x = (moves[:, 1, None] + torch.arange(reach, reach + width))[:, None, :]
    return padded[torch.arange(len(images))[:, None, None], :, y, x].permute(0, 3, 1, 2)


def _networks(group: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits [g, m, classes] of g networks, each for images of its own: x [m, g, channels, h, w]."""
    conv2d, relu = torch.nn.functional.conv2d, torch.nn.functional.relu
    m, g = x.shape[:2]
    h = conv2d(x.flatten(1, 2), group["weight1"].flatten(0, 1), group["bias1"].flatten(), stride=2, groups=g)
    h = conv2d(relu(h), group["weight2"].flatten(0, 1), group["bias2"].flatten(), stride=2, groups=g)
    rows = relu(h).view(m, g, -1).transpose(0, 1)
    return torch.baddbmm(group["bias3"][:, None], rows, group["weight3"])


# ---------------------------------------------------------------- files


def _require_shapes(found: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Raise UserError unless `found` are the weights of any number of such teachers as `expected` is one."""
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in found.items()}
    numbers = {len(tensor) for tensor in found.values() if tensor.ndim}
    if shapes != {name: tuple(tensor.shape[1:]) for name, tensor in expected.items()} or len(numbers) != 1:
        raise UserError(f"The ensemble {str(path)!r} is damaged: its weights do not fit its description.")


def load_ensemble(folder: str | os.PathLike[str]) -> tuple[Ensemble, dict[str, Any]]:
    """Read an ensemble that `Ensemble.save` wrote, and its JSON description.

    Raises:
        UserError: if the folder is missing or holds something else, or the features were the caller's
            function.
    """
    path = check_path(folder, "ensemble")
    try:
        description = json.loads(read_text(path / _FILE))
        require_plain(path / _WEIGHTS)
        tensors = safetensors.torch.load_file(path / _WEIGHTS)
    except OSError as error:
        raise UserError(f"The ensemble {str(path)!r} cannot be read ({error.strerror or error}).") from error
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise UserError(f"The ensemble {str(path)!r} is damaged: {error!s:.200}") from error
    try:
        if description["schema_version"] != _VERSION:
            raise UserError(f"The ensemble {str(path)!r} is not of version {_VERSION}.")
        shape, classes = tuple(description["example_shape"]), int(description["classes"])
        kind = description["kind"]
        if kind == ConvolutionalEnsemble.kind:
            if description.get("network") != _FORM:
                raise UserError(
                    f"The teachers of {str(path)!r} are networks of another form, made by another "
                    "version of dpml: train the teachers again."
                )
            _require_shapes(tensors, new_networks(1, shape, classes, 0), path)
            return ConvolutionalEnsemble(classes, shape, tensors), description
        if kind != LinearEnsemble.kind:
            raise UserError(f"The ensemble {str(path)!r} has teachers of an unknown kind, {kind!r:.40}.")
        name = description["features"]
        if name not in FEATURES:
            raise UserError(
                f"The teachers of {str(path)!r} look at features that are a function of your own, which a "
                "file cannot hold: use the ensemble from Python."
            )
        name, function = features_by_name(name, shape)
        width = function(torch.zeros(1, *shape)).shape[1]
        expected = {"weight": torch.zeros(1, width, classes), "bias": torch.zeros(1, classes)}
        _require_shapes(tensors, expected, path)
        weight, bias = tensors["weight"], tensors["bias"]
        return LinearEnsemble(classes, shape, name, function, weight, bias), description
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"The ensemble {str(path)!r} is damaged: it lacks {error}.") from error
