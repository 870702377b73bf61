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
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_resume.core.columns import bytes_of, mask_of, numbers_of, parents_of, text_of, texts
from ray_resume.core.digests import DigestIndex, Digests, Positions
from ray_resume.core.output_files import OutputFileSet, listed_files
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record
from ray_resume.core.shards import Shard
from ray_resume.core.snapshot import Snapshot
from ray_resume.errors import CheckpointError

__all__ = [
    "Copy",
    "FileUse",
    "Moves",
    "Rewrite",
    "Supersession",
    "clean_files",
    "file_uses",
    "live_parts",
    "merge_groups",
    "moves_of",
    "overlapping_files",
    "plan_rewrites",
    "records_in",
    "rewrites_of",
    "still_due",
]

# The columns of records that say where a part is in its file.
_NUMBERS = ("first_rows", "part_rows", "file_rows")

# The pipeline of a file with rows of several.
_MIXED = -1

Moves = Mapping[FilePart, FilePart]
"""Where parts of old files are in new ones."""


@dataclass(frozen=True)
class FileUse:
    """How many rows of an output file are live, of how many.

    ``pipeline`` stands for the signature of the pipeline that wrote them. It is -1 if there are
    several, or if a source is not the run's own.
    """

    live_rows: int
    rows: int
    pipeline: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether all rows are live."""
        return self.live_rows == self.rows


def clean_files(snapshot: Snapshot) -> OutputFileSet:
    """Return the listed files all of whose rows are live: nothing else is in them."""
    listed = listed_files(snapshot)
    unclean = [file for file, use in file_uses(snapshot).items() if not use.is_clean]
    return listed.without(OutputFileSet.of(unclean)) if unclean else listed


def overlapping_files(snapshot: Snapshot) -> list[str]:
    """Return the files in which two parts have rows in common, or differ about the file's rows.

    No run writes such records. Rows in them would be in the output twice.
    """
    columns = [
        [
            batch.column("files").flatten(),
            *(numbers_of(batch.column(name).flatten(), "i8") for name in _NUMBERS),
        ]
        for _, batch in snapshot.batches()
    ]
    if not columns:
        return []
    names, *numbers = zip(*columns, strict=True)
    encoded = pa.concat_arrays(names).dictionary_encode()
    index = numbers_of(encoded.indices, "i4")
    first, rows, whole = map(np.concatenate, numbers)
    order = np.lexsort((first, index))
    index, first, rows, whole = index[order], first[order], rows[order], whole[order]
    wrong = (index[1:] == index[:-1]) & (
        (first[1:] < first[:-1] + rows[:-1]) | (whole[1:] != whole[:-1])
    )
    numbers_of_files = np.unique(index[1:][wrong])
    return [text_of(encoded.dictionary[number].as_py()) for number in numbers_of_files.tolist()]


@dataclass(frozen=True)
class Rewrite:
    """Files that become one: ``parts`` are their live rows, in the order of the new file."""

    files: tuple[str, ...]
    parts: tuple[FilePart, ...]

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
            Rewrite(files, tuple(part for part in self.parts if part.file in files))
            for files in (self.files[:middle], self.files[middle:])
        ]


Copy = Callable[[Sequence[tuple[Rewrite, str]]], Iterable[str | None]]
"""Writes the new file of each rewrite, under its name; returns what is wrong with each, or None."""


def file_uses(snapshot: Snapshot) -> dict[str, FileUse]:
    """Return the use of each file that is listed with a part of its rows.

    A file that is one part as a whole is clean, and is left out: there may be millions.
    """
    return _uses(snapshot, partly=True)


def _uses(
    snapshot: Snapshot, *, partly: bool = False, own: Digests | None = None
) -> dict[str, FileUse]:
    """Return the use of each listed file, or only of those with a part that is not all of it."""
    is_own = np.ones(len(snapshot), bool)
    if own is not None:
        is_own = DigestIndex(own).holds(snapshot.digests)
    names: list[pa.Array] = []
    live: list[npt.NDArray[np.int64]] = []
    whole: list[npt.NDArray[np.int64]] = []
    pipelines: list[npt.NDArray[np.int64]] = []
    for of_batch, batch in snapshot.batches():
        lists = batch.column("files")
        part_rows, file_rows = (
            numbers_of(batch.column(name).flatten(), "i8") for name in _NUMBERS[1:]
        )
        at = np.flatnonzero(part_rows != file_rows) if partly else np.arange(len(part_rows))
        if len(at):
            signature = snapshot.column("pipeline", of_batch)[:, 0]
            names.append(lists.flatten().take(pa.array(at)))
            live.append(part_rows[at])
            whole.append(file_rows[at])
            parents = parents_of(lists)[at]
            signature = np.where(is_own[of_batch], signature.astype(np.int64), _MIXED)
            pipelines.append(signature[parents])
    if not names:
        return {}
    encoded = pa.concat_arrays(names).dictionary_encode()
    index, count = numbers_of(encoded.indices, "i4"), len(encoded.dictionary)
    pipeline = np.concatenate(pipelines)
    live_rows, of_file, latest = np.zeros((3, count), np.int64)
    np.add.at(live_rows, index, np.concatenate(live))
    of_file[index] = np.concatenate(whole)
    latest[index] = pipeline
    mixed = np.zeros(count, bool)
    mixed[index[latest[index] != pipeline]] = True
    latest[mixed] = _MIXED
    columns = (live_rows.tolist(), of_file.tolist(), latest.tolist())
    names_of_files = map(text_of, encoded.dictionary.to_pylist())
    return dict(zip(names_of_files, map(FileUse, *columns), strict=True))


def live_parts(snapshot: Snapshot, files: Collection[str]) -> dict[str, list[FilePart]]:
    """Return the live parts of ``files``, in the order of their rows; none for other files."""
    found: defaultdict[str, list[FilePart]] = defaultdict(list)
    for _, part in _parts_in(snapshot, files):
        found[part.file].append(part)
    return {file: sorted(parts) for file, parts in found.items()}


def positions_in(snapshot: Snapshot, files: Collection[str]) -> dict[str, Positions]:
    """Return the positions of the records that have parts in each of ``files``."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    for position, part in _parts_in(snapshot, files):
        found[part.file].add(position)
    return {file: np.array(sorted(some), np.int64) for file, some in found.items()}


def merge_groups(
    uses: Mapping[str, FileUse],
    sizes: Mapping[str, float],
    target_bytes: int,
    max_rows: int | None = None,
) -> list[list[str]]:
    """Group files that are to become one of about ``target_bytes``.

    Args:
        uses: of the files. Only files of one pipeline are merged: others may have other options.
        sizes: the bytes of the live rows of each file. Files larger than half of the target stay.
        max_rows: the most rows of a file.

    Returns:
        Groups of at least two files, all of one subfolder and one ending.
    """
    alike: defaultdict[tuple[str, str, int], list[str]] = defaultdict(list)
    for file in sorted(sizes):
        if 2 * sizes[file] <= target_bytes and uses[file].pipeline != _MIXED:
            folder, _, name = file.rpartition("/")
            alike[folder, name.partition(".")[2], uses[file].pipeline].append(file)
    groups: list[list[str]] = []
    for files in alike.values():
        group: list[str] = []
        size, rows = 0.0, 0
        for file in files:
            more = uses[file].live_rows
            if group and (size >= target_bytes or (max_rows and rows + more > max_rows)):
                groups.append(group)
                group, size, rows = [], 0.0, 0
            group.append(file)
            size, rows = size + sizes[file], rows + more
        groups.append(group)
    return [group for group in groups if len(group) > 1]


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
    uses = _uses(snapshot, partly=sizes is None, own=own)
    groups = [[file] for file, use in sorted(uses.items()) if not use.is_clean]
    if sizes is not None:
        live_sizes = {
            file: size * uses[file].live_rows / uses[file].rows
            for file, size in sizes.items()
            if file in uses
        }
        merges = merge_groups(uses, live_sizes, target_bytes, max_rows)
        merged = {file for group in merges for file in group}
        groups = [*merges, *(group for group in groups if group[0] not in merged)]
    if share is not None:
        positions = positions_in(snapshot, [file for group in groups for file in group])
        outside = {
            file
            for file, of_file in positions.items()
            if not share.of(snapshot.digests.take(of_file)).all()
        }
        groups = [group for group in groups if outside.isdisjoint(group)]
    return rewrites_of(snapshot, groups)


def rewrites_of(snapshot: Snapshot, groups: Sequence[Sequence[str]]) -> list[Rewrite]:
    """Return for each group of files the rewrite that makes one file of them."""
    group_of = {file: number for number, group in enumerate(groups) for file in group}
    parts: list[list[FilePart]] = [[] for _ in groups]
    # In the order of the records, and of the parts in a record: each source keeps its order.
    for _, part in _parts_in(snapshot, group_of):
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
    first = 0
    for part in rewrite.parts:
        moves[part] = FilePart(new_file, first, part.rows, rewrite.rows)
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
        for position, part in _parts_in(self._snapshot, files):
            if part not in moves:
                raise CheckpointError(
                    f"The output file {part.file} was rewritten, and meanwhile its rows "
                    f"{part.first_row} to {part.first_row + part.rows - 1} became those of "
                    f"{self._snapshot.record(position).source_id}. The rewrite does not count. "
                    "Run again."
                )
            positions[position] = None
        for position in positions:
            record = self._newest.get(position) or self._snapshot.record(position)
            parts = [moves.get(part, part) for part in record.parts]
            self._sequence += 1
            record = replace(record, sequence=self._sequence, parts=tuple(_joined(parts)))
            if position in self._in_several:
                self._newest[position] = record
            yield record


def _parts_in(snapshot: Snapshot, files: Collection[str]) -> Iterator[tuple[int, FilePart]]:
    """Yield the parts of records that are in ``files``, each with the position of its record."""
    wanted = texts([bytes_of(file) for file in files])
    for positions, batch in snapshot.batches():
        lists = batch.column("files")
        names = lists.flatten()
        at = np.flatnonzero(mask_of(pc.is_in(names, wanted)))
        if not len(at):
            continue
        parents = positions[parents_of(lists)[at]].tolist()
        numbers = (numbers_of(batch.column(name).flatten(), "i8")[at].tolist() for name in _NUMBERS)
        chosen = map(text_of, names.take(pa.array(at)).to_pylist())
        for position, *part in zip(parents, chosen, *numbers, strict=True):
            yield position, FilePart(*part)


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
