"""The file formats of the public benchmarks: IDX, CIFAR-10 records, and their containers.

Everything is read into memory with a limit that is known beforehand, and nothing is ever unpickled
or extracted to a path that a file has named.
"""

import gzip
import lzma
import struct
import tarfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accounting.errors import UserError

Bytes = NDArray[np.uint8]

_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_RECORD = 1 + 3 * 32 * 32  # a label byte, then the pixels, channel-first
_CLASSES = 10  # of each benchmark in these formats

# A tar file ends in zeros up to its block size, 10 KiB by default; its incidental files are tiny.
_SMALL = 1 << 20


class Blob(NamedTuple):
    """The content of one uncompressed file, and where it came from, for messages."""

    source: str
    data: bytes


def corrupt(source: str | Path, why: str) -> UserError:
    """The error for a file that is not what it should be."""
    return UserError(f"{str(source)!r} {why}: delete it and run again to have it fetched anew.")


def scale_bytes(images: Bytes) -> Tensor:
    """Bytes to float32 in [0, 1]. The divisor is the constant 255, so that no privacy is spent."""
    return torch.from_numpy(np.divide(images, np.float32(255), dtype=np.float32))


def decode_idx(blobs: Sequence[Blob]) -> tuple[Bytes, Bytes]:
    """Images `[n, 1, height, width]` and labels `[n]` from an IDX file of each.

    Raises:
        UserError: A header or length is wrong, the lengths differ, or a label is above 9.
    """
    images, labels = (_idx_array(blob, ndim) for blob, ndim in zip(blobs, (3, 1), strict=True))
    if len(images) != len(labels):
        raise corrupt(blobs[1].source, f"has {len(labels)} labels for {len(images)} images")
    _check_labels(blobs[1].source, labels)
    return images[:, None], labels


def _idx_array(blob: Blob, ndim: int) -> Bytes:
    """Parse IDX: two zero bytes, the type (8: unsigned byte), the rank, big-endian sizes, data."""
    header = 4 + 4 * ndim
    if len(blob.data) < header or blob.data[:4] != bytes((0, 0, 8, ndim)):
        raise corrupt(blob.source, f"is not an IDX file of {ndim}-dimensional bytes")
    shape = struct.unpack_from(f">{ndim}I", blob.data, offset=4)
    values = np.frombuffer(blob.data, np.uint8, offset=header)
    if values.size != np.prod(shape, dtype=object):
        raise corrupt(blob.source, f"has {values.size} bytes of data where its header says {shape}")
    return values.reshape(shape)


def decode_cifar(blobs: Sequence[Blob]) -> tuple[Bytes, Bytes]:
    """Images `[n, 3, 32, 32]` and labels `[n]` from files of CIFAR-10's binary records.

    Raises:
        UserError: A file is not a whole number of records, or a label is above 9.
    """
    batches = []
    for blob in blobs:
        if len(blob.data) % _CIFAR_RECORD:
            raise corrupt(blob.source, f"is not a whole number of {_CIFAR_RECORD}-byte records")
        records = np.frombuffer(blob.data, np.uint8).reshape(-1, _CIFAR_RECORD)
        _check_labels(blob.source, records[:, 0])
        batches.append(records)
    images = np.concatenate([records[:, 1:] for records in batches]).reshape(-1, *_CIFAR_SHAPE)
    return images, np.concatenate([records[:, 0] for records in batches])


def _check_labels(source: str, labels: Bytes) -> None:
    if (largest := labels.max(initial=0)) >= _CLASSES:
        raise corrupt(source, f"holds the label {largest}, where 0 to {_CLASSES - 1} are expected")


def read_plain(path: Path, size: int) -> bytes:
    """The content of a file that must have `size` bytes.

    Raises:
        UserError: It has not.
    """
    if (found := path.stat().st_size) != size:
        raise corrupt(path, f"has {found} bytes where {size} are expected")
    return path.read_bytes()


def read_gzip(path: Path, size: int) -> bytes:
    """The content of a gzip file that must have `size` bytes when it is uncompressed.

    Raises:
        UserError: It has not, or the container is damaged.
    """
    try:
        with gzip.open(path) as stream:
            data = stream.read(size + 1)  # one more, to reach the end, where the checksum is
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise corrupt(path, "is not a complete gzip file") from error
    if len(data) != size:
        found = f"{len(data)} bytes" if len(data) < size else "more"
        raise corrupt(path, f"holds {found} where {size} bytes are expected")
    return data


def read_tar(path: Path, sizes: Mapping[str, int], *, ignored: Collection[str] = ()) -> dict[str, bytes]:
    """The content of the files in a `.tar.gz` or `.tar.xz`, by name. Nothing is written to disk.

    Args:
        path: The archive.
        sizes: The files that it must hold, and their sizes in bytes.
        ignored: Small files that it may hold too.

    Raises:
        UserError: A file is missing, of another size, there twice, no plain file, or neither in
            `sizes` nor `ignored`; or the container is damaged.
    """
    contents: dict[str, bytes] = {}
    try:
        with (
            lzma.open(path) if path.suffix == ".xz" else gzip.open(path) as stream,
            tarfile.open(fileobj=stream, mode="r:") as archive,
        ):
            for member in archive:
                if member.isdir() or (member.name in ignored and member.size <= _SMALL):
                    continue
                if member.name not in sizes or member.name in contents or not member.isfile():
                    raise corrupt(path, f"holds an unexpected member {member.name!r}")
                if member.size != sizes[member.name]:
                    raise corrupt(path, f"holds {member.size} bytes as {member.name!r}")
                file = archive.extractfile(member)
                assert file is not None  # noqa: S101 (a plain file has content)
                contents[member.name] = file.read()
            # Read to the end of the stream, where the container's checksum is verified.
            if len(stream.read(_SMALL + 1)) > _SMALL:
                raise corrupt(path, "goes on after the end of the archive")
    except (tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error) as error:
        raise corrupt(path, "is not a complete tar archive") from error
    if missing := sorted(sizes.keys() - contents.keys()):
        raise corrupt(path, f"lacks {missing[0]!r}")
    return contents
