"""Rows of output files: those of one part after another, each file read once if they are in order.

Runs on workers. Ray's own reader reads the files, so rows, columns and types are plain Ray Data's.
It reads the row groups of a Parquet file that have rows of a part. It reads other files from their
start, and their rows are counted first: a reader that leaves out a line would give each source rows
of its neighbor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem
from ray.data.block import BlockAccessor

from ray_resume.core.parts import FilePart
from ray_resume.core.records import Fingerprint
from ray_resume.core.sources import Source, SourceTable
from ray_resume.errors import ResumeError
from ray_resume.raydata import blocks
from ray_resume.raydata.filereads import ReadTaskFactory

__all__ = ["FileRows", "OutputFiles"]

# A task keeps so many files open: sources next to each other share one or two.
_OPEN_FILES = 4
# Counted rows are kept in memory up to this; more are read a second time.
_MAX_KEPT_BYTES = 64 << 20


@dataclass(frozen=True)
class OutputFiles:
    """How the files of an output folder are read; picklable.

    Args:
        folder: its path on ``filesystem``.
        tasks: makes the read task of a file, or of a row group.
        has_row_groups: whether the files are Parquet.
        reader: the name of Ray's reader, for messages.
    """

    folder: str
    filesystem: FileSystem
    tasks: ReadTaskFactory
    has_row_groups: bool
    reader: str

    def path(self, file: str) -> str:
        """Return the path of a file."""
        return f"{self.folder}/{file}"

    def read(self, file: str, row_group: int | None) -> Iterator[Any]:
        """Yield the blocks of a file, or of a row group of it."""
        path = self.path(file)
        item = path if row_group is None else (path, row_group)
        # The size only says that the file is not empty.
        (task,) = self.tasks(SourceTable.of([Source(path, item, Fingerprint(size=1))]))
        if task is not None:
            yield from (block for block in task() if blocks.num_rows(block))

    def row_groups(self, file: str) -> list[int]:
        """Return how many rows each row group of a Parquet file has."""
        with self.filesystem.open_input_file(self.path(file)) as opened:
            footer = pq.read_metadata(opened)
        return [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]


class FileRows:
    """The rows of files, by parts. One for each read task."""

    def __init__(self, files: OutputFiles) -> None:
        self._files = files
        self._open: OrderedDict[str, _OneFile] = OrderedDict()

    def of(self, part: FilePart) -> Iterator[Any]:
        """Yield the rows of a part, as blocks.

        Raises:
            ResumeError: Ray's reader finds another number of rows in the file than was written.
            Exception: whatever Ray's reader raised.
        """
        file = self._open.pop(part.file, None) or _OneFile(self._files, part)
        self._open[part.file] = file
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        yield from file.rows(part)

    def forget(self, file: str) -> None:
        """Read a file from the start when it is asked for again: a read of it has failed."""
        self._open.pop(file, None)


class _Unit(NamedTuple):
    """Rows ``start .. stop - 1`` of a file, which are read from their start."""

    start: int
    stop: int
    row_group: int | None


class _OneFile:
    def __init__(self, files: OutputFiles, part: FilePart) -> None:
        self._files, self._file, self._file_rows = files, part.file, part.file_rows
        self._units: Sequence[_Unit] = [_Unit(0, part.file_rows, None)]
        self._kept: list[Any] | None = None
        self._stream: _Stream | None = None
        if part.is_whole_file:
            # It has no other rows to tell apart: they are counted as they are read.
            return
        if files.has_row_groups:
            ends = np.cumsum([0, *files.row_groups(part.file)]).tolist()
            self._check(ends[-1])
            self._units = [_Unit(*where, number) for number, where in enumerate(pairwise(ends))]
        else:
            self._count()

    def rows(self, part: FilePart) -> Iterator[Any]:
        first, stop = part.first_row, part.first_row + part.rows
        for unit in self._units:
            start, end = max(first, unit.start), min(stop, unit.stop)
            if start >= end:
                continue
            if self._stream is None or not self._stream.reaches(unit, start):
                self._stream = _Stream(unit, self._read(unit), self._mismatch)
            yield from self._stream.take(start, end)

    def _read(self, unit: _Unit) -> Iterator[Any]:
        if self._kept is not None:
            return iter(self._kept)
        return self._files.read(self._file, unit.row_group)

    def _count(self) -> None:
        """Count the rows before any is used; keep them unless they are many."""
        kept: list[Any] | None = []
        count = size_bytes = 0
        for block in self._files.read(self._file, None):
            count += blocks.num_rows(block)
            size_bytes += BlockAccessor.for_block(block).size_bytes()
            if kept is not None:
                kept.append(block)
            if size_bytes > _MAX_KEPT_BYTES:
                kept = None
        self._check(count)
        self._kept = kept

    def _check(self, found: int) -> None:
        if found != self._file_rows:
            raise self._mismatch(str(found))

    def _mismatch(self, found: str) -> ResumeError:
        return ResumeError(
            f"{self._files.reader} finds {found} rows in {self._files.path(self._file)}, and the "
            f"pipeline before has written {self._file_rows}, so rows cannot be found by their "
            "places. Does an option leave out lines, or take the first for a header? Does a line "
            "of nulls count as blank? Have that pipeline write Parquet, or read with other options."
        )


class _Stream:
    """The blocks of a unit, from the start to the end."""

    def __init__(
        self, unit: _Unit, read: Iterator[Any], mismatch: Callable[[str], ResumeError]
    ) -> None:
        self._unit, self._read, self._mismatch = unit, read, mismatch
        self._block: Any = None
        # The rows of the block.
        self._start = self._stop = unit.start

    def reaches(self, unit: _Unit, row: int) -> bool:
        """Say whether ``row`` of ``unit`` is in the block at hand, or after it."""
        return unit == self._unit and row >= self._start

    def take(self, start: int, stop: int) -> Iterator[Any]:
        """Yield the rows ``start .. stop - 1``."""
        while start < stop:
            if start >= self._stop:
                self._advance()
                continue
            end = min(stop, self._stop)
            block = BlockAccessor.for_block(self._block)
            yield block.slice(start - self._start, end - self._start, copy=False)
            start = end
        if stop == self._unit.stop and next(self._read, None) is not None:
            raise self._mismatch("more")

    def _advance(self) -> None:
        block = next(self._read, None)
        if block is None:
            raise self._mismatch(f"only {self._stop}")
        self._start, self._block = self._stop, block
        self._stop += blocks.num_rows(block)
        if self._stop > self._unit.stop:
            raise self._mismatch("more")
