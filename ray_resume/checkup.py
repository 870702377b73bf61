"""Proves a checkpoint sound, or says what is wrong with it, file by file. Changes nothing.

Needs no lease: what live runs have committed up to now is looked at with the rest. Each file is
read in a process of its own, so that no damage keeps the others from being looked at.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ray_resume.contents import merged_headers
from ray_resume.errors import CheckpointError
from ray_resume.letters import FOLDER
from ray_resume.naming import OutputName
from ray_resume.reader import Reading
from ray_resume.record import Record, State, decode, digest, precedence
from ray_resume.storage import Storage

if TYPE_CHECKING:
    from ray_resume.union import Union

__all__ = ["CheckReport", "check", "plain"]

# A live run may replace a source's output while we look for it.
_LOOKS = 3
_EXAMPLES = 3


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


def check(storage: Storage) -> CheckReport:
    """Look at everything in ``storage`` and at the files that it lists.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    for _ in range(_LOOKS):
        look = _Look(storage)
        report = look.report()
        if report.ok or look.was_quiet():
            break
    return report


class _Look:
    """One look at a checkpoint."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._problems: list[str] = []
        self._notes: list[str] = []
        self._checkpoint_id, self._sink = self._identity()
        self._look = storage.look()
        self._runs = set(self._look.live)

    def was_quiet(self) -> bool:
        """Say whether nobody was at work since the look began."""
        now = self._storage.note()
        return not self._look.live and not now.live and now.files == self._look.files

    def report(self) -> CheckReport:
        records = 0
        sound = {}
        for reading in self._look.readings:
            damage = _Damage(reading.path)
            if reading.error is not None:
                self._problems.append(str(reading.error))
                continue
            sound[reading.run_id] = self._check_writer(reading, damage)
            records += len(reading.pairs)
            self._problems += damage.told()
        from ray_resume.union import Union

        union = Union(sound)
        self._check_contradictions(union, sound)
        files = self._check_output(union)
        self._check_letters(union)
        self._say_who_is_about()
        return CheckReport(
            checkpoint=self._storage.uri,
            problems=tuple(self._problems),
            notes=tuple(self._notes),
            writers=len(self._look.readings),
            records=records,
            sources=len(union),
            files=files,
        )

    def _identity(self) -> tuple[str | None, str | None]:
        try:
            return self._storage.identity(), self._storage.sink()
        except CheckpointError as error:
            if not self._storage.writers():
                raise
            self._problems.append(str(error))
            return None, None

    def _check_writer(self, reading: Reading, damage: _Damage) -> list[tuple[bytes, bytes]]:
        """Check one writer's file, and return what of it can be read."""
        runs = {reading.run_id}
        if reading.header.get("run_id") != reading.run_id:
            damage.add(
                f"is the file of run {reading.header.get('run_id')} under another name",
                "rename it, or remove it if it is a copy",
            )
        try:
            runs |= merged_headers(reading.path, reading.header).keys()
        except CheckpointError as error:
            self._problems.append(str(error))
        self._runs |= runs
        pairs = []
        sequences: set[tuple[str, int]] = set()
        for key, value in reading.pairs:
            try:
                record = decode(value)
            except CheckpointError as error:
                damage.add(f"has a record that cannot be read ({error})")
                continue
            pairs.append((key, value))
            for fault in _faults(key, record, runs):
                damage.add(fault)
            if (record.run_id, record.sequence) in sequences:
                damage.add(f"gives the sequence number {record.sequence} twice")
            sequences.add((record.run_id, record.sequence))
        return pairs

    def _check_contradictions(
        self, union: Union, writers: dict[str, list[tuple[bytes, bytes]]]
    ) -> None:
        """Two files may say the same of a source; with the same number, it must be the same."""
        counts = dict(union.pairs())
        for reading in self._look.readings:
            damage = _Damage(reading.path)
            for key, value in writers.get(reading.run_id, ()):
                other = counts[key]
                if value != other and precedence(value) == precedence(other):
                    ours, theirs = decode(value), decode(other)
                    if ours.run_id == theirs.run_id:
                        damage.add(f"contradicts another file about {ours.source_id!r}")
            self._problems += damage.told()

    def _check_output(self, union: Union) -> int:
        """Check the listed files, and return how many there are."""
        # A file may hold several sources. That it is gone hurts those that are completed.
        ordered = sorted(union, key=lambda record: record.state is State.COMPLETED)
        listed = {file: record for record in ordered for file in record.files}
        if self._sink is None:
            if listed and self._checkpoint_id is not None:
                self._problems.append(
                    f"{self._storage.uri} lists {len(listed)} output files, but not in which "
                    "folder: its checkpoint.json is an older one. Restore it from a copy."
                )
            return len(listed)
        if not os.path.isabs(self._sink):
            if listed:
                self._notes.append(
                    f"The output is {self._sink}; whether its files are there was not looked at."
                )
            return len(listed)
        empty = [r for r in union if r.state is State.COMPLETED and r.rows and not r.files]
        if empty:
            self._problems.append(
                f"{len(empty)} completed sources have rows, but list no file: "
                f"{_some(r.source_id for r in empty)}. Process them again: {self._reset(empty)}."
            )
        try:
            sizes = dict(_files_in(self._sink, apart_from=self._storage.root))
        except OSError as error:
            self._problems.append(f"The output folder {self._sink} cannot be read: {error}.")
            return len(listed)
        self._check_listed(listed, sizes)
        # What an unreadable file lists, and which runs it stands for, nobody knows.
        if all(reading.error is None for reading in self._look.readings):
            self._check_unlisted(listed, sizes)
        return len(listed)

    def _check_listed(self, listed: dict[str, Record], sizes: dict[str, int]) -> None:
        # Several sources may share a file; any of them is told.
        gone = {file: record for file, record in listed.items() if not sizes.get(file)}
        lost = [file for file, record in gone.items() if record.state is State.COMPLETED]
        if lost:
            empty = sum(file in sizes for file in lost)
            sources = list({gone[file].source_id: gone[file] for file in lost}.values())
            self._problems.append(
                f"{len(lost)} output files of {len(sources)} completed sources are gone from "
                f"{self._sink}{f' or empty ({empty})' if empty else ''}: {_some(lost)}. Put them "
                f"back, or process the sources again: {self._reset(sources)}."
            )
        if len(gone) > len(lost):
            self._notes.append(
                f"{len(gone) - len(lost)} earlier output files of sources that failed or were "
                f"reset are gone from {self._sink}. New ones take their place."
            )

    def _check_letters(self, union: Union) -> None:
        folder = f"{self._storage.uri}/{FOLDER}"
        listed = sorted(name for record in union for name in record.dead_letters)
        there = self._storage.letters().names() if listed else ()
        gone = [name for name in listed if name not in there]
        if gone:
            # Whoever has dealt with them may have moved them; nobody else knows their rows.
            self._notes.append(
                f"{len(gone)} of {len(listed)} dead letters are gone from {folder}: {_some(gone)}. "
                "If nobody has dealt with their rows, put them back, or reset their sources."
            )

    def _check_unlisted(self, listed: dict[str, Record], sizes: dict[str, int]) -> None:
        left_over: list[str] = []
        unknown: list[str] = []
        for name in sizes.keys() - listed.keys():
            parsed = OutputName.parse(name)
            if parsed is None or parsed.checkpoint != self._checkpoint_id:
                continue
            if parsed.run_id not in self._runs:
                unknown.append(name)
            elif parsed.run_id not in self._look.live:
                left_over.append(name)
        if unknown:
            self._problems.append(
                f"{len(unknown)} files in {self._sink} are of runs that the checkpoint does not "
                f"know: {_some(sorted(unknown))}. An .mdb file was removed, or an older copy was "
                "restored. Put the .mdb files back, or remove those files too."
            )
        if left_over:
            self._notes.append(
                f"{len(left_over)} files in {self._sink} are left-overs of runs that crashed, "
                f"{sum(sizes[name] for name in left_over)} bytes. The next run removes them when "
                "it ends. Checkpoint.files() lists what counts."
            )

    def _say_who_is_about(self) -> None:
        for owner in self._look.live.values():
            self._notes.append(f"At work: {owner}. What it has committed up to now was checked.")
        for owner in self._look.killed.values():
            self._notes.append(f"Did not end by itself: {owner}.")

    def _reset(self, records: list[Record]) -> str:
        path = self._storage.uri
        if len(records) > _EXAMPLES:
            return f"Checkpoint({path!r}).reset([...]), or reset(state='completed') for all"
        return f"Checkpoint({path!r}).reset({[record.source_id for record in records]!r})"


class _Damage:
    """What is wrong with one file: a few of each kind would fill a screen."""

    def __init__(self, path: Path | str) -> None:
        self._path = path
        self._faults: Counter[tuple[str, str]] = Counter()

    def add(self, fault: str, way_out: str = "restore it from a copy") -> None:
        self._faults[fault, way_out] += 1

    def told(self) -> Iterator[str]:
        total = sum(self._faults.values())
        for shown, (fault, way_out) in enumerate(self._faults):
            if shown == _EXAMPLES:
                yield f"{self._path} has {total - shown} more faults."
                return
            yield f"{self._path} {fault}. It is damaged: {way_out}."


def _faults(key: bytes, record: Record, runs: set[str]) -> Iterator[str]:
    source = repr(record.source_id)
    if digest(record.source_id) != key:
        yield f"has the record of {source} under another source's key"
    if record.run_id not in runs:
        yield f"has a record of run {record.run_id}, which did not write it ({source})"
    if record.sequence < 1 or record.rows < 0 or record.failed_runs < 0:
        yield f"has a record with impossible numbers ({source})"
    for file in record.files:
        if os.path.isabs(file) or ".." in file.split("/"):
            yield f"lists {file!r} for {source}, which is outside of the output folder"


def _files_in(folder: str, *, apart_from: str) -> Iterator[tuple[str, int]]:
    """Yield the path, relative to ``folder``, and the size in bytes of each file under it."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            entries = list(os.scandir(os.path.join(folder, prefix)))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in entries:
            name = f"{prefix}{entry.name}"
            try:
                if not entry.is_dir():
                    yield name, entry.stat().st_size
                elif entry.path != apart_from:
                    pending.append(f"{name}/")
            except FileNotFoundError:
                continue  # A live run has just renamed or removed it.


def _some(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _EXAMPLES} more" if len(every) > _EXAMPLES else ""
    return ", ".join(every[:_EXAMPLES]) + more
