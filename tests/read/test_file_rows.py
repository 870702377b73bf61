"""Rows of parts: each file, or row group, is read once by what reads its parts in order."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import LocalFileSystem

from ray_resume.core.parts import FilePart
from ray_resume.core.sources import SourceTable
from ray_resume.errors import ResumeError
from ray_resume.read import file_rows
from ray_resume.read.file_rows import FileRows, OutputFiles

BLOCK_ROWS = 7


class Reads:
    """Reads files with pyarrow, in blocks of a few rows, and counts what it reads."""

    def __init__(self) -> None:
        self.counts: Counter[Any] = Counter()

    def __call__(self, sources: SourceTable) -> Sequence[Callable[[], Iterator[pa.Table]]]:
        return [partial(self._read, source.item) for source in sources]

    def _read(self, item: Any) -> Iterator[pa.Table]:
        self.counts[item] += 1
        if isinstance(item, str):
            table = pa.csv.read_csv(item) if item.endswith("g") else pq.ParquetFile(item).read()
        else:
            table = pq.ParquetFile(item[0]).read_row_group(item[1])
        for start in range(0, len(table), BLOCK_ROWS):
            yield table.slice(start, BLOCK_ROWS)


def of(folder: Path, reads: Reads, *, parquet: bool) -> FileRows:
    reader = "read_parquet" if parquet else "read_csv"
    return FileRows(OutputFiles(str(folder), LocalFileSystem(), reads, parquet, reader))


def ids(rows: FileRows, *part: Any) -> list[int]:
    return [i for block in rows.of(FilePart(*part)) for i in block.column("id").to_pylist()]


def write(folder: Path, rows: int, *, row_group: int = 25) -> None:
    table = pa.table({"id": range(rows)})
    pq.write_table(table, folder / "f", row_group_size=row_group)
    pa.csv.write_csv(table, folder / "g")


@pytest.mark.parametrize("parquet", [True, False])
def test_parts_in_order_read_everything_once(tmp_path: Path, parquet: bool) -> None:
    write(tmp_path, 100)
    file = "f" if parquet else "g"
    reads = Reads()
    rows = of(tmp_path, reads, parquet=parquet)
    cuts = [0, 1, 20, 25, 60, 61, 99, 100]
    for first, stop in itertools.pairwise(cuts):
        assert ids(rows, file, first, stop - first, 100) == list(range(first, stop))
    assert set(reads.counts.values()) == {1}
    assert len(reads.counts) == (4 if parquet else 1)


@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_parts_in_any_order_have_their_rows(
    tmp_path: Path, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_rows, "_MAX_KEPT_BYTES", kept)
    write(tmp_path, 100)
    chance = random.Random(1)
    for parquet in (True, False):
        rows = of(tmp_path, Reads(), parquet=parquet)
        for _ in range(60):
            first = chance.randrange(100)
            stop = chance.randrange(first + 1, 101)
            file = "f" if parquet else "g"
            assert ids(rows, file, first, stop - first, 100) == list(range(first, stop))


def test_only_row_groups_with_rows_of_a_part_are_read(tmp_path: Path) -> None:
    write(tmp_path, 100)
    reads = Reads()
    assert ids(of(tmp_path, reads, parquet=True), "f", 30, 40, 100) == list(range(30, 70))
    assert reads.counts == {(f"{tmp_path}/f", 1): 1, (f"{tmp_path}/f", 2): 1}


@pytest.mark.parametrize("part", [(0, 1), (50, 40), (0, 101), (0, 98), (0, 99)])
def test_a_reader_that_finds_other_rows_is_an_error_before_a_row_is_given_to_another_source(
    tmp_path: Path, part: tuple[int, int]
) -> None:
    write(tmp_path, 100)
    first, rows = part
    for written in (98, 99, 101):
        if first + rows > written:
            continue
        for parquet in (True, False):
            file = "f" if parquet else "g"
            with pytest.raises(ResumeError, match=r"rows in .* the pipeline before has written"):
                ids(of(tmp_path, Reads(), parquet=parquet), file, first, rows, written)
