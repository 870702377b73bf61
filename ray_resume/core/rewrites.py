"""Rewrites: output files replaced by files that hold only their live rows. Pure.

A row of an output file is *live* if it is in a part of a record that counts. A file is *clean* if
all of its rows are live. A rewrite copies the live rows of some files into one new file. Then it
*supersedes* the records that list the old files, in one transaction: same completion, other parts.
Then nothing lists the old files, and they are removed.

Invariant: killed at any moment, either the old files count or the new ones. A rewrite is
compare-and-set: :func:`superseding` refuses to make records if a live part of an old file was not
copied as it is on record now.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_resume.core.columns import bytes_of, mask_of, numbers_of, parents_of, text_of, texts
from ray_resume.core.digests import Positions
from ray_resume.core.output_files import OutputFileSet, listed_files
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record
from ray_resume.core.shards import Shard
from ray_resume.core.snapshot import Snapshot
from ray_resume.errors import CheckpointError

__all__ = [
    "FileUse",
    "Moves",
    "Rewrite",
    "clean_files",
    "file_uses",
    "live_parts",
    "merge_groups",
    "moves_of",
    "overlapping_files",
    "plan_rewrites",
    "records_in",
    "still_due",
    "superseding",
]

# The columns of records that say where a part is in its file.
_NUMBERS = ("first_rows", "part_rows", "file_rows")

Moves = Mapping[FilePart, FilePart]
"""Where parts of old files are in new ones."""


@dataclass(frozen=True)
class FileUse:
    """How many rows of an output file are live, of how many."""

    live_rows: int
    rows: int

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


def file_uses(snapshot: Snapshot) -> dict[str, FileUse]:
    """Return the use of each file that is listed with a part of its rows.

    A file that is one part as a whole is clean, and is left out: there may be millions.
    """
    names: list[pa.Array] = []
    live: list[npt.NDArray[np.int64]] = []
    whole: list[npt.NDArray[np.int64]] = []
    for _, batch in snapshot.batches():
        rows = numbers_of(batch.column("part_rows").flatten(), "i8")
        of_file = numbers_of(batch.column("file_rows").flatten(), "i8")
        partly = rows != of_file
        if partly.any():
            names.append(batch.column("files").flatten().take(pa.array(np.flatnonzero(partly))))
            live.append(rows[partly])
            whole.append(of_file[partly])
    if not names:
        return {}
    encoded = pa.concat_arrays(names).dictionary_encode()
    index = numbers_of(encoded.indices, "i4")
    live_rows = np.zeros(len(encoded.dictionary), np.int64)
    np.add.at(live_rows, index, np.concatenate(live))
    file_rows = np.zeros(len(encoded.dictionary), np.int64)
    file_rows[index] = np.concatenate(whole)
    return {
        text_of(name): FileUse(used, rows)
        for name, used, rows in zip(
            encoded.dictionary.to_pylist(), live_rows.tolist(), file_rows.tolist(), strict=True
        )
    }


def live_parts(snapshot: Snapshot, files: Collection[str]) -> dict[str, list[FilePart]]:
    """Return the live parts of ``files``, in the order of their rows; none for other files."""
    found: defaultdict[str, list[FilePart]] = defaultdict(list)
    for _, part in _parts_in(snapshot, files):
        found[part.file].append(part)
    return {file: sorted(parts) for file, parts in found.items()}


def rows_in(snapshot: Snapshot, files: Collection[str]) -> dict[str, Positions]:
    """Return the rows of the records that have parts in each of ``files``."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    for row, part in _parts_in(snapshot, files):
        found[part.file].add(row)
    return {file: np.array(sorted(rows), np.int64) for file, rows in found.items()}


def merge_groups(sizes: Mapping[str, float], target_bytes: int) -> list[list[str]]:
    """Group files that are to become one of about ``target_bytes``.

    Args:
        sizes: the bytes of the live rows of each file. Files larger than half of the target stay.

    Returns:
        Groups of at least two files, all of one subfolder and one ending.
    """
    alike: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for file in sorted(sizes):
        if 2 * sizes[file] <= target_bytes:
            folder, _, name = file.rpartition("/")
            alike[folder, name.partition(".")[2]].append(file)
    groups: list[list[str]] = []
    for files in alike.values():
        group: list[str] = []
        size = 0.0
        for file in files:
            group.append(file)
            size += sizes[file]
            if size >= target_bytes:
                groups.append(group)
                group, size = [], 0.0
        groups.append(group)
    return [group for group in groups if len(group) > 1]


def plan_rewrites(
    snapshot: Snapshot,
    *,
    sizes: Mapping[str, float] | None = None,
    target_bytes: int = 0,
    share: Shard | None = None,
) -> list[Rewrite]:
    """Return what to rewrite: each file that is not clean, and small files together.

    Args:
        sizes: the bytes of the files that are there, to merge small ones; None merges none.
        target_bytes: the size of a merged file, about.
        share: leave files alone that have sources outside of this share.
    """
    uses = file_uses(snapshot)
    groups = [[file] for file, use in sorted(uses.items()) if not use.is_clean]
    if sizes is not None:
        listed = listed_files(snapshot)
        live_sizes = {
            file: size * uses[file].live_rows / uses[file].rows if file in uses else size
            for file, size in sizes.items()
            if file in listed
        }
        merges = merge_groups(live_sizes, target_bytes)
        merged = {file for group in merges for file in group}
        groups = [*merges, *(group for group in groups if group[0] not in merged)]
    if share is not None:
        rows = rows_in(snapshot, [file for group in groups for file in group])
        outside = {
            file
            for file, of_file in rows.items()
            if not share.of(snapshot.digests.take(of_file)).all()
        }
        groups = [group for group in groups if outside.isdisjoint(group)]
    parts = live_parts(snapshot, [file for group in groups for file in group])
    return [
        Rewrite(tuple(group), tuple(part for file in group for part in parts[file]))
        for group in groups
    ]


def still_due(plan: Iterable[Rewrite], snapshot: Snapshot) -> list[Rewrite]:
    """Return the rewrites whose files have the same live parts in ``snapshot``."""
    plan = list(plan)
    now = live_parts(snapshot, [file for rewrite in plan for file in rewrite.files])
    return [
        rewrite
        for rewrite in plan
        if rewrite.parts == tuple(part for file in rewrite.files for part in now.get(file, ()))
    ]


def records_in(snapshot: Snapshot, plan: Iterable[Rewrite]) -> Positions:
    """Return the rows of the records with live rows in the files to be rewritten, ascending."""
    rows = rows_in(snapshot, [file for rewrite in plan for file in rewrite.files])
    return np.unique(np.concatenate([np.empty(0, np.int64), *rows.values()]))


def moves_of(rewrite: Rewrite, new_file: str) -> dict[FilePart, FilePart]:
    """Return where the parts are, now that the new file has been written."""
    moves: dict[FilePart, FilePart] = {}
    first = 0
    for part in rewrite.parts:
        moves[part] = FilePart(new_file, first, part.rows, rewrite.rows)
        first += part.rows
    return moves


def superseding(
    snapshot: Snapshot, files: Collection[str], moves: Moves, *, sequence: int
) -> Iterator[Record]:
    """Yield the records that take the place of those that list ``files``.

    Args:
        files: the files that were rewritten.
        moves: where the live parts of ``files`` are now.
        sequence: the highest sequence number in use.

    Raises:
        CheckpointError: a live part was not moved. The rewrite must not be committed.
    """
    rows: dict[int, None] = {}
    for row, part in _parts_in(snapshot, files):
        if part not in moves:
            raise CheckpointError(
                f"The output file {part.file} was rewritten, and meanwhile its rows "
                f"{part.first_row} to {part.first_row + part.rows - 1} became those of "
                f"{snapshot.record(row).source_id}. The rewrite does not count. Run again."
            )
        rows[row] = None
    for number, row in enumerate(rows, sequence + 1):
        record = snapshot.record(row)
        parts = [moves.get(part, part) for part in record.parts]
        yield replace(record, sequence=number, parts=tuple(_joined(parts)))


def _parts_in(snapshot: Snapshot, files: Collection[str]) -> Iterator[tuple[int, FilePart]]:
    """Yield the parts of records that are in ``files``, each with the row of its record."""
    wanted = texts([bytes_of(file) for file in files])
    for rows, batch in snapshot.batches():
        lists = batch.column("files")
        names = lists.flatten()
        at = np.flatnonzero(mask_of(pc.is_in(names, wanted)))
        if not len(at):
            continue
        parents = rows[parents_of(lists)[at]].tolist()
        numbers = (numbers_of(batch.column(name).flatten(), "i8")[at].tolist() for name in _NUMBERS)
        chosen = map(text_of, names.take(pa.array(at)).to_pylist())
        for row, *part in zip(parents, chosen, *numbers, strict=True):
            yield row, FilePart(*part)


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
