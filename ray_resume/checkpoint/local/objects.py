"""Whole objects by name in a directory of this host. Loads no pyarrow."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence

from ray_resume.checkpoint.objects import ObjectInfo
from ray_resume.errors import CheckpointError
from ray_resume.files import fsync_directory, write_atomically

__all__ = ["LocalObjects"]


class LocalObjects:
    """Objects below a directory, one file each; picklable. See `checkpoint.objects.Objects`.

    Two processes must not write one name at the same time.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def uri(self) -> str:
        return self.path

    def put(self, name: str, data: bytes) -> None:
        path = f"{self.path}/{name}"
        try:
            folders = self._folders_of(name)
            write_atomically(path, data)
            for folder in folders:
                fsync_directory(folder)
        except OSError as error:
            raise CheckpointError(
                f"The checkpoint file {path} cannot be written: {error}. Earlier commits are safe. "
                "Free space or make the directory writable, and run again."
            ) from error

    replace = put

    def get(self, name: str) -> bytes | None:
        path = f"{self.path}/{name}"
        try:
            with open(path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(
                f"The checkpoint file {path} cannot be read: {error}. Make it readable or restore "
                "it from a copy, and run again."
            ) from error

    def get_all(self, names: Sequence[str]) -> Iterator[bytes | None]:
        return map(self.get, names)

    def list(self, folder: str, *, hidden: bool = False) -> dict[str, ObjectInfo]:
        found = {}
        for parent, _, names in os.walk(f"{self.path}/{folder}", onerror=_refuse):
            for name in names:
                if not hidden and name.startswith("."):
                    continue
                path = f"{parent}/{name}"
                try:
                    status = os.stat(path)
                except FileNotFoundError:
                    continue  # Another process has just removed or renamed it.
                found[path[len(self.path) + 1 :]] = ObjectInfo(status.st_size, status.st_mtime_ns)
        return found

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                os.unlink(f"{self.path}/{name}")
            except FileNotFoundError:
                continue
            except OSError as error:
                raise CheckpointError(
                    f"The checkpoint file {self.path}/{name} cannot be removed: {error}. Make its "
                    "folder writable, and run again."
                ) from error

    def _folders_of(self, name: str) -> Sequence[str]:
        """Make the folders of ``name`` below the directory; return them, the innermost first."""
        folders = [self.path]
        for part in name.split("/")[:-1]:
            folders.append(f"{folders[-1]}/{part}")
            # One level at a time: a checkpoint that was removed must not appear again, half empty.

            with contextlib.suppress(FileExistsError):
                os.mkdir(folders[-1])
        return folders[::-1]


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise CheckpointError(
            f"The checkpoint folder {error.filename} cannot be listed: {error}. Make it readable, "
            "and run again."
        ) from error
