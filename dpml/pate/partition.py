"""Which teacher a private record belongs to: a rule that looks at that record alone.

A record's teacher follows from a keyed hash of the record itself. So adding, removing or zeroing one record
changes one teacher's data and moves no other record: one vote of each query, which is what
`accounting.GNMax` and its like are charged for. Shards by position ("every 250th record") do not have that
property: without the first record, all others would move to another teacher.

Sizes are random, as of balls thrown into bins. What is computed with a shard must not depend on another
shard's size, so each has the same number of places, which follows from public numbers, and a shard with more
records than places loses those of the largest hashes: its own matter.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from accounting import UserError
from accounting.events import check_count

_PREFIX = b"dpml teacher"


@dataclass(frozen=True, eq=False)
class Partition:
    """Disjoint shards of records.

    Attributes:
        members: Int64 [teachers, places]: the rows of each teacher's records, in the order of their hashes,
            and -1 at places that stay empty.
    """

    members: Tensor

    @property
    def teachers(self) -> int:
        """Number of shards."""
        return len(self.members)

    @classmethod
    def of(cls, inputs: Tensor, labels: Tensor, teachers: int, *, places: int, key: int = 0) -> Partition:
        """Give every record to one of `teachers` teachers.

        Guarantee: whether a record is there, and what it is, changes the shard of that record alone: for any
        other teacher the same records sit at the same places, whatever their rows are.

        Args:
            inputs: Shape [n, ...].
            labels: Int64 [n].
            teachers: Number of shards.
            places: The most records a shard can hold; chosen without looking at the records.
            key: Another key is another partition. It may be known.
        """
        teachers = check_count(teachers, "teachers", "a partition", low=1)
        places = check_count(places, "places", "a partition", low=1)
        digests = record_digests(inputs, labels, key)
        shard = (np.frombuffer(digests, dtype="<u8").reshape(-1, 2)[:, 0] % teachers).astype(np.int64)
        texts = np.frombuffer(digests, dtype="S16") if len(shard) else np.empty(0, dtype="S16")
        order = np.lexsort((texts, shard))  # by teacher, then by hash
        place = np.arange(len(order)) - np.searchsorted(shard[order], shard[order])
        kept = place < places
        members = torch.full((teachers, places), -1, dtype=torch.int64)
        members[torch.from_numpy(shard[order][kept]), torch.from_numpy(place[kept])] = torch.from_numpy(
            order[kept]
        )
        return cls(members)


def record_digests(inputs: Tensor, labels: Tensor, key: int) -> bytes:
    """16 bytes for each record, from its numbers, its label and the key alone."""
    rows = np.ascontiguousarray(inputs.detach().cpu().numpy().reshape(len(inputs), -1))
    classes = np.ascontiguousarray(labels.detach().cpu().numpy(), dtype="<i8")
    seed = hashlib.blake2b(_PREFIX + str(int(key)).encode(), digest_size=32).digest()
    digests = bytearray()
    for row, label in zip(rows, classes, strict=True):
        # Minus zero is zero: equal records are one, whatever their bytes.
        digest = hashlib.blake2b((row + 0.0).tobytes(), key=seed, digest_size=16)
        digest.update(label.tobytes())
        digests += digest.digest()
    return bytes(digests)


def default_places(examples: int, teachers: int) -> int:
    """Places that a shard of public, average size examples/teachers hardly ever exceeds.

    Six standard deviations more than the average: fewer than one shard in 10^8 loses a record.

    Raises:
        UserError: if there are more teachers than records.
    """
    if teachers > examples:
        raise UserError(
            f"{teachers} teachers need at least as many records, there are {examples}: choose fewer teachers."
        )
    mean = examples / teachers
    return math.ceil(mean + 6 * math.sqrt(mean) + 6)
