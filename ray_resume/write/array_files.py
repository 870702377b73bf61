"""NumPy files: the values of one column as one array, copied row by row as bytes.

Importable on workers; loads no Ray before it writes rows. Arrays of objects are neither written nor
read: reading one would unpickle it, and so run code from the file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_resume.write.new_files import NewFile, UnwritableRowsError
from ray_resume.write.row_pieces import (
    READ_ERRORS,
    IncompatibleFilesError,
    OldFile,
    Pieces,
    Ranges,
)

__all__ = ["ArrayFiles", "divide_arrays"]

_CHUNK_BYTES = 16 << 20

Array = npt.NDArray[Any]


def divide_arrays(
    table: pa.Table, options: Mapping[str, Any], max_rows: int | None
) -> Iterator[NewFile]:
    """Yield the files that rows are written to.

    Rows after one whose shape differs from those before are in another file.

    Raises:
        UnwritableRowsError: the column is missing, or its values are objects to NumPy.
    """
    # Imported here, since the command line copies files, and loads no Ray.
    from ray_resume.raydata.encoders import array_of

    column = options["column"]
    if column not in table.column_names:
        raise UnwritableRowsError(
            f"format='numpy' writes the column {column!r}, and rows have the columns "
            f"{', '.join(table.column_names)}. Pass column= with one of these."
        )
    for array in _alike(column, array_of(table, column)):
        most = max_rows or len(array)
        for start in range(0, len(array), most):
            some = array[start : start + most]
            yield NewFile(len(some), partial(_save, some))


def _alike(column: str, values: Array) -> Iterator[Array]:
    """Yield arrays of the values of a column, one for successive values of one shape."""
    if not values.dtype.hasobject:
        yield values
        return
    for kind, some in itertools.groupby(values, _kind_of):
        if kind is None:
            raise UnwritableRowsError(
                f"Values of the column {column!r} are objects to NumPy (text, structs, lists of "
                "several lengths, or nulls among them), and reading a file of objects runs code "
                "that it contains. Write another format, such as Parquet, or make the column one "
                "of numbers or arrays."
            )
        yield np.stack(list(some))


def _kind_of(value: Any) -> tuple[np.dtype[Any], tuple[int, ...]] | None:
    is_array = isinstance(value, np.ndarray) and not value.dtype.hasobject
    return (value.dtype, value.shape) if is_array else None


def _save(array: Array, file: IO[bytes]) -> None:
    # `np.save` of a C-contiguous array. It writes others by columns, which cannot be cut into rows.
    _write_header(_Header(array.dtype, array.shape), file)
    file.write(np.ascontiguousarray(array).tobytes())


class _Header(NamedTuple):
    """The type and the shape of a file's array."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def row_kind(self) -> str:
        return f"{self.dtype} of the shape {self.shape[1:]}"


def _write_header(header: _Header, file: IO[bytes]) -> None:
    np.lib.format.write_array_header_1_0(
        file,
        {
            "descr": np.lib.format.dtype_to_descr(header.dtype),
            "fortran_order": False,
            "shape": header.shape,
        },
    )


@dataclass
class ArrayFiles:
    """Copies rows of files whose rows have one type and one shape.

    Args:
        rows: how many rows the new file has.
    """

    rows: int
    _first: tuple[OldFile, _Header] | None = field(default=None, init=False)

    def read(self, old: OldFile) -> Pieces[bytes]:
        """Yield the rows that are copied of a file, in its order.

        Raises:
            IncompatibleFilesError: they do not have the type and the shape of those before.
            ResumeError: the file is not as it was written.
        """
        try:
            with old.open() as file:
                header = _read_header(old, file)
                old.check_rows(header.shape[0])
                self._check_header(old, header)
                yield from old.pieces(
                    (len(chunk) // header.row_bytes, partial(_cut, chunk, header.row_bytes))
                    if header.row_bytes
                    else (header.shape[0], partial(_cut, b"", 0))
                    for chunk in _chunks(old, header, file)
                )
        except READ_ERRORS as error:
            raise old.unusable(error) from error

    def write(self, rows: Iterator[bytes], file: IO[bytes]) -> None:
        """Write ``rows`` as one file."""
        first = next(rows)
        assert self._first is not None
        header = self._first[1]
        _write_header(header._replace(shape=(self.rows, *header.shape[1:])), file)
        for some in itertools.chain([first], rows):
            file.write(some)

    def _check_header(self, old: OldFile, header: _Header) -> None:
        if self._first is None:
            self._first = old, header
        other, first = self._first
        if (header.dtype, header.shape[1:]) != (first.dtype, first.shape[1:]):
            raise IncompatibleFilesError(
                f"The output files {other.uri} and {old.uri} have rows of {first.row_kind} and of "
                f"{header.row_kind}, which one NumPy file cannot hold. Nothing was changed. They "
                "stay apart."
            )


def _read_header(old: OldFile, file: Any) -> _Header:
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, is_by_columns, dtype = read[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError) as error:
        raise old.unusable(f"it is no NumPy file of a known version ({error})") from error
    if not shape or is_by_columns or dtype.hasobject:
        raise old.unusable("it has an array that was not written by ray_resume")
    return _Header(dtype, shape)


def _chunks(old: OldFile, header: _Header, file: Any) -> Iterator[bytes]:
    if not header.row_bytes:
        yield b""
        return
    left = header.shape[0] * header.row_bytes
    most = max(_CHUNK_BYTES // header.row_bytes, 1) * header.row_bytes
    while left:
        chunk: bytes = file.read(min(most, left))
        if len(chunk) != min(most, left):
            raise old.unusable("it was cut off")
        left -= len(chunk)
        yield chunk
    if file.read(1):
        raise old.unusable("it has more bytes than its array")


def _cut(chunk: bytes, row_bytes: int, runs: Sequence[Ranges]) -> Iterator[bytes]:
    for ranges in runs:
        yield b"".join(chunk[first * row_bytes : stop * row_bytes] for first, stop in ranges)
