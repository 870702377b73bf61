"""How Ray Data reads tables: a snapshot of one, and each of its files or fragments by itself.

The user's reader plans a datasource, which has opened the table's newest snapshot, or the one that
was asked for. That snapshot is read until the run ends. A *piece* is what a table replaces as a
whole: a data file (Iceberg, Delta) or a fragment (Lance). A row that is deleted in a piece changes
its *deletes*, and so its fingerprint. A table that was compacted or updated has other pieces.

Internals of Ray's that are used:

* ``Dataset._logical_plan``: its ``Read`` has the datasource.
* ``LanceDatasource.lance_datasets`` (one ``lance_ds`` before Ray 2.60) and ``scanner_options``.
* ``IcebergDatasource.plan_files``, ``_get_data_scan``.
* ``ParquetDatasource._pq_paths``, ``_pq_fragments``.
* Asked for as many read tasks as there are pieces, each of them makes one for each.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from ray.data import Dataset
from ray.data.datasource import Datasource, ReadTask
from typing_extensions import override

from ray_resume.core.records import Fingerprint
from ray_resume.core.sources import Source, SourceTable, refuse_repeated
from ray_resume.errors import NonResumableError
from ray_resume.raydata.internals import unknown_ray
from ray_resume.raydata.paths import resolving

try:
    from ray.data._internal.logical.operators import Read
except ImportError as error:
    raise unknown_ray(error) from error

__all__ = ["TABLE_READERS", "TableRead", "table_read"]

# Options of a scan with which it chooses among the rows of all pieces.
_OVER_PIECES = ("limit", "offset", "nearest", "full_text_query")


@dataclass(frozen=True)
class TableRead(ABC):
    """One snapshot of a table, cut into pieces.

    Attributes:
        datasource: what Ray Data reads it with.
        address: where it is, as the ids of its pieces say it.
    """

    datasource: Any
    address: str

    @property
    @abstractmethod
    def sources(self) -> SourceTable:
        """The pieces, each found by its position in :meth:`tasks`."""

    @property
    @abstractmethod
    def schema(self) -> pa.Schema | None:
        """The schema of what is read, None if it is not known."""

    @property
    def repeatable(self) -> bool:
        """Whether each read of a piece gives the same rows in the same order."""
        return True

    @abstractmethod
    def tasks(self, data_context: Any) -> Sequence[ReadTask]:
        """Return a read task for each piece, in the order of :attr:`sources`.

        Raises:
            NonResumableError: the datasource makes other tasks.
        """

    def cannot_tell(self, piece: str) -> NonResumableError:
        """Return the error of a datasource that makes no read task for each piece alone."""
        return NonResumableError(
            f"{self.datasource.get_name()} did not make a read task for each {piece} of "
            f"{self.address}, so ray_resume cannot tell which rows are of which {piece}. Read by "
            "keys: resumable_read(load, keys=[...], checkpoint=...)."
        )


class _LanceRead(TableRead):
    """Fragments of Lance datasets."""

    @property
    @override
    def repeatable(self) -> bool:
        return self.datasource.scanner_options.get("scan_in_order") is not False

    @functools.cached_property
    def _fragments(self) -> list[tuple[Any, Any]]:
        chosen = self.datasource.scanner_options.get("fragments")
        tables = _lance_tables(self.datasource)
        return [
            (table, fragment)
            for table in tables
            for fragment in (table.get_fragments() if chosen is None else chosen)
        ]

    @property
    @override
    def sources(self) -> SourceTable:
        names = {id(table): _lance_names(table) for table in _lance_tables(self.datasource)}
        return SourceTable.of(
            Source(
                f"{_address(table.uri)}#fragment={fragment.fragment_id}",
                position,
                _of_fragment(fragment, names[id(table)]),
            )
            for position, (table, fragment) in enumerate(self._fragments)
        )

    @property
    @override
    def schema(self) -> pa.Schema | None:
        tables = _lance_tables(self.datasource)
        if len(tables) > 1 or not self._fragments:
            return None
        schema: pa.Schema = tables[0].scanner(**self.datasource.scanner_options).projected_schema
        return schema

    @override
    def tasks(self, data_context: Any) -> Sequence[ReadTask]:
        # Each has the next of the fragments.
        tasks: list[ReadTask] = self.datasource.get_read_tasks(len(self._fragments))
        if len(tasks) != len(self._fragments):
            raise self.cannot_tell("fragment")
        return tasks


class _FilesRead(TableRead):
    """Data files, which read tasks name as their only input file."""

    @abstractmethod
    def _files(self) -> Mapping[str, Fingerprint]:
        """Return how each data file looks, by the name that its read task has for it."""

    @abstractmethod
    def _id(self, name: str) -> str:
        """Return the id of a data file."""

    @property
    @override
    def sources(self) -> SourceTable:
        return SourceTable.of(
            Source(self._id(name), position, fingerprint)
            for position, (name, fingerprint) in enumerate(self._files().items())
        )

    @override
    def tasks(self, data_context: Any) -> Sequence[ReadTask]:
        names = list(self._files())
        found = {
            str(task.metadata.input_files[0]): task
            for task in self.datasource.get_read_tasks(len(names), None, data_context)
            if task.metadata.input_files is not None and len(task.metadata.input_files) == 1
        }
        if found.keys() != set(names):
            raise self.cannot_tell("data file")
        return [found[name] for name in names]


class _IcebergRead(_FilesRead):
    """Data files of an Iceberg table."""

    @override
    def _files(self) -> Mapping[str, Fingerprint]:
        schema = self.datasource._get_data_scan().projection()
        return {
            task.file.file_path: Fingerprint(
                task.file.file_size_in_bytes,
                _digest(
                    [
                        *sorted(_of_delete(delete) for delete in task.delete_files),
                        _of_columns(task.file, schema),
                    ]
                ),
            )
            for task in self.datasource.plan_files
        }

    @override
    def _id(self, name: str) -> str:
        return name

    @property
    @override
    def schema(self) -> pa.Schema | None:
        from pyiceberg.io.pyarrow import schema_to_pyarrow

        schema: pa.Schema = schema_to_pyarrow(
            self.datasource._get_data_scan().projection(), include_field_ids=False
        )
        return schema


class _DeltaRead(_FilesRead):
    """Data files of a Delta table; with deletion vectors, deltalake itself refuses the table."""

    @override
    def _files(self) -> Mapping[str, Fingerprint]:
        source = self.datasource
        return {
            str(path): Fingerprint(fragment.file_size)
            for path, fragment in zip(source._pq_paths, source._pq_fragments, strict=True)
        }

    @override
    def _id(self, name: str) -> str:
        return f"{self.address}/{name}"

    @property
    @override
    def schema(self) -> pa.Schema | None:
        tasks = self.datasource.get_read_tasks(1)
        schema = tasks[0].schema if tasks else None
        return schema if isinstance(schema, pa.Schema) else None


TABLE_READERS: Mapping[str, tuple[type[TableRead], str]] = {
    "read_delta": (_DeltaRead, "path"),
    "read_iceberg": (_IcebergRead, "table_identifier"),
    "read_lance": (_LanceRead, "uri"),
}
"""The readers of tables, by name: how each reads, and the argument that says where the table is."""


def table_read(
    reader: Callable[..., Dataset], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> TableRead:
    """Plan ``reader``, one of `TABLE_READERS`, and pin the snapshot that it reads.

    Raises:
        NonResumableError: it chooses among the rows of all pieces, or this version of Ray Data
            plans something unknown.
    """
    name = reader.__name__
    arguments = inspect.signature(reader).bind(*args, **kwargs).arguments
    for options in (arguments.get("scanner_options"), arguments.get("scan_kwargs")):
        for option in _OVER_PIECES:
            if options and options.get(option) is not None:
                raise NonResumableError(
                    f"{name} with {option}= chooses among the rows of the whole table, so which "
                    "rows of a fragment or file it reads depends on the others. Leave it out."
                )
    with resolving():
        operator = reader(*args, **kwargs)._logical_plan.dag
    if not isinstance(operator, Read) or not isinstance(operator.datasource, Datasource):
        raise NonResumableError(
            f"{name} plans {operator.name} with this version of Ray Data, whose files ray_resume "
            "cannot tell apart. Read by keys: resumable_read(load, keys=[...], checkpoint=...)."
        )
    kind, where = TABLE_READERS[name]
    read = kind(operator.datasource, _address(arguments[where]))
    refuse_repeated(read.sources)
    return read


def _lance_tables(datasource: Any) -> list[Any]:
    several = getattr(datasource, "lance_datasets", None)
    return [datasource.lance_ds] if several is None else list(several)


def _lance_names(table: Any) -> dict[int, str]:
    """Return the names of a table's fields by their numbers; none from a Lance that hides them."""
    names: dict[int, str] = {}
    fields = list(table.lance_schema.fields()) if hasattr(table, "lance_schema") else []
    while fields:
        field = fields.pop()
        names[field.id()] = field.name()
        fields += field.children()
    return names


def _of_fragment(fragment: Any, names: Mapping[int, str]) -> Fingerprint:
    # Files of a fragment are never written again; columns and deletes that come later have others.
    # A column may get another name, or be dropped, without that.
    files = [str(file.path) for file in fragment.metadata.files]
    numbers = {number for file in fragment.metadata.files for number in file.fields}
    named = [[number, names.get(number)] for number in sorted(numbers)] if names else []
    deletes = fragment.deletion_file()
    return Fingerprint(None, _digest([*files, str(deletes), fragment.physical_rows, *named]))


def _of_columns(file: Any, schema: Any) -> list[Any]:
    """Return the columns of an Iceberg file that a schema has, by number and name.

    One that the table got later is in no older file, so those stay as they are; unless they are
    read with its default since.
    """
    there = set(file.value_counts or ())
    columns = []
    for number in sorted(schema.field_ids):
        default = getattr(schema.find_field(number), "initial_default", None)
        if not there or number in there:
            columns.append([number, schema.find_column_name(number)])
        elif default is not None:
            columns.append([number, schema.find_column_name(number), repr(default)])
    return columns


def _of_delete(delete: Any) -> list[Any]:
    # Several deletion vectors may be in one file, each at its own place.
    return [delete.file_path, getattr(delete, "content_offset", None) or 0]


def _digest(what: list[Any]) -> int | None:
    """Return 63 bits that stand for plain values; None for none."""
    if not what:
        return None
    text = json.dumps(what).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def _address(given: Any) -> str:
    """Return a table's address: absolute if it is a local path, without a slash at its end."""
    text = str(given)
    local = "://" not in text and (os.sep in text or os.path.exists(text))
    return (os.path.abspath(text) if local else text).rstrip("/")
