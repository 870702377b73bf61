"""Filesystems of pyarrow and fsspec: a path or URI opened, its normal form, and when files changed.

A filesystem of fsspec is wrapped as one of pyarrow that reports when a file was changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from pyarrow.fs import (
    FileInfo,
    FileSelector,
    FileSystem,
    FileType,
    FSSpecHandler,
    LocalFileSystem,
    PyFileSystem,
    SubTreeFileSystem,
)

from ray_resume.errors import CheckpointError
from ray_resume.files import one_line, public_uri, whole_uri

__all__ = ["as_pyarrow", "normalized", "open_uri", "path_of", "unwrapped"]

_MAX_REQUESTS = 16


def open_uri(what: str, given: str, filesystem: FileSystem | None) -> tuple[FileSystem, str]:
    """Return the filesystem of a path or URI to write to, and its path there.

    Raises:
        CheckpointError: it cannot be opened; nothing secret of ``given`` is in the message.
    """
    shown = public_uri(given)
    whole = whole_uri(given)
    try:
        found, (path,) = _opened(whole, filesystem)
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        why = one_line(OSError(str(error).replace(whole, shown)))
        raise CheckpointError(
            f"The {what} {shown} cannot be opened: {why}. Give a directory, or a URI of a storage "
            "that pyarrow knows (s3://bucket/path, gs://, abfs://, hdfs://), with credentials "
            "where pyarrow finds them; or say which filesystem it is on (filesystem=...)."
        ) from (error if shown == given else None)
    return found, path


def _opened(path: str, filesystem: Any) -> tuple[FileSystem, list[str]]:
    if filesystem is not None:
        return normalized(as_pyarrow(filesystem), [path.split("://", 1)[-1]])
    if "://" in path:
        filesystem, path = FileSystem.from_uri(path)
        return normalized(filesystem, [path])
    return normalized(LocalFileSystem(), [path])


def unwrapped(filesystem: FileSystem, paths: list[str]) -> tuple[FileSystem, list[str]]:
    """Return the filesystem that a subtree is part of, and the paths from its root."""
    while isinstance(filesystem, SubTreeFileSystem):
        base = filesystem.base_path.rstrip("/")
        filesystem, paths = filesystem.base_fs, [f"{base}/{path.lstrip('/')}" for path in paths]
    return filesystem, paths


def normalized(filesystem: FileSystem, paths: list[str]) -> tuple[FileSystem, list[str]]:
    """Return the one normal form of paths, from the root of the filesystem that holds them."""
    filesystem, paths = unwrapped(filesystem, paths)
    if isinstance(filesystem, LocalFileSystem):
        # An empty path is no directory, though it would become the working directory.
        return filesystem, [path and re.sub("^/+", "/", _absolute(path)) for path in paths]
    return filesystem, [path.rstrip("/") for path in paths]


def _absolute(path: str) -> str:
    path = os.path.expanduser(path)
    whole = os.path.abspath(path)
    steps = path.split("/")
    if ".." not in steps or not os.path.exists(path):
        return whole
    if os.path.exists(whole) and os.path.samefile(path, whole):
        return whole
    # The folder before a ".." is a symbolic link: the system goes up from the target of the link.
    below = steps[::-1].index("..")
    up = os.path.realpath("/".join(steps[: len(steps) - below]))
    return os.path.abspath(os.path.join(up, *steps[len(steps) - below :]))


def path_of(info: FileInfo) -> str:
    """Return the path of a file that is not to be opened: its name need not be UTF-8."""
    try:
        return str(info.path)
    except UnicodeDecodeError as error:
        return error.object.decode("utf-8", "surrogateescape")


def as_pyarrow(filesystem: Any) -> FileSystem:
    """Return a filesystem of pyarrow or fsspec as one of pyarrow that knows when files changed."""
    if isinstance(filesystem, PyFileSystem) and type(filesystem.handler) is FSSpecHandler:
        filesystem = filesystem.handler.fs
    if isinstance(filesystem, FileSystem):
        return filesystem
    if not hasattr(filesystem, "invalidate_cache"):
        raise TypeError(
            f"filesystem must be a filesystem of pyarrow or fsspec, not {filesystem!r:.80}."
        )
    return PyFileSystem(_Handler(filesystem))


class _Handler(FSSpecHandler):  # type: ignore[misc]
    """A filesystem of fsspec that knows when files changed, and is asked for many at once."""

    def get_file_info(self, paths: Sequence[str]) -> list[FileInfo]:
        # It may remember what it has listed before.
        self.fs.invalidate_cache()
        with ThreadPoolExecutor(min(_MAX_REQUESTS, max(1, len(paths)))) as pool:
            return [info for (info,) in pool.map(super().get_file_info, [[p] for p in paths])]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        self.fs.invalidate_cache()
        infos: list[FileInfo] = super().get_file_info_selector(selector)
        return infos

    # pyarrow's own class calls this for each file; its own looks for a time as "mtime" alone.
    @staticmethod
    def _create_file_info(path: str, info: Mapping[str, Any]) -> FileInfo:
        kind = _KINDS.get(info["type"], FileType.Unknown)
        size = info["size"] if kind == FileType.File else None
        return FileInfo(path, kind, size=size, mtime_ns=_changed_ns(info))


_KINDS = {"file": FileType.File, "directory": FileType.Directory}

# The names under which filesystems of fsspec report when a file was changed, or a stamp of it.
_TIMES = (
    "mtime",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "updated",
    "modified",
    "created",
)
_STAMPS = ("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "crc32c", "CRC")
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def _changed_ns(info: Mapping[str, Any]) -> int | None:
    """Return when a file was changed, or a number for its stamp, which serves as well; or None."""
    for name in _TIMES:
        value = info.get(name)
        if isinstance(value, str):
            value = _time_of(value)
        if isinstance(value, datetime):
            aware = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
            return (aware - _EPOCH) // timedelta(microseconds=1) * 1000
        if isinstance(value, (int, float)):
            return round(value * 1e9)
    for name in _STAMPS:
        if info.get(name):
            stamp = hashlib.blake2b(str(info[name]).encode(), digest_size=8).digest()
            return int.from_bytes(stamp, "little") >> 1
    return None


def _time_of(text: str) -> datetime | None:
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        with contextlib.suppress(ValueError, TypeError):
            # Before Python 3.11, a "Z" is no time zone.
            return parse(re.sub("Z$", "+00:00", text))
    return None
