"""Whole objects by name, below one path of any storage that pyarrow knows.

What is asked of a storage is little, since object stores give no more: an object appears whole
under its name or not at all, whoever lists or reads after that sees it, and an object can be
replaced or deleted. There is no locking, no appending, and no "create unless it is there".

Knows nothing of checkpoints. Loads pyarrow only when a storage is opened.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ray_resume.errors import CheckpointError

__all__ = [
    "ObjectInfo",
    "Objects",
    "StoredObjects",
    "atomic_put",
    "canonical_uri",
    "is_atomic",
    "one_line",
    "public_uri",
    "whole_uri",
]

T = TypeVar("T")

# Storages whose objects appear when their upload is closed. Elsewhere a name is given by renaming.
_ATOMIC = frozenset({"s3", "gcs", "abfs"})

_SCHEMES = {"gcs": "gs"}
# Where what stands before the "@" is an access key; elsewhere it is a user, or a container.
_KEYS_FOR_USERS = frozenset({"s3", "s3a", "gs", "gcs"})

_AT_ONCE = 16
_LONGEST_LINE = 400
_RETRY_DELAYS_S = (0.1, 0.3, 1.0, 2.0, 4.0, 4.0)

# What trying again does not mend, as pyarrow spells it.
_FINAL = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH"
    # The status of an answer, and not a part of some name.
    r"|(?<![\w./:-])403(?![\w./:-])"
)

_SECRET_OPTION = re.compile(
    r"([?&][^=&]*(?:secret|token|key|password|sas|sig)[^=&]*=)[^&]*", re.IGNORECASE
)


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing says of an object: when both are as before, nobody has replaced it."""

    size: int
    mtime_ns: int | None


class Objects(Protocol):
    """Objects by name; names have "/" between their parts. All methods may be called by threads.

    Raises:
        CheckpointError: every method, where the storage fails or refuses for good.
    """

    def put(self, name: str, data: bytes) -> None:
        """Add an object that was not there. It is durable and visible when this returns."""

    def replace(self, name: str, data: bytes) -> None:
        """Put ``data`` in place of an object; whoever reads meanwhile may see either, or half."""

    def get(self, name: str) -> bytes | None:
        """Return an object, None if it is not there."""

    def get_all(self, names: Sequence[str]) -> Iterator[bytes | None]:
        """Return many objects, in that order, many at once where that is quicker."""

    def list(self, folder: str) -> Mapping[str, ObjectInfo]:
        """List the objects in and below ``folder`` by their whole name; none if it is not there.

        Guarantees: what was put before this is called and is not deleted is in it.
        """

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; not an error if some are gone."""


class StoredObjects:
    """Objects below ``path`` of a pyarrow filesystem, as that spells it; picklable."""

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
            # Renaming does not replace everywhere, and here half an object does no harm.
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
        with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(names)))) as pool:
            yield from pool.map(self.get, names)

    def list(self, folder: str) -> dict[str, ObjectInfo]:
        return self._tried(f"list {folder}", lambda: self._list(folder))

    def delete(self, names: Iterable[str]) -> None:
        def delete(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_file(f"{self.path}/{name}")

        doomed = list(names)
        with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(doomed)))) as pool:
            list(pool.map(lambda name: self._tried(f"delete {name}", lambda: delete(name)), doomed))

    def _list(self, folder: str) -> dict[str, ObjectInfo]:
        from pyarrow.fs import FileSelector

        _forget_listings(self.filesystem)
        selector = FileSelector(f"{self.path}/{folder}", allow_not_found=True, recursive=True)
        base = len(self.path) + 1
        return {
            info.path[base:]: ObjectInfo(info.size or 0, info.mtime_ns)
            for info in self.filesystem.get_file_info(selector)
            if info.is_file and not info.base_name.startswith(".")
        }

    def _overwrite(self, name: str, data: bytes) -> None:
        path = f"{self.path}/{name}"
        self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(data)

    def _tried(self, what: str, operation: Callable[[], T]) -> T:
        """Do something that may be done twice, again if it fails: networks have moments."""
        delays = iter(_RETRY_DELAYS_S)
        while True:
            try:
                return operation()
            except Exception as error:
                # Other people's filesystems raise what their clients do, which may be anything.
                delay_s = next(delays, None)
                if delay_s is None or _is_final(error):
                    raise CheckpointError(
                        f"The checkpoint {self.uri} fails: cannot {what} ({one_line(error)}). What "
                        "was committed before is safe. See that the storage can be reached and "
                        "written to with this process's credentials, and run again."
                    ) from error
                time.sleep(delay_s)


def atomic_put(filesystem: Any, path: str, data: Any) -> None:
    """Write a file of any pyarrow filesystem that appears whole or not at all, and is durable.

    Raises:
        OSError: it failed; there may be a hidden left-over.
    """
    if is_atomic(filesystem):
        # One write: a stream that is left by an error would still be closed, and the object appear.
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
        return
    folder, _, bare = path.rpartition("/")
    hidden = f"{folder}/.{bare}.{secrets.token_hex(4)}"
    if filesystem.type_name == "local":
        os.makedirs(folder, exist_ok=True)
        try:
            with open(hidden, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(hidden, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(hidden)
            raise
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return
    filesystem.create_dir(folder, recursive=True)
    with filesystem.open_output_stream(hidden) as stream:
        stream.write(data)
    filesystem.move(hidden, path)


def is_atomic(filesystem: Any) -> bool:
    """Say whether a file appears on this filesystem only when its stream is closed."""
    return filesystem.type_name in _ATOMIC


def public_uri(uri: str) -> str:
    """Spell ``uri`` without passwords and keys: it goes into messages and into logs."""
    return _SECRET_OPTION.sub(r"\1***", _without_secrets(whole_uri(uri)))


def whole_uri(uri: str) -> str:
    """Give ``uri`` back the second slash that pathlib has taken out of it."""
    return re.sub("^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", r"\1://", uri)


def canonical_uri(filesystem: Any, path: str, uri: str) -> str:
    """Spell a place the same way whoever names it: without credentials and options.

    Args:
        path: as ``filesystem`` spells it.
        uri: as it was given; not a URI if the filesystem was given with it.
    """
    if "://" not in uri:
        kind = filesystem.type_name
        return f"{_SCHEMES.get(kind, kind)}://{path}"
    return _without_secrets(uri).partition("?")[0].rstrip("/")


def _without_secrets(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    if scheme.lower() in _KEYS_FOR_USERS and ":" in authority and "@" not in authority:
        # A secret with a "/" in it, which should have been spelt "%2F".
        authority, slash, path = rest.rpartition("@")[2].partition("/")
    user, at, host = authority.rpartition("@")
    if scheme.lower() in _KEYS_FOR_USERS:
        user = at = ""
    return f"{scheme}{separator}{user.partition(':')[0]}{at}{host}{slash}{path}"


def one_line(error: Exception) -> str:
    """Spell an error of pyarrow's in one line: some of them fill a screen."""
    line = (str(error).strip().splitlines() or [repr(error)])[0]
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..."


def _is_final(error: Exception) -> bool:
    return isinstance(error, (PermissionError, NotADirectoryError, IsADirectoryError)) or bool(
        _FINAL.search(str(error))
    )


def _forget_listings(filesystem: Any) -> None:
    """Have a filesystem of fsspec look anew: it would remember what it has listed."""
    handler = getattr(filesystem, "handler", None)
    forget = getattr(getattr(handler, "fs", None), "invalidate_cache", None)
    if forget is not None:
        forget()
