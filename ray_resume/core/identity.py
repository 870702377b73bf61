"""How the ids of sources are made, and what a checkpoint remembers of that. Pure.

The same rows under two ids would be in the output twice. So each run notes in the header of its
file how its ids are made, and a run that makes them otherwise is refused while output of the
earlier ones is there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from ray_resume.core.record_log import Flag
from ray_resume.core.records import State
from ray_resume.core.snapshot import Snapshot
from ray_resume.errors import CheckpointError

__all__ = [
    "HEADER_KEY",
    "ids_in_headers",
    "ids_of",
    "looks_like_part",
    "part_file",
    "refuse_other_ids",
    "size_of",
]

HEADER_KEY = "ids"
"""Where a run's header says how its ids are made; a reset's header has a list of these."""

_RELATIVE = " relative to source_root"
_ABOUT = {
    "file": "the paths of files",
    "row_group": 'row groups of files (granularity="row_group")',
    "split": 'ranges of bytes of files (granularity="split")',
    "rows": 'ranges of rows of files (granularity="rows")',
    "auto": 'files, and parts of large ones (granularity="auto")',
    "key": "keys",
    "task": "the read tasks of a datasource",
    "upstream": "the sources of the pipeline before",
    "piece": "the files or fragments of the table",
}
_PARTS = {
    "row_group": re.compile("(.+)#rg[0-9]+", re.DOTALL),
    "split": re.compile("(.+)#bytes=[0-9]+-[0-9]+", re.DOTALL),
    "rows": re.compile("(.+)#rows=(?:[0-9]+-[0-9]+|end/[0-9]+)", re.DOTALL),
}


def ids_of(kind: str, *, relative: bool = False, of: str | None = None) -> str:
    """Name a way to make ids: a key of ``_ABOUT``; of paths, relative or not; and what else counts.

    Args:
        of: the address of the table, or how long splits or row ranges are.
    """
    return kind + (_RELATIVE if relative else "") + (f" {of}" if of else "")


def part_file(ids: str, source_id: str) -> str | None:
    """Return the id of the file that a source is a part of, by how its id was made.

    None if its sources are not parts of files. Only ids of this very checkpoint are asked about,
    and only where all of them are parts of files: elsewhere an id is never parsed.
    """
    kind = ids.partition(" ")[0]
    found = [spelt.fullmatch(source_id) for name, spelt in _PARTS.items() if kind in (name, "auto")]
    file = next((match[1] for match in found if match), None)
    # A file that was a source as a whole may have grown, and be cut now.
    return source_id if file is None and kind == "auto" else file


def size_of(ways: Collection[str], source_id: str, listed_bytes: int | None) -> int | None:
    """Return how large a source is, None if that is not known.

    Args:
        ways: how its id may have been made, as :func:`ids_of` names it.
        listed_bytes: the size in its fingerprint, which for a part of a file is that of the file.
    """
    if all(part_file(way, source_id) in (None, source_id) for way in ways):
        return listed_bytes
    if not _PARTS["split"].fullmatch(source_id):
        return None
    first, end = source_id.rpartition("=")[2].split("-")
    return int(end) - int(first)


def looks_like_part(source_id: str) -> bool:
    """Say whether a file is named as a part of another one would be."""
    return any(spelt.fullmatch(source_id) for spelt in _PARTS.values())


def ids_in_headers(headers: Mapping[str, Mapping[str, Any]], runs: Iterable[str]) -> set[str]:
    """Return how the ids of ``runs`` were made, as far as their headers say it."""
    ways: set[str] = set()
    for run in runs:
        found = headers.get(run, {}).get(HEADER_KEY, ())
        ways.update([found] if isinstance(found, str) else map(str, found))
    return ways


def refuse_other_ids(
    snapshot: Snapshot, headers: Mapping[str, Mapping[str, Any]], ids: str, checkpoint: str
) -> None:
    """Make sure that what has output was called as this run calls its sources.

    Args:
        ids: how this run makes its ids (:func:`ids_of`).
        checkpoint: how to name the checkpoint in a message.

    Raises:
        CheckpointError: some of it was not; the message has the ways out.
    """
    has_output = snapshot.in_state(State.COMPLETED) | (snapshot.column("flags") & Flag.FILES != 0)
    output = np.flatnonzero(has_output)
    same = {ids}
    if ids.startswith("auto"):
        # Files that were completed as a whole stay whole.
        same.add(ids_of("file", relative=_RELATIVE in ids))
    others = sorted(ids_in_headers(headers, snapshot.runs(output)) - same)
    if not others:
        return
    example = snapshot.record(int(output[0])).source_id
    raise CheckpointError(
        f"The checkpoint {checkpoint} names its sources by {_about(others[0])} ({example} for "
        f"one), and this run would name them by {_about(ids)}: the same rows would be in the "
        "output twice. Read with the granularity and the source_root of the runs before; or give "
        "this pipeline a checkpoint and an output folder of its own; or, to process everything "
        'again, the new output replacing the old, pass on_source_gone="remove" to resumable_read.'
    )


def _about(ids: str) -> str:
    kind = ids.partition(" ")[0]
    return _ABOUT.get(kind, kind) + ids.removeprefix(kind)
