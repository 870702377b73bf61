"""Checks a checkpoint, file by file, and reports all damage. Changes nothing.

A check needs no lease, and includes what live runs have committed up to now. A process of its own
reads the files, so that a damaged one does not keep the check from the others.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.check_report import CheckReport
from ray_resume.checkpoint.contents import SUPERSEDES, merged_headers
from ray_resume.checkpoint.dead_letters import FOLDER
from ray_resume.checkpoint.local.reader import Reading
from ray_resume.checkpoint.output_listing import files_in
from ray_resume.core.columns import mask_of, numbers_of, parents_of
from ray_resume.core.digests import Digests, Positions, digest_bytes, source_digest
from ray_resume.core.file_uses import file_uses, overlapping_files
from ray_resume.core.output_files import OutputFileSet, listed_files, missing_files
from ray_resume.core.publications import unsettled
from ray_resume.core.record_log import Flag, RecordLog
from ray_resume.core.records import Record, State, records_of
from ray_resume.core.snapshot import Snapshot
from ray_resume.core.wording import counted
from ray_resume.errors import CheckpointError

__all__ = ["check"]

# A live run may replace a source's output while the check looks for it.
_LOOKS = 3

_EXAMPLES = 3


def check(storage: CheckpointBackend) -> CheckReport:
    """Check everything in ``storage``, and the output files that it lists.

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
        """Return whether no run was at work since the look began."""
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
            self._check_writer(reading, damage)
            sound[reading.run_id] = reading.records
            records += len(reading.records)
            self._problems += damage.messages()
        snapshot = Snapshot(sound)
        self._check_contradictions(snapshot, sound)
        files = self._check_output(snapshot)
        self._check_letters(snapshot)
        self._check_publications(snapshot)
        self._check_history()
        self._report_runs()
        return CheckReport(
            checkpoint=self._storage.uri,
            problems=tuple(self._problems),
            notes=tuple(self._notes),
            writers=len(self._look.readings),
            records=records,
            sources=len(snapshot),
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

    def _check_writer(self, reading: Reading, damage: _Damage) -> None:
        """Check one writer's file."""
        runs = {reading.run_id}
        if reading.header.get("run_id") != reading.run_id:
            damage.add(
                f"is the file of run {reading.header.get('run_id')} under another name",
                "rename it, or remove it if it is a copy",
            )
        merged: Mapping[str, Mapping[str, Any]] = {}
        try:
            merged = merged_headers(reading.path, reading.header)
            runs |= merged.keys()
        except CheckpointError as error:
            self._problems.append(str(error))
        self._runs |= runs
        for header in (reading.header, *merged.values()):
            runs |= {run for run in header.get(SUPERSEDES, ()) if isinstance(run, str)}
        log = reading.records
        sequences: set[tuple[str, int]] = set()
        doubtful = _doubtful(log, runs)
        for _, batch in log.batches(doubtful):
            keys = batch.column("digest").to_pylist()
            for key, record in zip(keys, records_of(batch), strict=True):
                for fault in _faults(key, record, runs):
                    damage.add(fault)
                if (record.run_id, record.sequence) in sequences:
                    damage.add(f"gives the sequence number {record.sequence} twice")
                sequences.add((record.run_id, record.sequence))

    def _check_contradictions(self, snapshot: Snapshot, logs: dict[str, RecordLog]) -> None:
        """Check that two files with a record of the same source and number have the same record."""
        several = Digests.joined(log.digests for log in logs.values()).duplicates()
        start = 0
        for run_id, log in logs.items():
            here = several[(several >= start) & (several < start + len(log))] - start
            start += len(log)
            rows = snapshot.find(log.digests.take(here))
            same = log.column("sequence")[here] == snapshot.column("sequence", rows)
            ours = (r for _, batch in log.batches(here[same]) for r in records_of(batch))
            damage = _Damage(self._path_of(run_id))
            for one, other in zip(ours, snapshot.records(rows[same]), strict=True):
                if one != other and one.run_id == other.run_id:
                    damage.add(f"contradicts another file about {one.source_id!r}")
            self._problems += damage.messages()

    def _check_output(self, snapshot: Snapshot) -> int:
        """Check the listed files, and return how many there are."""
        listed = listed_files(snapshot)
        if self._sink is None:
            if listed and self._checkpoint_id is not None:
                self._problems.append(
                    f"{self._storage.uri} lists {len(listed)} output files, but does not name "
                    "their folder: its sink.json is missing. Restore it from a copy."
                )
            return len(listed)
        if not os.path.isabs(self._sink):
            if listed:
                self._notes.append(
                    f"The output is {self._sink}. The check did not look for its files."
                )
            return len(listed)
        self._check_rows_have_files(snapshot)
        self._check_parts(snapshot)
        empty: set[str] = set()
        try:
            there = OutputFileSet.of(self._files_there(empty))
        except OSError as error:
            self._problems.append(f"The output folder {self._sink} cannot be read: {error}.")
            return len(listed)
        self._check_listed(snapshot, there, empty)
        # An unreadable file may list any of these files, and may be of any run.
        if all(reading.error is None for reading in self._look.readings):
            self._check_unlisted(there.without(listed))
        return len(listed)

    def _check_rows_have_files(self, snapshot: Snapshot) -> None:
        rows = snapshot.in_state(State.COMPLETED) & (snapshot.column("rows") != 0)
        rows &= snapshot.column("flags") & Flag.FILES == 0
        empty = [record.source_id for record in snapshot.records(np.flatnonzero(rows))]
        if empty:
            self._problems.append(
                f"{len(empty)} completed sources have rows, but list no file: {_some(empty)}. "
                f"Process them again: {self._reset(empty)}."
            )

    def _check_parts(self, snapshot: Snapshot) -> None:
        overlapping = overlapping_files(snapshot)
        if overlapping:
            self._problems.append(
                f"{len(overlapping)} output files have rows that are on record twice: "
                f"{_some(overlapping)}. Restore the .mdb files from a copy, or process the sources "
                f"in these files again: Checkpoint({self._storage.uri!r}).reset([...])."
            )
        unclean = [file for file, use in file_uses(snapshot).items() if not use.is_clean]
        if unclean:
            self._notes.append(
                f"{len(unclean)} output files also have rows that do not count: {_some(unclean)}. "
                "The next run rewrites them when it ends, or `ray-resume tidy` does."
            )

    def _files_there(self, empty: set[str]) -> Iterator[str]:
        """List the output folder, and note which files are ``empty``."""
        assert self._sink is not None
        for name, size in files_in(self._sink, apart_from=self._storage.root):
            if not size:
                empty.add(name)
            yield name

    def _check_listed(self, snapshot: Snapshot, there: OutputFileSet, empty: set[str]) -> None:
        filled = there.without(OutputFileSet.of(empty)) if empty else there
        completed = snapshot.in_state(State.COMPLETED)
        # Several sources may share a file; the message names any of them. A missing file matters
        # if one of them is completed.
        pairs = list(missing_files(snapshot.records(np.flatnonzero(completed)), filled))
        lost = dict(pairs)
        if lost:
            in_vain = len(empty & lost.keys())
            sources = list(dict.fromkeys(source_id for _, source_id in pairs))
            self._problems.append(
                f"{len(lost)} output files of {len(sources)} completed sources are gone from "
                f"{self._sink}{f' or empty ({in_vain})' if in_vain else ''}: {_some(lost)}. Put "
                f"them back, or process the sources again: {self._reset(sources)}."
            )
        others = dict(missing_files(snapshot.records(np.flatnonzero(~completed)), filled))
        if others.keys() - lost.keys():
            self._notes.append(
                f"{len(others.keys() - lost.keys())} earlier output files of sources that failed "
                f"or were reset are gone from {self._sink}. New ones take their place."
            )

    def _check_letters(self, snapshot: Snapshot) -> None:
        folder = f"{self._storage.uri}/{FOLDER}"
        listed = sorted(snapshot.dead_letters())
        there = self._storage.dead_letters().names() if listed else ()
        gone = [name for name in listed if name not in there]
        if gone:
            # The user may have moved them after dealing with their rows.
            self._notes.append(
                f"{len(gone)} of {len(listed)} dead letters are gone from {folder}: {_some(gone)}. "
                "If their rows are not dealt with yet, put them back, or reset their sources."
            )

    def _check_publications(self, snapshot: Snapshot) -> None:
        store = self._storage.publications()
        sources = 0
        for name, run_id in store.names().items():
            if run_id in self._look.live:
                continue
            try:
                publication = store.read(name)
            except CheckpointError as error:
                self._problems.append(str(error))
                continue
            sources += len(unsettled(publication, snapshot)) if publication is not None else 0
        if sources:
            self._notes.append(
                f"A run died while it published {counted(sources, 'source')} to {self._sink}. The "
                "next run asks the table whether it has their rows, and goes on from there."
            )

    def _check_history(self) -> None:
        history = self._storage.history()
        damaged = history.damaged()
        if damaged:
            self._notes.append(
                f"{counted(len(damaged), 'file')} of the history of runs cannot be read: "
                f"{_some(history.path_of(name) for name in damaged)}. Only `ray-resume runs` and "
                "reports need them. Restore them from a copy, or remove them."
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
                f"{len(left_over)} files in {self._sink} are leftovers of runs that crashed, "
                f"{sum(map(self._size, left_over))} bytes. The next run removes them when it ends. "
                "Checkpoint.files() lists the files that count."
            )

    def _path_of(self, run_id: str) -> Path | str:
        return next(reading.path for reading in self._look.readings if reading.run_id == run_id)

    def _size(self, name: str) -> int:
        with contextlib.suppress(OSError):
            return os.stat(f"{self._sink}/{name}").st_size
        return 0

    def _report_runs(self) -> None:
        for owner in self._look.live.values():
            self._notes.append(f"At work: {owner}. The check includes its commits up to now.")
        for owner in self._look.killed.values():
            self._notes.append(f"Did not end by itself: {owner}.")

    def _reset(self, source_ids: list[str]) -> str:
        path = self._storage.uri
        if len(source_ids) > _EXAMPLES:
            return f"Checkpoint({path!r}).reset([...]), or reset(state='completed') for all"
        return f"Checkpoint({path!r}).reset({source_ids!r})"


class _Damage:
    """The faults of one file; messages name a few of them, since all would fill a screen."""

    def __init__(self, path: Path | str) -> None:
        self._path = path
        self._faults: Counter[tuple[str, str]] = Counter()

    def add(self, fault: str, way_out: str = "restore it from a copy") -> None:
        self._faults[fault, way_out] += 1

    def messages(self) -> Iterator[str]:
        """Yield a message for each of the first faults, and one for the rest."""
        total = sum(self._faults.values())
        for shown, (fault, way_out) in enumerate(self._faults):
            if shown == _EXAMPLES:
                yield f"{self._path} has {total - shown} more faults."
                return
            yield f"{self._path} {fault}. It is damaged: {way_out}."


def _doubtful(log: RecordLog, runs: set[str]) -> Positions:
    """Return the rows of the records that are to be checked one by one.

    Columns prove nearly all records sound, without an object for each.
    """
    sequence, run = log.column("sequence"), log.column("run")
    known = np.array([run_id in runs for run_id in log.runs], bool)
    sound = known[run] & (sequence > 0) & (log.column("rows") >= 0)
    order = np.lexsort((sequence, run))
    twice = (np.diff(sequence[order]) == 0) & (np.diff(run[order]) == 0)
    sound[order[1:][twice]] = sound[order[:-1][twice]] = False
    for start, batch in log.batches():
        here = sound[start : start + len(batch)]
        here &= numbers_of(batch.column("failed_runs"), "i8") >= 0
        ids = batch.column("source_id").to_pylist()
        keys = batch.column("digest").to_pylist()
        here &= [digest_bytes(source) == key for source, key in zip(ids, keys, strict=True)]
        files = batch.column("files")
        outside = pc.match_substring_regex(files.flatten(), r"^/|\.\.")
        here[parents_of(files)[mask_of(outside)]] = False
    return np.flatnonzero(~sound)


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


def _some(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _EXAMPLES} more" if len(every) > _EXAMPLES else ""
    return ", ".join(every[:_EXAMPLES]) + more
