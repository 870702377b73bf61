"""What a run has to say when it is over."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

__all__ = ["RunSummary"]


@dataclass(frozen=True)
class RunSummary:
    """The outcome of one ``resumable_write``, for this run's share of the sources.

    ``sources_total`` is the sum of the other five ``sources_`` counts. ``sources_skipped`` were
    completed by earlier runs. ``rows_read``, ``rows_written`` and ``files`` belong to
    ``sources_completed``. ``sources_removed`` counts sources that were not in the input any more
    and whose output was removed. ``duration_s`` is wall time in seconds.
    """

    run_id: str
    sources_total: int
    sources_skipped: int
    sources_completed: int
    sources_failed: int
    sources_pending: int
    sources_quarantined: int
    rows_read: int
    rows_written: int
    rows_dead_lettered: int
    files: int
    duration_s: float
    sources_removed: int = 0

    @override
    def __str__(self) -> str:
        text = (
            f"Run {self.run_id}: {self.sources_completed} of {self.sources_total} sources "
            f"completed in {self.duration_s:.1f} s, {self.sources_skipped} were done before. "
            f"{self.rows_read} rows read, {self.rows_written} written to {self.files} files."
        )
        if self.sources_removed:
            text += (
                f" The output of {self.sources_removed} sources that are not in the input any more "
                "was removed."
            )
        if self.rows_dead_lettered:
            text += f" {self.rows_dead_lettered} rows went to the dead letters."
        if self.sources_failed:
            text += f" {self.sources_failed} sources failed; the next run reads them again."
        if self.sources_quarantined:
            text += (
                f" {self.sources_quarantined} sources are quarantined: they failed in too many "
                "runs, and are passed over until they are reset."
            )
        if self.sources_pending:
            text += f" {self.sources_pending} sources are pending; run again to go on."
        return text
