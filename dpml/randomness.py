"""Where privacy noise and sampling take their randomness from.

Both need bits that nobody can predict: whoever can guess the noise can subtract it. A stream here is
the key stream of AES-256 in counter mode, keyed by the operating system. A stream made from a seed uses
the same cipher and is reproducible, which makes what it protects *not* private; it says so.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import mpmath
import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from accounting.errors import UserError
from accounting.events import check_count, check_instance, shown

_CHUNK = 2**20
_DOUBT = 2.0**-16  # see NormalDraw
Words = npt.NDArray[np.uint64]


class Draw(ABC):
    """Numbers of a continuous law that were drawn as float64, and can be known as exactly as wanted.

    Behind each stand uniform real numbers of which 52 bits were drawn. The law of the real number is exact:
    more bits are drawn when somebody asks, from a stream of its own, so that what is drawn later from the
    first one does not depend on whether somebody did. All values but the `doubtful` ones are within `error`
    of it.

    Attributes:
        values: What was drawn, float64 [n].
        doubtful: Positions of values that may be farther off: one in some hundred thousand.
    """

    error = 2.0**-36
    values: npt.NDArray[np.float64]
    doubtful: npt.NDArray[np.int64]

    def __init__(self, randomness: Randomness) -> None:
        key = randomness.words(4).astype("<u8").tobytes()
        self._randomness = Randomness(key, is_secret=randomness.is_secret)
        self._more: dict[tuple[int, int], tuple[int, int]] = {}

    @abstractmethod
    def enclose(self, position: int, bits: int) -> Any:
        """An interval that holds the real number at `position`, from `bits` more bits of its uniforms."""

    def _uniform(self, source: int, place: int, word: int, bits: int) -> Any:
        """The interval of one uniform number in (0, 1): its first 52 bits and `bits` more, drawn once."""
        known, length = self._more.get((source, place), (0, 0))
        while length < bits:
            known = known << 64 | int(self._randomness.words(1)[0])
            length += 64
        self._more[source, place] = known, length
        whole = (word << length) | known
        return mpmath.iv.mpf([whole, whole + 1]) / mpmath.iv.mpf(2) ** (52 + length)


class NormalDraw(Draw):
    """Standard normal numbers by Box & Muller 1958, two of each pair of uniforms.

    The error of `values`: U is known up to half a cell, 2⁻⁵³, which moves r = √(−2·ln U) by at most
    2⁻⁵³/(U·r), below 2⁻³⁷ unless U·r < 2⁻¹⁶ (that is doubtful); V likewise moves the number by 2π·r·2⁻⁵³;
    rounding in float64 by less than 2⁻⁴⁵.
    """

    def __init__(self, randomness: Randomness, count: int) -> None:
        super().__init__(randomness)
        half = (check_count(count, "count", "NormalDraw") + 1) // 2
        self._u, self._v = randomness.words(half) >> np.uint64(12), randomness.words(half) >> np.uint64(12)
        u = _middle(self._u)
        radius = np.sqrt(-2 * np.log(u))
        angle = 2 * np.pi * _middle(self._v)
        self.values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
        pairs = np.flatnonzero(u * radius < _DOUBT)
        doubtful = np.concatenate([pairs, pairs + half])
        self.doubtful = doubtful[doubtful < count]

    def enclose(self, position: int, bits: int) -> Any:
        """See `Draw`."""
        second, pair = divmod(position, len(self._u))
        u = self._uniform(0, pair, int(self._u[pair]), bits)
        angle = 2 * mpmath.iv.pi * self._uniform(1, pair, int(self._v[pair]), bits)
        return mpmath.iv.sqrt(-2 * mpmath.iv.log(u)) * (mpmath.iv.sin if second else mpmath.iv.cos)(angle)


class LaplaceDraw(Draw):
    """Laplace numbers of scale 1: a sign, and −ln U.

    The error of `values`: half a cell of U moves −ln U by 2⁻⁵³/U, below 2⁻³⁷ unless U < 2⁻¹⁶.
    """

    def __init__(self, randomness: Randomness, count: int) -> None:
        super().__init__(randomness)
        words = randomness.words(count)
        self._u, self._negative = words >> np.uint64(12), (words & np.uint64(1)).astype(bool)
        u = _middle(self._u)
        self.values = np.where(self._negative, np.log(u), -np.log(u))
        self.doubtful = np.flatnonzero(u < _DOUBT)

    def enclose(self, position: int, bits: int) -> Any:
        """See `Draw`."""
        logarithm = mpmath.iv.log(self._uniform(0, position, int(self._u[position]), bits))
        return logarithm if self._negative[position] else -logarithm


class Randomness:
    """A stream of cryptographic random numbers.

    Make one with `Randomness.secret()` for anything that is to be released, or with
    `Randomness.from_seed(seed, purpose)` for tests and reproducible experiments.

    Attributes:
        is_secret: Whether the key came from the operating system and is known to nobody.
    """

    def __init__(self, key: bytes, *, is_secret: bool, position: int = 0) -> None:
        """Begin the stream of `key`, 32 bytes, at its word number `position`.

        Raises:
            UserError: for another key or position, or if `is_secret` is neither true nor false.
        """
        _check_stream(key, is_secret, position)
        self.is_secret = is_secret
        self._begin(key, position)

    def _begin(self, key: bytes, position: int) -> None:
        self._key, self._position = key, position
        block, odd = divmod(position, 2)
        nonce = (block % 2**128).to_bytes(16, "big")
        self._stream: CipherContext = Cipher(algorithms.AES256(key), modes.CTR(nonce)).encryptor()
        self._stream.update(bytes(8 * odd))

    @classmethod
    def secret(cls) -> Randomness:
        """A stream that nobody can predict or repeat: 256 bits of the operating system's entropy as key."""
        return cls(os.urandom(32), is_secret=True)

    @classmethod
    def from_seed(cls, seed: int, purpose: str) -> Randomness:
        """A reproducible stream; different purposes ("sampling", "noise") give independent streams."""
        whole: object = seed
        if isinstance(whole, bool) or not isinstance(whole, Integral) or abs(int(whole)) >= 2**64:
            raise UserError(f"The seed must be a whole number below 2^64. Got {shown(seed)}.")
        check_instance(purpose, str, "purpose", "from_seed")
        key = hashlib.sha256(f"dpml {purpose} {int(seed)}".encode(errors="surrogatepass")).digest()
        return cls(key, is_secret=False)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here, as JSON. Whoever has it knows all that is drawn later."""
        return {"key": self._key.hex(), "position": self._position, "is_secret": self.is_secret}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become the stream whose `state` this was, at the same place.

        For the same computation once more, whose first outcome nobody has seen: noise that is used on
        anything else protects neither.

        Raises:
            UserError: if it is no such state.
        """
        try:
            key, secret, position = bytes.fromhex(state["key"]), state["is_secret"], state["position"]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"This is no state of a stream: {type(error).__name__}.") from error
        _check_stream(key, secret, position)
        self.is_secret = secret
        self._begin(key, position)

    def renew(self) -> None:
        """Take the next 256 bits of the stream as its key, and forget the old one.

        From a `state` after this, nothing can be learned of what was drawn before it (Bernstein 2017, "Fast-
        key-erasure random-number generators").
        """
        self._begin(self.words(4).astype("<u8").tobytes(), 0)

    def branch(self, name: bytes) -> Randomness:
        """A stream that follows from this one's key and a name alone, however far this one has come."""
        return Randomness(hashlib.sha256(self._key + name).digest(), is_secret=self.is_secret)

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """`count` independent uniform 64-bit integers, shape [count]."""
        parts = []
        count = check_count(count, "count", "words")
        self._position += count
        left = 8 * count
        while left > 0:
            size = min(left, _CHUNK)
            parts.append(self._stream.update(bytes(size)))
            left -= size
        return np.frombuffer(b"".join(parts), dtype="<u8").astype(np.uint64, copy=False)

    def uniforms(self, count: int) -> npt.NDArray[np.float64]:
        """`count` independent uniform odd multiples of 2⁻⁵³ in (0, 1), shape [count]."""
        return _middle(self.words(count) >> np.uint64(12))

    def normal_draw(self, count: int) -> NormalDraw:
        """`count` independent standard normal numbers."""
        return NormalDraw(self, count)

    def laplace_draw(self, count: int) -> LaplaceDraw:
        """`count` independent Laplace numbers of scale 1."""
        return LaplaceDraw(self, count)

    def normals(self, count: int) -> npt.NDArray[np.float64]:
        """The float64 values of `normal_draw`, shape [count]."""
        return self.normal_draw(count).values

    def laplaces(self, count: int) -> npt.NDArray[np.float64]:
        """The float64 values of `laplace_draw`, shape [count]."""
        return self.laplace_draw(count).values


def _check_stream(key: object, is_secret: object, position: object) -> None:
    if not isinstance(key, bytes) or len(key) != 32 or not isinstance(is_secret, bool):
        raise UserError("A stream needs a key of 32 bytes, and whether it is secret: True or False.")
    if isinstance(position, bool) or not isinstance(position, int) or position < 0:
        raise UserError(f"The position in a stream must be a whole number. Got {shown(position)}.")


def _middle(words: Words) -> npt.NDArray[np.float64]:
    """The middles of the cells of uniform numbers whose first 52 bits these are."""
    return (words.astype(np.float64) + 0.5) * 2.0**-52
