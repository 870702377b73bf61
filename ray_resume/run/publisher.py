"""`Publisher`: makes results of complete sources visible while a pass goes on, and at its end.

A table's datasink makes rows visible in ``on_write_complete`` only. The ledger keeps the results of
complete sources. To publish them: take them from the ledger, check the lease, make them visible,
and have the ledger commit their sources in one transaction. A crash costs what was not published.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from ray_resume.checkpoint.backend import RunLease
from ray_resume.failpoints import failpoint

__all__ = ["Publisher"]

logger = logging.getLogger("ray_resume")


class Publisher:
    """Publishes what is complete.

    Args:
        handle: the ledger's actor.
        lease: checked before anything is made visible.
        publish: makes results visible, given their number of rows.
        interval_s: how often that happens while a pass goes on.
    """

    def __init__(
        self,
        handle: Any,
        lease: RunLease,
        publish: Callable[[Sequence[bytes], int], None],
        interval_s: float,
    ) -> None:
        self._handle, self._lease = handle, lease
        self._publish, self._interval_s = publish, interval_s
        self._error: Exception | None = None
        # The ledger knows one publication at a time, and commits whichever was taken last. A user
        # who interrupts a run twice ends the wait for the thread, whose publication goes on.
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
            results, rows = ray.get(self._handle.take_unpublished.remote())
            failpoint("run.before_publish")
            self._lease.check()
            if results:
                self._publish(results, rows)
            failpoint("run.published")
            ray.get(self._handle.confirm_published.remote())

    def _publish_until(self, over: threading.Event) -> None:
        while not over.wait(self._interval_s):
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

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
