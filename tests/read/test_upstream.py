"""The output of one pipeline as the input of the next: sources flow through, rewrites do not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from buckets import S3
from conftest import ids_in, write_file, write_source
from fsspec.implementations.local import LocalFileSystem
from ray.data.expressions import col

from ray_resume import (
    Checkpoint,
    CheckpointError,
    NonResumableError,
    RunSummary,
    resumable,
    resumable_read,
    resumable_write,
)

pytestmark = pytest.mark.usefixtures("cluster")


@resumable
def twice(batch: Any) -> Any:
    """Drop every fifth id, and give each other one twice."""
    table = pa.table({"id": batch["id"], "name": batch["name"]})
    table = table.filter(pa.array([i % 5 != 0 for i in batch["id"]]))
    return pa.concat_tables([table, table])


@resumable
def lengths(batch: pa.Table) -> pa.Table:
    return batch.append_column("length", pa.array([len(n.as_py()) for n in batch["name"]]))


class Chain:
    """Two pipelines in a row."""

    def __init__(self, folder: Path, files: int = 4, rows: int = 50) -> None:
        self.folder = folder
        write_source(folder / "in", files=files, rows=rows)

    @property
    def first_checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder / "ckpt1")

    def input(self, number: int) -> Path:
        return self.folder / "in" / f"{number:05d}.parquet"

    def first(self, **options: Any) -> RunSummary:
        reading = {"on_source_gone": options.pop("on_source_gone", None)}
        ds = resumable_read(
            ray.data.read_parquet,
            str(self.folder / "in"),
            checkpoint=self.folder / "ckpt1",
            **reading,
        )
        return resumable_write(ds.map_batches(twice), self.folder / "mid", **options)

    def second(self, reader: Any = ray.data.read_parquet, **reading: Any) -> RunSummary:
        ds = resumable_read(
            reader, self.first_checkpoint, checkpoint=self.folder / "ckpt2", **reading
        )
        return resumable_write(ds.map_batches(lengths, batch_format="pyarrow"), self.folder / "out")

    def check(self, reader: Callable[..., Any] = ray.data.read_parquet) -> None:
        """Compare the rows with those of plain Ray Data over the files of the first pipeline."""
        plain = reader(self.first_checkpoint.files())
        plain = plain.map_batches(lengths, batch_format="pyarrow")
        out = Checkpoint(self.folder / "ckpt2").files()
        ours = pa.concat_tables([pq.read_table(file) for file in out])
        expected = pa.concat_tables(ray.get(plain.to_arrow_refs()))
        assert ours.schema.names == expected.schema.names
        assert ours.schema.types == expected.schema.types
        assert rows_of(ours) == rows_of(expected)
        left = {str(path) for path in (self.folder / "out").rglob("*.parquet")}
        assert left == set(out)


def rows_of(table: pa.Table) -> list[str]:
    return sorted(map(repr, zip(*table.to_pydict().values(), strict=True)))


def counts(summary: RunSummary) -> tuple[int, int, int]:
    return summary.sources_completed, summary.sources_skipped, summary.sources_removed


@pytest.mark.long
def test_what_changes_in_the_first_pipeline_flows_through_and_what_is_rewritten_does_not(
    tmp_path: Path,
) -> None:
    chain = Chain(tmp_path)
    chain.first()
    assert counts(chain.second()) == (4, 0, 0)
    ids = {record.source_id for record in Checkpoint(tmp_path / "ckpt2").sources()}
    assert ids == {record.source_id for record in chain.first_checkpoint.sources()}
    chain.check()
    assert counts(chain.second()) == (0, 4, 0)

    # One changed, one is new, all files are merged.
    write_file(chain.input(1), 1000, 1060)
    write_file(chain.input(7), 2000, 2010)
    chain.first(target_file_bytes=1 << 20)
    assert len(chain.first_checkpoint.files()) == 1
    assert counts(chain.second()) == (2, 3, 0)
    chain.check()

    # A reset and a removed one go; the file that they were in is rewritten.
    chain.input(2).unlink()
    chain.first(on_source_gone="remove")
    chain.first_checkpoint.reset([str(chain.input(3))])
    assert counts(chain.second()) == (0, 3, 2)
    chain.first(on_source_gone="remove")
    assert counts(chain.second()) == (1, 3, 0)
    chain.check()

    chain.first_checkpoint.reset(state="all")
    assert counts(chain.second()) == (0, 0, 4)
    assert not any((tmp_path / "out").iterdir())


class Held(LocalFileSystem):  # type: ignore[misc]
    """Workers open no file before ``go`` is there. The first one that waits makes ``go.asked``."""

    cachable = False

    def __init__(self, driver: int, go: str) -> None:
        super().__init__(driver=driver, go=go)
        self.driver, self.go = driver, go

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if os.getpid() != self.driver:
            Path(f"{self.go}.asked").touch()
            while not os.path.exists(self.go):
                time.sleep(0.05)
        return super()._open(path, mode, **options)


@pytest.mark.extended
@pytest.mark.long
def test_files_that_the_first_pipeline_rewrites_meanwhile_are_read_where_the_rows_are_then(
    tmp_path: Path,
) -> None:
    chain = Chain(tmp_path, files=6)
    chain.first()
    before = set(chain.first_checkpoint.files())
    go = tmp_path / "go"

    def merge_once_asked() -> None:
        deadline = time.monotonic() + 60
        while not os.path.exists(f"{go}.asked"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        try:
            chain.first(target_file_bytes=1 << 20)
        finally:
            go.touch()

    with ThreadPoolExecutor(1) as pool:
        merged = pool.submit(merge_once_asked)
        # One task, since a merge needs CPUs, too.
        held = Held(os.getpid(), str(go))
        summary = chain.second(filesystem=held, override_num_blocks=1)
        merged.result()
    assert before.isdisjoint(chain.first_checkpoint.files())
    assert counts(summary) == (6, 0, 0)
    assert summary.sources_failed == 0
    chain.check()


@pytest.mark.extended
@pytest.mark.long
def test_a_bucket_is_read_with_the_filesystem_that_is_given(s3: S3, tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=3, rows=20)
    base = tmp_path.name
    first = Checkpoint(s3.uri(f"{base}/1"), lease_ttl_s=5, publish_interval_s=0.2)
    ds = resumable_read(ray.data.read_parquet, str(tmp_path / "in"), checkpoint=first)
    resumable_write(ds, s3.uri(f"{base}/mid"))

    def second() -> RunSummary:
        reading = {"filesystem": s3.filesystem, "checkpoint": tmp_path / "2"}
        ds = resumable_read(ray.data.read_parquet, first, **reading)
        return resumable_write(ds, tmp_path / "out")

    assert counts(second()) == (3, 0, 0)
    assert ids_in(tmp_path / "out") == list(range(60))
    first.reset([str(tmp_path / "in" / "00001.parquet")])
    assert counts(second()) == (0, 2, 1)


def test_the_older_reader_of_parquet_reads_parts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(tmp_path, files=3)
    chain.first(row_group_size=7)
    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "use_datasource_v2", False, raising=False)
    ds = resumable_read(ray.data.read_parquet, chain.first_checkpoint, checkpoint=tmp_path / "2")
    plain = ray.data.read_parquet(chain.first_checkpoint.files())
    for one, other in (
        (ds, plain),
        (ds.filter(expr=col("id") < 60), plain.filter(expr=col("id") < 60)),
    ):
        assert rows_of(table_of(one)) == rows_of(table_of(other))
    one, other = (each.filter(expr=col("id") > 99).select_columns(["name"]) for each in (ds, plain))
    assert rows_of(table_of(one)) == rows_of(table_of(other))


def table_of(ds: Any) -> pa.Table:
    return pa.concat_tables([table for table in ray.get(ds.to_arrow_refs()) if len(table)])


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    chain = Chain(tmp_path, files=2)
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        chain.second()
    Checkpoint(tmp_path / "ckpt1").location.open().ensure()
    with pytest.raises(CheckpointError, match=r"written nothing yet.*Run it first"):
        chain.second()
    chain.first()
    with pytest.raises(CheckpointError, match="of its own checkpoint"):
        resumable_read(
            ray.data.read_parquet, chain.first_checkpoint, checkpoint=chain.first_checkpoint
        )
    ds = resumable_read(ray.data.read_parquet, chain.first_checkpoint, checkpoint=tmp_path / "2")
    with pytest.raises(CheckpointError, match="is in the input"):
        resumable_write(ds, tmp_path / "mid", append=True)
    with pytest.raises(NonResumableError, match="partition_filter"):
        chain.second(partition_filter=lambda paths: paths)
    with pytest.raises(NonResumableError, match="stands alone"):
        resumable_read(ray.data.read_parquet, [chain.first_checkpoint], checkpoint=tmp_path / "2")
    with pytest.raises(TypeError, match="granularity and source_root are for files"):
        chain.second(granularity="row_group")
    for reader in (ray.data.read_iceberg, ray.data.read_delta, ray.data.read_lance):
        with pytest.raises(NonResumableError, match=r"reads a table, .* Pass ray.data"):
            resumable_read(reader, chain.first_checkpoint, checkpoint=tmp_path / "2")
    file = chain.first_checkpoint.files()[0]
    os.unlink(file)
    with pytest.raises(CheckpointError, match=rf"are gone, {file} for one.*ray-resume rebind"):
        chain.second()


@pytest.mark.extended
@pytest.mark.long
def test_files_of_two_formats_are_not_read_by_one_reader(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=1, rows=2)
    reading: dict[str, Any] = {"checkpoint": tmp_path / "1", "on_pipeline_change": "continue"}
    for number, written_as in enumerate(("parquet", "json")):
        write_file(tmp_path / "in" / f"{number}.parquet", 10 * number, 10 * number + 3)
        ds = resumable_read(ray.data.read_parquet, str(tmp_path / "in"), **reading)
        resumable_write(ds, tmp_path / "mid", format=written_as)
    with pytest.raises(NonResumableError, match=r"several formats \(.*json, .*parquet\)"):
        resumable_read(ray.data.read_json, Checkpoint(tmp_path / "1"), checkpoint=tmp_path / "2")


def test_a_sink_that_is_no_folder_neither_is_read_nor_follows_by_default(tmp_path: Path) -> None:
    write_file(tmp_path / "a.parquet", 0, 10)

    @resumable(sink=True)
    def sink(batch: Any) -> Any:
        return batch

    ds = resumable_read(ray.data.read_parquet, tmp_path / "a.parquet", checkpoint=tmp_path / "1")
    resumable_write(ds.map_batches(sink))
    ds = resumable_read(ray.data.read_parquet, tmp_path / "a.parquet", checkpoint=tmp_path / "3")
    resumable_write(ds, tmp_path / "out")
    ds = resumable_read(
        ray.data.read_parquet, Checkpoint(tmp_path / "3"), checkpoint=tmp_path / "4"
    )
    with pytest.raises(NonResumableError, match=r"the default for this .* on_source_gone=\"keep\""):
        resumable_write(ds.map_batches(sink))
    with pytest.raises(NonResumableError, match=r"writes to sink=True: .* to a folder"):
        resumable_read(ray.data.read_parquet, Checkpoint(tmp_path / "1"), checkpoint=tmp_path / "2")
