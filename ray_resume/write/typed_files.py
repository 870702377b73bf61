"""Rows of files that say which types they have: Parquet, ORC, Feather."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, NamedTuple

import pyarrow as pa

from ray_resume.core.output_schema import SchemaMismatchError, conform
from ray_resume.write.formats import FileFormat, for_orc, unsliced
from ray_resume.write.ipc_codec import body_codec
from ray_resume.write.row_pieces import (
    READ_ERRORS,
    Cut,
    IncompatibleFilesError,
    OldFile,
    Piece,
    Pieces,
    Ranges,
)

__all__ = ["TypedFiles"]

# A row group of which nothing is known has no more rows and about so many bytes in memory.
_GROUP_ROWS = 1 << 20
_GROUP_BYTES = 128 << 20

_EXTENSION = b"ARROW:extension:"
_IPC_MAGIC = b"ARROW1"

Options = dict[str, Any]


@dataclass
class TypedFiles:
    """Copies rows of files that have one format.

    Args:
        name: the format's.
        format: how the new file is written; None if the first file is to tell.
        schema: what the rows are made to conform to; None if all files must have one schema.
    """

    name: str
    format: FileFormat | None
    schema: pa.Schema | None
    _options: Options | None = field(default=None, init=False)
    _first: tuple[OldFile, pa.Schema] | None = field(default=None, init=False)

    def read(self, old: OldFile) -> Pieces[pa.Table]:
        """Yield the rows that are copied of a file, in its order.

        Raises:
            IncompatibleFilesError: they do not have the schema of those before.
            ResumeError: the file is not as it was written.
        """
        try:
            with old.open() as file:
                reader = _READERS[self.name](old, file)
                if self._options is None:
                    given = self.format
                    self._options = reader.options() if given is None else given.resolved()
                for piece in old.pieces(reader.batches):
                    yield Piece(piece.turn, self._conformed(old, piece.rows), piece.is_last)
        except READ_ERRORS as error:
            raise old.unusable(error) from error

    def write(self, tables: Iterator[pa.Table], file: IO[bytes]) -> None:
        """Write ``tables``, which :meth:`read` has made, as one file."""
        first = next(tables)
        assert self._options is not None
        _WRITERS[self.name](itertools.chain([first], tables), file, self._options)

    def _conformed(self, old: OldFile, table: pa.Table) -> pa.Table:
        if self.schema is not None:
            try:
                table = conform(table, self.schema)
            except SchemaMismatchError as error:
                raise IncompatibleFilesError(
                    f"Rows of the output file {old.uri} do not conform to the output's schema: "
                    f"{error}. Nothing was changed. Keep the file as it is, or reset the sources "
                    "that have rows in it."
                ) from error
        if self._first is None:
            self._first = old, table.schema
        other, schema = self._first
        difference = _difference(schema, table.schema, any_metadata=self.schema is not None)
        if difference is not None:
            raise IncompatibleFilesError(
                f"The output files {other.uri} and {old.uri} have different schemas, so their rows "
                f"cannot be put into one file: {difference}. Nothing was changed. Keep them as "
                "they are, or reset the sources that have rows in one of them."
            )
        return table


class _Reader(NamedTuple):
    """An open file: its rows, in batches, and the options that say how it was written."""

    batches: Iterable[tuple[int, Cut[pa.Table]]]
    options: Callable[[], Options]


def _difference(one: pa.Schema, other: pa.Schema, *, any_metadata: bool) -> str | None:
    """Say which column differs first, None if none does.

    The metadata of whole tables may differ: that of the first file stays, as where tables are
    concatenated. The types of columns may stand in the metadata of the columns.
    """
    if one.names != other.names:
        return f"the columns are {one.names} and {other.names}"
    for a, b in zip(one, other, strict=True):
        if not a.equals(b):
            return f"column {a.name!r} is {_described(a)} and {_described(b)}"
        metadata = [_metadata(each, any_metadata) for each in (a, b)]
        if metadata[0] != metadata[1]:
            return f"column {a.name!r} has metadata {metadata[0]} and {metadata[1]}"
    return None


def _described(column: pa.Field) -> str:
    return f"{column.type}{'' if column.nullable else ' not null'}"


def _metadata(column: pa.Field, only_types: bool) -> dict[bytes, Any]:
    """Return the metadata of a column, and of what is inside of it; or what says its type."""
    own: Mapping[bytes, bytes] = column.metadata or {}
    found: dict[bytes, Any] = {
        key: value for key, value in own.items() if key.startswith(_EXTENSION) or not only_types
    }
    for i in range(column.type.num_fields):
        inside = _metadata(column.type.field(i), only_types)
        if inside:
            found[b"inside %d" % i] = inside
    return found


def _given(table: pa.Table) -> pa.Table:
    return table


def _cut(read: Callable[[], pa.Table], runs: Sequence[Ranges]) -> Iterator[pa.Table]:
    """Yield rows of a table; they do not keep much of it in memory that is not theirs."""
    table = read()
    for ranges in runs:
        slices = [table.slice(first, stop - first) for first, stop in ranges]
        if len(slices) > 1:
            yield pa.concat_tables(slices).combine_chunks()
        else:
            yield slices[0] if slices[0].num_rows > table.num_rows // 2 else unsliced(slices[0])


def _read_parquet(old: OldFile, file: Any) -> _Reader:
    parquet = importlib.import_module("pyarrow.parquet")
    reader = parquet.ParquetFile(file, pre_buffer=not old.folder.is_local)
    metadata = reader.metadata
    old.check_rows(metadata.num_rows)
    groups = (
        (metadata.row_group(i).num_rows, partial(_cut, partial(reader.read_row_group, i)))
        for i in range(metadata.num_row_groups)
    )
    return _Reader(groups, partial(_parquet_options, metadata))


def _parquet_options(metadata: Any) -> Options:
    group = metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    codecs = {
        column.path_in_schema: column.compression.replace("UNCOMPRESSED", "NONE")
        for column in columns
    }
    options: Options = {
        "compression": codecs if len(set(codecs.values())) > 1 else codecs.popitem()[1],
        "store_schema": b"ARROW:schema" in (metadata.metadata or {}),
        "use_deprecated_int96_timestamps": any(c.physical_type == "INT96" for c in columns),
    }
    # A single row group says nothing: it may have had room for more.
    if metadata.num_row_groups > 1:
        options["row_group_size"] = group.num_rows
    return options


def _write_parquet(tables: Iterable[pa.Table], file: IO[bytes], options: Options) -> None:
    given = [options.pop(name, None) for name in ("row_group_size", "chunk_size")]
    rows = next(filter(None, given), None)
    # Rows of several files are not sorted because those of each file are.
    options.pop("sorting_columns", None)
    groups = _row_groups(tables, rows)
    first = next(groups)
    parquet = importlib.import_module("pyarrow.parquet")
    with parquet.ParquetWriter(file, first.schema, **options) as writer:
        for group in itertools.chain([first], groups):
            writer.write_table(group, row_group_size=group.num_rows)


def _row_groups(tables: Iterable[pa.Table], rows: int | None) -> Iterator[pa.Table]:
    """Yield tables of so many rows, the last one of less; or of about as many as fit in memory."""
    pending: list[pa.Table] = []
    count = size = 0
    for table in tables:
        rest = table
        while rest.num_rows:
            some = rest.slice(0, (rows or _GROUP_ROWS) - count)
            rest = rest.slice(some.num_rows)
            pending.append(some)
            count += some.num_rows
            size += some.nbytes
            if count == (rows or _GROUP_ROWS) or (rows is None and size >= _GROUP_BYTES):
                yield pa.concat_tables(pending)
                pending, count, size = [], 0, 0
    if pending:
        yield pa.concat_tables(pending)


def _read_orc(old: OldFile, file: Any) -> _Reader:
    reader = importlib.import_module("pyarrow.orc").ORCFile(file)
    old.check_rows(reader.nrows)

    def stripes() -> Iterator[tuple[int, Cut[pa.Table]]]:
        for i in range(reader.nstripes):
            table = pa.Table.from_batches([reader.read_stripe(i)])
            yield table.num_rows, partial(_cut, partial(_given, table))

    def options() -> Options:
        return {
            "compression": reader.compression.lower(),
            "compression_block_size": reader.compression_size,
            "row_index_stride": reader.row_index_stride,
        }

    return _Reader(stripes(), options)


def _write_orc(tables: Iterable[pa.Table], file: IO[bytes], options: Options) -> None:
    with importlib.import_module("pyarrow.orc").ORCWriter(file, **options) as writer:
        for table in tables:
            writer.write(for_orc(table))


def _read_feather(old: OldFile, file: Any) -> _Reader:
    is_version_1 = file.read(len(_IPC_MAGIC)) != _IPC_MAGIC
    file.seek(0)
    if is_version_1:
        table = importlib.import_module("pyarrow.feather").read_table(file)
        old.check_rows(table.num_rows)
        batches = [(table.num_rows, partial(_cut, partial(_given, table)))]
        return _Reader(batches, lambda: {"version": 1})
    reader = pa.ipc.open_file(file)

    def tables() -> Iterator[tuple[int, Cut[pa.Table]]]:
        total = 0
        for i in range(reader.num_record_batches):
            table = pa.Table.from_batches([reader.get_batch(i)])
            total += table.num_rows
            yield table.num_rows, partial(_cut, partial(_given, table))
        old.check_rows(total)

    def options() -> Options:
        found: Options = {"compression": body_codec(file) or "uncompressed"}
        # A single batch says nothing: it may have had room for more.
        if reader.num_record_batches > 1:
            found["chunksize"] = reader.get_batch(0).num_rows
        return found

    return _Reader(tables(), options)


def _write_feather(tables: Iterable[pa.Table], file: IO[bytes], options: Options) -> None:
    # A file has one dictionary for each column, and a batch for each chunk.
    table = pa.concat_tables(tables).combine_chunks()
    importlib.import_module("pyarrow.feather").write_feather(table, file, **options)


_READERS: dict[str, Callable[[OldFile, Any], _Reader]] = {
    "parquet": _read_parquet,
    "orc": _read_orc,
    "feather": _read_feather,
}
_WRITERS: dict[str, Callable[[Iterable[pa.Table], IO[bytes], Options], None]] = {
    "parquet": _write_parquet,
    "orc": _write_orc,
    "feather": _write_feather,
}
