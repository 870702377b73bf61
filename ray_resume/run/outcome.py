"""`Outcome`: what the passes of a run have come to, and what the run says of it at its end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_resume.core.resume_plan import ResumePlan
from ray_resume.core.stages import by_name, numbers_of
from ray_resume.run.progress import Progress
from ray_resume.run.reader_exception import error_of_unread
from ray_resume.run.run_plan import RunPlan
from ray_resume.run.summary import RunSummary

__all__ = ["Outcome", "facts_of", "summary_of", "unread_error", "warn_ended_early"]

logger = logging.getLogger("ray_resume")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run's passes.

    ``failed`` and ``quarantined`` count sources that failed in this run; the latter have failed in
    too many. ``lost_alone`` and ``not_tried`` are those of `PassLoop`.
    """

    progress: Progress
    failed: int = 0
    quarantined: int = 0
    lost_alone: Mapping[str, str] = field(default_factory=dict)
    not_tried: int = 0


def facts_of(
    plan: RunPlan, progress: Progress, failed: int = 0, quarantined: int = 0
) -> dict[str, Any]:
    """Return how far a run is, by the names that `RunRecord` has."""
    return {
        "sources_completed": progress.committed,
        "sources_failed": failed,
        "sources_quarantined": quarantined,
        "rows_read": progress.rows_read,
        "rows_written": progress.rows_written,
        "rows_dead_lettered": progress.dead_rows,
        "rows_at_risk": progress.rows_in_flight,
        "slowest": progress.slowest,
        "files": progress.files,
        "stages": by_name(numbers_of(plan.stages, progress.stages)),
    }


def unread_error(plan: RunPlan, resume_plan: ResumePlan, progress: Progress) -> Exception | None:
    """Return the reader's error, if it raised for more sources than may have errors.

    The run has gone on to its end, and the failed sources are on record.
    """
    unread, allowed = progress.unread, plan.max_errored_blocks
    if unread is None or allowed < 0 or unread.count <= allowed:
        return None
    total = resume_plan.total + progress.grown
    return error_of_unread(unread, total, plan.policies.max_failed_runs)


def warn_ended_early(
    run_id: str, resume_plan: ResumePlan, progress: Progress, error: BaseException
) -> None:
    """Tell the user what is safe, although the run ends by ``error``."""
    logger.warning(
        "Run %s %s: %d of %d sources are completed and safe. Run the same script again to go "
        "on from there.",
        run_id,
        "ended with an error" if isinstance(error, Exception) else "was interrupted",
        resume_plan.done + progress.committed,
        resume_plan.total + progress.grown,
    )


def summary_of(
    run_id: str, plan: RunPlan, resume_plan: ResumePlan, outcome: Outcome, duration_s: float
) -> RunSummary:
    """Return the summary of a run that has reached its end."""
    progress = outcome.progress
    unfinished = (
        len(resume_plan.pending)
        + progress.grown
        - progress.committed
        - outcome.failed
        - outcome.quarantined
    )
    return RunSummary(
        run_id=run_id,
        sources_total=resume_plan.total + progress.grown,
        sources_skipped=resume_plan.done,
        sources_completed=progress.committed,
        sources_failed=outcome.failed,
        sources_pending=unfinished,
        sources_quarantined=resume_plan.quarantined + outcome.quarantined,
        rows_read=progress.rows_read,
        rows_written=progress.rows_written,
        rows_dead_lettered=progress.dead_rows,
        files=progress.files,
        duration_s=duration_s,
        sources_removed=progress.dropped,
        lost_alone=outcome.lost_alone,
        sources_not_tried=outcome.not_tried,
        stages=numbers_of(plan.stages, progress.stages),
    )
