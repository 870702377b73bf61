"""The newest record of each source over several writers' files, as columns. Pure.

Of two records the one with the higher sequence number counts; on a tie, the one of the lower run
id, whichever files the two are in: the union of any files, merged or not, is the same.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ray_resume.core.digests import DigestIndex, Digests, Positions, source_digest
from ray_resume.core.records import RECORDS_IN_BLOCK, Record, State, decode
from ray_resume.core.table import HEAD_TYPE, Buffer, Table
from ray_resume.errors import CheckpointError

__all__ = ["Records", "Union"]

_AT_ONCE = 1 << 16


class Union:
    """What counts of several writers' records, in rows that are ordered by digest.

    The heads are there as columns (see `records.HEAD_FIELDS`), the rest as bytes.
    """

    def __init__(
        self,
        writers: Mapping[str, Iterable[tuple[bytes, bytes]]],
        *,
        owner: Callable[[str], str] = "the file of run {}".format,
    ) -> None:
        """Make the union of ``{run id: (digest, encoded record) pairs}``; a `Table` is cheapest.

        Args:
            owner: names the file of a run id.

        Raises:
            CheckpointError: a record cannot be one; the message names its file.
        """
        self._run_ids = sorted(writers)
        self._owner = owner
        self._tables = [_table(writers[run_id]) for run_id in self._run_ids]
        for writer, table in enumerate(self._tables):
            row = table.damaged()
            if row is not None:
                self._decode(writer, table.value(row))
                raise self._damaged(writer, CheckpointError("a record has parts that do not fit"))
        self._starts = [0, *itertools.accumulate(len(table) for table in self._tables)]
        digests = Digests.joined(table.digests for table in self._tables)
        order = self._newest(digests)
        self._index = DigestIndex(digests.take(order) if order is not None else digests)
        # Where each row is, in all tables one after another.
        self._at = self._index.order if order is None else order[self._index.order]

    @property
    def digests(self) -> Digests:
        """The digest of each row; ascending."""
        return self._index.digests

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records())

    def pairs(self) -> Iterator[tuple[bytes, bytes]]:
        """Return the ``(digest, encoded record)`` pairs that count, in the order of the digests."""
        data = self.digests.to_bytes()
        for row in range(len(self)):
            yield data[16 * row : 16 * row + 16], self._value(row)

    def column(self, name: str, rows: Positions | None = None) -> npt.NDArray[Any]:
        """Return a field of the heads (see `records.HEAD_FIELDS`), of all rows or of ``rows``."""
        columns = [table.heads[name] for table in self._tables]
        at = self._at if rows is None else self._at[rows]
        column: npt.NDArray[Any] = (
            np.concatenate([np.empty(0, HEAD_TYPE[name]), *columns])
            if len(columns) != 1
            else columns[0]
        )
        return column[at]

    def heads(self, rows: Positions) -> npt.NDArray[np.void]:
        """Return the heads of ``rows``, whole: for several fields of a part of all rows."""
        at = self._at[rows]
        if len(self._tables) == 1:
            # Whole heads are copied five times as fast as heads of many fields.
            whole = self._tables[0].heads.view(f"V{HEAD_TYPE.itemsize}")
            return whole[at].view(HEAD_TYPE)
        heads = np.empty(len(at), HEAD_TYPE)
        for table, start in zip(self._tables, self._starts, strict=False):
            here = (at >= start) & (at < start + len(table))
            heads[here] = table.heads[at[here] - start]
        return heads

    def find(self, digests: Digests) -> Positions:
        """Return the row of each of ``digests``, -1 where there is none."""
        return self._index.positions(digests)

    def record(self, row: int) -> Record:
        """Decode the record in ``row``.

        Raises:
            CheckpointError: it is damaged; the message names its file.
        """
        writer, value = self._found(int(self._at[row]))
        return self._decode(writer, value)

    def records(self, rows: Positions | None = None) -> Records:
        """Return the records in ``rows``, or all, decoded one by one as they are asked for."""
        return Records(self, np.arange(len(self)) if rows is None else rows)

    def table(self, rows: Positions) -> Table:
        """Return the pairs in ``rows``."""
        at = self._at[rows]
        writers = np.searchsorted(self._starts, at, side="right") - 1
        tails: list[Buffer] = [b""] * len(at)
        for writer in np.unique(writers).tolist():
            here = np.flatnonzero(writers == writer)
            found = self._tables[writer].tails(at[here] - self._starts[writer])
            for place, tail in zip(here.tolist(), found, strict=True):
                tails[place] = tail
        return Table.joined(self.digests.take(rows), self.heads(rows), tails)

    def blocks(self) -> Iterator[bytes]:
        """Spell the pairs that count, in the order of their digests, as blocks of records."""
        for first in range(0, len(self), RECORDS_IN_BLOCK):
            rows = np.arange(first, min(first + RECORDS_IN_BLOCK, len(self)))
            yield from self.table(rows).blocks(RECORDS_IN_BLOCK)

    def verify(self) -> None:
        """Make sure that each record that counts can be read.

        Raises:
            CheckpointError: one cannot; the message names its file.
        """
        # The heads were looked at when the union was made.
        for first in range(0, len(self), _AT_ONCE):
            rows = np.arange(first, min(first + _AT_ONCE, len(self)))
            for row in self.table(rows).obscure().tolist():
                self.record(first + row)

    def flagged(self, flags: int) -> Positions:
        """Return the rows that have one of ``flags``."""
        return np.flatnonzero(self.column("flags") & flags)

    def in_state(self, *states: State) -> npt.NDArray[np.bool_]:
        """Say of each row whether it is in one of ``states``."""
        mask: npt.NDArray[np.bool_] = np.isin(self.column("state"), [s.value for s in states])
        return mask

    def get(self, source_id: str) -> Record | None:
        """Return the record that counts for ``source_id``, if there is one."""
        row = int(self.find(Digests.of(source_digest(source_id)))[0])
        return None if row < 0 else self.record(row)

    def completed_outside(self, digests: Digests) -> tuple[int, Record | None]:
        """Count the completed sources that are not among ``digests``; return one of them, too."""
        outside = self.in_state(State.COMPLETED)
        here = self.find(digests)
        outside[here[here >= 0]] = False
        rows = np.flatnonzero(outside)
        return len(rows), self.record(int(rows[0])) if len(rows) else None

    def highest_sequence(self) -> int:
        """Return the highest sequence number in use, 0 if there is none."""
        return int(self.column("sequence").max()) if len(self) else 0

    def _newest(self, digests: Digests) -> Positions | None:
        """Return which rows of all tables count; None if all do."""
        duplicates = digests.duplicates()
        if not len(duplicates):
            return None
        sequences = np.concatenate([table.heads["sequence"] for table in self._tables])[duplicates]
        high, low = digests.high[duplicates], digests.low[duplicates]
        # The last of each source is the newest; of several with one number, the first one given.
        order = np.lexsort((-duplicates, sequences, low, high))
        high, low, sequences, rows = high[order], low[order], sequences[order], duplicates[order]
        same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        last = np.append(~same, True)
        winners = rows[last]
        tied = last[1:] & same & (sequences[1:] == sequences[:-1])
        for end in (np.flatnonzero(tied) + 1).tolist():
            start = end
            while start and same[start - 1] and sequences[start - 1] == sequences[end]:
                start -= 1
            candidates = rows[start : end + 1].tolist()[::-1]
            winner = self._lowest_run(candidates)
            winners[int(np.count_nonzero(last[:end]))] = winner
        counts = np.ones(len(digests), bool)
        counts[duplicates] = False
        counts[winners] = True
        return np.flatnonzero(counts)

    def _lowest_run(self, rows: list[int]) -> int:
        """Return which of ``rows``, in the order given, has the lowest run id in its record."""
        best, best_value, best_run = -1, b"", ""
        for row in rows:
            writer, value = self._found(row)
            if best >= 0 and value == best_value:
                continue
            run_id = self._decode(writer, value).run_id
            if best < 0 or run_id < best_run:
                best, best_value, best_run = row, value, run_id
        return best

    def _value(self, row: int) -> bytes:
        return self._found(int(self._at[row]))[1]

    def _found(self, at: int) -> tuple[int, bytes]:
        """Return the number of the table that holds the pair ``at``, and the encoded record."""
        writer = bisect.bisect_right(self._starts, at) - 1
        return writer, self._tables[writer].value(at - self._starts[writer])

    def _decode(self, writer: int, value: bytes) -> Record:
        try:
            return decode(value)
        except CheckpointError as error:
            raise self._damaged(writer, error) from error

    def _damaged(self, writer: int, error: CheckpointError) -> CheckpointError:
        return CheckpointError(
            f"In {self._owner(self._run_ids[writer])} {error}. It is damaged: restore it from a "
            "copy, or start over with an empty checkpoint and an empty output folder."
        )


class Records(Sequence[Record]):
    """Rows of a union, each decoded when it is asked for."""

    def __init__(self, union: Union, rows: Positions) -> None:
        self.union = union
        self.rows = rows

    @override
    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, position: int) -> Record: ...

    @overload
    def __getitem__(self, position: slice) -> Records: ...

    @override
    def __getitem__(self, position: int | slice) -> Record | Records:
        if isinstance(position, slice):
            return Records(self.union, self.rows[position])
        return self.union.record(int(self.rows[position]))

    @override
    def __iter__(self) -> Iterator[Record]:
        return map(self.union.record, self.rows.tolist())


def _table(pairs: Iterable[tuple[bytes, bytes]]) -> Table:
    return pairs if isinstance(pairs, Table) else Table.of(pairs)
