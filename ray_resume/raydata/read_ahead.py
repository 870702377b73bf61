"""Reads the next files of a task in threads, as Ray Data does for readers that wait for storage.

Ray itself starts its threads anew for each read of files. A read of one file at a time would pay
that for each file, and have no other file under way meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

__all__ = ["read_ahead"]

Read = Callable[[], Iterable[Any]]


def read_ahead(reads: Sequence[Read], threads: int) -> list[Read]:
    """Return reads that give the same, if they are called one after another.

    While the blocks of one are taken, threads read so many others after it into memory. The error
    of a read is raised where its blocks are taken. A read that is called again reads again.
    """
    ahead = _ReadAhead(reads, threads)
    return [partial(ahead.read, place) for place in range(len(reads))]


class _ReadAhead:
    def __init__(self, reads: Sequence[Read], threads: int) -> None:
        self._reads = reads
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads)
        self._begun: dict[int, Future[list[Any]]] = {}
        self._next = 0

    def read(self, place: int) -> Iterator[Any]:
        begun = self._begun.pop(place, None)
        self._next = max(self._next, place + 1)
        while self._next < min(place + 1 + self._threads, len(self._reads)):
            self._begun[self._next] = self._executor.submit(_blocks_of, self._reads[self._next])
            self._next += 1
        yield from self._reads[place]() if begun is None else begun.result()


def _blocks_of(read: Read) -> list[Any]:
    return list(read())
