"""Random changes of records before their gradients are taken, each record's by itself.

The random numbers come from torch's global generator, which the trainer seeds with secret words in each
step: with known ones, a record that moves the others' places in a batch would be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accounting.errors import UserError

Augment = Callable[[Tensor], Tensor]
"""From inputs, shape [rows, ...], to as many rows, each a random change of the row at its place alone."""

_SHIFT = 4
_TRIALS = 32


def flip_crop(images: Tensor) -> Tensor:
    """Mirror half of the images, and cut each at random out of itself, reflected by 4 pixels on each side.

    Args:
        images: Shape [rows, channels, height, width], height and width of 5 or more; so is the result. Three
            random numbers are drawn for each row, in order, so on the CPU the result does not depend on how
            rows are cut into micro-batches.
    """
    if images.dim() != 4 or min(images.shape[2:]) <= _SHIFT:
        shape = tuple(images.shape[1:])
        raise UserError(
            f"The augmentation flip-crop is for images [channels, height, width] of at least {_SHIFT + 1} "
            f"pixels a side. Got records of shape {shape}."
        )
    rows, channels, height, width = images.shape
    flip, down, right = torch.rand(rows, 3, device=images.device).unbind(dim=1)
    y = _reflected(height, down)
    x = _reflected(width, right)
    x = torch.where((flip < 0.5)[:, None], width - 1 - x, x)
    row = torch.arange(rows, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return images[row, channel, y[:, None, :, None], x[:, None, None, :]]


def _reflected(size: int, uniform: Tensor) -> Tensor:
    """For each row of `uniform`: `size` places in a row after a random shift, reflected at both ends."""
    shift = (uniform * (2 * _SHIFT + 1)).long().clamp(max=2 * _SHIFT) - _SHIFT
    places = (torch.arange(size, device=uniform.device) + shift[:, None]).abs()
    return (size - 1) - (size - 1 - places).abs()


AUGMENTATIONS: dict[str, Augment | None] = {"none": None, "flip-crop": flip_crop}


def require_independent_rows(augment: Augment, example: Any) -> Tensor:
    """Raise UserError if an augmentation mixes the rows of a batch; return one augmented, made-up row.

    It is tried on two made-up rows, with the same random numbers and another row, or one of NaN, beside:
    what becomes of a row must not change. Mixup is found so, also if it mixes now and then only.

    Args:
        augment: The augmentation.
        example: Inputs of one record, shape [1, ...], for their shape, type and device alone.
    """
    if not isinstance(example, Tensor):
        raise UserError(
            f"An augmentation needs inputs that are one tensor a record. Got {type(example).__name__}."
        )
    devices = [example.device] if example.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(0)
        first, second, other = (_made_up(example) for _ in range(3))
        spoilt = torch.full_like(first, torch.nan) if first.is_floating_point() else other
        for trial in range(_TRIALS):
            pair = _augmented(augment, [first, second], trial)
            if not _same(pair, _augmented(augment, [first, second], trial)):
                raise UserError(
                    "The augmentation takes random numbers from elsewhere than torch's global generator, "
                    "which the run seeds with secret ones; use torch.rand and the like, without a generator."
                )
            for beside in (other, spoilt):
                above = _augmented(augment, [first, beside], trial)
                below = _augmented(augment, [beside, second], trial)
                if not (_same(above[0], pair[0]) and _same(below[1], pair[1])):
                    raise UserError(
                        "The augmentation mixes the rows of a batch: what becomes of one depends on another "
                        "(as in mixup), so clipping single gradients bounds nothing; change each by itself."
                    )
    return pair[:1]


def _augmented(augment: Augment, rows: list[Tensor], seed: int) -> Tensor:
    torch.manual_seed(seed)
    try:
        changed = augment(torch.cat(rows))
    except UserError:
        raise
    except Exception as error:  # whatever it raises is the user's to read, in one line
        shape, reason = tuple(rows[0].shape[1:]), " ".join(str(error).split())
        raise UserError(f"The augmentation refuses records of shape {shape}: {reason:.200}") from error
    if not isinstance(changed, Tensor) or changed.shape[:1] != (len(rows),):
        got = f"shape {tuple(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
        raise UserError(
            f"The augmentation must return a tensor of as many rows as it got, {len(rows)}. Got {got}."
        )
    return changed


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(((first == second) | (first.isnan() & second.isnan())).all())


def _made_up(example: Tensor) -> Tensor:
    if example.is_floating_point():
        return torch.rand_like(example)
    return torch.randint_like(example, 0, 2)
