"""Clipped sums of per-example gradients: the engine protocol, and the engines.

An engine turns a model, a loss and the micro-batches of one sample into the sum over its examples of
their clipped gradients. It states the slack of its arithmetic: one example moves the returned sum by at
most C·(1 + slack) in L2 norm, and the event is charged with that.
"""

from dpml.gradients.book_keeping import BookKeepingEngine
from dpml.gradients.engine import ClippedSum, Clipping, Engine, Loss, MicroBatch, cross_entropy
from dpml.gradients.models import make_trainable, require_trainable
from dpml.gradients.opacus_engine import OpacusEngine

__all__ = [
    "BookKeepingEngine",
    "ClippedSum",
    "Clipping",
    "Engine",
    "Loss",
    "MicroBatch",
    "OpacusEngine",
    "cross_entropy",
    "make_trainable",
    "require_trainable",
]
