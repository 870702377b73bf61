"""The decorator, and what an armed pipeline runs in the place of a decorated UDF.

A decorated UDF is the user's own, with a mark on it that :func:`options_of` finds. Nothing else
happens until `resumable_write` arms the pipeline: then :func:`armed` makes, from the UDF and the
ledger's client, a callable of the same name that takes the two columns off each batch, calls the
UDF, and puts them on what it returned. So outside an armed pipeline there is no effect at all.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import GeneratorType
from typing import Any, TypeVar, overload

from ray_resume.core.messages import DeadLetter, Failure
from ray_resume.errors import NonResumableError
from ray_resume.failpoints import failpoint
from ray_resume.raydata import blocks
from ray_resume.raydata.user_batches import Outputs, deep_copied
from ray_resume.run.client import LedgerClient
from ray_resume.udf import row_udfs
from ray_resume.udf.accounting import END, Attribution, FailedRows, Step, StepKind, Steps, account
from ray_resume.udf.failures import Raised, Scope

__all__ = ["StageOptions", "armed", "armed_predicate", "options_of", "resumable"]

_MARK = "__ray_resume_stage__"

_ON_ERROR = ("raise", "mark_failed", "dead_letter")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class StageOptions:
    """What the decorator was told."""

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

    Outside ``resumable_write`` it has no effect. **The contract: what a call returns comes from
    that call's rows, and nothing is kept for a later call.** A UDF that buffers, deduplicates or
    aggregates over calls must stay undecorated; nothing can detect it, and its rows would be lost
    after a crash. What a UDF does besides (files, requests) it does again for each source that is
    executed again.

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

    Ray Data takes the values that a UDF returns when it would in a plain pipeline, or earlier:
    those of async UDFs as soon as they are returned. A batch of ``map_batches`` with rows of
    several sources is given to the UDF in parts, one call for each source, unless an option says
    how output rows and input rows belong together:

    Args:
        one_to_one: output row i comes from input row i. Batches stay whole; another number of
            rows is an error.
        origin: the name of a column with the position (``int64``, 0 .. n-1) of each row in the
            call's input, which the UDF gets beside the others and returns with its rows: for
            filters, fan-outs and shuffles on whole batches. It does not reach the next stage.
        sink: the UDF itself makes its input durable before it returns, in a system of its own;
            what it returns is discarded. It is the last operator, and ``resumable_write(ds)`` has
            no other sink. At least once: rows of a source that did not complete come again.
        on_error: what becomes of the input rows of a call that raised an ``Exception``.
            ``"raise"``: the job fails as plain Ray Data would, and what was complete stays
            complete. ``"mark_failed"``: they are failed (see :func:`mark_failed`), and the job goes
            on. ``"dead_letter"``: they are written, with the error, to the checkpoint's dead
            letters, and their sources can complete; so are rows given to ``mark_failed``. Of a
            generator that raised, what it had yielded before stays; in a row-wise UDF a call is a
            row.
        isolate: with ``on_error="mark_failed"`` or ``"dead_letter"``: when a call of many rows
            raises, call the UDF again with either half of them, and so on, until the rows are
            found that it raises for: one bad image of 256 costs 16 more calls, and fails alone.
            Only for UDFs that may be called twice with the same rows.

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


def armed(udf: Any, client: LedgerClient, kind: str = "map_batches") -> Any:
    """Return what runs, as a UDF for ``map_batches``, in the place of the decorated ``udf``.

    Args:
        kind: the operator that it was given to: ``map_batches``, ``map``, ``filter``, ``flat_map``.
    """
    options = options_of(udf)
    if options is None:
        raise NonResumableError(f"{udf!r} is not decorated with @resumable.")
    name = f"{kind}({_name(udf)})"
    if kind == "map" and inspect.isasyncgenfunction(getattr(udf, "__call__", None)):  # noqa: B004
        # Ray takes any number of rows from one that yields them.
        kind = "flat_map"
    stage = _Stage(kind, *_attribution(kind, options), client, name, options)
    return _armed_class(udf, stage) if inspect.isclass(udf) else _armed_function(udf, stage)


def armed_predicate(expression: Any, client: LedgerClient) -> Any:
    """Return what runs, as a UDF for ``map_batches``, in the place of ``filter(expr=...)``."""
    stage = _Stage("map_batches", Attribution.MASK, None, client, "filter", StageOptions())
    predicate = row_udfs.predicate_udf(expression)

    def filter_rows(batch: Any) -> Any:
        return stage.run(batch, predicate)

    return filter_rows


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
        setattr(udf, _MARK, options)
        return udf
    if not callable(udf):
        raise NonResumableError(f"@resumable needs a function or a class, not {udf!r:.80}.")
    if _is_async(udf):
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


def _attribution(kind: str, options: StageOptions) -> tuple[Attribution, str | None]:
    if options.sink:
        return Attribution.SINK, None
    if kind in row_udfs.ATTRIBUTION:
        return row_udfs.ATTRIBUTION[kind], None
    if options.one_to_one:
        return Attribution.ONE_TO_ONE, None
    if options.origin is not None:
        return Attribution.ORIGIN_COLUMN, options.origin
    return Attribution.BY_SOURCE, None


def _armed_function(udf: Any, stage: _Stage) -> Any:
    def run(batch: Any, /, *args: Any, **kwargs: Any) -> Any:
        return stage.run(batch, lambda part: udf(part, *args, **kwargs))

    run.__name__ = run.__qualname__ = _name(udf)
    return run


def _armed_class(udf: type, stage: _Stage) -> type:
    class Armed:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._udf = udf(*args, **kwargs)

        def __call__(self, batch: Any, /, *args: Any, **kwargs: Any) -> Any:
            return stage.run(batch, lambda part: self._udf(part, *args, **kwargs))

    class AsyncArmed(Armed):
        async def __call__(self, batch: Any, /, *args: Any, **kwargs: Any) -> Any:
            run = stage.run_async(batch, lambda part: self._udf(part, *args, **kwargs))
            async for output in run:
                yield output

    ready = AsyncArmed if _is_async(udf.__call__) else Armed
    ready.__name__ = ready.__qualname__ = udf.__name__
    return ready


def _is_async(udf: Any) -> bool:
    return inspect.iscoroutinefunction(udf) or inspect.isasyncgenfunction(udf)


def _name(udf: Any) -> str:
    if isinstance(udf, functools.partial):
        return _name(udf.func)
    return str(getattr(udf, "__name__", type(udf).__name__))


# The UDF itself returns batches; others return what `row_udfs` makes, or nothing.
_OF_BATCHES = {Attribution.BY_SOURCE, Attribution.ONE_TO_ONE, Attribution.ORIGIN_COLUMN}


@dataclass(frozen=True)
class _Stage:
    """Runs the steps of `accounting.account`. Without state: several threads may use it at once."""

    kind: str
    attribution: Attribution
    origin: str | None
    client: LedgerClient
    name: str
    options: StageOptions

    def run(self, batch: Any, udf: Callable[[Any], Any]) -> Any:
        """Run an armed UDF on one batch: return a batch, or a generator of batches.

        Unless the UDF returns a generator, it is called in here and not later: Ray sees to it that
        the methods of a callable class run in one thread, but not what they return.
        """
        if self.kind in row_udfs.ATTRIBUTION:
            udf = row_udfs.block_udf(self.kind, udf, tolerant=self._tolerant)
        steps = self._account(batch)
        leaving = Outputs(batch)
        emitted: deque[Any] = deque()
        last: list[Any] = []
        outputs: Iterator[Any] = iter(())
        reply: Any = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration:
                emitted += [ready for output in last for ready in leaving.ready(output)]
                emitted += leaving.rest()
                return emitted[0] if len(emitted) == 1 else _given_out(emitted)
            reply = None
            if step.kind is StepKind.CALL:
                # The UDF may fill again what it returned of another source.
                for output in last:
                    emitted += leaving.ready(deep_copied(output))
                last = []
                leaving.called_with(step.value)
                outputs = self._outputs(udf, step)
                if isinstance(outputs, GeneratorType):
                    return self._run_lazily(steps, emitted, leaving, udf, outputs)
            elif step.kind is StepKind.NEXT:
                reply = next(outputs, END)
            elif step.kind is StepKind.EMIT:
                last.append(step.value)
            else:
                self._report(step)

    def _run_lazily(
        self,
        steps: Steps,
        emitted: deque[Any],
        leaving: Outputs,
        udf: Callable[[Any], Any],
        outputs: Iterator[Any],
    ) -> Generator[Any, None, None]:
        yield from _given_out(emitted)
        reply: Any = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration:
                break
            reply = None
            if step.kind is StepKind.CALL:
                leaving.called_with(step.value)
                outputs = self._outputs(udf, step)
            elif step.kind is StepKind.NEXT:
                reply = self._next(outputs, step, leaving)
            elif step.kind is StepKind.EMIT:
                for output in leaving.ready(step.value):
                    yield output
                    failpoint("stage.between_outputs")
            else:
                self._report(step)
        for output in leaving.rest():
            yield output

    async def run_async(self, batch: Any, udf: Callable[[Any], Any]) -> AsyncGenerator[Any, None]:
        """Run an armed coroutine function or async generator function on one batch."""
        if self.kind in row_udfs.ATTRIBUTION:
            udf = row_udfs.block_udf_async(self.kind, udf, tolerant=self._tolerant)
        steps = self._account(batch)
        leaving = Outputs(batch)
        outputs: Any = None
        reply: Any = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration:
                break
            reply = None
            if step.kind is StepKind.CALL:
                leaving.called_with(step.value)
                outputs = await self._outputs_async(udf, step, leaving)
            elif step.kind is StepKind.NEXT:
                reply = await self._next_async(outputs, step, leaving)
            elif step.kind is StepKind.EMIT:
                for output in leaving.ready(step.value):
                    yield output
                    failpoint("stage.between_outputs")
            else:
                await self._report_async(step)
        for output in leaving.rest():
            yield output

    @property
    def _tolerant(self) -> bool:
        return self.options.on_error != "raise"

    def _account(self, batch: Any) -> Steps:
        return account(
            batch,
            self.attribution,
            self.origin,
            keep_input=self.options.on_error == "dead_letter",
            isolate=self.options.isolate,
        )

    def _outputs(self, udf: Callable[[Any], Any], step: Step) -> Iterator[Any]:
        """Call the UDF; return its generator, or an iterator over what else there is to give."""
        with _scope(step):
            try:
                result = udf(step.value)
            except Exception as error:
                if not self._tolerant:
                    raise
                result = Raised(error)
        if isinstance(result, GeneratorType):
            return result
        failpoint("stage.called")
        return iter(() if result is None else (self._checked(result),))

    def _next(self, outputs: Iterator[Any], step: Step, leaving: Outputs) -> Any:
        with _scope(step):
            try:
                output = next((output for output in outputs if output is not None), END)
            except Exception as error:
                if not self._tolerant:
                    raise
                return Raised(error)
        failpoint("stage.called")
        return output if output is END else leaving.kept(self._checked(output))

    async def _outputs_async(self, udf: Callable[[Any], Any], step: Step, leaving: Outputs) -> Any:
        with _scope(step):
            try:
                result = udf(step.value)
                if not inspect.isasyncgen(result):
                    result = await result
            except Exception as error:
                if not self._tolerant:
                    raise
                return iter((Raised(error),))
        failpoint("stage.called")
        if inspect.isasyncgen(result):
            return result
        # Other calls run before this one's output has left.
        return iter(() if result is None else (leaving.kept(self._checked(result)),))

    async def _next_async(self, outputs: Any, step: Step, leaving: Outputs) -> Any:
        if not inspect.isasyncgen(outputs):
            return next(outputs, END)
        with _scope(step):
            try:
                output = await anext(outputs, END)
                while output is None:
                    output = await anext(outputs, END)
            except Exception as error:
                if not self._tolerant:
                    raise
                return Raised(error)
        return output if output is END else leaving.kept(self._checked(output))

    def _checked(self, output: Any) -> Any:
        """Return an output of the user's code, if plain Ray Data takes it."""
        if self.attribution in _OF_BATCHES and not isinstance(output, Raised):
            blocks.check_output(output)
        return output

    def _report(self, step: Step) -> None:
        if step.kind is StepKind.DRAIN:
            failpoint("stage.before_drain")
            self.client.send(*step.value)
            failpoint("stage.after_drain")
            return
        failpoint("stage.before_failures")
        if self.options.on_error == "dead_letter":
            self.client.write_dead_letters(self._letters(step.value))
        else:
            self.client.send(*self._failures(step.value))
        failpoint("stage.after_failures")

    async def _report_async(self, step: Step) -> None:
        if step.kind is StepKind.DRAIN:
            failpoint("stage.before_drain")
            await self.client.send_async(*step.value)
            failpoint("stage.after_drain")
            return
        failpoint("stage.before_failures")
        if self.options.on_error == "dead_letter":
            await self.client.write_dead_letters_async(self._letters(step.value))
        else:
            await self.client.send_async(*self._failures(step.value))
        failpoint("stage.after_failures")

    def _failures(self, failed: Sequence[FailedRows]) -> list[Failure]:
        return [
            Failure(its.source, its.total, len(its.errors), f"{self.name}: {its.errors[0]}")
            for its in failed
        ]

    def _letters(self, failed: Sequence[FailedRows]) -> list[DeadLetter]:
        return [
            DeadLetter.of(its.source, its.total, self.name, blocks.table_of(its.rows), its.errors)
            for its in failed
        ]


def _scope(step: Step) -> Scope:
    assert step.failures is not None
    return Scope(step.failures)


def _given_out(emitted: deque[Any]) -> Generator[Any, None, None]:
    while emitted:
        yield emitted.popleft()
