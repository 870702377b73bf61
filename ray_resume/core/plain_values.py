"""Plain values: what an argument says of itself, the same in every process and every run. Pure.

Plain are numbers, texts, bytes, dates, paths, regular expressions, enumerations, types of these,
and lists, tuples, sets, dicts and dataclasses of these. Functions, and objects of other classes,
are not: what they do, or hold, cannot be told from the outside.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["digest_of_value", "is_secret", "plain"]

_ATOMS = (bool, int, float, complex, str, type(None))
_TYPES_OF = ("builtins", "datetime", "decimal", "numpy")
_TEXTS = (dt.date, dt.time, dt.timedelta, dt.tzinfo, decimal.Decimal, uuid.UUID, range, slice)

# Values of these names may be credentials, or change with one: they are neither kept nor compared.
_SECRET = re.compile(
    r"((api|access|secret|private|account|encryption|license|sas)_?keys?|(^|_)token|dsn)$"
    r"|secret|passw|(^|_)pwd|credential|(^|_)auth(_|$)|authorization|storage_options|cookie|headers"
    r"|connection",
    re.IGNORECASE,
)

_DIGEST_BYTES = 6


class NotPlainError(TypeError):
    """A value is not plain."""


def is_secret(name: str) -> bool:
    """Say whether what is called ``name`` may be a credential, or hold one."""
    return _SECRET.search(name) is not None


def plain(value: Any) -> Any:
    """Return what stands for ``value`` in JSON; equal values give equal texts.

    Raises:
        NotPlainError: it, or something in it, is not plain.
    """
    return _plain(value, ())


def digest_of_value(value: Any) -> str | None:
    """Return 12 hexadecimal digits that stand for a plain value, None if it is not plain."""
    try:
        text = json.dumps(plain(value), sort_keys=True)
    except (NotPlainError, ValueError):
        return None
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _plain(value: Any, around: tuple[int, ...]) -> Any:
    if id(value) in around:
        raise NotPlainError("it holds itself")
    if isinstance(value, enum.Enum):
        return ["enum", type(value).__qualname__, value.name]
    if type(value) in _ATOMS:
        # Text stands for numbers, since 1, 1.0 and True are equal, and NaN is no JSON.
        return value if type(value) is str else [type(value).__name__, repr(value)]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return ["bytes", hashlib.blake2b(bytes(value)).hexdigest()]
    if isinstance(value, os.PathLike):
        return ["path", str(os.fspath(value))]
    if isinstance(value, _TEXTS):
        return [type(value).__name__, repr(value)]
    if type(value) is re.Pattern:
        return ["pattern", _plain(value.pattern, around), value.flags]
    if isinstance(value, type) and value.__module__.partition(".")[0] in _TYPES_OF:
        return ["type", value.__module__, value.__qualname__]
    within = (*around, id(value))
    if type(value) in (list, tuple):
        return [type(value).__name__, *(_plain(item, within) for item in value)]
    if type(value) in (set, frozenset):
        return ["set", *sorted(json.dumps(_plain(item, within)) for item in value)]
    if isinstance(value, Mapping):
        # Possible credentials count for nothing in a mapping, either.
        pairs = (
            [_plain(name, within), None if _is_hidden(name) else _plain(of, within)]
            for name, of in value.items()
        )
        return ["dict", *sorted(pairs, key=json.dumps)]
    return [type(value).__qualname__, *(_plain(part, within) for part in _inside(value))]


def _is_hidden(name: Any) -> bool:
    return type(name) is str and is_secret(name)


def _inside(value: Any) -> Iterator[Any]:
    """Yield what makes up a value of a class that is not Python's own."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, part.name) for part in dataclasses.fields(value))
    elif type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "dtype"):
        # An array, or a number. The bytes of an array of Python objects would be addresses.

        if value.dtype.hasobject:
            yield value.tolist()
        else:
            whole = value.flags.c_contiguous
            yield from (str(value.dtype), str(value.shape))
            yield hashlib.blake2b(value.data if whole else value.tobytes()).hexdigest()
    elif type(value).__module__.partition(".")[0] in ("numpy", "pyarrow") and _is_type(value):
        yield str(value)
    elif type(value).__module__ == "pyarrow._compute" and type(value).__name__ == "Expression":
        yield from _inside_arrow_expression(value)
    elif type(value).__module__.startswith("pyiceberg.expressions"):
        parts = [getattr(value, name) for name in _ICEBERG if hasattr(value, name)]
        yield from parts or [getattr(value, "value", None)]
    else:
        raise NotPlainError(f"a {type(value).__qualname__}")


# The attributes of pyiceberg's filters. A literal has none of them, only a value.
_ICEBERG = ("name", "term", "literal", "literals", "left", "right", "child")


def _inside_arrow_expression(value: Any) -> Iterator[Any]:
    """Yield what makes up an expression of pyarrow's.

    Raises:
        NotPlainError: its value may be another one each time.
    """
    text = str(value)
    if "random(" in text:
        raise NotPlainError("an expression that draws numbers")
    # The text leaves out some of many values. They are in what the expression is pickled as.
    import pyarrow.ipc

    _, (pickled, *_) = value.__reduce__()
    with pyarrow.ipc.open_file(pickled) as file:
        yield from (text, repr([column.to_pylist() for column in file.read_all().columns]))


def _is_type(value: Any) -> bool:
    """Say whether a value is a schema, a field or a type of NumPy's or Arrow's."""
    names = {cls.__name__ for cls in type(value).__mro__}
    return bool(names & {"dtype", "DataType", "Schema", "Field", "Scalar"})
