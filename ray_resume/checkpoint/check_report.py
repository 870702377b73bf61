"""The report of `check`, and text that is safe to print on a terminal."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from ray_resume.core.wording import counted

__all__ = ["CheckReport", "plain"]


def plain(text: str) -> str:
    """Return ``text`` with an escape for each character that would break a line or a terminal."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


@dataclass(frozen=True)
class CheckReport:
    """The result of :meth:`Checkpoint.check`. It is true if the checkpoint is sound.

    Attributes:
        checkpoint: its path.
        problems: each damage, and what to do about it; empty if the checkpoint is sound.
        notes: other facts that are good to know.
        writers: writers' files that were read.
        records: records in them.
        sources: sources that have a record.
        files: output files that are listed.
    """

    checkpoint: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    writers: int
    records: int
    sources: int
    files: int

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    @override
    def __str__(self) -> str:
        writers_file = "writer's file" if self.writers == 1 else "writers' file"
        looked_at = (
            f"{counted(self.writers, writers_file)}, {counted(self.records, 'record')}, "
            f"{counted(self.sources, 'source')}, {counted(self.files, 'output file')}"
        )
        if self.ok:
            lines = [f"The checkpoint {self.checkpoint} is sound ({looked_at})."]
        else:
            lines = [f"The checkpoint {self.checkpoint} is damaged ({looked_at}):"]
        lines += [f"- {plain(problem)}" for problem in self.problems]
        lines += [f"Note: {plain(note)}" for note in self.notes]
        return "\n".join(lines)
