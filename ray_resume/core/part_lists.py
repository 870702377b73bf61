"""The parts of many sources as columns: there may be millions. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from ray_resume.core.columns import lengths_of, numbers_of, text_of
from ray_resume.core.digests import Positions
from ray_resume.core.parts import FilePart

__all__ = ["PartLists", "Parts"]

Parts = tuple[FilePart, ...]
Numbers = npt.NDArray[np.int64]


class PartLists(Sequence[Parts]):
    """For each of many sources its parts, as a tuple that is made when it is asked for.

    Pickled, it has the names of those files alone that the parts are in.
    """

    def __init__(
        self,
        starts: Numbers,
        lengths: Numbers,
        files: npt.NDArray[np.int32],
        ranges: npt.NDArray[np.int64],
        names: Sequence[str],
    ) -> None:
        """Put columns together.

        Args:
            starts: the position of each source's first part; ``lengths``: how many it has.
            files: the file of each part, as a position in ``names``.
            ranges: the first row, the rows and the rows of the file of each part: shape (n, 3).
        """
        self._starts, self._lengths = starts, lengths
        self._files, self._ranges, self._names = files, ranges, names

    @classmethod
    def of(cls, batches: Iterable[pa.RecordBatch]) -> PartLists:
        """Take the parts of records; see `records.SCHEMA`."""
        number_of: dict[bytes, int] = {}
        lengths: list[Any] = [np.empty(0, np.int64)]
        files: list[Any] = [np.empty(0, np.int32)]
        ranges: list[Any] = [np.empty((0, 3), np.int64)]
        for batch in batches:
            column = batch.column("files")
            lengths.append(lengths_of(column).astype(np.int64))
            found = column.flatten().dictionary_encode()
            names = found.dictionary.to_pylist()
            numbers = [number_of.setdefault(name, len(number_of)) for name in names]
            indices = numbers_of(found.indices, "i4")
            files.append(np.array(numbers, np.int32)[indices] if len(indices) else files[0])
            of_rows = ("first_rows", "part_rows", "file_rows")
            columns = [numbers_of(batch.column(name).flatten(), "i8") for name in of_rows]
            ranges.append(np.stack(columns, axis=1))
        every = np.concatenate(lengths)
        starts = np.cumsum(every) - every
        names = list(map(text_of, number_of))
        return cls(starts, every, np.concatenate(files), np.concatenate(ranges), names)

    @override
    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, position: int) -> Parts: ...

    @overload
    def __getitem__(self, position: slice) -> PartLists: ...

    @override
    def __getitem__(self, position: int | slice) -> Parts | PartLists:
        if isinstance(position, slice):
            return self.take(position)
        return self._parts(self._starts.item(position), self._lengths.item(position))

    @override
    def __iter__(self) -> Iterator[Parts]:
        return map(self._parts, self._starts.tolist(), self._lengths.tolist())

    def _parts(self, start: int, length: int) -> Parts:
        where = slice(start, start + length)
        files, ranges = self._files[where].tolist(), self._ranges[where].tolist()
        return tuple(
            FilePart(self._names[file], *rows) for file, rows in zip(files, ranges, strict=True)
        )

    def take(self, positions: Positions | slice) -> PartLists:
        """Return those at ``positions``, which share the parts with these."""
        starts, lengths = self._starts[positions], self._lengths[positions]
        return PartLists(starts, lengths, self._files, self._ranges, self._names)

    def order(self) -> Positions:
        """Return the order of the sources by the files and the rows of their first parts."""
        rank = np.empty(len(self._names), np.int64)
        rank[sorted(range(len(self._names)), key=self._names.__getitem__)] = np.arange(len(rank))
        has_parts = self._lengths > 0
        first = np.full((len(self), 2), -1, np.int64)
        starts = self._starts[has_parts]
        first[has_parts, 0] = rank[self._files[starts]]
        first[has_parts, 1] = self._ranges[starts, 0]
        return np.lexsort((first[:, 1], first[:, 0]))

    def files(self) -> set[str]:
        """Return the names of the files that the parts are in."""
        return {self._names[number] for number in np.unique(self._files[self._used()]).tolist()}

    def cuts(self, sizes: Mapping[str, int], least: int, most: float, pieces: int) -> Positions:
        """Return where the sources can be cut so that few files are read on both sides of a cut.

        A cut is before the first source of a file. Where files are fewer than ``pieces``, there are
        about so many, by cuts in files.

        Args:
            sizes: the bytes of the files.
            least: a file is read in pieces of so many bytes at least;
            most: and of so many at most.

        Returns:
            The positions of the sources behind the cuts, ascending; 0 is among them.
        """
        first = np.full(len(self), -1, np.int64)
        has_parts = self._lengths > 0
        first[has_parts] = self._files[self._starts[has_parts]]
        begins: npt.NDArray[np.bool_] = np.diff(first, prepend=-2) != 0
        if not len(self):
            return np.flatnonzero(begins)
        at = np.flatnonzero(begins)
        of_file = np.cumsum(begins) - 1
        own = self.sizes(sizes)
        whole = np.add.reduceat(own, at)
        before = np.cumsum(own) - own
        piece = np.clip(whole * len(at) / max(pieces, len(at)), least, most)
        number = (before - before[at][of_file]) // piece[of_file]
        return np.flatnonzero(begins | (np.diff(number, prepend=0) != 0))

    def sizes(self, sizes: Mapping[str, int]) -> npt.NDArray[np.float64]:
        """Return the bytes of each source's parts, given those of the files; 0 if not known."""
        of_file = np.array([sizes.get(name, 0) for name in self._names], np.float64)
        used = self._used()
        ranges = self._ranges[used]
        of_part = of_file[self._files[used]] * ranges[:, 1] / ranges[:, 2]
        owners = np.repeat(np.arange(len(self)), self._lengths)
        return np.bincount(owners, of_part, len(self)).astype(np.float64)

    def differs(self, other: PartLists) -> npt.NDArray[np.bool_]:
        """Say of each source whether it has other parts than that in its place in ``other``."""
        different: npt.NDArray[np.bool_] = self._lengths != other._lengths
        alike = np.flatnonzero(~different)
        one, two = self.take(alike), other.take(alike)
        number_of = {name: number for number, name in enumerate(self._names)}
        numbers = np.array([number_of.get(name, -1) for name in other._names], np.int64)
        here, there = one._used(), two._used()
        other_files = numbers[other._files[there]] != self._files[here]
        moved = other_files | (self._ranges[here] != other._ranges[there]).any(axis=1)
        owners = np.repeat(alike, one._lengths)
        different[owners[moved]] = True
        return different

    def _used(self) -> Positions:
        """Return the positions of the parts of these sources, one source after another."""
        ends = np.cumsum(self._lengths)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(
            ends - self._lengths, self._lengths
        )
        used: Positions = np.repeat(self._starts, self._lengths) + within
        return used

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        used = self._used()
        numbers, files = np.unique(self._files[used], return_inverse=True)
        names = [self._names[number] for number in numbers.tolist()]
        starts = np.cumsum(self._lengths) - self._lengths
        packed = (starts, self._lengths, files.astype(np.int32), self._ranges[used], names)
        return PartLists, packed
