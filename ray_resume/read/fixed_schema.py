"""The schema of a Parquet read, fixed over all runs of a checkpoint. In the driver."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from pyarrow.fs import FileSystem

from ray_resume.core.read_schema import ReadSchema
from ray_resume.errors import ResumeError
from ray_resume.raydata.scans import Scan, unified
from ray_resume.read.footers import schemas_of

__all__ = ["explained", "fixed_schema"]


def fixed_schema(
    scan: Scan,
    recorded: Sequence[pa.Schema],
    filesystem: FileSystem,
    sampled: Sequence[str],
) -> ReadSchema:
    """Find the schema that ``scan`` is to read with, given what earlier runs have read with.

    Args:
        sampled: the paths of the files that the schema of ``scan`` was made of.
    """
    listed = scan.whole_schema
    if not recorded:
        return ReadSchema(listed, (), listed)
    try:
        # Metadata of the first schema are those of all.
        return ReadSchema(listed, tuple(recorded), unified([*recorded, listed]))
    except (pa.ArrowException, ValueError, TypeError) as error:
        before = [("the runs before", schema) for schema in recorded]
        found = _contradiction([*before, *schemas_of(filesystem, sampled)])
        return ReadSchema(listed, tuple(recorded), listed, found or str(error))


def explained(error: Exception, filesystem: FileSystem, sampled: Sequence[str]) -> Exception:
    """Return an error that names the two files that ``error`` is about, or else the same error."""
    found = _contradiction(list(schemas_of(filesystem, sampled)))
    return error if found is None else ResumeError(f"The input has no schema: {found}")


def _contradiction(schemas: Sequence[tuple[str, pa.Schema]]) -> str | None:
    """Name the first column for which two schemas have types that are not to be unified."""
    seen: dict[str, list[tuple[str, pa.Field]]] = {}
    for origin, schema in schemas:
        for field in schema:
            for other, known in seen.setdefault(field.name, []):
                if not _unifies(known, field):
                    return _refusal(field, origin, other, known)
            # Few of them differ.
            if all(field.type != known.type for _, known in seen[field.name]):
                seen[field.name].append((origin, field))
    return None


def _unifies(one: pa.Field, other: pa.Field) -> bool:
    if one.type == other.type:
        return True
    try:
        unified([pa.schema([one.remove_metadata()]), pa.schema([other.remove_metadata()])])
    except (pa.ArrowException, ValueError, TypeError):
        return False
    return True


def _refusal(field: pa.Field, path: str, other: str, known: pa.Field) -> str:
    return (
        f"column {field.name!r} has type {field.type} in {path}, and type {known.type} in {other}, "
        "and no type holds both. Repair or remove the file, or read it in a pipeline of its own. "
        "Or have all files read with one type: pass schema= to read_parquet."
    )
