"""A base class of file systems that only read.

Importable on workers: knows neither checkpoints nor lmdb.
"""

from __future__ import annotations

from typing import Any

from pyarrow.fs import FileSystemHandler

__all__ = ["ReadOnlyHandler"]


class ReadOnlyHandler(FileSystemHandler):  # type: ignore[misc]
    """Refuses all that would change something."""

    def _refuse(self, *_: Any) -> Any:
        raise NotImplementedError("nothing is written to the input of a read")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = _refuse
    delete_file = move = copy_file = open_output_stream = open_append_stream = _refuse
