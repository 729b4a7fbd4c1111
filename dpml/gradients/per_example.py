"""Forms of per-example gradients: what a layer rule returns, and what can be asked of each form.

A form stands for the gradients of some parameters of one layer, for each of m examples. It can tell their
squared norms and add their weighted sum to totals, each by whichever way is cheaper, mostly without ever
holding m gradients (Goodfellow 2015; Li et al. 2022; Bu et al. 2022).

Whatever is summed must be what was clipped. Where norm and sum are computed from the same numbers (`Rows`,
and the compiled kernel), any rounding is in both. Where they take different routes (Gram matrices), the
rounding of either is relative to Σₜ ‖xₜ‖·‖gₜ‖, which may be far above the norm of what it adds up to. So the
norm is raised by `margin` times that, and the gradient is clipped a little more; and examples whose terms
cancel by more than a factor of `CANCELLING` are computed apart, one by one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional, grad

from dpml.gradients.native import NativeLayer

CANCELLING = 64.0
_BLOCK = 64  # examples that are summed in float32 before they are added in float64


def margin(dtype: torch.dtype) -> float:
    """By how much of Σₜ ‖xₜ‖·‖gₜ‖ a norm is raised that was not taken from what is summed."""
    return 4 * torch.finfo(dtype).eps


class PerExample(Protocol):
    """The gradients of some parameters of a layer, for each of m examples.

    Attributes:
        names: The layer's names of the parameters.
    """

    names: Sequence[str]

    def squared_norms(self) -> Tensor:
        """Upper bounds on the squared norms over all of `names`, tight up to rounding, float64 [m]."""
        ...

    def add_to(self, totals: Sequence[Tensor], weights: Tensor) -> None:
        """Add the weighted sum over examples to one float64 tensor a parameter; weights float64 [m]."""
        ...

    def rows(self) -> list[Tensor]:
        """The gradients themselves, one tensor [m, *shape] a parameter."""
        ...

    def native(self) -> NativeLayer | None:
        """For the compiled kernel, if it knows this form and it is worth it. Its parameters are then all."""
        ...


class Rows:
    """Gradients that were computed one by one: small parameters, and layers without a shorter way.

    Args:
        names: The parameters.
        values: Their gradients, [m, *shape] each.
    """

    def __init__(self, names: Sequence[str], values: Sequence[Tensor]) -> None:
        self.names, self._values = names, list(values)

    def squared_norms(self) -> Tensor:
        """From the very numbers that are summed."""
        return sum_of([squares(v.reshape(len(v), -1)) for v in self._values])

    def add_to(self, totals: Sequence[Tensor], weights: Tensor) -> None:
        """Small ones in float64; of large ones, blocks of examples in their own precision."""
        for total, value in zip(totals, self._values, strict=True):
            flat = value.reshape(len(value), -1)
            if flat.shape[1] <= 1024:
                total += (weights @ flat.double()).view(total.shape)
                continue
            for w, part in zip(torch.split(weights, _BLOCK), torch.split(flat, _BLOCK), strict=True):
                total += (w.to(part.dtype) @ part).view(total.shape)

    def rows(self) -> list[Tensor]:
        """As given."""
        return self._values

    def native(self) -> NativeLayer | None:
        """Nothing is left to be computed."""
        return None


class _WeightAndBias(ABC):
    """What linear layers and convolutions share: a weight that is kept, or contracted again, and a bias."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._kept: Tensor | None = None
        self._apart: Apart | None = None

    def squared_norms(self) -> Tensor:
        """The weight's, by Gram matrices or by computing its gradients, and the bias's."""
        return sum_of(
            [self._of_weight() if name == "weight" else squares(self._bias()) for name in self.names]
        )

    def add_to(self, totals: Sequence[Tensor], weights: Tensor) -> None:
        """By the ordinary gradient of the weight, with the outputs' gradients scaled, unless it was kept."""
        for name, total in zip(self.names, totals, strict=True):
            if name == "bias":
                total += weights @ self._bias().double()
            elif self._kept is not None:
                Rows((name,), [self._kept]).add_to([total], weights)
            else:
                self._contract(total, weights)

    def rows(self) -> list[Tensor]:
        """All of them: for the weight m·o·i numbers."""
        return [self._weight() if name == "weight" else self._bias() for name in self.names]

    @abstractmethod
    def _weight(self) -> Tensor:
        """The weight's gradients, one for each example."""

    @abstractmethod
    def _bias(self) -> Tensor:
        """The bias's gradients, [m, o]."""

    @abstractmethod
    def _of_weight(self) -> Tensor:
        """Squared norms of the weight's gradients."""

    @abstractmethod
    def _contract(self, total: Tensor, weights: Tensor) -> None:
        """Add the weighted sum of the weight's gradients."""


class Outer(_WeightAndBias):
    """Σₜ gₜ xₜᵀ over T positions: the weight [o, i] of a linear layer, with its bias Σₜ gₜ.

    One position: the norm is ‖x‖·‖g‖. Several: by Gram matrices, ‖Σₜ gₜxₜᵀ‖² = Σₛₜ (xₛ·xₜ)(gₛ·gₜ), or by
    computing the gradient, whichever takes fewer operations.

    Args:
        names: ("weight",), ("bias",) or both.
        x: Inputs [m, T, i].
        g: Gradients of the outputs [m, T, o].
    """

    def __init__(self, names: Sequence[str], x: Tensor, g: Tensor) -> None:
        super().__init__(names)
        self._x, self._g = x, g

    @classmethod
    def joined(cls, forms: Sequence[Outer]) -> Outer:
        """Of several uses of the same parameters: further positions."""
        if len(forms) == 1:
            return forms[0]
        x, g = (torch.cat(parts, dim=1) for parts in ([f._x for f in forms], [f._g for f in forms]))
        return cls(forms[0].names, x, g)

    def _bias(self) -> Tensor:
        return self._g[:, 0] if self._g.shape[1] == 1 else self._g.sum(dim=1)

    def _of_weight(self) -> Tensor:
        x, g = self._x, self._g
        if x.shape[1] == 1:
            return squares(x[:, 0]) * squares(g[:, 0])
        if not gram_is_cheaper(x.shape[1], x.shape[2], g.shape[2]):
            self._kept = self._weight()
            return squares(self._kept.flatten(1))
        found, self._apart = gram_norms(x, g)
        return found

    def _weight(self) -> Tensor:
        return self._g.transpose(1, 2) @ self._x

    def _contract(self, total: Tensor, weights: Tensor) -> None:
        scaled = self._g * weights.to(self._g.dtype)[:, None, None]
        if self._apart is not None:
            self._apart.add_to(total, weights, scaled)
        for g, x in zip(torch.split(scaled, _BLOCK), torch.split(self._x, _BLOCK), strict=True):
            total += g.flatten(0, 1).T @ x.flatten(0, 1)

    def native(self) -> NativeLayer | None:
        """As a convolution of size 1; of one position, wide inputs with few outputs alone."""
        x, g = self._x, self._g
        if "weight" not in self.names or not for_kernel(x, g):
            return None
        single = x.shape[1] == 1
        if single and not (g.shape[2] <= 32 and x.shape[2] >= 512):
            return None  # the ordinary gradient of the weight is as quick
        return NativeLayer(x.contiguous().unsqueeze(2), g.contiguous().unsqueeze(2), rank_one=single)


@dataclass(frozen=True)
class Geometry:
    """How a two-dimensional convolution runs over images.

    Attributes:
        shape: Of the weight, [o, i/groups, kh, kw].
        stride, padding, dilation: Of height and width.
        groups: Of channels.
    """

    shape: Sequence[int]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def weight_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Convolution's own, summed over images."""
        found: Tensor = grad.conv2d_weight(  # type: ignore[no-untyped-call]
            x, list(self.shape), g, self.stride, self.padding, self.dilation, self.groups
        )
        return found


class Patches(_WeightAndBias):
    """The weight [o, i/groups, kh, kw] of a two-dimensional convolution, with its bias.

    Args:
        names: ("weight",), ("bias",) or both.
        x: Inputs [m·views, i, h, w].
        g: Gradients of the outputs [m·views, o, oh, ow].
        geometry: Of the convolution.
        views: Images of each example.
    """

    def __init__(self, names: Sequence[str], x: Tensor, g: Tensor, geometry: Geometry, views: int) -> None:
        super().__init__(names)
        self._x, self._g, self._geometry, self._views = x, g, geometry, views

    def _bias(self) -> Tensor:
        return self._g.flatten(2).sum(dim=2).view(-1, self._views, self._g.shape[1]).sum(dim=1)

    def _of_weight(self) -> Tensor:
        of, positions = self._geometry, self._g[0, 0].numel() * self._views
        if of.groups == 1 and gram_is_cheaper(positions, math.prod(of.shape[1:]), of.shape[0]):
            found, self._apart = gram_norms(*self._unfolded())
            return found
        self._kept = self._weight()
        return squares(self._kept.flatten(1))

    def _unfolded(self) -> tuple[Tensor, Tensor]:
        """Patches [m, T, i·kh·kw] and gradients [m, T, o] at all positions of all views."""
        of = self._geometry
        x = functional.unfold(
            self._x, tuple(of.shape[2:]), dilation=of.dilation, padding=of.padding, stride=of.stride
        ).transpose(1, 2)
        g = self._g.flatten(2).transpose(1, 2)
        return by_example(x, self._views), by_example(g, self._views)

    def _weight(self) -> Tensor:
        x, g = self._unfolded()
        x, g = (t.reshape(*t.shape[:2], self._geometry.groups, -1) for t in (x, g))
        return torch.einsum("ntgo,ntgi->ngoi", g, x).reshape(len(x), *self._geometry.shape)

    def _contract(self, total: Tensor, weights: Tensor) -> None:
        scale = weights.to(self._g.dtype).repeat_interleave(self._views)
        scaled = self._g * scale[:, None, None, None]
        if self._apart is not None:
            images = scaled.view(len(weights), self._views, *scaled.shape[1:])
            self._apart.add_to(total, weights, images)
        block = _BLOCK * self._views
        for g, x in zip(torch.split(scaled, block), torch.split(self._x, block), strict=True):
            total += self._geometry.weight_gradient(x, g).view(total.shape)

    def native(self) -> NativeLayer | None:
        """Channels last. Not for groups of channels, which the kernel does not know."""
        of = self._geometry
        if of.groups != 1 or "weight" not in self.names or not for_kernel(self._x, self._g):
            return None
        x, g = (
            t.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1) for t in (self._x, self._g)
        )
        return NativeLayer(x, g, tuple(of.shape[2:]), of.stride, of.padding, of.dilation, self._views)


class Standardized:
    """Weight, gain and bias of a convolution with the effective weight gain·v, v = scale·(weight − mean).

    With G the gradient of the effective weight, that of the gain is G·v, and that of the weight
    gain·scale·(G − mean(G) − v·(G·v)), for each output channel; without the last term where the scale is
    held at its bound.

    Args:
        names: "weight", "gain" and perhaps "bias".
        effective: The gradients of the effective weight and the bias.
        v: Standardised weight [o, i, kh, kw].
        gain, scale: [o, 1, 1, 1].
        bounded: Where the scale is at its bound, bool [o, 1, 1, 1].
    """

    def __init__(
        self,
        names: Sequence[str],
        effective: Patches,
        v: Tensor,
        gain: Tensor,
        scale: Tensor,
        bounded: Tensor,
    ) -> None:
        self.names, self._effective = names, effective
        self._v, self._gain, self._scale, self._bounded = v, gain, scale, bounded
        self._kept: Rows | None = None

    def rows(self) -> list[Tensor]:
        """All of them."""
        found = dict(zip(self._effective.names, self._effective.rows(), strict=True))
        whole, each = found["weight"], (2, 3, 4)
        found["gain"] = (whole * self._v).sum(dim=each, keepdim=True).flatten(2)[..., None, None]
        along = torch.where(self._bounded, 0, found["gain"])
        centred = whole - whole.mean(dim=each, keepdim=True)
        found["weight"] = self._gain * self._scale * (centred - self._v * along)
        return [found[name] for name in self.names]

    def squared_norms(self) -> Tensor:
        """From the gradients, which are kept."""
        self._kept = Rows(self.names, self.rows())
        return self._kept.squared_norms()

    def add_to(self, totals: Sequence[Tensor], weights: Tensor) -> None:
        """From what was kept."""
        (self._kept or Rows(self.names, self.rows())).add_to(totals, weights)

    def native(self) -> NativeLayer | None:
        """The convolution's, and how to pull it back."""
        layer = self._effective.native()
        if layer is None:
            return None
        v = self._v.permute(0, 2, 3, 1).contiguous()
        gain, scale, free = (t.flatten().contiguous() for t in (self._gain, self._scale, ~self._bounded))
        return replace(layer, standard=(v, gain, scale, free))


class Lookup:
    """The weight [n, d] of an embedding: row k is the sum of gₜ over the positions that hold k.

    Args:
        indices: [m, T].
        g: Gradients of the outputs [m, T, d], zero where a position does not count.
        count: n.
    """

    names: Sequence[str] = ("weight",)

    def __init__(self, indices: Tensor, g: Tensor, count: int) -> None:
        self._indices, self._g, self._count = indices, g, count

    def squared_norms(self) -> Tensor:
        """Each row that occurs, summed once: as many as positions, whatever the number of embeddings."""
        found = squares(self._g.flatten(1))
        ordered, order = self._indices.sort(dim=1)
        [repeated] = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1).nonzero(as_tuple=True)
        if len(repeated):
            found[repeated] = _summed_squares(ordered[repeated], order[repeated], self._g[repeated])
        return found

    def add_to(self, totals: Sequence[Tensor], weights: Tensor) -> None:
        """Into the rows that occur."""
        scaled = self._g.double() * weights[:, None, None]
        totals[0].index_add_(0, self._indices.flatten(), scaled.flatten(0, 1))

    def rows(self) -> list[Tensor]:
        """All of them: m·n·d numbers."""
        rows = self._g.new_zeros(len(self._g), self._count, self._g.shape[2])
        return [rows.scatter_add_(1, self._indices[:, :, None].expand_as(self._g), self._g)]

    def native(self) -> NativeLayer | None:
        """Not known to the kernel."""
        return None


def _summed_squares(ordered: Tensor, order: Tensor, g: Tensor) -> Tensor:
    """Squared norms, float64 [m], where gradients of equal indices are added; raised by the margin.

    Args:
        ordered: Indices in ascending order [m, T].
        order: Their positions in g [m, T].
        g: [m, T, d].
    """
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = (first.cumsum(dim=1) - 1)[:, :, None].expand_as(g)
    moved = g.gather(1, order[:, :, None].expand_as(g))
    summed = torch.zeros_like(g).scatter_add_(1, place, moved)
    raised = margin(g.dtype) * torch.linalg.vector_norm(g, dim=2).sum(dim=1)
    upper: Tensor = squares(summed.flatten(1)).sqrt() + raised.double()
    return upper.square()


def squares(rows: Tensor) -> Tensor:
    """Squared norm of each row, float64 [m]."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.double().square()


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    return torch.stack(list(parts)).sum(dim=0) if len(parts) > 1 else parts[0]


def by_example(rows: Tensor, views: int) -> Tensor:
    """From [m·views, T, d] to [m, views·T, d]: further views are further positions."""
    return rows if views == 1 else rows.reshape(-1, views * rows.shape[1], rows.shape[2])


def gram_is_cheaper(positions: int, inputs: int, outputs: int) -> bool:
    """Whether two Gram matrices take fewer operations than the gradient, its reading and writing."""
    return (
        positions * positions * (inputs + outputs + 8) < positions * inputs * outputs + 16 * inputs * outputs
    )


@dataclass(frozen=True, eq=False)
class Apart:
    """Examples whose terms cancel: their gradients are computed, so that the norm is that of what is summed.

    Attributes:
        chosen: Their numbers, int64 [k].
        rows: Their gradients, [k, o, i].
    """

    chosen: Tensor
    rows: Tensor

    def add_to(self, total: Tensor, weights: Tensor, scaled: Tensor) -> None:
        """Add them to `total`, and take them out of the scaled gradients [m, …] of which the rest is made."""
        total += torch.tensordot(weights[self.chosen], self.rows.double(), dims=1).view(total.shape)
        scaled[self.chosen] = 0


def gram_norms(x: Tensor, g: Tensor) -> tuple[Tensor, Apart | None]:
    """‖Σₜ gₜxₜᵀ‖², float64 [m], raised by the margin; and the examples whose terms cancel, if there are any.

    Args:
        x: [m, T, i].
        g: [m, T, o].
    """
    products = torch.bmm(x, x.transpose(1, 2)).mul_(torch.bmm(g, g.transpose(1, 2)))
    norms: Tensor = products.sum(dim=(1, 2), dtype=torch.float64).clamp(min=0).sqrt()  # which keeps NaN
    lengths = [torch.linalg.vector_norm(t, dim=2) for t in (x, g)]
    terms = (lengths[0] * lengths[1]).sum(dim=1).double()
    [chosen] = (terms > CANCELLING * norms).nonzero(as_tuple=True)
    norms += margin(x.dtype) * terms
    found = norms.square()
    if not len(chosen):
        return found, None
    rows = g[chosen].transpose(1, 2) @ x[chosen]
    found[chosen] = squares(rows.flatten(1))
    return found, Apart(chosen, rows)


def for_kernel(x: Tensor, g: Tensor) -> bool:
    """Whether the kernel takes tensors like these."""
    return x.device.type == "cpu" and x.dtype == g.dtype == torch.float32
