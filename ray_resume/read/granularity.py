"""How files are cut into sources: whole, by row groups, or by ranges of bytes or rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from pyarrow.fs import FileSystem

from ray_resume.core.identity import looks_like_part
from ray_resume.core.row_ranges import file_ends
from ray_resume.core.sources import SourceTable
from ray_resume.errors import NonResumableError
from ray_resume.raydata.filereads import FileReader
from ray_resume.raydata.scans import reads_with_scans
from ray_resume.read.footers import list_row_groups
from ray_resume.read.options import is_repeatable
from ray_resume.read.splits import (
    SPLIT_BYTES,
    check_splits,
    is_compressed,
    is_document,
    list_splits,
    split_files,
)

__all__ = [
    "GRANULARITIES",
    "SPLIT_ROWS",
    "Cut",
    "Cutting",
    "IsCompleted",
    "check_granularity",
    "cut",
]

GRANULARITIES = ("file", "row_group", "split", "rows", "auto")

SPLIT_ROWS = 10_000
"""Rows of a range, if the user does not say."""

AUTO_BYTES = 256 << 20
"""Files above this size are cut by ``granularity="auto"``."""

IsCompleted: TypeAlias = Callable[[SourceTable], npt.NDArray[np.bool_]]
"""Says which files a run has completed as a whole."""


class Cutting(NamedTuple):
    """How the user has files cut: a granularity, and how long parts are; None: as by default."""

    granularity: str
    split_bytes: int | None = None
    split_rows: int | None = None

    @property
    def bytes(self) -> int:
        """How many bytes a split has."""
        return self.split_bytes or SPLIT_BYTES

    @property
    def rows(self) -> int:
        """How many rows a row range has."""
        return self.split_rows or SPLIT_ROWS


class Cut(NamedTuple):
    """The sources of a read of files.

    Attributes:
        files: reads any of ``sources``.
        names: the ids of the files, if sources may be parts of them.
        of: what else their ids stand for (`identity.ids_of`).
    """

    sources: SourceTable
    files: FileReader
    names: list[str]
    of: str | None = None


def check_granularity(granularity: str, name: str, arguments: Mapping[str, Any]) -> None:
    """Make sure that a reader can read like this, before any file is listed.

    Raises:
        NonResumableError: it cannot.
    """
    if granularity == "row_group":
        _check_row_groups(name, arguments)
    if granularity == "split":
        check_splits(name, arguments)
    if granularity == "rows" and not is_repeatable(arguments):
        raise NonResumableError(
            'granularity="rows" counts the rows of a file, so each read of it must give the same '
            f"rows in the same order. With these arguments {name} may not: they have a function, "
            'or an object that is not known to be data. Use granularity="file", or do that work '
            "in a UDF behind the read."
        )


def cut(
    cutting: Cutting,
    name: str,
    arguments: Mapping[str, Any],
    files: FileReader,
    sources: SourceTable,
    *,
    on: FileSystem,
    is_completed: IsCompleted,
) -> Cut:
    """Cut files, of which ``files`` reads whole ones.

    Args:
        name: of Ray Data's reader; ``arguments`` are its own.
        sources: the files, which are on ``on``.

    Raises:
        NonResumableError: they cannot be cut like this.
    """
    granularity = cutting.granularity
    if granularity == "file":
        return Cut(sources, files, [])
    names = list(sources.ids())
    if granularity == "rows":
        return Cut(file_ends(sources, cutting.rows), files, names, f"of {cutting.rows:,} rows")
    length = cutting.bytes
    of = f"of {length:,} bytes"
    if granularity == "row_group":
        return Cut(list_row_groups(on, sources), files, names)
    if granularity == "split":
        splits = split_files(name, arguments, files, sources, on)
        return Cut(list_splits(sources, length), splits, names, of)
    for one in filter(looks_like_part, names):
        raise NonResumableError(
            f'{one} is named as a part of another file would be, so granularity="auto" could not '
            'tell them apart. Rename it, or read with granularity="file".'
        )
    large = sources.fingerprints.sizes > AUTO_BYTES
    if large.any():
        large[large] = ~is_completed(sources.take(np.flatnonzero(large)))
    whole = sources.take(np.flatnonzero(~large))
    try:
        cut_, parts, files = _parts(name, arguments, files, sources, large.copy(), on, length)
    except NonResumableError:
        cut_, parts = np.zeros(len(sources), bool), sources[:0]
    rest = sources.take(np.flatnonzero(large & ~cut_))
    both = whole
    if len(parts):
        # Parts alone may be columns, of a million.
        both = SourceTable.of(chain(whole, parts)) if len(whole) else parts
    if not len(rest):
        return Cut(both, files, names, of)
    if not is_repeatable(arguments):
        return Cut(SourceTable.of(chain(both, rest)), files, names, of)
    return Cut(file_ends(rest, cutting.rows, both), files, names, of)


def _parts(
    name: str,
    arguments: Mapping[str, Any],
    files: FileReader,
    sources: SourceTable,
    large: npt.NDArray[np.bool_],
    on: FileSystem,
    length: int,
) -> tuple[npt.NDArray[np.bool_], SourceTable, FileReader]:
    """Cut those of ``large`` files that can be cut without a look at what is before.

    CSV cannot be: a quote may stand anywhere.
    """
    if name == "read_parquet":
        _check_row_groups(name, arguments)
        return large, list_row_groups(on, sources.take(np.flatnonzero(large))), files
    if name not in ("read_json", "read_text"):
        raise NonResumableError(f"files of {name} are not cut")
    for position in np.flatnonzero(large).tolist():
        path = str(sources[position].item)
        if is_compressed(path) or (name == "read_json" and is_document(on, path)):
            large[position] = False
    some = sources.take(np.flatnonzero(large))
    return large, list_splits(some, length), split_files(name, arguments, files, some, on)


def _check_row_groups(name: str, arguments: Mapping[str, Any]) -> None:
    """Make sure that a reader reads row groups as sources.

    Raises:
        NonResumableError: it does not.
    """
    if name != "read_parquet":
        raise NonResumableError('granularity="row_group" is for ray.data.read_parquet alone.')
    if arguments.get("include_row_hash") and not reads_with_scans(name):
        raise NonResumableError(
            "include_row_hash=True counts the rows of what is read at once, so with "
            'granularity="row_group" rows of two row groups would get the same hash. Read whole '
            "files, or with the Parquet reader of Ray 2.60 (DataContext.use_datasource_v2)."
        )
