"""Flushes: a write task writes what it holds by time, by bytes, and at its end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator

from ray.data.block import Block, BlockAccessor

__all__ = ["FLUSH_BYTES", "flushes"]

FLUSH_BYTES = 256 << 20
"""So many bytes of rows in memory are not kept in a write task, but written."""


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
