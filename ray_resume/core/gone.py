"""Sources that are on record and not in the input any more, and what becomes of their output. Pure.

There are two kinds. ``on_source_gone`` decides about a whole source that is not listed any more. A
part of a file that is still listed, such as a row group of one that was rewritten with fewer of
them, belongs to the change of that file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ray_resume.core.digests import Positions
from ray_resume.core.filenames import OutputName
from ray_resume.core.record_log import Flag
from ray_resume.core.records import State
from ray_resume.core.shards import Shard
from ray_resume.core.snapshot import Snapshot
from ray_resume.core.sources import SourceTable
from ray_resume.errors import SourceChangedError

__all__ = ["NOTHING_GONE", "Gone", "gone_from", "judge_gone", "same_files"]

_NO_ROWS: Positions = np.empty(0, np.int64)


@dataclass(frozen=True)
class Gone:
    """Sources that are not in the input any more, as rows of the snapshot, ascending.

    ``sources`` are completed, or hold output all the same, as one that was reset. ``parts`` says
    of each part of a file that is still listed which file that is; failed ones are among them.
    ``share`` is that of the run, if it has one; ``remove`` says whether it removes the output of
    ``sources``: then failed ones are among these, too, which must not count as failed for ever.
    """

    sources: Positions = field(default_factory=lambda: _NO_ROWS)
    parts: Mapping[int, str] = field(default_factory=dict)
    share: Shard | None = None
    remove: bool = False

    def removed(self, snapshot: Snapshot) -> Positions:
        """Return those of ``sources`` whose output the run removes: of its own share alone."""
        return self.sources[self.is_own(snapshot, self.sources)] if self.remove else _NO_ROWS

    def is_own(self, snapshot: Snapshot, rows: Positions) -> npt.NDArray[np.bool_]:
        """Say of each of ``rows`` whether its source is in the run's share."""
        if self.share is None:
            return np.ones(len(rows), bool)
        return self.share.of(snapshot.digests.take(rows))


NOTHING_GONE = Gone()


def gone_from(
    snapshot: Snapshot,
    listed: SourceTable,
    *,
    files: Collection[str] = (),
    file_of: Callable[[str], str | None] = lambda _: None,
    share: Shard | None = None,
    remove: bool = False,
) -> Gone:
    """Find what is on record with output, and not among ``listed``.

    Failed parts of files are found, too; and failed sources, if what is gone is removed.

    Args:
        files: the ids of the files that were listed, where ``listed`` are parts of them.
        file_of: returns the id of the file that a source is a part of, by the source's id.
    """
    outside = np.ones(len(snapshot), bool)
    here = snapshot.find(listed.digests)
    outside[here[here >= 0]] = False
    has_output = snapshot.in_state(State.COMPLETED) | (snapshot.column("flags") & Flag.FILES != 0)
    is_left = has_output | snapshot.in_state(State.FAILED, State.QUARANTINED)
    wanted = is_left if remove else has_output
    rows = np.flatnonzero(outside & wanted)
    parts: dict[int, str] = {}
    if files:
        # A part that has failed, and is gone, must not count as failed for ever.
        rows = np.flatnonzero(outside & is_left)
        named = frozenset(files)
        for row, record in zip(rows.tolist(), snapshot.records(rows), strict=True):
            file = file_of(record.source_id)
            if file in named:
                parts[row] = file
        rows = np.setdiff1d(rows[wanted[rows]], np.array(list(parts), np.int64))
    return Gone(rows.astype(np.int64), parts, share, remove)


def judge_gone(
    snapshot: Snapshot, gone: Gone, listed: SourceTable, policy: str | None, checkpoint: str
) -> str | None:
    """Refuse to go on without sources that are gone, or return what to warn of, if anything.

    Args:
        policy: ``on_source_gone``: ``"keep"``, ``"remove"``, ``"error"``; None keeps what is
            there, or removes it if ``gone`` says so, but refuses what looks like another input.
        checkpoint: how to name the checkpoint in a message.

    Raises:
        SourceChangedError: the run must not go on; the message has the ways out.
    """
    completed = gone.sources[snapshot.column("state", gone.sources) == State.COMPLETED.value]
    if gone.remove:
        if policy is None and len(completed):
            _refuse_other_input(snapshot, completed, listed, checkpoint)
        if not len(mine := gone.removed(snapshot)):
            return None
        return (
            f"{len(mine)} sources are not in the input any more, "
            f"{snapshot.record(int(mine[0])).source_id} for one. Their output is removed."
        )
    if not len(completed):
        return None
    example = snapshot.record(int(completed[0])).source_id
    if policy == "error":
        raise SourceChangedError(
            f"{len(completed)} completed sources are not in the input any more, {example} for one. "
            'To keep their output as it is, pass on_source_gone="keep" to resumable_read; to '
            'remove it, "remove".'
        )
    if policy is None:
        _refuse_other_input(snapshot, completed, listed, checkpoint)
        _refuse_moved(snapshot, completed, listed)
    warning = (
        f"{len(completed)} completed sources are not in the input any more, {example} for one. "
        'Their output stays; on_source_gone="remove" removes it. (Is it another input? Then give '
        "it a checkpoint of its own.)"
    )
    if OutputName.parse(_bare(example)) is None:
        return warning
    return (
        f"{warning} They are output files of another resumable pipeline, which rewrites its files. "
        "If their rows are in new files now, they are in the output twice. Read that pipeline's "
        'checkpoint, with on_source_gone="remove" once: resumable_read(ray.data.read_parquet, '
        "Checkpoint(...), checkpoint=...)."
    )


def same_files(snapshot: Snapshot, gone: Positions, listed: SourceTable) -> list[tuple[str, str]]:
    """Return which sources that are gone are listed under another id, as (old, new) pairs.

    A source is taken for the same file if it is not on record, and has the name (behind the last
    slash), the size and the modification time of one that is gone.
    """
    marks = Flag.SIZE | Flag.MTIME
    known = gone[snapshot.column("flags", gone) & marks == marks]
    if not len(known):
        return []
    new = np.flatnonzero((snapshot.find(listed.digests) < 0) & (listed.fingerprints.known == marks))
    times = listed.fingerprints.mtimes_ns
    new = new[np.isin(times[new], snapshot.column("mtime_ns", known))]
    by_look: dict[tuple[str, int, int], str] = {}
    if len(new):
        known = known[np.isin(snapshot.column("mtime_ns", known), times[new])]
        for record in snapshot.records(known):
            look = record.fingerprint
            assert look.size is not None
            assert look.mtime_ns is not None
            by_look[_bare(record.source_id), look.size, look.mtime_ns] = record.source_id
    pairs = []
    for position in new.tolist():
        source_id = listed.id(position)
        size = int(listed.fingerprints.sizes[position])
        old = by_look.get((_bare(source_id), size, int(times[position])))
        if old is not None:
            pairs.append((old, source_id))
    return pairs


def _bare(source_id: str) -> str:
    return source_id.rpartition("/")[2]


_WAYS_OUT = (
    "Read the data by the name that it had; or give another input a checkpoint and an output "
    'folder of its own; or say what to do by on_source_gone= of resumable_read: "remove" removes '
    'the old output, "keep" keeps it beside the new.'
)


def _refuse_other_input(
    snapshot: Snapshot, completed: Positions, listed: SourceTable, checkpoint: str
) -> None:
    """Make sure that the input has something of what is on record, if it has anything."""
    every = int(np.count_nonzero(snapshot.in_state(State.COMPLETED)))
    if len(completed) < every or not len(listed) or (snapshot.find(listed.digests) >= 0).any():
        return
    raise SourceChangedError(
        f"The input has none of the {every} sources that the checkpoint {checkpoint} has "
        f"completed, and all of its {len(listed)} sources are new. If it is the same data under "
        "another name, its rows would be in the output twice.\n"
        f"  completed: {snapshot.record(int(completed[0])).source_id}\n"
        f"  listed:    {listed.id(0)}\n" + _WAYS_OUT
    )


def _refuse_moved(snapshot: Snapshot, completed: Positions, listed: SourceTable) -> None:
    pairs = same_files(snapshot, completed, listed)
    if pairs:
        old, new = pairs[0]
        raise SourceChangedError(
            f"{len(pairs)} completed sources are not in the input any more, and as many new ones "
            "have their name, size and modification time: the same files under another path. "
            "Their rows would be in the output twice.\n"
            f"  completed: {old}\n  listed:    {new}\n" + _WAYS_OUT
        )
