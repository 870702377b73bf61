"""The ids and fingerprints of sources that have no record yet, in as few bytes as can be.

They stand in blocks of 1024, packed. A block of which a third is not needed any more is packed
anew, so that sources cost nothing here once they are committed.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable

from ray_resume.core.records import Fingerprint
from ray_resume.core.sources import SourceTable

__all__ = ["PendingSources"]

_SHIFT = 10
_MASK = (1 << _SHIFT) - 1
_GONE = 255


class PendingSources:
    """The sources of a run by number, ``0 .. len(sources) - 1``, until they are forgotten."""

    def __init__(self, sources: SourceTable) -> None:
        self._count = len(sources)
        self._blocks: list[_Block | None] = [
            _Block.of(sources[start : start + _MASK + 1])
            for start in range(0, len(sources), _MASK + 1)
        ]

    def __len__(self) -> int:
        return self._count

    def find(self, number: int) -> tuple[bytes, int | None, int | None]:
        """Return the id, as UTF-8 (lone surrogates pass), the size in bytes and the time in ns.

        Raises:
            KeyError: the source was forgotten.
        """
        block = self._blocks[number >> _SHIFT]
        if block is None:
            raise KeyError(number)
        return block.find(number & _MASK)

    def id(self, number: int) -> str:
        """Return the id of a source.

        Raises:
            KeyError: it was forgotten.
        """
        return self.find(number)[0].decode("utf-8", "surrogatepass")

    def fingerprint(self, number: int) -> Fingerprint:
        """Return the fingerprint of a source.

        Raises:
            KeyError: it was forgotten.
        """
        return Fingerprint(*self.find(number)[1:])

    def forget(self, numbers: Iterable[int]) -> None:
        """Keep nothing of ``numbers`` any more."""
        places: defaultdict[int, list[int]] = defaultdict(list)
        for number in numbers:
            places[number >> _SHIFT].append(number & _MASK)
        for place, gone in places.items():
            block = self._blocks[place]
            if block is not None:
                block.forget(gone)
            if block is not None and block.is_loose():
                self._blocks[place] = block.packed()


class _Block:
    """Up to 1024 sources; ``places`` are theirs in the block, None while all are there."""

    __slots__ = ("ends", "gone", "ids", "known", "mtimes", "places", "sizes")

    def __init__(self) -> None:
        self.places: array[int] | None = None
        self.ids = b""
        self.ends = array("I")
        self.sizes = array("q")
        self.mtimes = array("q")
        self.known = bytearray()
        self.gone = 0

    @classmethod
    def of(cls, sources: SourceTable) -> _Block:
        block = cls()
        fingerprints = sources.fingerprints
        block.ids, ends = sources.packed_ids()
        block.ends = array("I", ends)
        block.sizes = array("q", fingerprints.sizes.tolist())
        block.mtimes = array("q", fingerprints.mtimes_ns.tolist())
        block.known = bytearray(fingerprints.known.tobytes())
        return block

    def find(self, place: int) -> tuple[bytes, int | None, int | None]:
        at = self._at(place)
        known = self.known[at]
        if known == _GONE:
            raise KeyError(place)
        return (
            self.ids[self.ends[at - 1] if at else 0 : self.ends[at]],
            self.sizes[at] if known & 1 else None,
            self.mtimes[at] if known & 2 else None,
        )

    def forget(self, places: Iterable[int]) -> None:
        for place in places:
            at = place
            if self.places is not None:
                at = bisect_left(self.places, place)
                if at == len(self.places) or self.places[at] != place:
                    continue
            self.known[at] = _GONE
        self.gone = self.known.count(_GONE)

    def is_loose(self) -> bool:
        return self.gone * 3 >= len(self.known)

    def packed(self) -> _Block | None:
        """Return a block of what is not gone; None if nothing is left."""
        left = [at for at, known in enumerate(self.known) if known != _GONE]
        if not left:
            return None
        block = _Block()
        places = self.places if self.places is not None else range(len(self.known))
        block.places = array("H", [places[at] for at in left])
        ids = [self.ids[self.ends[at - 1] if at else 0 : self.ends[at]] for at in left]
        end = 0
        for text in ids:
            end += len(text)
            block.ends.append(end)
        block.ids = b"".join(ids)
        block.sizes = array("q", [self.sizes[at] for at in left])
        block.mtimes = array("q", [self.mtimes[at] for at in left])
        block.known = bytearray(self.known[at] for at in left)
        return block

    def _at(self, place: int) -> int:
        if self.places is None:
            return place
        at = bisect_left(self.places, place)
        if at == len(self.places) or self.places[at] != place:
            raise KeyError(place)
        return at
