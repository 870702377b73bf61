"""The files in an output folder of this host, as reports look for them. Loads no pyarrow."""

from __future__ import annotations

import os
from collections.abc import Iterator

__all__ = ["files_in"]


def files_in(folder: str, *, apart_from: str) -> Iterator[tuple[str, int]]:
    """Yield the path, relative to ``folder``, and the size in bytes of each file under it."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            entries = list(os.scandir(os.path.join(folder, prefix)))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue  # No file has a name with a NUL in it.
        for entry in entries:
            name = f"{prefix}{entry.name}"
            try:
                if not entry.is_dir():
                    yield name, entry.stat().st_size
                elif entry.path != apart_from:
                    pending.append(f"{name}/")
            except FileNotFoundError:
                continue  # A live run has just renamed or removed it.
