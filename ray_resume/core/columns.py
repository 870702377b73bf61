"""Arrow columns from Python's and numpy's values, and back.

`pyarrow.array` and `Array.to_numpy` import pandas, which takes longer than to read a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = [
    "bytes_of",
    "counts",
    "fixed",
    "fixed_bytes",
    "lengths_of",
    "lists",
    "mask_of",
    "numbers",
    "numbers_of",
    "parents_of",
    "text_of",
    "texts",
    "times",
    "valid",
]

TEXT = pa.binary()
"""Texts are binary: ids, and names of files, may hold what is no valid UTF-8 (lone surrogates)."""

TEXTS = pa.list_(pa.field("item", TEXT, nullable=False))

COUNTS = pa.list_(pa.field("item", pa.int64(), nullable=False))


TIME = pa.timestamp("us", "UTC")

_MAX_SECONDS = 1e11


def bytes_of(text: str) -> bytes:
    """Return what a column of texts holds for ``text``."""
    return text.encode("utf-8", "surrogatepass")


def text_of(value: bytes) -> str:
    """Return the text that a column of texts holds as ``value``.

    Raises:
        UnicodeDecodeError: it is none.
    """
    return value.decode("utf-8", "surrogatepass")


# To Arrow -----------------------------------------------------------------------------------------


def numbers(values: Sequence[float | None] | npt.NDArray[Any], kind: str) -> pa.Array:
    """Make a column of numbers; ``kind`` is what numpy calls their type.

    Raises:
        OverflowError: one has no room.
    """
    validity = None
    if isinstance(values, list) and None in values:
        validity = _bits([value is not None for value in values])
        values = [0 if value is None else value for value in values]
    if kind == "u8" and not isinstance(values, np.ndarray) and min(values, default=0) < 0:
        raise OverflowError("a number below 0 where none can be")  # numpy 1 only warns of it.
    column = np.asarray(values, kind)
    buffers = [validity, pa.py_buffer(column)]
    return pa.Array.from_buffers(pa.from_numpy_dtype(column.dtype), len(column), buffers)


def fixed(values: Sequence[bytes], size: int) -> pa.Array:
    """Make a column of values of ``size`` bytes each.

    Raises:
        ValueError: one has another size.
    """
    data = b"".join(values)
    if not all(len(value) == size for value in values):
        raise ValueError(f"a value has not {size} bytes")
    return pa.Array.from_buffers(pa.binary(size), len(values), [None, pa.py_buffer(data)])


def texts(values: Sequence[bytes | None]) -> pa.Array:
    """Make a column of texts, None among them perhaps."""
    validity = None
    if None in values:
        validity = _bits([value is not None for value in values])
        values = [value or b"" for value in values]
    data = b"".join(values)  # type: ignore[arg-type]
    return pa.Array.from_buffers(
        TEXT, len(values), [validity, _offsets(values), pa.py_buffer(data)]
    )


def lists(values: Sequence[Sequence[str]]) -> pa.Array:
    """Make a column of lists of texts."""
    items = texts([bytes_of(text) for value in values for text in value])
    buffers = [None, _offsets(values)]
    return pa.Array.from_buffers(TEXTS, len(values), buffers, children=[items])


def counts(values: Sequence[Sequence[int]]) -> pa.Array:
    """Make a column of lists of numbers."""
    items = numbers([number for value in values for number in value], "i8")
    buffers = [None, _offsets(values)]
    return pa.Array.from_buffers(COUNTS, len(values), buffers, children=[items])


def times(seconds: npt.NDArray[np.float64]) -> pa.Array:
    """Make a column of times of seconds since 1970, unknown where they are NaN or too many."""
    known = np.abs(seconds) < _MAX_SECONDS
    micros = np.rint(np.where(known, seconds, 0) * 1e6).astype(np.int64)
    validity = None if known.all() else pa.py_buffer(np.packbits(known, bitorder="little"))
    return pa.Array.from_buffers(TIME, len(micros), [validity, pa.py_buffer(micros)])


# From Arrow ---------------------------------------------------------------------------------------


def numbers_of(column: pa.Array, kind: str, unknown: float = 0) -> npt.NDArray[Any]:
    """Return a copy of a column of numbers, with ``unknown`` where there is none."""
    # A buffer may be longer than its numbers, by less than one of them, too.
    stop = column.offset + len(column)
    found: npt.NDArray[Any] = np.frombuffer(column.buffers()[1] or b"", kind, stop)
    found = found[column.offset :].copy()
    if column.null_count:
        found[~valid(column)] = unknown
    return found


def fixed_bytes(column: pa.Array) -> memoryview:
    """Return the values of a column of values of one size, one after another."""
    size = column.type.byte_width
    data = memoryview(column.buffers()[1] or b"")
    return data[column.offset * size : (column.offset + len(column)) * size]


def valid(column: pa.Array) -> npt.NDArray[np.bool_]:
    """Say of each value of a column whether it is there."""
    if not column.null_count:
        return np.ones(len(column), bool)
    return _booleans(column.buffers()[0], column)


def mask_of(column: pa.Array) -> npt.NDArray[np.bool_]:
    """Return a column of booleans, all of which are there."""
    return _booleans(column.buffers()[1], column)


def parents_of(column: pa.Array) -> npt.NDArray[np.int64]:
    """Return for each item of a column of lists (see `flatten`) in which row its list is."""
    parents: npt.NDArray[np.int64] = np.repeat(np.arange(len(column)), lengths_of(column))
    return parents


def lengths_of(column: pa.Array) -> npt.NDArray[np.int32]:
    """Return the length of each value of a column of texts or lists."""
    if not len(column):
        return np.empty(0, np.int32)
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset :][: len(column) + 1]
    return np.diff(offsets)


def _booleans(bits: pa.Buffer | None, column: pa.Array) -> npt.NDArray[np.bool_]:
    every = np.unpackbits(np.frombuffer(bits or b"", np.uint8), bitorder="little")
    return every[column.offset : column.offset + len(column)].astype(bool)


def _bits(mask: Sequence[bool]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(np.array(mask, bool), bitorder="little"))


def _offsets(values: Sequence[Any]) -> pa.Buffer:
    """Return where each value starts, and the last one ends.

    Raises:
        OverflowError: they are too many, or too long.
    """
    ends = np.zeros(len(values) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, values), np.int64, len(values)), out=ends[1:])
    if ends[-1] > np.iinfo(np.int32).max:
        raise OverflowError(f"{ends[-1]} bytes are too many for one block of records")
    return pa.py_buffer(ends.astype(np.int32))
