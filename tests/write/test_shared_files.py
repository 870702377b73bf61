"""Files that sources share: each source is committed by itself, whatever becomes of the others."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from conftest import ids_in, write_file, write_source
from ray.data import Dataset
from snapshots import snapshot_of

from ray_resume import (
    Checkpoint,
    RunSummary,
    mark_failed,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.core.digests import source_digest
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Fingerprint, Record, State
from ray_resume.core.resume_plan import ResumePlan, plan_resume
from ray_resume.core.sources import Source
from ray_resume.errors import SourceChangedError

pytestmark = [pytest.mark.extended, pytest.mark.long]

# Sources that are processed again -----------------------------------------------------------------


def record(source_id: str, state: State, *places: int) -> Record:
    """A source with a row in each of some places of one file."""
    parts = tuple(FilePart("shared.parquet", place, 1, 9) for place in places)
    return Record(source_id, state, 1, "run", parts=parts)


def sorted_out(
    ids: str, *records: Record, changed: str = "", policy: str = "reprocess"
) -> ResumePlan:
    sources = [Source(i, i, Fingerprint(1, 1) if i in changed else Fingerprint()) for i in ids]
    return plan_resume(
        sources,
        snapshot_of({"run": records}),
        on_source_change=policy,
        signature="",
        on_pipeline_change="error",
    )


def pending(resume_plan: ResumePlan) -> str:
    return "".join(source.source_id for source in resume_plan.pending)


DONE = [record("a", State.COMPLETED, 0), record("b", State.COMPLETED, 1, 4)]
DONE += [record("c", State.COMPLETED, 2), record("d", State.COMPLETED, 3)]


def test_a_changed_source_is_done_again_alone() -> None:
    resume_plan = sorted_out("abcde", *DONE, changed="c")
    assert pending(resume_plan) == "ce"
    assert [r.source_id for r in resume_plan.skipped] == ["a", "b", "d"]
    assert {n: r.source_id for n, r in resume_plan.records.items()} == {0: "c"}
    assert not resume_plan.removed
    with pytest.raises(SourceChangedError):
        sorted_out("abcd", *DONE, changed="c", policy="error")
    assert pending(sorted_out("abcd", *DONE, changed="c", policy="ignore")) == ""


def test_sources_in_one_file_need_not_be_listed_or_completed_for_another_to_be_done() -> None:
    assert pending(sorted_out("cd", *DONE, changed="c")) == "c"
    resume_plan = sorted_out("abcd", record("a", State.QUARANTINED, 0), *DONE[1:], changed="c")
    assert (pending(resume_plan), resume_plan.quarantined) == ("c", 1)
    assert [r.source_id for r in resume_plan.skipped] == ["b", "d"]


# On a cluster -------------------------------------------------------------------------------------

FILES, ROWS = 40, 5
ALL = list(range(FILES * ROWS))
BAD = 17
WITHOUT_BAD = [i for i in ALL if i // ROWS != BAD // ROWS]


@pytest.fixture
def tiny(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=FILES, rows=ROWS)


def run(folder: Path, *udfs: Any, read: dict[str, Any] | None = None, **options: Any) -> RunSummary:
    ds: Dataset = resumable_read(
        ray.data.read_parquet,
        str(folder / "in"),
        checkpoint=folder / "ckpt",
        # A source is in a task with others.
        **{"on_pipeline_change": "continue", "override_num_blocks": 2, **(read or {})},
    )
    ds.context.max_errored_blocks = options.pop("max_errored_blocks", 0)
    for udf in udfs:
        ds = ds.map_batches(resumable(udf))
    return resumable_write(ds, folder / "out", **options)


def files(folder: Path) -> set[str]:
    return {str(path) for path in (folder / "out").rglob("*") if path.is_file()}


def check(folder: Path, expected: Iterable[int] = ALL) -> None:
    """The folder has the expected rows, and nothing that is not listed."""
    checkpoint = Checkpoint(folder / "ckpt")
    rows = [
        i
        for file in files(folder)
        for i in pq.ParquetFile(file).read(["id"]).column("id").to_pylist()
    ]
    assert sorted(rows) == sorted(expected)
    assert set(checkpoint.files()) == files(folder)
    assert sum(part.rows for part in checkpoint.parts()) == len(rows)
    assert checkpoint.status().unclean == 0
    report = checkpoint.check()
    assert report.ok, report


def source_at(folder: Path, number: int) -> Path:
    return folder / "in" / f"{number:05d}.parquet"


def change(path: Path, start: int, stop: int) -> None:
    time.sleep(0.01)
    write_file(path, start, stop)


@pytest.mark.usefixtures("cluster", "tiny")
def test_tiny_sources_share_files(tmp_path: Path) -> None:
    summary = run(tmp_path)
    assert (summary.sources_completed, summary.rows_written) == (FILES, len(ALL))
    # No more than write tasks.
    assert summary.files == len(files(tmp_path)) <= 2
    check(tmp_path)
    assert run(tmp_path).sources_skipped == FILES

    # A new source and a changed one are done; the rows of the others are copied.
    before = files(tmp_path)
    change(source_at(tmp_path, 3), 1000, 1002)
    write_file(tmp_path / "in" / "new.parquet", 2000, 2003)
    summary = run(tmp_path)
    assert (summary.sources_completed, summary.sources_skipped) == (2, FILES - 1)
    assert summary.rows_read == 5
    expected = [*(i for i in ALL if i // ROWS != 3), 1000, 1001, *range(2000, 2003)]
    check(tmp_path, expected)
    assert before - files(tmp_path)

    # Small files become large ones, also those that are there.
    write_file(tmp_path / "in" / "newer.parquet", 3000, 3003)
    merged = run(tmp_path, target_file_bytes=1 << 20)
    assert (merged.sources_completed, merged.files) == (1, 1)
    check(tmp_path, [*expected, *range(3000, 3003)])
    assert len(files(tmp_path)) == 1


def by_parity(batch: Any) -> Any:
    return {**batch, "part": batch["id"] % 2}


@pytest.mark.usefixtures("cluster", "tiny")
@pytest.mark.parametrize(
    "how",
    [
        "raises",
        "marks",
        "marks and partitions",
    ],
)
def test_a_source_that_fails_keeps_no_other_from_being_committed(tmp_path: Path, how: str) -> None:
    def falls_over(batch: Any) -> Any:
        if BAD not in batch["id"]:
            return batch
        if how == "raises":
            raise ValueError("a bad row")
        # The other rows of its source go on, and may be in a file with those of others.
        bad = batch["id"] == BAD
        mark_failed("a bad row", bad)
        return {name: values[~bad] for name, values in batch.items()}

    columns = ["part"] if how == "marks and partitions" else None
    options: dict[str, Any] = {"max_errored_blocks": -1, "partition_cols": columns}
    summary = run(tmp_path, falls_over, by_parity, **options)
    assert (summary.sources_completed, summary.sources_failed) == (FILES - 1, 1)
    check(tmp_path, WITHOUT_BAD)
    summary = run(tmp_path, by_parity, partition_cols=columns)
    assert (summary.sources_completed, summary.sources_skipped) == (1, FILES - 1)
    check(tmp_path)


@pytest.mark.usefixtures("cluster", "tiny")
def test_earlier_output_in_a_shared_file_stays_until_its_source_is_done(tmp_path: Path) -> None:
    def falls_over(batch: Any) -> Any:
        if BAD in batch["id"]:
            raise ValueError("a bad row")
        return batch

    run(tmp_path)
    Checkpoint(tmp_path / "ckpt").reset([str(source_at(tmp_path, n)) for n in (0, BAD // ROWS)])
    summary = run(tmp_path, falls_over, max_errored_blocks=-1)
    assert (summary.sources_completed, summary.sources_failed) == (1, 1)
    check(tmp_path)
    assert run(tmp_path).sources_completed == 1
    check(tmp_path)


@pytest.mark.usefixtures("cluster", "tiny")
def test_sources_that_are_not_in_the_input_any_more_keep_their_rows(tmp_path: Path) -> None:
    run(tmp_path)
    change(source_at(tmp_path, 3), 1000, 1005)
    for number in range(10, 20):
        os.unlink(source_at(tmp_path, number))
    summary = run(tmp_path)
    assert (summary.sources_completed, summary.sources_skipped) == (1, FILES - 11)
    check(tmp_path, [*(i for i in ALL if i // ROWS != 3), *range(1000, 1005)])


@pytest.mark.usefixtures("cluster", "tiny")
def test_a_file_with_rows_of_a_live_run_is_left_to_a_later_one(tmp_path: Path) -> None:
    """Nothing is held back meanwhile, and each row can be found."""
    run(tmp_path, target_file_bytes=1 << 20)
    (shared,) = files(tmp_path)
    neighbour = source_at(tmp_path, 4)
    claim = Claim([source_digest(str(neighbour))])
    live = Lease.acquire(tmp_path / "ckpt", Owner.here("aaaaaaaaaaaa"), claim, wait_s=0)
    change(source_at(tmp_path, 3), 1000, 1005)
    os.rename(neighbour, tmp_path / "elsewhere")
    assert run(tmp_path).sources_completed == 1
    checkpoint = Checkpoint(tmp_path / "ckpt")
    assert shared in files(tmp_path)
    assert shared not in checkpoint.files()
    assert checkpoint.status().unclean == 1
    expected = [*(i for i in ALL if i // ROWS != 3), *range(1000, 1005)]
    found = []
    for part in checkpoint.parts():
        ids = pq.ParquetFile(part.file).read(["id"]).column("id").to_pylist()
        found += ids[part.first_row : part.first_row + part.rows]
    assert sorted(found) == expected
    live.end(wait_s=0)
    assert checkpoint.tidy() == 1
    check(tmp_path, expected)
    assert ids_in(tmp_path / "out") == expected
