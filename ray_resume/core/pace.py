"""`Pace`: how fast a count grows, and how long the rest will take. Pure: the caller has the clock.

Counts of a pipeline grow in lumps: sources are committed together, and nothing is done while a
model loads. So an estimate begins with the first growth, which warm-up and skipped sources have no
part in. A wait as long as an earlier one is no reason to call the pipeline slow. A longer one is.
"""

from __future__ import annotations

import itertools
from collections import deque

__all__ = ["Pace"]

_MOST_POINTS = 1000


class Pace:
    """How fast one count grows.

    Args:
        window_s: growth from before that many seconds no longer counts, unless it is all there is.
    """

    def __init__(self, window_s: float = 120.0) -> None:
        self._window_s = window_s
        self._count: float | None = None
        # The moments at which the count had grown, and the count then.
        self._points: deque[tuple[float, float]] = deque(maxlen=_MOST_POINTS)

    def update(self, now: float, count: float) -> None:
        """Take the count at ``now``. A smaller one than before starts the estimate again."""
        if self._count is None or count < self._count:
            self._points.clear()
        elif count > self._count:
            self._points.append((now, count))
            while len(self._points) > 2 and self._points[1][0] <= now - self._window_s:
                self._points.popleft()
        self._count = count

    def rate(self, now: float) -> float | None:
        """Return the growth per second up to ``now``; None before the count has grown twice."""
        if len(self._points) < 2:
            return None
        times = [time for time, _ in self._points]
        longest_wait_s = max(after - before for before, after in itertools.pairwise(times))
        over_s = max(times[-1], now - longest_wait_s) - times[0]
        grown = self._points[-1][1] - self._points[0][1]
        return grown / over_s if over_s > 0 else None

    def left_s(self, now: float, remaining: float) -> float | None:
        """Return how many seconds the count needs to grow by ``remaining``; None if unknown."""
        if remaining <= 0:
            return 0.0
        rate = self.rate(now)
        return None if rate is None else remaining / rate
