"""The ledger: decides which sources are complete. Pure: no Ray, no LMDB, no clock, no threads.

Theory of operation
-------------------
Each row carries a token, a 64-bit number. Each source has a counter, a sum modulo 2**64 that
starts at 0. Three parties change it:

* the **read** adds the sum ``T`` of the tokens that it put on the source's rows, once, after the
  last row: the *seal*;
* a **stage** whose call leaves no row of a source subtracts what those rows carried. Where rows
  are left, they carry the whole sum on as fresh random shares, and nothing is sent;
* the **sink** subtracts the tokens of the rows that it has made durable.

The last two are *drains*. A source is **complete if and only if it is sealed and its counter
is 0**. Messages may come in any order, late, twice or never.

==============  ====================  =======================  ==========================
state           seal(v)               drain(d), new value      drain(d), value seen before
==============  ====================  =======================  ==========================
open            sealed, counter += v  counter += d             REPEATED
sealed(v)       REPEATED              counter += d             REPEATED
sealed(w != v)  poisoned              --                       --
poisoned        POISONED              POISONED                 POISONED
complete        ALREADY_COMPLETE      ALREADY_COMPLETE         ALREADY_COMPLETE
==============  ====================  =======================  ==========================

After each change: sealed and counter == 0 makes the source complete, and its sums are forgotten.

Why a zero is never too early
-----------------------------
Follow the tokens of a source as flows on a tree: the root is the read, an inner node is a call of
a stage, a leaf is a drain. Each call passes on exactly what came in (`lineage.Call`), so if every
output of every call is consumed once, the drains add up to ``-T``, and the counter is 0. For the
converse, take any set of outputs that were consumed, in part from one execution of a call and in
part from another. Within one execution of a call with several outputs, every proper subset of the
shares is uniformly random, and independent of the other executions' shares, since each execution
draws its own. So the sum of what was consumed is 0 by accident with probability 2**-64, unless
the subset is whole. That is: **a zero counter says that each call's output was consumed whole and
from one execution of it** (where rows keep their own tokens: each row once, from any execution).
A call with a single output passes on the sum itself, so two executions of it can report equal
values; the first one counts, with its files, and it is whole.

The sums are what makes order irrelevant: addition commutes, so a counter is a function of the
*set* of messages that arrived. A lost message leaves a random remainder, so its source stays
pending. A repeat has the same (source, value) as the first and is dropped. Two different seals
mean that the source gave different rows twice: neither can be trusted, so it is poisoned, and
stays pending until a new pass begins. Run and pass are in every message: what an earlier
execution still sends is refused whole.

Source of the algorithm: the acker of Apache Storm, which xors tuple ids; sums with fresh shares
take the place of its per-edge ids, because nothing here acknowledges single rows.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ray_resume.errors import ResumeError
from ray_resume.lineage import MODULUS

__all__ = [
    "Applied",
    "Completion",
    "Drain",
    "Ledger",
    "LedgerError",
    "Message",
    "Outcome",
    "Seal",
]


class LedgerError(ResumeError):
    """An event that cannot be: nothing of its message was applied."""


@dataclass(frozen=True, slots=True)
class Seal:
    """A read has emitted the last row of ``source``.

    ``total`` is the sum of its tokens modulo 2**64, ``rows`` how many there were.
    """

    source: int
    total: int
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Drain:
    """``delta`` modulo 2**64 of ``source`` has left the pipeline.

    From a sink, after ``rows`` rows are durable in ``files``, or are what ``results`` will publish;
    from a stage, without any of them.
    """

    source: int
    delta: int
    rows: int = 0
    files: tuple[str, ...] = ()
    results: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Message:
    """What one task reports at once. Applied whole or, if anything in it is illegal, not at all."""

    run_id: str
    pass_number: int
    events: tuple[Seal | Drain, ...]


class Outcome(enum.Enum):
    """What became of one event."""

    APPLIED = "applied"
    REPEATED = "repeated"
    POISONED = "poisoned"
    ALREADY_COMPLETE = "already complete"


@dataclass(frozen=True, slots=True)
class Completion:
    """A source that has become complete: what there is to commit."""

    source: int
    rows_read: int
    rows_written: int
    files: tuple[str, ...]
    results: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Applied:
    """The answer to a message: an outcome for each event, and the sources that it completed."""

    outcomes: tuple[Outcome, ...]
    completions: tuple[Completion, ...]


@dataclass(slots=True)
class _Counter:
    value: int = 0
    sealed: int | None = None
    poisoned: bool = False
    rows_read: int = 0
    rows_written: int = 0
    drained: set[int] = field(default_factory=set)
    files: list[str] = field(default_factory=list)
    results: list[bytes] = field(default_factory=list)


class Ledger:
    """The counters of one run.

    Args:
        run_id: messages of any other run are refused.
        source_count: sources are numbered ``0 .. source_count - 1``.

    Guarantees: an illegal message raises :class:`LedgerError`, and nothing changes. A source
    completes at most once in the life of a ledger. Memory is held for pending sources that were
    heard of, and one byte for each other source.
    """

    def __init__(self, run_id: str, source_count: int) -> None:
        self._run_id = run_id
        self._complete = bytearray(source_count)
        self._pass_number = 0
        self._counters: dict[int, _Counter] = {}

    def begin_pass(self, pass_number: int) -> None:
        """Start the next armed execution with empty counters; what is complete stays complete."""
        if pass_number <= self._pass_number:
            raise LedgerError(f"pass {pass_number} begins after pass {self._pass_number}")
        self._pass_number = pass_number
        self._counters = {}

    def apply(self, message: Message) -> Applied:
        """Apply every event of ``message``, or raise :class:`LedgerError` and apply none."""
        self._check(message)
        completions: list[Completion] = []
        outcomes = tuple(self._apply_event(event, completions) for event in message.events)
        return Applied(outcomes, tuple(completions))

    def pending(self) -> list[int]:
        """Return the numbers of the sources that are not complete, ascending."""
        return [source for source, complete in enumerate(self._complete) if not complete]

    def explain(self, source: int) -> str:
        """Say in one clause why ``source`` is not complete in the current pass."""
        counter = self._counters.get(source)
        if counter is None:
            return "its read did not finish, and nothing of it arrived"
        if counter.poisoned:
            return "it gave different rows when it was read again"
        if counter.sealed is None:
            return "its read did not finish"
        if not counter.drained:
            return f"{counter.rows_read} rows were read, and none arrived"
        return (
            f"{counter.rows_read} rows were read and {counter.rows_written} arrived, but they do "
            "not add up: a task was executed twice, or what it made got lost"
        )

    def _check(self, message: Message) -> None:
        if message.run_id != self._run_id:
            raise LedgerError(
                f"a message of run {message.run_id} came to the ledger of run {self._run_id}"
            )
        if message.pass_number != self._pass_number or self._pass_number < 1:
            raise LedgerError(
                f"a message of pass {message.pass_number} came in pass {self._pass_number}"
            )
        for event in message.events:
            if not 0 <= event.source < len(self._complete):
                raise LedgerError(f"source number {event.source} is not in this run's table")
            value = event.total if isinstance(event, Seal) else event.delta
            if not 0 <= value < MODULUS:
                raise LedgerError(f"{value} is not a 64-bit sum")

    def _apply_event(self, event: Seal | Drain, completions: list[Completion]) -> Outcome:
        source = event.source
        if self._complete[source]:
            return Outcome.ALREADY_COMPLETE
        counter = self._counters.get(source)
        if counter is None:
            counter = self._counters[source] = _Counter()
        outcome = _seal(counter, event) if isinstance(event, Seal) else _drain(counter, event)
        if counter.sealed is not None and counter.value == 0 and not counter.poisoned:
            self._complete[source] = 1
            del self._counters[source]
            completions.append(
                Completion(
                    source,
                    counter.rows_read,
                    counter.rows_written,
                    tuple(counter.files),
                    tuple(counter.results),
                )
            )
        return outcome


def _seal(counter: _Counter, seal: Seal) -> Outcome:
    if counter.poisoned:
        return Outcome.POISONED
    if counter.sealed is None:
        counter.sealed = seal.total
        counter.rows_read = seal.rows
        counter.value = (counter.value + seal.total) % MODULUS
        return Outcome.APPLIED
    if counter.sealed == seal.total:
        return Outcome.REPEATED
    counter.poisoned = True
    return Outcome.POISONED


def _drain(counter: _Counter, drain: Drain) -> Outcome:
    if counter.poisoned:
        return Outcome.POISONED
    if drain.delta in counter.drained:
        return Outcome.REPEATED
    counter.drained.add(drain.delta)
    counter.value = (counter.value + drain.delta) % MODULUS
    counter.rows_written += drain.rows
    counter.files.extend(drain.files)
    counter.results.extend(drain.results)
    return Outcome.APPLIED
