"""The schema that all files of an output have: how it is agreed on, and rows that conform. Pure.

Each source's rows come with types of their own: a column that is null in all rows of a source has
type ``null``, integers may be narrower, a struct may lack a field. Readers of a folder take the
types of one file for those of all, and fail. So a run agrees on one schema as it goes on. It only
ever widens, and only to types that hold every value: ``null`` becomes any type, integers and
decimals become wider, integers beside floats become ``float64`` (where a value would not survive
that, both sources are refused), times get the finer unit, structs get all fields. It is made of
what each source has, so a type that no source has any more can be taken out.

Columns of extension types, such as Ray's tensors, stay as they are: their shapes differ from source
to source, and plain Ray Data writes them so.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from ray_resume.core.common_types import Limits, is_left_alone
from ray_resume.core.variants import ClashError, Variant, Variants, included, type_of
from ray_resume.errors import ResumeError

__all__ = [
    "OutputSchema",
    "SchemaMismatchError",
    "asked",
    "conform",
    "is_agreeable",
    "unifiable",
]

# Where a schema that is asked for says what values of a column do not fit into.
_LIMITS = b"ray_resume.limits"


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
        variants: by column, the types that it has in the output of sources, of which that in
            ``schema`` is made. A column that is not in it has its type whatever becomes of sources.
        stale: whether there may be files that were written before the schema became this one.
        given: whether the user gave the schema: then nothing widens it.
    """

    schema: pa.Schema
    variants: Mapping[str, Variants] = field(default_factory=dict)
    stale: bool = False
    given: bool = False

    @property
    def sources(self) -> set[str]:
        """The ids of the sources that are known to have one of the types."""
        every = itertools.chain.from_iterable(self.variants.values())
        return {source for variant in every for source in variant.sources}

    def widened(self, schema: pa.Schema, source_id: str | None) -> OutputSchema:
        """Return what holds ``schema``, the rows of ``source_id``, as well; itself if it does.

        Args:
            schema: may say what values do not fit into, see :func:`asked`.
            source_id: None if it is not known.

        Raises:
            SchemaMismatchError: no type of a column holds the values of both without loss.
        """
        sources = () if source_id is None else (source_id,)
        return self._including(
            (one.name, [Variant(one.type, _limits_in(one), sources, many=source_id is None)])
            for one in schema
            if not is_left_alone(one.type)
        )

    def _including(self, columns: Iterable[tuple[str, Iterable[Variant]]]) -> OutputSchema:
        variants = {one.name: self._variants_of(one) for one in self.schema}
        before = dict(variants)
        for name, new in columns:
            try:
                variants[name] = included(variants.get(name, ()), new)
            except ClashError as clash:
                raise SchemaMismatchError(name, _problem(clash)) from None
        if all(variants[name] is before.get(name) for name in variants):
            return self
        return self._made_of(variants)

    def _made_of(self, variants: Mapping[str, Variants]) -> OutputSchema:
        schema = pa.schema([(name, type_of(some)) for name, some in variants.items()])
        changed = len(self.schema) > 0 and not schema.equals(self.schema)
        return OutputSchema(schema, variants, stale=self.stale or changed)

    def _variants_of(self, one: pa.Field) -> Variants:
        return self.variants.get(one.name) or (Variant(one.type, many=True),)

    def merged(self, other: OutputSchema) -> OutputSchema:
        """Return what holds both; stale unless both are the same and neither is.

        Raises:
            SchemaMismatchError: as :meth:`widened`.
        """
        if self.given or other.given:
            # The one that was given last is not known; the sink of the next run says it again.
            chosen = self if self.given else other
            return replace(chosen, stale=True)
        both = self._including((one.name, other._variants_of(one)) for one in other.schema)
        same = both.schema.equals(self.schema) and both.schema.equals(other.schema)
        return replace(both, stale=self.stale or other.stale or not same)

    def without(self, gone: Collection[str]) -> OutputSchema:
        """Return what the other sources alone need; itself if these sources have no part in it.

        Args:
            gone: ids of sources that have no output, or are to be processed again.
        """
        if self.given or not self.sources & set(gone):
            return self
        variants: dict[str, Variants] = {}
        for one in self.schema:
            left = tuple(v for each in self._variants_of(one) if (v := each.without(gone)))
            if left:
                variants[one.name] = left
        return self._made_of(variants)

    def to_bytes(self) -> bytes:
        """Encode for a checkpoint: plain data only."""
        schema = base64.b64encode(self.schema.serialize().to_pybytes()).decode()
        return json.dumps(
            {
                "schema": schema,
                "variants": {
                    name: [one.to_plain() for one in some] for name, some in self.variants.items()
                },
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
                {
                    str(column): tuple(map(Variant.from_plain, some))
                    for column, some in content.get("variants", {}).items()
                },
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
    return pa.schema([one for one in schema if not is_left_alone(one.type)])


def asked(schema: pa.Schema, limits: Mapping[str, Limits]) -> pa.Schema:
    """Return the columns of ``schema`` that can be agreed on, with the limits of their values."""
    return pa.schema(
        [
            pa.field(one.name, one.type, metadata=_with_limits(limits.get(one.name)))
            for one in unifiable(schema)
        ]
    )


def _with_limits(limits: Limits | None) -> dict[bytes, bytes] | None:
    if not limits:
        return None
    return {_LIMITS: json.dumps(sorted([list(path), target] for path, target in limits)).encode()}


def _limits_in(one: pa.Field) -> Limits:
    found = (one.metadata or {}).get(_LIMITS)
    limits = [] if found is None else json.loads(found)
    return frozenset((tuple(path), target) for path, target in limits)


def _problem(clash: ClashError) -> str:
    one, other = clash.one, clash.other
    return (
        f"has type {one.kind} in the output of {one.origin}, and type {other.kind} in that of "
        f"{other.origin}, and no type holds the values of both. Have the UDFs return one type for "
        "it, or pass schema= to resumable_write to have rows cast."
    )


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
        if exactly or not (is_left_alone(one.type) or _is_stored_extension(one)):
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
