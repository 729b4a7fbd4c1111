"""From record numbers to micro-batches of a fixed size, from tensors or from a user's own data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from accounting.errors import UserError
from accounting.events import check_count
from dpml.augmentation import Augment
from dpml.gradients.engine import MicroBatch


class Examples:
    """Training examples by number.

    Args:
        data: A map-style data set of (input, target) pairs; a `TensorDataset` is read without a loop.
        micro_batch_size: Rows of each micro-batch. It has m = ⌊micro_batch_size / views⌋ places for records,
            at least 1.
        workers: Processes that read `data`; 0 for this one.
        device: Where micro-batches go.
        views: Rows for each record, one after the other.
        augment: Changes each row at random. The caller seeds torch's global generator, which it draws from.

    Raises:
        UserError: if `data` has no length, is empty, or yields something else than pairs.
    """

    def __init__(
        self,
        data: Any,
        micro_batch_size: int = 128,
        workers: int = 0,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
        views: int = 1,
        augment: Augment | None = None,
    ) -> None:
        check_records(data, "training set")
        check_count(micro_batch_size, "micro_batch_size", "Examples", low=1)
        check_count(workers, "workers", "Examples")
        check_count(views, "views", "Examples", low=1)
        # Padding beyond the whole data set would be work for nothing.
        self._data, self._device = data, device
        self._size = min(max(1, micro_batch_size // views), len(data))
        self._views, self._augment = views, augment
        self._tensors: tuple[Tensor, ...] | None = None
        if isinstance(data, TensorDataset):
            self._tensors = data.tensors
        self._queue = _Queue()
        self._loader: DataLoader[Any] | None = None
        if self._tensors is None and workers > 0:
            records: Any = data
            self._loader = DataLoader(
                records, batch_sampler=self._queue, num_workers=workers, persistent_workers=True
            )

    def __len__(self) -> int:
        return len(self._data)

    def micro_batches(self, indices: Tensor) -> Iterator[MicroBatch]:
        """The records of a sample, in micro-batches of exactly m places, the last one padded.

        Args:
            indices: Record numbers, int64, shape [k]. Empty for no micro-batches.
        """
        chunks = list(torch.split(indices, self._size)) if len(indices) else []
        for inputs, targets, count in self._read(chunks):
            mask = torch.zeros(self._size, dtype=torch.bool)
            mask[:count] = True
            rows = self._viewed(to_device(_pad(inputs, self._size), self._device))
            yield MicroBatch(
                rows if self._augment is None else self._augment(rows),
                self._viewed(to_device(_pad(targets, self._size), self._device)),
                mask.to(self._device),
                self._views,
            )

    def inputs(self) -> Iterator[Tensor]:
        """The inputs of all records, in parts, not augmented. Each must be one tensor."""
        for inputs, _, _ in self._read(list(torch.split(torch.arange(len(self)), self._size))):
            yield to_device(inputs, self._device)

    def _viewed(self, value: Any) -> Any:
        """Each record as many times as it has views, in a row."""
        return value if self._views == 1 else _map(value, lambda t: t.repeat_interleave(self._views, dim=0))

    def probe(self) -> tuple[Any, Any]:
        """One record as a batch, inputs and targets, for their shape and type alone. It is not augmented."""
        inputs, targets, _ = next(self._read([torch.zeros(1, dtype=torch.int64)], direct=True))
        return to_device(inputs, self._device), to_device(targets, self._device)

    def _read(self, chunks: list[Tensor], *, direct: bool = False) -> Iterator[tuple[Any, Any, int]]:
        if self._tensors is not None:
            for chunk in chunks:
                yield self._tensors[0][chunk], self._tensors[1][chunk], len(chunk)
        elif self._loader is not None and not direct:
            self._queue.chunks = chunks
            for chunk, (inputs, targets) in zip(chunks, self._loader, strict=True):
                yield inputs, targets, len(chunk)
        else:
            for chunk in chunks:
                inputs, targets = _collated([self._data[i] for i in chunk.tolist()])
                yield inputs, targets, len(chunk)


def _collated(records: list[Any]) -> Any:
    try:
        return default_collate(records)
    except (TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"The records cannot be put together in one batch: {reason}.") from error


def check_records(data: Any, name: str) -> None:
    """Raise UserError unless `data` is a map-style data set with at least one pair (input, target)."""
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
        raise UserError(
            f"The {name} must have a length and give its records by number (a map-style data set); a stream "
            f"cannot be Poisson-sampled. Got {type(data).__name__}."
        )
    if len(data) == 0:
        raise UserError(f"The {name} is empty; give at least one record.")
    try:
        pair = data.tensors if isinstance(data, TensorDataset) else data[0]
    except (KeyError, IndexError) as error:
        raise UserError(f"The {name} has no record number 0. Got {type(data).__name__}.") from error
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise UserError(f"Each record of the {name} must be a pair (input, target).")


class _Queue:
    """A batch sampler that yields what it was told last; persistent workers then serve every sample."""

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []

    def __iter__(self) -> Iterator[list[int]]:
        return (chunk.tolist() for chunk in self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)


def _pad(value: Any, size: int) -> Any:
    """Repeat the first record until there are `size`; the mask says that they do not count."""
    if isinstance(value, Tensor):
        missing = size - len(value)
        return torch.cat([value, value[:1].expand(missing, *value.shape[1:])]) if missing else value
    if isinstance(value, dict):
        return {key: _pad(part, size) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_pad(part, size) for part in value)
    raise UserError(f"Records must be made of tensors and numbers. Got {type(value).__name__}.")


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors on a device, ready to compute with: what is kept in 16 bits to save memory becomes float32."""
    return _map(value, lambda t: t.to(device).float() if t.dtype == torch.float16 else t.to(device))


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(part, change) for key, part in value.items()}
    return type(value)(_map(part, change) for part in value)
