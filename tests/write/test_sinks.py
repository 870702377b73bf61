"""The sink table: every format, options, partitions; two runs, and a failure between them."""

from __future__ import annotations

import gzip
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.csv
import pyarrow.dataset as pds
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
import ray
from conftest import snapshot
from ray.data._internal.datasource.sql_datasink import SQLDatasink
from ray.data.datasource import Datasink

from ray_resume import (
    Checkpoint,
    CheckpointError,
    NonResumableError,
    PipelineChangedError,
    ResumeError,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.write.datasinks import check_datasink, title_of

pytestmark = pytest.mark.usefixtures("cluster")

Reader = Callable[[Path], list[Any]]


def read_json(path: Path) -> list[Any]:
    return list(pd.read_json(path, lines=True)["id"])


def read_csv(path: Path) -> list[Any]:
    return list(pd.read_csv(path, sep=";")["id"])


FORMATS: dict[str, tuple[dict[str, Any], Reader]] = {
    "parquet": (
        {"compression": "zstd", "row_group_size": 10},
        lambda path: pq.read_table(path)["id"].to_pylist(),
    ),
    "json": ({"force_ascii": False}, read_json),
    "csv": ({"delimiter": ";"}, read_csv),
    "orc": ({"compression": "zstd"}, lambda path: pyarrow.orc.read_table(path)["id"].to_pylist()),
    "feather": ({}, lambda path: pyarrow.feather.read_table(path)["id"].to_pylist()),
}


@pytest.mark.parametrize("format", FORMATS)
def test_formats(format: str, source: Path, tmp_path: Path) -> None:
    options, reader = FORMATS[format]
    broken = tmp_path / "broken"
    broken.touch()

    @resumable
    def failing(batch: Any) -> Any:
        if broken.exists() and 300 in batch["id"]:
            raise RuntimeError("a bad row")
        return batch

    def job() -> Any:
        ds = resumable_read(
            ray.data.read_parquet,
            str(source),
            checkpoint=tmp_path / "ckpt",
            override_num_blocks=7,
        )
        return resumable_write(ds.map_batches(failing), tmp_path / "out", format=format, **options)

    with pytest.raises(Exception, match="a bad row"):
        job()
    broken.unlink()
    summary = job()
    assert summary.sources_completed + summary.sources_skipped == 7
    files = list((tmp_path / "out").iterdir())
    assert all(path.suffix == f".{format}" for path in files)
    assert sorted(i for path in files for i in reader(path)) == list(range(600))
    assert sorted(map(str, files)) == Checkpoint(tmp_path / "ckpt").files()
    if format == "parquet":
        metadata = pq.ParquetFile(files[0]).metadata
        assert metadata.row_group(0).num_rows == 10
        assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert job().sources_skipped == 7


def test_partitions(source: Path, tmp_path: Path) -> None:
    @resumable
    def with_parts(batch: Any) -> Any:
        parity = ["even/ü" if i % 2 == 0 else None for i in batch["id"]]
        return {**batch, "parity": parity, "third": batch["id"] % 3}

    options: dict[str, Any] = {"file_per_source": True}

    def job(columns: list[str]) -> Any:
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
        return resumable_write(
            ds.map_batches(with_parts), tmp_path / "out", partition_cols=columns, **options
        )

    with pytest.raises(ResumeError, match=r"^partition_cols names 'nothing'"):
        job(["nothing"])
    assert job(["parity", "third"]).files == 6 * 6
    table = pds.dataset(tmp_path / "out", partitioning="hive").to_table().to_pylist()
    assert sorted((row["id"], row["parity"], row["third"]) for row in table) == [
        (i, "even/ü" if i % 2 == 0 else None, i % 3) for i in range(600)
    ]
    files = {str(path) for path in (tmp_path / "out").rglob("*.parquet")}
    assert files == set(Checkpoint(tmp_path / "ckpt").files())
    before = snapshot(tmp_path / "out")
    assert job(["parity", "third"]).sources_skipped == 7
    assert snapshot(tmp_path / "out") == before


def test_a_folder_by_uri_and_a_compressed_option(source: Path, tmp_path: Path) -> None:
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    resumable_write(ds, f"file://{tmp_path}/out", format="json", compression="gzip")
    lines = 0
    for path in (tmp_path / "out").iterdir():
        lines += len(gzip.decompress(path.read_bytes()).splitlines())
    assert lines == 600
    assert ray.data.read_json(str(tmp_path / "out")).count() == 600
    again: dict[str, Any] = {"format": "json", "compression": "gzip"}
    assert resumable_write(ds, str(tmp_path / "out"), **again).sources_skipped == 7
    for other in ({"format": "json"}, {**again, "partition_cols": ["name"]}):
        with pytest.raises(PipelineChangedError, match="write_json"):
            resumable_write(ds, str(tmp_path / "out"), **other)


def test_the_sql_datasink_into_sqlite(source: Path, tmp_path: Path) -> None:
    """Durable in write: at least once, and exactly once where nothing fails."""
    database = tmp_path / "rows.db"
    with sqlite3.connect(database) as connection:
        connection.execute("create table rows (id integer, name text, weight real)")

    def job() -> Any:
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
        insert = "insert into rows values (?, ?, ?)"
        path = str(database)
        sink = SQLDatasink(insert, lambda: sqlite3.connect(path, timeout=30))
        return resumable_write(ds, sink)

    first = job()
    assert (first.sources_completed, first.rows_written, first.files) == (7, 600, 0)
    assert job().sources_skipped == 7
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select id, name from rows order by id").fetchall()
    assert rows == [(i, f"row {i}") for i in range(600)]
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="belongs to the output datasink SQL rows,"):
        resumable_write(ds, tmp_path / "out")
    others = SQLDatasink("INSERT INTO others (id) VALUES (?)", lambda: None)
    with pytest.raises(CheckpointError, match="write to datasink SQL others"):
        resumable_write(ds, others)


class Table(Datasink[Any]):
    """Publishes in one step at the end, as Lance and Iceberg do: a manifest names the parts."""

    def __init__(self, folder: Path, fail: str = "", mode: str = "append") -> None:
        self.folder, self.fail, self.mode = folder, fail, mode

    def on_write_start(self, schema: Any = None) -> None:
        # Ray knows no schema where it fuses the read with the write.
        assert schema is None or schema.names == ["id", "name", "weight"]
        self.folder.mkdir(exist_ok=True)

    def write(self, blocks: Any, ctx: Any) -> str:
        part = self.folder / f"part-{ctx.kwargs['write_uuid']}"
        assert not part.exists()
        rows = [int(i) for block in blocks for i in block["id"].to_pylist()]
        if self.fail == "write" and 300 in rows:
            raise RuntimeError("a bad row")
        part.write_text(" ".join(map(str, rows)))
        return part.name

    def on_write_failed(self, error: Exception) -> None:
        with (self.folder / "failures").open("a") as file:
            file.write(f"{type(error).__name__} {len(self.rows())}\n")

    def on_write_complete(self, write_result: Any) -> None:
        if self.fail == "before":
            raise RuntimeError("the catalog is down")
        with (self.folder / "manifest").open("a") as file:
            file.writelines(f"{part}\n" for part in write_result.write_returns)
        if self.fail == "after":
            raise RuntimeError("the answer got lost")

    def rows(self) -> list[int]:
        manifest = self.folder / "manifest"
        parts = manifest.read_text().split() if manifest.exists() else []
        return sorted(int(i) for part in parts for i in (self.folder / part).read_text().split())


@pytest.mark.extended
@pytest.mark.parametrize(
    "fail",
    [
        "",
        "write",
        pytest.param("before", marks=pytest.mark.long),
        pytest.param("after", marks=pytest.mark.long),
    ],
)
def test_a_datasink_that_publishes_at_the_end(
    fail: str, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def job(fail: str) -> Any:
        ds = resumable_read(
            ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt", override_num_blocks=7
        )
        return resumable_write(ds, Table(tmp_path / "table", fail))

    table = Table(tmp_path / "table")
    if fail:
        with pytest.raises(Exception, match=r"bad row|catalog is down|answer got lost"):
            job(fail)
    done = Checkpoint(tmp_path / "ckpt").status().completed if fail else 0
    # Once, as plain Ray Data does it, and after what was complete was published.
    failures = tmp_path / "table" / "failures"
    assert failures.exists() == bool(fail)
    if fail:
        (failure,) = failures.read_text().splitlines()
        assert failure.endswith(f" {len(table.rows())}")
    summary = job("")
    assert (summary.sources_skipped, summary.sources_completed) == (done, 7 - done)
    once = list(range(600))
    if fail == "write":
        assert 0 < done < 7, "what was complete is published and committed"
    elif fail:
        assert done <= 1, "the empty source has nothing to publish"
        assert "has no place for a mark" in caplog.text
    if fail == "after":
        # Between publishing and committing: published twice, as the documentation says.
        assert table.rows() == sorted(2 * once)
    else:
        assert table.rows() == once
    assert job("").sources_skipped == 7


def test_datasinks_that_are_refused(source: Path, tmp_path: Path) -> None:
    from ray.data._internal.datasource.bigquery_datasink import BigQueryDatasink
    from ray.data._internal.datasource.clickhouse_datasink import ClickHouseDatasink, SinkMode
    from ray.data._internal.datasource.image_datasink import ImageDatasink
    from ray.data._internal.datasource.kafka_datasink import KafkaDatasink
    from ray.data._internal.datasource.numpy_datasink import NumpyDatasink
    from ray.data._internal.datasource.parquet_datasink import ParquetDatasink
    from ray.data._internal.datasource.webdataset_datasink import WebDatasetDatasink
    from ray.data._internal.savemode import SaveMode

    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    before = snapshot(tmp_path)
    for files, named in (
        (ParquetDatasink(str(tmp_path / "out")), 'format="parquet"'),
        (WebDatasetDatasink(str(tmp_path / "out")), 'format="webdataset"'),
        (NumpyDatasink(str(tmp_path / "out"), "x"), 'format="numpy", column='),
        (ImageDatasink(str(tmp_path / "out"), "x", "png"), 'format="images", column='),
    ):
        with pytest.raises(NonResumableError, match=rf"Give the folder itself.* {named}"):
            resumable_write(ds, files)
    for key in ("acks", "request.required.acks"):
        kafka = object.__new__(KafkaDatasink)
        kafka.topic, kafka.producer_config = "rows", {key: 0}
        with pytest.raises(NonResumableError, match=rf"{key}=0, with which .* Leave it out"):
            resumable_write(ds, kafka)
        kafka.producer_config = {key: "all"}
        check_datasink(kafka)
    for mode in ("overwrite", "create"):
        with pytest.raises(NonResumableError, match=mode):
            resumable_write(ds, Table(tmp_path / "table", mode=mode))
    for rays in (SaveMode.OVERWRITE, SaveMode.CREATE, SaveMode.IGNORE, SaveMode.ERROR):
        with pytest.raises(NonResumableError, match=rays.value):
            resumable_write(ds, Table(tmp_path / "table", mode=rays))
    for theirs in (SinkMode.OVERWRITE, SinkMode.CREATE):
        with pytest.raises(NonResumableError, match=theirs.name.lower()):
            resumable_write(ds, ClickHouseDatasink("rows", "clickhouse://nobody@nowhere", theirs))
    # Made without its client library; this is what Ray's default is.
    bigquery = object.__new__(BigQueryDatasink)
    bigquery.overwrite_table = True
    with pytest.raises(NonResumableError, match="overwrite_table=False"):
        resumable_write(ds, bigquery)
    with pytest.raises(TypeError, match="folders alone"):
        resumable_write(ds, Table(tmp_path / "table"), compression="zstd")
    with pytest.raises(NonResumableError, match="got no sink"):
        resumable_write(ds)
    assert snapshot(tmp_path) == before


def test_the_names_of_datasinks_tell_tables_apart_and_no_secrets(tmp_path: Path) -> None:
    from ray.data._internal.datasource.mongo_datasink import MongoDatasink

    insert = "insert\n into shop.rows(id) values (?)"
    assert title_of(SQLDatasink(insert, lambda: None)) == "datasink SQL shop.rows"
    assert title_of(SQLDatasink("call put(?)", lambda: None)) == "datasink SQL"
    mongo = object.__new__(MongoDatasink)
    mongo.uri, mongo.database, mongo.collection = "mongodb://me:secret@host", "shop", "rows"
    assert title_of(mongo) == "datasink Mongo shop.rows"
    assert title_of(Table(tmp_path)) == "datasink Table"
    delta_datasink = pytest.importorskip(
        "ray.data._internal.datasource.delta_datasink", reason="Ray 2.58"
    )
    DeltaDatasink = delta_datasink.DeltaDatasink  # noqa: N806
    delta = type("DeltaDatasink", (DeltaDatasink,), {})
    assert title_of(delta("/tables/rows/")) == "datasink Delta /tables/rows"
    assert title_of(DeltaDatasink("rows")) == f"datasink Delta {Path.cwd()}/rows"
    assert title_of(DeltaDatasink("s3://bucket/rows")) == "datasink Delta s3://bucket/rows"


def test_a_udf_as_sink(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "sent"
    out.mkdir()

    @resumable(sink=True)
    def send(batch: Any) -> Any:
        (out / os.urandom(8).hex()).write_text(" ".join(map(str, batch["id"])))
        return batch

    @resumable
    def keep(batch: Any) -> Any:
        return batch

    def read() -> Any:
        return resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")

    for pipeline, sink in (
        (read().map_batches(send), out),
        (read().map_batches(send).map_batches(keep), None),
    ):
        with pytest.raises(NonResumableError, match="last operator"):
            resumable_write(pipeline, sink)
    summary = resumable_write(read().map_batches(send, batch_size=150))
    assert (summary.sources_completed, summary.rows_written) == (7, 600)
    sent = sorted(int(i) for path in out.iterdir() for i in path.read_text().split())
    assert sent == list(range(600))
    assert resumable_write(read().map_batches(send, batch_size=150)).sources_skipped == 7


@pytest.mark.extended
def test_a_table_is_published_while_the_pass_goes_on(source: Path, tmp_path: Path) -> None:
    """The last source waits until others are visible and committed, and then fails."""
    seen = tmp_path / "seen"

    @resumable
    def waiting(batch: Any) -> Any:
        deadline = time.monotonic() + 60
        while 599 in batch["id"] and not seen.exists():
            if (
                Checkpoint(tmp_path / "ckpt").status().completed
                and Table(tmp_path / "table").rows()
            ):
                seen.touch()
                raise RuntimeError("a bad row")
            assert time.monotonic() < deadline, "nothing was published"
            time.sleep(0.1)
        return batch

    def job() -> Any:
        ds = resumable_read(
            ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt", override_num_blocks=7
        ).map_batches(waiting, batch_size=None)
        sink = Table(tmp_path / "table")
        return resumable_write(ds, sink, commit_interval_s=0.2, publish_interval_s=0.5)

    with pytest.raises(Exception, match="a bad row"):
        job()
    summary = job()
    assert summary.sources_skipped >= 1
    assert Table(tmp_path / "table").rows() == list(range(600))
