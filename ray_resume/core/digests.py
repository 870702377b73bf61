"""The digests of many sources, as columns: sorted, looked up and compared at once.

A digest is two 64-bit numbers, the first of which nearly always decides. "Nearly" is no way to
tell sources apart, so whatever is found by the first is compared by both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["DIGEST_SIZE", "Digests", "SortedDigests"]

DIGEST_SIZE = 16
_AT_ONCE = 1 << 16

Positions: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint64]


class Digests:
    """A sequence of 16-byte digests: 16 bytes each."""

    __slots__ = ("_order", "high", "low")

    def __init__(self, high: Words, low: Words) -> None:
        self.high, self.low = high, low
        self._order: Positions | None = None

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Digests:
        """Take digests that stand one after another in ``data``.

        Raises:
            ValueError: its length is no multiple of 16.
        """
        words = np.frombuffer(data, ">u8")
        if len(words) % 2:
            raise ValueError(f"{len(data)} bytes are no whole digests")
        return cls(words[::2].astype(np.uint64), words[1::2].astype(np.uint64))

    @classmethod
    def joined(cls, parts: Iterable[Digests]) -> Digests:
        """Put several sequences one after another."""
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

    def to_bytes(self, size: int = DIGEST_SIZE) -> bytes:
        """Spell the first ``size`` bytes of each, 8 or 16, one after another."""
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

    def repeated(self) -> Positions:
        """Return the positions of those that occur more than once."""
        order = self.order()
        high, low = self.high[order], self.low[order]
        same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        if not same.any():
            return np.empty(0, np.int64)
        either = np.append(same, False)
        either[1:] |= same
        return np.sort(order[either])

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


class SortedDigests:
    """Digests to look others up in; of several that are the same, any may be found.

    ``order`` holds the positions, in the sequence that this was made of, in ascending order of
    the digests.
    """

    __slots__ = ("digests", "order")

    def __init__(self, digests: Digests) -> None:
        self.order = digests.order()
        self.digests = digests.take(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def ranks(self, wanted: Digests) -> Positions:
        """Return where each of ``wanted`` stands among the sorted ones, -1 if it does not."""
        found = np.full(len(wanted), -1, np.int64)
        high, low = self.digests.high, self.digests.low
        if not len(high) or not len(wanted):
            return found
        # In ascending order: a million searches that jump about take ten times as long.
        every = wanted.order()
        for start in range(0, len(every), _AT_ONCE):
            order = every[start : start + _AT_ONCE]
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
        """Say of each of ``wanted`` whether it is here."""
        return self.ranks(wanted) >= 0
