"""Lists the files of a read as sources, without opening any of them.

The rules are those of Ray Data's own listing: directories are listed recursively, names that
start with "." or "_" are passed over, extensions and filters apply. Two things are added that
Ray's does not give: the modification time, and an identity that does not depend on spelling
(symbolic links are not resolved: another link is another source).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow.parquet as pq
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

from ray_resume.checkpoint.shared.objects import brief, public_uri, whole_uri
from ray_resume.core.records import Fingerprint
from ray_resume.core.sources import Source, SourceTable, refuse_repeated
from ray_resume.errors import CheckpointError, ResumeError

__all__ = [
    "has_changed",
    "list_files",
    "list_row_groups",
    "open_place",
    "path_of",
    "relative_to",
    "resolve",
]

Paths: TypeAlias = "str | Path | Sequence[str | Path]"

_PASSED_OVER = (".", "_")
_FOOTERS_AT_ONCE = 16


def resolve(paths: Paths, filesystem: FileSystem | None) -> tuple[FileSystem, list[str]]:
    """Return the filesystem of ``paths``, and the paths as that filesystem spells them.

    Raises:
        ValueError: they name no filesystem, or several.
    """
    given = [os.fspath(path) for path in _listed(paths)]
    if not given:
        raise ValueError("resumable_read needs at least one path.")
    if filesystem is not None:
        bare = [_without_scheme(path) for path in given]
        return _based(_as_pyarrow(filesystem), bare)
    inferred = [_infer(path) for path in given]
    first = inferred[0][0]
    for path, (other, _) in zip(given, inferred, strict=True):
        if type(other) is not type(first):
            raise ValueError(
                f"{given[0]} and {path} are on different filesystems. Read them apart."
            )
    return _based(first, [path for _, path in inferred])


def open_place(what: str, given: str, filesystem: FileSystem | None) -> tuple[FileSystem, str]:
    """Return the filesystem of one place that is to be written to, and its path there.

    Raises:
        CheckpointError: it cannot be opened; nothing secret of ``given`` is in the message.
    """
    shown = public_uri(given)
    whole = whole_uri(given)
    try:
        found, (path,) = resolve(whole, filesystem)
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        why = brief(OSError(str(error).replace(whole, shown)))
        raise CheckpointError(
            f"The {what} {shown} cannot be opened: {why}. Give a directory, or a URI of a storage "
            "that pyarrow knows (s3://bucket/path, gs://, abfs://, hdfs://), with credentials "
            "where pyarrow finds them; or say which filesystem it is on (filesystem=...)."
        ) from (error if shown == given else None)
    return found, path


def list_files(
    filesystem: FileSystem,
    paths: Iterable[str],
    *,
    extensions: Sequence[str] | None,
    keep: Callable[[list[str]], list[str]] | None,
    ignore_missing: bool,
) -> SourceTable:
    """List the files at and under ``paths``, in the order given, directories sorted.

    Args:
        extensions: only files that end so, without regard to case; None for all.
        keep: takes the paths found and returns those to read, as a partition filter does.
        ignore_missing: whether a path that is not there is passed over.

    Raises:
        FileNotFoundError: a path is not there, or nothing is found.
        ResumeError: a file is named twice.
    """
    given = list(paths)
    infos: list[FileInfo] = []
    for path, info in zip(given, filesystem.get_file_info(given), strict=True):
        if info.type == FileType.Directory:
            infos.extend(_list_directory(filesystem, path))
        elif info.type == FileType.File:
            infos.append(info)
        elif not ignore_missing:
            raise FileNotFoundError(f"There is no file or directory {path!r} to read.")
    if extensions is not None:
        infos = [info for info in infos if _has_extension(info.path, extensions)]
    names = [info.path for info in infos]
    if keep is not None:
        kept = set(keep(names))
        infos = [info for info, name in zip(infos, names, strict=True) if name in kept]
        names = [name for name in names if name in kept]
    if not infos and not ignore_missing:
        among = f" that ends in {' or '.join(extensions)}" if extensions else ""
        raise FileNotFoundError(f"There is no file{among} to read under {', '.join(given)}.")
    for name in names:
        if "\t" in name or "\r" in name or "\n" in name:
            raise ResumeError(
                f"The name of {name!r} has a tab or a line break in it, which Ray Data's path code "
                "drops, so it cannot be opened. Rename it."
            )
    sizes, mtimes_ns = (info.size for info in infos), (info.mtime_ns for info in infos)
    sources = SourceTable.of_files(names, sizes, mtimes_ns)
    refuse_repeated(sources)
    return sources


def has_changed(filesystem: FileSystem, path: str, fingerprint: Fingerprint) -> bool:
    """Say whether a file is gone or has another size or modification time than when listed."""
    info = filesystem.get_file_info(path)
    return info.type == FileType.NotFound or _fingerprint(info) != fingerprint


def _fingerprint(info: FileInfo) -> Fingerprint:
    return Fingerprint(info.size, info.mtime_ns)


def list_row_groups(filesystem: FileSystem, files: Sequence[Source]) -> SourceTable:
    """List the row groups of Parquet files, ``<path>#rg<N>``, by their footers alone."""

    def row_groups(file: Source) -> list[Source]:
        count = pq.read_metadata(file.item, filesystem=filesystem).num_row_groups
        return [
            Source(f"{file.source_id}#rg{number}", (file.item, number), file.fingerprint)
            for number in range(count)
        ]

    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        return SourceTable.of(chain.from_iterable(pool.map(row_groups, files)))


def relative_to(sources: SourceTable, root: str) -> SourceTable:
    """Make the ids of files relative to ``root``, so that the data may move.

    Raises:
        ResumeError: a file is not under it.
    """
    base = root.rstrip("/") + "/"
    outside = next((name for name in sources.ids() if not name.startswith(base)), None)
    if outside is not None:
        raise ResumeError(
            f"{outside} is not under source_root={root!r}, so it has no path relative to it."
        )
    return sources.relative_to(base)


def _list_directory(filesystem: FileSystem, directory: str) -> list[FileInfo]:
    base = directory.rstrip("/") + "/"
    try:
        return sorted(
            (
                info
                for info in filesystem.get_file_info(FileSelector(directory, recursive=True))
                if info.is_file and not info.path.removeprefix(base).startswith(_PASSED_OVER)
            ),
            key=lambda info: info.path,
        )
    except UnicodeDecodeError as error:
        raise ResumeError(
            f"The name of {error.object!r} is not UTF-8, so pyarrow cannot open it. Rename it."
        ) from None


def path_of(info: FileInfo) -> str:
    """Return the path of a file that is not to be opened: its name need not be UTF-8."""
    try:
        return str(info.path)
    except UnicodeDecodeError as error:
        return error.object.decode("utf-8", "surrogateescape")


def _has_extension(path: str, extensions: Sequence[str] | None) -> bool:
    if extensions is None:
        return True
    name = path.lower()
    return any(name.endswith("." + extension.lower().lstrip(".")) for extension in extensions)


def _listed(paths: Paths) -> list[Path | str]:
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def _infer(path: str) -> tuple[FileSystem, str]:
    if "://" in path:
        filesystem, stripped = FileSystem.from_uri(path)
        return filesystem, stripped
    return LocalFileSystem(), os.path.expanduser(path)


def _as_pyarrow(filesystem: Any) -> FileSystem:
    # Ray Data takes filesystems of fsspec too.
    return (
        filesystem
        if isinstance(filesystem, FileSystem)
        else PyFileSystem(FSSpecHandler(filesystem))
    )


def _based(filesystem: FileSystem, paths: list[str]) -> tuple[FileSystem, list[str]]:
    """Spell paths one way only, and from the root of the filesystem that holds them."""
    while isinstance(filesystem, SubTreeFileSystem):
        base = filesystem.base_path.rstrip("/")
        filesystem, paths = filesystem.base_fs, [f"{base}/{path.lstrip('/')}" for path in paths]
    if isinstance(filesystem, LocalFileSystem):
        return filesystem, [re.sub("^/+", "/", os.path.abspath(path)) for path in paths]
    return filesystem, [path.rstrip("/") for path in paths]


def _without_scheme(path: str) -> str:
    return path.split("://", 1)[1] if "://" in path else path
