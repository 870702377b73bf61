"""The segments and fences of all runs in a storage that hosts share: listed, read, fenced.

Invariant: a run is fenced before another process relies on what it published.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ray_resume.checkpoint.contents import MERGED, merged_headers
from ray_resume.checkpoint.local.reader import Reading
from ray_resume.checkpoint.objects import Objects
from ray_resume.checkpoint.shared.segments import (
    counted_segments,
    decode,
    encode,
    fence_name,
    full_name,
    is_fence,
    last_number,
)
from ray_resume.core.record_log import RecordLog
from ray_resume.errors import CheckpointError

__all__ = ["RUN_ID", "PublishedRuns", "without_merged"]

RUN_ID = re.compile(r"[0-9a-f]{12}")


class PublishedRuns:
    """The segments that runs have published below ``runs/``."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def names(self) -> dict[str, list[str]]:
        """List the segments and fences of each run."""
        runs: dict[str, list[str]] = {}
        for name in sorted(self._objects.list("runs")):
            _, run_id, *rest = name.split("/")
            if RUN_ID.fullmatch(run_id) and len(rest) == 1:
                runs.setdefault(run_id, []).append(rest[0])
        return runs

    def read(self, runs: Mapping[str, list[str]]) -> list[Reading]:
        """Read what counts of each run; a reading that failed holds its error."""
        wanted: dict[str, list[str]] = {}
        readings: list[Reading] = []
        for run_id, names in sorted(runs.items()):
            try:
                if counted := counted_segments(names):
                    wanted[run_id] = counted
            except CheckpointError as error:
                readings.append(self._damaged(run_id, self._unreadable(run_id, error)))
        objects = self._objects.get_all(
            [f"runs/{run_id}/{name}" for run_id, names in wanted.items() for name in names]
        )
        for run_id, counted in wanted.items():
            # The names come first: the zip must not take the next run's first object.
            readings.append(self._reading(run_id, zip(counted, objects, strict=False)))
        return sorted(readings, key=lambda reading: reading.run_id)

    def _reading(self, run_id: str, segments: Iterable[tuple[str, bytes | None]]) -> Reading:
        header: dict[str, Any] = {}
        log = RecordLog()
        damage: CheckpointError | None = None
        for name, data in segments:
            try:
                if data is None:
                    raise CheckpointError("it is gone")
                found, blocks = decode(data)
                for block in blocks:
                    log.append(block)
                header = header or found
            except CheckpointError as error:
                damage = damage or self._unreadable(f"{run_id}/{name}", error)
        if damage is not None:
            return self._damaged(run_id, damage, header)
        return Reading(run_id, self.folder(run_id), header, log)

    def _damaged(
        self, run_id: str, error: CheckpointError, header: Mapping[str, Any] | None = None
    ) -> Reading:
        return Reading(run_id, self.folder(run_id), header or {}, RecordLog(), error)

    def folder(self, run_id: str) -> str:
        """Return the folder of a run, for messages."""
        return f"{self._objects.uri}/runs/{run_id}"

    def write_whole(
        self, run_id: str, header: Mapping[str, Any], blocks: Iterable[bytes]
    ) -> Reading:
        """Publish one segment with all records of a run, and read it back."""
        name = full_name(1)
        self._objects.put(f"runs/{run_id}/{name}", encode({**header, "run_id": run_id}, blocks))
        (reading,) = self.read({run_id: [name]})
        return reading

    def fence(self, run_ids: Iterable[str], *, by: str) -> None:
        """Make what dead runs may still publish count for no run."""
        names = self.names()
        for run_id in run_ids:
            self._fence(run_id, by, last_number(names.get(run_id, ())))

    def fence_own(self, run_id: str) -> None:
        """Make what this run still has under way count for no run, now that its ledger is closed.

        Its ledger's last request may be under way although the process is gone, or has given up.
        """
        names = [name.rpartition("/")[2] for name in self._objects.list(f"runs/{run_id}")]
        last = last_number(names)
        if last and not any(map(is_fence, names)):
            self._fence(run_id, run_id, last)

    def is_fenced(self, run_id: str) -> bool:
        """Say whether there is a fence for a run."""
        return any(
            is_fence(name.rpartition("/")[2]) for name in self._objects.list(f"runs/{run_id}")
        )

    def _fence(self, run_id: str, by: str, last: int) -> None:
        self._objects.put(f"runs/{run_id}/{fence_name(by, last)}", b"")

    def remove(self, run_id: str, names: Iterable[str]) -> None:
        """Remove segments and fences of a run. Its records are in a merged file."""
        self._objects.delete(f"runs/{run_id}/{name}" for name in names)

    def _unreadable(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"The checkpoint file {self._objects.uri}/runs/{name} cannot be read: {error}. If it "
            "is damaged, restore it from a copy, or start over with an empty checkpoint and an "
            "empty output folder."
        )


def without_merged(readings: Iterable[Reading]) -> tuple[Reading, ...]:
    """Leave out the runs that a merged file stands for: half of their segments may be removed."""
    every = tuple(readings)
    merged: set[str] = set()
    for reading in every:
        if reading.error is None and MERGED in reading.header:
            merged |= merged_headers(reading.path, reading.header).keys()
    return tuple(reading for reading in every if reading.run_id not in merged)
