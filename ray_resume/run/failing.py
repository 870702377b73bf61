"""`Failing`: commits sources as failed, and says why they did."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from ray_resume.core.ledger import Ledger
from ray_resume.core.run_sources import RunSources
from ray_resume.run.committer import Committer
from ray_resume.run.progress import Unread
from ray_resume.run.record_factory import Failed

__all__ = ["Failing"]

# So many failed sources are committed in one transaction.
_FAILED_AT_ONCE = 10_000


class Failing:
    """Commits pending sources as failed. Thread-safe, but for what is called under ``lock``.

    Args:
        lock: guards ``ledger``, for moments only.
    """

    def __init__(
        self, lock: threading.Lock, ledger: Ledger, sources: RunSources, committer: Committer
    ) -> None:
        self._lock = lock
        self._ledger = ledger
        self._sources = sources
        self._committer = committer
        self._quarantined = 0
        # How many sources each source of `mark_lost` has added to those that are quarantined.
        self._lost: dict[int, int] = {}

    def quarantined(self) -> int:
        """Return how many sources this run has quarantined. Call it under the lock."""
        return self._quarantined

    def mark_lost(self, source: int, crash: str | None) -> str | None:
        """Commit that ``source`` got lost although it was executed alone; this counts as a failure.

        Args:
            crash: the error of its worker's death, if the worker died.

        Returns:
            How it got lost; None if it is complete, by a message that came late.
        """
        with self._lock:
            self._committer.check_open()
            if not self._ledger.is_pending(source):
                return None
            why = self._ledger.explain(source)
        if crash is not None:
            why = f"a worker died whenever it was executed ({crash})"
        how = Failed(f"rows unaccounted for: {why}", counts_toward_quarantine=True)
        self._lost[source] = self.fail({source: how})
        return how.error

    def mark_rest_failed(self, *, unread_counts: bool = True) -> tuple[int, int]:
        """Commit the pending sources as failed.

        Args:
            unread_counts: a source that could not be read comes nearer to quarantine. If not, the
                reader itself may be at fault.

        Returns:
            How many have failed, and how many of these are quarantined now, both with those of
            :meth:`mark_lost`.
        """
        with self._lock:
            self._committer.check_open()
            failed = self._ledger.pending()
        quarantined = sum(self._lost.get(source, 0) for source in failed)
        rest = [source for source in failed if source not in self._lost]
        for start in range(0, len(rest), _FAILED_AT_ONCE):
            part = rest[start : start + _FAILED_AT_ONCE]
            with self._lock:
                why = {source: self._how(source, unread_counts) for source in part}
            quarantined += self.fail(why)
        return len(failed), quarantined

    def fail(self, failed: Mapping[int, Failed]) -> int:
        """Commit sources, by number, as failed; a complete one stays so.

        Returns:
            How many are quarantined now.
        """
        with self._lock:
            self._committer.check_open()
            pending = {s: how for s, how in failed.items() if self._ledger.is_pending(s)}
        quarantined = self._committer.fail(pending)
        with self._lock:
            self._quarantined += quarantined
        return quarantined

    def why(self, source: int) -> str:
        """Say why a source is not complete. Call it under the lock."""
        return self._ledger.failure(source) or self._ledger.explain(source)

    def unread(self) -> Unread | None:
        """Return what could not be read; None if all could. Call it under the lock."""
        errors = self._ledger.read_errors()
        sources = errors.sources()
        if not sources:
            return None
        # The first whose exception is known.
        first = next((source for source in sources if errors.cause(source)), None)
        first = next(iter(sources)) if first is None else first
        return Unread(len(sources), self._sources.id(first), self.why(first), errors.cause(first))

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
