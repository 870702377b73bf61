"""Snapshots of records that no file holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ray_resume.core.parts import FilePart
from ray_resume.core.record_log import RecordLog
from ray_resume.core.records import Record, encode
from ray_resume.core.snapshot import Snapshot


def whole_files(*names: str, rows: int = 1) -> tuple[FilePart, ...]:
    """Make the parts of a source that has files of its own."""
    return tuple(FilePart(name, 0, rows, rows) for name in names)


def snapshot_of(runs: Mapping[str, Iterable[Record]]) -> Snapshot:
    """Make the snapshot of what runs recorded, by run id."""
    return Snapshot({run_id: RecordLog(encode(records)) for run_id, records in runs.items()})
