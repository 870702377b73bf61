"""A checkpoint at one moment, wherever it is kept: the live runs, the files, and their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ray_resume.checkpoint.claims import Owner
from ray_resume.checkpoint.local.reader import Reading
from ray_resume.core.snapshot import Snapshot
from ray_resume.errors import CheckpointError

__all__ = ["MERGED", "SUPERSEDES", "Contents", "merged_headers"]

MERGED = "merged"
"""The key in a merged file's header of the headers of the files that it replaces, by run id."""

SUPERSEDES = "supersedes"
"""The key in a tidy's header of the run ids of the records that it supersedes, and which it keeps:
the run that completed a source stays the same."""


@dataclass(frozen=True)
class Contents:
    """A checkpoint at one moment.

    Attributes:
        live: the runs at work, by run id.
        killed: the runs that left a lease behind; for messages only.
        files: the writers' files that a listing found, by run id. In a shared checkpoint, each is a
            folder of segments.
        readings: what these files held; empty after a mere listing.

    Raises:
        CheckpointError: ``headers``, ``snapshot`` and ``dead_runs``, if a file could not be read.
    """

    live: Mapping[str, Owner]
    killed: Mapping[str, Owner]
    files: Mapping[str, Path | str]
    readings: Sequence[Reading] = ()

    def require_readable(self) -> Contents:
        """Return these contents if every file could be read.

        Raises:
            CheckpointError: a file could not be read. Nothing is ever skipped silently.
        """
        for reading in self.readings:
            if reading.error is not None:
                raise reading.error
        return self

    @cached_property
    def headers(self) -> dict[str, dict[str, Any]]:
        """The header of each run on record, also of runs whose files were merged into another."""
        headers: dict[str, dict[str, Any]] = {}
        for reading in self.require_readable().readings:
            headers.update(merged_headers(reading.path, reading.header))
            headers[reading.run_id] = dict(reading.header)
        return headers

    @cached_property
    def snapshot(self) -> Snapshot:
        """The records that count: the newest of each source."""
        readings = self.require_readable().readings
        return Snapshot({reading.run_id: reading.records for reading in readings})

    @property
    def dead_runs(self) -> frozenset[str]:
        """The runs that are on record and over. Their leftovers may be removed."""
        return frozenset(self.headers) - frozenset(self.live)


def merged_headers(path: Path | str, header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the headers of the runs whose files were merged into ``path``, with ``header``.

    Raises:
        CheckpointError: the header is damaged.
    """
    merged = header.get(MERGED, {})
    if not isinstance(merged, dict) or not all(isinstance(of, dict) for of in merged.values()):
        raise CheckpointError(
            f"The header of the checkpoint file {path} is damaged. Restore the file from a copy, "
            "or start over with an empty checkpoint and an empty output folder."
        )
    return merged
