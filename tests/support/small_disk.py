"""A disk in memory that a test can fill."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class Disk:
    """A file system in memory, of a size that a test can fill."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def mount(self, options: str) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(self.path)],
            check=True,
            capture_output=True,
        )

    def fill(self, *, but: int = 0) -> None:
        """Take up all space, ``but`` so many bytes."""
        spare = self.path / "spare"
        spare.write_bytes(bytes(but))
        fill(self._ballast)
        spare.unlink()

    def free(self) -> None:
        self._ballast.unlink()


def fill(ballast: Path) -> None:
    with ballast.open("ab", buffering=0) as file:
        size = 1 << 16
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def mounted(path: Path) -> Iterator[Disk]:
    """Yield a disk of 1 MiB, mounted at ``path``; skip where nobody may mount one."""
    disk = Disk(path)
    disk.path.mkdir()
    try:
        disk.mount("size=1m")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    yield disk
    subprocess.run(["umount", "-l", str(disk.path)], check=True)
