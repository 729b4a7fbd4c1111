"""Atoms in one short line."""

from __future__ import annotations

from accounting.atoms import Atom, Sampling
from accounting.pairs import GaussianPair, LaplacePair


def atom_of(noise: str, scale: float, q: float = 1.0, sampling: Sampling = "poisson") -> Atom:
    """Gaussian or Laplace noise, on all data (q = 1) or on a sample."""
    pair = {"gaussian": GaussianPair, "laplace": LaplacePair}[noise](scale)
    return Atom(pair) if q == 1 else Atom(pair, sampling, q)


def is_gaussian(atom: Atom) -> bool:
    return isinstance(atom.mechanism, GaussianPair)


def scale_of(atom: Atom) -> float:
    """The scale of Gaussian or Laplace noise."""
    assert isinstance(atom.mechanism, GaussianPair | LaplacePair)
    return atom.mechanism.scale
