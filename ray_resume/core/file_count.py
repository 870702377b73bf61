"""How many output files a run's completed sources are in. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from ray_resume.core.parts import FilePart

__all__ = ["FileCount"]


class FileCount:
    """Counts files by the parts that are in them; a file that several sources share counts once.

    Memory: nothing for a file that is one part as a whole, about 100 bytes for another.
    """

    def __init__(self) -> None:
        self._whole = 0
        self._shared: set[str] = set()

    def add(self, parts: Iterable[FilePart]) -> None:
        """Count the files of parts, none of which was counted before."""
        for part in parts:
            if part.is_whole_file:
                self._whole += 1
            else:
                self._shared.add(part.file)

    def __int__(self) -> int:
        return self._whole + len(self._shared)
