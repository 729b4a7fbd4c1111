"""Features of a data set, in 16 bits. Their blocks are computed once, and kept in the user's cache.

They are as private as the images, and readable by their owner alone. The key holds all that they follow from.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from tokenize import TokenError

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpml.data.labeled import LabeledData
from dpml.data.official import cache_folder
from dpml.features.blocks import VERSION
from dpml.features.maps import FeatureMap
from dpml.paths import require_plain

Progress = Callable[[str, int, int], None]
"""Told a block's name, how many images are done, and of how many."""
_CHUNK = 64
_DIGEST = 32


def features_of(
    name: str, data: LabeledData, *, cached: bool = True, progress: Progress = lambda *_: None
) -> tuple[Tensor, Tensor]:
    """The features of a data set's training and test images, float16 [n, *shape], shape that of `FeatureMap`.

    Args:
        name: See `FeatureMap`.
        data: Images.
        cached: Look for their blocks in the user's cache, and keep them there. A cache that cannot be written
            is done without.
        progress: Told about images that were computed.

    Raises:
        UserError: for an unknown name, or data that is no images.
    """
    function = FeatureMap(name, data.example_shape)
    return (
        _features(function, data.x_train, cached, progress),
        _features(function, data.x_test, cached, progress),
    )


def _features(function: FeatureMap, images: Tensor, cached: bool, progress: Progress) -> Tensor:
    blocks = [_obtain(function, block, images, cached, progress) for block in function.blocks]
    if len(blocks) == 1:
        return blocks[0].view(-1, *function.shape)
    parts = [torch.split(block, _CHUNK) for block in blocks]
    result = torch.empty(len(images), sum(block.shape[1] for block in blocks), dtype=torch.float16)
    for number, chunk in enumerate(zip(*parts, strict=True)):
        start = number * _CHUNK
        result[start : start + _CHUNK] = function.joined(chunk)
    return result


def _obtain(function: FeatureMap, block: str, images: Tensor, cached: bool, progress: Progress) -> Tensor:
    """A block of maps, float16, from the cache or computed."""

    def chunks() -> Iterator[npt.NDArray[np.float16]]:
        for start in range(0, len(images), _CHUNK):
            yield function.block(block, images[start : start + _CHUNK]).half().numpy()
            progress(block, min(start + _CHUNK, len(images)), len(images))

    if cached:
        path = cache_folder() / "features" / f"{block}-{_key(block, images)}.npy"
        if (found := _read(path)) is not None:
            return found
        try:
            _write(path, chunks(), len(images))
        except OSError:  # a full or read-only disk
            pass
        else:
            if (found := _read(path)) is not None:
                return found
    return torch.from_numpy(np.concatenate(list(chunks())))


def _key(block: str, images: Tensor) -> str:
    digest = hashlib.blake2b(repr((block, VERSION, tuple(images.shape))).encode(), digest_size=16)
    digest.update(images.numpy().data)
    return digest.hexdigest()


def _write(path: Path, chunks: Iterator[npt.NDArray[np.float16]], rows: int) -> None:
    """Keep an array, and its digest after its end; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            digest = hashlib.blake2b(digest_size=_DIGEST)
            for number, chunk in enumerate(chunks):
                if number == 0:
                    header = {"descr": "<f2", "fortran_order": False, "shape": (rows, *chunk.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(chunk.tobytes())
                digest.update(chunk.tobytes())
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> Tensor | None:
    """An array of the cache, mapped into memory, if it is whole."""
    try:
        require_plain(path)
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        with path.open("rb") as file:
            file.seek(-_DIGEST, os.SEEK_END)
            end = file.read()
    except (OSError, ValueError, EOFError, SyntaxError, TokenError):  # NumPy reads a header as Python
        return None
    whole = isinstance(array, np.memmap) and array.dtype == np.float16
    if not whole or hashlib.blake2b(array.data, digest_size=_DIGEST).digest() != end:
        return None
    return torch.from_numpy(array)
