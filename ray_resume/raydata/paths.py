"""Paths as Ray Data's readers take them: the filesystem of each, and its path there."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSystem, PyFileSystem

# How Ray's readers resolve paths is no public function. Its rules (schemes of its own, URLs, names
# that are no valid URI, file systems of fsspec) differ from pyarrow's and change with releases.
from ray.data.datasource.path_util import (
    _is_http_filesystem,
    _resolve_single_path_with_fallback,
    _unwrap_protocol,
)

__all__ = ["is_http", "is_local_scheme", "locate", "paths_of", "resolving"]

_HTTP = "fsspec.implementations.http"
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def resolving() -> Iterator[None]:
    """Let Ray resolve paths in this block: in one thread of ours at a time, and in any of Ray's.

    To resolve a path is to import fsspec's module for HTTP. If ``aiohttp``, which that needs, is
    not installed, each attempt imports it again. A second thread may then see half of it, and Ray
    does not expect the error ("cannot import name 'HTTPFileSystem'"). So the module is imported
    before, or it is missing for all threads while the block runs.
    """
    with _one_at_a_time:
        if sys.modules.get(_HTTP, ...) is None:
            # A block around this one has found that it is missing.
            yield
            return
        try:
            import fsspec.implementations.http  # noqa: F401
        except ImportError:
            sys.modules[_HTTP] = None  # type: ignore[assignment]
        try:
            yield
        finally:
            if sys.modules.get(_HTTP, ...) is None:
                del sys.modules[_HTTP]


def paths_of(given: Any) -> list[str]:
    """Return the paths that were given to a reader, as strings.

    Raises:
        ValueError: it is what Ray's readers refuse: not a string, a ``Path`` or a list of these.
    """
    listed = given if isinstance(given, list) else [given]
    if not listed:
        raise ValueError("resumable_read needs at least one path.")
    for path in listed:
        if not isinstance(path, (str, Path)):
            raise ValueError(
                f"paths must be a string, a pathlib.Path or a list of these, not {path!r:.80} in "
                f"{type(given).__name__}."
            )
    local = [_is_local(path) for path in listed]
    if any(local) and not all(local):
        raise ValueError("Either all paths begin with local://, or none does.")
    return [str(path) for path in listed]


def is_local_scheme(given: Any) -> bool:
    """Say whether the paths of a reader begin with ``local://``: the driver's node reads them."""
    return any(map(_is_local, given if isinstance(given, list) else [given]))


def _is_local(path: Any) -> bool:
    return str(path).startswith("local://")


def locate(path: str, filesystem: Any) -> tuple[FileSystem, str]:
    """Return the filesystem of ``path`` (any that was given, if it fits), and its path there.

    Raises:
        ValueError, ImportError: Ray cannot resolve it. (It logs that, and goes on without it.)
    """
    with resolving():
        found, resolved = _resolve_single_path_with_fallback(path, filesystem)
    if not is_http(found):
        resolved = _unwrap_protocol(resolved)  # type: ignore[no-untyped-call]
    return found, found.normalize_path(resolved)


def is_http(filesystem: FileSystem) -> bool:
    """Say whether this is fsspec's file system for HTTP, whose paths are whole URLs."""
    # Asked of each file: only those of fsspec can be, and only for them Ray imports something.
    if not isinstance(filesystem, PyFileSystem):
        return False
    with resolving():
        return bool(_is_http_filesystem(filesystem))
