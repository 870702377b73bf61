"""Files that rows are divided among, where a format's file cannot hold any rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import IO, NamedTuple, TypeVar

from ray_resume.errors import ResumeError

__all__ = ["NewFile", "UnwritableRowsError", "encodable"]

T = TypeVar("T")


class NewFile(NamedTuple):
    """A file that is yet to be written.

    Args:
        rows: how many rows it has, the first ones that no file before it has.
        write: writes them into the open file.
        label: what people know it by, for its name; see `core.filenames.stem_of`.
    """

    rows: int
    write: Callable[[IO[bytes]], None]
    label: str = ""


class UnwritableRowsError(ResumeError):
    """A row has values that its format cannot hold, or not as a row of its own."""


def encodable(encoded: Iterator[T], name_of: Callable[[int], str]) -> Iterator[T]:
    """Yield the rows that Ray Data's own encoders make, one for each row.

    Args:
        name_of: says which row it is, by its position.

    Raises:
        UnwritableRowsError: they cannot encode a row. Its source fails alone.
    """
    position = 0
    try:
        for row in encoded:
            yield row
            position += 1
    except (ImportError, MemoryError):
        # No row is to blame.
        raise
    except Exception as error:
        raise UnwritableRowsError(
            f"{name_of(position)} cannot be encoded ({type(error).__name__}: {error}). Have a UDF "
            "before the write drop or replace such values."
        ) from error
