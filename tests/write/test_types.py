"""The types of the output: those of plain Ray Data, the same in all files, or as the user says."""

from __future__ import annotations

import datetime as dt
import decimal
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest
import ray
from pyarrow.fs import LocalFileSystem

from ray_resume import (
    Checkpoint,
    CheckpointError,
    PipelineChangedError,
    ResumeError,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.core.filenames import NAME_DIGEST_BYTES
from ray_resume.core.tokens import tokens
from ray_resume.raydata import blocks
from ray_resume.run.client import LedgerClient
from ray_resume.testing import rows_of
from ray_resume.write.file_sink import FileSink
from ray_resume.write.folder import Folder
from ray_resume.write.formats import FileFormat
from ray_resume.write.layout import Layout

STRUCT = pa.struct([("a", pa.int64()), ("b", pa.string())])

# A column of each type, of three rows. Plain Ray Data moves no views from task to task.
COLUMNS: dict[str, pa.Array] = {
    "null": pa.nulls(3),
    "large": pa.array(["a", None, "c"], pa.large_string()),
    "dictionary": pa.array(["a", "b", "a"]).dictionary_encode(),
    "half": pa.array(np.array([1.5, 2, 3], np.float16)),
    "decimal": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("3.25")]),
    "uint64": pa.array([2**64 - 1, None, 0], pa.uint64()),
    "list": pa.array([[1, None], None, []], pa.list_(pa.int32())),
    "large list": pa.array([["a"], None, []], pa.large_list(pa.string())),
    "two": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2)),
    "struct": pa.array([{"a": 1, "b": None}, None, {"a": None, "b": "x"}], STRUCT),
    "structs": pa.array([[{"a": 1, "b": "x"}], None, []], pa.list_(STRUCT)),
    "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "zone": pa.array([dt.datetime(2026, 1, 2)] * 3, pa.timestamp("ms", "Europe/Berlin")),
    "time": pa.array([dt.time(1, 2, 3)] * 3, pa.time64("ns")),
    "duration": pa.array([dt.timedelta(1)] * 3),
    "date": pa.array([dt.date(2026, 1, 2), None, dt.date(1, 1, 1)]),
    "fixed": pa.array([b"ab", None, b"cd"], pa.binary(2)),
    "tensor": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int64(), [2]), pa.array([[1, 2]] * 3, pa.list_(pa.int64(), 2))
    ),
}


def schemas_in(folder: Path) -> list[pa.Schema]:
    """Return the different schemas of the Parquet files in ``folder``."""
    found: list[pa.Schema] = []
    for path in sorted(folder.rglob("*.parquet")):
        schema = pq.read_schema(path).remove_metadata()
        if not any(schema.equals(other) for other in found):
            found.append(schema)
    return found


def read_by_others(folder: Path) -> list[int]:
    """Read a folder as pandas, pyarrow and Ray Data do, which must give the same ids."""
    by_pandas = sorted(pd.read_parquet(folder)["id"].tolist())
    by_arrow = sorted(pds.dataset(folder).to_table().column("id").to_pylist())
    by_ray = sorted(row["id"] for row in ray.data.read_parquet(str(folder)).take_all())
    assert by_pandas == by_arrow == by_ray
    return by_pandas


# Old versions of pyarrow cannot read back a list of fixed size that is null.
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_every_type_comes_out_as_from_plain_ray_data(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        pq.write_table(
            pa.table({"id": range(3 * number, 3 * number + 3)}), tmp_path / f"in/{number}.parquet"
        )

    def add(table: Any) -> Any:
        rows = [i % 3 for i in table["id"].to_pylist()]
        for name, column in COLUMNS.items():
            pieces = [column.slice(row, 1) for row in rows]
            table = table.append_column(name, pa.chunked_array(pieces, column.type))
        return table

    def rows_in(folder: Path) -> list[Any]:
        tables = [pq.ParquetFile(path).read() for path in folder.rglob("*.parquet")]
        return sorted((row for t in tables for row in t.to_pylist()), key=lambda row: row["id"])

    # One task for all, so that rows of several sources come in one block.
    plain = ray.data.read_parquet(str(tmp_path / "in"), override_num_blocks=1)
    plain.map_batches(add, batch_format="pyarrow").write_parquet(str(tmp_path / "plain"))
    ds = resumable_read(
        ray.data.read_parquet,
        str(tmp_path / "in"),
        checkpoint=tmp_path / "c",
        override_num_blocks=1,
    ).map_batches(resumable(add, one_to_one=True), batch_format="pyarrow")
    assert resumable_write(ds, tmp_path / "ours").rows_written == 9
    assert rows_in(tmp_path / "ours") == rows_in(tmp_path / "plain")
    (ours,) = schemas_in(tmp_path / "ours")
    (theirs,) = schemas_in(tmp_path / "plain")
    assert ours.equals(theirs)
    # Cut by source, and by a partition column, out of any order.
    ds = resumable_read(
        ray.data.read_parquet,
        str(tmp_path / "in"),
        checkpoint=tmp_path / "c2",
        override_num_blocks=1,
    ).map_batches(resumable(add, one_to_one=True), batch_format="pyarrow")
    resumable_write(
        ds, tmp_path / "parts", partition_cols=["dictionary"], target_file_bytes=1 << 20
    )
    expected = rows_in(tmp_path / "plain")
    for row in expected:
        del row["dictionary"]
    assert rows_in(tmp_path / "parts") == expected


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("merged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_files_have_one_schema(merged: bool, tmp_path: Path) -> None:
    """Over runs, too: what is written before a type is known gets it when the run is over."""
    (tmp_path / "in").mkdir()

    def write_input(start: int, stop: int) -> None:
        for i in range(start, stop):
            pq.write_table(pa.table({"id": [i]}), tmp_path / f"in/{i}.parquet")

    def row_of(i: int) -> dict[str, Any]:
        row: dict[str, Any] = {"s": None if i % 2 == 0 else "x", "n": i, "float": i / 2}
        row["struct"] = {"a": i, "b": "z" if i >= 3 else None}
        row["list"] = ["x"] if i == 4 else []
        row["late"] = 1 if i == 9 else None
        return {"id": i, **row}

    @resumable
    def vary(table: Any) -> Any:
        (i,) = table["id"].to_pylist()
        row = row_of(i)
        if i < 3:
            del row["struct"]["b"]
        columns = {name: pa.array([value]) for name, value in row.items()}
        columns["n"] = pa.array([i], [pa.int8(), pa.int32(), pa.int64()][i % 3])
        if i % 4 == 2:
            columns["float"] = pa.array([i // 2])
        if i not in (8, 9):
            del columns["late"]
        return pa.table(columns)

    def job(**options: Any) -> Any:
        ds = resumable_read(
            ray.data.read_parquet,
            str(tmp_path / "in"),
            checkpoint=tmp_path / "c",
            override_num_blocks=3,
        )
        ds = ds.map_batches(vary, batch_format="pyarrow")
        target = 1 << 20 if merged else None
        return resumable_write(ds, tmp_path / "out", target_file_bytes=target, **options)

    done = 0
    for stop in (3, 8, 10):
        write_input(done, stop)
        summary = job()
        assert (summary.sources_skipped, summary.sources_completed) == (done, stop - done)
        done = stop
        assert len(schemas_in(tmp_path / "out")) == 1
        assert read_by_others(tmp_path / "out") == list(range(stop))
        files = Checkpoint(tmp_path / "c").files()
        assert files == sorted(str(path) for path in (tmp_path / "out").iterdir())
        assert Checkpoint(tmp_path / "c").check().ok
    assert sorted(rows_of(tmp_path / "c"), key=lambda row: row["id"]) == list(
        map(row_of, range(10))
    )
    (schema,) = schemas_in(tmp_path / "out")
    assert schema.field("n").type == pa.int64()
    assert schema.field("late").type == pa.int64()
    # All is as it should be, so nothing is written again.
    before = sorted((tmp_path / "out").iterdir())
    assert job().sources_skipped == 10
    assert sorted((tmp_path / "out").iterdir()) == before


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_what_plain_ray_data_refuses_names_both_sources(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(2):
        pq.write_table(pa.table({"id": [i]}), tmp_path / f"in/{i}.parquet")

    def mix(table: Any) -> Any:
        value: Any = "text" if table["id"][0].as_py() else 7
        return table.append_column("mixed", pa.array([value]))

    plain = ray.data.read_parquet(str(tmp_path / "in"), override_num_blocks=1)
    plain = plain.map_batches(mix, batch_format="pyarrow", batch_size=1)
    with pytest.raises(Exception, match="incompatible types"):
        plain.write_parquet(str(tmp_path / "plain"))
    ds = resumable_read(
        ray.data.read_parquet, str(tmp_path / "in"), checkpoint=tmp_path / "c"
    ).map_batches(resumable(mix), batch_format="pyarrow")
    with pytest.raises(ResumeError, match="cannot be unified: column 'mixed'") as caught:
        resumable_write(ds, tmp_path / "out")
    for i in range(2):
        assert f"{tmp_path}/in/{i}.parquet" in str(caught.value)


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_a_schema_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(4):
        value = [1.0, 2.0, 2.5, None][i]
        table = pa.table({"v": pa.array([value], pa.float64()), "id": [i], "p": [i % 2]})
        pq.write_table(table, tmp_path / f"in/{i}.parquet")
    first = pa.field("id", pa.int32(), nullable=False, metadata={"unit": "m"})
    schema = pa.schema([first, ("v", pa.int64()), ("p", pa.int8())], metadata={"owner": "me"})

    def job(schema: Any, **options: Any) -> Any:
        ds = resumable_read(
            ray.data.read_parquet,
            str(tmp_path / "in"),
            checkpoint=tmp_path / "c",
            override_num_blocks=1,
            on_pipeline_change=options.pop("on_pipeline_change", "error"),
        )
        return resumable_write(ds, tmp_path / "out", schema=schema, **options)

    summary = job(schema, partition_cols=["p"])
    # The value that is no integer is in one source alone.
    assert (summary.sources_completed, summary.sources_failed) == (3, 1)
    (failed,) = Checkpoint(tmp_path / "c").sources("failed")
    assert failed.source_id == f"{tmp_path}/in/2.parquet"
    assert failed.error is not None
    assert failed.source_id in failed.error
    assert "column 'v'" in failed.error
    plain = ray.data.read_parquet([str(tmp_path / f"in/{i}.parquet") for i in (0, 1, 3)])
    plain.write_parquet(str(tmp_path / "plain"), partition_cols=["p"], schema=schema)
    (expected,) = schemas_in(tmp_path / "plain")
    assert schemas_in(tmp_path / "out") == [expected]
    paths = [*(tmp_path / "plain").rglob("*.parquet"), *(tmp_path / "out").rglob("*.parquet")]
    for path in paths:
        assert pq.read_schema(path).metadata == {b"owner": b"me"}
        assert pq.read_schema(path).field("id").metadata[b"unit"] == b"m"
    # Another schema is another pipeline; what it can hold is written again.
    wider = pa.schema([("id", pa.int64()), ("v", pa.float64()), ("p", pa.int8())])
    with pytest.raises(PipelineChangedError, match="v: int64"):
        job(wider, partition_cols=["p"])
    summary = job(wider, partition_cols=["p"], on_pipeline_change="continue")
    assert (summary.sources_skipped, summary.sources_completed) == (3, 1)
    assert schemas_in(tmp_path / "out") == [wider.remove(2)]
    assert Checkpoint(tmp_path / "c").check().ok
    with pytest.raises(TypeError, match=r"pyarrow\.Schema"):
        job({"id": "int64"})
    with pytest.raises(ValueError, match="two columns"):
        job(pa.schema([("id", pa.int64()), ("id", pa.int64())]))


class Agreeing(LedgerClient):
    """A ledger that agrees with what it is asked first."""

    def send(self, *events: Any) -> None:
        self.faults.extend(events)  # type: ignore[attr-defined]

    def agree(self, asked: Any, *, given: bool = False) -> bytes:
        return bytes(asked[0][0])


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_a_run_that_is_refused_changes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, copy = tmp_path / "in", tmp_path / "out", tmp_path / "copy"
    source.mkdir()

    def run(folder: Path) -> str:
        checkpoint = str(tmp_path / "checkpoint")
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=checkpoint)
        return resumable_write(ds, str(folder)).run_id

    pq.write_table(pa.table({"id": [1]}), source / "m.parquet")
    first = run(out)
    pq.write_table(pa.table({"id": [2], "x": [3]}), source / "o.parquet")
    with monkeypatch.context() as patch:
        # As if the driver had been killed before the files get one schema.
        patch.setattr("ray_resume.write.targets.retype_output", lambda *_: {})
        second = run(out)
    shutil.copytree(out, copy)
    before = {path: path.read_bytes() for path in copy.rglob("*.parquet")}
    with pytest.raises(CheckpointError):
        run(copy)
    assert {path: path.read_bytes() for path in copy.rglob("*.parquet")} == before
    run(out)
    assert len(schemas_in(out)) == 1
    assert read_by_others(out) == [1, 2]
    # Whoever retypes the file of a source, its record is of the run that completed it. That run
    # has said how ids are made, so a read that makes them otherwise is still refused.
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    assert {Path(s.source_id).name: s.run_id for s in checkpoint.sources()} == {
        "m.parquet": first,
        "o.parquet": second,
    }
    assert checkpoint.check().ok


def sink_into(folder: Path, layout: Layout, events: list[Any]) -> FileSink:
    client = Agreeing(None, "r", 1, events)  # type: ignore[arg-type]
    here = Folder(LocalFileSystem(), str(folder), str(folder))
    return FileSink(here, layout, "cccccccc-aaaaaaaaaaaa", bytes(2 * NAME_DIGEST_BYTES), client)


def test_views_in_the_sink(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": range(4),
            "s": pa.array(["a", None, "c", "d"], pa.string_view()),
            "b": pa.array([b"a", None, b"c", b"d"], pa.binary_view()),
            "k": pa.array(["p", "q", "p", None], pa.string_view()),
        }
    )
    events: list[Any] = []
    block = blocks.with_tracking_columns(table, np.array([1, 0, 1, 0], np.int32), tokens(1, 0, 4))
    try:
        pq.write_table(table, tmp_path / "plain.parquet")
    except pa.ArrowNotImplementedError:
        pytest.skip("This pyarrow writes no views to Parquet files.")
    sink_into(tmp_path / "out", Layout(FileFormat("parquet"), ("k",)), events).write([block], None)
    rows = [row for path in (tmp_path / "out").rglob("*.parquet") for row in read(path)]
    expected = table.drop_columns(["k"]).to_pylist()
    assert sorted(rows, key=lambda row: row["id"]) == expected
    assert sorted(event.rows for event in events) == [2, 2]


def read(path: Path) -> list[Any]:
    return list(pq.ParquetFile(path).read().to_pylist())


@pytest.mark.slow
def test_more_than_two_gigabytes_of_one_column(tmp_path: Path) -> None:
    """Arrow's strings have offsets of 32 bits: rows are sorted, and cut, without an overflow."""
    events: list[Any] = []
    sink = sink_into(tmp_path, Layout(FileFormat("parquet"), ("k",)), events)
    text, rows = "x" * (1 << 20), 750
    block = pa.table(
        {
            "s": pa.array([text + str(i) for i in range(rows)]),
            "id": np.arange(rows),
            "k": np.arange(rows) % 3,
        }
    )
    sources = (np.arange(rows) % 2).astype(np.int32)
    blocks_of = [blocks.with_tracking_columns(block, sources, tokens(i, 0, rows)) for i in range(3)]
    assert sum(one.nbytes for one in blocks_of) > 1 << 31
    sink.write(iter(blocks_of), None)
    assert sum(event.rows for event in events) == 3 * rows
    found = 0
    for path in tmp_path.rglob("*.parquet"):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            found += sum(int(i) >= 0 for i in file.read_row_group(group, ["id"])["id"].to_pylist())
    assert found == 3 * rows
