"""The rows of a finished file with other types, which may be narrower than before. Pure.

An output's types become narrower when the source that made them wide is processed again. The other
files have the wide types by then, and values that fit into the narrow ones.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from ray_resume.core.common_types import common_type, is_left_alone
from ray_resume.core.output_schema import SchemaMismatchError, conform

__all__ = ["retype"]


def retype(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the rows of ``table`` as `output_schema.conform` does, and drop columns of nulls.

    Columns, and fields of structs, that are not in ``schema`` are dropped if they are null in all
    rows.

    Raises:
        SchemaMismatchError: a value would change.
    """
    before: dict[str, pa.ChunkedArray] = {}
    fields = []
    for one in table.schema:
        place = schema.get_field_index(one.name)
        column = table.column(one.name)
        if place >= 0:
            column = _fitted(column, schema.field(place).type)
        elif column.null_count == len(column) and not _is_extension(one):
            continue
        before[one.name] = column
        fields.append(one.with_type(column.type))
    fitted = pa.table(list(before.values()), pa.schema(fields, metadata=table.schema.metadata))
    made = conform(fitted, schema)
    for name, column in before.items():
        now = made.column(name)
        if common_type(column.type, now.type) != now.type and not _is_same(column, now):
            raise SchemaMismatchError(
                name, f"of type {column.type} cannot be made {now.type} without loss"
            )
    return made


def _is_extension(one: pa.Field) -> bool:
    # The second holds if this process has not loaded the type.
    return is_left_alone(one.type) or b"ARROW:extension:name" in (one.metadata or {})


def _fitted(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if not (pa.types.is_struct(column.type) and pa.types.is_struct(kind)):
        return column
    # A field may be null in one chunk only.
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        return whole
    return pa.chunked_array([_without_null_fields(whole, kind)])


def _without_null_fields(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Drop the fields of structs that ``kind`` does not have, if they are null everywhere."""
    if not (pa.types.is_struct(array.type) and pa.types.is_struct(kind)):
        return array
    values, fields = [], []
    for one, inner in zip(array.type, array.flatten(), strict=True):
        place = kind.get_field_index(one.name)
        if place < 0 and inner.null_count == len(inner):
            continue
        made = inner if place < 0 else _without_null_fields(inner, kind.field(place).type)
        values.append(made)
        fields.append(one.with_type(made.type))
    if not fields:
        return array
    return pa.StructArray.from_arrays(values, fields=fields, mask=array.is_null())


def _is_same(before: pa.ChunkedArray, now: pa.ChunkedArray) -> bool:
    """Say whether values are the same when they are taken back to the type that they had."""
    try:
        back = now.cast(before.type)
    except pa.ArrowException:
        return False
    if back.equals(before):
        return True
    if not pa.types.is_floating(before.type):
        return False
    # No NaN equals another.
    alike = pc.or_(pc.equal(back, before), pc.and_(pc.is_nan(back), pc.is_nan(before)))
    nulls = pc.and_(pc.is_null(back), pc.is_null(before))
    return bool(pc.all(pc.or_(pc.fill_null(alike, False), nulls)).as_py())
