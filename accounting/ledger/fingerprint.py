"""A data set's fingerprint: it recognises records under another name, and reveals nothing without a key.

A sketch holds the smallest keyed hashes of the distinct records (bottom-k, Broder 1997). Their order and
number of appearances do not matter, and where two sketches overlap, the share of common hashes estimates
which share of the smaller data set's records is in the larger one. The sketch is stored under a pad that
SHAKE-256 makes of the key and a fresh nonce, at one fixed length: not even the number of records shows.
Whoever has the key can test, with some luck, whether a record they know took part: the key lies beside the
ledger, for the same readers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from accounting.errors import UserError
from accounting.events import shown

Sketch = npt.NDArray[np.uint64]
SIZE = 1024
"""Hashes that a sketch holds at most."""
LIKENESS = 0.5
"""From which share of the smaller data set's records on two data sets are called alike."""
_LEAST = 16  # hashes to be compared before anything is said
_NONE = np.uint64(2**64 - 1)
_NONCE, _KEY = 16, 32  # bytes


def key_path(ledger: Path) -> Path:
    """Where the key of a ledger lies."""
    return ledger.with_name(f"{ledger.name}.key")


def read_key(ledger: Path) -> bytes:
    """The key of a ledger, for the same readers; made if there is none.

    Raises:
        UserError: if the file holds something else.
        OSError: if it cannot be read.
    """
    path = key_path(ledger)
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600 | ledger.stat().st_mode & 0o040)
            file.write(os.urandom(_KEY))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:  # another process was faster
            pass
        finally:
            temporary.unlink()
    key = path.read_bytes() if path.is_file() else b""  # a device or a pipe may have no end
    if len(key) != _KEY:
        raise UserError(f"{str(path)!r} holds no key of a ledger; remove it to have a new one made.")
    return key


def sketch(records: Iterable[bytes], key: bytes) -> Sketch:
    """The smallest `SIZE` hashes of the distinct records, in order: uint64 [at most SIZE].

    Raises:
        UserError: if the records are not bytes.
    """
    try:
        digests = b"".join(
            hashlib.blake2b(record, digest_size=8, key=key, person=b"dpml record").digest()
            for record in records
        )
    except (TypeError, ValueError, BufferError) as error:
        raise UserError(f"A fingerprint is made of records as bytes. Got {shown(records)}.") from error
    return np.unique(np.frombuffer(digests, dtype="<u8").astype(np.uint64))[:SIZE]


def likeness(one: Sketch, other: Sketch) -> float:
    """Which share of the smaller data set's records is in the larger one: an estimate; 0 if too few tell.

    A part of a larger data set is recognised down to about 1/64 of it.
    """
    limit = min(part[-1] if len(part) == SIZE else _NONE for part in (one, other))
    parts = [part[part <= limit] for part in (one, other)]
    smaller = min(map(len, parts))
    return 0.0 if smaller < _LEAST else len(np.intersect1d(parts[0], parts[1])) / smaller


def alike(name: str, sketches: Mapping[str, Iterable[Sketch]]) -> list[str]:
    """The names of other data sets that look like this one, at any time."""
    mine = list(sketches.get(name, ()))
    return [
        other
        for other, theirs in sketches.items()
        if other != name and any(likeness(a, b) >= LIKENESS for a in mine for b in theirs)
    ]


def seal(found: Sketch, key: bytes) -> str:
    """The sketch as text that says nothing without the key, of one length for all."""
    padded = np.full(SIZE, _NONE, dtype="<u8")
    padded[: len(found)] = found
    nonce = os.urandom(_NONCE)
    return (nonce + _xor(padded.tobytes(), nonce, key)).hex()


def unseal(text: str, key: bytes) -> Sketch:
    """The sketch that was sealed; with another key, numbers without meaning."""
    sealed = bytes.fromhex(text)
    opened = np.frombuffer(_xor(sealed[_NONCE:], sealed[:_NONCE], key), dtype="<u8").astype(np.uint64)
    return np.sort(opened[opened != _NONE])


def _xor(text: bytes, nonce: bytes, key: bytes) -> bytes:
    pad = hashlib.shake_256(b"dpml seal" + key + nonce).digest(len(text))
    return (np.frombuffer(text, np.uint8) ^ np.frombuffer(pad, np.uint8)).tobytes()
