"""How the sources of another pipeline are shared out among read tasks."""

from __future__ import annotations

from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem
from snapshots import snapshot_of

from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record, State
from ray_resume.core.upstream import sources_with_output
from ray_resume.read.upstream import PartsInput

RUN = "0123456789ab"
MIB = 1 << 20


def input_of(files: int, sources: int, size: int, reader: str = "read_parquet") -> PartsInput:
    """Return the input of so many sources in each of so many files of so many bytes."""
    records = [
        Record(f"{file:03}-{n:04}", State.COMPLETED, 1, RUN, parts=(part,))
        for file in range(files)
        for n in range(sources)
        for part in [FilePart(f"{file:03}", n, 1, sources)]
    ]
    table = sources_with_output(snapshot_of({RUN: records}))
    files_reader: Any = None
    return PartsInput(
        "Parquet",
        table,
        files_reader,
        1.0,
        LocalFileSystem(),
        folder="/mid",
        sizes={f"{file:03}": size for file in range(files)},
        current=lambda: table,
        checkpoint="/ckpt",
        reader=reader,
    )


@pytest.mark.parametrize(
    ("files", "sources", "size", "reader", "tasks"),
    [
        (40, 100, MIB, "read_parquet", 40),  # whole files
        (2, 100, MIB // 4, "read_parquet", 2),
        (2, 100, 64 * MIB, "read_parquet", 16),  # few files give some tasks,
        (2, 100, 64 * MIB, "read_csv", 4),  # fewer where each reads from the start
        (20, 100, 320 * MIB, "read_parquet", 200),  # large ones many
        (20, 100, 320 * MIB, "read_csv", 20),
        (30, 1, 100, "read_json", 30),
    ],
)
def test_a_file_is_read_by_few_tasks(
    files: int, sources: int, size: int, reader: str, tasks: int
) -> None:
    one = input_of(files, sources, size, reader)
    assert one.most_tasks(one.sources) == tasks
    for count in (1, 2, 3, 7, tasks, tasks + 1, files * sources):
        groups = one.groups(one.sources, count)
        assert [n for group in groups for n in group] == list(range(files * sources))
        assert all(groups)
        assert len(groups) <= count
        if tasks <= count < files * sources:
            assert len(groups) == tasks
    # As many as sources: each is executed alone.
    assert len(one.groups(one.sources, files * sources)) == files * sources
    none = one.sources[:0]
    assert (one.most_tasks(none), one.groups(none, 5)) == (0, [])
