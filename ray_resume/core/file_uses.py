"""`FileUse`: which rows of the output files are live: in a part of a record that counts. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_resume.core.columns import (
    bytes_of,
    mask_of,
    numbers,
    numbers_of,
    parents_of,
    text_of,
    texts,
)
from ray_resume.core.digests import DigestIndex, Digests, Positions
from ray_resume.core.output_files import OutputFileSet, listed_files
from ray_resume.core.parts import FilePart
from ray_resume.core.snapshot import Snapshot

__all__ = [
    "MIXED",
    "FileUse",
    "clean_files",
    "file_uses",
    "live_parts",
    "overlapping_files",
    "parts_in",
    "positions_in",
]

# The columns of records that say where a part is in its file.
_NUMBERS = ("first_rows", "part_rows", "file_rows")

MIXED = -1
"""The pipeline of a file with rows of several."""


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


def file_uses(
    snapshot: Snapshot, *, every: bool = False, own: Digests | None = None
) -> dict[str, FileUse]:
    """Return the use of each file that is listed with a part of its rows.

    A file that is one part as a whole is clean, and is left out: there may be millions.

    Args:
        every: those files, too.
        own: the sources of the run; by default any.
    """
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
        at = np.arange(len(part_rows)) if every else np.flatnonzero(part_rows != file_rows)
        if len(at):
            signature = snapshot.column("pipeline", of_batch)[:, 0]
            names.append(lists.flatten().take(numbers(at, "i8")))
            live.append(part_rows[at])
            whole.append(file_rows[at])
            parents = parents_of(lists)[at]
            signature = np.where(is_own[of_batch], signature.astype(np.int64), MIXED)
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
    latest[mixed] = MIXED
    columns = (live_rows.tolist(), of_file.tolist(), latest.tolist())
    names_of_files = map(text_of, encoded.dictionary.to_pylist())
    return dict(zip(names_of_files, map(FileUse, *columns), strict=True))


def live_parts(snapshot: Snapshot, files: Collection[str]) -> dict[str, list[FilePart]]:
    """Return the live parts of ``files``, in the order of their rows; none for other files."""
    found: defaultdict[str, list[FilePart]] = defaultdict(list)
    for _, part in parts_in(snapshot, files):
        found[part.file].append(part)
    return {file: sorted(parts) for file, parts in found.items()}


def positions_in(snapshot: Snapshot, files: Collection[str]) -> dict[str, Positions]:
    """Return the positions of the records that have parts in each of ``files``."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    for position, part in parts_in(snapshot, files):
        found[part.file].add(position)
    return {file: np.array(sorted(some), np.int64) for file, some in found.items()}


def parts_in(snapshot: Snapshot, files: Collection[str]) -> Iterator[tuple[int, FilePart]]:
    """Yield the parts of records that are in ``files``, each with the position of its record."""
    wanted = texts([bytes_of(file) for file in files])
    for positions, batch in snapshot.batches():
        lists = batch.column("files")
        names = lists.flatten()
        at = np.flatnonzero(mask_of(pc.is_in(names, wanted)))
        if not len(at):
            continue
        parents = positions[parents_of(lists)[at]].tolist()
        places = (numbers_of(batch.column(name).flatten(), "i8")[at].tolist() for name in _NUMBERS)
        chosen = map(text_of, names.take(numbers(at, "i8")).to_pylist())
        for position, *part in zip(parents, chosen, *places, strict=True):
            yield position, FilePart(*part)
