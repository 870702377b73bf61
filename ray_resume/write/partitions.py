"""Partition columns: which rows go into which subfolder, and how it is called.

Folders have the names that plain Ray Data gives them, whose writer is Arrow's. Without I/O.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_resume.errors import ResumeError
from ray_resume.raydata import blocks

__all__ = ["checked_columns", "partitions_of"]

_NULL = "__HIVE_DEFAULT_PARTITION__"

# The codes of a table's rows stay below this, so that two columns' codes fit into an int64.
_MAX_CODES = 1 << 31


def checked_columns(columns: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of partition columns, as ``partition_cols`` gave them.

    Raises:
        TypeError: it is no list of names.
        ValueError: a name comes twice, or cannot be part of a folder's name.
    """
    if isinstance(columns, str):
        raise TypeError(f"partition_cols must be a list of names: [{columns!r}], not {columns!r}")
    names = tuple(columns or ())
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"partition_cols must be a list of names, and {name!r} is none")
        if names.count(name) > 1:
            raise ValueError(f"partition_cols names {name!r} twice")
        if not name or "/" in name:
            raise ValueError(
                f"partition_cols names {name!r}, which cannot be part of a folder's name. Rename "
                "the column."
            )
    return names


Rows = slice | npt.NDArray[np.intp]


def partitions_of(table: pa.Table, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table, Rows]]:
    """Yield the subfolder of each partition, its rows without ``columns``, and which rows they are.

    Rows keep their order within a partition. A subfolder is ``""`` or ends with ``/``. Values that
    differ (``-0.0`` and ``0.0``, too) have partitions of their own, all NaNs of a column share one,
    and so do all nulls.

    Raises:
        ResumeError: a column is missing, its type cannot name folders, or no other column is left.
    """
    if not columns:
        yield "", table, slice(None)
        return
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise ResumeError(
            f"partition_cols names {missing[0]!r}, and the rows have the columns "
            f"{', '.join(table.column_names)}."
        )
    rest = table.drop_columns(list(columns))
    if not rest.num_columns:
        raise ResumeError(
            f"partition_cols names every column ({', '.join(columns)}). Files without columns hold "
            "no rows. Leave out one, or add a column."
        )
    if not table.num_rows:
        return
    keys = [_decoded(table.column(name), name) for name in columns]
    codes = functools.reduce(_combined, map(_codes, keys))
    order = None
    if (codes[1:] < codes[:-1]).any():
        # The fewer bytes, the quicker numpy sorts.
        small = codes.astype(np.min_scalar_type(int(codes.max())))
        order = np.argsort(small, kind="stable")
        codes = codes[order]
    starts = np.flatnonzero(np.append(True, codes[1:] != codes[:-1])).tolist()
    for start, stop in zip(starts, [*starts[1:], len(codes)], strict=True):
        first = start if order is None else int(order[start])
        part = (
            rest.slice(start, stop - start)
            if order is None
            else blocks.take(rest, order[start:stop])
        )
        rows = slice(start, stop) if order is None else order[start:stop]
        yield _folder(columns, [key[first] for key in keys]), part, rows


def _decoded(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Return the column with values instead of references to them."""
    kind = column.type
    if isinstance(kind, pa.DictionaryType):
        column = column.cast(kind.value_type)
        kind = column.type
    if kind in (pa.string_view(), pa.binary_view()):
        wide = pa.large_string() if kind == pa.string_view() else pa.large_binary()
        try:
            column = column.cast(wide)
        except pa.ArrowNotImplementedError:
            column = pa.chunked_array([pa.array(column.to_pylist(), wide)])
    elif (
        pa.types.is_nested(kind)
        or pa.types.is_run_end_encoded(kind)
        or isinstance(kind, pa.BaseExtensionType)
    ):
        raise ResumeError(
            f"partition_cols names {name!r}, and values of its type, {kind}, cannot name folders. "
            "Make a column of text, numbers or times of it."
        )
    return column


def _codes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Return a number for each row, equal where the values are."""
    try:
        encoded = pc.dictionary_encode(column)
    except pa.ArrowNotImplementedError:
        # Older versions cannot encode every type.
        texts = [None if value is None else repr(value) for value in column.to_pylist()]
        encoded = pc.dictionary_encode(pa.chunked_array([texts], pa.string()))
    # All chunks have the same dictionary, and a null has no index.
    parts = [np.asarray(chunk.indices.fill_null(-1)) for chunk in encoded.chunks]
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64) + 1


def _combined(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    if int(left.max()) * (int(right.max()) + 1) >= _MAX_CODES:
        left = np.unique(left, return_inverse=True)[1]
    return left * (int(right.max()) + 1) + right


def _folder(names: Sequence[str], values: Sequence[pa.Scalar]) -> str:
    return "".join(
        f"{name}={_formatted(value) if value.is_valid else _NULL}/"
        for name, value in zip(names, values, strict=True)
    )


def _formatted(value: pa.Scalar) -> str:
    """Format a value as Arrow does in the name of a folder."""
    kind = value.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return quote(value.as_py(), safe="")
    if pa.types.is_fixed_size_binary(kind):
        return quote(value.as_py(), safe="")
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        value = value.cast(pa.timestamp(kind.unit, "UTC"))
    elif pa.types.is_float16(kind):
        value = pa.scalar(float(value.as_py()), pa.float32())
    return quote(value.cast(pa.string()).as_py(), safe="")
