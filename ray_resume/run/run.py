"""A run: from its lease to its clean-up, in the driver.

The order is what keeps rows safe: the lease, *then* what dead runs committed, then passes; at the
end the ledger is closed, *then* it is noted who is dead, *then* the list of files is read, and only
then anything is removed. Each step is undone or ended even when a later one fails.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)

from ray_resume.checkpoint.backend import CheckpointBackend, new_run_id
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.compaction import compact
from ray_resume.checkpoint.contents import Contents
from ray_resume.core.code import Code
from ray_resume.core.digests import source_digest
from ray_resume.core.filenames import NAME_DIGEST_BYTES
from ray_resume.core.identity import HEADER_KEY
from ray_resume.core.passes import PassPlan, Schedule
from ray_resume.core.planning import Listing, Policies, what_to_do
from ray_resume.core.records import Flag, State, blocks_of, dropped_record, encode, pipeline_of
from ray_resume.core.resume_plan import Todo
from ray_resume.core.snapshot import Union
from ray_resume.core.sources import SourceTable
from ray_resume.errors import CheckpointError, ResumeError
from ray_resume.failpoints import armed, failpoint
from ray_resume.run import ledger_actor
from ray_resume.run.client import LedgerClient
from ray_resume.run.ledger_actor import Progress, RunSpec, Unread
from ray_resume.run.output import Output
from ray_resume.run.reader_exception import exception_of
from ray_resume.run.signals import raise_on_sigterm
from ray_resume.run.summary import RunSummary

__all__ = ["LEASE_WAIT_S", "MOST_WRITER_FILES", "Pass", "Run", "RunPlan"]

logger = logging.getLogger("ray_resume")

LEASE_WAIT_S = 25.0
"""How long a run waits for another on the same sources, beside the time that a dead one takes."""

MOST_WRITER_FILES = 64
"""Every run reads what all earlier ones have written; of more files than this it makes one."""

# What tells that a process or a node died, not that the user's code raised.
_CRASHES = (
    WorkerCrashedError,
    OutOfMemoryError,
    NodeDiedError,
    RayActorError,
    ObjectLostError,
)

_ACTOR_EXIT_S = 10.0

_DROPPED_AT_ONCE = 1 << 13


@dataclass(frozen=True)
class RunPlan:
    """What a run is to do, all of it checked."""

    storage: CheckpointBackend
    listing: Listing
    policies: Policies
    output: Output
    # How results are made visible, for a sink that does so at the end of a pass; else None.
    publish: Callable[[Sequence[bytes], int], None] | None
    signature: str
    # Of so many sources the reader may raise, without limit if negative: as Ray Data's own.
    max_errored_blocks: int = 0
    code: Code = field(default_factory=Code)


@dataclass(frozen=True)
class Pass:
    """One armed execution: the sources to read, how, whom to tell, how to name files.

    ``digests`` is what `FileSink` names the files of each source number with.
    """

    sources: SourceTable
    plan: PassPlan
    client: LedgerClient
    file_prefix: str
    digests: bytes


class Run:
    """One run of ``plan``; use :meth:`execute` once."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._run_id = new_run_id()
        self._started_at = time.monotonic()
        self._checkpoint_id = plan.storage.identity()

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
        with self._leased(lease_wait_s):
            failpoint("run.leased")
            # Before the checkpoint is read, so that it knows each run whose files are seen here:
            # neighbours may start at any moment.
            names = self._plan.output.names()
            contents = self._plan.storage.committed_by_dead_runs(self._run_id)
            self._check_bound(contents)
            todo, warnings = what_to_do(
                self._plan.listing,
                self._plan.policies,
                contents.union,
                contents.headers,
                signature=self._plan.signature,
                code=self._plan.code.digest(),
                checkpoint=self._plan.storage.uri,
            )
            for warning in warnings:
                logger.warning("%s", warning)
            self._warn_other_code(todo, contents)
            self._plan.output.verify(
                self._checkpoint_id, self._plan.storage, names, contents, todo.skipped
            )
            if not todo.pending:
                if todo.removed:
                    contents = self._drop(todo, contents)
                self._remove_leftovers(contents, names)
                return self._summary(todo, replace(_NOTHING, dropped=len(todo.removed)))
            self._bind_sink()
            failpoint("run.bound")
            self._plan.output.prepare()
            try:
                # Started before the signals are ours: Ray sets handlers of its own when it starts.
                handle = ledger_actor.start(self._spec(todo, contents))
                with raise_on_sigterm():
                    progress, failed, quarantined = self._passes(handle, todo, run_pass)
            finally:
                with raise_on_sigterm():
                    self._clean_up()
            self._raise_unread(todo, progress)
            return self._summary(todo, progress, failed - quarantined, quarantined)

    def _keep_few_files(self) -> None:
        """Merge the files of earlier runs, if there are many and no run is at work."""
        if len(self._plan.storage.writers()) > MOST_WRITER_FILES:
            # If it cannot be done now, a later run will; what is damaged is told soon enough.
            with contextlib.suppress(CheckpointError):
                compact(self._plan.storage, lease_wait_s=0)

    @contextlib.contextmanager
    def _leased(self, wait_s: float | None) -> Iterator[None]:
        if wait_s is None:
            wait_s = self._plan.storage.max_death_detection_s + LEASE_WAIT_S
        share = self._plan.listing.shard
        owner = Owner.here(self._run_id, None if share is None else str(share))
        # To remove what is not listed is to claim that, too: all of the share.
        claim = Claim(
            None if self._plan.policies.removes else self._plan.listing.sources.digests.to_bytes(),
            None if share is None else (share.index, share.count),
        )
        self._lease = self._plan.storage.acquire(owner, claim, wait_s=wait_s)
        try:
            yield
        finally:
            self._lease.end(wait_s=_ACTOR_EXIT_S)

    def _check_bound(self, contents: Contents) -> None:
        output, bound = self._plan.output, self._plan.storage.sink()
        committed = _has_output(contents.union)
        if bound is not None and bound != output.uri and (committed or contents.live):
            raise CheckpointError(
                f"The checkpoint {self._plan.storage.uri} belongs to the output {bound}, and "
                f"this run would write to {output.uri}. Write to {bound}, or give this pipeline "
                "a checkpoint of its own. If the output was moved there, run: "
                f"ray-resume rebind {self._plan.storage.uri} {output.uri}"
            )

    def _drop(self, todo: Todo, contents: Contents) -> Contents:
        """Commit that the output of ``removed`` sources is nobody's, without a ledger's process."""
        first = contents.union.highest_sequence() + 1
        records = (
            dropped_record(record.source_id, sequence, self._run_id)
            for sequence, record in enumerate(todo.removed, first)
        )
        stored = sorted(source_digest(record.source_id) + encode(record) for record in records)
        storage = self._plan.storage
        storage.write_whole(self._run_id, self._header(), blocks_of(stored))
        self._lease.check()
        return storage.committed_by_dead_runs(self._run_id)

    def _warn_other_code(self, todo: Todo, contents: Contents) -> None:
        if not todo.recoded or self._plan.policies.on_code_change != "warn":
            return
        now, example = self._plan.code, todo.recoded[0]
        codes = filter(None, map(Code.read, contents.headers.values()))
        then = {pipeline_of("", code.digest()): code for code in codes}.get(
            pipeline_of("")[:4] + example.pipeline[4:]
        )
        if then is not None and then.python != now.python:
            # Each version of Python compiles in its own way, so nothing is known of the code.
            return
        names = [] if then is None else now.differing(then)
        logger.warning(
            "%d of the completed sources went through other code than this run's%s, %s for one. "
            "Their output stays as it is. To process them again, their new output replacing the "
            'old, pass on_code_change="reprocess" to resumable_read; to keep it without this '
            'note, "ignore".',
            len(todo.recoded),
            f" in {', '.join(names)}" if names else "",
            example.source_id,
        )

    def _bind_sink(self) -> None:
        self._plan.storage.bind(self._plan.output.uri, self._run_id)

    def _passes(
        self, handle: Any, todo: Todo, run_pass: Callable[[Pass], None]
    ) -> tuple[Progress, int, int]:
        """Run passes, and put what is left on record.

        Returns:
            How far the run has come, how many sources have failed, and how many of these are
            quarantined now.
        """
        try:
            # The ledger keeps the lease from now on, if the driver has kept it until now.
            self._lease.check()
            for start in range(0, len(todo.removed), _DROPPED_AT_ONCE):
                some = todo.removed[start : start + _DROPPED_AT_ONCE]
                ray.get(handle.drop.remote([record.source_id for record in some]))
            lost = self._run_passes(handle, todo, run_pass)
            failed = quarantined = 0
            if lost is not None:
                proven = self._plan.max_errored_blocks != 0 or self._has_read_some(handle, todo)
                failed, quarantined = ray.get(handle.mark_rest_failed.remote(lost, proven))
            failpoint("run.before_close")
            progress: Progress = ray.get(handle.close.remote())
            failpoint("run.closed")
            return progress, failed, quarantined
        except BaseException as error:
            # What is complete is committed, whatever went wrong; the first error is the user's.
            try:
                self._tell_ended_early(todo, ray.get(handle.close.remote()), error)
            except RayActorError as gone:
                died = ResumeError(
                    f"The ledger of run {self._run_id} died ({gone}). What it had committed is "
                    "safe. Run the same script again to go on from there."
                )
                if isinstance(error, Exception):
                    raise died from error
                # Whoever interrupts a job may well end all of its processes at once.
                logger.warning("%s", died)
            except ResumeError as fault:
                # Why the ledger gave up says more than the tasks that it refused.
                if isinstance(error, Exception):
                    raise fault from error
                logger.warning("%s", fault)
            raise
        finally:
            ray.kill(handle)

    def _has_read_some(self, handle: Any, todo: Todo) -> bool:
        """Say whether the reader has read any source in this run or an earlier one."""
        return len(todo.skipped) > 0 or bool(ray.get(handle.flush.remote()).completed)

    def _raise_unread(self, todo: Todo, progress: Progress) -> None:
        """Raise what a reader raised, if of more sources than may have errors.

        The run has gone on to its end, and what failed is on record.
        """
        unread, allowed = progress.unread, self._plan.max_errored_blocks
        if unread is None or allowed < 0 or unread.count <= allowed:
            return
        error = exception_of(unread.cause, self._about_unread(unread), unread.error)
        self._tell_ended_early(todo, progress, error)
        raise error

    def _about_unread(self, unread: Unread) -> str:
        total, runs = len(self._plan.listing.sources), self._plan.policies.max_failed_runs
        return (
            f"{unread.count} of {total} sources could not be read. The first is "
            f"{unread.source_id}: {unread.error}\nThe run went on with the other sources, and what "
            "is complete is committed. The next run reads these sources again. Sources that failed "
            f"in {runs} runs are quarantined and skipped. Repair or remove "
            "them, or set ray.data.DataContext.get_current().max_errored_blocks to the number of "
            "sources that may fail in a run (-1: any number)."
        )

    def _tell_ended_early(self, todo: Todo, progress: Progress, error: BaseException) -> None:
        logger.warning(
            "Run %s %s: %d of %d sources are completed and safe. Run the same script again to go "
            "on from there.",
            self._run_id,
            "ended with an error" if isinstance(error, Exception) else "was interrupted",
            len(todo.skipped) + progress.committed,
            len(self._plan.listing.sources),
        )

    def _run_passes(
        self, handle: Any, todo: Todo, run_pass: Callable[[Pass], None]
    ) -> dict[int, str | None] | None:
        """Execute passes until nothing more can be done.

        Returns:
            None if nothing is left but what waits for others; else the sources that got lost
            although they were executed alone (see `passes.Schedule`).
        """
        prefix = f"{self._checkpoint_id}-{self._run_id}"
        digests = todo.pending.digests.to_bytes(NAME_DIGEST_BYTES)
        schedule = Schedule(len(todo.pending))
        pass_number = 0
        while (passing := schedule.next()) is not None:
            pass_number += 1
            ray.get(handle.begin_pass.remote(pass_number))
            client = LedgerClient(handle, self._run_id, pass_number, armed())
            sources = todo.pending
            if len(passing.sources) < len(sources):
                sources = sources.take(np.array(passing.sources))
            crash: str | None = None
            failpoint("run.before_pass")
            try:
                run_pass(Pass(sources, passing, client, prefix, digests))
            except Exception as error:
                if not isinstance(error, _CRASHES):
                    # What is complete stays so, also if a row of another source was bad.
                    with contextlib.suppress(Exception):
                        self._publish(handle)
                    raise
                crash = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            failpoint("run.after_pass")
            self._publish(handle)
            progress: Progress = ray.get(handle.flush.remote())
            schedule.ended(
                progress.pending, failed=progress.failed, waiting=progress.waiting, crash=crash
            )
            if schedule.next() is not None:
                self._warn_incomplete(pass_number, todo, progress, crash)
        return schedule.lost if set(progress.pending) - progress.waiting else None

    def _warn_incomplete(
        self, pass_number: int, todo: Todo, progress: Progress, crash: str | None
    ) -> None:
        logger.warning(
            "Pass %d of run %s left %d sources incomplete, %s for one: %s.%s",
            pass_number,
            self._run_id,
            len(progress.pending),
            todo.pending.id(progress.pending[0]),
            progress.example,
            "" if crash is None else f" It ended with a crash: {crash}",
        )

    def _publish(self, handle: Any) -> None:
        if self._plan.publish is None:
            return
        results, rows = ray.get(handle.take_unpublished.remote())
        failpoint("run.before_publish")
        self._lease.check()
        if results:
            self._plan.publish(results, rows)
        failpoint("run.published")
        ray.get(handle.confirm_published.remote())

    def _spec(self, todo: Todo, contents: Contents) -> RunSpec:
        return RunSpec(
            run_id=self._run_id,
            binding=self._plan.storage.bind_ledger(self._run_id, self._lease),
            sources=todo.pending.trimmed(),
            records=todo.records,
            first_sequence=contents.union.highest_sequence(),
            max_failed_runs=self._plan.policies.max_failed_runs,
            signature=self._plan.signature,
            code=self._plan.code.digest(),
            commit_at_the_end=self._plan.publish is not None,
            schema_afresh=not len(todo.skipped)
            and not contents.live
            and self._plan.listing.shard is None,
            together=todo.together,
            faults=armed(),
            replaced=todo.replaced,
            header=self._header(),
        )

    def _header(self) -> dict[str, Any]:
        shard = self._plan.listing.shard
        return {
            "sources_total": len(self._plan.listing.listed),
            "signature": self._plan.signature,
            "code": self._plan.code.header(),
            "shard": None if shard is None else str(shard),
            HEADER_KEY: self._plan.listing.ids,
        }

    def _clean_up(self) -> None:
        # If the ledger's process lives on although it was closed or killed, it may yet commit
        # files: then they are left to the clean-up of a later run.
        try:
            if not self._lease.alone(wait_s=_ACTOR_EXIT_S):
                logger.warning("The ledger of run %s lives on; left-overs stay.", self._run_id)
                return
            self._lease.check()
            self._remove_leftovers(self._plan.storage.committed_by_dead_runs(self._run_id))
        except (ResumeError, OSError) as error:
            logger.warning("Left-overs in %s were not removed: %s", self._plan.output.uri, error)

    def _remove_leftovers(self, contents: Contents, names: Collection[str] | None = None) -> None:
        """Remove the files of this run and of dead runs that no record lists."""
        failpoint("cleanup.before")
        runs = contents.dead_runs | {self._run_id}
        self._plan.output.remove_leftovers(self._checkpoint_id, runs, contents, names)
        union = contents.union
        # Dead letters stand in what the head of a record has no room for.
        records = union.records(union.flagged(Flag.MORE))
        listed = {name for record in records for name in record.dead_letters}
        self._plan.storage.dead_letters().remove_leftovers(runs, listed)

    def _summary(
        self, todo: Todo, progress: Progress, failed: int = 0, quarantined: int = 0
    ) -> RunSummary:
        return RunSummary(
            run_id=self._run_id,
            sources_total=len(self._plan.listing.sources),
            sources_skipped=len(todo.skipped) + todo.passed_over,
            sources_completed=progress.committed,
            sources_failed=failed,
            sources_pending=len(todo.pending)
            + len(todo.held)
            + len(todo.apart)
            - progress.committed
            - failed
            - quarantined,
            sources_quarantined=todo.quarantined + quarantined,
            rows_read=progress.rows_read,
            rows_written=progress.rows_written,
            rows_dead_lettered=progress.dead_rows,
            files=progress.files,
            duration_s=time.monotonic() - self._started_at,
            sources_removed=progress.dropped,
        )


def _has_output(union: Union) -> bool:
    """Say whether output was written: files, or rows that went elsewhere."""
    rows = union.column("rows")[union.in_state(State.COMPLETED)]
    if rows.any() or len(union.flagged(Flag.FILE)):
        return True
    return any(record.files for record in union.records(union.flagged(Flag.MORE)))


_NOTHING = Progress(0, 0, 0, 0, 0)
