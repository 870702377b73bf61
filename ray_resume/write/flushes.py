"""Flushes: a write task writes what it holds by time, by bytes, and at its end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator

from ray.data.block import Block, BlockAccessor

__all__ = ["FLUSH_BYTES", "flushes", "table_intervals"]

FLUSH_BYTES = 256 << 20
"""So many bytes of rows in memory are not kept in a write task, but written."""

_LONGEST_WAIT_IN_SINK = 0.2


def table_intervals(commit_interval_s: float, publish_interval_s: float) -> tuple[float, float]:
    """Divide the time that rows may wait for a table to show them.

    Returns:
        How long they wait for a flush, and how long for a publication after it.
    """
    in_sink_s = min(commit_interval_s, _LONGEST_WAIT_IN_SINK * publish_interval_s)
    return in_sink_s, publish_interval_s - in_sink_s if publish_interval_s < math.inf else math.inf


def flushes(
    blocks: Iterable[Block], longest_wait_s: float, most_bytes: int = FLUSH_BYTES
) -> Iterator[list[Block]]:
    """Gather blocks until the first has waited for so long, or they have so many bytes."""
    held: list[Block] = []
    held_bytes, due = 0, math.inf
    for block in blocks:
        if not held:
            due = time.monotonic() + longest_wait_s
        held.append(block)
        held_bytes += BlockAccessor.for_block(block).size_bytes()
        if held_bytes >= most_bytes or time.monotonic() >= due:
            yield held
            held, held_bytes = [], 0
    if held:
        yield held
