"""The sink table: every format, options, partitions; two runs, and a failure between them."""

from __future__ import annotations

import gzip
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

from ray_resume import Checkpoint, resumable, resumable_read, resumable_write

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
        assert metadata.num_row_groups == 10
        assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert job().sources_skipped == 7


def test_partitions(source: Path, tmp_path: Path) -> None:
    @resumable
    def with_parts(batch: Any) -> Any:
        parity = ["even/ü" if i % 2 == 0 else None for i in batch["id"]]
        return {**batch, "parity": parity, "third": batch["id"] % 3}

    def job(columns: list[str]) -> Any:
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
        return resumable_write(ds.map_batches(with_parts), tmp_path / "out", partition_cols=columns)

    with pytest.raises(Exception, match="partition_cols names 'nothing'"):
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
    assert resumable_write(ds, str(tmp_path / "out"), format="json").sources_skipped == 7
