"""The table of sinks in `examples/what_works.md`: each row, beside what plain Ray Data writes.

Rows are written by jobs, of which most are killed by a bad row on the way, and read back. Plain Ray
Data writes in this process: its datasinks get the blocks that it would give them.
"""

from __future__ import annotations

import gzip
import os
import sqlite3
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as pds
import pyarrow.json
import pytest
import ray
from conftest import snapshot, write_file, write_source
from divided_outputs import DIVIDED, checked_files, values
from local_execution import execute
from manifest_table import Table
from page_tables import rows_of
from plain_writes import plainly
from ray.data import Dataset
from ray.data._internal.datasource.sql_datasink import SQLDatasink
from ray.data.datasource.datasink import Datasink
from table_driver import KINDS, datasink, ids_in_table, skip_if_not_installed

from ray_resume import (
    Checkpoint,
    CheckpointError,
    NonResumableError,
    PipelineChangedError,
    ResumeError,
    RunSummary,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.write.datasinks import check_datasink, publishes_on_complete, title_of

pytestmark = pytest.mark.usefixtures("cluster")

ROWS = rows_of("Writes")


def read(source: Path, checkpoint: Path, **options: Any) -> Dataset:
    return resumable_read(ray.data.read_parquet, str(source), checkpoint=checkpoint, **options)


def failing_at_first(folder: Path) -> Any:
    """Return a UDF that fails for the row 300 as long as there is a file ``broken``."""
    broken = folder / "broken"
    broken.touch()

    @resumable
    def failing(batch: Any) -> Any:
        if broken.exists() and 300 in batch["id"]:
            raise RuntimeError("a bad row")
        return batch

    return failing


def read_json(folder: Path) -> pa.Table:
    return pa.concat_tables(map(pyarrow.json.read_json, sorted(folder.iterdir())))


def read_csv(folder: Path) -> pa.Table:
    parsing = pyarrow.csv.ParseOptions(delimiter=";")
    some = sorted(folder.iterdir())
    return pa.concat_tables(pyarrow.csv.read_csv(path, parse_options=parsing) for path in some)


def read_as(format: str) -> Callable[[Path], pa.Table]:
    return lambda folder: pds.dataset(folder, format=format).to_table()


# Options of the format; how its files are read.
FORMATS: dict[str, tuple[dict[str, Any], Callable[[Path], pa.Table]]] = {
    "parquet": ({"compression": "zstd", "row_group_size": 10}, read_as("parquet")),
    "json": ({"force_ascii": False}, read_json),
    "csv": ({"delimiter": ";"}, read_csv),
    "orc": ({"compression": "zstd"}, read_as("orc")),
    "feather": ({}, read_as("feather")),
}


def a_format(format: str, source: Path, tmp_path: Path) -> None:
    options, read_back = FORMATS[format]
    failing = failing_at_first(tmp_path)

    def job() -> RunSummary:
        ds = read(source, tmp_path / "ckpt", override_num_blocks=7).map_batches(failing)
        return resumable_write(ds, tmp_path / "out", format=format, **options)

    with pytest.raises(Exception, match="a bad row"):
        job()
    (tmp_path / "broken").unlink()
    summary = job()
    assert summary.sources_completed + summary.sources_skipped == 7
    files = list((tmp_path / "out").iterdir())
    assert all(path.suffix == f".{format}" for path in files)
    assert sorted(map(str, files)) == Checkpoint(tmp_path / "ckpt").files()
    found = read_back(tmp_path / "out").sort_by("id")
    plain = ray.data.read_parquet(str(source))
    write = getattr(plain, f"write_{format}", None)
    if write is None:
        # Ray has no such writer, or not yet.
        expected = pa.concat_tables(execute(plain))
    else:
        given = options
        if format == "csv":
            given = {"write_options": pyarrow.csv.WriteOptions(delimiter=";")}
        with plainly():
            write(str(tmp_path / "plain"), **given)
        expected = read_back(tmp_path / "plain")
    assert found.schema.equals(expected.schema)
    assert found.equals(expected.sort_by("id"))
    if format == "parquet":
        metadata = pa.parquet.ParquetFile(files[0]).metadata
        assert metadata.row_group(0).num_rows == 10
        assert metadata.row_group(0).column(0).compression == "ZSTD"


def partitions(source: Path, tmp_path: Path) -> None:
    @resumable
    def with_parts(batch: Any) -> Any:
        parity = ["even/ü" if i % 2 == 0 else None for i in batch["id"]]
        return {**batch, "parity": parity, "third": batch["id"] % 3}

    def job(columns: list[str]) -> RunSummary:
        ds = read(source, tmp_path / "ckpt").map_batches(with_parts)
        return resumable_write(ds, tmp_path / "out", partition_cols=columns, file_per_source=True)

    columns = ["parity", "third"]
    with pytest.raises(ResumeError, match=r"^partition_cols names 'nothing'"):
        job(["nothing"])
    assert job(columns).files == 6 * 6
    with plainly():
        plain = ray.data.read_parquet(str(source)).map_batches(with_parts)
        plain.write_parquet(str(tmp_path / "plain"), partition_cols=columns)
    found, expected = (
        pds.dataset(tmp_path / name, partitioning="hive").to_table().sort_by("id")
        for name in ("out", "plain")
    )
    assert found.schema.equals(expected.schema)
    assert found.to_pylist() == expected.to_pylist()
    files = {str(path) for path in (tmp_path / "out").rglob("*.parquet")}
    assert files == set(Checkpoint(tmp_path / "ckpt").files())
    before = snapshot(tmp_path / "out")
    assert job(columns).sources_skipped == 7
    assert snapshot(tmp_path / "out") == before


def a_uri(source: Path, tmp_path: Path) -> None:
    """Of a bucket: `test_storage`."""
    ds = read(source, tmp_path / "ckpt")
    resumable_write(ds, f"file://{tmp_path}/out", format="json", compression="gzip")
    with plainly():
        plain = ray.data.read_parquet(str(source))
        plain.write_json(f"file://{tmp_path}/plain", compression="gzip")

    def lines(name: str) -> list[bytes]:
        files = (tmp_path / name).iterdir()
        return sorted(
            line for path in files for line in gzip.decompress(path.read_bytes()).splitlines()
        )

    assert lines("out") == lines("plain")
    assert len(lines("out")) == 600
    again: dict[str, Any] = {"format": "json", "compression": "gzip"}
    assert resumable_write(ds, str(tmp_path / "out"), **again).sources_skipped == 7
    for other in ({"format": "json"}, {**again, "partition_cols": ["name"]}):
        with pytest.raises(PipelineChangedError, match="write_json"):
            resumable_write(ds, str(tmp_path / "out"), **other)


FILES, FILE_ROWS = 12, 5


def a_divided_format(name: str, _: Path, tmp_path: Path) -> None:
    udf, own = DIVIDED[name]
    source = tmp_path / "divided"

    def run(**options: Any) -> RunSummary:
        ds = read(
            source, tmp_path / "ckpt", override_num_blocks=2, on_pipeline_change="continue"
        ).map_batches(udf)
        return resumable_write(ds, tmp_path / "out", format=name, **own, **options)

    write_source(source, files=FILES, rows=FILE_ROWS)
    with pytest.raises(ValueError, match="files have no partition_cols"):
        run(partition_cols=["cls"])
    summary = run()
    assert (summary.sources_completed, summary.rows_written) == (FILES, FILES * FILE_ROWS)
    before = checked_files(tmp_path)
    assert len(before) == summary.files
    assert len(before) == FILES * FILE_ROWS if name == "images" else len(before) <= 2

    # The rows of the other sources are copied.
    time.sleep(0.01)
    write_file(source / "00003.parquet", 1000, 1002)
    assert run().rows_read == 2
    after = checked_files(tmp_path)
    assert set(before) - set(after)

    write_file(source / "new.parquet", 2000, 2003)
    if name == "images":
        with pytest.raises(ValueError, match="each image has a file of its own"):
            run(target_file_bytes=1 << 20)
        assert run(name_column="id").files == 3
        assert sum("~" in path.name for path in checked_files(tmp_path)) == 3
    else:
        assert run(target_file_bytes=1 << 20).files == 1
        assert len(checked_files(tmp_path)) == 1

    with plainly():
        plain = ray.data.read_parquet(str(source)).map_batches(udf)
        getattr(plain, f"write_{name}")(str(tmp_path / "plain"), **own)
    assert values(tmp_path / "out", name) == values(tmp_path / "plain", name)


def durable_writes(source: Path, tmp_path: Path) -> None:
    """Into SQLite: at least once, and exactly once where nothing fails."""

    def connection(name: str) -> Any:
        return sqlite3.connect(f"{tmp_path}/{name}.db", timeout=30)

    for name in ("rows", "plain"):
        with connection(name) as made:
            made.execute("create table rows (id integer, name text, weight real)")
    insert = "insert into rows values (?, ?, ?)"

    def job() -> RunSummary:
        sink = SQLDatasink(insert, partial(connection, "rows"))
        return resumable_write(read(source, tmp_path / "ckpt"), sink)

    first = job()
    assert (first.sources_completed, first.rows_written, first.files) == (7, 600, 0)
    assert job().sources_skipped == 7
    with plainly():
        ray.data.read_parquet(str(source)).write_sql(insert, partial(connection, "plain"))
    rows, plain = (
        connection(name).execute("select * from rows order by id").fetchall()
        for name in ("rows", "plain")
    )
    assert rows == plain
    ds = read(source, tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="belongs to the output datasink SQL rows,"):
        resumable_write(ds, tmp_path / "out")
    others = SQLDatasink("INSERT INTO others (id) VALUES (?)", lambda: None)
    with pytest.raises(CheckpointError, match="write to datasink SQL others"):
        resumable_write(ds, others)


def snowflake(source: Path, tmp_path: Path) -> None:
    """What its writer makes is a datasink for SQL, which `durable_writes` tests."""
    made: list[Datasink[Any]] = []
    # Its connector is not installed; nothing connects.
    modules = {name: ModuleType(name) for name in ("snowflake", "snowflake.connector")}
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(Dataset, "write_datasink", lambda _, sink, **options: made.append(sink)),
    ):
        # Its annotation is that of one string.
        parameters: Any = {"user": "me"}
        ray.data.from_items([{"id": 1}]).write_snowflake("rows", parameters)
    (sink,) = made
    assert isinstance(sink, SQLDatasink)
    check_datasink(sink)
    assert title_of(sink) == "datasink SQL rows"
    assert not publishes_on_complete(sink)


def kafka(source: Path, tmp_path: Path) -> None:
    """Without its client library and a broker: what is refused, and how it is treated."""
    from ray.data._internal.datasource.kafka_datasink import KafkaDatasink

    ds = read(source, tmp_path / "ckpt")
    sink = object.__new__(KafkaDatasink)
    sink.topic = "rows"
    for key in ("acks", "request.required.acks"):
        sink.producer_config = {key: 0}
        with pytest.raises(NonResumableError, match=rf"{key}=0, with which .* Leave it out"):
            resumable_write(ds, sink)
        sink.producer_config = {key: "all"}
        check_datasink(sink)
    assert title_of(sink) == "datasink Kafka rows"
    assert not publishes_on_complete(sink)


def turbopuffer(source: Path, tmp_path: Path) -> None:
    """Without its client library and a server: how it is treated."""
    from ray.data._internal.datasource.turbopuffer_datasink import TurbopufferDatasink

    sink = object.__new__(TurbopufferDatasink)
    sink.namespace = "rows"
    check_datasink(sink)
    assert title_of(sink).endswith(" rows")
    assert not publishes_on_complete(sink)


def a_table(kinds: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    for kind in kinds:
        skip_if_not_installed(kind)
        (tmp_path / kind).mkdir()
        _a_table(kind, source, tmp_path / kind)


def _a_table(kind: str, source: Path, tmp_path: Path) -> None:
    failing = failing_at_first(tmp_path)

    def job() -> RunSummary:
        ds = read(source, tmp_path / "ckpt", override_num_blocks=7).map_batches(failing)
        return resumable_write(ds, datasink(kind, tmp_path))

    with pytest.raises(Exception, match="a bad row"):
        job()
    done = [record.rows for record in Checkpoint(tmp_path / "ckpt").sources("completed")]
    published = ids_in_table(kind, tmp_path)
    assert len(published) == len(set(published)) == sum(done), "committed is published"
    assert 300 not in published
    (tmp_path / "broken").unlink()
    summary = job()
    assert (summary.sources_skipped, summary.sources_completed) == (len(done), 7 - len(done))
    (tmp_path / "plain").mkdir()
    with plainly():
        ray.data.read_parquet(str(source)).write_datasink(datasink(kind, tmp_path / "plain"))
    assert ids_in_table(kind, tmp_path) == ids_in_table(kind, tmp_path / "plain")
    new = source / f"{kind}.parquet"
    write_file(new, 600, 650)
    summary = job()
    assert (summary.sources_skipped, summary.sources_completed) == (7, 1)
    assert ids_in_table(kind, tmp_path) == list(range(650))
    new.unlink()
    with pytest.raises(CheckpointError, match="belongs to the output datasink"):
        resumable_write(
            read(source, tmp_path / "ckpt", on_pipeline_change="continue"),
            SQLDatasink("insert into others values (?)", lambda: None),
        )


def publishing(source: Path, tmp_path: Path) -> None:
    """`test_sinks` has failures and crashes around publishing."""
    ds = read(source, tmp_path / "ckpt", override_num_blocks=7)
    sink = Table(tmp_path / "table")
    assert resumable_write(ds, sink).sources_completed == 7
    with plainly():
        ray.data.read_parquet(str(source)).write_datasink(Table(tmp_path / "plain"))
    assert sink.rows() == Table(tmp_path / "plain").rows() == list(range(600))
    assert not (tmp_path / "table" / "failures").exists()


def no_sink(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "sent"
    out.mkdir()

    @resumable(sink=True)
    def send(batch: Any) -> Any:
        (out / os.urandom(8).hex()).write_text(" ".join(map(str, batch["id"])))
        return batch

    @resumable
    def keep(batch: Any) -> Any:
        return batch

    def pipeline() -> Dataset:
        return read(source, tmp_path / "ckpt").map_batches(send, batch_size=150)

    for refused, sink in ((pipeline(), out), (pipeline().map_batches(keep), None)):
        with pytest.raises(NonResumableError, match="last operator"):
            resumable_write(refused, sink)
    summary = resumable_write(pipeline())
    assert (summary.sources_completed, summary.rows_written) == (7, 600)
    sent = sorted(int(i) for path in out.iterdir() for i in path.read_text().split())
    assert sent == list(range(600))
    assert resumable_write(pipeline()).sources_skipped == 7


# What Ray's writers of files are given, and what the refusal says to give instead.
WRITERS: dict[str, tuple[tuple[Any, ...], str]] = {
    "write_parquet": ((), 'format="parquet"'),
    "write_webdataset": ((), 'format="webdataset"'),
    "write_numpy": ((), 'format="numpy", column='),
    "write_images": (("id",), 'format="images", column='),
    "write_tfrecords": ((), 'format="tfrecords"'),
}


def a_file_datasink(name: str, source: Path, tmp_path: Path) -> None:
    arguments, instead = WRITERS[name]
    options = {"column": "id"} if name == "write_numpy" else {}
    ds = read(source, tmp_path / "ckpt")
    before = snapshot(tmp_path)
    made: list[Any] = []
    with mock.patch.object(Dataset, "write_datasink", lambda _, sink, **options: made.append(sink)):
        plain: Any = ray.data.read_parquet(str(source))
        getattr(plain, name)(str(tmp_path / "out"), *arguments, **options)
    with pytest.raises(NonResumableError, match=rf"Give the folder itself.* {instead}"):
        resumable_write(ds, made[0])
    assert snapshot(tmp_path) == before


def a_mode(mode: str, source: Path, tmp_path: Path) -> None:
    from ray.data._internal.datasource.bigquery_datasink import BigQueryDatasink
    from ray.data._internal.datasource.clickhouse_datasink import ClickHouseDatasink, SinkMode
    from ray.data._internal.savemode import SaveMode

    ds = read(source, tmp_path / "ckpt")
    before = snapshot(tmp_path)
    sinks: list[Any] = [
        Table(tmp_path / "table", mode=mode),
        Table(tmp_path / "table", mode=SaveMode[mode.upper()]),
    ]
    if hasattr(SinkMode, mode.upper()):
        sinks.append(
            ClickHouseDatasink("rows", "clickhouse://nobody@nowhere", SinkMode[mode.upper()])
        )
    for sink in sinks:
        with pytest.raises(NonResumableError, match=f"'{mode}'.* Use its append mode"):
            resumable_write(ds, sink)
    if mode == "overwrite":
        # Made without its client library; this is what Ray's default is.
        bigquery = object.__new__(BigQueryDatasink)
        bigquery.overwrite_table = True
        with pytest.raises(NonResumableError, match="overwrite_table=False"):
            resumable_write(ds, bigquery)
    assert snapshot(tmp_path) == before


TABLES = {"Lance": ("lance",), "lance-ray": ("lance_ray",), "Iceberg": ("iceberg", "upsert")}
CHECKS: dict[str, Callable[[Path, Path], None]] = {
    'a folder: format="parquet"': partial(a_format, "parquet"),
    **{f'a folder: "{name}"': partial(a_format, name) for name in FORMATS if name != "parquet"},
    "such a folder with partition_cols": partitions,
    "a URI": a_uri,
    'a folder: format="webdataset"': partial(a_divided_format, "webdataset"),
    **{
        f'a folder: "{name}"': partial(a_divided_format, name)
        for name in ("tfrecords", "numpy", "images")
    },
    "a ray.data.Datasink whose write makes rows durable": durable_writes,
    "Snowflake": snowflake,
    "Kafka": kafka,
    "turbopuffer": turbopuffer,
    **{f"a table: {name}": partial(a_table, kinds) for name, kinds in TABLES.items()},
    "a table: Delta": partial(a_table, ("delta",)),
    "a table: any Datasink that publishes in on_write_complete": publishing,
    "no sink": no_sink,
    **{f"datasinks of Ray: {name}": partial(a_file_datasink, name) for name in WRITERS},
    **{f"modes: {mode}": partial(a_mode, mode) for mode in ("overwrite", "create", "ignore")},
}
# A gigabyte: `pip install tensorflow-cpu crc32c`, then `pytest -m slow -k tfrecords`.
SLOW = {'a folder: "tfrecords"', "datasinks of Ray: write_tfrecords"}
EXTENDED = {'a folder: format="webdataset"', 'a folder: "numpy"', 'a folder: "images"'}
EXTENDED |= {"a table: any Datasink that publishes in on_write_complete"}


def marks(name: str) -> list[pytest.MarkDecorator]:
    if name in SLOW:
        return [pytest.mark.slow]
    if name in EXTENDED:
        return [pytest.mark.extended]
    return [pytest.mark.long] if name.startswith("a table") else []


@pytest.mark.parametrize("name", [pytest.param(row.name, marks=marks(row.name)) for row in ROWS])
def test_a_row_of_the_table(name: str, source: Path, tmp_path: Path) -> None:
    assert name in CHECKS, "it is in the table, and has no test"
    CHECKS[name](source, tmp_path)


def test_what_is_tested_is_in_the_table() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    assert set(names) == set(CHECKS)
    assert {kind for kinds in [*TABLES.values(), ("delta",)] for kind in kinds} == set(KINDS)
