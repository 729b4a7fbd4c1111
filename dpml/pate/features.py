"""What linear teachers look at: features that are fitted to no private record.

A function of one input alone costs no privacy, whatever it is: fixed by hand, or trained on public data, or
trained on the private data with DP-SGD and paid for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from accounting import UserError
from dpml.data.scattering import Scattering2d
from dpml.pate.config import FEATURES, FeatureName

Features = Callable[[Tensor], Tensor]
"""From inputs [m, ...] to float32 [m, d]. What becomes of a row must depend on that row alone."""

_LEAST_SIDE = 16
_CHUNK = 32


def values(inputs: Tensor) -> Tensor:
    """The numbers of an input as they are, scaled to a vector of norm 1."""
    return _unit(inputs.flatten(1))


def scattering(inputs: Tensor) -> Tensor:
    """Square roots of wavelet scattering coefficients (`dpml.data.scattering`), scaled to norm 1.

    The root, as in comparing histograms by Hellinger's distance, keeps few large coefficients from deciding
    alone.
    """
    transform = _transform(*inputs.shape[2:])
    with torch.no_grad():
        parts = [
            _unit(transform(part).flatten(1).clamp(min=0).sqrt()) for part in torch.split(inputs, _CHUNK)
        ]
    return torch.cat(parts)


def features_by_name(name: FeatureName, example_shape: tuple[int, ...]) -> tuple[FeatureName, Features]:
    """A function by name, and that name: "auto" is scattering for images of 16×16 and more.

    Raises:
        UserError: for an unknown name, or scattering of what is no image.
    """
    is_image = len(example_shape) == 3 and min(example_shape[1:]) >= _LEAST_SIDE
    if name == "auto":
        name = "scattering" if is_image else "values"
    if name == "values":
        return name, values
    if name != "scattering":
        raise UserError(f"The features must be one of {', '.join(FEATURES)}. Got {name!r}.")
    if not is_image:
        raise UserError(
            f"Scattering is for images (channels, height, width) of at least {_LEAST_SIDE}×{_LEAST_SIDE}, "
            f"got {example_shape}: choose the features 'values'."
        )
    return name, scattering


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return unit


@cache
def _transform(height: int, width: int) -> Scattering2d:
    return Scattering2d(height, width)
