"""Values taken apart without executing a line that a user wrote. Pure.

``==``, ``hash``, ``repr``, ``isinstance`` and ``getattr`` on a value may run its class's methods.
Here only its type is asked, and only the methods of Python's own types are called.
"""

from __future__ import annotations

import collections
import datetime as dt
import decimal
import functools
import pathlib
import re
import types
import uuid
import zoneinfo
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

__all__ = [
    "attributes_of",
    "closure_of",
    "entries_of",
    "is_plain",
    "items_of",
    "members_of",
    "module_of",
    "name_of",
    "vars_of",
    "wrapped_by",
]

_SIMPLE = frozenset({bool, int, float, complex, str, bytes, bytearray, type(None)})
_PLAIN = _SIMPLE | {
    *(dt.date, dt.timedelta, dt.timezone, zoneinfo.ZoneInfo, decimal.Decimal, uuid.UUID, range),
    *(pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath),
}
_OF_LIBRARIES = (np.generic, np.dtype, pa.DataType, pa.Field, pa.Schema, pa.Scalar)

# The flag of a class that a class statement made. It may have methods of a user's.
_HEAP_TYPE = 1 << 9

_MAX_DEPTH = 64

# Types that hold a value, and how a value of a class derived from one of them is taken.
_SCALARS: tuple[tuple[type, tuple[Any, ...]], ...] = (
    (int, (int.__index__,)),
    (float, (float.__float__,)),
    (str, (str.__str__,)),
    (bytes, (bytes.hex,)),
    (
        dt.datetime,
        tuple(
            getattr(dt.datetime, name).__get__
            for name in ("year", "month", "day", "hour", "minute", "second", "microsecond")
        ),
    ),
    (dt.date, (dt.date.toordinal,)),
    (dt.timedelta, (dt.timedelta.total_seconds,)),
)


def is_plain(value: Any) -> bool:
    """Say whether `plain_values` can compare a value without executing a user's code.

    It is, and holds, nothing but values of Python's, NumPy's and Arrow's own types.
    """
    return _is_plain(value, ())


def _is_plain(value: Any, around: tuple[int, ...]) -> bool:
    kind = type(value)
    if type(kind) is type and kind in _PLAIN:
        return True
    if id(value) in around or len(around) >= _MAX_DEPTH:
        return False
    within = (*around, id(value))
    if kind is dict:
        return all(_is_plain(key, within) and _is_plain(of, within) for key, of in value.items())
    if kind is list or kind is tuple or kind is set or kind is frozenset:
        return all(_is_plain(item, within) for item in value)
    if kind is dt.datetime or kind is dt.time:
        return value.tzinfo is None or _is_plain(value.tzinfo, within)
    if kind is slice:
        return all(_is_plain(one, within) for one in (value.start, value.stop, value.step))
    if kind is re.Pattern:
        return _is_plain(value.pattern, within)
    if kind is np.ndarray:
        return not value.dtype.hasobject or _is_plain(value.tolist(), within)
    flags: int = type.__dict__["__flags__"].__get__(kind)
    return issubclass(kind, _OF_LIBRARIES) and not flags & _HEAP_TYPE


def module_of(value: Any) -> str:
    """Return the module that a function or a class is defined in."""
    if type(value) is types.FunctionType:
        # A wrapper says that it belongs to the module of the function that it wraps.
        module = dict.get(value.__globals__, "__name__")
    else:
        module = type.__dict__["__module__"].__get__(value)
    return module if type(module) is str else ""


def name_of(value: Any) -> str:
    """Return the qualified name of a function or a class."""
    if type(value) is types.FunctionType:
        return value.__qualname__
    name: str = type.__dict__["__qualname__"].__get__(value)
    return name


def vars_of(cls: type) -> Mapping[str, Any]:
    """Return what stands in the body of a class."""
    found: Mapping[str, Any] = type.__dict__["__dict__"].__get__(cls)
    return found


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes that an object has of its own, in its dict or its slots."""
    found: dict[str, Any] = {}
    for cls in type.__dict__["__mro__"].__get__(type(value)):
        for name, descriptor in vars_of(cls).items():
            kind = type(descriptor)
            if kind is not types.MemberDescriptorType and kind is not types.GetSetDescriptorType:
                continue
            if name == "__dict__":
                held = descriptor.__get__(value)
                # A proxy shows the attributes of another object, which may be a class.
                found.update(dict.items(held) if issubclass(type(held), dict) else ())
            elif kind is types.MemberDescriptorType or name == "__wrapped__":
                try:
                    found[name] = descriptor.__get__(value)
                except AttributeError:
                    # Nothing is in the slot yet.
                    continue
    return found


def wrapped_by(value: Any) -> Any:
    """Return the function or the object that ``value`` stands for, None if it is no wrapper."""
    kind = type(value)
    if kind is types.FunctionType:
        return value.__dict__.get("__wrapped__")
    if kind is types.MethodType:
        return value.__func__
    if issubclass(kind, type):
        return vars_of(value).get("__wrapped__")
    if issubclass(kind, functools.partial):
        return functools.partial.__dict__["func"].__get__(value)
    for holder in (staticmethod, classmethod):
        if issubclass(kind, holder):
            return holder.__dict__["__func__"].__get__(value)
    return attributes_of(value).get("__wrapped__")


def closure_of(function: types.FunctionType) -> dict[str, Any]:
    """Return the values that a function closes over, by name."""
    held = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            held[name] = cell.cell_contents
        except ValueError:
            # Nothing is in it yet.
            continue
    return held


def entries_of(value: Any) -> Iterable[tuple[Any, Any]]:
    """Return the entries of a dict, and of an object of a class derived from it."""
    return dict.items(value) if issubclass(type(value), dict) else ()


def members_of(value: Any) -> Iterable[Any]:
    """Return the members of a set, in any order."""
    for holder in (set, frozenset):
        if issubclass(type(value), holder):
            return holder.__iter__(value)
    return ()


def items_of(value: Any) -> Iterable[Any]:
    """Return the items of a sequence, or the parts of an object that is derived from a scalar."""
    kind = type(value)
    for holder in (list, tuple, collections.deque):
        if issubclass(kind, holder):
            return holder.__iter__(value)
    if kind is np.ndarray:
        return [value.shape, *value.ravel().tolist()]
    if kind is slice:
        return [value.start, value.stop, value.step]
    for scalar, methods in _SCALARS:
        if issubclass(kind, scalar):
            return [method(value) for method in methods]
    return ()
