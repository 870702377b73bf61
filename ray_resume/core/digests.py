"""The digest of a source's id, and many digests as columns: sorted, looked up, compared at once.

A digest is two 64-bit numbers. The first one nearly always decides, and a look-up compares both,
because "nearly" is not enough to tell sources apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["DIGEST_BYTES", "DigestIndex", "Digests", "digest_bytes", "source_digest"]

DIGEST_BYTES = 16

# A look-up takes so many digests at a time.
_BATCH_ROWS = 1 << 16

Positions: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint64]


def source_digest(source_id: str) -> bytes:
    """Return the digest of a source's id, ``DIGEST_BYTES`` long: it identifies the source."""
    return digest_bytes(source_id.encode("utf-8", "surrogatepass"))


def digest_bytes(source_id: bytes | bytearray) -> bytes:
    """Return the digest of a source's id in UTF-8, which may contain lone surrogates."""
    return hashlib.blake2b(source_id, digest_size=DIGEST_BYTES).digest()


class Digests:
    """A sequence of 16-byte digests: 16 bytes each."""

    __slots__ = ("_order", "high", "low")

    def __init__(self, high: Words, low: Words) -> None:
        self.high, self.low = high, low
        self._order: Positions | None = None

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Digests:
        """Take concatenated digests.

        Raises:
            ValueError: the length of ``data`` is not a multiple of 16.
        """
        words = np.frombuffer(data, ">u8")
        if len(words) % 2:
            raise ValueError(f"{len(data)} bytes are not a whole number of digests")
        return cls(words[::2].astype(np.uint64), words[1::2].astype(np.uint64))

    @classmethod
    def joined(cls, parts: Iterable[Digests]) -> Digests:
        """Concatenate sequences."""
        every = list(parts)
        if len(every) == 1:
            return every[0]
        none = np.empty(0, np.uint64)
        return cls(
            np.concatenate([none, *(part.high for part in every)]),
            np.concatenate([none, *(part.low for part in every)]),
        )

    def __len__(self) -> int:
        return len(self.high)

    def __getitem__(self, position: int) -> bytes:
        return self.take(slice(position, position + 1)).to_bytes()

    def take(self, positions: Positions | slice) -> Digests:
        """Return those at ``positions``."""
        return Digests(self.high[positions], self.low[positions])

    def to_bytes(self, size: int = DIGEST_BYTES) -> bytes:
        """Concatenate the first ``size`` bytes of each digest; ``size`` is 8 or 16."""
        if size == 8:
            return self.high.astype(">u8").tobytes()
        return np.stack([self.high, self.low], axis=1).astype(">u8").tobytes()

    def modulo(self, count: int) -> npt.NDArray[np.uint64]:
        """Return the remainder of each, a number of 128 bits, when divided by ``count``."""
        if count >= 1 << 31:
            data = self.to_bytes()
            whole = (int.from_bytes(data[i : i + 16], "big") for i in range(0, len(data), 16))
            return np.fromiter((number % count for number in whole), np.uint64, len(self))
        by = np.uint64(count)
        rest: Words = (self.high % by) * np.uint64((1 << 64) % count) + self.low % by
        rest %= by
        return rest

    def duplicates(self) -> Positions:
        """Return the positions of those that occur more than once."""
        order = self.order()
        high, low = self.high[order], self.low[order]
        same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        if not same.any():
            return np.empty(0, np.int64)
        either = np.append(same, False)
        either[1:] |= same
        return np.sort(order[either])

    def distinct(self) -> Digests:
        """Return these digests, each once, in no particular order."""
        ordered = self.take(self.order())
        first = np.ones(len(self), bool)
        first[1:] = (ordered.high[1:] != ordered.high[:-1]) | (ordered.low[1:] != ordered.low[:-1])
        return ordered.take(np.flatnonzero(first))

    def order(self) -> Positions:
        """Return the positions in the order of the digests."""
        if self._order is None:
            self._order = self._sorted()
        return self._order

    def _sorted(self) -> Positions:
        high = self.high
        if np.all(high[1:] > high[:-1]):
            return np.arange(len(high))
        order = np.argsort(high)
        ordered = high[order]
        if np.any(ordered[1:] == ordered[:-1]):
            order = np.lexsort((self.low, high))
        return order


class DigestIndex:
    """Digests in ascending order, to look others up in.

    ``order[i]`` is the position of ``digests[i]`` in the sequence that the index was made of. A
    look-up may find any of several equal digests.
    """

    __slots__ = ("digests", "order")

    def __init__(self, digests: Digests) -> None:
        self.order = digests.order()
        self.digests = digests.take(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def positions(self, wanted: Digests) -> Positions:
        """Return the position of each of ``wanted`` in ``digests``, -1 where it is missing."""
        found = np.full(len(wanted), -1, np.int64)
        high, low = self.digests.high, self.digests.low
        if not len(high) or not len(wanted):
            return found
        # A million searches in random order take ten times as long as in ascending order.
        every = wanted.order()
        for start in range(0, len(every), _BATCH_ROWS):
            order = every[start : start + _BATCH_ROWS]
            high_wanted, low_wanted = wanted.high[order], wanted.low[order]
            rank = np.searchsorted(high, high_wanted).astype(np.int64)
            left = np.arange(len(order))
            while len(left):
                left = left[rank[left] < len(high)]
                left = left[high[rank[left]] == high_wanted[left]]
                same = low[rank[left]] == low_wanted[left]
                hits = left[same]
                found[order[hits]] = rank[hits]
                left = left[~same]
                rank[left] += 1
        return found

    def holds(self, wanted: Digests) -> npt.NDArray[np.bool_]:
        """Return for each of ``wanted`` whether the index contains it."""
        return self.positions(wanted) >= 0
