"""Keeps a write task from holding the blocks that it has written.

Ray's write step hands on the blocks that it got, for the step after it to count their rows. So each
block of a task stays in memory until the task is over. In an armed pipeline the write step counts
the rows itself as they come, and hands on the count.

Internals of Ray's that are used:

* The two steps of a ``Write``, and the block that the second makes, whose columns Ray reads when
  all tasks are over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ray.data import Dataset
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink
from typing_extensions import override

from ray_resume.raydata.internals import check_used, unknown_ray
from ray_resume.raydata.rules import ask_for

try:
    from ray.data._internal.execution.operators.map_operator import MapOperator
    from ray.data._internal.execution.operators.map_transformer import (
        BlockMapTransformFn,
        MapTransformer,
    )
    from ray.data._internal.logical.interfaces import Rule
    from ray.data._internal.logical.operators import Write
except ImportError as error:
    raise unknown_ray(error) from error

__all__ = ["release_written_blocks"]

# Where a step keeps its function; older versions of Ray have another name for it.
_FN = "_block_fn" if "_block_fn" in BlockMapTransformFn.__init__.__code__.co_names else "_fn"

check_used(
    {
        MapOperator: "get_map_transformer _logical_operators",
        MapTransformer: "get_transform_fns",
        BlockMapTransformFn: _FN,
        Write: "datasink_or_legacy_datasource",
    }
)

_RELEASES = "ray_resume.releases_written_blocks"


def release_written_blocks(dataset: Dataset) -> None:
    """Let each write task of ``dataset`` forget a block once its datasink has.

    Args:
        dataset: it has a context of its own.
    """
    ask_for(_ReleaseBlocks, dataset, _RELEASES, True)


class _ReleaseBlocks(Rule):
    @override
    def apply(self, plan: Any) -> Any:
        if plan.context.get_config(_RELEASES):
            for operator in plan.dag.post_order_iter():
                for logical in operator._logical_operators:
                    if isinstance(logical, Write):
                        datasink: Any = logical.datasink_or_legacy_datasource
                        _release(operator.get_map_transformer(), datasink)
        return plan


def _release(transformer: MapTransformer, datasink: Datasink[Any]) -> None:
    # Nothing comes after a write, and Ray applies its rules until nothing changes any more.
    write, count = transformer.get_transform_fns()[-2:]
    if not isinstance(getattr(write, _FN), _CountedWrite):
        setattr(write, _FN, _CountedWrite(datasink))
        setattr(count, _FN, _hand_on)


@dataclass(frozen=True)
class _CountedWrite:
    """Takes the place of a write step's function; its one output is that of both steps."""

    datasink: Datasink[Any]

    def __call__(self, blocks: Iterable[Block], ctx: Any) -> Iterator[Block]:
        # Ray's own step imports it as late: the driver needs none.
        import pandas as pd

        counted = _Counted(blocks)
        returned = self.datasink.write(counted, ctx)
        # A datasink may leave blocks behind; Ray executes the steps before it for all of them.
        for _ in counted:
            pass
        yield pd.DataFrame(
            {
                "num_rows": [counted.rows],
                "size_bytes": [counted.size_bytes],
                "write_return": [returned],
            }
        )


class _Counted(Iterator[Block]):
    """Iterates over blocks once, without a reference to one that was taken."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self.rows = self.size_bytes = 0
        self._blocks = iter(blocks)

    @override
    def __next__(self) -> Block:
        block = next(self._blocks)
        accessor = BlockAccessor.for_block(block)
        self.rows += accessor.num_rows()
        self.size_bytes += accessor.size_bytes()
        return block


def _hand_on(blocks: Iterable[Block], _: Any) -> Iterable[Block]:
    return blocks
