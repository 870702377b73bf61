"""One operator over blocks in this process: as plain Ray Data runs it, and armed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from direct_client import DirectClient
from ray.data._internal.execution.operators.map_transformer import (
    BatchMapTransformFn,
    BlockMapTransformFn,
    RowMapTransformFn,
)
from ray.data._internal.output_buffer import OutputBlockSizeOption
from ray.data._internal.planner import plan_udf_map_op
from ray.data.block import BlockAccessor

from ray_resume import resumable
from ray_resume.core.messages import Event
from ray_resume.core.tokens import tokens
from ray_resume.raydata import blocks
from ray_resume.udf.stage import instrument, instrument_predicate

_ROW_OPERATORS: dict[str, Any] = {
    "map": plan_udf_map_op._generate_transform_fn_for_map_rows,
    "filter": plan_udf_map_op._generate_transform_fn_for_filter,
    "flat_map": plan_udf_map_op._generate_transform_fn_for_flat_map,
}


class Ledger(DirectClient):
    """Takes what stages send."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.letters: list[Any] = []

    def send(self, *events: Event) -> None:
        self.events.extend(events)


def plain(kind: str, udf: Any, given: Sequence[Any], batch_format: str | None = None) -> list[Any]:
    """Return the blocks that plain Ray Data makes of the blocks ``given``."""
    transform: Any
    if kind in _ROW_OPERATORS:
        rows = _ROW_OPERATORS[kind](udf)
        transform = RowMapTransformFn(rows, output_block_size_option=_size())
    elif kind == "filter(expr)":

        def keep(data: Any, _: Any) -> Any:
            accessors: Any = map(BlockAccessor.for_block, data)
            return (block.filter(udf) for block in accessors)

        transform = BlockMapTransformFn(keep, output_block_size_option=_size())
    else:
        transform = _batches(udf, batch_format)
    return list(transform(iter(given), None))


def resumed(
    kind: str,
    udf: Any,
    given: Sequence[Any],
    batch_format: str | None = None,
    *,
    sources: Callable[[int], Any] = np.zeros,
    ledger: Ledger | None = None,
    **options: Any,
) -> list[Any]:
    """Return the blocks that the armed operator makes of them, without the two columns.

    Args:
        sources: says of which source each row of a block is, by the number of rows.
    """
    desk: Any = ledger or Ledger()
    ready = (
        instrument_predicate(udf, desk)
        if kind == "filter(expr)"
        else instrument(resumable(udf, **options), desk, kind)
    )
    form = batch_format if kind == "map_batches" else None
    outputs = _batches(ready, form)(iter(_attached(given, sources)), None)
    return [blocks.split_tracking_columns(output)[0] for output in outputs]


def resumed_async(
    kind: str, udf: type, block: Any, *, sources: Callable[[int], Any] = np.zeros
) -> list[dict[str, Any]]:
    """Return the rows that an armed class with an async ``__call__`` makes of a block."""
    ledger: Any = Ledger()
    instance = instrument(resumable(udf), ledger, kind)()
    (batch,) = _attached([block], sources)
    if kind == "map_batches":
        batch = BlockAccessor.for_block(batch).to_batch_format("numpy")

    async def outputs() -> list[Any]:
        return [output async for output in instance(batch)]

    made = [BlockAccessor.batch_to_block(output) for output in asyncio.run(outputs())]
    return [row for block in made for row in BlockAccessor.for_block(block).to_arrow().to_pylist()]


def _attached(given: Sequence[Any], sources: Callable[[int], Any]) -> list[Any]:
    start, attached = 0, []
    for block in given:
        count = blocks.num_rows(block)
        numbers = np.asarray(sources(count)).astype(np.int32)
        attached.append(blocks.with_tracking_columns(block, numbers, tokens(7, start, count)))
        start += count
    return attached


def content(work: Callable[[], Sequence[Any]], *, ordered: bool = True) -> Any:
    """Say what blocks hold, types and rows, or what kind of error ``work`` raised."""
    try:
        held = [BlockAccessor.for_block(block) for block in work()]
        tables = [block.to_arrow() for block in held if block.num_rows()]
    except Exception as error:
        return next(kind for kind in _ERRORS if isinstance(error, kind))
    rows = [repr(row) for table in tables for row in table.to_pylist()]
    types = [{field.name: str(field.type) for field in table.schema} for table in tables]
    return types, rows if ordered else sorted(rows)


# What plain Ray Data and pyarrow raise for one cause may differ within these.
_ERRORS = (ValueError, TypeError, NotImplementedError, KeyError, AssertionError, Exception)


def _batches(udf: Any, batch_format: str | None) -> Any:
    return BatchMapTransformFn(
        plan_udf_map_op._generate_transform_fn_for_map_batches(udf),
        batch_size=None,
        batch_format=batch_format,  # type: ignore[arg-type]
        output_block_size_option=_size(),
    )


def _size() -> OutputBlockSizeOption:
    size: Any = OutputBlockSizeOption.of(target_max_block_size=128 << 20)
    return size  # type: ignore[no-any-return]
