"""The folder that output goes to: its files listed, written whole, made durable, removed.

Knows neither Ray nor what is in the files. A storage that fails for moments is tried again, as
plain Ray Data does it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, TypeVar

from pyarrow import NativeFile
from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem

from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint
from ray_resume.files import atomic_put, canonical_uri, fsync_directory, write_atomically
from ray_resume.filesystems import open_uri, path_of

__all__ = ["Folder", "fault_of", "folder_at"]

T = TypeVar("T")

# As plain Ray Data writes files: three minutes in all.
_ATTEMPTS = 10
_LONGEST_PAUSE_S = 32.0


@dataclass(frozen=True)
class Folder:
    """The folder that a checkpoint's output goes to.

    Args:
        retried_errors: an operation is tried again if one of these is in its error's text, or
            matches it as a regular expression: ``DataContext.retried_io_errors``.
    """

    filesystem: FileSystem
    path: str
    uri: str
    retried_errors: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    def create(self) -> None:
        """Create the folder if it is missing."""
        self._tried(lambda: self.filesystem.create_dir(self.path, recursive=True))

    def list_files(self) -> Iterator[str]:
        """List the files in it by their relative path, subfolders too; none if it is missing."""
        return (name for name, _ in self.sizes())

    def sizes(self) -> Iterator[tuple[str, int]]:
        """List the files as :meth:`names` does, each with its size in bytes."""
        base = self.path.rstrip("/") + "/"
        selector = FileSelector(self.path, allow_not_found=True, recursive=True)
        infos = self._tried(lambda: self.filesystem.get_file_info(selector))
        return ((path_of(info).removeprefix(base), info.size) for info in infos if info.is_file)

    def open(self, name: str) -> NativeFile:
        """Open a file for reading at any position.

        Raises:
            FileNotFoundError: it is missing.
            OSError: it cannot be read.
        """
        return self._tried(lambda: self.filesystem.open_input_file(f"{self.path}/{name}"))

    def remove(self, name: str) -> None:
        """Remove a file; not an error if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            self._tried(lambda: self.filesystem.delete_file(f"{self.path}/{name}"))

    def write_file(self, name: str, write: Callable[[IO[bytes]], None]) -> None:
        """Write a file, perhaps in a subfolder. It has its final name only when it is whole.

        On a local file system it survives a power cut after :meth:`sync`.
        """
        if not self.is_local:
            # In memory first: a stream that an error leaves is closed, and half a file appears.
            buffer = io.BytesIO()
            write(buffer)
            failpoint("sink.writing")
            path = f"{self.path}/{name}"
            self._tried(lambda: atomic_put(self.filesystem, path, buffer.getbuffer()))
            return
        path = f"{self.path}/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_atomically(path, write, before_rename=lambda: failpoint("sink.writing"))

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
            fsync_directory(folder)

    def _tried(self, operation: Callable[[], T]) -> T:
        """Do something that may be done twice, again after a pause if its error is to be retried.

        Raises:
            OSError: it failed for good, or each time.
        """
        for attempt in range(_ATTEMPTS - 1):
            try:
                return operation()
            except Exception as error:
                text = "".join(traceback.format_exception_only(error)).rstrip()
                if not any(_matches(pattern, text) for pattern in self.retried_errors):
                    raise
            time.sleep(min(2.0**attempt, _LONGEST_PAUSE_S) * random.uniform(0.8, 1.2))
        return operation()


def folder_at(given: str | os.PathLike[str], filesystem: FileSystem | None = None) -> Folder:
    """Return the output folder at a path or URI; nothing is made.

    Args:
        filesystem: the pyarrow filesystem that it is on; by default, that of the URI.

    Raises:
        CheckpointError: it cannot be opened, or is a file.
    """
    text = os.fspath(given)
    inferred, path = open_uri("output folder", text, filesystem)
    if not isinstance(inferred, LocalFileSystem):
        return Folder(inferred, path, canonical_uri(inferred, path, text))
    if os.path.exists(path) and not os.path.isdir(path):
        raise CheckpointError(f"The output folder {path} is a file. Give another folder.")
    return Folder(inferred, path, path)


def fault_of(error: OSError) -> tuple[str, str]:
    """Return which kind of fault ``error`` is, in a sentence, and what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The disk is full.", "Free space"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return "Writing there is not allowed.", "Give this user the right to write there"
    if error.errno in (errno.EIO, errno.ENODEV, errno.ESTALE):
        return "The disk fails.", "Mend it"
    if error.errno is not None and not str(error).startswith("AWS Error"):
        return "The file system refuses it.", "Give a path where files can be made"
    return "The storage fails or is away.", "See that it can be reached and written to"


def _matches(pattern: str, text: str) -> bool:
    if pattern in text:
        return True
    with contextlib.suppress(re.error):
        return re.search(pattern, text) is not None
    return False
