"""Exports a run's counts as metrics of Ray, from the ledger's process.

Prometheus scrapes them where it scrapes Ray's own, with the tags ``checkpoint`` and ``run``. Ray
puts ``ray_`` before each name, and ``_total`` after that of a counter. It collects at intervals
(10 seconds by default), so a short run may not show.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray_resume.run.progress import Counts, Latencies

__all__ = ["NAMES", "export_regularly"]

logger = logging.getLogger("ray_resume")

_INTERVAL_S = 2.0
# To count costs the ledger at most one part in so many of its time.
_TIME_SHARE = 100
_TAGS = ("checkpoint", "run")
_BOUNDARIES_S = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]

_GAUGES: dict[str, tuple[str, Callable[[Counts], int]]] = {
    "sources_completed": ("Complete sources of the run", lambda counts: counts.completed),
    "sources_committed": ("Committed sources of the run", lambda counts: counts.committed),
    "sources_failed": ("Pending sources with failed rows", lambda counts: counts.failed),
    "sources_quarantined": ("Sources quarantined by the run", lambda counts: counts.quarantined),
    "sources_pending": (
        "Sources that the run has still to complete",
        lambda counts: counts.sources - counts.completed,
    ),
    "rows_at_risk": (
        "Rows of sources that are not committed: the cost of a kill",
        lambda counts: counts.rows_at_risk,
    ),
}
_COUNTERS: dict[str, tuple[str, Callable[[Counts], int]]] = {
    "rows_read": ("Rows of complete sources, as read", lambda counts: counts.rows_read),
    "rows_written": ("Rows of complete sources, as written", lambda counts: counts.rows_written),
    "rows_dead_lettered": ("Rows in dead letters", lambda counts: counts.dead_rows),
    "messages": ("Messages that took effect", lambda counts: counts.messages),
}
_HISTOGRAMS: dict[str, tuple[str, Callable[[Latencies], tuple[float, ...]]]] = {
    "commit_seconds": ("Seconds of a commit", lambda latencies: latencies.commits),
    "publish_seconds": ("Seconds of a publication", lambda latencies: latencies.publications),
}

NAMES = frozenset(
    [f"ray_resume_{name}" for name in _GAUGES]
    + [f"ray_resume_{name}_total" for name in _COUNTERS]
    + [f"ray_resume_{name}_{part}" for name in _HISTOGRAMS for part in ("bucket", "count", "sum")]
)
"""The names as Prometheus has them."""


def export_regularly(
    counts: Callable[[], Counts], latencies: Callable[[], Latencies], checkpoint: str, run_id: str
) -> None:
    """Export the counts of a run every few seconds, in a thread, while this process lives.

    Args:
        counts: returns how far the run is.
        latencies: returns what was measured since its last call.
    """

    def export() -> None:
        try:
            metrics = _Metrics({"checkpoint": checkpoint, "run": run_id})
            while True:
                now = counts()
                metrics.update(now, latencies())
                time.sleep(max(_INTERVAL_S, _TIME_SHARE * now.took_s))
        except Exception as error:
            # A run needs no metrics, and not every installation of Ray has them.
            logger.debug("Run %s exports no more metrics: %r", run_id, error)

    threading.Thread(target=export, daemon=True).start()


class _Metrics:
    """The metrics of one run in this process."""

    def __init__(self, tags: Mapping[str, str]) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        def tagged(metric: Any) -> Any:
            return metric.set_default_tags(dict(tags))

        self._gauges = {
            name: tagged(Gauge(f"resume_{name}", text, _TAGS))
            for name, (text, _) in _GAUGES.items()
        }
        self._counters = {
            name: tagged(Counter(f"resume_{name}", text, _TAGS))
            for name, (text, _) in _COUNTERS.items()
        }
        self._histograms = {
            name: tagged(Histogram(f"resume_{name}", text, _BOUNDARIES_S, _TAGS))
            for name, (text, _) in _HISTOGRAMS.items()
        }
        self._counted = dict.fromkeys(_COUNTERS, 0)

    def update(self, counts: Counts, latencies: Latencies) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(_GAUGES[name][1](counts))
        for name, counter in self._counters.items():
            total = _COUNTERS[name][1](counts)
            if total > self._counted[name]:
                counter.inc(total - self._counted[name])
                self._counted[name] = total
        for name, histogram in self._histograms.items():
            for seconds in _HISTOGRAMS[name][1](latencies):
                histogram.observe(seconds)
