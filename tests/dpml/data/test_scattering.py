"""The scattering transform, against its definition in space, and what the definition promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting import UserError
from dpml.data.scattering import Scattering2d, _morlets, scattering_features


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def continued(images, scales):
    """The images as the transform sees them, reflected by an output pixel, or somewhat more, on each side."""
    step = 2**scales
    ends = [(step, (-(-side // step) + 1) * step - side) for side in images.shape[2:]]
    return np.pad(np.asarray(images, dtype=np.float64), [(0, 0), (0, 0), *ends], mode="reflect")


# ---------------------------------------------------------------- the definition, by sums in space


def on_a_ring(kernel, height, width):
    """A kernel on the plane, summed over all places that a ring in both directions makes one."""
    y, x = (np.arange(-8 * side, 8 * side) for side in (height, width))
    return kernel(y[:, None], x[None, :]).reshape(16, height, 16, width).sum((0, 2))


def gaussian(sigma, height, width):
    weights = on_a_ring(lambda y, x: np.exp(-(y**2 + x**2) / (2 * sigma**2)), height, width)
    return weights / weights.sum()


def morlet(scale, angle, angles, height, width):
    sigma, xi, slant = 0.8 * 2**scale, 3 * np.pi / 4 / 2**scale, 4 / angles
    theta = np.pi * angle / angles

    def envelope(y, x):
        along, across = x * np.cos(theta) + y * np.sin(theta), y * np.cos(theta) - x * np.sin(theta)
        return np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))

    def wave(y, x):
        return envelope(y, x) * np.exp(1j * xi * (x * np.cos(theta) + y * np.sin(theta)))

    waves, bump = on_a_ring(wave, height, width), on_a_ring(envelope, height, width)
    return (waves - bump * waves.sum() / bump.sum()) * slant / (2 * np.pi * sigma**2)


def convolve(image, kernel):
    """Circular convolution by the explicit sum."""
    height, width = image.shape
    result = np.zeros(image.shape, dtype=kernel.dtype)
    for y in range(height):
        for x in range(width):
            result += image[y, x] * np.roll(kernel, (y, x), (0, 1))
    return result


def by_sums(image, scales, angles, order, thin=True):
    """The paths of one continued gray image; without `thin`, no pixel is dropped before the last average."""

    def average(values, at):
        blurred = convolve(values, gaussian(0.4 * 2 ** (scales - at), *values.shape))
        step = 2 ** (scales - at)
        return blurred[step:-step:step, step:-step:step]

    def modulus(values, at, scale, angle):
        wave = convolve(values, morlet(scale - at, angle, angles, *values.shape))
        step = 2 ** (scale - at) if thin else 1
        return np.abs(wave[::step, ::step])

    def grid(scale):
        return scale if thin else 0

    first = {(j, a): modulus(image, 0, j, a) for j in range(scales) for a in range(angles)}
    paths = [average(image, 0)] + [average(values, grid(j)) for (j, _), values in first.items()]
    if order == 2:
        for j in range(scales):
            for k in range(j + 1, scales):
                for a in range(angles):
                    for b in range(angles):
                        paths.append(average(modulus(first[j, a], grid(j), k, b), grid(k)))
    return np.stack(paths)


# From three angles on, and with few scales, the wavelets are as the papers have them, not scaled down.
@pytest.mark.parametrize(
    ("height", "width", "scales", "angles", "order"),
    [(5, 6, 1, 3, 1), (5, 6, 1, 3, 2), (9, 6, 2, 4, 2), (8, 8, 2, 8, 1), (8, 8, 2, 8, 2), (8, 12, 3, 4, 2)],
)
def test_it_is_the_definition(height, width, scales, angles, order):
    x = noise(1, 1, height, width) - 0.3
    computed = Scattering2d(height, width, scales=scales, angles=angles, order=order)(x)[0]
    expected = by_sums(continued(x, scales)[0, 0], scales, angles, order)
    np.testing.assert_allclose(computed, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [0, 1])
@pytest.mark.parametrize("angles", [1, 2, 8])  # with few angles the transforms reach over many periods
def test_the_wavelets_are_those_in_space(scale, angles):
    expected = [np.fft.fft2(morlet(scale, angle, angles, 12, 10)) for angle in range(angles)]
    np.testing.assert_allclose(_morlets((12, 10), scale, angles), expected, rtol=0, atol=1e-9)


def test_dropping_pixels_in_between_hardly_matters():
    x = noise(1, 1, 8, 8)
    computed = Scattering2d(8, 8, scales=2, angles=4)(x)[0].double().numpy()
    expected = by_sums(continued(x, 2)[0, 0], 2, 4, 2, thin=False)
    for order in (slice(1, 9), slice(9, 25)):
        error = np.linalg.norm(computed[order] - expected[order]) / np.linalg.norm(expected[order])
        assert error < 0.03


def test_the_first_path_is_the_average():
    x = noise(2, 1, 12, 16)
    padded = continued(x, 2)
    kernel = gaussian(1.6, *padded.shape[2:])
    for image, average in zip(padded[:, 0], Scattering2d(12, 16)(x)[:, 0], strict=True):
        np.testing.assert_allclose(average, convolve(image, kernel)[4:-4:4, 4:-4:4], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- what it promises


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
@pytest.mark.parametrize(("scales", "angles"), [(1, 1), (2, 8), (3, 6)])
def test_a_constant_image_leaves_the_average_alone(value, scales, angles):
    result = Scattering2d(20, 17, scales=scales, angles=angles)(torch.full((1, 1, 20, 17), value))
    assert torch.allclose(result[:, 0], torch.tensor(value), rtol=1e-5)
    assert result[:, 1:].abs().max() <= 1e-5 * abs(value)


def test_a_shift_by_four_pixels_shifts_the_result_by_one():
    field = noise(1, 1, 52, 52)
    transform = Scattering2d(48, 48)
    before, after = transform(field[:, :, :48, :48]), transform(field[:, :, 4:, 4:])
    # The wavelets reach some places in from the edge, where what lies beyond was reflected or is seen.
    inside = slice(4, -4)
    moved, expected = after[..., inside, inside], before[..., 5:-3, 5:-3]
    assert (moved - expected).norm() < 1e-3 * expected.norm()
    assert (moved - before[..., inside, inside]).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("angles", [4, 8])
def test_a_quarter_turn_permutes_the_angles(angles):
    x = noise(1, 1, 29, 29)  # the places kept lie symmetrically, from one edge to the other
    transform = Scattering2d(29, 29, angles=angles)
    turned = transform(torch.rot90(x, 1, (2, 3)))[0]
    expected = torch.rot90(transform(x)[0], 1, (1, 2))
    first, second = expected[1 : 1 + 2 * angles], expected[1 + 2 * angles :]
    half, shape = angles // 2, expected.shape[1:]
    first = first.view(2, angles, *shape).roll(half, 1).flatten(0, 1)
    second = second.view(angles, angles, *shape).roll((half, half), (0, 1)).flatten(0, 1)
    expected = torch.cat([expected[:1], first, second])
    assert (turned - expected).norm() < 0.02 * expected.norm()
    # The continuation is by one pixel kept on the one side and by nearly two on the other.
    inside = (slice(None), slice(2, -2), slice(2, -2))
    assert (turned - expected)[inside].norm() < 1e-3 * expected[inside].norm()
    unmoved = torch.rot90(transform(x)[0], 1, (1, 2))
    assert (turned - unmoved)[inside].norm() > 0.02 * expected[inside].norm()


@pytest.mark.parametrize("scales", [1, 2, 3, 4])
@pytest.mark.parametrize("angles", [1, 2, 3, 5, 8, 12])
def test_no_frequency_is_amplified(scales, angles):
    transform = Scattering2d(21, 32, scales=scales, angles=angles)
    for grid, averages in enumerate(transform._averages):
        rows, columns = (torch.fft.fft(average[0].double()).abs() ** 2 for average in averages)
        total = torch.outer(rows, columns)
        for (r, j), wavelets in transform._wavelets.items():
            if r == grid and (r == 0 or j > r):
                power = (4 ** (j - r) * wavelets[..., 0].double()).square().sum(0)
                total += (power + power.flip(0, 1).roll((1, 1), (0, 1))) / 2
        assert total.max() <= 1 + 1e-6


@pytest.mark.parametrize("angles", [3, 4, 6, 8, 16])
def test_the_customary_wavelets_are_not_scaled_down(angles):
    wavelets = Scattering2d(28, 28, angles=angles)._wavelets[0, 0][..., 0]
    assert torch.equal(wavelets, _morlets((36, 36), 0, angles).float())


@pytest.mark.parametrize(("scales", "angles"), [(1, 1), (2, 2), (2, 8), (3, 8)])
def test_images_come_no_farther_apart(scales, angles):
    transform = Scattering2d(16, 19, scales=scales, angles=angles)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(19.0), indexing="ij")
    waves = [torch.cos(a * y + b * x) for a in (0, 0.7, 1.7, 2.4, 3.1) for b in (0, 0.7, 1.7, 2.4, 3.1)]
    dots = [((y == a) & (x == b)).float() for a, b in ((0, 0), (4, 4), (5, 7), (15, 18))]
    images = torch.stack([*waves, *dots, *noise(9, 16, 19), *(noise(9, 16, 19) - 0.5)])[:, None]
    mapped, padded = transform(images), torch.from_numpy(continued(images, scales))
    assert (torch.pdist(mapped.flatten(1).double()) <= (1 + 1e-6) * torch.pdist(padded.flatten(1))).all()
    assert (torch.pdist(mapped.flatten(1)) <= torch.pdist(images.flatten(1))).all()


def test_an_image_is_transformed_alone():
    x = noise(64, 1, 28, 28)
    together = scattering_features(x)
    alone = torch.cat([scattering_features(image[None]) for image in x])
    assert (together - alone).abs().max() <= 1e-6
    for spoilt in (math.nan, math.inf, 1e30):
        beside = torch.full_like(x, spoilt)
        beside[5] = x[5]
        assert torch.equal(scattering_features(beside)[5], together[5])


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("shape", "out", "features"), [((1, 28, 28), (81, 7, 7), 3969), ((3, 32, 32), (243, 8, 8), 15552)]
)
def test_the_sizes_are_those_of_the_papers(shape, out, features):
    x = noise(2, *shape)
    assert Scattering2d(*shape[1:])(x).shape == (2, *out)
    assert scattering_features(x).shape == (2, features)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), scales=st.integers(1, 3), angles=st.integers(1, 5), order=st.integers(1, 2))
def test_any_size_gives_what_is_announced(data, scales, angles, order):
    height, width = (data.draw(st.integers(2**scales, 21)) for _ in range(2))
    n, channels = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    transform = Scattering2d(height, width, scales=scales, angles=angles, order=order)
    paths = 1 + scales * angles + (order == 2) * angles**2 * math.comb(scales, 2)
    assert transform.paths == paths
    assert transform.out_shape == (math.ceil(height / 2**scales), math.ceil(width / 2**scales))
    x = noise(n, channels, height, width)
    result = transform(x)
    assert result.shape == (n, channels * paths, *transform.out_shape)
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    assert (result >= 0).all()
    assert torch.allclose(result[:, :paths], transform(x[:, :1]), atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_chunks_change_nothing(chunk):
    x = noise(7, 3, 8, 8)
    whole = Scattering2d(8, 8)(x).flatten(1)
    assert torch.allclose(scattering_features(x, chunk=chunk), whole, rtol=0, atol=1e-6)


def test_strides_and_gradients_change_nothing():
    x = noise(4, 3, 9, 12)
    expected = Scattering2d(9, 12)(x)
    for same in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x[None].expand(2, -1, -1, -1, -1)[1],
        x.clone().requires_grad_(),
    ):
        result = Scattering2d(9, 12)(same)
        assert torch.allclose(result, expected, atol=1e-6)
        assert not result.requires_grad


def test_large_pixels_stay_finite_and_scale():
    x = noise(2, 1, 16, 16)
    small, large = Scattering2d(16, 16)(x), Scattering2d(16, 16)(1e15 * x)
    assert torch.allclose(large / 1e15, small, atol=1e-6)


# ---------------------------------------------------------------- mistakes

IMAGES = torch.zeros(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (IMAGES.numpy(), {}, "got ndarray: .*as_tensor"),
        (IMAGES[0], {}, r"got shape \(1, 8, 8\): reshape"),
        (IMAGES[None], {}, r"got shape \(1, 2, 1, 8, 8\): reshape"),
        (IMAGES.double(), {}, r"got torch.float64: .*\.float\(\)"),
        (IMAGES.byte(), {}, "got torch.uint8: .*255"),
        (IMAGES, {"scales": 0}, "scales must be a positive integer, got 0: set 1"),
        (IMAGES, {"scales": 1.5}, "scales must be a positive integer, got 1.5: set"),
        (IMAGES, {"angles": -8}, "angles must be a positive integer, got -8: set"),
        (IMAGES, {"angles": True}, "angles must be a positive integer, got True: set"),
        (IMAGES, {"order": 0}, "order must be a positive integer, got 0: set"),
        (IMAGES, {"order": 3}, "order must be 1 or 2, got 3: set 2"),
        (IMAGES, {"chunk": 0}, "chunk must be a positive integer, got 0: set"),
        (IMAGES, {"scales": 4}, r"at least 2\^4 pixels a side, got 8×8: set scales to 3"),
        (IMAGES[:, :, :3], {}, r"at least 2\^2 pixels a side, got 3×8: set scales to 1"),
        (IMAGES[:, :, :0], {}, "height must be a positive integer, got 0"),
    ],
)
def test_mistakes_are_named_in_one_line(images, options, words):
    with pytest.raises(UserError, match=words) as caught:
        scattering_features(images, **options)
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match="is for images of 8×9 pixels, got 8×8: make one"):
        Scattering2d(8, 9)(IMAGES)
    with pytest.raises(UserError, match=r"got shape \(8, 8\): reshape"):
        Scattering2d(8, 8)(IMAGES[0, 0])


def test_one_pixel_is_too_small():
    with pytest.raises(UserError, match=r"at least 2\^1 pixels a side, got 1×8: set|scales"):
        Scattering2d(1, 8, scales=1)
