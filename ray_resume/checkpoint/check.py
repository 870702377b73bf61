"""Proves a checkpoint sound, or says what is wrong with it, file by file. Changes nothing.

Needs no lease: what live runs have committed up to now is looked at with the rest. Each file is
read in a process of its own, so that no damage keeps the others from being looked at.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.contents import merged_headers
from ray_resume.checkpoint.dead_letters import FOLDER
from ray_resume.checkpoint.local.reader import Reading
from ray_resume.checkpoint.report import CheckReport
from ray_resume.core.digests import source_digest
from ray_resume.core.output_files import OutputFileSet, listed_files, missing_files
from ray_resume.core.records import Flag, Record, State
from ray_resume.core.snapshot import Union
from ray_resume.core.table import Table
from ray_resume.errors import CheckpointError

__all__ = ["check"]

# A live run may replace a source's output while we look for it.
_LOOKS = 3
_EXAMPLES = 3


def check(storage: CheckpointBackend) -> CheckReport:
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

    def __init__(self, storage: CheckpointBackend) -> None:
        self._storage = storage
        self._problems: list[str] = []
        self._notes: list[str] = []
        self._checkpoint_id, self._sink = self._identity()
        self._look = storage.scan()
        self._runs = set(self._look.live)

    def was_quiet(self) -> bool:
        """Say whether nobody was at work since the look began."""
        now = self._storage.list_runs()
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

    def _check_writer(self, reading: Reading, damage: _Damage) -> Table:
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
        table = reading.pairs
        unreadable: list[int] = []
        can_be = table.can_be()
        sequences: set[tuple[str, int]] = set()
        for row in table.doubtful(runs).tolist():
            try:
                record = table.record(row)
                if not can_be[row]:
                    raise CheckpointError("its parts do not fit")
            except CheckpointError as error:
                damage.add(f"has a record that cannot be read ({error})")
                unreadable.append(row)
                continue
            for fault in _faults(table.digests[row], record, runs):
                damage.add(fault)
            if (record.run_id, record.sequence) in sequences:
                damage.add(f"gives the sequence number {record.sequence} twice")
            sequences.add((record.run_id, record.sequence))
        if not unreadable:
            return table
        rest = set(range(len(table))).difference(unreadable)
        return table.take(np.array(sorted(rest), np.int64))

    def _check_contradictions(self, union: Union, writers: dict[str, Table]) -> None:
        """Two files may say the same of a source; with the same number, it must be the same."""
        if sum(map(len, writers.values())) == len(union):
            return
        for reading in self._look.readings:
            damage = _Damage(reading.path)
            table = writers.get(reading.run_id, reading.pairs)
            rows = union.find(table.digests)
            same = table.heads["sequence"] == union.column("sequence", rows)
            ours, theirs = table.take(np.flatnonzero(same)), union.table(rows[same])
            for row in ours.unlike(theirs).tolist():
                one, other = ours.record(row), theirs.record(row)
                if one.run_id == other.run_id:
                    damage.add(f"contradicts another file about {one.source_id!r}")
            self._problems += damage.told()

    def _check_output(self, union: Union) -> int:
        """Check the listed files, and return how many there are."""
        listed = listed_files(union)
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
        self._check_rows_have_files(union)
        empty: set[str] = set()
        try:
            there = OutputFileSet.of(self._files_there(empty))
        except OSError as error:
            self._problems.append(f"The output folder {self._sink} cannot be read: {error}.")
            return len(listed)
        self._check_listed(union, there, empty)
        # What an unreadable file lists, and which runs it stands for, nobody knows.
        if all(reading.error is None for reading in self._look.readings):
            self._check_unlisted(there.without(listed))
        return len(listed)

    def _check_rows_have_files(self, union: Union) -> None:
        rows = union.in_state(State.COMPLETED) & (union.column("rows") != 0)
        rows &= union.column("flags") & Flag.FILE == 0
        empty = [r.source_id for r in union.records(np.flatnonzero(rows)) if not r.files]
        if empty:
            self._problems.append(
                f"{len(empty)} completed sources have rows, but list no file: {_some(empty)}. "
                f"Process them again: {self._reset(empty)}."
            )

    def _files_there(self, empty: set[str]) -> Iterator[str]:
        """List the output folder, and note which files are ``empty``."""
        assert self._sink is not None
        for name, size in _files_in(self._sink, apart_from=self._storage.root):
            if not size:
                empty.add(name)
            yield name

    def _check_listed(self, union: Union, there: OutputFileSet, empty: set[str]) -> None:
        filled = there.without(OutputFileSet.of(empty)) if empty else there
        completed = union.in_state(State.COMPLETED)
        # Several sources may share a file; any of them is told. That it is gone hurts those that
        # are completed.
        lost = dict(missing_files(union.records(np.flatnonzero(completed)), filled))
        if lost:
            in_vain = len(empty & lost.keys())
            sources = list(dict.fromkeys(lost.values()))
            self._problems.append(
                f"{len(lost)} output files of {len(sources)} completed sources are gone from "
                f"{self._sink}{f' or empty ({in_vain})' if in_vain else ''}: {_some(lost)}. Put "
                f"them back, or process the sources again: {self._reset(sources)}."
            )
        others = dict(missing_files(union.records(np.flatnonzero(~completed)), filled))
        if others.keys() - lost.keys():
            self._notes.append(
                f"{len(others.keys() - lost.keys())} earlier output files of sources that failed "
                f"or were reset are gone from {self._sink}. New ones take their place."
            )

    def _check_letters(self, union: Union) -> None:
        folder = f"{self._storage.uri}/{FOLDER}"
        # Dead letters stand in what the head of a record has no room for.
        records = union.records(union.flagged(Flag.MORE))
        listed = sorted(name for record in records for name in record.dead_letters)
        there = self._storage.dead_letters().names() if listed else ()
        gone = [name for name in listed if name not in there]
        if gone:
            # Whoever has dealt with them may have moved them; nobody else knows their rows.
            self._notes.append(
                f"{len(gone)} of {len(listed)} dead letters are gone from {folder}: {_some(gone)}. "
                "If nobody has dealt with their rows, put them back, or reset their sources."
            )

    def _check_unlisted(self, unlisted: OutputFileSet) -> None:
        if self._checkpoint_id is None:
            return
        unknown = sorted(unlisted.made_by(self._checkpoint_id, self._runs, known=False))
        if unknown:
            self._problems.append(
                f"{len(unknown)} files in {self._sink} are of runs that the checkpoint does not "
                f"know: {_some(unknown)}. An .mdb file was removed, or an older copy was "
                "restored. Put the .mdb files back, or remove those files too."
            )
        over = self._runs - self._look.live.keys()
        left_over = unlisted.made_by(self._checkpoint_id, over, known=True)
        if left_over:
            self._notes.append(
                f"{len(left_over)} files in {self._sink} are left-overs of runs that crashed, "
                f"{sum(map(self._size, left_over))} bytes. The next run removes them when "
                "it ends. Checkpoint.files() lists what counts."
            )

    def _size(self, name: str) -> int:
        with contextlib.suppress(OSError):
            return os.stat(f"{self._sink}/{name}").st_size
        return 0

    def _say_who_is_about(self) -> None:
        for owner in self._look.live.values():
            self._notes.append(f"At work: {owner}. What it has committed up to now was checked.")
        for owner in self._look.killed.values():
            self._notes.append(f"Did not end by itself: {owner}.")

    def _reset(self, source_ids: list[str]) -> str:
        path = self._storage.uri
        if len(source_ids) > _EXAMPLES:
            return f"Checkpoint({path!r}).reset([...]), or reset(state='completed') for all"
        return f"Checkpoint({path!r}).reset({source_ids!r})"


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
    if source_digest(record.source_id) != key:
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
