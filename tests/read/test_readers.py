"""Reads of files, keys, row groups and datasources, in two runs; ids of sources, and refusals.

Each reader of the documentation's table is compared with plain Ray Data in `test_reads_table`.
"""

from __future__ import annotations

import datetime as dt
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ids_in, snapshot, write_file, write_source
from own_datasource import Pages
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ray.data.datasource.partitioning import Partitioning, PartitionStyle

from ray_resume import (
    Checkpoint,
    NonResumableError,
    ResumeError,
    resumable,
    resumable_read,
    resumable_write,
)

pytestmark = pytest.mark.usefixtures("cluster")


def write_csv(path: Path, number: int) -> None:
    pd.DataFrame({"id": [number * 10 + i for i in range(4)]}).to_csv(path, index=False)


def test_spellings_of_a_path_are_one_source(tmp_path: Path, monkeypatch: Any) -> None:
    write_source(tmp_path / "in", files=2, rows=5)
    monkeypatch.chdir(tmp_path)
    spellings: list[Any] = [
        "in",
        "./in/",
        str(tmp_path / "in"),
        str(tmp_path / "x" / ".." / "in"),
        f"file://{tmp_path}/in",
        f"file://{tmp_path}//x/.././/in/",
        f"/{tmp_path}//in",
        tmp_path / "in",
        ["in/00000.parquet", f"file://{tmp_path}/in/00001.parquet"],
    ]
    for number, spelling in enumerate(spellings):
        ds = resumable_read(ray.data.read_parquet, spelling, checkpoint="ckpt")
        assert resumable_write(ds, "out").sources_completed == (0 if number else 2), spelling
    ds = resumable_read(
        ray.data.read_parquet, str(tmp_path / "in"), checkpoint="ckpt", filesystem=LocalFileSystem()
    )
    assert resumable_write(ds, "out").sources_skipped == 2
    part = SubTreeFileSystem(str(tmp_path), LocalFileSystem())
    ds = resumable_read(ray.data.read_parquet, "in", checkpoint="ckpt", filesystem=part)
    assert ds.count() == 10
    assert resumable_write(ds, "out").sources_skipped == 2


def test_a_checkpoint_outlives_a_move_of_the_data(tmp_path: Path) -> None:
    def job(root: Path) -> Any:
        ds = resumable_read(
            ray.data.read_parquet, str(root), checkpoint=tmp_path / "ckpt", source_root=root
        )
        return resumable_write(ds, tmp_path / "out")

    write_source(tmp_path / "in", files=2, rows=5)
    assert job(tmp_path / "in").sources_completed == 2
    assert {s.source_id for s in Checkpoint(tmp_path / "ckpt").sources()} == {
        "00000.parquet",
        "00001.parquet",
    }
    shutil.move(tmp_path / "in", tmp_path / "elsewhere")
    assert job(tmp_path / "elsewhere").sources_skipped == 2
    with pytest.raises(ResumeError, match="not under source_root"):
        resumable_read(
            ray.data.read_parquet,
            str(tmp_path / "elsewhere"),
            checkpoint=tmp_path / "ckpt",
            source_root="/somewhere",
        )


def test_options_of_the_reader(tmp_path: Path) -> None:
    for year in (2023, 2024):
        folder = tmp_path / "in" / str(year)
        folder.mkdir(parents=True)
        write_csv(folder / "a.csv", year)
        (folder / "b.txt").write_text("no csv")
    ds = resumable_read(
        ray.data.read_csv,
        paths=str(tmp_path / "in"),
        checkpoint=tmp_path / "ckpt",
        file_extensions=["csv"],
        partitioning=Partitioning(
            PartitionStyle.DIRECTORY, field_names=["year"], base_dir=str(tmp_path / "in")
        ),
        override_num_blocks=1,
        num_cpus=0.5,
    )
    summary = resumable_write(ds, tmp_path / "out")
    assert summary.sources_total == 2
    rows = [r for p in (tmp_path / "out").iterdir() for r in pq.ParquetFile(p).read().to_pylist()]
    assert sorted((row["year"], row["id"] // 10) for row in rows) == [
        *[("2023", 2023)] * 4,
        *[("2024", 2024)] * 4,
    ]


def test_row_groups(tmp_path: Path) -> None:
    (tmp_path / "in" / "part=x").mkdir(parents=True)
    rows = pa.table({"id": list(range(100)), "other": ["o"] * 100})
    pq.write_table(rows, tmp_path / "in" / "part=x" / "a.parquet", row_group_size=30)
    pq.write_table(rows.slice(0, 0), tmp_path / "in" / "part=x" / "b.parquet")

    def job(broken: bool) -> Any:
        @resumable
        def fails_once(batch: Any) -> Any:
            if broken and 65 in batch["id"]:
                raise RuntimeError("not this one")
            return batch

        ds = resumable_read(
            ray.data.read_parquet,
            str(tmp_path / "in"),
            checkpoint=tmp_path / "ckpt",
            granularity="row_group",
            include_paths=True,
        )
        ds.context.max_errored_blocks = -1
        ds = ds.select_columns(["id", "part", "path"]).map_batches(fails_once, batch_size=None)
        return resumable_write(ds, tmp_path / "out")

    first = job(True)
    # An empty file may have one empty row group or none, as its writer liked.
    assert first.sources_completed in (3, 4)
    assert first.sources_failed == 1
    ids = {source.source_id for source in Checkpoint(tmp_path / "ckpt").sources("completed")}
    assert {name.rpartition("/")[2] for name in ids} >= {f"a.parquet#rg{n}" for n in (0, 1, 3)}
    second = job(False)
    assert (second.sources_completed, second.rows_read) == (1, 30)
    assert ids_in(tmp_path / "out") == list(range(100))
    assert set(ids_in(tmp_path / "out", "part")) == {"x"}
    assert {Path(path).name for path in ids_in(tmp_path / "out", "path")} == {"a.parquet"}


def load(key: Any) -> Any:
    name = str(key)
    frame = pd.DataFrame({"id": [len(name), len(name) + 1], "key": [name, name]})
    if name == "none":
        return None
    if name == "pandas":
        return frame
    if name == "arrow":
        return pa.Table.from_pandas(frame)
    return parts(frame)


def parts(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for i in range(len(frame)):
        part = frame.iloc[i : i + 1]
        yield {name: part[name].to_numpy() for name in part}


def test_keys(tmp_path: Path) -> None:
    keys: list[Any] = ["pandas", "arrow", "none", 7, dt.date(2024, 2, 29), ("a", 1)]

    def job(keys: list[Any]) -> Any:
        ds = resumable_read(load, keys=keys, checkpoint=tmp_path / "ckpt", override_num_blocks=3)
        return resumable_write(ds.select_columns(["key"]), tmp_path / "out")

    ds = resumable_read(load, keys=keys, checkpoint=tmp_path / "ckpt")
    assert ds.count() == 10
    first = job(keys)
    assert (first.sources_completed, first.rows_written) == (6, 10)
    grown = job([*keys, "another"])
    assert (grown.sources_skipped, grown.sources_completed) == (6, 1)
    expected = sorted(2 * [str(key) for key in [*keys, "another"] if key != "none"])
    assert ids_in(tmp_path / "out", "key") == expected
    ids = {source.source_id for source in Checkpoint(tmp_path / "ckpt").sources()}
    assert ids == {"pandas", "arrow", "none", "7", '"2024-02-29"', '["a", 1]', "another"}
    for wrong in (["a", "b", "a"], [7, "7"]):
        with pytest.raises(ResumeError, match="more than once"):
            job(wrong)
    with pytest.raises(ResumeError, match="same in every run"):
        job([object()])


@pytest.mark.filterwarnings("ignore:The serialized size of your read function")
def test_a_read_task_of_more_than_a_mebibyte(tmp_path: Path) -> None:
    """Ray warns of those by the name of their function: they need one, armed or not."""
    keys = [letter * (3 << 18) for letter in "ab"]

    def load(key: str) -> dict[str, Any]:
        return {"first": np.array([key[0]])}

    ds = resumable_read(load, keys=keys, checkpoint=tmp_path / "ckpt", override_num_blocks=1)
    assert sorted(row["first"] for row in ds.take_all()) == ["a", "b"]
    assert resumable_write(ds, tmp_path / "out").sources_completed == 2
    assert ids_in(tmp_path / "out", "first") == ["a", "b"]


def test_a_datasource_of_the_users_own(tmp_path: Path) -> None:
    def job(source: Pages, **options: Any) -> Any:
        ds = resumable_read(source, checkpoint=tmp_path / "ckpt", **options)
        return resumable_write(ds, tmp_path / "out")

    with pytest.raises(NonResumableError, match="source_id"):
        job(Pages(named=False))
    first = job(Pages(named=True))
    assert first.sources_completed == 5
    again = job(
        Pages(named=False), source_id=lambda task, index: f"page-{index * 10}", num_cpus=0.5
    )
    assert (again.sources_skipped, again.sources_total) == (5, 5)
    with pytest.raises(ResumeError, match="more than once"):
        job(Pages(named=False), source_id=lambda task, index: "the same")
    assert ids_in(tmp_path / "out") == list(range(50))


def test_readers_without_a_stable_identity_are_refused(tmp_path: Path) -> None:
    refused: list[tuple[Any, tuple[Any, ...]]] = [
        (ray.data.range, (10,)),
        (ray.data.from_items, ([1, 2],)),
        (ray.data.read_sql, ("select 1", lambda: None)),
        (lambda: None, ()),
    ]
    for reader, arguments in refused:
        with pytest.raises(NonResumableError, match="keys="):
            resumable_read(reader, *arguments, checkpoint=tmp_path / "ckpt")
    write_file(tmp_path / "a.parquet", 0, 3)
    with pytest.raises(NonResumableError, match="read_parquet alone"):
        resumable_read(
            ray.data.read_text,
            str(tmp_path / "a.parquet"),
            checkpoint=tmp_path / "ckpt",
            granularity="row_group",
        )
    with pytest.raises(TypeError, match="It has no use for"):
        resumable_read(load, 3, keys=[1], checkpoint=tmp_path / "ckpt")
    assert set(snapshot(tmp_path)) == {"a.parquet"}


def test_odd_file_names(tmp_path: Path) -> None:
    names = ["with space", "ünïcode", "hash#1", "per%20cent", "quote'\"", "a;b", "[x]*?"]
    (tmp_path / "in").mkdir()
    for number, name in enumerate(names):
        write_file(tmp_path / "in" / f"{name}.parquet", number, number + 1)
    write_file(Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/plain.parquet")), 7, 8)
    ds = resumable_read(ray.data.read_parquet, str(tmp_path / "in"), checkpoint=tmp_path / "ckpt")
    assert resumable_write(ds, tmp_path / "out").sources_completed == 8
    assert ids_in(tmp_path / "out") == list(range(8))
    ds = resumable_read(ray.data.read_parquet, str(tmp_path / "in"), checkpoint=tmp_path / "ckpt")
    assert resumable_write(ds, tmp_path / "out").sources_skipped == 8
    write_file(tmp_path / "in" / "new\nline.parquet", 8, 9)
    with pytest.raises(ResumeError, match="Rename it"):
        resumable_read(ray.data.read_parquet, str(tmp_path / "in"), checkpoint=tmp_path / "ckpt")
