"""Watches a run's ledger from the driver, and shows how far the run is."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray

from ray_resume.core.resume_plan import ResumePlan
from ray_resume.run.display import Display
from ray_resume.run.progress import Counts
from ray_resume.run.run_plan import RunPlan
from ray_resume.run.status import StatusKeeper

__all__ = ["shown"]

logger = logging.getLogger("ray_resume")

_END_WAIT_S = 1.0

# To count rows costs the ledger the more, the more sources are at work. It does not take more than
# one part in so many of its time.
_TIME_SHARE = 100


@contextlib.contextmanager
def shown(handle: Any, run_id: str, plan: RunPlan, todo: ResumePlan) -> Iterator[None]:
    """Show how far run ``run_id`` is, as its plan says, until the block ends.

    Args:
        handle: the ledger's actor. A thread asks it for its counts at intervals.
    """
    if plan.display is None:
        yield
        return
    total = len(plan.listing.sources)
    skipped = total - len(todo.pending) - todo.quarantined
    keeper = StatusKeeper(total, skipped, todo.quarantined)
    over = threading.Event()
    watch = (handle, keeper, plan.display, over)
    thread = threading.Thread(target=_show_until_over, args=watch, daemon=True)
    plan.display.begin(run_id)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_END_WAIT_S)
        plan.display.end()


def _show_until_over(
    handle: Any, keeper: StatusKeeper, display: Display, over: threading.Event
) -> None:
    interval_s = display.interval_s
    try:
        while not over.wait(interval_s):
            counts: Counts = ray.get(handle.counts.remote())
            if over.is_set():
                return
            display.show(keeper.of(counts, time.monotonic()))
            interval_s = max(display.interval_s, _TIME_SHARE * counts.took_s)
    except Exception as error:
        # The ledger is gone, so that the run ends by an error. Or the display failed, and a run
        # does not end because of that.
        logger.debug("The progress of a run is shown no more: %r", error)
