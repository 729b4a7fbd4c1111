"""Layers of the papers that PyTorch does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose weights are standardised (Qiao et al. 2019), as in De et al. 2022.

    The filter of each output channel has mean 0 and norm `gain`, a trained factor of each channel:
    gain·(w − mean)/√max(variance·fan_in, 1e-4).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def standardized(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight without its gain, the factor 1/√max(…), and whether that is at its bound."""
        centred = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        square = centred.square().sum(dim=(1, 2, 3), keepdim=True)
        scale = square.clamp(min=1e-4).rsqrt()
        return centred * scale, scale, square < 1e-4

    def forward(self, x: Tensor) -> Tensor:
        """From [m, in, height, width] to [m, out, height′, width′]."""
        out: Tensor = self._conv_forward(x, self.gain * self.standardized()[0], self.bias)
        return out
