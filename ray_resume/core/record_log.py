"""`RecordLog`: the records of one writer's file, in its order, as blocks and columns.

A million records take 120 MB. The fields that only some records are asked for stay compressed in
the blocks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from ray_resume.core.columns import (
    fixed_bytes,
    lengths_of,
    numbers,
    numbers_of,
    text_of,
    valid,
)
from ray_resume.core.digests import Digests, Positions
from ray_resume.core.records import Record, decode, records_of

__all__ = ["Flag", "RecordLog"]


class Flag:
    """Bits of what a record has."""

    SIZE = 1
    MTIME = 2
    FILES = 4
    DEAD_LETTERS = 8
    END = 16


# The columns that a log keeps beside its blocks. A time or number that is not known is NaN or 0.
_COLUMNS: dict[str, np.dtype[Any]] = {
    "state": np.dtype("u1"),
    "flags": np.dtype("u1"),
    "run": np.dtype("i4"),
    "sequence": np.dtype("u8"),
    "rows": np.dtype("i8"),
    "size": np.dtype("i8"),
    "mtime_ns": np.dtype("i8"),
    "completed_at": np.dtype("f8"),
    "pipeline": np.dtype("2u4"),
}
_NONE = {name: np.empty(0, kind) for name, kind in _COLUMNS.items()}
_RECENT_BATCHES = 4


class RecordLog:
    """Records that are only ever appended to, a block at a time; picklable.

    Attributes:
        runs: the distinct run ids of the records; column ``run`` has positions in it.
    """

    def __init__(self, blocks: Iterable[bytes] = ()) -> None:
        """Make a log of blocks; see :meth:`append`."""
        self.runs: list[str] = []
        self._run_numbers: dict[bytes, int] = {}
        self._blocks: list[bytes] = []
        self._ends: list[int] = [0]
        self._digests = bytearray()
        self._parts: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        self._recent: dict[int, pa.RecordBatch] = {}
        for block in blocks:
            self.append(block)

    def append(self, block: bytes) -> None:
        """Add the records of a block (see `records.encode`).

        Raises:
            CheckpointError: the block is damaged; the log is as it was.
        """
        batch = decode(block)
        self._blocks.append(block)
        self._ends.append(len(self) + len(batch))
        self._digests += fixed_bytes(batch.column("digest"))
        for name, part in self._columns_of(batch).items():
            self._parts[name].append(part)

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[Record]:
        for _, batch in self.batches():
            yield from records_of(batch)

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return RecordLog, (self._blocks,)

    @property
    def blocks(self) -> list[bytes]:
        """The blocks that the log was made of."""
        return self._blocks

    @property
    def digests(self) -> Digests:
        """The digest of each record's source."""
        return Digests.of(self._digests)

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return a field of all records: a column that is the same in all logs but for ``run``."""
        parts = self._parts[name]
        if len(parts) != 1:
            parts[:] = [np.concatenate([_NONE[name], *parts])]
        column: npt.NDArray[Any] = parts[0]
        return column

    def record(self, position: int) -> Record:
        """Return one record."""
        number = bisect_right(self._ends, position) - 1
        batch = self._recent.get(number)
        if batch is None:
            while len(self._recent) >= _RECENT_BATCHES:
                self._recent.pop(next(iter(self._recent)))
            batch = self._recent[number] = decode(self._blocks[number], is_known=True)
        return next(records_of(batch.slice(position - self._ends[number], 1)))

    def batches(self, positions: Positions | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the records at ``positions``, or all of them, as batches.

        Args:
            positions: ascending, no two of them the same.

        Yields:
            How many records were yielded before, and the next ones, columns as in `records.SCHEMA`.
        """
        if positions is None:
            for start, block in zip(self._ends, self._blocks, strict=False):
                yield start, decode(block, is_known=True)
            return
        cuts = np.searchsorted(positions, self._ends).tolist()
        for number, block in enumerate(self._blocks):
            first, last = cuts[number], cuts[number + 1]
            if first == last:
                continue
            batch = decode(block, is_known=True)
            if last - first < len(batch):
                here = positions[first:last] - self._ends[number]
                batch = batch.take(numbers(here, "i8"))
            yield first, batch

    def _columns_of(self, batch: pa.RecordBatch) -> dict[str, npt.NDArray[Any]]:
        column = batch.column
        known = [valid(column("size")), valid(column("mtime_ns"))]
        ends = valid(column("end"))
        listed = [lengths_of(column("files")) > 0, lengths_of(column("dead_letters")) > 0]
        pipeline = np.frombuffer(fixed_bytes(column("pipeline")), np.uint32)
        # Copies all: the batch, which is decompressed as a whole, is not kept.
        return {
            "state": numbers_of(column("state"), "u1"),
            "flags": np.packbits([*known, *listed, ends], axis=0, bitorder="little")[0],
            "run": self._numbers_of_runs(column("run_id")),
            "sequence": numbers_of(column("sequence"), "u8"),
            "rows": numbers_of(column("rows"), "i8"),
            "size": numbers_of(column("size"), "i8"),
            "mtime_ns": numbers_of(column("mtime_ns"), "i8"),
            "completed_at": numbers_of(column("completed_at"), "f8", unknown=np.nan),
            "pipeline": pipeline.reshape(-1, 2).copy(),
        }

    def _numbers_of_runs(self, run_ids: pa.Array) -> npt.NDArray[np.int32]:
        encoded = run_ids.dictionary_encode()
        numbers = []
        for run_id in encoded.dictionary.to_pylist():
            number = self._run_numbers.setdefault(run_id, len(self.runs))
            if number == len(self.runs):
                self.runs.append(text_of(run_id))
            numbers.append(number)
        column: npt.NDArray[np.int32] = np.array(numbers, np.int32)[
            numbers_of(encoded.indices, "i4")
        ]
        return column
