"""How a table becomes files in a folder: their format, their size, their subfolders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ray_resume.core.filenames import stem_of
from ray_resume.core.output_schema import OutputSchema
from ray_resume.core.parts import FilePart
from ray_resume.core.tokens import SourceArray
from ray_resume.errors import ResumeError
from ray_resume.failpoints import failpoint
from ray_resume.write.folder import Folder, fault_of
from ray_resume.write.formats import FileFormat
from ray_resume.write.partitions import partitions_of
from ray_resume.write.source_rows import SourceRows

__all__ = ["Layout", "columns_in", "unwritten"]


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
        return pa.schema(kept, metadata=schema.metadata)

    def whole_schema(self, agreed: OutputSchema) -> pa.Schema:
        """Return the schema of the output, with the columns that name folders."""
        # A schema of the user's has metadata as well, which is not agreed on.
        return self.schema if agreed.given and self.schema is not None else agreed.schema

    def write_files(
        self, folder: Folder, prefix: str, digest: bytes | None, rows: SourceRows
    ) -> dict[int, list[FilePart]]:
        """Write ``rows`` as one file, or some for each partition.

        ``prefix`` and ``digest`` are what `core.filenames.stem_of` makes them of.

        Returns:
            Where the rows of each source are, by its number.

        Raises:
            UnwritableRowsError: the format cannot hold a row; the rows of other sources may have
                been written.
            ResumeError: a file cannot be written; the message names it. Or the partition columns
                are not such of ``table``.
        """
        parts: dict[int, list[FilePart]] = {}
        suffix = self.format.suffix
        sources = np.repeat(rows.sources, np.diff(rows.starts))
        for subfolder, table, places in partitions_of(rows.table, self.partition_columns):
            here = sources[places]
            start = 0
            for new in self.format.files_of(table):
                stem = stem_of(prefix, digest, subfolder, label=new.label)
                name = f"{subfolder}{stem}.{suffix}"
                try:
                    folder.write_file(name, new.write)
                except OSError as error:
                    raise unwritten(f"file {folder.uri}/{name}", error) from error
                failpoint("sink.written")
                for source, part in _parts_of(name, here[start : start + new.rows]):
                    parts.setdefault(source, []).append(part)
                start += new.rows
            assert start == table.num_rows, f"{start} of {table.num_rows} rows were written"
        return parts


def columns_in(subfolder: str, schema: pa.Schema) -> pa.Schema:
    """Return the columns of files in ``subfolder``, whose name has the values of the others.

    Files of an earlier run may be in folders that are called after other columns than this run's.
    """
    keys = {part.partition("=")[0] for part in subfolder.split("/") if "=" in part}
    return pa.schema([one for one in schema if one.name not in keys], metadata=schema.metadata)


def _parts_of(name: str, sources: SourceArray) -> Iterator[tuple[int, FilePart]]:
    """Yield the part of each source in a file whose rows are of ``sources``, ascending."""
    starts = np.flatnonzero(np.append(True, sources[1:] != sources[:-1]))
    counts = np.diff(np.append(starts, len(sources)))
    for source, first, count in zip(
        sources[starts].tolist(), starts.tolist(), counts.tolist(), strict=True
    ):
        yield source, FilePart(name, first, count, len(sources))


def unwritten(what: str, error: OSError) -> ResumeError:
    """Make the error for output that cannot be written: which kind of fault, and what to do."""
    fault, remedy = fault_of(error)
    return ResumeError(
        f"The output {what} cannot be written: {error}. {fault} Its rows do not count, and "
        f"committed output is safe. {remedy}, and run again."
    )
