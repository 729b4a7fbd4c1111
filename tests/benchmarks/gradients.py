"""How fast clipped sums of per-example gradients are: dpml beside plain training, Opacus and vmap.

    python tests/benchmarks/gradients.py [--models mnist-cnn ...] [--variants ours plain ...] [--rounds 15]
        [--threads 2] [--output docs/results/gradients-speed.json]
    python tests/benchmarks/gradients.py --memory [--output docs/results/gradients-memory.json]

A step is a forward pass and the gradients of one batch: no noise and no optimizer. In every round each
variant has its turn, in random order and for at least 50 ms, so that a busy machine is busy for all of
them. Before that, each variant's gradients are compared with those of a loop over the examples; one that
differs is not timed. Beside medians stand minima: with other programs on the machine they are the steadier.
With --memory each variant instead runs in a process of its own, and what is measured is its peak.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gradients_cases import CASES, SHAPES, Case, make_problem
from gradients_variants import OPACUS, PLAIN, VARIANTS, Step, difference, expected

TURN = 0.05
"""Seconds that a variant's turn in a round lasts at least."""
Row = dict[str, Any]


def prepare(case: Case, names: Sequence[str]) -> tuple[dict[str, Step], list[Row]]:
    """The checked and warm steps of a case by variant, and a row with a reason for each that fails."""
    steps: dict[str, Step] = {}
    failed: list[Row] = []
    wanted = expected(make_problem(case))
    torch.compiler.reset()
    for name in names:
        try:
            step = VARIANTS[name](make_problem(case))
            error = difference(step(), wanted["plain" if name in PLAIN else "private"])
            if not error <= case.tolerance:
                raise ArithmeticError(f"its gradients are off by {error:.1e}, relatively")
            steps[name] = step
        except Exception as error:  # whatever another program raises is a result
            failed.append(row(case, name, reason=reason(error)))
    return steps, failed


def row(case: Case, variant: str, **figures: Any) -> Row:
    """What the results hold about a variant on a case."""
    return {"case": case.name, "model": case.model, "batch": case.batch, "variant": variant, **figures}


def reason(error: Exception) -> str:
    """One line for a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"[:200]


def timed(step: Step, repeats: int = 1) -> float:
    """Seconds for one step."""
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def measure_speed(case: Case, names: Sequence[str], rounds: int) -> list[Row]:
    """One row for each variant: median and quartiles over the rounds, and ratios of medians."""
    steps, failed = prepare(case, names)
    repeats = {name: math.ceil(TURN / timed(step)) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for name in order:
            seconds[name].append(timed(steps[name], repeats[name]))
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    fastest = min((middle[name] for name in PLAIN if name in middle), default=math.nan)
    rows = []
    for name, times in seconds.items():
        low, _, high = statistics.quantiles(times, n=4) if rounds > 1 else times * 3
        rows.append(
            row(
                case,
                name,
                milliseconds=round(1e3 * middle[name], 3),
                quartiles=[round(1e3 * low, 3), round(1e3 * high, 3)],
                minimum=round(1e3 * min(times), 3),
                ratio_to_fastest_plain=_rounded(middle[name] / fastest),
                ratio_to_plain=_rounded(middle[name] / middle.get("plain", math.nan)),
            )
        )
    return rows + failed


def _rounded(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


def summary(rows: list[Row], figure: str) -> dict[str, Any]:
    """Ours beside the fastest plain variant and the best mode of Opacus, by case and as geometric means.

    Args:
        rows: Of all cases.
        figure: What is compared, "milliseconds" (medians) or "minimum".
    """
    against_plain, against_opacus = {}, {}
    for case in dict.fromkeys(r["case"] for r in rows):
        times = {r["variant"]: r[figure] for r in rows if r["case"] == case and figure in r}
        plain = [times[name] for name in PLAIN if name in times]
        opacus = [times[name] for name in OPACUS if name in times]
        if "ours" in times and plain:
            against_plain[case] = round(times["ours"] / min(plain), 3)
        if "ours" in times and opacus:
            against_opacus[case] = round(min(opacus) / times["ours"], 3)
    return {
        "ours_to_fastest_plain": against_plain,
        "ours_to_fastest_plain_geometric_mean": _mean(against_plain),
        "times_faster_than_best_opacus": against_opacus,
        "times_faster_than_best_opacus_geometric_mean": _mean(against_opacus),
    }


def summaries(rows: list[Row]) -> dict[str, Any]:
    """By medians, and by minima."""
    return {"medians": summary(rows, "milliseconds"), "minima": summary(rows, "minimum")}


def _mean(ratios: dict[str, float]) -> float | None:
    return round(statistics.geometric_mean(ratios.values()), 3) if ratios else None


def measure_memory(case: Case, names: Sequence[str], threads: int) -> list[Row]:
    """One row for each variant: the peak of a step beyond the model and its inputs, in a fresh process."""
    rows = []
    for name in names:
        command = [
            sys.executable,
            __file__,
            "--peak",
            json.dumps(asdict(case)),
            name,
            "--threads",
            str(threads),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            rows.append(row(case, name, **json.loads(done.stdout.splitlines()[-1])))
        else:  # killed for want of memory, say
            last = (done.stderr.strip().splitlines() or [""])[-1]
            rows.append(row(case, name, reason=f"the process ended with {done.returncode} {last}"[:200]))
    return rows


def peak(case: Case, name: str) -> Row:
    """Peak memory of the second step in MiB, beyond what the process held with the model and its inputs.

    The first step is a warm-up, in which programs are compiled; what a compiler keeps in memory counts.
    """
    problem = make_problem(case)
    try:
        before = _memory("VmRSS")
        step = VARIANTS[name](problem)
        step()
        Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from the memory in use
        step()
        return {"peak_mib": round((_memory("VmHWM") - before) / 1024, 1)}
    except Exception as error:
        return {"reason": reason(error)}


def _memory(field: str) -> int:
    """KiB, as Linux counts them for this process."""
    [value] = re.findall(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(value)


def table(rows: list[Row], show: Callable[[Row], str]) -> str:
    """A Markdown table: a line for each case, a column for each variant."""
    names = [name for name in VARIANTS if any(r["variant"] == name and "reason" not in r for r in rows)]
    cells = {(r["case"], r["variant"]): show(r) for r in rows if "reason" not in r}
    lines = [f"| case | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for case in dict.fromkeys(r["case"] for r in rows):
        lines.append(f"| {case} | {' | '.join(cells.get((case, name), '') for name in names)} |")
    return "\n".join(lines)


def speed_cell(r: Row) -> str:
    """Milliseconds, and the ratio to the fastest plain variant."""
    ratio = r["ratio_to_fastest_plain"]
    return f"{r['milliseconds']:.1f} ms" + (f" ({ratio:.2f}×)" if ratio else "")


def memory_cell(r: Row) -> str:
    """Peak memory."""
    return f"{r['peak_mib']:.0f} MiB"


def facts(args: argparse.Namespace) -> Row:
    """What the figures depend on beside the code."""
    packages = [
        p for p in ("torch", "opacus", "jax", "jax-privacy") if importlib.util.find_spec(p.replace("-", "_"))
    ]
    return {
        "command": " ".join(["python tests/benchmarks/gradients.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "threads": args.threads,
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[1], 1),
    }


def main() -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, help="only these batch sizes")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--micro", type=int, help="our engine's micro-batches, instead of each case's own")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    if args.peak:
        print(json.dumps(peak(Case(**json.loads(args.peak[0])), args.peak[1])))
        return
    chosen = [c for c in CASES if c.model in args.models and (not args.batches or c.batch in args.batches)]
    rows: list[Row] = []
    for case in chosen:
        case = replace(case, micro=args.micro or case.micro)
        if args.memory:
            new = measure_memory(case, args.variants, args.threads)
        else:
            new = measure_speed(case, args.variants, args.rounds)
        for r in new:
            print(*r.values(), flush=True)
        rows += new
        if args.output:
            save(args, rows)
    print(table(rows, memory_cell if args.memory else speed_cell))
    if not args.memory:
        print(json.dumps(summaries(rows), indent=2, ensure_ascii=False))


def save(args: argparse.Namespace, rows: list[Row]) -> None:
    """Write what is known so far."""
    report = {**facts(args), "rows": rows}
    if not args.memory:
        report |= {"rounds": args.rounds, "summary": summaries(rows)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
