"""`Committer`: decides when the ledger's process commits, and stops it if a commit fails.

It owns the run's lease, its writer file, and the queues of completed sources that are to be
committed, or published and then committed. It knows no rule about counters, and none about bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from ray_resume.checkpoint.local.lmdb_file import WriterContents
from ray_resume.core.messages import Completion
from ray_resume.core.publications import Publication, PublicationQueue, Taken
from ray_resume.core.records import Record, State, decode, encode, records_of
from ray_resume.core.run_sources import RunSources
from ray_resume.errors import CheckpointError, ResumeError
from ray_resume.failpoints import failpoint
from ray_resume.run.commit_thread import CommitThread
from ray_resume.run.latency_log import LatencyLog
from ray_resume.run.progress import Latencies
from ray_resume.run.record_factory import Failed, RecordFactory
from ray_resume.run.run_spec import RunSpec

__all__ = ["Committer"]


class Committer:
    """Commits in groups, soon after sources are complete. Safe to call from several threads.

    Each commit checks the lease first. After a commit has failed, the committer refuses everything:
    a group got lost, so that nothing may be called committed any more.

    Attributes:
        contents: what the file has, once it is closed. None where hosts share the checkpoint.

    Raises:
        CheckpointError: on construction, if the lease is gone or the file cannot be made.
    """

    contents: WriterContents | None = None

    def __init__(self, spec: RunSpec, sources: RunSources) -> None:
        self._run_id = spec.run_id
        self._table = spec.table
        self._lease, self._writer = spec.binding.open(spec.header)
        self._records = RecordFactory(spec, sources)
        self._queue: list[Completion] = []
        self._unpublished = PublicationQueue()
        self._publications = spec.binding.publications()
        # The records of the open publication, as they are in it.
        self._publishing: Sequence[bytes] = ()
        self._committed = self._dropped = self._rows_committed = 0
        self._latencies = LatencyLog()
        self._taken_at = 0.0
        self._fault: ResumeError | None = None
        self._open, self._held = True, False
        # A commit holds `_commits` from its first record to its last, so that commits happen one at
        # a time. `_state` guards the queue, the counts and the fault, for moments only, so that
        # completions are queued while a commit is on its way. `_commits` is taken before `_state`.
        self._commits = threading.Lock()
        self._state = threading.Condition()
        self._thread = CommitThread(
            self._state,
            spec.binding.commit_interval_s,
            commit=self.commit,
            has_work=self._has_work,
            is_over=self._is_over,
        )

    def hold(self) -> None:
        """Commit nothing until :meth:`confirm`. Call it before anything is queued."""
        with self._state:
            self._held = True

    def confirm(self) -> None:
        """Commit from now on: the driver has held the lease until this process had joined it."""
        with self._state:
            self._held = False
            self._state.notify_all()

    def check_open(self) -> None:
        """Raise the error that stopped the commits; or an error, if the run has ended."""
        with self._state:
            if self._fault is not None:
                raise self._fault
            if not self._open:
                raise ResumeError(f"Run {self._run_id} has ended; this message came too late.")

    def counts(self) -> tuple[int, int, int]:
        """Return how many sources are committed, their rows as read, and how many are dropped."""
        with self._state:
            return self._committed, self._rows_committed, self._dropped

    def take_latencies(self) -> Latencies:
        """Return how long the commits and publications took that were not taken yet."""
        with self._state:
            return self._latencies.take()

    def add(self, completions: Sequence[Completion]) -> None:
        """Queue completions. They are committed soon; or once published, if the sink publishes."""
        with self._state:
            if self._table is not None:
                completions = self._unpublished.add(completions)
            self._queue.extend(completions)
            self._state.notify_all()

    def commit(self) -> None:
        """Commit the queue. If that fails, it raises nothing; :meth:`check_open` does from now on.

        Once the committer is closed or has failed, or while it is held, it does nothing.
        """
        with self._commits:
            with self._state:
                if self._fault is not None or self._held or not self._open:
                    return
                group, self._queue = self._queue, []
            if group:
                self._commit_completed(self._completed(group), group)

    def flush(self) -> None:
        """Commit the queue.

        Raises:
            CheckpointError: the lease is lost or the store cannot be written.
        """
        self.commit()
        with self._state:
            if self._fault is not None:
                raise self._fault

    def stop(self, fault: ResumeError) -> None:
        """Commit nothing from now on, and raise ``fault`` in its place, or an earlier one."""
        with self._state:
            self._fault = self._fault or fault
            self._state.notify_all()

    def fail(self, failed: Mapping[int, Failed]) -> int:
        """Commit pending sources, by number, as failed in this run, or as quarantined by now.

        Returns:
            How many are quarantined now.

        Raises:
            CheckpointError: the lease is lost or the store cannot be written.
        """
        with self._commits:
            now = time.time()
            records = [self._records.failed(source, how, now) for source, how in failed.items()]
            self._check_lease()
            failpoint("ledger.failing")
            self._writer.commit(records)
            return sum(record.state is State.QUARANTINED for record in records)

    def drop(self, source_ids: Sequence[str]) -> None:
        """Commit that sources have no output any more: their files become leftovers.

        Raises:
            CheckpointError: the lease is lost or the store cannot be written.
        """
        with self._commits:
            records = [self._records.dropped(source_id) for source_id in source_ids]
            self._check_lease()
            failpoint("ledger.before_commit")
            self._writer.commit(records)
            failpoint("ledger.committed")
            with self._state:
                self._dropped += len(records)

    def take_unpublished(self, position: str | None) -> Taken | None:
        """Record durably what is to be published, and return it; None if nothing is.

        Args:
            position: where the table stands now; see `core.publications.Publication`.

        Returns:
            A publication. If one was taken and not confirmed, it is that one again.

        Raises:
            CheckpointError: the lease is lost or the storage fails. Nothing may be published.
        """
        assert self._table is not None
        with self._commits:
            self._lease.check()
            with self._state:
                self.check_open()
                taken = None if self._held else self._unpublished.take()
            if taken is None or taken.again:
                return taken
            try:
                self._publishing = list(encode(self._completed(taken.completions)))
                failpoint("ledger.recording")
                self._publications.write(
                    Publication(self._run_id, taken.number, self._table, position, self._publishing)
                )
            except BaseException:
                with self._state:
                    self._unpublished.put_back()
                raise
            failpoint("ledger.recorded")
            # A run that has not declared this one dead by now will see the publication.
            self._lease.check()
            self._taken_at = time.monotonic()
            return taken

    def confirm_published(self, number: int) -> None:
        """Commit in one transaction what :meth:`take_unpublished` returned: it is visible now.

        Raises:
            CheckpointError: the lease is lost or the store cannot be written. The next run finds
                the publication on record.
        """
        with self._commits:
            with self._state:
                self.check_open()
                taken = self._unpublished.confirm(number)
            blocks, self._publishing = self._publishing, ()
            records = itertools.chain.from_iterable(records_of(decode(block)) for block in blocks)
            self._commit_completed(records, taken.completions)
            self.check_open()
            with self._state:
                self._latencies.publications_s.append(time.monotonic() - self._taken_at)
            # One that is committed does no harm, and the next run forgets it.
            with contextlib.suppress(CheckpointError):
                self._publications.forget_one(self._run_id, number)

    def _completed(self, group: Iterable[Completion]) -> Iterable[Record]:
        now = time.time()
        # Objects of a kilobyte each: the writer encodes them as they are made.
        return (self._records.completed(completion, now) for completion in group)

    def _commit_completed(self, records: Iterable[Record], group: Sequence[Completion]) -> None:
        began = time.monotonic()
        try:
            self._check_lease()
            failpoint("ledger.before_commit")
            self._writer.commit(records)
            failpoint("ledger.committed")
        except Exception as error:
            # Any error at all: nothing may be called complete after a group got lost.
            fault = ResumeError(
                f"Run {self._run_id} cannot commit: {error!r}. Its earlier commits are safe; "
                "run again to go on."
            )
            self.stop(error if isinstance(error, ResumeError) else fault)
            return
        with self._state:
            self._latencies.commits_s.append(time.monotonic() - began)
            # Users are told nothing of ends of files.
            self._committed += sum([done.end is None for done in group])
            self._rows_committed += sum([done.rows_read for done in group])

    def _check_lease(self) -> None:
        """Make sure that the lease is held, before each commit."""
        with self._state:
            if self._held:
                raise ResumeError(f"Run {self._run_id} may not commit: its lease is unconfirmed.")
        self._lease.check()

    def close(self) -> None:
        """Close the file and release the lease. Sources that are still queued stay uncommitted."""
        with self._commits, self._state:
            if self._open:
                self._open = False
                self._state.notify_all()
                failpoint("ledger.closing")
                with contextlib.suppress(CheckpointError):
                    self.contents = self._writer.contents()
                self._writer.close()
                self._lease.release()
                failpoint("ledger.closed")

    def _has_work(self) -> bool:
        return bool(self._queue) and not self._held

    def _is_over(self) -> bool:
        return self._fault is not None or not self._open
