"""Datasources that list when they are asked for tasks: each task is bound to its own source."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from conftest import ids_in, write_source
from hypothesis import given
from hypothesis import strategies as st
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from ray_resume import (
    Checkpoint,
    NonResumableError,
    SourceChangedError,
    resumable_read,
    resumable_write,
)
from ray_resume.raydata.filereads import Selection
from ray_resume.read.datasource_input import DatasourceInput


def reads(file: str) -> BlockMetadata:
    return BlockMetadata(num_rows=None, size_bytes=None, input_files=(file,), exec_stats=None)


class Listed(Datasource):
    """Gives a read task for each of ``names``, a list of files or an (id, files) pair."""

    def __init__(self, names: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        return [
            ReadTask(lambda name=name: [name], reads(name[1]))  # type: ignore[misc]
            for name in self.names
        ]


class Folder(Listed):
    """Lists a folder of Parquet files whenever it is asked for tasks."""

    def __init__(self, folder: Path) -> None:
        super().__init__([])
        self.folder = folder

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                lambda path=path: [pq.ParquetFile(path).read()],  # type: ignore[misc]
                reads(str(path)),
            )
            for path in sorted(self.folder.glob("*.parquet"))
        ]


tasks = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(["f", "g"])),
    unique_by=lambda task: task[0],
    max_size=4,
)


@given(tasks, tasks)
def test_each_source_gets_the_task_of_its_id(first: list[Any], second: list[Any]) -> None:
    datasource = Listed(first)

    def id_of(task: ReadTask, _: int) -> str:
        return str(next(iter(task.read_fn()))[0])

    reading = DatasourceInput.of(datasource, id_of, 10)
    datasource.names = second
    made, _ = reading.open(reading.sources, Selection(), None)
    found = made(range(len(first)))(reading.sources)
    assert len(found) == len(first)
    for name, task in zip(first, found, strict=True):
        if name in second:
            assert list(task.read_fn()) == [name]
        else:
            # It is gone, or reads something else under the same id.
            with pytest.raises(SourceChangedError, match=f"{name[0]} was listed, and Listed gives"):
                list(task.read_fn())


def test_two_tasks_with_one_id_are_refused() -> None:
    datasource = Listed([("a", "a"), ("b", "b")])
    reading = DatasourceInput.of(datasource, None, 10)
    datasource.names = [("a", "a"), ("b", "a")]
    with pytest.raises(NonResumableError, match="two read tasks for a"):
        reading.open(reading.sources, Selection(), None)


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_files_that_come_and_go_between_read_and_write(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_source(source, files=4, rows=10)
    shutil.move(source / "00000.parquet", tmp_path / "00000.parquet")
    ds = resumable_read(Folder(source), checkpoint=tmp_path / "ckpt")
    (source / "00003.parquet").unlink()
    shutil.move(tmp_path / "00000.parquet", source / "00000.parquet")
    summary = resumable_write(ds, tmp_path / "out")
    assert (summary.sources_completed, summary.sources_failed) == (2, 1)
    (failed,) = Checkpoint(tmp_path / "ckpt").sources("failed")
    assert failed.source_id == str(source / "00003.parquet")
    assert "no read task for it any more" in str(failed.error)
    ds = resumable_read(Folder(source), checkpoint=tmp_path / "ckpt")
    assert resumable_write(ds, tmp_path / "out").sources_completed == 1
    plain = sorted(row["id"] for row in ray.data.read_datasource(Folder(source)).take_all())
    assert ids_in(tmp_path / "out") == plain == list(range(30))
