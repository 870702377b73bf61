"""Row ranges: a file that is read from its start is many sources, and resumes within itself."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ids_in

from ray_resume import (
    Checkpoint,
    CheckpointError,
    NonResumableError,
    SourceChangedError,
    mark_failed,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.read import granularity

ROWS, SPLIT_ROWS = 103, 10
RANGES = -(-ROWS // SPLIT_ROWS)


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(ROWS):
            data = json.dumps({"id": number}).encode()
            member = tarfile.TarInfo(f"{number:06}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def avro(path: Path) -> None:
    fastavro = pytest.importorskip("fastavro")
    schema = {"type": "record", "name": "Row", "fields": [{"name": "id", "type": "long"}]}
    with path.open("wb") as file:
        fastavro.writer(file, schema, [{"id": number} for number in range(ROWS)])


def json_lines(path: Path) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"id": number}) + "\n" for number in range(ROWS))


def csv(path: Path) -> None:
    pa.csv.write_csv(pa.table({"id": range(ROWS)}), path)


def text(path: Path) -> None:
    path.write_text("".join(f"{number}\n" for number in range(ROWS)))


def parquet(path: Path) -> None:
    pq.write_table(pa.table({"id": range(ROWS)}), path, row_group_size=37)


FORMATS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "tar": ("read_webdataset", tar),
    "avro": ("read_avro", avro),
    "json.gz": ("read_json", json_lines),
    "csv": ("read_csv", csv),
    "txt": ("read_text", text),
    "parquet": ("read_parquet", parquet),
}


def numbers(batch: dict[str, Any]) -> list[int]:
    """Return the numbers of the rows of a batch, whatever the format."""
    if "json" in batch:
        return [value["id"] for value in batch["json"]]
    return [int(value) for value in batch["id" if "id" in batch else "text"]]


@pytest.mark.parametrize(
    "ending",
    ["tar", *(pytest.param(name, marks=pytest.mark.extended) for name in FORMATS if name != "tar")],
)
def test_a_file_resumes_within_itself(cluster: None, ending: str, tmp_path: Path) -> None:
    name, write = FORMATS[ending]
    path = tmp_path / "in" / f"one.{ending}"
    path.parent.mkdir()
    write(path)
    seen = tmp_path / "seen"
    seen.mkdir()

    def pipeline(bad: int | None) -> Any:
        @resumable
        def to_number(batch: Any) -> Any:
            here = numbers(batch)
            if bad in here:
                raise ValueError("a bad row")
            with (seen / "rows").open("a") as file:
                file.writelines(f"{number}\n" for number in here)
            return {"id": here}

        read = getattr(ray.data, name)
        ds = resumable_read(
            read,
            str(path),
            checkpoint=tmp_path / "ckpt",
            granularity="rows",
            split_rows=SPLIT_ROWS,
            on_code_change="ignore",
        )
        return ds.map_batches(to_number, batch_size=7)

    with pytest.raises(Exception, match="a bad row"):
        resumable_write(pipeline(57), tmp_path / "out", commit_interval_s=0.01)
    done = {r.source_id for r in Checkpoint(tmp_path / "ckpt").sources("completed")}
    assert f"{path}#rows=50-60" not in done
    (seen / "rows").unlink(missing_ok=True)
    summary = resumable_write(pipeline(None), tmp_path / "out")
    assert summary.complete
    assert summary.sources_total == RANGES
    assert summary.sources_skipped == len(done)
    # No row of a completed range has been through the UDF again.
    again = [int(line) for line in (seen / "rows").read_text().split()]
    assert not {f"{path}#rows={n // 10 * 10}-{n // 10 * 10 + 10}" for n in again} & done
    assert sorted(ids_in(tmp_path / "out")) == list(range(ROWS))
    ids = {record.source_id for record in Checkpoint(tmp_path / "ckpt").sources()}
    assert ids == {f"{path}#rows={n * 10}-{n * 10 + 10}" for n in range(RANGES)}
    status = Checkpoint(tmp_path / "ckpt").status()
    assert (status.total, status.completed, status.pending) == (RANGES, RANGES, 0)
    # Nothing is left, so no file is opened.
    path.chmod(0)
    assert resumable_write(pipeline(None), tmp_path / "out").sources_skipped == RANGES


def read_rows(folder: Path, **options: Any) -> Any:
    return resumable_read(
        ray.data.read_parquet,
        str(folder / "in"),
        checkpoint=folder / "ckpt",
        granularity="rows",
        **{"split_rows": SPLIT_ROWS, **options},
    )


@pytest.mark.extended
@pytest.mark.long
def test_filters_and_projections_change_no_range(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table = pa.table({"id": range(ROWS), "other": ["x"] * ROWS})
    pq.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=37)
    ds = read_rows(tmp_path).filter(expr=ray.data.expressions.col("id") % 3 == 1)
    summary = resumable_write(ds.select_columns(["id"]), tmp_path / "out")
    assert (summary.sources_total, summary.rows_read) == (RANGES, ROWS)
    assert sorted(ids_in(tmp_path / "out")) == list(range(1, ROWS, 3))
    assert read_rows(tmp_path).count() == ROWS


@pytest.mark.extended
@pytest.mark.long
def test_a_changed_file_is_changed_as_a_whole(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, first in (("a", 0), ("b", 1000)):
        pq.write_table(
            pa.table({"id": range(first, first + ROWS)}), tmp_path / "in" / f"{name}.parquet"
        )
    resumable_write(read_rows(tmp_path), tmp_path / "out")
    pq.write_table(pa.table({"id": range(2000, 2025)}), tmp_path / "in" / "a.parquet")
    with pytest.raises(SourceChangedError):
        resumable_write(read_rows(tmp_path, on_source_change="error"), tmp_path / "out")
    summary = resumable_write(read_rows(tmp_path, on_source_change="ignore"), tmp_path / "out")
    assert summary.sources_skipped == summary.sources_total == 2 * RANGES
    summary = resumable_write(read_rows(tmp_path), tmp_path / "out")
    assert (summary.sources_completed, summary.sources_skipped) == (3, RANGES)
    assert sorted(ids_in(tmp_path / "out")) == [*range(1000, 1000 + ROWS), *range(2000, 2025)]
    status = Checkpoint(tmp_path / "ckpt").status()
    assert (status.total, status.completed) == (RANGES + 3, RANGES + 3)
    assert Checkpoint(tmp_path / "ckpt").check()


def test_shards_share_the_ranges_of_a_file(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": range(ROWS)}), tmp_path / "in" / "a.parquet")
    counts = [read_rows(tmp_path, shard=(index, 2)).count() for index in range(2)]
    assert min(counts) > 0
    assert sum(counts) == ROWS
    first = resumable_write(read_rows(tmp_path, shard=(0, 2)), tmp_path / "out")
    assert first.complete
    assert len(ids_in(tmp_path / "out")) == first.rows_written == counts[0]
    # The end is known now, and so is what the other shard has to do.
    status = Checkpoint(tmp_path / "ckpt").status()
    assert (status.total, status.completed) == (RANGES, first.sources_completed)
    second = resumable_write(read_rows(tmp_path, shard=(1, 2)), tmp_path / "out")
    assert second.sources_completed + first.sources_completed == RANGES
    assert sorted(ids_in(tmp_path / "out")) == list(range(ROWS))
    assert resumable_write(read_rows(tmp_path), tmp_path / "out").sources_skipped == RANGES


def test_a_range_that_fails_is_quarantined_alone(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": range(ROWS)}), tmp_path / "in" / "a.parquet")

    def refuse(batch: Any, rows: set[int]) -> Any:
        bad = np.isin(batch["id"], list(rows))
        if bad.any():
            mark_failed("refused", bad)
        return {"id": batch["id"][~bad]}

    def run(rows: set[int]) -> Any:
        ds = read_rows(tmp_path, max_failed_runs=2, on_code_change="ignore")
        udf = resumable(lambda batch: refuse(batch, rows))
        return resumable_write(ds.map_batches(udf, batch_size=None), tmp_path / "out")

    # The last range fails, too: that there are no more is on record all the same.
    assert run({42, ROWS - 1}).sources_failed == 2
    summary = run({42, ROWS - 1})
    assert (summary.sources_quarantined, summary.sources_skipped) == (2, RANGES - 2)
    again = run({42, ROWS - 1})
    assert (again.sources_quarantined, again.rows_read) == (2, 0)
    records = Checkpoint(tmp_path / "ckpt").sources()
    states = {record.source_id.partition("#")[2]: record.state for record in records}
    assert states["rows=40-50"] == states["rows=100-110"] == "quarantined"
    assert len(states) == RANGES
    Checkpoint(tmp_path / "ckpt").reset(state="quarantined")
    assert run(set()).complete
    assert sorted(ids_in(tmp_path / "out")) == list(range(ROWS))


@pytest.mark.extended
@pytest.mark.long
def test_a_damaged_file_fails_from_there(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.csv"
    path.write_text("id\n" + "".join(f"{n}\n" for n in range(20_000)) + "no,number\n" * 3)

    def run() -> Any:
        ds = resumable_read(
            ray.data.read_csv,
            str(path),
            checkpoint=tmp_path / "ckpt",
            granularity="rows",
            split_rows=1000,
            max_failed_runs=2,
            read_options=pa.csv.ReadOptions(block_size=16_384),
        )
        ds.context.max_errored_blocks = -1
        return resumable_write(ds, tmp_path / "out")

    first = run()
    assert first.sources_failed >= 1
    records = {r.source_id: r.state for r in Checkpoint(tmp_path / "ckpt").sources()}
    assert records[f"{path}#rows=end/1000"] == "failed"
    assert records[f"{path}#rows=0-1000"] == "completed"
    assert run().sources_quarantined == first.sources_failed
    # Nothing is left to try.
    last = run()
    assert (last.sources_completed, last.sources_failed) == (0, 0)
    path.write_text("id\n" + "".join(f"{n}\n" for n in range(20_000)))
    assert run().complete
    assert sorted(ids_in(tmp_path / "out")) == list(range(20_000))


def test_what_cannot_be_read_by_rows_is_refused(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": range(ROWS)}), tmp_path / "in" / "a.parquet")
    with pytest.raises(NonResumableError, match="the same rows in the same order"):
        read_rows(tmp_path, _block_udf=lambda table: table)
    with pytest.raises(ValueError, match="at least 1"):
        read_rows(tmp_path, split_rows=0)
    with pytest.raises(TypeError, match='granularity="rows" alone'):
        resumable_read(ray.data.read_parquet, "in", checkpoint="ckpt", split_rows=10)
    resumable_write(read_rows(tmp_path), tmp_path / "out")
    with pytest.raises(CheckpointError, match="of 10 rows"):
        resumable_write(read_rows(tmp_path, split_rows=20), tmp_path / "out")
    # With its leave, all is processed again, by the new ranges.
    ds = read_rows(tmp_path, split_rows=20, on_source_gone="remove")
    summary = resumable_write(ds, tmp_path / "out")
    assert summary.sources_completed == summary.sources_total == -(-ROWS // 20)
    assert sorted(ids_in(tmp_path / "out")) == list(range(ROWS))


def test_an_empty_file_is_done(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": pa.array([], pa.int64())}), tmp_path / "in" / "a.parquet")
    summary = resumable_write(read_rows(tmp_path), tmp_path / "out")
    assert summary.complete
    assert (summary.sources_total, summary.sources_completed) == (1, 1)
    assert Checkpoint(tmp_path / "ckpt").status().complete


@pytest.mark.extended
@pytest.mark.long
def test_auto_has_row_ranges_where_nothing_else_serves(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(granularity, "AUTO_BYTES", 300)
    (tmp_path / "in").mkdir()

    def lines(first: int, count: int) -> str:
        return "".join(json.dumps({"id": n}) + "\n" for n in range(first, first + count))

    (tmp_path / "in" / "small.json").write_text(lines(0, 5))
    (tmp_path / "in" / "large.json").write_text(lines(1000, 100))
    with gzip.open(tmp_path / "in" / "large.json.gz", "wt", compresslevel=1) as file:
        file.write(lines(2000, 1000))

    def read(**options: Any) -> Any:
        return resumable_read(
            ray.data.read_json,
            str(tmp_path / "in"),
            checkpoint=tmp_path / "ckpt",
            granularity="auto",
            split_bytes=500,
            **options,
        )

    assert read().count() == sum(read(shard=(n, 3)).count() for n in range(3)) == 1105
    summary = resumable_write(read(), tmp_path / "out")
    records = Checkpoint(tmp_path / "ckpt").sources()
    ids = [record.source_id.removeprefix(f"{tmp_path}/in/") for record in records]
    assert min(ids) == "large.json#bytes=0-500"
    assert sorted(ids)[-2:] == ["large.json.gz#rows=0-10000", "small.json"]
    splits = -(-(tmp_path / "in" / "large.json").stat().st_size // 500)
    assert summary.sources_total == len(ids) == splits + 2
    rows = [*range(5), *range(1000, 1100), *range(2000, 3000)]
    assert sorted(ids_in(tmp_path / "out")) == rows
    assert resumable_write(read(), tmp_path / "out").sources_skipped == len(ids)
    with gzip.open(tmp_path / "in" / "large.json.gz", "wt", compresslevel=1) as file:
        file.write(lines(5000, 900))
    assert resumable_write(read(), tmp_path / "out").sources_completed == 1
    rows = [*range(5), *range(1000, 1100), *range(5000, 5900)]
    assert sorted(ids_in(tmp_path / "out")) == rows
