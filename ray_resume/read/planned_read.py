"""`PlannedRead`: an input of `resumable_read`, and what comes with it; one function a kind."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from ray.data.datasource import Datasource

from ray_resume.core.read_schema import ReadSchema
from ray_resume.core.shards import Shard
from ray_resume.core.sources import SourceTable
from ray_resume.errors import NonResumableError
from ray_resume.raydata.paths import is_http, is_local_scheme
from ray_resume.raydata.scans import Scan
from ray_resume.raydata.table_reads import table_read
from ray_resume.read.fixed_schema import fixed_schema
from ray_resume.read.granularity import Cutting, IsCompleted, check_granularity, cut
from ray_resume.read.inputs import FileInput, Input, file_reader_of
from ray_resume.read.key_input import KeyInput, key_sources, refuse_arguments
from ray_resume.read.listing import relative_to
from ray_resume.read.options import is_repeatable
from ray_resume.read.overlap import InputFolders
from ray_resume.read.paths import id_of_url, resolve
from ray_resume.read.reader_files import arguments_of, list_reader_files
from ray_resume.read.row_input import RowInput
from ray_resume.read.table_input import TableInput

__all__ = [
    "PlannedRead",
    "read_files",
    "read_keys",
    "read_table",
    "share_of",
    "with_fixed_schema",
]

# Bytes in memory for a byte on disk, where the reader does not tell: those of Parquet, as plain Ray
# Data takes them before it has sampled any file. Only a parallelism depends on it.
_INFLATION = 5.0


class PlannedRead(NamedTuple):
    """An input, and what comes with it.

    Attributes:
        kind: what each source is, as `identity.ids_of` takes it.
        files: the ids of the files that sources are parts of, if they are.
        columns: what Ray Data selects above the read, if anything.
        folders: where the files are, if files are read.
        sampled: the paths of the files that the schema of the read comes from, if it has one.
        of: the address of the table that is read, or how long parts of files are, if that counts.
    """

    kind: str
    input: Input
    files: Collection[str] = ()
    columns: list[str] | None = None
    folders: InputFolders | None = None
    sampled: Sequence[str] = ()
    of: str | None = None


def with_fixed_schema(
    read: PlannedRead, recorded: Sequence[pa.Schema]
) -> tuple[PlannedRead, ReadSchema]:
    """Have files read with a schema that is also that of earlier runs."""
    assert isinstance(read.input, FileInput)
    assert isinstance(read.input.files, Scan)
    scan = read.input.files
    schema = fixed_schema(scan, recorded, read.input.filesystem, read.sampled)
    files_input = replace(read.input, files=scan.with_schema(schema.used))
    return read._replace(input=files_input), schema


def share_of(read: PlannedRead, share: Shard) -> tuple[PlannedRead, SourceTable]:
    """Return the input for one share of the sources, and the sources in it."""
    sources = read.input.sources
    held = share.of(sources.digests)
    if isinstance(read.input, RowInput):
        # The ranges of a file may be in any share: each share has its end.
        held |= read.input.ends
        read = read._replace(input=replace(read.input, share=share))
    return read, sources.take(np.flatnonzero(held))


def read_keys(
    load: Any, keys: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> PlannedRead:
    """Plan a read of one source for each key."""
    refuse_arguments(load, args, kwargs)
    if isinstance(load, Datasource) or not callable(load):
        raise NonResumableError(f"keys= needs a function load(key), not {load!r}.")
    return PlannedRead("key", KeyInput(getattr(load, "__name__", "Keys"), key_sources(keys), load))


def read_table(reader: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PlannedRead:
    """Plan a read of the pieces of a table."""
    table = table_read(reader, args, kwargs)
    title = table.datasource.get_name()
    return PlannedRead("piece", TableInput(title, table.sources, table), of=table.address)


def read_files(
    reader: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cutting: Cutting,
    source_root: str | os.PathLike[str] | None,
    is_completed: IsCompleted,
) -> PlannedRead:
    """List the files, and plan how they are read."""
    name = reader.__name__
    arguments = arguments_of(reader, args, kwargs)
    check_granularity(cutting.granularity, name, arguments)
    distributed = not is_local_scheme(arguments["paths"])
    listed = list_reader_files(name, inspect.signature(reader), arguments)
    sources = listed.sources
    if source_root is not None:
        (root,) = resolve(os.fspath(source_root), listed.filesystem)[1]
        http = is_http(listed.filesystem)
        sources = relative_to(sources, id_of_url(root) if http else root)
    title = name.removeprefix("read_").replace("_", " ").title().replace(" ", "")
    files, columns, sampled = file_reader_of(title, reader, arguments, listed.opened_on, sources)
    found = cut(
        cutting,
        name,
        arguments,
        files,
        sources,
        on=listed.opened_on,
        is_completed=is_completed,
    )
    files_input = FileInput(
        title,
        found.sources,
        found.files,
        files.inflation() or _INFLATION,
        listed.opened_on,
        repeatable=is_repeatable(arguments),
        distributed=distributed,
        selects=name == "read_parquet",
    )
    if found.sources.ranges is not None:
        files_input = RowInput(**vars(files_input), split_rows=cutting.rows)
    kind = cutting.granularity
    return PlannedRead(kind, files_input, found.names, columns, listed.folders, sampled, found.of)
