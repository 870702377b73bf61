"""What `check` found, for people; and how anything is spelt on a terminal."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

__all__ = ["CheckReport", "plain"]


def plain(text: str) -> str:
    """Spell what would break a line, or a terminal, as an escape."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


@dataclass(frozen=True)
class CheckReport:
    """What :meth:`Checkpoint.check` found: true if the checkpoint is sound, ``str()`` for people.

    Attributes:
        checkpoint: its path.
        problems: what is damaged and what to do, a sentence or two each; empty if it is sound.
        notes: what is no damage, but good to know.
        writers: writers' files that were looked at.
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
        looked_at = (
            f"writers' files: {self.writers}, records: {self.records}, sources: {self.sources}, "
            f"output files: {self.files}"
        )
        if self.ok:
            lines = [f"The checkpoint {self.checkpoint} is sound ({looked_at})."]
        else:
            lines = [f"The checkpoint {self.checkpoint} is damaged ({looked_at}):"]
        lines += [f"- {plain(problem)}" for problem in self.problems]
        lines += [f"Note: {plain(note)}" for note in self.notes]
        return "\n".join(lines)
