"""Row-wise UDFs as block-wise ones, so that nothing is sent row by row.

Each function takes a UDF for ``map``, ``filter`` or ``flat_map`` and returns one that takes a block
and returns what `accounting` accounts for. The async ones keep as many rows in flight as Ray does.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, cast

import numpy as np

from ray_resume.raydata import blocks
from ray_resume.raydata.retries import backoff_s, retries_of, retries_some
from ray_resume.udf.failures import Failures, Raised, Scope, current_scope
from ray_resume.udf.steps import Attribution, Kept, RowsWithOrigins

__all__ = ["ATTRIBUTION", "block_udf", "block_udf_async", "predicate_udf"]

Row = dict[str, Any]

ATTRIBUTION = {
    "map": Attribution.ONE_TO_ONE,
    "filter": Attribution.MASK,
    "flat_map": Attribution.FLATTENED,
}
"""How the rows of each row-wise operator are attributed: exactly, by nature."""

# As many as Ray allows to an async row-wise UDF (DEFAULT_ASYNC_ROW_UDF_MAX_CONCURRENCY).
_CONCURRENT_ROWS = 16


def block_udf(kind: str, udf: Callable[[Row], Any], *, tolerant: bool) -> Callable[[Any], Any]:
    """Make a UDF for whole blocks of one for rows; ``kind`` is a key of :data:`ATTRIBUTION`.

    The block takes the values of each row before the UDF runs again, as in plain Ray Data. So a
    UDF may return the same dict each time.

    If it is ``tolerant``, a row that it raises for is marked as failed, once it has been retried as
    often as the user wants.
    """
    outputs_of = _OUTPUTS[kind]

    def call(row: Row) -> Sequence[Row]:
        return outputs_of(row, udf(row))

    def run(block: Any) -> Any:
        scope = current_scope()
        failed = scope.failures.mask
        origins: list[int] = []
        call_row = partial(_call_with_retries, call) if tolerant and retries_some() else call

        def outputs() -> Iterator[Row]:
            for number, row in enumerate(blocks.rows_of(block)):
                scope.row = number
                try:
                    given = call_row(row)
                except Exception as error:
                    if not tolerant:
                        raise
                    scope.failures.mark(error, number)
                    continue
                if not failed[number]:
                    for output in given:
                        origins.append(number)
                        yield output
            scope.row = None

        rows = blocks.block_of(outputs())
        return _attributed(kind, rows, origins, len(failed))

    return run


def block_udf_async(
    kind: str, udf: Callable[[Row], Any], *, tolerant: bool
) -> Callable[[Any], Awaitable[Any]]:
    """As :func:`block_udf`, for a coroutine function or an async generator function.

    Several rows are in flight, and a row is copied as it leaves the UDF.
    """
    outputs_of = _OUTPUTS[kind]

    async def call(failures: Failures, number: int, row: Row) -> Scope:
        with Scope(failures, number, tolerant=tolerant) as scope:
            result = udf(row)
            if inspect.isasyncgen(result):
                scope.result = [dict(_checked(output)) async for output in result]
            else:
                scope.result = [dict(output) for output in outputs_of(row, await result)]
        return scope

    async def run(block: Any) -> Any:
        failures = current_scope().failures
        places = asyncio.Semaphore(_CONCURRENT_ROWS)
        retries = tolerant and retries_some()

        async def one(number: int, row: Row) -> Sequence[Row]:
            async with places:
                for attempt in itertools.count():
                    scope = await call(failures, number, deepcopy(row) if retries else row)
                    raised = scope.result
                    if not isinstance(raised, Raised) or attempt >= retries_of(raised.error):
                        break
                    await asyncio.sleep(backoff_s(attempt))
            if isinstance(scope.result, Raised):
                failures.mark(scope.result.error, number)
                return ()
            outputs: Sequence[Row] = scope.result
            return outputs

        rows = enumerate(blocks.rows_of(block))
        results = await asyncio.gather(*(one(number, row) for number, row in rows))
        fine = np.flatnonzero(~failures.mask).tolist()
        origins = [number for number in fine for _ in results[number]]
        block = blocks.block_of(output for number in fine for output in results[number])
        return _attributed(kind, block, origins, len(results))

    return run


def predicate_udf(expression: Any) -> Callable[[Any], Kept]:
    """Make a UDF that keeps the rows of a block that satisfy a Ray Data expression."""

    def run(block: Any) -> Kept:
        mask = blocks.mask_of(expression, block)
        return Kept(block if mask.all() else blocks.take(block, mask), mask)

    return run


def _call_with_retries(call: Callable[[Row], Sequence[Row]], row: Row) -> Sequence[Row]:
    """Call a UDF with a row as it came in, as often as the user wants if it raises an error."""
    attempt = 0
    while True:
        try:
            return call(deepcopy(row))
        except Exception as error:
            if attempt >= retries_of(error):
                raise
        time.sleep(backoff_s(attempt))
        attempt += 1


def _mapped(_: Row, result: Any) -> Sequence[Row]:
    return (_checked(result),)


def _filtered(row: Row, result: Any) -> Sequence[Row]:
    # The row itself, which the UDF may have changed.
    return (row,) if result else ()


def _flattened(_: Row, result: Any) -> Sequence[Row]:
    # A generator runs to its end at once, while the UDF's thread is ours, and may fill one dict.
    return () if result is None else [dict(_checked(output)) for output in result]


_OUTPUTS: dict[str, Callable[[Row, Any], Sequence[Row]]] = {
    "map": _mapped,
    "filter": _filtered,
    "flat_map": _flattened,
}


def _attributed(kind: str, rows: Any, origins: Sequence[int], count: int) -> Any:
    if kind == "map":
        return rows
    positions = np.array(origins, dtype=np.int64)
    if kind == "flat_map":
        return RowsWithOrigins(rows, positions)
    mask = np.zeros(count, dtype=bool)
    mask[positions] = True
    return Kept(rows, mask)


def _checked(row: Any) -> Row:
    if not isinstance(row, Mapping):
        raise ValueError(
            f"A row-wise UDF returned {row!r:.80}, and rows are dicts. Return {{'item': ...}} "
            "instead of a bare value."
        )
    return cast(Row, row)
