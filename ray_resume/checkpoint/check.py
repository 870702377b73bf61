"""Checks a checkpoint, file by file, and reports all damage. Changes nothing.

A check needs no lease, and includes what live runs have committed up to now. A process of its own
reads the files, so that a damaged one does not keep the check from the others.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.check_report import CheckReport
from ray_resume.checkpoint.contents import SUPERSEDES, merged_headers
from ray_resume.checkpoint.dead_letters import FOLDER
from ray_resume.checkpoint.local.reader import Reading
from ray_resume.checkpoint.output_check import OutputCheck
from ray_resume.core.columns import mask_of, numbers_of, parents_of
from ray_resume.core.digests import Digests, Positions, digest_bytes, source_digest
from ray_resume.core.publications import unsettled
from ray_resume.core.record_log import RecordLog
from ray_resume.core.records import Record, records_of
from ray_resume.core.snapshot import Snapshot
from ray_resume.core.wording import SOME, counted, some_of
from ray_resume.errors import CheckpointError

__all__ = ["check"]

# A live run may replace a source's output while the check looks for it.
_LOOKS = 3


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
        output = OutputCheck(self._storage, self._checkpoint_id, self._sink, self._look, self._runs)
        files = output.check(snapshot)
        self._problems += output.problems
        self._notes += output.notes
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

    def _check_letters(self, snapshot: Snapshot) -> None:
        folder = f"{self._storage.uri}/{FOLDER}"
        listed = sorted(snapshot.dead_letters())
        there = self._storage.dead_letters().names() if listed else ()
        gone = [name for name in listed if name not in there]
        if gone:
            # The user may have moved them after dealing with their rows.
            self._notes.append(
                f"{len(gone)} of {len(listed)} dead letters are gone from {folder}: "
                f"{some_of(gone)}. If their rows are not dealt with yet, put them back, or reset "
                "their sources."
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
                f"{some_of(history.path_of(name) for name in damaged)}. Only `ray-resume runs` and "
                "reports need them. Restore them from a copy, or remove them."
            )

    def _path_of(self, run_id: str) -> Path | str:
        return next(reading.path for reading in self._look.readings if reading.run_id == run_id)

    def _report_runs(self) -> None:
        for owner in self._look.live.values():
            self._notes.append(f"At work: {owner}. The check includes its commits up to now.")
        for owner in self._look.killed.values():
            self._notes.append(f"Did not end by itself: {owner}.")


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
            if shown == SOME:
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
