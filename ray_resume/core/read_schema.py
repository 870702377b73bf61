"""The schema that a read of files has in a run, beside that of the runs before. Pure.

Plain Ray Data takes the schema of a Parquet read from the first files that it lists. Files that are
repaired or added change which files these are. So the first run of a checkpoint records the schema,
and later runs read with it: it only ever gets more columns, and wider types.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

__all__ = ["ReadSchema", "holds"]


@dataclass(frozen=True)
class ReadSchema:
    """The schema of a read.

    Args:
        listed: that of the files of this listing, as plain Ray Data determines it.
        recorded: those that earlier runs have read with, in that order; none before the first run.
        used: holds ``listed`` and ``recorded``.
        conflict: why no schema holds these; then ``used`` is ``listed``. Empty if one does.
    """

    listed: pa.Schema
    recorded: Sequence[pa.Schema]
    used: pa.Schema
    conflict: str = ""

    @property
    def is_recorded(self) -> bool:
        """Whether an earlier run has recorded a schema that is, or holds, the one in use."""
        return any(holds(schema, self.used) for schema in self.recorded)

    def names_added(self) -> list[list[str]]:
        """Return for each recorded schema which columns in use it lacks."""
        return [[name for name in self.used.names if name not in s.names] for s in self.recorded]

    def names_unread(self) -> list[str]:
        """Return the columns in use that no earlier run has read."""
        read = {name for schema in self.recorded for name in schema.names}
        return [name for name in self.used.names if name not in read]

    def news(self) -> list[str]:
        """Describe the columns that no earlier run has read, or not with the type that is used."""
        found = []
        for field in self.used:
            before = [s.field(field.name).type for s in self.recorded if field.name in s.names]
            if not before:
                found.append(f"{field.name!r} ({field.type}) is new")
            elif field.type not in before:
                found.append(f"{field.name!r} is {field.type}, and was {before[-1]}")
        return found


def holds(schema: pa.Schema, other: pa.Schema) -> bool:
    """Say whether ``schema`` has all columns of ``other``, with the same types."""
    types = {field.name: field.type for field in schema}
    return all(types.get(field.name) == field.type for field in other)
