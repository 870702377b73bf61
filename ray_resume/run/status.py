"""`Status`: what a user sees of a run that goes on; `StatusKeeper` makes it of the ledger's counts.

It knows neither Ray nor a clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from ray_resume.core.pace import Pace
from ray_resume.core.wording import counted, duration
from ray_resume.run.progress import Counts

__all__ = ["Status", "StatusKeeper"]


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        sources_total: the run's share of the sources.
        sources_skipped: what earlier runs completed.
        sources_completed: what this run has completed and committed.
        sources_failed: sources with failed rows, which this run does not complete.
        rows_read: rows of completed sources, and of those at work that were read to their end.
        rows_at_risk: rows that were read or written, of sources that are not committed: the cost of
            a kill.
        left_s: an estimate in seconds; None if it is unknown. Failed sources have no part in it.
    """

    sources_total: int
    sources_skipped: int
    sources_completed: int
    sources_failed: int
    sources_quarantined: int
    rows_read: int
    rows_at_risk: int
    pass_number: int = 1
    rows_per_s: float | None = None
    sources_per_s: float | None = None
    left_s: float | None = None

    @property
    def sources_done(self) -> int:
        """Return how many sources are completed, by this run or an earlier one."""
        return self.sources_skipped + self.sources_completed

    @override
    def __str__(self) -> str:
        percent = 100 * self.sources_done // max(1, self.sources_total)
        done = f"{self.sources_done:,} of {counted(self.sources_total, 'source')} ({percent} %)"
        return f"{done} completed{self.details}"

    @property
    def details(self) -> str:
        """Return all but the number of completed sources, each part after a comma."""
        parts = [
            self.sources_skipped and f"{self.sources_skipped:,} of them before",
            self.sources_failed and f"{self.sources_failed:,} failed",
            self.sources_quarantined and f"{self.sources_quarantined:,} quarantined",
            counted(self.rows_read, "row"),
            self.rows_per_s is not None and f"{_rate(self.rows_per_s)} rows/s",
            self.sources_per_s is not None and f"{_rate(self.sources_per_s)} sources/s",
            self.left_s is not None and f"{duration(self.left_s)} left",
            self.rows_at_risk and f"{counted(self.rows_at_risk, 'row')} at risk",
            self.pass_number > 1 and f"pass {self.pass_number}",
        ]
        return "".join(f", {part}" for part in parts if part)


class StatusKeeper:
    """Makes each `Status` of one run, from counts as they come.

    Args:
        total: the run's share of the sources.
        skipped: how many of them earlier runs have completed.
        quarantined: how many of them are passed over.
    """

    def __init__(self, total: int, skipped: int, quarantined: int) -> None:
        self._total, self._skipped, self._quarantined = total, skipped, quarantined
        self._sources, self._rows = Pace(), Pace()
        self._pass_number = 0

    def of(self, counts: Counts, now: float) -> Status:
        """Return the status at ``now``, seconds of a monotonic clock."""
        if counts.pass_number != self._pass_number:
            # A further pass has the hard sources, and executes them alone: it is slower.
            self._pass_number = counts.pass_number
            self._sources, self._rows = Pace(), Pace()
        rows = counts.rows_read + counts.rows_in_flight
        self._sources.update(now, counts.completed)
        self._rows.update(now, rows)
        remaining = counts.sources - counts.completed - counts.failed
        return Status(
            sources_total=self._total + counts.grown,
            sources_skipped=self._skipped,
            sources_completed=counts.committed,
            sources_failed=counts.failed,
            sources_quarantined=self._quarantined,
            rows_read=rows,
            rows_at_risk=counts.rows_at_risk,
            pass_number=counts.pass_number,
            rows_per_s=self._rows.rate(now),
            sources_per_s=self._sources.rate(now),
            left_s=self._sources.left_s(now, remaining),
        )


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
