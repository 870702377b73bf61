"""Which rows of a UDF call have which value of a column, and which source each value is of. Pure.

`ValueIndex` is what ``@resumable(by=...)`` stands on: a UDF returns the column with its rows, and
the value of each says which source the row comes from.

Invariant: two values that are one here are one wherever they are compared. A source of its own for
each value is made sure of (:meth:`ValueIndex.cuts`) with the same values that returned rows are
looked up by (:meth:`ValueIndex.find`). So whatever is taken for equal, a row can go to no wrong
source. A type that cannot hold each value of the input exactly is refused: it could make two
values one.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_resume.core.tokens import SourceArray

__all__ = ["ValueIndex"]

Values: TypeAlias = "pa.Array | pa.ChunkedArray"

_ABSENT = -1


class ValueIndex:
    """The values of a column in the rows of a call, each with its number.

    Args:
        name: the column's.
        values: one for each row.
        row_sources: ``int32``, shape ``(rows,)``.

    Raises:
        ValueError: the values are of a type that cannot be compared.

    Attributes:
        numbers: ``int32``, shape ``(rows,)``: the number of each row's value.
        sources: ``int32``, shape ``(values,)``: a source that has the value; below zero if none
            of the rows has it. After :meth:`cuts`, it is the only source.
    """

    __slots__ = ("_row_sources", "_values", "name", "numbers", "sources")

    def __init__(self, name: str, values: Values, row_sources: SourceArray) -> None:
        plain = _comparable(values, f"The column {name!r}")
        encoded = plain.array.dictionary_encode(null_encoding="encode")
        numbers = encoded.indices.to_numpy(zero_copy_only=False)
        self._fill(name, plain._replace(array=encoded.dictionary), numbers, row_sources)

    def _fill(
        self, name: str, values: _Plain, numbers: npt.NDArray[np.int32], row_sources: SourceArray
    ) -> None:
        self.name = name
        self.numbers = numbers
        self._values = values
        self._row_sources = row_sources
        self.sources = np.full(len(values.array), _ABSENT, dtype=np.int32)
        self.sources[numbers] = row_sources

    def at(self, rows: npt.NDArray[np.intp]) -> ValueIndex:
        """Return the index of some of the rows, by position."""
        index = ValueIndex.__new__(ValueIndex)
        index._fill(self.name, self._values, self.numbers[rows], self._row_sources[rows])
        return index

    def cuts(self) -> npt.NDArray[np.int32]:
        """Say for each row which call it goes to, such that no value in a call is of two sources.

        A call gets the rows of one number. A source that shares a value with another one has a
        number of its own; the others have 0.

        Returns:
            ``int32``, shape ``(rows,)``.
        """
        shared = np.zeros(len(self.sources), dtype=bool)
        shared[self.numbers[self.sources[self.numbers] != self._row_sources]] = True
        if not shared.any():
            return np.zeros(len(self.numbers), dtype=np.int32)
        alone = np.unique(self._row_sources[shared[self.numbers]])
        numbers = np.searchsorted(alone, self._row_sources).astype(np.int32) + 1
        return np.where(np.isin(self._row_sources, alone), numbers, np.int32(0))

    def find(self, values: Values) -> npt.NDArray[np.int32]:
        """Return the number of each value, ``int32``.

        Raises:
            ValueError: a value is not in the rows, or the values have a type that does not hold
                each value of the rows exactly.
        """
        plain = _comparable(values, f"The column {self.name!r}, as it came back,")
        known, returned = self._in_one_type(plain)
        found = pc.index_in(returned, value_set=known, skip_nulls=False)
        numbers: npt.NDArray[np.int32] = found.fill_null(_ABSENT).to_numpy(zero_copy_only=False)
        absent = np.flatnonzero((numbers < 0) | (self.sources[numbers] < 0))
        if len(absent):
            value = returned[int(absent[0])].as_py()
            raise ValueError(
                f"{len(absent)} of {len(numbers)} rows came back with a value in the column "
                f"{self.name!r} that is in no row of the call: {value!r:.200}, for one. It is "
                "not known which source such a row comes from. Return the column as it came."
            )
        return numbers

    def with_all_rows_in(self, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Say for each value whether ``mask``, which is of rows, has all of its rows."""
        within = np.ones(len(self.sources), dtype=bool)
        within[self.numbers[~mask]] = False
        return within

    def has_trailing_nul(self) -> bool:
        """Say whether a text, or bytes, among the values ends with a NUL."""
        if self._values.kind not in ("text", "bytes"):
            return False
        ends = pc.ends_with(self._values.array, "\0" if self._values.kind == "text" else b"\0")
        return bool(pc.any(ends, min_count=0).as_py())

    def _in_one_type(self, returned: _Plain) -> tuple[pa.Array, pa.Array]:
        """Return the known values and those ``returned``, converted to one type without loss."""
        known = self._values.array
        if returned.kind == "null" or returned.array.type == known.type:
            return known, returned.array.cast(known.type)
        if self._values.kind == "null":
            return known.cast(returned.array.type), returned.array
        kinds = {self._values.kind, returned.kind}
        with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
            if kinds == {"decimal"}:
                wider = max(known.type, returned.array.type, key=lambda kind: kind.scale)
                return known.cast(wider), returned.array.cast(wider)
            if len(kinds) == 1 or kinds in ({"integer", "float"}, {"date", "timestamp"}):
                converted = known.cast(returned.array.type)
                if converted.cast(known.type).equals(known):
                    return converted, returned.array
        raise ValueError(
            f"The column {self.name!r} came back as {returned.given}, which does not hold "
            f"each of its values exactly: they went in as {self._values.given}. Return it as it "
            "came."
        )


class _Plain(NamedTuple):
    """Values in a type that Arrow compares, what kind of values they are, and the type they had."""

    kind: str
    array: pa.Array
    given: pa.DataType


def _comparable(values: Values, subject: str) -> _Plain:
    """Convert values such that equal ones are one to Arrow; NaN becomes null.

    Raises:
        ValueError: they cannot be compared.
    """
    kind, target = _kind_of(values.type, subject)
    try:
        array = _converted(values, target)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{subject} has values that cannot be compared: {error}") from error
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if kind == "float":
        # Zero is zero: Arrow keeps its signs apart.
        array = pc.if_else(pc.is_nan(array), None, pc.add(array, pa.scalar(0.0, array.type)))
    return _Plain(kind, array, values.type)


def _converted(values: Values, target: pa.DataType) -> Values:
    if isinstance(values.type, pa.BaseExtensionType):
        values = values.cast(values.type.storage_type)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values if values.type == target else values.cast(target)


def _kind_of(given: pa.DataType, subject: str) -> tuple[str, pa.DataType]:
    """Return the kind of a type's values, and the type to compare them in."""
    kind = given
    if isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.uuid":
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    types = pa.types
    if types.is_null(kind):
        return "null", kind
    if types.is_boolean(kind):
        return "boolean", kind
    if types.is_integer(kind):
        return "integer", kind
    if types.is_floating(kind):
        return "float", pa.float32() if types.is_float16(kind) else kind
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text", pa.large_string()
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return "bytes", pa.large_binary()
    if types.is_fixed_size_binary(kind):
        return "bytes", pa.large_binary()
    if types.is_decimal(kind):
        return "decimal", pa.decimal256(76, kind.scale)
    if types.is_timestamp(kind):
        zoned = kind.tz is not None
        return ("instant", pa.timestamp(kind.unit, "UTC")) if zoned else ("timestamp", kind)
    if types.is_date(kind):
        return "date", pa.date32()
    if types.is_time(kind):
        return "time", kind
    if types.is_duration(kind):
        return "duration", kind
    raise ValueError(
        f"{subject} is of type {given}, whose values cannot be compared. by= needs a column of "
        "texts, numbers, bytes, booleans or times: an id, a path, a URL."
    )
