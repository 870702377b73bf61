"""`Publisher`: makes results of complete sources visible while a pass goes on, and at its end.

A table's datasink makes rows visible in ``on_write_complete`` only. The ledger keeps the results of
complete sources. `core.publications` has the steps of a publication, and says what a crash between
them costs: with marks, nothing is published twice.

The driver checks the lease after the publication is on record, and before it publishes. So a run
that declares this one dead finds the publication, and this driver then publishes nothing more.

The driver may stand still (SIGSTOP, a paused machine) between that check and the table's own
commit. If that lasts longer than its lease, where hosts share a checkpoint, a successor finds no
mark and processes the sources again. Before that, it puts up a *fence* in a Delta or Iceberg table:
a commit of its own. The driver's commit depends on what the table was before the check, so it fails
when the driver wakes. A Lance table has no fence (`raydata.lance_marks` says why): the commit
succeeds, and these rows are in the table twice. A killed driver cannot do that: at most, a request
that it had sent to a remote catalog arrives late.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from ray_resume.checkpoint.backend import RunLease
from ray_resume.core.publications import Mark
from ray_resume.errors import ResumeError
from ray_resume.failpoints import failpoint
from ray_resume.run.table import Table

__all__ = ["Publisher"]

logger = logging.getLogger("ray_resume")


class Publisher:
    """Publishes what is complete.

    Args:
        handle: the ledger's actor.
        lease: checked before anything is made visible.
        table: where results are made visible.
        mark: the mark of the run's publications, but for its number.
        interval_s: how often that happens while a pass goes on.
    """

    def __init__(
        self, handle: Any, lease: RunLease, table: Table, mark: Mark, interval_s: float
    ) -> None:
        self._handle, self._lease = handle, lease
        self._table, self._mark = table, mark
        self._interval_s = interval_s
        self._error: Exception | None = None
        # Where the table stood before the publication that goes on, or was interrupted.
        self._position: tuple[str | None] | None = None
        # The ledger knows one publication at a time. A user who interrupts a run twice ends the
        # wait for the thread, whose publication goes on.
        self._one_at_a_time = threading.Lock()

    @contextlib.contextmanager
    def regularly(self) -> Iterator[None]:
        """Publish every ``interval_s`` seconds until the block ends.

        Raises:
            Exception: publishing failed, and the block did not. Nothing was published after that.
        """
        over = threading.Event()
        thread = threading.Thread(target=self._publish_until, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            # A publication that has begun is committed as well: it would be made again.
            thread.join()
        self._raise_error()

    def publish_now(self) -> None:
        """Publish everything that is complete, after a publication that goes on.

        Raises:
            CheckpointError: the lease is lost.
            Exception: the datasink raised it, now or while the pass went on.
        """
        with self._one_at_a_time:
            self._raise_error()
            if self._position is None:
                self._position = (self._table.position(),)
            taken = ray.get(self._handle.take_unpublished.remote(*self._position))
            if taken is not None:
                self._publish(*taken)
            self._position = None

    def _publish(self, number: int, results: Sequence[bytes], rows: int, again: bool) -> None:
        mark = self._mark._replace(number=number)
        failpoint("run.before_publish")
        if not again or not self._was_published(mark):
            self._table.publish(results, rows, mark, self._lease.check)
        failpoint("run.published")
        ray.get(self._handle.confirm_published.remote(number))

    def _was_published(self, mark: Mark) -> bool:
        """Return whether an interrupted publication of this run has reached the table.

        Raises:
            ResumeError: the table has no place for marks.
        """
        if not self._table.has_marks:
            raise ResumeError(
                f"Publication {mark.number} of run {mark.run_id} was interrupted, and the table "
                "cannot tell whether it happened. Nothing more is published. Run again: the "
                "sources that it had are processed again, and may be in the table twice."
            )
        assert self._position is not None
        return self._table.holds(mark, *self._position)

    def _publish_until(self, over: threading.Event) -> None:
        wait_s = self._interval_s
        while not over.wait(min(wait_s, threading.TIMEOUT_MAX)):
            began = time.monotonic()
            try:
                self.publish_now()
            except Exception as error:
                logger.warning(
                    "Publishing failed, and nothing more is published; the run goes on until its "
                    "pass ends, and then raises: %s",
                    error,
                )
                self._error = error
                return
            # A slow table is left alone for half of the time.
            spent_s = time.monotonic() - began
            wait_s = max(self._interval_s - spent_s, spent_s)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
