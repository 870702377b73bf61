"""The lines in the log with which a run begins and ends."""

from __future__ import annotations

import logging
import os
import sys

import ray

from ray_resume.checkpoint.contents import Contents
from ray_resume.core.resume_plan import ResumePlan
from ray_resume.core.wording import counted
from ray_resume.run.run_plan import RunPlan
from ray_resume.run.summary import RunSummary

__all__ = ["announce_end", "announce_start"]

logger = logging.getLogger("ray_resume")


def announce_start(run_id: str, plan: RunPlan, resume_plan: ResumePlan, contents: Contents) -> None:
    """Log where the run reads and writes, and what it has to do."""
    if not plan.announces:
        return
    total, done = resume_plan.total, resume_plan.done
    parts = [
        f"{done:,} of {counted(total, 'source')} done",
        f"{len(resume_plan.pending):,} to do" if resume_plan.pending else "nothing to do",
    ]
    if resume_plan.quarantined:
        parts.insert(1, f"{resume_plan.quarantined:,} quarantined")
    logger.info(
        "Run %s: checkpoint %s (%s), output %s: %s. This is ray_resume %s with Ray %s.",
        run_id,
        _absolute(plan.storage.uri),
        "it goes on" if contents.headers else "new",
        _absolute(plan.output.uri),
        ", ".join(parts),
        vars(sys.modules["ray_resume"])["__version__"],
        ray.__version__,
    )


def announce_end(plan: RunPlan, summary: RunSummary) -> None:
    """Log what the run did."""
    if plan.announces:
        logger.info("%s", summary)


def _absolute(uri: str) -> str:
    """Return a path from the root, and any other name as it is."""
    return os.path.abspath(uri) if os.path.exists(uri) else uri
