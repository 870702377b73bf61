"""The file formats of a folder sink: how a table becomes the bytes of one file."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
from ray.data.block import BlockAccessor

__all__ = ["FORMATS", "Format", "checked_format"]

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A file format: the ending of its files, and a function that writes one."""

    suffix: str
    write: Callable[[pa.Table, IO[bytes], Options], None]


def _write_parquet(table: pa.Table, file: IO[bytes], options: Options) -> None:
    importlib.import_module("pyarrow.parquet").write_table(table, file, **options)


def _write_csv(table: pa.Table, file: IO[bytes], options: Options) -> None:
    csv = importlib.import_module("pyarrow.csv")
    csv.write_csv(table, file, csv.WriteOptions(**options) if options else None)


def _write_json(table: pa.Table, file: IO[bytes], options: Options) -> None:
    # As Ray Data writes it: a line for each row.
    settings = {"orient": "records", "lines": True, **options}
    BlockAccessor.for_block(table).to_pandas().to_json(file, **settings)


def _write_orc(table: pa.Table, file: IO[bytes], options: Options) -> None:
    importlib.import_module("pyarrow.orc").write_table(table, file, **options)


def _write_feather(table: pa.Table, file: IO[bytes], options: Options) -> None:
    importlib.import_module("pyarrow.feather").write_feather(table, file, **options)


FORMATS = {
    "parquet": Format("parquet", _write_parquet),
    "csv": Format("csv", _write_csv),
    "json": Format("json", _write_json),
    "orc": Format("orc", _write_orc),
    "feather": Format("feather", _write_feather),
}


def checked_format(name: str, options: Options) -> Format:
    """Return the format called ``name``, after it has written a row with ``options``.

    Raises:
        ValueError: there is no such format, or it does not know an option.
    """
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {name!r}")
    try:
        FORMATS[name].write(pa.table({"x": pa.array([1], pa.int64())}), io.BytesIO(), options)
    except (TypeError, ValueError, KeyError, AttributeError, OSError, pa.ArrowException) as error:
        raise ValueError(
            f"resumable_write got options that {name} files are not written with: {error}"
        ) from error
    return FORMATS[name]
