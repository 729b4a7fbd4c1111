import math

import numpy as np
import pytest
import torch
from scipy import stats

from accounting.errors import UserError
from dpml.noise import GaussianNoise
from dpml.randomness import Randomness

# A false-alarm rate below 1e-9 for each bound; seeds are fixed besides.
ALPHA = 1e-10
SHAPES = [(200, 100), (), (3,), (0,), (5, 0, 2), (10, 10, 100)]
SIZE = sum(math.prod(shape) for shape in SHAPES)


def noise(multiplier=1.0, seed=0):
    return GaussianNoise(multiplier, Randomness.from_seed(seed, "noise"))


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).numpy()


def is_of_scale(values, scale):
    """A two-sided chi-square test of the standard deviation; 30,004 numbers know it to 0.41 %."""
    statistic = float((values**2).sum()) / scale**2
    p = 2 * min(stats.chi2.cdf(statistic, len(values)), stats.chi2.sf(statistic, len(values)))
    return p > ALPHA


def test_noise_has_the_shapes_asked_for_in_float64_on_the_cpu():
    drawn = noise().draw(SHAPES, 1.0)
    assert [tuple(tensor.shape) for tensor in drawn] == SHAPES
    assert {tensor.dtype for tensor in drawn} == {torch.float64}
    assert {tensor.device.type for tensor in drawn} == {"cpu"}
    assert noise().draw([], 1.0) == []


@pytest.mark.parametrize(("multiplier", "clip_norm"), [(1.0, 1.0), (0.5, 3.0), (1.1, 1e-6), (40.0, 1e9)])
def test_the_scale_is_noise_multiplier_times_clip_norm(multiplier, clip_norm):
    values = flat(noise(multiplier).draw(SHAPES, clip_norm))
    scale = multiplier * clip_norm
    assert is_of_scale(values, scale)
    assert stats.kstest(values / scale, "norm").pvalue > ALPHA
    assert abs(values.mean()) < stats.norm.isf(ALPHA) * scale / math.sqrt(SIZE)
    # Power: 30 % off, and even 5 % off, is 12 standard deviations off.
    for factor in (0.5, 0.7, 0.95, 1.05, 1.3, 2.0):
        assert not is_of_scale(values, scale * factor)


def test_every_tensor_and_every_call_has_noise_of_its_own():
    source = noise()
    calls = [source.draw([(500,), (500,)], 1.0) for _ in range(20)]
    rows = torch.stack([tensor for call in calls for tensor in call]).numpy()
    cosines = np.corrcoef(rows)[np.triu_indices(40, k=1)]
    # √500·cosine is nearly normal; 780 of them.
    assert np.abs(cosines).max() < stats.norm.isf(ALPHA / 1560) / math.sqrt(500)
    assert len(np.unique(rows)) == rows.size


def test_noise_is_that_of_its_stream_alone():
    torch.manual_seed(0)
    a = flat(noise(seed=1).draw([(9,)], 2.0))
    torch.manual_seed(1)
    b = flat(noise(seed=1).draw([(9,)], 2.0))
    assert np.array_equal(a, b)
    assert np.array_equal(a, 2 * Randomness.from_seed(1, "noise").normals(9))
    assert not np.intersect1d(a, flat(noise(seed=2).draw([(9,)], 2.0))).size
    secret = [flat(GaussianNoise(1.0, Randomness.secret()).draw([(9,)], 2.0)) for _ in range(2)]
    assert not np.intersect1d(*secret).size


@pytest.mark.parametrize("multiplier", [0, -1.0, math.inf, math.nan, "1", None, True, 1e15])
def test_a_noise_multiplier_out_of_range_is_refused(multiplier):
    with pytest.raises(UserError, match="'noise_multiplier' parameter of GaussianNoise must be in"):
        GaussianNoise(multiplier, Randomness.secret())
