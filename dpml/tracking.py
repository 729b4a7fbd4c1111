"""What a user sees while a run goes on: a progress line, and TensorBoard.

Everything shown here is public (ε, accuracy on a public test set, speed), except for the scalars under
`not_private/`, which are written only when asked for, to a file that its owner alone can read.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Scalars = Mapping[str, float]
_LINES = 4
_HYPERPARAMETERS = (
    "dataset",
    "model",
    "epsilon",
    "delta",
    "noise_multiplier",
    "clip_norm",
    "epochs",
    "expected_batch_size",
    "learning_rate",
    "momentum",
    "planned_steps",
    "neighboring_relation",
    "seed",
    "non_private",
    "aggregator",
    "teachers",
    "queries",
    "student",
)
_METRICS = ("privacy/epsilon", "test/accuracy", "speed/examples_per_second")
"""What the hyperparameter table shows of a run, in this order."""


class Tracker(Protocol):
    """Receives what happens in a run."""

    def start(self, planned_steps: int, config: Mapping[str, object]) -> None:
        """The run begins."""
        ...

    def phase(self, name: str, steps: int) -> None:
        """A part of the run begins that counts its own steps, such as the training of teachers.

        Computing features is such a part, before the run itself begins.
        """
        ...

    def scalars(self, step: int, values: Scalars) -> None:
        """Public figures after `step` steps."""
        ...

    def not_private(self, step: int, values: Scalars) -> None:
        """Figures that ε does not cover."""
        ...

    def finish(self) -> None:
        """The run ends, completed or stopped."""
        ...


class ProgressLine:
    """A progress bar on a terminal, a line for every quarter of the run elsewhere.

    Args:
        label: What is running.
        stream: Where to; standard error by default.
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self._label = self._words = label
        # A label may hold anything that a file's name may: [red], :cat:.
        self._console = Console(file=stream or sys.stderr, markup=False, emoji=False)
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("steps · {task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._live,
        )
        self._notes: dict[str, float] = {}
        self._steps, self._next_line = 0, 0.0
        self._task: TaskID | None = None

    def start(self, planned_steps: int, config: Mapping[str, object]) -> None:
        """Show the bar."""
        del config
        self._begin(self._label, planned_steps)

    def phase(self, name: str, steps: int) -> None:
        """Begin a new bar."""
        self._begin(f"{self._label} {name}", steps)

    def _begin(self, words: str, steps: int) -> None:
        if self._task is None:
            self._progress.start()
        else:
            self._progress.update(self._task, visible=False)
        self._words, self._steps, self._next_line = words, steps, 0.0
        self._task = self._progress.add_task(words, total=steps, note="")

    def scalars(self, step: int, values: Scalars) -> None:
        """Move the bar and show the newest figures."""
        self._notes.update(values)
        note = self._note()
        if self._task is not None:
            self._progress.update(self._task, completed=step, note=note)
        share = step / max(1, self._steps)
        if not self._live and share >= self._next_line:
            line = f"{self._words}: step {step}/{self._steps} · {note}".removesuffix(" · ")
            self._console.print(line, highlight=False, soft_wrap=True)
            self._next_line = (int(share * _LINES) + 1) / _LINES

    def not_private(self, step: int, values: Scalars) -> None:
        """Nothing private is shown."""

    def finish(self) -> None:
        """Take the bar away."""
        self._progress.stop()

    def _note(self) -> str:
        parts = []
        if "privacy/epsilon" in self._notes:
            parts.append(f"ε {self._notes['privacy/epsilon']:.3f}")
        if "test/accuracy" in self._notes:
            parts.append(f"test accuracy {self._notes['test/accuracy']:.2%}")
        if "speed/examples_per_second" in self._notes:
            parts.append(f"{self._notes['speed/examples_per_second']:,.0f} examples/s")
        return " · ".join(parts)


class TensorBoard:
    """Writes scalars, the configuration as text, and hyperparameters to a folder for TensorBoard.

    Args:
        folder: Where to.
        resumed_at: The step from which an earlier process's run goes on: its points from there on are
            replaced.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        self._folder, self._resumed_at = folder, resumed_at
        self._private: SummaryWriter | None = None
        self._config: Mapping[str, object] = {}
        self._tags: set[str] = set()

    def start(self, planned_steps: int, config: Mapping[str, object]) -> None:
        """Write the configuration. Before this, nothing is in the folder: a refused run leaves none."""
        # Imported here: it takes a second, and only runs with an output folder need it.
        from torch.utils.tensorboard import SummaryWriter

        del planned_steps  # it is in the configuration
        self._writer = SummaryWriter(str(self._folder), purge_step=self._resumed_at)
        self._config = config
        if self._resumed_at:
            return
        rows = "\n".join(f"| {key} | `{value}` |" for key, value in config.items() if value is not None)
        text = f"| setting | value |\n| --- | --- |\n{rows}"
        bounds = ["Multiline", ["privacy/epsilon", "privacy/epsilon_lower"]]
        self._writer.add_custom_scalars({"privacy": {"ε, upper and lower bound": bounds}})
        self._writer.add_text("configuration", text, 0)
        self._writer.flush()

    def phase(self, name: str, steps: int) -> None:
        """Charts have no phases."""

    def scalars(self, step: int, values: Scalars) -> None:
        """Write public figures, one chart each."""
        self._tags.update(values)
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        if values:
            self._writer.flush()  # a killed run's later points are made again, its earlier ones are not

    def not_private(self, step: int, values: Scalars) -> None:
        """Write private figures under `not_private/`, to a file of mode 600 in a folder of mode 700."""
        if self._private is None:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._folder / "not_private"
            folder.mkdir(mode=0o700, exist_ok=True)
            before = os.umask(0o077)
            # Of the step itself nothing is shown again: what was computed from its sample is not kept.
            purge = None if self._resumed_at is None else self._resumed_at + 1
            try:
                self._private = SummaryWriter(str(folder), purge_step=purge)
            finally:
                os.umask(before)
        for tag, value in values.items():
            self._private.add_scalar(f"not_private/{tag}", value, step)
        self._private.flush()

    def finish(self) -> None:
        """Write the hyperparameters, and close."""
        from torch.utils.tensorboard.summary import hparams

        settings = {key: self._config[key] for key in _HYPERPARAMETERS if self._config.get(key) is not None}
        # The hyperparameter table shows the last value of each tag named here.
        metrics = {tag: 0.0 for tag in _METRICS if tag in self._tags}
        files = self._writer._get_file_writer()  # type: ignore[no-untyped-call]
        for summary in hparams(settings, metrics):  # type: ignore[no-untyped-call]
            files.add_summary(summary)
        self._writer.close()
        if self._private is not None:
            self._private.close()


class Stopwatch:
    """Seconds spent inside its `with` blocks, so that evaluation does not count as training."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens in this block."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self.seconds -= time.perf_counter() - since

    def __enter__(self) -> Stopwatch:
        self._since = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.seconds += time.perf_counter() - self._since
