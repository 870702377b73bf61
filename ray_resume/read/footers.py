"""Reads the footers of Parquet files, as far as that is possible.

A file that cannot be opened must not keep the others from being read. So no function here raises
an error because of a file: the file fails later, in its own read task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from ray_resume.core.sources import Source, SourceTable
from ray_resume.files import one_line
from ray_resume.raydata.filereads import Unreadable

__all__ = ["list_row_groups", "readable", "schemas_of"]

_MAX_REQUESTS = 16
# Waited before a footer is read again: a store may be busy for a moment.
_RETRY_DELAYS_S = (0.1, 0.5)


def list_row_groups(filesystem: FileSystem, files: Sequence[Source]) -> SourceTable:
    """List the row groups of Parquet files, ``<path>#rg<N>``, by their footers alone.

    A file whose footer cannot be read has one source, named as its first row group. The item is
    ``(path, Unreadable)``, and to read it fails. A file of no bytes has no row groups.
    """

    def row_groups(file: Source) -> list[Source]:
        path, size = str(file.item), file.fingerprint.size
        found = _footer(filesystem, path) if size != 0 else None
        numbers: Iterable[Any] = ()
        if isinstance(found, Exception):
            numbers = [Unreadable(one_line(found))]
        elif found is not None:
            numbers = range(found.num_row_groups)
        return [
            Source(f"{file.source_id}#rg{i}", (path, number), file.fingerprint)
            for i, number in enumerate(numbers)
        ]

    with ThreadPoolExecutor(_MAX_REQUESTS) as pool:
        return SourceTable.of(chain.from_iterable(pool.map(row_groups, files)))


def readable(filesystem: FileSystem, paths: Iterable[str], count: int) -> list[str]:
    """Return those of the first ``count`` paths whose footers can be read; of the next, if none."""
    with ThreadPoolExecutor(_MAX_REQUESTS) as pool:
        for some in _runs(paths, count):
            footers = pool.map(lambda path: _footer(filesystem, path), some)
            good = [
                path
                for path, footer in zip(some, footers, strict=True)
                if not isinstance(footer, Exception)
            ]
            if good:
                return good
    return []


def schemas_of(filesystem: FileSystem, paths: Iterable[str]) -> Iterator[tuple[str, pa.Schema]]:
    """Yield the paths whose footers can be read, and the schemas that these have."""
    with ThreadPoolExecutor(_MAX_REQUESTS) as pool:
        paths = list(paths)
        footers = pool.map(lambda path: _footer(filesystem, path), paths)
        for path, footer in zip(paths, footers, strict=True):
            if not isinstance(footer, Exception):
                yield path, footer.schema.to_arrow_schema()


def _runs(paths: Iterable[str], count: int) -> Iterator[list[str]]:
    left = iter(paths)
    while some := list(islice(left, count)):
        yield some


def _footer(filesystem: FileSystem, path: str) -> pq.FileMetaData | Exception:
    def read() -> pq.FileMetaData:
        # A handle, since older versions of pyarrow take no filesystem here.
        with filesystem.open_input_file(path) as file:
            return pq.read_metadata(file)

    return _retried(read)


def _retried(read: Callable[[], pq.FileMetaData]) -> pq.FileMetaData | Exception:
    for wait_s in (*_RETRY_DELAYS_S, None):
        try:
            return read()
        except (FileNotFoundError, PermissionError) as error:
            return error
        except OSError as error:
            # pyarrow raises it for a damaged footer, too, where it only costs the waiting.
            if wait_s is None:
                return error
            time.sleep(wait_s)
        except Exception as error:
            return error
    raise AssertionError("the last attempt returns")
