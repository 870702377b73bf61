"""How many output files a run's completed sources are in. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ray_resume.core.filenames import OutputName
from ray_resume.core.parts import FilePart

__all__ = ["FileCount", "count_after", "moved_again"]


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


def count_after(count: int, run_id: str, moved: Mapping[str, str]) -> int:
    """Return how many files a run's rows are in after rewrites; before them, it was ``count``.

    Args:
        moved: the new file of each old one that was rewritten. All of these had live rows.
    """
    names = ((OutputName.parse(old), new) for old, new in moved.items())
    new_files = [new for name, new in names if name is not None and name.run_id == run_id]
    return count - len(new_files) + len(set(new_files))


def moved_again(first: Mapping[str, str], then: Mapping[str, str]) -> dict[str, str]:
    """Return the last file of each old one, after two rounds of rewrites."""
    return {**then, **{old: then.get(new, new) for old, new in first.items()}}
