"""Refuses an input, an output and a checkpoint that are in one another, by their real paths.

A run would read what earlier runs wrote: their output, their dead letters, the checkpoint's files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlparse

from pyarrow.fs import FileSystem, LocalFileSystem

from ray_resume.errors import CheckpointError
from ray_resume.read.listing import is_hidden

__all__ = ["InputFolders", "filesystem_type", "refuse_overlap"]

_TYPE_OF_SCHEME = {"gs": "gcs", "viewfs": "hdfs"}


@dataclass(frozen=True)
class InputFolders:
    """Where a read finds its files.

    Attributes:
        kind: the type of the filesystem, as pyarrow names it.
        roots: what was listed, by its real path: the path as the user gave it.
        folders: the real paths of all folders that files were listed in.
    """

    kind: str
    roots: dict[str, str]
    folders: frozenset[str]

    @classmethod
    def of(cls, filesystem: FileSystem, roots: Iterable[str], files: Iterable[str]) -> InputFolders:
        """Find the folders of ``files``, which were listed at and under ``roots``."""
        folders = {file.rpartition("/")[0] for file in files}
        if isinstance(filesystem, LocalFileSystem):
            real = _RealPaths()
            return cls(
                filesystem.type_name,
                {os.path.realpath(root): root for root in roots},
                frozenset(real.of(folder) for folder in folders),
            )
        return cls(filesystem.type_name, {root: root for root in roots}, frozenset(folders))

    def reads_from(self, kind: str, path: str) -> str | None:
        """Return the part of the input that would have files in the folder at ``path``, if any.

        This is a root with the folder in it, or a folder in it that files were listed in.
        """
        if kind != self.kind:
            return None
        folder = os.path.realpath(path) if kind == "local" else path.rstrip("/")
        for root, given in self.roots.items():
            if _is_in(folder, root) and not is_hidden(folder, root):
                return given
        inside = (read for read in sorted(self.folders) if _is_in(read, folder))
        return next((read for read in inside if not is_hidden(read, folder)), None)


def refuse_overlap(
    inputs: InputFolders | None, what: str, kind: str, path: str, shown: str
) -> None:
    """Make sure that a read does not find what is written to a folder.

    Args:
        inputs: where the read finds its files; None if that is nothing of ours.
        what: what the folder is, such as ``"output folder"``.
        kind: the type of its filesystem, as pyarrow names it; ``path`` is its path there.
        shown: how a message names the folder.

    Raises:
        CheckpointError: it would.
    """
    read_from = None if inputs is None else inputs.reads_from(kind, path)
    if read_from is not None:
        raise CheckpointError(
            f"The {what} {shown} is in the input {read_from}, or the input in it, perhaps by a "
            "symbolic link. So the next run would read what this one writes. Give a folder "
            "outside of it."
        )


def filesystem_type(uri: str, filesystem: Any) -> str:
    """Return the type of a filesystem that is not local, as pyarrow names it; nothing is opened."""
    scheme = urlparse(uri).scheme
    return str(getattr(filesystem, "type_name", _TYPE_OF_SCHEME.get(scheme, scheme)))


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


class _RealPaths:
    """Resolves folders, each of their parents once."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {"/": "/", "": ""}

    def of(self, folder: str) -> str:
        known = self._known.get(folder)
        if known is None:
            parent, _, name = folder.rpartition("/")
            known = f"{self.of(parent or '/').rstrip('/')}/{name}"
            if os.path.islink(known):
                known = os.path.realpath(known)
            self._known[folder] = known
        return known
