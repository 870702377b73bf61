"""What a look at a checkpoint finds, wherever the checkpoint is: records, headers, who is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_resume.checkpoint.claims import Owner
from ray_resume.checkpoint.local.reader import Reading
from ray_resume.errors import CheckpointError

if TYPE_CHECKING:
    from ray_resume.core.snapshot import Union

__all__ = ["MERGED", "Contents", "Look", "Note", "contents_of", "merged_headers"]

MERGED = "merged"
"""In the header of a file that takes the place of others: their headers, by run id."""


@dataclass(frozen=True)
class Note:
    """A checkpoint at one moment: who is at work, who was killed, and where each writer's file is.

    ``files`` are the writers' files, by run id; in a shared checkpoint, folders of segments.
    """

    live: dict[str, Owner]
    killed: dict[str, Owner]
    files: dict[str, Path | str]


@dataclass(frozen=True)
class Look(Note):
    """What the files that were noted held."""

    readings: list[Reading]


@dataclass(frozen=True)
class Contents:
    """A look at a checkpoint: the records that count, each run's header, and who is alive.

    A run's file may have been merged with others (see `compaction`): its header is here all the
    same. ``files`` are the writers' files that there are, by run id. ``killed`` are the runs that
    left a lease behind, for messages alone.
    """

    union: Union
    headers: dict[str, dict[str, Any]]
    live: dict[str, Owner]
    files: dict[str, Path | str]
    killed: dict[str, Owner]

    @property
    def dead_runs(self) -> frozenset[str]:
        """The runs that are on record and over: their left-overs may be removed."""
        return frozenset(self.headers) - frozenset(self.live)


def contents_of(
    readings: Iterable[Reading], live: dict[str, Owner], killed: dict[str, Owner]
) -> Contents:
    """Make the union of what was read.

    Raises:
        CheckpointError: something could not be read.
    """
    headers: dict[str, dict[str, Any]] = {}
    pairs, files = {}, {}
    for reading in readings:
        if reading.error is not None:
            raise reading.error
        headers.update(merged_headers(reading.path, reading.header))
        headers[reading.run_id] = dict(reading.header)
        pairs[reading.run_id], files[reading.run_id] = reading.pairs, reading.path

    def owner(run_id: str) -> str:
        return f"the checkpoint file {files[run_id]}"

    # Not before the files are read: a process that reads nothing need not load numpy.
    from ray_resume.core.snapshot import Union

    return Contents(Union(pairs, owner=owner), headers, live, files, killed)


def merged_headers(path: Path | str, header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the headers of the runs whose files were merged into ``path``, with ``header``.

    Raises:
        CheckpointError: it is damaged.
    """
    merged = header.get(MERGED, {})
    if not isinstance(merged, dict) or not all(isinstance(of, dict) for of in merged.values()):
        raise CheckpointError(
            f"The header of the checkpoint file {path} is damaged. Restore the file from a copy, "
            "or start over with an empty checkpoint and an empty output folder."
        )
    return merged
