"""Many encoded records at once, as columns: 150 bytes each rather than objects of a kilobyte.

A table holds ``(digest, encoded record)`` pairs, and gives them out one by one. What most questions
are about stands in the records' heads, which are a numpy array.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ray_resume.digests import DIGEST_SIZE, Digests
from ray_resume.naming import ENDINGS
from ray_resume.record import HEAD, HEAD_FIELDS, Flag, Record, State, block_of, columns_of, decode

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
        """Make a table of columns, as `record.columns_of` returns them.

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
            yield digests[row * DIGEST_SIZE : (row + 1) * DIGEST_SIZE], self.value(row)

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

    def take(self, rows: npt.NDArray[Any]) -> Table:
        """Return a table of the pairs at ``rows``."""
        digests = self.digests.take(rows).to_bytes()
        pairs = (digests[i * DIGEST_SIZE : (i + 1) * DIGEST_SIZE] for i in range(len(rows)))
        return Table.of((d, self.value(row)) for d, row in zip(pairs, rows.tolist(), strict=True))

    def damaged(self) -> int | None:
        """Return the row of a record that cannot be one, by its head; None if all can."""
        heads = self.heads
        tails = np.diff(self._ends, prepend=np.int64(0))
        more = heads["flags"] & Flag.MORE != 0
        has_file = heads["flags"] & Flag.FILE != 0
        sound = (
            np.isin(heads["state"], _STATES)
            & (heads["flags"] & (0xFF ^ Flag.ALL) == 0)
            & ~(has_file & (heads["ending"] >= len(ENDINGS)))
            & np.where(more, heads["id_bytes"] < tails, heads["id_bytes"] == tails)
        )
        return None if sound.all() else int(np.argmin(sound))
