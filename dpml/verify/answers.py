"""The book of a PATE run: what was asked and answered is what the events and the summary say."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from contextlib import closing
from typing import Any

from dpml.verify.check import Check, Folder
from dpml.verify.consistency import kinds

_CHECKED = ("checking", "refused", "passed")
_PAID = ("answering", "answered")


def book(folder: Folder) -> list[Check]:
    """Counts of the book, against events, plan and summary."""
    path = folder.path / "answers.sqlite"
    is_pate = folder.summary is not None and folder.summary.get("method") == "pate"
    if not path.is_file():
        return [Check("answers", "FAILED", "answers.sqlite is missing")] if is_pate else []
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as base:
            title = json.loads(base.execute("SELECT text FROM title").fetchone()[0])
            states = Counter(
                dict(base.execute("SELECT state, COUNT(*) FROM queries GROUP BY state").fetchall())
            )
            releases = base.execute("SELECT COUNT(*) FROM releases").fetchone()[0]
    except sqlite3.Error as error:
        return [Check("answers", "FAILED", f"answers.sqlite cannot be read ({error!s:.80})")]
    if odd := set(states) - {*_CHECKED, *_PAID}:
        return [Check("answers", "FAILED", f"a query is in the state {next(iter(odd))!r:.40}")]
    queries, answers = states.total(), sum(states[state] for state in _PAID)
    by = title["aggregator"]
    wrong = _against_plan(folder, by, queries, answers) or _against_figures(
        folder, by, queries, answers, releases
    )
    if wrong:
        return [Check("answers", "FAILED", wrong)]
    return [Check("answers", "ok", f"{queries:,} queries and {answers:,} answers were paid for, as planned")]


def _against_plan(folder: Folder, by: dict[str, Any], queries: int, answers: int) -> str | None:
    if queries > by["queries"] or answers > by["answers"]:
        return f"{queries:,} queries and {answers:,} answers are more than the book's plan"
    planned = kinds(folder.events["planned"])
    if by["answer"] is None:
        return None
    for event, count in ((by["answer"], by["answers"]), (by["check"], by["queries"])):
        if event is not None and planned[_kind(event)] != count:
            return f"the book is for {count:,} of {_kind(event):.60}, the plan for {planned[_kind(event)]:,}"
    return None


def _against_figures(
    folder: Folder, by: dict[str, Any], queries: int, answers: int, releases: int
) -> str | None:
    if folder.summary is None:  # running or killed: the book is ahead of the events
        return None
    figures = folder.figures
    for name, count in (("queries_asked", queries), ("queries_answered", answers)):
        if figures[name] != count:
            return f"{name} is {figures[name]!r:.40} in the summary, {count:,} in the book"
    if by["answer"] is None:
        return None
    committed = kinds(folder.events["committed"])
    for event, count in ((by["answer"], answers), (by["check"], queries)):
        if event is not None and committed[_kind(event)] != count:
            return (
                f"{committed[_kind(event)]:,} of {_kind(event):.60} were committed, {count:,} are in the book"
            )
    if releases != sum(n for kind, n in committed.items() if '"type": "SmoothRelease"' in kind):
        return f"{releases} sanitised releases are in the book, another number was committed"
    return None


def _kind(event: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in event.items() if key != "schema_version"}, sort_keys=True)
