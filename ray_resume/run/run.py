"""A run: from its lease to its clean-up, in the driver.

The order keeps rows safe: the driver takes the lease, *then* reads what dead runs committed, then
executes passes. At the end it closes the ledger, *then* notes which runs are dead, *then* reads the
list of files, and only then removes anything. Each step is undone or ended even if a later one
fails.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError

from ray_resume.checkpoint.backend import new_run_id
from ray_resume.checkpoint.compaction import compact
from ray_resume.checkpoint.contents import Contents
from ray_resume.checkpoint.local.lmdb_file import WriterContents
from ray_resume.core.planning import what_to_do
from ray_resume.core.publications import Mark
from ray_resume.core.records import dropped_record, encode
from ray_resume.core.resume_plan import ResumePlan
from ray_resume.errors import CheckpointError, ResumeError
from ray_resume.failpoints import failpoint
from ray_resume.run.announcing import announce_start
from ray_resume.run.journal import Journal
from ray_resume.run.ledger_actor import LedgerStart
from ray_resume.run.monitor import shown
from ray_resume.run.outcome import Outcome, facts_of, summary_of, unread_error, warn_ended_early
from ray_resume.run.pass_loop import Pass, PassLoop, close_after
from ray_resume.run.preflight import refuse_other_output, warn_other_code, warn_rows_again
from ray_resume.run.progress import Progress
from ray_resume.run.publisher import Publisher
from ray_resume.run.reading import record_read_schema
from ray_resume.run.run_plan import RunPlan
from ray_resume.run.settling import settled_contents
from ray_resume.run.signals import raise_on_sigterm
from ray_resume.run.starting import is_afresh, spec_of
from ray_resume.run.summary import RunSummary

__all__ = ["LEASE_WAIT_S", "MOST_WRITER_FILES", "Run"]

logger = logging.getLogger("ray_resume")

LEASE_WAIT_S = 25.0
"""How long a run waits for another on the same sources, once a dead one would be known as dead."""

MOST_WRITER_FILES = 64
"""Every run reads the files of all earlier ones. It merges them if there are more than this."""

_ACTOR_EXIT_S = 10.0

_DROPPED_AT_ONCE = 1 << 13


class Run:
    """One run of ``plan``; use :meth:`execute` once."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._run_id = new_run_id()
        self._started_at = time.monotonic()
        self._checkpoint_id = plan.storage.identity()
        self._own_contents: WriterContents | None = None
        total = len(plan.listing.sources)
        owner = plan.owner(self._run_id)
        self._journal = Journal(plan.storage.history(), owner, sources_total=total)

    def execute(
        self, run_pass: Callable[[Pass], None], *, lease_wait_s: float | None = None
    ) -> RunSummary:
        """Take the lease, run passes until nothing more can be done, clean up.

        Args:
            run_pass: executes the pipeline once.

        Raises:
            CheckpointError: the checkpoint or the output folder cannot be used.
            Exception: whatever ``run_pass`` raised; what was complete is committed.
        """
        self._keep_few_files()
        with self._leased(lease_wait_s), self._journal.kept():
            failpoint("run.leased")
            # The driver lists before it reads the checkpoint, so that the checkpoint knows each run
            # whose files are listed: other runs may start at any moment.
            names = self._plan.output.list_files()
            contents = settled_contents(
                self._plan.storage,
                self._run_id,
                self._lease,
                self._plan.output.uri,
                self._plan.table,
            )
            refuse_other_output(self._plan.storage, self._plan.output.uri, contents)
            listing = self._plan.listing.with_known_ranges(
                contents.snapshot, ignore_changes=self._plan.policies.on_source_change == "ignore"
            )
            resume_plan, warnings = what_to_do(
                listing,
                self._plan.policies,
                contents.snapshot,
                contents.headers,
                signature=self._plan.signature,
                alike=self._plan.alike,
                code=self._plan.code.digest(),
                checkpoint=self._plan.storage.uri,
            )
            self._journal.note(sources_skipped=resume_plan.done, sources_total=resume_plan.total)
            for warning in warnings:
                logger.warning("%s", warning)
            if self._plan.policies.on_code_change == "warn":
                warn_other_code(resume_plan.recoded, self._plan.code, contents.headers)
            self._plan.output.verify(
                self._checkpoint_id, self._plan.storage, names, contents, resume_plan.skipped
            )
            self._plan.storage.record_listed(self._plan.listing.listed.digests, self._run_id)
            announce_start(self._run_id, self._plan, resume_plan, contents)
            if not resume_plan.pending:
                if resume_plan.removed:
                    contents = self._drop(resume_plan, contents)
                self._remove_leftovers(contents, names)
                nothing = Progress(0, 0, 0, 0, 0, dropped=len(resume_plan.removed))
                return self._summary(resume_plan, Outcome(nothing))
            warn_rows_again(self._plan.output, resume_plan.pending, contents.snapshot)
            read_schema = self._record_read_schema(resume_plan, contents)
            self._plan.storage.bind(self._plan.output.uri, self._run_id)
            failpoint("run.bound")
            self._plan.output.prepare()
            try:
                # Ray sets signal handlers of its own when it starts, so ours come after it.
                start = self._start(resume_plan, contents)
                with raise_on_sigterm():
                    outcome = self._passes(start, resume_plan, run_pass, read_schema)
            finally:
                with raise_on_sigterm():
                    self._clean_up()
            error = unread_error(self._plan, resume_plan, outcome.progress)
            if error is not None:
                warn_ended_early(self._run_id, resume_plan, outcome.progress, error)
                raise error
            return self._summary(resume_plan, outcome)

    def _keep_few_files(self) -> None:
        """Merge the files of earlier runs, if there are many and no run is at work."""
        storage = self._plan.storage
        if max(len(storage.writers()), storage.history().loose() // 2) > MOST_WRITER_FILES:
            # If it fails, a later run merges them. Reading reports a damaged file soon enough.
            with contextlib.suppress(CheckpointError):
                compact(storage, lease_wait_s=0)

    @contextlib.contextmanager
    def _leased(self, wait_s: float | None) -> Iterator[None]:
        if wait_s is None:
            wait_s = self._plan.storage.max_death_detection_s + LEASE_WAIT_S
        owner, claim = self._plan.owner(self._run_id), self._plan.claim()
        self._lease = self._plan.storage.acquire(owner, claim, wait_s=wait_s)
        try:
            yield
        finally:
            self._lease.end(wait_s=_ACTOR_EXIT_S)

    def _drop(self, resume_plan: ResumePlan, contents: Contents) -> Contents:
        """Commit that ``removed`` sources have no output, without starting a ledger."""
        first = contents.snapshot.highest_sequence() + 1
        records = (
            dropped_record(record.source_id, sequence, self._run_id)
            for sequence, record in enumerate(resume_plan.removed, first)
        )
        storage = self._plan.storage
        storage.write_whole(self._run_id, self._plan.header(), encode(records))
        self._lease.check()
        return storage.committed_by_dead_runs(self._run_id)

    def _record_read_schema(self, resume_plan: ResumePlan, contents: Contents) -> pa.Schema | None:
        if self._plan.read_schema is None:
            return None
        return record_read_schema(
            self._plan.storage,
            self._plan.read_schema,
            self._run_id,
            completed=resume_plan.skipped,
            having=self._plan.having,
            afresh=is_afresh(resume_plan, contents),
        )

    def _start(self, resume_plan: ResumePlan, contents: Contents) -> LedgerStart:
        spec = spec_of(self._plan, self._run_id, self._lease, resume_plan, contents)
        return LedgerStart(spec, self._lease)

    def _passes(
        self,
        start: LedgerStart,
        resume_plan: ResumePlan,
        run_pass: Callable[[Pass], None],
        read_schema: pa.Schema | None,
    ) -> Outcome:
        """Run passes, then commit the pending sources as failed."""
        handle = start.handle

        def run_once_started(this: Pass) -> None:
            with start.awaited():
                run_pass(this)

        try:
            if resume_plan.removed:
                start.wait()
            for first in range(0, len(resume_plan.removed), _DROPPED_AT_ONCE):
                some = resume_plan.removed[first : first + _DROPPED_AT_ONCE]
                ray.get(handle.drop.remote([record.source_id for record in some]))
            loop = PassLoop(
                handle,
                resume_plan,
                run_id=self._run_id,
                file_prefix=f"{self._checkpoint_id}-{self._run_id}",
                publisher=self._publisher(handle),
                read_schema=read_schema,
            )
            with shown(handle, self._run_id, self._plan, resume_plan) as watch:
                progress = loop.execute(run_once_started)
                watch.look(progress.stages)
            failed = quarantined = 0
            if progress.pending:
                proven = self._plan.max_errored_blocks != 0 or self._has_read_some(
                    handle, resume_plan
                )
                failed, quarantined = ray.get(handle.mark_rest_failed.remote(proven))
            failpoint("run.before_close")
            progress = ray.get(handle.close.remote())
            failpoint("run.closed")
            # All is committed, whatever becomes of the process: the file can be read as well.
            with contextlib.suppress(RayError):
                self._own_contents = ray.get(handle.contents.remote())
            facts = facts_of(self._plan, progress, failed - quarantined, quarantined)
            self._journal.note(**facts)
            return Outcome(
                progress, failed - quarantined, quarantined, loop.lost_alone, loop.not_tried
            )
        except BaseException as error:
            if start.error() is not None:
                raise
            last = close_after(error, handle, self._run_id)
            if last is not None:
                # The run may yet raise: the history has how far it is.
                self._journal.note(**facts_of(self._plan, last))
                warn_ended_early(self._run_id, resume_plan, last, error)
            raise
        finally:
            ray.kill(handle)

    def _publisher(self, handle: Any) -> Publisher | None:
        if self._plan.table is None:
            return None
        mark = Mark(self._checkpoint_id, self._run_id, 0)
        interval_s = self._plan.publish_interval_s
        return Publisher(handle, self._lease, self._plan.table, mark, interval_s)

    def _has_read_some(self, handle: Any, resume_plan: ResumePlan) -> bool:
        """Return whether the reader has read any source in this run or an earlier one."""
        return len(resume_plan.skipped) > 0 or bool(ray.get(handle.flush.remote()).completed)

    def _clean_up(self) -> None:
        # A ledger's process that lives on, although it was closed or killed, may yet commit files.
        # They are left to the clean-up of a later run.
        try:
            if not self._lease.is_last_holder(wait_s=_ACTOR_EXIT_S):
                logger.warning("The ledger of run %s lives on; leftovers stay.", self._run_id)
                return
            self._lease.check()
            contents = self._plan.storage.committed_by_dead_runs(self._run_id, self._own_contents)
            self._own_contents = None
            self._remove_leftovers(contents)
        except (ResumeError, OSError) as error:
            logger.warning("Leftovers in %s were not removed: %s", self._plan.output.uri, error)

    def _remove_leftovers(self, contents: Contents, names: Collection[str] | None = None) -> None:
        """Remove the files of this run and of dead runs that no record lists."""
        failpoint("cleanup.before")
        runs = contents.dead_runs | {self._run_id}
        self._plan.output.remove_leftovers(self._checkpoint_id, runs, contents, names)
        listed = set(contents.snapshot.dead_letters())
        self._plan.storage.dead_letters().remove_leftovers(runs, listed)

    def _summary(self, resume_plan: ResumePlan, outcome: Outcome) -> RunSummary:
        duration_s = time.monotonic() - self._started_at
        summary = summary_of(self._run_id, self._plan, resume_plan, outcome, duration_s)
        self._journal.note_summary(summary)
        return summary
