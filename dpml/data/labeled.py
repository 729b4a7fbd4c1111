"""What every source of data must deliver: `LabeledData`, which cannot be made of faulty data."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from accounting.errors import UserError
from accounting.events import shown


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LabeledData:
    """Labelled examples, split into training and test, in memory.

    Whoever holds one may rely on all that its fields promise. Images are `[n, channels, height,
    width]`; those of `dpml.data.load` lie in [0, 1] wherever they came as bytes. Make one of NumPy
    arrays of any number type with `dpml.data.from_arrays`.

    Raises:
        UserError: A field breaks its promise; the message names the array and the value.
    """

    name: str
    """What messages, summaries and statements call it: a benchmark's name, or the path given."""

    x_train: Tensor
    """The private examples: float32 `[n, …]`, contiguous, finite, n ≥ 1."""

    y_train: Tensor
    """Their labels: int64 `[n]`, in 0 … classes − 1."""

    x_test: Tensor
    """The test examples: as `x_train`, with a length of their own."""

    y_test: Tensor
    """Their labels: as `y_train`."""

    classes: int
    """The number of classes, at least 2. It is public, like the shape of an example: a model's last
    layer shows it to anybody. Where the mere presence of a class is a secret, give a fixed number
    rather than one that was counted in the records."""

    is_public_benchmark: bool = False
    """Whether anybody may have the test set: accuracy on it then needs no privacy accounting."""

    def __post_init__(self) -> None:
        self._check_split("train", self.x_train, self.y_train)
        self._check_split("test", self.x_test, self.y_test)
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise UserError(
                f"An example of {self.name!r} has shape {list(self.x_train.shape[1:])} in x_train, "
                f"but {list(self.x_test.shape[1:])} in x_test: make them equal."
            )
        self._check_finite("x_train", self.x_train)
        self._check_finite("x_test", self.x_test)
        self._check_labels()

    @property
    def example_shape(self) -> tuple[int, ...]:
        """The shape of one example, `(channels, height, width)` for images."""
        return tuple(self.x_train.shape[1:])

    @property
    def train_set(self) -> TensorDataset:
        """The private records as trainers take them."""
        return TensorDataset(self.x_train, self.y_train)

    @property
    def test_set(self) -> TensorDataset:
        """The test records as trainers take them."""
        return TensorDataset(self.x_test, self.y_test)

    @property
    def train_examples(self) -> int:
        """The number of training examples, n. It is public under the zero-out relation."""
        return len(self.x_train)

    @property
    def test_examples(self) -> int:
        """The number of test examples."""
        return len(self.x_test)

    def __repr__(self) -> str:
        return (
            f"LabeledData({self.name!r}, {self.train_examples} + {self.test_examples} examples of "
            f"shape {self.example_shape}, {self.classes} classes)"
        )

    def _check_split(self, split: str, x: Tensor, y: Tensor) -> None:
        """Check types, shapes and lengths of one split."""
        for array, tensor, dtype in (
            (f"x_{split}", x, torch.float32),
            (f"y_{split}", y, torch.int64),
        ):
            if tensor.dtype != dtype:
                raise UserError(
                    f"{array} of {self.name!r} must be a {dtype} tensor, got {tensor.dtype}: "
                    "convert it, or use dpml.data.from_arrays."
                )
        if x.ndim < 2 or 0 in x.shape[1:]:
            raise UserError(
                f"x_{split} of {self.name!r} must have shape [n, features] or [n, channels, "
                f"height, width], got {list(x.shape)}: give each example at least one feature."
            )
        if y.ndim != 1:
            raise UserError(
                f"y_{split} of {self.name!r} must have shape [n] or [n, 1], got {list(y.shape)}: "
                "give one label for each example (of one-hot rows, the argmax)."
            )
        if len(x) != len(y):
            raise UserError(
                f"{self.name!r} has {len(x)} examples in x_{split} but {len(y)} labels in "
                f"y_{split}: give one label for each example."
            )
        if len(x) == 0:
            raise UserError(f"x_{split} of {self.name!r} is empty: give at least one example.")
        if not x.is_contiguous():
            raise UserError(f"x_{split} of {self.name!r} is not contiguous: pass x.contiguous().")

    def _check_finite(self, array: str, x: Tensor) -> None:
        # The extremes are NaN if any value is; unlike isfinite, they take no memory for each value.
        if not torch.isfinite(torch.stack(torch.aminmax(x))).all():
            bad = int((~torch.isfinite(x)).sum())
            raise UserError(
                f"{array} of {self.name!r} holds {bad} NaN or infinite "
                f"value{'s' * (bad > 1)}: replace or remove them."
            )

    def _check_labels(self) -> None:
        splits = (("y_train", self.y_train), ("y_test", self.y_test))
        for array, y in splits:
            if (smallest := int(y.min())) < 0:
                raise UserError(
                    f"{array} of {self.name!r} holds the label {smallest}: number the classes from 0."
                )
        if type(self.classes) is not int or self.classes < 2:
            raise UserError(
                f"The number of classes of {self.name!r} must be an integer of at least 2, "
                f"got {shown(self.classes)}: set classes."
            )
        for array, y in splits:
            if (largest := int(y.max())) >= self.classes:
                raise UserError(
                    f"{array} of {self.name!r} holds the label {largest}, but {self.classes} "
                    f"classes have the labels 0 to {self.classes - 1}: correct it, or set classes."
                )
