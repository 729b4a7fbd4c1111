"""Small models for private training, by name: `build("cnn", (1, 28, 28), classes=10)`.

Each handles the examples of a batch independently of each other, and updates nothing in place, so
that per-example gradients exist: no batch normalisation. Smooth, bounded activations keep
gradients, and so the bias of clipping, small (Papernot, Thakurta, Song, Chien and Erlingsson 2020,
"Tempered sigmoid activations for deep learning with differential privacy").

Beside them, a larger one for images, "wrn-16-4", and `TransformerClassifier` for sequences of tokens.
"""

import difflib
import math
from collections.abc import Callable, Sequence

from torch import nn

from accounting.errors import UserError
from accounting.events import shown
from dpml.models.networks import cnn, linear, linear_without_bias, mlp
from dpml.models.transformer import TransformerClassifier
from dpml.models.wide_resnet import WideResNet, wrn_16_4

_MOST_NUMBERS, _MOST_CLASSES = 10**7, 10**6
"""Of an example, and to tell apart; more is a mistake, whose layers would not fit in memory."""

__all__ = ["MODELS", "TransformerClassifier", "WideResNet", "build"]

MODELS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "cnn": cnn,
    "mlp": mlp,
    "linear": linear,
    "linear-without-bias": linear_without_bias,
    "wrn-16-4": wrn_16_4,
}
"""From a name to a function of an example's shape and the number of classes. Add your own."""


def build(name: str, example_shape: Sequence[int], classes: int) -> nn.Module:
    """Make a new model, its weights drawn by PyTorch's defaults from the global generator.

    Seed with `torch.manual_seed` for the same weights again. They do not depend on data.

    Args:
        name: One of `MODELS`.
        example_shape: The shape of one example: `(channels, height, width)` for images.
        classes: The number of classes, at least 2.

    Returns:
        A model from float32 `[n, *example_shape]`, n ≥ 0, to logits `[n, classes]`.

    Raises:
        UserError: There is no such model, or it cannot take examples of that shape.
    """
    if not isinstance(name, str) or name not in MODELS:
        close = difflib.get_close_matches(name.lower(), MODELS, n=1) if isinstance(name, str) else []
        hint = f"did you mean {close[0]!r}? There are" if close else "choose one of"
        raise UserError(f"There is no model {shown(name)}; {hint} {', '.join(MODELS)}.")
    shape = tuple(example_shape) if isinstance(example_shape, Sequence) else ()
    if not shape or not all(type(size) is int and size > 0 for size in shape):
        raise UserError(
            f"The shape of an example must be one or more positive integers, got {shown(example_shape)}: "
            "leave out the batch axis."
        )
    if math.prod(shape) > _MOST_NUMBERS:
        raise UserError(f"An example must have at most 10^7 numbers. Its shape is {shown(example_shape)}.")
    if type(classes) is not int or not 2 <= classes <= _MOST_CLASSES:
        raise UserError(
            f"A model needs an integer of at least 2 classes, at most 10^6, got {shown(classes)}."
        )
    return MODELS[name](shape, classes)
