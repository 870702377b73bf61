"""`SignOfLife`: writes every few seconds how far a run is; in the ledger's process.

If the run is killed, its record shows when it was last alive. While it is at work, other processes
see how far it is, without a message to it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray_resume.checkpoint.history import RunHistory
from ray_resume.errors import CheckpointError

__all__ = ["INTERVAL_S", "SignOfLife"]

INTERVAL_S = 5.0


class SignOfLife:
    """The signs of life of one run.

    Args:
        look: returns plain JSON data: how far the run is, by the names that `RunRecord` has.
    """

    def __init__(
        self, history: RunHistory, run_id: str, look: Callable[[], Mapping[str, Any]]
    ) -> None:
        self._history = history
        self._run_id = run_id
        self._look = look
        self._opened_at = time.time()
        self._ended = threading.Event()
        self._writing = threading.Lock()

    def start(self) -> None:
        """Write signs in a thread, until :meth:`end`."""
        threading.Thread(target=self._write_regularly, daemon=True).start()

    def end(self, *, last: bool = False) -> None:
        """Write no more signs; if this is the ``last`` chance of the run, write one now."""
        self._ended.set()
        with self._writing:
            if last:
                self._write()

    def _write_regularly(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            with self._writing:
                if not self._ended.is_set():
                    self._write()

    def _write(self) -> None:
        # For people only: a storage that fails is the committer's business.
        with contextlib.suppress(CheckpointError):
            now = {"at": time.time(), "opened_at": self._opened_at, **self._look()}
            self._history.sign(self._run_id, now)
