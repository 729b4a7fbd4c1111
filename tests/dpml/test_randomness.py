import json
import math

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpml import randomness
from dpml.randomness import Randomness

# Every statistical bound has a false-alarm rate below 1e-9; seeds are fixed besides.
ALPHA = 1e-10
N = 200_000


def stream(seed=0, purpose="noise"):
    return Randomness.from_seed(seed, purpose)


def test_words_are_the_key_stream_of_aes_256_in_counter_mode():
    key = bytes(range(32))
    expected = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * 1000))
    words = Randomness(key, is_secret=False).words(1000)
    assert words.tobytes() == expected
    assert words.dtype == np.uint64


def test_words_equal_the_published_answers_of_aes_256():
    # FIPS 197, appendix C.3: the key 00 01 … 1f encrypts 00112233445566778899aabbccddeeff to this. In
    # counter mode from 0, the first block is the encryption of zeros: NIST's all-zero key test (CAVS, KAT).
    aes = Cipher(algorithms.AES256(bytes(range(32))), modes.ECB()).encryptor()  # noqa: S305 - one block
    assert (
        aes.update(bytes.fromhex("00112233445566778899aabbccddeeff")).hex()
        == "8ea2b7ca516745bfeafc49904b496089"
    )
    assert (
        Randomness(bytes(32), is_secret=False).words(2).tobytes().hex() == "dc95c078a2408989ad48a21492842087"
    )


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=8))
def test_a_stream_does_not_depend_on_how_it_is_cut(counts):
    whole = stream().words(sum(counts))
    source = stream()
    assert np.array_equal(np.concatenate([source.words(k) for k in counts] + [source.words(0)]), whole)


def test_a_stream_does_not_depend_on_the_chunks_in_which_it_is_drawn(monkeypatch):
    whole = stream().words(1001)
    monkeypatch.setattr(randomness, "_CHUNK", 24)
    assert np.array_equal(stream().words(1001), whole)


def test_more_words_than_a_chunk_never_repeat():
    words = stream().words(3 * randomness._CHUNK // 8 + 1)
    assert len(np.unique(words)) == len(words)  # by chance with probability 4e-9, if the seed were not fixed


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 1001])
def test_any_count_is_possible(count):
    source = stream()
    for draw in (source.words, source.uniforms, source.normals):
        assert draw(count).shape == (count,)
    assert source.uniforms(count).dtype == source.normals(count).dtype == np.float64


def test_seeds_and_purposes_give_unrelated_streams():
    drawn = [stream(s, p).words(1000) for s in (0, 1, 10) for p in ("noise", "sampling", "1 noise")]
    assert len(np.unique(np.concatenate(drawn))) == 9000
    bits = [np.unpackbits(words.view(np.uint8)) for words in drawn]
    bound = stats.norm.isf(ALPHA / 72) * math.sqrt(64_000 / 4)
    for i, a in enumerate(bits):
        for b in bits[:i]:
            assert abs(int((a ^ b).sum()) - 32_000) < bound


def test_a_seed_repeats_its_stream_and_is_not_secret():
    assert np.array_equal(stream(5).words(100), stream(5).words(100))
    assert not stream(5).is_secret
    assert np.array_equal(Randomness.from_seed(np.int64(5), "noise").words(3), stream(5).words(3))


def test_a_branch_follows_from_key_and_name_alone():
    stream = Randomness.from_seed(1, "noise")
    first = stream.branch(b"a").words(100)
    stream.words(7)
    assert np.array_equal(stream.branch(b"a").words(100), first)
    others = [
        stream.branch(b"b"),
        Randomness.from_seed(2, "noise").branch(b"a"),
        Randomness.from_seed(1, "noise"),
    ]
    for other in others:
        assert not np.intersect1d(other.words(100), first).size
    assert not stream.branch(b"a").is_secret
    assert Randomness.secret().branch(b"a").is_secret


def test_secret_streams_are_keyed_by_the_operating_system(monkeypatch):
    a, b = Randomness.secret(), Randomness.secret()
    assert a.is_secret
    assert b.is_secret
    assert not np.intersect1d(a.words(1000), b.words(1000)).size
    asked = []
    monkeypatch.setattr(randomness.os, "urandom", lambda size: asked.append(size) or bytes(range(size)))
    expected = Randomness(bytes(range(32)), is_secret=True).words(4)
    assert np.array_equal(Randomness.secret().words(4), expected)
    assert asked == [32]


def test_numpy_and_torch_seeds_do_not_touch_a_stream():
    import torch

    def draw():
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        return Randomness.secret().words(4)

    assert not np.intersect1d(draw(), draw()).size


# ---------------------------------------------------------------- uniforms


@pytest.mark.parametrize("word", [0, 1, 2**12 - 1, 2**12, 2**63 - 1, 2**63, 2**64 - 2**11, 2**64 - 1])
def test_uniforms_never_reach_0_or_1(word, monkeypatch):
    monkeypatch.setattr(Randomness, "words", lambda _, count: np.full(count, word, dtype=np.uint64))
    source = stream()
    [u] = source.uniforms(1)
    assert 0 < u < 1
    assert u == pytest.approx((word + 0.5) / 2**64, abs=2.0**-52)
    assert np.isfinite(source.normals(2)).all()
    # The largest magnitude is that of the smallest uniform.
    assert np.abs(source.normals(2)).max() <= math.sqrt(2 * 53 * math.log(2)) + 1e-15


def test_uniforms_are_symmetric(monkeypatch):
    words = stream().words(1000)
    monkeypatch.setattr(Randomness, "words", lambda _, count: words[:count])
    u = stream().uniforms(1000)
    words = ~words
    assert np.array_equal(stream().uniforms(1000), 1 - u)


def test_uniforms_are_uniform_and_a_skewed_stream_is_told_apart():
    u = stream(1).uniforms(N)
    assert stats.kstest(u, "uniform").pvalue > ALPHA
    assert stats.kstest(u**1.05, "uniform").pvalue < ALPHA


# ---------------------------------------------------------------- normals


@pytest.mark.parametrize("count", [N, N - 1])
def test_normals_are_standard_normal(count):
    z = stream(2).normals(count)
    assert stats.kstest(z, "norm").pvalue > ALPHA
    for half in (z[: count // 2], z[count // 2 :]):  # radius·cos and radius·sin
        assert stats.kstest(half, "norm").pvalue > ALPHA
    # Mean, variance, skewness and kurtosis, each within the 1e-11 quantile of its normal limit.
    bound = stats.norm.isf(ALPHA / 20)
    assert abs(z.mean()) < bound / math.sqrt(count)
    assert abs(z.var() - 1) < bound * math.sqrt(2 / count)
    assert abs((z**3).mean()) < bound * math.sqrt(15 / count)
    assert abs((z**4).mean() - 3) < bound * math.sqrt(96 / count)


@pytest.mark.parametrize("factor", [0.7, 0.97, 1.03, 1.3])
def test_normals_of_another_scale_are_told_apart(factor):
    # With 200,000 numbers the variance is known to 0.32 %: 3 % off in scale is 19 standard deviations.
    z = factor * stream(2).normals(N)
    assert abs(z.var() - 1) > stats.norm.isf(ALPHA / 20) * math.sqrt(2 / N)


def test_tails_are_those_of_a_normal():
    z = np.abs(stream(3).normals(2_000_000))
    for t in (2.0, 3.0, 4.0):
        beyond, expected = int((z > t).sum()), 2 * stats.norm.sf(t)
        assert stats.binomtest(beyond, len(z), expected).pvalue > ALPHA
        assert stats.binomtest(beyond, len(z), 2 * expected).pvalue < ALPHA


def test_numbers_of_one_draw_and_of_different_draws_are_uncorrelated():
    source = stream(4)
    a, b = source.normals(N), source.normals(N)
    bound = stats.norm.isf(ALPHA / 20) / math.sqrt(N // 2)
    pairs = [(a[: N // 2], a[N // 2 :]), (a[:-1], a[1:]), (a, b), (a[:-2], a[2:])]
    for x, y in pairs:  # the first pair shares radius and angle in Box & Muller's construction
        assert abs(np.corrcoef(x, y)[0, 1]) < bound
        assert abs(np.corrcoef(x**2, y**2)[0, 1]) < bound
    assert abs(np.corrcoef(a, a + 40 * bound * b)[0, 1]) > bound


@pytest.mark.parametrize("before", [0, 1, 2, 7, 2**17 + 3])
def test_a_stream_goes_on_from_its_state(before):
    for source in (Randomness.secret(), Randomness.from_seed(1, "noise")):
        source.words(before)
        state = json.loads(json.dumps(source.state()))
        again = Randomness.secret()
        again.restore(state)
        assert again.is_secret is source.is_secret
        for count in (1, 2, 5):
            assert np.array_equal(source.words(count), again.words(count))
        assert again.state() == source.state() != state


def test_a_renewed_stream_tells_nothing_of_what_was_drawn():
    source, same = Randomness.from_seed(1, "noise"), Randomness.from_seed(1, "noise")
    drawn = source.words(100)
    source.renew()
    kept = source.state()
    following = source.words(100)
    same.words(100)
    key = same.words(4).tobytes()
    assert kept == {"key": key.hex(), "position": 0, "is_secret": False}
    assert np.array_equal(Randomness(key, is_secret=False).words(100), following)
    assert not np.intersect1d(drawn, following).size
