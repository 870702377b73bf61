"""WebDataset shards: tar files whose members ``<key>.<column>`` are the values of rows.

Only its key tells which members are of one row: readers join successive members whose names agree
up to the first dot, and refuse a key that comes twice. So no file has two rows of one key. Rows are
copied byte by byte.

Importable on workers; loads no Ray before it encodes rows.
"""

from __future__ import annotations

import re
import tarfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, NamedTuple

import pyarrow as pa

from ray_resume.write.new_files import NewFile, UnwritableRowsError, encodable
from ray_resume.write.row_pieces import READ_ERRORS, IncompatibleFilesError, OldFile, Pieces

__all__ = ["SampleFiles", "divide_samples"]

# The key of a member, and the rest of its name, as Ray's reader and that of webdataset cut it.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_END = bytes(2 * tarfile.BLOCKSIZE)
_CHUNK_BYTES = 1 << 20


class Sample(NamedTuple):
    """A row: the key that readers will find, and its members as the bytes of a tar file."""

    key: str
    members: bytes


def divide_samples(
    table: pa.Table, options: Mapping[str, Any], max_rows: int | None
) -> Iterator[NewFile]:
    """Yield the files that rows are written to.

    Rows after one whose key repeats are in another file.

    Raises:
        UnwritableRowsError: a row cannot be read again from such a file as a row of its own.
    """
    # Imported here, since the command line copies files, and loads no Ray.
    from ray_resume.raydata.encoders import encoded_samples

    samples: list[Sample] = []
    keys: dict[str, str] = {}
    encoder = options.get("encoder", True)
    rows = encoded_samples(table, encoder)
    if encoder is True:
        rows = encodable(rows, partial(_named, table))
    for row in rows:
        key = row["__key__"] if "__key__" in row else uuid.uuid4().hex
        sample = _encoded(key, row)
        if keys.get(sample.key, key) != key:
            raise UnwritableRowsError(
                f"Readers of WebDataset files take what is before the first dot of __key__ for a "
                f"row's key, so they would join the rows {keys[sample.key]!r} and {key!r}. Replace "
                "the dots in __key__."
            )
        if sample.key in keys or len(samples) == max_rows:
            yield NewFile(len(samples), partial(_write, samples))
            samples, keys = [], {}
        keys[sample.key] = key
        samples.append(sample)
    if samples:
        yield NewFile(len(samples), partial(_write, samples))


def _named(table: pa.Table, position: int) -> str:
    named = "__key__" in table.column_names
    return f"The row {table['__key__'][position].as_py()!r}" if named else f"Row {position}"


def _encoded(key: Any, row: Mapping[str, Any]) -> Sample:
    names: dict[str | None, str] = {}
    members = []
    for column, value in row.items():
        if value is None or column.startswith("__"):
            continue
        if not isinstance(value, (bytes, str)):
            raise UnwritableRowsError(
                f"The column {column!r} of the row {key!r} has a value of type "
                f"{type(value).__name__}, and a WebDataset file holds bytes and text. Give the "
                "column a name whose ending says how to encode it (.npy, .json, .cls, .png, ...), "
                "or pass encoder=."
            )
        content = value.encode() if isinstance(value, str) else value
        name = f"{key}.{column}"
        match = _NAME.fullmatch(name)
        # In a tar file, a name ends at a zero.
        names.setdefault(None if match is None or "\0" in name else match[1], name)
        # As Ray Data writes it, but for fractions of seconds, which take 1 KiB a member.
        entry = tarfile.TarInfo(name)
        entry.size, entry.mtime = len(content), int(time.time())
        entry.mode, entry.uname, entry.gname = 0o644, "data", "data"
        members += [entry.tobuf(tarfile.PAX_FORMAT), content, bytes(_padding(len(content)))]
    found = next(iter(names), None)
    if found is None or len(names) != 1:
        raise UnwritableRowsError(
            f"A row with the key {key!r} has no member that readers of WebDataset files find: "
            "all its values are null."
            if not names
            else f"Readers of WebDataset files would not find all members of the row {key!r} "
            f"({', '.join(names.values())}): a name needs a key, a dot and a column, without a "
            "dot before the key or a slash after it. Change __key__, or the names of columns."
        )
    return Sample(found, b"".join(members))


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE


def _write(samples: Iterable[Sample], file: IO[bytes]) -> None:
    size = 0
    for sample in samples:
        file.write(sample.members)
        size += len(sample.members)
    size += file.write(_END)
    file.write(bytes(-size % tarfile.RECORDSIZE))


@dataclass
class SampleFiles:
    """Copies rows of shards, member by member."""

    _keys: dict[str, str] = field(default_factory=dict, init=False)

    def read(self, old: OldFile) -> Pieces[Sample]:
        """Yield the rows that are copied of a file, in its order, and check all others.

        Raises:
            IncompatibleFilesError: another file has a row of the same key.
            ResumeError: the file is not as it was written.
        """
        try:
            with old.open() as file:
                for piece in old.pieces(
                    (1, partial(_given, sample)) for sample in _samples(old, file)
                ):
                    self._check_key(old, piece.rows.key)
                    yield piece
        except READ_ERRORS as error:
            raise old.unusable(error) from error

    def write(self, samples: Iterator[Sample], file: IO[bytes]) -> None:
        """Write ``samples`` as one file."""
        _write(samples, file)

    def _check_key(self, old: OldFile, key: str) -> None:
        other = self._keys.setdefault(key, old.uri)
        if other != old.uri:
            raise IncompatibleFilesError(
                f"The output files {other} and {old.uri} both have a row with the key {key!r}, "
                "which a WebDataset file may hold once. Nothing was changed. They stay apart; "
                "give rows keys that no other row has, if they are to be merged."
            )


def _given(sample: Sample, runs: Iterable[Any]) -> list[Sample]:
    return [sample for _ in runs]


class _Recorded:
    """A file that keeps what is read from it until it is taken."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._kept = bytearray()
        self._start = 0

    def read(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        self._kept += data
        return data

    def take(self, stop: int) -> bytes:
        """Return what was read up to the position ``stop``, from where the last call ended."""
        taken = bytes(self._kept[: stop - self._start])
        del self._kept[: stop - self._start]
        self._start = stop
        return taken


def _samples(old: OldFile, file: Any) -> Iterator[Sample]:
    recorded = _Recorded(file)
    total = end = 0
    key: str | None = None
    with tarfile.open(fileobj=recorded, mode="r|", bufsize=_CHUNK_BYTES) as tar:  # type: ignore[call-overload]
        for entry in tar:
            match = _NAME.fullmatch(entry.name)
            if match is None:
                raise old.unusable(f"it has a member {entry.name!r}, which was not written to it")
            if key is not None and match[1] != key:
                yield Sample(key, recorded.take(entry.offset))
                total += 1
            key = match[1]
            end = entry.offset_data + entry.size + _padding(entry.size)
    if key is not None:
        yield Sample(key, recorded.take(end))
        total += 1
    # A file that was cut off between two members would have lost some of its last row.
    recorded.read(len(_END))
    if not recorded.take(end + len(_END)).startswith(_END):
        raise old.unusable("it has no end: it was cut off")
    old.check_rows(total)
