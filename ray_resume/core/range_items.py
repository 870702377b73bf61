"""`RangeItems`: what row ranges are found by, as columns. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ray_resume.core.digests import Positions

__all__ = ["END", "WHOLE", "RangeItems"]

END = -1
"""Where the number of a range would be: the source is the end of its file."""


WHOLE = -2
"""The source is none of these: its item stands where the path of a file would be."""


class RangeItems(Sequence[Any]):
    """The path of each source's file, and the number of the range in it, or `END`: 12 bytes each.

    Attributes:
        paths: those of the files; or the items of sources that are `WHOLE`.
        files: for each source, the position of its file in ``paths``.
        ranges: for each source, which of its file's ranges it is, `END` or `WHOLE`.
    """

    def __init__(
        self, paths: Sequence[Any], files: npt.NDArray[np.int32], ranges: npt.NDArray[np.int64]
    ) -> None:
        self.paths, self.files, self.ranges = paths, files, ranges

    @classmethod
    def all(cls, paths: Sequence[Any], wholes: int = 0) -> RangeItems:
        """Return the items of ends of files; the first ``wholes`` of them are other items."""
        ranges = np.full(len(paths), END, np.int64)
        ranges[:wholes] = WHOLE
        return cls(paths, np.arange(len(paths), dtype=np.int32), ranges)

    @override
    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, position: int) -> Any: ...

    @overload
    def __getitem__(self, position: slice) -> RangeItems: ...

    @override
    def __getitem__(self, position: int | slice) -> Any:
        if isinstance(position, slice):
            return self.take(position)
        path, number = self.paths[self.files.item(position)], self.ranges.item(position)
        return path if number == WHOLE else (path, number)

    def take(self, positions: Positions | slice) -> RangeItems:
        """Return those at ``positions``."""
        return RangeItems(self.paths, self.files[positions], self.ranges[positions])

    def packed(self) -> RangeItems:
        """Return the same, without the files that none of these is of."""
        used, files = np.unique(self.files, return_inverse=True)
        paths = [self.paths[file] for file in used.tolist()]
        return RangeItems(paths, files.astype(np.int32), self.ranges)

    def joined(self, other: RangeItems) -> RangeItems:
        """Return these and others, which are of the same files."""
        assert self.paths is other.paths or self.paths == other.paths
        files = np.concatenate([self.files, other.files])
        return RangeItems(self.paths, files, np.concatenate([self.ranges, other.ranges]))
