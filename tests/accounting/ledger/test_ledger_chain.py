"""The chain of entries: every change is noticed, by the entry; a cut or an older copy, by a head."""

import os
import shutil
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from accounting import Gaussian, PoissonSampled, PrivacyBudget, Repeated, UserError
from accounting.ledger import Ledger, LedgerBroken
from accounting.ledger.file import Chain, LedgerFile, _digest, canonical
from accounting.ledger.fingerprint import key_path

STEP = PoissonSampled(Gaussian(1.1), 0.01)
PLAN = Repeated(STEP, 500)
COLUMNS = ["seq", "time", "user", "host", "name", "run", "kind", "payload", "previous", "hash"]


@pytest.fixture
def used(ledger: Ledger) -> Ledger:
    """ledger, budget, reserve, lease, close, budget, reserve, lease, close."""
    ledger.accountant("patients").record(PLAN)
    ledger.declare("others", PrivacyBudget(1.0, 1e-6))
    ledger.accountant("others").record(Gaussian(20.0))
    assert ledger.verify().rows == 9
    return ledger


def tamper(ledger: Ledger, *statements: str, values: tuple[Any, ...] = ()) -> None:
    with closing(sqlite3.connect(ledger.path)) as base:
        for trigger in ("no_update", "no_delete"):
            base.execute(f"DROP TRIGGER IF EXISTS {trigger}")
        for statement in statements:
            base.execute(statement, values)
        base.commit()


@pytest.mark.parametrize("row", [1, 4, 9])
@pytest.mark.parametrize("column", COLUMNS)
def test_a_change_of_any_column_is_noticed(used: Ledger, column: str, row: int) -> None:
    value = "seq + 100" if column == "seq" else f"{column} || ' '"
    tamper(used, f"UPDATE entries SET {column} = {value} WHERE seq = {row}")  # noqa: S608
    with pytest.raises(LedgerBroken, match=f"broken at row {row}: ") as error:
        used.verify()
    assert error.value.row == row
    assert "\n" not in str(error.value)
    with pytest.raises(LedgerBroken):
        used.accountant("patients")


@pytest.mark.parametrize("value", [None, 3, 3.5, b"\xff", "\x00", ""])
@pytest.mark.parametrize("column", ["payload", "user", "hash"])
def test_a_change_of_type_is_noticed(used: Ledger, column: str, value: Any) -> None:
    rows = "SELECT * FROM entries"
    loose = ", ".join(COLUMNS)
    tamper(used, f"CREATE TABLE other ({loose})", f"INSERT INTO other {rows}", "DROP TABLE entries")
    tamper(used, "ALTER TABLE other RENAME TO entries")
    tamper(used, f"UPDATE entries SET {column} = ? WHERE seq = 4", values=(value,))  # noqa: S608
    with pytest.raises(LedgerBroken, match="row 4"):
        used.verify()


def test_text_that_is_no_text_is_noticed(used: Ledger) -> None:
    tamper(used, "UPDATE entries SET user = CAST(x'ff' AS TEXT) WHERE seq = 4")
    with pytest.raises(LedgerBroken, match="row 4"):
        used.verify()


@pytest.mark.parametrize("row", range(1, 9))
def test_a_missing_entry_is_noticed(used: Ledger, row: int) -> None:
    tamper(used, f"DELETE FROM entries WHERE seq = {row}")  # noqa: S608
    with pytest.raises(LedgerBroken, match=f"row {row}: it is missing"):
        used.verify()


def test_a_cut_is_noticed_by_its_head(used: Ledger) -> None:
    heads = [entry.hash for entry in used.entries()]
    tamper(used, "DELETE FROM entries WHERE seq > 7")
    assert used.verify(heads[6]).head_row == 7  # nothing else can tell
    with pytest.raises(LedgerBroken, match="cut, rolled back or replaced"):
        used.verify(heads[8])


def test_an_older_copy_is_noticed_by_a_head(used: Ledger, tmp_path: Path) -> None:
    shutil.copy(used.path, tmp_path / "older")
    with used.accountant("patients").reserve(PLAN) as reservation:
        reservation.commit(3)
        assert reservation.receipt is not None
    head = reservation.receipt.head
    assert used.verify(head).head_row == 12
    shutil.copy(tmp_path / "older", used.path)
    with used.accountant("patients").reserve(PLAN) as other:  # as many entries again, with other hashes
        other.commit(3)
    assert used.verify().rows == 12
    with pytest.raises(LedgerBroken, match="rolled back"):
        used.verify(head)


def test_an_older_copy_ends_a_run_before_its_next_lease(used: Ledger, tmp_path: Path) -> None:
    reservation = used.accountant("patients").reserve(PLAN)
    shutil.copy(used.path, tmp_path / "older")
    reservation.commit()
    shutil.copy(tmp_path / "older", used.path)
    with pytest.raises(LedgerBroken, match=r"entries of the run .* are gone"):
        reservation.commit(10)
    assert reservation.committed == 1
    reservation.close()
    assert "gone" in reservation.unclosed  # type: ignore[attr-defined]


def rewrite(ledger: Ledger, row: int, payload: Any) -> None:
    """Forge an entry, and all hashes after it."""
    with closing(sqlite3.connect(ledger.path)) as base:
        rows = base.execute("SELECT * FROM entries ORDER BY seq").fetchall()
    tamper(ledger, "DELETE FROM entries")
    previous = rows[row - 1][8]
    for columns in rows:
        columns = list(columns[:-1])
        if columns[0] == row:
            columns[7] = canonical(payload)
        if columns[0] >= row:
            columns[8] = previous
        previous = _digest(columns)
        places = ", ".join("?" * 10)
        tamper(ledger, f"INSERT INTO entries VALUES ({places})", values=(*columns, previous))  # noqa: S608


@pytest.mark.parametrize(
    ("row", "payload", "words"),
    [
        (2, {"epsilon": 0.2, "delta": 1e-5, "relation": "zero-out"}, "row 3: its plan does not fit"),
        (2, {"epsilon": -1, "delta": 1e-5, "relation": "zero-out"}, "row 2: .*'epsilon'"),
        (2, {"epsilon": 3, "delta": 1e-5}, "row 2: "),
        (2, [], "row 2: "),
        (3, {"plan": {"type": "None"}, "rule": "none", "process": {}}, "row 3: .*schema_version"),
        (4, {"leased": [501]}, r"row 4: it leases \[501\] parts, where \[0\] to \[500\] are possible"),
        (4, {"leased": [-1]}, "row 4: it leases"),
        (4, {"leased": [1, 2]}, "row 4: "),
        (4, {"leased": [1.5]}, "row 4: "),
        (4, {"leased": [499]}, r"row 5: it closes with \[500\] parts"),
        (5, {"committed": [501]}, "row 5: it closes with"),
    ],
)
def test_a_forged_chain_must_still_add_up(used: Ledger, row: int, payload: Any, words: str) -> None:
    head = used.verify().head
    rewrite(used, row, payload)
    used.entries()  # its hashes fit
    with pytest.raises(LedgerBroken, match=words):
        used.verify()
    with pytest.raises(LedgerBroken):
        used.verify(head)


def test_a_forged_chain_that_adds_up_is_noticed_by_a_head(used: Ledger) -> None:
    head = used.verify().head
    rewrite(used, 5, {"committed": [2]})
    used.verify()
    with pytest.raises(LedgerBroken, match="not on its chain"):
        used.verify(head)


def test_entries_are_guarded_against_mistakes(used: Ledger) -> None:
    with closing(sqlite3.connect(used.path)) as base:
        with pytest.raises(sqlite3.IntegrityError, match="never changed"):
            base.execute("UPDATE entries SET user = 'x'")
        with pytest.raises(sqlite3.IntegrityError, match="never deleted"):
            base.execute("DELETE FROM entries")


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 5000, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_file_that_is_no_ledger(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "l"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"'.*l' is (empty|broken)") as error:
        Ledger(path).verify()
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content


def test_another_database(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "l")) as base:
        base.execute("CREATE TABLE t (a)")
    with pytest.raises(UserError, match="is no ledger"):
        Ledger(tmp_path / "l").declare("x", PrivacyBudget(1, 1e-5))


def test_another_version(used: Ledger) -> None:
    tamper(used, "PRAGMA user_version = 2")
    with pytest.raises(UserError, match="schema version 2, not 1"):
        used.names()


def test_a_damaged_page(used: Ledger) -> None:
    content = bytearray(used.path.read_bytes())
    content[5000:8000] = b"\xaa" * 3000
    used.path.write_bytes(content)
    with pytest.raises((LedgerBroken, OSError)):
        used.verify()


def test_modes(tmp_path: Path) -> None:
    for group, mode in ((False, 0o600), (True, 0o660)):
        ledger = Ledger(tmp_path / str(group) / "l")
        ledger.declare("x", PrivacyBudget(1, 1e-5), group=group)
        assert stat.S_IMODE(ledger.path.stat().st_mode) == mode
        Ledger(ledger.path).declare("y", PrivacyBudget(1, 1e-5), group=not group)
        assert stat.S_IMODE(ledger.path.stat().st_mode) == mode


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        Ledger(tmp_path / "file" / "l").declare("x", PrivacyBudget(1, 1e-5))
    with pytest.raises(UserError, match="There is no ledger"):
        Ledger(tmp_path).declare("x", PrivacyBudget(1, 1e-5))


def test_a_ledger_that_somebody_holds(used: Ledger) -> None:
    accountant = used.accountant("patients")
    accountant.file = LedgerFile(used.path, patience=0.05)
    rows = len(used.entries())
    with closing(sqlite3.connect(used.path, isolation_level=None)) as base:
        base.execute("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match="cannot be used: database is locked"):
            accountant.reserve(PLAN)
        base.execute("ROLLBACK")
    assert len(used.entries()) == rows
    accountant.record(PLAN)


def test_a_lease_that_fails_releases_nothing_and_the_run_counts(
    used: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservation = used.accountant("patients").reserve(PLAN)
    reservation.commit(2)

    def full(*_: Any, **__: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(Chain, "append", full)
        with pytest.raises(OSError, match="disk is full"):
            reservation.commit(10)
        assert reservation.committed == 2
        with pytest.raises(UserError, match="could not be written"):
            reservation.commit(10)
        reservation.close()
    assert "disk is full" in reservation.unclosed  # type: ignore[attr-defined]
    run = list(used.data_set("patients").runs.values())[-1]
    assert run.counted == PLAN
    assert run.status == "running"


# ---------------------------------------------------------------- found by fuzzing


@pytest.mark.parametrize("words", ['{"leased": [NaN]}', '{"a": 1}', "[" * 5000, "1" * 5000, ""])
def test_a_payload_that_no_ledger_writes(used: Ledger, words: str) -> None:
    with closing(sqlite3.connect(used.path)) as base:
        columns = list(base.execute("SELECT * FROM entries ORDER BY seq DESC").fetchone())
    columns[7] = words
    changed = (words, _digest(columns[:-1]))
    tamper(used, "UPDATE entries SET payload = ?, hash = ? WHERE seq = 9", values=changed)
    with pytest.raises(LedgerBroken, match="row 9: its payload is none that a ledger writes"):
        used.entries()


def test_a_ledger_whose_entries_are_all_gone(used: Ledger) -> None:
    tamper(used, "DELETE FROM entries")
    with pytest.raises(LedgerBroken, match="row 1: it is missing"):
        used.verify()


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER odd BEFORE INSERT ON entries WHEN new.kind = 'lease' BEGIN SELECT RAISE(IGNORE); END",
        "CREATE VIEW odd AS SELECT * FROM entries",
    ],
)
def test_triggers_that_would_forget_are_refused(used: Ledger, statement: str) -> None:
    reservation = used.accountant("patients").reserve(PLAN)
    with closing(sqlite3.connect(used.path)) as base:
        base.execute(statement)
    with pytest.raises(LedgerBroken, match="triggers or views"):
        reservation.commit()
    assert reservation.committed == 0


def test_a_fingerprint_that_is_none(used: Ledger) -> None:
    used.accountant("patients").look_alikes([b"a"])
    rewrite(used, 10, {"sketch": "no hexadecimal"})
    with pytest.raises(LedgerBroken, match="row 10: it holds no fingerprint"):
        used.look_alikes()


def test_a_key_that_is_a_pipe(used: Ledger) -> None:
    os.mkfifo(key_path(used.path))
    with pytest.raises(UserError, match="holds no key"):  # and does not wait for a writer
        used.accountant("patients").look_alikes([b"a"])


@pytest.mark.parametrize("records", [3, ["text"], [object()], ...])
def test_records_that_are_no_bytes(used: Ledger, records: Any) -> None:
    with pytest.raises(UserError, match="records as bytes"):
        used.accountant("patients").look_alikes(records)


def test_only_true_changes_a_budget_after_a_release(used: Ledger) -> None:
    with pytest.raises(UserError, match="despite_releases"):
        used.change_budget("patients", 9.0, despite_releases="false")  # type: ignore[arg-type]
    assert used.data_set("patients").budget == PrivacyBudget(3.0, 1e-5)
    for head in (["a"], 3, {}):
        with pytest.raises(LedgerBroken, match="not on its chain"):
            used.verify(head)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="budget"):
        used.declare("new", (1.0, 1e-5))  # type: ignore[arg-type]
