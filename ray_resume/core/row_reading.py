"""`RowReading`: which rows of a file a read emits, as which sources, and what it seals when. Pure.

A read gives the rows of a file in the same order each time. So row i is in range ``i //
split_rows``, whatever else is read. The rules, which the simulator tests:

* A range is registered with the ledger before any of its rows is emitted: all that begin in a
  block at once.
* It is sealed once Ray has taken its last row.
* The end of the file is sealed after normal exhaustion alone, with the number of ranges. So a file
  is done if its end is on record, and as many ranges.
* Rows of ranges that are known and not wanted are numbered and dropped: those are completed, or
  another pass executes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ray_resume.core.messages import Failure, Seal
from ray_resume.core.row_ranges import range_id
from ray_resume.core.run_sources import FoundRange
from ray_resume.core.shards import Shard
from ray_resume.core.sources import Source
from ray_resume.core.tokens import MODULUS, SourceArray, TokenArray, read_nonce, token_sum, tokens

__all__ = ["Emission", "Register", "RowFile", "RowReading"]

Register = Callable[[Sequence[FoundRange]], "Sequence[int | None]"]
"""Asks the ledger for the numbers of ranges; None of one that is complete: then drop its rows."""

_NONE: npt.NDArray[np.int64] = np.empty(0, np.int64)


@dataclass(frozen=True)
class RowFile:
    """The rows of a file that a pass reads.

    Attributes:
        source: the file: its id as the ids of its ranges begin, its path, its fingerprint.
        split_rows: how many rows a range has.
        known: the ranges that the run knows, ascending.
        wanted: those of them that the pass executes, ascending; ``numbers`` are theirs in the run's
            table.
        end: the number of the file's end, if the pass is to find it, and all ranges up to it that
            are not known.
        share: the run's share; ranges that are not known are read if they are in it.
    """

    source: Source
    split_rows: int
    known: npt.NDArray[np.int64] = field(default_factory=lambda: _NONE)
    wanted: npt.NDArray[np.int64] = field(default_factory=lambda: _NONE)
    numbers: npt.NDArray[np.int64] = field(default_factory=lambda: _NONE)
    end: int | None = None
    share: Shard | None = None

    def number_of(self, number: int) -> int | None:
        """Return a source of the file by which to register range ``number``; None: drop it."""
        at = int(np.searchsorted(self.wanted, number))
        if at < len(self.wanted) and self.wanted[at] == number:
            return int(self.numbers[at])
        if self.end is None:
            return None
        at = int(np.searchsorted(self.known, number))
        if at < len(self.known) and self.known[at] == number:
            return None
        if self.share is not None and not self.share.holds(self.id_of(number)):
            return None
        return self.end

    def id_of(self, number: int) -> str:
        """Return the id of a range."""
        return range_id(self.source.source_id, number, self.split_rows)


class Emission(NamedTuple):
    """The rows of a block that are emitted: their positions (None: all), sources and tokens."""

    positions: npt.NDArray[np.int64] | None
    sources: SourceArray
    tokens: TokenArray


@dataclass
class _Open:
    """The range that is being read."""

    source: int
    nonce: int
    total: int = 0
    rows: int = 0


class RowReading:
    """One execution of a read of a file. Call :meth:`number` and :meth:`taken` for each block.

    Args:
        now: the clock, in seconds since 1970.
    """

    def __init__(
        self,
        file: RowFile,
        run_id: str,
        pass_number: int,
        register: Register,
        now: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._file = file
        self._run_id, self._pass_number = run_id, pass_number
        self._register, self._now = register, now
        self._began_at = now()
        self._row = 0
        self._open: _Open | None = None
        self._ended: list[Seal] = []
        # The numbers of ranges that are registered, and have not begun.
        self._registered: dict[int, int | None] = {}
        # The sources of the pass that are neither sealed nor reported.
        self._left = set(file.numbers.tolist())
        if file.end is not None:
            self._left.add(file.end)

    @property
    def is_over(self) -> bool:
        """Whether no further row of the file is wanted, nor its end."""
        return not self._left and self._open is None

    @property
    def rows(self) -> int:
        """How many rows were read."""
        return self._row

    def number(self, count: int) -> Emission | None:
        """Give the next ``count`` rows their numbers; return those to emit, if there are any."""
        split_rows = self._file.split_rows
        first, stop = self._row, self._row + count
        self._register_all(range(-(-first // split_rows), -(-stop // split_rows)))
        pieces: list[tuple[int, int]] = []
        sources: list[SourceArray] = []
        values: list[TokenArray] = []
        while self._row < stop:
            begin = self._row % split_rows
            if not begin:
                self._begin(self._row // split_rows)
            size = min(split_rows - begin, stop - self._row)
            if self._open is not None:
                some = tokens(self._open.nonce, begin, size)
                self._open.total = (self._open.total + token_sum(some)) % MODULUS
                self._open.rows += size
                pieces.append((self._row - first, self._row - first + size))
                sources.append(np.full(size, self._open.source, np.int32))
                values.append(some)
            self._row += size
            if begin + size == split_rows:
                self._finish()
        if not pieces:
            return None
        positions = None
        if sum(end - begin for begin, end in pieces) < count:
            positions = np.concatenate([np.arange(*piece) for piece in pieces])
        return Emission(positions, np.concatenate(sources), np.concatenate(values))

    def taken(self) -> list[Seal]:
        """Return the seals of the ranges whose last row was in a block that Ray has taken."""
        ended, self._ended = self._ended, []
        return ended

    def end(self) -> list[Seal | Failure]:
        """Return what is to be reported once the reader is exhausted, and all rows are taken."""
        if not self._row:
            # A file without rows has a range without rows.
            self._register_all([0])
            self._begin(0)
        self._finish()
        events: list[Seal | Failure] = list(self.taken())
        file = self._file
        count = max(1, -(-self._row // file.split_rows))
        if len(file.known) and file.known[-1] >= count:
            why = f"the read: the file has {self._row} rows, and it had more in an earlier run"
            events += self._failures(why)
        elif file.end is not None:
            events.append(Seal(file.end, 0, 0, self._began_at, end=count))
            self._left.discard(file.end)
        return events

    def fail(self, why: str) -> list[Failure]:
        """Return failures of all sources that are not sealed."""
        self._left |= {seal.source for seal in self.taken()}
        self._open = None
        return self._failures(why)

    def unsealed(self) -> list[int]:
        """Return the sources of the pass that are not sealed, ascending."""
        return sorted(self._left)

    def _failures(self, why: str) -> list[Failure]:
        left, self._left = sorted(self._left), set()
        return [Failure(source, 0, 0, why) for source in left]

    def _register_all(self, numbers: Iterable[int]) -> None:
        """Register those of some ranges that the pass executes."""
        file = self._file
        found = [
            FoundRange(file.id_of(number), of, number)
            for number in numbers
            if (of := file.number_of(number)) is not None
        ]
        if not found:
            return
        for one, source in zip(found, self._register(found), strict=True):
            self._registered[one.range] = source
            if source is None and one.of != file.end:
                self._left.discard(one.of)

    def _begin(self, number: int) -> None:
        source = self._registered.pop(number, None)
        if source is None:
            return
        source_id = self._file.id_of(number)
        self._left.add(source)
        nonce = read_nonce(self._run_id, self._pass_number, source_id)
        self._open = _Open(source, nonce)
        self._range_began_at = self._now()

    def _finish(self) -> None:
        """End the open range: its last row is in the block at hand."""
        if self._open is None:
            return
        done, self._open = self._open, None
        self._left.discard(done.source)
        self._ended.append(Seal(done.source, done.total, done.rows, self._range_began_at))
