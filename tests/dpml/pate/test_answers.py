"""The book of answers: paid for first, drawn once, shown only when written down; whatever dies in between.

A `Witness` aggregator notes, in a file that outlives its process, for which queries it is about to draw, and
what another connection to the book says of them at that moment. `check_answers` compares those notes, what
was shown, the book and the plan. Votes carry their query's number in the last column.
"""

import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting import Composed, GNMax, GNMaxThreshold, LNMax, PrivacyAccountant, Repeated, UserError
from accounting.budget import ReservationError
from dpml.pate.aggregation import AGGREGATORS, Aggregator, aggregator
from dpml.pate.answers import FORFEITED, NOT_ASKED, REFUSED, AnswerBook, Desk, commit_again, query_keys
from dpml.randomness import Randomness

CLASSES = 4
CONFIDENT = {"threshold": 50.0, "threshold_noise": 3.0}


@pytest.fixture
def folder():
    """In memory where that is possible: a process dies there as anywhere else, without waiting for a disk."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


# ---------------------------------------------------------------- witnesses


@dataclass(frozen=True, kw_only=True)
class Witness(Aggregator):
    """An aggregator that notes what it is about to draw, and whether that is paid for."""

    folder: Path

    def check(self, counts, randomness):
        self._note("check", counts, ["checking"])
        return super().check(counts, randomness)

    def choose(self, counts, randomness):
        self._note("answer", counts, ["answering"])
        return super().choose(counts, randomness)

    def _note(self, what, counts, paid):
        book = sqlite3.connect(self.folder / "book", timeout=60)
        find = "SELECT state FROM queries WHERE key = ?"
        for query in np.round(np.asarray(counts)[:, -1] * 1024).astype(int).tolist():
            state = book.execute(find, (key(query),)).fetchone()
            note(self.folder, what, query, "paid" if state and state[0] in paid else "unpaid")
        book.close()


class Counting(Randomness):
    """Secret randomness that notes how many numbers it gave."""

    folder: Path

    def normal_draw(self, count):
        note(self.folder, "numbers", count, "")
        return super().normal_draw(count)


def note(folder, what, query, how):
    file = os.open(folder / "diary", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, f"{what} {query} {how}\n".encode())
    os.close(file)


@dataclass
class Diary:
    """What a witness and those who were shown answers have noted."""

    drawn: dict = field(default_factory=lambda: {"check": [], "answer": []})
    unpaid: list = field(default_factory=list)
    shown: dict = field(default_factory=dict)
    numbers: int = 0


def diary(folder):
    notes = Diary()
    path = folder / "diary"
    for line in path.read_text().splitlines() if path.exists() else []:
        what, query, how = line.split(" ")
        if what == "numbers":
            notes.numbers += int(query)
        elif what == "shown":
            notes.shown.setdefault(int(query), set()).add(int(how))
        else:
            notes.drawn[what].append(int(query))
            notes.unpaid += [query] * (how == "unpaid")
    return notes


def key(query):
    return query.to_bytes(2, "big")


def votes(queries):
    """One query in four is refused, one passes by half, two have two classes that are equally likely."""
    kind = torch.tensor(queries) % 4
    first = torch.where(kind == 0, 20.0, torch.where(kind == 1, 50.0, 90.0))
    number = torch.tensor(queries) / 1024
    return torch.stack([first, first, torch.zeros(len(queries)), number], dim=1).double()


def make(folder=None, name="confident-gnmax", **settings):
    """An aggregator; a witness if it has a folder."""
    more = {"queries": 12, **(CONFIDENT if "-" in name else {}), **settings}
    made = aggregator(name, noise_multiplier=2.0, **more)
    if folder is None:
        return made
    fields = ("answer_event", "check_event", "threshold", "queries", "answers")
    return Witness(folder=folder, **{name: getattr(made, name) for name in fields})


def counting(folder):
    stream = Counting(os.urandom(32), is_secret=True)
    stream.folder = folder
    return stream


def reserve(by):
    return PrivacyAccountant().reserve(by.plan)


def ask(by, folder, queries, *, block=3, reservation=None, other=None):
    """Open the book, ask, note what is shown."""
    with closing(AnswerBook(folder / "book", by)) as book:
        desk = Desk(by, book, counting(folder), reservation, block)
        shown = desk.ask([key(query) for query in queries], votes(queries) if other is None else other)
        for query, answer in zip(queries, shown.tolist(), strict=True):
            note(folder, "shown", query, answer)
    return shown.tolist()


def rows(folder):
    """The book as it stands: each query's state and class."""
    book = sqlite3.connect(folder / "book", timeout=60)
    found = book.execute("SELECT key, state, class FROM queries").fetchall()
    book.close()
    return {int.from_bytes(name, "big"): (state, chosen) for name, state, chosen in found}


def parts(event):
    """How often each elementary event occurs."""
    counts = Counter()
    for member in event.events if isinstance(event, Composed) else [event]:
        step, count = (member.event, member.count) if isinstance(member, Repeated) else (member, 1)
        counts[step] += count
    return counts


def check_answers(by, folder, reservation=None):
    """Assert that what is drawn was paid for first, once, within the plan, and is shown as in the book."""
    seen, book = diary(folder), rows(folder)
    for what, queries in seen.drawn.items():
        twice = [query for query, count in Counter(queries).items() if count > 1]
        assert not twice, f"draws: the noise of {what} {twice} is drawn more than once"
    assert not seen.unpaid, f"order: noise is drawn for queries {seen.unpaid}, not paid for"
    asked = len(seen.drawn["check"] if by.check_event is not None else seen.drawn["answer"])
    assert asked <= by.queries, f"plan: {asked} queries are asked, {by.queries} are planned"
    assert len(seen.drawn["answer"]) <= by.answers, "plan: more answers are drawn than planned"
    opened = AnswerBook(folder / "book", by)
    paid, charged = opened.spent(), parts(opened.committed_event)
    opened.close()
    assert asked <= paid[0] <= by.queries, f"charge: {asked} queries are asked, {paid[0]} of them are charged"
    assert len(seen.drawn["answer"]) <= paid[1] <= by.answers, "charge: answers are drawn, but not charged"
    for event, count in ((by.check_event, paid[0]), (by.answer_event, paid[1])):
        assert event is None or charged[event] == count, "charge: the book's event is not what was paid for"
        if event is not None and reservation is not None:
            committed = parts(reservation.committed_event)[event]
            assert committed == count, f"charge: {count} of {event} are paid, {committed} are reported"
    for query, answers in seen.shown.items():
        final = {answer for answer in answers if answer >= REFUSED}
        assert len(final) <= 1, f"shown: query {query} has several answers"
        if final and (answer := final.pop()) >= 0:
            assert book.get(query) == ("answered", answer), (
                f"shown: query {query}'s answer is not in the book"
            )
        elif final:
            assert book.get(query, ("",))[0] == "refused", f"shown: query {query} is not refused in the book"
    expected = len(seen.drawn["check"]) + CLASSES * len(seen.drawn["answer"])
    if isinstance(by.answer_event, GNMax):
        assert seen.numbers <= expected, "draws: more noise is drawn than counts need"


def check_desk(folder, name="confident-gnmax"):
    """Assert `check_answers` of a plan that is asked for more than it has, twice, and replayed."""
    by = make(folder, name, queries=20, **({"answers": 9} if "-" in name else {}))
    reservation = reserve(by)
    first = ask(by, folder, list(range(12)), reservation=reservation)
    check_answers(by, folder, reservation)
    ask(by, folder, list(range(30)), reservation=reservation)
    check_answers(by, folder, reservation)
    again = ask(by, folder, list(range(30)), reservation=reservation, other=votes(list(range(30, 60))))
    check_answers(by, folder, reservation)
    final = [answer >= REFUSED for answer in first]
    assert np.array(again[:12])[final].tolist() == np.array(first)[final].tolist(), "shown: no replay"


@pytest.mark.parametrize("name", ["gnmax", "confident-gnmax", "interactive-gnmax"])
def test_everything_is_paid_for_first_drawn_once_and_shown_as_written(name, folder):
    check_desk(folder, name)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("name", AGGREGATORS)
def test_answers_are_replayed_for_ever(name, folder):
    by, queries = make(name=name), list(range(12))
    keys, path = [key(query) for query in queries], folder / "book"
    first = Desk(by, AnswerBook(path, by), Randomness.secret()).ask(keys, votes(queries))
    assert (first >= REFUSED).all()
    for order in (queries, queries[::-1], [5], [3, 3, 7]):
        book = AnswerBook(path, by)
        other = torch.full((len(order), CLASSES), 7.0)
        again = Desk(by, book, Randomness.secret(), block=2).ask([key(query) for query in order], other)
        assert again.tolist() == [first[query] for query in order]
        assert book.spent()[0] == 12
        book.close()


def test_refused_queries_are_replayed_as_refused_whatever_the_votes_are_now(folder):
    by = make()
    refused = list(range(0, 40, 4))[:10]
    low, high = votes(refused), torch.full((10, CLASSES), 1e6)
    for counts in (low, high):
        book = AnswerBook(folder / "book", by)
        shown = Desk(by, book, Randomness.secret()).ask([key(query) for query in refused], counts)
        assert shown.tolist() == [REFUSED] * 10
        assert book.spent() == (10, 0)
        assert parts(book.committed_event) == {GNMaxThreshold(3.0): 10, GNMax(2.0): 0}
        book.close()


@pytest.mark.parametrize("name", ["gnmax", "confident-gnmax"])
@pytest.mark.parametrize("block", [1, 2, 64])
def test_equal_keys_have_one_answer_for_the_price_of_one(name, block):
    by = make(name=name)
    for seed in range(5):
        book = AnswerBook(":memory:", by)
        reservation = reserve(by)
        desk = Desk(by, book, Randomness.from_seed(seed, "noise"), reservation, block)
        counts = torch.tensor([[0.0, 900, 0, 0], [900, 0, 0, 0], [0, 0, 0, 900], [0, 900, 0, 0]])
        assert desk.ask([b"a", b"a", b"b", b"a"], counts).tolist() == [1, 1, 3, 1]
        assert book.spent() == (2, 2)
        assert parts(reservation.committed_event) == parts(book.committed_event)


def test_a_book_pays_once_for_equal_keys():
    book = AnswerBook(":memory:", make())
    assert book.commit_checks([b"a", b"b", b"a"]) == [b"a", b"b"]
    assert book.spent() == (2, 0)


@given(
    st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=8), min_size=1, max_size=6),
    st.sampled_from([1, 3, 64]),
    st.integers(1, 10),
    st.integers(0, 2**32),
    st.sampled_from(["gnmax", "lnmax", "confident-gnmax"]),
)
@settings(max_examples=120, deadline=None)
def test_in_any_order_no_more_is_asked_and_answered_than_planned(batches, block, answers, seed, name):
    by = make(name=name, queries=10, **({"answers": answers} if "-" in name else {}))
    book, reservation = AnswerBook(":memory:", by), reserve(by)
    desk = Desk(by, book, Randomness.from_seed(seed, "noise"), reservation, block)
    final = {}
    for batch in batches:
        before = book.spent()
        shown = desk.ask([key(query) for query in batch], votes(batch)).tolist()
        for query, answer in zip(batch, shown, strict=True):
            assert answer != FORFEITED
            if query in final:
                assert answer == final[query]
            elif answer == NOT_ASKED:
                assert book.spent()[0] == by.queries or book.spent()[1] == by.answers
            else:
                final[query] = answer
        if before[1] == by.answers:
            assert book.spent() == before  # without answers to give, no check is paid for
        answered = sum(answer >= 0 for answer in final.values())
        assert answered == book.spent()[1] <= by.answers
        assert len(final) <= book.spent()[0] <= by.queries
        for event in filter(None, (by.check_event, by.answer_event)):
            assert parts(reservation.committed_event)[event] == parts(book.committed_event)[event]


def test_the_whole_plan_is_reported_when_it_is_used_up():
    for by in (make(queries=4), make(name="gnmax", queries=4), make(name="lnmax", queries=4)):
        book = AnswerBook(":memory:", by)
        queries = [2, 3, 6, 7]
        Desk(by, book, Randomness.secret()).ask([key(query) for query in queries], votes(queries))
        assert book.committed_event == by.plan
    assert isinstance(by.answer_event, LNMax)


def test_a_reservation_that_refuses_stops_the_draw(folder):
    by = make(folder, queries=6)
    reservation = PrivacyAccountant().reserve(
        Composed([Repeated(by.check_event, 4), Repeated(by.answer_event, 6)])
    )
    with pytest.raises(ReservationError, match="3 more exceed it"):
        ask(by, folder, list(range(6)), reservation=reservation)
    assert len(diary(folder).drawn["check"]) == 3


@pytest.mark.parametrize("name", ["gnmax", "confident-gnmax"])
@pytest.mark.parametrize("block", [1, 64])
def test_a_plan_is_used_up_in_the_order_in_which_queries_are_asked(name, block):
    by = make(name=name, queries=5)
    desk = Desk(by, AnswerBook(":memory:", by), Randomness.secret(), block=block)
    queries = [2, 3, 6, 7, 10, 11, 14, 15]
    shown = desk.ask([key(query) for query in queries], votes(queries))
    assert (shown[:5] >= 0).all()
    assert (shown[5:] == NOT_ASKED).all()


def test_no_queries_have_no_answers(folder):
    by = make(folder)
    assert ask(by, folder, []) == []
    assert rows(folder) == {}


@pytest.mark.parametrize("name", ["gnmax", "confident-gnmax"])
def test_votes_for_fewer_queries_than_asked_are_refused_before_anything_is_paid(name):
    by = make(name=name)
    book = AnswerBook(":memory:", by)
    with pytest.raises((UserError, ValueError, IndexError)):
        Desk(by, book, Randomness.secret()).ask([b"a", b"b", b"c"], votes([2, 3]))
    assert book.spent() == (0, 0)


def test_keys_follow_from_an_input_s_numbers_alone():
    inputs = torch.rand(20, 2, 3, generator=torch.Generator().manual_seed(0))
    keys = query_keys(inputs)
    assert len(set(keys)) == 20
    assert {len(name) for name in keys} == {16}
    assert query_keys(inputs.flip(0)) == keys[::-1]
    assert query_keys(inputs[4:5]) == keys[4:5]
    inputs[0] = 0.0
    inputs[1] = -0.0
    again = query_keys(inputs)
    assert again[0] == again[1]
    assert again[2:] == keys[2:]


# ---------------------------------------------------------------- death


def child(work):
    """Start `work` in a process of its own: its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads; the child uses none
        process = os.fork()
    if process:
        return process
    try:
        work()
        os._exit(0)
    except BaseException:  # noqa: BLE001, RUF100
        traceback.print_exc()
    finally:
        os._exit(70)


def status(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def die_at(owner, name, when, call):
    """Have this process end, without any goodbye, at the boundary of the `call`th call of a method."""
    real, calls = getattr(owner, name), []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == call and when == "before":
            os._exit(9)
        result = real(*arguments)
        if len(calls) == call:
            os._exit(9)
        return result

    setattr(owner, name, dying)


BOUNDARIES = [
    (AnswerBook, "commit_checks", "before"),
    (AnswerBook, "commit_checks", "after"),
    (Aggregator, "check", "after"),
    (AnswerBook, "persist_checks", "after"),
    (AnswerBook, "commit_answers", "before"),
    (AnswerBook, "commit_answers", "after"),
    (Aggregator, "choose", "after"),
    (AnswerBook, "persist_answers", "after"),
    (AnswerBook, "spent", "after"),  # within the transaction that pays
]


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("boundary", BOUNDARIES, ids=lambda boundary: " ".join(map(str, boundary[1:])))
def test_whoever_dies_at_a_boundary_shows_nothing_unpaid_and_draws_nothing_twice(boundary, call, folder):
    by, queries = make(folder, answers=8, queries=14), list(range(12))
    ask(by, folder, [1, 2])

    def live_and_die():
        die_at(*boundary, call)
        ask(by, folder, queries)

    assert status(child(live_and_die)) == 9
    left = rows(folder)
    check_answers(by, folder)
    shown = ask(by, folder, queries)
    check_answers(by, folder)
    now = rows(folder)
    pending = {"checking", "answering"}
    lost = [query for query in queries if left.get(query, ("",))[0] in pending]
    assert len(lost) <= 3  # a block
    assert [query for query, answer in zip(queries, shown, strict=True) if answer == FORFEITED] == lost
    for query, (state, chosen) in left.items():
        assert query in now  # paid is paid
        if state != "passed":
            assert now[query] == (state, chosen)
    again = ask(by, folder, queries[::-1], other=votes(queries))[::-1]
    check_answers(by, folder)
    assert again == shown


def test_a_crash_between_payment_and_answer_forfeits_it_for_ever(folder):
    by = make(folder, "gnmax")

    def live_and_die():
        die_at(Aggregator, "choose", "after", 1)
        ask(by, folder, [2, 3])

    assert status(child(live_and_die)) == 9
    for _ in range(2):
        assert ask(by, folder, [2, 3, 6])[:2] == [FORFEITED, FORFEITED]
    assert sorted(diary(folder).drawn["answer"]) == [2, 3, 6]
    assert len(rows(folder)) == 3


def test_killed_at_random_moments_a_book_stays_sound(folder):
    by, rng = make(folder, queries=500, answers=240), random.Random(0)

    def live():
        for start in range(0, 600, 12):
            ask(by, folder, list(range(start, start + 12)), block=4)

    ends, answered = [], {}
    for _ in range(20):
        process = child(live)
        time.sleep(rng.uniform(0.0, 0.12))
        os.kill(process, signal.SIGKILL)
        ends.append(status(process))
        if not (folder / "book").exists():
            continue
        AnswerBook(folder / "book", by).close()  # rolls back what was half done
        check_answers(by, folder)
        now = {query: row for query, row in rows(folder).items() if row[0] in ("answered", "refused")}
        assert answered.items() <= now.items()
        answered = now
    assert ends.count(-signal.SIGKILL) > 0
    live()
    check_answers(by, folder)


@pytest.mark.parametrize(
    ("name", "settings"), [("gnmax", {"queries": 5}), ("confident-gnmax", {"queries": 8, "answers": 3})]
)
def test_two_processes_that_race_for_the_last_of_a_plan_never_overspend_it(name, settings, folder):
    ends, rounds = socket.socketpair(), 25
    made = []
    for number in range(rounds):
        (folder / str(number)).mkdir()
        made.append(make(folder / str(number), name, **settings))
        AnswerBook(made[-1].folder / "book", made[-1]).close()

    def race(end, seed):
        rng = random.Random(seed)
        end.settimeout(60)
        for by in made:
            queries = rng.sample(range(10), 10)
            end.send(b"x")
            end.recv(1)
            ask(by, by.folder, queries, block=rng.choice([1, 2, 4]))

    racers = [child(lambda end=end, seed=seed: race(end, seed)) for seed, end in enumerate(ends)]
    assert [status(racer) for racer in racers] == [0, 0]
    for end in ends:
        end.close()
    for by in made:
        check_answers(by, by.folder)
        book = rows(by.folder)
        assert not {state for state, _ in book.values()} & {"checking", "answering"}  # nobody died
        if name == "gnmax":
            assert len(book) == 5
        # Once nobody races, both see the same.
        assert ask(by, by.folder, list(range(10))) == ask(by, by.folder, list(range(10)))
        check_answers(by, by.folder)


@pytest.mark.parametrize("name", ["gnmax", "confident-gnmax"])
def test_a_new_reservation_begins_with_what_the_book_has_paid_for(name, folder):
    by = make(folder, name, queries=9)

    def live_and_die():
        die_at(Aggregator, "choose", "after", 2)
        ask(by, folder, list(range(9)))

    assert status(child(live_and_die)) == 9
    reservation = reserve(by)
    with closing(AnswerBook(folder / "book", by)) as book:
        commit_again(reservation, book)
        assert parts(reservation.committed_event) == parts(book.committed_event)
    ask(by, folder, list(range(12)), reservation=reservation)
    check_answers(by, folder, reservation)


def test_a_release_is_drawn_once_and_replayed_for_ever(folder):
    drawn = []
    for _ in range(3):
        with closing(AnswerBook(folder / "book", make())) as book:
            assert book.release("epsilon", lambda: drawn.append(1) or "1.5") == "1.5"
    assert drawn == [1]


@pytest.mark.parametrize("committed", [True, False])
def test_a_release_that_died_after_its_commit_is_forfeited_for_ever(committed, folder):
    AnswerBook(folder / "book", make()).close()

    def live_and_die():
        with closing(AnswerBook(folder / "book", make())) as book:
            if not committed:
                book._base.set_progress_handler(lambda: os._exit(9), 1)
            book.release("epsilon", lambda: os._exit(9))

    assert status(child(live_and_die)) == 9
    for _ in range(2):
        with closing(AnswerBook(folder / "book", make())) as book:
            assert book.release("epsilon", lambda: "1.5") == (None if committed else "1.5")
    with closing(AnswerBook(folder / "book", make())) as book:  # of a run with a known seed nothing is
        assert book.release("epsilon", lambda: "1.5", is_secret=False) == "1.5"
        assert book.release("epsilon", lambda: "2.5", is_secret=False) == "1.5"


# ---------------------------------------------------------------- a full disk


def test_a_book_that_cannot_grow_says_so_and_nothing_is_drawn(folder, monkeypatch):
    by = make(folder, queries=3000)
    opened = AnswerBook.__init__

    def small(self, *arguments):
        opened(self, *arguments)
        self._base.execute("PRAGMA max_page_count = 4")

    with monkeypatch.context() as patch:
        patch.setattr(AnswerBook, "__init__", small)
        with pytest.raises(OSError, match="cannot be written: database or disk is full"):
            ask(by, folder, list(range(1000)), block=200)
    check_answers(by, folder)
    check_goes_on(by, folder)


def check_goes_on(by, folder):
    """With room again, it goes on where it ended."""
    left = rows(folder)
    ask(by, folder, list(range(1000)), block=200)
    check_answers(by, folder)
    now = rows(folder)
    assert len(now) == 1000
    assert all(now[query] == row for query, row in left.items() if row[0] in ("answered", "refused"))


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_limit_on_file_sizes_says_so_and_nothing_is_drawn(folder):
    by = make(folder, queries=3000)

    def live():
        limit_files(2**15)
        with pytest.raises(OSError, match="cannot be written: ") as refused:
            ask(by, folder, list(range(1000)), block=200)
        assert "\n" not in str(refused.value)

    assert status(child(live)) == 0
    check_answers(by, folder)
    check_goes_on(by, folder)


def test_a_full_file_system_says_so_and_nothing_is_drawn(folder):
    by, small = make(folder, queries=3000), folder / "small"
    small.mkdir()
    mount = shutil.which("mount")
    command = [mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        (folder / "book").symlink_to(small / "book")
        with pytest.raises(OSError, match="cannot be written: database or disk is full"):
            ask(by, folder, list(range(2900)), block=500)
        check_answers(by, folder)
        assert rows(folder)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_book_that_cannot_be_made_says_why(folder):
    def live():
        limit_files(0)
        with pytest.raises((UserError, OSError)) as refused:
            AnswerBook(folder / "book", make())
        assert str(folder) in str(refused.value)
        assert "None" not in str(refused.value)

    assert status(child(live)) == 0


# ---------------------------------------------------------------- files


def test_a_book_is_its_owner_s_alone(folder):
    before = os.umask(0)
    try:
        ask(make(folder), folder, list(range(12)))
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "book").stat().st_mode) == 0o600


def one_line(path, by=None, about=None):
    with pytest.raises(UserError) as refused:
        AnswerBook(path, by or make(), about)
    assert "\n" not in str(refused.value)
    assert "None" not in str(refused.value)
    return str(refused.value)


def test_a_book_of_another_aggregator_or_other_teachers_is_refused(folder):
    by, about = make(), {"teachers": 250}
    AnswerBook(folder / "book", by, about).close()
    AnswerBook(folder / "book", by, dict(about)).close()
    for other in (make(queries=13), make(threshold=51.0), make(threshold_noise=4.0), make(name="gnmax")):
        assert "by another aggregator or other teachers" in one_line(folder / "book", other, about)
    assert "by another aggregator or other teachers" in one_line(folder / "book", by, {"teachers": 251})
    assert "by another aggregator or other teachers" in one_line(folder / "book", by)


@pytest.mark.parametrize("content", [b"hello " * 1000, bytes(4096), b"x" * 600], ids=[*"abc"])
def test_a_file_that_is_no_book_is_refused_and_left_as_it_is(content, folder):
    (folder / "book").write_bytes(content)
    assert str(folder) in one_line(folder / "book")
    assert (folder / "book").read_bytes() == content


@pytest.mark.parametrize(
    "table", ["title (name TEXT)", "queries (name TEXT)", "cookies (name TEXT)"], ids=lambda table: table[:7]
)
def test_another_database_is_refused_and_left_as_it_is(table, folder):
    base = sqlite3.connect(folder / "book")
    base.execute(f"CREATE TABLE {table}")
    base.commit()
    base.close()
    content = (folder / "book").read_bytes()
    one_line(folder / "book")
    assert (folder / "book").read_bytes() == content


def test_a_book_says_what_it_is_about(folder):
    AnswerBook(folder / "book", make(), {"teachers": 250}).close()
    about = {"aggregator": make().to_dict(), "about": {"teachers": 250}}
    assert AnswerBook.read_title(folder / "book") == about
    (folder / "other").write_bytes(b"hello " * 1000)
    for other in ("other", "none", "."):
        with pytest.raises(UserError):
            AnswerBook.read_title(folder / other)
    assert not (folder / "none").exists()


def test_a_damaged_book_is_refused(folder):
    by = make(folder, queries=400)
    ask(by, folder, list(range(400)), block=400)
    content = (folder / "book").read_bytes()
    for damaged in (
        b"\0" * 100 + content[100:],
        content[:4096],
        content[:2000],
        content[:100] + b"\xff" * 4000,
    ):
        (folder / "book").write_bytes(damaged)
        one_line(folder / "book", by)


def test_a_place_that_cannot_hold_a_book_is_refused(folder):
    assert "cannot be opened" in one_line(folder / "none" / "book")
    assert "cannot be opened" in one_line(folder)
