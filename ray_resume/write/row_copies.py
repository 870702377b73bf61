"""Rows of output files copied into one new file, as they are. Importable on workers; loads no Ray.

Rows of typed files (Parquet, ORC, Feather) keep their types and metadata; of all others (JSON lines
and CSV, WebDataset shards, NumPy files), the bytes are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial

import pyarrow as pa

from ray_resume.core.parts import FilePart
from ray_resume.core.rewrites import Rewrite
from ray_resume.errors import ResumeError
from ray_resume.failpoints import failpoint
from ray_resume.files import one_line
from ray_resume.write.array_files import ArrayFiles
from ray_resume.write.folder import Folder, fault_of
from ray_resume.write.formats import TYPED, FileFormat, parsed_suffix
from ray_resume.write.line_files import LineFiles
from ray_resume.write.row_pieces import IncompatibleFilesError, rows_in_order
from ray_resume.write.sample_files import SampleFiles
from ray_resume.write.typed_files import TypedFiles

__all__ = ["IncompatibleFilesError", "copy_rewrite", "copy_rows"]


def copy_rows(
    folder: Folder,
    parts: Sequence[FilePart],
    name: str,
    *,
    format: FileFormat | None = None,
    schema: pa.Schema | None = None,
) -> None:
    """Write rows of output files, part after part, as the new file ``name``.

    Args:
        parts: of one file or of several, all with the suffix of ``name``.
        format: how output is written. Without it, or if it is of another suffix, the new file
            takes codec and row group size from the first old one.
        schema: what the output's columns are; rows of typed files are made to conform to it.

    Raises:
        IncompatibleFilesError: the files have different schemas or headers, or do not conform.
        ResumeError: a file is missing, damaged, or has not the rows that its parts say; or the new
            file cannot be written.

    Guarantees: the old files are not changed. The new file appears whole or not at all; on a local
    file system it survives a power cut after ``folder.sync([name])``.
    """
    suffix = _suffix(name)
    others = {part.file for part in parts if _suffix(part.file) != suffix}
    if others or not parts:
        raise ValueError(f"{name} cannot hold rows of {sorted(others)}")
    kind, codec = parsed_suffix(suffix)
    if kind == "images":
        raise IncompatibleFilesError(
            f"The output file {folder.uri}/{parts[0].file} has one image, and no file holds "
            "several. Nothing was changed."
        )
    given = None if format is None or format.suffix != suffix else format
    files: TypedFiles | LineFiles | SampleFiles | ArrayFiles
    if kind in TYPED:
        files = TypedFiles(kind, given, schema)
    elif kind == "webdataset":
        files = SampleFiles()
    elif kind == "numpy":
        files = ArrayFiles(sum(part.rows for part in parts))
    else:
        header = given.has_header if given is not None and kind == "csv" else None
        files = LineFiles(kind, codec, header, name.rpartition("/")[2])
    try:
        with closing(rows_in_order(folder, parts, files.read)) as rows:
            folder.write_file(name, partial(files.write, rows))
    except (OSError, pa.ArrowException) as error:
        raise _unwritten(f"{folder.uri}/{name}", error) from error


def copy_rewrite(
    folder: Folder,
    rewrite: Rewrite,
    name: str,
    *,
    format: FileFormat | None = None,
    schema: pa.Schema | None = None,
) -> str | None:
    """Write the new file of a rewrite; return what is wrong with its old files, or None."""
    try:
        try:
            copy_rows(folder, rewrite.parts, name, format=format, schema=schema)
        except IncompatibleFilesError:
            if schema is None or len(rewrite.files) > 1:
                raise
            # Retyping has kept the file as it is, since values of its dead or live rows would
            # change. Its live rows keep their types, too.
            copy_rows(folder, rewrite.parts, name, format=format)
    except ResumeError as error:
        return str(error)
    failpoint("rewrite.copied")
    return None


def _suffix(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2]


def _unwritten(uri: str, error: Exception) -> ResumeError:
    if isinstance(error, OSError):
        fault, remedy = fault_of(error)
        remedy = f"{fault} {remedy}, and run again."
    else:
        remedy = "Keep the files that its rows stand in."
    return ResumeError(
        f"The output file {uri} cannot be written: {one_line(error)}. Nothing was changed. {remedy}"
    )
