"""The mark that a decorated UDF carries: its options."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, fields
from typing import Any

from typing_extensions import override

__all__ = ["StageOptions", "is_async", "marked_function", "name_of", "options_of", "set_mark"]

_MARK = "__ray_resume_stage__"


@dataclass(frozen=True)
class StageOptions:
    """The options that the decorator got."""

    one_to_one: bool = False
    origin: str | None = None
    by: str | None = None
    sink: bool = False
    on_error: str = "raise"
    isolate: bool = False
    version: str | None = None

    @override
    def __str__(self) -> str:
        """Return the decorator as its user would write it."""
        given = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"@resumable({', '.join(given)})" if given else "@resumable"


def options_of(udf: Any) -> StageOptions | None:
    """Return what ``udf`` was decorated with, or None if it was not."""
    if isinstance(udf, functools.partial):
        return options_of(udf.func)
    # A subclass of a decorated class may keep rows for later: it is asked to decorate itself.
    mark = vars(udf).get(_MARK) if inspect.isclass(udf) else getattr(udf, _MARK, None)
    return mark if isinstance(mark, StageOptions) else None


def set_mark(udf: Any, options: StageOptions) -> None:
    """Mark a class or an object with the options."""
    setattr(udf, _MARK, options)


def marked_function(options: StageOptions, udf: Any, shown: Any = None) -> Any:
    """Return a function that does as ``udf``, marked.

    Args:
        shown: the function whose name and code the user knows it by, if that is another one.
    """
    # A wrapper, so that the function itself, which may belong to a library, is not marked.
    if inspect.isgeneratorfunction(udf):

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return (yield from udf(*args, **kwargs))

    else:

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return udf(*args, **kwargs)

    shown = udf if shown is None else shown
    functools.update_wrapper(wrapper, shown.func if isinstance(shown, functools.partial) else shown)
    wrapper.__wrapped__ = shown  # type: ignore[attr-defined]
    set_mark(wrapper, options)
    return wrapper


def is_async(udf: Any) -> bool:
    """Check for a coroutine function or an async generator function."""
    return inspect.iscoroutinefunction(udf) or inspect.isasyncgenfunction(udf)


def name_of(udf: Any) -> str:
    """Return the name of a UDF, as messages show it."""
    if isinstance(udf, functools.partial):
        return name_of(udf.func)
    return str(getattr(udf, "__name__", type(udf).__name__))
