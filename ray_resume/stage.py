"""The decorator, and what an armed pipeline runs in the place of a decorated UDF.

A decorated UDF is the user's own, with a mark on it that :func:`options_of` finds. Nothing else
happens until `resumable_write` arms the pipeline: then :func:`armed` makes, from the UDF and the
ledger's client, a callable of the same name that takes the two columns off each batch, calls the
UDF, and puts them on what it returned. So outside an armed pipeline there is no effect at all.

Invariant (see `lineage.Call`): of each source, what comes into a call leaves it, in the tokens of
its output rows or as a delta.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from types import GeneratorType
from typing import Any, TypeVar, overload

import numpy as np

from ray_resume import batches
from ray_resume.client import LedgerClient
from ray_resume.errors import NonResumableError
from ray_resume.lineage import Call, SourceArray, TokenArray

__all__ = ["StageOptions", "armed", "options_of", "resumable"]

_MARK = "__ray_resume_stage__"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class StageOptions:
    """What the decorator was told."""

    one_to_one: bool = False
    origin: str | None = None


@overload
def resumable(udf: F, *, one_to_one: bool = ..., origin: str | None = ...) -> F: ...
@overload
def resumable(*, one_to_one: bool = ..., origin: str | None = ...) -> Callable[[F], F]: ...
def resumable(
    udf: F | None = None, *, one_to_one: bool = False, origin: str | None = None
) -> F | Callable[[F], F]:
    """Declare that a UDF for ``map_batches`` may be part of a resumable pipeline.

    For functions, generator functions and callable classes, in numpy, pandas and pyarrow batch
    formats. Outside ``resumable_write`` it has no effect. The contract: **what a call returns
    comes from that call's rows, and nothing is kept for a later call.** A UDF that buffers,
    deduplicates or aggregates over calls must stay undecorated; nothing can detect it, and its
    rows would be lost after a crash.

    A call may return any number of rows, or ``None`` for none. A batch with rows of several
    sources is given to the UDF in parts, one call for each source, unless an option says how
    output rows and input rows belong together:

    Args:
        one_to_one: output row i comes from input row i. Batches stay whole; another number of
            rows is an error.
        origin: the name of a column with the position (``int64``, 0 .. n-1) of each row in the
            call's input, which the UDF gets beside the others and returns with its rows: for
            filters, fan-outs and shuffles on whole batches. It does not reach the next stage.

    Raises:
        NonResumableError: the object cannot be a UDF, or carries other options already.
        ValueError: the options contradict each other.

    Example::

        @resumable
        def clean(batch: pd.DataFrame) -> pd.DataFrame:
            return batch[batch["text"].str.len() > 0]
    """
    if one_to_one and origin is not None:
        raise ValueError(
            "one_to_one=True and origin= exclude each other: both say where rows come from"
        )
    if origin is not None and (not isinstance(origin, str) or not origin):
        raise ValueError(f"origin must be the name of a column, not {origin!r}")
    options = StageOptions(one_to_one, origin)
    return functools.partial(_decorate, options) if udf is None else _decorate(options, udf)


def options_of(udf: Any) -> StageOptions | None:
    """Return what ``udf`` was decorated with, or None if it was not."""
    if isinstance(udf, functools.partial):
        return options_of(udf.func)
    # A subclass of a decorated class may keep rows for later: it is asked to decorate itself.
    mark = vars(udf).get(_MARK) if inspect.isclass(udf) else getattr(udf, _MARK, None)
    return mark if isinstance(mark, StageOptions) else None


def armed(udf: Any, client: LedgerClient) -> Any:
    """Return what runs in the place of the decorated ``udf``: of the same kind and name."""
    options = options_of(udf)
    if options is None:
        raise NonResumableError(f"{udf!r} is not decorated with @resumable.")
    if inspect.isclass(udf):
        return _armed_class(udf, _Stage(options, client))
    return _armed_function(udf, _Stage(options, client))


def _decorate(options: StageOptions, udf: Any) -> Any:
    present = options_of(udf)
    if present is not None:
        if present == options:
            return udf
        raise NonResumableError(
            f"{_name(udf)} is already decorated with {present}; it cannot be {options} as well. "
            "Decorate it once, or a function that calls it."
        )
    if inspect.isclass(udf):
        if not any("__call__" in vars(base) for base in udf.__mro__):
            raise NonResumableError(
                f"The class {_name(udf)} has no __call__, so it cannot be a UDF."
            )
        call = inspect.getattr_static(udf, "__call__", None)
        if inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call):
            raise NonResumableError(
                f"{_name(udf)}.__call__ is async, which this version of ray_resume does not make "
                "resumable. Make it a plain method."
            )
        setattr(udf, _MARK, options)
        return udf
    if not callable(udf):
        raise NonResumableError(f"@resumable needs a function or a class, not {udf!r}.")
    if inspect.iscoroutinefunction(udf) or inspect.isasyncgenfunction(udf):
        raise NonResumableError(
            f"{_name(udf)} is an async function, which Ray Data does not run. "
            "Give it a callable class."
        )
    return _marked_function(options, udf)


def _marked_function(options: StageOptions, udf: Any) -> Any:
    # A wrapper, so that the function itself, which may be somebody else's, is not marked.
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


def _armed_function(udf: Any, stage: _Stage) -> Any:
    def run(batch: Any, *args: Any, **kwargs: Any) -> Any:
        return stage.run(batch, lambda part: udf(part, *args, **kwargs))

    run.__name__ = run.__qualname__ = _name(udf)
    return run


def _armed_class(udf: type, stage: _Stage) -> type:
    class Armed:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._udf = udf(*args, **kwargs)

        def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
            return stage.run(batch, lambda part: self._udf(part, *args, **kwargs))

    Armed.__name__ = Armed.__qualname__ = udf.__name__
    return Armed


def _name(udf: Any) -> str:
    if isinstance(udf, functools.partial):
        return _name(udf.func)
    return str(getattr(udf, "__name__", type(udf).__name__))


@dataclass(frozen=True)
class _Stage:
    """Runs one call of an armed UDF on one batch. Without state: several threads may use it."""

    options: StageOptions
    client: LedgerClient

    def run(self, batch: Any, udf: Callable[[Any], Any]) -> Any:
        """Return a batch, or a generator of batches: what Ray takes from a UDF."""
        rows, sources, tokens = batches.detach(batch)
        if len(sources) == 0:
            return batch
        if self.options.one_to_one:
            return self._one_to_one(rows, sources, tokens, udf)
        if self.options.origin is not None:
            return self._with_origin(rows, sources, tokens, udf, self.options.origin)
        if _one_source(sources):
            return self._one_source(rows, sources, tokens, udf)
        return self._source_by_source(rows, sources, tokens, udf)

    def _one_source(
        self, rows: Any, sources: SourceArray, tokens: TokenArray, udf: Callable[[Any], Any]
    ) -> Any:
        source = sources[0]

        def attribute(output: Any) -> tuple[Any, SourceArray]:
            return output, np.full(batches.num_rows(output), source, dtype=np.int32)

        return self._account(Call(sources, tokens), udf(rows), attribute)

    def _source_by_source(
        self, rows: Any, sources: SourceArray, tokens: TokenArray, udf: Callable[[Any], Any]
    ) -> Generator[Any, None, None]:
        for _, part, positions in batches.split(rows, sources):
            result = self._one_source(part, sources[positions], tokens[positions], udf)
            if isinstance(result, GeneratorType):
                yield from result
            else:
                yield result

    def _with_origin(
        self,
        rows: Any,
        sources: SourceArray,
        tokens: TokenArray,
        udf: Callable[[Any], Any],
        name: str,
    ) -> Any:
        n = len(sources)
        if name in batches.names(rows):
            raise ValueError(
                f"The batch has a column {name!r} already. Give @resumable(origin=...) a name "
                "that no column has."
            )

        def attribute(output: Any) -> tuple[Any, SourceArray]:
            origins = _origins(output, name, n)
            given = (name,) if name in batches.names(output) else ()
            return batches.without_columns(output, given), sources[origins]

        numbered = batches.with_column(rows, name, np.arange(n, dtype=np.int64))
        return self._account(Call(sources, tokens), udf(numbered), attribute)

    def _one_to_one(
        self, rows: Any, sources: SourceArray, tokens: TokenArray, udf: Callable[[Any], Any]
    ) -> Any:
        result = udf(rows)
        if isinstance(result, GeneratorType):
            return self._one_to_one_parts(result, sources, tokens)
        _check_one_to_one(0 if result is None else batches.num_rows(result), len(sources))
        return batches.attach(result, sources, tokens)

    def _one_to_one_parts(
        self, results: Iterator[Any], sources: SourceArray, tokens: TokenArray
    ) -> Generator[Any, None, None]:
        start = 0
        for output in results:
            if output is None:
                continue
            stop = start + batches.num_rows(output)
            if stop > len(sources):
                _check_one_to_one(stop, len(sources))
            yield batches.attach(output, sources[start:stop], tokens[start:stop])
            start = stop
        _check_one_to_one(start, len(sources))

    def _account(
        self,
        call: Call,
        result: Any,
        attribute: Callable[[Any], tuple[Any, SourceArray]],
    ) -> Any:
        if isinstance(result, GeneratorType):
            return self._account_parts(call, result, attribute)
        if result is None:
            self.client.drain(call.finish(_NO_SOURCES)[1])
            return _nothing()
        output, sources = attribute(result)
        tokens, deltas = call.finish(sources)
        self.client.drain(deltas)
        return batches.attach(output, sources, tokens)

    def _account_parts(
        self,
        call: Call,
        results: Iterator[Any],
        attribute: Callable[[Any], tuple[Any, SourceArray]],
    ) -> Generator[Any, None, None]:
        # The last batch with rows is held back, since it takes what remains, and only the end of
        # the generator tells which one it is.
        held: tuple[Any, SourceArray] | None = None
        for result in results:
            if result is None:
                continue
            output, sources = attribute(batches.shallow_copy(result))
            if len(sources) == 0:
                yield batches.attach(output, sources, _NO_TOKENS)
                continue
            if held is not None:
                yield batches.attach(*held, call.emit(held[1]))
            held = output, sources
        tokens, deltas = call.finish(_NO_SOURCES if held is None else held[1])
        self.client.drain(deltas)
        if held is not None:
            yield batches.attach(*held, tokens)


_NO_SOURCES: SourceArray = np.empty(0, dtype=np.int32)
_NO_TOKENS: TokenArray = np.empty(0, dtype=np.uint64)


def _nothing() -> Generator[Any, None, None]:
    yield from ()


def _one_source(sources: SourceArray) -> bool:
    return bool(sources[0] == sources[-1] and (sources == sources[0]).all())


def _check_one_to_one(rows_out: int, rows_in: int) -> None:
    if rows_out != rows_in:
        raise ValueError(
            f"A UDF with @resumable(one_to_one=True) returned {rows_out} rows for {rows_in} rows. "
            "If it drops or adds rows, decorate it without one_to_one."
        )


def _origins(output: Any, name: str, rows_in: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    if batches.num_rows(output) == 0:
        return np.empty(0, dtype=np.int64)
    if name not in batches.names(output):
        raise ValueError(
            f"A UDF with @resumable(origin={name!r}) returned rows without the column {name!r}. "
            "Return it with each row: the position of the input row that it comes from."
        )
    origins = np.asarray(batches.column(output, name))
    if not np.issubdtype(origins.dtype, np.integer):
        raise ValueError(f"The column {name!r} came back as {origins.dtype}, not as integers.")
    if origins.min() < 0 or origins.max() >= rows_in:
        raise ValueError(
            f"The column {name!r} came back with values from {origins.min()} to {origins.max()}, "
            f"outside 0 .. {rows_in - 1}."
        )
    return origins.astype(np.int64, copy=False)
