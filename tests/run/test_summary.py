"""A job that ends with sources left is no success: `complete`, `IncompleteError`."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from conftest import ids_in, write_source
from ray.exceptions import UserCodeException

from ray_resume import (
    Checkpoint,
    CheckpointError,
    IncompleteError,
    ResumeError,
    RunSummary,
    mark_failed,
    resumable,
    resumable_read,
    resumable_write,
)

ALL = RunSummary("run1", 5, 2, 3, 0, 0, 0, 30, 25, 5, 1, 1.0)


@pytest.mark.parametrize("state", ["failed", "pending", "quarantined"])
def test_sources_that_are_left_are_an_error(state: str) -> None:
    assert ALL.complete
    ALL.raise_if_incomplete()
    left: Any = {f"sources_{state}": 1}
    some = replace(ALL, sources_completed=2, **left)
    assert not some.complete
    with pytest.raises(
        IncompleteError, match=f"1 of 5 sources is not completed: 1 {state}"
    ) as told:
        some.raise_if_incomplete()
    assert told.value.summary == some
    assert ("reset CHECKPOINT --state quarantined" in str(told.value)) == (state == "quarantined")
    assert ("same script again" in str(told.value)) == (state != "quarantined")
    copy = pickle.loads(pickle.dumps(told.value))
    assert (type(copy), copy.summary, str(copy)) == (IncompleteError, some, str(told.value))
    assert isinstance(copy, ResumeError)


def test_a_table_has_no_files_to_count() -> None:
    assert "25 written to 5 files" in str(replace(ALL, files=5))
    told = str(replace(ALL, files=0))
    assert "30 rows read, 25 written." in told
    assert "Files" not in replace(ALL, files=0)._repr_html_()


@pytest.mark.usefixtures("cluster")
def test_everything_is_committed_before_the_error(tmp_path: Path) -> None:
    write_source(tmp_path / "raw", files=3, rows=10)
    bad = [15]

    @resumable(on_error="mark_failed")
    def check(batch: Any) -> Any:
        is_bad = np.isin(batch["id"], bad)
        if is_bad.any():
            mark_failed("a bad row", is_bad)
        return {"id": batch["id"][~is_bad]}

    def run(require_complete: bool = True) -> RunSummary:
        ds = resumable_read(
            ray.data.read_parquet, str(tmp_path / "raw"), checkpoint=tmp_path / "ckpt"
        )
        ds = ds.map_batches(check)
        return resumable_write(ds, tmp_path / "out", require_complete=require_complete)

    with pytest.raises(IncompleteError, match="1 failed") as told:
        run()
    assert told.value.summary.sources_completed == 2
    checkpoint = Checkpoint(tmp_path / "ckpt")
    assert ids_in(tmp_path / "out") == [*range(10), *range(20, 30)]
    assert checkpoint.check().ok
    assert len(checkpoint.files()) == len(list((tmp_path / "out").iterdir()))
    assert not run(require_complete=False).complete
    bad.clear()
    assert run().complete
    runs = list(checkpoint.runs())
    assert [run.outcome for run in runs] == ["incomplete", "incomplete", "completed"]
    assert [run.rows_at_risk for run in runs] == [10, 10, 0]
    assert [len(run.slowest) for run in runs] == [2, 0, 1]
    assert all(0 < seconds < run.duration_s for run in runs for seconds in run.slowest.values())
    # What a run was refused for is on record, too.
    (tmp_path / "out" / checkpoint.files()[0]).unlink()
    with pytest.raises(CheckpointError):
        run()
    *_, last = checkpoint.runs()
    assert last.outcome == "failed"
    assert "CheckpointError: " in str(last.error)


@pytest.mark.usefixtures("cluster")
def test_the_error_that_ended_a_run_is_kept(tmp_path: Path) -> None:
    write_source(tmp_path / "raw", files=3, rows=10)

    @resumable
    def check(batch: Any) -> Any:
        if 15 in batch["id"]:
            raise ValueError("row 15 is bad")
        return batch

    ds = resumable_read(ray.data.read_parquet, str(tmp_path / "raw"), checkpoint=tmp_path / "ckpt")
    with pytest.raises(UserCodeException, match="row 15"):
        resumable_write(ds.map_batches(check), tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "ckpt")
    (run,) = checkpoint.runs()
    status = checkpoint.status()
    assert (run.outcome, run.sources_completed) == ("failed", status.completed)
    assert str(run.error).startswith("ValueError: row 15 is bad (")
    assert str(run.error).endswith(", in check)")
    assert status.last_run is not None
    assert status.last_run["error"] == run.error
