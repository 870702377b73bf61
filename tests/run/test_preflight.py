"""Warnings of a run before it starts anything."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from ray_resume.checkpoint.resets import reset_records
from ray_resume.core.record_log import RecordLog
from ray_resume.core.records import Record, State, encode
from ray_resume.core.snapshot import Snapshot
from ray_resume.core.sources import Source, SourceTable
from ray_resume.run.output import Output
from ray_resume.run.preflight import warn_rows_again
from ray_resume.write.folder import folder_at
from ray_resume.write.output import FolderOutput


@pytest.mark.parametrize(
    ("known", "count"),
    [
        ([], 0),
        ([Record("a", State.COMPLETED, 1, "r", rows=5)], 1),
        ([Record("a", State.COMPLETED, 1, "r", rows=0)], 0),
        ([Record("a", State.FAILED, 1, "r", error="x", failed_runs=1)], 0),
        ([Record("other", State.COMPLETED, 1, "r", rows=5)], 0),
        (reset_records([Record("a", State.COMPLETED, 1, "r", rows=5)], "s", 1), 1),
        (reset_records([Record("b", State.FAILED, 1, "r", failed_runs=1)], "s", 1), 0),
        ([Record(name, State.COMPLETED, n, "r", rows=5) for n, name in enumerate("ab", 1)], 2),
    ],
)
def test_rows_that_a_table_keeps_are_told(
    known: list[Record], count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pending = SourceTable.of([Source("b", "b"), Source("a", "a")])
    contents = Snapshot({"r": RecordLog(encode(known))})
    folder: Any = FolderOutput(folder_at(str(tmp_path)), append=False)
    with caplog.at_level(logging.WARNING, "ray_resume"):
        warn_rows_again(folder, pending, contents)
        assert not caplog.records
        warn_rows_again(Output("datasink Table t"), pending, contents)
    assert len(caplog.records) == bool(count)
    if count:
        noun = "source" if count == 1 else "sources"
        assert f"{count} {noun} of this run" in caplog.text
        assert "with rows in datasink Table t" in caplog.text
