"""`CommitThread`: commits completed sources in groups, from a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["CommitThread"]

# Messages that come at the same time share a commit, even if the last one is long ago.
_COMPANY_S = 0.5


class CommitThread:
    """Commits what is queued, once for each interval, until there is nothing more to come.

    Args:
        state: guards the queue, and is notified whenever it or one of the answers below changes.
        interval_s: the time between two commits.
        commit: commits the queue.
        has_work: says whether there is something to commit. Called under ``state``.
        is_over: says whether nothing more is to be committed. Called under ``state``.
    """

    def __init__(
        self,
        state: threading.Condition,
        interval_s: float,
        *,
        commit: Callable[[], None],
        has_work: Callable[[], bool],
        is_over: Callable[[], bool],
    ) -> None:
        self._state = state
        self._interval_s = interval_s
        self._commit = commit
        self._has_work = has_work
        self._is_over = is_over
        # When the last group of the queue was taken.
        self._grouped_at = time.monotonic()
        threading.Thread(target=self._commit_regularly, daemon=True).start()

    def _commit_regularly(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._has_work() or self._is_over())
                if self._is_over():
                    return
            self._wait_for_company()
            self._grouped_at = time.monotonic()
            self._commit()

    def _wait_for_company(self) -> None:
        """Let completions share a commit: one for each interval. A run that ends waits no more.

        The interval begins with the last commit. Write tasks flush their rows every few seconds, so
        completions would else wait twice: for the flush, and as long again for their commit.
        """
        due = self._grouped_at + self._interval_s - time.monotonic()
        company_s = max(due, min(_COMPANY_S, self._interval_s))
        with self._state:
            self._state.wait_for(self._is_over, timeout=company_s)
