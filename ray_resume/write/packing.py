"""Which sources share output files, since 100,000 tiny ones should not make as many tiny files.

A file that several sources share counts for all of them or for none (`ledger`), so whatever keeps
one of them pending keeps the others too. Hence only sources of one *group* share files: groups are
neighbours in the order of the listing, and together about as large as a file should be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_resume.write.source_rows import SourceRows

__all__ = ["Packing", "groups_of"]

# Files are put together from pieces of at most such a part of what they should have.
_PIECES = 8


@dataclass(frozen=True)
class Packing:
    """Puts rows of small sources together until they make a file.

    Args:
        target_bytes: how large a file should be, in bytes of its rows in memory.
        groups: int32, shape (number of sources,): the group of each source number.
    """

    target_bytes: int
    groups: npt.NDArray[np.int32]

    def packs(self, rows: Iterable[SourceRows]) -> Iterator[list[SourceRows]]:
        """Divide the rows of one write among files.

        Those of a file are of one group and have one schema, those of a source are in one file, and
        a source that is large enough for a file has it for itself. The same rows in the same order
        always give the same files.
        """
        filling: dict[tuple[int, pa.Schema], list[SourceRows]] = {}
        sizes: dict[tuple[int, pa.Schema], int] = {}
        for some in rows:
            schema = some.table.schema.remove_metadata()
            for piece in self._pieces(some):
                size = piece.table.nbytes
                if len(piece) == 1 and size >= self.target_bytes:
                    yield [piece]
                    continue
                key = (int(self.groups[piece.sources[0]]), schema)
                filling.setdefault(key, []).append(piece)
                sizes[key] = sizes.get(key, 0) + size
                if sizes[key] >= self.target_bytes:
                    yield filling.pop(key)
                    del sizes[key]
        yield from filling.values()

    def _pieces(self, rows: SourceRows) -> Iterator[SourceRows]:
        """Cut rows into pieces of one group, each much smaller than a file or of one source."""
        groups = self.groups[rows.sources]
        bounds = np.flatnonzero(groups[1:] != groups[:-1]) + 1
        for first, last in pairwise([0, *bounds.tolist(), len(rows)]):
            yield from self._halves(rows.part(first, last))

    def _halves(self, rows: SourceRows) -> Iterator[SourceRows]:
        # Not one source after another, of which there may be thousands.
        if len(rows) == 1 or rows.table.nbytes * _PIECES < self.target_bytes:
            yield rows
            return
        middle = len(rows) // 2
        yield from self._halves(rows.part(0, middle))
        yield from self._halves(rows.part(middle, len(rows)))


def groups_of(sizes: npt.NDArray[np.float64], target_bytes: int) -> npt.NDArray[np.int32]:
    """Group sources whose rows take ``sizes[i]`` bytes, by estimate; number the groups.

    A group ends where it has reached ``target_bytes``.

    Returns:
        int32, shape (len(sizes),), ascending from 0.
    """
    groups = np.zeros(len(sizes), dtype=np.int32)
    group, filled = 0, 0.0
    for position, size in enumerate(sizes.tolist()):
        groups[position] = group
        filled += size
        if filled >= target_bytes:
            group, filled = group + 1, 0.0
    return groups
