"""The optional kernel of convolutional teachers: many small networks, each in the cache of one core.

`teachers.cpp` takes the same steps as the portable code in `dpml.pate.teachers`; tests hold it to them. It is
compiled on first use (`dpml.gradients.native`), for CPUs; set DPML_NO_KERNEL to do without.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from dpml.gradients import native

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("teachers.cpp")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class _Sizes(ctypes.Structure):
    _fields_ = [(name, _INT) for name in ("h", "w", "channels", "first", "second", "classes")]


class _Training(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("images", "labels", "rows", "moves", "rates")),
        *((name, _INT) for name in ("steps", "batch")),
        *((name, ctypes.c_double) for name in ("momentum", "decay")),
    ]


def kernel() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it cannot be had or is switched off."""
    return _load() if native.allowed() else None


def train(
    library: ctypes.CDLL,
    parameters: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    rows: Tensor,
    moves: Tensor,
    rates: list[float],
    *,
    momentum: float,
    decay: float,
) -> dict[str, Tensor]:
    """Networks after their steps; see `dpml.pate.teachers.train_convolutional`.

    Args:
        library: What `kernel` gave.
        parameters: Weights by name, networks along the first axis.
        images: Float32 [n, height, width, channels], contiguous.
        labels: Int64 [n], contiguous.
        rows: Int64 [networks, steps, batch], -1 for no record.
        moves: Int64 [networks, steps, batch, 2].
        rates: A learning rate for each step.
        momentum: Nesterov's.
        decay: Weight decay.
    """
    packed = _packed(parameters, _lanes(library))
    rows, moves, every = rows.contiguous(), moves.contiguous(), torch.tensor(rates, dtype=torch.float64)
    pointers = (t.data_ptr() for t in (images, labels, rows, moves, every))
    training = _Training(*pointers, *rows.shape[1:], momentum, decay)
    failed = library.dpml_train_teachers(
        _sizes(parameters, images), training, len(rows), packed.data_ptr(), torch.get_num_threads()
    )
    if failed:
        raise MemoryError("Not enough memory for the teachers' networks.")
    return _unpacked(packed, parameters, _lanes(library))


def classes(library: ctypes.CDLL, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """Each network's class for each input [m, channels, height, width]: int64 [m, networks]."""
    packed = _packed(parameters, _lanes(library))
    images = channels_last(inputs)
    found = torch.empty(len(images), len(packed), dtype=torch.int64)
    failed = library.dpml_teachers_votes(
        _sizes(parameters, images),
        len(packed),
        packed.data_ptr(),
        images.data_ptr(),
        len(images),
        found.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("Not enough memory for the teachers' votes.")
    return found


def channels_last(inputs: Tensor) -> Tensor:
    """Images as the kernel reads them: from [n, channels, height, width] to [n, height, width, channels]."""
    return inputs.float().permute(0, 2, 3, 1).contiguous()


@functools.cache
def _load() -> ctypes.CDLL | None:
    try:
        library = native.compiled_library(_SOURCE)
        library.dpml_teacher_lanes.restype = _INT
        library.dpml_train_teachers.argtypes = [
            ctypes.POINTER(_Sizes),
            ctypes.POINTER(_Training),
            *(_INT, _POINTER, _INT),
        ]
        library.dpml_teachers_votes.argtypes = [
            ctypes.POINTER(_Sizes),
            *(_INT, _POINTER, _POINTER, _INT, _POINTER, _INT),
        ]
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        _log.info("No compiled kernel, so portable code trains the teachers: %s", error)
        return None
    return library


def _lanes(library: ctypes.CDLL) -> int:
    return int(library.dpml_teacher_lanes())


def _sizes(parameters: dict[str, Tensor], images: Tensor) -> ctypes.Structure:
    first, second, classes = (parameters[f"bias{number}"].shape[1] for number in (1, 2, 3))
    return _Sizes(*images.shape[1:], first, second, classes)


def _packed(parameters: dict[str, Tensor], lanes: int) -> Tensor:
    """The kernel's layout [networks, size]: weight [patch, outputs] and bias of each layer in turn.

    Outputs of the linear layer are filled up with zeros to whole vectors.
    """
    missing = -parameters["bias3"].shape[1] % lanes
    last = _turned(parameters["weight3"], parameters["bias2"].shape[1])
    layers = [parameters[f"weight{number}"].permute(0, 3, 4, 2, 1) for number in (1, 2)]
    layers.append(torch.nn.functional.pad(last, (0, missing)))
    biases = [parameters["bias1"], parameters["bias2"]]
    biases.append(torch.nn.functional.pad(parameters["bias3"], (0, missing)))
    parts = [part.flatten(1) for pair in zip(layers, biases, strict=True) for part in pair]
    return torch.cat(parts, dim=1)


def _unpacked(packed: Tensor, like: dict[str, Tensor], lanes: int) -> dict[str, Tensor]:
    """From the kernel's layout to weights by name, in the shapes of `like`."""
    networks, wide = len(packed), math.ceil(like["bias3"].shape[1] / lanes) * lanes
    found, start = {}, 0
    for number in (1, 2, 3):
        weight, outputs = like[f"weight{number}"], like[f"bias{number}"].shape[1]
        width = wide if number == 3 else outputs
        patch = weight[0].numel() // outputs
        matrix = packed[:, start : start + patch * width].view(networks, patch, width)
        start += patch * width
        if number == 3:
            positions = patch // like["bias2"].shape[1]
            found["weight3"] = _turned(matrix[:, :, :outputs], positions)
        else:
            channels, kh, kw = weight.shape[2:]
            shaped = matrix.view(networks, kh, kw, channels, outputs)
            found[f"weight{number}"] = shaped.permute(0, 4, 3, 1, 2).contiguous()
        found[f"bias{number}"] = packed[:, start : start + outputs].contiguous()
        start += width
    return found


def _turned(weight: Tensor, first: int) -> Tensor:
    """Rows [networks, first·second, classes] in the order (second, first)."""
    networks, rows, classes = weight.shape
    return (
        weight.view(networks, first, rows // first, classes).transpose(1, 2).reshape(networks, rows, classes)
    )
