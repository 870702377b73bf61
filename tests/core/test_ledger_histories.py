"""The ledger: small histories in all orders, and any history against a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from ledger_events import (
    ALREADY_COMPLETE,
    APPLIED,
    POISONED,
    REPEATED,
    Event,
    minus,
    new_ledger,
    parts,
    send,
    state,
)

from ray_resume.core.ledger import Ledger, LedgerError
from ray_resume.core.messages import Completion, Drain, Message, Outcome, Seal
from ray_resume.core.tokens import MODULUS, shares

pytestmark = pytest.mark.long


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
                end=seals[0].end,
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
