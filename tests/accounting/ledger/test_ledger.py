"""The ledger's rules: what is admitted, leased, given back, changed and refused, as it is in memory."""

import random
from pathlib import Path
from typing import Any

import pytest

from accounting import (
    BudgetExceeded,
    Composed,
    Event,
    Gaussian,
    GNMax,
    GNMaxThreshold,
    Laplace,
    PoissonSampled,
    PrivacyAccountant,
    PrivacyBudget,
    Repeated,
    ReservationError,
    UserError,
)
from accounting.filter import RenyiFilter
from accounting.ledger import Ledger, LedgerBroken, check_name, default_path
from accounting.ledger import accountant as module
from accounting.ledger.accountant import LedgerReservation

BUDGET = PrivacyBudget(3.0, 1e-5)
STEP = PoissonSampled(Gaussian(1.1), 0.01)
PLAN = Repeated(STEP, 500)
CHECK, ANSWER = GNMaxThreshold(150.0), GNMax(40.0)
TOO_MUCH = Repeated(STEP, 10**6)


def kinds_of(ledger: Ledger) -> list[str]:
    return [entry.kind for entry in ledger.entries()]


# ---------------------------------------------------------------- as an accountant


PLANS: list[Event] = [
    Repeated(STEP, 400),
    Repeated(STEP, 1500),
    Laplace(20.0),
    Gaussian(30.0),
    Gaussian(4.0),
    Gaussian(1.6),  # fits by PLD alone
    Composed([Repeated(CHECK, 60), Repeated(ANSWER, 20)]),
    TOO_MUCH,
]


@pytest.mark.parametrize("seed", [2, 3, 4, 5, 6, 8])  # without those whose PLDs take long
def test_it_admits_what_an_accountant_in_memory_admits(ledger: Ledger, seed: int) -> None:
    """Random plans, partly committed, nested, closed in any order; each with an accountant of its own."""
    chosen = random.Random(seed)
    memory = PrivacyAccountant(budget=BUDGET)
    open_pairs: list[tuple[Any, Any]] = []
    for _ in range(7):
        plan = chosen.choice(PLANS)
        accountant = ledger.accountant("patients")
        assert accountant.rule == memory.rule
        assert accountant.fits(plan) == memory.fits(plan)
        if memory.fits(plan):
            open_pairs.append((memory.reserve(plan), accountant.reserve(plan)))
            for kind, planned in open_pairs[-1][0]._planned.items():
                if parts := chosen.choice([0, chosen.randint(0, planned), planned]):
                    for reservation in open_pairs[-1]:
                        reservation.commit(parts, kind)
        else:
            with pytest.raises(BudgetExceeded) as expected:
                memory.reserve(plan)
            with pytest.raises(BudgetExceeded) as refused:
                accountant.reserve(plan)
            assert str(expected.value) in str(refused.value)
        if open_pairs and chosen.random() < 0.6:
            for reservation in open_pairs.pop(chosen.randrange(len(open_pairs))):
                reservation.close()
    found = ledger.accountant("patients")
    assert found.rule == memory.rule
    assert found._counts() == memory._counts()
    ledger.verify()


def test_budgets_of_two_data_sets_are_apart(ledger: Ledger) -> None:
    ledger.declare("others", BUDGET)
    ledger.accountant("patients").record(PLAN)
    assert ledger.data_set("others").spent() == (0.0, 0.0)
    assert ledger.accountant("others").remaining(STEP) > ledger.accountant("patients").remaining(STEP)


def test_a_plan_for_the_whole_budget_leaves_nothing(ledger: Ledger) -> None:
    ledger.accountant("patients").record(Gaussian(1.6))
    assert ledger.data_set("patients").rule == "one plan by PLD"
    with pytest.raises(BudgetExceeded, match=r"'patients'.*nothing more may be admitted"):
        ledger.accountant("patients").record(Gaussian(1e6))
    spent, reserved = ledger.data_set("patients").spent()
    assert spent == reserved == pytest.approx(ledger.accountant("patients").epsilon(1e-5))
    assert spent <= 3.0


def test_one_plan_of_which_nothing_was_released_costs_nothing(ledger: Ledger) -> None:
    ledger.accountant("patients").reserve(Gaussian(1.6)).close()
    assert ledger.data_set("patients").rule == "none"
    ledger.accountant("patients").record(PLAN)
    memory = PrivacyAccountant(budget=BUDGET)
    memory.reserve(Gaussian(1.6)).close()
    assert memory.rule == "none"
    memory.record(PLAN)
    assert memory.rule == ledger.data_set("patients").rule == "Rényi filter"
    ledger.verify()


def test_the_readings(ledger: Ledger) -> None:
    accountant = ledger.accountant("patients")
    with accountant.reserve(PLAN) as reservation:
        reservation.commit(100)
        data_set = ledger.data_set("patients")
        spent, reserved = data_set.spent()
        counts = PLAN.atoms("zero-out")
        assert reserved == RenyiFilter(BUDGET).epsilon(counts)
        assert 0 < spent < reserved
    after = ledger.data_set("patients")
    assert after.spent()[0] == after.spent()[1] <= spent
    assert after.epsilon_fixed_in_advance() == accountant.epsilon(1e-5) < after.spent()[0]


# ---------------------------------------------------------------- leases


def test_a_commit_is_in_the_ledger_before_it_returns(ledger: Ledger) -> None:
    with ledger.accountant("patients").reserve(PLAN) as reservation:
        assert isinstance(reservation, LedgerReservation)
        for done in range(1, 60):
            reservation.commit()
            [run] = ledger.data_set("patients").runs.values()
            assert done <= sum(run.leased) <= 500


def test_leases_are_few_and_the_last_is_exact(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with ledger.accountant("patients").reserve(Repeated(PoissonSampled(Gaussian(2.0), 0.001), 5000)) as made:
        for _ in range(5000):
            made.commit()
            now[0] += 0.05
    leases = [entry.payload["leased"][0] for entry in ledger.entries() if entry.kind == "lease"]
    assert leases[-1] == 5000
    blocks = [b - a for a, b in zip([0, *leases], leases, strict=False)]
    assert max(blocks) <= 64  # three seconds, but for the first ones
    assert len(leases) <= 5000 * 0.05 / 3 + 4


def test_several_kinds_are_leased_apart(ledger: Ledger) -> None:
    plan = Composed([Repeated(CHECK, 60), Repeated(ANSWER, 20)])
    with ledger.accountant("patients").reserve(plan) as reservation:
        reservation.commit(16, CHECK)
        reservation.commit(5, ANSWER)
        reservation.commit(1, CHECK)
    [run] = ledger.data_set("patients").runs.values()
    assert run.committed == [17, 5]
    ledger.verify()


def test_a_reservation_that_was_closed_elsewhere_releases_no_more(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservation = ledger.accountant("patients").reserve(PLAN)
    reservation.commit(3)
    with pytest.raises(UserError, match="is alive"):
        ledger.close_run(reservation.run_id)
    monkeypatch.setattr("accounting.ledger.ledger.is_dead", lambda _: None)  # as from another machine
    assert ledger.close_run(reservation.run_id) == "patients"
    with pytest.raises(ReservationError, match="was ended from elsewhere"):
        reservation.commit(100)
    with pytest.raises(ReservationError):
        reservation.commit(1)
    reservation.close()
    assert "was ended from elsewhere" in reservation.unclosed
    [run] = ledger.data_set("patients").runs.values()
    assert run.committed == [3]
    ledger.verify()


def test_a_clock_that_goes_backwards_changes_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with ledger.accountant("patients").reserve(PLAN) as reservation:
        for _ in range(20):
            reservation.commit()
    assert ledger.verify().rows == len(ledger.entries())


# ---------------------------------------------------------------- going on


def test_a_closed_run_goes_on_under_its_plan(ledger: Ledger) -> None:
    accountant = ledger.accountant("patients")
    with accountant.reserve(PLAN) as first:
        first.commit(100)
    again = ledger.accountant("patients").reopen(first.run_id, PLAN)
    assert ledger.data_set("patients").runs[first.run_id].counted == PLAN
    again.commit(100)
    rows = len(ledger.entries())
    again.commit(1)
    assert len(ledger.entries()) == rows + 1
    again.close()
    assert ledger.data_set("patients").runs[first.run_id].committed == [101]
    ledger.verify()


def test_what_was_released_before_stays_spent_though_nobody_commits_it_again(ledger: Ledger) -> None:
    with ledger.accountant("patients").reserve(PLAN) as first:
        first.commit(100)
    ledger.accountant("patients").reopen(first.run_id, PLAN).close()
    assert ledger.data_set("patients").runs[first.run_id].committed == [100]


def test_what_others_took_in_between_is_gone(ledger: Ledger) -> None:
    accountant = ledger.accountant("patients")
    with accountant.reserve(PLAN) as first:
        first.commit(1)
    accountant.record(Repeated(STEP, accountant.remaining(STEP) - 10))
    with pytest.raises(BudgetExceeded):
        accountant.reopen(first.run_id, PLAN)
    ledger.verify()


def test_who_may_go_on(ledger: Ledger) -> None:
    accountant = ledger.accountant("patients")
    first = accountant.reserve(PLAN)
    with pytest.raises(UserError, match="may still be running"):
        accountant.reopen(first.run_id, PLAN)
    first.close()
    with pytest.raises(UserError, match="another plan"):
        accountant.reopen(first.run_id, Repeated(STEP, 501))
    with pytest.raises(UserError, match="no run 'x'"):
        accountant.reopen("x", PLAN)


# ---------------------------------------------------------------- budgets


def test_a_budget_changes_freely_before_the_first_release(ledger: Ledger) -> None:
    ledger.change_budget("patients", 5.0, 1e-6)
    assert ledger.data_set("patients").budget == PrivacyBudget(5.0, 1e-6)
    assert ledger.data_set("patients").caveat == ""


def test_a_budget_that_is_changed_after_a_release_says_so_for_ever(ledger: Ledger) -> None:
    ledger.accountant("patients").record(PLAN)
    with pytest.raises(UserError, match="--despite-releases"):
        ledger.change_budget("patients", 5.0)
    with pytest.raises(UserError, match="δ of 'patients' is fixed"):
        ledger.change_budget("patients", 5.0, 1e-6, despite_releases=True)
    with pytest.raises(UserError, match="less than what 'patients' has spent"):
        ledger.change_budget("patients", 0.5, despite_releases=True)
    ledger.change_budget("patients", 5.0, despite_releases=True)
    ledger.change_budget("patients", 4.0, despite_releases=True)
    data_set = ledger.data_set("patients")
    assert data_set.budget.epsilon == 4.0
    assert "the largest one, ε = 5" in data_set.caveat
    with ledger.accountant("patients").reserve(PLAN) as reservation:
        assert reservation.receipt is not None
        assert reservation.receipt.caveat == data_set.caveat
    ledger.verify()


def test_a_raised_budget_frees_what_one_plan_had_taken(ledger: Ledger) -> None:
    ledger.accountant("patients").record(Gaussian(1.6))
    with pytest.raises(UserError, match="by the Rényi filter"):
        ledger.change_budget("patients", 3.1, despite_releases=True)
    ledger.change_budget("patients", 6.0, despite_releases=True)
    accountant = ledger.accountant("patients")
    accountant.record(PLAN)
    assert accountant.rule == "Rényi filter"
    ledger.verify()


# ---------------------------------------------------------------- names and mistakes


@pytest.mark.parametrize(
    "name", ["a", "patients-2026", "Übergröße", "患者", "a b", "x" * 200, "🙂", "a'b\"c;--"]
)
def test_names(tmp_path: Path, name: str) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.declare(name, BUDGET)
    with ledger.accountant(name).reserve(PLAN) as reservation:
        reservation.commit()
    assert ledger.names() == [name]
    assert ledger.verify(reservation.receipt.head).rows == 5


def test_two_spellings_of_one_name_are_one(ledger: Ledger) -> None:
    ledger.declare("Mu\u0308ller", BUDGET)
    with pytest.raises(UserError, match="already"):
        ledger.declare("M\u00fcller", BUDGET)
    assert ledger.accountant("Mu\u0308ller").name == "M\u00fcller"


@pytest.mark.parametrize(
    "name", ["", " ", " a", "a\n", "a\0b", "\ud800", "x" * 201, None, 3, b"a", "\u202eabc"]
)
def test_impossible_names_get_one_line(ledger: Ledger, name: Any) -> None:
    for refused in (lambda: ledger.declare(name, BUDGET), lambda: check_name(name)):
        with pytest.raises(UserError, match="name in the ledger must be 1 to 200 printable") as error:
            refused()
        assert "\n" not in str(error.value)


def test_mistakes_get_one_line(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data set 'x' \(it has: patients\)"):
        ledger.accountant("x")
    with pytest.raises(UserError, match="There is no ledger"):
        Ledger(tmp_path / "none").accountant("x")
    with pytest.raises(UserError, match="has 'patients' already"):
        ledger.declare("patients", BUDGET)
    with pytest.raises(UserError, match="no run"):
        ledger.close_run("x")
    for refused in (float("nan"), 0, -1, 1e10, "3"):
        with pytest.raises(UserError, match="'epsilon'"):
            ledger.change_budget("patients", refused)  # type: ignore[arg-type]
    assert kinds_of(ledger) == ["ledger", "budget"]


def test_closing_a_run_twice_is_a_mistake(ledger: Ledger) -> None:
    with ledger.accountant("patients").reserve(PLAN) as reservation:
        reservation.commit()
    with pytest.raises(UserError, match="is closed already"):
        ledger.close_run(reservation.run_id)
    reservation.close()
    assert kinds_of(ledger) == ["ledger", "budget", "reserve", "lease", "close"]


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DPML_LEDGER", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "dpml" / "ledger.sqlite"
    monkeypatch.setenv("DPML_LEDGER", str(tmp_path / "mine"))
    assert Ledger().path == tmp_path / "mine"


def test_a_head_that_is_not_there(ledger: Ledger) -> None:
    assert ledger.verify(ledger.entries()[0].hash).head_row == 1
    for head in ("", "0" * 64, "x"):
        with pytest.raises(LedgerBroken, match="not on its chain"):
            ledger.verify(head)
