"""The lines of a range of bytes of a file, as a file of their own.

A line is of the range in which its first byte is. So the ranges of a file have each of its lines
once, wherever they are cut, and what they have one after another is the file.

Importable on workers: knows neither checkpoints nor lmdb.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, PyFileSystem
from typing_extensions import override

from ray_resume.errors import ResumeError
from ray_resume.read.read_only import ReadOnlyHandler

__all__ = [
    "BOM",
    "ByteRange",
    "Quotes",
    "check_quotes",
    "header_line",
    "is_value",
    "lines_of",
    "quotes_error",
    "served",
    "starts_in_quotes",
]

BOM = b"\xef\xbb\xbf"
"""A mark that may begin a file in UTF-8, and is no part of its first line."""

_NEWLINE = b"\n"
# A search for the end of a line begins with so many bytes, and reads more each time.
_FIRST_LOOK_BYTES = 1 << 16


class ByteRange(NamedTuple):
    """Bytes of a file: from ``first`` to just before ``end``."""

    first: int
    end: int

    @override
    def __str__(self) -> str:
        return f"bytes={self.first}-{self.end}"


class Quotes(NamedTuple):
    """How values of a CSV file are quoted, and what stands between them: one byte each."""

    quote: bytes
    delimiter: bytes


def lines_of(filesystem: FileSystem, path: str, wanted: ByteRange) -> pa.Buffer | None:
    """Read the lines that begin in a range; None if there are none.

    Memory: as many bytes as they have.
    """
    with filesystem.open_input_file(path) as file:
        size = int(file.size())
        first = _next_line(file, wanted.first, size)
        end = _next_line(file, wanted.end, size)
        if first >= end:
            return None
        return file.read_at(end - first, first)


def header_line(filesystem: FileSystem, path: str) -> tuple[int, pa.Buffer]:
    """Return where the first line begins that is not empty, and that line.

    Empty is a line without a byte, as for PyArrow: one of spaces has a value.
    """
    with filesystem.open_input_file(path) as file:
        size = int(file.size())
        start = at = 0
        while at < size:
            data = bytes(file.read_at(min(_FIRST_LOOK_BYTES, size - at), at))
            begin = len(BOM) if at == 0 and data.startswith(BOM) else 0
            empty = len(data) - begin - len(data[begin:].lstrip(b"\r\n"))
            newline = data.rfind(_NEWLINE, 0, begin + empty)
            start = at + newline + 1 if newline >= 0 else start
            if begin + empty < len(data):
                break
            at += len(data)
        return start, file.read_at(_next_line(file, start + 1, size) - start, start)


def _next_line(file: Any, position: int, size: int) -> int:
    """Return where the first line starts that does not start before ``position``."""
    if position <= 0:
        return 0
    at, look = position - 1, _FIRST_LOOK_BYTES
    while at < size:
        data = bytes(file.read_at(min(look, size - at), at))
        if not data:
            break
        found = data.find(_NEWLINE)
        if found >= 0:
            return at + found + 1
        at, look = at + len(data), look * 4
    return size


def starts_in_quotes(
    filesystem: FileSystem, path: str, wanted: ByteRange, quotes: Quotes, block_bytes: int
) -> bool:
    """Say whether the lines of a range of a CSV file begin within a quoted value.

    PyArrow reads a file in blocks of ``block_bytes``, and each as far as its last line ends. It
    fails if that is within a value. So for a file that it reads, the quotes are counted from there.
    """
    with filesystem.open_input_file(path) as file:
        first = _next_line(file, wanted.first, int(file.size()))
        block = first // block_bytes * block_bytes
        begin = max(0, block - block_bytes)
        data = bytes(file.read_at(first - begin, begin))
    start = data.rfind(_NEWLINE, 0, block - begin) + 1
    return data.count(quotes.quote, start) % 2 == 1


def is_value(line: bytes) -> bool:
    """Say whether a line of a JSON file has a value of its own, by how it begins and ends."""
    text = line.removeprefix(BOM).strip(b" \t\r\n")
    return text.startswith(b"{") and text.endswith(b"}")


def check_quotes(data: pa.Buffer, quotes: Quotes) -> None:
    """Make sure that no quoted value of these lines of a CSV file goes on in another line.

    Lines that begin or end within a quoted value are found by what their quotes stand beside: one
    that opens a value stands behind a delimiter or at the start of a line, one that closes it
    before a delimiter or at the end of a line (RFC 4180, section 2).

    Raises:
        ResumeError: one does, or may.
    """
    text = np.frombuffer(data, np.uint8)
    quote, delimiter = quotes.quote[0], quotes.delimiter[0]
    at = np.flatnonzero(text == quote)
    if not len(at):
        return
    outside = np.array([delimiter, *b"\n\r", quote], np.uint8)
    opening, closing = at[::2], at[1::2]
    before = text[opening[opening > 0] - 1]
    after = text[closing[closing < len(text) - 1] + 1]
    sound = len(at) % 2 == 0 and bool(
        np.isin(before, outside).all() and np.isin(after, outside).all()
    )
    if sound:
        lines = np.flatnonzero(text == _NEWLINE[0])
        inside = np.searchsorted(lines, closing) - np.searchsorted(lines, opening)
        sound = not inside.any()
    if not sound:
        raise quotes_error()


def quotes_error() -> ResumeError:
    """Make the error of lines that begin or end within a value, or may."""
    return ResumeError(
        "A quoted value goes on in the next line, or a quote stands within a value, so where "
        'rows begin is known only from the start of the file. Read with granularity="file".'
    )


def served(filesystem: FileSystem, path: str, data: pa.Buffer) -> FileSystem:
    """Return ``filesystem`` with ``data`` as the content of the file at ``path``. It reads only."""
    return PyFileSystem(_Served(filesystem, path, data))


class _Served(ReadOnlyHandler):
    """It stays in the process that made it."""

    def __init__(self, filesystem: FileSystem, path: str, data: pa.Buffer) -> None:
        self._filesystem, self._path, self._data = filesystem, path, data

    @override
    def __eq__(self, other: object) -> bool:
        return self is other

    @override
    def __hash__(self) -> int:
        return id(self)

    def get_type_name(self) -> str:
        return str(self._filesystem.type_name)

    def normalize_path(self, path: str) -> str:
        return str(self._filesystem.normalize_path(path))

    def get_file_info(self, paths: Sequence[str]) -> list[FileInfo]:
        infos: list[FileInfo] = self._filesystem.get_file_info(list(paths))
        return infos

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        infos: list[FileInfo] = self._filesystem.get_file_info(selector)
        return infos

    def open_input_file(self, path: str) -> Any:
        if path != self._path:
            raise FileNotFoundError(f"{path} is not {self._path}, of which lines are read")
        return pa.BufferReader(self._data)

    open_input_stream = open_input_file
