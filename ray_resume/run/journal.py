"""`Journal`: keeps the record of one run in its checkpoint's history; in the driver.

The record begins when the run holds its lease, and ends before the run gives it back. A run killed
in between leaves a start without an end. A history that cannot be written ends no run.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from ray_resume.checkpoint.claims import Owner
from ray_resume.checkpoint.history import RunHistory, RunRecord
from ray_resume.core.error_text import message_of
from ray_resume.core.stages import by_name
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint
from ray_resume.run.summary import RunSummary

__all__ = ["Journal"]

logger = logging.getLogger("ray_resume")

_KEPT = frozenset(known.name for known in fields(RunRecord))


class Journal:
    """The record of the run of ``owner``; use :meth:`kept` once."""

    def __init__(self, history: RunHistory, owner: Owner, *, sources_total: int) -> None:
        self._history = history
        self._owner = owner
        self._sources_total = sources_total
        self._counts: dict[str, Any] = {}
        self._outcome = "completed"

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Put the run's start on record, and at the end how it ended."""
        start = {**asdict(self._owner), "started_at": time.time()}
        start["sources_total"] = self._sources_total
        with _tolerated():
            self._history.begin(self._owner.run_id, start)
        try:
            yield
        except BaseException as error:
            outcome = "failed" if isinstance(error, Exception) else "interrupted"
            self._end({"outcome": outcome, "error": message_of(error)})
            raise
        self._end({"outcome": self._outcome})

    def note(self, **counts: Any) -> None:
        """Note counts of the run, by the names that `RunRecord` has; later ones replace them."""
        self._counts.update(counts)

    def note_summary(self, summary: RunSummary) -> None:
        """Note the counts of a run that ended by itself."""
        self._outcome = "completed" if summary.complete else "incomplete"
        named = {known.name: getattr(summary, known.name) for known in fields(summary)}
        named["stages"] = by_name(summary.stages)
        self.note(**{name: value for name, value in named.items() if name in _KEPT})

    def _end(self, how: dict[str, Any]) -> None:
        with _tolerated():
            end = {**self._counts, **how, "ended_at": time.time()}
            self._history.end(self._owner.run_id, end)
        failpoint("history.ended")


@contextlib.contextmanager
def _tolerated() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        logger.warning("The history of runs lacks something: %s", error)
