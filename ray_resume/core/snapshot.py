"""The newest record of each source over several writers' files, as columns. Pure.

The record with the higher sequence number counts; on a tie, the one of the lower run id. Their
files do not matter: the snapshot of merged files is the same as that of the files before.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from ray_resume.core.columns import text_of
from ray_resume.core.digests import DigestIndex, Digests, Positions, source_digest
from ray_resume.core.record_log import Flag, RecordLog
from ray_resume.core.records import Record, State, encode_batches, records_of

__all__ = ["Records", "Snapshot"]

_BATCH_ROWS = 1 << 16


class Snapshot:
    """The records that count, in rows that are ordered as the files and the records in them."""

    def __init__(self, logs: Mapping[str, RecordLog]) -> None:
        """Find out which records count of ``{run id: the records of its file}``."""
        self._logs = [logs[run_id] for run_id in sorted(logs)]
        self._starts = [0, *itertools.accumulate(map(len, self._logs))]
        # Where each row is, in all logs one after another; None if all records count.
        self._at: Positions | None = None
        self._at = self._newest(self.digests)
        self._index = DigestIndex(self.digests)

    @property
    def digests(self) -> Digests:
        """The digest of each row."""
        digests = Digests.joined(log.digests for log in self._logs)
        return digests if self._at is None else digests.take(self._at)

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records())

    def column(self, name: str, rows: Positions | None = None) -> npt.NDArray[Any]:
        """Return a field (see `record_log.RecordLog.column`) of all rows, or of ``rows``."""
        columns = [log.column(name) for log in self._logs] or [RecordLog().column(name)]
        column = columns[0] if len(columns) == 1 else np.concatenate(columns)
        if self._at is not None:
            column = column[self._at]
        return column if rows is None else column[rows]

    def find(self, digests: Digests) -> Positions:
        """Return the row of each of ``digests``, -1 where there is none."""
        ranks = self._index.positions(digests)
        found = ranks >= 0
        ranks[found] = self._index.order[ranks[found]]
        return ranks

    def record(self, row: int) -> Record:
        """Return the record in ``row``."""
        at = row if self._at is None else int(self._at[row])
        number = bisect_right(self._starts, at) - 1
        return self._logs[number].record(at - self._starts[number])

    def records(self, rows: Positions | None = None) -> Records:
        """Return the records in ``rows``, or all, each decoded when it is asked for."""
        return Records(self, np.arange(len(self)) if rows is None else rows)

    def batches(self, rows: Positions | None = None) -> Iterator[tuple[Positions, pa.RecordBatch]]:
        """Yield the records in ``rows``, or all, as batches with the columns of `records.SCHEMA`.

        Yields:
            Rows, ascending, and their records.
        """
        rows = np.arange(len(self)) if rows is None else np.sort(rows)
        at = rows if self._at is None else self._at[rows]
        cuts = np.searchsorted(at, self._starts).tolist()
        for log, start, (first, last) in zip(
            self._logs, self._starts, itertools.pairwise(cuts), strict=False
        ):
            for before, batch in log.batches(at[first:last] - start):
                here = first + before
                yield rows[here : here + len(batch)], batch

    def blocks(self, rows: Positions | None = None) -> Iterator[bytes]:
        """Encode the records in ``rows``, or all, in ascending order of rows."""
        return encode_batches(batch for _, batch in self.batches(rows))

    def flagged(self, flags: int) -> Positions:
        """Return the rows that have one of ``flags`` (see `record_log.Flag`)."""
        return np.flatnonzero(self.column("flags") & flags)

    def dead_letters(self) -> Iterator[str]:
        """Yield the names of the dead letters that are listed."""
        for _, batch in self.batches(self.flagged(Flag.DEAD_LETTERS)):
            yield from map(text_of, batch.column("dead_letters").flatten().to_pylist())

    def in_state(self, *states: State) -> npt.NDArray[np.bool_]:
        """Say of each row whether it is in one of ``states``."""
        mask: npt.NDArray[np.bool_] = np.isin(self.column("state"), [s.value for s in states])
        return mask

    def runs(self, rows: Positions) -> set[str]:
        """Return the ids of the runs that the records in ``rows`` are of."""
        at = rows if self._at is None else self._at[rows]
        found: set[str] = set()
        for number, (log, start) in enumerate(zip(self._logs, self._starts, strict=False)):
            here = at[(at >= start) & (at < self._starts[number + 1])] - start
            found.update(log.runs[run] for run in np.unique(log.column("run")[here]).tolist())
        return found

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
        """Return which records count, ascending; None if all do."""
        duplicates = digests.duplicates()
        if not len(duplicates):
            return None
        ranks = self._ranks_of_runs()[duplicates]
        sequences = np.concatenate([log.column("sequence") for log in self._logs])[duplicates]
        high, low = digests.high[duplicates], digests.low[duplicates]
        # The last of each source counts: the newest, of the lowest run id, the first in its file.
        order = np.lexsort((-duplicates, -ranks, sequences, low, high))
        high, low = high[order], low[order]
        same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        counts = np.ones(len(digests), bool)
        counts[duplicates[order[np.flatnonzero(same)]]] = False
        return np.flatnonzero(counts)

    def _ranks_of_runs(self) -> npt.NDArray[np.int64]:
        """Return where the run id of each record is among all run ids, sorted."""
        order = sorted({run_id for log in self._logs for run_id in log.runs})
        rank_of = {run_id: rank for rank, run_id in enumerate(order)}
        return np.concatenate(
            [
                np.array([rank_of[run_id] for run_id in log.runs], np.int64)[log.column("run")]
                for log in self._logs
            ]
        )


class Records(Sequence[Record]):
    """Rows of a snapshot, each decoded when it is asked for."""

    def __init__(self, snapshot: Snapshot, rows: Positions) -> None:
        self.snapshot = snapshot
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
            return Records(self.snapshot, self.rows[position])
        return self.snapshot.record(int(self.rows[position]))

    @override
    def __iter__(self) -> Iterator[Record]:
        for first in range(0, len(self), _BATCH_ROWS):
            rows = self.rows[first : first + _BATCH_ROWS]
            found = itertools.chain.from_iterable(
                map(records_of, (batch for _, batch in self.snapshot.batches(rows)))
            )
            if np.all(rows[1:] >= rows[:-1]):
                yield from found
                continue
            by_place: list[Record | None] = [None] * len(rows)
            for place, record in zip(np.argsort(rows, kind="stable").tolist(), found, strict=True):
                by_place[place] = record
            yield from (record for record in by_place if record is not None)
