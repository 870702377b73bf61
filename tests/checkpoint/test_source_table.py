"""The sources of a checkpoint as a table: what `sources()` yields, a column at a time."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from children import run_python

from ray_resume import Checkpoint
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record, State

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Make the checkpoint of two runs, with all that a record may hold."""
    storage = LocalBackend(tmp_path / "ckpt")
    storage.ensure()
    storage.bind("/data/o ut", "")
    shared = [FilePart("f/x.parquet", 10 * n, 5, 1000) for n in range(9)]
    first = [
        Record("a", State.COMPLETED, 1, "run1", 5, (shared[0],), completed_at=1.7e9 + 0.25),
        Record("b", State.COMPLETED, 2, "run1", 20, (*shared[1:4], FilePart("y", 0, 5, 5))),
        Record("z", State.COMPLETED, 3, "run1", 5, (shared[5],), completed_at=1.0),
        Record("n", State.COMPLETED, 4, "run1", dead_rows=7, dead_letters=("l1", "l2")),
        Record("gone", State.RESET, 5, "run1", parts=(shared[6],)),
    ]
    second = [
        Record("z", State.FAILED, 6, "run2", 0, (shared[5],), "Trace\n<b>", 1, failed_at=2.5),
        Record("ü\n\x00'\"<&", State.QUARANTINED, 7, "run2", error="", failed_runs=3),
        Record("late", State.COMPLETED, 8, "run2", completed_at=1e300, failed_at=-1e300),
    ]
    for run_id, records in (("run1", first), ("run2", second)):
        writer = WriterFile.create(storage.path, run_id, {"sources_total": 9})
        writer.commit(records)
        writer.close()
    return storage.path


def as_rows(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return what `sources` yields, as the table has it."""
    rows = {}
    for source in checkpoint.sources():
        row = asdict(source)
        for name in ("completed_at", "failed_at"):
            at = row[name]
            known = at is not None and abs(at) < 1e12
            row[name] = datetime.fromtimestamp(at, timezone.utc) if known else None
        row["files"], row["dead_letters"] = list(row["files"]), list(row["dead_letters"])
        rows[source.source_id] = row
    return rows


def test_a_table_has_what_sources_yields(path: Path) -> None:
    table = Checkpoint(path).to_arrow()
    table.validate(full=True)
    rows = {row["source_id"]: row for row in table.to_pylist()}
    assert rows == as_rows(Checkpoint(path))
    assert len(rows) == 6
    assert rows["b"]["files"] == ["/data/o ut/f/x.parquet", "/data/o ut/y"]
    assert list(rows["a"]) == table.column_names
    assert pa.types.is_timestamp(table.schema.field("completed_at").type)


def test_a_frame_has_it_too(path: Path) -> None:
    frame = Checkpoint(path).to_pandas()
    assert len(frame) == 6
    failed = frame[frame["state"] != "completed"]
    assert sorted(failed["source_id"]) == ["z", "ü\n\x00'\"<&"]
    assert frame.set_index("source_id").loc["a", "completed_at"] == pd.Timestamp(
        1.7e9 + 0.25, unit="s", tz="UTC"
    )
    assert frame.groupby("state", observed=True)["rows"].sum()["completed"] == 25


def test_an_id_that_is_no_text_has_escapes(path: Path) -> None:
    writer = WriterFile.create(path, "run3", {})
    writer.commit([Record("caf\udce9", State.COMPLETED, 9, "run3", error="\udcff")])
    writer.close()
    table = Checkpoint(path).to_arrow()
    table.validate(full=True)
    rows = {row["source_id"]: row for row in table.to_pylist()}
    assert rows["caf\\udce9"]["error"] == "\\udcff"
    assert "ü\n\x00'\"<&" in rows


def test_a_new_checkpoint_has_an_empty_table(tmp_path: Path) -> None:
    LocalBackend(tmp_path).ensure()
    table = Checkpoint(tmp_path).to_arrow()
    assert table.num_rows == 0
    assert len(Checkpoint(tmp_path).to_pandas()) == 0


def test_a_table_loads_no_pandas(path: Path) -> None:
    script = (
        "import sys, ray_resume\n"
        f"assert ray_resume.Checkpoint({str(path)!r}).to_arrow().num_rows == 6\n"
        "print([name for name in ('ray', 'pandas') if name in sys.modules])\n"
    )
    result = run_python(script, check=True)
    assert result.stdout == "[]\n"


def test_a_table_can_be_queried(path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    sources = Checkpoint(path).to_arrow()
    counts = duckdb.sql("SELECT state, count(*), sum(rows) FROM sources GROUP BY ALL ORDER BY ALL")
    assert sources is not None
    assert counts.fetchall() == [("completed", 4, 25), ("failed", 1, 0), ("quarantined", 1, 0)]
    files = duckdb.sql("SELECT source_id FROM sources WHERE list_contains(files, '/data/o ut/y')")
    assert files.fetchall() == [("b",)]
    late = duckdb.sql("SELECT source_id FROM sources WHERE completed_at > TIMESTAMP '2000-01-01'")
    assert late.fetchall() == [("a",)]


@pytest.mark.long
@pytest.mark.parametrize(
    "count",
    [
        pytest.param(200_000, marks=pytest.mark.extended),
        pytest.param(1_000_000, marks=pytest.mark.slow),
    ],
)
def test_many_sources_take_little_time(tmp_path: Path, count: int) -> None:
    """In processor time of this process: other tests may be at work beside this one."""
    import time

    storage = LocalBackend(tmp_path / "ckpt")
    storage.ensure()
    writer = WriterFile.create(storage.path, "run1", {})
    for start in range(0, count, 100_000):
        writer.commit(
            Record(
                f"/data/raw/part-{n:08d}.parquet",
                State.COMPLETED,
                n + 1,
                "run1",
                100,
                (FilePart(f"{n // 50:060d}.parquet", n % 50 * 100, 100, 5000),),
                completed_at=1.7e9,
            )
            for n in range(start, start + 100_000)
        )
    writer.close()
    began = time.process_time()
    assert Checkpoint(storage.path).to_pandas().shape == (count, 11)
    assert time.process_time() - began < 4 * count / 1_000_000
