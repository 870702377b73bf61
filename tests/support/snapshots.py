"""Snapshots of records that no file holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ray_resume.core.record_log import RecordLog
from ray_resume.core.records import Record, encode
from ray_resume.core.snapshot import Snapshot


def snapshot_of(runs: Mapping[str, Iterable[Record]]) -> Snapshot:
    """Make the snapshot of what runs recorded, by run id."""
    return Snapshot({run_id: RecordLog(encode(records)) for run_id, records in runs.items()})
