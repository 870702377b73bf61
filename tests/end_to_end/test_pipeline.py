"""Whole pipelines on a real cluster: every kind of UDF, reruns, and reads."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ids_in, snapshot, write_file, write_source
from parquet_job import keep, keep_even, read
from ray.data import ActorPoolStrategy, Dataset

from ray_resume import (
    Checkpoint,
    CheckpointError,
    ResumeError,
    SourceChangedError,
    resumable,
    resumable_read,
    resumable_write,
)

pytestmark = pytest.mark.usefixtures("cluster")

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any


@resumable
def drop_thirds(batch: Batch) -> Batch | None:
    """Numpy, a filter; of some sources nothing is left, of one call None is returned."""
    mask = (batch["id"] % 3 != 0) & (batch["id"] >= 100)
    if not mask.any():
        return None
    return {name: values[mask] for name, values in batch.items()}


@resumable(origin="position")
def twins(batch: Batch) -> Iterator[Batch]:
    """Numpy, a shuffling fan-out over mixed batches, in three blocks."""
    np.random.seed(7)
    order = np.random.permutation(np.repeat(np.arange(len(batch["id"])), 2))
    yield {name: values[:0] for name, values in batch.items()}
    for part in np.array_split(order, 3):
        yield {name: values[part] for name, values in batch.items()}


@resumable
class AddLength:
    """Pandas, an actor pool, constructor and call arguments, a filter of its own."""

    def __init__(self, offset: int, *, scale: int = 1) -> None:
        self.offset = offset
        self.scale = scale

    def __call__(self, frame: Any, extra: int, *, less: int = 0) -> Any:
        frame = frame[frame["id"].to_numpy() % 5 != 0]
        return frame.assign(
            length=frame["name"].str.len() * self.scale + self.offset + extra - less
        )


@resumable(one_to_one=True)
def describe(table: pa.Table) -> pa.Table:
    """Pyarrow, whole batches of several sources, one row for each row."""
    return table.select(["id", "length"]).append_column(
        "upper", pc.utf8_upper(table.column("name"))
    )


@resumable
def in_pieces(table: pa.Table) -> Iterator[pa.Table]:
    """Pyarrow, a generator that yields nothing for some sources, and pieces of others."""
    for start in range(0, table.num_rows, 16):
        piece = table.slice(start, 16)
        yield piece.filter(pc.not_equal(piece.column("id"), 101))


def expected_of_all_kinds() -> list[dict[str, Any]]:
    rows = []
    for i in range(600):
        if i >= 100 and i % 3 and i % 5 and i != 101:
            name = f"row {i}"
            rows += 2 * [{"id": i, "length": len(name) * 10 + 3 + 4 - 1, "upper": name.upper()}]
    return rows


def as_udf(udf: Any) -> Any:
    """Ray types callable classes as taking one argument."""
    return udf


def all_kinds(source: Path, checkpoint: Path) -> Dataset:
    return (
        read(source, checkpoint)
        .select_columns(["id", "name"])
        .map_batches(drop_thirds, batch_size=64)
        .map_batches(twins, batch_size=150, num_cpus=0.5)
        .map_batches(
            as_udf(AddLength),
            batch_format="pandas",
            batch_size=70,
            fn_constructor_args=(3,),
            fn_constructor_kwargs={"scale": 10},
            fn_args=(4,),
            fn_kwargs={"less": 1},
            compute=ActorPoolStrategy(size=2),
        )
        .map_batches(describe, batch_format="pyarrow", batch_size=90)
        .map_batches(in_pieces, batch_format="pyarrow", batch_size=None, num_cpus=0.3)
    )


def test_every_kind_of_udf_in_one_pipeline(source: Path, tmp_path: Path) -> None:
    expected = sorted(expected_of_all_kinds(), key=repr)

    summary = resumable_write(all_kinds(source, tmp_path / "ckpt"), tmp_path / "out")

    written = [
        row
        for path in (tmp_path / "out").glob("*")
        for row in pq.ParquetFile(path).read().to_pylist()
    ]
    assert sorted(written, key=repr) == expected
    assert summary.sources_total == summary.sources_completed == 7
    assert (summary.rows_read, summary.rows_written) == (600, len(expected))
    assert summary.files == len(list((tmp_path / "out").iterdir()))
    assert set(pq.ParquetFile(next((tmp_path / "out").glob("*"))).schema_arrow.names) == {
        "id",
        "length",
        "upper",
    }
    again = resumable_write(all_kinds(source, tmp_path / "ckpt"), tmp_path / "out")
    assert (again.sources_skipped, again.sources_completed, again.rows_written) == (7, 0, 0)


def without_history(files: Any) -> Any:
    """Leave out what tells of the runs themselves."""
    return {name: one for name, one in files.items() if not str(name).startswith("history")}


@pytest.mark.long
def test_a_finished_job_runs_no_udf_writes_nothing_and_is_quick(
    source: Path, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()

    @resumable
    def marking(batch: Batch) -> Batch:
        (marks / os.urandom(8).hex()).touch()
        return batch

    def job() -> Any:
        ds = read(source, tmp_path / "ckpt").map_batches(marking)
        return resumable_write(ds, tmp_path / "out")

    job()
    for mark in marks.iterdir():
        mark.unlink()
    before = snapshot(tmp_path / "out"), without_history(snapshot(tmp_path / "ckpt"))
    # Others may need the processor meanwhile.
    start = time.process_time()
    summary = job()
    assert time.process_time() - start < 1
    assert (summary.sources_skipped, summary.sources_total, summary.files) == (7, 7, 0)
    assert not list(marks.iterdir())
    after = snapshot(tmp_path / "out"), without_history(snapshot(tmp_path / "ckpt"))
    assert after == before
    assert len(list(Checkpoint(tmp_path / "ckpt").runs())) == 2
    assert ids_in(tmp_path / "out") == list(range(600))


@pytest.mark.long
def test_committed_sources_are_not_opened_and_new_ones_are_read(
    source: Path, tmp_path: Path
) -> None:
    resumable_write(read(source, tmp_path / "ckpt").map_batches(keep_even), tmp_path / "out")
    for path in source.iterdir():
        stat = path.stat()
        path.write_bytes(os.urandom(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    write_file(source / "new.parquet", 600, 700)
    summary = resumable_write(
        read(source, tmp_path / "ckpt").map_batches(keep_even), tmp_path / "out"
    )
    assert (summary.sources_skipped, summary.sources_completed) == (7, 1)
    assert ids_in(tmp_path / "out") == list(range(0, 700, 2))


@pytest.mark.long
def test_a_changed_source_replaces_its_old_output(source: Path, tmp_path: Path) -> None:
    def job(**options: Any) -> Any:
        ds = read(source, tmp_path / "ckpt", **options)
        return resumable_write(ds.map_batches(keep_even), tmp_path / "out")

    job()
    write_file(source / "00002.parquet", 1000, 1100)
    with pytest.raises(SourceChangedError, match=r"00002\.parquet"):
        job(on_source_change="error")
    assert job(on_source_change="ignore").sources_skipped == 7
    assert job().sources_completed == 1
    expected = [*range(0, 200, 2), *range(300, 600, 2), *range(1000, 1100, 2)]
    assert ids_in(tmp_path / "out") == expected
    assert len(Checkpoint(tmp_path / "ckpt").files()) == len(list((tmp_path / "out").iterdir()))


def test_many_sources_share_few_read_tasks_and_options_of_the_reader_work(tmp_path: Path) -> None:
    for part in ("a", "b"):
        write_source(tmp_path / "in" / f"part={part}", files=5, rows=10)
    (tmp_path / "in" / "notes.txt").write_text("not Parquet")
    (tmp_path / "in" / "_SUCCESS").touch()
    seen = tmp_path / "processes"
    seen.mkdir()

    @resumable
    def noting(batch: Batch) -> Batch:
        assert "lmdb" not in sys.modules, "workers must not import lmdb"
        context = ray.get_runtime_context()
        (seen / str(context.get_task_id())).touch()
        return batch

    ds = resumable_read(
        ray.data.read_parquet,
        paths=[str(tmp_path / "in")],
        checkpoint=tmp_path / "ckpt",
        columns=["id", "part"],
        include_paths=True,
        override_num_blocks=2,
        num_cpus=0.5,
    )
    summary = resumable_write(ds.map_batches(noting, num_cpus=0.5), tmp_path / "out")
    assert summary.sources_completed == summary.sources_total == 10
    assert len(list(seen.iterdir())) == 2
    rows = [
        row
        for path in (tmp_path / "out").iterdir()
        for row in pq.ParquetFile(path).read().to_pylist()
    ]
    assert sorted((row["part"], row["id"]) for row in rows) == [
        (part, i) for part in ("a", "b") for i in range(50)
    ]
    assert all(f"part={row['part']}/" in row["path"] for row in rows)


@pytest.mark.extended
def test_not_armed_it_is_a_plain_read_that_touches_no_checkpoint(
    source: Path, tmp_path: Path
) -> None:
    resumable_write(read(source, tmp_path / "ckpt").map_batches(keep), tmp_path / "out")
    before = snapshot(tmp_path / "ckpt")
    ds = read(source, tmp_path / "ckpt")
    assert ds.schema().names == ["id", "name", "weight"]
    assert ds.count() == 600
    ds = ds.map_batches(keep_even)
    assert ds.count() == 300
    assert sorted(row["id"] for row in ds.take_all()) == list(range(0, 600, 2))
    assert set(ds.take(1)[0]) == {"id", "name", "weight"}
    assert ds.materialize().count() == 300
    assert snapshot(tmp_path / "ckpt") == before
    assert resumable_write(ds, tmp_path / "out").sources_skipped == 7


@pytest.mark.extended
@pytest.mark.long
def test_looking_before_the_write_and_a_second_try_do_no_harm(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()

    @resumable
    def failing(batch: Batch) -> Batch:
        if broken.exists() and 300 in batch["id"]:
            raise RuntimeError("the model server is down")
        return batch

    ds = (
        read(source, tmp_path / "ckpt", override_num_blocks=7)
        .select_columns(["id"])
        .map_batches(keep_even)
        .map_batches(failing)
    )
    broken.unlink()
    assert ds.take(3)
    assert ds.count() == 300
    assert ds.schema().names == ["id"]
    broken.touch()
    with pytest.raises(Exception, match="the model server is down"):
        resumable_write(ds, tmp_path / "out")
    status = Checkpoint(tmp_path / "ckpt").status()
    assert status.pending + status.completed == 7
    assert status.pending >= 1
    assert (status.failed, status.live) == (0, 0)
    assert len(Checkpoint(tmp_path / "ckpt").files()) == len(list((tmp_path / "out").iterdir()))
    broken.unlink()
    summary = resumable_write(ds, tmp_path / "out")
    assert summary.sources_skipped == status.completed
    assert summary.sources_completed == status.pending
    assert ids_in(tmp_path / "out") == list(range(0, 600, 2))


def test_missing_and_repeated_input_is_told_at_the_read(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere", tmp_path / "ckpt")
    (tmp_path / "void").mkdir()
    with pytest.raises(FileNotFoundError, match="void"):
        read(tmp_path / "void", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()
    with pytest.raises(ResumeError, match="more than once"):
        resumable_read(
            ray.data.read_parquet,
            [str(source), str(source / "00001.parquet")],
            checkpoint=tmp_path / "ckpt",
        )


@pytest.mark.long
def test_a_second_run_on_the_same_sources_is_refused_and_told_by_whom(
    source: Path, tmp_path: Path
) -> None:
    from ray_resume.checkpoint.claims import Claim, Owner
    from ray_resume.checkpoint.local.backend import LocalBackend
    from ray_resume.checkpoint.local.lease import Lease

    LocalBackend(tmp_path / "ckpt").ensure()
    held = Lease.acquire(tmp_path / "ckpt", Owner.here("bbbbbbbbbbbb"), Claim(None), wait_s=0)
    ds = read(source, tmp_path / "ckpt").map_batches(keep)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="bbbbbbbbbbbb") as caught:
        resumable_write(ds, tmp_path / "out", lease_wait_s=0.5)
    assert time.perf_counter() - start >= 0.5
    assert str(os.getpid()) in str(caught.value)
    assert not (tmp_path / "out").exists()
    held.end(wait_s=0)
    assert resumable_write(ds, tmp_path / "out").sources_completed == 7
