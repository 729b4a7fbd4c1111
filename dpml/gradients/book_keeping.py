"""dpml's engine: clipped sums by book-keeping, at about the price of plain training.

One forward pass, one backward pass for the gradients of the layers' outputs alone. From inputs and output
gradients follow the norms, and then each layer's weighted sum, without a second backward pass (Bu, Wang,
Zha & Karypis 2023, "Differentially private optimization on large model at small cost").
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from accounting.errors import UserError
from dpml.gradients import native
from dpml.gradients.engine import (
    ClippedSum,
    Clipping,
    Loss,
    MicroBatch,
    channels_last,
    example_losses,
    trainable_parameters,
)
from dpml.gradients.native import NativeLayer
from dpml.gradients.per_example import Outer, PerExample, Rows, sum_of
from dpml.gradients.rules import affine, per_example, trained
from dpml.planning import ENGINE_SLACK

_STABILISER = 0.01  # of automatic clipping
_TINY = 1e-15  # below, squares in float32 might vanish


@dataclass(frozen=True, eq=False)
class _Call:
    """One application of a layer.

    Attributes:
        layer: The layer.
        x: Its inputs.
        edge: Where the gradients of its outputs are to be found.
        version: Of `x` when the layer saw it.
        g: These gradients.
        found: The gradients of weight and bias for each row, where the backward pass has found them.
    """

    layer: nn.Module
    x: Tensor
    edge: GradientEdge
    version: int
    g: Tensor | None = None
    found: tuple[Tensor, ...] | None = None

    def forms(self, views: int) -> Sequence[PerExample]:
        """The gradients of the layer's own parameters."""
        if self.found is not None:
            return [affine(self.layer, self.found, views)]
        return [] if self.g is None else per_example(self.layer, self.x, self.g, views)

    def rows(self, chosen: Tensor) -> _Call:
        """Some of the rows, in float64."""
        x, g = self.x[chosen], None if self.g is None else self.g[chosen].double()
        return replace(self, x=x.double() if x.is_floating_point() else x, g=g, found=None)

    def without(self, dropped: Tensor) -> _Call:
        """Zeros in some of the rows."""

        def cleaned(t: Tensor) -> Tensor:
            copy = torch.empty_like(t, memory_format=torch.preserve_format).copy_(t)
            copy[dropped] = 0
            return copy

        g = None if self.g is None else cleaned(self.g)
        found = None if self.found is None else tuple(cleaned(t) for t in self.found)
        return replace(self, x=cleaned(self.x), g=g, found=found)


_Owners = dict[nn.Module, dict[str, nn.Parameter]]  # layers, and the trained parameters that each owns
_Placed = tuple[list[int], PerExample]  # the places of a form's parameters in the model's order, and the form


class BookKeepingEngine:
    """Computes clipped sums from the inputs and the output gradients of each layer (`rules.py`).

    Slack: one example moves the sum by at most C·(1 + 1e-5). Norm and sum are taken from the same numbers, or
    the norm is raised by what rounding may make of the difference (`per_example.py`). At most 128 examples
    are added in float32 before they are added in float64. What rounding then leaves points nowhere in
    particular, so it adds to the sensitivity in squares: below 1e-6·C for ordinary networks.

    Attributes:
        slack: 1e-5.
        use_kernel: Whether to use the compiled kernel, where there is one.
    """

    slack = ENGINE_SLACK

    def __init__(self, *, use_kernel: bool = True) -> None:
        self.use_kernel = use_kernel

    def clipped_sum(
        self, model: nn.Module, loss: Loss, batches: Iterable[MicroBatch], clipping: Clipping
    ) -> ClippedSum:
        """Sum the clipped gradients of all examples; see `Engine.clipped_sum`."""
        owners: _Owners = {layer: own for layer in model.modules() if (own := trained(layer))}
        sums = _Sums(trainable_parameters(model), owners, clipping)
        counts: Counter[str] = Counter(examples=0, clipped=0, non_finite=0)
        means = {"loss_sum": 0.0, "norm_sum": 0.0}
        with native.switched(self.use_kernel), _recorded(owners) as recorder:
            for batch in batches:
                with torch.enable_grad():
                    recorder.on = True
                    losses = example_losses(loss, model(channels_last(batch.inputs)), batch)
                    recorder.on = False
                with torch.no_grad():
                    counted = batch.mask & (losses.abs() < math.inf)
                    # No name for the calls: it would keep them, and their memory, until the next ones.
                    norms, used = sums.add(
                        recorder.finished(losses, counted, len(losses) * batch.views), counted, batch.views
                    )
                    # The others are selected away: a product with zero would keep NaN.
                    losses, norms = (torch.where(used, t, 0.0) for t in (losses, norms))
                    examples = int(batch.mask.count_nonzero())
                    counts["examples"] += examples
                    counts["clipped"] += int((norms > clipping.norm).count_nonzero())
                    counts["non_finite"] += examples - int(used.count_nonzero())
                    means["loss_sum"] += float(losses.sum())
                    means["norm_sum"] += float(norms.sum())
        return ClippedSum(sums.finished(), self.slack, {**counts, **means})


class _Sums:
    """The totals of one sample, and how a micro-batch is clipped into them."""

    def __init__(self, parameters: Sequence[nn.Parameter], owners: _Owners, clipping: Clipping) -> None:
        self._parameters, self._owners, self._clipping = parameters, owners, clipping
        self._place = {p: i for i, p in enumerate(parameters)}
        self._totals: dict[int, Tensor] = {}
        self._of_kernel: dict[int, Tensor] = {}  # in its own order of axes
        self._layer_of: dict[int, int] = {}
        for number, own in enumerate(owners.values()):
            for parameter in own.values():
                self._layer_of.setdefault(self._place[parameter], number)

    def finished(self) -> list[Tensor]:
        """One float64 tensor a parameter."""
        for place, found in self._of_kernel.items():
            ordered = found.permute(0, 3, 1, 2) if found.ndim == 4 else found
            total = ordered.reshape(self._parameters[place].shape).contiguous()
            self._totals[place] = total + self._totals[place] if place in self._totals else total
        return [self._total(place) for place in range(len(self._parameters))]

    def _total(self, place: int) -> Tensor:
        """What was added up for a parameter, but by the kernel."""
        if place not in self._totals:
            self._totals[place] = torch.zeros_like(self._parameters[place], dtype=torch.float64)
        return self._totals[place]

    def add(self, calls: Sequence[_Call], counted: Tensor, views: int) -> tuple[Tensor, Tensor]:
        """Clip and add a micro-batch. Returns norms, float64 [m], and which examples contribute."""
        if self._clipping.norm < _TINY:
            everybody = torch.ones_like(counted).repeat_interleave(views)
            calls = [call.rows(everybody) for call in calls]
        norms = self._add(calls, counted, views)
        used = counted & (norms < math.inf)
        if not torch.equal(used, counted):  # perhaps squares were too large for float32
            lost = counted & ~used
            calls = [call.rows(lost.repeat_interleave(views)) for call in calls]
            norms = norms.masked_scatter(lost, self._add(calls, lost[lost], views))
            used = counted & (norms < math.inf)
        return norms, used

    def _add(self, calls: Sequence[_Call], counted: Tensor, views: int) -> Tensor:
        forms = self._forms(calls, views)
        # The kernel adds what it has clipped at once: it cannot wait for layers that are clipped apart.
        use_kernel = native.kernel() is not None and self._clipping.mode != "per-layer"
        described = [form.native() if use_kernel else None for _, form in forms]
        squared: dict[int, Tensor] = {}  # of each layer that is clipped apart
        for (places, form), layer in zip(forms, described, strict=True):
            if layer is None:
                group, squares = self._group(places), form.squared_norms()
                squared[group] = squared[group] + squares if group in squared else squares
        nothing = torch.zeros(len(counted), dtype=torch.float64, device=counted.device)
        together = sum_of([nothing, *squared.values()])
        if any(layer is not None for layer in described):
            norms, shared = self._run_kernel(forms, described, together, counted)
            weights = dict.fromkeys(squared, shared)
        else:
            norms = together.sqrt()
            weights = self._weights(squared, norms, counted)
        if squared and not math.isfinite(float(norms.sum())):
            dropped = ~torch.isfinite(norms).repeat_interleave(views)
            forms = self._forms([call.without(dropped) for call in calls], views)
            for (_, form), layer in zip(forms, described, strict=True):
                if layer is None:
                    form.squared_norms()  # so that the others are summed the same way, to the last bit
        for (places, form), layer in zip(forms, described, strict=True):
            if layer is None:
                form.add_to([self._total(i) for i in places], weights[self._group(places)])
        return norms

    def _weights(self, squared: dict[int, Tensor], norms: Tensor, counted: Tensor) -> dict[int, Tensor]:
        """What each example's gradient is multiplied by, for each group of layers."""
        usable = counted & torch.isfinite(norms)
        clipping = self._clipping
        if clipping.mode == "automatic":
            factors = dict.fromkeys(squared, clipping.norm / (norms + _STABILISER))
        else:
            limit = clipping.norm
            if clipping.mode == "per-layer":
                limit /= math.sqrt(len(set(self._layer_of.values())))
            factors = {group: (limit / squares.sqrt()).clamp(max=1.0) for group, squares in squared.items()}
        return {group: torch.where(usable, factor, 0.0) for group, factor in factors.items()}

    def _run_kernel(
        self,
        forms: Sequence[_Placed],
        described: Sequence[NativeLayer | None],
        together: Tensor,
        counted: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Norms over all layers, and weights; adds the gradients of the described layers."""
        layers = [
            (layer, self._kernel_totals(places, form.names, layer))
            for (places, form), layer in zip(forms, described, strict=True)
            if layer is not None
        ]
        stabiliser = _STABILISER if self._clipping.mode == "automatic" else 0.0
        return native.clipped_sums(layers, together, counted, self._clipping.norm, stabiliser)

    def _group(self, places: Sequence[int]) -> int:
        """The layer, where each is clipped apart; else the same for all."""
        return self._layer_of[places[0]] if self._clipping.mode == "per-layer" else 0

    def _kernel_totals(
        self, places: Sequence[int], names: Sequence[str], layer: NativeLayer
    ) -> list[Tensor | None]:
        """The kernel's totals of weight, bias and gain: those of earlier micro-batches, or new ones."""
        out = layer.g.shape[3]
        shapes = {"weight": (out, *layer.kernel, layer.x.shape[3]), "bias": (out,), "gain": (out,)}
        found: dict[str, Tensor] = {}
        for place, name in zip(places, names, strict=True):
            if place not in self._of_kernel:
                self._of_kernel[place] = torch.zeros(shapes[name], dtype=torch.float64)
            found[name] = self._of_kernel[place]
        return [found.get(name) for name in ("weight", "bias", "gain")]

    def _forms(self, calls: Sequence[_Call], views: int) -> list[_Placed]:
        """Forms that no two share a parameter of, and the places of their parameters."""
        forms: list[_Placed] = []
        for call in calls:
            own = self._owners[call.layer]
            for form in call.forms(views):
                forms.append(([self._place[own[name]] for name in form.names], form))
        uses = Counter(place for places, _ in forms for place in places)
        apart = [(p, form) for p, form in forms if all(uses[place] == 1 for place in p)]
        shared = [(p, form) for p, form in forms if any(uses[place] > 1 for place in p)]
        return apart + _joined(shared)


def _joined(forms: Sequence[_Placed]) -> list[_Placed]:
    """Forms that share parameters (tied, or used several times), added up before any norm is taken."""
    if not forms:
        return []
    of_place: dict[tuple[int, ...], list[PerExample]] = {}
    for places, form in forms:
        of_place.setdefault(tuple(places), []).append(form)
    distinct = sum(len(places) for places in of_place) == len({i for places in of_place for i in places})
    if distinct and all(isinstance(form, Outer) for _, form in forms):
        return [(list(places), Outer.joined(parts)) for places, parts in of_place.items()]  # type: ignore[arg-type]
    rows: dict[int, Tensor] = {}
    for places, form in forms:
        for place, values in zip(places, form.rows(), strict=True):
            flat = values.reshape(len(values), -1)
            rows[place] = rows[place] + flat if place in rows else flat
    return [([place], Rows((str(place),), [values])) for place, values in rows.items()]


class _Recorder:
    """Notes what layers are applied to, while it is on."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.on = False

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.on or not torch.is_grad_enabled():
            return
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            raise UserError(
                f"The layer {type(layer).__name__} has trained parameters of its own and maps something else "
                "than one tensor to one tensor; put the parameters into layers apart."
            )
        if output.requires_grad:
            # The edge stays that of the output as it is now, even if a later layer overwrites it.
            x = args[0].detach()
            self.calls.append(_Call(layer, x, get_gradient_edge(output), x._version))

    def finished(self, losses: Tensor, counted: Tensor, rows: int) -> list[_Call]:
        """The calls with the gradients of the sum of those losses that count for their outputs."""
        calls, self.calls = self.calls, []
        if not calls or not losses.requires_grad:
            return []
        edges = [call.edge for call in calls]
        gradients = torch.autograd.grad([losses], edges, [counted.to(losses.dtype)], allow_unused=True)
        for call, g in zip(calls, gradients, strict=True):
            if call.x._version != call.version:
                raise UserError(
                    f"The input of a layer {type(call.layer).__name__} is overwritten after the layer has "
                    "seen it, so its gradient is lost; write the result into a new tensor."
                )
            if g is not None and not len(call.x) == len(g) == rows:
                raise UserError(
                    f"The layer {type(call.layer).__name__} computed {len(g)} rows for {rows} examples; each "
                    "layer must see the batch as its first dimension."
                )
        return [
            replace(call, g=g, found=getattr(call.edge.node, "rows", None))
            for call, g in zip(calls, gradients, strict=True)
            if g is not None
        ]


@contextmanager
def _recorded(owners: _Owners) -> Iterator[_Recorder]:
    """Hooks on all layers with trained parameters, for the duration of one sample."""
    recorder = _Recorder()
    handles = [layer.register_forward_hook(recorder, with_kwargs=True) for layer in owners]
    norms = [layer for layer in owners if type(layer) is nn.GroupNorm and "forward" not in vars(layer)]
    if native.kernel() is not None:
        for layer in norms:
            vars(layer)["forward"] = native.fast_group_norm(layer)  # found before the class's
    try:
        yield recorder
    finally:
        for layer in norms:
            vars(layer).pop("forward", None)
        for handle in handles:
            handle.remove()
