"""How long rows may wait inside of a task before they go on to its next step.

Within a task, Ray Data gathers the outputs of a step until they make a block of
``target_max_block_size`` bytes. It hands them on then, or at the end of the task. The outputs of a
slow UDF are small compared with that. So they wait for the end of the task, and a kill costs the
whole task. Here a step hands on its outputs as soon as the first row has waited for long enough.

A UDF that is called with whole blocks gets a block with many small sources as a whole, too. It
gives nothing out before it has dealt with all of them. If it is called for each source anyway, it
gets such a block in *slices* of whole sources.

`capacity` says what bounds the rows between the last UDF and the disk.

Internals of Ray's that are used:

* ``MapTransformFn._shape_blocks`` and ``_pre_process``: the first cuts a step's output into blocks,
  the second makes batches of its input. Other functions take their places in an instance; they
  call Ray's own for each part of what they divide.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from math import inf
from typing import Any

import numpy as np
from ray.data import Dataset
from ray.data.block import Block, BlockAccessor
from typing_extensions import override

from ray_resume.core.tokens import SOURCE_COLUMN
from ray_resume.raydata import blocks as batches
from ray_resume.raydata.internals import unknown_ray
from ray_resume.raydata.rules import ask_for

try:
    from ray.data._internal.execution.operators.map_operator import MapOperator
    from ray.data._internal.execution.operators.map_transformer import (
        BatchMapTransformFn,
        MapTransformFn,
    )
    from ray.data._internal.logical.interfaces import Rule
    from ray.data._internal.logical.rules import FuseOperators
except ImportError as error:
    raise unknown_ray(error) from error

__all__ = ["at_task_end", "by_source", "pace"]

# In the context of a dataset: how many seconds.
_LONGEST_WAIT_S = "ray_resume.longest_wait_s"

_BY_SOURCE = "__ray_resume_by_source__"
_AT_TASK_END = "__ray_resume_at_task_end__"


def by_source(udf: Any) -> Any:
    """Mark a UDF for ``map_batches``: it does the same if a batch ends where a source ends."""
    setattr(udf, _BY_SOURCE, True)
    return udf


def at_task_end(udf: Any, callback: Callable[[], None]) -> Any:
    """Mark a UDF for ``map_batches``: each task calls ``callback`` after its last output.

    Args:
        callback: it is pickled with the plan.
    """
    setattr(udf, _AT_TASK_END, callback)
    return udf


def pace(dataset: Dataset, longest_wait_s: float) -> None:
    """Let rows wait at most so long in each step of the tasks of ``dataset``.

    A wait ends when the step has its next output, so it is longer by one call of a UDF. A step that
    makes blocks of a number of rows (a streaming repartition) is left alone.

    Args:
        dataset: it has a context of its own.
        longest_wait_s: in seconds.
    """
    ask_for(_PaceSteps, dataset, _LONGEST_WAIT_S, longest_wait_s)


class _PaceSteps(Rule):
    @classmethod
    @override
    def dependents(cls) -> list[type[Rule]]:
        # Before that, the steps of an operator are those of one logical operator.
        return [FuseOperators]

    @override
    def apply(self, plan: Any) -> Any:
        longest_wait_s = plan.context.get_config(_LONGEST_WAIT_S)
        if longest_wait_s is not None:
            for operator in plan.dag.post_order_iter():
                if isinstance(operator, MapOperator):
                    _pace_operator(operator, longest_wait_s)
        return plan


def _pace_operator(operator: Any, longest_wait_s: float) -> None:
    udfs = [getattr(logical, "fn", None) for logical in operator._logical_operators]
    ended = getattr(udfs[0], _AT_TASK_END, None) if len(udfs) == 1 else None
    for step in operator.get_map_transformer().get_transform_fns():
        option = step.output_block_size_option
        is_paced = (
            option is not None
            and not option.disable_block_shaping
            and step.target_num_rows_per_block is None
        )
        # Ray applies its rules again to what it has fused, where no step's own UDF is known.
        if (is_paced or ended is not None) and "_shape_blocks" not in vars(step):
            step._shape_blocks = _ShapeBlocks(step, longest_wait_s if is_paced else inf, ended)
        # A call with a number of rows is short enough.
        whole_blocks = isinstance(step, BatchMapTransformFn) and not isinstance(
            step._batch_size, int
        )
        if whole_blocks and len(udfs) == 1 and hasattr(udfs[0], _BY_SOURCE):
            step._pre_process = _PreProcess(step, longest_wait_s)


@dataclass
class _ShapeBlocks:
    """Takes the place of a step's ``_shape_blocks``."""

    step: MapTransformFn
    longest_wait_s: float
    ended: Callable[[], None] | None = None

    def __call__(self, results: Iterable[Any]) -> Iterator[Block]:
        shaped: Callable[..., Iterable[Block]] = MapTransformFn._shape_blocks
        remaining = iter(results)
        yield from shaped(self.step, _until_due(remaining, self.longest_wait_s))
        for first in remaining:
            some = chain([first], remaining)
            # Else it would stay in memory until the next wait is over.
            del first
            yield from shaped(self.step, _until_due(some, self.longest_wait_s))
        if self.ended is not None:
            self.ended()


@dataclass
class _PreProcess:
    """Takes the place of a step's ``_pre_process``."""

    step: BatchMapTransformFn
    longest_wait_s: float

    def __call__(self, blocks: Iterable[Block]) -> Iterator[Any]:
        processed: Callable[..., Iterable[Any]] = BatchMapTransformFn._pre_process
        # Ray makes batches of several blocks together, so blocks stay together where they can.
        for is_mixed, some in groupby(blocks, _is_mixed):
            if not is_mixed:
                yield from processed(self.step, some)
                continue
            for block in some:
                for part in _slices(block, self.longest_wait_s):
                    yield from processed(self.step, [part])


def _until_due(results: Iterator[Any], longest_wait_s: float) -> Iterator[Any]:
    """Give out results until the first has waited for so long, or there are no more."""
    due = None
    for result in results:
        due = due or time.monotonic() + longest_wait_s
        yield result
        del result
        if time.monotonic() >= due:
            return


def _is_mixed(block: Block) -> bool:
    """Say whether a block can be cut: it has rows of several sources, those of each together."""
    if SOURCE_COLUMN not in batches.names(block) or batches.num_rows(block) == 0:
        return False
    sources = np.asarray(batches.column(block, SOURCE_COLUMN))
    return bool(sources[0] < sources[-1] and (sources[1:] >= sources[:-1]).all())


def _slices(block: Block, longest_wait_s: float) -> Iterator[Block]:
    """Cut a block between sources, so that its reader takes about so long for each slice.

    The first slice has one source. Later ones have twice as many as the one before, or half as
    many, by how long that took.
    """
    sources = np.asarray(batches.column(block, SOURCE_COLUMN))
    ends = np.append(np.flatnonzero(sources[1:] != sources[:-1]) + 1, len(sources))
    accessor = BlockAccessor.for_block(block)
    start, done, count = 0, 0, 1
    while done < len(ends):
        done = min(done + count, len(ends))
        end = int(ends[done - 1])
        begun = time.monotonic()
        yield accessor.slice(start, end, copy=False)
        spent_s = time.monotonic() - begun
        start = end
        if spent_s < longest_wait_s / 2:
            count *= 2
        elif spent_s > longest_wait_s:
            count = max(1, count // 2)
