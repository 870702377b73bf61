"""When a write task writes what it holds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import chain

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_resume.write.flushes import flushes, table_intervals


def block_of(rows: int) -> pa.Table:
    return pa.table({"id": pa.array(range(rows), pa.int64())})


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 2000))
def test_a_flush_has_the_bytes_it_may_have(counts: list[int], most_bytes: int) -> None:
    blocks = [block_of(count) for count in counts]
    found = list(flushes(blocks, math.inf, most_bytes))
    assert list(chain(*found)) == blocks
    for flush in found[:-1]:
        assert sum(block.nbytes for block in flush) >= most_bytes
    for flush in found:
        # One block less would not have been enough.
        assert sum(block.nbytes for block in flush[:-1]) < most_bytes


def test_no_row_waits_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def blocks() -> Iterator[pa.Table]:
        nonlocal now
        for seconds in (100, 4, 4, 4, 1, 12, 3):
            now += seconds
            yield block_of(1)

    # How long the first block took is not counted: none of its rows waited.
    assert [len(flush) for flush in flushes(blocks(), 10, 1 << 30)] == [4, 2, 1]


@pytest.mark.parametrize(
    ("commit_s", "publish_s", "expected"),
    [(10, 300, (10, 290)), (5, 5, (1, 4)), (10, math.inf, (10, math.inf))],
)
def test_rows_for_a_table_wait_no_longer_than_its_interval(
    commit_s: float, publish_s: float, expected: tuple[float, float]
) -> None:
    assert table_intervals(commit_s, publish_s) == expected
