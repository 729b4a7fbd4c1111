"""All that a DP-SGD run is made of between two steps, and how a checkpoint keeps it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from dpml.adaptive import AdaptiveClipping
from dpml.averaging import WeightAverage, tensors_of
from dpml.gradients import Clipping
from dpml.randomness import Randomness
from dpml.tracking import Stopwatch


@dataclass(eq=False)
class TrainingState:
    """The parts of a run that a step changes. `kept` and `restore` are each other's inverse.

    Attributes:
        model: The model that is trained; frozen weights and buffers belong to it.
        optimizer: Sees noisy gradients.
        schedule: Of its learning rate.
        average: Of the weights.
        clipping: Its norm may adapt.
        streams: Where sampling, noise, masks and the mean's noise come from, by name.
        training: Seconds spent.
        step: Steps done.
        mean_released: Whether the mean of the inputs is released.
        whole: False in the middle of a step, when the parts do not belong together.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler | None
    average: WeightAverage | None
    clipping: Clipping | AdaptiveClipping | None
    streams: Mapping[str, Randomness]
    training: Stopwatch
    step: int = 0
    mean_released: bool = False
    whole: bool = True

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around what changes the state: it is done whole, as Ctrl-C waits for its end.

        At the end all streams get new keys, so that none that is kept tells of noise that was drawn before.
        """
        with interrupts_held():
            self.whole = False
            yield
            for stream in self.streams.values():
                stream.renew()
            self.whole = True

    def kept(self, *, with_keys: bool) -> dict[str, Any]:
        """The state as numbers, words and tensors.

        Args:
            with_keys: Whether more is to be drawn. Without, nothing that was drawn can ever be drawn again.
        """
        return {
            "step": self.step,
            "mean_released": self.mean_released,
            "seconds": self.training.seconds,
            "model": tensors_of(self.model),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "average": None if self.average is None else tensors_of(self.average.model),
            "averaged_steps": None if self.average is None else self.average.steps,
            "clip_norm": self.clipping.norm if isinstance(self.clipping, AdaptiveClipping) else None,
            "streams": {name: s.state() for name, s in self.streams.items()} if with_keys else None,
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Become what was `kept`.

        Raises:
            ValueError: if it is of another model or optimizer. The state is of no use then.
        """
        for name, kind in (("step", int), ("mean_released", bool), ("seconds", float)):
            if type(kept[name]) is not kind or kept[name] < 0:
                raise ValueError(f"{name} is {kept[name]!r:.60}")
        _copy(kept["model"], self.model)
        self.optimizer.load_state_dict(kept["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(kept["schedule"])
        if self.average is not None:
            _copy(kept["average"], self.average.model)
            self.average.steps = kept["averaged_steps"]
        if isinstance(self.clipping, AdaptiveClipping):
            self.clipping.norm = kept["clip_norm"]
        for name, stream in self.streams.items() if kept["streams"] is not None else ():
            stream.restore(kept["streams"][name])
        self.training.seconds = kept["seconds"]
        self.step, self.mean_released = kept["step"], kept["mean_released"]


def _copy(tensors: list[Tensor], model: nn.Module) -> None:
    own = tensors_of(model)
    if [(t.shape, t.dtype) for t in own] != [(t.shape, t.dtype) for t in tensors]:
        raise ValueError("the model has other weights")
    with torch.no_grad():
        for into, tensor in zip(own, tensors, strict=True):
            into.copy_(tensor)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block. A second one does not wait."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield  # there is no Ctrl-C here
        return
    held = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal held
        if held:
            usual(number, frame)
        held = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if held:
            signal.raise_signal(signal.SIGINT)
