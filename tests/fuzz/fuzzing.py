"""A seeded fuzzer: draws hostile values, runs one case of a target, and judges what came of it.

A target is a function `(draw) -> None` in the registry `TARGETS`. It makes one call with drawn values and
asserts that whatever was accepted is valid. A case may end in success or in one of the documented refusals
with one clear line; a traceback, a warning, a hang, much memory or a failed assertion is a finding. The case
`n` of a target is always the same: its draws come from `random.Random(f"{name} {n}")`.

    DPML_FUZZ=20000 python -m pytest tests/fuzz          # as a test
    python tests/fuzz/fuzzing.py 20000 [TARGET...]       # all findings, and a table of what ran
    python tests/fuzz/fuzzing.py 20000 --output docs/results/fuzz.json
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import json
import math
import os
import platform
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from accounting import BudgetExceeded, UserError

SECONDS = 10.0
"""Processor time of one case, above which it counts as a hang."""
_WALL = 60.0
_MEGABYTES = 1500
"""Growth of the peak memory in one case that counts as an explosion."""
_PACKAGES = ("dpml", "numpy", "scipy", "torch", "safetensors", "click", "polars")
"""Whose versions the results name."""

Run = Callable[["Draw"], None]


@dataclass(frozen=True)
class Target:
    """One entry point. `share` is how many cases it gets, relative to others."""

    name: str
    run: Run
    share: float


TARGETS: dict[str, Target] = {}


def target(name: str, share: float = 1.0) -> Callable[[Run], Run]:
    """Register a target. A new entry point (a ledger, a checkpoint) needs one such function and no more."""

    def register(run: Run) -> Run:
        assert name not in TARGETS
        TARGETS[name] = Target(name, run, share)
        return run

    return register


class Hang(BaseException):
    """A case took too long."""


# ---------------------------------------------------------------- draws


class _Odd:
    """An object of no known type, whose text has lines."""

    def __repr__(self) -> str:
        return "<odd\nobject>"


class Draw(random.Random):
    """Random values of all kinds, and an empty folder for a case's own files, which it runs in."""

    def __init__(self, seed: str, folder: Path) -> None:
        super().__init__(seed)
        self.folder = folder

    def __new__(cls, *_: object) -> Draw:
        return super().__new__(cls)

    def junk(self) -> Any:
        """Anything that a caller might pass by mistake."""
        kind = self.randrange(5)
        if kind <= 1:
            return self.number()
        if kind == 2:
            return self.text()
        if kind == 3:
            return self.choice(_OBJECTS)()
        return self.choice(
            [[], [self.number()], (self.number(),), {"a": self.number()}, [[1], [2, 3]], {1, 2}]
        )

    def number(self) -> Any:
        """A number of some type, mostly an odd one."""
        return self.choice(_NUMBERS) if self.random() < 0.8 else self.choice(_NUMPY)()

    def text(self) -> str:
        return self.choice(_TEXTS)

    def maybe(self, good: Any, chance: float = 0.5) -> Any:
        """`good`, or with this chance anything else."""
        return self.junk() if self.random() < chance else good

    def one_wrong(self, good: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The same arguments with one of them replaced by junk, and its name."""
        name = self.choice(sorted(good))
        return {**good, name: self.junk()}, name

    def mutated_bytes(self, content: bytes) -> bytes:
        """The same with some bytes changed, cut out or put in."""
        data = bytearray(content)
        for _ in range(self.choice([1, 1, 2, 8])):
            at = self.randrange(len(data)) if data else 0
            match self.randrange(6):
                case 0:
                    del data[at:]
                case 1:
                    del data[at : at + self.randrange(1, 64)]
                case 2:
                    data[at:at] = self.randbytes(self.randrange(1, 16))
                case 3:
                    data[at:at] = self.choice(_WORDS)
                case _ if data:
                    data[at] = self.randrange(256)
        return bytes(data)

    def mutated_json(self, data: Any) -> Any:
        """A copy with one place of it replaced, removed, or nested."""
        data = json.loads(json.dumps(data))
        holder, key = self.choice(list(places(data)))
        match self.randrange(8):
            case 0:
                del holder[key]
            case 1:
                holder[key] = [holder[key]]
            case 2:
                holder[key] = {"type": "Composed", "events": [holder[key]] * 3}
            case 3 if isinstance(holder, dict):
                holder[self.choice(["odd", "type", "count", "schema_version", "__class__"])] = (
                    self.json_value()
                )
            case _:
                holder[key] = self.json_value()
        return data

    def json_value(self) -> Any:
        return self.choice(_JSON)


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Each place in nested dictionaries and lists: what holds it, and its key there."""
    pairs = list(data.items()) if isinstance(data, dict) else list(enumerate(data))
    for key, value in pairs:
        yield data, key
        if isinstance(value, dict | list):
            yield from places(value)


_NUMBERS: list[Any] = [
    *(0, 1, 2, 3, -1, -7, 10, 64, 10**6, 10**15, 10**15 + 1, 2**63, 2**64, 10**400, 10**5000, -(10**5000)),
    *(0.0, -0.0, 0.5, 0.01, 1.0, 1.1, 1.5, 20.0, -0.5, 1e-5, 1e-300, 5e-324, 1e300, 1e9, 1e15, 1.0 + 2**-52),
    *(math.nan, math.inf, -math.inf, 1j, True, False, None),
]
_NUMPY: list[Callable[[], Any]] = [
    *(lambda x=x: np.float64(x) for x in (1.1, 0.3, math.nan, math.inf, -1.0)),
    *(lambda: np.float32(0.3), lambda: np.int64(3), lambda: np.uint8(200), lambda: np.bool_(True)),
    *(lambda: np.array(1.5), lambda: np.array([1.5]), lambda: np.array([1, 2, 3]), lambda: np.zeros((2, 0))),
    *(lambda: np.array(["a", "b"]), lambda: np.array([object()]), lambda: np.longdouble(2) ** 5000),
    *(lambda: np.datetime64("2020-01-01"), lambda: np.array("zero-out"), lambda: np.str_("pld")),
]
_TEXTS = [
    *(
        "",
        " ",
        "a",
        "1",
        "1e3",
        "nan",
        "inf",
        "-1",
        "None",
        "true",
        "zero-out",
        "pld",
        "rdp",
        "digits",
        "..",
        "/",
    ),
    *(
        "\x00",
        "a\x00b",
        "a\nb",
        "\x1b[31m",
        "ε",
        "😀",
        "\udcff",
        "x" * 5000,
        "../" * 50,
        "/dev/null",
        "/dev/zero",
    ),
    *(
        "~nobody/x",
        "%s",
        "{}",
        "'",
        '"',
        "--help",
        "0x10",
        "1_000",
        "١٢",
        "1" * 5000,
        "file:///etc",
        "a,b",
        ",",
    ),
]
_OBJECTS: list[Callable[[], Any]] = [
    *(object, _Odd, lambda: _Odd, lambda: len, lambda: lambda x: x, lambda: ..., lambda: NotImplemented),
    *(
        lambda: b"bytes",
        lambda: bytearray(b"x"),
        lambda: Path("/dev/null"),
        lambda: iter([]),
        lambda: range(3),
    ),
    *(lambda: float, lambda: Exception("a\nb"), lambda: slice(1), lambda: 10**5000),
]
_WORDS = [
    b"null",
    b"NaN",
    b"Infinity",
    b"-1",
    b"1e999",
    b"\x00",
    b"\xff\xfe",
    b"{",
    b"[" * 5000,
    b'"',
    b"9" * 5000,
]
_JSON: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        10**15,
        10**400,
        0.0,
        0.5,
        1.5,
        -0.5,
        1e-300,
        1e300,
        math.nan,
        math.inf,
    ),
    *("", "a", "1", "rdp", "zero-out", "x" * 3000, "\n", "\x00", [], {}, [1], [[]], {"a": 1}, ["a", None]),
    *({"type": "NonPrivate"}, {"type": "Gaussian", "noise_multiplier": 1.0}, {"type": "Event"}),
]


def kept_folder() -> Path:
    """A folder for what many cases copy or read. It goes when Python ends."""
    folder = Path(tempfile.mkdtemp(prefix="dpml-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# ---------------------------------------------------------------- judgement


def refused_clearly(error: BaseException, *, names: str | None = None) -> None:
    """Assert that a refusal is one line of words, which has the parameter's name where that is known."""
    words = str(error)
    assert words.strip(), "an empty message"
    assert "\n" not in words, f"a message of several lines: {words!r:.300}"
    assert len(words) <= 1500, f"a message of {len(words)} characters: {words!r:.300}"
    assert any(letter.isalpha() for letter in words)
    if names is not None:
        plain = words.lower().replace("_", " ").replace("-", " ")
        assert names.lower().replace("_", " ") in plain, f"the message does not name {names}: {words!r:.300}"


REFUSALS = (UserError, BudgetExceeded)
"""UserError includes UnsupportedEvent, UnreachableBudget and ReservationError."""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """A refusal inside must name this parameter."""
    try:
        yield
    except REFUSALS as error:
        refused_clearly(error, names=name)
        raise


@dataclass
class Tally:
    """What came of the cases of a target."""

    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: dict[str, list[str]] = field(default_factory=dict)

    @property
    def bad(self) -> int:
        return sum(map(len, self.findings.values()))

    @property
    def cases(self) -> int:
        return self.accepted + self.refused + self.bad


def run_case(chosen: Target, number: int, folder: Path) -> str:
    """Run one case: "accepted" or "refused". Anything else raises."""
    draw = Draw(f"{chosen.name} {number}", folder)
    np.random.seed(number)  # noqa: NPY002 - what a target draws by NumPy's global generator, if it does
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings(), _no_longer_than(SECONDS):
        warnings.simplefilter("error")
        try:
            chosen.run(draw)
            outcome = "accepted"
        except REFUSALS as error:
            refused_clearly(error)
            outcome = "refused"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < _MEGABYTES, f"memory grew by {grown:.0f} MB"
    return outcome


@contextmanager
def _no_longer_than(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"more than {seconds:g} s of processor time, or {_WALL:g} s in all")

    old = [signal.signal(number, stop) for number in (signal.SIGVTALRM, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, _WALL)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGVTALRM, signal.SIGALRM), old, strict=True):
            signal.signal(number, handler)


def run_cases(chosen: Target, count: int, folder: Path) -> Tally:
    """Run the first `count` cases of a target, and collect all findings by kind."""
    tally = Tally()
    started = time.monotonic()
    with _apart(folder):
        for number in range(count):
            place = folder / "case"
            place.mkdir()
            try:
                with contextlib.chdir(place):
                    outcome = run_case(chosen, number, place)
            except (Exception, Hang) as error:
                tally.findings.setdefault(_kind(error), []).append(f"{chosen.name} {number}: {_words(error)}")
            else:
                tally.accepted += outcome == "accepted"
                tally.refused += outcome == "refused"
            shutil.rmtree(place)
    tally.seconds = round(time.monotonic() - started, 1)
    return tally


@contextmanager
def _apart(folder: Path) -> Iterator[None]:
    """With a home, a cache, a data folder and a ledger that are nobody's."""
    apart = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "DPML_DATA": str(folder / "data")}
    apart["DPML_LEDGER"] = "ledger.sqlite"  # of the case's own folder, which it runs in
    before = dict(os.environ)
    os.environ.update(apart)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _kind(error: BaseException) -> str:
    """The error's class and the line of the product, or of the target, that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and "/lib/python" not in f.filename]
    last = own[-1] if own else frames[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} {last.name}"


def _words(error: BaseException) -> str:
    try:
        return f"{error!s:.300}"
    except ValueError:  # of a huge int
        return "?"


def shares(count: int, chosen: list[Target]) -> dict[str, int]:
    """How many cases each target gets of `count`, rounded up."""
    whole = sum(each.share for each in chosen)
    return {each.name: math.ceil(count * each.share / whole) for each in chosen}


def load_targets() -> None:
    """Import the modules that register targets."""
    for module in ("accounting", "dpml", "command", "files", "ledger", "checkpoint", "audit"):
        importlib.import_module(f"targets_{module}")


def main(words: list[str]) -> int:
    """Run many cases of all targets or some, and print all findings and a table."""
    parser = argparse.ArgumentParser(description="Fuzz every entry point.")
    parser.add_argument("count", type=int, nargs="?", default=2000, help="Cases in all.")
    parser.add_argument("names", nargs="*", help="Targets, by the beginnings of their names; by default all.")
    parser.add_argument("--output", type=Path, help="A file for the results, as JSON.")
    asked = parser.parse_args(words)
    load_targets()
    chosen = [
        each for each in TARGETS.values() if not asked.names or each.name.startswith(tuple(asked.names))
    ]
    tallies, started = {}, time.monotonic()
    print(f"{'target':<34}{'cases':>7}{'accepted':>10}{'refused':>9}{'findings':>10}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for name, cases in shares(asked.count, chosen).items():
            tallies[name] = tally = run_cases(TARGETS[name], cases, Path(folder))
            print(
                f"{name:<34}{tally.cases:>7}{tally.accepted:>10}{tally.refused:>9}{tally.bad:>10}"
                f"{tally.seconds:>9.1f}",
                flush=True,
            )
            for kind, examples in tally.findings.items():
                print(f"    {len(examples)} × {kind}\n        {examples[0]}", flush=True)
    cases, bad = sum(t.cases for t in tallies.values()), sum(t.bad for t in tallies.values())
    seconds = time.monotonic() - started
    print(f"{cases} cases, {bad} findings, {seconds:.0f} s")
    if asked.output is not None:
        record = {
            "command": shlex.join(["python", "tests/fuzz/fuzzing.py", *words]),
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
            "cases": cases,
            "findings": bad,
            "seconds": round(seconds, 1),
            "targets": {
                name: {"share": TARGETS[name].share, "cases": t.cases, **asdict(t)}
                for name, t in tallies.items()
            },
        }
        asked.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.modules.setdefault("fuzzing", sys.modules["__main__"])
    sys.exit(main(sys.argv[1:]))
