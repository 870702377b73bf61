"""How a table becomes files in a folder: their format, their size, their subfolders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO

import pyarrow as pa

from ray_resume.core.filenames import stem_of
from ray_resume.errors import ResumeError
from ray_resume.failpoints import failpoint
from ray_resume.write.folder import Folder, fault_of
from ray_resume.write.formats import FileFormat
from ray_resume.write.partitions import partitions_of

__all__ = ["Layout", "unwritten"]


@dataclass(frozen=True)
class Layout:
    """How rows become files: their format, and the columns that name subfolders.

    Args:
        schema: what the user gave; rows are cast to it before anything else is done to them.
    """

    format: FileFormat
    partition_columns: tuple[str, ...] = ()
    schema: pa.Schema | None = None

    def agreed_columns(self, schema: pa.Schema) -> pa.Schema:
        """Return those columns of ``schema`` that files have."""
        kept = [one for one in schema if one.name not in self.partition_columns]
        return pa.schema(kept)

    def write(
        self, folder: Folder, prefix: str, digest: bytes | None, table: pa.Table
    ) -> list[str]:
        """Write ``table`` as one file, or some for each partition; return their names.

        ``prefix`` and ``digest`` are what `core.filenames.stem_of` makes them of.

        Raises:
            ResumeError: a file cannot be written; the message names it. Or the partition columns
                are not such of ``table``.
        """
        names = []
        suffix = self.format.suffix
        for subfolder, part in partitions_of(table, self.partition_columns):
            for rows in self._pieces(part):
                name = f"{subfolder}{stem_of(prefix, digest, subfolder)}.{suffix}"
                try:
                    folder.write(name, partial(self._write_file, rows))
                except OSError as error:
                    raise unwritten(f"file {folder.uri}/{name}", error) from error
                failpoint("sink.written")
                names.append(name)
        return names

    def _write_file(self, part: pa.Table, file: IO[bytes]) -> None:
        self.format.write(part, file)

    def _pieces(self, part: pa.Table) -> Iterator[pa.Table]:
        most = self.format.max_rows or part.num_rows
        return (part.slice(start, most) for start in range(0, part.num_rows, most))


def unwritten(what: str, error: OSError) -> ResumeError:
    """Make the error for output that cannot be written: which kind of fault, and what to do."""
    fault, remedy = fault_of(error)
    return ResumeError(
        f"The output {what} cannot be written: {error}. {fault} Its rows count for nobody, and "
        f"what was committed is safe. {remedy}, and run again."
    )
