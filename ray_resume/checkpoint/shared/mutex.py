"""Mutual exclusion among processes that share nothing but a storage of objects.

This is Lamport's bakery ("A New Solution of Dijkstra's Concurrent Programming Problem", CACM 1974).
A process announces that it is choosing, and takes a number higher than all that it sees. It waits
until no process is choosing and none has a lower number. The algorithm needs only that a later
listing shows what was written, so a single object is all that must be atomic.

Processes die and stop. A process removes a ticket before its own that stays for ``patience_s`` on
its clock. So each process has only half of that time for its turn. :meth:`Turn.confirm` says
afterwards whether the turn was over in time. An effect without that confirmation must be undone and
counts for nothing. Clocks of different hosts are never compared. A ticket's name says how patient
others must be with it, so the patience may differ.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ray_resume.checkpoint.objects import Objects

__all__ = ["BakeryMutex", "Turn", "TurnExpiredError", "boottime_s"]

_ENTRY = re.compile(r"[0-9a-z]+/(?:a-[0-9]+|b-([0-9]{12}))-([0-9a-f]+)-([0-9]+)")
_SHORTEST_POLL_S = 0.05
_LONGEST_POLL_S = 1.0

# Each choice has another name, so that a process that chooses again does not seem stuck.
_choices = itertools.count(1)


def boottime_s() -> float:
    """Return seconds on a clock of this host that is never set, and runs while it is suspended."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


class TurnExpiredError(Exception):
    """A process was too slow, and others may be inside. It must undo its changes."""


class Turn:
    """A stay inside. At ``began_at``, no other process was there."""

    def __init__(self, began_at: float, limit_s: float, clock: Callable[[], float]) -> None:
        self._began_at = began_at
        self._limit_s = limit_s
        self._clock = clock

    def confirm(self) -> None:
        """Make sure that no other process could be inside up to now.

        Raises:
            TurnExpiredError: the turn took too long.
        """
        if self._clock() - self._began_at > self._limit_s:
            raise TurnExpiredError


class BakeryMutex:
    """A queue in the folder ``folder`` of ``objects``, for one process or thread.

    Args:
        who: hexadecimal digits that no other process or thread uses.
        patience_s: how long its ticket may stay before others remove it.
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
        self._choosing = ""

    @contextlib.contextmanager
    def acquire(self) -> Iterator[Turn]:
        """Wait for this process's turn, and leave after it.

        Any error, :class:`TurnExpiredError` among them, ends the turn as well.

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
        """Return a time before this process's ticket was there, and the ticket."""
        mine = f"{self._who}-{round(self._patience_s * 1000)}"
        while True:
            began_at = self._clock()
            self._choosing = f"{self._folder}/a-{next(_choices)}-{mine}"
            self._objects.put(self._choosing, b"")
            tickets = _entries(self._objects.list(self._folder))
            number = max((entry.number for entry in tickets), default=0) + 1
            ticket = f"{self._folder}/b-{number:012d}-{mine}"
            taken_at = self._clock()
            self._objects.put(ticket, b"")
            self._objects.delete([self._choosing])
            if self._clock() - began_at < self._patience_s / 2:
                return taken_at, ticket
            # A process that waited for this choice may have given up before it saw the number.
            self._objects.delete([ticket])

    def _wait(self, ticket: str, looked_at: float) -> float | None:
        """Wait for this process's turn; return when it was seen, None if the ticket is lost."""
        (own,) = _entries([ticket])
        # A process that was choosing before this ticket was there may get a lower number.
        choosers: set[str] | None = None
        # The entry that this process waits for, and since when.
        still: tuple[str, float] | None = None
        while True:
            before, looked_at = looked_at, self._clock()
            # A listing is no snapshot: the choosers must be gone before the numbers are looked at.
            nobody_chooses = choosers is not None and not choosers
            names = self._objects.list(self._folder)
            if ticket not in names or looked_at - before > self._patience_s / 4:
                return None  # Others may have lost their patience with this ticket.
            others = [entry for entry in _entries(names) if entry.who != self._who]
            choosing = [entry for entry in others if entry.number == 0]
            now = {entry.name for entry in choosing}
            choosers = now if choosers is None else choosers & now
            ahead = [entry for entry in others if entry.number > 0 and entry.place < own.place]
            if nobody_chooses and not ahead:
                return looked_at
            if choosing or ahead:
                # The first one will do: those behind it cannot move before it does.
                blocker = min(choosing or ahead, key=lambda entry: (entry.place, entry.name))
                if still is None or still[0] != blocker.name:
                    still = blocker.name, self._clock()
                elif looked_at - still[1] > blocker.patience_s:
                    self._objects.delete([blocker.name])
                    still = None
                place = len(ahead) + len(choosers)
                self._sleep(
                    min(_SHORTEST_POLL_S * max(1, place), _LONGEST_POLL_S, self._patience_s / 8)
                )

    def _leave(self, ticket: str | None) -> None:
        self._objects.delete([self._choosing, *([] if ticket is None else [ticket])])


@dataclass(frozen=True)
class _Entry:
    """An entry in the queue: a ticket or, with number 0, a process that is choosing one."""

    name: str
    number: int
    who: str
    patience_s: float

    @property
    def place(self) -> tuple[int, str]:
        return self.number, self.who


def _entries(names: Iterable[str]) -> list[_Entry]:
    matches = ((name, _ENTRY.fullmatch(name)) for name in names)
    return [
        _Entry(name, int(match[1] or 0), match[2], int(match[3]) / 1000)
        for name, match in matches
        if match is not None
    ]
