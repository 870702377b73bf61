"""`RunSummary`: the outcome of a run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from typing_extensions import override

from ray_resume.core.markup import bar, panel, table
from ray_resume.core.stages import StageNumbers
from ray_resume.core.wording import counted, duration
from ray_resume.errors import IncompleteError

__all__ = ["RunSummary"]

_MOST_LOST = 10


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
        number = sum(left.values())
        if left:
            raise IncompleteError(
                f"{number:,} of {counted(self.sources_total, 'source')} "
                f"{'is' if number == 1 else 'are'} not completed: "
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
            f"Run {self.run_id}: {self.sources_completed:,} of "
            f"{counted(self.sources_total, 'source')} completed in {self.duration_s:.1f} s, "
            f"{_were(self.sources_skipped)} done before. {counted(self.rows_read, 'row')} read, "
            f"{self.rows_written:,} written"
        )
        # A table's files are the table's own; neither were files written if no rows were.
        text += f" to {counted(self.files, 'file')}." if self.files else "."
        if self.sources_removed:
            gone = counted(self.sources_removed, "source")
            text += f" The run removed the output of {gone} no longer in the input."
        if self.rows_dead_lettered:
            text += f" {counted(self.rows_dead_lettered, 'row')} went to the dead letters."
        if self.sources_failed:
            them = "it" if self.sources_failed == 1 else "them"
            failed = counted(self.sources_failed, "source")
            text += f" {failed} failed; the next run reads {them} again."
        if self.lost_alone:
            source_id, how = next(iter(self.lost_alone.items()))
            lost = counted(len(self.lost_alone), "source")
            text += (
                f" {lost} got lost although each was executed alone. The first is {source_id}: "
                f"{how}."
            )
        if self.sources_not_tried:
            text += (
                f" {counted(self.sources_not_tried, 'source')} got lost with others, and "
                f"{'was' if self.sources_not_tried == 1 else 'were'} not executed alone in this "
                "run. The next run begins there."
            )
        if self.sources_quarantined:
            text += (
                f" {_are(self.sources_quarantined)} quarantined: too many runs failed there. Runs "
                "skip quarantined sources until a reset."
            )
        if self.sources_pending:
            text += f" {_are(self.sources_pending)} pending; run again to go on."
        return text

    def _repr_html_(self) -> str:
        done = self.sources_skipped + self.sources_completed
        rows = [
            ("Completed by this run", counted(self.sources_completed, "source")),
            ("Completed before", counted(self.sources_skipped, "source")),
            *(
                (state.capitalize(), counted(count, "source"))
                for state, count in self._left().items()
            ),
            ("Rows", f"{self.rows_read:,} read, {self.rows_written:,} written"),
            *([("Files", f"{self.files:,}")] if self.files else []),
            ("Took", duration(self.duration_s)),
        ]
        if self.rows_dead_lettered:
            rows.append(("Dead letters", counted(self.rows_dead_lettered, "row")))
        rows += [(f"Lost alone: {source_id}", how) for source_id, how in self._some_lost()]
        return panel(
            f"Run {self.run_id}: {done:,} of {counted(self.sources_total, 'source')} completed",
            bar([("completed", done), *self._left().items()]),
            table(rows),
        )

    def _some_lost(self) -> Iterable[tuple[str, str]]:
        return itertools.islice(self.lost_alone.items(), _MOST_LOST)


def _were(number: int) -> str:
    return f"{number:,} {'was' if number == 1 else 'were'}"


def _are(sources: int) -> str:
    return f"{counted(sources, 'source')} {'is' if sources == 1 else 'are'}"
