"""A slow engine to compare with: it takes the gradient of one example after the other."""

import math

import torch

from dpml.gradients.engine import ClippedSum, example_losses, trainable_parameters
from dpml.planning import ENGINE_SLACK


class OneByOne:
    """All clipping modes, and any number of views. For per-layer clipping each layer has one parameter."""

    slack = ENGINE_SLACK

    def clipped_sum(self, model, loss, batches, clipping):
        parameters = trainable_parameters(model)
        totals = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        counts = dict.fromkeys(("examples", "clipped", "non_finite", "loss_sum", "norm_sum"), 0.0)
        for batch in batches:
            losses = example_losses(loss, model(batch.inputs), batch)
            for value in losses[batch.mask]:
                gradients = [g.double() for g in torch.autograd.grad(value, parameters, retain_graph=True)]
                norm = math.sqrt(sum(float(g.norm()) ** 2 for g in gradients))
                counts["examples"] += 1
                if not math.isfinite(norm):
                    counts["non_finite"] += 1
                    continue
                counts["clipped"] += norm > clipping.norm
                counts["norm_sum"] += norm
                counts["loss_sum"] += float(value.detach())
                for total, gradient in zip(totals, gradients, strict=True):
                    total += gradient * self._factor(clipping, norm, float(gradient.norm()), len(parameters))
        return ClippedSum(totals, self.slack, counts)

    @staticmethod
    def _factor(clipping, norm, own, layers):
        if clipping.mode == "automatic":
            return clipping.norm / (norm + 0.01)
        if clipping.mode == "per-layer":
            norm, most = own, clipping.norm / math.sqrt(layers)
        else:
            most = clipping.norm
        return min(1.0, most / norm) if norm else 1.0
