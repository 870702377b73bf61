"""Ranges of bytes of files, as columns: one file may have a million.

Importable on workers: knows neither checkpoints nor lmdb.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import override

from ray_resume.read.line_ranges import ByteRange

__all__ = ["FileRange", "FileRanges"]

Numbers: TypeAlias = npt.NDArray[np.int64]

FileRange: TypeAlias = "tuple[str, ByteRange] | str"
"""A path and a range of its bytes; or a path alone, whose file is read as a whole."""


class FileRanges(Sequence[FileRange]):
    """Ranges of files, each made when it is asked for. A range without bytes is a whole file.

    Pickled, it has the paths of those files alone that it has ranges of.
    """

    def __init__(self, paths: Sequence[str], at: Numbers, firsts: Numbers, ends: Numbers) -> None:
        """Put columns together; ``at`` is the position of each range's path in ``paths``."""
        self._paths, self._at = paths, at
        self._firsts, self._ends = firsts, ends

    @classmethod
    def cut(cls, paths: Sequence[str], sizes: Numbers, length: int) -> FileRanges:
        """Cut files of ``sizes`` into ranges of ``length`` bytes; one without bytes stays whole."""
        counts = np.maximum(1, -(-sizes // length))
        at = np.repeat(np.arange(len(paths)), counts)
        firsts = (np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
        return cls(paths, at, firsts, np.minimum(firsts + length, sizes[at]))

    @property
    def at(self) -> Numbers:
        """The position of each range's file."""
        return self._at

    @property
    def lengths(self) -> Numbers:
        """How many bytes each range has."""
        return self._ends - self._firsts

    def names(self, files: Sequence[bytes]) -> pa.LargeBinaryArray:
        """Return the ids of the ranges, ``<file>#bytes=<A>-<B>``, by the ids of the files."""
        kind = pa.large_binary()
        first, end = (
            pa.array(numbers).cast(pa.large_string()).cast(kind)
            for numbers in (self._firsts, self._ends)
        )
        named = pa.array(files, kind).take(pa.array(self._at))
        texts = (pa.scalar(text, kind) for text in (b"#bytes=", b"-", b""))
        equals, dash, nothing = texts
        return pc.binary_join_element_wise(named, equals, first, dash, end, nothing)

    def take(self, positions: Numbers | slice) -> FileRanges:
        """Return those at ``positions``."""
        used, at = np.unique(self._at[positions], return_inverse=True)
        paths = [self._paths[position] for position in used.tolist()]
        return FileRanges(paths, at, self._firsts[positions], self._ends[positions])

    @override
    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, position: int) -> FileRange: ...

    @overload
    def __getitem__(self, position: slice) -> FileRanges: ...

    @override
    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return self.take(position)
        path = self._paths[self._at.item(position)]
        found = ByteRange(self._firsts.item(position), self._ends.item(position))
        return (path, found) if found.first < found.end else path
