"""Where privacy noise and sampling take their randomness from.

Both need bits that nobody can predict: whoever can guess the noise can subtract it. A stream here is
the key stream of AES-256 in counter mode, keyed by the operating system. A stream made from a seed uses
the same cipher and is reproducible, which makes what it protects *not* private; it says so.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

_CHUNK = 2**20


class Randomness:
    """A stream of cryptographic random numbers.

    Make one with `Randomness.secret()` for anything that is to be released, or with
    `Randomness.from_seed(seed, purpose)` for tests and reproducible experiments.

    Attributes:
        is_secret: Whether the key came from the operating system and is known to nobody.
    """

    def __init__(self, key: bytes, *, is_secret: bool) -> None:
        self.is_secret = is_secret
        self._stream: CipherContext = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def secret(cls) -> Randomness:
        """A stream that nobody can predict or repeat: 256 bits of the operating system's entropy as key."""
        return cls(os.urandom(32), is_secret=True)

    @classmethod
    def from_seed(cls, seed: int, purpose: str) -> Randomness:
        """A reproducible stream; different purposes ("sampling", "noise") give independent streams."""
        key = hashlib.sha256(f"dpml {purpose} {int(seed)}".encode()).digest()
        return cls(key, is_secret=False)

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """`count` independent uniform 64-bit integers, shape [count]."""
        parts = []
        left = 8 * count
        while left > 0:
            size = min(left, _CHUNK)
            parts.append(self._stream.update(bytes(size)))
            left -= size
        return np.frombuffer(b"".join(parts), dtype="<u8").astype(np.uint64, copy=False)

    def uniforms(self, count: int) -> npt.NDArray[np.float64]:
        """`count` independent uniform odd multiples of 2⁻⁵³ in (0, 1), shape [count]."""
        return ((self.words(count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normals(self, count: int) -> npt.NDArray[np.float64]:
        """`count` independent standard normal numbers in float64, by Box & Muller 1958. Shape [count].

        The largest magnitude that can occur is √(2·53·ln 2) ≈ 8.57, beyond which a normal has mass 1e-17.
        """
        half = (count + 1) // 2
        radius = np.sqrt(-2 * np.log(self.uniforms(half)))
        angle = 2 * np.pi * self.uniforms(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def laplaces(self, count: int) -> npt.NDArray[np.float64]:
        """`count` independent Laplace numbers of scale 1 in float64, by inversion. Shape [count].

        The largest magnitude that can occur is 52·ln 2 ≈ 36, beyond which the mass is 2e-16.
        """
        centred = 2 * self.uniforms(count) - 1  # exact
        return -np.sign(centred) * np.log1p(-np.abs(centred))
