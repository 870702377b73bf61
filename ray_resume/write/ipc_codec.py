"""The codec of an Arrow IPC file, such as Feather: pyarrow does not tell it.

It stands in the message of each record batch, a FlatBuffer, as Arrow's format/Message.fbs says.
"""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa

__all__ = ["body_codec"]

_FIRST_MESSAGE = 8
_CODECS = ("lz4", "zstd")
# The positions of fields in Message, RecordBatch and BodyCompression.
_HEADER, _COMPRESSION, _CODEC = 2, 3, 0


def body_codec(file: Any) -> str | None:
    """Return what an open IPC file compresses record batches with, None if it does not."""
    file.seek(_FIRST_MESSAGE)
    message = pa.ipc.read_message(file)
    while message.type != "record batch":
        message = pa.ipc.read_message(file)
    buffer = message.metadata.to_pybytes()
    (root,) = struct.unpack_from("<I", buffer)
    batch = _target(buffer, _field(buffer, root, _HEADER))
    at = _field(buffer, batch, _COMPRESSION)
    if not at:
        return None
    codec = _field(buffer, _target(buffer, at), _CODEC)
    return _CODECS[buffer[codec] if codec else 0]


def _field(buffer: bytes, table: int, number: int) -> int:
    """Return where a field of a table is; 0 if it has its default."""
    (to_offsets,) = struct.unpack_from("<i", buffer, table)
    offsets = table - to_offsets
    (size,) = struct.unpack_from("<H", buffer, offsets)
    at = 4 + 2 * number
    if at >= size:
        return 0
    (offset,) = struct.unpack_from("<H", buffer, offsets + at)
    return table + offset if offset else 0


def _target(buffer: bytes, at: int) -> int:
    """Return where the table is that a field refers to."""
    (offset,) = struct.unpack_from("<I", buffer, at)
    return at + int(offset)
