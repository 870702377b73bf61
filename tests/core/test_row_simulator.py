"""Random histories of runs over files of row ranges, and the mutants that they find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from row_simulator import History, Protocol, RegisterOne, first_wrong, simulate

from ray_resume.core import row_ranges
from ray_resume.core.messages import Event, Seal
from ray_resume.core.planning import Listing
from ray_resume.core.row_reading import RowFile, RowReading
from ray_resume.core.run_sources import FoundRange, RunSources
from ray_resume.core.snapshot import Snapshot

pytestmark = pytest.mark.long

EACH, MORE, MANY = 150, 1000, 3200


@pytest.mark.parametrize(
    "seeds",
    [
        range(EACH),
        pytest.param(range(EACH, MORE), marks=pytest.mark.extended),
        pytest.param(range(MORE, MANY), marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_no_row_gets_lost_and_none_comes_twice(seeds: range) -> None:
    total = History()
    for seed in seeds:
        history = simulate(seed)
        assert not history.wrong, f"simulate({seed}): {history.wrong}"
        total.add(history)
    # Each kind of thing was among them, or nothing was shown.
    assert min(total.crashes, total.found, total.completed, total.ends) > len(seeds)
    assert min(total.dropped_blocks, total.changes) > len(seeds) / 4


class RegistersLate(Protocol):
    """Rows leave with the number that their range will have, and then it is registered."""

    def __init__(self) -> None:
        self.late: list[FoundRange] = []

    def register(self, found: FoundRange, sources: RunSources, register: RegisterOne) -> int | None:
        if sources.number_of(found) is not None:
            return register(found)
        self.late.append(found)
        return len(sources)

    def have_left(self, register: RegisterOne) -> None:
        late, self.late = self.late, []
        for found in late:
            register(found)


class EndsEarly(Protocol):
    """The end of a file is sealed wherever its read ends, as in a `finally`."""

    def on_crash(self, reading: RowReading) -> Sequence[Event]:
        return [event for event in reading.end() if isinstance(event, Seal)]


class TrustsTheEnd(Protocol):
    """A file counts as done if its end is on record, without its ranges."""

    def listing(self, listing: Listing, snapshot: Snapshot) -> Listing:
        missing, row_ranges._missing = row_ranges._missing, _none_missing
        try:
            return super().listing(listing, snapshot)
        finally:
            row_ranges._missing = missing


def _none_missing(ends, found, counts, split_rows):  # type: ignore[no-untyped-def]
    return ends[:0]


class ReadsAgain(Protocol):
    """Completed ranges are not dropped."""

    def file(self, file: RowFile) -> RowFile:
        return replace(file, known=np.empty(0, np.int64))


@pytest.mark.parametrize("mutant", [RegistersLate, EndsEarly, TrustsTheEnd, ReadsAgain])
def test_mutants_are_found(mutant: type[Protocol]) -> None:
    assert first_wrong(300, mutant()) is not None
