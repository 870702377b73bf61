"""The runs of a checkpoint: what their history says, and for those without an end, what they left.

Invariant: a run that writes its end before it gives its lease back is never taken for a killed one.
So the history is read first, then the leases, then the ends of runs that seem to have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_resume.checkpoint.contents import Contents
from ray_resume.checkpoint.history import ALIVE, Facts, RunRecord, is_time, record_of
from ray_resume.core.record_log import Flag
from ray_resume.core.records import State

if TYPE_CHECKING:
    from ray_resume.checkpoint.backend import CheckpointBackend
    from ray_resume.checkpoint.local.reader import Reading

__all__ = ["merge_history", "runs_of", "runs_on_record"]


def runs_on_record(storage: CheckpointBackend) -> list[RunRecord]:
    """Return the runs of a checkpoint, the oldest first.

    Raises:
        CheckpointError: there is no checkpoint, or the storage fails.
    """
    storage.identity()
    known = storage.history().read()
    listed = storage.list_runs()
    without_end = [run_id for run_id, facts in known.items() if "outcome" not in facts]
    readings = storage.read_runs(without_end, listed.live.keys())
    return runs_of(storage, known, replace(listed, readings=readings))


def runs_of(
    storage: CheckpointBackend, known: Mapping[str, Facts], contents: Contents
) -> list[RunRecord]:
    """Return the runs that are ``known`` to the history, the oldest first.

    Args:
        contents: read after ``known``, with the files of the runs that have no end.
    """
    open_runs = [run_id for run_id, facts in known.items() if "outcome" not in facts]
    ends = storage.history().ends(open_runs)
    readings = {reading.run_id: reading for reading in contents.readings}
    records = []
    for run_id, facts in known.items():
        whole = {**facts, **ends.get(run_id, {})}
        if "outcome" not in whole:
            whole |= _without_end(whole, run_id in contents.live, readings.get(run_id))
        records.append(record_of(run_id, whole))
    return sorted(records, key=lambda record: (record.started_at, record.run_id))


def merge_history(storage: CheckpointBackend, contents: Contents, by: str) -> None:
    """Merge the history, under a lease on everything: no run is at work."""
    history = storage.history()
    if history.loose() > 1:
        history.merge(by, runs_of(storage, history.read(), contents))


def _without_end(facts: Facts, is_live: bool, reading: Reading | None) -> Facts:
    """Return what is known of a run that has written no end, by its commits."""
    sign = facts.get(ALIVE, {})
    started = facts.get("started_at")
    seen = [started, sign.get("at")]
    counts: Facts = {}
    if reading is not None and reading.error is None:
        counts, last = _commits_of(reading)
        seen.append(last)
    times: list[float] = [at for at in seen if is_time(at)]
    last_seen = max(times, default=0.0)
    lasted = last_seen - min(times, default=0.0)
    end = {"outcome": "running"} if is_live else {"outcome": "killed", "ended_at": last_seen}
    return {**sign, **counts, "duration_s": lasted, **end}


def _commits_of(reading: Reading) -> tuple[Facts, float | None]:
    """Count what a run has committed; return the time of its last completed source, too."""
    log = reading.records
    state = log.column("state")
    completed = (state == State.COMPLETED.value) & (log.column("flags") & Flag.END == 0)
    times: Any = log.column("completed_at")[completed]
    counts = {
        "sources_completed": int(np.count_nonzero(completed)),
        "sources_failed": int(np.count_nonzero(state == State.FAILED.value)),
        "sources_quarantined": int(np.count_nonzero(state == State.QUARANTINED.value)),
        "rows_written": sum(log.column("rows")[completed].tolist()),
    }
    return counts, float(np.nanmax(times)) if len(times) else None
