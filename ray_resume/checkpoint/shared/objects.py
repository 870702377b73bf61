"""Whole objects by name, below one path of any storage that pyarrow can reach.

Each operation is retried for some 12 seconds, unless the storage refuses it for good.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ray_resume.checkpoint.objects import ObjectInfo
from ray_resume.errors import CheckpointError
from ray_resume.files import atomic_put, is_atomic, one_line

__all__ = ["StoredObjects"]

T = TypeVar("T")

_MAX_REQUESTS = 16
_RETRY_DELAYS_S = (0.1, 0.3, 1.0, 2.0, 4.0, 4.0)

# Errors that a retry cannot fix, in pyarrow's words.
_FINAL = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH"
    # The status of an answer, not a part of a name.
    r"|(?<![\w./:-])403(?![\w./:-])"
)


class StoredObjects:
    """Objects below ``path`` of a pyarrow filesystem; picklable. See `objects.Objects`."""

    def __init__(self, filesystem: Any, path: str, uri: str) -> None:
        self.filesystem = filesystem
        self.path = path.rstrip("/")
        self.uri = uri

    def put(self, name: str, data: bytes) -> None:
        self._tried(
            f"write {name}", lambda: atomic_put(self.filesystem, f"{self.path}/{name}", data)
        )

    def replace(self, name: str, data: bytes) -> None:
        if is_atomic(self.filesystem) or self.filesystem.type_name == "local":
            self.put(name, data)
        else:
            # A rename does not replace everywhere. Readers of replaced objects bear half of one.
            self._tried(f"write {name}", lambda: self._overwrite(name, data))

    def get(self, name: str) -> bytes | None:
        def get() -> bytes | None:
            try:
                with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

        return self._tried(f"read {name}", get)

    def get_all(self, names: Sequence[str]) -> Iterator[bytes | None]:
        with ThreadPoolExecutor(min(_MAX_REQUESTS, max(1, len(names)))) as pool:
            yield from pool.map(self.get, names)

    def list(self, folder: str, *, hidden: bool = False) -> dict[str, ObjectInfo]:
        return self._tried(f"list {folder}", lambda: self._list(folder, hidden))

    def delete(self, names: Iterable[str]) -> None:
        def delete(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_file(f"{self.path}/{name}")

        doomed = list(names)
        with ThreadPoolExecutor(min(_MAX_REQUESTS, max(1, len(doomed)))) as pool:
            list(pool.map(lambda name: self._tried(f"delete {name}", lambda: delete(name)), doomed))

    def _list(self, folder: str, hidden: bool) -> dict[str, ObjectInfo]:
        from pyarrow.fs import FileSelector

        _forget_listings(self.filesystem)
        selector = FileSelector(f"{self.path}/{folder}", allow_not_found=True, recursive=True)
        base = len(self.path) + 1
        return {
            info.path[base:]: ObjectInfo(info.size or 0, info.mtime_ns)
            for info in self.filesystem.get_file_info(selector)
            if info.is_file and (hidden or not info.base_name.startswith("."))
        }

    def _overwrite(self, name: str, data: bytes) -> None:
        path = f"{self.path}/{name}"
        self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(data)

    def _tried(self, what: str, operation: Callable[[], T]) -> T:
        """Run an operation that may run twice; retry it if it fails, because networks recover."""
        delays = iter(_RETRY_DELAYS_S)
        while True:
            try:
                return operation()
            except Exception as error:
                # A client of fsspec may raise any kind of error.
                delay_s = next(delays, None)
                if delay_s is None or _is_final(error):
                    raise CheckpointError(
                        f"The checkpoint {self.uri} fails: cannot {what} ({one_line(error)}). "
                        "Earlier commits are safe. Make sure that this process can reach the "
                        "storage and write to it with its credentials, and run again."
                    ) from error
                time.sleep(delay_s)


def _is_final(error: Exception) -> bool:
    return isinstance(error, (PermissionError, NotADirectoryError, IsADirectoryError)) or bool(
        _FINAL.search(str(error))
    )


def _forget_listings(filesystem: Any) -> None:
    """Have a filesystem of fsspec forget its cached listings."""
    handler = getattr(filesystem, "handler", None)
    forget = getattr(getattr(handler, "fs", None), "invalidate_cache", None)
    if forget is not None:
        forget()
