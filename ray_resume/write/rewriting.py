"""Output files written again with other types. Importable on workers."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import pyarrow as pa
import ray

from ray_resume.core.filenames import OutputName, stem_of
from ray_resume.core.output_schema import SchemaMismatchError, conform
from ray_resume.core.rewrites import Rewrite
from ray_resume.write.folder import Folder
from ray_resume.write.layout import Layout
from ray_resume.write.tidying import copied

__all__ = ["Rewritten", "copy_in_tasks", "rewrite_in_tasks"]

# One task looks at so many files, if there are enough of them.
_FILES_OF_TASK = 64
# New files are written by so many tasks at most.
_COPY_TASKS = 256


@dataclass(frozen=True)
class Rewritten:
    """Some files after rewriting: new names by old ones, and why others stay as they are."""

    renamed: Mapping[str, str]
    kept: Mapping[str, str]


def rewrite_in_tasks(
    folder: Folder, layout: Layout, names: Sequence[str], schema: pa.Schema
) -> Rewritten:
    """Write new files for those of ``names`` that have another schema, in Ray tasks."""
    remote: Any = ray.remote(_rewritten)
    tasks = [
        remote.remote(folder, layout, names[start : start + _FILES_OF_TASK], schema)
        for start in range(0, len(names), _FILES_OF_TASK)
    ]
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
    return [
        copied(folder, rewrite, name, format=layout.format, schema=schema)
        for rewrite, name in rewrites
    ]


def _rewritten(
    folder: Folder, layout: Layout, names: Sequence[str], schema: pa.Schema
) -> tuple[dict[str, str], dict[str, str]]:
    expected = _as_stored(layout, schema.empty_table())
    renamed: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name in names:
        if not name.endswith(f".{layout.format.name}"):
            continue
        try:
            with folder.filesystem.open_input_file(f"{folder.path}/{name}") as file:
                if _alike(layout.format.schema_of(file), expected):
                    continue
                file.seek(0)
                table = conform(layout.format.read(file), schema)
        except SchemaMismatchError as error:
            kept[name] = str(error)
            continue
        new = _renamed(name)
        folder.write_file(new, partial(_write, layout, table))
        renamed[name] = new
    folder.sync(renamed.values())
    return renamed, kept


def _write(layout: Layout, table: pa.Table, file: IO[bytes]) -> None:
    layout.format.write_table(table, file)


def _as_stored(layout: Layout, table: pa.Table) -> pa.Schema:
    """Return the schema that the rows have when they come back from a file."""
    buffer = io.BytesIO()
    layout.format.write_table(table, buffer)
    buffer.seek(0)
    return layout.format.schema_of(buffer)


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
