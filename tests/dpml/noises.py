"""Noise as tests draw it, and put another in its place."""

import torch

from dpml.noise import GaussianNoise

_add = GaussianNoise.add


def draw(noise, shapes, norm):
    """What honest noise adds to zeros of these shapes."""
    return _add(noise, [torch.zeros(tuple(shape), dtype=torch.float64) for shape in shapes], norm)


def plant(patch, wrong):
    """Let `wrong(noise, shapes, norm)` be what is added to sums."""

    def add(self, sums, norm):
        noises = wrong(self, [part.shape for part in sums], norm)
        return [part + noise for part, noise in zip(sums, noises, strict=True)]

    patch.setattr(GaussianNoise, "add", add)
