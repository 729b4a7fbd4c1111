"""What decides between trials: accuracy on public records, or a noisy count on private ones.

The records that decide are not those that train. They sit at fixed positions, so which part a record is in
depends on no record's content.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn
from torch.utils.data import TensorDataset

from accounting import UserError
from dpml.data import LabeledData
from dpml.data.arrays import load_labelled
from dpml.exact import noised
from dpml.randomness import Randomness
from dpml.report import accuracy


@dataclass(frozen=True, eq=False)
class Split:
    """Records that train, and records that decide.

    Attributes:
        data: What each trial trains on, and the test set, which decides nothing.
        validation: The records that decide.
        is_public: Whether these are public: the score then needs no noise.
        words: What they are, for the statement.
    """

    data: LabeledData
    validation: TensorDataset
    is_public: bool
    words: str

    @classmethod
    def of(cls, data: LabeledData, public_validation: Path | None) -> Split:
        """Take the public file; else the last tenth of the training set, public if that of a benchmark is.

        Raises:
            UserError: if the file is not of the data's form, or the data has fewer than two records.
        """
        if public_validation is not None:
            found = load_labelled(public_validation, classes=data.classes)
            if found.example_shape != data.example_shape:
                raise UserError(
                    f"An example of {found.name!r} has shape {list(found.example_shape)}, but one of "
                    f"{data.name!r} has {list(data.example_shape)}: make them equal."
                )
            words = f"accuracy on the {found.test_examples:,} examples of `{found.name}`, taken to be public"
            return cls(data, TensorDataset(found.x_test, found.y_test), True, words)
        held_out = max(1, data.train_examples // 10)
        rest = data.train_examples - held_out
        if rest < 1:
            raise UserError(
                f"{data.name!r} has a single record; tuning needs some to train and some to decide."
            )
        validation = TensorDataset(data.x_train[rest:], data.y_train[rest:])
        part = f"the last {held_out:,} records of the training set, on which no trial trained"
        words = (
            f"accuracy on {part}; they are taken to be public, and are not protected"
            if data.is_public_benchmark
            else f"a noisy count of right answers to {part}; ε covers them"
        )
        data = replace(data, x_train=data.x_train[:rest], y_train=data.y_train[:rest])
        return cls(data, validation, data.is_public_benchmark, words)

    def score(self, model: nn.Module, noise: float | None, random: Randomness) -> float:
        """Accuracy of a model on the records that decide, with noise of this standard deviation on the count.

        One record that is zeroed changes the count by at most 1.

        Raises:
            RuntimeError: if the records are private and there is no noise.
        """
        exact = accuracy(model, self.validation)
        if self.is_public:
            return exact
        if noise is None:
            raise RuntimeError("A score on private records needs noise.")
        size = len(self.validation)
        return float(noised(np.array([exact * size]), noise, random)[0]) / size
