"""Heartbeats through a storage, and the silence that proves a process dead.

A live process replaces its own object again and again (:class:`Heartbeat`). Another process lists
these objects (:class:`HeartbeatMonitor`). If an object stays the same for ``ttl_s`` on the
observer's clock, its process is dead. Clocks of different hosts are never compared.

The two halves fit. A heartbeat counts from *before* it began a beat that arrived, a monitor from
*after* it saw that beat. So :meth:`Heartbeat.check` fails a quarter of ``ttl_s`` before any monitor
can declare the process dead, also if the process was stopped in between.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from ray_resume.checkpoint.objects import ObjectInfo, Objects
from ray_resume.checkpoint.shared.mutex import boottime_s
from ray_resume.errors import CheckpointError

__all__ = ["Heartbeat", "HeartbeatMonitor"]

# A listing may give times in whole seconds, or none, so beats differ in size, too. With many sizes,
# an observer that looks again after a long time hardly ever sees the same size.
_SIZES = 4093
_BEATS_PER_TTL = 6
_TRUST = 0.75


class Heartbeat:
    """The heartbeat of this process, in the object ``name``.

    Args:
        ttl_s: how long its silence must last until others declare it dead.
        also: called once in ``ttl_s``, in the same thread.

    Raises:
        CheckpointError: the storage fails. The first beat happens here.
    """

    def __init__(
        self,
        objects: Objects,
        name: str,
        *,
        ttl_s: float,
        clock: Callable[[], float] = boottime_s,
        also: Callable[[], None] = lambda: None,
    ) -> None:
        self._objects = objects
        self._name = name
        self._ttl_s = ttl_s
        self._clock = clock
        self._also = also
        self._beats = 0
        self._beating = threading.Lock()
        self._ended = threading.Event()
        self._last = clock()
        self._put(self._last)

    def start(self) -> None:
        """Go on beating in a thread, until :meth:`end`."""
        threading.Thread(target=self._beat_regularly, daemon=True).start()

    def is_alive(self) -> bool:
        """Say whether no process can have declared this one dead."""
        return not self._ended.is_set() and self._clock() - self._last < self._ttl_s * _TRUST

    def check(self) -> None:
        """Make sure that no process can have declared this one dead.

        Raises:
            CheckpointError: a process may have.
        """
        if not self.is_alive():
            raise CheckpointError(
                f"This run could not write a heartbeat for {self._ttl_s * _TRUST:g} s (was it "
                "stopped, or its storage out of reach?), so another run may have started in its "
                "place. This run commits nothing more; run again to go on."
            )

    def beat(self) -> None:
        """Write a heartbeat, unless it is too late: a dead process stays dead.

        Raises:
            CheckpointError: the storage fails.
        """
        with self._beating:
            began_at = self._clock()
            if self.is_alive():
                self._put(began_at)

    def end(self) -> None:
        """Stop beating, and remove the object."""
        self._ended.set()
        with self._beating:
            self._objects.delete([self._name])

    def _put(self, began_at: float) -> None:
        self._beats += 1
        self._objects.replace(self._name, b"." * (self._beats % _SIZES))
        self._last = began_at

    def _beat_regularly(self) -> None:
        interval_s = pause_s = self._ttl_s / _BEATS_PER_TTL
        while not self._ended.wait(pause_s) and self.is_alive():
            try:
                self.beat()
                if self._beats % _BEATS_PER_TTL == 0:
                    self._also()
                pause_s = interval_s
            except CheckpointError:
                # The storage failed for seconds already. `check` says whether it is too late.
                pause_s = interval_s / 4


class HeartbeatMonitor:
    """The heartbeats of other runs that this process has seen. Pure; only one thread may use it."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Mapping[str, ObjectInfo], float]] = {}

    def observe(
        self, signs: Mapping[str, Mapping[str, ObjectInfo]], *, before: float, after: float
    ) -> None:
        """Record a listing that was made between two times of this process's clock.

        Args:
            signs: the heartbeats of each run. Other runs are forgotten.
        """
        self._seen = {
            run: known
            if (known := self._seen.get(run)) is not None and known[0] == seen
            else (seen, after)
            for run, seen in signs.items()
        }
        self._looked_at = before

    def silent_s(self, run: str) -> float:
        """Return for how many seconds, at least, ``run`` was silent at the last listing."""
        known = self._seen.get(run)
        return 0.0 if known is None else max(0.0, self._looked_at - known[1])
