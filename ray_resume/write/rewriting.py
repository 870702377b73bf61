"""Output files written again with other types. Importable on workers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import pyarrow as pa
import ray

from ray_resume.core.filenames import OutputName, stem_of
from ray_resume.core.output_schema import SchemaMismatchError, unifiable
from ray_resume.core.retyped import retype
from ray_resume.core.rewrites import Rewrite
from ray_resume.write.folder import Folder
from ray_resume.write.formats import TYPED, FileFormat
from ray_resume.write.layout import Layout, columns_in
from ray_resume.write.row_copies import copy_rewrite

__all__ = ["Rewritten", "copy_in_tasks", "rewrite_in_tasks", "schemas_in_tasks"]

# One task looks at so many files, if there are enough of them.
_FILES_OF_TASK = 64
# New files are written by so many tasks at most.
_COPY_TASKS = 256


@dataclass(frozen=True)
class Rewritten:
    """Some files after rewriting: new names by old ones, and why others stay as they are."""

    renamed: Mapping[str, str]
    kept: Mapping[str, str]


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


def rewrite_in_tasks(
    folder: Folder, layout: Layout, names: Sequence[str], schema: pa.Schema
) -> Rewritten:
    """Write new files for those of ``names`` that have another schema, in Ray tasks.

    Files of earlier runs may have had another layout. Each stays in its partition and its format,
    if that is one that has types.

    Args:
        schema: of all columns, those that name folders, too.
    """
    remote: Any = ray.remote(_rewritten)
    tasks = [remote.remote(folder, layout, some, schema) for some in _parts(names)]
    renamed: dict[str, str] = {}
    kept: dict[str, str] = {}
    for some, others in ray.get(tasks):
        renamed.update(some)
        kept.update(others)
    return Rewritten(renamed, kept)


def copy_in_tasks(
    folder: Folder, layout: Layout, schema: pa.Schema | None
) -> Callable[[Sequence[tuple[Rewrite, str]]], list[str | None]]:
    """Return a function that writes the new files of rewrites in Ray tasks; see `tidying.Copy`."""

    def copy(rewrites: Sequence[tuple[Rewrite, str]]) -> list[str | None]:
        remote: Any = ray.remote(_copied)
        step = -(-len(rewrites) // _COPY_TASKS) or 1
        tasks = [
            remote.remote(folder, layout, rewrites[start : start + step], schema)
            for start in range(0, len(rewrites), step)
        ]
        return [fault for faults in ray.get(tasks) for fault in faults]

    return copy


def _copied(
    folder: Folder,
    layout: Layout,
    rewrites: Sequence[tuple[Rewrite, str]],
    schema: pa.Schema | None,
) -> list[str | None]:
    faults = []
    for rewrite, name in rewrites:
        columns = None if schema is None else columns_in(name.rpartition("/")[0], schema)
        fault = copy_rewrite(folder, rewrite, name, format=layout.format, schema=columns)
        faults.append(fault)
    return faults


def _rewritten(
    folder: Folder, layout: Layout, names: Sequence[str], schema: pa.Schema
) -> tuple[dict[str, str], dict[str, str]]:
    renamed: dict[str, str] = {}
    kept: dict[str, str] = {}
    expected: dict[tuple[str, str], tuple[pa.Schema, pa.Schema]] = {}
    for name in names:
        format_name = name.rpartition(".")[2]
        if format_name not in TYPED:
            continue
        subfolder = name.rpartition("/")[0]
        used = _format_of(layout, format_name)
        if (subfolder, format_name) not in expected:
            columns = columns_in(subfolder, schema)
            expected[subfolder, format_name] = columns, _as_stored(used, columns.empty_table())
        columns, stored = expected[subfolder, format_name]
        with folder.filesystem.open_input_file(f"{folder.path}/{name}") as file:
            found = used.schema_of(file)
            if _alike(found, stored):
                continue
            file.seek(0)
            try:
                table = retype(used.read(file), columns)
            except SchemaMismatchError as error:
                kept[name] = str(error)
                continue
            if used is not layout.format:
                file.seek(0)
                used = used.compressed_as(file)
        new = _renamed(name)
        folder.write_file(new, partial(_write, used, table))
        renamed[name] = new
    folder.sync(renamed.values())
    return renamed, kept


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


def _renamed(name: str) -> str:
    """Make a name that no file has had before, of the same run and source, in the same folder."""
    subfolder, _, bare = name.rpartition("/")
    parsed = OutputName.parse(name)
    assert parsed is not None, f"{name} is no output file of ray_resume"
    digest = None if parsed.is_shared else bytes.fromhex(parsed.digest)
    stem = stem_of(f"{parsed.checkpoint}-{parsed.run_id}", digest, subfolder)
    return f"{subfolder}{'/' if subfolder else ''}{stem}.{bare.partition('.')[2]}"
