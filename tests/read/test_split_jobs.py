"""Jobs over splits: shards, failures, dead letters, commands, folders as columns, buckets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from buckets import S3
from ray.data import Dataset
from ray.data.datasource.partitioning import Partitioning, PartitionStyle

from ray_resume import (
    Checkpoint,
    ResumeError,
    RunSummary,
    cli,
    mark_failed,
    resumable,
    resumable_read,
    resumable_write,
)

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.extended, pytest.mark.long]

# Of each file with rows six, and the file without bytes.
SPLIT_BYTES, SPLITS = 2000, 13


def write(path: Path, ids: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": n, "text": "x" * 80}) + "\n" for n in ids))


def written(checkpoint: Path) -> list[dict[str, Any]]:
    files = Checkpoint(checkpoint).files()
    rows = pa.concat_tables(map(pq.read_table, files)).to_pylist()
    return sorted(rows, key=lambda row: row["id"])


class Folder:
    """Two files of lines in hive folders and one without bytes; a UDF that refuses some rows."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.raw = folder, folder / "raw"
        write(self.raw / "part=a" / "one.jsonl", range(100))
        write(self.raw / "part=b" / "two.jsonl", range(100, 200))
        write(self.raw / "part=b" / "none.jsonl", range(0))
        self.bad = folder / "bad"
        self.options: dict[str, Any] = {
            "include_paths": True,
            "file_extensions": ["jsonl"],
            "partitioning": Partitioning(PartitionStyle.HIVE, base_dir=str(self.raw)),
        }

    def run(self, on_error: str = "mark_failed", **reading: Any) -> RunSummary:
        return resumable_write(self.pipeline(on_error, **reading), self.folder / "out")

    def pipeline(self, on_error: str = "mark_failed", **reading: Any) -> Dataset:
        bad = self.bad

        @resumable(on_error=on_error)
        def strict(row: Any) -> Any:
            if bad.exists() and str(row["id"]) in bad.read_text().split():
                if on_error == "dead_letter":
                    raise ValueError("a bad row")
                mark_failed("a bad row")
            return row

        ds = resumable_read(
            ray.data.read_json,
            str(self.raw),
            checkpoint=self.folder / "ckpt",
            granularity="split",
            split_bytes=SPLIT_BYTES,
            source_root=self.raw,
            **self.options,
            **reading,
        )
        return ds.map(strict)

    def check(self) -> None:
        """Compare with plain Ray Data over the whole files."""
        plain = ray.data.read_json(str(self.raw), **self.options).take_all()
        assert written(self.folder / "ckpt") == sorted(plain, key=lambda row: row["id"])

    def sources(self, state: str) -> list[str]:
        every = Checkpoint(self.folder / "ckpt").sources(state)
        return sorted(source.source_id for source in every)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# It makes a report, for which the oldest versions have no libraries.
def test_failed_rows_fail_their_splits_alone(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.bad.write_text("3 150")
    # Each of two shards has splits of both files.
    first, second = (folder.run(shard=(n, 2), max_failed_runs=1) for n in range(2))
    assert first.sources_quarantined + second.sources_quarantined == 2
    assert first.sources_total + second.sources_total == SPLITS
    assert min(first.sources_total, second.sources_total) > 1
    failed = folder.sources("quarantined")
    assert failed == ["part=a/one.jsonl#bytes=0-2000", "part=b/two.jsonl#bytes=4000-6000"]
    assert folder.run(max_failed_runs=1).sources_quarantined == 2

    def command(*arguments: str) -> str:
        assert cli.main([*arguments]) == 0
        return capsys.readouterr().out

    checkpoint = str(folder.folder / "ckpt")
    status = json.loads(command("status", checkpoint, "--json"))
    assert (status["total"], status["completed"], status["quarantined"]) == (SPLITS, SPLITS - 2, 2)
    assert "bytes=4000-6000" in command("sources", checkpoint, "--state", "quarantined")
    command("report", checkpoint, "-o", str(folder.folder / "report.html"))
    # Their errors differ in numbers alone: it shows one of them.
    page = (folder.folder / "report.html").read_text()
    assert any(split in page for split in failed)
    # One is read again because it is reset by its pattern, and so is one that was completed.
    folder.bad.unlink()
    command("reset", checkpoint, "--glob", "part=a/*#bytes=0-*", "--yes")
    command("reset", checkpoint, "--source", "part=b/two.jsonl#bytes=0-2000", "--yes")
    summary = folder.run(max_failed_runs=1)
    assert (summary.sources_completed, summary.sources_quarantined) == (2, 1)
    command("reset", checkpoint, "--state", "quarantined", "--yes")
    assert folder.run().sources_completed == 1
    folder.check()


def test_bad_rows_of_splits_are_in_dead_letters(folder: Folder) -> None:
    folder.bad.write_text("3 150")
    summary = folder.run("dead_letter")
    assert (summary.sources_completed, summary.rows_dead_lettered) == (SPLITS, 2)
    letters = pa.concat_tables(
        map(pq.read_table, Checkpoint(folder.folder / "ckpt").dead_letters())
    )
    assert sorted(letters["id"].to_pylist()) == [3, 150]
    folder.bad.unlink()
    Checkpoint(folder.folder / "ckpt").reset(dead_letters=True)
    assert folder.run("dead_letter").sources_completed == 2
    folder.check()


def test_files_that_are_changed_gone_and_new(folder: Folder) -> None:
    folder.run()
    write(folder.raw / "part=a" / "one.jsonl", range(1000, 1030))  # fewer splits
    (folder.raw / "part=b" / "two.jsonl").unlink()
    write(folder.raw / "part=c" / "three.jsonl", range(300, 350))
    summary = folder.run(on_source_gone="remove")
    assert (summary.sources_completed, summary.sources_skipped) == (2 + 3, 1)
    folder.check()
    # It is found to be gone by the task that reads it.
    write(folder.raw / "part=c" / "four.jsonl", range(400, 450))
    ds = folder.pipeline()
    (folder.raw / "part=c" / "four.jsonl").unlink()
    ds.context.max_errored_blocks = -1
    summary = resumable_write(ds, folder.folder / "out")
    assert (summary.sources_failed, summary.sources_skipped) == (3, 6)
    (failed, *_) = Checkpoint(folder.folder / "ckpt").sources("failed")
    assert failed.source_id.startswith("part=c/four.jsonl#bytes=")
    folder.check()
    # A file of one split has another one now, and its output stays as it is all the same.
    rows = written(folder.folder / "ckpt")
    write(folder.raw / "part=c" / "three.jsonl", range(500, 503))
    summary = folder.run(on_source_change="ignore", on_source_gone="remove")
    # Those of the file that is gone had failed.
    assert (summary.sources_completed, summary.sources_removed) == (0, 3)
    assert written(folder.folder / "ckpt") == rows


def test_types_of_json_values_that_are_found_in_each_split(tmp_path: Path) -> None:
    """They become those of the file, or the column is named."""
    path = tmp_path / "values.jsonl"
    values = [{"id": 0, "v": 1}, {"id": 1}, {"id": 2, "v": 2.5}, {"id": 3, "v": None}]

    def run() -> RunSummary:
        ds = resumable_read(
            ray.data.read_json,
            str(path),
            checkpoint=tmp_path / "ckpt",
            granularity="split",
            split_bytes=20,
        )
        return resumable_write(ds, tmp_path / "out")

    path.write_text("".join(json.dumps(row) + "\n" for row in values))
    run()
    files = Checkpoint(tmp_path / "ckpt").files()
    table = pa.concat_tables(map(pq.read_table, files)).sort_by("id")
    plain = ray.data.read_json(str(path))
    assert table.schema.equals(plain.schema().base_schema)
    assert table.to_pylist() == plain.take_all()
    path.write_text(path.read_text() + '{"id": 4, "v": "text"}\n')
    with pytest.raises(ResumeError, match=r"column 'v' has type int64 .* and type string"):
        run()


def test_splits_of_an_object_in_a_bucket(s3: S3, tmp_path: Path) -> None:
    lines = "".join(f"line {number} ü\n" for number in range(300)).encode()
    key = s3.key("splits/one.txt")
    with s3.filesystem.open_output_stream(key) as file:
        file.write(lines)

    def run() -> RunSummary:
        ds = resumable_read(
            ray.data.read_text,
            key,
            filesystem=s3.filesystem,
            checkpoint=tmp_path / "ckpt",
            granularity="split",
            split_bytes=1000,
        )
        ds = ds.map_batches(resumable(lambda batch: batch))
        return resumable_write(ds, tmp_path / "out", require_complete=True)

    assert run().sources_completed == -(-len(lines) // 1000)
    files = Checkpoint(tmp_path / "ckpt").files()
    texts = pa.concat_tables(map(pq.read_table, files))["text"].to_pylist()
    assert sorted(texts) == sorted(lines.decode().splitlines())
    ids = {source.source_id for source in Checkpoint(tmp_path / "ckpt").sources()}
    assert any(name.endswith("splits/one.txt#bytes=1000-2000") for name in ids)
    # The same length, other content.
    with s3.filesystem.open_output_stream(key) as file:
        file.write(lines.replace(b"line", b"rows"))
    assert run().sources_skipped == 0
    texts = pa.concat_tables(map(pq.read_table, Checkpoint(tmp_path / "ckpt").files()))["text"]
    assert all(text.startswith("rows") for text in texts.to_pylist())
