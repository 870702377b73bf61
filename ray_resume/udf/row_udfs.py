"""Row-wise UDFs as block-wise ones, so that nothing is sent row by row.

Each function takes a UDF for ``map``, ``filter`` or ``flat_map`` and returns one that takes a block
and returns what `calls` can account for. The async ones keep as many rows in flight as Ray does.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ray_resume.raydata import plan
from ray_resume.udf.accounting import Attribution, Flattened
from ray_resume.udf.failures import Failures, Scope, current_scope

__all__ = ["ATTRIBUTION", "block_udf", "block_udf_async", "predicate_udf"]

Row = dict[str, Any]

ATTRIBUTION = {
    "map": Attribution.ONE_TO_ONE,
    "filter": Attribution.MASK,
    "flat_map": Attribution.FLATTENED,
}
"""How the rows of each row-wise operator are attributed: exactly, by nature."""

# What Ray allows to an async row-wise UDF (DEFAULT_ASYNC_ROW_UDF_MAX_CONCURRENCY).
_CONCURRENT_ROWS = 16


def block_udf(kind: str, udf: Callable[[Row], Any], *, tolerant: bool) -> Callable[[Any], Any]:
    """Make a UDF for whole blocks of one for rows; ``kind`` is a key of :data:`ATTRIBUTION`.

    If it is ``tolerant``, a row that it raises for is marked as failed.
    """

    def run(block: Any) -> Any:
        scope = current_scope()
        results = []
        for scope.row, row in enumerate(plan.rows_of(block)):
            try:
                results.append(_settled(kind, udf(row)))
            except Exception as error:
                if not tolerant:
                    raise
                scope.failures.mark(error, scope.row)
                results.append(None)
        scope.row = None
        return _combine(kind, results, scope.failures)

    return run


def block_udf_async(
    kind: str, udf: Callable[[Row], Any], *, tolerant: bool
) -> Callable[[Any], Awaitable[Any]]:
    """As :func:`block_udf`, for a coroutine function or an async generator function."""

    async def run(block: Any) -> Any:
        failures = current_scope().failures
        places = asyncio.Semaphore(_CONCURRENT_ROWS)

        async def one(number: int, row: Row) -> Any:
            async with places:
                with Scope(failures, number):
                    try:
                        result = udf(row)
                        if inspect.isasyncgen(result):
                            return [output async for output in result]
                        return _settled(kind, await result)
                    except Exception as error:
                        if not tolerant:
                            raise
                        failures.mark(error, number)

        rows = enumerate(plan.rows_of(block))
        results = await asyncio.gather(*(one(number, row) for number, row in rows))
        return _combine(kind, results, failures)

    return run


def predicate_udf(expression: Any) -> Callable[[Any], Any]:
    """Make a UDF that says which rows of a block satisfy a Ray Data expression."""
    return lambda block: plan.mask_of(expression, block)


def _settled(kind: str, result: Any) -> Any:
    # A generator is run to its end at once, while the UDF's thread is ours.
    return list(result or ()) if kind == "flat_map" else result


def _combine(kind: str, results: Sequence[Any], failures: Failures) -> Any:
    if kind == "filter":
        return np.fromiter((bool(result) for result in results), dtype=bool)
    fine = np.flatnonzero(~failures.mask).tolist()
    if kind == "map":
        return plan.block_of(_checked(results[number]) for number in fine)
    origins: list[int] = []
    outputs: list[Row] = []
    for number in fine:
        outputs.extend(map(_checked, results[number]))
        origins.extend([number] * len(results[number]))
    return Flattened(plan.block_of(outputs), np.array(origins, dtype=np.int64))


def _checked(row: Any) -> Row:
    if not isinstance(row, Mapping):
        raise ValueError(
            f"A row-wise UDF returned {row!r:.80}, and rows are dicts. Return {{'item': ...}} "
            "instead of a bare value."
        )
    return dict(row)
