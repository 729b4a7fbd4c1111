"""An exponential moving average of the weights on the way: noise averages out. It costs no privacy."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from accounting.events import check_instance, check_number


class WeightAverage:
    """The average of a model's weights, and of its buffers, over the steps of a run.

    After step t (from 0) the average a becomes d·a + (1 − d)·w with d = min(decay, (1 + t)/(10 + t)), so that
    the first weights are soon forgotten (De, Berrada, Hayes, Smith & Balle 2022, section 3). It is computed
    from weights that are released anyway: post-processing.

    Args:
        model: Where the average starts; it is copied.
        decay: In [0, 1). De et al. use 0.9999.

    Attributes:
        model: A model of the same kind with the averaged weights.
        steps: Over how many steps so far.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(check_instance(model, nn.Module, "model", "WeightAverage"))
        self._decay = check_number(decay, "decay", "WeightAverage", low=0, high=1, closed="left")
        self.steps = 0

    def update(self, model: nn.Module) -> None:
        """Take in the weights after another step."""
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        with torch.no_grad():
            for mean, new in zip(tensors_of(self.model), tensors_of(model), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(new, 1 - decay)
                else:
                    mean.copy_(new)

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite a model's weights by the averaged ones."""
        with torch.no_grad():
            for mean, weight in zip(tensors_of(self.model), tensors_of(model), strict=True):
                weight.copy_(mean)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once: a tied weight is one."""
    return [*model.parameters(), *model.buffers()]
