"""Tables as input: their files and fragments are sources, deletes and rewrites flow through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from lake_tables import Delta, Iceberg, Lance, Table
from ray.data.expressions import col

from ray_resume import (
    Checkpoint,
    CheckpointError,
    NonResumableError,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.raydata.table_reads import _of_columns, table_read

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(
    params=[Lance, *(pytest.param(kind, marks=pytest.mark.extended) for kind in (Delta, Iceberg))]
)
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Table:
    made: Table = request.param(tmp_path)
    for first in range(0, 40, 10):
        made.append(range(first, first + 10))
    return made


@resumable
def same(batch: pa.Table) -> pa.Table:
    return batch


def plain(reader: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return reader(*args, **kwargs)


def rows_of(ds: Any) -> list[dict[str, Any]]:
    return sorted(ds.take_all(), key=lambda row: row["id"])


def test_what_changes_in_a_table_changes_in_the_output(table: Table, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out", tmp_path / "ckpt"

    def pipeline() -> Any:
        return table.read(resumable_read, checkpoint=checkpoint)

    def run(ds: Any = None) -> Any:
        ds = (ds or pipeline()).map_batches(same, batch_format="pyarrow")
        return resumable_write(ds, out, require_complete=True)

    def written() -> pa.Table:
        return pa.concat_tables(map(pq.read_table, Checkpoint(checkpoint).files()))

    def check() -> None:
        assert written().sort_by("id").to_pylist() == rows_of(table.read(plain))

    ds = pipeline()
    # The run reads the snapshot that there was when it was planned.
    table.append(range(40, 50))
    assert run(ds).sources_completed == 4
    assert written().num_rows == 40
    assert written().schema.equals(table.read(plain).schema().base_schema)
    assert ds.count() == 40
    table.delete(13)
    summary = run()
    assert (summary.sources_skipped, summary.sources_completed) == (3, 2)
    check()
    table.compact()
    summary = run()
    assert (summary.sources_skipped, summary.sources_total) == (0, 1)
    check()
    assert run().sources_skipped == 1


@pytest.mark.parametrize(
    "kind",
    [Lance, pytest.param(Iceberg, marks=pytest.mark.extended)],
    ids=lambda kind: kind.__name__,
)
def test_a_column_with_another_name_has_it_in_the_output(kind: type[Table], tmp_path: Path) -> None:
    table: Any = kind(tmp_path)
    table.append(range(10))
    expected = {"id", "text"}
    for _ in range(2):
        ds = table.read(resumable_read, checkpoint=tmp_path / "ckpt")
        assert resumable_write(ds, tmp_path / "out").sources_completed == 1
        (file,) = Checkpoint(tmp_path / "ckpt").files()
        assert set(pq.read_schema(file).names) == expected == set(table.read(plain).schema().names)
        if "text" in expected:
            table.rename("text", "words")
            expected = {"id", "words"}


def test_rows_and_columns_are_selected_as_plain_ray_data_does(table: Table, tmp_path: Path) -> None:
    def pipeline(read: Callable[..., Any], **kwargs: Any) -> Any:
        ds = table.read(read, **kwargs).filter(expr=col("id") > 7)
        return ds.rename_columns({"text": "words"}).select_columns(["words", "id"])

    ds = pipeline(resumable_read, checkpoint=tmp_path / "ckpt")
    expected = pipeline(plain)
    assert ds.schema().base_schema.equals(expected.schema().base_schema)
    resumable_write(ds, tmp_path / "out")
    written = pq.read_table(tmp_path / "out").sort_by("id")
    assert written.column_names == expected.schema().names
    assert written.to_pylist() == rows_of(expected)


def test_another_table_is_refused(table: Table, tmp_path: Path) -> None:
    resumable_write(table.read(resumable_read, checkpoint=tmp_path / "ckpt"), tmp_path / "out")
    (tmp_path / "other").mkdir()
    other = Lance(tmp_path / "other")
    other.append(range(10))
    ds = other.read(resumable_read, checkpoint=tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="the files or fragments of the table"):
        resumable_write(ds, tmp_path / "out")


def test_a_default_that_an_iceberg_table_got_later_changes_older_files() -> None:
    types = pytest.importorskip("pyiceberg.types")
    schema = pytest.importorskip("pyiceberg.schema").Schema
    old = types.NestedField(1, "id", types.LongType())
    new = types.NestedField(2, "n", types.LongType())
    default = types.NestedField(2, "n", types.LongType(), initial_default=7)
    file = SimpleNamespace(value_counts={1: 10})
    columns = _of_columns(file, schema(old))
    assert _of_columns(file, schema(old, new)) == columns
    assert _of_columns(file, schema(old, default)) != columns
    file.value_counts[2] = 10
    # The file has values of its own.
    assert _of_columns(file, schema(old, default)) == _of_columns(file, schema(old, new))


def test_a_scan_in_any_order_is_not_repeatable(tmp_path: Path) -> None:
    table = Lance(tmp_path)
    table.append(range(10))
    for options in ({}, {"scan_in_order": True}, {"scan_in_order": False}):
        read = table_read(ray.data.read_lance, (table.uri,), {"scanner_options": options})
        assert read.repeatable == options.get("scan_in_order", True)


def test_a_scan_over_all_fragments_is_refused(tmp_path: Path) -> None:
    table = Lance(tmp_path)
    table.append(range(10))
    for option in ({"limit": 3}, {"offset": 2}, {"nearest": {"column": "x", "q": [1], "k": 1}}):
        with pytest.raises(NonResumableError, match="Leave it out"):
            table.read(resumable_read, checkpoint=tmp_path / "ckpt", scanner_options=option)
    assert not (tmp_path / "ckpt").exists()
