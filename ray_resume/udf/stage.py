"""Run a decorated UDF in an armed pipeline, and account for its rows.

:func:`instrument` makes, from the UDF and the ledger's client, a callable of the same name. It
takes the two columns off each batch, calls the UDF, and puts them on what the UDF returned.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import GeneratorType
from typing import Any

from typing_extensions import override

from ray_resume.core.messages import DeadLetter, Failure
from ray_resume.core.stages import Stage
from ray_resume.errors import NonResumableError
from ray_resume.failpoints import failpoint
from ray_resume.raydata import blocks
from ray_resume.raydata.pacing import at_task_end, by_source
from ray_resume.raydata.pool_actors import no_exit
from ray_resume.raydata.retries import retries_of, retries_some
from ray_resume.raydata.user_batches import Outputs, deep_copied
from ray_resume.run.client import LedgerClient, Reply
from ray_resume.udf import row_udfs
from ray_resume.udf.accounting import account_call
from ray_resume.udf.decorator import StageOptions, is_async, name_of, options_of
from ray_resume.udf.failures import Raised, Scope
from ray_resume.udf.metering import Meter
from ray_resume.udf.steps import END, Attribution, FailedRows, Step, StepKind, Steps

__all__ = ["instrument", "instrument_predicate", "stage_of", "version_of"]


def stage_of(udf: Any, kind: str, batch_size: int | None) -> Stage:
    """Describe the decorated ``udf`` that the method ``kind`` got, as a stage of a pipeline."""
    attribution, column = _attribution(kind, options_of(udf) or StageOptions())
    by_source = attribution is Attribution.BY_SOURCE
    by_column = column if attribution is Attribution.BY_COLUMN else None
    return Stage(_title(udf, kind), batch_size, by_source, by_column)


def version_of(udf: Any) -> str | None:
    """Return the version that ``udf`` was decorated with."""
    return (options_of(udf) or StageOptions()).version


def instrument(
    udf: Any, client: LedgerClient, kind: str = "map_batches", position: int | None = None
) -> Any:
    """Return a UDF for ``map_batches`` that runs in the place of the decorated ``udf``.

    Args:
        kind: the method that got the UDF: ``map_batches``, ``map``, ``filter`` or ``flat_map``.
        position: the stage's in the pipeline; without one, nothing is counted.
    """
    options = options_of(udf)
    if options is None:
        raise NonResumableError(f"{udf!r} is not decorated with @resumable.")
    name = _title(udf, kind)
    if kind == "map" and inspect.isasyncgenfunction(getattr(udf, "__call__", None)):  # noqa: B004
        # Ray takes any number of rows from one that yields them.
        kind = "flat_map"
    meter = None
    if position is not None:
        per_row, to_letters = kind in row_udfs.ATTRIBUTION, options.on_error == "dead_letter"
        meter = Meter(client.run_id, position, per_row, to_letters)
    runner = UdfRunner(kind, *_attribution(kind, options), client, name, options, meter)
    make = _instrumented_class if inspect.isclass(udf) else _instrumented_function
    made = make(udf, runner)
    if meter is not None:
        at_task_end(made, partial(meter.report, client))
    return made if runner.attribution in _OF_WHOLE_BATCHES else by_source(made)


def instrument_predicate(expression: Any, client: LedgerClient) -> Any:
    """Return a UDF for ``map_batches`` that runs in the place of ``filter(expr=...)``."""
    runner = UdfRunner("map_batches", Attribution.MASK, None, client, "filter", StageOptions())
    predicate = row_udfs.predicate_udf(expression)

    def filter_rows(batch: Any) -> Any:
        return runner.run(batch, predicate)

    return by_source(filter_rows)


def _title(udf: Any, kind: str) -> str:
    return f"{kind}({name_of(udf)})"


def _attribution(kind: str, options: StageOptions) -> tuple[Attribution, str | None]:
    if options.sink:
        return Attribution.SINK, None
    if kind in row_udfs.ATTRIBUTION:
        return row_udfs.ATTRIBUTION[kind], None
    if options.one_to_one:
        return Attribution.ONE_TO_ONE, None
    if options.origin is not None:
        return Attribution.ORIGIN_COLUMN, options.origin
    if options.by is not None:
        return Attribution.BY_COLUMN, options.by
    return Attribution.BY_SOURCE, None


def _instrumented_function(udf: Any, runner: UdfRunner) -> Any:
    def run(batch: Any, /, *args: Any, **kwargs: Any) -> Any:
        return runner.run(batch, lambda part: udf(part, *args, **kwargs))

    run.__name__ = run.__qualname__ = name_of(udf)
    return run


def _instrumented_class(udf: type, runner: UdfRunner) -> type:
    class Instrumented:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with no_exit(udf.__name__):
                self._udf = udf(*args, **kwargs)

        def __call__(self, batch: Any, /, *args: Any, **kwargs: Any) -> Any:
            return runner.run(batch, lambda part: self._udf(part, *args, **kwargs))

    class AsyncInstrumented(Instrumented):
        @override
        async def __call__(self, batch: Any, /, *args: Any, **kwargs: Any) -> Any:
            run = runner.run_async(batch, lambda part: self._udf(part, *args, **kwargs))
            async for output in run:
                yield output

    made = AsyncInstrumented if is_async(udf.__call__) else Instrumented
    made.__name__ = made.__qualname__ = udf.__name__
    return made


# The UDF gets batches as Ray cuts them.
_OF_WHOLE_BATCHES = {Attribution.ONE_TO_ONE, Attribution.ORIGIN_COLUMN, Attribution.BY_COLUMN}

# The UDF itself returns batches; others return what `row_udfs` makes, or nothing.
_OF_BATCHES = {Attribution.BY_SOURCE, *_OF_WHOLE_BATCHES}


@dataclass(frozen=True)
class UdfRunner:
    """Runs the steps of `accounting.account_call`. Stateless: several threads may use it at once.

    Attributes:
        column: its name, for ``Attribution.ORIGIN_COLUMN`` and ``BY_COLUMN``.
        name: the stage, as messages name it.
    """

    kind: str
    attribution: Attribution
    column: str | None
    client: LedgerClient
    name: str
    options: StageOptions
    meter: Meter | None = None

    def run(self, batch: Any, udf: Callable[[Any], Any]) -> Any:
        """Run an instrumented UDF on one batch: return a batch, or a generator of batches.

        Unless the UDF returns a generator, this method calls it before it returns. Ray runs the
        methods of a callable class in one thread, but not the generators that they return.
        """
        if self.kind in row_udfs.ATTRIBUTION:
            udf = row_udfs.block_udf(self.kind, udf, tolerant=self._tolerant)
        steps = self._steps(batch)
        leaving = Outputs(batch)
        emitted: deque[Any] = deque()
        last: list[Any] = []
        outputs: Iterator[Any] = iter(())
        reply: Any = None
        while (step := _next_step(steps, reply)) is not None:
            reply = None
            if step.kind is StepKind.CALL:
                # The UDF may refill what it returned for another source.
                for output in last:
                    emitted += leaving.ready(deep_copied(output))
                last = []
                leaving.called_with(step.value)
                outputs = self._call(udf, step)
                if isinstance(outputs, GeneratorType):
                    return self._run_lazily(steps, emitted, leaving, udf, outputs)
            elif step.kind is StepKind.NEXT:
                reply = next(outputs, END)
            elif step.kind is StepKind.PAUSE:
                time.sleep(step.value)
            elif step.kind is StepKind.EMIT:
                last.append(step.value)
            else:
                self._report(step).wait()
                _reported(step)
        emitted += [ready for output in last for ready in leaving.ready(output)]
        emitted += leaving.rest()
        return emitted[0] if len(emitted) == 1 else _drain_outputs(emitted)

    def _run_lazily(
        self,
        steps: Steps,
        emitted: deque[Any],
        leaving: Outputs,
        udf: Callable[[Any], Any],
        outputs: Iterator[Any],
    ) -> Generator[Any, None, None]:
        yield from _drain_outputs(emitted)
        reply: Any = None
        while (step := _next_step(steps, reply)) is not None:
            reply = None
            if step.kind is StepKind.CALL:
                leaving.called_with(step.value)
                outputs = self._call(udf, step)
            elif step.kind is StepKind.NEXT:
                with self._scope(step) as scope:
                    scope.result = next((output for output in outputs if output is not None), END)
                reply = self._taken(scope.result, leaving)
            elif step.kind is StepKind.PAUSE:
                time.sleep(step.value)
            elif step.kind is StepKind.EMIT:
                for output in leaving.ready(step.value):
                    yield output
                    failpoint("stage.between_outputs")
            else:
                self._report(step).wait()
                _reported(step)
        yield from leaving.rest()

    async def run_async(self, batch: Any, udf: Callable[[Any], Any]) -> AsyncGenerator[Any, None]:
        """Run an instrumented coroutine function or async generator function on one batch."""
        if self.kind in row_udfs.ATTRIBUTION:
            udf = row_udfs.block_udf_async(self.kind, udf, tolerant=self._tolerant)
        steps = self._steps(batch)
        leaving = Outputs(batch)
        outputs: Any = None
        reply: Any = None
        while (step := _next_step(steps, reply)) is not None:
            reply = None
            if step.kind is StepKind.CALL:
                leaving.called_with(step.value)
                outputs = await self._call_async(udf, step)
            elif step.kind is StepKind.NEXT:
                with self._scope(step) as scope:
                    scope.result = await anext(outputs, END)
                    while scope.result is None:
                        scope.result = await anext(outputs, END)
                # Other calls run before this one's output has left.
                reply = self._taken(scope.result, leaving)
            elif step.kind is StepKind.PAUSE:
                await asyncio.sleep(step.value)
            elif step.kind is StepKind.EMIT:
                for output in leaving.ready(step.value):
                    yield output
                    failpoint("stage.between_outputs")
            else:
                await self._report(step)
                _reported(step)
        for output in leaving.rest():
            yield output

    @property
    def _tolerant(self) -> bool:
        return self.options.on_error != "raise"

    def _steps(self, batch: Any) -> Steps:
        by_call = self._tolerant and self.kind not in row_udfs.ATTRIBUTION
        steps = account_call(
            batch,
            self.attribution,
            self.column,
            keep_input=self.options.on_error == "dead_letter",
            isolate=self.options.isolate,
            # Row-wise UDFs are retried row by row. Ray Data retries errors that are not caught
            # here.
            retries_of=retries_of if by_call and retries_some() else None,
        )
        if self.meter is None or (rows := blocks.num_rows(batch)) == 0:
            return steps
        return self.meter.metered(steps, rows)

    def _scope(self, step: Step) -> Scope:
        assert step.failures is not None
        return Scope(step.failures, tolerant=self._tolerant)

    def _call(self, udf: Callable[[Any], Any], step: Step) -> Iterator[Any]:
        """Call the UDF; return its generator, or an iterator over its one output, if it has one."""
        with self._scope(step) as scope:
            scope.result = udf(step.value)
        if isinstance(scope.result, GeneratorType):
            return scope.result
        failpoint("stage.called")
        return iter(() if scope.result is None else (self._checked(scope.result),))

    async def _call_async(self, udf: Callable[[Any], Any], step: Step) -> AsyncGenerator[Any, None]:
        with self._scope(step) as scope:
            result = udf(step.value)
            scope.result = result if inspect.isasyncgen(result) else _only(await result)
        # A tolerant scope has kept what the UDF raised.
        return _only(scope.result) if isinstance(scope.result, Raised) else scope.result

    def _taken(self, output: Any, leaving: Outputs) -> Any:
        """Return an output such that the next step of the user's code cannot change it."""
        failpoint("stage.called")
        if output is END or isinstance(output, Raised):
            return output
        output = self._checked(output)
        # As a block, values may be others than those that came in: bytes without a NUL at their
        # end, times in the place of days.
        as_it_is = self.attribution is Attribution.BY_COLUMN
        return deep_copied(output) if as_it_is else leaving.kept(output)

    def _checked(self, output: Any) -> Any:
        """Return an output of the user's code, if plain Ray Data takes it."""
        if self.attribution in _OF_BATCHES and not isinstance(output, Raised):
            blocks.check_output(output)
        return output

    def _report(self, step: Step) -> Reply:
        """Send what a step reports. The runner waits for the reply."""
        if step.kind is StepKind.DRAIN:
            failpoint("stage.before_drain")
            return self.client.submit(*step.value)
        failpoint("stage.before_failures")
        if self.options.on_error == "dead_letter":
            return self.client.submit_dead_letters(self._dead_letters(step.value))
        return self.client.submit(*self._failures(step.value))

    def _failures(self, failed: Sequence[FailedRows]) -> list[Failure]:
        return [
            Failure(its.source, its.total, len(its.errors), f"{self.name}: {its.errors[0]}")
            for its in failed
        ]

    def _dead_letters(self, failed: Sequence[FailedRows]) -> list[DeadLetter]:
        return [
            DeadLetter.of(its.source, its.total, self.name, blocks.table_of(its.rows), its.errors)
            for its in failed
        ]


def _reported(step: Step) -> None:
    if step.kind is StepKind.DRAIN:
        failpoint("stage.after_drain")
    else:
        failpoint("stage.after_failures")


def _next_step(steps: Steps, reply: Any) -> Step | None:
    try:
        return steps.send(reply)
    except StopIteration:
        return None


def _drain_outputs(emitted: deque[Any]) -> Generator[Any, None, None]:
    while emitted:
        yield emitted.popleft()


async def _only(output: Any) -> AsyncGenerator[Any, None]:
    yield output
