"""The rows of a write task, sorted by source. Without I/O.

A write task may hold one large source or thousands of tiny ones. So nothing is done to one source
after another, and rows are copied only where many small pieces would have to be put together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from ray.data.block import Block, BlockAccessor

from ray_resume.core.messages import Drain
from ray_resume.core.tokens import MODULUS, SourceArray, TokenArray
from ray_resume.raydata import blocks as batches

__all__ = ["SourceRows", "group_by_source"]

# Rows in pieces of fewer bytes than this are copied when they are sorted.
_SMALL_PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class SourceRows:
    """Rows of some sources, those of each one standing together, without the two columns.

    Args:
        sources: int32, shape (k,): their numbers, ascending, each once.
        starts: int64, shape (k + 1,): rows ``starts[i]:starts[i + 1]`` are those of source i.
        sums: uint64, shape (k,): the sum of the tokens of each source's rows.
    """

    table: pa.Table
    sources: SourceArray
    starts: npt.NDArray[np.int64]
    sums: TokenArray

    @classmethod
    def of(cls, table: pa.Table, sources: SourceArray, tokens: TokenArray) -> SourceRows:
        """Sort at least one row by source. ``sources`` and ``tokens`` have one value for each."""
        if (sources[1:] < sources[:-1]).any():
            order = np.argsort(sources, kind="stable")
            table = _ordered(table, sources, order)
            sources, tokens = sources[order], tokens[order]
        starts = _starts(sources)
        sums = np.add.reduceat(tokens, starts, dtype=np.uint64)
        return cls(table, sources[starts], np.append(starts, len(sources)), sums)

    def __len__(self) -> int:
        return len(self.sources)

    def part(self, first: int, last: int) -> SourceRows:
        """Return the rows of the sources in places ``first:last``, not copied."""
        starts = self.starts[first : last + 1]
        return SourceRows(
            self.table.slice(int(starts[0]), int(starts[-1] - starts[0])),
            self.sources[first:last],
            starts - starts[0],
            self.sums[first:last],
        )

    def alone(self) -> Iterable[SourceRows]:
        """Return the rows of each source."""
        return (self.part(place, place + 1) for place in range(len(self)))

    def drains(self) -> list[Drain]:
        """Return what is to be drained of each source once its rows are durable."""
        counts = np.diff(self.starts)
        values = zip(self.sources.tolist(), self.sums.tolist(), counts.tolist(), strict=True)
        return [Drain(source, -total % MODULUS, count) for source, total, count in values]


def group_by_source(blocks: Iterable[Block]) -> list[SourceRows]:
    """Gather the rows of a write task, of each source in the order in which they came.

    Blocks of different schemas stay apart, but for a source that has rows in several: these are
    joined as Ray Data would join them.

    Raises:
        ValueError: there are rows, and no columns.
    """
    parts: list[_Part] = []
    for block in blocks:
        table, sources, tokens = batches.split_tracking_columns(
            BlockAccessor.for_block(block).to_arrow()
        )
        if len(sources) == 0:
            continue
        if table.num_columns == 0:
            raise ValueError(
                f"{len(sources)} rows without any column came to the sink, and no file can hold "
                "them. Keep at least one column."
            )
        parts.append(_Part(table, sources, tokens))
    alike: dict[pa.Schema, list[_Part]] = {}
    for part in parts:
        alike.setdefault(part.table.schema.remove_metadata(), []).append(part)
    if len(alike) > 1:
        return _apart(parts, alike.values())
    return [_together(parts)] if parts else []


@dataclass(frozen=True)
class _Part:
    table: pa.Table
    sources: SourceArray
    tokens: TokenArray

    def at(self, rows: npt.NDArray[np.bool_]) -> _Part:
        if rows.all():
            return self
        table = batches.take(self.table, np.flatnonzero(rows))
        return _Part(table, self.sources[rows], self.tokens[rows])


def _together(parts: Sequence[_Part], *, alike: bool = True) -> SourceRows:
    tables = [part.table for part in parts]
    return SourceRows.of(
        pa.concat_tables(tables) if alike else batches.concat_tables(tables),
        np.concatenate([part.sources for part in parts]),
        np.concatenate([part.tokens for part in parts]),
    )


def _apart(every: Sequence[_Part], alike: Iterable[Sequence[_Part]]) -> list[SourceRows]:
    """Keep rows of different schemas apart, but for those of one source."""
    found = [np.unique(np.concatenate([part.sources for part in parts])) for parts in alike]
    numbers, counts = np.unique(np.concatenate(found), return_counts=True)
    torn = numbers[counts > 1]
    rows: list[SourceRows] = []
    for parts in alike:
        whole = [part.at(~np.isin(part.sources, torn)) for part in parts]
        if any(len(part.sources) for part in whole):
            rows.append(_together([part for part in whole if len(part.sources)]))
    rows.extend(
        _together(
            [part.at(part.sources == source) for part in every if source in part.sources],
            alike=False,
        )
        for source in torn
    )
    return rows


def _starts(sources: SourceArray) -> npt.NDArray[np.int64]:
    """Return where rows of another source begin, 0 included."""
    return np.flatnonzero(np.append(True, sources[1:] != sources[:-1])).astype(np.int64)


def _ordered(table: pa.Table, sources: SourceArray, order: npt.NDArray[np.intp]) -> pa.Table:
    """Return the rows of ``table`` in ``order``, which sorts ``sources``."""
    # Older versions have no nbytes of some types.
    if table.get_total_buffer_size() < len(_starts(sources)) * _SMALL_PIECE_BYTES:
        return batches.take(table, order)
    return batches.sliced(table, order)
