"""The digest of a UDF's code: the same in every process, another one if the code changes. Pure.

A digest covers all that a UDF reaches in its *own* modules, which are those that the UDF, or the
class of its object, is defined in:

* the bytecode and constants of functions, and of the methods of classes;
* values that functions close over, that are their defaults, or that are global values they name,
  also inside of lists, tuples, sets and dicts;
* for objects and their bound methods, their classes and attributes;
* for decorated functions, the decorator's wrapper and the decorated function.

Functions and classes of other modules are covered by their names, and objects of other modules by
the names of their classes. So a digest covers neither libraries nor loaded models.

Invariant: nothing that a user wrote is executed. `core.raw_values` takes values apart.
"""

from __future__ import annotations

import collections
import enum
import functools
import hashlib
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from ray_resume.core.plain_values import digest_of_value, is_secret
from ray_resume.core.raw_values import (
    attributes_of,
    closure_of,
    entries_of,
    is_plain,
    items_of,
    members_of,
    module_of,
    name_of,
    vars_of,
    wrapped_by,
)

__all__ = ["digest_of_code"]

_DIGEST_BYTES = 6
_OURS = __name__.partition(".")[0]

# A digest covers nothing beyond these bounds: Python's stack and the user's time have theirs.
_MAX_DEPTH = 64
_MAX_VALUES = 20_000

# Attributes of a class that its author did not write.
_NOT_WRITTEN = {
    *("__dict__", "__weakref__", "__module__", "__doc__", "__qualname__", "__annotations__"),
    *("__firstlineno__", "__static_attributes__", "__annotate__", "__annotations_cache__"),
    *("__annotate_func__", "__parameters__", "__orig_bases__"),
}

_CODE_TYPES = (
    types.FunctionType,
    types.MethodType,
    functools.partial,
    type,
    staticmethod,
    classmethod,
    property,
)

_BUILTIN_METHODS = (
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
)

_Part: TypeAlias = "str | Sequence[_Part]"


def digest_of_code(udf: Any) -> str:
    """Return 12 hexadecimal digits that stand for what a function, a class or an object does."""
    return _hashed(_Digester(_modules_of(udf)).digest(udf))


class _Digester:
    """Takes digests of values, each once; call :meth:`digest`.

    A value that holds itself is covered by its distance from where it began.

    Args:
        own: names of the modules whose code is covered.
    """

    def __init__(self, own: frozenset[str]) -> None:
        self._own = own
        self._done: dict[int, str] = {}
        # Values that were made on the way stay, so that no other one gets the id of one of them.
        self._kept: list[Any] = []
        self._around: list[int] = []

    def digest(self, value: Any) -> str:
        """Return a text that stands for a value."""
        value = _without_our_wrapper(value)
        plain = _plain_digest(value)
        if plain is not None:
            return plain
        if id(value) in self._done:
            return self._done[id(value)]
        if id(value) in self._around:
            return f"up {len(self._around) - self._around.index(id(value))}"
        if len(self._around) >= _MAX_DEPTH or len(self._kept) >= _MAX_VALUES:
            return "more"
        self._kept.append(value)
        self._around.append(id(value))
        digest = _hashed(json.dumps(list(self._parts(value))))
        self._around.pop()
        self._done[id(value)] = digest
        return digest

    def _alone(self, value: Any) -> str:
        """Return a digest that does not depend on which of the value's neighbours came first."""
        plain = _plain_digest(value)
        if plain is not None:
            return plain
        done = self._done
        self._done = dict(done)
        digest = self.digest(value)
        self._done = done
        return digest

    def _parts(self, value: Any) -> Iterator[_Part]:
        kind = type(value)
        if kind is types.FunctionType:
            yield from self._function(value)
        elif kind is types.MethodType:
            yield from ("method", self.digest(value.__func__), self.digest(value.__self__))
        elif issubclass(kind, types.BuiltinFunctionType):
            yield from ("calls", str(value.__module__), value.__qualname__)
            if type(value.__self__) is not types.ModuleType:
                yield self.digest(value.__self__)
        elif any(kind is one for one in _BUILTIN_METHODS):
            yield from ("calls", value.__qualname__)
        elif kind is types.CodeType:
            yield _code(value)
        elif issubclass(kind, functools.partial):
            yield from ("partial", self.digest(wrapped_by(value)))
            yield [self.digest(of) for of in functools.partial.__dict__["args"].__get__(value)]
            yield self._named(functools.partial.__dict__["keywords"].__get__(value))
        elif issubclass(kind, type):
            yield from self._class(value)
        elif issubclass(kind, (staticmethod, classmethod)):
            yield "static" if issubclass(kind, staticmethod) else "class method"
            yield self.digest(wrapped_by(value))
        elif issubclass(kind, property):
            parts = (property.__dict__[name] for name in ("fget", "fset", "fdel"))
            yield from ("property", *(self.digest(part.__get__(value)) for part in parts))
        else:
            yield from self._object(value)

    def _function(self, function: types.FunctionType) -> Iterator[_Part]:
        wrapped, held = wrapped_by(function), closure_of(function)
        if module_of(function) in self._own:
            code, known = function.__code__, function.__globals__
            yield _code(code)
            yield self._named(_defaults(function))
            names = _global_names(code)
            held |= {
                name: dict.get(known, name) for name in names if dict.__contains__(known, name)
            }
        else:
            yield from ("calls", module_of(function), name_of(function))
            if not any(map(self._is_own, (wrapped, *held.values()))):
                return
            # A decorator of another module: its arguments say what it does to a function of ours.
            held = {
                name: of
                for name, of in held.items()
                if _is_code(of) or _plain_digest(of) is not None
            }
        yield self._named(held)
        if wrapped is not None:
            yield self.digest(wrapped)

    def _class(self, cls: type) -> Iterator[_Part]:
        if module_of(cls) not in self._own:
            yield from ("uses", module_of(cls), name_of(cls))
            return
        yield "class"
        yield [self.digest(base) for base in type.__dict__["__bases__"].__get__(cls)]
        yield self._named({n: of for n, of in vars_of(cls).items() if n not in _NOT_WRITTEN})

    def _object(self, value: Any) -> Iterator[_Part]:
        kind = type(value)
        attributes: Mapping[str, Any] = attributes_of(value)
        if module_of(kind) in self._own:
            yield from ("object", self.digest(kind))
        else:
            yield from ("object", module_of(kind), name_of(kind))
            attributes = self._covered(value, attributes)
        yield self._named({n: of for n, of in attributes.items() if n not in _NOT_WRITTEN})
        yield self._entries(value)
        yield sorted(map(self._alone, members_of(value)))
        yield list(map(self.digest, items_of(value)))

    def _covered(self, value: Any, attributes: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return those attributes of an object of another module that are covered."""
        kind = type(value)
        if kind is types.SimpleNamespace:
            return attributes
        if issubclass(type(kind), enum.EnumMeta):
            return {"_name_": attributes.get("_name_")}
        fields = vars_of(kind).get("__dataclass_fields__", ())
        # A callable object does as its attributes say. Those of Ray's say who it is, too.
        plain = callable(value) and module_of(kind).partition(".")[0] != "ray"
        return {
            name: of
            for name, of in attributes.items()
            if (type(fields) is dict and name in fields)
            or self._is_own(of)
            or (plain and _plain_digest(of) is not None)
        }

    def _entries(self, value: Any) -> _Part:
        entries = [
            (self._alone(key), key, of)
            for key, of in entries_of(value)
            if not (type(key) is str and _is_hidden(key, of))
        ]
        counts = collections.Counter(digest for digest, _, _ in entries)
        # Keys that look alike are told apart by what stands under them.
        entries.sort(key=lambda one: (one[0], self._alone(one[2]) if counts[one[0]] > 1 else ""))
        return [[digest, self.digest(of)] for digest, _, of in entries]

    def _named(self, values: Mapping[str, Any]) -> _Part:
        names = sorted(
            name for name, of in values.items() if type(name) is str and not _is_hidden(name, of)
        )
        return [[name, self.digest(values[name])] for name in names]

    def _is_own(self, value: Any) -> bool:
        return value is not None and not self._own.isdisjoint(_modules_of(value))


def _modules_of(value: Any) -> frozenset[str]:
    """Return the modules that a UDF, or the class of its object, is defined in."""
    modules = set()
    for _ in range(_MAX_DEPTH):
        if type(value) is types.MethodType:
            of = value.__self__
            modules.add(module_of(of if issubclass(type(of), type) else type(of)))
        below = wrapped_by(value)
        if below is None:
            break
        value = below
    is_named = type(value) is types.FunctionType or issubclass(type(value), type)
    modules.add(module_of(value if is_named else type(value)))
    return frozenset(modules - {"builtins"})


def _without_our_wrapper(value: Any) -> Any:
    """Return what `udf.decorator` has marked: the mark is no code of a user's."""
    for _ in range(_MAX_DEPTH):
        if type(value) is not types.FunctionType or not module_of(value).startswith(f"{_OURS}."):
            break
        below = wrapped_by(value)
        if below is None:
            break
        value = below
    return value


def _plain_digest(value: Any) -> str | None:
    return digest_of_value(value) if is_plain(value) else None


def _is_code(value: Any) -> bool:
    return issubclass(type(value), _CODE_TYPES)


def _is_hidden(name: str, value: Any) -> bool:
    """Say whether a value may be a credential. A function that is called so is none."""
    return is_secret(name) and not _is_code(value)


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    """Return the defaults of a function's parameters, by name."""
    code, defaults = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    return {**dict(zip(names, defaults, strict=False)), **(function.__kwdefaults__ or {})}


def _code(code: types.CodeType) -> _Part:
    """Return what a function does, without where it stands."""
    constants: list[_Part] = [
        _code(one) if type(one) is types.CodeType else str(digest_of_value(one))
        for one in code.co_consts
    ]
    # Since Python 3.11, which lines a handler of exceptions serves is said beside the bytecode.
    handlers = getattr(code, "co_exceptiontable", b"")
    digest = hashlib.blake2b(code.co_code + handlers, digest_size=_DIGEST_BYTES).hexdigest()
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return [digest, f"{code.co_flags} {counts} {names}", constants]


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if type(constant) is types.CodeType:
            names |= _global_names(constant)
    return names


def _hashed(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()
