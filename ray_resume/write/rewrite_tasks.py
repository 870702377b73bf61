"""Rewrites of output files in Ray tasks: with other types, or as they are.

Importable on workers.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import IO, Any

import pyarrow as pa
import ray

from ray_resume.core.output_schema import SchemaMismatchError, unifiable
from ray_resume.core.retyped import retype
from ray_resume.core.rewrites import Copy, Rewrite
from ray_resume.failpoints import failpoint
from ray_resume.files import one_line
from ray_resume.write.folder import Folder
from ray_resume.write.formats import TYPED, FileFormat
from ray_resume.write.layout import Layout, columns_in
from ray_resume.write.row_copies import copy_rewrite
from ray_resume.write.row_pieces import READ_ERRORS

__all__ = ["copy_in_tasks", "retype_in_tasks", "schemas_in_tasks", "stale_in_tasks"]

# One task looks at so many files, if there are enough of them.
_FILES_OF_TASK = 64
# New files are written by so many tasks at most.
_COPY_TASKS = 256


def schemas_in_tasks(
    folder: Folder, layout: Layout, names: Sequence[str]
) -> Mapping[str, pa.Schema]:
    """Return the columns of those of ``names`` that have types, as far as they are agreed on."""
    remote: Any = ray.remote(_schemas)
    tasks = [remote.remote(folder, layout, some) for some in _parts(names)]
    return {name: schema for found in ray.get(tasks) for name, schema in found.items()}


def _schemas(folder: Folder, layout: Layout, names: Sequence[str]) -> dict[str, pa.Schema]:
    found = {}
    for name in names:
        format_name = name.rpartition(".")[2]
        if format_name not in TYPED:
            continue
        # Earlier output that a user has removed needs no type.
        with (
            contextlib.suppress(FileNotFoundError),
            folder.filesystem.open_input_file(f"{folder.path}/{name}") as file,
        ):
            found[name] = unifiable(_format_of(layout, format_name).schema_of(file))
    return found


def _parts(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + _FILES_OF_TASK] for start in range(0, len(names), _FILES_OF_TASK))


def _format_of(layout: Layout, name: str) -> FileFormat:
    return layout.format if name == layout.format.name else FileFormat(name)


def stale_in_tasks(
    folder: Folder, layout: Layout, names: Sequence[str], schema: pa.Schema
) -> list[str]:
    """Return those of ``names`` that have types, and other ones than ``schema``.

    A file that cannot be read is among them. Files of earlier runs may have had another layout:
    each has its own columns.

    Args:
        schema: of all columns, those that name folders, too.
    """
    remote: Any = ray.remote(_stale)
    tasks = [remote.remote(folder, layout, some, schema) for some in _parts(names)]
    return [name for found in ray.get(tasks) for name in found]


def retype_in_tasks(folder: Folder, layout: Layout, schema: pa.Schema) -> Copy:
    """Return a function that gives files the types of ``schema``, in Ray tasks.

    Each file stays in its partition and its format.
    """
    return _in_tasks(partial(_retyped, folder, layout, schema))


def copy_in_tasks(folder: Folder, layout: Layout, schema: pa.Schema | None) -> Copy:
    """Return a function that writes the new files of rewrites in Ray tasks."""
    return _in_tasks(partial(_copied, folder, layout, schema))


def _in_tasks(copy: Copy) -> Copy:
    def copy_all(rewrites: Sequence[tuple[Rewrite, str]]) -> list[str | None]:
        remote: Any = ray.remote(_call)
        step = -(-len(rewrites) // _COPY_TASKS) or 1
        tasks = [
            remote.remote(copy, rewrites[start : start + step])
            for start in range(0, len(rewrites), step)
        ]
        return [fault for faults in ray.get(tasks) for fault in faults]

    return copy_all


def _call(copy: Copy, rewrites: Sequence[tuple[Rewrite, str]]) -> Iterable[str | None]:
    return copy(rewrites)


def _copied(
    folder: Folder,
    layout: Layout,
    schema: pa.Schema | None,
    rewrites: Sequence[tuple[Rewrite, str]],
) -> list[str | None]:
    faults = []
    for rewrite, name in rewrites:
        columns = None if schema is None else columns_in(name.rpartition("/")[0], schema)
        fault = copy_rewrite(folder, rewrite, name, format=layout.format, schema=columns)
        faults.append(fault)
    return faults


def _stale(folder: Folder, layout: Layout, names: Sequence[str], schema: pa.Schema) -> list[str]:
    stale = []
    expected: dict[tuple[str, str], pa.Schema] = {}
    for name in names:
        format_name = name.rpartition(".")[2]
        if format_name not in TYPED:
            continue
        subfolder = name.rpartition("/")[0]
        used = _format_of(layout, format_name)
        if (subfolder, format_name) not in expected:
            columns = columns_in(subfolder, schema)
            expected[subfolder, format_name] = _as_stored(used, columns.empty_table())
        try:
            with folder.open(name) as file:
                is_stale = not _alike(used.schema_of(file), expected[subfolder, format_name])
        except READ_ERRORS:
            is_stale = True
        if is_stale:
            stale.append(name)
    return stale


def _retyped(
    folder: Folder,
    layout: Layout,
    schema: pa.Schema,
    rewrites: Sequence[tuple[Rewrite, str]],
) -> list[str | None]:
    faults: list[str | None] = []
    for rewrite, new in rewrites:
        try:
            _retype_file(folder, layout, rewrite, new, schema)
        except (SchemaMismatchError, *READ_ERRORS) as error:
            faults.append(f"{folder.uri}/{rewrite.files[0]}: {one_line(error)}")
        else:
            faults.append(None)
    return faults


def _retype_file(
    folder: Folder, layout: Layout, rewrite: Rewrite, new: str, schema: pa.Schema
) -> None:
    """Write the live rows of one file with other types.

    Raises:
        SchemaMismatchError: a value would change.
        Exception: one of ``READ_ERRORS``; the file cannot be read, or the new one not written.
    """
    (name,) = rewrite.files
    used = _format_of(layout, name.rpartition(".")[2])
    with folder.open(name) as file:
        rows = used.read(file)
        if used is not layout.format:
            file.seek(0)
            used = used.compressed_as(file)
    if any(part.file_rows != len(rows) for part in rewrite.parts):
        raise OSError(
            f"it has {len(rows)} rows, and {rewrite.parts[0].file_rows} were written; put it back, "
            "or reset the sources that have rows in it"
        )
    live = pa.concat_tables([rows.slice(part.first_row, part.rows) for part in rewrite.parts])
    table = retype(live, columns_in(name.rpartition("/")[0], schema))
    folder.write_file(new, partial(_write, used, table))
    failpoint("rewrite.copied")


def _write(used: FileFormat, table: pa.Table, file: IO[bytes]) -> None:
    used.write_table(table, file)


def _as_stored(used: FileFormat, table: pa.Table) -> pa.Schema:
    """Return the schema that the rows have when they come back from a file."""
    buffer = io.BytesIO()
    used.write_table(table, buffer)
    buffer.seek(0)
    return used.schema_of(buffer)


def _alike(schema: pa.Schema, expected: pa.Schema) -> bool:
    """Say whether a file has the expected columns, beside such as nothing is agreed about."""
    known = set(expected.names)
    ours = pa.schema([one for one in schema if one.name in known])
    return bool(ours.equals(expected)) and all(
        isinstance(one.type, pa.BaseExtensionType) for one in schema if one.name not in known
    )
