"""`LedgerHost`: the ledger of a run, with all that answers the driver and the workers.

A thin shell around its parts: every rule about counters is in `core.ledger`, about when to commit
in `committer`, about failed sources in `failing`, about the output's schema in `agreement`.

It is plain Python, tested without Ray; `ledger_actor` puts it into an actor.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from ray_resume.checkpoint.local.lmdb_file import WriterContents
from ray_resume.core.ledger import Ledger, LedgerError
from ray_resume.core.messages import Applied, DeadLetter, Drain, Message
from ray_resume.core.publications import Taken
from ray_resume.core.run_sources import FoundRange, RunSources
from ray_resume.core.stages import StageCount, added
from ray_resume.core.tokens import MODULUS
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint
from ray_resume.run.agreement import Agreement
from ray_resume.run.committer import Committer
from ray_resume.run.failing import Failing
from ray_resume.run.progress import Counts, Latencies, Progress
from ray_resume.run.record_factory import Failed
from ray_resume.run.run_spec import RunSpec
from ray_resume.run.tally import Tally

__all__ = ["LedgerHost"]


class LedgerHost:
    """Applies messages, and has the committer commit what they complete. Thread-safe.

    Raises:
        CheckpointError: on construction, if the lease is gone or the file cannot be made.
    """

    def __init__(self, spec: RunSpec) -> None:
        self._sources = RunSources(spec.sources)
        self._ledger = Ledger(spec.run_id, len(spec.sources))
        self._messages = 0
        self._tally = Tally()
        self._stages: dict[int, StageCount] = {}
        self._letters = spec.binding.dead_letters()
        self._agreement = Agreement(
            spec.binding.schemas(),
            spec.run_id,
            self._id_of_asking,
            afresh=spec.schema_afresh,
            stale=spec.first_sequence > 0,
            gone=spec.schema_gone,
        )
        # `_lock` guards the ledger and the counts, for moments only. A thread that holds it may
        # enter the committer; the committer never calls the host, so the order is always the same.
        self._lock = threading.Lock()
        self._committer = Committer(spec, self._sources)
        self._failing = Failing(self._lock, self._ledger, self._sources, self._committer)

    def hold_commits(self) -> None:
        """Commit nothing until :meth:`confirm_lease`. Call it before the first message."""
        self._committer.hold()

    def confirm_lease(self) -> None:
        """Commit from now on: the driver's lease was held when this process had joined it."""
        self._committer.confirm()

    def begin_pass(self, pass_number: int) -> None:
        """Start a pass with empty counters."""
        with self._lock:
            self._ledger.begin_pass(pass_number)

    def apply(self, message: Message) -> Applied:
        """Apply a message, and queue the completed sources; this does not wait for their commit.

        Raises:
            ResumeError: the message is illegal, the host is closed, or a commit failed.
        """
        failpoint("ledger.before_apply")
        with self._lock:
            self._committer.check_open()
            applied = self._ledger.apply(message)
            self._messages += 1
            done = applied.completions
            if done:
                self._committer.add(done)
                self._tally.add(done)
            failpoint("ledger.applied")
            return applied

    def register(
        self, run_id: str, pass_number: int, found: Sequence[FoundRange]
    ) -> list[int | None]:
        """Return the numbers of row ranges whose first rows a read has found; None: complete.

        Raises:
            ResumeError: the read is not one of this pass, or the host is closed.
        """
        answers: list[int | None] = []
        for one in found:
            failpoint("ledger.registering")
            with self._lock:
                self._committer.check_open()
                number = self._sources.number_of(one)
                if number is None:
                    number = self._ledger.add_source(run_id, pass_number)
                    self._sources.add(one)
                answers.append(number if self._ledger.is_pending(number) else None)
            failpoint("ledger.registered")
        return answers

    def found(self, first: int) -> list[FoundRange]:
        """Return the ranges that reads have found, from the ``first`` of them."""
        with self._lock:
            return self._sources.found[first:]

    def write_dead_letters(
        self, run_id: str, pass_number: int, letters: Sequence[DeadLetter]
    ) -> Applied:
        """Write dead letters durably, then drain what their rows carried; otherwise as `apply`."""
        with self._lock:
            self._committer.check_open()
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
                    # A complete source has its letters already: a task that was executed again
                    # sends them a second time.
                    dead_letters=()
                    if source_id is None
                    else (self._letters.write(run_id, source_id, letter),),
                )
                for letter, source_id in zip(letters, ids, strict=True)
            )
        except CheckpointError as error:
            # The run ends by this error, and not by what Ray makes of it on its way through a UDF.
            self._committer.commit()
            self._committer.stop(error)
            raise
        return self.apply(Message(run_id, pass_number, drains))

    def agree(self, asked: Sequence[tuple[bytes, int]], given: bool) -> tuple[bytes, str | None]:
        """Agree on a schema for the output; see `Agreement.widen`."""
        self._committer.check_open()
        return self._agreement.widen(asked, given)

    def _id_of_asking(self, source: int) -> str | None:
        with self._lock:
            return self._id_of_pending(source)

    def name_of(self, source: int) -> str:
        """Return the id of a source, for messages; a complete one is called by its number."""
        with self._lock:
            return self._id_of_pending(source) or f"source number {source}"

    def flush(self) -> Progress:
        """Commit everything that is complete, and return how far the run is.

        Raises:
            CheckpointError: the lease is lost or the store cannot be written.
        """
        self._committer.flush()
        with self._lock:
            committed, _, dropped = self._committer.counts()
            pending = self._ledger.pending()
            return Progress(
                self._tally.completed,
                committed,
                self._tally.rows_read,
                self._tally.rows_written,
                self._tally.files(),
                array("i", pending),
                frozenset(self._ledger.failed()),
                self._tally.dead_rows,
                self._failing.why(pending[0]) if pending else None,
                self._failing.unread(),
                dropped,
                dict(self._stages),
                self._ledger.rows_in_flight(),
                self._tally.slowest(self._sources),
                len(self._sources),
                self._grown(),
            )

    def count_stage(self, stage: int, count: StageCount) -> None:
        """Add to what a stage did, by its position in the pipeline."""
        with self._lock:
            self._stages[stage] = added(self._stages.get(stage, StageCount()), count)

    def facts(self) -> dict[str, Any]:
        """Return how far the run is, by the names that `RunRecord` has."""
        counts = self.counts()
        with self._lock:
            return {
                "sources_completed": counts.committed,
                "rows_read": counts.rows_read,
                "rows_written": counts.rows_written,
                "rows_dead_lettered": counts.dead_rows,
                "rows_at_risk": counts.rows_at_risk,
                "files": self._tally.files(),
                "slowest": self._tally.slowest(self._sources),
            }

    def counts(self) -> Counts:
        """Return sums of how far the run is. This commits nothing, and waits for no commit."""
        began = time.perf_counter()
        with self._lock:
            committed, rows_committed, _ = self._committer.counts()
            in_flight = self._ledger.rows_in_flight()
            return Counts(
                sources=len(self._sources) - self._tally.ends,
                pass_number=self._ledger.pass_number,
                completed=self._tally.completed,
                committed=committed,
                failed=len(self._ledger.failed()),
                quarantined=self._failing.quarantined(),
                rows_read=self._tally.rows_read,
                rows_written=self._tally.rows_written,
                dead_rows=self._tally.dead_rows,
                rows_in_flight=in_flight,
                rows_at_risk=in_flight + self._tally.rows_read - rows_committed,
                messages=self._messages,
                stages=dict(self._stages),
                took_s=time.perf_counter() - began,
                grown=self._grown(),
            )

    def _grown(self) -> int:
        """Return how many sources have come to be, less the ends that are complete."""
        return len(self._sources.found) - self._tally.ends

    def take_latencies(self) -> Latencies:
        """Return how long commits took; see `Committer.take_latencies`."""
        return self._committer.take_latencies()

    def take_unpublished(self, position: str | None) -> Taken | None:
        """Record and return what is to be published; see `Committer.take_unpublished`."""
        return self._committer.take_unpublished(position)

    def confirm_published(self, number: int) -> None:
        """Commit what was published; see `Committer.confirm_published`."""
        self._committer.confirm_published(number)

    def drop(self, source_ids: Sequence[str]) -> None:
        """Commit that sources have no output any more; see `Committer.drop`."""
        self._committer.drop(source_ids)

    def mark_lost(self, source: int, crash: str | None) -> str | None:
        """Commit that a source executed alone got lost; see `Failing.mark_lost`."""
        return self._failing.mark_lost(source, crash)

    def mark_rest_failed(self, *, unread_counts: bool = True) -> tuple[int, int]:
        """Commit the pending sources as failed; see `Failing.mark_rest_failed`."""
        return self._failing.mark_rest_failed(unread_counts=unread_counts)

    def fail(self, failed: Mapping[int, Failed]) -> int:
        """Commit sources as failed; see `Failing.fail`."""
        return self._failing.fail(failed)

    def close(self) -> Progress:
        """Commit what is complete, then refuse every later message and close the file."""
        try:
            return self.flush()
        finally:
            # Under the lock, since a message is applied and queued in one step or refused.
            with self._lock:
                self._committer.close()

    def contents(self) -> WriterContents | None:
        """Return what the file had when it was closed; None where hosts share the checkpoint."""
        return self._committer.contents

    def _id_of_pending(self, source: int) -> str | None:
        return self._sources.id(source) if self._ledger.is_pending(source) else None
