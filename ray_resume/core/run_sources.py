"""`RunSources`: the sources of a run, by number, as they come to be. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ray_resume.core.range_items import RangeItems
from ray_resume.core.records import Fingerprint
from ray_resume.core.sources import SourceTable

__all__ = ["FoundRange", "RunSources", "with_found"]


class FoundRange(NamedTuple):
    """A row range that a read found: its id, a source of the same file, and its number there."""

    source_id: str
    of: int
    range: int


class RunSources:
    """The pending sources of a run, and after them the ranges that its reads have found."""

    def __init__(self, planned: SourceTable) -> None:
        self._planned = planned
        self.found: list[FoundRange] = []
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._planned) + len(self.found)

    def id(self, number: int) -> str:
        """Return the id of a source."""
        if number < len(self._planned):
            return self._planned.id(number)
        return self.found[number - len(self._planned)].source_id

    def fingerprint(self, number: int) -> Fingerprint:
        """Return how a source looked when it was listed, as its file did."""
        if number >= len(self._planned):
            number = self.found[number - len(self._planned)].of
        return self._planned.fingerprints[number]

    def number_of(self, found: FoundRange) -> int | None:
        """Return the number of a range, None if it has none yet."""
        if found.of < len(self._planned) and self._planned.id(found.of) == found.source_id:
            return found.of
        return self._numbers.get(found.source_id)

    def add(self, found: FoundRange) -> None:
        """Give a range the next number."""
        self._numbers[found.source_id] = len(self)
        self.found.append(found)


def with_found(sources: SourceTable, found: Sequence[FoundRange]) -> SourceTable:
    """Return a run's sources with ranges that its reads have found, in the order of numbers."""
    items = sources.ranges
    assert items is not None
    ids = [one.source_id.encode("utf-8", "surrogatepass") for one in found]
    of = np.fromiter((one.of for one in found), np.int64, len(found))
    ranges = np.fromiter((one.range for one in found), np.int64, len(found))
    return sources.joined(
        SourceTable.of_ranges(
            b"".join(ids),
            np.fromiter(map(len, ids), np.int32, len(ids)),
            sources.fingerprints.take(of),
            RangeItems(items.paths, items.files[of], ranges),
        )
    )
