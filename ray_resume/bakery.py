"""Mutual exclusion among processes that share nothing but a storage of objects.

Lamport's bakery ("A New Solution of Dijkstra's Concurrent Programming Problem", CACM 1974): who
wants in says that it is choosing, takes a number higher than all that it sees, and waits until
nobody is choosing and nobody has a lower one. It needs no more than that what was written is seen
by whoever looks later, so it works where nothing is atomic but a single object.

Processes die and stop. A place in the queue that does not move on for ``patience_s``, on the clock
of whoever waits behind it, is taken away. So each has only a part of that time for its turn:
:meth:`Turn.confirm` says afterwards whether what was done was done in time. An effect that is not
confirmed must be undone and counts for nothing. Clocks of different hosts are never compared.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator

from ray_resume.objects import Objects

__all__ = ["Bakery", "OutOfTurn", "Turn", "boottime_s"]

_ENTRY = re.compile(r"[0-9a-z]+/(?:a|b-([0-9]{12}))-([0-9a-f]+)")
_SHORTEST_POLL_S = 0.05
_LONGEST_POLL_S = 1.0


def boottime_s() -> float:
    """Return seconds on a clock of this host that nobody sets, and that a suspended host counts."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


class OutOfTurn(Exception):  # noqa: N818 - not an error of anybody's, but a reason to queue again
    """Raised in a process that was too slow: others may be in. What it did must be undone."""


class Turn:
    """A stay inside; ``began_at`` is when it was last seen that nobody else was there."""

    def __init__(self, began_at: float, limit_s: float, clock: Callable[[], float]) -> None:
        self._began_at = began_at
        self._limit_s = limit_s
        self._clock = clock

    def confirm(self) -> None:
        """Make sure that what was done up to now was done while nobody else could be inside.

        Raises:
            OutOfTurn: it took too long.
        """
        if self._clock() - self._began_at > self._limit_s:
            raise OutOfTurn


class Bakery:
    """A queue in the folder ``folder`` of ``objects``, for one process or thread.

    Args:
        who: hexadecimal digits that nobody else has.
        patience_s: how long a place in the queue may stand still before it is taken away.
    """

    def __init__(
        self,
        objects: Objects,
        folder: str,
        who: str,
        *,
        patience_s: float,
        clock: Callable[[], float] = boottime_s,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._objects = objects
        self._folder = folder
        self._who = who
        self._patience_s = patience_s
        self._clock = clock
        self._sleep = sleep
        self._choosing = f"{folder}/a-{who}"

    @contextlib.contextmanager
    def turn(self) -> Iterator[Turn]:
        """Wait for this process's turn, and leave after it.

        Leaving by :class:`OutOfTurn` (or any other error) gives the place up all the same.

        Raises:
            CheckpointError: the storage fails.
        """
        ticket: str | None = None
        try:
            while True:
                taken_at, ticket = self._take_a_ticket()
                began_at = self._wait(ticket, taken_at)
                if began_at is not None:
                    break
                self._leave(ticket)
            yield Turn(began_at, self._patience_s / 2, self._clock)
        finally:
            self._leave(ticket)

    def _take_a_ticket(self) -> tuple[float, str]:
        """Return this process's place in the queue, and when it was not there yet."""
        while True:
            began_at = self._clock()
            self._objects.put(self._choosing, b"")
            numbers = [number for number, _ in _tickets(self._objects.list(self._folder))]
            ticket = f"{self._folder}/b-{max(numbers, default=0) + 1:012d}-{self._who}"
            taken_at = self._clock()
            self._objects.put(ticket, b"")
            self._objects.delete([self._choosing])
            if self._clock() - began_at < self._patience_s / 2:
                return taken_at, ticket
            # Whoever waited for this choice may have given up, and not have seen the number.
            self._objects.delete([ticket])

    def _wait(self, ticket: str, looked_at: float) -> float | None:
        """Wait until it is our turn; return when that was seen, None if our place is lost."""
        ((number, _),) = _tickets([ticket])
        # Who was choosing before we had our number may get a lower one; who began later may not.
        choosers: set[str] | None = None
        # What stands still, and since when.
        still: tuple[str, float] | None = None
        while True:
            before, looked_at = looked_at, self._clock()
            # A listing is no snapshot: who had chosen is to be seen before the numbers are.
            nobody_chooses = choosers is not None and not choosers
            names = set(self._objects.list(self._folder))
            if ticket not in names or looked_at - before > self._patience_s / 4:
                return None  # Others have waited for us in vain, or may have for some time.
            now = {name for name in names if _is_choosing(name) and name != self._choosing}
            choosers = now if choosers is None else choosers & now
            ahead = sorted(entry for entry in _tickets(names) if entry < (number, self._who))
            if nobody_chooses and not ahead:
                return looked_at
            if now or ahead:
                # One stands for all behind it: they cannot move before it does.
                blocker = min(now) if now else f"{self._folder}/b-{ahead[0][0]:012d}-{ahead[0][1]}"
                if still is None or still[0] != blocker:
                    still = blocker, self._clock()
                elif looked_at - still[1] > self._patience_s:
                    self._objects.delete([blocker])
                    still = None
                place = len(ahead) + len(choosers)
                self._sleep(
                    min(_SHORTEST_POLL_S * max(1, place), _LONGEST_POLL_S, self._patience_s / 8)
                )

    def _leave(self, ticket: str | None) -> None:
        self._objects.delete([self._choosing, *([] if ticket is None else [ticket])])


def _is_choosing(name: str) -> bool:
    match = _ENTRY.fullmatch(name)
    return match is not None and match[1] is None


def _tickets(names: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield the numbers that were taken, and by whom."""
    for name in names:
        match = _ENTRY.fullmatch(name)
        if match is not None and match[1] is not None:
            yield int(match[1]), match[2]
