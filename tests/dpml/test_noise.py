import math

import mpmath
import numpy as np
import pytest
import torch
from noises import draw
from scipy import stats

from accounting.errors import UserError
from dpml.exact import grid_of, noised, noisy_argmax, noisy_reaches
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
    drawn = draw(noise(), SHAPES, 1.0)
    assert [tuple(tensor.shape) for tensor in drawn] == SHAPES
    assert {tensor.dtype for tensor in drawn} == {torch.float64}
    assert {tensor.device.type for tensor in drawn} == {"cpu"}
    assert noise().add([], 1.0) == []


@pytest.mark.parametrize(("multiplier", "clip_norm"), [(1.0, 1.0), (0.5, 3.0), (1.1, 1e-6), (40.0, 1e9)])
def test_the_scale_is_noise_multiplier_times_clip_norm(multiplier, clip_norm):
    values = flat(draw(noise(multiplier), SHAPES, clip_norm))
    scale = multiplier * clip_norm
    assert is_of_scale(values, scale)
    assert stats.kstest(values / scale, "norm").pvalue > ALPHA
    assert abs(values.mean()) < stats.norm.isf(ALPHA) * scale / math.sqrt(SIZE)
    # Power: 30 % off, and even 5 % off, is 12 standard deviations off.
    for factor in (0.5, 0.7, 0.95, 1.05, 1.3, 2.0):
        assert not is_of_scale(values, scale * factor)


def test_every_tensor_and_every_call_has_noise_of_its_own():
    source = noise()
    calls = [draw(source, [(500,), (500,)], 1.0) for _ in range(20)]
    rows = torch.stack([tensor for call in calls for tensor in call]).numpy()
    cosines = np.corrcoef(rows)[np.triu_indices(40, k=1)]
    # √500·cosine is nearly normal; 780 of them.
    assert np.abs(cosines).max() < stats.norm.isf(ALPHA / 1560) / math.sqrt(500)
    assert len(np.unique(rows)) > 0.99 * rows.size


def test_noise_is_that_of_its_stream_alone():
    torch.manual_seed(0)
    a = flat(draw(noise(seed=1), [(9,)], 2.0))
    torch.manual_seed(1)
    b = flat(draw(noise(seed=1), [(9,)], 2.0))
    assert np.array_equal(a, b)
    assert a == pytest.approx(2 * Randomness.from_seed(1, "noise").normals(9), abs=grid_of(2.0))
    assert not np.intersect1d(a, flat(draw(noise(seed=2), [(9,)], 2.0))).size
    secret = [flat(draw(GaussianNoise(1.0, Randomness.secret()), [(9,)], 2.0)) for _ in range(2)]
    assert not np.intersect1d(*secret).size


@pytest.mark.parametrize("multiplier", [0, -1.0, math.inf, math.nan, "1", None, True, 1e15])
def test_a_noise_multiplier_out_of_range_is_refused(multiplier):
    with pytest.raises(UserError, match="'noise_multiplier' parameter of GaussianNoise must be in"):
        GaussianNoise(multiplier, Randomness.secret())


# ---------------------------------------------------------------- exactness


class Tape(Randomness):
    """Words that are known beforehand, then words of a seed; all are written down."""

    def __init__(self, *given):
        super().__init__(bytes(32), is_secret=False)
        self.given, self.past = list(given), []

    def words(self, count):
        first, self.given = self.given[:count], self.given[count:]
        words = np.array([*first, *super().words(count - len(first)).tolist()], dtype=np.uint64)
        self.past += words.tolist()
        return words


def real(words, more=()):
    """The uniform number of 52 bits of a word and 64 bits of each of the words that follow it."""
    whole, length = words >> 12, 52
    for word in more:
        whole, length = whole << 64 | word, length + 64
    return (mpmath.mpf(whole) + 0.5) / mpmath.mpf(2) ** length


def normal(u, v, second):
    return mpmath.sqrt(-2 * mpmath.log(u)) * (mpmath.sin if second else mpmath.cos)(2 * mpmath.pi * v)


def bits_of(tape, start):
    """The further bits of the draw whose words begin at `start`: a stream whose key comes first."""
    key = np.array(tape.past[start : start + 4], dtype="<u8").tobytes()
    return Randomness(key, is_secret=False)


def test_what_float64_cannot_decide_is_decided_by_further_bits():
    """Each noisy sum lies within rounding of where the number of the grid changes."""
    count, scale = 200, 3.0
    grid = grid_of(scale)
    z = Tape().normals(count)
    near = (np.floor(100 / grid) + 0.5) * grid - scale * z
    tape = Tape()
    released = noised(near, scale, tape)
    half = count // 2
    words, more = tape.past[4 : 4 + count], bits_of(tape, 0)
    pairs = {}
    plain = np.rint((near + scale * z) / grid) * grid
    with mpmath.workdps(80):
        for i in range(count):
            second, pair = divmod(i, half)
            if pair not in pairs:
                u, v = (int(word) for word in more.words(2))
                pairs[pair] = real(words[pair], [u]), real(words[half + pair], [v])
            exact = (near[i].item() + scale * normal(*pairs[pair], second)) / grid
            assert released[i] == float(mpmath.floor(exact + 0.5) * grid)
    assert len(tape.past) == 4 + count  # further bits are no matter of the stream
    assert 20 < (released != plain).sum() < count - 20  # float64 was wrong about half of them


def test_sure_values_take_no_further_bits_and_are_right():
    values = np.random.default_rng(0).normal(size=4000) * 50
    tape = Tape()
    released = noised(values, 2.5, tape)
    assert len(tape.past) == 4000 + 4
    with mpmath.workdps(40):
        for i in range(0, 4000, 7):
            second, pair = divmod(i, 2000)
            z = normal(real(tape.past[4 + pair]), real(tape.past[2004 + pair]), second)
            exact = mpmath.floor((values[i].item() + 2.5 * z) / grid_of(2.5) + 0.5) * grid_of(2.5)
            assert released[i] == float(exact)


def test_the_tail_is_not_cut():
    """U below 2^-52, V below 2^-52, where a number made of their first bits alone would be 8.5 at most."""
    tapes = [Tape(*key, 0, 0) for key in np.random.default_rng(0).integers(2**62, size=(400, 4)).tolist()]
    values = np.array([noised(np.zeros(1), 1.0, tape)[0] for tape in tapes])
    with mpmath.workdps(80):
        for value, tape in zip(values, tapes, strict=True):
            u, v = (int(word) for word in bits_of(tape, 0).words(2))
            expected = normal(real(0, [u]), real(0, [v]), 0)
            assert value == pytest.approx(float(expected), abs=grid_of(1.0))
    assert values.min() > 8.49
    assert values.max() > 9


def low_bits_tell(values):
    """The share of small results that are multiples of 2^-53, as every 1 + (float64 noise) near 0 is."""
    small = values[np.abs(values) < 2.0**-10]
    assert len(small) > 50
    return np.mean(small * 2.0**53 == np.rint(small * 2.0**53))


def test_low_bits_tell_of_plain_float64_noise_and_not_of_this():
    """Mironov 2012: 0 + noise may have any low bits, 1 + noise near 0 has none."""
    size = 200_000
    plain = [low_bits_tell(value + Randomness.from_seed(value, "z").normals(size)) for value in (0, 1)]
    assert plain[0] < 0.1
    assert plain[1] == 1
    for value in (0.0, 1.0):
        released = noised(np.full(size, value), 1.0, Randomness.from_seed(3, "z"))
        assert np.array_equal(released / grid_of(1.0), np.rint(released / grid_of(1.0)))
        assert low_bits_tell(released) == 1


@pytest.fixture
def precise():
    before, mpmath.iv.prec = mpmath.iv.prec, 300
    with mpmath.workdps(80):
        yield
    mpmath.iv.prec = before


DRAWS = [Randomness.normal_draw, Randomness.laplace_draw]


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("draw_from", DRAWS)
def test_equal_counts_are_told_apart_exactly(draw_from):
    """Counts that make the two largest of each row equal but for rounding in float64."""
    rows, classes, scale = 100, 4, 20.0
    z = draw_from(Tape(), rows * classes).values.reshape(rows, classes)
    counts = np.zeros((rows, classes))
    counts[:, 1:3] = 1000 - scale * z[:, 1:3]
    drawn = draw_from(Tape(), rows * classes)
    best = noisy_argmax(counts, scale, drawn)
    assert set(best) == {1, 2}
    for row in range(rows):
        noisy = [counts[row, j].item() + scale * middle(drawn, row * classes + j) for j in range(classes)]
        assert best[row] == max(range(classes), key=noisy.__getitem__)


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("draw_from", DRAWS)
def test_whether_a_threshold_is_reached_is_told_exactly(draw_from):
    size, scale = 100, 20.0
    counts = 1000 - scale * draw_from(Tape(), size).values
    drawn = draw_from(Tape(), size)
    reached = noisy_reaches(counts, scale, drawn, 1000.0)
    assert 10 < reached.sum() < 90
    for i in range(size):
        assert reached[i] == (counts[i].item() + scale * middle(drawn, i) >= 1000)


def middle(drawn, position):
    """The number at a position, to 60 bits beyond its first."""
    low, high = (mpmath.mp.make_mpf(end) for end in drawn.enclose(position, 64)._mpi_)
    assert high - low < 1e-30
    return (low + high) / 2


def test_scales_far_from_one():
    for scale in (1e-300, 1e-9, 1e9, 1e300):
        values = noised(np.array([0.0, 0.0, 0.0]), scale, Randomness.from_seed(0, "noise"))
        assert values == pytest.approx(scale * Randomness.from_seed(0, "noise").normals(3), rel=1e-4)
    # Noise far below the value's own precision is still decided, bit by bit.
    assert noised(np.array([1e6]), 1e-12, Randomness.from_seed(0, "noise")) == 1e6
