"""The local file system, with relative paths that mean the same in every process.

Plain Ray Data leaves relative paths as they are, and shows them so where a column holds paths. Its
workers find the files if they have the working directory of the driver, which not all of them have.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from pyarrow.fs import (
    FileInfo,
    FileSelector,
    FileSystem,
    LocalFileSystem,
    PyFileSystem,
)
from typing_extensions import override

from ray_resume.read.read_only import ReadOnlyHandler

__all__ = ["is_local_at", "local_at"]


def local_at(folder: str) -> PyFileSystem:
    """Return the local file system, of which relative paths are in ``folder``. It reads only."""
    return PyFileSystem(_At(folder))


def is_local_at(filesystem: FileSystem) -> bool:
    """Say whether it is such a file system."""
    return isinstance(filesystem, PyFileSystem) and isinstance(filesystem.handler, _At)


class _At(ReadOnlyHandler):
    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._local = LocalFileSystem()

    @override
    def __reduce__(self) -> Any:
        return _At, (self._folder,)

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _At) and other._folder == self._folder

    @override
    def __hash__(self) -> int:
        return hash(self._folder)

    def _whole(self, path: str) -> str:
        return os.path.join(self._folder, path)

    def get_type_name(self) -> str:
        return "local"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: Sequence[str]) -> list[FileInfo]:
        found = self._local.get_file_info([self._whole(path) for path in paths])
        return [_named(path, info) for path, info in zip(paths, found, strict=True)]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        base = self._whole(selector.base_dir)
        found = self._local.get_file_info(
            FileSelector(base, selector.allow_not_found, selector.recursive)
        )
        return [_named(f"{selector.base_dir}{info.path[len(base) :]}", info) for info in found]

    def open_input_stream(self, path: str) -> Any:
        return self._local.open_input_stream(self._whole(path), compression=None)

    def open_input_file(self, path: str) -> Any:
        return self._local.open_input_file(self._whole(path))


def _named(path: str, info: FileInfo) -> FileInfo:
    return FileInfo(path, info.type, size=info.size, mtime_ns=info.mtime_ns)
