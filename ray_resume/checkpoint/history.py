"""The history of a checkpoint: a record of each run, also of those that were killed.

::

    history/<run>.start    put when the run has its lease: who runs, where, since when, what
    history/<run>.alive    replaced every few seconds by the ledger's process: how far the run is
    history/<run>.end      put before the run gives its lease back: how it ended, and the counts
    history/<by>.merged    the records of many runs, in place of their objects

A run without an end is at work if its lease is held. If not, it was killed. Its last sign of life
is the latest of its start, its ``.alive``, and its last commit. Its counts come from its commits.

The history is for people. No run relies on it, so a run that cannot write it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ray_resume.checkpoint.objects import Objects

__all__ = [
    "ALIVE",
    "FOLDER",
    "OUTCOMES",
    "Facts",
    "RunHistory",
    "RunRecord",
    "is_time",
    "record_of",
]

FOLDER = "history"

OUTCOMES = ("running", "completed", "incomplete", "failed", "interrupted", "killed")
"""All that may become of a run; see :class:`RunRecord`."""

ALIVE = "alive"
"""The key in the facts of a run of its last sign of life."""

MOST_RUNS = 10_000
"""A merge keeps the records of so many runs, the newest."""

MOST_SLOW = 100
"""A merge keeps so many of the slowest sources, of all runs together."""

_END_OF_TIME = 1e12
_START, _ALIVE, _END, _MERGED = ".start", ".alive", ".end", ".merged"
_KINDS = (_START, _ALIVE, _END)
# Another process may merge the objects while they are read.
_ATTEMPTS = 5

Facts = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """One run of a checkpoint. Times are in seconds since 1970, UTC, by the clock of its host.

    Attributes:
        started_at: when it had its lease.
        ended_at: when it ended, or its last sign of life if it was killed; None while it is at
            work.
        outcome: ``"running"``; ``"completed"``: all sources of its share are; ``"incomplete"``: it
            ended by itself, and left sources; ``"failed"``: it raised ``error``;
            ``"interrupted"``: by Ctrl-C or SIGTERM; ``"killed"``: it left no end.
        sources_completed, sources_failed, rows_written: by this run, as in ``RunSummary``; what it
            had committed if it is at work or was killed. So are the other counts.
        files: how many files its sources' rows were in at its end, before small ones were merged.
        duration_s: from its start to its end or last sign of life.
        rows_at_risk: rows that it had read or written of sources that were not committed, at its
            end or last sign of life: what a kill costs, or has cost. Such a sign comes every five
            seconds.
        error: of a run that raised.
        shard: its share, None if it was to do everything.
        stages: numbers by stage, if the run has counted them.
        slowest: the sources that took longest from the start of their read until they were
            complete, and how many seconds; of a run that was killed, as of its last sign of life.
    """

    run_id: str
    started_at: float
    ended_at: float | None
    host: str
    outcome: str
    sources_completed: int = 0
    sources_failed: int = 0
    rows_written: int = 0
    duration_s: float = 0.0
    error: str | None = None
    sources_total: int = 0
    sources_skipped: int = 0
    sources_pending: int = 0
    sources_quarantined: int = 0
    rows_read: int = 0
    rows_dead_lettered: int = 0
    rows_at_risk: int = 0
    files: int = 0
    pid: int = 0
    shard: str | None = None
    stages: Mapping[str, Any] = field(default_factory=dict, hash=False)
    slowest: Mapping[str, Any] = field(default_factory=dict, hash=False)


class RunHistory:
    """The objects of the history in ``objects``.

    Raises:
        CheckpointError: every method, where the storage fails.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def begin(self, run_id: str, facts: Mapping[str, Any]) -> None:
        """Put the start of a run on record; durable when this returns."""
        self._objects.put(f"{FOLDER}/{run_id}{_START}", _encode(facts))

    def sign(self, run_id: str, facts: Mapping[str, Any]) -> None:
        """Replace a run's sign of life."""
        self._objects.replace(f"{FOLDER}/{run_id}{_ALIVE}", _encode(facts))

    def end(self, run_id: str, facts: Mapping[str, Any]) -> None:
        """Put the end of a run on record; durable when this returns."""
        self._objects.put(f"{FOLDER}/{run_id}{_END}", _encode(facts))
        self._objects.delete([f"{FOLDER}/{run_id}{_ALIVE}"])

    def loose(self) -> int:
        """Count the objects that a merge would join."""
        return len(self._objects.list(FOLDER))

    def read(self) -> dict[str, Facts]:
        """Return all that is known of each run, by its id. A damaged object says nothing."""
        for _ in range(_ATTEMPTS):
            names = self._names()
            found = dict(zip(names, self._objects.get_all(names), strict=True))
            if all(data is not None for name, data in found.items() if not name.endswith(_ALIVE)):
                break
        return _joined(found)

    def damaged(self) -> list[str]:
        """List the objects that say nothing, because they are damaged."""
        names = self._names()
        found = zip(names, self._objects.get_all(names), strict=True)
        return [name for name, data in found if data is not None and _decode(data) is None]

    def path_of(self, name: str) -> str:
        """Return where an object is kept, for messages."""
        return f"{self._objects.uri}/{name}"

    def ends(self, run_ids: Iterable[str]) -> dict[str, Facts]:
        """Return what is known by now of the ends of runs."""
        names = [f"{FOLDER}/{run_id}{_END}" for run_id in run_ids]
        return _joined(dict(zip(names, self._objects.get_all(names), strict=True)))

    def merge(self, by: str, records: Iterable[RunRecord]) -> None:
        """Put one object in the place of all. No run is at work, and the caller keeps others out.

        Args:
            by: the run id of the merge.
            records: all runs on record. The oldest of very many are forgotten.
        """
        names = self._names()
        newest = sorted(records, key=lambda record: record.started_at)[-MOST_RUNS:]
        merged = {record.run_id: _facts(record) for record in newest}
        _forget_quick(merged.values())
        self._objects.put(f"{FOLDER}/{by}{_MERGED}", _encode(merged))
        self._objects.delete(names)

    def _names(self) -> list[str]:
        return sorted(
            name for name in self._objects.list(FOLDER) if name.endswith((*_KINDS, _MERGED))
        )


def record_of(run_id: str, facts: Mapping[str, Any]) -> RunRecord:
    """Return the record of a run. A fact of another type than it should have counts as unknown."""
    values: Facts = {"ended_at": None, "host": "unknown", "outcome": "killed", "started_at": 0.0}
    for known in fields(RunRecord):
        value = facts.get(known.name)
        if value is not None and _fits(known.type, value):
            values[known.name] = value
    values["run_id"] = run_id
    if values["outcome"] not in OUTCOMES:
        values["outcome"] = "killed"
    if values["ended_at"] is not None:
        values["duration_s"] = max(0.0, values["ended_at"] - values["started_at"])
    return RunRecord(**values)


def is_time(value: Any) -> bool:
    """Say whether a value from JSON is a number that can be a time."""
    return type(value) in (int, float) and abs(value) < _END_OF_TIME


def _fits(kind: Any, value: Any) -> bool:
    """Say whether a value from JSON has the type of a field, which is text here."""
    name = str(kind).partition(" |")[0]
    if name.startswith("Mapping"):
        return isinstance(value, dict)
    if name == "float":
        return is_time(value)
    return type(value).__name__ == name


def _facts(record: RunRecord) -> Facts:
    facts = {known.name: getattr(record, known.name) for known in fields(record)}
    return {**facts, "slowest": dict(record.slowest)}


def _forget_quick(runs: Iterable[Facts]) -> None:
    """Take the sources that are not among the slowest of all out of the records of runs."""
    slow = [
        (seconds, source_id, facts["slowest"])
        for facts in runs
        for source_id, seconds in facts["slowest"].items()
        if is_time(seconds)
    ]
    slow.sort(key=lambda one: (one[0], one[1]))
    for _, source_id, slowest in slow[:-MOST_SLOW]:
        del slowest[source_id]


def _encode(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts).encode()


def _decode(data: bytes) -> Facts | None:
    """Return what an object says; None if it is damaged."""
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def _joined(objects: Mapping[str, bytes | None]) -> dict[str, Facts]:
    """Join the objects of each run: an end counts more than a start, a sign of life is apart."""
    runs: dict[str, Facts] = {}
    for kind in (_MERGED, *_KINDS):
        for name, data in objects.items():
            stem, dot, ending = name.rpartition("/")[2].rpartition(".")
            if f"{dot}{ending}" != kind or data is None:
                continue
            facts = _decode(data) or {}
            parts = facts if kind == _MERGED else {stem: facts}
            for run_id, part in parts.items():
                if isinstance(part, dict):
                    known = runs.setdefault(run_id, {})
                    known.update({ALIVE: part} if kind == _ALIVE else part)
    return runs
