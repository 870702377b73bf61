"""Rows of text files, JSON lines and CSV, and of TFRecords, copied byte by byte.

Nothing is parsed but the ends of rows, so numbers, escapes and encodings stay as they are. A row
ends at a newline; in CSV files, at one that has an even number of quote characters before it.
Writers end the last row so, too: a file that does not end in a newline was cut off. A TFRecord says
how long it is.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from ray_resume.write.row_pieces import READ_ERRORS, IncompatibleFilesError, OldFile, Pieces, Ranges

__all__ = ["LineFiles"]

_CHUNK_BYTES = 16 << 20
_NEWLINE, _RETURN, _QUOTE, _OPENING, _CLOSING = b'\n\r"{}'

_CUT_OFF = (
    "its last row does not end in a newline: it was cut off, or options such as lines and eol made "
    "no line of each row"
)
# The length of a record, with its checksum; the checksum of the record.
_HEAD_BYTES, _TAIL_BYTES = 12, 4

Ends = npt.NDArray[np.intp]


@dataclass
class LineFiles:
    """Copies rows of files that have one format.

    Args:
        format: ``"json"``, ``"csv"`` or ``"tfrecords"``.
        codec: what the files are compressed with, as a whole.
        has_header: whether CSV files have a header; None if their number of rows is to tell.
        member: what the content of an archive is called.
    """

    format: str
    codec: str | None
    has_header: bool | None
    member: str
    _header: tuple[OldFile, bytes] | None = field(default=None, init=False)

    def read(self, old: OldFile) -> Pieces[bytes]:
        """Yield the rows that are copied of a file, in its order, and check all others.

        Raises:
            ResumeError: the file is not as it was written.
        """
        try:
            with ExitStack() as stack:
                file = stack.enter_context(old.open())
                text = _decompressed(file, self.codec, stack)
                read = {"csv": self._csv, "json": self._json, "tfrecords": self._tfrecords}
                batches = read[self.format](old, text)
                yield from old.pieces(
                    (len(ends), partial(_lines, chunk, ends)) for chunk, ends in batches
                )
        except READ_ERRORS as error:
            raise old.unusable(error) from error

    def write(self, rows: Iterator[bytes], file: IO[bytes]) -> None:
        """Write ``rows`` as one file, after the header that the files have."""
        with _compressing(file, self.codec, self.member) as stream:
            first = next(rows)
            if self._header is not None:
                stream.write(self._header[1])
            stream.write(first)
            for some in rows:
                stream.write(some)

    def _json(self, old: OldFile, text: Any) -> Iterator[tuple[bytes, Ends]]:
        total = 0
        for chunk, ends in _chunks(old, text, _newlines):
            if not _are_objects(chunk, ends):
                raise old.unusable(
                    "it does not have one JSON object in each line (options such as orient, lines "
                    "and indent make others)"
                )
            total += len(ends)
            yield chunk, ends
        old.check_rows(total)

    def _tfrecords(self, old: OldFile, text: Any) -> Iterator[tuple[bytes, Ends]]:
        total = 0
        for chunk, ends in _chunks(old, text, _record_ends, "its last record was cut off"):
            total += len(ends)
            yield chunk, ends
        old.check_rows(total)

    def _csv(self, old: OldFile, text: Any) -> Iterator[tuple[bytes, Ends]]:
        # All of it is held: only the number of all rows tells whether the first one is a header.
        chunks = list(_chunks(old, text, _row_ends))
        total = sum(len(ends) for _, ends in chunks)
        has_header = total > old.file_rows if self.has_header is None else self.has_header
        old.check_rows(total - has_header)
        header = b""
        if has_header:
            chunk, ends = chunks[0]
            header, chunks[0] = chunk[: ends[0]], (chunk[ends[0] :], ends[1:] - ends[0])
        self._check_header(old, header)
        yield from chunks

    def _check_header(self, old: OldFile, header: bytes) -> None:
        if self._header is None:
            self._header = old, header
            return
        other, known = self._header
        if header != known:
            raise IncompatibleFilesError(
                f"The output files {other.uri} and {old.uri} have different headers, "
                f"{known.decode(errors='replace')!r:.200} and "
                f"{header.decode(errors='replace')!r:.200}, so their rows cannot be put into one "
                "file. Nothing was changed. Keep them as they are, or reset the sources that have "
                "rows in one of them."
            )


def _chunks(
    old: OldFile, text: Any, ends_of: Callable[[bytes], Ends], cut_off: str = _CUT_OFF
) -> Iterator[tuple[bytes, Ends]]:
    """Yield text that starts with a row, and where the rows that are whole in it end."""
    rest: bytes = b""
    # A row that is longer than a chunk is looked at a few times, not once for each chunk.
    while block := text.read(max(_CHUNK_BYTES, len(rest))):
        chunk = rest + block
        ends = ends_of(chunk)
        rest = chunk[ends[-1] :] if len(ends) else chunk
        if len(ends):
            yield chunk, ends
    if rest:
        raise old.unusable(cut_off)


def _newlines(chunk: bytes) -> Ends:
    return np.flatnonzero(np.frombuffer(chunk, np.uint8) == _NEWLINE) + 1


def _record_ends(chunk: bytes) -> Ends:
    """Return the ends of TFRecords: length, checksum of it, record, checksum of it."""
    ends, end = [], 0
    while end + _HEAD_BYTES <= len(chunk):
        end += _HEAD_BYTES + int.from_bytes(chunk[end : end + 8], "little") + _TAIL_BYTES
        if end <= len(chunk):
            ends.append(end)
    return np.array(ends, np.intp)


def _row_ends(chunk: bytes) -> Ends:
    """Return the ends of CSV rows: newlines that are not between quotes."""
    ends = _newlines(chunk)
    quotes = np.flatnonzero(np.frombuffer(chunk, np.uint8) == _QUOTE)
    outside: Ends = ends[np.searchsorted(quotes, ends) % 2 == 0]
    return outside


def _are_objects(chunk: bytes, ends: Ends) -> bool:
    """Say whether each row begins and ends as a JSON object does."""
    characters = np.frombuffer(chunk, np.uint8)
    starts = np.concatenate([np.zeros(1, ends.dtype), ends[:-1]])
    last = ends - 2
    last -= characters[last] == _RETURN
    return bool((characters[starts] == _OPENING).all() and (characters[last] == _CLOSING).all())


def _lines(chunk: bytes, ends: Ends, runs: Sequence[Ranges]) -> Iterator[bytes]:
    for ranges in runs:
        yield b"".join(
            chunk[ends[first - 1] if first else 0 : ends[stop - 1]] for first, stop in ranges
        )


def _decompressed(file: Any, codec: str | None, stack: ExitStack) -> Any:
    if codec is None:
        return file
    if codec == "xz":
        return stack.enter_context(lzma.open(file))
    if codec == "zip":
        archive = stack.enter_context(zipfile.ZipFile(file))
        return stack.enter_context(archive.open(archive.namelist()[0]))
    if codec == "tar":
        tar = stack.enter_context(tarfile.open(fileobj=file))  # noqa: SIM115
        return tar.extractfile(tar.getmembers()[0])
    return stack.enter_context(pa.CompressedInputStream(file, codec))


@contextmanager
def _compressing(file: IO[bytes], codec: str | None, member: str) -> Iterator[Any]:
    """Give a stream whose content goes to ``file``, compressed; ``file`` stays open."""
    if codec is None:
        yield file
    elif codec == "xz":
        with lzma.open(file, "wb") as stream:
            yield stream
    elif codec == "zip":
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open(member, "w", force_zip64=True) as stream,
        ):
            yield stream
    elif codec == "tar":
        with io.BytesIO() as content, tarfile.open(fileobj=file, mode="w") as tar:
            yield content
            entry = tarfile.TarInfo(member)
            entry.size = content.tell()
            content.seek(0)
            tar.addfile(entry, content)
    else:
        with pa.CompressedOutputStream(_KeptOpen(file), codec) as stream:
            yield stream


class _KeptOpen(io.RawIOBase):
    """A file that closing a stream does not close: it is yet to be made durable."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, data: Any) -> int:
        return self._file.write(data)
