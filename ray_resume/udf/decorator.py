"""The decorator: it marks a UDF, and has no other effect.

`resumable_write` finds the mark (:func:`options_of`) when it arms a pipeline, and runs the UDF
through `stage`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

from ray_resume.errors import NonResumableError
from ray_resume.raydata.llm import is_processor
from ray_resume.udf.marks import (
    StageOptions,
    is_async,
    marked_function,
    name_of,
    options_of,
    set_mark,
)
from ray_resume.udf.processors import decorated_processor

__all__ = ["StageOptions", "is_async", "name_of", "options_of", "resumable"]

_ON_ERROR = ("raise", "mark_failed", "dead_letter")

F = TypeVar("F", bound=Callable[..., Any])


@overload
def resumable(
    udf: F,
    *,
    one_to_one: bool = ...,
    origin: str | None = ...,
    by: str | None = ...,
    sink: bool = ...,
    on_error: str = ...,
    isolate: bool = ...,
    version: str | None = ...,
) -> F: ...
@overload
def resumable(
    *,
    one_to_one: bool = ...,
    origin: str | None = ...,
    by: str | None = ...,
    sink: bool = ...,
    on_error: str = ...,
    isolate: bool = ...,
    version: str | None = ...,
) -> Callable[[F], F]: ...
def resumable(
    udf: F | None = None,
    *,
    one_to_one: bool = False,
    origin: str | None = None,
    by: str | None = None,
    sink: bool = False,
    on_error: str = "raise",
    isolate: bool = False,
    version: str | None = None,
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

    A processor of ``ray.data.llm`` becomes one whose stages are all decorated: see the guide
    ``examples/llm_batch_inference.md``. The processor that is given stays as it was.

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
        by: the name of a column of the input that the UDF returns with its rows: an id, a path, a
            URL. The value says which source a row comes from, so batches stay whole for filters,
            fan-outs and shuffles. Rows with other values, or without the column, are an error. If
            rows of two sources in a batch share a value, the UDF gets each of these sources alone.
            Null and NaN are one value, and so are 0.0 and -0.0. The column may come back as another
            type (integers as floats, times in nanoseconds, categories as texts) if that holds each
            value exactly. Nested values (lists, structs, tensors) and Python objects are refused.
            Of several rows with one failed value, output leaves as long as one has not failed.
            Row-wise UDFs have no need of it, nor of the two options above: they ignore them.
        sink: the UDF itself makes its input durable before it returns, in a system of its own;
            what it returns is discarded. It is the last operator, and ``resumable_write(ds)`` has
            no other sink. At least once: rows of a source that did not complete come again.
        on_error: what becomes of the input rows of a call that raised an ``Exception``.
            ``"raise"``: the job fails as plain Ray Data would, and what was complete stays
            complete. ``"mark_failed"``: they are failed (see :func:`mark_failed`), and the job goes
            on. ``"dead_letter"``: they are written, with the error, to the checkpoint's dead
            letters, and their sources can complete; so are rows given to ``mark_failed``. If a
            generator raises, all input rows of its call fail, since more output could have come of
            each. Its earlier outputs stay, but for the last one. With ``one_to_one``, all outputs
            stay, and only the input rows after them fail. In a row-wise UDF a call is a row. An
            error that ``DataContext.retried_map_errors`` names is retried first;
            ``actor_task_retry_on_errors``, which retries without a limit, sees none of those that
            ``on_error`` catches.
        isolate: when a call of many rows raises, call the UDF again with either half of them, and
            so on, until it finds the bad rows. It needs ``on_error="mark_failed"`` or
            ``"dead_letter"``. One bad image of 256 costs 16 more calls, and fails alone. Only for
            UDFs that may be called twice with the same rows.
        version: a name for what the UDF does: of a model, a prompt, a date. With another one it is
            another pipeline, and ``on_pipeline_change`` of ``resumable_read`` says what becomes of
            the sources of the earlier one. ``"restart"`` processes them again, and only them.

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


        @resumable(by="path")  # drops rows, from whole batches
        def sharp(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            keep = sharpness(batch["image"]) > 0.5
            return {name: values[keep] for name, values in batch.items()}
    """
    for option, column in (("origin", origin), ("by", by)):
        if column is not None and (not isinstance(column, str) or not column):
            raise ValueError(f"{option} must be the name of a column, not {column!r}")
    if version is not None and (not isinstance(version, str) or not version):
        raise ValueError(f"version must be a text, not {version!r}")
    if one_to_one + (origin is not None) + (by is not None) > 1:
        raise ValueError(
            "one_to_one=True, by= and origin= exclude each other: each says where rows come from"
        )
    if sink and (one_to_one or origin is not None or by is not None):
        raise ValueError("sink=True excludes one_to_one, by and origin: it has no output rows")
    if on_error not in _ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(_ON_ERROR)}, not {on_error!r}")
    if isolate and on_error == "raise":
        raise ValueError('isolate=True needs on_error="mark_failed" or on_error="dead_letter"')
    options = StageOptions(one_to_one, origin, by, sink, on_error, isolate, version)
    return functools.partial(_decorate, options) if udf is None else _decorate(options, udf)


def _decorate(options: StageOptions, udf: Any) -> Any:
    present = options_of(udf)
    if present is not None:
        if present == options:
            return udf
        way_out = (
            "A class carries its options itself: decorate a class derived from it for the others"
            if inspect.isclass(udf)
            else "Decorate the function that it was made of, or one that calls it"
        )
        raise NonResumableError(
            f"{name_of(udf)} is already decorated, by {present}. It cannot be decorated by "
            f"{options} as well. {way_out}."
        )
    if is_processor(udf):
        return decorated_processor(options, udf)
    if inspect.isclass(udf):
        if not any("__call__" in vars(base) for base in udf.__mro__):
            raise NonResumableError(
                f"The class {name_of(udf)} has no __call__, so it cannot be a UDF."
            )
        set_mark(udf, options)
        return udf
    if not callable(udf):
        raise NonResumableError(f"@resumable needs a function or a class, not {udf!r:.80}.")
    if is_async(udf):
        raise NonResumableError(
            f"{name_of(udf)} is an async function, which Ray Data does not run. "
            "Give it a callable class."
        )
    return marked_function(options, udf)
