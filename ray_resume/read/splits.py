"""Splits: ranges of bytes of files of lines as sources, ``<path>#bytes=<A>-<B>``.

They are known from the size of a file alone. A split's lines are given to Ray Data's own reader as
if they were a file (`line_ranges`), so all of its options hold. Lines of a CSV file are rows only
together with what the start of the file says: the names of columns, and their types.

Importable on workers: knows neither checkpoints nor lmdb.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
from pyarrow.fs import FileSystem
from ray.data.block import BlockMetadata

from ray_resume.core.sources import Source, SourceTable
from ray_resume.errors import NonResumableError, ResumeError
from ray_resume.raydata.csv_reads import columns_at_start
from ray_resume.raydata.filereads import (
    DatasourceFiles,
    FileReader,
    ReadTaskFactory,
    Selection,
)
from ray_resume.read.file_ranges import FileRanges
from ray_resume.read.line_ranges import (
    BOM,
    ByteRange,
    Quotes,
    check_quotes,
    header_line,
    is_value,
    lines_of,
    quotes_error,
    served,
    starts_in_quotes,
)

__all__ = [
    "SPLIT_BYTES",
    "SplitFiles",
    "check_splits",
    "is_compressed",
    "is_document",
    "list_splits",
    "split_files",
    "split_sizes",
]

SPLIT_BYTES = 64 << 20
"""Bytes of a split, if the user does not say."""

# An array of values begins there, if a file is one.
_BEGINNING_BYTES = 4096

_READERS = ("read_csv", "read_json", "read_text")
# A newline is one byte in them, and that byte is nothing else.
_ENCODINGS = {"ascii", "cp1252", "latin-1", "iso-8859-1", "utf-8", "utf8", "us-ascii"}


def list_splits(files: SourceTable, split_bytes: int) -> SourceTable:
    """Cut files into ranges of ``split_bytes``, by their sizes alone.

    An empty file has one, ``<path>#bytes=0-0``: what its reader says of it is seen.
    """
    for position in np.flatnonzero(files.fingerprints.known & 1 == 0).tolist():
        raise NonResumableError(
            f"The size of {files.id(position)} is not known, so it cannot be cut into splits. "
            'Read it with granularity="file".'
        )
    ranges = FileRanges.cut(list(files.items()), files.fingerprints.sizes, split_bytes)
    names = [files.id_bytes(position) for position in range(len(files))]
    return SourceTable.cut_from(files, ranges.at, ranges.names(names), ranges)


def split_sizes(splits: SourceTable) -> npt.NDArray[np.int64]:
    """Return how many bytes each split has, or each file that is not cut."""
    items = splits.items()
    if isinstance(items, FileRanges):
        return items.lengths
    sizes: npt.NDArray[np.int64] = splits.fingerprints.sizes.copy()
    for position, item in enumerate(items):
        if not isinstance(item, str):
            sizes[position] = item[1].end - item[1].first
    return sizes


def check_splits(name: str, arguments: Mapping[str, Any]) -> None:
    """Make sure that a reader reads files of lines that are not compressed.

    Raises:
        NonResumableError: it does not.
    """
    if name not in _READERS:
        raise NonResumableError(
            f'granularity="split" is for files of lines ({", ".join(_READERS)}), not for {name}.'
        )
    for option in ("arrow_open_stream_args", "open_stream_args"):
        if (arguments.get(option) or {}).get("compression") not in (None, "detect"):
            _refuse(f"{option} names a compression")


def split_files(
    name: str, arguments: Mapping[str, Any], files: FileReader, sources: SourceTable, on: FileSystem
) -> SplitFiles:
    """Have the splits of files read by what reads the files.

    Args:
        name: of Ray Data's reader; ``arguments`` are its own.
        sources: the files.
        on: where the files are.

    Raises:
        NonResumableError: lines of these files cannot be told apart without reading from the start.
    """
    check_splits(name, arguments)
    for source in sources:
        if is_compressed(str(source.item)):
            _refuse(f"{source.source_id} is compressed")
    if name != "read_csv":
        _check_encoding(arguments.get("encoding"))
        if getattr(arguments.get("parse_options"), "newlines_in_values", False):
            _refuse("newlines_in_values=True says that a value may have several lines")
        return SplitFiles(files, on, values=name == "read_json")
    return _split_csv(arguments, files, on)


def _split_csv(arguments: Mapping[str, Any], files: FileReader, on: FileSystem) -> SplitFiles:
    reading = arguments.get("read_options") or pyarrow.csv.ReadOptions()
    parsing = arguments.get("parse_options") or pyarrow.csv.ParseOptions()
    _check_encoding(reading.encoding)
    if parsing.newlines_in_values:
        _refuse("newlines_in_values=True says that a row may have several lines")
    if parsing.escape_char:
        _refuse("escape_char may stand before any quote")
    if reading.skip_rows or reading.skip_rows_after_names:
        _refuse("skip_rows counts from the start of the file")
    quotes = None
    if parsing.quote_char:
        quotes = Quotes(parsing.quote_char.encode(), parsing.delimiter.encode())
    if reading.column_names or reading.autogenerate_column_names:
        return SplitFiles(files, on, "none", quotes)
    return SplitFiles(files, on, "line" if parsing.ignore_empty_lines else "first line", quotes)


def _check_encoding(encoding: str | None) -> None:
    if encoding is not None and encoding.lower().replace("_", "-") not in _ENCODINGS:
        _refuse(f"in the encoding {encoding}, a newline may be other bytes")


def is_document(filesystem: FileSystem, path: str) -> bool:
    """Say whether a JSON file is one array, and not a value a line.

    A file that cannot be opened counts as one: it fails by itself, where it is read.
    """
    try:
        with filesystem.open_input_file(path) as file:
            beginning = bytes(file.read(_BEGINNING_BYTES))
    except OSError:
        return True
    return beginning.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def is_compressed(path: str) -> bool:
    """Say whether Ray Data decompresses a file of this name."""
    try:
        pa.Codec.detect(path)
    except (TypeError, ValueError):  # pyarrow's way to say no, in this version or that
        return False
    return True


def _refuse(why: str) -> None:
    raise NonResumableError(
        f'granularity="split" does not work here: {why}. So where a line begins is known only from '
        'the start of the file. Read with granularity="file", or write the lines to files without '
        "that first."
    )


@dataclass(frozen=True)
class SplitFiles:
    """Reads splits of files by ``files``, which reads whole ones from ``filesystem``.

    Args:
        header: of CSV files alone: ``"line"`` (the first one that is not empty), ``"first line"``,
            ``"none"``.
        quotes: of CSV files alone, if values may be quoted.
        values: whether each line is a value of its own, as of JSON.
    """

    files: FileReader
    filesystem: FileSystem
    header: str | None = None
    quotes: Quotes | None = None
    values: bool = False

    def on(self, filesystem: FileSystem) -> SplitFiles:
        """As `FileReader.on`."""
        return replace(self, files=self.files.on(filesystem), filesystem=filesystem)

    def schema(self, columns: Sequence[str] | None) -> pa.Schema | None:
        """As `FileReader.schema`."""
        return self.files.schema(columns)

    def metadata(self, paths: Sequence[str], sizes: Sequence[int | None]) -> BlockMetadata | None:
        """As `FileReader.metadata`."""
        return self.files.metadata(paths, sizes)

    def inflation(self) -> float | None:
        """As `FileReader.inflation`."""
        return self.files.inflation()

    def task_factory(self, selection: Selection) -> tuple[ReadTaskFactory, Selection]:
        """As `FileReader.task_factory`."""
        _, left = self.files.task_factory(selection)
        return _SplitTasks(self, selection), left


@dataclass(frozen=True)
class _SplitTasks:
    split: SplitFiles
    selection: Selection

    def __call__(self, sources: SourceTable) -> Sequence[Any]:
        return [partial(self._read, source) for source in sources]

    def _read(self, source: Source) -> Iterator[Any]:
        if isinstance(source.item, str):
            yield from self._whole(self.split.files, source)
            return
        path, wanted = source.item
        if wanted == (0, source.fingerprint.size):
            yield from self._whole(self.split.files, replace(source, item=path))
            return
        self._check_start(path, wanted)
        data = lines_of(self.split.filesystem, path, wanted)
        if data is None:
            return
        reader = self._reader(path, wanted)
        if reader is None:
            return
        if self.split.quotes is not None:
            check_quotes(data, self.split.quotes)
        if wanted.first and self.split.header is not None and bytes(data[:3]) == BOM:
            # PyArrow takes those of the first value for a mark, and leaves out one.
            data = pa.py_buffer(BOM + bytes(data))
        files = reader.on(served(self.split.filesystem, path, data))
        yield from self._whole(files, replace(source, item=path))

    def _check_start(self, path: str, wanted: ByteRange) -> None:
        """Make sure that the lines of a range are values, as far as other lines tell."""
        split = self.split
        if split.values:
            _, line = header_line(split.filesystem, path)
            if not is_value(bytes(line)):
                raise ResumeError(
                    f"The first line of {path} is not a JSON object of its own, so the file cannot "
                    'be read by its lines. Read with granularity="file".'
                )
        if split.quotes is not None and wanted.first:
            assert isinstance(split.files, DatasourceFiles)
            template: Any = split.files.template
            block_bytes = template.read_options.block_size
            if starts_in_quotes(split.filesystem, path, wanted, split.quotes, block_bytes):
                raise quotes_error()

    def _whole(self, files: FileReader, source: Source) -> Iterator[Any]:
        tasks, _ = files.task_factory(self.selection)
        for task in tasks(SourceTable.of([source])):
            yield from task()

    def _reader(self, path: str, wanted: ByteRange) -> FileReader | None:
        """Return what reads the lines of a range, None if they come before the header of a file."""
        split = self.split
        if split.header is None:
            return split.files
        assert isinstance(split.files, DatasourceFiles)
        begin = -1
        if split.header != "none":
            begin, line = header_line(split.filesystem, path)
            if not bytes(line).strip(b"\r\n") or split.header == "first line":
                begin = 0  # without a line that has a value, a file is no CSV, as any range says
            if split.quotes is not None:
                check_quotes(line, split.quotes)
        if wanted.end <= begin:
            return None
        columns = columns_at_start(split.files, split.filesystem, path)
        return columns.given_to(split.files, header=wanted.first <= begin)
