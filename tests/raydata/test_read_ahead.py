"""Files that are read ahead come in their order, with their own errors, and bounded in number."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest

from ray_resume.raydata.read_ahead import read_ahead

COUNT, THREADS = 12, 3


def test_blocks_come_in_order_and_few_are_read_ahead() -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def blocks_of(place: int) -> Iterator[tuple[int, int]]:
        with lock:
            begun.append(place)
        yield from ((place, block) for block in range(2))

    reads = read_ahead([partial(blocks_of, place) for place in range(COUNT)], THREADS)
    for place, read in enumerate(reads):
        assert list(read()) == [(place, 0), (place, 1)]
        assert max(begun) <= place + THREADS
    assert sorted(begun) == list(range(COUNT))


def test_an_error_is_its_own_reads_and_a_retry_reads_again() -> None:
    attempts: dict[int, int] = {}

    def read(place: int) -> Iterator[int]:
        attempts[place] = attempts.get(place, 0) + 1
        if place == 2 and attempts[place] == 1:
            raise OSError("storage")
        yield place

    reads = read_ahead([partial(read, place) for place in range(4)], THREADS)
    assert [list(one()) for one in reads[:2]] == [[0], [1]]
    with pytest.raises(OSError, match="storage"):
        list(reads[2]())
    assert [list(one()) for one in reads[2:]] == [[2], [3]]
    assert attempts == {0: 1, 1: 1, 2: 2, 3: 1}
