"""The ledger: decides which sources are complete. Pure: no Ray, no LMDB, no clock, no threads.

Theory of operation
-------------------
Each row carries a token, a 64-bit number. Each source has a counter, a sum modulo 2**64 that
starts at 0. Three parties change it:

* the **read** adds the sum ``T`` of the tokens that it put on the source's rows, once, after the
  last row: the *seal*. A reader that raises sends no seal but a *read failure*, which explains and
  changes no counter;
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

After each change: a source that is sealed with counter 0 is *balanced*. It is complete at once, and
its sums are forgotten.

Parts
-----
A drain of the sink carries *parts*: where its rows stand in output files. The ledger keeps them
with the sum, and the completion lists them. Sources that share a file are independent: each one
completes by itself, whatever becomes of its neighbors.

The parts of a complete source hold each of its rows once. The ledger counts or drops a drain
together with its parts, so the parts of a source are those whose sums make up its counter. A zero
counter says (below) that their rows are the whole output of one execution of each call. If a write
task is executed again, there are two cases. It may drain the same sum for the source. Then the
ledger drops this repeat with its parts, and these rows are dead in the second file. Or it divides
the rows among its flushes differently, and drains other sums. Then both executions count, the
counter is not 0, and the source stays pending for this pass.

Why a zero is never too early
-----------------------------
Follow the tokens of a source as flows on a tree: the root is the read, an inner node is a call of
a stage, a leaf is a drain. Each call passes on exactly what came in (`CallAccount`), so if every
output of every call is consumed once, the drains add up to ``-T``, and the counter is 0. For the
converse, take any set of outputs that were consumed, in part from one execution of a call and in
part from another. Within one execution of a call with several outputs, every proper subset of the
shares is uniformly random, and independent of the other executions' shares, since each execution
draws its own. So the sum of what was consumed is 0 by accident with probability 2**-64, unless
the subset is whole. In short, **a zero counter says that each call's output was consumed whole and
from one execution of it** (where rows keep their own tokens: each row once, from any execution).
A call with a single output passes on the sum itself, so two executions of it can report equal
values; the first one counts, with its parts, and it is whole.

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

from collections.abc import Collection
from dataclasses import dataclass

from ray_resume.core.failure_log import FailureLog, ReadErrors
from ray_resume.core.messages import (
    Applied,
    Completion,
    Drain,
    Event,
    Failure,
    Message,
    Outcome,
    ReadFailure,
    Seal,
)
from ray_resume.core.tokens import MODULUS
from ray_resume.errors import ResumeError

__all__ = ["Ledger", "LedgerError"]


class LedgerError(ResumeError):
    """An illegal message. The ledger applied nothing of it."""


@dataclass(slots=True, eq=False)
class _Counter:
    """The seal of a source and the sum of its drains, as they arrived in this pass."""

    sealed: Seal | None = None
    drained: Drain | None = None
    # The delta of each drain, as soon as there are two: a set of one takes 200 bytes.
    deltas: set[int] | None = None
    poisoned: bool = False

    @property
    def is_balanced(self) -> bool:
        if self.sealed is None or self.poisoned:
            return False
        drained = 0 if self.drained is None else self.drained.delta
        return (self.sealed.total + drained) % MODULUS == 0

    @property
    def rows(self) -> int:
        if self.sealed is not None:
            return self.sealed.rows
        return 0 if self.drained is None else self.drained.rows

    def seal(self, seal: Seal) -> Outcome:
        if self.poisoned:
            return Outcome.POISONED
        if self.sealed is None:
            self.sealed = seal
            return Outcome.APPLIED
        if self.sealed.total == seal.total:
            return Outcome.REPEATED
        self.poisoned = True
        return Outcome.POISONED

    def drain(self, drain: Drain) -> Outcome:
        if self.poisoned:
            return Outcome.POISONED
        if self.drained is None:
            self.drained = drain
            return Outcome.APPLIED
        if drain.delta in (self.deltas or (self.drained.delta,)):
            return Outcome.REPEATED
        if self.deltas is None:
            self.deltas = {self.drained.delta}
        self.deltas.add(drain.delta)
        self.drained = _sum(self.drained, drain)
        return Outcome.APPLIED

    def completion(self, source: int) -> Completion:
        _, _, rows_read, began_at, end = self.sealed or Seal(source, 0)
        if self.drained is None:
            return Completion(source, rows_read, 0, began_at=began_at, end=end)
        return Completion(source, rows_read, *self.drained[2:], began_at, end)


class Ledger:
    """The counters of one run.

    Args:
        run_id: messages of any other run are refused.
        source_count: sources are numbered ``0 .. source_count - 1``; those that come to be later
            have the next numbers.

    Guarantees: an illegal message raises :class:`LedgerError`, and nothing changes. A source
    completes at most once in the life of a ledger. Memory: one byte for each source, and about 200
    more while it is pending and a message about it has arrived.
    """

    def __init__(self, run_id: str, source_count: int) -> None:
        self._run_id = run_id
        self._complete = bytearray(source_count)
        self._pass_number = 0
        self._counters: dict[int, _Counter] = {}
        self._failed = FailureLog()
        self._read_errors = ReadErrors()

    @property
    def pass_number(self) -> int:
        """Return the number of the current pass; 0 before the first."""
        return self._pass_number

    def begin_pass(self, pass_number: int) -> None:
        """Start the next armed execution with empty counters; what is complete stays complete."""
        if pass_number <= self._pass_number:
            raise LedgerError(f"pass {pass_number} begins after pass {self._pass_number}")
        self._pass_number = pass_number
        self._counters = {}

    def add_source(self, run_id: str, pass_number: int) -> int:
        """Add a source that came to be while a file is read, and return its number.

        Raises:
            LedgerError: an execution that is over has found it.
        """
        self._check_pass(run_id, pass_number)
        self._complete.append(0)
        return len(self._complete) - 1

    def apply(self, message: Message) -> Applied:
        """Apply every event of ``message``, or raise :class:`LedgerError` and apply none."""
        self._check(message)
        # From here on nothing raises, so no message is applied by half.
        completions: list[Completion] = []
        outcomes = [self._apply_event(event, completions) for event in message.events]
        return Applied(tuple(outcomes), tuple(completions))

    def pending(self) -> list[int]:
        """Return the numbers of the sources that are not complete, ascending."""
        return [source for source, complete in enumerate(self._complete) if not complete]

    def is_pending(self, source: int) -> bool:
        """Return whether ``source`` is not complete."""
        return not self._complete[source]

    def rows_in_flight(self) -> int:
        """Return how many rows of pending sources are known to have been read, in this pass.

        The seal of a source says how many it has. Before that, only drained rows are known. This
        takes time for each source of which anything has arrived.
        """
        return sum([counter.rows for counter in self._counters.values()])

    def failed(self) -> Collection[int]:
        """Return the pending sources of which rows have failed, in any pass of the run."""
        return self._failed.sources()

    def failure(self, source: int) -> str | None:
        """Return why a pending source has failed; None if no row of it has."""
        return self._failed.why(source)

    def read_errors(self) -> ReadErrors:
        """Return which pending sources could not be read, in any pass of the run."""
        return self._read_errors

    def explain(self, source: int) -> str:
        """Explain in one clause why ``source`` is not complete in the current pass."""
        counter = self._counters.get(source)
        if counter is None:
            return "its read did not finish, and nothing of it arrived"
        if counter.poisoned:
            return "executed again, it gave different rows"
        if counter.sealed is None:
            return "its read did not finish"
        if counter.drained is None:
            return f"{counter.sealed.rows} rows were read, and none arrived"
        return (
            f"{counter.sealed.rows} rows were read and {counter.drained.rows} arrived, but they do "
            "not add up: a task was executed twice, or what it made got lost"
        )

    def _check_pass(self, run_id: str, pass_number: int) -> None:
        if run_id != self._run_id:
            raise LedgerError(f"a message of run {run_id} came to the ledger of run {self._run_id}")
        if pass_number != self._pass_number or self._pass_number < 1:
            raise LedgerError(f"a message of pass {pass_number} came in pass {self._pass_number}")

    def _check(self, message: Message) -> None:
        self._check_pass(message.run_id, message.pass_number)
        count = len(self._complete)
        for event in message.events:
            # Any event begins with its source and its sum.
            if not (0 <= event[0] < count and 0 <= event[1] < MODULUS):
                raise _out_of_range(event[0], event[1], count)

    def _apply_event(self, event: Event, completions: list[Completion]) -> Outcome:
        source = event.source
        if self._complete[source]:
            return Outcome.ALREADY_COMPLETE
        if isinstance(event, (Failure, ReadFailure)):
            return self._log_failure(event)
        counter = self._counters.get(source)
        if counter is None:
            counter = self._counters[source] = _Counter()
        outcome = counter.seal(event) if isinstance(event, Seal) else counter.drain(event)
        if counter.is_balanced:
            self._complete[source] = 1
            if self._failed.forget(source):
                self._read_errors.forget(source)
            completions.append(self._counters.pop(source).completion(source))
        return outcome

    def _log_failure(self, failure: Failure | ReadFailure) -> Outcome:
        read = isinstance(failure, ReadFailure)
        source, total, rows, error = failure[:4]
        new = self._failed.add(source, total, rows, error, read=read)
        if isinstance(failure, ReadFailure):
            self._read_errors.add(source, failure.cause, transient=failure.transient)
        return Outcome.APPLIED if new else Outcome.REPEATED


def _sum(one: Drain, other: Drain) -> Drain:
    return Drain(
        one.source,
        (one.delta + other.delta) % MODULUS,
        one.rows + other.rows,
        one.parts + other.parts,
        one.results + other.results,
        one.dead_rows + other.dead_rows,
        one.dead_letters + other.dead_letters,
    )


def _out_of_range(source: int, value: int, count: int) -> LedgerError:
    return LedgerError(
        f"an event of source {source} with the sum {value}: this run has {count} sources, and sums "
        "have 64 bits"
    )
