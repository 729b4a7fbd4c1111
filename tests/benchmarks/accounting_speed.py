"""How fast, and how tight: dpml's accounting beside dp-accounting and Opacus, on the same questions.

    python tests/benchmarks/accounting_speed.py [--rounds 5] [--save docs/results/accounting-speed.json]

Every round asks each program each question once, in turn, so that a busy machine is busy for all of them.
What is compared is processor time; the table gives medians over the rounds, their spread, and the ratio to
the first program.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dp_accounting as google
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant
from opacus.accountants.utils import get_noise_multiplier

from accounting import (
    Gaussian,
    PoissonSampled,
    PrivacyAccountant,
    PrivacyBudget,
    Repeated,
    calibrate_noise_multiplier,
    epsilon_curve,
)

DELTA = 1e-5
CASES = {
    "A": {"sigma": 1.1, "q": 256 / 60_000, "steps": 14_062},
    "B": {"sigma": 0.8, "q": 0.01, "steps": 100_000},
}
Case = dict[str, float]
Answer = Any


def plan(sigma: float, q: float, steps: int) -> Repeated:
    """DP-SGD as our event."""
    return Repeated(PoissonSampled(Gaussian(sigma), q), steps)


def google_plan(sigma: float, q: float, steps: int) -> google.DpEvent:
    """DP-SGD as dp-accounting's event."""
    step = google.PoissonSampledDpEvent(q, google.GaussianDpEvent(sigma))
    return google.SelfComposedDpEvent(step, steps)


def ours(case: Case, method: str = "pld", tolerance: float | None = None) -> Answer:
    """(lower, upper) ε."""
    options = {} if tolerance is None else {"tolerance": tolerance}
    accountant = PrivacyAccountant(method, **options)  # type: ignore[arg-type]
    accountant.record(plan(**case))  # type: ignore[arg-type]
    return accountant.epsilon_bounds(DELTA) if method == "pld" else accountant.epsilon(DELTA)


def googles(case: Case, accountant: Callable[[], Any]) -> Answer:
    """The pessimistic ε of dp-accounting."""
    return accountant().compose(google_plan(**case)).get_epsilon(DELTA)  # type: ignore[arg-type]


def opacus_epsilon(case: Case) -> Answer:
    """The upper ε of Opacus's PRV accountant."""
    accountant = PRVAccountant()
    accountant.history = [(case["sigma"], case["q"], int(case["steps"]))]
    return accountant.get_epsilon(DELTA)


def ours_calibrated(case: Case) -> Answer:
    """Noise for ε = 3."""
    return calibrate_noise_multiplier(
        lambda s: plan(s, case["q"], int(case["steps"])), PrivacyBudget(3.0, DELTA)
    )


def google_calibrated(case: Case) -> Answer:
    """Noise for ε = 3, with the search that dp-accounting offers."""
    return google.calibrate_dp_mechanism(
        PLDAccountant, lambda s: google_plan(s, case["q"], int(case["steps"])), 3.0, DELTA
    )


def opacus_calibrated(case: Case) -> Answer:
    """Noise for ε = 3, with Opacus's search."""
    return get_noise_multiplier(
        target_epsilon=3.0,
        target_delta=DELTA,
        sample_rate=case["q"],
        steps=int(case["steps"]),
        accountant="prv",
    )


def curve(case: Case) -> Answer:
    """ε after each of 10,000 steps; the last point."""
    return epsilon_curve(PoissonSampled(Gaussian(case["sigma"]), case["q"]), range(1, 10_001), DELTA)[-1]


QUESTIONS: dict[str, dict[str, Callable[[Case], Answer]]] = {
    "epsilon": {
        "dp-accounting PLD": lambda case: googles(case, PLDAccountant),
        "Opacus PRV": opacus_epsilon,
        "dpml, default bracket": ours,
        "dpml, 1 % bracket": lambda case: ours(case, tolerance=0.01),
        "dpml, 0.1 % bracket": lambda case: ours(case, tolerance=0.001),
        "dpml, curve of 10,000 steps": curve,
    },
    "epsilon by RDP": {
        "dp-accounting RDP": lambda case: googles(case, RdpAccountant),
        "dpml RDP": lambda case: ours(case, "rdp"),
    },
    "noise for ε = 3": {
        "dp-accounting PLD": google_calibrated,
        "Opacus PRV": opacus_calibrated,
        "dpml": ours_calibrated,
    },
}


def timed(run: Callable[[Case], Answer], case: Case) -> tuple[float, Answer]:
    """Processor seconds, and the answer."""
    start = time.process_time()
    answer = run(case)
    return time.process_time() - start, answer


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row for each question, case and program."""
    rows = []
    for question, programs in QUESTIONS.items():
        for name, case in CASES.items():
            seconds: dict[str, list[float]] = {program: [] for program in programs}
            answers: dict[str, Answer] = {}
            for _ in range(rounds):
                for program, run in programs.items():
                    took, answers[program] = timed(run, case)
                    seconds[program].append(took)
            anchor = statistics.median(seconds[next(iter(programs))])
            for program, times in seconds.items():
                middle = statistics.median(times)
                rows.append(
                    {
                        "question": question,
                        "case": name,
                        "program": program,
                        "answer": answers[program],
                        "milliseconds": round(1e3 * middle, 2),
                        "spread": [round(1e3 * min(times), 2), round(1e3 * max(times), 2)],
                        "times_faster": round(anchor / middle, 1),
                    }
                )
                print(row_of(rows[-1]), flush=True)
    return rows


def row_of(row: dict[str, Any]) -> str:
    """A line of the table."""
    low, high = row["spread"]
    return (
        f"{row['question']:<16} {row['case']} {row['program']:<28} {row['milliseconds']:>10.2f} ms "
        f"({low:.2f} to {high:.2f})  {row['times_faster']:>6.1f}×  {row['answer']}"
    )


def main() -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    rows = measure(args.rounds)
    if args.save:
        report = {
            "command": "python tests/benchmarks/accounting_speed.py",
            "date": datetime.now(UTC).date().isoformat(),
            "rounds": args.rounds,
            "delta": DELTA,
            "cases": CASES,
            "versions": {name: version(name) for name in ("dp-accounting", "opacus", "numpy", "scipy")},
            "python": platform.python_version(),
            "rows": rows,
        }
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
