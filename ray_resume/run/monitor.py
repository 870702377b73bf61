"""Watches a run's ledger from the driver, and shows how far the run is."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

from ray_resume.core.resume_plan import ResumePlan
from ray_resume.core.stages import Stage, StageCount, cut_batches
from ray_resume.run.display import Display
from ray_resume.run.progress import Counts
from ray_resume.run.run_plan import RunPlan
from ray_resume.run.status import StatusKeeper

__all__ = ["StageWatch", "shown"]

logger = logging.getLogger("ray_resume")

_END_WAIT_S = 1.0

# To count rows costs the ledger the more, the more sources are at work. It does not take more than
# one part in so many of its time.
_TIME_SHARE = 100


class StageWatch:
    """Warns once of each stage whose batches are cut into calls of few rows."""

    def __init__(self, run_id: str, stages: Sequence[Stage]) -> None:
        self._run_id = run_id
        self._silent = dict(enumerate(stages))

    def look(self, counts: Mapping[int, StageCount]) -> None:
        """Look at what the stages did so far, by their positions."""
        for position, count in counts.items():
            stage = self._silent.get(position)
            warning = None if stage is None else cut_batches(stage, count)
            if warning is not None:
                del self._silent[position]
                logger.warning("Run %s: %s", self._run_id, warning)


@contextlib.contextmanager
def shown(handle: Any, run_id: str, plan: RunPlan, resume_plan: ResumePlan) -> Iterator[StageWatch]:
    """Show how far run ``run_id`` is, as its plan says, until the block ends.

    Args:
        handle: the ledger's actor. A thread asks it for its counts at intervals.

    Yields:
        The thread's watch of the stages, which may look once more at the end.
    """
    keeper = StatusKeeper(resume_plan.total, resume_plan.done, resume_plan.quarantined)
    over = threading.Event()
    watch = StageWatch(run_id, plan.stages)
    shares = (handle, keeper, plan.display, watch, over)
    thread = threading.Thread(target=_show_until_over, args=shares, daemon=True)
    plan.display.begin(run_id)
    thread.start()
    try:
        yield watch
        over.set()
        thread.join(_END_WAIT_S)
        if plan.display.shows_end and not thread.is_alive():
            plan.display.show(keeper.of(ray.get(handle.counts.remote()), time.monotonic()))
    finally:
        over.set()
        thread.join(_END_WAIT_S)
        plan.display.end()


def _show_until_over(
    handle: Any,
    keeper: StatusKeeper,
    display: Display,
    watch: StageWatch,
    over: threading.Event,
) -> None:
    interval_s = display.interval_s
    try:
        while not over.wait(interval_s):
            counts: Counts = ray.get(handle.counts.remote())
            if over.is_set():
                return
            watch.look(counts.stages)
            display.show(keeper.of(counts, time.monotonic()))
            interval_s = max(display.interval_s, _TIME_SHARE * counts.took_s)
    except Exception as error:
        # The ledger is gone, so that the run ends by an error. Or the display failed, and a run
        # does not end because of that.
        logger.debug("The progress of a run is shown no more: %r", error)
