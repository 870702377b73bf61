"""Checks the output files that a checkpoint lists, if they are in a folder of this host."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator

import numpy as np

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.contents import Contents
from ray_resume.checkpoint.output_listing import files_in
from ray_resume.core.file_uses import file_uses, overlapping_files
from ray_resume.core.output_files import OutputFileSet, listed_files, missing_files
from ray_resume.core.record_log import Flag
from ray_resume.core.records import State
from ray_resume.core.snapshot import Snapshot
from ray_resume.core.wording import SOME, some_of

__all__ = ["OutputCheck"]


class OutputCheck:
    """A check of the output that a checkpoint lists.

    Args:
        checkpoint_id: its id, None if its identity is damaged.
        sink: where its output is, None if that is not on record.
        contents: what is on record, and which runs are at work.
        runs: all runs that the checkpoint knows.

    Attributes:
        problems: what is wrong, and what to do about each.
        notes: what is worth knowing, and harms nothing.
    """

    def __init__(
        self,
        storage: CheckpointBackend,
        checkpoint_id: str | None,
        sink: str | None,
        contents: Contents,
        runs: Collection[str],
    ) -> None:
        self._storage = storage
        self._checkpoint_id = checkpoint_id
        self._sink = sink
        self._contents = contents
        self._runs = frozenset(runs)
        self.problems: list[str] = []
        self.notes: list[str] = []

    def check(self, snapshot: Snapshot) -> int:
        """Check the listed files, and return how many there are."""
        listed = listed_files(snapshot)
        if self._sink is None:
            if listed and self._checkpoint_id is not None:
                self.problems.append(
                    f"{self._storage.uri} lists {len(listed)} output files, but does not name "
                    "their folder: its sink.json is missing. Restore it from a copy."
                )
            return len(listed)
        if not os.path.isabs(self._sink):
            if listed:
                self.notes.append(
                    f"The output is {self._sink}. The check did not look for its files."
                )
            return len(listed)
        self._check_rows_have_files(snapshot)
        self._check_parts(snapshot)
        empty: set[str] = set()
        try:
            there = OutputFileSet.of(self._files_there(empty))
        except OSError as error:
            self.problems.append(f"The output folder {self._sink} cannot be read: {error}.")
            return len(listed)
        self._check_listed(snapshot, there, empty)
        # An unreadable file may list any of these files, and may be of any run.
        if all(reading.error is None for reading in self._contents.readings):
            self._check_unlisted(there.without(listed))
        return len(listed)

    def _check_rows_have_files(self, snapshot: Snapshot) -> None:
        rows = snapshot.in_state(State.COMPLETED) & (snapshot.column("rows") != 0)
        rows &= snapshot.column("flags") & Flag.FILES == 0
        empty = [record.source_id for record in snapshot.records(np.flatnonzero(rows))]
        if empty:
            self.problems.append(
                f"{len(empty)} completed sources have rows, but list no file: {some_of(empty)}. "
                f"Process them again: {self._reset(empty)}."
            )

    def _check_parts(self, snapshot: Snapshot) -> None:
        overlapping = overlapping_files(snapshot)
        if overlapping:
            self.problems.append(
                f"{len(overlapping)} output files have rows that are on record twice: "
                f"{some_of(overlapping)}. Restore the .mdb files from a copy, or process the "
                f"sources in these files again: Checkpoint({self._storage.uri!r}).reset([...])."
            )
        unclean = [file for file, use in file_uses(snapshot).items() if not use.is_clean]
        if unclean:
            self.notes.append(
                f"{len(unclean)} output files also have rows that do not count: "
                f"{some_of(unclean)}. The next run rewrites them when it ends, or "
                "`ray-resume tidy` does."
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
            self.problems.append(
                f"{len(lost)} output files of {len(sources)} completed sources are gone from "
                f"{self._sink}{f' or empty ({in_vain})' if in_vain else ''}: {some_of(lost)}. Put "
                f"them back, or process the sources again: {self._reset(sources)}."
            )
        others = dict(missing_files(snapshot.records(np.flatnonzero(~completed)), filled))
        if others.keys() - lost.keys():
            self.notes.append(
                f"{len(others.keys() - lost.keys())} earlier output files of sources that failed "
                f"or were reset are gone from {self._sink}. New ones take their place."
            )

    def _check_unlisted(self, unlisted: OutputFileSet) -> None:
        if self._checkpoint_id is None:
            return
        unknown = sorted(unlisted.made_by(self._checkpoint_id, self._runs, known=False))
        if unknown:
            self.problems.append(
                f"{len(unknown)} files in {self._sink} are of runs that the checkpoint does not "
                f"know: {some_of(unknown)}. An .mdb file was removed, or an older copy was "
                "restored. Put the .mdb files back, or remove those files too."
            )
        over = self._runs - self._contents.live.keys()
        left_over = unlisted.made_by(self._checkpoint_id, over, known=True)
        if left_over:
            self.notes.append(
                f"{len(left_over)} files in {self._sink} are leftovers of runs that crashed, "
                f"{sum(map(self._size, left_over))} bytes. The next run removes them when it ends. "
                "Checkpoint.files() lists the files that count."
            )

    def _size(self, name: str) -> int:
        with contextlib.suppress(OSError):
            return os.stat(f"{self._sink}/{name}").st_size
        return 0

    def _reset(self, source_ids: list[str]) -> str:
        path = self._storage.uri
        if len(source_ids) > SOME:
            return f"Checkpoint({path!r}).reset([...]), or reset(state='completed') for all"
        return f"Checkpoint({path!r}).reset({source_ids!r})"
