"""The optional kernel: compiled on first use where there is a compiler, and done without where there is none.

`kernels.cpp` computes the clipped sum of several layers at once, one example after the other, on CPUs in
float32. The tests hold it to the same sums as the portable code. Set DPML_NO_KERNEL to do without.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pooch
import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC"]
_SIZES = ("h", "w", "channels", "oh", "ow", "out")
_GEOMETRY = ("kh", "kw", "sh", "sw", "ph", "pw", "dh", "dw", "views", "bias", "rank_one")
_POINTER, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_ARGUMENTS = {
    "dpml_clipped_sums": [_POINTER, _INT, _INT, *[_POINTER] * 2, *[_DOUBLE] * 2, *[_POINTER] * 2, _INT],
    "dpml_layer_norm": [*[_POINTER] * 2, *[_INT] * 3, _DOUBLE, *[_POINTER] * 2, _INT],
    "dpml_group_norm_backward": [*[_POINTER] * 5, *[_INT] * 4, *[_POINTER] * 3, _INT],
}

_switch: ContextVar[bool] = ContextVar("switch", default=True)


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "g")),
        *((name, ctypes.c_int64) for name in (*_SIZES, *_GEOMETRY)),
        *((name, ctypes.c_void_p) for name in ("standard", "gain", "scale", "unclamped")),
        *((name, ctypes.c_void_p) for name in ("sum", "bias_sum", "gain_sum")),
    ]


@dataclass(frozen=True, eq=False)
class NativeLayer:
    """What the kernel is told of a layer. All tensors are float32 on the CPU, and contiguous.

    Attributes:
        x: The layer's inputs [m·views, h, w, in].
        g: Gradients of its outputs [m·views, oh, ow, out].
        kernel: (kh, kw); (1, 1) for a linear layer over a sequence.
        stride, padding, dilation: As in `torch.nn.Conv2d`.
        views: Images of each example.
        rank_one: For a linear layer at a single position, h = w = 1: its gradient is never computed.
        standard: For a standardised weight: itself without its gain [out, kh, kw, in], the gain [out], the
            scale [out], and whether that depends on the weight, bool [out].
    """

    x: Tensor
    g: Tensor
    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    views: int = 1
    rank_one: bool = False
    standard: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def described(self, sums: Sequence[Tensor | None]) -> _Layer:
        """For the kernel. `sums`: float64 totals of weight [out, kh, kw, in], bias and gain, or None."""
        weight, bias, gain = sums
        _, h, w, channels = self.x.shape
        _, oh, ow, out = self.g.shape
        standard = [None] * 4 if self.standard is None else [t.data_ptr() for t in self.standard]
        sizes = [
            h,
            w,
            channels,
            oh,
            ow,
            out,
            *self.kernel,
            *self.stride,
            *self.padding,
            *self.dilation,
            self.views,
        ]
        results = [None if t is None else t.data_ptr() for t in (weight, bias, gain)]
        return _Layer(
            self.x.data_ptr(),
            self.g.data_ptr(),
            *sizes,
            int(bias is not None),
            int(self.rank_one),
            *standard,
            *results,
        )


def clipped_sums(
    layers: Sequence[tuple[NativeLayer, Sequence[Tensor | None]]],
    squares: Tensor,
    counted: Tensor,
    clip: float,
    stabiliser: float,
) -> tuple[Tensor, Tensor]:
    """Add the layers' clipped sums to their totals.

    Args:
        layers: Each layer, and its float64 totals as in `NativeLayer.described`.
        squares: The squared norms of the examples' gradients in other layers, float64 [m].
        counted: Which examples count, bool [m].
        clip: C.
        stabiliser: 0 for weights min(1, C/norm); else C/(norm + stabiliser).

    Returns:
        The examples' norms over all layers, and their weights: 0 where one does not count or is not finite.
    """
    library = kernel()
    assert library is not None  # noqa: S101 - the caller asks first
    described = (_Layer * len(layers))(*(layer.described(sums) for layer, sums in layers))
    norms, weights = torch.empty_like(squares), torch.empty_like(squares)
    pointers = _pointers(squares, counted, norms, weights)
    failed = library.dpml_clipped_sums(
        described,
        len(layers),
        len(squares),
        *pointers[:2],
        clip,
        stabiliser,
        *pointers[2:],
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("Not enough memory for the gradients of one example.")
    return norms, weights


def layer_norm_rows(x: Tensor, g: Tensor, epsilon: float) -> tuple[Tensor, Tensor] | None:
    """The gradients of a LayerNorm's weight and bias, one for each image, in one pass over the data.

    Args:
        x: Inputs [images, positions, channels], float32, contiguous.
        g: Gradients of the outputs, likewise.
        epsilon: As in the layer.

    Returns:
        Σ g·x̂ and Σ g over positions, [images, channels] each; None without a kernel.
    """
    library = kernel()
    if library is None:
        return None
    images, positions, channels = x.shape
    scale, shift = x.new_empty(images, channels), x.new_empty(images, channels)
    library.dpml_layer_norm(
        *_pointers(x, g),
        images,
        positions,
        channels,
        epsilon,
        *_pointers(scale, shift),
        torch.get_num_threads(),
    )
    return scale, shift


class GroupNormFunction(torch.autograd.Function):
    """GroupNorm with a backward pass that also finds the gradients of weight and bias for each image.

    They are left in the attribute `rows` of the node, [images, channels] each. Inputs: x, channels last;
    weight, bias, number of groups, epsilon.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> Tensor:
        """PyTorch's own."""
        images, channels, height, width = x.shape
        y, mean, factor = torch.native_group_norm(
            x, weight, bias, images, channels, height * width, groups, epsilon
        )
        ctx.save_for_backward(x, weight, mean, factor)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """One pass for the sums, one for the input's gradient."""
        x, weight, mean, factor = ctx.saved_tensors
        images, channels, height, width = x.shape
        g = gradients[0].contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        scale, shift = x.new_empty(images, channels), x.new_empty(images, channels)
        library = _load()
        assert library is not None  # noqa: S101 - or this function would not have been chosen
        failed = library.dpml_group_norm_backward(
            *_pointers(x, g, mean, factor, weight),
            images,
            height * width,
            channels,
            mean.shape[1],
            *_pointers(dx, scale, shift),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("Not enough memory for the backward pass of a GroupNorm.")
        ctx.rows = (scale, shift)
        return dx, None, None, None, None


def fast_group_norm(layer: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
    """The layer's forward pass, with `GroupNormFunction` where that can be."""

    def forward(x: Tensor) -> Tensor:
        if x.ndim != 4 or x.device.type != "cpu" or x.dtype != torch.float32 or not torch.is_grad_enabled():
            return nn.GroupNorm.forward(layer, x)
        x = x.contiguous(memory_format=torch.channels_last)
        if not x.permute(0, 2, 3, 1).is_contiguous():  # one channel, which counts as either format
            return nn.GroupNorm.forward(layer, x)
        y: Tensor = GroupNormFunction.apply(  # type: ignore[no-untyped-call]
            x, layer.weight, layer.bias, layer.num_groups, layer.eps
        )
        return y

    return forward


def _pointers(*tensors: Tensor) -> list[int]:
    return [t.data_ptr() for t in tensors]


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Let the kernel be used, where there is one, or not."""
    token = _switch.set(on)
    try:
        yield
    finally:
        _switch.reset(token)


def kernel() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it cannot be had or is switched off."""
    return _load() if allowed() else None


@functools.cache
def _load() -> ctypes.CDLL | None:
    try:
        library = compiled_library(_SOURCE)
        if library.dpml_layer_bytes() != ctypes.sizeof(_Layer):
            raise OSError("its layout differs")
        for name, types in _ARGUMENTS.items():
            getattr(library, name).argtypes = types
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        _log.info("No compiled kernel, so portable code computes clipped sums: %s", error)
        return None
    return library


def compiled_library(source: Path) -> ctypes.CDLL:
    """The library made from C++, compiled if it is not in the cache.

    Raises:
        OSError: There is no compiler, or nowhere to put what it makes, or that cannot be loaded.
        subprocess.SubprocessError: The compiler fails.
    """
    return ctypes.CDLL(str(_compiled(source)))


def allowed() -> bool:
    """Whether compiled kernels may be used here at all."""
    return _switch.get() and not os.environ.get("DPML_NO_KERNEL")


def _compiled(source: Path = _SOURCE) -> Path:
    """The shared library for this source, compiler and processor; compiled if it is not there."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler")
    key = hashlib.sha256(source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60)  # noqa: S603
    key.update(version.stdout + " ".join(_FLAGS).encode() + processor().encode())
    folder = Path(pooch.os_cache("dpml")) / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    name = key.hexdigest()[:32]
    for path in folder.glob(f"{name}-*.so"):
        if path.stem == f"{name}-{_digest(path)}":  # a library that was cut short would kill the process
            return path
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fresh = Path(scratch) / "fresh.so"
        command = [compiler, *_FLAGS, str(source), "-o", str(fresh)]
        subprocess.run(command, capture_output=True, check=True, timeout=300)  # noqa: S603
        return fresh.replace(folder / f"{name}-{_digest(fresh)}.so")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def processor() -> str:
    """What tells processors with other instructions apart: a cache may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = [line for line in lines if line.startswith(("flags", "Features", "model name"))][:2]
    return " ".join([platform.machine(), platform.processor(), *flags])
