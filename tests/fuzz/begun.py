"""Stop a run at the point where training begins: its configuration, data and plan were accepted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from targets_accounting import valid

from accounting import Event, NonPrivate


class Begun(BaseException):
    """Training would begin now."""


def _begin(report: Any, *_: object) -> None:
    plan = getattr(report.plan, "event", report.plan)
    assert isinstance(plan, Event)
    valid(plan)
    assert isinstance(plan, NonPrivate) == report.config.non_private
    raise Begun


def _begin_sweep(cells: list[Any], *_: object, **__: object) -> None:
    assert len({cell.name for cell in cells}) == len(cells)
    raise Begun


def _begin_trial(plan: Any, *_: object) -> None:
    valid(plan.event)
    raise Begun


@contextmanager
def stopped_at_training() -> Iterator[None]:
    """A run inside ends where its plan has been admitted, which is accepted."""
    with (
        mock.patch("dpml.report.Report.start", _begin),
        mock.patch("dpml.pate.report.PATEReport.start", _begin),
        mock.patch("recipes.sweep_workers.run_cells", _begin_sweep),
        mock.patch("recipes.tuning.trials._rehearse"),
        mock.patch("recipes.tuning.trials._run_trial", _begin_trial),
    ):
        try:
            yield
        except Begun:
            return
