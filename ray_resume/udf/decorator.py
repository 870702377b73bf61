"""The decorator: it marks a UDF, and has no other effect.

`resumable_write` finds the mark (:func:`options_of`) when it arms a pipeline, and runs the UDF
through `stage`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from ray_resume.errors import NonResumableError

__all__ = ["StageOptions", "is_async", "name_of", "options_of", "resumable"]

_MARK = "__ray_resume_stage__"

_ON_ERROR = ("raise", "mark_failed", "dead_letter")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class StageOptions:
    """The options that the decorator got."""

    one_to_one: bool = False
    origin: str | None = None
    sink: bool = False
    on_error: str = "raise"
    isolate: bool = False


@overload
def resumable(
    udf: F,
    *,
    one_to_one: bool = ...,
    origin: str | None = ...,
    sink: bool = ...,
    on_error: str = ...,
    isolate: bool = ...,
) -> F: ...
@overload
def resumable(
    *,
    one_to_one: bool = ...,
    origin: str | None = ...,
    sink: bool = ...,
    on_error: str = ...,
    isolate: bool = ...,
) -> Callable[[F], F]: ...
def resumable(
    udf: F | None = None,
    *,
    one_to_one: bool = False,
    origin: str | None = None,
    sink: bool = False,
    on_error: str = "raise",
    isolate: bool = False,
) -> F | Callable[[F], F]:
    """Declare that a UDF may be part of a resumable pipeline.

    Outside ``resumable_write`` it has no effect. **The contract**: each call's output comes from
    that call's rows, and nothing is kept for a later call. A UDF that buffers, deduplicates or
    aggregates over calls must stay undecorated. Nothing can detect it, and its rows would be lost
    after a crash. A UDF that also writes files or sends requests does so again for each source that
    is executed again.

    It serves UDFs for

    * ``map_batches``, in the numpy, pandas and pyarrow batch formats. A call may return any number
      of rows, or ``None`` for none;
    * ``map``, ``filter`` and ``flat_map``, which are called row by row. A ``flat_map`` UDF that
      returns ``None`` or ``[]`` drops the row.

    They may be functions, generator functions, lambdas, bound methods, ``functools.partial``
    objects and callable classes. Classes may have an async ``__call__``, a coroutine function or an
    async generator function. (Ray Data runs no plain async functions.) A class that is derived from
    a decorated one is decorated itself. Expressions (``with_column``, ``filter(expr=...)``),
    ``select_columns``, ``rename_columns`` and ``drop_columns`` need no decorator.

    Ray Data takes the values that a UDF returns when it would in a plain pipeline, or earlier. It
    takes those of async UDFs as soon as they are returned. A batch of ``map_batches`` may have rows
    of several sources. The UDF gets it in parts, one call for each source, unless an option says
    how output rows and input rows belong together:

    Args:
        one_to_one: output row i comes from input row i. Batches stay whole; another number of
            rows is an error.
        origin: the name of a column with the position (``int64``, 0 .. n-1) of each row in the
            call's input. The UDF gets it beside the others and returns it with its rows: for
            filters, fan-outs and shuffles on whole batches. It does not reach the next stage.
        sink: the UDF itself makes its input durable before it returns, in a system of its own;
            what it returns is discarded. It is the last operator, and ``resumable_write(ds)`` has
            no other sink. At least once: rows of a source that did not complete come again.
        on_error: what becomes of the input rows of a call that raised an ``Exception``.
            ``"raise"``: the job fails as plain Ray Data would, and what was complete stays
            complete. ``"mark_failed"``: they are failed (see :func:`mark_failed`), and the job goes
            on. ``"dead_letter"``: they are written, with the error, to the checkpoint's dead
            letters, and their sources can complete; so are rows given to ``mark_failed``. Rows
            that a generator yielded before it raised stay. In a row-wise UDF a call is a row. An
            error that ``DataContext.retried_map_errors`` names is retried first;
            ``actor_task_retry_on_errors``, which retries without a limit, sees none of those that
            ``on_error`` catches.
        isolate: when a call of many rows raises, call the UDF again with either half of them, and
            so on, until it finds the bad rows. It needs ``on_error="mark_failed"`` or
            ``"dead_letter"``. One bad image of 256 costs 16 more calls, and fails alone. Only for
            UDFs that may be called twice with the same rows.

    Raises:
        NonResumableError: the object cannot be a UDF, or carries other options already.
        ValueError: the options contradict each other.

    Example::

        @resumable
        def clean(batch: pd.DataFrame) -> pd.DataFrame:
            return batch[batch["text"].str.len() > 0]


        @resumable(one_to_one=True)
        class Embed:
            def __init__(self, model: str) -> None:
                self.model = load(model)

            def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                return {**batch, "vector": self.model.encode(batch["text"])}
    """
    if one_to_one and origin is not None:
        raise ValueError(
            "one_to_one=True and origin= exclude each other: both say where rows come from"
        )
    if origin is not None and (not isinstance(origin, str) or not origin):
        raise ValueError(f"origin must be the name of a column, not {origin!r}")
    if sink and (one_to_one or origin is not None):
        raise ValueError("sink=True excludes one_to_one and origin: a sink has no output rows")
    if on_error not in _ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(_ON_ERROR)}, not {on_error!r}")
    if isolate and on_error == "raise":
        raise ValueError('isolate=True needs on_error="mark_failed" or on_error="dead_letter"')
    options = StageOptions(one_to_one, origin, sink, on_error, isolate)
    return functools.partial(_decorate, options) if udf is None else _decorate(options, udf)


def options_of(udf: Any) -> StageOptions | None:
    """Return what ``udf`` was decorated with, or None if it was not."""
    if isinstance(udf, functools.partial):
        return options_of(udf.func)
    # A subclass of a decorated class may keep rows for later: it is asked to decorate itself.
    mark = vars(udf).get(_MARK) if inspect.isclass(udf) else getattr(udf, _MARK, None)
    return mark if isinstance(mark, StageOptions) else None


def _decorate(options: StageOptions, udf: Any) -> Any:
    present = options_of(udf)
    if present is not None:
        if present == options:
            return udf
        raise NonResumableError(
            f"{name_of(udf)} is already decorated with {present}; it cannot be {options} as well. "
            "Decorate it once, or a function that calls it."
        )
    if inspect.isclass(udf):
        if not any("__call__" in vars(base) for base in udf.__mro__):
            raise NonResumableError(
                f"The class {name_of(udf)} has no __call__, so it cannot be a UDF."
            )
        setattr(udf, _MARK, options)
        return udf
    if not callable(udf):
        raise NonResumableError(f"@resumable needs a function or a class, not {udf!r:.80}.")
    if is_async(udf):
        raise NonResumableError(
            f"{name_of(udf)} is an async function, which Ray Data does not run. "
            "Give it a callable class."
        )
    return _marked_function(options, udf)


def _marked_function(options: StageOptions, udf: Any) -> Any:
    # A wrapper, so that the function itself, which may belong to a library, is not marked.
    if inspect.isgeneratorfunction(udf):

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return (yield from udf(*args, **kwargs))

    else:

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return udf(*args, **kwargs)

    functools.update_wrapper(wrapper, udf)
    if isinstance(udf, functools.partial):
        functools.update_wrapper(wrapper, udf.func)
        wrapper.__wrapped__ = udf  # type: ignore[attr-defined]
    setattr(wrapper, _MARK, options)
    return wrapper


def is_async(udf: Any) -> bool:
    """Check for a coroutine function or an async generator function."""
    return inspect.iscoroutinefunction(udf) or inspect.isasyncgenfunction(udf)


def name_of(udf: Any) -> str:
    """Return the name of a UDF, as messages show it."""
    if isinstance(udf, functools.partial):
        return name_of(udf.func)
    return str(getattr(udf, "__name__", type(udf).__name__))
