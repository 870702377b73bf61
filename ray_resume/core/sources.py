"""Sources: their identities, what their input finds them by, and how they looked when listed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from ray_resume.core.digests import Digests, Positions, digest_bytes
from ray_resume.core.part_lists import PartLists
from ray_resume.core.range_items import RangeItems
from ray_resume.core.records import Fingerprint
from ray_resume.errors import ResumeError

__all__ = [
    "Items",
    "Source",
    "SourceTable",
    "refuse_repeated",
]


_UNKNOWN = Fingerprint()
# So many objects are made at once.
_BATCH_ROWS = 1 << 14


@dataclass(frozen=True, slots=True)
class Source:
    """One source: its identity, what its input finds it by, and how it looked when listed."""

    source_id: str
    item: Any
    fingerprint: Fingerprint = _UNKNOWN


class SourceTable(Sequence[Source]):
    """Sources as columns, about 100 bytes each; each becomes a :class:`Source` when asked for."""

    def __init__(
        self,
        ids: bytes,
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int32],
        fingerprints: Fingerprints,
        items: Items,
        digests: Digests | None = None,
    ) -> None:
        """Put columns together; see :meth:`of` and :meth:`of_files`."""
        self._ids = ids
        self._starts = starts
        self._lengths = lengths
        self.fingerprints = fingerprints
        self._items = items
        self._digests = digests

    @classmethod
    def of(cls, sources: Iterable[Source]) -> SourceTable:
        """Make a table of sources, if they are not one already."""
        if isinstance(sources, SourceTable):
            return sources
        every = list(sources)
        ids = [source.source_id for source in every]
        own = all(type(s.item) is str and s.item == s.source_id for s in every)
        return cls(
            *_strings(ids),
            Fingerprints.of([source.fingerprint for source in every]),
            Items() if own else Items(listed=[source.item for source in every]),
        )

    @classmethod
    def of_files(
        cls, paths: Sequence[str], sizes: Iterable[int | None], mtimes_ns: Iterable[int | None]
    ) -> SourceTable:
        """Make a table of files: each is called as its path, and found by it."""
        return cls(*_strings(paths), Fingerprints.made(sizes, mtimes_ns), Items())

    @classmethod
    def of_parts(
        cls,
        ids: Sequence[bytes],
        parts: PartLists,
        contents: Iterable[int],
        digests: Digests,
    ) -> SourceTable:
        """Make a table of sources that are found by parts; ``contents`` stand for their rows."""
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        fingerprints = Fingerprints.made([None] * len(ids), contents)
        return cls(b"".join(ids), starts, lengths, fingerprints, Items(listed=parts), digests)

    @classmethod
    def of_ranges(
        cls,
        ids: bytes,
        lengths: npt.NDArray[np.int32],
        fingerprints: Fingerprints,
        items: RangeItems,
        digests: Digests | None = None,
    ) -> SourceTable:
        """Make a table of ends and ranges of files. ``ids`` are theirs, one after another."""
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        return cls(ids, starts, lengths, fingerprints, Items(listed=items), digests)

    @classmethod
    def cut_from(
        cls, files: SourceTable, at: Positions, ids: pa.LargeBinaryArray, items: Sequence[Any]
    ) -> SourceTable:
        """Make a table of parts of files, with their ids and items, which look as the files do.

        Args:
            at: the position of each part's file in ``files``.
            ids: in UTF-8, which may contain lone surrogates.
        """
        offsets = ids.buffers()[1]
        ends = np.frombuffer(offsets, np.int64)[ids.offset : ids.offset + len(ids) + 1]
        whole = ids.buffers()[2]
        return cls(
            b"" if whole is None else whole.to_pybytes(),
            ends[:-1].copy(),
            np.diff(ends).astype(np.int32),
            files.fingerprints.take(at),
            Items(listed=items),
        )

    @override
    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, position: int) -> Source: ...

    @overload
    def __getitem__(self, position: slice) -> SourceTable: ...

    @override
    def __getitem__(self, position: int | slice) -> Source | SourceTable:
        if isinstance(position, slice):
            return self.take(position)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"{position} of {len(self)} sources")
        source_id = self.id(position)
        item = self._items.get(position, source_id)
        return Source(source_id, item, self.fingerprints[position])

    @override
    def __iter__(self) -> Iterator[Source]:
        get = self._items.get
        every = zip(self.ids(), self.fingerprints, strict=True)
        return (Source(name, get(n, name), seen) for n, (name, seen) in enumerate(every))

    @override
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(_equal, self, other))

    __hash__ = None  # type: ignore[assignment]

    @property
    def digests(self) -> Digests:
        """The digest of each id; made when it is first asked for."""
        if self._digests is None:
            self._digests = Digests.of(self._digested())
        return self._digests

    def _digested(self) -> bytearray:
        digests = bytearray()
        for ids in self._batches_of_ids():
            digests += b"".join(map(digest_bytes, ids))
        return digests

    def _batches_of_ids(self) -> Iterator[list[bytes]]:
        whole = self._ids
        for first in range(0, len(self), _BATCH_ROWS):
            starts = self._starts[first : first + _BATCH_ROWS].tolist()
            lengths = self._lengths[first : first + _BATCH_ROWS].tolist()
            yield [
                whole[start : start + length] for start, length in zip(starts, lengths, strict=True)
            ]

    def ids(self) -> Iterator[str]:
        """Return the ids, in order."""
        for ids in self._batches_of_ids():
            yield from [text.decode("utf-8", "surrogatepass") for text in ids]

    def items(self) -> Iterable[Any]:
        """Return what the input finds each source by, in order."""
        listed = self._items.listed
        if listed is not None:
            return listed
        return (self._items.get(position, name) for position, name in enumerate(self.ids()))

    def id(self, position: int) -> str:
        """Return the id of one source."""
        return self.id_bytes(position).decode("utf-8", "surrogatepass")

    def id_bytes(self, position: int) -> bytes:
        """Return the id of one source in UTF-8, which may contain lone surrogates."""
        start = self._starts.item(position)
        return self._ids[start : start + self._lengths.item(position)]

    @property
    def part_lists(self) -> PartLists | None:
        """The parts by which sources of another pipeline are found, as columns; else None."""
        listed = self._items.listed
        return listed if isinstance(listed, PartLists) else None

    def take(self, positions: Positions | slice) -> SourceTable:
        """Return a table of those at ``positions``, which shares what it can with this one."""
        return SourceTable(
            self._ids,
            self._starts[positions],
            self._lengths[positions],
            self.fingerprints.take(positions),
            self._items.take(positions),
            None if self._digests is None else self._digests.take(positions),
        )

    def joined(self, other: SourceTable) -> SourceTable:
        """Return these sources and others; both are ends and ranges of the same files."""
        mine, theirs = self._items.listed, other._items.listed
        assert isinstance(mine, RangeItems)
        assert isinstance(theirs, RangeItems)
        return SourceTable(
            self._ids + other._ids,
            np.concatenate([self._starts, other._starts + len(self._ids)]),
            np.concatenate([self._lengths, other._lengths]),
            self.fingerprints.joined(other.fingerprints),
            Items(listed=mine.joined(theirs)),
            Digests.joined([self.digests, other.digests]),
        )

    @property
    def ranges(self) -> RangeItems | None:
        """The columns by which ends and ranges of files are found; None of other sources."""
        listed = self._items.listed
        return listed if isinstance(listed, RangeItems) else None

    def relative_to(self, base: str) -> SourceTable:
        """Return a table with ``base`` cut off from each id, all of which begin with it."""
        cut = len(base.encode("utf-8", "surrogatepass"))
        return SourceTable(
            self._ids,
            self._starts + cut,
            self._lengths - np.int32(cut),
            self.fingerprints,
            self._items.without(base),
        )

    def found_by(self, items: Items) -> SourceTable:
        """Return a table of the same sources, found by other items."""
        return SourceTable(
            self._ids, self._starts, self._lengths, self.fingerprints, items, self._digests
        )

    def packed(self) -> SourceTable:
        """Return a table that keeps nothing of sources that are not in it, fit to travel."""
        whole, ends = self.packed_ids()
        starts = np.array(ends, np.int64) - self._lengths
        listed = self._items.listed
        items = Items(listed=listed.packed()) if isinstance(listed, RangeItems) else self._items
        return SourceTable(whole, starts, self._lengths, self.fingerprints, items)

    def trimmed(self) -> SourceTable:
        """Return such a table that does not know either how its sources are read."""
        packed = self.packed()
        packed._items = Items()
        return packed

    def packed_ids(self) -> tuple[bytes, list[int]]:
        """Return the ids as UTF-8, one after another, and where each of them ends."""
        ends = np.cumsum(self._lengths, dtype=np.int64)
        first = int(self._starts[0]) if len(self) else 0
        if np.array_equal(self._starts, ends - self._lengths + first):
            return self._ids[first : first + int(ends[-1])] if len(self) else b"", ends.tolist()
        places = zip(self._starts.tolist(), self._lengths.tolist(), strict=True)
        return b"".join([self._ids[at : at + size] for at, size in places]), ends.tolist()


@dataclass(frozen=True)
class Items:
    """The items by which the reader finds sources.

    It is ``listed``, or else the id of each without its first ``cut`` characters, after ``base``.
    """

    base: str = ""
    listed: Sequence[Any] | None = None
    cut: int = 0

    def get(self, position: int, source_id: str) -> Any:
        """Return the item of one source."""
        if self.listed is not None:
            return self.listed[position]
        return self.base + source_id[self.cut :] if self.base or self.cut else source_id

    def without(self, base: str) -> Items:
        """Return the same items for ids of which ``base`` is cut off."""
        if self.listed is not None:
            return self
        return Items(self.base + base[self.cut :], cut=max(0, self.cut - len(base)))

    def take(self, positions: Positions | slice) -> Items:
        """Return those at ``positions``."""
        if self.listed is None:
            return self
        take = getattr(self.listed, "take", None)
        if take is not None:  # it is columns
            return Items(listed=take(positions))
        if isinstance(positions, slice):
            return Items(listed=self.listed[positions])
        return Items(listed=[self.listed[position] for position in positions.tolist()])


class Fingerprints(Sequence[Fingerprint]):
    """Fingerprints as columns: 17 bytes each."""

    def __init__(
        self,
        sizes: npt.NDArray[np.int64],
        mtimes_ns: npt.NDArray[np.int64],
        known: npt.NDArray[np.uint8],
    ) -> None:
        """Put columns together. ``known`` has bit 1 where a size is known, bit 2 for a time."""
        self.sizes, self.mtimes_ns, self.known = sizes, mtimes_ns, known

    @classmethod
    def of(cls, fingerprints: Sequence[Fingerprint]) -> Fingerprints:
        """Make columns of fingerprints."""
        return cls.made((f.size for f in fingerprints), (f.mtime_ns for f in fingerprints))

    @classmethod
    def made(cls, sizes: Iterable[int | None], mtimes_ns: Iterable[int | None]) -> Fingerprints:
        """Make columns of what is known of each."""
        has_size, size = _column(sizes)
        has_time, time = _column(mtimes_ns)
        return cls(size, time, (has_size | (has_time << np.uint8(1))))

    @override
    def __len__(self) -> int:
        return len(self.known)

    @overload
    def __getitem__(self, position: int) -> Fingerprint: ...

    @overload
    def __getitem__(self, position: slice) -> Fingerprints: ...

    @override
    def __getitem__(self, position: int | slice) -> Fingerprint | Fingerprints:
        if isinstance(position, slice):
            return self.take(position)
        known = self.known.item(position)
        return Fingerprint(
            self.sizes.item(position) if known & 1 else None,
            self.mtimes_ns.item(position) if known & 2 else None,
        )

    @override
    def __iter__(self) -> Iterator[Fingerprint]:
        columns = (self.known.tolist(), self.sizes.tolist(), self.mtimes_ns.tolist())
        for known, size, mtime_ns in zip(*columns, strict=True):
            yield Fingerprint(size if known & 1 else None, mtime_ns if known & 2 else None)

    def joined(self, other: Fingerprints) -> Fingerprints:
        """Return these and others."""
        return Fingerprints(
            np.concatenate([self.sizes, other.sizes]),
            np.concatenate([self.mtimes_ns, other.mtimes_ns]),
            np.concatenate([self.known, other.known]),
        )

    def take(self, positions: Positions | slice) -> Fingerprints:
        """Return those at ``positions``."""
        return Fingerprints(self.sizes[positions], self.mtimes_ns[positions], self.known[positions])


def refuse_repeated(sources: SourceTable) -> None:
    """Make sure that no two sources have the same id.

    Raises:
        ResumeError: some have; the message lists them.
    """
    repeated = sorted({sources.id(position) for position in sources.digests.duplicates().tolist()})
    if repeated:
        raise ResumeError(
            f"{len(repeated)} sources are named more than once, and a source can be read only "
            f"once: {', '.join(repeated[:10])}. Name each one once (a file, or its directory, but "
            "not both)."
        )


def _strings(
    texts: Sequence[str],
) -> tuple[bytes, npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Put texts into one, and say where each starts and how long it is, in bytes."""
    whole = "".join(texts)
    if whole.isascii():
        data, lengths = whole.encode(), np.fromiter(map(len, texts), np.int32, len(texts))
    else:
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
        data, lengths = b"".join(parts), np.fromiter(map(len, parts), np.int32, len(parts))
    return data, np.cumsum(lengths, dtype=np.int64) - lengths, lengths


def _column(
    values: Iterable[int | None],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    every = list(values)
    try:
        column = np.array(every, np.int64)
    except TypeError:
        pass
    else:
        return np.ones(len(every), np.uint8), column
    known = np.fromiter((value is not None for value in every), np.uint8, len(every))
    return known, np.fromiter((value or 0 for value in every), np.int64, len(every))


def _equal(one: object, other: object) -> bool:
    return one == other
