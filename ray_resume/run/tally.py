"""`Tally`: sums over the sources that a run has completed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ray_resume.core.file_count import FileCount
from ray_resume.core.messages import Completion
from ray_resume.core.run_sources import RunSources
from ray_resume.core.slowest import Slowest

__all__ = ["Tally"]


class Tally:
    """Counts the completed sources and their rows, before they are committed. Not thread-safe.

    Attributes:
        completed: how many sources, without the ends of files that reads divide into row ranges.
        ends: how many such ends. They are sources of the ledger, and none of the user.
        rows_read: rows that were read of them; likewise ``rows_written``, ``dead_rows``.
    """

    def __init__(self) -> None:
        self.completed = self.ends = 0
        self.rows_read = self.rows_written = self.dead_rows = 0
        self._files = FileCount()
        self._slowest = Slowest()

    def add(self, done: Sequence[Completion]) -> None:
        """Count sources that are complete now."""
        self.ends += sum([one.end is not None for one in done])
        self.completed += sum([one.end is None for one in done])
        self.rows_read += sum([one.rows_read for one in done])
        self.rows_written += sum([one.rows_written for one in done])
        self.dead_rows += sum([one.dead_rows for one in done])
        now = time.time()
        for one in done:
            self._files.add(one.parts)
            if one.began_at and one.end is None:
                # The clocks of two hosts differ.
                self._slowest.add(one.source, max(0.0, now - one.began_at))

    def files(self) -> int:
        """Return how many files hold their rows."""
        return int(self._files)

    def slowest(self, sources: RunSources) -> dict[str, float]:
        """Return the seconds that the slowest of them took, by their ids."""
        return {sources.id(number): s for number, s in self._slowest.seconds().items()}
