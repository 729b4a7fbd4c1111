import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from privacy_checks import PrivacyViolation, check_sampling
from scipy import stats

from accounting import Gaussian, PoissonSampled
from accounting.errors import UserError
from dpml.data.samplers import PoissonSampler
from dpml.randomness import Randomness

ALPHA = 1e-10  # the false-alarm rate of each bound; seeds are fixed besides


def sampler(n, q, seed=0):
    return PoissonSampler(n, q, Randomness.from_seed(seed, "sampling"))


def inclusions(n, q, steps, seed=0):
    source = sampler(n, q, seed)
    x = np.zeros((steps, n), dtype=bool)
    for row in x:
        row[source.sample().numpy()] = True
    return x


@pytest.mark.parametrize("q", [0.5, 0.25, 1 / 3, 0.01, 0.9])
def test_each_record_is_included_independently_with_the_stated_probability(q):
    n, steps = 20, 20_000
    x = inclusions(n, q, steps)
    check_sampling(x, q)
    # Power: for each single record, q is known to 5·√((1 − q)/(20,000·q)); 30 % off is told apart for
    # q ≥ 0.25, and for all records together at any of these q.
    for wrong in (0.7 * q, min(1.3 * q, 0.99)):
        if abs(wrong - q) > 0.05 * q:
            with pytest.raises(PrivacyViolation, match="the rate"):
                check_sampling(x, wrong)
            if 0.25 <= q < 0.9:
                p = stats.binom.cdf(x.sum(axis=0), steps, wrong)
                assert np.minimum(p, 1 - p).max() < ALPHA
    # The chi-square of all 20 counts.
    counts = x.sum(axis=0)
    chi2 = ((counts - steps * q) ** 2).sum() / (steps * q * (1 - q))
    assert ALPHA < stats.chi2.sf(chi2, n) < 1 - ALPHA
    # Independence of the records: batch sizes have the variance n·q·(1 − q), known to 1 %.
    variance = ((x.sum(axis=1) - n * q) ** 2).sum() / (n * q * (1 - q))
    kurtosis = 2 + (1 - 6 * q * (1 - q)) / (n * q * (1 - q))
    assert abs(variance - steps) < stats.norm.isf(ALPHA) * math.sqrt(steps * kurtosis)


def test_records_that_are_not_independent_are_told_apart():
    x = inclusions(20, 0.25, 4000)
    check_sampling(x, 0.25)
    twins = x.copy()
    twins[:, 1] = twins[:, 0]
    with pytest.raises(PrivacyViolation, match="two records"):
        check_sampling(twins, 0.25)
    fixed = np.zeros_like(x)
    for row, uniforms in zip(fixed, np.random.default_rng(0).random(x.shape), strict=True):
        row[uniforms.argsort()[:5]] = True
    with pytest.raises(PrivacyViolation, match="batch sizes"):
        check_sampling(fixed, 0.25)
    later = x.copy()
    later[1::2] = later[::2]
    with pytest.raises(PrivacyViolation, match="the one before"):
        check_sampling(later, 0.25)


def test_empty_samples_occur_as_often_as_they_should():
    n, q, steps = 10, 0.1, 20_000
    empty = int((inclusions(n, q, steps).sum(axis=1) == 0).sum())
    expected = (1 - q) ** n  # 0.349
    assert stats.binomtest(empty, steps, expected).pvalue > ALPHA
    assert stats.binomtest(empty, steps, 0.7 * expected).pvalue < ALPHA
    assert stats.binomtest(empty, steps, 1.3 * expected).pvalue < ALPHA


def test_an_empty_sample_is_an_empty_tensor_of_record_numbers():
    sample = sampler(3, 1e-300).sample()
    assert sample.shape == (0,)
    assert sample.dtype == torch.int64


@settings(derandomize=True, deadline=None)
@given(n=st.integers(1, 300), q=st.floats(1e-6, 1.0), seed=st.integers(0, 100))
def test_a_sample_is_ascending_record_numbers_without_repetition(n, q, seed):
    sample = sampler(n, q, seed).sample()
    assert sample.dtype == torch.int64
    assert torch.equal(sample, sample.unique())
    assert len(sample) == 0 or (sample[0] >= 0 and sample[-1] < n)


def test_probability_one_takes_every_record_in_every_step():
    source = sampler(5, 1.0)
    for _ in range(100):
        assert source.sample().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("q", [1e-300, 2.0**-64, 1e-12, 0.1, 1 / 3, math.nextafter(1, 0), 1.0])
def test_the_probability_of_inclusion_is_never_above_the_stated_one(q, monkeypatch):
    # A word w is uniform on 0 … 2^64 − 1 and includes a record for each w below the threshold.
    threshold = math.floor(q * 2**64)

    def included(word):
        words = np.full(1, word, dtype=np.uint64)
        monkeypatch.setattr(Randomness, "words", lambda *_: words)
        return len(sampler(1, q).sample()) == 1

    if threshold > 0:
        assert included(threshold - 1)
    if threshold < 2**64:
        assert not included(threshold)
        assert not included(2**64 - 1)


def test_tiny_probabilities_include_rarely_but_do():
    total = sum(len(sampler(2_000_000, 1e-5, seed).sample()) for seed in range(20))
    # Binomial(40,000,000, 1e-5): 400 expected.
    assert stats.poisson.cdf(total, 400) > ALPHA
    assert stats.poisson.sf(total, 400) > ALPHA
    assert stats.poisson.sf(total, 240) < ALPHA
    assert stats.poisson.cdf(total, 640) < ALPHA


def test_a_seed_repeats_its_samples_and_secret_ones_differ():
    assert all(torch.equal(sampler(50, 0.5).sample(), sampler(50, 0.5).sample()) for _ in range(3))
    a, b = sampler(50, 0.5), sampler(50, 0.5, seed=1)
    first, second = a.sample(), a.sample()
    assert not torch.equal(first, second)
    assert not torch.equal(first, b.sample())
    secret = [PoissonSampler(200, 0.5, Randomness.secret()).sample() for _ in range(2)]
    assert not torch.equal(*secret)  # equal with probability 1e-60


def test_torchs_seed_decides_no_sample():
    samples = []
    for _ in range(2):
        torch.manual_seed(0)
        samples.append(PoissonSampler(200, 0.5, Randomness.secret()).sample())
    assert not torch.equal(*samples)


def test_the_event_states_the_probability_that_is_drawn_with():
    release = Gaussian(1.1)
    assert sampler(100, 0.25).event(release) == PoissonSampled(release, 0.25)
    assert sampler(100, 1).event(release) == PoissonSampled(release, 1.0)


@pytest.mark.parametrize("q", [0, 0.0, -0.1, 1.0001, math.nan, math.inf, "0.1", None, True])
def test_a_probability_out_of_range_is_refused(q):
    with pytest.raises(UserError, match="'sampling_probability' parameter of PoissonSampler must be in"):
        sampler(10, q)


@pytest.mark.parametrize("n", [0, -1, 2.5, "3", None, True])
def test_a_number_of_records_out_of_range_is_refused(n):
    with pytest.raises(UserError, match="'examples' parameter of PoissonSampler"):
        sampler(n, 0.5)
