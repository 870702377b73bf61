"""The ledger: its table case by case, illegal messages, passes, and files that sources share."""

from __future__ import annotations

import dataclasses
import pickle
import re

import pytest
from ledger_events import (
    ALREADY_COMPLETE,
    APPLIED,
    POISONED,
    REPEATED,
    AnyEvent,
    Event,
    minus,
    new_ledger,
    parts,
    send,
    state,
)

from ray_resume.core.ledger import LedgerError
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
