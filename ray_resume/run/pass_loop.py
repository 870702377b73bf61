"""The passes of a run: execute the pipeline until no further pass can complete a source.

`core.passes` decides which sources a pass executes. The loop executes the pass, and tells an error
of the user's code from the crash of a process. Then it publishes the results. A source that got
lost alone goes on record at once: it counts towards quarantine, even if the run then fails.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)

from ray_resume.core.filenames import NAME_DIGEST_BYTES
from ray_resume.core.passes import PassPlan, PassSchedule
from ray_resume.core.range_items import RangeItems
from ray_resume.core.resume_plan import ResumePlan
from ray_resume.core.run_sources import with_found
from ray_resume.core.sources import SourceTable
from ray_resume.errors import ResumeError
from ray_resume.failpoints import armed, failpoint
from ray_resume.run.client import LedgerClient
from ray_resume.run.progress import Progress
from ray_resume.run.publisher import Publisher

__all__ = ["Pass", "PassLoop", "close_after"]

logger = logging.getLogger("ray_resume")

# Ray raises these when a process or a node died. The user's code raised nothing then.
_CRASHES = (
    WorkerCrashedError,
    OutOfMemoryError,
    NodeDiedError,
    RayActorError,
    ObjectLostError,
)

# A warning names so many sources.
_MAX_NAMED = 3


@dataclass(frozen=True)
class Pass:
    """One armed execution: the sources to read, how, the ledger to send to, how to name files.

    ``digests`` has the beginning of each source's digest, by its number; `FileSink` puts it into
    the names of the source's files. ``read_schema`` is the schema to read with, None if the input
    has none that is fixed.
    """

    sources: SourceTable
    plan: PassPlan
    client: LedgerClient
    file_prefix: str
    digests: bytes
    # All row ranges that the run knows, where sources are row ranges.
    known: RangeItems | None = None
    read_schema: pa.Schema | None = None


class PassLoop:
    """The passes of one run; call :meth:`execute` once.

    Args:
        handle: the ledger's actor.
        resume_plan: the sources of the run.
        file_prefix: begins the name of each file that the run writes.
        publisher: makes results visible; None for a sink that needs no such step.
        read_schema: the schema to read with, None if the input has none that is fixed.

    Attributes:
        lost_alone: the ids of the sources that got lost although they were executed alone, and
            how. Their failed run is on record.
        not_tried: how many sources got lost with others, and were not executed alone.
    """

    def __init__(
        self,
        handle: Any,
        resume_plan: ResumePlan,
        *,
        run_id: str,
        file_prefix: str,
        publisher: Publisher | None,
        read_schema: pa.Schema | None = None,
    ) -> None:
        self.lost_alone: dict[str, str] = {}
        self.not_tried = 0
        self._handle, self._resume_plan = handle, resume_plan
        self._run_id, self._file_prefix = run_id, file_prefix
        self._publisher = publisher
        self._read_schema = read_schema
        self._sources, self._known = resume_plan.pending, resume_plan.known
        self._digests = resume_plan.pending.digests.to_bytes(NAME_DIGEST_BYTES)
        self._pass_number = 0

    def execute(self, run_pass: Callable[[Pass], None]) -> Progress:
        """Execute passes until nothing more can be done.

        Returns:
            How far the run is after the last pass.

        Raises:
            Exception: whatever ``run_pass`` raised, but for crashes.
        """
        schedule = PassSchedule(
            len(self._resume_plan.pending),
            failed_runs=self._failed_runs,
        )
        recorded: set[int] = set()
        while (plan := schedule.next()) is not None:
            crash = self._execute_pass(plan, run_pass)
            progress: Progress = ray.get(self._handle.flush.remote())
            self._learn(progress.known)
            schedule.record_result(
                progress.pending, known=progress.known, failed=progress.failed, crash=crash
            )
            lost = schedule.lost_alone.keys() - recorded
            recorded |= lost
            for source in lost:
                self._record_lost(source, crash)
            if schedule.next() is not None and not lost:
                self._warn_incomplete(progress, crash)
        self._warn_not_tried(schedule.not_tried)
        return progress

    def _learn(self, known: int) -> None:
        """Learn of the row ranges that reads have found."""
        first = len(self._sources) - len(self._resume_plan.pending)
        if known <= len(self._sources):
            return
        before = len(self._sources)
        self._sources = with_found(self._sources, ray.get(self._handle.found.remote(first)))
        found = self._sources[before:].ranges
        assert found is not None
        assert self._known is not None
        self._known = self._known.joined(found)
        self._digests = self._sources.digests.to_bytes(NAME_DIGEST_BYTES)

    def _failed_runs(self, source: int) -> int:
        record = self._resume_plan.records.get(source)
        return 0 if record is None else record.failed_runs

    def _execute_pass(self, plan: PassPlan, run_pass: Callable[[Pass], None]) -> str | None:
        """Execute a pass and publish; return the error of the crash, if one ended the pass."""
        self._pass_number += 1
        if self._pass_number > 1:
            # The ledger starts in pass 1.
            ray.get(self._handle.begin_pass.remote(self._pass_number))
        client = LedgerClient(self._handle, self._run_id, self._pass_number, armed())
        sources = self._sources
        if len(plan.sources) < len(sources):
            sources = sources.take(np.array(plan.sources))
        crash: str | None = None
        failpoint("run.before_pass")
        prefix, digests = self._file_prefix, self._digests
        known = self._known
        this = Pass(sources, plan, client, prefix, digests, known, self._read_schema)
        publisher = self._publisher
        try:
            with contextlib.nullcontext() if publisher is None else publisher.regularly():
                run_pass(this)
        except BaseException as error:
            if not _is_crash(error):
                # Complete sources stay complete, even if a row of another source was bad, or the
                # user interrupts the run.
                if publisher is not None:
                    with contextlib.suppress(Exception):
                        publisher.publish_now()
                raise
            crash = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        failpoint("run.after_pass")
        if publisher is not None:
            publisher.publish_now()
        return crash

    def _record_lost(self, source: int, crash: str | None) -> None:
        """Commit that ``source`` has failed in this run, for the run may yet end by an error."""
        how = ray.get(self._handle.mark_lost.remote(source, crash))
        if how is None:
            # A message that came late has completed it.
            return
        source_id = self._sources.id(source)
        self.lost_alone[source_id] = how
        logger.warning(
            "Run %s: %s got lost although it was executed alone: %s. This counts as a failed run "
            "of it.",
            self._run_id,
            source_id,
            how,
        )

    def _warn_incomplete(self, progress: Progress, crash: str | None) -> None:
        logger.warning(
            "Pass %d of run %s left %d sources incomplete, %s for one: %s.%s",
            self._pass_number,
            self._run_id,
            len(progress.pending),
            self._sources.id(progress.pending[0]),
            progress.example,
            "" if crash is None else f" It ended with a crash: {crash}",
        )

    def _warn_not_tried(self, sources: Sequence[int]) -> None:
        self.not_tried = len(sources)
        if not sources:
            return
        names = [self._sources.id(source) for source in sources[:_MAX_NAMED]]
        logger.warning(
            "Run %s: %d sources got lost with others, and a run executes only so many alone: %s%s. "
            "This does not count as a failed run of them, and the next run begins with them.",
            self._run_id,
            len(sources),
            ", ".join(names),
            ", ..." if len(sources) > len(names) else "",
        )


def _is_crash(error: BaseException) -> bool:
    """Return whether a process or a node died; the user has to fix a constructor that raised."""
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return False
    return isinstance(error, _CRASHES)


def close_after(error: BaseException, handle: Any, run_id: str) -> Progress | None:
    """Close the ledger of a run that ends with ``error``; what is complete is committed.

    Returns:
        How far the run is; None if the ledger failed and ``error`` interrupts the run.

    Raises:
        ResumeError: the ledger failed. This says more than ``error``, which may be that of a task
            whose message the ledger refused.
    """
    try:
        progress: Progress = ray.get(handle.close.remote())
        return progress
    except RayActorError as gone:
        fault = ResumeError(
            f"The ledger of run {run_id} died ({gone}). Its commits are safe. Run the same script "
            "again to go on from there."
        )
    except ResumeError as refused:
        fault = refused
    if isinstance(error, Exception):
        raise fault from error
    # An interrupt may end all processes of a job at once.

    logger.warning("%s", fault)
    return None
