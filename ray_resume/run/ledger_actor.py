"""The ledger's host: the process that owns a run's ledger and its writer file.

A thin shell: every rule about counters is in `ledger`, every rule about bytes in `lmdb_file`. Here
is only when to commit. Completions are committed in groups, soon after they happened (how soon,
the binding says), and the lease is checked inside each commit.

:class:`LedgerHost` is plain Python, tested without Ray; :func:`start` puts it into an actor on the
driver's node.
"""

from __future__ import annotations

import gc
import itertools
import threading
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_resume.checkpoint.backend import LedgerBinding
from ray_resume.checkpoint.local.process import this_process
from ray_resume.core.ledger import Ledger, LedgerError
from ray_resume.core.messages import Applied, Completion, DeadLetter, Drain, Message
from ray_resume.core.records import (
    Record,
    State,
    dropped_record,
    pipeline_of,
)
from ray_resume.core.sources import SourceTable
from ray_resume.core.tokens import MODULUS
from ray_resume.errors import CheckpointError, ResumeError
from ray_resume.failpoints import Fault, failpoint
from ray_resume.run.agreement import Agreement
from ray_resume.run.driver_watch import end_with_driver

__all__ = [
    "Failed",
    "LedgerHost",
    "Progress",
    "RunSpec",
    "Unread",
    "start",
    "tune_garbage_collector",
]

# So many objects are made before the garbage collector looks at them.
_FEW_COLLECTIONS = 200_000

# So many failed sources are committed in one transaction.
_FAILED_AT_ONCE = 10_000


@dataclass(frozen=True)
class RunSpec:
    """What the host must know of a run; ``sources[i]`` is source number i of its table."""

    run_id: str
    binding: LedgerBinding
    sources: SourceTable
    # What is on record of a source, by its number.
    records: Mapping[int, Record]
    max_failed_runs: int
    first_sequence: int
    signature: str
    header: Mapping[str, Any]
    commit_at_the_end: bool = False
    # Whether the types of earlier output bind nobody, since none of it is to stay.
    schema_afresh: bool = False
    # Groups of sources that may only be committed in one transaction.
    together: Sequence[Sequence[int]] = ()
    # The ids of sources whose output a source takes the place of, in the transaction in which it,
    # and its group if it is in one, is committed.
    replaced: Mapping[int, Sequence[str]] = field(default_factory=dict)
    # Stands for the code that the pipeline runs.
    code: str = ""
    # The identity of the driver's process.
    driver: str = field(default_factory=this_process)
    # What a test has armed: it arms the process that this arrives at.
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Unread:
    """The pending sources whose reader raised: how many, and the first of them.

    ``error`` says why it could not be read, and ``cause`` is the pickled exception, if it was kept.
    """

    count: int
    source_id: str
    error: str
    cause: bytes


@dataclass(frozen=True)
class Progress:
    """How far a run is. ``pending`` are the numbers of the sources that are not complete.

    ``failed`` are those of them of which rows have failed in any pass. ``waiting`` are those of
    them that only others, who share a file with them, keep from it. ``example`` says why the first
    of them is not complete: there may be too many to say it of each. ``unread`` says of how many
    the reader raised. ``dropped`` counts the sources whose output is nobody's any more.
    """

    completed: int
    committed: int
    rows_read: int
    rows_written: int
    files: int
    pending: Sequence[int] = ()
    waiting: frozenset[int] = frozenset()
    failed: frozenset[int] = frozenset()
    dead_rows: int = 0
    example: str | None = None
    unread: Unread | None = None
    dropped: int = 0


@dataclass(frozen=True)
class Failed:
    """Why a source failed, and whether this run brings it nearer to quarantine.

    A failure counts towards quarantine only if the source itself is known to have caused it. One
    bad source would otherwise quarantine all that went through the same tasks.
    """

    error: str
    counts_toward_quarantine: bool


class LedgerHost:
    """Applies messages, commits what they complete. Safe to call from several threads.

    Raises:
        CheckpointError: on construction, if the lease is gone or the file cannot be made.
    """

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._ledger = Ledger(spec.run_id, len(spec.sources))
        self._sources = spec.sources
        self._pipeline = pipeline_of(spec.signature, spec.code)
        self._lease, self._writer = spec.binding.open(spec.header)
        self._sequence = spec.first_sequence
        self._completed = self._committed = 0
        self._rows_read = self._rows_written = self._files = self._dead_rows = 0
        self._dropped_count = 0
        # How many sources each source of `mark_lost` has added to those that are quarantined.
        self._lost: dict[int, int] = {}
        self._letters = spec.binding.dead_letters()
        self._agreement = Agreement(
            spec.binding.schemas(),
            spec.run_id,
            self.name_of,
            afresh=spec.schema_afresh,
            stale=spec.first_sequence > 0,
        )
        self._fault: ResumeError | None = None
        self._queue: list[Completion] = []
        self._unpublished: list[Completion] = []
        self._publishing: list[Completion] = []
        self._open = True
        # _state guards everything above; _commits is held for a whole commit, so that commits
        # happen one at a time while messages go on being applied.
        self._state = threading.Condition()
        self._commits = threading.Lock()
        threading.Thread(target=self._commit_regularly, daemon=True).start()

    def begin_pass(self, pass_number: int) -> None:
        """Start a pass with empty counters."""
        with self._state:
            self._ledger.begin_pass(pass_number, self._spec.together)

    def apply(self, message: Message) -> Applied:
        """Apply a message. What it completes is committed soon after, not before it returns.

        Raises:
            ResumeError: the message is illegal, the host is closed, or a commit failed.
        """
        failpoint("ledger.before_apply")
        with self._state:
            self._check_open()
            applied = self._ledger.apply(message)
            if applied.completions:
                if self._spec.commit_at_the_end:
                    self._unpublished.extend(applied.completions)
                else:
                    self._queue.extend(applied.completions)
                self._completed += len(applied.completions)
                self._rows_read += sum([done.rows_read for done in applied.completions])
                self._rows_written += sum([done.rows_written for done in applied.completions])
                self._dead_rows += sum([done.dead_rows for done in applied.completions])
                # The completions of one file are all in one answer.
                self._files += len({f for done in applied.completions for f in done.files})
                self._state.notify_all()
            failpoint("ledger.applied")
            return applied

    def write_dead_letters(
        self, run_id: str, pass_number: int, letters: Sequence[DeadLetter]
    ) -> Applied:
        """Write dead letters durably, then drain what their rows carried; otherwise as `apply`."""
        with self._state:
            self._check_open()
            for letter in letters:
                if not 0 <= letter.source < len(self._sources):
                    raise LedgerError(f"source number {letter.source} is not in this run's table")
            ids = [self._id_of_pending(letter.source) for letter in letters]
        try:
            drains = tuple(
                Drain(
                    letter.source,
                    -letter.total % MODULUS,
                    dead_rows=len(letter.errors),
                    # What is complete has its letters, and whoever sends them again needs none.
                    dead_letters=()
                    if source_id is None
                    else (self._letters.write(run_id, source_id, letter),),
                )
                for letter, source_id in zip(letters, ids, strict=True)
            )
        except CheckpointError as error:
            # The run ends by this error, and not by what Ray makes of it on its way through a UDF.
            self._commit()
            with self._state:
                self._fault = self._fault or error
            raise
        return self.apply(Message(run_id, pass_number, drains))

    def agree(self, asked: Sequence[tuple[bytes, int]], given: bool) -> tuple[bytes, str | None]:
        """Agree on a schema for the output; see `Agreement.widen`."""
        with self._state:
            self._check_open()
        return self._agreement.widen(asked, given)

    def name_of(self, source: int) -> str:
        """Return the id of a source, for messages; what is committed is called by its number."""
        with self._state:
            return self._id_of_pending(source) or f"source number {source}"

    def _id_of_pending(self, source: int) -> str | None:
        return self._sources.id(source) if self._ledger.is_pending(source) else None

    def flush(self) -> Progress:
        """Commit everything that is complete, and return how far the run is.

        Raises:
            CheckpointError: the lease is lost or the store cannot be written.
        """
        self._commit()
        with self._state:
            if self._fault is not None:
                raise self._fault
            pending = self._ledger.pending()
            return Progress(
                self._completed,
                self._committed,
                self._rows_read,
                self._rows_written,
                self._files,
                array("i", pending),
                frozenset(self._ledger.waiting()),
                frozenset(self._ledger.failed()),
                self._dead_rows,
                self._why(pending[0]) if pending else None,
                self._unread(),
                self._dropped_count,
            )

    def take_unpublished(self) -> tuple[list[bytes], int]:
        """Return the write results, and the number of rows, of what is complete and waits.

        Raises:
            CheckpointError: the lease is lost, so that nothing may be published.
        """
        self._lease.check()
        with self._state:
            self._check_open()
            self._publishing, self._unpublished = self._unpublished, []
            results = [result for done in self._publishing for result in done.results]
            return results, sum(done.rows_written for done in self._publishing)

    def confirm_published(self) -> None:
        """Commit in one transaction what :meth:`take_unpublished` returned: it is visible now."""
        with self._state:
            self._queue, self._publishing = self._queue + self._publishing, []
        self.flush()

    def mark_lost(self, source: int, crash: str | None) -> str | None:
        """Commit that ``source`` got lost although it was executed alone; this counts as a failure.

        Args:
            crash: what its worker died of, if it did.

        Returns:
            How it got lost; None if it is complete, by a message that came late.
        """
        with self._state:
            self._check_open()
            if not self._ledger.is_pending(source):
                return None
            why = self._ledger.explain(source)
        if crash is not None:
            why = f"a worker died whenever it was executed ({crash})"
        how = Failed(f"rows unaccounted for: {why}", counts_toward_quarantine=True)
        self._lost[source] = self.fail({source: how})
        return how.error

    def mark_rest_failed(self, *, unread_counts: bool = True) -> tuple[int, int]:
        """Commit what is pending as failed, but for what only waits for others.

        Args:
            unread_counts: a source that could not be read comes nearer to quarantine. If not, the
                reader itself may be at fault.

        Returns:
            How many have failed, and how many of these are quarantined now, both with those of
            :meth:`mark_lost`.
        """
        with self._state:
            self._check_open()
            waiting = frozenset(self._ledger.waiting())
            failed = [source for source in self._ledger.pending() if source not in waiting]
        quarantined = sum(self._lost.get(source, 0) for source in failed)
        rest = [source for source in failed if source not in self._lost]
        for start in range(0, len(rest), _FAILED_AT_ONCE):
            part = rest[start : start + _FAILED_AT_ONCE]
            with self._state:
                why = {source: self._how(source, unread_counts) for source in part}
            quarantined += self.fail(why)
        return len(failed), quarantined

    def fail(self, failed: Mapping[int, Failed]) -> int:
        """Commit sources, by number, as failed in this run, or as quarantined by now.

        Returns:
            How many are quarantined now.
        """
        with self._state:
            self._check_open()
            # What is complete stays so, whatever a straggler made of it.
            pending = {s: how for s, how in failed.items() if self._ledger.is_pending(s)}
        with self._commits:
            now = time.time()
            records = [self._failed(source, how, now) for source, how in pending.items()]
            self._lease.check()
            failpoint("ledger.failing")
            self._writer.commit(records)
            return sum(record.state is State.QUARANTINED for record in records)

    def drop(self, source_ids: Sequence[str]) -> None:
        """Commit sources of which nobody is to list output any more: their files are left-overs.

        Raises:
            CheckpointError: the lease is lost or the store cannot be written.
        """
        with self._commits:
            records = [self._dropped(source_id) for source_id in source_ids]
            self._lease.check()
            failpoint("ledger.before_commit")
            self._writer.commit(records)
            failpoint("ledger.committed")
            with self._state:
                self._dropped_count += len(records)

    def _dropped_with(self, group: Sequence[Completion]) -> list[Record]:
        replaced = self._spec.replaced
        return [self._dropped(id_) for done in group for id_ in replaced.get(done.source, ())]

    def _dropped(self, source_id: str) -> Record:
        self._sequence += 1
        return dropped_record(source_id, self._sequence, self._spec.run_id)

    def _why(self, source: int) -> str:
        return self._ledger.failure(source) or self._ledger.explain(source)

    def _unread(self) -> Unread | None:
        errors = self._ledger.read_errors()
        sources = errors.sources()
        if not sources:
            return None
        # The first whose exception is known.
        first = next((source for source in sources if errors.cause(source)), None)
        first = next(iter(sources)) if first is None else first
        return Unread(len(sources), self._sources.id(first), self._why(first), errors.cause(first))

    def _how(self, source: int, unread_counts: bool) -> Failed:
        failure = self._ledger.failure(source)
        if failure is None:
            why = self._ledger.explain(source)
            return Failed(f"rows unaccounted for: {why}", counts_toward_quarantine=False)
        errors = self._ledger.read_errors()
        spared = errors.is_transient(source) or not unread_counts
        return Failed(
            failure, counts_toward_quarantine=source not in errors.sources() or not spared
        )

    def close(self) -> Progress:
        """Commit what is complete, then refuse every later message and close the file."""
        try:
            return self.flush()
        finally:
            with self._commits, self._state:
                if self._open:
                    self._open = False
                    self._state.notify_all()
                    failpoint("ledger.closing")
                    self._writer.close()
                    self._lease.release()
                    failpoint("ledger.closed")

    def _check_open(self) -> None:
        if self._fault is not None:
            raise self._fault
        if not self._open:
            raise ResumeError(f"Run {self._spec.run_id} has ended; this message came too late.")

    def _commit_regularly(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._queue or not self._open)
                if not self._open:
                    return
            self._wait_for_company()
            self._commit()
            with self._state:
                if self._fault is not None:
                    return

    def _wait_for_company(self) -> None:
        """Let what completes within the interval share a commit; a run that ends waits no more."""
        with self._state:
            self._state.wait_for(
                lambda: not self._open, timeout=self._spec.binding.commit_interval_s
            )

    def _commit(self) -> None:
        with self._commits:
            with self._state:
                if self._fault is not None or not self._open:
                    return
                group, self._queue = self._queue, []
            if not group:
                return
            try:
                now = time.time()
                # Objects of a kilobyte each: the writer encodes them as they are made.
                records = (self._completed_record(completion, now) for completion in group)
                dropped = self._dropped_with(group) if self._spec.replaced else []
                self._lease.check()
                failpoint("ledger.before_commit")
                self._writer.commit(itertools.chain(records, dropped))
                failpoint("ledger.committed")
            except Exception as error:
                # Whatever it is, nothing may be called complete after a group got lost.
                fault = ResumeError(
                    f"Run {self._spec.run_id} cannot commit: {error!r}. What it had committed is "
                    "safe; run again to go on."
                )
                if isinstance(error, ResumeError):
                    fault = error
                with self._state:
                    self._fault = fault
                return
            with self._state:
                self._committed += len(group)
                self._dropped_count += len(dropped)

    def _failed(self, source: int, how: Failed, now: float) -> Record:
        earlier = self._spec.records.get(source)
        failed_runs = (earlier.failed_runs if earlier else 0) + how.counts_toward_quarantine
        is_over = failed_runs >= self._spec.max_failed_runs
        self._sequence += 1
        return Record(
            self._sources.id(source),
            State.QUARANTINED if is_over else State.FAILED,
            self._sequence,
            self._spec.run_id,
            # Until a completed record replaces them, its earlier output stays.
            files=earlier.files if earlier else (),
            error=how.error,
            failed_runs=failed_runs,
            fingerprint=self._sources.fingerprints[source],
            pipeline=self._pipeline,
            failed_at=now,
            dead_letters=earlier.dead_letters if earlier else (),
        )

    def _completed_record(self, done: Completion, now: float) -> Record:
        self._sequence += 1
        return Record(
            self._sources.id(done.source),
            State.COMPLETED,
            self._sequence,
            self._spec.run_id,
            rows=done.rows_written,
            files=done.files,
            completed_at=now,
            fingerprint=self._sources.fingerprints[done.source],
            pipeline=self._pipeline,
            dead_rows=done.dead_rows,
            dead_letters=done.dead_letters,
        )


def start(spec: RunSpec) -> Any:
    """Start the host as an actor on this node, owned by this driver; return its handle.

    Raises:
        CheckpointError: what its construction raised.
        ResumeError: its process died.
    """
    import ray
    from ray.exceptions import RayActorError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote_class: Any = ray.remote(_LedgerActor)
    handle = remote_class.options(
        num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy=here
    ).remote()
    try:
        ray.get(handle.open.remote(spec))
    except BaseException as error:
        ray.kill(handle)
        cause = getattr(error, "cause", None)
        if isinstance(cause, ResumeError):
            raise cause from None
        if isinstance(error, RayActorError):
            raise ResumeError(
                f"The ledger of run {spec.run_id} died as it started ({error}). Nothing was done, "
                "and what earlier runs had committed is safe. Run the same script again."
            ) from None
        raise
    return handle


def tune_garbage_collector() -> None:
    """Have this process, which is the ledger's alone, look for garbage less often.

    What comes and goes in it, some tuples for each source, has no cycles. By default a third of its
    time would go into looking for some.
    """
    gc.freeze()
    gc.set_threshold(_FEW_COLLECTIONS)


class _LedgerActor:
    """What Ray runs: a host that is opened by a call, so that its errors keep their type."""

    def __init__(self) -> None:
        self._host: LedgerHost | None = None

    def open(self, spec: RunSpec) -> None:
        self._host = LedgerHost(spec)
        tune_garbage_collector()
        end_with_driver(spec.driver, self._host.close)

    def begin_pass(self, pass_number: int) -> None:
        self._opened().begin_pass(pass_number)

    def apply(self, message: Message) -> None:
        # The outcomes are the ledger's own business; workers need to know only that it is done.
        self._opened().apply(message)

    def agree(self, asked: Sequence[tuple[bytes, int]], given: bool) -> tuple[bytes, str | None]:
        return self._opened().agree(asked, given)

    def name_of(self, source: int) -> str:
        return self._opened().name_of(source)

    def flush(self) -> Progress:
        return self._opened().flush()

    def take_unpublished(self) -> tuple[list[bytes], int]:
        return self._opened().take_unpublished()

    def confirm_published(self) -> None:
        self._opened().confirm_published()

    def drop(self, source_ids: Sequence[str]) -> None:
        self._opened().drop(source_ids)

    def write_dead_letters(
        self, run_id: str, pass_number: int, letters: Sequence[DeadLetter]
    ) -> None:
        self._opened().write_dead_letters(run_id, pass_number, letters)

    def mark_lost(self, source: int, crash: str | None) -> str | None:
        return self._opened().mark_lost(source, crash)

    def mark_rest_failed(self, unread_counts: bool) -> tuple[int, int]:
        return self._opened().mark_rest_failed(unread_counts=unread_counts)

    def close(self) -> Progress:
        return self._opened().close()

    def _opened(self) -> LedgerHost:
        if self._host is None:
            raise ResumeError("The ledger was not opened.")
        return self._host
