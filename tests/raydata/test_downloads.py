"""Downloads, by an expression of Ray Data's: rows keep their sources through them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.data.expressions import col, download

from ray_resume import (
    Checkpoint,
    NonResumableError,
    PipelineChangedError,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.core.tokens import TOKEN_COLUMN
from ray_resume.testing import kill_at

pytestmark = pytest.mark.usefixtures("cluster")

FILES, ROWS = 4, 5


@resumable(one_to_one=True)
def measured(batch: pa.Table) -> pa.Table:
    lengths = pa.compute.binary_length(batch["content"])
    return batch.append_column("length", lengths)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows with addresses of files, of which one does not exist and one is null."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "raw").mkdir()
    for number in range(FILES):
        addresses: list[str | None] = []
        for row in range(ROWS):
            blob = tmp_path / "blobs" / f"{number}-{row}.bin"
            blob.write_bytes(b"x" * (10 * number + row))
            addresses.append(str(blob))
        if number == 1:
            addresses[2:4] = [str(tmp_path / "blobs" / "gone"), None]
        ids = range(number * ROWS, number * ROWS + ROWS)
        table = pa.table({"id": ids, "address": pa.array(addresses, pa.string())})
        pq.write_table(table, tmp_path / "raw" / f"{number}.parquet")
    return tmp_path


def pipeline(ds: Any, column: str = "content") -> Any:
    ds = ds.with_column(column, download("address")).with_column("again", download("address"))
    return ds.filter(expr=col("id") != 0)


def rows(table: pa.Table) -> list[dict[str, Any]]:
    return sorted(table.to_pylist(), key=lambda row: row["id"])


def test_what_is_downloaded_is_as_in_plain_ray_data(folder: Path) -> None:
    def read() -> Any:
        ds = resumable_read(ray.data.read_parquet, str(folder / "raw"), checkpoint=folder / "ckpt")
        return pipeline(ds).map_batches(measured, batch_format="pyarrow", batch_size=3)

    with kill_at("sink.before_drain"):
        summary = resumable_write(read(), folder / "out", require_complete=True)
    assert summary.sources_completed == FILES
    plain = pipeline(ray.data.read_parquet(str(folder / "raw"))).map_batches(
        measured, batch_format="pyarrow"
    )
    plain.write_parquet(str(folder / "plain"))
    expected, written = pq.read_table(folder / "plain"), pq.read_table(folder / "out")
    assert written.schema.equals(expected.schema)
    assert rows(written) == rows(expected)
    assert written["content"].null_count == 2
    assert resumable_write(read(), folder / "out").sources_skipped == FILES
    assert len(list(Checkpoint(folder / "ckpt").sources("completed"))) == FILES


@pytest.mark.extended
def test_another_download_is_another_pipeline(folder: Path) -> None:
    def read(column: str) -> Any:
        ds = resumable_read(ray.data.read_parquet, str(folder / "raw"), checkpoint=folder / "ckpt")
        return pipeline(ds, column)

    resumable_write(read("content"), folder / "out")
    with pytest.raises(PipelineChangedError, match=r"download\(other=address\) -> download\("):
        resumable_write(read("other"), folder / "out")
    with pytest.raises(NonResumableError, match="a name that ray_resume uses itself"):
        resumable_write(read(TOKEN_COLUMN), folder / "out")
