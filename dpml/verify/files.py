"""The other files of a run: statement, weights, and what must not be read by others."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path
from typing import Any

import safetensors

from accounting import Composed, Event, PrivacyBudget, UnsupportedEvent, UserError
from accounting.budget import Receipt
from accounting.events import check_relation
from accounting.ledger import Ledger, LedgerBroken
from accounting.statement import PATEFacts, PrivacyFacts, Risk, SelectionFacts
from accounting.statement import statement as written
from dpml.paths import read_text
from dpml.verify.check import Check, Folder

_SHARED = (
    "dataset status epsilon epsilon_lower epsilon_spent delta accountant noise_multiplier n_is_public "
    "noise_is_secret"
)
_DPSGD = "clip_norm sensitivity_slack sampling_probability expected_batch_size planned_steps steps"
_PATE = "aggregator teachers threshold threshold_noise"


def statement(folder: Folder) -> list[Check]:
    """`statement.md` is, to the letter, what summary and events amount to."""
    path = folder.path / "statement.md"
    if not path.is_file():
        return [Check("statement", "FAILED", "is missing")]
    text = read_text(path)
    if folder.is_private:
        expected = _statements(folder)
    else:
        from dpml.report import NO_PRIVACY  # loads torch

        expected = [NO_PRIVACY]
    if text in expected:
        return [Check("statement", "ok", "is what the summary and the events amount to")]
    line = next(
        (
            i
            for i, (a, b) in enumerate(zip(text.splitlines(), expected[0].splitlines(), strict=False), 1)
            if a != b
        ),
        min(text.count("\n"), expected[0].count("\n")) + 1,
    )
    return [Check("statement", "FAILED", f"is not what the summary and the events amount to, in line {line}")]


def _statements(folder: Folder) -> list[str]:
    """The statement, for a public test set and for one that was given: the summary does not say which."""
    figures, config = folder.figures, folder.figures["config"]
    relation = check_relation(folder.relation)
    planned = [Event.from_dict(body) for body in folder.events["planned"]]
    plan = planned[0] if len(planned) == 1 else Composed(planned)
    try:
        risk = Risk.of(plan, folder.number("delta"), relation)
    except UnsupportedEvent:
        risk = None
    names = f"{_SHARED} {_DPSGD if figures['method'] == 'dpsgd' else _PATE}".split()
    facts: dict[str, Any] = {name: figures[name] for name in names}
    facts |= {"relation": relation, "risk": risk, "not_private_logs": config["log_not_private"]}
    facts["ledger"] = _receipt(figures.get("ledger"))
    made = []
    for public in (True, False):
        facts["test_set_is_public"] = public
        if figures["method"] == "dpsgd":
            more = {name: config[name] for name in ("clip_quantile", "mean_noise")}
            facts["selection"] = _selection(figures.get("selection"))
            made.append(written(PrivacyFacts(method="DP-SGD", **more, **facts)))
            continue
        counts = {
            "planned_queries": figures["queries_planned"],
            "planned_answers": figures["answers_planned"],
            "queries": figures["queries_asked"],
            "answers": figures["queries_answered"],
            "published": figures["sanitised_epsilon"],
        }
        made.append(written(PATEFacts(method="PATE", **counts, **facts)))
    return made


def _receipt(given: dict[str, Any] | None) -> Receipt | None:
    if given is None:
        return None
    return Receipt(**{**given, "budget": PrivacyBudget(**given["budget"])})


def _selection(given: dict[str, Any] | None) -> SelectionFacts | None:
    if given is None:
        return None
    return SelectionFacts(charged=given["charged"], epsilon_of_one=given["epsilon_of_one"], **given["words"])


def weights(folder: Folder) -> list[Check]:
    """The weights are those that the summary names, and can be read."""
    path, named = folder.path / "model.safetensors", folder.figures.get("weights_sha256")
    if not path.is_file():
        if named is None and folder.figures.get("status") == "stopped":
            return [Check("weights", "ok", "none: the run was stopped before there were any")]
        return [Check("weights", "FAILED", "model.safetensors is missing")]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if named is None:
        return [
            Check("weights", "not checked", "the summary has no weights_sha256 (an older version wrote it)")
        ]
    if found != named:
        return [Check("weights", "FAILED", f"their SHA-256 is {found[:12]}…, not {named!s:.12}…")]
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            count = len(file.keys())
    except safetensors.SafetensorError as error:
        return [Check("weights", "FAILED", f"are no safetensors ({error!s:.80})")]
    return [Check("weights", "ok", f"{count} tensors with the SHA-256 in the summary")]


def randomness(folder: Folder) -> list[Check]:
    """Whether the noise was secret."""
    if not folder.is_private:
        return []
    if folder.figures["noise_is_secret"] is not True:
        return [Check("randomness", "warning", "noise and sampling came from a known seed: not for release")]
    return [Check("randomness", "ok", "noise and sampling were secret, says the run")]


def ledger(folder: Folder) -> list[Check]:
    """The head that the run carries is on the chain of this machine's ledger."""
    receipt = _receipt(folder.figures.get("ledger"))
    if receipt is None:
        return []
    try:
        verified = Ledger().verify(receipt.head)
    except LedgerBroken as error:
        return [Check("ledger", "FAILED", str(error))]
    except UserError as error:
        return [Check("ledger", "not checked", str(error))]
    if verified.head_row != receipt.rows:
        return [Check("ledger", "FAILED", f"the head is entry {verified.head_row}, not {receipt.rows}")]
    return [
        Check("ledger", "ok", f"its {verified.rows:,} entries are whole, and the run's head is among them")
    ]


def not_private(folder: Folder) -> list[Check]:
    """What was logged without noise is readable by its owner alone."""
    inside = folder.path / "not_private"
    if not inside.is_dir():
        return []
    readable = [path.name for path in (inside, *inside.rglob("*")) if _open_to_others(path)]
    if readable:
        return [Check("not_private", "warning", f"others can read what has no noise: {readable[0]:.60}")]
    return [Check("not_private", "warning", "holds figures without noise: do not publish it")]


def _open_to_others(path: Path) -> bool:
    return bool(stat.S_IMODE(path.lstat().st_mode) & 0o077)
