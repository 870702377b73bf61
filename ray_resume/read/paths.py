"""Where the files of a read are: their filesystem, and their paths there.

Paths are resolved as plain Ray Data resolves them. One thing is added: each file has one
normalized path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import takewhile
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pyarrow.fs import (
    FileSystem,
    FileType,
    LocalFileSystem,
    SubTreeFileSystem,
)

from ray_resume import filesystems
from ray_resume.core.sources import Items
from ray_resume.errors import ResumeError
from ray_resume.files import public_uri
from ray_resume.filesystems import as_pyarrow
from ray_resume.raydata.paths import is_http, locate, paths_of, resolving

__all__ = ["PlainPaths", "id_of_url", "located", "normalized", "resolve"]


def resolve(paths: Any, filesystem: Any) -> tuple[FileSystem, list[str]]:
    """Return the filesystem of the ``paths`` of a reader, and their normalized paths there.

    Raises: as :func:`located`.
    """
    first, found = located(paths, filesystem)
    return normalized(first, found)


def located(paths: Any, filesystem: Any) -> tuple[FileSystem, list[str]]:
    """Return the filesystem of the ``paths`` of a reader, and their paths there as Ray has them.

    A path that Ray cannot open as it is written is normalized.

    Raises:
        ValueError: they name no filesystem, or several.
        TypeError: ``filesystem`` is none.
        ResumeError: one cannot be resolved. Plain Ray Data logs that, and reads the others.
    """
    given = paths_of(paths)
    if filesystem is not None:
        filesystem = as_pyarrow(filesystem)
    # One block for all: what HTTP needs is looked for once, not for each path.
    with resolving():
        found = [_located(path, filesystem) for path in given]
    first = filesystem or found[0][0]
    if filesystem is None:
        for path, (other, _) in zip(given, found, strict=True):
            if type(other) is not type(first) or is_http(other) != is_http(first):
                raise ValueError(
                    f"{public_uri(given[0])} and {public_uri(path)} are on different filesystems. "
                    "Read them apart."
                )
    first = as_pyarrow(first)
    return first, [_openable(first, path) for _, path in found]


@dataclass(frozen=True)
class PlainPaths:
    """Maps listed paths to those of plain Ray Data, by each root's normalized and plain path."""

    roots: tuple[str, ...]
    plain: tuple[str, ...]

    @property
    def is_identity(self) -> bool:
        """Whether every path is the same in plain Ray Data."""
        cut, base = self._prefix() or (1, "")
        return not cut and not base

    def items(self, names: Iterable[str]) -> Items:
        """Return the items of files that were listed as ``names``, root by root."""
        prefix = self._prefix()
        return Items(listed=self.of(names)) if prefix is None else Items(prefix[1], cut=prefix[0])

    def of(self, names: Iterable[str]) -> list[str]:
        """Return the plain paths of files that were listed as ``names``, root by root."""
        pairs = iter(zip(self.roots, self.plain, strict=True))
        root = plain = ""
        folder = None
        paths = []
        for name in names:
            while folder is None or not (name == root or name.startswith(folder)):
                root, plain = next(pairs)
                folder = _as_folder(root)
            inside = name.removeprefix(folder)
            paths.append(plain if name == root else f"{_as_folder(plain)}{inside}")
        return paths

    def _prefix(self) -> tuple[int, str] | None:
        """Return how many characters to cut and what replaces them; None if roots differ in it."""
        prefixes = set()
        for root, plain in zip(self.roots, self.plain, strict=True):
            one, other = _as_folder(root), _as_folder(plain)
            pairs = zip(reversed(one), reversed(other), strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            prefixes.add((len(one) - same, other[: len(other) - same]))
        return prefixes.pop() if len(prefixes) == 1 else None


def _as_folder(path: str) -> str:
    return path if path.endswith("/") else f"{path}/"


def _located(path: str, filesystem: Any) -> tuple[FileSystem, str]:
    try:
        # Two slashes at its beginning would make the first folder a host.
        return locate(re.sub("^/+", "/", path), filesystem)
    except (ValueError, ImportError) as error:
        shown = public_uri(path)
        http = path.startswith(("http://", "https://")) and find_spec("aiohttp") is None
        raise ResumeError(
            f"{shown} cannot be resolved, so its rows would be missing: "
            f"{str(error).replace(path, shown)}"
            f"{' fsspec reads HTTP with aiohttp: pip install aiohttp.' if http else ''}"
        ) from None


def normalized(filesystem: FileSystem, paths: list[str]) -> tuple[FileSystem, list[str]]:
    """Return the one normal form of paths, from the root of the filesystem that holds them."""
    filesystem, paths = filesystems.unwrapped(filesystem, paths)
    # For HTTP, a path is a whole URL.
    return (filesystem, paths) if is_http(filesystem) else filesystems.normalized(filesystem, paths)


def _openable(filesystem: FileSystem, path: str) -> str:
    """Return ``path``, normalized if the filesystem cannot open it as it is.

    An operating system does not go up from a folder that is missing, and knows no "~".
    """
    may_fail = isinstance(filesystem, (LocalFileSystem, SubTreeFileSystem)) and (
        ".." in path.split("/") or path.startswith("~")
    )
    if may_fail and filesystem.get_file_info(path).type == FileType.NotFound:
        return os.path.normpath(os.path.expanduser(path))
    return path


# A URL is signed if it has one of these parameters. Then `_OF_SIGNATURES` are no part of its id.
_SIGNATURES = ("x-amz-signature", "x-goog-signature", "signature", "sig")
_OF_SIGNATURES = re.compile(
    r"x-(amz|goog)-.*|signature|expires|policy|key-pair-id|awsaccesskeyid|googleaccessid"
    r"|s(ig|v|e|t|p|r|s|rt|pr|ip|dd|koid|ktid|kt|ke|ks|kv)",
    re.IGNORECASE,
)


def id_of_url(url: str) -> str:
    """Return what stays the same of a URL: without user and password, and without a signature."""
    parts = urlsplit(url)
    query = parts.query.split("&") if parts.query else []
    names = [item.partition("=")[0] for item in query]
    if any(name.lower() in _SIGNATURES for name in names):
        kept = zip(names, query, strict=True)
        query = [item for name, item in kept if not _OF_SIGNATURES.fullmatch(name)]
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "&".join(query), parts.fragment))
