"""Wavelet scattering: image features that are fitted to no data, and so cost no privacy.

An image is filtered by Morlet wavelets, the modulus is taken, and so perhaps once more; each result is
averaged by a Gaussian. A linear classifier on these features learns much from few or noisy gradients.

Sources: Bruna & Mallat, "Invariant scattering convolution networks", 2013; Oyallon & Mallat, "Deep roto-
translation scattering", 2015; Tramèr & Boneh, "Differentially private learning needs better features", 2021.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from accounting.errors import UserError

# A wavelet's width (in pixels) and frequency (in radians per pixel) at scale 0, and, over the number of
# angles, its width along the oscillation relative to across it.
_SIGMA, _XI, _SLANT = 0.8, 3 * math.pi / 4, 4.0


class Scattering2d:
    """The scattering transform of images of one size, by convolution in Fourier space.

    Along the channels, each channel's paths follow one another: the average of the image; then the first
    order, `[scale, angle]`; then, for each pair of a scale and a coarser one, `[angle, coarser's angle]`.
    Angle `l` of `angles` oscillates along (cos, sin)(π·l/angles), in columns to the right and rows down.

    Images are continued by reflection. The wavelets have mean zero: a constant image gives zero beyond the
    average. They are scaled so that the filters' Littlewood–Paley sum is at most 1 (with 2 scales and 3 or
    more angles it is anyway), so features lie no farther apart than the continued images do; as they are
    kept at every `2**scales`-th pixel only, rather `2**-scales` times as far. Each image's features depend
    on it alone; in another batch they may differ by rounding. No gradient flows through them.

    Attributes:
        paths: Per channel: 1 + scales·angles, and for order 2 angles²·scales·(scales - 1)/2 more.
        out_shape: `(height, width)` of the result, those of the images over `2**scales`, rounded up.
    """

    def __init__(self, height: int, width: int, *, scales: int = 2, angles: int = 8, order: int = 2) -> None:
        """Compute the filters.

        Args:
            height: Height of the images, in pixels.
            width: Their width. Both must be `2**scales` or more.
            scales: Number of octaves; averages are over about `2**scales` pixels.
            angles: Number of orientations, evenly over half a turn.
            order: How often wavelets and modulus are applied at most: 1 or 2.

        Raises:
            UserError: A number is no integer or out of range.
        """
        _require_positive(height=height, width=width, scales=scales, angles=angles, order=order)
        if order > 2:
            raise UserError(f"Scattering's order must be 1 or 2, got {order!r}: set 2, the customary one.")
        if scales > (most := min(height, width).bit_length() - 1):
            raise UserError(
                f"Scattering over {scales} scales needs images of at least 2^{scales} pixels a side, got "
                f"{height}×{width}: set scales to {most} or less."
            )
        self.height, self.width, self.scales, self.angles, self.order = height, width, scales, angles, order
        self.paths = 1 + scales * angles + (order - 1) * angles**2 * scales * (scales - 1) // 2
        step = 2**scales
        self.out_shape = (-(-height // step), -(-width // step))
        self._rows, self._columns = _reflected(height, step), _reflected(width, step)
        # For speed, |x * ψ| of scale r is kept at every 2^r-th pixel only, which changes features by about
        # 1 %. There, filters of scale j are those of scale j - r. Keeping pixels averages frequencies, hence
        # 4^. Each number stands twice, for the real and the imaginary part that it multiplies.
        grids = [(len(self._rows) >> r, len(self._columns) >> r) for r in range(scales)]
        coarse = {(r, j): _morlets(grids[r], j - r, angles) for j in range(scales) for r in range(1, j)}
        banks = {(0, j): _morlets(grids[0], j, angles) for j in range(scales)}
        gain = _gain(torch.cat(list(banks.values())), scales)
        self._wavelets = {
            (r, j): (gain / 4 ** (j - r) * bank).float()[..., None].repeat(1, 1, 1, 2)
            for (r, j), bank in (banks | coarse).items()
        }
        self._averages = [[_averaging(n, scales - r).float() for n in grid] for r, grid in enumerate(grids)]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Transform images.

        Args:
            images: Float32 `[n, channels, height, width]`, on any device; pixels of up to 1e15.

        Returns:
            Float32 `[n, channels * paths, out_height, out_width]`, in the unit of the pixels.

        Raises:
            UserError: The images are of another form, type or size.
        """
        _require_images(images)
        if images.shape[2:] != (self.height, self.width):
            raise UserError(
                f"This scattering is for images of {self.height}×{self.width} pixels, got "
                f"{images.shape[2]}×{images.shape[3]}: make one for these, or resize them."
            )
        n, channels = images.shape[:2]
        if n * channels == 0:
            return images.new_zeros(n, channels * self.paths, *self.out_shape)
        x = images.flatten(0, 1)[:, self._rows.to(images.device)[:, None], self._columns.to(images.device)]
        averaged, coarser, spectrum = [self._average(x[:, None], 0)], [], torch.fft.fft2(x)
        for j in range(self.scales):
            first = self._modulus(spectrum, 0, j)
            averaged.append(self._average(first, j))
            if self.order == 2 and j + 1 < self.scales:
                spectra = torch.fft.fft2(first).flatten(0, 1)
                for k in range(j + 1, self.scales):
                    second = self._modulus(spectra, j, k)
                    coarser.append(self._average(second, k).view(len(x), -1, *self.out_shape))
        return torch.cat(averaged + coarser, dim=1).view(n, channels * self.paths, *self.out_shape)

    def _modulus(self, spectra: Tensor, grid: int, scale: int) -> Tensor:
        """|x * ψ| on the grid of `scale`, `[m, angles, …]`, of x's spectrum `[m, rows, columns]`."""
        stride = 2 ** (scale - grid)
        aliases = (stride, spectra.shape[1] // stride, stride, spectra.shape[2] // stride)
        wavelets = self._wavelets[grid, scale].to(spectra.device).view(self.angles, *aliases, 2)
        x = torch.view_as_real(spectra.reshape(-1, 1, *aliases))
        kept = x[:, :, 0, :, 0] * wavelets[:, 0, :, 0]
        for alias in range(1, stride**2):
            down, right = divmod(alias, stride)
            kept.addcmul_(x[:, :, down, :, right], wavelets[:, down, :, right])
        square = torch.view_as_real(torch.fft.ifft2(torch.view_as_complex(kept))) ** 2
        return (square[..., 0] + square[..., 1]).sqrt_()  # faster than abs() by four

    def _average(self, x: Tensor, grid: int) -> Tensor:
        """Gaussian averages of `[m, paths, rows, columns]` at the places kept: `[m, paths, *out_shape]`."""
        down, right = (average.to(x.device) for average in self._averages[grid])
        return torch.matmul(down, torch.matmul(x, right.T))


def scattering_features(
    images: Tensor, *, scales: int = 2, angles: int = 8, order: int = 2, chunk: int = 32
) -> Tensor:
    """Scattering features of images, one vector for each.

    Args:
        images: Float32 `[n, channels, height, width]`.
        scales: See `Scattering2d`.
        angles: See `Scattering2d`.
        order: See `Scattering2d`.
        chunk: Images transformed at a time, which bounds the memory beside the result's.

    Returns:
        Float32 `[n, channels * paths * out_height * out_width]`: 3,969 for 1×28×28, 15,552 for 3×32×32.

    Raises:
        UserError: The images are of another form or type, or a number is out of range.
    """
    _require_images(images)
    _require_positive(chunk=chunk)
    transform = Scattering2d(*images.shape[2:], scales=scales, angles=angles, order=order)
    features = math.prod((images.shape[1], transform.paths, *transform.out_shape))
    result = torch.empty(len(images), features, device=images.device)
    for start in range(0, len(images), chunk):
        result[start : start + chunk] = transform(images[start : start + chunk]).flatten(1)
    return result


def _require_positive(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"Scattering's {name} must be a positive integer, got {value!r}: set 1 or more.")


def _require_images(images: object) -> None:
    wanted = "Scattering needs float32 images [n, channels, height, width], got"
    if not isinstance(images, Tensor):
        raise UserError(f"{wanted} {type(images).__name__}: make it a tensor by torch.as_tensor.")
    if images.dim() != 4:
        raise UserError(f"{wanted} shape {tuple(images.shape)}: reshape them to four axes.")
    if images.dtype != torch.float32:
        raise UserError(f"{wanted} {images.dtype}: convert them by .float(), bytes also by / 255.")


def _reflected(size: int, step: int) -> Tensor:
    """The pixel that each place shows, of those that make the result and one step more at each end."""
    places = torch.arange(-step, (-(-size // step) + 1) * step) % (2 * size - 2)
    return torch.minimum(places, 2 * size - 2 - places)


def _morlets(shape: tuple[int, int], scale: int, angles: int) -> Tensor:
    """Fourier transforms of the wavelets of one scale, which are real: float64 `[angles, *shape]`.

    The sum over periods of the continuous transform is the transform of the sampled wavelet.
    """
    sigma, xi, slant = _SIGMA * 2**scale, _XI / 2**scale, _SLANT / angles
    theta = torch.arange(angles, dtype=torch.float64)[:, None, None] * (math.pi / angles)
    reach = 1 + int(max(1, slant) / sigma)
    y, x = (2 * math.pi * torch.fft.fftfreq(size, dtype=torch.float64) for size in shape)
    gabor, envelope = torch.zeros(2, angles, *shape, dtype=torch.float64)
    for down, right in itertools.product(range(-reach, reach + 1), repeat=2):
        rows, columns = (y + 2 * math.pi * down)[:, None], x + 2 * math.pi * right
        along = theta.cos() * columns + theta.sin() * rows
        across = (theta.cos() * rows - theta.sin() * columns) / slant
        gabor += torch.exp(-(sigma**2) / 2 * ((along - xi) ** 2 + across**2))
        envelope += torch.exp(-(sigma**2) / 2 * (along**2 + across**2))
    return torch.sub(gabor, gabor[:, :1, :1] / envelope[:, :1, :1] * envelope)


def _averaging(size: int, scales: int) -> Tensor:
    """Gaussian averages at every `2**scales`-th place of a ring but the first and last: `[out, size]`."""
    step = 2**scales
    centres = torch.arange(step, size - step, step, dtype=torch.float64)[:, None, None]
    distance = torch.arange(size)[:, None] + torch.tensor([-size, 0, size]) - centres
    weights = torch.exp(-((distance / (_SIGMA * step / 2)) ** 2) / 2).sum(2)
    return torch.div(weights, weights.sum(1, keepdim=True))


def _gain(wavelets: Tensor, scales: int) -> float:
    """The factor, at most 1, for all wavelets that leaves no sum of squared responses above 1."""
    rows, columns = (torch.fft.fft(_averaging(size, scales)[0]).abs() ** 2 for size in wavelets.shape[1:])
    squares = (wavelets**2).sum(0)
    # A real image has the same power at a frequency and its opposite.
    band = (squares + squares.flip(0, 1).roll((1, 1), (0, 1))) / 2
    room = ((1 - torch.outer(rows, columns)) / band).flatten()[1:].min()  # at frequency 0 both vanish
    return math.sqrt(min(1.0, room.item()))
