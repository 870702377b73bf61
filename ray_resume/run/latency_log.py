"""`LatencyLog`: how long the newest commits and publications took."""

from __future__ import annotations

from collections import deque

from ray_resume.run.progress import Latencies

__all__ = ["LatencyLog"]

_MOST_LATENCIES = 10_000


class LatencyLog:
    """Keeps how many seconds commits and publications took, until `take`. Not thread-safe."""

    def __init__(self) -> None:
        self.commits_s: deque[float] = deque(maxlen=_MOST_LATENCIES)
        self.publications_s: deque[float] = deque(maxlen=_MOST_LATENCIES)

    def take(self) -> Latencies:
        """Return what was not taken yet."""
        latencies = Latencies(tuple(self.commits_s), tuple(self.publications_s))
        self.commits_s.clear()
        self.publications_s.clear()
        return latencies
