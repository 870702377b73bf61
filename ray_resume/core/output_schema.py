"""The schema that all files of an output have: how it is agreed on, and rows that conform. Pure.

Each source's rows come with types of their own: a column that is null in all rows of a source has
type ``null``, integers may be narrower, a struct may lack a field. Readers of a folder take the
types of one file for those of all, and fail. So a run agrees on one schema as it goes on. It only
ever widens, and only to types that hold every value: ``null`` becomes any type, integers and
decimals become wider, integers beside floats become ``float64`` (where a value would not survive
that, its rows are refused), times get the finer unit, structs get all fields.

Columns of extension types, such as Ray's tensors, stay as they are: their shapes differ from source
to source, and plain Ray Data writes them so.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ray_resume.errors import ResumeError

__all__ = ["OutputSchema", "SchemaMismatchError", "conform", "is_agreeable", "unifiable"]

_SIGNED = (pa.int8(), pa.int16(), pa.int32(), pa.int64())
_UNSIGNED = (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
_UNITS = ("s", "ms", "us", "ns")


class SchemaMismatchError(ResumeError):
    """Rows do not conform to a schema; ``column`` is the first that does not."""

    def __init__(self, column: str, problem: str) -> None:
        super().__init__(f"column {column!r} {problem}")
        self.column = column


@dataclass(frozen=True)
class OutputSchema:
    """The types on which the sinks of all runs have agreed.

    Args:
        schema: without metadata, and without columns of extension types.
        origins: by column, the id of the source that gave the column its type.
        stale: whether there may be files that were written before the schema became this one.
        given: whether the user gave the schema: then nothing widens it.
    """

    schema: pa.Schema
    origins: Mapping[str, str] = field(default_factory=dict)
    stale: bool = False
    given: bool = False

    def widened(self, schema: pa.Schema, source_id: str) -> OutputSchema:
        """Return what holds ``schema``, the rows of ``source_id``, as well; itself if it does.

        Raises:
            SchemaMismatchError: no type of a column holds the values of both without loss.
        """
        fields = {one.name: one.type for one in self.schema}
        origins = dict(self.origins)
        for one in schema:
            if _is_left_alone(one.type):
                continue
            known = fields.get(one.name)
            kind = one.type if known is None else _common(known, one.type)
            if kind is None:
                raise SchemaMismatchError(
                    one.name,
                    f"has type {known} in the output of {origins.get(one.name, 'another run')}, "
                    f"and type {one.type} in that of {source_id}, and no type holds the values of "
                    "both. Have the UDFs return one type for it, or pass schema= to "
                    "resumable_write to have rows cast.",
                )
            if kind != known:
                fields[one.name] = kind
                # If two sources made a type together, the first one is still named.
                if known is None or pa.types.is_null(known):
                    origins[one.name] = source_id
        wider = pa.schema(list(fields.items()))
        if wider.equals(self.schema):
            return self
        return OutputSchema(wider, origins, stale=self.stale or len(self.schema) > 0)

    def merged(self, other: OutputSchema) -> OutputSchema:
        """Return what holds both; stale unless both are the same and neither is.

        Raises:
            SchemaMismatchError: as :meth:`widened`.
        """
        if self.given or other.given:
            # The one that was given last is not known; the sink of the next run says it again.
            chosen = self if self.given else other
            return OutputSchema(chosen.schema, chosen.origins, stale=True, given=True)
        both = self
        for one in other.schema:
            source_id = other.origins.get(one.name, "another run")
            both = both.widened(pa.schema([one]), source_id)
        same = both.schema.equals(self.schema) and both.schema.equals(other.schema)
        return OutputSchema(both.schema, both.origins, stale=self.stale or other.stale or not same)

    def to_bytes(self) -> bytes:
        """Encode for a checkpoint: plain data only."""
        schema = base64.b64encode(self.schema.serialize().to_pybytes()).decode()
        return json.dumps(
            {
                "schema": schema,
                "origins": dict(self.origins),
                "stale": self.stale,
                "given": self.given,
            }
        ).encode("utf-8", "surrogatepass")

    @classmethod
    def from_bytes(cls, data: bytes) -> OutputSchema:
        """Decode what :meth:`to_bytes` made.

        Raises:
            ValueError: it is anything else.
        """
        try:
            content = json.loads(data.decode("utf-8", "surrogatepass"))
            schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(content["schema"])))
            return cls(
                schema,
                {str(column): str(source) for column, source in content["origins"].items()},
                stale=content["stale"] is True,
                given=content["given"] is True,
            )
        except (KeyError, TypeError, AttributeError, pa.ArrowException, OSError) as error:
            raise ValueError(f"it is no output schema ({error})") from error


def is_agreeable(schema: pa.Schema) -> bool:
    """Say whether a schema can be agreed on: not if two columns have one name."""
    return len(set(schema.names)) == len(schema.names)


def unifiable(schema: pa.Schema) -> pa.Schema:
    """Return the columns of ``schema`` that can be agreed on, without metadata.

    Columns of extension types are left out here, where their types are known. A process that has
    not loaded those types decodes them as what they are stored as.
    """
    return pa.schema([one for one in schema if not _is_left_alone(one.type)])


def conform(table: pa.Table, schema: pa.Schema, *, exactly: bool = False) -> pa.Table:
    """Return the rows of ``table`` with the columns of ``schema``, in its order and types.

    Columns that are missing are null. Columns of extension types that ``schema`` does not have
    stay as they are, and where they are if the others are in order.

    Args:
        exactly: a column that is missing, or is not in ``schema``, is an error, and metadata are
            those of ``schema`` alone. By default the table's stay where ``schema`` has none.

    Raises:
        SchemaMismatchError: a value would change, or a column cannot be cast.
    """
    if table.schema.equals(schema, check_metadata=exactly or schema.metadata is not None):
        return table
    present = set(table.column_names)
    columns, fields = [], []
    for one in schema:
        if one.name not in present:
            if exactly:
                raise SchemaMismatchError(one.name, "is in the schema, and not in the rows")
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, one.type)], one.type))
        else:
            columns.append(_cast_column(table.column(one.name), one.type, one.name))
        if not one.nullable and columns[-1].null_count:
            raise SchemaMismatchError(one.name, "is not nullable in the schema, and null in a row")
        fields.append(one)
    known = set(schema.names)
    for one in table.schema:
        if one.name in known:
            continue
        if exactly or not (_is_left_alone(one.type) or _is_stored_extension(one)):
            raise SchemaMismatchError(one.name, "is in the rows, and not in the schema")
        columns.append(table.column(one.name))
        fields.append(one)
    metadata = schema.metadata
    if metadata is None and not exactly:
        metadata = table.schema.metadata
    made = pa.table(columns, pa.schema(fields, metadata=metadata))
    in_order = [name for name in table.column_names if name in known] == schema.names
    return made.select(table.column_names) if in_order else made


def _cast_column(column: pa.ChunkedArray, kind: pa.DataType, name: str) -> pa.ChunkedArray:
    if column.type == kind:
        return column
    try:
        return pa.chunked_array([_converted(chunk, kind) for chunk in column.chunks], kind)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise SchemaMismatchError(
            name, f"of type {column.type} cannot be made {kind} without loss: {error}"
        ) from error


def _converted(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Cast as Arrow does where nothing is lost, and add fields to structs."""
    if array.type == kind:
        return array
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), kind)
    if pa.types.is_struct(kind) and pa.types.is_struct(array.type):
        values = dict(zip((one.name for one in array.type), array.flatten(), strict=True))
        lost = [name for name in values if kind.get_field_index(name) < 0]
        if lost:
            raise ValueError(f"field {lost[0]!r} would be lost")
        children = [
            _converted(values[one.name], one.type)
            if one.name in values
            else pa.nulls(len(array), one.type)
            for one in kind
        ]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())
    if pa.types.is_nested(kind):
        inner = _lost_field(array.type, kind)
        if inner is not None:
            raise ValueError(f"field {inner!r} would be lost")
    try:
        return array.cast(kind)
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError):
        # Seldom, and slow: older versions cannot cast what is inside of some lists and maps.
        return _made_again(array, kind)


def _made_again(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Make an array of the same Python values; Arrow itself would cut off what does not fit."""
    values = array.to_pylist()
    made = pa.array(values, kind)
    if not _is_same(values, made.to_pylist()):
        raise ValueError("a value would change")
    return made


def _is_same(one: Any, made: Any) -> bool:
    """Compare Python values; structs may have got fields, which are null."""
    if isinstance(one, dict) and isinstance(made, dict):
        return all(_is_same(one.get(name), value) for name, value in made.items())
    if isinstance(one, (list, tuple)) and isinstance(made, (list, tuple)):
        return len(one) == len(made) and all(map(_is_same, one, made))
    return bool(one == made or (one != one and made != made))


def _lost_field(one: pa.DataType, kind: pa.DataType) -> str | None:
    """Return the first field of a struct, however deep in ``one``, that ``kind`` does not have."""
    if pa.types.is_struct(one) and pa.types.is_struct(kind):
        for each in one:
            at = kind.get_field_index(each.name)
            lost = str(each.name) if at < 0 else _lost_field(each.type, kind.field(at).type)
            if lost is not None:
                return lost
    elif one.num_fields == kind.num_fields:
        # The fields inside of lists and maps are compared by position, since names differ.

        inside = ((one.field(i).type, kind.field(i).type) for i in range(one.num_fields))
        return next((lost for a, b in inside if (lost := _lost_field(a, b)) is not None), None)
    return None


def _is_stored_extension(one: pa.Field) -> bool:
    """Say whether a column has an extension type, which this process has not loaded."""
    inside = (one.type.field(i) for i in range(one.type.num_fields))
    return b"ARROW:extension:name" in (one.metadata or {}) or any(map(_is_stored_extension, inside))


def _is_left_alone(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return True
    if isinstance(kind, pa.DictionaryType):
        return _is_left_alone(kind.value_type)
    return any(_is_left_alone(kind.field(i).type) for i in range(kind.num_fields))


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return the narrowest type that holds the values of both, None if there is none."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if isinstance(one, pa.DictionaryType) or isinstance(other, pa.DictionaryType):
        return _common(_plain(one), _plain(other))
    for common in (_number, _text, _time, _nested):
        kind = common(one, other)
        if kind is not None:
            return kind
    return None


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if isinstance(kind, pa.DictionaryType) else kind


def _number(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    kinds = (one, other)
    if all(map(pa.types.is_integer, kinds)):
        return _integer(one, other)
    if all(map(pa.types.is_floating, kinds)):
        return max(kinds, key=lambda kind: kind.bit_width)
    if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds):
        return pa.float64()
    if all(map(pa.types.is_decimal, kinds)):
        scale = max(one.scale, other.scale)
        precision = scale + max(one.precision - one.scale, other.precision - other.scale)
        if precision <= 38:
            return pa.decimal128(precision, scale)
        return pa.decimal256(precision, scale) if precision <= 76 else None
    return None


def _integer(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    widest = max(one.bit_width, other.bit_width)
    if one in _SIGNED and other in _SIGNED:
        return next(kind for kind in _SIGNED if kind.bit_width == widest)
    if one in _UNSIGNED and other in _UNSIGNED:
        return next(kind for kind in _UNSIGNED if kind.bit_width == widest)
    signed, unsigned = (one, other) if one in _SIGNED else (other, one)
    needed = max(signed.bit_width, 2 * unsigned.bit_width)
    return next((kind for kind in _SIGNED if kind.bit_width >= needed), None)


def _text(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    for kinds, large in (
        ((pa.string(), pa.large_string(), pa.string_view()), pa.large_string()),
        ((pa.binary(), pa.large_binary(), pa.binary_view()), pa.large_binary()),
    ):
        if one in kinds and other in kinds:
            return large if large in (one, other) else kinds[0]
    return None


def _time(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if pa.types.is_timestamp(one) and pa.types.is_timestamp(other):
        return pa.timestamp(_finer(one, other), one.tz) if one.tz == other.tz else None
    if pa.types.is_duration(one) and pa.types.is_duration(other):
        return pa.duration(_finer(one, other))
    if pa.types.is_time(one) and pa.types.is_time(other):
        unit = _finer(one, other)
        return pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)
    return None


def _finer(one: pa.DataType, other: pa.DataType) -> str:
    return max(str(one.unit), str(other.unit), key=_UNITS.index)


def _nested(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        return _struct(list(one), list(other))
    if pa.types.is_map(one) and pa.types.is_map(other):
        key, item = _common(one.key_type, other.key_type), _common(one.item_type, other.item_type)
        return None if key is None or item is None else pa.map_(key, item)
    if _is_list(one) and _is_list(other):
        value = _common(one.value_type, other.value_type)
        if value is None:
            return None
        if pa.types.is_large_list(one) or pa.types.is_large_list(other):
            return pa.large_list(value)
        sizes = {getattr(kind, "list_size", None) for kind in (one, other)}
        size = sizes.pop() if len(sizes) == 1 else None
        return pa.list_(value) if size is None else pa.list_(value, size)
    return None


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _struct(one: Sequence[pa.Field], other: Sequence[pa.Field]) -> pa.DataType | None:
    fields: dict[str, pa.DataType] = {}
    for each in itertools.chain(one, other):
        known = fields.get(each.name)
        kind = each.type if known is None else _common(known, each.type)
        if kind is None:
            return None
        fields[each.name] = kind
    return pa.struct(list(fields.items()))
