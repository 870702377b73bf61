"""The types that hold the values of two others, and the values that do not survive that. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import pyarrow as pa

__all__ = ["Limits", "common_type", "is_left_alone", "limits_of", "misfit"]

_SIGNED = (pa.int8(), pa.int16(), pa.int32(), pa.int64())
_UNSIGNED = (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
_UNITS = ("s", "ms", "us", "ns")

Limits: TypeAlias = frozenset[tuple[tuple[str, ...], str]]
"""Types that can be unified with a type, although its values do not fit into them.

Each is the path to where the values are (``()`` is the column itself, ``("[]",)`` what is inside of
its lists), and ``"double"`` or a unit of time.
"""

_FLOATS = "double"
_MAX_EXACT = 1 << 53
_MAX_INT = (1 << 63) - 1


def is_left_alone(kind: pa.DataType) -> bool:
    """Say whether nothing is agreed on about a type: it is, or has inside, an extension type."""
    if isinstance(kind, pa.BaseExtensionType):
        return True
    if isinstance(kind, pa.DictionaryType):
        return is_left_alone(kind.value_type)
    return any(is_left_alone(kind.field(i).type) for i in range(kind.num_fields))


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return the narrowest type that holds the values of both, None if there is none."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if isinstance(one, pa.DictionaryType) or isinstance(other, pa.DictionaryType):
        return common_type(_plain(one), _plain(other))
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
        key, item = (
            common_type(one.key_type, other.key_type),
            common_type(one.item_type, other.item_type),
        )
        return None if key is None or item is None else pa.map_(key, item)
    if _is_list(one) and _is_list(other):
        value = common_type(one.value_type, other.value_type)
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
        kind = each.type if known is None else common_type(known, each.type)
        if kind is None:
            return None
        fields[each.name] = kind
    return pa.struct(list(fields.items()))


def limits_of(column: pa.ChunkedArray) -> Limits:
    """Return what some values of ``column`` do not fit into."""
    return frozenset(limit for chunk in column.chunks for limit in _limits(chunk, ()) if len(chunk))


def misfit(limits: Limits, common: pa.DataType) -> bool:
    """Say whether values with such limits do not fit into ``common``, made of their type."""
    for path, target in limits:
        kind = _inside(common, path)
        if kind is None:
            continue
        if target == _FLOATS:
            if pa.types.is_floating(kind):
                return True
        elif getattr(kind, "unit", None) == target:
            return True
    return False


def _limits(array: pa.Array, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    kind = array.type
    if isinstance(kind, pa.DictionaryType):
        yield from _limits(array.dictionary, path)
    elif pa.types.is_struct(kind):
        for one, values in zip(kind, array.flatten(), strict=True):
            yield from _limits(values, (*path, f".{one.name}"))
    elif pa.types.is_map(kind):
        yield from _limits(array.keys, (*path, "[key]"))
        yield from _limits(array.items, (*path, "[value]"))
    elif _is_list(kind):
        yield from _limits(array.flatten(), (*path, "[]"))
    elif kind in (pa.int64(), pa.uint64()):
        low, high = _extremes(array)
        if low < -_MAX_EXACT or high > _MAX_EXACT:
            yield path, _FLOATS
    elif pa.types.is_timestamp(kind) or pa.types.is_duration(kind):
        low, high = _extremes(array.view(pa.int64()))
        place = _UNITS.index(kind.unit)
        for steps, unit in enumerate(_UNITS[place + 1 :], 1):
            if max(-low, high) > _MAX_INT // 1000**steps:
                yield path, unit


def _extremes(array: pa.Array) -> tuple[int, int]:
    # It takes 0.1 s to load, and the ledger's process never calls it.
    import pyarrow.compute as pc

    found = pc.min_max(array)
    return found["min"].as_py() or 0, found["max"].as_py() or 0


def _inside(kind: pa.DataType, path: Sequence[str]) -> pa.DataType | None:
    for step in path:
        kind = _plain(kind)
        if step == "[key]" and pa.types.is_map(kind):
            kind = kind.key_type
        elif step == "[value]" and pa.types.is_map(kind):
            kind = kind.item_type
        elif step == "[]" and _is_list(kind):
            kind = kind.value_type
        elif step.startswith(".") and pa.types.is_struct(kind):
            kind = kind.field(step[1:]).type
        else:
            return None
    return _plain(kind)
