"""`Progress` and `Counts`: how far a run is, as its ledger reports to the driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ray_resume.core.stages import StageCount

__all__ = ["Counts", "Latencies", "Progress", "Unread"]


@dataclass(frozen=True)
class Unread:
    """The pending sources whose reader raised.

    Attributes:
        count: how many they are.
        source_id: the first of them.
        error: why the first could not be read.
        cause: its pickled exception, if the ledger kept it; else empty.
    """

    count: int
    source_id: str
    error: str
    cause: bytes


@dataclass(frozen=True)
class Progress:
    """How far a run is. Sources are given by their numbers.

    Attributes:
        completed: how many sources are complete.
        committed: how many of these are committed.
        files: how many output files they have.
        pending: the sources that are not complete.
        failed: those of them of which rows have failed in any pass.
        example: why the first pending source is not complete. There may be too many to explain
            each.
        unread: the pending sources whose reader raised, if there are any.
        dropped: how many earlier sources no longer have output.
        stages: what the stages did, by their positions in the pipeline.
        rows_in_flight: see `Counts`.
        slowest: by their ids, how many seconds the sources took that took longest, from the start
            of their read until they were complete.
        known: how many sources have a number.
        grown: by how many the run has more than it had planned: row ranges, less ends of files.
    """

    completed: int
    committed: int
    rows_read: int
    rows_written: int
    files: int
    pending: Sequence[int] = ()
    failed: frozenset[int] = frozenset()
    dead_rows: int = 0
    example: str | None = None
    unread: Unread | None = None
    dropped: int = 0
    stages: Mapping[int, StageCount] = field(default_factory=dict)
    rows_in_flight: int = 0
    slowest: Mapping[str, float] = field(default_factory=dict)
    known: int = 0
    grown: int = 0


@dataclass(frozen=True)
class Latencies:
    """The seconds that some commits took, and publications, from "taken" to "committed"."""

    commits: tuple[float, ...] = ()
    publications: tuple[float, ...] = ()


@dataclass(frozen=True)
class Counts:
    """The sums that the ledger has at hand, of the sources that the run is to process.

    Attributes:
        sources: how many the run is to process.
        completed: how many are complete.
        committed: how many of these are committed.
        failed: how many pending ones have failed rows, in any pass.
        quarantined: how many of these are quarantined now.
        rows_read: rows of complete sources, and likewise ``rows_written`` and ``dead_rows``.
        rows_in_flight: rows of pending sources that were read to their end; where the read goes
            on, rows that are written.
        rows_at_risk: ``rows_in_flight``, and rows of complete sources that are not committed.
        messages: how many messages took effect.
        stages: what the stages did so far, by their positions in the pipeline.
        took_s: the seconds that it took to count all this.
        grown: see `Progress`.
    """

    sources: int
    pass_number: int = 0
    completed: int = 0
    committed: int = 0
    failed: int = 0
    quarantined: int = 0
    rows_read: int = 0
    rows_written: int = 0
    dead_rows: int = 0
    rows_in_flight: int = 0
    rows_at_risk: int = 0
    messages: int = 0
    stages: Mapping[int, StageCount] = field(default_factory=dict)
    took_s: float = 0.0
    grown: int = 0
