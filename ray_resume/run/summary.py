"""`RunSummary`: the outcome of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from typing_extensions import override

from ray_resume.core.stages import StageNumbers
from ray_resume.errors import IncompleteError

__all__ = ["RunSummary"]


@dataclass(frozen=True)
class RunSummary:
    """The outcome of one ``resumable_write``, for this run's share of the sources.

    ``sources_total`` is the sum of the other five ``sources_`` counts. ``sources_skipped`` were
    completed by earlier runs. ``rows_read``, ``rows_written`` and ``files`` belong to
    ``sources_completed``. ``sources_removed`` counts sources that are no longer in the input, whose
    output the run removed. ``duration_s`` is wall time in seconds.

    A source gets lost if its worker dies, for example. ``lost_alone`` has the sources that got lost
    although each was executed alone, by their ids, with the reason. ``sources_not_tried`` counts
    those that got lost with others, and were not executed alone in this run. Both are among
    ``sources_failed`` and ``sources_quarantined``, but only the former come nearer to quarantine.

    ``stages`` has numbers of each decorated UDF, in the order of the pipeline. ``stats`` is what
    ``ds.stats()`` of plain Ray Data says, of each pass; empty if nothing was executed.
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
    lost_alone: Mapping[str, str] = field(default_factory=dict, hash=False)
    sources_not_tried: int = 0
    stages: tuple[StageNumbers, ...] = ()
    stats: str = field(default="", repr=False)

    @property
    def complete(self) -> bool:
        """Whether every source of this run's share is completed, by this run or an earlier one.

        No source is failed, pending or quarantined. Sources with dead letters are completed: the
        pipeline has said that such rows go there.
        """
        return not self._left()

    def raise_if_incomplete(self) -> None:
        """Raise an error if a source is failed, pending or quarantined: a scheduler sees it.

        Raises:
            IncompleteError: with this summary as its ``summary``.
        """
        left = self._left()
        if left:
            raise IncompleteError(
                f"{sum(left.values()):,} of {self.sources_total:,} sources are not completed: "
                f"{', '.join(f'{count:,} {state}' for state, count in left.items())}. All others "
                "are committed and safe. `ray-resume sources CHECKPOINT` says which they are, and "
                f"why. {self._way_out(left)}\n{self}",
                self,
            )

    def _left(self) -> dict[str, int]:
        left = {
            "failed": self.sources_failed,
            "pending": self.sources_pending,
            "quarantined": self.sources_quarantined,
        }
        return {state: count for state, count in left.items() if count}

    def _way_out(self, left: Mapping[str, int]) -> str:
        steps = []
        if left.keys() - {"quarantined"}:
            steps.append("Run the same script again to go on with the failed and pending ones.")
        if "quarantined" in left:
            steps.append(
                "Once their cause is mended, `ray-resume reset CHECKPOINT --state quarantined` has "
                "the next run try the quarantined ones again."
            )
        return " ".join(steps)

    @override
    def __str__(self) -> str:
        text = (
            f"Run {self.run_id}: {self.sources_completed} of {self.sources_total} sources "
            f"completed in {self.duration_s:.1f} s, {self.sources_skipped} were done before. "
            f"{self.rows_read} rows read, {self.rows_written} written to {self.files} files."
        )
        if self.sources_removed:
            text += (
                f" The run removed the output of {self.sources_removed} sources that are no longer "
                "in the input."
            )
        if self.rows_dead_lettered:
            text += f" {self.rows_dead_lettered} rows went to the dead letters."
        if self.sources_failed:
            text += f" {self.sources_failed} sources failed; the next run reads them again."
        if self.lost_alone:
            source_id, how = next(iter(self.lost_alone.items()))
            text += (
                f" {len(self.lost_alone)} sources got lost although each was executed alone. The "
                f"first is {source_id}: {how}."
            )
        if self.sources_not_tried:
            text += (
                f" {self.sources_not_tried} sources got lost with others, and were not executed "
                "alone in this run. The next run begins with them."
            )
        if self.sources_quarantined:
            text += (
                f" {self.sources_quarantined} sources are quarantined: they failed in too many "
                "runs, and runs skip them until they are reset."
            )
        if self.sources_pending:
            text += f" {self.sources_pending} sources are pending; run again to go on."
        return text
