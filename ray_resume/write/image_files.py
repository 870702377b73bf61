"""Images: one file for each row. They are never rewritten: one row is dead or live.

Importable on workers; loads no Ray before it encodes rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import IO, Any

import pyarrow as pa

from ray_resume.write.new_files import NewFile, UnwritableRowsError, encodable

__all__ = ["divide_images"]


def divide_images(
    table: pa.Table, options: Mapping[str, Any], max_rows: int | None
) -> Iterator[NewFile]:
    """Yield the files that rows are written to.

    Raises:
        UnwritableRowsError: a column is missing, or a value is no image.
    """
    del max_rows
    # Imported here, since the command line copies files, and loads no Ray.
    from ray_resume.raydata.encoders import encoded_images

    column, named_by = options["column"], options.get("name_column")
    for name in filter(None, (column, named_by)):
        if name not in table.column_names:
            raise UnwritableRowsError(
                f"format='images' needs the column {name!r}, and rows have the columns "
                f"{', '.join(table.column_names)}. Pass column= and name_column= with these."
            )
    labels = table.column(named_by).to_pylist() if named_by else [""] * table.num_rows
    images = encodable(
        encoded_images(table, column, options.get("file_format", "png")),
        lambda position: f"The value in the column {column!r} of row {position}",
    )
    for label, content in zip(labels, images, strict=True):
        yield NewFile(1, partial(_write, content), "" if label is None else str(label))


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)
