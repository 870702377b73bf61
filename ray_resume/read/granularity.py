"""How the files of a read are cut into sources: whole, by row groups, or by ranges of bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from pyarrow.fs import FileSystem

from ray_resume.core.identity import looks_like_part
from ray_resume.core.sources import SourceTable
from ray_resume.errors import NonResumableError
from ray_resume.raydata.filereads import FileReader
from ray_resume.raydata.scans import reads_with_scans
from ray_resume.read.footers import list_row_groups
from ray_resume.read.splits import (
    SPLIT_BYTES,
    check_splits,
    is_compressed,
    is_document,
    list_splits,
    split_files,
)

__all__ = ["GRANULARITIES", "Cut", "IsCompleted", "check_granularity", "cut"]

GRANULARITIES = ("file", "row_group", "split", "auto")

AUTO_BYTES = 256 << 20
"""Files above this size are cut by ``granularity="auto"``."""

IsCompleted: TypeAlias = Callable[[SourceTable], npt.NDArray[np.bool_]]
"""Says which files a run has completed as a whole."""


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


def cut(
    granularity: str,
    name: str,
    arguments: Mapping[str, Any],
    files: FileReader,
    sources: SourceTable,
    *,
    on: FileSystem,
    split_bytes: int | None,
    is_completed: IsCompleted,
) -> Cut:
    """Cut files, of which ``files`` reads whole ones.

    Args:
        name: of Ray Data's reader; ``arguments`` are its own.
        sources: the files, which are on ``on``.

    Raises:
        NonResumableError: they cannot be cut like this.
    """
    if granularity == "file":
        return Cut(sources, files, [])
    names = list(sources.ids())
    length = split_bytes or SPLIT_BYTES
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
    try:
        large, parts, files = _parts(name, arguments, files, sources, large, on, length)
    except NonResumableError:
        return Cut(sources, files, names, of)
    whole = sources.take(np.flatnonzero(~large))
    return Cut(SourceTable.of(chain(whole, parts)) if len(parts) else sources, files, names, of)


def _parts(
    name: str,
    arguments: Mapping[str, Any],
    files: FileReader,
    sources: SourceTable,
    large: npt.NDArray[np.bool_],
    on: FileSystem,
    length: int,
) -> tuple[npt.NDArray[np.bool_], SourceTable, FileReader]:
    """Cut those of ``large`` files that can be cut. CSV cannot be, without a look at all quotes."""
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
