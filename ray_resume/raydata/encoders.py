"""Rows encoded for files as Ray Data's own datasinks encode them. Importable on workers.

Internals of Ray's that are used:

* ``_make_iterable``, ``_apply_list``, ``_default_encoder``: how ``WebDatasetDatasink`` makes
  members of a tar file from a row.
* ``ImageDatasink.write_row_to_file``, ``TFRecordDatasink.write_block_to_file``: of the datasinks
  they use ``column`` and ``file_format``, and ``tf_schema``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
from ray.data.block import BlockAccessor

from ray_resume.raydata.internals import check_used, unknown_ray

try:
    from ray.data._internal.datasource.image_datasink import ImageDatasink
    from ray.data._internal.datasource.tfrecords_datasink import TFRecordDatasink
    from ray.data._internal.datasource.webdataset_datasource import (
        _apply_list,
        _default_encoder,
        _make_iterable,
    )
except ImportError as error:
    raise unknown_ray(error) from error

__all__ = ["array_of", "encoded_images", "encoded_samples", "write_examples"]

check_used(
    {
        ImageDatasink: "write_row_to_file column file_format",
        TFRecordDatasink: "write_block_to_file tf_schema",
    }
)


def encoded_samples(table: pa.Table, encoder: Any) -> Iterator[dict[str, Any]]:
    """Yield each row by column, its values encoded by their column's ending.

    Args:
        encoder: as ``Dataset.write_webdataset`` takes it; None encodes nothing.
    """
    for row in _make_iterable(BlockAccessor.for_block(table)):
        sample = row if isinstance(row, dict) else row.as_pydict()
        if encoder is not None:
            sample = _apply_list(encoder, sample, default=_default_encoder)
        yield sample


def array_of(table: pa.Table, column: str) -> Any:
    """Return the values of a column as the array that ``NumpyDatasink`` saves."""
    return BlockAccessor.for_block(table).to_numpy(column)


def encoded_images(table: pa.Table, column: str, file_format: str) -> Iterator[bytes]:
    """Yield the image in ``column`` of each row, as the content of a file."""
    sink = object.__new__(ImageDatasink)
    sink.column, sink.file_format = column, file_format
    images: Any = BlockAccessor.for_block(table.select([column]))
    for row in images.iter_rows(public_row_format=False):
        file: Any = io.BytesIO()
        sink.write_row_to_file(row, file)
        yield file.getvalue()


def write_examples(table: pa.Table, file: IO[bytes], tf_schema: Any) -> None:
    """Write each row as a record with a ``tf.train.Example``. Needs TensorFlow and crc32c."""
    sink = object.__new__(TFRecordDatasink)
    sink.tf_schema = tf_schema
    opened: Any = file
    sink.write_block_to_file(BlockAccessor.for_block(table), opened)
