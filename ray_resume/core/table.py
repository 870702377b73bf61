"""Many encoded records at once, as columns: 150 bytes each rather than objects of a kilobyte.

A table holds ``(digest, encoded record)`` pairs, and gives them out one by one. What most questions
are about stands in the records' heads, which are a numpy array.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ray_resume.core.digests import DIGEST_BYTES, Digests, Positions, digest_bytes
from ray_resume.core.filenames import ENDINGS, is_usual_run
from ray_resume.core.records import (
    HEAD,
    HEAD_FIELDS,
    Flag,
    Record,
    State,
    block_of,
    block_of_columns,
    columns_of,
    decode,
)

__all__ = ["HEAD_TYPE", "Table"]

HEAD_TYPE = np.dtype(list(HEAD_FIELDS))
assert HEAD_TYPE.itemsize == HEAD.size

Buffer: TypeAlias = "bytes | bytearray"

_NO_HEAD = bytes(HEAD.size)
_STATES = [state.value for state in State]


class Table:
    """``(digest, encoded record)`` pairs, in the order in which they were given.

    A value that is too short for a head has one of zeros here, which no record has.
    """

    __slots__ = ("_ends", "_tails", "digests", "heads")

    def __init__(self, digests: Buffer, heads: Buffer, lengths: Buffer, tails: Buffer) -> None:
        """Make a table of columns, as `records.columns_of` returns them.

        Raises:
            ValueError: they do not fit together.
        """
        self.digests = Digests.of(digests)
        self.heads = np.frombuffer(heads, HEAD_TYPE)
        self._tails = tails
        self._ends = np.cumsum(np.frombuffer(lengths, "<u4"), dtype=np.int64)
        total = int(self._ends[-1]) if len(self._ends) else 0
        if not len(self.digests) == len(self.heads) == len(self._ends) or total != len(tails):
            raise ValueError("the columns of a table do not fit together")

    @classmethod
    def of(cls, pairs: Iterable[tuple[bytes, bytes]]) -> Table:
        """Make a table of pairs."""
        every = list(pairs)
        block = block_of([digest + value for digest, value in every])
        return cls(*map(bytes, columns_of(block)))

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        digests = self.digests.to_bytes()
        for row in range(len(self)):
            yield digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES], self.value(row)

    def value(self, row: int) -> bytes:
        """Return the encoded record at ``row``."""
        head = self.heads[row].tobytes()
        start = int(self._ends[row - 1]) if row else 0
        return (b"" if head == _NO_HEAD else head) + bytes(self._tails[start : self._ends[row]])

    def record(self, row: int) -> Record:
        """Decode the record at ``row``.

        Raises:
            CheckpointError: it is damaged.
        """
        return decode(self.value(row))

    def take(self, rows: Positions) -> Table:
        """Return a table of the pairs at ``rows``."""
        # Whole heads are copied five times as fast as heads of many fields.
        heads = self.heads.view(f"V{HEAD.size}")[rows]
        return Table.joined(self.digests.take(rows), heads, self.tails(rows))

    @classmethod
    def joined(
        cls, digests: Digests, heads: npt.NDArray[np.void], tails: Sequence[Buffer]
    ) -> Table:
        """Make a table of what stands apart: ``tails`` are what follows each head."""
        lengths = np.fromiter(map(len, tails), "<u4", len(tails))
        return cls(digests.to_bytes(), heads.tobytes(), lengths.tobytes(), b"".join(tails))

    def tails(self, rows: Positions) -> list[Buffer]:
        """Return what follows the heads at ``rows``: the ids, and what heads have no room for."""
        ends = self._ends[rows]
        starts = np.where(rows > 0, self._ends[rows - 1], 0)
        every = self._tails
        return [every[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]

    def blocks(self, count: int) -> Iterator[bytes]:
        """Encode the pairs as blocks (`records.block_of`) of ``count`` each, the last of less."""
        digests = self.digests.to_bytes()
        lengths = np.diff(self._ends, prepend=np.int64(0)).astype("<u4")
        start = 0
        for first in range(0, len(self), count):
            last = min(first + count, len(self))
            end = int(self._ends[last - 1])
            yield block_of_columns(
                last - first,
                digests[first * DIGEST_BYTES : last * DIGEST_BYTES],
                self.heads[first:last].tobytes(),
                lengths[first:last].tobytes(),
                self._tails[start:end],
            )
            start = end

    def obscure(self) -> Positions:
        """Return the rows of which the heads do not say all, or the text is not plain ASCII."""
        more = self.heads["flags"] & Flag.MORE != 0
        if not self._tails.isascii() and len(self):
            odd = np.append(0, np.cumsum(np.frombuffer(self._tails, np.uint8) > 127))[self._ends]
            more |= np.diff(odd, prepend=0) > 0
        return np.flatnonzero(more)

    def unlike(self, other: Table) -> Positions:
        """Return the rows of which the encoded records are not the same in ``other``."""
        every = np.arange(len(self))
        ours, theirs = (t.heads.view(np.uint8).reshape(-1, HEAD.size) for t in (self, other))
        tails = zip(self.tails(every), other.tails(every), strict=True)
        differ = np.fromiter((one != two for one, two in tails), bool, len(self))
        return np.flatnonzero(differ | (ours != theirs).any(axis=1))

    def doubtful(self, runs: Iterable[str]) -> Positions:
        """Return the rows that a look at the columns does not prove sound.

        Proved sound is a record that can be read, has its source's digest for a key, is of one of
        ``runs``, and has a sequence number to itself and no impossible one.
        """
        heads = self.heads
        sound = self.can_be()
        sound[self.obscure()] = False
        known = [int.from_bytes(bytes.fromhex(run), "little") for run in runs if is_usual_run(run)]
        run = np.zeros((len(self), 8), np.uint8)
        run[:, :6] = heads["run"].copy().view(np.uint8).reshape(-1, 6)
        run_number = run.view("<u8").ravel()
        sequence = heads["sequence"]
        sound &= np.isin(run_number, np.array(known, np.uint64)) & (sequence > 0)
        sound &= heads["rows"] >= 0
        order = np.lexsort((sequence, run_number))
        twice = (np.diff(sequence[order]) == 0) & (np.diff(run_number[order]) == 0)
        sound[order[1:][twice]] = sound[order[:-1][twice]] = False
        # Of which run these are, only what follows the head says.
        sound &= ~np.isin(sequence, sequence[run_number == 0])
        rows = np.flatnonzero(sound)
        digests = Digests.of(b"".join(map(digest_bytes, self.tails(rows))))
        here = self.digests.take(rows)
        sound[rows] = (digests.high == here.high) & (digests.low == here.low)
        return np.flatnonzero(~sound)

    def damaged(self) -> int | None:
        """Return the row of a record that cannot be one, by its head; None if all can."""
        sound = self.can_be()
        return None if sound.all() else int(np.argmin(sound))

    def can_be(self) -> npt.NDArray[np.bool_]:
        """Say of each record whether it can be one, by its head."""
        heads = self.heads
        tails = np.diff(self._ends, prepend=np.int64(0))
        more = heads["flags"] & Flag.MORE != 0
        has_file = heads["flags"] & Flag.FILE != 0
        sound: npt.NDArray[np.bool_] = (
            np.isin(heads["state"], _STATES)
            & (heads["flags"] & (0xFF ^ Flag.ALL) == 0)
            & ~(has_file & (heads["ending"] >= len(ENDINGS)))
            & np.where(more, heads["id_bytes"] < tails, heads["id_bytes"] == tails)
        )
        return sound
