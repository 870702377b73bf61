"""`Slowest`: the sources that took longest, in bounded memory. Pure."""

from __future__ import annotations

import heapq

__all__ = ["MOST", "Slowest"]

MOST = 20
"""A run keeps so many."""


class Slowest:
    """The :data:`MOST` sources that took longest of those that were added."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []

    def add(self, source: int, seconds: float) -> None:
        """Add a source by its number."""
        if len(self._heap) < MOST:
            heapq.heappush(self._heap, (seconds, source))
        elif seconds > self._heap[0][0]:
            heapq.heapreplace(self._heap, (seconds, source))

    def seconds(self) -> dict[int, float]:
        """Return how long each took, the longest first, to the millisecond."""
        return {source: round(seconds, 3) for seconds, source in sorted(self._heap, reverse=True)}
