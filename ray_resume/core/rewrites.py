"""Rewrites: output files replaced by files that hold only their live rows. Pure.

A row of an output file is *live* if it is in a part of a record that counts. A file is *clean* if
all of its rows are live. A rewrite copies the live rows of some files into one new file. Then it
*supersedes* the records that list the old files, in one transaction: same completion, other parts.
Then nothing lists the old files, and they are removed.

Invariant: killed at any moment, either the old files count or the new ones. Under a lease on their
sources the records cannot change. :func:`still_due` drops what changed before it, and a
:class:`Supersession` refuses what was not copied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_resume.core.digests import Digests, Positions
from ray_resume.core.file_uses import MIXED, FileUse, file_uses, live_parts, parts_in, positions_in
from ray_resume.core.filenames import OutputName
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record
from ray_resume.core.shards import Shard
from ray_resume.core.snapshot import Snapshot
from ray_resume.errors import CheckpointError

__all__ = [
    "Copy",
    "Moves",
    "Rewrite",
    "Supersession",
    "merge_groups",
    "moves_of",
    "plan_rewrites",
    "records_in",
    "rewrites_of",
    "still_due",
]

Moves = Mapping[FilePart, FilePart]
"""Where parts of old files are in new ones."""


@dataclass(frozen=True)
class Rewrite:
    """Files that become one: ``parts`` are their live rows, in the order of the new file.

    ``filled_bytes`` is that of the new file's name; see `OutputName.filled_bytes`.
    """

    files: tuple[str, ...]
    parts: tuple[FilePart, ...]
    filled_bytes: int | None = None

    @property
    def rows(self) -> int:
        """How many rows the new file has."""
        return sum(part.rows for part in self.parts)

    @property
    def is_needed(self) -> bool:
        """Whether a file has dead rows; if not, the rewrite only merges files."""
        files = {part.file: part.file_rows for part in self.parts}
        return self.rows < sum(files.values())

    def halves(self) -> list[Rewrite]:
        """Return two rewrites, of half of the files each; none of one file."""
        if len(self.files) < 2:
            return []
        middle = len(self.files) // 2
        return [
            Rewrite(
                files,
                tuple(part for part in self.parts if part.file in files),
                0 if len(files) > 1 else None,
            )
            for files in (self.files[:middle], self.files[middle:])
        ]


Copy = Callable[[Sequence[tuple[Rewrite, str]]], Iterable[str | None]]
"""Writes the new file of each rewrite, under its name; returns what is wrong with each, or None."""


def merge_groups(
    uses: Mapping[str, FileUse],
    sizes: Mapping[str, float],
    target_bytes: int,
    max_rows: int | None = None,
) -> list[list[str]]:
    """Group files that are to become one of about ``target_bytes``.

    Args:
        uses: of the files. Only files of one pipeline are merged: others may have other options.
        sizes: the bytes of the live rows of each file. Files larger than half of the target stay,
            and so do those that a merge has filled, however small they became.
        max_rows: the most rows of a file.

    Returns:
        Groups of at least two files, all of one subfolder and one ending. A file that was merged
        before, and not filled, is among them only if there is as much to merge with it: runs that
        add little would copy it each time.
    """
    alike: defaultdict[tuple[str, str, int], list[str]] = defaultdict(list)
    for file in sorted(sizes):
        is_small = 2 * sizes[file] <= target_bytes and _filled_bytes(file) < target_bytes
        if is_small and uses[file].pipeline != MIXED:
            folder, _, name = file.rpartition("/")
            alike[folder, name.partition(".")[2], uses[file].pipeline].append(file)
    groups: list[list[str]] = []
    for files in alike.values():
        group: list[str] = []
        size, rows = 0.0, 0
        for file in _worth_merging(files, sizes):
            more = uses[file].live_rows
            if group and (size >= target_bytes or (max_rows and rows + more > max_rows)):
                groups.append(group)
                group, size, rows = [], 0.0, 0
            group.append(file)
            size, rows = size + sizes[file], rows + more
        groups.append(group)
    return [group for group in groups if len(group) > 1]


def _filled_bytes(file: str) -> int:
    """Return the size for which a merge has filled a file; 0 if none did, -1 if none made it."""
    name = OutputName.parse(file)
    filled = None if name is None else name.filled_bytes
    return -1 if filled is None else filled


def _worth_merging(files: Sequence[str], sizes: Mapping[str, float]) -> list[str]:
    """Leave out files that were merged before, and are larger than all that they would join."""
    merged = {file for file in files if _filled_bytes(file) == 0}
    size = sum(sizes[file] for file in files if file not in merged)
    for file in sorted(merged, key=sizes.__getitem__):
        if sizes[file] > size:
            break
        size += sizes[file]
        merged.remove(file)
    return [file for file in files if file not in merged]


def plan_rewrites(
    snapshot: Snapshot,
    *,
    sizes: Mapping[str, float] | None = None,
    target_bytes: int = 0,
    max_rows: int | None = None,
    own: Digests | None = None,
    share: Shard | None = None,
) -> list[Rewrite]:
    """Return what to rewrite: each file that is not clean, and small files together.

    Args:
        sizes: the bytes of the files that are there, to merge small ones; None merges none.
        target_bytes: the size of a merged file, about.
        max_rows: the most rows of a merged file.
        own: the sources whose files may be merged; by default, all. A rewrite claims the sources in
            its files, and a run must not hold up others for the sake of larger files.
        share: leave files alone that have sources outside of this share.
    """
    uses = file_uses(snapshot, every=sizes is not None, own=own)
    filled: dict[str, int] = {}
    groups = [[file] for file, use in sorted(uses.items()) if not use.is_clean]
    if sizes is not None:
        live_sizes = {
            file: size * uses[file].live_rows / uses[file].rows
            for file, size in sizes.items()
            if file in uses
        }
        merges = merge_groups(uses, live_sizes, target_bytes, max_rows)
        merged = {file for group in merges for file in group}
        for group in merges:
            enough = sum(live_sizes[file] for file in group) >= target_bytes
            filled[group[0]] = target_bytes if enough else 0
        groups = [*merges, *(group for group in groups if group[0] not in merged)]
    if share is not None:
        positions = positions_in(snapshot, [file for group in groups for file in group])
        outside = {
            file
            for file, of_file in positions.items()
            if not share.of(snapshot.digests.take(of_file)).all()
        }
        groups = [group for group in groups if outside.isdisjoint(group)]
    return [
        replace(rewrite, filled_bytes=filled.get(rewrite.files[0]))
        for rewrite in rewrites_of(snapshot, groups)
    ]


def rewrites_of(snapshot: Snapshot, groups: Sequence[Sequence[str]]) -> list[Rewrite]:
    """Return for each group of files the rewrite that makes one file of them."""
    group_of = {file: number for number, group in enumerate(groups) for file in group}
    parts: list[list[FilePart]] = [[] for _ in groups]
    # In the order of the records, and of the parts in a record: each source keeps its order.
    for _, part in parts_in(snapshot, group_of):
        parts[group_of[part.file]].append(part)
    return [
        Rewrite(tuple(group), tuple(of_group))
        for group, of_group in zip(groups, parts, strict=True)
    ]


def still_due(plan: Iterable[Rewrite], snapshot: Snapshot) -> list[Rewrite]:
    """Return the rewrites whose files have the same live parts in ``snapshot``."""
    plan = list(plan)
    now = live_parts(snapshot, [file for rewrite in plan for file in rewrite.files])
    return [
        rewrite
        for rewrite in plan
        if sorted(rewrite.parts)
        == sorted(part for file in rewrite.files for part in now.get(file, ()))
    ]


def records_in(snapshot: Snapshot, plan: Iterable[Rewrite]) -> Positions:
    """Return the positions of the records with live rows in the files of ``plan``, ascending."""
    positions = positions_in(snapshot, [file for rewrite in plan for file in rewrite.files])
    return np.unique(np.concatenate([np.empty(0, np.int64), *positions.values()]))


def moves_of(rewrite: Rewrite, new_file: str) -> dict[FilePart, FilePart]:
    """Return where the parts are, now that the new file has been written."""
    moves: dict[FilePart, FilePart] = {}
    first, rows = 0, rewrite.rows
    for part in rewrite.parts:
        moves[part] = FilePart(new_file, first, part.rows, rows)
        first += part.rows
    return moves


class Supersession:
    """The records that take the place of those that list rewritten files, step by step.

    A source may have parts in files of several steps. Its record of a later step lists what earlier
    steps have moved.

    Args:
        snapshot: the records before the first step.
        steps: the rewrites of each step.
    """

    def __init__(self, snapshot: Snapshot, steps: Iterable[Iterable[Rewrite]]) -> None:
        self._snapshot = snapshot
        self._sequence = snapshot.highest_sequence()
        # Other records are not kept: there may be millions.
        in_steps = [records_in(snapshot, step) for step in steps]
        positions, count = np.unique(
            np.concatenate([np.empty(0, np.int64), *in_steps]), return_counts=True
        )
        self._in_several = set(positions[count > 1].tolist())
        self._newest: dict[int, Record] = {}

    def records(self, files: Collection[str], moves: Moves) -> Iterator[Record]:
        """Yield the records of a step, with the next sequence numbers.

        Args:
            files: the files that the step has rewritten.
            moves: where the live parts of ``files`` are now.

        Raises:
            CheckpointError: a live part was not moved. The step must not be committed.
        """
        positions: dict[int, None] = {}
        for position, part in parts_in(self._snapshot, files):
            if part not in moves:
                raise CheckpointError(
                    f"The output file {part.file} was rewritten, and meanwhile its rows "
                    f"{part.first_row} to {part.first_row + part.rows - 1} became those of "
                    f"{self._snapshot.record(position).source_id}. The rewrite does not count. "
                    "Run again."
                )
            positions[position] = None
        # To decode them one by one would take several times as long.
        records = self._snapshot.records(np.fromiter(positions, np.int64, len(positions)))
        for position, before in zip(positions, records, strict=True):
            record = self._newest.get(position, before)
            parts = [moves.get(part, part) for part in record.parts]
            self._sequence += 1
            record = replace(record, sequence=self._sequence, parts=tuple(_joined(parts)))
            if position in self._in_several:
                self._newest[position] = record
            yield record


def _joined(parts: Iterable[FilePart]) -> Iterator[FilePart]:
    """Join parts that stand one after another in one file."""
    last: FilePart | None = None
    for part in parts:
        if last is not None and (part.file, part.first_row) == (
            last.file,
            last.first_row + last.rows,
        ):
            last = last._replace(rows=last.rows + part.rows)
            continue
        if last is not None:
            yield last
        last = part
    if last is not None:
        yield last
