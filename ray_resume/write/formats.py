"""The file formats of a folder sink: how a table becomes the bytes of one file.

The options of a write are those of plain Ray Data's ``write_*`` methods, as far as they mean
something here. Each other one is refused with what to use instead.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import IO, Any

import pyarrow as pa

from ray_resume.write.array_files import divide_arrays
from ray_resume.write.image_files import divide_images
from ray_resume.write.new_files import NewFile
from ray_resume.write.sample_files import divide_samples

__all__ = [
    "DIVIDED",
    "FORMATS",
    "TYPED",
    "UNPARTITIONED",
    "FileFormat",
    "checked_format",
    "for_orc",
    "parsed_suffix",
    "unsliced",
]

Options = Mapping[str, Any]


TYPED = ("parquet", "orc", "feather")
"""The formats whose files say which types they have."""


def _write_parquet(table: pa.Table, file: IO[bytes], options: Options) -> None:
    importlib.import_module("pyarrow.parquet").write_table(table, file, **options)


def _write_csv(table: pa.Table, file: IO[bytes], options: Options) -> None:
    csv = importlib.import_module("pyarrow.csv")
    settings = dict(options)
    write_options = settings.pop("write_options", None)
    memory_pool = settings.pop("memory_pool", None)
    if settings:
        if write_options is not None:
            raise TypeError(f"give write_options or {next(iter(settings))}, not both")
        write_options = csv.WriteOptions(**settings)
    csv.write_csv(table, file, write_options, memory_pool)


def _write_json(table: pa.Table, file: IO[bytes], options: Options) -> None:
    # Imported here, since the command line copies files, and loads no Ray.
    from ray.data.block import BlockAccessor

    # As Ray Data writes it: a line for each row.
    settings = {"orient": "records", "lines": True, **options}
    BlockAccessor.for_block(table).to_pandas().to_json(file, **settings)


def _write_orc(table: pa.Table, file: IO[bytes], options: Options) -> None:
    importlib.import_module("pyarrow.orc").write_table(for_orc(table), file, **options)


def _write_tfrecords(table: pa.Table, file: IO[bytes], options: Options) -> None:
    # Imported here, since the command line copies files, and loads no Ray.
    from ray_resume.raydata.encoders import write_examples

    write_examples(table, file, options.get("tf_schema"))


def _write_feather(table: pa.Table, file: IO[bytes], options: Options) -> None:
    importlib.import_module("pyarrow.feather").write_feather(table, file, **options)


FORMATS: dict[str, Callable[[pa.Table, IO[bytes], Options], None]] = {
    "parquet": _write_parquet,
    "csv": _write_csv,
    "json": _write_json,
    "orc": _write_orc,
    "feather": _write_feather,
    "tfrecords": _write_tfrecords,
}

DIVIDED: dict[str, Callable[[pa.Table, Options, int | None], Iterator[NewFile]]] = {
    "webdataset": divide_samples,
    "numpy": divide_arrays,
    "images": divide_images,
}
"""The formats of which a file cannot hold any rows: what divides rows among files."""

# The options of formats that are not tried out with a row; whether each has to be given.
_OWN_OPTIONS = {
    "webdataset": {"encoder": False},
    "numpy": {"column": True},
    "images": {"column": True, "file_format": False, "name_column": False},
    "tfrecords": {"tf_schema": False},
}
UNPARTITIONED = tuple(_OWN_OPTIONS)
"""The formats that plain Ray Data writes, and never in partitions."""

# How the names of files end, if not as the format is called; those of images, as they say.
_FILE_ENDINGS = {"webdataset": "tar", "numpy": "npy"}
# Formats of Pillow's by which an image can come back as it was, or nearly so.
_IMAGE_ENDINGS = ("png", "jpeg", "webp", "tiff", "bmp", "gif", "ppm", "tga")

# The names by which plain Ray Data takes a function that returns more options.
_OPTIONS_FN = {
    "parquet": "arrow_parquet_args_fn",
    "csv": "arrow_csv_args_fn",
    "json": "pandas_json_args_fn",
    "orc": "arrow_orc_args_fn",
}

# Formats that are compressed as a whole, as a stream; readers know such files by their ending.
_STREAMED = ("csv", "json")
_ENDINGS = {
    "gzip": "gz",
    "bz2": "bz2",
    "brotli": "br",
    "lz4": "lz4",
    "zstd": "zst",
    "snappy": "snappy",
    "xz": "xz",
    "zip": "zip",
    "tar": "tar",
}

_SMALL_FILES = (
    "A write task writes a file every commit_interval_s; target_file_bytes=... merges small files "
    "at the end of the run."
)
# Options of plain Ray Data's that mean something else here, and what to use instead.
_SUBSTITUTES = {
    "min_rows_per_file": _SMALL_FILES,
    "num_rows_per_file": _SMALL_FILES,
    "min_bytes_per_file": _SMALL_FILES,
    "mode": "A resumable write only ever adds the rows of new sources. append=True lets it write "
    "beside files of others. To write everything again, remove the output folder and the "
    "checkpoint.",
    "filename_provider": "File names say which run wrote a file, so ray_resume gives them; "
    "Checkpoint(...).files() lists the files.",
    "partitioning_flavor": "partition_cols names folders as Hive does, column=value, and in no "
    "other way.",
    "catalog": "Give resumable_write a ray.data.Datasink that writes to the catalog's table.",
    "try_create_dir": "The output folder is created if it is missing; leave this option out.",
    "dataset_uuid": "File names say which run wrote a file, so ray_resume gives them.",
}


@dataclass(frozen=True)
class FileFormat:
    """How one file is written.

    Args:
        name: a key of ``FORMATS`` or ``DIVIDED``.
        options: what the function that writes this format takes.
        options_fn: returns more options, which take precedence; called where a file is written.
        stream_compression: the codec, by pyarrow's name, that the whole file is compressed with.
        max_rows: the most rows of a file.
    """

    name: str
    options: Options = field(default_factory=dict)
    options_fn: Callable[[], Options] | None = None
    stream_compression: str | None = None
    max_rows: int | None = None

    @property
    def suffix(self) -> str:
        """The ending of the files, by which readers know format and compression."""
        codec = self.stream_compression
        if self.name == "json" and codec is None:
            codec = _codec_of(self.resolved().get("compression"))
        ending = _FILE_ENDINGS.get(self.name, self.name)
        if self.name == "images":
            ending = self.options.get("file_format", "png").lower()
        return ending if codec is None else f"{ending}.{_ENDINGS[codec]}"

    def files_of(self, table: pa.Table) -> Iterator[NewFile]:
        """Yield the files that rows are written to.

        Raises:
            UnwritableRowsError: a row has values that no such file can hold.
        """
        if self.name in DIVIDED:
            yield from DIVIDED[self.name](table, self.resolved(), self.max_rows)
            return
        most = self.max_rows or table.num_rows
        for start in range(0, table.num_rows, most):
            rows = table.slice(start, most)
            yield NewFile(rows.num_rows, partial(self.write_table, rows))

    def write_table(self, table: pa.Table, file: IO[bytes]) -> None:
        """Write ``table`` as one file, in one of ``FORMATS``."""
        write = FORMATS[self.name]
        if self.stream_compression is None:
            write(table, file, self.resolved())
            return
        # Closing it would close the file as well, which is yet to be made durable.
        buffer = pa.BufferOutputStream()
        with pa.CompressedOutputStream(buffer, self.stream_compression) as stream:
            write(table, stream, self.resolved())
        file.write(buffer.getvalue())

    def schema_of(self, file: IO[bytes]) -> pa.Schema:
        """Return the schema of a file of one of the ``TYPED`` formats."""
        if self.name == "parquet":
            return importlib.import_module("pyarrow.parquet").read_schema(file)
        if self.name == "orc":
            return importlib.import_module("pyarrow.orc").ORCFile(file).schema
        return self.read(file).schema

    def read(self, file: IO[bytes]) -> pa.Table:
        """Return the rows of a file of one of the ``TYPED`` formats."""
        if self.name == "parquet":
            return importlib.import_module("pyarrow.parquet").ParquetFile(file).read()
        if self.name == "orc":
            return importlib.import_module("pyarrow.orc").ORCFile(file).read()
        return importlib.import_module("pyarrow.feather").read_table(file)

    def compressed_as(self, file: IO[bytes]) -> FileFormat:
        """Return the same format with the compression of a file, if that is one of Parquet."""
        if self.name != "parquet":
            return self
        groups = importlib.import_module("pyarrow.parquet").ParquetFile(file).metadata
        if not groups.num_row_groups or not groups.num_columns:
            return self
        codec = groups.row_group(0).column(0).compression
        codec = "NONE" if codec == "UNCOMPRESSED" else codec
        return replace(self, options={**self.options, "compression": codec})

    @property
    def has_header(self) -> bool:
        """Whether the first row of a CSV file has the names of the columns."""
        options = self.resolved()
        given = options.get("write_options")
        header = options.get("include_header") if given is None else given.include_header
        return header is None or bool(header)

    @property
    def has_one_row_a_file(self) -> bool:
        """Whether no file can be merged with another."""
        return self.name == "images"

    @property
    def has_rows_apart(self) -> bool:
        """Whether rows can be copied from such a file: JSON needs a line for each row."""
        options = self.resolved()
        return self.name != "json" or (
            options.get("orient", "records") == "records"
            and options.get("lines", True) is True
            and not options.get("indent")
        )

    def resolved(self) -> dict[str, Any]:
        """Return the options of one file: a copy, which its writer may change."""
        more = {} if self.options_fn is None else self.options_fn()
        return {**self.options, **more}


def unsliced(table: pa.Table) -> pa.Table:
    """Return a copy that has no rows in memory but its own, if ``table`` is a slice."""
    buffer = pa.BufferOutputStream()
    # Arrow cuts what it sends to what is used.
    with pa.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table)
    return pa.ipc.open_stream(buffer.getvalue()).read_all()


def for_orc(table: pa.Table) -> pa.Table:
    """Return what pyarrow writes correctly: of slices of structs, it takes nulls of other rows."""
    return unsliced(table) if any(map(_has_struct, table.schema.types)) else table


def _has_struct(kind: pa.DataType) -> bool:
    inside = (kind.field(i).type for i in range(kind.num_fields))
    return bool(pa.types.is_struct(kind)) or any(map(_has_struct, inside))


def checked_format(name: str, options: Options) -> FileFormat:
    """Return the format called ``name``, after it has written a row with ``options``.

    Raises:
        TypeError: an option of plain Ray Data's has a substitute here.
        ValueError: there is no such format, or it does not know an option.
    """
    if name not in FORMATS and name not in DIVIDED:
        known = ", ".join((*FORMATS, *DIVIDED))
        raise ValueError(f"format must be one of {known}, not {name!r}")
    rest = {key: value for key, value in options.items() if not _is_default(key, value)}
    for option, substitute in _SUBSTITUTES.items():
        if option in rest:
            raise TypeError(f"resumable_write takes no {option}. {substitute}")
    max_rows = rest.pop("max_rows_per_file", None)
    if max_rows is not None and (type(max_rows) is not int or max_rows < 1):
        raise ValueError(f"max_rows_per_file must be at least 1, not {max_rows!r}")
    if name in _OWN_OPTIONS:
        _check_own(name, rest)
        if name == "images" and max_rows is not None:
            raise ValueError("An image has a file of its own. Leave out max_rows_per_file.")
        return FileFormat(name, rest, max_rows=max_rows)
    options_fn = rest.pop(_OPTIONS_FN.get(name, ""), None)
    compression = _stream_compression(rest.pop("arrow_open_stream_args", None))
    for given in ("arrow_parquet_args", "arrow_csv_args", "pandas_json_args", "arrow_orc_args"):
        rest.update(rest.pop(given, None) or {})
    if name == "csv":
        compression = rest.pop("compression", compression)
    elif name == "orc" and compression is not None:
        raise ValueError("ORC files are compressed by the option compression, not as a stream.")
    elif name not in _STREAMED and compression is not None:
        rest["compression"], compression = compression, None
    try:
        checked = FileFormat(name, rest, options_fn, compression, max_rows)
        assert checked.suffix
        checked.write_table(pa.table({"x": pa.array([1], pa.int64())}), io.BytesIO())
    except (TypeError, ValueError, KeyError, AttributeError, OSError, pa.ArrowException) as error:
        raise ValueError(
            f"resumable_write got options that {name} files are not written with: {error}"
        ) from error
    return checked


def _check_own(name: str, options: dict[str, Any]) -> None:
    """Make sure that ``options`` are those of one of ``UNPARTITIONED``, without writing a row.

    Raises:
        ImportError: a package is missing.
        ValueError: they are not.
    """
    if _stream_compression(options.pop("arrow_open_stream_args", None)) is not None:
        raise ValueError(
            f"No reader of Ray Data finds compressed {name} files. Leave out the compression."
        )
    known = _OWN_OPTIONS[name]
    for option in options:
        if option not in known:
            raise ValueError(
                f"resumable_write got options that {name} files are not written with: {option}. "
                f"They take {', '.join(known)}."
            )
    for option, is_needed in known.items():
        if is_needed and not isinstance(options.get(option), str):
            raise ValueError(
                f"format={name!r} needs {option}=, the name of the column that is written, not "
                f"{options.get(option)!r}"
            )
    ending = options.get("file_format", "png")
    if str(ending).lower() not in _IMAGE_ENDINGS:
        raise ValueError(f"file_format must be one of {', '.join(_IMAGE_ENDINGS)}, not {ending!r}")
    if name == "tfrecords" and importlib.util.find_spec("crc32c") is None:
        raise ImportError(
            "TFRecords cannot be written without crc32c and TensorFlow: "
            "pip install crc32c tensorflow"
        )


def parsed_suffix(suffix: str) -> tuple[str, str | None]:
    """Return the format of files that end so, and the codec that they are compressed with.

    Raises:
        ValueError: no format is written so.
    """
    name, _, ending = suffix.partition(".")
    if suffix in _IMAGE_ENDINGS:
        return "images", None
    name = {ending: name for name, ending in _FILE_ENDINGS.items()}.get(name, name)
    codecs = {ending: codec for codec, ending in _ENDINGS.items()} if name in _STREAMED else {}
    if (name not in FORMATS and name not in DIVIDED) or (ending and ending not in codecs):
        raise ValueError(f"{suffix!r} is the ending of no format")
    return name, codecs.get(ending)


def _is_default(option: str, value: Any) -> bool:
    """Say whether an option asks for nothing, as plain Ray Data's defaults do."""
    if option == "try_create_dir":
        return value is True
    if option == "partitioning_flavor":
        return bool(value == "hive")
    return value is None and (option in _SUBSTITUTES or option.endswith(("_fn", "_file", "_args")))


def _stream_compression(arguments: Any) -> str | None:
    arguments = dict(arguments or {})
    compression: str | None = arguments.pop("compression", None)
    # How much is buffered changes nothing in the file.
    arguments.pop("buffer_size", None)
    if arguments:
        raise TypeError(
            f"arrow_open_stream_args takes compression and buffer_size here, not "
            f"{', '.join(arguments)}: files are written whole, under a name that they get last."
        )
    return compression


def _codec_of(compression: Any) -> str | None:
    """Return what ``DataFrame.to_json`` compresses an open file with."""
    if isinstance(compression, Mapping):
        compression = compression["method"]
    return None if compression in (None, "infer") else str(compression)
