"""The ledger: its table case by case, small histories in all orders, any against a model."""

from __future__ import annotations

import copy
import dataclasses
import enum
import itertools
import pickle
import re
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ray_resume.core.ledger import Ledger, LedgerError
from ray_resume.core.messages import (
    Applied,
    Completion,
    Drain,
    Failure,
    Message,
    Outcome,
    ReadFailure,
    Seal,
)
from ray_resume.core.parts import FilePart
from ray_resume.core.tokens import MODULUS, shares
from ray_resume.errors import ResumeError

pytestmark = pytest.mark.long

APPLIED, REPEATED, POISONED, ALREADY_COMPLETE = (
    Outcome.APPLIED,
    Outcome.REPEATED,
    Outcome.POISONED,
    Outcome.ALREADY_COMPLETE,
)
Event = Seal | Drain
AnyEvent = Seal | Drain | ReadFailure


def new_ledger(source_count: int = 3) -> Ledger:
    ledger = Ledger("run", source_count)
    ledger.begin_pass(1)
    return ledger


def send(ledger: Ledger, *events: AnyEvent, pass_number: int = 1) -> Applied:
    return ledger.apply(Message("run", pass_number, events))


def state(ledger: Ledger) -> Any:
    """Everything a ledger knows, in depth and detached from it."""
    return plain(copy.deepcopy(ledger))


def plain(value: Any) -> Any:
    """A value as containers and scalars that compare by what is in them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(
        value, (bool, int, float, str, bytes, bytearray, set, enum.Enum)
    ):
        return value
    slots = getattr(value, "__slots__", None) or vars(value)
    return {name: plain(getattr(value, name)) for name in slots}


def minus(value: int) -> int:
    return -value % MODULUS


def parts(*files: str) -> tuple[FilePart, ...]:
    """A part of two rows in each of some files of four."""
    return tuple(FilePart(file, 1, 2, 4) for file in files)


# The table ---------------------------------------------------------------------------------------

# Seal 5; of it, 2 are drained first, then 3 make it zero.
OPEN: tuple[Event, ...] = (Drain(0, minus(2)),)
SEALED: tuple[Event, ...] = (Drain(0, minus(2)), Seal(0, 5))
TWICE_SEALED: tuple[Event, ...] = (Drain(0, minus(2)), Seal(0, 5), Seal(0, 6))
COMPLETE: tuple[Event, ...] = (Drain(0, minus(2)), Seal(0, 5), Drain(0, minus(3)))

TABLE: dict[str, tuple[tuple[Event, ...], Event, Outcome, bool]] = {
    "unheard of, seal": ((), Seal(0, 5), APPLIED, False),
    "unheard of, seal of no rows": ((), Seal(0, 0), APPLIED, True),
    "unheard of, drain": ((), Drain(0, minus(2)), APPLIED, False),
    "unheard of, drain of a zero sum": ((), Drain(0, 0), APPLIED, False),
    "open, seal": (OPEN, Seal(0, 5), APPLIED, False),
    "open, seal that makes it zero": (OPEN, Seal(0, 2), APPLIED, True),
    "open, seal of no rows": (OPEN, Seal(0, 0), APPLIED, False),
    "open, drain": (OPEN, Drain(0, minus(3)), APPLIED, False),
    "open, drain that makes it zero": (OPEN, Drain(0, 2), APPLIED, False),
    "open, drain seen before": (OPEN, Drain(0, minus(2)), REPEATED, False),
    "sealed, same seal": (SEALED, Seal(0, 5), REPEATED, False),
    "sealed, same seal of other rows": (SEALED, Seal(0, 5, rows=9), REPEATED, False),
    "sealed, another seal": (SEALED, Seal(0, 6), POISONED, False),
    "sealed, another seal that would make it zero": (SEALED, Seal(0, 2), POISONED, False),
    "sealed, seal of no rows": (SEALED, Seal(0, 0), POISONED, False),
    "sealed, drain": (SEALED, Drain(0, minus(1)), APPLIED, False),
    "sealed, drain that makes it zero": (SEALED, Drain(0, minus(3)), APPLIED, True),
    "sealed, drain of the whole sum": (SEALED, Drain(0, minus(5)), APPLIED, False),
    "sealed, drain of a zero sum": (SEALED, Drain(0, 0), APPLIED, False),
    "sealed, drain seen before": (SEALED, Drain(0, minus(2)), REPEATED, False),
    "poisoned, first seal": (TWICE_SEALED, Seal(0, 5), POISONED, False),
    "poisoned, second seal": (TWICE_SEALED, Seal(0, 6), POISONED, False),
    "poisoned, third seal": (TWICE_SEALED, Seal(0, 7), POISONED, False),
    "poisoned, drain": (TWICE_SEALED, Drain(0, minus(3)), POISONED, False),
    "poisoned, drain for the second seal": (TWICE_SEALED, Drain(0, minus(4)), POISONED, False),
    "poisoned, drain for both seals": (TWICE_SEALED, Drain(0, minus(9)), POISONED, False),
    "poisoned, drain seen before": (TWICE_SEALED, Drain(0, minus(2)), POISONED, False),
    "complete, same seal": (COMPLETE, Seal(0, 5), ALREADY_COMPLETE, False),
    "complete, another seal": (COMPLETE, Seal(0, 6), ALREADY_COMPLETE, False),
    "complete, drain": (COMPLETE, Drain(0, minus(1)), ALREADY_COMPLETE, False),
    "complete, drain seen before": (COMPLETE, Drain(0, minus(2)), ALREADY_COMPLETE, False),
}


@pytest.mark.parametrize("in_one_message", [False, True])
@pytest.mark.parametrize("trailing", [False, True])
@pytest.mark.parametrize("name", TABLE)
def test_table(name: str, trailing: bool, in_one_message: bool) -> None:
    """Each case alone and in one message with what was before, with other sources beside it."""
    before, event, outcome, completes = TABLE[name]
    ledger = new_ledger()
    others: tuple[Event, ...] = (Seal(1, 5), Drain(2, minus(5))) if trailing else ()
    if in_one_message:
        applied = send(ledger, *before, event, *others)
        outcomes = applied.outcomes[len(before) :]
        first_time = len(applied.completions) - (before is COMPLETE)
    else:
        for one in before:
            send(ledger, one)
        applied = send(ledger, event, *others)
        outcomes = applied.outcomes
        first_time = len(applied.completions)
    assert outcomes == (outcome, *(APPLIED for _ in others))
    assert first_time == completes
    assert (0 not in ledger.pending()) == (completes or before is COMPLETE)
    assert {1, 2} <= set(ledger.pending())


def test_what_is_dropped_changes_nothing() -> None:
    for before, event, outcome, _ in TABLE.values():
        if outcome in (REPEATED, ALREADY_COMPLETE):
            ledger = new_ledger()
            send(ledger, *before)
            was = state(ledger)
            send(ledger, event)
            assert state(ledger) == was


def test_poison_ends_with_the_pass() -> None:
    ledger = new_ledger()
    send(ledger, *TWICE_SEALED)
    ledger.begin_pass(2)
    applied = ledger.apply(Message("run", 2, (Seal(0, 6), Drain(0, minus(6)))))
    assert [completion.source for completion in applied.completions] == [0]


def test_a_completion_lists_what_was_counted() -> None:
    ledger = new_ledger()
    first = Drain(1, minus(1), rows=10, parts=parts("a", "b"))
    send(ledger, first)
    send(ledger, first)
    send(ledger, first._replace(rows=99, parts=parts("of the second attempt")))
    send(ledger, Drain(1, minus(2)))
    send(ledger, Drain(0, minus(3), rows=7, parts=parts("another source's")))
    send(ledger, Seal(1, 6, rows=20), Seal(1, 6, rows=21))
    applied = send(ledger, Drain(1, minus(3), rows=4, parts=parts("c")))
    assert applied == Applied((APPLIED,), (Completion(1, 20, 14, parts("a", "b", "c")),))


@pytest.mark.parametrize(
    "file", ["aaaaaaaa-0123456789ab-0123456789abcdef-0123456789abcdef.csv", "f"]
)
def test_a_file_is_listed_whatever_comes_first(file: str) -> None:
    drain, seal = Drain(0, minus(5), rows=2, parts=parts(file)), Seal(0, 5, rows=3)
    for first, second in ((drain, seal), (seal, drain)):
        ledger = new_ledger()
        assert send(ledger, first).completions == ()
        assert send(ledger, second).completions == (Completion(0, 3, 2, parts(file)),)
        together = send(new_ledger(), first, second)
        assert together.completions == (Completion(0, 3, 2, parts(file)),)


def test_one_message_completes_several_sources() -> None:
    ledger = new_ledger()
    applied = send(ledger, Seal(2, 0), Drain(0, minus(1)), Seal(1, 0), Seal(0, 1), Seal(2, 0))
    assert [completion.source for completion in applied.completions] == [2, 1, 0]
    assert applied.outcomes[-1] is ALREADY_COMPLETE
    assert ledger.pending() == []


def test_sums_wrap() -> None:
    ledger = new_ledger()
    top = MODULUS - 1
    applied = send(ledger, Drain(0, top), Drain(0, top - 1), Seal(0, 3))
    assert [completion.source for completion in applied.completions] == [0]


def test_counters_are_forgotten_on_completion() -> None:
    ledger = new_ledger()
    empty = state(ledger)
    send(ledger, *COMPLETE)
    now = state(ledger)
    now["_complete"] = empty["_complete"]
    assert now == empty
    # Nor does anything that comes later bring them back.
    send(ledger, *(Drain(0, delta) for delta in range(100)), Seal(0, 5), Seal(0, 6))
    now = state(ledger)
    now["_complete"] = empty["_complete"]
    assert now == empty


# Orders ------------------------------------------------------------------------------------------


def completed_after(events: Iterable[Event]) -> list[int]:
    """Send the events one by one; return after how many of them source 0 completed."""
    ledger = new_ledger()
    return [n for n, event in enumerate(events, 1) if send(ledger, event).completions]


def test_plain_counters_complete_a_fan_out_too_early_and_tokens_never_do() -> None:
    """A source of one row; the fan-out makes two more of it; three rows arrive at the sink."""
    plain = (+1, +2, -1, -1, -1)
    early = [
        order for order in itertools.permutations(plain) if 0 in itertools.accumulate(order[:-1])
    ]
    assert len(early) == 72

    token = 0x1234_5678_9ABC_DEF0
    rows = shares(token, 3).tolist()
    # Nothing is sent by the fan-out, so a drop beside it makes five messages too.
    events: list[Event] = [Seal(0, token), *(Drain(0, minus(row)) for row in rows)]
    five = [Seal(0, token + 9), *events[1:], Drain(0, minus(9))]
    for history in (events, five):
        for order in itertools.permutations(history):
            assert completed_after(order) == [len(history)]


def test_repeats_complete_a_source_in_any_order_once_all_is_there() -> None:
    once: list[Event] = [Seal(0, 6), Drain(0, minus(1)), Drain(0, minus(2)), Drain(0, minus(3))]
    for order in itertools.permutations([*once, once[0], once[1]]):
        all_there = max(order.index(event) for event in once)
        assert completed_after(order) == [all_there + 1]


def test_two_seals_complete_only_if_all_else_came_between() -> None:
    history: list[Event] = [Seal(0, 6), Seal(0, 7), Drain(0, minus(2)), Drain(0, minus(4))]
    for order in itertools.permutations(history):
        completes = order.index(history[1]) == 3
        assert completed_after(order) == ([3] if completes else [])


def test_any_lost_message_leaves_the_source_pending() -> None:
    history: list[Event] = [Seal(0, 7), *(Drain(0, minus(value)) for value in (1, 2, 4))]
    for size in range(len(history)):
        for order in itertools.permutations(history, size):
            assert completed_after(order) == []


# Illegal messages and passes ---------------------------------------------------------------------

LEGAL: tuple[Event, ...] = (Seal(1, 0), Drain(0, minus(1)), Seal(2, 1))

ILLEGAL = {
    "another run": Message("nur", 1, LEGAL),
    "no run": Message("", 1, LEGAL),
    "a past pass": Message("run", 0, LEGAL),
    "a pass to come": Message("run", 2, LEGAL),
    "a source too many": Message("run", 1, (*LEGAL, Seal(3, 0))),
    "a negative source": Message("run", 1, (*LEGAL, Drain(-1, 0))),
    "a seal too large": Message("run", 1, (*LEGAL, Seal(0, MODULUS))),
    "a negative seal": Message("run", 1, (*LEGAL, Seal(0, -1))),
    "a drain too large": Message("run", 1, (*LEGAL, Drain(0, MODULUS))),
    "a negative drain": Message("run", 1, (*LEGAL, Drain(0, -1))),
    "the illegal event first": Message("run", 1, (Drain(0, -1), *LEGAL)),
}


@pytest.mark.parametrize("before", [(), OPEN, SEALED, TWICE_SEALED, COMPLETE])
@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_message_changes_nothing(name: str, before: tuple[Event, ...]) -> None:
    ledger = new_ledger()
    send(ledger, *before)
    was = state(ledger)
    with pytest.raises(LedgerError):
        ledger.apply(ILLEGAL[name])
    assert state(ledger) == was
    # In behaviour too: what is left to do completes as if nothing had been.
    untouched = new_ledger()
    send(untouched, *before)
    for event in (*LEGAL, *COMPLETE):
        assert send(ledger, event) == send(untouched, event)


def test_a_message_without_events_does_nothing() -> None:
    ledger = new_ledger()
    was = state(ledger)
    assert send(ledger) == Applied((), ())
    assert state(ledger) == was


@pytest.mark.parametrize("pass_number", [-1, 0, 1, 2])
def test_a_pass_number_is_never_used_again(pass_number: int) -> None:
    ledger = new_ledger()
    ledger.begin_pass(2)
    was = state(ledger)
    with pytest.raises(LedgerError):
        ledger.begin_pass(pass_number)
    assert state(ledger) == was


def test_a_pass_starts_empty_and_keeps_what_is_complete() -> None:
    ledger = new_ledger()
    send(ledger, *COMPLETE, Seal(1, 5), Drain(2, minus(1)))
    ledger.begin_pass(7)
    assert ledger.pending() == [1, 2]
    # Half in one pass and half in the next is not a whole.
    applied = ledger.apply(Message("run", 7, (Drain(1, minus(5)), Seal(2, 1), Seal(0, 5))))
    assert applied == Applied((APPLIED, APPLIED, ALREADY_COMPLETE), ())
    applied = ledger.apply(Message("run", 7, (Seal(1, 5),)))
    assert [completion.source for completion in applied.completions] == [1]


def test_a_ledger_error_is_one_of_ours() -> None:
    assert issubclass(LedgerError, ResumeError)


def test_messages_cannot_be_changed() -> None:
    message = Message("run", 1, (Seal(0, 1),))
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.run_id = "nur"  # type: ignore[misc]


SENT: list[Seal | Drain | Failure | ReadFailure] = [
    Seal(1, MODULUS - 1, 3),
    Seal(1, 0),
    Drain(2, 5),
    Drain(2, 5, 7, parts("a", "b")),
    Drain(2, 5, 7, parts("a"), (b"r",), 1, ("l",)),
    Drain(2, 5, results=(b"",)),
    Drain(2, 5, dead_rows=1),
    Drain(2, 5, dead_letters=("l",)),
    Failure(1, 2, 3, "boom"),
    ReadFailure(1, 2, 3, "damaged"),
    ReadFailure(1, 2, 0, "away", b"pickled", transient=True),
]


@pytest.mark.parametrize("event", SENT)
def test_a_message_arrives_as_it_was_sent(event: AnyEvent | Failure) -> None:
    message = Message("run", 1, (event, *SENT))
    back = pickle.loads(pickle.dumps(message))
    assert back == message
    assert [type(one) for one in back.events] == [type(one) for one in message.events]
    for one in back.events:
        assert all(type(part) is FilePart for part in getattr(one, "parts", ()))


def test_a_source_that_could_not_be_read_is_pending_until_it_is_read_whole() -> None:
    ledger = new_ledger()
    failure = ReadFailure(0, 3, 2, "damaged", b"first", transient=True)
    # Its rows have left already, and were written.
    assert send(ledger, failure, Drain(0, minus(3), 2)).outcomes == (APPLIED, APPLIED)
    assert send(ledger, failure, failure._replace(cause=b"more", transient=False)).outcomes == (
        REPEATED,
        REPEATED,
    )
    assert ledger.pending() == [0, 1, 2]
    assert list(ledger.failed()) == list(ledger.read_errors().sources()) == [0]
    assert ledger.failure(0) == "its reader failed after 2 rows: damaged"
    assert ledger.read_errors().cause(0) == b"first"
    assert not ledger.read_errors().is_transient(0)
    ledger.begin_pass(2)
    assert list(ledger.failed()) == [0]
    applied = ledger.apply(Message("run", 2, (Seal(0, 5, 4), Drain(0, minus(5), 4), failure)))
    assert applied.outcomes == (APPLIED, APPLIED, ALREADY_COMPLETE)
    assert [completion.source for completion in applied.completions] == [0]
    assert not ledger.failed()
    assert not ledger.read_errors().sources()
    assert ledger.read_errors().cause(0) == b""


def test_exceptions_of_readers_take_little_memory() -> None:
    ledger = new_ledger(100)
    big = bytes(60_000)
    for source in range(100):
        send(ledger, ReadFailure(source, 0, 0, "damaged", big))
    kept = [source for source in range(100) if ledger.read_errors().cause(source)]
    assert kept == list(range(17))
    assert len(ledger.read_errors().sources()) == 100


def test_no_sources() -> None:
    ledger = new_ledger(0)
    assert ledger.pending() == []
    with pytest.raises(LedgerError):
        send(ledger, Seal(0, 0))


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ((), "nothing of it arrived"),
        (OPEN, "its read did not finish"),
        ((Seal(0, 5, rows=4),), "4 rows were read, and none arrived"),
        ((Seal(0, 5, rows=4), Drain(0, 1, rows=3)), "4 rows were read .*3"),
        (TWICE_SEALED, "different rows"),
    ],
)
def test_explain(before: tuple[Event, ...], said: str) -> None:
    ledger = new_ledger()
    send(ledger, *before)
    assert re.search(said, ledger.explain(0))


# Sources that share files ------------------------------------------------------------------------


def completed(applied: Applied) -> dict[int, tuple[FilePart, ...]]:
    return {completion.source: completion.parts for completion in applied.completions}


def test_sources_of_one_file_complete_one_by_one() -> None:
    zero, one = FilePart("f", 0, 2, 5), FilePart("f", 2, 3, 5)
    flush = (Drain(0, minus(5), 2, (zero,)), Drain(1, minus(6), 3, (one,)))
    ledger = new_ledger()
    send(ledger, Seal(0, 5))
    assert completed(send(ledger, *flush)) == {0: (zero,)}
    assert ledger.pending() == [1, 2]
    assert completed(send(ledger, Seal(1, 6))) == {1: (one,)}


def test_rows_that_come_again_in_another_file_are_dead_there() -> None:
    """A write task dies after its flush; the next execution has the rows of another source, too."""
    first, again = parts("f"), parts("g")
    ledger = new_ledger()
    send(ledger, Seal(1, 7), Drain(0, minus(5), 2, first))
    applied = send(ledger, Drain(0, minus(5), 2, again), Drain(1, minus(7), 2, again))
    assert applied.outcomes == (REPEATED, APPLIED)
    assert completed(applied) == {1: again}
    assert completed(send(ledger, Seal(0, 5))) == {0: first}


def test_rows_that_come_again_with_others_of_their_source_leave_it_pending() -> None:
    """Another execution divides the rows among its flushes differently."""
    one, two, three = shares(5, 3).tolist()
    ledger = new_ledger()
    send(ledger, Seal(0, 5), Drain(0, minus(one), 2, parts("f")))
    send(ledger, Drain(0, minus(one + two), 4, parts("g")), Drain(0, minus(three), 2, parts("h")))
    assert 0 in ledger.pending()
    assert not completed(send(ledger, Drain(0, minus(two + three), 4, parts("i"))))


# Any history, against a model --------------------------------------------------------------------

SOURCE_COUNT = 3
# Few and small values, so that sums often meet.
VALUES = st.sampled_from([0, 1, 2, 3, 5, MODULUS - 1, MODULUS - 2, MODULUS - 3, MODULUS - 5])
NAMES = st.lists(st.text("abc", min_size=1, max_size=2), max_size=2).map(tuple)
PARTS = NAMES.map(lambda names: parts(*names))
EVENTS = st.one_of(
    st.builds(
        *(Seal, st.integers(0, SOURCE_COUNT - 1), VALUES, st.integers(0, 3)),
        st.sampled_from([0.0, 1.5, 2.5]),
    ),
    st.builds(Drain, st.integers(0, SOURCE_COUNT - 1), VALUES, st.integers(0, 3), PARTS),
    st.builds(
        Drain,
        st.integers(0, SOURCE_COUNT - 1),
        VALUES,
        parts=PARTS,
        results=st.lists(st.binary(max_size=1), max_size=2).map(tuple),
        dead_rows=st.integers(0, 2),
        dead_letters=NAMES,
    ),
)
BAD_EVENTS = st.one_of(
    st.builds(Seal, st.sampled_from([-1, SOURCE_COUNT]), VALUES),
    st.builds(Drain, st.integers(0, SOURCE_COUNT - 1), st.sampled_from([-1, MODULUS])),
)


class Model:
    """What a source's history in one pass means, worked out from the start each time."""

    def __init__(self) -> None:
        self.complete: Completion | None = None
        self.history: list[Event] = []

    def take(self, event: Event) -> tuple[Outcome, bool]:
        if self.complete is not None:
            return ALREADY_COMPLETE, False
        poisoned = len({e.total for e in self.history if isinstance(e, Seal)}) > 1
        seen = {(type(e), self._value(e)) for e in self.history}
        self.history.append(event)
        seals = [e for e in self.history if isinstance(e, Seal)]
        if poisoned or len({seal.total for seal in seals}) > 1:
            return POISONED, False
        if (type(event), self._value(event)) in seen:
            return REPEATED, False
        drains: dict[int, Drain] = {}
        for e in self.history:
            if isinstance(e, Drain):
                drains.setdefault(e.delta, e)
        if seals and (seals[0].total + sum(drains)) % MODULUS == 0:
            self.complete = Completion(
                event.source,
                seals[0].rows,
                sum(drain.rows for drain in drains.values()),
                tuple(part for drain in drains.values() for part in drain.parts),
                tuple(result for drain in drains.values() for result in drain.results),
                sum(drain.dead_rows for drain in drains.values()),
                tuple(letter for drain in drains.values() for letter in drain.dead_letters),
                began_at=seals[0].began_at,
            )
        return APPLIED, self.complete is not None

    @staticmethod
    def _value(event: Event) -> int:
        return event.total if isinstance(event, Seal) else event.delta


class AnyHistory(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.ledger = Ledger("run", SOURCE_COUNT)
        self.pass_number = 1
        self.ledger.begin_pass(1)
        self.models = [Model() for _ in range(SOURCE_COUNT)]
        self.sent: list[tuple[int, list[Event]]] = []
        self.completed: list[int] = []

    @rule(events=st.lists(EVENTS, max_size=4))
    def message(self, events: list[Event]) -> None:
        self.deliver(self.pass_number, events)

    @rule(data=st.data())
    def repeated_or_late(self, data: st.DataObject) -> None:
        if self.sent:
            self.deliver(*data.draw(st.sampled_from(self.sent)))

    @rule(source=st.integers(0, SOURCE_COUNT - 1), with_seal=st.booleans())
    def what_completes(self, source: int, with_seal: bool) -> None:
        """Drain exactly what is left, as luck seldom does."""
        history = self.models[source].history
        total = sum({e.total for e in history if isinstance(e, Seal)})
        total += sum({e.delta for e in history if isinstance(e, Drain)})
        drain = Drain(source, minus(total), 1, parts("z"))
        event = Seal(source, minus(total)) if with_seal else drain
        self.deliver(self.pass_number, [event])

    @rule(events=st.lists(EVENTS, max_size=2), bad=BAD_EVENTS)
    def illegal(self, events: list[Event], bad: Event) -> None:
        self.refused(Message("run", self.pass_number, (*events, bad)))

    @rule(event=EVENTS, run_id=st.sampled_from(["", "nur", "run2"]))
    def of_another_run(self, event: Event, run_id: str) -> None:
        self.refused(Message(run_id, self.pass_number, (event,)))

    @rule(event=EVENTS, difference=st.sampled_from([-1, 1, 2]))
    def of_another_pass(self, event: Event, difference: int) -> None:
        self.refused(Message("run", self.pass_number + difference, (event,)))

    @rule(more=st.integers(1, 3))
    def new_pass(self, more: int) -> None:
        self.pass_number += more
        self.ledger.begin_pass(self.pass_number)
        for model in self.models:
            if model.complete is None:
                model.history = []

    @rule(less=st.integers(0, 2))
    def old_pass(self, less: int) -> None:
        was = state(self.ledger)
        with pytest.raises(LedgerError):
            self.ledger.begin_pass(self.pass_number - less)
        assert state(self.ledger) == was

    def deliver(self, pass_number: int, events: list[Event]) -> None:
        self.sent.append((pass_number, events))
        message = Message("run", pass_number, tuple(events))
        if pass_number != self.pass_number:
            self.refused(message)
            return
        applied = self.ledger.apply(message)
        expected = [self.models[event.source].take(event) for event in events]
        assert list(applied.outcomes) == [outcome for outcome, _ in expected]
        assert list(applied.completions) == [
            self.models[event.source].complete
            for event, (_, completes) in zip(events, expected, strict=True)
            if completes
        ]
        self.completed += [completion.source for completion in applied.completions]

    def refused(self, message: Message) -> None:
        was = state(self.ledger)
        with pytest.raises(LedgerError):
            self.ledger.apply(message)
        assert state(self.ledger) == was

    @invariant()
    def each_source_is_pending_or_completed_once(self) -> None:
        assert sorted([*self.completed, *self.ledger.pending()]) == list(range(SOURCE_COUNT))

    @invariant()
    def what_is_pending_can_be_explained(self) -> None:
        for source in range(SOURCE_COUNT):
            assert self.ledger.explain(source)


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
