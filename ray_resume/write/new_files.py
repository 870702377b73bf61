"""Files that rows are divided among, where a format's file cannot hold any rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, NamedTuple

from ray_resume.errors import ResumeError

__all__ = ["NewFile", "UnwritableRowsError"]


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
