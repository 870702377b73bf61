"""Which sources a run executes in which pass, and how. Pure.

The first pass executes everything. Sources get lost on the way: a worker dies, a task is torn, Ray
Data drops a block. A run executes them again, in this order:

1. **All of them**, each in a read task of its own.
2. **Halves** of what got lost, then halves of what got lost again. Sources that share a batch or an
   actor get lost together, and a smaller group sets free those that only had a bad neighbor.
   Splitting stops when it frees no source any more: then each source does damage itself, or a node
   or the environment is broken. It is left out if the pass before has freed some sources, and the
   rest are so few that each can be executed alone.
3. **One source at a time.** Only a source that gets lost alone is known to do the damage. It has
   failed, and comes nearer to quarantine. Sources without a failed run go first, so that each run
   tries others, and enough runs try all.
4. **The rest**, in one last pass that ignores no crash. The passes before may have ignored an error
   of the user's code, which the user must see. Losses in this pass do not count.

After the first crash, passes of many sources ignore crashes, so that one bad source costs only
itself. They ignore a bounded number, and a run has a bounded number of passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["MAX_FURTHER_PASSES", "MIN_ALONE", "PassPlan", "PassSchedule"]

MAX_FURTHER_PASSES = 24
"""How many passes a run makes after the first."""

MIN_ALONE = 8
"""So many of the further passes are kept for sources that are executed alone.

In a run in which no source completes, as many sources without a failed run are executed alone:
perhaps the environment is at fault, and not they.
"""

# The last pass, of sources that were not executed alone.
_MAX_SPLITTING_PASSES = MAX_FURTHER_PASSES - MIN_ALONE - 1

# Splitting stops after so many groups in a row that were lost whole: two halves and two quarters.
# Where isolated sources have been freed before, the two halves are enough.
_MAX_FRUITLESS = 4

# A pass ignores so many crashes, or one for so many of its sources: in a broken environment each
# source would cost the time of a crash.
_MIN_IGNORED = 64
_SOURCES_PER_IGNORED = 20


@dataclass(frozen=True)
class PassPlan:
    """The sources that a pass executes, and how.

    ``isolated``: each source in a read task of its own. ``ignore_crashes``: how many blocks the
    pass may lose to crashes before it ends. Their sources stay pending, and the others go on. With
    0, the pass ends with the first error.
    """

    sources: Sequence[int]
    isolated: bool = False
    ignore_crashes: int = 0


class PassSchedule:
    """The passes of one run of ``source_count`` sources.

    Call :meth:`next` and :meth:`record_result` in turn.

    Args:
        failed_runs: returns in how many earlier runs a source has failed.

    Attributes:
        lost_alone: the sources that got lost although they were executed alone, each with the
            error of its worker's death, or None if the worker lives.
        not_tried: when all passes are over, the sources that got lost with others, and were not
            executed alone; ascending.

    Guarantees: at most ``1 + MAX_FURTHER_PASSES`` passes. Enough runs execute every source alone
    that gets lost in each of them, unless a run ends early.
    """

    def __init__(
        self,
        source_count: int,
        *,
        failed_runs: Callable[[int], int] = lambda source: 0,
    ) -> None:
        self.lost_alone: dict[int, str | None] = {}
        self.not_tried: list[int] = []
        self._failed_runs = failed_runs
        # The sources that the latest pass left incomplete, without an explanation.
        self._lost: set[int] = set()
        self._crash: str | None = None
        self._known = self._known_before = source_count
        self._completed = 0
        self._has_completed = self._has_crashed = False
        self._passes_left = 1 + MAX_FURTHER_PASSES
        self._plans = self._plan_passes(source_count)
        self._next: PassPlan | None = None
        self._advance()

    def next(self) -> PassPlan | None:
        """Return what the next pass executes; None if the run is over."""
        return self._next

    def record_result(
        self,
        pending: Collection[int],
        *,
        known: int | None = None,
        failed: Collection[int] = (),
        crash: str | None = None,
    ) -> None:
        """Record how the pass ended.

        Args:
            pending: the sources of the run that are not complete.
            known: how many sources the run has, if more have come to be in the pass: row ranges,
                while their file was read.
            failed: those of them of which rows have failed: they wait for the next run.
            crash: the error of a worker's death, if that ended the pass.
        """
        self._lost = set(pending).difference(failed)
        self._crash = crash
        self._has_crashed |= crash is not None
        self._known_before, self._known = self._known, known or self._known
        completed = self._known - len(pending)
        self._has_completed |= completed > self._completed
        self._completed = completed
        self._advance()

    def _advance(self) -> None:
        self._next = next(self._plans, None)
        self._passes_left -= 1

    def _plan_passes(self, source_count: int) -> Iterator[PassPlan]:
        """Yield each pass; when the next one is asked for, its result is recorded."""
        yield PassPlan(range(source_count))
        group = sorted(self._lost)
        if not group:
            return
        suspects: list[int] = []
        has_freed = False
        if len(group) > 1:
            completed = self._completed
            yield self._plan_many(group)
            has_freed = self._completed > completed
            group = self._lost_of(group)
            if has_freed and len(group) <= self._passes_left:
                # Most of these do damage themselves. A crash costs as much time in a pass of many
                # sources as in a pass of one, and only the latter tells which source it is.
                suspects, group = group, []
            # Lost again and in an earlier run: these need no group to be suspected.
            suspects += [source for source in group if self._failed_runs(source)]
            group = [source for source in group if not self._failed_runs(source)]
        yield from self._split(group, suspects, _MAX_FRUITLESS // 2 if has_freed else 0)
        yield from self._try_alone(suspects)
        if self.not_tried and self._has_crashed and self._passes_left:
            yield PassPlan(self.not_tried, isolated=True)
            self.not_tried = sorted(self._lost.intersection(self.not_tried))

    def _split(self, group: list[int], suspects: list[int], fruitless: int) -> Iterator[PassPlan]:
        """Execute halves of ``group``, and halves of what gets lost; add to ``suspects``."""
        groups = deque(_halves(group))
        passes_kept = MAX_FURTHER_PASSES - _MAX_SPLITTING_PASSES
        while groups:
            group = groups.popleft()
            hopeless = fruitless == _MAX_FRUITLESS or self._passes_left <= passes_kept
            if hopeless or len(group) == 1:
                suspects += group
                continue
            completed = self._completed
            yield self._plan_many(group)
            fruitless = 0 if self._completed > completed else fruitless + 1
            groups.extend(_halves(self._lost_of(group)))

    def _try_alone(self, suspects: Iterable[int]) -> Iterator[PassPlan]:
        """Execute one source at a time."""
        sources = deque(sorted(sorted(suspects), key=self._failed_runs))
        fresh = 0
        while sources:
            source = sources.popleft()
            # If not all can be executed alone, the last pass is for those that were not.
            all_fit = not self.not_tried and len(sources) < self._passes_left
            is_fresh = not self._failed_runs(source)
            if self._passes_left < (1 if all_fit else 2) or (
                is_fresh and fresh >= MIN_ALONE and not self._has_completed
            ):
                self.not_tried.append(source)
                continue
            fresh += is_fresh
            yield PassPlan([source], isolated=True)
            if new := self._lost_new():
                # It came with others that were not known: none of them was alone.
                sources.extend(new)
                sources.extend([source] if source in self._lost else ())
            elif source in self._lost:
                self.lost_alone[source] = self._crash
        self.not_tried.sort()

    def _plan_many(self, group: list[int]) -> PassPlan:
        ignored = max(_MIN_IGNORED, len(group) // _SOURCES_PER_IGNORED)
        return PassPlan(group, isolated=True, ignore_crashes=ignored if self._has_crashed else 0)

    def _lost_of(self, group: list[int]) -> list[int]:
        return [source for source in group if source in self._lost] + self._lost_new()

    def _lost_new(self) -> list[int]:
        """Return the lost sources that came to be in the latest pass."""
        return sorted(source for source in self._lost if source >= self._known_before)


def _halves(group: list[int]) -> list[list[int]]:
    middle = len(group) // 2
    return [half for half in (group[:middle], group[middle:]) if half]
