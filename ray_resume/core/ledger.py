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
from ray_resume.core.filenames import unpacked
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
from ray_resume.core.shelf import (
    SLOT_BALANCED,
    SLOT_DRAINED,
    SLOT_FILE,
    SLOT_POISONED,
    SLOT_SEALED,
    Counter,
    Shelf,
)
from ray_resume.core.tokens import MODULUS
from ray_resume.errors import ResumeError

__all__ = ["Ledger", "LedgerError"]

# What a source must not have seen for its next seal, or drain, to be the first and no trouble.
_NO_FIRST_SEAL = SLOT_SEALED | SLOT_POISONED | SLOT_BALANCED
_NO_FIRST_DRAIN = SLOT_DRAINED | SLOT_POISONED | SLOT_BALANCED


class LedgerError(ResumeError):
    """An event that cannot be: nothing of its message was applied."""


@dataclass(slots=True)
class _Group:
    members: list[int]
    balanced: int = 0


class Ledger:
    """The counters of one run.

    Args:
        run_id: messages of any other run are refused.
        source_count: sources are numbered ``0 .. source_count - 1``.

    Guarantees: an illegal message raises :class:`LedgerError`, and nothing changes. A source
    completes at most once in the life of a ledger. Memory: 5 bytes for each source, and 72 more
    while it is pending and was heard of (see `shelf`).
    """

    def __init__(self, run_id: str, source_count: int) -> None:
        self._run_id = run_id
        self._complete = bytearray(source_count)
        self._pass_number = 0
        self._shelf = Shelf(source_count)
        # Counters that the message in hand has to do with; on the shelf before and after.
        self._hand: dict[int, Counter] = {}
        self._groups: dict[int, _Group] = {}
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
        self._shelf = Shelf(len(self._complete))
        self._groups = {}
        for sources in together:
            self._unite([source for source in sources if not self._complete[source]])

    def apply(self, message: Message) -> Applied:
        """Apply every event of ``message``, or raise :class:`LedgerError` and apply none.

        Guarantees: the completions of one group are all in one answer.
        """
        self._check(message)
        completions: list[Completion] = []
        outcomes = []
        for event in message.events:
            outcome = None
            if isinstance(event, (Seal, Drain)):
                outcome = self._apply_first(event, completions)
            outcomes.append(outcome or self._apply_event(event, completions))
        if self._hand:
            for source, counter in self._hand.items():
                self._shelf.put(source, counter)
            self._hand.clear()
        return Applied(tuple(outcomes), tuple(completions))

    def pending(self) -> list[int]:
        """Return the numbers of the sources that are not complete, ascending."""
        return [source for source, complete in enumerate(self._complete) if not complete]

    def is_pending(self, source: int) -> bool:
        """Say whether ``source`` is not complete."""
        return not self._complete[source]

    def waiting(self) -> list[int]:
        """Return the pending sources that only others of their group keep from completion."""
        return sorted(source for source in self._groups if self._is_balanced(source))

    def failed(self) -> Collection[int]:
        """Return the pending sources of which rows have failed, in any pass of the run."""
        return self._failed.sources()

    def failure(self, source: int) -> str | None:
        """Say why a pending source has failed, if rows of it have."""
        return self._failed.why(source)

    def read_errors(self) -> ReadErrors:
        """Return which pending sources could not be read, in any pass of the run."""
        return self._read_errors

    def explain(self, source: int) -> str:
        """Say in one clause why ``source`` is not complete in the current pass."""
        counter = self._found(source)
        if counter is None:
            return "its read did not finish, and nothing of it arrived"
        if counter.balanced:
            return "all its rows arrived, but it shares a file with a source that is not complete"
        if counter.poisoned:
            return "executed again, it gave different rows, or files shared with other sources"
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
        count = len(self._complete)
        for event in message.events:
            if isinstance(event, Pack):
                sources = [drain.source for drain in event.drains]
                if not sources or len(set(sources)) < len(sources):
                    raise LedgerError(f"a pack of the sources {sources}")
            for part in _parts(event):
                # All begin with these two, whatever they call the sum.
                source, value = part[0], part[1]
                if not 0 <= source < count:
                    raise LedgerError(f"source number {source} is not in this run's table")
                if not 0 <= value < MODULUS:
                    raise LedgerError(f"{value} is not a 64-bit sum")

    def _apply_first(self, event: Seal | Drain, completions: list[Completion]) -> Outcome | None:
        """Do what :meth:`_apply_event` does, in less time, for what nearly all events are.

        Namely for the first seal or drain of a source that is in no group, as far as a slot
        of the shelf has room for it. For any other, nothing is done, and None returned.
        """
        source = event.source
        if self._complete[source]:
            return Outcome.ALREADY_COMPLETE
        if source in self._hand or source in self._groups:
            return None
        slot = self._shelf.slot(source)
        if slot is None:
            return None
        value, sealed, drained, read, written, flags, file = slot
        files: tuple[str, ...] = ()
        if isinstance(event, Seal):
            if flags & _NO_FIRST_SEAL:
                return None
            sealed, read, flags = event.total, event.rows, flags | SLOT_SEALED
            value = (value + sealed) % MODULUS
        else:
            files = event.files
            if flags & _NO_FIRST_DRAIN or len(files) > 1 or event.results or event.dead_letters:
                return None
            if event.dead_rows:
                return None
            drained, written, flags = event.delta, event.rows, flags | SLOT_DRAINED
            value = (value + drained) % MODULUS
        if value == 0 and flags & SLOT_SEALED:
            if flags & SLOT_FILE:
                files = (unpacked(file),)
            self._shelf.drop(source)
            self._complete[source] = 1
            self._forget_failures(source)
            completions.append(Completion(source, read, written, files))
        elif not self._shelf.fill(
            source, value, sealed, drained, read, written, flags, file, files
        ):
            return None
        return Outcome.APPLIED

    def _apply_event(self, event: Event, completions: list[Completion]) -> Outcome:
        if isinstance(event, Pack):
            outcome = self._apply_pack(event)
        elif self._complete[event.source]:
            return Outcome.ALREADY_COMPLETE
        elif isinstance(event, (Failure, ReadFailure)):
            return self._note(event)
        else:
            counter = self._counter(event.source)
            outcome = _seal(counter, event) if isinstance(event, Seal) else _drain(counter, event)
        for part in _parts(event):
            self._settle(part.source, completions)
        return outcome

    def _note(self, failure: Failure | ReadFailure) -> Outcome:
        read = isinstance(failure, ReadFailure)
        source, total, rows, error = failure[:4]
        new = self._failed.add(source, total, rows, error, read=read)
        if isinstance(failure, ReadFailure):
            self._read_errors.add(source, failure.cause, transient=failure.transient)
        return Outcome.APPLIED if new else Outcome.REPEATED

    def _forget_failures(self, source: int) -> None:
        self._failed.forget(source)
        self._read_errors.forget(source)

    def _apply_pack(self, pack: Pack) -> Outcome:
        """Apply all drains of a pack, or none of them."""
        outcomes = {self._outcome(drain) for drain in pack.drains}
        if outcomes == {Outcome.APPLIED}:
            for drain in pack.drains:
                counter = self._counter(drain.source)
                _drain(counter, drain)
                counter.files.extend(pack.files)
            self._unite([drain.source for drain in pack.drains])
            return Outcome.APPLIED
        if Outcome.APPLIED not in outcomes:
            return next(
                outcome
                for outcome in (Outcome.REPEATED, Outcome.POISONED, Outcome.ALREADY_COMPLETE)
                if outcome in outcomes
            )
        for drain in pack.drains:
            if not self._complete[drain.source]:
                self._counter(drain.source).poisoned = True
        return Outcome.POISONED

    def _outcome(self, drain: Drain) -> Outcome:
        """Say what would become of ``drain``."""
        if self._complete[drain.source]:
            return Outcome.ALREADY_COMPLETE
        counter = self._counter(drain.source)
        if counter.poisoned:
            return Outcome.POISONED
        return Outcome.REPEATED if drain.delta in counter.drained else Outcome.APPLIED

    def _counter(self, source: int) -> Counter:
        """Take the counter of ``source`` in hand, a new one if need be."""
        counter = self._hand.get(source)
        if counter is None:
            counter = self._hand[source] = self._shelf.get(source) or Counter()
        return counter

    def _found(self, source: int) -> Counter | None:
        return self._hand.get(source) or self._shelf.get(source)

    def _is_balanced(self, source: int) -> bool:
        counter = self._found(source)
        return counter is not None and counter.balanced

    def _unite(self, sources: Collection[int]) -> None:
        """Make one group of these sources and of all that are in a group with one of them."""
        united: _Group | None = None
        for source in sources:
            group = self._groups.get(source)
            if group is None:
                group = _Group([source], int(self._is_balanced(source)))
                self._groups[source] = group
            if united is None:
                united = group
            elif group is not united:
                small, united = sorted((group, united), key=lambda g: len(g.members))
                united.members.extend(small.members)
                united.balanced += small.balanced
                for member in small.members:
                    self._groups[member] = united

    def _settle(self, source: int, completions: list[Completion]) -> None:
        """See whether ``source`` is balanced now, and complete what that completes."""
        counter = self._hand.get(source)
        if counter is None:  # it was completed by another part of the same event
            return
        balanced = counter.sealed is not None and counter.value == 0 and not counter.poisoned
        group = self._groups.get(source)
        if group is not None:
            group.balanced += balanced - counter.balanced
        counter.balanced = balanced
        if not balanced or (group is not None and group.balanced < len(group.members)):
            return
        for member in [source] if group is None else group.members:
            self._complete[member] = 1
            self._groups.pop(member, None)
            self._forget_failures(member)
            whole = self._counter(member)
            del self._hand[member]
            self._shelf.drop(member)
            completions.append(
                Completion(
                    member,
                    whole.rows_read,
                    whole.rows_written,
                    tuple(whole.files),
                    tuple(whole.results),
                    whole.dead_rows,
                    tuple(whole.dead_letters),
                )
            )


def _parts(event: Event) -> tuple[Seal | Drain | Failure | ReadFailure, ...]:
    return event.drains if isinstance(event, Pack) else (event,)


def _seal(counter: Counter, seal: Seal) -> Outcome:
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


def _drain(counter: Counter, drain: Drain) -> Outcome:
    if counter.poisoned:
        return Outcome.POISONED
    if drain.delta in counter.drained:
        return Outcome.REPEATED
    counter.drained.add(drain.delta)
    counter.value = (counter.value + drain.delta) % MODULUS
    counter.rows_written += drain.rows
    counter.files.extend(drain.files)
    counter.results.extend(drain.results)
    counter.dead_rows += drain.dead_rows
    counter.dead_letters.extend(drain.dead_letters)
    return Outcome.APPLIED
