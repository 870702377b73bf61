"""Parts: where the rows of a source stand in output files. Pure."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FilePart"]


class FilePart(NamedTuple):
    """Rows of one source that stand together in one output file.

    Args:
        file: the file's name, relative to the output folder.
        first_row: the index of the part's first row in the file.
        rows: how many rows it has, at least one.
        file_rows: how many rows the whole file has, whichever sources they are of.
    """

    file: str
    first_row: int
    rows: int
    file_rows: int

    @property
    def is_whole_file(self) -> bool:
        """Whether the file has no other rows."""
        return self.rows == self.file_rows
