"""What is kept of one source: the record, and how it is spelt in bytes.

Owns the value format of the store. Plain data only: nothing here is unpickled or evaluated.
"""

from __future__ import annotations

import enum
import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any

from ray_resume.errors import CheckpointError

__all__ = [
    "Fingerprint",
    "Record",
    "State",
    "decode",
    "digest",
    "encode",
    "is_completed",
    "precedence",
]


class State(enum.Enum):
    """What a record says of its source. ``RESET`` means: as if it had never been read."""

    COMPLETED = 1
    FAILED = 2
    QUARANTINED = 3
    RESET = 4


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
    signature: str = ""
    failed_at: float | None = None
    dead_rows: int = 0
    dead_letters: tuple[str, ...] = ()


def digest(source_id: str) -> bytes:
    """Return the 16-byte key of a source: paths are longer than an LMDB key may be."""
    return hashlib.blake2b(source_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


# The two fields that decide between records stand in front, so that a union of millions of
# records can be made without parsing them.
_HEAD = struct.Struct("<BQ")

_FIRST_FIELDS = 10
_LATER: list[Any] = [None, 0, []]  # failed_at, dead_rows, dead_letters


def encode(record: Record) -> bytes:
    """Spell ``record`` as a fixed head (state, sequence) and a JSON array."""
    body = [
        record.source_id,
        record.run_id,
        record.rows,
        list(record.files),
        record.error,
        record.failed_runs,
        record.completed_at,
        record.fingerprint.size,
        record.fingerprint.mtime_ns,
        record.signature,
        record.failed_at,
        record.dead_rows,
        list(record.dead_letters),
    ]
    # Not as \u escapes: two lone surrogates side by side would come back as one character.
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
    return _HEAD.pack(record.state.value, record.sequence) + text.encode("utf-8", "surrogatepass")


def decode(value: bytes) -> Record:
    """Read what :func:`encode` wrote.

    Raises:
        CheckpointError: it is anything else.
    """
    try:
        state, sequence = _HEAD.unpack_from(value)
        values = json.loads(value[_HEAD.size :])
        # Fields that came later stand at the end, and may not be there.
        values += _LATER[len(values) - _FIRST_FIELDS :] if len(values) >= _FIRST_FIELDS else []
        (
            source_id,
            run_id,
            rows,
            files,
            error,
            failed,
            completed_at,
            size,
            mtime_ns,
            signature,
            failed_at,
            dead_rows,
            dead_letters,
        ) = values
        return Record(
            source_id=_typed(source_id, str),
            state=State(state),
            sequence=sequence,
            run_id=_typed(run_id, str),
            rows=_typed(rows, int),
            files=_strings(files),
            error=None if error is None else _typed(error, str),
            failed_runs=_typed(failed, int),
            completed_at=_time(completed_at),
            fingerprint=Fingerprint(
                None if size is None else _typed(size, int),
                None if mtime_ns is None else _typed(mtime_ns, int),
            ),
            signature=_typed(signature, str),
            failed_at=_time(failed_at),
            dead_rows=_typed(dead_rows, int),
            dead_letters=_strings(dead_letters),
        )
    except (struct.error, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"a record cannot be read ({error})") from error


def precedence(value: bytes) -> int:
    """Return the sequence number of an encoded record without parsing the rest of it.

    Raises:
        CheckpointError: it is too short to be one.
    """
    try:
        sequence: int = _HEAD.unpack_from(value)[1]
    except struct.error as error:
        raise CheckpointError(f"a record cannot be read ({error})") from error
    return sequence


def is_completed(value: bytes) -> bool:
    """Say whether an encoded record is of a completed source, without parsing the rest of it."""
    return value[:1] == bytes([State.COMPLETED.value])


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(_typed(item, str) for item in _typed(value, list))


def _time(value: Any) -> float | None:
    return None if value is None else float(value)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} where a {kind.__name__} was expected")
    return value
