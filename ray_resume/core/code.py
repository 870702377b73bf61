"""The code of UDFs, as digests: whether a run goes on with the code of an earlier one. Pure.

A digest covers what a function does: its bytecode and constants, what it closes over, and the
global values and functions of its own module that it names, as far as those are plain values or
functions. It covers neither libraries nor loaded models. Each version of Python
has its own bytecode, so digests of two versions cannot be compared.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray_resume.core.plain_values import digest_of_value, is_secret

__all__ = ["Code", "digest_of_code"]

_DIGEST_BYTES = 6
_PYTHON = "{}.{}".format(*sys.version_info)
# Attributes of a class that its author did not write.
_NOT_WRITTEN = {
    *("__dict__", "__weakref__", "__module__", "__doc__", "__qualname__", "__annotations__"),
    *("__firstlineno__", "__static_attributes__", "__annotate__", "__annotations_cache__"),
    *("__annotate_func__", "__parameters__", "__orig_bases__"),
}


@dataclass(frozen=True)
class Code:
    """The code that a pipeline runs: a name and a digest for each UDF, in order."""

    udfs: tuple[tuple[str, str], ...] = ()
    python: str = _PYTHON

    @classmethod
    def of(cls, udfs: Iterable[tuple[str, Any]]) -> Code:
        """Take digests of UDFs by name."""
        return cls(tuple((name, digest_of_code(udf)) for name, udf in udfs))

    @classmethod
    def read(cls, header: Mapping[str, Any]) -> Code | None:
        """Return the code that the header of a run tells of, None if it tells of none."""
        try:
            said = header["code"]
            return cls(tuple((str(name), str(of)) for name, of in said["udfs"]), said["python"])
        except (KeyError, TypeError, ValueError):
            return None

    def header(self) -> dict[str, Any]:
        """Return what :meth:`read` finds in a run's header, plain JSON data."""
        return {"udfs": [list(udf) for udf in self.udfs], "python": self.python}

    def digest(self) -> str:
        """Return a text that stands for all of it; empty if there is no UDF."""
        return json.dumps(self.header()) if self.udfs else ""

    def differing(self, other: Code) -> list[str]:
        """Return the names of the UDFs that have another digest in ``other``."""
        pairs = zip(self.udfs, other.udfs, strict=False)
        return list(dict.fromkeys(one[0] for one, another in pairs if one != another))


def digest_of_code(udf: Any) -> str:
    """Return 12 hexadecimal digits that stand for what a function, a class or an object does."""
    innermost = inspect.unwrap(udf)
    while isinstance(innermost, functools.partial):
        innermost = inspect.unwrap(innermost.func)
    texts = sorted(set(_texts(udf, set(), getattr(innermost, "__module__", None))))
    whole = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for text in texts:
        whole.update(text.encode("utf-8", "surrogatepass"))
        whole.update(b"\0")
    return whole.hexdigest()


def _texts(value: Any, seen: set[int], module: str | None) -> Iterator[str]:
    """Yield texts that stand for all that ``value`` consists of."""
    if id(value) in seen:
        return
    seen.add(id(value))
    value = inspect.unwrap(value) if callable(value) else value
    if isinstance(value, functools.partial):
        yield from _texts(value.func, seen, module)
        yield from _named("argument", {**dict(enumerate(value.args)), **value.keywords})
    elif isinstance(value, types.MethodType):
        yield from _texts(value.__func__, seen, module)
        yield from _named("attribute", getattr(value.__self__, "__dict__", {}))
    elif isinstance(value, types.FunctionType):
        yield from _function(value, seen, module)
    elif isinstance(value, type):
        yield from _class(value, seen, module)
    elif isinstance(value, (staticmethod, classmethod)):
        yield from _texts(value.__func__, seen, module)
    elif isinstance(value, property):
        for part in (value.fget, value.fset):
            yield from _texts(part, seen, module)
    elif not isinstance(value, types.BuiltinFunctionType) and callable(value):
        yield from _texts(type(value), seen, module)
        yield from _named("attribute", getattr(value, "__dict__", {}))


def _function(function: types.FunctionType, seen: set[int], module: str | None) -> Iterator[str]:
    if function.__module__ != module:
        yield f"calls {function.__module__}.{function.__qualname__}"
        return
    yield _code(function.__code__)
    yield from _named("default", dict(enumerate(function.__defaults__ or ())))
    yield from _named("default", function.__kwdefaults__ or {})
    held = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            held[name] = cell.cell_contents
        except ValueError:
            # Nothing is in it yet.
            continue
    names = _names(function.__code__)
    held |= {name: function.__globals__[name] for name in names & function.__globals__.keys()}
    yield from _named("value", held)
    for of in held.values():
        if callable(of):
            yield from _texts(of, seen, module)


def _class(cls: type, seen: set[int], module: str | None) -> Iterator[str]:
    if cls.__module__ != module:
        yield f"uses {cls.__module__}.{cls.__qualname__}"
        return
    for base in cls.__bases__:
        if base is not object:
            yield from _texts(base, seen, module)
    written = {name: of for name, of in vars(cls).items() if name not in _NOT_WRITTEN}
    yield from _named("attribute", written)
    for name, of in written.items():
        for text in _texts(of, seen, module):
            yield f"{name}: {text}"


def _code(code: types.CodeType) -> str:
    """Format what a function does, without where it stands."""
    constants = []
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            constants.append(_code(constant))
        else:
            constants.append(str(digest_of_value(constant)))
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    digest = hashlib.blake2b(code.co_code, digest_size=_DIGEST_BYTES).hexdigest()
    return f"{digest} {code.co_flags} {names} {constants}"


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _named(what: str, values: Mapping[Any, Any]) -> Iterator[str]:
    for name, value in values.items():
        digest = None if is_secret(str(name)) else digest_of_value(value)
        if digest is not None:
            yield f"{what} {name}={digest}"
