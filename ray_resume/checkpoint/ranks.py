"""`RankDraw`: draws the rank of one task among the tasks of its array.

A rank is an empty object, ``arrays/<array>/<rank>-<task>``.
"""

from __future__ import annotations

import re

from ray_resume.checkpoint.objects import Objects
from ray_resume.core.digests import source_digest
from ray_resume.core.shards import ArrayTask
from ray_resume.errors import CheckpointError

__all__ = ["RankDraw"]


class RankDraw:
    """One task's draw. Call its methods while no other process draws."""

    def __init__(self, objects: Objects, task: ArrayTask) -> None:
        self._objects = objects
        self._task = task
        self._folder = f"arrays/{source_digest(task.array).hex()}"
        self._drawn: list[str] = []

    def draw(self) -> int:
        """Return the task's rank: the one that it has already, or the lowest that is free.

        Raises:
            CheckpointError: more tasks than ``task.count`` ask.
        """
        task, ranks = self._task, self._ranks()
        if task.index in ranks:
            return ranks[task.index]
        if len(ranks) >= task.count:
            tasks = sorted(ranks, key=ranks.__getitem__)
            raise CheckpointError(
                f"The array ({task.array}) has drawn all its ranks, for the tasks "
                f"{', '.join(map(str, tasks))}, and task {task.index} is one more. Is the "
                "count right? If the array is another one with the same id, pass "
                "shard=(index, count) instead."
            )
        rank = min(set(range(task.count)) - set(ranks.values()))
        self._drawn = [f"{self._folder}/{rank:06d}-{task.index}"]
        self._objects.put(self._drawn[0], b"")
        return rank

    def undo(self) -> None:
        """Remove the rank that the last call of :meth:`draw` has drawn, if it has drawn one."""
        self._objects.delete(self._drawn)

    def _ranks(self) -> dict[int, int]:
        """Return the drawn ranks by the task's index."""
        ranks = {}
        for name in self._objects.list(self._folder):
            match = re.fullmatch(r"([0-9]+)-([0-9]+)", name.rpartition("/")[2])
            if match:
                ranks[int(match[2])] = int(match[1])
        return ranks
