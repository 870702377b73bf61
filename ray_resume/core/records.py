"""What is kept of one source: the record, and how it is spelt in bytes.

Owns the value format of the store: a head of fixed size, so that millions of records can be
looked at as columns (see `table`), then the source's id, then what few records have, as JSON. Plain
data only: nothing here is unpickled or evaluated.
"""

from __future__ import annotations

import enum
import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray_resume.core.digests import DIGEST_BYTES, digest_bytes
from ray_resume.core.filenames import OutputName, packed, unpacked
from ray_resume.errors import CheckpointError

__all__ = [
    "HEAD",
    "HEAD_FIELDS",
    "NO_PIPELINE",
    "RECORDS_IN_BLOCK",
    "Fingerprint",
    "Flag",
    "Record",
    "State",
    "block_of",
    "block_of_columns",
    "blocks_of",
    "columns_of",
    "decode",
    "dropped_record",
    "encode",
    "encode_completed",
    "pipeline_before",
    "pipeline_of",
    "precedence",
    "stored_in",
]


class State(enum.Enum):
    """What a record says of its source. ``RESET`` means: as if it had never been read."""

    COMPLETED = 1
    FAILED = 2
    QUARANTINED = 3
    RESET = 4


class Flag:
    """Bits of what else is in a record. Plain numbers: operators of enums take microseconds."""

    SIZE = 1
    MTIME = 2
    TIME = 4
    FILE = 8
    """Its one file is in the head."""
    SHARED = 16
    """A file of it may hold rows of several sources."""
    MORE = 32
    """After the id there is JSON."""
    ALL = 63


NO_PIPELINE = bytes(8)
"""The pipeline of a record that is of none, as a reset is."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """How a source looked when it was listed: size in bytes, modification time in ns since 1970."""

    size: int | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One source as one run left it.

    ``files`` are relative to the sink's folder, ``dead_letters`` to the checkpoint's. Times are
    in seconds since 1970, UTC. ``sequence`` orders the records of one source: the highest counts.
    ``pipeline`` stands for the pipeline that the source went through (:func:`pipeline_of`), whose
    signature and code are in the header of the run's file.
    """

    source_id: str
    state: State
    sequence: int
    run_id: str
    rows: int = 0
    files: tuple[str, ...] = ()
    error: str | None = None
    failed_runs: int = 0
    completed_at: float | None = None
    fingerprint: Fingerprint = Fingerprint()
    pipeline: bytes = NO_PIPELINE
    failed_at: float | None = None
    dead_rows: int = 0
    dead_letters: tuple[str, ...] = ()


def dropped_record(source_id: str, sequence: int, run_id: str) -> Record:
    """Make the record of a source as if it had never been read: its earlier output is nobody's."""
    return Record(source_id, State.RESET, sequence, run_id)


def pipeline_of(signature: str, code: str = "") -> bytes:
    """Return 8 bytes that stand for a pipeline, which millions of records share.

    The first four stand for its signature, the others for the code that it runs (0: not known).
    """
    return b"".join(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).digest()
        if text
        else bytes(4)
        for text in (signature, code)
    )


def pipeline_before(signature: str) -> bytes:
    """Return what stood for a pipeline in records of versions that knew nothing of code."""
    if not signature:
        return NO_PIPELINE
    return hashlib.blake2b(signature.encode("utf-8", "surrogatepass"), digest_size=8).digest()


# Name, and kind as numpy spells it, of each field of the head, in order and without gaps.
HEAD_FIELDS = (
    ("state", "u1"),
    ("flags", "u1"),
    ("ending", "u1"),
    ("run", "V6"),
    ("checkpoint", "V4"),
    ("id_bytes", "<u4"),
    ("sequence", "<u8"),
    ("rows", "<i8"),
    ("size", "<i8"),
    ("mtime_ns", "<i8"),
    ("completed_at", "<f8"),
    ("pipeline", "V8"),
    ("random", "V8"),
)
HEAD = struct.Struct("<BBB6s4sIQqqqd8s8s")
"""The head of an encoded record. ``ending``, ``checkpoint`` and ``random`` are of its one file."""

# How many records a block has, and the CRC-32 of the rest.
_BLOCK = struct.Struct("<II")
RECORDS_IN_BLOCK = 1 << 12
"""So many records are put into a block at most: half a megabyte or so."""

_SEQUENCE = struct.Struct("<Q")
_SEQUENCE_AT = 17
_NO_RUN, _NO_CHECKPOINT, _NO_RANDOM = bytes(6), bytes(4), bytes(8)
_COMPLETED = State.COMPLETED
_COMPLETED_VALUE = _COMPLETED.value
_SHARED_DIGEST = bytes(8)
_STATES = {state.value: state for state in State}
# run id, files, error, failed_runs, failed_at, dead_rows, dead_letters
_NO_MORE: list[Any] = [None, None, None, 0, None, 0, []]


def encode(record: Record) -> bytes:
    """Spell ``record`` as a head, its id, and what the head has no room for."""
    source = record.source_id.encode("utf-8", "surrogatepass")
    run, odd_run = _run_bytes(record.run_id)
    flags, ending = 0, 0
    checkpoint, random = _NO_CHECKPOINT, _NO_RANDOM
    files: list[str] | None = None
    if record.files:
        file = packed(record.files[0]) if len(record.files) == 1 else None
        if file is not None and _is_own(file, run, odd_run, source):
            flags |= Flag.FILE
            checkpoint, random, ending = file[:4], file[18:26], file[26]
            if not any(file[10:18]):
                flags |= Flag.SHARED
        else:
            files = list(record.files)
            if any(_is_shared(name) for name in files):
                flags |= Flag.SHARED
    size, mtime_ns = record.fingerprint.size, record.fingerprint.mtime_ns
    time = record.completed_at
    if size is not None:
        flags |= Flag.SIZE
    if mtime_ns is not None:
        flags |= Flag.MTIME
    if time is not None:
        flags |= Flag.TIME
    more = b""
    if (
        record.state is not _COMPLETED
        or odd_run is not None
        or files is not None
        or record.error is not None
        or record.failed_runs
        or record.failed_at is not None
        or record.dead_rows
        or record.dead_letters
    ):
        body = [
            odd_run,
            files,
            record.error,
            record.failed_runs,
            record.failed_at,
            record.dead_rows,
            list(record.dead_letters),
        ]
        if body != _NO_MORE:
            flags |= Flag.MORE
            # Not as \u escapes: two lone surrogates side by side would come back as one character.
            text = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
            more = text.encode("utf-8", "surrogatepass")
    head = HEAD.pack(
        record.state.value,
        flags,
        ending,
        run,
        checkpoint,
        len(source),
        record.sequence,
        record.rows,
        size or 0,
        mtime_ns or 0,
        time or 0.0,
        record.pipeline,
        random,
    )
    return head + source + more


def encode_completed(
    source: bytes,
    run: bytes,
    sequence: int,
    rows: int,
    file: str | None,
    size: int | None,
    mtime_ns: int | None,
    completed_at: float,
    pipeline: bytes,
) -> bytes | None:
    """Do for a completed source, most often, what :func:`digest` and :func:`encode` do, in a third
    of the time; None if it cannot be done so.

    Args:
        source: its id as UTF-8 (lone surrogates pass).
        run: the run id, 12 hexadecimal digits, as bytes.
        file: its one file, if it has any.

    Returns:
        The digest, followed by the encoded record.
    """
    key = digest_bytes(source)
    flags, ending = Flag.TIME, 0
    checkpoint, random = _NO_CHECKPOINT, _NO_RANDOM
    if file is not None:
        short = packed(file)
        if short is None or short[4:10] != run:
            return None
        named = short[10:18]
        if named == _SHARED_DIGEST:
            flags |= Flag.SHARED
        elif named != key[:8]:
            return None
        flags |= Flag.FILE
        checkpoint, random, ending = short[:4], short[18:26], short[26]
    if size is not None:
        flags |= Flag.SIZE
    if mtime_ns is not None:
        flags |= Flag.MTIME
    head = HEAD.pack(
        _COMPLETED_VALUE,
        flags,
        ending,
        run,
        checkpoint,
        len(source),
        sequence,
        rows,
        size or 0,
        mtime_ns or 0,
        completed_at,
        pipeline,
        random,
    )
    return key + head + source


def decode(value: bytes) -> Record:
    """Read what :func:`encode` wrote.

    Raises:
        CheckpointError: it is anything else.
    """
    try:
        (
            state,
            flags,
            ending,
            run,
            checkpoint,
            id_bytes,
            sequence,
            rows,
            size,
            mtime_ns,
            time,
            pipeline,
            random,
        ) = HEAD.unpack_from(value)
        if flags & ~Flag.ALL or state not in _STATES:
            raise ValueError(f"it is of state {state} and has the flags {flags}")
        end = HEAD.size + id_bytes
        source, more = value[HEAD.size : end], value[end:]
        if len(source) < id_bytes or bool(more) != bool(flags & Flag.MORE):
            raise ValueError("it is cut short, or too long")
        run_id, listed, error, failed_runs, failed_at, dead_rows, dead_letters = (
            json.loads(more) if more else _NO_MORE
        )
        files: tuple[str, ...] = ()
        if flags & Flag.FILE:
            named = bytes(8) if flags & Flag.SHARED else digest_bytes(source)[:8]
            files = (unpacked(checkpoint + run + named + random + bytes((ending,))),)
        elif listed is not None:
            files = _strings(listed)
        return Record(
            source_id=source.decode("utf-8", "surrogatepass"),
            state=_STATES[state],
            sequence=sequence,
            run_id=run.hex() if run_id is None else _typed(run_id, str),
            rows=rows,
            files=files,
            error=None if error is None else _typed(error, str),
            failed_runs=_typed(failed_runs, int),
            completed_at=time if flags & Flag.TIME else None,
            fingerprint=Fingerprint(
                size if flags & Flag.SIZE else None, mtime_ns if flags & Flag.MTIME else None
            ),
            pipeline=pipeline,
            failed_at=None if failed_at is None else float(failed_at),
            dead_rows=_typed(dead_rows, int),
            dead_letters=_strings(dead_letters),
        )
    except (struct.error, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"a record cannot be read ({error})") from error


def block_of(stored: Sequence[bytes]) -> bytes:
    """Put digests that are followed by encoded records into one value, as columns.

    What is too short for a head gets one of zeros, which no record has.
    """
    end = DIGEST_BYTES + HEAD.size
    lengths = list(map(len, stored))
    if lengths and min(lengths) < end:
        none = bytes(HEAD.size)
        stored = [
            v if len(v) >= end else v[:DIGEST_BYTES] + none + v[DIGEST_BYTES:] for v in stored
        ]
        lengths = list(map(len, stored))
    return block_of_columns(
        len(stored),
        *[value[:DIGEST_BYTES] for value in stored],
        *[value[DIGEST_BYTES:end] for value in stored],
        struct.pack(f"<{len(stored)}I", *[length - end for length in lengths]),
        *[value[end:] for value in stored],
    )


def block_of_columns(count: int, *columns: bytes | bytearray) -> bytes:
    """Do as :func:`block_of`, with the columns of ``count`` records, or pieces of them in order."""
    body = b"".join(columns)
    return _BLOCK.pack(count, zlib.crc32(body)) + body


def blocks_of(stored: Sequence[bytes]) -> Iterator[bytes]:
    """Put any number of digests that are followed by encoded records into blocks."""
    for start in range(0, len(stored), RECORDS_IN_BLOCK):
        yield block_of(stored[start : start + RECORDS_IN_BLOCK])


def columns_of(block: bytes) -> tuple[memoryview, memoryview, memoryview, memoryview]:
    """Return the columns of a value that :func:`block_of` made.

    Returns:
        All digests, one after another; all heads; how many bytes behind it belong to each
        (``<u4``); and these bytes.

    Raises:
        CheckpointError: it is anything else, or was damaged.
    """
    view = memoryview(block)
    if len(view) < _BLOCK.size:
        raise CheckpointError(f"a block of records has {len(view)} bytes")
    count, check = _BLOCK.unpack_from(view)
    body = view[_BLOCK.size :]
    if zlib.crc32(body) != check or len(body) < count * (DIGEST_BYTES + HEAD.size + 4):
        raise CheckpointError("a block of records is not as it was written")
    heads = count * DIGEST_BYTES
    lengths = heads + count * HEAD.size
    tails = lengths + count * 4
    return body[:heads], body[heads:lengths], body[lengths:tails], body[tails:]


def stored_in(block: bytes) -> Iterator[bytes]:
    """Return what :func:`block_of` was given, damaged records as they are there.

    Raises:
        CheckpointError: as :func:`columns_of`.
    """
    digests, heads, lengths, tails = columns_of(block)
    end = 0
    for row, (length,) in enumerate(struct.iter_unpack("<I", lengths)):
        head = bytes(heads[row * HEAD.size : (row + 1) * HEAD.size])
        start, end = end, end + length
        digest = bytes(digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES])
        yield digest + (head if any(head) else b"") + bytes(tails[start:end])


def precedence(value: bytes) -> int:
    """Return the sequence number of an encoded record without parsing the rest of it.

    Raises:
        CheckpointError: it is too short to be one.
    """
    if len(value) < HEAD.size:
        raise CheckpointError(f"a record cannot be read (it has {len(value)} bytes)")
    sequence: int = _SEQUENCE.unpack_from(value, _SEQUENCE_AT)[0]
    return sequence


def _run_bytes(run_id: str) -> tuple[bytes, str | None]:
    """Return what the head has of a run id, and the id itself if that says too little."""
    if len(run_id) == 12:
        try:
            run = bytes.fromhex(run_id)
        except ValueError:
            return _NO_RUN, run_id
        if run.hex() == run_id:
            return run, None
    return _NO_RUN, run_id


def _is_own(file: bytes, run: bytes, odd_run: str | None, source: bytes) -> bool:
    """Say whether a file's name follows from the head of the record that lists it."""
    if odd_run is not None or file[4:10] != run:
        return False
    return not any(file[10:18]) or file[10:18] == digest_bytes(source)[:8]


def _is_shared(file: str) -> bool:
    name = OutputName.parse(file)
    return name is not None and name.is_shared


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(_typed(item, str) for item in _typed(value, list))


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} where a {kind.__name__} was expected")
    return value
