"""Which sources share output files, since 100,000 tiny ones should not make as many tiny files.

A file that several sources share counts for all of them or for none (`ledger`), so whatever keeps
one of them pending keeps the others too. Hence only sources of one *group* share files: groups are
neighbours in the order of the listing, and together about as large as a file should be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["Packing", "groups_of"]

Part: TypeAlias = tuple[int, pa.Table]
"""A source's number, and rows of it."""


@dataclass(frozen=True)
class Packing:
    """Puts rows of small sources together until they make a file.

    Args:
        target_bytes: how large a file should be, in bytes of its rows in memory.
        groups: int32, shape (number of sources,): the group of each source number.
    """

    target_bytes: int
    groups: npt.NDArray[np.int32]

    def packs(self, parts: Iterable[Part]) -> Iterator[list[Part]]:
        """Divide the parts of one write, one for each source, among files.

        Those of a file are of one group and have one schema. The same parts in the same order
        always give the same files.
        """
        filling: dict[tuple[int, pa.Schema], list[Part]] = {}
        sizes: dict[tuple[int, pa.Schema], int] = {}
        for source, table in parts:
            if table.nbytes >= self.target_bytes:
                yield [(source, table)]
                continue
            key = (int(self.groups[source]), table.schema.remove_metadata())
            filling.setdefault(key, []).append((source, table))
            sizes[key] = sizes.get(key, 0) + table.nbytes
            if sizes[key] >= self.target_bytes:
                yield filling.pop(key)
                del sizes[key]
        yield from filling.values()


def groups_of(sizes: Sequence[int], target_bytes: int) -> npt.NDArray[np.int32]:
    """Group sources whose rows take ``sizes[i]`` bytes, by estimate; number the groups.

    A group ends where it has reached ``target_bytes``.

    Returns:
        int32, shape (len(sizes),), ascending from 0.
    """
    groups = np.zeros(len(sizes), dtype=np.int32)
    group = filled = 0
    for position, size in enumerate(sizes):
        groups[position] = group
        filled += size
        if filled >= target_bytes:
            group, filled = group + 1, 0
    return groups
