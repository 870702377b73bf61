"""Rows of old files in pieces, in the order in which a new file has them.

Invariant: each old file is opened once and read once, from its start to its end, wherever its
parts stand among the others. Pieces that are read before their turn are held in memory.
"""

from __future__ import annotations

import lzma
import tarfile
import zipfile
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import pyarrow as pa

from ray_resume.core.parts import FilePart
from ray_resume.errors import ResumeError
from ray_resume.files import one_line
from ray_resume.write.folder import Folder

__all__ = [
    "READ_ERRORS",
    "IncompatibleFilesError",
    "OldFile",
    "Piece",
    "Pieces",
    "Span",
    "rows_in_order",
]

T = TypeVar("T")
Ranges = Sequence[tuple[int, int]]
Cut = Callable[[Sequence[Ranges]], Iterable[T]]

# If more files would be open at once, the rest of the first one is read, and held.
_OPEN_FILES = 16

READ_ERRORS = (
    OSError,
    EOFError,
    pa.ArrowException,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
)
"""The errors of reading a file that is damaged, or whose storage fails."""


class IncompatibleFilesError(ResumeError):
    """Rows of these files cannot stand in one file. Each of the files is as it was."""


class Span(NamedTuple):
    """The rows ``start .. stop - 1`` of an old file; ``turn`` is that of the run they are in."""

    start: int
    stop: int
    turn: int


@dataclass(frozen=True)
class Piece(Generic[T]):
    """Some rows of a run, which follow those of its earlier pieces."""

    turn: int
    rows: T
    is_last: bool


Pieces = Generator[Piece[T], None, None]


@dataclass(frozen=True)
class OldFile:
    """A file that rows are copied from.

    Args:
        file_rows: how many rows it has.
        spans: what is copied of it, by first row. Those of one turn are a run: they stand in the
            new file one after the other.
    """

    folder: Folder
    name: str
    file_rows: int
    spans: tuple[Span, ...]

    @property
    def uri(self) -> str:
        return f"{self.folder.uri}/{self.name}"

    def open(self) -> Any:
        """Open it for reading at any position."""
        return self.folder.open(self.name)

    def unusable(self, problem: str | Exception) -> ResumeError:
        """Make the error for a file that is not as it was written."""
        if isinstance(problem, FileNotFoundError):
            problem = "it is missing"
        elif isinstance(problem, Exception):
            problem = one_line(problem)
        return ResumeError(
            f"Rows of the output file {self.uri} cannot be copied: {problem}. Nothing was changed. "
            "If the storage was away, run again. If the file is missing or damaged, put it back, "
            "or reset the sources that have rows in it."
        )

    def check_rows(self, found: int) -> None:
        """Compare the number of its rows with what the records say.

        Raises:
            ResumeError: they differ.
        """
        if found != self.file_rows:
            raise self.unusable(f"it has {found} rows, and {self.file_rows} were written")

    def pieces(self, batches: Iterable[tuple[int, Cut[T]]]) -> Iterator[Piece[T]]:
        """Yield what the runs have of successive batches of rows.

        Args:
            batches: the number of rows of each, and a function that reads it if it is wanted. It
                is given the ranges of rows of some runs, and returns the rows of each run.
        """
        ends = {span.turn: span.stop for span in self.spans}
        ahead, begun = deque(self.spans), list[Span]()
        start = 0
        for rows, cut in batches:
            stop = start + rows
            while ahead and ahead[0].start < stop:
                begun.append(ahead.popleft())
            if begun:
                wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
                for span in begun:
                    ends_here = min(span.stop - start, rows)
                    wanted[span.turn].append((max(span.start - start, 0), ends_here))
                for turn, some in zip(wanted, cut(list(wanted.values())), strict=True):
                    yield Piece(turn, some, ends[turn] <= stop)
            begun = [span for span in begun if span.stop > stop]
            start = stop


def rows_in_order(
    folder: Folder, parts: Sequence[FilePart], read: Callable[[OldFile], Pieces[T]]
) -> Generator[T, None, None]:
    """Yield the rows of ``parts``, part after part, in pieces.

    Args:
        read: yields the pieces of a file's runs in the order of the file, and marks the last piece
            of each. Then it checks the rest of the file.

    Raises:
        ResumeError: ``read`` raised it.
        ValueError: parts are outside of their file, or disagree about it.
    """
    runs = _runs(parts)
    files = _old_files(folder, parts, runs)
    last_use = {name: turn for turn, (name, _) in enumerate(runs)}
    opened: dict[str, Pieces[T]] = {}
    held: dict[int, list[T]] = defaultdict(list)
    finished: set[int] = set()
    try:
        for turn, (name, _) in enumerate(runs):
            if turn not in finished and name not in opened:
                if len(opened) == _OPEN_FILES:
                    for piece in opened.pop(next(iter(opened))):
                        held[piece.turn].append(piece.rows)
                        finished.update([piece.turn] if piece.is_last else [])
                opened[name] = read(files[name])
            yield from held.pop(turn, ())
            while turn not in finished:
                piece = next(opened[name])
                finished.update([piece.turn] if piece.is_last else [])
                if piece.turn == turn:
                    yield piece.rows
                else:
                    held[piece.turn].append(piece.rows)
            if last_use[name] == turn:
                # The reader checks the rest of the file, and closes it.
                for piece in opened.pop(name, ()):
                    raise AssertionError(f"{name} has rows after its last run: {piece}")
    finally:
        for pieces in opened.values():
            pieces.close()


def _runs(parts: Sequence[FilePart]) -> list[tuple[str, list[tuple[int, int]]]]:
    """Return file and ranges of rows of each run: of parts whose order is that of their file."""
    runs: list[tuple[str, list[tuple[int, int]]]] = []
    for part in parts:
        start, stop = part.first_row, part.first_row + part.rows
        if not runs or runs[-1][0] != part.file or start < runs[-1][1][-1][1]:
            runs.append((part.file, []))
        ranges = runs[-1][1]
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return runs


def _old_files(
    folder: Folder,
    parts: Sequence[FilePart],
    runs: Sequence[tuple[str, Sequence[tuple[int, int]]]],
) -> dict[str, OldFile]:
    rows: dict[str, int] = {}
    for part in parts:
        known = rows.setdefault(part.file, part.file_rows)
        if known != part.file_rows or not 0 <= part.first_row < part.first_row + part.rows <= known:
            raise ValueError(f"{part} has no rows in a file of {known} rows")
    found: dict[str, list[Span]] = defaultdict(list)
    for turn, (name, ranges) in enumerate(runs):
        found[name] += [Span(start, stop, turn) for start, stop in ranges]
    return {
        name: OldFile(folder, name, rows[name], tuple(sorted(spans)))
        for name, spans in found.items()
    }
