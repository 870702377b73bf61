"""A source as one run left it: the record, and its format in bytes.

A checkpoint stores records in *blocks*. A block is one Arrow IPC record batch of :data:`SCHEMA`,
compressed as a whole, behind a checksum. To add a field to records, add it to :class:`Record`,
to :data:`SCHEMA` and to :func:`_batch`, and raise the format versions of the stores.

Guarantees: :func:`decode` accepts only what :func:`encode` can have written. It executes nothing,
takes memory in proportion to :data:`MAX_BLOCK_BYTES` and the length of the block, and raises
:class:`CheckpointError` for anything else, even if the checksum is right.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from ray_resume.core.columns import (
    COUNTS,
    TEXT,
    TEXTS,
    bytes_of,
    counts,
    fixed,
    lengths_of,
    lists,
    numbers,
    numbers_of,
    text_of,
    texts,
)
from ray_resume.core.digests import DIGEST_BYTES, digest_bytes
from ray_resume.core.parts import FilePart
from ray_resume.errors import CheckpointError

__all__ = [
    "MAX_BLOCK_BYTES",
    "NO_PIPELINE",
    "RECORDS_IN_BLOCK",
    "SCHEMA",
    "Fingerprint",
    "Record",
    "State",
    "decode",
    "dropped_record",
    "encode",
    "encode_batches",
    "pipeline_before",
    "pipeline_hash",
    "records_of",
]


class State(enum.Enum):
    """The state of a source in a record. ``RESET``: as if no run had ever read the source."""

    COMPLETED = 1
    FAILED = 2
    QUARANTINED = 3
    RESET = 4


_PIPELINE_BYTES = 8

NO_PIPELINE = bytes(_PIPELINE_BYTES)
"""The pipeline of a record that belongs to none, such as a reset."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """How a source looked when it was listed: size in bytes, modification time in ns since 1970."""

    size: int | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One source as one run left it.

    ``parts`` say where its rows are in the files of the sink's folder. The files of
    ``dead_letters`` are relative to the checkpoint's. Times are in seconds since 1970, UTC.
    ``sequence`` orders the records of one source: the highest counts. ``pipeline`` is the hash of
    the pipeline that the source went through (:func:`pipeline_hash`); the header of the run's file
    has the pipeline's signature and code. ``end`` is how many ranges of rows a file has, if the
    source is its end (see `row_ranges`).
    """

    source_id: str
    state: State
    sequence: int
    run_id: str
    rows: int = 0
    parts: tuple[FilePart, ...] = ()
    error: str | None = None
    failed_runs: int = 0
    completed_at: float | None = None
    fingerprint: Fingerprint = Fingerprint()
    pipeline: bytes = NO_PIPELINE
    failed_at: float | None = None
    dead_rows: int = 0
    dead_letters: tuple[str, ...] = ()
    end: int | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The files that ``parts`` are in, each once."""
        return tuple(dict.fromkeys(part.file for part in self.parts))


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


SCHEMA = pa.schema(
    [
        _field("digest", pa.binary(DIGEST_BYTES)),
        _field("source_id", TEXT),
        _field("state", pa.uint8()),
        _field("sequence", pa.uint64()),
        _field("run_id", TEXT),
        _field("rows", pa.int64()),
        # One item for each part, in all four.
        _field("files", TEXTS),
        _field("first_rows", COUNTS),
        _field("part_rows", COUNTS),
        _field("file_rows", COUNTS),
        pa.field("error", TEXT),
        _field("failed_runs", pa.int64()),
        pa.field("completed_at", pa.float64()),
        pa.field("size", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
        _field("pipeline", pa.binary(_PIPELINE_BYTES)),
        pa.field("failed_at", pa.float64()),
        _field("dead_rows", pa.int64()),
        _field("dead_letters", TEXTS),
        pa.field("end", pa.int64()),
    ]
)
"""The columns of a record; nullable where a record may have None."""

# Most blocks have no end of a file, and not this column either.
_WITHOUT_ENDS = SCHEMA.remove(SCHEMA.get_field_index("end"))

RECORDS_IN_BLOCK = 1 << 12
"""The most records in one block."""

MAX_BLOCK_BYTES = 64 << 20
"""The most that a compressed block takes in memory. A larger record stands alone, uncompressed."""

# The CRC-32 of all that follows it; bits that say what the batch is like; its size in bytes.
_HEAD = struct.Struct("<IBQ")
_IS_COMPRESSED, _HAS_ENDS = 1, 2
_CHECKED_FROM = 4
_CODEC, _LEVEL = "zstd", 1

_STATES = {state.value: state for state in State}
_UNREADABLE = (pa.ArrowException, struct.error, EOFError, MemoryError, OSError, ValueError)
_TIMES = ("completed_at", "failed_at")
_PARTS = ("files", "first_rows", "part_rows", "file_rows")


def dropped_record(source_id: str, sequence: int, run_id: str) -> Record:
    """Make the record of a source as if it had never been read: no record lists its output."""
    return Record(source_id, State.RESET, sequence, run_id)


def pipeline_hash(signature: str, code: str = "") -> bytes:
    """Return 8 bytes that stand for a pipeline, which millions of records share.

    The first four stand for its signature, the others for the code that it runs (0: not known).
    """
    return b"".join(
        hashlib.blake2b(bytes_of(text), digest_size=4).digest() if text else bytes(4)
        for text in (signature, code)
    )


def pipeline_before(signature: str) -> bytes:
    """Return what stood for a pipeline in records of versions that knew nothing of code."""
    if not signature:
        return NO_PIPELINE
    return hashlib.blake2b(bytes_of(signature), digest_size=_PIPELINE_BYTES).digest()


def encode(records: Iterable[Record]) -> Iterator[bytes]:
    """Encode records as blocks, in order.

    Raises:
        OverflowError, ValueError: a number has no room in its column.
    """
    rest = iter(records)
    while part := list(itertools.islice(rest, RECORDS_IN_BLOCK)):
        yield from _blocks(_batch(part))


def encode_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[bytes]:
    """Encode batches of :data:`SCHEMA` as blocks that are as large as can be, in order."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        while count >= RECORDS_IN_BLOCK:
            whole = _joined(waiting)
            yield from _blocks(whole.slice(0, RECORDS_IN_BLOCK))
            waiting = [whole.slice(RECORDS_IN_BLOCK)]
            count -= RECORDS_IN_BLOCK
    if count:
        yield from _blocks(_joined(waiting))


def decode(block: bytes, *, is_known: bool = False) -> pa.RecordBatch:
    """Return the batch of records in a block that :func:`encode` made.

    Args:
        is_known: whether this very object was decoded before: then it is not checked again.

    Raises:
        CheckpointError: the block is anything else, or was damaged.
    """
    if len(block) < _HEAD.size:
        raise CheckpointError(f"a block of records has {len(block)} bytes")
    check, kind, size = _HEAD.unpack_from(block)
    is_compressed = kind & _IS_COMPRESSED
    if not is_known and zlib.crc32(memoryview(block)[_CHECKED_FROM:]) != check:
        raise CheckpointError("a block of records is not as it was written")
    try:
        if kind & ~(_IS_COMPRESSED | _HAS_ENDS):
            raise ValueError(f"it is of kind {kind}")
        if is_compressed and size > MAX_BLOCK_BYTES:
            raise ValueError(f"it would take {size} bytes")
        payload = block[_HEAD.size :]
        raw = pa.py_buffer(payload)
        if is_compressed:
            raw = pa.Codec(_CODEC).decompress(raw, decompressed_size=size)
        message = pa.ipc.read_message(raw)
        if not is_known:
            _refuse_compressed_buffers(bytes(message.metadata))
        schema = SCHEMA if kind & _HAS_ENDS else _WITHOUT_ENDS
        batch = pa.ipc.read_record_batch(message, schema)
        if not is_known:
            batch.validate(full=True)
        if not kind & _HAS_ENDS:
            batch = batch.append_column(SCHEMA.field("end"), pa.nulls(len(batch), pa.int64()))
        if not is_known:
            _check_values(batch)
    except _UNREADABLE as error:
        raise CheckpointError(f"a block of records cannot be read ({error})") from error
    return batch


def records_of(batch: pa.RecordBatch) -> Iterator[Record]:
    """Return the records of a batch that :func:`decode` returned, in order."""
    columns = {name: batch.column(name).to_pylist() for name in SCHEMA.names}
    for row in range(len(batch)):
        error = columns["error"][row]
        yield Record(
            source_id=text_of(columns["source_id"][row]),
            state=_STATES[columns["state"][row]],
            sequence=columns["sequence"][row],
            run_id=text_of(columns["run_id"][row]),
            rows=columns["rows"][row],
            parts=tuple(
                FilePart(text_of(file), *where)
                for file, *where in zip(*(columns[name][row] for name in _PARTS), strict=True)
            ),
            error=None if error is None else text_of(error),
            failed_runs=columns["failed_runs"][row],
            completed_at=columns["completed_at"][row],
            fingerprint=Fingerprint(columns["size"][row], columns["mtime_ns"][row]),
            pipeline=columns["pipeline"][row],
            failed_at=columns["failed_at"][row],
            dead_rows=columns["dead_rows"][row],
            dead_letters=tuple(map(text_of, columns["dead_letters"][row])),
            end=columns["end"][row],
        )


def _batch(records: Sequence[Record]) -> pa.RecordBatch:
    ids = [bytes_of(record.source_id) for record in records]
    errors = [record.error for record in records]
    every = [record.parts for record in records]
    columns = {
        "digest": fixed([digest_bytes(source) for source in ids], DIGEST_BYTES),
        "source_id": texts(ids),
        "state": numbers([record.state.value for record in records], "u1"),
        "sequence": numbers([record.sequence for record in records], "u8"),
        "run_id": texts([bytes_of(record.run_id) for record in records]),
        "rows": numbers([record.rows for record in records], "i8"),
        "files": lists([[part.file for part in parts] for parts in every]),
        "first_rows": counts([[part.first_row for part in parts] for parts in every]),
        "part_rows": counts([[part.rows for part in parts] for parts in every]),
        "file_rows": counts([[part.file_rows for part in parts] for parts in every]),
        "error": texts([None if error is None else bytes_of(error) for error in errors]),
        "failed_runs": numbers([record.failed_runs for record in records], "i8"),
        "completed_at": numbers([record.completed_at for record in records], "f8"),
        "size": numbers([record.fingerprint.size for record in records], "i8"),
        "mtime_ns": numbers([record.fingerprint.mtime_ns for record in records], "i8"),
        "pipeline": fixed([record.pipeline for record in records], _PIPELINE_BYTES),
        "failed_at": numbers([record.failed_at for record in records], "f8"),
        "dead_rows": numbers([record.dead_rows for record in records], "i8"),
        "dead_letters": lists([record.dead_letters for record in records]),
        "end": numbers([record.end for record in records], "i8"),
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=SCHEMA)


def _blocks(batch: pa.RecordBatch) -> Iterator[bytes]:
    has_ends = batch.column("end").null_count < len(batch)
    raw = (batch if has_ends else batch.select(_WITHOUT_ENDS.names)).serialize()
    if raw.size > MAX_BLOCK_BYTES and len(batch) > 1:
        half = len(batch) // 2
        yield from _blocks(batch.slice(0, half))
        yield from _blocks(batch.slice(half))
        return
    is_compressed = raw.size <= MAX_BLOCK_BYTES
    data = pa.Codec(_CODEC, _LEVEL).compress(raw, asbytes=True) if is_compressed else bytes(raw)
    kind = is_compressed * _IS_COMPRESSED | has_ends * _HAS_ENDS
    rest = _HEAD.pack(0, kind, raw.size)[_CHECKED_FROM:] + data
    yield struct.pack("<I", zlib.crc32(rest)) + rest


def _joined(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    (whole,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return whole


def _refuse_compressed_buffers(metadata: bytes) -> None:
    """Make sure that Arrow does not decompress anything: it would take whatever a buffer claims.

    A batch's metadata is a FlatBuffer, ``Message(version, header type, header, ...)``. Its header
    is ``RecordBatch(length, nodes, buffers, compression, ...)``; a table starts with how far
    before it the offsets of its fields stand, behind their size and its own.
    """

    def field(table: int, number: int) -> int:
        offsets = table - struct.unpack_from("<i", metadata, table)[0]
        (size,) = struct.unpack_from("<H", metadata, offsets)
        at = 4 + 2 * number
        if size < at + 2:
            return 0
        (offset,) = struct.unpack_from("<H", metadata, offsets + at)
        return table + offset if offset else 0

    header = field(struct.unpack_from("<I", metadata)[0], 2)
    if field(header + struct.unpack_from("<I", metadata, header)[0], 3):
        raise ValueError("its buffers are compressed")


def _check_values(batch: pa.RecordBatch) -> None:
    """Make sure that a batch that is sound to Arrow holds records.

    Raises:
        ValueError: it does not.
    """
    if len(batch) > RECORDS_IN_BLOCK:
        raise ValueError(f"it has {len(batch)} records")
    for field, column in zip(SCHEMA, batch.columns, strict=True):
        if column.null_count and not field.nullable:
            raise ValueError(f"a record has no {field.name}")
        if field.type in (TEXTS, COUNTS):
            column = column.flatten()
            if column.null_count:
                raise ValueError(f"{field.name} lists nothing")
        if column.type == TEXT:
            _check_texts(column)
    _check_parts(batch)
    states = numbers_of(batch.column("state"), "u1")
    if len(states) and not 1 <= states.min() <= states.max() <= len(State):
        raise ValueError("a record is of no known state")
    if len(batch) and numbers_of(batch.column("end"), "i8", unknown=1).min() < 1:
        raise ValueError("a file has no range")
    for name in _TIMES:
        if not np.isfinite(numbers_of(batch.column(name), "f8")).all():
            raise ValueError(f"{name} is no time")


def _check_parts(batch: pa.RecordBatch) -> None:
    lengths = [lengths_of(batch.column(name)) for name in _PARTS]
    if any((one != lengths[0]).any() for one in lengths[1:]):
        raise ValueError("a part of a file has no place in it")
    first, rows, whole = (numbers_of(batch.column(name).flatten(), "i8") for name in _PARTS[1:])
    # In this order, no sum is too large.
    if not ((first >= 0) & (rows > 0) & (rows <= whole) & (first <= whole - rows)).all():
        raise ValueError("a part is not inside of its file")


def _check_texts(column: Any) -> None:
    data = column.buffers()[2]
    if data is not None and not data.to_pybytes().isascii():
        for value in column.to_pylist():
            if value is not None:
                text_of(value)
