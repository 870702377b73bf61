"""How the newer of Ray Data's readers ("V2") reads files, one at a time.

Ray plans such a read as ``ListFiles -> ReadFiles``. The second operator has a *scanner*, which
knows the schema (that of the first files listed), what to select, and how to read any file. This
module does for one source what Ray's own read tasks do for many. It makes a reader, and reads one
manifest, which names a file or a row group. So rows, columns and types are the installed version's.

Internals of Ray's that are used, beside those operators:

* ``FileManifest`` and ``ParquetRowGroupChunkMetadata``: what a scanner is asked to read.
* ``requires_read_unit_boundaries``: whether a column depends on the row groups (``row_hash``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pyarrow.fs import FileSystem, LocalFileSystem
from ray.data import DataContext, Dataset
from ray.data.block import BlockMetadata

from ray_resume.core.sources import Source, SourceTable
from ray_resume.raydata.filereads import (
    ReadTaskFactory,
    Selection,
    Unreadable,
    fail,
    left_to_select,
    planned,
    row_group_of,
)
from ray_resume.raydata.internals import check_used, unknown_ray

try:
    from ray._common.retry import call_with_retry
    from ray.data._internal.datasource_v2.formats.parquet.parquet_footer_types import (
        ParquetRowGroupChunkMetadata,
    )
    from ray.data._internal.datasource_v2.formats.parquet.parquet_scanner import ParquetScanner
    from ray.data._internal.datasource_v2.formats.parquet.parquet_utils import (
        PARQUET_FILE_EXTENSIONS,
    )
    from ray.data._internal.datasource_v2.interfaces.file_manifest import FileManifest
    from ray.data._internal.datasource_v2.interfaces.synthesized_columns import SynthesizedColumn
    from ray.data._internal.logical.operators import Filter, Project, ReadFiles
    from ray.data._internal.util import unify_schemas_with_validation
except ImportError as error:
    if tuple(map(int, ray.__version__.split(".")[:2])) >= (2, 60):
        raise unknown_ray(error) from error
    # The datasources of an older Ray read all files (`filereads`).
    _KNOWN = False
else:
    _KNOWN = True

__all__ = ["SAMPLED", "Scan", "planned_scan", "reads_with_scans", "scanned_extensions", "unified"]

SAMPLED = 16
"""The first files listed, as many as this, decide on the schema of a read, as in Ray."""


def reads_with_scans(name: str) -> bool:
    """Say whether plain Ray Data would read with a scanner, as the current context has it."""
    return _KNOWN and name == "read_parquet" and bool(DataContext.get_current().use_datasource_v2)


def scanned_extensions(given: Sequence[str] | None) -> list[str]:
    """Return the extensions of the files that are read, where ``given`` were asked for."""
    return list(given or PARQUET_FILE_EXTENSIONS)


def planned_scan(
    reader: Callable[..., Dataset], paths: Sequence[str], kwargs: Mapping[str, Any]
) -> tuple[Scan, list[str] | None]:
    """Have Ray plan a read of ``paths``.

    Returns:
        The scan, and the columns that Ray selects above it, if any.
    """
    operator = planned(reader, paths, kwargs, v2=True)
    columns: list[str] | None = None
    if isinstance(operator, Project):
        columns = [str(expression.name) for expression in operator.exprs]
        operator = operator.input_dependencies[0]
    if not isinstance(operator, ReadFiles):
        raise unknown_ray(f"read_parquet plans {operator.name}")
    return Scan(operator), columns


@dataclass(frozen=True)
class Scan:
    """Files that a scanner of Ray's reads. ``operator`` is the ``ReadFiles`` that has it."""

    operator: Any

    def schema(self, columns: Sequence[str] | None) -> pa.Schema | None:
        """Return the schema of what is read; None if no file could be opened to find it out."""
        whole: pa.Schema = self.operator.infer_schema()
        if not whole.names:
            return None
        # Ray reads nothing for a column that is nowhere, and has no schema for it.
        if columns is None or not set(columns) <= set(whole.names):
            return (
                whole
                if columns is None
                else pa.schema([whole.field(n) for n in columns if n in whole.names])
            )
        schema: pa.Schema = self._narrowed(Selection((), _tupled(columns)))[0].infer_schema()
        return schema

    @property
    def whole_schema(self) -> pa.Schema:
        """The schema that files are read with, before anything is selected or transformed."""
        schema: pa.Schema = self.operator.scanner.schema
        return schema

    def with_schema(self, schema: pa.Schema) -> Scan:
        """Return a scan that reads files with ``schema``: what they lack is null."""
        scanner = replace(self.operator.scanner, schema=schema)
        return Scan(replace(self.operator, scanner=scanner, schema=schema))

    def on(self, filesystem: FileSystem) -> Scan:
        """As :meth:`filereads.FileReader.on`."""
        scanner = replace(self.operator.scanner, filesystem=filesystem)
        return Scan(replace(self.operator, scanner=scanner))

    def metadata(self, paths: Sequence[str], sizes: Sequence[int | None]) -> BlockMetadata | None:
        """Return unknown metadata: Ray Data executes such a read to measure it."""
        return BlockMetadata(None, None, None, None)

    def inflation(self) -> float | None:
        """Return None: Ray Data goes by the footers of all files."""
        return None

    def task_factory(self, selection: Selection) -> tuple[ReadTaskFactory, Selection]:
        """As :meth:`filereads.FileReader.task_factory`."""
        operator, left = self._narrowed(selection)
        return _Scanning(operator.scanner, operator.block_udf), left

    def _narrowed(self, selection: Selection) -> tuple[Any, Selection]:
        operator, left = self.operator, []
        for predicate in selection.predicates:
            narrowed = operator.apply_predicate(predicate)
            if narrowed is operator:
                left.append(predicate)
            elif isinstance(narrowed, Filter):
                # The scanner applies a part of the predicate, and leaves this one.
                left.append(narrowed.predicate_expr)
                narrowed = narrowed.input_dependencies[0]
            operator = narrowed
        if selection.columns is None:
            return operator, Selection(tuple(left))
        needed, after = left_to_select(selection.columns, left)
        return operator.apply_projection({name: name for name in needed}), after


def unified(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Return the schema that plain Ray Data makes of those of several files.

    Raises:
        pyarrow.ArrowException: there is none.
    """
    return unify_schemas_with_validation(list(schemas))


def _tupled(columns: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if columns is None else tuple(columns)


@dataclass(frozen=True)
class _Scanning:
    """Makes the read tasks of files and row groups, on the worker that reads them."""

    scanner: Any
    block_udf: Callable[[Any], Any] | None

    def __call__(self, sources: SourceTable) -> Sequence[Callable[[], Iterator[Any]] | None]:
        reader = self.scanner.create_reader()
        return [self._task(reader, source) for source in sources]

    def _task(self, reader: Any, source: Source) -> Callable[[], Iterator[Any]] | None:
        path, row_group = row_group_of(source)
        if isinstance(row_group, Unreadable):
            return partial(fail, path, row_group)
        size = source.fingerprint.size
        # Files of no bytes are skipped; others are ruled out by their partition columns.
        if size == 0 or not len(self.scanner.prune_input_split(_manifest(path, size, None))):
            return None
        return partial(self._read, reader, path, size, row_group)

    def _read(
        self, reader: Any, path: str, size: int | None, row_group: int | None
    ) -> Iterator[Any]:
        row_groups = None if row_group is None else [row_group]
        if row_groups is None and self._depends_on_row_groups():
            row_groups = self._row_groups_of(path)
        for table in reader.read(_manifest(path, size, row_groups)):
            yield table if self.block_udf is None else self.block_udf(table)

    def _depends_on_row_groups(self) -> bool:
        columns = self.scanner.synthesized_columns
        return any(column.requires_read_unit_boundaries for column in columns)

    def _row_groups_of(self, path: str) -> list[int]:
        filesystem = self.scanner.filesystem or LocalFileSystem()

        def read() -> int:
            with filesystem.open_input_file(path) as file:
                return int(pq.read_metadata(file).num_row_groups)

        retried = DataContext.get_current().retried_io_errors
        count: int = call_with_retry(read, f"read the footer of {path}", match=retried)
        return list(range(count))


def _manifest(path: str, size: int | None, row_groups: Sequence[int] | None) -> Any:
    chunk: Any = None
    if row_groups is not None:
        # The counts are for Ray's planning, which is not done here.
        chunk = {**_NO_COUNTS, "row_group_ids": tuple(row_groups)}
    return FileManifest.construct_manifest(paths=[path], sizes=[size or 0], chunk_metadatas=[chunk])


_NO_COUNTS: dict[str, Any] = {
    "num_rows": 0,
    "uncompressed_size": 0,
    "fully_matched": False,
    "rg_sizes": (),
    "rg_rows": (),
}

if _KNOWN:
    check_used(
        {
            ReadFiles: "scanner schema block_udf apply_predicate apply_projection infer_schema",
            ParquetScanner: "schema create_reader prune_input_split synthesized_columns filesystem",
            SynthesizedColumn: "requires_read_unit_boundaries",
            FileManifest: "construct_manifest",
        }
    )
    if set(get_type_hints(ParquetRowGroupChunkMetadata)) != {"row_group_ids", *_NO_COUNTS}:
        raise unknown_ray("row groups are named by other fields")
