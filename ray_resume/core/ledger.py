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

After each change: sealed and counter == 0 makes the source *balanced*. A balanced source is
complete at once, and its sums are forgotten, unless it belongs to a *group*.

Groups
------
Sources whose rows share an output file form a group (`Pack`), and so do those that share one that
this run is to replace (``together``): the file counts for all of them or for none. So the sources
of a group become complete in one step, when all of them are balanced, and are to be committed in
one transaction. A pack is new as a whole, or a repeat as a whole; one of which some sums are new
and some are not holds rows twice, so what of it is not complete is poisoned.

Why a zero is never too early
-----------------------------
Follow the tokens of a source as flows on a tree: the root is the read, an inner node is a call of
a stage, a leaf is a drain. Each call passes on exactly what came in (`CallAccount`), so if every
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

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ray_resume.core.failure_log import FailureLog, ReadErrors
from ray_resume.core.groups import Groups
from ray_resume.core.messages import (
    Applied,
    Completion,
    Drain,
    Event,
    Failure,
    Message,
    Outcome,
    Pack,
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
    """What arrived of a source in this pass: its seal, and the sum of its drains."""

    sealed: Seal | None = None
    drained: Drain | None = None
    # Of each drain the delta, as soon as there are two: a set of one takes 200 bytes.
    deltas: set[int] | None = None
    poisoned: bool = False

    @property
    def is_balanced(self) -> bool:
        if self.sealed is None or self.poisoned:
            return False
        drained = 0 if self.drained is None else self.drained.delta
        return (self.sealed.total + drained) % MODULUS == 0

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
        outcome = self.outcome_of(drain)
        if outcome is not Outcome.APPLIED:
            return outcome
        if self.drained is None:
            self.drained = drain
        else:
            if self.deltas is None:
                self.deltas = {self.drained.delta}
            self.deltas.add(drain.delta)
            self.drained = _sum(self.drained, drain)
        return outcome

    def outcome_of(self, drain: Drain) -> Outcome:
        """Return what `drain` would return, and change nothing."""
        if self.poisoned:
            return Outcome.POISONED
        if self.drained is None:
            return Outcome.APPLIED
        seen = (self.drained.delta,) if self.deltas is None else self.deltas
        return Outcome.REPEATED if drain.delta in seen else Outcome.APPLIED

    def completion(self, source: int) -> Completion:
        rows_read = 0 if self.sealed is None else self.sealed.rows
        if self.drained is None:
            return Completion(source, rows_read, 0, ())
        return Completion(source, rows_read, *self.drained[2:])


class Ledger:
    """The counters of one run.

    Args:
        run_id: messages of any other run are refused.
        source_count: sources are numbered ``0 .. source_count - 1``.

    Guarantees: an illegal message raises :class:`LedgerError`, and nothing changes. A source
    completes at most once in the life of a ledger. Memory: one byte for each source, and about 200
    more while it is pending and a message about it has arrived.
    """

    def __init__(self, run_id: str, source_count: int) -> None:
        self._run_id = run_id
        self._complete = bytearray(source_count)
        self._pass_number = 0
        self._counters: dict[int, _Counter] = {}
        self._groups = Groups()
        self._failed = FailureLog()
        self._read_errors = ReadErrors()

    def begin_pass(self, pass_number: int, together: Iterable[Collection[int]] = ()) -> None:
        """Start the next armed execution with empty counters; what is complete stays complete.

        Args:
            together: groups of sources that may only become complete in one step.
        """
        if pass_number <= self._pass_number:
            raise LedgerError(f"pass {pass_number} begins after pass {self._pass_number}")
        self._pass_number = pass_number
        self._counters = {}
        self._groups = Groups()
        for sources in together:
            self._groups.unite(source for source in sources if not self._complete[source])

    def apply(self, message: Message) -> Applied:
        """Apply every event of ``message``, or raise :class:`LedgerError` and apply none.

        Guarantees: the completions of one group are all in one answer.
        """
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

    def waiting(self) -> list[int]:
        """Return the pending sources that only others of their group keep from completion."""
        return self._groups.waiting()

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
        if self._groups.is_waiting(source):
            return "all its rows arrived, but it shares a file with a source that is not complete"
        if counter.poisoned:
            return "executed again, it gave different rows, or files shared with other sources"
        if counter.sealed is None:
            return "its read did not finish"
        if counter.drained is None:
            return f"{counter.sealed.rows} rows were read, and none arrived"
        return (
            f"{counter.sealed.rows} rows were read and {counter.drained.rows} arrived, but they do "
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
        count = len(self._complete)
        for event in message.events:
            if isinstance(event, Pack):
                sources = [drain.source for drain in event.drains]
                if not sources or len(set(sources)) < len(sources):
                    raise LedgerError(f"a pack of the sources {sources}")
                for drain in event.drains:
                    if not (0 <= drain.source < count and 0 <= drain.delta < MODULUS):
                        raise _out_of_range(drain.source, drain.delta, count)
            # Any event but a pack begins with its source and its sum.
            elif not (0 <= event[0] < count and 0 <= event[1] < MODULUS):
                raise _out_of_range(event[0], event[1], count)

    def _apply_event(self, event: Event, completions: list[Completion]) -> Outcome:
        if isinstance(event, Pack):
            return self._apply_pack(event, completions)
        source = event.source
        if self._complete[source]:
            return Outcome.ALREADY_COMPLETE
        if isinstance(event, (Failure, ReadFailure)):
            return self._log_failure(event)
        counter = self._counters.get(source)
        if counter is None:
            counter = self._counters[source] = _Counter()
        outcome = counter.seal(event) if isinstance(event, Seal) else counter.drain(event)
        self._settle(source, completions)
        return outcome

    def _log_failure(self, failure: Failure | ReadFailure) -> Outcome:
        read = isinstance(failure, ReadFailure)
        source, total, rows, error = failure[:4]
        new = self._failed.add(source, total, rows, error, read=read)
        if isinstance(failure, ReadFailure):
            self._read_errors.add(source, failure.cause, transient=failure.transient)
        return Outcome.APPLIED if new else Outcome.REPEATED

    def _apply_pack(self, pack: Pack, completions: list[Completion]) -> Outcome:
        """Apply all drains of a pack, or none of them."""
        outcomes = {self._outcome(drain) for drain in pack.drains}
        if Outcome.APPLIED not in outcomes:
            order = (Outcome.REPEATED, Outcome.POISONED, Outcome.ALREADY_COMPLETE)
            return next(outcome for outcome in order if outcome in outcomes)
        sources = [drain.source for drain in pack.drains if not self._complete[drain.source]]
        counters = [self._counters.setdefault(source, _Counter()) for source in sources]
        whole = outcomes == {Outcome.APPLIED}
        if whole:
            for counter, drain in zip(counters, pack.drains, strict=True):
                counter.drain(drain._replace(files=pack.files))
            self._groups.unite(sources)
        else:
            for counter in counters:
                counter.poisoned = True
        # Some were balanced before, and must not complete the others if they are no longer.
        for source in sources:
            self._groups.settle(source, balanced=False)
        for source in sources:
            self._settle(source, completions)
        return Outcome.APPLIED if whole else Outcome.POISONED

    def _outcome(self, drain: Drain) -> Outcome:
        """Return what would become of ``drain``."""
        if self._complete[drain.source]:
            return Outcome.ALREADY_COMPLETE
        counter = self._counters.get(drain.source)
        return Outcome.APPLIED if counter is None else counter.outcome_of(drain)

    def _settle(self, source: int, completions: list[Completion]) -> None:
        """Complete ``source``, and its group, if that is due now."""
        balanced = self._counters[source].is_balanced
        for member in self._groups.settle(source, balanced=balanced):
            self._complete[member] = 1
            if self._failed.forget(member):
                self._read_errors.forget(member)
            completions.append(self._counters.pop(member).completion(member))


def _sum(one: Drain, other: Drain) -> Drain:
    return Drain(
        one.source,
        (one.delta + other.delta) % MODULUS,
        one.rows + other.rows,
        one.files + other.files,
        one.results + other.results,
        one.dead_rows + other.dead_rows,
        one.dead_letters + other.dead_letters,
    )


def _out_of_range(source: int, value: int, count: int) -> LedgerError:
    return LedgerError(
        f"an event of source {source} with the sum {value}: this run has {count} sources, and sums "
        "have 64 bits"
    )
