"""Which sources a run executes in which pass, and how. Pure.

The first pass executes everything. What got lost on the way (a lost worker, a torn task, a block
that Ray Data dropped) is executed again, each source in a read task of its own, as long as that
makes progress. What is left then is executed one source at a time, so that it is known which of
them does the damage: what gets lost alone has failed, and counts towards quarantine.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["MAX_PASSES", "MAX_SUSPECTS", "PassPlan", "Schedule"]

MAX_PASSES = 4
"""How many passes are made of many sources."""

MAX_SUSPECTS = 16
"""Of more than so many, none is executed alone: something else is wrong."""


@dataclass(frozen=True)
class PassPlan:
    """What a pass executes.

    ``isolated``: each source in a read task of its own. ``tolerant``: what a crash drops is left
    pending, and the rest goes on; without it, a pass ends with the first error.
    """

    sources: Sequence[int]
    isolated: bool = False
    tolerant: bool = False


class Schedule:
    """The passes of one run of ``source_count`` sources.

    Ask :meth:`next` and tell :meth:`ended` in turn. ``lost`` holds the sources that got lost
    although they were executed alone, and what their worker died of, if it did.
    """

    def __init__(self, source_count: int) -> None:
        self.lost: dict[int, str | None] = {}
        self._passes = 0
        self._pending = source_count
        self._next: PassPlan | None = PassPlan(range(source_count))
        self._suspects: list[int] | None = None

    def next(self) -> PassPlan | None:
        """Return what the next pass executes; None if the run is over."""
        return self._next

    def ended(
        self,
        pending: Collection[int],
        *,
        failed: Collection[int] = (),
        waiting: Collection[int] = (),
        crash: str | None = None,
    ) -> None:
        """Tell how the pass ended.

        Args:
            pending: the sources of the run that are not complete.
            failed: those of them of which rows have failed: they wait for the next run.
            waiting: those of them that only wait for others, with which they share files.
            crash: what a worker died of, if that ended the pass.
        """
        self._passes += 1
        unexplained = sorted(set(pending) - set(failed))
        lost = sorted(set(unexplained) - set(waiting))
        assert self._next is not None
        if len(self._next.sources) == 1 and self._passes > 1 and not self._next.tolerant:
            self.lost.update((source, crash) for source in self._next.sources if source in lost)
        if self._suspects is None:
            progress = len(pending) < self._pending
            self._pending = len(pending)
            if unexplained and self._passes < MAX_PASSES and (progress or self._passes == 1):
                tolerant = crash is not None and len(unexplained) > 1
                self._next = PassPlan(unexplained, isolated=True, tolerant=tolerant)
                return
            suspects = [source for source in lost if source not in self.lost]
            self._suspects = suspects if len(suspects) <= MAX_SUSPECTS else []
            if len(suspects) > MAX_SUSPECTS and self._next.tolerant:
                # What was tolerated may be an error of the user's, who must see it.
                self._next = PassPlan(suspects, isolated=True)
                return
        remaining = [s for s in self._suspects if s in lost and s not in self.lost]
        self._suspects = remaining[1:]
        self._next = PassPlan(remaining[:1], isolated=True) if remaining else None
