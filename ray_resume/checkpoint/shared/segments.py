"""Segments: the immutable pieces in which a run's records are published; and which of them count.

A run numbers its segments from 1. An *incremental* segment (``<number>.part``) has the records of
one commit. A *full* one (``<number>.whole``) has all of the run's records up to its number, so that
the run can remove the segments before it. Number 1 has the run's header and no records, so that a
run is known before it writes any row.

A *fence* says up to which number the segments of a run count. The run itself puts it up when it
ends, or else a successor that has found the run dead does, before any run relies on the segments.
A segment that the run still publishes later has a higher number, and does not count. If there are
several fences, the lowest holds.

Pure: bytes and names, no storage.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray_resume.errors import CheckpointError

__all__ = [
    "Segment",
    "counted_segments",
    "decode",
    "encode",
    "fence_name",
    "full_name",
    "incremental_name",
    "is_fence",
    "last_number",
]

_MAGIC = b"ray-resume segment\n"
_FORMAT_VERSION = 3
_LENGTHS = struct.Struct("<IQ")  # of the header, in bytes; of the blocks, in number
_LENGTH_BYTES = 8
_CHECKSUM_BYTES = 16

_SEGMENT = re.compile(r"([0-9]{9})\.(part|whole)")
_FENCE = re.compile(r"fence-[0-9a-f]{12}-([0-9]{9})")


def incremental_name(number: int) -> str:
    """Name the segment that has the records of one commit."""
    return f"{number:09d}.part"


def full_name(number: int) -> str:
    """Name the segment that has all records up to this one."""
    return f"{number:09d}.whole"


def fence_name(by: str, last: int) -> str:
    """Name the fence of run ``by``, with ``last`` as the last segment that counts."""
    return f"fence-{by}-{last:09d}"


def is_fence(name: str) -> bool:
    """Return whether ``name`` is that of a fence."""
    return _FENCE.fullmatch(name) is not None


def last_number(names: Iterable[str]) -> int:
    """Return the highest number of the segments among ``names``, 0 if there is none."""
    numbers = (int(match[1]) for name in names if (match := _SEGMENT.fullmatch(name)))
    return max(numbers, default=0)


def counted_segments(names: Collection[str]) -> list[str]:
    """Return the segments that hold all records of a run that count, in their order.

    Args:
        names: all segments and fences of the run.

    Raises:
        CheckpointError: a segment is missing.
    """
    fences = [int(match[1]) for name in names if (match := _FENCE.fullmatch(name))]
    limit = min(fences, default=None)
    found: list[Segment] = []
    for name in names:
        if match := _SEGMENT.fullmatch(name):
            segment = Segment(int(match[1]), match[2] == "whole", name)
            if limit is None or segment.number <= limit:
                found.append(segment)
    found.sort()
    start = max((i for i, segment in enumerate(found) if segment.is_full), default=0)
    counted = found[start:]
    if not counted:
        if limit:
            raise CheckpointError(f"segment {limit} is missing")
        return []
    first = counted[0].number if counted[0].is_full else 1
    expected = range(first, first + len(counted))
    missing = set(expected) - {segment.number for segment in counted}
    if missing:
        raise CheckpointError(f"segment {min(missing)} is missing")
    if limit is not None and counted[-1].number < limit:
        raise CheckpointError(f"segment {limit} is missing")
    return [segment.name for segment in counted]


@dataclass(frozen=True, order=True)
class Segment:
    """One segment by its name."""

    number: int
    is_full: bool
    name: str


def encode(header: Mapping[str, Any], blocks: Iterable[bytes]) -> bytes:
    """Encode a header, plain JSON data, and blocks of records (see `records.encode`)."""
    every = list(blocks)
    text = json.dumps({**header, "segment_format": _FORMAT_VERSION}).encode()
    body = b"".join(
        [
            _MAGIC,
            _LENGTHS.pack(len(text), len(every)),
            text,
            struct.pack(f"<{len(every)}Q", *map(len, every)),
            *every,
        ]
    )
    return body + _checksum(body)


def decode(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Decode a segment that :func:`encode` made.

    Raises:
        CheckpointError: ``data`` is anything else, or of another format.
    """
    if not data.startswith(_MAGIC):
        raise CheckpointError("it is not one of ray_resume's")
    body = memoryview(data)[:-_CHECKSUM_BYTES]
    if len(data) < len(_MAGIC) + _CHECKSUM_BYTES or _checksum(body) != data[-_CHECKSUM_BYTES:]:
        raise CheckpointError("it is damaged: its checksum is wrong")
    try:
        header_bytes, count = _LENGTHS.unpack_from(body, len(_MAGIC))
        start = len(_MAGIC) + _LENGTHS.size
        header = json.loads(bytes(body[start : start + header_bytes]))
        version = header.pop("segment_format")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise CheckpointError(f"its header cannot be read ({error!r})") from error
    if version != _FORMAT_VERSION:
        way_out = (
            "a version before the first release made it. Go on with that version, or start over"
            if type(version) is int and version < _FORMAT_VERSION
            else "upgrade it"
        )
        raise CheckpointError(
            f"it has format {version}, and this ray_resume reads format {_FORMAT_VERSION}; "
            + way_out
        )
    lengths_at = start + header_bytes
    blocks_at = lengths_at + count * _LENGTH_BYTES
    if blocks_at > len(body):
        raise CheckpointError("it is damaged: records are missing")
    lengths = struct.unpack(f"<{count}Q", body[lengths_at:blocks_at])
    ends = list(itertools.accumulate(lengths, initial=blocks_at))
    if ends[-1] != len(body):
        raise CheckpointError("it is damaged: its records have other lengths")
    return header, [data[start:end] for start, end in itertools.pairwise(ends)]


def _checksum(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES).digest()
