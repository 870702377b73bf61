"""The schema of a Parquet read is the same in all runs of a checkpoint, or widens with a word."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
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
from ray_resume.checkpoint.read_schemas import ReadSchemaStore
from ray_resume.checkpoint.shared.objects import StoredObjects
from ray_resume.core.read_schema import ReadSchema, holds
from ray_resume.raydata.scans import reads_with_scans

pytestmark = pytest.mark.skipif(
    not reads_with_scans("read_parquet"), reason="an older Ray reads each file by its own schema"
)


def write(folder: Path, number: int, **columns: Any) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"id": [number], **columns}), folder / f"{number:02d}.parquet")


def rows_of(checkpoint: Path) -> list[dict[str, Any]]:
    tables = [pq.ParquetFile(path).read() for path in Checkpoint(checkpoint).files()]
    return sorted((row for t in tables for row in t.to_pylist()), key=lambda row: row["id"])


class Job:
    """The same script, run again and again; rows whose ids are in ``failing`` fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *failing: int, select: bool = False, **options: Any) -> Any:
        @resumable(on_error="mark_failed")
        def fail(table: Any) -> Any:
            if table["id"][0].as_py() in failing:
                raise RuntimeError("not yet")
            return table

        ds = resumable_read(
            ray.data.read_parquet,
            str(self.folder / "in"),
            checkpoint=self.folder / "c",
            override_num_blocks=2,
            **options,
        )
        if select:
            ds = ds.drop_columns(["other"])
        ds.context.max_errored_blocks = -1
        return resumable_write(ds.map_batches(fail, batch_format="pyarrow"), self.folder / "out")

    def is_done(self, **options: Any) -> bool:
        """Run once more, and say whether nothing is left to be done."""
        summary = self.run(**options)
        return not summary.sources_failed + summary.sources_pending

    def plain(self, *last: int) -> list[dict[str, Any]]:
        """Return what plain Ray Data reads, the files of these numbers last."""
        paths = sorted(
            (self.folder / "in").iterdir(), key=lambda path: (int(path.stem) in last, path)
        )
        rows = ray.data.read_parquet([str(path) for path in paths]).take_all()
        return sorted(rows, key=lambda row: row["id"])


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
def test_a_file_that_was_added_takes_no_column_away(tmp_path: Path) -> None:
    for number in range(1, 18):
        more = {"extra": ["x"]} if number >= 16 else {}
        write(tmp_path / "in", number, other=[0], **more)
    job = Job(tmp_path)
    assert job.run(16, 17, select=True).sources_failed == 2
    # Now the first 16 files have no column that is called extra.
    write(tmp_path / "in", 0, other=[0])
    assert job.is_done(select=True)
    expected = [{**row, "extra": row["extra"]} for row in job.plain(0)]
    for row in expected:
        del row["other"]
    assert rows_of(tmp_path / "c") == expected
    assert expected[17]["extra"] == "x"


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_a_file_that_was_repaired_adds_its_column_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(18):
        more = {"lang": ["en"]} if number >= 16 else {}
        write(tmp_path / "in", number, **more)
    (tmp_path / "in" / "00.parquet").write_bytes(b"no file")
    job = Job(tmp_path)
    assert job.run(17).sources_completed == 16
    write(tmp_path / "in", 0, lang=["de"])
    with caplog.at_level(logging.WARNING, "ray_resume"):
        assert job.is_done()
    (warning,) = [text for text in caplog.messages if "widened the schema" in text]
    assert "'lang' (string) is new. 16 sources" in warning
    assert f"has null ({tmp_path}/in/16.parquet). To read" in warning
    # Sources that were completed stay as they are; all others are as plain Ray Data has them.
    expected = job.plain()
    assert expected[16]["lang"] == "en"
    rows = rows_of(tmp_path / "c")
    assert rows == [{**row, "lang": None} if row["id"] == 16 else row for row in expected]
    assert rows[17]["lang"] == "en"
    # The remedy in the warning makes it the output of plain Ray Data.
    caplog.clear()
    Checkpoint(tmp_path / "c").reset(state="completed")
    with caplog.at_level(logging.WARNING, "ray_resume"):
        assert job.is_done()
    assert rows_of(tmp_path / "c") == expected
    assert not [text for text in caplog.messages if "schema" in text]


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_a_column_that_the_input_gets_is_no_other_pipeline_where_columns_are_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray makes a selection of all other columns of ``drop_columns``."""
    job = Job(tmp_path)
    names: dict[str, Any] = {}
    for number, name in enumerate(("other", "lang", "text")):
        names[name] = ["x"]
        write(tmp_path / "in", 9 - number, **names)
        with caplog.at_level(logging.WARNING, "ray_resume"):
            assert job.is_done(select=True)
        expected = job.plain()
        for row in expected:
            del row["other"]
        assert rows_of(tmp_path / "c") == expected
    # The files that are done have none of the new columns.
    warnings = [text for text in caplog.messages if "widened the schema" in text]
    assert len(warnings) == 2
    assert all("has null. To read" in text for text in warnings)
    # Whatever else is left out is another pipeline.
    with pytest.raises(PipelineChangedError, match="columns"):
        job.run(select=True, columns=["id", "other", "lang"])


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
def test_a_file_with_wider_types_widens_those_of_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "in", 0, n=[1], m=pa.array([2], pa.int32()))
    job = Job(tmp_path)
    assert job.is_done()
    write(tmp_path / "in", 1, n=[1.5], m=pa.array([1 << 40], pa.int64()))
    with caplog.at_level(logging.WARNING, "ray_resume"):
        assert job.is_done()
    (warning,) = [text for text in caplog.messages if "widened the schema" in text]
    assert "'n' is double, and was int64, 'm' is int64, and was int32" in warning
    # The run after that finds both on record.
    write(tmp_path / "in", 2, n=[7], m=[3])
    assert job.is_done()
    assert rows_of(tmp_path / "c") == job.plain()
    types = {pq.read_schema(file).field("n").type for file in Checkpoint(tmp_path / "c").files()}
    assert types == {pa.float64()}


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
def test_types_that_do_not_go_together_name_the_file(tmp_path: Path) -> None:
    write(tmp_path / "in", 50, n=[1])
    job = Job(tmp_path)
    assert job.is_done()
    # The files that decide on the schema have another type now, in all of them or in one.
    for number in range(16):
        write(tmp_path / "in", number, n=["text"])
    with pytest.raises(ResumeError, match="column 'n' has type string") as caught:
        job.run()
    for part in (f"{tmp_path}/in/00.parquet", "int64 in the runs before", "reset(state='all')"):
        assert part in str(caught.value)
    write(tmp_path / "in", 1, n=[1])
    with pytest.raises(pa.ArrowTypeError, match="incompatible types"):
        ray.data.read_parquet(str(tmp_path / "in"))
    with pytest.raises(ResumeError, match="schema= to read_parquet") as caught:
        job.run()
    for name in ("00", "01"):
        assert f"{tmp_path}/in/{name}.parquet" in str(caught.value)
    # Nothing is bound by what no source has any more.
    for number in (1, 50):
        write(tmp_path / "in", number, n=["text"])
    assert job.is_done()
    assert rows_of(tmp_path / "c") == job.plain()


def test_what_runs_have_recorded() -> None:
    one, two = pa.schema([("a", pa.int32())]), pa.schema([("b", pa.string()), ("a", pa.int64())])
    both = pa.schema([("a", pa.int64()), ("b", pa.string())])
    assert holds(both, two)
    assert not holds(both, one)
    assert not holds(one, both)
    found = ReadSchema(two, (one,), both)
    assert not found.is_recorded
    assert found.news() == ["'a' is int64, and was int32", "'b' (string) is new"]
    assert ReadSchema(one, (two, both), both).is_recorded


def test_recorded_schemas_come_in_the_order_of_runs(tmp_path: Path) -> None:
    store = ReadSchemaStore(StoredObjects(LocalFileSystem(), str(tmp_path), str(tmp_path)))
    assert store.read() == []
    schemas = [pa.schema([(name, pa.int64())], metadata={"k": name}) for name in "abc"]
    for run_id, schema in zip(("9", "5", "7"), schemas, strict=True):
        store.write(run_id, schema)
    assert [one.metadata[b"k"] for one in store.read()] == [b"a", b"b", b"c"]
    store.settle("1", schemas[1])
    assert store.read() == [schemas[1]]
    (path,) = (tmp_path / "read_schemas").iterdir()
    path.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"read_schemas/1\.json cannot be read"):
        store.read()
    store.clear()
    assert store.read() == []
