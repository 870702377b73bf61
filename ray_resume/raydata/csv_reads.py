"""The columns that Ray Data finds at the start of a CSV file, given to reads of later lines.

Ray Data takes the names of columns from the first line and, where the user gives none, their types
from the first block. A reader that begins elsewhere would take other ones: ``007`` is a text in a
column that began with ``abc``, and a number otherwise.

Internals of Ray's that are used:

* ``CSVDatasource.read_options``, ``parse_options``, ``arrow_csv_args``: what it gives to PyArrow.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.csv
from pyarrow.fs import FileSystem

from ray_resume.errors import ResumeError
from ray_resume.raydata.filereads import DatasourceFiles

__all__ = ["CsvColumns", "columns_at_start"]


@dataclass(frozen=True)
class CsvColumns:
    """Columns of a CSV file.

    Attributes:
        names: those in the file.
        schema: those that are read, with their types.
    """

    names: list[str]
    schema: pa.Schema

    def given_to(self, files: DatasourceFiles, *, header: bool) -> DatasourceFiles:
        """Have ``files`` read these columns; from lines with a header if there is one."""
        moved: Any = copy.copy(files.template)
        if not header:
            moved.read_options = _copied(moved.read_options)
            moved.read_options.column_names = self.names
            moved.read_options.autogenerate_column_names = False
        converting = moved.arrow_csv_args.get("convert_options") or pyarrow.csv.ConvertOptions()
        converting = _copied(converting)
        found: dict[str, set[pa.DataType]] = {}
        for field in self.schema:
            found.setdefault(field.name, set()).add(field.type)
        for name, types in found.items():
            if len(types) > 1:
                raise ResumeError(
                    f"Two columns are called {name!r} and have different types, which PyArrow can "
                    "be told by name alone, so only a read from the start of the file finds them. "
                    'Read with granularity="file".'
                )
        converting.column_types = {name: kind for name, (kind,) in found.items()}
        moved.arrow_csv_args = {**moved.arrow_csv_args, "convert_options": converting}
        return replace(files, template=moved)


def columns_at_start(files: DatasourceFiles, filesystem: FileSystem, path: str) -> CsvColumns:
    """Find the columns of a file as Ray Data does: by its first line and its first block.

    Raises:
        ValueError: PyArrow cannot read the first block.
    """
    template: Any = files.template
    with filesystem.open_input_file(path) as file:
        # The end of a block is where the next one begins, so some of that is read, too.
        data = file.read_at(min(file.size(), 2 * template.read_options.block_size), 0)

    def found(**options: Any) -> pa.Schema:
        reading, parsing = template.read_options, template.parse_options
        source = pa.BufferReader(data)
        with pyarrow.csv.open_csv(
            source, read_options=reading, parse_options=parsing, **options
        ) as reader:
            return reader.schema

    try:
        return CsvColumns(found().names, found(**template.arrow_csv_args))
    except pa.ArrowInvalid as error:
        # The words of Ray Data's own error.
        raise ValueError(
            f"Failed to read CSV file: {path}. Please check the CSV file has correct format. "
            f"{error}"
        ) from error


def _copied(options: Any) -> Any:
    return pickle.loads(pickle.dumps(options))
