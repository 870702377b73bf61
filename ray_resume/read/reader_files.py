"""The files that a call of one of Ray's readers names, and where plain Ray Data would find them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from pyarrow.fs import FileSystem, LocalFileSystem

from ray_resume.core.sources import SourceTable
from ray_resume.errors import NonResumableError
from ray_resume.raydata.paths import is_http
from ray_resume.raydata.scans import reads_with_scans, scanned_extensions
from ray_resume.read.listing import list_files
from ray_resume.read.overlap import InputFolders
from ray_resume.read.paths import PlainPaths, located, normalized, resolve
from ray_resume.read.workdir import local_at

__all__ = ["ListedFiles", "arguments_of", "list_reader_files"]


def arguments_of(
    reader: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call of one of Ray's readers, by name."""
    signature = inspect.signature(reader)
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(f"ray.data.{reader.__name__}: {error}") from None
    # Extra keyword arguments of the reader arrive under the name of its ** parameter.
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments


class ListedFiles(NamedTuple):
    """The files of a read, whose items are paths on ``opened_on``, as plain Ray Data has them."""

    filesystem: FileSystem
    opened_on: FileSystem
    sources: SourceTable
    folders: InputFolders


def list_reader_files(
    name: str, signature: inspect.Signature, arguments: dict[str, Any]
) -> ListedFiles:
    """List the files, and take out of ``arguments`` what only the listing needs."""
    if arguments.get("catalog") is not None:
        raise NonResumableError("resumable_read does not resolve catalogs. Give the paths.")
    given = arguments.get("filesystem")
    opened_on, plain = located(arguments.pop("paths"), given)
    filesystem, roots = normalized(opened_on, plain)
    scanned = reads_with_scans(name)
    if name == "read_parquet" and not scanned and isinstance(opened_on, LocalFileSystem):
        # To plan, Ray's older reader opens files on workers, which may have another folder.
        opened_on, plain = filesystem, roots
    plain_paths = PlainPaths(tuple(roots), tuple(plain))
    skipped = arguments.pop("skip_paths", None)
    extensions = arguments.get("file_extensions", _default(signature, "file_extensions"))
    if scanned:
        extensions = scanned_extensions(extensions)
    sources = list_files(
        filesystem,
        roots,
        extensions=extensions,
        keep=_keeping(arguments.pop("partition_filter", None), plain_paths),
        ignore_missing=bool(arguments.pop("ignore_missing_paths", False)),
    )
    if skipped:
        without = set(resolve(skipped, filesystem)[1])
        sources = sources.take(np.flatnonzero([source.item not in without for source in sources]))
    folders = InputFolders.of(filesystem, roots, _paths(sources, filesystem))
    if not is_http(filesystem) and not plain_paths.is_identity:
        sources = sources.found_by(plain_paths.items(sources.ids()))
    # The reader gets each file by name from here on.
    if not isinstance(filesystem, LocalFileSystem) or given is not None:
        arguments["filesystem"] = opened_on
    if isinstance(opened_on, LocalFileSystem) and not all(map(os.path.isabs, plain)):
        opened_on = local_at(os.getcwd())
    if "file_extensions" in signature.parameters and not scanned:
        arguments["file_extensions"] = None
    return ListedFiles(filesystem, opened_on, sources, folders)


def _paths(sources: SourceTable, filesystem: FileSystem) -> Iterator[str]:
    # Ids are the same as items, in a third of the time, but for URLs.
    return (source.item for source in sources) if is_http(filesystem) else sources.ids()


def _keeping(
    keep: Callable[[list[str]], list[str]] | None, plain_paths: PlainPaths
) -> Callable[[list[str]], list[str]] | None:
    """Return a partition filter for listed paths, made of one for plain paths."""
    if keep is None or plain_paths.is_identity:
        return keep

    def kept(names: list[str]) -> list[str]:
        plain = plain_paths.of(names)
        left = set(keep(plain))
        return [name for name, path in zip(names, plain, strict=True) if path in left]

    return kept


def _default(signature: inspect.Signature, name: str) -> Any:
    parameter = signature.parameters.get(name)
    return None if parameter is None else parameter.default
