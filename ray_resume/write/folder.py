"""The folder that output goes to: its files listed, written whole, made durable, removed.

Knows neither Ray nor what is in the files.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO

from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem

from ray_resume.checkpoint.shared.objects import put_whole
from ray_resume.failpoints import reached
from ray_resume.read.listing import path_of

__all__ = ["Folder"]


@dataclass(frozen=True)
class Folder:
    """The folder that a checkpoint's output goes to."""

    filesystem: FileSystem
    path: str
    uri: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    def create(self) -> None:
        """Create the folder if it is missing."""
        self.filesystem.create_dir(self.path, recursive=True)

    def names(self) -> Iterator[str]:
        """List the files in it by their relative path, subfolders too; none if it is missing."""
        base = self.path.rstrip("/") + "/"
        selector = FileSelector(self.path, allow_not_found=True, recursive=True)
        return (
            path_of(info).removeprefix(base)
            for info in self.filesystem.get_file_info(selector)
            if info.is_file
        )

    def remove(self, name: str) -> None:
        """Remove a file; not an error if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.path}/{name}")

    def write(self, name: str, write: Callable[[IO[bytes]], None]) -> None:
        """Write a file, perhaps in a subfolder. It has its final name only when it is whole.

        On a local file system it survives a power cut after :meth:`sync`.
        """
        if not self.is_local:
            # In memory first: a stream that an error leaves is closed, and half a file appears.
            buffer = io.BytesIO()
            write(buffer)
            reached("sink.writing")
            put_whole(self.filesystem, f"{self.path}/{name}", buffer.getbuffer())
            return
        folder, _, bare = f"{self.path}/{name}".rpartition("/")
        os.makedirs(folder, exist_ok=True)
        hidden = f"{folder}/.{bare}"
        try:
            with open(hidden, "xb") as file:
                write(file)
                file.flush()
                reached("sink.writing")
                os.fsync(file.fileno())
            os.rename(hidden, f"{folder}/{bare}")
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(hidden)
            raise

    def sync(self, names: Iterable[str]) -> None:
        """Make the names of these files, and of the folders that they are in, durable."""
        if not self.is_local:
            return
        folders = {self.path}
        for name in names:
            inner = name.rpartition("/")[0]
            while inner:
                folders.add(f"{self.path}/{inner}")
                inner = inner.rpartition("/")[0]
        for folder in folders:
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
