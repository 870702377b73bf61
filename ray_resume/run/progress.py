"""`Progress`: how far a run is, as its ledger reports to the driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Progress", "Unread"]


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
